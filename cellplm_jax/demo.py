"""``cellplm demo``: embed bundled cells with the bundled model, compare with principal components, draw, report.

The cells are not in the corpus of the model. Every embedding is clustered and scored in the same way, whatever comes
out.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cellplm_jax._version import __version__
from cellplm_jax.data.datasets import UNASSIGNED, pbmc3k
from cellplm_jax.errors import require
from cellplm_jax.progress import ProgressReport
from cellplm_jax.storage import atomic_write, atomic_write_text
from cellplm_jax.tasks.embed import embed
from cellplm_jax.tasks.pretrained import load

RESOLUTION, CLUSTERINGS = 1.0, 5
"""Of Leiden, fixed beforehand, and how many seeds of it are averaged."""

CONTEXT = "CellPLM small, adapt='context'"
ZERO_SHOT = "CellPLM small, zero-shot"
COMPONENTS = "50 principal components"


def run_demo(
    out: str | os.PathLike,
    *,
    max_cells: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, dict[str, float]]:
    """Embed the bundled blood cells and compare.

    Writes:
        ``OUT/embedded.h5ad``: the cells with ``obsm["X_cellplm"]`` (adapted to the context),
        ``obsm["X_cellplm_zero_shot"]``, ``obsm["X_umap"]`` and ``obs["cellplm_cluster"]``.
        ``OUT/umap.png``, ``OUT/report.html``, ``OUT/scores.json``.

    Args:
        out: Directory; created if it does not exist.
        max_cells: Use only this many of the cells, for a quick check.
        seed: Seed of the choice of cells and of the layout.
        quiet: No progress.

    Returns:
        Method -> score -> value: ``ari``, ``nmi`` and ``clusters`` are means over five seeds of Leiden.

    Raises:
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    require("scanpy", "eval", "The demonstration")
    require("igraph", "eval", "The demonstration")
    began = time.monotonic()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    adata = pbmc3k()
    if max_cells is not None and max_cells < adata.n_obs:
        chosen = np.random.default_rng(seed).choice(adata.n_obs, max_cells, replace=False)
        adata = adata[np.sort(chosen)].copy()
    progress = ProgressReport("demo", 4, unit="stages", quiet=quiet, first="starting")
    try:
        model = load("small")
        embed(adata, model, key_added="X_cellplm_zero_shot", quiet=True)
        embed(adata, model, adapt="context", quiet=True)
        progress.update(1, "embedded")
        embeddings = {
            CONTEXT: adata.obsm["X_cellplm"],
            ZERO_SHOT: adata.obsm["X_cellplm_zero_shot"],
            COMPONENTS: components(adata),
        }
        table = score(adata, embeddings)
        progress.update(2, "clustered")
        figure = _draw(out, adata, embeddings, seed)
        progress.update(3, "drawn")
        from cellplm_jax.data.anndata_io import write_h5ad

        write_h5ad(adata, out / "embedded.h5ad")
        facts = {
            "cells": adata.n_obs,
            "genes": adata.n_vars,
            "model": model.id,
            "clusterings": CLUSTERINGS,
            "seconds": time.monotonic() - began,
        }
        _write_report(out, table, facts, figure)
        _close(figure)
        progress.update(4, "written")
    finally:
        progress.close()
    return table


def components(adata: Any) -> np.ndarray:
    """Return 50 principal components of 2,000 highly variable genes, as scanpy computes them by default.

    Args:
        adata: Raw counts.

    Returns:
        float32 [cells, components].
    """
    import scanpy

    cells = adata.copy()
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    scanpy.pp.highly_variable_genes(cells, n_top_genes=min(2000, cells.n_vars))
    cells = cells[:, cells.var["highly_variable"]].copy()
    scanpy.pp.pca(cells, n_comps=min(50, min(cells.shape) - 1))
    return np.asarray(cells.obsm["X_pca"], np.float32)


def score(adata: Any, embeddings: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Cluster every embedding in the same way and compare with the labels; unassigned cells are not scored.

    Args:
        adata: The cells; receives ``obs["cellplm_cluster"]`` of the first embedding.
        embeddings: Method -> float [cells, dimensions].
    """
    import pandas as pd

    from cellplm_jax.evaluate.embedding import clustering_scores, knn_accuracy, leiden_clusters

    labels = adata.obs["cell_type"].astype(str).to_numpy()
    known = labels != UNASSIGNED
    table = {}
    for method, embedding in embeddings.items():
        runs = []
        # Leiden is random: one seed would compare luck.
        for seed in range(CLUSTERINGS):
            clusters = leiden_clusters(embedding, resolution=RESOLUTION, seed=seed)
            found = clustering_scores(labels[known], clusters[known])
            runs.append((found["ari"], found["nmi"], float(clusters.max() + 1)))
            if seed == 0 and "cellplm_cluster" not in adata.obs:
                names = [str(number) for number in range(clusters.max() + 1)]
                adata.obs["cellplm_cluster"] = pd.Categorical.from_codes(clusters, names)  # type: ignore[arg-type]
        ari, nmi, number = map(float, np.mean(runs, axis=0))
        table[method] = {
            "ari": ari,
            "nmi": nmi,
            "knn_accuracy": knn_accuracy(embedding[known], labels[known]),
            "clusters": number,
        }
    return table


def verdict(table: dict[str, dict[str, float]]) -> str:
    """Return a sentence on how the first embedding compares with principal components, score by score."""
    parts = []
    for key, name in (("ari", "ARI"), ("nmi", "NMI"), ("knn_accuracy", "neighbours' accuracy")):
        ours = table[CONTEXT][key]
        rival = table[COMPONENTS][key]
        # Computed from the numbers, so that the text is right whatever comes out.
        relation = "above" if ours > rival else "level with" if ours == rival else "below"
        parts.append(f"{name} {ours:.3f}, {relation} the components ({rival:.3f})")
    return f"{CONTEXT}: {'; '.join(parts)}."


def _draw(
    out: Path,
    adata: Any,
    embeddings: dict[str, np.ndarray],
    seed: int,
) -> Any:
    """Draw the UMAPs, write umap.png, and return the figure, which the report draws again for the dark theme."""
    import matplotlib

    # No display is needed.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cellplm_jax import plot
    from cellplm_jax.evaluate.embedding import umap_coordinates

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colors = plot.store_colors(adata, "cell_type")
    for ax, method in zip(axes, (CONTEXT, ZERO_SHOT, COMPONENTS), strict=True):
        coordinates = umap_coordinates(embeddings[method], seed=seed)
        if method == CONTEXT:
            adata.obsm["X_umap"] = coordinates
        plot.umap(
            coordinates,
            adata.obs["cell_type"],
            title=method,
            ax=ax,
            legend=ax is axes[2],
            palette=colors,
        )
    path = out / "umap.png"
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return figure


def _close(figure: Any) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def _write_report(
    out: Path,
    table: dict[str, dict[str, float]],
    facts: dict[str, Any],
    figure: Any,
) -> None:
    from cellplm_jax.report.html import Code, Figure, Table, Text, write_report

    columns = {"ARI": "ari", "NMI": "nmi", "neighbours": "knn_accuracy", "clusters": "clusters"}
    device = jax.devices()[0]
    sections = [
        Table(
            ["method", *columns],
            [
                [method, *(scores[key] for key in columns.values())]
                for method, scores in table.items()
            ],
            heading="Scores",
            caption=(
                f"ARI and NMI: Leiden at resolution {RESOLUTION} against marker-gene cell types, means over "
                f"{CLUSTERINGS} seeds; unassigned cells are not scored. Neighbours: accuracy of 15 nearest "
                "neighbours. No method uses a label. benchmarks/zero_shot has other forms of components and more data."
            ),
        ),
        Figure(
            figure,
            alt="UMAPs of three embeddings, coloured by cell type",
            caption="UMAP of each embedding. The scores are computed on the embeddings, not on the UMAPs.",
            heading="Embeddings",
        ),
        Text(
            "10x Genomics PBMC3k: 2,700 human blood cells, raw counts, CC BY 4.0. The model was not trained on them. "
            "Cell types come from a rule on marker genes (cellplm_jax.datasets.annotate_by_markers).",
            heading="Data",
        ),
        Code(
            'import cellplm_jax as cellplm\n\nmodel = cellplm.load("small")\n'
            'cellplm.embed(adata, model, adapt="context")   # best for one file\n'
            "cellplm.embed(adata, model)                    # zero-shot, comparable between files",
            heading="Use it on your cells",
        ),
        Text(
            f"cellplm-jax {__version__}, jax {jax.__version__}, {device.platform} ({device.device_kind}), "
            f"{os.cpu_count()} CPU cores, {facts['seconds']:.0f} s.",
            heading="Machine",
        ),
    ]
    write_report(
        out / "report.html",
        title="CellPLM demonstration",
        summary=verdict(table),
        sections=sections,
    )
    atomic_write_text(out / "scores.json", json.dumps({"scores": table, "facts": facts}, indent=2))
