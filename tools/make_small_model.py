"""Turn a finished run of ``configs/pretrain.py:small`` into the model that ships as ``cellplm_jax.load("small")``.

    python tools/make_small_model.py RUN CORPUS --evaluate LABELLED.h5ad ...

The best step by held-out likelihood is stored as float16 in ``cellplm_jax/resources/models/small``, with a card: what
the model saw and how it does on what it did not see: hidden counts of held-out samples predicted, against the
untrained network and the genes' mean counts; and cell types kept in the embedding, of held-out samples and of labelled
files that are not in the corpus, against 50 principal components of the same cells and the untrained network. Train it
only on data whose terms allow it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
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
LABEL_KEY, BATCH_KEY, NO_LABEL = "cell_type", "batch", ("", "unassigned")


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


def heldout_data(store, ranges):
    """Yield (name, cells, labels, batch key) of held-out samples, each an AnnData of its own panel."""
    for name, counts, labels, coordinates, measured in labelled_samples(store, ranges):
        adata = AnnData(counts, var=pd.DataFrame(index=store.genes))
        if measured is not None:
            adata = adata[:, measured].copy()
        if coordinates is not None:
            adata.obsm["spatial"] = coordinates
        yield name, adata, labels, None


def foreign_data(store, paths):
    """Yield the same of labelled files, whose data sets the corpus must not hold."""
    known = {record.dataset_name for record in store.samples}
    for path in paths:
        if path.stem in known:
            raise SystemExit(
                f"{path.name} is in the corpus: it cannot show what the model makes of new data"
            )
        adata = read_h5ad(path)
        named = adata.obs[LABEL_KEY].astype("string").fillna("")
        codes = pd.Categorical(named.where(~named.isin(NO_LABEL)))
        batch_key = BATCH_KEY if BATCH_KEY in adata.obs else None
        yield path.stem, adata, np.asarray(codes.codes), batch_key


def compare_embeddings(data, models):
    """Return a table [data x method] of scores; every tissue sample is one context."""
    rows = []
    for name, adata, labels, batch_key in data:
        found = {}
        for method, model in models.items():
            cellplm_jax.embed(adata, model, batch_key=batch_key, minimum_genes=1)
            found[method] = adata.obsm["X_cellplm"]
        found["50 principal components"] = pca_baseline(adata.X)
        for method, embedding in found.items():
            scores = embedding_scores(np.asarray(embedding), labels)
            rows.append({"sample": name, "cells": len(labels), "method": method, **scores})
    return pd.DataFrame(rows)


def summary(table, what):
    """Return the part of the card that a table of :func:`compare_embeddings` makes."""
    scores = ["knn_accuracy", "ari", "nmi"]
    by_data = table.pivot(index="sample", columns="method", values="knn_accuracy")
    wins = int((by_data["this model"] > by_data["50 principal components"]).sum())
    return {
        "what": what,
        **{
            method: {name: round(float(value), 4) for name, value in row.items()}
            for method, row in table.groupby("method")[scores].mean().iterrows()
        },
        "kNN accuracy above the components'": f"{wins} of {len(by_data)}",
        "kNN accuracy, one by one": {
            name: {method: round(float(value), 4) for method, value in row.items()}
            for name, row in by_data.iterrows()
        },
    }


def mean_prediction(log_means, params):
    """Return parameters that predict every gene's mean count whatever they are shown: the decoder's bias alone."""
    zeros = jax.tree.map(np.zeros_like, params)
    fitted = params["decoder"]
    decoder = {**zeros["decoder"], "log_dispersion": fitted["log_dispersion"]}
    decoder["log_mean"] = {**decoder["log_mean"], "bias": log_means}
    return {**zeros, "decoder": decoder}


def average_encoder(params, weight):
    """Average the output layers of the encoder with their start, zeros, in place (Wortsman et al. 2022).

    Half the step keeps most of what training restores, and moves the embedding less from the projection of the corpus,
    which validation sets prefer.
    """
    for layer in params["encoder"].values():
        for module in (layer["attention"]["out"], layer["feedforward_out"]):
            for name in module:
                module[name] = np.asarray(module[name] * np.float32(weight))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="finished work directory")
    parser.add_argument("corpus", help="the corpus it was trained on")
    parser.add_argument(
        "--evaluate",
        type=Path,
        nargs="+",
        required=True,
        help=f"labelled .h5ad files (obs['{LABEL_KEY}']) that are not in the corpus",
    )
    parser.add_argument(
        "--average",
        type=float,
        default=0.5,
        help="weight of the trained encoder against its start, at which it adds nothing (0.5)",
    )
    arguments = parser.parse_args()

    model = cellplm_jax.load(arguments.run)
    average_encoder(model.params, arguments.average)
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
    models = {"this model": model, "the same network, untrained": untrained}
    table = compare_embeddings(heldout_data(store, heldout), models)
    foreign = compare_embeddings(foreign_data(store, arguments.evaluate), models)

    model.card = {
        "name": f"cellplm-{NAME}",
        "description": "A small model of public human and mouse data. It starts as a projection of its corpus and the "
        "clusters of its data sets; training adds restoration from masked counts and gene panels, and a decoder.",
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
        "orthologues": "mouse data sets are mapped to human one-to-one orthologues",
        "steps": model.step,
        "encoder_average": arguments.average,
        "seed": config.seed,
        "machine": f"{platform.machine()}, CPU; jax {jax.__version__}",
        "hidden_counts": {
            "what": "a quarter of the genes hidden in held-out cells; log-likelihood in nats an entry",
            **{
                method: {name: round(value, 4) for name, value in scores.items()}
                for method, scores in predictions.items()
            },
        },
        "cell_types_of_heldout_samples": summary(
            table,
            f"mean over {table['sample'].nunique()} held-out samples with {LEAST_CELLS} or more "
            "labelled cells; Leiden at resolution 1.0; each sample is a context and has components of its own",
        ),
        "cell_types_of_new_datasets": summary(
            foreign,
            f"mean over {foreign['sample'].nunique()} labelled data sets of which the model saw nothing; Leiden at "
            "resolution 1.0; each tissue sample is a context",
        ),
        "limits": "Small: mostly blood, bone marrow and tumours. For one file adapt='context' is better than the "
        "zero-shot embedding; compare with principal components of your own data (benchmarks/zero_shot).",
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
    print(pd.concat([table, foreign]).round(3).to_string())
    print(f"{out}: {size / 1e6:.1f} MB")
    shipped = cellplm_jax.load(NAME)
    difference = {name: value for name, value in evaluate(shipped.params).items()}
    print("as shipped, float16:", difference)


if __name__ == "__main__":
    main()
