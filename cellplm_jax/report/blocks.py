"""Building blocks of reports: tables of facts and scores, maps, marker genes, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellplm_jax.errors import InputError
from cellplm_jax.plot.style import categories_of, natural_key
from cellplm_jax.report.html import Figure, Section, Table, Text

DRAWN_CELLS = 5000
"""Maximum number of cells on a map; larger sets are sampled."""

DRAWN_GENES = 6
"""Maximum number of named genes to draw."""

NEIGHBORS = 15
"""Number of neighbours for UMAP."""

LISTED = 20
"""Maximum number of rows of long lists."""

NAMES = {
    "label_key": "column with the labels",
    "perturbation_key": "column with the perturbations",
    "covariate_key": "column with the groups",
    "sample_key": "column with the samples",
    "epochs": "epochs run",
    "best_epoch": "selected epoch",
    "stopped_early": "stopped before the last epoch",
    "seconds": "time of the fit (s)",
    "shared_genes": "genes shared by panel and reference",
    "mean_confidence": "mean confidence (correlation)",
    "genes_with_confidence": "genes with a confidence",
    "stretch": "factor of log-normalised deviations from the gene mean in the target",
    "interval_factor": "widening of the 90 % intervals",
    "validation_loss": "loss on validation cells (nats per cell, lower is better)",
    "validation_f1": "macro F1 on validation cells, network only",
    "validation_f1_linear": "macro F1 on validation cells, logistic regression only",
    "validation_f1_pooled": "macro F1 on validation cells, average of both",
    "strength": "mixing strength",
    "left_out_perturbations_rmse": "error on left-out perturbations (RMSE of changes)",
    "left_out_perturbations_rmse_of_mean_change": "the same for the mean change of the others",
    "left_out_perturbations_rmse_of_no_change": "the same for no change",
    "left_out_rmse": "error on left-out perturbations as predict computes it (mean RMSE)",
    "left_out_rmse_mean_change": "the same for the mean change of the others",
    "left_out_rmse_additive": "the same for the sum of the measured targets",
    "left_out_rmse_no_change": "the same for no change",
    "left_out_groups_rmse": "error on left-out groups (RMSE of changes)",
    "left_out_groups_rmse_of_mean_change": "the same for the mean change of the others",
    "left_out_samples_cross_entropy": "cross-entropy on left-out samples (nats, lower is better)",
    "cross_entropy_of_frequencies": "the same for guessing by label frequency",
    "type_key": "column with the cell types",
    "smallest_p": "smallest p-value that this number of samples allows",
    "arrangements": "arrangements of the labels that were compared",
    "p_latent": "p of the labels by the mean latent (permuted labels)",
    "p_proportions": "p of the labels by the proportions of cell types",
    "p_pseudobulk": "p of the labels by pseudobulk profiles (baseline)",
    "p_shift": "smallest p of a shift of a cell type, corrected for their number",
    "left_out_error_latent": "error on left-out samples by the mean latent (1: as label frequencies)",
    "left_out_error_proportions": "the same by the proportions of cell types",
    "left_out_error_pseudobulk": "the same by pseudobulk profiles (baseline)",
    "shift_agreement_with_pseudobulk": "rank correlation of the shifts of types in latents and in pseudobulk",
    "nonzeros": "non-zero counts",
    "unknown_genes": "unknown gene names in the files",
    "genes_outside_vocabulary": "genes of the files outside the vocabulary",
    "megabytes": "size on disk (MB)",
}
"""Descriptions of facts whose names are not self-explanatory."""

TISSUES = 4
"""Maximum number of tissue samples with a map."""

MARKERS = 5
"""Number of marker genes per group in tables."""

DOTS = 36
"""Maximum number of genes of a dot plot, about."""

TASKS = {
    "annotation": "Cell types",
    "imputation": "Imputed genes",
    "denoising": "Denoising",
    "integration": "Integration",
    "perturbation": "Perturbations",
    "samples": "Tissue samples",
}
"""Names of the estimators' tasks in reports."""


SCORES = {
    "accuracy": ("accuracy", "fraction of cells with the correct type"),
    "macro_accuracy": (
        "macro accuracy",
        "fraction of each type's cells with the correct type, mean of the types",
    ),
    "macro_f1": ("macro F1", "harmonic mean of precision and recall, mean of the types; 1 is best"),
    "weighted_f1": ("weighted F1", "the same, types weighted by their cells"),
    "macro_precision": (
        "macro precision",
        "fraction of correct cells per predicted label, mean of the types",
    ),
    "weighted_precision": ("weighted precision", "the same, types weighted by their cells"),
    "calibration_error": (
        "calibration error",
        "difference between confidence and accuracy; 0 is best",
    ),
    "ari": ("ARI", "agreement of clusters and types; 1: identical, 0: chance"),
    "nmi": ("NMI", "mutual information of clusters and types; 1: complete, 0: none"),
    "knn_accuracy": (
        "kNN accuracy",
        "fraction of cells whose nearest cells are mostly of the same type",
    ),
    "label_silhouette": (
        "silhouette of types",
        "1: types are far from each other, 0: they touch, below: mixed",
    ),
    "ilisi": ("iLISI", "batches around each cell; 1: evenly mixed, 0: one only"),
    "kbet": ("kBET", "fraction of cells around which batches are mixed as overall"),
    "kbet_per_label": (
        "kBET within types",
        "the same among the cells of each type, mean of the types",
    ),
    "batch_silhouette": ("overlap of batches", "within types; 1: complete overlap, 0: separated"),
    "clusters": ("clusters", "number of clusters"),
}
"""Display names and descriptions of scores."""

SAME = ("micro_f1", "macro_recall", "weighted_recall")
"""Scores that equal accuracy or macro accuracy if every cell has one label."""


@dataclass(frozen=True)
class Page:
    """Contents of a report; see :func:`cellplm_jax.report.html.write_report`."""

    title: str
    summary: str
    sections: Sequence[Section]


def facts_table(facts: Mapping[str, Any], heading: str = "Facts", caption: str = "") -> Table:
    """Return plain facts as a table of two columns; nested ones are omitted."""
    rows = [
        (NAMES.get(name, name.replace("_", " ")), shown(value))
        for name, value in facts.items()
        if isinstance(value, str | int | float | np.generic) and value != ""
    ]
    return Table(["", "value"], rows, heading=heading, caption=caption)


def shown(value: Any) -> str:
    """Return a value as text."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    return f"{float(value):.4g}" if isinstance(value, float | np.floating) else str(value)


def messages(messages: Sequence[str]) -> list[Section]:
    """Return the messages of the work."""
    said = [message for message in messages if message != "Initialised parameters: none."]
    return [Text("\n\n".join(said), heading="Messages")] if said else []


def scores_table(
    scores: Mapping[str, float],
    caption: str,
    heading: str = "Scores",
    baseline: tuple[str, Mapping[str, float]] | None = None,
) -> Table:
    """Return scores as a table with their descriptions, and a baseline next to them.

    Args:
        scores: Name -> value.
        caption: One sentence under the table.
        heading: Heading above it.
        baseline: Name of a simple method, and its scores of the same cells.
    """
    method, simple = baseline or ("", {})
    rows = []
    for key, value in scores.items():
        if key in SAME:
            continue
        name, meaning = SCORES.get(key, (key.replace("_", " "), ""))
        other = [simple.get(key)] if simple else []
        rows.append((name, float(value), *other, meaning))
    columns = ["score", "here", method] if simple else ["score", "value"]
    return Table([*columns, "meaning"], rows, caption, heading)


def named(genes: Sequence[Any]) -> list[str]:
    """Return the symbols of genes, if known."""
    from cellplm_jax.data.genes import symbols_of

    return symbols_of([str(gene) for gene in genes])


def some(cells: int) -> np.ndarray:
    """Return the cells to draw: all, or a reproducible random subset."""
    if cells <= DRAWN_CELLS:
        return np.arange(cells)
    return np.sort(np.random.default_rng(0).choice(cells, DRAWN_CELLS, replace=False))


def of_cells(drawn: int, cells: int) -> str:
    """Return how many of the cells are drawn, as text."""
    return f"{cells:,} cells" if drawn == cells else f"{drawn:,} of {cells:,} cells, at random"


def cell_map(
    coordinates: np.ndarray,
    columns: Mapping[str, Any],
    caption: str,
    heading: str,
    name: str = "UMAP",
    palettes: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Section]:
    """Return maps of cells, one figure per column; without columns one without colours.

    Args:
        coordinates: float [cells, 2].
        columns: Title -> values [cells].
        caption: Caption of the first figure.
        heading: Heading above it.
        name: Name of the axes.
        palettes: Title -> label -> colour, from :func:`palettes_of`.
    """
    from cellplm_jax import plot

    figures: list[Section] = []
    if not columns:
        one = np.full(len(coordinates), "cells", object)
        axes = plot.umap(coordinates, one, axis_name=name, legend=False)
        return [Figure(axes, f"{name} of the cells", caption, heading)]
    for title, values in columns.items():
        palette = (palettes or {}).get(title)
        short = max(map(len, palette or ["long name"])) <= len("unknown")
        axes = plot.umap(
            coordinates,
            values,
            title=title,
            axis_name=name,
            palette=palette,
            legend="below",
            label_groups=short,
        )
        alt = f"{name} of the cells, coloured by {title}"
        figures.append(Figure(axes, alt, caption, heading))
        caption, heading = "", ""
    return figures


def tissue_maps(
    cells: Any,
    columns: Mapping[str, Any],
    drawn: np.ndarray,
    *,
    spatial_key: str = "spatial",
    sample_key: str | None = None,
    palettes: Mapping[str, Mapping[str, str]] | None = None,
    heading: str = "In the tissue",
) -> list[Section]:
    """Return tissue maps of cells with coordinates, one figure per column; no section without coordinates.

    Args:
        cells: AnnData with ``obs`` and ``obsm``.
        columns: Title -> values of the drawn cells.
        drawn: Numbers of the drawn cells.
        spatial_key: Key of ``obsm`` with the coordinates.
        sample_key: Column of ``obs`` with the tissue sample; the largest ones get a panel each.
        palettes: Title -> label -> colour, from :func:`palettes_of`.
        heading: Heading above the first figure.
    """
    from cellplm_jax import plot

    if spatial_key not in cells.obsm or not columns:
        return []
    points = np.asarray(cells.obsm[spatial_key], np.float64)[drawn, :2]
    sample = np.full(len(points), "", object)
    if sample_key is not None and sample_key in cells.obs:
        sample = cells.obs[sample_key].iloc[drawn].astype(str).to_numpy(object)
    finite = np.isfinite(points).all(axis=1)
    names, sizes = np.unique(sample[finite].astype(str), return_counts=True)
    if not len(names) or sizes.max() < 2:
        return []
    largest = sorted(names[np.argsort(-sizes, kind="stable")[:TISSUES]], key=natural_key)
    scale = plot.scale_of(cells)
    figures: list[Section] = []
    for title, values in columns.items():
        panels = [finite & (sample.astype(str) == name) for name in largest]
        with plot.panels([points[own] for own in panels]) as grid:
            for place, (ax, own, name) in enumerate(zip(grid, panels, largest, strict=True)):
                plot.spatial(
                    points[own],
                    values[own],
                    ax=ax,
                    palette=(palettes or {}).get(title),
                    title=f"{title}, {name}" if name else title,
                    micrometres_per_unit=scale,
                    legend="below" if place == 0 else False,
                )
        caption = ""
        if not figures and len(names) > len(largest):
            caption = f"The {len(largest)} largest of {len(names)} samples."
        alt = f"The cells in the tissue, coloured by {title}"
        figures.append(Figure(grid[0], alt, caption, None if figures else heading))
    return figures


def palettes_of(cells: Any, names: Sequence[str | None]) -> dict[str, dict[str, str]]:
    """Return the colours of columns of ``obs``: stored ones, or those of every other picture of the column.

    Args:
        cells: AnnData with the complete columns, and ``uns["<column>_colors"]`` if the file has them.
        names: Columns; None and continuous ones are left out.
    """
    import pandas as pd

    from cellplm_jax.plot.style import UNKNOWN_COLOR, category_colors

    found = {}
    for name in dict.fromkeys(name for name in names if name):
        if not pd.api.types.is_float_dtype(cells.obs[name].dtype):
            colors = category_colors(cells.obs[name], cells.uns.get(f"{name}_colors"))
            found[name] = {**colors, "others": UNKNOWN_COLOR, "unknown": UNKNOWN_COLOR}
    return found


def color_keys(names: Sequence[str | None]) -> list[str]:
    """Return the keys of ``uns`` with the colours of columns."""
    return [f"{name}_colors" for name in names if name]


def columns_of(obs: Any, names: Sequence[str | None], cells: np.ndarray) -> dict[str, Any]:
    """Return columns of ``obs`` for some cells, integers and text as groups; the rarest beyond 30 are merged."""
    import pandas as pd

    found = {}
    for name in dict.fromkeys(name for name in names if name):
        column = obs[name].iloc[cells]
        if not pd.api.types.is_float_dtype(column.dtype):
            order = [str(label) for label in categories_of(obs[name]).categories]
            text = column.astype(object).where(column.notna(), "unknown").astype(str)
            often = set(text.value_counts().index[:30])
            chosen = text.where(text.isin(often), "others")
            kept = [label for label in order if label in set(chosen)]
            last = [n for n in ("unknown", "others") if n in set(chosen) and n not in kept]
            column = pd.Categorical(chosen, [*kept, *last])
        found[str(name)] = column
    return found


def marker_sections(
    counts: Any,
    genes: Sequence[str],
    groups: Any,
    what: str = "cluster",
) -> list[Section]:
    """Return the marker genes of groups of cells: a table and a dot plot; no section for a single group.

    Args:
        counts: Raw counts [cells, genes].
        genes: Names of the genes.
        groups: Categorical [cells].
        what: Name of a group, singular.
    """
    from cellplm_jax import plot
    from cellplm_jax.evaluate.markers import group_means, marker_genes

    if len(groups.remove_unused_categories().categories) < 2:
        return []
    found = marker_genes(counts, groups, genes, number=MARKERS)
    if found.empty:
        return []
    rows = []
    for name, own in found.groupby("group", sort=False, observed=True):
        best = own.iloc[0]
        rows.append(
            (name, ", ".join(own["gene"]), f"{best['share']:.0%}", f"{best['share_elsewhere']:.0%}")
        )
    groups_drawn = found["group"].nunique()
    each = max(1, min(3, DOTS // groups_drawn))
    first = found.groupby("group", sort=False, observed=True).head(each)
    shown_genes = list(dict.fromkeys(first["gene"]))
    places = [list(genes).index(gene) for gene in shown_genes]
    means, shares = (part.iloc[:, places] for part in group_means(counts, groups, genes))
    return [
        Table(
            [what, "marker genes", "cells with the first", "elsewhere"],
            rows,
            f"Genes that are higher in a {what} than in all other cells, the strongest first (Welch's t statistic; at "
            "least 1.5 times higher, with a count in a quarter of its cells). Ribosomal and mitochondrial genes are "
            "left out.",
            "Marker genes",
        ),
        Figure(
            plot.dot_plot(means, shares),
            f"Dot plot of the marker genes per {what}",
            f"Up to {each} markers per {what}. Area: share of cells with a count. Colour: mean expression of the gene, "
            f"from the lowest to the highest {what}.",
        ),
    ]


def component_scores(
    counts: Any,
    columns: Mapping[str, Any],
    resolution: float = 1.0,
) -> dict[str, float]:
    """Return the scores of principal components of the same cells, as the baseline of an embedding.

    Args:
        counts: Raw counts [cells, genes].
        columns: ``"labels"`` and ``"batches"`` [cells], as far as they are known.
        resolution: Resolution of Leiden.

    Returns:
        As :func:`cellplm_jax.evaluate.embedding.integration_scores`; empty if there are too few cells.
    """
    from cellplm_jax.evaluate.embedding import integration_scores, pca_baseline

    batches = columns.get("batches")
    if batches is not None and len(set(batches)) < 2:
        batches = None
    try:
        components = pca_baseline(counts)
        return integration_scores(components, batches, columns.get("labels"), resolution=resolution)
    except InputError:
        return {}


def telling(obs: Any) -> list[str]:
    """Return up to two different text columns with 2 to 30 groups: the default colours of a map."""
    import pandas as pd

    chosen: list[str] = []
    for name, column in obs.items():
        words = column.astype(str)
        if pd.api.types.is_numeric_dtype(column.dtype) or not 2 <= column.nunique() <= 30:
            continue
        if not any(words.equals(obs[other].astype(str)) for other in chosen):
            chosen.append(str(name))
    return chosen[:2]


def laid_out(embedding: np.ndarray, cells: np.ndarray) -> np.ndarray | None:
    """Return UMAP coordinates of some cells; None: too few, or not finite."""
    from cellplm_jax.evaluate.embedding import umap_coordinates

    chosen = np.asarray(embedding)[cells]
    if len(chosen) <= NEIGHBORS or not np.isfinite(chosen).all():
        return None
    return umap_coordinates(chosen, neighbors=NEIGHBORS)


def no_map(heading: str) -> Text:
    """Return the text in place of a map of too few cells."""
    return Text(f"Too few cells for a map: it requires more than {NEIGHBORS}.", heading=heading)


def _share(facts: Mapping[str, Any], part: str, whole: str) -> str | None:
    """Return "3 of 4" from two facts; None: one is missing."""
    if part not in facts or whole not in facts:
        return None
    return f"{shown(facts[part])} of {shown(facts[whole])}"


def input_table(facts: Mapping[str, Any]) -> list[Section]:
    """Return a summary of the input counts, from the facts of ``uns``."""
    read = facts.get("input") or {}
    genes = read.get("genes") or {}
    rows = [
        ("file", read.get("source")),
        ("counts", read.get("matrix")),
        ("stored as", read.get("storage")),
        ("gene names from", read.get("gene_key")),
        ("cells", shown(read["cells"]) if "cells" in read else None),
        ("genes of the file in the vocabulary", _share(genes, "matched", "names")),
        ("genes of the vocabulary in the file", _share(genes, "genes_matched", "vocabulary")),
        (
            "cells without counts",
            shown(read["cells_without_counts"]) if "cells_without_counts" in read else None,
        ),
    ]
    context = facts.get("context") or {}
    rows += [
        (f"context: {name.replace('_', ' ')}", shown(value))
        for name, value in context.items()
        if value
    ]
    kept = [(name, str(value)) for name, value in rows if value not in (None, "")]
    return [Table(["", "value"], kept, heading="Input")] if kept else []


def curve(estimator: Any) -> list[Section]:
    """Return the history of a fit: the loss, and the score if it is another quantity."""
    from cellplm_jax import plot

    history = estimator.history
    best = estimator.facts.get("best_epoch")
    names = {name for row in history for name in row}
    pictures: list[tuple[str, list[dict[str, float]], str]] = []
    if names & {"loss", "validation_loss"}:
        note = "Loss in nats per cell, lower is better"
        if _apart(history):
            # Training and validation loss are over different entries: on one axis both would be flat.
            pictures = [
                ("loss", _without(history, "validation_loss"), f"{note}, of the training cells."),
                (
                    "loss",
                    _without(history, "loss"),
                    f"{note}, of hidden entries of the validation cells.",
                ),
            ]
        else:
            pictures = [("loss", list(history), f"{note}.")]
    mirrored = all(
        row.get("validation_score") in (None, -row.get("validation_loss", np.nan))
        for row in history
    )
    if names & {"score", "validation_score"} and not mirrored:
        pictures.append(("score", list(history), "Score, higher is better."))
    figures: list[Section] = []
    for key, rows, caption in pictures:
        if not figures:
            caption += " The dotted line marks the selected epoch"
            caption += "; strong lines are running means." if len(rows) > 40 else "."
        axes = plot.fitting_curves(rows, key=key, best_epoch=best)
        heading = None if figures else "Fitting"
        figures.append(Figure(axes, f"{key} over the epochs of the fit", caption, heading))
    return figures


def _apart(history: Sequence[Mapping[str, float]]) -> bool:
    """Return whether training and validation losses differ too much for one axis."""
    sides = [[row[name] for row in history if name in row] for name in ("loss", "validation_loss")]
    if not all(sides):
        return False
    low, high = sorted(sides, key=max)
    return max(low) < min(high) - 3 * max(np.ptp(low), np.ptp(high))


def _without(history: Sequence[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """Return a history without one quantity."""
    return [{key: value for key, value in row.items() if key != name} for row in history]
