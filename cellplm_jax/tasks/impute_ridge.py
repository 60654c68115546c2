"""Ridge regression beside the network of the gene imputer, and the choice between the two and their average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from cellplm_jax.evaluate.denoising import log_normalize
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
from cellplm_jax.tasks.contexts import CellTable, variable_genes
from cellplm_jax.train.linear import LinearRegression, RidgeProblem, pool_predictions

LOG, COUNTS = "log_normalized", "counts"
"""Scales of a prediction, as in ``GeneImputer.pool``."""

SCALES = ((LOG, np.asarray), (COUNTS, np.expm1))

RIDGE_CELLS, RIDGE_GENES = 8192, 2000
"""Maximum number of reference cells and panel genes for fitting the ridge regression."""

STRETCHES = np.linspace(0.5, 2.0, 31)
"""Factors that predicted deviations from the mean are multiplied with."""

GAIN = 0.001
"""Smallest relative fall of the squared error at which they are."""

FOLDS = 5
"""Folds of the cross-validation of the weights."""

NETWORK, RIDGE, POOLED, MEAN = "network", "ridge", "pooled", "gene_mean"
"""Methods that are compared."""

_REGRESSION = ("centre", "scale", "kernel", "bias")


@dataclass(frozen=True, eq=False)
class Ridge:
    """A ridge regression that complements the network.

    Attributes:
        genes: int32 [features], columns of its panel genes.
        regression: From their log-normalised values to the imputed genes; centred on the target.
        network_mean: float32 [imputed genes], mean of the network's predictions on the reference.
    """

    genes: np.ndarray
    regression: LinearRegression
    network_mean: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        own = {"genes": self.genes, "network_mean": self.network_mean}
        return own | {name: getattr(self.regression, name) for name in _REGRESSION}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> Ridge:
        """Restore an instance from :meth:`arrays`."""
        regression = LinearRegression(*(arrays[name] for name in _REGRESSION))
        return cls(arrays["genes"], regression, arrays["network_mean"])


def deviations(
    network: np.ndarray, linear: np.ndarray, network_mean: np.ndarray, mean: np.ndarray, pool: Any
) -> np.ndarray:
    """Return the weighted deviations of both predictions from the gene's mean [cells, genes]."""
    return pool[0] * (network - network_mean) + pool[1] * (linear - mean)


def around(mean: np.ndarray | float, deviation: np.ndarray) -> np.ndarray:
    """Return the prediction for deviations from the gene's mean: at least 0."""
    return np.maximum(mean + deviation, 0.0)


def choose_stretch(groups: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """Return the factor of the deviations at which hidden genes of the target are predicted best.

    Weights are chosen on the reference. In the target, genes may vary more or less.

    Args:
        groups: Truth [cells, genes], mean [genes] and deviation [cells, genes] of each group of hidden genes. Means of
            truth and prediction may differ; they are not compared.
    """
    errors = np.zeros(len(STRETCHES))
    for truth, mean, deviation in groups:
        for number, factor in enumerate(STRETCHES):
            error = truth - around(mean, factor * deviation)
            errors[number] += np.square(error - error.mean(axis=0)).sum()
    unchanged = errors[np.abs(STRETCHES - 1).argmin()]
    return float(STRETCHES[errors.argmin()]) if errors.min() < (1 - GAIN) * unchanged else 1.0


def choose_pool(
    truth: np.ndarray, network: np.ndarray, linear: np.ndarray, *, seed: int = 0
) -> tuple[list[float], str]:
    """Return weights of network and ridge regression, and the chosen method.

    The average is kept if its cross-validated mean correlation per gene is at least that of either part; otherwise the
    better part alone is used.

    Args:
        truth: float [cells, genes], of cells that neither was fitted to.
        network: float [cells, genes].
        linear: float [cells, genes].
        seed: Seed of the folds.
    """
    parts = {NETWORK: network, RIDGE: linear}
    scores = {name: mean_pearson(truth, values) for name, values in parts.items()}
    fold = np.random.default_rng(seed).permutation(len(truth)) % FOLDS
    left_out = np.zeros(truth.shape)
    for number in range(FOLDS):
        out = fold == number
        if out.all() or not out.any():
            continue
        weights = pool_predictions(truth[~out], network[~out], linear[~out])
        # Centred on the other folds, as a prediction for new cells is.
        left_out[out] = sum(
            weight * (values[out] - values[~out].mean(axis=0))
            for weight, values in zip(weights, parts.values(), strict=True)
        )
    scores = {name: np.nan_to_num(score, nan=-1.0) for name, score in scores.items()}
    better = max(scores, key=lambda name: scores[name])
    if np.nan_to_num(mean_pearson(truth, left_out), nan=-1.0) >= scores[better]:
        weights = pool_predictions(truth, network, linear)
        alone = [name for name, weight in zip(parts, weights, strict=True) if weight > 0]
        return weights, alone[0] if len(alone) == 1 else POOLED
    (weight,) = pool_predictions(truth, parts[better])
    return ([weight, 0.0] if better == NETWORK else [0.0, weight]), better


def mean_pearson(truth: np.ndarray, values: np.ndarray) -> float:
    """Return the mean over the genes with a defined correlation; NaN if there are none."""
    correlation = pearson_per_gene(truth, values)
    defined = np.isfinite(correlation)
    return float(correlation[defined].mean()) if defined.any() else float("nan")


def method_scores(truth: np.ndarray, methods: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Return mean correlation per gene (unless undefined) and RMSE of each method's predictions [cells, genes]."""
    found = {}
    for name, values in methods.items():
        pearson = mean_pearson(truth, np.broadcast_to(values, truth.shape))
        found[name] = {} if np.isnan(pearson) else {"pearson": pearson}
        found[name]["rmse"] = float(np.sqrt(np.mean((values - truth) ** 2)))
    return found


class RidgeData:
    """Log-normalised panel genes of reference and target, for one or more regressions.

    Args:
        source: The reference.
        target: The target cells, in the same columns.
        shown: bool [genes], input genes.
        train: int, training cells of the reference.
        own: int, cells of the target with counts.
        seed: Seed of the selection of cells if there are many.
    """

    def __init__(
        self,
        source: CellTable,
        target: CellTable,
        shown: np.ndarray,
        train: np.ndarray,
        own: np.ndarray,
        seed: int,
    ):
        self.shown, self._generator = shown, np.random.default_rng(seed)
        self.source, self.target = source, target
        panel = np.flatnonzero(shown)
        if len(panel) > RIDGE_GENES:
            panel = panel[variable_genes(source.counts[train][:, panel], RIDGE_GENES)]
        self.panel = panel
        self.centre = self.values(target, self.some(own), panel).mean(axis=0).astype(np.float32)

    def some(self, cells: np.ndarray, most: int = RIDGE_CELLS) -> np.ndarray:
        """Return the cells, or a random part of them if there are many."""
        if len(cells) <= most:
            return cells
        return np.sort(self._generator.choice(cells, most, replace=False))

    def values(self, table: CellTable, cells: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return log-normalised values, float32 [cells, columns], scaled by the input genes."""
        total = panel_totals(table, self.shown, cells)
        counts = sparse.csr_matrix(table.counts[cells])[:, columns]
        return log_normalize(counts, total=total).toarray().astype(np.float32)

    def problem(self, cells: np.ndarray) -> RidgeProblem:
        """Return the regression problem on some cells of the reference."""
        return RidgeProblem(self.values(self.source, cells, self.panel))


def panel_totals(table: CellTable, shown: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the counts of cells over the input genes, float64 [cells]."""
    counts = sparse.csr_matrix(table.counts[cells])[:, np.flatnonzero(shown)]
    return np.asarray(counts.sum(axis=1), np.float64).ravel()
