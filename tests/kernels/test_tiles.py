"""Sums over the segments of packed rows, tile by tile, against products with a one-hot matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.kernels import tiles
from cellplm_jax.kernels.tiles import (
    tiled_apply,
    tiled_apply_reference,
    tiled_outer_total,
    tiled_outer_total_reference,
)

SAMPLES, CELLS, SEGMENTS, HEADS, WIDTH, OTHER = 2, 24, 3, 2, 4, 5


def layout(pieces):
    """Return masks and segments that rise within each piece; the last cells of a piece are padding."""
    random = np.random.default_rng(pieces)
    shape = (SAMPLES, pieces, CELLS // pieces)
    segment = np.sort(random.integers(0, SEGMENTS, shape), axis=-1)
    mask = np.arange(shape[-1]) < random.integers(1, shape[-1] + 1, shape[:2])[..., None]
    whole = (SAMPLES, CELLS)
    return jnp.asarray(mask.reshape(whole)), jnp.asarray(segment.reshape(whole), jnp.int32)


def compared(fast, reference, left, right, pieces):
    mask, segment = layout(pieces)
    cell_mask = mask[:, :, None, None]

    def run(of):
        def loss(left, right):
            # What padding holds never counts.
            result = of(left * cell_mask, right, mask, segment, SEGMENTS, pieces)
            return jnp.sin(result).sum(), result

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(left, right)

    ((_, value), slopes), ((_, wanted), wanted_slopes) = run(fast), run(reference)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
    for found, expected in zip(slopes, wanted_slopes, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [4, 5, 128])
@pytest.mark.parametrize("pieces", [1, 2])
def test_tiles_are_the_products_with_a_one_hot_matrix(tile, pieces, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", tile)
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    values = normal(SAMPLES, CELLS, HEADS, WIDTH)
    compared(
        tiled_outer_total,
        tiled_outer_total_reference,
        values,
        normal(SAMPLES, CELLS, HEADS, OTHER),
        pieces,
    )
    memory = normal(SAMPLES, SEGMENTS, HEADS, WIDTH, OTHER)
    compared(tiled_apply, tiled_apply_reference, values, memory, pieces)
