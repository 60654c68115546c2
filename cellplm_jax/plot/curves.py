"""Training curves over steps and epochs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellplm_jax.errors import InputError, require
from cellplm_jax.plot.style import DASHES, PALETTE, STYLE, picture, pyplot_module, styled
from cellplm_jax.untrusted import parse_json, read_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Read a metrics file; an incomplete last line is ignored."""
    try:
        lines = read_text(Path(path)).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"The metrics file {os.fspath(path)!r} cannot be read ({getattr(error, 'strerror', None) or error})",
            "a file with one JSON object per line",
            "Pass the metrics file of a training run, or a list of dictionaries",
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            # A run may be writing this line.
            if number == len(lines):
                break
            raise InputError(
                f"Line {number} of {os.fspath(path)!r} is not JSON ({error})",
                "one JSON object per line",
                "Remove that line",
            ) from error
        rows.append(row)
    return rows


def _metrics_rows(
    metrics: Sequence[Mapping[str, Any]] | str | os.PathLike[str],
) -> list[Mapping[str, Any]]:
    """Return the lines of a run's metrics; a line without a step raises an error."""
    rows: list[Mapping[str, Any]]
    rows = (
        list(_read_json_lines(metrics)) if isinstance(metrics, str | os.PathLike) else list(metrics)
    )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("step"), int | float):
            raise InputError(
                f"Metrics line {number} has no number under 'step'",
                "an object such as {'step': 10, 'split': 'train', 'loss': 3.2}",
                "Add the step to every line",
            )
    return rows


def _series(
    rows: Sequence[Mapping[str, Any]],
    split: str,
    key: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of one metric; repeated steps (after a resume) keep the later value."""
    by_step: dict[float, float] = {}
    for row in rows:
        if row.get("split", "train") == split and row.get(key) is not None:
            by_step[float(row["step"])] = float(row[key])
    steps = np.array(sorted(by_step))
    values = np.array([by_step[step] for step in steps])
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean; the window shrinks at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    # A running mean from cumulative sums, symmetric at the ends too.
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _curve(
    panel: Axes,
    split: str,
    steps: np.ndarray,
    values: np.ndarray,
    smoothing: int | None,
) -> Any:
    """Draw one curve and return its line; training values are smoothed over faint raw values."""
    place = _SPLITS.index(split)
    if split == "heldout":
        return panel.plot(
            steps,
            values,
            color=PALETTE[1],
            linestyle=DASHES[place],
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            # About 25 markers at most; more would cover the line.
            markevery=max(1, len(values) // 25),
        )[0]
    window = smoothing or 2 * (len(values) // 80) + 1
    if window > 1:
        panel.plot(steps, values, color=PALETTE[0], alpha=0.3, linewidth=0.7)
    return panel.plot(
        steps,
        _smooth(values, window),
        color=PALETTE[0],
        linestyle=DASHES[place],
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
    """Draw training curves: one panel per quantity, with training and held-out values.

    Only panels with values are drawn: loss, reconstruction, latent and cluster term of the ELBO, held-out
    masked correlation, held-out NB log-likelihood, gradient norm, cells per second. Training values are a running
    mean over faint raw values; held-out values are unsmoothed, with markers.

    Args:
        metrics: One mapping per line, or the path of a JSON-lines file. Every line has ``step``; ``split`` is "train"
            (the default) or "heldout"; all other keys are optional. If a step occurs twice in a split, as after
            a resume, the later line is used. Non-finite values are omitted.
        smoothing: Width of the running mean in lines; odd, 1 for none. None: a fortieth of the lines.
        title: Title of the figure.
        columns: Number of columns of panels.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        One-dimensional object array of Axes, one per panel.

    Raises:
        InputError: The file cannot be read, a line has no step, or no known metric occurs.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    pyplot = pyplot_module()
    rows = _metrics_rows(metrics)
    drawn = []
    for key, heading, unit in _PANELS:
        curves = {split: _series(rows, split, key) for split in _SPLITS}
        curves = {split: curve for split, curve in curves.items() if len(curve[0])}
        if curves:
            drawn.append((heading, unit, curves))
    if not drawn:
        raise InputError(
            f"{len(rows)} metrics lines without any known metric",
            f"at least one of {', '.join(key for key, _, _ in _PANELS)}",
            "Check that this is the metrics file of a training run",
        )

    columns = max(1, min(columns, len(drawn)))
    shape = (math.ceil(len(drawn) / columns), columns)
    every_step = np.concatenate([steps for *_, curves in drawn for steps, _ in curves.values()])
    first = float(every_step.min())
    last = float(every_step.max())
    margin = 0.03 * (last - first) or 0.5
    with styled():
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
    """Draw one quantity of a fine-tuning run over epochs, for training and, if available, validation.

    Args:
        history: One mapping per epoch with ``epoch``; a validation value has the key with the prefix ``validation_``.
        key: Such as ``"loss"``, ``"score"`` or ``"learning_rate"``.
        best_epoch: The epoch whose parameters were kept; marked.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The history is empty, or lacks the quantity.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    rows = [{**row, "step": row["epoch"]} for row in history]
    names = {"train": key, "heldout": f"validation_{key}"}
    # Both values of an epoch are in one row without a split, and such rows count as "train".
    curves = {split: _series(rows, "train", name) for split, name in names.items()}
    curves = {split: curve for split, curve in curves.items() if len(curve[0])}
    if not curves:
        known = sorted({name.removeprefix("validation_") for row in history for name in row})
        raise InputError(
            f"A history of {len(rows)} epochs without '{key}'",
            f"one of {', '.join(known)}" if known else "the history of a fit",
            "Use one of these" if known else "Call fit first",
        )
    with picture(ax, (4.6, 3.0), title=title, show=show) as axes:
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
        # Ticks between two epochs would have no meaning.
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(key.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E0E0E0", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    return axes


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
    metrics: Sequence[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Any:
    """Draw a summary figure of a run, as saved in its work directory.

    Loss and its terms, held-out scores with the best step marked, the probe, gradient norm with skipped steps marked,
    throughput, and the fractions of padding, io_wait and peak FLOPs. Panels without values are
    omitted. Training values are running means over faint raw values.

    Args:
        metrics: As for :func:`training_curves`; ``split`` may also be "probe".
        title: Title of the figure.

    Returns:
        A ``matplotlib.figure.Figure`` without a window.

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
        raise InputError(
            f"{len(rows)} metrics lines without any known metric",
            "metrics of a pretraining run",
            "Check that this is the metrics file of a training run",
        )
    steps, skipped = _series(rows, "train", "skipped")
    # The metric counts from the start of the run, so an increase marks a skipped step.
    skipped_at = steps[np.flatnonzero(np.diff(skipped, prepend=0.0) > 0)]
    every_step = np.concatenate([curve[1] for *_, curves in panels for curve in curves])
    first = float(every_step.min())
    last = float(every_step.max())
    margin = 0.03 * (last - first) or 0.5
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        # Without pyplot, which keeps every figure until it is closed and may open a window.
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
    panel: Axes,
    split: str,
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> None:
    """Draw the curves of one panel of the summary figure."""
    everything = np.concatenate([values for _, _, values in curves])
    # Correlations and shares: a linear axis from 0, on which a small difference looks small.
    scores = everything.min() >= 0 and everything.max() <= 1
    logarithmic = not scores and everything.min() > 0 and everything.max() > 50 * everything.min()
    for place, (name, steps, values) in enumerate(curves):
        style: dict[str, Any] = {"color": PALETTE[place], "linestyle": _LINES[place], "label": name}
        if split == "train":
            # Values of small panels and of complete transcriptomes differ a lot; their mean shows the trend.
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
