"""How well labels were predicted: accuracy, F1, precision and recall, and whether the probabilities mean what they say.

The released code calls the mean recall "accuracy" (``CellPLM/utils/eval.py``); here accuracy is the share of cells that
are right (micro), and macro accuracy the mean over classes of that share (the balanced accuracy).

A cell that was left "unknown" counts as wrong, and as no error of precision of any class. scikit-learn comes with the
extra ``eval`` and is imported on first use; :func:`confusion_counts` and :func:`macro_f1`, which fitting needs in every
epoch, do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError, explain, require

_EXTRA = "eval"


def _labels(values: Any, name: str, cells: int | None = None) -> np.ndarray:
    """Return labels as an object array of strings, after checking their number and that none is missing."""
    column = pd.Series(values if isinstance(values, pd.Categorical) else np.asarray(values))
    if cells is not None and len(column) != cells:
        msg = explain(
            f"{name} has {len(column)} entries for {cells} cells",
            "one label a cell, in the same order",
            "Apply the same selection of cells to both",
        )
        raise InputError(msg)
    if not len(column):
        msg = explain(f"{name} is empty", "at least one cell", "Check the selection of cells")
        raise InputError(msg)
    missing = int(column.isna().sum())
    if missing:
        msg = explain(
            f"{name} is missing (None or NaN) for {missing} of {len(column)} cells",
            "a label for every cell that is scored",
            "Select the labelled cells first, the same ones in every argument",
        )
        raise InputError(msg)
    return np.array([str(value) for value in column], object)


def _probabilities(values: Any, truth: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return probabilities as float64 [cells, classes], after checking shape, range and sums."""
    array = np.asarray(values, np.float64)
    if array.shape != (len(truth), len(classes)):
        msg = explain(
            f"probabilities of shape {array.shape} for {len(truth)} cells and {len(classes)} classes",
            "a row a cell and a column a class",
            "Pass them in the order of the cells and of classes",
        )
        raise InputError(msg)
    sound = np.isfinite(array).all() and array.min() >= -1e-6
    if not sound or np.abs(array.sum(axis=1) - 1.0).max() > 1e-3:
        msg = explain(
            "probabilities that are negative, not finite or do not sum to 1 in a row",
            "a distribution over the classes for every cell",
            "Pass probabilities, not logits",
        )
        raise InputError(msg)
    return array


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count pairs of true and predicted class.

    Args:
        truth: int [cells], 0 to ``classes - 1``.
        predicted: int [cells], likewise.
        classes: How many there are.

    Returns:
        int64 [classes, classes]; rows are true classes.
    """
    pairs = np.asarray(truth) * classes + np.asarray(predicted)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur, as truth or as prediction.

    Args:
        confusion: int [classes, classes] from :func:`confusion_counts`.

    Returns:
        F1 between 0 and 1, as scikit-learn's with ``average="macro"``; NaN without cells.
    """
    hits = np.diag(confusion)
    size = confusion.sum(axis=0) + confusion.sum(axis=1)
    there = size > 0
    return float(np.mean(2.0 * hits[there] / size[there])) if there.any() else float("nan")


def annotation_scores(truth: Any, predicted: Any) -> dict[str, float]:
    """Compare predicted with true labels.

    Averages are over the classes that occur among the true labels: a class that was only ever predicted (such as
    "unknown") lowers the recall of the true ones and is no class of its own.

    Args:
        truth: [cells], labels of any type; compared as strings.
        predicted: [cells], likewise.

    Returns:
        ``accuracy`` (the share of cells that are right: micro), ``macro_accuracy`` (the mean over classes),
        ``macro_f1``, ``micro_f1``, ``weighted_f1`` (by the true class sizes), ``macro_precision``,
        ``weighted_precision``, ``macro_recall``, ``weighted_recall``. A class that is never predicted has precision 0.

    Raises:
        InputError: The lengths differ, there are no cells, or a label is missing.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    known = _labels(truth, "truth")
    found = _labels(predicted, "predicted", len(known))
    metrics = require("sklearn.metrics", _EXTRA, "Scoring labels")
    classes = sorted(set(known))
    scores = {
        "accuracy": float(metrics.accuracy_score(known, found)),
        "macro_accuracy": float(
            metrics.recall_score(known, found, labels=classes, average="macro", zero_division=0)
        ),
    }
    for average in ("macro", "micro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            known, found, labels=classes, average=average, zero_division=0
        )
        scores[f"{average}_f1"] = float(f1)
        if average != "micro":
            scores[f"{average}_precision"] = float(precision)
            scores[f"{average}_recall"] = float(recall)
    return scores


def per_class_scores(truth: Any, predicted: Any) -> pd.DataFrame:
    """Return precision, recall and F1 of every class.

    Args:
        truth: [cells], labels of any type; compared as strings.
        predicted: [cells], likewise.

    Returns:
        A row a class of the true labels, sorted; columns ``precision``, ``recall``, ``f1``, ``cells`` (true ones) and
        ``predicted_cells``.

    Raises:
        InputError: As :func:`annotation_scores`.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    known = _labels(truth, "truth")
    found = _labels(predicted, "predicted", len(known))
    metrics = require("sklearn.metrics", _EXTRA, "Scoring labels")
    classes = sorted(set(known))
    precision, recall, f1, cells = metrics.precision_recall_fscore_support(
        known, found, labels=classes, average=None, zero_division=0
    )
    predicted_cells = [int((found == name).sum()) for name in classes]
    return pd.DataFrame(
        {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "cells": cells,
            "predicted_cells": predicted_cells,
        },
        index=pd.Index(classes, name="label"),
    )


def confusion_table(truth: Any, predicted: Any) -> pd.DataFrame:
    """Count the cells of every pair of true and predicted label.

    Args:
        truth: [cells], labels of any type; compared as strings.
        predicted: [cells], likewise.

    Returns:
        Rows are true labels, columns predicted ones; each holds all labels that occur on either side, sorted.

    Raises:
        InputError: As :func:`annotation_scores`.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    known = _labels(truth, "truth")
    found = _labels(predicted, "predicted", len(known))
    metrics = require("sklearn.metrics", _EXTRA, "Scoring labels")
    names = sorted(set(known) | set(found))
    counts = metrics.confusion_matrix(known, found, labels=names)
    return pd.DataFrame(
        counts, index=pd.Index(names, name="truth"), columns=pd.Index(names, name="predicted")
    )


def expected_calibration_error(
    truth: Any, probabilities: Any, classes: Sequence[str], *, bins: int = 15
) -> float:
    """Return how far confidence lies from accuracy, averaged over cells in bins of equal confidence width.

    Args:
        truth: [cells], labels; compared as strings. A label that is not among ``classes`` counts as never right.
        probabilities: float [cells, classes].
        classes: Label of each column.
        bins: How many bins between 0 and 1.

    Returns:
        Between 0 (a confidence of .8 is right in 80 % of the cells) and 1. Naeini et al., AAAI 2015; Guo et al., ICML
        2017, equation 3.

    Raises:
        InputError: Sizes do not fit, a label is missing, or a row is no distribution.
    """
    known = _labels(truth, "truth")
    array = _probabilities(probabilities, known, classes)
    names = np.array([str(name) for name in classes], object)
    confidence = array.max(axis=1)
    right = names[array.argmax(axis=1)] == known
    # A bin holds what is above its lower end, up to its upper end.
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    size = np.bincount(place, minlength=bins)
    gap = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gap[size > 0]).sum() / len(known))


def brier_score(truth: Any, probabilities: Any, classes: Sequence[str]) -> float:
    """Return the Brier score of several classes: the squared distance of the probabilities from the truth.

    Args:
        truth: [cells], labels; compared as strings. A label that is not among ``classes`` is at distance 1 from all.
        probabilities: float [cells, classes].
        classes: Label of each column.

    Returns:
        Mean over cells, between 0 (certain and right) and 2. Brier, Monthly Weather Review 1950, equation 2.

    Raises:
        InputError: As :func:`expected_calibration_error`.
    """
    known = _labels(truth, "truth")
    array = _probabilities(probabilities, known, classes)
    names = np.array([str(name) for name in classes], object)
    hot = names[None, :] == known[:, None]
    # A class without a column would be right with the whole of its own, missing probability.
    missing = ~hot.any(axis=1)
    return float(np.mean(((array - hot) ** 2).sum(axis=1) + missing))
