"""Cell type annotation: a fine-tuned classifier, or label transfer from nearest neighbours."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import log_softmax, softmax

from cellplm_jax._version import __version__
from cellplm_jax.config import FinetuneConfig, HeadConfig, MaskingConfig, ModelConfig
from cellplm_jax.data.anndata_io import Values, open_counts
from cellplm_jax.errors import InputError, require
from cellplm_jax.evaluate.annotation import (
    annotation_scores,
    brier_score,
    confusion_counts,
    expected_calibration_error,
    macro_f1,
)
from cellplm_jax.evaluate.embedding import umap_coordinates
from cellplm_jax.losses.objectives import average_over, classification_loss
from cellplm_jax.model.cellplm import CellPLM
from cellplm_jax.model.masking import follow_cells
from cellplm_jax.tasks.contexts import CellTable, Layout, gather, labels_of, variable_genes
from cellplm_jax.tasks.estimator import (
    AS_FITTED,
    Estimator,
    Reading,
    Training,
    parts_of,
    split_cells,
)
from cellplm_jax.tasks.files import as_anndata, check_copy, write_copy
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, clean_forward, corrupted_forward
from cellplm_jax.train.linear import (
    LinearClassifier,
    fit_linear_classifier,
    pool_log_probabilities,
)

if TYPE_CHECKING:
    from anndata import AnnData

UNKNOWN = "unknown"
"""Label of cells with a confidence below the threshold."""

LABEL, CONFIDENCE, PROBABILITIES = (
    "cellplm_cell_type",
    "cellplm_confidence",
    "cellplm_probabilities",
)
"""Keys written by ``predict`` to ``obs``, ``obs`` and ``obsm``."""

FACTS = "cellplm_annotation"
"""Key written to ``uns``."""


UMAP_NEIGHBORS = 15
"""Number of neighbours of the graph for UMAP; with no more cells than that, UMAP is omitted."""

LINEAR_GENES = 3000
"""Maximum number of highly variable genes used by the logistic regression."""

LINEAR_CELLS = 4096
"""Number of cells per application of the logistic regression."""

POOL, POOL_CELLS = (0.25, 0.75), 200.0
"""Prior weights of network and logistic regression, and the number of validation cells they are worth.

Validation cells come from the batches of the training cells, in which the network is better than in new ones; and the
logistic regression is refitted with the validation cells, the network is not.
"""

LINEAR_PENALTY = 3.0
"""L2 penalty of the logistic regression (scikit-learn's 1 / C)."""


HEAD_PENALTIES = (10.0, 1.0, 100.0)
"""L2 penalties that the head is solved with; the first one if there are no validation cells."""


class CellTypeAnnotator(Estimator):
    """Predicts the cell type of every cell.

    ``method="finetune"`` adds a linear head to a deterministic latent and fine-tunes the complete model on labelled
    cells with the published recipe. The head of a pretrained model is initialised with the exact logistic regression on
    its latent, and the fine-tuned weights are kept only if they score better on validation cells.
    ``method="neighbors"`` needs no training: cells get the label of their nearest labelled cells in the embedding of
    the pretrained model.

    On a few thousand cells a logistic regression on highly variable genes is hard to beat. One is therefore fitted on
    log1p counts in addition to the network, and their log-probabilities are added with weights fitted to the
    validation cells, which also calibrates them. ``linear=False`` uses the network only (published).

    Inductive by default: cells to predict are in no training context, and they attend to each other
    only. If ``fit`` was called with a ``split_key``, ``predict`` also separates its values.

    Differences from the published recipe: up to 200 epochs and patience 50 instead of 2000 and 200,
    so that 2,000 cells take minutes on two CPU cores; the latent of a pretrained model is initialised with its map to
    the mean of q(z|x) instead of at random; the plateau schedule uses the validation loss; ties of the validation F1
    are broken by that loss; highly variable genes are only selected when training from scratch.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture from scratch, over the genes of the data.
        method: ``"finetune"`` or ``"neighbors"``.
        unknown_threshold: Cells with a lower confidence are labelled "unknown"; None: every cell gets a label.
        class_weights: Weight of each cell in the loss by its label; ``"balanced"``: all labels have the same total
            weight; None: all cells have the same weight.
        neighbors: For ``"neighbors"``: number of voting labelled cells, weighted by inverse distance.
        linear: For ``"finetune"``: average the network with a logistic regression.
        genes: Number of highly variable genes to fit on; None: all; default: 3,000 from scratch, else all.
        quiet: Disable progress output.
        **training: Fields of :class:`cellplm_jax.config.FinetuneConfig`: ``epochs``, ``patience``, ``learning_rate``,
            ``freeze``, ``adapter_rank``, ``layer_decay``, ``validation_fraction``, ``seed`` and so on. Also
            ``precision`` of the matrix products and ``devices`` that share the cells; None: as the model.

    Attributes:
        labels: The classes, sorted; the columns of the probabilities. Empty before ``fit``.
        temperature: Divisor of the network's logits, fitted to the validation cells; 1 without any.
        pool: Weights of the log-probabilities of network and logistic regression; empty without the latter.
        validation: Label codes of the validation cells of a fit, int [cells], and their predicted probabilities,
            float [cells, labels]. Temperature and pool were fitted to these cells. None: there are
            none, or the estimator was loaded; they are not saved.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
        InputError: A value is invalid, or the options contradict each other.
    """

    task: ClassVar[str] = "annotation"
    recipe: ClassVar[FinetuneConfig] = FinetuneConfig(
        masking=MaskingConfig(cell_fraction=0.75, gene_fraction=0.25, drop_cells=0.3)
    )

    def __init__(
        self,
        model: Pretrained | str | os.PathLike | None = None,
        *,
        method: Literal["finetune", "neighbors"] = "finetune",
        unknown_threshold: float | None = None,
        class_weights: Literal["balanced"] | Mapping[str, float] | None = None,
        neighbors: int = 15,
        linear: bool = True,
        genes: int | Literal["default"] | None = "default",
        quiet: bool = False,
        **training: Unpack[Training],
    ):
        super().__init__(model, genes=genes, quiet=quiet, **training)
        if method not in ("finetune", "neighbors"):
            raise InputError(f"method={method!r}", "'finetune' or 'neighbors'", "Use one of them")
        if method == "neighbors":
            require("sklearn", "eval", "method='neighbors'")
        if unknown_threshold is not None and not 0.0 <= unknown_threshold <= 1.0:
            raise InputError(
                f"unknown_threshold={unknown_threshold}",
                "a confidence between 0 and 1, or None",
                "Choose a value in between",
            )
        if neighbors < 1:
            raise InputError(f"neighbors={neighbors}", "at least 1", "Raise it")
        self.method: str = method
        self.unknown_threshold = unknown_threshold
        self.class_weights = class_weights
        self.neighbors = neighbors
        self.linear = linear
        self.labels: list[str] = []
        self.temperature = 1.0
        self.pool: list[float] = []
        self._linear: LinearClassifier | None = None
        self._linear_genes = np.zeros(0, int)
        self._reference: tuple[np.ndarray, np.ndarray] | None = None
        self.validation: tuple[np.ndarray, np.ndarray] | None = None

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        label_key: str,
        batch_key: str | None = None,
        split_key: str | None = None,
        spatial_key: str | None = "spatial",
        layer: str | None = None,
        gene_key: str | None = None,
        feature_type: str | None = None,
        values: Values = "counts",
        cells_per_context: int | None = None,
        transductive: bool = False,
        unseen_labels: Literal["error", "ignore"] = "error",
    ) -> CellTypeAnnotator:
        """Fit to labelled cells.

        Cells without a label (NaN) are omitted from training, and counted in ``messages``.

        Args:
            adata: Raw counts and labels.
            label_key: Column of ``obs`` with the cell types.
            batch_key: Column of ``obs`` with the batch (tissue sample) of each cell; cells attend within it.
            split_key: Column of ``obs`` with ``"train"``, ``"valid"`` and any other value for unused cells; None: a
                tenth of the cells, stratified by label, is used for validation.
            spatial_key: Key of ``obsm`` with coordinates; the default one is used if present.
            layer: Layer with the counts; None: search for them.
            gene_key: Column of ``var`` with gene ids; None: the best match.
            feature_type: Type of the features to read; None: genes; "all": every feature.
            values: Kind of values; see :func:`cellplm_jax.embed`.
            cells_per_context: Maximum number of cells per context at prediction time; training uses the recipe's limit.
            transductive: Put all cells of ``adata`` into the training contexts, non-training cells without their
                label, and predict with complete batches as contexts.
            unseen_labels: Treatment of labels among validation or other cells of ``split_key`` that do not occur
                among the training cells: an error, or omit those cells.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts, genes or labels cannot be used; the message states the remedy.
        """
        reading = Reading(
            batch_key, spatial_key, layer, gene_key, values, cells_per_context,
            None if transductive else split_key, feature_type,
        )  # fmt: skip
        table = self._read(adata, reading)
        named = labels_of(table.obs, label_key)
        usable = np.array([name is not None for name in named], bool)
        if not usable.any():
            raise InputError(
                f"obs['{label_key}'] is missing for all {len(table)} cells",
                "labels for the cells to fit on",
                "Use another column, or fill it",
            )
        if not usable.all():
            self.messages.append(
                f"{int((~usable).sum())} of {len(table)} cells have no label in '{label_key}' and were omitted from "
                "training."
            )
        train, valid = split_cells(
            table,
            split_key,
            usable=usable,
            strata=named,
            fraction=0.0 if self.method == "neighbors" else self.training.validation_fraction,
            seed=self.training.seed,
        )
        self.labels = sorted(set(named[train]))
        if len(self.labels) < 2:
            raise InputError(
                f"the {len(train)} training cells all have the label '{self.labels[0]}'",
                "at least two cell types",
                f"Check obs['{label_key}'], or give more cells",
            )
        self._check_unseen(named, usable, label_key, unseen_labels)
        codes = self._codes(named)
        valid = valid[codes[valid] >= 0]
        if transductive:
            _require_training_cells(table, train)
        self.facts = {
            "label_key": label_key,
            "cells": len(table),
            "training_cells": len(train),
            "validation_cells": len(valid),
            "unlabelled_cells": int((~usable).sum()),
            "transductive": transductive,
        }
        if self.method == "neighbors":
            self._fit_neighbors(adata, table, train, codes)
        else:
            self._fit_head(table, train, valid, codes, transductive)
        self._log_messages()
        return self

    def _check_unseen(
        self, named: np.ndarray, usable: np.ndarray, label_key: str, unseen_labels: str
    ) -> None:
        unseen = sorted(set(named[usable]) - set(self.labels))
        if not unseen:
            return
        number = int(np.isin(named, unseen).sum())
        listed = ", ".join(map(repr, unseen[:5])) + (" and others" if len(unseen) > 5 else "")
        if unseen_labels == "ignore":
            self.messages.append(
                f"{number} cells with labels outside the training cells were omitted: {listed}."
            )
            return
        raise InputError(
            f"{number} cells are labelled {listed} in obs['{label_key}'], and no training cell is",
            "every label among the training cells",
            "Move cells of these labels into the training part, set their label to NaN, or pass unseen_labels='ignore'",
        )

    def _codes(self, named: np.ndarray) -> np.ndarray:
        """Return int32 [cells]: the class of each label; -1 for missing and new labels."""
        place = {name: number for number, name in enumerate(self.labels)}
        return np.array([place.get(name, -1) for name in named], np.int32)

    def _fit_head(
        self,
        table: CellTable,
        train: np.ndarray,
        valid: np.ndarray,
        codes: np.ndarray,
        transductive: bool,
    ) -> None:
        table = self._choose_genes(table, train)
        start = self._begin(table, self._configuration())
        shown = np.arange(len(table)) if transductive else train
        labels = np.full(len(table), -1, np.int32)
        labels[train] = codes[train]
        weights = self._weights(codes[train])
        examples = self._examples(table, shown, start, targets={"label": labels})
        judged = self._examples(table, shown if transductive else valid, start)
        predict = jax.jit(
            lambda params, example: clean_forward(params, example.batch, start.config).prediction
        )

        def logits_of(params: Any) -> np.ndarray:
            outputs = [predict(params, layout.example) for layout in judged]
            return gather(judged, jax.device_get(outputs), len(table))[valid]

        def validate(params: Any) -> dict[str, float]:
            logits, truth = logits_of(params), codes[valid]
            confusion = confusion_counts(truth, logits.argmax(axis=1), len(self.labels))
            return {
                SCORE: macro_f1(confusion),
                LOSS: _cross_entropy(logits, truth, 1.0),
                "validation_accuracy": float(np.diag(confusion).sum() / len(truth)),
            }

        pretrained = self.base is not None
        if pretrained:
            self._solve_head(start, [*examples, *judged], table, train, codes, weights, validate)
        result = self._finetune(
            start,
            loss=annotation_loss(start.config, self.training.masking, weights),
            examples=examples,
            validate=validate if len(valid) else None,
            start_counts=pretrained,
        )
        self.temperature, self.pool, self._linear = 1.0, [], None
        logits = None
        self.validation = None
        if len(valid):
            logits = logits_of(jax.device_put(self._fitted().params))
            self.temperature = fit_temperature(logits, codes[valid])
            best = self.facts["best_epoch"]
            scores = self.history[best - 1] if best else result.start_scores
            self.facts["validation_f1"] = scores[SCORE]
            if pretrained:
                self.facts["validation_f1_start"] = result.start_scores[SCORE]
            self.validation = (codes[valid], softmax(logits / self.temperature, axis=1))
        else:
            self.messages.append("No validation cells: probabilities are not calibrated.")
        if self.linear:
            self._fit_linear(table, train, valid, codes, weights, logits)

    def _solve_head(
        self,
        start: Pretrained,
        layouts: Sequence[Layout],
        table: CellTable,
        train: np.ndarray,
        codes: np.ndarray,
        weights: np.ndarray | None,
        validate: Callable[[Any], dict[str, float]],
    ) -> None:
        """Set the head of ``start`` to the logistic regression on the pretrained latent, solved exactly.

        Fine-tuning starts from there and is kept only if validation cells say that it helps. The L2 penalty is chosen
        on the same cells.
        """
        model = CellPLM(start.config)

        def latent(params, batch):
            hidden = model.apply({"params": params}, batch, method=CellPLM.represent)
            inferred: Any = model.apply({"params": params}, hidden, method=CellPLM.infer)
            return inferred.mean

        embed, params = jax.jit(latent), jax.device_put(start.params)
        outputs = [embed(params, layout.example.batch) for layout in layouts]
        latents = gather(layouts, jax.device_get(outputs), len(table))
        features = sparse.csr_matrix(latents[train])
        best = (-np.inf, -np.inf)
        for penalty in HEAD_PENALTIES:
            found = fit_linear_classifier(
                features, codes[train], len(self.labels), penalty=penalty, weights=weights
            )
            layer = {"kernel": found.kernel, "bias": found.bias}
            candidate = {**start.params, "head": {"mlp": {"linear_0": layer}}}
            if not self.facts["validation_cells"]:
                start.params = candidate
                return
            scores = validate(candidate)
            if (rank := (scores[SCORE], -scores[LOSS])) > best:
                best, start.params = rank, candidate

    def _fit_linear(
        self,
        table: CellTable,
        train: np.ndarray,
        valid: np.ndarray,
        codes: np.ndarray,
        weights: np.ndarray | None,
        logits: np.ndarray | None,
    ) -> None:
        """Fit the logistic regression, compute its weight on validation cells, and refit it with them.

        Args:
            table: The cells, over the genes of the fit.
            train: Training cells.
            valid: Validation cells.
            codes: int [cells], classes.
            weights: float32 [classes], or None.
            logits: float32 [validation cells, classes] of the network; None without validation cells.
        """
        columns = variable_genes(table.counts[train], LINEAR_GENES)
        features = log_counts(table.counts, columns)
        options: dict[str, Any] = {"penalty": LINEAR_PENALTY, "weights": weights}
        self._linear_genes, self.pool = columns, list(POOL)
        if logits is not None:
            first = fit_linear_classifier(
                features[train], codes[train], len(self.labels), **options
            )
            network = _log_probabilities(logits / self.temperature)
            both = np.stack([network, first.log_probabilities(features[valid])])
            self.pool = pool_log_probabilities(
                both, codes[valid], prior=POOL, prior_cells=POOL_CELLS
            ).tolist()
            pooled = np.tensordot(self.pool, both, axes=1)
            confusion = [
                macro_f1(confusion_counts(codes[valid], found.argmax(axis=1), len(self.labels)))
                for found in (both[1], pooled)
            ]
            self.validation = (codes[valid], softmax(pooled, axis=1))
            self.facts["validation_f1_linear"], self.facts["validation_f1_pooled"] = confusion
            self.messages.append(
                f"Macro F1 on {len(valid)} validation cells: network {self.facts['validation_f1']:.3f}, logistic "
                f"regression {confusion[0]:.3f}, pooled {confusion[1]:.3f} (weights {self.pool[0]:.2f} and "
                f"{self.pool[1]:.2f})."
            )
        cells = np.sort(np.concatenate([train, valid]))
        self._linear = fit_linear_classifier(
            features[cells], codes[cells], len(self.labels), **options
        )

    def _configuration(self) -> ModelConfig:
        """Return the architecture: a linear head on a deterministic latent (published), and a dropout rate of .5."""
        config = self._architecture()
        latent = dataclasses.replace(
            config.latent, kind="deterministic", adversarial_weight=0.0, similarity_weight=0.0
        )
        head = HeadConfig(kind="annotation", outputs=len(self.labels))
        return dataclasses.replace(config, latent=latent, head=head, dropout=0.5)

    def _weights(self, codes: np.ndarray) -> np.ndarray | None:
        """Return float32 [classes], the weight of each cell by its class."""
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            size = np.bincount(codes, minlength=len(self.labels))
            return (len(codes) / (len(self.labels) * size)).astype(np.float32)
        given: dict[str, float] = dict(self.class_weights)  # type: ignore[arg-type]
        unknown = sorted(set(given) - set(self.labels))
        if unknown or any(not weight >= 0 for weight in given.values()):
            wrong = f"an unknown label ({unknown[0]!r})" if unknown else "a negative weight"
            raise InputError(
                f"class_weights with {wrong}",
                f"numbers of at least 0 for labels among {', '.join(map(repr, self.labels))}",
                "Correct class_weights; omitted labels have weight 1",
            )
        return np.array([given.get(name, 1.0) for name in self.labels], np.float32)

    def _fit_neighbors(
        self, adata: Any, table: CellTable, train: np.ndarray, codes: np.ndarray
    ) -> None:
        if self.base is None:
            raise InputError(
                "method='neighbors' with model=None",
                "a pretrained model, because this method needs no training",
                "Pass model='small' or a checkpoint, or use method='finetune'",
            )
        require("sklearn.neighbors", "eval", "method='neighbors'")
        self.model = self.base
        part = np.full(len(table), "other", object)
        part[train] = "train"
        z, _, _ = self._embed(adata, self.reading, part=part)
        self._reference = (z[train], codes[train])
        self.temperature = 1.0

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        batch_key: str | None = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        feature_type: str | None = AS_FITTED,
        values: Values = AS_FITTED,
        cells_per_context: int | None = AS_FITTED,
    ) -> AnnData:
        """Predict the type of every cell, in place.

        Writes:
            ``obs["cellplm_cell_type"]``: categorical; "unknown" if the confidence is below the threshold.
            ``obs["cellplm_confidence"]``: float32, the probability of the most probable type.
            ``obsm["cellplm_probabilities"]``: float32 [n_obs, labels]; columns as in ``labels`` of the next.
            ``uns["cellplm_annotation"]``: labels, model, method, temperature, threshold, contexts, genes matched.

        Args:
            adata: The cells. Keys default to those of ``fit``.
            batch_key: See :meth:`fit`.
            spatial_key: See :meth:`fit`.
            layer: See :meth:`fit`.
            gene_key: See :meth:`fit`.
            feature_type: See :meth:`fit`.
            values: See :meth:`fit`.
            cells_per_context: See :meth:`fit`.

        Returns:
            ``adata`` itself.

        Raises:
            InputError: The estimator is not fitted, or the counts, genes or keys cannot be used.
        """
        data = as_anndata(adata)
        probabilities, facts, _, _ = self._probabilities(
            data,
            self.reading.changed(
                batch_key=batch_key,
                spatial_key=spatial_key,
                layer=layer,
                gene_key=gene_key,
                feature_type=feature_type,
                values=values,
                cells_per_context=cells_per_context,
            ),
        )
        names, confidence = self._decide(probabilities)
        data.obs[LABEL] = names
        data.obs[CONFIDENCE] = confidence
        data.obsm[PROBABILITIES] = probabilities
        data.uns[FACTS] = facts
        return data

    def predict_file(
        self, path: str | os.PathLike, out: str | os.PathLike, *, umap: bool = False, **keys: Any
    ) -> list[str]:
        """Predict the cells of an ``.h5ad`` file and write a copy with the results; counts are streamed.

        Args:
            path: Input; never changed.
            out: Output: the input plus the results of :meth:`predict`, written atomically.
            umap: Also compute a UMAP of the fine-tuned embedding, ``obsm["X_umap"]`` (extra ``eval``).
            **keys: As for :meth:`predict`.

        Returns:
            Messages about the input, one per line.

        Raises:
            InputError: As in :meth:`predict`; also if ``out`` cannot be written.
        """
        path, out = Path(path).expanduser(), Path(out).expanduser()
        check_copy(path, out)
        if umap:
            require("scanpy", "eval", "UMAP")
        probabilities, facts, messages, z = self._probabilities(path, self.reading.changed(**keys))
        names, confidence = self._decide(probabilities)
        laid_out = {}
        if umap and len(z) > UMAP_NEIGHBORS:
            laid_out["X_umap"] = umap_coordinates(z, neighbors=UMAP_NEIGHBORS)
        write_copy(
            path,
            out,
            obs={LABEL: names, CONFIDENCE: confidence},
            obsm={PROBABILITIES: probabilities, **laid_out},
            uns={FACTS: facts},
        )
        return messages

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        label_key: str | None = None,
        split: str | None = None,
        unseen_labels: Literal["error", "ignore", "wrong"] = "error",
        **keys: Any,
    ) -> dict[str, float]:
        """Predict labelled cells and score the predictions; ``adata`` is not modified.

        Args:
            adata: The cells; those without a label are predicted but not scored.
            label_key: Column of ``obs`` with the true types; None: the one of ``fit``.
            split: Score only the cells with this value of the ``split_key`` of ``fit``, such as ``"test"``.
            unseen_labels: Treatment of labels outside the training cells: an error, omit the cells, or
                count them as incorrect (correct if predicted "unknown").
            **keys: As for :meth:`predict`.

        Returns:
            The scores of :func:`cellplm_jax.evaluate.annotation.annotation_scores`, ``calibration_error``, ``brier``,
            ``unknown_fraction``, and ``cells``, the number of scored cells.

        Raises:
            InputError: As in :meth:`predict`, or there is nothing to score.
            MissingDependencyError: The extra ``eval`` is not installed.
        """
        self._fitted()
        require("sklearn", "eval", "Scoring labels")
        data = as_anndata(adata)
        label_key = str(label_key or self.facts["label_key"])
        named = labels_of(data.obs, label_key)
        scored = np.array([name is not None for name in named], bool)
        if split is not None:
            key = self.reading.split_key
            if key is None or key not in data.obs.columns:
                raise InputError(
                    f"split={split!r} without a split column",
                    "an estimator that was fitted with split_key, and its column in obs",
                    "Select the cells to score instead: score(adata[...])",
                )
            parts = parts_of(np.asarray(data.obs[key].astype(object)))
            scored &= parts == parts_of(np.array([split]))[0]
        unseen = sorted(set(named[scored]) - set(self.labels))
        if unseen and unseen_labels == "error":
            raise InputError(
                f"{int(np.isin(named[scored], unseen).sum())} cells are labelled {unseen[0]!r} or other labels that "
                "are not among the training labels",
                f"labels among {', '.join(map(repr, self.labels))}",
                "Fit on cells of these labels too, or pass unseen_labels='ignore' or 'wrong'",
            )
        if unseen_labels == "ignore":
            scored &= ~np.isin(named, unseen)
        if not scored.any():
            raise InputError(
                "no cell to score",
                f"cells with a training label in obs['{label_key}']",
                "Check the label column and the split",
            )
        probabilities, _, _, _ = self._probabilities(data, self.reading.changed(**keys))
        names, _ = self._decide(probabilities)
        truth, predicted = named[scored], np.asarray(names)[scored]
        if self.unknown_threshold is not None:
            truth = np.where(np.isin(truth, unseen), UNKNOWN, truth)
        return {
            **annotation_scores(truth, predicted),
            "calibration_error": expected_calibration_error(
                truth, probabilities[scored], self.labels
            ),
            "brier": brier_score(truth, probabilities[scored], self.labels),
            "unknown_fraction": float(np.mean(predicted == UNKNOWN)),
            "cells": int(scored.sum()),
        }

    def _probabilities(
        self, data: Any, reading: Reading
    ) -> tuple[np.ndarray, dict[str, Any], list[str], np.ndarray]:
        """Return float32 [cells, labels], facts for ``uns``, messages about the input, and float32 [cells, latent]."""
        model = self._fitted()
        z, facts, messages = self._embed(data, reading)
        if self._reference is not None:
            probabilities = self._votes(z)
        else:
            logits = np.asarray(self._head(z) / self.temperature, np.float64)
            if self._linear is not None:
                logits = self._pooled(_log_probabilities(logits), data, reading)
            probabilities = softmax(logits, axis=1)
        facts = {
            "labels": list(self.labels),
            "model": model.id,
            "version": __version__,
            "method": self.method,
            "temperature": float(self.temperature),
            "pool": list(self.pool),
            "unknown_threshold": float(self.unknown_threshold or 0.0),
            **facts,
        }
        return probabilities.astype(np.float32), facts, messages, z

    def _pooled(self, network: np.ndarray, data: Any, reading: Reading) -> np.ndarray:
        """Return the weighted sum of both log-probabilities, float64 [cells, labels]."""
        linear: LinearClassifier = self._linear  # type: ignore[assignment]
        pooled = self.pool[0] * network
        read: dict[str, Any] = {
            "layer": reading.layer,
            "gene_key": reading.gene_key,
            "feature_type": reading.feature_type,
        }
        start = 0
        with open_counts(data, self._fitted().genes, values=reading.values, **read) as source:
            for block in source.blocks(LINEAR_CELLS):
                stop = start + block.shape[0]
                features = log_counts(block, self._linear_genes)
                pooled[start:stop] += self.pool[1] * linear.log_probabilities(features)
                start = stop
        return pooled

    def _votes(self, z: np.ndarray) -> np.ndarray:
        """Return the fraction of votes per label among the nearest labelled cells, float64 [cells, labels]."""
        reference, codes = self._reference  # type: ignore[misc]
        search = require("sklearn.neighbors", "eval", "method='neighbors'")
        voters = min(self.neighbors, len(codes))
        finder = search.NearestNeighbors(n_neighbors=voters).fit(reference)
        distance, index = finder.kneighbors(z)
        # Weighted by inverse distance; a cell at distance 0 outweighs all others.
        weight = 1.0 / np.maximum(distance, 1e-6)
        votes = np.zeros((len(z), len(self.labels)))
        for place in range(voters):
            votes[np.arange(len(z)), codes[index[:, place]]] += weight[:, place]
        return votes / votes.sum(axis=1, keepdims=True)

    def _decide(self, probabilities: np.ndarray) -> tuple[pd.Categorical, np.ndarray]:
        """Return the label of each cell and its confidence."""
        confidence = probabilities.max(axis=1)
        names = np.array(self.labels, object)[probabilities.argmax(axis=1)]
        known = list(self.labels)
        if self.unknown_threshold is not None:
            names[confidence < self.unknown_threshold] = UNKNOWN
            known = list(dict.fromkeys([*known, UNKNOWN]))
        return pd.Categorical(names, categories=known), confidence

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state = {
            "method": self.method,
            "labels": self.labels,
            "temperature": self.temperature,
            "unknown_threshold": self.unknown_threshold,
            "class_weights": self.class_weights
            if isinstance(self.class_weights, str | None)
            else dict(self.class_weights),
            "neighbors": self.neighbors,
            "linear": self.linear,
            "pool": self.pool,
        }
        if self._reference is not None:
            return state, {"embedding": self._reference[0], "label": self._reference[1]}
        if self._linear is not None:
            linear = {"kernel": self._linear.kernel, "bias": self._linear.bias}
            return state, {**linear, "genes": self._linear_genes.astype(np.int32)}
        return state, {}

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.method, self.labels = state["method"], list(state["labels"])
        self.temperature = state["temperature"]
        self.unknown_threshold = state["unknown_threshold"]
        self.class_weights, self.neighbors = state["class_weights"], state["neighbors"]
        self.linear, self.pool = state["linear"], list(state["pool"])
        if self.method == "neighbors":
            self._reference = (arrays["embedding"], arrays["label"])
        elif "kernel" in arrays:
            self._linear = LinearClassifier(arrays["kernel"], arrays["bias"])
            self._linear_genes = arrays["genes"]


def annotation_loss(
    config: ModelConfig, masking: MaskingConfig, weights: np.ndarray | None = None
) -> Loss:
    """Return the loss of an example whose target ``"label"`` is int32 [samples, cells], -1 for missing labels.

    Args:
        config: Architecture with an annotation head.
        masking: Dropped cells and hidden entries.
        weights: float32 [classes], or None.

    Returns:
        Pure ``(params, example, key) -> (cross-entropy in nats, {"accuracy": ...})``.
    """

    def loss(params, example, key):
        output, kept, _ = corrupted_forward(params, example.batch, key, config, masking)
        logits: jax.Array = output.prediction  # type: ignore[assignment]
        labels = follow_cells(example.targets["label"], kept, fill=-1)
        value = classification_loss(logits, labels, kept.cell_mask, weights=weights)
        right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        return value, {"accuracy": average_over(right, kept.cell_mask & (labels >= 0))}

    return loss


def log_counts(counts: sparse.csr_matrix, columns: np.ndarray) -> sparse.csr_matrix:
    """Return log1p of the counts of selected genes: CSR float64 [cells, columns]."""
    chosen = sparse.csr_matrix(counts[:, columns], dtype=np.float64)
    chosen.data = np.log1p(chosen.data)
    return chosen


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that calibrates the logits (Guo et al., ICML 2017).

    The maximum a posteriori estimate with a standard normal prior on its logarithm: without the prior, a few validation
    cells that are all correct would make every probability 1.

    Args:
        logits: float [cells, classes], of cells outside the training set.
        labels: int [cells].

    Returns:
        Between .05 and 20; above 1 if the model is overconfident.
    """
    from scipy.optimize import minimize_scalar

    def objective(log: float) -> float:
        fit = _cross_entropy(logits, labels, float(np.exp(log)))
        return fit + 0.5 * log**2 / len(labels)

    bound = np.log(20.0)
    optimum: Any = minimize_scalar(objective, bounds=(-bound, bound), method="bounded")
    return float(np.exp(optimum.x))


def _cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return the mean cross-entropy in nats of logits divided by a temperature."""
    scaled = np.asarray(logits, np.float64) / temperature
    top = scaled.max(axis=1, keepdims=True)
    total = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
    return float(np.mean(total - scaled[np.arange(len(labels)), labels]))


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return float64 [cells, classes], with probabilities clipped at 1e-12."""
    return np.maximum(log_softmax(np.asarray(logits, np.float64), axis=1), np.log(1e-12))


def _require_training_cells(table: CellTable, train: np.ndarray) -> None:
    """Raise an error for batches without labelled training cells if complete batches are the training contexts."""
    without = [name for name in dict.fromkeys(table.batch) if name not in set(table.batch[train])]
    if without:
        raise InputError(
            f"batch '{without[0]}' has no labelled training cells"
            + (f" (and {len(without) - 1} more)" if len(without) > 1 else ""),
            "labelled training cells in every batch, with transductive=True",
            "Omit transductive: these cells are then predicted in a separate context; or label some of them",
        )
