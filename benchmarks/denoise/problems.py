"""Problems of the denoising benchmark: real counts with a tenth of the non-zeros hidden."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.evaluate.denoising import hide_nonzeros
from cellplm_jax.tasks.contexts import variable_genes
from cellplm_jax.tasks.pretrained import load

DATASETS = {
    "pbmc3k": "pbmc3k",
    "kang": "kang_muscat_labelled",
    "eye": "corpus/eye_rpe_choroid",
}
"""Files without ``.h5ad``; the bundled model was trained on the counts of ``eye``."""

HIDDEN, GENES = 0.1, 2000
"""Share of the non-zeros that is hidden, and number of variable genes."""


@dataclass(frozen=True)
class Problem:
    """Cells with hidden counts.

    Attributes:
        path: ``.h5ad`` with the visible counts and nothing else.
        counts: CSR [cells, genes], all counts.
        hidden: CSR bool [cells, genes].
        labels: str [cells], cell types; names of the cells if the file has none.
    """

    path: Path
    counts: sparse.csr_matrix
    hidden: sparse.csr_matrix
    labels: np.ndarray


def make_problem(data: Path, dataset: str, seed: int, directory: Path) -> Problem:
    """Hide counts of a data set and write the visible ones into ``directory``.

    Args:
        data: Directory with the files.
        dataset: One of :data:`DATASETS`, or a file without ``.h5ad``.
        seed: Seed of the hidden entries.
        directory: For ``cells.h5ad``.
    """
    vocabulary = sorted(load("small").genes)
    with open_counts(data / f"{DATASETS.get(dataset, dataset)}.h5ad", vocabulary) as source:
        measured = np.flatnonzero(source.measured)
        counts = sparse.csr_matrix(source.read(0, source.cells)[:, measured], dtype=np.float32)
        column = source.obs.get("cell_type", source.obs.index.to_series())
        labels = column.astype(str).to_numpy(object)
        cells = source.obs.index.to_numpy(object)
    genes = np.array(vocabulary, object)[measured]
    chosen = variable_genes(counts, GENES)
    counts, genes = sparse.csr_matrix(counts[:, chosen]), genes[chosen]
    visible, hidden = hide_nonzeros(counts, HIDDEN, seed=seed)
    # Neither a gene nor a cell without a visible count can be predicted by any method.
    kept = np.flatnonzero(np.asarray(visible.sum(axis=0)).ravel() > 0)
    rows = np.flatnonzero(np.asarray(visible[:, kept].sum(axis=1)).ravel() > 0)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "cells.h5ad"
    table = anndata.AnnData(
        sparse.csr_matrix(visible[rows][:, kept]),
        obs=pd.DataFrame(index=pd.Index(cells[rows], dtype=object)),
        var=pd.DataFrame(index=pd.Index(genes[kept], dtype=object)),
    )
    table.write_h5ad(path)
    return Problem(path, counts[rows][:, kept], hidden[rows][:, kept], labels[rows])
