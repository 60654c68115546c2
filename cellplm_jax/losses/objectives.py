"""Training objectives: reconstruction over measured genes, and the ELBO's KL terms.

Conventions: a reconstruction term is summed over the genes it covers and averaged over the cells it covers; a KL term
is averaged over all cells of the batch; padding never counts. ``measured`` limits every reconstruction to the genes
measured in the sample, which the released code cannot do in pretraining (``CellPLM/objective/zinb.py:131``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cellplm_jax.config import LatentConfig, ObjectiveConfig
from cellplm_jax.errors import ConfigError, explain
from cellplm_jax.losses.likelihoods import (
    negative_binomial_nll,
    zero_inflated_negative_binomial_nll,
)
from cellplm_jax.structs import LatentOutput, Reconstruction


def average_over(values: jax.Array, cells: jax.Array) -> jax.Array:
    """Return the mean of ``values`` [samples, cells] where ``cells`` (bool, same shape) is True; 0 if nowhere."""
    weight = cells.astype(jnp.float32)
    return jnp.sum(jnp.where(cells, values, 0.0)) / jnp.maximum(weight.sum(), 1.0)


def scale_to_total(mean: jax.Array, counts: jax.Array, entries: jax.Array) -> jax.Array:
    """Rescale each cell's mean so that it sums to the cell's counts over the chosen entries.

    Args:
        mean: float [samples, cells, genes].
        counts: float [samples, cells, genes].
        entries: bool, broadcastable to the same shape.

    Returns:
        float [samples, cells, genes]; 0 outside ``entries``.
    """
    mean = jnp.where(entries, mean, 0.0)
    total = jnp.sum(jnp.where(entries, counts, 0.0), axis=-1, keepdims=True)
    predicted = mean.sum(axis=-1, keepdims=True)
    return mean / jnp.where(predicted > 0, predicted, 1.0) * total


def count_nll(
    reconstruction: Reconstruction, counts: jax.Array, entries: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the negative log-likelihood of each cell over the chosen entries, and the rescaled mean.

    Args:
        reconstruction: Decoder output; zero-inflated where it has ``zero_logits``.
        counts: float [samples, cells, genes]. Raw counts.
        entries: bool, broadcastable to [samples, cells, genes].

    Returns:
        float32 [samples, cells] in nats, and the mean [samples, cells, genes] that sums to each cell's counts.
    """
    mean = scale_to_total(reconstruction.mean, counts, entries)
    dispersion = reconstruction.dispersion
    if reconstruction.zero_logits is None:
        nll = negative_binomial_nll(counts, mean, dispersion)
    else:
        nll = zero_inflated_negative_binomial_nll(
            counts, mean, dispersion, reconstruction.zero_logits
        )
    return jnp.sum(jnp.where(entries, nll, 0.0), axis=-1), mean


def reconstruction_loss(
    reconstruction: Reconstruction,
    counts: jax.Array,
    cell_mask: jax.Array,
    config: ObjectiveConfig,
    *,
    measured: jax.Array | None = None,
    gene_mask: jax.Array | None = None,
    target_genes: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Compute the configured reconstruction objective.

    ``"negative_binomial"`` and ``"zero_inflated_negative_binomial"``: over the cells with a masked entry (all cells
    without ``gene_mask``), all measured genes plus, with ``masked_part``, the masked entries once more, each part
    with the mean rescaled to its own total. ``"imputation"`` and ``"denoising"``: all cells, the target genes.
    ``"mean_squared_error"``: on log1p of counts scaled to 10,000, over the masked entries (all without a mask).

    Args:
        reconstruction: Decoder output.
        counts: float [samples, cells, genes]. The truth ("denoising": the clean counts).
        cell_mask: bool [samples, cells].
        config: Names the objective.
        measured: bool [samples, genes]; None: all genes.
        gene_mask: bool [samples, cells, genes], what was hidden from the input; None: nothing.
        target_genes: bool [samples, genes], genes to be predicted by "imputation" and "denoising"; None: all.

    Returns:
        ``{"reconstruction": total, "reconstruction_full": ..., "reconstruction_masked": ...}`` as float32 scalars, in
        nats a cell (squared error: a mean per entry).

    Raises:
        ConfigError: The decoder does not give what the objective needs.
    """
    everything = jnp.ones((counts.shape[0], 1, counts.shape[2]), bool)
    if measured is not None:
        everything = measured[:, None, :]
    zero = jnp.zeros((), jnp.float32)
    if config.kind == "mean_squared_error":
        entries = everything if gene_mask is None else everything & gene_mask
        entries = entries & cell_mask[..., None]
        library = jnp.sum(jnp.where(everything, counts, 0.0), axis=-1, keepdims=True)
        truth = jnp.log1p(counts / jnp.maximum(library, 1.0) * 1e4)
        squared = jnp.where(entries, (reconstruction.mean - truth) ** 2, 0.0)
        loss = squared.sum() / jnp.maximum(entries.sum(), 1.0)
        return {"reconstruction": loss, "reconstruction_full": loss, "reconstruction_masked": zero}
    if reconstruction.dispersion is None:
        msg = explain(
            f"objective '{config.kind}' with a decoder that predicts no dispersion",
            "a negative-binomial decoder",
            "Set decoder.kind to 'negative_binomial', or objective.kind to 'mean_squared_error'",
        )
        raise ConfigError(msg)
    if config.kind == "zero_inflated_negative_binomial" and reconstruction.zero_logits is None:
        msg = explain(
            "objective 'zero_inflated_negative_binomial' with a decoder without zero inflation",
            "decoder.kind = 'zero_inflated_negative_binomial'",
            "Change one of them",
        )
        raise ConfigError(msg)
    if config.kind in ("imputation", "denoising"):
        entries = everything if target_genes is None else everything & target_genes[:, None, :]
        nll, _ = count_nll(reconstruction, counts, entries)
        full = average_over(nll, cell_mask)
        return {"reconstruction": full, "reconstruction_full": full, "reconstruction_masked": zero}
    scored = cell_mask if gene_mask is None else cell_mask & gene_mask.any(axis=-1)
    nll, _ = count_nll(reconstruction, counts, everything)
    full, masked = average_over(nll, scored), zero
    if config.masked_part and gene_mask is not None:
        nll, _ = count_nll(reconstruction, counts, everything & gene_mask)
        masked = average_over(nll, scored)
    return {
        "reconstruction": full + masked,
        "reconstruction_full": full,
        "reconstruction_masked": masked,
    }


def warmup_factor(step: jax.Array | int, config: LatentConfig) -> jax.Array:
    """Return the KL warm-up factor at a step: ``min(step, W - 1) / W``, 1 without warm-up.

    The released VAE counts calls in an attribute that its checkpoints lose (``CellPLM/latent/autoencoders.py:79``);
    here it is a function of the training step.
    """
    if config.warmup_steps <= 0:
        return jnp.ones((), jnp.float32)
    step = jnp.minimum(jnp.asarray(step, jnp.float32), config.warmup_steps - 1.0)
    return step / config.warmup_steps


def latent_loss(
    latent: LatentOutput,
    cell_mask: jax.Array,
    config: LatentConfig,
    *,
    batch: jax.Array | None = None,
    warmup: jax.Array | float = 1.0,
) -> dict[str, jax.Array]:
    """Compute the latent terms of the loss.

    Args:
        latent: The latent layer's output.
        cell_mask: bool [samples, cells].
        config: Weights and floor.
        batch: int32 [samples, cells], labels of the batch discriminator; negative: ignored.
        warmup: KL warm-up factor in [0, 1].

    Returns:
        float32 scalars: ``kl_latent`` and ``kl_cluster`` (nats a cell, before weights and floor), ``latent`` (their
        weighted, floored sum plus regularisers: what is minimised), ``floor_binds_latent`` and
        ``floor_binds_cluster`` (1 where the floor replaces the term, so that it is not trained), ``adversarial`` and
        ``similarity`` where they are on.
    """
    zero = jnp.zeros((), jnp.float32)
    terms = {"kl_latent": zero, "kl_cluster": zero}
    total = zero
    for name, weight in (
        ("latent", config.latent_weight),
        ("cluster", config.cluster_weight),
    ):
        per_cell = getattr(latent, f"kl_{name}")
        if per_cell is None:
            continue
        divergence = average_over(per_cell, cell_mask)
        if config.kind == "gaussian":
            weighted = divergence * weight * warmup
            binds = weighted < config.floor
            total = total + jnp.where(binds, 0.0, weighted)
        else:
            binds = divergence < config.floor
            total = total + weight * warmup * jnp.maximum(divergence, config.floor)
        terms[f"kl_{name}"] = divergence
        terms[f"floor_binds_{name}"] = binds.astype(jnp.float32)
    if config.adversarial_weight > 0 and latent.batch_logits is not None and batch is not None:
        known = cell_mask & (batch >= 0)
        log_probability = jax.nn.log_softmax(latent.batch_logits, axis=-1)
        label = jnp.maximum(batch, 0)[..., None]
        picked = jnp.take_along_axis(log_probability, label, axis=-1)[..., 0]
        terms["adversarial"] = average_over(-picked, known)
        total = total + config.adversarial_weight * terms["adversarial"]
    if config.similarity_weight > 0:
        terms["similarity"] = elastic_cell_similarity(
            latent.z, cell_mask, config.similarity_threshold
        )
        total = total + config.similarity_weight * terms["similarity"]
    return {**terms, "latent": total}


def elastic_cell_similarity(z: jax.Array, cell_mask: jax.Array, threshold: float) -> jax.Array:
    """Return the elastic cell similarity loss: mean of ``1 - (max(cos, 0) - threshold)^2`` over pairs of cells.

    Pairs within a sample, the diagonal counted with cosine 0 as in ``CellPLM/latent/contrastive.py``.

    Args:
        z: float [samples, cells, latent].
        cell_mask: bool [samples, cells].
        threshold: Cosine similarity that pairs are pushed away from.
    """
    unit = z / jnp.maximum(jnp.linalg.norm(z + 1e-12, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.einsum("bid,bjd->bij", unit, unit)
    cosine = jnp.maximum(cosine * (1.0 - jnp.eye(z.shape[1])), 0.0)
    pairs = cell_mask[:, :, None] & cell_mask[:, None, :]
    value = jnp.where(pairs, 1.0 - (cosine - threshold) ** 2, 0.0)
    return value.sum() / jnp.maximum(pairs.sum(), 1)


def classification_loss(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in nats.

    Args:
        logits: float [..., classes].
        labels: int [...]; negative labels are ignored.
        mask: bool [...]; False is ignored.
    """
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probability, jnp.maximum(labels, 0)[..., None], axis=-1)[
        ..., 0
    ]
    return average_over(-picked, mask & (labels >= 0))


def regression_loss(prediction: jax.Array, truth: jax.Array, entries: jax.Array) -> jax.Array:
    """Return the mean squared error over the chosen entries.

    Args:
        prediction: float [..., outputs].
        truth: float [..., outputs].
        entries: bool, broadcastable to [..., outputs].
    """
    entries = jnp.broadcast_to(entries, truth.shape)
    squared = jnp.where(entries, (prediction - truth) ** 2, 0.0)
    return squared.sum() / jnp.maximum(entries.sum(), 1)
