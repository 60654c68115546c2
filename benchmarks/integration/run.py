"""Batch integration: the embedding before and after, beside PCA and Harmony on PCA.

Kang: two donors, stimulated or not (four samples; a batch is a sample, so the treatment is removed too). Eye: eight
donors; its cells, without labels, are part of the pretraining data of the bundled model. Labels are used by the scores
only. ``first batch new``: the alignment is fitted without the cells of one batch, which are then moved to it.

    python benchmarks/integration/run.py --data DIR --out benchmarks/integration
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

import cellplm_jax as cellplm
from cellplm_jax.evaluate.embedding import integration_scores, pca_baseline
from cellplm_jax.tasks.alignment import harmony, numbers_of

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from machine import machine, versions_of
from problems import read_human

DATASETS = ("kang_muscat_labelled", "corpus/eye_rpe_choroid")
SHOWN = (
    "ilisi",
    "kbet",
    "kbet_per_label",
    "batch_silhouette",
    "ari",
    "nmi",
    "knn_accuracy",
    "label_silhouette",
)


def embeddings(cells, model, finetune: bool):
    """Yield the name, the embedding and the processor seconds of each method."""
    batches = cells.obs["batch"].to_numpy(str)

    def timed(function):
        start = time.process_time()
        return function(), round(time.process_time() - start, 1)

    components, seconds = timed(lambda: pca_baseline(cells.X))
    yield "PCA", components, seconds
    aligned, more = timed(lambda: harmony(components, numbers_of(batches)))
    yield "Harmony on PCA", aligned, round(seconds + more, 1)

    def zero_shot():
        return cellplm.embed(cells.copy(), model, batch_key="batch").obsm["X_cellplm"]

    yield ("small, zero-shot (before)", *timed(zero_shot))

    def integrated(fitted, **options):
        integrator = cellplm.BatchIntegrator(model, quiet=True, **options).fit(
            fitted, batch_key="batch"
        )
        return integrator.predict(cells.copy()).obsm["X_cellplm_integrated"]

    yield ("BatchIntegrator, align", *timed(lambda: integrated(cells)))
    others = cells[batches != sorted(set(batches))[0]].copy()
    yield ("BatchIntegrator, align, first batch new", *timed(lambda: integrated(others)))
    if finetune:
        yield ("BatchIntegrator, finetune", *timed(lambda: integrated(cells, method="finetune")))


def table(rows: list[dict]) -> str:
    """Return the rows as a page."""
    lines = [
        "# Batch integration: before and after",
        "",
        __doc__.split("\n\n")[1].replace("\n", " "),
        "",
    ]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        lines += [f"**{dataset}**", "", f"| method | {' | '.join(SHOWN)} | processor s |",
                  "|---" * (len(SHOWN) + 2) + "|"]  # fmt: skip
        for row in rows:
            if row["dataset"] == dataset:
                values = " | ".join(f"{row['scores'][name]:.3f}" for name in SHOWN)
                lines.append(f"| {row['method']} | {values} | {row['processor_seconds']} |")
        lines.append("")
    lines += [
        "All scores: higher is better. The first four measure mixing, `kbet_per_label` and `batch_silhouette` within "
        "types; the others preserved types (Leiden at resolution 1).",
        "",
        f"{machine()}; processor seconds, compilation included. Made by `benchmarks/integration/run.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Score all methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--finetune", nargs="*", default=[], help="data sets to fine-tune on too")
    arguments = parser.parse_args()
    model, rows = cellplm.load("small"), []
    for dataset in DATASETS:
        cells = read_human(arguments.data / f"{dataset}.h5ad")
        cells = cells[~cells.obs["cell_type"].astype(str).isin(["unassigned", "nan", ""])].copy()
        labels, batches = (cells.obs[key].to_numpy(str) for key in ("cell_type", "batch"))
        for method, z, seconds in embeddings(
            cells, model, Path(dataset).name in arguments.finetune
        ):
            scores = integration_scores(np.asarray(z), batches, labels)
            rows.append({"dataset": Path(dataset).name, "method": method, "processor_seconds": seconds,
                         "scores": {name: round(value, 4) for name, value in scores.items()}})  # fmt: skip
            print(rows[-1], flush=True)
            versions = versions_of(["harmonypy", "scanpy", "numpy"])
            content = {"machine": machine(), "versions": versions, "rows": rows}
            (arguments.out / "integration.json").write_text(json.dumps(content, indent=1) + "\n")
            (arguments.out / "integration.md").write_text(table(rows))


if __name__ == "__main__":
    main()
