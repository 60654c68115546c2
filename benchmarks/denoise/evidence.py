"""Validation of the denoiser's pool: how much a deep held-out count weighs, on data that no other table tests.

    python benchmarks/denoise/evidence.py --data DIR

A tenth of the non-zeros of 2,000 variable genes is hidden. The pool is fitted with every molecule weighing the same
(power 1), with the square root of each count (1/2), and with every count weighing the same (0).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from unittest import mock

import anndata
import numpy as np
from problems import make_problem

from cellplm_jax.evaluate.denoising import denoising_scores, log_normalize
from cellplm_jax.tasks import denoise
from cellplm_jax.tasks.denoise_pool import combine, fit_pool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

DATASETS = (
    "fetal_pancreas_cimseq", "celllines_cimseq_1", "pbmc_10x_v3_1k", "fetal_thymus_hcl", "ipsc_cardiac_scgps",
    "pbmc_kotliarov_500",
)  # fmt: skip
POWERS = (1.0, 0.5, 0.0)
KEYS = ("rmse", "mae", "pearson")


def scores(data: Path, dataset: str, fit: bool) -> dict[float, list[float]]:
    """Return the scores of the pool by power."""
    with tempfile.TemporaryDirectory() as directory:
        problem = make_problem(data / "corpus", dataset, 0, Path(directory))
        cells = anndata.read_h5ad(problem.path)
    denoiser = denoise.Denoiser("small", quiet=True, seed=0)
    # The parts of the thinned counts, which the pool is fitted to.
    with mock.patch.object(denoise, "fit_pool", side_effect=fit_pool) as fitted:
        if fit:
            denoiser.fit(cells)
        z, *_ = denoiser._embed(cells, denoiser.reading)
        table = denoiser._table(cells, denoiser.reading)
        denoiser._pool_for(table, denoiser.reading)
    thinned, held = fitted.call_args.args
    parts = denoiser._parts(table, z)
    place = {gene: number for number, gene in enumerate(table.genes)}
    columns = [place[gene] for gene in cells.var_names]
    result = {}
    for power in POWERS:
        shares = combine(parts, fit_pool(thinned, held, evidence=power).weights)[:, columns]
        shares /= shares.sum(axis=1, keepdims=True)
        found = denoising_scores(
            log_normalize(problem.counts), np.log1p(1e4 * shares), problem.hidden
        )
        result[power] = [found[key] for key in KEYS]
    return result


def main() -> None:
    """Run the data sets and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with corpus/*.h5ad")
    args = parser.parse_args()
    lines = [
        "# Weight of a held-out count in the denoiser's pool",
        "",
        (__doc__ or "").strip().splitlines()[-3].strip()
        + " RMSE / MAE / correlation of log1p of counts per 10,000 at "
        "the hidden entries, one seed.",
        "",
        f"`python benchmarks/denoise/evidence.py --data DIR`; {machine()}",
        "",
        "| data | | molecules (1) | square root (1/2) | counts (0) |",
        "|---|---|---|---|---|",
    ]
    for dataset in DATASETS:
        for fit in (False, True):
            found = scores(args.data, dataset, fit)
            cells = [" / ".join(f"{value:.3f}" for value in found[power]) for power in POWERS]
            lines.append(
                f"| {dataset} | {'fitted' if fit else 'zero-shot'} | {' | '.join(cells)} |"
            )
            print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
