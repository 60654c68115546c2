"""Counts made dense a chunk of cells at a time, so that no array of cells by genes outlives its use.

A batch of 2,000 cells over 19,374 genes is 155 MB as float32, and a plain training step holds a dozen such arrays. Here
a loop goes over chunks of cells; each step scatters the stored counts of its chunk alone, in blocks of a fixed number,
as many as the fullest chunk needs. Rows and pieces of a batch advance side by side, so that devices that hold different
ones all work on every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cellplm_jax.batch import CellBatch
from cellplm_jax.kernels.matmul import dependent_zeros, linear_product

BLOCK = 32_768
"""Stored counts that are scattered at once."""


class CountChunks(struct.PyTreeNode):
    """The stored counts of a batch, found by chunk of cells.

    Chunk ``i`` is the cells from ``start(i)`` on, ``size`` of them, in every piece. The last one begins early enough to
    be whole: :meth:`fresh` says which of its cells the one before did not have.

    Attributes:
        cell: int32 [samples, (pieces,) nonzeros], each stored count's cell in its piece.
        gene: uint, likewise.
        begin: int32 [samples, (pieces,) chunks], where the stored counts of each chunk begin.
        end: int32, likewise: where they end.
        blocks: int32 scalar, blocks of the fullest chunk.
        cells: Cells of a piece.
        size: Cells of a chunk.
        genes: Size of the vocabulary.
    """

    cell: jax.Array
    gene: jax.Array
    begin: jax.Array
    end: jax.Array
    blocks: jax.Array
    cells: int = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)
    genes: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, batch: CellBatch, size: int, genes: int) -> CountChunks:
        """Find the chunks of a batch.

        Args:
            batch: The cells; ``slot``, where there is one, keeps the order of the cells that are kept.
            size: Cells of a chunk, in each piece.
            genes: Size of the vocabulary.
        """
        cells = batch.cell_mask.shape[1] // batch.pieces
        size = min(size, cells)
        number = -(-cells // size)
        first = jnp.minimum(jnp.arange(number) * size, cells - size)
        source_cells = batch.indptr.shape[-1] - 1

        def bounds(indptr, slot):
            # The source cell behind each slot: the first one up to which that many are kept, and one more.
            kept = jnp.cumsum(slot < cells)
            begin = jnp.searchsorted(kept, first + 1)
            end = jnp.minimum(jnp.searchsorted(kept, first + size) + 1, source_cells)
            return indptr[jnp.minimum(begin, source_cells)], indptr[end]

        slot = batch.slot
        if slot is None:
            slot = jnp.broadcast_to(
                jnp.arange(source_cells), (*batch.indptr.shape[:-1], source_cells)
            )
        begin, end = batch.over_pieces(bounds)(batch.indptr, slot)
        return cls(
            cell=batch.cell_of_nonzero(),
            gene=batch.gene,
            begin=begin,
            end=end,
            blocks=jnp.max(-(-(end - begin) // BLOCK)),
            cells=cells,
            size=size,
            genes=genes,
        )

    @property
    def number(self) -> int:
        """Number of chunks."""
        return self.begin.shape[-1]

    def start(self, index: jax.Array) -> jax.Array:
        """Return the first cell of a chunk, counted within its piece."""
        return jnp.minimum(index * self.size, self.cells - self.size)

    def fresh(self, index: jax.Array) -> jax.Array:
        """Return bool [size]: the cells of a chunk that the chunks before did not have."""
        return self.start(index) + jnp.arange(self.size) >= index * self.size

    def dense(self, values: jax.Array, index: jax.Array) -> jax.Array:
        """Scatter one value per stored count of a chunk.

        Args:
            values: float or int [samples, (pieces,) nonzeros].
            index: int32 scalar, which chunk.

        Returns:
            [samples, (pieces,) size, genes] of the values' dtype; float32 where they are integers.
        """
        kind = values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else jnp.float32
        start, stored = self.start(index), self.gene.shape[-1]
        width = min(BLOCK, stored)

        def scatter(cell, gene, values, begin, end):
            def block(number, dense):
                # The last block begins early enough to be whole, and leaves out what the one before had.
                wanted = begin + number * BLOCK
                place = jnp.minimum(wanted, stored - width)
                at = jax.lax.dynamic_slice_in_dim(cell, place, width) - start
                # Outside of the chunk: dropped cells, padding, and what belongs to the next block's chunk.
                entry = jnp.arange(width) + place
                inside = (entry >= wanted) & (entry < end) & (at >= 0)
                at = jnp.where(inside, at, self.size)
                which = jax.lax.dynamic_slice_in_dim(gene, place, width)
                value = jax.lax.dynamic_slice_in_dim(values, place, width)
                return dense.at[at, which].add(value.astype(dense.dtype), mode="drop")

            # In float32: a CPU would widen a narrow array for every block and round it again.
            empty = jnp.zeros((self.size, self.genes), jnp.float32)
            return jax.lax.fori_loop(0, self.blocks, block, empty).astype(kind)

        return _over_pieces(scatter)(
            self.cell, self.gene, values, self.begin[..., index], self.end[..., index]
        )

    def rows(self, values: jax.Array, index: jax.Array) -> jax.Array:
        """Take a chunk's cells: [samples, (pieces,) cells, ...] to [samples, (pieces,) size, ...]."""
        return jax.lax.dynamic_slice_in_dim(
            values, self.start(index), self.size, axis=self.begin.ndim - 1
        )

    def written(self, values: jax.Array, chunk: jax.Array, index: jax.Array) -> jax.Array:
        """Return ``values`` [samples, (pieces,) cells, ...] with a chunk's cells replaced."""
        return jax.lax.dynamic_update_slice_in_dim(
            values, chunk.astype(values.dtype), self.start(index), axis=self.begin.ndim - 1
        )


def _over_pieces(function: Callable) -> Callable:
    """Map a function over the leading axes; a single row and piece goes without, as plain loops and slices."""

    def mapped(first, *rest):
        lead = first.shape[:-1]
        if all(length == 1 for length in lead):
            arguments = [value.reshape(value.shape[len(lead) :]) for value in (first, *rest)]
            found = function(*arguments)
            return found.reshape(*lead, *found.shape)
        over = jax.vmap(function)
        return (over if len(lead) == 1 else jax.vmap(over))(first, *rest)

    return mapped


def summed_over_chunks_reference(
    function: Callable, chunks: CountChunks, params: Any, cells: jax.Array, given: Any
) -> tuple[jax.Array, Any]:
    """Return ``summed_over_chunks`` as a sum, differentiated by JAX."""
    return summed_in_parts_reference(
        lambda index, params, given: function(
            chunks, index, params, chunks.rows(cells, index), given
        ),
        chunks.number,
        params,
        given,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_over_chunks(
    function: Callable, chunks: CountChunks, params: Any, cells: jax.Array, given: Any
) -> tuple[jax.Array, Any]:
    """Sum a scalar function over chunks; where its gradient is asked for, that is computed in the same pass.

    Why: reverse mode would keep or compute again what every chunk holds. But the gradient of a sum is known up to one
    factor when the chunk is at hand, so it is taken there and then, and nothing of the chunk stays (jax 0.10.2).

    Args:
        function: ``(chunks, index, params, rows, given) -> (scalar, auxiliary)``, where ``rows`` is a chunk's part of
            ``cells``; differentiable in ``params`` and ``rows``. It must give cells that are not fresh no weight, and
            close over no array.
        chunks: From :meth:`CountChunks.of`.
        params: Any tree of floats.
        cells: float [samples, (pieces,) cells, ...].
        given: Any tree of what is not differentiated.

    Returns:
        The sums of the scalar and of the auxiliary tree, which passes no gradient on.
    """

    return _summed(
        lambda index: function(chunks, index, params, chunks.rows(cells, index), given),
        chunks.number,
    )


def _summed_forward(function, chunks, params, cells, given):
    def at(index):
        def scalar(params, rows):
            return function(chunks, index, params, rows, given)

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(
            params, chunks.rows(cells, index)
        )

    def add(index, total):
        value, (of_params, of_cells) = total
        more, (more_of_params, more_of_rows) = at(index)
        value, of_params = jax.tree.map(jnp.add, (value, of_params), (more, more_of_params))
        more_of_rows = chunks.rows(of_cells, index) + more_of_rows
        return value, (of_params, chunks.written(of_cells, more_of_rows, index))

    value, (of_params, _) = _zeros(at)
    zeros = value, (of_params, jnp.zeros_like(cells))
    value, gradients = jax.lax.fori_loop(0, chunks.number, add, zeros)
    return value, (gradients, _types(params))


def _summed_backward(function, saved, cotangent):
    (of_params, of_cells), types = saved
    of_cells = cotangent[0].astype(of_cells.dtype) * of_cells
    return None, _scaled(cotangent[0], of_params, types), of_cells, None


def _types(params: Any) -> Any:
    """Return a scalar of each parameter's type, for its gradient to be cast to."""
    return jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), params)


def _scaled(factor: jax.Array, gradients: Any, types: Any) -> Any:
    return jax.tree.map(lambda leaf, like: (factor * leaf).astype(like.dtype), gradients, types)


summed_over_chunks.defvjp(_summed_forward, _summed_backward)


def summed_in_parts_reference(
    function: Callable, number: int, params: Any, given: Any
) -> tuple[jax.Array, Any]:
    """Return ``summed_in_parts`` as a sum, differentiated by JAX."""
    value, *rest = (function(jnp.int32(index), params, given) for index in range(number))
    for more in rest:
        value = jax.tree.map(jnp.add, value, more)
    return value


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed_in_parts(
    function: Callable, number: int, params: Any, given: Any
) -> tuple[jax.Array, Any]:
    """Sum a scalar function over parts of anything, its gradient taken part by part; see ``summed_over_chunks``.

    Why: see there (jax 0.10.2).

    Args:
        function: ``(index, params, given) -> (scalar, auxiliary)``, differentiable in ``params``.
        number: Number of parts.
        params: Any tree of floats.
        given: Any tree of what is not differentiated.

    Returns:
        The sums of the scalar and of the auxiliary tree, which passes no gradient on.
    """
    return _summed(lambda index: function(index, params, given), number)


def _summed(at: Callable, number: int) -> Any:
    return jax.lax.fori_loop(
        0, number, lambda index, total: jax.tree.map(jnp.add, total, at(index)), _zeros(at)
    )


def _zeros(at: Callable) -> Any:
    """Return where a sum over ``at(index)`` starts: float32 at least, so that no addend is lost in a narrow type."""
    shapes = jax.eval_shape(at, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes
    )


def _parts_forward(function, number, params, given):
    def at(index):
        scalar = lambda params: function(index, params, given)  # noqa: E731
        return jax.value_and_grad(scalar, has_aux=True)(params)

    value, gradients = _summed(at, number)
    return value, (gradients, _types(params))


def _parts_backward(function, number, saved, cotangent):
    return _scaled(cotangent[0], *saved), None


summed_in_parts.defvjp(_parts_forward, _parts_backward)


def chunked_product_reference(
    table: jax.Array, chunks: CountChunks, values: jax.Array, hidden: jax.Array | None
) -> jax.Array:
    """Return ``chunked_product`` by one product of the dense counts."""

    def scatter(cell, gene, values):
        dense = jnp.zeros((chunks.cells, chunks.genes), values.dtype)
        return dense.at[cell, gene].add(values, mode="drop")

    expression = _over_pieces(scatter)(chunks.cell, chunks.gene.astype(jnp.int32), values)
    if hidden is not None:
        expression = jnp.where(hidden, jnp.zeros((), values.dtype), expression)
    return expression @ table


@jax.custom_vjp
def chunked_product(
    table: jax.Array, chunks: CountChunks, values: jax.Array, hidden: jax.Array | None
) -> jax.Array:
    """Multiply sparse expression with a table, chunk by chunk in both directions.

    Why: the dense counts of a whole batch would be held until the backward pass (jax 0.10.2).

    Args:
        table: float [genes, width].
        chunks: From :meth:`CountChunks.of`.
        values: float [samples, (pieces,) nonzeros], one per stored count, of the table's type; not differentiated.
        hidden: bool [samples, (pieces,) cells, genes], entries that count as 0; None: none.

    Returns:
        [samples, (pieces,) cells, width] of the table's type.
    """
    empty = jnp.zeros((*chunks.begin.shape[:-1], chunks.cells, table.shape[1]), table.dtype)

    def add(index, product):
        rows = linear_product(_expression(chunks, values, hidden, index), table)
        return chunks.written(product, rows, index)

    return jax.lax.fori_loop(0, chunks.number, add, empty)


def _expression(chunks, values, hidden, index):
    expression = chunks.dense(values, index)
    if hidden is None:
        return expression
    return jnp.where(chunks.rows(hidden, index), jnp.zeros((), values.dtype), expression)


def _product_forward(table, chunks, values, hidden):
    return chunked_product(table, chunks, values, hidden), (table, chunks, values, hidden)


def _product_backward(saved, gradient):
    table, chunks, values, hidden = saved

    def at(index):
        fresh = chunks.fresh(index)[:, None]
        rows = jnp.where(fresh, chunks.rows(gradient, index), 0)
        expression = _expression(chunks, values, hidden, index)
        return jnp.einsum("...cg,...ch->gh", expression, rows, preferred_element_type=jnp.float32)

    empty = dependent_zeros(gradient, table.shape)
    product = jax.lax.fori_loop(0, chunks.number, lambda index, sum: sum + at(index), empty)
    return product.astype(table.dtype), None, None, None


chunked_product.defvjp(_product_forward, _product_backward)
