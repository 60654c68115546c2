"""Scores of labels, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate import annotation

metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra 'eval'")


def labels(cells=200, classes=4, agree=0.7, seed=0):
    random = np.random.default_rng(seed)
    truth = random.choice(classes, cells, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    found = np.where(random.random(cells) < agree, truth, random.integers(0, classes, cells))
    return truth, found


def named(values):
    return np.array([f"type {value}" for value in values], object)


def test_scores_are_those_of_scikit_learn():
    truth, found = labels()
    scores = annotation.annotation_scores(named(truth), named(found))
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, found))
    assert scores["macro_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, found))
    for average in ("macro", "micro", "weighted"):
        assert scores[f"{average}_f1"] == pytest.approx(
            metrics.f1_score(truth, found, average=average)
        )
    for average in ("macro", "weighted"):
        assert scores[f"{average}_precision"] == pytest.approx(
            metrics.precision_score(truth, found, average=average)
        )
        assert scores[f"{average}_recall"] == pytest.approx(
            metrics.recall_score(truth, found, average=average)
        )
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])


def test_unknown_is_wrong_and_no_class():
    truth = np.array(["a", "a", "b", "b"])
    found = np.array(["a", "unknown", "b", "b"])
    scores = annotation.annotation_scores(truth, found)
    assert scores["accuracy"] == 0.75
    assert scores["macro_accuracy"] == 0.75
    assert scores["macro_precision"] == 1.0
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert list(annotation.per_class_scores(truth, found).index) == ["a", "b"]


def test_table_and_confusion():
    truth, found = labels()
    table = annotation.per_class_scores(named(truth), pd.Categorical(named(found)))
    np.testing.assert_allclose(table["f1"], metrics.f1_score(truth, found, average=None))
    assert table["cells"].tolist() == np.bincount(truth).tolist()
    assert table["predicted_cells"].tolist() == np.bincount(found).tolist()
    confusion = annotation.confusion_table(named(truth), named(found))
    np.testing.assert_array_equal(confusion, metrics.confusion_matrix(truth, found))
    assert confusion.index.name == "truth"
    np.testing.assert_array_equal(annotation.confusion_counts(truth, found, 4), confusion)


@pytest.mark.parametrize("agree", [0.0, 0.5, 1.0])
def test_macro_f1_without_scikit_learn(agree):
    truth, found = labels(agree=agree, seed=1)
    counts = annotation.confusion_counts(truth, found, 6)  # two classes never occur
    assert annotation.macro_f1(counts) == pytest.approx(
        metrics.f1_score(truth, found, average="macro")
    )
    assert np.isnan(annotation.macro_f1(np.zeros((2, 2))))


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    truth = ["a", "b", "a", "b"]
    # Two cells at .9 of which one is right; one at .6 and one at .7, both right.
    wanted = (2 * 0.4 + 0.4 + 0.3) / 4
    found = annotation.expected_calibration_error(truth, probabilities, ["a", "b"], bins=10)
    assert found == pytest.approx(wanted)
    sure = np.eye(2)[[0, 0, 0, 0]]
    assert annotation.expected_calibration_error(truth, sure, ["a", "b"]) == pytest.approx(0.5)
    assert annotation.expected_calibration_error(["a", "b"], np.eye(2), ["a", "b"]) == 0.0


def test_calibrated_probabilities_have_a_small_error():
    random = np.random.default_rng(0)
    p = random.random(20_000)
    truth = np.where(random.random(20_000) < p, "yes", "no")
    both = np.column_stack([1 - p, p])
    assert annotation.expected_calibration_error(truth, both, ["no", "yes"]) < 0.02
    sharp = np.column_stack([p < 0.5, p >= 0.5]).astype(float)
    assert annotation.expected_calibration_error(truth, sharp, ["no", "yes"]) > 0.2


def test_brier_score():
    random = np.random.default_rng(0)
    p = random.random(100)
    truth = random.integers(0, 2, 100)
    both = np.column_stack([1 - p, p])
    names = np.array(["no", "yes"])[truth]
    wanted = 2 * metrics.brier_score_loss(truth, p)
    assert annotation.brier_score(names, both, ["no", "yes"]) == pytest.approx(wanted)
    assert annotation.brier_score(["other"], [[1.0, 0.0]], ["no", "yes"]) == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: annotation.annotation_scores(["a"], ["a", "b"]), "2 entries for 1 cells"),
        (lambda: annotation.annotation_scores([], []), "truth is empty"),
        (lambda: annotation.annotation_scores(["a", None], ["a", "b"]), "missing .* 1 of 2 cells"),
        (lambda: annotation.brier_score(["a"], [[0.5, 0.5]], ["a"]), r"shape \(1, 2\) for 1 cells"),
        (lambda: annotation.brier_score(["a"], [[0.5, 0.4]], ["a", "b"]), "do not sum to 1"),
        (lambda: annotation.brier_score(["a"], [[np.nan, 1]], ["a", "b"]), "not finite"),
    ],
)
def test_what_cannot_be_scored(call, message):
    with pytest.raises(InputError, match=message):
        call()
