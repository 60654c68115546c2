"""Imputation: genes a panel lacks, learnt from a reference, written, saved, loaded, and every refusal."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_jax.config import PositionsConfig
from cellplm_jax.errors import InputError
from cellplm_jax.presets import preset
from cellplm_jax.tasks import estimator as estimator_module
from cellplm_jax.tasks.impute import GeneImputer
from cellplm_jax.tasks.impute_genes import find_genes
from cellplm_jax.tasks.impute_network import panel_model, with_mean_row
from cellplm_jax.tasks.impute_ridge import around, choose_pool, choose_stretch, mean_pearson
from tests.conftest import ROOT, VOCABULARY, make_adata

FAST = {"epochs": 30, "warmup_epochs": 1, "learning_rate": 1e-2, "quiet": True}
PANEL, MISSING = VOCABULARY[:20], VOCABULARY[20:]


def imputer(model, **options):
    return GeneImputer(model, **{**FAST, **options})


def panel_of(adata):
    return adata[:, [*PANEL, "foreign-1"]].copy()


@pytest.fixture(scope="session")
def fitted(tiny_model):
    """An imputer of 60 cells over half of the genes, with a reference of 60 (one shape to compile); read only."""
    reference = make_adata(60, spatial=False)
    target = panel_of(make_adata(60, seed=1))
    return imputer(tiny_model).fit(
        target, reference=reference, batch_key="batch", reference_batch_key="batch"
    )


# What it finds


def test_a_table_of_the_missing_genes(fitted):
    adata = panel_of(make_adata(60, seed=1))
    frame = fitted.predict(adata)
    assert frame.shape == (60, 20)
    assert (list(frame.index), list(frame.columns)) == (list(adata.obs_names), MISSING)
    assert frame.to_numpy().dtype == np.float32
    assert (frame.to_numpy() >= 0).all()
    some = fitted.predict(adata, genes=MISSING[5:2:-1])
    pd.testing.assert_frame_equal(some, frame[MISSING[5:2:-1]])
    assert "cellplm_imputation" not in adata.uns


def test_network_and_ridge_regression_are_pooled(fitted):
    """Both scales by hand: the gene's mean, and the weighted deviations of network and ridge regression from theirs."""
    adata = panel_of(make_adata(60, seed=1))
    total = np.asarray(adata[:, PANEL].X.sum(axis=1)).ravel()
    assert any("ridge regression" in message for message in fitted.messages)
    ridges, fitted._ridges = fitted._ridges, {}
    try:
        alone = fitted.predict(adata).to_numpy()
        log = fitted.predict(adata, log_normalized=True).to_numpy()
    finally:
        fitted._ridges = ridges
    # The network alone: one prediction, on two scales.
    np.testing.assert_allclose(log, np.log1p(alone / total[:, None] * 1e4), rtol=1e-4)
    for scale, network in (("log_normalized", log), ("counts", alone / total[:, None] * 1e4)):
        ridge, pool = ridges[scale], fitted.pool[scale]
        genes = [fitted.model.genes[i] for i in ridge.genes]
        features = np.log1p(adata[:, genes].X.toarray() / total[:, None] * 1e4)
        linear = ridge.regression.predict(features)
        mean = ridge.regression.bias
        mixed = mean + pool[0] * (network - ridge.network_mean) + pool[1] * (linear - mean)
        found = fitted.predict(adata, log_normalized=scale == "log_normalized").to_numpy()
        if scale == "counts":
            found = found / total[:, None] * 1e4
        np.testing.assert_allclose(found, np.maximum(mixed, 0), rtol=1e-3, atol=1e-3)


def test_better_than_the_mean_of_the_gene(fitted):
    truth = make_adata(60, seed=1)
    scores = fitted.score(panel_of(truth), truth=truth)
    assert scores["genes"] == 20
    table = fitted.score_genes(panel_of(truth), truth=truth)
    assert scores["pearson"] == pytest.approx(table["pearson"].mean())
    assert scores["pearson"] > 0.3  # the mean of a gene: not defined, or 0
    error = fitted.predict(truth) - truth[:, MISSING].X.toarray()
    of_mean = truth[:, MISSING].X.toarray() - truth[:, MISSING].X.toarray().mean(axis=0)
    assert np.square(error).mean(axis=None) < np.square(of_mean).mean()
    # What is measured of the missing genes is not looked at.
    assert fitted.score(truth) == scores


def test_confidence_says_how_well_a_gene_follows_from_the_panel(fitted):
    confidence = fitted.confidence
    assert list(confidence.index) == fitted.imputed == MISSING
    defined = confidence.dropna()  # a gene that is 0 in all six validation cells has none
    assert defined.between(-1, 1).all()
    assert len(defined) > 10
    assert fitted.facts["mean_confidence"] == pytest.approx(defined.mean())
    assert defined.mean() > 0.2
    table = fitted.score_genes(make_adata(60, seed=1))
    np.testing.assert_array_equal(table["confidence"], confidence)


def test_the_fit_is_told(fitted):
    facts = fitted.facts
    assert (facts["shared_genes"], facts["imputed_genes"]) == (20, 20)
    assert facts["training_cells"] + facts["validation_cells"] == 120
    assert fitted.panel == PANEL
    assert any(message.startswith("Reference: Gene names") for message in fitted.messages)
    assert set(fitted.batch_rows) == {
        "b0", "b1", "reference: b0", "reference: b1", "mean of the reference",
    }  # fmt: skip
    losses = [row["validation_loss"] for row in fitted.history]
    assert facts["validation_loss"] == min(losses) < losses[0]


def test_missing_genes_are_decoded_as_in_the_reference(fitted):
    adata = panel_of(make_adata(20, seed=2))
    frame = fitted.predict(adata)
    table = fitted.model.params["decoder"]["batch_0"]["table"]
    rows = fitted.batch_rows
    of_reference = [rows["reference: b0"], rows["reference: b1"]]
    np.testing.assert_allclose(
        table[rows["mean of the reference"]], table[of_reference].mean(axis=0), atol=1e-6
    )
    # So the name of a batch decides which cells see one another, and nothing else.
    adata.obs["batch"] = np.where(adata.obs["batch"] == "b0", "new", "newer")
    pd.testing.assert_frame_equal(fitted.predict(adata), frame)


def test_a_layer_where_var_has_the_genes(fitted):
    adata = make_adata(20, seed=2)
    frame = fitted.predict(adata, layer_added="imputed")
    layer = pd.DataFrame(adata.layers["imputed"], adata.obs_names, adata.var_names)
    np.testing.assert_array_equal(layer[MISSING], frame)
    assert layer[PANEL].isna().all(axis=None)
    assert adata.uns["cellplm_imputation"]["genes"] == MISSING
    with pytest.raises(InputError, match=r"no gene of var .* is imputed"):
        fitted.predict(panel_of(adata), layer_added="imputed")


def test_the_seed_decides_everything(tiny_model, fitted):
    again = imputer(tiny_model).fit(
        panel_of(make_adata(60, seed=1)), reference=make_adata(60, spatial=False),
        batch_key="batch", reference_batch_key="batch",
    )  # fmt: skip
    adata = panel_of(make_adata(20, seed=2))
    pd.testing.assert_frame_equal(again.predict(adata), fitted.predict(adata))


def test_batches_with_more_genes_serve_as_the_reference(tiny_model):
    adata = make_adata(60, spatial=False)
    counts = adata.X.toarray()
    lacking = np.array([name in MISSING[:12] for name in adata.var_names])
    counts[np.ix_(adata.obs["batch"] == "b1", lacking)] = 0
    adata.X = sparse.csr_matrix(counts)
    found = imputer(tiny_model, epochs=1).fit(adata, batch_key="batch")
    assert found.imputed == MISSING[:12]
    assert (
        "No reference: 1 batches with all genes are the reference for 1 with fewer."
        in found.messages
    )
    assert found.facts["reference_cells"] == 30
    target = adata[adata.obs["batch"] == "b1"].copy()
    assert found.predict(target).shape == (30, 12)


def spatial_sections():
    """Two sections whose missing genes follow the place of a cell, and whose panel says nothing of it."""
    random = np.random.default_rng(0)
    sections = []
    for cells in (192, 96):
        place = random.random((cells, 2))
        rate = np.full((cells, 40), 2.0)
        slope = np.where(np.arange(20) % 2, 3.0, -3.0)
        rate[:, 20:] *= np.exp(slope * (place[:, :1] - 0.5))
        section = ad.AnnData(
            sparse.csr_matrix(random.poisson(rate).astype(np.float32)),
            var=pd.DataFrame(index=VOCABULARY),
        )
        section.obsm["spatial"] = place * 1000
        sections.append(section)
    return sections


def test_places_help_where_the_signal_is_spatial(monkeypatch):
    reference, truth = spatial_sections()
    pearson = {}
    for kind in ("sinusoidal", "none"):
        positions = PositionsConfig(kind=kind)
        model = dataclasses.replace(preset("debug").model, positions=positions, dropout=0.0)
        latent = dataclasses.replace(model.latent, latent_weight=0.005, cluster_weight=0.005)
        model = dataclasses.replace(model, latent=latent)
        small = dataclasses.replace(preset("scratch"), model=model)
        monkeypatch.setattr(estimator_module, "preset", lambda name, small=small: small)
        found = imputer(None, epochs=16, cells_per_context=96, cells_per_step=96)
        found.fit(truth[:, PANEL].copy(), reference=reference)
        pearson[kind] = found.score(truth)["pearson"]
    # Without places there may be nothing to go by: the same is then predicted for every cell, which has no correlation.
    assert pearson["sinusoidal"] > np.nan_to_num(pearson["none"]) + 0.2


# What is chosen, and how certain it is


@pytest.fixture(scope="session")
def wide(tiny_model):
    """An imputer with enough validation cells for intervals; names of genes as symbols, ids in a column of var."""
    reference = make_adata(360, spatial=False)
    reference.var["ensembl_id"] = list(reference.var_names)
    reference.var_names = [f"own-{name[-4:]}" for name in reference.var_names]
    target = panel_of(make_adata(240, seed=1))
    return imputer(tiny_model, epochs=8, validation_fraction=0.25).fit(
        target, reference=reference, reference_gene_key="ensembl_id"
    )


def test_tables_have_the_names_of_the_file(wide):
    assert wide.imputed == [f"own-{name[-4:]}" for name in MISSING]
    assert wide.gene_ids.tolist() == MISSING
    frame = wide.predict(panel_of(make_adata(20, seed=3)), genes=[MISSING[3], "own-0021"])
    assert list(frame.columns) == ["own-0023", "own-0021"]
    truth = make_adata(20, seed=3)
    assert wide.score_genes(truth)["gene_id"].tolist() == MISSING


def test_intervals_hold_their_coverage(wide):
    truth = make_adata(240, seed=1)
    for cells in (truth, make_adata(240, seed=5)):
        scores = wide.score(cells)
        assert 0.87 <= scores["interval_coverage"] <= 0.93
    total = truth[:, PANEL].X.sum(axis=1)
    widths = []
    # Narrow intervals of rare genes cover more: most of their counts are 0.
    for level, tolerance in ((0.5, 0.12), (0.9, 0.04)):
        low, high = wide.intervals(truth, coverage=level)
        assert (low.to_numpy() >= 0).all()
        counts = truth[:, MISSING].X.toarray()
        inside = (counts >= low.to_numpy() - 1e-5) & (counts <= high.to_numpy() + 1e-5)
        assert inside.mean() == pytest.approx(level, abs=tolerance)
        widths.append((high - low).to_numpy().mean())
    assert widths[0] < 0.7 * widths[1]
    # On the other scale they are the same intervals.
    logs = wide.intervals(truth, log_normalized=True)[1].to_numpy()
    np.testing.assert_allclose(np.expm1(logs) * np.asarray(total) / 1e4, high, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match=r"coverage = 0.99; expected one of 0.5, "):
        wide.intervals(truth, coverage=0.99)


def test_intervals_are_saved_and_written(wide, fitted, tmp_path):
    wide.save(tmp_path / "saved")
    again = GeneImputer.load(tmp_path / "saved", quiet=True)
    cells = panel_of(make_adata(30, seed=6))
    for one, other in zip(wide.intervals(cells), again.intervals(cells), strict=True):
        pd.testing.assert_frame_equal(one, other)
    pd.testing.assert_series_equal(again.gene_ids, wide.gene_ids)
    cells.write_h5ad(tmp_path / "in.h5ad")
    again.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", coverage=0.8)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    low, high = wide.intervals(cells, coverage=0.8)
    np.testing.assert_allclose(written.obsm["cellplm_imputed_low"], low, rtol=1e-5)
    np.testing.assert_allclose(written.obsm["cellplm_imputed_high"], high, rtol=1e-5)
    assert list(written.uns["cellplm_imputation"]["gene_ids"]) == MISSING
    with pytest.raises(InputError, match="this imputer has no intervals"):
        fitted.intervals(cells)


def test_parts_are_scored_beside_their_average(wide):
    scores = wide.score(make_adata(120, seed=4))
    better = max(scores["pearson_network"], scores["pearson_ridge"])
    assert scores["pearson"] > better - 0.002
    assert scores["rmse"] < scores["rmse_gene_mean"]
    table = wide.facts["validation"]
    assert set(table) == {"pooled", "network", "ridge", "gene_mean"}
    assert wide.facts["genes_with_confidence"] == wide.confidence.notna().sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("network", "linear"), [(0.4, 1.2), (1.2, 0.4), (0.7, 0.7), (0.5, 20.0)])
def test_never_below_the_better_part(network, linear, seed):
    """Parts are the truth with noise of these sizes, on cells for the choice and on others for the score."""
    random = np.random.default_rng(seed)
    truth = random.gamma(2.0, size=(400, 30))
    parts = [truth + size * random.normal(size=truth.shape) for size in (network, linear)]
    chosen, rest = slice(0, 60), slice(60, None)
    pool, method = choose_pool(truth[chosen], *(part[chosen] for part in parts), seed=seed)
    mixed = sum(weight * part for weight, part in zip(pool, parts, strict=True))
    better = max(mean_pearson(truth[rest], part[rest]) for part in parts)
    assert mean_pearson(truth[rest], mixed[rest]) > better - 0.002
    if network == linear:
        assert method == "pooled"
        assert mean_pearson(truth[rest], mixed[rest]) > better + 0.03


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
def test_the_target_decides_how_far_predictions_deviate_from_the_mean(factor):
    random = np.random.default_rng(0)
    groups = []
    for genes in (8, 5):
        mean, deviation = random.uniform(0, 2, genes), random.standard_normal((200, genes))
        # Another mean in the target is not compared.
        truth = around(mean, factor * deviation) + 0.3 + 0.1 * random.standard_normal((200, genes))
        groups.append((truth, mean, deviation))
    assert choose_stretch(groups) == pytest.approx(factor, abs=0.05)
    assert choose_stretch([(truth, mean, 0 * deviation) for truth, mean, deviation in groups]) == 1


def test_a_useless_network_is_left_out():
    """Noise that agrees with the truth in a few cells only does not survive cross-validation."""
    random = np.random.default_rng(0)
    truth = random.gamma(2.0, size=(40, 10))
    linear = truth + 0.1 * random.normal(size=truth.shape)
    dropped = 0
    for seed in range(10):
        pool, method = choose_pool(
            truth, np.random.default_rng(seed).normal(size=truth.shape), linear, seed=seed
        )
        dropped += method == "ridge"
        assert pool[0] < 0.02
    assert dropped >= 5
    assert choose_pool(truth, linear, np.zeros_like(truth))[1] == "network"


# Saved, and opened elsewhere


def test_a_new_process_predicts_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    panel_of(make_adata(30, seed=6)).write_h5ad(tmp_path / "cells.h5ad")
    wanted = fitted.predict(panel_of(make_adata(30, seed=6)))
    code = (
        "import cellplm_jax\n"
        "found = cellplm_jax.GeneImputer.load('saved', quiet=True)\n"
        "found.predict('cells.h5ad').to_pickle('out.pkl')\n"
        "found.confidence.to_pickle('confidence.pkl')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "out.pkl"), wanted)
    confidence = pd.read_pickle(tmp_path / "confidence.pkl")
    np.testing.assert_array_equal(confidence, fitted.confidence)


def test_a_file_is_predicted_into_a_copy(fitted, tmp_path):
    panel_of(make_adata(30, seed=6)).write_h5ad(tmp_path / "in.h5ad")
    messages = fitted.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", genes=MISSING[:3])
    assert any("Gene names from" in message for message in messages)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    frame = written.obsm["cellplm_imputed"]
    wanted = fitted.predict(panel_of(make_adata(30, seed=6)), genes=MISSING[:3])
    np.testing.assert_array_equal(frame.to_numpy(), wanted.to_numpy())
    assert list(frame.columns) == MISSING[:3]
    facts = written.uns["cellplm_imputation"]
    np.testing.assert_array_equal(facts["confidence"], fitted.confidence[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_the_panel_alone_embeds_the_same(tiny_model):
    small = panel_model(tiny_model, PANEL)
    assert (small.config.genes, small.genes) == (20, PANEL)
    table = tiny_model.params["embedder"]["gene_embedding"]
    np.testing.assert_array_equal(small.params["embedder"]["gene_embedding"], table[:20])
    grown = with_mean_row(tiny_model, [0, 2])
    rows = grown.params["decoder"]["batch_0"]["table"]
    np.testing.assert_allclose(rows[-1], (rows[0] + rows[2]) / 2, atol=1e-6)
    assert grown.config.decoder.batches == len(rows)


def test_names_are_found_by_the_rules_for_genes():
    places = find_genes(["ENSG00000000003", "nothing", "ENSG00000000001.4"], VOCABULARY)
    assert places.tolist() == [3, -1, 1]


# What is refused


def all_cells(adata):
    return adata


def no_overlap(adata):
    adata.var_names = [f"other-{n}" if n % 8 else name for n, name in enumerate(adata.var_names)]
    return adata


def empty_batch(adata):
    counts = adata.X.toarray()
    counts[adata.obs["batch"] == "b1"] = 0
    adata.X = counts
    return adata


@pytest.mark.parametrize(
    ("panel", "reference", "keys", "message"),
    [
        (panel_of, all_cells, {"batch_key": "lane"}, "has no column 'lane'"),
        (panel_of, all_cells, {"reference_batch_key": "lane"}, "has no column 'lane'"),
        (panel_of, all_cells, {"layer": "counts"}, "has no layer 'counts'"),
        (panel_of, all_cells, {"spatial_key": "where"}, "has no 'where'"),
        (no_overlap, panel_of, {}, "panel and reference share . genes"),
        (all_cells, all_cells, {}, "there is nothing to impute"),
        (panel_of, None, {}, "no reference was given, and none of the 1 batches"),
        (empty_batch, all_cells, {"batch_key": "batch"}, "'b1' has no training cells"),
        (panel_of, empty_batch, {"reference_batch_key": "batch"}, "b1' has no training cells"),
        (panel_of, all_cells, {"genes": ["ACTB", *MISSING]},
         "1 of 21 requested genes are known to neither data nor model: 'ACTB'"),
        (panel_of, all_cells, {"genes": PANEL[:2]}, "2 of 2 requested genes are measured by the panel"),
        (panel_of, panel_of, {"genes": MISSING[:1]}, "have no counts in the reference's training"),
        (panel_of, all_cells, {"genes": MISSING[0]}, "expected a list of gene names"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted(tiny_model, panel, reference, keys, message):
    target = panel(make_adata(40, seed=1))
    other = None if reference is None else reference(make_adata(40, spatial=False))
    with pytest.raises(InputError, match=message) as error:
        imputer(tiny_model).fit(target, reference=other, **keys)
    assert "; expected " in str(error.value)


def test_what_cannot_be_predicted(tiny_model, fitted):
    with pytest.raises(InputError, match="this GeneImputer has not been fitted"):
        imputer(tiny_model).predict(make_adata(10))
    adata = panel_of(make_adata(10))
    with pytest.raises(InputError, match="2 of 3 requested genes are not imputed: 'x', 'ENSG"):
        fitted.predict(adata, genes=["x", PANEL[0], MISSING[0]])
    with pytest.raises(InputError, match="truth measures none of the 20 imputed genes"):
        fitted.score(adata)
    with pytest.raises(InputError, match="truth has 5 cells and adata 10"):
        fitted.score(adata, truth=make_adata(5))
