"""AnnData input: raw counts in vocabulary order, read in validated blocks.

This module handles all differences between files: the location of the raw counts (``X``, ``raw.X`` or a layer), their
storage (CSR, CSC, dense, on disk or in memory, any numeric type), gene names, and valid values. The output is always
canonical float32 CSR blocks with one column per vocabulary gene. No function builds a dense cells x genes array of a
file.

:func:`open_counts` opens a :class:`CountSource`; :func:`write_h5ad` writes a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import sparse

from cellplm_jax.data.device_arrays import (
    DeviceRows,
    DeviceSparseRows,
    is_device_array,
    is_device_sparse,
)
from cellplm_jax.data.genes import (
    ORTHOLOGUE,
    FittedGenes,
    GeneMapping,
    map_genes,
    other_species,
    require_matches,
)
from cellplm_jax.errors import InputError, explain, nearest
from cellplm_jax.storage import atomic_write

if TYPE_CHECKING:
    import anndata
    import pandas as pd

Values = Literal["counts", "normalized", "log1p"]

VALUES: tuple[Values, ...] = ("counts", "normalized", "log1p")
"""Valid declarations of the values of a matrix."""

INTEGER_TOLERANCE = 1e-3
"""Maximum distance from an integer at which a value is rounded to a count."""

LARGEST_COUNT = 2.0**24
"""Largest count that float32 represents exactly; larger values are treated as damaged."""

LARGEST_LOG = 30.0
"""Upper bound of log1p values of counts and normalised values (e**30 is 1e13)."""

HIGHEST: dict[Values, float] = {
    "counts": LARGEST_COUNT,
    "normalized": float(np.finfo(np.float32).max),
    "log1p": LARGEST_LOG,
}
"""Largest value of each kind."""

_DECLARE = (
    "Pass layer=... (--layer) naming the matrix that holds raw counts, or declare what the values "
    "are with values='log1p' or values='normalized' (--values)"
)

COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi_counts", "umis", "spliced_counts")
"""Layers searched for raw counts, in this order, after ``X`` and ``raw.X``."""

GENE_COLUMNS = (
    "ensembl_id",
    "ensembl_ids",
    "ensembl",
    "ensembl_gene_id",
    "ensembl_gene_ids",
    "gene_ids",
    "gene_id",
    "geneid",
    "feature_id",
    "feature_name",
    "gene_symbols",
    "gene_symbol",
    "gene_names",
    "gene_name",
    "genes",
    "symbol",
    "symbols",
    "hgnc_symbol",
)
"""Columns of ``var`` that may contain gene names (compared in lower case), in addition to ``var_names``."""

PROBE_BLOCKS = 16
PROBE_VALUES = 200_000
"""Maximum number of values and of positions that a probe reads."""

DENSE_ENTRIES = 4_000_000
"""Number of entries of a dense matrix per step: 16 to 32 MB."""

CHUNK_CACHE = 32 * 2**20
"""Size in bytes of h5py's cache of decompressed chunks per array, for reads of scattered rows."""


# ---------------------------------------------------------------------------------------------
# Stored matrices
# ---------------------------------------------------------------------------------------------


class _Entries(NamedTuple):
    """Stored entries of some rows in CSR form, without sorting, merging or conversion."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


class _SparseRows:
    """Rows of a CSR matrix in memory or on disk (h5py or zarr)."""

    kind = "CSR"

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]):
        self.data, self.indices, self.shape = data, indices, shape
        self.indptr = np.asarray(indptr[:], dtype=np.int64)
        self.dtype = np.dtype(data.dtype)
        _check_pointers(self.indptr, shape[0], int(indices.shape[0]), "row")

    def read(self, start: int, stop: int) -> _Entries:
        """Return the entries of consecutive rows."""
        low, high = int(self.indptr[start]), int(self.indptr[stop])
        indices = np.asarray(self.indices[low:high])
        _check_indices(indices, self.shape[1], "column")
        data = np.asarray(self.data[low:high])
        return _Entries(data, indices, self.indptr[start : stop + 1] - low)

    def sample(self) -> np.ndarray:
        """Return non-zero values from evenly distributed positions of the matrix."""
        return _sample(self.data, int(self.indptr[-1]))


class _CompressedColumns:
    """A CSC matrix, converted to CSR in memory at the first read of its rows."""

    kind = "CSC"

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]):
        self.data, self.indices, self.shape = data, indices, shape
        self.indptr = np.asarray(indptr[:])
        self.dtype = np.dtype(data.dtype)
        self._rows: _SparseRows | None = None
        _check_pointers(self.indptr, shape[1], int(indices.shape[0]), "column")

    def read(self, start: int, stop: int) -> _Entries:
        """Return the entries of consecutive rows; the first call converts the matrix."""
        if self._rows is None:
            data, indices = np.asarray(self.data[:]), np.asarray(self.indices[:])
            _check_indices(indices, self.shape[0], "row")
            rows = sparse.csc_matrix((data, indices, self.indptr), shape=self.shape).tocsr()
            self._rows = _SparseRows(rows.data, rows.indices, rows.indptr, self.shape)
            self.data, self.indices = rows.data, rows.indices  # releases the CSC arrays
        return self._rows.read(start, stop)

    def sample(self) -> np.ndarray:
        """Return non-zero values from evenly distributed positions of the matrix."""
        return _sample(self.data, int(self.indptr[-1]))


class _DenseRows:
    """Rows of a dense array: numpy, h5py, zarr, or another type with the same slicing."""

    kind = "dense"

    def __init__(self, array: Any):
        self.array, self.shape = array, (int(array.shape[0]), int(array.shape[1]))
        self.dtype = np.dtype(array.dtype)

    def read(self, start: int, stop: int) -> _Entries:
        """Return the non-zero entries of consecutive rows, converted in bounded steps."""
        step = max(1, DENSE_ENTRIES // max(1, self.shape[1]))
        parts = []
        for low in range(start, stop, step):
            block = self.array[low : min(low + step, stop)]
            block = block.compute() if hasattr(block, "compute") else block
            if sparse.issparse(block):  # a dask array of sparse chunks
                rows = block.tocsr()
                parts.append(_Entries(rows.data, rows.indices, rows.indptr))
                continue
            block = np.asarray(block)
            row, column = np.nonzero(block)
            pointers = np.zeros(block.shape[0] + 1, dtype=np.int64)
            np.cumsum(np.bincount(row, minlength=block.shape[0]), out=pointers[1:])
            parts.append(_Entries(block[row, column], column.astype(np.int32), pointers))
        return _join(parts, self.dtype)

    def sample(self) -> np.ndarray:
        """Return non-zero values of evenly distributed rows of the matrix."""
        step = max(1, PROBE_VALUES * 10 // (PROBE_BLOCKS * max(1, self.shape[1])))
        parts = [self.read(low, high).data for low, high in _spread(self.shape[0], step)]
        return np.concatenate(parts)


class _OnDevice:
    """Rows of a matrix in the memory of an accelerator, read through the host; embedding takes them from there."""

    def __init__(self, rows: DeviceRows | DeviceSparseRows):
        self.rows, self.kind, self.shape, self.dtype = rows, rows.kind, rows.shape, rows.dtype

    def read(self, start: int, stop: int) -> _Entries:
        """Return the entries of consecutive rows."""
        found = self.rows.on_host(start, stop)
        if isinstance(found, tuple):
            return _Entries(*found)
        return _DenseRows(found).read(0, stop - start)

    def sample(self) -> np.ndarray:
        """Return non-zero values of rows spread over the matrix."""
        step = max(1, PROBE_VALUES * 10 // (PROBE_BLOCKS * max(1, self.shape[1])))
        values = np.concatenate([self.read(*rows).data for rows in _spread(self.shape[0], step)])
        return values[values != 0]


_Rows = _SparseRows | _CompressedColumns | _DenseRows | _OnDevice


def _check_pointers(indptr: np.ndarray, length: int, entries: int, axis: str) -> None:
    """Raise an error for invalid offsets of a compressed matrix."""
    sound = len(indptr) == length + 1 and indptr[0] == 0 and indptr[-1] <= entries
    if not sound or (np.diff(indptr) < 0).any():
        raise InputError(
            f"the {axis} offsets of a sparse matrix do not fit its {entries} entries",
            f"{length + 1} increasing offsets from 0",
            "The file is damaged; write it again from its source",
        )


def _check_indices(indices: np.ndarray, length: int, axis: str) -> None:
    """Raise an error for entries outside the matrix."""
    if indices.size and (indices.max() >= length or indices.min() < 0):
        bad = indices.max() if indices.max() >= length else indices.min()
        raise InputError(
            f"a sparse matrix has an entry in {axis} {bad}",
            f"{axis}s 0 to {length - 1}",
            "The file is damaged; write it again from its source",
        )


def _join(parts: Sequence[_Entries], dtype: np.dtype) -> _Entries:
    """Concatenate the rows of several reads."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _Entries(np.empty(0, dtype), np.empty(0, np.int32), np.zeros(1, np.int64))
    offsets = np.cumsum([0, *(len(part.data) for part in parts)])
    pointers = [part.indptr[1:] + low for part, low in zip(parts, offsets[:-1], strict=True)]
    return _Entries(
        np.concatenate([part.data for part in parts]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *pointers]),
    )


def _spread(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield up to ``PROBE_BLOCKS`` evenly distributed ranges of ``step``, including both ends."""
    if length <= step * PROBE_BLOCKS:
        yield 0, length
        return
    for start in np.linspace(0, length - step, PROBE_BLOCKS).astype(int):
        yield int(start), int(start) + step


def _sample(data: Any, length: int) -> np.ndarray:
    """Return up to ``PROBE_VALUES`` stored values from evenly distributed positions of a stored vector."""
    ranges = _spread(length, PROBE_VALUES // PROBE_BLOCKS)
    values = np.concatenate([np.asarray(data[low:high]) for low, high in ranges])
    return values[values != 0]


def _as_rows(matrix: Any) -> _Rows:
    """Wrap a matrix of any type that AnnData supports, without reading it."""
    import anndata.abc

    if isinstance(matrix, anndata.abc.CSRDataset | anndata.abc.CSCDataset):
        return _stored_rows(matrix.group)
    if is_device_sparse(matrix):
        return _OnDevice(DeviceSparseRows(matrix))
    if is_device_array(matrix):
        return _OnDevice(DeviceRows(matrix))
    if sparse.issparse(matrix):
        if matrix.format not in ("csr", "csc"):
            matrix = matrix.tocsr()
        form = _SparseRows if matrix.format == "csr" else _CompressedColumns
        return form(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
    return _DenseRows(matrix)


def _stored_rows(element: Any) -> _Rows:
    """Wrap a matrix of an open h5ad or zarr store (a group if sparse, an array if dense)."""
    encoding = str(element.attrs.get("encoding-type", ""))
    if encoding in ("csr_matrix", "csc_matrix"):
        form = _SparseRows if encoding == "csr_matrix" else _CompressedColumns
        cells, genes = (int(size) for size in element.attrs["shape"])
        return form(element["data"], element["indices"], element["indptr"], (cells, genes))
    return _DenseRows(element)


# ---------------------------------------------------------------------------------------------
# Files and AnnData objects
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """A matrix that may contain the counts, with the ``var`` of its columns."""

    name: str
    rows: Callable[[], _Rows]
    var: Callable[[], pd.DataFrame]


class _Lazy(Mapping):
    """A mapping that reads its values from a store on first access."""

    def __init__(self, keys: Sequence[str], read: Callable[[str], Any]):
        self._keys, self._read, self._values = list(keys), read, {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        if key not in self._values:
            self._values[key] = self._read(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, eq=False)
class _Opened:
    """The fields of an AnnData that this module uses, from memory or disk."""

    label: str
    source: str
    obs: pd.DataFrame
    obsm: Mapping[str, Any]
    places: Mapping[str, _Place]
    layers: tuple[str, ...]
    close: Callable[[], None]


def _open_object(adata: anndata.AnnData) -> _Opened:
    """Open an AnnData object: in memory, a view, or backed."""
    places: dict[str, _Place] = {}
    if adata.X is not None:
        places["X"] = _Place("X", lambda: _as_rows(adata.X), lambda: adata.var)
    raw = adata.raw
    if raw is not None:
        places["raw.X"] = _Place("raw.X", lambda: _as_rows(raw.X), lambda: raw.var)
    layers = tuple(key for key in adata.layers if key is not None)  # None is X in anndata 0.13
    for key in layers:
        rows = lambda key=key: _as_rows(adata.layers[key])  # noqa: E731
        places[f"layers['{key}']"] = _Place(f"layers['{key}']", rows, lambda: adata.var)
    return _Opened(
        label="the AnnData",
        source="AnnData in memory",
        obs=adata.obs,
        obsm=adata.obsm,
        places=places,
        layers=layers,
        close=lambda: None,
    )


def _open_path(path: Path) -> _Opened:
    """Open an ``.h5ad`` file or a ``.zarr`` directory; matrices stay on disk."""
    import anndata

    if not path.exists():
        raise InputError(
            f"'{path}' does not exist", "an .h5ad file or a .zarr directory", "Check the path"
        )
    store, close = _open_zarr(path) if path.is_dir() else _open_hdf5(path)
    try:
        keys = set(store.keys())
        if not {"obs", "var"} <= keys:
            raise InputError(
                f"'{path}' contains {_listing(sorted(keys))} but no 'obs' and 'var'",
                "a file written by AnnData",
                "Read it with scanpy (for example scanpy.read_10x_h5) and save it with write_h5ad",
            )
        if "encoding-type" not in store["obs"].attrs:
            close()
            return dataclasses.replace(
                _open_object(anndata.read_h5ad(path)), label=f"'{path}'", source=path.name
            )
        return _open_store(store, path, close)
    except InputError:
        close()
        raise
    except Exception as error:
        close()
        raise InputError(_unreadable(path, error)) from error


def _open_hdf5(path: Path) -> tuple[Any, Callable[[], None]]:
    import h5py

    try:
        file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
    except OSError as error:
        raise InputError(_unreadable(path, error)) from error
    return file, file.close


def _open_zarr(path: Path) -> tuple[Any, Callable[[], None]]:
    import zarr

    try:
        return zarr.open_group(str(path), mode="r"), lambda: None
    except Exception as error:
        raise InputError(
            f"'{path}' is a directory without a zarr group",
            "an .h5ad file or a .zarr directory written by AnnData",
            "Check the path",
        ) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    return explain(
        f"'{path}' cannot be read as an AnnData file ({reason})",
        "a complete .h5ad file",
        "Check that the file is an .h5ad file and was copied completely, or write it again",
    )


def _open_store(store: Any, path: Path, close: Callable[[], None]) -> _Opened:
    """Open the fields of an h5ad file or zarr group."""
    from anndata.io import read_elem

    frames: dict[str, pd.DataFrame] = {}

    def frame(key: str) -> pd.DataFrame:
        if key not in frames:
            frames[key] = read_elem(store[key])
        return frames[key]

    def stored(name: str, key: str, var: str) -> _Place:
        return _Place(name, lambda: _stored_rows(store[key]), lambda: frame(var))

    places: dict[str, _Place] = {}
    if "X" in store and str(store["X"].attrs.get("encoding-type", "")) != "null":
        places["X"] = stored("X", "X", "var")
    # anndata writes an empty dataset for a missing raw.
    if "raw" in store and hasattr(store["raw"], "keys") and "X" in store["raw"]:
        places["raw.X"] = stored("raw.X", "raw/X", "raw/var")
    layers = tuple(store["layers"].keys()) if "layers" in store else ()
    for key in layers:
        places[f"layers['{key}']"] = stored(f"layers['{key}']", f"layers/{key}", "var")
    frame("var")
    return _Opened(
        label=f"'{path}'",
        source=path.name,
        obs=frame("obs"),
        obsm=_Lazy(
            tuple(store["obsm"].keys()) if "obsm" in store else (),
            lambda key: read_elem(store[f"obsm/{key}"]),
        ),
        places=places,
        layers=layers,
        close=close,
    )


def _listing(names: Sequence[object], limit: int = 12) -> str:
    """Quote names for a message; long lists are truncated."""
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (shown + more) if names else "none"


# ---------------------------------------------------------------------------------------------
# Kinds of values
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """Statistics of a sample of the values of one matrix."""

    looks: Literal["counts", "zeros", "damaged counts", "other"]
    description: str
    largest: float


def _probe(rows: _Rows) -> _Probe:
    """Classify a matrix by a bounded sample of its values."""
    if rows.dtype.kind not in "buif":
        return _Probe("other", f"values of type {rows.dtype}", math.nan)
    values = rows.sample().astype(np.float64)
    if not values.size:
        return _Probe("zeros", "zeros only", 0.0)
    finite = values[np.isfinite(values)]
    share = (
        float((np.abs(finite - np.rint(finite)) > INTEGER_TOLERANCE).mean()) if finite.size else 0
    )
    largest = float(finite.max()) if finite.size else math.nan
    negative = float((finite < -INTEGER_TOLERANCE).mean()) if finite.size else 0.0
    wrong = []
    if finite.size < values.size:
        wrong.append("NaN or infinite values")
    if negative:
        wrong.append("negative values")
    if share:
        wrong.append("non-integer values")
    if finite.size and not wrong and largest <= LARGEST_COUNT:
        return _Probe("counts", f"integers up to {largest:.0f}", largest)
    # If most values are counts, the others are damaged and are reported one by one; centred, scaled
    # and normalised matrices have hardly any integers, or as many negative values as positive.
    if max(share, negative) < 0.5 and (wrong or not finite.size):
        return _Probe("damaged counts", f"integers with {' and '.join(wrong)}", largest)
    text = f"{', '.join(wrong) or 'values'}, max {largest:.3g}"
    if negative:
        guess = "looks centred or scaled"
    elif not share:
        guess = "too large for counts"
    elif largest < 20:
        guess = "looks log1p-normalised"
    else:
        guess = "looks normalised by library size"
    return _Probe("other", f"{text}, {guess}", largest)


def _choose_place(
    opened: _Opened, layer: str | None, values: Values, fitted: str = ""
) -> tuple[_Place, _Rows, _Probe, str]:
    """Return the requested matrix, or the first with raw counts, with its rows, its probe and a message.

    The matrix that a fit has read (``fitted``) is tried before the others.
    """
    places = opened.places
    if layer is not None:
        named = (f"layers['{layer}']", layer, f"{layer}.X")
        place = next((places[name] for name in named if name in places), None)
        if place is None:
            present = f"layers {_listing(opened.layers)}" if opened.layers else "no layers"
            raise InputError(
                f"{opened.label} has no layer '{layer}'",
                f"one of its matrices: {present}; also {_listing([p for p in places if '[' not in p])}",
                nearest(
                    layer,
                    [*opened.layers, *places],
                    "Pass layer=... (--layer) with one of these names",
                ),
            )
        candidates = [place]
    elif values == "counts":
        order = [fitted, "X", "raw.X", *(f"layers['{key}']" for key in COUNT_LAYERS)]
        candidates = [places[name] for name in dict.fromkeys(order) if name in places]
    else:
        candidates = [places[name] for name in (fitted, "X", "raw.X") if name in places][:1]
    if not candidates:
        raise InputError(
            f"{opened.label} has no matrix X and no raw.X, and its layers are "
            f"{_listing(opened.layers)}",
            "raw counts in X, raw.X or a layer",
            "Pass layer=... (--layer) naming the matrix that holds raw counts",
        )

    seen: list[tuple[_Place, _Rows, _Probe]] = []
    for place in candidates:
        rows = place.rows()
        probe = _probe(rows)
        if values != "counts":
            _check_declared(opened, place, rows, probe, values)
            note = f"Read {place.name} as {values} values ({probe.description})."
            return place, rows, probe, note
        if probe.looks == "counts":
            passed = [f"{other.name}: {held.description}" for other, _, held in seen]
            why = f"; skipped {'; '.join(passed)}" if passed else ""
            note = f"Read raw counts from {place.name} ({probe.description}{why})."
            return place, rows, probe, note
        seen.append((place, rows, probe))
    # Select damaged counts, so that reading them reports the damage.
    damaged = [found for found in seen if found[2].looks == "damaged counts"]
    if all(probe.looks == "zeros" for _, _, probe in seen):
        damaged = seen
    for place, rows, probe in damaged:
        return place, rows, probe, f"Read raw counts from {place.name} ({probe.description})."
    found = "; ".join(f"{place.name}: {probe.description}" for place, _, probe in seen)
    raise InputError(
        f"no raw counts in {opened.label} ({found})",
        "non-negative integers in X, raw.X or a layer",
        _DECLARE,
    )


def _check_declared(
    opened: _Opened, place: _Place, rows: _Rows, probe: _Probe, values: Values
) -> None:
    """Raise an error if the probe contradicts the declared values."""
    if rows.dtype.kind not in "buif":
        raise InputError(
            f"{place.name} of {opened.label} holds {probe.description}",
            "numbers",
            "Pass layer=... (--layer) naming another matrix",
        )
    if probe.looks == "zeros":
        return
    wrong = None
    if values == "log1p" and probe.largest > LARGEST_LOG:
        wrong = f"{place.name} of {opened.label} has values up to {probe.largest:.4g}"
        remedy = "Declare values='normalized' if they are not logarithms, or drop values"
    elif values == "log1p" and probe.looks == "counts" and probe.largest > 1:
        wrong = f"{place.name} of {opened.label} holds {probe.description}, which are raw counts"
        remedy = "Omit values (--values); raw counts need no declaration"
    if wrong:
        raise InputError(wrong, f"log1p values, none above {LARGEST_LOG:.0f}", remedy)


# ---------------------------------------------------------------------------------------------
# Gene names
# ---------------------------------------------------------------------------------------------


def _texts(column: pd.Series | pd.Index) -> list[str]:
    """Return a column as strings, with missing values as ''."""
    missing = np.asarray(column.isna())
    values = column.astype(object).to_numpy()
    return ["" if absent else str(v).strip() for v, absent in zip(values, missing, strict=True)]


def _choose_genes(
    opened: _Opened,
    place: _Place,
    columns: int,
    vocabulary: Sequence[str],
    gene_key: str | None,
    minimum: int | None,
) -> tuple[str, GeneMapping]:
    """Map the requested gene name column, or the column that matches the vocabulary best."""
    var = place.var()
    if len(var) != columns:
        raise InputError(
            f"{place.name} of {opened.label} has {columns} columns for {len(var)} genes",
            "one column per row of var",
            "The file is damaged; write it again from its source",
        )
    names = _texts(var.index)
    if gene_key is not None and gene_key not in var.columns:
        if gene_key not in (var.index.name, "var_names", "index"):
            raise InputError(
                f"var of {opened.label} has no column '{gene_key}'",
                f"one of its columns: {_listing(list(var.columns))} (or 'var_names')",
                nearest(
                    gene_key,
                    [*var.columns, "var_names"],
                    "Pass gene_key=... (--gene-key) with one of these names, or leave it out",
                ),
            )
        candidates = {"var_names": names}
    elif gene_key is not None:
        candidates = {str(gene_key): _texts(var[gene_key])}
    else:
        candidates = {"var_names": names}
        for known in GENE_COLUMNS:
            for column in var.columns:
                if str(column).lower() == known and var[column].dtype.kind not in "biufc":
                    candidates[str(column)] = _texts(var[column])

    fitted = vocabulary.gene_key if isinstance(vocabulary, FittedGenes) else ""
    best: tuple[str, GeneMapping, list[str]] | None = None
    most = -1.0
    for key, texts in candidates.items():
        filled = [text or name for text, name in zip(texts, names, strict=True)]
        mapping = map_genes(filled, vocabulary, minimum=0)
        # The column that a fit has read is used again, unless its names are of another kind in this file.
        found = mapping.genes_matched * (2.0 if key == fitted else 1.0)
        if found > most:
            best, most = (key, mapping, filled), found
    if best is None:  # pragma: no cover - candidates are never empty
        raise InputError(explain("no gene names", "var_names", "Name the genes"))
    key, mapping, filled = best
    if mapping.by_rule.get(ORTHOLOGUE):
        # Symbols of rats and mice are written alike; Ensembl ids of the same file distinguish them.
        for name, texts in candidates.items():
            if other_species(texts):
                key, filled = name, texts
                mapping = map_genes(texts, vocabulary, minimum=0)
    where = f"var_names of {opened.label}" if key == "var_names" else f"var['{key}']"
    require_matches(mapping, filled, minimum=minimum, where=where)
    return key, mapping


# ---------------------------------------------------------------------------------------------
# Public interface
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InputReport:
    """Choices made when opening an input, for messages and for ``uns``.

    Attributes:
        source: Name of the file, or "AnnData in memory".
        matrix: Location of the counts: "X", "raw.X" or "layers['NAME']".
        storage: Storage format of the matrix: "CSR", "CSC" or "dense", with its numeric type.
        values: "counts", "normalized" or "log1p".
        gene_key: Column of ``var`` with the gene names, or "var_names".
        genes: Result of the gene name mapping.
        cells: Number of cells.
        cells_without_counts: Cells with no count in any vocabulary gene; None until every cell has been read.
        notes: Messages about the choices.
    """

    source: str
    matrix: str
    storage: str
    values: Values
    gene_key: str
    genes: GeneMapping
    cells: int
    cells_without_counts: int | None
    notes: tuple[str, ...]

    def messages(self) -> list[str]:
        """Describe the input in a few sentences, one per message.

        Returns:
            Lines to print or log, the most important first.
        """
        key = "var_names" if self.gene_key == "var_names" else f"var['{self.gene_key}']"
        lines = [*self.notes, f"Gene names from {key}: {self.genes.summary()}"]
        if self.cells_without_counts:
            lines.append(
                f"{self.cells_without_counts} of {self.cells} cells have no counts in the "
                "vocabulary genes."
            )
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON and ``AnnData.uns``.

        Returns:
            Strings, numbers, lists and dicts; ``cells_without_counts`` is omitted if unknown.
        """
        report: dict[str, object] = {
            "source": self.source,
            "matrix": self.matrix,
            "storage": self.storage,
            "values": self.values,
            "gene_key": self.gene_key,
            "genes": self.genes.as_dict(),
            "cells": self.cells,
            "notes": list(self.notes),
        }
        if self.cells_without_counts is not None:
            report["cells_without_counts"] = self.cells_without_counts
        return report


class CountSource:
    """Counts of one AnnData in the columns of one vocabulary, read in blocks.

    Created by :func:`open_counts`. Use it as a context manager, or call :meth:`close`, to close a file that it opened;
    AnnData objects passed in stay open and unchanged.

    Attributes:
        cells: Number of cells.
        genes: Number of vocabulary genes, the width of every block.
        obs: The cell table, as stored.
        obs_names: Cell names, str [cells].
        obsm: Cell matrices by name; matrices in a file are read on first access.
        measured: bool [genes], vocabulary genes measured in the file.
    """

    def __init__(
        self, opened: _Opened, place: _Place, rows: _Rows, report: InputReport, names: list[str]
    ):
        """Store the fields; use :func:`open_counts` to create an instance."""
        self._opened, self._rows, self._report = opened, rows, report
        self._closed = False
        self._place, self._gene_names = place, names
        self._column = report.genes.column
        self._empty = np.full(report.cells, -1, dtype=np.int8)
        self.cells: int = report.cells
        self.genes: int = len(report.genes.measured)
        self.obs: pd.DataFrame = opened.obs
        self.obs_names: np.ndarray = np.asarray(opened.obs.index.astype(str), dtype=object)
        self.obsm: Mapping[str, Any] = opened.obsm
        self.measured: np.ndarray = report.genes.measured

    def __enter__(self) -> CountSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file if this object opened it. No reads are possible afterwards."""
        self._opened.close()
        self._closed = True

    @property
    def gene_names(self) -> list[str]:
        """Gene names of the file, from the key in the report; '' for unnamed genes."""
        key = self._report.gene_key
        if key == "var_names":
            return list(self._gene_names)
        texts = _texts(self._place.var()[key])
        return [text or name for text, name in zip(texts, self._gene_names, strict=True)]

    @property
    def report(self) -> InputReport:
        """Choices made about the input; complete after every cell has been read."""
        if (self._empty < 0).any():
            return self._report
        return dataclasses.replace(self._report, cells_without_counts=int(self._empty.sum()))

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read consecutive cells.

        Args:
            start: First cell.
            stop: One past the last cell.

        Returns:
            float32 CSR [stop - start, genes], canonical: indices sorted, no duplicates, no zeros.

        Raises:
            InputError: A value is negative, NaN, infinite or not a count, or the file is damaged.
            IndexError: The range is outside the file.
        """
        if not 0 <= start <= stop <= self.cells:
            msg = f"cells {start} to {stop} asked for, of {self.cells}"
            raise IndexError(msg)
        block = self._convert(self._stored(start, stop), np.arange(start, stop))
        self._empty[start:stop] = np.diff(block.indptr) == 0
        return block

    def read_rows(self, indices: Sequence[int] | np.ndarray) -> sparse.csr_matrix:
        """Read any cells, in any order, with repetitions.

        Cells are read in file order, neighbours together, and returned in the requested order.

        Args:
            indices: Cell numbers [n], from 0.

        Returns:
            float32 CSR [n, genes], canonical.

        Raises:
            InputError: As in :meth:`read`.
            IndexError: A number is outside the file.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if not wanted.size:
            return self.read(0, 0)
        order, where = np.unique(wanted, return_inverse=True)
        if order[0] < 0 or order[-1] >= self.cells:
            msg = f"cell {order[0] if order[0] < 0 else order[-1]} asked for, of {self.cells}"
            raise IndexError(msg)
        breaks = np.flatnonzero(np.diff(order) > 1) + 1
        runs = np.split(order, breaks)
        stored = [self._stored(int(run[0]), int(run[-1]) + 1) for run in runs]
        block = self._convert(_join(stored, self._rows.dtype), order)
        self._empty[order] = np.diff(block.indptr) == 0
        if len(where) == len(order) and (np.diff(where) > 0).all():
            return block
        return sparse.csr_matrix(block[where])

    @property
    def stored_rows(self) -> DeviceRows | DeviceSparseRows | None:
        """The matrix, if it is in the memory of an accelerator."""
        return self._rows.rows if isinstance(self._rows, _OnDevice) else None

    @property
    def vocabulary_column(self) -> np.ndarray:
        """Column of the vocabulary of every gene of the matrix; int [genes of the matrix], -1 for other genes."""
        return self._column

    def note_empty(self, cells: np.ndarray, empty: np.ndarray) -> None:
        """Note which cells have no counts, of cells that are not read here.

        Args:
            cells: int [n].
            empty: bool [n].
        """
        self._empty[cells] = empty

    def blocks(self, rows_per_block: int) -> Iterator[sparse.csr_matrix]:
        """Read the file in order, in blocks.

        Args:
            rows_per_block: Cells per block; the last may have fewer.

        Yields:
            Blocks as in :meth:`read`.

        Raises:
            InputError: As in :meth:`read`, or ``rows_per_block`` is below 1.
        """
        if rows_per_block < 1:
            raise InputError(
                f"rows_per_block {rows_per_block}", "at least 1", "Pass a positive number"
            )
        for start in range(0, self.cells, rows_per_block):
            yield self.read(start, min(start + rows_per_block, self.cells))

    def column(self, key: str, *, missing: str | None = None) -> np.ndarray:
        """Return a column of ``obs`` as string labels.

        Args:
            key: Name of the column (of batches, samples, cell types).
            missing: Label for cells without one; None raises an error for them.

        Returns:
            str [cells] (object array).

        Raises:
            InputError: The column does not exist, or it has gaps and ``missing`` is None.
        """
        if key not in self.obs.columns:
            raise InputError(
                f"obs of {self._opened.label} has no column '{key}'",
                f"one of its columns: {_listing(list(self.obs.columns))}",
                nearest(key, self.obs.columns, "Use one of these columns, or omit the key"),
            )
        values = self.obs[key]
        gaps = np.asarray(values.isna())
        if gaps.any() and missing is None:
            first = self.obs_names[int(np.argmax(gaps))]
            raise InputError(
                f"obs['{key}'] is missing for {int(gaps.sum())} of {self.cells} cells, "
                f"the first '{first}'",
                "a label for every cell",
                "Fill the gaps, or remove those cells",
            )
        labels = np.array(values.astype(object).map(str), dtype=object)
        labels[gaps] = missing
        return labels

    def coordinates(self, key: str = "spatial", *, required: bool = False) -> np.ndarray | None:
        """Return the coordinates of every cell.

        Args:
            key: Key in ``obsm``; the first two columns are x and y.
            required: Whether a missing key is an error.

        Returns:
            float64 [cells, 2] in the units of the file; NaN in both columns for cells with missing or infinite
            coordinates. None if the key does not exist and is not required.

        Raises:
            InputError: The key is required and missing, or it is not a numeric matrix with at least two columns.
        """
        if key not in self.obsm:
            if not required:
                return None
            raise InputError(
                f"obsm of {self._opened.label} has no '{key}'",
                f"one of its matrices: {_listing(list(self.obsm))}",
                nearest(
                    key, self.obsm, "Pass spatial_key=... (--spatial-key) with one of these names"
                ),
            )
        stored = self.obsm[key]
        if sparse.issparse(stored):
            stored = stored.toarray()
        try:
            positions = np.array(stored, dtype=np.float64)
        except (TypeError, ValueError):
            positions = np.empty((self.cells, 0))
        if positions.ndim != 2 or positions.shape[0] != self.cells or positions.shape[1] < 2:
            raise InputError(
                f"obsm['{key}'] of {self._opened.label} is {np.shape(stored)}, "
                f"of type {getattr(stored, 'dtype', type(stored).__name__)}",
                f"numbers of shape ({self.cells}, 2)",
                "Store x and y of every cell there",
            )
        positions = np.ascontiguousarray(positions[:, :2])
        positions[~np.isfinite(positions).all(axis=1)] = np.nan
        return positions

    # -- from stored rows to vocabulary columns -------------------------------------------------

    def _stored(self, start: int, stop: int) -> _Entries:
        """Read stored entries of consecutive cells; a damaged file raises one clear error."""
        if self._closed:
            msg = f"{self._opened.label} was closed; open it again to read from it"
            raise ValueError(msg)
        try:
            return self._rows.read(start, stop)
        except (OSError, KeyError) as error:
            raise InputError(
                f"{self._place.name} of {self._opened.label} cannot be read at cells {start} to "
                f"{stop - 1} ({' '.join(str(error).split())[:160]})",
                "a complete file",
                "Check that it was copied completely, or write it again",
            ) from error

    def _convert(self, stored: _Entries, cells: np.ndarray) -> sparse.csr_matrix:
        """Check every stored value and map the values of ``cells`` to vocabulary columns as float32."""
        data = stored.data if stored.data.dtype != np.float16 else stored.data.astype(np.float32)
        kind, values = data.dtype.kind, self._report.values
        highest, sound = HIGHEST[values], None
        if kind in "ui" and data.size and (data.min() < 0 or data.max() > highest):
            sound = (data >= 0) & (data <= highest)
        elif kind == "f":
            lowest = -INTEGER_TOLERANCE if values == "counts" else 0.0
            with np.errstate(invalid="ignore"):
                sound = (data >= lowest) & (data <= highest)
                if values == "counts":
                    integers = np.rint(data)
                    sound &= np.abs(data - integers) <= INTEGER_TOLERANCE
                    data = integers
        if sound is not None and not sound.all():
            raise InputError(self._damage(stored, cells, sound))
        data = data.astype(np.float32)
        if values == "log1p":
            data = np.expm1(data)
        return in_vocabulary(data, stored.indices, stored.indptr, self._column, self.genes)

    def _damage(self, stored: _Entries, cells: np.ndarray, sound: np.ndarray) -> str:
        """Return a message with the worst kind of invalid value, their number and the first."""
        data, counts = stored.data, self._report.values == "counts"
        with np.errstate(invalid="ignore"):
            above = data > HIGHEST[self._report.values]
            kinds = {
                "NaN": np.isnan(data),
                "infinite": np.isinf(data),
                "negative": ~sound & (data < 0),
                "non-integer": ~sound & ~above & counts,
                "too large": above,
            }
        name, hits = next((name, hits) for name, hits in kinds.items() if hits.any())
        position = int(np.argmax(hits))
        row = int(np.searchsorted(stored.indptr, position, side="right")) - 1
        cell, gene = self.obs_names[cells[row]], self._gene_names[int(stored.indices[position])]
        many = f"{int(hits.sum())} {name} value" + ("s" if hits.sum() > 1 else "")
        return explain(
            f"{many} in {self._place.name} of {self._opened.label} (of the {len(cells)} cells from "
            f"number {cells[0]} on); the first is {data[position]} in cell '{cell}', gene '{gene}'",
            {
                "counts": f"raw counts: integers from 0 to {LARGEST_COUNT:.0f}",
                "log1p": f"log1p values: finite numbers from 0 to {LARGEST_LOG:.0f}",
                "normalized": "normalised counts: finite numbers from 0",
            }[self._report.values],
            _DECLARE
            if name == "non-integer"
            else "Correct or remove these values, or pass layer=... (--layer) naming another matrix",
        )


def in_vocabulary(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, column: np.ndarray, genes: int
) -> sparse.csr_matrix:
    """Map the entries of compressed rows to vocabulary columns; drop unknown genes and sum duplicates.

    Args:
        data: float32 [entries].
        indices: int [entries], gene of each entry in the source.
        indptr: int [rows + 1].
        column: int32 [genes of the source], from :func:`cellplm_jax.data.genes.map_genes`; -1 for unknown genes.
        genes: Size of the vocabulary.

    Returns:
        float32 CSR [rows, genes], canonical.
    """
    indices = column[indices]
    kept = indices >= 0
    if not kept.all():
        before = np.zeros(kept.size + 1, dtype=np.int64)
        np.cumsum(kept, out=before[1:])
        indptr, indices, data = before[indptr], indices[kept], data[kept]
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, genes))
    if not matrix.has_sorted_indices:
        # Two counting sorts: half the time of sorting row by row, and the entries of a row are in order.
        matrix = sparse.csr_matrix(matrix.tocsc())
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def open_counts(
    source: anndata.AnnData | str | os.PathLike[str],
    vocabulary: Sequence[str],
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    values: Values = "counts",
    minimum_genes: int | None = None,
) -> CountSource:
    """Open an AnnData to read counts in the columns of a vocabulary.

    If ``layer`` is None, raw counts are searched in ``X``, then ``raw.X`` (used by CELLxGENE), then layers with common
    names. The search reads a bounded sample of each; every value is checked when it is read. If ``gene_key`` is None,
    ``var_names`` and common columns of ``var`` are tried, and the best match with the vocabulary is used.
    :attr:`CountSource.report` contains the choices.

    Args:
        source: An AnnData (in memory, a view, or backed), or the path of an ``.h5ad`` file or a ``.zarr`` directory,
            which is read block by block and not loaded.
        vocabulary: Genes of the model [genes], normally Ensembl ids. With
            :class:`~cellplm_jax.data.genes.FittedGenes` the matrix, the column of names and ambiguous names are
            resolved as in the fit.
        layer: Layer with the counts; "X" and "raw.X" select these matrices.
        gene_key: Column of ``var`` with the gene names; "var_names" for the index.
        values: Kind of values. "counts" requires raw counts. "normalized" accepts values normalised by library size,
            without conversion. "log1p" accepts log1p values and inverts them with expm1, so that the model's own log1p
            reproduces them.
        minimum_genes: Minimum number of vocabulary genes in the file; see :func:`cellplm_jax.data.genes.map_genes`.

    Returns:
        An open source; close it, or use it in a ``with`` statement.

    Raises:
        InputError: The file is not an AnnData file, has no cells, genes or raw counts, a key does not exist, or too few
            genes are known.
    """
    import anndata

    if values not in VALUES:
        raise InputError(f"values='{values}'", f"one of {_listing(VALUES)}", "Correct the spelling")
    if isinstance(source, anndata.AnnData):
        opened = _open_object(source)
    elif isinstance(source, str | os.PathLike):
        opened = _open_path(Path(source).expanduser())
    else:
        raise InputError(
            f"a source of type {type(source).__name__}",
            "an AnnData or the path of an .h5ad file",
            "Wrap the matrix as anndata.AnnData(X, obs=..., var=...)",
        )
    try:
        return _resolve(opened, vocabulary, layer, gene_key, values, minimum_genes)
    except (OSError, KeyError) as error:
        opened.close()
        if isinstance(source, anndata.AnnData):
            raise
        raise InputError(_unreadable(Path(source), error)) from error
    except BaseException:
        opened.close()
        raise


def _resolve(
    opened: _Opened,
    vocabulary: Sequence[str],
    layer: str | None,
    gene_key: str | None,
    values: Values,
    minimum_genes: int | None,
) -> CountSource:
    """Choose the matrix and the gene names, and create the source."""
    cells = len(opened.obs)
    some = next(iter(opened.places.values()), None)
    if cells == 0 or (some is not None and len(some.var()) == 0):
        genes = len(some.var()) if some is not None else 0
        raise InputError(
            f"{opened.label} is empty ({cells} cells x {genes} genes)",
            "at least one cell and one gene",
            "Check the filters that were applied to it",
        )
    fitted = vocabulary.matrix if isinstance(vocabulary, FittedGenes) else ""
    place, rows, probe, note = _choose_place(opened, layer, values, fitted)
    if rows.shape[0] != cells:
        raise InputError(
            f"{place.name} of {opened.label} has {rows.shape[0]} rows for {cells} cells",
            "one row per cell",
            "The file is damaged; write it again from its source",
        )
    key, mapping = _choose_genes(opened, place, rows.shape[1], vocabulary, gene_key, minimum_genes)
    notes = [note]
    if layer is None and fitted and place.name != fitted:
        notes.append(f"The fit read {fitted}; this file has no such matrix with {values} values.")
    if isinstance(rows, _CompressedColumns):
        notes.append(
            f"{place.name} is stored by columns (CSC), so it is loaded into memory completely."
        )
    if values == "counts" and probe.largest == 1:
        notes.append(
            "No count is above 1; binarised counts contain little information for the model."
        )
    if values == "log1p":
        notes.append("Values were transformed with expm1, the inverse of log1p.")
    report = InputReport(
        source=opened.source,
        matrix=place.name,
        storage=f"{rows.kind} {rows.dtype}",
        values=values,
        gene_key=key,
        genes=mapping,
        cells=cells,
        cells_without_counts=None,
        notes=tuple(notes),
    )
    counts = CountSource(opened, place, rows, report, _texts(place.var().index))
    if probe.looks == "damaged counts" and values == "counts":
        for _ in counts.blocks(1024):  # raises an error before any work is done
            pass
    return counts


@contextlib.contextmanager
def nullable_strings() -> Iterator[None]:
    """Allow anndata to write nullable strings of recent pandas versions, if it has a setting for this."""
    import anndata

    with contextlib.ExitStack() as stack:
        if hasattr(anndata.settings, "allow_write_nullable_strings"):
            stack.enter_context(anndata.settings.override(allow_write_nullable_strings=True))
        yield


def write_h5ad(adata: anndata.AnnData, path: str | os.PathLike[str], **options: Any) -> None:
    """Write an ``.h5ad`` file atomically.

    The file is written next to its destination under a temporary name and renamed when complete, so an interrupted run
    leaves no partial or damaged file. Nullable strings of recent pandas versions are written as such if anndata has a
    setting for this.

    Args:
        adata: Data to write.
        path: Destination; an existing file is replaced.
        **options: Passed to ``AnnData.write_h5ad`` (such as ``compression="gzip"``).

    Raises:
        InputError: The folder of ``path`` does not exist, or ``path`` is a folder.
    """
    target = Path(path).expanduser()
    if not target.parent.is_dir() or target.is_dir():
        found = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise InputError(f"'{target}' {found}", "the name of a file to write", "Check the path")
    with nullable_strings(), atomic_write(target) as partial:
        adata.write_h5ad(partial, **options)
