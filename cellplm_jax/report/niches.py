"""Report of ``cellplm niches``: maps of the sections, composition of the niches, meetings of cell types."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellplm_jax.report.blocks import Page
from cellplm_jax.report.html import Figure, Section, Table, Text

SECTIONS = 6
"""Maximum number of sections that are drawn."""

PAIRS = 10
"""Number of listed pairs of cell types, most and least frequent."""


def niches(path: str | os.PathLike) -> Page:
    """Show niches: one map per section, their composition, and which cell types meet.

    Args:
        path: Output of :func:`cellplm_jax.niches_file`.
    """
    from cellplm_jax.tasks.files import read_annotations
    from cellplm_jax.tasks.niches import FACTS

    facts = read_annotations(path, uns=[FACTS]).uns[FACTS]
    params = facts["params"]
    cells = read_annotations(path, obsm=[key for key in [params["spatial_key"]] if key])
    kinds = list(map(str, facts["types"]))
    names = list(map(str, facts["niches"]))
    shares = np.asarray(facts["composition"])
    sizes = np.asarray(facts["cells"])
    rows = []
    for name, size, share in zip(names, sizes, shares, strict=True):
        order = [place for place in np.argsort(-share)[:3] if share[place] >= 0.05]
        listed = ", ".join(f"{kinds[place]} {share[place]:.0%}" for place in order)
        rows.append((name, int(size), f"{size / sizes.sum():.0%}", listed))
    sections = [
        *_maps(cells, params),
        Table(
            ["niche", "cells", "share", "most frequent cell types"],
            rows,
            f"Cell types: obs['{params['label_key']}'].",
            "Niches",
        ),
        *_composition(shares, names, kinds),
        *_meetings(
            np.asarray(facts["meeting_zscore"]),
            np.asarray(facts["meeting_count"]),
            kinds,
        ),
    ]
    known = [(name.replace("_", " "), str(value)) for name, value in params.items() if value != ""]
    known.append(("model", str(facts["model"]) or "none"))
    sections.append(Table(["", "value"], known, heading="Parameters"))
    return Page(
        f"Niches of {Path(path).name}",
        f"{cells.n_obs:,} cells in {len(names)} niches, of {sizes.min():,} to {sizes.max():,} cells.",
        sections,
    )


def _maps(cells: Any, params: Any) -> list[Section]:
    """Return maps of the largest sections."""
    from cellplm_jax import plot

    if params["spatial_key"] not in cells.obsm:
        return [Text("There are no coordinates, only a spatial graph.", heading="Map")]
    points = np.asarray(cells.obsm[params["spatial_key"]], np.float64)[:, :2]
    there = np.isfinite(points).all(axis=1)
    key = params["batch_key"]
    section = cells.obs[key].astype(str).to_numpy() if key else np.zeros(len(points), int)
    names, sizes = np.unique(section[there], return_counts=True)
    shown = names[np.sort(np.argsort(-sizes, kind="stable")[:SECTIONS])]
    drawn = there & np.isin(section, shown)
    axes = plot.spatial_sections(
        points[drawn],
        cells.obs[params["niche_key"]].iloc[np.flatnonzero(drawn)],
        section[drawn] if key else None,
        color_label="niche",
    )
    caption = "Tissue coordinates, one point per cell or spot."
    if len(shown) < len(names):
        caption += f" The {len(shown)} largest of {len(names)} sections."
    return [Figure(axes[0], "Map of the niches in the tissue", caption, "Map")]


def _composition(shares: np.ndarray, names: list[str], kinds: list[str]) -> list[Section]:
    from cellplm_jax import plot

    table = pd.DataFrame(100 * shares, [f"niche {name}" for name in names], kinds)
    axes = plot.heat_map(table, value_label="% of the niche's cells")
    return [
        Figure(
            axes, "Heat map of the composition of the niches", "Rows sum to 100 %.", "Composition"
        )
    ]


def _meetings(score: np.ndarray, count: np.ndarray, kinds: list[str]) -> list[Section]:
    from cellplm_jax import plot

    table = pd.DataFrame(score, kinds, kinds)
    upper = np.triu_indices(len(kinds))
    order = np.argsort(-score[upper], kind="stable")
    chosen = order if len(order) <= 2 * PAIRS else [*order[:PAIRS], *order[-PAIRS:]]
    rows = [
        (kinds[upper[0][n]], kinds[upper[1][n]], int(count[upper][n]), float(score[upper][n]))
        for n in chosen
    ]
    return [
        Figure(
            plot.change_map(table, value_label="z-score"),
            "Heat map of the z-scores of neighbouring cell types",
            "Red: cells of the two types are neighbours more often than with labels permuted within each section; "
            "blue: less often.",
            "Meetings of cell types",
        ),
        Table(
            ["cell type", "neighbour", "edges", "z-score"],
            rows,
            "Most and least frequent pairs.",
        ),
    ]


__all__ = ["niches"]
