"""Marker genes: the statistic is scanpy's, and what is not a marker is left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.markers import group_means, marker_genes

GENES = ["CD3D", "LYZ", "RPS27", "MT-CO1", "ACTB", "RARE"]


def cells(number=90):
    generator = np.random.default_rng(0)
    groups = np.array(["0", "2", "10"])[np.arange(number) % 3]
    rate = np.full((number, len(GENES)), 2.0)
    rate[groups == "0", 0] = 12
    rate[groups == "10", 1] = 12
    rate[groups == "10", 2:4] = 30
    rate[:, 5] = 0
    counts = generator.poisson(rate).astype(np.float32)
    counts[np.flatnonzero(groups == "2")[:4], 5] = 9  # high in a few cells of a group only
    return sparse.csr_matrix(counts), pd.Categorical(groups, ["0", "2", "10"])


def test_markers_are_those_that_were_put_in():
    counts, groups = cells()
    found = marker_genes(counts, groups, GENES)
    best = found.groupby("group", sort=False).head(1)
    best = dict(zip(best["group"], best["gene"], strict=True))
    assert (best["0"], best["10"]) == ("CD3D", "LYZ")
    assert not set(found["gene"]) & {"RPS27", "MT-CO1", "RARE"}
    assert "RPS27" in set(marker_genes(counts, groups, GENES, housekeeping=True)["gene"])


def test_the_score_is_that_of_scanpy():
    scanpy = pytest.importorskip("scanpy", reason="needs the extra 'eval'")
    counts, groups = cells()
    adata = scanpy.AnnData(counts.copy())
    adata.var_names = GENES
    adata.obs["group"] = groups
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.tl.rank_genes_groups(adata, "group", method="t-test")
    theirs = scanpy.get.rank_genes_groups_df(adata, None).set_index(["group", "names"])["scores"]
    ours = marker_genes(counts, groups, GENES, housekeeping=True).set_index(["group", "gene"])
    for place, score in ours["score"].items():
        assert score == pytest.approx(theirs[place], rel=1e-3)


def test_means_and_shares_of_groups():
    counts, groups = cells()
    means, shares = group_means(counts, groups, GENES)
    own = counts.toarray()[np.asarray(groups) == "2"]
    logs = np.log1p(1e4 * own / own.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(means.loc["2"], logs.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(shares.loc["2"], (own > 0).mean(axis=0), rtol=1e-6)
    assert list(means.index) == ["0", "2", "10"]


def test_what_cannot_be_compared():
    counts, groups = cells()
    with pytest.raises(InputError, match="at least two"):
        marker_genes(counts, ["a"] * 90, GENES)
    with pytest.raises(InputError, match="89 labels for 90 cells"):
        marker_genes(counts, groups[:89], GENES)
    few = np.array(["a"] * 88 + ["b"] * 2)
    assert marker_genes(counts, few, GENES).empty
