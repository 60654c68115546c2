"""Reports of perturbations, integration and tissue samples: effects, scores and baselines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellplm_jax.data.own_counts import read_counts
from cellplm_jax.errors import InputError
from cellplm_jax.report.blocks import (
    SCORES,
    cell_map,
    color_keys,
    columns_of,
    facts_table,
    input_table,
    laid_out,
    messages,
    no_map,
    of_cells,
    palettes_of,
    some,
    telling,
)
from cellplm_jax.report.html import Figure, Section, Table
from cellplm_jax.report.pages import Page

DRAWN, DRAWN_GENES, ROWS = 6, 12, 30
"""Number of perturbations and of genes of each that are drawn, and of rows in tables and maps."""

CHANGE = (
    "Change of the mean of log1p of counts per 10,000; +1 is about 2.7 times as much, and \N{MINUS SIGN}1 about 2.7 "
    "times less."
)


def predictor(estimator: Any) -> Page:
    """Show a fitted predictor: left-out perturbations, measured and predicted, and the baselines."""
    from cellplm_jax import plot
    from cellplm_jax.data.genes import symbols_of

    sections: list[Section] = []
    left_out = estimator.left_out
    if left_out is not None:
        symbols = symbols_of(estimator.model.genes)
        table = left_out.table()
        # By the measured change: a prediction must not choose what is shown of it.
        largest = np.argsort([-abs(np.array(row)).mean() for row in left_out.measured])[:DRAWN]
        several = len(set(left_out.groups)) > 1
        title = [
            f"{name}, {group}" if several else name
            for name, group in zip(left_out.perturbations, left_out.groups, strict=True)
        ]
        import pandas as pd

        panels = {
            title[row]: pd.DataFrame(
                {
                    "measured": left_out.measured[row][:DRAWN_GENES],
                    "predicted": left_out.predicted[row][:DRAWN_GENES],
                    "mean of the others": left_out.mean_change[row][:DRAWN_GENES],
                },
                index=[symbols[gene] for gene in left_out.genes[row][:DRAWN_GENES]],
            )
            for row in largest
        }
        sections.append(
            Figure(
                plot.effect_panels(panels)[0],
                "Measured and predicted changes of the genes that change most, by perturbation",
                "The perturbations with the largest changes, and the genes that change most under each. Predictions "
                f"were made without the cells of the perturbation. {CHANGE}",
                "Left-out perturbations",
            )
        )
        names = [
            "rmse",
            "rmse_additive",
            "rmse_mean_change",
            "rmse_no_change",
            "pearson",
            "pearson_mean_change",
        ]
        means = table[names].mean()
        rows = [("mean", "", int(table["cells"].sum()), *map(float, means))]
        for number, (_, row) in enumerate(table.iterrows()):
            if number < ROWS:
                rows.append(
                    (
                        title[number],
                        row["group"],
                        int(row["cells"]),
                        *(float(row[n]) for n in names),
                    )
                )
        sections.append(
            Table(
                [
                    "perturbation",
                    "group",
                    "cells",
                    "RMSE",
                    "additive",
                    "mean of the others",
                    "no change",
                    "correlation",
                    "of the mean of the others",
                ],
                rows,
                "RMSE of the changes of all genes, and that of three baselines; correlation over genes. Additive: sum "
                "of the measured targets of a combination."
                + (f" The first {ROWS} of {len(table)}." if len(table) > ROWS else ""),
                "Prediction and baselines",
            )
        )
    sections += [facts_table(estimator.facts), *messages(estimator.messages)]
    number = estimator.facts.get("perturbations", len(estimator.perturbations))
    return Page(
        "Perturbations: fitted",
        f"{number:,} perturbations, control '{estimator.control}'.",
        sections,
    )


def perturbed(found: Any, estimator: Any = None) -> Page:
    """Show predicted changes: the genes with the largest changes, as a map and a table."""
    from cellplm_jax import plot
    from cellplm_jax.data.genes import symbols_of

    change = found.change.iloc[:ROWS]
    names = dict(
        zip(
            change.columns,
            symbols_of(list(map(str, change.columns))),
            strict=True,
        )
    )
    largest = change.abs().max(axis=0).sort_values(ascending=False).index[:ROWS]
    mean = None if estimator is None else estimator.mean_change
    rows = []
    for number, (perturbation, values) in enumerate(change.iterrows()):
        order = values.abs().sort_values(ascending=False).index[:5]
        listed = ", ".join(f"{names[gene]} {values[gene]:+.2f}" for gene in order)
        listed = listed.replace(" -", " \N{MINUS SIGN}")
        row = [perturbation, found.known.iloc[number], float(np.sqrt((values**2).mean())), listed]
        if mean is not None:
            # A correlation with a constant is undefined, and numpy would warn.
            constant = values.std() == 0 or mean.std() == 0
            row.insert(3, "" if constant else float(np.corrcoef(values, mean)[0, 1]))
        rows.append(tuple(row))
    columns = ["perturbation", "known", "size", "largest changes"]
    if mean is not None:
        columns.insert(3, "correlation with the mean change")
    more = (
        ""
        if len(found.change) <= ROWS
        else f" The first {ROWS} of {len(found.change)} perturbations."
    )
    return Page(
        "Predicted perturbations",
        f"Changes of {found.change.shape[1]:,} genes under {len(found.change):,} perturbations, relative to control "
        f"cells.{more}",
        [
            Figure(
                plot.change_map(change[largest].rename(columns=names)),
                "Map of the genes with the largest changes",
                f"The genes with the largest changes under any of these. {CHANGE}",
                "Changes",
            ),
            Table(
                columns,
                rows,
                "Known: whether it, or its targets, were in the training data. Size: root mean square of the changes "
                "of all genes."
                + (
                    " A correlation of 1 with the mean change of the training perturbations (the baseline) means that "
                    "nothing specific is predicted."
                    if mean is not None
                    else ""
                ),
                "Perturbations",
            ),
            *messages(found.messages),
        ],
    )


def integrated(path: str | os.PathLike, key: str, columns: Sequence[str]) -> Page:
    """Show an integrated embedding by batch, before and after; without an embedding, before are components."""
    from cellplm_jax.evaluate.embedding import pca_baseline
    from cellplm_jax.tasks.files import read_annotations

    before = ("X_cellplm", "X_pca")
    cells = read_annotations(
        path,
        obsm=[key, *before],
        uns=["cellplm_integration", *color_keys(columns)],
    )
    drawn = some(cells.n_obs)
    known = [name for name in columns if name in cells.obs.columns]
    columns_drawn = columns_of(cells.obs, known, drawn)
    palettes = palettes_of(cells, known)
    sections: list[Section] = []
    first = next((name for name in before if name in cells.obsm), None)
    read = read_counts(path, drawn, cells.uns.get("cellplm_integration", {}))
    embeddings: dict[str, tuple[str, Any]] = {}
    if first is not None:
        embeddings["Before"] = (f"obsm['{first}']", np.asarray(cells.obsm[first])[drawn])
    elif read is not None:
        try:
            components = pca_baseline(read[0])
            embeddings["Before"] = ("principal components of the counts", components)
        except InputError:
            pass
    embeddings["Integrated"] = (f"obsm['{key}']", np.asarray(cells.obsm[key])[drawn])
    for heading, (name, values) in embeddings.items():
        coordinates = laid_out(values, np.arange(len(values)))
        caption = f"UMAP of {name}, {of_cells(len(drawn), cells.n_obs)}."
        if coordinates is None:
            sections.append(no_map(heading))
        else:
            sections += cell_map(coordinates, columns_drawn, caption, heading, palettes=palettes)
    if known:
        if (
            "principal components of the counts" not in {name for name, _ in embeddings.values()}
            and read is not None
        ):
            with contextlib.suppress(InputError):
                embeddings["Components"] = ("", pca_baseline(read[0]))
        batches = cells.obs[known[0]].iloc[drawn].astype(str).to_numpy()
        labels = cells.obs[known[1]].iloc[drawn] if len(known) > 1 else None
        sections += _compared(embeddings, batches, labels, of_cells(len(drawn), cells.n_obs))
    facts = cells.uns.get("cellplm_integration", {})
    summary = f"{cells.n_obs:,} cells" + (f", batches of '{known[0]}'." if known else ".")
    return Page("Integrated embedding", summary, [*sections, *input_table(facts)])


def _compared(
    embeddings: Mapping[str, tuple[str, Any]],
    batches: Any,
    labels: Any,
    number: str,
) -> list[Section]:
    """Return the scores of the embeddings of the same cells as a table, and those of Harmony on their components."""
    from cellplm_jax.errors import MissingDependencyError
    from cellplm_jax.evaluate.embedding import integration_scores
    from cellplm_jax.tasks.alignment import harmony, numbers_of

    # Scores of mixing are undefined for one batch.
    if len(set(batches)) < 2:
        return []
    named = {
        "integrated"
        if heading == "Integrated"
        else ("before: " + what if what else "components"): values
        for heading, (what, values) in embeddings.items()
    }
    # Harmony needs components as its input: it is defined on them, not on the model's latent.
    components = next((v for name, v in named.items() if "components" in name), None)
    if components is not None:
        with contextlib.suppress(MissingDependencyError):
            named["Harmony on components"] = harmony(components, numbers_of(batches))
    try:
        scores = {
            name: integration_scores(values, batches, labels) for name, values in named.items()
        }
    except InputError:
        return []
    rows = [
        (SCORES[score][0], *(float(own[score]) for own in scores.values()), SCORES[score][1])
        for score in SCORES
        if all(score in own for own in scores.values())
    ]
    caption = f"Scores of {number}. Harmony on principal components is the baseline."
    return [Table(["score", *scores, "meaning"], rows, caption, "Batch mixing and preserved types")]


def classifier(estimator: Any) -> Page:
    """Show a fitted sample classifier: tests of the labels, and the shift of every cell type."""
    facts = estimator.facts
    return Page(
        "Tissue samples: fitted",
        f"{facts['samples']:,} samples of {facts['cells']:,} cells, labels {', '.join(estimator.labels)}.",
        [*_shifts(estimator), facts_table(facts), *messages(estimator.messages)],
    )


def _shifts(estimator: Any) -> list[Section]:
    """Return the table of the shifts of cell types."""
    table = estimator.shifts
    if "p" not in table:
        return []
    columns = ["type", "cells", "samples", "p", "p_pseudobulk", "p_latent", "genes"]
    rows = [
        # Only NaN differs from itself: a type that could not be tested has no p-value.
        tuple("" if value != value else value for value in row)
        for row in table.sort_values("p")[columns].itertuples(index=False, name=None)
    ]
    return [
        Table(
            [
                "type",
                "cells",
                "samples",
                "p, corrected",
                "p, expression",
                "p, latent",
                "genes that differ most",
            ],
            rows,
            "Shift of the mean expression of each type between the labels (pseudobulk): p by permuting the labels of "
            "the samples; corrected for the number of types. Differences in the proportions of types do not count. The "
            "latent of a type also shifts when other cells of its sample do, so its p is for comparison.",
            "Shifts of cell types between labels",
        )
    ]


def samples(path: str | os.PathLike, table: Any, estimator: Any) -> Page:
    """Show labelled samples, and the contributions of their cells."""
    from cellplm_jax import plot
    from cellplm_jax.tasks.files import read_annotations
    from cellplm_jax.tasks.samples import CONTRIBUTION, FACTS, LABEL, TYPE

    cells = read_annotations(path, uns=[FACTS])
    facts = cells.uns.get(FACTS, {})
    counts = table["label"].value_counts()
    rows = [
        (name, str(row["label"]), float(row["confidence"]), int(row["cells"]), float(row["shift"]))
        for name, row in table.iterrows()
    ]
    listed = ", ".join(f"{n} {label}" for label, n in counts.items() if n)
    sections: list[Section] = [
        Table(
            ["sample", "label", "confidence", "cells", "mean contribution"],
            rows,
            "Confidence: probability of the label, from the mean latent. Mean contribution: evidence for the label by "
            "the shift of cell types, without their proportions.",
            "Samples",
        )
    ]
    caption = (
        "Contribution of each cell to the label of its sample: log-odds by the shift of its type; above 0: for the "
        "label, 0: the type does not shift."
    )
    heading = "Contributions of the cells"
    if TYPE in cells.obs:
        drawn = plot.values_by_group(
            cells.obs[CONTRIBUTION],
            cells.obs[TYPE],
            cells.obs[LABEL],
            value_label="contribution to the label (log-odds)",
        )
        sections.append(
            Figure(drawn, "Contributions of the cells by type and label", caption, heading)
        )
    else:
        drawn = plot.histogram(
            cells.obs[CONTRIBUTION], value_label="contribution to the label (log-odds)"
        )
        sections.append(
            Figure(
                drawn,
                "Histogram of the contributions",
                "Terms of the logit of the sample.",
                heading,
            )
        )
    # Columns that are constant within samples are not specific to kinds of cells.
    key = estimator.facts.get("sample_key")
    within = cells.obs.drop(columns=[LABEL, TYPE], errors="ignore")
    if key in within:
        sample = within[key].astype(str)
        within = within.loc[:, [within[n].groupby(sample).nunique().max() > 1 for n in within]]
    for name in telling(within):
        groups = cells.obs.groupby(cells.obs[name].astype(str), observed=True)[CONTRIBUTION]
        means = groups.mean().sort_values(ascending=False)
        by_group = [
            (group, int(groups.size()[group]), float(mean)) for group, mean in means.items()
        ]
        sections.append(Table([name, "cells", "mean contribution"], by_group))
    sections += [*_shifts(estimator), *input_table(facts), *messages(estimator.messages)]
    return Page(f"Samples of {Path(path).name}", f"{len(table):,} samples: {listed}.", sections)
