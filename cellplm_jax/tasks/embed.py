"""Embedding: from the cells of an AnnData to vectors, streamed, in contexts that the caller chooses."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Unpack, get_args

import jax
import numpy as np

from cellplm_jax._version import __version__
from cellplm_jax.batch import CellBatch
from cellplm_jax.data.anndata_io import CountSource, Values, open_counts
from cellplm_jax.data.batches import (
    Sample,
    bucket,
    laplacian_eigenvectors,
    pad_batch,
    scale_coordinates,
)
from cellplm_jax.errors import InputError, require, require_choice
from cellplm_jax.progress import ProgressReport
from cellplm_jax.tasks import long_context
from cellplm_jax.tasks.context_components import join_context
from cellplm_jax.tasks.embed_device import device_rows, embed_on_device, fits_at_once
from cellplm_jax.tasks.files import as_anndata, check_copy, check_key, write_copy
from cellplm_jax.tasks.long_context import IOWait, Prefetcher, StreamedEncoder, host_array, overlap
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained
from cellplm_jax.tasks.reading import ReadingKeys, keys_of
from cellplm_jax.untrusted import require_options

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy import sparse

# Maximum number of cells whose counts are dense on the device at the same time; a context may be far larger.
CHUNK_CELLS = 512
# Maximum number of stored counts per cell of a chunk; a denser chunk gets fewer cells.
CHUNK_NONZEROS = 2048


FEW_MATCHED = 0.3
"""Fraction of the gene names of a file below which an embedding warns."""


Adapt = Literal["none", "context"]
"""Adaptation of an embedding to the cells it is computed for."""


class EmbeddingKeys(ReadingKeys, total=False):
    """Named arguments of an embedding, documented by :func:`embed`."""

    minimum_genes: int | None


def embed(
    adata: AnnData | str | os.PathLike,
    model: Pretrained | str | os.PathLike,
    *,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    layer: str | None = None,
    gene_key: str | None = None,
    cells_per_context: int | None = None,
    key_added: str = "X_cellplm",
    values: Values = "counts",
    minimum_genes: int | None = None,
    adapt: Adapt = "none",
    feature_type: str | None = None,
    quiet: bool = False,
) -> AnnData:
    """Embed the cells of an AnnData with a pretrained model, in place, and print one line about it.

    Cells of one context attend to one another: all cells with the same ``batch_key`` value (without it, all cells
    of the file), or, with ``cells_per_context``, sets of about that size. The result does not depend on how the file is
    read and split into chunks.

    Writes:
        ``obsm[key_added]``: float32 [n_obs, latent].
        ``uns["cellplm"]``: model id, version, context, where the counts and gene ids came from, and how many genes of
        the vocabulary were matched, missing, ambiguous and duplicated.

    Args:
        adata: Raw counts: in ``X``, ``raw.X`` or a usual layer, any storage; a backed one is streamed. The path of an
            ``.h5ad`` file or a ``.zarr`` store is read into memory first; :func:`embed_file` streams it instead.
        model: From :func:`cellplm_jax.load`, or what it opens, such as ``"small"``.
        batch_key: Column of ``obs`` with the tissue sample of each cell; each sample is one context.
        spatial_key: Key of ``obsm`` with 2-D coordinates in any unit, scaled per tissue sample. The default is used
            if present; any other key must be present. None: no coordinates.
        layer: Layer with the counts; None: look for them.
        gene_key: Column of ``var`` with gene ids; None: take the one that matches best.
        cells_per_context: Maximum number of cells per context; None: no limit. Cells are assigned to the contexts of
            their sample round-robin, so each context is a cross-section of the sample. In a file sorted by cell type,
            a context of a few cells reveals the type of its cells: shuffle such a file first.
        key_added: Key of ``obsm`` to write.
        values: ``"counts"``; ``"normalized"`` or ``"log1p"`` explicitly permits such values.
        minimum_genes: Minimum number of vocabulary genes in the data; None: the default of ``map_genes``.
        adapt: ``"none"``: the zero-shot latent, comparable between files. ``"context"``: joined with the components
            and clusters of these cells and, with ``batch_key``, aligned between batches, see
            ``tasks/context_components.py``; better for one file
            (``benchmarks/zero_shot``), not comparable between files, and of a different width. Needs the extra
            ``eval``.
        feature_type: Type of the features to read, as the file names it; None: genes, if ``var`` has the types;
            "all": every feature.
        quiet: No progress and no line.

    Returns:
        ``adata`` itself; for a path the AnnData that was read, with the embedding.

    Raises:
        InputError: The counts, genes or keys cannot be used; the message explains what to do.
    """
    check_key(key_added)
    keys: EmbeddingKeys = {
        "batch_key": batch_key,
        "spatial_key": spatial_key,
        "layer": layer,
        "gene_key": gene_key,
        "values": values,
        "cells_per_context": cells_per_context,
        "minimum_genes": minimum_genes,
        "feature_type": feature_type,
    }
    read, context = options_of(keys, adapt=adapt)
    check_adapt(adapt)
    data = as_anndata(adata)
    embedding, provenance, _ = read_and_embed(
        data,
        as_pretrained(model),
        read,
        context,
        key_added,
        quiet,
    )
    if few := few_matched(provenance["input"]["genes"]):
        warnings.warn(few, stacklevel=2)
    data.obsm[key_added] = embedding
    data.uns["cellplm"] = provenance
    return data


@keys_of(embed, "cellplm_jax.embed")
def embed_file(
    path: str | os.PathLike,
    model: Pretrained | str | os.PathLike,
    out: str | os.PathLike,
    *,
    key_added: str = "X_cellplm",
    adapt: Adapt = "none",
    require_coordinates: bool = False,
    quiet: bool = False,
    **keys: Unpack[EmbeddingKeys],
) -> list[str]:
    """Embed an ``.h5ad`` file or a ``.zarr`` store into a copy of it, without loading it into memory.

    Args:
        path: Input; never changed.
        model: From :func:`cellplm_jax.load`, or what it opens, such as ``"small"``.
        out: Output of the same kind: the input plus what :func:`embed` writes; an atomic write.
        require_coordinates: ``spatial_key`` must be present, even if it is the default one.
        **keys: As for :func:`embed`.

    Returns:
        Messages about the input: where the counts were found, which genes matched.

    Raises:
        InputError: As :func:`embed`; also if ``out`` cannot be written.
    """
    path = Path(path).expanduser()
    out = Path(out).expanduser()
    check_copy(path, out)
    check_key(key_added)
    read, context = options_of(keys, adapt=adapt, require_coordinates=require_coordinates)
    model = as_pretrained(model)
    embedding, provenance, messages = read_and_embed(path, model, read, context, key_added, quiet)
    write_copy(path, out, obsm={key_added: embedding}, uns={"cellplm": provenance})
    few = few_matched(provenance["input"]["genes"])
    return [few, *messages] if few else messages


def few_matched(genes: Mapping[str, Any]) -> str:
    """Return a warning if the model knows few of the genes of a file; "" otherwise.

    Args:
        genes: ``uns["cellplm"]["input"]["genes"]``.
    """
    if genes["matched"] >= FEW_MATCHED * genes["names"]:
        return ""
    return (
        f"the model knows only {_matched(genes)}; the embedding is unreliable unless the others are no genes. Check "
        "gene_key (--gene-key) and the species"
    )


def _matched(genes: Mapping[str, Any]) -> str:
    share = 100 * genes["matched"] / max(genes["names"], 1)
    return f"{genes['matched']:,} of {genes['names']:,} genes ({share:.0f} %)"


def check_adapt(adapt: str) -> None:
    """Reject an unknown ``adapt`` and a missing extra, before any work is done.

    Raises:
        InputError: It is neither ``"none"`` nor ``"context"``.
        MissingDependencyError: It is ``"context"`` without the extra ``eval``.
    """
    require_choice("adapt", adapt, get_args(Adapt))
    if adapt == "context":
        require("scanpy", "eval", "adapt='context'")
        require("igraph", "eval", "adapt='context'")
        require("harmonypy", "eval", "adapt='context'")


class Context(NamedTuple):
    """Which cells attend to one another, their coordinates, and the function that joins components of the context."""

    batch_key: str | None
    spatial_key: str | None
    cells_per_context: int | None
    require_coordinates: bool = False
    adapt: Adapt = "none"
    join: Callable[..., np.ndarray] = join_context


_READ = {
    "layer": None,
    "gene_key": None,
    "values": "counts",
    "minimum_genes": None,
    "feature_type": None,
}
_CONTEXT = {"batch_key": None, "spatial_key": "spatial", "cells_per_context": None}


def options_of(
    keys: Mapping[str, Any],
    *,
    adapt: Adapt = "none",
    require_coordinates: bool = False,
) -> tuple[dict[str, Any], Context]:
    """Return the options for reading and for contexts, checked before any work is done.

    Args:
        keys: See :class:`EmbeddingKeys`.
        adapt: See :func:`embed`.
        require_coordinates: The coordinates must be present, even with the default key.

    Returns:
        Keyword arguments of :func:`cellplm_jax.data.anndata_io.open_counts`, and the context.

    Raises:
        InputError: A value has another type.
        TypeError: A key is unknown.
    """
    read = {name: keys.get(name, default) for name, default in _READ.items()}
    own = {name: keys.get(name, default) for name, default in _CONTEXT.items()}
    for name in keys:
        if name not in read and name not in own:
            msg = f"an embedding has no keyword argument {name!r}"
            raise TypeError(msg)
    require_options(own)
    return read, Context(**own, require_coordinates=require_coordinates, adapt=adapt)


def read_and_embed(
    data: AnnData | Path,
    model: Pretrained,
    read: dict[str, Any],
    context: Context,
    key_added: str,
    quiet: bool,
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Open the counts, embed them, and describe the input.

    Args:
        data: The cells.
        model: The model.
        read: Keyword arguments of :func:`cellplm_jax.data.anndata_io.open_counts`.
        context: Which cells attend to one another.
        key_added: Key of ``obsm`` that the facts name.
        quiet: No progress.

    Returns:
        float32 [cells, latent]; facts for ``uns``; sentences about the input.
    """
    # Before the counts are read: a missing extra must not be found after an hour.
    check_adapt(context.adapt)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_counts(data, model.genes, **read))
        progress = ProgressReport("embedding", source.cells, unit="cells", quiet=quiet)
        stack.callback(progress.close)
        if context.require_coordinates and context.spatial_key is not None:
            source.coordinates(context.spatial_key, required=True)
        embedding = embed_source(
            source,
            model,
            batch_key=context.batch_key,
            spatial_key=context.spatial_key,
            cells_per_context=context.cells_per_context,
            progress=progress,
            waiting=(waiting := IOWait()),
        )
        if context.adapt == "context":
            progress.stage("joining components and clusters")
            embedding = context.join(
                embedding,
                source,
                _tissue_samples(source, context.batch_key),
                target_sum=model.config.embedder.target_sum,
            )
        messages = source.report.messages() + waiting.messages()
        key = context.spatial_key
        located = key is not None and key in source.obsm
        if located and model.config.positions.kind == "none":
            located = False
            messages.append(f"obsm['{key}'] was not used: this model was trained without positions")
        provenance = {
            "model": model.id,
            "model_source": model.source,
            "precision": model.precision,
            "version": __version__,
            "key_added": key_added,
            "context": {
                "batch_key": context.batch_key or "",
                "cells_per_context": context.cells_per_context or 0,
                "coordinates": key if located else "",
            },
            "adapt": context.adapt,
            "comparable_between_files": context.adapt == "none",
            "input": source.report.as_dict(),
        }
        progress.close(
            f"embedded {source.cells:,} cells: {_matched(source.report.genes.as_dict())} matched, "
            f"{progress.time_taken}"
        )
    return embedding, provenance, messages


def embed_source(
    source: CountSource,
    model: Pretrained,
    *,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    cells_per_context: int | None = None,
    groups: Sequence[np.ndarray] | None = None,
    title: str = "embedding",
    quiet: bool = True,
    progress: ProgressReport | None = None,
    waiting: IOWait | None = None,
) -> np.ndarray:
    """Embed an opened source of counts.

    Args:
        source: From :func:`cellplm_jax.data.anndata_io.open_counts` with the model's vocabulary.
        model: The model.
        batch_key: See :func:`embed`.
        spatial_key: See :func:`embed`.
        cells_per_context: See :func:`embed`.
        groups: int arrays, cells that attend to one another, instead of the batches that ``batch_key`` names.
        title: Title of the progress report.
        quiet: No progress on standard error.
        progress: Report to update, which the caller closes; None: a new one.
        waiting: Accumulates the time spent waiting for data.

    Returns:
        float32 [cells, latent]; NaN for cells of no group.

    Raises:
        InputError: ``cells_per_context`` is below 1, or counts or keys cannot be used.
    """
    if cells_per_context is not None and cells_per_context < 1:
        raise InputError(
            f"cells_per_context = {cells_per_context}",
            "at least 1, or None for whole samples",
            "Raise it",
        )
    tissue_samples = _tissue_samples(source, batch_key) if groups is None else groups
    coordinates = _coordinates(source, spatial_key)
    embedding = np.full((source.cells, model.config.latent_size), np.nan, np.float32)
    done = 0
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = ProgressReport(title, source.cells, unit="cells", quiet=quiet)
            stack.callback(progress.close)
        update = progress.update
        for cells in tissue_samples:
            placed = None if coordinates is None else scale_coordinates(coordinates[cells])
            for index in _contexts(len(cells), cells_per_context):
                here = None if placed is None else placed[index]
                # `n=done` binds the current value.
                on_progress = lambda text, n=done: update(n, text)  # noqa: E731
                embedding[cells[index]] = embed_context(
                    source,
                    model,
                    cells[index],
                    here,
                    waiting,
                    on_progress,
                )
                done += len(index)
                update(done)
    return embedding


def _tissue_samples(source: CountSource, batch_key: str | None) -> list[np.ndarray]:
    if batch_key is None:
        return [np.arange(source.cells)]
    labels = np.asarray(source.column(batch_key))
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    # In order of first appearance, so that a sorted file is read front to back.
    order = np.argsort(np.argsort(first))
    return [np.flatnonzero(order[inverse] == i) for i in range(len(first))]


def _contexts(cells: int, limit: int | None) -> Iterator[np.ndarray]:
    count = 1 if limit is None else -(-cells // limit)
    for start in range(count):
        # Round-robin, so that every context is a cross-section of the sample.
        yield np.arange(start, cells, count)


def _coordinates(source: CountSource, spatial_key: str | None) -> np.ndarray | None:
    if spatial_key is None:
        return None
    return source.coordinates(spatial_key, required=spatial_key != "spatial")


class RowSource(Protocol):
    """Source of the cells of a context: an opened file, or a sample of a corpus."""

    def read_rows(self, indices: np.ndarray) -> sparse.csr_matrix:
        """Read cells by their numbers: float32 CSR [cells, genes] in the columns of the model's vocabulary."""
        ...


def embed_context(
    source: RowSource,
    model: Pretrained,
    cells: np.ndarray,
    coordinates: np.ndarray | None,
    waiting: IOWait | None,
    on_progress: Callable[[str], None],
) -> np.ndarray:
    """Embed one context: the embedder over chunks of cells, then the encoder over all of them.

    Args:
        source: Its cells have the genes of the model.
        model: The model.
        cells: int [n], numbers of the cells in the source.
        coordinates: float [n, 2], scaled; None: none.
        waiting: Accumulates the time spent waiting for data.
        on_progress: Called with the progress, as text.

    Returns:
        float32 [n, latent].
    """
    rows = device_rows(source, model)
    if rows is not None:
        return np.asarray(embed_on_device(source, rows, model, cells, coordinates, on_progress))  # type: ignore[arg-type]
    large = len(cells) > long_context.STREAM_CELLS and StreamedEncoder.supports(model.config)
    if large and not fits_at_once(len(cells), model.config, model.embeds_on[0]):
        hidden = express_context(
            source,
            model,
            cells,
            coordinates,
            waiting=waiting,
            on_progress=on_progress,
        )
        embedding = np.empty((len(cells), model.config.latent_size), np.float32)
        params, *others = model.weight_copies
        model.encode_streamed(params, hidden, embedding, others=others, on_progress=on_progress)
        return embedding
    hidden, mask = express_padded(
        source,
        model,
        cells,
        coordinates,
        waiting=waiting,
        on_progress=on_progress,
    )
    return np.asarray(model.encode_context(hidden, mask))[0, : len(cells)]


def express_padded(
    source: RowSource,
    model: Pretrained,
    cells: np.ndarray,
    coordinates: np.ndarray | None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the embedder over one context that is to be encoded in a single pass.

    Args:
        source: As for :func:`express_context`, and so are the rest.
        model: See there.
        cells: See there.
        coordinates: See there.
        **options: See there.

    Returns:
        hidden float32 [1, padded, hidden]; bool [1, padded], which of them are cells.
    """
    padded = bucket(len(cells))
    hidden = express_context(source, model, cells, coordinates, padded=padded, **options)
    return hidden[None], np.arange(padded)[None, :] < len(cells)


def express_context(
    source: RowSource,
    model: Pretrained,
    cells: np.ndarray,
    coordinates: np.ndarray | None,
    *,
    padded: int | None = None,
    waiting: IOWait | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """Run the embedder over the cells of one context, in chunks, with prefetch.

    Args:
        source: Opened with the model's vocabulary.
        model: The model.
        cells: int [n], which cells.
        coordinates: float [n, 2], scaled; None: none.
        padded: Rows of the result; None: n.
        waiting: Accumulates the time spent waiting for data.
        on_progress: Called with the progress, as text.

    Returns:
        float32 [padded, hidden], before any attention, 0 past the cells; in memory, or on disk if it is large.
    """
    # In host memory: a context can be larger than the device's.
    hidden = host_array((padded or len(cells), model.config.hidden))
    devices = len(model.embeds_on)
    # One batch per device in computation, and one that is read.
    batches = Prefetcher(_chunks_of_context(source, model, cells, coordinates), depth=1 + devices)
    started = time.perf_counter()
    chunks = (
        (part, model.embed_expression(model.weight_copies[turn], batch))
        for part, turn, batch in batches
    )
    # Closed even if the work fails: the thread must not continue to read from a closed source.
    with contextlib.closing(chunks):
        for part, chunk in overlap(chunks, devices):
            hidden[part] = np.asarray(chunk)[0, : part.stop - part.start]
            on_progress(f"{part.stop} of {len(cells)} cells read")
    if waiting is not None:
        waiting.add(batches.waited, time.perf_counter() - started)
    return hidden


def _chunks_of_context(
    source: RowSource,
    model: Pretrained,
    cells: np.ndarray,
    coordinates: np.ndarray | None,
) -> Iterator[tuple[slice, int, CellBatch]]:
    """Yield a context as batches of one shape: rows of the context, number of the device, the batch on that device."""
    turns = itertools.cycle(range(len(model.embeds_on)))
    rows = min(CHUNK_CELLS, bucket(len(cells)))
    # One shape for all chunks of a context, hence one compilation; any single cell fits.
    capacity = max(rows * min(CHUNK_NONZEROS, len(model.genes)), len(model.genes))
    positions = model.config.positions
    vectors = None
    if positions.kind == "laplacian" and coordinates is not None:
        present = np.isfinite(coordinates).all(axis=1)
        vectors = np.zeros((len(cells), positions.eigenvectors), np.float32)
        vectors[present] = laplacian_eigenvectors(coordinates[present], positions.eigenvectors)
    for start in range(0, len(cells), rows):
        stop = min(start + rows, len(cells))
        counts = source.read_rows(cells[start:stop])
        begin = 0
        while begin < counts.shape[0]:
            # The largest number of consecutive cells whose stored counts fit; a single cell always fits.
            fits = np.searchsorted(counts.indptr, counts.indptr[begin] + capacity, side="right") - 1
            end = max(begin + 1, int(fits))
            part = slice(start + begin, start + end)
            sample = Sample(
                name="context",
                counts=counts[begin:end],
                coordinates=None if coordinates is None else coordinates[part],
                eigenvectors=None if vectors is None else vectors[part],
            )
            batch = pad_batch(
                [sample],
                cells=rows,
                nonzeros=capacity,
                eigenvectors=positions.eigenvectors if positions.kind == "laplacian" else None,
            )
            # The embedder reads only counts and coordinates; covariates and panels belong to the decoder.
            batch = batch.replace(measured=None, dataset=None, platform=None)
            turn = next(turns)
            yield part, turn, jax.device_put(batch, model.embeds_on[turn])
            begin = end
