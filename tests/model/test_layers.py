"""Dropout and GELU: what they compute, and how little they keep for the backward pass."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.layers import Dropout, exact_gelu


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


def plain_gelu(x):
    return nn.gelu(x, approximate=False)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)], ids=["float32", "bfloat16"]
)
def test_gelu_and_its_gradient_are_those_of_its_definition(kind, tolerance):
    x, gradient = 3 * jax.random.normal(jax.random.key(0), (2, 2, 30, 64))
    x, gradient = x.astype(kind), gradient.astype(kind)
    wanted, wanted_back = jax.vjp(plain_gelu, x.astype("float32"))
    found, found_back = jax.vjp(jax.jit(exact_gelu), x)
    np.testing.assert_allclose(found.astype("float32"), wanted, atol=tolerance, rtol=tolerance)
    (of_found,), (of_wanted,) = found_back(gradient), wanted_back(gradient.astype("float32"))
    assert of_found.dtype == x.dtype
    scale = float(jnp.abs(of_wanted).max())
    np.testing.assert_allclose(of_found.astype("float32"), of_wanted, atol=tolerance * scale)


def test_gelu_keeps_its_input_for_the_backward_pass():
    """Of a stack of blocks as the encoder's, beside what the products need."""
    x, kernel = jnp.ones((512, 1024)), jnp.full((1024, 1024), 1e-3)

    def size(gelu):
        def loss(kernel):
            hidden = x
            for _ in range(6):
                hidden = gelu(hidden @ kernel)
            return hidden.sum()

        compiled = jax.jit(jax.grad(loss)).lower(kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(exact_gelu) < size(plain_gelu) - 6 * x.nbytes
