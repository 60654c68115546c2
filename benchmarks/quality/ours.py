"""The methods of this project, for the quality benchmark; see ``run.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from common import Method, normalize, work

import cellplm_jax as cellplm
from cellplm_jax.evaluate.denoising import gene_means
from cellplm_jax.evaluate.embedding import pca_baseline


def _read(problem: Path, name: str = "cells") -> anndata.AnnData:
    return anndata.read_h5ad(problem / f"{name}.h5ad")


def annotate(model: str | None, **options: Any) -> Method:
    """Fine-tune on the training cells, and predict the others, all of known types: none is left "unknown"."""

    def method(problem: Path, seed: int) -> dict[str, Any]:
        cells = _read(problem)
        cells.obs["label"] = cells.obs["label"].astype(object).replace("", np.nan)
        found = cellplm.CellTypeAnnotator(
            model, seed=seed, quiet=True, unknown_rate=None, **options
        )
        found.fit(cells, label_key="label", split_key="split")
        test = cells[(cells.obs["split"] == "test").to_numpy()].copy()
        predicted = found.predict(test)
        return {
            "labels": predicted.obs["cellplm_cell_type"].to_numpy(str),
            "probabilities": predicted.obsm["cellplm_probabilities"],
            "classes": np.array(found.labels, str),
            "notes": {k: v for k, v in found.facts.items() if "f1" in k or "epoch" in k}
            | {"pool": found.pool},
        }

    return method


def impute(model: str | None, **options: Any) -> Method:
    """Learn from the reference and the section, and predict the genes that the section does not show."""

    def method(problem: Path, seed: int) -> dict[str, Any]:
        cells, reference = _read(problem), _read(problem, "reference")
        genes = np.load(problem / "asked.npy").tolist()
        found = cellplm.GeneImputer(model, seed=seed, quiet=True, **options)
        found.fit(cells, reference=reference, genes=genes, reference_batch_key="batch")
        values = found.predict(cells, log_normalized=True)
        return {
            "values": values[genes].to_numpy(np.float32),
            "notes": {k: v for k, v in found.facts.items() if "epoch" in k or "confidence" in k}
            | {"pool": found.pool},
        }

    return method


def denoise(model: str | None, *, zero_shot: bool = False, **options: Any) -> Method:
    """Fit to the visible counts, and predict the hidden ones."""

    def method(problem: Path, seed: int) -> dict[str, Any]:
        cells = _read(problem)
        found = cellplm.Denoiser(model, seed=seed, quiet=True, **options)
        if not zero_shot:
            found.fit(cells)
        result = {}
        for name, detected in (("expected", False), ("detected", True)):
            found.predict(cells, detected=detected, log_normalized=True)
            result[name] = cells.layers["cellplm_denoised_log1p"]
        return result

    return method


def gene_mean(problem: Path, seed: int) -> dict[str, Any]:
    """Mean of each gene over the cells: of all log-normalised values, and of those that are not zero."""
    cells = _read(problem)
    values = normalize(cells.X)
    shape = values.shape
    detected = gene_means(values, detected=True)
    return {
        "expected": np.broadcast_to(gene_means(values), shape).astype(np.float32),
        "detected": np.broadcast_to(detected, shape).astype(np.float32),
    }


def embed(problem: Path, seed: int) -> dict[str, Any]:
    """Embed with the bundled model as it is; each batch is a context."""
    cells = _read(problem)
    cellplm.embed(cells, "small", batch_key="batch")
    return {"embedding": cells.obsm["X_cellplm"]}


def components(problem: Path, seed: int) -> dict[str, Any]:
    """50 principal components of 2,000 highly variable genes."""
    return {"embedding": pca_baseline(_read(problem).X, seed=seed)}


def integrate(model: str | None, **options: Any) -> Method:
    """Fine-tune so that batches mix, without labels."""

    def method(problem: Path, seed: int) -> dict[str, Any]:
        cells = _read(problem)
        found = cellplm.BatchIntegrator(model, seed=seed, quiet=True, **options)
        found.fit(cells, batch_key="batch").predict(cells)
        return {"embedding": cells.obsm["X_cellplm_integrated"]}

    return method


def perturb(model: str | None, **options: Any) -> Method:
    """Learn from the perturbations that are shown, and predict the held-out ones."""

    def method(problem: Path, seed: int) -> dict[str, Any]:
        cells, asked = _read(problem), pd.read_csv(problem / "asked.csv")
        grouped = cells.obs["group"].nunique() > 1
        found = cellplm.PerturbationPredictor(model, seed=seed, quiet=True, **options)
        found.fit(
            cells,
            perturbation_key="perturbed",
            control="control",
            covariate_key="group" if grouped else None,
        )
        group = asked["group"].iloc[0] if grouped else None
        names = asked["perturbation"].tolist()
        predicted = found.predict(names, group=group) if grouped else found.predict(names)
        genes = np.load(problem / "asked.npy").tolist()
        change = predicted.change.reindex(columns=genes)
        # A gene that is not predicted does not change.
        return {
            "change": change.fillna(0.0).to_numpy(np.float32),
            "notes": {"strengths": found.strengths, "genes": int(predicted.change.shape[1])},
        }

    return method


METHODS: dict[tuple[str, str], Method] = {
    ("annotation", "scratch"): annotate(None),
    ("annotation", "scratch, network alone"): annotate(None, linear=False),
    ("annotation", "small"): annotate("small"),
    ("annotation", "small, nearest neighbours"): annotate("small", method="neighbors"),
    ("imputation", "scratch"): impute(None),
    ("imputation", "scratch, network alone"): impute(None, linear=False),
    ("imputation", "small"): impute("small"),
    ("denoising", "scratch"): denoise(None),
    ("denoising", "small"): denoise("small"),
    ("denoising", "small, zero-shot"): denoise("small", zero_shot=True),
    ("denoising", "gene mean"): gene_mean,
    ("integration", "scratch"): integrate(None),
    ("integration", "small"): integrate("small"),
    ("integration", "small, zero-shot"): embed,
    ("integration", "PCA"): components,
    ("perturbation", "scratch"): perturb(None),
    ("perturbation", "small"): perturb("small"),
    ("perturbation", "small, fine-tuned"): perturb("small", method="finetune"),
}

if __name__ == "__main__":
    work(METHODS, ("cellplm-jax", "jax", "flax", "numpy", "anndata"))
