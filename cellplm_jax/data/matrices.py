"""Rows of a stored matrix: CSR, CSC or dense, on disk, in memory or on a device, in validated blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from cellplm_jax.data.device_arrays import (
    DeviceRows,
    DeviceSparseRows,
    is_device_array,
    is_device_sparse,
)
from cellplm_jax.errors import InputError, quote

PROBE_BLOCKS = 16
PROBE_VALUES = 200_000
"""Maximum number of values and of positions that a probe reads."""

DENSE_ENTRIES = 4_000_000
"""Number of entries of a dense matrix per step: 16 to 32 MB."""

ROW_ENTRIES = 1024
"""Number of stored entries that a row may have in addition to four per gene; repeated entries are summed."""

LARGEST_AXIS = 2**40
"""Maximum number of rows or columns that a file may declare."""

_REWRITE = "The file is damaged; write it again from its source"


class Entries(NamedTuple):
    """Stored entries of some rows in CSR form, without sorting, merging or conversion."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray

    def columns(self, kept: np.ndarray) -> Entries:
        """Return the entries of some columns.

        Args:
            kept: bool [columns].
        """
        here = kept[self.indices]
        # The number of kept entries before each position; the row offsets then index it.
        before = np.zeros(here.size + 1, dtype=np.int64)
        np.cumsum(here, out=before[1:])
        return Entries(self.data[here], self.indices[here], before[self.indptr])


class SparseRows:
    """Rows of a CSR matrix in memory or on disk (h5py or zarr).

    Raises:
        InputError: A row has more entries than genes can explain.
    """

    kind = "CSR"

    def __init__(
        self,
        data: Any,
        indices: Any,
        indptr: Any,
        shape: tuple[int, int],
    ):
        self.data = data
        self.indices = indices
        self.shape = shape
        self.indptr = _pointers(data, indices, indptr, shape[0], "row").astype(np.int64, copy=False)
        self.dtype = np.dtype(data.dtype)
        # A damaged offset table can declare a row of billions of entries, which would be allocated when it is read.
        longest = int(np.diff(self.indptr).max(initial=0))
        if longest > 4 * shape[1] + ROW_ENTRIES:
            raise InputError(
                f"a row of a sparse matrix has {longest:,} entries for {shape[1]:,} genes",
                "one entry per gene or fewer",
                _REWRITE,
            )

    def read(self, start: int, stop: int) -> Entries:
        """Return the entries of consecutive rows."""
        low = int(self.indptr[start])
        high = int(self.indptr[stop])
        indices = np.asarray(self.indices[low:high])
        _check_indices(indices, self.shape[1], "column")
        data = np.asarray(self.data[low:high])
        return Entries(data, indices, self.indptr[start : stop + 1] - low)

    def sample(self) -> np.ndarray:
        """Return non-zero values from evenly distributed positions of the matrix."""
        return sample_values(self.data, int(self.indptr[-1]))


class CompressedColumns:
    """A CSC matrix, converted to CSR in memory at the first read of its rows."""

    kind = "CSC"

    def __init__(
        self,
        data: Any,
        indices: Any,
        indptr: Any,
        shape: tuple[int, int],
    ):
        self.data = data
        self.indices = indices
        self.shape = shape
        self.indptr = _pointers(data, indices, indptr, shape[1], "column")
        self.dtype = np.dtype(data.dtype)
        self._rows: SparseRows | None = None

    def read(self, start: int, stop: int) -> Entries:
        """Return the entries of consecutive rows; the first call converts the matrix."""
        if self._rows is None:
            data = np.asarray(self.data[:])
            indices = np.asarray(self.indices[:])
            _check_indices(indices, self.shape[0], "row")
            # Rows of a CSC matrix are spread over all of it: one conversion is cheaper than a search per block.
            rows = sparse.csc_matrix((data, indices, self.indptr), shape=self.shape).tocsr()
            self._rows = SparseRows(rows.data, rows.indices, rows.indptr, self.shape)
            self.data = rows.data
            self.indices = rows.indices  # releases the CSC arrays
        return self._rows.read(start, stop)

    def sample(self) -> np.ndarray:
        """Return non-zero values from evenly distributed positions of the matrix."""
        return sample_values(self.data, int(self.indptr[-1]))


class DenseRows:
    """Rows of a dense array: numpy, h5py, zarr, or another type with the same slicing.

    Raises:
        InputError: The stored arrays do not fit together.
    """

    kind = "dense"

    def __init__(self, array: Any):
        shape = getattr(array, "shape", ())
        if len(shape) != 2:
            raise InputError(
                f"a matrix of counts has {len(shape)} dimensions {quote(shape)}",
                "two: cells and genes",
                "Store the counts as a matrix of cells x genes",
            )
        self.array = array
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = np.dtype(array.dtype)

    def read(self, start: int, stop: int) -> Entries:
        """Return the non-zero entries of consecutive rows, converted in bounded steps."""
        step = max(1, DENSE_ENTRIES // max(1, self.shape[1]))
        parts = []
        for low in range(start, stop, step):
            block = self.array[low : min(low + step, stop)]
            # A dask array.
            block = block.compute() if hasattr(block, "compute") else block
            if sparse.issparse(block):  # a dask array of sparse chunks
                rows = block.tocsr()
                parts.append(Entries(rows.data, rows.indices, rows.indptr))
                continue
            block = np.asarray(block)
            # Row by row, hence in the order of CSR.
            row, column = np.nonzero(block)
            pointers = np.zeros(block.shape[0] + 1, dtype=np.int64)
            np.cumsum(np.bincount(row, minlength=block.shape[0]), out=pointers[1:])
            parts.append(Entries(block[row, column], column.astype(np.int32), pointers))
        return join(parts, self.dtype)

    def sample(self) -> np.ndarray:
        """Return non-zero values of evenly distributed rows of the matrix."""
        step = max(1, PROBE_VALUES * 10 // (PROBE_BLOCKS * max(1, self.shape[1])))
        parts = [self.read(low, high).data for low, high in _spread(self.shape[0], step)]
        return np.concatenate(parts)


class OnDevice:
    """Rows of a matrix in the memory of an accelerator, read through the host; embedding takes them from there."""

    def __init__(self, rows: DeviceRows | DeviceSparseRows):
        self.rows = rows
        self.kind = rows.kind
        self.shape = rows.shape
        self.dtype = rows.dtype

    def read(self, start: int, stop: int) -> Entries:
        """Return the entries of consecutive rows."""
        found = self.rows.on_host(start, stop)
        if isinstance(found, tuple):
            return Entries(*found)
        return DenseRows(found).read(0, stop - start)

    def sample(self) -> np.ndarray:
        """Return non-zero values of rows spread over the matrix."""
        step = max(1, PROBE_VALUES * 10 // (PROBE_BLOCKS * max(1, self.shape[1])))
        # Stored zeros of a CuPy matrix say nothing about whether values are counts.
        values = np.concatenate([self.read(*rows).data for rows in _spread(self.shape[0], step)])
        return values[values != 0]


Rows = SparseRows | CompressedColumns | DenseRows | OnDevice


def _pointers(data: Any, indices: Any, indptr: Any, length: int, axis: str) -> np.ndarray:
    """Read the offsets of a compressed matrix; raise an error if its arrays do not fit each other."""
    for name, array in (("data", data), ("indices", indices), ("indptr", indptr)):
        kind = np.dtype(array.dtype).kind
        if len(array.shape) != 1 or (name != "data" and kind not in "iu"):
            raise InputError(
                f"'{name}' of a sparse matrix has type {quote(array.dtype)} and shape {tuple(array.shape)}",
                "a vector of numbers" if name == "data" else "a vector of integers",
                _REWRITE,
            )
    # Compared before it is read: a file can declare any length.
    if indptr.shape[0] != length + 1:
        raise InputError(
            f"the {axis} offsets of a sparse matrix do not fit its {indices.shape[0]} entries: "
            f"there are {indptr.shape[0]:,}",
            f"{length + 1} increasing offsets from 0",
            _REWRITE,
        )
    if data.shape[0] != indices.shape[0]:
        raise InputError(
            f"a sparse matrix has {data.shape[0]:,} values for {indices.shape[0]:,} indices",
            "one index per value",
            _REWRITE,
        )
    offsets = np.asarray(indptr[:])
    sound = offsets[0] == 0 and offsets[-1] <= indices.shape[0]
    if not sound or (offsets[1:] < offsets[:-1]).any():
        raise InputError(
            f"the {axis} offsets of a sparse matrix do not fit its {indices.shape[0]} entries",
            f"{length + 1} increasing offsets from 0",
            _REWRITE,
        )
    return offsets


def _check_indices(indices: np.ndarray, length: int, axis: str) -> None:
    """Raise an error for entries outside the matrix."""
    # Out of range, the compiled routines of scipy and Numba would read or write foreign memory.
    if indices.size and (indices.max() >= length or indices.min() < 0):
        bad = indices.max() if indices.max() >= length else indices.min()
        raise InputError(
            f"a sparse matrix has an entry in {axis} {bad}",
            f"{axis}s 0 to {length - 1}",
            _REWRITE,
        )


def join(parts: Sequence[Entries], dtype: np.dtype) -> Entries:
    """Concatenate the rows of several reads.

    Args:
        parts: The reads, in order.
        dtype: Type of the values if there are no reads.
    """
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Entries(
            np.empty(0, dtype),
            np.empty(0, np.int32),
            np.zeros(1, np.int64),
        )
    offsets = np.cumsum([0, *(len(part.data) for part in parts)])
    pointers = [part.indptr[1:] + low for part, low in zip(parts, offsets[:-1], strict=True)]
    return Entries(
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


def sample_values(data: Any, length: int) -> np.ndarray:
    """Return up to ``PROBE_VALUES`` non-zero values from evenly distributed positions of a stored vector.

    Args:
        data: The vector, on disk or in memory.
        length: Number of its values in use.
    """
    ranges = _spread(length, PROBE_VALUES // PROBE_BLOCKS)
    values = np.concatenate([np.asarray(data[low:high]) for low, high in ranges])
    return values[values != 0]


def as_rows(matrix: Any) -> Rows:
    """Wrap a matrix of any type that AnnData supports, without reading it.

    Args:
        matrix: The matrix, in memory, backed by a file, or on a device.

    Raises:
        InputError: It is no matrix, or its arrays do not fit each other.
    """
    import anndata.abc

    if isinstance(matrix, anndata.abc.CSRDataset | anndata.abc.CSCDataset):
        return stored_rows(matrix.group)
    if is_device_sparse(matrix):
        return OnDevice(DeviceSparseRows(matrix))
    if is_device_array(matrix):
        return OnDevice(DeviceRows(matrix))
    if sparse.issparse(matrix):
        if matrix.format not in ("csr", "csc"):
            matrix = matrix.tocsr()
        form = SparseRows if matrix.format == "csr" else CompressedColumns
        return form(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
    return DenseRows(matrix)


def stored_rows(element: Any) -> Rows:
    """Wrap a matrix of an open h5ad or zarr store.

    Args:
        element: A group if it is sparse, an array if it is dense.

    Raises:
        InputError: It is stored in another way, or its arrays do not fit each other.
    """
    encoding = str(element.attrs.get("encoding-type", ""))
    if encoding in ("csr_matrix", "csc_matrix"):
        form = SparseRows if encoding == "csr_matrix" else CompressedColumns
        missing = [name for name in ("data", "indices", "indptr") if name not in element]
        if missing:
            raise InputError(
                f"a sparse matrix has no {' and no '.join(missing)}",
                "data, indices and indptr",
                _REWRITE,
            )
        shape = _declared_shape(element.attrs.get("shape"))
        return form(element["data"], element["indices"], element["indptr"], shape)
    if not hasattr(element, "shape"):
        raise InputError(
            f"a matrix of counts is stored as {quote(encoding or 'a group without encoding')}",
            "csr_matrix, csc_matrix or array",
            "Read the file with anndata and write it again with write_h5ad",
        )
    return DenseRows(element)


def _declared_shape(declared: Any) -> tuple[int, int]:
    """Return the shape of a sparse matrix from its attribute."""
    shape = np.asarray(declared if declared is not None else ()).reshape(-1)
    valid = shape.size == 2 and shape.dtype.kind in "iu"
    if not valid or (shape < 0).any() or (shape > LARGEST_AXIS).any():
        raise InputError(
            f"a sparse matrix declares the shape {quote(declared)}",
            "two integers: cells and genes",
            _REWRITE,
        )
    return int(shape[0]), int(shape[1])
