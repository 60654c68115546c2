"""Planted differences between tissue samples: which cells does the sample classifier point at?

Cells of a labelled dataset are drawn, with replacement, and dealt to samples with a random effect each; half of the
samples are "sick". Either some genes of one cell type change in them (``shift``), or the type is more frequent
(``proportions``), or nothing differs (``none``). The contribution of a cell should be high for the cells of the type in
sick samples after a shift, and not otherwise. ``before`` is the term of the cell in the logit of the sample, the
contribution of version 0.1.

    python benchmarks/samples/planted.py --data zheng_purified_pbmc.h5ad --out benchmarks/samples/planted.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import sparse
from sklearn.metrics import roc_auc_score

import cellplm_jax as cellplm
from cellplm_jax.tasks.samples import CONTRIBUTION, TYPE

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine

MERGED = {
    "thelper": "CD4 T", "memoryt": "CD4 T", "regulatoryt": "CD4 T", "naivet": "CD4 T",
    "cytotoxict": "CD8 T", "naivecytotoxic": "CD8 T",
}  # fmt: skip
"""Labels of the T cells that are sorted by surface markers and overlap in expression."""

SAMPLES, CELLS, GENES, FOLD = 12, 120, 60, 2.5


def cohort(
    cells: ad.AnnData, scenario: str, seed: int, *, genes: int = GENES
) -> tuple[ad.AnnData, str]:
    """Return a cohort of samples, and the type that differs."""
    random = np.random.default_rng(seed)
    kinds = cells.obs["cell_type"].to_numpy(str)
    names = sorted(set(kinds))
    chosen = names[seed % len(names)]
    rest = [name for name in names if name != chosen]
    picked, sample, sick = [], [], []
    for number in range(SAMPLES):
        ill = number % 2 == 1
        share = 0.4 if ill and scenario == "proportions" else 0.15
        own = random.binomial(CELLS, share)
        draw = [random.choice(np.flatnonzero(kinds == chosen), own)]
        weights = random.dirichlet(np.full(len(rest), 20.0))
        for name, count in zip(rest, random.multinomial(CELLS - own, weights), strict=True):
            draw.append(random.choice(np.flatnonzero(kinds == name), count))
        picked += [np.concatenate(draw)]
        sample += [f"sample {number:02d}"] * CELLS
        sick += ["sick" if ill else "healthy"] * CELLS
    taken = cells[np.concatenate(picked)]
    counts = sparse.csr_matrix(taken.X, dtype=np.float64)
    factor = np.exp(random.normal(0.0, 0.15, (SAMPLES, counts.shape[1])))
    row = np.repeat(np.arange(len(sample)), np.diff(counts.indptr))
    rate = factor[row // CELLS, counts.indices]
    if scenario == "shift":
        expressed = np.asarray(cells.X[np.flatnonzero(kinds == chosen)].mean(axis=0)).ravel()
        moved = random.choice(np.argsort(-expressed)[20:600], genes, replace=False)
        fold = np.ones(counts.shape[1])
        fold[moved] = np.where(random.random(genes) < 0.5, FOLD, 1 / FOLD)
        shifted = (np.array(sick) == "sick") & (taken.obs["cell_type"].to_numpy(str) == chosen)
        rate = np.where(shifted[row], rate * fold[counts.indices], rate)
    # A count becomes a Poisson number around its value times the rate where the rate is not 1.
    extra = random.poisson(counts.data * np.maximum(rate - 1, 0))
    counts.data = random.binomial(counts.data.astype(int), np.minimum(rate, 1)) + extra
    counts.eliminate_zeros()
    result = ad.AnnData(counts.astype(np.float32), var=cells.var[[]].copy())
    result.obs["sample"], result.obs["disease"] = sample, sick
    result.obs["kind"] = taken.obs["cell_type"].to_numpy(str)
    result.obs_names = [f"cell{number}" for number in range(result.n_obs)]
    return result, chosen


def one(model, cells: ad.AnnData, scenario: str, seed: int, type_key: str | None) -> dict:
    """Fit and predict one cohort; score the contributions of its sick samples."""
    data, chosen = cohort(cells, scenario, seed)
    start = time.process_time()
    found = cellplm.SampleClassifier(model, quiet=True, seed=seed)
    found.fit(data, sample_key="sample", label_key="disease", type_key=type_key)
    table = found.predict(data)
    seconds = time.process_time() - start
    contribution = data.obs[CONTRIBUTION].to_numpy(float)
    kept, found._shifts = found._shifts, None
    copy = data.copy()
    found.predict(copy)
    old = copy.obs[CONTRIBUTION].to_numpy(float)
    found._shifts = kept
    sick = (data.obs["disease"] == "sick").to_numpy()
    own = (data.obs["kind"] == chosen).to_numpy()
    best = found.shifts.sort_values("p").iloc[0]
    cells_of = data.obs.loc[data.obs[TYPE] == best["type"], "kind"]
    return {
        "scenario": scenario,
        "seed": seed,
        "types": type_key or "clusters",
        "type": chosen,
        "auroc": roc_auc_score(own[sick], contribution[sick]),
        "auroc_before": roc_auc_score(own[sick], old[sick]),
        "largest_contribution": float(np.abs(contribution).max()),
        "p_shift": found.facts["p_shift"],
        "p_proportions": found.facts["p_proportions"],
        "p_latent": found.facts["p_latent"],
        "p_pseudobulk": found.facts["p_pseudobulk"],
        "first_type_is": cells_of.mode().iloc[0],
        "accuracy": float(
            np.mean(
                [
                    label == ("sick" if n % 2 else "healthy")
                    for n, label in enumerate(table["label"].astype(str))
                ]
            )
        ),
        "seconds": round(seconds, 1),
    }


def page(content: dict) -> str:
    """Return the rows as a page: means over seeds."""
    how = (
        f"{SAMPLES} samples of {CELLS} cells of the purified PBMC of Zheng et al.; T cells that are sorted by surface "
        f"markers are merged to CD4 T and CD8 T; {GENES} genes times or divided by {FOLD}. AUROC of the cells of the "
        "type among the cells of sick samples, by their contribution. Found: seeds with p at most 0.05 (permutation)."
    )
    columns = "planted | types | seeds | AUROC | lowest | highest | AUROC before | shift found | proportions found"
    lines = [
        "# Planted differences between samples",
        "",
        __doc__.split("\n\n")[1].replace("\n", " "),
    ]
    lines += ["", how, "", f"| {columns} |", "|---" * 9 + "|"]
    for scenario in ("shift", "proportions", "none"):
        for types in ("kind", "clusters"):
            rows = [r for r in content["rows"] if (r["scenario"], r["types"]) == (scenario, types)]
            if not rows:
                continue
            auroc = [row["auroc"] for row in rows]
            lines.append(
                f"| {scenario} | {'given' if types == 'kind' else types} | {len(rows)} | {np.mean(auroc):.3f} | "
                f"{min(auroc):.3f} | {max(auroc):.3f} | {np.mean([row['auroc_before'] for row in rows]):.3f} | "
                f"{sum(row['p_shift'] <= 0.05 for row in rows)} | {sum(row['p_proportions'] <= 0.05 for row in rows)} |"
            )
    lines += ["", f"{content['machine']}. Made by `benchmarks/samples/planted.py`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all scenarios and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    cells, model = ad.read_h5ad(arguments.data), cellplm.load("small")
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace(MERGED)
    rows = []
    for seed in range(arguments.seeds):
        for scenario in ("shift", "proportions", "none"):
            for type_key in (None, "kind"):
                rows.append(one(model, cells, scenario, seed, type_key))
                print(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()},
                    flush=True,
                )
                content = {"machine": machine(), "rows": rows}
                arguments.out.write_text(json.dumps(content, indent=1) + "\n")
                arguments.out.with_suffix(".md").write_text(page(content))


if __name__ == "__main__":
    main()
