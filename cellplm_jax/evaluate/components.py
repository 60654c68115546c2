"""Principal components and discriminants of expression, computed from blocks of cells that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Integer, Real, Shaped
from scipy import linalg, sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.inputs import column_means, row_sums

OVERSAMPLING = 20
"""Extra directions of the randomized decomposition."""

CLIP, OWN_CLIP = 8.0, 10.0
"""Largest standardized expression of a corpus and of a single dataset, in standard deviations."""

CENTRED_CELLS = 20
"""Tissue samples with fewer cells are centred at the mean of all cells."""

BLOCK = 2048
"""Cells of a block that is dense at once."""


def variable_genes(
    mean: Float[np.ndarray, " genes"],
    variance: Float[np.ndarray, " genes"],
    number: int,
    usable: Bool[np.ndarray, " genes"] | None = None,
) -> Int[np.ndarray, " chosen"]:
    """Choose highly variable genes by dispersion, compared with genes of similar mean.

    Genes are binned by log mean into 20 quantiles; the dispersion (variance / mean) is standardized within each bin
    (Satija et al. 2015, as in ``scanpy.pp.highly_variable_genes``).

    Args:
        mean: Mean log expression.
        variance: Of the same.
        number: Maximum number of genes.
        usable: Genes that may be chosen; None: those with a positive mean.

    Returns:
        Indices of genes, most variable first.
    """
    usable = mean > 0 if usable is None else usable & (mean > 0)
    dispersion = variance / np.maximum(mean, 1e-6)
    level = np.log(mean + 1e-6)
    score = np.full(len(mean), -np.inf)
    if usable.any():
        # Quantiles, unlike scanpy's equal widths: bins of a large corpus would have few genes at the ends.
        edges = np.quantile(level[usable], np.linspace(0, 1, 21)[1:-1])
        bins = np.digitize(level, edges)
        for place in np.unique(bins[usable]):
            inside = usable & (bins == place)
            spread = dispersion[inside].std()
            score[inside] = (dispersion[inside] - dispersion[inside].mean()) / max(spread, 1e-9)
    order = np.argsort(-score, kind="stable")
    return order[: min(number, int(usable.sum()))]


def dispersed_genes(
    mean: Float[np.ndarray, " genes"],
    variance: Float[np.ndarray, " genes"],
    number: int,
) -> Int[np.ndarray, " chosen"]:
    """Choose highly variable genes of one dataset, as ``scanpy.pp.highly_variable_genes`` does by default.

    The log dispersion of normalized counts is standardized within 20 bins of equal width of the log mean (flavor
    "seurat", Satija et al. 2015).

    Args:
        mean: Mean normalized count, not logarithmic.
        variance: Of the same, with Bessel's correction.
        number: Maximum number of genes.

    Returns:
        Indices of genes, most variable first.
    """
    expressed = np.flatnonzero((mean > 0) & (variance > 0))
    if not len(expressed):
        return expressed
    dispersion = np.log(variance[expressed] / mean[expressed])
    level = np.log1p(mean[expressed])
    edges = np.linspace(level.min(), level.max(), 21)[1:-1]
    bins = np.digitize(level, edges, right=True)
    sizes = np.bincount(bins, minlength=20)
    centre = np.bincount(bins, dispersion, 20) / np.maximum(sizes, 1)
    squares = np.bincount(bins, (dispersion - centre[bins]) ** 2, 20)
    spread = np.sqrt(squares / np.maximum(sizes - 1, 1))
    # A gene alone in its bin counts as one deviation above it.
    alone = sizes == 1
    spread[alone], centre[alone] = centre[alone], 0
    score = (dispersion - centre[bins]) / np.where(spread == 0, 1e-12, spread)[bins]
    return expressed[np.argsort(-score, kind="stable")[:number]]


def principal_components(
    blocks: Callable[[], Iterable[np.ndarray]],
    genes: int,
    components: int,
    *,
    passes: int = 4,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Float32[np.ndarray, "genes components"], Float64[np.ndarray, " components"]]:
    """Decompose a matrix of cells by genes that is only seen in blocks of rows (Halko et al. 2011).

    Args:
        blocks: Returns the blocks, float32 [cells, genes], centred; called once per pass.
        genes: Number of columns.
        components: Number of components; fewer are returned if the matrix has fewer columns.
        passes: Passes over the blocks, at least 2; the last one gives the singular values.
        seed: Seed of the random directions.
        advance: Called after each block.

    Returns:
        Loadings and singular values, largest first. The sign of a
        component is such that its loadings have a positive sum of cubes.
    """
    width = min(components + OVERSAMPLING, genes)
    basis = np.random.default_rng(seed).standard_normal((genes, width)).astype(np.float32)
    basis = np.linalg.qr(basis)[0]
    # Power iterations: each sharpens the spectrum, at the cost of a pass over the data.
    for _ in range(max(passes - 1, 1)):
        total = np.zeros((genes, width), np.float32)
        for block in blocks():
            total += block.T @ (block @ basis)
            advance()
        # Orthonormal after each pass, or all columns converge to the first component in float32.
        basis = np.linalg.qr(total)[0]
    gram = np.zeros((width, width))
    for block in blocks():
        projected = block @ basis
        gram += projected.T @ projected
        advance()
    values, vectors = np.linalg.eigh(gram)
    order = np.argsort(-values)[: min(components, genes)]
    loadings = basis @ vectors[:, order].astype(np.float32)
    # The sign of a component is arbitrary; a positive third moment makes it reproducible.
    sign = np.where(
        (loadings.astype(np.float64) ** 3).sum(axis=0) < 0,
        -1,
        1,
    )
    strength = np.sqrt(np.maximum(values[order], 0))
    return (loadings * sign).astype(np.float32), strength


def log_normalized(
    counts: Real[sparse.csr_matrix, "cells genes"], target_sum: float = 1e4
) -> Float32[sparse.csr_matrix, "cells genes"]:
    """Return log1p of counts scaled to ``target_sum`` per cell."""
    total = np.maximum(row_sums(counts), 1)
    data = np.log1p(counts.data * np.repeat(target_sum / total, np.diff(counts.indptr)))
    return sparse.csr_matrix(
        (data.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape
    )


def variable_columns(
    blocks: Callable[[], Iterable[sparse.csr_matrix]],
    *,
    genes: int = 2000,
) -> tuple[Int[np.ndarray, " chosen"], Float32[np.ndarray, " chosen"]]:
    """Choose the highly variable genes of a dataset.

    Args:
        blocks: Returns log-normalized expression, CSR [cells, genes], in blocks of cells; called once.
        genes: Maximum number of highly variable genes, chosen by :func:`dispersed_genes`.

    Returns:
        Their columns, and the standard deviation of each.

    Raises:
        InputError: There are fewer than 3 cells, or fewer than 2 genes vary.
    """
    cells, sums = 0, np.zeros((4, 0))
    for block in blocks():
        if not cells:
            sums = np.zeros((4, block.shape[1]))
        cells += block.shape[0]
        normalized = np.expm1(block.data.astype(np.float64))
        # Moments of logarithms for scaling, of normalised counts for the choice of genes.
        for row, values in enumerate((block.data, block.data**2, normalized, normalized**2)):
            sums[row] += np.bincount(block.indices, values, sums.shape[1])
    mean, square, level, power = sums / max(cells, 1)
    variance = np.maximum(square - mean**2, 0)
    scatter = np.maximum(power - level**2, 0) * cells / max(cells - 1, 1)
    chosen = dispersed_genes(level, np.where(variance > 1e-12, scatter, 0), genes)
    if len(chosen) < 2 or cells < 3:
        raise InputError(
            f"{len(chosen)} genes that vary between {cells} cells",
            "at least 2 genes and 3 cells to compute components from",
        )
    return chosen, np.sqrt(variance[chosen]).astype(np.float32)


def variable_expression(
    blocks: Callable[[], Iterable[sparse.csr_matrix]],
    *,
    genes: int = 2000,
) -> tuple[Float32[sparse.csr_matrix, "cells chosen"], Float32[np.ndarray, " chosen"]]:
    """Return the expression of the highly variable genes of a dataset.

    Args:
        blocks: Returns log-normalized expression, CSR [cells, genes], in blocks of cells; called twice.
        genes: Maximum number of highly variable genes, chosen by :func:`dispersed_genes`.

    Returns:
        The expression, and the standard deviation of each gene.

    Raises:
        InputError: There are fewer than 3 cells, or fewer than 2 genes vary.
    """
    chosen, deviation = variable_columns(blocks, genes=genes)
    # A second pass: all genes of all cells would take many times the memory of the chosen ones.
    expression = sparse.vstack([block[:, chosen] for block in blocks()])
    return sparse.csr_matrix(expression), deviation


def standardized(
    expression: Float32[sparse.csr_matrix, "cells genes"],
    sample_of: Integer[np.ndarray, " cells"],
    deviation: Float32[np.ndarray, " genes"] | None = None,
    *,
    mean: Float32[np.ndarray, " genes"] | None = None,
) -> Callable[[], Iterable[np.ndarray]]:
    """Return a function that returns expression in dense blocks of cells, centred by tissue sample.

    Args:
        expression: Log-normalized, from :func:`variable_expression`.
        sample_of: Number of each cell's tissue sample.
        deviation: Genes are divided by it and clipped at 10 deviations. None: genes are not scaled.
        mean: Centre of samples with fewer than 20 cells; None: the mean of all cells.
    """
    if mean is None:
        mean = column_means(expression, "float32")
    names, codes = np.unique(sample_of, return_inverse=True)
    centre = np.tile(mean, (len(names), 1))
    for sample in range(len(names)):
        members = np.flatnonzero(codes == sample)
        # The mean of a few cells is mostly noise, and centring would remove what distinguishes them.
        if len(members) >= CENTRED_CELLS:
            centre[sample] = column_means(expression[members])

    def blocks() -> Iterable[np.ndarray]:
        for start in range(0, expression.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            dense = expression[rows].toarray() - centre[codes[rows]]
            if deviation is not None:
                dense = np.clip(dense / deviation, -OWN_CLIP, OWN_CLIP)
            yield dense

    return blocks


def own_components(
    expression: Float32[sparse.csr_matrix, "cells genes"],
    sample_of: Integer[np.ndarray, " cells"],
    deviation: Float32[np.ndarray, " genes"] | None = None,
    *,
    components: int = 50,
) -> Float[np.ndarray, "cells components"]:
    """Return the principal components of a dataset, centred by tissue sample.

    Args:
        expression: See :func:`standardized`.
        sample_of: See :func:`standardized`.
        deviation: See :func:`standardized`.
        components: Number of components; fewer are returned if there are few cells or genes.
    """
    cells = expression.shape[0]
    genes = expression.shape[1]
    blocks = standardized(expression, sample_of, deviation)
    number = min(components, cells - 1, genes - 1)
    loadings, _ = principal_components(blocks, genes, number, passes=6)
    return np.concatenate([block @ loadings for block in blocks()])


class Discriminants:
    """Pooled scatter of several datasets, each with clusters of its own, and the directions that separate them.

    Each dataset adds its within-cluster and between-cluster scatter, weighted by the square root of its cells; clusters
    of a dataset weigh as the square root of their size. This is linear discriminant analysis with a pooled, shrunken
    covariance.

    Args:
        dimensions: Width of the embeddings.
        shrinkage: Weight of the identity in the within-cluster scatter.
        minimum_cells: Clusters with fewer cells do not add to the scatter between clusters.
    """

    def __init__(self, dimensions: int, *, shrinkage: float = 0.1, minimum_cells: int = 5):
        self._within = np.zeros((dimensions, dimensions))
        self._between = np.zeros((dimensions, dimensions))
        self._shrinkage = shrinkage
        self._minimum = minimum_cells

    def add(
        self,
        embedding: Float[np.ndarray, "cells dimensions"],
        clusters: Shaped[np.ndarray, " cells"],
    ) -> None:
        """Add a dataset: its centred embedding, and the cluster of each cell."""
        _, codes, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
        large = sizes >= self._minimum
        if large.sum() < 2:
            return
        embedding = np.asarray(embedding, np.float64)
        totals = np.zeros((len(sizes), embedding.shape[1]))
        np.add.at(totals, codes, embedding)
        means = totals / sizes[:, None]
        inside = embedding - means[codes]
        # Between equal weight per data set and per cell, so that no atlas decides alone.
        weight = np.sqrt(len(embedding))
        self._within += weight / len(embedding) * inside.T @ inside
        share = np.sqrt(sizes) * large
        outside = means - embedding.mean(axis=0)
        self._between += weight * (outside * (share / share.sum())[:, None]).T @ outside

    def directions(self, number: int) -> Float64[np.ndarray, "dimensions found"]:
        """Return up to ``number`` directions, the most discriminating one first; none without data."""
        size = len(self._within)
        if not np.trace(self._within) > 0 or not np.trace(self._between) > 0:
            return np.zeros((size, 0))
        within = self._within / (np.trace(self._within) / size)
        # Both scatters were scaled to a trace of their size, so that the shrinkage does not depend on units.
        within = (1 - self._shrinkage) * within + self._shrinkage * np.eye(size)
        between = self._between / (np.trace(self._between) / size)
        values, vectors = linalg.eigh(between, within)
        return vectors[:, np.argsort(-values)[:number]]


def unit_length(
    embedding: Float[np.ndarray, "cells dimensions"],
) -> Float[np.ndarray, "cells dimensions"]:
    """Scale each row to length 1; a row of zeros stays as it is."""
    length = np.linalg.norm(embedding, axis=1, keepdims=True)
    return embedding / np.maximum(length, 1e-9)
