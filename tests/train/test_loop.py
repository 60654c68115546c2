"""The training loop: it learns, repeats itself exactly, resumes as if nothing had happened, and refuses clearly."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.data.batches import Sample
from cellplm_jax.errors import CellPLMError, CheckpointError, InputError
from cellplm_jax.tasks.pretrained import load
from cellplm_jax.train import loop
from cellplm_jax.train.checkpoint import restore_item
from cellplm_jax.train.loop import gene_means, heldout_evaluation, heldout_masks, pretrain
from cellplm_jax.train.metrics import read_metrics
from cellplm_jax.train.sharding import make_mesh
from cellplm_jax.train.step import training_step
from tests.conftest import VOCABULARY, make_samples, tiny_train_config


class Interrupted(Exception):
    """What a test raises in the middle of a run."""


def run(workdir, config=None, *, samples=None, genes=VOCABULARY, stop_after=None):
    """Pretrain quietly; optionally die right after a step."""

    def on_step(step):
        if step == stop_after:
            raise Interrupted

    return pretrain(
        config or tiny_train_config(),
        samples or make_samples(),
        genes,
        workdir,
        card={"name": "tiny"},
        quiet=True,
        on_step=on_step,
    )


def history(workdir, split=None):
    """The metrics without what depends on the clock."""
    rows = read_metrics(workdir / "metrics.jsonl")
    for row in rows:
        row.pop("time"), row.pop("cells_per_second", None)
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
    card = json.loads((tiny_run / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["training_cells"] + card["heldout_cells"] == 120
    assert card["heldout_cells"] == 12
    best = max((r for r in heldout if r["step"]), key=lambda row: row["nb_log_likelihood"])["step"]
    assert steps_of(tiny_run) == sorted({20, 30, best})


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
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(workdir, stop_after=stop_after)
    assert len(traces) == 1  # one program for all steps
    assert steps_of(workdir)[-1:] == ([20] if stop_after == 20 else [])
    result = run(workdir)
    assert len(traces) == 2
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
            metrics = {"loss": 1.0, "gradient_norm": 1.0, "cells": 5.0}
            number = int(state.step) + 1
            state = state.replace(step=state.step + 1)
            return state, {k: np.float32(v) for k, v in change(number, metrics).items()}

        return step

    monkeypatch.setattr(loop, "compile_training_step", compiled)


def test_another_seed_is_another_run(tiny_run, tmp_path, monkeypatch):
    fake_step(monkeypatch)
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_train_config(seed=1), stop_after=1)
    one, two = history(tmp_path, "heldout")[0], history(tiny_run, "heldout")[0]
    assert one["nb_log_likelihood"] != two["nb_log_likelihood"]
    assert one["masked_correlation"] != two["masked_correlation"]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (XLA_FLAGS)")
def test_resuming_on_another_number_of_devices(tiny_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(workdir, stop_after=20)
    monkeypatch.setattr(loop, "make_mesh", lambda samples: make_mesh(samples, jax.devices()[:1]))
    run(workdir)
    for one, two in zip(history(workdir, "train"), history(tiny_run, "train"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


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


def test_workdir_of_other_genes_or_a_converted_model(run_copy, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="gene vocabulary"):
        run(run_copy, genes=VOCABULARY[::-1])
    tiny_model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="another run"):
        run(tmp_path / "model")


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


@pytest.mark.parametrize(("name", "value"), [("loss", math.nan), ("gradient_norm", math.inf)])
def test_divergence_is_one_message_and_keeps_what_was_saved(tmp_path, monkeypatch, name, value):
    fake_step(
        monkeypatch, lambda step, metrics: {**metrics, **({name: value} if step == 15 else {})}
    )
    with pytest.raises(CellPLMError, match=f"step 15: {name} not finite") as error:
        run(tmp_path / "run")
    assert "learning_rate" in str(error.value)
    # A changed configuration is refused in the same directory, so the message must not promise that.
    assert "and resume" not in str(error.value)
    assert steps_of(tmp_path / "run") == [10]
    assert load(tmp_path / "run").step == 10


def test_unusable_samples(tmp_path):
    def refuse(samples, words, **options):
        with pytest.raises(InputError, match=words):
            run(tmp_path / "run", samples=samples, **options)
        assert not (tmp_path / "run").exists()

    refuse([sample.take(np.arange(1)) for sample in make_samples()], "samples has 2 cells")
    refuse(make_samples(), "vocabulary 39", genes=VOCABULARY[:39])


def test_heldout_masks_are_fixed_and_hide_a_quarter():
    config = tiny_train_config()
    one, two = (list(heldout_masks(config, make_samples())) for _ in range(2))
    assert len(one) == 3
    for (batch, mask), (_, again) in zip(one, two, strict=True):
        np.testing.assert_array_equal(mask, again)
        cells = np.asarray(batch.cell_mask)
        assert cells.sum() == 16
        assert not np.asarray(mask)[~cells].any()
        assert np.asarray(mask)[cells].mean() == pytest.approx(0.25, abs=0.05)
    assert np.any(np.asarray(one[0][1]) != np.asarray(one[1][1]))
    assert heldout_evaluation(config, [])({}) == {}


def test_gene_means_leave_out_cells_that_do_not_measure_a_gene():
    counts = np.arange(12, dtype=np.float32).reshape(4, 3)
    first = Sample("a", sparse.csr_matrix(counts))
    measured = np.array([True, True, False])
    second = Sample("b", sparse.csr_matrix(counts[:2] * measured), measured=measured)
    wanted = [
        (counts[:, 0].sum() + counts[:2, 0].sum()) / 6,
        (counts[:, 1].sum() + counts[:2, 1].sum()) / 6,
        counts[:, 2].mean(),
    ]
    np.testing.assert_allclose(gene_means([first, second]), wanted, rtol=1e-6)


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
