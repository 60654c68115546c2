"""The cells both sides are timed on: made-up ones of the published size, or the bundled PBMC3k."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy import sparse

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

GENES = 19_374
NONZEROS = 1_500
BATCHES, DATASETS = 12_596, 484


def synthetic(cells: int, seed: int) -> sparse.csr_matrix:
    """Return counts [cells, 19,374] with about 1,500 stored in a cell."""
    from original_cellplm import random_counts

    return random_counts(np.random.RandomState(seed), cells, GENES, NONZEROS)


def real(cells: int) -> sparse.csr_matrix:
    """Return counts of PBMC3k [cells, 19,374], its most widely found genes in the first columns."""
    import anndata

    stored = anndata.read_h5ad(ROOT / "cellplm_jax" / "resources" / "pbmc3k.h5ad").X[:cells]
    parts = stored.data.astype(np.float32), stored.indices.astype(np.int32), stored.indptr
    counts = sparse.csr_matrix(parts, shape=stored.shape)
    order = np.argsort(-counts.getnnz(axis=0), kind="stable")[:GENES]
    chosen = counts[:, order]
    if chosen.shape[1] < GENES:
        spare = sparse.csr_matrix((chosen.shape[0], GENES - chosen.shape[1]), dtype=np.float32)
        chosen = sparse.hstack([chosen, spare])
    return sparse.csr_matrix(chosen)


def make_counts(name: str, cells: int, seed: int = 0) -> sparse.csr_matrix:
    """Return ``"synthetic"`` or ``"pbmc3k"`` counts."""
    return synthetic(cells, seed) if name == "synthetic" else real(cells)
