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

EPSILON = 1e-5
# PyTorch draws Linear weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the variance of that is 1 / (3 fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# Logical names of the axes of activations; which devices each is split over stands in ``train/sharding.py``.
CELLS = ("samples", "cells", None)
ENTRIES = ("samples", "cells", "genes")


def along(values: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Say along which logical axes an activation lies; without a mesh this does nothing."""
    return nn.with_logical_constraint(values, axes)


def dense(features: int, name: str) -> nn.Dense:
    """Return a linear layer initialised like ``torch.nn.Linear`` (zero bias)."""
    return nn.Dense(features, kernel_init=kernel_init, name=name)


def output_dense(features: int, name: str) -> nn.Dense:
    """Return a linear layer whose result is float32, however narrow the numbers it multiplies."""
    product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    return nn.Dense(features, kernel_init=kernel_init, dot_general=product, name=name)


def prelu(name: str) -> nn.PReLU:
    """Return a PReLU with one learnt slope that starts at .25."""
    return nn.PReLU(negative_slope_init=0.25, name=name)


def exact_gelu(x: jax.Array) -> jax.Array:
    """Return GELU with the error function, not its tanh approximation."""
    return nn.gelu(x, approximate=False)


def layer_norm(name: str) -> nn.LayerNorm:
    """Return LayerNorm over the last axis with PyTorch's epsilon and the two-pass variance."""
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name=name)


def make_norm(kind: str, groups: int, name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the normalisation named in a configuration; every kind works on one cell at a time.

    Args:
        kind: ``"groupnorm"``, ``"layernorm"``, ``"rmsnorm"`` or ``"none"``.
        groups: Channel groups of ``"groupnorm"``.
        name: Parameter name of the submodule.
    """
    if kind == "groupnorm":
        return nn.GroupNorm(
            num_groups=groups,
            epsilon=EPSILON,
            reduction_axes=(-1,),
            use_fast_variance=False,
            name=name,
        )
    if kind == "layernorm":
        return layer_norm(name)
    if kind == "rmsnorm":
        return nn.RMSNorm(epsilon=1e-6, name=name)
    return lambda x: x


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
        x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        return make_norm(self.norm, self.groups, "norm")(x)
