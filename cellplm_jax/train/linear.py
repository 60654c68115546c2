"""Logistic regression on sparse features: the simple model that a network is averaged with, and has to add to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Multinomial logistic regression.

    Attributes:
        kernel: float32 [features, classes].
        bias: float32 [classes].
    """

    kernel: np.ndarray
    bias: np.ndarray

    def log_probabilities(self, features: sparse.csr_matrix) -> np.ndarray:
        """Return float64 [cells, classes], natural logarithms.

        Args:
            features: CSR [cells, features].
        """
        return log_softmax(features @ self.kernel.astype(np.float64) + self.bias, axis=1)


def fit_linear_classifier(
    features: sparse.csr_matrix,
    labels: np.ndarray,
    classes: int,
    *,
    penalty: float = 1.0,
    weights: np.ndarray | None = None,
    iterations: int = 200,
) -> LinearClassifier:
    """Fit a multinomial logistic regression with an L2 penalty, to its optimum (L-BFGS).

    The objective is scikit-learn's: the sum of the cells' cross-entropies and half the penalty times the squared
    kernel, the bias left free; ``penalty`` is its ``1 / C``.

    Args:
        features: CSR [cells, features].
        labels: int [cells], below ``classes``.
        classes: How many there are.
        penalty: Strength of the L2 penalty.
        weights: float [classes], weight of a cell by its class; None: 1.
        iterations: Of L-BFGS at most.

    Returns:
        The classifier.
    """
    cells, width = features.shape[0], features.shape[1]
    features = sparse.csr_matrix(features, dtype=np.float64)
    transposed = features.T.tocsr()
    truth = np.zeros((cells, classes))
    truth[np.arange(cells), labels] = 1.0
    weight = np.ones(cells) if weights is None else np.asarray(weights, np.float64)[labels]
    # Per unit of weight, so that the tolerances of the optimizer mean the same for any number of cells.
    total = max(float(weight.sum()), 1e-12)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        scores = log_softmax(features @ kernel + bias, axis=1)
        value = -(weight * scores[np.arange(cells), labels]).sum() + 0.5 * penalty * np.sum(
            kernel**2
        )
        slope = weight[:, None] * (np.exp(scores) - truth)
        gradient = np.concatenate(
            [(transposed @ slope + penalty * kernel).ravel(), slope.sum(axis=0)]
        )
        return value / total, gradient / total

    found: Any = minimize(
        objective,
        np.zeros((width + 1) * classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-7},
    )
    kernel = found.x[: width * classes].reshape(width, classes)
    return LinearClassifier(
        kernel.astype(np.float32), found.x[width * classes :].astype(np.float32)
    )


def pool_log_probabilities(
    log_probabilities: np.ndarray, labels: np.ndarray, *, prior_cells: float = 10.0
) -> np.ndarray:
    """Return the weights with which the log-probabilities of several classifiers are best added.

    A logarithmic opinion pool (Genest and Zidek, Statistical Science 1986); with one classifier it is temperature
    scaling (Guo et al., ICML 2017). The weights are those of highest likelihood, held near their average by a prior, so
    that a handful of cells that are all right does not make every probability 1.

    Args:
        log_probabilities: float [classifiers, cells, classes], of cells that none was fitted on.
        labels: int [cells].
        prior_cells: How many cells the prior counts as; its centre is ``1 / classifiers`` for each.

    Returns:
        float64 [classifiers], at least 0.
    """
    number, cells, _ = log_probabilities.shape
    centre = 1.0 / number

    def objective(pool: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.tensordot(pool, log_probabilities, axes=1)
        scores = log_softmax(mixed, axis=1)
        value = -scores[np.arange(cells), labels].sum()
        expected = (softmax(mixed, axis=1)[None] * log_probabilities).sum(axis=(1, 2))
        actual = log_probabilities[:, np.arange(cells), labels].sum(axis=1)
        value += 0.5 * prior_cells * np.sum((pool - centre) ** 2)
        return float(value), expected - actual + prior_cells * (pool - centre)

    found: Any = minimize(
        objective,
        np.full(number, centre),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * number,
    )
    return found.x
