"""The committed table of the quality benchmark, out of the results of every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# Between a mean and its deviation, which belong on one line.
BESIDE = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
TITLES = {
    "annotation": (
        "Annotation",
        "macro_f1",
        "Whole batches are held out (Zheng, which has one: 30 % of the cells of every label). Every type is among the "
        "training labels, and detection of unknown types is off: every method labels every cell. By macro F1.",
    ),
    "imputation": (
        "Imputation",
        "pearson",
        "30 % of the genes of one section are hidden, the other three sections are the reference. Scores a gene over "
        "cells, on log-normalised values. By Pearson's correlation.",
    ),
    "denoising": (
        "Denoising",
        "expected_rmse",
        "10 % of the non-zeros of 2,000 variable genes are hidden; errors on log-normalised values there. *expected*: "
        "of the expected count; *detected*: of the count given that it is not zero. By the first error.",
    ),
    "integration": (
        "Clustering and integration",
        "knn_accuracy",
        "Labels (Leiden at resolution 1.0, chosen beforehand) and the mixing of batches. By accuracy of neighbours.",
    ),
    "perturbation": (
        "Perturbation",
        "pearson",
        "Papalexi: a fifth of the targets is held out; Kang: the stimulated cells of one cell type. Change of mean "
        "log-normalised expression against control, on all genes and (`_top`) the 20 that change most. By correlation.",
    ),
}
"""Heading, main score and how to read it."""


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean and standard deviation over seeds, by data set and method."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        entry = found.setdefault(row["dataset"], {}).setdefault(
            row["method"], {"scores": {}, "seconds": [], "errors": []}
        )
        if "error" in row:
            entry["errors"].append(row["error"])
            continue
        entry["seconds"].append(row["seconds"])
        for name, value in row["scores"].items():
            entry["scores"].setdefault(name, []).append(value)
    for methods in found.values():
        for entry in methods.values():
            entry["seeds"] = len(entry["seconds"])
            entry["seconds"] = (
                round(float(np.mean(entry["seconds"])), 1) if entry["seconds"] else None
            )
            entry["scores"] = {
                name: _mean_and_deviation(values)
                for name, values in entry["scores"].items()
                if np.isfinite(values).any()
            }
    return found


def _mean_and_deviation(values: list[float]) -> list[float]:
    finite = np.asarray(values, float)[np.isfinite(values)]
    spread = finite.std(ddof=1) if len(finite) > 1 else 0.0
    return [round(float(finite.mean()), 4), round(float(spread), 4)]


def _table(methods: dict[str, dict[str, Any]], main: str) -> list[str]:
    names = list(dict.fromkeys(name for entry in methods.values() for name in entry["scores"]))
    lines = [
        "| method | " + " | ".join(names) + " | seeds | s a seed |",
        "|" + "---|" * (len(names) + 3),
    ]
    sign = 1 if "rmse" in main or "mae" in main else -1

    def key(entry: dict[str, Any]) -> float:
        value = entry["scores"].get(main)
        return sign * value[0] if value else float("inf")

    for method, entry in sorted(methods.items(), key=lambda item: key(item[1])):
        cells = []
        for name in names:
            value = entry["scores"].get(name)
            spread = f"{BESIDE}{value[1]:.3f}" if value and entry["seeds"] > 1 else ""
            cells.append(f"{value[0]:.3f}{spread}" if value else "-")
        errors = f" ({entry['errors'][0]})" if entry["errors"] else ""
        seconds = "-" if entry["seconds"] is None else f"{entry['seconds']:.0f}"
        lines.append(f"| {method}{errors} | {' | '.join(cells)} | {entry['seeds']} | {seconds} |")
    return lines


def write_tables(results: Path, out: Path) -> None:
    """Write ``quality.md`` and ``quality.json`` from ``results/*.json``."""
    content: dict[str, Any] = {}
    lines = ["# Quality: the tasks, side by side", ""]
    versions: dict[str, str] = {}
    machines: list[str] = []
    for task, (title, main, how) in TITLES.items():
        path = results / f"{task}.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text())
        for row in rows:
            versions |= row.get("versions", {})
            machines.append(row["machine"])
        content[task] = summarize(rows)
        lines += [
            f"## {title}",
            "",
            how,
            "Mean ± standard deviation over seeds, where there are several.",
            "",
        ]
        for dataset, methods in content[task].items():
            lines += [f"**{dataset}**", "", *_table(methods, main), ""]
    lines += [
        "## Machine and versions",
        "",
        "; ".join(dict.fromkeys(machines)) + ". " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + ".",
        "",
        "Made by `benchmarks/quality/run.py`. Seconds include fitting and predicting, compilation too, not imports. "
        "Most fits had one core, and other work ran beside many, so they say no more than the order of magnitude.",
        "",
    ]  # fmt: skip
    (out / "quality.md").write_text("\n".join(lines))
    content["machine"], content["versions"] = list(dict.fromkeys(machines)), versions
    (out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
