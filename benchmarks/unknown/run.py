"""Unknown cell types, leave one type out: every type of four data sets is removed from the labelled cells in turn.

Half of the cells of each type are labelled, without the type that is left out; all other cells are predicted. A method
gives each predicted cell a score. Measured: the AUROC of the cells of the left-out type against those of known types;
and, at each method's own threshold for 5 % false alarms (the 95 % quantile of its scores of a third of the labelled
cells, fitted to the others), the shares of known and of unknown cells that are flagged. ``--rivals DIR`` writes the
problems for ``celltypist_scores.py``, which runs in another environment, and reads its scores from there.

Scores that ``unknown.json`` has already are kept.

    python benchmarks/unknown/run.py --data DIR --out benchmarks/unknown [--methods NAME ...] [--rivals DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from scipy import sparse
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.machine import machine
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.evaluate.components import log_normalized
from cellplm_jax.tasks import unknown
from cellplm_jax.tasks.annotation_pool import LINEAR_GENES, LINEAR_PENALTY, log_counts
from cellplm_jax.tasks.contexts import variable_genes
from cellplm_jax.tasks.pretrained import load
from cellplm_jax.tasks.unknown import UnknownDetector, latent_map
from cellplm_jax.train.linear import fit_linear_classifier

DATASETS = (
    "pbmc3k",
    "zheng_purified_pbmc",
    "kang_muscat_labelled",
    "hashtag_cell_lines_2000genes",
)
NO_TYPES = ("unassigned", "Negative", "nan", "None")
"""Labels of cells without a type."""

LINEAGES = {
    "pbmc3k": ("B", "NK", "CD14+ Mono"),
    "zheng_purified_pbmc": ("bcells", "nk", "monocytes"),
    "kang_muscat_labelled": ("B cells", "CD14+ Monocytes"),
}
SMALLEST_TYPE, RATE = 10, 0.05
Rows = dict[tuple[str, str, int], dict[str, Any]]

METHODS = ("cellplm", "logistic regression", "nearest neighbours", "Mahalanobis", "CellTypist")


def _folds(codes: np.ndarray, number: int = 3) -> np.ndarray:
    """Return the fold of each cell, stratified by class."""
    generator, fold = np.random.default_rng(0), np.zeros(len(codes), int)
    for code in np.unique(codes):
        members = generator.permutation(np.flatnonzero(codes == code))
        fold[members] = np.arange(len(members)) % number
    return fold


def _held_out(score: Any, labelled: Any, codes: np.ndarray) -> np.ndarray:
    """Return the scores of a third of the labelled cells; ``score(fit cells, fit codes, cells)``."""
    out = _folds(codes) == 0
    return score(labelled[~out], codes[~out], labelled[out])


def _confidence(cells: sparse.csr_matrix, codes: np.ndarray, others: sparse.csr_matrix) -> Any:
    names, own = np.unique(codes, return_inverse=True)
    found = fit_linear_classifier(cells, own, len(names), penalty=LINEAR_PENALTY)
    return 1.0 - np.exp(found.log_probabilities(others).max(axis=1))


def _distance(cells: np.ndarray, codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    squared = (others**2).sum(1)[:, None] + (cells**2).sum(1)[None] - 2 * others @ cells.T
    nearest = np.partition(np.maximum(squared, 0), 9, axis=1)[:, :10]
    return np.sqrt(nearest).mean(axis=1)


def _mahalanobis(cells: np.ndarray, codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    names, own = np.unique(codes, return_inverse=True)
    means = np.stack([cells[own == code].mean(axis=0) for code in range(len(names))])
    inside = cells - means[own]
    scatter = inside.T @ inside / len(cells)
    size = len(scatter)
    shrunk = 0.7 * scatter + 0.3 * np.trace(scatter) / size * np.eye(size)
    inverse = np.linalg.inv(shrunk)
    gaps = others[:, None] - means[None]
    return ((gaps @ inverse) * gaps).sum(axis=2).min(axis=1)


def problems(path: Path, seed: int) -> Any:
    """Yield (left-out type, counts, labels, labelled cells, cells to predict) and the columns of the model."""
    model = load("small")
    cells = anndata.read_h5ad(path)
    with open_counts(cells, model.genes) as source:
        counts, measured = source.read(0, source.cells), np.flatnonzero(source.measured)
    labels = cells.obs["cell_type"].astype(object).map(str).to_numpy(str)
    names, sizes = np.unique(labels, return_counts=True)
    types = [
        n
        for n, size in zip(names, sizes, strict=True)
        if size >= SMALLEST_TYPE and n not in NO_TYPES
    ]
    kept = np.isin(labels, types)
    counts, labels = sparse.csr_matrix(counts[kept][:, measured]), labels[kept]
    generator, labelled = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for name in types:
        members = generator.permutation(np.flatnonzero(labels == name))
        labelled[members[: len(members) // 2]] = True
    table = latent_map(model.config, model.params)
    latent = None if table is None else table[measured]
    for left_out in types:
        yield (
            left_out,
            counts,
            labels,
            np.flatnonzero(labelled & (labels != left_out)),
            np.flatnonzero(~labelled),
            latent,
        )


def _row(score: np.ndarray, threshold: float, new: np.ndarray) -> dict[str, float]:
    return {
        "auroc": float(roc_auc_score(new, score)),
        "known_flagged": float((score[~new] > threshold).mean()),
        "unknown_flagged": float((score[new] > threshold).mean()),
    }


def measure(path: Path, seed: int, methods: list[str], rivals: Path | None, rows: Rows) -> None:
    """Add the scores of the methods that are not there yet, for every left-out type."""
    for number, (left_out, counts, labels, train, test, latent) in enumerate(problems(path, seed)):
        row = rows.setdefault(
            (path.stem, left_out, seed),
            {"cells": int((labels[test] == left_out).sum()), "labelled": len(train), "scores": {}},
        )
        scores = row["scores"]
        names, codes = np.unique(labels[train], return_inverse=True)
        new = labels[test] == left_out
        missing = [name for name in methods if name not in scores]
        if {"cellplm", "nearest neighbours", "Mahalanobis"} & set(missing):
            detector = UnknownDetector.fit(counts[train], codes, len(names), latent=latent)
            assert detector is not None
            cells = detector.project(counts[test])
            found = detector.compare(cells, list(names), rate=RATE)
            scores["cellplm"] = _row(found.score, 0.0, new)
            reasons, times = np.unique(
                found.reason[new & found.flagged].astype(str), return_counts=True
            )
            row["reason"] = str(reasons[times.argmax()]) if len(reasons) else ""
            own = np.asarray(detector.project(counts[train]), np.float64)
            for method, score in (("nearest neighbours", _distance), ("Mahalanobis", _mahalanobis)):
                limit = np.quantile(_held_out(score, own, codes), 1 - RATE)
                scores[method] = _row(score(own, codes, cells), float(limit), new)
        if "logistic regression" in missing:
            logs = log_counts(counts, variable_genes(counts[train], LINEAR_GENES))
            limit = np.quantile(_held_out(_confidence, logs[train], codes), 1 - RATE)
            confidence = _confidence(logs[train], codes, logs[test])
            scores["logistic regression"] = _row(confidence, float(limit), new)
        if rivals is not None and "CellTypist" in missing:
            problem = rivals / f"{path.stem}_{seed}_{number}"
            done = rivals / f"{problem.name}.scores.npz"
            if done.exists():
                given = np.load(done)
                limit = float(np.quantile(given["null"], 1 - RATE))
                scores["CellTypist"] = _row(given["test"], limit, new)
            elif not problem.with_suffix(".npz").exists():
                problem.parent.mkdir(parents=True, exist_ok=True)
                every = log_normalized(counts)
                np.savez(
                    problem.with_suffix(".npz"),
                    data=every.data, indices=every.indices, indptr=every.indptr, shape=every.shape,
                    train=train, test=test, labels=labels[train], fold=_folds(codes),
                )  # fmt: skip
        sys.stderr.write(f"{path.stem} {left_out}: {scores}\n")


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the table of all types, and the means."""
    # Means compare methods over the same types.
    methods = [name for name in METHODS if all(name in r["scores"] for r in rows)]

    def mean(chosen: list[dict[str, Any]], method: str, key: str) -> float:
        return float(np.mean([r["scores"][method][key] for r in chosen if method in r["scores"]]))

    seeds = len({r["seed"] for r in rows})
    types = len({(r["dataset"], r["type"]) for r in rows})
    lines = [
        "# Unknown cell types: leave one type out",
        "",
        f"{types} types of {len({r['dataset'] for r in rows})} data sets, {seeds} split(s); written by "
        "`benchmarks/unknown/run.py`. Half of the cells are labelled, without the type that is left out.",
        "None of these sets trained the bundled model, and none chose the recipe (`reading.md`).",
        "",
        "| mean over types | " + " | ".join(methods) + " |",
        "|---" * (len(methods) + 1) + "|",
    ]
    lineages = [r for r in rows if r["type"] in LINEAGES.get(r["dataset"], ())]
    for title, chosen, key in (
        ("AUROC", rows, "auroc"),
        ("AUROC, lineages (B, NK, monocytes)", lineages, "auroc"),
        ("known cells flagged at 5 %", rows, "known_flagged"),
        ("unknown cells flagged at 5 %", rows, "unknown_flagged"),
    ):
        values = " | ".join(f"{mean(chosen, m, key):.3f}" for m in methods)
        lines.append(f"| {title} | {values} |")
    lines += [
        "",
        "AUROC by type, flagged shares of `cellplm` (known, unknown), and its most frequent reason:",
        "",
    ]
    lines.append(
        "| data set | left-out type | cells | "
        + " | ".join(methods)
        + " | known | unknown | reason |"
    )
    lines.append("|---" * (len(methods) + 6) + "|")
    for key in dict.fromkeys((r["dataset"], r["type"]) for r in rows):
        chosen = [r for r in rows if (r["dataset"], r["type"]) == key]
        values = " | ".join(f"{mean(chosen, m, 'auroc'):.2f}" for m in methods)
        known, new = (mean(chosen, "cellplm", k) for k in ("known_flagged", "unknown_flagged"))
        lines.append(
            f"| {key[0]} | {key[1]} | {chosen[0]['cells']} | {values} | {known:.3f} | {new:.2f} | "
            f"{chosen[0].get('reason', '')} |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rivals", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    arguments = parser.parse_args()
    store = arguments.out / "unknown.json"
    rows: Rows = {}
    if store.exists():
        for row in json.loads(store.read_text())["rows"]:
            rows[row.pop("dataset"), row.pop("type"), row.pop("seed")] = row
    for seed in range(arguments.seeds):
        for name in arguments.datasets:
            path = arguments.data / f"{name}.h5ad"
            measure(path, seed, arguments.methods, arguments.rivals, rows)
            listed = [
                {"dataset": key[0], "type": key[1], "seed": key[2], **row}
                for key, row in rows.items()
            ]
            document = {
                "machine": machine(), "rate": RATE, "weights": unknown.WEIGHTS, "rows": listed
            }  # fmt: skip
            store.write_text(json.dumps(document, indent=1) + "\n")
            write_table(listed, arguments.out / "unknown.md")


if __name__ == "__main__":
    main()
