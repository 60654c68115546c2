"""Encoders over the cells of a sample (``CellPLM/encoder``)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Real

from cellplm_jax.batch import Array
from cellplm_jax.config import ModelConfig
from cellplm_jax.kernels.gelu import exact_gelu
from cellplm_jax.kernels.remat import recomputed
from cellplm_jax.model.attention import CellAttention, CellGroups
from cellplm_jax.model.layers import CELLS, Dropout, Hidden, constrain, dense, layer_norm


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: ``x + attention(norm(x))``, then ``x + feedforward(norm(x))``.

    Attributes:
        config: The model's configuration.
        layer: Index of the layer.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "samples cells hidden"],
        groups: CellGroups,
        train: bool,
    ) -> Float[Array, "samples cells hidden"]:
        """Apply the layer."""
        config = self.config

        def dropout(x, name):
            return Dropout(config.dropout, name=name)(x, deterministic=not train)

        mixed = CellAttention(config, self.layer, name="attention")(
            layer_norm("attention_norm")(hidden),
            groups,
            train=train,
        )
        hidden = hidden + dropout(mixed, "attention_dropout")
        inner = dense(config.hidden * config.encoder.feedforward, "feedforward_in")(
            layer_norm("feedforward_norm")(hidden)
        )
        inner = dropout(exact_gelu(inner), "feedforward_dropout")
        inner = dense(config.hidden, "feedforward_out")(inner)
        return constrain(hidden + dropout(inner, "out_dropout"), CELLS)


class Centre(nn.Module):
    """Subtraction of the mean over the cells of a context, shrunk towards the mean of the corpus.

    A context of ``n`` cells with mean ``m`` is centred at ``(n m + k c) / (n + k)``, where ``c`` is the learned
    ``context_mean`` and ``k`` is ``centre_cells``: a single cell is centred at the corpus.

    Attributes:
        config: The model's configuration.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "samples cells hidden"],
        groups: CellGroups,
    ) -> Float32[Array, "samples cells hidden"]:
        """Centre the cells of each context."""
        prior = self.param("context_mean", nn.initializers.zeros, (self.config.hidden,))
        # The centre is a sum over thousands of cells.
        hidden = hidden.astype(jnp.float32)
        members = groups.one_hot()
        total = jnp.einsum("bcs,bch->bsh", members, hidden)
        centre = context_centre(
            total,
            members.sum(axis=1)[..., None],
            prior,
            self.config.centre_cells,
        )
        return constrain(hidden - jnp.einsum("bcs,bsh->bch", members, centre), CELLS)


def context_centre(
    total: Float[Array | np.ndarray, "*batch hidden"],
    cells: Real[Array | np.ndarray, "*batch 1"] | int,
    prior: Float[Array | np.ndarray, " hidden"],
    weight: float,
) -> Float[Array | np.ndarray, "*batch hidden"]:
    """Return ``(total + weight * prior) / (cells + weight)``, the centre of contexts of ``cells`` cells."""
    return (total + weight * prior) / (cells + weight)


class Encoder(nn.Module):
    """The configured encoder over padded rows of cells.

    Attributes:
        config: The model's configuration.
        rematerialize: Whether the backward pass recomputes the activations of transformer layers.
    """

    config: ModelConfig
    rematerialize: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "samples cells hidden"],
        groups: CellGroups,
        *,
        train: bool,
    ) -> Float[Array, "samples cells hidden"]:
        """Apply all layers; cells attend within their group."""
        config = self.config
        encoder = self.config.encoder

        def block(name):
            return Hidden(config.hidden, config.norm, config.norm_groups, config.dropout, name=name)

        if encoder.kind in ("flow", "softmax", "performer"):
            kind = TransformerLayer
            if self.rematerialize:
                kind = recomputed(TransformerLayer)
            for layer in range(encoder.layers):
                hidden = kind(config, layer, name=f"layer_{layer}")(hidden, groups, train)
        elif encoder.kind == "mlp":
            for layer in range(encoder.layers):
                hidden = hidden + block(f"layer_{layer}")(hidden, train=train)
        # The last block sees the outputs of all others.
        elif encoder.kind == "residual_mlp":
            history = []
            for layer in range(encoder.layers - 1):
                hidden = block(f"layer_{layer}")(hidden, train=train)
                history.append(hidden)
            hidden = block("out")(jnp.concatenate(history, axis=-1), train=train)
        return hidden
