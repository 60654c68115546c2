"""Denoising: expected counts per cell, predicted from its counts and its neighbours in the tissue."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax._version import __version__
from cellplm_jax.config import FinetuneConfig, MaskingConfig, ModelConfig, ObjectiveConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import map_genes, symbols_of
from cellplm_jax.errors import InputError, nearest
from cellplm_jax.evaluate.denoising import (
    denoising_scores,
    gene_means,
    hide_nonzeros,
    log_normalize,
)
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
from cellplm_jax.losses.objectives import (
    average_over,
    count_nll,
    latent_loss,
    reconstruction_loss,
)
from cellplm_jax.model.masking import sample_gene_mask
from cellplm_jax.tasks.contexts import ONE_BATCH, CellTable, read_cells
from cellplm_jax.tasks.embed import check_copy, write_copy
from cellplm_jax.tasks.estimator import AS_FITTED, DECODER_RECIPE, Estimator, Reading, split_cells
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, corrupted_forward

if TYPE_CHECKING:
    from anndata import AnnData

    from cellplm_jax.batch import Reconstruction

LAYER = "cellplm_denoised"
"""Layer that ``predict`` writes; the log-normalised one has the suffix ``_log1p``."""

FACTS = "cellplm_denoising"
"""Key written to ``uns``."""

COUNT_DECODERS = ("negative_binomial", "zero_inflated_negative_binomial")
"""Decoders that predict counts."""

EXPLICIT_MEAN, EXPLICIT_COUNTS = 12.0, 48
"""Maximum mean, and number of counts, for the explicit sum of a mean of logarithms."""

VALIDATION = MaskingConfig(cell_fraction=1.0, gene_fraction=0.1, beta=False, drop_cells=0.0)
"""Entries hidden from the validation cells, the same in every epoch."""


class Denoiser(Estimator):
    """Predicts the expected counts of every cell.

    ``fit`` fine-tunes the model with its decoder on the cells: entries are hidden, and all measured counts are
    predicted (negative binomial; the hidden entries once more), so the model cannot copy a count and must predict it
    from the other genes and cells. Each batch has its own decoder row. The best epoch has
    the lowest negative log-likelihood of hidden entries of validation cells.

    Zero-shot: without ``fit``, ``predict`` uses the pretrained model with the mean of its batch rows.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture from scratch, over the genes of the data.
        genes: Number of highly variable genes to fit on; None: all genes of the vocabulary that the cells express. By
            default 3,000 from scratch, else all.
        quiet: Disable progress output.
        precision: ``"float32"`` or ``"bfloat16"``; None: that of the model.
        devices: Devices of this process that fit and predict together; None: those of the model, else all accelerators.
        **training: Fields of :class:`cellplm_jax.config.FinetuneConfig`: ``epochs``, ``learning_rate``, ``seed``...

    Raises:
        ConfigError: An option is unknown or its value is invalid.
    """

    task: ClassVar[str] = "denoising"
    recipe: ClassVar[FinetuneConfig] = dataclasses.replace(
        DECODER_RECIPE,
        epochs=60,
        patience=10,
        learning_rate=1e-3,
        warmup_epochs=3,
        plateau_factor=0.9,
        plateau_patience=5,
        average=0.9,
        cells_per_step=512,
        cells_per_context=512,
    )

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        batch_key: str | None = None,
        split_key: str | None = None,
        spatial_key: str | None = "spatial",
        layer: str | None = None,
        gene_key: str | None = None,
        cells_per_context: int | None = None,
    ) -> Denoiser:
        """Fit to cells.

        Args:
            adata: Raw counts.
            batch_key: Column of ``obs`` with the batch (tissue sample) of each cell; cells attend within it.
            split_key: Column of ``obs`` with ``"train"``, ``"valid"`` and any other value for unused cells; None: a
                tenth of the cells, stratified by batch, is used for validation.
            spatial_key: Key of ``obsm`` with coordinates; the default one is used if present.
            layer: Layer with the counts; None: search for them.
            gene_key: Column of ``var`` with gene ids; None: the best match.
            cells_per_context: Maximum number of cells per context at prediction time; training uses the recipe's limit.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts or genes cannot be used, or a batch has no training cells.
        """
        if self.base is not None:
            require_counts_decoder(self.base)
        reading = Reading(
            batch_key, spatial_key, layer, gene_key, "counts", cells_per_context, split_key
        )
        table = self._read(adata, reading)
        usable = np.diff(table.counts.indptr) > 0
        train, valid = split_cells(
            table,
            split_key,
            usable=usable,
            strata=table.batch,
            fraction=self.training.validation_fraction,
            seed=self.training.seed,
        )
        require_training_cells(table, train, among=np.union1d(train, valid))
        # Validation cells are denoised too, so genes that only they express are included in the fit.
        table = self._choose_genes(table, np.union1d(train, valid))
        start = self._begin(
            table,
            self._architecture(),
            gene_means=gene_means(table.counts[train]),
        )
        self.facts = {
            "cells": len(table),
            "genes": len(table.genes),
            "training_cells": len(train),
            "validation_cells": len(valid),
        }
        judged = self._examples(table, valid, start)
        self._finetune(
            start,
            loss=denoising_loss(start.config, self.training.masking),
            examples=self._examples(table, train, start),
            validate=hidden_likelihood(start.config, judged, self.training.seed)
            if len(valid)
            else None,
        )
        if self.history and LOSS in self.history[0]:
            self.facts["validation_loss"] = self.history[self.facts["best_epoch"] - 1][LOSS]
        self._log_messages()
        return self

    def _fitted(self) -> Pretrained:
        """Return the fitted model; without a fit, the pretrained one."""
        if self.model is None and self.base is not None:
            require_counts_decoder(self.base)
            self.model = self.base
            self.messages = ["Not fitted: using the pretrained model zero-shot."]
            self.facts = {"zero_shot": True}
        return super()._fitted()

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData,
        *,
        log_normalized: bool = False,
        detected: bool = False,
        key_added: str = LAYER,
        batch_key: str | None = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        cells_per_context: int | None = AS_FITTED,
    ) -> AnnData:
        """Predict the expected counts of every cell, in place.

        Writes:
            ``layers[key_added]``: dense float32 [n_obs, n_vars], expected counts, which sum to the
            measured total per cell (over the shared genes of data and model). NaN for genes outside the vocabulary.
            ``layers[key_added + "_log1p"]``: with ``log_normalized``, log1p of the expected counts scaled to
            10,000 per cell.
            ``uns["cellplm_denoising"]``: model, genes, contexts, number of denoised genes.

        Args:
            adata: The cells. Keys default to those of ``fit``. New batches are decoded with
                the mean of all rows.
            log_normalized: Also write the second layer.
            detected: Predict the count conditional on being non-zero: ``mean / (1 - p(0))``, at least 1. Use it for
                counts known to be dropouts. Totals are then larger than the measured ones,
                and the log-normalised layer is the mean of the logarithms, which is below the logarithm of the
                mean.
            key_added: Name of the layer.
            batch_key: See :meth:`fit`.
            spatial_key: See :meth:`fit`.
            layer: See :meth:`fit`.
            gene_key: See :meth:`fit`.
            cells_per_context: See :meth:`fit`.

        Returns:
            ``adata`` itself.

        Raises:
            InputError: There is neither a fit nor a pretrained model, or the counts, genes or keys cannot be used.
        """
        keys = {
            "batch_key": batch_key, "spatial_key": spatial_key, "layer": layer,
            "gene_key": gene_key, "cells_per_context": cells_per_context,
        }  # fmt: skip
        layers, facts, _ = self._layers(
            adata, self.reading.changed(**keys), log_normalized, detected, key_added, adata.n_vars
        )
        for name, values in layers.items():
            adata.layers[name] = values
        adata.uns[FACTS] = facts
        return adata

    def predict_file(
        self,
        path: str | os.PathLike,
        out: str | os.PathLike,
        *,
        log_normalized: bool = False,
        detected: bool = False,
        key_added: str = LAYER,
        **keys: Any,
    ) -> list[str]:
        """Predict the cells of an ``.h5ad`` file and write a copy with the results; denoised layers are held in memory.

        Args:
            path: Input; never changed.
            out: Output: the input plus the results of :meth:`predict`, written atomically.
            log_normalized: See :meth:`predict`.
            detected: See :meth:`predict`.
            key_added: See :meth:`predict`.
            **keys: As for :meth:`predict`.

        Returns:
            Messages about the input, one per line.

        Raises:
            InputError: As in :meth:`predict`; also if ``out`` cannot be written.
        """
        path, out = Path(path).expanduser(), Path(out).expanduser()
        check_copy(path, out)
        layers, facts, messages = self._layers(
            path, self.reading.changed(**keys), log_normalized, detected, key_added, None
        )
        write_copy(path, out, layers=layers, uns={FACTS: facts})
        return messages

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        truth: AnnData | str | os.PathLike | None = None,
        fraction: float = 0.1,
        seed: int = 0,
        **keys: Any,
    ) -> dict[str, float]:
        """Predict hidden counts and compare log-normalised values; ``adata`` is not modified.

        Args:
            adata: The cells with hidden counts. The fit must not have used the hidden counts.
            truth: The same cells including the hidden counts: entries that are zero in ``adata`` but not here are
                compared. None: ``adata`` is the truth, and a fraction of its non-zeros is hidden.
            fraction: Fraction of the non-zeros to hide, without ``truth``.
            seed: Seed of the choice, without ``truth``.
            **keys: As for :meth:`predict`.

        Returns:
            ``rmse``, ``mae``, ``gene_pearson`` and ``entries`` of
            :func:`cellplm_jax.evaluate.denoising.denoising_scores` for the expected counts; ``detected_rmse`` and
            ``detected_mae`` for those conditional on being non-zero; and both errors of the gene mean of the visible
            values (``gene_mean_rmse``...) and of the mean of its non-zero values (``detected_gene_mean_rmse``...).

        Raises:
            InputError: As in :meth:`predict`, the cells differ, or nothing was hidden.
        """
        import anndata

        model = self._fitted()
        reading = self.reading.changed(**keys)
        read: dict[str, Any] = {"batch_key": reading.batch_key, "spatial_key": reading.spatial_key,
                                "layer": reading.layer, "gene_key": reading.gene_key,
                                "one_batch": reading.batch_key == self.reading.batch_key}  # fmt: skip
        seen = read_cells(adata, model.genes, **read)
        if truth is None:
            visible, hidden = hide_nonzeros(seen.counts, fraction, seed=seed)
            true = seen.counts
        else:
            known = read_cells(truth, model.genes, **read)
            if len(known) != len(seen) or list(known.obs.index) != list(seen.obs.index):
                raise InputError(
                    f"truth has {len(known)} cells and adata {len(seen)}, or other names",
                    "the same cells in the same order",
                    "Select them the same way first",
                )
            visible, true = seen.counts, known.counts
            hidden = sparse.csr_matrix((true != 0) > (visible != 0))
        if not hidden.nnz:
            raise InputError(
                "no count is zero in adata and non-zero in truth",
                "counts hidden from adata",
                "Pass the masked counts as adata and the original ones as truth, or omit truth",
            )
        measured = np.flatnonzero(seen.measured)
        names = [model.genes[i] for i in measured]
        masked = anndata.AnnData(
            sparse.csr_matrix(visible[:, measured]), obs=seen.obs, var=pd.DataFrame(index=names)
        )
        if seen.coordinates is not None:
            masked.obsm["spatial"] = seen.coordinates
        spatial = None if seen.coordinates is None else "spatial"
        own_reading = reading.changed(layer=None, gene_key="var_names", spatial_key=spatial)
        true, hidden = log_normalize(true[:, measured]), hidden[:, measured]
        seen_log = log_normalize(masked.X)
        scores: dict[str, float] = {}
        for given, prefix in ((False, ""), (True, "detected_")):
            blocks = [logs for _, _, logs in self._expected(masked, own_reading, given, True)[0]]
            predicted = np.concatenate(blocks)[:, measured]  # type: ignore[arg-type]
            mean = np.broadcast_to(gene_means(seen_log, detected=given), predicted.shape)
            rows = {"": predicted, "gene_mean_": mean}
            for name, values in rows.items():
                found_scores = denoising_scores(true, values, hidden)
                for key in ("rmse", "mae"):
                    scores[f"{prefix}{name}{key}"] = found_scores[key]
                if not prefix and not name:
                    scores |= {key: found_scores[key] for key in ("gene_pearson", "entries")}
        return scores

    def _expected(
        self, data: Any, reading: Reading, detected: bool, log_normalized: bool
    ) -> tuple[Iterator[tuple[slice, np.ndarray, np.ndarray | None]], np.ndarray, dict, list[str]]:
        """Predict in chunks of cells.

        Returns:
            An iterator over (cells, counts float32 [cells, genes of the model], log-normalised values of that shape or
            None); int [names of the data], the gene of the model of each, -1 for none; facts; and messages about the
            input.
        """
        model = self._fitted()
        z, facts, messages = self._embed(data, reading)
        read: dict[str, Any] = {"layer": reading.layer, "gene_key": reading.gene_key}
        with open_counts(data, model.genes, **read) as source:
            column, measured = source.report.genes.column, np.asarray(source.measured)
            batch = np.full(source.cells, ONE_BATCH, object)
            key = self.with_batches(reading, source.obs.columns)[0].batch_key
            if key is not None:
                batch = source.column(key)
            totals = np.concatenate(
                [np.asarray(block.sum(axis=1)).ravel() for block in source.blocks(4096)]
            )

        def blocks() -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
            for piece, output in self._decode(z, batch=batch):
                given = (output, totals[piece], measured)
                counts, logs = expected_counts(*given, detected), None
                if log_normalized and detected:
                    logs = expected_logs(*given, counts)
                elif log_normalized:
                    logs = log_normalize(counts, total=totals[piece])
                yield piece, counts, logs

        return blocks(), column, facts, messages

    def _layers(
        self,
        data: Any,
        reading: Reading,
        log_normalized: bool,
        detected: bool,
        key_added: str,
        width: int | None,
    ) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
        """Return the layers, facts for ``uns``, and messages about the input."""
        if not key_added or "/" in key_added:
            raise InputError(f"key_added={key_added!r}", "a name without '/'", "Choose another one")
        model = self._fitted()
        blocks, column, facts, messages = self._expected(data, reading, detected, log_normalized)
        matrix = facts["input"]["matrix"]
        if matrix == "raw.X" or (width is not None and width != len(column)):
            raise InputError(
                f"the counts are in {matrix}, whose genes differ from those of the layers",
                "counts in X or a layer",
                "Denoise adata.raw.to_adata(), or pass the layer with the counts",
            )
        known = np.flatnonzero(column >= 0)
        # Names of the same gene share its prediction.
        share = 1.0 / np.bincount(column[known], minlength=len(model.genes))[column[known]]
        cells = facts["input"]["cells"]
        names = [key_added] + ([f"{key_added}_log1p"] if log_normalized else [])
        layers = {name: np.full((cells, len(column)), np.nan, np.float32) for name in names}
        for piece, values, logs in blocks:
            layers[key_added][piece, known] = values[:, column[known]] * share.astype(np.float32)
            if logs is not None:
                logs = logs[:, column[known]]
                if (share < 1.0).any():
                    logs = np.log1p(np.expm1(logs) * share)
                layers[names[1]][piece, known] = logs
        return (
            layers,
            {
                "model": model.id,
                "version": __version__,
                "zero_shot": bool(self.facts.get("zero_shot", False)),
                "detected": detected,
                "layers": names,
                "genes_denoised": len(known),
                "genes_unknown": len(column) - len(known),
                **facts,
            },
            messages,
        )

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {}, {}

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        pass


def expected_counts(
    output: Reconstruction, totals: np.ndarray, measured: np.ndarray, detected: bool = False
) -> np.ndarray:
    """Convert a decoder's output to counts: scaled so that the measured genes of each cell sum to its total.

    Args:
        output: Unscaled means [cells, genes], as numpy.
        totals: float [cells].
        measured: bool [genes], genes that determine the scale.
        detected: Return the mean of the non-zero counts, ``mean / (1 - p(0))``.

    Returns:
        float32 [cells, genes].
    """
    mean, present = _scaled_means(output, totals, measured)
    if not detected:
        return (mean * present).astype(np.float32)
    theta = np.asarray(output.dispersion, np.float64)
    # For the zero-truncated negative binomial; the structural zeros cancel.
    chance = -np.expm1(-theta * np.log1p(mean / theta))
    return np.where(chance > 1e-12, mean / np.maximum(chance, 1e-12), 1.0).astype(np.float32)


def _scaled_means(
    output: Reconstruction, totals: np.ndarray, measured: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scaled means of the negative binomials, and the probabilities that a zero is not structural."""
    mean = np.asarray(output.mean, np.float64)
    present = np.ones_like(mean)
    if output.zero_logits is not None:
        present = 1.0 / (1.0 + np.exp(np.asarray(output.zero_logits, np.float64)))
    sums = (mean * present)[:, measured].sum(axis=1)
    return mean * (totals / np.where(sums > 0, sums, 1.0))[:, None], present


def expected_logs(
    output: Reconstruction,
    totals: np.ndarray,
    measured: np.ndarray,
    detected: np.ndarray,
    *,
    target_sum: float = 1e4,
) -> np.ndarray:
    """Return the mean of log-normalised non-zero counts: of log1p(count / total x 10,000).

    The logarithm of a mean is above the mean of the logarithms (Jensen); for errors on logarithms, the latter is the
    better prediction. Up to :data:`EXPLICIT_MEAN` the zero-truncated negative binomial
    is summed over counts, above it the logarithm is expanded to second order around the mean.

    Args:
        output: Unscaled means [cells, genes], as numpy.
        totals: float [cells].
        measured: bool [genes], genes that determine the scale.
        detected: float [cells, genes], from :func:`expected_counts` with ``detected``.
        target_sum: Library size.

    Returns:
        float32 [cells, genes].
    """
    scale = (target_sum / np.where(totals > 0, totals, 1.0)).astype(np.float32)[:, None]
    mean = np.maximum(_scaled_means(output, totals, measured)[0], 1e-8).astype(np.float32)
    theta = np.asarray(output.dispersion, np.float32)
    # Recursion from count 1, unnormalised: p(x + 1) / p(x) = (x + theta) / (x + 1) * mean / (mean + theta).
    ratio = mean / (mean + theta)
    few = mean <= EXPLICIT_MEAN
    ratio_few = np.where(few, ratio, 0.0)
    weight, chance = np.ones_like(mean), np.ones_like(mean)
    total = np.broadcast_to(np.log1p(scale), mean.shape).copy()
    for count in range(2, EXPLICIT_COUNTS + 1):
        weight *= (count - 1 + theta) / count * ratio_few
        chance += weight
        total += weight * np.log1p(count * scale)
    variance = mean + mean**2 / theta
    many = np.log1p(scale * detected) - 0.5 * variance * np.square(scale / (1.0 + scale * detected))
    return np.where(few, total / chance, many).astype(np.float32)


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


def require_training_cells(table: CellTable, train: np.ndarray, *, among: np.ndarray) -> None:
    """Raise an error for batches without training cells, whose decoder row could not be trained.

    Args:
        table: The cells.
        train: int, the training cells.
        among: int, the cells whose batches are checked.

    Raises:
        InputError: A batch has no training cell.
    """
    there = set(table.batch[train])
    without = [name for name in dict.fromkeys(table.batch[among]) if name not in there]
    if without or not len(train):
        raise InputError(
            f"batch '{without[0] if without else table.batch[0]}' has no training cells"
            + (f" (and {len(without) - 1} more)" if len(without) > 1 else ""),
            "training cells with counts in every batch, because each has its own decoder row",
            "Remove the batch, add training cells to it, or omit batch_key",
        )


def require_counts_decoder(model: Pretrained) -> None:
    """Raise an error for a model that cannot predict counts.

    Args:
        model: Start model of a fit or of a zero-shot prediction.

    Raises:
        InputError: It has a task head, or a decoder that does not predict counts.
    """
    kind = "a task head" if model.config.head.kind != "none" else model.config.decoder.kind
    if kind not in COUNT_DECODERS:
        raise InputError(
            f"the model '{model.id}' has {kind if 'head' in kind else f'a {kind} decoder'}",
            "a negative-binomial decoder, which predicts counts",
            "Pass a pretrained model that was not fine-tuned for another task, or None",
        )


@dataclass(frozen=True, eq=False)
class BeforeAndAfter:
    """Counts and their predictions for the same cells.

    Attributes:
        genes: Names of the selected genes, as in the model.
        before: float [cells, genes], log-normalised counts.
        after: float [cells, genes], log-normalised predictions, by the same totals.
        table: One row per gene of ``genes``: ``share_counted``, fraction of cells with a count, ``mean_before`` and
            ``mean_after`` in counts per cell, ``pearson`` over the cells of before and after.
        means_before: float [all genes], mean count per cell.
        means_after: float [all genes], mean predicted count per cell.
        zeros: Fraction of zero entries in the counts.
        expected_zeros: Fraction of these with a prediction of at least half a count.
        counts: CSR [cells, all genes], the counts.
        coordinates: float [cells, 2] if the cells have tissue coordinates.
    """

    genes: list[str]
    before: np.ndarray
    after: np.ndarray
    table: pd.DataFrame
    means_before: np.ndarray
    means_after: np.ndarray
    zeros: float
    expected_zeros: float
    counts: sparse.csr_matrix
    coordinates: np.ndarray | None


def before_and_after(
    denoiser: Denoiser,
    path: str | os.PathLike,
    layer_written: str = LAYER,
    *,
    rows: np.ndarray,
    genes: Sequence[str] | None = None,
    number: int = 10,
    **keys: Any,
) -> BeforeAndAfter:
    """Compare a denoised layer with its counts, for visualisation.

    Args:
        denoiser: The denoiser that wrote the layer.
        path: ``.h5ad`` file with both.
        layer_written: Name of the layer.
        rows: int [cells], increasing: the cells to compare.
        genes: Genes to show; None: those whose predictions vary most between cells; the second one is high in
            other cells than the first.
        number: Number of genes, without ``genes``.
        **keys: As for :meth:`Denoiser.predict`.

    Returns:
        Values of these genes, and means of all.

    Raises:
        InputError: A gene was not denoised, or the file cannot be read.
    """
    import h5py

    model, reading = denoiser._fitted(), denoiser.reading.changed(**keys)
    cells = read_cells(
        path,
        model.genes,
        layer=reading.layer,
        gene_key=reading.gene_key,
        spatial_key=reading.spatial_key,
        minimum_genes=0,
    )
    column = np.asarray(cells.report.genes.column, int)
    known = _known_columns(column)
    total = np.asarray(cells.counts.sum(axis=1), np.float64).ravel()[rows]
    with h5py.File(path) as file:
        values: Any = file[f"layers/{layer_written}"]
        after = np.concatenate(
            [values[part][:, known] for part in np.array_split(rows, len(rows) // 1024 + 1)]
        ).astype(np.float32)
    counts = sparse.csr_matrix(cells.counts[rows][:, column[known]])
    names = [model.genes[gene] for gene in column[known]]
    logs = log_normalize(after, total=total).astype(np.float32)
    if genes is None:
        places = _telling_genes(logs, number)
    else:
        places = _places_of(genes, names)
    before = log_normalize(counts[:, places], total=total).toarray()
    correlation = np.nan_to_num(pearson_per_gene(before, logs[:, places]), nan=0.0)
    nonzero = counts[:, places] > 0
    stored = sparse.csr_matrix(
        (np.ones(counts.nnz, bool), counts.indices, counts.indptr), counts.shape
    )
    half = after >= 0.5
    both = stored.multiply(half).sum()
    empty = half.size - counts.nnz
    return BeforeAndAfter(
        genes=[names[place] for place in places],
        before=before,
        after=logs[:, places].astype(np.float64),
        table=pd.DataFrame(
            {
                "share_counted": np.asarray(nonzero.mean(axis=0)).ravel(),
                "mean_before": np.asarray(counts[:, places].mean(axis=0)).ravel(),
                "mean_after": after[:, places].mean(axis=0),
                "pearson": correlation,
            },
            index=pd.Index([names[place] for place in places], dtype=object),
        ),
        means_before=np.asarray(counts.mean(axis=0)).ravel(),
        means_after=after.mean(axis=0),
        zeros=empty / max(half.size, 1),
        expected_zeros=float((half.sum() - both) / max(empty, 1)),
        counts=counts,
        coordinates=None if cells.coordinates is None else cells.coordinates[rows],
    )


def _known_columns(column: np.ndarray) -> np.ndarray:
    """Return int: the columns of a file in the vocabulary; of several names of one gene the first."""
    known = np.flatnonzero(column >= 0)
    # Their sum is the count of that gene.
    _, first = np.unique(column[known], return_index=True)
    return known[np.sort(first)]


def check_genes(
    denoiser: Denoiser, path: str | os.PathLike, genes: Sequence[str], **keys: Any
) -> None:
    """Check the genes of :func:`before_and_after` before any work is done.

    Args:
        denoiser: The denoiser.
        path: Its ``.h5ad`` input file.
        genes: Genes to show.
        **keys: As for :meth:`Denoiser.predict`.

    Raises:
        InputError: A gene will not be denoised, or the file cannot be read.
    """
    model, reading = denoiser._fitted(), denoiser.reading.changed(**keys)
    read = {"layer": reading.layer, "gene_key": reading.gene_key, "minimum_genes": 0}
    with open_counts(Path(path).expanduser(), model.genes, **read) as source:
        column = np.asarray(source.report.genes.column, int)
    _places_of(genes, [model.genes[gene] for gene in column[_known_columns(column)]])


def _telling_genes(logs: np.ndarray, number: int) -> np.ndarray:
    """Return int: columns that vary most over the cells; the second one correlates least with the first."""
    order = np.argsort(-logs.var(axis=0), kind="stable")[:100]
    if len(order) < 3:
        return order[:number]
    first = np.broadcast_to(logs[:, order[:1]], (len(logs), len(order) - 1))
    like = np.nan_to_num(pearson_per_gene(logs[:, order[1:]], first), nan=1.0)
    second = order[1 + int(like.argmin())]
    others = [place for place in order[1:] if place != second]
    return np.array([order[0], second, *others][:number], int)


def _places_of(genes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return int: positions of genes among the denoised ones."""
    positions = np.asarray(map_genes([str(gene) for gene in genes], names, minimum=0).column, int)
    missing = [str(gene) for gene, place in zip(genes, positions, strict=True) if place < 0]
    if missing:
        raise InputError(
            f"gene '{missing[0]}' was not denoised",
            f"one of the {len(names)} shared genes of data and model",
            nearest(missing[0], symbols_of(names), "Check the name"),
        )
    return positions
