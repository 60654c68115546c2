"""The contents of ``--report``: the results of each command as sections of one HTML file.

Everything is read from the estimator or the output file of the command. Only the layout of UMAPs is computed, on a
random subset if there are many cells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
    "validation_loss": "loss on validation cells (nats per cell, lower is better)",
    "validation_f1": "macro F1 on validation cells, network only",
    "validation_f1_linear": "macro F1 on validation cells, logistic regression only",
    "validation_f1_pooled": "macro F1 on validation cells, average of both",
    "strength": "mixing strength",
    "left_out_perturbations_rmse": "error on left-out perturbations (RMSE of changes)",
    "left_out_perturbations_rmse_of_mean_change": "the same for the mean change of the others",
    "left_out_groups_rmse": "error on left-out groups (RMSE of changes)",
    "left_out_groups_rmse_of_mean_change": "the same for the mean change of the others",
    "left_out_samples_cross_entropy": "cross-entropy on left-out samples (nats, lower is better)",
    "cross_entropy_of_frequencies": "the same for guessing by label frequency",
    "nonzeros": "non-zero counts",
    "unknown_genes": "unknown gene names in the files",
    "genes_outside_vocabulary": "genes of the files outside the vocabulary",
    "megabytes": "size on disk (MB)",
}
"""Descriptions of facts whose names are not self-explanatory."""

TASKS = {
    "annotation": "Cell types", "imputation": "Imputed genes", "denoising": "Denoising",
    "integration": "Integration", "perturbation": "Perturbations", "samples": "Tissue samples",
}  # fmt: skip
"""Names of the estimators' tasks in reports."""


SCORES = {
    "accuracy": ("accuracy", "fraction of cells with the correct type"),
    "macro_accuracy": ("macro accuracy", "fraction of each type's cells with the correct type, mean of the types"),
    "macro_f1": ("macro F1", "harmonic mean of precision and recall, mean of the types; 1 is best"),
    "weighted_f1": ("weighted F1", "the same, types weighted by their cells"),
    "macro_precision": ("macro precision", "fraction of correct cells per predicted label, mean of the types"),
    "weighted_precision": ("weighted precision", "the same, types weighted by their cells"),
    "calibration_error": ("calibration error", "difference between confidence and accuracy; 0 is best"),
    "ari": ("ARI", "agreement of clusters and types; 1: identical, 0: chance"),
    "nmi": ("NMI", "mutual information of clusters and types; 1: complete, 0: none"),
    "knn_accuracy": ("kNN accuracy", "fraction of cells whose nearest cells are mostly of the same type"),
    "label_silhouette": ("silhouette of types", "1: types are far from each other, 0: they touch, below: mixed"),
    "ilisi": ("iLISI", "batches around each cell; 1: evenly mixed, 0: one only"),
    "kbet": ("kBET", "fraction of cells around which batches are mixed as overall"),
    "kbet_per_label": ("kBET within types", "the same among the cells of each type, mean of the types"),
    "batch_silhouette": ("overlap of batches", "within types; 1: complete overlap, 0: separated"),
    "clusters": ("clusters", "number of clusters"),
}  # fmt: skip
"""Display names and descriptions of scores."""

SAME = ("micro_f1", "macro_recall", "weighted_recall")
"""Scores that equal accuracy or macro accuracy if every cell has one label."""


@dataclass(frozen=True)
class Page:
    """Contents of a report; see :func:`cellplm_jax.report.html.write_report`."""

    title: str
    summary: str
    sections: Sequence[Section]


# --- pieces ------------------------------------------------------------------------------------


def _facts(facts: Mapping[str, Any], heading: str = "Facts", caption: str = "") -> Table:
    """Return plain facts as a table of two columns; nested ones are omitted."""
    rows = [
        (NAMES.get(name, name.replace("_", " ")), _shown(value))
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
    """Return the messages of the work."""
    said = [message for message in messages if message != "Initialised parameters: none."]
    return [Text("\n\n".join(said), heading="Messages")] if said else []


def _scores(scores: Mapping[str, float], caption: str, heading: str = "Scores") -> Table:
    """Return scores as a table with their descriptions."""
    rows = []
    for key, value in scores.items():
        if key in SAME:
            continue
        name, meaning = SCORES.get(key, (key.replace("_", " "), ""))
        rows.append((name, float(value), meaning))
    return Table(["score", "value", "meaning"], rows, caption, heading)


def _named(genes: Sequence[Any]) -> list[str]:
    """Return the symbols of genes, if known."""
    from cellplm_jax.data.genes import symbols_of

    return symbols_of([str(gene) for gene in genes])


def _some(cells: int) -> np.ndarray:
    """Return the cells to draw: all, or a reproducible random subset."""
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
    """Return maps of cells, one figure per column; without columns one without colours."""
    from cellplm_jax import plot

    figures: list[Section] = []
    if not columns:
        one = np.full(len(coordinates), "cells", object)
        axes = plot.umap(coordinates, one, axis_name=name, legend=False)
        return [Figure(axes, f"{name} of the cells", caption, heading)]
    for title, values in columns.items():
        axes = plot.umap(coordinates, values, title=title, axis_name=name)
        alt = f"{name} of the cells, coloured by {title}"
        figures.append(Figure(axes, alt, caption, heading))
        caption, heading = "", ""
    return figures


def _columns(obs: Any, names: Sequence[str | None], cells: np.ndarray) -> dict[str, Any]:
    """Return columns of ``obs`` for some cells, integers and text as groups; the rarest beyond 30 are merged."""
    import pandas as pd

    found = {}
    for name in dict.fromkeys(name for name in names if name):
        column = obs[name].iloc[cells]
        if not pd.api.types.is_float_dtype(column.dtype):
            text = column.astype(object).where(column.notna(), "unknown").astype(str)
            often = set(text.value_counts().index[:30])
            shown = text.where(text.isin(often), "others")
            column = pd.Categorical(shown, sorted(set(shown), key=_natural))
        found[str(name)] = column
    return found


def _natural(text: str) -> list[Any]:
    """Return a key that sorts "2" before "10", and "others" last."""
    parts = [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in _DIGITS.split(text)
    ]
    return [text == "others", parts]


_DIGITS = re.compile(r"(\d+)")


def _telling(obs: Any) -> list[str]:
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


def _laid_out(embedding: np.ndarray, cells: np.ndarray) -> np.ndarray | None:
    """Return UMAP coordinates of some cells; None: too few, or not finite."""
    from cellplm_jax.evaluate.embedding import umap_coordinates

    chosen = np.asarray(embedding)[cells]
    if len(chosen) <= NEIGHBORS or not np.isfinite(chosen).all():
        return None
    return umap_coordinates(chosen, neighbors=NEIGHBORS)


def _no_map(heading: str) -> Text:
    return Text(f"Too few cells for a map: it requires more than {NEIGHBORS}.", heading=heading)


def _share(facts: Mapping[str, Any], part: str, whole: str) -> str | None:
    """Return "3 of 4" from two facts; None: one is missing."""
    if part not in facts or whole not in facts:
        return None
    return f"{_shown(facts[part])} of {_shown(facts[whole])}"


def _input(facts: Mapping[str, Any]) -> list[Section]:
    """Return a summary of the input counts, from the facts of ``uns``."""
    read = facts.get("input") or {}
    genes = read.get("genes") or {}
    rows = [
        ("file", read.get("source")),
        ("counts", read.get("matrix")),
        ("stored as", read.get("storage")),
        ("gene names from", read.get("gene_key")),
        ("cells", _shown(read["cells"]) if "cells" in read else None),
        ("genes of the file in the vocabulary", _share(genes, "matched", "names")),
        ("genes of the vocabulary in the file", _share(genes, "genes_matched", "vocabulary")),
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
    """Return the history of a fit: the loss, and the score if it is another quantity."""
    from cellplm_jax import plot

    history, best = estimator.history, estimator.facts.get("best_epoch")
    names = {name for row in history for name in row}
    pictures: list[tuple[str, list[dict[str, float]], str]] = []
    if names & {"loss", "validation_loss"}:
        note = "Loss in nats per cell, lower is better"
        if _apart(history):
            # Training and validation loss are over different entries: on one axis both would be flat.
            pictures = [
                ("loss", _without(history, "validation_loss"), f"{note}, of the training cells."),
                ("loss", _without(history, "loss"), f"{note}, of hidden entries of the validation cells."),
            ]  # fmt: skip
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


# --- pages of what was fitted --------------------------------------------------------------------


def fit(estimator: Any) -> Page:
    """Show a fitted estimator: facts, curve, messages."""
    facts = estimator.facts
    return Page(
        f"{TASKS.get(estimator.task, estimator.task)}: fitted",
        f"Fitted to {_shown(facts.get('training_cells', facts.get('cells', 0)))} cells.",
        [_facts(facts), *_curve(estimator), *_messages(estimator.messages)],
    )


def annotator(estimator: Any) -> Page:
    """Show a fitted annotator: the curve, and scores, confusion matrix and calibration on its validation cells."""
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
        f"{len(estimator.labels)} cell types, fitted to {_shown(facts['training_cells'])} cells, "
        f"method {estimator.method}."
    )
    sections: list[Section] = []
    if estimator.validation is None:
        sections.append(
            Text("There are no validation cells, so the quality of the labels is unknown.", "Scores")
        )  # fmt: skip
    else:
        codes, probabilities = estimator.validation
        labels = np.array(estimator.labels, object)
        truth, predicted = labels[codes], labels[probabilities.argmax(axis=1)]
        scores = {
            **annotation_scores(truth, predicted),
            "calibration_error": expected_calibration_error(truth, probabilities, estimator.labels),
        }
        summary += (
            f" On {len(codes):,} validation cells: accuracy {scores['accuracy']:.3f}, macro F1 "
            f"{scores['macro_f1']:.3f}."
        )
        note = (
            f"On {len(codes):,} validation cells, which were not used to train the network; the stopping epoch, the "
            "temperature and the pooling weights were chosen on them, so new cells may have lower scores."
        )
        each = per_class_scores(truth, predicted)
        rows = [(name, float(score)) for name, score in estimator.validation_scores.items()]
        if len(rows) > 1:
            sections.append(
                Table(
                    ["prediction", "macro F1"],
                    rows,
                    "The first row is used. Network and logistic regression (linear) alone, and as a baseline label "
                    "transfer from the nearest labelled cells (neighbors).",
                    "Parts",
                )
            )
        sections += [
            _scores(scores, note),
            Table(
                ["cell type", *map(str, each.columns)],
                [[name, *row] for name, *row in each.itertuples()],
                "",
                "By cell type",
            ),
            Figure(
                plot.confusion_matrix(confusion_table(truth, predicted)),
                "Confusion matrix of true and predicted cell types",
                "Percentage of the cells of a true type (row) by predicted label (column).",
                "Confusions",
            ),
            Figure(
                plot.calibration(predicted == truth, probabilities.max(axis=1)),
                "Reliability diagram: fraction of correct labels by confidence",
                "One point per tenth of confidence, with its number of cells. On the dashed line confidence equals "
                "accuracy.",
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
        rows = list(zip(_named(known.index), known, strict=True))
        caption = "The genes, the most confident first."
        if len(rows) > LISTED:
            rows = [*rows[: LISTED // 2], *rows[-LISTED // 2 :]]
            caption = f"The {LISTED // 2} most and the {LISTED // 2} least confident of {len(known):,} genes."
        sections = [
            Figure(
                plot.histogram(known, value_label="confidence (correlation)", counted="genes"),
                "Histogram of the confidence of the imputed genes",
                "Confidence of a gene: correlation of predicted and measured values over held-out reference cells, "
                "predicted from the panel genes only. 1: exact prediction, 0: no information. It does not "
                "account for differences between your cells and the reference.",
                "Confidence of the genes",
            ),
            Table(["gene", "confidence"], rows, caption, "Genes"),
        ]  # fmt: skip
    facts = estimator.facts
    summary = f"{facts['imputed_genes']:,} genes are predicted from {facts['shared_genes']:,} measured ones."
    if "mean_confidence" in facts:
        summary += f" Mean confidence {facts['mean_confidence']:.3f}."
    return Page("Imputed genes: fitted", summary, [*sections, *page.sections])


# --- pages of files that were written ------------------------------------------------------------


def embedding(path: str | os.PathLike, key: str, colors: Sequence[str]) -> Page:
    """Show embedded cells: summary and UMAP."""
    from cellplm_jax.tasks.embed import read_annotations

    cells = read_annotations(path, obsm=[key], uns=["cellplm"])
    facts = cells.uns.get("cellplm", {})
    z = np.asarray(cells.obsm[key])
    drawn = _some(len(z))
    coordinates = _laid_out(z, drawn)
    sections: list[Section] = [_no_map("The embedding")]
    if coordinates is not None:
        columns = _columns(cells.obs, colors or _telling(cells.obs), drawn)
        caption = f"UMAP of obsm['{key}'], {_of(len(drawn), len(z))}: one point per cell, similar cells nearby. " \
            "For visualisation only: distances between groups have little meaning."  # fmt: skip
        if not colors:
            caption += " Use --color to colour it by a column of obs."
        sections = _map(coordinates, columns, caption, "The embedding")
    return Page(
        f"Embedding of {Path(path).name}",
        f"{len(z):,} cells in {z.shape[1]} dimensions, by {facts.get('model', 'a model')}.",
        [*sections, *_input(facts), *_messages(list((facts.get('input') or {}).get('notes', [])))],
    )  # fmt: skip


def clusters(
    path: str | os.PathLike,
    cells: Any,
    columns: Sequence[str],
    key: str,
    scores: Mapping[str, float],
) -> Page:
    """Show clustered cells: one UMAP per column, the composition of every cluster, scores.

    Args:
        path: The output file.
        cells: With the clusters and ``obsm["X_umap"]``.
        columns: Columns of ``obs``: the clusters, then known types and batches if given.
        key: The embedding.
        scores: Scores against known types and batches.
    """
    cluster, *known = columns
    sizes = cells.obs[cluster].value_counts()
    drawn = _some(cells.n_obs)
    shown = _columns(cells.obs, columns, drawn)
    caption = f"UMAP of obsm['{key}'], {_of(len(drawn), cells.n_obs)}: one point per cell, similar cells nearby."
    sections = _map(np.asarray(cells.obsm["X_umap"])[drawn], shown, caption, "Clusters")
    sections.append(_contents(cells.obs, cluster, known))
    if scores:
        against = " and ".join(f"obs['{name}']" for name in known)
        note = f"Against {against}, which clustering does not use; higher is better."
        sections.append(_scores({name: n for name, n in scores.items()}, note))
    return Page(
        f"Clusters of {Path(path).name}",
        f"{cells.n_obs:,} cells in {len(sizes)} clusters, of {min(sizes):,} to {max(sizes):,} cells.",
        sections,
    )


def _contents(obs: Any, cluster: str, known: Sequence[str]) -> Table:
    """Return one row per cluster: its cells, and the most frequent value of each column with its fraction."""
    rows = []
    for name in sorted(map(str, obs[cluster].unique()), key=_natural):
        own = obs[obs[cluster].astype(str) == name]
        row: list[Any] = [name, len(own), f"{len(own) / len(obs):.0%}"]
        for column in known:
            often = own[column].astype(object).fillna("unknown").astype(str).value_counts()
            row.append(f"{often.index[0]} ({often.iloc[0] / len(own):.0%})")
        rows.append(row)
    names = ["cluster", "cells", "share", *(f"most frequent {column}" for column in known)]
    return Table(names, rows, "", "Composition of the clusters")


def integrated(
    path: str | os.PathLike, key: str, columns: Sequence[str], scores: Mapping[str, float]
) -> Page:
    """Show an integrated embedding by batch, and the embedding before integration if the file has it."""
    from cellplm_jax.tasks.embed import read_annotations

    before = ("X_cellplm", "X_pca")
    cells = read_annotations(path, obsm=[key, *before], uns=["cellplm_integration"])
    drawn = _some(cells.n_obs)
    known = [name for name in columns if name in cells.obs.columns]
    shown = _columns(cells.obs, known, drawn)
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
            Text("The file has neither obsm['X_cellplm'] nor obsm['X_pca'] for comparison: run "
                 "cellplm embed on it first.", "Before")
        )  # fmt: skip
    if scores:
        sections.append(_scores(scores, ""))
    facts = cells.uns.get("cellplm_integration", {})
    summary = f"{cells.n_obs:,} cells" + (f", batches of '{known[0]}'." if known else ".")
    return Page("Integrated embedding", summary, [*sections, *_input(facts)])


def annotated(path: str | os.PathLike, estimator: Any) -> Page:
    """Show predicted cell types: counts, confidences, a UMAP."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.annotate import CONFIDENCE, FACTS, LABEL, UNKNOWN_REASON
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
            "Probability of the predicted label, calibrated on validation cells if there were any.",
            "Confidence",
        ),
    ]
    if "X_umap" in cells.obsm:
        shown = _columns(cells.obs, [LABEL], drawn) | {CONFIDENCE: confidence[drawn]}
        caption = (
            f"UMAP of the fine-tuned embedding, {_of(len(drawn), cells.n_obs)}; obsm['X_umap']."
        )
        sections += _map(np.asarray(cells.obsm["X_umap"])[drawn], shown, caption, "Map")
    else:
        sections.append(_no_map("Map"))
    if UNKNOWN_REASON in cells.obs:
        reasons = cells.obs[UNKNOWN_REASON].astype(str)
        rows = [(name, int(n)) for name, n in reasons[reasons != ""].value_counts().items()]
        note = "Cells that are unlike the labelled cells of the fit, by the most obvious reason."
        sections.append(Table(["reason", "cells"], rows[:LISTED], note, "Unknown cells"))
    low = float(np.mean(confidence < 0.5))
    return Page(
        f"Cell types of {Path(path).name}",
        f"{cells.n_obs:,} cells of {len(counts)} types; median confidence {np.median(confidence):.2f}, "
        f"{low:.0%} of the cells below one half.",
        [*sections, *_input(cells.uns.get(FACTS, {}))],
    )


def imputed(path: str | os.PathLike, estimator: Any, keys: Mapping[str, Any]) -> Page:
    """Show imputed genes: their confidence, and maps of some genes with measured values.

    Args:
        path: The output file.
        estimator: The imputer.
        keys: Reading options that differ from the fit.
    """
    from cellplm_jax import plot
    from cellplm_jax.tasks.embed import read_annotations
    from cellplm_jax.tasks.impute import FACTS, IMPUTED

    spatial_key = estimator.reading.changed(**keys).spatial_key or "spatial"
    cells = read_annotations(path, obsm=[IMPUTED, spatial_key], uns=[FACTS])
    values = cells.obsm[IMPUTED]
    facts = cells.uns.get(FACTS, {})
    logged = bool(facts.get("log_normalized", False))
    beside = estimator.beside_measured(path, values, log_normalized=logged, **keys)
    confidence = estimator.confidence.reindex(values.columns)
    order = confidence.sort_values(ascending=False, na_position="last").index
    names = dict(zip(order, _named(order), strict=True))
    checked = beside.pearson.reindex(order)
    mean, top = values.mean(axis=0), values.max(axis=0)
    unit = "log1p of counts per 10,000" if logged else "counts"
    columns = ["gene", "confidence", "correlation here", f"mean ({unit})", f"largest ({unit})"]
    rows = [
        [names[gene], confidence[gene], checked[gene], float(mean[gene]), float(top[gene])]
        for gene in order[:LISTED]
    ]
    summary = (
        f"{len(order):,} genes predicted for {cells.n_obs:,} cells. Confidence was computed on held-out reference "
        "cells, not on these."
    )
    caption = f"The {min(LISTED, len(order))} most confident of {len(order):,} genes. Confidence: correlation of " \
        "predicted and measured values on held-out reference cells."  # fmt: skip
    sections: list[Section] = []
    if len(beside.pearson):
        summary += (
            f" {len(beside.pearson):,} of them are measured in this file, unused by the prediction: their "
            f"median correlation with it is {np.nanmedian(beside.pearson):.2f}."
        )
        caption += " Correlation here: with the measured values of these cells, log-normalised."
    else:
        columns.pop(2)
        rows = [row[:2] + row[3:] for row in rows]
    sections.append(Table(columns, rows, caption, "Imputed genes"))
    known = beside.pearson[confidence.reindex(beside.pearson.index).notna()].dropna()
    if len(known) >= 10:
        sections.append(
            Figure(
                plot.agreement(
                    confidence[known.index], known, value_label="correlation",
                    names=("on held-out reference cells", "in these cells"),
                ),
                "Correlation in these cells against the confidence of the fit, one point per gene",
                "One point per measured gene of this file. Below the line the prediction is worse here than in the "
                "reference.",
                "Confidence and correlation in these cells",
            )
        )  # fmt: skip
    if spatial_key in cells.obsm:
        sections += _beside(beside, np.asarray(cells.obsm[spatial_key], np.float64)[:, :2], names)
    return Page(f"Imputed genes of {Path(path).name}", summary, [*sections, *_input(facts)])


def _beside(beside: Any, points: np.ndarray, names: Mapping[str, str]) -> list[Section]:
    """Return spatial maps of imputed genes and measured ones."""
    from cellplm_jax import plot

    drawn = _some(len(points))
    drawn = drawn[np.isfinite(points[drawn]).all(axis=1)]
    if not len(drawn):
        return []
    scale = "log1p of counts per 10,000"
    figures: list[Section] = []
    for pair in beside.pairs:
        gene = names.get(pair.gene, pair.gene)
        values = pair.imputed[drawn], pair.measured[drawn]
        if len(beside.pearson):
            correlation = float(beside.pearson[pair.gene])
            axes = plot.spatial_comparison(
                points[drawn], values[1], values[0], value_label=scale,
                title=f"{gene}: correlation {correlation:.2f}",
            )[0]  # fmt: skip
            alt = f"{gene} in the tissue as measured, as imputed, and the difference"
            caption = "Measured genes of this file: the most confident, a median and the " \
                "least confident one. Difference: red is predicted too high, blue too low."  # fmt: skip
        else:
            (other,) = _named([pair.other])
            axes = plot.cell_panels(
                points[drawn], {f"{gene}, imputed": values[0], f"{other}, measured": values[1]},
                color_label=scale, tissue=True,
            )[0]  # fmt: skip
            alt = f"{gene} as imputed and {other} as measured, in the tissue"
            caption = "The most confident genes. Their true values here are unknown, so each is shown next to the " \
                "most correlated measured gene of the panel."  # fmt: skip
        heading = None if figures else "In the tissue"
        figures.append(Figure(axes, alt, "" if figures else caption, heading))
    return figures


def denoised(
    path: str | os.PathLike,
    estimator: Any,
    keys: Mapping[str, Any],
    genes: Sequence[str] | None = None,
) -> Page:
    """Show denoised counts: some genes before and after, and changes of means and zeros.

    Args:
        path: The output file.
        estimator: The denoiser.
        keys: Reading options that differ from the fit.
        genes: Genes to show; None: some that vary most between cells.
    """
    from cellplm_jax import plot
    from cellplm_jax.tasks.denoise import FACTS, LAYER, before_and_after
    from cellplm_jax.tasks.embed import read_annotations

    embeddings = ("X_umap", "X_cellplm_integrated", "X_cellplm", "X_pca")
    cells = read_annotations(path, obsm=embeddings, uns=[FACTS])
    facts = cells.uns.get(FACTS, {})
    drawn = _some(cells.n_obs)
    comparison = before_and_after(estimator, path, LAYER, rows=drawn, genes=genes, **keys)
    after = "expected if non-zero" if facts.get("detected") else "expected"
    totals = "The expected counts of each cell sum to its measured total."
    if facts.get("detected"):
        totals = "Counts conditional on being non-zero are larger than the measured counts."
    names = _named(comparison.genes)
    rows = [
        [name, *comparison.table.loc[gene, list(comparison.table)]]
        for name, gene in zip(names, comparison.genes, strict=True)
    ]
    columns = ["gene", "share of cells with a count", "mean count", f"mean {after}", "correlation"]
    which = (
        "The selected genes"
        if genes
        else "Genes whose expected counts vary most between cells; the second is high if the first is low"
    )
    return Page(
        f"Denoised counts of {Path(path).name}",
        f"layers['{LAYER}']: {after} counts of {len(comparison.means_after):,} genes in {cells.n_obs:,} cells. "
        f"{comparison.zeros:.0%} of the counts are zero; in {comparison.expected_zeros:.1%} of these at least half a "
        "count is expected. Expected counts come from a cell's other genes and its neighbours: use them for "
        "visualisation and ranking, not for tests of differential expression.",
        [
            *_before_and_after(comparison, cells, drawn, names, after, chosen=genes is not None),
            Table(
                columns,
                rows,
                f"{which}. Correlation: over the cells, of counts and {after} ones, both log-normalised.",
                "Genes",
            ),
            Figure(
                plot.agreement(
                    comparison.means_before, comparison.means_after, value_label="mean of a gene (counts per cell)",
                    names=("counted", after), logarithmic=True,
                ),
                "Mean expected count against mean count, one point per gene",
                f"One point per gene with a count, over {_of(len(drawn), cells.n_obs)}. On the line both are equal. "
                f"{totals}",
                "Means of all genes",
            ),
            *_input(facts),
            *_messages(estimator.messages),
        ],
    )  # fmt: skip


def _before_and_after(
    found: Any, cells: Any, drawn: np.ndarray, names: Sequence[str], after: str, *, chosen: bool
) -> list[Section]:
    """Return maps of genes before and after denoising: in the tissue, or on a UMAP of the cells."""
    from cellplm_jax import plot
    from cellplm_jax.evaluate.embedding import pca_baseline

    points, place = found.coordinates, "Tissue coordinates."
    tissue = points is not None
    if points is None:
        key = next(iter(cells.obsm), None)
        if key == "X_umap":
            points, place = (
                np.asarray(cells.obsm[key], np.float64)[drawn, :2],
                "The map is obsm['X_umap'].",
            )
        elif key is not None:
            points, place = _laid_out(cells.obsm[key], drawn), f"UMAP of obsm['{key}']."
        elif len(drawn) > NEIGHBORS:
            components = pca_baseline(found.counts)
            points = _laid_out(components, np.arange(len(drawn)))
            place = "UMAP of the principal components of the counts, before denoising."
    if points is None:
        return [_no_map("Before and after")]
    there = np.isfinite(points).all(axis=1)
    sections: list[Section] = []
    for number in range(min(DRAWN_GENES if chosen else 2, len(names))):
        axes = plot.cell_panels(
            points[there],
            {
                f"{names[number]}, counted": found.before[there, number],
                f"{names[number]}, {after}": found.after[there, number],
            },
            color_label="log1p of counts per 10,000", shared_colors=True, tissue=tissue,
        )[0]  # fmt: skip
        caption = f"{place} Both panels of each gene share their colours." if not sections else ""
        heading = None if sections else "Before and after"
        sections.append(
            Figure(axes, f"{names[number]} in the cells before and after denoising", caption, heading)
        )  # fmt: skip
    return sections


def perturbed(found: Any) -> Page:
    """Show predicted changes: the genes with the largest changes, as a map and a table."""
    from cellplm_jax import plot
    from cellplm_jax.data.genes import symbols_of

    change = found.change.iloc[:30]
    names = dict(zip(change.columns, symbols_of(list(map(str, change.columns))), strict=True))
    largest = change.abs().max(axis=0).sort_values(ascending=False).index[:30]
    rows = []
    for perturbation, values in change.iterrows():
        order = values.abs().sort_values(ascending=False).index[:5]
        listed = ", ".join(f"{names[gene]} {values[gene]:+.2f}" for gene in order)
        listed = listed.replace(" -", " \N{MINUS SIGN}")
        rows.append(
            (perturbation, found.known[perturbation], float(np.sqrt((values**2).mean())), listed)
        )
    more = "" if len(found.change) <= 30 else f" The first 30 of {len(found.change)} perturbations."
    return Page(
        "Predicted perturbations",
        f"Changes of {found.change.shape[1]:,} genes under {len(found.change):,} perturbations, relative to control "
        f"cells.{more}",
        [
            Figure(
                plot.change_map(change[largest].rename(columns=names)),
                "Map of the genes with the largest changes",
                "The genes with the largest changes under any of these. Change of the mean of log1p of counts per "
                "10,000; +1 is about 2.7 times as much, and \N{MINUS SIGN}1 about 2.7 times less.",
                "Changes",
            ),
            Table(
                ["perturbation", "known", "size", "largest changes"],
                rows,
                "Known: whether it, or its targets, were in the training data. Size: root mean square of the changes "
                "of all genes.",
                "Perturbations",
            ),
            *_messages(found.messages),
        ],
    )  # fmt: skip


def samples(path: str | os.PathLike, table: Any, estimator: Any) -> Page:
    """Show labelled samples, and the contributions of their cells."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.embed import read_annotations
    from cellplm_jax.tasks.samples import CONTRIBUTION, FACTS, LABEL

    cells = read_annotations(path, uns=[FACTS])
    facts = cells.uns.get(FACTS, {})
    counts = table["label"].value_counts()
    rows = [
        (name, str(row["label"]), float(row["confidence"]), int(row["cells"]))
        for name, row in table.iterrows()
    ]
    found = ", ".join(f"{n} {label}" for label, n in counts.items() if n)
    sections: list[Section] = [
        Table(
            ["sample", "label", "confidence", "cells"],
            rows,
            "Confidence: probability of the label.",
            "Samples",
        ),
        Figure(
            plot.histogram(cells.obs[CONTRIBUTION], value_label="contribution to the label (log-odds)"),
            "Histogram of the contributions of the cells",
            "Contribution of each cell to its sample's label; below 0: against it. The mean over a sample's cells is "
            "used for the prediction.",
            "Contributions of the cells",
        ),
    ]  # fmt: skip
    # Contributions shared by all cells of each sample are not specific to kinds of cells.
    key = estimator.facts.get("sample_key")
    within = cells.obs.drop(columns=LABEL, errors="ignore")
    if key in within:
        sample = within[key].astype(str)
        within = within.loc[:, [within[n].groupby(sample).nunique().max() > 1 for n in within]]
    for name in _telling(within):
        groups = cells.obs.groupby(cells.obs[name].astype(str), observed=True)[CONTRIBUTION]
        means = groups.mean().sort_values(ascending=False)
        listed = [(group, int(groups.size()[group]), float(mean)) for group, mean in means.items()]
        sections.append(Table([name, "cells", "mean contribution"], listed))
    sections += [*_input(facts), *_messages(estimator.messages)]
    return Page(f"Samples of {Path(path).name}", f"{len(table):,} samples: {found}.", sections)


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
        f"Corpus in {Path(facts['path']).name}",
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
            _facts(
                {
                    "nonzeros": totals["nonzeros"],
                    **reported,
                    "megabytes": facts["bytes"] / 1e6 if facts["bytes"] else "",
                    "fingerprint": facts["fingerprint"],
                }
            ),
            *_messages(notes),
        ],
    )  # fmt: skip


def model(source: str | os.PathLike, facts: Mapping[str, Any]) -> Page:
    """Show a model: its card, parameters, configuration, and training curves if available."""
    from cellplm_jax import plot
    from cellplm_jax.train.metrics import read_metrics

    parameters = {name: n for name, n in facts["parameters"].items() if name != "total"}
    sections: list[Section] = [
        _facts(facts["card"], "Card"),
        Figure(
            plot.table_bars(parameters, value_label="parameters"),
            "Parameters per module",
            f"{facts['parameters']['total']:,} in total.",
            "Parameters",
        ),
    ]
    metrics = Path(source).expanduser() / "metrics.jsonl"
    if metrics.is_file():
        rows = list(read_metrics(metrics))
        sections.append(
            Figure(
                plot.run_picture(rows),
                "Training curves",
                "Training values are running means over their faint raw values.",
                "Run",
            )
        )
    flat = [
        (f"{name}.{key}" if isinstance(value, dict) else name, str(item))
        for name, value in facts["config"].items()
        for key, item in (value.items() if isinstance(value, dict) else [("", value)])
    ]
    caption = "Fields of cellplm_jax.config.ModelConfig; see its documentation."
    sections.append(Table(["", "value"], flat, caption, "Configuration"))
    return Page(
        f"Model {facts['id']}",
        f"{facts['parameters']['total']:,} parameters, {facts['genes']['count']:,} genes"
        + (f", step {facts['step']:,}." if facts["step"] else "."),
        sections,
    )
