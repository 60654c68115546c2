"""Gene imputation: prediction of genes missing from a spatial panel, from a reference that measures them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import sparse

from cellplm_jax._version import __version__
from cellplm_jax.config import FinetuneConfig, MaskingConfig, ModelConfig, ObjectiveConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import FittedGenes, map_genes
from cellplm_jax.errors import InputError, nearest
from cellplm_jax.evaluate.denoising import gene_means, log_normalize
from cellplm_jax.evaluate.imputation import imputation_scores, imputation_table
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
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
    own_vocabulary,
    read_cells,
    variable_genes,
)
from cellplm_jax.tasks.denoise import (
    expected_counts,
    require_counts_decoder,
    require_training_cells,
)
from cellplm_jax.tasks.embed import check_copy, write_copy
from cellplm_jax.tasks.estimator import (
    AS_FITTED,
    DECODER_RECIPE,
    Estimator,
    Reading,
    fitted_names,
    split_cells,
)
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, clean_forward, corrupted_forward
from cellplm_jax.train.linear import LinearRegression, RidgeProblem, pool_predictions

if TYPE_CHECKING:
    from anndata import AnnData

IMPUTED = "cellplm_imputed"
"""Key of ``obsm`` (in files) with the imputed genes."""

FACTS = "cellplm_imputation"
"""Key of ``uns`` with the provenance."""

SHARED_GENES = 10
"""Minimum number of genes shared by panel and reference."""

FEWER_GENES = 0.9
"""Without a reference: batches that measure less than this fraction of all genes are imputed."""

RIDGE_CELLS, RIDGE_GENES = 8192, 2000
"""Maximum number of reference cells and panel genes for fitting the ridge regression."""

_REFERENCE = "reference: "
"""Prefix of the names of the reference's batches, to distinguish them from those of the target."""

_DECODED_AS = "mean of the reference"
"""Name of the decoder row of missing genes."""


class GeneImputer(Estimator):
    """Predicts genes that are missing from a spatial panel.

    Training: for cells of the reference the input is the genes shared with the panel, and all their
    genes are predicted (negative binomial, the means scaled to the cell's total); cells of the panel are trained on
    their own genes, so that the encoder learns their platform and positions. In both, some input genes are also hidden
    (published: .25 of them in .95 of the cells). Each batch has its own decoder row, but the rows of the
    panel's batches are never trained on missing genes: these are decoded with the mean of the reference's rows, and
    scaled so that the shared genes of each cell sum to its measured count.

    The best epoch has the lowest negative log-likelihood of all genes of validation cells of the reference,
    predicted from the panel genes.

    On a few hundred reference cells ridge regression is hard to beat. One is therefore fitted in addition to the
    network, from the log-normalised panel to the missing genes (one to log-normalised values, one to counts), with a
    penalty chosen by leave-one-out and the panel's mean from the target; both predictions are averaged with weights
    fitted to the validation cells (non-negative least squares). ``linear=False`` uses the network only; the
    log-normalised values are then computed from the counts.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture from scratch, over the genes of the data.
        genes: Maximum number of highly variable genes of the reference to impute; None: all measured genes of the
            vocabulary. By default 3,000 from scratch, else all. Genes requested by name in ``fit`` are not counted.
        linear: Average the network with ridge regression.
        quiet: Disable progress output.
        **options: ``genes`` and ``quiet``, and fields of :class:`cellplm_jax.config.FinetuneConfig`: ``epochs``,
            ``learning_rate``, ``seed``... Also ``precision`` and ``devices``; None: as the model.

    Attributes:
        panel: Input genes: those shared by panel and reference. Empty before ``fit``.
        imputed: Predicted genes, as named in the columns of a prediction.
        confidence: Series over ``imputed``: Pearson's correlation, over the validation cells of the reference, of
            measured and predicted log-normalised values, predicted from the panel genes only. It measures how well the
            panel predicts the gene in the reference; it does not account for differences of the target. NaN if
            undefined (a gene that is 0 in all of them, or no validation cells).
        pool: Weights of network and ridge regression, for log-normalised values and for counts; empty without the
            latter.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
    """

    task: ClassVar[str] = "imputation"
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
        **options: Any,
    ):
        super().__init__(model, **options)
        self.linear = linear
        self.pool: dict[str, list[float]] = {}
        self._ridges: dict[str, _Ridge] = {}
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
        batch_key: str | None = None,
        reference_batch_key: str | None = None,
        spatial_key: str | None = "spatial",
        layer: str | None = None,
        gene_key: str | None = None,
        reference_layer: str | None = None,
        reference_gene_key: str | None = None,
        cells_per_context: int | None = None,
    ) -> GeneImputer:
        """Fit to a panel and a reference.

        Args:
            adata: Raw counts of the target cells, usually spatial, over the genes of their panel.
            reference: Raw counts of cells with more genes, dissociated or spatial. None: the batches of
                ``adata`` (see ``batch_key``) with more genes are the reference; a gene without any count in a
                batch is treated as unmeasured in it.
            genes: Names of the genes to impute; None: all genes of the reference outside the panel.
            batch_key: Column of ``obs`` with the batch (tissue section) of each cell; cells attend within it.
            reference_batch_key: The same for the reference; None: one batch.
            spatial_key: Key of ``obsm`` with coordinates; the default one is used if present, also in the reference.
            layer: Layer with the counts; None: search for them.
            gene_key: Column of ``var`` with gene ids; None: the best match.
            reference_layer: As ``layer``, for the reference.
            reference_gene_key: As ``gene_key``, for the reference.
            cells_per_context: Maximum number of cells per context at prediction time; training uses the recipe's limit.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts or genes cannot be used; panel and reference share too few genes; there is nothing
                to impute; requested genes are unknown, missing from the reference, or already measured; or a batch has
                no training cells.
        """
        if self.base is not None:
            require_counts_decoder(self.base)
        self.reading = Reading(
            batch_key, spatial_key, layer, gene_key, "counts", cells_per_context, None
        )
        self.model, self.history, self.facts, self._seen = None, [], {}, None
        target, source = self._tables(
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
        wanted = self._wanted(target, source, train, genes)

        kept = np.union1d(np.flatnonzero(shared), wanted)
        shown, asked = np.isin(kept, np.flatnonzero(shared)), np.isin(kept, wanted)
        target = dataclasses.replace(target.restrict(kept), measured=shown)
        source = dataclasses.replace(source.restrict(kept), measured=np.ones(len(kept), bool))
        both = dataclasses.replace(source, batch=np.concatenate([source.batch, target.batch]))
        start = self._begin(both, self._architecture(), gene_means=gene_means(source.counts[train]))
        start = with_mean_row(start, [self.batch_rows[name] for name in set(source.batch)])
        self.batch_rows[_DECODED_AS] = start.config.decoder.batches - 1
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
        through = seen_through(source, shown)
        judged = self._paired(through, source, valid, start)
        examples = self._paired(through, source, train, start)
        examples += self._paired(seen_through(target, shown), None, own, start)
        self._finetune(
            start,
            loss=imputation_loss(start.config, self.training.masking),
            examples=examples,
            validate=_validation(start.config, judged) if len(valid) else None,
        )
        fitted = self._fitted()
        self.model = with_mean_row(
            fitted, [self.batch_rows[name] for name in set(source.batch)], replace=True
        )
        network = self._on_validation(source, judged, valid) if len(valid) else None
        predicted = None if network is None else np.log1p(network)
        self.pool, self._ridges = {}, {}
        if self.linear:
            predicted = self._fit_ridge(source, target, train, valid, own, network)
        self._judge(source, valid, predicted)
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
    ) -> tuple[CellTable, CellTable]:
        """Read the target cells and the reference, in the columns of one vocabulary."""
        reading = self.reading
        read: dict[str, Any] = {"layer": reading.layer, "gene_key": reading.gene_key}
        other: dict[str, Any] = {"layer": reference_layer, "gene_key": reference_gene_key}
        if self.base is not None:
            vocabulary = self.base.genes
        else:
            vocabulary = own_vocabulary(adata, reading.layer, reading.gene_key, "counts")
            if reference is not None:
                more = own_vocabulary(reference, reference_layer, reference_gene_key, "counts")
                vocabulary = list(dict.fromkeys([*vocabulary, *more]))
        target = read_cells(
            adata,
            vocabulary,
            batch_key=reading.batch_key,
            spatial_key=reading.spatial_key,
            minimum_genes=1,
            **read,
        )
        self.messages = target.report.messages()
        self._names = fitted_names(target)
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
            names = np.array([f"{_REFERENCE}{name}" for name in source.batch], object)
            return target, dataclasses.replace(source, batch=names)
        return self._by_batch(target)

    def _by_batch(self, table: CellTable) -> tuple[CellTable, CellTable]:
        """Split one table into the cells of batches with fewer genes and those of batches with (almost) all."""
        measured = {}
        for name in dict.fromkeys(table.batch):
            counts = table.counts[table.batch == name]
            measured[name] = np.bincount(counts.indices, minlength=len(table.genes)) > 0
        everything = np.any(list(measured.values()), axis=0)
        few = [n for n, own in measured.items() if own.sum() < FEWER_GENES * everything.sum()]
        full = [name for name in measured if name not in few]
        if not few or not full:
            raise InputError(
                f"no reference was given, and none of the {len(measured)} batches measures fewer genes than others",
                f"a reference, or batches of which some measure less than {FEWER_GENES:.0%} of the genes",
                "Pass reference=..., or pass the batches with batch_key",
            )
        self.messages.append(
            f"No reference: {len(full)} batches with all genes are the reference for {len(few)} with fewer."
        )
        parts = []
        for names, combine in ((few, np.any), (full, np.any)):
            rows = np.flatnonzero(np.isin(table.batch, names))
            there = combine([measured[name] for name in names], axis=0)
            parts.append(_cells(table, rows, there))
        return parts[0], parts[1]

    def _wanted(
        self,
        target: CellTable,
        source: CellTable,
        train: np.ndarray,
        genes: Sequence[str] | None,
    ) -> np.ndarray:
        """Return int, increasing: the columns of the genes to impute."""
        expressed = np.bincount(source.counts[train].indices, minlength=len(source.genes)) > 0
        lacking = np.flatnonzero(source.measured & ~target.measured & expressed)
        self.imputed = []
        if genes is not None:
            column = find_genes(genes, source.genes)
            for problem, wrong, expected, remedy in (
                ("are known to neither data nor model", column < 0,
                 "names or Ensembl ids of genes of the reference (and of the pretrained model)",
                 "Correct or remove them"),
                ("are measured by the panel already", target.measured[column],
                 "genes outside the panel",
                 "Remove them (Denoiser is for measured genes), or remove them from the panel to test on them"),
                ("have no counts in the reference's training cells", ~np.isin(column, lacking),
                 "genes that the reference measures",
                 "Remove them, or pass a reference that has them"),
            ):  # fmt: skip
                if wrong.any():
                    names = [str(g) for g, bad in zip(genes, wrong, strict=True) if bad]
                    shown = ", ".join(map(repr, names[:5])) + (" and more" if names[5:] else "")
                    raise InputError(
                        f"{len(names)} of {len(genes)} requested genes {problem}: {shown}",
                        expected,
                        remedy,
                    )
            column, first = np.unique(column, return_index=True)
            self.imputed = [str(genes[i]) for i in first]
            lacking = column
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
            self.imputed = [source.genes[i] for i in lacking]
        return lacking

    def _paired(
        self, shown: CellTable, truth: CellTable | None, cells: np.ndarray, start: Pretrained
    ) -> list[Layout]:
        """Pad input cells with their target cells; None: the input is the target."""
        limit = self.training.cells_per_context or None
        contexts = contexts_of(shown.batch, cells, limit=limit)
        layouts = [
            make_examples(
                table,
                contexts,
                start.config,
                batch_rows=self.batch_rows,
                cells_per_step=self.training.cells_per_step,
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

    def _on_validation(
        self, source: CellTable, judged: list[Layout], valid: np.ndarray
    ) -> np.ndarray:
        """Return the network's predictions for validation cells, counts per 10,000 of the panel [cells, imputed]."""
        model = self._fitted()
        decode = jax.jit(lambda params, example: _means(params, example, model.config))
        params = jax.device_put(model.params)
        row = self.batch_rows[_DECODED_AS]
        outputs = []
        for layout in judged:
            batch = layout.example.batch
            batch = batch.replace(batch=jnp.full_like(batch.batch, row))
            means = decode(params, layout.example.replace(batch=batch))
            outputs.append(jax.device_get(means))
        mean = gather(judged, outputs, len(source))[valid].astype(np.float64)
        panel = mean[:, np.isin(source.genes, self.panel)].sum(axis=1, keepdims=True)
        return mean[:, self._columns] * (1e4 / np.maximum(panel, 1e-12))

    def _fit_ridge(
        self,
        source: CellTable,
        target: CellTable,
        train: np.ndarray,
        valid: np.ndarray,
        own: np.ndarray,
        network: np.ndarray | None,
    ) -> np.ndarray | None:
        """Fit the ridge regressions, compute their weights on validation cells, and refit them with those cells.

        Args:
            source: The reference.
            target: The target cells, in the same columns.
            train: Training cells of the reference.
            valid: Validation cells of the reference.
            own: Cells of the target with counts.
            network: From :meth:`_on_validation`; None: there are no validation cells.

        Returns:
            The averaged prediction for the validation cells: log-normalised, float [cells, imputed genes]; None without
            validation cells.
        """
        shown = np.isin(source.genes, self.panel)
        panel = np.flatnonzero(shown)
        if len(panel) > RIDGE_GENES:
            panel = panel[variable_genes(source.counts[train][:, panel], RIDGE_GENES)]
        generator = np.random.default_rng(self.training.seed)

        def some(cells: np.ndarray) -> np.ndarray:
            if len(cells) <= RIDGE_CELLS:
                return cells
            return np.sort(generator.choice(cells, RIDGE_CELLS, replace=False))

        def values(table: CellTable, cells: np.ndarray, columns: np.ndarray) -> np.ndarray:
            total = _panel_totals(table, shown, cells)
            counts = sparse.csr_matrix(table.counts[cells])[:, columns]
            return log_normalize(counts, total=total).toarray().astype(np.float32)

        centre = values(target, some(own), panel).mean(axis=0)
        everything = some(np.sort(np.concatenate([train, valid])))
        features, truth = (
            values(source, everything, panel),
            values(source, everything, self._columns),
        )
        fitted_on = np.isin(everything, train)
        judged = values(source, valid, panel), values(source, valid, self._columns)
        whole, validated = RidgeProblem(features), None
        part = None if network is None else RidgeProblem(features[fitted_on])
        for scale, forward in _SCALES:
            wanted = forward(truth)
            final = whole.fit(wanted)
            pool, network_mean = [0.5, 0.5], final.bias
            if network is not None and part is not None:
                own_values = forward(np.log1p(network))
                first = part.fit(wanted[fitted_on])
                linear = first.predict(judged[0])
                true = forward(judged[1])
                pool = pool_predictions(true, own_values, linear)
                network_mean = own_values.mean(axis=0)
                pooled = _pooled(own_values, linear, network_mean, first.bias, pool)
                if scale == LOG:
                    validated = pooled
                    self._tell_scores(true, own_values, linear, pooled, pool)
            self.pool[scale] = pool
            self._ridges[scale] = _Ridge(
                genes=panel.astype(np.int32),
                regression=dataclasses.replace(final, centre=centre.astype(np.float32)),
                network_mean=np.asarray(network_mean, np.float32),
            )
        return validated

    def _tell_scores(
        self,
        truth: np.ndarray,
        network: np.ndarray,
        linear: np.ndarray,
        pooled: np.ndarray,
        pool: Sequence[float],
    ) -> None:
        """Log the scores of network, ridge regression and their average on the validation cells."""
        scores = {
            name: _mean_pearson(truth, values)
            for name, values in (("network", network), ("linear", linear), ("pooled", pooled))
        }
        self.facts["validation_pearson"] = scores
        self.messages.append(
            f"Correlation per gene over {len(truth)} validation cells: network {scores['network']:.3f}, "
            f"ridge regression {scores['linear']:.3f}, pooled {scores['pooled']:.3f} "
            f"(weights {pool[0]:.2f} and {pool[1]:.2f})."
        )

    def _judge(self, source: CellTable, valid: np.ndarray, predicted: np.ndarray | None) -> None:
        """Compute the confidence of every imputed gene from the predictions for the validation cells."""
        values = np.full(len(self.imputed), np.nan)
        if predicted is not None:
            total = _panel_totals(source, np.isin(source.genes, self.panel), valid)
            truth = log_normalize(
                sparse.csr_matrix(source.counts[valid])[:, self._columns], total=total
            )
            values = pearson_per_gene(truth, predicted)
            self.facts["mean_confidence"] = (
                float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
            )
        else:
            self.messages.append("No validation cells: the genes have no confidence.")
        self.confidence = pd.Series(values, index=pd.Index(self.imputed, dtype=object))

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        genes: Sequence[str] | None = None,
        log_normalized: bool = False,
        layer_added: str | None = None,
        batch_key: str | None = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        cells_per_context: int | None = AS_FITTED,
    ) -> pd.DataFrame:
        """Predict the genes missing from the panel.

        Writes:
            ``layers[layer_added]``, if requested: dense float32 [n_obs, n_vars], the prediction in the columns of
            ``var`` that are imputed genes, NaN in the others; ``uns["cellplm_imputation"]``.

        Args:
            adata: The cells. Keys default to those of ``fit``. Only the panel genes are used: measured
                values of imputed genes do not affect the prediction.
            genes: Subset of ``imputed``; None: all.
            log_normalized: Return values on the scale of log1p of the counts, scaled so that the panel genes of each
                cell sum to 10,000, instead of counts.
            layer_added: Name of an additional layer to write.
            batch_key: See :meth:`fit`.
            spatial_key: See :meth:`fit`.
            layer: See :meth:`fit`.
            gene_key: See :meth:`fit`.
            cells_per_context: See :meth:`fit`.

        Returns:
            float32 [cells, genes], rows named as the cells: expected counts, on the scale of the cell's own counts.

        Raises:
            InputError: The estimator is not fitted, requested genes are not imputed, or the counts, genes
                or keys cannot be used.
        """
        reading = self.reading.changed(
            batch_key=batch_key, spatial_key=spatial_key, layer=layer, gene_key=gene_key,
            cells_per_context=cells_per_context,
        )  # fmt: skip
        places = self._places(genes)
        column = None
        if layer_added is not None:
            column = self._layer_columns(adata, layer_added, reading, places)
        frame, _, facts, _ = self._imputed(adata, reading, places, log_normalized)
        if column is not None:
            data: Any = adata
            values = np.full(data.shape, np.nan, np.float32)
            values[:, column >= 0] = frame.to_numpy()[:, column[column >= 0]]
            data.layers[layer_added] = values
            data.uns[FACTS] = facts
        return frame

    def predict_file(
        self,
        path: str | os.PathLike,
        out: str | os.PathLike,
        *,
        genes: Sequence[str] | None = None,
        log_normalized: bool = False,
        key_added: str = IMPUTED,
        **keys: Any,
    ) -> list[str]:
        """Predict the cells of an ``.h5ad`` file and write a copy with the results.

        Writes:
            ``obsm[key_added]``: the table of :meth:`predict`; ``uns["cellplm_imputation"]``: its genes and their
            confidence, model, contexts.

        Args:
            path: Input; never changed.
            out: Output, written atomically.
            genes: See :meth:`predict`.
            log_normalized: See :meth:`predict`.
            key_added: Key of ``obsm``.
            **keys: As for :meth:`predict`.

        Returns:
            Messages about the input, one per line.

        Raises:
            InputError: As in :meth:`predict`; also if ``out`` cannot be written.
        """
        path, out = Path(path).expanduser(), Path(out).expanduser()
        check_copy(path, out)
        frame, _, facts, messages = self._imputed(
            path, self.reading.changed(**keys), self._places(genes), log_normalized
        )
        write_copy(path, out, obsm={key_added: frame}, uns={FACTS: facts})
        return messages

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        truth: AnnData | str | os.PathLike | None = None,
        **keys: Any,
    ) -> dict[str, float]:
        """Predict, and compare with measured values of imputed genes; ``adata`` is not modified.

        Args:
            adata: The cells; only their panel genes are used for the prediction.
            truth: The same cells with counts of imputed genes; None: ``adata`` itself has them.
            **keys: As for :meth:`predict`.

        Returns:
            The scores of :func:`cellplm_jax.evaluate.imputation.imputation_scores` of log-normalised values (both
            scaled by the cell's total over the panel).

        Raises:
            InputError: As in :meth:`predict`, the cells differ, or truth measures no imputed gene.
        """
        true, predicted = self._compared(adata, truth, keys)
        return imputation_scores(true, predicted.to_numpy(), list(predicted.columns))

    def score_genes(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        truth: AnnData | str | os.PathLike | None = None,
        **keys: Any,
    ) -> pd.DataFrame:
        """Score each gene separately; see :meth:`score`.

        Args:
            adata: See :meth:`score`.
            truth: See :meth:`score`.
            **keys: See :meth:`score`.

        Returns:
            Rows are genes; columns ``pearson``, ``cosine``, ``rmse``, ``mae`` and the ``confidence`` of the fit.

        Raises:
            InputError: As in :meth:`score`.
        """
        true, predicted = self._compared(adata, truth, keys)
        table = imputation_table(true, predicted.to_numpy(), list(predicted.columns))
        return table.assign(confidence=self.confidence.reindex(table.index))

    def beside_measured(
        self,
        adata: AnnData | str | os.PathLike,
        imputed: pd.DataFrame,
        *,
        log_normalized: bool = False,
        pairs: int = 3,
        **keys: Any,
    ) -> BesideMeasured:
        """Compare a prediction with measured genes of the same cells, for visualisation; runs no new prediction.

        If the cells measure imputed genes (the prediction never uses those), each of these is compared
        with itself. Otherwise an imputed gene is paired with the most correlated panel gene, so that its spatial
        pattern can be judged by the known one.

        Args:
            adata: The cells, as for :meth:`predict`.
            imputed: Result of :meth:`predict` for them.
            log_normalized: Whether it has log-normalised values.
            pairs: Number of pairs: of measured genes the most and the least confident and those
                between, of others the most confident.
            **keys: As for :meth:`predict`.

        Returns:
            Correlations of measured genes, and the pairs.

        Raises:
            InputError: The cells cannot be read, or do not match the prediction.
        """
        model = self._fitted()
        reading = self.reading.changed(**keys)
        table = read_cells(
            adata,
            model.genes,
            layer=reading.layer,
            gene_key=reading.gene_key,
            spatial_key=None,
            minimum_genes=0,
        )
        if len(table) != len(imputed):
            raise InputError(
                f"{len(table)} cells and a prediction for {len(imputed)}",
                "the prediction for these cells",
                "Pass the result of predict for them",
            )
        shown = np.isin(model.genes, self.panel)
        total = _panel_totals(table, shown, np.arange(len(table)))
        columns = self._columns[self._places(list(imputed.columns))]
        order = np.argsort(-self.confidence.reindex(imputed.columns).fillna(-2.0), kind="stable")
        counted = np.bincount(table.counts.indices, minlength=len(model.genes)) > 0

        def logs(genes: np.ndarray) -> np.ndarray:
            return log_normalize(sparse.csr_matrix(table.counts[:, genes]), total=total).toarray()

        def predicted(places: np.ndarray) -> np.ndarray:
            values = imputed.iloc[:, places].to_numpy(np.float64)
            return values if log_normalized else log_normalize(values, total=total)

        there = np.array([place for place in order if counted[columns[place]]], int)
        if len(there):
            truth, values = logs(columns[there]), predicted(there)
            pearson = pearson_per_gene(truth, values)
            chosen = np.unique(np.linspace(0, len(there) - 1, min(pairs, len(there))).round())
            found = [
                Beside(name := str(imputed.columns[there[n]]), values[:, n], name, truth[:, n])
                for n in chosen.astype(int)
            ]
            return BesideMeasured(pd.Series(pearson, index=imputed.columns[there]), found)
        places, panel = np.asarray(order[:pairs], int), np.flatnonzero(shown & counted)
        found = []
        if len(panel):
            values, measured = predicted(places), logs(panel)
            for number, place in enumerate(places):
                own = np.broadcast_to(values[:, [number]], measured.shape)
                close = np.nan_to_num(pearson_per_gene(measured, own), nan=-2.0).argmax()
                name = str(model.genes[panel[close]])
                found.append(
                    Beside(str(imputed.columns[place]), own[:, 0], name, measured[:, close])
                )
        return BesideMeasured(pd.Series(dtype=float), found)

    def _compared(
        self, adata: Any, truth: Any, keys: dict[str, Any]
    ) -> tuple[np.ndarray, pd.DataFrame]:
        """Return log-normalised truth [cells, genes] and prediction, over the measured genes of truth."""
        model = self._fitted()
        reading = self.reading.changed(**keys)
        known = read_cells(
            adata if truth is None else truth,
            model.genes,
            layer=reading.layer,
            gene_key=reading.gene_key,
            spatial_key=None,
            minimum_genes=0,
        )
        places = np.flatnonzero(known.measured[self._columns])
        if not len(places):
            raise InputError(
                f"truth measures none of the {len(self.imputed)} imputed genes",
                "counts of some of them to compare with",
                "Pass the AnnData with these counts as truth",
            )
        frame, total, _, _ = self._imputed(adata, reading, places, True)
        if list(known.obs.index.astype(str)) != list(frame.index):
            raise InputError(
                f"truth has {len(known)} cells and adata {len(frame)}, or other names",
                "the same cells in the same order",
                "Select them the same way first",
            )
        counts = known.counts[:, self._columns[places]]
        return log_normalize(sparse.csr_matrix(counts), total=total).toarray(), frame

    def _places(self, genes: Sequence[str] | None) -> np.ndarray:
        """Return int: positions of the requested genes in ``imputed``."""
        model = self._fitted()
        if genes is None:
            return np.arange(len(self.imputed))
        by_name = {name: place for place, name in enumerate(self.imputed)}
        by_column = {int(column): place for place, column in enumerate(self._columns)}
        found = find_genes(genes, model.genes)
        places = [
            by_name.get(str(g), by_column.get(int(c), -1))
            for g, c in zip(genes, found, strict=True)
        ]
        missing = [str(g) for g, place in zip(genes, places, strict=True) if place < 0]
        if missing:
            shown = ", ".join(map(repr, missing[:5])) + (" and more" if missing[5:] else "")
            raise InputError(
                f"{len(missing)} of {len(genes)} requested genes are not imputed: {shown}",
                f"some of the {len(self.imputed)} genes in .imputed, such as {self.imputed[0]!r}",
                nearest(missing[0], by_name, "Remove them, or fit again with genes=[...]"),
            )
        return np.array(places, int)

    def _imputed(
        self, data: Any, reading: Reading, places: np.ndarray, log_normalized: bool
    ) -> tuple[pd.DataFrame, np.ndarray, dict[str, Any], list[str]]:
        """Return the prediction, totals over the panel float [cells], facts, and messages about the input."""
        model = self._fitted()
        if self._seen is None:
            self._seen = panel_model(model, self.panel)
        z, facts, messages = self._embed(data, reading, model=self._seen)
        scale = LOG if log_normalized else COUNTS
        ridge = self._ridges.get(scale)
        values, total = np.zeros((len(z), len(places)), np.float32), np.zeros(len(z))
        with open_counts(
            data, self._seen.genes, layer=reading.layer, gene_key=reading.gene_key
        ) as source:
            measured = np.asarray(source.measured)
            names = list(source.obs_names)
            start = 0
            for block in source.blocks(4096):
                piece = slice(start, start + block.shape[0])
                total[piece] = np.asarray(block.sum(axis=1)).ravel()
                if ridge is not None:
                    linear = self._linear_prediction(ridge, block, total[piece], measured)
                    values[piece] = linear[:, places]
                start = piece.stop
        over = np.isin(model.genes, np.array(self.panel, object)[measured].astype(str))
        row = np.full(len(z), _DECODED_AS, object)
        for piece, output in self._decode(z, batch=row):
            own = expected_counts(output, total[piece], over)[:, self._columns[places]]
            if log_normalized:
                own = log_normalize(own, total=total[piece])
            if ridge is not None:
                size = 1.0 if log_normalized else total[piece, None] / 1e4
                own = size * _pooled(
                    own / np.maximum(size, 1e-12),
                    values[piece],
                    ridge.network_mean[places],
                    ridge.regression.bias[places],
                    self.pool[scale],
                )
            values[piece] = own
        columns = [self.imputed[place] for place in places]
        frame = pd.DataFrame(
            values, index=pd.Index(names, dtype=object), columns=pd.Index(columns, dtype=object)
        )
        facts = {
            "model": model.id,
            "version": __version__,
            "log_normalized": log_normalized,
            "genes": columns,
            "confidence": self.confidence.to_numpy(float)[places],
            "panel_genes": int(measured.sum()),
            **facts,
        }
        return frame, total, facts, messages

    def _linear_prediction(
        self, ridge: _Ridge, panel: sparse.csr_matrix, total: np.ndarray, measured: np.ndarray
    ) -> np.ndarray:
        """Return float32 [cells, imputed genes] from counts over the panel [cells, panel] with sums ``total``."""
        place = {gene: column for column, gene in enumerate(self.panel)}
        columns = np.array([place[self._fitted().genes[i]] for i in ridge.genes])
        features = log_normalize(sparse.csr_matrix(panel[:, columns]), total=total).toarray()
        # An unmeasured gene is set to its mean, which has no effect.
        unknown = ~measured[columns]
        features[:, unknown] = ridge.regression.centre[unknown]
        return ridge.regression.predict(features)

    def _layer_columns(
        self, adata: Any, layer_added: str, reading: Reading, places: np.ndarray
    ) -> np.ndarray:
        """Return int [n_vars]: position of each gene of ``var`` among ``places``; -1: none."""
        if not layer_added or "/" in layer_added:
            raise InputError(f"layer_added={layer_added!r}", "a name without '/'", "Choose another")
        key = reading.gene_key or "var_names"
        with open_counts(adata, self._fitted().genes, layer=reading.layer, minimum_genes=0,
                         gene_key=reading.gene_key) as source:  # fmt: skip
            column = source.report.genes.column
            key = source.report.gene_key
        where = {int(self._columns[place]): number for number, place in enumerate(places)}
        positions = np.array([where.get(int(gene), -1) for gene in column], int)
        if len(positions) != getattr(adata, "n_vars", -1) or (positions < 0).all():
            raise InputError(
                f"layer_added='{layer_added}', and no gene of var ({key}) is imputed",
                "an AnnData with (empty) columns for imputed genes",
                "Omit layer_added and use the table that predict returns",
            )
        return positions

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state = {
            "panel": self.panel,
            "imputed": self.imputed,
            "linear": self.linear,
            "pool": self.pool,
        }
        arrays = {
            "columns": self._columns,
            "confidence": self.confidence.to_numpy(np.float64),
        }
        for scale, ridge in self._ridges.items():
            arrays |= {f"{scale}/{name}": value for name, value in ridge.arrays().items()}
        return state, arrays

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.panel, self.imputed = list(state["panel"]), list(state["imputed"])
        self._columns = np.asarray(arrays["columns"], int)
        index = pd.Index(self.imputed, dtype=object)
        self.confidence = pd.Series(np.asarray(arrays["confidence"], float), index=index)
        self.linear, self.pool = state["linear"], dict(state["pool"])
        self._ridges = {
            scale: _Ridge.of(
                {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{scale}/")}
            )
            for scale in self.pool
        }


@dataclass(frozen=True, eq=False)
class Beside:
    """An imputed gene and a measured one in the same cells.

    Attributes:
        gene: The imputed gene.
        imputed: float [cells], log-normalised by the panel counts of each cell.
        other: The measured gene; the same one if it was measured.
        measured: float [cells], on the same scale.
    """

    gene: str
    imputed: np.ndarray
    other: str
    measured: np.ndarray


@dataclass(frozen=True, eq=False)
class BesideMeasured:
    """Comparison of a prediction with measured values, from :meth:`GeneImputer.beside_measured`.

    Attributes:
        pearson: Correlation over the cells of imputed and measured log-normalised values, by measured imputed gene,
            the most confident first; empty if the cells measure none.
        pairs: Some pairs of genes to show.
    """

    pearson: pd.Series
    pairs: list[Beside]


LOG, COUNTS = "log_normalized", "counts"
"""Scales of a prediction, as in ``GeneImputer.pool``."""

_SCALES = ((LOG, np.asarray), (COUNTS, np.expm1))


@dataclass(frozen=True, eq=False)
class _Ridge:
    """A ridge regression that complements the network.

    Attributes:
        genes: int32 [features], columns of its panel genes.
        regression: From their log-normalised values to the imputed genes; centred on the target.
        network_mean: float32 [imputed genes], mean of the network's predictions on the reference.
    """

    genes: np.ndarray
    regression: LinearRegression
    network_mean: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        own = {"genes": self.genes, "network_mean": self.network_mean}
        return own | {name: getattr(self.regression, name) for name in _REGRESSION}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> _Ridge:
        """Restore an instance from :meth:`arrays`."""
        regression = LinearRegression(*(arrays[name] for name in _REGRESSION))
        return cls(arrays["genes"], regression, arrays["network_mean"])


_REGRESSION = ("centre", "scale", "kernel", "bias")


def _pooled(
    network: np.ndarray, linear: np.ndarray, network_mean: np.ndarray, mean: np.ndarray, pool: Any
) -> np.ndarray:
    """Return the gene's mean plus the weighted deviations of both predictions, clipped at 0."""
    return np.maximum(mean + pool[0] * (network - network_mean) + pool[1] * (linear - mean), 0.0)


def _mean_pearson(truth: np.ndarray, values: np.ndarray) -> float:
    """Return the mean over the genes with a defined correlation; NaN if there are none."""
    correlation = pearson_per_gene(truth, values)
    return (
        float(correlation[np.isfinite(correlation)].mean())
        if np.isfinite(correlation).any()
        else float("nan")
    )


def _panel_totals(table: CellTable, shown: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the counts of cells over the input genes, float64 [cells]."""
    counts = sparse.csr_matrix(table.counts[cells])[:, np.flatnonzero(shown)]
    return np.asarray(counts.sum(axis=1), np.float64).ravel()


_STORED = ("indptr", "gene", "count")
"""Fields of a batch with its counts."""


def find_genes(genes: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """Return int [genes]: the position of each name in a vocabulary, by the rules for gene names; -1: none.

    Args:
        genes: Ensembl ids or symbols, or names as they are in the vocabulary.
        vocabulary: Names.

    Raises:
        InputError: ``genes`` is a single name instead of a list.
    """
    if isinstance(genes, str) or not len(genes):
        raise InputError(f"genes={genes!r}", "a list of gene names", "Pass genes=['NAME', ...]")
    return np.asarray(map_genes([str(gene) for gene in genes], vocabulary, minimum=0).column, int)


def seen_through(table: CellTable, shown: np.ndarray) -> CellTable:
    """Return the cells with the counts of some genes only; ``measured`` is not changed.

    Args:
        table: The cells.
        shown: bool [genes].
    """
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
    card, source = dict(model.card), model.source
    genes = model.genes.subset(panel) if isinstance(model.genes, FittedGenes) else list(panel)
    return Pretrained(
        config, unflatten_dict(flat), genes, card, source, model.step,
        precision=model.precision, devices=model.devices,
    )  # fmt: skip


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
            mean = np.asarray(leaf)[sorted(rows)].mean(axis=0, keepdims=True)
            flat[path] = np.concatenate([leaf[:-1] if replace else leaf, mean])
    config = model.config
    if not replace:
        decoder = dataclasses.replace(config.decoder, batches=config.decoder.batches + 1)
        config = dataclasses.replace(config, decoder=decoder)
    return Pretrained(
        config, unflatten_dict(flat), model.genes, dict(model.card), model.source, model.step,
        precision=model.precision, devices=model.devices,
    )  # fmt: skip


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


def _validation(config: ModelConfig, judged: list[Layout]) -> Any:
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
        values, weights = np.array(jax.device_get(sums)).T
        nll = float((values * weights).sum() / weights.sum())
        return {SCORE: -nll, LOSS: nll}

    return validate


def _cells(table: CellTable, rows: np.ndarray, measured: np.ndarray) -> CellTable:
    """Return selected cells of a table, with their measured genes."""
    return dataclasses.replace(
        table,
        counts=sparse.csr_matrix(table.counts[rows]),
        batch=table.batch[rows],
        coordinates=None if table.coordinates is None else table.coordinates[rows],
        obs=table.obs.iloc[rows],
        measured=measured,
    )
