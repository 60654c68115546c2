"""Rows of panels of the same cells: measured next to predicted, before next to after, sections side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cellplm_jax.errors import InputError
from cellplm_jax.plot.maps import drawn_values, embedding_map, limits_of, points_of, tissue_map
from cellplm_jax.plot.style import pyplot_module, styled


def spatial_comparison(
    coordinates: Any,
    truth: Any,
    predicted: Any,
    *,
    title: str | None = None,
    value_label: str = "log1p counts",
    names: tuple[str, str] = ("measured", "imputed"),
    color_map: str = "viridis",
    point_size: float | None = None,
    unit: str | None = None,
    image_origin: bool = True,
    show: bool = False,
) -> np.ndarray:
    """Draw a gene in the tissue three times: measured, predicted, and their difference.

    The first two panels share their colours. The difference is predicted minus measured, white at 0, red if too high,
    blue if too low.

    Args:
        coordinates: float [cells, 2], x and y.
        truth: float [cells].
        predicted: float [cells], on the same scale.
        title: Title of the figure, for example the gene's name.
        value_label: Label of the values.
        names: Titles of the first two panels.
        color_map: matplotlib colour map of the values.
        point_size: See :func:`spatial`.
        unit: See :func:`spatial`.
        image_origin: See :func:`spatial`.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        Object array of the three Axes.

    Raises:
        InputError: Shapes do not match, or coordinates are not finite.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = points_of(coordinates)
    values = [np.asarray(column, np.float64) for column in (truth, predicted)]
    for column in values:
        drawn_values(column, len(points))
    # Common limits, so that the same colour means the same value in both panels.
    together = limits_of(np.concatenate(values), None)
    difference = values[1] - values[0]
    finite = np.abs(difference[np.isfinite(difference)])
    # Symmetric around 0, which is then white.
    reach = float(np.percentile(finite, 99)) if finite.size and finite.max() > 0 else 1.0
    with _side_by_side(points, 3, title=title, show=show) as axes:
        drawn = (
            (values[0], names[0], color_map, together, value_label),
            (values[1], names[1], color_map, together, value_label),
            (
                difference,
                "difference",
                "RdBu_r",
                (-reach, reach),
                f"{names[1]} \N{MINUS SIGN} {names[0]}",
            ),
        )
        for ax, (column, name, colors, limits, label) in zip(axes, drawn, strict=True):
            tissue_map(
                points,
                column,
                title=name,
                color_label=label,
                color_map=colors,
                color_limits=limits,
                point_size=point_size,
                unit=unit,
                image_origin=image_origin,
                ax=ax,
            )
        # White points are invisible on a white background.
        axes[2].set_facecolor("#E6E6E6")
    return axes


def cell_panels(
    coordinates: Any,
    panels: Mapping[str, Any],
    *,
    title: str | None = None,
    color_label: str | None = None,
    color_map: str = "viridis",
    shared_colors: bool = False,
    tissue: bool = False,
    axis_name: str = "UMAP",
    point_size: float | None = None,
    unit: str | None = None,
    image_origin: bool = True,
    show: bool = False,
) -> np.ndarray:
    """Draw several quantities of the same cells in a row of panels, for example a gene before and after denoising.

    Args:
        coordinates: float [cells, 2].
        panels: Title of each panel to float [cells].
        title: Title of the figure.
        color_label: Label of the values.
        color_map: matplotlib colour map.
        shared_colors: Whether all panels share the limits of all values; otherwise each has its own.
        tissue: Whether the coordinates are tissue coordinates, see :func:`spatial`; otherwise see :func:`umap`.
        axis_name: See :func:`umap`.
        point_size: Area of a point in square points. None: chosen by the number of cells.
        unit: See :func:`spatial`.
        image_origin: See :func:`spatial`.
        show: Call ``matplotlib.pyplot.show()`` before returning.

    Returns:
        Object array of the Axes.

    Raises:
        InputError: There is no panel, shapes do not match, or coordinates are not finite.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    points = points_of(coordinates)
    columns = {str(name): np.asarray(values, np.float64) for name, values in panels.items()}
    if not columns:
        raise InputError("no panel to draw", "at least one", "Pass some panels")
    for column in columns.values():
        drawn_values(column, len(points))
    limits = limits_of(np.concatenate(list(columns.values())), None) if shared_colors else None
    with _side_by_side(points if tissue else None, len(columns), title=title, show=show) as axes:
        for ax, (name, column) in zip(axes, columns.items(), strict=True):
            options: dict[str, Any] = {
                "title": name,
                "color_label": color_label,
                "color_map": color_map,
                "color_limits": limits,
                "point_size": point_size,
                "ax": ax,
            }
            if tissue:
                tissue_map(points, column, unit=unit, image_origin=image_origin, **options)
            else:
                embedding_map(points, column, axis_name=axis_name, **options)
    return axes


@contextlib.contextmanager
def panels(tissues: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Context manager for a row of panels in the common style, as wide as these tissues at one height.

    Args:
        tissues: Coordinates of each panel, float [cells, 2].
    """
    pyplot = pyplot_module()
    widths = []
    for points in tissues:
        extent = np.maximum(np.ptp(points, axis=0), 1e-9)
        widths.append(float(np.clip(3.4 * extent[0] / extent[1], 1.5, 7.0)))
    with styled():
        grid = pyplot.subplots(
            1,
            len(widths),
            figsize=(sum(widths) + 1.8, 3.8),
            layout="constrained",
            squeeze=False,
            width_ratios=widths,
        )[1]
        yield grid[0]


@contextlib.contextmanager
def _side_by_side(
    tissue: np.ndarray | None,
    number: int,
    *,
    title: str | None,
    show: bool,
) -> Iterator[np.ndarray]:
    """Return a row of Axes with the aspect ratio of the tissue at these points; None: almost square ones."""
    pyplot = pyplot_module()
    height = 3.2
    if tissue is not None:
        extent = np.maximum(np.ptp(tissue, axis=0), 1e-9)
        height = float(np.clip(3.2 * extent[1] / extent[0], 1.6, 5.0))
    with styled():
        figure, grid = pyplot.subplots(
            1,
            number,
            figsize=(4.2 * number, height + 0.6),
            layout="constrained",
            squeeze=False,
        )
        yield grid[0]
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
    if show:
        pyplot.show()
