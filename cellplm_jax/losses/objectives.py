"""Training objectives: reconstruction over measured genes, and the KL terms of the ELBO.

Conventions: a reconstruction term is summed over its genes and averaged over its cells; a KL term
is averaged over all cells of the batch; padding is excluded. ``measured`` restricts every reconstruction to the genes
measured in the sample, which the released code cannot do in pretraining (``CellPLM/objective/zinb.py:131``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Integer

from cellplm_jax.batch import Array, CellBatch, LatentOutput, Reconstruction
from cellplm_jax.config import LatentConfig, ObjectiveConfig
from cellplm_jax.errors import ConfigError
from cellplm_jax.kernels.chunked import BLOCK, CountChunks, summed_in_parts, summed_over_chunks
from cellplm_jax.kernels.matmul import broadcast, squeeze_single_row, weighted_sum
from cellplm_jax.losses.likelihoods import (
    EPSILON,
    negative_binomial_count_terms,
    negative_binomial_mean_terms,
    negative_binomial_nll,
    zero_inflated_mean_terms,
    zero_inflated_negative_binomial_nll,
)

# The backward pass of a likelihood holds sixteen arrays [chunk, genes], that of an embedder two.
LIKELIHOOD_SHARE = 8


def average_over(
    values: Float[Array, "*batch"], cells: Bool[Array, "*batch"]
) -> Float32[Array, ""]:
    """Return the mean of the values of the selected cells; 0 without any."""
    weight = cells.astype(jnp.float32)
    # A selection, not a product: a NaN in padding times 0 would be NaN.
    return jnp.sum(jnp.where(cells, values, 0.0)) / jnp.maximum(weight.sum(), 1.0)


def scale_to_total(
    mean: Float[Array, "*batch genes"],
    total: Float[Array, "*batch"],
    entries: Bool[Array, "*#batch genes"],
) -> Float[Array, "*batch genes"]:
    """Rescale each cell's mean to its total over the selected entries; the others are 0."""
    mean = jnp.where(entries, mean, 0.0)
    return mean * (total / _divisor(mean))[..., None]


def _divisor(mean: Array) -> Array:
    """Return the sum of each cell's mean, with 0 replaced by 1."""
    predicted = mean.sum(axis=-1)
    # A cell without selected entries: its mean is 0 everywhere, and 0 / 0 would reach the gradient.
    return jnp.where(predicted > 0, predicted, 1.0)


def count_nll_reference(
    reconstruction: Reconstruction,
    truth: CellBatch,
    entries: Bool[Array, "#samples #cells #genes"],
) -> Float32[Array, "samples cells"]:
    """Return :func:`count_nll`, computed at every entry; the reference for tests."""
    counts = truth.dense_counts(reconstruction.mean.shape[-1])
    # The mean is scaled to the cell's own total: the likelihood judges the shape of a profile, not its depth.
    total = jnp.sum(jnp.where(entries, counts, 0.0), axis=-1)
    mean = scale_to_total(reconstruction.mean, total, entries)
    dispersion: Array = reconstruction.dispersion  # type: ignore[assignment]
    if reconstruction.zero_logits is None:
        nll = negative_binomial_nll(counts, mean, dispersion)
    else:
        nll = zero_inflated_negative_binomial_nll(
            counts,
            mean,
            dispersion,
            reconstruction.zero_logits,
        )
    return jnp.sum(jnp.where(entries, nll, 0.0), axis=-1)


def count_nll(
    reconstruction: Reconstruction,
    truth: CellBatch,
    counts: Float[Array, "samples cells genes"],
    entries: Bool[Array, "#samples #cells #genes"],
) -> Float32[Array, "samples cells"]:
    """Return the negative log-likelihood of each cell's counts over the selected entries.

    The gamma functions of the likelihood depend on the count and the gene's dispersion but not on the mean, and vanish
    at zero counts. They are therefore computed at the stored counts only; the other terms are cheap and computed at all
    entries. The result equals :func:`count_nll_reference` at a fraction of its cost.

    Args:
        reconstruction: Decoder output; zero-inflated if it has ``zero_logits``.
        truth: The target counts.
        counts: The same counts, dense.
        entries: The selected entries.

    Returns:
        In nats, with the mean rescaled to each cell's total over ``entries``.
    """
    entries = jnp.broadcast_to(entries, reconstruction.mean.shape)
    dispersion: Array = reconstruction.dispersion  # type: ignore[assignment]
    # The gamma functions of a count of 0 cancel, so they are computed at the few stored counts only.
    chosen = truth.at_nonzeros(entries)
    gene = truth.gene.astype(jnp.int32)
    stored = negative_binomial_count_terms(truth.count.astype(jnp.float32), dispersion[gene])
    nll = mean_terms(reconstruction, counts, entries)
    return nll + truth.sum_over_nonzeros(jnp.where(chosen, stored, 0.0))


def mean_terms(
    reconstruction: Reconstruction,
    counts: Float[Array, "samples cells genes"],
    entries: Bool[Array, "#samples #cells #genes"],
) -> Float32[Array, "samples cells"]:
    """Return the terms of :func:`count_nll` that depend on the mean; the same arguments."""
    entries = jnp.broadcast_to(entries, reconstruction.mean.shape)
    arrays = [reconstruction.mean, counts, entries]
    if reconstruction.zero_logits is not None:
        arrays.append(reconstruction.zero_logits)
    return squeeze_single_row(partial(_mean_terms, reconstruction.dispersion), *arrays)


def _mean_terms(dispersion, mean, counts, entries, zero_logits=None):
    if zero_logits is None:
        return _scaled_mean_terms(dispersion, mean, counts, entries)
    counts = jnp.where(entries, counts, 0.0)
    mean = scale_to_total(mean, counts.sum(axis=-1), entries)
    nll = zero_inflated_mean_terms(counts, mean, broadcast(dispersion, mean.shape), zero_logits)
    return jnp.where(entries, nll, 0.0).sum(axis=-1)


@jax.custom_vjp
def _scaled_mean_terms(dispersion, mean, counts, entries):
    """Return :func:`mean_terms` of the negative binomial, with its gradient in closed form.

    With ``mu = mean * scale`` and ``scale = total / sum(mean)``, the derivative by ``mu`` is

        q = (theta + x) / (theta + mu) - x / mu

    and by ``mean``, including the scale, ``scale (q - sum(q mean) / sum(mean))``: fewer passes over the entries than
    reverse-mode differentiation. Counts have no gradient.
    """
    counts = jnp.where(entries, counts, 0.0)
    scaled = scale_to_total(mean, counts.sum(axis=-1), entries)
    # Excluded entries have count and mean 0, for which the terms are 0.
    return negative_binomial_mean_terms(counts, scaled, dispersion).sum(axis=-1)


# Only the inputs are saved; the backward pass recomputes what is cheap instead of keeping arrays [cells, genes].
def _scaled_forward(dispersion, mean, counts, entries):
    given = (dispersion, mean, counts, entries)
    return _scaled_mean_terms(*given), given


def _scaled_backward(saved, gradient):
    dispersion, mean, counts, entries = saved
    counts = jnp.where(entries, counts, 0.0)
    mean = jnp.where(entries, mean, 0.0)
    divisor = _divisor(mean)
    scale = counts.sum(axis=-1) / divisor
    scaled = mean * scale[..., None]
    theta = dispersion + EPSILON
    ratio = (dispersion + counts) / (theta + scaled)
    slope = jnp.where(entries, ratio - counts / (scaled + EPSILON), 0.0)
    # The scale is itself a function of all means of the cell: the quotient rule subtracts its share from every entry.
    through_scale = jnp.sum(slope * mean, axis=-1) / divisor
    of_mean = (gradient * scale)[..., None] * (slope - through_scale[..., None])
    by_entry = jnp.log1p(scaled / theta) - ratio * scaled / theta + counts / theta
    of_dispersion = weighted_sum(gradient, by_entry)
    return of_dispersion, jnp.where(entries, of_mean, 0.0), None, None


_scaled_mean_terms.defvjp(_scaled_forward, _scaled_backward)


def chunked_count_loss(
    output: Callable[[Any, Array], Reconstruction],
    params: Any,
    hidden: Float[Array, "samples cells width"],
    truth: CellBatch,
    config: ObjectiveConfig,
    *,
    chunk: int,
    gene_mask: Bool[Array, "samples cells genes"] | None = None,
    target_genes: Bool[Array, "samples genes"] | None = None,
) -> dict[str, Float32[Array, ""]]:
    """Compute :func:`reconstruction_loss` from the input of the decoder's output layer, in chunks of cells.

    Output layer, likelihood and their gradients are computed chunk by chunk, so that no array of cells by genes is
    kept. The result equals that of the reference up to the order of summation.

    Args:
        output: The output layer: ``(params, hidden) -> Reconstruction``, applied to each cell separately.
        params: Its parameters.
        hidden: Input of the output layer.
        truth: The target counts; see :class:`cellplm_jax.kernels.chunked.CountChunks` for their order.
        config: Names the objective; any except ``"mean_squared_error"``.
        chunk: Cells of each piece per chunk, if one array of cells by genes is held; a quarter of them is used here.
        gene_mask: See :func:`reconstruction_loss`.
        target_genes: See :func:`reconstruction_loss`.

    Returns:
        As in :func:`reconstruction_loss`.

    Raises:
        ConfigError: The decoder lacks an output that the objective requires.
    """
    shape = jax.eval_shape(output, params, hidden)
    _check_decoder(shape, config)
    genes = shape.mean.shape[-1]
    targeted = config.kind in ("imputation", "denoising")
    # Denoising and imputation score all target genes, so a mask of hidden entries has no meaning for them.
    if targeted:
        gene_mask = None
    scored = truth.cell_mask if gene_mask is None else truth.cell_mask & gene_mask.any(axis=-1)
    # Normalised before the loop, so that chunks add up to the mean without knowing each other's number of cells.
    weight = scored / jnp.maximum(scored.sum(), 1).astype(jnp.float32)
    chunks = CountChunks.of(truth, -(-chunk // LIKELIHOOD_SHARE), genes)
    given = {
        "batch": truth,
        "weight": truth.fold(weight),
        "gene_mask": None if gene_mask is None else truth.fold(gene_mask),
        "target_genes": target_genes if targeted else None,
    }
    two = gene_mask is not None and config.masked_part
    function = partial(_chunk_of_loss, output, two)
    total, (full, masked) = summed_over_chunks(function, chunks, params, truth.fold(hidden), given)
    # The gamma functions, at the stored counts only.
    # The dispersion does not depend on cells: one cell is enough, and XLA removes the rest of this product.
    dispersion = output(params, hidden[:1, :1]).dispersion
    given |= {"cell": truth.cell_of_nonzero()}
    blocks = -(-truth.gene.shape[-1] // BLOCK)
    more, (more_full, more_masked) = summed_in_parts(
        partial(_block_of_loss, two),
        blocks,
        dispersion,
        given,
    )
    return {
        "reconstruction": total + more,
        "reconstruction_full": full + more_full,
        "reconstruction_masked": masked + more_masked,
    }


def _block_of_loss(
    two: bool,
    index: Array,
    dispersion: Array,
    given: dict[str, Any],
) -> tuple[Array, tuple[Array, Array]]:
    """Return the contribution of the gamma functions of a block of stored counts to the loss, and its two terms."""
    batch: CellBatch = given["batch"]
    size = min(BLOCK, batch.gene.shape[-1])
    # The last block is shifted back to full size; entries that it shares with the one before get weight 0 below.
    start = jnp.minimum(index * size, batch.gene.shape[-1] - size)
    gene, count, cell = (
        jax.lax.dynamic_slice_in_dim(values, start, size, axis=-1)
        for values in (batch.gene, batch.count, given["cell"])
    )
    gene = gene.astype(jnp.int32)

    def of_cell(values):
        # Padding and dropped cells have indices past the end: weight 0.
        return batch.over_pieces(lambda table, at: table.at[at].get(mode="fill", fill_value=0))(
            values, cell
        )

    weight = of_cell(given["weight"])
    weight = jnp.where(start + jnp.arange(size) >= index * size, weight, 0.0)
    if batch.measured is not None:
        table = batch.measured if batch.measured.ndim == 3 else batch.measured[:, None, :]
        segment = jnp.zeros_like(gene)
        if batch.segment is not None:
            segment = of_cell(batch.fold(batch.segment))
        known = jax.vmap(lambda table, segment, gene: table[segment, gene])(table, segment, gene)
        weight = jnp.where(known, weight, 0.0)
    if given["target_genes"] is not None:
        asked = jax.vmap(lambda table, gene: table[gene])(given["target_genes"], gene)
        weight = jnp.where(asked, weight, 0.0)
    terms = negative_binomial_count_terms(count.astype(jnp.float32), dispersion[gene])
    full = jnp.sum(weight * terms)
    masked = jnp.zeros((), jnp.float32)
    if two:
        hidden = batch.over_pieces(
            lambda table, at, gene: table.at[at, gene].get(mode="fill", fill_value=False),
        )(given["gene_mask"], cell, gene)
        masked = jnp.sum(jnp.where(hidden, weight, 0.0) * terms)
    return full + masked, (full, masked)


def _chunk_of_loss(
    output: Callable,
    two: bool,
    chunks: CountChunks,
    index: Array,
    params: Any,
    rows: Array,
    given: dict[str, Any],
) -> tuple[Array, tuple[Array, Array]]:
    """Return the contribution of a chunk to the loss without the gamma functions, and its two terms."""
    batch: CellBatch = given["batch"]

    def of_chunk(values):
        return batch.unfold(chunks.rows(values, index))

    reconstruction = output(params, batch.unfold(rows))
    counts = batch.unfold(chunks.dense(batch.count, index))
    # Cells that the last chunk shares with the one before count once.
    weight = batch.unfold(chunks.rows(given["weight"], index) * chunks.fresh(index))
    if batch.segment is not None:
        batch = batch.replace(segment=of_chunk(batch.fold(batch.segment)))
    entries = batch.measured_entries()
    if entries is None:
        entries = jnp.ones((counts.shape[0], 1, counts.shape[2]), bool)
    if given["target_genes"] is not None:
        entries = entries & given["target_genes"][:, None, :]
    full = jnp.sum(weight * mean_terms(reconstruction, counts, entries))
    masked = jnp.zeros((), jnp.float32)
    if two:
        entries = entries & of_chunk(given["gene_mask"])
        masked = jnp.sum(weight * mean_terms(reconstruction, counts, entries))
    return full + masked, (full, masked)


def reconstruction_loss(
    reconstruction: Reconstruction,
    truth: CellBatch,
    config: ObjectiveConfig,
    *,
    gene_mask: Bool[Array, "samples cells genes"] | None = None,
    target_genes: Bool[Array, "samples genes"] | None = None,
) -> dict[str, Float32[Array, ""]]:
    """Compute the configured reconstruction objective.

    ``"negative_binomial"`` and ``"zero_inflated_negative_binomial"``: over the cells with a masked entry (all cells
    without ``gene_mask``), all measured genes plus, with ``masked_part``, the masked entries once more, each term
    with the mean rescaled to its own total. ``"imputation"`` and ``"denoising"``: all cells, the target genes.
    ``"mean_squared_error"``: on log1p of counts scaled to 10,000, over the masked entries (all without a mask).

    Args:
        reconstruction: Decoder output.
        truth: The target counts ("denoising": the clean ones), with ``cell_mask`` and ``measured``.
        config: Names the objective.
        gene_mask: Entries hidden from the input; None: none.
        target_genes: Genes predicted by "imputation" and "denoising"; None: all.

    Returns:
        ``{"reconstruction": total, "reconstruction_full": ..., "reconstruction_masked": ...}`` in nats per cell
        (squared error: mean per entry).

    Raises:
        ConfigError: The decoder lacks an output that the objective requires.
    """
    cell_mask = truth.cell_mask
    samples, _, genes = reconstruction.mean.shape
    counts = truth.dense_counts(genes)
    everything = truth.measured_entries()
    if everything is None:
        # Length 1 along the cells: broadcast where it is used, never stored per cell.
        everything = jnp.ones((samples, 1, genes), bool)
    zero = jnp.zeros((), jnp.float32)
    if config.kind == "mean_squared_error":
        entries = everything if gene_mask is None else everything & gene_mask
        entries = jnp.broadcast_to(entries & cell_mask[..., None], reconstruction.mean.shape)
        # The library is that of all measured genes, hidden ones included, so that the target does not depend on the
        # mask.
        library = jnp.sum(jnp.where(everything, counts, 0.0), axis=-1, keepdims=True)
        target = jnp.log1p(counts / jnp.maximum(library, 1.0) * 1e4)
        loss = regression_loss(reconstruction.mean, target, entries)
        return {"reconstruction": loss, "reconstruction_full": loss, "reconstruction_masked": zero}
    _check_decoder(reconstruction, config)
    if config.kind in ("imputation", "denoising"):
        entries = everything if target_genes is None else everything & target_genes[:, None, :]
        full = average_over(count_nll(reconstruction, truth, counts, entries), cell_mask)
        return {"reconstruction": full, "reconstruction_full": full, "reconstruction_masked": zero}
    scored = cell_mask if gene_mask is None else cell_mask & gene_mask.any(axis=-1)
    full = average_over(count_nll(reconstruction, truth, counts, everything), scored)
    masked = zero
    if config.masked_part and gene_mask is not None:
        entries = everything & gene_mask
        masked = average_over(count_nll(reconstruction, truth, counts, entries), scored)
    return {
        "reconstruction": full + masked,
        "reconstruction_full": full,
        "reconstruction_masked": masked,
    }


def _check_decoder(reconstruction: Reconstruction, config: ObjectiveConfig) -> None:
    """Raise ConfigError if the decoder lacks an output that the likelihood requires."""
    if reconstruction.dispersion is None:
        raise ConfigError(
            f"objective '{config.kind}' with a decoder that predicts no dispersion",
            "a negative-binomial decoder",
            "Set decoder.kind to 'negative_binomial', or objective.kind to 'mean_squared_error'",
        )
    if config.kind == "zero_inflated_negative_binomial" and reconstruction.zero_logits is None:
        raise ConfigError(
            "objective 'zero_inflated_negative_binomial' with a decoder without zero inflation",
            "decoder.kind = 'zero_inflated_negative_binomial'",
            "Change one of them",
        )


def warmup_factor(step: Integer[Array, ""] | int, config: LatentConfig) -> Float32[Array, ""]:
    """Return the KL warm-up factor at ``step``: ``min(step, W - 1) / W``, 1 without warm-up.

    The released VAE counts calls in an attribute that its checkpoints lose (``CellPLM/latent/autoencoders.py:79``);
    here it is a function of the training step.
    """
    if config.warmup_steps <= 0:
        return jnp.ones((), jnp.float32)
    # W - 1, as in the released code: the factor never reaches 1.
    step = jnp.minimum(jnp.asarray(step, jnp.float32), config.warmup_steps - 1.0)
    return step / config.warmup_steps


def latent_loss(
    latent: LatentOutput,
    cell_mask: Bool[Array, "samples cells"],
    config: LatentConfig,
    *,
    batch: Int[Array, "samples cells"] | None = None,
    warmup: Float[Array, ""] | float = 1.0,
) -> dict[str, Float32[Array, ""]]:
    """Compute the latent terms of the loss.

    Args:
        latent: Output of the latent layer.
        cell_mask: True for cells, False for padding.
        config: Weights and floor.
        batch: Labels of the batch discriminator; negative: ignored.
        warmup: KL warm-up factor in [0, 1].

    Returns:
        ``kl_latent`` and ``kl_cluster`` (nats per cell, before weights and floor), ``latent`` (their
        weighted, floored sum plus regularisers: the minimised loss), ``floor_binds_latent`` and
        ``floor_binds_cluster`` (1 if the floor replaces the term, which is then not trained), ``adversarial`` and
        ``similarity`` if enabled.
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
            # A floor of 0 means no floor: the one-sample estimate of the "released" mixture may be negative.
            binds = (divergence < config.floor) & (config.floor > 0)
            total = total + weight * warmup * jnp.where(binds, config.floor, divergence)
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
            latent.z,
            cell_mask,
            config.similarity_threshold,
        )
        total = total + config.similarity_weight * terms["similarity"]
    return {**terms, "latent": total}


def elastic_cell_similarity(
    z: Float[Array, "samples cells latent"],
    cell_mask: Bool[Array, "samples cells"],
    threshold: float,
) -> Float32[Array, ""]:
    """Return the elastic cell similarity loss: mean of ``1 - (max(cos, 0) - threshold)^2`` over pairs of cells.

    Pairs within one sample, with cosine 0 on the diagonal as in ``CellPLM/latent/contrastive.py``.

    Args:
        z: Latent of each cell.
        cell_mask: True for cells, False for padding.
        threshold: Cosine similarity from which pairs are repelled.
    """
    # The small term keeps the gradient of the norm finite at 0.
    unit = z / jnp.maximum(jnp.linalg.norm(z + 1e-12, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.einsum("bid,bjd->bij", unit, unit)
    cosine = jnp.maximum(cosine * (1.0 - jnp.eye(z.shape[1])), 0.0)
    pairs = cell_mask[:, :, None] & cell_mask[:, None, :]
    value = jnp.where(pairs, 1.0 - (cosine - threshold) ** 2, 0.0)
    return value.sum() / jnp.maximum(pairs.sum(), 1)


def batch_mixing_loss(
    z: Float[Array, "samples cells latent"],
    batch: Int[Array, "samples cells"],
    cell_mask: Bool[Array, "samples cells"],
    *,
    batches: int,
    neighbors: int = 15,
) -> Float32[Array, ""]:
    """Return the divergence of the batches around each cell from those of all cells: 0 for perfect mixing.

    The cells of all samples are compared. Each cell weights the others by ``exp(-2 d^2 / w)``, with ``d`` the distance
    in the latent and ``w`` the mean squared distance of its nearest cells (constant for the gradient); the loss is the
    mean over cells of ``KL(batches around the cell || batches of all cells)``. A smooth relative of the local inverse
    Simpson index (Korsunsky et al. 2019): only neighbours are moved, distant cells stay separate.

    Args:
        z: Latent of each cell.
        batch: Batch of each cell, from 0.
        cell_mask: True for cells, False for padding.
        batches: Number of batches.
        neighbors: Number of nearest cells that determine the width of the kernel; limited by the number of cells.

    Returns:
        In nats, bounded by the logarithm of the inverse fraction of the rarest batch.
    """
    z = z.reshape(-1, z.shape[-1])
    batch = batch.reshape(-1)
    mask = cell_mask.reshape(-1)
    cells = len(z)
    square = jnp.sum(z * z, axis=-1)
    # Rounding can make the expanded square negative.
    distance = jnp.maximum(square[:, None] + square[None, :] - 2.0 * z @ z.T, 0.0)
    other = mask[:, None] & mask[None, :] & ~jnp.eye(cells, dtype=bool)
    nearest, _ = jax.lax.top_k(
        jnp.where(other, -jax.lax.stop_gradient(distance), -jnp.inf), min(neighbors, cells)
    )
    there = jnp.isfinite(nearest)
    # The mean distance to the neighbours sets the width of each cell's kernel, as a perplexity would.
    width = -jnp.where(there, nearest, 0.0).sum(-1) / jnp.maximum(there.sum(-1), 1)
    scaled = -2.0 * distance / jnp.maximum(width, 1e-6)[:, None]
    weights = jax.nn.softmax(jnp.where(other, scaled, -1e9), axis=-1)
    is_batch = jax.nn.one_hot(batch, batches) * mask[:, None]
    around = jnp.maximum(weights @ is_batch, 1e-9)
    overall = jnp.maximum(is_batch.sum(axis=0) / jnp.maximum(mask.sum(), 1), 1e-9)
    divergence = jnp.sum(around * (jnp.log(around) - jnp.log(overall)), axis=-1)
    return average_over(divergence, mask)


def classification_loss(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    mask: Bool[Array, "*batch"],
    *,
    weights: Float[Array, " classes"] | None = None,
) -> Float32[Array, ""]:
    """Return the mean cross-entropy in nats.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class of each cell; negative labels are ignored.
        mask: False is ignored.
        weights: Weight of each cell by its label, in a weighted mean; None: all equal.
    """
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probability, jnp.maximum(labels, 0)[..., None], axis=-1)[
        ..., 0
    ]
    known = mask & (labels >= 0)
    if weights is None:
        return average_over(-picked, known)
    weight = jnp.where(known, weights[jnp.maximum(labels, 0)], 0.0)
    return jnp.sum(-picked * weight) / jnp.maximum(weight.sum(), 1e-12)


def regression_loss(
    prediction: Float[Array, "*batch outputs"],
    truth: Float[Array, "*batch outputs"],
    entries: Bool[Array, "*#batch #outputs"],
) -> Float32[Array, ""]:
    """Return the mean squared error over the selected entries."""
    entries = jnp.broadcast_to(entries, truth.shape)
    squared = jnp.where(entries, (prediction - truth) ** 2, 0.0)
    return squared.sum() / jnp.maximum(entries.sum(), 1)


def restoration_loss(
    latent: Float[Array, "samples cells latent"],
    target: Float[Array, "samples cells latent"],
    cell_mask: Bool[Array, "samples cells"],
) -> Float32[Array, ""]:
    """Return the mean of 1 - cosine, between 0 and 2, of each cell's latent and the target that it should point to."""

    def unit(values):
        length = jnp.sum(values * values, axis=-1, keepdims=True)
        return values * jax.lax.rsqrt(length + 1e-12)

    return average_over(1 - jnp.sum(unit(latent) * unit(target), axis=-1), cell_mask)
