"""Colours, sizes and markers shared by all plots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cellplm_jax.errors import require

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
OKLab, from all previous ones, from white and from :data:`UNKNOWN_COLOR`, in normal vision and under simulated
protanopia, deuteranopia and tritanopia (Machado et al. 2009). A test checks the smallest distances.
"""

UNKNOWN_COLOR = "#B3B3B3"
"""Grey of cells with a missing or unknown label."""

UNKNOWN_LABELS: tuple[str, ...] = ("unassigned", "unknown", "nan", "None", "")
"""Labels drawn in grey, in the background and last in the legend."""

MARKERS = ("o", "^", "s", "X")  # one per repetition of the palette
DASHES = ("-", (0, (4, 1.2)))  # training, held out
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
STYLE: dict[str, Any] = {
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


def pyplot_module() -> Any:
    """Return ``matplotlib.pyplot``."""
    return require("matplotlib.pyplot", "eval", "Plotting")


@contextlib.contextmanager
def picture(
    ax: Axes | None,
    size: tuple[float, float],
    *,
    title: str | None,
    show: bool,
    beside: bool = False,
) -> Iterator[Axes]:
    """Context manager for one plot in the common style: yield Axes, then set the title and show it if requested.

    Args:
        ax: Axes to draw on. None: a new figure.
        size: Size of the new figure, in inches.
        title: Title of the plot.
        show: Call ``matplotlib.pyplot.show()`` at the end.
        beside: Whether to widen a new figure by its legend or colour bar.
    """
    pyplot = pyplot_module()
    with pyplot.rc_context(STYLE):
        axes = pyplot.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
        yield axes
        if title:
            axes.set_title(title, loc="left")
        if beside and ax is None:
            widen(axes)
    if show:
        pyplot.show()


def widen(axes: Axes) -> None:
    """Widen the figure of these Axes by the width of its legend or colour bar."""
    figure: Any = axes.figure
    legend = axes.get_legend()
    beside = 0.0
    if legend is not None:
        beside = legend.get_window_extent().width / figure.dpi + 0.15
    elif len(figure.axes) > 1:
        beside = 0.8
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + beside, height)
