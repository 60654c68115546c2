"""Weights as safetensors: the same numbers as Orbax, and one clear message for everything that is not whole."""

from __future__ import annotations

import json
import shutil
import struct
import sys

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from cellplm_jax.errors import CheckpointError, MissingDependencyError
from cellplm_jax.tasks.pretrained import load
from cellplm_jax.train.checkpoint import has_item, restore_item, weight_format

pytest.importorskip("safetensors", reason="needs the extra 'hub'")
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """The tiny model as safetensors. Read only."""
    directory = tmp_path_factory.mktemp("tensors") / "model"
    tiny_model.save(directory, format="safetensors")
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def header(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rewrite(path, head, data):
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    (path.parent / "manifest.json").unlink(missing_ok=True)


def message(directory, **options):
    with pytest.raises(CheckpointError) as error:
        load(directory, **options)
    text = str(error.value)
    assert "expected" in text
    assert "\n" not in text
    return text


def assert_same(one, two):
    one, two = flatten_dict(one), flatten_dict(two)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name], err_msg=name)


def test_the_same_model_in_both_formats(tiny_model, saved, tmp_path):
    assert {path.name for path in saved.iterdir()} == {
        "config.json",
        "genes.txt",
        "card.json",
        "manifest.json",
        FILE,
    }
    assert weight_format(saved) == "safetensors"
    again = load(saved)
    assert_same(again.params, tiny_model.params)
    assert (again.config, again.genes, again.card, again.step) == (
        tiny_model.config,
        tiny_model.genes,
        tiny_model.card,
        tiny_model.step,
    )
    again.save(tmp_path / "orbax")
    assert weight_format(tmp_path / "orbax") == "orbax"
    assert_same(load(tmp_path / "orbax").params, tiny_model.params)
    names = set(header(saved / FILE)[0]) - {"__metadata__"}
    assert names == {"/".join(path) for path in flatten_dict(tiny_model.params)}
    assert has_item(saved, "params")
    assert not has_item(saved, "optimizer")
    assert not has_item(saved, "estimator")


def test_half_precision(tiny_model, saved, tmp_path):
    tiny_model.save(tmp_path / "half", format="safetensors", half=True)
    size, half = (folder / FILE for folder in (saved, tmp_path / "half"))
    assert len(header(half)[1]) * 2 == len(header(size)[1])
    for one, two in zip(
        jax.tree.leaves(tiny_model.params), jax.tree.leaves(load(half.parent).params), strict=True
    ):
        assert two.dtype == np.float32
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-6)


def test_views_and_transposed_arrays_keep_their_numbers(tmp_path):
    from cellplm_jax.train.tensors import read_tensors, write_tensors

    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"a/b": wide.T, "part": wide[1:3, ::2], "number": np.array(7), "none": wide[:0]}
    write_tensors(tmp_path / "x.safetensors", arrays, step=3)
    found, step = read_tensors(epath.Path(tmp_path / "x.safetensors"))
    assert step == 3
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text", "flip"])
def test_damaged_files_are_noticed(copy, damage):
    content = (copy / FILE).read_bytes()
    changed = {
        "cut": content[:-100],
        "header": content[:20],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n" * 3,
        "flip": content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
    }[damage]
    (copy / FILE).write_bytes(changed)
    text = message(copy)
    assert FILE in text
    assert ("checksum" in text) == (damage == "flip")


def test_files_from_elsewhere_need_no_checksum(copy, tiny_model):
    head, data = header(copy / FILE)
    del head["__metadata__"]
    rewrite(copy / FILE, head, data)
    opened = load(copy)
    assert_same(opened.params, tiny_model.params)
    assert opened.step == 0


def test_weights_that_do_not_fit(copy):
    head, data = header(copy / FILE)
    name = next(name for name in head if name.startswith("decoder/"))
    renamed = {("decoder/other" if key == name else key): value for key, value in head.items()}
    del renamed["__metadata__"]
    rewrite(copy / FILE, renamed, data)
    assert name in message(copy)
    renamed = {("decoder" if key == name else key): value for key, value in head.items()}
    del renamed["__metadata__"]
    rewrite(copy / FILE, renamed, data)
    message(copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["latent"]["size"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    message(copy)


def test_one_step_and_one_format(copy, tiny_model, tmp_path):
    assert restore_item(copy, step=tiny_model.step)[1] == tiny_model.step
    assert f"one of {tiny_model.step}" in message(copy, step=tiny_model.step + 1)
    (copy / "7").mkdir()
    assert "also the steps 7" in message(copy)
    with pytest.raises(CheckpointError, match="'pickle'; expected 'orbax' or 'safetensors'"):
        tiny_model.save(tmp_path / "other", format="pickle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_library(copy, tiny_model, tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[hub\]"):
        load(copy)
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[hub\]"):
        tiny_model.save(tmp_path / "new", format="safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_in_buckets(tiny_run, tiny_model, saved):
    """Work directories and exchanged models open from gs:// addresses like from folders."""
    pytest.importorskip("gcsfs", reason="needs the extra 'gcp'")
    from tests.stand_ins.gcs import cloud_storage

    with cloud_storage() as storage:
        storage.add_folder(tiny_run, "bucket", "runs/tiny")
        storage.add_folder(saved, "bucket", "models/tiny")
        for address in ("gs://bucket/runs/tiny", "gs://bucket/models/tiny"):
            opened = load(address)
            assert_same(opened.params, tiny_model.params)
            assert (opened.source, opened.step) == (address, tiny_model.step)
        with pytest.raises(CheckpointError, match="no directory 'gs://bucket/models/none'"):
            load("gs://bucket/models/none")
