"""Embedding scores: clustering, neighbours, batch mixing, and a PCA baseline.

Clustering does not use labels; the resolution is fixed. The published evaluation
(``CellPLM/pipeline/cell_embedding.py`` style) tries 14 resolutions and keeps the one with the best agreement, which
rewards the search and not the embedding.

Cells with a label for "not known" (for example "unassigned") should be clustered but not scored: cluster all cells,
then pass the labelled rows to :func:`clustering_scores`.

scanpy, igraph and scikit-learn are installed by the extra ``eval`` and imported on first use.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int32
from scipy import sparse, special

from cellplm_jax.errors import InputError, explain, require
from cellplm_jax.evaluate.inputs import Labels, Matrix, one_axis

Metric = Literal["euclidean", "cosine"]

_EXTRA = "eval"


def _checked_embedding(embedding: Matrix, *, neighbors: int | None = None) -> np.ndarray:
    """Return the embedding as a finite float array [cells, dimensions] with more cells than ``neighbors``."""
    array = np.asarray(embedding)
    if array.ndim != 2 or array.shape[0] < 2 or array.shape[1] < 1:
        raise InputError(
            f"The embedding has shape {array.shape}",
            "two axes, [cells, dimensions], with at least two cells",
            "Pass the array itself, for example adata.obsm['X_cellplm']",
        )
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise InputError(
            f"The embedding has dtype {array.dtype}",
            "real numbers",
            "Convert it with embedding.astype('float32')",
        )
    # float16 overflows in squared distances.
    array = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    finite = np.asarray(np.isfinite(array).all(axis=1))
    if not finite.all():
        raise InputError(
            f"The embedding contains NaN or infinity in {int((~finite).sum())} of {len(finite)} cells "
            f"(first: row {int(np.argmin(finite))})",
            "finite numbers",
            "Remove those cells, or find the cause in the model",
        )
    if neighbors is not None and not 1 <= neighbors < array.shape[0]:
        raise InputError(
            f"neighbors={neighbors} with {array.shape[0]} cells",
            "at least one neighbour and more cells than neighbours",
            f"Choose neighbors between 1 and {array.shape[0] - 1}",
        )
    return array


def _codes(labels: Labels, name: str, cells: int | None = None) -> np.ndarray:
    """Return labels of any type as integers 0..k-1; missing labels or a wrong number raise an error."""
    values = one_axis(labels, name)
    if cells is not None and len(values) != cells:
        raise InputError(
            f"{name} has {len(values)} entries for {cells} cells",
            "one label per cell, in the order of the rows",
            "Apply the same selection of cells to both",
        )
    codes = pd.factorize(values)[0]
    if (codes < 0).any():
        raise InputError(
            f"{name} is missing (None or NaN) for {int((codes < 0).sum())} of {len(codes)} cells",
            "a label for every scored cell",
            "Select the labelled cells first, the same ones in every argument",
        )
    return codes


def neighbor_graph(
    embedding: Matrix,
    *,
    neighbors: int = 15,
    seed: int = 0,
    metric: Metric = "euclidean",
    name: str = "X_embedding",
) -> Any:
    """Return an AnnData with scanpy's neighbour graph of the embedding.

    Args:
        embedding: float [cells, dimensions]; stored in ``obsm[name]``.
        neighbors: Size of the neighbourhood, the cell itself included.
        seed: Seed of the approximate search, which is used for many cells.
        metric: Distance between cells.
        name: Name of the embedding.

    Raises:
        InputError: The embedding is not a finite matrix, or has too few cells for ``neighbors``.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding, neighbors=neighbors)
    scanpy = require("scanpy", _EXTRA, "The neighbour graph of an embedding")
    cells = scanpy.AnnData(obs=pd.DataFrame(index=[str(n) for n in range(len(array))]))
    # A new AnnData, so that scanpy writes nothing into the caller's.
    cells.obsm[name] = array
    scanpy.pp.neighbors(
        cells,
        n_neighbors=neighbors,
        use_rep=name,
        metric=metric,
        random_state=seed,
    )
    return cells


def leiden_clusters(
    embedding: Matrix,
    *,
    neighbors: int = 15,
    resolution: float = 1.0,
    seed: int = 0,
    metric: Metric = "euclidean",
) -> Int32[np.ndarray, " cells"]:
    """Cluster cells with Leiden on scanpy's neighbour graph, without labels.

    Use it with :func:`clustering_scores`. The resolution is fixed in advance, so that the score measures the
    embedding. The result is a deterministic function of the arguments.

    Args:
        embedding: float [cells, dimensions].
        neighbors: Size of the neighbourhood, as in ``scanpy.pp.neighbors`` (the cell itself included).
        resolution: Resolution of the modularity; higher values give more clusters.
        seed: Seed of the neighbour search (approximate for many cells) and of Leiden.
        metric: Distance between cells.

    Returns:
        Clusters numbered from 0, largest first.

    Raises:
        InputError: The embedding is not a finite matrix, or has too few cells for ``neighbors``.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    cells = neighbor_graph(embedding, neighbors=neighbors, seed=seed, metric=metric)
    return leiden_of_graph(cells, resolution=resolution, seed=seed)


def leiden_of_graph(
    cells: Any,
    *,
    resolution: float = 1.0,
    seed: int = 0,
) -> Int32[np.ndarray, " cells"]:
    """Cluster the neighbour graph of an AnnData with Leiden, as in :func:`leiden_clusters`.

    Args:
        cells: AnnData after ``scanpy.pp.neighbors``; not changed.
        resolution: See :func:`leiden_clusters`.
        seed: Seed of Leiden.

    Returns:
        Clusters numbered from 0, largest first.

    Raises:
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    scanpy = require("scanpy", _EXTRA, "Leiden clustering")
    require("igraph", _EXTRA, "Leiden clustering")
    clusters = scanpy.tl.leiden(
        cells,
        resolution=resolution,
        random_state=seed,
        flavor="igraph",
        n_iterations=2,
        directed=False,
        key_added="cluster",
        copy=True,
    )
    clusters = clusters.obs["cluster"].astype(int).to_numpy()
    size = np.bincount(clusters)
    rank = np.empty(len(size), np.int32)
    # Numbered by size, the largest first, so that the numbers do not depend on igraph's order.
    rank[np.argsort(-size, kind="stable")] = np.arange(len(size))
    return rank[clusters]


def clustering_scores(labels: Labels, clusters: Labels) -> dict[str, float]:
    """Compare clusters with known labels.

    Both scores are symmetric and independent of the names of the groups. The adjusted Rand index is 0 for chance
    agreement and can be negative; NMI (arithmetic mean of the entropies) is not corrected for chance and grows with the
    number of clusters, so report both.

    Args:
        labels: [cells], any type. Known groups.
        clusters: [cells], any type. For example from :func:`leiden_clusters`.

    Returns:
        ``{"ari": ..., "nmi": ...}``. ARI: Hubert and Arabie, J. Classification 1985.

    Raises:
        InputError: The lengths differ, or a label is missing.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    metrics = require("sklearn.metrics", _EXTRA, "Scoring clusters")
    known = _codes(labels, "labels")
    if not len(known):
        raise InputError(
            "No cells to score", "at least one", "Check the selection of labelled cells"
        )
    groups = _codes(clusters, "clusters", cells=len(known))
    return {
        "ari": float(metrics.adjusted_rand_score(known, groups)),
        "nmi": float(metrics.normalized_mutual_info_score(known, groups)),
    }


def knn_accuracy(
    embedding: Matrix,
    labels: Labels,
    *,
    neighbors: int = 15,
    metric: Metric = "euclidean",
) -> float:
    """Return the fraction of cells whose nearest neighbours have the cell's own label by majority.

    Leave-one-out: a cell never votes for itself, even if several cells have the same embedding. Among labels with
    equally many votes the one with the nearest cell wins, so the order of the labels does not matter.

    Args:
        embedding: float [cells, dimensions].
        labels: [cells], any type.
        neighbors: Number of voting neighbours, the cell itself excluded.
        metric: Distance between cells.

    Returns:
        Accuracy between 0 and 1.

    Raises:
        InputError: Sizes do not match, a label is missing, or there are too few cells for ``neighbors``.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding, neighbors=neighbors)
    codes = _codes(labels, "labels", cells=len(array))
    search = require("sklearn.neighbors", _EXTRA, "Finding nearest cells")
    finder = search.NearestNeighbors(n_neighbors=neighbors, metric=metric).fit(array)
    # Without an argument, scikit-learn excludes the cell itself, also among equal embeddings.
    voters = codes[finder.kneighbors(return_distance=False)]  # [cells, neighbors], nearest first
    votes = np.zeros((len(array), codes.max() + 1), np.int32)
    row = np.arange(len(array))
    for place in range(neighbors):
        votes[row, voters[:, place]] += 1
    leading = votes == votes.max(axis=1, keepdims=True)
    first_leader = np.argmax(np.take_along_axis(leading, voters, axis=1), axis=1)
    return float(np.mean(voters[row, first_leader] == codes))


def batch_mixing(
    embedding: Matrix,
    batches: Labels,
    *,
    perplexity: float = 30.0,
    metric: Metric = "euclidean",
) -> float:
    """Return the batch mixing of an embedding: 0 separated, 1 evenly mixed around every cell.

    The local inverse Simpson index of Harmony ("iLISI"): neighbours of each cell are weighted by a Gaussian kernel of
    given perplexity; the index is the effective number of batches among them, between 1 and the number of batches. The
    mean over cells is scaled to between 0 and 1. Batches of unequal sizes cannot reach 1, and batches with
    different cell types should not: compare values within one data set.

    Args:
        embedding: float [cells, dimensions].
        batches: [cells], any type; at least two.
        perplexity: Effective number of neighbours; three times as many are used. Reduced for few cells.
        metric: Distance between cells.

    Returns:
        Mixing between 0 and 1. Korsunsky et al., Nature Methods 2019.

    Raises:
        InputError: Sizes do not match, a batch is missing, or there is only one.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding)
    codes = _batch_codes(batches, len(array))
    number = int(codes.max()) + 1
    # Beyond three times the perplexity the kernel weights are negligible, as in t-SNE.
    neighbors = int(min(3 * perplexity, len(array) - 1))
    search = require("sklearn.neighbors", _EXTRA, "Finding nearest cells")
    finder = search.NearestNeighbors(n_neighbors=neighbors, metric=metric).fit(array)
    distance, index = finder.kneighbors()  # excludes the cell itself
    weights = _perplexity_weights(np.asarray(distance, np.float64), min(perplexity, neighbors / 3))
    share = np.zeros((len(array), number))
    for place in range(neighbors):
        share[np.arange(len(array)), codes[index[:, place]]] += weights[:, place]
    effective = 1.0 / (share**2).sum(axis=1)
    return float((effective.mean() - 1.0) / (number - 1))


def _perplexity_weights(distance: np.ndarray, perplexity: float) -> np.ndarray:
    """Return weights ``exp(-beta distance)`` [cells, neighbors] that sum to 1 per row and have the given perplexity."""
    # The nearest at 0, so that the exponential does not underflow for distant cells.
    distance = distance - distance[:, :1]
    spread = np.maximum(distance.mean(axis=1, keepdims=True), 1e-12)
    low = np.full_like(spread, -30.0)
    high = np.full_like(spread, 30.0)  # log(beta * spread)
    weights = np.full_like(distance, 1.0 / distance.shape[1])
    # Bisection of the logarithm of beta for all cells at once.
    for _ in range(60):
        middle = (low + high) / 2
        kernel = np.exp(-np.exp(middle) * distance / spread)
        weights = kernel / kernel.sum(axis=1, keepdims=True)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1, keepdims=True)
        # A larger beta concentrates the weights.
        wide = entropy > np.log(max(perplexity, 1.0))
        low = np.where(wide, middle, low)
        high = np.where(wide, high, middle)
    return weights


def silhouette(
    embedding: Matrix,
    labels: Labels,
    *,
    metric: Metric = "euclidean",
    sample_cells: int | None = None,
    seed: int = 0,
) -> float:
    """Return the mean silhouette width of the labelled groups: 1 well separated, 0 touching, negative overlapping.

    Args:
        embedding: float [cells, dimensions].
        labels: [cells], any type; at least two groups, and fewer groups than cells.
        metric: Distance between cells.
        sample_cells: Score this number of randomly chosen cells instead of all; the time is quadratic in it.
        seed: Seed of the choice.

    Returns:
        Silhouette width between -1 and 1. Rousseeuw, J. Comput. Appl. Math. 1987.

    Raises:
        InputError: Sizes do not match, a label is missing, or there are fewer than two groups.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding)
    codes = _codes(labels, "labels", cells=len(array))
    if sample_cells is not None and sample_cells < len(array):
        chosen = np.random.default_rng(seed).choice(len(array), sample_cells, replace=False)
        array = array[chosen]
        codes = codes[chosen]
    groups = len(np.unique(codes))
    if not 2 <= groups < len(codes):
        raise InputError(
            f"{groups} label group(s) among {len(codes)} cells",
            "at least two groups and fewer groups than cells",
            "Pass a label with more than one cell per group",
        )
    metrics = require("sklearn.metrics", _EXTRA, "The silhouette width")
    return float(metrics.silhouette_score(array, codes, metric=metric))


def kbet(
    embedding: Matrix,
    batches: Labels,
    *,
    labels: Labels = None,
    neighbors: int | None = None,
    alpha: float = 0.05,
    metric: Metric = "euclidean",
) -> float:
    """Return the acceptance rate of kBET: 1 if the batches around every cell match those of all cells, 0 if never.

    For each cell the batches of its nearest cells, itself included, are counted and compared with the overall
    fractions by Pearson's chi-squared test (batches - 1 degrees of freedom). The rate is the fraction of cells at which
    the test does not reject. The rate of perfectly mixed cells is about ``1 - alpha``.

    Args:
        embedding: float [cells, dimensions].
        batches: [cells], any type; at least two.
        labels: [cells], any type. Test among the cells of each label separately and average the rates over the labels,
            so that differences in composition are not penalised (Luecken et al. 2022, who find the
            neighbours of a label by diffusion on a graph; here they are the nearest cells of the label). Labels with
            fewer than ten cells or one batch are omitted. None: all cells together.
        neighbors: Size of the neighbourhood, the cell included. None: a quarter of the mean size of the batches (within
            the label), between 10 and 70, as in Luecken et al.
        alpha: Level of significance.
        metric: Distance between cells.

    Returns:
        Rate between 0 and 1. Buettner et al., Nature Methods 2019.

    Raises:
        InputError: Sizes do not match, a batch is missing, there is only one, or no label can be tested.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding, neighbors=neighbors)
    codes = _batch_codes(batches, len(array))
    if labels is None:
        return _acceptance(array, codes, neighbors, alpha, metric)
    groups = _codes(labels, "labels", cells=len(array))
    rates = []
    for group in range(groups.max() + 1):
        cells = groups == group
        if cells.sum() >= 10 and len(np.unique(codes[cells])) > 1:
            rates.append(_acceptance(array[cells], codes[cells], neighbors, alpha, metric))
    if not rates:
        raise InputError(_nothing_mixed())
    return float(np.mean(rates))


def _acceptance(
    array: np.ndarray,
    codes: np.ndarray,
    neighbors: int | None,
    alpha: float,
    metric: str,
) -> float:
    """Return the fraction of cells at which the batch composition is not rejected."""
    size = np.unique(codes, return_counts=True)[1]
    if neighbors is None:
        # A quarter of the mean batch size, between 10 and 70, as in scib.
        neighbors = min(70, max(10, int(size.mean()) // 4))
    neighbors = min(neighbors, len(array))
    search = require("sklearn.neighbors", _EXTRA, "Finding nearest cells")
    finder = search.NearestNeighbors(n_neighbors=neighbors, metric=metric).fit(array)
    near = codes[finder.kneighbors(array, return_distance=False)]
    counted = [(near == code).sum(axis=1) for code in np.unique(codes)]
    observed = np.stack(counted, axis=1)
    expected = neighbors * size / size.sum()
    statistic = ((observed - expected) ** 2 / expected).sum(axis=1)
    return float(np.mean(special.chdtrc(len(size) - 1, statistic) >= alpha))


def _batch_codes(batches: Labels, cells: int) -> np.ndarray:
    """Return batches as integers 0..k-1; a single batch raises an error."""
    codes = _codes(batches, "batches", cells=cells)
    number = int(codes.max()) + 1
    if number < 2:
        raise InputError(
            f"{number} batch among {len(codes)} cells",
            "at least two batches",
            "Pass the cells of several samples",
        )
    return codes


def _nothing_mixed() -> str:
    return explain(
        "No label has enough cells of more than one batch",
        "a label that occurs in several batches",
        "Omit labels, or pass coarser ones",
    )


def batch_silhouette(
    embedding: Matrix,
    batches: Labels,
    labels: Labels,
    *,
    metric: Metric = "euclidean",
) -> float:
    """Return the overlap of the batches within each label: 1 complete, 0 none ("batch ASW").

    One minus the absolute silhouette width of the batch, averaged over the cells of each label and then over the
    labels; labels with one batch, or with no batch of more than one cell, are omitted. High values are easy to reach if
    a label has several batches (Rautenstrauch and Ohler 2025): report it together with :func:`batch_mixing`.

    Args:
        embedding: float [cells, dimensions].
        batches: [cells], any type; at least two.
        labels: [cells], any type. Groups within which batches should overlap.
        metric: Distance between cells.

    Returns:
        Overlap between 0 and 1. Luecken et al., Nature Methods 2022.

    Raises:
        InputError: Sizes do not match, a batch or label is missing, or no label can be scored.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding)
    codes = _batch_codes(batches, len(array))
    groups = _codes(labels, "labels", cells=len(array))
    metrics = require("sklearn.metrics", _EXTRA, "The silhouette width")
    overlaps = []
    for group in range(groups.max() + 1):
        cells = groups == group
        if 1 < len(np.unique(codes[cells])) < cells.sum():
            width = metrics.silhouette_samples(array[cells], codes[cells], metric=metric)
            overlaps.append(1.0 - np.abs(width).mean())
    if not overlaps:
        raise InputError(_nothing_mixed())
    return float(np.mean(overlaps))


def integration_scores(
    embedding: Matrix,
    batches: Labels,
    labels: Labels = None,
    *,
    neighbors: int = 15,
    resolution: float = 1.0,
    seed: int = 0,
    metric: Metric = "euclidean",
) -> dict[str, float]:
    """Score batch mixing and preserved biology of an embedding.

    The two are a trade-off: an embedding that maps all cells to one point mixes perfectly. Report both, and
    compare embeddings of the same cells. Nothing is optimised: Leiden runs once at the given resolution.

    Args:
        embedding: float [cells, dimensions].
        batches: [cells], any type; at least two. None: one batch, without mixing scores.
        labels: [cells], cell types of any type. Cells without one (None or NaN) only count for mixing. None: no
            labels; only scores without labels are returned.
        neighbors: Number of neighbours of Leiden's graph and of the kNN accuracy.
        resolution: Resolution of Leiden, fixed in advance.
        seed: Seed of Leiden.
        metric: Distance between cells.

    Returns:
        Batch mixing, if there are batches, higher is better: ``ilisi`` (:func:`batch_mixing`), ``kbet``
        (:func:`kbet` of all cells); with labels ``kbet_per_label`` and ``batch_silhouette`` if a label has several
        batches. Preserved biology, with at least two labels: ``ari`` and ``nmi`` of Leiden clusters, ``knn_accuracy``,
        ``label_silhouette`` (-1 to 1). ``clusters``: number of Leiden clusters.

    Raises:
        InputError: Sizes do not match, a batch is missing, or there is only one.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    array = _checked_embedding(embedding, neighbors=neighbors)
    codes, scores = None, {}
    if batches is not None:
        codes = _batch_codes(batches, len(array))
        scores["ilisi"] = batch_mixing(array, codes, metric=metric)
        scores["kbet"] = kbet(array, codes, metric=metric)
    given: dict[str, Any] = {"neighbors": neighbors, "seed": seed, "metric": metric}
    clusters = leiden_clusters(array, resolution=resolution, **given)
    scores["clusters"] = float(clusters.max() + 1)
    if labels is None:
        return scores
    values = one_axis(labels, "labels")
    known = ~np.asarray(pd.isna(values))  # type: ignore[arg-type]
    if len(known) != len(array):
        _codes(values, "labels", cells=len(array))
    own = pd.factorize(np.asarray(values, object)[known])[0]
    if len(own) <= neighbors or own.max() < 1:
        return scores
    array = array[known]
    for name, score in (("kbet_per_label", kbet), ("batch_silhouette", batch_silhouette)):
        if codes is None:
            continue
        try:
            scores[name] = score(array, codes[known], labels=own, metric=metric)
        except InputError:
            continue  # no label is in several batches
    scores |= clustering_scores(own, clusters[known])
    scores["knn_accuracy"] = knn_accuracy(array, own, neighbors=neighbors, metric=metric)
    scores["label_silhouette"] = silhouette(array, own, metric=metric)
    return scores


def pca_baseline(
    counts: Matrix,
    *,
    genes: int = 2000,
    components: int = 50,
    seed: int = 0,
) -> Float32[np.ndarray, "cells components"]:
    """Embed cells with scanpy's standard PCA recipe, as a baseline for learned embeddings.

    Genes that no cell expresses are removed; every cell is scaled to 10,000 counts; log1p; highly variable genes by
    normalised dispersion (scanpy flavor ``seurat``); each gene to mean 0 and variance 1, clipped at 10; principal
    components.

    Args:
        counts: Raw counts [cells, genes], scipy sparse or dense. Not changed.
        genes: Number of highly variable genes; all if fewer are expressed.
        components: Number of principal components; fewer if there are not enough cells or genes.
        seed: Seed of the start vector of the solver.

    Returns:
        Up to min(components, cells - 1, kept genes - 1) components.

    Raises:
        InputError: The matrix does not contain raw counts, or is too small.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    scanpy = require("scanpy", _EXTRA, "The PCA baseline")
    matrix = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    stored = matrix.data
    counts_only = np.isfinite(stored) & (stored >= 0) & (stored == np.rint(stored))
    if not counts_only.all():
        raise InputError(
            "The matrix contains values that are negative, fractional or not finite",
            "raw counts (integers)",
            "Pass the layer with the raw counts; this function normalises them",
        )
    matrix.eliminate_zeros()
    expressed = np.flatnonzero(matrix.getnnz(axis=0))
    number = len(matrix.indptr) - 1
    if number < 3 or len(expressed) < 3 or genes < 3 or components < 1:
        raise InputError(
            f"{number} cells, {len(expressed)} expressed genes, genes={genes}, components={components}",
            "at least three cells, three expressed genes, genes=3 and components=1",
            "Pass more data or larger arguments",
        )
    cells: Any = scanpy.AnnData(matrix[:, expressed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cells without counts are allowed
        scanpy.pp.normalize_total(cells, target_sum=1e4)
        scanpy.pp.log1p(cells)
        if genes < cells.n_vars:
            scanpy.pp.highly_variable_genes(cells, n_top_genes=genes, flavor="seurat")
            cells = cells[:, cells.var["highly_variable"].to_numpy()].copy()
        cells = scanpy.AnnData(cells.X.toarray())
        scanpy.pp.scale(cells, max_value=10)
        components = min(components, cells.n_obs - 1, cells.n_vars - 1)
        scanpy.pp.pca(
            cells,
            n_comps=components,
            svd_solver="arpack",
            mask_var=None,
            random_state=seed,
        )
    return np.ascontiguousarray(cells.obsm["X_pca"], dtype=np.float32)


def umap_coordinates(
    embedding: Matrix,
    *,
    seed: int = 0,
    neighbors: int = 15,
    minimum_distance: float = 0.5,
    metric: Metric = "euclidean",
) -> Float32[np.ndarray, "cells 2"]:
    """Compute UMAP coordinates for visualisation; do not compute scores on them.

    Args:
        embedding: float [cells, dimensions].
        seed: Random seed; the result is reproducible on the same machine and versions.
        neighbors: As in :func:`leiden_clusters`; the same graph is used.
        minimum_distance: Minimum distance between points.
        metric: Distance between cells.

    Raises:
        InputError: The embedding is not a finite matrix, or has too few cells for ``neighbors``.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    scanpy = require("scanpy", _EXTRA, "UMAP")
    cells = neighbor_graph(embedding, neighbors=neighbors, seed=seed, metric=metric)
    scanpy.tl.umap(cells, min_dist=minimum_distance, random_state=seed)
    return np.asarray(cells.obsm["X_umap"], dtype=np.float32)
