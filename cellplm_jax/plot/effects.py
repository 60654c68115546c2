"""Charts of effects: predicted against measured changes of genes, and contributions of cells by type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError
from cellplm_jax.plot.style import MARKERS, PALETTE, gene_labels, pyplot_module, styled

COLUMNS = 3
"""Number of panels per row."""


def effect_panels(
    panels: Mapping[str, pd.DataFrame],
    *,
    value_label: str = "change of mean log1p",
    title: str | None = None,
    show: bool = False,
) -> np.ndarray:
    """Draw one panel per perturbation: its genes in rows, and a dot per column of the table.

    Args:
        panels: Title of each panel to float [genes, quantities], such as the columns ``measured`` and ``predicted``.
            Ensembl ids are shown as symbols.
            All tables have the same columns; a line connects the first two.
        value_label: Label of the value axes.
        title: Title of the figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        Object array of the Axes that are used.

    Raises:
        InputError: There is no panel, or the columns differ.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    columns = {tuple(map(str, table.columns)) for table in panels.values()}
    if len(columns) != 1:
        raise InputError(
            f"{len(panels)} panels with {len(columns)} kinds of columns",
            "at least one panel, and the same columns in all",
        )
    names = next(iter(columns))
    pyplot = pyplot_module()
    genes = max(len(table) for table in panels.values())
    rows = -(-len(panels) // COLUMNS)
    wide = min(COLUMNS, len(panels))
    with styled():
        figure, grid = pyplot.subplots(
            rows,
            wide,
            figsize=(3.1 * wide + 0.4, (0.19 * genes + 1.0) * rows + 0.5),
            layout="constrained",
            squeeze=False,
        )
        flat = grid.ravel()
        for axes, (name, table) in zip(flat, panels.items(), strict=False):
            place = np.arange(len(table))[::-1]
            values = table.to_numpy(np.float64)
            axes.axvline(0.0, color="#4D4D4D", linewidth=0.8)
            if values.shape[1] > 1:
                axes.hlines(
                    place,
                    values[:, :2].min(axis=1),
                    values[:, :2].max(axis=1),
                    color="#BDBDBD",
                    linewidth=1.0,
                    zorder=1,
                )
            for number, column in enumerate(names):
                axes.scatter(
                    values[:, number],
                    place,
                    s=22,
                    color=PALETTE[number],
                    label=column,
                    marker=MARKERS[number],
                    zorder=3 - 0.1 * number,
                    linewidths=0,
                )
            axes.set_yticks(place, gene_labels(table.index), fontsize=7.5)
            axes.set_title(name, loc="left", fontsize=9)
            axes.set_xlabel(value_label)
            axes.grid(axis="x", color="#E8E8E8", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in flat[len(panels) :]:
            axes.remove()
        handles, labels = flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    if show:
        pyplot.show()
    return flat[: len(panels)]


def values_by_group(
    values: Any,
    groups: Any,
    labels: Any,
    *,
    value_label: str,
    title: str | None = None,
    show: bool = False,
) -> Any:
    """Draw the distribution of a quantity per group, with one box per label: quartiles, and 5 to 95 % of the cells.

    Args:
        values: float [n].
        groups: [n], rows of the chart, in order of the mean absolute value.
        labels: [n], boxes of each row.
        value_label: Label of the value axis.
        title: Title of the plot.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The lengths differ, or there are no values.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    frame = [np.asarray(column, object) for column in (values, groups, labels)]
    if len({len(column) for column in frame}) != 1 or not len(frame[0]):
        raise InputError(
            f"{' and '.join(str(len(column)) for column in frame)} values, groups and labels",
            "one of each per cell",
        )
    table = pd.DataFrame(
        {
            "value": frame[0].astype(float),
            "group": frame[1].astype(str),
            "label": frame[2].astype(str),
        }
    )
    # The largest effects on top.
    order = table["value"].abs().groupby(table["group"]).mean().sort_values().index
    kinds = sorted(table["label"].unique())
    pyplot = pyplot_module()
    with styled():
        height = 0.2 * len(order) * (len(kinds) + 0.6) + 1.1
        axes = pyplot.subplots(
            figsize=(5.4, float(np.clip(height, 2.0, 12.0))), layout="constrained"
        )[1]
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            boxes = [
                table["value"][(table["group"] == g) & (table["label"] == kind)] for g in order
            ]
            # A box without values would shift the others.
            shown = [place for place, box in enumerate(boxes) if len(box)]
            drawn = axes.boxplot(
                [boxes[place].to_numpy() for place in shown],
                positions=[place + 0.4 - width * (number + 0.5) for place in shown],
                widths=width * 0.85,
                whis=(5, 95),
                showfliers=False,
                orientation="horizontal",
                patch_artist=True,
                medianprops={"color": "black"},
                manage_ticks=False,
            )
            for box in drawn["boxes"]:
                box.set(facecolor=PALETTE[number % len(PALETTE)], alpha=0.8, linewidth=0.7)
            axes.plot(
                [],
                [],
                color=PALETTE[number % len(PALETTE)],
                linewidth=6,
                label=kind,
            )
        axes.axvline(0.0, color="#4D4D4D", linewidth=0.8, zorder=0)
        axes.set_yticks(np.arange(len(order)), list(order))
        axes.set_xlabel(value_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
        if title:
            axes.set_title(title, loc="left")
    if show:
        pyplot.show()
    return axes
