"""Task heads on the latent (``CellPLM/head/downstream.py``); they return predictions, losses are defined elsewhere."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float

from cellplm_jax.batch import Array
from cellplm_jax.config import ModelConfig
from cellplm_jax.model.layers import Dropout, dense


class MultilayerHead(nn.Module):
    """Dropout - Linear, with ReLU between layers.

    Attributes:
        config: The model's configuration; ``head`` gives the sizes.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch width"],
        *,
        train: bool,
    ) -> Float[Array, "*batch outputs"]:
        """Apply the layers to the last axis."""
        head = self.config.head
        for layer in range(head.layers):
            last = layer == head.layers - 1
            x = Dropout(self.config.dropout, name=f"dropout_{layer}")(x, deterministic=not train)
            x = dense(head.outputs if last else head.hidden, f"linear_{layer}")(x)
            x = x if last else nn.relu(x)
        return x


class Head(nn.Module):
    """The configured task head.

    Attributes:
        config: The model's configuration.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "samples cells latent"],
        cell_mask: Bool[Array, "samples cells"],
        *,
        condition: Float[Array, "samples cells condition"] | None = None,
        train: bool,
    ) -> Float[Array, "samples cells outputs"] | Float[Array, "samples outputs"]:
        """Predict from the latent.

        Args:
            z: Latent of each cell.
            cell_mask: True for cells, False for padding.
            condition: For ``"perturbation"``, such as the sum of the targets' gene embeddings; None if the head has no
                condition.
            train: Whether dropout is on.

        Returns:
            One prediction per cell; ``"sample_classification"``: one per sample, from the mean over its cells.
        """
        head = self.config.head
        if head.kind == "sample_classification":
            weight = cell_mask[..., None].astype(z.dtype)
            # Without padding, whose latents are not 0.
            pooled = (z * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
            return dense(head.outputs, "linear")(pooled)
        if head.kind == "perturbation" and head.condition > 0:
            if condition is None:
                # Without a condition: initialisation, and control cells.
                condition = jnp.zeros((*z.shape[:2], head.condition), z.dtype)
            z = jnp.concatenate([z, condition], axis=-1)
        return MultilayerHead(self.config, name="mlp")(z, train=train)
