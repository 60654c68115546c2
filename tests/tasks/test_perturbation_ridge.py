"""The linear model of a screen: how far predictions shrink towards no change."""

from __future__ import annotations

import numpy as np
import pytest

from cellplm_jax.tasks.perturbation_ridge import Ridge
from cellplm_jax.tasks.perturbation_screen import Changes

ROWS, GENES = 20, 50


def fitted(shared: float, own: float, *, groups: int = 1):
    """Return a chosen model of perturbations (or of one in many groups) with a shared change and their own changes."""
    random = np.random.default_rng(0)
    values = shared * random.standard_normal(GENES) + own * random.standard_normal((ROWS, GENES))
    names = np.array([f"P{row}" if groups == 1 else "P" for row in range(ROWS)], object)
    named_groups = np.array([f"G{row % groups}" for row in range(ROWS)], object)
    changes = Changes(names, named_groups, values, np.full(ROWS, 1e-4), np.full(ROWS, 100))
    problem = Ridge(changes, np.zeros((ROWS, 2)), np.zeros((ROWS, 2)), np.ones(ROWS))
    return problem, *problem.choose()


@pytest.mark.parametrize("groups", [1, ROWS])
def test_a_shared_change_is_kept_and_others_shrink_to_none(groups):
    problem, _, facts = fitted(1.0, 0.05, groups=groups)
    assert facts["shrinkage"] == problem.shrinkage > 0.98
    problem, _, facts = fitted(0.0, 1.0, groups=groups)
    assert facts["shrinkage"] < 0.3
    what = "perturbations" if groups == 1 else "groups"
    none = np.sqrt(np.square(problem.changes.values).mean())
    assert facts[f"left_out_{what}_rmse"] < none * 1.01
    mean, *_ = problem.solve(np.arange(ROWS), 0.0, 0.0)
    np.testing.assert_allclose(mean, problem.shrinkage * problem.mean(np.arange(ROWS)))


def test_the_mean_change_it_is_compared_with_is_not_shrunk():
    problem, strengths, _ = fitted(0.3, 1.0)
    parts = {name: [name] for name in problem.changes.names}
    table = problem.left_out_table(parts, *strengths).table()
    values = problem.changes.values
    others = (values.sum(axis=0) - values) / (ROWS - 1)
    expected = np.sqrt(np.square(values - others).mean(axis=1))
    np.testing.assert_allclose(table["rmse_mean_change"], expected, rtol=1e-6)
    assert 0 < problem.shrinkage < 0.9
    assert table["rmse"].mean() < table["rmse_mean_change"].mean()
