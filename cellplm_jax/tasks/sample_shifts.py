"""Shifts of the cells of each type between the labels of tissue samples, and the contribution of each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.genes import symbols_of
from cellplm_jax.evaluate.cohorts import (
    adjusted_p,
    arrangements,
    left_out_error,
    permutation_p,
    pseudobulk,
    separation,
    smallest_p,
)
from cellplm_jax.evaluate.components import log_normalized
from cellplm_jax.evaluate.inputs import column_sums, row_sums

MINIMUM_CELLS = 5
"""Minimum number of cells of a type in a sample; samples with fewer do not count for the type."""

RELIABLE_CELLS = 10.0
"""Number of cells at which the mean of a sample has half of the full weight."""

SHRINKAGE = 0.1
"""Weight of the identity in the covariance of latents within type and sample."""

UNCERTAIN = 0.1
"""p-value, corrected for the number of types, above which the cells of a type do not contribute."""

THRESHOLD = 4.0
"""Squared difference between labels, relative to its variance over samples, below which a feature does not count."""

GENES = 1000
"""Number of genes whose expression is compared: those that differ most between samples, whatever the labels."""

LISTED_GENES = 5
"""Number of genes with the largest difference listed per type."""

CHUNK = 2048
"""Cells per step."""

Blocks = Callable[[], Iterable[sparse.csr_matrix]]


@dataclass(frozen=True, eq=False)
class TypeShifts:
    """Mean expression of every type under every label.

    The contribution of a cell is the log-odds of its label under normal distributions around the means of its type:
    the type itself, and the proportions of types, do not contribute. Expression is compared and not the latent, because
    cells attend to each other: the latent of a type also shifts when other cells of its sample do. A difference between
    labels counts by gene, as far as it exceeds its variance over samples (positive-part James-Stein), and not at all in
    types whose labels do not differ more than permuted ones.

    Attributes:
        types: Names of the types.
        labels: Names of the labels.
        genes: Names of the genes that are compared.
        scale: float32 [genes], factor to unit variance of log-normalised expression within type and sample.
        means: float32 [types, labels, genes], of scaled expression.
        shifted: bool [types], types whose cells contribute.
        whitening: float32 [latent, latent], map of the latent to unit covariance within type and sample.
        centres: float32 [types x labels, latent], means of the latent, for the type of other cells.
        table: One dictionary per type: ``type``, ``cells``, ``samples``; with enough samples also ``p_pseudobulk``, the
            permutation p-value of the shift of mean expression per sample, ``p``, the same corrected for the number of
            types, ``p_latent``, that of the mean latent, and ``genes``, those that differ most.
    """

    types: list[str]
    labels: list[str]
    genes: list[str]
    scale: np.ndarray
    means: np.ndarray
    shifted: np.ndarray
    whitening: np.ndarray
    centres: np.ndarray
    table: list[dict[str, Any]]

    def assign(self, z: np.ndarray) -> np.ndarray:
        """Return the type with the nearest mean of latents, int [cells].

        Args:
            z: float [cells, latent].
        """
        centres = self.centres.astype(np.float64)
        half = 0.5 * np.square(centres).sum(axis=1)
        return (z @ (self.whitening @ centres.T) - half).argmax(axis=1) // len(self.labels)

    def contributions(self, blocks: Blocks, types: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the log-odds of each cell's label against the other labels, given its type.

        Args:
            blocks: Returns log-normalised expression of :attr:`genes`, CSR [cells, genes], in blocks of cells.
            types: int [cells].
            labels: int [cells], the label whose evidence is returned.

        Returns:
            float32 [cells]; 0 for types without a shift.
        """
        result = np.zeros(len(types), np.float32)
        start = 0
        for block in blocks():
            rows = np.arange(start, start + block.shape[0])
            start += block.shape[0]
            for code in np.unique(types[rows]):
                if not self.shifted[code]:
                    continue
                here = rows[types[rows] == code]
                means = self.means[code].astype(np.float64)
                values = np.asarray(block[here - rows[0]].todense()) * self.scale
                likelihood = values @ means.T - 0.5 * np.square(means).sum(axis=1)
                own = likelihood[np.arange(len(here)), labels[here]]
                result[here] = own - (likelihood.sum(axis=1) - own) / (len(self.labels) - 1)
        return result

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the attributes as JSON and arrays, for :meth:`restore`."""
        plain = {"types": self.types, "genes": self.genes, "table": self.table}
        names = ("scale", "means", "shifted", "whitening", "centres")
        return plain, {f"shift_{name}": getattr(self, name) for name in names}

    @classmethod
    def restore(
        cls,
        plain: dict[str, Any],
        arrays: dict[str, np.ndarray],
        labels: Sequence[str],
    ) -> TypeShifts:
        """Return the object of :meth:`state`."""
        kept: dict[str, Any] = {
            n.removeprefix("shift_"): a for n, a in arrays.items() if n.startswith("shift_")
        }
        return cls(**plain, **kept, labels=list(labels))


def expression_of(
    counts: Iterable[sparse.csr_matrix], columns: Sequence[int]
) -> Iterable[sparse.csr_matrix]:
    """Return log-normalised expression of some genes, block by block.

    Args:
        counts: CSR [cells, genes], blocks of cells.
        columns: The genes.
    """
    for block in counts:
        yield sparse.csr_matrix(log_normalized(sparse.csr_matrix(block))[:, columns])


def fit_shifts(
    z: np.ndarray,
    counts: sparse.csr_matrix,
    genes: Sequence[str],
    samples: np.ndarray,
    types: np.ndarray,
    names: Sequence[str],
    codes: np.ndarray,
    labels: Sequence[str],
    *,
    seed: int = 0,
) -> tuple[TypeShifts, dict[str, float]]:
    """Estimate and test the shift of every type between labels.

    Args:
        z: float [cells, latent].
        counts: CSR [cells, genes].
        genes: Names [genes].
        samples: int [cells], sample of each cell; negative: not used.
        types: int [cells].
        names: Names of the types.
        codes: int [samples], label of each sample.
        labels: Names of the labels.
        seed: Seed of the permutations.

    Returns:
        The shifts, and facts: p-values of the label by the mean latent, by the proportions of types and by pseudobulk
        profiles of samples (with the errors on left-out samples that they test), the smallest p-value of a shift, and
        the rank correlation over types of the shifts in the latent and in pseudobulk.
    """
    shape = (len(names), len(codes))
    # The first row is the true assignment, so that a p-value can never be 0.
    permuted = arrangements(codes, seed=seed)
    used = np.flatnonzero(samples >= 0)
    group = types[used] * shape[1] + samples[used]
    gather = sparse.csr_matrix(
        (np.ones(len(used)), (group, np.arange(len(used)))), (shape[0] * shape[1], len(used))
    )
    cells = np.bincount(group, minlength=shape[0] * shape[1])
    share = sparse.diags(1.0 / np.maximum(cells, 1)) @ gather
    # One mean per group with cells was estimated.
    freedom = max(len(used) - int((cells > 0).sum()), 1)

    latent = z[used].astype(np.float64)
    centres = share @ latent
    whitening = _whitening(latent - centres[group], freedom)
    expression = log_normalized(sparse.csr_matrix(counts[used]))
    profiles = np.asarray((share @ expression).todense(), np.float64)
    within = column_sums(expression.multiply(expression), "float64")
    within = np.maximum(within - cells @ np.square(profiles), 0.0) / freedom
    # Genes are chosen by the variance between samples, without labels: a choice by labels would make the test
    # invalid.
    usual = _by_type(profiles, shape, cells)
    between = cells @ np.square(profiles - usual)
    positive = within[within > 0]
    floor = float(np.median(positive)) if len(positive) else 1.0
    chosen = np.argsort(-between / np.maximum(within, floor), kind="stable")[:GENES]
    scale = 1.0 / np.sqrt(np.maximum(within[chosen], 0.1 * floor))
    compared = [str(genes[column]) for column in chosen]
    symbols = symbols_of(compared)

    number = cells.reshape(shape)
    # For the test every sample has as many cells of a type as the smallest one.
    kept_cells = _equal_cells(group, number, np.random.default_rng(seed))
    even = sparse.csr_matrix(
        (np.ones(len(kept_cells)), (group[kept_cells], kept_cells)), gather.shape
    )
    even = sparse.diags(1.0 / np.maximum(row_sums(even), 1)) @ even
    tested_means: list[Any] = [
        np.asarray(even @ latent).reshape(*shape, -1),
        np.asarray((even @ expression[:, chosen]).todense(), np.float64).reshape(*shape, -1),
    ]
    means = [
        (centres @ whitening).reshape(*shape, -1),
        (profiles[:, chosen] * scale).reshape(*shape, -1),
    ]
    kept = [np.zeros((shape[0], len(labels), values.shape[-1])) for values in means]
    shifted = np.zeros(shape[0], bool)
    table: list[dict[str, Any]] = []
    tests: list[tuple[dict[str, Any], list[np.ndarray]]] = []
    for code, name in enumerate(names):
        weight = np.where(number[code] >= MINIMUM_CELLS, number[code], 0)
        weight = weight / (weight + RELIABLE_CELLS)
        row = {
            "type": str(name),
            "cells": int(number[code].sum()),
            "samples": int((weight > 0).sum()),
        }
        table.append(row)
        for space, values in zip(kept, means, strict=True):
            space[code] = np.average(values[code], axis=0, weights=number[code] + 1e-9)
        # One sample per label has no variance to compare a difference with.
        if min(np.count_nonzero(weight[codes == label]) for label in range(len(labels))) < 2:
            continue
        valid = np.flatnonzero(weight)
        # Unequal numbers of cells make unequal noise, which permuted labels would not have.
        statistics = [
            separation(_standardised(values[code][valid]), permuted[:, valid])
            for values in tested_means
        ]
        standardised = [(one - one.mean()) / max(one.std(), 1e-30) for one in statistics]
        tests.append((row, standardised))
        p = [permutation_p(one) for one in statistics]
        row |= {"p_latent": p[0], "p_pseudobulk": p[1]}
        moved = [
            _label_means(
                values[code][valid],
                codes[valid],
                weight[valid],
                len(labels),
            )
            for values in means
        ]
        reach = np.ptp(moved[1], axis=0)
        top = np.argsort(-reach, kind="stable")[:LISTED_GENES]
        row["genes"] = ", ".join(symbols[gene] for gene in top if reach[gene] > 0)
        for space, values in zip(kept, moved, strict=True):
            space[code] = values
    corrected = adjusted_p(np.array([own[1] for _, own in tests])) if tests else []
    for (row, _), p in zip(tests, corrected, strict=True):
        row["p"] = float(p)
        # Few samples cannot reach a small p-value; then the smallest possible one counts, with a margin for rounding.
        shifted[table.index(row)] = p <= max(UNCERTAIN, 1.01 * smallest_p(codes))

    shifts = TypeShifts(
        types=[str(name) for name in names],
        labels=[str(label) for label in labels],
        genes=compared,
        scale=scale.astype(np.float32),
        means=kept[1].astype(np.float32),
        shifted=shifted,
        whitening=whitening.astype(np.float32),
        centres=kept[0].reshape(-1, kept[0].shape[-1]).astype(np.float32),
        table=table,
    )
    facts: dict[str, float] = {"arrangements": float(len(permuted))}
    # Baselines that ignore types.
    whole, _ = pseudobulk(counts, samples, np.zeros_like(types), (shape[1], 1))
    wide = np.argsort(-whole[0].var(axis=0), kind="stable")[:GENES]
    # A pseudo-count, because a type can be absent from a sample.
    amount = number.T + 0.5
    pooled = (number[:, :, None] * centres.reshape(*shape, -1)).sum(axis=0)
    for name, values in (
        ("latent", pooled / np.maximum(number.sum(axis=0), 1)[:, None]),
        ("proportions", np.log(amount / amount.sum(axis=1, keepdims=True))),
        ("pseudobulk", _standardised(whole[0][:, wide])),
    ):
        errors = left_out_error(values, permuted)
        facts[f"left_out_error_{name}"] = float(errors[0])
        facts[f"p_{name}"] = permutation_p(-errors)
    if tests:
        facts["p_shift"] = min(row["p"] for row, _ in tests)
    observed = [[own[space][0] for _, own in tests] for space in (0, 1)]
    ranks = [pd.Series(values).rank() for values in observed]
    if len(tests) > 2:
        facts["shift_agreement_with_pseudobulk"] = float(np.corrcoef(*ranks)[0, 1])
    return shifts, facts


def _equal_cells(group: np.ndarray, number: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return random cells, as many of a type in every sample with enough of them: those of the smallest sample.

    Args:
        group: int [cells], type x sample.
        number: int [types, samples], cells.
        random: Generator.
    """
    enough = np.where(number >= MINIMUM_CELLS, number, np.iinfo(np.int64).max)
    most = np.repeat(enough.min(axis=1), number.shape[1])
    # A random subset per group without a loop over groups: rank within the group in random order.
    order = random.permutation(len(group))
    rank = pd.Series(group[order]).groupby(group[order]).cumcount().to_numpy()
    return np.sort(order[rank < most[group[order]]])


def _label_means(
    values: np.ndarray,
    codes: np.ndarray,
    weight: np.ndarray,
    labels: int,
) -> np.ndarray:
    """Return means of samples by label [labels, features], with their differences shrunk by feature."""
    own = [weight * (codes == label) for label in range(labels)]
    means = np.stack([one @ values / one.sum() for one in own])
    centre = means.mean(axis=0)
    spread = weight @ np.square(values - means[codes]) / max(weight.sum() - labels, 1.0)
    # Few samples: a spread that is small by chance must not make a difference.
    spread = np.maximum(spread, 0.5 * np.median(spread))
    noise = spread * np.mean([1.0 / one.sum() for one in own]) * (1.0 - 1.0 / labels)
    signal = np.square(means - centre).mean(axis=0)
    strength = np.maximum(0.0, 1.0 - THRESHOLD * noise / np.maximum(signal, 1e-30))
    return centre + strength * (means - centre)


def _by_type(profiles: np.ndarray, shape: tuple[int, int], cells: np.ndarray) -> np.ndarray:
    """Return the mean of each type in every row of its samples, [types x samples, genes]."""
    number = cells.reshape(shape)
    weight = number / np.maximum(number.sum(axis=1, keepdims=True), 1)
    usual = np.einsum("ts,tsg->tg", weight, profiles.reshape(*shape, -1))
    return np.repeat(usual, shape[1], axis=0)


def _whitening(residual: np.ndarray, freedom: int) -> np.ndarray:
    """Return the map [latent, latent] to unit covariance of residuals, with a shrunken covariance."""
    covariance = residual.T @ residual / freedom
    size = len(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / size * np.eye(
        size
    )
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(np.maximum(values, 1e-12))


def _standardised(profiles: np.ndarray) -> np.ndarray:
    """Return profiles [samples, features] with unit variance; small variances are raised to the median."""
    spread = profiles.std(axis=0)
    positive = spread[spread > 0]
    floor = float(np.median(positive)) if len(positive) else 1.0
    return (profiles - profiles.mean(axis=0)) / np.maximum(spread, floor)
