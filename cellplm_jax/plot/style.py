"""Colours, sizes and markers shared by all plots."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_jax.data.genes import is_ensembl, symbols_of
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
    "#773344",
    "#9944FF",
    "#BB3311",
    "#7700BB",
    "#666655",
    "#AA77FF",
    "#3300EE",
    "#991100",
    "#DDBB88",
    "#CC22CC",
    "#005566",
    "#995588",
    "#992288",
    "#66CCFF",
)
"""Twenty colours. The first six are those of Okabe and Ito (2008); the others were chosen to be as far as possible, in
OKLab, from all others and from :data:`UNKNOWN_COLOR`, in normal vision and under simulated protanopia, deuteranopia and
tritanopia (Machado et al. 2009), with a contrast of at least 1.8 to white and to the dark page of reports. A test
checks the smallest distances and contrasts.
"""

UNKNOWN_COLOR = "#B3B3B3"
"""Grey of cells with a missing or unknown label."""

UNKNOWN_LABELS: tuple[str, ...] = ("unassigned", "unknown", "nan", "None", "", "others")
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

DARK_PAGE, DARK_INK = "#1D2125", "#E4E7EA"
"""Ground and text of reports in the dark theme."""


def natural_key(text: Any) -> list[Any]:
    """Return a sort key that places "2" before "10".

    Args:
        text: A label.
    """
    parts = _DIGITS.split(str(text))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


_DIGITS = re.compile(r"(\d+)")


def categories_of(values: Any) -> pd.Categorical:
    """Return labels as categories that occur, in the order of legends.

    A categorical column keeps its order unless that is the alphabetical default; all others are sorted naturally.

    Args:
        values: [cells].
    """
    if isinstance(values, pd.Categorical) or isinstance(
        getattr(values, "dtype", None), pd.CategoricalDtype
    ):
        found = pd.Categorical(values).remove_unused_categories()
        if found.ordered or list(found.categories) != sorted(found.categories, key=str):
            return found
    else:
        found = pd.Categorical(values)
    return found.reorder_categories(sorted(found.categories, key=natural_key))


def gene_labels(names: Iterable[Any]) -> list[str]:
    """Return the names of genes for pictures: symbols instead of Ensembl ids.

    An id is kept if it has no symbol, or if another of these names is the same symbol. Other names are unchanged.

    Args:
        names: Ensembl ids or any other names.
    """
    given = [str(name) for name in names]
    if not any(map(is_ensembl, given)):
        return given
    labels = [
        symbol if is_ensembl(name) else name
        for name, symbol in zip(given, symbols_of(given), strict=True)
    ]
    times = Counter(labels)
    return [label if times[label] == 1 else name for name, label in zip(given, labels, strict=True)]


def category_colors(values: Any, stored: Sequence[str] | None = None) -> dict[str, str]:
    """Return the colour of every label: the same in every picture of a column.

    Args:
        values: [cells], the complete column.
        stored: scanpy's ``uns["<key>_colors"]``: a colour per category, in the order of the categories. Ignored if it
            has fewer.

    Returns:
        Label -> colour, in the order of legends.
    """
    names = [str(name) for name in categories_of(values).categories]
    if stored is not None:
        column = pd.Categorical(values)
        # Fewer colours than categories belong to an older state of the column.
        if len(stored) >= len(column.categories):
            kept = dict(zip(map(str, column.categories), map(str, stored), strict=False))
            return {name: kept[name] for name in names}
    known = [name for name in names if name not in UNKNOWN_LABELS]
    given = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(known)}
    return {name: given.get(name, UNKNOWN_COLOR) for name in names}


def store_colors(adata: Any, key: str) -> dict[str, str]:
    """Return the colours of a column of ``obs``, and store them in ``uns["<key>_colors"]`` as scanpy does.

    Colours that are stored already are kept.

    Args:
        adata: The cells; the column becomes categorical.
        key: Column of ``obs`` with labels.

    Returns:
        Label -> colour.
    """
    column = adata.obs[key]
    if not isinstance(column.dtype, pd.CategoricalDtype):
        column = categories_of(column.astype(object).where(column.notna(), None))
        adata.obs[key] = column.rename_categories([str(name) for name in column.categories])
        column = adata.obs[key]
    colors = category_colors(column, adata.uns.get(f"{key}_colors"))
    every = category_colors(pd.Categorical(column.cat.categories, column.cat.categories))
    adata.uns[f"{key}_colors"] = [
        colors.get(name, every[name]) for name in map(str, column.cat.categories)
    ]
    return colors


@contextlib.contextmanager
def dark_theme(figure: Any) -> Iterator[None]:
    """Context manager that turns a figure dark: neutral colours run from the page to the ink of the dark theme.

    Colours of data stay: points, bars and images, and the texts on images. Viridis loses its darkest colours.

    Args:
        figure: A matplotlib figure; restored at the end.
    """
    to_rgba = require("matplotlib.colors", "eval", "Plotting").to_rgba
    on_images = {id(text) for axes in figure.axes if axes.images for text in axes.texts}
    page, ink = (np.array(to_rgba(color)[:3]) for color in (DARK_PAGE, DARK_INK))
    unknown = np.array(to_rgba(UNKNOWN_COLOR)[:3])

    def inverted(color: Any) -> Any:
        """Return the colour in the dark theme; None: it stays."""
        try:
            *rgb, alpha = to_rgba(color)
        except (ValueError, TypeError):
            return None
        # Coloured, or the grey of unknown cells: a colour of data.
        if np.ptp(rgb) > 0.06 or np.allclose(rgb, unknown, atol=0.01):
            return None
        # White becomes the page, black the ink, greys in between.
        return (*(ink + (page - ink) * np.mean(rgb)), alpha)

    changes: list[tuple[Any, Any, Any]] = []
    for artist in figure.findobj():
        # A figure and its axes pass colours on to their patch, which is found as well.
        if id(artist) in on_images or hasattr(artist, "patch"):
            continue
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            get, put = (getattr(artist, f"{verb}_{name}", None) for verb in ("get", "set"))
            if get is None or put is None:
                continue
            value = get()
            # Many colours of one artist belong to data.
            single = value[0] if isinstance(value, np.ndarray) and value.shape == (1, 4) else value
            if (changed := inverted(single)) is not None:
                changes.append((put, value, changed))
        for effect in getattr(artist, "get_path_effects", list)() or ():
            settings = getattr(effect, "_gc", {})
            if (changed := inverted(settings.get("foreground"))) is not None:
                put = partial(settings.__setitem__, "foreground")
                changes.append((put, settings["foreground"], changed))
        colors = getattr(artist, "get_cmap", lambda: None)()
        if getattr(colors, "name", None) == "viridis" and not hasattr(artist, "get_extent"):
            changes.append((artist.set_cmap, colors, _light_half(colors)))
    for put, _, changed in changes:
        put(changed)
    try:
        yield
    finally:
        for put, value, _ in reversed(changes):
            put(value)


def _light_half(colors: Any) -> Any:
    """Return a colour map without its darkest colours, which cannot be seen on the dark page."""
    make = require("matplotlib.colors", "eval", "Plotting").LinearSegmentedColormap
    return make.from_list("light viridis", colors(np.linspace(0.25, 1.0, 256)))


def pyplot_module() -> Any:
    """Return ``matplotlib.pyplot``."""
    return require("matplotlib.pyplot", "eval", "Plotting")


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Context manager for figures in the common style.

    ``rc_context`` also restores whether matplotlib is interactive. The first figure of a notebook loads the backend,
    which makes it interactive: without that, later figures are not shown.
    """
    pyplot = pyplot_module()
    with pyplot.rc_context(STYLE):
        yield
        interactive = pyplot.isinteractive()
    if interactive:
        pyplot.ion()


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
    with styled():
        axes = pyplot.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
        yield axes
        if title:
            axes.set_title(title, loc="left")
        if beside and ax is None:
            widen(axes)
    if show:
        pyplot.show()


def widen(axes: Axes) -> None:
    """Widen the figure of these Axes by the width of its legend or colour bar; a legend below makes it higher."""
    figure: Any = axes.figure
    legend = axes.get_legend()
    if legend is not None and legend.get_bbox_to_anchor().y0 < axes.bbox.y0:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi)
        return
    beside = 0.0
    if legend is not None:
        beside = legend.get_window_extent().width / figure.dpi + 0.15
    elif len(figure.axes) > 1:
        beside = 0.8
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + beside, height)
