"""Corpora on disk: many data sets in one format, read in contiguous ranges of cells.

A corpus is a folder, or a gs:// prefix for reading::

    corpus.json       format, parts in order with checksums, totals, platforms, label names, counters
    genes.txt         the vocabulary, one Ensembl id per line
    parts/NAME.zarr   one AnnData-encoded zarr v3 store per data set (readable with ``anndata.read_zarr``)
    parts/NAME.json   its sample table, measured genes and checksums; written last, so a part without it is unfinished

Counts are compressed sparse rows: uint16 counts and gene indices (uint32 beyond 65,536 genes), sharded, lz4, each chunk
with its CRC-32C. The cells of a sample are contiguous, in the order of
:func:`cellplm_jax.data.cell_store.storage_order`, so that the cells of a training window are one contiguous read.
TensorStore reads, from any number of threads.

:class:`PartWriter` and :func:`write_index` write a corpus, :func:`open_corpus` reads one.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore

from cellplm_jax.data.cell_store import CellRun, SampleRecord
from cellplm_jax.data.corpus_records import (
    FORMAT,
    check_entry,
    check_index,
    check_names,
    check_record,
)
from cellplm_jax.display import Displayed
from cellplm_jax.errors import InputError, explain, shorten
from cellplm_jax.storage import (
    Folder,
    atomic_write_text,
    explain_write_errors,
    is_remote,
    removed_when_stopped,
)
from cellplm_jax.untrusted import JSON_BYTES, name_lines, parse_json, require_regular

if TYPE_CHECKING:
    import pandas as pd

CHUNK_VALUES = 2**17
"""Values per compressed chunk, the minimum that a read decodes: about 90 cells of 1,500 stored counts."""

SHARD_VALUES = 2**23
"""Values per shard (one file): 16 MB of counts before compression."""

CACHE_BYTES = 64 * 2**20
"""Cache size in bytes for decoded chunks of a :class:`Corpus`: shard indices and the edges of ranges."""

OFFSET_BYTES = 256 * 2**20
"""Cache size in bytes for cell offsets, enough for 32 M cells."""

LABEL_COLUMN = "label"
"""Column of ``obs`` in a part with the labels."""

_INDEX = "corpus.json"
_GENES = "genes.txt"


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartSample:
    """One sample of a part that is being written.

    Attributes:
        name: Unique within the data set.
        cells: Number of cells, consecutive in the part.
        platform_name: Name of the platform; "" if unknown.
        spatial: Whether any of its cells has coordinates.
    """

    name: str
    cells: int
    platform_name: str = ""
    spatial: bool = False


def vocabulary_hash(genes: Sequence[str]) -> str:
    """Return the SHA-256 of a vocabulary, the same as that of its ``genes.txt``."""
    return hashlib.sha256(_gene_text(genes).encode()).hexdigest()


def write_genes(folder: str | os.PathLike, genes: Sequence[str]) -> None:
    """Write the vocabulary of a new corpus and create its folders.

    Args:
        folder: The corpus.
        genes: Ensembl ids, in column order.

    Raises:
        InputError: The disk is full or the folder is not writable.
    """
    folder = Path(folder)
    with explain_corpus_errors(f"the corpus '{folder}'"):
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / _GENES, _gene_text(genes))


def explain_corpus_errors(what: str) -> contextlib.AbstractContextManager[None]:
    """Convert errors of a full disk or an unwritable folder to one clear message.

    Args:
        what: Description of the output for the message.

    Raises:
        InputError: Instead of the error of the operating system or of TensorStore.
    """
    return explain_write_errors(
        what, room="room for about 3 bytes a stored count", again="finished parts are kept"
    )


def index_type(genes: int) -> np.dtype:
    """Return the type of stored gene indices: uint16, or uint32 with more than 65,536 genes."""
    return np.dtype(np.uint16 if genes <= 65_536 else np.uint32)


class PartWriter:
    """Writes one part of a corpus: first the counts, sequentially and in bounded memory, then all other data.

    The part is invisible before :meth:`finish`; leaving the context manager early removes the written data.

    Args:
        folder: The corpus; ``genes.txt`` and ``parts/`` exist already (:func:`write_genes`).
        name: Name of the part, normally the stem of its file. An existing part with that name is replaced at the end.
        genes: The vocabulary of the corpus.
        cell_nonzeros: int [cells]. Stored counts of each cell, in the order of the part.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        name: str,
        genes: Sequence[str],
        cell_nonzeros: np.ndarray,
    ):
        self.folder, self.name, self.genes = Path(folder), name, genes
        self.cells = len(cell_nonzeros)
        self._indptr = np.zeros(self.cells + 1, np.int64)
        np.cumsum(cell_nonzeros, out=self._indptr[1:])
        self._partial = self.folder / "parts" / f".{name}.partial"
        self._checksums: dict[str, list[int]] = {}
        self._streams: tuple[_Stream, ...] = ()
        self._open = contextlib.ExitStack()
        self._open.enter_context(removed_when_stopped(self._partial))
        with self._explained():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._start()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def nonzeros(self) -> int:
        """Number of stored counts of the part."""
        return int(self._indptr[-1])

    def append(self, gene: np.ndarray, count: np.ndarray) -> None:
        """Append the stored counts of the next cells.

        Args:
            gene: Index into the vocabulary [nonzeros], increasing within each cell.
            count: Count [nonzeros], 1 to 65,535.

        Raises:
            InputError: The disk is full.
        """
        with self._explained():
            indices, data = self._streams
            indices.append(gene)
            data.append(count)

    def finish(
        self,
        samples: Sequence[PartSample],
        *,
        dataset_name: str,
        cell_names: Sequence[str],
        source_rows: np.ndarray | None = None,
        coordinates: np.ndarray | None = None,
        labels: Sequence[str | None] | None = None,
        measured: np.ndarray | None = None,
        source: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        counters: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write all remaining data and publish the part.

        Args:
            samples: The samples in order; their cells add up to those of the part.
            dataset_name: The data set of the samples.
            cell_names: Original names [cells].
            source_rows: int [cells]. Row of each cell in its source; None: the order of the part.
            coordinates: float32 [cells, 2] scaled to [0, 1] by sample, NaN for cells without coordinates; None: no cell
                has any.
            labels: One label per cell, None for cells without a label; None: no labels.
            measured: bool [genes]; None: all.
            source: Source of the part (``name``, ``size``, ``signature``).
            settings: Settings of the preparation; a part with other settings is prepared again.
            counters: Numbers of clipped, omitted and unknown values.

        Returns:
            The record written as ``parts/NAME.json``.

        Raises:
            InputError: The disk is full.
            ValueError: The number of appended counts differs from the announced number, or the arguments are
                inconsistent.
        """
        lengths = {"samples": sum(s.cells for s in samples), "cell_names": len(cell_names)}
        for name, values in (
            ("source_rows", source_rows),
            ("coordinates", coordinates),
            ("labels", labels),
        ):
            if values is not None:
                lengths[name] = len(values)
        if set(lengths.values()) != {self.cells}:
            msg = f"a part of {self.cells} cells was given {lengths}"
            raise ValueError(msg)
        with self._explained():
            for stream in self._streams:
                stream.close()
            categories = self._write_cells(
                samples, cell_names, source_rows, coordinates, labels, measured
            )
            record = self._record(samples, dataset_name, categories, measured)
            record["source"] = dict(source or {})
            record["settings"] = dict(settings or {})
            record["counters"] = dict(counters or {})
            self._publish(record)
        return record

    def abort(self) -> None:
        """Remove the written data, unless the part is finished."""
        for stream in self._streams:
            stream.settle()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._open.close()

    # -- parts of the above ----------------------------------------------------------------------

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explain_corpus_errors(f"part '{self.name}' of the corpus '{self.folder}'")

    def _start(self) -> None:
        """Create the store and the arrays of the counts."""
        import anndata
        import zarr

        root = zarr.open_group(str(self._partial), mode="w", zarr_format=3)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        group = root.create_group("X")
        group.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": [self.cells, len(self.genes)],
            }
        )
        with anndata_settings():
            for name in ("layers", "obsp", "varm", "varp", "uns"):
                anndata.io.write_elem(root, name, {})
        types = (index_type(len(self.genes)), np.dtype(np.uint16))
        self._streams = tuple(
            self._stream(f"X/{name}", dtype, self.nonzeros)
            for name, dtype in zip(("indices", "data"), types, strict=True)
        )
        offsets = self._stream("X/indptr", np.dtype(np.int64), self.cells + 1)
        offsets.append(self._indptr)
        offsets.close()

    def _stream(self, array: str, dtype: np.dtype, length: int) -> _Stream:
        checksums = self._checksums[array] = []
        return _Stream(self._partial / array, dtype, length, checksums)

    def _write_cells(
        self,
        samples: Sequence[PartSample],
        cell_names: Sequence[str],
        source_rows: np.ndarray | None,
        coordinates: np.ndarray | None,
        labels: Sequence[str | None] | None,
        measured: np.ndarray | None,
    ) -> list[str]:
        """Write obs, var and obsm; return the categories of the labels."""
        import anndata
        import pandas as pd
        import zarr

        root = zarr.open_group(str(self._partial), mode="a", zarr_format=3)
        names = list(dict.fromkeys(sample.name for sample in samples))
        codes = np.repeat(
            [names.index(sample.name) for sample in samples], [sample.cells for sample in samples]
        )
        rows = np.arange(self.cells) if source_rows is None else source_rows
        obs = pd.DataFrame(
            {
                "sample": pd.Categorical.from_codes(codes.astype(np.int64), categories=names),
                "source_row": np.asarray(rows, np.int64),
            },
            index=pd.Index(np.asarray(cell_names, dtype=object)),
        )
        categories: list[str] = []
        if labels is not None:
            categories = sorted({label for label in labels if label is not None})
            obs[LABEL_COLUMN] = pd.Categorical(list(labels), categories=categories)
        known = np.ones(len(self.genes), bool) if measured is None else np.asarray(measured, bool)
        var = pd.DataFrame(
            {"measured": known}, index=pd.Index(np.asarray(self.genes, dtype=object))
        )
        with anndata_settings():
            anndata.io.write_elem(root, "obs", obs)
            anndata.io.write_elem(root, "var", var)
            anndata.io.write_elem(root, "obsm", {})
        if coordinates is not None:
            stream = self._stream("obsm/spatial", np.dtype(np.float32), 2 * self.cells)
            stream.close_pairs(np.asarray(coordinates, np.float32))
        if labels is not None:
            stored = np.asarray(obs[LABEL_COLUMN].cat.codes)
            self._checksums[f"obs/{LABEL_COLUMN}/codes"] = [_crc(stored)]
        return categories

    def _record(
        self,
        samples: Sequence[PartSample],
        dataset_name: str,
        categories: list[str],
        measured: np.ndarray | None,
    ) -> dict[str, Any]:
        table, first = [], 0
        for sample in samples:
            low, high = self._indptr[first], self._indptr[first + sample.cells]
            table.append(
                {
                    "name": sample.name,
                    "platform": sample.platform_name,
                    "cells": sample.cells,
                    "nonzeros": int(high - low),
                    "first_cell": first,
                    "first_nonzero": int(low),
                    "spatial": sample.spatial,
                }
            )
            first += sample.cells
        known = np.ones(len(self.genes), bool) if measured is None else np.asarray(measured, bool)
        return {
            "format": FORMAT,
            "name": self.name,
            "dataset": dataset_name,
            "vocabulary": vocabulary_hash(self.genes),
            "cells": self.cells,
            "nonzeros": self.nonzeros,
            "genes_measured": int(known.sum()),
            "measured": np.packbits(known).tobytes().hex(),
            "labels": categories,
            "samples": table,
            "checksums": self._checksums,
        }

    def _publish(self, record: dict[str, Any]) -> None:
        """Replace an older part with the same name; the record is written last."""
        parts = self.folder / "parts"
        marker, store = parts / f"{self.name}.json", parts / f"{self.name}.zarr"
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        marker.unlink(missing_ok=True)
        shutil.rmtree(store, ignore_errors=True)
        self._partial.replace(store)
        atomic_write_text(marker, text)


class _Stream:
    """One array written sequentially, in complete shards."""

    def __init__(self, path: Path, dtype: np.dtype, length: int, checksums: list[int]):
        self.dtype, self.length, self.checksums = dtype, length, checksums
        self._path = path
        self._held: list[np.ndarray] = []
        self._waiting = self._written = 0
        self._pending: collections.deque[Any] = collections.deque()
        self._array: Any = None

    def append(self, values: np.ndarray) -> None:
        """Buffer values; complete shards are written asynchronously, two at a time."""
        self._held.append(np.asarray(values).astype(self.dtype, copy=False).reshape(-1))
        self._waiting += len(self._held[-1])
        if self._waiting >= SHARD_VALUES:
            joined = np.concatenate(self._held)
            whole = len(joined) // SHARD_VALUES * SHARD_VALUES
            for start in range(0, whole, SHARD_VALUES):
                self._write(joined[start : start + SHARD_VALUES])
            self._held = [joined[whole:].copy()]
            self._waiting = len(self._held[0])

    def close(self) -> None:
        """Write the remaining values and wait for all writes."""
        if self._array is None:
            self._array = _create(self._path, self.dtype, (self.length,))
        if self._waiting:
            self._write(np.concatenate(self._held))
            self._held, self._waiting = [], 0
        while self._pending:
            self._pending.popleft().result()
        if self._written != self.length:
            msg = f"{self._path.name}: {self._written} values were written, {self.length} announced"
            raise ValueError(msg)

    def settle(self) -> None:
        """Wait for pending writes and ignore their errors."""
        while self._pending:
            with contextlib.suppress(ValueError, RuntimeError, OSError):
                self._pending.popleft().result()

    def close_pairs(self, values: np.ndarray) -> None:
        """Write an array [length / 2, 2] in one step; small compared with the counts."""
        array = _create(self._path, self.dtype, values.shape)
        step = SHARD_VALUES // 2
        for start in range(0, len(values), step):
            block = np.ascontiguousarray(values[start : start + step])
            self.checksums.append(_crc(block))
            array[start : start + len(block)].write(block).result()

    def _write(self, values: np.ndarray) -> None:
        if self._array is None:
            self._array = _create(self._path, self.dtype, (self.length,))
        stop = self._written + len(values)
        if stop > self.length:
            msg = f"{self._path.name}: more than the {self.length} values announced"
            raise ValueError(msg)
        self.checksums.append(_crc(values))
        self._pending.append(self._array[self._written : stop].write(values))
        self._written = stop
        while len(self._pending) > 1:
            self._pending.popleft().result()


def _create(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """Create a sharded, checksummed zarr v3 array; its fill value marks missing shards and cannot be a valid value."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "shuffle",
        "typesize": dtype.itemsize,
        "blocksize": 0,
    }
    wide = list(shape[1:])
    per_row = int(np.prod(wide, dtype=np.int64))
    sharding = {
        "chunk_shape": [CHUNK_VALUES // per_row, *wide],
        "codecs": [little, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    attributes: dict[str, Any] = {}
    if wide:
        attributes = {"encoding-type": "array", "encoding-version": "0.2.0"}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [SHARD_VALUES // per_row, *wide]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": _impossible_value(path.name, dtype),
            "attributes": attributes,
        },
    }
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def _impossible_value(array: str, dtype: np.dtype) -> int | str:
    """Return the fill value of missing shards: no count is 0, no gene has the last index, no offset is negative."""
    if array == "indices":
        return int(np.iinfo(dtype).max)
    return {"i": -1, "u": 0, "f": "NaN"}[dtype.kind]


def _crc(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)


@contextlib.contextmanager
def anndata_settings() -> Iterator[None]:
    """Write zarr v3, and nullable strings if anndata has a setting for them."""
    import anndata

    wanted: dict[str, Any] = {"zarr_write_format": 3}
    for name, value in (("allow_write_nullable_strings", True), ("auto_shard_zarr_v3", False)):
        if hasattr(anndata.settings, name):
            wanted[name] = value
    with anndata.settings.override(**wanted):
        yield


def _gene_text(genes: Sequence[str]) -> str:
    return "".join(f"{gene}\n" for gene in genes)


def write_index(
    folder: str | os.PathLike,
    parts: Sequence[str],
    *,
    vocabulary: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``corpus.json`` from finished parts, which completes a corpus.

    Args:
        folder: The corpus.
        parts: Names of the parts, in the order of their sample numbers.
        vocabulary: Record of the choice of the vocabulary, stored without change.

    Returns:
        The index.

    Raises:
        InputError: A part has another vocabulary, two samples of a data set share a name, or the disk is full.
    """
    folder = Path(folder)
    genes = (folder / _GENES).read_text(encoding="utf-8").splitlines()
    index = build_index(
        genes, {name: (folder / "parts" / f"{name}.json").read_bytes() for name in parts}
    )
    index["vocabulary"]["chosen"] = dict(vocabulary or {})
    index["sha256"] = _index_digest(index)
    with explain_corpus_errors(f"the index of the corpus '{folder}'"):
        atomic_write_text(folder / _INDEX, json.dumps(index, indent=1) + "\n")
    return index


def _read_genes(folder: Folder, number: int) -> list[str]:
    """Return the vocabulary of a corpus, or no genes if its file is no list of that many names."""
    path = folder.local and folder.local / _GENES
    # Not read at all where the names would have hundreds of letters.
    if path and path.is_file() and path.stat().st_size > 200 * (number + 100):
        return []
    with contextlib.suppress(ValueError):
        return name_lines(folder.read(_GENES) or b"")
    return []


def _index_digest(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the contents of ``corpus.json`` except itself."""
    rest = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def build_index(genes: Sequence[str], records: Mapping[str, bytes]) -> dict[str, Any]:
    """Combine the records of parts.

    Args:
        genes: The vocabulary.
        records: The bytes of each ``parts/NAME.json``, in order.

    Returns:
        The contents of ``corpus.json``.

    Raises:
        InputError: A part has another vocabulary, or two samples of a data set share a name.
    """
    entries, labels, datasets, platforms = [], [], [], []
    totals = collections.Counter(samples=0, cells=0, nonzeros=0, spatial_samples=0)
    counters: collections.Counter[str] = collections.Counter()
    seen: dict[tuple[str, str], str] = {}
    digest = vocabulary_hash(genes)
    for name, text in records.items():
        record = check_record(_parse(f"parts/{name}.json", text), name, len(genes))
        if record["vocabulary"] != digest:
            raise InputError(
                f"part '{name}' was made with another vocabulary",
                f"the {len(genes)} genes of genes.txt",
                f"Delete parts/{name}.json and run cellplm prepare again with its file",
            )
        for sample in record["samples"]:
            key = (record["dataset"], sample["name"])
            if key in seen:
                raise InputError(
                    f"sample '{key[1]}' of data set '{key[0]}' is both in part '{seen[key]}' and in "
                    f"part '{name}'",
                    "sample names that are unique within a data set",
                    "Rename it in one of the files, or prepare without --dataset-key",
                )
            seen[key] = name
            totals["spatial_samples"] += sample["spatial"]
            if sample["platform"]:
                platforms.append(sample["platform"])
        datasets.append(record["dataset"])
        labels += record["labels"]
        totals.update(
            samples=len(record["samples"]), cells=record["cells"], nonzeros=record["nonzeros"]
        )
        counters.update({k: v for k, v in record["counters"].items() if isinstance(v, int)})
        entries.append(
            {
                "name": name,
                "dataset": record["dataset"],
                "source": record["source"],
                "samples": len(record["samples"]),
                "cells": record["cells"],
                "nonzeros": record["nonzeros"],
                "genes_measured": record["genes_measured"],
                "sha256": hashlib.sha256(text).hexdigest(),
            }
        )
    return {
        "format": FORMAT,
        "complete": True,
        "vocabulary": {"genes": len(genes), "sha256": digest},
        "totals": dict(totals),
        "counters": dict(counters),
        "datasets": list(dict.fromkeys(datasets)),
        "platforms": list(dict.fromkeys(platforms)),
        "label_names": list(dict.fromkeys(labels)),
        "parts": entries,
    }


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part of an open corpus.

    Attributes:
        name: Name of the part.
        record: Contents of ``parts/NAME.json``.
        measured: bool [genes]; None: all.
        label_codes: int32 [labels + 1], from the part's label codes (-1 last) to those of the corpus; None: no labels.
    """

    name: str
    record: Mapping[str, Any]
    measured: np.ndarray | None
    label_codes: np.ndarray | None


class Corpus(Displayed):
    """An open corpus, a :class:`cellplm_jax.data.cell_store.CellStore`. Created by :func:`open_corpus`.

    Attributes:
        path: Path of the corpus.
        genes: Vocabulary, Ensembl ids.
        samples: The sample table.
        label_names: Names of the labels of all parts.
        index: Contents of ``corpus.json``.
        parts: The parts in order.
    """

    def __init__(
        self,
        folder: Folder,
        context: Any,
        genes: list[str],
        index: dict[str, Any],
        records: Mapping[str, Mapping[str, Any]],
    ):
        """Store the fields read by :func:`open_corpus`."""
        self.path, self.genes, self.index = folder.path, genes, index
        self.label_names: list[str] = list(index["label_names"])
        self.parts = [self._part(name, record) for name, record in records.items()]
        datasets = {name: number for number, name in enumerate(index["datasets"])}
        platforms = {name: number for number, name in enumerate(index["platforms"])}
        self.samples: list[SampleRecord] = []
        self._where: list[tuple[int, int, int]] = []
        for number, part in enumerate(self.parts):
            for row in part.record["samples"]:
                self.samples.append(
                    SampleRecord(
                        name=row["name"],
                        dataset_name=part.record["dataset"],
                        platform_name=row["platform"],
                        cells=row["cells"],
                        nonzeros=row["nonzeros"],
                        spatial=row["spatial"],
                        batch=len(self.samples),
                        dataset=datasets[part.record["dataset"]],
                        platform=platforms.get(row["platform"], -1),
                    )
                )
                self._where.append((number, row["first_cell"], row["first_nonzero"]))
        self._folder, self._context = folder, context
        self._arrays: dict[tuple[int, str], Any] = {}
        self._offsets: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._offset_bytes = 0
        self._lock = threading.Lock()

    def _display(self) -> dict[str, Any]:
        totals = self.index["totals"]
        return {
            "path": self.path,
            "samples": len(self.samples),
            "cells": totals["cells"],
            "genes": len(self.genes),
            "datasets": list(self.index["datasets"]),
            "labels": self.label_names,
        }

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.__dict__.update(open_corpus(path).__dict__)

    def indptr(self, sample: int) -> np.ndarray:
        """Return int64 [cells + 1]: offsets of each cell's stored counts, from 0 at the sample's first cell.

        Raises:
            InputError: The part is damaged.
        """
        with self._lock:
            if sample in self._offsets:
                self._offsets.move_to_end(sample)
                return self._offsets[sample]
        number, first, base = self._where[sample]
        row = self.samples[sample]
        (stored,) = self._read(number, {"X/indptr": (first, first + row.cells + 1)})
        offsets = stored.astype(np.int64) - base
        sound = offsets[0] == 0 and offsets[-1] == row.nonzeros
        if not sound or (np.diff(offsets) < 0).any():
            raise InputError(
                self._damaged(number, f"cell offsets of sample '{row.name}' are wrong")
            )
        offsets.flags.writeable = False
        with self._lock:
            if sample not in self._offsets:
                self._offsets[sample] = offsets
                self._offset_bytes += offsets.nbytes
            while self._offset_bytes > OFFSET_BYTES and len(self._offsets) > 1:
                self._offset_bytes -= self._offsets.popitem(last=False)[1].nbytes
        return offsets

    def read(self, sample: int, start: int, stop: int) -> CellRun:
        """Read cells ``start`` to ``stop`` (exclusive) of one sample.

        Raises:
            InputError: The part is damaged; the message names it.
            IndexError: The range is outside the sample.
        """
        row = self.samples[sample]
        if not 0 <= start <= stop <= row.cells:
            msg = f"cells {start} to {stop} asked for, of the {row.cells} of sample '{row.name}'"
            raise IndexError(msg)
        number, first, base = self._where[sample]
        part = self.parts[number]
        offsets = self.indptr(sample)
        low, high = base + int(offsets[start]), base + int(offsets[stop])
        wanted = {"X/indices": (low, high), "X/data": (low, high)}
        if row.spatial:
            wanted["obsm/spatial"] = (first + start, first + stop)
        if part.label_codes is not None:
            wanted[f"obs/{LABEL_COLUMN}/codes"] = (first + start, first + stop)
        arrays = dict(zip(wanted, self._read(number, wanted), strict=True))
        gene, count = arrays["X/indices"], arrays["X/data"]
        # A missing shard reads as impossible values.
        if count.size and (int(count.min()) == 0 or int(gene.max()) >= len(self.genes)):
            what = f"counts of sample '{row.name}' are missing or out of range"
            raise InputError(self._damaged(number, what))
        labels = None
        if self.label_names:
            labels = np.full(stop - start, -1, np.int32)
            if part.label_codes is not None:
                codes = arrays[f"obs/{LABEL_COLUMN}/codes"].astype(np.int64)
                if codes.size and not -1 <= codes.min() <= codes.max() < len(part.label_codes) - 1:
                    what = f"labels of sample '{row.name}' are out of range"
                    raise InputError(self._damaged(number, what))
                labels = part.label_codes[codes]
        return CellRun(
            indptr=offsets[start : stop + 1] - offsets[start],
            gene=gene,
            count=count,
            coordinates=arrays.get("obsm/spatial"),
            labels=labels,
        )

    def coordinates(self, sample: int) -> np.ndarray | None:
        """Return float32 [cells, 2], scaled per sample, NaN for cells without coordinates; None: not a spatial sample.

        Raises:
            InputError: The part is damaged.
        """
        row = self.samples[sample]
        if not row.spatial:
            return None
        number, first, _ = self._where[sample]
        (values,) = self._read(number, {"obsm/spatial": (first, first + row.cells)})
        return values

    def cell_table(self, part: int) -> pd.DataFrame:
        """Read ``obs`` of a part: original cell names, with sample, row in the source and label.

        Args:
            part: Position in ``parts``.

        Raises:
            InputError: The part is damaged.
        """
        import zarr
        from anndata.io import read_elem

        inside = f"parts/{self.parts[part].name}.zarr/obs"
        with tempfile.TemporaryDirectory() as temporary:
            try:
                if self._folder.local is None:
                    self._folder.fetch(inside, Path(temporary))
                    place = Path(temporary)
                else:
                    place = self._folder.local / inside
                table: Any = read_elem(zarr.open_group(str(place), mode="r"))
            except InputError:
                raise
            except (OSError, KeyError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:240]
                raise InputError(self._damaged(part, f"obs cannot be read: {reason}")) from error
        cells = self.parts[part].record["cells"]
        if len(table) != cells:
            raise InputError(self._damaged(part, f"obs has {len(table)} cells of {cells}"))
        return table

    def measured(self, sample: int) -> np.ndarray | None:
        """Return bool [genes], the genes measured in the sample; None: all."""
        return self.parts[self._where[sample][0]].measured

    def fingerprint(self) -> str:
        """Return a short hash of the vocabulary and of the sample table."""
        table = [
            (s.dataset_name, s.name, s.platform_name, s.cells, s.nonzeros, s.spatial)
            for s in self.samples
        ]
        text = json.dumps([vocabulary_hash(self.genes), table])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def part_of(self, sample: int) -> str:
        """Return the name of the part that contains the sample."""
        return self.parts[self._where[sample][0]].name

    def verify(self, advance: Callable[[int], None] | None = None) -> list[str]:
        """Read all data and compare it with the checksums of the parts.

        Args:
            advance: Called with the number of stored counts checked so far.

        Returns:
            One message per damaged part; empty if all are valid.
        """
        problems: list[str] = []
        done = 0
        for number, part in enumerate(self.parts):
            try:
                for checked in self._verify_part(number):
                    if advance is not None:
                        advance(done + checked)
            except InputError as error:
                problems.append(str(error))
            done += part.record["nonzeros"]
        return problems

    # -- parts of the above ----------------------------------------------------------------------

    def _verify_part(self, number: int) -> Iterator[int]:
        """Yield the number of stored counts checked so far; raise an error at the first mismatch."""
        record = self.parts[number].record
        cells, nonzeros = record["cells"], record["nonzeros"]
        lengths = {
            "X/indices": (nonzeros, SHARD_VALUES),
            "X/data": (nonzeros, SHARD_VALUES),
            "X/indptr": (cells + 1, SHARD_VALUES),
            "obsm/spatial": (cells, SHARD_VALUES // 2),
            f"obs/{LABEL_COLUMN}/codes": (cells, max(1, cells)),
        }
        missing = [
            name for name in ("X/indices", "X/data", "X/indptr") if name not in record["checksums"]
        ]
        if missing:
            raise InputError(self._damaged(number, f"{missing[0]} has no checksum"))
        checked = 0
        for array, expected in record["checksums"].items():
            length, step = lengths[array]
            if len(expected) != -(-length // step):
                raise InputError(
                    self._damaged(
                        number, f"{array} has {len(expected)} checksums, not one per shard"
                    )
                )
            checksums = []
            for start in range(0, length, step):
                stop = min(start + step, length)
                (values,) = self._read(number, {array: (start, stop)})
                checksums.append(_crc(values))
                if array.startswith("X/") and array != "X/indptr":
                    checked += (stop - start) // 2
                    yield checked
            if checksums != expected:
                wrong = [
                    i
                    for i, pair in enumerate(itertools.zip_longest(checksums, expected))
                    if pair[0] != pair[1]
                ]
                what = f"shard {wrong[0]} of {array} is not what was written"
                raise InputError(self._damaged(number, what))

    def _part(self, name: str, record: Mapping[str, Any]) -> Part:
        bits = np.frombuffer(bytes.fromhex(record["measured"]), np.uint8)
        measured = np.unpackbits(bits, count=len(self.genes)).astype(bool)
        codes = None
        if record["labels"]:
            numbers = [self.label_names.index(label) for label in record["labels"]]
            codes = np.array([*numbers, -1], np.int32)
        return Part(name, record, None if measured.all() else measured, codes)

    def _open(self, number: int, array: str) -> Any:
        """Return the handle of an array, cached after opening."""
        key = (number, array)
        with self._lock:
            if key in self._arrays:
                return self._arrays[key]
        spec = {
            "driver": "zarr3",
            "kvstore": self._folder.spec(f"parts/{self.parts[number].name}.zarr/{array}"),
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        handle = tensorstore.open(spec, read=True, context=self._context).result()
        self._check_array(number, array, handle)
        self._check_stored(number, array, handle)
        with self._lock:
            return self._arrays.setdefault(key, handle)

    def _check_array(self, number: int, array: str, handle: Any) -> None:
        """Raise an error for an array that is not stored as :func:`_create` stores it.

        The fill value marks missing shards, and CRC-32C finds damaged ones; a changed type or shape reads other bytes.
        """
        record, wide = self.parts[number].record, array == "obsm/spatial"
        if array.startswith("X/"):
            types = {"X/indices": index_type(len(self.genes)), "X/data": np.dtype(np.uint16)}
            dtype = types.get(array, np.dtype(np.int64))
            length = record["nonzeros"] if array in types else record["cells"] + 1
            expected = {"data_type": dtype.name, "shape": [length]}
            expected["fill_value"] = _impossible_value(array.split("/")[1], dtype)
        elif wide:
            expected = {"data_type": "float32", "shape": [record["cells"], 2], "fill_value": "NaN"}
        else:
            expected = {"shape": [record["cells"]]}
        metadata = handle.spec().to_json()["metadata"]
        wrong = [name for name, value in expected.items() if metadata.get(name) != value]
        codecs = metadata.get("codecs", [])
        inner = codecs[0].get("configuration", {}).get("codecs", []) if codecs else []
        if (wide or array.startswith("X/")) and not any(c.get("name") == "crc32c" for c in inner):
            wrong.append("codecs")
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if int(np.prod(chunk, dtype=object)) > max(SHARD_VALUES, 2 * record["cells"]):
            wrong.append("chunk_shape")
        if wrong:
            raise InputError(
                self._damaged(number, f"{wrong[0]} of {array} is not what was written")
            )

    def _check_stored(self, number: int, array: str, handle: Any) -> None:
        """Check, when an array is opened, that nothing is missing whose fill value is a valid value."""
        part = self.parts[number]
        expected = part.record["checksums"].get(array)
        if array == f"obs/{LABEL_COLUMN}/codes" and expected:
            # Written without checksums of chunks, and small.
            if [_crc(handle.read().result())] != expected:
                raise InputError(self._damaged(number, f"{array} is not what was written"))
        elif array == "obsm/spatial" and expected and self._folder.local is not None:
            shards = self._folder.local / "parts" / f"{part.name}.zarr" / array / "c"
            for shard in range(len(expected)):
                if not (shards / str(shard) / "0").is_file():
                    raise InputError(self._damaged(number, f"shard {shard} of {array} is missing"))

    def _read(self, number: int, wanted: Mapping[str, tuple[int, int]]) -> list[np.ndarray]:
        """Read ranges of several arrays of a part concurrently."""
        try:
            pending = []
            for array, (low, high) in wanted.items():
                handle = self._open(number, array)
                if high > handle.shape[0]:
                    what = f"{array} ends at {handle.shape[0]} of {high}"
                    raise InputError(self._damaged(number, what))
                pending.append(handle[low:high].read())
            return [future.result() for future in pending]
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:240]
            raise InputError(self._damaged(number, reason)) from error

    def _damaged(self, number: int, what: str) -> str:
        part = self.parts[number]
        source = part.record["source"].get("name", "its file")
        return explain(
            f"part '{part.name}' of the corpus '{self.path}' is damaged ({what})",
            "the arrays that parts/NAME.json describes",
            f"Copy parts/{part.name}.zarr again, or delete parts/{part.name}.json and run cellplm "
            f"prepare again with {source}",
        )


def is_corpus(path: str | os.PathLike) -> bool:
    """Return whether a folder or gs:// prefix is a corpus."""
    if not is_remote(path):
        return (Path(path).expanduser() / _INDEX).is_file()
    return Folder(path, tensorstore.Context()).read(_INDEX) is not None


def open_corpus(path: str | os.PathLike, *, cache_bytes: int = CACHE_BYTES) -> Corpus:
    """Open a corpus and check that it is complete.

    Args:
        path: Local folder, or ``gs://BUCKET/FOLDER``.
        cache_bytes: Cache size in bytes for decoded chunks.

    Returns:
        The corpus; its arrays are opened on first access.

    Raises:
        InputError: The corpus does not exist or is incomplete, it has another format, or its vocabulary or a part is
            missing or differs from the index.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    folder = Folder(path, context)
    if folder.local is not None:
        _check_files(folder)
    text = folder.read(_INDEX)
    if text is None:
        raise InputError(
            f"'{folder.path}' contains no corpus.json",
            "a corpus made by cellplm prepare",
            "Check the path, or run: cellplm prepare FILE.h5ad ... --out CORPUS",
        )
    index = _parse(f"{folder.path}/{_INDEX}", text)
    written = index.get("format") if isinstance(index, dict) else None
    if not isinstance(index, dict) or written != FORMAT:
        raise InputError(
            f"the corpus '{folder.path}' has format {shorten(str(written))}",
            f"format {FORMAT}",
            "Use the version of cellplm-jax that wrote it, or prepare it again",
        )
    if not index.get("complete"):
        raise InputError(
            f"the corpus '{folder.path}' is unfinished",
            "a completely prepared corpus",
            "Run the same cellplm prepare command again; finished parts are kept",
        )
    if index.get("sha256", _index_digest(index)) != _index_digest(index):
        raise InputError(
            f"'{folder.path}/{_INDEX}' is damaged: its checksum differs",
            "the file that cellplm prepare wrote",
            "Copy the corpus again, or run the same cellplm prepare command again",
        )
    check_index(index, folder.path)
    genes = _read_genes(folder, index["vocabulary"]["genes"])
    if vocabulary_hash(genes) != index["vocabulary"]["sha256"]:
        raise InputError(
            f"genes.txt of the corpus '{folder.path}' has {len(genes)} genes that are not its "
            "vocabulary",
            f"the {index['vocabulary']['genes']} genes the corpus was made with",
            "Put the original genes.txt back, or prepare the corpus again",
        )
    waiting = {
        entry["name"]: folder.request(f"parts/{entry['name']}.json") for entry in index["parts"]
    }
    records = {}
    for entry in index["parts"]:
        name = entry["name"]
        text = waiting[name]()
        if text is None or hashlib.sha256(text).hexdigest() != entry["sha256"]:
            found = "is missing" if text is None else "is not the one corpus.json describes"
            raise InputError(
                f"parts/{name}.json of the corpus '{folder.path}' {found}",
                "every part that the corpus lists",
                f"Copy the part again, or run cellplm prepare again with "
                f"{entry['source'].get('name', 'its file')}",
            )
        records[name] = check_record(
            _parse(f"{folder.path}/parts/{name}.json", text), name, len(genes)
        )
        check_entry(entry, records[name], folder.path)
    check_names(index, records, folder.path)
    return Corpus(folder, context, genes, index, records)


def _check_files(folder: Folder) -> None:
    """Raise an error for pipes, devices, links out of a local corpus, and texts that are too large to be its own."""
    local = folder.local
    if local is None or not local.is_dir():
        return
    require_regular(local, inside=True)
    for path in (local / _INDEX, local / _GENES, *(local / "parts").glob("*.json")):
        size = path.stat().st_size if path.is_file() else 0
        if size > JSON_BYTES:
            raise InputError(
                f"'{path}' has {size:,} bytes",
                f"{JSON_BYTES:,} or fewer",
                "Copy the corpus again, or prepare it again",
            )


def _parse(path: str, text: bytes) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(
            f"'{path}' is not JSON ({error})",
            "the file that cellplm prepare wrote",
            "Copy the corpus again, or prepare it again",
        ) from error
