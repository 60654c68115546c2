"""Turn a finished run of ``configs/pretrain.py:small`` into the model that ships as ``cellplm_jax.load("small")``.

    python tools/make_small_model.py RUN CORPUS

The best step by held-out likelihood is stored as float16 in ``cellplm_jax/resources/models/small``, with a card: what
the model saw and how it does on samples it did not see: hidden counts predicted, against the untrained network and
the genes' mean counts; and cell types kept in the embedding, sample by sample, against 50 principal components of the
same cells and the untrained network. Train it only on data whose terms allow it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil

import jax
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import cellplm_jax
from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.data.pipeline import gene_means, split_heldout
from cellplm_jax.evaluate.embedding import (
    clustering_scores,
    knn_accuracy,
    leiden_clusters,
    pca_baseline,
)
from cellplm_jax.tasks.pretrained import Pretrained, bundled_path
from cellplm_jax.train.checkpoint import read_root
from cellplm_jax.train.heldout import HeldoutEvaluation

NAME = "small"
LEAST_CELLS, NEIGHBORS = 100, 15


def labelled_samples(store, ranges):
    """Yield (name, counts, labels, coordinates, measured) of held-out samples with enough labelled cells."""
    for where in ranges:
        record = store.samples[where.sample]
        run = store.read(where.sample, where.start, where.stop)
        if run.labels is None:
            continue
        known = run.labels >= 0
        if known.sum() < LEAST_CELLS or len(np.unique(run.labels[known])) < 2:
            continue
        counts = sparse.csr_matrix(
            (run.count.astype(np.float32), run.gene.astype(np.int32), run.indptr),
            shape=(run.cells, len(store.genes)),
        )
        measured = store.measured(where.sample)
        name = f"{record.dataset_name}: {record.name}"
        yield name, counts, run.labels, run.coordinates, measured


def embedding_scores(embedding, labels):
    """Score one embedding of one sample's cells."""
    known = labels >= 0
    clusters = leiden_clusters(embedding, neighbors=NEIGHBORS)
    scores = clustering_scores(labels[known], np.asarray(clusters)[known])
    return {
        "knn_accuracy": knn_accuracy(embedding[known], labels[known], neighbors=NEIGHBORS),
        "ari": scores["ari"],
        "nmi": scores["nmi"],
    }


def compare_embeddings(store, ranges, models):
    """Return a table [sample x method] of scores; every sample is one context."""
    rows = []
    for name, counts, labels, coordinates, measured in labelled_samples(store, ranges):
        adata = AnnData(counts, var=pd.DataFrame(index=store.genes))
        if measured is not None:
            adata = adata[:, measured].copy()
        if coordinates is not None:
            adata.obsm["spatial"] = coordinates
        found = {}
        for method, model in models.items():
            cellplm_jax.embed(adata, model, minimum_genes=1)
            found[method] = adata.obsm["X_cellplm"]
        found["50 principal components"] = pca_baseline(adata.X)
        for method, embedding in found.items():
            scores = embedding_scores(np.asarray(embedding), labels)
            rows.append({"sample": name, "cells": len(labels), "method": method, **scores})
    return pd.DataFrame(rows)


def mean_prediction(log_means, params):
    """Return parameters that predict every gene's mean count whatever they are shown: the decoder's bias alone."""
    zeros = jax.tree.map(np.zeros_like, params)
    fitted = params["decoder"]
    decoder = {**zeros["decoder"], "log_dispersion": fitted["log_dispersion"]}
    decoder["log_mean"] = {**decoder["log_mean"], "bias": log_means}
    return {**zeros, "decoder": decoder}


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="finished work directory")
    parser.add_argument("corpus", help="the corpus it was trained on")
    arguments = parser.parse_args()

    model = cellplm_jax.load(arguments.run)
    files = read_root(arguments.run)
    config = files.train
    store = open_corpus(arguments.corpus)
    train, heldout = split_heldout(store, config.data, config.seed)
    untrained = Pretrained.untrained(model.config, model.genes, seed=config.seed)
    evaluate = HeldoutEvaluation(config, store, heldout)

    means = np.log(gene_means(store, train) + 1e-4).astype(np.float32)
    predictions = {
        "this model": evaluate(model.params),
        "the same network, untrained": evaluate(untrained.params),
        "gene means": evaluate(mean_prediction(means, model.params)),
    }
    table = compare_embeddings(
        store, heldout, {"this model": model, "the same network, untrained": untrained}
    )
    means_by_method = table.groupby("method")[["knn_accuracy", "ari", "nmi"]].mean()
    embeddings = {
        method: {name: round(float(value), 4) for name, value in row.items()}
        for method, row in means_by_method.iterrows()
    }
    better = table.pivot(index="sample", columns="method", values="knn_accuracy")
    wins = int((better["this model"] > better["50 principal components"]).sum())

    run_card = model.card
    model.card = {
        "name": f"cellplm-{NAME}",
        "description": "A first, small model, pretrained on a laptop's worth of data. It shows the way a model is used "
        "and gives notebooks and defaults something to lean on; it is not a foundation model.",
        "made_by": f"cellplm-jax {cellplm_jax.__version__}, tools/make_small_model.py",
        "kind": "pretrained",
        "training_data": [
            {
                "dataset": name,
                "samples": sum(store.samples[r.sample].dataset_name == name for r in train),
                "cells": sum(
                    r.cells for r in train if store.samples[r.sample].dataset_name == name
                ),
            }
            for name in sorted({store.samples[r.sample].dataset_name for r in train})
        ],
        "training_samples": len(train),
        "training_cells": sum(r.cells for r in train),
        "heldout_samples": len(heldout),
        "heldout_cells": sum(r.cells for r in heldout),
        "species": "human",
        "steps": model.step,
        "seed": config.seed,
        "machine": f"{platform.machine()}, CPU; jax {jax.__version__}",
        "run": {
            key: run_card[key] for key in ("wall_seconds", "cells_per_second") if key in run_card
        },
        "hidden_counts": {
            "what": "a quarter of the genes hidden in held-out cells; log-likelihood in nats an entry",
            **{
                method: {name: round(value, 4) for name, value in scores.items()}
                for method, scores in predictions.items()
            },
        },
        "cell_types": {
            "what": f"mean over {table['sample'].nunique()} held-out samples with {LEAST_CELLS} or more "
            "labelled cells; Leiden at resolution 1.0; each sample is a context and has components of its own",
            **embeddings,
            "samples where the model's kNN accuracy is above the components'": f"{wins} of {len(better)}",
        },
        "limits": "Trained for minutes on 0.1 M cells, mostly blood and tumours. Batches are not mixed. Principal "
        "components of your own data may well do better; compare.",
        "licence": "weights: BSD-2-Clause; trained on public deposits (GEO, 10x Genomics, published supplements)",
    }
    out = bundled_path(NAME)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save(out, half=True)
    for mark in out.rglob("commit_success.txt"):
        mark.write_text(
            "Checkpoint commit was successful\n"
        )  # Orbax writes the folder's full path there
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(json.dumps(model.card, indent=2))
    print(table.round(3).to_string())
    print(f"{out}: {size / 1e6:.1f} MB")
    shipped = cellplm_jax.load(NAME)
    difference = {name: value for name, value in evaluate(shipped.params).items()}
    print("as shipped, float16:", difference)


if __name__ == "__main__":
    main()
