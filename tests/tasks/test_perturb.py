"""Perturbations: simulated effects recovered, seen, unseen and combined; saved, loaded, and every refusal."""

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
from cellplm_jax.errors import ConfigError, InputError
from cellplm_jax.evaluate.perturbation import change_scores, mean_scores
from cellplm_jax.tasks.perturb import PerturbationPredictor
from cellplm_jax.tasks.perturbation_screen import log_normalize, shrinkage
from cellplm_jax.tasks.pretrained import Pretrained
from tests.conftest import ROOT, VOCABULARY

KEYS = {"perturbation_key": "perturbation", "control": "control"}
TRAINED, HELD = VOCABULARY[:24], VOCABULARY[24:30]


def effects() -> np.ndarray:
    """Log fold changes [targets, genes]: a shared part, and one that is linear in two hidden traits of the target."""
    random = np.random.default_rng(5)
    shared = random.normal(size=40) * 0.4
    return shared + traits() @ random.normal(size=(2, 40)) * 0.5


def traits() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(40, 2))


def make_screen(
    targets, *, cells: int = 40, controls: int = 120, groups: int = 1, seed: int = 0
) -> ad.AnnData:
    """A screen whose effects are those of :func:`effects`; a combination's add up; groups respond more and more."""
    random = np.random.default_rng(seed)
    base = np.random.default_rng(7).gamma(2.0, 3.0, (groups, 40)) + 1.0
    change, names, rates, kinds = effects(), [], [], []
    for group in range(groups):
        for name in ["control", *targets]:
            parts = [] if name == "control" else str(name).split("+")
            fold = sum((change[VOCABULARY.index(p) if p in VOCABULARY else 39] for p in parts), 0.0)
            number = controls if name == "control" else cells
            names += [name] * number
            kinds += [f"type {group}"] * number
            rates += [base[group] * np.exp(fold * (0.5 + group / 2))] * number
    obs = pd.DataFrame(
        {"perturbation": names, "kind": kinds}, index=[f"cell{n}" for n in range(len(names))]
    )
    obs["batch"] = np.where(np.arange(len(obs)) % 2 == 0, "b0", "b1")
    counts = random.poisson(np.stack(rates)).astype(np.float32)
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=VOCABULARY))


@pytest.fixture(scope="session")
def knowing(tiny_model):
    """The tiny model with gene embeddings that hold the hidden traits, and noise."""
    random = np.random.default_rng(8)
    table = random.normal(size=(40, 32)).astype(np.float32) * 0.1
    table[:, :2] = traits()
    table = table @ np.linalg.qr(random.normal(size=(32, 32)))[0].astype(np.float32)
    embedder = {**tiny_model.params["embedder"], "gene_embedding": table * 0.01}
    params = {**tiny_model.params, "embedder": embedder}
    return Pretrained(tiny_model.config, params, tiny_model.genes, {"name": "knowing"})


@pytest.fixture(scope="session")
def fitted(knowing):
    """A predictor of the trained targets and one combination; read only."""
    data = make_screen([*TRAINED, f"{TRAINED[3]}+{TRAINED[1]}"])
    return PerturbationPredictor(knowing, quiet=True).fit(data, batch_key="batch", **KEYS)


# What it finds


def test_unseen_targets_better_than_the_mean_change(fitted):
    scores = fitted.score(make_screen(HELD, seed=1))
    assert scores["perturbations"] == len(HELD)
    assert fitted.strengths["condition"] > 0
    assert scores["rmse"] < 0.8 * scores["mean_change_rmse"] < scores["no_change_rmse"]
    assert scores["pearson"] > scores["mean_change_pearson"] + 0.1
    assert scores["pearson_top"] > scores["mean_change_pearson_top"]
    few = fitted.score(make_screen(HELD, seed=1), perturbations=HELD[:2])
    assert few["perturbations"] == 2


def test_useless_embeddings_fall_back_to_the_mean_change(tiny_model):
    random = np.random.default_rng(9)
    table = random.normal(size=(40, 32)).astype(np.float32)
    embedder = {**tiny_model.params["embedder"], "gene_embedding": table}
    model = Pretrained(
        tiny_model.config, {**tiny_model.params, "embedder": embedder}, tiny_model.genes
    )
    found = PerturbationPredictor(model, quiet=True).fit(make_screen(TRAINED), **KEYS)
    scores = found.score(make_screen(HELD, seed=1))
    assert scores["rmse"] < 1.1 * scores["mean_change_rmse"]


def test_seen_perturbations_keep_their_measured_change(fitted):
    again = make_screen(TRAINED[:6], seed=2)
    scores = fitted.score(again)
    assert scores["pearson"] > 0.85  # 40 cells a perturbation, twice
    assert (
        scores["rmse"] <= 1.05 * scores["mean_change_rmse"]
    )  # their own change of the first screen


def test_combinations_add_up(fitted):
    one, other = TRAINED[1], TRAINED[3]
    found = fitted.predict([f"{one}+{other}", f"{other} + {one}", f"{one}+{HELD[0]}", HELD[0], one])
    assert found.known.tolist() == ["seen", "seen", "partly seen", "unseen", "seen"]
    change = found.change.to_numpy()
    np.testing.assert_array_equal(change[0], change[1])
    # The latent of the control cells enters once, and is off here.
    np.testing.assert_allclose(change[2], change[3] + change[4], atol=1e-5)
    unseen = fitted.predict([f"{TRAINED[2]}+{TRAINED[5]}"])
    assert unseen.known.tolist() == ["combination of seen"]


def test_what_a_prediction_holds(fitted):
    found = fitted.predict([HELD[0], "control"])
    assert found.change.shape == found.expression.shape == (2, 40)
    assert found.change.columns.tolist() == fitted.model.genes
    assert not found.change.loc["control"].any()
    control = make_screen(TRAINED)
    control = control[control.obs["perturbation"] == "control"]
    mean = np.asarray(log_normalize(sparse.csr_matrix(control.X)).mean(axis=0)).ravel()
    np.testing.assert_allclose(found.control, mean, atol=0.05)
    total = np.maximum(found.control.to_numpy() + found.change.to_numpy(), 0)
    np.testing.assert_allclose(found.expression, total, rtol=1e-5)
    table = found.tidy()
    assert table.columns.tolist() == [
        "perturbation", "gene", "symbol", "control", "change", "expression", "known",
    ]  # fmt: skip
    assert table["change"].tolist()[:40] == found.change.iloc[0].tolist()
    assert fitted.predict(HELD[0]).change.shape == (1, 40)


def test_a_condition_in_groups_never_seen(tiny_model):
    data = make_screen(["drug"], groups=6, cells=60, controls=60)
    data.obs["perturbation"] = data.obs["perturbation"].replace("drug", "some drug")
    held = data[data.obs["kind"] == "type 5"].copy()
    train = data[data.obs["kind"] != "type 5"].copy()
    found = PerturbationPredictor(tiny_model, quiet=True)
    found.fit(train, covariate_key="kind", **KEYS)
    assert found.conditions == ["some drug"]
    known = found.predict("some drug", group="type 0")
    scores = found.score(train)
    assert scores["perturbations"] == 5
    assert scores["pearson"] > 0.9
    # The latent of a group does not depend on the other cells of the file.
    part = train[train.obs["kind"] == "type 0"].copy()
    alone = found.predict("some drug", controls=part)
    seen = found._head(found._arrays["z"][:1], condition=found._condition("some drug")[None])
    np.testing.assert_allclose(alone.change.to_numpy() - found._arrays["residual"], seen, atol=2e-5)
    assert found.score(part)["pearson"] > 0.9
    other = found.predict("some drug", controls=held)
    assert np.isfinite(other.change).all(axis=None)
    assert not np.allclose(other.control, known.control)
    truth = held[held.obs["perturbation"] == "some drug"]
    truth = np.asarray(log_normalize(sparse.csr_matrix(truth.X)).mean(axis=0)) - [
        other.control.to_numpy()
    ]
    assert mean_scores(change_scores(truth, other.change))["pearson"] > 0.5
    with pytest.raises(InputError, match="no group 'type 9' of control cells; expected one of"):
        found.predict("some drug", group="type 9")
    with pytest.raises(InputError, match="both group and controls"):
        found.predict("some drug", group="type 0", controls=held)
    with pytest.raises(InputError, match=r"neither a gene .* closest names are 'some drug'"):
        found.predict("same drug")
    with pytest.raises(InputError, match="controls has no cell with 'control'"):
        found.predict("some drug", controls=held[held.obs["perturbation"] != "control"].copy())


def test_finetuning_goes_on_from_there(knowing):
    recipe = {"epochs": 3, "warmup_epochs": 1, "freeze": "none", "learning_rate": 1e-4}
    found = PerturbationPredictor(knowing, method="finetune", quiet=True, **recipe)
    found.fit(make_screen(TRAINED), **KEYS)
    assert len(found.history) == 3
    assert {"loss", "validation_score", "pearson"} <= set(found.history[0])
    scores = found.score(make_screen(HELD, seed=1))
    assert scores["rmse"] < scores["mean_change_rmse"]


def test_from_scratch_the_data_describe_the_genes():
    data = make_screen(TRAINED[:6], cells=10, controls=30)
    found = PerturbationPredictor(None, quiet=True, gene_features="model").fit(data, **KEYS)
    assert any("using gene features 'data'" in message for message in found.messages)
    assert np.isfinite(found.predict(HELD[0]).change).all(axis=None)


def test_noise_is_shrunk():
    assert shrinkage(np.full(5, 2.0), 0.0) == 1.0
    assert shrinkage(np.full(5, 2.0), 1.0) == pytest.approx(0.75)
    assert shrinkage(np.full(5, 2.0), 9.0) == 0.0


# Saved, opened elsewhere, repeated


def test_a_new_process_predicts_the_same(fitted, tmp_path):
    names = [TRAINED[0], HELD[0], f"{TRAINED[0]}+{HELD[1]}"]
    fitted.save(tmp_path / "saved")
    code = (
        "import sys, numpy as np, cellplm_jax\n"
        "found = cellplm_jax.PerturbationPredictor.load(sys.argv[1], quiet=True)\n"
        "np.save(sys.argv[2], found.predict(sys.argv[3:]).change.to_numpy())\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved", tmp_path / "out.npy", *names],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), fitted.predict(names).change)
    again = PerturbationPredictor.load(tmp_path / "saved", quiet=True)
    assert (again.perturbations, again.strengths) == (fitted.perturbations, fitted.strengths)
    assert again.left_out.as_dict() == fitted.left_out.as_dict()


def test_the_same_seed_the_same_numbers(fitted, knowing):
    data = make_screen([*TRAINED, f"{TRAINED[3]}+{TRAINED[1]}"])
    again = PerturbationPredictor(knowing, quiet=True).fit(data, batch_key="batch", **KEYS)
    np.testing.assert_array_equal(again.predict(HELD).change, fitted.predict(HELD).change)


# Spellings


def test_every_spelling_gives_the_same_numbers(knowing):
    targets = [*TRAINED[:7], f"{TRAINED[3]}+{TRAINED[1]}"]
    plain = make_screen(targets, cells=8, controls=24)
    other = plain.copy()
    first, second = VOCABULARY[3], VOCABULARY[5]  # TSPAN6 and TNMD
    names = other.obs["perturbation"].astype(object).to_numpy()
    spelled = {
        "control": ["ctrl"],
        first: ["TSPAN6", "tspan6+ctrl", "ctrl+TSPAN6", f"{first}.7", "sgTSPAN6-2", "TSPAN6g1"],
        second: ["TNMD_1", "ctrl+TNMD"],
        TRAINED[0]: [f"{TRAINED[0]}+ctrl", f"ctrl;{TRAINED[0]}"],
        targets[-1]: [f"{TRAINED[1]}_tspan6", f"{first}|{TRAINED[1]}"],
    }
    for name, forms in spelled.items():
        rows = np.flatnonzero(names == name)
        names[rows] = [forms[n % len(forms)] for n in range(len(rows))]
    other.obs["perturbation"] = names
    one = PerturbationPredictor(knowing, quiet=True).fit(plain, **KEYS)
    two = PerturbationPredictor(knowing, quiet=True).fit(other, perturbation_key="perturbation")
    assert (one.control, two.control) == ("control", "ctrl")
    assert one.perturbations == two.perturbations
    assert any(
        "control: 'ctrl', a well-known name, " not in m and "well-known" in m for m in two.messages
    )
    asked = [first, second, TRAINED[0], targets[-1], HELD[0], f"{first}+{HELD[0]}"]
    forms = ["Tspan6", "TNMDg2", f"ctrl+{TRAINED[0]}", f"{TRAINED[1]}+TSPAN6", f"{HELD[0]}+ctrl",
             f"{HELD[0]};TSPAN6"]  # fmt: skip
    expected = one.predict(asked)
    for found in (one.predict(forms), two.predict(asked), two.predict(forms)):
        np.testing.assert_array_equal(found.change.to_numpy(), expected.change.to_numpy())
        assert found.known.tolist() == expected.known.tolist()
    assert expected.known.tolist()[-3:] == ["seen", "unseen", "partly seen"]
    scores = one.score(other, perturbations=["tspan6"])
    assert scores == two.score(plain, perturbations=[first])
    assert scores["perturbations"] == 1


def test_a_number_column(tiny_model):
    data = make_screen(["drug"], cells=20, controls=30)
    data.obs["treated"] = (data.obs["perturbation"] == "drug").astype(float)
    found = PerturbationPredictor(tiny_model, quiet=True)
    found.fit(data, perturbation_key="treated", control=0)
    assert (found.control, found.perturbations) == ("0", ["1"])
    np.testing.assert_array_equal(found.predict(1).change, found.predict("1").change)
    assert found.predict("1").known.tolist() == ["seen"]
    assert found.left_out is None


def test_baselines_of_left_out_perturbations(fitted):
    table = fitted.left_out.table().set_index("perturbation")
    assert len(table) == len(fitted.perturbations)
    means = table.mean(numeric_only=True)
    assert means["rmse"] < means["rmse_mean_change"] < means["rmse_no_change"]
    assert fitted.facts["left_out_perturbations_rmse_of_no_change"] > 0
    assert fitted.facts["left_out_rmse_additive"] == pytest.approx(means["rmse_additive"])
    both = next(name for name in table.index if "+" in name)
    # A combination is predicted from its measured targets, as in predict.
    assert table.loc[both, "rmse_additive"] < table.loc[both, "rmse_mean_change"]
    assert table.loc[both, "rmse"] < 1.1 * table.loc[both, "rmse_additive"]
    single = table.drop(index=both)
    np.testing.assert_array_equal(single["rmse_additive"], single["rmse_mean_change"])
    scores = fitted.score(make_screen([f"{TRAINED[2]}+{TRAINED[6]}", HELD[0]], seed=3))
    assert scores["additive_rmse"] < scores["mean_change_rmse"]
    assert scores["rmse"] < scores["additive_rmse"]


def test_a_predictor_saved_by_an_earlier_version():
    """With the rules of names that it was fitted with: the numbers stay."""
    folder = ROOT / "tests" / "fixtures"
    found = PerturbationPredictor.load(folder / "predictor-0.1", quiet=True)
    kept = np.load(folder / "predictor-0.1.npz")
    again = found.predict(kept["names"].tolist())
    np.testing.assert_allclose(again.change.to_numpy(), kept["change"], atol=1e-6)
    assert again.known.tolist() == kept["known"].tolist()
    assert found.left_out is None


# What is refused


def change_obs(**columns):
    data = make_screen(TRAINED[:5], cells=8, controls=12)
    for name, values in columns.items():
        data.obs[name] = values
    return data


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"perturbation_key": "gone"}, "obs has no column 'gone'"),
        ({"control": "contrl"}, "no cell has the control 'contrl' .* Did you mean 'control'"),
        ({"covariate_key": "gone"}, "obs has no column 'gone'"),
        ({"covariate_key": "whole"}, "group 'other' .* has no control cells"),
        ({"perturbation_key": "nothing"}, "no cell has the control .* all are missing"),
        ({"perturbation_key": "same"}, "are control cells; expected perturbed cells too"),
        ({"targets": "genes", "perturbation_key": "drugs"}, "'drugX' is neither a gene"),
        ({"targets": "things"}, "targets='things'; expected one of 'auto'"),
        ({"perturbation_key": "rare"}, "no perturbation has 5 cells"),
    ],
)
def test_refuses(tiny_model, keys, message):
    data = change_obs(nothing=np.nan, same="control")
    is_control = data.obs["perturbation"] == "control"
    data.obs["whole"] = np.where(is_control, "one", "other")
    data.obs["drugs"] = np.where(is_control, "control", "drugX")
    data.obs["rare"] = np.where(is_control, "control", data.obs_names)
    with pytest.raises(InputError, match=message):
        PerturbationPredictor(tiny_model, quiet=True).fit(data, **{**KEYS, **keys})


def test_refuses_other_genes_options_and_names(tiny_model, fitted):
    data = change_obs()
    data.var_names = [f"row {n}" for n in range(40)]
    with pytest.raises(InputError, match="0 of the model's 40 genes"):
        PerturbationPredictor(tiny_model, quiet=True).fit(data, **KEYS)
    with pytest.raises(InputError, match="method='best'; expected one of 'ridge', 'finetune'"):
        PerturbationPredictor(tiny_model, method="best")
    with pytest.raises(ConfigError, match="epoch"):
        PerturbationPredictor(tiny_model, epoch=3)
    with pytest.raises(InputError, match="has not been fitted"):
        PerturbationPredictor(tiny_model).predict("A")
    with pytest.raises(
        InputError, match=f"'{VOCABULARY[2]}x' is neither .* closest names are 'ENSG"
    ):
        fitted.predict(f"{VOCABULARY[2]}x")
    with pytest.raises(InputError, match="no perturbations were given"):
        fitted.predict([])
    with pytest.raises(InputError, match="no perturbation to score"):
        fitted.score(make_screen(HELD, seed=1), perturbations=["other"])


def test_missing_perturbations_and_few_cells_are_told(tiny_model):
    data = change_obs()
    names = data.obs["perturbation"].astype(object)
    names[data.obs_names[-3:]] = np.nan
    names[data.obs_names[12:14]] = VOCABULARY[9]
    data.obs["perturbation"] = names
    found = PerturbationPredictor(tiny_model, quiet=True).fit(data, **KEYS)
    assert any(m.startswith("3 of 52 cells have no perturbation") for m in found.messages)
    assert any("Omitted for fewer than 5 cells: 1" in m for m in found.messages)
    assert VOCABULARY[9] not in found.perturbations
    assert cellplm_jax.PerturbationPredictor is PerturbationPredictor


def test_a_gene_that_nothing_is_known_of_gets_the_mean_change(fitted):
    found = fitted.predict(["TP53"])
    assert list(found.known) == ["unseen"]
    np.testing.assert_allclose(found.change.to_numpy()[0], fitted._arrays["mean_change"], atol=0.2)
    with pytest.raises(InputError, match="'TP35' is neither a gene"):
        fitted.predict(["TP35"])
