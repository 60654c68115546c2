"""Prediction intervals of imputed genes: quantiles of the errors in the reference, calibrated on held-out panel genes.

The errors of validation cells of the reference give the shape of a gene's interval. They do not include the difference
between reference and target, so groups of panel genes are hidden in turn and predicted for target cells from the rest
of the panel. The factor by which the intervals of these genes have to be widened to hold their coverage is a conformal
quantile (Papadopoulos et al. 2002, Romano et al. 2019), and is applied to every imputed gene. Coverage therefore holds
on average over genes that are like those of the panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellplm_jax.errors import InputError

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Coverages for which intervals are stored."""

NARROWEST, FLOOR = 0.02, 0.05
"""Smallest half of an interval per unit of the error's scale; prediction added in that scale, the root of both."""

FEWEST = 20
"""Minimum number of validation cells for intervals."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals around log-normalised predictions.

    Attributes:
        lower: float32 [levels, genes], at most 0: lower end, in units of :func:`error_scale`.
        upper: float32 [levels, genes], at least 0.
        factor: float32 [levels], from held-out panel genes.
    """

    lower: np.ndarray
    upper: np.ndarray
    factor: np.ndarray

    def around(
        self,
        predicted: np.ndarray,
        level: float,
        genes: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends for predictions [cells, genes].

        Args:
            predicted: Log-normalised.
            level: One of :data:`LEVELS`.
            genes: int, positions of the columns.
        """
        row = LEVELS.index(level)
        scale = self.factor[row] * error_scale(predicted)
        low = np.maximum(predicted + scale * self.lower[row, genes], 0.0)
        return low, predicted + scale * self.upper[row, genes]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        return {"lower": self.lower, "upper": self.upper, "factor": self.factor}


def require_intervals(intervals: Intervals | None, coverage: float) -> Intervals:
    """Return the intervals of an imputer.

    Raises:
        InputError: The coverage is not one of :data:`LEVELS`, or the imputer has no intervals.
    """
    if coverage not in LEVELS:
        raise InputError(f"coverage = {coverage}", f"one of {', '.join(map(str, LEVELS))}")
    if intervals is None:
        raise InputError(
            "this imputer has no intervals",
            f"one that was fitted with at least {FEWEST} validation cells, by a version with intervals",
            "Fit again with a larger reference or validation_fraction",
        )
    return intervals


def error_scale(predicted: np.ndarray) -> np.ndarray:
    """Return the scale of errors: they grow with the root of the prediction."""
    return np.sqrt(np.maximum(predicted, 0.0) + FLOOR)


def error_quantiles(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return quantiles of the scaled errors of each gene for :data:`LEVELS`, float32 [levels, genes] each.

    Args:
        truth: float [cells, genes], log-normalised.
        predicted: float [cells, genes].
    """
    errors = (truth - predicted) / error_scale(predicted)
    tails = (1 - np.array(LEVELS)) / 2
    lower = np.quantile(errors, tails, axis=0, method="lower")
    upper = np.quantile(errors, 1 - tails, axis=0, method="higher")
    return (
        np.minimum(lower, -NARROWEST).astype(np.float32),
        np.maximum(upper, NARROWEST).astype(np.float32),
    )


def widening(
    truth: np.ndarray,
    predicted: np.ndarray,
    quantiles: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return for each level the factor by which intervals must be widened to cover that fraction, float32 [levels].

    Args:
        truth: float [cells, genes], log-normalised values of held-out genes.
        predicted: float [cells, genes], predicted without them.
        quantiles: From :func:`error_quantiles`, of the same genes in the reference.
    """
    errors = (truth - predicted) / error_scale(predicted)
    found = []
    for row, level in enumerate(LEVELS):
        lower = quantiles[0][row]
        upper = quantiles[1][row]
        scores = np.where(errors < 0, errors / lower, errors / upper)
        rank = min(1.0, level * (1 + 1 / scores.size))
        found.append(np.quantile(scores, rank, method="higher"))
    return np.array(found, np.float32)
