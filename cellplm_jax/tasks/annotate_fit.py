"""Fitting of the cell type annotator: the head, fine-tuning, logistic regression, and the detector of unknown types."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.special import softmax

from cellplm_jax.config import FinetuneConfig, HeadConfig, MaskingConfig, ModelConfig
from cellplm_jax.errors import InputError, require, require_choice
from cellplm_jax.evaluate.annotation import confusion_counts, macro_f1
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
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.tasks.reading import ReadingKeys
from cellplm_jax.tasks.recipe import Training
from cellplm_jax.tasks.splits import split_cells
from cellplm_jax.tasks.unknown import UnknownDetector, latent_map
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, clean_forward, corrupted_forward
from cellplm_jax.train.linear import LinearClassifier, fit_linear_classifier

if TYPE_CHECKING:
    from anndata import AnnData

LATENT_LENGTH = 6.0
"""Median length of the pretrained latents in the regression that solves the head; log1p counts are not scaled."""


class AnnotatorFit(Estimator):
    """The fitting part of :class:`cellplm_jax.CellTypeAnnotator`.

    Raises:
        InputError: A value is invalid, or the options contradict each other.
    """

    task: ClassVar[str] = "annotation"
    saved: ClassVar[Sequence[str]] = (
        "method",
        "labels",
        "temperature",
        "unknown_rate",
        "unknown_threshold",
        "class_weights",
        "neighbors",
        "linear",
        "pool",
    )
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
        require_choice("method", method, ("finetune", "neighbors"))
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
        given = class_weights
        self.class_weights = given if given is None or isinstance(given, str) else dict(given)
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
        split_key: str | None = None,
        transductive: bool = False,
        unseen_labels: Literal["error", "ignore"] = "error",
        **keys: Unpack[ReadingKeys],
    ) -> Self:
        """Fit to labelled cells.

        Cells without a label (NaN) are omitted from training, and counted in ``messages``.

        Args:
            adata: Raw counts and labels.
            label_key: Column of ``obs`` with the cell types.
            split_key: Column of ``obs`` with ``"train"``, ``"valid"`` and any other value for unused cells; None: a
                tenth of the cells, stratified by label, is used for validation.
            transductive: Put all cells of ``adata`` into the training contexts, non-training cells without their
                label, and predict with complete batches as contexts.
            unseen_labels: Treatment of labels among validation or other cells of ``split_key`` that do not occur
                among the training cells: an error, or omit those cells.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts, genes or labels cannot be used; the message states the remedy.
        """
        reading = self._reading(keys, split_key=None if transductive else split_key)
        # The fit is timed as a whole; the seconds of the fine-tuning are kept under another name.
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
        # A validation label that no training cell has cannot be scored.
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
        # The fit may have restricted the genes; the detector is saved in the columns of the model.
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
                table.counts[cells],
                codes[cells],
                len(self.labels),
                latent=latent,
                seed=self.training.seed,
            )
            if self._detector is None:
                self.messages.append("Too few labelled cells to detect unknown cell types.")
            elif len(valid):
                # The baseline uses training cells only, unlike the stored detector.
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
        # Transductive: unlabelled cells are in the contexts, without a loss.
        shown = np.arange(len(table)) if transductive else train
        labels = np.full(len(table), -1, np.int32)
        # -1 for all others: no loss, also for validation cells in the same contexts.
        labels[train] = codes[train]
        weights = self._weights(codes[train])
        self._gene_head = None
        if self.linear:
            self._linear_genes = variable_genes(table.counts[train], LINEAR_GENES)
        pretrained = self.base is not None
        features, scale, exact = None, 1.0, None
        if pretrained:
            with stage(f"{self.task}: solving the head", quiet=self.quiet):
                features, scale = self._head_features(start, table, shown, valid)
                width = start.config.latent_size
                tuned = self._solve(features[:, :width], train, codes, weights)
                # Two solutions: on latent and genes for a decision without fine-tuning, on the latent alone as the
                # start of it.
                exact = self._solve(features, train, codes, weights) if self.linear else tuned
                start.params = _with_head(start, tuned, scale)
        examples = self._examples(table, shown, start, targets={"label": labels})
        judged = self._examples(table, shown if transductive else valid, start)
        predict = jax.jit(
            lambda params, example: clean_forward(params, example.batch, start.config).prediction
        )

        def logits_of(params: Any) -> np.ndarray:
            outputs = [predict(params, layout.example) for layout in judged]
            return gather(judged, jax.device_get(outputs), len(table))[valid]

        def scores_of(logits: np.ndarray) -> dict[str, float]:
            truth = codes[valid]
            confusion = confusion_counts(truth, logits.argmax(axis=1), len(self.labels))
            return {
                SCORE: macro_f1(confusion),
                LOSS: cross_entropy(logits, truth, 1.0),
                "validation_accuracy": float(np.diag(confusion).sum() / len(truth)),
            }

        self._finetune(
            start,
            loss=annotation_loss(start.config, self.training.masking, weights),
            examples=examples,
            validate=(lambda params: scores_of(logits_of(params))) if len(valid) else None,
            start_counts=pretrained,
        )
        self.temperature, self.pool, self._linear = 1.0, [], None
        logits = None
        self.validation = None
        if len(valid):
            logits = logits_of(jax.device_put(self._fitted().params))
            if exact is not None and features is not None:
                first = exact.log_probabilities(features[valid])
                self.facts["validation_f1_start"] = scores_of(first)[SCORE]
                if not (self.facts["best_epoch"] and clearly_better(logits, first, codes[valid])):
                    self.facts["best_epoch"], logits = 0, first
            self.facts["validation_f1"] = scores_of(logits)[SCORE]
            self.temperature = fit_temperature(logits, codes[valid])
            self.validation = (codes[valid], softmax(logits / self.temperature, axis=1))
        else:
            self.messages.append("No validation cells: probabilities are not calibrated.")
        if self.linear:
            with stage(f"{self.task}: logistic regression", quiet=self.quiet):
                self._fit_linear(table, train, valid, codes, weights, logits)
        if len(valid) and features is not None and not self.facts["best_epoch"]:
            # The exact head is kept, and can use the validation cells as well.
            labelled = np.sort(np.concatenate([train, valid]))
            exact = self._solve(features, labelled, codes, weights)
            self._fitted().params = _with_head(start, exact, scale)
            if self.linear:
                self._gene_head = exact.kernel[start.config.latent_size :]
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
        # One penalty for latent and genes needs comparable scales; models differ in the length of their latents.
        scale = LATENT_LENGTH / max(float(np.median(lengths)), 1e-6)
        features = sparse.csr_matrix(latents * scale)
        if self.linear:
            genes = log_counts(table.counts, self._linear_genes)
            features = sparse.csr_matrix(sparse.hstack([features, genes]))
        return features, scale

    def _solve(
        self,
        features: sparse.csr_matrix,
        cells: np.ndarray,
        codes: np.ndarray,
        weights: np.ndarray | None,
    ) -> LinearClassifier:
        """Return the logistic regression on the features of some cells."""
        return fit_linear_classifier(
            features[cells], codes[cells], len(self.labels), penalty=LINEAR_PENALTY, weights=weights
        )

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
        network = None
        linear = None
        if logits is not None:
            first = self._solve(features, train, codes, weights)
            network = log_probabilities_of(logits / self.temperature)
            linear = first.log_probabilities(features[valid])
        # Fine-tuned weights know the batches of the training cells; in new ones the regression is needed.
        self.pool, self.facts["pool"] = choose_pool(
            network, linear, codes[valid], average=bool(self.facts["best_epoch"])
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
        self._linear = self._solve(features, cells, codes, weights)

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


def _with_head(start: Pretrained, solved: LinearClassifier, scale: float) -> dict[str, Any]:
    """Return the parameters with the part of a regression that is on the latent, which had been scaled, as the head."""
    kernel = solved.kernel[: start.config.latent_size] * np.float32(scale)
    layer = {"kernel": kernel, "bias": solved.bias}
    return {**start.params, "head": {"mlp": {"linear_0": layer}}}


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
