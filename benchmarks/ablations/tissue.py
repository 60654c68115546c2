"""Part C: genes that follow a spatial gradient of simulated tissue, imputed with and without the cells' places."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from anndata import AnnData

from cellplm_jax.data.simulate import simulate_tissue
from cellplm_jax.evaluate.denoising import log_normalize
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
from cellplm_jax.tasks.impute import GeneImputer

SEEDS, EPOCHS = 3, 60
TISSUE = {
    "cells": 1024,
    "genes": 100,
    "cell_types": 4,
    "batches": 2,
    "domains": 1,
    "ligand_receptor_pairs": 0,
    "library_size": 1000.0,
    "dropout": 0.0,
    "markers_per_type": 8,
    "gradient_genes": 20,
    "gradient_fold": 16.0,
}
"""Two sections; with one domain cell types are spread evenly, so that no gene of the panel says where a cell is."""


def sections(seed: int) -> tuple[AnnData, AnnData, np.ndarray, np.ndarray]:
    """Return reference, target with all genes, and bool [genes]: those on a gradient, and all that are hidden.

    Hidden are the gradient genes and, to compare with, half of every type's markers.
    """
    tissue = simulate_tissue(**TISSUE, seed=seed)
    gradient = (tissue.var["gradient"] != "").to_numpy()
    marker = tissue.var["marker_of"].to_numpy()
    hidden = gradient.copy()
    for kind in set(marker) - {""}:
        members = np.flatnonzero(marker == kind)
        hidden[members[: len(members) // 2]] = True
    first = (tissue.obs["batch"] == "batch_0").to_numpy()
    return tissue[first].copy(), tissue[~first].copy(), gradient, hidden


def ceiling(seed: int, gradient_fold: float) -> dict[str, Any]:
    """Score the truth itself: the expected counts, scaled as a prediction is.

    Args:
        seed: Seed of the tissue.
        gradient_fold: The tissue's own for all that can be known; 1 for what is left without the places, as the same
            seed gives the same cells.
    """
    _, target, gradient, hidden = sections(seed)
    other = simulate_tissue(**{**TISSUE, "gradient_fold": gradient_fold}, seed=seed)
    expected = np.asarray(other[target.obs_names].layers["expected"], np.float64)
    shown = np.flatnonzero(~hidden)
    total = np.asarray(target.X[:, shown].sum(axis=1)).ravel()
    scaled = expected * (total / expected[:, shown].sum(axis=1))[:, None]
    pearson = pearson_per_gene(
        log_normalize(target.X, total=total).toarray(), log_normalize(scaled, total=total)
    )
    return {"scores": _means(dict(enumerate(pearson)), gradient, hidden), "facts": {}}


def impute(seed: int, spatial_key: str | None) -> dict[str, Any]:
    """Fit an imputer from scratch on one tissue and score what it says of the hidden genes.

    Args:
        seed: Seed of the tissue and of the fit.
        spatial_key: Where the coordinates are; None: they are not used.
    """
    reference, target, gradient, hidden = sections(seed)
    panel = target[:, ~hidden].copy()
    began = time.monotonic()
    imputer = GeneImputer(None, linear=False, quiet=True, epochs=EPOCHS, seed=seed)
    imputer.fit(
        panel,
        reference=reference,
        spatial_key=spatial_key,
        gene_key="ensembl_id",
        reference_gene_key="ensembl_id",
    )
    table = imputer.score_genes(panel, truth=target)
    place = {name: number for number, name in enumerate(target.var["ensembl_id"])}
    pearson = {
        place[gene]: value for gene, value in zip(table["gene_id"], table["pearson"], strict=True)
    }
    facts = {
        "fit_seconds": round(time.monotonic() - began, 1),
        "best_epoch": imputer.facts["best_epoch"],
        "epochs": len(imputer.history),
    }
    jax.clear_caches()
    return {"scores": _means(pearson, gradient, hidden), "facts": facts}


def _means(pearson: dict[int, float], gradient: np.ndarray, hidden: np.ndarray) -> dict[str, float]:
    """Return the mean correlation of the hidden genes on a gradient, and of the other hidden ones."""
    groups = {"pearson_gradient": gradient, "pearson_others": hidden & ~gradient}
    return {
        name: round(float(np.mean([pearson[gene] for gene in np.flatnonzero(members)])), 5)
        for name, members in groups.items()
    }


def run_positions(results: Any) -> None:
    """Run what is missing."""
    settings = {**TISSUE, "epochs": EPOCHS}
    for seed in range(SEEDS):
        for name, key in (("positions on", "spatial"), ("positions off", None)):

            def make(seed=seed, key=key):
                return impute(seed, key)

            results.add("positions", name, seed, settings, make)

        for name, fold in (("truth", TISSUE["gradient_fold"]), ("truth without places", 1.0)):

            def known(seed=seed, fold=fold):
                return ceiling(seed, fold)

            results.add("positions", name, seed, settings, known)
