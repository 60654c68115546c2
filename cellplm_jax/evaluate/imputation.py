"""Imputation scores per gene: correlation, cosine similarity and errors.

The released error depends on the order of the genes (``CellPLM/utils/eval.py``); here it is computed per gene and over
all entries. Values are not transformed: apply the same normalisation to both inputs first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Real
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.inputs import Matrix
from cellplm_jax.evaluate.reconstruction import (
    mean_absolute_error,
    pearson_per_gene,
    root_mean_squared_error,
)


def cosine_per_gene(
    truth: Real[np.ndarray, "cells genes"], prediction: Real[np.ndarray, "cells genes"]
) -> Float64[np.ndarray, " genes"]:
    """Return the cosine similarity between true and predicted values of each gene over cells.

    Returns:
        NaN if either is zero in all cells.
    """
    truth = np.asarray(truth, np.float64)
    prediction = np.asarray(prediction, np.float64)
    lengths = np.linalg.norm(truth, axis=0), np.linalg.norm(prediction, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.einsum("cg,cg->g", truth, prediction) / lengths[0] / lengths[1]
    return np.where(
        (lengths[0] > 0) & (lengths[1] > 0),
        cosine,
        np.nan,
    )


def imputation_table(truth: Matrix, prediction: Matrix, genes: Sequence[str]) -> pd.DataFrame:
    """Score each gene.

    Args:
        truth: float [cells, genes], dense or sparse.
        prediction: The same shape, dense or sparse.
        genes: Names [genes], the index of the result.

    Returns:
        Columns ``pearson`` and ``cosine`` (NaN if undefined), ``rmse``, ``mae``, in the unit of the values.

    Raises:
        InputError: Shapes or the number of names differ, the input is empty, or a value is not finite.
    """
    true, predicted = (
        np.asarray(part.toarray() if sparse.issparse(part) else part, np.float64)
        for part in (truth, prediction)
    )
    pearson = pearson_per_gene(true, predicted)
    if len(genes) != len(pearson) or not true.size:
        raise InputError(
            f"{true.shape[0]} cells, {true.shape[1]} genes and {len(genes)} names",
            "at least one of each, and one name per gene",
            "Pass the names of the columns",
        )
    difference = predicted - true
    return pd.DataFrame(
        {
            "pearson": pearson,
            "cosine": cosine_per_gene(true, predicted),
            "rmse": np.sqrt(np.square(difference).mean(axis=0)),
            "mae": np.abs(difference).mean(axis=0),
        },
        index=pd.Index(list(genes), dtype=object),
    )


def imputation_scores(truth: Matrix, prediction: Matrix, genes: Sequence[str]) -> dict[str, float]:
    """Score all imputed genes together.

    Args:
        truth: float [cells, genes], dense or sparse.
        prediction: The same shape, dense or sparse.
        genes: Names [genes].

    Returns:
        ``pearson`` and ``cosine``: means over the genes for which they are defined (NaN if none); ``rmse`` and ``mae``
        over all entries; ``genes``, their number, and ``genes_without_correlation``, constant in truth or prediction.

    Raises:
        InputError: As in :func:`imputation_table`.
    """
    table = imputation_table(truth, prediction, genes)
    defined = table["pearson"].notna()
    return {
        "pearson": float(table["pearson"].mean()),
        "cosine": float(table["cosine"].mean()),
        "rmse": root_mean_squared_error(truth, prediction),
        "mae": mean_absolute_error(truth, prediction),
        "genes": len(table),
        "genes_without_correlation": int((~defined).sum()),
    }
