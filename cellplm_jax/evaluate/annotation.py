"""Scores of predicted labels: accuracy, F1, precision, recall, and calibration of probabilities.

The released code calls the mean recall "accuracy" (``CellPLM/utils/eval.py``). Here accuracy is the fraction of correct
cells (micro), and macro accuracy the mean over classes of that fraction (the balanced accuracy).

An "unknown" cell counts as incorrect, but not as a false positive of any class. scikit-learn is installed by the extra
``eval`` and imported on first use; :func:`confusion_counts` and :func:`macro_f1`, which fitting uses in every epoch, do
not need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int64, Integer, Real
from scipy.stats import rankdata

from cellplm_jax.errors import InputError, require
from cellplm_jax.evaluate.inputs import Labels, Matrix, one_axis

_EXTRA = "eval"


def _labels(values: Labels, name: str, cells: int | None = None) -> np.ndarray:
    """Return labels as an object array of strings; missing labels or a wrong number raise an error."""
    column = pd.Series(one_axis(values, name))
    if cells is not None and len(column) != cells:
        raise InputError(
            f"{name} has {len(column)} entries for {cells} cells",
            "one label per cell, in the same order",
            "Apply the same selection of cells to both",
        )
    if not len(column):
        raise InputError(f"{name} is empty", "at least one cell", "Check the selection of cells")
    missing = int(column.isna().sum())
    if missing:
        raise InputError(
            f"{name} is missing (None or NaN) for {missing} of {len(column)} cells",
            "a label for every scored cell",
            "Select the labelled cells first, the same ones in every argument",
        )
    return np.array([str(value) for value in column], object)


def _probabilities(values: Matrix, truth: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return probabilities as float64 [cells, classes]; a wrong shape, range or sum raises an error."""
    array = np.asarray(values, np.float64)
    if array.shape != (len(truth), len(classes)):
        raise InputError(
            f"probabilities of shape {array.shape} for {len(truth)} cells and {len(classes)} classes",
            "one row per cell and one column per class",
            "Pass them in the order of the cells and of classes",
        )
    sound = np.isfinite(array).all() and array.min() >= -1e-6
    if not sound or np.abs(array.sum(axis=1) - 1.0).max() > 1e-3:
        raise InputError(
            "probabilities that are negative, not finite or do not sum to 1 per row",
            "a distribution over the classes for every cell",
            "Pass probabilities, not logits",
        )
    return array


def confusion_counts(
    truth: Integer[np.ndarray, " cells"],
    predicted: Integer[np.ndarray, " cells"],
    classes: int,
) -> Int64[np.ndarray, "{classes} {classes}"]:
    """Count pairs of true and predicted class, both from 0 to ``classes - 1``; rows are true classes."""
    pairs = np.asarray(truth) * classes + np.asarray(predicted)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion: Real[np.ndarray, "classes classes"]) -> float:
    """Return the mean F1 over the classes that occur among true or predicted labels.

    Args:
        confusion: From :func:`confusion_counts`.

    Returns:
        F1 between 0 and 1, as scikit-learn's with ``average="macro"``; NaN without cells.
    """
    hits = np.diag(confusion)
    size = confusion.sum(axis=0) + confusion.sum(axis=1)
    there = size > 0
    return float(np.mean(2.0 * hits[there] / size[there])) if there.any() else float("nan")


def auroc(positive: Bool[np.ndarray, " cells"], score: Real[np.ndarray, " cells"]) -> float:
    """Return the area under the receiver operating characteristic: how well a score ranks positive cells first.

    Returns:
        Between 0 and 1, .5 by chance, ties count half; NaN without cells of both kinds.
    """
    positive = np.asarray(positive, bool)
    number = int(positive.sum())
    rest = int((~positive).sum())
    if not number or not rest:
        return float("nan")
    # Mean ranks of ties: equal scores count as half a correct order.
    rank = rankdata(score)
    return float((rank[positive].sum() - number * (number + 1) / 2) / (number * rest))


def annotation_scores(truth: Labels, predicted: Labels) -> dict[str, float]:
    """Compare predicted with true labels.

    Averages are over the classes of the true labels: a class that is only predicted (such as "unknown") lowers the
    recall of the true classes, but is not a class itself.

    Args:
        truth: [cells], labels of any type; compared as strings.
        predicted: [cells], labels of any type.

    Returns:
        ``accuracy`` (fraction of correct cells: micro), ``macro_accuracy`` (mean over classes),
        ``macro_f1``, ``micro_f1``, ``weighted_f1`` (by the true class sizes), ``macro_precision``,
        ``weighted_precision``, ``macro_recall``, ``weighted_recall``. A class that is never predicted has precision 0.

    Raises:
        InputError: The lengths differ, there are no cells, or a label is missing.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    known = _labels(truth, "truth")
    predictions = _labels(predicted, "predicted", len(known))
    metrics = require("sklearn.metrics", _EXTRA, "Scoring labels")
    classes = sorted(set(known))
    scores = {
        "accuracy": float(metrics.accuracy_score(known, predictions)),
        "macro_accuracy": float(
            metrics.recall_score(
                known,
                predictions,
                labels=classes,
                average="macro",
                zero_division=0,
            )
        ),
    }
    for average in ("macro", "micro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            known,
            predictions,
            labels=classes,
            average=average,
            zero_division=0,
        )
        scores[f"{average}_f1"] = float(f1)
        if average != "micro":
            scores[f"{average}_precision"] = float(precision)
            scores[f"{average}_recall"] = float(recall)
    return scores


def per_class_scores(truth: Labels, predicted: Labels) -> pd.DataFrame:
    """Return precision, recall and F1 per class.

    Args:
        truth: [cells], labels of any type; compared as strings.
        predicted: [cells], labels of any type.

    Returns:
        One row per true label, sorted; columns ``precision``, ``recall``, ``f1``, ``cells`` (true) and
        ``predicted_cells``.

    Raises:
        InputError: As in :func:`annotation_scores`.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    known = _labels(truth, "truth")
    predictions = _labels(predicted, "predicted", len(known))
    metrics = require("sklearn.metrics", _EXTRA, "Scoring labels")
    classes = sorted(set(known))
    precision, recall, f1, cells = metrics.precision_recall_fscore_support(
        known,
        predictions,
        labels=classes,
        average=None,
        zero_division=0,
    )
    predicted_cells = [int((predictions == name).sum()) for name in classes]
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


def confusion_table(truth: Labels, predicted: Labels) -> pd.DataFrame:
    """Count the cells per pair of true and predicted label.

    Args:
        truth: [cells], labels of any type; compared as strings.
        predicted: [cells], labels of any type.

    Returns:
        Rows are true labels, columns predicted ones; both contain all labels that occur in either, sorted.

    Raises:
        InputError: As in :func:`annotation_scores`.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    known = _labels(truth, "truth")
    predictions = _labels(predicted, "predicted", len(known))
    metrics = require("sklearn.metrics", _EXTRA, "Scoring labels")
    names = sorted(set(known) | set(predictions))
    counts = metrics.confusion_matrix(known, predictions, labels=names)
    return pd.DataFrame(
        counts,
        index=pd.Index(names, name="truth"),
        columns=pd.Index(names, name="predicted"),
    )


def expected_calibration_error(
    truth: Labels,
    probabilities: Matrix,
    classes: Sequence[str],
    *,
    bins: int = 15,
) -> float:
    """Return the mean difference between confidence and accuracy over bins of equal width, weighted by cells.

    Args:
        truth: [cells], labels; compared as strings. A label outside ``classes`` is always incorrect.
        probabilities: float [cells, classes].
        classes: Label of each column.
        bins: Number of bins between 0 and 1.

    Returns:
        Between 0 (a confidence of .8 is correct in 80 % of the cells) and 1. Naeini et al., AAAI 2015; Guo et al., ICML
        2017, equation 3.

    Raises:
        InputError: Sizes do not match, a label is missing, or a row is not a distribution.
    """
    known = _labels(truth, "truth")
    array = _probabilities(probabilities, known, classes)
    names = np.array([str(name) for name in classes], object)
    confidence = array.max(axis=1)
    right = names[array.argmax(axis=1)] == known
    # A bin includes its upper end and excludes its lower end.
    place = np.clip(
        np.ceil(confidence * bins).astype(int) - 1,
        0,
        bins - 1,
    )
    size = np.bincount(place, minlength=bins)
    gap = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gap[size > 0]).sum() / len(known))


def brier_score(truth: Labels, probabilities: Matrix, classes: Sequence[str]) -> float:
    """Return the multi-class Brier score: the squared distance between probabilities and truth.

    Args:
        truth: [cells], labels; compared as strings. A label outside ``classes`` has probability 0.
        probabilities: float [cells, classes].
        classes: Label of each column.

    Returns:
        Mean over cells, between 0 (certain and correct) and 2. Brier, Monthly Weather Review 1950, equation 2.

    Raises:
        InputError: As in :func:`expected_calibration_error`.
    """
    known = _labels(truth, "truth")
    array = _probabilities(probabilities, known, classes)
    names = np.array([str(name) for name in classes], object)
    hot = names[None, :] == known[:, None]
    # A class without a column has probability 0, so its squared error is 1.
    missing = ~hot.any(axis=1)
    return float(np.mean(((array - hot) ** 2).sum(axis=1) + missing))
