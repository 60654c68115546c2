"""Niches: cells embedded together with their spatial neighbourhood, clustered into spatial domains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax._version import __version__
from cellplm_jax.errors import InputError, nearest, require
from cellplm_jax.evaluate.components import (
    BLOCK,
    log_normalized,
    own_components,
    principal_components,
    unit_length,
    variable_expression,
)
from cellplm_jax.evaluate.embedding import leiden_clusters
from cellplm_jax.evaluate.niches import (
    composition,
    consensus_clusters,
    meetings,
    shell_mean,
    shells,
    spatial_graph,
    within_samples,
)
from cellplm_jax.progress import ProgressReport
from cellplm_jax.tasks.context_components import MINIMUM_CELLS, aligned_components
from cellplm_jax.tasks.contexts import labels_of
from cellplm_jax.tasks.embed import Adapt, Context, read_and_embed
from cellplm_jax.tasks.files import check_copy, check_key, open_store, write_copy
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained

if TYPE_CHECKING:
    from anndata import AnnData

    from cellplm_jax.data.anndata_io import CountSource

KEY = "cellplm_niche"
"""Default column of ``obs`` with the niches; the embedding is ``obsm["X_" + key]``."""

FACTS = "cellplm_niches"
"""Key of ``uns`` with composition, meetings and provenance."""

CLUSTERS = "cellplm_cluster"
"""Column of ``obs`` with the cells' own clusters, which replace unknown cell types."""

CONNECTIVITIES, DISTANCES, GRAPH = (
    "spatial_connectivities",
    "spatial_distances",
    "spatial_neighbors",
)
"""Keys of a spatial graph in ``obsp`` and ``uns``, as squidpy writes them."""

PRINCIPAL, COMPONENTS = 50, 30
"""Principal components of the cells' embedding and of the niches' embedding."""

OWN, DECAY = 0.2, 0.7
"""Weight of the cell itself next to the mean over it and its neighbours, and of a shell relative to the one before."""

MIXED_WEIGHTS, MIXED_COMPONENTS = (0.1, 0.2, 0.35), (12, 16, 20, 24)
"""Weights of the cell itself, and numbers of components, of the mixtures that vote for the niches."""

CLUSTERED_CELLS, VOTES = 8_000, 15
"""Maximum number of cells in Leiden's graph and in the fit of a mixture; other cells take the majority of their
nearest ones in the graph. From 8,192 cells scanpy searches neighbours approximately, and compiles that for 30 s."""

SIMILAR_NICHES, SIMILAR_CELLS = 30, 15
"""Neighbours in Leiden's graphs. Neighbourhoods overlap, so niches need more of them than cells."""


class NicheOptions(TypedDict, total=False):
    """Options of :func:`cellplm_jax.niches` and :func:`cellplm_jax.niches_file`.

    Attributes:
        spatial_key: Key of ``obsm`` with 2-D coordinates in any unit. Not required if ``obsp`` has a graph.
        batch_key: Column of ``obs`` with the tissue section of each cell; sections share no edges. None: one.
        n_niches: Number of niches. None: the number of Leiden clusters.
        label_key: Column of ``obs`` with cell types, for composition and meetings; missing values are not counted.
            None: the cells' own clusters, ``obs["cellplm_cluster"]``, computed if missing.
        shells: Number of shells: 1: direct neighbours, 2: also their neighbours, ...
        neighbors: Nearest cells per cell in a new graph.
        resolution: Leiden resolution of the number of niches; higher values give more niches.
        use_rep: Key of ``obsm`` with an embedding of the cells, which replaces the model's. None: embed.
        adapt: See :func:`cellplm_jax.embed`.
        layer: Layer with the counts; None: search for them.
        gene_key: Column of ``var`` with gene ids; None: the best match.
        feature_type: Type of the features to read; None: genes; "all": every feature.
        permutations: Permutations for the meetings of cell types.
        key_added: Column of ``obs`` to write.
        seed: Seed of clustering and permutations.
        quiet: Disable progress output.
    """

    spatial_key: str
    batch_key: str | None
    n_niches: int | None
    label_key: str | None
    shells: int
    neighbors: int
    resolution: float
    use_rep: str | None
    adapt: Adapt
    layer: str | None
    gene_key: str | None
    feature_type: str | None
    permutations: int
    key_added: str
    seed: int
    quiet: bool


def niches(
    adata: AnnData | str | os.PathLike,
    model: Pretrained | str | os.PathLike | None,
    **options: Unpack[NicheOptions],
) -> AnnData:
    """Find spatial niches: embed every cell with its neighbourhood in the tissue, and cluster these embeddings.

    The embedding of the cell, the mean over it and its direct neighbours, and that over each further shell of the
    spatial graph are put side by side, with weights, and reduced to 30 principal components. An existing squidpy graph
    (``obsp["spatial_connectivities"]``) is used without its edges between batches; otherwise a graph of the nearest
    cells is built.

    Writes:
        ``obsm["X_cellplm_niche"]``: float32 [n_obs, dimensions]. ``obs["cellplm_niche"]``: categorical, niches named
        "0", "1", ..., largest first.
        ``obsp["spatial_connectivities"]``, ``obsp["spatial_distances"]``, ``uns["spatial_neighbors"]``: a new graph.
        ``obs["cellplm_cluster"]``: the cells' own clusters, if they replace ``label_key``.
        ``uns["cellplm_niches"]``: names of ``niches`` and ``types``; ``composition`` [niches, types], fractions of the
        niche's cells; ``meeting_zscore`` and ``meeting_count`` [types, types], how often cells of two types are
        neighbours, relative to permuted labels; ``params``, ``model``, ``version``.

    Args:
        adata: Raw counts with coordinates; a path is read into memory.
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`; None with ``use_rep``.
        **options: See :class:`NicheOptions`: ``spatial_key="spatial"``, ``batch_key=None``, ``n_niches=None``,
            ``label_key=None``, ``shells=3``, ``neighbors=6``, ``resolution=0.3``, ``adapt="context"``,
            ``permutations=1000``, ``seed=0``...

    Returns:
        ``adata`` itself, or the cells of the file.

    Raises:
        InputError: Counts, coordinates, keys or numbers cannot be used.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    import anndata

    if isinstance(adata, str | os.PathLike):
        path = Path(adata).expanduser()
        with open_store(path):  # one clear message if it is neither kind of file
            read = anndata.read_zarr if path.is_dir() else anndata.read_h5ad
        adata = read(path)
    results = _find(adata, model, _Options(**options))
    for part, entries in results.entries().items():
        for name, value in entries.items():
            getattr(adata, part)[name] = value
    return adata


def niches_file(
    path: str | os.PathLike,
    out: str | os.PathLike,
    model: Pretrained | str | os.PathLike | None,
    **options: Unpack[NicheOptions],
) -> tuple[dict[str, Any], list[str]]:
    """Find the niches of an ``.h5ad`` file and write a copy with the results; counts are streamed.

    Args:
        path: Input; never changed.
        out: Output: the input plus the results of :func:`cellplm_jax.niches`, written atomically.
        model: See :func:`cellplm_jax.niches`.
        **options: See :func:`cellplm_jax.niches`.

    Returns:
        ``uns["cellplm_niches"]`` of the output, and messages about the input.

    Raises:
        InputError: As in :func:`cellplm_jax.niches`; also if ``out`` cannot be written.
    """
    path = Path(path).expanduser()
    out = Path(out).expanduser()
    check_copy(path, out)
    results = _find(path, model, _Options(**options))
    write_copy(path, out, **results.entries())
    return results.uns[FACTS], results.messages


@dataclass(frozen=True)
class _Options:
    """The options of :class:`NicheOptions` with their defaults, checked."""

    spatial_key: str = "spatial"
    batch_key: str | None = None
    n_niches: int | None = None
    label_key: str | None = None
    shells: int = 3
    neighbors: int = 6
    resolution: float = 0.3
    use_rep: str | None = None
    adapt: Adapt = "context"
    layer: str | None = None
    gene_key: str | None = None
    feature_type: str | None = None
    permutations: int = 1000
    key_added: str = KEY
    seed: int = 0
    quiet: bool = True

    def __post_init__(self):
        check_key(self.key_added)
        require("scanpy", "eval", "Clustering niches")
        lowest = {"shells": 1, "neighbors": 1, "permutations": 2, "n_niches": 2}
        for name, least in lowest.items():
            value = getattr(self, name)
            # None lets Leiden determine the number.
            if value is None and name == "n_niches":
                continue
            # A bool is an int in Python.
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} = {value!r}", f"an integer, at least {least}")
        if not self.resolution > 0:
            raise InputError(f"resolution = {self.resolution}", "a number above 0", "0.3 is usual")


@dataclass(frozen=True, eq=False)
class _Results:
    """New entries of an AnnData, and messages about the input."""

    obs: dict[str, Any]
    obsm: dict[str, Any]
    obsp: dict[str, Any]
    uns: dict[str, Any]
    messages: list[str]

    def entries(self) -> dict[str, dict[str, Any]]:
        return {part: getattr(self, part) for part in ("obs", "obsm", "obsp", "uns")}


@dataclass(frozen=True, eq=False)
class _Parts:
    """Annotations of an AnnData or a file.

    Attributes:
        obs: The table of the cells.
        obsm: Coordinates and embedding, if present, by key.
        graph: Connectivities [cells, cells]; None: there are none.
        keys: All keys of ``obsm``.
    """

    obs: pd.DataFrame
    obsm: Mapping[str, Any]
    graph: Any
    keys: list[str]


def _parts(data: AnnData | Path, wanted: list[str]) -> _Parts:
    if not isinstance(data, Path):
        obsm: Any = data.obsm
        there = {key: obsm[key] for key in wanted if key in obsm}
        obsp: Any = data.obsp
        graph = obsp.get(CONNECTIVITIES)
        return _Parts(data.obs, there, graph, list(obsm))  # type: ignore[arg-type]
    from anndata.io import read_elem

    with open_store(data) as file:
        keys = list(file["obsm"]) if "obsm" in file else []
        there = {key: read_elem(file[f"obsm/{key}"]) for key in wanted if key in keys}
        path = f"obsp/{CONNECTIVITIES}"
        graph = read_elem(file[path]) if path in file else None
        obs: Any = read_elem(file["obs"])
    return _Parts(obs, there, graph, keys)


def _find(
    data: AnnData | Path,
    model: Pretrained | str | os.PathLike | None,
    options: _Options,
) -> _Results:
    """Embed the cells, gather the embeddings over the graph, cluster, and describe the clusters."""
    parts = _parts(data, [key for key in (options.spatial_key, options.use_rep) if key])
    cells = len(parts.obs)
    samples = np.zeros(cells, int)
    if options.batch_key is not None:
        # No edges between sections, whose coordinates may overlap.
        samples = labels_of(parts.obs, options.batch_key)
        gaps = sum(label is None for label in samples)
        if gaps:
            raise InputError(
                f"obs['{options.batch_key}'] is missing for {gaps} of {cells} cells",
                "the section of every cell",
                "Fill the gaps, or remove those cells",
            )
    progress = ProgressReport("niches", 4, unit="steps", quiet=options.quiet)
    try:
        graph, obsp, uns, messages = _graph(parts, samples, options)
        types = None if options.label_key is None else _types(parts.obs, options.label_key)
        progress.update(1, "embedding the cells")
        latent, provenance, read = _latent(data, parts, model, options)
        progress.update(2, "clustering the niches")
        embedding = niche_embedding(latent, graph, options.shells)
        found = _clusters(embedding, latent, graph, options)
        names = [str(number) for number in range(int(found.max()) + 1)]
        obs = {options.key_added: pd.Categorical.from_codes(found, names)}  # type: ignore[arg-type]
        if types is None and CLUSTERS in parts.obs:
            types = _types(parts.obs, CLUSTERS)
        # No cell types at all: clusters of the cells' own embeddings replace them.
        elif types is None:
            progress.update(3, "clustering the cells")
            own = _leiden(unit_length(latent), SIMILAR_CELLS, 1.0, options.seed)
            types = pd.Categorical.from_codes(own, [str(n) for n in range(int(own.max()) + 1)])  # type: ignore[arg-type]
            obs[CLUSTERS] = types
        progress.update(3, "meetings of the cell types")
        codes = np.asarray(types.codes, np.int64)
        kinds = list(map(str, types.categories))
        score, count = meetings(
            graph,
            codes,
            samples,
            number=len(kinds),
            permutations=options.permutations,
            seed=options.seed,
        )
        progress.update(4)
    finally:
        progress.close()
    uns[FACTS] = {
        "niches": np.array(names, object),
        "types": np.array(kinds, object),
        "cells": np.bincount(found, minlength=len(names)),
        "composition": composition(found, codes, (len(names), len(kinds))),
        "meeting_zscore": score,
        "meeting_count": count,
        "model": provenance.get("model", ""),
        "version": __version__,
        "params": {
            "niche_key": options.key_added,
            "label_key": options.label_key or CLUSTERS,
            "batch_key": options.batch_key or "",
            "spatial_key": options.spatial_key if options.spatial_key in parts.keys else "",
            "use_rep": options.use_rep or "",
            "adapt": options.adapt if options.use_rep is None else "",
            "n_niches": options.n_niches or 0,
            "resolution": options.resolution,
            "shells": options.shells,
            "permutations": options.permutations,
            "seed": options.seed,
        },
    }
    return _Results(obs, {f"X_{options.key_added}": embedding}, obsp, uns, messages + read)


def _graph(
    parts: _Parts,
    samples: np.ndarray,
    options: _Options,
) -> tuple[sparse.csr_matrix, dict[str, Any], dict[str, Any], list[str]]:
    """Return the graph, its new entries of ``obsp`` and ``uns``, and messages."""
    obsp, uns, messages = {}, {}, []
    if parts.graph is not None:
        graph, between = within_samples(parts.graph, samples)
        line = f"Used the spatial graph in obsp['{CONNECTIVITIES}']"
        messages.append(line + (f"; ignored {between} edges between batches." if between else "."))
    else:
        points = _coordinates(parts, options.spatial_key)
        graph, distances = spatial_graph(points, samples, neighbors=options.neighbors)
        obsp = {CONNECTIVITIES: graph, DISTANCES: distances}
        uns[GRAPH] = {
            "connectivities_key": CONNECTIVITIES,
            "distances_key": DISTANCES,
            "params": {
                "n_neighbors": options.neighbors,
                "coord_type": "generic",
                "radius": "",
                "transform": "",
            },
        }
        messages.append(
            f"Connected every cell with its {options.neighbors} nearest cells in obsm['{options.spatial_key}'], "
            f"{graph.nnz / max(len(samples), 1):.1f} neighbours per cell on average."
        )
    # Rows of a CSR matrix without an entry.
    alone = int((np.diff(graph.indptr) == 0).sum())
    if alone == len(samples):
        raise InputError(
            "no cell has a neighbour", "cells with coordinates, in sections of several cells"
        )
    if alone:
        messages.append(f"{alone} cells have no neighbour; their niche is their own embedding.")
    return graph, obsp, uns, messages


def _coordinates(parts: _Parts, key: str) -> np.ndarray:
    if key not in parts.obsm:
        raise InputError(
            f"obsm has no '{key}' and obsp no '{CONNECTIVITIES}'",
            f"coordinates (obsm has: {', '.join(map(repr, parts.keys)) or 'nothing'}), or a spatial graph",
            nearest(key, parts.keys, "Pass spatial_key=... (--spatial-key)"),
        )
    try:
        points = np.asarray(parts.obsm[key], np.float64)
    except (TypeError, ValueError):
        points = np.zeros((0, 0))
    if points.ndim != 2 or points.shape[0] != len(parts.obs) or points.shape[1] < 2:
        raise InputError(
            f"obsm['{key}'] has shape {np.shape(parts.obsm[key])}", f"numbers [{len(parts.obs)}, 2]"
        )
    # Further coordinates, such as the number of the section, are not distances in the tissue.
    return points[:, :2]


def _types(obs: pd.DataFrame, key: str) -> pd.Categorical:
    labels = labels_of(obs, key)
    known = sorted({label for label in labels if label is not None})
    column: Any = obs[key]
    if isinstance(column.dtype, pd.CategoricalDtype):
        # The order that the user gave to the categories, for tables and heatmaps.
        known = [str(name) for name in column.cat.categories if str(name) in known]
    if not known:
        raise InputError(f"obs['{key}'] has no value", "the cell types of the cells")
    return pd.Categorical(labels, categories=known)


def _latent(
    data: AnnData | Path,
    parts: _Parts,
    model: Pretrained | str | os.PathLike | None,
    options: _Options,
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Return the embedding of the cells, facts about it, and messages."""
    if options.use_rep is not None:
        if options.use_rep not in parts.obsm:
            raise InputError(
                f"obsm has no '{options.use_rep}'",
                f"one of its matrices: {', '.join(map(repr, parts.keys)) or 'none'}",
                nearest(options.use_rep, parts.keys, "Omit use_rep to embed the cells"),
            )
        latent = np.asarray(parts.obsm[options.use_rep], np.float32)
        if latent.ndim != 2 or not np.isfinite(latent).all():
            raise InputError(
                f"obsm['{options.use_rep}'] has shape {latent.shape}, or values that are not finite",
                "finite numbers [cells, dimensions]",
            )
        return latent, {}, []
    if model is None:
        raise InputError(
            "neither a model nor use_rep was passed", "one of them", "Pass model='small'"
        )
    # A file with a graph needs no coordinates.
    key = options.spatial_key if options.spatial_key in parts.keys else None
    read = {
        "layer": options.layer,
        "gene_key": options.gene_key,
        "feature_type": options.feature_type,
    }
    context = Context(options.batch_key, key, None, adapt=options.adapt, join=join_sections)
    return read_and_embed(data, as_pretrained(model), read, context, "", options.quiet)


def join_sections(
    latent: np.ndarray,
    source: CountSource,
    samples: Sequence[np.ndarray],
    *,
    target_sum: float = 1e4,
) -> np.ndarray:
    """Join a zero-shot latent with the principal components of the same cells, and align the sections.

    As :func:`cellplm_jax.tasks.context_components.join_context`, without scaling each cell to one length: a spot is a
    mixture of cells, and its length tells a pure region from the border of two.

    Args:
        latent: float [cells, latent], zero-shot.
        source: The counts of the same cells, in the vocabulary of the model.
        samples: int arrays, the cells of each section.
        target_sum: Library size before the logarithm.

    Returns:
        float32 [cells, up to 50].

    Raises:
        InputError: There are fewer than 3 cells, or no gene varies.
        MissingDependencyError: The extra ``eval``, which aligns sections, is not installed.
    """
    section = np.zeros(len(latent), np.int64)
    for number, members in enumerate(samples):
        section[members] = number
    expression, deviation = variable_expression(
        lambda: (log_normalized(block, target_sum) for block in source.blocks(BLOCK))
    )
    latent = np.array(latent, np.float32)
    for members in samples:
        # Per section, as the components are.
        latent[members] -= latent[members].mean(axis=0)
    parts = [
        latent,
        own_components(expression, section, deviation),
        own_components(expression, section),
    ]
    # One factor per part, not per cell: the parts count the same, and lengths of cells within a part remain.
    lengths = [np.sqrt(np.mean(np.sum(part**2, axis=1))) for part in parts]
    joined = np.hstack(
        [part / max(length, 1e-9) for part, length in zip(parts, lengths, strict=True)]
    )
    if len(samples) > 1 and len(joined) >= MINIMUM_CELLS:
        return aligned_components(joined, section).astype(np.float32)
    return _reduced(joined, PRINCIPAL)


def niche_embedding(
    latent: np.ndarray,
    graph: sparse.csr_matrix,
    number: int = 3,
    *,
    own_weight: float = OWN,
) -> np.ndarray:
    """Embed every cell with its neighbourhood.

    Args:
        latent: float [cells, dimensions], embedding of the cells.
        graph: CSR [cells, cells], the spatial graph.
        number: Number of shells.
        own_weight: Weight of the cell's own embedding.

    Returns:
        float32 [cells, up to 30]: principal components of the cell's own embedding, the mean over it and its
        neighbours, and the mean over each further shell, side by side, with weights .2, 1, .7, .49...
    """
    around = shells(graph, number)
    # The first mean includes the cell itself.
    own = sparse.csr_matrix(around[0] + sparse.eye(len(latent), dtype=bool, format="csr"))
    values = _reduced(latent, PRINCIPAL)
    means = [
        DECAY**place * shell_mean(values, shell) for place, shell in enumerate((own, *around[1:]))
    ]
    return _reduced(np.hstack([own_weight * values, *means]), COMPONENTS)


def _reduced(values: np.ndarray, number: int) -> np.ndarray:
    """Return principal components of [cells, dimensions], float32; few dimensions are only centred."""
    values = np.asarray(values - values.mean(axis=0), np.float32)
    if values.shape[1] <= number:
        return values
    return values @ principal_components(lambda: [values], values.shape[1], number)[0]


def _clusters(
    embedding: np.ndarray,
    latent: np.ndarray,
    graph: sparse.csr_matrix,
    options: _Options,
) -> np.ndarray:
    """Return the niches, int32 [cells]: a vote of Gaussian mixtures; without ``n_niches`` Leiden counts them."""
    niches = options.n_niches
    if niches is None:
        # Leiden gives the number only; the mixtures, which vote, give the niches.
        niches = int(_leiden(embedding, SIMILAR_NICHES, options.resolution, options.seed).max()) + 1
        if niches == 1:
            return np.zeros(len(embedding), np.int32)
    values = [
        weighted[:, :components]
        for weight in MIXED_WEIGHTS
        for weighted in [niche_embedding(latent, graph, options.shells, own_weight=weight)]
        for components in MIXED_COMPONENTS
    ]
    return consensus_clusters(values, niches, graph=graph, seed=options.seed, cells=CLUSTERED_CELLS)


def _leiden(embedding: np.ndarray, similar: int, resolution: float, seed: int) -> np.ndarray:
    """Return Leiden clusters, int32 [cells]; many cells: of an even sample, extended by vote."""
    every = -(-len(embedding) // CLUSTERED_CELLS)
    near = min(similar, len(embedding) - 1)
    found = leiden_clusters(embedding[::every], resolution=resolution, seed=seed, neighbors=near)
    if every == 1:
        return found
    voters = require("sklearn.neighbors", "eval", "Clustering many cells")
    vote = voters.KNeighborsClassifier(VOTES).fit(embedding[::every], found)
    assigned = vote.predict(embedding).astype(np.int32)
    # Clustered cells keep their cluster whatever their neighbours vote.
    assigned[::every] = found
    return assigned
