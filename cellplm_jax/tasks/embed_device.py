"""Embedding of counts that are already in accelerator memory, without a copy through the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import ModelConfig
from cellplm_jax.data.anndata_io import HIGHEST, INTEGER_TOLERANCE, CountSource, Values
from cellplm_jax.data.batches import bucket
from cellplm_jax.data.device_arrays import DeviceRows, DeviceSparseRows
from cellplm_jax.kernels.matmul import linear_product
from cellplm_jax.model.cellplm import CellPLM, in_precision
from cellplm_jax.tasks.long_context import STREAM_CELLS, StreamedEncoder
from cellplm_jax.tasks.pretrained import EMBEDDING_PARTS, Pretrained

CHUNK_CELLS = 4096
"""Maximum number of cells with dense expression at the same time: 317 MB in float32 with the published vocabulary."""

CHUNK_NONZEROS = 2048
"""Maximum number of stored counts per cell of a chunk of a sparse matrix."""

ACTIVATIONS = 12
"""Assumed number of arrays [cells, hidden] to encode a context in one pass; a larger context needs several passes."""


def device_rows(source: Any, model: Pretrained) -> DeviceRows | DeviceSparseRows | None:
    """Return the matrix of a source if it is on a device and can be embedded there, else None.

    Duplicate genes in the file and Laplacian positions need the path through the host.

    Args:
        source: Source of the cells.
        model: The model.
    """
    rows = getattr(source, "stored_rows", None)
    if not isinstance(rows, DeviceRows | DeviceSparseRows):
        return None
    matched = source.vocabulary_column[source.vocabulary_column >= 0]
    twice = len(np.unique(matched)) < len(matched)
    return None if twice or model.config.positions.kind == "laplacian" else rows


def embed_on_device(
    source: CountSource,
    rows: DeviceRows | DeviceSparseRows,
    model: Pretrained,
    cells: np.ndarray,
    coordinates: np.ndarray | None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> jax.Array | np.ndarray:
    """Embed one context whose counts are in device memory.

    Args:
        source: Opened with the model's vocabulary.
        rows: From :func:`device_rows`.
        model: The model.
        cells: int [n], numbers of the cells in the source.
        coordinates: float [n, 2], scaled; None: none.
        on_progress: Called with the progress, as text.

    Returns:
        float32 [n, latent], on the device, or on the host if the context is too large for the device.

    Raises:
        InputError: A value is not a count.
    """
    hidden, sound, empty = express_on_device(source, rows, model, cells, coordinates, on_progress)
    sound = np.asarray(sound)[: len(cells)]
    empty = np.asarray(empty)[: len(cells)]
    # Only now, on the host: a compiled function cannot raise.
    for cell in cells[~sound][:1]:
        source.read(int(cell), int(cell) + 1)  # raises, and names the value
    source.note_empty(cells, empty)
    params = _params(model, rows.device)
    if _too_large(len(cells), model.config, rows.device):
        host = np.array(hidden[0, : len(cells)], np.float32)
        embedding = np.empty((len(cells), model.config.latent_size), np.float32)
        model.encode_streamed(params, host, embedding, on_progress=on_progress)
        return embedding
    mask = jnp.arange(hidden.shape[1])[None] < len(cells)
    return model.encode(params, hidden, jax.device_put(mask, rows.device))[0, : len(cells)]


def express_on_device(
    source: CountSource,
    rows: DeviceRows | DeviceSparseRows,
    model: Pretrained,
    cells: np.ndarray,
    coordinates: np.ndarray | None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the embedder over one context whose counts are in device memory.

    Args:
        source: As for :func:`embed_on_device`, and so are the rest.
        rows: See there.
        model: See there.
        cells: See there.
        coordinates: See there.
        on_progress: See there.

    Returns:
        hidden float32 [1, padded, hidden]; bool [padded], cells whose values are valid; bool [padded],
        cells without a count in the vocabulary.
    """
    size = min(CHUNK_CELLS, bucket(len(cells)))
    capacity = max(size * min(CHUNK_NONZEROS, rows.shape[1]), rows.shape[1])
    dense = isinstance(rows, DeviceRows)
    params = _params(model, rows.device)
    run, gather = _functions(model, dense)
    put = partial(jax.device_put, device=rows.device)
    column = put(source.vocabulary_column.astype(np.int32))
    table = params["embedder"]["gene_embedding"]
    # Dense rows have all columns of the file: the table is brought into their order once, not the counts per chunk.
    weights = gather(table, column) if dense else table
    parts: list[tuple[jax.Array, jax.Array, jax.Array]] = []
    begin = 0
    while begin < len(cells):
        # Sparse rows: as many cells as their stored counts allow.
        number = rows.fits(cells[begin : begin + size], capacity)
        part = slice(begin, begin + number)
        index = np.zeros(size, np.int32)
        index[:number] = cells[part]
        place = np.full((1, size, 2), np.nan, np.float32)
        if coordinates is not None:
            place[0, :number] = coordinates[part]
        result = run(
            params,
            rows.arguments(),
            *put((index, column, weights, place, np.int32(number))),
            values=source.report.values,
            capacity=capacity,
        )
        # A chunk with many counts has fewer cells than the others.
        parts.append(result if number == size else _first(result, number))
        begin += number
        on_progress(f"{begin} of {len(cells)} cells read")
    hidden, sound, empty = (jnp.concatenate(list(part)) for part in zip(*parts, strict=True))
    # Few shapes to compile for small contexts, little padding for large ones.
    padded = bucket(len(cells)) if len(cells) <= size else -(-len(cells) // size) * size
    return jnp.pad(hidden, ((0, padded - len(cells)), (0, 0)))[None], sound, empty


def _first(result: tuple[jax.Array, ...], number: int) -> tuple[Any, ...]:
    return tuple(part[:number] for part in result)


_compiled: WeakKeyDictionary[Pretrained, dict[bool, tuple[Callable, Callable]]]
# Weak keys, so that a model that is no longer used frees its compiled functions and its copies of weights.
_compiled = WeakKeyDictionary()


def _functions(model: Pretrained, dense: bool) -> tuple[Callable, Callable]:
    """Return the compiled functions of a model: the embedder for one chunk, and the weights of the file's columns."""
    known = _compiled.setdefault(model, {})
    if dense not in known:
        chunk = _dense_chunk if dense else _sparse_chunk
        run = jax.jit(partial(chunk, config=model.config), static_argnames=("values", "capacity"))
        known[dense] = run, jax.jit(_weights)
    return known[dense]


def _weights(table: jax.Array, column: jax.Array) -> jax.Array:
    """Return the rows of a table [genes, width] for the columns of a file: 0 for genes outside the vocabulary."""
    return jnp.where(
        (column >= 0)[:, None],
        table[jnp.maximum(column, 0)],
        0,
    )


def _dense_chunk(
    params,
    arrays,
    index,
    column,
    weights,
    place,
    number,
    *,
    values,
    capacity,
    config: ModelConfig,
):
    block = DeviceRows.take(arrays, index, capacity)
    count, sound = _counts(block, values)
    known = jnp.where(column >= 0, count, 0)
    if config.embedder.input_transform == "log1p":
        expression = jnp.log1p(known)
    else:
        library = jnp.maximum(known.sum(axis=1, keepdims=True), 1.0)
        expression = jnp.log1p(known / library * config.embedder.target_sum)
    gene_sum = linear_product(expression.astype(weights.dtype), weights)[None]
    size = index.shape[0]
    batch = CellBatch(
        indptr=jnp.zeros((1, size + 1), jnp.int32),
        gene=jnp.zeros((1, 1), jnp.int32),
        count=jnp.zeros((1, 1), jnp.float32),
        **_of_cells(place, number),
    )
    hidden = _apply(params, batch, gene_sum, config)
    return hidden, sound.all(axis=1), known.sum(axis=1) == 0


def _sparse_chunk(
    params,
    arrays,
    index,
    column,
    weights,
    place,
    number,
    *,
    values,
    capacity,
    config: ModelConfig,
):
    data, columns, offsets = DeviceSparseRows.take(arrays, index, capacity)
    size = index.shape[0]
    # Rows past the end of the chunk repeat the first cell of the file: their counts are excluded.
    offsets = jnp.minimum(offsets, offsets[number])
    count, sound = _counts(data, values)
    gene = column[columns]
    stored = jnp.arange(capacity) < offsets[-1]
    # The library size is that of genes in the vocabulary, as on the host.
    known = jnp.where(stored & (gene >= 0), count, 0)
    cell = jnp.repeat(
        jnp.arange(size),
        offsets[1:] - offsets[:-1],
        total_repeat_length=capacity,
    )
    batch = CellBatch(
        indptr=offsets[None],
        gene=jnp.maximum(gene, 0)[None],
        count=known[None],
        **_of_cells(place, number),
    )
    hidden = _apply(params, batch, None, config)
    bad = jnp.zeros(size, jnp.int32).at[cell].add((stored & ~sound).astype(jnp.int32))
    total = jnp.zeros(size, jnp.float32).at[cell].add(known)
    return hidden, bad == 0, total == 0


def _counts(found: jax.Array, values: Values) -> tuple[jax.Array, jax.Array]:
    """Return float32 counts and which entries are valid, by the rules of :class:`CountSource`."""
    found = found.astype(jnp.float32)
    lowest = -INTEGER_TOLERANCE if values == "counts" else 0.0
    sound = (found >= lowest) & (found <= HIGHEST[values])
    if values == "counts":
        # Counts stored as floating point may be off by rounding; they become integers, as on the host.
        integers = jnp.rint(found)
        return integers, sound & (jnp.abs(found - integers) <= INTEGER_TOLERANCE)
    return (jnp.expm1(found) if values == "log1p" else found), sound


def _of_cells(place: jax.Array, number: jax.Array) -> dict[str, jax.Array]:
    """Return the fields of a batch with one entry per cell: coordinates ([1, size, 2], NaN if unknown) and the mask."""
    present = jnp.isfinite(place).all(axis=-1)
    return {
        "cell_mask": jnp.arange(place.shape[1])[None] < number,
        "coordinates": jnp.where(present[..., None], place, 0.0),
        "has_coordinates": present,
    }


def _apply(params, batch, gene_sum, config):
    return CellPLM(config).apply(
        {"params": params},
        batch,
        gene_sum=gene_sum,
        method=CellPLM.embed_expression,
    )[0]


def _params(model: Pretrained, device: jax.Device) -> Any:
    """Return the embedding weights on a device: the existing ones, or a new copy."""
    for place, copy in zip(model.embeds_on, model.weight_copies, strict=True):
        if place == device or (place is None and device == jax.local_devices()[0]):
            return copy
    known = _copies.setdefault(model, {})
    if device not in known:
        needed = {name: model.params[name] for name in EMBEDDING_PARTS if name in model.params}
        known[device] = in_precision(jax.device_put(needed, device), model.precision)
    return known[device]


_copies: WeakKeyDictionary[Pretrained, dict[jax.Device, Any]] = WeakKeyDictionary()


def _too_large(cells: int, config: ModelConfig, device: jax.Device) -> bool:
    """Return whether a context needs several passes over chunks in host memory."""
    if cells <= STREAM_CELLS or not StreamedEncoder.supports(config):
        return False
    return not fits_at_once(cells, config, device)


def fits_at_once(cells: int, config: ModelConfig, device: jax.Device | None) -> bool:
    """Return whether the memory of an accelerator suffices to encode a context in one pass; False on a CPU.

    Args:
        cells: Cells of the context.
        config: The architecture.
        device: The device; None: JAX's default one.
    """
    memory = (device or jax.local_devices()[0]).memory_stats() or {}
    # CPUs report no limit: their memory is shared with everything else.
    if "bytes_limit" not in memory:
        return False
    free = memory["bytes_limit"] - memory.get("bytes_in_use", 0)
    return ACTIVATIONS * cells * config.hidden * 4 <= free
