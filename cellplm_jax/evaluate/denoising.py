"""Denoising scores at hidden counts.

The published task sets a tenth of the stored (non-zero) counts to 0, denoises the remaining counts, and compares the
values with the true ones at the hidden entries, after normalisation by library size and log1p. Because only non-zeros
are hidden, a method that predicts the expected count, zeros included, is correct on average but still below every
compared value; predicting the count *given that it is not zero* lowers the error of any method. Compare predictions
of the same kind, with the gene mean of that kind as baseline (:func:`gene_means`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Real, Shaped
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.inputs import (
    Labels,
    Matrix,
    column_means,
    column_sums,
    one_axis,
    row_sums,
)
from cellplm_jax.evaluate.reconstruction import (
    mean_absolute_error,
    pearson_per_gene,
    root_mean_squared_error,
)


def hide_nonzeros(
    counts: Real[sparse.csr_matrix, "cells genes"],
    fraction: float = 0.1,
    *,
    seed: int = 0,
) -> tuple[Real[sparse.csr_matrix, "cells genes"], Bool[sparse.csr_matrix, "cells genes"]]:
    """Set a random fraction of the non-zero counts to 0.

    Args:
        counts: Raw counts; not changed.
        fraction: Fraction of all non-zeros; at least one is hidden and one remains.
        seed: Seed of the choice.

    Returns:
        The remaining counts, and the mask of hidden entries.

    Raises:
        InputError: The fraction is not between 0 and 1, or there are fewer than two non-zeros.
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(
            f"fraction={fraction}", "a number between 0 and 1", "Choose one in between"
        )
    counts = sparse.csr_matrix(counts, copy=True)
    counts.eliminate_zeros()
    if counts.nnz < 2:
        raise InputError(
            f"{counts.nnz} non-zero counts", "at least two, to hide one", "Pass more cells"
        )
    # At least one count is hidden and one stays.
    number = min(max(1, round(fraction * counts.nnz)), counts.nnz - 1)
    chosen = np.random.default_rng(seed).choice(counts.nnz, number, replace=False)
    gone = np.zeros(counts.nnz, bool)
    gone[chosen] = True
    # Copies, because eliminate_zeros modifies all three arrays in place.
    parts = (gone.copy(), counts.indices.copy(), counts.indptr.copy())
    hidden = sparse.csr_matrix(parts, counts.shape)
    hidden.eliminate_zeros()
    counts.data[gone] = 0
    counts.eliminate_zeros()
    return counts, hidden


def log_normalize(
    counts: Real[Any, "cells genes"],
    *,
    total: Real[np.ndarray, " cells"] | None = None,
    target_sum: float = 1e4,
) -> Any:
    """Scale every cell to a library size and apply log1p.

    Args:
        counts: Dense or sparse.
        total: Library sizes; None: the sums of the rows. A cell with a total of 0 stays 0.
        target_sum: Library size after scaling, in counts.

    Returns:
        Natural logarithms of the same type (CSR for sparse input).
    """
    if total is None:
        total = row_sums(counts)
    total = np.asarray(total, np.float64)
    factor = np.where(total > 0, target_sum / np.where(total > 0, total, 1.0), 0.0)
    if sparse.issparse(counts):
        scaled = sparse.csr_matrix(sparse.diags(factor) @ counts)
        scaled.data = np.log1p(scaled.data)
        return scaled
    return np.log1p(np.asarray(counts) * factor[:, None])


def gene_means(
    values: Real[Any, "cells genes"],
    *,
    detected: bool = False,
) -> Float64[np.ndarray, " genes"]:
    """Return the mean of each gene over cells, the simplest baseline.

    Args:
        values: Dense or sparse.
        detected: Average over the cells in which the gene is not zero; 0 for a gene that is zero everywhere.
    """
    total = column_sums(values, "float64")
    if not detected:
        return total / max(values.shape[0], 1)
    present = column_sums(values != 0)
    return total / np.maximum(present, 1)


def denoising_scores(truth: Matrix, prediction: Matrix, hidden: Matrix) -> dict[str, float]:
    """Compare predicted with true values at the hidden entries.

    Values are not transformed: pass both log-normalised for the published scores.

    Args:
        truth: float [cells, genes], dense or sparse.
        prediction: The same shape, dense or sparse.
        hidden: bool, the same shape, dense or sparse. True: the entry was hidden and is compared.

    Returns:
        ``rmse``, ``mae`` and ``pearson`` over all hidden entries, ``gene_pearson``, the mean over genes of the
        correlation over their hidden cells (NaN if no gene has three hidden cells and non-constant values), and
        ``entries``.

    Raises:
        InputError: Shapes differ, nothing is hidden, or a value is not finite.
    """
    dense = [
        part.toarray() if sparse.issparse(part) else np.asarray(part)
        for part in (truth, prediction, hidden)
    ]
    truth, prediction, hidden = dense
    errors = {
        "rmse": root_mean_squared_error(truth, prediction, hidden),
        "mae": mean_absolute_error(truth, prediction, hidden),
    }
    entries = np.asarray(hidden, bool).sum(axis=0)
    correlation = pearson_per_gene(truth, prediction, hidden)
    # Two points always have a correlation of 1 or -1.
    correlation = correlation[(entries >= 3) & np.isfinite(correlation)]
    chosen = np.asarray(hidden, bool)
    pair = np.asarray(truth[chosen], np.float64), np.asarray(prediction[chosen], np.float64)
    vary = len(pair[0]) > 2 and min(values.std() for values in pair) > 0
    return {
        **errors,
        "pearson": float(np.corrcoef(*pair)[0, 1]) if vary else float("nan"),
        "gene_pearson": float(correlation.mean()) if correlation.size else float("nan"),
        "entries": int(entries.sum()),
    }


MARKERS, MARKER_ERRORS, MARKER_CELLS = 8, 3.0, 10
"""Maximum number of markers per cell type, the standard errors that separate them from every other type, and the
fewest cells of a type."""

UNLABELLED = ("", "nan", "none", "unassigned", "unknown")
"""Labels in lower case that are no cell type."""


def type_profiles(
    values: Real[Any, "cells genes"],
    labels: Shaped[np.ndarray, " cells"],
    types: Sequence[str],
) -> tuple[Float64[np.ndarray, "types genes"], Float64[np.ndarray, "types genes"]]:
    """Return the mean and the squared standard error of each gene in each type, per 10,000 counts.

    Args:
        values: Counts or shares, dense or sparse; cells are scaled to 10,000.
        labels: Label of each cell.
        types: Labels to average.
    """
    means, errors = [], []
    for name in types:
        rows = np.flatnonzero(labels == name)
        some = sparse.csr_matrix(values[rows], dtype=np.float64)
        # Profiles per 10,000 counts, because predictions can be shares instead of counts.
        total = np.maximum(row_sums(some), 1e-12)
        some = sparse.csr_matrix(sparse.diags(1e4 / total) @ some)
        mean = column_means(some)
        square = column_means(some.multiply(some))
        means.append(mean)
        errors.append(np.maximum(square - mean**2, 0) / max(len(rows) - 1, 1))
    return np.array(means), np.array(errors)


def clear_markers(
    counts: Real[sparse.csr_matrix, "cells genes"], labels: Labels
) -> tuple[
    list[str],
    Int[np.ndarray, " markers"],
    Int[np.ndarray, " markers"],
    Float64[np.ndarray, "types genes"],
]:
    """Choose the clearest markers of cell types: genes that one type expresses more than every other type.

    The mean is :data:`MARKER_ERRORS` standard errors above that of every other type. Of these genes, each type keeps
    the :data:`MARKERS` with the largest difference of log1p means to the second type.

    Args:
        counts: Raw counts.
        labels: [cells]; None and "unassigned" are no types, nor are labels of fewer than :data:`MARKER_CELLS` cells.

    Returns:
        The types; the genes; the type of each; and log1p of the mean counts per 10,000.

    Raises:
        InputError: There are fewer than two cell types.
    """
    labels = np.asarray(one_axis(labels, "labels"), object)
    names, sizes = np.unique(labels.astype(str), return_counts=True)
    types = [
        str(name)
        for name, size in zip(names, sizes, strict=True)
        if size >= MARKER_CELLS and name.lower() not in UNLABELLED
    ]
    if len(types) < 2:
        raise InputError(
            f"{len(types)} cell types with {MARKER_CELLS} cells", "at least two, to compare markers"
        )
    mean, error = type_profiles(counts, labels, types)
    # A type without a count of a gene has no variance: one count in one of its cells is the resolution.
    depth = float(np.median(row_sums(counts)))
    members = np.array([(labels == name).sum() for name in types])
    error += (1e4 / max(depth, 1.0) / members[:, None]) ** 2
    gene = np.arange(mean.shape[1])
    highest = mean.argmax(axis=0)
    distance = (mean[highest, gene] - mean) / np.sqrt(error[highest, gene] + error)
    # The type itself is not one of the others.
    distance[highest, gene] = np.inf
    clear = distance.min(axis=0) >= MARKER_ERRORS
    logs = np.log1p(mean)
    ordered = np.sort(logs, axis=0)
    gap = ordered[-1] - ordered[-2]
    chosen = []
    for number in range(len(types)):
        own = np.flatnonzero(clear & (highest == number))
        chosen.append(own[np.argsort(-gap[own], kind="stable")[:MARKERS]])
    genes = np.concatenate(chosen)
    return types, genes, highest[genes], logs


def marker_scores(
    counts: Real[sparse.csr_matrix, "cells genes"],
    prediction: Real[Any, "cells genes"],
    labels: Labels,
) -> dict[str, float]:
    """Compare the contrast of marker genes between cell types in the prediction with that in the counts.

    Args:
        counts: Raw counts.
        prediction: Expected counts or shares, dense or sparse.
        labels: [cells], cell types.

    Returns:
        ``markers``, their number (:func:`clear_markers`); ``markers_highest``, the share whose highest type is the same
        in the prediction; ``contrast_kept``, the median over markers of the predicted over the counted contrast (log1p
        mean of the highest type minus the mean over the other types); ``profile_pearson``, the mean over types of the
        correlation of log1p means over genes. NaN without markers.

    Raises:
        InputError: There are fewer than two cell types.
    """
    labels = np.asarray(one_axis(labels, "labels"), object)
    types, genes, highest, logs = clear_markers(counts, labels)
    predicted = np.log1p(type_profiles(prediction, labels, types)[0])
    place = np.arange(len(genes))

    def contrast(profiles: np.ndarray) -> np.ndarray:
        own = profiles[highest, place]
        return own - (profiles.sum(axis=0) - own) / (len(types) - 1)

    counted = contrast(logs[:, genes])
    kept = contrast(predicted[:, genes])
    correlation = [
        np.corrcoef(*pair)[0, 1]
        for pair in zip(logs, predicted, strict=True)
        if min(values.std() for values in pair) > 0
    ]
    nothing = float("nan")
    return {
        "markers": len(genes),
        "markers_highest": float((predicted[:, genes].argmax(axis=0) == highest).mean())
        if len(genes)
        else nothing,
        "contrast_kept": float(np.median(kept / counted)) if len(genes) else nothing,
        "profile_pearson": float(np.mean(correlation)) if correlation else nothing,
    }
