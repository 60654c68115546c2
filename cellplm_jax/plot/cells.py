"""Maps of AnnData cells in scanpy's form: ``umap(adata, color=[...])`` and ``spatial(adata, color=...)``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.features import own_symbols
from cellplm_jax.errors import InputError, nearest
from cellplm_jax.plot.maps import embedding_map, tissue_map
from cellplm_jax.plot.style import pyplot_module, store_colors, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VISIUM_SPOT = 65.0
"""Micrometres of ``spot_diameter_fullres``, in the scale factors of Visium files."""


def umap(
    coordinates: Any,
    labels: Any = None,
    *,
    color: str | Sequence[str] | None = None,
    basis: str = "X_umap",
    use_rep: str = "X_cellplm",
    layer: str | None = None,
    columns: int = 3,
    title: str | None = None,
    color_label: str | None = None,
    palette: Mapping[str, str] | Sequence[str] | None = None,
    color_map: str = "viridis",
    color_limits: tuple[float, float] | None = None,
    point_size: float | None = None,
    legend: bool | str = True,
    label_groups: bool = False,
    axis_name: str = "UMAP",
    seed: int = 0,
    ax: Axes | None = None,
    show: bool = False,
) -> Any:
    """Draw cells in two dimensions, coloured by labels, numbers or genes.

    ``umap(adata, color=["cell_type", "CD3D"])`` draws one panel per column of ``obs`` or gene; ``umap(coordinates,
    labels)`` draws arrays. Floating-point values are continuous and get a colour bar; all other values (strings,
    categories, booleans, integers such as clusters) are groups and get a legend to the right of the data. Cells are
    drawn in random order, so that no group hides another; those with a label of :data:`UNKNOWN_LABELS` are grey and in
    the background. Colours of a column are read from ``uns["<column>_colors"]``, or stored there, as scanpy does.

    Args:
        coordinates: An AnnData, or float [cells, 2].
        labels: [cells], for arrays. Labels are sorted naturally (0, 1, 2, 10); categories with an order of their own
            keep it.
        color: For an AnnData: columns of ``obs``, or genes by their name in ``var_names`` or their symbol. A str: one
            plot. A list: a panel for each.
        basis: For an AnnData: key of ``obsm`` with the coordinates. A missing "X_umap" is computed from ``use_rep`` and
            stored.
        use_rep: Key of ``obsm`` with the embedding that a missing layout is computed from.
        layer: Layer with the values of genes; None: ``X``. Counts are shown as log1p of counts per 10,000.
        columns: Number of panels per row.
        title: Title of the plot. None: the coloured column.
        color_label: Title of the legend or of the colour bar.
        palette: Colours in the order of the groups, or a mapping from label to colour. None: stored colours, or
            :data:`PALETTE` with another marker for every further twenty groups.
        color_map: matplotlib colour map of a quantity.
        color_limits: Its limits. None: 1st to 99th percentile; arrows of the colour bar mark values beyond.
        point_size: Area of a point in square points. None: chosen by the number of cells.
        legend: Draw the legend or colour bar. "below": the legend of groups is below the plot.
        label_groups: Also write the names of the groups onto the data.
        axis_name: Name of the two axes, for example "PCA".
        seed: Seed of the drawing order.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes; an object array of Axes if ``color`` is a list.

    Raises:
        InputError: A column, gene or key does not exist, shapes do not match, coordinates are not finite, or the
            palette lacks a label.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    options: dict[str, Any] = {
        "color_label": color_label,
        "color_map": color_map,
        "color_limits": color_limits,
        "point_size": point_size,
        "legend": legend,
        "label_groups": label_groups,
        "axis_name": axis_name,
        "seed": seed,
    }
    if not hasattr(coordinates, "obsm"):
        _check_arrays(labels, color)
        return embedding_map(
            coordinates,
            labels,
            title=title,
            palette=palette,
            ax=ax,
            show=show,
            **options,
        )
    adata = coordinates
    points = _layout(adata, basis, use_rep)

    def draw(name: str | None, axes: Axes | None) -> Axes:
        values, colors, shown = _values(adata, name, layer, palette)
        if name is None:
            options["legend"] = False
        return embedding_map(
            points,
            values,
            palette=colors,
            ax=axes,
            title=shown if title is None or axes is not ax else title,
            **options,
        )

    return _panels(color, draw, columns, (4.2, 3.8), ax, title, show)


def spatial(
    coordinates: Any,
    values: Any = None,
    *,
    color: str | Sequence[str] | None = None,
    basis: str = "spatial",
    layer: str | None = None,
    columns: int = 3,
    title: str | None = None,
    color_label: str | None = None,
    palette: Mapping[str, str] | Sequence[str] | None = None,
    color_map: str = "viridis",
    color_limits: tuple[float, float] | None = None,
    point_size: float | None = None,
    legend: bool | str = True,
    unit: str | None = None,
    micrometres_per_unit: float | None = None,
    image_origin: bool = True,
    seed: int = 0,
    ax: Axes | None = None,
    show: bool = False,
) -> Any:
    """Draw cells or spots at their tissue coordinates, coloured by labels, numbers or genes.

    ``spatial(adata, color=["region", "CD3D"])`` draws one panel per column of ``obs`` or gene; ``spatial(coordinates,
    values)`` draws arrays. The aspect ratio is 1. The y axis points down, as in an image (row 0 at the top) and in the
    pixel coordinates of spatial platforms; with ``image_origin=False`` it points up. Draw one tissue sample at a time:
    the coordinates of several may overlap.

    Args:
        coordinates: An AnnData, or float [cells, 2], x and y.
        values: [cells], for arrays. Floating point: a quantity with a colour bar; otherwise groups with a legend.
        color: For an AnnData: columns of ``obs`` or genes, as in :func:`umap`.
        basis: For an AnnData: key of ``obsm`` with the coordinates.
        layer: As in :func:`umap`.
        columns: Number of panels per row.
        title: Title of the plot. None: the coloured column.
        color_label: Title of the legend or of the colour bar.
        palette: As in :func:`umap`.
        color_map: matplotlib colour map of a quantity.
        color_limits: Its limits. None: 1st to 99th percentile.
        point_size: Area of a point in square points. None: points of neighbouring cells nearly touch.
        legend: Draw the legend or colour bar. "below": the legend of groups is below the plot.
        unit: Unit of the coordinates, for example "µm"; shown with the axes. None: no ticks are drawn.
        micrometres_per_unit: Micrometres per unit of the coordinates, for a scale bar. None: from the scale factors
            of a Visium file; without them there is no bar.
        image_origin: True: y points down.
        seed: Seed of the drawing order.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes; an object array of Axes if ``color`` is a list.

    Raises:
        InputError: A column, gene or key does not exist, shapes do not match, coordinates are not finite, or the
            palette lacks a label.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    options: dict[str, Any] = {
        "color_label": color_label,
        "color_map": color_map,
        "color_limits": color_limits,
        "point_size": point_size,
        "legend": legend,
        "unit": unit,
        "image_origin": image_origin,
        "seed": seed,
    }
    if not hasattr(coordinates, "obsm"):
        _check_arrays(values, color)
        return tissue_map(
            coordinates,
            values,
            title=title,
            palette=palette,
            ax=ax,
            show=show,
            micrometres_per_unit=micrometres_per_unit,
            **options,
        )
    adata = coordinates
    points = _coordinates(adata, basis, "Store the tissue coordinates there, or pass basis=...")
    scale = micrometres_per_unit or scale_of(adata)

    def draw(name: str | None, axes: Axes | None) -> Axes:
        column, colors, shown = _values(adata, name, layer, palette)
        if name is None:
            options["legend"] = False
        return tissue_map(
            points,
            column,
            palette=colors,
            ax=axes,
            micrometres_per_unit=scale,
            title=shown if title is None or axes is not ax else title,
            **options,
        )

    extent = np.maximum(np.ptp(points, axis=0), 1e-9)
    height = float(np.clip(3.2 * extent[1] / extent[0], 1.6, 5.0)) + 0.4
    return _panels(color, draw, columns, (4.2, height), ax, title, show)


def scale_of(adata: Any) -> float | None:
    """Return micrometres per unit of the coordinates, from the scale factors of a Visium file.

    Args:
        adata: The spots, as read by scanpy or squidpy.

    Returns:
        The scale; None: unknown, or the file has several sections of different scales.
    """
    found = set()
    for library in (adata.uns.get("spatial") or {}).values():
        diameter = (library.get("scalefactors") or {}).get("spot_diameter_fullres")
        if diameter:
            found.add(VISIUM_SPOT / float(diameter))
    return found.pop() if len(found) == 1 else None


def _check_arrays(values: Any, color: Any) -> None:
    """Check the arguments of the form for arrays."""
    if values is None or color is not None:
        raise InputError(
            "coordinates without values" if values is None else "color=... with an array",
            "an AnnData with color=..., or coordinates and one value per cell",
            "Pass the AnnData itself, for example umap(adata, color='cell_type')",
        )


def _coordinates(adata: Any, basis: str, remedy: str) -> np.ndarray:
    """Return the first two columns of an entry of ``obsm``."""
    if basis not in adata.obsm:
        keys = ", ".join(map(repr, adata.obsm)) or "no entry"
        raise InputError(
            f"obsm has no '{basis}'",
            f"one of its keys ({keys})",
            nearest(basis, adata.obsm, remedy),
        )
    return np.asarray(adata.obsm[basis], np.float64)[:, :2]


def _layout(adata: Any, basis: str, use_rep: str) -> np.ndarray:
    """Return the coordinates of a map; a missing UMAP is computed and stored."""
    if basis == "X_umap" and basis not in adata.obsm and use_rep in adata.obsm:
        from cellplm_jax.evaluate.embedding import umap_coordinates

        adata.obsm[basis] = umap_coordinates(np.asarray(adata.obsm[use_rep]))
    return _coordinates(adata, basis, "Embed the cells first: cellplm_jax.embed(adata, 'small')")


def _values(
    adata: Any,
    name: str | None,
    layer: str | None,
    palette: Any,
) -> tuple[Any, Any, str | None]:
    """Return values of a column or gene, their colours, and the title."""
    if name is None:
        return np.full(adata.n_obs, "cells", object), palette, None
    if name in adata.obs:
        column = adata.obs[name]
        if pd.api.types.is_float_dtype(column.dtype):
            return column, None, name
        colors = palette or store_colors(adata, name)
        return adata.obs[name], colors, name
    symbols = own_symbols(adata.var)
    # The name as written comes before a symbol of another gene.
    places = [*np.flatnonzero(adata.var_names == name)]
    places += [place for place, symbol in enumerate(symbols) if symbol == name]
    if not places:
        known = [*map(str, adata.obs), *map(str, adata.var_names), *symbols]
        raise InputError(
            f"'{name}' is neither a column of obs nor a gene",
            f"one of {', '.join(map(repr, list(adata.obs)[:8])) or 'the genes'}, or a gene",
            nearest(name, known, "Check the name"),
        )
    place = int(places[0])
    matrix: Any = adata.X if layer is None else adata.layers[layer]
    one = matrix[:, [place]]
    # One column at a time: the matrix may be backed by a file.
    values = np.asarray(one.toarray() if sparse.issparse(one) else one, np.float64).ravel()
    if np.array_equal(values, np.rint(values)):  # counts: normalise, as scanpy's recipes do
        total = np.maximum(np.asarray(matrix.sum(axis=1), np.float64).ravel(), 1.0)
        values = np.log1p(1e4 * values / total)
    return values, None, symbols[place]


def _panels(
    color: str | Sequence[str] | None,
    draw: Any,
    columns: int,
    size: tuple[float, float],
    ax: Axes | None,
    title: str | None,
    show: bool,
) -> Any:
    """Draw one plot, or a grid with a panel per name."""
    if color is None or isinstance(color, str):
        axes = draw(color, ax)
        if show:
            pyplot_module().show()
        return axes
    names = list(color)
    if not names or ax is not None:
        raise InputError(
            "color is an empty list" if not names else "a list of colours and one ax",
            "at least one name"
            if not names
            else "color as one name with ax=..., or a list without it",
            "Pass for example color=['cell_type']",
        )
    pyplot = pyplot_module()
    columns = max(1, min(columns, len(names)))
    rows = math.ceil(len(names) / columns)
    with styled():
        # Room for a legend beside each panel.
        figure, grid = pyplot.subplots(
            rows,
            columns,
            figsize=((size[0] + 1.6) * columns, size[1] * rows),
            layout="constrained",
            squeeze=False,
        )
        panels = grid.ravel()
        # The grid can have more places than names.
        for panel in panels[len(names) :]:
            panel.remove()
        for name, panel in zip(names, panels, strict=False):
            draw(name, panel)
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
    if show:
        pyplot.show()
    return panels[: len(names)]
