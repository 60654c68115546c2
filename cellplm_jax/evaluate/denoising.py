"""Denoising scores at hidden counts.

The published task sets a tenth of the stored (non-zero) counts to 0, denoises the remaining counts, and compares the
values with the true ones at the hidden entries, after normalisation by library size and log1p. Because only non-zeros
are hidden, a method that predicts the expected count, zeros included, is correct on average but still below every
compared value; predicting the count *given that it is not zero* lowers the error of any method. Compare predictions
of the same kind, with the gene mean of that kind as baseline (:func:`gene_means`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.reconstruction import (
    mean_absolute_error,
    pearson_per_gene,
    root_mean_squared_error,
)


def hide_nonzeros(
    counts: sparse.csr_matrix, fraction: float = 0.1, *, seed: int = 0
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Set a random fraction of the non-zero counts to 0.

    Args:
        counts: CSR [cells, genes].
        fraction: Fraction of all non-zeros; at least one is hidden and one remains.
        seed: Seed of the choice.

    Returns:
        The remaining counts, and the mask of hidden entries: CSR bool [cells, genes].

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


def log_normalize(counts: Any, *, total: Any | None = None, target_sum: float = 1e4) -> Any:
    """Scale every cell to a library size and apply log1p.

    Args:
        counts: [cells, genes], dense or sparse.
        total: float [cells], library sizes; None: the sums of the rows. A cell with a total of 0 stays 0.
        target_sum: Library size after scaling, in counts.

    Returns:
        Natural logarithms of the same type (CSR for sparse input).
    """
    if total is None:
        total = np.asarray(counts.sum(axis=1)).ravel()
    total = np.asarray(total, np.float64)
    factor = np.where(total > 0, target_sum / np.where(total > 0, total, 1.0), 0.0)
    if sparse.issparse(counts):
        scaled = sparse.csr_matrix(sparse.diags(factor) @ counts)
        scaled.data = np.log1p(scaled.data)
        return scaled
    return np.log1p(np.asarray(counts) * factor[:, None])


def gene_means(values: Any, *, detected: bool = False) -> np.ndarray:
    """Return the mean of each gene over cells, the simplest baseline.

    Args:
        values: [cells, genes], dense or sparse.
        detected: Average over the cells in which the gene is not zero; 0 for a gene that is zero everywhere.

    Returns:
        float64 [genes].
    """
    total = np.asarray(values.sum(axis=0), np.float64).ravel()
    if not detected:
        return total / max(values.shape[0], 1)
    present = np.asarray((values != 0).sum(axis=0)).ravel()
    return total / np.maximum(present, 1)


def denoising_scores(truth: Any, prediction: Any, hidden: Any) -> dict[str, float]:
    """Compare predicted with true values at the hidden entries.

    Values are not transformed: pass both log-normalised for the published scores.

    Args:
        truth: float [cells, genes], dense or sparse.
        prediction: The same shape, dense or sparse.
        hidden: bool, the same shape, dense or sparse. True: the entry was hidden and is compared.

    Returns:
        ``rmse`` and ``mae`` over all hidden entries, ``gene_pearson``, the mean over genes of the correlation over
        their hidden cells (NaN if no gene has three hidden cells and non-constant values), and ``entries``.

    Raises:
        InputError: Shapes differ, nothing is hidden, or a value is not finite.
    """
    dense = [part.toarray() if sparse.issparse(part) else np.asarray(part) for part in
             (truth, prediction, hidden)]  # fmt: skip
    truth, prediction, hidden = dense
    errors = {
        "rmse": root_mean_squared_error(truth, prediction, hidden),
        "mae": mean_absolute_error(truth, prediction, hidden),
    }
    entries = np.asarray(hidden, bool).sum(axis=0)
    correlation = pearson_per_gene(truth, prediction, hidden)
    correlation = correlation[(entries >= 3) & np.isfinite(correlation)]
    return {
        **errors,
        "gene_pearson": float(correlation.mean()) if correlation.size else float("nan"),
        "entries": int(entries.sum()),
    }
