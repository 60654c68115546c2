"""The demonstration's judgement and its baselines; the run itself is `make demo`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import sparse, stats

from cellplm_jax import demo_from_scratch as demo
from cellplm_jax.data.batches import MemoryStore, Sample
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.demo_from_scratch import COMPONENTS, TRAINED, UNTRAINED, verdict
from tests.conftest import make_counts, make_samples, make_store, tiny_train_config


def table(trained, untrained, components, likelihoods=(-0.2, -0.3)):
    ours, theirs = likelihoods
    return {
        TRAINED: {"ari": trained, "ari_coarse": 0.123, "nb_log_likelihood": ours},
        UNTRAINED: {"ari": untrained, "ari_coarse": 0.456, "nb_log_likelihood": -9.0},
        COMPONENTS: {"ari": components, "ari_coarse": 0.789, "nb_log_likelihood": theirs},
    }


@pytest.mark.parametrize(
    ("scores", "words", "absent"),
    [
        ((0.8, 0.3, 0.6), ["above the untrained", "and above 50 principal"], ["NOT", "below"]),
        ((0.6, 0.3, 0.6), ["level with (within .05 of) 50 principal"], ["below", "NOT"]),
        ((0.56, 0.3, 0.6), ["level with"], ["below"]),
        ((0.64, 0.3, 0.6), ["level with"], ["and above"]),
        ((0.5, 0.3, 0.6), ["above the untrained", "and below 50 principal"], ["level"]),
        ((0.5, 0.48, 0.3), ["NOT clearly above the untrained", "and above"], []),
        ((0.2, 0.6, 0.7), ["NOT clearly above the untrained", "and below"], ["level"]),
    ],
)
def test_verdict_follows_the_numbers(scores, words, absent):
    text = verdict(table(*scores))
    for word in words:
        assert word in text
    for word in absent:
        assert word not in text
    for score in scores:
        assert f"{score:.3f}" in text
    assert "0.123 against 0.789" in text


def test_verdict_on_likelihood():
    text = verdict(table(0.5, 0.3, 0.4, (-0.2, -0.3)))
    assert "more likely" in text
    assert "+0.1000 nats" in text
    text = verdict(table(0.5, 0.3, 0.4, (-0.35, -0.3)))
    assert "less likely" in text
    assert "-0.0500 nats" in text


def small_config(**model):
    config = tiny_train_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        data=dataclasses.replace(config.data, rows=1, cells=64),
    )


@pytest.fixture(scope="module")
def split():
    """A run, its data, two samples to train on and one held out."""
    store = make_store(make_samples(3, 60))
    ranges = [SampleRange(i, 0, 60) for i in range(3)]
    return small_config(), store, ranges[:2], ranges[2:]


def hidden_entries(config, store, heldout):
    """Truth and mask of the held-out entries, from the masks themselves."""
    truth, hidden = [], []
    for batch, mask in demo.heldout_masks(config, store, heldout):
        cells = np.asarray(batch.cell_mask)
        truth.append(np.asarray(batch.dense_counts(40))[cells])
        hidden.append(np.asarray(mask)[cells])
    return np.concatenate(truth).astype(float), np.concatenate(hidden)


def test_mean_predictions_against_scipy(split):
    config, store, train, heldout = split
    scores = demo._mean_predictions(config, store, train, heldout)
    counts = demo._counts(store, train)
    share = counts.sum(0) / counts.sum()
    truth, hidden = hidden_entries(config, store, heldout)
    held = demo._counts(store, heldout)
    np.testing.assert_array_equal(np.sort(truth.sum(1)), np.sort(held.sum(1)))
    assert hidden.mean() == pytest.approx(0.25, abs=0.05)
    visible = np.where(hidden, 0, truth).sum(1) / np.where(hidden, 0, share).sum(1)
    mean = np.maximum(share * visible[:, None], 1e-4)
    fitted = share * counts.sum(1)[:, None]
    theta = (fitted**2).sum(0) / np.maximum(((counts - fitted) ** 2 - fitted).sum(0), 1e-8)
    theta = np.clip(theta, 1e-3, 1e4)
    likelihood = stats.nbinom.logpmf(truth, theta, theta / (theta + mean))[hidden].mean()
    correlation = stats.pearsonr(np.log1p(truth)[hidden], np.log1p(mean)[hidden]).statistic
    assert scores["nb_log_likelihood"] == pytest.approx(likelihood, rel=1e-6)
    assert scores["masked_correlation"] == pytest.approx(correlation, rel=1e-6)


def test_counts_are_those_of_the_samples(split):
    _, store, train, _ = split
    wanted = np.concatenate([s.counts.toarray() for s in make_samples(3, 60)[:2]])
    found = demo._counts(store, train)
    np.testing.assert_array_equal(found.sum(0), wanted.sum(0))
    np.testing.assert_array_equal(np.sort(found.sum(1)), np.sort(wanted.sum(1)))


def test_no_baseline_sees_what_is_hidden(split):
    """Changing hidden counts changes the truth and must not change any prediction."""
    config, store, train, heldout = split
    seen = []

    def predict(visible, hidden):
        assert not visible[hidden].any()
        seen.append(visible)
        return np.ones_like(visible)

    demo._prediction_sums(config, store, train, heldout, predict, np.ones((120, 40)))
    truth, hidden = hidden_entries(config, store, heldout)
    np.testing.assert_array_equal(np.concatenate(seen), np.where(hidden, 0, truth))


def test_a_perfect_prediction_scores_best(split):
    config, store, train, heldout = split
    truth, _ = hidden_entries(config, store, heldout)
    counts = demo._counts(store, train)
    perfect = demo._prediction_sums(config, store, train, heldout, lambda v, h: truth, counts)
    assert perfect["masked_correlation"] == pytest.approx(1, abs=1e-6)
    means = demo._mean_predictions(config, store, train, heldout)
    assert perfect["nb_log_likelihood"] > means["nb_log_likelihood"]


def test_components_beat_means_where_cells_come_in_kinds():
    pytest.importorskip("scanpy", reason="needs the extra 'eval'")
    config = small_config(genes=120)
    samples = [
        Sample(
            f"s{cells}",
            sparse.csr_matrix(make_counts(cells, genes=120, seed=cells).astype(np.float32)),
        )
        for cells in (150, 50)
    ]
    store = MemoryStore(samples, [f"g{n}" for n in range(120)])
    train, heldout = [SampleRange(0, 0, 150)], [SampleRange(1, 0, 50)]
    means = demo._mean_predictions(config, store, train, heldout)
    components = demo._component_predictions(config, store, train, heldout, seed=0)
    assert set(components) == set(means)
    gained = components["masked_correlation_per_gene"] - means["masked_correlation_per_gene"]
    assert gained > 0.1
    assert components == demo._component_predictions(config, store, train, heldout, seed=0)


def test_log_normalised():
    counts = np.array([[1.0, 3.0], [0.0, 0.0]])
    found = demo._log_normalised(counts, counts.sum(1))
    np.testing.assert_allclose(found, [np.log1p([2500, 7500]), [0, 0]])


def test_demo_says_what_it_needs(monkeypatch, tmp_path):
    from cellplm_jax.errors import MissingDependencyError

    monkeypatch.setitem(__import__("sys").modules, "scanpy", None)
    with pytest.raises(MissingDependencyError, match="eval"):
        demo.run_from_scratch(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_speaker(capsys):
    demo._speaker(False)("hello")
    demo._speaker(True)("silence")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "demo: hello\n")
