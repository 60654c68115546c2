"""The contents of ``--report``: the results of each command as sections of one HTML file.

Everything is read from the estimator or the output file of the command. Only the layout of UMAPs is computed, on a
random subset if there are many cells.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellplm_jax.data.own_counts import read_counts
from cellplm_jax.errors import InputError
from cellplm_jax.plot.style import categories_of
from cellplm_jax.report.blocks import (
    DRAWN_GENES,
    LISTED,
    NEIGHBORS,
    TASKS,
    Page,
    cell_map,
    color_keys,
    columns_of,
    component_scores,
    curve,
    facts_table,
    input_table,
    laid_out,
    marker_sections,
    messages,
    named,
    no_map,
    of_cells,
    palettes_of,
    scores_table,
    shown,
    some,
    telling,
    tissue_maps,
)
from cellplm_jax.report.html import Figure, Section, Table, Text
from cellplm_jax.report.niches import niches as niches

# --- pages of what was fitted --------------------------------------------------------------------


def fit(estimator: Any) -> Page:
    """Show a fitted estimator: facts, curve, messages."""
    facts = estimator.facts
    return Page(
        f"{TASKS.get(estimator.task, estimator.task)}: fitted",
        f"Fitted to {shown(facts.get('training_cells', facts.get('cells', 0)))} cells.",
        [facts_table(facts), *_pool(facts), *curve(estimator), *messages(estimator.messages)],
    )


def _pool(facts: Mapping[str, Any]) -> list[Section]:
    """Return the errors of a denoiser's pool and of its parts, if there is one."""
    if not isinstance(facts.get("pool"), Mapping):
        return []
    pool = facts["pool"]
    names = {
        "pooled": "pooled", "without_correction": "pooled, means of clusters not kept",
        "without_network": "pooled without the network", "network": "network",
        "neighbours": "mean over the nearest cells", "gene_mean": "gene mean",
    }  # fmt: skip
    rows = [
        (shown, float(pool["rmse"][name]), float(pool["log_likelihood"][name]),
         float(pool["weights"].get(name, "nan")))
        for name, shown in names.items()
    ]  # fmt: skip
    return [
        Table(
            ["prediction", "RMSE", "log-likelihood", "weight"],
            rows,
            "A tenth of the molecules was held out. RMSE: log1p of counts per 10,000 at entries without another "
            "molecule; lower is better. Log-likelihood: of held-out counts; higher is better. Weight: mean over "
            f"held-out counts. Calibration error of the pool: {float(pool['calibration_error']):.3f}; 0 is best.",
            "Held-out counts",
        )
    ]


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
        f"{len(estimator.labels)} cell types, fitted to {shown(facts['training_cells'])} cells, "
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
        titles = {
            "network": "the network alone",
            "linear": "logistic regression alone (baseline)",
            "neighbors": "label transfer from the nearest cells (baseline)",
        }
        known = [
            (titles.get(name, name) if place else f"used: {name}", float(value))
            for place, (name, value) in enumerate(estimator.validation_scores.items())
        ]
        beside: list[Section] = []
        if len(known) > 1:
            beside = [
                Table(
                    ["method", "macro F1"],
                    known,
                    "On the same validation cells.",
                    "Next to a baseline",
                )
            ]
        sections += [
            scores_table(scores, note),
            *beside,
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
        rows = list(zip(named(known.index), known, strict=True))
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
    if "validation" in facts:
        listed = [
            (name.replace("_", " "), each.get("pearson", np.nan), each["rmse"])
            for name, each in facts["validation"].items()
        ]
        note = "On validation cells of the reference: mean correlation per gene, and error of log-normalised values. " \
            f"Used: {facts['method']}."  # fmt: skip
        sections.append(Table(["method", "correlation", "RMSE"], listed, note, "Methods"))
    summary = f"{facts['imputed_genes']:,} genes are predicted from {facts['shared_genes']:,} measured ones."
    if "mean_confidence" in facts:
        summary += f" Mean confidence {facts['mean_confidence']:.3f}"
        summary += f", over {len(known):,} genes with counts in the validation cells."
    return Page("Imputed genes: fitted", summary, [*sections, *page.sections])


# --- pages of files that were written ------------------------------------------------------------


def embedding(path: str | os.PathLike, key: str, colors: Sequence[str]) -> Page:
    """Show embedded cells: summary and UMAP."""
    from cellplm_jax.tasks.files import read_annotations

    cells = read_annotations(path, obsm=[key, "spatial"], uns=["cellplm", "spatial"])
    facts = cells.uns.get("cellplm", {})
    z = np.asarray(cells.obsm[key])
    drawn = some(len(z))
    coordinates = laid_out(z, drawn)
    names = list(colors or telling(cells.obs))
    cells.uns.update(read_annotations(path, uns=color_keys(names)).uns)
    columns, palettes = columns_of(cells.obs, names, drawn), palettes_of(cells, names)
    sections: list[Section] = [no_map("The embedding")]
    if coordinates is not None:
        caption = f"UMAP of obsm['{key}'], {of_cells(len(drawn), len(z))}: one point per cell, similar cells nearby. " \
            "For visualisation only: distances between groups have little meaning."  # fmt: skip
        if not colors:
            caption += " Use --color to colour it by a column of obs."
        sections = cell_map(coordinates, columns, caption, "The embedding", palettes=palettes)
    sample = (facts.get("context") or {}).get("batch_key") or None
    sections += tissue_maps(cells, columns, drawn, sample_key=sample, palettes=palettes)
    sections += _nearest_scores(path, z, drawn, columns, facts)
    return Page(
        f"Embedding of {Path(path).name}",
        f"{len(z):,} cells in {z.shape[1]} dimensions, by {facts.get('model', 'a model')}.",
        [*sections, *input_table(facts), *messages(list((facts.get('input') or {}).get('notes', [])))],
    )  # fmt: skip


def _nearest_scores(
    path: str | os.PathLike,
    z: np.ndarray,
    drawn: np.ndarray,
    columns: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[Section]:
    """Return how well neighbours share the groups of each column, in the embedding and in components of the counts."""
    from cellplm_jax.evaluate.embedding import knn_accuracy, pca_baseline

    groups = {name: values for name, values in columns.items() if hasattr(values, "categories")}
    if not groups or len(drawn) <= 3 * NEIGHBORS or not np.isfinite(z[drawn]).all():
        return []
    read = read_counts(path, drawn, facts)
    if read is None:
        return []
    try:
        components = pca_baseline(read[0])
    except InputError:
        return []
    rows = []
    for name, values in groups.items():
        known = ~np.isin(np.asarray(values), ["unknown", "others"])
        labels = np.asarray(values)[known]
        if known.sum() > NEIGHBORS and len(set(labels)) > 1:
            rows.append(
                (name, *(knn_accuracy(part[known], labels) for part in (z[drawn], components)))
            )
    if not rows:
        return []
    note = (
        f"Fraction of cells whose {NEIGHBORS} nearest cells are mostly of the same group, over "
        f"{of_cells(len(drawn), len(z))}. Baseline: 50 principal components of the same counts."
    )
    return [Table(["column", "this embedding", "principal components"], rows, note, "Neighbours")]


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
    from cellplm_jax.tasks.files import read_annotations

    cluster, *known = columns
    sizes = cells.obs[cluster].value_counts()
    drawn = some(cells.n_obs)
    columns_drawn, palettes = columns_of(cells.obs, columns, drawn), palettes_of(cells, columns)
    caption = f"UMAP of obsm['{key}'], {of_cells(len(drawn), cells.n_obs)}: one point per cell, similar cells nearby."
    umap = np.asarray(cells.obsm["X_umap"])[drawn]
    sections = cell_map(umap, columns_drawn, caption, "Clusters", palettes=palettes)
    read, batches, simple = None, None, {}
    if Path(path).is_file():
        more = read_annotations(path, obsm=["spatial"], uns=["cellplm", "spatial"])
        facts = more.uns.get("cellplm", {})
        batches = next(
            (name for name in known if name == (facts.get("context") or {}).get("batch_key")), None
        )
        sections += tissue_maps(more, columns_drawn, drawn, sample_key=batches, palettes=palettes)
        read = read_counts(path, drawn, facts)
    sections.append(_contents(cells.obs, cluster, known))
    if read is not None:
        groups = cells.obs[cluster].iloc[drawn].astype("category").array
        sections += marker_sections(*read, groups)
    if scores:
        against = " and ".join(f"obs['{name}']" for name in known)
        note = f"Against {against}, which clustering does not use; higher is better."
        if read is not None:
            labels = next((name for name in known if name != batches), None)
            sides = {"labels": labels, "batches": batches if "kbet" in scores else None}
            given = {side: cells.obs[name].iloc[drawn] for side, name in sides.items() if name}
            settings = (cells.uns.get(cluster) or {}).get("params") or {}
            simple = component_scores(read[0], given, float(settings.get("resolution", 1.0)))
            note += f" Components: 50 principal components of the counts, {of_cells(len(drawn), cells.n_obs)}."
        sections.append(scores_table(scores, note, baseline=("components", simple)))
    return Page(
        f"Clusters of {Path(path).name}",
        f"{cells.n_obs:,} cells in {len(sizes)} clusters, of {min(sizes):,} to {max(sizes):,} cells.",
        sections,
    )


def _contents(obs: Any, cluster: str, known: Sequence[str]) -> Table:
    """Return one row per cluster: its cells, and the most frequent value of each column with its fraction."""
    rows = []
    for name in map(str, categories_of(obs[cluster]).categories):
        own = obs[obs[cluster].astype(str) == name]
        row: list[Any] = [name, len(own), f"{len(own) / len(obs):.0%}"]
        for column in known:
            often = own[column].astype(object).fillna("unknown").astype(str).value_counts()
            row.append(f"{often.index[0]} ({often.iloc[0] / len(own):.0%})")
        rows.append(row)
    names = ["cluster", "cells", "share", *(f"most frequent {column}" for column in known)]
    return Table(names, rows, "", "Composition of the clusters")


def annotated(path: str | os.PathLike, estimator: Any) -> Page:
    """Show predicted cell types: counts, confidences, a UMAP."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.annotate import CONFIDENCE, FACTS, LABEL, UNKNOWN_REASON
    from cellplm_jax.tasks.files import read_annotations

    cells = read_annotations(
        path, obsm=["X_umap", "spatial"], uns=[FACTS, "spatial", *color_keys([LABEL])]
    )
    facts, palettes = cells.uns.get(FACTS, {}), palettes_of(cells, [LABEL])
    labels, confidence = cells.obs[LABEL].astype(str), cells.obs[CONFIDENCE].to_numpy(float)
    counts = labels.value_counts()
    mean = cells.obs.groupby(labels.to_numpy(), observed=True)[CONFIDENCE].mean()
    drawn = some(cells.n_obs)
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
    columns = columns_of(cells.obs, [LABEL], drawn) | {CONFIDENCE: confidence[drawn]}
    if "X_umap" in cells.obsm:
        caption = f"UMAP of the fine-tuned embedding, {of_cells(len(drawn), cells.n_obs)}; obsm['X_umap']."
        umap = np.asarray(cells.obsm["X_umap"])[drawn]
        sections += cell_map(umap, columns, caption, "Map", palettes=palettes)
    else:
        sections.append(no_map("Map"))
    if UNKNOWN_REASON in cells.obs:
        reasons = cells.obs[UNKNOWN_REASON].astype(str)
        rows = [(name, int(n)) for name, n in reasons[reasons != ""].value_counts().items()]
        note = "Cells that are unlike the labelled cells of the fit, by the most obvious reason."
        if rows:
            sections.append(Table(["reason", "cells"], rows[:LISTED], note, "Unknown cells"))
        else:
            sections.append(Text("All cells resemble labelled cells of the fit.", "Unknown cells"))
    sample = (facts.get("context") or {}).get("batch_key") or None
    sections += tissue_maps(
        cells, {LABEL: columns[LABEL]}, drawn, sample_key=sample, palettes=palettes
    )
    read = read_counts(path, drawn, facts)
    if read is not None:
        groups = cells.obs[LABEL].iloc[drawn].astype(str).astype("category").array
        sections += marker_sections(*read, groups, "type")
    low = float(np.mean(confidence < 0.5))
    return Page(
        f"Cell types of {Path(path).name}",
        f"{cells.n_obs:,} cells of {len(counts)} types; median confidence {np.median(confidence):.2f}, "
        f"{low:.0%} of the cells below one half.",
        [*sections, *input_table(facts)],
    )


def imputed(path: str | os.PathLike, estimator: Any, keys: Mapping[str, Any]) -> Page:
    """Show imputed genes: their confidence, and maps of some genes with measured values.

    Args:
        path: The output file.
        estimator: The imputer.
        keys: Reading options that differ from the fit.
    """
    from cellplm_jax import plot
    from cellplm_jax.tasks.files import read_annotations
    from cellplm_jax.tasks.impute import FACTS, IMPUTED

    spatial_key = estimator.reading.changed(**keys).spatial_key or "spatial"
    cells = read_annotations(path, obsm=[IMPUTED, spatial_key], uns=[FACTS])
    values = cells.obsm[IMPUTED]
    facts = cells.uns.get(FACTS, {})
    logged = bool(facts.get("log_normalized", False))
    beside = estimator.beside_measured(path, values, log_normalized=logged, **keys)
    confidence = estimator.confidence.reindex(values.columns)
    order = confidence.sort_values(ascending=False, na_position="last").index
    names = dict(zip(order, named(order), strict=True))
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
            f"mean correlation with it is {np.nanmean(beside.pearson):.2f}."
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
    return Page(f"Imputed genes of {Path(path).name}", summary, [*sections, *input_table(facts)])


def _beside(beside: Any, points: np.ndarray, names: Mapping[str, str]) -> list[Section]:
    """Return spatial maps of imputed genes and measured ones."""
    from cellplm_jax import plot

    drawn = some(len(points))
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
            (other,) = named([pair.other])
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
    from cellplm_jax.tasks.denoise import FACTS, LAYER
    from cellplm_jax.tasks.denoise_view import before_and_after
    from cellplm_jax.tasks.files import read_annotations

    embeddings = ("X_umap", "X_cellplm_integrated", "X_cellplm", "X_pca")
    cells = read_annotations(path, obsm=embeddings, uns=[FACTS])
    facts = cells.uns.get(FACTS, {})
    drawn = some(cells.n_obs)
    comparison = before_and_after(estimator, path, LAYER, rows=drawn, genes=genes, **keys)
    after = "expected if non-zero" if facts.get("detected") else "expected"
    totals = "The expected counts of each cell sum to its measured total."
    if facts.get("detected"):
        totals = "Counts conditional on being non-zero are larger than the measured counts."
    names = named(comparison.genes)
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
                f"One point per gene with a count, over {of_cells(len(drawn), cells.n_obs)}. On the line both are "
                f"equal. {totals}",
                "Means of all genes",
            ),
            *_pool(facts),
            *input_table(facts),
            *messages(estimator.messages),
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
            points, place = laid_out(cells.obsm[key], drawn), f"UMAP of obsm['{key}']."
        elif len(drawn) > NEIGHBORS:
            components = pca_baseline(found.counts)
            points = laid_out(components, np.arange(len(drawn)))
            place = "UMAP of the principal components of the counts, before denoising."
    if points is None:
        return [no_map("Before and after")]
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
            facts_table(
                {
                    "nonzeros": totals["nonzeros"],
                    **reported,
                    "megabytes": facts["bytes"] / 1e6 if facts["bytes"] else "",
                    "fingerprint": facts["fingerprint"],
                }
            ),
            *messages(notes),
        ],
    )  # fmt: skip


def model(source: str | os.PathLike, facts: Mapping[str, Any]) -> Page:
    """Show a model: its card, parameters, configuration, and training curves if available."""
    from cellplm_jax import plot
    from cellplm_jax.train.metrics import read_metrics

    parameters = {name: n for name, n in facts["parameters"].items() if name != "total"}
    sections: list[Section] = [
        facts_table(facts["card"], "Card"),
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
