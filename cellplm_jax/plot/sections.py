"""Maps of several tissue sections, and heat maps of what they contain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError, require
from cellplm_jax.plot.cells import spatial
from cellplm_jax.plot.style import PALETTE, gene_labels, picture, pyplot_module, styled, widen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
"""Maximum number of sections in a row."""

WRITTEN = 150
"""Maximum number of entries of a heat map whose values are written."""


def spatial_sections(
    coordinates: Any,
    values: Any,
    sections: Any = None,
    *,
    title: str | None = None,
    color_label: str | None = None,
    unit: str | None = None,
    image_origin: bool = True,
    show: bool = False,
) -> np.ndarray:
    """Draw groups of cells in the tissue, one panel per section, with the same colours and one legend.

    Args:
        coordinates: float [cells, 2], x and y.
        values: [cells], groups such as niches; categories keep their order.
        sections: [cells], tissue section of each cell, in the order of the panels; None: one section.
        title: Title of the figure.
        color_label: Title of the legend.
        unit: See :func:`spatial`.
        image_origin: See :func:`spatial`.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        Object array of the Axes, one per section.

    Raises:
        InputError: Shapes do not match, or coordinates are not finite.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = np.asarray(coordinates, np.float64)
    groups = pd.Categorical(values)
    if sections is None:
        axes = spatial(
            points,
            groups,
            title=title,
            color_label=color_label,
            unit=unit,
            image_origin=image_origin,
            show=show,
        )
        return np.array([axes], object)
    names = np.asarray(sections, object).astype(str)
    if not len(points) == len(groups) == len(names):
        raise InputError(
            f"{len(points)} coordinates, {len(groups)} values and {len(names)} sections",
            "one of each per cell",
            "Apply the same selection of cells to all",
        )
    shown = list(dict.fromkeys(names))
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    pyplot = pyplot_module()
    with styled():
        figure, grid = pyplot.subplots(
            rows,
            columns,
            figsize=(3.0 * columns, 3.0 * rows),
            layout="constrained",
            squeeze=False,
        )
        panels = grid.ravel()
        for ax, name in zip(panels, shown, strict=False):
            own = names == name
            # All categories are kept, so that a niche has one colour in all panels.
            spatial(
                points[own],
                groups[own].rename_categories(str),
                title=name,
                unit=unit,
                legend=False,
                palette=_colors(groups),
                image_origin=image_origin,
                ax=ax,
            )
        for ax in panels[len(shown) :]:
            ax.set_axis_off()
        _legend(panels[min(columns, len(shown)) - 1], groups, color_label)
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
        widen(panels[min(columns, len(shown)) - 1])
    if show:
        pyplot.show()
    return panels[: len(shown)]


def _colors(groups: pd.Categorical) -> dict[str, str]:
    return {
        str(name): PALETTE[place % len(PALETTE)] for place, name in enumerate(groups.categories)
    }


def _legend(ax: Axes, groups: pd.Categorical, label: str | None) -> None:
    line = require("matplotlib.lines", "eval", "Plotting").Line2D
    colors = _colors(groups)
    handles = [
        line(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=6.5,
            color=color,
            markeredgewidth=0,
        )
        for color in colors.values()
    ]
    ax.legend(
        handles,
        list(colors),
        title=label,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        ncols=math.ceil(len(colors) / 18),
        handletextpad=0.3,
        alignment="left",
    )


def heat_map(
    table: pd.DataFrame,
    *,
    title: str | None = None,
    value_label: str = "",
    color_map: str = "Blues",
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw a table of numbers of at least 0, such as the composition of niches; small tables with their values.

    Args:
        table: Numbers; rows and columns keep their order.
        title: Title of the plot.
        value_label: Label of the colour bar.
        color_map: matplotlib colour map.
        ax: Axes to draw on. None: a new figure, large enough for the names.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The table is empty or contains non-numeric values.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    try:
        values = table.to_numpy(np.float64)
    except (TypeError, ValueError):
        values = np.zeros((0, 0))
    if not values.size:
        raise InputError(f"a table of shape {table.shape}", "numbers, at least one")
    rows, columns = values.shape
    size = (
        float(np.clip(0.42 * columns + 2.4, 3.4, 12.0)),
        float(np.clip(0.3 * rows + 1.5, 1.9, 10.0)),
    )
    with picture(ax, size, title=title, show=show) as axes:
        top = float(np.nanmax(values)) or 1.0
        drawn = axes.imshow(values, cmap=color_map, vmin=0, vmax=top, aspect="auto")
        axes.set_xticks(
            np.arange(columns),
            gene_labels(table.columns),
            rotation=60,
            ha="right",
            rotation_mode="anchor",
            fontsize=7.5,
        )
        axes.set_yticks(np.arange(rows), gene_labels(table.index))
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        if values.size <= WRITTEN:
            # Values that would be written as 0 are left out.
            for row, column in zip(*np.nonzero(values >= 0.5), strict=True):
                value = values[row, column]
                color = "white" if value > 0.6 * top else "#1A1A1A"
                axes.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=color,
                )
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=18)
        bar.outline.set_visible(False)  # type: ignore[operator]
        if value_label:
            bar.set_label(value_label)
    return axes
