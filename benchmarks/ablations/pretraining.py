"""Part A: variants of ``:small``, each pretrained from scratch on the same corpus with the same steps and seeds."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

import cellplm_jax
from cellplm_jax.config import TrainConfig
from cellplm_jax.data.corpus import is_corpus, open_corpus
from cellplm_jax.data.pipeline import gene_means, split_heldout
from cellplm_jax.evaluate.annotation import annotation_scores
from cellplm_jax.evaluate.embedding import (
    clustering_scores,
    knn_accuracy,
    leiden_clusters,
    pca_baseline,
)
from cellplm_jax.presets import preset
from cellplm_jax.tasks.annotate import CellTypeAnnotator
from cellplm_jax.tasks.prepare import prepare
from cellplm_jax.tasks.pretrain import pretrain
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.heldout import HeldoutEvaluation
from cellplm_jax.train.state import create_state
from cellplm_jax.train.workdir import with_covariates

VARIANTS = {
    "small": "full: mixture, transformer, positions, masks",
    "gaussian": "plain Gaussian latent",
    "no_latent": "no latent distribution",
    "mlp_encoder": "MLP for transformer",
    "no_positions": "without positions",
    "no_masks": "without masks",
    "untrained": "full, not trained",
}
"""Presets and what is ablated; ``untrained`` is ``small`` after no step."""

LABELLED = ("zheng_purified_pbmc", "kang_muscat_labelled", "pbmc3k")
"""Labelled files that no variant is trained on."""

LEFT_OUT = (
    *LABELLED,
    "hashtag_cell_lines_2000genes",
    "starmap_mouse_v1_1020genes",
    "osmfish_mouse_cortex",
    "dlpfc_visium_3sections",
)
"""Files of the data folder that do not go into the corpus: labelled ones, mice, and one of unsettled terms."""

PREVALENCE = 0.1
ANNOTATED, TRAINING_SHARE = "zheng_purified_pbmc", 0.7
LABEL_KEY, BATCH_KEY, NO_LABEL = "cell_type", "batch", ("", "unassigned")
NEIGHBORS = 15
STEP_CELLS = 192
"""Cells of a step of fine-tuning: several steps an epoch, so that few epochs do."""


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
    config = preset("small" if variant == "untrained" else variant)
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
    if variant == "untrained":
        begun = with_covariates(config, store, None)
        state = create_state(begun, gene_means(store, train))
        params = jax.tree.map(np.asarray, state.params)
        model = Pretrained(begun.model, params, list(store.genes), {"name": variant})
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
    for name in LABELLED:
        found = zero_shot(read_h5ad(data / f"{name}.h5ad"), model)
        scores |= {f"{score}_{name}": value for score, value in found.items()}
    for score in ("knn_accuracy", "ari"):
        scores[score] = float(np.mean([scores[f"{score}_{name}"] for name in LABELLED]))
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


def embedding_scores(embedding: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score an embedding by its neighbours and by Leiden clusters at resolution 1."""
    known = labels >= 0
    clusters = leiden_clusters(embedding, neighbors=NEIGHBORS)
    return {
        "knn_accuracy": knn_accuracy(embedding[known], labels[known], neighbors=NEIGHBORS),
        "ari": clustering_scores(labels[known], clusters[known])["ari"],
    }


def zero_shot(adata: AnnData, model: Pretrained) -> dict[str, float]:
    """Embed cells as they are, a tissue sample a context, and score the embedding."""
    batch_key = BATCH_KEY if BATCH_KEY in adata.obs else None
    cellplm_jax.embed(adata, model, batch_key=batch_key, minimum_genes=1)
    return embedding_scores(np.asarray(adata.obsm["X_cellplm"]), known_labels(adata))


def components(data: Path) -> dict[str, Any]:
    """Score 50 principal components of the same files."""
    scores: dict[str, float] = {}
    for name in LABELLED:
        adata = read_h5ad(data / f"{name}.h5ad")
        found = embedding_scores(np.asarray(pca_baseline(adata.X)), known_labels(adata))
        scores |= {f"{score}_{name}": value for score, value in found.items()}
    for score in ("knn_accuracy", "ari"):
        scores[score] = float(np.mean([scores[f"{score}_{name}"] for name in LABELLED]))
    return {"scores": {name: round(float(v), 5) for name, v in scores.items()}, "facts": {}}


def annotated_cells(data: Path, seed: int) -> tuple[AnnData, np.ndarray]:
    """Return the labelled cells that fine-tuning is judged on, and bool [cells]: a share of every type to test on."""
    adata = read_h5ad(data / f"{ANNOTATED}.h5ad")
    adata = adata[known_labels(adata) >= 0].copy()
    random = np.random.default_rng(seed)
    codes = known_labels(adata)
    test = np.zeros(adata.n_obs, bool)
    for code in np.unique(codes):
        members = random.permutation(np.flatnonzero(codes == code))
        test[members[round(TRAINING_SHARE * len(members)) :]] = True
    return adata, test


def fit_annotator(model: Pretrained, cells: AnnData, seed: int, epochs: int) -> CellTypeAnnotator:
    """Fine-tune a model, without the logistic regression that usually goes with it."""
    annotator = CellTypeAnnotator(
        model,
        linear=False,
        quiet=True,
        epochs=epochs,
        warmup_epochs=2,
        cells_per_step=STEP_CELLS,
        cells_per_context=STEP_CELLS,
        seed=seed,
    )
    return annotator.fit(cells, label_key=LABEL_KEY)


def fine_tune(variant: str, seed: int, *, data: Path, runs: Path, epochs: int) -> dict[str, Any]:
    """Fine-tune a pretrained variant for annotation, the network alone, and score it on cells it has not seen.

    Args:
        variant: One of :data:`VARIANTS`.
        seed: Seed of pretraining, of the split and of fine-tuning.
        data: Folder with the labelled files.
        runs: Where the pretrained variants are.
        epochs: Passes over the training cells at most.
    """
    adata, test = annotated_cells(data, seed)
    model = cellplm_jax.load(runs / f"{variant}-{seed}-model")
    began = time.monotonic()
    annotator = fit_annotator(model, adata[~test].copy(), seed, epochs)
    keep = runs / f"annotator-{variant}-{seed}"
    shutil.rmtree(keep, ignore_errors=True)
    annotator.save(keep)
    cells = adata[test].copy()
    annotator.predict(cells)
    found = annotation_scores(cells.obs[LABEL_KEY].astype(str), cells.obs["cellplm_cell_type"])
    facts = {
        "training_cells": int((~test).sum()),
        "test_cells": int(test.sum()),
        "best_epoch": annotator.facts.get("best_epoch"),
        "fit_seconds": round(time.monotonic() - began, 1),
    }
    jax.clear_caches()
    scores = {name: round(float(found[name]), 5) for name in ("macro_f1", "accuracy")}
    return {"scores": scores, "facts": facts}
