"""Pool of a denoiser: network, mean over the nearest cells and gene mean, weighted by held-out molecules.

The parts do not read the count that they predict. Their weights are fitted by molecular cross-validation (Batson et
al. 2019): a tenth of the molecules is held out by binomial thinning, the parts are computed from the others, and the
weights maximise the likelihood of the held-out ones. A held-out count enters with its square root: the molecules of a
gene in one cell are not independent, and otherwise a few deep counts decide for all (`benchmarks/denoise/evidence.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.components import (
    BLOCK,
    log_normalized,
    own_components,
    unit_length,
    variable_expression,
)

PARTS = ("gene_mean", "neighbours", "network")
"""The parts of the pool, in the order of its weights."""

HELD_OUT = 0.1
"""Share of the molecules that the weights are fitted to."""

LATENT = 0.7
"""Length of the latent next to principal components of length 1."""

NEIGHBORS, BANDWIDTH = 150, 15
"""Nearest cells that are averaged, and the one whose distance is the bandwidth of their Gaussian weights."""

CANDIDATES = 20_000
"""Maximum number of cells of a batch that are searched for neighbours."""

CLUSTER_CELLS, CLUSTERS = 60, 40
"""Mean number of cells of a cluster, and the maximum number of clusters of a batch."""

CLUSTER_PRIOR = 30.0
"""Molecules of a gene in a cluster at which its own mean and the prediction weigh the same."""

WEIGHT_PRIOR, MEAN_PRIOR = 100.0, 50.0
"""Strength of the common weights in root counts of a gene, and of the fitted gene means in cells of mean depth."""

ROWS = 512
"""Cells whose parts are dense at once."""

EVIDENCE = 0.5
"""Power of a held-out count in the fit; 1: every molecule weighs the same, 0: every count."""

MARGIN = 0.002
"""Smallest change of the log-likelihood that counts as a difference."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Fitted weights of the parts.

    Attributes:
        weights: float32 [genes, parts], at least 0, sum to one.
        dispersion: float32 [genes], inverse dispersion of counts around the pooled prediction.
        gene_means: float32 [genes], share of each gene in the counts.
        scores: ``rmse`` by method on held-out entries whose count was thinned to 0 (log1p of counts per 10,000),
            ``log_likelihood`` of held-out counts (mean log share, weighted by the square root of the count),
            ``calibration_error``, mean ``weights``, and ``alone``, the name of the part that the pool fell back to,
            or "".
    """

    weights: np.ndarray
    dispersion: np.ndarray
    gene_means: np.ndarray
    scores: dict[str, Any]

    def message(self) -> str:
        """Return one sentence: the scores of pool and parts, and whether the pool is better with the network."""
        score = self.scores["log_likelihood"]
        listed = ", ".join(f"{name.replace('_', ' ')} {score[name]:.3f}" for name in PARTS[::-1])
        gain = score["without_correction"] - score["without_network"]
        network = (
            f"the network raises it by {gain:.3f}" if gain > MARGIN else "the network adds nothing"
        )
        return (
            f"Log-likelihood of held-out counts (higher is better): pooled {score['pooled']:.3f} ({listed}); "
            f"{network}"
        )


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of the pool for the cells of one batch, as shares of a cell's counts.

    Attributes:
        rows: int [cells], the cells in the file.
        counts: CSR [cells, genes].
        totals: float32 [cells], counts per cell.
        mean: float32 [genes].
        kernel: CSR [cells, cells], weights of the nearest cells, without the cell itself.
        network: float32 [cells, genes].
        clusters: int [cells].
    """

    rows: np.ndarray
    counts: sparse.csr_matrix
    totals: np.ndarray
    mean: np.ndarray
    kernel: sparse.csr_matrix
    network: np.ndarray
    clusters: np.ndarray

    def neighbours(self, rows: slice) -> np.ndarray:
        """Return float32 [cells, genes]: counts of the nearest cells over their totals; else the gene mean."""
        kernel = self.kernel[rows]
        total = np.asarray(kernel @ self.totals).ravel()
        mean = (kernel @ self.counts).toarray() / np.maximum(total, 1e-12)[:, None]
        mean[total <= 0] = self.mean
        return mean.astype(np.float32)

    def combined(
        self,
        weights: np.ndarray,
        *,
        correct: bool = True,
        advance: Callable[[int], None] = lambda cells: None,
    ) -> np.ndarray:
        """Return float32 [cells, genes]: the weighted parts, with rows that sum to one.

        Args:
            weights: float [genes, parts].
            correct: Scale each gene in each cluster towards the cluster's own mean, which keeps the contrast between
                cell types; few molecules change the scale little.
            advance: Called with the number of pooled cells.
        """
        weights = np.asarray(weights, np.float32)
        pooled = self.network * weights[:, 2]
        for start in range(0, len(pooled), ROWS):
            rows = slice(start, start + ROWS)
            pooled[rows] += self.mean * weights[:, 0]
            if weights[:, 1].any():
                pooled[rows] += self.neighbours(rows) * weights[:, 1]
            advance(len(pooled[rows]))
        if correct:
            for cluster in np.unique(self.clusters):
                members = np.flatnonzero(self.clusters == cluster)
                expected = self.totals[members] @ pooled[members]
                pooled[members] *= _ratio(self.counts[members], expected, CLUSTER_PRIOR)
        pooled /= np.maximum(pooled.sum(axis=1, keepdims=True), 1e-12)
        return pooled

    def at(self, row: np.ndarray, gene: np.ndarray) -> np.ndarray:
        """Return float32 [entries, parts]: the parts at entries that are sorted by row."""
        values = np.empty((len(row), len(PARTS)), np.float32)
        values[:, 0], values[:, 2] = self.mean[gene], self.network[row, gene]
        for start in range(0, len(self.totals), ROWS):
            here = slice(*np.searchsorted(row, [start, start + ROWS]))
            if here.stop > here.start:
                mean = self.neighbours(slice(start, start + ROWS))
                values[here, 1] = mean[row[here] - start, gene[here]]
        return values


def make_parts(
    counts: sparse.csr_matrix,
    latent: np.ndarray,
    network: np.ndarray,
    batch: np.ndarray,
    gene_means: np.ndarray | None = None,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda cells: None,
) -> list[Parts]:
    """Compute the parts, for each batch from its own cells.

    Args:
        counts: CSR [cells, genes].
        latent: float [cells, latent], from the network.
        network: float32 [cells, genes], means predicted by the network, in any unit; changed in place.
        batch: [cells], batches; their cells are not averaged with one another.
        gene_means: float [genes], shares that stabilise the means of small batches; None: the network's.
        seed: Seed of clusters and candidates.
        advance: Called with the number of cells whose neighbours were found.

    Returns:
        One entry per batch.
    """
    network /= np.maximum(network.sum(axis=1, keepdims=True), 1e-12)
    prior = network.mean(axis=0) if gene_means is None else np.asarray(gene_means)
    prior = prior / max(float(prior.sum()), 1e-12)
    parts = []
    for name in dict.fromkeys(batch):
        rows = np.flatnonzero(batch == name)
        own = sparse.csr_matrix(counts[rows])
        totals = np.asarray(own.sum(axis=1), np.float32).ravel()
        weight = MEAN_PRIOR * max(float(totals.mean()), 1.0)
        mean = (np.asarray(own.sum(axis=0)).ravel() + weight * prior) / (totals.sum() + weight)
        # A network fitted on other cells has other gene means: only its differences between cells are used.
        shares = network if len(rows) == len(network) else network[rows]
        shares *= _ratio(own, totals @ shares, CLUSTER_PRIOR)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
        place = joined_embedding(latent[rows], own)
        parts.append(
            Parts(
                rows, own, totals, mean.astype(np.float32), nearest_cells(place, seed=seed, advance=advance), shares,
                kmeans(place, min(CLUSTERS, max(1, len(rows) // CLUSTER_CELLS)), seed=seed),
            )
        )  # fmt: skip
    return parts


def combine(
    parts: Sequence[Parts],
    weights: np.ndarray,
    *,
    correct: bool = True,
    advance: Callable[[int], None] = lambda cells: None,
) -> np.ndarray:
    """Return float32 [cells, genes]: the pooled shares of all batches, in the order of the file.

    Args:
        parts: From :func:`make_parts`.
        weights: float [genes, parts].
        correct: See :meth:`Parts.combined`.
        advance: Called with the number of pooled cells.
    """
    if len(parts) == 1:
        return parts[0].combined(weights, correct=correct, advance=advance)
    pooled = np.zeros((sum(len(part.rows) for part in parts), len(weights)), np.float32)
    for part in parts:
        pooled[part.rows] = part.combined(weights, correct=correct, advance=advance)
    return pooled


def alone(name: str, genes: int) -> np.ndarray:
    """Return the weights [genes, parts] of one part alone."""
    return np.tile(np.eye(len(PARTS), dtype=np.float32)[PARTS.index(name)], (genes, 1))


def thin(counts: sparse.csr_matrix, *, seed: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split molecules at random.

    Args:
        counts: CSR [cells, genes], integers.
        seed: Seed of the split.

    Returns:
        The kept and the held-out counts, CSR float32, which sum to the counts.
    """
    whole = np.rint(counts.data).astype(np.int64)
    held = np.random.default_rng(seed).binomial(whole, HELD_OUT)
    pair = []
    for values in (whole - held, held):
        part = sparse.csr_matrix(
            (values.astype(np.float32), counts.indices.copy(), counts.indptr.copy()), counts.shape
        )
        part.eliminate_zeros()
        pair.append(part)
    return pair[0], pair[1]


def fit_pool(
    parts: Sequence[Parts],
    held: sparse.csr_matrix,
    *,
    evidence: float = EVIDENCE,
    seed: int = 0,
) -> Pool:
    """Fit the weights to held-out molecules.

    Args:
        parts: From :func:`make_parts` with the kept counts.
        held: CSR [cells, genes], the held-out counts.
        evidence: See :data:`EVIDENCE`.
        seed: Seed of the halves that decide between the pool and a part alone.

    Returns:
        The pool; a part alone if that predicts held-out molecules better than the pool does.
    """
    genes = held.shape[1]
    values, entries, before = [], [], []
    for part in parts:
        own = sparse.csr_matrix(held[part.rows]).tocoo()
        order = np.argsort(own.row, kind="stable")
        row, gene, count = own.row[order], own.col[order], own.data[order]
        values.append(part.at(row, gene))
        entries.append((row, gene, count))
        before.append(np.asarray(part.counts[row, gene]).ravel() if len(row) else np.zeros(0))
    found = np.concatenate(values)
    gene = np.concatenate([entry[1] for entry in entries])
    count = np.concatenate([entry[2] for entry in entries]).astype(np.float64)
    weight = count**evidence
    if not len(gene):
        weights, fallback = np.full((genes, len(PARTS)), 1 / len(PARTS), np.float32), ""
    else:
        half = np.random.default_rng(seed).random(len(gene)) < 0.5
        trial = _fit_weights(found[half], gene[half], weight[half], genes)
        other = ~half
        pooled = _likelihood((found * trial[gene]).sum(axis=1)[other], weight[other])
        single = [_likelihood(found[other, part], weight[other]) for part in range(len(PARTS))]
        fallback = PARTS[int(np.argmax(single))] if max(single) > pooled else ""
        weights = alone(fallback, genes) if fallback else _fit_weights(found, gene, weight, genes)
    without = _fit_weights(found[:, :2], gene, weight, genes)
    corrected, power, excess = [], np.zeros(genes), np.zeros(genes)
    bins = np.zeros((2, CALIBRATION_BINS))
    for part, (row, column, _) in zip(parts, entries, strict=True):
        pooled = part.combined(weights)
        corrected.append(pooled[row, column])
        _count_calibration(bins, pooled, part.totals * (HELD_OUT / (1 - HELD_OUT)), held[part.rows])
        for start in range(0, len(pooled), ROWS):
            rows = slice(start, start + ROWS)
            expected = pooled[rows] * part.totals[rows, None]
            power += np.square(expected).sum(axis=0)
            excess += (np.square(part.counts[rows].toarray() - expected) - expected).sum(axis=0)
    dispersion = np.clip((power + 1) / np.maximum(excess + 1, 1e-3), 0.05, 1e4)
    predictions = {
        "pooled": np.concatenate(corrected),
        "without_correction": (found * weights[gene]).sum(axis=1),
        "without_network": (found[:, :2] * without[gene]).sum(axis=1),
        **{name: found[:, number] for number, name in enumerate(PARTS)},
    }
    gone = np.concatenate(before) == 0
    total = np.concatenate(
        [part.totals[entry[0]] for part, entry in zip(parts, entries, strict=True)]
    )
    truth = np.log1p(count[gone] * 1e4 / np.maximum(total[gone] / (1 - HELD_OUT), 1))
    scores = {
        "rmse": {name: _rmse(truth, np.log1p(1e4 * p[gone])) for name, p in predictions.items()},
        "log_likelihood": {name: _likelihood(p, weight) for name, p in predictions.items()},
        "calibration_error": float(np.abs(bins[0] - bins[1]).sum() / max(bins[1].sum(), 1)),
        "weights": dict(zip(PARTS, _mean_weights(weights, gene, weight), strict=True)),
        "alone": fallback,
    }
    means = sum(np.asarray(part.counts.sum(axis=0), np.float64).ravel() for part in parts)
    means = np.asarray(means) / max(float(np.sum(means)), 1.0)
    return Pool(weights, dispersion.astype(np.float32), means.astype(np.float32), scores)


def joined_embedding(latent: np.ndarray, counts: sparse.csr_matrix) -> np.ndarray:
    """Return float32 [cells, dimensions]: the latent next to the cells' own principal components, each of one length.

    The genes of the components are scaled: components of genes as they are follow the counts of a few genes, so that
    the nearest cells share the dropouts of a cell.
    """
    latent = LATENT * unit_length(latent - latent.mean(axis=0))
    starts = range(0, len(latent), BLOCK)
    try:
        expression, deviation = variable_expression(
            lambda: (log_normalized(sparse.csr_matrix(counts[at : at + BLOCK])) for at in starts)
        )
    except InputError:  # too few cells or genes
        return latent.astype(np.float32)
    own = own_components(expression, np.zeros(len(latent), int), deviation)
    return np.hstack([latent, unit_length(own - own.mean(axis=0))]).astype(np.float32)


def nearest_cells(
    embedding: np.ndarray, *, seed: int = 0, advance: Callable[[int], None] = lambda cells: None
) -> sparse.csr_matrix:
    """Return Gaussian weights of the nearest cells, CSR float32 [cells, cells]; a cell is not its own neighbour."""
    cells = len(embedding)
    candidates = np.arange(cells)
    if cells > CANDIDATES:
        chosen = np.random.default_rng(seed).choice(cells, CANDIDATES, replace=False)
        candidates = np.sort(chosen)
    number = min(NEIGHBORS, cells - 1)
    if number < 1:
        return sparse.csr_matrix((cells, cells), dtype=np.float32)
    others = embedding[candidates]
    length = np.square(others).sum(axis=1)
    index, weight = [], []
    for start in range(0, cells, BLOCK):
        rows = embedding[start : start + BLOCK]
        distance = length - 2 * rows @ others.T + np.square(rows).sum(axis=1)[:, None]
        distance[candidates == np.arange(start, start + len(rows))[:, None]] = np.inf
        near = np.argpartition(distance, number - 1, axis=1)[:, :number]
        square = np.maximum(np.take_along_axis(distance, near, axis=1), 0)
        bandwidth = np.partition(square, min(BANDWIDTH, number) - 1, axis=1)
        bandwidth = np.maximum(bandwidth[:, min(BANDWIDTH, number) - 1], 1e-12)
        index.append(candidates[near])
        weight.append(np.exp(-0.5 * square / bandwidth[:, None]))
        advance(len(rows))
    return sparse.csr_matrix(
        (
            np.concatenate(weight).astype(np.float32).ravel(),
            np.concatenate(index).ravel(),
            np.arange(0, cells * number + 1, number),
        ),
        (cells, cells),
    )


def kmeans(embedding: np.ndarray, clusters: int, *, seed: int = 0) -> np.ndarray:
    """Return int [cells], clusters by Lloyd's algorithm from k-means++ centres, found on up to 10,000 cells."""
    if clusters < 2:
        return np.zeros(len(embedding), int)
    random = np.random.default_rng(seed)
    some = embedding[:: -(-len(embedding) // 10_000)]
    centres = some[random.integers(len(some))][None]
    nearest = np.square(some - centres[0]).sum(axis=1)
    for _ in range(clusters - 1):
        if not nearest.sum() > 0:
            break
        chosen = some[random.choice(len(some), p=nearest / nearest.sum())]
        centres = np.vstack([centres, chosen])
        nearest = np.minimum(nearest, np.square(some - chosen).sum(axis=1))
    for _ in range(20):
        codes = _closest(some, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, codes, some)
        sizes = np.bincount(codes, minlength=len(centres))[:, None]
        centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
    return _closest(embedding, centres)


CALIBRATION_BINS = 20
"""Bins of the expected count, three a decade from 1e-6."""


def _count_calibration(
    bins: np.ndarray, shares: np.ndarray, totals: np.ndarray, held: sparse.csr_matrix
) -> None:
    """Add expected and observed molecules [2, bins] of entries, binned by their expected count."""
    for start in range(0, len(shares), ROWS):
        rows = slice(start, start + ROWS)
        expected = shares[rows] * totals[rows, None]
        place = np.clip((np.log10(np.maximum(expected, 1e-9)) + 6) * 3, 0, CALIBRATION_BINS - 1)
        place = place.astype(np.int8).ravel()
        observed = np.asarray(held[rows].toarray()).ravel()
        for row, values in enumerate((expected.ravel(), observed)):
            bins[row] += np.bincount(place, values, CALIBRATION_BINS)


def _ratio(counts: sparse.csr_matrix, expected: np.ndarray, prior: float) -> np.ndarray:
    """Return float32 [genes]: counted over expected molecules, shrunk towards one."""
    counted = np.asarray(counts.sum(axis=0), np.float64).ravel()
    return ((counted + prior) / (expected + prior)).astype(np.float32)


def _closest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return (np.square(centres).sum(axis=1) - 2 * points @ centres.T).argmin(axis=1)


def _fit_weights(
    values: np.ndarray, gene: np.ndarray, weight: np.ndarray, genes: int
) -> np.ndarray:
    """Return float32 [genes, parts]: weights that maximise the likelihood, by expectation maximisation.

    The weights of a gene with few counts are close to the common ones.
    """
    parts = values.shape[1]
    common = np.full(parts, 1 / parts)
    weights = np.tile(common, (genes, 1))
    for step in range(120):
        share = values * (common if step < 60 else weights[gene])
        share *= (weight / np.maximum(share.sum(axis=1), 1e-30))[:, None]
        if step < 60:
            common = share.sum(axis=0) / max(weight.sum(), 1) if len(weight) else common
            weights = np.tile(common, (genes, 1))
            continue
        sums = np.stack([np.bincount(gene, share[:, part], genes) for part in range(parts)], 1)
        weights = sums + WEIGHT_PRIOR * common
        weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def _mean_weights(weights: np.ndarray, gene: np.ndarray, weight: np.ndarray) -> list[float]:
    """Return the mean weights over the held-out counts."""
    if not len(gene):
        return [float(value) for value in weights.mean(axis=0)]
    return [float(value) for value in np.average(weights[gene], axis=0, weights=weight)]


def _likelihood(shares: np.ndarray, weight: np.ndarray) -> float:
    """Return the mean log share of the held-out counts."""
    logs = np.log(np.maximum(shares, 1e-12))
    return float((weight * logs).sum() / max(weight.sum(), 1))


def _rmse(truth: np.ndarray, prediction: np.ndarray) -> float:
    return float(np.sqrt(np.mean((truth - prediction) ** 2))) if len(truth) else 0.0
