"""The network of the gene imputer: its loss, validation, examples, and models over a subset of the genes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import sparse

from cellplm_jax.config import FinetuneConfig, MaskingConfig, ModelConfig, ObjectiveConfig
from cellplm_jax.data.genes import FittedGenes
from cellplm_jax.losses.objectives import (
    average_over,
    count_nll,
    latent_loss,
    reconstruction_loss,
)
from cellplm_jax.tasks.contexts import (
    CellTable,
    Example,
    Layout,
    contexts_of,
    gather,
    make_examples,
)
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, clean_forward, corrupted_forward

_STORED = ("indptr", "gene", "count")
"""Fields of a batch with its counts."""


def paired(
    shown: CellTable,
    truth: CellTable | None,
    cells: np.ndarray,
    start: Pretrained,
    training: FinetuneConfig,
    batch_rows: Mapping[str, int],
) -> list[Layout]:
    """Pad input cells with their target cells.

    Args:
        shown: The input.
        truth: The same cells with all genes; None: the input is the target.
        cells: int, which cells.
        start: The model.
        training: Limits of contexts and steps.
        batch_rows: Decoder row of each batch.
    """
    limit = training.cells_per_context or None
    contexts = contexts_of(shown.batch, cells, limit=limit)
    layouts = [
        make_examples(
            table,
            contexts,
            start.config,
            batch_rows=batch_rows,
            cells_per_step=training.cells_per_step,
        )
        for table in (shown, shown if truth is None else truth)
    ]
    return [
        dataclasses.replace(
            seen,
            example=Example(
                seen.example.batch,
                {name: getattr(whole.example.batch, name) for name in _STORED},
            ),
        )
        for seen, whole in zip(*layouts, strict=True)
    ]


def decoded_means(model: Pretrained, layouts: list[Layout], cells: int, row: int) -> np.ndarray:
    """Return the network's unscaled means with one decoder row, float32 [cells, genes].

    Args:
        model: The fitted model.
        layouts: Padded examples of some of the cells; the others are 0.
        cells: Number of cells of the table.
        row: Decoder row.
    """
    decode = jax.jit(lambda params, example: _means(params, example, model.config))
    params = jax.device_put(model.params)
    outputs = []
    for layout in layouts:
        batch = layout.example.batch
        batch = batch.replace(batch=jnp.full_like(batch.batch, row))
        outputs.append(jax.device_get(decode(params, layout.example.replace(batch=batch))))
    return gather(layouts, outputs, cells)


def seen_through(table: CellTable, shown: np.ndarray) -> CellTable:
    """Return the cells with the counts of some genes only; ``measured`` is not changed.

    Args:
        table: The cells.
        shown: bool [genes].
    """
    # Counts of 0 stay stored after the product.
    counts = sparse.csr_matrix(table.counts @ sparse.diags(shown.astype(np.float32)))
    counts.eliminate_zeros()
    return dataclasses.replace(table, counts=counts)


def panel_model(model: Pretrained, panel: Sequence[str]) -> Pretrained:
    """Return a model that embeds from a subset of its genes.

    Args:
        model: The fitted model.
        panel: Subset of its genes.
    """
    rows = {gene: row for row, gene in enumerate(model.genes)}
    flat = flatten_dict(model.params)
    path = ("embedder", "gene_embedding")
    flat[path] = flat[path][[rows[gene] for gene in panel]]
    config = dataclasses.replace(model.config, genes=len(panel))
    card = dict(model.card)
    source = model.source
    genes = model.genes.subset(panel) if isinstance(model.genes, FittedGenes) else list(panel)
    return Pretrained(
        config,
        unflatten_dict(flat),
        genes,
        card,
        source,
        model.step,
        precision=model.precision,
        devices=model.devices,
    )


def with_mean_row(model: Pretrained, rows: Sequence[int], *, replace: bool = False) -> Pretrained:
    """Return the model with one more batch, whose embedding is the mean of others.

    Args:
        model: A model with a batch embedding.
        rows: Rows to average.
        replace: Set the last row instead of adding one.
    """
    flat = flatten_dict(model.params)
    for path, leaf in flat.items():
        if path[0] in ("decoder", "embedder") and _is_batch_table(path):
            # Sorted: the sum of floats depends on the order, and a set has none.
            mean = np.asarray(leaf)[sorted(rows)].mean(axis=0, keepdims=True)
            # After fine-tuning the mean is computed again, because the rows it averages were trained.
            flat[path] = np.concatenate([leaf[:-1] if replace else leaf, mean])
    config = model.config
    if not replace:
        decoder = dataclasses.replace(config.decoder, batches=config.decoder.batches + 1)
        config = dataclasses.replace(config, decoder=decoder)
    return Pretrained(
        config,
        unflatten_dict(flat),
        model.genes,
        dict(model.card),
        model.source,
        model.step,
        precision=model.precision,
        devices=model.devices,
    )


def _is_batch_table(path: tuple[str, ...]) -> bool:
    return path[1:] == ("batch_embedding",) or (
        path[1].startswith("batch_") and path[-1] == "table"
    )


def imputation_loss(config: ModelConfig, masking: MaskingConfig) -> Loss:
    """Return the loss: all measured genes of every cell, and the latent terms.

    Args:
        config: Architecture with a decoder of counts.
        masking: Dropped cells and hidden input entries.

    Returns:
        Pure ``(params, example, key) -> (nats per cell, {"reconstruction": ..., "kl_latent": ...})``; the targets are
        the stored counts to predict, for the cells of the example.
    """
    objective = ObjectiveConfig(kind="imputation")

    def loss(params, example, key):
        output, kept, _ = corrupted_forward(params, example.batch, key, config, masking)
        truth = kept.replace(**example.targets)
        reconstruction: Any = output.reconstruction
        terms = reconstruction_loss(reconstruction, truth, objective)
        latent = latent_loss(output.latent, kept.cell_mask, config.latent, batch=kept.batch)
        return terms["reconstruction"] + latent["latent"], {
            "reconstruction": terms["reconstruction"],
            "kl_latent": latent["kl_latent"],
        }

    return loss


def _means(params: Any, example: Example, config: ModelConfig) -> jax.Array:
    """Return the unscaled means of every gene, structural zeros included, float32 [samples, cells, genes]."""
    output: Any = clean_forward(params, example.batch, config).reconstruction
    if output.zero_logits is None:
        return output.mean
    return output.mean * jax.nn.sigmoid(-output.zero_logits)


def validation_of(config: ModelConfig, judged: list[Layout]) -> Any:
    """Return a validation function: the negative log-likelihood of all genes, in nats per cell."""

    @jax.jit
    def judge(params, example):
        truth = example.batch.replace(**example.targets)
        output: Any = clean_forward(params, example.batch, config).reconstruction
        counts = truth.dense_counts(config.genes)
        entries = truth.measured_entries()
        entries = jnp.ones((1, 1, 1), bool) if entries is None else entries
        nll = count_nll(output, truth, counts, entries)
        return average_over(nll, truth.cell_mask), truth.cell_mask.sum().astype(jnp.float32)

    def validate(params: Any) -> dict[str, float]:
        sums = [judge(params, layout.example) for layout in judged]
        # Weighted by cells, because contexts differ in size.
        values, weights = np.array(jax.device_get(sums)).T
        nll = float((values * weights).sum() / weights.sum())
        return {SCORE: -nll, LOSS: nll}

    return validate
