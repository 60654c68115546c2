"""Dropout masks drawn and kept in few bits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key, UInt8

from cellplm_jax.batch import Array, Shape
from cellplm_jax.kernels.remat import barrier


def dropped_reference(
    x: Float[Array, "*batch width"],
    bits: UInt8[Array, "*batch bytes"],
    rate: float,
) -> Float[Array, "*batch width"]:
    """Return :func:`dropped`, differentiated as it stands."""
    # Side by side: entries that look their bits up one by one take a CPU six times as long (jax 0.10.2).
    keep = jnp.concatenate([(bits >> i) & 1 == 1 for i in range(8)], axis=-1)[..., : x.shape[-1]]
    return jnp.where(
        keep,
        x / (1.0 - rate),
        jnp.zeros((), x.dtype),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropped(
    x: Float[Array, "*batch width"],
    bits: UInt8[Array, "*batch bytes"],
    rate: float,
) -> Float[Array, "*batch width"]:
    """Set entries to 0 and divide the others by ``1 - rate``; the backward pass keeps the bits alone.

    Why: what a compiler makes of the bits takes eight times as much between the passes (CPU, jax 0.10.2).

    Args:
        x: The entries.
        bits: ceil(width / 8) bytes from :func:`kept_bits`. Bit i of byte j is about entry i * bytes + j.
        rate: The share of bits that are 0.
    """
    return dropped_reference(x, bits, rate)


def _dropped_backward(rate, bits, gradient):
    bits, gradient = barrier(bits, gradient)
    return dropped(gradient, bits, rate), None


dropped.defvjp(
    lambda x, bits, rate: (dropped(x, bits, rate), bits),
    _dropped_backward,
)


def kept_bits_reference(key: Key[Array, ""], shape: Shape, rate: float) -> UInt8[Array, "*shape"]:
    """Return :func:`kept_bits` by four draws one after another."""
    bits = jnp.zeros(shape, jnp.uint8)
    for index in range(4):
        bits = _draw(key, rate, index, bits)
    return bits


def kept_bits(key: Key[Array, ""], shape: Shape, rate: float) -> UInt8[Array, "*shape"]:
    """Draw bits that are 0 with a given probability.

    Why: on a CPU a loop, which no compiler looks into; fused with the backward pass, the words themselves would be kept
    (jax 0.10.2).

    Args:
        key: PRNG key.
        shape: The shape of the result.
        rate: The probability, rounded to a multiple of 2^-16.

    Returns:
        Eight independent bits each.
    """
    draw = partial(_draw, key, rate)

    def loop(bits):
        return jax.lax.fori_loop(0, 4, draw, bits)

    def unrolled(bits):
        for index in range(4):
            bits = draw(index, bits)
        return bits

    return jax.lax.platform_dependent(jnp.zeros(shape, jnp.uint8), cpu=loop, default=unrolled)


def _draw(key, rate, index, bits):
    """Add to each byte the bits ``index`` and ``index + 4``, from the halves of one random word."""
    # 16 random bits per entry, so a word serves two entries and the rate is a multiple of 2^-16.
    threshold = round(rate * 65536)
    words = jax.random.bits(jax.random.fold_in(key, index), bits.shape, jnp.uint32)
    low = (words & 0xFFFF) >= threshold
    high = (words >> 16) >= threshold
    place = jnp.asarray(index, jnp.uint8)
    return bits | (low.astype(jnp.uint8) << place) | (high.astype(jnp.uint8) << (place + 4))
