"""Models on the hub: published, fetched, pinned, cached and refused - against a stand-in of its protocol."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import cellplm_jax
from cellplm_jax.errors import CheckpointError, InputError, MissingDependencyError
from cellplm_jax.interop.hub import GENERATED, HubAddress, parse_address
from cellplm_jax.interop.model_card import licence, model_card
from cellplm_jax.tasks.pretrained import bundled_path, load
from tests.conftest import ROOT, make_adata, make_labelled

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
from tests.stand_ins.hub import TOKEN, Repository, environment, model_hub

FILES = {"config.json", "genes.txt", "card.json", "manifest.json", "model.safetensors", "README.md"}


@pytest.fixture
def hub(tmp_path):
    with model_hub(tmp_path / "home") as server:
        yield server


def put(hub, name, model, folder, **options):
    """A model at the hub that was not published through this package's client."""
    model.save(folder, format="safetensors")
    repository = hub.repositories.setdefault(name, Repository(**options))
    return repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})


def assert_same(one, two):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)


def refused(kind, function, *arguments, **options):
    with pytest.raises(kind) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert "expected" in text
    assert "\n" not in text
    return text


def test_published_and_opened(hub, tiny_model, tmp_path):
    done = tiny_model.push_to_hub("me/tiny", token=TOKEN, commit_message="First")
    repository = hub.repositories["me/tiny"]
    assert done.commit == repository.branches["main"]
    assert done.url.endswith(done.commit)
    assert set(repository.commits[done.commit]) == FILES | {".gitattributes"}
    opened = load("hf://me/tiny")
    assert_same(opened, tiny_model)
    assert (opened.config, opened.genes, opened.step) == (
        tiny_model.config,
        tiny_model.genes,
        tiny_model.step,
    )
    assert opened.source == done.address == f"hf://me/tiny@{done.commit}"
    assert opened.card == {**tiny_model.card, "loaded_from": done.address}
    # Only files of a model are fetched, and the token of the client stays at the hub.
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request}
    assert fetched == FILES - {"README.md"}
    assert hub.tokens_elsewhere == []
    opened.__dict__.update(embed_expression=tiny_model.embed_expression, encode=tiny_model.encode)
    adata = cellplm_jax.embed(make_adata(9), opened)
    expected = cellplm_jax.embed(make_adata(9), tiny_model)
    np.testing.assert_array_equal(adata.obsm["X_cellplm"], expected.obsm["X_cellplm"])
    assert adata.uns["cellplm"]["model_source"] == done.address


def test_a_revision_is_pinned(hub, tiny_model, tmp_path):
    first = put(hub, "me/tiny", tiny_model, tmp_path / "first")
    other = dataclasses.replace(tiny_model, step=99)
    other.params = jax.tree.map(lambda leaf: leaf + 1, tiny_model.params)
    second = put(hub, "me/tiny", other, tmp_path / "second")
    hub.repositories["me/tiny"].branches["v1"] = first
    assert load("hf://me/tiny").source == f"hf://me/tiny@{second}"
    assert load("hf://me/tiny").step == 99
    for revision in ("v1", first):
        opened = load(f"hf://me/tiny@{revision}")
        assert opened.source == f"hf://me/tiny@{first}"
        assert_same(opened, tiny_model)
    assert "no such revision" in refused(CheckpointError, load, "hf://me/tiny@v9")
    assert "no such revision" in refused(CheckpointError, load, f"hf://me/tiny@{'0' * 40}")


def test_opened_again_without_the_hub(hub, tiny_model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = put(hub, "me/tiny", tiny_model, tmp_path / "tiny")
    assert_same(load("hf://me/tiny"), tiny_model)
    hub.requests.clear()
    assert load(f"hf://me/tiny@{commit}").source == f"hf://me/tiny@{commit}"
    assert not any("GET /me/" in request for request in hub.requests)  # nothing is fetched twice
    for setting in ({"ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": True}):
        hub.requests.clear()
        with monkeypatch.context() as patch:
            for name, value in setting.items():
                patch.setattr(constants, name, value)
            assert load("hf://me/tiny").source == f"hf://me/tiny@{commit}"
            text = refused(CheckpointError, load, "hf://me/other")
            assert "'hf://me/other' is not in the local cache" in text
            refused(CheckpointError, tiny_model.push_to_hub, "me/tiny", token=TOKEN)
        assert hub.requests == []


def test_a_new_process_reads_the_usual_settings(hub, tmp_path):
    """The endpoint, the token and the cache are those of huggingface_hub's own variables; then without the server."""
    model = load("small")
    commit = put(hub, "me/secret", model, tmp_path / "model", private=True)
    code = (
        "import cellplm_jax as c; m = c.load('hf://me/secret'); print(m.source, m.id);"
        "import sys; print([n for n in ('torch', 'pickle5') if n in sys.modules])"
    )
    variables = {**os.environ, **environment(hub.url, tmp_path / "other home")}
    variables |= {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}

    def run(**more):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=variables | more)

    expected = f"hf://me/secret@{commit} {cellplm_jax.load('small').id}\n[]\n"
    first = run()
    assert first.stdout == expected, first.stderr
    assert any("/me/secret/resolve/" in request for request in hub.requests)
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1", HF_TOKEN="").stdout == expected
    assert hub.requests == []


def test_what_may_not_be_read(hub, tiny_model, tmp_path):
    put(hub, "me/private", tiny_model, tmp_path / "private", private=True)
    put(hub, "me/gated", tiny_model, tmp_path / "gated", gated=True)
    hub.repositories["me/empty"] = Repository()
    hub.repositories["me/empty"].commit({"pytorch_model.bin": b"x"})
    assert "HF_TOKEN" in refused(CheckpointError, load, "hf://me/private")
    assert "HF_TOKEN" in refused(CheckpointError, load, "hf://me/none")
    assert "is gated" in refused(CheckpointError, load, "hf://me/gated")
    assert "no model.safetensors" in refused(CheckpointError, load, "hf://me/empty")
    assert "config.json" in refused(CheckpointError, load, "hf://me/empty/folder")
    assert not any("pytorch_model" in request for request in hub.requests)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    assert_same(load("hf://me/private"), tiny_model)
    assert "no repository" in refused(CheckpointError, load, "hf://me/none")


def test_what_may_not_be_written(hub, tiny_model):
    push = tiny_model.push_to_hub
    assert "403" in refused(CheckpointError, push, "others/tiny", token=TOKEN)
    assert "401" in refused(CheckpointError, push, "me/tiny", token="wrong")
    assert "not a valid hub address" in refused(InputError, push, "tiny", token=TOKEN)
    assert "not a valid repository name" in refused(InputError, push, "me/tiny@main", token=TOKEN)
    assert "valid repository name" in refused(InputError, push, "me/a--b", token=TOKEN)
    assert hub.repositories == {}
    hub.repositories["me/public"] = Repository()
    before = hub.repositories["me/public"].commit({"README.md": b"mine"})
    assert "public" in refused(InputError, push, "me/public", private=True, token=TOKEN)
    assert hub.repositories["me/public"].branches == {"main": before}


def test_published_again(hub, tiny_model):
    """Branches, privacy, stale files, and a model card that someone wrote."""
    push = tiny_model.push_to_hub
    first = push("me/tiny", private=True, token=TOKEN)
    repository = hub.repositories["me/tiny"]
    assert repository.private
    files = repository.commits[first.commit]
    repository.commit({**files, "estimator.json": b"{}", "notes.txt": b"kept"})
    second = push("me/tiny", half=True, token=TOKEN, private=True)
    after = repository.commits[second.commit]
    assert set(after) == {*files, "notes.txt"}
    assert len(after["model.safetensors"]) < len(files["model.safetensors"])
    edited = after["README.md"].replace(GENERATED.encode(), b"My words.")
    repository.commit({**after, "README.md": edited})
    third = push("me/tiny", revision="next", token=TOKEN)
    assert repository.branches["next"] == third.commit
    assert repository.branches["main"] != third.commit
    assert repository.commits[third.commit]["README.md"] == edited


def test_a_fitted_estimator(hub, tiny_model, tmp_path):
    annotator = cellplm_jax.CellTypeAnnotator(tiny_model, epochs=1, quiet=True)
    annotator.fit(make_labelled(60), label_key="kind")
    done = annotator.push_to_hub("me/annotator", token=TOKEN)
    kept = hub.repositories["me/annotator"].commits[done.commit]
    assert "estimator.json" in kept
    assert b'CellTypeAnnotator.load("hf://me/annotator")' in kept["README.md"]
    opened = cellplm_jax.CellTypeAnnotator.load("hf://me/annotator", quiet=True)
    one, two = make_labelled(30, seed=3), make_labelled(30, seed=3)
    annotator.predict(one)
    opened.predict(two)
    assert one.obs["cellplm_cell_type"].tolist() == two.obs["cellplm_cell_type"].tolist()
    np.testing.assert_array_equal(
        one.obsm["cellplm_probabilities"], two.obsm["cellplm_probabilities"]
    )
    assert load("hf://me/annotator").card["task"] == annotator.task
    text = refused(CheckpointError, cellplm_jax.GeneImputer.load, "hf://me/annotator")
    assert "CellTypeAnnotator" in text
    put(hub, "me/plain", tiny_model, tmp_path / "plain")
    refused(CheckpointError, cellplm_jax.CellTypeAnnotator.load, "hf://me/plain")


def test_arrays_of_estimators_survive_the_format(tmp_path):
    """Names of an estimator's arrays may hold slashes; a tree of parameters is made of them."""
    from cellplm_jax.config import ModelConfig
    from cellplm_jax.train.checkpoint import ModelFiles, restore_item, save_model

    arrays = {"log/weights": np.arange(6.0).reshape(2, 3), "label": np.array([1, 2])}
    files = ModelFiles(ModelConfig(genes=1), ["ENSG00000000001"])
    for form in ("orbax", "safetensors"):
        save_model(tmp_path / form, files, {"a": {"b": np.ones(2)}}, estimator=arrays, format=form)
        found, _ = restore_item(tmp_path / form, item="estimator")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a/b/", HubAddress("a/b")),
        ("hf://a-1/b.c_d@v1.0", HubAddress("a-1/b.c_d", "v1.0")),
        ("hf://a/b@refs/pr/3/models/x", HubAddress("a/b", "refs/pr/3", "models/x")),
        ("hf://a/b/models/x", HubAddress("a/b", None, "models/x")),
        ("hf://a/b@v1/models", HubAddress("a/b", "v1", "models")),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a", "hf://a/b@", "hf://a/b/../c", "hf:///a/b", "a/b"]
)
def test_what_is_no_address(text):
    refused(InputError, parse_address, text)


def test_a_folder_of_a_repository(hub, tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model", format="safetensors")
    files = {f"deep/er/{p.name}": p.read_bytes() for p in (tmp_path / "model").iterdir()}
    hub.repositories["me/many"] = Repository()
    commit = hub.repositories["me/many"].commit({**files, "model.safetensors": b"another"})
    opened = load("hf://me/many@main/deep/er")
    assert opened.source == f"hf://me/many@{commit}/deep/er"
    assert_same(opened, tiny_model)
    assert load(opened.source).source == opened.source


def test_without_the_extra(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[hub\]"):
        load("hf://me/tiny")
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[hub\]"):
        tiny_model.push_to_hub("me/tiny")


def card_of(model, card, **options):
    arguments = {"parameters": model.parameters, "step": model.step, "repository": "me/tiny"}
    return model_card(model.config, model.genes, card, **(arguments | options))


def front(text):
    import yaml

    return yaml.safe_load(text.split("---")[1])


def test_the_card_says_what_is_known(tiny_model):
    card = json.loads((bundled_path("small") / "card.json").read_text())
    text = card_of(tiny_model, card)
    about = front(text)
    assert about["library_name"] == "cellplm-jax"
    assert about["license"] == "bsd-2-clause"
    assert {"single-cell", "human", "pretrained"} <= set(about["tags"])
    assert set(about["metrics"]) == {
        "masked_correlation",
        "masked_correlation_per_gene",
        "nb_log_likelihood",
        "knn_accuracy",
        "ari",
        "nmi",
    }
    for part in ("Data", "Architecture", "Scores", "Intended use", "Limits", "Licence", "Citation"):
        assert f"\n## {part}\n" in text
    row = card["training_data"][0]
    assert f"| {row['dataset']} | {row['samples']} | {row['cells']:,} |" in text
    scores = card["hidden_counts"]["this model"]
    assert f"| this model | {' | '.join(f'{value:.4g}' for value in scores.values())} |" in text
    assert card["limits"] in text
    assert 'cellplm.load("hf://me/tiny")' in text


def test_the_card_invents_nothing(tiny_model):
    text = card_of(tiny_model, {})
    about = front(text)
    assert about["license"] == "unknown"
    assert "metrics" not in about
    assert text.count("ot stated in the model's `card.json`") == 3  # data, limits, licence
    assert "No scores are stated" in text
    assert "not stated" in text.split("## Intended use")[1].split("##")[0]


def test_the_card_of_a_run_and_of_a_converted_model(tiny_model):
    text = card_of(tiny_model, tiny_model.card)
    assert "`card.json`, training." in text
    assert "| heldout_best |" in text
    assert "nb_log_likelihood" in front(text)["metrics"]
    assert "step" not in front(text)["metrics"]
    converted = {"kind": "converted", "data": "the published one", "unused_parameters": {"a": "b"}}
    assert "the published one" in card_of(tiny_model, converted)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("BSD-2-Clause", "bsd-2-clause"),
        ("weights: CC BY 4.0", "cc-by-4.0"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("Apache License 2.0", "apache-2.0"),
        ("MIT", "mit"),
        ("see the permit of our institute", "other"),
        ("", "unknown"),
    ],
)
def test_licences(text, name):
    assert licence({"licence": text}) == name
    assert licence({"license": text}) == name


def test_names_without_a_card(hub, tiny_model, tmp_path):
    nameless = dataclasses.replace(tiny_model, card={})
    put(hub, "me/tiny", nameless, tmp_path / "tiny")
    assert load("hf://me/tiny").id == tiny_model.id
    assert Path(tmp_path / "tiny").is_dir()


def test_info_of_a_hub_model(hub, tiny_model, tmp_path):
    from cellplm_jax.tasks.info import describe

    commit = put(hub, "me/tiny", tiny_model, tmp_path / "tiny")
    facts = describe("hf://me/tiny")
    assert facts["card"]["loaded_from"] == f"hf://me/tiny@{commit}"
    assert facts["training"] == {}
