"""scVI and MAGIC for the denoising benchmark; runs in an environment with them, imports nothing of this project.

    python rivals.py METHOD CELLS.h5ad SEED OUT.npy

Writes expected counts per 10,000, float32 [cells, genes], and prints the processor seconds.
"""

from __future__ import annotations

import sys
import time
import warnings

import anndata
import numpy as np
from scipy import sparse

warnings.filterwarnings("ignore")


def scvi(cells: anndata.AnnData, seed: int) -> np.ndarray:
    """scVI with its defaults, negative binomial, early stopping."""
    import scvi as package

    package.settings.seed = seed
    package.settings.verbosity = 40
    package.model.SCVI.setup_anndata(cells)
    model = package.model.SCVI(cells, gene_likelihood="nb")
    model.train(accelerator="cpu", early_stopping=True, enable_progress_bar=False)
    return model.get_normalized_expression(library_size=1e4, n_samples=10, return_numpy=True)


def magic(cells: anndata.AnnData, seed: int) -> np.ndarray:
    """MAGIC with its defaults, on square roots of normalised counts as its authors advise."""
    import magic as package

    total = np.asarray(cells.X.sum(axis=1))
    values = np.sqrt(cells.X.toarray() / total * 1e4)
    smooth = package.MAGIC(random_state=seed, verbose=0).fit_transform(values)
    return np.square(np.maximum(np.asarray(smooth), 0.0))


METHODS = {"scVI": scvi, "MAGIC": magic}

if __name__ == "__main__":
    method, path, seed, out = sys.argv[1:]
    table = anndata.read_h5ad(path)
    table.X = sparse.csr_matrix(table.X)
    start = time.process_time()
    np.save(out, np.asarray(METHODS[method](table, int(seed)), np.float32))
    print(round(time.process_time() - start, 1))
