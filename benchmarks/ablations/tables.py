"""The committed tables and chart of the ablations, out of the rows of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent

VARIANTS = {
    "small": "full recipe (`:small`)",
    "start": "full recipe, before training",
    "no_projection": "random start",
    "no_discriminants": "without discriminants",
    "no_restoration": "without restoration",
    "mlp_encoder": "MLP for transformer",
    "no_masks": "without masks",
    "components": "50 principal components",
}

SCORES = {
    "ari": "ARI",
    "nmi": "NMI",
    "knn_accuracy": "neighbours' accuracy",
    "carried_labels": "between studies",
    "masked_correlation_per_gene": "held-out, by gene",
    "masked_correlation": "pooled",
    "nb_log_likelihood": "log-likelihood",
}

PAPER_CONTEXTS = "32,768, 2,048, 128, 32: .773; 16: .770; 8: .768; 4: .769; 2: .767; 1: .768"

CONTEXTS = {
    "zheng_purified_pbmc": ("knn_accuracy", "Zheng PBMC, kNN accuracy"),
    "pbmc3k": ("knn_accuracy", "PBMC3k, kNN accuracy"),
    "xenium_breast_jef2023_4fov": (
        "masked_correlation_per_gene",
        "Xenium breast, hidden counts by gene",
    ),
}


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation where there are several values."""
    array = np.asarray(list(values), float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def shown(values: Sequence[float], sign: bool = False) -> str:
    """Write mean and deviation; "-" where there is no value."""
    if not len(values):
        return "-"
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:+.3f}" if sign else f"{mean:.3f}"
    return text if deviation is None else f"{text} ± {deviation:.3f}"


def by_variant(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Return scores of the pretraining variants: {variant: {score: {seed: value}}}."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["part"] == "pretraining":
            scores = found.setdefault(row["name"], {})
            for name, value in row["scores"].items():
                if name in SCORES:
                    scores.setdefault(name, {})[row["seed"]] = value
    return found


def common_seeds(found: dict[str, dict[str, dict[int, float]]], score: str) -> set[int]:
    """Return the seeds that every variant with this score has; principal components have none to choose."""
    seeds = [set(v[score]) for name, v in found.items() if score in v and name != "components"]
    return set.intersection(*seeds) if seeds else {0}


def chosen_seeds(values: dict[int, float], seeds: set[int]) -> list[float]:
    """Return the values of some seeds, in their order."""
    return [value for seed, value in sorted(values.items()) if seed in seeds]


def by_context(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the scores of contexts: {what: {size: value}}."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["part"] == "contexts":
            name, size = row["name"].rsplit(" ", 1)
            found.setdefault(name, {})[int(size)] = row["scores"][CONTEXTS[name][0]]
    return {name: dict(sorted(found[name].items())) for name in CONTEXTS if name in found}


def by_position(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the scores of imputation in simulated tissue: {name: {score: values over seeds}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["part"] == "positions":
            for name, value in row["scores"].items():
                found.setdefault(row["name"], {}).setdefault(name, []).append(value)
    return found


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body), ""]


def variant_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines on the pretraining variants."""
    found = by_variant(rows)
    names = [name for name in VARIANTS if name in found]
    if not names:
        return []
    trained = [row for row in rows if row["part"] == "pretraining"]
    first = next((row for row in trained if row["facts"]), trained[0])
    settings, facts = first["settings"], first["facts"]
    scores = [score for score in SCORES if any(score in found[name] for name in names)]
    lines = [
        "## Pretraining without one part of the recipe",
        "",
        f"{settings['steps']} steps of {settings['cells']} cells, the same batches for all variants of a seed "
        f"({facts.get('training_cells', 0):,} training cells with seed 0). ARI and NMI (Leiden at resolution 1), "
        "accuracy of 15 neighbours: zero-shot, mean of six labelled datasets that were not trained on. Between "
        "studies: macro F1 of labels carried between three blood studies by 15 neighbours. Held-out: a quarter of the "
        "genes is hidden in every cell of samples that are not trained on; Pearson's correlation of log1p counts and "
        "log-likelihood in nats per hidden entry.",
        "",
    ]
    # The seed decides what is held out, so variants are compared on the seeds that all of them have.
    common = {score: common_seeds(found, score) for score in scores}
    body = [
        [
            VARIANTS[name],
            *(shown(chosen_seeds(found[name].get(s, {}), common[s])) for s in scores),
            ", ".join(map(str, sorted({seed for v in found[name].values() for seed in v}))),
        ]
        for name in names
    ]
    lines += table(["variant", *(SCORES[s] for s in scores), "seeds"], body)
    full = found.get("small")
    if full is None:
        return lines
    lines += ["Difference from the full recipe, seed by seed:", ""]
    body = []
    for name in names:
        if name in ("small", "components"):
            continue
        cells = []
        for score in scores:
            pairs = found[name].get(score, {}).items()
            same = full.get(score, {})
            cells.append(
                shown([value - same[seed] for seed, value in pairs if seed in same], sign=True)
            )
        body.append([VARIANTS[name], *cells])
    return [*lines, *table(["variant", *(SCORES[s] for s in scores)], body)]


def scaling_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines on the number of components and of datasets."""
    found: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "scaling":
            components, share = row["name"].split()
            found.setdefault((float(share), int(components)), []).append(row)
    if not found:
        return []
    keys = ("ari", "nmi", "knn_accuracy", "carried_labels")
    body = [
        [
            f"{share:.0%}",
            f"{np.mean([row['facts']['training_cells'] for row in group]):,.0f}",
            str(components),
            *(shown([row["scores"][key] for row in group]) for key in keys),
        ]
        for (share, components), group in sorted(found.items())
    ]
    return [
        "## Size of the projection and of the corpus",
        "",
        "The start of `:small`, before training, with fewer components (and 40 discriminants) and from fewer datasets; "
        "the seed decides which.",
        "",
        *table(["datasets", "cells", "components", *(SCORES[key] for key in keys)], body),
    ]


def context_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines on the size of contexts."""
    found = by_context(rows)
    if not found:
        return []
    sizes = sorted({size for values in found.values() for size in values}, reverse=True)
    body = [
        [f"{size:,}", *(f"{v[size]:.3f}" if size in v else "-" for v in found.values())]
        for size in sizes
    ]
    settings = next(row["settings"] for row in rows if row["part"] == "contexts")
    return [
        "## Cells of a context at inference",
        "",
        f"The bundled model `{settings['model']}`, zero-shot. Cells that are scored are the same in every row. "
        "Xenium: a quarter of the genes of "
        f"{settings['scored_cells']:,} cells is hidden; a context above that size holds others as well, and sections "
        "are mixed in it. "
        f"The paper, macro F1 on MS: {PAPER_CONTEXTS}.",
        "",
        *table(["cells", *(CONTEXTS[name][1] for name in found)], body),
    ]  # fmt: skip


def position_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines on positions in simulated tissue."""
    found = by_position(rows)
    if not found:
        return []
    settings = next(row["settings"] for row in rows if row["part"] == "positions")
    body = [
        [name, shown(scores["pearson_gradient"]), shown(scores["pearson_others"]),
         str(len(scores["pearson_gradient"]))]
        for name, scores in found.items()
    ]  # fmt: skip
    return [
        "## Positions, where the signal is spatial",
        "",
        f"`simulate_tissue`: two sections of {settings['cells'] // settings['batches']} cells, "
        f"{settings['gradient_genes']} genes on a gradient of {settings['gradient_fold']:g}-fold across the section "
        "that no other gene tells of. `GeneImputer` from scratch, one section the reference, the other shown without "
        f"those genes and without half of the markers, {settings['epochs']} epochs at most. Mean over genes of "
        "Pearson's correlation over cells, log-normalised. *Truth*: the expected counts themselves, the most that "
        "can be known; *without places*: those of the same cells had there been no gradient, the most that can be "
        "known of a cell whose place is not told (low totals make all log-normalised values of a cell alike).",
        "",
        *table(["", "genes on the gradient", "hidden markers", "seeds"], body),
    ]  # fmt: skip


def write_tables(rows: list[dict[str, Any]], out: Path) -> None:
    """Write ``OUT.md`` and ``OUT.png``.

    Args:
        rows: All results.
        out: Path without suffix.
    """
    if not rows:
        return
    lines = ["# Ablations", ""]
    if draw(rows, out.with_suffix(".png")):
        lines += [f"![Ablations]({out.name}.png)", ""]
    lines += variant_tables(rows) + scaling_table(rows) + position_table(rows)
    lines += context_table(rows)
    reading = HERE / "reading.md"
    if reading.is_file():
        lines += [reading.read_text().strip(), ""]
    machines = dict.fromkeys(row["machine"] for row in rows)
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    hours = sum(row["seconds"] for row in rows) / 3600
    lines += [
        "## Machine and versions",
        "",
        "; ".join(machines) + ". " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
        f"Made by `benchmarks/ablations/run.py` in {hours:.1f} h of runs, some of them side by side and all beside "
        "other programs: seconds compare nothing. Mean ± standard deviation where there are several seeds.",
        "",
    ]  # fmt: skip
    out.with_suffix(".md").write_text("\n".join(lines))


def draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw variants, contexts and positions into one picture; return whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from cellplm_jax.plot import PALETTE, comparison_bars

    variants, contexts, positions = by_variant(rows), by_context(rows), by_position(rows)
    parts = [part for part in (variants, positions, contexts) if part]
    if not parts:
        return False
    figure, places = pyplot.subplots(
        len(parts), 1, figsize=(16, 3.6 * len(parts)), layout="constrained", squeeze=False
    )
    axes = iter(places[:, 0])
    if variants:
        chosen = ("ari", "nmi", "knn_accuracy", "carried_labels", "masked_correlation_per_gene")
        values = {
            VARIANTS[name].replace("`", ""): {
                SCORES[score]: mean_and_deviation(
                    chosen_seeds(variants[name][score], common_seeds(variants, score))
                )
                for score in chosen
                if score in variants[name]
            }
            for name in VARIANTS
            if name in variants
        }
        bars(comparison_bars, values, next(axes), "Pretraining without one part of the recipe")
    if positions:
        labels = {"pearson_gradient": "genes on the gradient", "pearson_others": "hidden markers"}
        values = {
            name: {labels[score]: mean_and_deviation(found) for score, found in scores.items()}
            for name, scores in positions.items()
        }
        title = "Imputed genes of simulated tissue with a spatial gradient"
        bars(comparison_bars, values, next(axes), title)
    if contexts:
        panel = next(axes)
        for number, (name, values) in enumerate(contexts.items()):
            color = PALETTE[number % len(PALETTE)]
            panel.plot(
                list(values), list(values.values()), "o-", color=color, label=CONTEXTS[name][1]
            )
        panel.set_xscale("log", base=2)
        panel.set(xlabel="cells of a context at inference", ylabel="score", ylim=(0, 1))
        panel.set_title("Context size", loc="left")
        panel.legend(frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


def bars(comparison_bars: Any, values: dict[str, Any], axes: Any, title: str) -> None:
    """Draw means as bars with their deviations."""
    comparison_bars(
        {name: {s: mean for s, (mean, _) in scores.items()} for name, scores in values.items()},
        errors={
            name: {s: deviation or 0.0 for s, (_, deviation) in scores.items()}
            for name, scores in values.items()
        },
        title=title,
        ax=axes,
    )


if __name__ == "__main__":
    results = HERE / "ablations.json"
    write_tables(json.loads(results.read_text()), results.with_suffix(""))
