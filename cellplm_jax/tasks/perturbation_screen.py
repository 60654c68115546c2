"""Measured changes of a screen of perturbed and control cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from cellplm_jax.errors import InputError, nearest
from cellplm_jax.evaluate.inputs import column_means, row_sums
from cellplm_jax.tasks.contexts import CellTable, labels_of
from cellplm_jax.tasks.perturbation_names import PerturbationNames, labels_with_numbers

TARGET_SUM = 1e4
"""Counts per cell before the logarithm."""

MINIMUM_CELLS = 5
"""Minimum number of cells per perturbation and group; the mean of smaller ones is mostly noise."""

MINIMUM_CONTROLS = 10
"""Minimum number of control cells per batch (and group); otherwise the control cells of all batches are used."""

EVERYTHING = "all cells"
"""Group of all cells if no ``covariate_key`` is given."""


@dataclass(frozen=True, eq=False)
class Changes:
    """Measured changes, one row per perturbation and group.

    Attributes:
        names: str [rows], canonical names.
        groups: str [rows].
        values: float64 [rows, genes].
        noise: float64 [rows], variance of the mean, averaged over genes.
        cells: int [rows].
    """

    names: np.ndarray
    groups: np.ndarray
    values: np.ndarray
    noise: np.ndarray
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def at(self, rows: np.ndarray) -> Changes:
        """Return a subset of the rows."""
        return Changes(
            self.names[rows],
            self.groups[rows],
            self.values[rows],
            self.noise[rows],
            self.cells[rows],
        )


def values_of(table: CellTable, key: str) -> np.ndarray:
    """Return a column of perturbations as strings, None for missing ones."""
    labels = labels_of(table.obs, key)
    return labels_with_numbers(labels, table.obs[key])


def screen_labels(
    table: CellTable,
    names: PerturbationNames,
    key: str,
    covariate_key: str | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return canonical perturbation [cells], group [cells], and the mask of usable cells.

    Args:
        table: Perturbed and control cells.
        names: Their names.
        key: Column of ``obs`` with the perturbations.
        covariate_key: Column of ``obs`` with the groups; None: one group.

    Raises:
        InputError: Control cells of a group, or perturbed cells, are missing.
    """
    raw = values_of(table, key)
    usable = np.array([name is not None for name in raw], bool)
    canonical = {name: names.canonical(name) for name in set(raw[usable])}
    named = np.array([canonical.get(name, "") for name in raw], object)
    if names.control not in canonical.values():
        known = sorted(canonical)
        raise InputError(
            f"no cell has the control '{names.control}' in obs['{key}']",
            f"one of its values: {', '.join(map(repr, known[:8])) or 'none, all are missing'}",
            nearest(names.control, known, "Add control cells"),
        )
    if len(set(canonical.values())) < 2:
        raise InputError(
            f"all cells with a value in obs['{key}'] are control cells",
            "perturbed cells too",
            "Check the column, or add more cells",
        )
    groups = np.full(len(table), EVERYTHING, object)
    if covariate_key is not None:
        covariates = labels_of(table.obs, covariate_key)
        usable &= np.array([name is not None for name in covariates], bool)
        groups = np.where(usable, covariates, "")
    for group in dict.fromkeys(groups[usable]):
        if not (usable & (groups == group) & (named == names.control)).any():
            raise InputError(
                f"group '{group}' of obs['{covariate_key}'] has no control cells",
                f"cells with '{names.control}' in obs['{key}'] in every group",
                "Remove the cells of that group, or use another covariate_key",
            )
    return named, groups, usable


def measure(
    expression: sparse.csr_matrix,
    batch: np.ndarray,
    named: np.ndarray,
    groups: np.ndarray,
    usable: np.ndarray,
    control: str,
    order: Sequence[str],
) -> Changes:
    """Measure the mean change of every perturbation in every group against the control cells of the same batches.

    Args:
        expression: CSR [cells, genes], log-normalised.
        batch: str [cells].
        named: str [cells], canonical perturbation.
        groups: str [cells].
        usable: bool [cells].
        control: Name of the control.
        order: The perturbations to measure, in the order of the rows.
    """
    is_control = usable & (named == control)
    rows: dict[str, list[Any]] = {"names": [], "groups": [], "values": [], "noise": [], "cells": []}
    for group in dict.fromkeys(groups[usable]):
        inside = usable & (groups == group)
        own = expression[inside & is_control]
        mean = column_means(own, "float64")
        square = column_means(own.multiply(own), "float64")
        # One variance for all genes and perturbations of a group: those of a few cells would be too uncertain.
        size = own.shape[0]
        variance = float((square - mean**2).mean()) * size / max(size - 1, 1)
        controls: dict[str, tuple[np.ndarray, int]] = {}
        for one in dict.fromkeys(batch[inside]):
            cells = np.flatnonzero(inside & is_control & (batch == one))
            # Otherwise the control cells of all batches, with the batch effect that they bring.
            enough = len(cells) >= MINIMUM_CONTROLS
            controls[one] = (
                (column_means(expression[cells], "float64"), len(cells))
                if enough
                else (mean, own.shape[0])
            )
        for name in order:
            cells = np.flatnonzero(inside & (named == name))
            if len(cells) < MINIMUM_CELLS:
                continue
            change = column_means(expression[cells], "float64")
            noise = variance / len(cells)
            batches, sizes = np.unique(batch[cells].astype(str), return_counts=True)
            for one, size in zip(batches, sizes, strict=True):
                share = size / len(cells)
                change -= share * controls[one][0]
                # The mean of the control cells is uncertain too, and its noise is shared by all perturbations of the
                # batch.
                noise += share**2 * variance / controls[one][1]
            for key, value in zip(rows, (name, group, change, noise, len(cells)), strict=True):
                rows[key].append(value)
    genes = expression.shape[1]
    return Changes(
        np.array(rows["names"], object),
        np.array(rows["groups"], object),
        np.stack(rows["values"]) if rows["values"] else np.zeros((0, genes)),
        np.array(rows["noise"], float),
        np.array(rows["cells"], int),
    )


def log_normalize(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Scale every cell to :data:`TARGET_SUM` counts over its genes, then log1p; float32 CSR [cells, genes]."""
    counts = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    total = row_sums(counts)
    # In place on the copy above: expression of a screen is its largest array.
    counts.data *= np.repeat(TARGET_SUM / np.maximum(total, 1.0), np.diff(counts.indptr))
    np.log1p(counts.data, out=counts.data)
    return counts


def shrinkage(values: np.ndarray, noise: float) -> float:
    """Return the shrinkage factor between 0 and 1 for noisy values (positive-part James-Stein).

    Args:
        values: float [genes].
        noise: Variance of the noise per entry.
    """
    return max(0.0, 1.0 - noise / max(float(np.square(values).mean()), 1e-30))
