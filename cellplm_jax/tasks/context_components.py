"""Adaptation to a context without training: the zero-shot latent joined with the context's own components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cellplm_jax.data.anndata_io import CountSource
from cellplm_jax.errors import require
from cellplm_jax.evaluate.components import (
    BLOCK,
    Discriminants,
    log_normalized,
    own_components,
    principal_components,
    unit_length,
    variable_expression,
)
from cellplm_jax.evaluate.embedding import leiden_clusters
from cellplm_jax.evaluate.inputs import row_sums

CLUSTERED_CELLS = 10_000
"""Maximum number of cells that are clustered; the discriminants of the clusters are applied to all."""

LATENT, SCALED, PLAIN = 0.5, 0.5, 1.0
"""Lengths of the zero-shot latent, of components of scaled genes, and of components of genes as they are."""

ALIGNED_COMPONENTS = 50
"""Components of the joined embedding that are aligned between samples."""

DISCRIMINANTS, SHRINKAGE, MINIMUM_CELLS = 30, 0.3, 60
"""Discriminants appended, the shrinkage of their covariance, and the fewest cells they are computed from."""

DEPTH_RESOLUTION, RESOLUTION = 1.0, 0.7
"""Leiden's resolution of the clusters in which depth is removed, and of those that are separated."""


def join_context(
    latent: np.ndarray,
    source: CountSource,
    samples: Sequence[np.ndarray],
    *,
    target_sum: float = 1e4,
    on_progress: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """Join a zero-shot latent with the principal components of the same cells, and separate their clusters.

    Three embeddings are put side by side: the latent, 50 principal components of 2,000 highly variable genes
    (log-normalized, centred by tissue sample), and 50 components of the same genes divided by their deviation. The
    latent and the components of scaled genes have length 0.5 per cell, the other components a root mean square of 1.
    With several samples, 50 components of the result are aligned by Harmony (Korsunsky et al. 2019) and scaled to
    length 1. What the log library size explains within Leiden clusters is subtracted. Clusters at resolution 0.7 then
    give linear discriminants, which are appended with the same mean length. The result is deterministic, reads no
    label, and describes these cells only: it is not comparable between files.

    Args:
        latent: float [cells, latent], zero-shot.
        source: The counts of the same cells, in the vocabulary of the model.
        samples: int arrays, the cells of each tissue sample.
        target_sum: Library size before the logarithm.
        on_progress: Called with each stage.

    Returns:
        float32 [cells, dimensions]; the number of dimensions depends on the data.

    Raises:
        InputError: There are fewer than 3 cells, or no gene varies.
        MissingDependencyError: The extra ``eval``, which clusters and aligns, is not installed.
    """
    on_progress("components of the context")
    sample_of = np.zeros(len(latent), np.int64)
    for number, members in enumerate(samples):
        sample_of[members] = number
    libraries: list[np.ndarray] = []

    def blocks():
        # The blocks are read twice.
        libraries.clear()
        for block in source.blocks(BLOCK):
            libraries.append(row_sums(block))
            yield log_normalized(block, target_sum)

    expression, deviation = variable_expression(blocks)
    joined = np.hstack(
        [
            LATENT * _centred_unit(np.asarray(latent, np.float32)),
            SCALED * _centred_unit(own_components(expression, sample_of, deviation)),
            PLAIN * _centred(own_components(expression, sample_of)),
        ]
    )
    # Clusters of so few cells are noise, and their discriminants would amplify it.
    if len(joined) < MINIMUM_CELLS:
        return joined
    if len(samples) > 1:
        on_progress("alignment of the samples")
        joined = _centred_unit(aligned_components(joined, sample_of))
    on_progress("clusters of the context")
    depth = np.log1p(np.concatenate(libraries)).astype(np.float32)
    joined, _, directions = separate(joined, depth)
    if not directions.shape[1]:
        return joined
    separated = joined @ directions.astype(np.float32)
    separated -= separated.mean(axis=0)
    joined_square = np.mean(np.sum(joined**2, axis=1))
    separated_square = np.mean(np.sum(separated**2, axis=1))
    length = np.sqrt(joined_square / separated_square)
    return np.hstack([joined, separated * np.float32(length)])


def separate(embedding: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Subtract what the library size explains within clusters, and find directions that separate clusters.

    Slopes between clusters stay: types differ in the size of their libraries.

    Args:
        embedding: float32 [cells, dimensions].
        depth: float32 [cells], log library size.

    Returns:
        The embedding without depth, float32 [cells, dimensions]; its slopes on depth, float32 [dimensions]; and linear
        discriminants, float64 [dimensions, discriminants], maybe none.
    """
    every = -(-len(embedding) // CLUSTERED_CELLS)
    clusters = leiden_clusters(embedding[::every], resolution=DEPTH_RESOLUTION)
    slopes = depth_slopes(embedding[::every], depth[::every], clusters)
    embedding = embedding - np.outer(depth - depth.mean(), slopes)
    # Again, because clusters of different depth may now be one.
    clusters = leiden_clusters(embedding[::every], resolution=RESOLUTION)
    pooled = Discriminants(embedding.shape[1], shrinkage=SHRINKAGE)
    pooled.add(embedding[::every], clusters)
    return embedding, slopes, pooled.directions(min(DISCRIMINANTS, int(clusters.max())))


def depth_slopes(embedding: np.ndarray, depth: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the slope of each dimension on the log library size within clusters, float32 [dimensions].

    Args:
        embedding: float [cells, dimensions].
        depth: float [cells], log library size.
        clusters: [cells].
    """
    _, codes, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    # Least squares within clusters: only the deviations from the mean of the cluster enter.
    inside = depth - (np.bincount(codes, depth) / sizes)[codes]
    return (inside @ embedding / max(float(inside @ inside), 1e-9)).astype(np.float32)


def aligned_components(joined: np.ndarray, sample_of: np.ndarray) -> np.ndarray:
    """Return components of an embedding [cells, dimensions], corrected by sample."""
    return run_harmony(reduced(joined)[0], sample_of)[0]


def reduced(joined: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return components of an embedding, float64 [cells, components], its mean, and the loadings.

    Args:
        joined: float32 [cells, dimensions].
    """
    centre = joined.mean(axis=0)
    # A centred matrix of n cells has at most n - 1 components.
    number = min(ALIGNED_COMPONENTS, min(joined.shape) - 1)
    loadings, _ = principal_components(lambda: [joined - centre], joined.shape[1], number, passes=6)
    return ((joined - centre) @ loadings).astype(np.float64), centre, loadings


def run_harmony(
    components: np.ndarray,
    sample_of: np.ndarray,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Correct components by Harmony (Korsunsky et al. 2019).

    Args:
        components: float64 [cells, components].
        sample_of: int [cells].
        **options: Of ``harmonypy.run_harmony``.

    Returns:
        Corrected components, [cells, components], and the soft assignment, [cells, clusters].

    Raises:
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    import pandas as pd

    harmonypy = require("harmonypy", "eval", "Alignment of samples")
    table = pd.DataFrame({"sample": sample_of.astype(str)})
    result = harmonypy.run_harmony(
        components,
        table,
        "sample",
        random_state=0,
        verbose=False,
        **options,
    )
    # Releases differ in the orientation of the result.
    values = (np.asarray(result.Z_corr), np.asarray(result.R))
    corrected, weight = (v if v.shape[0] == len(components) else v.T for v in values)
    return corrected, weight


def _centred_unit(values: np.ndarray) -> np.ndarray:
    return unit_length(values - values.mean(axis=0)).astype(np.float32)


def _centred(values: np.ndarray) -> np.ndarray:
    """Centre cells and scale them together to a root mean square length of 1."""
    values = values - values.mean(axis=0)
    length = np.sqrt(np.mean(np.sum(values**2, axis=1)))
    return values / np.float32(max(length, 1e-9))
