"""Alignment of batches: the joined embedding of ``adapt="context"``, with a map for cells of other files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy import sparse

from cellplm_jax.data.anndata_io import CountSource
from cellplm_jax.errors import require
from cellplm_jax.evaluate.components import (
    BLOCK,
    log_normalized,
    principal_components,
    standardized,
    unit_length,
    variable_columns,
)
from cellplm_jax.evaluate.inputs import column_means, row_sums
from cellplm_jax.tasks.context_components import (
    LATENT,
    PLAIN,
    SCALED,
    reduced,
    run_harmony,
    separate,
)

COMPONENTS = 50
"""Number of principal components of the genes, scaled and as they are."""

CENTRED_CELLS = 20
"""Batches with fewer cells are centred at the mean of the fit."""

THETA = 2.0
"""Diversity penalty of Harmony at strength 1."""

SIGMA = 0.1
"""Width of the soft clusters, as in Harmony."""

RIDGE = 1.0
"""Number of cells by which the offset of a batch in a cluster is shrunk."""

NEIGHBORS = 15
"""Fewest cells that are clustered."""

ROUNDS = 10
"""Rounds of assigning cells to clusters and moving them to the clusters of the fit."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Aligned embedding of several batches, and the map that moves other cells to it.

    The latent and the principal components of the cells are joined as by ``embed(adapt="context")``, reduced, and
    corrected by Harmony (Korsunsky et al. 2019). Its clusters are kept: cells are assigned to them softly, and each
    batch is moved, cluster by cluster, to the corrected mean of the cluster (as in Symphony, Kang et al. 2021). What
    the library size explains within clusters is subtracted, and discriminants of clusters are appended.

    Attributes:
        genes: int [chosen], columns of the vocabulary.
        mean: float32 [chosen].
        deviation: float32 [chosen].
        scaled: float32 [chosen, components], loadings of the genes divided by their deviation.
        plain: float32 [chosen, components], loadings of the genes as they are.
        centres: float32 [latent + 2 x components], of the latent, and of both components.
        plain_length: float32 [], root mean square length of the centred components of the genes as they are.
        joined_centre: float32 [latent + 2 x components].
        loadings: float32 [latent + 2 x components, aligned].
        centroids: float32 [clusters, aligned], unit length.
        references: float32 [clusters, aligned], corrected mean of each cluster.
        corrected_centre: float32 [aligned].
        depth: float32 [], mean log library size.
        slopes: float32 [aligned], change by log library size within clusters.
        directions: float32 [aligned, discriminants], with their scale.
        separated_centre: float32 [discriminants].
    """

    genes: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    scaled: np.ndarray
    plain: np.ndarray
    centres: np.ndarray
    plain_length: np.ndarray
    joined_centre: np.ndarray
    loadings: np.ndarray
    centroids: np.ndarray
    references: np.ndarray
    corrected_centre: np.ndarray
    depth: np.ndarray
    slopes: np.ndarray
    directions: np.ndarray
    separated_centre: np.ndarray

    def embed(self, latent: np.ndarray, source: CountSource, batch_of: np.ndarray) -> np.ndarray:
        """Return the aligned embedding of cells, float32 [cells, dimensions].

        Args:
            latent: float [cells, latent], zero-shot.
            source: Their counts, in the vocabulary of the model.
            batch_of: int [cells], number of the batch; batches need not be those of the fit.
        """
        expression, depth = _read(source, self.genes)
        # Centred as in the fit: the mean of the fit is used for batches that are too small for their own.
        scaled, plain = (
            np.concatenate([block @ basis for block in blocks()])
            for basis, blocks in (
                (self.scaled, standardized(expression, batch_of, self.deviation, mean=self.mean)),
                (self.plain, standardized(expression, batch_of, mean=self.mean)),
            )
        )
        joined = _joined(latent, scaled, plain, self.centres, float(self.plain_length))
        aligned = self.aligned((joined - self.joined_centre) @ self.loadings, batch_of)
        unit = unit_length(aligned - self.corrected_centre)
        unit = (unit - np.outer(depth - float(self.depth), self.slopes)).astype(np.float32)
        return np.hstack([unit, unit @ self.directions - self.separated_centre])

    def aligned(self, components: np.ndarray, batch_of: np.ndarray) -> np.ndarray:
        """Return components [cells, aligned] with each batch moved to the clusters of the fit.

        Args:
            components: float [cells, aligned], before the correction.
            batch_of: int [cells].
        """
        components = np.asarray(components, np.float64)
        if not len(self.centroids):
            return components
        corrected = components
        references = self.references.astype(np.float64)
        # Clusters and offsets depend on each other; a few rounds converge.
        for _ in range(ROUNDS):
            weight = self._soft(corrected)
            moved = np.zeros_like(components)
            for batch in np.unique(batch_of):
                rows = batch_of == batch
                own = weight[rows]
                mass = own.sum(axis=0)[:, None]
                # Offsets of clusters with few cells of the batch are shrunk towards 0.
                offset = (own.T @ components[rows] - mass * references) / (mass + RIDGE)
                moved[rows] = components[rows] - own @ offset
            if np.abs(moved - corrected).max() < 1e-5:
                break
            corrected = moved
        return corrected

    def _soft(self, components: np.ndarray) -> np.ndarray:
        """Return the soft assignment of cells to clusters, float64 [cells, clusters]."""
        # Harmony's distance is 2 (1 - cosine); its constant part cancels in the softmax.
        logits = 2.0 / SIGMA * (unit_length(components) @ self.centroids.T.astype(np.float64))
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the attributes; ``Alignment(**arrays)`` is the same alignment."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def fit_alignment(
    latent: np.ndarray,
    source: CountSource,
    batch_of: np.ndarray,
    *,
    strength: float = 1.0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Alignment:
    """Align the batches of a dataset.

    Args:
        latent: float [cells, latent], zero-shot.
        source: The counts of the same cells, in the vocabulary of the model.
        batch_of: int [cells], number of the batch.
        strength: Diversity penalty relative to Harmony's default; 0: batches are not aligned.
        on_progress: Called with each stage.

    Returns:
        The alignment.

    Raises:
        InputError: No gene varies, or there are fewer than 3 cells.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    require("harmonypy", "eval", "Alignment of batches")
    on_progress("components of the cells")

    def blocks() -> Any:
        return map(log_normalized, source.blocks(BLOCK))

    genes, deviation = variable_columns(blocks)
    expression, depth = _read(source, genes)
    mean = column_means(expression, "float32")
    number = min(COMPONENTS, expression.shape[0] - 1, len(genes) - 1)
    bases, components = [], []
    for scale in (deviation, None):
        values = standardized(expression, batch_of, scale, mean=mean)
        # Two scales: with the deviation every gene counts the same, without it strong genes count more.
        bases.append(principal_components(values, len(genes), number, passes=6)[0])
        components.append(np.concatenate([block @ bases[-1] for block in values()]))
    centres = np.concatenate([values.mean(axis=0) for values in (latent, *components)])
    plain_centred = components[1] - components[1].mean(axis=0)
    length = np.sqrt(np.square(plain_centred).sum(axis=1).mean())
    scaled, plain = components
    joined = _joined(latent, scaled, plain, centres, float(length))
    components, centre, loadings = reduced(joined)
    number = components.shape[1]
    centroids = references = np.zeros((0, number))
    # Strength 0 is the joined embedding itself, without clusters to move to.
    if strength > 0:
        on_progress("alignment of the batches")
        corrected, weight = _harmony(components, batch_of, strength)
        share = weight / np.maximum(weight.sum(axis=0), 1e-12)
        references = share.T @ corrected
        centroids = unit_length(weight.T @ unit_length(corrected))
    none = np.zeros(0)
    alignment = Alignment(
        genes,
        mean,
        deviation,
        bases[0],
        bases[1],
        centres,
        np.array(length),
        centre,
        loadings,
        centroids,
        references,
        none,
        np.array(depth.mean()),
        none,
        none,
        none,
    )
    aligned = alignment.aligned(components, batch_of)
    middle = aligned.mean(axis=0)
    unit = unit_length(aligned - middle).astype(np.float32)
    slopes = np.zeros(number)
    directions = np.zeros((number, 0))
    # Fewer cells than neighbours have no graph to cluster.
    if len(unit) > NEIGHBORS:
        on_progress("clusters of the cells")
        unit, slopes, directions = separate(unit, depth)
        separated = (unit - unit.mean(axis=0)) @ directions
        lengths = [np.square(values).sum(axis=1).mean() for values in (unit, separated)]
        # The discriminants get the same length as the rest, so that distances weigh both equally.
        directions = directions * np.sqrt(lengths[0] / max(lengths[1], 1e-12))
    arrays = alignment.arrays() | {
        "corrected_centre": middle,
        "slopes": slopes,
        "directions": directions,
        "separated_centre": unit.mean(axis=0) @ directions,
    }
    kept = {n: v if n == "genes" else np.asarray(v, np.float32) for n, v in arrays.items()}
    return Alignment(**kept)


def _read(source: CountSource, genes: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return log-normalized expression of some genes, CSR [cells, genes], and the log library sizes [cells]."""
    expression, depth = [], []
    for block in source.blocks(BLOCK):
        depth.append(np.log1p(row_sums(block)))
        expression.append(log_normalized(block)[:, genes])
    return sparse.vstack(expression).tocsr(), np.concatenate(depth).astype(np.float32)


def _joined(
    latent: np.ndarray,
    scaled: np.ndarray,
    plain: np.ndarray,
    centres: np.ndarray,
    length: float,
) -> np.ndarray:
    """Return centred latent and components side by side, float32 [cells, latent + 2 x components]."""
    widths = np.cumsum([latent.shape[1], scaled.shape[1]])
    one, other, last = np.split(centres, widths)
    joined = [LATENT * unit_length(latent - one), SCALED * unit_length(scaled - other)]
    return np.hstack([*joined, PLAIN / max(length, 1e-9) * (plain - last)]).astype(np.float32)


def harmony(components: np.ndarray, batch_of: np.ndarray) -> np.ndarray:
    """Return principal components corrected by Harmony with its defaults, float64 [cells, components]: the baseline.

    Args:
        components: float [cells, components].
        batch_of: int [cells].

    Raises:
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    return _harmony(np.asarray(components, np.float64), batch_of, 1.0)[0]


def _harmony(
    components: np.ndarray,
    batch_of: np.ndarray,
    strength: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return corrected components and the soft assignment, float64; see :func:`run_harmony`."""
    corrected, weight = run_harmony(components, batch_of, theta=THETA * strength, sigma=SIGMA)
    return corrected.astype(np.float64), weight.astype(np.float64)


def numbers_of(batches: Iterable[str]) -> np.ndarray:
    """Return the number of each cell's batch, in order of first appearance.

    Args:
        batches: [cells], names.
    """
    batches = list(batches)
    place = {name: number for number, name in enumerate(dict.fromkeys(batches))}
    return np.array([place[name] for name in batches], np.int64)
