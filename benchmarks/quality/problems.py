"""The problems of the quality benchmark: what every method is shown, and what it is compared with.

A problem is a directory with ``cells.h5ad`` (raw counts, and what a method may know), further inputs of its task, and
``truth.npz``, which only the scoring opens. Methods of every environment read the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import load_human_table, map_genes
from cellplm_jax.evaluate.denoising import hide_nonzeros, log_normalize
from cellplm_jax.tasks.contexts import variable_genes
from cellplm_jax.tasks.pretrained import load

DATASETS = {
    "annotation": ("zheng_purified_pbmc", "kang_muscat_labelled", "hashtag_cell_lines_2000genes"),
    "imputation": ("breast_st_stahl_4layers", "xenium_breast_jef2023_4fov"),
    "denoising": ("pbmc3k",),
    "integration": (
        "pbmc3k",
        "kang_muscat_labelled",
        "corpus/eye_rpe_choroid",
    ),
    "perturbation": ("papalexi_eccite_thp1_299genes", "kang_muscat_labelled"),
}
"""Files of each task, without ``.h5ad``."""

ONE_BATCH = ("pbmc3k",)
"""Data sets of one batch, which nothing can be integrated in."""

HIDDEN_GENES = 0.3
"""Share of the genes that is hidden from the section to impute in."""

HIDDEN_COUNTS = 0.1
"""Share of the non-zeros that is hidden from a denoiser."""

TILE_CELLS = 600
"""Cells of a Xenium tile that are used: those nearest to its centre, so that neighbours stay neighbours."""

SPOT_GENES = 3000
"""Genes of the whole-transcriptome sections that are used."""

VARIABLE_GENES = 2000
"""Genes that are denoised."""


def read_human(path: Path) -> anndata.AnnData:
    """Read counts over the genes of the bundled model, by Ensembl id: the same ones for every method."""
    vocabulary = sorted(load("small").genes)
    with open_counts(path, vocabulary) as source:
        counts = source.read(0, source.cells)
        measured = np.flatnonzero(source.measured)
        cells = anndata.AnnData(
            sparse.csr_matrix(counts[:, measured], dtype=np.float32),
            obs=source.obs.copy(),
            var=pd.DataFrame(index=[vocabulary[i] for i in measured]),
        )
        spatial = source.coordinates("spatial", required=False)
        if spatial is not None:
            cells.obsm["spatial"] = spatial
    for column in cells.obs.columns:
        if not pd.api.types.is_numeric_dtype(cells.obs[column]):
            cells.obs[column] = cells.obs[column].astype(str)
    return cells


def _write(out: Path, truth: dict[str, Any], **tables: anndata.AnnData) -> None:
    """Write a problem; ``asked.npy``: the genes to predict, where the task has any, in the order of the truth."""
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        # Plain strings, which the rivals' older pandas reads as well.
        for frame in (table.obs, table.var):
            frame.index = pd.Index(frame.index.to_numpy(object), dtype=object)
            for column in frame.columns:
                if not pd.api.types.is_numeric_dtype(frame[column]):
                    frame[column] = pd.Categorical(frame[column].to_numpy(str).astype(object))
        table.write_h5ad(out / f"{name}.h5ad")
    if "genes" in truth:
        np.save(out / "asked.npy", truth["genes"])
    np.savez_compressed(out / "truth.npz", **truth)


def _strata(labels: np.ndarray, fraction: float, random: np.random.Generator) -> np.ndarray:
    """Return bool: a random fraction of the cells of every label."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


def _held_out_cells(dataset: str, obs: pd.DataFrame, seed: int) -> np.ndarray:
    """Return bool [cells]: whole batches where there are any, else 30 % of every label."""
    random = np.random.default_rng(seed)
    labels, batch = obs["cell_type"].to_numpy(str), obs["batch"].to_numpy(str)
    if dataset.startswith("kang"):
        names = sorted(set(batch))
        # Each of the four, then both samples of one donor.
        held = [names[seed]] if seed < len(names) else [n for n in names if n.endswith("107")]
        return np.isin(batch, held)
    if dataset.startswith("hashtag"):
        # A batch is one hashtag (line and replicate): one replicate of every line, and a third of what has no line.
        replicate = ["ABC"[seed] if seed < 3 else "ABC"[random.integers(3)] for _ in range(4)]
        lines = ("HEK", "K562", "KG1", "THP1")
        held = np.isin(batch, [f"{line}_{r}" for line, r in zip(lines, replicate, strict=True)])
        rest = np.isin(labels, ["Doublet", "Negative"])
        held[rest] = _strata(labels[rest], 1 / 3, random)
        return held
    return _strata(labels, 0.3, random)


def annotation(path: Path, dataset: str, seed: int, out: Path) -> None:
    """``obs["label"]`` is empty for test cells; ``obs["split"]``: train, valid (10 % of what is not test), test."""
    cells = read_human(path)
    labels = cells.obs["cell_type"].to_numpy(str)
    test = _held_out_cells(dataset, cells.obs, seed)
    split = np.where(test, "test", "train").astype(object)
    rest = np.flatnonzero(~test)
    split[rest[_strata(labels[rest], 0.1, np.random.default_rng(seed + 100))]] = "valid"
    cells.obs = pd.DataFrame(
        {"label": np.where(test, "", labels), "split": split, "batch": cells.obs["batch"]},
        index=cells.obs.index,
    )
    _write(out, {"labels": labels, "test": test}, cells=cells)


def imputation(path: Path, dataset: str, seed: int, out: Path) -> None:
    """``cells``: one section over the genes it shows; ``reference``: the other three over all genes."""
    cells = read_human(path)
    if dataset.startswith("xenium"):
        kept = []
        for name in sorted(set(cells.obs["batch"])):
            members = np.flatnonzero(cells.obs["batch"] == name)
            place = cells.obsm["spatial"][members]
            distance = np.linalg.norm(place - np.median(place, axis=0), axis=1)
            kept.append(members[np.argsort(distance, kind="stable")[:TILE_CELLS]])
        cells = cells[np.sort(np.concatenate(kept))].copy()
    names = sorted(set(cells.obs["batch"]))
    random = np.random.default_rng(seed)
    target = (cells.obs["batch"] == names[(seed + 3) % len(names)]).to_numpy()
    if dataset.startswith("breast_st"):
        # A transcriptome in 250 spots: the genes with most counts in the reference.
        total = np.asarray(cells.X[~target].sum(axis=0)).ravel()
        cells = cells[:, np.sort(np.argsort(-total, kind="stable")[:SPOT_GENES])].copy()
    # Only genes that the section has counts of can be scored.
    scored = np.flatnonzero(np.asarray((cells.X[target] > 0).sum(axis=0)).ravel() >= 10)
    hidden = np.sort(random.permutation(scored)[: round(HIDDEN_GENES * len(scored))])
    shown = np.setdiff1d(np.arange(cells.n_vars), hidden)
    truth = cells[target]
    _write(
        out,
        {
            "counts": truth.X[:, hidden].toarray(),
            # What counts are scaled by before they are compared: the total over the genes that are shown.
            "total": np.asarray(truth.X[:, shown].sum(axis=1)).ravel(),
            "genes": cells.var_names[hidden].to_numpy(str),
        },
        cells=truth[:, shown].copy(),
        reference=cells[~target].copy(),
    )


def denoising(path: Path, dataset: str, seed: int, out: Path) -> None:
    """Some of the non-zeros of ``cells`` are zero."""
    cells = read_human(path)
    cells = cells[:, variable_genes(sparse.csr_matrix(cells.X), VARIABLE_GENES)].copy()
    counts = sparse.csr_matrix(cells.X)
    visible, hidden = hide_nonzeros(counts, HIDDEN_COUNTS, seed=seed)
    # A gene of which every count is hidden is one that nobody can say anything about.
    shown = np.flatnonzero(np.asarray(visible.sum(axis=0)).ravel() > 0)
    cells, counts = cells[:, shown].copy(), counts[:, shown]
    visible, hidden = visible[:, shown], hidden[:, shown]
    kept = np.asarray(visible.sum(axis=1)).ravel() > 0  # a cell without a count left is no cell
    cells = anndata.AnnData(visible, obs=cells.obs[[]].copy(), var=cells.var)[kept].copy()
    hidden = hidden[kept].tocoo()
    _write(
        out,
        {
            "row": hidden.row,
            "column": hidden.col,
            "count": np.asarray(counts[kept][hidden.row, hidden.col]).ravel(),
            "total": np.asarray(counts[kept].sum(axis=1)).ravel(),
            "visible_total": np.asarray(visible[kept].sum(axis=1)).ravel(),
        },
        cells=cells,
    )


def integration(path: Path, dataset: str, seed: int, out: Path) -> None:
    """All cells with a label; the label itself is for the scoring alone."""
    cells = read_human(path)
    labels = cells.obs["cell_type"].to_numpy(str)
    kept = ~np.isin(labels, ["unassigned", "nan", ""])
    cells, labels = cells[kept].copy(), labels[kept]
    batch = cells.obs["batch"].to_numpy(str)
    cells.obs = cells.obs[["batch"]].copy()
    _write(out, {"labels": labels, "batch": batch}, cells=cells)


def perturbation(path: Path, dataset: str, seed: int, out: Path) -> None:
    """Cells of held-out perturbations are taken away (papalexi), or the stimulated cells of one cell type (kang)."""
    cells = read_human(path)
    random = np.random.default_rng(seed)
    if dataset.startswith("papalexi"):
        cells.obs["perturbed"] = cells.obs["perturbation"]
        cells.obs["group"] = "all"
        names = sorted(set(cells.obs["perturbed"]) - {"control"})
        held = random.permutation(names)[: round(0.2 * len(names))]
        gone = cells.obs["perturbed"].isin(held).to_numpy()
    else:
        cells.obs["perturbed"] = np.where(cells.obs["condition"] == "ctrl", "control", "IFN-b")
        cells.obs["group"] = cells.obs["cell_type"]
        groups = sorted(set(cells.obs["group"]))
        held = np.array(["IFN-b"])
        gone = (cells.obs["group"] == groups[seed % len(groups)]).to_numpy()
        gone &= (cells.obs["perturbed"] != "control").to_numpy()
    cells.obs = cells.obs[["perturbed", "group", "batch"]].copy()
    normal = log_normalize(cells.X)
    control = (cells.obs["perturbed"] == "control").to_numpy()
    change = []
    for name in held:
        rows = gone & (cells.obs["perturbed"] == name).to_numpy()
        base = control & cells.obs["group"].isin(set(cells.obs["group"][rows])).to_numpy()
        change.append(np.asarray(normal[rows].mean(axis=0) - normal[base].mean(axis=0)).ravel())
    held_group = sorted(set(cells.obs["group"][gone]))
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"perturbation": held, "group": held_group[0]}).to_csv(
        out / "asked.csv", index=False
    )
    names = sorted(set(cells.obs["perturbed"]) - {"control"})
    vocabulary = sorted(load_human_table().symbols)
    columns = map_genes(names, vocabulary, minimum=0).column
    genes = ["" if column < 0 else vocabulary[column] for column in columns]
    pd.DataFrame({"gene": genes}, index=names).to_csv(out / "symbols.csv")
    _write(
        out,
        {
            "perturbations": np.array(held, str),
            "change": np.stack(change),
            "genes": cells.var_names.to_numpy(str),
            "group": np.array(held_group, str),
        },
        cells=cells[~gone].copy(),
    )


MAKERS: dict[str, Callable[[Path, str, int, Path], None]] = {
    "annotation": annotation,
    "imputation": imputation,
    "denoising": denoising,
    "integration": integration,
    "perturbation": perturbation,
}


def make_problem(task: str, data: Path, dataset: str, seed: int, out: Path) -> None:
    """Write the problem of a task, data set and seed into ``out``; nothing where it is there already."""
    if (out / "truth.npz").is_file():
        return
    MAKERS[task](data / f"{dataset}.h5ad", Path(dataset).name, seed, out)
