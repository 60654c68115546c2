"""The pool of a denoiser: planted types are kept, weights find the part that is true, and nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.evaluate.denoising import clear_markers, marker_scores
from cellplm_jax.tasks.denoise_pool import (
    PARTS,
    alone,
    combine,
    fit_pool,
    joined_embedding,
    kmeans,
    make_parts,
    nearest_cells,
    thin,
)

TYPES, GENES = 4, 60


def planted(cells=400, seed=0, spread=0.0):
    """Counts of four types with six markers each; the true shares; the types; a latent that shows the types."""
    random = np.random.default_rng(seed)
    profile = random.gamma(1.0, 1.0, GENES) * np.ones((TYPES, 1))
    for number in range(TYPES):
        profile[number, number * 6 : number * 6 + 6] *= 8
    types = np.sort(random.integers(0, TYPES, cells))
    shares = profile[types] * np.exp(spread * random.standard_normal((cells, GENES)))
    shares /= shares.sum(axis=1, keepdims=True)
    counts = random.poisson(shares * random.uniform(60, 200, cells)[:, None])
    latent = np.eye(TYPES)[types] + 0.1 * random.standard_normal((cells, TYPES))
    return sparse.csr_matrix(counts.astype(np.float32)), shares, types, latent.astype(np.float32)


def fitted(network, seed=0, **keys):
    counts, shares, types, latent = planted(seed=seed, **keys)
    batch = np.zeros(len(types), int)
    given = network(shares, counts).astype(np.float32)
    kept, held = thin(counts, seed=seed)
    pool = fit_pool(make_parts(kept, latent, given.copy(), batch), held)
    parts = make_parts(counts, latent, given.copy(), batch, pool.gene_means)
    return pool, parts, counts, shares, types


def test_thinning_splits_molecules():
    counts = planted()[0]
    kept, held = thin(counts, seed=3)
    np.testing.assert_array_equal((kept + held).toarray(), counts.toarray())
    assert held.sum() / counts.sum() == pytest.approx(0.1, abs=0.01)
    assert (thin(counts, seed=4)[1] != held).nnz


def test_a_network_without_types_does_not_erase_markers():
    flat = lambda shares, counts: np.tile(shares.mean(axis=0), (len(shares), 1))  # noqa: E731
    pool, parts, counts, _, types = fitted(flat)
    pooled = combine(parts, pool.weights)
    scores = marker_scores(counts, pooled, types.astype(str))
    assert scores["markers"] >= 16
    assert scores["markers_highest"] == 1
    assert scores["contrast_kept"] > 0.9
    network = combine(parts, alone("network", GENES), correct=False)
    assert marker_scores(counts, network, types.astype(str))["contrast_kept"] < 0.1
    assert pool.scores["weights"]["neighbours"] > 0.8
    assert pool.message().endswith("the network adds nothing")


def test_a_network_that_is_right_has_the_weight():
    pool, parts, _, shares, _ = fitted(lambda shares, counts: shares, spread=1.0)
    assert pool.scores["weights"]["network"] > 0.8
    assert "the network raises it by" in pool.message()
    network = combine(parts, alone("network", GENES), correct=False)
    errors = [np.abs(combine(parts, given, correct=False) - shares).mean()
              for given in (pool.weights, alone("neighbours", GENES))]  # fmt: skip
    assert errors[0] < errors[1]
    np.testing.assert_allclose(network.sum(axis=1), 1, rtol=1e-5)


def test_never_below_the_better_part():
    for seed in range(3):
        for network in (lambda s, c: s, lambda s, c: np.random.default_rng(1).random(s.shape)):
            scores = fitted(network, seed=seed)[0].scores
            pooled = scores["log_likelihood"]["without_correction"]
            assert pooled >= max(scores["log_likelihood"][part] for part in PARTS) - 0.002


def test_a_few_deep_counts_do_not_outvote_many():
    counts, shares, types, latent = planted(cells=300)
    random = np.random.default_rng(0)
    held = sparse.csr_matrix((random.random(counts.shape) < 0.1).astype(np.float32))
    deep = held.copy()
    row, column = deep.nonzero()
    chosen = random.choice(len(row), 20, replace=False)
    deep.data[chosen] = 400
    network = shares.astype(np.float32)
    network[row[chosen], column[chosen]] *= 100  # right for the deep counts, too low for all others
    parts = make_parts(counts, latent, network, np.zeros(len(types), int))
    weights = [
        fit_pool(parts, deep, evidence=power).scores["weights"]["network"] for power in (1, 0.5, 0)
    ]
    assert weights[0] > weights[1] + 0.1 > weights[2]


def test_expected_counts_are_calibrated():
    pool = fitted(lambda shares, counts: shares)[0]
    assert pool.scores["calibration_error"] < 0.1
    assert (pool.dispersion > 0).all()
    np.testing.assert_allclose(pool.gene_means.sum(), 1, rtol=1e-5)


def test_a_cell_is_not_its_own_neighbour():
    counts, _, _, latent = planted(cells=50)
    kernel = nearest_cells(latent)
    assert not kernel.diagonal().any()
    assert (np.diff(kernel.indptr) == 49).all()
    part = make_parts(counts, latent, np.ones(counts.shape, np.float32), np.zeros(50, int))[0]
    before = part.neighbours(slice(0, 1))[0]
    changed = counts.copy().tolil()
    changed[0, 0] = 1000
    other = make_parts(
        sparse.csr_matrix(changed), latent, np.ones(counts.shape, np.float32), np.zeros(50, int)
    )[0]
    # The embedding of the cells is the one of before: only the counts differ.
    same = type(other)(**{**vars(other), "kernel": part.kernel})
    np.testing.assert_allclose(same.neighbours(slice(0, 1))[0], before, rtol=1e-6)


def test_neighbours_agree_with_brute_force():
    latent = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    kernel = nearest_cells(latent)
    distance = np.linalg.norm(latent[:, None] - latent[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance[7])[:150]
    assert set(kernel[7].indices) == set(order)
    wanted = np.exp(-0.5 * (distance[7][order] / distance[7][order[14]]) ** 2)
    np.testing.assert_allclose(kernel[7].toarray()[0, order], wanted, rtol=1e-2)


def test_batches_do_not_share_cells():
    counts, _, types, latent = planted()
    batch = np.where(np.arange(len(types)) % 2, "a", "b")
    first = make_parts(counts, latent, np.ones(counts.shape, np.float32), batch)
    assert [len(part.rows) for part in first] == [200, 200]
    changed = counts.multiply((batch == "a")[:, None]).tocsr()
    second = make_parts(changed, latent, np.ones(counts.shape, np.float32), batch)
    number = int(first[0].rows[0] != 1)  # the batch "a"
    np.testing.assert_array_equal(
        first[number].neighbours(slice(0, 9)), second[number].neighbours(slice(0, 9))
    )


def test_few_cells():
    for cells in (1, 2, 5):
        counts, shares, _, latent = planted(cells=cells)
        parts = make_parts(counts, latent, shares.astype(np.float32), np.zeros(cells, int))
        pool = fit_pool(parts, thin(counts, seed=0)[1])
        pooled = combine(parts, pool.weights)
        assert np.isfinite(pooled).all()
        assert (pooled > 0).all()
    nothing = fit_pool(parts, sparse.csr_matrix(counts.shape, dtype=np.float32))
    np.testing.assert_allclose(nothing.weights, 1 / 3, rtol=1e-6)


def test_clusters_find_the_types():
    counts, _, types, latent = planted()
    clusters = kmeans(joined_embedding(latent, counts), 8)
    for cluster in np.unique(clusters):
        members = types[clusters == cluster]
        assert np.bincount(members).max() / len(members) > 0.9
    assert not kmeans(latent, 1).any()


def test_clear_markers_are_the_planted_ones():
    counts, _, types, _ = planted()
    labels = types.astype(str)
    names, genes, highest, _ = clear_markers(counts, labels)
    assert names == ["0", "1", "2", "3"]
    assert (genes < 24).all()
    np.testing.assert_array_equal(genes // 6, highest)
    own = marker_scores(counts, counts, labels)
    assert (own["markers_highest"], own["contrast_kept"]) == (1, pytest.approx(1))
    swapped = marker_scores(counts, counts[:, ::-1], labels)
    assert swapped["markers_highest"] < 0.5
