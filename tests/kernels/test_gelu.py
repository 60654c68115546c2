"""GELU: what it computes, and how little it keeps for the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.kernels.gelu import exact_gelu, exact_gelu_reference


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)], ids=["float32", "bfloat16"]
)
def test_gelu_and_its_gradient_are_those_of_its_definition(kind, tolerance):
    x, gradient = 3 * jax.random.normal(jax.random.key(0), (2, 2, 30, 64))
    x, gradient = x.astype(kind), gradient.astype(kind)
    wanted, wanted_back = jax.vjp(exact_gelu_reference, x.astype("float32"))
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

    assert size(exact_gelu) < size(exact_gelu_reference) - 6 * x.nbytes
