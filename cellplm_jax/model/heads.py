"""Task heads on the latent (``CellPLM/head/downstream.py``); they return predictions, losses are defined elsewhere."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cellplm_jax.config import ModelConfig
from cellplm_jax.model.layers import Dropout, dense


class MultilayerHead(nn.Module):
    """Dropout - Linear, with ReLU between layers.

    Attributes:
        config: The model's configuration; ``head`` gives the sizes.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map [..., width] to [..., head.outputs]."""
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
        z: jax.Array,
        cell_mask: jax.Array,
        *,
        condition: jax.Array | None = None,
        train: bool,
    ) -> jax.Array:
        """Predict from the latent.

        Args:
            z: float [samples, cells, latent].
            cell_mask: bool [samples, cells].
            condition: float [samples, cells, condition] for ``"perturbation"``, such as the sum of the targets' gene
                embeddings; None if the head has no condition.
            train: Whether dropout is on.

        Returns:
            float [samples, cells, outputs]; ``"sample_classification"``: [samples, outputs] from the mean over cells.
        """
        head = self.config.head
        if head.kind == "sample_classification":
            weight = cell_mask[..., None].astype(z.dtype)
            pooled = (z * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
            return dense(head.outputs, "linear")(pooled)
        if head.kind == "perturbation" and head.condition > 0:
            if condition is None:
                condition = jnp.zeros((*z.shape[:2], head.condition), z.dtype)
            z = jnp.concatenate([z, condition], axis=-1)
        return MultilayerHead(self.config, name="mlp")(z, train=train)
