"""Attention weights: explicit weights from the linear attention, for selected cells."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from cellplm_jax.data.anndata_io import CountSource, Values, open_counts
from cellplm_jax.data.batches import scale_coordinates
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.contexts import deal, source_groups
from cellplm_jax.tasks.embed import express_padded
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained

if TYPE_CHECKING:
    from anndata import AnnData

CHOSEN_CELLS = 64
"""Number of selected cells per computation; a context of n cells then takes layers * heads * 64 * n numbers."""


def cell_attention(
    adata: AnnData | str | os.PathLike,
    model: Pretrained | str | os.PathLike,
    *,
    cells: Sequence[str] | Sequence[int] | np.ndarray | str | int,
    average: bool = True,
    normalize: bool = False,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    layer: str | None = None,
    gene_key: str | None = None,
    cells_per_context: int | None = None,
    values: Values = "counts",
    minimum_genes: int | None = None,
) -> pd.DataFrame:
    """Return the attention weights of selected cells over all other cells.

    In every layer and head the attention's output for a cell is a weighted sum of the values of all cells of its
    context. Flow attention never materializes these weights; here they are computed exactly for the selected cells
    only, with memory linear in the number of cells. They are positive; rows sum to 1 only with ``normalize``. From the
    second layer on, the attended cells already contain information from other cells.

    Args:
        adata: Raw counts, as for :func:`cellplm_jax.embed`.
        model: From :func:`cellplm_jax.load`, or a source for it.
        cells: The attending cells: names (of ``obs_names``), numbers, or a mask over all cells; or a single one.
        average: Average over layers and heads.
        normalize: Divide every row by its sum.
        batch_key: Column of ``obs`` with the tissue sample of each cell; cells attend within it.
        spatial_key: See :func:`cellplm_jax.embed`.
        layer: Layer of ``adata`` with the counts.
        gene_key: See :func:`cellplm_jax.embed`.
        cells_per_context: See :func:`cellplm_jax.embed`.
        values: See :func:`cellplm_jax.embed`.
        minimum_genes: See :func:`cellplm_jax.embed`.

    Returns:
        float32, one column per cell of ``adata``; 0 for cells of other contexts. Rows: the selected cells in the given
        order, by name (index ``"cell"``); without ``average`` by layer and head (index levels ``"layer"``, ``"head"``,
        ``"cell"``).

    Raises:
        InputError: The cells do not exist, the model has no attention weights, or the counts, genes or keys
            cannot be used.
    """
    model = as_pretrained(model)
    kind = model.config.encoder.kind
    if kind not in ("flow", "softmax"):
        raise InputError(
            f"the encoder of '{model.id}' is of kind '{kind}'",
            "one with attention weights: 'flow' or 'softmax'",
            "Use another model",
        )
    read: dict[str, Any] = {
        "layer": layer,
        "gene_key": gene_key,
        "values": values,
        "minimum_genes": minimum_genes,
    }
    encoder = model.config.encoder
    with open_counts(adata, model.genes, **read) as source:
        names = pd.Index([str(name) for name in source.obs.index])
        chosen = _chosen(cells, names)
        coordinates = None
        if spatial_key is not None:
            coordinates = source.coordinates(spatial_key, required=spatial_key != "spatial")
        shape = (encoder.layers, encoder.heads, len(chosen), len(names))
        weights = np.zeros(shape[2:] if average else shape, np.float32)
        for group in source_groups(source, batch_key):
            placed = None
            if coordinates is not None:
                placed = np.full((len(names), 2), np.nan)
                placed[group] = scale_coordinates(coordinates[group])
            for context in deal(group, cells_per_context):
                _fill(weights, source, model, context, placed, chosen)
    if normalize:
        weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    rows: Any = pd.Index(names[chosen], name="cell")
    if not average:
        rows = pd.MultiIndex.from_product(
            [range(encoder.layers), range(encoder.heads), names[chosen]],
            names=["layer", "head", "cell"],
        )
    return pd.DataFrame(
        weights.reshape(-1, len(names)),
        index=rows,
        columns=names.rename("attended"),
    )


def _fill(
    found: np.ndarray,
    source: CountSource,
    model: Pretrained,
    context: np.ndarray,
    placed: np.ndarray | None,
    chosen: np.ndarray,
) -> None:
    """Write the weights of the selected cells of one context into ``found``."""
    place_of = {cell: place for place, cell in enumerate(context)}
    here = [number for number, cell in enumerate(chosen) if cell in place_of]
    if not here:
        return
    hidden, mask = express_padded(
        source,
        model,
        context,
        None if placed is None else placed[context],
    )
    hidden = jax.device_put(hidden)
    mask = jax.device_put(mask)
    for start in range(0, len(here), CHOSEN_CELLS):
        part = here[start : start + CHOSEN_CELLS]
        # A power of two: few shapes to compile.
        rows = np.zeros(min(CHOSEN_CELLS, 1 << (len(here) - 1).bit_length()), np.int32)
        rows[: len(part)] = [place_of[chosen[number]] for number in part]
        weights = model.attend(model.device_params, hidden, mask, jnp.asarray(rows))
        weights = np.asarray(weights)[:, :, : len(part), : len(context)]
        if found.ndim == 2:
            weights = weights.mean(axis=(0, 1))
        found[..., np.array(part)[:, None], context] = weights


def _chosen(cells: Any, names: pd.Index) -> np.ndarray:
    """Return int [chosen], the numbers of the selected cells."""
    wanted = np.atleast_1d(np.asarray(cells))
    if wanted.dtype == bool:
        if wanted.shape != names.shape:
            raise InputError(
                f"a mask of {len(wanted)} entries for {len(names)} cells",
                "one entry per cell",
                "Create the mask for this AnnData",
            )
        wanted = np.flatnonzero(wanted)
    if wanted.ndim != 1 or not len(wanted):
        raise InputError("no cells were selected", "at least one", "Pass their names or numbers")
    if np.issubdtype(wanted.dtype, np.integer):
        wrong = wanted[(wanted < 0) | (wanted >= len(names))]
        if len(wrong):
            raise InputError(
                f"there is no cell {wrong[0]}",
                f"numbers from 0 to {len(names) - 1}",
                "Pass numbers in this range",
            )
        return wanted.astype(int)
    texts = [str(name) for name in wanted]
    if not names.is_unique:
        raise InputError(
            "obs_names contains duplicates, so names do not identify cells",
            "unique names, or numbers",
            "Call adata.obs_names_make_unique(), or select cells by number",
        )
    places = names.get_indexer(texts)
    if (places < 0).any():
        lacking = [name for name, place in zip(texts, places, strict=True) if place < 0]
        raise InputError(
            f"{len(lacking)} of the selected cells are not in obs_names, such as {lacking[0]!r}",
            f"names such as {names[0]!r}",
            "Check the names, or select cells by number",
        )
    return places
