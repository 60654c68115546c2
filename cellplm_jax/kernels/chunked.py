"""Dense counts in chunks of cells, so that no array of cells by genes outlives its use.

A batch of 2,000 cells over 19,374 genes is 155 MB as float32, and a plain training step holds a dozen such arrays. Here
a loop runs over chunks of cells. Each iteration scatters only the stored counts of its chunk, in blocks of fixed size;
the fullest chunk determines the number of blocks. All rows and pieces of a batch advance in parallel, so that every
device works in every iteration, whichever rows and pieces it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int, Int32, Integer, Real, Shaped

from cellplm_jax.batch import Array, CellBatch
from cellplm_jax.kernels.matmul import dependent_zeros, linear_product

BLOCK = 32_768
"""Number of stored counts per scatter."""


class CountChunks(struct.PyTreeNode):
    """The stored counts of a batch, indexed by chunk of cells.

    Chunk ``i`` is the ``size`` cells from ``start(i)`` on, in every piece. The last chunk has full size and may overlap
    the one before: :meth:`fresh` returns the cells that are new.

    Attributes:
        cell: The cell of each stored count, within its piece.
        gene: The gene of each stored count.
        begin: Index of the first stored count of each chunk.
        end: Index after the last one.
        blocks: Number of blocks in the fullest chunk.
        cells: Cells per piece.
        size: Cells per chunk.
        genes: Size of the vocabulary.
    """

    cell: Int32[Array, "samples ... nonzeros"]
    gene: Integer[Array, "samples ... nonzeros"]
    begin: Int32[Array, "samples ... chunks"]
    end: Int32[Array, "samples ... chunks"]
    blocks: Int32[Array, ""]
    cells: int = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)
    genes: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, batch: CellBatch, size: int, genes: int) -> CountChunks:
        """Compute the chunks of a batch of cells.

        Args:
            batch: The cells; ``slot``, if not None, preserves the order of the cells that are kept.
            size: Cells per chunk, in each piece.
            genes: Size of the vocabulary.
        """
        cells = batch.cell_mask.shape[1] // batch.pieces
        size = min(size, cells)
        number = -(-cells // size)
        # Constant shapes: the last chunk is moved back instead of being shorter.
        first = jnp.minimum(jnp.arange(number) * size, cells - size)
        source_cells = batch.indptr.shape[-1] - 1

        def bounds(indptr, slot):
            # The source cell of slot s: the first one at which the number of kept cells reaches s + 1.
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

    def start(self, index: Int[Array, ""]) -> Int[Array, ""]:
        """Return the index of the first cell of chunk ``index`` within its piece."""
        return jnp.minimum(index * self.size, self.cells - self.size)

    def fresh(self, index: Int[Array, ""]) -> Bool[Array, " size"]:
        """Return which cells of chunk ``index`` no earlier chunk contains."""
        return self.start(index) + jnp.arange(self.size) >= index * self.size

    def dense(
        self,
        values: Real[Array, "samples *pieces nonzeros"],
        index: Int[Array, ""],
    ) -> Float[Array, "samples *pieces size genes"]:
        """Scatter one value per stored count of one chunk; the result is float32 for integers."""
        kind = values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else jnp.float32
        start = self.start(index)
        stored = self.gene.shape[-1]
        # Blocks of constant size, because a loop needs the same shape in every turn; the number of turns is dynamic.
        width = min(BLOCK, stored)

        def scatter(cell, gene, values, begin, end):
            def block(number, dense):
                # The last block has full size; it may overlap the one before and skips the entries of that one.
                wanted = begin + number * BLOCK
                place = jnp.minimum(wanted, stored - width)
                at = jax.lax.dynamic_slice_in_dim(cell, place, width) - start
                # Not in the chunk: dropped cells, padding, and entries of the next chunk.
                entry = jnp.arange(width) + place
                inside = (entry >= wanted) & (entry < end) & (at >= 0)
                at = jnp.where(inside, at, self.size)
                which = jax.lax.dynamic_slice_in_dim(gene, place, width)
                value = jax.lax.dynamic_slice_in_dim(values, place, width)
                return dense.at[at, which].add(value.astype(dense.dtype), mode="drop")

            # In float32: a CPU would convert a narrower array to float32 and back for every block.
            empty = jnp.zeros((self.size, self.genes), jnp.float32)
            return jax.lax.fori_loop(0, self.blocks, block, empty).astype(kind)

        return _over_pieces(scatter)(
            self.cell,
            self.gene,
            values,
            self.begin[..., index],
            self.end[..., index],
        )

    def rows(
        self,
        values: Shaped[Array, "samples ..."],
        index: Int[Array, ""],
    ) -> Shaped[Array, "samples ..."]:
        """Return the cells of one chunk: [samples, (pieces,) cells, ...] to [samples, (pieces,) size, ...]."""
        return jax.lax.dynamic_slice_in_dim(
            values,
            self.start(index),
            self.size,
            axis=self.begin.ndim - 1,
        )

    def written(
        self,
        values: Shaped[Array, "samples ..."],
        chunk: Shaped[Array, "samples ..."],
        index: Int[Array, ""],
    ) -> Shaped[Array, "samples ..."]:
        """Return ``values`` [samples, (pieces,) cells, ...] with the cells of one chunk replaced."""
        return jax.lax.dynamic_update_slice_in_dim(
            values,
            chunk.astype(values.dtype),
            self.start(index),
            axis=self.begin.ndim - 1,
        )


def _over_pieces(function: Callable) -> Callable:
    """Map a function over the leading axes; a single row and piece runs without vmap, as plain loops and slices."""

    def mapped(first, *rest):
        lead = first.shape[:-1]
        # vmap would turn slices at dynamic positions into gathers.
        if all(length == 1 for length in lead):
            arguments = [value.reshape(value.shape[len(lead) :]) for value in (first, *rest)]
            found = function(*arguments)
            return found.reshape(*lead, *found.shape)
        over = jax.vmap(function)
        return (over if len(lead) == 1 else jax.vmap(over))(first, *rest)

    return mapped


def summed_over_chunks_reference(
    function: Callable,
    chunks: CountChunks,
    params: Any,
    cells: Float[Array, "samples ..."],
    given: Any,
) -> tuple[Float[Array, ""], Any]:
    """Return ``summed_over_chunks`` as a plain sum, differentiated by JAX."""
    return summed_in_parts_reference(
        lambda index, params, given: function(
            chunks,
            index,
            params,
            chunks.rows(cells, index),
            given,
        ),
        chunks.number,
        params,
        given,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_over_chunks(
    function: Callable,
    chunks: CountChunks,
    params: Any,
    cells: Float[Array, "samples ..."],
    given: Any,
) -> tuple[Float[Array, ""], Any]:
    """Sum a scalar function over chunks; under differentiation, the same pass computes its gradient.

    Why: reverse mode would store or recompute the intermediate values of every chunk. But the gradient of a sum is
    known, up to one factor, in the forward pass. So the forward pass computes it per chunk, and no intermediate value
    of a chunk stays in memory (jax 0.10.2).

    Args:
        function: ``(chunks, index, params, rows, given) -> (scalar, auxiliary)``, where ``rows`` are the rows of
            ``cells`` in the chunk; differentiable in ``params`` and ``rows``. Cells that are not fresh must have
            weight 0, and the function must not close over an array.
        chunks: From :meth:`CountChunks.of`.
        params: Any tree of floats.
        cells: [samples, (pieces,) cells, ...].
        given: Any tree of values that are not differentiated.

    Returns:
        The sums of the scalar and of the auxiliary tree; the latter has no gradient.
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

    # The gradient of the cells is written chunk by chunk into one array, so only its shape of one chunk is dropped
    # here.
    value, (of_params, _) = _zeros(at)
    zeros = value, (of_params, jnp.zeros_like(cells))
    value, gradients = jax.lax.fori_loop(0, chunks.number, add, zeros)
    return value, (gradients, _types(params))


def _summed_backward(function, saved, cotangent):
    (of_params, of_cells), types = saved
    # The loss is scalar, so its cotangent is one factor for all gradients of the forward pass.
    of_cells = cotangent[0].astype(of_cells.dtype) * of_cells
    # None: chunks and given data are not differentiated.
    return None, _scaled(cotangent[0], of_params, types), of_cells, None


def _types(params: Any) -> Any:
    """Return a scalar of each parameter's type, the type of its gradient."""
    # Residuals must be arrays; a scalar keeps the type without keeping the parameter.
    return jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), params)


def _scaled(factor: Array, gradients: Any, types: Any) -> Any:
    return jax.tree.map(
        lambda leaf, like: (factor * leaf).astype(like.dtype),
        gradients,
        types,
    )


summed_over_chunks.defvjp(_summed_forward, _summed_backward)


def summed_in_parts_reference(
    function: Callable,
    number: int,
    params: Any,
    given: Any,
) -> tuple[Float[Array, ""], Any]:
    """Return ``summed_in_parts`` as a plain sum, differentiated by JAX."""
    value, *rest = (function(jnp.int32(index), params, given) for index in range(number))
    for more in rest:
        value = jax.tree.map(jnp.add, value, more)
    return value


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed_in_parts(
    function: Callable,
    number: int,
    params: Any,
    given: Any,
) -> tuple[Float[Array, ""], Any]:
    """Sum a scalar function over numbered parts, with the gradient computed per part.

    Why: as for :func:`summed_over_chunks` (jax 0.10.2).

    Args:
        function: ``(index, params, given) -> (scalar, auxiliary)``, differentiable in ``params``.
        number: Number of parts.
        params: Any tree of floats.
        given: Any tree of values that are not differentiated.

    Returns:
        The sums of the scalar and of the auxiliary tree; the latter has no gradient.
    """
    return _summed(lambda index: function(index, params, given), number)


def _summed(at: Callable, number: int) -> Any:
    return jax.lax.fori_loop(
        0,
        number,
        lambda index, total: jax.tree.map(jnp.add, total, at(index)),
        _zeros(at),
    )


def _zeros(at: Callable) -> Any:
    """Return the initial value of a sum over ``at(index)``: at least float32, so that no addend is lost to rounding."""
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
    table: Float[Array, "genes width"],
    chunks: CountChunks,
    values: Float[Array, "samples *pieces nonzeros"],
    hidden: Bool[Array, "samples *pieces cells genes"] | None,
) -> Float[Array, "samples *pieces cells width"]:
    """Return ``chunked_product`` as a single product of the dense counts."""

    def scatter(cell, gene, values):
        dense = jnp.zeros((chunks.cells, chunks.genes), values.dtype)
        return dense.at[cell, gene].add(values, mode="drop")

    expression = _over_pieces(scatter)(chunks.cell, chunks.gene.astype(jnp.int32), values)
    if hidden is not None:
        expression = jnp.where(hidden, jnp.zeros((), values.dtype), expression)
    return expression @ table


@jax.custom_vjp
def chunked_product(
    table: Float[Array, "genes width"],
    chunks: CountChunks,
    values: Float[Array, "samples *pieces nonzeros"],
    hidden: Bool[Array, "samples *pieces cells genes"] | None,
) -> Float[Array, "samples *pieces cells width"]:
    """Multiply sparse expression with a table, in chunks in the forward and the backward pass.

    Why: otherwise the dense counts of the complete batch stay in memory until the backward pass (jax 0.10.2).

    Args:
        table: One row per gene.
        chunks: From :meth:`CountChunks.of`.
        values: One per stored count, of the table's type; not differentiated.
        hidden: Entries that count as 0; None: none.
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
    return jnp.where(
        chunks.rows(hidden, index),
        jnp.zeros((), values.dtype),
        expression,
    )


def _product_forward(table, chunks, values, hidden):
    return chunked_product(table, chunks, values, hidden), (table, chunks, values, hidden)


def _product_backward(saved, gradient):
    table, chunks, values, hidden = saved

    def at(index):
        # The forward pass writes overlapping cells twice with the same value; a sum must count them once.
        fresh = chunks.fresh(index)[:, None]
        rows = jnp.where(fresh, chunks.rows(gradient, index), 0)
        expression = _expression(chunks, values, hidden, index)
        return jnp.einsum("...cg,...ch->gh", expression, rows, preferred_element_type=jnp.float32)

    # Allocated only once the gradient exists, not at the start of the step.
    empty = dependent_zeros(gradient, table.shape)
    product = jax.lax.fori_loop(0, chunks.number, lambda index, sum: sum + at(index), empty)
    return product.astype(table.dtype), None, None, None


chunked_product.defvjp(_product_forward, _product_backward)
