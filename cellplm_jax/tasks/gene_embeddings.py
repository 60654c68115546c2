"""The gene embeddings of a model as a table."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from cellplm_jax.data.genes import symbols_of
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained


def gene_embeddings(
    model: Pretrained | str | os.PathLike,
    *,
    symbols: bool = False,
) -> pd.DataFrame:
    """Return the embedding of every gene; a cell's expression token is a weighted sum of them (paper equation 1).

    Genes with similar embeddings change a cell's embedding in a similar way. Only directions and relative lengths are
    meaningful.

    Args:
        model: From :func:`cellplm_jax.load`, or a source for it, such as ``"small"``.
        symbols: Name the rows by current gene symbols, if known; the model's names are then the second level of the
            index, because two genes may share a symbol.

    Returns:
        float32 [genes, hidden]; one row per gene, index ``"gene"`` (with ``symbols`` ``"gene"`` and
        ``"id"``), in the order of ``model.genes``.

    Raises:
        CheckpointError: The model does not exist.
    """
    model = as_pretrained(model)
    table = np.array(model.params["embedder"]["gene_embedding"], np.float32)
    index: pd.Index = pd.Index(model.genes, name="gene")
    if symbols:
        index = pd.MultiIndex.from_arrays([symbols_of(model.genes), index], names=["gene", "id"])
    return pd.DataFrame(
        table,
        index=index,
        columns=pd.RangeIndex(table.shape[1], name="dimension"),
    )
