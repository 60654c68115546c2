"""Small layers shared by embedder, encoder and decoder, with the constants of the released PyTorch code.

Flax and PyTorch disagree on defaults: epsilon of LayerNorm and GroupNorm (1e-6 against 1e-5), the slope a PReLU starts
from (.01 against .25), the axes GroupNorm pools (all but the first against the channels of one cell), and GELU (tanh
approximation against exact). The functions here pin the PyTorch side once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax.model.recompute import apart
from cellplm_jax.products import linear_product, spread, without_leading_one

EPSILON = 1e-5
RMS_EPSILON = 1e-6
# PyTorch draws Linear weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the variance of that is 1 / (3 fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# Logical names of the axes of activations; which devices each is split over stands in ``train/sharding.py``.
CELLS = ("samples", "cells", None)
ENTRIES = ("samples", "cells", "genes")


def along(values: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Say along which logical axes an activation [...] lies; without a mesh this does nothing."""
    return nn.with_logical_constraint(values, axes)


class Dense(nn.Module):
    """Linear layer with the parameters of ``flax.linen.Dense`` and products and sums that are fast on every backend.

    Attributes:
        features: Output width.
        widen: Return float32, however narrow the numbers that are multiplied; the bias is added after the product.
        bias_init: Initialiser of the bias.
    """

    features: int
    widen: bool = False
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., width] to [..., features]."""
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel = nn.dtypes.promote_dtype(x, kernel)
        x = linear_product(x, kernel, widen=self.widen)
        return x + spread(bias.astype(x.dtype), x.shape)


def dense(features: int, name: str) -> Dense:
    """Return a linear layer initialised like ``torch.nn.Linear`` (zero bias)."""
    return Dense(features, name=name)


def output_dense(features: int, name: str) -> Dense:
    """Return a linear layer whose result is float32, however narrow the numbers it multiplies."""
    return Dense(features, widen=True, name=name)


def prelu(name: str) -> nn.PReLU:
    """Return a PReLU with one learnt slope that starts at .25."""
    return nn.PReLU(negative_slope_init=0.25, name=name)


@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """Return GELU of x [...] with the error function, not its tanh approximation.

    The backward pass starts from x again, where differentiating the terms keeps three more arrays.
    """
    return nn.gelu(x, approximate=False)


def _gelu_backward(x, gradient):
    def of(x, gradient):
        x = x.astype(jnp.float32)
        density = jnp.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
        slope = 0.5 * jax.lax.erfc(-x * np.sqrt(0.5)) + x * density
        return (slope * gradient).astype(gradient.dtype)

    def loop(x, gradient):
        def turn(state):
            return jnp.zeros((), bool), of(x, state[1])

        return jax.lax.while_loop(lambda state: state[0], turn, (jnp.ones((), bool), gradient))[1]

    # On a CPU a loop of one turn, which no compiler looks into: it would keep the terms of the forward pass.
    return (jax.lax.platform_dependent(x, gradient, cpu=loop, default=of),)


exact_gelu.defvjp(lambda x: (exact_gelu(x), x), _gelu_backward)


class Norm(nn.Module):
    """A normalisation of each cell's vector, with a scale and all but ``"rmsnorm"`` with a bias a channel.

    Attributes:
        kind: ``"groupnorm"``, ``"layernorm"`` or ``"rmsnorm"``.
        groups: Channel groups of ``"groupnorm"``.
    """

    kind: str
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., width] to the same shape, in the parameters' type: a wider residual stream stays as it is."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = None
        if self.kind != "rmsnorm":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        # Statistics, scale and bias in float32; rounded once.
        x = without_leading_one(self._standardised, x.astype(jnp.float32))
        x = x * spread(scale.astype(jnp.float32), x.shape)
        if bias is not None:
            x = x + spread(bias.astype(jnp.float32), x.shape)
        return x.astype(scale.dtype)

    def _standardised(self, x: jax.Array) -> jax.Array:
        if self.kind == "rmsnorm":
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + RMS_EPSILON)
        grouped = x
        if self.kind == "groupnorm":
            grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        # The two-pass variance: the fast one cancels where a cell's mean is large against its spread.
        centred = grouped - grouped.mean(axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)


def layer_norm(name: str) -> Norm:
    """Return LayerNorm over the last axis with PyTorch's epsilon and the two-pass variance."""
    return Norm("layernorm", name=name)


def make_norm(kind: str, groups: int, name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the normalisation named in a configuration, of [..., hidden]; every kind works on one cell at a time.

    Args:
        kind: ``"groupnorm"``, ``"layernorm"``, ``"rmsnorm"`` or ``"none"``.
        groups: Channel groups of ``"groupnorm"``.
        name: Parameter name of the submodule.
    """
    return (lambda x: x) if kind == "none" else Norm(kind, groups, name=name)


class Dropout(nn.Module):
    """Dropout as ``flax.linen.Dropout``, with a mask that is drawn and kept in few bits.

    The rate is a multiple of 2^-16, since one random word decides on two entries, and what the backward pass needs of
    the mask is one bit an entry.

    Attributes:
        rate: Share of the entries that are set to 0; the others are divided by ``1 - rate``.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Map [...] to the same shape, drawing from the ``"dropout"`` stream unless ``deterministic``."""
        if deterministic or self.rate == 0.0:
            return x
        bits = kept_bits(self.make_rng("dropout"), (*x.shape[:-1], -(-x.shape[-1] // 8)), self.rate)
        return dropped(x, bits, self.rate)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropped(x: jax.Array, bits: jax.Array, rate: float) -> jax.Array:
    """Set entries to 0 and divide the others by ``1 - rate``; the backward pass keeps the bits alone.

    Args:
        x: float [..., width].
        bits: uint8 [..., ceil(width / 8)], from :func:`kept_bits`. Bit i of byte j is about entry i * bytes + j.
        rate: The share of bits that are 0.
    """
    # Side by side: entries that look their bits up one by one take a CPU six times as long (jax 0.10.2).
    keep = jnp.concatenate([(bits >> i) & 1 == 1 for i in range(8)], axis=-1)[..., : x.shape[-1]]
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _dropped_backward(rate, bits, gradient):
    # Apart, or the compiler keeps what it made of the bits: eight times as much.
    bits, gradient = apart(bits, gradient)
    return dropped(gradient, bits, rate), None


dropped.defvjp(lambda x, bits, rate: (dropped(x, bits, rate), bits), _dropped_backward)


def kept_bits(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Draw bits that are 0 with a given probability.

    Args:
        key: PRNG key.
        shape: The shape of the result.
        rate: The probability, rounded to a multiple of 2^-16.

    Returns:
        uint8 [...] of that shape, eight independent bits each.
    """
    threshold = round(rate * 65536)

    def draw(index, bits):
        words = jax.random.bits(jax.random.fold_in(key, index), shape, jnp.uint32)
        low, high = (words & 0xFFFF) >= threshold, (words >> 16) >= threshold
        place = jnp.asarray(index, jnp.uint8)
        return bits | (low.astype(jnp.uint8) << place) | (high.astype(jnp.uint8) << (place + 4))

    def loop(bits):
        return jax.lax.fori_loop(0, 4, draw, bits)

    def unrolled(bits):
        for index in range(4):
            bits = draw(index, bits)
        return bits

    # On a CPU a loop, which no compiler looks into: fused with the backward pass, the words themselves would be kept.
    return jax.lax.platform_dependent(jnp.zeros(shape, jnp.uint8), cpu=loop, default=unrolled)


class Hidden(nn.Module):
    """Linear - PReLU - Dropout - Norm, the block of the MLP encoders and of every decoder.

    Attributes:
        features: Output width.
        norm: Normalisation kind.
        groups: Groups of GroupNorm.
        dropout: Dropout rate.
    """

    features: int
    norm: str
    groups: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map [..., width] to [..., features]."""
        x = prelu("prelu")(dense(self.features, "linear")(x))
        x = Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        return make_norm(self.norm, self.groups, "norm")(x)
