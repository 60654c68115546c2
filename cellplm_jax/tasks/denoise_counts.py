"""Expected counts from a mean and a dispersion, and the layers that store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy import sparse

from cellplm_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from cellplm_jax.batch import Reconstruction

LAYER = "cellplm_denoised"
"""Layer that ``predict`` writes; the log-normalised one has the suffix ``_log1p``."""

Storage = Literal["float32", "rounded", "float16", "sparse"]
"""How a layer is stored."""

SPARSE_ENTRIES = 1.25
"""Entries of a sparse layer per non-zero count."""

DIGITS, STEP, LOG_STEP = 2, 2e-5, 1 / 8
"""Rounding: binary digits after the first one, the largest step of small values as a fraction of the cell's sum, and
the step of logarithms."""

EXPLICIT_MEAN, EXPLICIT_COUNTS = 12.0, 48
"""Maximum mean, and number of counts, for the explicit sum of a mean of logarithms."""


@dataclass(frozen=True)
class Options:
    """Options of a prediction; see :meth:`Denoiser.predict`."""

    log_normalized: bool = False
    detected: bool = False
    own_counts: bool = False
    storage: str = "float32"
    key_added: str = LAYER

    def check(self) -> None:
        """Reject options.

        Raises:
            InputError: An option is unknown, or two exclude each other.
        """
        if self.storage not in get_args(Storage):
            known = get_args(Storage)
            raise InputError(
                f"storage={self.storage!r}",
                f"one of {', '.join(map(repr, known))}",
                nearest(str(self.storage), known, "Pass one of them"),
            )
        if self.detected and self.own_counts:
            raise InputError(
                "detected and own_counts",
                "one of them, because counts given as non-zero do not use the own count",
                "Omit one",
            )


class LayerWriter:
    """A layer [cells, names of the data] that is filled in chunks of cells and holds the denoised columns only."""

    def __init__(
        self,
        shape: tuple[int, int],
        known: np.ndarray,
        storage: str,
        nonzeros: int,
        logs: bool = False,
    ):
        self.shape = shape
        self.known = known
        self.storage = storage
        self.logs = logs
        # About as many entries as the counts had, so that the layer needs about as much memory.
        self.density = SPARSE_ENTRIES * nonzeros / max(shape[0] * len(known), 1)
        self.dense, self.blocks = None, []
        # A sparse entry takes the memory of two dense ones.
        if storage == "float16" or (storage != "sparse" and 2 * len(known) > shape[1]):
            self.dense = np.zeros(shape, "float16" if storage == "float16" else "float32")

    def add(self, cells: slice, values: np.ndarray) -> None:
        """Write float32 [cells, denoised columns].

        Args:
            cells: Rows of the layer.
            values: Expected counts, or logarithms.

        Raises:
            InputError: A value is too large for float16.
        """
        given = values
        if self.storage in ("rounded", "sparse"):
            values = np.rint(values / LOG_STEP) * LOG_STEP if self.logs else rounded(values)
        if self.dense is not None:
            if self.storage == "float16" and values.size and values.max() > 65504:
                raise InputError(
                    f"an expected count of {values.max():.0f}",
                    "at most 65,504 in storage='float16'",
                    "Pass storage='float32'",
                )
            self.dense[cells, self.known] = values
            return
        kept = values > 0
        if self.storage == "sparse":
            number = min(values.size, max(1, round(self.density * values.size)))
            # The largest entries of the block, before rounding: rounding makes ties.
            kept &= given >= np.partition(given.ravel(), values.size - number)[-number]
        indices = np.tile(self.known.astype(np.int32), len(values))[kept.ravel()]
        indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        shape = (cells.stop - cells.start, self.shape[1])
        self.blocks.append(sparse.csr_matrix((values[kept], indices, indptr), shape))

    def result(self) -> Any:
        """Return the layer: an array, or CSR."""
        return sparse.vstack(self.blocks).tocsr() if self.dense is None else self.dense


def rounded(values: np.ndarray) -> np.ndarray:
    """Round in binary, so that the lower bytes are 0 and compress; small values to steps relative to the row's sum.

    Args:
        values: float32 [cells, genes], at least 0.

    Returns:
        float32 [cells, genes].
    """
    values = np.ascontiguousarray(values, np.float32)
    dropped = 23 - DIGITS
    # Adding half of the last kept bit rounds to nearest; a carry moves into the exponent, as it should.
    bits = values.view(np.int32) + (1 << (dropped - 1))
    relative = (bits & ~((1 << dropped) - 1)).view(np.float32)
    # Relative to the row's sum, so that deep and shallow cells lose the same share.
    sums = values.sum(axis=1, keepdims=True, dtype=np.float64)
    exponent = np.floor(np.log2(np.maximum(STEP * sums, 1e-30)))
    step = np.exp2(exponent).astype(np.float32)
    return np.where(values < step * 2**DIGITS, np.rint(values / step) * step, relative)


def expected_counts(
    output: Reconstruction,
    totals: np.ndarray,
    measured: np.ndarray,
    detected: bool = False,
) -> np.ndarray:
    """Convert a decoder's output to counts: scaled so that the measured genes of each cell sum to its total.

    Args:
        output: Unscaled means [cells, genes], as numpy.
        totals: float [cells].
        measured: bool [genes], genes that determine the scale.
        detected: Return the mean of the non-zero counts, ``mean / (1 - p(0))``.

    Returns:
        float32 [cells, genes].
    """
    mean, present = _scaled_means(output, totals, measured)
    if not detected:
        return (mean * present).astype(np.float32)
    theta = np.asarray(output.dispersion, np.float64)
    # For the zero-truncated negative binomial; the structural zeros cancel.
    chance = -np.expm1(-theta * np.log1p(mean / theta))
    return np.where(chance > 1e-12, mean / np.maximum(chance, 1e-12), 1.0).astype(np.float32)


def _scaled_means(
    output: Reconstruction,
    totals: np.ndarray,
    measured: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scaled means of the negative binomials, and the probabilities that a zero is not structural."""
    mean = np.asarray(output.mean, np.float64)
    present = np.ones_like(mean)
    if output.zero_logits is not None:
        present = 1.0 / (1.0 + np.exp(np.asarray(output.zero_logits, np.float64)))
    sums = (mean * present)[:, measured].sum(axis=1)
    return mean * (totals / np.where(sums > 0, sums, 1.0))[:, None], present


def expected_logs(
    output: Reconstruction,
    totals: np.ndarray,
    measured: np.ndarray,
    detected: np.ndarray,
    *,
    target_sum: float = 1e4,
) -> np.ndarray:
    """Return the mean of log-normalised non-zero counts: of log1p(count / total x 10,000).

    The logarithm of a mean is above the mean of the logarithms (Jensen); for errors on logarithms, the latter is the
    better prediction. Up to :data:`EXPLICIT_MEAN` the zero-truncated negative binomial
    is summed over counts, above it the logarithm is expanded to second order around the mean.

    Args:
        output: Unscaled means [cells, genes], as numpy.
        totals: float [cells].
        measured: bool [genes], genes that determine the scale.
        detected: float [cells, genes], from :func:`expected_counts` with ``detected``.
        target_sum: Library size.

    Returns:
        float32 [cells, genes].
    """
    scale = (target_sum / np.where(totals > 0, totals, 1.0)).astype(np.float32)[:, None]
    mean = np.maximum(_scaled_means(output, totals, measured)[0], 1e-8).astype(np.float32)
    theta = np.asarray(output.dispersion, np.float32)
    # Recursion from count 1, unnormalised: p(x + 1) / p(x) = (x + theta) / (x + 1) * mean / (mean + theta).
    ratio = mean / (mean + theta)
    few = mean <= EXPLICIT_MEAN
    ratio_few = np.where(few, ratio, 0.0)
    weight = np.ones_like(mean)
    chance = np.ones_like(mean)
    total = np.broadcast_to(np.log1p(scale), mean.shape).copy()
    for count in range(2, EXPLICIT_COUNTS + 1):
        # In place: these arrays are [cells, genes], and the loop runs for every count up to 48.
        weight *= (count - 1 + theta) / count * ratio_few
        chance += weight
        total += weight * np.log1p(count * scale)
    variance = mean + mean**2 / theta
    many = np.log1p(scale * detected) - 0.5 * variance * np.square(scale / (1.0 + scale * detected))
    return np.where(few, total / chance, many).astype(np.float32)


def posterior_counts(
    expected: np.ndarray,
    dispersion: np.ndarray,
    counts: sparse.csr_matrix,
) -> np.ndarray:
    """Return the posterior means of rates with a gamma prior, given Poisson counts; rows keep their sums.

    Args:
        expected: float32 [cells, genes], means of the prior.
        dispersion: float [genes], inverse dispersion.
        counts: CSR [cells, genes].
    """
    # Conjugate update of gamma(theta, theta / mu) by a count: (theta + x) / (theta / mu + 1).
    mean = expected * (dispersion + counts.toarray()) / (dispersion + expected)
    sums = np.maximum(mean.sum(axis=1, keepdims=True), 1e-12)
    return (mean * (expected.sum(axis=1, keepdims=True) / sums)).astype(np.float32)
