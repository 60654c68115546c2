"""Whether a pool is below its better part: imputer and perturbation predictor, seed by seed, from ``results/``.

    python benchmarks/quality/pools.py

Writes ``pools.md``. The better part of a row has the better mean over the seeds: ridge regression or the reference's
mean, mean change or no change, each as the benchmark computes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PARTS = {
    "imputation": ("ridge regression", "reference mean"),
    "perturbation": ("mean change", "no change"),
}
SCORES = {"pearson": 1, "rmse": -1, "mae": -1}
"""Scores, and whether higher is better."""


def main() -> None:
    """Write the table."""
    lines = [
        "Gain of the pooled estimators (model `small`) over the better of their simple parts (by the mean over the "
        "seeds): mean over seeds, and the worst seed. Positive: the pool is better. Pools are fitted to squared errors "
        "of held-out cells or perturbations, not to absolute ones. Computed from the runs of the table above.",
        "",
        "| task, data set | score | better part | pooled | gain | worst seed | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, parts in PARTS.items():
        rows = json.loads((HERE / "results" / f"{task}.json").read_text())
        scored = {
            (r["dataset"], r["method"], r["seed"]): r["scores"] for r in rows if "scores" in r
        }
        for dataset in sorted({key[0] for key in scored}):
            seeds = sorted(key[2] for key in scored if key[:2] == (dataset, "small"))
            for score, sign in SCORES.items():
                own = np.array([scored[dataset, "small", seed][score] for seed in seeds])
                other = np.array(
                    [[scored[dataset, part, seed][score] for part in parts] for seed in seeds],
                    float,
                )
                best = other[:, np.nanargmax(sign * other.mean(axis=0))]
                gain = sign * (own - best)
                lines.append(
                    f"| {task}, {dataset} | {score} | {best.mean():.4f} | {own.mean():.4f} | {gain.mean():+.4f} | "
                    f"{gain.min():+.4f} | {len(seeds)} |"
                )
    (HERE / "pools.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
