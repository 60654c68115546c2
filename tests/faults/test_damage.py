"""Damage in files that are loaded: refused with one message, or without effect."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

import cellplm_jax
from cellplm_jax import manifest
from cellplm_jax.errors import CheckpointError
from cellplm_jax.manifest import MANIFEST_FILE, Manifest, replace_files, write_manifest
from cellplm_jax.tasks.pretrained import bundled_path, load
from tests.conftest import make_adata
from tests.faults import campaign_damage as campaign

CASES = 56


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return campaign.prepare(tmp_path_factory.mktemp("formats"))


def test_random_places_of_every_format(formats):
    outcomes = [campaign.try_case(formats, seed) for seed in range(CASES)]
    assert {outcome.kind for outcome in outcomes} == set(formats)
    assert [f"{o.result}: {o.detail}" for o in outcomes if not o.ok] == []
    assert sum(outcome.result == "refused" for outcome in outcomes) > CASES / 4


def test_the_campaign_notices_silent_damage(formats):
    """Without its checksums, a changed number of a config is silent."""
    example = dataclasses.replace(formats["checkpoint"], files=("config.json",))
    (example.path / MANIFEST_FILE).rename(example.path.with_name("kept"))
    try:
        text = (example.path / "config.json").read_text()
        (example.path / "config.json").write_text(text.replace("10000", "10001"))
        assert example.read(example.path) != example.intact
    finally:
        (example.path / "config.json").write_text(text)
        example.path.with_name("kept").rename(example.path / MANIFEST_FILE)
    assert example.read(example.path) == example.intact


@pytest.fixture
def model_copy(formats, tmp_path):
    return shutil.copytree(formats["checkpoint"].path, tmp_path / "model")


def test_a_reversed_vocabulary_is_refused(model_copy):
    genes = (model_copy / "genes.txt").read_text().split()
    (model_copy / "genes.txt").write_text("\n".join(reversed(genes)) + "\n")
    with pytest.raises(CheckpointError, match=r"'genes.txt' differs from its checksum.*delete man"):
        load(model_copy)


def test_a_folder_without_checksums_opens_with_one_remark(model_copy, caplog, formats):
    (model_copy / MANIFEST_FILE).unlink()
    manifest._told.clear()
    with caplog.at_level(logging.WARNING, logger="cellplm_jax"):
        logging.getLogger("cellplm_jax").setLevel(logging.WARNING)
        model = load(model_copy)
        load(model_copy)
    assert [r.message for r in caplog.records if "no checksums" in r.message] == [
        f"'{model_copy}' has no checksums, so damage cannot be detected; saving the model again adds them."
    ]
    model.save(model_copy.with_name("again"))
    assert load(model_copy.with_name("again")).digest == model.digest


def test_weights_that_are_not_finite(tmp_path):
    model = campaign.tiny_untrained()
    model.params["latent"]["mean"]["bias"] = np.full_like(
        model.params["latent"]["mean"]["bias"], np.nan
    )
    for format in ("orbax", "safetensors"):
        model.save(tmp_path / format, format=format)
        with pytest.raises(CheckpointError, match=r"16 weights that are NaN .*latent/mean/bias"):
            load(tmp_path / format)


def test_files_can_be_replaced_at_any_time(tmp_path, monkeypatch):
    """After an interruption between two files, both the old and the new contents are valid."""
    replace_files(tmp_path, {"one": "1", "two": "2"})
    written = manifest.atomic_write_text

    def interrupted(path, text):
        if path.name == "two":
            raise KeyboardInterrupt
        written(path, text)

    monkeypatch.setattr(manifest, "atomic_write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_files(tmp_path, {"one": "10", "two": "20"})
    opened = Manifest(tmp_path)
    assert (opened.read("one"), opened.read("two")) == (b"10", b"2")
    monkeypatch.setattr(manifest, "atomic_write_text", written)
    replace_files(tmp_path, {"one": "100"})
    (tmp_path / "one").write_text("10")
    with pytest.raises(CheckpointError, match="'one' differs"):
        Manifest(tmp_path).read("one")


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    replace_files(tmp_path, {"one": "1"})
    opened = Manifest(tmp_path)
    replace_files(tmp_path, {"one": "2"})
    assert opened.read("one") == b"2"


def test_lost_files_and_a_damaged_manifest(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")
    write_manifest(tmp_path)
    (tmp_path / "deep" / "file").unlink()
    with pytest.raises(CheckpointError, match="'deep/file' is missing"):
        Manifest(tmp_path).verify([""])
    text = (tmp_path / MANIFEST_FILE).read_text()
    (tmp_path / MANIFEST_FILE).write_text(text.replace("deep/file", "deep/fila"))
    with pytest.raises(CheckpointError, match="its own checksum differs"):
        Manifest(tmp_path)


def test_every_step_of_a_run_has_checksums(formats, tmp_path):
    run = formats["work directory"].path
    assert all((run / step / MANIFEST_FILE).is_file() for step in ("1", "2"))
    listed = json.loads((run / "1" / MANIFEST_FILE).read_text())["files"]
    assert any(name.startswith("optimizer/") for name in listed)


def test_a_deleted_work_directory_stops_a_run(tmp_path):
    from cellplm_jax.train.checkpoint import RunCheckpoints
    from cellplm_jax.train.state import TrainState

    campaign._run(tmp_path / "run")
    checkpoints = RunCheckpoints(tmp_path / "run", keep=2)
    shutil.rmtree(tmp_path / "run")
    state = TrainState(step=3, params={}, optimizer=(), skipped=0, skipped_in_a_row=0)
    with pytest.raises(CheckpointError, match="step 3 was not saved"):
        checkpoints.save(state)


def test_the_name_of_a_model_tells_its_weights(formats, tmp_path):
    model = campaign.tiny_untrained()
    name, _, digest = model.id.partition("+")
    assert (name, digest) == ("tiny@0", model.digest[:8])
    model.save(tmp_path / "tensors", format="safetensors")
    assert load(tmp_path / "tensors").id == load(formats["checkpoint"].path).id == model.id
    # This estimator did not change the weights.
    assert load(formats["estimator"].path).id == model.id
    tuned = {"kind": "fine-tuned", "task": "annotation"}
    tuned = dataclasses.replace(model, card={**model.card, **tuned})
    assert tuned.id == f"tiny@0-annotation+{digest}"
    changed = dataclasses.replace(model, params={**model.params, "centre": np.ones(3)})
    assert changed.id != model.id


def test_predictions_tell_their_estimator(formats):
    annotator = cellplm_jax.CellTypeAnnotator.load(formats["estimator"].path, quiet=True)
    adata = annotator.predict(make_adata(20))
    facts = adata.uns["cellplm_annotation"]
    assert facts["estimator"] == annotator.id
    assert facts["model"] == annotator.model.id
    annotator._reference[0][0] += 1
    assert annotator.id != facts["estimator"]


def test_the_bundled_model_has_checksums():
    folder = Manifest(bundled_path("small"))
    folder.verify([""])
    files = {
        path.relative_to(bundled_path("small")).as_posix()
        for path in bundled_path("small").rglob("*")
        if path.is_file()
    }
    assert set(folder.entries) == files - {MANIFEST_FILE}
