"""The training loop: it learns, repeats itself exactly, resumes as if nothing had happened, and refuses clearly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from contextlib import nullcontext

import jax
import numpy as np
import pytest

from cellplm_jax.config import MeshConfig
from cellplm_jax.errors import CellPLMError, CheckpointError, InputError, MissingDependencyError
from cellplm_jax.tasks.pretrained import load
from cellplm_jax.train import loop
from cellplm_jax.train import workdir as workdir_module
from cellplm_jax.train.checkpoint import RunCheckpoints, restore_item
from cellplm_jax.train.heldout import HeldoutEvaluation, heldout_masks
from cellplm_jax.train.loop import pretrain
from cellplm_jax.train.metrics import read_metrics
from cellplm_jax.train.step import compile_training_step, training_step
from tests.conftest import VOCABULARY, make_samples, make_store, tiny_train_config

CLOCK = (
    "cells_per_second",
    "nonzeros_per_second",
    "data_wait",
    "eta_seconds",
    "model_flop_utilisation",
)
eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (XLA_FLAGS)")


class Labelled:
    """A store whose cells have labels: three kinds, by whichever of three genes counts most."""

    def __init__(self, store):
        self._store = store
        self.label_names = ["a", "b", "c"]

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read(self, sample, start, stop):
        found = self._store.read(sample, start, stop)
        labels = (np.arange(start, stop) % 4 - 1).astype(np.int32)
        return dataclasses.replace(found, labels=labels)


class Interrupted(Exception):
    """What a test raises in the middle of a run."""


def run(workdir, config=None, *, samples=None, genes=None, stop_after=None, **options):
    """Pretrain quietly; optionally die right after a step."""

    def on_step(step):
        if step == stop_after:
            raise Interrupted

    return pretrain(
        config or tiny_train_config(),
        make_store(samples, genes),
        workdir,
        card={"name": "tiny"},
        quiet=True,
        on_step=on_step,
        **options,
    )


def history(workdir, split=None):
    """The metrics without what depends on the clock."""
    rows = read_metrics(workdir / "metrics.jsonl")
    for row in rows:
        for name in ("time", *CLOCK):
            row.pop(name, None)
    return [row for row in rows if split in (None, row["split"])]


def steps_of(workdir):
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


def assert_same_state(one, two, step):
    for item in ("params", "optimizer"):
        first, _ = restore_item(one, item=item, step=step)
        second, _ = restore_item(two, item=item, step=step)
        assert jax.tree.structure(first) == jax.tree.structure(second)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_finished_run(tiny_run):
    train, heldout = history(tiny_run, "train"), history(tiny_run, "heldout")
    assert [row["step"] for row in train] == list(range(1, 31))
    assert [row["step"] for row in heldout] == [0, 10, 20, 30]
    assert all(value is not None for row in train + heldout for value in row.values())
    names = {"masked_correlation", "masked_correlation_per_gene", "nb_log_likelihood"}
    assert names < set(heldout[0])
    best = max((r for r in heldout if r["step"]), key=lambda row: row["nb_log_likelihood"])["step"]
    assert steps_of(tiny_run) == sorted({20, 30, best})
    assert [row["epoch"] for row in train] == sorted(row["epoch"] for row in train)
    assert all(0 <= row["padding"] < 1 for row in train)
    last = read_metrics(tiny_run / "metrics.jsonl")[-2]
    assert set(CLOCK) <= set(last)
    assert (last["step"], last["eta_seconds"]) == (30, 0)


def test_card_and_picture(tiny_run):
    card = json.loads((tiny_run / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["training_cells"] + card["heldout_cells"] == 120
    assert 6 <= card["heldout_cells"] <= 18
    training = card["training"]
    rows = history(tiny_run, "heldout")
    assert training["finished"]
    assert training["steps"] == training["heldout_final"]["step"] == 30
    assert training["heldout_final"]["masked_correlation"] == rows[-1]["masked_correlation"]
    best = max(rows[1:], key=lambda row: row["nb_log_likelihood"])
    assert training["heldout_best"] == {k: v for k, v in best.items() if k != "split"}
    assert training["cells_per_second"] > 0
    assert training["peak_flops"]["source"] == "measured"
    assert card["machine"]["devices"] == jax.device_count()
    assert card["versions"]["jax"] == jax.__version__
    picture = (tiny_run / "run.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_the_loss_falls(tiny_run):
    losses = [row["reconstruction"] for row in history(tiny_run, "train")]
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])
    before, *_, after = history(tiny_run, "heldout")
    for name in ("nb_log_likelihood", "masked_correlation_per_gene"):
        assert after[name] > before[name], name


@pytest.mark.parametrize("stop_after", [3, 20])
def test_resumed_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path, monkeypatch, stop_after):
    """Before the first checkpoint, resuming is repeating; after it, continuing. Either way the numbers are the same."""
    traces = []

    def counted(state, batch, config):
        traces.append(batch.gene.shape)
        return training_step(state, batch, config)

    monkeypatch.setattr("cellplm_jax.train.step.training_step", counted)
    compile_training_step.cache_clear()  # it may hold the program of the run to compare with
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(workdir, stop_after=stop_after)
    assert len(traces) == 1  # one program for all steps
    assert steps_of(workdir)[-1:] == ([20] if stop_after == 20 else [])
    result = run(workdir)
    assert len(traces) == 1  # nor another one for the rest of the run
    assert result.step == 30
    assert history(workdir) == history(tiny_run)
    assert_same_state(workdir, tiny_run, 30)
    assert load(workdir).step == load(tiny_run).step


def test_a_finished_run_is_left_alone(run_copy, monkeypatch):
    before = history(run_copy)
    monkeypatch.setattr(loop, "training_step", None, raising=False)
    result = run(run_copy)
    assert result.step == 30
    assert history(run_copy) == before
    last = before[-1]
    for name, value in result.heldout.items():
        assert value == pytest.approx(last[name], rel=1e-5)


def fake_step(monkeypatch, change=lambda step, metrics: metrics):
    """Replace the compiled step by one that only counts, for tests of the loop around it."""

    def compiled(config, mesh):
        def step(state, batch):
            metrics = {"loss": 1.0, "gradient_norm": 1.0, "cells": 5.0, "read_cells": 7.0}
            metrics |= {"slots": 8.0, "nonzeros": 50.0, "skipped": 0, "skipped_in_a_row": 0}
            number = int(state.step) + 1
            state = state.replace(step=state.step + 1)
            return state, {
                name: jax.numpy.asarray(value) for name, value in change(number, metrics).items()
            }

        return step

    monkeypatch.setattr(loop, "compile_training_step", compiled)


def test_another_seed_is_another_run(tiny_run, tmp_path, monkeypatch):
    fake_step(monkeypatch)
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_train_config(seed=1), stop_after=1)
    one, two = history(tmp_path, "heldout")[0], history(tiny_run, "heldout")[0]
    assert one["nb_log_likelihood"] != two["nb_log_likelihood"]
    assert one["masked_correlation"] != two["masked_correlation"]


@eight_devices
def test_resuming_on_another_mesh(tiny_run, tmp_path):
    """Started on eight devices along the rows; continued on four along the rows by two along the genes."""
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(workdir, stop_after=20)
    run(workdir, tiny_train_config(mesh=MeshConfig(genes=2)))
    for one, two in zip(history(workdir, "train"), history(tiny_run, "train"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["batch_checksum"] == two["batch_checksum"]
    assert json.loads((workdir / "config.json").read_text())["train"]["mesh"]["genes"] == 2


def test_what_changes_no_number_may_change(run_copy):
    changed = tiny_train_config(
        log_every=7, evaluate_every=9, checkpoint_every=3, keep_checkpoints=1, maximum_skipped=3
    )
    changed = dataclasses.replace(
        changed, data=dataclasses.replace(changed.data, threads=1, prefetch=1), rematerialize=True
    )
    assert run(run_copy, changed).step == 30


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: dataclasses.replace(c, steps=31), "steps"),
        (
            lambda c: dataclasses.replace(
                c, optimizer=dataclasses.replace(c.optimizer, learning_rate=1e-3)
            ),
            "optimizer.learning_rate",
        ),
        (
            lambda c: dataclasses.replace(
                c,
                model=dataclasses.replace(
                    c.model, latent=dataclasses.replace(c.model.latent, size=8)
                ),
            ),
            "model.latent.size",
        ),
    ],
)
def test_workdir_of_another_config(run_copy, change, key):
    before = history(run_copy)
    with pytest.raises(CheckpointError, match=key) as error:
        run(run_copy, change(tiny_train_config()))
    assert "expected" in str(error.value)
    assert history(run_copy) == before


def test_workdir_of_other_data_or_a_converted_model(run_copy, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="gene vocabulary"):
        run(run_copy, genes=VOCABULARY[::-1])
    for samples in (make_samples(2), make_samples(3, 41), make_samples(4)[::-1]):
        with pytest.raises(
            CheckpointError, match=r"another run.*data differ: 3 samples with 120 cells"
        ):
            run(run_copy, samples=samples)
    tiny_model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="another run"):
        run(tmp_path / "model")


def test_data_that_has_grown_continues_the_run(tmp_path, monkeypatch):
    """New batches start as the mean of the old; a process killed right after the first new start changes nothing."""
    config, workdir, seen = tiny_train_config(), tmp_path / "run", []
    with pytest.raises(Interrupted):
        run(workdir, config, stop_after=20)
    assert load(workdir, step=20).config.decoder.batches == 3
    restored = loop._restored_state

    def watched(*arguments):
        state, facts = restored(*arguments)
        seen.append(jax.device_get(state))
        return state, facts

    monkeypatch.setattr(loop, "_restored_state", watched)
    for stop_after in (22, None):
        with pytest.raises(Interrupted) if stop_after else nullcontext():
            run(workdir, config, samples=make_samples(5), stop_after=stop_after)
        content = json.loads((workdir / "config.json").read_text())
        assert content["model"]["decoder"]["batches"] == 5
        assert content["store"]["samples"] == 5

    # Right after growing, parameters and moments are the old ones, and new rows have no moments.
    params, _ = restore_item(workdir, step=20)
    table = params["decoder"]["batch_0"]["table"]
    for state in seen:
        assert (int(state.step), int(state.skipped)) == (20, 0)
        grown = state.params["decoder"]["batch_0"]["table"]
        np.testing.assert_array_equal(grown[:3], table)
        np.testing.assert_allclose(grown[3:], np.tile(table.mean(0), (2, 1)), rtol=1e-5, atol=1e-7)
        moments = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
            if "batch_0" in str(path) and "table" in str(path)
        }
        assert len(moments) == 2
        for moment in moments.values():
            assert np.any(moment[:3])
            assert not np.any(moment[3:])
        np.testing.assert_array_equal(
            state.params["embedder"]["gene_embedding"], params["embedder"]["gene_embedding"]
        )

    # The earlier step still opens: what it does not know is the mean of what it knows.
    old = load(workdir, step=20).params["decoder"]["batch_0"]["table"]
    np.testing.assert_allclose(old, seen[0].params["decoder"]["batch_0"]["table"], rtol=1e-5)
    after = load(workdir, step=30).params["decoder"]["batch_0"]["table"]
    assert after.shape[0] == 5
    assert np.any(after[3:] != old[3:])
    assert [row["step"] for row in history(workdir, "train")] == list(range(1, 31))
    card = json.loads((workdir / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["training_cells"] + card["heldout_cells"] == 200
    # Going back to fewer samples is another run.
    with pytest.raises(CheckpointError, match="data differ"):
        run(workdir, config)


def test_a_damaged_checkpoint_is_named(run_copy, tiny_run):
    for path in (run_copy / "30").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:8])
    # The run is finished at step 30, so resuming needs exactly that step.
    with pytest.raises(CheckpointError, match="damaged step"):
        run(run_copy)
    with pytest.raises(CheckpointError, match="damaged step"):
        load(run_copy)
    shutil.copytree(tiny_run / "30" / "metrics", run_copy / "30" / "metrics", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="step 30"):
        run(run_copy)
    shutil.rmtree(run_copy / "30")  # the remedy of the message
    run(run_copy)
    assert_same_state(run_copy, tiny_run, 30)


def skip(steps, name, value):
    """Metrics of a run in which some steps are skipped."""
    count = {"all": 0, "row": 0}

    def change(step, metrics):
        count["row"] = count["row"] + 1 if step in steps else 0
        count["all"] += step in steps
        metrics |= {"skipped": count["all"], "skipped_in_a_row": count["row"]}
        return {**metrics, **({name: value} if step in steps else {})}

    return change


@pytest.mark.parametrize(("name", "value"), [("loss", math.nan), ("gradient_norm", math.inf)])
def test_divergence_is_one_message_and_keeps_what_was_saved(tmp_path, monkeypatch, name, value):
    fake_step(monkeypatch, skip(range(15, 99), name, value))
    with pytest.raises(CellPLMError, match=f"step 17: {name} not finite") as error:
        run(tmp_path / "run", tiny_train_config(maximum_skipped=3))
    text = str(error.value)
    assert "3 steps in a row" in text
    assert "all parameters are finite (largest: " in text
    assert "its batch held" in text
    assert "learning_rate" in text
    # A changed configuration is refused in the same directory, so the message must not promise that.
    assert "and resume" not in text
    assert steps_of(tmp_path / "run") == [10]
    assert load(tmp_path / "run").step == 10
    rows = history(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == list(range(1, 18))
    assert rows[-1][name] is None


def test_single_bad_steps_are_counted_logged_and_passed(tmp_path, monkeypatch, capsys):
    fake_step(monkeypatch, skip({3, 4, 13}, "loss", math.nan))
    config = tiny_train_config(maximum_skipped=3, log_every=10)
    store = make_store()
    result = pretrain(config, store, tmp_path / "run")
    assert result.step == 30
    rows = {row["step"]: row for row in history(tmp_path / "run", "train")}
    assert list(rows) == [1, 3, 4, 10, 13, 20, 30]
    assert rows[30]["skipped"] == 3
    err = capsys.readouterr().err
    assert "step 4 skipped: loss not finite (2 in a row)" in err


def test_steps_that_are_not_finite_end_the_run_with_a_diagnosis(tmp_path, monkeypatch):
    """The real step, from a bias that is not a number."""
    monkeypatch.setattr(loop, "gene_means", lambda *_: np.full(len(VOCABULARY), np.nan, np.float32))
    with pytest.raises(CellPLMError, match=r"2 steps in a row were skipped.* step 2: ") as error:
        run(tmp_path / "run", tiny_train_config(maximum_skipped=2))
    text = str(error.value)
    assert "loss" in text
    assert "parameter decoder/log_mean/bias is not finite" in text
    assert "sample" in text.split("its batch held")[1]
    rows = history(tmp_path / "run", "train")
    assert [row["skipped_in_a_row"] for row in rows] == [1, 2]
    assert steps_of(tmp_path / "run") == []


def test_preemption_saves_the_step_and_leaves(tiny_run, tmp_path):
    asked = []

    def preempted(step):
        asked.append(step)
        return step == 13

    workdir = tmp_path / "run"
    result = run(workdir, preempted=preempted)
    assert (result.step, result.preempted, result.heldout) == (13, True, {})
    assert asked == list(range(1, 14))
    assert steps_of(workdir) == [10, 13]
    card = json.loads((workdir / "card.json").read_text())["training"]
    assert (card["steps"], card["finished"]) == (13, False)
    assert (workdir / "run.png").exists()
    # Where scores were due, they are computed when the run goes on: the grace period may be short.
    result = run(workdir, preempted=lambda step: step == 20)
    assert (result.step, result.preempted) == (20, True)
    assert [row["step"] for row in history(workdir, "heldout")] == [0, 10]
    result = run(workdir, preempted=lambda step: False)
    assert (result.step, result.preempted) == (30, False)
    assert history(workdir) == history(tiny_run)
    assert_same_state(workdir, tiny_run, 30)
    after = json.loads((workdir / "card.json").read_text())["training"]
    assert after["finished"]
    assert after["seconds"] > card["seconds"]


def test_asked_to_stop_after_the_last_step_is_done(tmp_path, monkeypatch):
    fake_step(monkeypatch)
    result = run(tmp_path, tiny_train_config(steps=3), preempted=lambda step: step == 3)
    assert (result.step, result.preempted) == (3, False)


def test_unusable_samples(tmp_path):
    with pytest.raises(InputError) as error:
        run(tmp_path / "run", samples=[sample.take(np.arange(1)) for sample in make_samples()])
    assert "expected" in str(error.value)
    model = dataclasses.replace(tiny_train_config().model, genes=39)
    with pytest.raises(InputError, match=r"has 40 genes, model\.genes is 39"):
        run(tmp_path / "run", tiny_train_config(model=model))
    assert not (tmp_path / "run").exists()


def test_no_room_for_checkpoints(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10_000)
    monkeypatch.setattr(workdir_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"MiB left; expected .* and the best are kept") as error:
        run(tmp_path / "run")
    assert "keep_checkpoints" in str(error.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        run(tmp_path / "file" / "run")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot be written"):
            run(tmp_path / "locked" / "run")


def test_a_full_disk_while_saving(tmp_path, monkeypatch):
    fake_step(monkeypatch)
    saved = RunCheckpoints.save

    def save(self, state, **options):
        if int(state.step) == 20:

            def full(*_, **__):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(self._manager, "save", full)
        saved(self, state, **options)

    monkeypatch.setattr(RunCheckpoints, "save", save)
    with pytest.raises(CheckpointError, match=r"step 20 of .*the disk is full"):
        run(tmp_path / "run")
    monkeypatch.setattr(RunCheckpoints, "save", saved)
    assert steps_of(tmp_path / "run") == [10]
    assert run(tmp_path / "run").step == 30


def test_data_that_cannot_be_read_is_the_message_of_the_store(tmp_path, monkeypatch):
    """Rows are read by other threads; what they meet is what the caller is told."""

    class Damaged(Labelled):
        reads = 0

        def read(self, sample, start, stop):
            self.reads += 1
            if self.reads > 40:
                msg = "part 'liver' is damaged; expected what was written. Prepare it again."
                raise InputError(msg)
            return super().read(sample, start, stop)

    fake_step(monkeypatch)
    with pytest.raises(InputError, match=r"^part 'liver' is damaged"):
        pretrain(tiny_train_config(), Damaged(make_store()), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "config.json").exists()


def test_heldout_masks_are_fixed_and_hide_a_quarter():
    config, store = tiny_train_config(), make_store()
    _, heldout = loop.split_heldout(store, config.data, config.seed)
    one, two = (list(heldout_masks(config, store, heldout)) for _ in range(2))
    for (batch, mask), (_, again) in zip(one, two, strict=True):
        np.testing.assert_array_equal(mask, again)
        cells = np.asarray(batch.cell_mask)
        assert not np.asarray(mask)[~cells].any()
        assert np.asarray(mask)[cells].mean() == pytest.approx(0.25, abs=0.06)
    total = sum(int(np.asarray(batch.cell_mask).sum()) for batch, _ in one)
    assert total == sum(part.stop - part.start for part in heldout)
    nothing = HeldoutEvaluation(config, store, [])
    assert nothing({}) == {}
    assert nothing.probe({}) == {}


def test_a_run_without_heldout_data(tmp_path, monkeypatch):
    fake_step(monkeypatch)
    config = tiny_train_config(steps=2)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, heldout_fraction=0.0)
    )
    result = run(tmp_path / "run", config)
    assert result.heldout == {}
    assert {row["split"] for row in history(tmp_path / "run")} == {"train"}
    assert load(tmp_path / "run").step == 2
    assert math.isfinite(result.cells_per_second)
    assert (
        json.loads((tmp_path / "run" / "card.json").read_text())["training"]["heldout_best"] is None
    )


def test_rhythm_of_saving_and_evaluating(tmp_path, monkeypatch):
    """Saves between evaluations carry no score; the last step is always logged, scored and saved."""
    fake_step(monkeypatch)
    config = tiny_train_config(
        steps=11, log_every=4, evaluate_every=3, checkpoint_every=2, keep_checkpoints=9
    )
    run(tmp_path, config)
    assert [row["step"] for row in history(tmp_path, "train")] == [1, 4, 8, 11]
    assert [row["step"] for row in history(tmp_path, "heldout")] == [0, 3, 6, 9, 11]
    assert steps_of(tmp_path) == [2, 4, 6, 8, 10, 11]
    scored = [n for n in steps_of(tmp_path) if any((tmp_path / str(n) / "metrics").glob("*"))]
    assert scored == [6, 11]


def test_the_probe_scores_labelled_heldout_cells(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scanpy", reason="needs the extra 'eval'")
    fake_step(monkeypatch)
    config = tiny_train_config(steps=5, probe_every=2, evaluate_every=5)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, heldout_fraction=0.5)
    )
    pretrain(config, Labelled(make_store()), tmp_path / "run", quiet=True)
    rows = history(tmp_path / "run", "probe")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row in rows:
        assert set(row) == {"step", "split", "knn_accuracy", "ari", "batch_mixing"} or (
            set(row) == {"step", "split", "knn_accuracy", "ari"}
        )
        assert 0 <= row["knn_accuracy"] <= 1

    def absent(*_, **__):
        msg = "Leiden clustering needs the Python package 'scanpy'"
        raise MissingDependencyError(msg)

    # Told to stop where a probe is due, a run makes up for it when it goes on.
    store, stopped = Labelled(make_store()), tmp_path / "stopped"
    pretrain(config, store, stopped, quiet=True, preempted=lambda step: step == 4)
    assert [row["step"] for row in history(stopped, "probe")] == [0, 2]
    pretrain(config, store, stopped, quiet=True)
    assert history(stopped) == history(tmp_path / "run")

    monkeypatch.setattr("cellplm_jax.train.heldout.leiden_clusters", absent)
    pretrain(config, Labelled(make_store()), tmp_path / "without")
    assert "knn_accuracy" in history(tmp_path / "without", "probe")[0]
    assert capsys.readouterr().err.count("needs the Python package 'scanpy'") == 1
    # Without labels there is nothing to probe.
    run(tmp_path / "plain", config)
    assert history(tmp_path / "plain", "probe") == []
