"""Figures for the report and for notebooks: training curves, maps of cells, comparisons.

scanpy's conventions: every function takes ``ax=None, show=False`` and returns the Axes it drew on, so that a caller can
change anything afterwards; the figure is ``axes.figure``. matplotlib comes with the extra ``eval`` and is imported on
first use; no display is needed.

Colours can be told apart with the common forms of colour blindness; lines and bars also differ in dashes and hatches,
so that a figure survives a grey printer. Nothing here computes a score.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError, explain, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE: tuple[str, ...] = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#440066",
    "#66EEAA",
    "#662200",
    "#8800FF",
    "#0000AA",
    "#CCCCFF",
    "#AA66FF",
    "#664488",
    "#AA4466",
    "#880044",
    "#FFCC66",
    "#226600",
    "#4422CC",
    "#EE00CC",
)
"""Twenty colours. The first six are those of Okabe and Ito (2008); the others were chosen to be as far as possible, in
OKLab, from all before them, from white and from :data:`UNKNOWN_COLOR`, in normal vision and under simulated protanopia,
deuteranopia and tritanopia (Machado et al. 2009). A test holds the smallest distances."""

UNKNOWN_COLOR = "#B3B3B3"
"""Grey of cells whose label is missing or means "not known"."""

UNKNOWN_LABELS: tuple[str, ...] = ("unassigned", "unknown", "nan", "None", "")
"""Labels drawn in grey, behind the others and last in the legend."""

_MARKERS = ("o", "^", "s", "X")  # one round of the palette each
_DASHES = ("-", (0, (4, 1.2)))  # training, held out
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "#1A1A1A",
    "axes.labelcolor": "#1A1A1A",
    "axes.edgecolor": "#4D4D4D",
    "xtick.color": "#4D4D4D",
    "ytick.color": "#4D4D4D",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def _pyplot() -> Any:
    """Return ``matplotlib.pyplot``."""
    return require("matplotlib.pyplot", "eval", "Plotting")


def _new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return ``ax``, or the Axes of a new figure of this size in inches."""
    if ax is not None:
        return ax
    return _pyplot().subplots(figsize=size, layout="constrained")[1]


# --- training curves -------------------------------------------------------------------------------------------------

_PANELS: tuple[tuple[str, str, str], ...] = (  # key of a metrics line, heading, unit
    ("loss", "Loss", ""),
    ("reconstruction", "Reconstruction", "NB negative log-likelihood"),
    ("kl_latent", "ELBO, latent term", "nats"),
    ("kl_cluster", "ELBO, cluster term", "nats"),
    ("masked_correlation", "Masked correlation", "Pearson r"),
    ("nb_log_likelihood", "NB log-likelihood", "per entry"),
    ("gradient_norm", "Gradient norm", ""),
    ("cells_per_second", "Speed", "cells/s"),
)
_SPLITS = ("train", "heldout")
_SPLIT_NAMES = {"train": "training", "heldout": "held out"}


def _read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that is still being written is left out."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        msg = explain(
            f"The metrics file {os.fspath(path)!r} cannot be read ({error.strerror})",
            "a file with one JSON object a line",
            "Pass the metrics file of a training run, or a list of dictionaries",
        )
        raise InputError(msg) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            msg = explain(
                f"Line {number} of {os.fspath(path)!r} is not JSON ({error.msg})",
                "one JSON object a line",
                "Remove that line",
            )
            raise InputError(msg) from error
        rows.append(row)
    return rows


def _metrics_rows(
    metrics: Sequence[Mapping[str, Any]] | str | os.PathLike[str],
) -> list[Mapping[str, Any]]:
    """Return the lines of a run's metrics, after checking that each has a step."""
    rows: list[Mapping[str, Any]]
    rows = (
        list(_read_json_lines(metrics)) if isinstance(metrics, str | os.PathLike) else list(metrics)
    )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("step"), int | float):
            msg = explain(
                f"Metrics line {number} has no number under 'step'",
                "an object such as {'step': 10, 'split': 'train', 'loss': 3.2}",
                "Write the step into every line",
            )
            raise InputError(msg)
    return rows


def _series(
    rows: Sequence[Mapping[str, Any]], split: str, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of one metric; of a step written twice (after a resume) the later one."""
    found: dict[float, float] = {}
    for row in rows:
        if row.get("split", "train") == split and row.get(key) is not None:
            found[float(row["step"])] = float(row[key])
    steps = np.array(sorted(found))
    values = np.array([found[step] for step in steps])
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean; the window shrinks at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _curve(
    panel: Axes, split: str, steps: np.ndarray, values: np.ndarray, smoothing: int | None
) -> Any:
    """Draw one curve: training smoothed over its faint raw values, held out as it is; return its line."""
    place = _SPLITS.index(split)
    if split == "heldout":
        return panel.plot(
            steps,
            values,
            color=PALETTE[1],
            linestyle=_DASHES[place],
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            markevery=max(1, len(values) // 25),
        )[0]
    window = smoothing or 2 * (len(values) // 80) + 1
    if window > 1:
        panel.plot(steps, values, color=PALETTE[0], alpha=0.3, linewidth=0.7)
    return panel.plot(
        steps,
        _smooth(values, window),
        color=PALETTE[0],
        linestyle=_DASHES[place],
        marker="o" if len(values) == 1 else None,
    )[0]


def training_curves(
    metrics: Sequence[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    smoothing: int | None = None,
    title: str | None = None,
    columns: int = 2,
    show: bool = False,
) -> np.ndarray:
    """Draw how a training run went: one panel a quantity, training and held-out cells in the same panel.

    Only the panels that have values are drawn: loss, reconstruction, latent and cluster term of the ELBO, held-out
    masked correlation, held-out NB log-likelihood, gradient norm, cells per second. The training curve is a running
    mean over the faint raw values; held-out values are drawn as they are, with markers.

    Args:
        metrics: One mapping a line, or the path of a JSON-lines file. Every line has ``step``; ``split`` is "train"
            (also where absent) or "heldout"; all other keys are optional. A step that occurs twice in a split, as after
            a resume, counts as last written. Values that are not finite are left out.
        smoothing: Width of the running mean in lines; odd, 1 for none. None: a fortieth of the lines.
        title: Above all panels.
        columns: Panels side by side.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        One-dimensional object array of Axes, one a panel.

    Raises:
        InputError: The file cannot be read, a line has no step, or no known metric occurs.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    pyplot = _pyplot()
    rows = _metrics_rows(metrics)
    drawn = []
    for key, heading, unit in _PANELS:
        curves = {split: _series(rows, split, key) for split in _SPLITS}
        curves = {split: curve for split, curve in curves.items() if len(curve[0])}
        if curves:
            drawn.append((heading, unit, curves))
    if not drawn:
        msg = explain(
            f"{len(rows)} metrics lines without any known metric",
            f"at least one of {', '.join(key for key, _, _ in _PANELS)}",
            "Check that this is the metrics file of a training run",
        )
        raise InputError(msg)

    columns = max(1, min(columns, len(drawn)))
    shape = (math.ceil(len(drawn) / columns), columns)
    every_step = np.concatenate([steps for *_, curves in drawn for steps, _ in curves.values()])
    first, last = float(every_step.min()), float(every_step.max())
    margin = 0.03 * (last - first) or 0.5
    with pyplot.rc_context(_STYLE):
        figure, grid = pyplot.subplots(
            *shape,
            figsize=(3.6 * shape[1], 2.2 * shape[0] + 0.35),
            layout="constrained",
            squeeze=False,
        )
        panels = grid.ravel()
        for panel in panels[len(drawn) :]:
            panel.remove()
        panels = panels[: len(drawn)]
        handles = {}
        for panel, (heading, unit, curves) in zip(panels, drawn, strict=True):
            for split, (steps, values) in curves.items():
                handles[split] = _curve(panel, split, steps, values, smoothing)
            panel.set_title(heading, loc="left")
            panel.set_ylabel(unit)
            panel.set_xlabel("step")
            panel.set_xlim(first - margin, last + margin)
            panel.grid(axis="y", color="#E0E0E0", linewidth=0.6)
            panel.set_axisbelow(True)
            everything = np.concatenate([values for _, values in curves.values()])
            if everything.min() > 0 and everything.max() > 50 * everything.min():
                panel.set_yscale("log")
        shown = [split for split in _SPLITS if split in handles]
        figure.legend(
            [handles[split] for split in shown],
            [_SPLIT_NAMES[split] for split in shown],
            loc="outside upper right",
            ncols=len(shown),
            frameon=False,
            handlelength=2.4,
        )
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
    if show:
        pyplot.show()
    return panels


def fitting_curves(
    history: Sequence[Mapping[str, float]],
    *,
    key: str = "loss",
    best_epoch: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw one quantity of a fine-tuning run over its epochs, training and validation where the history has both.

    Args:
        history: A mapping an epoch with ``epoch``; a validation value is under ``validation_`` and the key.
        key: Such as ``"loss"``, ``"score"`` or ``"learning_rate"``.
        best_epoch: The epoch whose parameters were kept; marked.
        title: Above the plot.
        ax: Where to draw; None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The history is empty, or has no such quantity.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    pyplot = _pyplot()
    rows = [{**row, "step": row["epoch"]} for row in history]
    names = {"train": key, "heldout": f"validation_{key}"}
    curves = {split: _series(rows, "train", name) for split, name in names.items()}
    curves = {split: curve for split, curve in curves.items() if len(curve[0])}
    if not curves:
        known = sorted({name.removeprefix("validation_") for row in history for name in row})
        msg = explain(
            f"A history of {len(rows)} epochs without '{key}'",
            f"one of {', '.join(known)}" if known else "the history of a fit",
            "Name one of these" if known else "Call fit first",
        )
        raise InputError(msg)
    with pyplot.rc_context(_STYLE):
        axes = _new_axes(ax, (4.6, 3.0))
        for split, (epochs, values) in curves.items():
            line = _curve(axes, split, epochs, values, None)
            line.set_label({"train": "training", "heldout": "validation"}[split])
        if best_epoch is not None:
            axes.axvline(
                best_epoch,
                color="#4D4D4D",
                linestyle=":",
                linewidth=1.0,
                label=f"kept: epoch {best_epoch}",
            )
        everything = np.concatenate([values for _, values in curves.values()])
        if everything.min() > 0 and everything.max() > 50 * everything.min():
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel(key.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        if title:
            axes.set_title(title, loc="left")
    if show:
        pyplot.show()
    return axes


# --- a whole run -----------------------------------------------------------------------------------------------------

_RUN_PANELS: tuple[
    tuple[str, str, str, tuple[tuple[str, str], ...]], ...
] = (  # heading, unit, split, key and name
    ("Loss", "nats a cell", "train", (("loss", "loss"),)),
    (
        "Reconstruction",
        "nats a cell",
        "train",
        (("reconstruction_full", "all genes"), ("reconstruction_masked", "masked genes")),
    ),
    (
        "Divergence from the prior",
        "nats a cell",
        "train",
        (("kl_latent", "latent"), ("kl_cluster", "clusters")),
    ),
    ("Held-out likelihood", "nats an entry", "heldout", (("nb_log_likelihood", "NB"),)),
    (
        "Held-out correlation",
        "Pearson r",
        "heldout",
        (("masked_correlation", "all entries"), ("masked_correlation_per_gene", "mean per gene")),
    ),
    (
        "Probe on held-out labels",
        "score",
        "probe",
        (
            ("knn_accuracy", "kNN accuracy"),
            ("ari", "ARI of clusters"),
            ("batch_mixing", "batch mixing"),
        ),
    ),
    ("Gradient norm", "before clipping", "train", (("gradient_norm", "norm"),)),
    ("Speed", "cells/s", "train", (("cells_per_second", "cells/s"),)),
    (
        "Shares",
        "of slots, time, peak",
        "train",
        (
            ("padding", "padding"),
            ("data_wait", "waiting for data"),
            ("model_flop_utilisation", "model FLOPs"),
        ),
    ),
)
_LINES = ("-", (0, (4, 1.2)), (0, (1, 1)))


def run_picture(
    metrics: Sequence[Mapping[str, Any]] | str | os.PathLike[str], *, title: str | None = None
) -> Any:
    """Draw a whole run on one page, as it is left in its work directory.

    Loss and its terms, held-out scores with the best step marked, the probe, gradient norm with skipped steps marked,
    speed, and the shares of padding, of time waiting for data and of the arithmetic peak. Panels without values are
    left out. Training values are running means over their faint raw values.

    Args:
        metrics: As for :func:`training_curves`; ``split`` may also be "probe".
        title: Above all panels.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window.

    Raises:
        InputError: The file cannot be read, a line has no step, or no known metric occurs.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    matplotlib = require("matplotlib", "eval", "Plotting")
    figures = require("matplotlib.figure", "eval", "Plotting")
    rows = _metrics_rows(metrics)
    panels = []
    for heading, unit, split, names in _RUN_PANELS:
        curves = [(name, *_series(rows, split, key)) for key, name in names]
        curves = [curve for curve in curves if len(curve[1])]
        if curves:
            panels.append((heading, unit, split, curves))
    if not panels:
        msg = explain(
            f"{len(rows)} metrics lines without any known metric",
            "those of a pretraining run",
            "Check that this is the metrics file of a training run",
        )
        raise InputError(msg)
    steps, skipped = _series(rows, "train", "skipped")
    skipped_at = steps[np.flatnonzero(np.diff(skipped, prepend=0.0) > 0)]
    every_step = np.concatenate([curve[1] for *_, curves in panels for curve in curves])
    first, last = float(every_step.min()), float(every_step.max())
    margin = 0.03 * (last - first) or 0.5
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(4.0 * columns, 2.5 * lines + 0.4), layout="constrained")
        grid = np.asarray(figure.subplots(lines, columns, squeeze=False)).ravel()
        for panel in grid[len(panels) :]:
            panel.remove()
        for panel, (heading, unit, split, curves) in zip(grid, panels, strict=False):
            _run_panel(panel, split, curves)
            if heading == "Gradient norm" and len(skipped_at):
                bottom = np.full(len(skipped_at), 0.02)
                panel.plot(
                    skipped_at,
                    bottom,
                    "x",
                    color=PALETTE[3],
                    transform=panel.get_xaxis_transform(),
                    label="skipped step",
                )
                panel.legend(frameon=False)
            panel.set_title(heading, loc="left")
            panel.set_ylabel(unit)
            panel.set_xlabel("step")
            panel.set_xlim(first - margin, last + margin)
            panel.grid(axis="y", color="#E0E0E0", linewidth=0.6)
            panel.set_axisbelow(True)
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
    return figure


def _run_panel(
    panel: Axes, split: str, curves: Sequence[tuple[str, np.ndarray, np.ndarray]]
) -> None:
    """Draw the curves of one panel of a run's picture."""
    everything = np.concatenate([values for _, _, values in curves])
    scores = everything.min() >= 0 and everything.max() <= 1
    logarithmic = not scores and everything.min() > 0 and everything.max() > 50 * everything.min()
    for place, (name, steps, values) in enumerate(curves):
        style: dict[str, Any] = {"color": PALETTE[place], "linestyle": _LINES[place], "label": name}
        if split == "train":
            # Batches of small panels and of whole transcriptomes lie far apart; their mean shows the trend.
            window = 2 * (len(values) // 12) + 1
            if window > 1:
                panel.plot(steps, values, color=PALETTE[place], alpha=0.25, linewidth=0.7)
            values = (
                np.exp(_smooth(np.log(values), window)) if logarithmic else _smooth(values, window)
            )
        if split != "train" or len(values) == 1:
            style |= {"marker": "o", "markersize": 3.5, "markevery": max(1, len(values) // 25)}
        panel.plot(steps, values, **style)
    if curves[0][0] == "NB":
        _, steps, values = curves[0]
        best = int(np.argmax(values))
        panel.plot(
            steps[best],
            values[best],
            "*",
            color=PALETTE[3],
            markersize=11,
            label=f"best: step {steps[best]:.0f}",
        )
    if logarithmic:
        panel.set_yscale("log")
    if scores:
        panel.set_ylim(bottom=0)
    if len(curves) > 1 or curves[0][0] == "NB":
        panel.legend(frameon=False)


# --- maps of cells ---------------------------------------------------------------------------------------------------


def _points(coordinates: Any) -> np.ndarray:
    """Return finite float coordinates [cells, 2]."""
    points = np.asarray(coordinates)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        msg = explain(
            f"The coordinates have shape {points.shape}",
            "[cells, 2] with at least one cell",
            "Pass two columns, for example adata.obsm['X_umap'][:, :2]",
        )
        raise InputError(msg)
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        msg = explain(
            f"The coordinates hold NaN or infinity for {int((~np.isfinite(points)).any(axis=1).sum())} cells",
            "finite numbers",
            "Select the cells that have coordinates",
        )
        raise InputError(msg)
    return points


def _values_of(values: Any, cells: int) -> tuple[np.ndarray | None, pd.Categorical | None]:
    """Return (floats, None) for a continuous quantity or (None, categories) for anything else."""
    column = values if isinstance(values, pd.Series | pd.Categorical) else np.asarray(values)
    if np.ndim(column) != 1 or len(column) != cells:
        msg = explain(
            f"Values of shape {np.shape(column)} for {cells} cells",
            "one value a cell, in the order of the coordinates",
            "Apply the same selection of cells to both",
        )
        raise InputError(msg)
    if pd.api.types.is_float_dtype(column.dtype):
        return np.asarray(column, dtype=np.float64), None
    if isinstance(column, pd.Categorical) or isinstance(column.dtype, pd.CategoricalDtype):
        return None, pd.Categorical(column).remove_unused_categories()
    return None, pd.Categorical(column)


def _category_colors(
    names: Sequence[str], palette: Mapping[str, str] | Sequence[str] | None
) -> list[tuple[str, str]]:
    """Return colour and marker of every category; the marker changes when the palette is used up."""
    if isinstance(palette, Mapping):
        lacking = [name for name in names if name not in palette and name not in UNKNOWN_LABELS]
        if lacking:
            msg = explain(
                f"The palette has no colour for {lacking[:5]}",
                "a colour for every label",
                "Add them, or leave out the palette",
            )
            raise InputError(msg)
        return [(palette.get(name, UNKNOWN_COLOR), "o") for name in names]
    colors = tuple(palette) if palette else PALETTE
    styles, place = [], 0
    for name in names:
        if name in UNKNOWN_LABELS:
            styles.append((UNKNOWN_COLOR, "o"))
            continue
        styles.append(
            (colors[place % len(colors)], _MARKERS[(place // len(colors)) % len(_MARKERS)])
        )
        place += 1
    return styles


def _limits(values: np.ndarray, limits: tuple[float, float] | None) -> tuple[float, float]:
    """Return the colour limits: as given, or the 1st and 99th percentile, which one stray cell does not move."""
    if limits is not None:
        return limits
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low = np.percentile(finite, 1, method="higher")
    high = np.percentile(finite, 99, method="lower")
    if low == high:
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _legend_columns(entries: int) -> int:
    """Return how many columns the legend of so many groups has."""
    return math.ceil(entries / 18)


def _widen(axes: Axes) -> None:
    """Make the figure of these Axes wider by what its legend or colour bar takes beside the data."""
    figure: Any = axes.figure
    legend = axes.get_legend()
    beside = 0.0
    if legend is not None:
        beside = legend.get_window_extent().width / figure.dpi + 0.15
    elif len(figure.axes) > 1:
        beside = 0.8
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + beside, height)


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
    legend: bool,
    label_groups: bool,
    seed: int,
) -> None:
    """Draw the points and their legend or colour bar."""
    numbers, categories = _values_of(values, len(points))
    if point_size is None:
        # Points of all cells together cover about a third of a typical panel.
        point_size = float(np.clip(12_000 / len(points), 0.4, 30.0))
    options: dict[str, Any] = {"s": point_size, "linewidths": 0, "rasterized": True}
    order = np.random.default_rng(seed).permutation(len(points))  # no group always on top
    if numbers is not None:
        missing = ~np.isfinite(numbers)
        ax.scatter(*points[missing].T, c=UNKNOWN_COLOR, **options)
        order = order[~missing[order]]
        low, high = _limits(numbers, color_limits)
        drawn = ax.scatter(
            *points[order].T, c=numbers[order], cmap=color_map, vmin=low, vmax=high, **options
        )
        if legend:
            finite = numbers[~missing]
            beyond = (bool((finite < low).any()), bool((finite > high).any()))
            extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
            bar = ax.figure.colorbar(
                drawn, ax=ax, shrink=0.7, aspect=22, extend=extend.get(beyond, "neither")
            )
            bar.outline.set_visible(False)  # type: ignore[operator]
            if color_label:
                bar.set_label(color_label)
        return

    if categories is None:  # not reached: one of the two is always given
        return
    names = [str(name) for name in categories.categories]
    codes = np.asarray(categories.codes)
    styles = _category_colors(names, palette)
    known = [place for place, name in enumerate(names) if name not in UNKNOWN_LABELS]
    unknown = [place for place, name in enumerate(names) if name in UNKNOWN_LABELS]
    behind = np.isin(codes, [-1, *unknown])
    ax.scatter(*points[behind].T, c=UNKNOWN_COLOR, zorder=1, **options)
    front = order[~behind[order]]
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
                [], [], linestyle="", marker=marker, markersize=6.5, color=color, markeredgewidth=0
            )
            for _, color, marker in entries
        ]
        ax.legend(
            handles,
            [name for name, _, _ in entries],
            title=color_label,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            borderaxespad=0.0,
            frameon=False,
            ncols=_legend_columns(len(entries)),
            handletextpad=0.3,
            columnspacing=1.0,
            alignment="left",
        )
    if label_groups:
        effects = require("matplotlib.patheffects", "eval", "Plotting")
        for place in known:
            own = points[codes == place]
            # The cell nearest to the median lies inside the group even where the group is bent.
            middle = own[np.argmin(np.square(own - np.median(own, axis=0)).sum(axis=1))]
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


def umap(
    coordinates: Any,
    labels: Any,
    *,
    title: str | None = None,
    color_label: str | None = None,
    palette: Mapping[str, str] | Sequence[str] | None = None,
    color_map: str = "viridis",
    color_limits: tuple[float, float] | None = None,
    point_size: float | None = None,
    legend: bool = True,
    label_groups: bool = False,
    axis_name: str = "UMAP",
    seed: int = 0,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw cells in two dimensions, coloured by a label or by a number.

    Floating-point values are a quantity and get a colour bar; everything else (strings, categories, booleans, whole
    numbers such as clusters) are groups and get a legend to the right of the data. Cells are drawn in random order, so
    that no group hides another; those with a label of :data:`UNKNOWN_LABELS` are grey and behind.

    Args:
        coordinates: float [cells, 2].
        labels: [cells]. Categories keep their order, other labels are sorted.
        title: Above the plot.
        color_label: What the colours mean: title of the legend or of the colour bar.
        palette: Colours in the order of the groups, or a mapping from label to colour. None: :data:`PALETTE`, with
            another marker for every further twenty groups.
        color_map: matplotlib colour map of a quantity.
        color_limits: Its limits. None: 1st to 99th percentile, values beyond shown by the arrows of the bar.
        point_size: Area of a point in square points. None: by the number of cells.
        legend: Draw the legend or colour bar.
        label_groups: Write the names of the groups onto the data as well.
        axis_name: Word on the two axes, for example "PCA".
        seed: For the drawing order.
        ax: Where to draw. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: Shapes do not fit, coordinates are not finite, or the palette lacks a label.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    pyplot = _pyplot()
    points = _points(coordinates)
    with pyplot.rc_context(_STYLE):
        axes = _new_axes(ax, (4.6, 4.2))
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
        if title:
            axes.set_title(title, loc="left")
        if ax is None:
            _widen(axes)
    if show:
        pyplot.show()
    return axes


def spatial(
    coordinates: Any,
    values: Any,
    *,
    title: str | None = None,
    color_label: str | None = None,
    palette: Mapping[str, str] | Sequence[str] | None = None,
    color_map: str = "viridis",
    color_limits: tuple[float, float] | None = None,
    point_size: float | None = None,
    legend: bool = True,
    unit: str | None = None,
    image_origin: bool = True,
    seed: int = 0,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw cells or spots where they lie in the tissue, coloured by a label or by a number.

    One unit is as long on x as on y. The y axis points down, as in an image (row 0 at the top) and as in the pixel
    coordinates of spatial platforms; with ``image_origin=False`` it points up, as in a graph.

    Args:
        coordinates: float [cells, 2], x and y.
        values: [cells]. Floating point: a quantity with a colour bar; anything else: groups with a legend.
        title: Above the plot.
        color_label: What the colours mean: title of the legend or of the colour bar.
        palette: As in :func:`umap`.
        color_map: matplotlib colour map of a quantity.
        color_limits: Its limits. None: 1st to 99th percentile.
        point_size: Area of a point in square points. None: points of neighbouring cells nearly touch.
        legend: Draw the legend or colour bar.
        unit: Of the coordinates, for example "µm"; shown with the axes. None: no ticks are drawn.
        image_origin: True: y grows downwards.
        seed: For the drawing order.
        ax: Where to draw. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: Shapes do not fit, coordinates are not finite, or the palette lacks a label.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    pyplot = _pyplot()
    points = _points(coordinates)
    extent = np.ptp(points, axis=0)
    extent = np.where(extent > 0, extent, max(extent.max(), 1.0))
    with pyplot.rc_context(_STYLE):
        long = 5.0 / max(extent)
        width, height = np.maximum(extent * long, (1.8, 1.5)) + np.array((0.2, 0.4))
        axes = _new_axes(ax, (float(width), float(height)))
        if point_size is None:
            box = axes.get_window_extent()
            scale = 72 / axes.figure.dpi * min(box.width / extent[0], box.height / extent[1])
            # Square points of paper that tissue covers, by the occupied part of a grid of about four cells a box.
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
        if title:
            axes.set_title(title, loc="left")
        if ax is None:
            axes.set_anchor("W")  # the legend follows the tissue, not the box around it
            _widen(axes)
    if show:
        pyplot.show()
    return axes


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
    legend: bool = True,
    unit: str | None = None,
    image_origin: bool = True,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw where in the tissue the cells lie that a cell attends to, and the cell itself as a star.

    Args:
        coordinates: float [cells, 2], x and y.
        weights: [cells]: a row of :func:`cellplm_jax.cell_attention`, or the mean of several.
        cell: Number of the cell that looks; None: it is not marked.
        title: Above the plot.
        color_label: Title of the colour bar.
        color_map: matplotlib colour map.
        color_limits: Its limits. None: 1st to 99th percentile.
        point_size: See :func:`spatial`.
        legend: Draw the colour bar.
        unit: See :func:`spatial`.
        image_origin: See :func:`spatial`.
        ax: Where to draw. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: Shapes do not fit, or there is no such cell.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = _points(coordinates)
    if cell is not None and not 0 <= cell < len(points):
        msg = explain(
            f"there is no cell {cell}", f"a number from 0 to {len(points) - 1}", "Choose among them"
        )
        raise InputError(msg)
    axes = spatial(
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
            [x], [y], marker="*", markersize=13, linestyle="", label="the cell that looks",
            markerfacecolor="#D55E00", markeredgecolor="white", zorder=5,
        )  # fmt: skip
    if show:
        _pyplot().show()
    return axes


# --- comparisons -----------------------------------------------------------------------------------------------------


def _frame(table: Any, name: str) -> pd.DataFrame:
    """Return a table of floats, a row a method and a column a metric."""
    if isinstance(table, Mapping):
        table = pd.DataFrame.from_dict(
            {row: dict(values) for row, values in table.items()}, orient="index"
        )
    try:
        frame = pd.DataFrame(table).astype(float)
    except (TypeError, ValueError) as error:
        msg = explain(
            f"{name} holds something that is not a number ({error})",
            "numbers, a row a method and a column a metric",
            "Leave columns of text out",
        )
        raise InputError(msg) from error
    if frame.empty:
        msg = explain(f"{name} is empty", "at least one method and one metric", "Fill it")
        raise InputError(msg)
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
    """Compare methods on several scores: a group of bars a score, a bar a method, its value written on it.

    Args:
        table: A row a method and a column a score, or ``{method: {score: value}}``. A missing value is drawn as "n/a",
            so that it is not mistaken for 0.
        errors: Half lengths of error bars in the same form; only entries that occur are drawn.
        title: Above the plot.
        value_label: On the axis of the values.
        digits: Decimals of the written values.
        ax: Where to draw. None: a new figure, wide enough for the bars.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The table is empty or holds something else than numbers.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    pyplot = _pyplot()
    frame = _frame(table, "The table")
    spread = None
    if errors is not None:
        spread = _frame(errors, "The table of errors").reindex_like(frame)
    methods, scores = frame.shape
    width = 0.84 / methods
    with pyplot.rc_context(_STYLE):
        room = scores * (methods * 0.36 + 0.25) + 0.7
        axes = _new_axes(ax, (float(np.clip(room, 3.2, 12.0)), 3.4))
        for place, (method, row) in enumerate(frame.iterrows()):
            left = np.arange(scores) + (place - (methods - 1) / 2) * width
            height = row.to_numpy()
            axes.bar(
                left,
                np.nan_to_num(height),
                width * 0.92,
                color=PALETTE[place % len(PALETTE)],
                hatch=_HATCHES[place % len(_HATCHES)],
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
                frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0
            )
        if title:
            axes.set_title(title, loc="left")
        if ax is None:
            _widen(axes)
    if show:
        pyplot.show()
    return axes
