"""Cell types: learnt from simulated cells, predicted for others, saved, loaded, and every refusal."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import anndata as ad
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import log_softmax

from cellplm_jax.config import ModelConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import InputError
from cellplm_jax.presets import preset
from cellplm_jax.tasks import estimator as estimator_module
from cellplm_jax.tasks.annotate import CellTypeAnnotator
from cellplm_jax.tasks.annotation_pool import choose_pool, clearly_better, fit_temperature
from tests.conftest import ROOT, make_adata, make_labelled

FAST = {"epochs": 12, "warmup_epochs": 2, "learning_rate": 1e-2, "quiet": True}
LABELS = ["alpha", "beta", "gamma"]


def annotator(model, **options):
    return CellTypeAnnotator(model, **{**FAST, **options})


def probabilities(fitted, adata, **options):
    return fitted.predict(adata.copy(), **options).obsm["cellplm_probabilities"]


def split_cells():
    """150 cells in two batches: 30 for testing, and 7 of the others without a label."""
    adata = make_labelled(150)
    adata.obs["part"] = np.where(np.arange(150) % 5 == 0, "test", "train")
    adata.obs.loc[adata.obs_names[1:14:2], "kind"] = None
    adata.obs.loc[adata.obs["part"] == "test", "kind"] = make_labelled(150).obs["kind"]
    return adata


KEYS = {"label_key": "kind", "batch_key": "batch", "split_key": "part"}


@pytest.fixture(scope="session")
def fitted(tiny_model):
    """An annotator of the training cells; read only."""
    return annotator(tiny_model).fit(split_cells(), **KEYS)


@pytest.fixture(scope="session")
def neighbors(tiny_model):
    pytest.importorskip("sklearn", reason="needs the extra 'eval'")
    found = annotator(tiny_model, method="neighbors", neighbors=5)
    return found.fit(make_labelled(120), label_key="kind")


# What it finds


def test_writes_labels_confidence_and_probabilities(fitted):
    adata = make_labelled(50, seed=3)
    assert fitted.predict(adata) is adata
    names = adata.obs["cellplm_cell_type"]
    assert fitted.labels == LABELS
    assert set(names.cat.categories) - {"unknown"} == set(LABELS)
    matrix = adata.obsm["cellplm_probabilities"]
    assert (matrix.shape, matrix.dtype) == ((50, 3), np.float32)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(adata.obs["cellplm_confidence"], matrix.max(axis=1))
    best = [LABELS[i] for i in matrix.argmax(axis=1)]
    unknown = adata.obs["cellplm_unknown_score"] > 0
    assert names.tolist() == ["unknown" if u else b for u, b in zip(unknown, best, strict=True)]
    assert unknown.mean() <= 0.1
    np.testing.assert_array_equal(adata.obs["cellplm_unknown_reason"] != "", unknown)
    facts = adata.uns["cellplm_annotation"]
    assert facts["labels"] == LABELS
    assert facts["input"]["genes"]["genes_matched"] == 40
    assert facts["temperature"] == fitted.temperature != 1.0


def test_better_than_chance_on_cells_it_never_saw(fitted, neighbors):
    for found in (fitted, neighbors):
        scores = found.score(make_labelled(80, seed=5))
        assert scores["macro_f1"] > 0.85  # chance: a third
        assert scores["accuracy"] > 0.85
        assert scores["calibration_error"] < 0.3
        assert scores["brier"] < 0.4
        assert scores["cells"] == 80


def test_the_fit_is_told(fitted):
    left_out = 150 - int(split_cells().obs["kind"].notna().sum())
    assert any(
        message.startswith(f"{left_out} of 150 cells have no label") for message in fitted.messages
    )
    assert any("Gene names from" in message for message in fitted.messages)
    facts = fitted.facts
    assert facts["training_cells"] + facts["validation_cells"] == 120 - left_out
    assert facts["validation_cells"] == pytest.approx(12, abs=2)
    assert len(fitted.history) == facts["epochs"]
    assert {"loss", "accuracy", "validation_score", "validation_loss"} <= set(fitted.history[0])
    assert facts["validation_f1"] == max(row["validation_score"] for row in fitted.history)


def test_all_parts_and_a_baseline_are_shown(fitted):
    """The last line of a fit names the prediction that is used first, beside its parts and label transfer."""
    facts, scores = fitted.facts, fitted.validation_scores
    assert facts["pool"] in ("pooled", "network", "linear")
    assert next(iter(scores)) == facts["pool"]
    assert set(scores) == {facts["pool"], "network", "linear", "neighbors"}
    assert scores[facts["pool"]] == facts["validation_f1_pooled"]
    assert facts["seconds"] >= facts["network_seconds"] > 0
    found = fitted.score(make_labelled(60, seed=5))
    assert {"macro_f1", "network_macro_f1", "linear_macro_f1", "neighbors_macro_f1"} <= set(found)


def test_a_new_type_is_unknown(fitted):
    """Cells of a type that was not fitted are found in a file with known ones; scores of known cells stay."""
    known, new = make_labelled(60, seed=4), make_labelled(30, seed=5)
    new.X = new.X[:, np.random.default_rng(0).permutation(new.n_vars)]
    new.obs["kind"] = "delta"
    both = ad.concat([known, new], index_unique="-")
    assert fitted.unknown_rate == 0.05
    predicted = fitted.predict(both.copy())
    unknown = (predicted.obs["cellplm_cell_type"] == "unknown").to_numpy()
    assert unknown[60:].mean() > 0.5
    assert unknown[:60].mean() < 0.25  # forty genes, and a third of the file is unknown
    scores = fitted.score(both, unseen_labels="wrong")
    assert scores["unknown_auroc"] > 0.9
    assert scores["unknown_fraction"] == pytest.approx(unknown.mean())
    ignoring = fitted.score(both, unseen_labels="ignore")
    assert ignoring["cells"] == 60
    fitted.unknown_rate = None
    try:
        off = fitted.predict(both.copy())
        assert "cellplm_unknown_score" not in off.obs
        assert set(off.obs["cellplm_cell_type"]) <= set(LABELS)
        np.testing.assert_array_equal(
            off.obsm["cellplm_probabilities"], predicted.obsm["cellplm_probabilities"]
        )
    finally:
        fitted.unknown_rate = 0.05


def test_an_annotator_of_an_older_version_predicts_the_same(tmp_path):
    """Saved before unknown types were detected: no detection, and the same probabilities."""
    folder = ROOT / "tests" / "fixtures" / "annotator_0_1"
    old = CellTypeAnnotator.load(folder, quiet=True)
    assert (old.unknown_rate, old.unknown_threshold) == (None, 0.4)
    adata = old.predict(make_labelled(10, seed=6))
    wanted = np.load(folder.with_suffix(".npy"))
    np.testing.assert_allclose(adata.obsm["cellplm_probabilities"], wanted, atol=1e-5)
    assert "cellplm_unknown_score" not in adata.obs
    old.save(tmp_path / "again")
    again = CellTypeAnnotator.load(tmp_path / "again", quiet=True)
    np.testing.assert_array_equal(
        probabilities(again, make_labelled(10, seed=6)), adata.obsm["cellplm_probabilities"]
    )


def test_history_is_drawn(fitted):
    pytest.importorskip("matplotlib", reason="needs the extra 'eval'").use("Agg")
    axes = fitted.plot_history()
    assert [line.get_label() for line in axes.get_lines()][-1].startswith("kept: epoch")
    assert axes.get_xlabel() == "epoch"
    other = fitted.plot_history(key="score", ax=axes)
    assert other is axes
    with pytest.raises(InputError, match="without 'nothing'; expected one of accuracy"):
        fitted.plot_history(key="nothing")


def test_cells_to_be_predicted_see_one_another_alone(tiny_model, fitted):
    """The prediction for test cells is the same alone and in the file they were held out from."""
    adata = split_cells()
    test = (adata.obs["part"] == "test").to_numpy()
    whole = probabilities(fitted, adata)[test]
    alone = adata[test].copy()
    np.testing.assert_allclose(whole, probabilities(fitted, alone), atol=1e-5)
    del alone.obs["part"]
    np.testing.assert_allclose(whole, probabilities(fitted, alone), atol=1e-5)
    # Other training cells change nothing for the test cells.
    changed = adata.copy()
    matrix = changed.X.toarray()
    matrix[~test] = 1 + matrix[~test][::-1]
    changed.X = matrix
    np.testing.assert_allclose(probabilities(fitted, changed)[test], whole, atol=1e-5)
    assert fitted.score(adata, split="test")["cells"] == 30
    # Test cells change nothing for the fit, and the same seed gives the same numbers.
    again = annotator(tiny_model).fit(adata[~test].copy(), **KEYS)
    np.testing.assert_allclose(probabilities(again, alone), whole, atol=1e-5)


def test_a_batch_without_training_cells(tiny_model, fitted):
    """Inductive, that is what one predicts; where whole batches are the training contexts, it is refused."""
    adata = make_labelled(20, seed=7)
    adata.obs["batch"] = "new"
    assert fitted.score(adata)["accuracy"] > 0.7
    adata = split_cells()
    adata.obs["batch"] = np.where(adata.obs["part"] == "test", "new", "old")
    with pytest.raises(InputError, match=r"batch 'new' has no labelled training cells; expected"):
        annotator(tiny_model).fit(adata, transductive=True, **KEYS)


def test_transductive_on_request(tiny_model):
    adata = split_cells()
    found = annotator(tiny_model, epochs=1).fit(adata, transductive=True, **KEYS)
    assert found.reading.split_key is None
    test = (adata.obs["part"] == "test").to_numpy()
    whole = probabilities(found, adata)[test]
    assert np.abs(whole - probabilities(found, adata[test].copy())).max() > 1e-5


def test_unknown_below_the_threshold(fitted):
    adata = make_labelled(60, seed=4)
    confidence = fitted.predict(adata.copy()).obs["cellplm_confidence"]
    fitted.unknown_threshold, fitted.unknown_rate = float(np.median(confidence)), None
    try:
        names = fitted.predict(adata).obs["cellplm_cell_type"]
        np.testing.assert_array_equal(names == "unknown", confidence < np.median(confidence))
        assert list(names.cat.categories) == [*LABELS, "unknown"]
        assert fitted.score(adata)["unknown_fraction"] == pytest.approx(0.5, abs=0.05)
    finally:
        fitted.unknown_threshold, fitted.unknown_rate = None, 0.05


def test_adapters_leave_all_but_the_encoder_and_the_new_parts_alone(tiny_model, monkeypatch):
    monkeypatch.setattr("cellplm_jax.tasks.annotate_fit.clearly_better", lambda *_: True)
    old = flatten_dict(tiny_model.params)
    before = jax.tree.map(np.copy, tiny_model.params)
    found = annotator(tiny_model, epochs=1, adapter_rank=2).fit(split_cells(), **KEYS)
    moved = {
        path
        for path, leaf in flatten_dict(found.model.params).items()
        if path in old and not np.array_equal(leaf, old[path])
    }
    assert moved
    assert {(path[0], path[-1]) for path in moved} == {("encoder", "kernel")}
    assert found.facts["trained_parameters"] < found.facts["parameters"]
    jax.tree.map(np.testing.assert_array_equal, before, tiny_model.params)


def test_class_weights(tiny_model):
    found = annotator(tiny_model, class_weights="balanced")
    found.labels = LABELS
    weights = found._weights(np.array([0, 0, 0, 1, 2, 2], np.int32))
    np.testing.assert_allclose(weights, [6 / 9, 2.0, 1.0])
    found.class_weights = {"beta": 3.0}
    np.testing.assert_array_equal(found._weights(np.array([0, 1, 2])), [1.0, 3.0, 1.0])
    found.class_weights = {"delta": 1.0}
    with pytest.raises(InputError, match=r"class_weights with an unknown label .'delta'"):
        found._weights(np.array([0, 1, 2]))


def test_temperature():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 3)) * 2
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) > random.random((4000, 1))).argmax(axis=1)
    assert fit_temperature(logits, labels) == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(4 * logits, labels) == pytest.approx(4.0, abs=0.4)


def test_from_scratch_over_the_genes_of_the_data(monkeypatch, tmp_path):
    small = dataclasses.replace(preset("scratch"), model=preset("debug").model)
    monkeypatch.setattr(estimator_module, "preset", lambda name: small)
    adata = make_labelled(90, spatial=True)
    found = annotator(None, genes=30, epochs=1).fit(adata, label_key="kind")
    assert len(found.model.genes) == 30
    assert any("Fitted on 30 highly variable genes of 43" in m for m in found.messages)
    config: ModelConfig = found.model.config
    assert (config.hidden, config.latent.kind, config.head.kind) == (
        32,
        "deterministic",
        "annotation",
    )
    found.save(tmp_path / "scratch")
    new = make_labelled(20, seed=8, spatial=True)
    loaded = CellTypeAnnotator.load(tmp_path / "scratch", quiet=True)
    np.testing.assert_array_equal(probabilities(loaded, new), probabilities(found, new))


# Saved, and opened elsewhere


def test_a_new_process_predicts_the_same(fitted, neighbors, tmp_path):
    make_labelled(30, seed=6).write_h5ad(tmp_path / "cells.h5ad")
    for name, found in (("fitted", fitted), ("neighbors", neighbors)):
        found.save(tmp_path / name)
    code = (
        "import cellplm_jax, anndata\n"
        "for name in ('fitted', 'neighbors'):\n"
        "    found = cellplm_jax.CellTypeAnnotator.load(name, quiet=True)\n"
        "    found.predict(anndata.read_h5ad('cells.h5ad')).write_h5ad(name + '.h5ad')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    for name, found in (("fitted", fitted), ("neighbors", neighbors)):
        written = ad.read_h5ad(tmp_path / f"{name}.h5ad")
        wanted = probabilities(found, make_labelled(30, seed=6))
        np.testing.assert_array_equal(written.obsm["cellplm_probabilities"], wanted)
        assert list(written.uns["cellplm_annotation"]["labels"]) == found.labels


def test_a_file_is_predicted_into_a_copy(fitted, tmp_path):
    adata = make_labelled(30, seed=6)
    adata.obs["cellplm_confidence"] = "old"
    adata.write_h5ad(tmp_path / "in.h5ad")
    messages = fitted.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad")
    assert any("Gene names from" in message for message in messages)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    wanted = fitted.predict(make_labelled(30, seed=6))
    np.testing.assert_array_equal(
        written.obsm["cellplm_probabilities"], wanted.obsm["cellplm_probabilities"]
    )
    for column in ("cellplm_cell_type", "cellplm_confidence"):
        assert written.obs[column].tolist() == wanted.obs[column].tolist()
    assert list(written.obs.columns) == [
        "batch", "kind", "cellplm_confidence", "cellplm_cell_type", "cellplm_unknown_score",
        "cellplm_unknown_reason",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]
    with pytest.raises(InputError, match="input and output are both"):
        fitted.predict_file(tmp_path / "in.h5ad", tmp_path / "in.h5ad")


# What is refused


def spoiled(change):
    adata = make_labelled(40)
    adata.obs["part"] = np.where(np.arange(40) < 30, "train", "test")
    change(adata)
    return adata


def one_label(adata):
    adata.obs["kind"] = "alpha"


def no_label(adata):
    adata.obs["kind"] = np.nan


def label_in_test_only(adata):
    adata.obs["kind"] = np.where(np.arange(40) < 35, adata.obs["kind"], "delta")


def other_genes(adata):
    adata.var_names = [f"other-{n}" for n in range(adata.n_vars)]


def nothing(adata):
    pass


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (nothing, {"label_key": "type"}, r"obs has no column 'type'; expected one of .*'kind'"),
        (nothing, {"batch_key": "lane"}, r"has no column 'lane'"),
        (nothing, {"split_key": "fold"}, r"obs has no column 'fold'"),
        (nothing, {"layer": "counts"}, r"has no layer 'counts'"),
        (nothing, {"spatial_key": "where"}, r"has no 'where'"),
        (one_label, {}, r"training cells all have the label 'alpha'.*two cell types"),
        (no_label, {}, r"obs\['kind'\] is missing for all 40 cells"),
        (label_in_test_only, {"split_key": "part"},
         r"5 cells are labelled 'delta' in obs\['kind'\], and no training cell is"),
        (other_genes, {}, r"0 of the model's 40 genes are among"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted(tiny_model, change, keys, message):
    with pytest.raises(InputError, match=message) as error:
        annotator(tiny_model).fit(spoiled(change), **{"label_key": "kind", **keys})
    assert "; expected " in str(error.value)


def test_unseen_labels_may_be_left_out(neighbors, tiny_model):
    adata = spoiled(label_in_test_only)
    found = annotator(tiny_model, method="neighbors")
    found.fit(adata, label_key="kind", split_key="part", unseen_labels="ignore")
    assert "5 cells with labels outside the training cells were omitted: 'delta'." in found.messages
    with pytest.raises(InputError, match="are not among the training labels"):
        found.score(adata)
    assert found.score(adata, unseen_labels="ignore")["cells"] == 35
    scores = found.score(adata, unseen_labels="wrong")
    assert scores["cells"] == 40
    with pytest.raises(InputError, match="no cell to score"):
        found.score(adata[35:].copy(), unseen_labels="ignore")
    with pytest.raises(InputError, match="without a split column"):
        neighbors.score(adata, split="test")


def test_options_that_are_refused(tiny_model):
    for options, message in (
        ({"method": "guess"}, "method='guess'"),
        ({"unknown_threshold": 1.5}, "unknown_threshold=1.5"),
        ({"unknown_rate": 1.0}, "unknown_rate=1.0"),
        ({"neighbors": 0}, "neighbors=0"),
    ):
        with pytest.raises(InputError, match=message):
            CellTypeAnnotator(tiny_model, **options)
    with pytest.raises(InputError, match="method='neighbors' with model=None"):
        annotator(None, method="neighbors").fit(make_labelled(20), label_key="kind")
    with pytest.raises(InputError, match="this CellTypeAnnotator has not been fitted"):
        annotator(tiny_model).predict(make_adata(10))


# The logistic regression beside the network


def test_network_and_logistic_regression_are_pooled(fitted):
    """Pooled by hand from the two: log-probabilities, added with the weights that were found, and normalised."""
    adata = make_labelled(30, seed=6)
    assert fitted.pool == pytest.approx([0.5, 0.5], abs=0.6)
    assert min(fitted.pool) >= 0
    assert any("logistic regression" in m for m in fitted.messages)
    z, _, _ = fitted._embed(adata, fitted.reading)
    with open_counts(adata, fitted.model.genes) as source:
        features = np.log1p(source.read(0, 30).toarray())[:, fitted._linear_genes]
    logits = fitted._head(z)
    if fitted._gene_head is not None:
        logits = logits + features @ fitted._gene_head
    network = jax.nn.log_softmax(logits / fitted.temperature, axis=1)
    linear = jax.nn.log_softmax(features @ fitted._linear.kernel + fitted._linear.bias, axis=1)
    mixed = fitted.pool[0] * np.asarray(network) + fitted.pool[1] * np.asarray(linear)
    np.testing.assert_allclose(
        probabilities(fitted, adata), jax.nn.softmax(mixed, axis=1), atol=1e-5
    )


def test_the_network_alone_on_request(tiny_model):
    found = annotator(tiny_model, epochs=1, linear=False).fit(split_cells(), **KEYS)
    assert found.pool == []
    assert found._linear is None
    adata = make_labelled(20, seed=6)
    z, _, _ = found._embed(adata, found.reading)
    wanted = jax.nn.softmax(found._head(z) / found.temperature, axis=1)
    np.testing.assert_allclose(probabilities(found, adata), wanted, atol=1e-6)


def test_the_head_starts_at_the_exact_regression_and_tuning_has_to_help(tiny_model):
    found = annotator(tiny_model, linear=False, epochs=2, learning_rate=1e-6)
    found.fit(split_cells(), **KEYS)
    # Two steps that move nothing: the start is as good as what follows.
    assert found.facts["validation_f1"] >= found.facts["validation_f1_start"] > 0.5
    wild = annotator(tiny_model, linear=False, epochs=2, learning_rate=10.0, warmup_epochs=0)
    wild.fit(split_cells(), **KEYS)
    assert wild.facts["validation_f1"] >= wild.facts["validation_f1_start"]
    assert np.isfinite(probabilities(wild, split_cells())).all()


def test_the_network_keeps_what_one_gene_decides(tiny_model):
    """The term of the genes in the head: a latent of six dimensions does not contain each gene."""
    adata = make_labelled(240, seed=3)
    counts = adata.X.toarray()
    column = int(np.argmin(np.abs(np.mean(counts > np.median(counts), axis=0) - 0.5)))
    adata.obs["one gene"] = np.where(counts[:, column] > np.median(counts), "high", "low")
    options = {"epochs": 1, "learning_rate": 1e-6, "unknown_rate": None}
    scores = {}
    for linear in (True, False):
        found = annotator(tiny_model, linear=linear, **options)
        found.fit(adata[:160].copy(), label_key="one gene")
        scores[linear] = found.score(adata[160:].copy())
    assert scores[True]["network_macro_f1"] > 0.95
    assert scores[True]["network_macro_f1"] > scores[False]["macro_f1"] + 0.05


def test_what_is_kept_on_validation_cells():
    labels = np.arange(200) % 2
    sharp = np.where(np.eye(2)[labels] > 0, 3.0, 0.0)
    noise = np.random.default_rng(0).normal(0, 2, (200, 2))
    assert clearly_better(sharp, sharp + noise, labels)
    assert not clearly_better(sharp + noise, sharp, labels)
    assert not clearly_better(sharp, sharp, labels)
    # A scale alone is no difference: both are calibrated.
    assert not clearly_better(sharp + noise, 5.0 * (sharp + noise), labels)
    network, linear = (log_softmax(x, axis=1) for x in (sharp + noise, sharp))
    assert choose_pool(linear, network, labels, average=False) == ([1.0, 0.0], "network")
    weights, name = choose_pool(network, linear, labels, average=False)
    assert name == "linear"
    assert weights[0] == 0.0 < weights[1]
    assert choose_pool(None, None, labels, average=False) == ([1.0, 0.0], "network")
