"""The table of gene embeddings."""

from __future__ import annotations

import numpy as np
import pytest

import cellplm_jax
from cellplm_jax.errors import CheckpointError


def test_a_row_a_gene(tiny_run, tiny_model):
    table = cellplm_jax.gene_embeddings(tiny_run)
    assert list(table.index) == tiny_model.genes
    assert (table.index.name, table.dtypes.unique().tolist()) == ("gene", [np.float32])
    stored = tiny_model.params["embedder"]["gene_embedding"]
    np.testing.assert_array_equal(table.to_numpy(), stored)
    table.iloc[0] = 7.0
    assert not np.any(np.asarray(stored[0]) == 7.0)  # a copy
    with pytest.raises(CheckpointError):
        cellplm_jax.gene_embeddings("nothing here")


def test_named_by_symbol():
    model = cellplm_jax.load("small")
    table = cellplm_jax.gene_embeddings(model, symbols=True)
    assert table.index.names == ["gene", "id"]
    assert {"CD3E", "MS4A1"} <= set(table.index.get_level_values("gene"))
    assert list(table.index.get_level_values("id")) == model.genes
    assert table.loc["CD3E"].shape == (1, table.shape[1])
    assert len(table) == len(model.genes)
