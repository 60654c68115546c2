"""Denoising: markers stay in their cell types, layers, what is saved and loaded, and every refusal."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse, stats

import cellplm_jax as cellplm
from cellplm_jax.batch import Reconstruction
from cellplm_jax.config import HeadConfig
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.denoising import hide_nonzeros
from cellplm_jax.presets import preset
from cellplm_jax.tasks import estimator as estimator_module
from cellplm_jax.tasks.contexts import variable_genes
from cellplm_jax.tasks.denoise import Denoiser
from cellplm_jax.tasks.denoise_counts import expected_counts, expected_logs, posterior_counts
from cellplm_jax.tasks.denoise_pool import PARTS
from tests.conftest import ROOT, VOCABULARY, make_adata

FAST = {"epochs": 8, "warmup_epochs": 1, "learning_rate": 1e-2, "quiet": True}


def denoiser(model, **options):
    return Denoiser(model, **{**FAST, **options})


def denoised(found, adata, **options):
    layer = found.predict(adata.copy(), **options).layers["cellplm_denoised"]
    return layer.toarray() if sparse.issparse(layer) else layer


def hidden_pair(cells=120, seed=0):
    """Cells with a tenth of their non-zero counts hidden, and as they were."""
    whole = make_adata(cells, seed=seed)
    masked = whole.copy()
    masked.X, _ = hide_nonzeros(sparse.csr_matrix(whole.X), 0.1, seed=seed)
    return masked, whole


@pytest.fixture(scope="session")
def fitted(tiny_model):
    """A denoiser of 120 cells in two batches, a tenth of their counts hidden; read only."""
    return denoiser(tiny_model).fit(hidden_pair()[0], batch_key="batch")


# What it is for


@pytest.fixture(scope="module")
def blood():
    """900 cells of the bundled PBMC3k over 1,000 variable genes, with their types by marker genes; read only."""
    cells = cellplm.datasets.pbmc3k()[::3].copy()
    found = cellplm.datasets.annotate_by_markers(cells.X, cells.var_names)
    cells.obs["type"] = found.labels
    return cells[:, variable_genes(sparse.csr_matrix(cells.X), 1000)].copy()


def test_markers_stay_in_their_cell_types_zero_shot(blood):
    counts = sparse.csr_matrix(blood.X)
    visible, _ = hide_nonzeros(counts, 0.1, seed=0)
    masked = ad.AnnData(visible, obs=blood.obs.copy(), var=blood.var.copy())
    whole = masked.copy()
    whole.X = counts
    found = Denoiser("small", quiet=True)
    scores = found.score(masked, truth=whole, label_key="type")
    assert scores["markers"] >= 20
    assert scores["markers_highest"] >= 0.95
    assert scores["contrast_kept"] >= 0.7
    assert scores["profile_pearson"] > scores["gene_mean_profile_pearson"] + 0.1
    # Not below the better part, and above it where it matters: the network alone loses the contrast.
    best = min(scores[f"{part}_rmse"] for part in PARTS)
    assert scores["rmse"] <= best + 0.002
    assert scores["network_contrast_kept"] < scores["contrast_kept"]
    layer = found.predict(masked).layers["cellplm_denoised"]
    assert np.isfinite(layer.data if sparse.issparse(layer) else layer).all()
    pool = masked.uns["cellplm_denoising"]["pool"]
    assert pool["calibration_error"] < 0.15
    assert pool["log_likelihood"]["pooled"] > pool["log_likelihood"]["gene_mean"]


def layer_bytes(path, *names):
    with h5py.File(path) as file:
        found = [file[name] for name in names]
        parts = [
            [one]
            if isinstance(one, h5py.Dataset)
            else [one[n] for n in ("data", "indices", "indptr")]
            for one in found
        ]
        return [sum(part.id.get_storage_size() for part in each) for each in parts]


def test_a_sparse_layer_is_smaller_than_the_counts(blood, tmp_path):
    blood.write_h5ad(tmp_path / "in.h5ad", compression="gzip")
    found = Denoiser("small", quiet=True)
    found.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", storage="sparse")
    sizes = layer_bytes(tmp_path / "out.h5ad", "layers/cellplm_denoised", "X")
    assert sizes[0] <= sizes[1]
    layer = ad.read_h5ad(tmp_path / "out.h5ad").layers["cellplm_denoised"]
    assert layer.nnz <= 1.3 * blood.X.nnz
    full = denoised(found, blood)
    rows, columns = layer.nonzero()
    np.testing.assert_allclose(layer.data, full[rows, columns], rtol=0.126)
    assert layer.sum() > 0.5 * full.sum()


def test_a_file_is_rounded_and_compressed(blood, tmp_path):
    counts = ad.AnnData(blood.X, obs=blood.obs[[]], var=blood.var[[]])
    counts.write_h5ad(tmp_path / "in.h5ad")
    found = Denoiser("small", quiet=True)
    found.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    size = layer_bytes(tmp_path / "out.h5ad", "layers/cellplm_denoised")[0]
    assert size <= 0.75 * counts.X.shape[0] * counts.X.shape[1]  # bytes; float32 has 4 a value
    layer, full = (
        ad.read_h5ad(tmp_path / "out.h5ad").layers["cellplm_denoised"],
        denoised(found, counts),
    )
    assert layer.dtype == np.float32
    step = 2e-5 * full.sum(axis=1, keepdims=True)
    assert (np.abs(layer - full) <= np.maximum(full / 8, step / 2) + 1e-6).all()
    np.testing.assert_allclose(layer.sum(axis=1), full.sum(axis=1), rtol=0.05)
    assert len(np.unique(layer)) < len(np.unique(full)) / 100
    logs = Denoiser("small", quiet=True)
    logs.predict(counts, storage="rounded", log_normalized=True)
    eighths = 8 * counts.layers["cellplm_denoised_log1p"]
    np.testing.assert_array_equal(eighths, np.rint(eighths))


def test_storage(fitted):
    adata = make_adata(30, seed=3)
    full = denoised(fitted, adata)
    half = fitted.predict(adata.copy(), storage="float16").layers["cellplm_denoised"]
    assert (half.dtype, half.shape) == (np.float16, adata.shape)
    np.testing.assert_allclose(half.astype(np.float32), full, rtol=2e-3)
    # With many other genes the layer holds the denoised ones only.
    extra = np.random.default_rng(0).poisson(1.0, (30, 60)).astype(np.float32)
    wide = ad.AnnData(sparse.hstack([adata.X, extra]).tocsr(), obs=adata.obs.copy())
    wide.var_names = [*adata.var_names, *(f"other-{n}" for n in range(60))]
    wide.obsm["spatial"] = adata.obsm["spatial"]
    layer = fitted.predict(wide).layers["cellplm_denoised"]
    assert (layer.dtype, layer.nnz) == (np.float32, 30 * 40)
    np.testing.assert_array_equal(layer[:, :43].toarray(), full)
    with pytest.raises(InputError, match="storage='float8'; expected one of 'float32'"):
        fitted.predict(adata, storage="float8")
    with pytest.raises(InputError, match="detected and own_counts"):
        fitted.predict(adata, detected=True, own_counts=True)


def test_own_counts_lie_between_prediction_and_counts(fitted):
    adata = make_adata(30, seed=3)[:, VOCABULARY].copy()
    counts, prior = adata.X.toarray(), denoised(fitted, adata)
    own = denoised(fitted, adata, own_counts=True)
    np.testing.assert_allclose(own.sum(axis=1), prior.sum(axis=1), rtol=1e-4)
    assert np.abs(own - counts).mean() < np.abs(prior - counts).mean()
    # A gamma prior with mean 2 and dispersion 3, and 7 counts.
    found = posterior_counts(np.full((1, 2), 2.0), np.full(2, 3.0), sparse.csr_matrix([[7.0, 7.0]]))
    np.testing.assert_allclose(found, 2.0)  # both rise alike, and the sum is kept
    one = posterior_counts(
        np.array([[2.0, 1e6]]), np.array([3.0, 1e12]), sparse.csr_matrix([[7.0, 1e6]])
    )
    assert one[0, 0] == pytest.approx(2.0 * 10 / 5, rel=1e-4)


def test_the_scores_of_the_parts_are_told(fitted):
    pool = fitted.facts["pool"]
    assert sum(pool["weights"].values()) == pytest.approx(1, abs=1e-4)
    assert set(pool["rmse"]) == {"pooled", "without_correction", "without_network", *PARTS}
    assert fitted.messages[-1].startswith("Log-likelihood of held-out counts")
    assert "network" in fitted.messages[-1].split(";")[1]
    scores = fitted.score(make_adata(60, seed=9), seed=1)
    for part in ("", "network_", "neighbours_", "gene_mean_"):
        assert scores[f"{part}rmse"] > scores[f"{part}mae"] > 0


def test_an_old_denoiser_opens_and_is_pooled():
    found = Denoiser.load(ROOT / "tests" / "fixtures" / "denoiser-0.1", quiet=True)
    assert found.pool is None
    adata = make_adata(60)
    layer = denoised(found, adata)
    assert np.isfinite(layer).all()
    np.testing.assert_allclose(layer.sum(axis=1), adata.X.toarray().sum(axis=1), rtol=1e-4)
    messages = found._predict(adata, found.reading).messages
    assert "Log-likelihood of held-out counts" in messages[-1]


def test_one_cell_is_denoised(fitted):
    layer = denoised(fitted, make_adata(60, seed=3)[:1].copy())
    assert np.isfinite(layer).all()
    assert layer.sum() > 0


# What it finds


def test_writes_counts_that_add_up_and_their_logarithms(fitted):
    adata = make_adata(30, seed=3)
    assert fitted.predict(adata, log_normalized=True) is adata
    layer, log = adata.layers["cellplm_denoised"], adata.layers["cellplm_denoised_log1p"]
    assert (layer.shape, layer.dtype, log.dtype) == (adata.shape, np.float32, np.float32)
    known = np.array([name in VOCABULARY for name in adata.var_names])
    np.testing.assert_array_equal(adata.var["cellplm_denoised"], known)
    # Other genes are 0, not NaN.
    assert not layer[:, ~known].any()
    assert np.isfinite(layer).all()
    assert (layer[:, known] > 0).all()
    total = np.asarray(adata.X[:, known].sum(axis=1)).ravel()
    np.testing.assert_allclose(layer.sum(axis=1), total, rtol=1e-4)
    wanted = np.log1p(layer[:, known] / total[:, None] * 1e4)
    np.testing.assert_allclose(log[:, known], wanted, rtol=1e-4)
    facts = adata.uns["cellplm_denoising"]
    assert (facts["genes_denoised"], facts["genes_unknown"], facts["zero_shot"]) == (40, 3, False)
    assert facts["layers"] == ["cellplm_denoised", "cellplm_denoised_log1p"]


def test_better_than_the_mean_of_the_gene(fitted):
    masked, whole = hidden_pair()
    scores = fitted.score(masked, truth=whole)
    assert scores["entries"] == pytest.approx(0.1 * whole[:, VOCABULARY].X.nnz, rel=0.2)
    for kind in ("", "detected_"):
        for error in ("rmse", "mae"):
            assert scores[f"{kind}{error}"] < scores[f"{kind}gene_mean_{error}"]
    # Cells it never saw, hidden here.
    new = fitted.score(make_adata(60, seed=9), seed=1)
    assert new["rmse"] < new["gene_mean_rmse"]
    assert fitted.score(make_adata(60, seed=9), seed=1) == new
    assert fitted.score(make_adata(60, seed=9), seed=2) != new


def test_the_fit_is_told(fitted):
    facts = fitted.facts
    assert facts["training_cells"] + facts["validation_cells"] == 120
    assert facts["genes"] == 40
    losses = [row["validation_loss"] for row in fitted.history]
    assert facts["validation_loss"] == min(losses)
    assert {"reconstruction", "kl_latent"} <= set(fitted.history[0])
    assert fitted.history[-1]["reconstruction"] < fitted.history[0]["reconstruction"]
    assert set(fitted.batch_rows) == {"b0", "b1"}


def test_batches_are_decoded_with_their_own_row(fitted):
    adata = make_adata(30, seed=3)
    other = adata.copy()
    other.obs["batch"] = "never seen"
    adata.obs["batch"] = "b0"
    assert np.max(np.abs(denoised(fitted, other) - denoised(fitted, adata))) > 1e-4


def test_given_that_it_is_not_zero():
    mean = np.array([[0.02, 1.0, 30.0]])
    theta = np.array([0.5, 2.0, 5.0])
    output = Reconstruction(mean=mean, dispersion=theta)
    total, everything = mean.sum(axis=1), np.ones(3, bool)
    np.testing.assert_allclose(expected_counts(output, total, everything), mean, rtol=1e-6)
    found = expected_counts(output, total, everything, detected=True)[0]
    for number in range(3):
        law = stats.nbinom(theta[number], theta[number] / (theta[number] + mean[0, number]))
        assert found[number] == pytest.approx(law.mean() / (1 - law.pmf(0)), rel=1e-5)
    # Scaled over the measured genes alone; structural zeros lower the mean, and not what is there.
    part = expected_counts(output, 2 * total, np.array([True, True, False]))
    np.testing.assert_allclose(part[0, :2].sum(), 2 * total[0], rtol=1e-6)
    inflated = Reconstruction(mean=mean, dispersion=theta, zero_logits=np.zeros((1, 3)))
    np.testing.assert_allclose(
        expected_counts(inflated, total / 2, everything), mean / 2, rtol=1e-6
    )
    np.testing.assert_allclose(
        expected_counts(inflated, total / 2, everything, detected=True)[0], found, rtol=1e-6
    )


def test_zero_shot(tiny_model, tmp_path):
    adata = make_adata(20)
    found = Denoiser(tiny_model, quiet=True)
    layer = denoised(found, adata)
    assert np.isfinite(layer).any()
    found.save(tmp_path / "zero")
    loaded = Denoiser.load(tmp_path / "zero", quiet=True)
    again = loaded.predict(adata.copy())
    np.testing.assert_array_equal(again.layers["cellplm_denoised"], layer)
    assert again.uns["cellplm_denoising"]["zero_shot"]


def test_the_seed_decides_everything(tiny_model, fitted):
    again = denoiser(tiny_model).fit(hidden_pair()[0], batch_key="batch")
    new = make_adata(20, seed=9)
    np.testing.assert_array_equal(denoised(again, new), denoised(fitted, new))


def test_from_scratch_over_the_genes_of_the_data(monkeypatch):
    small = dataclasses.replace(preset("scratch"), model=preset("debug").model)
    monkeypatch.setattr(estimator_module, "preset", lambda name: small)
    adata = make_adata(60)
    found = denoiser(None, epochs=1).fit(adata)
    assert len(found.model.genes) == 43
    assert np.isfinite(denoised(found, adata)).all()


def test_genes_that_only_validation_cells_express_are_predicted(monkeypatch):
    small = dataclasses.replace(preset("scratch"), model=preset("debug").model)
    monkeypatch.setattr(estimator_module, "preset", lambda name: small)
    adata = make_adata(60)
    adata.obs["split"] = ["valid" if cell < 10 else "train" for cell in range(60)]
    adata.X[10:, 3] = 0
    adata.X[:10, 3] = 1
    found = denoiser(None, epochs=1).fit(adata, split_key="split")
    assert np.isfinite(denoised(found, adata)).all()


# Saved, and opened elsewhere


def test_a_new_process_predicts_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    make_adata(30, seed=6).write_h5ad(tmp_path / "cells.h5ad")
    wanted = denoised(fitted, make_adata(30, seed=6))
    code = (
        "import cellplm_jax, anndata\n"
        "found = cellplm_jax.Denoiser.load('saved', quiet=True)\n"
        "found.predict(anndata.read_h5ad('cells.h5ad')).write_h5ad('out.h5ad')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(written.layers["cellplm_denoised"], wanted)


def test_a_file_is_predicted_into_a_copy(fitted, tmp_path):
    make_adata(30, seed=6).write_h5ad(tmp_path / "in.h5ad")
    messages = fitted.predict_file(
        tmp_path / "in.h5ad", tmp_path / "out.h5ad", log_normalized=True, key_added="clean",
        storage="float32",
    )  # fmt: skip
    assert any("Gene names from" in message for message in messages)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    assert set(written.layers) == {"clean", "clean_log1p"}
    wanted = denoised(fitted, make_adata(30, seed=6))
    np.testing.assert_array_equal(written.layers["clean"], wanted)
    assert written.var["clean"].sum() == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


# What is refused


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (None, {"batch_key": "lane"}, "has no column 'lane'"),
        (None, {"split_key": "fold"}, "obs has no column 'fold'"),
        (None, {"layer": "counts"}, "has no layer 'counts'"),
        (None, {"spatial_key": "where"}, "has no 'where'"),
        ("genes", {}, "0 of the model's 40 genes are among"),
        ("part", {"batch_key": "batch", "split_key": "part"}, "batch 'b1' has no training cells"),
    ],
)
def test_what_cannot_be_fitted(tiny_model, change, keys, message):
    adata = make_adata(40)
    if change == "genes":
        adata.var_names = [f"other-{n}" for n in range(adata.n_vars)]
    adata.obs["part"] = np.where(adata.obs["batch"] == "b0", "train", "valid")
    with pytest.raises(InputError, match=message) as error:
        denoiser(tiny_model).fit(adata, **keys)
    assert "; expected " in str(error.value)


def test_what_cannot_be_predicted(tiny_model, fitted):
    with pytest.raises(InputError, match="this Denoiser has not been fitted"):
        denoiser(None).predict(make_adata(10))
    adata = make_adata(10)
    with pytest.raises(InputError, match="key_added = 'a/b'; expected a name without"):
        fitted.predict(adata, key_added="a/b")
    adata.raw = adata
    adata = adata[:, :20].copy()
    adata.X = np.log1p(adata.X.toarray()) + 0.25
    with pytest.raises(InputError, match=r"the counts are in raw\.X, whose genes differ"):
        fitted.predict(adata)
    assert "cellplm_denoised" not in adata.layers
    masked, whole = hidden_pair(20)
    with pytest.raises(InputError, match="no count is zero in adata and non-zero in truth"):
        fitted.score(whole, truth=whole)
    with pytest.raises(InputError, match="truth has 5 cells and adata 20"):
        fitted.score(masked, truth=whole[:5].copy())


def test_a_model_with_a_task_head_is_refused(tiny_model):
    head = HeadConfig(kind="annotation", outputs=2)
    config = dataclasses.replace(tiny_model.config, head=head)
    other = dataclasses.replace(tiny_model, config=config)
    for call in ("fit", "predict"):
        with pytest.raises(InputError, match="has a task head; expected a negative-binomial"):
            getattr(denoiser(other), call)(make_adata(10))


def test_logarithms_of_counts_that_are_there():
    """The mean of the logarithms of a negative binomial without its zeros, by brute force."""
    mean, theta = np.array([[0.02, 0.5, 3.0, 11.0, 40.0]]), np.array([0.5, 1.0, 2.0, 5.0, 10.0])
    output = Reconstruction(mean=mean, dispersion=theta)
    total = np.array([mean.sum()])
    detected = expected_counts(output, total, np.ones(5, bool), True)
    found = expected_logs(output, total, np.ones(5, bool), detected)
    counts = np.arange(1, 2000)[:, None]
    chance = stats.nbinom.pmf(counts, theta, theta / (theta + mean[0]))
    logs = np.log1p(counts / total * 1e4)
    wanted = (chance * logs).sum(axis=0) / chance.sum(axis=0)
    np.testing.assert_allclose(found[0], wanted, atol=0.02)
    of_mean = np.log1p(detected / total * 1e4)
    assert (found < of_mean + 1e-6).all()
