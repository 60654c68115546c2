"""Bi-level masking as pure functions of a PRNG key (paper section 4.3, ``CellPLM/utils/mask.py``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cellplm_jax.config import MaskingConfig
from cellplm_jax.structs import CellBatch


def _random_rank(key: jax.Array, cell_mask: jax.Array) -> jax.Array:
    """Return int32 [samples, cells]: a random permutation of each sample's cells, padding ranked last."""
    noise = jnp.where(cell_mask, jax.random.uniform(key, cell_mask.shape), jnp.inf)
    return jnp.argsort(jnp.argsort(noise, axis=1), axis=1).astype(jnp.int32)


def floor_of_fraction(count: jax.Array, fraction: float) -> jax.Array:
    """Return ``floor(fraction * count)`` as int32, without losing one where float32 lands just under a whole number."""
    return jnp.floor(count * (fraction * (1.0 + 2.5e-7))).astype(jnp.int32)


def drop_cells(key: jax.Array, batch: CellBatch, config: MaskingConfig) -> CellBatch:
    """Drop a random fraction of every sample's cells, and shorten the ``cells`` axis accordingly.

    Args:
        key: PRNG key.
        batch: Padded sentences of at most ``cells`` cells.
        config: ``drop_cells`` and ``maximum_cells``.

    Returns:
        A batch whose sentences hold ``floor((1 - drop_cells) n)`` of their ``n`` cells (at least one, at most
        ``maximum_cells``) in random order. Counts stay where they are; ``slot`` says where each cell went.
    """
    cells = batch.cell_mask.shape[1]
    limit = config.maximum_cells or cells
    # In float32 (1 - .3) * 10 is 7.0000005 or 6.9999995 depending on the path; the small term makes it 7.
    keep_fraction = 1.0 - config.drop_cells
    width = max(1, min(limit, int(cells * keep_fraction + 1e-6)))
    if config.drop_cells == 0.0 and limit >= cells:
        return batch
    rank = _random_rank(key, batch.cell_mask)
    present = batch.cell_mask.sum(axis=1)
    kept = floor_of_fraction(present, keep_fraction)
    kept = jnp.clip(kept, jnp.minimum(1, present), width)
    slot = jnp.where(rank < kept[:, None], rank, width)
    if batch.slot is not None:
        # Cells were dropped before: follow each from where it sits now.
        gone = jnp.full((slot.shape[0], 1), width, slot.dtype)
        now = jnp.minimum(batch.slot, cells)
        moved = jnp.take_along_axis(jnp.concatenate([slot, gone], axis=1), now, axis=1)
    else:
        moved = slot
    source = jnp.argsort(rank, axis=1)[:, :width]

    def gather(values):
        if values is None:
            return None
        index = source.reshape(*source.shape, *(1,) * (values.ndim - 2))
        return jnp.take_along_axis(values, index, axis=1)

    return batch.replace(
        cell_mask=jnp.arange(width)[None, :] < kept[:, None],
        coordinates=gather(batch.coordinates),
        has_coordinates=gather(batch.has_coordinates),
        eigenvectors=gather(batch.eigenvectors),
        batch=gather(batch.batch),
        dataset=gather(batch.dataset),
        platform=gather(batch.platform),
        slot=moved,
    )


def masking_rates(key: jax.Array, shape: tuple[int, ...], config: MaskingConfig) -> jax.Array:
    """Draw each cell's masking rate.

    Args:
        key: PRNG key.
        shape: Usually (samples, cells).
        config: With ``beta``, rates come from Beta(a, 4/r + 2 - a), capped at ``maximum_rate``
            (``CellPLM/utils/mask.py:73``; for r = .25 that is Beta(5, 13), mean .28); otherwise all equal r.

    Returns:
        float32 of ``shape``.
    """
    rate = config.gene_fraction
    if not config.beta or rate == 0.0:
        return jnp.full(shape, rate, jnp.float32)
    a = config.beta_concentration
    drawn = jax.random.beta(key, a, 4 / rate + 2 - a, shape, jnp.float32)
    return jnp.minimum(drawn, config.maximum_rate)


def sample_gene_mask(
    key: jax.Array, cell_mask: jax.Array, genes: int, config: MaskingConfig
) -> jax.Array:
    """Choose which entries are hidden: first which cells, then which genes in each of them.

    Args:
        key: PRNG key.
        cell_mask: bool [samples, cells].
        genes: Size of the vocabulary.
        config: ``floor(cell_fraction n)`` of each sample's ``n`` cells are masked, each at its own rate.

    Returns:
        bool [samples, cells, genes]; True is hidden. Padding is never masked.
    """
    cell_key, rate_key, gene_key = jax.random.split(key, 3)
    rank = _random_rank(cell_key, cell_mask)
    chosen = floor_of_fraction(cell_mask.sum(axis=1), config.cell_fraction)
    masked_cells = (rank < chosen[:, None]) & cell_mask
    rates = jnp.where(masked_cells, masking_rates(rate_key, cell_mask.shape, config), 0.0)
    # Half the random bits of a float32 draw; a rate is rounded to a multiple of 2^-16. The barrier keeps the compiler
    # from drawing them again in every place that reads the mask.
    threshold = jnp.round(rates * 65536).astype(jnp.uint32)
    bits = jax.random.bits(gene_key, (*cell_mask.shape, genes), jnp.uint16)
    return jax.lax.optimization_barrier(bits < threshold[..., None])
