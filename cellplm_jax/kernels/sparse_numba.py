"""Stored counts times gene embeddings on the cores of the host, compiled by Numba: the embedder's first product.

A cell stores a thousand counts of twenty thousand, so all but one in twenty of a dense product's operations are with
zero. XLA has no kernel that gains from that as much as there is to gain (``benchmarks/speed/embedder.md``); this one
takes genes in blocks whose embeddings stay in the processor's caches while the cells of a chunk pass by, and four of
them at a time, so that a cell's sum is read and written once for four. Numba comes with the extra ``cpu``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Float32, Int32, Shaped
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Entries of the table that all cells pass before the next ones: 2 MiB of float32.
BLOCK_ENTRIES = 2**19


def stored_product_reference(
    indptr: Int32[np.ndarray, " cells_plus_1"],
    column: Int32[np.ndarray, " nonzeros"],
    value: Float32[np.ndarray, " stored"],
    table: Shaped[np.ndarray, "columns width"],
) -> Float32[np.ndarray, "cells width"]:
    """Return :func:`stored_product` by the product of a dense matrix, in float64."""
    dense = np.zeros((len(indptr) - 1, len(table)))
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    dense[row, column[: indptr[-1]]] = value[: indptr[-1]]
    return (dense @ table.astype(np.float64)).astype(np.float32)


def stored_product(
    indptr: Int32[np.ndarray, " cells_plus_1"],
    column: Int32[np.ndarray, " nonzeros"],
    value: Float32[np.ndarray, " stored"],
    table: Shaped[np.ndarray, "columns width"],
) -> Float32[np.ndarray, "cells width"]:
    """Multiply a CSR matrix with a dense one, on all cores this process may use.

    Why: nineteen of twenty operations of the dense product are with zero, and XLA's sparse product on a CPU reads the
    table from memory again for every cell (jax 0.10.2).

    The order in which a cell's terms are added does not depend on the number of cores nor on the other cells.

    Args:
        indptr: Offset of each cell in the next two.
        column: Rising within each cell.
        value: One per column; padding at the end of ``column`` has none.
        table: float32 or bfloat16, contiguous; sums are float32.
    """
    cells, width = len(indptr) - 1, table.shape[1]
    product = np.zeros((cells, width), np.float32)
    block = max(1, BLOCK_ENTRIES // width)
    # Numba has no bfloat16.
    narrow = table.dtype.name == "bfloat16"
    # The same bits as uint16; `_widen` shifts them into the upper half of a float32.
    table = table.view(np.uint16) if narrow else table.astype(np.float32, copy=False)
    # Containers and batch systems restrict a process to fewer cores than the machine has; absent on macOS.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    # Cells in runs of about as many stored counts each.
    shares = np.linspace(indptr[0], indptr[-1], cores + 1)[1:-1]
    edges = [0, *np.searchsorted(indptr, shares), cells]

    def multiply(first, last):
        _add_rows(indptr, column, value, table, product, first, last, block)

    with ThreadPoolExecutor(cores, thread_name_prefix="stored_product") as pool:
        # `list` waits, and raises what a thread raised.
        list(pool.map(multiply, edges[:-1], edges[1:]))
    return product


def _widen(_, entry):
    """Return a float32 as it is, and a bfloat16, whose bits are given as uint16, as float32."""

    def build(_, builder, signature, values):
        (value,) = values
        if signature.args[0] == types.float32:
            return value
        bits = builder.zext(value, ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(entry), build


_widened: Any = intrinsic(_widen)


def _compiled(function: Callable) -> Callable:
    """Compile a function that runs beside other threads, and keep the result on disk where there is a place for it."""
    options = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


@_compiled
@no_type_check  # Numba compiles the function itself, not what checks its arguments.
def _add_rows(indptr, column, value, table, product, first, last, block):
    """Add to rows ``first`` to ``last`` (exclusive) of ``product`` their weighted rows of ``table``."""
    width = table.shape[1]
    place = indptr[first:last].copy()
    for start in range(0, table.shape[0], block):
        stop = min(start + block, table.shape[0])
        for row in range(first, last):
            total = product[row]
            here, end = place[row - first], indptr[row + 1]
            after = here
            while after < end and column[after] < stop:
                after += 1
            place[row - first] = after
            # Four rows of the table per pass over the sum, which is then loaded and stored a quarter as often.
            while here + 4 <= after:
                a, b, c, d = value[here], value[here + 1], value[here + 2], value[here + 3]
                of_a, of_b = table[column[here]], table[column[here + 1]]
                of_c, of_d = table[column[here + 2]], table[column[here + 3]]
                for i in range(width):
                    total[i] += (
                        a * _widened(of_a[i])
                        + b * _widened(of_b[i])
                        + c * _widened(of_c[i])
                        + d * _widened(of_d[i])
                    )
                here += 4
            while here < after:
                a, of_a = value[here], table[column[here]]
                for i in range(width):
                    total[i] += a * _widened(of_a[i])
                here += 1
