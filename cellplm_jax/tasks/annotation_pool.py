"""Parts of the annotator besides the network: logistic regression, their pool, and neighbours' label transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import log_softmax

from cellplm_jax.train.linear import pool_log_probabilities

LINEAR_GENES = 3000
"""Maximum number of highly variable genes used by the logistic regression."""

LINEAR_PENALTY = 3.0
"""L2 penalty of the logistic regression (scikit-learn's 1 / C)."""

POOL, POOL_CELLS = (0.25, 0.75), 200.0
"""Prior weights of network and logistic regression, and the number of validation cells they are worth.

Validation cells come from the batches of the training cells, in which the network is better than in new ones; and the
logistic regression is refitted with the validation cells, the network is not.
"""

POOL_FOLDS, NEIGHBORS = 5, 15
"""Folds of the choice of the pool; voting cells of the label transfer."""


def clearly_better(logits: np.ndarray, other: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether the cross-entropy is lower by more than two standard errors of the difference per cell.

    Args:
        logits: float [cells, classes].
        other: The same, of what is kept otherwise.
        labels: int [cells].
    """
    cells = np.arange(len(labels))
    loss, kept = (
        -log_softmax(x / fit_temperature(x, labels), axis=1)[cells, labels] for x in (logits, other)
    )
    return _lower(loss, kept)


def _lower(loss: np.ndarray, kept: np.ndarray) -> bool:
    """Return whether losses per cell are lower by more than two standard errors of the difference."""
    gain = kept - loss
    return bool(gain.mean() > 2.0 * gain.std() / np.sqrt(len(gain)))


def choose_pool(
    network: np.ndarray | None,
    linear: np.ndarray | None,
    labels: np.ndarray,
    *,
    average: bool = True,
) -> tuple[list[float], str]:
    """Choose the weights of network and logistic regression by cross-validation.

    The validation cells are assigned to five folds. The weights are fitted to four, and the cross-entropy is computed
    on the fifth: of the pool, and of the logistic regression alone. This is used alone if it is better by more than two
    standard errors. The network is never used alone next to it: validation cells come from the batches of the training
    cells, and do not show what it loses in others.

    Args:
        network: float [validation cells, classes], log-probabilities; None: no validation cells.
        linear: The same, of the logistic regression.
        labels: int [validation cells].
        average: False: the network alone, or the logistic regression alone if it is clearly better.

    Returns:
        Both weights, and ``"pooled"``, ``"network"`` or ``"linear"``.
    """
    if network is None or linear is None:
        return (list(POOL), "pooled") if average else ([1.0, 0.0], "network")
    if not average and not clearly_better(linear, network, labels):
        return [1.0, 0.0], "network"
    both = np.stack([network, linear])
    parts = {"pooled": [0, 1], "linear": [1]}

    def fit(name: str, cells: np.ndarray) -> np.ndarray:
        rows = parts[name]
        prior = POOL if name == "pooled" else (1.0,)
        weights = np.zeros(2)
        weights[rows] = pool_log_probabilities(
            both[rows][:, cells],
            labels[cells],
            prior=prior,
            prior_cells=POOL_CELLS,
        )
        return weights

    if not average:
        return fit("linear", np.arange(len(labels))).tolist(), "linear"
    every = np.arange(len(labels))
    losses = {name: np.zeros(len(labels)) for name in parts}
    for number in range(POOL_FOLDS):
        out = np.flatnonzero(every % POOL_FOLDS == number)
        # With fewer cells than folds.
        if not len(out) or len(out) == len(labels):
            continue
        for name in parts:
            mixed = np.tensordot(
                fit(name, np.delete(every, out)),
                both[:, out],
                axes=1,
            )
            scores = log_softmax(mixed, axis=1)
            losses[name][out] = -scores[np.arange(len(out)), labels[out]]
    chosen = "linear" if _lower(losses["linear"], losses["pooled"]) else "pooled"
    return fit(chosen, every).tolist(), chosen


def neighbor_votes(
    reference: np.ndarray,
    codes: np.ndarray,
    cells: np.ndarray,
    classes: int,
) -> np.ndarray:
    """Return the shares of the classes among the nearest labelled cells, float64 [cells, classes].

    Args:
        reference: float [labelled cells, dimensions].
        codes: int [labelled cells].
        cells: float [cells, dimensions].
        classes: Number of classes.
    """
    voters = min(NEIGHBORS, len(reference))
    square = (reference**2).sum(axis=1)
    votes = np.zeros((len(cells), classes))
    for start in range(0, len(cells), 1024):
        piece = cells[start : start + 1024]
        # The squared norm of the cell itself is omitted: it does not change the order.
        squared = square[None] - 2.0 * piece @ reference.T
        nearest = np.argpartition(squared, voters - 1, axis=1)[:, :voters]
        for place in range(voters):
            votes[np.arange(start, start + len(piece)), codes[nearest[:, place]]] += 1.0 / voters
    return votes


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
        fit = cross_entropy(logits, labels, float(np.exp(log)))
        return fit + 0.5 * log**2 / len(labels)

    # A temperature outside 1/20 to 20 means that the cells do not determine it.
    bound = np.log(20.0)
    optimum: Any = minimize_scalar(objective, bounds=(-bound, bound), method="bounded")
    return float(np.exp(optimum.x))


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return the mean cross-entropy in nats of logits divided by a temperature."""
    scaled = np.asarray(logits, np.float64) / temperature
    top = scaled.max(axis=1, keepdims=True)
    total = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
    return float(np.mean(total - scaled[np.arange(len(labels)), labels]))


def log_probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Return float64 [cells, classes], with probabilities clipped at 1e-12."""
    return np.maximum(log_softmax(np.asarray(logits, np.float64), axis=1), np.log(1e-12))
