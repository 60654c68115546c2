"""The pages of ``--report``: what each verb found, as sections of one self-contained HTML file.

Everything shown is read from what the verb made: the estimator, or the file it wrote. Nothing is computed anew but the
layout of maps, on a random part of the cells where there are very many.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellplm_jax.report import Figure, Section, Table, Text

DRAWN_CELLS = 5000
"""Cells of a map at most; a random part of more."""

NEIGHBORS = 15
"""Of the graph that maps are laid out by."""

LISTED = 20
"""Rows of a list that has no end."""


@dataclass(frozen=True)
class Page:
    """A page before it is written; see :func:`cellplm_jax.report.write_report`."""

    title: str
    summary: str
    sections: Sequence[Section]


# --- pieces ------------------------------------------------------------------------------------


def _facts(facts: Mapping[str, Any], heading: str = "Facts", caption: str = "") -> Table:
    """Return plain facts as a table of two columns; nested ones are left out."""
    rows = [
        (name.replace("_", " "), _shown(value))
        for name, value in facts.items()
        if isinstance(value, str | int | float | np.generic) and value != ""
    ]
    return Table(["", "value"], rows, heading=heading, caption=caption)


def _shown(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    return f"{float(value):.4g}" if isinstance(value, float | np.floating) else str(value)


def _messages(messages: Sequence[str]) -> list[Section]:
    """Return what the work had to say."""
    return [Text("\n\n".join(messages), heading="Remarks")] if messages else []


def _some(cells: int) -> np.ndarray:
    """Return which cells are drawn: all, or a random part, always the same."""
    if cells <= DRAWN_CELLS:
        return np.arange(cells)
    return np.sort(np.random.default_rng(0).choice(cells, DRAWN_CELLS, replace=False))


def _of(drawn: int, cells: int) -> str:
    return f"{cells:,} cells" if drawn == cells else f"{drawn:,} of {cells:,} cells, at random"


def _map(
    coordinates: np.ndarray,
    columns: Mapping[str, Any],
    caption: str,
    heading: str,
    name: str = "UMAP",
) -> list[Section]:
    """Return maps of cells, a picture a column."""
    from cellplm_jax import plot

    found: list[Section] = []
    for title, values in columns.items():
        axes = plot.umap(coordinates, values, title=title, axis_name=name)
        alt = f"{name} of the cells, coloured by {title}"
        found.append(Figure(axes, alt, caption, heading))
        caption, heading = "", ""
    return found


def _columns(obs: Any, names: Sequence[str | None], cells: np.ndarray) -> dict[str, Any]:
    """Return columns of ``obs`` for some cells, whole numbers and words as groups; the rarest beyond 30 together."""
    import pandas as pd

    found = {}
    for name in dict.fromkeys(name for name in names if name):
        column = obs[name].iloc[cells]
        if not pd.api.types.is_float_dtype(column.dtype):
            text = column.astype(object).where(column.notna(), "unknown").astype(str)
            often = text.value_counts().index[:30]
            column = pd.Categorical(text.where(text.isin(often), "others"))
        found[str(name)] = column
    return found


def _laid_out(embedding: np.ndarray, cells: np.ndarray) -> np.ndarray | None:
    """Return UMAP coordinates of some cells; None: too few, or not finite."""
    from cellplm_jax.evaluate.embedding import umap_coordinates

    chosen = np.asarray(embedding)[cells]
    if len(chosen) <= NEIGHBORS or not np.isfinite(chosen).all():
        return None
    return umap_coordinates(chosen, neighbors=NEIGHBORS)


def _no_map(heading: str) -> Text:
    return Text(f"Too few cells to lay out: a map needs more than {NEIGHBORS}.", heading=heading)


def _input(facts: Mapping[str, Any]) -> list[Section]:
    """Return what the counts turned out to be, from the facts of ``uns``."""
    read = facts.get("input") or {}
    genes = read.get("genes") or {}
    rows = [
        ("file", read.get("source")),
        ("counts", read.get("matrix")),
        ("stored as", read.get("storage")),
        ("gene names from", read.get("gene_key")),
        ("cells", _shown(read["cells"]) if "cells" in read else None),
        ("genes of the file that the model knows", _shown(genes["matched"]) if "matched" in genes else None),
        ("genes of the model that the file has", f"{_shown(genes['genes_matched'])} of {_shown(genes['vocabulary'])}"
         if "vocabulary" in genes else None),
        ("cells without counts", _shown(read["cells_without_counts"]) if "cells_without_counts" in read else None),
    ]  # fmt: skip
    context = facts.get("context") or {}
    rows += [
        (f"context: {name.replace('_', ' ')}", _shown(value))
        for name, value in context.items()
        if value
    ]
    kept = [(name, str(value)) for name, value in rows if value not in (None, "")]
    return [Table(["", "value"], kept, heading="Input")] if kept else []


def _curve(estimator: Any) -> list[Section]:
    """Return the history of a fit: the loss, and the score where there is one."""
    found: list[Section] = []
    for key in ("loss", "score"):
        names = {name for row in estimator.history for name in row}
        if names & {key, f"validation_{key}"}:
            found.append(
                Figure(
                    estimator.plot_history(key=key),
                    f"{key} over the epochs of the fit",
                    "Training values are running means over the faint raw ones; the dotted line is the epoch that was "
                    "kept." if key == "loss" else "",
                    "Fitting" if key == "loss" else None,
                )
            )  # fmt: skip
    return found


def _name(estimator: Any) -> str:
    return type(estimator).__name__


# --- pages of what was fitted --------------------------------------------------------------------


def fit(estimator: Any) -> Page:
    """Show a fitted estimator: facts, curve, remarks."""
    facts = estimator.facts
    return Page(
        f"{_name(estimator)}: fitted",
        f"Fitted to {_shown(facts.get('training_cells', facts.get('cells', 0)))} cells for "
        f"{estimator.task}.",
        [_facts(facts), *_curve(estimator), *_messages(estimator.messages)],
    )


def annotator(estimator: Any) -> Page:
    """Show a fitted annotator: the curve, and on its validation cells the scores, confusions and calibration."""
    from cellplm_jax import plot
    from cellplm_jax.evaluate.annotation import (
        annotation_scores,
        confusion_table,
        expected_calibration_error,
        per_class_scores,
    )

    facts = estimator.facts
    page = fit(estimator)
    summary = (
        f"{len(estimator.labels)} cell types learnt from {_shown(facts['training_cells'])} cells, "
        f"method {estimator.method}."
    )
    sections: list[Section] = []
    if estimator.validation is None:
        sections.append(
            Text("No cells were kept for validation, so nothing is known of how good the labels are.", "Scores")
        )  # fmt: skip
    else:
        codes, probabilities = estimator.validation
        labels = np.array(estimator.labels, object)
        truth, found = labels[codes], labels[probabilities.argmax(axis=1)]
        scores = {
            **annotation_scores(truth, found),
            "calibration_error": expected_calibration_error(truth, probabilities, estimator.labels),
        }
        summary += (
            f" On {len(codes):,} validation cells: accuracy {scores['accuracy']:.3f}, macro F1 "
            f"{scores['macro_f1']:.3f}."
        )
        note = (
            f"On {len(codes):,} validation cells, which the weights of the network never saw; when to stop, the "
            "temperature and the pooling were chosen on them, so new cells may do worse."
        )
        each = per_class_scores(truth, found)
        sections += [
            Table(["score", "value"], list(scores.items()), note, "Scores"),
            Table(
                ["cell type", *map(str, each.columns)],
                [[name, *row] for name, *row in each.itertuples()],
                "",
                "By cell type",
            ),
            Figure(
                plot.confusion_matrix(confusion_table(truth, found)),
                "Confusion matrix of true and predicted cell types",
                "Percent of the cells of a true type (row) that got a label (column).",
                "Confusions",
            ),
            Figure(
                plot.calibration(found == truth, probabilities.max(axis=1)),
                "Reliability diagram: share of right labels by confidence",
                "A point a tenth of confidence, with the number of its cells. On the dashed line confidence is what it "
                "says.",
                "Calibration",
            ),
        ]  # fmt: skip
    return Page("Cell types: fitted", summary, [*sections, *page.sections])


def imputer(estimator: Any) -> Page:
    """Show a fitted imputer: the curve and the confidence of every gene."""
    from cellplm_jax import plot

    page = fit(estimator)
    known = estimator.confidence.dropna().sort_values(ascending=False)
    sections: list[Section] = []
    if len(known):
        rows = list(known.items())
        if len(rows) > LISTED:
            rows = [*rows[: LISTED // 2], *rows[-LISTED // 2 :]]
        sections = [
            Figure(
                plot.histogram(known, value_label="confidence", counted="genes"),
                "Histogram of the confidence of the imputed genes",
                "Correlation of a gene with its measured values on held-out reference cells seen through the panel.",
                "How certain the genes are",
            ),
            Table(["gene", "confidence"], rows, "The most and the least certain genes.", "Genes"),
        ]
    facts = estimator.facts
    summary = f"{facts['imputed_genes']:,} genes are predicted from {facts['shared_genes']:,} measured ones."
    if "mean_confidence" in facts:
        summary += f" Mean confidence {facts['mean_confidence']:.3f}."
    return Page("Imputed genes: fitted", summary, [*sections, *page.sections])


# --- pages of files that were written ------------------------------------------------------------


def embedding(path: str | os.PathLike, key: str, colors: Sequence[str]) -> Page:
    """Show embedded cells: what they were, and a UMAP."""
    from cellplm_jax.tasks.embed import read_annotations

    cells = read_annotations(path, obsm=[key], uns=["cellplm"])
    facts = cells.uns.get("cellplm", {})
    z = np.asarray(cells.obsm[key])
    drawn = _some(len(z))
    coordinates = _laid_out(z, drawn)
    sections: list[Section] = [_no_map("The embedding")]
    if coordinates is not None:
        columns = _columns(cells.obs, colors, drawn) or {
            "all cells": np.full(len(drawn), "cells", object)
        }
        caption = f"UMAP of obsm['{key}'], {_of(len(drawn), len(z))}. For looking at: distances mean little."
        sections = _map(coordinates, columns, caption, "The embedding")
    return Page(
        f"Embedding of {Path(path).name}",
        f"{len(z):,} cells in {z.shape[1]} dimensions, by {facts.get('model', 'a model')}.",
        [*sections, *_input(facts), *_messages(list((facts.get('input') or {}).get('notes', [])))],
    )  # fmt: skip


def clusters(cells: Any, columns: Sequence[str], key: str, scores: Mapping[str, float]) -> Page:
    """Show clustered cells: a UMAP a column, sizes, scores."""
    from cellplm_jax import plot

    cluster = columns[0]
    sizes = cells.obs[cluster].value_counts()
    drawn = _some(cells.n_obs)
    shown = _columns(cells.obs, columns, drawn)
    caption = f"UMAP of obsm['{key}'], {_of(len(drawn), cells.n_obs)}."
    sections = _map(np.asarray(cells.obsm["X_umap"])[drawn], shown, caption, "Clusters")
    bars = {f"cluster {name}": int(count) for name, count in sizes.items()}
    sections.append(
        Figure(plot.table_bars(bars, value_label="cells"), "Cells of every cluster", "", "Sizes")
    )
    if scores:
        sections.append(
            Table(
                ["score", "value"],
                list(scores.items()),
                "Against the columns that were named; clusters never see them. Higher is better.",
                "Scores",
            )
        )
    return Page("Clusters", f"{cells.n_obs:,} cells in {len(sizes)} clusters.", sections)


def integrated(
    path: str | os.PathLike, key: str, columns: Sequence[str], scores: Mapping[str, float]
) -> Page:
    """Show an integrated embedding by batch, beside one from before where the file has it."""
    from cellplm_jax.tasks.embed import read_annotations

    before = ("X_cellplm", "X_pca")
    cells = read_annotations(path, obsm=[key, *before], uns=["cellplm_integration"])
    drawn = _some(cells.n_obs)
    known = [name for name in columns if name in cells.obs.columns]
    shown = _columns(cells.obs, known, drawn) or {"all cells": np.full(len(drawn), "cells", object)}
    sections: list[Section] = []
    first = next((name for name in before if name in cells.obsm), None)
    for name, heading in ((first, "Before"), (key, "Integrated")):
        if name is None:
            continue
        coordinates = _laid_out(cells.obsm[name], drawn)
        caption = f"UMAP of obsm['{name}'], {_of(len(drawn), cells.n_obs)}."
        if coordinates is None:
            sections.append(_no_map(heading))
        else:
            sections += _map(coordinates, shown, caption, heading)
    if first is None:
        sections.append(
            Text("The file has neither obsm['X_cellplm'] nor obsm['X_pca'], so there is nothing to compare with: run "
                 "cellplm embed on it first.", "Before")
        )  # fmt: skip
    if scores:
        sections.append(Table(["score", "value"], list(scores.items()), "", "Scores"))
    facts = cells.uns.get("cellplm_integration", {})
    summary = f"{cells.n_obs:,} cells" + (f", batches of '{known[0]}'." if known else ".")
    return Page("Integrated embedding", summary, [*sections, *_input(facts)])


def annotated(path: str | os.PathLike, estimator: Any) -> Page:
    """Show predicted cell types: counts, confidences, a UMAP."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.annotate import CONFIDENCE, FACTS, LABEL
    from cellplm_jax.tasks.embed import read_annotations

    cells = read_annotations(path, obsm=["X_umap"], uns=[FACTS])
    labels, confidence = cells.obs[LABEL].astype(str), cells.obs[CONFIDENCE].to_numpy(float)
    counts = labels.value_counts()
    mean = cells.obs.groupby(labels.to_numpy(), observed=True)[CONFIDENCE].mean()
    drawn = _some(cells.n_obs)
    sections: list[Section] = [
        Table(
            ["cell type", "cells", "share", "mean confidence"],
            [(name, int(n), n / cells.n_obs, float(mean[name])) for name, n in counts.items()],
            "",
            "Cell types",
        ),
        Figure(
            plot.histogram(confidence, value_label="confidence", limits=(0.0, 1.0)),
            "Histogram of the confidence of the cells",
            "Probability of the label a cell got, calibrated on validation cells where there were any.",
            "Confidence",
        ),
    ]
    if "X_umap" in cells.obsm:
        shown = _columns(cells.obs, [LABEL], drawn) | {CONFIDENCE: confidence[drawn]}
        caption = f"UMAP of the tuned embedding, {_of(len(drawn), cells.n_obs)}; obsm['X_umap']."
        sections += _map(np.asarray(cells.obsm["X_umap"])[drawn], shown, caption, "Map")
    else:
        sections.append(_no_map("Map"))
    low = float(np.mean(confidence < 0.5))
    return Page(
        f"Cell types of {Path(path).name}",
        f"{cells.n_obs:,} cells of {len(counts)} types; median confidence {np.median(confidence):.2f}, "
        f"{low:.0%} of the cells below one half.",
        [*sections, *_input(cells.uns.get(FACTS, {}))],
    )


def imputed(path: str | os.PathLike, estimator: Any) -> Page:
    """Show imputed genes: confidence and mean of each, and maps of the most certain ones."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.embed import read_annotations
    from cellplm_jax.tasks.impute import FACTS, IMPUTED

    spatial_key = estimator.reading.spatial_key or "spatial"
    cells = read_annotations(path, obsm=[IMPUTED, spatial_key], uns=[FACTS])
    values = cells.obsm[IMPUTED]
    confidence = estimator.confidence.reindex(values.columns)
    order = confidence.sort_values(ascending=False, na_position="last").index
    mean, top = values.mean(axis=0), values.max(axis=0)
    sections: list[Section] = [
        Table(
            ["gene", "confidence", "mean", "largest"],
            [(gene, confidence[gene], float(mean[gene]), float(top[gene])) for gene in order[:LISTED]],
            f"The {min(LISTED, len(order))} most certain of {len(order)} genes; expected values of the cells.",
            "Imputed genes",
        )
    ]  # fmt: skip
    if spatial_key in cells.obsm:
        drawn = _some(cells.n_obs)
        points = np.asarray(cells.obsm[spatial_key], np.float64)[drawn, :2]
        there = np.isfinite(points).all(axis=1)
        for number, gene in enumerate(order[:3]):
            if there.any():
                axes = plot.spatial(
                    points[there], values[gene].to_numpy(float)[drawn][there], title=str(gene),
                    color_label="imputed",
                )  # fmt: skip
                heading = "In the tissue" if number == 0 else None
                sections.append(Figure(axes, f"{gene} as imputed, in the tissue", "", heading))
    return Page(
        f"Imputed genes of {Path(path).name}",
        f"{len(order):,} genes predicted for {cells.n_obs:,} cells. How certain each is was found on reference cells, "
        "not on these.",
        [*sections, *_input(cells.uns.get(FACTS, {}))],
    )


def denoised(path: str | os.PathLike, estimator: Any) -> Page:
    """Show denoised counts: how the genes' means and zeros changed."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.denoise import FACTS, LAYER, layer_summary
    from cellplm_jax.tasks.embed import read_annotations

    cells = read_annotations(path, uns=[FACTS])
    summary = layer_summary(path, LAYER)
    sections: list[Section] = [_facts(summary, "Expected counts")]
    sections.append(
        Figure(
            plot.histogram(
                np.log10(np.maximum(summary["gene_means"], 1e-6)),
                value_label="log10 of the mean expected count",
                counted="genes",
            ),
            "Histogram of the mean expected count of the genes",
            f"Of {summary['genes']:,} genes over the first {summary['cells_read']:,} cells.",
        )
    )
    return Page(
        f"Denoised counts of {Path(path).name}",
        f"layers['{LAYER}']: expected counts of {cells.n_obs:,} cells.",
        [*sections, *_input(cells.uns.get(FACTS, {})), *_messages(estimator.messages)],
    )


def perturbed(found: Any) -> Page:
    """Show predicted changes: the genes that change most, as a map and a table."""
    from cellplm_jax import plot
    from cellplm_jax.data.genes import symbols_of

    change = found.change.iloc[:30]
    names = dict(zip(change.columns, symbols_of(list(map(str, change.columns))), strict=True))
    largest = change.abs().max(axis=0).sort_values(ascending=False).index[:30]
    rows = []
    for perturbation, values in change.iterrows():
        order = values.abs().sort_values(ascending=False).index[:5]
        listed = ", ".join(f"{names[gene]} {values[gene]:+.2f}" for gene in order)
        rows.append(
            (perturbation, found.known[perturbation], float(np.sqrt((values**2).mean())), listed)
        )
    more = "" if len(found.change) <= 30 else f" The first 30 of {len(found.change)} perturbations."
    return Page(
        "Predicted perturbations",
        f"Changes of {found.change.shape[1]:,} genes under {len(found.change):,} perturbations, to control cells."
        f"{more}",
        [
            Figure(
                plot.change_map(change[largest].rename(columns=names)),
                "Map of the changes of the genes that change most",
                "Change of mean log-normalised expression; the genes with the largest change anywhere.",
                "Changes",
            ),
            Table(
                ["perturbation", "known", "size (rms)", "largest changes"],
                rows,
                "Known: whether it, or its parts, were in the training data.",
                "Perturbations",
            ),
            *_messages(found.messages),
        ],
    )  # fmt: skip


def samples(path: str | os.PathLike, table: Any, estimator: Any) -> Page:
    """Show labelled samples, and how their cells speak for the label."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.embed import read_annotations
    from cellplm_jax.tasks.samples import CONTRIBUTION, FACTS

    cells = read_annotations(path, uns=[FACTS])
    counts = table["label"].value_counts()
    rows = [
        (name, str(row["label"]), float(row["confidence"]), int(row["cells"]))
        for name, row in table.iterrows()
    ]
    found = ", ".join(f"{n} {label}" for label, n in counts.items() if n)
    return Page(
        f"Samples of {Path(path).name}",
        f"{len(table):,} samples: {found}.",
        [
            Table(["sample", "label", "confidence", "cells"], rows, "", "Samples"),
            Figure(
                plot.histogram(cells.obs[CONTRIBUTION], value_label="contribution"),
                "Histogram of the contributions of the cells",
                "How much a cell speaks for its sample's label (below 0: against it).",
                "Which cells decide",
            ),
            *_input(cells.uns.get(FACTS, {})),
            *_messages(estimator.messages),
        ],
    )


# --- pages of corpora and models -----------------------------------------------------------------


def corpus(facts: Mapping[str, Any]) -> Page:
    """Show a corpus: its parts, from :func:`cellplm_jax.tasks.info.describe_corpus`."""
    from cellplm_jax import plot

    totals = facts["totals"]
    columns = ("dataset", "samples", "cells", "genes_measured", "spatial_samples", "labels")
    rows = [[row[name] for name in columns] for row in facts["datasets"]]
    largest = sorted(facts["datasets"], key=lambda row: -row["cells"])[:LISTED]
    notes = [f"{row['dataset']}: {note}" for row in facts["datasets"] for note in row["notes"]]
    reported = {name: n for name, n in facts["counters"].items() if n}
    return Page(
        f"Corpus {Path(facts['path']).name}",
        f"{totals['cells']:,} cells in {totals['samples']:,} samples ({totals['spatial_samples']:,} spatial), "
        f"{facts['vocabulary']['genes']:,} genes.",
        [
            Table([name.replace("_", " ") for name in columns], rows, "", "Data sets"),
            Figure(
                plot.table_bars({row["dataset"]: row["cells"] for row in largest}, value_label="cells"),
                "Cells of the largest data sets",
                "",
                "Sizes",
            ),
            _facts({**totals, **reported, "bytes": facts["bytes"] or "", "fingerprint": facts["fingerprint"]}),
            *_messages(notes),
        ],
    )  # fmt: skip


def model(source: str | os.PathLike, facts: Mapping[str, Any]) -> Page:
    """Show a model: its card, parameters, configuration, and the curves of its run where they are there."""
    from cellplm_jax import plot
    from cellplm_jax.train.metrics import read_metrics

    parameters = {name: n for name, n in facts["parameters"].items() if name != "total"}
    sections: list[Section] = [
        _facts(facts["card"], "Card"),
        Figure(
            plot.table_bars(parameters, value_label="parameters"),
            "Parameters of every module",
            f"{facts['parameters']['total']:,} in all.",
            "Parameters",
        ),
    ]
    metrics = Path(source).expanduser() / "metrics.jsonl"
    if metrics.is_file():
        rows = list(read_metrics(metrics))
        sections.append(
            Figure(
                plot.run_picture(rows),
                "Curves of the run",
                "Training values are running means over their faint raw values.",
                "Run",
            )
        )
    flat = [
        (f"{name}.{key}" if isinstance(value, dict) else name, str(item))
        for name, value in facts["config"].items()
        for key, item in (value.items() if isinstance(value, dict) else [("", value)])
    ]
    sections.append(Table(["", "value"], flat, "", "Configuration"))
    return Page(
        f"Model {facts['id']}",
        f"{facts['parameters']['total']:,} parameters, {facts['genes']['count']:,} genes"
        + (f", step {facts['step']:,}." if facts["step"] else "."),
        sections,
    )
