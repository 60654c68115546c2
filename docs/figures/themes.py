"""Shared drawing code of the figures: each is saved for a light and a dark theme."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"


class Theme(NamedTuple):
    """Colours of a theme.

    Attributes:
        name: ``"light"`` or ``"dark"``.
        text: Text and axes.
        faint: Lines and markers in the background.
        blue: Blue with enough contrast on the page.
        heat: Colours of a heat map, from the background to the maximum.
    """

    name: str
    text: str
    faint: str
    blue: str
    heat: tuple[str, ...]


LIGHT = Theme("light", "#1d2127", "#9aa3ad", BLUE, ("#f4f8fb", "#7db8dc", BLUE, "#083d66"))
DARK = Theme("dark", "#e3e6ea", "#6b7480", SKY, ("#1d2329", "#1f5f86", SKY, "#e2f3fd"))


def draw(name: str, figure: Callable[[Any, Theme], Any], folder: Path = HERE) -> list[Path]:
    """Draw a figure for both themes, reproducibly.

    Args:
        name: Name of the files, ``NAME-light.svg`` and ``NAME-dark.svg``.
        figure: Called with ``matplotlib.pyplot`` and a theme; returns a figure.
        folder: Output folder.

    Returns:
        The files.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    for theme in (LIGHT, DARK):
        settings = {
            "svg.hashsalt": name,
            "svg.fonttype": "path",
            "font.size": 11,
            "font.family": "DejaVu Sans",
            "text.color": theme.text,
            "axes.edgecolor": theme.faint,
            "axes.labelcolor": theme.text,
            "axes.titlesize": 11,
            "xtick.color": theme.text,
            "ytick.color": theme.text,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
        with mpl.rc_context(settings):
            drawn = figure(plt, theme)
            path = folder / f"{name}-{theme.name}.svg"
            drawn.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(drawn)
        files.append(path)
    return files


def save(name: str, figure: Any, folder: Path = HERE) -> None:
    """Save a figure of many cells for both themes, as PNG on no ground.

    Args:
        name: Name of the files, ``NAME-light.png`` and ``NAME-dark.png``.
        figure: A figure of :mod:`cellplm_jax.plot`.
        folder: Output folder.
    """
    from PIL import Image

    from cellplm_jax.plot import dark_theme

    for theme in (LIGHT, DARK):
        path = folder / f"{name}-{theme.name}.png"
        with dark_theme(figure) if theme is DARK else contextlib.nullcontext():
            figure.savefig(path, transparent=True, dpi=130, bbox_inches="tight", pad_inches=0.05)
        # A palette: a third of the bytes.
        Image.open(path).quantize(255, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
