"""Layouts and products of arrays with an axis of attention heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def by_head(values: jax.Array) -> jax.Array:
    """Swap cells and heads: [..., cells, heads, width] to [..., heads, cells, width], or back.

    Per-head matrix products are fast if the head axis is first; otherwise the compiler's own transposes take
    up to ten times as long (CPU, jax 0.10.2).
    """
    return values.swapaxes(-3, -2)


def join_heads(values: jax.Array) -> jax.Array:
    """Merge heads and width: [..., heads, width] to [..., heads * width]."""
    return values.reshape(*values.shape[:-2], -1)


def one_hot_heads(heads: int, width: int) -> jax.Array:
    """Return float32 [heads * width, heads]: the head of each entry of :func:`join_heads`."""
    return jnp.repeat(jnp.eye(heads), width, axis=0)


def scaled_reference(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return :func:`scaled`, differentiated by JAX."""
    return values * weights[..., None]


@jax.custom_vjp
def scaled(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply the vectors [..., heads, width] of each head by one number [..., heads] each.

    Why: the gradient of the weights is a matrix product; a CPU sums the last of four axes ten times slower
    (jax 0.10.2).
    """
    return scaled_reference(values, weights)


def _scaled_backward(saved, gradient):
    values, weights = saved
    of_weights = join_heads(values * gradient) @ one_hot_heads(*values.shape[-2:])
    return gradient * weights[..., None], of_weights


scaled.defvjp(
    lambda values, weights: (scaled(values, weights), (values, weights)), _scaled_backward
)
