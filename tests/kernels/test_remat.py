"""Activations computed again against Flax's own; ``tests/model/test_encoder.py`` has numbers and memory of layers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax.kernels.remat import (
    barrier,
    barrier_reference,
    recomputed,
    recomputed_reference,
)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, hidden, groups, train):
        hidden = nn.tanh(nn.Dense(hidden.shape[-1], name="dense")(hidden)) * groups
        return nn.Dropout(0.5, name="dropout")(hidden, deterministic=not train)


def test_numbers_gradients_and_draws_are_those_of_the_reference():
    hidden = jax.random.normal(jax.random.key(0), (3, 4))
    groups = jnp.arange(3.0)[:, None] + 1
    params = Layer().init(jax.random.key(1), hidden, groups, False)
    rngs = {"dropout": jax.random.key(2)}

    def run(kind):
        def loss(params, hidden):
            return jnp.sin(kind().apply(params, hidden, groups, True, rngs=rngs)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden)

    wanted, found = run(recomputed_reference(Layer)), run(recomputed(Layer))
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_a_barrier_changes_nothing():
    values = {"float": jnp.arange(4.0), "narrow": jnp.arange(3, dtype=jnp.uint8)}
    gradients = [jnp.array([[-1.5, jnp.inf]])]
    found, wanted = (jax.jit(of)(values, gradients) for of in (barrier, barrier_reference))
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(two, one)
