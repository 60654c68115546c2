"""Charts of experiments: ablations, and cost against size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cellplm_jax.errors import InputError, nearest
from cellplm_jax.plot.style import DASHES, MARKERS, PALETTE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ablation_dots(
    scores: Mapping[str, Sequence[float]],
    *,
    reference: str,
    value_label: str = "score",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw ablation scores: one row per variant, one dot per seed, a bar at the mean, the reference as a line.

    Args:
        scores: ``{variant: scores of its seeds}``, including the reference.
        reference: Name of the complete model.
        value_label: Name of the score; the plot does not assume that higher is better.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure, high enough for the rows.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: The reference is missing, or a variant has no finite score.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    seeds = {str(name): np.asarray(values, np.float64).ravel() for name, values in scores.items()}
    if reference not in seeds:
        raise InputError(
            f"no scores of the reference '{reference}'",
            f"one of {', '.join(map(repr, seeds)) or 'no variants at all'}",
            nearest(reference, seeds, "Name the complete model"),
        )
    for name, values in seeds.items():
        if not values.size or not np.isfinite(values).all():
            raise InputError(
                f"variant '{name}' has no finite score", "one per seed", "Remove the variant"
            )
    with picture(
        ax,
        (5.6, 0.3 * len(seeds) + 0.9),
        title=title,
        show=show,
    ) as axes:
        whole = seeds[reference].mean()
        axes.axvline(
            whole,
            color="#8C8C8C",
            linewidth=1.0,
            linestyle=(0, (4, 2)),
            zorder=1,
        )
        for place, (name, values) in enumerate(seeds.items()):
            color = PALETTE[3] if name == reference else PALETTE[0]
            axes.plot(
                values,
                np.full(len(values), place),
                "o",
                color=color,
                markersize=5.5,
                alpha=0.75,
                markeredgewidth=0,
                zorder=2,
            )
            axes.plot(
                [values.mean()] * 2,
                [place - 0.3, place + 0.3],
                color=color,
                linewidth=2,
                zorder=3,
            )
            text = f"{values.mean():.3f}"
            if name != reference:
                text += f" ({values.mean() - whole:+.3f})"
            axes.annotate(
                text.replace("-", "\N{MINUS SIGN}"),
                (1.01, place),
                va="center",
                fontsize=7.5,
                xycoords=axes.get_yaxis_transform(),
                annotation_clip=False,
            )
        axes.set_yticks(np.arange(len(seeds)), list(seeds))
        axes.set_ylim(len(seeds) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(value_label)
        axes.grid(axis="x", color="#E8E8E8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return axes


def benchmark_lines(
    curves: Mapping[str, Mapping[float, float]],
    *,
    size_label: str,
    value_label: str,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Draw cost against size with logarithmic axes, one line per method.

    Args:
        curves: ``{method: {size: value}}``; all numbers above 0.
        size_label: Such as ``"cells"``.
        value_label: Such as ``"seconds"``.
        title: Title of the plot.
        ax: Axes to draw on. None: a new figure.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        The Axes.

    Raises:
        InputError: There is nothing to draw, or a number is not above 0.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    numbers = [n for curve in curves.values() for pair in curve.items() for n in pair]
    if not numbers or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise InputError(
            "sizes and values that are not all above 0" if numbers else "no sizes and values",
            "numbers above 0 for logarithmic axes",
            "Remove the others",
        )
    with picture(ax, (4.8, 3.4), title=title, show=show, beside=True) as axes:
        for place, (method, curve) in enumerate(curves.items()):
            sizes = sorted(curve)
            axes.plot(
                sizes,
                [curve[size] for size in sizes],
                color=PALETTE[place % len(PALETTE)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=5,
                label=str(method),
                linestyle=DASHES[place % len(DASHES)],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(size_label)
        axes.set_ylabel(value_label)
        axes.grid(color="#E8E8E8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0)
    return axes
