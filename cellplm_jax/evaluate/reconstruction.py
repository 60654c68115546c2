"""Scores of predicted expression: correlation, likelihood and error.

Used for held-out entries in pretraining, for denoising and for imputation. Everything is computed in float64 with numpy
and scipy, independently of the training likelihoods, so that it can verify them. No score depends on the order of the
cells or the genes (the published imputation error does, ``CellPLM/utils/eval.py``).

Matrices are [cells, genes], dense or scipy sparse; a mask selects the entries to score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import sparse, special

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.inputs import Matrix, Values

_BLOCK_ENTRIES = (
    4_000_000  # of a dense block of columns; bounds the memory without changing results
)


def _shape(values: Any, name: str) -> tuple[int, int]:
    """Return (cells, genes) of a matrix; other shapes raise an error."""
    shape = np.shape(values)
    if len(shape) != 2:
        raise InputError(
            f"{name} has shape {shape}", "two axes, [cells, genes]", "Pass the complete matrix"
        )
    return shape[0], shape[1]


def _same_shape(truth: Any, other: Any, name: str) -> None:
    """Raise an error if two shapes differ."""
    if np.shape(truth) != np.shape(other):
        raise InputError(
            f"{name} has shape {np.shape(other)} and truth has shape {np.shape(truth)}",
            "the same cells and genes in both",
            "Select and order cells and genes the same way first",
        )


def _finite(values: np.ndarray, name: str, where: np.ndarray | None = None) -> np.ndarray:
    """Return the values as float64; NaN or infinity among the selected entries raises an error."""
    values = np.asarray(values, dtype=np.float64)
    wrong = ~np.isfinite(values)
    if where is not None:
        wrong &= where
    if wrong.any():
        raise InputError(
            f"{name} contains NaN or infinity in {int(wrong.sum())} of the entries to compare",
            "finite numbers",
            "Exclude those entries with the mask",
        )
    return values


def _boolean(mask: Any) -> np.ndarray:
    """Return a mask as bool; values other than booleans, 0 and 1 raise an error."""
    array = np.asarray(mask)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise InputError(
            f"The mask has dtype {array.dtype} and values other than 0 and 1",
            "True for entries to compare",
            "Pass a boolean array",
        )
    return array.astype(bool)


def _column_blocks(
    truth: Any,
    prediction: Any,
    mask: Any,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (genes, truth, prediction, mask) for ranges of genes, dense and validated; unmasked entries are 0."""
    cells, genes = _shape(truth, "truth")
    _same_shape(truth, prediction, "prediction")
    if mask is not None:
        _same_shape(truth, mask, "mask")
    parts: list[Any] = [
        part.tocsc() if sparse.issparse(part) else np.asarray(part)
        for part in (truth, prediction, mask)
        if part is not None
    ]
    width = max(1, _BLOCK_ENTRIES // max(cells, 1))
    for start in range(0, genes, width):
        columns = slice(start, min(start + width, genes))
        block = [
            part[:, columns].toarray() if sparse.issparse(part) else part[:, columns]
            for part in parts
        ]
        chosen = np.ones(block[0].shape, bool) if mask is None else _boolean(block[2])
        true = np.where(chosen, _finite(block[0], "truth", chosen), 0.0)
        predicted = np.where(chosen, _finite(block[1], "prediction", chosen), 0.0)
        yield columns, true, predicted, chosen


def _column_moments(
    true: np.ndarray,
    predicted: np.ndarray,
    chosen: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return per column: number of entries, Pearson (NaN if undefined), constant in truth, constant in prediction."""
    entries = chosen.sum(axis=0)

    def centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = values.sum(axis=0) / np.maximum(entries, 1)
        centre = np.where(chosen, values - mean, 0.0)
        length = np.sqrt(np.square(centre).sum(axis=0))
        # A constant column has rounding errors of the mean: about 1e-16 per entry, relative to it.
        return centre, length, length <= 1e-13 * np.abs(mean) * np.sqrt(entries)

    true, true_length, true_constant = centred(true)
    predicted, predicted_length, predicted_constant = centred(predicted)
    defined = (entries >= 2) & ~true_constant & ~predicted_constant
    product = np.einsum("cg,cg->g", true, predicted)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Divide twice: the product of two norms can overflow or underflow.
        pearson = np.clip(product / true_length / predicted_length, -1.0, 1.0)
    return entries, np.where(defined, pearson, np.nan), true_constant, predicted_constant


def pearson_per_gene(
    truth: Matrix,
    prediction: Matrix,
    mask: Matrix | None = None,
) -> Float64[np.ndarray, " genes"]:
    """Return Pearson's correlation over cells for each gene.

    Values are not transformed: apply log1p or a normalisation before, the same to both.

    Args:
        truth: float [cells, genes], dense or sparse.
        prediction: float [cells, genes], dense or sparse.
        mask: bool [cells, genes] or None. True: the entry is used. None: all are.

    Returns:
        NaN if the correlation is undefined: fewer than two entries, or truth or prediction is
        constant over them.

    Raises:
        InputError: Shapes differ, or a selected entry is not finite.
    """
    result = np.full(_shape(truth, "truth")[1], np.nan)
    for genes, true, predicted, chosen in _column_blocks(truth, prediction, mask):
        result[genes] = _column_moments(true, predicted, chosen)[1]
    return result


def masked_correlation(
    truth: Matrix,
    prediction: Matrix,
    mask: Matrix,
    *,
    minimum_entries: int = 3,
) -> dict[str, float]:
    """Correlate predicted with true counts on held-out entries, after log1p, in two ways.

    With ``t = log1p(truth)`` and ``p = log1p(prediction)`` on the masked entries (zeros of the counts
    included, if the mask includes them):

    - **pooled**: one Pearson correlation over all masked entries of all genes. Most of it is the difference
      between highly and lowly expressed genes; predicting each gene's mean already scores high.
    - **gene_mean**: Pearson over the masked cells of each gene, then the mean over genes: measures differences between
      cells. Use this one to compare models.

    A gene is included in ``gene_mean`` if at least ``minimum_entries`` of its entries are masked and ``t`` and ``p``
    both vary over them; the others have no correlation, are omitted from the mean, and are counted below by the first
    applicable reason. A model that predicts a constant therefore changes the set of scored genes: compare the counts.

    Args:
        truth: Raw counts [cells, genes], dense or sparse.
        prediction: Predicted mean counts [cells, genes] on the same scale, dense or sparse.
        mask: bool [cells, genes]. True: the entry was held out and is scored.
        minimum_entries: Minimum number of masked cells per gene; at least 2.

    Returns:
        ``pooled`` and ``gene_mean`` (NaN if no correlation is defined), ``entries`` (masked entries),
        ``genes`` (genes in the mean), ``genes_too_few``, ``genes_constant_truth``, ``genes_constant_prediction``: the
        four numbers of genes add up to all genes.

    Raises:
        InputError: Shapes differ, or a masked entry is negative or not finite.
    """
    if minimum_entries < 2:
        raise InputError(
            f"minimum_entries={minimum_entries}",
            "at least 2, the minimum for a correlation",
            "Use the default or a larger value",
        )
    if mask is None:
        raise InputError(
            "mask=None",
            "a boolean matrix that marks the held-out entries",
            "Use pearson_per_gene to compare all entries",
        )
    per_gene: list[np.ndarray] = []
    lacking = {"genes_too_few": 0, "genes_constant_truth": 0, "genes_constant_prediction": 0}
    entries = 0
    mean = np.zeros(2)  # of t and p over all masked entries so far
    comoment = np.zeros((2, 2))  # sums of products of deviations from that mean
    smallest = np.full(2, np.inf)
    largest = np.full(2, -np.inf)
    for _, true, predicted, chosen in _column_blocks(truth, prediction, mask):
        for name, values in (("truth", true), ("prediction", predicted)):
            if (values < 0).any():
                raise InputError(
                    f"{name} is negative in {int((values < 0).sum())} masked entries",
                    "counts and predicted mean counts before log1p",
                    "Pass them before any logarithm or centring",
                )
        true = np.log1p(true)
        predicted = np.log1p(predicted)
        count, pearson, true_constant, predicted_constant = _column_moments(true, predicted, chosen)
        few = count < minimum_entries
        # Each gene is counted once, under the first reason that applies.
        true_constant &= ~few
        predicted_constant &= ~few & ~true_constant
        lacking["genes_too_few"] += int(few.sum())
        lacking["genes_constant_truth"] += int(true_constant.sum())
        lacking["genes_constant_prediction"] += int(predicted_constant.sum())
        per_gene.append(pearson[~few & ~true_constant & ~predicted_constant])

        pairs = np.stack([true[chosen], predicted[chosen]])
        new = pairs.shape[1]
        if not new:
            continue
        smallest = np.minimum(smallest, pairs.min(axis=1))
        largest = np.maximum(largest, pairs.max(axis=1))
        new_mean = pairs.mean(axis=1)
        pairs -= new_mean[:, None]
        # Chan's update of means and co-moments: blocks are merged without a second pass and without cancellation.
        step = new_mean - mean
        comoment += pairs @ pairs.T + np.outer(step, step) * (entries * new / (entries + new))
        mean += step * (new / (entries + new))
        entries += new
    correlations = np.concatenate(per_gene) if per_gene else np.zeros(0)
    pooled = np.nan
    # Rounding gives constant values a tiny variance; comparing extremes is exact.
    if entries >= 2 and (largest > smallest).all():
        length = np.sqrt(np.diag(comoment))
        pooled = float(
            np.clip(
                comoment[0, 1] / length[0] / length[1],
                -1.0,
                1.0,
            )
        )
    return {
        "pooled": pooled,
        "gene_mean": float(correlations.mean()) if correlations.size else np.nan,
        "entries": entries,
        "genes": int(correlations.size),
        **lacking,
    }


def negative_binomial_log_likelihood(
    counts: Values,
    mean: Values,
    dispersion: Values,
) -> Float64[np.ndarray, "*any"] | float:
    """Return the log-probability of every count under a negative binomial, in float64: the reference implementation.

    Parametrised by the mean ``m`` and the inverse dispersion ``r`` (variance ``m + m^2 / r``, Poisson as ``r`` grows),
    the form of ``CellPLM/objective/zinb.py`` without its small constants::

        log p(x) = lgamma(x + r) - lgamma(r) - lgamma(x + 1) + r log(r / (r + m)) + x log(m / (r + m))

    The two logarithms are computed as ``-log1p(m / r)`` and ``-log1p(r / m)``, and the first two terms through the
    logarithm of the beta function, which is accurate if ``r`` is far larger than the count.

    Args:
        counts: Counts of any shape, dense.
        mean: Expected counts; broadcasts against ``counts``. 0 is allowed: it gives 0 for a count of 0, else -inf.
        dispersion: Inverse dispersion, positive; broadcasts, for example [genes] against [cells, genes].

    Returns:
        One entry per count. Natural logarithm; not summed.

    Raises:
        InputError: Shapes do not broadcast, a value is not finite, a count or mean is negative or the dispersion is not
            positive.
    """
    arrays = {"counts": counts, "mean": mean, "dispersion": dispersion}
    values = {name: _finite(np.asarray(array), name) for name, array in arrays.items()}
    for name, lowest in (("counts", "zero or more"), ("mean", "zero or more"), ("dispersion", "")):
        wrong = values[name] < 0 if lowest else values[name] <= 0
        if wrong.any():
            raise InputError(
                f"{name} is as small as {values[name].min():g}",
                lowest or "more than zero",
                "Pass raw counts, expected counts and the positive inverse dispersion",
            )
    try:
        x, m, r = np.broadcast_arrays(*values.values())
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in values.items())
        raise InputError(
            f"Shapes {shapes}",
            "shapes that broadcast against [cells, genes]",
            "Give the dispersion one entry per gene, or one per count",
        ) from None
    # log and betaln are undefined at 0, also in the branch that `where` discards.
    positive = np.maximum(x, 1.0)
    # lgamma(x + r) - lgamma(r) - lgamma(x + 1) = -log(x) - log Beta(x, r) for x > 0, and 0 for x = 0.
    choose = np.where(
        x > 0,
        -np.log(positive) - special.betaln(positive, r),
        0.0,
    )
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # a mean of 0
        success = np.where(x > 0, -x * np.log1p(r / m), 0.0)
    return choose - r * np.log1p(m / r) + success


def _errors(truth: Any, prediction: Any, mask: Any | None) -> np.ndarray:
    """Return the differences of the selected entries as one flat float64 array."""
    parts = [
        part.toarray() if sparse.issparse(part) else np.asarray(part)
        for part in (truth, prediction)
    ]
    _same_shape(parts[0], parts[1], "prediction")
    if mask is not None:
        mask = mask.toarray() if sparse.issparse(mask) else mask
        _same_shape(parts[0], mask, "mask")
        chosen = _boolean(mask)
        parts = [part[chosen] for part in parts]
    difference = _finite(parts[1], "prediction") - _finite(parts[0], "truth")
    if not difference.size:
        raise InputError("No entries to compare", "at least one", "Check the mask")
    return difference.ravel()


def root_mean_squared_error(truth: Values, prediction: Values, mask: Values | None = None) -> float:
    """Return the square root of the mean squared difference over all selected entries.

    The mean is over entries, not over genes or cells first, so the result does not depend on any order.

    Args:
        truth: float, any shape, dense or sparse.
        prediction: The same shape.
        mask: bool of the same shape or None. True: the entry is used.

    Returns:
        Error in the unit of the values.

    Raises:
        InputError: Shapes differ, nothing is selected, or a selected entry is not finite.
    """
    return float(np.sqrt(np.mean(np.square(_errors(truth, prediction, mask)))))


def mean_absolute_error(truth: Values, prediction: Values, mask: Values | None = None) -> float:
    """Return the mean absolute difference over all selected entries.

    Args:
        truth: float, any shape, dense or sparse.
        prediction: The same shape.
        mask: bool of the same shape or None. True: the entry is used.

    Returns:
        Error in the unit of the values.

    Raises:
        InputError: Shapes differ, nothing is selected, or a selected entry is not finite.
    """
    return float(np.mean(np.abs(_errors(truth, prediction, mask))))
