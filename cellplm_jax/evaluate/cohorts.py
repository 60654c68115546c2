"""Tests of differences between the labels of tissue samples: permutation p-values and pseudobulk profiles.

Samples are exchanged, not cells: cells of one sample are not independent. Everything is computed in float64 with numpy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Integer, Real
from scipy import sparse

from cellplm_jax.errors import InputError

PERMUTATIONS = 999
"""Number of random arrangements of the labels; if there are fewer distinct ones, all are used."""

SIGNIFICANT = 0.05
"""p-value that a cohort should be large enough for."""


def smallest_p(codes: Integer[np.ndarray, " samples"] | Sequence[int]) -> float:
    """Return the smallest p-value that permuting the labels of these samples can give.

    An arrangement and the one with exchanged labels of the same number of samples count as one result.
    """
    sizes = list(Counter(np.asarray(codes).tolist()).values())
    arrangements = math.factorial(sum(sizes)) // math.prod(map(math.factorial, sizes))
    # Labels of equal size can be exchanged without a different statistic.
    same = math.prod(map(math.factorial, Counter(sizes).values()))
    return same / arrangements


def samples_needed(labels: int, p: float = SIGNIFICANT) -> int:
    """Return the number of samples per label from which p-values at or below ``p`` are possible.

    Args:
        labels: Number of labels, at least 2.
        p: The p-value.
    """
    number = 2
    while smallest_p(np.repeat(np.arange(labels), number)) > p:
        number += 1
    return number


def arrangements(
    codes: Integer[np.ndarray, " samples"] | Sequence[int],
    number: int = PERMUTATIONS,
    *,
    seed: int = 0,
) -> Int[np.ndarray, "arrangements samples"]:
    """Return arrangements of labels over samples; the first is the given one.

    Args:
        codes: Label of each sample.
        number: Maximum number of other arrangements. All distinct ones are returned if there are fewer.
        seed: Seed of the random arrangements.
    """
    codes = np.asarray(codes, int)
    sizes = Counter(codes.tolist())
    total = math.factorial(len(codes)) // math.prod(map(math.factorial, sizes.values()))
    if total - 1 <= number:
        # All distinct arrangements, built sample by sample; few by the check above.
        found = [()]
        for _ in codes:
            found = [
                (*row, code) for row in found for code in sizes if row.count(code) < sizes[code]
            ]
        # The given one is first, once.
        others = [row for row in found if row != tuple(codes.tolist())]
        return np.array([codes.tolist(), *others], int)
    random = np.random.default_rng(seed)
    return np.stack([codes, *(random.permutation(codes) for _ in range(number))])


def permutation_p(statistics: Real[np.ndarray, " arrangements"] | Sequence[float]) -> float:
    """Return the share of arrangements whose statistic is at least that of the first, the given labels."""
    values = np.asarray(statistics, np.float64)
    # With a tolerance: equal statistics of exchanged labels differ by rounding.
    return float(np.mean(values >= values[0] - 1e-9 * max(abs(values[0]), 1e-300)))


def separation(
    means: Real[np.ndarray, "samples features"],
    codes: Integer[np.ndarray, "arrangements samples"],
    weight: Real[np.ndarray, " samples"] | None = None,
) -> Float64[np.ndarray, " arrangements"]:
    """Return the squared distance between the means of the labels, summed over features.

    Args:
        means: Mean features of each sample.
        codes: From :func:`arrangements`.
        weight: Weight of each sample; None: equal.

    Returns:
        The sum over labels of the share of their samples times the squared distance of their
        mean from that of all; a label without samples does not count.
    """
    means = np.asarray(means, np.float64)
    weight = np.ones(len(means)) if weight is None else np.asarray(weight, np.float64)
    share = weight / weight.sum()
    centred = means - share @ means
    gram = centred @ centred.T
    total = np.zeros(len(codes))
    for label in np.unique(codes[0]):
        own = np.where(codes == label, share, 0.0)
        size = own.sum(axis=1)
        total += np.einsum("ps,st,pt->p", own, gram, own) / np.maximum(size, 1e-12)
    return total


def left_out_error(
    features: Real[np.ndarray, "samples features"],
    codes: Integer[np.ndarray, "arrangements samples"],
    *,
    penalty: float = 1.0,
) -> Float64[np.ndarray, " arrangements"]:
    """Return the error of ridge regression on left-out samples, for many arrangements of the labels at once.

    Args:
        features: Features of each sample.
        codes: From :func:`arrangements`.
        penalty: Ridge penalty, relative to the mean squared length of the centred features.

    Returns:
        Mean squared error of the indicators of the labels, each sample predicted without it,
        relative to that of predicting their frequencies in the other samples.
    """
    features = np.asarray(features, np.float64)
    centred = features - features.mean(axis=0)
    gram = centred @ centred.T
    number = len(gram)
    scale = max(np.trace(gram) / number, 1e-12)
    # The hat matrix of ridge regression with an unpenalised intercept.
    hat = gram @ np.linalg.inv(gram + penalty * scale * np.eye(number)) + 1.0 / number
    # The left-out residual of a linear smoother needs no refit: residual over one minus leverage.
    left = 1.0 - np.diag(hat)
    error = usual = np.zeros(len(codes))
    for label in np.unique(codes[0]):
        wanted = (codes == label).astype(np.float64)
        error = error + np.square((wanted - wanted @ hat) / left).mean(axis=1)
        # The usual prediction is left-out too: the frequency among the other samples.
        rest = (wanted.sum(axis=1, keepdims=True) - wanted) / (number - 1)
        usual = usual + np.square(wanted - rest).mean(axis=1)
    return error / usual


def pseudobulk(
    counts: Real[sparse.csr_matrix, "cells genes"],
    samples: Integer[np.ndarray, " _"],
    types: Integer[np.ndarray, " _"],
    shape: tuple[int, int],
) -> tuple[Float64[np.ndarray, "types samples genes"], Int[np.ndarray, "types samples"]]:
    """Sum the counts of the cells of each sample and type.

    Args:
        counts: Counts of each cell.
        samples: Sample of each cell; negative: not used.
        types: Type of each cell; negative: not used.
        shape: Number of samples and of types.

    Returns:
        log1p of the summed counts per 10,000, and the numbers of cells.

    Raises:
        InputError: Lengths differ.
    """
    if not counts.shape[0] == len(samples) == len(types):
        raise InputError(
            f"{counts.shape[0]} cells, {len(samples)} samples and {len(types)} types",
            "one per cell",
        )
    used = np.flatnonzero((samples >= 0) & (types >= 0))
    row = types[used] * shape[0] + samples[used]
    size = shape[0] * shape[1]
    gather = sparse.csr_matrix((np.ones(len(used)), (row, used)), (size, counts.shape[0]))
    summed: Any = gather @ counts
    total = np.asarray(summed.todense(), np.float64)
    total *= 1e4 / np.maximum(total.sum(axis=1, keepdims=True), 1.0)
    cells = np.bincount(row, minlength=size)
    return (
        np.log1p(total).reshape(shape[1], shape[0], -1),
        cells.reshape(shape[1], shape[0]),
    )


def adjusted_p(
    statistics: Real[np.ndarray, "tests arrangements"],
) -> Float64[np.ndarray, " tests"]:
    """Return p-values corrected for the number of tests (maximum statistic, Westfall and Young 1993).

    ``statistics`` are relative to their mean over arrangements; the first arrangement is the given one.
    """
    values = np.asarray(statistics, np.float64)
    if not len(values):
        return np.zeros(0)
    # Without the given arrangement, which each test compares itself.
    highest = values.max(axis=0)[1:]
    return np.array([permutation_p([own, *highest]) for own in values[:, 0]])
