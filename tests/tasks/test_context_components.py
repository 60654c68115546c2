"""adapt='context': what is joined, that it is deterministic, and that it says what it is."""

import dataclasses

import numpy as np
import pytest

import cellplm_jax
from cellplm_jax.cli import main
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.tasks import context_components
from cellplm_jax.tasks import embed as embed_module
from tests.conftest import make_adata


@pytest.fixture(scope="module")
def cells():
    adata = cellplm_jax.datasets.pbmc3k()
    return adata[::9].copy()


def embedded(cells, model="small", **options):
    adata = cells.copy()
    cellplm_jax.embed(adata, model, **options)
    return adata


@pytest.fixture(scope="module")
def zero_shot(cells):
    return embedded(cells)


@pytest.fixture(scope="module")
def context(cells):
    return embedded(cells, adapt="context").obsm["X_cellplm"]


def test_the_latent_and_the_components_are_side_by_side(cells, zero_shot, monkeypatch):
    monkeypatch.setattr(context_components, "depth_slopes", lambda *values: np.float32(0))
    plain = zero_shot.obsm["X_cellplm"]
    adata = embedded(cells, adapt="context")
    joined = adata.obsm["X_cellplm"]
    width = plain.shape[1]
    latent = plain - plain.mean(axis=0)
    latent *= 0.5 / np.linalg.norm(latent, axis=1, keepdims=True)
    np.testing.assert_allclose(joined[:, :width], latent, atol=1e-5)
    scaled, own = joined[:, width : width + 50], joined[:, width + 50 : width + 100]
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 0.5, atol=1e-5)
    assert np.sqrt(np.mean(np.sum(own**2, axis=1))) == pytest.approx(1, abs=1e-4)
    assert joined.dtype == np.float32
    assert joined.shape[1] > width + 100
    assert adata.uns["cellplm"]["adapt"] == "context"
    assert not adata.uns["cellplm"]["comparable_between_files"]
    assert zero_shot.uns["cellplm"]["comparable_between_files"]


def test_depth_is_removed_within_clusters_and_kept_between_them():
    generator = np.random.default_rng(0)
    clusters = np.repeat([0, 1], 100)
    depth = (5 + 2 * clusters + generator.standard_normal(200)).astype(np.float32)
    embedding = np.stack([0.8 * depth, generator.standard_normal(200), 3.0 * clusters], axis=1)
    slopes = context_components.depth_slopes(embedding.astype(np.float32), depth, clusters)
    np.testing.assert_allclose(slopes, [0.8, 0, 0], atol=0.1)
    none = context_components.depth_slopes(embedding, np.ones(200, np.float32), clusters)
    np.testing.assert_array_equal(none, 0)


def test_it_is_the_same_every_time_and_for_every_order_of_cells(cells, zero_shot, context):
    first = context
    np.testing.assert_array_equal(first, embedded(cells, adapt="context").obsm["X_cellplm"])
    width = zero_shot.obsm["X_cellplm"].shape[1] + 100
    order = np.random.default_rng(0).permutation(cells.n_obs)
    moved = embedded(cells[order], adapt="context").obsm["X_cellplm"]
    similar = first[order, :width] @ first[order, :width].T
    # Leiden's clusters, within which depth is removed, depend a little on the order.
    again = moved[:, :width] @ moved[:, :width].T
    assert np.corrcoef(again.ravel(), similar.ravel())[0, 1] > 0.999


def test_types_are_found_better_than_zero_shot(cells, zero_shot, context):
    from cellplm_jax.evaluate.embedding import knn_accuracy

    labels = cells.obs["cell_type"].astype(str).to_numpy()
    known = labels != "unassigned"
    scores = [
        knn_accuracy(embedding[known], labels[known])
        for embedding in (zero_shot.obsm["X_cellplm"], context)
    ]
    assert scores[1] > scores[0] - 0.01


def test_few_cells_and_batches_work(tiny_model):
    adata = make_adata(12)
    cellplm_jax.embed(adata, tiny_model, adapt="context")
    assert np.isfinite(adata.obsm["X_cellplm"]).all()
    adata = make_adata(90)
    adata.obs["sample"] = ["a", "b", "c"] * 30
    cellplm_jax.embed(adata, tiny_model, adapt="context", batch_key="sample")
    assert np.isfinite(adata.obsm["X_cellplm"]).all()
    with pytest.raises(InputError, match="at least 2 genes and 3 cells"):
        cellplm_jax.embed(make_adata(2), dataclasses.replace(tiny_model), adapt="context")


def test_wrong_values_and_missing_extras_are_refused_before_any_work(tiny_model, monkeypatch):
    with pytest.raises(InputError, match="Did you mean 'context'"):
        cellplm_jax.embed(make_adata(8), tiny_model, adapt="contxt")

    def missing(module, extra, purpose):
        raise MissingDependencyError(f"{purpose} needs {module}", "it", f"install {extra}")

    monkeypatch.setattr(embed_module, "require", missing)
    with pytest.raises(MissingDependencyError, match="eval"):
        cellplm_jax.embed(make_adata(8), tiny_model, adapt="context")


def test_the_command_line_offers_it(tmp_path, tiny_model):
    adata = make_adata(70)
    adata.write_h5ad(tmp_path / "in.h5ad")
    tiny_model.save(tmp_path / "model")
    for verb in ("embed", "cluster"):
        out = tmp_path / f"{verb}.h5ad"
        command = [verb, str(tmp_path / "in.h5ad"), "--model", str(tmp_path / "model"), "--quiet"]
        assert main([*command, "--out", str(out), "--adapt", "context"]) == 0
        import anndata

        assert anndata.read_h5ad(out).uns["cellplm"]["adapt"] == "context"
