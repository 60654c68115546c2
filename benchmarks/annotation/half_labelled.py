"""Half of the cells labelled: the annotator's network, a logistic regression on genes, and their average.

Half of the cells of each type are labelled (stratified), the others are predicted. Detection of unknown types is off.
Types with fewer than eight cells and cells without a type are omitted. Rows that ``half_labelled.json`` has already are
kept.

    python benchmarks/annotation/half_labelled.py --data DIR [--seeds 3] [--datasets NAME ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import cellplm_jax as cellplm  # noqa: E402
from benchmarks.machine import machine  # noqa: E402

DATASETS = (
    "pbmc3k",
    "zheng_purified_pbmc",
    "kang_muscat_labelled",
    "hashtag_cell_lines_2000genes",
    "wu2020_tcells_200",
    "starmap_mouse_v1_1020genes",
)
NO_TYPES = ("unassigned", "Doublet", "Negative", "nan", "None", "")
SMALLEST_TYPE = 8
METHODS = {
    "network_macro_f1": "network alone",
    "linear_macro_f1": "logistic regression on 3,000 genes",
    "macro_f1": "as predicted",
    "neighbors_macro_f1": "neighbours' label transfer",
}


def measure(adata: anndata.AnnData, seed: int) -> dict[str, float]:
    """Fit to one half of the cells and score the other."""
    train, test = train_test_split(
        np.arange(adata.n_obs), test_size=0.5, stratify=adata.obs["cell_type"], random_state=seed
    )
    batch = "batch" if "batch" in adata.obs and adata.obs["batch"].nunique() > 1 else None
    start = time.process_time()
    annotator = cellplm.CellTypeAnnotator("small", unknown_rate=None, quiet=True, seed=seed)
    annotator.fit(adata[train].copy(), label_key="cell_type", batch_key=batch)
    scores = annotator.score(adata[test].copy())
    row = {name: round(float(scores[name]), 4) for name in METHODS}
    return {**row, "processor seconds": round(time.process_time() - start)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the Markdown."""
    data = pd.DataFrame.from_dict(rows, orient="index")
    data["set"] = [name.rpartition(" ")[0] for name in data.index]
    names = list(dict.fromkeys(data["set"]))
    lines = [
        "# Half of the cells labelled",
        "",
        "Macro F1 on the other half, mean ± standard deviation over seeds (split, start of training); `small`, which",
        "did not see these cells. The head of the network uses the pretrained latent and the same 3,000 genes. Made by "
        "`benchmarks/annotation/half_labelled.py`.",
        "",
        "| | " + " | ".join(METHODS.values()) + " | seeds | processor s |",
        "|---|" + "---|" * (len(METHODS) + 2),
    ]
    for name in names:
        part = data[data["set"] == name]
        scores = [f"{part[m].mean():.3f} ± {part[m].std(ddof=0):.3f}" for m in METHODS]
        seconds = f"{part['processor seconds'].mean():.0f}"
        lines.append("| " + " | ".join([name, *scores, str(len(part)), seconds]) + " |")
    means = data.groupby("set")[list(METHODS)].mean().mean()
    lines.append("| mean | " + " | ".join(f"**{means[m]:.3f}**" for m in METHODS) + " | | |")
    return "\n".join([*lines, "", f"{machine()}.", ""])


def main() -> None:
    """Measure what is missing, and write the table after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    arguments = parser.parse_args()
    stored = HERE / "half_labelled.json"
    rows = json.loads(stored.read_text()) if stored.exists() else {}
    for seed in range(arguments.seeds):
        for name in arguments.datasets:
            if f"{name} {seed}" in rows:
                continue
            adata = anndata.read_h5ad(arguments.data / f"{name}.h5ad")
            labels = adata.obs["cell_type"].astype(str)
            sizes = labels.value_counts()
            kept = ~labels.isin(NO_TYPES) & labels.isin(sizes.index[sizes >= SMALLEST_TYPE])
            adata = adata[kept.to_numpy()].copy()
            adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
            rows[f"{name} {seed}"] = measure(adata, seed)
            print(name, seed, rows[f"{name} {seed}"], flush=True)
            stored.write_text(json.dumps(rows, indent=1) + "\n")
            (HERE / "half_labelled.md").write_text(table(rows))


if __name__ == "__main__":
    main()
