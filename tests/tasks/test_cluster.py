"""Clustering: found groups, scanpy's conventions, files, and every refusal."""

from __future__ import annotations

import inspect

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.embedding import clustering_scores, leiden_clusters
from cellplm_jax.tasks.cluster import cluster, cluster_file
from cellplm_jax.tasks.embed import options_of
from tests.conftest import make_adata

scanpy = pytest.importorskip("scanpy", reason="needs the extra 'eval'")
pytest.importorskip("igraph", reason="needs the extra 'eval'")


def groups(cells=90):
    """An AnnData with an embedding of three groups."""
    adata = make_adata(cells)
    kind = np.arange(cells) % 3
    noise = np.random.default_rng(0).normal(size=(cells, 4))
    adata.obsm["X_cellplm"] = (8 * np.eye(3, 4)[kind] + 0.5 * noise).astype(np.float32)
    adata.obs["kind"] = kind
    return adata


@pytest.mark.parametrize("function", [cluster, cluster_file])
def test_the_options_of_the_embedding_that_help_names_are_accepted(function):
    code = function.__code__
    own = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    named = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in own and parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {"batch_key", "layer"} <= set(named)
    options_of(named)  # an argument that only embed has must be in `omitted` of keys_of


def test_finds_groups_and_writes_what_scanpy_reads():
    adata = groups()
    assert cluster(adata, resolution=0.3) is adata
    found = adata.obs["cellplm_cluster"]
    assert list(found.cat.categories) == ["0", "1", "2"]
    assert clustering_scores(adata.obs["kind"], found)["ari"] == 1.0
    assert adata.uns["cellplm_cluster"]["params"]["resolution"] == 0.3
    expected = leiden_clusters(adata.obsm["X_cellplm"], resolution=0.3)
    np.testing.assert_array_equal(found.astype(int), expected)

    own = groups()
    scanpy.pp.neighbors(own, use_rep="X_cellplm", random_state=0)
    assert adata.uns["neighbors"] == own.uns["neighbors"]
    for name in ("distances", "connectivities"):
        assert abs(adata.obsp[name] - own.obsp[name]).max() == 0
    scanpy.tl.umap(adata)
    assert adata.obsm["X_umap"].shape == (90, 2)


def test_embeds_where_the_embedding_is_missing(tiny_model):
    adata = make_adata(40)
    cluster(adata, tiny_model, neighbors=10, key_added="group")
    # Adapted to the context, unless asked otherwise.
    assert adata.uns["cellplm"]["adapt"] == "context"
    assert adata.obsm["X_cellplm"].shape[1] > tiny_model.config.latent_size
    plain = cluster(make_adata(40), tiny_model, neighbors=10, adapt="none")
    assert plain.obsm["X_cellplm"].shape == (40, tiny_model.config.latent_size)
    before = adata.obs["group"].copy()
    cluster(adata, neighbors=10, key_added="group")  # from the embedding that is there now
    pd.testing.assert_series_equal(before, adata.obs["group"])


def test_files(tiny_run, tiny_model, tmp_path):
    path, out = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    make_adata(40).write_h5ad(path)
    cells, messages = cluster_file(path, out, tiny_run, neighbors=10, umap=True, quiet=True)
    assert any("genes" in message for message in messages)
    found = ad.read_h5ad(out)
    assert list(found.obs["cellplm_cluster"]) == list(cells.obs["cellplm_cluster"])
    expected = cluster(make_adata(40), tiny_model, neighbors=10)
    assert list(found.obs["cellplm_cluster"]) == list(expected.obs["cellplm_cluster"])
    assert set(found.obsm) == {"spatial", "X_cellplm", "X_umap"}
    scanpy.tl.umap(found)

    again = tmp_path / "again.h5ad"
    assert cluster_file(out, again, resolution=0.5, key_added="coarse", quiet=True)[1] == []
    assert {"cellplm_cluster", "coarse"} <= set(ad.read_h5ad(again).obs)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"obsm has no 'X_cellplm' .* no model was given"):
        cluster(make_adata(30))
    with pytest.raises(InputError, match="resolution = 0"):
        cluster(groups(), resolution=0)
    with pytest.raises(InputError, match="more cells than neighbours"):
        cluster(groups(9))
    adata = groups()
    adata.obsm["X_cellplm"][3] = np.nan
    with pytest.raises(InputError, match="NaN or infinity in 1 of 90"):
        cluster(adata)
    assert "cellplm_cluster" not in adata.obs
    with pytest.raises(InputError, match=r"does not exist"):
        cluster_file(tmp_path / "absent.h5ad", tmp_path / "out.h5ad")
    assert not list(tmp_path.iterdir())
