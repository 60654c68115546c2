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

:func:`open_corpus` reads a corpus; ``data/corpus_writer.py`` writes one.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
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
from cellplm_jax.storage import Folder, is_remote
from cellplm_jax.untrusted import JSON_BYTES, name_lines, parse_json, require_regular

if TYPE_CHECKING:
    import pandas as pd

SHARD_VALUES = 2**23
"""Values per shard (one file): 16 MB of counts before compression."""

CACHE_BYTES = 64 * 2**20
"""Cache size in bytes for decoded chunks of a :class:`Corpus`: shard indices and the edges of ranges."""

OFFSET_BYTES = 256 * 2**20
"""Cache size in bytes for cell offsets, enough for 32 M cells."""

LABEL_COLUMN = "label"
"""Column of ``obs`` in a part with the labels."""

INDEX = "corpus.json"
GENES = "genes.txt"


def vocabulary_hash(genes: Sequence[str]) -> str:
    """Return the SHA-256 of a vocabulary, the same as that of its ``genes.txt``."""
    return hashlib.sha256(gene_text(genes).encode()).hexdigest()


def index_type(genes: int) -> np.dtype:
    """Return the type of stored gene indices: uint16, or uint32 with more than 65,536 genes."""
    return np.dtype(np.uint16 if genes <= 65_536 else np.uint32)


def impossible_value(array: str, dtype: np.dtype) -> int | str:
    """Return the fill value of missing shards: no count is 0, no gene has the last index, no offset is negative."""
    if array == "indices":
        return int(np.iinfo(dtype).max)
    return {"i": -1, "u": 0, "f": "NaN"}[dtype.kind]


def crc32(values: np.ndarray) -> int:
    """Return the checksum of an array, as stored in the record of its part."""
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)


def gene_text(genes: Sequence[str]) -> str:
    """Return the contents of ``genes.txt``."""
    return "".join(f"{gene}\n" for gene in genes)


def _read_genes(folder: Folder, number: int) -> list[str]:
    """Return the vocabulary of a corpus, or no genes if its file is no list of that many names."""
    path = folder.local and folder.local / GENES
    # Not read at all where the names would have hundreds of letters.
    if path and path.is_file() and path.stat().st_size > 200 * (number + 100):
        return []
    with contextlib.suppress(ValueError):
        return name_lines(folder.read(GENES) or b"")
    return []


def index_digest(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the contents of ``corpus.json`` except itself."""
    rest = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
        self.path = folder.path
        self.genes = genes
        self.index = index
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
        self._folder = folder
        self._context = context
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
        # Handles of TensorStore cannot be pickled; another process opens the corpus again.
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
        # The checksum of a chunk does not help against a file of another part with the same name.
        sound = offsets[0] == 0 and offsets[-1] == row.nonzeros
        if not sound or (np.diff(offsets) < 0).any():
            raise InputError(
                self._damaged(number, f"cell offsets of sample '{row.name}' are wrong")
            )
        # The array is shared by all threads.
        offsets.flags.writeable = False
        with self._lock:
            if sample not in self._offsets:
                self._offsets[sample] = offsets
                self._offset_bytes += offsets.nbytes
            # The newest entry stays even if it is larger than the cache.
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
        # `base` is the position of the sample in the part; the cached offsets start at 0.
        low = base + int(offsets[start])
        high = base + int(offsets[stop])
        wanted = {"X/indices": (low, high), "X/data": (low, high)}
        if row.spatial:
            wanted["obsm/spatial"] = (first + start, first + stop)
        if part.label_codes is not None:
            wanted[f"obs/{LABEL_COLUMN}/codes"] = (first + start, first + stop)
        arrays = dict(zip(wanted, self._read(number, wanted), strict=True))
        gene = arrays["X/indices"]
        count = arrays["X/data"]
        # A missing shard reads as impossible values.
        missing = count.size and int(count.min()) == 0
        outside = count.size and int(gene.max()) >= len(self.genes)
        if missing or outside:
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
                # The last entry of the table is -1, so that the code -1 maps to -1.
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
        cells = record["cells"]
        nonzeros = record["nonzeros"]
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
                checksums.append(crc32(values))
                # Indices and counts each count half, so that the progress ends at the number of stored counts.
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
        # One bit per gene as text: a JSON list would be larger than the rest of the record.
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
            # A corpus does not change while it is open, and checks would be requests to the object store.
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        handle = tensorstore.open(spec, read=True, context=self._context).result()
        self._check_array(number, array, handle)
        self._check_stored(number, array, handle)
        with self._lock:
            # Two threads may open the same array; both get the first handle.
            return self._arrays.setdefault(key, handle)

    def _check_array(self, number: int, array: str, handle: Any) -> None:
        """Raise an error for an array that is not stored as :func:`_create` stores it.

        The fill value marks missing shards, and CRC-32C finds damaged ones; a changed type or shape reads other bytes.
        """
        record = self.parts[number].record
        wide = array == "obsm/spatial"
        if array.startswith("X/"):
            types = {"X/indices": index_type(len(self.genes)), "X/data": np.dtype(np.uint16)}
            dtype = types.get(array, np.dtype(np.int64))
            length = record["nonzeros"] if array in types else record["cells"] + 1
            expected = {"data_type": dtype.name, "shape": [length]}
            expected["fill_value"] = impossible_value(array.split("/")[1], dtype)
        elif wide:
            expected = {"data_type": "float32", "shape": [record["cells"], 2], "fill_value": "NaN"}
        else:
            expected = {"shape": [record["cells"]]}
        metadata = handle.spec().to_json()["metadata"]
        wrong = [name for name, value in expected.items() if metadata.get(name) != value]
        codecs = metadata.get("codecs", [])
        # The outer codec is the sharding; checksums belong to the chunks inside.
        inner = codecs[0].get("configuration", {}).get("codecs", []) if codecs else []
        if (wide or array.startswith("X/")) and not any(c.get("name") == "crc32c" for c in inner):
            wrong.append("codecs")
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        # Python integers do not overflow. A damaged size would make TensorStore allocate any amount of memory.
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
            if [crc32(handle.read().result())] != expected:
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
                # Futures: all arrays are requested before the first one is awaited.
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
        return (Path(path).expanduser() / INDEX).is_file()
    return Folder(path, tensorstore.Context()).read(INDEX) is not None


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
    text = folder.read(INDEX)
    if text is None:
        raise InputError(
            f"'{folder.path}' contains no corpus.json",
            "a corpus made by cellplm prepare",
            "Check the path, or run: cellplm prepare FILE.h5ad ... --out CORPUS",
        )
    index = parse_document(f"{folder.path}/{INDEX}", text)
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
    # Corpora of the first versions have no digest.
    if index.get("sha256", index_digest(index)) != index_digest(index):
        raise InputError(
            f"'{folder.path}/{INDEX}' is damaged: its checksum differs",
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
    # All records are requested first, because a corpus in an object store has hundreds of them.
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
            parse_document(f"{folder.path}/parts/{name}.json", text),
            name,
            len(genes),
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
    for path in (local / INDEX, local / GENES, *(local / "parts").glob("*.json")):
        size = path.stat().st_size if path.is_file() else 0
        if size > JSON_BYTES:
            raise InputError(
                f"'{path}' has {size:,} bytes",
                f"{JSON_BYTES:,} or fewer",
                "Copy the corpus again, or prepare it again",
            )


def parse_document(path: str, text: bytes) -> Any:
    """Return the contents of a JSON document of a corpus.

    Args:
        path: Its path, for messages.
        text: Its text.

    Raises:
        InputError: It is not JSON.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(
            f"'{path}' is not JSON ({error})",
            "the file that cellplm prepare wrote",
            "Copy the corpus again, or prepare it again",
        ) from error
