"""Held-out scores against numpy and scipy, and the metrics file."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from scipy import stats

from cellplm_jax.config import EncoderConfig
from cellplm_jax.errors import InputError
from cellplm_jax.train import metrics as metrics_module
from cellplm_jax.train.metrics import (
    MetricsWriter,
    StepRates,
    heldout_scores,
    model_flops,
    peak_flops,
    read_metrics,
)
from tests.conftest import tiny_train_config


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
    from cellplm_jax.train.step import evaluation_step, heldout_gene_mask
    from tests.conftest import make_samples

    config = tiny_train_config(model=tiny_model.config)
    measured = np.ones(40, bool)
    measured[[2, 30]] = False
    sample = dataclasses.replace(make_samples(2, 12, seed=9)[1], measured=measured)
    batch = pad_batch([sample], cells=32)
    mask = heldout_gene_mask(jax.random.key(5), batch, config)
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
    padded = pad_batch([sample], cells=32, nonzeros=2048)
    again = jax.jit(lambda b, m: evaluation_step(params, b, m, config))(padded, mask)
    for name, value in sums.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_model_flops_of_the_tiny_model_by_hand():
    """The debug architecture with no covariates: every matrix written out."""
    config = tiny_train_config()
    genes, hidden, latent, clusters, width, bottleneck = 40, 32, 16, 4, 32, 16
    linear = hidden * hidden  # the embedder's
    linear += 4 * hidden * hidden + 2 * hidden * 2 * hidden  # query, key, value, out; feed-forward
    linear += 2 * hidden * latent + latent * clusters  # mean, log-variance, clusters
    linear += latent * width + width * bottleneck + bottleneck * genes
    attention = 4 * hidden * (hidden // 4)
    assert model_flops(config, 1, 0) == 3 * (2 * linear + attention)
    assert model_flops(config, 0, 1) == 2 * 2 * hidden
    assert model_flops(config, 7, 9) == 7 * model_flops(config, 1, 0) + 9 * 2 * 2 * hidden
    for kind, cell in (("softmax", 4 * hidden * config.data.cells), ("performer", 8 * hidden * 10)):
        encoder = EncoderConfig(kind=kind, layers=1, heads=4, random_features=10)
        model = dataclasses.replace(config.model, encoder=encoder)
        found = model_flops(dataclasses.replace(config, model=model), 1, 0)
        assert found == 3 * (2 * linear + cell), kind


def test_model_flops_agree_with_the_compiler():
    """XLA counts what it executes, masks and likelihood too, over dense counts: a little more, and not twice."""
    from cellplm_jax.data.batches import pad_batch
    from cellplm_jax.model.cellplm import CellPLM, init_params
    from tests.conftest import make_samples

    config = tiny_train_config()
    model = dataclasses.replace(
        config.model,
        hidden=256,
        dropout=0.0,
        decoder=dataclasses.replace(config.model.decoder, hidden=256, bottleneck=128),
        latent=dataclasses.replace(config.model.latent, size=64),
    )
    config = dataclasses.replace(config, model=model)
    batch = pad_batch(make_samples(1, 64), cells=64)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def loss(params):
        output = CellPLM(model).apply({"params": params}, batch)
        return output.reconstruction.mean.sum() + output.latent.z.sum()

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    dense = model_flops(config, 64, 64 * 40)
    assert 0.8 < counted / dense < 1.25


def test_peak_of_known_and_unknown_devices(monkeypatch):
    def pretend(kind, platform="tpu"):
        device = type("Device", (), {"device_kind": kind, "platform": platform})()
        monkeypatch.setattr(metrics_module.jax, "local_devices", lambda: [device])
        monkeypatch.setattr(metrics_module.jax, "device_count", lambda: 4)
        return peak_flops()

    assert pretend("TPU v5 lite") == (4 * 197e12, "table")
    assert pretend("TPU v5p") == (4 * 459e12, "table")
    assert pretend("TPU v6 lite") == (4 * 918e12, "table")
    assert pretend("NVIDIA H100 80GB HBM3", "gpu") == (4 * 989e12, "table")
    assert pretend("NVIDIA A100-SXM4-40GB", "gpu") == (4 * 312e12, "table")
    peak, source = pretend("Some new thing", "gpu")
    assert math.isnan(peak)
    assert source == "unknown"
    monkeypatch.undo()
    peak, source = peak_flops()
    assert source == "measured"
    assert 1e8 < peak < 1e14


def test_rates_leave_out_the_first_step_and_interruptions(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    config = tiny_train_config()
    rates = StepRates(config, 1e6)
    counts = {"cells": 70.0, "read_cells": 100.0, "slots": 128.0, "nonzeros": 1000.0}
    assert math.isnan(rates.cells_per_second)

    def step(seconds, waited=0.0):
        clock[0] += seconds
        rates.step(counts, waited)

    step(50.0)  # compilation
    assert rates.lap(9) == {}
    step(1.0, waited=0.25)
    clock[0] += 30.0  # evaluation
    rates.resume()
    step(1.0, waited=3.0)  # a wait cannot be longer than its step
    lap = rates.lap(7)
    assert lap["cells_per_second"] == pytest.approx(70.0)
    assert lap["nonzeros_per_second"] == pytest.approx(700.0)
    assert lap["data_wait"] == pytest.approx(1.25 / 2)
    assert lap["eta_seconds"] == pytest.approx(32.0 / 2 * 7)  # evaluations come again
    flops = model_flops(config, 140, 1400)
    assert lap["model_flop_utilisation"] == pytest.approx(flops / 2.0 / 1e6)
    assert rates.lap(7) == {}
    step(3.0)
    assert rates.lap(6)["cells_per_second"] == pytest.approx(70 / 3)
    assert rates.cells_per_second == pytest.approx(210 / 5)
    assert rates.utilisation == pytest.approx(1.5 * flops / 5.0 / 1e6)
    assert "model_flop_utilisation" not in StepRates(config, math.nan).lap(1)


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
    assert rows[1]["score"] == -2
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


def test_metrics_at_an_address_are_copied_whole(tmp_path):
    """An object store cannot append: what was written survives a flush, and a resumed run continues the file."""
    pytest.importorskip("gcsfs", reason="needs the extra 'gcp'")
    from tests.stand_ins.gcs import cloud_storage

    with cloud_storage() as storage:
        address = "gs://bucket/run"
        writer = MetricsWriter(address)
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": step})
        assert storage.objects == {}
        writer.flush()
        assert len(read_metrics(f"{address}/metrics.jsonl")) == 3
        writer.close()
        writer = MetricsWriter(address, resume_step=2)
        writer.write(3, "train", {"loss": 30})
        writer.close()
        rows = read_metrics(f"{address}/metrics.jsonl")
        assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 30)]
        pytest.importorskip("tensorboardX")
        assert any(name.startswith("run/tensorboard/events") for _, name in storage.objects)


def test_tensorboard_file(tmp_path):
    """Every finite scalar under its split, read back record by record."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    writer = MetricsWriter(tmp_path)
    writer.write(3, "train", {"loss": 0.5, "bad": math.nan})
    writer.write(4, "heldout", {"score": -2.0})
    writer.close()
    [path] = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert found == [(3, "train/loss", 0.5), (4, "heldout/score", -2.0)]


@pytest.mark.parametrize("sink", ["_file", "_tensorboard"])
def test_a_full_disk_is_one_message(tmp_path, sink):
    pytest.importorskip("tensorboardX")

    class Full:
        def write(self, *_):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

        close = flush

    writer = MetricsWriter(tmp_path)
    getattr(writer, sink).close()
    setattr(writer, sink, Full())
    for _ in range(20):  # a queue would be full by then
        with pytest.raises(InputError, match="No space left on device"):
            writer.write(1, "train", {"loss": 1.0})
    writer.close()
