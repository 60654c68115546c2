"""Variants of ``:small``, pretrained on the same corpus with the same steps and seeds, and smaller projections."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

import cellplm_jax
from cellplm_jax.config import TrainConfig
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.corpus import is_corpus, open_corpus
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.data.pipeline import gene_means, split_heldout
from cellplm_jax.evaluate.embedding import (
    clustering_scores,
    knn_accuracy,
    leiden_clusters,
    pca_baseline,
)
from cellplm_jax.presets import preset
from cellplm_jax.tasks.prepare import prepare
from cellplm_jax.tasks.pretrain import pretrain
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.heldout import HeldoutEvaluation
from cellplm_jax.train.projection import fit_projection
from cellplm_jax.train.state import create_state
from cellplm_jax.train.workdir import with_covariates

_spec = importlib.util.spec_from_file_location(
    "zero_shot", Path(__file__).resolve().parents[1] / "zero_shot" / "run.py"
)
_study = importlib.util.module_from_spec(_spec)
sys.modules["zero_shot"] = _study
_spec.loader.exec_module(_study)
STUDIES, carried_labels = _study.STUDIES, _study.carried_labels

VARIANTS = {
    "small": "full recipe",
    "start": "full recipe, before training",
    "no_projection": "random start",
    "no_discriminants": "without discriminants",
    "no_restoration": "without restoration",
    "mlp_encoder": "MLP for transformer",
    "no_masks": "without masks",
}
"""Presets and what is ablated; ``start`` is ``small`` after no step."""

COMPONENTS = (25, 50, 100, 200)
SHARES = (0.25, 0.5, 1.0)
"""Sizes of the projection and shares of the datasets, for the table of scaling."""

LABELLED = (
    "zheng_purified_pbmc",
    "kang_muscat_labelled",
    "pbmc3k",
    "hashtag_cell_lines_2000genes",
    "pdac_st_card",
    "starmap_mouse_v1_1020genes",
)
"""Labelled files that no variant is trained on."""

LEFT_OUT = (
    *LABELLED,
    "wu2020_tcells_200",
    "osmfish_mouse_cortex",
    "dlpfc_visium_3sections",
    "celllines_cimseq_1",
    "celllines_cimseq_2",
    "fetal_pancreas_cimseq",
)
"""Files of the data folder that do not go into the corpus: labelled ones, read counts, and one of unsettled terms."""

PREVALENCE = 0.1
LABEL_KEY, BATCH_KEY = "cell_type", "batch"
NO_LABEL = ("", "?", "unassigned", "Doublet", "Negative")
NEIGHBORS = 15


def corpus_of(data: Path, corpus: Path) -> Path:
    """Prepare the corpus from the files of a folder and of its subfolder ``corpus``, where it is not there yet.

    Its vocabulary is the genes that a tenth of the cells express: steps cost a fifth of those over all genes.
    """
    if not is_corpus(corpus):
        files = [*sorted(data.glob("*.h5ad")), *sorted(data.glob("corpus/*.h5ad"))]
        files = [path for path in files if path.stem not in LEFT_OUT]
        prepare(
            files,
            corpus,
            sample_key=BATCH_KEY,
            minimum_prevalence=PREVALENCE,
            workers=0,
            quiet=True,
        )
    return corpus


def configuration(variant: str, seed: int, steps: int, cells: int) -> TrainConfig:
    """Return the run of a variant: its preset with other steps, context, seed and a warm-up to match."""
    config = preset("small" if variant == "start" else variant)
    return dataclasses.replace(
        config,
        steps=steps,
        seed=seed,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=max(1, steps // 6)),
        data=dataclasses.replace(config.data, cells=cells),
        log_every=10,
        evaluate_every=steps,
        checkpoint_every=steps,
        probe_every=0,
    )


def train_and_score(
    variant: str, seed: int, *, corpus: Path, data: Path, runs: Path, steps: int, cells: int
) -> dict[str, Any]:
    """Pretrain a variant, unless its run is there already, and score it on what it has not seen.

    Args:
        variant: One of :data:`VARIANTS`.
        seed: Seed of weights, batches, masks, and of which samples are held out.
        corpus: A corpus made by ``cellplm prepare``, without :data:`LABELLED`.
        data: Folder with the labelled files.
        runs: Where the runs are kept.
        steps: Optimizer steps.
        cells: Cells of a row, which is one batch.

    Returns:
        Scores by name, with what the run saw.
    """
    store = open_corpus(corpus)
    seen = {record.dataset_name for record in store.samples} & set(LABELLED)
    if seen:
        raise SystemExit(f"{', '.join(sorted(seen))}: in the corpus, so not new to the model")
    config = configuration(variant, seed, steps, cells)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, genes=len(store.genes))
    )
    train, heldout = split_heldout(store, config.data, seed)
    facts: dict[str, Any] = {}
    if variant == "start":
        model = starting_model(config, store, train)
    else:
        workdir = runs / f"{variant}-{seed}"
        result = pretrain(str(corpus), config, workdir, quiet=True)
        facts["training_cells_per_second"] = round(result.cells_per_second, 1)
        model = cellplm_jax.load(workdir)
    keep = runs / f"{variant}-{seed}-model"
    shutil.rmtree(keep, ignore_errors=True)
    model.save(keep)
    config = dataclasses.replace(config, model=model.config)
    scores: dict[str, float] = {}
    spatial = [part for part in heldout if store.samples[part.sample].spatial]
    for name, ranges in (("", heldout), ("spatial_", spatial)):
        found = HeldoutEvaluation(config, store, ranges)(model.params)
        scores |= {f"{name}{score}": value for score, value in found.items()}
    scores |= zero_shot(model, data)
    facts |= {
        "parameters": model.parameters,
        "training_cells": sum(part.cells for part in train),
        "heldout_samples": len(heldout),
        "heldout_cells": sum(part.cells for part in heldout),
        "heldout_spatial_samples": len(spatial),
        "heldout_spatial_cells": sum(part.cells for part in spatial),
    }
    jax.clear_caches()
    return {"scores": {name: round(float(v), 5) for name, v in scores.items()}, "facts": facts}


def known_labels(adata: AnnData) -> np.ndarray:
    """Return int codes of the labels, -1 where a cell has none."""
    named = adata.obs[LABEL_KEY].astype("string").fillna("")
    return np.asarray(pd.Categorical(named.where(~named.isin(NO_LABEL))).codes)


def starting_model(config: TrainConfig, store: CellStore, train: list[SampleRange]) -> Pretrained:
    """Return the model of a run before its first step."""
    begun = with_covariates(config, store, None)
    projection = fit_projection(store, train, begun)
    params = create_state(begun, gene_means(store, train), projection).params
    params = jax.tree.map(np.asarray, params)
    return Pretrained(begun.model, params, list(store.genes), {"name": "start"})


def scaled(components: int, share: float, seed: int, *, corpus: Path, data: Path) -> dict[str, Any]:
    """Score the start with fewer components, or from fewer datasets.

    Args:
        components: Principal components of the corpus.
        share: Share of the datasets; the seed decides which.
        seed: Seed.
        corpus: As for :func:`train_and_score`.
        data: Folder with the labelled files.
    """
    store = open_corpus(corpus)
    config = configuration("small", seed, 1, 512)
    names = sorted({record.dataset_name for record in store.samples})
    chosen = np.random.default_rng(seed).permutation(names)[: max(1, round(share * len(names)))]
    train, _ = split_heldout(store, config.data, seed)
    train = [part for part in train if store.samples[part.sample].dataset_name in chosen]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, genes=len(store.genes)),
        projection=dataclasses.replace(config.projection, components=components),
    )
    scores = zero_shot(starting_model(config, store, train), data)
    jax.clear_caches()
    facts = {"datasets": len(chosen), "training_cells": sum(part.cells for part in train)}
    return {"scores": {name: round(float(v), 5) for name, v in scores.items()}, "facts": facts}


def embedding_scores(embedding: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score an embedding by its neighbours and by Leiden clusters at resolution 1."""
    known = labels >= 0
    found = clustering_scores(labels[known], leiden_clusters(embedding[known], neighbors=NEIGHBORS))
    accuracy = knn_accuracy(embedding[known], labels[known], neighbors=NEIGHBORS)
    return {"ari": found["ari"], "nmi": found["nmi"], "knn_accuracy": accuracy}


def zero_shot(model: Pretrained, data: Path) -> dict[str, float]:
    """Embed the labelled files, each as one context; return means over files and labels carried between studies."""
    rows, studies = [], {}
    for name in LABELLED:
        adata = read_h5ad(data / f"{name}.h5ad")
        cellplm_jax.embed(adata, model, minimum_genes=1, quiet=True)
        embedding = np.asarray(adata.obsm["X_cellplm"])
        rows.append(embedding_scores(embedding, known_labels(adata)))
        if name in STUDIES:
            labels = adata.obs[LABEL_KEY].astype(str).map(STUDIES[name])
            common = labels.notna().to_numpy()
            studies[name] = (embedding[common], labels[common].to_numpy())
    scores = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return scores | {"carried_labels": carried_labels(studies)}


def components(data: Path) -> dict[str, Any]:
    """Score 50 principal components of the same files."""
    rows = []
    for name in LABELLED:
        adata = read_h5ad(data / f"{name}.h5ad")
        found = np.asarray(pca_baseline(adata.X))
        rows.append(embedding_scores(found, known_labels(adata)))
    scores = {key: round(float(np.mean([row[key] for row in rows])), 5) for key in rows[0]}
    return {"scores": scores, "facts": {}}
