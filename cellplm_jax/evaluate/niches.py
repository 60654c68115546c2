"""Spatial graphs of cells, and quantities gathered over them: neighbourhoods, compositions, meetings of cell types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64, Integer, Num, Shaped
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.spatial import KDTree

from cellplm_jax.errors import InputError, require
from cellplm_jax.evaluate.inputs import Matrix

TIES = 8
"""Neighbours as near as the last one that are kept in addition; on a square lattice the diagonals are."""

LONGEST, REGULAR = 3.0, 1.05
"""Longest edge of a graph and of a lattice, in medians of the distance to the last neighbour: no bridges over gaps."""

MATCHINGS = 3
"""Rounds of matching the groups of mixtures with their mean."""


def spatial_graph(
    coordinates: Matrix,
    sample_of: Shaped[np.ndarray, " cells"],
    *,
    neighbors: int = 6,
) -> tuple[Float32[sparse.csr_matrix, "cells cells"], Float64[sparse.csr_matrix, "cells cells"]]:
    """Connect every cell with its nearest cells in the tissue, within its own sample.

    The graph is symmetric. Neighbours with the same distance as the last one (within 1 %) are kept, so that an inner
    spot of a square lattice has 8 neighbours and one of a hexagonal lattice 6. Edges longer than 3 times the median
    distance to the last neighbour are removed, on a lattice all that are longer than this median.

    Args:
        coordinates: float [cells, 2], in any unit; cells with NaN have no neighbours.
        sample_of: The tissue sample of each cell, of any type.
        neighbors: Number of nearest cells.

    Returns:
        As squidpy stores them: connectivities (1 per edge), and distances.

    Raises:
        InputError: ``neighbors`` is below 1, or shapes differ.
    """
    points = np.asarray(coordinates, np.float64)
    if neighbors < 1 or points.ndim != 2 or len(points) != len(sample_of):
        raise InputError(
            f"neighbors={neighbors}, coordinates of shape {points.shape} and {len(sample_of)} samples of cells",
            "at least one neighbour, and coordinates and sample of every cell",
            "Pass the coordinates [cells, 2] of the same cells",
        )
    rows, columns, lengths = [], [], []
    for members in sample_members(sample_of):
        members = members[np.isfinite(points[members]).all(axis=1)]
        if len(members) < 2:
            continue
        last = min(neighbors, len(members) - 1)
        found = min(last + 1 + TIES, len(members))
        distance, index = KDTree(points[members]).query(points[members], k=found)
        distance = np.asarray(distance)
        index = np.asarray(index)
        limit = distance[:, last]
        middle = np.median(limit)
        # On a lattice the distance to the last neighbour hardly varies.
        regular = middle <= REGULAR * np.quantile(limit, 0.05)
        near = (
            distance
            <= np.minimum(1.01 * limit, (REGULAR if regular else LONGEST) * middle)[:, None]
        )
        row, place = np.nonzero(near & (index != np.arange(len(members))[:, None]))
        rows.append(members[row])
        columns.append(members[index[row, place]])
        lengths.append(distance[row, place])
    shape = (len(points), len(points))
    if not rows:
        empty = sparse.csr_matrix(shape, dtype=np.float64)
        return sparse.csr_matrix(empty.astype(np.float32)), empty
    row, column, length = map(np.concatenate, (rows, columns, lengths))
    # One entry per edge and direction; duplicates would be added up.
    code = np.unique(np.concatenate([row * shape[0] + column, column * shape[0] + row]))
    ends = code // shape[0], code % shape[0]
    length = np.linalg.norm(points[ends[0]] - points[ends[1]], axis=1)
    ones = np.ones(len(code), np.float32)
    return tuple(sparse.csr_matrix((data, ends), shape=shape) for data in (ones, length))  # type: ignore[return-value]


def sample_members(
    sample_of: Shaped[np.ndarray, " cells"],
) -> list[Int[np.ndarray, " members"]]:
    """Return the cells of each sample, in the order of first appearance."""
    _, first, codes = np.unique(
        np.asarray(sample_of, object).astype(str),
        return_index=True,
        return_inverse=True,
    )
    return [np.flatnonzero(codes == code) for code in np.argsort(first)]


def within_samples(
    connectivities: Num[sparse.spmatrix | sparse.sparray, "cells cells"],
    sample_of: Shaped[np.ndarray, " cells"],
) -> tuple[Float32[sparse.csr_matrix, "cells cells"], int]:
    """Return a graph without self-loops and edges between samples, and the number of the latter."""
    codes = np.unique(np.asarray(sample_of, object).astype(str), return_inverse=True)[1]
    graph = sparse.coo_matrix(connectivities)
    stored = (graph.data != 0) & (graph.row != graph.col)
    inside = codes[graph.row] == codes[graph.col]
    kept = stored & inside
    ends = graph.row[kept], graph.col[kept]
    ones = np.ones(len(ends[0]), np.float32)
    return sparse.csr_matrix((ones, ends), shape=graph.shape), int((stored & ~inside).sum())


def shells(
    connectivities: Shaped[sparse.csr_matrix, "cells cells"], number: int
) -> list[Bool[sparse.csr_matrix, "cells cells"]]:
    """Return for each distance in the graph the cells at that distance.

    Args:
        connectivities: Stored non-zero entries are edges.
        number: Number of shells: 1: direct neighbours, 2: also their other neighbours, ...
    """
    edges = sparse.csr_matrix(connectivities != 0)
    reached = sparse.csr_matrix(sparse.eye(edges.shape[0], dtype=bool, format="csr"))
    last, found = reached, []
    for _ in range(number):
        # The product of boolean matrices: cells one edge further.
        further = sparse.csr_matrix(last @ edges)
        # Booleans: "greater" is true for cells that are new.
        last = sparse.csr_matrix(further > reached)
        reached = sparse.csr_matrix(reached + last)
        found.append(last)
    return found


def shell_mean(
    values: Float[np.ndarray, "cells dimensions"], shell: Bool[sparse.csr_matrix, "cells cells"]
) -> Float32[np.ndarray, "cells dimensions"]:
    """Return the mean over each cell's shell; a cell without one keeps its own values."""
    size = np.diff(shell.indptr)
    total = shell.astype(np.float32) @ np.asarray(values, np.float32)
    return np.where(
        (size > 0)[:, None],
        total / np.maximum(size, 1)[:, None],
        values,
    ).astype(np.float32)


def composition(
    groups: Integer[np.ndarray, " cells"],
    types: Integer[np.ndarray, " cells"],
    shape: tuple[int, int],
) -> Float64[np.ndarray, "groups types"]:
    """Return the fraction of each type among the cells of each group.

    Args:
        groups: Group of each cell.
        types: Type of each cell; negative: unknown, not counted.
        shape: Number of groups and of types.
    """
    known = types >= 0
    pair = groups[known] * shape[1] + types[known]
    counts = np.bincount(pair, minlength=shape[0] * shape[1])
    counts = counts.reshape(shape).astype(np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def meetings(
    connectivities: Shaped[sparse.csr_matrix, "cells cells"],
    types: Integer[np.ndarray, " cells"],
    sample_of: Shaped[np.ndarray, " cells"],
    *,
    number: int,
    permutations: int = 1000,
    seed: int = 0,
) -> tuple[Float64[np.ndarray, "{number} {number}"], Int64[np.ndarray, "{number} {number}"]]:
    """Compare how often cell types are neighbours with random labels, as ``squidpy.gr.nhood_enrichment`` does.

    The labels are permuted within each sample.

    Args:
        connectivities: Neighbours of each cell.
        types: Below ``number``; negative: unknown, not counted and not permuted.
        sample_of: Tissue sample of each cell.
        number: Number of types.
        permutations: Number of permutations, at least 2.
        seed: Seed of the permutations.

    Returns:
        z-scores (0 if the count is the same in all permutations), and counts of
        stored edges from a cell of the row's type to one of the column's.

    Raises:
        InputError: There are fewer than 2 permutations.
    """
    if permutations < 2:
        raise InputError(f"permutations = {permutations}", "at least 2", "1,000 is usual")
    graph = sparse.coo_matrix(connectivities)
    inside = (types[graph.row] >= 0) & (types[graph.col] >= 0)
    row = graph.row[inside]
    column = graph.col[inside]
    members = [own[types[own] >= 0] for own in sample_members(sample_of)]

    def count(labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels[row] * number + labels[column], minlength=number * number)

    labels = np.asarray(types, np.int64)
    observed = count(labels)
    generator = np.random.default_rng(seed)
    shuffled = labels.copy()
    total = np.zeros(number**2)
    squares = np.zeros(number**2)
    for _ in range(permutations):
        for own in members:
            # Within samples, or differences of composition between samples would count as attraction.
            shuffled[own] = generator.permutation(labels[own])
        # Differences from the observed count: squares of raw counts would lose digits.
        difference = (count(shuffled) - observed).astype(np.float64)
        total += difference
        squares += difference**2
    mean = total / permutations
    deviation = np.sqrt(np.maximum(squares / permutations - mean**2, 0))
    # The mean is that of permuted minus observed, hence the sign.
    score = np.divide(
        -mean,
        deviation,
        out=np.zeros(number**2),
        where=deviation > 0,
    )
    return score.reshape(number, number), observed.reshape(number, number)


def mixture_clusters(
    embedding: Float[np.ndarray, "cells dimensions"],
    number: int,
    *,
    seed: int = 0,
) -> Int32[np.ndarray, " cells"]:
    """Cluster cells into a fixed number of groups: a Gaussian mixture with one covariance for all groups.

    Args:
        embedding: One row per cell.
        number: Number of groups, from 2 to below the number of cells.
        seed: Seed of the start.

    Returns:
        Groups numbered from 0, largest first.

    Raises:
        InputError: The number of groups is out of range.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    return _largest_first(_memberships(embedding, number, seed, len(embedding)))


def consensus_clusters(
    embeddings: Sequence[Float[np.ndarray, "cells _"]],
    number: int,
    *,
    graph: Shaped[sparse.csr_matrix, "cells cells"] | None = None,
    seed: int = 0,
    cells: int = 10_000,
) -> Int32[np.ndarray, " cells"]:
    """Cluster cells into a fixed number of groups by several embeddings, which vote.

    A Gaussian mixture is fitted to each embedding. Its groups are matched with those of the mean of the mixtures, and
    the memberships are averaged, because a single mixture may end in a poor local optimum.

    Args:
        embeddings: Of the same cells.
        number: Number of groups, from 2 to below the number of cells.
        graph: Memberships are averaged over each cell and its neighbours. None: they are not.
        seed: Seed of the starts.
        cells: Maximum number of cells that a mixture is fitted to.

    Returns:
        Groups numbered from 0, largest first; fewer if no cell prefers a group.

    Raises:
        InputError: The number of groups is out of range.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    each = [
        _memberships(values, number, seed + place, cells) for place, values in enumerate(embeddings)
    ]
    mean = each[0]
    for _ in range(MATCHINGS):
        # Groups have no names in common: the assignment with the largest overlap matches them.
        orders = [linear_sum_assignment(mean.T @ one, maximize=True)[1] for one in each]
        matched = [one[:, order] for one, order in zip(each, orders, strict=True)]
        mean = np.mean(matched, axis=0)
    if graph is not None:
        identity = sparse.eye(len(mean), dtype=bool, format="csr")
        # Memberships are averaged over neighbours: a niche is a connected region.
        mean = shell_mean(mean, sparse.csr_matrix(shells(graph, 1)[0] + identity))
    return _largest_first(mean)


def _memberships(embedding: np.ndarray, number: int, seed: int, cells: int) -> np.ndarray:
    """Return float64 [cells, groups], the probabilities of a Gaussian mixture."""
    if not 2 <= number < len(embedding):
        raise InputError(
            f"{number} groups of {len(embedding)} cells",
            "at least 2 groups, and fewer groups than cells",
            "Choose another number",
        )
    mixture = require("sklearn.mixture", "eval", "A fixed number of groups")
    model = mixture.GaussianMixture(
        number,
        covariance_type="tied",
        n_init=3,
        reg_covar=1e-4,
        random_state=seed,
    )
    # One scale, so that the regularisation of the covariance means the same for any embedding.
    values = np.asarray(embedding, np.float64) / max(float(np.std(embedding)), 1e-12)
    model.fit(values[:: -(-len(values) // max(cells, number + 1))])
    return model.predict_proba(values)


def _largest_first(memberships: np.ndarray) -> np.ndarray:
    """Return int32 [cells], the most probable groups, numbered from 0 by size."""
    found = memberships.argmax(axis=1)
    present, size = np.unique(found, return_counts=True)
    rank = np.empty(memberships.shape[1], np.int32)
    rank[present[np.argsort(-size, kind="stable")]] = np.arange(len(present))
    return rank[found]
