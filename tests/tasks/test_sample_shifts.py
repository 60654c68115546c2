"""Shifts of cell types between labels, on simulated counts: found in new samples, and not for other proportions."""

from __future__ import annotations

import numpy as np
import pytest

from cellplm_jax.tasks.sample_shifts import (
    MINIMUM_CELLS,
    TypeShifts,
    _equal_cells,
    expression_of,
    fit_shifts,
)
from tests.tasks.test_samples import auroc, make_cohort, make_shifted

KINDS = ["kind 0", "kind 1", "kind 2"]
PROJECTION = np.random.default_rng(0).normal(size=(40, 16))


def arrays(adata):
    """Counts, latent, sample and kind of each cell, and label of each sample."""
    _, samples = np.unique(adata.obs["sample"].astype(str), return_inverse=True)
    kinds = np.array([int(str(kind)[-1]) for kind in adata.obs["kind"]])
    first = np.unique(samples, return_index=True)[1]
    codes = (adata.obs["disease"].to_numpy(str) == "sick").astype(int)[first]
    return adata.X, np.log1p(adata.X.toarray()) @ PROJECTION, samples, kinds, codes


def fitted(adata) -> tuple[TypeShifts, dict[str, float]]:
    counts, z, samples, kinds, codes = arrays(adata)
    names = list(adata.var_names)
    return fit_shifts(z, counts, names, samples, kinds, KINDS, codes, ["healthy", "sick"])


def contributions(shifts, adata):
    counts, _, samples, kinds, codes = arrays(adata)
    columns = [list(adata.var_names).index(gene) for gene in shifts.genes]
    halves = (counts[:100], counts[100:])
    values = shifts.contributions(lambda: expression_of(halves, columns), kinds, codes[samples])
    return values, kinds, codes[samples] == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_shift(seed):
    shifts, facts = fitted(make_shifted(seed=seed))
    assert shifts.shifted.tolist() == [False, True, False]
    p = [row["p"] for row in shifts.table]
    assert p[1] == facts["p_shift"] <= 0.01
    assert min(p[0], p[2]) > 0.05
    assert facts["p_proportions"] > 0.05
    # In new samples.
    values, kinds, sick = contributions(shifts, make_shifted(seed=seed + 50))
    assert auroc(kinds[sick] == 1, values[sick]) >= 0.9
    assert values[kinds == 1].mean() > 0.5
    assert not values[kinds != 1].any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_proportions_alone(seed):
    shifts, facts = fitted(make_cohort(seed=seed))
    assert facts["p_shift"] > 0.05
    assert facts["p_proportions"] <= 0.01
    values, _, _ = contributions(shifts, make_cohort(seed=seed + 50))
    assert not values.any()


def test_state_and_nearest_types():
    adata = make_shifted()
    shifts, _ = fitted(adata)
    again = TypeShifts.restore(*shifts.state(), shifts.labels)
    _, z, _, kinds, _ = arrays(adata)
    np.testing.assert_array_equal(again.assign(z), shifts.assign(z))
    assert (shifts.assign(z) == kinds).mean() > 0.9
    one, other = (contributions(found, adata)[0] for found in (shifts, again))
    np.testing.assert_array_equal(one, other)


def test_as_many_cells_of_a_type_in_every_sample():
    number = np.array([[9, 6, 2], [5, 8, 7]])
    group = np.repeat(np.arange(6), number.ravel())
    kept = _equal_cells(group, number, np.random.default_rng(0))
    assert MINIMUM_CELLS == 5
    assert np.bincount(group[kept], minlength=6).tolist() == [6, 6, 2, 5, 5, 5]
    assert len(set(kept)) == len(kept)


def test_types_in_too_few_samples_do_not_count():
    adata = make_shifted(4, cells=30)
    adata = adata[~((adata.obs["kind"] == "kind 0") & (adata.obs["sample"] == "s01")).to_numpy()]
    shifts, facts = fitted(adata.copy())
    assert "p" not in shifts.table[0]
    assert not shifts.shifted[0]
    assert {"p", "genes"} <= set(shifts.table[1])
    assert facts["p_shift"] >= 1 / 3 - 1e-9
