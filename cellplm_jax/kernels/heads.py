"""Layouts and products of arrays with an axis of attention heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from cellplm_jax.batch import Array


def by_head(
    values: Float[Array, "*batch cells heads width"],
) -> Float[Array, "*batch heads cells width"]:
    """Swap cells and heads, or back.

    Per-head matrix products are fast if the head axis is first; otherwise the compiler's own transposes take
    up to ten times as long (CPU, jax 0.10.2).
    """
    return values.swapaxes(-3, -2)


def join_heads(values: Float[Array, "*batch heads width"]) -> Float[Array, "*batch heads*width"]:
    """Merge heads and width."""
    return values.reshape(*values.shape[:-2], -1)


def one_hot_heads(heads: int, width: int) -> Float32[Array, "{heads}*{width} {heads}"]:
    """Return the head of each entry of :func:`join_heads`."""
    return jnp.repeat(jnp.eye(heads), width, axis=0)


def scaled_reference(
    values: Float[Array, "*batch heads width"], weights: Float[Array, "*batch heads"]
) -> Float[Array, "*batch heads width"]:
    """Return :func:`scaled`, differentiated by JAX."""
    return values * weights[..., None]


@jax.custom_vjp
def scaled(
    values: Float[Array, "*batch heads width"], weights: Float[Array, "*batch heads"]
) -> Float[Array, "*batch heads width"]:
    """Multiply the vector of each head by one number.

    Why: the gradient of the weights is a matrix product; a CPU sums the last of four axes ten times slower
    (jax 0.10.2).
    """
    return scaled_reference(values, weights)


def _scaled_backward(saved, gradient):
    values, weights = saved
    of_weights = join_heads(values * gradient) @ one_hot_heads(*values.shape[-2:])
    return gradient * weights[..., None], of_weights


scaled.defvjp(
    lambda values, weights: (scaled(values, weights), (values, weights)),
    _scaled_backward,
)
