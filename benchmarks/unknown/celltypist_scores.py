"""CellTypist's confidence for the problems of ``run.py --rivals DIR``; runs where celltypist is installed.

celltypist 1.7.1 needs scikit-learn below 1.8, which removed an argument that it passes.

python benchmarks/unknown/celltypist_scores.py DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import celltypist
import numpy as np
import pandas as pd
from scipy import sparse


def confidence(
    cells: sparse.csr_matrix, labels: np.ndarray, others: sparse.csr_matrix
) -> np.ndarray:
    """Train on labelled cells (CellTypist's defaults) and return 1 - the largest probability of other cells."""
    genes = pd.Index([f"g{n}" for n in range(cells.shape[1])])

    def table(matrix: sparse.csr_matrix) -> anndata.AnnData:
        obs = pd.DataFrame(index=[f"c{n}" for n in range(matrix.shape[0])])
        return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes))

    model = celltypist.train(table(cells), labels=list(labels), check_expression=False, n_jobs=1)
    found = celltypist.annotate(table(others), model=model)
    return 1.0 - found.probability_matrix.to_numpy().max(axis=1)


def main() -> None:
    """Score every problem that has no scores yet."""
    for path in sorted(Path(sys.argv[1]).glob("*.npz")):
        done = path.with_name(f"{path.stem}.scores.npz")
        if path.name.endswith(".scores.npz") or done.exists():
            continue
        given = np.load(path)
        logs = sparse.csr_matrix(
            (given["data"], given["indices"], given["indptr"]), shape=tuple(given["shape"])
        )
        train, labels, fold = logs[given["train"]], given["labels"], given["fold"]
        out = fold == 0
        null = confidence(train[~out], labels[~out], train[out])
        np.savez(done, null=null, test=confidence(train, labels, logs[given["test"]]))
        sys.stderr.write(f"{path.stem}\n")


if __name__ == "__main__":
    main()
