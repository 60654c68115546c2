"""Spatial graphs and what is gathered over them, on small graphs by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.evaluate.niches import (
    composition,
    consensus_clusters,
    meetings,
    mixture_clusters,
    shell_mean,
    shells,
    spatial_graph,
    within_samples,
)


def line(cells=5):
    edges = np.arange(cells - 1)
    graph = sparse.csr_matrix((np.ones(cells - 1), (edges, edges + 1)), shape=(cells, cells))
    return sparse.csr_matrix(graph + graph.T)


def lattice(side, hexagonal=False):
    x, y = np.meshgrid(np.arange(side, dtype=float), np.arange(side, dtype=float))
    if hexagonal:
        x, y = x + 0.5 * (np.arange(side) % 2)[:, None], y * np.sqrt(0.75)
    return np.stack([x.ravel(), y.ravel()], axis=1)


@pytest.mark.parametrize(("hexagonal", "degree"), [(False, 8), (True, 6)])
def test_inner_spots_of_a_lattice_have_all_their_neighbours(hexagonal, degree):
    points = lattice(7, hexagonal)
    graph, distances = spatial_graph(points, np.zeros(49))
    inner = np.all((points > 2) & (points < 4), axis=1)
    degrees = np.diff(graph.indptr)[inner]
    np.testing.assert_array_equal(degrees, degree)
    assert (graph != graph.T).nnz == 0
    row, column = distances.nonzero()
    expected = np.linalg.norm(points[row] - points[column], axis=1)
    np.testing.assert_allclose(np.asarray(distances[row, column]).ravel(), expected)


def test_no_edges_over_gaps_or_between_samples():
    points = np.concatenate([lattice(5), lattice(5) + np.array([100, 0]), [[np.nan, 0]]])
    graph, _ = spatial_graph(points, np.zeros(51))
    row, column = graph.nonzero()
    assert ((row < 25) == (column < 25)).all()
    assert graph[50].nnz == 0
    graph, _ = spatial_graph(np.concatenate([lattice(5), lattice(5)]), np.repeat([0, 1], 25))
    row, column = graph.nonzero()
    assert ((row < 25) == (column < 25)).all()
    kept, between = within_samples(line(6), np.array(list("aaabbb")))
    assert (kept.nnz, between) == (8, 2)


def test_shells_and_their_means():
    first, second, third = shells(line(5), 3)
    assert first[0].indices.tolist() == [1]
    assert sorted(second[2].indices.tolist()) == [0, 4]
    assert third[0].indices.tolist() == [3]
    values = np.arange(5, dtype=np.float32)[:, None] ** 2
    mean = shell_mean(values, second)
    assert mean.ravel().tolist() == [4.0, 9.0, 8.0, 1.0, 4.0]
    # The middle of five has no cell at distance 3, so it keeps its own value.
    assert shell_mean(values, third)[2] == values[2]


def test_composition_counts_known_types():
    shares = composition(np.array([0, 0, 0, 1]), np.array([0, 1, -1, 1]), (2, 2))
    assert shares.tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_meetings_by_hand_and_by_chance():
    graph = line(6)
    score, count = meetings(
        graph, np.array([0, 0, 0, 1, 1, 1]), np.zeros(6), number=2, permutations=400
    )
    assert count.tolist() == [[4, 1], [1, 4]]
    # 5 edges; of 15 pairs of cells 9 are of two types: 3 edges of two types by chance.
    assert score[0, 1] < 0 < score[0, 0]
    random = np.random.default_rng(0)
    graph, _ = spatial_graph(random.random((600, 2)), np.zeros(600))
    score, _ = meetings(graph, random.integers(0, 3, 600), np.zeros(600), number=3)
    assert np.abs(score).max() < 3.5
    # Each sample has one type: within samples there is nothing to permute.
    halves = np.repeat([0, 1], 300)
    graph, _ = within_samples(graph, halves)
    score, _ = meetings(graph, halves, halves, number=2, permutations=5)
    assert not score.any()


def test_meetings_are_those_of_squidpy():
    squidpy = pytest.importorskip("squidpy")
    anndata = pytest.importorskip("anndata")
    random = np.random.default_rng(0)
    graph, distances = spatial_graph(random.random((300, 2)), np.zeros(300))
    types = (random.random((300, 1)) < 0.4).astype(int).ravel()
    adata = anndata.AnnData(np.zeros((300, 1), np.float32))
    adata.obs["kind"] = types.astype(str)
    adata.obs["kind"] = adata.obs["kind"].astype("category")
    adata.obsp["spatial_connectivities"], adata.obsp["spatial_distances"] = graph, distances
    squidpy.gr.nhood_enrichment(adata, "kind", seed=0, show_progress_bar=False)
    theirs = adata.uns["kind_nhood_enrichment"]
    score, count = meetings(graph, types, np.zeros(300), number=2)
    np.testing.assert_array_equal(count, theirs["count"])
    np.testing.assert_allclose(score, theirs["zscore"], atol=0.25)


def test_mixtures_have_the_requested_number():
    random = np.random.default_rng(0)
    kind = random.choice(3, 300, p=[0.5, 0.3, 0.2])
    found = mixture_clusters(random.normal(size=(300, 4)) + 8 * np.eye(3, 4)[kind], 3)
    assert (np.bincount(found, minlength=3) == np.sort(np.bincount(kind))[::-1]).all()
    with pytest.raises(Exception, match="at least 2 groups"):
        mixture_clusters(np.zeros((3, 2)), 3)


def test_mixtures_vote_and_neighbours_are_heard():
    pytest.importorskip("sklearn")
    random = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], [90, 60, 50])
    places = np.eye(3)[group] * 6
    good = [places + random.normal(size=(200, 3)) for _ in range(4)]
    noise = random.normal(size=(200, 3))
    found = consensus_clusters([*good, noise], 3)
    # One embedding of five that shows nothing does not change the groups, which are numbered by size.
    assert (found == group).mean() > 0.97
    order = np.argsort(group, kind="stable")
    good[0][order[40]] = good[1][order[40]] = good[2][order[40]] = good[3][order[40]] = places[-1]
    chain = line(200)
    assert consensus_clusters(good, 3)[40] == 2
    assert consensus_clusters(good, 3, graph=chain)[40] == 0
    # A mixture that is fitted to a part of the cells assigns all of them.
    assert (consensus_clusters(good, 3, cells=60) == group).mean() > 0.95
