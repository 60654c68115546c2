"""Scores of predicted changes against scipy and scikit-learn, and the baselines."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.perturbation import (
    change_scores,
    mean_change,
    mean_scores,
    no_change,
    pearson_of_change,
)


def pair(perturbations=6, genes=50):
    random = np.random.default_rng(0)
    truth = random.normal(size=(perturbations, genes)) * 0.1
    return truth, truth + random.normal(size=truth.shape) * 0.05


def test_against_the_reference_packages():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra 'eval'")
    truth, prediction = pair()
    scores = change_scores(truth, prediction, top=20)
    for row, (true, predicted) in enumerate(zip(truth, prediction, strict=True)):
        top = sorted(range(50), key=lambda gene: -abs(true[gene]))[:20]
        for name, genes in (("", list(range(50))), ("_top", top)):
            one, other = true[genes], predicted[genes]
            wanted = {
                "rmse": metrics.root_mean_squared_error(one, other),
                "mae": metrics.mean_absolute_error(one, other),
                "pearson": stats.pearsonr(one, other).statistic,
            }
            for metric, value in wanted.items():
                assert scores[metric + name][row] == pytest.approx(value, rel=1e-12)
    np.testing.assert_array_equal(pearson_of_change(truth, prediction), scores["pearson"])
    assert mean_scores(scores)["rmse"] == pytest.approx(scores["rmse"].mean())


def test_a_constant_has_no_correlation():
    truth, _ = pair(2)
    scores = change_scores(truth, no_change(2, 50))
    assert np.isnan(scores["pearson"]).all()
    assert np.isnan(scores["pearson_top"]).all()
    np.testing.assert_allclose(scores["rmse"], np.sqrt((truth**2).mean(axis=1)))
    means = mean_scores(scores)
    assert np.isnan(means["pearson"])
    assert np.isfinite(means["rmse"])
    half = np.stack([truth[0], np.full(50, 0.3)])
    assert mean_scores(change_scores(truth, half))["pearson"] == pytest.approx(1.0)


def test_mean_change():
    truth, _ = pair()
    np.testing.assert_allclose(mean_change(truth), truth.mean(axis=0))
    single = truth[0]
    np.testing.assert_allclose(
        mean_change(np.stack([single, 2 * single]), targets=[1, 2]), single
    )  # fmt: skip


def test_refuses():
    truth, prediction = pair()
    with pytest.raises(InputError, match=r"\(6, 50\) and prediction has shape \(5, 50\)"):
        change_scores(truth, prediction[:5])
    prediction[0, 0] = np.nan
    with pytest.raises(InputError, match="prediction contains NaN"):
        change_scores(truth, prediction)
    with pytest.raises(InputError, match="top = 1; expected at least 2"):
        change_scores(truth, truth, top=1)
    with pytest.raises(InputError, match="at least one perturbation"):
        mean_change(np.zeros((0, 50)))
