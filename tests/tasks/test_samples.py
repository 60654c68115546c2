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
from cellplm_jax.tasks import samples
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


def auroc(positive, values) -> float:
    ranks = pd.Series(np.asarray(values)).rank().to_numpy()
    number = positive.sum()
    return (ranks[positive].sum() - number * (number + 1) / 2) / number / (~positive).sum()


def make_shifted(
    samples: int = 12, *, cells: int = 60, seed: int = 0, fold: float = 3.0
) -> ad.AnnData:
    """Samples with a random effect each, and the same kinds; in sick ones some genes of kind 1 change."""
    random = np.random.default_rng(seed)
    programmes = np.random.default_rng(1234).gamma(0.6, 2.0, (3, len(VOCABULARY))) + 0.3
    sick = np.arange(samples) % 2 == 1
    rates, kinds = [], []
    for number in range(samples):
        kind = random.permutation(np.arange(cells) % 3)
        rate = programmes[kind] * np.exp(random.normal(0, 0.1, len(VOCABULARY)))
        if sick[number]:
            rate[np.ix_(kind == 1, np.arange(12, 28))] *= np.where(
                np.arange(16) % 2, fold, 1 / fold
            )
        rates.append(rate)
        kinds.append(kind)
    obs = pd.DataFrame(
        {
            "sample": np.repeat([f"s{n:02d}" for n in range(samples)], cells),
            "disease": np.repeat(np.where(sick, "sick", "healthy"), cells),
            "kind": [f"kind {kind}" for kind in np.concatenate(kinds)],
        },
        index=[f"cell{n}" for n in range(samples * cells)],
    )
    counts = random.poisson(np.concatenate(rates)).astype(np.float32)
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=VOCABULARY))


@pytest.fixture(scope="session")
def shifted(tiny_model):
    """A classifier of samples in which one type shifts; read only."""
    return SampleClassifier(tiny_model, quiet=True).fit(make_shifted(), type_key="kind", **KEYS)


def test_a_planted_shift_of_a_type_is_found(shifted):
    """In the samples of the fit, and in new ones, with and without their types."""
    for adata, typed in (
        (make_shifted(), True),
        (make_shifted(seed=9), True),
        (make_shifted(seed=9), False),
    ):
        kind = adata.obs["kind"].to_numpy(str)
        if not typed:
            del adata.obs["kind"]
        table = shifted.predict(adata)
        sick = (adata.obs["disease"] == "sick").to_numpy()
        right = (adata.obs["cellplm_sample_label"] == adata.obs["disease"]).to_numpy()
        assert right.mean() > 0.9
        own = kind == "kind 1"
        contribution = adata.obs["cellplm_contribution"].to_numpy()
        assert auroc(own[sick & right], contribution[sick & right]) >= (0.9 if typed else 0.85)
        means = adata.obs["cellplm_contribution"].groupby(adata.obs["sample"], observed=True).mean()
        np.testing.assert_allclose(table["shift"], means[table.index], atol=1e-5)
    shifts = shifted.shifts.set_index("type")
    assert shifts.loc["kind 1", "p"] <= 0.01
    assert (shifts.drop(index="kind 1")["p"] > 0.05).all()
    assert shifted._shifts.shifted.tolist()[1]
    assert shifts.loc["kind 1", "genes"]
    assert shifted.facts["p_shift"] <= 0.01
    assert shifted.facts["p_proportions"] > 0.05
    assert any("kind 1" in message for message in shifted.messages)


def test_other_proportions_are_no_shift(tiny_model, fitted):
    """Two thirds of a sick sample's cells are of one kind: the label is clear, and no cell of a kind differs."""
    typed = SampleClassifier(tiny_model, quiet=True).fit(make_cohort(), type_key="kind", **KEYS)
    for classifier in (typed, fitted):
        adata = make_cohort(8, seed=4)
        classifier.predict(adata)
        sick = (adata.obs["disease"] == "sick").to_numpy()
        own = (adata.obs["kind"] == 2).to_numpy()
        contribution = adata.obs["cellplm_contribution"].to_numpy()
        assert 0.3 < auroc(own[sick], contribution[sick]) < 0.7
        assert classifier.facts["p_proportions"] <= 0.01
        assert classifier.facts["p_shift"] > 0.05
    assert set(adata.obs["cellplm_contribution_type"]) <= set(fitted.shifts["type"])


def test_what_predict_writes(fitted):
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
    assert adata.uns["cellplm_samples"]["labels"] == ["healthy", "sick"]


def test_few_samples_are_told(tiny_model):
    found = SampleClassifier(tiny_model, quiet=True)
    found.fit(make_cohort(4, cells=12), type_key="kind", **KEYS)
    assert found.facts["smallest_p"] == pytest.approx(1 / 3)
    assert any(
        "4 samples allow no p-value below 0.33" in m and "4 samples per label" in m
        for m in found.messages
    )
    assert found.facts["p_latent"] >= 0.33
    many = SampleClassifier(tiny_model, quiet=True)
    many.fit(make_cohort(8, cells=6), type_key="kind", **KEYS)
    assert not any("Warning" in message for message in many.messages)
    data = make_cohort(4, cells=4)
    data.obs["none"] = np.nan
    with pytest.raises(InputError, match=r"obs\['none'\] is missing for all cells"):
        SampleClassifier(tiny_model, quiet=True).fit(data, type_key="none", **KEYS)


def test_a_classifier_saved_by_an_earlier_version():
    """Its contributions stay the terms of the logit."""
    folder = ROOT / "tests" / "fixtures"
    found = SampleClassifier.load(folder / "classifier-0.1", quiet=True)
    kept, adata = np.load(folder / "classifier-0.1.npz"), make_cohort(4, seed=5)
    table = found.predict(adata)
    np.testing.assert_allclose(table["confidence"], kept["confidence"], atol=1e-5)
    assert table["label"].astype(str).tolist() == kept["label"].tolist()
    np.testing.assert_allclose(adata.obs["cellplm_contribution"], kept["contribution"], atol=1e-4)
    assert found.shifts.empty


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


def test_small_fits_use_one_thread_of_blas(monkeypatch):
    control = pytest.importorskip("threadpoolctl", reason="needs the extra 'eval'")
    random = np.random.default_rng(0)
    features, codes, threads = random.normal(size=(8, 5)), np.arange(8) % 2, []

    def numbers():
        return {
            pool["num_threads"] for pool in control.threadpool_info() if pool["user_api"] == "blas"
        }

    def recording(*arguments, **options):
        threads.append(numbers())
        return logistic_regression(*arguments, **options)

    monkeypatch.setattr(samples, "logistic_regression", recording)
    with control.threadpool_limits(2, "blas"):
        if numbers() != {2}:
            pytest.skip("this BLAS does not take a number of threads")
        limited = choose_penalty(features, codes, seed=0)
        assert threads
        assert all(found == {1} for found in threads)
        assert numbers() == {2}
    assert limited == choose_penalty(features, codes, seed=0)


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
