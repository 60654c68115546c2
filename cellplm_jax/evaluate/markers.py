"""Marker genes of groups of cells: which genes a cluster or a predicted type has more of than all other cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.components import log_normalized
from cellplm_jax.evaluate.inputs import Labels, Matrix, one_axis

HOUSEKEEPING = re.compile(r"(RP[LS]\d|RPLP\d|RPSA$|MT-)", re.IGNORECASE)
"""Symbols of ribosomal and mitochondrial genes, which differ between groups without naming them."""

MINIMUM_CELLS = 3
"""Groups with fewer cells have no markers."""

MINIMUM_FOLD = 1.5
"""Minimum fold change of a marker."""

MINIMUM_SHARE = 0.25
"""Minimum share of a group's cells with a count of a marker."""


def group_means(
    counts: Matrix,
    groups: Labels,
    genes: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return mean expression and share of cells with a count, per group.

    Args:
        counts: Raw counts [cells, genes], scipy sparse or dense.
        groups: [cells], labels. Cells without one are left out.
        genes: Names of the genes [genes]. None: numbers.

    Returns:
        Two tables [groups, genes]: mean of log1p of counts per 10,000, and share of cells with a count.

    Raises:
        InputError: The number of labels is not that of the cells.
    """
    logs = log_normalized(sparse.csr_matrix(counts, dtype=np.float32))
    codes, names = _groups(groups, logs.shape[0])
    member = _members(codes, len(names))
    size = np.asarray(member.sum(axis=1))
    stored = logs.copy()
    stored.data = (stored.data > 0).astype(np.float32)
    columns = list(range(logs.shape[1])) if genes is None else list(genes)
    products: list[Any] = [member @ part for part in (logs, stored)]
    mean, share = (part.toarray() / size for part in products)
    index = pd.Index(names)
    return pd.DataFrame(mean, index, columns), pd.DataFrame(share, index, columns)


def marker_genes(
    counts: Matrix,
    groups: Labels,
    genes: Sequence[str],
    *,
    number: int = 5,
    housekeeping: bool = False,
) -> pd.DataFrame:
    """Return the genes that distinguish each group from all other cells.

    Genes are ranked by Welch's t statistic on log1p of counts per 10,000, as ``scanpy.tl.rank_genes_groups`` does by
    default with ``method="t-test"``; a marker is at least 1.5 times higher in the group, and at least a quarter of its
    cells have a count.
    Clusters were made from the same counts, so p-values would be too small; none are given.

    Args:
        counts: Raw counts [cells, genes], scipy sparse or dense.
        groups: [cells], labels. Cells without one are left out.
        genes: Names of the genes [genes].
        number: Maximum number of markers per group.
        housekeeping: Whether ribosomal and mitochondrial genes (by symbol) may be markers.

    Returns:
        One row per marker, groups in the order of their labels, the best first: ``group``, ``gene``, ``score`` (t),
        ``log2_fold_change``, ``share`` and ``share_elsewhere`` (cells with a count).

    Raises:
        InputError: The number of labels is not that of the cells, or there are fewer than two groups.
    """
    logs = log_normalized(sparse.csr_matrix(counts, dtype=np.float32))
    codes, names = _groups(groups, logs.shape[0])
    if len(names) < 2:
        raise InputError(
            f"{len(names)} group of cells", "at least two, to compare", "Pass another column"
        )
    member = _members(codes, len(names))
    squares = logs.copy()
    stored = logs.copy()
    squares.data = squares.data**2
    stored.data = (stored.data > 0).astype(np.float32)
    products: list[Any] = [member @ part for part in (logs, squares, stored)]
    # float64 from here: the variance is a difference of two sums of similar size.
    sums = [part.toarray().astype(np.float64) for part in products]
    size = np.asarray(member.sum(axis=1), np.float64)

    def moments(parts: list[np.ndarray], n: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = parts[0] / n
        # Unbiased variance from sums.
        return mean, (parts[1] / n - mean**2) * n / max(n - 1, 1), parts[2] / n

    allowed = np.array([housekeeping or not HOUSEKEEPING.match(str(gene)) for gene in genes])
    total = [part.sum(axis=0) for part in sums]
    cells = float(size.sum())
    rows = []
    for place, name in enumerate(names):
        n = float(size[place, 0])
        if n < MINIMUM_CELLS or cells - n < MINIMUM_CELLS:
            continue
        own = [part[place] for part in sums]
        mean, variance, share = moments(own, n)
        # All other cells by subtraction: one pass over the counts serves every group.
        others = [all_ - part for all_, part in zip(total, own, strict=True)]
        rest, spread, elsewhere = moments(others, cells - n)
        # The floor keeps the score finite for a gene that is constant in both groups.
        error = np.sqrt(np.maximum(variance / n + spread / (cells - n), 1e-12))
        score = (mean - rest) / error
        # The mean of logs is transformed back, as scanpy does; it is not the log of the mean count.
        fold = np.log2((np.expm1(mean) + 1e-9) / (np.expm1(rest) + 1e-9))
        usable = allowed & (fold >= np.log2(MINIMUM_FOLD)) & (share >= MINIMUM_SHARE)
        # Stable: equal scores keep the order of the genes on every platform.
        order = np.argsort(-np.where(usable, score, -np.inf), kind="stable")[:number]
        rows += [
            (name, genes[g], score[g], fold[g], share[g], elsewhere[g]) for g in order if usable[g]
        ]
    columns = ["group", "gene", "score", "log2_fold_change", "share", "share_elsewhere"]
    return pd.DataFrame(rows, columns=columns)


def _groups(groups: Labels, cells: int) -> tuple[np.ndarray, list[str]]:
    """Return the group of each cell, int [cells] or -1, and the names of the groups in their order."""
    column = pd.Categorical(one_axis(groups, "groups"))
    if len(column) != cells:
        raise InputError(
            f"{len(column)} labels for {cells} cells", "one per cell", "Use the same selection"
        )
    # A selection of cells keeps the categories of the whole table; a group of 0 cells would divide by zero.
    column = column.remove_unused_categories()
    return np.asarray(column.codes), [str(name) for name in column.categories]


def _members(codes: np.ndarray, groups: int) -> sparse.csr_matrix:
    """Return which cells belong to which group, float32 [groups, cells]."""
    # Cells without a group belong to no row, neither to a group nor to the others.
    cells = np.flatnonzero(codes >= 0)
    return sparse.csr_matrix(
        (np.ones(len(cells), np.float32), (codes[cells], cells)), shape=(groups, len(codes))
    )
