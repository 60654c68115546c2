"""Training and validation cells: the values of a split column, or a random part of the cells."""

from __future__ import annotations

import numpy as np

from cellplm_jax.errors import InputError, require_column
from cellplm_jax.tasks.contexts import CellTable

PARTS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid"}
"""Known values of a split column; cells with other values are not used."""


def parts_of(values: np.ndarray) -> np.ndarray:
    """Return the values of a split column: ``"train"``, ``"valid"``, or the value itself, in lower case."""
    lower = [str(value).strip().lower() for value in values]
    return np.array([PARTS.get(value, value) for value in lower], object)


def split_cells(
    table: CellTable,
    split_key: str | None,
    *,
    usable: np.ndarray,
    strata: np.ndarray,
    fraction: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Select the training and the validation cells.

    Args:
        table: The cells.
        split_key: Column of ``obs`` with ``"train"`` and ``"valid"`` (other values: unused cells); None: a random
            fraction of the usable cells is used for validation. If the column has no validation cells, a
            fraction of its training cells is used.
        usable: bool [cells], cells for training or validation (those with a label).
        strata: [cells], strata of the random fraction; strata with fewer than four cells are not sampled.
        fraction: Fraction of each stratum.
        seed: Seed of the random fraction.

    Returns:
        int arrays: training cells, validation cells.

    Raises:
        InputError: The column does not exist, or has no usable training cell.
    """
    if split_key is None:
        train = np.flatnonzero(usable)
        valid = np.zeros(0, int)
    else:
        remedy = "Use the column with 'train' and 'valid', or omit split_key"
        require_column(table.obs.columns, split_key, remedy)
        parts = parts_of(np.asarray(table.obs[split_key].astype(object)))
        train = np.flatnonzero(usable & (parts == "train"))
        valid = np.flatnonzero(usable & (parts == "valid"))
        if not len(train):
            values = ", ".join(map(repr, list(dict.fromkeys(parts))[:6]))
            raise InputError(
                f"obs['{split_key}'] marks no usable training cell (its values: {values})",
                "'train' for the cells to fit on, 'valid' for those to validate with",
                "Correct the column, or omit split_key",
            )
    if len(valid) or fraction == 0:
        return train, valid
    generator = np.random.default_rng(seed)
    held = []
    for stratum in dict.fromkeys(strata[train]):
        cells = train[strata[train] == stratum]
        # A stratum of three cells cannot spare one.
        number = max(1, round(fraction * len(cells))) if len(cells) >= 4 else 0
        # One permutation per stratum, in order of first appearance: the draw depends on no other option.
        held.append(generator.permutation(cells)[:number])
    valid = np.sort(np.concatenate(held)) if held else valid
    return np.setdiff1d(train, valid), valid
