"""Writing of corpora: the part of each file, the vocabulary and the index; the format is in ``data/corpus.py``."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from cellplm_jax.data.corpus import (
    GENES,
    INDEX,
    LABEL_COLUMN,
    SHARD_VALUES,
    crc32,
    gene_text,
    impossible_value,
    index_digest,
    index_type,
    parse_document,
    vocabulary_hash,
)
from cellplm_jax.data.corpus_records import FORMAT, check_record
from cellplm_jax.errors import InputError
from cellplm_jax.storage import (
    atomic_write_text,
    explain_write_errors,
    remove_path,
    removed_when_stopped,
)

CHUNK_VALUES = 2**17
"""Values per compressed chunk, the minimum that a read decodes: about 90 cells of 1,500 stored counts."""


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
        atomic_write_text(folder / GENES, gene_text(genes))


def explain_corpus_errors(what: str) -> contextlib.AbstractContextManager[None]:
    """Convert errors of a full disk or an unwritable folder to one clear message.

    Args:
        what: Description of the output for the message.

    Raises:
        InputError: Instead of the error of the operating system or of TensorStore.
    """
    return explain_write_errors(
        what,
        room="room for about 3 bytes a stored count",
        again="finished parts are kept",
    )


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
        self.folder = Path(folder)
        self.name = name
        self.genes = genes
        self.cells = len(cell_nonzeros)
        self._indptr = np.zeros(self.cells + 1, np.int64)
        np.cumsum(cell_nonzeros, out=self._indptr[1:])
        self._partial = self.folder / "parts" / f".{name}.partial"
        self._checksums: dict[str, list[int]] = {}
        self._streams: tuple[_Stream, ...] = ()
        self._open = contextlib.ExitStack()
        # SIGTERM must not leave a partial part that the next run trips over.
        self._open.enter_context(removed_when_stopped(self._partial))
        try:
            with self._explained():
                remove_path(self._partial)
                self._start()
        except BaseException:
            self.abort()
            raise

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
                samples,
                cell_names,
                source_rows,
                coordinates,
                labels,
                measured,
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
            # Pending writes would create files again after the removal.
            stream.settle()
        remove_path(self._partial)
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
        # Repeated names are one category.
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
            # anndata writes this array itself, so its checksum is computed here.
            stored = np.asarray(obs[LABEL_COLUMN].cat.codes)
            self._checksums[f"obs/{LABEL_COLUMN}/codes"] = [crc32(stored)]
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
            low = self._indptr[first]
            high = self._indptr[first + sample.cells]
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
        marker = parts / f"{self.name}.json"
        store = parts / f"{self.name}.zarr"
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        # Without its record a part counts as unfinished: an interruption from here on costs this part only.
        marker.unlink(missing_ok=True)
        remove_path(store)
        self._partial.replace(store)
        atomic_write_text(marker, text)


class _Stream:
    """One array written sequentially, in complete shards."""

    def __init__(
        self,
        path: Path,
        dtype: np.dtype,
        length: int,
        checksums: list[int],
    ):
        self.dtype = dtype
        self.length = length
        self.checksums = checksums
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
            # A copy, because a view would keep the complete block in memory.
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
            self.checksums.append(crc32(block))
            array[start : start + len(block)].write(block).result()

    def _write(self, values: np.ndarray) -> None:
        if self._array is None:
            self._array = _create(self._path, self.dtype, (self.length,))
        stop = self._written + len(values)
        if stop > self.length:
            msg = f"{self._path.name}: more than the {self.length} values announced"
            raise ValueError(msg)
        self.checksums.append(crc32(values))
        self._pending.append(self._array[self._written : stop].write(values))
        self._written = stop
        # Two writes at a time bound the memory, and overlap with the reading of the next block.
        while len(self._pending) > 1:
            self._pending.popleft().result()


def _create(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """Create a sharded, checksummed zarr v3 array; its fill value marks missing shards and cannot be a valid value."""
    # Explicit, so that files are the same on every machine.
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
            "fill_value": impossible_value(path.name, dtype),
            "attributes": attributes,
        },
    }
    return tensorstore.open(spec, create=True, delete_existing=True).result()


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
    genes = (folder / GENES).read_text(encoding="utf-8").splitlines()
    index = build_index(
        genes, {name: (folder / "parts" / f"{name}.json").read_bytes() for name in parts}
    )
    index["vocabulary"]["chosen"] = dict(vocabulary or {})
    index["sha256"] = index_digest(index)
    with explain_corpus_errors(f"the index of the corpus '{folder}'"):
        atomic_write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return index


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
    entries = []
    labels = []
    datasets = []
    platforms = []
    totals = collections.Counter(samples=0, cells=0, nonzeros=0, spatial_samples=0)
    counters: collections.Counter[str] = collections.Counter()
    seen: dict[tuple[str, str], str] = {}
    digest = vocabulary_hash(genes)
    for name, text in records.items():
        record = check_record(parse_document(f"parts/{name}.json", text), name, len(genes))
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
            samples=len(record["samples"]),
            cells=record["cells"],
            nonzeros=record["nonzeros"],
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
