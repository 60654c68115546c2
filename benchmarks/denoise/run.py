"""The denoising benchmark: errors of hidden counts, and what is left of the markers of cell types.

    python benchmarks/denoise/run.py --data DIR [--rivals-python ENV/bin/python]

A tenth of the non-zeros is hidden; every method gets the visible counts and returns expected counts. scVI and MAGIC
run in the environment of ``--rivals-python`` (``pip install scvi-tools magic-impute``); without it, or if one is not
installed, they are left out and named. What is done is kept in ``denoise.json``, so a stopped run continues;
``denoise.md`` is written from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from problems import DATASETS, Problem, make_problem
from scipy import sparse

from cellplm_jax.evaluate.denoising import (
    denoising_scores,
    gene_means,
    log_normalize,
    marker_scores,
)
from cellplm_jax.tasks.denoise import Denoiser
from cellplm_jax.tasks.denoise_pool import alone, combine, joined_embedding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

HERE = Path(__file__).resolve().parent
RIVALS = ("scVI", "MAGIC")
COLUMNS = {
    "rmse": "RMSE", "mae": "MAE", "pearson": "correlation", "markers_highest": "markers that stay highest",
    "contrast_kept": "contrast kept", "profile_pearson": "pseudobulk correlation",
    "calibration_error": "calibration error", "seconds": "processor s",
}  # fmt: skip


def denoised(cells: anndata.AnnData, fit: bool, seed: int) -> dict[str, np.ndarray]:
    """Return the expected counts of the pool, zero-shot or fitted, of its network alone, and zero-shot of baselines."""
    found = Denoiser("small", quiet=True, seed=seed)
    if fit:
        found.fit(cells)
    # As predict computes it, and from the same parts the network alone.
    z, *_ = found._embed(cells, found.reading)
    table = found._table(cells, found.reading)
    pool = found._pool_for(table, found.reading)
    parts = found._parts(table, z)
    place = {gene: number for number, gene in enumerate(table.genes)}
    columns = [place[gene] for gene in cells.var_names]
    pooled = combine(parts, pool.weights)[:, columns]
    network = combine(parts, alone("network", len(table.genes)), correct=False)[:, columns]
    if fit:
        return {"fitted": pooled, "network alone, fitted": network}
    named = {"zero-shot": pooled, "network alone, zero-shot": network}
    return named | baselines(cells, joined_embedding(z, table.counts))


def baselines(cells: anndata.AnnData, embedding: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean shares over the nearest cells of the joined embedding, the gene mean and the own counts."""
    shares = sparse.csr_matrix(cells.X / np.asarray(cells.X.sum(axis=1)))
    square = np.square(embedding).sum(axis=1)
    distance = square[:, None] + square - 2 * embedding @ embedding.T
    np.fill_diagonal(distance, np.inf)
    result = {}
    for number in (15, 50, 150):
        index = np.argpartition(distance, number, axis=1)[:, :number]
        starts = np.arange(0, index.size + 1, number)
        graph = sparse.csr_matrix((np.ones(index.size), index.ravel(), starts), distance.shape)
        result[f"mean of {number} nearest cells"] = (graph @ shares).toarray()
    result["gene mean"] = np.tile(gene_means(shares), (cells.n_obs, 1))
    result["own counts"] = shares.toarray()
    return result


OURS = ("zero-shot", "fitted")


def rival(python: str, method: str, problem: Problem, seed: int) -> tuple[np.ndarray | None, float]:
    """Run a rival in its environment; None if it fails, with the reason on standard error."""
    script = [python, str(HERE / "rivals.py"), method, str(problem.path), str(seed)]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "out.npy")
        done = subprocess.run([*script, str(out)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            print(f"{method}: left out ({lines[-1]})", file=sys.stderr)
            return None, 0.0
        return np.load(out), float(done.stdout.split()[-1])


def calibration_error(counts: sparse.csr_matrix, shares: np.ndarray) -> float:
    """Return the sum over bins of |expected - counted| over all counts; bins by expected count, three a decade."""
    expected = shares * np.asarray(counts.sum(axis=1))
    place = np.clip((np.log10(np.maximum(expected, 1e-9)) + 6) * 3, 0, 29).astype(int).ravel()
    bins = [np.bincount(place, values.ravel(), 30) for values in (expected, counts.toarray())]
    return float(np.abs(bins[0] - bins[1]).sum() / counts.sum())


def scores_of(problem: Problem, prediction: np.ndarray) -> dict[str, float]:
    """Return the scores of expected counts in any unit per cell."""
    prediction = np.asarray(prediction, np.float64)
    shares = prediction / np.maximum(prediction.sum(axis=1, keepdims=True), 1e-12)
    errors = denoising_scores(log_normalize(problem.counts), np.log1p(1e4 * shares), problem.hidden)
    return {
        **errors,
        **marker_scores(problem.counts, shares, problem.labels),
        "calibration_error": calibration_error(problem.counts, shares),
        "not_finite": int((~np.isfinite(prediction)).sum()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: mean and standard deviation over seeds, by data set and method."""
    lines = [
        "# Denoising",
        "",
        "10 % of the non-zeros of 2,000 variable genes are hidden (kang: all of its 1,256 to 1,267 genes). Errors and "
        "correlation: log1p of counts per 10,000 at the hidden entries, of expected counts. Markers: up to 8 genes per "
        "cell type whose mean is 3 standard errors above that of every other type; contrast: log1p mean of the highest "
        "type minus the mean of the others, median over markers of predicted over counted. Calibration error: "
        "|expected - counted| over bins of the expected count, as a share of all counts. The bundled model was trained "
        "on the counts of eye, not on pbmc3k and kang. Mean ± standard deviation over seeds.",
        "",
        "`python benchmarks/denoise/run.py --data DIR --rivals-python PYTHON`; "
        + "; ".join(sorted({row["machine"] for row in rows})),
        "Processor seconds were measured on a busy machine and include the start of its libraries' first call.",
    ]
    for dataset in DATASETS:
        own = [row for row in rows if row["dataset"] == dataset]
        if not own:
            continue
        markers = sorted({row["scores"]["markers"] for row in own})
        lines += ["", f"**{dataset}** ({markers[0]} to {markers[-1]} markers)", ""]
        lines += [f"| method | {' | '.join(COLUMNS.values())} | seeds |", "|---" * 10 + "|"]
        methods: dict[str, list[dict[str, Any]]] = {}
        for row in own:
            methods.setdefault(row["method"], []).append(row)
        order = sorted(
            methods, key=lambda name: np.mean([r["scores"]["rmse"] for r in methods[name]])
        )
        for name in order:
            cells = []
            for key in COLUMNS:
                values = [
                    r["seconds"] if key == "seconds" else r["scores"][key] for r in methods[name]
                ]
                mean, spread = np.mean(values), np.std(values)
                shown = "-" if not np.isfinite(mean) else f"{mean:.3f} ± {spread:.3f}"
                cells.append(f"{mean:.0f}" if key == "seconds" else shown)
            lines.append(f"| {name} | {' | '.join(cells)} | {len(methods[name])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="directory with the .h5ad files; none: only write the table"
    )
    parser.add_argument("--rivals-python", help="Python with scvi-tools and magic-impute")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--ours", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--datasets", nargs="*", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    path = args.out / "denoise.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    done = {(row["dataset"], row["seed"], row["run"]) for row in rows}
    jobs = [(s, d) for s in args.seeds for d in args.datasets] if args.data else []
    for seed, dataset in jobs:
        chosen = [*args.ours, *(args.rivals if args.rivals_python else [])]
        chosen = [name for name in chosen if (dataset, seed, name) not in done]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as directory:
            problem = make_problem(args.data, dataset, seed, Path(directory))
            for name in chosen:
                if name in RIVALS:
                    prediction, seconds = rival(args.rivals_python, name, problem, seed)
                    found = {} if prediction is None else {name: prediction}
                else:
                    start = time.process_time()
                    cells = anndata.read_h5ad(problem.path)
                    found = denoised(cells, name == "fitted", seed)
                    seconds = time.process_time() - start
                for method, values in found.items():
                    scores = scores_of(problem, values)
                    row = {"dataset": dataset, "seed": seed, "run": name, "method": method,
                           "seconds": round(seconds, 1), "machine": machine(), "scores": scores}  # fmt: skip
                    rows.append(row)
                    shown = "  ".join(f"{key} {scores[key]:.3f}" for key in list(COLUMNS)[:-1])
                    print(f"{dataset} {seed} {method}: {shown}  ({seconds:.0f} s)", flush=True)
                path.write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "denoise.md").write_text(table(rows))


if __name__ == "__main__":
    main()
