"""Charts of scores and tables: comparisons, confusions, calibration, changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError, explain, require
from cellplm_jax.plot.style import (
    HATCHES,
    PALETTE,
    gene_labels,
    picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _frame(table: Any, name: str) -> pd.DataFrame:
    """Return a table of floats, with one row per method and one column per metric."""
    if isinstance(table, Mapping):
        table = pd.DataFrame.from_dict(
            {row: dict(values) for row, values in table.items()}, orient="index"
        )
    try:
        frame = pd.DataFrame(table).astype(float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} contains non-numeric values ({error})",
            "numbers, one row per method and one column per metric",
            "Remove text columns",
        ) from error
    if frame.empty:
        raise InputError(
            f"{name} is empty", "at least one method and one metric", "Add rows and columns"
        )
    return frame


def comparison_bars(
    table: pd.DataFrame | Mapping[str, Mapping[str, float]],
    *,
    errors: pd.DataFrame | Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
    value_label: str = "score",
    digits: int = 2,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Compare methods on several scores: one group of bars per score, one bar per method, annotated with its value.

    Args:
        table: One row per method and one column per score, or ``{method: {score: value}}``. A missing value is drawn as
            "n/a", to distinguish it from 0.
        errors: Half lengths of error bars in the same form; only existing entries are drawn.
        title: Title of the plot.
        value_label: Label of the value axis.
        digits: Decimals of the annotations.
        ax: Axes to draw on. None: a new figure, wide enough for the bars.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The table is empty or contains non-numeric values.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    frame = _frame(table, "The table")
    spread = None
    if errors is not None:
        spread = _frame(errors, "The table of errors").reindex_like(frame)
    methods, scores = frame.shape
    width = 0.84 / methods
    room = scores * (methods * 0.36 + 0.25) + 0.7
    with picture(
        ax,
        (float(np.clip(room, 3.2, 12.0)), 3.4),
        title=title,
        show=show,
        beside=True,
    ) as axes:
        for place, (method, row) in enumerate(frame.iterrows()):
            left = np.arange(scores) + (place - (methods - 1) / 2) * width
            height = row.to_numpy()
            axes.bar(
                left,
                # A missing score has no bar; "n/a" is written in its place below.
                np.nan_to_num(height),
                width * 0.92,
                color=PALETTE[place % len(PALETTE)],
                hatch=HATCHES[place % len(HATCHES)],
                edgecolor="white",
                linewidth=0.0,
                label=str(method),
                zorder=2,
            )
            half = np.zeros(scores) if spread is None else np.nan_to_num(spread.iloc[place])
            if (half > 0).any():
                axes.errorbar(
                    left,
                    height,
                    yerr=np.where(half > 0, half, np.nan),
                    fmt="none",
                    ecolor="#1A1A1A",
                    elinewidth=1.0,
                    capsize=2.5,
                    zorder=3,
                )
            for x, y, reach in zip(left, height, half, strict=True):
                missing = not math.isfinite(y)
                below = not missing and y < 0
                axes.annotate(
                    "n/a" if missing else f"{y:.{digits}f}".replace("-", "\N{MINUS SIGN}"),
                    (x, 0.0 if missing else y - reach if below else y + reach),
                    xytext=(0, -2 if below else 2),
                    textcoords="offset points",
                    ha="center",
                    va="top" if below else "bottom",
                    fontsize=7.5,
                )
        axes.axhline(0.0, color="#4D4D4D", linewidth=0.8, zorder=2.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(np.arange(scores), [str(name) for name in frame.columns])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(value_label)
        axes.grid(axis="y", color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(y=0.1)
        if methods > 1:
            axes.legend(
                frameon=False,
                loc="center left",
                bbox_to_anchor=(1.01, 0.5),
                borderaxespad=0.0,
            )
    return axes


def table_bars(
    values: Mapping[str, float],
    *,
    value_label: str,
    title: str | None = None,
    color: str = PALETTE[0],
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw one horizontal bar per row, the first row on top, annotated with its value.

    Args:
        values: ``{name: number}``.
        value_label: Label of the value axis.
        title: Title of the plot.
        color: Colour of the bars.
        ax: Axes to draw on. None: a new figure, high enough for the rows.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: There is no row.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    if not values:
        raise InputError(explain("no rows to draw", "at least one name and number", "Give some"))
    names = gene_labels(values)
    heights = np.array([*values.values()], np.float64)
    whole = bool(np.all(heights == np.round(heights)))
    with picture(
        ax,
        (5.6, 0.26 * len(names) + 0.8),
        title=title,
        show=show,
    ) as axes:
        places = np.arange(len(names))
        axes.barh(places, heights, color=color, height=0.72)
        for place, height in zip(places, heights, strict=True):
            text = f"{height:,.0f}" if whole else f"{height:.3g}"
            axes.annotate(
                text.replace("-", "\N{MINUS SIGN}"),
                (height, place),
                xytext=(3 if height >= 0 else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if height >= 0 else "right",
                fontsize=7.5,
            )
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(value_label)
        # Ticks of five digits and more would overlap.
        if np.abs(heights).max() >= 1e4:
            ticker = require("matplotlib.ticker", "eval", "Plotting")
            axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.margins(x=0.14, y=0.02)
        axes.spines[["top", "right"]].set_visible(False)
    return axes


def dot_plot(
    means: pd.DataFrame,
    shares: pd.DataFrame,
    *,
    title: str | None = None,
    value_label: str = "mean of log1p counts per 10,000",
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw genes by groups as dots: the colour is the mean expression, the area the share of cells with a count.

    Args:
        means: float [groups, genes], for example from :func:`cellplm_jax.evaluate.markers.group_means`. Colours are
            scaled from the smallest to the largest mean of each gene. Ensembl ids are shown as symbols.
        shares: float [groups, genes], 0 to 1, with the same rows and columns.
        title: Title of the plot.
        value_label: Label of the colour bar.
        ax: Axes to draw on. None: a new figure, large enough for the names.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: A table is empty, contains non-numeric values, or the two differ in shape.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    mean = _frame(means, "The table of means")
    share = _frame(shares, "The table of shares")
    if mean.shape != share.shape:
        raise InputError(
            f"{mean.shape} means and {share.shape} shares", "the same shape", "Pass the same genes"
        )
    groups, genes = mean.shape
    low = mean.min(axis=0)
    # A gene without differences between groups has the lowest colour everywhere.
    scaled = (mean - low) / np.maximum(mean.max(axis=0) - low, 1e-9)
    width = float(np.clip(0.24 * genes + 1.2, 2.4, 14.0))
    with picture(
        ax,
        (width, 0.24 * groups + 1.1),
        title=title,
        show=show,
        beside=True,
    ) as axes:
        rows, columns = np.divmod(np.arange(groups * genes), genes)
        drawn = axes.scatter(
            columns,
            rows,
            s=2 + 95 * share.to_numpy().ravel(),
            c=scaled.to_numpy().ravel(),
            cmap="viridis",
            vmin=0,
            vmax=1,
            linewidths=0,
        )
        axes.set_xticks(range(genes), gene_labels(mean.columns), rotation=90)
        axes.set_yticks(range(groups), [str(name) for name in mean.index])
        axes.set_xlim(-0.7, genes - 0.3)
        axes.set_ylim(groups - 0.3, -0.7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=14)
        # Each gene is scaled by itself, so the bar has no numbers.
        bar.set_ticks([0, 1], labels=["lowest\ngroup", "highest\ngroup"])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(value_label)
    return axes


def confusion_matrix(
    counts: pd.DataFrame,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw a confusion matrix: one row per true label, one column per predicted label.

    Colours are fractions of the row, so that rare labels are readable; annotated in percent if there is space.

    Args:
        counts: From :func:`cellplm_jax.evaluate.annotation.confusion_table`: cells of each pair of labels.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure, large enough for the labels.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The table is empty or contains non-numeric values.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    frame = _frame(counts, "The table of confusions")
    cells = frame.to_numpy()
    # A row without cells stays 0.
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1.0)
    rows, columns = frame.shape
    side = float(np.clip(0.34 * max(rows, columns), 1.8, 9.0))
    with picture(ax, (side + 2.4, side + 1.3), title=title, show=show) as axes:
        drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        totals = cells.sum(axis=1).astype(int)
        names = [f"{name} ({n:,})" for name, n in zip(frame.index, totals, strict=True)]
        axes.set_yticks(np.arange(rows), names)
        axes.set_xticks(
            np.arange(columns),
            [str(name) for name in frame.columns],
            rotation=45,
            ha="right",
            rotation_mode="anchor",
        )
        # The squares of a larger matrix are too small for text.
        if max(rows, columns) <= 25:
            for row, column in zip(*np.nonzero(cells), strict=True):
                axes.text(
                    column,
                    row,
                    f"{100 * share[row, column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    # Dark text cannot be read on the dark half of the colours.
                    color="white" if share[row, column] > 0.55 else "#1A1A1A",
                )
        axes.set_ylabel("truth (cells)")
        axes.set_xlabel("predicted")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=22)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label("share of the row")
    return axes


def calibration(
    right: Any,
    confidence: Any,
    *,
    bins: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw a reliability diagram: accuracy by confidence (Guo et al., ICML 2017).

    On the diagonal, a confidence of .8 is correct in 80 % of the cells; below it predictions are overconfident. The
    area of each point grows with the number of cells in its bin, which is annotated.

    Args:
        right: bool [cells], whether the prediction is correct.
        confidence: float [cells], between 0 and 1.
        bins: Number of bins of equal width between 0 and 1; empty ones are not drawn.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The lengths differ, or a confidence is not between 0 and 1.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    right = np.asarray(right, bool)
    confidence = np.asarray(confidence, np.float64)
    if right.shape != confidence.shape or right.ndim != 1 or not len(right):
        raise InputError(
            f"{right.shape} predictions and {confidence.shape} confidences",
            "one of each per cell",
            "Apply the same selection of cells to both",
        )
    # A sum of float32 probabilities can exceed 1 by rounding.
    if not ((confidence >= 0) & (confidence <= 1.0 + 1e-6)).all():
        raise InputError("a confidence outside of 0 to 1", "probabilities", "Normalise them")
    # Bins are open below and closed above; 0 belongs to the first.
    place = np.clip(
        np.ceil(confidence * bins).astype(int) - 1,
        0,
        bins - 1,
    )
    size = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(size)
    x = np.bincount(place, weights=confidence, minlength=bins)[filled] / size[filled]
    y = np.bincount(place, weights=right, minlength=bins)[filled] / size[filled]
    with picture(ax, (4.0, 3.8), title=title, show=show) as axes:
        axes.plot(
            [0, 1],
            [0, 1],
            color="#8C8C8C",
            linewidth=1.0,
            linestyle=(0, (4, 2)),
            zorder=1,
        )
        axes.plot(x, y, color=PALETTE[0], linewidth=1.2, zorder=2)
        area = 18 + 130 * np.sqrt(size[filled] / size.max())
        axes.scatter(
            x,
            y,
            s=area,
            color=PALETTE[0],
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
        for left, up, number in zip(x, y, size[filled], strict=True):
            axes.annotate(
                f"{number:,}",
                (left, up),
                xytext=(7, -9),
                textcoords="offset points",
                fontsize=7.5,
                color="#4D4D4D",
            )
        axes.set_xlim(-0.02, 1.08)
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel("mean confidence of a bin")
        axes.set_ylabel("share that is right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E8E8E8", linewidth=0.6)
        axes.set_axisbelow(True)
    return axes


def histogram(
    values: Any,
    *,
    value_label: str,
    counted: str = "cells",
    limits: tuple[float, float] | None = None,
    bins: int = 40,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw a histogram with the median marked.

    Args:
        values: float [n]; non-finite values are omitted.
        value_label: Label of the value axis.
        counted: Name of the counted items.
        limits: Limits of the axis; None: of the values.
        bins: Number of bins.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: There is no finite value.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    numbers = np.asarray(values, np.float64).ravel()
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        raise InputError(explain("no finite value to draw", "at least one", "Check the values"))
    with picture(ax, (4.8, 2.8), title=title, show=show) as axes:
        axes.hist(
            numbers,
            bins=bins,
            range=limits,
            color=PALETTE[0],
            edgecolor="white",
            linewidth=0.4,
        )
        middle = float(np.median(numbers))
        axes.axvline(
            middle,
            color=PALETTE[3],
            linewidth=1.2,
            linestyle=(0, (4, 1.5)),
            label=f"median {middle:.3g}",
        )
        axes.set_xlabel(value_label)
        axes.set_ylabel(counted)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return axes


def agreement(
    measured: Any,
    predicted: Any,
    *,
    value_label: str,
    names: tuple[str, str] = ("measured", "predicted"),
    logarithmic: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw predicted against measured values, with the identity as a dashed line.

    Args:
        measured: float [n].
        predicted: float [n].
        value_label: Name of both quantities.
        names: Names of the two axes.
        logarithmic: Whether both axes are logarithmic; pairs that are not above 0 are omitted.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The lengths differ, or there is nothing to draw.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    x = np.asarray(measured, np.float64).ravel()
    y = np.asarray(predicted, np.float64).ravel()
    if x.shape != y.shape:
        raise InputError(
            f"{len(x)} measured and {len(y)} predicted numbers", "one of each", "Pair them first"
        )
    drawn = np.isfinite(x) & np.isfinite(y)
    if logarithmic:
        drawn &= (x > 0) & (y > 0)
    x, y = x[drawn], y[drawn]
    if not len(x):
        raise InputError(explain("no pair of numbers to draw", "at least one", "Check the values"))
    with picture(ax, (4.2, 3.9), title=title, show=show) as axes:
        size = float(np.clip(9_000 / len(x), 2.0, 18.0))
        axes.scatter(
            x,
            y,
            s=size,
            color=PALETTE[0],
            alpha=0.35,
            linewidths=0,
            rasterized=True,
        )
        if logarithmic:
            axes.set_xscale("log")
            axes.set_yscale("log")
        low = float(min(x.min(), y.min()))
        high = float(max(x.max(), y.max()))
        axes.axline(
            (low, low),
            (high, high) if high > low else (low + 1, low + 1),
            color="#4D4D4D",
            linewidth=1.0,
            linestyle=(0, (4, 2)),
            zorder=3,
        )
        axes.set_xlabel(f"{value_label}, {names[0]}")
        axes.set_ylabel(f"{value_label}, {names[1]}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E8E8E8", linewidth=0.6)
        axes.set_axisbelow(True)
    return axes


def change_map(
    change: pd.DataFrame,
    *,
    title: str | None = None,
    value_label: str = "change of mean log1p",
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw a heat map of expression changes under perturbations: red is up, blue is down, white is unchanged.

    Args:
        change: float [perturbations, genes]; select the genes to draw. Ensembl ids are shown as symbols.
        title: Title of the plot.
        value_label: Label of the colour bar.
        ax: Axes to draw on. None: a new figure, large enough for the names.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The table is empty or contains non-numeric values.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    frame = _frame(change, "The table of changes")
    values = frame.to_numpy()
    # Symmetric limits: white is no change.
    reach = float(np.nanmax(np.abs(values))) or 1.0
    rows, columns = frame.shape
    width = float(np.clip(0.24 * columns + 2.2, 3.4, 12.0))
    with picture(
        ax,
        (width, float(np.clip(0.26 * rows + 1.3, 1.9, 10.0))),
        title=title,
        show=show,
    ) as axes:
        drawn = axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        axes.set_xticks(
            np.arange(columns),
            gene_labels(frame.columns),
            rotation=60,
            ha="right",
            rotation_mode="anchor",
            fontsize=7.5,
        )
        axes.set_yticks(np.arange(rows), gene_labels(frame.index))
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=18)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(value_label)
    return axes
