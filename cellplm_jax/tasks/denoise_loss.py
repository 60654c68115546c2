"""Loss and validation of a denoiser's network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax.config import MaskingConfig, ModelConfig, ObjectiveConfig
from cellplm_jax.losses.objectives import (
    average_over,
    count_nll,
    latent_loss,
    reconstruction_loss,
)
from cellplm_jax.model.masking import sample_gene_mask
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, corrupted_forward

VALIDATION = MaskingConfig(cell_fraction=1.0, gene_fraction=0.1, beta=False, drop_cells=0.0)
"""Entries hidden from the validation cells, the same in every epoch."""


def denoising_loss(config: ModelConfig, masking: MaskingConfig) -> Loss:
    """Return the loss: measured counts of masked cells, the hidden entries once more, and the latent terms.

    Args:
        config: Architecture with a decoder of counts.
        masking: Dropped cells and hidden entries.

    Returns:
        Pure ``(params, example, key) -> (nats per cell, {"reconstruction": ..., "kl_latent": ...})``.
    """
    objective = ObjectiveConfig(kind=config.decoder.kind)  # type: ignore[arg-type]

    def loss(params, example, key):
        output, kept, gene_mask = corrupted_forward(params, example.batch, key, config, masking)
        reconstruction: Any = output.reconstruction
        terms = reconstruction_loss(reconstruction, kept, objective, gene_mask=gene_mask)
        latent = latent_loss(output.latent, kept.cell_mask, config.latent, batch=kept.batch)
        total = terms["reconstruction"] + latent["latent"]
        return total, {
            "reconstruction": terms["reconstruction"],
            "kl_latent": latent["kl_latent"],
        }

    return loss


def hidden_likelihood(config: ModelConfig, layouts: Any, seed: int) -> Any:
    """Return a validation function: the negative log-likelihood of hidden entries, in nats per cell.

    Args:
        config: Architecture.
        layouts: Validation cells, from :meth:`Estimator._examples`.
        seed: Seed of the hidden entries.
    """
    from cellplm_jax.model.cellplm import CellPLM

    @jax.jit
    def judge(params, batch, key):
        gene_mask = sample_gene_mask(key, batch, config.genes, VALIDATION)
        output: Any = CellPLM(config).apply({"params": params}, batch, gene_mask=gene_mask)
        measured = batch.measured_entries()
        entries = gene_mask if measured is None else gene_mask & measured
        counts = batch.dense_counts(config.genes)
        nll = count_nll(output.reconstruction, batch, counts, entries)
        return average_over(nll, batch.cell_mask), batch.cell_mask.sum().astype(jnp.float32)

    root = jax.random.key(seed)

    def validate(params: Any) -> dict[str, float]:
        sums = [
            judge(params, layout.example.batch, jax.random.fold_in(root, number))
            for number, layout in enumerate(layouts)
        ]
        values, weights = np.array(jax.device_get(sums)).T
        nll = float((values * weights).sum() / weights.sum())
        return {SCORE: -nll, LOSS: nll}

    return validate
