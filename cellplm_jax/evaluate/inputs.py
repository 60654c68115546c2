"""Types of the arguments that scores take in any form, and check themselves because users call them."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from cellplm_jax.errors import InputError

Matrix: TypeAlias = Any
"""Numbers with two axes: whatever numpy makes an array of, in most functions also a scipy sparse matrix."""

Values: TypeAlias = Any
"""Numbers of any shape, given in the same ways."""

Labels: TypeAlias = Any
"""One label of any type per cell: an array, a pandas Series or Categorical, or a list."""


def one_axis(labels: Labels, name: str) -> Any:
    """Return labels as an array, Series or Categorical.

    Raises:
        InputError: They do not have one axis.
    """
    values = labels if isinstance(labels, pd.Series | pd.Categorical) else np.asarray(labels)
    if np.ndim(values) != 1:
        raise InputError(
            f"{name} has {np.ndim(values)} axes",
            "one label per cell",
            "Pass one column, for example adata.obs['cell_type']",
        )
    return values


def row_sums(
    matrix: Shaped[Any, "rows columns"],
    dtype: Literal["float32", "float64"] | None = None,
) -> Shaped[np.ndarray, " rows"]:
    """Return the sum of each row of a dense or sparse matrix, whose own sums are matrices."""
    return np.asarray(matrix.sum(axis=1), dtype).ravel()


def column_sums(
    matrix: Shaped[Any, "rows columns"],
    dtype: Literal["float32", "float64"] | None = None,
) -> Shaped[np.ndarray, " columns"]:
    """Return the sum of each column; see :func:`row_sums`."""
    return np.asarray(matrix.sum(axis=0), dtype).ravel()


def column_means(
    matrix: Shaped[Any, "rows columns"],
    dtype: Literal["float32", "float64"] | None = None,
) -> Shaped[np.ndarray, " columns"]:
    """Return the mean of each column; see :func:`row_sums`."""
    return np.asarray(matrix.mean(axis=0), dtype).ravel()
