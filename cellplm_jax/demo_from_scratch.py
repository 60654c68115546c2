"""``cellplm demo --from-scratch``: pretrain small, save, load afresh, embed, compare with two baselines, draw, report.

The comparison is the point: the same numbers for the trained network, the same network untrained, and the ordinary
50 principal components of 2,000 highly variable genes, whatever they turn out to be.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cellplm_jax._version import __version__
from cellplm_jax.config import TrainConfig
from cellplm_jax.data.batches import MemoryStore
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.datasets import UNASSIGNED, pbmc3k
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.data.pipeline import split_heldout
from cellplm_jax.errors import require
from cellplm_jax.presets import preset
from cellplm_jax.storage import atomic_write, atomic_write_text
from cellplm_jax.tasks.embed import embed
from cellplm_jax.tasks.pretrain import read_samples
from cellplm_jax.tasks.pretrained import Pretrained, load
from cellplm_jax.train.heldout import HeldoutEvaluation, heldout_masks
from cellplm_jax.train.loop import pretrain
from cellplm_jax.train.metrics import heldout_scores
from cellplm_jax.train.sharding import one_device_mesh
from cellplm_jax.train.step import heldout_rate

# Leiden resolutions, fixed before anything is looked at: scanpy's default, and a coarser one beside it, since
# agreement with any labels depends on how finely cells are cut.
RESOLUTION, COARSE_RESOLUTION = 1.0, 0.5
TRAINED, UNTRAINED, COMPONENTS, MEANS = (
    "CellPLM, trained",
    "CellPLM, untrained",
    "50 principal components",
    "gene means",
)


def run_from_scratch(
    out: str | os.PathLike,
    *,
    steps: int | None = None,
    max_cells: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the demonstration on the bundled blood cells.

    Writes:
        ``OUT/model/``: the checkpoint. ``OUT/embedded.h5ad``: the cells with ``obsm["X_cellplm"]``, clusters and UMAP.
        ``OUT/umap.png``, ``OUT/training_curves.png``, ``OUT/report.html``, ``OUT/scores.json``.

    Args:
        out: Directory; created where it does not exist. An unfinished run in it is resumed.
        steps: Training steps; None: the preset's.
        max_cells: Use only this many of the cells, for a quick check.
        seed: Seed of everything.
        quiet: No progress.

    Returns:
        Method -> score -> value.

    Raises:
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    require("scanpy", "eval", "The demonstration")
    require("grain", "train", "The demonstration")
    began = time.monotonic()
    out = Path(out)
    say = _speaker(quiet)
    adata = pbmc3k()
    if max_cells is not None and max_cells < adata.n_obs:
        chosen = np.random.default_rng(seed).choice(adata.n_obs, max_cells, replace=False)
        adata = adata[np.sort(chosen)].copy()
    samples, genes = read_samples(adata)
    store = MemoryStore(samples, genes, seed=seed)
    config = preset("demo", len(genes))
    config = dataclasses.replace(config, seed=seed, steps=steps or config.steps)
    # One checkpoint, at the end.
    config = dataclasses.replace(config, checkpoint_every=config.steps)
    say(f"pretraining on {adata.n_obs} cells, {len(genes)} genes, {config.steps} steps")
    trained_at = time.monotonic()
    result = pretrain(
        config,
        store,
        out / "model",
        card={
            "name": "demo",
            "data": "10x Genomics PBMC3k, raw counts (CC BY 4.0)",
            "intended_use": "Demonstration; trained on one sample of blood.",
        },
        quiet=quiet,
        # One sentence a batch: there is nothing to share among several devices.
        devices=jax.local_devices()[:1],
    )
    trained_seconds = time.monotonic() - trained_at

    model = load(out / "model")
    # The run gave the decoder as many covariate rows as the data has; everything below is of that architecture.
    config = dataclasses.replace(config, model=model.config)
    untrained = Pretrained.untrained(model.config, model.genes, seed=seed)
    say("embedding and clustering")
    embed(adata, model, quiet=True)
    embeddings = {
        TRAINED: adata.obsm["X_cellplm"],
        UNTRAINED: embed(adata, untrained, key_added="X_untrained", quiet=True).obsm["X_untrained"],
        COMPONENTS: _principal_components(adata, seed),
    }
    del adata.obsm["X_untrained"]
    embed(adata, model, quiet=True)  # the provenance in uns is that of the trained model
    table = _scores(adata, embeddings, seed)
    train, heldout = split_heldout(store, config.data, config.seed)
    evaluate = HeldoutEvaluation(config, store, heldout, one_device_mesh())
    table[TRAINED].update(evaluate(model.params))
    table[UNTRAINED].update(evaluate(untrained.params))
    table[COMPONENTS].update(_component_predictions(config, store, train, heldout, seed))
    table[MEANS] = _mean_predictions(config, store, train, heldout)

    say("drawing")
    figures = _draw(out, adata, embeddings, seed)
    from cellplm_jax.data.anndata_io import write_h5ad

    write_h5ad(adata, out / "embedded.h5ad")
    facts = {
        "cells": adata.n_obs,
        "genes": len(genes),
        "steps": result.step,
        "best_step": model.step,
        "hidden": heldout_rate(config),
        "heldout_cells": sum(part.stop - part.start for part in heldout),
        "training_seconds": trained_seconds,
        "cells_per_second": result.cells_per_second,
        "seconds": time.monotonic() - began,
    }
    _write_report(out, table, facts, figures, seed)
    return table


def _speaker(quiet: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not quiet:
            sys.stderr.write(f"demo: {text}\n")

    return say


def _principal_components(adata: Any, seed: int) -> np.ndarray:
    from cellplm_jax.evaluate.embedding import pca_baseline

    components = min(50, adata.n_obs - 1)
    return pca_baseline(adata.X, genes=2000, components=components, seed=seed)


def _scores(
    adata: Any,
    embeddings: dict[str, np.ndarray],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Cluster every embedding the same way and compare with the labels; unassigned cells are not scored."""
    from cellplm_jax.evaluate.embedding import clustering_scores, knn_accuracy, leiden_clusters

    labels = adata.obs["cell_type"].astype(str).to_numpy()
    known = labels != UNASSIGNED
    table = {}
    for method, embedding in embeddings.items():
        clusters = leiden_clusters(embedding, resolution=RESOLUTION, seed=seed)
        coarse = leiden_clusters(embedding, resolution=COARSE_RESOLUTION, seed=seed)
        table[method] = {
            **clustering_scores(labels[known], clusters[known]),
            "ari_coarse": clustering_scores(labels[known], coarse[known])["ari"],
            "clusters": float(len(np.unique(clusters))),
            "knn_accuracy": knn_accuracy(embedding[known], labels[known]),
        }
        if method == TRAINED:
            adata.obs["leiden"] = clusters.astype(str)
            adata.obs["leiden"] = adata.obs["leiden"].astype("category")
    return table


def _log_normalised(counts: np.ndarray, library: np.ndarray) -> np.ndarray:
    return np.log1p(counts / np.maximum(library, 1.0)[:, None] * 1e4)


def _counts(store: CellStore, ranges: Sequence[SampleRange]) -> np.ndarray:
    """Return the counts of some cells as float64 [cells, genes]."""
    from scipy.sparse import csr_matrix

    parts = []
    for part in ranges:
        run = store.read(part.sample, part.start, part.stop)
        shape = (run.cells, len(store.genes))
        parts.append(csr_matrix((run.count, run.gene, run.indptr), shape=shape).toarray())
    return np.concatenate(parts).astype(np.float64)


def _prediction_sums(
    config: TrainConfig,
    store: CellStore,
    train: Sequence[SampleRange],
    heldout: Sequence[SampleRange],
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    predict_train: np.ndarray,
) -> dict[str, float]:
    """Score a count prediction on exactly the entries that are hidden from the network.

    Args:
        config: The run, for the masks.
        store: The data.
        train: Training cells; each gene's dispersion is fitted to the residuals of ``predict_train`` on them.
        heldout: Held-out cells.
        predict: Takes counts [cells, genes] with hidden entries zero and the mask, returns the predicted mean.
        predict_train: Predicted mean of the training cells, [cells, genes].
    """
    from scipy.special import gammaln

    truth = _counts(store, train)
    # Dispersion by the method of moments: variance beyond that of a Poisson distribution.
    spread = ((truth - predict_train) ** 2 - predict_train).sum(axis=0)
    theta = np.clip(
        (predict_train**2).sum(axis=0) / np.maximum(spread, 1e-8),
        1e-3,
        1e4,
    )
    dense = jax.jit(lambda batch: batch.dense_counts(config.model.genes))
    sums = []
    for batch, mask in heldout_masks(config, store, heldout):
        cells = np.asarray(batch.cell_mask)
        counts = np.asarray(dense(batch))[cells].astype(np.float64)
        measured = np.broadcast_to(np.asarray(batch.measured_entries()), np.shape(mask))
        hidden = (np.asarray(mask) & measured)[cells]
        # A mean of 0 would make any count impossible.
        mean = np.maximum(predict(np.where(hidden, 0.0, counts), hidden), 1e-4)
        nll = (
            gammaln(theta)
            + gammaln(counts + 1)
            - gammaln(counts + theta)
            + (theta + counts) * np.log1p(mean / theta)
            + counts * (np.log(theta) - np.log(mean))
        )
        x = np.log1p(counts) * hidden
        y = np.log1p(mean) * hidden
        weight = hidden.astype(float)
        parts = {"n": weight, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
        sums.append({name: value.sum(axis=0) for name, value in parts.items()})
        sums[-1].update(nll=np.sum(nll * hidden), entries=np.float64(hidden.sum()))
    return heldout_scores(sums)


def _mean_predictions(
    config: TrainConfig,
    store: CellStore,
    train: Sequence[SampleRange],
    heldout: Sequence[SampleRange],
) -> dict[str, float]:
    """Predict every hidden count by the gene's mean share of a cell, scaled to the cell's visible counts."""
    truth = _counts(store, train)
    share = truth.sum(axis=0) / truth.sum()

    def predict(visible: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        # The share of the visible genes, to which the visible counts belong.
        seen = np.where(hidden, 0.0, share[None, :]).sum(axis=1)
        return share[None, :] * (visible.sum(axis=1) / seen)[:, None]

    return _prediction_sums(
        config,
        store,
        train,
        heldout,
        predict,
        share[None, :] * truth.sum(axis=1)[:, None],
    )


def _component_predictions(
    config: TrainConfig,
    store: CellStore,
    train: Sequence[SampleRange],
    heldout: Sequence[SampleRange],
    seed: int,
) -> dict[str, float]:
    """Predict hidden counts from 50 components of 2,000 variable genes by least squares on the training cells.

    Hidden entries of a held-out cell enter the components at the gene's mean, and its library size is estimated from
    the visible counts.
    """
    import scanpy as sc
    from anndata import AnnData
    from sklearn.decomposition import PCA

    truth = _counts(store, train)
    library = truth.sum(axis=1)
    expression = _log_normalised(truth, library)
    table = AnnData(expression.astype(np.float32))
    sc.pp.highly_variable_genes(table, n_top_genes=min(2000, truth.shape[1]))
    variable = table.var["highly_variable"].to_numpy()
    centre = expression[:, variable].mean(axis=0)
    scale = np.maximum(expression[:, variable].std(axis=0), 1e-6)

    def scaled(values: np.ndarray) -> np.ndarray:
        return np.clip((values[:, variable] - centre) / scale, -10, 10)

    model = PCA(n_components=min(50, len(truth) - 1), random_state=seed)
    scores = model.fit_transform(scaled(expression))
    design = np.column_stack([np.ones(len(scores)), scores])
    # All genes from the components, not only the variable ones: all hidden entries are scored.
    weights, *_ = np.linalg.lstsq(design, expression, rcond=None)

    def to_counts(scores: np.ndarray, library: np.ndarray) -> np.ndarray:
        fitted = np.column_stack([np.ones(len(scores)), scores]) @ weights
        return np.expm1(np.clip(fitted, 0, 10)) * library[:, None] / 1e4

    rate = heldout_rate(config)

    def predict(visible: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        # Hidden genes are a random share of all, so the library follows from the visible counts.
        estimated = visible.sum(axis=1) / (1 - rate)
        values = scaled(_log_normalised(visible, estimated))
        return to_counts(model.transform(np.where(hidden[:, variable], 0.0, values)), estimated)

    return _prediction_sums(config, store, train, heldout, predict, to_counts(scores, library))


def _draw(
    out: Path,
    adata: Any,
    embeddings: dict[str, np.ndarray],
    seed: int,
) -> dict[str, bytes]:
    """Draw UMAPs and training curves, write them as PNG, and return their bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cellplm_jax import plot
    from cellplm_jax.evaluate.embedding import umap_coordinates

    labels = adata.obs["cell_type"].astype("category")
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    for ax, (method, embedding) in zip(axes.flat, embeddings.items(), strict=False):
        coordinates = umap_coordinates(embedding, seed=seed)
        if method == TRAINED:
            adata.obsm["X_umap"] = coordinates
        plot.umap(coordinates, labels, title=f"{method}: marker-gene cell types", ax=ax)
    plot.umap(
        adata.obsm["X_umap"],
        adata.obs["leiden"],
        title=f"{TRAINED}: Leiden clusters (resolution {RESOLUTION})",
        ax=axes.flat[3],
    )
    figures = {"umap": figure}
    axes = plot.training_curves(out / "model" / "metrics.jsonl", title="Pretraining")
    figures["training_curves"] = np.asarray(axes).flat[0].figure
    written = {}
    for name, drawn in figures.items():
        path = out / f"{name}.png"
        with atomic_write(path) as partial:
            drawn.savefig(partial, format="png", dpi=110)
        written[name] = path.read_bytes()
        plt.close(drawn)
    return written


def verdict(table: dict[str, dict[str, float]]) -> str:
    """Say in words how the trained embedding compares, from the numbers alone."""
    trained, untrained, components = (table[m]["ari"] for m in (TRAINED, UNTRAINED, COMPONENTS))
    against = trained - components
    if against > 0.05:
        relation = "above"
    elif against >= -0.05:
        relation = "level with (within .05 of)"
    else:
        relation = "below"
    better = "above" if trained > untrained + 0.05 else "NOT clearly above"
    likelihood = table[TRAINED]["nb_log_likelihood"] - table[COMPONENTS]["nb_log_likelihood"]
    coarse = {method: table[method]["ari_coarse"] for method in (TRAINED, COMPONENTS)}
    likely = "more" if likelihood > 0 else "less"
    return (
        f"Clusters of the trained embedding agree with the marker-gene cell types at ARI {trained:.3f}: {better} the "
        f"untrained network ({untrained:.3f}) and {relation} 50 principal components ({components:.3f}). At the "
        f"coarser resolution {COARSE_RESOLUTION} it is {coarse[TRAINED]:.3f} against {coarse[COMPONENTS]:.3f} for the "
        f"components. On held-out cells its hidden counts are {likely} likely than under the components "
        f"({likelihood:+.4f} nats an entry)."
    )


def _write_report(
    out: Path,
    table: dict[str, dict[str, float]],
    facts: dict[str, float],
    figures: dict[str, bytes],
    seed: int,
) -> None:
    import json

    from cellplm_jax.report.html import Code, Figure, Table, Text, write_report

    columns = {
        "ARI": "ari",
        "NMI": "nmi",
        "clusters": "clusters",
        f"ARI at {COARSE_RESOLUTION}": "ari_coarse",
        "kNN": "knn_accuracy",
        "masked genes r": "masked_correlation",
        "r per gene": "masked_correlation_per_gene",
        "NB log-lik.": "nb_log_likelihood",
    }
    rows = []
    for method, scores in table.items():
        values: list[Any] = [scores.get(key) for key in columns.values()]
        # Clusters are a number, not a score.
        values[2] = None if values[2] is None else int(values[2])
        rows.append([method, *values])
    device = jax.devices()[0]
    sections = [
        Table(
            ["method", *columns],
            rows,
            heading="What came out",
            caption=(
                f"ARI and NMI: Leiden at the fixed resolution {RESOLUTION} against marker-gene cell types (ARI also "
                f"at {COARSE_RESOLUTION}); cells the rule leaves unassigned are not counted. kNN: accuracy of 15 "
                f"nearest neighbours. Masked genes: {facts['hidden']:.0%} of the genes hidden in "
                f"{facts['heldout_cells']:.0f} held-out cells that no method was fitted on; correlation r of log1p "
                f"counts over all hidden entries, its mean per gene, and the negative-binomial log-likelihood of a "
                f"hidden entry in nats. Embeddings and clusters are of all cells; no method sees a label."
            ),
        ),
        Figure(
            figures["umap"],
            alt="UMAP of the three embeddings coloured by cell type, and of the trained one by cluster",
            caption="Each embedding laid out by UMAP. For looking at; every score above is of the embedding itself.",
            heading="Embeddings",
        ),
        Figure(
            figures["training_curves"],
            alt="Loss terms and held-out scores over the training steps",
            heading="Training",
            caption=(
                f"{facts['steps']:.0f} steps in {facts['training_seconds']:.0f} s, "
                f"{facts['cells_per_second']:.0f} cells/s. The model shown is that of step {facts['best_step']:.0f}."
            ),
        ),
        Text(
            "10x Genomics PBMC3k: 2,700 human blood cells, raw counts, CC BY 4.0. Cell types come from a rule on "
            "marker genes (cellplm_jax.datasets.annotate_by_markers), not from clustering. This is a small model "
            "trained on one small sample: it shows that the path works, not what a model pretrained on an atlas "
            "can do.",
            heading="Data and limits",
        ),
        Code(
            'import cellplm_jax as cellplm\n\nmodel = cellplm.load("model")\n'
            'adata = cellplm.embed(my_adata, model)\nadata.obsm["X_cellplm"]',
            heading="Use this model",
        ),
        Text(
            f"cellplm-jax {__version__}, jax {jax.__version__}, {device.platform} "
            f"({device.device_kind}), {os.cpu_count()} CPU cores, seed {seed}, {facts['seconds']:.0f} s in all.",
            heading="Machine",
        ),
    ]
    write_report(
        out / "report.html",
        title="CellPLM demonstration",
        summary=verdict(table),
        sections=sections,
    )
    text = json.dumps({"scores": table, "facts": facts}, indent=2)
    atomic_write_text(out / "scores.json", text)
