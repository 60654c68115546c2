"""Cell type annotation: a fine-tuned classifier, or label transfer from nearest neighbours."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import softmax

from cellplm_jax._version import __version__
from cellplm_jax.config import FinetuneConfig, HeadConfig, MaskingConfig, ModelConfig
from cellplm_jax.data.anndata_io import Values, open_counts
from cellplm_jax.errors import InputError, require
from cellplm_jax.evaluate.annotation import (
    annotation_scores,
    auroc,
    brier_score,
    confusion_counts,
    expected_calibration_error,
    macro_f1,
)
from cellplm_jax.evaluate.embedding import umap_coordinates
from cellplm_jax.losses.objectives import average_over, classification_loss
from cellplm_jax.model.cellplm import CellPLM
from cellplm_jax.model.masking import follow_cells
from cellplm_jax.progress import stage
from cellplm_jax.tasks.annotation_pool import (
    LINEAR_GENES,
    LINEAR_PENALTY,
    choose_pool,
    clearly_better,
    cross_entropy,
    fit_temperature,
    log_counts,
    log_probabilities_of,
    neighbor_votes,
)
from cellplm_jax.tasks.contexts import CellTable, gather, labels_of, variable_genes
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
from cellplm_jax.tasks.unknown import Unknown, UnknownDetector, latent_map
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, clean_forward, corrupted_forward
from cellplm_jax.train.linear import LinearClassifier, fit_linear_classifier

if TYPE_CHECKING:
    from anndata import AnnData

UNKNOWN = "unknown"
"""Label of cells that are like no labelled cell, or have a confidence below the threshold."""

LABEL, CONFIDENCE, PROBABILITIES = (
    "cellplm_cell_type",
    "cellplm_confidence",
    "cellplm_probabilities",
)
"""Keys written by ``predict`` to ``obs``, ``obs`` and ``obsm``."""

UNKNOWN_SCORE, UNKNOWN_REASON = "cellplm_unknown_score", "cellplm_unknown_reason"
"""Keys written by ``predict`` to ``obs`` with detection of unknown types."""

FACTS = "cellplm_annotation"
"""Key written to ``uns``."""


UMAP_NEIGHBORS = 15
"""Number of neighbours of the graph for UMAP; with no more cells than that, UMAP is omitted."""

LINEAR_CELLS = 4096
"""Number of cells per application of the logistic regression."""

_DETECTOR, _DETECTOR_GENES = "unknown_", "detected_genes"
"""Prefix of the saved arrays of the detector, and the name of its genes."""

LATENT_LENGTH = 6.0
"""Median length of the pretrained latents in the regression that solves the head; log1p counts are not scaled."""


@dataclasses.dataclass(eq=False)
class _Predicted:
    """Prediction for some cells: float32 [cells, labels] of the annotator and of each part, and more."""

    probabilities: np.ndarray
    parts: dict[str, np.ndarray]
    unknown: Unknown | None
    facts: dict[str, Any]
    messages: list[str]
    z: np.ndarray


class CellTypeAnnotator(Estimator):
    """Predicts the cell type of every cell.

    ``method="finetune"`` adds a linear head to a deterministic latent and fine-tunes the complete model on labelled
    cells with the published recipe. The head of a pretrained model is initialised with the exact logistic regression on
    its latent and on log1p counts of highly variable genes; the term of the genes stays as it is. The fine-tuned
    weights are kept only if they are clearly better on validation cells; otherwise the head is solved once more with
    these cells.
    ``method="neighbors"`` needs no training: cells get the label of their nearest labelled cells in the embedding of
    the pretrained model.

    On a few thousand cells a logistic regression on highly variable genes is hard to beat. One is therefore fitted as a
    baseline, and predicts instead of the network if it is clearly better on validation cells. From scratch, the
    log-probabilities of both are added with weights fitted to the validation cells. ``linear=False`` omits the genes
    from head and prediction: the published network.

    Cells that are like no labelled cell are labelled "unknown" (see ``tasks/unknown.py``). The other cells of
    the same file influence this decision: a group of cells without labelled neighbours is found together.

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
        unknown_rate: Share of cells of known type that may be labelled "unknown" because they are unlike the labelled
            cells; None or 0: no detection.
        unknown_threshold: Cells with a lower confidence are also labelled "unknown"; None: no such limit.
        class_weights: Weight of each cell in the loss by its label; ``"balanced"``: all labels have the same total
            weight; None: all cells have the same weight.
        neighbors: For ``"neighbors"``: number of voting labelled cells, weighted by inverse distance.
        linear: For ``"finetune"``: use a logistic regression on genes, in the head and in the average.
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
        unknown_rate: float | None = 0.05,
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
        if unknown_rate is not None and not 0.0 <= unknown_rate < 1.0:
            raise InputError(
                f"unknown_rate={unknown_rate}", "a share from 0 to below 1, or None", "Use 0.05"
            )
        if neighbors < 1:
            raise InputError(f"neighbors={neighbors}", "at least 1", "Raise it")
        self.method: str = method
        self.unknown_rate = unknown_rate
        self.unknown_threshold = unknown_threshold
        self.class_weights = class_weights
        self.neighbors = neighbors
        self.linear = linear
        self.labels: list[str] = []
        self.temperature = 1.0
        self.pool: list[float] = []
        self._linear: LinearClassifier | None = None
        self._gene_head: np.ndarray | None = None
        self._linear_genes = np.zeros(0, int)
        self._detector: UnknownDetector | None = None
        self._detector_genes = np.zeros(0, int)
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
        start = time.monotonic()
        with stage(f"{self.task}: reading", quiet=self.quiet):
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
        self._fit_unknown(table, train, valid, codes)
        if "seconds" in self.facts:
            self.facts["network_seconds"] = self.facts["seconds"]
        self.facts["seconds"] = round(time.monotonic() - start, 1)
        self._log_messages()
        return self

    def _fit_unknown(
        self, table: CellTable, train: np.ndarray, valid: np.ndarray, codes: np.ndarray
    ) -> None:
        """Fit the detector of unknown types, and the neighbours' label transfer that serves as a baseline."""
        model = self._fitted()
        place = {gene: column for column, gene in enumerate(model.genes)}
        own = np.array([column for column, gene in enumerate(table.genes) if gene in place], int)
        table = table.restrict(own)
        self._detector_genes = np.array([place[gene] for gene in table.genes], int)
        latent = None if self.base is None else latent_map(self.base.config, self.base.params)
        if latent is not None and self.base is not None:
            row = {gene: number for number, gene in enumerate(self.base.genes)}
            latent = latent[[row[gene] for gene in table.genes]]
        cells = np.sort(np.concatenate([train, valid]))
        with stage(f"{self.task}: comparing labelled cells", quiet=self.quiet):
            self._detector = UnknownDetector.fit(
                table.counts[cells], codes[cells], len(self.labels), latent=latent,
                seed=self.training.seed,
            )  # fmt: skip
            if self._detector is None:
                self.messages.append("Too few labelled cells to detect unknown cell types.")
            elif len(valid):
                near = self._detector.project(table.counts[train])
                votes = neighbor_votes(
                    near,
                    codes[train],
                    self._detector.project(table.counts[valid]),
                    len(self.labels),
                )
                confusion = confusion_counts(codes[valid], votes.argmax(axis=1), len(self.labels))
                self.facts["validation_f1_neighbors"] = macro_f1(confusion)

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
        self._gene_head = None
        if self.linear:
            self._linear_genes = variable_genes(table.counts[train], LINEAR_GENES)
        pretrained = self.base is not None
        features, scale = None, 1.0
        if pretrained:
            with stage(f"{self.task}: solving the head", quiet=self.quiet):
                features, scale = self._head_features(start, table, shown, valid)
                self._solve_head(start, features, scale, train, codes, weights)
        offset = self._gene_logits(table.counts)
        examples = self._examples(
            table, shown, start, targets={"label": labels, "gene_logits": offset}
        )
        judged = self._examples(table, shown if transductive else valid, start)
        predict = jax.jit(
            lambda params, example: clean_forward(params, example.batch, start.config).prediction
        )

        def logits_of(params: Any) -> np.ndarray:
            outputs = [predict(params, layout.example) for layout in judged]
            return (gather(judged, jax.device_get(outputs), len(table)) + offset)[valid]

        def validate(params: Any) -> dict[str, float]:
            logits, truth = logits_of(params), codes[valid]
            confusion = confusion_counts(truth, logits.argmax(axis=1), len(self.labels))
            return {
                SCORE: macro_f1(confusion),
                LOSS: cross_entropy(logits, truth, 1.0),
                "validation_accuracy": float(np.diag(confusion).sum() / len(truth)),
            }

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
            best = self.facts["best_epoch"]
            if pretrained:
                self.facts["validation_f1_start"] = result.start_scores[SCORE]
                first = logits_of(jax.device_put(start.params))
                if best and not clearly_better(logits, first, codes[valid]):
                    best, logits = 0, first
                    self.facts["best_epoch"] = 0
            self.facts["validation_f1"] = (self.history[best - 1] if best else result.start_scores)[
                SCORE
            ]
            self.temperature = fit_temperature(logits, codes[valid])
            self.validation = (codes[valid], softmax(logits / self.temperature, axis=1))
        else:
            self.messages.append("No validation cells: probabilities are not calibrated.")
        if self.linear:
            with stage(f"{self.task}: logistic regression", quiet=self.quiet):
                self._fit_linear(table, train, valid, codes, weights, logits)
        if len(valid) and features is not None and not self.facts["best_epoch"]:
            # The start is kept: its head can use the validation cells as well.
            labelled = np.sort(np.concatenate([train, valid]))
            self._solve_head(start, features, scale, labelled, codes, weights)
            self._fitted().params = start.params
            if self.facts["epochs"]:
                self.messages.append(
                    "Fine-tuning was not clearly better on validation cells: the pretrained weights are kept."
                )

    def _head_features(
        self, start: Pretrained, table: CellTable, shown: np.ndarray, valid: np.ndarray
    ) -> tuple[sparse.csr_matrix, float]:
        """Return the scaled latent and log1p counts of the variable genes, CSR [cells, features]; and the scale."""
        model = CellPLM(start.config)

        def latent(params, batch):
            hidden = model.apply({"params": params}, batch, method=CellPLM.represent)
            inferred: Any = model.apply({"params": params}, hidden, method=CellPLM.infer)
            return inferred.mean

        embed, params = jax.jit(latent), jax.device_put(start.params)
        layouts = self._examples(table, shown, start)
        if len(valid) and not np.isin(valid, shown).all():
            layouts = [*layouts, *self._examples(table, valid, start)]
        outputs = [embed(params, layout.example.batch) for layout in layouts]
        latents = gather(layouts, jax.device_get(outputs), len(table)).astype(np.float64)
        lengths = np.linalg.norm(latents[shown], axis=1)
        scale = LATENT_LENGTH / max(float(np.median(lengths)), 1e-6)
        features = sparse.csr_matrix(latents * scale)
        if self.linear:
            genes = log_counts(table.counts, self._linear_genes)
            features = sparse.csr_matrix(sparse.hstack([features, genes]))
        return features, scale

    def _solve_head(
        self,
        start: Pretrained,
        features: sparse.csr_matrix,
        scale: float,
        cells: np.ndarray,
        codes: np.ndarray,
        weights: np.ndarray | None,
    ) -> None:
        """Set the head of ``start`` to the exact logistic regression on ``features`` of the cells.

        The part on the genes is a term of the network's logits that is not fine-tuned: it keeps what the latent loses.
        """
        solved = fit_linear_classifier(
            features[cells], codes[cells], len(self.labels), penalty=LINEAR_PENALTY, weights=weights
        )
        width = start.config.latent_size
        kernel = solved.kernel[:width] * np.float32(scale)
        layer = {"kernel": kernel, "bias": solved.bias}
        start.params = {**start.params, "head": {"mlp": {"linear_0": layer}}}
        self._gene_head = solved.kernel[width:] if self.linear else None

    def _gene_logits(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Return the term of the genes in the logits of the network, float32 [cells, classes]; 0 without it."""
        if self._gene_head is None:
            return np.zeros((counts.shape[0], len(self.labels)), np.float32)
        return np.asarray(log_counts(counts, self._linear_genes) @ self._gene_head, np.float32)

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
        features = log_counts(table.counts, self._linear_genes)
        options: dict[str, Any] = {"penalty": LINEAR_PENALTY, "weights": weights}
        network = None
        linear = None
        if logits is not None:
            first = fit_linear_classifier(
                features[train], codes[train], len(self.labels), **options
            )
            network = log_probabilities_of(logits / self.temperature)
            linear = first.log_probabilities(features[valid])
        self.pool, self.facts["pool"] = choose_pool(
            network, linear, codes[valid], average=self.base is None
        )
        if network is not None and linear is not None:
            pooled = self.pool[0] * network + self.pool[1] * linear
            scores = [
                macro_f1(confusion_counts(codes[valid], found.argmax(axis=1), len(self.labels)))
                for found in (linear, pooled)
            ]
            self.validation = (codes[valid], softmax(pooled, axis=1))
            self.facts["validation_f1_linear"], self.facts["validation_f1_pooled"] = scores
            text = (
                f"Macro F1 on {len(valid)} validation cells: network {self.facts['validation_f1']:.3f}, logistic "
                f"regression {scores[0]:.3f}"
            )
            if self.facts["pool"] == "pooled":
                text += (
                    f", pooled {scores[1]:.3f} (weights {self.pool[0]:.2f} and {self.pool[1]:.2f})"
                )
            elif self.facts["pool"] == "linear":
                text += ", which predicts: it is better than the network"
            self.messages.append(f"{text}.")
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

    @property
    def validation_scores(self) -> dict[str, float]:
        """Macro F1 on the validation cells: of the prediction, its parts, and neighbours' label transfer.

        Empty without validation cells. The first entry is named by the choice of the pool: ``"pooled"``, ``"network"``
        or ``"linear"``.
        """
        names = {"network": "", "linear": "_linear", "neighbors": "_neighbors"}
        parts = {
            name: self.facts[key]
            for name, suffix in names.items()
            if (key := f"validation_f1{suffix}") in self.facts
        }
        if "validation_f1_pooled" in self.facts:
            chosen = self.facts.get("pool", "pooled")
            parts = {chosen: self.facts["validation_f1_pooled"], **parts}
        return parts

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
            ``obs["cellplm_cell_type"]``: categorical; "unknown" for cells that are unlike the labelled ones.
            ``obs["cellplm_confidence"]``: float32, the probability of the most probable type.
            ``obs["cellplm_unknown_score"]``: float32, how unlike the labelled cells; above 0: unknown.
            ``obs["cellplm_unknown_reason"]``: categorical, such as "far from all labelled cells"; "" for known cells.
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
        found = self._predicted(
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
        for name, values_of_cells in self._columns_of(found).items():
            data.obs[name] = values_of_cells
        data.obsm[PROBABILITIES] = found.probabilities
        data.uns[FACTS] = found.facts
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
        found = self._predicted(path, self.reading.changed(**keys))
        laid_out = {}
        if umap and len(found.z) > UMAP_NEIGHBORS:
            with stage(f"{self.task}: UMAP", quiet=self.quiet):
                laid_out["X_umap"] = umap_coordinates(found.z, neighbors=UMAP_NEIGHBORS)
        write_copy(
            path,
            out,
            obs=self._columns_of(found),
            obsm={PROBABILITIES: found.probabilities, **laid_out},
            uns={FACTS: found.facts},
        )
        return found.messages

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

        Cells of known type are scored by their most probable type; ``unknown_threshold`` applies, ``unknown_rate`` does
        not, so that scores can be compared with methods that label every cell.

        Args:
            adata: The cells; those without a label are predicted but not scored.
            label_key: Column of ``obs`` with the true types; None: the one of ``fit``.
            split: Score only the cells with this value of the ``split_key`` of ``fit``, such as ``"test"``.
            unseen_labels: Treatment of labels outside the training cells: an error, omit the cells, or
                count them as incorrect (correct if labelled "unknown"; then ``unknown_rate`` applies to all cells).
            **keys: As for :meth:`predict`.

        Returns:
            The scores of :func:`cellplm_jax.evaluate.annotation.annotation_scores`, ``calibration_error``, ``brier``,
            ``unknown_fraction``, the share of scored cells that ``predict`` labels "unknown", and ``cells``, the number
            of scored cells. Also ``network_macro_f1``, ``linear_macro_f1`` and ``neighbors_macro_f1`` (label transfer)
            of the parts and the baseline, if there are any. With cells of unseen types, ``unknown_auroc``.

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
        found = self._predicted(data, self.reading.changed(**keys))
        probabilities, truth = found.probabilities, named[scored]
        written = np.asarray(self._decide(found)[0], object)[scored]
        open_set = bool(unseen) and unseen_labels == "wrong"
        predicted = written
        if not open_set:
            predicted = np.asarray(self._decide(found, detect=False)[0], object)[scored]
        detects = found.unknown is not None or self.unknown_threshold is not None
        new = np.isin(truth, unseen)
        known = np.where(new, UNKNOWN, truth) if detects else truth
        scores = {
            **annotation_scores(known, predicted),
            "calibration_error": expected_calibration_error(
                known, probabilities[scored], self.labels
            ),
            "brier": brier_score(known, probabilities[scored], self.labels),
            "unknown_fraction": float(np.mean(written == UNKNOWN)),
            "cells": int(scored.sum()),
        }
        labels = np.array(self.labels, object)
        for part, values in found.parts.items():
            best = labels[values.argmax(axis=1)][scored]
            scores[f"{part}_macro_f1"] = annotation_scores(truth, best)["macro_f1"]
        if open_set and found.unknown is not None and not new.all():
            scores["unknown_auroc"] = auroc(new, found.unknown.score[scored])
        return scores

    def _predicted(self, data: Any, reading: Reading) -> _Predicted:
        """Return the probabilities, those of the parts, unknown cells, facts for ``uns``, messages and latents."""
        model = self._fitted()
        z, facts, messages = self._embed(data, reading)
        parts: dict[str, np.ndarray] = {}
        linear, gene_logits, cells = self._of_counts(data, reading)
        if self._reference is not None:
            probabilities = self._votes(z)
        else:
            logits = self._head(z)
            if gene_logits is not None:
                logits = logits + gene_logits
            logits = np.asarray(logits / self.temperature, np.float64)
            parts["network"] = softmax(logits, axis=1)
            if linear is not None:
                parts["linear"] = softmax(linear, axis=1)
                logits = self.pool[0] * log_probabilities_of(logits) + self.pool[1] * linear
            probabilities = softmax(logits, axis=1)
        unknown = None
        if self._detector is not None and cells is not None:
            parts["neighbors"] = self._detector.votes(cells, len(self.labels))
            if self.unknown_rate:
                with stage(f"{self.task}: unknown types", quiet=self.quiet):
                    unknown = self._detector.compare(cells, self.labels, rate=self.unknown_rate)
        facts = {
            "labels": list(self.labels),
            "model": model.id,
            "version": __version__,
            "method": self.method,
            "temperature": float(self.temperature),
            "pool": list(self.pool),
            "unknown_rate": float(self.unknown_rate or 0.0),
            "unknown_threshold": float(self.unknown_threshold or 0.0),
            **facts,
        }
        if unknown is not None:
            number = int(unknown.flagged.sum())
            facts["unknown_cells"] = number
            if number:
                messages.append(
                    f"{number:,} of {len(z):,} cells are labelled '{UNKNOWN}': they are unlike the labelled cells; see "
                    f"obs['{UNKNOWN_REASON}']."
                )
        return _Predicted(probabilities.astype(np.float32), parts, unknown, facts, messages, z)

    def _of_counts(
        self, data: Any, reading: Reading
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Return log-probabilities of the logistic regression, the term of the genes and the detector's coordinates.

        The counts are read in blocks.
        """
        if self._linear is None and self._detector is None:
            return None, None, None
        linear, gene_logits, cells = [], [], []
        read: dict[str, Any] = {
            "layer": reading.layer,
            "gene_key": reading.gene_key,
            "feature_type": reading.feature_type,
        }
        with (
            stage(f"{self.task}: genes", quiet=self.quiet),
            open_counts(data, self._fitted().genes, values=reading.values, **read) as source,
        ):
            for block in source.blocks(LINEAR_CELLS):
                if self._linear is not None:
                    features = log_counts(block, self._linear_genes)
                    linear.append(self._linear.log_probabilities(features))
                if self._gene_head is not None:
                    gene_logits.append(self._gene_logits(block))
                if self._detector is not None:
                    cells.append(self._detector.project(block[:, self._detector_genes]))
        return (
            np.concatenate(linear) if linear else None,
            np.concatenate(gene_logits) if gene_logits else None,
            np.concatenate(cells) if cells else None,
        )

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

    def _decide(
        self, found: _Predicted, *, detect: bool = True
    ) -> tuple[pd.Categorical, np.ndarray]:
        """Return the label of each cell and its confidence; ``detect``: with detection of unknown types."""
        confidence = found.probabilities.max(axis=1)
        names = np.array(self.labels, object)[found.probabilities.argmax(axis=1)]
        known = list(self.labels)
        unknown = np.zeros(len(names), bool)
        if self.unknown_threshold is not None:
            unknown |= confidence < self.unknown_threshold
        if detect and found.unknown is not None:
            unknown |= found.unknown.flagged
        names[unknown] = UNKNOWN
        if self.unknown_threshold is not None or unknown.any():
            known = list(dict.fromkeys([*known, UNKNOWN]))
        return pd.Categorical(names, categories=known), confidence

    def _columns_of(self, found: _Predicted) -> dict[str, Any]:
        """Return the columns of ``obs``."""
        names, confidence = self._decide(found)
        columns: dict[str, Any] = {LABEL: names, CONFIDENCE: confidence}
        if found.unknown is not None:
            columns[UNKNOWN_SCORE] = found.unknown.score
            columns[UNKNOWN_REASON] = pd.Categorical(found.unknown.reason)
        return columns

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state = {
            "method": self.method,
            "labels": self.labels,
            "temperature": self.temperature,
            "unknown_rate": self.unknown_rate,
            "unknown_threshold": self.unknown_threshold,
            "class_weights": self.class_weights
            if isinstance(self.class_weights, str | None)
            else dict(self.class_weights),
            "neighbors": self.neighbors,
            "linear": self.linear,
            "pool": self.pool,
        }
        arrays: dict[str, np.ndarray] = {}
        if self._reference is not None:
            arrays |= {"embedding": self._reference[0], "label": self._reference[1]}
        if self._linear is not None:
            arrays |= {"kernel": self._linear.kernel, "bias": self._linear.bias}
            arrays["genes"] = self._linear_genes.astype(np.int32)
        if self._gene_head is not None:
            arrays["gene_head"] = self._gene_head
        if self._detector is not None:
            arrays |= {f"{_DETECTOR}{name}": a for name, a in self._detector.arrays.items()}
            arrays[_DETECTOR_GENES] = self._detector_genes.astype(np.int32)
        return state, arrays

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.method, self.labels = state["method"], list(state["labels"])
        self.temperature = state["temperature"]
        self.unknown_rate = state.get("unknown_rate")
        self.unknown_threshold = state["unknown_threshold"]
        self.class_weights, self.neighbors = state["class_weights"], state["neighbors"]
        self.linear, self.pool = state["linear"], list(state["pool"])
        if self.method == "neighbors":
            self._reference = (arrays["embedding"], arrays["label"])
        elif "kernel" in arrays:
            self._linear = LinearClassifier(arrays["kernel"], arrays["bias"])
            self._linear_genes = arrays["genes"]
            self._gene_head = arrays.get("gene_head")
        if _DETECTOR_GENES in arrays:
            self._detector_genes = arrays[_DETECTOR_GENES]
            self._detector = UnknownDetector(
                {
                    name.removeprefix(_DETECTOR): values
                    for name, values in arrays.items()
                    if name.startswith(_DETECTOR)
                }
            )


def annotation_loss(
    config: ModelConfig, masking: MaskingConfig, weights: np.ndarray | None = None
) -> Loss:
    """Return the loss of an example.

    Its target ``"label"`` is int32 [samples, cells], -1 for missing labels; ``"gene_logits"``, float32 [samples, cells,
    classes], is added to the logits of the head.

    Args:
        config: Architecture with an annotation head.
        masking: Dropped cells and hidden entries.
        weights: float32 [classes], or None.

    Returns:
        Pure ``(params, example, key) -> (cross-entropy in nats, {"accuracy": ...})``.
    """

    def loss(params, example, key):
        output, kept, _ = corrupted_forward(params, example.batch, key, config, masking)
        gene_logits = follow_cells(example.targets["gene_logits"], kept)
        logits: jax.Array = output.prediction + gene_logits  # type: ignore[assignment]
        labels = follow_cells(example.targets["label"], kept, fill=-1)
        value = classification_loss(logits, labels, kept.cell_mask, weights=weights)
        right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        return value, {"accuracy": average_over(right, kept.cell_mask & (labels >= 0))}

    return loss


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
