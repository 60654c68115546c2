"""Decoders from the latent to expression, with batch, dataset and platform embeddings (``CellPLM/decoder``)."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from cellplm_jax.batch import Array, CellBatch, Reconstruction, Shape
from cellplm_jax.config import ModelConfig
from cellplm_jax.model.embedder import mean_row_lookup
from cellplm_jax.model.layers import (
    ENTRIES,
    Hidden,
    constrain,
    dense,
    make_norm,
    output_dense,
    prelu,
)

MEAN_RANGE = (1e-5, 1e6)
DISPERSION_RANGE = (1e-4, 1e4)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def exponential_within(
    x: Float[Array, "*shape"], bounds: tuple[float, float]
) -> Float[Array, "*shape"]:
    """Return ``clip(exp(x), *bounds)`` without overflow of the exponential, whose gradient would be NaN.

    The derivative is the value within the bounds and 0 outside, in one pass over the array.
    """
    return jnp.clip(jnp.exp(jnp.minimum(x, math.log(bounds[1]) + 1.0)), *bounds)


@exponential_within.defjvp
def _exponential_tangent(bounds, primals, tangents):
    (x,), (tangent,) = primals, tangents
    value = exponential_within(x, bounds)
    # A clipped entry must not move, or its parameter would drift further out.
    inside = (value > bounds[0]) & (value < bounds[1])
    return value, jnp.where(inside, value, 0.0) * tangent


class CovariateEmbedding(nn.Module):
    """Embedding - PReLU - Norm of a categorical covariate; an unknown value uses the mean of the rows.

    Attributes:
        config: The model's configuration.
        rows: Number of known values.
    """

    config: ModelConfig
    rows: int

    @nn.compact
    def __call__(
        self,
        index: Int[Array, "samples cells"] | None,
        shape: Shape,
    ) -> Float[Array, "samples cells hidden"]:
        """Return the embedding of each cell's value; None: unknown for all cells, of shape ``shape``."""
        config = self.config
        table = self.param(
            "table",
            nn.initializers.normal(1.0),
            (self.rows, config.decoder.hidden),
        )
        x = prelu("prelu")(mean_row_lookup(table, index, shape))
        return make_norm(config.norm, config.norm_groups, "norm")(x)


class Decoder(nn.Module):
    """The configured decoder.

    ``layers - 1`` hidden blocks, each followed by the covariates' embeddings; then, for the negative-binomial kinds,
    Linear(bottleneck) - ReLU - Linear(genes) with ``mean = clip(exp(.), 1e-5, 1e6)`` and one dispersion per gene,
    ``clip(exp(.), 1e-4, 1e4)`` (``CellPLM/decoder/zinb.py``).

    Attributes:
        config: The model's configuration.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "samples cells width"],
        batch: CellBatch | None,
        *,
        train: bool = False,
        part: Literal["all", "hidden", "output"] = "all",
    ) -> Reconstruction | Float[Array, "samples cells hidden"]:
        """Map the latent to the parameters of counts.

        Args:
            z: The latent; for the part ``"output"`` the result of the part ``"hidden"``.
            batch: Provides the covariates; not used by the output layer.
            train: Whether dropout is on.
            part: ``"hidden"``: stop before the output layer, whose result has an axis of genes; ``"output"``: only that
                layer, each cell separately.

        Returns:
            Parameters of the counts; for ``"hidden"`` the input of the output layer.
        """
        if part == "output":
            return self._output(z)
        # Split in two, so that the loss can apply the output layer chunk by chunk.
        hidden = self._hidden(z, batch, train)  # type: ignore[arg-type]
        return hidden if part == "hidden" else self._output(hidden)

    def _hidden(self, z: Array, batch: CellBatch, train: bool) -> Array:
        config = self.config
        decoder = self.config.decoder
        covariates = {
            "batch": (decoder.batches, batch.batch),
            "dataset": (decoder.datasets, batch.dataset),
            "platform": (decoder.platforms, batch.platform),
        }
        x, history = z, []
        for layer in range(decoder.layers - 1):
            x = Hidden(
                decoder.hidden,
                config.norm,
                config.norm_groups,
                config.dropout,
                name=f"layer_{layer}",
            )(x, train=train)
            for covariate, (rows, index) in covariates.items():
                if rows > 0:
                    embedding = CovariateEmbedding(config, rows, name=f"{covariate}_{layer}")
                    x = x + embedding(index, x.shape[:2])
            history.append(x)
        if decoder.kind == "gaussian":
            return x
        # The output layer sees every hidden layer.
        if decoder.kind == "residual":
            return jnp.concatenate(history, -1)
        return nn.relu(dense(decoder.bottleneck, "bottleneck")(x))

    def _output(self, x: Array) -> Reconstruction:
        config = self.config
        decoder = self.config.decoder

        def by_gene(name, x):
            return constrain(output_dense(config.genes, name)(x), ENTRIES)

        if decoder.kind in ("gaussian", "residual"):
            return Reconstruction(mean=by_gene("mean", x))
        mean = exponential_within(by_gene("log_mean", x), MEAN_RANGE)
        log_dispersion = self.param("log_dispersion", nn.initializers.normal(1.0), (config.genes,))
        dispersion = exponential_within(log_dispersion, DISPERSION_RANGE)
        zero_logits = None
        if decoder.kind == "zero_inflated_negative_binomial":
            zero_logits = by_gene("zero_logits", x)
        return Reconstruction(mean=mean, dispersion=dispersion, zero_logits=zero_logits)
