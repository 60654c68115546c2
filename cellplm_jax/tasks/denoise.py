"""Denoising: expected counts per cell, predicted from its counts and its neighbours in the tissue."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.batch import Reconstruction
from cellplm_jax.config import FinetuneConfig
from cellplm_jax.config_fields import COUNT_DECODERS
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.denoising import (
    denoising_scores,
    gene_means,
    hide_nonzeros,
    log_normalize,
    marker_scores,
)
from cellplm_jax.evaluate.inputs import row_sums
from cellplm_jax.progress import ProgressReport
from cellplm_jax.tasks.contexts import CellTable, labels_of, require_same_cells
from cellplm_jax.tasks.denoise_counts import (
    LAYER,
    LayerWriter,
    Options,
    Storage,
    expected_counts,
    expected_logs,
    posterior_counts,
)
from cellplm_jax.tasks.denoise_loss import denoising_loss, hidden_likelihood
from cellplm_jax.tasks.denoise_pool import (
    PARTS,
    Parts,
    Pool,
    alone,
    combine,
    fit_pool,
    make_parts,
    thin,
)
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.files import check_key
from cellplm_jax.tasks.prediction import Prediction
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.tasks.reading import COUNT_KEYS, Reading, ReadingKeys
from cellplm_jax.tasks.recipe import DECODER_RECIPE
from cellplm_jax.tasks.splits import split_cells
from cellplm_jax.train.finetune import LOSS

if TYPE_CHECKING:
    from anndata import AnnData

FACTS = "cellplm_denoising"
"""Key written to ``uns``."""


class Denoiser(Estimator):
    """Predicts the expected counts of every cell from its other genes and from similar cells.

    The prediction is a pool of three parts: the network's decoder, the mean over the nearest cells of the batch in the
    latent joined with their principal components, and the gene mean. The weights of each gene are fitted to held-out
    molecules (``tasks/denoise_pool.py``), and the means of clusters of cells are kept, so that marker genes stay in
    their cell types.

    ``fit`` fine-tunes the model with its decoder on the cells: entries are hidden, and all measured counts are
    predicted (negative binomial; the hidden entries once more), so the model cannot copy a count and must predict it
    from the other genes and cells. Each batch has its own decoder row. The best epoch has
    the lowest negative log-likelihood of hidden entries of validation cells.

    Zero-shot: without ``fit``, ``predict`` uses the pretrained model with the mean of its batch rows and fits the
    weights to the cells that it predicts.

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
    keys: ClassVar[Sequence[str]] = COUNT_KEYS
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

    pool: Pool | None = None
    """Weights of the parts, from ``fit``."""

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        split_key: str | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> Denoiser:
        """Fit to cells.

        Args:
            adata: Raw counts.
            split_key: Column of ``obs`` with ``"train"``, ``"valid"`` and any other value for unused cells; None: a
                tenth of the cells, stratified by batch, is used for validation.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts or genes cannot be used, or a batch has no training cells.
        """
        if self.base is not None:
            require_counts_decoder(self.base)
        reading = self._reading(keys, split_key=split_key)
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
        kept, held = thin(table.counts, seed=self.training.seed)
        # The network never sees the molecules that the weights of the pool are fitted to.
        table = dataclasses.replace(table, counts=kept)
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
        # The same contexts in every epoch, so that losses are comparable.
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
        self.pool = self._fit_pool(table, held, np.union1d(train, valid))
        self.facts["pool"] = self.pool.scores
        scores = self.pool.scores["log_likelihood"]
        self.facts |= {f"{name}_log_likelihood": scores[name] for name in ("pooled", *PARTS[::-1])}
        self.messages.append(self.pool.message())
        self._log_messages()
        return self

    def _fitted(self) -> Pretrained:
        """Return the fitted model; without a fit, the pretrained one."""
        if self.model is None and self.base is not None:
            require_counts_decoder(self.base)
            self.model = self.base
            # Replaced, not appended: a second prediction must not repeat it.
            self.messages = ["Not fitted: using the pretrained model zero-shot."]
            self.facts = {"zero_shot": True}
        return super()._fitted()

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        log_normalized: bool = False,
        detected: bool = False,
        own_counts: bool = False,
        storage: Storage | None = None,
        key_added: str = LAYER,
        **keys: Unpack[ReadingKeys],
    ) -> AnnData:
        """Predict the expected counts of every cell, in place.

        Writes:
            ``layers[key_added]``: float32 [n_obs, n_vars], expected counts, which sum to the measured total per cell
            (over the shared genes of data and model). Genes that are not denoised are 0; if they are half of the genes
            or more, the layer is a sparse matrix of the others.
            ``layers[key_added + "_log1p"]``: with ``log_normalized``, log1p of the expected counts scaled to
            10,000 per cell.
            ``var[key_added]``: bool, whether the gene is denoised.
            ``uns["cellplm_denoising"]``: model, genes, contexts, number of denoised genes, weights and errors of the
            pool.

        Args:
            adata: The cells. Keys default to those of ``fit``. New batches are decoded with
                the mean of all rows.
            log_normalized: Also write the second layer.
            detected: Predict the count conditional on being non-zero: ``mean / (1 - p(0))``, at least 1. Use it for
                counts known to be dropouts. Totals are then larger than the measured ones,
                and the log-normalised layer is the mean of the logarithms, which is below the logarithm of the
                mean.
            own_counts: Combine the prediction with the cell's own count: the posterior mean of a gamma-Poisson model
                with the pooled prediction as prior. It is closer to the counts of the cell, and to its dropouts.
            storage: ``"float32"``; ``"rounded"``: to three binary digits (an error of 4 %, at most 12.5 %), and small
                values to steps of at most a 50,000th of the cell's counts, which compresses in a file; ``"float16"``: a
                dense matrix of half the size; ``"sparse"``: only the largest values, 1.25 per non-zero count, rounded,
                the others are 0. None: ``"rounded"`` in ``predict_file``, else ``"float32"``.
            key_added: Name of the layer.
            **keys: As in :meth:`fit`.

        Returns:
            ``adata`` itself; if it is a path, what was read from it.

        Raises:
            InputError: There is neither a fit nor a pretrained model, or the counts, genes, keys or options cannot be
                used.
        """
        return super().predict(
            adata,
            log_normalized=log_normalized,
            detected=detected,
            own_counts=own_counts,
            storage=storage,
            key_added=key_added,
            **keys,
        )

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        truth: AnnData | str | os.PathLike | None = None,
        label_key: str | None = None,
        fraction: float = 0.1,
        seed: int = 0,
        **keys: Unpack[ReadingKeys],
    ) -> dict[str, float]:
        """Predict hidden counts and compare log-normalised values; ``adata`` is not modified.

        Args:
            adata: The cells with hidden counts. The fit must not have used the hidden counts.
            truth: The same cells including the hidden counts: entries that are zero in ``adata`` but not here are
                compared. None: ``adata`` is the truth, and a fraction of its non-zeros is hidden.
            label_key: Column of ``obs`` with cell types; their marker genes are compared too.
            fraction: Fraction of the non-zeros to hide, without ``truth``.
            seed: Seed of the choice, without ``truth``.
            **keys: As for :meth:`predict`.

        Returns:
            ``rmse``, ``mae``, ``pearson``, ``gene_pearson`` and ``entries`` of
            :func:`cellplm_jax.evaluate.denoising.denoising_scores` for the expected counts, and the first three for
            each part of the pool (``network_rmse``, ``neighbours_rmse``, ``gene_mean_rmse``...); ``detected_rmse`` and
            ``detected_mae`` for counts conditional on being non-zero, and for the mean of the gene's non-zero values
            (``detected_gene_mean_rmse``...). With ``label_key`` also
            :func:`cellplm_jax.evaluate.denoising.marker_scores` of the pool and of each part.

        Raises:
            InputError: As in :meth:`predict`, the cells differ, or nothing was hidden.
        """
        reading = self._as_fitted(keys)
        seen = self._table(adata, reading)
        if truth is None:
            visible, hidden = hide_nonzeros(seen.counts, fraction, seed=seed)
            true = seen.counts
        else:
            known = self._table(truth, reading)
            require_same_cells(known, list(seen.obs.index.astype(str)))
            visible, true = seen.counts, known.counts
            # For booleans "greater" means true and not: stored in truth, hidden in adata.
            hidden = sparse.csr_matrix((true != 0) > (visible != 0))
        if not hidden.nnz:
            raise InputError(
                "no count is zero in adata and non-zero in truth",
                "counts hidden from adata",
                "Pass the masked counts as adata and the original ones as truth, or omit truth",
            )
        table = dataclasses.replace(seen, counts=visible)
        z, *_ = self._embed(_cells_of(table), _own_reading(reading, table))
        pool = self._pool_for(table, reading)
        parts = self._parts(table, z)
        true_logs, names = log_normalize(true), [*PARTS[::-1]]
        weights = {"": pool.weights} | {f"{name}_": alone(name, len(table.genes)) for name in names}
        scores: dict[str, float] = {}
        for prefix, given in weights.items():
            # Parts alone are scored without the correction of clusters, which belongs to the pool.
            shares = combine(parts, given, correct=not prefix)
            found = denoising_scores(true_logs, np.log1p(1e4 * shares), hidden)
            kept = ("rmse", "mae", "pearson") if prefix else tuple(found)
            scores |= {f"{prefix}{key}": found[key] for key in kept}
            if label_key is not None:
                labels = labels_of(seen.obs, label_key)
                markers = marker_scores(true, shares, labels)
                scores |= {f"{prefix}{key}": value for key, value in markers.items()}
        output = Reconstruction(combine(parts, pool.weights), pool.dispersion)  # type: ignore[arg-type]
        totals, every = _totals(visible), np.ones(len(table.genes), bool)
        # Hidden entries are known to be non-zero, so the fair prediction is conditional on that.
        counts = expected_counts(output, totals, every, True)
        logs = expected_logs(output, totals, every, counts)
        mean = gene_means(log_normalize(visible), detected=True)
        for prefix, values in (("detected_", logs), ("detected_gene_mean_", mean)):
            found = denoising_scores(true_logs, np.broadcast_to(values, logs.shape), hidden)
            scores |= {f"{prefix}{key}": found[key] for key in ("rmse", "mae")}
        return scores

    def _table(self, data: Any, reading: Reading) -> CellTable:
        """Return the cells over the measured genes of the model."""
        table = self._read_more(data, reading)
        return table.restrict(table.measured)

    def _parts(self, table: CellTable, z: np.ndarray) -> list[Parts]:
        """Return the parts of the pool for cells [cells] with latents z [cells, latent]."""
        places = self._places(table)
        network = np.empty((len(table), len(places)), np.float32)
        for piece, output in self._decode(z, batch=table.batch):
            mean, present = np.asarray(output.mean)[:, places], 1.0
            if output.zero_logits is not None:
                present = 1.0 / (1.0 + np.exp(np.asarray(output.zero_logits)[:, places]))
            # The mean of a zero-inflated distribution includes its structural zeros.
            network[piece] = mean * present
        means = None if self.pool is None else self.pool.gene_means[places]
        with _counted(f"{self.task}: nearest cells", len(table), self.quiet) as advance:
            return make_parts(
                table.counts,
                z,
                network,
                table.batch,
                means,
                seed=self.training.seed,
                advance=advance,
            )

    def _places(self, table: CellTable) -> np.ndarray:
        """Return int [genes of the table], their positions in the model."""
        place = {gene: number for number, gene in enumerate(self._fitted().genes)}
        return np.array([place[gene] for gene in table.genes], int)

    def _fit_pool(self, kept: CellTable, held: sparse.csr_matrix, rows: np.ndarray) -> Pool:
        """Fit the pool to held-out molecules [cells, genes] of some cells, int rows."""
        reading = _own_reading(self.reading, kept)
        z, *_ = self._embed(_cells_of(kept), reading)
        if len(rows) < len(kept):
            kept = dataclasses.replace(
                kept,
                counts=kept.counts[rows],
                batch=kept.batch[rows],
                coordinates=None,
                obs=kept.obs.iloc[rows],
            )
            z, held = z[rows], held[rows]
        return fit_pool(self._parts(kept, z), held, seed=self.training.seed)

    def _pool_for(self, table: CellTable, reading: Reading) -> Pool:
        """Return the pool over the genes of the table: the fitted one, or one that is fitted to these cells."""
        if self.pool is not None:
            places = self._places(table)
            pool = self.pool
            return dataclasses.replace(
                pool,
                weights=pool.weights[places],
                dispersion=pool.dispersion[places],
                gene_means=pool.gene_means[places],
            )
        kept, held = thin(table.counts, seed=self.training.seed)
        # The pool of a zero-shot prediction is fitted with the options of that call.
        before, self.reading = self.reading, reading
        try:
            thinned = dataclasses.replace(table, counts=kept)
            return self._fit_pool(thinned, held, np.arange(len(table)))
        finally:
            self.reading = before

    def _expected(
        self, data: Any, reading: Reading, options: Options
    ) -> tuple[Iterator[tuple[slice, np.ndarray, np.ndarray | None]], CellTable, dict, list[str]]:
        """Predict in chunks of cells.

        Returns:
            An iterator over (cells, counts float32 [cells, measured genes], log-normalised values of that shape or
            None); the cells over the measured genes; facts; and messages.
        """
        z, facts, messages = self._embed(data, reading)
        table = self._table(data, reading)
        pool = self._pool_for(table, reading)
        parts = self._parts(table, z)
        with _counted(f"{self.task}: pooling", len(table), self.quiet) as advance:
            shares = combine(parts, pool.weights, advance=advance)
        totals, every = _totals(table.counts), np.ones(len(table.genes), bool)

        def blocks() -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
            for start in range(0, len(table), 512):
                piece = slice(start, min(start + 512, len(table)))
                output = Reconstruction(shares[piece], pool.dispersion)  # type: ignore[arg-type]
                given = (output, totals[piece], every)
                counts, logs = expected_counts(*given, options.detected), None
                if options.own_counts:
                    counts = posterior_counts(counts, pool.dispersion, table.counts[piece])
                if options.log_normalized and options.detected:
                    logs = expected_logs(*given, counts)
                elif options.log_normalized:
                    logs = log_normalize(counts, total=totals[piece])
                yield piece, counts, logs

        facts["pool"] = pool.scores
        return blocks(), table, facts, [*messages, pool.message()]

    def _predict(self, data: Any, reading: Reading, **given: Any) -> Prediction:
        # A file is compressed, which rounding makes far smaller; in memory float32 is expected.
        if given.get("storage") is None:
            given["storage"] = "rounded" if isinstance(data, str | os.PathLike) else "float32"
        options = Options(**given)
        options.check()
        check_key(options.key_added)
        model = self._fitted()
        blocks, table, facts, messages = self._expected(data, reading, options)
        column = np.asarray(table.report.genes.column, int)
        matrix = facts["input"]["matrix"]
        # A layer has the columns of X, so predictions for other genes have no place.
        if matrix == "raw.X" or getattr(data, "n_vars", len(column)) != len(column):
            raise InputError(
                f"the counts are in {matrix}, whose genes differ from those of the layers",
                "counts in X or a layer",
                "Denoise adata.raw.to_adata(), or pass the layer with the counts",
            )
        known = np.flatnonzero(column >= 0)
        place = np.full(len(model.genes), -1)
        place[self._places(table)] = np.arange(len(table.genes))
        gene = place[column[known]]
        # Names of the same gene share its prediction.
        share = (1.0 / np.bincount(gene, minlength=len(table.genes))[gene]).astype(np.float32)
        names = [options.key_added]
        names += [f"{options.key_added}_log1p"] if options.log_normalized else []
        shape = (len(table), len(column))
        writers = [
            LayerWriter(shape, known, options.storage, table.counts.nnz, logs=name != names[0])
            for name in names
        ]
        for piece, values, logs in blocks:
            chosen = [values[:, gene] * share]
            if logs is not None:
                logs = logs[:, gene]
                # Without repeated names the logarithms stay bit for bit as they are.
                chosen.append(np.log1p(np.expm1(logs) * share) if (share < 1.0).any() else logs)
            for writer, block in zip(writers, chosen, strict=True):
                writer.add(piece, block)
        denoised = np.zeros(len(column), bool)
        denoised[known] = True
        facts = {
            "zero_shot": bool(self.facts.get("zero_shot", False)),
            "detected": options.detected,
            "own_counts": options.own_counts,
            "storage": options.storage,
            "layers": names,
            "genes_denoised": len(known),
            "genes_unknown": len(column) - len(known),
            **facts,
        }
        layers = {name: writer.result() for name, writer in zip(names, writers, strict=True)}
        return Prediction(
            var={options.key_added: denoised}, layers=layers, uns={FACTS: facts}, messages=messages
        )

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if self.pool is None:
            return {}, {}
        return {"pool": self.pool.scores}, {name: getattr(self.pool, name) for name in POOL_ARRAYS}

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        # Denoisers saved before 0.2 have no pool: it is fitted to the cells that they predict.
        if "pool" in state:
            self.pool = Pool(**{name: arrays[name] for name in POOL_ARRAYS}, scores=state["pool"])


POOL_ARRAYS = ("weights", "dispersion", "gene_means")
"""Arrays of a pool that are saved."""


@contextlib.contextmanager
def _counted(title: str, cells: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Report the progress of a stage over cells; yields a function to call with the number of finished cells."""
    report = ProgressReport(title, cells, unit="cells", quiet=quiet, first="reading counts")
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        report.update(done)

    try:
        yield advance
    finally:
        report.close()


def _cells_of(table: CellTable) -> AnnData:
    """Return the cells of a table as an AnnData with its genes."""
    import anndata

    cells = anndata.AnnData(table.counts, obs=table.obs, var=pd.DataFrame(index=table.genes))
    if table.coordinates is not None:
        cells.obsm["spatial"] = table.coordinates
    return cells


def _own_reading(reading: Reading, table: CellTable) -> Reading:
    """Return the options that read :func:`_cells_of` of a table."""
    spatial = None if table.coordinates is None else "spatial"
    return reading.changed(layer=None, gene_key="var_names", spatial_key=spatial, feature_type=None)


def _totals(counts: sparse.csr_matrix) -> np.ndarray:
    return row_sums(counts, "float64")


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
