"""Small layers shared by embedder, encoder and decoder, with the constants of the released PyTorch code.

Flax and PyTorch disagree on defaults: epsilon of LayerNorm and GroupNorm (1e-6 against 1e-5), the slope a PReLU starts
from (.01 against .25), the axes GroupNorm pools (all but the first against the channels of one cell), and GELU (tanh
approximation against exact). The functions here pin the PyTorch side once.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Shaped

from cellplm_jax.batch import Array
from cellplm_jax.kernels.dropout import dropped, kept_bits
from cellplm_jax.kernels.matmul import broadcast, linear_product, squeeze_single_row

EPSILON = 1e-5
RMS_EPSILON = 1e-6
# PyTorch draws Linear weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the variance of that is 1 / (3 fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# Logical names of the axes of activations; which devices each is split over stands in ``train/sharding.py``.
CELLS = ("samples", "cells", None)
ENTRIES = ("samples", "cells", "genes")


def constrain(
    values: Shaped[Array, "*shape"], axes: tuple[str | None, ...]
) -> Shaped[Array, "*shape"]:
    """Name the logical axes of an activation, for its sharding; without a mesh this does nothing."""
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
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch features"]:
        """Apply the layer to the last axis."""
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel = nn.dtypes.promote_dtype(x, kernel)
        x = linear_product(x, kernel, widen=self.widen)
        return x + broadcast(bias.astype(x.dtype), x.shape)


def dense(features: int, name: str) -> Dense:
    """Return a linear layer initialised like ``torch.nn.Linear`` (zero bias)."""
    return Dense(features, name=name)


def output_dense(features: int, name: str) -> Dense:
    """Return a linear layer whose result is float32, however narrow the numbers it multiplies."""
    return Dense(features, widen=True, name=name)


def prelu(name: str) -> nn.PReLU:
    """Return a PReLU with one learnt slope that starts at .25."""
    return nn.PReLU(negative_slope_init=0.25, name=name)


class Norm(nn.Module):
    """A normalisation of each cell's vector, with a scale and all but ``"rmsnorm"`` with a bias a channel.

    Attributes:
        kind: ``"groupnorm"``, ``"layernorm"`` or ``"rmsnorm"``.
        groups: Channel groups of ``"groupnorm"``.
    """

    kind: str
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalise, in the parameters' type: a wider residual stream stays as it is."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = None
        if self.kind != "rmsnorm":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        # Statistics, scale and bias in float32; rounded once.
        x = squeeze_single_row(self._standardised, x.astype(jnp.float32))
        x = x * broadcast(scale.astype(jnp.float32), x.shape)
        if bias is not None:
            x = x + broadcast(bias.astype(jnp.float32), x.shape)
        return x.astype(scale.dtype)

    def _standardised(self, x: Float32[Array, "*batch width"]) -> Float32[Array, "*batch width"]:
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


def make_norm(kind: str, groups: int, name: str) -> Callable[[Array], Array]:
    """Return the normalisation named in a configuration; every kind works on one cell at a time.

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
    def __call__(
        self,
        x: Float[Array, "*batch width"],
        *,
        deterministic: bool,
    ) -> Float[Array, "*batch width"]:
        """Drop entries, drawn from the ``"dropout"`` stream unless ``deterministic``."""
        if deterministic or self.rate == 0.0:
            return x
        bits = kept_bits(
            self.make_rng("dropout"),
            (*x.shape[:-1], -(-x.shape[-1] // 8)),
            self.rate,
        )
        return dropped(x, bits, self.rate)


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
    def __call__(
        self,
        x: Float[Array, "*batch width"],
        *,
        train: bool,
    ) -> Float[Array, "*batch features"]:
        """Apply the block to the last axis."""
        x = prelu("prelu")(dense(self.features, "linear")(x))
        x = Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        return make_norm(self.norm, self.groups, "norm")(x)
