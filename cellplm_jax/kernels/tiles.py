"""Products of packed rows tile by tile: sums over the cells of each segment, for any number of segments.

The cells of each piece are sorted by segment, so splitting at every multiple of :data:`TILE` and at every segment's
start gives ``cells / TILE + segments`` tiles of up to ``TILE`` cells, each within one segment. This costs up to about
twice the plain sum, for any number of segments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int, Int32

from cellplm_jax.batch import Array
from cellplm_jax.kernels.heads import by_head
from cellplm_jax.kernels.matmul import batched_product

# Cells per tile of packed attention: large enough for a matrix unit, small compared with the row.
TILE = 128


def _one_hot(cell_mask: Array, segment: Array, segments: int) -> Array:
    return jax.nn.one_hot(segment, segments) * cell_mask[..., None]


def tiled_outer_total_reference(
    left: Float[Array, "samples cells heads width"],
    right: Float[Array, "samples cells heads other"],
    cell_mask: Bool[Array, "samples cells"],
    segment: Int32[Array, "samples cells"],
    segments: int,
    pieces: int,
) -> Float[Array, "samples {segments} heads width other"]:
    """Return :func:`tiled_outer_total` by a one-hot matrix."""
    one_hot = _one_hot(cell_mask, segment, segments)
    return jnp.einsum("bcs,bchi,bcho->bshio", one_hot, left, right)


def tiled_outer_total(
    left: Float[Array, "samples cells heads width"],
    right: Float[Array, "samples cells heads other"],
    cell_mask: Bool[Array, "samples cells"],
    segment: Int32[Array, "samples cells"],
    segments: int,
    pieces: int,
) -> Float[Array, "samples {segments} heads width other"]:
    """Sum the outer products of two vectors per cell over each segment.

    Why: a product with a one-hot matrix costs as many times more as there are segments (any backend, jax 0.10).

    Args:
        left: First vectors.
        right: Second vectors.
        cell_mask: True for cells, False for padding.
        segment: Rising within each piece; any value on padding.
        segments: Maximum number of samples per row.
        pieces: Number of pieces of each row.
    """

    def of_piece(tiles, left, right):
        cut = left[tiles.block] * tiles.inside[:, None, :, None]
        # One factor masked is enough: the other's rows outside the tile are multiplied by 0.
        product = batched_product(cut, right[tiles.block], "rows", "rows")
        return jax.ops.segment_sum(product, tiles.segment, segments)

    over_pieces = jax.vmap(jax.vmap(of_piece))
    tiles = _tiles(cell_mask, segment, segments, pieces)
    return over_pieces(tiles, _blocks(left, pieces), _blocks(right, pieces)).sum(axis=1)


def tiled_apply_reference(
    values: Float[Array, "samples cells heads width"],
    memory: Float[Array, "samples {segments} heads width other"],
    cell_mask: Bool[Array, "samples cells"],
    segment: Int32[Array, "samples cells"],
    segments: int,
    pieces: int,
) -> Float[Array, "samples cells heads other"]:
    """Return :func:`tiled_apply` by a one-hot matrix."""
    one_hot = _one_hot(cell_mask, segment, segments)
    return jnp.einsum("bcs,bchi,bshio->bcho", one_hot, values, memory)


def tiled_apply(
    values: Float[Array, "samples cells heads width"],
    memory: Float[Array, "samples {segments} heads width other"],
    cell_mask: Bool[Array, "samples cells"],
    segment: Int32[Array, "samples cells"],
    segments: int,
    pieces: int,
) -> Float[Array, "samples cells heads other"]:
    """Multiply each cell's vector by its segment's matrix; padding is 0. See :func:`tiled_outer_total`.

    Why: a product with a one-hot matrix costs as many times more as there are segments (any backend, jax 0.10).
    """

    def of_piece(tiles, values, memory):
        cut = values[tiles.block] * tiles.inside[:, None, :, None]
        product = batched_product(cut, memory[tiles.segment])
        # Tiles of one block cover different cells of it, so their results add up without overlap.
        return jax.ops.segment_sum(product, tiles.block, values.shape[0])

    over_pieces = jax.vmap(jax.vmap(of_piece, in_axes=(0, 0, None)))
    tiles = _tiles(cell_mask, segment, segments, pieces)
    mixed = by_head(over_pieces(tiles, _blocks(values, pieces), memory))
    mixed = mixed.reshape(*mixed.shape[:2], -1, *mixed.shape[4:])
    # The last block was padded to a full tile.
    mixed = mixed[:, :, : cell_mask.shape[1] // pieces]
    return mixed.reshape(*cell_mask.shape, *mixed.shape[3:])


def _blocks(values: Array, pieces: int) -> Array:
    """Split [samples, cells, heads, width] into [samples, pieces, blocks, heads, TILE, width], zero-padded."""
    samples, cells = values.shape[:2]
    per_piece = cells // pieces
    blocks = -(-per_piece // TILE)
    folded = values.reshape(samples, pieces, per_piece, *values.shape[2:])
    spare = [(0, 0), (0, 0), (0, blocks * TILE - per_piece)] + [(0, 0)] * (values.ndim - 2)
    padded = jnp.pad(folded, spare)
    return by_head(padded.reshape(samples, pieces, blocks, TILE, *values.shape[2:]))


class _Tiles(struct.PyTreeNode):
    """Ranges of cells within one block and one segment."""

    block: Int[Array, " tiles"]
    segment: Int[Array, " tiles"]
    inside: Bool[Array, "tiles {TILE}"]


def _tiles(cell_mask: Array, segment: Array, segments: int, pieces: int) -> _Tiles:
    samples, cells = cell_mask.shape
    per_piece = cells // pieces
    blocks = -(-per_piece // TILE)
    # Padding has a segment number past the last one.
    label = jnp.where(cell_mask, segment, segments)
    label = label.reshape(samples, pieces, per_piece)

    def of_piece(label):
        first = jnp.searchsorted(label, jnp.arange(segments + 1, dtype=label.dtype))
        # A constant number of edges for any segments: coinciding ones give empty tiles.
        edges = jnp.concatenate([jnp.arange(blocks, dtype=first.dtype) * TILE, first[1:]])
        start = jnp.sort(edges)
        stop = jnp.append(start[1:], per_piece)
        block = jnp.minimum(start // TILE, blocks - 1)
        segment = label[jnp.minimum(start, per_piece - 1)]
        place = block[:, None] * TILE + jnp.arange(TILE)
        inside = (place >= start[:, None]) & (place < stop[:, None])
        # A tile of padding is empty; its segment may be any valid one.
        inside &= (segment < segments)[:, None]
        return _Tiles(block, jnp.minimum(segment, segments - 1), inside)

    return jax.vmap(jax.vmap(of_piece))(label)
