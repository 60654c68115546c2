"""Opening models: the right step, the right numbers, and one clear message for everything that is not whole."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import cellplm_jax
from cellplm_jax.errors import CheckpointError, InputError
from cellplm_jax.tasks.pretrained import Pretrained, check_params, load
from cellplm_jax.train.metrics import read_metrics
from tests.conftest import VOCABULARY, make_adata


def leaves(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def assert_same(one, two):
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name], err_msg=name)


def test_load_gives_everything(tiny_run, tiny_model):
    assert cellplm_jax.load is load
    assert tiny_model.genes == VOCABULARY
    assert tiny_model.config.genes == len(VOCABULARY)
    assert tiny_model.config.latent_size == 16
    assert tiny_model.card["name"] == "tiny"
    assert tiny_model.source == str(tiny_run)
    assert tiny_model.id == f"tiny@{tiny_model.step}+{tiny_model.digest[:8]}"
    found = leaves(tiny_model.params)
    assert all(type(leaf) is np.ndarray for leaf in found.values())
    assert all(leaf.dtype == np.float32 for leaf in found.values())
    assert tiny_model.parameters == sum(leaf.size for leaf in found.values())


def test_the_best_step_is_opened(tiny_run, tiny_model):
    rows = [r for r in read_metrics(tiny_run / "metrics.jsonl") if r["split"] == "heldout"]
    saved = [row for row in rows if row["step"] in (10, 20, 30)]
    best = max(saved, key=lambda row: row["nb_log_likelihood"])["step"]
    assert tiny_model.step == best
    other = next(
        int(p.name) for p in tiny_run.iterdir() if p.name.isdigit() and int(p.name) != best
    )
    opened = load(tiny_run, step=other)
    assert opened.step == other
    assert np.abs(
        opened.params["embedder"]["gene_embedding"]
        - tiny_model.params["embedder"]["gene_embedding"]
    ).max()


def test_save_and_load_again(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert_same(again.params, tiny_model.params)
    assert (again.config, again.genes, again.card, again.step) == (
        tiny_model.config,
        tiny_model.genes,
        tiny_model.card,
        tiny_model.step,
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    adata = make_adata(9)
    again.__dict__.update(embed_expression=tiny_model.embed_expression, encode=tiny_model.encode)
    one = cellplm_jax.embed(adata.copy(), tiny_model).obsm["X_cellplm"]
    two = cellplm_jax.embed(adata.copy(), again).obsm["X_cellplm"]
    np.testing.assert_array_equal(one, two)
    with pytest.raises(CheckpointError, match="not empty"):
        tiny_model.save(tmp_path / "model")


def test_a_saved_model_may_be_moved(tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    tiny_model.save(tmp_path / "empty")
    shutil.move(tmp_path / "empty", tmp_path / "elsewhere ü")
    assert load(str(tmp_path / "elsewhere ü")).step == tiny_model.step


def test_untrained_depends_on_the_seed(tiny_model):
    one = Pretrained.untrained(tiny_model.config, VOCABULARY)
    check_params(one.config, one.params, "untrained")
    assert one.id == f"untrained@0+{one.digest[:8]}"
    table = one.params["embedder"]["gene_embedding"]
    assert np.abs(table - tiny_model.params["embedder"]["gene_embedding"]).max() > 0
    assert_same(one.params, Pretrained.untrained(tiny_model.config, VOCABULARY, seed=0).params)
    other = Pretrained.untrained(tiny_model.config, VOCABULARY, seed=1)
    assert np.abs(table - other.params["embedder"]["gene_embedding"]).max() > 0


def message(kind, *arguments, **options):
    with pytest.raises(kind) as error:
        load(*arguments, **options)
    text = str(error.value)
    assert "expected" in text
    assert "\n" not in text
    return text


def test_not_a_checkpoint(tmp_path, tiny_run):
    assert "no directory" in message(CheckpointError, tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "no directory" in message(CheckpointError, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "config.json" in message(CheckpointError, tmp_path / "empty")
    assert "remote" in message(InputError, "s3://bucket/model")
    assert "no step 5" in message(CheckpointError, tiny_run, step=5)


@pytest.mark.parametrize("name", ["config.json", "genes.txt", "card.json"])
def test_missing_root_file(run_copy, name):
    (run_copy / name).unlink()
    assert name in message(CheckpointError, run_copy)


def edit(run, change):
    content = json.loads((run / "config.json").read_text())
    change(content)
    (run / "config.json").write_text(json.dumps(content))
    (run / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"]["latent"].update(size=8), ["decoder", "(16, 32)", "(8, 32)"]),
        (lambda c: c["model"]["encoder"].update(layers=2), ["encoder/layer_1", "no parameter"]),
        (
            lambda c: c["model"]["positions"].update(kind="none"),
            ["positions", "is not in its config"],
        ),
        (lambda c: c["model"].update(norm="none"), ["norm"]),
        (lambda c: c["model"].update(hiden=32), ["hiden", "hidden"]),
        (lambda c: c["model"].update(hidden="32"), ["hidden"]),
        (lambda c: c["model"].update(hidden=33), ["heads"]),
        (lambda c: c.pop("model"), ["model"]),
        (lambda c: c["model"].update(genes=41), ["40", "41", "genes.txt"]),
    ],
)
def test_config_that_does_not_fit(run_copy, change, words):
    edit(run_copy, change)
    text = message(CheckpointError, run_copy)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
        ("card.json", b"nothing"),
        ("card.json", b"[1, 2]"),
        ("genes.txt", b"\xff\xfe\x00"),
        ("genes.txt", b""),
    ],
)
def test_damaged_root_file(run_copy, name, content):
    (run_copy / name).write_bytes(content)
    message(CheckpointError, run_copy)


def test_every_damaged_file_of_a_step_is_noticed(tiny_model, tmp_path):
    """Whichever file is lost or cut, the answer is a clear message or the right numbers, never wrong numbers."""
    whole = tmp_path / "whole"
    tiny_model.save(whole)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    inside = [path for path in files if len(path.parts) > 1]
    assert len(inside) >= 3
    noticed = 0
    for number, name in enumerate(inside):
        for damage in ("delete", "cut", "empty"):
            copy = tmp_path / f"{number} {damage}"
            shutil.copytree(whole, copy)
            content = (copy / name).read_bytes()
            if damage == "delete":
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
            message = None
            try:
                opened = load(copy)
            except CheckpointError as error:
                message = str(error)
            if message is None:
                assert_same(opened.params, tiny_model.params)
            else:
                noticed += 1
                assert "\n" not in message
                assert "expected" in message
            shutil.rmtree(copy)
    assert noticed >= 3


def test_lost_parts_of_a_step(run_copy, tiny_model):
    for path in run_copy.iterdir():
        if path.name.isdigit():
            shutil.rmtree(path / "optimizer")  # weights are enough to open a model
    assert_same(load(run_copy).params, tiny_model.params)
    shutil.rmtree(run_copy / str(tiny_model.step) / "params")
    message(CheckpointError, run_copy)
    for path in run_copy.iterdir():
        if path.name.isdigit():
            shutil.rmtree(path)
    assert "no complete checkpoint" in message(CheckpointError, run_copy)


def test_weights_of_another_model(tiny_model, run_copy, tmp_path):
    params = {k: v for k, v in tiny_model.params.items() if k != "decoder"}
    other = dataclasses.replace(tiny_model, params=params)
    other.save(tmp_path / "model")
    assert "decoder" in message(CheckpointError, tmp_path / "model")


def test_the_bundled_model_opens_embeds_and_says_what_it_saw(tmp_path, monkeypatch):
    from cellplm_jax.data import datasets
    from cellplm_jax.tasks.embed import embed
    from cellplm_jax.tasks.pretrained import bundled_path

    monkeypatch.chdir(tmp_path)
    model = load("small")
    assert model.id == f"cellplm-small@{model.step}+{model.digest[:8]}"
    leaves = jax.tree.leaves(model.params)
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)
    size = sum(path.stat().st_size for path in bundled_path("small").rglob("*") if path.is_file())
    assert size <= 15e6
    scores = model.card["hidden_counts"]
    for other in ("gene means", "the same network, untrained"):
        assert scores["this model"]["nb_log_likelihood"] > scores[other]["nb_log_likelihood"]
    # Data whose terms were not read is not in it.
    assert not any("dlpfc" in part["dataset"] for part in model.card["training_data"])
    adata = embed(datasets.pbmc3k()[:50].copy(), model)
    assert adata.obsm["X_cellplm"].shape == (50, model.config.latent_size)
    assert adata.uns["cellplm"]["input"]["genes"]["genes_matched"] > 10_000


def test_half_precision_is_half_the_size_and_close(tiny_model, tmp_path):
    tiny_model.save(tmp_path / "half", half=True)
    again = load(tmp_path / "half")
    for one, two in zip(
        jax.tree.leaves(tiny_model.params), jax.tree.leaves(again.params), strict=True
    ):
        assert two.dtype == np.float32
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-6)


def test_a_misspelt_bundled_model_is_answered_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smal", "Small", "smlal"):
        with pytest.raises(CheckpointError, match=r"bundled model: small.* Did you mean 'small'\?"):
            load(name)
    with pytest.raises(CheckpointError, match=r"there is no directory 'runs/none'.*Check the path"):
        load("runs/none")


def test_home_is_expanded(tiny_run, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_run.parent))
    assert load(f"~/{tiny_run.name}").genes == load(tiny_run).genes
