"""The gene embeddings of a model as a table."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from cellplm_jax.data.genes import symbols_of
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained


def gene_embeddings(
    model: Pretrained | str | os.PathLike, *, symbols: bool = False
) -> pd.DataFrame:
    """Return the embedding of every gene: what a cell's expression is a weighted sum of (paper equation 1).

    Genes with like embeddings move a cell's embedding alike. Only directions and relative lengths mean something.

    Args:
        model: From :func:`cellplm_jax.load`, or what it opens, such as ``"small"``.
        symbols: Name the rows by current gene symbols, where one is known, instead of as the model does.

    Returns:
        float32 [genes, hidden]; one row a gene, index ``"gene"``, in the order of ``model.genes``.

    Raises:
        CheckpointError: There is no such model.
    """
    model = as_pretrained(model)
    table = np.array(model.params["embedder"]["gene_embedding"], np.float32)
    names = symbols_of(model.genes) if symbols else list(model.genes)
    return pd.DataFrame(
        table,
        index=pd.Index(names, name="gene"),
        columns=pd.RangeIndex(table.shape[1], name="dimension"),
    )
