"""Initialisation of a model with a trunk: a linear projection of its corpus.

Counts are scaled to 10,000 per cell and log-transformed, centred by tissue sample and divided by each gene's standard
deviation over the corpus. The loadings of their principal components, divided by the root of the singular values,
become the gene embeddings, so that the weighted gene sum of the embedder *is* the projection of the cell. Clusters of
each dataset then define linear discriminants, which the map to the latent appends. Encoder layers start at zero and
add to the projection during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from scipy import sparse

from cellplm_jax.config import ModelConfig, TrainConfig
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.errors import InputError, require
from cellplm_jax.evaluate.components import (
    BLOCK,
    CLIP,
    Discriminants,
    log_normalized,
    own_components,
    principal_components,
    unit_length,
    variable_expression,
    variable_genes,
)
from cellplm_jax.evaluate.embedding import leiden_clusters
from cellplm_jax.evaluate.inputs import column_sums
from cellplm_jax.model.encoder import context_centre

CLUSTERED_CELLS = 3000
"""Maximum number of clustered cells per dataset."""

MEASURED, DETECTED = 0.4, 0.005
"""For genes with loadings: minimum share of all cells that measure a gene, and of these that detect it."""


class Projection(NamedTuple):
    """Initial values of a model with a trunk.

    Attributes:
        table: Loadings over deviations, scaled so that projected cells have a root mean square of 1; 0 for the other
            genes.
        context_mean: The projected mean of the corpus.
        discriminants: Of projected cells with a root mean square of 1.
    """

    table: Float32[np.ndarray, "genes components"]
    context_mean: Float32[np.ndarray, " components"]
    discriminants: Float32[np.ndarray, "components discriminants"]


class _Group(NamedTuple):
    """Log-normalized cells of a tissue sample: CSR [cells, genes], and the genes that it measures (None: all)."""

    dataset: str
    expression: sparse.csr_matrix
    measured: np.ndarray | None


def fit_projection(
    store: CellStore,
    ranges: Sequence[SampleRange],
    config: TrainConfig,
    *,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Projection:
    """Compute the initial values of a run with ``model.trunk = "projection"``.

    The result depends only on the data and the configuration. The log-normalized counts of ``maximum_cells`` cells stay
    in memory, about 12 bytes per stored count.

    Args:
        store: The data.
        ranges: Training cells.
        config: The run; ``config.projection`` holds the recipe.
        on_progress: Called with a sentence at each stage.

    Returns:
        A :class:`Projection`.

    Raises:
        InputError: No gene is measured and detected in enough cells.
        MissingDependencyError: Discriminants need the clustering of the extra ``eval``, which is not installed.
    """
    recipe = config.projection
    target = config.model.embedder.target_sum
    if recipe.discriminants:
        # Before the work that comes first.
        purpose = "projection.discriminants > 0, which clusters the datasets,"
        require("scanpy", "eval", purpose)
        require("igraph", "eval", purpose)
    on_progress("reading cells for the projection of the corpus")
    groups = list(_read_groups(store, ranges, recipe.maximum_cells, target))
    # Genes that few samples measure would give components that separate panels instead of cells.
    mean, deviation, usable = _gene_statistics(groups, len(store.genes))
    chosen = variable_genes(mean, deviation**2, recipe.genes, usable)
    if len(chosen) < 2:
        raise InputError(
            f"{len(chosen)} genes are detected in {DETECTED:.1%} of the cells that measure them",
            "genes to compute components from",
            "Train on more cells, or set model.trunk = 'none'",
        )
    on_progress(f"principal components of {len(chosen):,} genes")
    view = _Standardized(
        groups,
        chosen,
        mean,
        np.maximum(deviation, 0.1),
        config.model.centre_cells,
    )
    loadings, strength = principal_components(
        lambda: (block for _, _, block in view.blocks(weighted=True)),
        len(chosen),
        recipe.components,
        passes=recipe.passes,
        seed=config.seed,
    )
    map_ = loadings / np.sqrt(np.maximum(strength, 1e-9)).astype(np.float32)
    embeddings = view.project(map_)
    # Unit mean square over cells and components, whatever the corpus.
    scale = 1 / np.sqrt(np.mean([np.mean(rows**2) for rows in embeddings]) + 1e-12)
    embeddings = [rows * np.float32(scale) for rows in embeddings]

    table = np.zeros((len(store.genes), map_.shape[1]), np.float32)
    # The division by the deviation is part of the table, so that the embedder only multiplies log counts.
    table[chosen] = map_ * scale / view.deviation[:, None]
    context_mean = mean.astype(np.float32) @ table
    discriminants = np.zeros((map_.shape[1], 0), np.float32)
    if recipe.discriminants:
        discriminants = _discriminants(groups, embeddings, recipe.discriminants, on_progress)
        discriminants = discriminants * np.float32(recipe.discriminant_weight)
    return Projection(table, context_mean, discriminants)


def start_from(
    params: dict[str, Any],
    projection: Projection,
    config: ModelConfig,
) -> dict[str, Any]:
    """Write a projection into freshly initialised parameters; a pure function that can be traced.

    Args:
        params: The ``"params"`` collection.
        projection: From :func:`fit_projection`.
        config: The architecture, with a trunk.
    """
    components = projection.table.shape[1]
    embedder = dict(params["embedder"])
    embedder["gene_embedding"] = _padded(projection.table, (config.genes, config.hidden))
    if "position_scale" in embedder:
        # Coordinates must not add noise to the components of a model that was never trained.
        embedder["position_scale"] = (jnp.arange(config.hidden) >= components).astype(jnp.float32)
    kernel = jnp.concatenate([jnp.eye(components), projection.discriminants], axis=1)
    latent = dict(params["latent"])
    name = "linear" if config.latent.kind == "deterministic" else "mean"
    latent[name] = {
        **latent[name],
        "kernel": _padded(kernel, (config.hidden, config.latent.size)),
    }
    if "log_variance" in latent:
        layer = latent["log_variance"]
        # The same variance for all cells at the start; the bias keeps its initial value.
        latent["log_variance"] = {**layer, "kernel": jnp.zeros_like(layer["kernel"])}
    encoder = {}
    for layer, parts in params.get("encoder", {}).items():
        if "attention" in parts:
            # With the last layer of both residual branches at 0, a layer is the identity.
            attention = {**parts["attention"], "out": _zeroed(parts["attention"]["out"])}
            last = {"attention": attention, "feedforward_out": _zeroed(parts["feedforward_out"])}
        else:  # an MLP, whose last module is its norm
            name = "norm" if "norm" in parts else "linear"
            last = {name: _zeroed(parts[name])}
        encoder[layer] = {**parts, **last}
    started = {
        **params,
        "embedder": embedder,
        "latent": latent,
        "centre": {"context_mean": _padded(projection.context_mean, (config.hidden,))},
    }
    return {**started, "encoder": encoder} if encoder else started


def _padded(values: Any, shape: tuple[int, ...]) -> jnp.ndarray:
    values = jnp.asarray(values, jnp.float32)
    spare = [(0, size - have) for size, have in zip(shape, values.shape, strict=True)]
    return jnp.pad(values, spare)


def _zeroed(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.zeros_like(leaf) for name, leaf in layer.items()}


def _read_groups(
    store: CellStore,
    ranges: Sequence[SampleRange],
    maximum: int,
    target: float,
) -> Iterator[_Group]:
    """Read the same share of every range, from its start: stored cells are in random or spatial order."""
    total = sum(part.cells for part in ranges)
    share = min(1.0, maximum / max(total, 1))
    for part in ranges:
        # Two cells of even the smallest sample, so that no sample is missing.
        stop = part.start + max(min(part.cells, 2), int(part.cells * share))
        run = store.read(part.sample, part.start, stop)
        shape = (run.cells, len(store.genes))
        counts = sparse.csr_matrix(
            (run.count.astype(np.float32), run.gene.astype(np.int32), run.indptr), shape=shape
        )
        name = store.samples[part.sample].dataset_name
        yield _Group(name, log_normalized(counts, target), store.measured(part.sample))


def _gene_statistics(
    groups: Sequence[_Group], genes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and deviation [genes] over the cells that measure each gene, and the genes that may have loadings."""
    sums, squares, detected, seen = np.zeros((4, genes))
    cells = 0
    for group in groups:
        values = group.expression
        cells += values.shape[0]
        sums += np.bincount(values.indices, values.data, genes)
        squares += np.bincount(values.indices, values.data**2, genes)
        detected += np.bincount(values.indices, minlength=genes)
        seen += values.shape[0] * (1.0 if group.measured is None else group.measured)
    divisor = np.maximum(seen, 1)
    mean = sums / divisor
    deviation = np.sqrt(np.maximum(squares / divisor - mean**2, 1e-8))
    usable = (seen >= MEASURED * cells) & (detected / divisor > DETECTED)
    if usable.sum() < 2:  # the panels have too few genes in common
        usable = detected / divisor > DETECTED
    return mean, deviation, usable


class _Standardized:
    """Standardized expression of chosen genes, centred by tissue sample, in dense blocks."""

    def __init__(self, groups, chosen, mean, deviation, centre_cells):
        self.deviation = deviation[chosen].astype(np.float32)
        cells: dict[str, int] = {}
        for group in groups:
            cells[group.dataset] = cells.get(group.dataset, 0) + group.expression.shape[0]
        self._parts = []
        for group in groups:
            part = group.expression[:, chosen]
            total = column_sums(part)
            centre = context_centre(total, part.shape[0], mean[chosen], centre_cells)
            measured = None if group.measured is None else group.measured[chosen]
            # The weight of a dataset is the square root of its number of cells.
            # Applied to rows, so it enters the Gram matrix squared: n / sqrt(n).
            weight = cells[group.dataset] ** -0.25
            self._parts.append((part, centre.astype(np.float32), measured, weight))

    def blocks(self, *, weighted: bool) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Yield (number of the sample, cells, float32 [cells, genes])."""
        for number, (part, centre, measured, weight) in enumerate(self._parts):
            for start in range(0, part.shape[0], BLOCK):
                cells = slice(start, min(start + BLOCK, part.shape[0]))
                block = (part[cells].toarray() - centre) / self.deviation
                if measured is not None:
                    block[:, ~measured] = 0
                if weighted:
                    # Rare genes have standardised values of hundreds; a few cells would define components by
                    # themselves.
                    np.clip(block, -CLIP, CLIP, out=block)
                    block *= np.float32(weight)
                yield number, cells, block

    def project(self, loadings: np.ndarray) -> list[np.ndarray]:
        """Return float32 [cells, components] of every sample."""
        rows: list[list[np.ndarray]] = [[] for _ in self._parts]
        for number, _, block in self.blocks(weighted=False):
            rows[number].append(block @ loadings)
        return [np.concatenate(parts) for parts in rows]


def _discriminants(
    groups: Sequence[_Group],
    embeddings: Sequence[np.ndarray],
    number: int,
    on_progress: Callable[[str], None],
) -> np.ndarray:
    """Cluster each dataset in its projection and its own components; return the directions that separate clusters."""
    pooled = Discriminants(embeddings[0].shape[1])
    datasets = sorted({group.dataset for group in groups})
    lengths = []
    for place, dataset in enumerate(datasets):
        members = [n for n, group in enumerate(groups) if group.dataset == dataset]
        projected = unit_length(np.concatenate([embeddings[n] for n in members]))
        # A regular stride instead of a draw: stored cells are in random or spatial order.
        every = max(1, -(-len(projected) // CLUSTERED_CELLS))
        # Clusters of fewer cells are noise, and their directions would be shared by all data sets.
        if len(projected[::every]) < 50:
            continue
        on_progress(f"clusters of {dataset} ({place + 1} of {len(datasets)})")
        own = _own_components([groups[n] for n in members], every)
        joined = np.hstack([JOINED_PROJECTION * projected[::every], unit_length(own)])
        pooled.add(projected[::every], leiden_clusters(joined))
        lengths.append(projected[::every])
    directions = pooled.directions(number)
    if not directions.shape[1]:
        return directions.astype(np.float32)
    # Scaled to the mean length of the components.
    centred = [z - z.mean(axis=0) for z in lengths]
    length = np.mean([np.mean((z @ directions) ** 2) for z in centred])
    length *= directions.shape[1]
    return (directions / np.sqrt(length)).astype(np.float32)


JOINED_PROJECTION = 0.7
"""Length of the projection relative to a dataset's own components, which have length 1."""


def _own_components(groups: Sequence[_Group], every: int) -> np.ndarray:
    """Return float32 [cells, components] of a subset of a dataset: one cell in ``every``."""
    parts, sample_of, start = [], [], 0
    for number, group in enumerate(groups):
        # The stride continues over sample boundaries, so the rows agree with those of `projected[::every]`.
        take = np.arange(-start % every, group.expression.shape[0], every)
        parts.append(group.expression[take])
        sample_of.append(np.full(len(take), number))
        start += group.expression.shape[0]
    everything = sparse.csr_matrix(sparse.vstack(parts))
    expression, deviation = variable_expression(lambda: [everything])
    return own_components(expression, np.concatenate(sample_of), deviation)
