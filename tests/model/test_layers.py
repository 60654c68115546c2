"""Dropout: what it computes, and how little it keeps for the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.layers import Dropout


def dropped(x, rate, key=0):
    rngs = {"dropout": jax.random.key(key)}
    return Dropout(rate).apply({}, x, deterministic=False, rngs=rngs)


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5])
def test_dropout_sets_its_share_to_zero_and_divides_the_rest(rate):
    ones = jnp.ones((4, 250, 1000))
    kept = np.asarray(dropped(ones, rate))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / (1 - np.float32(rate)))}
    # A million independent entries: five standard deviations, over all and by bit of the word an entry is decided by.
    share = (kept == 0).reshape(4, 250, 8, 125)
    assert share.mean() == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / 1e6))
    np.testing.assert_allclose(
        share.mean(axis=(0, 1, 3)), rate, atol=5 * np.sqrt(rate * (1 - rate) / 1.25e5)
    )


def test_entries_are_dropped_independently():
    kept = np.asarray(dropped(jnp.ones((2000, 64)), 0.5) > 0, np.float64)
    correlation = np.corrcoef(kept.T) - np.eye(64)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(2000)


@pytest.mark.parametrize("width", [1, 7, 8, 13])
def test_any_width_is_dropped_and_the_gradient_is_that_of_what_was_kept(width):
    x = jax.random.normal(jax.random.key(1), (3, 5, width))
    value, pullback = jax.vjp(lambda x: dropped(x, 0.4), x)
    assert value.shape == x.shape
    (gradient,) = pullback(jnp.ones_like(x))
    np.testing.assert_allclose(np.asarray(gradient * x), np.asarray(value), rtol=1e-6)
    assert (np.asarray(value) == 0).any() or width == 1


def test_another_key_drops_others_and_the_same_key_the_same():
    x = jnp.ones((10, 100))
    first, again, other = (np.asarray(dropped(x, 0.3, key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_backward_pass_keeps_a_bit_an_entry():
    """What lies between forward and backward is the input of the product and the mask, not the random words."""
    x = jnp.ones((512, 1024))

    def loss(x):
        for key in range(6):
            x = dropped(x, 0.2, key)
        return x.sum()

    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    masks = 6 * x.size // 8
    assert compiled.memory_analysis().temp_size_in_bytes < masks + 3 * x.nbytes
