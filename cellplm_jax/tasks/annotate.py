"""Cell type annotation: a fine-tuned classifier, or label transfer from nearest neighbours."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pandas as pd
from scipy.special import softmax

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import InputError, require
from cellplm_jax.evaluate.annotation import (
    annotation_scores,
    auroc,
    brier_score,
    expected_calibration_error,
)
from cellplm_jax.evaluate.embedding import umap_coordinates
from cellplm_jax.progress import stage
from cellplm_jax.tasks.annotate_fit import AnnotatorFit
from cellplm_jax.tasks.annotation_pool import log_counts, log_probabilities_of
from cellplm_jax.tasks.contexts import labels_of
from cellplm_jax.tasks.files import as_anndata
from cellplm_jax.tasks.prediction import Prediction
from cellplm_jax.tasks.reading import Reading, ReadingKeys
from cellplm_jax.tasks.splits import parts_of
from cellplm_jax.tasks.unknown import Unknown, UnknownDetector
from cellplm_jax.train.linear import LinearClassifier

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


@dataclasses.dataclass(eq=False)
class _Predicted:
    """Prediction for some cells: float32 [cells, labels] of the annotator and of each part, and more."""

    probabilities: np.ndarray
    parts: dict[str, np.ndarray]
    unknown: Unknown | None
    facts: dict[str, Any]
    messages: list[str]
    z: np.ndarray


class CellTypeAnnotator(AnnotatorFit):
    """Predicts the cell type of every cell.

    ``method="finetune"`` adds a linear head to a deterministic latent and fine-tunes the complete model on labelled
    cells with the published recipe. With a pretrained model this is compared with an exact head on the frozen model:
    the logistic regression on its latent and on log1p counts of highly variable genes. The exact head is kept, and
    solved once more with the validation cells, unless the fine-tuned model is clearly better on these.
    ``method="neighbors"`` needs no training: cells get the label of their nearest labelled cells in the embedding of
    the pretrained model.

    On a few thousand cells a logistic regression on highly variable genes is hard to beat. One is therefore fitted as a
    baseline, and predicts instead of the exact head if it is clearly better on validation cells. A network with
    fine-tuned weights is better in the batches of the training cells than in others: the log-probabilities of both
    are added with weights fitted to the validation cells. ``linear=False`` omits the genes from head and prediction
    (the published network).

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

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        **keys: Unpack[ReadingKeys],
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
            **keys: As in :meth:`fit`.

        Returns:
            ``adata`` itself.

        Raises:
            InputError: The estimator is not fitted, or the counts, genes or keys cannot be used.
        """
        return super().predict(adata, **keys)

    def predict_file(
        self,
        path: str | os.PathLike,
        out: str | os.PathLike,
        *,
        umap: bool = False,
        **keys: Unpack[ReadingKeys],
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
        return super().predict_file(path, out, umap=umap, **keys)

    def _predict(self, data: Any, reading: Reading, *, umap: bool = False) -> Prediction:
        if umap:
            require("scanpy", "eval", "UMAP")
        cells = self._classify(data, reading)
        obsm = {PROBABILITIES: cells.probabilities}
        if umap and len(cells.z) > UMAP_NEIGHBORS:
            with stage(f"{self.task}: UMAP", quiet=self.quiet):
                obsm["X_umap"] = umap_coordinates(cells.z, neighbors=UMAP_NEIGHBORS)
        return Prediction(
            obs=self._columns_of(cells),
            obsm=obsm,
            uns={FACTS: cells.facts},
            messages=cells.messages,
        )

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        label_key: str | None = None,
        split: str | None = None,
        unseen_labels: Literal["error", "ignore", "wrong"] = "error",
        **keys: Unpack[ReadingKeys],
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
        reading = self._as_fitted(keys)
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
            # The same normalisation of names on both sides.
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
        found = self._classify(data, reading)
        probabilities = found.probabilities
        truth = named[scored]
        written = np.asarray(self._decide(found)[0], object)[scored]
        open_set = bool(unseen) and unseen_labels == "wrong"
        predicted = written
        if not open_set:
            # Known cells are scored by their most probable type, to be comparable with methods that label every cell.
            predicted = np.asarray(self._decide(found, detect=False)[0], object)[scored]
        detects = found.unknown is not None or self.unknown_threshold is not None
        new = np.isin(truth, unseen)
        # For an annotator that detects, "unknown" is the right answer for a new type.
        known = np.where(new, UNKNOWN, truth) if detects else truth
        scores = {
            **annotation_scores(known, predicted),
            "calibration_error": expected_calibration_error(
                known,
                probabilities[scored],
                self.labels,
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

    def _classify(self, data: Any, reading: Reading) -> _Predicted:
        """Return the probabilities, those of the parts, unknown cells, facts for ``uns``, messages and latents."""
        z, facts, messages = self._embed(data, reading)
        parts: dict[str, np.ndarray] = {}
        linear, gene_logits, cells = self._of_counts(data, reading)
        if self._reference is not None:
            probabilities = self._votes(z)
        else:
            logits = self._head(z)
            if gene_logits is not None:
                # The exact head is linear in latent and genes, so its two terms are added.
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
        self,
        data: Any,
        reading: Reading,
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Return log-probabilities of the logistic regression, the term of the genes and the detector's coordinates.

        The counts are read in blocks.
        """
        if self._linear is None and self._detector is None:
            return None, None, None
        linear, gene_logits, cells = [], [], []
        with (
            stage(f"{self.task}: genes", quiet=self.quiet),
            open_counts(data, self._fitted().genes, **reading.counts) as source,
        ):
            for block in source.blocks(LINEAR_CELLS):
                if self._linear is not None:
                    features = log_counts(block, self._linear_genes)
                    linear.append(self._linear.log_probabilities(features))
                    if self._gene_head is not None:
                        gene_logits.append(features @ self._gene_head)
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
        self,
        found: _Predicted,
        *,
        detect: bool = True,
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
        # Files without unknown cells keep the categories of the fit.
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
        state, _ = super()._state()
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

    def _restore(
        self,
        state: dict[str, Any],
        arrays: dict[str, np.ndarray],
    ) -> None:
        # Annotators of older versions detect no unknown types.
        super()._restore({"unknown_rate": None, **state}, arrays)
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
