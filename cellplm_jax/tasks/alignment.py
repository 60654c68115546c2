"""Alignment of batches: the joined embedding of ``adapt="context"``, with a map for cells of other files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cellplm_jax.data.anndata_io import CountSource
from cellplm_jax.errors import require
from cellplm_jax.evaluate.components import (
    BLOCK,
    Discriminants,
    OwnBasis,
    log_normalized,
    own_basis,
    principal_components,
    unit_length,
)
from cellplm_jax.evaluate.embedding import leiden_clusters
from cellplm_jax.tasks.context_components import (
    ALIGNED_COMPONENTS,
    CLUSTERED_CELLS,
    DISCRIMINANTS,
    LATENT,
    SHRINKAGE,
)

THETA = 2.0
"""Diversity penalty of Harmony at strength 1."""

SIGMA = 0.1
"""Width of the soft clusters, as in Harmony."""

RIDGE = 1.0
"""Number of cells by which the offset of a batch in a cluster is shrunk."""

ROUNDS = 10
"""Rounds of assigning cells to clusters and moving them to the clusters of the fit."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Aligned embedding of several batches, and the map that moves other cells to it.

    The latent and the principal components of the cells are joined, reduced, and corrected by Harmony (Korsunsky et al.
    2019). Its clusters are kept: cells are assigned to them softly, and each batch is moved, cluster by cluster, to the
    corrected mean of the cluster (as in Symphony, Kang et al. 2021). Discriminants of Leiden clusters are appended.

    Attributes:
        basis_genes: int [chosen], columns of the vocabulary.
        basis_mean: float32 [chosen].
        basis_deviation: float32 [chosen].
        basis_loadings: float32 [chosen, components].
        latent_centre: float32 [latent].
        own_centre: float32 [components].
        joined_centre: float32 [latent + components].
        loadings: float32 [latent + components, aligned].
        centroids: float32 [clusters, aligned], unit length.
        references: float32 [clusters, aligned], corrected mean of each cluster.
        corrected_centre: float32 [aligned].
        directions: float32 [aligned, discriminants], with their scale.
        separated_centre: float32 [discriminants].
    """

    basis_genes: np.ndarray
    basis_mean: np.ndarray
    basis_deviation: np.ndarray
    basis_loadings: np.ndarray
    latent_centre: np.ndarray
    own_centre: np.ndarray
    joined_centre: np.ndarray
    loadings: np.ndarray
    centroids: np.ndarray
    references: np.ndarray
    corrected_centre: np.ndarray
    directions: np.ndarray
    separated_centre: np.ndarray

    def embed(self, latent: np.ndarray, source: CountSource, batch_of: np.ndarray) -> np.ndarray:
        """Return the aligned embedding of cells, float32 [cells, dimensions].

        Args:
            latent: float [cells, latent], zero-shot.
            source: Their counts, in the vocabulary of the model.
            batch_of: int [cells], number of the batch; batches need not be those of the fit.
        """
        basis = OwnBasis(
            self.basis_genes, self.basis_mean, self.basis_deviation, self.basis_loadings
        )
        own = basis.project(lambda: map(log_normalized, source.blocks(BLOCK)), batch_of)
        joined = _joined(latent - self.latent_centre, own - self.own_centre)
        return self._finished(self.aligned((joined - self.joined_centre) @ self.loadings, batch_of))

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
        for _ in range(ROUNDS):
            weight = self._soft(corrected)
            moved = np.zeros_like(components)
            for batch in np.unique(batch_of):
                rows = batch_of == batch
                own = weight[rows]
                mass = own.sum(axis=0)[:, None]
                offset = (own.T @ components[rows] - mass * references) / (mass + RIDGE)
                moved[rows] = components[rows] - own @ offset
            if np.abs(moved - corrected).max() < 1e-5:
                break
            corrected = moved
        return corrected

    def _soft(self, components: np.ndarray) -> np.ndarray:
        """Return the soft assignment of cells to clusters, float64 [cells, clusters]."""
        logits = 2.0 / SIGMA * (unit_length(components) @ self.centroids.T.astype(np.float64))
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)

    def _finished(self, aligned: np.ndarray) -> np.ndarray:
        """Return aligned components of unit length, and their discriminants."""
        unit = unit_length(aligned - self.corrected_centre).astype(np.float32)
        return np.hstack([unit, unit @ self.directions - self.separated_centre])

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

    basis = own_basis(blocks, batch_of)
    own = basis.project(blocks, batch_of)
    latent_centre, own_centre = latent.mean(axis=0), own.mean(axis=0)
    joined = _joined(latent - latent_centre, own - own_centre)
    centre = joined.mean(axis=0)
    number = min(ALIGNED_COMPONENTS, min(joined.shape) - 1)
    loadings, _ = principal_components(lambda: [joined - centre], joined.shape[1], number, passes=6)
    components = ((joined - centre) @ loadings).astype(np.float64)
    empty = np.zeros((0, number), np.float32)
    centroids = references = empty
    if strength > 0:
        on_progress("alignment of the batches")
        corrected, weight = _harmony(components, batch_of, strength)
        share = weight / np.maximum(weight.sum(axis=0), 1e-12)
        references = share.T @ corrected
        centroids = unit_length(weight.T @ unit_length(corrected))
    unfinished = Alignment(
        basis.genes, basis.mean, basis.deviation, basis.loadings, latent_centre, own_centre, centre,
        loadings, centroids, references, np.zeros(number), np.zeros((number, 0)), np.zeros(0),
    )  # fmt: skip
    aligned = unfinished.aligned(components, batch_of)
    middle = aligned.mean(axis=0)
    unit = unit_length(aligned - middle)
    on_progress("clusters of the cells")
    every = -(-len(unit) // CLUSTERED_CELLS)
    directions, shift = np.zeros((number, 0)), np.zeros(0)
    if len(unit) > 15:
        clusters = leiden_clusters(unit[::every].astype(np.float32))
        pooled = Discriminants(number, shrinkage=SHRINKAGE)
        pooled.add(unit[::every], clusters)
        directions = pooled.directions(min(DISCRIMINANTS, int(clusters.max())))
        separated = unit @ directions
        separated -= separated.mean(axis=0)
        length = np.square(separated).sum(axis=1).mean()
        directions = directions * np.sqrt(np.square(unit).sum(axis=1).mean() / max(length, 1e-12))
        shift = unit.mean(axis=0) @ directions
    arrays = unfinished.arrays()
    arrays |= {"corrected_centre": middle, "directions": directions, "separated_centre": shift}
    kept = {n: v if n == "basis_genes" else np.asarray(v, np.float32) for n, v in arrays.items()}
    return Alignment(**kept)


def harmony(components: np.ndarray, batch_of: np.ndarray) -> np.ndarray:
    """Return principal components corrected by Harmony with its defaults, float64 [cells, components]: the baseline.

    Args:
        components: float [cells, components].
        batch_of: int [cells].

    Raises:
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    return _harmony(components, batch_of, 1.0)[0]


def _harmony(
    components: np.ndarray, batch_of: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return corrected components [cells, components] and the soft assignment [cells, clusters]."""
    import pandas as pd

    harmonypy = require("harmonypy", "eval", "Alignment of batches")
    result = harmonypy.run_harmony(
        np.asarray(components, np.float64), pd.DataFrame({"batch": batch_of.astype(str)}), "batch",
        theta=THETA * strength, sigma=SIGMA, random_state=0, verbose=False,
    )  # fmt: skip
    # Releases differ in the orientation of the result.
    values = (np.asarray(result.Z_corr, np.float64), np.asarray(result.R, np.float64))
    one, other = (v if v.shape[0] == len(components) else v.T for v in values)
    return one, other


def numbers_of(batches: Iterable[str]) -> np.ndarray:
    """Return the number of each cell's batch, in order of first appearance.

    Args:
        batches: [cells], names.
    """
    batches = list(batches)
    place = {name: number for number, name in enumerate(dict.fromkeys(batches))}
    return np.array([place[name] for name in batches], np.int64)


def _joined(latent: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return centred latent and components side by side, each of the same length for all cells."""
    return np.hstack([LATENT * unit_length(latent), unit_length(own)]).astype(np.float32)
