"""The facts about a model, for people and as JSON."""

from __future__ import annotations

import json

import pytest

from cellplm_jax.config import ModelConfig, from_dict
from cellplm_jax.errors import CheckpointError
from cellplm_jax.tasks.annotate import CellTypeAnnotator
from cellplm_jax.tasks.info import describe, describe_text
from tests.conftest import make_labelled


@pytest.fixture(scope="module")
def facts(tiny_run):
    return describe(tiny_run)


def test_facts(facts, tiny_model):
    assert facts["id"] == tiny_model.id
    assert facts["step"] == tiny_model.step
    assert facts["genes"] == {"count": 40, "first": tiny_model.genes[:3]}
    parameters = dict(facts["parameters"])
    assert parameters.pop("total") == sum(parameters.values()) == tiny_model.parameters
    assert set(parameters) == set(tiny_model.params)
    assert from_dict(ModelConfig, facts["config"]) == tiny_model.config
    assert facts["training"]["train"]["first"]["step"] == 1
    assert facts["training"]["train"]["last"]["step"] == 30
    assert facts["training"]["heldout"]["first"]["step"] == 0
    assert json.loads(json.dumps(facts)) == facts


def test_text(facts, tiny_model):
    text = describe_text(facts)
    assert tiny_model.id in text
    assert f"{tiny_model.parameters:,}" in text
    for word in ("embedder", "decoder", "flow", "gaussian_mixture", "train", "heldout", "step 30"):
        assert word in text


def test_a_model_without_history(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    facts = describe(tmp_path / "model")
    assert facts["training"] == {}
    assert tiny_model.id in describe_text(facts)


def test_history_with_a_line_cut_off_and_scores_missing(run_copy):
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 37, "split": "train", "time": 1.0, "loss": null}\n{"step": 38, "sp')
    facts = describe(run_copy)
    assert facts["training"]["train"]["last"]["step"] == 37
    assert "step 37" in describe_text(facts)


def test_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(tmp_path)


def test_an_annotator_lists_its_labels_and_scores(tiny_model, tmp_path, command):
    adata = make_labelled(60)
    annotator = CellTypeAnnotator(tiny_model, epochs=1, quiet=True, linear=False)
    annotator.fit(adata, label_key="kind").save(tmp_path / "annotator")
    facts = describe(tmp_path / "annotator")["estimator"]
    assert facts["class"] == "CellTypeAnnotator"
    assert facts["start_model"] == tiny_model.id
    assert facts["labels"] == ["alpha", "beta", "gamma"]
    assert facts["facts"]["validation_f1"] == annotator.facts["validation_f1"]
    status, out, _ = command("info", tmp_path / "annotator")
    assert status == 0
    assert "labels             alpha, beta, gamma" in out
    assert f"validation f1 {annotator.facts['validation_f1']:.4g}" in out
    assert "label key kind" in out


def test_the_training_data_are_a_table():
    lines = describe_text(describe("small")).splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("training_data")]
    assert lines[start + 1].split() == ["dataset", "samples", "cells"]
    assert lines[start + 2].split()[1:] == ["5", "590"]
    assert max(map(len, lines[: start + 30])) < 250
    assert "{'dataset'" not in "\n".join(lines)
