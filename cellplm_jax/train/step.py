"""The training step and the evaluation step, as functions of (state, batch) that are compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cellplm_jax.config import MaskingConfig, TrainConfig
from cellplm_jax.losses.likelihoods import (
    negative_binomial_nll,
    zero_inflated_negative_binomial_nll,
)
from cellplm_jax.losses.objectives import latent_loss, reconstruction_loss, warmup_factor
from cellplm_jax.model.cellplm import CellPLM
from cellplm_jax.model.masking import drop_cells, sample_gene_mask
from cellplm_jax.structs import CellBatch, LatentNoise, Reconstruction
from cellplm_jax.train.optim import make_optimizer
from cellplm_jax.train.sharding import batch_sharding, replicated
from cellplm_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def loss_terms(
    params: Any,
    batch: CellBatch,
    config: TrainConfig,
    *,
    gene_mask: jax.Array | None,
    warmup: jax.Array | float = 1.0,
    noise: LatentNoise | None = None,
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
    """Compute the pretraining loss of a batch whose masks have been drawn.

    Args:
        params: The ``"params"`` collection.
        batch: Padded sentences.
        config: The run's configuration.
        gene_mask: bool [samples, cells, genes]; True is hidden from the input.
        warmup: KL warm-up factor.
        noise: Random numbers of the latent; None draws them from ``rngs["latent"]``.
        rngs: PRNG keys of the ``"dropout"`` and ``"latent"`` streams.

    Returns:
        The scalar loss ``reconstruction + latent`` (paper equation of the denoising ELBO, negated), and its terms.
    """
    output = CellPLM(config.model).apply(
        {"params": params}, batch, gene_mask=gene_mask, noise=noise, train=True, rngs=rngs
    )
    terms = reconstruction_loss(output.reconstruction, batch, config.objective, gene_mask=gene_mask)
    latent = latent_loss(
        output.latent, batch.cell_mask, config.model.latent, batch=batch.batch, warmup=warmup
    )
    loss = terms["reconstruction"] + latent["latent"]
    return loss, {"loss": loss, **terms, **latent}


def training_step(
    state: TrainState, batch: CellBatch, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step: drop cells, mask, forward, backward, AdamW.

    Args:
        state: State before the step.
        batch: Padded sentences, fields [samples, ...].
        config: The run's configuration.

    Returns:
        State after the step, and float32 scalars: the loss terms, ``gradient_norm`` (before clipping), ``cells``
        (cells the loss saw) and ``kl_warmup``.
    """
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    drop_key, mask_key, dropout_key, latent_key = jax.random.split(key, 4)
    batch = drop_cells(drop_key, batch, config.masking)
    gene_mask = None
    if config.masking.cell_fraction > 0 and config.masking.gene_fraction > 0:
        gene_mask = sample_gene_mask(mask_key, batch.cell_mask, config.model.genes, config.masking)
    warmup = warmup_factor(state.step, config.model.latent)
    (_, metrics), gradients = jax.value_and_grad(loss_terms, has_aux=True)(
        state.params,
        batch,
        config,
        gene_mask=gene_mask,
        warmup=warmup,
        rngs={"dropout": dropout_key, "latent": latent_key},
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    metrics = {
        **metrics,
        "gradient_norm": optax.tree.norm(gradients),
        "cells": batch.cell_mask.sum().astype(jnp.float32),
        "kl_warmup": warmup,
    }
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
    )
    return state, metrics


def heldout_gene_mask(key: jax.Array, cell_mask: jax.Array, config: TrainConfig) -> jax.Array:
    """Hide ``masking.gene_fraction`` of the genes (a quarter where that is 0) in every held-out cell.

    Args:
        key: PRNG key; the same key gives the same mask.
        cell_mask: bool [samples, cells].
        config: The run's configuration.

    Returns:
        bool [samples, cells, genes]; True is hidden.
    """
    masking = MaskingConfig(
        cell_fraction=1.0, gene_fraction=heldout_rate(config), beta=False, drop_cells=0.0
    )
    return sample_gene_mask(key, cell_mask, config.model.genes, masking)


def heldout_rate(config: TrainConfig) -> float:
    """Return the fraction of genes hidden in held-out cells."""
    return config.masking.gene_fraction or 0.25


def evaluation_step(
    params: Any, batch: CellBatch, gene_mask: jax.Array, config: TrainConfig
) -> dict[str, jax.Array]:
    """Predict hidden entries of held-out cells, deterministically, and return what the scores are made of.

    The predicted mean is scaled by the cell's VISIBLE counts, so the hidden total is not given away.

    Args:
        params: The ``"params"`` collection.
        batch: Held-out cells.
        gene_mask: bool [samples, cells, genes]; True is hidden from the input and scored.
        config: The run's configuration.

    Returns:
        Sums over masked, measured entries: ``entries`` and ``nll`` (nats) as scalars, and per gene [genes] the sums
        ``n, x, y, xx, yy, xy`` of log1p truth ``x`` and log1p prediction ``y``; see
        :func:`cellplm_jax.train.metrics.heldout_scores`.
    """
    rate, genes = heldout_rate(config), config.model.genes
    output = CellPLM(config.model).apply({"params": params}, batch, gene_mask=gene_mask)
    reconstruction: Reconstruction = output.reconstruction
    counts = batch.dense_counts(genes)
    usable = jnp.broadcast_to(batch.cell_mask[..., None], gene_mask.shape)
    if batch.measured is not None:
        usable = usable & batch.measured[:, None, :]
    hidden, visible = usable & gene_mask, usable & ~gene_mask
    mean = reconstruction.mean
    if reconstruction.dispersion is None:
        # A Gaussian decoder predicts log-normalised expression; back to counts with the visible library size.
        library = jnp.where(visible, counts, 0.0).sum(-1, keepdims=True) / (1.0 - rate)
        mean = jnp.maximum(jnp.expm1(jnp.minimum(mean, 10.0)), 1e-5) * library / 1e4
        nll = jnp.zeros_like(mean)
    else:
        total = jnp.where(visible, counts, 0.0).sum(-1, keepdims=True)
        mean = (
            mean * total / jnp.maximum(jnp.where(visible, mean, 0.0).sum(-1, keepdims=True), 1e-8)
        )
        if reconstruction.zero_logits is None:
            nll = negative_binomial_nll(counts, mean, reconstruction.dispersion)
        else:
            nll = zero_inflated_negative_binomial_nll(
                counts, mean, reconstruction.dispersion, reconstruction.zero_logits
            )
    weight = hidden.astype(jnp.float32)
    x, y = jnp.log1p(counts) * weight, jnp.log1p(mean) * weight
    sums = {"n": weight, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    result = {name: value.sum(axis=(0, 1)) for name, value in sums.items()}
    result["nll"] = jnp.sum(jnp.where(hidden, nll, 0.0))
    result["entries"] = weight.sum()
    return result


def compile_training_step(
    config: TrainConfig, mesh: Mesh
) -> Callable[[TrainState, CellBatch], tuple[TrainState, Metrics]]:
    """Return the jitted training step: batch split over the mesh, state replicated and donated."""
    return jax.jit(
        lambda state, batch: training_step(state, batch, config),
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
        donate_argnums=0,
    )
