"""Scores of the predictions, with the metrics of ``cellplm_jax.evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import normalize

from cellplm_jax.evaluate.annotation import annotation_scores, expected_calibration_error
from cellplm_jax.evaluate.embedding import integration_scores
from cellplm_jax.evaluate.imputation import imputation_scores
from cellplm_jax.evaluate.perturbation import change_scores, mean_scores
from cellplm_jax.evaluate.reconstruction import mean_absolute_error, root_mean_squared_error

Arrays = dict[str, Any]


def annotation(truth: Arrays, found: Arrays) -> dict[str, float]:
    """Macro F1, accuracy and the calibration error, on the test cells."""
    true = truth["labels"][truth["test"]]
    scores = annotation_scores(true, found["labels"])
    kept = {name: scores[name] for name in ("macro_f1", "accuracy")}
    if "probabilities" in found:
        kept["calibration_error"] = expected_calibration_error(
            true, found["probabilities"], found["classes"].tolist()
        )
    return kept


def imputation(truth: Arrays, found: Arrays) -> dict[str, float]:
    """Pearson and cosine a gene over cells, on log-normalised values (library size: the genes shown)."""
    true = normalize(truth["counts"], total=truth["total"])
    # A gene predicted alike in all cells has no correlation; it says nothing, so it counts 0 here.
    scores = imputation_scores(true, found["values"], truth["genes"])
    defined = scores["genes"] - scores["genes_without_correlation"]
    pearson = scores["pearson"] * defined / scores["genes"] if defined else 0.0
    return {
        "pearson": pearson,
        "cosine": scores["cosine"],
        "rmse": scores["rmse"],
        "mae": scores["mae"],
    }


def denoising(truth: Arrays, found: Arrays) -> dict[str, float]:
    """Errors on log-normalised values at the hidden entries, of either kind of prediction."""
    row, column = truth["row"], truth["column"]
    true = np.log1p(truth["count"] * 1e4 / truth["total"][row])
    scores = {}
    for kind in ("expected", "detected"):
        if kind in found:
            values = found[kind][row, column]
            scores[f"{kind}_rmse"] = root_mean_squared_error(true[:, None], values[:, None])
            scores[f"{kind}_mae"] = mean_absolute_error(true[:, None], values[:, None])
    return scores


def integration(truth: Arrays, found: Arrays) -> dict[str, float]:
    """Agreement of clusters and neighbours with the labels, and how well batches mix."""
    batch = truth["batch"] if len(set(truth["batch"])) > 1 else None
    return integration_scores(found["embedding"], batch, labels=truth["labels"])


def perturbation(truth: Arrays, found: Arrays) -> dict[str, float]:
    """Error and correlation of the change, on all genes and on the 20 that change most."""
    scores = change_scores(truth["change"], found["change"])
    return mean_scores(scores)


SCORERS: dict[str, Callable[[Arrays, Arrays], dict[str, float]]] = {
    "annotation": annotation,
    "imputation": imputation,
    "denoising": denoising,
    "integration": integration,
    "perturbation": perturbation,
}


def score(task: str, problem: Path, prediction: Path) -> dict[str, float]:
    """Return the scores of a prediction file."""
    with np.load(problem / "truth.npz") as truth, np.load(prediction) as found:
        return {
            name: round(float(value), 5)
            for name, value in SCORERS[task](dict(truth), dict(found)).items()
        }
