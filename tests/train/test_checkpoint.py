"""Checkpoints: what was saved comes back, on any devices; the right steps are kept; damage is named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from cellplm_jax.errors import CheckpointError
from cellplm_jax.train.checkpoint import (
    ModelFiles,
    RunCheckpoints,
    has_item,
    read_root,
    restore_item,
    save_model,
    write_root,
)
from cellplm_jax.train.sharding import make_mesh, replicated
from cellplm_jax.train.state import TrainState
from tests.conftest import VOCABULARY, tiny_train_config

METRIC = "nb_log_likelihood"


def small_state(step: int, scale: float = 1.0) -> TrainState:
    """Any tree will do; the values tell the step."""
    params = {"a": {"kernel": np.full((3, 4), step * scale, np.float32)}, "b": np.float32(step)}
    return TrainState(
        step=np.int32(step),
        params=jax.tree.map(jax.numpy.asarray, params),
        optimizer={"moment": jax.numpy.arange(4.0) + step},
    )


def save_steps(directory, scores: dict[int, float | None], *, keep: int = 2):
    checkpoints = RunCheckpoints(directory, keep=keep)
    for step, score in scores.items():
        checkpoints.save(small_state(step), metrics=None if score is None else {METRIC: score})
    checkpoints.close()


def kept_steps(directory) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_root_files_round_trip(tmp_path):
    config = tiny_train_config(seed=5)
    files = ModelFiles(config.model, VOCABULARY, {"name": "ü", "deep": {"x": [1, None]}}, config)
    write_root(tmp_path / "new" / "run", files)
    assert read_root(tmp_path / "new" / "run") == files
    bare = ModelFiles(config.model, VOCABULARY, published={"enc_mod": "mlp"})
    write_root(tmp_path / "bare", bare)
    assert read_root(tmp_path / "bare") == bare
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == [
        "card.json",
        "config.json",
        "genes.txt",
    ]


def test_latest_and_best_are_kept(tmp_path):
    save_steps(tmp_path, {1: -3.0, 2: -1.0, 3: -2.0, 4: -5.0, 5: -4.0, 6: -4.5}, keep=2)
    assert kept_steps(tmp_path) == [2, 5, 6]
    params, step = restore_item(tmp_path)
    assert step == 2  # the best, not the latest
    np.testing.assert_array_equal(params["a"]["kernel"], np.full((3, 4), 2, np.float32))
    params, step = restore_item(tmp_path, step=6)
    assert (float(params["b"]), step) == (6.0, 6)
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() == 6
    checkpoints.close()


def test_steps_without_scores(tmp_path):
    """A checkpoint between two evaluations has no score: it is never the best, and the best is still kept."""
    save_steps(tmp_path, {1: None, 2: -1.0, 3: None, 4: -2.0, 5: None, 6: None}, keep=1)
    assert kept_steps(tmp_path) == [2, 6]
    assert restore_item(tmp_path)[1] == 2


def test_without_any_score_the_latest_is_opened(tmp_path):
    save_steps(tmp_path, {1: None, 2: None, 3: None}, keep=2)
    assert kept_steps(tmp_path) == [2, 3]
    assert restore_item(tmp_path)[1] == 3


def test_restored_arrays_are_equal_numpy_arrays(tmp_path):
    random = np.random.default_rng(0)
    params = {
        "x": {"kernel": random.normal(size=(5, 7)).astype(np.float32)},
        "scalar": np.float32(0.25),
        "odd/name.with.dots": np.array([np.pi, -0.0, 1e-38], np.float32),
    }
    unused = {"some.torch.name": np.arange(3, dtype=np.int64)}
    config = tiny_train_config()
    files = ModelFiles(config.model, VOCABULARY)
    save_model(tmp_path / "model", files, params, unused=unused, step=7)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert has_item(tmp_path / "model", "unused")
    assert not has_item(tmp_path / "model", "optimizer")
    restored, step = restore_item(tmp_path / "model")
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for one, two in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert isinstance(one, np.ndarray)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    restored, _ = restore_item(tmp_path / "model", item="unused")
    np.testing.assert_array_equal(restored["some.torch.name"], np.arange(3))


def test_a_failed_save_leaves_nothing(tmp_path):
    files = ModelFiles(tiny_train_config().model, VOCABULARY)
    with pytest.raises(Exception):  # noqa: B017, PT011 - any failure will do
        save_model(tmp_path / "model", files, {"x": object()})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(tmp_path / "taken", files, {"x": np.zeros(1)})
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(tmp_path / "taken" / "file", files, {"x": np.zeros(1)})
    assert (tmp_path / "taken" / "file").read_text() == "x"


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (XLA_FLAGS)")
@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 4)])
def test_another_number_of_devices(tmp_path, before, after):
    devices = jax.devices()
    state = jax.device_put(small_state(3, 0.1), replicated(make_mesh(8, devices[:before])))
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(state)
    checkpoints.close()
    sharding = replicated(make_mesh(8, devices[:after]))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    restored = checkpoints.restore(abstract, 3)
    checkpoints.close()
    assert int(restored.step) == 3
    for one, two in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert one.sharding.num_devices == after
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    params, _ = restore_item(tmp_path)
    np.testing.assert_array_equal(params["a"]["kernel"], state.params["a"]["kernel"])


def test_optimizer_state_of_a_run_comes_back(tiny_run):
    params, step = restore_item(tiny_run, step=30)
    optimizer, _ = restore_item(tiny_run, item="optimizer", step=30)
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(params)}
    moments = [np.shape(leaf) for leaf in jax.tree.leaves(optimizer) if np.shape(leaf)]
    assert step == 30
    assert set(moments) == shapes - {()}
    assert any(np.any(leaf) for leaf in jax.tree.leaves(optimizer))


def text_of(call) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    text = str(error.value)
    assert "expected" in text
    assert "\n" not in text
    return text


def test_absent_steps_and_items(tmp_path, tiny_run):
    assert "no complete checkpoint" in text_of(lambda: restore_item(tmp_path))
    assert "99" in text_of(lambda: restore_item(tiny_run, step=99))
    text_of(lambda: restore_item(tiny_run, item="unused"))


def test_damaged_step_is_named(tmp_path):
    save_steps(tmp_path, {1: None, 2: None})
    data = max((tmp_path / "2" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    for path in (tmp_path / "2" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    assert data.exists()
    assert "step 2" in text_of(lambda: restore_item(tmp_path))
    assert restore_item(tmp_path, step=1)[1] == 1
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small_state(2)
    )
    sharding = replicated(make_mesh(1))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), small_state(2)
    )
    assert "step 2" in text_of(lambda: checkpoints.restore(abstract, 2))
    checkpoints.close()
    shutil.rmtree(tmp_path / "2")  # the remedy of the message
    assert restore_item(tmp_path)[1] == 1


def test_another_shape_is_refused(tmp_path):
    save_steps(tmp_path, {1: None})
    sharding = replicated(make_mesh(1))
    state = small_state(1)
    params = {**state.params, "a": {"kernel": np.zeros((3, 5), np.float32)}}
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        dataclasses.replace(state, params=params),
    )
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    text_of(lambda: checkpoints.restore(abstract, 1))
    checkpoints.close()


def test_a_save_that_was_cut_off_is_not_a_step(tmp_path):
    """What a killed process leaves: a step directory under its temporary name."""
    save_steps(tmp_path, {1: None})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-7")
    assert restore_item(tmp_path)[1] == 1
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() == 1
    checkpoints.close()


def test_config_json_is_plain(tiny_run):
    content = json.loads((tiny_run / "config.json").read_text())
    assert set(content) == {"format", "model", "train"}
    assert content["model"]["encoder"]["kind"] == "flow"
    assert content["train"]["steps"] == 30
    assert (tiny_run / "genes.txt").read_text().split() == VOCABULARY
