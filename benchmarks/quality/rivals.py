"""The methods of others, for the quality benchmark; runs in an environment of its own, see ``run.py``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy
from common import Method, detected_logs, normalize, work
from original import ORIGINAL
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neighbors import NearestNeighbors

warnings.filterwarnings("ignore")


def _read(problem: Path, name: str = "cells") -> anndata.AnnData:
    return anndata.read_h5ad(problem / f"{name}.h5ad")


def _variable(cells: anndata.AnnData, rows: np.ndarray, number: int) -> np.ndarray:
    """Return bool [genes]: highly variable among some cells (scanpy, flavour "seurat")."""
    if cells.n_vars <= number:
        return np.ones(cells.n_vars, bool)
    some = cells[rows].copy()
    scanpy.pp.normalize_total(some, target_sum=1e4)
    scanpy.pp.log1p(some)
    scanpy.pp.highly_variable_genes(some, n_top_genes=number, flavor="seurat")
    return some.var["highly_variable"].to_numpy()


# Annotation


def logistic_regression(*, library: bool) -> Method:
    """On 3,000 highly variable genes, fitted to training and validation cells."""

    def method(problem: Path, seed: int) -> dict[str, Any]:
        cells = _read(problem)
        test = (cells.obs["split"] == "test").to_numpy()
        genes = _variable(cells, ~test, 3000)
        values = normalize(cells.X) if library else np.log1p(cells.X.toarray())
        model = LogisticRegression(max_iter=1000, random_state=seed)
        model.fit(values[~test][:, genes], cells.obs["label"][~test].to_numpy(str))
        probabilities = model.predict_proba(values[test][:, genes])
        return {
            "labels": model.classes_[probabilities.argmax(axis=1)].astype(str),
            "probabilities": probabilities,
            "classes": model.classes_.astype(str),
        }

    return method


def celltypist(problem: Path, seed: int) -> dict[str, Any]:
    """A CellTypist model trained on the training and validation cells, its own gene selection on."""
    import celltypist as package

    cells = _read(problem)
    test = (cells.obs["split"] == "test").to_numpy()
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    model = package.train(
        cells[~test].copy(), labels="label", n_jobs=2, feature_selection=True, max_iter=300
    )
    found = package.annotate(cells[test].copy(), model=model)
    table = found.probability_matrix
    return {
        "labels": found.predicted_labels["predicted_labels"].to_numpy(str),
        "probabilities": table.to_numpy() / table.to_numpy().sum(axis=1, keepdims=True),
        "classes": table.columns.to_numpy(str),
    }


# Imputation


def _panel(problem: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log-normalised values of the section and of the reference over the shared genes, and of the hidden ones.

    Library sizes are those of the shared genes throughout, which the section has as well.
    """
    cells, reference = _read(problem), _read(problem, "reference")
    genes = np.load(problem / "asked.npy").tolist()
    shared = cells.var_names.tolist()
    total = np.asarray(reference[:, shared].X.sum(axis=1)).ravel()
    return (
        normalize(cells.X),
        normalize(reference[:, shared].X, total=total),
        normalize(reference[:, genes].X, total=total),
    )


def nearest_cells(problem: Path, seed: int) -> dict[str, Any]:
    """Mean over the 50 cells of the reference nearest by cosine on the shared genes."""
    own, shared, hidden = _panel(problem)
    search = NearestNeighbors(n_neighbors=50, metric="cosine").fit(shared)
    return {"values": hidden[search.kneighbors(own, return_distance=False)].mean(axis=1)}


def reference_mean(problem: Path, seed: int) -> dict[str, Any]:
    """Mean over the reference; the correlation over cells is not defined."""
    own, _, hidden = _panel(problem)
    return {"values": np.broadcast_to(hidden.mean(axis=0), (len(own), hidden.shape[1]))}


def ridge(problem: Path, seed: int) -> dict[str, Any]:
    """Ridge regression of the hidden genes on the shared ones, standardised; penalty by leave-one-out."""
    own, shared, hidden = _panel(problem)
    spread = np.maximum(shared.std(axis=0), 1e-6)
    centre = shared.mean(axis=0)
    model = RidgeCV(alphas=10.0 ** np.arange(7)).fit((shared - centre) / spread, hidden)
    return {"values": np.maximum(model.predict((own - own.mean(axis=0)) / spread), 0.0)}


def tangram(problem: Path, seed: int) -> dict[str, Any]:
    """Tangram, cells mode, 500 steps (its tutorial), on the shared genes."""
    import tangram as package
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what the package draws from
    cells, reference = _read(problem), _read(problem, "reference")
    genes = np.load(problem / "asked.npy").tolist()
    shared = cells.var_names.tolist()
    total = np.asarray(reference[:, shared].X.sum(axis=1)).ravel()
    linear = normalize(reference[:, genes].X, total=total, log=False)
    single = anndata.AnnData(normalize(reference[:, shared].X, log=False), var=cells.var.copy())
    place = anndata.AnnData(normalize(cells.X, log=False), var=cells.var.copy())
    package.pp_adatas(single, place, genes=None)
    mapped = package.map_cells_to_space(single, place, mode="cells", device="cpu", num_epochs=500)
    share = mapped.X / np.maximum(mapped.X.sum(axis=0, keepdims=True), 1e-12)
    return {"values": np.log1p(share.T @ linear)}


# Denoising


def magic(problem: Path, seed: int) -> dict[str, Any]:
    """MAGIC with its defaults on log-normalised values."""
    import magic as package

    values = normalize(_read(problem).X)
    found = package.MAGIC(random_state=seed, verbose=0).fit_transform(values)
    return {"expected": np.maximum(np.asarray(found), 0.0).astype(np.float32)}


def _scvi(cells: anndata.AnnData, seed: int, batch: str | None, **options: Any) -> Any:
    import scvi

    scvi.settings.seed = seed
    scvi.settings.verbosity = 40
    scvi.model.SCVI.setup_anndata(cells, batch_key=batch)
    model = scvi.model.SCVI(cells, gene_likelihood="nb", **options)
    model.train(accelerator="cpu", early_stopping=True, enable_progress_bar=False)
    return model


def scvi_denoise(problem: Path, seed: int) -> dict[str, Any]:
    """scVI with its defaults (negative binomial, early stopping); also the mean given that it is not zero."""
    cells = _read(problem)
    model = _scvi(cells, seed, None)
    share = model.get_normalized_expression(
        library_size="latent", n_samples=10, return_numpy=True
    ).astype(np.float64)
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    dispersion = np.exp(model.module.px_r.detach().numpy().astype(np.float64))
    return {
        "expected": normalize(share, total=total),
        "detected": detected_logs(share, dispersion, total),
    }


# Integration


def scvi_embed(problem: Path, seed: int) -> dict[str, Any]:
    """The latent of scVI with the batch as covariate, on 2,000 highly variable genes."""
    cells = _read(problem)
    cells = cells[:, _variable(cells, np.ones(cells.n_obs, bool), 2000)].copy()
    return {"embedding": _scvi(cells, seed, "batch").get_latent_representation()}


def harmony(problem: Path, seed: int) -> dict[str, Any]:
    """Harmony on 50 principal components."""
    import harmonypy

    cells = _read(problem)
    if cells.obs["batch"].nunique() < 2:
        raise ValueError("one batch: nothing to correct")
    genes = _variable(cells, np.ones(cells.n_obs, bool), 2000)
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    cells = cells[:, genes].copy()
    cells.X = cells.X.toarray()
    scanpy.pp.scale(cells, max_value=10)
    scanpy.pp.pca(cells, n_comps=50, random_state=seed)
    found = harmonypy.run_harmony(
        cells.obsm["X_pca"], cells.obs, ["batch"], random_state=seed, verbose=False
    )
    corrected = np.asarray(found.Z_corr)
    return {"embedding": corrected if len(corrected) == cells.n_obs else corrected.T}


# Perturbation


def _changes(cells: anndata.AnnData) -> tuple[np.ndarray, list[tuple[str, str]], np.ndarray]:
    """Return log-normalised values, the (perturbation, group) pairs that are shown, and their changes."""
    values = normalize(cells.X)
    perturbed, group = cells.obs["perturbed"].to_numpy(str), cells.obs["group"].to_numpy(str)
    pairs, changes = [], []
    for name, where in sorted({p for p in zip(perturbed, group, strict=True) if p[0] != "control"}):
        rows = (perturbed == name) & (group == where)
        base = (perturbed == "control") & (group == where)
        pairs.append((name, where))
        changes.append(values[rows].mean(axis=0) - values[base].mean(axis=0))
    return values, pairs, np.stack(changes)


def _in_order(problem: Path, cells: anndata.AnnData, change: np.ndarray) -> dict[str, Any]:
    genes = np.load(problem / "asked.npy").tolist()
    return {"change": pd.DataFrame(change, columns=cells.var_names)[genes].to_numpy(np.float32)}


def no_change(problem: Path, seed: int) -> dict[str, Any]:
    """Control expression."""
    cells, asked = _read(problem), pd.read_csv(problem / "asked.csv")
    return _in_order(problem, cells, np.zeros((len(asked), cells.n_vars)))


def mean_change(problem: Path, seed: int) -> dict[str, Any]:
    """The mean change of what is shown: of all perturbations, or of the perturbation in the other groups."""
    cells, asked = _read(problem), pd.read_csv(problem / "asked.csv")
    _, pairs, changes = _changes(cells)
    rows = []
    for name in asked["perturbation"]:
        same = np.array([pair[0] == name for pair in pairs])
        rows.append(changes[same if same.any() else slice(None)].mean(axis=0))
    return _in_order(problem, cells, np.stack(rows))


def linear(problem: Path, seed: int) -> dict[str, Any]:
    """Bilinear baseline of Ahlmann-Eltze et al. (Nature Methods 2025): genes and targets in principal components.

    Change = G W P' + b, with G the gene loadings and P the target's own row of them, W by ridge (penalty .1).
    A target that is not measured, and a condition, has the row 0: it gets the mean change.
    """
    cells, asked = _read(problem), pd.read_csv(problem / "asked.csv")
    values, pairs, changes = _changes(cells)
    vocabulary = cells.var_names.tolist()
    symbols = pd.read_csv(problem / "symbols.csv", index_col=0)["gene"].to_dict()
    loadings = TruncatedSVD(10, random_state=seed).fit(values - values.mean(axis=0)).components_.T
    place = {gene: row for row, gene in enumerate(vocabulary)}

    def row_of(name: str) -> np.ndarray:
        gene = symbols.get(name, name)
        return loadings[place[gene]] if gene in place else np.zeros(loadings.shape[1])

    targets = np.stack([row_of(name) for name, _ in pairs])
    centre = changes.mean(axis=0)
    left = np.linalg.solve(loadings.T @ loadings + 0.1 * np.eye(10), loadings.T)
    right = np.linalg.solve(targets.T @ targets + 0.1 * np.eye(10), targets.T)
    weights = left @ (changes - centre).T @ right.T
    found = [loadings @ weights @ row_of(name) + centre for name in asked["perturbation"]]
    return _in_order(problem, cells, np.stack(found))


METHODS: dict[tuple[str, str], Method] = {
    ("annotation", "logistic regression"): logistic_regression(library=True),
    ("annotation", "logistic regression, log1p of counts"): logistic_regression(library=False),
    ("annotation", "CellTypist"): celltypist,
    ("imputation", "reference mean"): reference_mean,
    ("imputation", "kNN"): nearest_cells,
    ("imputation", "ridge regression"): ridge,
    ("imputation", "Tangram"): tangram,
    ("denoising", "MAGIC"): magic,
    ("denoising", "scVI"): scvi_denoise,
    ("integration", "scVI"): scvi_embed,
    ("integration", "Harmony"): harmony,
    ("perturbation", "no change"): no_change,
    ("perturbation", "mean change"): mean_change,
    ("perturbation", "linear"): linear,
    **ORIGINAL,
}

if __name__ == "__main__":
    work(
        METHODS,
        ("cellplm", "torch", "scanpy", "scikit-learn", "celltypist", "tangram-sc", "magic-impute",
         "scvi-tools", "harmonypy", "numpy", "anndata"),
    )  # fmt: skip
