"""Masks of dropout against their plain forms; ``tests/model/test_layers.py`` has the layer."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cellplm_jax.kernels.dropout import (
    dropped,
    dropped_reference,
    kept_bits,
    kept_bits_reference,
)


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_the_loop_draws_the_bits_of_the_reference(rate):
    key = jax.random.key(4)
    found = jax.jit(kept_bits, static_argnums=(1, 2))(key, (3, 7), rate)
    np.testing.assert_array_equal(found, kept_bits_reference(key, (3, 7), rate))


@pytest.mark.parametrize("width", [1, 8, 13])
def test_values_and_gradients_are_those_of_the_reference(width):
    x, gradient = jax.random.normal(jax.random.key(0), (2, 3, 5, width))
    bits = kept_bits(jax.random.key(1), (3, 5, -(-width // 8)), 0.4)
    found, wanted = (
        (value, pullback(gradient)[0])
        for value, pullback in (
            jax.vjp(lambda x, of=of: of(x, bits, 0.4), x) for of in (dropped, dropped_reference)
        )
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
