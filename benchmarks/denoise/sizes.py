"""Sizes of denoised files, and what their rounding does to the scores.

    python benchmarks/denoise/sizes.py --data DIR

``predict_file`` writes the problems of ``run.py`` (seed 0, zero-shot) with each storage, next to counts as
``write_h5ad`` stores them and to compressed ones. The entropy of a layer, given the gene, is a lower limit for files
that store its values independently. Writes ``sizes.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import anndata
import numpy as np
from problems import DATASETS, make_problem
from run import HERE, scores_of
from scipy import sparse

from cellplm_jax.tasks.denoise import Denoiser
from cellplm_jax.tasks.denoise_counts import LAYER, Storage

SCORES = {"rmse": "RMSE", "mae": "MAE", "pearson": "correlation", "markers_highest": "markers that stay highest",
          "contrast_kept": "contrast kept"}  # fmt: skip


def entropy(values: np.ndarray) -> float:
    """Return the mean entropy over every seventh gene of values [cells, genes], in bytes per value."""
    found = []
    for column in values[:, ::7].T:
        share = np.unique(column, return_counts=True)[1] / len(column)
        found.append(-(share * np.log2(share)).sum() / 8)
    return float(np.mean(found))


def main() -> None:
    """Write the files, and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with the .h5ad files")
    data = parser.parse_args().data
    lines = [
        "File sizes relative to the input, counts included: the input is the file of the benchmark, `plain` as "
        "`write_h5ad` stores it by default, `compressed` with gzip. Layer: bytes per value, and their entropy given "
        "the gene, which is a lower limit if values are stored independently. Zero-shot, seed 0.",
        "",
        f"| data set, storage | file, plain input | file, compressed input | layer | entropy | "
        f"{' | '.join(SCORES.values())} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset in DATASETS:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            problem = make_problem(data, dataset, 0, folder)
            packed = folder / "packed.h5ad"
            anndata.read_h5ad(problem.path).write_h5ad(packed, compression="gzip")
            inputs, out = [path.stat().st_size for path in (problem.path, packed)], folder / "out"
            for storage in get_args(Storage):
                found = Denoiser("small", quiet=True, seed=0)
                found.predict_file(problem.path, out, storage=storage)
                added = out.stat().st_size - inputs[0]
                layer = anndata.read_h5ad(out).layers[LAYER]
                values = layer.toarray() if sparse.issparse(layer) else np.asarray(layer)
                scores = scores_of(problem, values)
                lines.append(
                    f"| {dataset}, `{storage}` | {1 + added / inputs[0]:.2f} | {1 + added / inputs[1]:.2f} | "
                    f"{added / values.size:.2f} | {entropy(values):.2f} | "
                    f"{' | '.join(f'{scores[key]:.4f}' for key in SCORES)} |"
                )
                print(lines[-1], flush=True)
            share = sparse.csr_matrix(anndata.read_h5ad(problem.path).X).nnz / values.size
            lines.append(
                f"| {dataset}, counts | 1.00 | 1.00 | {inputs[0] / values.size:.2f} (compressed: "
                f"{inputs[1] / values.size:.2f}; {share:.1%} non-zero) | | | | | | |"
            )
    (HERE / "sizes.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
