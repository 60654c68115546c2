"""Bi-level masking as pure functions of a PRNG key (paper section 4.3, ``CellPLM/utils/mask.py``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Key, Shaped
from scipy.special import betaincinv

from cellplm_jax.batch import Array, CellBatch, Shape
from cellplm_jax.config import MaskingConfig
from cellplm_jax.model.layers import ENTRIES, constrain


def _rank(noise: Array) -> Array:
    """Return int32 [..., cells]: the rank of each cell in increasing order of ``noise``."""
    # The argsort of a permutation is its inverse, hence the rank.
    return jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1).astype(jnp.int32)


def _rank_in_sample(
    noise: Array,
    cell_mask: Array,
    segment: Array | None,
    segments: int,
) -> tuple[Array, Array]:
    """Rank the cells of each sample by noise.

    Returns int32 [..., cells], the rank among the cells of the same sample in the same piece (undefined on padding),
    and the number of those cells. ``noise`` is infinite on padding.
    """
    rank = _rank(noise)
    present = cell_mask.sum(axis=-1, keepdims=True)
    if segment is None:
        return rank, jnp.broadcast_to(present, rank.shape)
    # Sorted by segment and then by noise, a cell's rank is its position minus the start of its segment.
    key = jnp.where(cell_mask, segment, segments) * noise.shape[-1] + rank
    place = _rank(key)
    label = jnp.where(cell_mask, segment, segments)
    # Padding is one more segment, behind all others, so that it never takes a rank of a real one.
    size = jnp.sum(jax.nn.one_hot(label, segments + 1, dtype=jnp.int32), axis=-2)
    begin = jnp.cumsum(size, axis=-1) - size
    return (
        place - jnp.take_along_axis(begin, label, axis=-1),
        jnp.take_along_axis(size, label, axis=-1),
    )


def floor_of_fraction(count: Int[Array, "*shape"], fraction: float) -> Int32[Array, "*shape"]:
    """Return ``floor(fraction * count)``, robust to float32 results just below an integer."""
    return jnp.floor(count * (fraction * (1.0 + 2.5e-7))).astype(jnp.int32)


def drop_cells(key: Key[Array, ""], batch: CellBatch, config: MaskingConfig) -> CellBatch:
    """Drop a random fraction of every sample's cells, and shorten the ``cells`` axis accordingly.

    Args:
        key: PRNG key.
        batch: Padded rows [samples, cells].
        config: ``drop_cells`` and ``maximum_cells``.

    Returns:
        A batch whose rows have ``floor((1 - drop_cells) n)`` of their ``n`` cells (at least one, up to
        ``maximum_cells``) in their original order; in packed rows this applies per sample (none of a very small
        one), and in rows of several pieces per sample and piece. Counts are not moved; ``slot`` is
        the new position of each cell.
    """
    cells = batch.cell_mask.shape[1] // batch.pieces
    # Shapes are per piece, so the limit of the row is shared equally by its pieces.
    limit = -(-config.maximum_cells // batch.pieces) if config.maximum_cells else cells
    # In float32 (1 - .3) * 10 is 7.0000005 or 6.9999995 depending on the path; the small term gives 7.
    keep_fraction = 1.0 - config.drop_cells
    width = max(1, min(limit, int(cells * keep_fraction + 1e-6)))
    if config.drop_cells == 0.0 and limit >= cells:
        return batch
    cell_mask = batch.fold(batch.cell_mask)
    segment = None if batch.segment is None else batch.fold(batch.segment)
    noise = jnp.where(
        cell_mask,
        batch.fold(jax.random.uniform(key, batch.cell_mask.shape)),
        jnp.inf,
    )
    rank, present = _rank_in_sample(noise, cell_mask, segment, batch.segments)
    kept = floor_of_fraction(present, keep_fraction)
    if segment is None:
        # A sample alone in its row keeps at least one cell: attention and pooling over none are undefined.
        kept = jnp.clip(kept, jnp.minimum(1, present), width)
    keep = cell_mask & (rank < kept)
    if segment is not None:
        # If more samples are kept than fit, the cells to drop are drawn among all of them.
        keep &= _rank(jnp.where(keep, noise, jnp.inf)) < width
    return keep_cells(batch, batch.unfold(keep), width)[0]


def keep_cells(
    batch: CellBatch,
    keep: Bool[Array, "samples cells"],
    width: int,
) -> tuple[CellBatch, Callable]:
    """Remove cells from a batch and shorten its ``cells`` axis; the others move to the front of their piece, in order.

    Args:
        batch: The cells.
        keep: The cells that stay; False for padding.
        width: Cells per piece in the result; further cells are dropped.

    Returns:
        The batch, with unmoved counts and the new position of each cell in ``slot``; and a function that maps
        arrays [samples, cells, ...] to [samples, pieces * width, ...] (undefined on padding).
    """
    cells = batch.cell_mask.shape[1] // batch.pieces
    folded = batch.fold(keep)
    # Keep the order, so that the stored counts of kept cells stay contiguous.
    place = jnp.where(folded, jnp.cumsum(folded, axis=-1) - 1, cells)
    slot = jnp.minimum(place, width)
    if batch.slot is not None:
        # Cells were dropped before: compose with the previous positions.
        # One more entry, for cells that were dropped the first time: they stay at the position past the end.
        gone = jnp.full((*slot.shape[:-1], 1), width, slot.dtype)
        now = jnp.minimum(batch.slot, cells)
        moved = jnp.take_along_axis(
            jnp.concatenate([slot, gone], axis=-1),
            now,
            axis=-1,
        )
    else:
        moved = slot
    # Kept cells have the smallest places, in their order; the rest fills up to the constant width.
    source = jnp.argsort(place, axis=-1)[..., :width]
    number = jnp.minimum(folded.sum(axis=-1, keepdims=True), width)

    def gather(values):
        if values is None:
            return None
        # Batched over pieces, so that each device moves only its own cells.
        picked = batch.over_pieces(lambda table, index: table[index])(batch.fold(values), source)
        return batch.unfold(picked)

    kept = batch.replace(
        cell_mask=batch.unfold(jnp.arange(width) < number),
        segment=gather(batch.segment),
        coordinates=gather(batch.coordinates),
        has_coordinates=gather(batch.has_coordinates),
        eigenvectors=gather(batch.eigenvectors),
        batch=gather(batch.batch),
        dataset=gather(batch.dataset),
        platform=gather(batch.platform),
        slot=moved,
    )
    return kept, gather


def follow_cells(
    values: Shaped[Array, "samples source_cells *rest"],
    batch: CellBatch,
    *,
    fill: float | bool = 0,
) -> Shaped[Array, "samples cells *rest"]:
    """Reorder values per cell to the positions after :func:`drop_cells`.

    Args:
        values: In the order of the cells before any were dropped.
        batch: The batch from :func:`drop_cells`, with one piece.
        fill: Value of padding.

    Returns:
        In the order of ``batch``.
    """
    if batch.slot is None:
        return values
    cells = batch.cell_mask.shape[1]

    def move(slot, value):
        empty = jnp.full((cells, *value.shape[1:]), fill, value.dtype)
        return empty.at[slot].set(value, mode="drop")

    return jax.vmap(move)(batch.slot, values)


# Cached as numpy, so that no array of one trace leaks into another.
@lru_cache
def _beta_quantiles(a: float, b: float) -> np.ndarray:
    """Return float32 [4097]: quantiles of Beta(a, b) at equal steps of probability."""
    return betaincinv(a, b, np.linspace(0.0, 1.0, 4097)).astype(np.float32)


def masking_rates(
    key: Key[Array, ""],
    shape: Shape,
    config: MaskingConfig,
) -> Float32[Array, "*shape"]:
    """Draw each cell's masking rate.

    Args:
        key: PRNG key.
        shape: Usually [samples, cells].
        config: With ``beta``, rates come from Beta(a, 4/r + 2 - a), capped at ``maximum_rate``
            (``CellPLM/utils/mask.py:73``; for r = .25 that is Beta(5, 13), mean .28); otherwise all equal r.
    """
    rate = config.gene_fraction
    if not config.beta or rate == 0.0:
        return jnp.full(shape, rate, jnp.float32)
    a = config.beta_concentration
    # By inversion: a rejection sampler would loop until the last cell on all devices is done.
    # The mode is (a - 1) / 4 times the configured rate: the rate itself with a concentration of 5.
    table = jnp.asarray(_beta_quantiles(a, 4 / rate + 2 - a))
    place = jax.random.uniform(key, shape) * (len(table) - 1)
    # Keeps the upper neighbour inside the table, even if a draw rounds to 1.
    below = jnp.minimum(place.astype(jnp.int32), len(table) - 2)
    drawn = table[below] + (place - below) * (table[below + 1] - table[below])
    return jnp.minimum(drawn, config.maximum_rate)


def masked_width(batch: CellBatch, config: MaskingConfig) -> int:
    """Return the maximum number of cells per piece that :func:`sample_gene_mask` masks."""
    cells = batch.cell_mask.shape[1] // batch.pieces
    # The same rounding as floor_of_fraction, or a mask could select one more cell than this.
    return max(1, min(cells, int(cells * config.cell_fraction * (1.0 + 2.5e-7))))


def sample_gene_mask(
    key: Key[Array, ""],
    batch: CellBatch,
    genes: int,
    config: MaskingConfig,
    *,
    chunk: int = 0,
) -> Bool[Array, "samples cells {genes}"]:
    """Draw the mask of hidden entries: first the cells, then the genes of each of them.

    Args:
        key: PRNG key.
        batch: The cells; packed rows are masked sample by sample, rows of several pieces piece by piece.
        genes: Size of the vocabulary.
        config: ``floor(cell_fraction n)`` of each sample's ``n`` cells are masked, each at its own rate.
        chunk: Cells of each piece whose random bits exist at a time; 0: all. The mask is the same.

    Returns:
        True is hidden. Padding is never masked.
    """
    cell_key, rate_key, gene_key = jax.random.split(key, 3)
    cell_mask = batch.cell_mask
    folded = batch.fold(cell_mask)
    noise = batch.fold(jax.random.uniform(cell_key, cell_mask.shape))
    noise = jnp.where(folded, noise, jnp.inf)
    segment = None if batch.segment is None else batch.fold(batch.segment)
    rank, present = _rank_in_sample(noise, folded, segment, batch.segments)
    chosen = floor_of_fraction(present, config.cell_fraction)
    masked_cells = batch.unfold((rank < chosen) & folded)
    rates = jnp.where(masked_cells, masking_rates(rate_key, cell_mask.shape, config), 0.0)
    # One random word decides on two entries, so rates are rounded to a multiple of 2^-16. Every cell has its own key,
    # so that cells can be drawn in chunks of any size. The barrier prevents the compiler from redrawing the bits in
    # every use of the mask.
    threshold = jnp.round(rates * 65536).astype(jnp.uint32)
    keys = jax.random.split(gene_key, cell_mask.shape)

    def drawn(keys, threshold):
        words = jax.vmap(lambda key: jax.random.bits(key, (-(-genes // 2),), jnp.uint32))
        # Low halves decide on the first half of the genes, high halves on the second; interleaving would cost a
        # transposition.
        words = words(keys.ravel()).reshape(*keys.shape, -1)
        limit = threshold[..., None]
        return jnp.concatenate([words & 0xFFFF < limit, words >> 16 < limit], axis=-1)[..., :genes]

    if chunk:
        keys = batch.fold(keys)
        threshold = batch.fold(threshold)
        axis = keys.ndim - 1
        cells = keys.shape[-1]
        # A loop, so that the random words of one chunk only are in memory: they take twice the space of the mask.
        size = min(chunk, cells)

        def draw(index, mask):
            # Each cell has its own key, so drawing the overlap of the last chunk twice gives the same bits.
            start = jnp.minimum(index * size, cells - size)
            part = (jax.lax.dynamic_slice_in_dim(x, start, size, axis) for x in (keys, threshold))
            return jax.lax.dynamic_update_slice_in_dim(mask, drawn(*part), start, axis)

        mask = jnp.zeros((*keys.shape, genes), bool)
        mask = batch.unfold(jax.lax.fori_loop(0, -(-cells // size), draw, mask))
    else:
        mask = drawn(keys, threshold)
    return jax.lax.optimization_barrier(constrain(mask, ENTRIES))


def sample_visible(
    key: Key[Array, ""],
    batch: CellBatch,
    gene_mask: Bool[Array, "samples cells {genes}"] | None,
    config: MaskingConfig,
    genes: int,
) -> Bool[Array, "samples *pieces nonzeros"]:
    """Draw which stored counts the input keeps: those outside ``gene_mask`` and inside each sample's panel.

    Args:
        key: PRNG key.
        batch: Cells.
        gene_mask: True is hidden. None: nothing.
        config: ``panel_fraction`` of the samples get a panel of a log-uniform share of the genes.
        genes: Size of the vocabulary.
    """
    visible = jnp.ones(batch.gene.shape, bool)
    if gene_mask is not None:
        visible = ~batch.at_nonzeros(gene_mask).astype(bool)
    if config.panel_fraction == 0:
        return visible
    reduced_key, share_key, gene_key = jax.random.split(key, 3)
    shape = (batch.cell_mask.shape[0], batch.segments)
    reduced = jax.random.bernoulli(reduced_key, config.panel_fraction, shape)
    low = jnp.log(config.panel_minimum)
    # Uniform on a logarithmic scale, so that small panels are as frequent as large ones.
    share = jnp.exp(jax.random.uniform(share_key, shape, minval=low, maxval=0.0))
    share = jnp.where(reduced, share, 1.0)
    # One draw per sample and gene, not per cell: all cells of a sample have the same panel.
    rank = jax.random.uniform(gene_key, (*shape, genes))
    panel = rank < share[..., None]  # [samples, segments, genes]
    cell = batch.cell_of_nonzero()
    segment = jnp.zeros_like(cell)
    if batch.segment is not None:
        lookup = batch.over_pieces(lambda table, at: table.at[at].get(mode="fill", fill_value=0))
        segment = lookup(batch.fold(batch.segment), cell)
    gene = batch.gene.astype(jnp.int32)
    inside = jax.vmap(lambda table, segment, gene: table[segment, gene])(panel, segment, gene)
    return visible & inside
