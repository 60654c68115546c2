"""Matrices of an AnnData that are already on an accelerator: JAX arrays, and CuPy arrays through DLPack.

A CuPy array shares its memory with JAX: nothing is copied. Only the row offsets of a sparse matrix and the few values
that are checked for being counts go to the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax


def is_device_array(array: Any) -> bool:
    """Return whether an array supports DLPack, as JAX and CuPy arrays do, and is not a NumPy array."""
    if isinstance(array, np.ndarray):
        return False
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def is_device_sparse(matrix: Any) -> bool:
    """Return whether a matrix is compressed sparse with its entries in device memory, as in CuPy."""
    return hasattr(matrix, "indptr") and is_device_array(getattr(matrix, "data", None))


def to_jax(array: Any) -> jax.Array:
    """Return an array as a JAX array in the same memory; 64-bit types are converted to 32 bits in device memory.

    Args:
        array: A JAX array, or one with ``__dlpack__``.
    """
    import jax

    # JAX computes in 32 bits by default; converted before the import, in the memory of the device.
    narrow = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32, "bool": np.uint8}
    wanted = narrow.get(np.dtype(array.dtype).name)
    if isinstance(array, jax.Array):
        return array if wanted is None else array.astype(wanted)
    if wanted is not None:
        array = array.astype(wanted)
    return jax.dlpack.from_dlpack(array)


class DeviceRows:
    """Rows of a dense matrix in device memory.

    Attributes:
        array: [cells, genes].
    """

    kind = "dense on a device:"

    def __init__(self, matrix: Any):
        self.array = to_jax(matrix)
        self.shape = (int(self.array.shape[0]), int(self.array.shape[1]))
        self.dtype = np.dtype(self.array.dtype)

    @property
    def device(self) -> jax.Device:
        """The device that holds it; the first of several."""
        return sorted(self.array.devices(), key=lambda device: device.id)[0]

    def on_host(self, start: int, stop: int) -> np.ndarray:
        """Copy consecutive rows to the host."""
        return np.asarray(self.array[start:stop])

    def fits(self, rows: np.ndarray, capacity: int) -> int:
        """Return the number of rows that fit into one call of :meth:`take`: all."""
        return len(rows)

    def arguments(self) -> tuple[jax.Array, ...]:
        """Return the arrays that :meth:`take` is called with."""
        return (self.array,)

    @staticmethod
    def take(arrays: tuple[jax.Array, ...], rows: jax.Array, capacity: int) -> Any:
        """Return rows [n] as ``[n, genes]``; called in a compiled function."""
        import jax.numpy as jnp

        return jnp.take(arrays[0], rows, axis=0)


class DeviceSparseRows:
    """Rows of a CSR matrix in device memory; the row offsets are also on the host.

    Attributes:
        data: [stored].
        indices: int [stored], columns.
        indptr: int64 [cells + 1], on the host.
    """

    kind = "CSR on a device:"

    def __init__(self, matrix: Any):
        if getattr(matrix, "format", "csr") != "csr":
            matrix = matrix.tocsr()
        if not getattr(matrix, "has_canonical_format", True):
            # sum_duplicates works in place, and the matrix belongs to the caller.
            matrix = matrix.copy()
            matrix.sum_duplicates()
        self.data = to_jax(matrix.data)
        self.indices = to_jax(matrix.indices)
        self._indptr = to_jax(matrix.indptr)
        self.indptr = np.asarray(self._indptr, np.int64)
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.dtype = np.dtype(self.data.dtype)

    @property
    def device(self) -> jax.Device:
        """The device that holds it; the first of several."""
        return sorted(self.data.devices(), key=lambda device: device.id)[0]

    def on_host(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy consecutive rows to the host: data, columns and offsets."""
        low = int(self.indptr[start])
        high = int(self.indptr[stop])
        pointers = self.indptr[start : stop + 1] - low
        return np.asarray(self.data[low:high]), np.asarray(self.indices[low:high]), pointers

    def fits(self, rows: np.ndarray, capacity: int) -> int:
        """Return the maximum number of first rows whose stored counts fit into ``capacity``; at least one."""
        stored = np.cumsum(self.indptr[rows + 1] - self.indptr[rows])
        return max(1, int(np.searchsorted(stored, capacity, side="right")))

    def arguments(self) -> tuple[jax.Array, ...]:
        """Return the arrays that :meth:`take` is called with."""
        return self.data, self.indices, self._indptr

    @staticmethod
    def take(arrays: tuple[jax.Array, ...], rows: jax.Array, capacity: int) -> Any:
        """Return rows [n] as data and columns [capacity] and offsets [n + 1]; called in a compiled function.

        Entries past the last offset are 0 in column 0.
        """
        import jax.numpy as jnp

        data, indices, indptr = arrays
        begin = indptr[rows]
        lengths = indptr[rows + 1] - indptr[rows]
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths).astype(jnp.int32)])
        entry = jnp.arange(capacity)
        # A constant capacity, so that chunks of different content share one compiled function.
        row = jnp.repeat(jnp.arange(len(rows)), lengths, total_repeat_length=capacity)
        place = jnp.clip(
            begin[row] + entry - offsets[row],
            0,
            max(data.shape[0] - 1, 0),
        )
        stored = entry < offsets[-1]
        zero = jnp.zeros((), data.dtype)
        return jnp.where(stored, data[place], zero), jnp.where(stored, indices[place], 0), offsets
