"""Fitting of the gene imputer: network, ridge regression, the choice between them, confidence and intervals."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Unpack

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.config import FinetuneConfig, MaskingConfig
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.denoising import gene_means
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
from cellplm_jax.tasks.contexts import CellTable, Layout, own_vocabulary, read_cells, variable_genes
from cellplm_jax.tasks.denoise import require_counts_decoder, require_training_cells
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.estimator_files import fitted_names
from cellplm_jax.tasks.impute_genes import own_names, requested_genes, split_by_panel
from cellplm_jax.tasks.impute_intervals import FEWEST, LEVELS, Intervals, error_quantiles, widening
from cellplm_jax.tasks.impute_network import (
    decoded_means,
    imputation_loss,
    paired,
    seen_through,
    validation_of,
    with_mean_row,
)
from cellplm_jax.tasks.impute_ridge import (
    LOG,
    MEAN,
    NETWORK,
    POOLED,
    RIDGE,
    SCALES,
    Ridge,
    RidgeData,
    around,
    choose_pool,
    choose_stretch,
    deviations,
    method_scores,
)
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.tasks.reading import COUNT_KEYS, ReadingKeys
from cellplm_jax.tasks.recipe import DECODER_RECIPE, Training
from cellplm_jax.tasks.splits import split_cells
from cellplm_jax.train.finetune import LOSS

if TYPE_CHECKING:
    from anndata import AnnData

SHARED_GENES = 10
"""Minimum number of genes shared by panel and reference."""

GAIN = 0.002
"""A smaller gain in the mean correlation, relative to ridge regression, is reported as none."""

HIDDEN_GROUPS, HIDDEN_CELLS = 3, 1024
"""Groups of panel genes that are hidden in turn for the intervals, and the maximum number of target cells."""

_REFERENCE = "reference: "
"""Prefix of the names of the reference's batches, to distinguish them from those of the target."""

DECODED_AS = "mean of the reference"
"""Name of the decoder row of missing genes."""


class ImputerFit(Estimator):
    """The fitting part of :class:`cellplm_jax.GeneImputer`."""

    task: ClassVar[str] = "imputation"
    keys: ClassVar[Sequence[str]] = COUNT_KEYS
    saved: ClassVar[Sequence[str]] = ("panel", "imputed", "linear", "pool")
    recipe: ClassVar[FinetuneConfig] = dataclasses.replace(
        DECODER_RECIPE,
        epochs=100,
        patience=20,
        learning_rate=5e-4,
        warmup_epochs=5,
        plateau_factor=0.9,
        plateau_patience=5,
        cells_per_step=512,
        cells_per_context=512,
        masking=MaskingConfig(cell_fraction=0.95, gene_fraction=0.25, drop_cells=0.0),
    )

    def __init__(
        self,
        model: Pretrained | str | os.PathLike | None = None,
        *,
        linear: bool = True,
        genes: int | Literal["default"] | None = "default",
        quiet: bool = False,
        **training: Unpack[Training],
    ):
        super().__init__(model, genes=genes, quiet=quiet, **training)
        self.linear = linear
        self.pool: dict[str, list[float]] = {}
        self._ridges: dict[str, Ridge] = {}
        self._intervals: Intervals | None = None
        self.panel: list[str] = []
        self.imputed: list[str] = []
        self.confidence = pd.Series(dtype=float)
        self._columns = np.zeros(0, int)
        self._seen: Pretrained | None = None

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        reference: AnnData | str | os.PathLike | None = None,
        genes: Sequence[str] | None = None,
        reference_batch_key: str | None = None,
        reference_layer: str | None = None,
        reference_gene_key: str | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> Self:
        """Fit to a panel and a reference.

        Args:
            adata: Raw counts of the target cells, usually spatial, over the genes of their panel.
            reference: Raw counts of cells with more genes, dissociated or spatial. None: the batches of
                ``adata`` (see ``batch_key``) with more genes are the reference; a gene without any count in a
                batch is treated as unmeasured in it.
            genes: Names of the genes to impute; None: all genes of the reference outside the panel.
            reference_batch_key: As ``batch_key``, for the reference; None: one batch.
            reference_layer: As ``layer``, for the reference.
            reference_gene_key: As ``gene_key``, for the reference.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`; ``spatial_key`` is used for the reference too.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts or genes cannot be used; panel and reference share too few genes; there is nothing
                to impute; requested genes are unknown, missing from the reference, or already measured; or a batch has
                no training cells.
        """
        if self.base is not None:
            require_counts_decoder(self.base)
        self.reading = self._reading(keys)
        self.model, self.history, self.facts, self._seen = None, [], {}, None
        target, source, names = self._tables(
            adata, reference, reference_batch_key, reference_layer, reference_gene_key
        )
        shared = target.measured & source.measured
        if shared.sum() < SHARED_GENES:
            raise InputError(
                f"panel and reference share {int(shared.sum())} genes (the panel has "
                f"{int(target.measured.sum())}, the reference {int(source.measured.sum())})",
                f"at least {SHARED_GENES}",
                "Check that both name genes of one species, or point gene_key and reference_gene_key at the ids",
            )
        # A cell without counts of the panel has nothing to predict from.
        seen = np.diff(source.counts[:, np.flatnonzero(shared)].tocsr().indptr) > 0
        train, valid = split_cells(
            source,
            None,
            usable=seen,
            strata=source.batch,
            fraction=self.training.validation_fraction,
            seed=self.training.seed,
        )
        require_training_cells(source, train, among=np.arange(len(source)))
        own = np.flatnonzero(np.diff(target.counts[:, np.flatnonzero(shared)].tocsr().indptr) > 0)
        require_training_cells(target, own, among=np.arange(len(target)))
        wanted = self._wanted(target, source, train, genes, names)

        kept = np.union1d(np.flatnonzero(shared), wanted)
        shown, asked = np.isin(kept, np.flatnonzero(shared)), np.isin(kept, wanted)
        # The genes to impute are columns of the target now, but count as unmeasured.
        target = dataclasses.replace(target.restrict(kept), measured=shown)
        source = dataclasses.replace(source.restrict(kept), measured=np.ones(len(kept), bool))
        both = dataclasses.replace(source, batch=np.concatenate([source.batch, target.batch]))
        start = self._begin(both, self._architecture(), gene_means=gene_means(source.counts[train]))
        # Added before the fit, so that the shapes of the decoder are final.
        start = with_mean_row(start, [self.batch_rows[name] for name in set(source.batch)])
        self.batch_rows[DECODED_AS] = start.config.decoder.batches - 1
        self.panel = [gene for gene, there in zip(source.genes, shown, strict=True) if there]
        self._columns = np.flatnonzero(asked)
        self.facts = {
            "cells": len(target),
            "reference_cells": len(source),
            "training_cells": len(train) + len(own),
            "validation_cells": len(valid),
            "shared_genes": len(self.panel),
            "imputed_genes": len(self._columns),
        }
        # Reference cells look to the encoder like cells of the panel.
        through = seen_through(source, shown)
        judged = self._examples_of(through, source, valid, start)
        examples = self._examples_of(through, source, train, start)
        # None: the panel's cells are their own truth.
        examples += self._examples_of(seen_through(target, shown), None, own, start)
        self._finetune(
            start,
            loss=imputation_loss(start.config, self.training.masking),
            examples=examples,
            validate=validation_of(start.config, judged) if len(valid) else None,
        )
        fitted = self._fitted()
        self.model = with_mean_row(
            fitted, [self.batch_rows[name] for name in set(source.batch)], replace=True
        )
        data = RidgeData(source, target, shown, train, own, self.training.seed)
        network = self._network(source, judged, valid, shown, self._columns) if len(valid) else None
        self.pool, self._ridges, self._intervals = {}, {}, None
        mean, deviation = 0.0, network
        if self.linear:
            mean, deviation = self._fit_ridge(data, train, valid, network)
        self._judge(data, valid, None if deviation is None else around(mean, deviation))
        if deviation is not None and len(valid) >= FEWEST:
            self._fit_target(data, train, valid, own, mean, deviation)
        if self.history and LOSS in self.history[0]:
            self.facts["validation_loss"] = self.history[self.facts["best_epoch"] - 1][LOSS]
        self._log_messages()
        return self

    def _tables(
        self,
        adata: Any,
        reference: Any,
        reference_batch_key: str | None,
        reference_layer: str | None,
        reference_gene_key: str | None,
    ) -> tuple[CellTable, CellTable, list[str]]:
        """Read the target cells and the reference, in the columns of one vocabulary, and its names in the reference."""
        reading = self.reading
        other: dict[str, Any] = {"layer": reference_layer, "gene_key": reference_gene_key}
        if self.base is not None:
            vocabulary = self.base.genes
        else:
            vocabulary = own_vocabulary(
                adata, reading.layer, reading.gene_key, "counts", reading.feature_type
            )
            if reference is not None:
                more = own_vocabulary(reference, reference_layer, reference_gene_key, "counts")
                vocabulary = list(dict.fromkeys([*vocabulary, *more]))
        target = read_cells(adata, vocabulary, minimum_genes=1, **reading.cells)
        self.messages = target.report.messages()
        self._fit_genes = fitted_names(target)
        if reference is not None:
            source = read_cells(
                reference,
                vocabulary,
                batch_key=reference_batch_key,
                spatial_key=None if reading.spatial_key is None else "spatial",
                minimum_genes=1,
                **other,
            )
            self.messages += [f"Reference: {line}" for line in source.report.messages()]
            # A batch of the reference and one of the panel may have the same name.
            names = np.array([f"{_REFERENCE}{name}" for name in source.batch], object)
            source = dataclasses.replace(source, batch=names)
            return target, source, own_names(reference, vocabulary, other)
        target, source, message = split_by_panel(target)
        self.messages.append(message)
        return target, source, own_names(adata, vocabulary, reading.counts)

    def _wanted(
        self,
        target: CellTable,
        source: CellTable,
        train: np.ndarray,
        genes: Sequence[str] | None,
        names: list[str],
    ) -> np.ndarray:
        """Return int, increasing: the columns of the genes to impute; ``names`` are those of all genes."""
        # A gene that no training cell expresses can be predicted by nothing but 0.
        expressed = np.bincount(source.counts[train].indices, minlength=len(source.genes)) > 0
        lacking = np.flatnonzero(source.measured & ~target.measured & expressed)
        self.imputed = []
        if genes is not None:
            self.imputed, lacking = requested_genes(genes, target, source, lacking)
        if not len(lacking):
            raise InputError(
                f"there is nothing to impute: the panel measures all {int(source.measured.sum())} genes of the "
                "reference in the vocabulary that have counts",
                "a reference with genes outside the panel",
                "Pass another reference, or use Denoiser for measured genes",
            )
        if genes is None and self.genes is not None and len(lacking) > self.genes:
            chosen = variable_genes(sparse.csr_matrix(source.counts[train][:, lacking]), self.genes)
            self.messages.append(
                f"Imputes the {len(chosen)} most variable genes of {len(lacking)} that are missing from the panel."
            )
            lacking = lacking[chosen]
        if not self.imputed:
            self.imputed = [names[i] for i in lacking]
        return lacking

    def _examples_of(
        self, shown: CellTable, truth: CellTable | None, cells: np.ndarray, start: Pretrained
    ) -> list[Layout]:
        return paired(shown, truth, cells, start, self.training, self.batch_rows)

    def _network(
        self,
        table: CellTable,
        layouts: list[Layout],
        cells: np.ndarray,
        shown: np.ndarray,
        columns: np.ndarray,
    ) -> np.ndarray:
        """Return the network's log-normalised predictions, scaled by the input genes, float [cells, columns]."""
        row = self.batch_rows[DECODED_AS]
        mean = decoded_means(self._fitted(), layouts, len(table), row)[cells].astype(np.float64)
        # Over the panel genes only, because the total of the others is unknown in a target.
        total = mean[:, shown].sum(axis=1, keepdims=True)
        return np.log1p(mean[:, columns] * (1e4 / np.maximum(total, 1e-12)))

    def _fit_ridge(
        self, data: RidgeData, train: np.ndarray, valid: np.ndarray, network: np.ndarray | None
    ) -> tuple[np.ndarray | float, np.ndarray | None]:
        """Fit the ridge regressions, choose their weights on validation cells, and refit them with those cells.

        Args:
            data: Reference and target.
            train: Training cells of the reference.
            valid: Validation cells of the reference.
            network: Log-normalised predictions for them; None: there are no validation cells.

        Returns:
            The prediction for the validation cells, log-normalised: mean [imputed genes] and deviation from it [cells,
            imputed genes]; 0 and None without them.
        """
        everything = data.some(np.sort(np.concatenate([train, valid])))
        truth = data.values(data.source, everything, self._columns)
        fitted_on = np.isin(everything, train)
        # One decomposition of the features serves both scales.
        whole, validated = data.problem(everything), (0.0, None)
        part = None if network is None else data.problem(everything[fitted_on])
        for scale, forward in SCALES:
            wanted = forward(truth)
            final = whole.fit(wanted)
            pool, network_mean = [0.5, 0.5], final.bias
            if network is not None and part is not None:
                own_values = forward(network)
                first = part.fit(wanted[fitted_on])
                linear = first.predict(data.values(data.source, valid, data.panel))
                true = forward(data.values(data.source, valid, self._columns))
                pool, chosen = choose_pool(true, own_values, linear, seed=self.training.seed)
                network_mean = own_values.mean(axis=0)
                if scale == LOG:
                    deviation = deviations(own_values, linear, network_mean, first.bias, pool)
                    validated = first.bias, deviation
                    both = around(*validated)
                    methods = {POOLED: both, NETWORK: own_values, RIDGE: linear, MEAN: first.bias}
                    self._compare(method_scores(true, methods), chosen, pool, len(true))
            self.pool[scale] = pool
            self._ridges[scale] = Ridge(
                genes=data.panel.astype(np.int32),
                # The panel's mean in the target replaces that of the reference: it removes the shift between
                # technologies.
                regression=dataclasses.replace(final, centre=data.centre),
                network_mean=np.asarray(network_mean, np.float32),
            )
        return validated

    def _compare(
        self, scores: dict[str, dict], chosen: str, pool: Sequence[float], cells: int
    ) -> None:
        """Store and report the scores of all methods on the validation cells."""
        self.facts["validation"] = scores
        self.facts["method"] = chosen
        pearson = {
            name: scores[name].get("pearson", float("nan")) for name in (POOLED, NETWORK, RIDGE)
        }
        listed = ", ".join(f"{name} {value:.3f}" for name, value in pearson.items())
        self.messages.append(
            f"Mean correlation per gene over {cells} validation cells: {listed} (weights of network and ridge "
            f"regression {pool[0]:.2f} and {pool[1]:.2f}); RMSE {scores[POOLED]['rmse']:.3f}, of the gene mean "
            f"{scores[MEAN]['rmse']:.3f}."
        )
        gain = pearson[POOLED] - pearson[RIDGE]
        if chosen == RIDGE:
            self.messages.append("The network adds nothing here: ridge regression is used alone.")
        elif gain < GAIN:
            self.messages.append(
                f"The network adds nothing here: correlation {gain:+.3f} relative to ridge regression alone."
            )

    def _fit_target(
        self,
        data: RidgeData,
        train: np.ndarray,
        valid: np.ndarray,
        own: np.ndarray,
        mean: np.ndarray | float,
        deviation: np.ndarray,
    ) -> None:
        """Calibrate predictions and their intervals on panel genes that are hidden in the target.

        See :func:`choose_stretch` and :mod:`cellplm_jax.tasks.impute_intervals`.

        Args:
            data: Reference and target.
            train: Training cells of the reference.
            valid: Validation cells of the reference.
            own: Cells of the target with counts.
            mean: Log-normalised predictions for ``valid``: mean [imputed genes],
            deviation: and deviation from it [cells, imputed genes].
        """
        # Each group of hidden genes needs a prediction of these cells, hence a limit.
        cells = data.some(own, HIDDEN_CELLS)
        counted = np.bincount(data.source.counts[train].indices, minlength=len(data.shown)) > 0
        panel = np.random.default_rng(self.training.seed).permutation(
            np.flatnonzero(data.shown & counted)
        )
        references, targets = [], []
        for number in range(HIDDEN_GROUPS):
            hidden = panel[number::HIDDEN_GROUPS]
            shown = data.shown.copy()
            shown[hidden] = False
            if not len(hidden) or not shown.any():
                continue
            reference, target = self._predict_hidden(data, shown, hidden, train, valid, cells)
            references.append(reference)
            targets.append(target)
        # The weights of counts are not changed: hidden genes are predicted on the log scale only.
        stretch = choose_stretch(targets) if self.linear else 1.0
        if stretch != 1.0:
            self.pool[LOG] = [stretch * weight for weight in self.pool[LOG]]
            self.messages.append(
                f"Log-normalised predictions are stretched by {stretch:.2f}: hidden panel genes of the target vary "
                f"{'more' if stretch > 1 else 'less'} than predicted from the reference."
            )
        truth = data.values(data.source, valid, self._columns)
        lower, upper = error_quantiles(truth, around(mean, stretch * deviation))
        quantiles = [error_quantiles(t, around(m, stretch * each)) for t, m, each in references]
        factor = widening(
            np.hstack([true for true, *_ in targets]),
            np.hstack([around(m, stretch * each) for _, m, each in targets]),
            (np.hstack([low for low, _ in quantiles]), np.hstack([high for _, high in quantiles])),
        )
        self._intervals = Intervals(lower, upper, factor)
        self.facts |= {
            "stretch": stretch,
            "interval_factor": float(factor[LEVELS.index(0.9)]),
        }

    def _predict_hidden(
        self,
        data: RidgeData,
        shown: np.ndarray,
        hidden: np.ndarray,
        train: np.ndarray,
        valid: np.ndarray,
        cells: np.ndarray,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Predict hidden panel genes for validation and for target cells.

        Returns:
            For both: truth [cells, hidden], mean of the prediction [hidden], and deviation from it [cells, hidden].
        """
        group = RidgeData(data.source, data.target, shown, train, cells, self.training.seed)
        fitted_on = group.some(train)
        pool = self.pool.get(LOG, [1.0, 0.0])
        regression = None
        if self.linear:
            regression = group.problem(fitted_on).fit(group.values(data.source, fitted_on, hidden))
        found, network_mean = [], None
        for table, chosen in ((data.source, valid), (data.target, cells)):
            predicted = np.zeros((len(chosen), len(hidden)))
            if pool[0] > 0:
                through = seen_through(table, shown)
                layouts = self._examples_of(through, None, chosen, self._fitted())
                predicted = self._network(table, layouts, chosen, shown, hidden)
            if network_mean is None:
                network_mean = predicted.mean(axis=0)
            mean, deviation = np.zeros(len(hidden)), predicted
            if regression is not None:
                linear = regression.predict(group.values(table, chosen, group.panel))
                mean = regression.bias
                deviation = deviations(predicted, linear, network_mean, mean, pool)
                # Validation cells are of the reference and keep its mean; only the target's cells get the mean of the
                # panel.
                regression = dataclasses.replace(regression, centre=group.centre)
            found.append((group.values(table, chosen, hidden), mean, deviation))
        return found

    def _judge(self, data: RidgeData, valid: np.ndarray, predicted: np.ndarray | None) -> None:
        """Compute the confidence of every imputed gene from the predictions for the validation cells."""
        values = np.full(len(self.imputed), np.nan)
        if predicted is not None:
            values = pearson_per_gene(data.values(data.source, valid, self._columns), predicted)
            defined = np.isfinite(values)
            self.facts["mean_confidence"] = float(values[defined].mean()) if defined.any() else 0.0
            self.facts["genes_with_confidence"] = int(defined.sum())
            if not defined.all():
                self.messages.append(
                    f"{int((~defined).sum())} of {len(values)} imputed genes have no confidence: no validation cell "
                    "has a count of them."
                )
        else:
            self.messages.append("No validation cells: the genes have no confidence.")
        self.confidence = pd.Series(values, index=pd.Index(self.imputed, dtype=object))
