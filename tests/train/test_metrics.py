"""Held-out scores against numpy and scipy, the metrics file, and the progress lines."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from scipy import stats

from cellplm_jax.train.metrics import MetricsWriter, ProgressReport, heldout_scores, read_metrics


def sums_of(x, y, hidden, nll):
    parts = {"n": hidden, "x": x * hidden, "y": y * hidden}
    parts |= {"xx": x * x * hidden, "yy": y * y * hidden, "xy": x * y * hidden}
    sums = {name: value.sum(axis=0).astype(np.float32) for name, value in parts.items()}
    return {**sums, "nll": np.float32((nll * hidden).sum()), "entries": np.float32(hidden.sum())}


def test_scores_against_scipy():
    random = np.random.default_rng(0)
    x = np.log1p(random.poisson(2.0, (60, 9)))
    y = 0.5 * x + random.normal(0, 0.4, x.shape)
    x[:, 3] = 0.0  # a gene nobody expresses
    y[:, 4] = 1.0  # a gene predicted as constant
    hidden = random.random(x.shape) < 0.4
    nll = random.gamma(2.0, 1.0, x.shape)
    halves = [sums_of(x[p], y[p], hidden[p], nll[p]) for p in (slice(0, 25), slice(25, 60))]
    scores = heldout_scores(halves)
    together = stats.pearsonr(x[hidden], y[hidden]).statistic
    assert scores["masked_correlation"] == pytest.approx(together, abs=1e-5)
    genes = [g for g in range(9) if g not in (3, 4)]
    each = [stats.pearsonr(x[hidden[:, g], g], y[hidden[:, g], g]).statistic for g in genes]
    assert scores["masked_correlation_per_gene"] == pytest.approx(np.mean(each), abs=1e-5)
    assert scores["nb_log_likelihood"] == pytest.approx(-nll[hidden].mean(), abs=1e-5)


def test_scores_of_nothing():
    assert all(map(math.isnan, heldout_scores([]).values()))
    nothing = sums_of(np.ones((3, 2)), np.ones((3, 2)), np.zeros((3, 2), bool), np.ones((3, 2)))
    assert all(map(math.isnan, heldout_scores([nothing]).values()))


def test_evaluation_step_against_numpy(tiny_model):
    """The whole evaluation of one batch: scaled means, likelihood and correlations, entry by entry."""
    from cellplm_jax.data.batches import pad_batch
    from cellplm_jax.model.cellplm import CellPLM
    from cellplm_jax.train.loop import heldout_masks
    from cellplm_jax.train.step import evaluation_step
    from tests.conftest import make_samples, tiny_train_config

    config = tiny_train_config(model=tiny_model.config)
    sample = make_samples(2, 12, seed=9)[1]
    measured = np.ones(40, bool)
    measured[[2, 30]] = False
    sample = sample.take(np.arange(12))
    object.__setattr__(sample, "measured", measured)
    [(batch, mask)] = heldout_masks(config, [sample])
    assert np.asarray(mask)[0, 12:].sum() == 0
    params = jax.device_put(tiny_model.params)
    output = jax.jit(
        lambda batch, mask: CellPLM(config.model).apply({"params": params}, batch, gene_mask=mask)
    )(batch, mask)
    mean = np.asarray(output.reconstruction.mean, np.float64)[0, :12]
    theta = np.asarray(output.reconstruction.dispersion, np.float64)
    counts = sample.counts.toarray().astype(np.float64)
    hidden = np.asarray(mask)[0, :12] & measured
    visible = ~np.asarray(mask)[0, :12] & measured
    assert 0.1 < hidden.mean() < 0.4
    scale = (counts * visible).sum(1) / (mean * visible).sum(1)
    mean = mean * scale[:, None]
    nll = -stats.nbinom.logpmf(counts, theta, theta / (theta + mean))
    sums = jax.jit(lambda b, m: evaluation_step(params, b, m, config))(batch, mask)
    assert float(sums["entries"]) == hidden.sum()
    assert float(sums["nll"]) == pytest.approx(nll[hidden].sum(), rel=1e-3)
    scores = heldout_scores([sums])
    x, y = np.log1p(counts), np.log1p(mean)
    wanted = stats.pearsonr(x[hidden], y[hidden]).statistic
    assert scores["masked_correlation"] == pytest.approx(wanted, abs=1e-4)
    padded = pad_batch([sample], cells=batch.cell_mask.shape[1], nonzeros=2048)
    again = jax.jit(lambda b, m: evaluation_step(params, b, m, config))(padded, mask)
    for name, value in sums.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_metrics_file(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 1 / 3, "bad": math.nan, "worse": math.inf})
    writer.write(2, "heldout", {"score": -2.0})
    writer.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (2, "heldout")]
    assert rows[0]["loss"] == pytest.approx(1 / 3, rel=1e-6)
    assert rows[0]["bad"] is None
    assert rows[0]["worse"] is None
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_resuming_removes_later_lines_and_a_cut_one(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, "train", {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "spl')
    writer = MetricsWriter(tmp_path, resume_step=3)
    writer.write(4, "train", {"loss": 40.0})
    writer.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert not list(tmp_path.glob("*.partial"))


def test_progress_lines_go_to_standard_error(capsys):
    progress = ProgressReport("work", 10, unit="cells", every=0.0)
    progress.update(6, "half")
    progress.update(10)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("work: 6/10 cells")
    assert lines[0].endswith("half")
    assert "left" not in lines[1]  # nothing is left
    progress = ProgressReport("work", 10, every=1000)
    progress.update(5)
    assert capsys.readouterr().err == ""
    progress.update(10)
    assert "10/10" in capsys.readouterr().err
    ProgressReport("work", 10, quiet=True, every=0.0).update(10)
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = ProgressReport("work", 10)
    progress.update(10, "done")
    progress.close()
    assert capsys.readouterr().out == ""
