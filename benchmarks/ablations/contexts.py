"""How many cells see one another at inference, with weights that stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from anndata import AnnData, read_h5ad
from pretraining import NEIGHBORS, known_labels
from scipy import sparse

import cellplm_jax
from cellplm_jax.batch import CellBatch
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.batches import scale_coordinates
from cellplm_jax.evaluate.embedding import knn_accuracy
from cellplm_jax.evaluate.reconstruction import masked_correlation
from cellplm_jax.tasks.pretrained import Pretrained

MODEL = "small"
LABELLED = ("zheng_purified_pbmc", "pbmc3k")
SPATIAL, SECTION_KEY = "xenium_breast_jef2023_4fov", "batch"
LARGEST = 32_768
SCORED_CELLS, HIDDEN_GENES = 2048, 0.25
DECODED_AT_ONCE = 256


def sizes_up_to(cells: int) -> list[int]:
    """Return 1, 2, 4 ... up to the number of cells, and that number itself where it is at most :data:`LARGEST`."""
    found = [size for size in (2**power for power in range(16)) if size <= min(cells, LARGEST)]
    return found if found[-1] == cells or cells > LARGEST else [*found, cells]


def shuffled(adata: AnnData) -> AnnData:
    """Return the cells in random order: contexts are dealt from it, and files may be sorted by label."""
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


def neighbours(adata: AnnData, model: Pretrained, size: int) -> dict[str, Any]:
    """Return the accuracy of neighbours in an embedding made in contexts of ``size`` cells."""
    cellplm_jax.embed(adata, model, cells_per_context=size, minimum_genes=1)
    labels = known_labels(adata)
    known = labels >= 0
    embedding = np.asarray(adata.obsm["X_cellplm"])[known]
    score = knn_accuracy(embedding, labels[known], neighbors=NEIGHBORS)
    return {"scores": {"knn_accuracy": round(score, 5)}, "facts": {"cells": adata.n_obs}}


class HiddenGenes:
    """Cells of a spatial panel with a quarter of their genes hidden, and what was there.

    The cells that are scored are the same for every size of context, and so is what is hidden of them. They are dealt
    to contexts of ``size``; a size above their number is one context of them and as many others, evenly spread.

    Args:
        adata: Counts, coordinates, and the section of each cell.
        model: The model.
    """

    def __init__(self, adata: AnnData, model: Pretrained):
        self.model = model
        with open_counts(adata, model.genes, minimum_genes=1) as source:
            self.panel = np.flatnonzero(source.measured)
            counts = source.read(0, source.cells)[:, self.panel]
        names = [model.genes[column] for column in self.panel]
        hide = np.random.default_rng(0).random(counts.shape) < HIDDEN_GENES
        dense = counts.toarray()
        self.truth, self.hidden = dense, hide
        visible = AnnData(sparse.csr_matrix(np.where(hide, 0, dense).astype(np.float32)))
        visible.var_names = names
        # Places as in training: every section on a scale of its own.
        places = np.zeros((adata.n_obs, 2), np.float32)
        section = adata.obs[SECTION_KEY].astype(str).to_numpy()
        for name in np.unique(section):
            places[section == name] = scale_coordinates(adata.obsm["spatial"][section == name])
        visible.obsm["spatial"] = places
        self.visible = visible
        self.scored = np.linspace(0, adata.n_obs - 1, SCORED_CELLS).round().astype(int)

    def score(self, size: int) -> dict[str, Any]:
        """Return how well the hidden counts are predicted in contexts of ``size`` cells."""
        chosen = self.scored
        if size > len(chosen):
            others = np.setdiff1d(np.arange(self.visible.n_obs), chosen)
            more = np.linspace(0, len(others) - 1, size - len(chosen)).round().astype(int)
            chosen = np.sort(np.concatenate([chosen, others[more]]))
        cells = self.visible[chosen].copy()
        cellplm_jax.embed(cells, self.model, cells_per_context=size, minimum_genes=1)
        own = np.isin(chosen, self.scored)
        mean = self.decode(np.asarray(cells.obsm["X_cellplm"])[own])
        truth, hidden = self.truth[self.scored], self.hidden[self.scored]
        total = np.where(hidden, 0, truth).sum(axis=1)
        seen = np.where(hidden, 0.0, mean).sum(axis=1)
        predicted = mean * (total / np.maximum(seen, 1e-8))[:, None]
        by = masked_correlation(truth, predicted, hidden)
        scores = {
            "masked_correlation": by["pooled"],
            "masked_correlation_per_gene": by["gene_mean"],
        }
        return {
            "scores": {name: round(float(value), 5) for name, value in scores.items()},
            "facts": {"cells": self.visible.n_obs, "scored_cells": len(self.scored)},
        }

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Return the unscaled means of the panel's genes, with the mean of the batches' rows."""
        parts = []
        for start in range(0, len(z), DECODED_AT_ONCE):
            piece = z[None, start : start + DECODED_AT_ONCE]
            rows = piece.shape[1]
            batch = CellBatch(
                indptr=np.zeros((1, rows + 1), np.int32),
                gene=np.zeros((1, 1), np.int32),
                count=np.zeros((1, 1), np.float32),
                cell_mask=np.ones((1, rows), bool),
                batch=np.full((1, rows), -1, np.int32),
                dataset=np.full((1, rows), -1, np.int32),
            )
            output = self.model.decode(self.model.output_params, piece, batch)
            parts.append(np.asarray(output.mean)[0][:, self.panel])
        return np.concatenate(parts)


def run_contexts(data: Path, results: Any) -> None:
    """Run what is missing."""
    settings = {"model": MODEL, "scored_cells": SCORED_CELLS, "hidden_genes": HIDDEN_GENES}
    model = cellplm_jax.load(MODEL)

    def add(name: str, size: int, make: Any) -> None:
        results.add("contexts", f"{name} {size}", 0, settings, make)

    adata = shuffled(read_h5ad(data / f"{SPATIAL}.h5ad"))
    spatial = HiddenGenes(adata, model)
    for size in sizes_up_to(adata.n_obs)[::-1]:
        add(SPATIAL, size, lambda size=size: spatial.score(size))
    for name in LABELLED:
        adata = shuffled(read_h5ad(data / f"{name}.h5ad"))
        for size in sizes_up_to(adata.n_obs)[::-1]:
            add(name, size, lambda size=size, adata=adata: neighbours(adata, model, size))
    jax.clear_caches()
