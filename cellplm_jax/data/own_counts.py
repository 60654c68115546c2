"""Counts of some cells of a file in its own genes, for reports: no vocabulary of a model is involved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.features import own_symbols
from cellplm_jax.errors import InputError


def read_counts(
    path: str | os.PathLike,
    rows: np.ndarray,
    facts: Mapping[str, Any],
) -> tuple[sparse.csr_matrix, list[str]] | None:
    """Read the counts of some cells in the genes of the file, from the matrix that the work read.

    Args:
        path: An ``.h5ad`` file.
        rows: int [n], numbers of the cells.
        facts: Facts of ``uns`` with the entry ``"input"``; without it the counts are searched.

    Returns:
        float32 CSR [n, genes] and the symbols of the genes as the file spells them; None: the file has no counts that
        can be read.
    """
    import h5py
    from anndata.io import read_elem

    read = facts.get("input") or {}
    matrix = str(read.get("matrix", ""))
    layer = matrix.removeprefix("layers['").removesuffix("']") or None
    try:
        with h5py.File(path) as file:
            table: Any = read_elem(file["raw/var" if matrix == "raw.X" else "var"])
        table = table[~table.index.duplicated()]
        genes = list(map(str, table.index))
        with open_counts(
            path,
            genes,
            layer=layer,
            gene_key="var_names",
            minimum_genes=0,
            values=read.get("values", "counts"),
        ) as source:
            return source.read_rows(rows), own_symbols(table)
    except (InputError, OSError, KeyError):
        return None
