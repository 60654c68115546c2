"""Scores of predicted perturbation effects, and baselines.

An effect is the change of mean log-normalised expression relative to control. Everything is computed in float64 with
numpy; arrays are [perturbations, genes]. Most of a change is shared by all perturbations of a screen, so a high
correlation is only meaningful compared with that of :func:`mean_change`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Real

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.inputs import Matrix

TOP_GENES = 20
"""Number of genes with the largest true change used in the ``_top`` scores."""


def _pair(truth: Matrix, prediction: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 [perturbations, genes]; invalid shapes or values raise an error."""
    true = np.asarray(truth, np.float64)
    predicted = np.asarray(prediction, np.float64)
    if true.ndim != 2 or true.shape != predicted.shape or not true.size:
        raise InputError(
            f"truth has shape {true.shape} and prediction has shape {predicted.shape}",
            "[perturbations, genes] in both, the same ones",
            "Select and order perturbations and genes the same way first",
        )
    for name, values in (("truth", true), ("prediction", predicted)):
        if not np.isfinite(values).all():
            raise InputError(
                f"{name} contains NaN or infinity",
                "finite changes",
                "Remove those perturbations",
            )
    return true, predicted


def pearson_of_change(truth: Matrix, prediction: Matrix) -> Float64[np.ndarray, " perturbations"]:
    """Return Pearson's correlation over genes for each perturbation.

    Args:
        truth: float [perturbations, genes], changes of mean log-normalised expression.
        prediction: float [perturbations, genes].

    Returns:
        NaN if truth or prediction is constant.

    Raises:
        InputError: Shapes differ, or a value is not finite.
    """
    return _pearson(*_pair(truth, prediction))


def _pearson(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    centred = [values - values.mean(axis=1, keepdims=True) for values in (true, predicted)]
    lengths = [np.sqrt(np.square(values).sum(axis=1)) for values in centred]
    scale = [np.abs(values).max(axis=1) * np.sqrt(values.shape[1]) for values in (true, predicted)]
    # Relative to the values: centring a constant row leaves rounding errors, whose correlation means nothing.
    constant = (lengths[0] <= 1e-13 * scale[0]) | (lengths[1] <= 1e-13 * scale[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        # Divided twice: the product of two norms can overflow or underflow.
        correlation = (centred[0] * centred[1]).sum(axis=1) / lengths[0] / lengths[1]
    return np.where(constant, np.nan, np.clip(correlation, -1.0, 1.0))


def change_scores(
    truth: Matrix,
    prediction: Matrix,
    *,
    top: int = TOP_GENES,
) -> dict[str, Float64[np.ndarray, " perturbations"]]:
    """Score every perturbation.

    Args:
        truth: float [perturbations, genes], changes of mean log-normalised expression.
        prediction: float [perturbations, genes].
        top: Number of genes with the largest absolute true change in the ``_top`` scores.

    Returns:
        ``rmse``, ``mae``, ``pearson``, and the same over the top genes with the suffix
        ``_top``. A correlation is NaN if truth or prediction is constant (for example no predicted change).

    Raises:
        InputError: Shapes differ, a value is not finite, or ``top`` is below 2.
    """
    true, predicted = _pair(truth, prediction)
    # A correlation over one gene is undefined.
    if top < 2:
        raise InputError(f"top = {top}", "at least 2 genes", "Raise it")
    # Selected by the truth only, so every method is scored on the same genes.
    order = np.argsort(-np.abs(true), axis=1, kind="stable")[:, :top]
    scores = {}
    for name, one, other in (
        ("", true, predicted),
        ("_top", np.take_along_axis(true, order, 1), np.take_along_axis(predicted, order, 1)),
    ):
        scores[f"rmse{name}"] = np.sqrt(np.square(one - other).mean(axis=1))
        scores[f"mae{name}"] = np.abs(one - other).mean(axis=1)
        scores[f"pearson{name}"] = _pearson(one, other)
    return scores


def mean_scores(scores: dict[str, Real[np.ndarray, " perturbations"]]) -> dict[str, float]:
    """Average :func:`change_scores` over perturbations; NaN values are omitted, and the mean is NaN if all are."""
    return {
        name: float(np.mean(values[np.isfinite(values)])) if np.isfinite(values).any() else np.nan
        for name, values in scores.items()
    }


def mean_change(
    changes: Matrix,
    *,
    targets: Real[np.ndarray, " _"] | Sequence[int] | None = None,
) -> Float64[np.ndarray, " genes"]:
    """Return the baseline that predicts the average training effect for every perturbation.

    Args:
        changes: float [perturbations, genes], of the training perturbations.
        targets: Number of targets of each perturbation; the result is then the change per target, by least
            squares under an additive model. None: one each.
    Raises:
        InputError: There are no training perturbations.
    """
    values = np.asarray(changes, np.float64)
    if values.ndim != 2 or not len(values):
        raise InputError(
            f"training changes of shape {values.shape}",
            "[perturbations, genes] with at least one perturbation",
            "Pass the changes of the training perturbations",
        )
    number = np.ones(len(values)) if targets is None else np.asarray(targets, np.float64)
    # Least squares for changes that are proportional to the number of targets; with one target each it is the mean.
    return number @ values / np.square(number).sum()


def no_change(perturbations: int, genes: int) -> Float64[np.ndarray, "{perturbations} {genes}"]:
    """Return the baseline that predicts control expression: zeros."""
    return np.zeros((perturbations, genes))


def additive_change(changes: Matrix) -> Float64[np.ndarray, " genes"]:
    """Return the baseline that predicts the sum of the effects of the targets for a combination.

    Args:
        changes: float [targets, genes], the effect of each target; one target: its own.
    Raises:
        InputError: There are no targets.
    """
    values = np.asarray(changes, np.float64)
    if values.ndim != 2 or not len(values):
        raise InputError(
            f"changes of shape {values.shape}", "[targets, genes], at least one target"
        )
    return values.sum(axis=0)
