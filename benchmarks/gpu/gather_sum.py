"""The embedder's first product as one kernel for GPUs: each cell adds up its genes' embeddings, nothing becomes dense.

A cell's 1,500 rows of the table are 3 MB in bfloat16, read from the L2 cache where the table fits (40 MB of 50), so
the kernel is bound by the cache's bandwidth; the dense product it stands against does 13 times as many operations, on
the matrix units. Which wins is what the run finds out. Written in Pallas, compiled by Triton; ``interpret=True`` runs
it on a CPU.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

WIDTH = 256
"""Columns of the table that a program adds up."""


def _kernel(begin_ref, end_ref, gene_ref, value_ref, table_ref, out_ref):
    cell, column = pl.program_id(0), pl.program_id(1)
    columns = pl.ds(column * WIDTH, WIDTH)

    def add(entry, total):
        row = table_ref[gene_ref[entry], columns]
        return total + value_ref[entry] * row.astype(jnp.float32)

    zeros = jnp.zeros((WIDTH,), jnp.float32)
    total = jax.lax.fori_loop(begin_ref[cell], end_ref[cell], add, zeros)
    out_ref[cell, columns] = total.astype(out_ref.dtype)


@partial(jax.jit, static_argnames=("interpret",))
def gather_sum(
    indptr: jax.Array,
    gene: jax.Array,
    value: jax.Array,
    table: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply a CSR matrix with a table.

    Args:
        indptr: int32 [cells + 1].
        gene: integer [stored].
        value: float32 [stored].
        table: float [genes, width], the width a multiple of 256.
        interpret: Run without a GPU.

    Returns:
        [cells, width] of the table's type; sums are float32.
    """
    cells, width = indptr.shape[0] - 1, table.shape[1]
    return pl.pallas_call(
        _kernel,
        grid=(cells, width // WIDTH),
        out_shape=jax.ShapeDtypeStruct((cells, width), table.dtype),
        interpret=interpret,
    )(indptr[:-1], indptr[1:], gene.astype(jnp.int32), value, table)
