"""Permutation tests of labels of samples: counted by hand, uniform without a difference, small with one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.cohorts import (
    adjusted_p,
    arrangements,
    left_out_error,
    permutation_p,
    pseudobulk,
    samples_needed,
    separation,
    smallest_p,
)


def test_how_small_a_p_value_can_be():
    assert smallest_p([0, 0, 1, 1]) == pytest.approx(2 / 6)
    assert smallest_p([0, 0, 0, 1, 1]) == pytest.approx(1 / 10)
    assert smallest_p([0, 0, 1, 1, 2, 2]) == pytest.approx(6 / 90)
    assert (samples_needed(2), samples_needed(3)) == (4, 3)


def test_arrangements_are_all_of_them_or_random():
    found = arrangements([0, 1, 0, 1])
    assert found[0].tolist() == [0, 1, 0, 1]
    assert len({tuple(row) for row in found}) == len(found) == 6
    many = arrangements(np.arange(20) % 2, 50, seed=1)
    assert many.shape == (51, 20)
    assert (many.sum(axis=1) == 10).all()
    np.testing.assert_array_equal(many, arrangements(np.arange(20) % 2, 50, seed=1))


def test_separation_and_p():
    codes = np.arange(12) % 2
    random = np.random.default_rng(0)
    means = random.normal(size=(12, 5))
    permuted = arrangements(codes, 499)
    by_hand = sum(0.5 * np.square(means[codes == c].mean(0) - means.mean(0)).sum() for c in (0, 1))
    assert separation(means, permuted)[0] == pytest.approx(by_hand)
    assert permutation_p(separation(means + 3.0 * codes[:, None], permuted)) <= 0.01
    p = [
        permutation_p(separation(random.normal(size=(12, 5)), arrangements(codes, 99, seed=n)))
        for n in range(60)
    ]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) <= 0.05) < 0.2


def test_left_out_error_is_that_of_refitting():
    random = np.random.default_rng(1)
    features, codes = random.normal(size=(10, 4)), np.arange(10) % 2
    gram_scale = np.square(features - features.mean(0)).sum() / 10
    errors = []
    for out in range(10):
        rest = np.arange(10) != out
        centre, wanted = features[rest].mean(0), codes[rest].astype(float)
        x = features[rest] - centre
        weights = np.linalg.solve(x.T @ x + gram_scale * np.eye(4), x.T @ (wanted - wanted.mean()))
        errors.append((codes[out] - wanted.mean() - (features[out] - centre) @ weights) ** 2)
    usual = np.mean([(codes[o] - np.delete(codes, o).mean()) ** 2 for o in range(10)])
    found = left_out_error(features, codes[None])
    assert found[0] == pytest.approx(np.mean(errors) / usual, rel=1e-9)


def test_corrected_p_is_at_least_the_own():
    random = np.random.default_rng(2)
    statistics = random.normal(size=(6, 200))
    statistics[2, 0] = 9.0
    corrected = adjusted_p(statistics)
    assert (corrected >= [permutation_p(one) for one in statistics]).all()
    assert corrected[2] == pytest.approx(1 / 200)
    assert adjusted_p(np.zeros((0, 5))).shape == (0,)


def test_pseudobulk_by_hand():
    counts = sparse.csr_matrix(np.array([[1.0, 3], [1, 0], [0, 2], [5, 5]]))
    profiles, cells = pseudobulk(counts, np.array([0, 0, 1, -1]), np.array([0, 0, 1, 0]), (2, 2))
    np.testing.assert_allclose(profiles[0, 0], np.log1p([4000, 6000]))
    np.testing.assert_allclose(profiles[1, 1], np.log1p([0, 10000]))
    assert cells.tolist() == [[2, 0], [0, 1]]
    with pytest.raises(InputError, match="4 cells, 3 samples and 4 types"):
        pseudobulk(counts, np.zeros(3, int), np.zeros(4, int), (1, 1))
