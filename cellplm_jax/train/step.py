"""Training, evaluation and embedding steps: pure functions, compiled once, for any mesh."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Key, Shaped, UInt32

from cellplm_jax.batch import Array, CellBatch, LatentNoise, Reconstruction
from cellplm_jax.config import MaskingConfig, TrainConfig
from cellplm_jax.config_fields import COUNT_DECODERS
from cellplm_jax.losses.likelihoods import (
    negative_binomial_nll,
    zero_inflated_negative_binomial_nll,
)
from cellplm_jax.losses.objectives import (
    chunked_count_loss,
    latent_loss,
    reconstruction_loss,
    restoration_loss,
    warmup_factor,
)
from cellplm_jax.model.cellplm import TRUNK, CellPLM, in_precision
from cellplm_jax.model.masking import (
    drop_cells,
    keep_cells,
    masked_width,
    sample_gene_mask,
    sample_visible,
)
from cellplm_jax.train.optim import make_optimizer
from cellplm_jax.train.projection import Projection
from cellplm_jax.train.sharding import (
    MeshFunction,
    batch_shardings,
    check_divides,
    replicated,
    state_shardings,
)
from cellplm_jax.train.state import TrainState, create_state

Metrics = dict[str, Shaped[Array, "..."]]

# A run that continues in the same process, and another run of the same configuration, need no second trace.
_compiled_once = lru_cache(maxsize=8)

MASKED_CELLS_ONLY = ("negative_binomial", "zero_inflated_negative_binomial")
"""Objectives that score only cells with a masked entry."""


def compute_params(params: Any, config: TrainConfig) -> Any:
    """Cast the parameters of large matrix products to the run's precision; gradients come back in float32.

    Args:
        params: The ``"params"`` collection, float32.
        config: The run's configuration, for its precision.
    """
    return in_precision(params, config.precision)


def loss_terms(
    params: Any,
    batch: CellBatch,
    config: TrainConfig,
    *,
    gene_mask: Bool[Array, "samples cells genes"] | None,
    warmup: Float[Array, ""] | float = 1.0,
    noise: LatentNoise | None = None,
    rngs: dict[str, Key[Array, ""]] | None = None,
    masked: int | None = None,
    visible: Bool[Array, "samples *pieces nonzeros"] | None = None,
) -> tuple[Float32[Array, ""], Metrics]:
    """Compute the pretraining loss of a batch for given masks.

    Args:
        params: The ``"params"`` collection.
        batch: Padded rows of cells.
        config: The run's configuration.
        gene_mask: True is hidden from the input.
        warmup: KL warm-up factor.
        noise: Random numbers of the latent; None draws them from ``rngs["latent"]``.
        rngs: PRNG keys of the ``"dropout"`` and ``"latent"`` streams.
        masked: Maximum number of cells per piece with a masked entry; None: unknown. If the objective scores only these
            cells, the others are not decoded.
        visible: The stored counts that the input keeps, instead of ``gene_mask``; None: those that ``gene_mask`` does
            not hide.

    Returns:
        The scalar loss ``reconstruction + latent`` (paper equation of the denoising ELBO, negated), and its terms.
    """
    model = CellPLM(config.model, rematerialize=config.rematerialize, chunk=config.chunk_cells)
    variables = {"params": compute_params(params, config)}
    given, hide = batch, gene_mask
    if visible is not None:
        # Hidden counts become zero, so that the library size is the sum of the visible ones.
        # The hidden counts are gone from the input, so the embedder needs no mask on top.
        given = batch.replace(count=jnp.where(visible, batch.count, 0))
        hide = None
    hidden = model.apply(
        variables,
        given,
        gene_mask=hide,
        train=True,
        rngs=rngs,
        method=CellPLM.represent,
    )
    inferred = model.apply(
        variables,
        hidden,
        noise=noise,
        train=True,
        rngs=rngs,
        method=CellPLM.infer,
    )

    chunked = config.chunk_cells > 0 and config.objective.kind != "mean_squared_error"
    # Cells without a masked entry have no loss: only the masked ones are decoded, which are the largest arrays.
    decoded, z = batch, inferred.z
    if masked is not None and gene_mask is not None and config.objective.kind in MASKED_CELLS_ONLY:
        scored = batch.cell_mask & gene_mask.any(axis=-1)
        decoded, follow = keep_cells(batch, scored, masked)
        z = follow(z)
        gene_mask = follow(gene_mask)

    def decode_and_score(variables, z, gene_mask):
        if chunked:
            hidden = model.apply(
                variables,
                _narrow(z, config),
                decoded,
                train=True,
                rngs=rngs,
                method=CellPLM.decode_hidden,
            )
            return chunked_count_loss(
                partial(_output_layer, model),
                variables["params"]["decoder"],
                hidden,
                decoded,
                config.objective,
                chunk=config.chunk_cells,
                gene_mask=gene_mask,
            )
        reconstruction = model.apply(
            variables,
            _narrow(z, config),
            decoded,
            train=True,
            rngs=rngs,
            method=CellPLM.decode,
        )
        return reconstruction_loss(reconstruction, decoded, config.objective, gene_mask=gene_mask)

    # The chunked loss computes its gradient in the forward pass, so there is nothing to compute again.
    if config.rematerialize and not chunked:
        decode_and_score = jax.checkpoint(decode_and_score)
    terms = decode_and_score(variables, z, gene_mask)
    latent = latent_loss(
        inferred,
        batch.cell_mask,
        config.model.latent,
        batch=batch.batch,
        warmup=warmup,
    )
    loss = terms["reconstruction"] + latent["latent"]
    if config.objective.restoration_weight:
        # The projection of the complete counts is a target, not something that may move towards the prediction.
        target = jax.lax.stop_gradient(model.apply(variables, batch, method=CellPLM.trunk))
        distance = restoration_loss(inferred.mean, target, batch.cell_mask)
        terms = {**terms, "restoration": distance}
        loss = loss + config.objective.restoration_weight * distance
    return loss, {"loss": loss, **terms, **latent}


def _output_layer(model: CellPLM, decoder: Any, hidden: Array) -> Reconstruction:
    params = {"decoder": decoder}
    return model.apply({"params": params}, hidden, method=CellPLM.decode_output)  # type: ignore[return-value]


def _narrow(z: Array, config: TrainConfig) -> Array:
    return z.astype(jnp.dtype(config.precision))


def training_step(
    state: TrainState,
    batch: CellBatch,
    config: TrainConfig,
) -> tuple[TrainState, Metrics]:
    """Perform one optimizer step: drop cells, mask, forward, backward, AdamW.

    A step whose loss or gradient norm is not finite does not change parameters and optimizer.

    Args:
        state: State before the step.
        batch: Padded rows of cells; every field has a leading axis of ``config.accumulate`` batches.
        config: The run's configuration.

    Returns:
        State after the step, and scalars: the loss terms, ``gradient_norm`` (before clipping), ``kl_warmup``, ``cells``
        (cells in the loss), ``read_cells`` (before dropping), ``slots`` (cells and padding), ``nonzeros``, ``skipped``,
        ``skipped_in_a_row``, and ``batch_checksum`` (uint32), see :func:`batch_checksum`.
    """
    # A function of (seed, step): a resumed run draws what the uninterrupted one would have drawn.
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    warmup = warmup_factor(state.step, config.model.latent)
    gradient = jax.value_and_grad(_masked_loss, has_aux=True)

    if config.accumulate == 1:
        (_, metrics), gradients = gradient(
            state.params,
            jax.tree.map(lambda leaf: leaf[0], batch),
            key,
            warmup,
            config,
        )
    else:
        # The first batch defines the shapes of the sums; a scan then adds one batch at a time.
        def add(total, part):
            number, batch = part
            inner = jax.random.fold_in(key, number)
            (_, metrics), gradients = gradient(state.params, batch, inner, warmup, config)
            return jax.tree.map(jnp.add, total, (metrics, gradients)), None

        shapes = jax.eval_shape(
            lambda: gradient(
                state.params,
                jax.tree.map(lambda leaf: leaf[0], batch),
                key,
                warmup,
                config,
            )
        )
        (_, metrics), gradients = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes
        )
        numbers = jnp.arange(config.accumulate)
        (metrics, gradients), _ = jax.lax.scan(add, (metrics, gradients), (numbers, batch))
        average = lambda leaf: leaf / config.accumulate  # noqa: E731
        gradients = jax.tree.map(average, gradients)
        # A number of cells is summed over accumulated batches; losses and scores are averaged.
        metrics = {k: v if k == "cells" else average(v) for k, v in metrics.items()}

    if config.optimizer.freeze_trunk:
        # Before the norm, so that clipping and the reported norm concern trained parameters only.
        gradients = without_trunk(gradients)
    optimizer = make_optimizer(config.optimizer, config.steps)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

    def updated(params, moments):
        updates, moments = optimizer.update(gradients, moments, params)
        if config.optimizer.freeze_trunk:
            # Again after the optimizer: weight decay moves parameters whose gradient is 0.
            updates = without_trunk(updates)
        return optax.apply_updates(params, updates), moments

    # A branch, not a selection per entry: for the latter, a CPU copies both moments at the start of the step and
    # keeps the copies until its end (551 MiB at 72 M parameters).
    params, moments = jax.lax.cond(
        finite,
        updated,
        lambda *state: state,
        state.params,
        state.optimizer,
    )
    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=moments,
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + skipped) * skipped,
    )
    metrics = {
        **metrics,
        "gradient_norm": norm,
        "kl_warmup": warmup,
        "read_cells": batch.cell_mask.sum().astype(jnp.float32),
        "slots": jnp.asarray(batch.cell_mask.size, jnp.float32),
        "nonzeros": batch.indptr[..., -1].sum().astype(jnp.float32),
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "batch_checksum": batch_checksum(batch),
    }
    return state, metrics


def without_trunk(tree: Any) -> Any:
    """Set the leaves of the projection to zero in a tree shaped like the parameters."""

    def kept(path, leaf):
        names = tuple(entry.key for entry in path)
        frozen = any(names[: len(start)] == start for start in TRUNK)
        return jnp.zeros_like(leaf) if frozen else leaf

    return jax.tree_util.tree_map_with_path(kept, tree)


def _masked_loss(
    params: Any,
    batch: CellBatch,
    key: Array,
    warmup: Array,
    config: TrainConfig,
) -> tuple[Array, Metrics]:
    """Drop cells, draw masks, and compute the loss."""
    # The order of these four is part of the format of a run: changing it changes every later draw.
    drop_key, mask_key, dropout_key, latent_key = jax.random.split(key, 4)
    batch = drop_cells(drop_key, batch, config.masking)
    gene_mask, masked = None, None
    if config.masking.cell_fraction > 0 and config.masking.gene_fraction > 0:
        masked = masked_width(batch, config.masking)
        gene_mask = sample_gene_mask(
            mask_key,
            batch,
            config.model.genes,
            config.masking,
            chunk=config.chunk_cells,
        )
    visible = None
    if config.masking.library_of_visible:
        visible = sample_visible(
            jax.random.fold_in(mask_key, 1),
            batch,
            gene_mask,
            config.masking,
            config.model.genes,
        )
    loss, metrics = loss_terms(
        params,
        batch,
        config,
        gene_mask=gene_mask,
        warmup=warmup,
        rngs={"dropout": dropout_key, "latent": latent_key},
        masked=masked,
        visible=visible,
    )
    return loss, {**metrics, "cells": batch.cell_mask.sum().astype(jnp.float32)}


def batch_checksum(batch: CellBatch) -> UInt32[Array, ""]:
    """Return a number that depends on every stored count of a batch and on its position.

    Integers wrap around and their sums do not depend on the order, so the checksum does not depend on the sharding over
    devices and processes: runs that print the same checksums saw the same batches in the same order.

    Args:
        batch: With or without a leading axis of accumulated batches.
    """

    def numbered(shape):
        return jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape) * jnp.uint32(2) + 1

    # Odd multipliers are invertible modulo 2^32, so no position is lost.
    rows = numbered((*batch.gene.shape[:-1], 1)) * jnp.uint32(0x9E3779B1)
    place = numbered((batch.gene.shape[-1],)) * jnp.uint32(0x85EBCA77)
    entry = (batch.gene.astype(jnp.uint32) + 1) * (batch.count.astype(jnp.uint32) + 7)
    stored = jnp.arange(batch.gene.shape[-1]) < batch.indptr[..., -1:]
    total = jnp.sum(jnp.where(stored, entry * (rows ^ place), 0), dtype=jnp.uint32)
    ends = batch.indptr.astype(jnp.uint32)
    return total + jnp.sum(ends * (rows ^ numbered((ends.shape[-1],))), dtype=jnp.uint32)


def heldout_gene_mask(
    key: Key[Array, ""],
    batch: CellBatch,
    config: TrainConfig,
) -> Bool[Array, "samples cells genes"]:
    """Hide ``masking.gene_fraction`` of the genes (a quarter if it is 0) in every held-out cell.

    Args:
        key: PRNG key; the same key gives the same mask.
        batch: Held-out cells.
        config: The run's configuration.

    Returns:
        True is hidden.
    """
    masking = MaskingConfig(
        cell_fraction=1.0,
        gene_fraction=heldout_rate(config),
        beta=False,
        drop_cells=0.0,
    )
    return sample_gene_mask(key, batch, config.model.genes, masking, chunk=config.chunk_cells)


def heldout_rate(config: TrainConfig) -> float:
    """Return the fraction of genes hidden in held-out cells."""
    return config.masking.gene_fraction or 0.25


def evaluation_step(
    params: Any,
    batch: CellBatch,
    gene_mask: Bool[Array, "samples cells genes"],
    config: TrainConfig,
) -> dict[str, Float32[Array, "*any"]]:
    """Predict hidden entries of held-out cells, deterministically, and return the sums behind the scores.

    The predicted mean is scaled by the cell's VISIBLE counts, so it does not reveal the hidden total.

    Args:
        params: The ``"params"`` collection.
        batch: Held-out cells.
        gene_mask: True is hidden from the input and scored.
        config: The run's configuration.

    Returns:
        Sums over masked, measured entries: ``entries`` and ``nll`` (nats) as scalars, and per gene [genes] the sums
        ``n, x, y, xx, yy, xy`` of log1p truth ``x`` and log1p prediction ``y``; see
        :func:`cellplm_jax.train.metrics.heldout_scores`.
    """
    rate = heldout_rate(config)
    genes = config.model.genes
    model = CellPLM(config.model)
    variables = {"params": compute_params(params, config)}
    hidden = model.apply(variables, batch, gene_mask=gene_mask, method=CellPLM.represent)
    z = model.apply(variables, hidden, method=CellPLM.infer).z
    reconstruction: Reconstruction = model.apply(
        variables,
        _narrow(z, config),
        batch,
        method=CellPLM.decode,
    )
    counts = batch.dense_counts(genes)
    usable = jnp.broadcast_to(batch.cell_mask[..., None], gene_mask.shape)
    measured = batch.measured_entries()
    if measured is not None:
        usable = usable & measured
    hidden = usable & gene_mask
    visible = usable & ~gene_mask
    mean = reconstruction.mean
    if config.model.decoder.kind not in COUNT_DECODERS:
        # A Gaussian decoder predicts log-normalised expression; convert to counts with the visible library size.
        # Visible genes are a random share of all, so their counts are that share of the library.
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
                counts,
                mean,
                reconstruction.dispersion,
                reconstruction.zero_logits,
            )
    weight = hidden.astype(jnp.float32)
    x = jnp.log1p(counts) * weight
    y = jnp.log1p(mean) * weight
    # Sums add up over batches and processes; correlations do not.
    sums = {"n": weight, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    result = {name: value.sum(axis=(0, 1)) for name, value in sums.items()}
    result["nll"] = jnp.sum(jnp.where(hidden, nll, 0.0))
    result["entries"] = weight.sum()
    return result


def embedding_step(
    params: Any,
    batch: CellBatch,
    config: TrainConfig,
) -> Float32[Array, "samples cells latent"]:
    """Embed cells as inference does, without masks or random numbers."""
    model = CellPLM(config.model)
    variables = {"params": compute_params(params, config)}
    hidden = model.apply(variables, batch, method=CellPLM.represent)
    return model.apply(variables, hidden, method=CellPLM.infer).mean


@_compiled_once
def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return the shapes, types and shardings of a run's state."""
    shapes = jax.eval_shape(lambda: create_state(config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def abstract_batch(config: TrainConfig, mesh: Mesh, nonzeros: int) -> CellBatch:
    """Return the shapes, types and shardings of a training batch.

    Args:
        config: The run's configuration.
        mesh: Its mesh.
        nonzeros: Maximum number of stored counts per piece.
    """
    data = config.data
    pieces = config.mesh.cells
    genes = config.model.genes
    # Must agree with `_Rows.empty` in data/pipeline.py, or the step is compiled a second time.
    index = np.uint16 if genes <= 65_536 else np.uint32
    cells = (data.rows, data.cells)
    folded = (data.rows, pieces) if pieces > 1 else (data.rows,)
    positions = config.model.positions
    fields = {
        "indptr": ((*folded, data.cells // pieces + 1), np.int32),
        "gene": ((*folded, nonzeros), index),
        "count": ((*folded, nonzeros), np.uint16),
        "cell_mask": (cells, np.bool_),
        "coordinates": ((*cells, 2), np.float32),
        "has_coordinates": (cells, np.bool_),
        "measured": ((data.rows, data.segments, genes), np.bool_),
        "batch": (cells, np.int32),
        "dataset": (cells, np.int32),
        "platform": (cells, np.int32),
    }
    # Fields that a run never has are None in the batch; an array here would be another program.
    if data.segments > 1:
        fields["segment"] = (cells, np.int32)
    if positions.kind == "laplacian":
        fields["eigenvectors"] = ((*cells, positions.eigenvectors), np.float32)
    shapes = CellBatch(
        **{
            name: jax.ShapeDtypeStruct((config.accumulate, *shape), kind)
            for name, (shape, kind) in fields.items()
        }  # type: ignore[arg-type]
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        batch_shardings(mesh, shapes),
    )


def create_sharded_state(
    config: TrainConfig,
    mesh: Mesh,
    gene_means: Float[np.ndarray, " genes"] | None = None,
    projection: Projection | None = None,
) -> TrainState:
    """Initialise a run with every array created in its final sharding.

    Args:
        config: The run.
        mesh: Its mesh.
        gene_means: See :func:`cellplm_jax.train.state.create_state`.
        projection: See :func:`cellplm_jax.train.state.create_state`.
    """
    return _compile_creation(config, mesh)(gene_means, projection)


@_compiled_once
def _compile_creation(config: TrainConfig, mesh: Mesh) -> MeshFunction:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return MeshFunction(
        lambda means, projection: create_state(config, means, projection),
        mesh,
        out_shardings=shardings,
    )


@_compiled_once
def compile_training_step(config: TrainConfig, mesh: Mesh) -> MeshFunction:
    """Return the jitted training step: ``(state, batch) -> (state, metrics)``; the old state is donated.

    Args:
        config: The run.
        mesh: From :func:`cellplm_jax.train.sharding.make_mesh`; the batch is a global array on it.

    Raises:
        ConfigError: The run's shapes cannot be split over the mesh.
    """
    check_divides(
        mesh,
        rows=config.data.rows,
        genes=config.model.genes,
        cells=config.data.cells,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return MeshFunction(
        lambda state, batch: training_step(state, batch, config),
        mesh,
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


@_compiled_once
def compile_evaluation_step(config: TrainConfig, mesh: Mesh) -> MeshFunction:
    """Return the jitted ``(params, batch, key) -> sums`` of :func:`evaluation_step`; the key draws the hidden genes."""

    def run(params, batch, key):
        return evaluation_step(params, batch, heldout_gene_mask(key, batch, config), config)

    # Mask and prediction in one program, so that the mask [samples, cells, genes] never leaves the device.
    return MeshFunction(run, mesh, out_shardings=replicated(mesh))


@_compiled_once
def compile_embedding_step(config: TrainConfig, mesh: Mesh) -> MeshFunction:
    """Return the jitted ``(params, batch) -> embedding`` of :func:`embedding_step`, replicated on every device."""
    return MeshFunction(
        lambda params, batch: embedding_step(params, batch, config),
        mesh,
        out_shardings=replicated(mesh),
    )
