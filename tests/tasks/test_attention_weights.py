"""Explicit attention weights: exact, of the right cells, and every refusal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

import cellplm_jax
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.pretrained import Pretrained
from tests.conftest import make_adata


def weights(model, cells, *, adata=None, **options):
    return cellplm_jax.cell_attention(adata or make_adata(20), model, cells=cells, **options)


def test_rows_are_chosen_cells_and_columns_all(tiny_model):
    full = weights(tiny_model, ["cell7", "cell2"], average=False)
    heads = tiny_model.config.encoder.heads
    assert full.shape == (heads * 2, 20)
    assert full.index.names == ["layer", "head", "cell"]
    assert full.index[1] == (0, 0, "cell2")
    assert full.columns.tolist() == [f"cell{n}" for n in range(20)]
    assert (full.to_numpy() > 0).all()
    table = weights(tiny_model, ["cell7", "cell2"])
    assert table.index.tolist() == ["cell7", "cell2"]
    pd.testing.assert_frame_equal(table, full.groupby("cell", sort=False).mean(), rtol=1e-5)
    mask = np.isin(np.arange(20), [2, 7])
    pd.testing.assert_frame_equal(weights(tiny_model, mask), table.iloc[::-1], rtol=1e-5)
    pd.testing.assert_frame_equal(weights(tiny_model, 7), table.iloc[:1], rtol=1e-5)
    shares = weights(tiny_model, [7, 2], normalize=True).to_numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(shares, table / table.sum(axis=1).to_numpy()[:, None], rtol=1e-5)


def test_cells_of_other_contexts_have_no_weight(tiny_model):
    table = weights(tiny_model, [0, 5], batch_key="batch").to_numpy()
    assert ((table[0] > 0) == (np.arange(20) % 2 == 0)).all()
    assert ((table[1] > 0) == (np.arange(20) % 2 == 1)).all()
    alone = make_adata(20)[::2].copy()
    other = weights(tiny_model, "cell0", adata=alone, spatial_key=None).to_numpy()
    nowhere = weights(tiny_model, 0, batch_key="batch", spatial_key=None).to_numpy()
    np.testing.assert_allclose(nowhere[:, ::2], other, atol=1e-6)
    few = weights(tiny_model, [0], batch_key="batch", cells_per_context=5).to_numpy()
    assert np.flatnonzero(few[0]).tolist() == [0, 4, 8, 12, 16]


def test_softmax_rows_sum_to_one(tiny_model):
    encoder = dataclasses.replace(tiny_model.config.encoder, kind="softmax")
    config = dataclasses.replace(tiny_model.config, encoder=encoder)
    model = Pretrained(config, tiny_model.params, tiny_model.genes)
    found = weights(model, [1, 3], average=False).to_numpy()
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["cell7", "nobody"], "1 of the selected cells are not in obs_names, such as 'nobody'"),
        ([3, 20], "there is no cell 20; expected numbers from 0 to 19"),
        ([], "no cells were selected; expected at least one"),
        (np.ones(3, bool), "a mask of 3 entries for 20 cells"),
    ],
)
def test_refuses(tiny_model, cells, message):
    with pytest.raises(InputError, match=message):
        weights(tiny_model, cells)


def test_refuses_names_that_repeat_and_encoders_without_attention(tiny_model):
    adata = make_adata(20)
    adata.obs_names = ["same"] * 20
    with pytest.raises(InputError, match="obs_names contains duplicates"):
        weights(tiny_model, "same", adata=adata)
    encoder = dataclasses.replace(tiny_model.config.encoder, kind="mlp")
    config = dataclasses.replace(tiny_model.config, encoder=encoder)
    with pytest.raises(InputError, match="is of kind 'mlp'; expected one with attention weights"):
        weights(Pretrained(config, {}, tiny_model.genes), [0])
