"""Labels of tissue samples: simulated ones told apart, by the cells that differ; saved, loaded, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import cellplm_jax
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.samples import SampleClassifier, choose_penalty, logistic_regression
from tests.conftest import ROOT, VOCABULARY

KEYS = {"sample_key": "sample", "label_key": "disease"}


def make_cohort(samples: int = 12, *, cells: int = 30, seed: int = 0) -> ad.AnnData:
    """Samples that differ in one kind of cell: two thirds of a sick one's cells, a sixth of a healthy one's."""
    random = np.random.default_rng(seed)
    programmes = np.random.default_rng(1234).gamma(0.6, 2.0, (3, len(VOCABULARY)))
    labels = np.array(["healthy", "sick"])[np.arange(samples) % 2]
    kinds = []
    for label in labels:
        share = [1 / 6, 1 / 6, 4 / 6] if label == "sick" else [5 / 12, 5 / 12, 1 / 6]
        kinds.append(random.choice(3, cells, p=share))
    kinds = np.concatenate(kinds)
    counts = random.poisson(programmes[kinds] + 0.3).astype(np.float32)
    obs = pd.DataFrame(
        {
            "sample": np.repeat([f"s{n}" for n in range(samples)], cells),
            "disease": np.repeat(labels, cells),
            "kind": kinds,
        },
        index=[f"cell{n}" for n in range(len(kinds))],
    )
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=VOCABULARY))


@pytest.fixture(scope="session")
def fitted(tiny_model):
    """A classifier of twelve samples; read only."""
    return SampleClassifier(tiny_model, quiet=True).fit(make_cohort(), **KEYS)


def test_samples_are_told_apart(fitted):
    scores = fitted.score(make_cohort(10, seed=3))
    assert scores["accuracy"] >= 0.9
    assert scores["macro_f1"] >= 0.9
    assert scores["cross_entropy"] < np.log(2)
    assert (scores["most_frequent_accuracy"], scores["samples"]) == (0.5, 10)
    facts = fitted.facts
    assert facts["left_out_samples_cross_entropy"] < facts["cross_entropy_of_frequencies"]


def test_cross_validation_is_honest(fitted):
    adata = make_cohort()
    assert fitted.score(adata, folds=4)["accuracy"] >= 0.8
    random = make_cohort()
    order = np.random.default_rng(2).permutation(12)
    names = dict(zip([f"s{n}" for n in range(12)], order % 2, strict=True))
    random.obs["disease"] = [["healthy", "sick"][names[s]] for s in random.obs["sample"]]
    assert fitted.score(random, folds=12)["accuracy"] <= 0.75
    with pytest.raises(InputError, match="folds=13 for 12 samples; expected between 2 and 12"):
        fitted.score(adata, folds=13)


def test_which_cells_drive_it(fitted):
    adata = make_cohort(8, seed=4)
    table = fitted.predict(adata)
    assert table.index.tolist() == [f"s{n}" for n in range(8)]
    assert table["cells"].tolist() == [30] * 8
    probabilities = table[["probability_healthy", "probability_sick"]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    np.testing.assert_array_equal(table["confidence"], probabilities.max(axis=1))
    of_cell = table["label"].astype(object)[adata.obs["sample"]].tolist()
    assert adata.obs["cellplm_sample_label"].tolist() == of_cell
    assert adata.obs["cellplm_contribution"].dtype == np.float32
    sick = adata.obs[adata.obs["cellplm_sample_label"] == "sick"]
    by_kind = sick.groupby("kind")["cellplm_contribution"].mean()
    assert by_kind.idxmax() == 2
    assert adata.uns["cellplm_samples"]["labels"] == ["healthy", "sick"]
    # What the cells of a sample contribute is its logit against the average sample.
    kernel, bias = fitted._head_params()
    odds = np.log(probabilities[:, 1] / probabilities[:, 0])
    usual = fitted._centre @ (kernel[:, 1] - kernel[:, 0]) + bias[1] - bias[0]
    signed = adata.obs["cellplm_contribution"].groupby(adata.obs["sample"]).mean()[table.index]
    signed = signed * np.where(table["label"] == "sick", 1.0, -1.0)
    np.testing.assert_allclose(2 * signed + usual, odds, atol=1e-4)


def test_logistic_regression_against_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model", reason="needs the extra 'eval'")
    random = np.random.default_rng(0)
    features, codes = random.normal(size=(60, 5)), np.arange(60) % 3
    features[:, 0] += codes
    kernel, bias = logistic_regression(features, codes, 0.5)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0) / np.sqrt(5)
    other = linear.LogisticRegression(C=6 / (0.5 * 60), tol=1e-8, max_iter=1000).fit(scaled, codes)
    wanted = other.predict_proba(scaled)
    logits = features @ kernel + bias
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found / found.sum(axis=1, keepdims=True), wanted, atol=2e-3)
    assert choose_penalty(random.normal(size=(20, 5)), np.arange(20) % 2, seed=0)[0] >= 3.0


def test_a_new_process_predicts_the_same(fitted, tmp_path):
    adata = make_cohort(4, seed=5)
    adata.write_h5ad(tmp_path / "in.h5ad")
    fitted.save(tmp_path / "saved")
    code = (
        "import sys, anndata, numpy as np, cellplm_jax\n"
        "found = cellplm_jax.SampleClassifier.load(sys.argv[1], quiet=True)\n"
        "adata = anndata.read_h5ad(sys.argv[2])\n"
        "np.save(sys.argv[3], found.predict(adata)['confidence'].to_numpy())\n"
        "np.save(sys.argv[4], adata.obs['cellplm_contribution'].to_numpy())\n"
    )
    paths = [tmp_path / name for name in ("saved", "in.h5ad", "one.npy", "two.npy")]
    subprocess.run(
        [sys.executable, "-c", code, *paths],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    np.testing.assert_array_equal(np.load(paths[2]), fitted.predict(adata)["confidence"])
    np.testing.assert_array_equal(np.load(paths[3]), adata.obs["cellplm_contribution"])


def test_the_same_seed_the_same_numbers(fitted, tiny_model):
    again = SampleClassifier(tiny_model, quiet=True).fit(make_cohort(), **KEYS)
    adata = make_cohort(4, seed=5)
    pd.testing.assert_frame_equal(again.predict(adata), fitted.predict(adata))


def relabelled(labels):
    adata = make_cohort(6, cells=4)
    adata.obs["disease"] = np.repeat(np.array(labels, object), 4)
    return adata


@pytest.mark.parametrize(
    ("adata", "keys", "message"),
    [
        (make_cohort(4, cells=3), {"sample_key": "gone"}, "'gone'"),
        (make_cohort(4, cells=3), {"label_key": "gone"}, "obs has no column 'gone'"),
        (make_cohort(4, cells=3), {"label_key": "kind"}, "sample 's0' has the labels"),
        (relabelled(["a"] * 6), {}, "6 labelled samples all have the label 'a'"),
        (relabelled([None] * 6), {}, "missing for all 6 samples"),
        (relabelled(["a"] * 5 + ["b"]), {}, "label 'b' has one sample"),
    ],
)
def test_refuses(tiny_model, adata, keys, message):
    with pytest.raises(InputError, match=message):
        SampleClassifier(tiny_model, quiet=True).fit(adata, **{**KEYS, **keys})


def test_refuses_other_genes_options_and_labels(tiny_model, fitted):
    adata = make_cohort(4, cells=3)
    adata.var_names = [f"row {n}" for n in range(40)]
    with pytest.raises(InputError, match="0 of the model's 40 genes"):
        SampleClassifier(tiny_model, quiet=True).fit(adata, **KEYS)
    with pytest.raises(
        InputError, match="does not support epochs; expected no training option except seed"
    ):
        SampleClassifier(tiny_model, epochs=3)
    with pytest.raises(InputError, match="has not been fitted"):
        SampleClassifier(tiny_model).predict(adata)
    with pytest.raises(InputError, match="labelled 'a', which is not a training label"):
        fitted.score(relabelled(["a", "b"] * 3))
    with pytest.raises(InputError, match="no sample has a label"):
        fitted.score(relabelled([None] * 6))


def test_samples_without_a_label_are_told(tiny_model):
    adata = relabelled(["a", "b", "a", "b", None, None])
    found = SampleClassifier(tiny_model, quiet=True).fit(adata, **KEYS)
    assert "2 of 6 samples have no label in 'disease' and were omitted." in found.messages
    assert len(found.predict(adata)) == 6
    assert cellplm_jax.SampleClassifier is SampleClassifier
