"""Checkpoints: what was saved comes back, on any devices; the right steps are kept; damage is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil

import jax
import numpy as np
import pytest

from cellplm_jax.config import MeshConfig
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
from cellplm_jax.train.covariates import grow_rows
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
        skipped=np.int32(step // 2),
        skipped_in_a_row=np.int32(step % 2),
    )


def abstract(state: TrainState, devices: int = 1) -> TrainState:
    """Shapes of a state, to lie whole on each of some devices."""
    sharding = replicated(make_mesh(MeshConfig(), jax.devices()[:devices]))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), state
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
        "manifest.json",
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
    mesh = make_mesh(MeshConfig(), jax.devices()[:before])
    state = jax.device_put(small_state(3, 0.1), replicated(mesh))
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(state)
    checkpoints.close()
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    restored = checkpoints.restore(abstract(state, after), 3)
    checkpoints.close()
    assert (int(restored.step), int(restored.skipped), int(restored.skipped_in_a_row)) == (3, 1, 1)
    for one, two in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert one.sharding.num_devices == after
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    params, _ = restore_item(tmp_path)
    np.testing.assert_array_equal(params["a"]["kernel"], state.params["a"]["kernel"])


def test_a_step_is_saved_once_and_carries_the_facts_of_the_run(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    checkpoints.save(small_state(3), facts={"seed": 7, "rows": {"batches": 2}})
    checkpoints.save(small_state(3, 5.0))
    checkpoints.wait()
    checkpoints.save(small_state(3, 5.0))
    checkpoints.close()
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    checkpoints.save(small_state(3, 5.0))
    assert checkpoints.run_facts(3) == {
        "step": 3,
        "skipped": 1,
        "skipped_in_a_row": 1,
        "seed": 7,
        "rows": {"batches": 2},
    }
    checkpoints.close()
    np.testing.assert_array_equal(restore_item(tmp_path)[0]["a"]["kernel"], np.full((3, 4), 3.0))


def test_a_step_that_is_no_longer_kept_disappears_at_once(tmp_path, monkeypatch):
    """A process killed while files are removed must not leave a step with half of them."""
    monkeypatch.setattr(RunCheckpoints, "_remove", lambda self, folders: None)
    save_steps(tmp_path, {1: None, 2: None, 3: None}, keep=1)
    assert kept_steps(tmp_path) == [3]
    [trash] = [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.isdigit()]
    assert trash.name.startswith(".")
    shutil.rmtree(trash / "1" / "params")
    monkeypatch.undo()
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    assert not trash.exists()


def test_covariates_grow_by_the_mean_and_their_moments_by_zero():
    old = {
        "decoder": {
            "batch_0": {"table": np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)},
            "dataset_0": {"table": np.ones((1, 2), np.float32)},
            "layer_0": {"kernel": np.ones((2, 2), np.float32)},
        },
        "latent": {"discriminator": {"logits": {"bias": np.array([0.0, 4.0], np.float32)}}},
    }
    wanted = jax.tree.map(lambda leaf: leaf, old)
    wanted["decoder"]["batch_0"] = {"table": jax.ShapeDtypeStruct((4, 2), np.float32)}
    wanted["latent"] = {
        "discriminator": {"logits": {"bias": jax.ShapeDtypeStruct((4,), np.float32)}}
    }
    wanted["decoder"]["layer_0"] = {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}
    grown = grow_rows(old, wanted)
    np.testing.assert_array_equal(
        grown["decoder"]["batch_0"]["table"], [[1, 2], [3, 6], [2, 4], [2, 4]]
    )
    np.testing.assert_array_equal(grown["latent"]["discriminator"]["logits"]["bias"], [0, 4, 2, 2])
    assert grown["decoder"]["layer_0"]["kernel"].shape == (2, 2)  # whatever is no covariate stays
    assert grown["decoder"]["dataset_0"]["table"] is old["decoder"]["dataset_0"]["table"]
    moments = grow_rows({"mu": old}, {"mu": wanted}, new="zero")["mu"]
    np.testing.assert_array_equal(moments["decoder"]["batch_0"]["table"][2:], np.zeros((2, 2)))
    traced = jax.eval_shape(lambda tree: grow_rows(tree, wanted), old)
    assert traced["decoder"]["batch_0"]["table"].shape == (4, 2)


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk_is_one_message_and_earlier_steps_are_intact(tmp_path, monkeypatch, late):
    """Whether the disk is full when the save begins, or while files are written in the background."""
    save_steps(tmp_path, {1: None})
    checkpoints = RunCheckpoints(tmp_path, keep=2)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    manager = checkpoints._manager
    monkeypatch.setattr(manager, "wait_until_finished" if late else "save", full)
    with pytest.raises(CheckpointError, match="the disk is full") as error:
        checkpoints.save(small_state(2))
    assert "intact" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    checkpoints.close()
    assert restore_item(tmp_path)[1] == 1


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
    assert "step 2" in text_of(lambda: checkpoints.restore(abstract(small_state(2)), 2))
    checkpoints.close()
    shutil.rmtree(tmp_path / "2")  # the remedy of the message
    assert restore_item(tmp_path)[1] == 1


def test_another_shape_is_refused(tmp_path):
    save_steps(tmp_path, {1: None})
    state = small_state(1)
    params = {**state.params, "a": {"kernel": np.zeros((3, 5), np.float32)}}
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    wanted = abstract(dataclasses.replace(state, params=params))
    text_of(lambda: checkpoints.restore(wanted, 1))
    checkpoints.close()


def test_a_save_that_was_cut_off_is_not_a_step(tmp_path):
    """What a killed process leaves: a step directory under its temporary name."""
    save_steps(tmp_path, {1: None})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-7")
    assert restore_item(tmp_path)[1] == 1
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() == 1
    checkpoints.close()
    assert kept_steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*tmp*"))  # what it left takes no room for long


def test_cloud_storage(tmp_path):
    """Root files, steps with their best one, and removal of old and of unfinished ones, at an address."""
    pytest.importorskip("gcsfs", reason="needs the extra 'gcp'")
    from tests.stand_ins.gcs import cloud_storage

    with cloud_storage() as storage:
        address = "gs://bucket/runs/one"
        config = tiny_train_config()
        files = ModelFiles(config.model, VOCABULARY, {"name": "x"}, config, store={"samples": 1})
        write_root(address, files)
        assert read_root(address) == files
        storage.put("bucket", "runs/one/tensorboard/events.out", b"kept")
        storage.put("bucket", "runs/one/9/params/half", b"cut off")
        save_steps(address, {1: -3.0, 2: -1.0, 3: -2.0}, keep=1)
        found = {name.split("/")[2] for _, name in storage.objects}
        root = {"config.json", "genes.txt", "card.json", "manifest.json"}
        assert found == {"2", "3", *root, "tensorboard"}
        assert restore_item(address)[1] == 2
        checkpoints = RunCheckpoints(address, keep=1)
        restored = checkpoints.restore(abstract(small_state(3), jax.device_count()), 3)
        assert (checkpoints.latest_step(), int(restored.step)) == (3, 3)
        checkpoints.close()
        assert has_item(address, "optimizer")
        assert not has_item(address, "unused")


def test_config_json_is_plain(tiny_run):
    content = json.loads((tiny_run / "config.json").read_text())
    assert set(content) == {"format", "model", "train", "store"}
    assert content["store"]["samples"] == 3
    assert content["model"]["encoder"]["kind"] == "flow"
    assert content["train"]["steps"] == 30
    assert (tiny_run / "genes.txt").read_text().split() == VOCABULARY
