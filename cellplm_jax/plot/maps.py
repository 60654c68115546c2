"""Maps of cells and genes, in an embedding or in the tissue."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError, nearest, require
from cellplm_jax.plot.style import (
    MARKERS,
    PALETTE,
    UNKNOWN_COLOR,
    UNKNOWN_LABELS,
    categories_of,
    gene_labels,
    picture,
    pyplot_module,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def points_of(coordinates: Any) -> np.ndarray:
    """Return finite float coordinates [cells, 2].

    Raises:
        InputError: The values are not finite coordinates.
    """
    points = np.asarray(coordinates)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise InputError(
            f"The coordinates have shape {points.shape}",
            "[cells, 2] with at least one cell",
            "Pass two columns, for example adata.obsm['X_umap'][:, :2]",
        )
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise InputError(
            f"The coordinates contain NaN or infinity for {int((~np.isfinite(points)).any(axis=1).sum())} cells",
            "finite numbers",
            "Select the cells that have coordinates",
        )
    return points


def drawn_values(values: Any, cells: int) -> tuple[np.ndarray | None, pd.Categorical | None]:
    """Return (floats, None) for a continuous quantity or (None, categories) for other values.

    Raises:
        InputError: There is not one value per cell.
    """
    column = values if isinstance(values, pd.Series | pd.Categorical) else np.asarray(values)
    if np.ndim(column) != 1 or len(column) != cells:
        raise InputError(
            f"Values of shape {np.shape(column)} for {cells} cells",
            "one value per cell, in the order of the coordinates",
            "Apply the same selection of cells to both",
        )
    if pd.api.types.is_float_dtype(column.dtype):
        return np.asarray(column, dtype=np.float64), None
    return None, categories_of(column)


def _category_styles(
    names: Sequence[str], palette: Mapping[str, str] | Sequence[str] | None
) -> list[tuple[str, str]]:
    """Return colour and marker of every category; the marker changes when a colour repeats."""
    if isinstance(palette, Mapping):
        lacking = [name for name in names if name not in palette and name not in UNKNOWN_LABELS]
        if lacking:
            raise InputError(
                f"The palette has no colour for {lacking[:5]}",
                "a colour for every label",
                "Add them, or omit the palette",
            )
        chosen = {name: palette.get(name, UNKNOWN_COLOR) for name in names}
    else:
        colors = itertools.cycle(palette or PALETTE)
        # Unknown labels use up no colour, so the others keep theirs without them.
        chosen = {name: UNKNOWN_COLOR if name in UNKNOWN_LABELS else next(colors) for name in names}
    # Over the complete palette, so that labels of a subset have the markers of the whole.
    seen: Counter[str] = Counter()
    markers = dict.fromkeys(names, "o")
    for name, color in (palette if isinstance(palette, Mapping) else chosen).items():
        if name not in UNKNOWN_LABELS:
            markers[name] = MARKERS[seen[color] % len(MARKERS)]
            seen[color] += 1
    return [(chosen[name], markers[name]) for name in names]


def limits_of(values: np.ndarray, limits: tuple[float, float] | None) -> tuple[float, float]:
    """Return the colour limits: the given ones, or the 1st and 99th percentile, which are robust to outliers."""
    if limits is not None:
        return limits
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    # Observed values, not interpolated ones: a sparse gene keeps a limit of 0.
    low = np.percentile(finite, 1, method="higher")
    high = np.percentile(finite, 99, method="lower")
    # Nearly all values are equal: the full range shows the others.
    if low == high:
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _scatter(
    ax: Axes,
    points: np.ndarray,
    values: Any,
    *,
    palette: Mapping[str, str] | Sequence[str] | None,
    color_map: str,
    color_limits: tuple[float, float] | None,
    color_label: str | None,
    point_size: float | None,
    legend: bool | str,
    label_groups: bool,
    seed: int,
) -> None:
    """Draw the points and their legend or colour bar."""
    numbers, categories = drawn_values(values, len(points))
    if point_size is None:
        # The points of all cells together cover about a third of a typical panel.
        point_size = float(np.clip(12_000 / len(points), 0.4, 30.0))
    options: dict[str, Any] = {"s": point_size, "linewidths": 0, "rasterized": True}
    order = np.random.default_rng(seed).permutation(len(points))  # no group is always on top
    if numbers is not None:
        missing = ~np.isfinite(numbers)
        ax.scatter(*points[missing].T, c=UNKNOWN_COLOR, **options)
        # Missing values are drawn first, in the background.
        order = order[~missing[order]]
        low, high = limits_of(numbers, color_limits)
        drawn = ax.scatter(
            *points[order].T,
            c=numbers[order],
            cmap=color_map,
            vmin=low,
            vmax=high,
            **options,
        )
        if legend:
            finite = numbers[~missing]
            beyond = (bool((finite < low).any()), bool((finite > high).any()))
            extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
            bar = ax.figure.colorbar(
                drawn,
                ax=ax,
                shrink=0.7,
                aspect=22,
                extend=extend.get(beyond, "neither"),
            )
            bar.outline.set_visible(False)  # type: ignore[operator]
            if color_label:
                bar.set_label(color_label)
        return

    if categories is None:  # unreachable: one of the two is always set
        return
    names = [str(name) for name in categories.categories]
    codes = np.asarray(categories.codes)
    styles = _category_styles(names, palette)
    known = [place for place, name in enumerate(names) if name not in UNKNOWN_LABELS]
    unknown = [place for place, name in enumerate(names) if name in UNKNOWN_LABELS]
    # -1: a missing label.
    behind = np.isin(codes, [-1, *unknown])
    ax.scatter(*points[behind].T, c=UNKNOWN_COLOR, zorder=1, **options)
    front = order[~behind[order]]
    # One scatter per marker, because matplotlib draws one marker at a time.
    for marker in dict.fromkeys(styles[place][1] for place in known):
        chosen = front[[styles[code][1] == marker for code in codes[front]]]
        ax.scatter(
            *points[chosen].T,
            c=[styles[code][0] for code in codes[chosen]],
            marker=marker,
            zorder=2,
            **options,
        )
    if legend:
        line = require("matplotlib.lines", "eval", "Plotting").Line2D
        entries = [(names[place], *styles[place]) for place in (*known, *unknown)]
        if (codes < 0).any():
            entries.append(("missing", UNKNOWN_COLOR, "o"))
        handles = [
            line(
                [],
                [],
                linestyle="",
                marker=marker,
                markersize=6.5,
                color=color,
                markeredgewidth=0,
            )
            for _, color, marker in entries
        ]
        where: dict[str, Any] = {
            "loc": "center left",
            "bbox_to_anchor": (1.01, 0.5),
            "ncols": math.ceil(len(entries) / 18),
        }
        if legend == "below":
            longest = max(len(name) for name, _, _ in entries)
            where = {
                "loc": "upper left",
                "bbox_to_anchor": (0.0, -0.09),
                "ncols": max(1, min(len(entries), 56 // (longest + 5))),
            }
        ax.legend(
            handles,
            [name for name, _, _ in entries],
            title=color_label,
            borderaxespad=0.0,
            frameon=False,
            **where,
            handletextpad=0.3,
            columnspacing=1.0,
            alignment="left",
        )
    if label_groups:
        effects = require("matplotlib.patheffects", "eval", "Plotting")
        for place in known:
            own = points[codes == place]
            # The cell nearest to the median is inside the group even if the group is not convex.
            from_median = np.square(own - np.median(own, axis=0)).sum(axis=1)
            middle = own[np.argmin(from_median)]
            ax.text(
                *middle,
                names[place],
                ha="center",
                va="center",
                fontsize=8,
                weight="bold",
                color="#1A1A1A",
                path_effects=[effects.withStroke(linewidth=2.2, foreground="white")],
                zorder=3,
            )


def embedding_map(
    coordinates: Any,
    labels: Any,
    *,
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
) -> Axes:
    """Draw cells in two dimensions, coloured by a label or a number.

    Floating-point values are continuous and get a colour bar; all other values (strings, categories, booleans, integers
    such as clusters) are groups and get a legend to the right of the data. Cells are drawn in random order, so
    that no group hides another; those with a label of :data:`UNKNOWN_LABELS` are grey and in the background.

    Args:
        coordinates: float [cells, 2].
        labels: [cells]. Categories keep their order, other labels are sorted.
        title: Title of the plot.
        color_label: Title of the legend or of the colour bar.
        palette: Colours in the order of the groups, or a mapping from label to colour. None: :data:`PALETTE`, with
            another marker for every further twenty groups.
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
        The Axes.

    Raises:
        InputError: Shapes do not match, coordinates are not finite, or the palette lacks a label.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = points_of(coordinates)
    with picture(ax, (4.6, 4.2), title=title, show=show, beside=True) as axes:
        _scatter(
            axes,
            points,
            labels,
            palette=palette,
            color_map=color_map,
            color_limits=color_limits,
            color_label=color_label,
            point_size=point_size,
            legend=legend,
            label_groups=label_groups,
            seed=seed,
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{axis_name} 1", loc="left")
        axes.set_ylabel(f"{axis_name} 2", loc="bottom")
        axes.margins(0.04)
    return axes


def tissue_map(
    coordinates: Any,
    values: Any,
    *,
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
) -> Axes:
    """Draw cells or spots at their tissue coordinates, coloured by a label or a number.

    The aspect ratio is 1. The y axis points down, as in an image (row 0 at the top) and in the pixel
    coordinates of spatial platforms; with ``image_origin=False`` it points up.

    Args:
        coordinates: float [cells, 2], x and y.
        values: [cells]. Floating point: a quantity with a colour bar; otherwise groups with a legend.
        title: Title of the plot.
        color_label: Title of the legend or of the colour bar.
        palette: As in :func:`umap`.
        color_map: matplotlib colour map of a quantity.
        color_limits: Its limits. None: 1st to 99th percentile.
        point_size: Area of a point in square points. None: points of neighbouring cells nearly touch.
        legend: Draw the legend or colour bar. "below": the legend of groups is below the plot.
        unit: Unit of the coordinates, for example "µm"; shown with the axes. None: no ticks are drawn.
        micrometres_per_unit: Micrometres per unit of the coordinates, for a scale bar. None: no bar.
        image_origin: True: y points down.
        seed: Seed of the drawing order.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: Shapes do not match, coordinates are not finite, or the palette lacks a label.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = points_of(coordinates)
    extent = np.ptp(points, axis=0)
    extent = np.where(extent > 0, extent, max(extent.max(), 1.0))
    long = 5.0 / max(extent)
    width, height = np.maximum(extent * long, (1.8, 1.5)) + np.array((0.2, 0.4))
    with picture(
        ax,
        (float(width), float(height)),
        title=title,
        show=show,
        beside=True,
    ) as axes:
        if point_size is None:
            box = axes.get_window_extent()
            scale = 72 / axes.figure.dpi * min(box.width / extent[0], box.height / extent[1])
            # Area of the tissue in square points, from the occupied cells of a grid with about four cells per box.
            bins = math.ceil(math.sqrt(len(points) / 4))
            covered = np.mean(np.histogram2d(*points.T, bins=bins)[0] > 0)
            area = covered * extent[0] * extent[1] * scale**2
            point_size = float(np.clip(0.85 * area / len(points), 0.3, 400.0))
        _scatter(
            axes,
            points,
            values,
            palette=palette,
            color_map=color_map,
            color_limits=color_limits,
            color_label=color_label,
            point_size=point_size,
            legend=legend,
            label_groups=False,
            seed=seed,
        )
        if micrometres_per_unit:
            _scale_bar(axes, points, micrometres_per_unit, image_origin)
        axes.set_aspect("equal")
        if image_origin and not axes.yaxis_inverted():
            axes.invert_yaxis()
        if unit:
            axes.set_xlabel(f"x ({unit})")
            axes.set_ylabel(f"y ({unit})")
            axes.spines[["top", "right"]].set_visible(False)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        if ax is None:
            axes.set_anchor("W")  # the legend follows the tissue, not the box around it
    return axes


def _scale_bar(axes: Axes, points: np.ndarray, scale: float, image_origin: bool) -> None:
    """Draw a bar of a round number of micrometres, about a fifth of the width, below the tissue."""
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    wanted = max(right - left, 1e-9) * scale / 5
    power = 10.0 ** math.floor(math.log10(wanted))
    # A round number of the series 1, 2, 5.
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    y = bottom + 0.05 * (bottom - top) if image_origin else top - 0.05 * (bottom - top)
    end = left + length / scale
    style: dict[str, Any] = {"color": "#1A1A1A", "linewidth": 2.0, "solid_capstyle": "butt"}
    axes.plot([left, end], [y, y], gid="scale bar", **style)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    axes.annotate(
        text,
        (end, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


def cell_attention(
    coordinates: Any,
    weights: Any,
    *,
    cell: int | None = None,
    title: str | None = None,
    color_label: str = "attention weight",
    color_map: str = "viridis",
    color_limits: tuple[float, float] | None = None,
    point_size: float | None = None,
    legend: bool | str = True,
    unit: str | None = None,
    image_origin: bool = True,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw the attention weights of one cell in the tissue, with the cell itself as a star.

    Args:
        coordinates: float [cells, 2], x and y.
        weights: [cells]: a row of :func:`cellplm_jax.cell_attention`, or the mean of several.
        cell: Index of the attending cell; None: not marked.
        title: Title of the plot.
        color_label: Title of the colour bar.
        color_map: matplotlib colour map.
        color_limits: Its limits. None: 1st to 99th percentile.
        point_size: See :func:`spatial`.
        legend: Draw the colour bar.
        unit: See :func:`spatial`.
        image_origin: See :func:`spatial`.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: Shapes do not match, or the cell does not exist.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = points_of(coordinates)
    if cell is not None and not 0 <= cell < len(points):
        raise InputError(
            f"there is no cell {cell}", f"a number from 0 to {len(points) - 1}", "Pass one of these"
        )
    axes = tissue_map(
        points,
        np.asarray(weights, np.float64),
        title=title,
        color_label=color_label,
        color_map=color_map,
        color_limits=color_limits,
        point_size=point_size,
        legend=legend,
        unit=unit,
        image_origin=image_origin,
        ax=ax,
    )
    if cell is not None:
        x, y = points[cell]
        axes.plot(
            [x],
            [y],
            marker="*",
            markersize=13,
            linestyle="",
            label="the cell that looks",
            markerfacecolor="#D55E00",
            markeredgecolor="white",
            zorder=5,
        )
    if show:
        pyplot_module().show()
    return axes


def gene_map(
    coordinates: Any,
    genes: Sequence[str],
    *,
    highlight: Sequence[str] | Mapping[str, Sequence[str]] = (),
    title: str | None = None,
    axis_name: str = "UMAP",
    point_size: float | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw genes in two dimensions: all in grey, selected ones in colour with their names.

    Args:
        coordinates: float [genes, 2], such as ``umap_coordinates(cellplm_jax.gene_embeddings(model))``.
        genes: Their names; Ensembl ids are shown as symbols.
        highlight: Names or symbols to show, or ``{"T cells": ["CD3D", "CD3E"], ...}``: one colour per group, with a
            legend.
        title: Title of the plot.
        axis_name: Name of the two axes.
        point_size: Area of a grey point in square points; None: chosen by the number of genes.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: Shapes do not match, coordinates are not finite, or a highlighted gene does not exist.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    effects = require("matplotlib.patheffects", "eval", "Plotting")
    points = points_of(coordinates)
    names = [str(gene) for gene in genes]
    labels = gene_labels(genes)
    drawn_values(np.array(names, object), len(points))
    # By name or by symbol, in whatever form the genes are given.
    place = {name: row for row, name in enumerate(labels)}
    place |= {name: row for row, name in enumerate(names)}
    groups = highlight if isinstance(highlight, Mapping) else {"": list(highlight)}
    for name in (name for group in groups.values() for name in group):
        if name not in place:
            raise InputError(
                f"there is no gene '{name}'",
                f"one of the {len(names)} genes given",
                nearest(name, list(place), "Check the name"),
            )
    with picture(ax, (5.2, 4.6), title=title, show=show, beside=True) as axes:
        size = point_size or float(np.clip(8_000 / len(points), 0.6, 14.0))
        axes.scatter(
            *points.T,
            s=size,
            c="#CFCFCF",
            linewidths=0,
            rasterized=True,
            zorder=1,
        )
        for number, (group, members) in enumerate(groups.items()):
            color = PALETTE[number % len(PALETTE)]
            marker = MARKERS[number % len(MARKERS)]
            rows = [place[name] for name in members]
            axes.scatter(
                *points[rows].T,
                s=26,
                c=color,
                marker=marker,
                edgecolors="white",
                linewidths=0.5,
                label=group,
                zorder=2,
            )
            for row in rows:
                axes.annotate(
                    labels[row],
                    tuple(points[row]),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=7.5,
                    color="#1A1A1A",
                    zorder=3,
                    path_effects=[effects.withStroke(linewidth=2.0, foreground="white")],
                )
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{axis_name} 1", loc="left")
        axes.set_ylabel(f"{axis_name} 2", loc="bottom")
        axes.margins(0.06)
        if any(groups):
            axes.legend(
                frameon=False,
                loc="center left",
                bbox_to_anchor=(1.01, 0.5),
                borderaxespad=0.0,
            )
    return axes
