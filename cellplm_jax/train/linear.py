"""Linear models that complement the network and serve as baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer, Real
from scipy import sparse
from scipy.optimize import minimize, nnls
from scipy.special import log_softmax, softmax

PENALTIES = tuple(10.0**power for power in range(0, 7))
"""Candidate penalties of ridge regression."""


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Multinomial logistic regression.

    Attributes:
        kernel: Coefficients.
        bias: Intercepts.
    """

    kernel: Float32[np.ndarray, "features classes"]
    bias: Float32[np.ndarray, " classes"]

    def log_probabilities(
        self, features: Real[sparse.csr_matrix, "cells features"]
    ) -> Float64[np.ndarray, "cells classes"]:
        """Return natural logarithms."""
        return log_softmax(features @ self.kernel.astype(np.float64) + self.bias, axis=1)


def fit_linear_classifier(
    features: Real[sparse.csr_matrix, "cells features"],
    labels: Integer[np.ndarray, " cells"],
    classes: int,
    *,
    penalty: float = 1.0,
    weights: Float[np.ndarray, " classes"] | None = None,
    iterations: int = 200,
) -> LinearClassifier:
    """Fit a multinomial logistic regression with an L2 penalty to convergence (L-BFGS).

    The objective is scikit-learn's: the sum of the cells' cross-entropies and half the penalty times the squared
    kernel, with an unpenalised bias; ``penalty`` is its ``1 / C``.

    Args:
        features: One row per cell.
        labels: Class of each cell, below ``classes``.
        classes: Number of classes.
        penalty: Strength of the L2 penalty.
        weights: Weight of each cell by its class; None: 1.
        iterations: Maximum number of L-BFGS iterations.
    """
    cells = features.shape[0]
    width = features.shape[1]
    # L-BFGS compares values that differ in the last digits; float32 would end it early.
    features = sparse.csr_matrix(features, dtype=np.float64)
    # Made once: the gradient needs the transposed product in every step.
    transposed = features.T.tocsr()
    truth = np.zeros((cells, classes))
    truth[np.arange(cells), labels] = 1.0
    weight = np.ones(cells) if weights is None else np.asarray(weights, np.float64)[labels]
    # Per unit of weight, so that the tolerances of the optimizer do not depend on the number of cells.
    total = max(float(weight.sum()), 1e-12)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel = flat[: width * classes].reshape(width, classes)
        bias = flat[width * classes :]
        scores = log_softmax(features @ kernel + bias, axis=1)
        value = -(weight * scores[np.arange(cells), labels]).sum() + 0.5 * penalty * np.sum(
            kernel**2
        )
        slope = weight[:, None] * (np.exp(scores) - truth)
        gradient = np.concatenate(
            [(transposed @ slope + penalty * kernel).ravel(), slope.sum(axis=0)]
        )
        return value / total, gradient / total

    optimum: Any = minimize(
        objective,
        np.zeros((width + 1) * classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-7},
    )
    kernel = optimum.x[: width * classes].reshape(width, classes)
    return LinearClassifier(
        kernel.astype(np.float32), optimum.x[width * classes :].astype(np.float32)
    )


def pool_log_probabilities(
    log_probabilities: Float[np.ndarray, "classifiers cells classes"],
    labels: Integer[np.ndarray, " cells"],
    *,
    prior: Sequence[float] | None = None,
    prior_cells: float = 10.0,
) -> Float64[np.ndarray, " classifiers"]:
    """Return the optimal weights for adding the log-probabilities of several classifiers.

    A logarithmic opinion pool (Genest and Zidek, Statistical Science 1986); with one classifier it is temperature
    scaling (Guo et al., ICML 2017). The weights maximise the likelihood with a prior, so that a few
    cells that are all correct do not make every probability 1.

    Args:
        log_probabilities: Of cells that no classifier was fitted on.
        labels: Class of each cell.
        prior: Prior weights; None: ``1 / classifiers`` for each.
        prior_cells: Number of cells that the prior is worth.

    Returns:
        At least 0.
    """
    number, cells, _ = log_probabilities.shape
    centre = np.full(number, 1.0 / number) if prior is None else np.asarray(prior, np.float64)

    def objective(pool: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.tensordot(pool, log_probabilities, axes=1)
        scores = log_softmax(mixed, axis=1)
        value = -scores[np.arange(cells), labels].sum()
        expected = (softmax(mixed, axis=1)[None] * log_probabilities).sum(axis=(1, 2))
        actual = log_probabilities[:, np.arange(cells), labels].sum(axis=1)
        value += 0.5 * prior_cells * np.sum((pool - centre) ** 2)
        return float(value), expected - actual + prior_cells * (pool - centre)

    optimum: Any = minimize(
        objective,
        centre,
        jac=True,
        method="L-BFGS-B",
        # A negative weight would turn a classifier's opinion around.
        bounds=[(0.0, None)] * number,
    )
    return optimum.x


@dataclass(frozen=True, eq=False)
class LinearRegression:
    """Ridge regression of many targets on standardised features.

    Attributes:
        centre: Means.
        scale: Standard deviations.
        kernel: Coefficients.
        bias: Means of the targets.
    """

    centre: Float32[np.ndarray, " features"]
    scale: Float32[np.ndarray, " features"]
    kernel: Float32[np.ndarray, "features targets"]
    bias: Float32[np.ndarray, " targets"]

    def predict(
        self, features: Float[np.ndarray, "cells features"]
    ) -> Float32[np.ndarray, "cells targets"]:
        """Return the predicted targets."""
        return ((features - self.centre) / self.scale).astype(np.float32) @ self.kernel + self.bias


class RidgeProblem:
    """Closed-form ridge regression for any number of targets, with one decomposition of the features.

    Args:
        features: One row per cell, dense.
    """

    def __init__(self, features: Float[np.ndarray, "cells features"]):
        cells = features.shape[0]
        width = features.shape[1]
        self.centre = features.mean(axis=0)
        # Nearly constant features would be blown up to unit variance.
        self.scale = np.maximum(features.std(axis=0), 1e-3)
        self._standard = ((features - self.centre) / self.scale).astype(np.float64)
        # Eigenvectors of the smaller of the two Gram matrices.
        if cells <= width:
            values, self._vectors = np.linalg.eigh(self._standard @ self._standard.T)
        else:
            _, right = np.linalg.eigh(self._standard.T @ self._standard)
            lengths = np.linalg.norm(self._standard @ right, axis=0)
            # Directions without variance have no left vector.
            there = lengths > 1e-8 * max(lengths.max(), 1e-12)
            values = lengths[there] ** 2
            self._vectors = (self._standard @ right[:, there]) / lengths[there]
        self._values = np.maximum(values, 0.0)

    def fit(
        self,
        targets: Float[np.ndarray, "cells targets"],
        penalty: float | None = None,
    ) -> LinearRegression:
        """Fit the regression.

        Args:
            targets: One row per cell, dense.
            penalty: L2 penalty on the standardised features (scikit-learn's ``alpha``). None: the one with the smallest
                leave-one-out error (Golub, Heath and Wahba, Technometrics 1979) among powers of ten, with standardised
                targets, so that all have equal weight.

        """
        bias = targets.mean(axis=0)
        centred = (targets - bias).astype(np.float64)
        rotated = self._vectors.T @ centred
        if penalty is None:
            penalty = min(PENALTIES, key=lambda candidate: self._error(centred, rotated, candidate))
        dual = self._vectors @ (rotated / (self._values + penalty)[:, None])
        return LinearRegression(
            self.centre.astype(np.float32),
            self.scale.astype(np.float32),
            (self._standard.T @ dual).astype(np.float32),
            bias.astype(np.float32),
        )

    def _error(self, centred: np.ndarray, rotated: np.ndarray, penalty: float) -> float:
        """Return the mean squared leave-one-out error of the standardised targets."""
        shrink = self._values / (self._values + penalty)
        # The last term is that of the intercept.
        leverage = np.square(self._vectors) @ shrink + 1.0 / len(centred)
        residual = centred - self._vectors @ (shrink[:, None] * rotated)
        # The left-out residual of a linear smoother, without a refit for each cell.
        residual /= np.maximum(1.0 - leverage, 1e-6)[:, None]
        # Each target counts the same, whatever its variance.
        weight = 1.0 / np.maximum(centred.var(axis=0), 1e-12)
        return float((np.square(residual).mean(axis=0) * weight).mean())


def pool_predictions(
    truth: Float[np.ndarray, "cells genes"], *predictions: Float[np.ndarray, "cells genes"]
) -> list[float]:
    """Return the optimal weights for adding predictions, at least 0 and the same for every gene.

    Least squares over all cells and genes, with each gene of truth and predictions centred and divided by the truth's
    standard deviation, so that all genes have equal weight (stacking: Breiman, Machine Learning 1996).

    Args:
        truth: True values.
        *predictions: For cells that no model was fitted to.
    """
    spread = truth.std(axis=0)
    there = spread > 1e-6
    if not there.any():
        return [1.0 / len(predictions)] * len(predictions)
    parts = [
        ((values - values.mean(axis=0)) / np.where(there, spread, 1.0))[:, there].ravel()
        for values in (truth, *predictions)
    ]
    columns = np.stack(parts[1:], axis=1).astype(np.float64)
    weights, _ = nnls(columns, parts[0].astype(np.float64))
    return [float(weight) for weight in weights]
