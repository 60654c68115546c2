"""Verbs that make and use an embedding: ``embed``, ``cluster`` and ``integrate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cellplm_jax.cli.options import (
    READING,
    RECIPE,
    add_task,
    command,
    counts_only,
    given,
    positive,
    source,
)
from cellplm_jax.cli.output import say, say_fitted, say_scores
from cellplm_jax.errors import InputError, explain


def add_embed(commands: Any) -> None:
    """Add ``embed``."""
    parser = command(
        commands,
        "embed",
        _embed,
        "embed the cells of an .h5ad file",
        "cellplm embed cells.h5ad --model demo/model --out embedded.h5ad --batch-key sample",
    )
    parser.add_argument("input", metavar="IN.h5ad", help="raw counts: in X, raw.X or a usual layer")
    parser.add_argument(
        "--model", required=True, help="checkpoint directory or pretraining work directory"
    )
    parser.add_argument(
        "--out", required=True, metavar="OUT.h5ad", help="the input plus the embedding"
    )
    parser.add_argument(
        "--batch-key", metavar="K", help="column of obs naming the tissue sample: one context each"
    )
    parser.add_argument(
        "--spatial-key", metavar="K", help="key of obsm with coordinates ('spatial' where present)"
    )
    parser.add_argument("--layer", metavar="L", help="layer with the counts (found by itself)")
    parser.add_argument(
        "--gene-key", metavar="K", help="column of var with gene ids (found by itself)"
    )
    parser.add_argument(
        "--cells-per-context", type=positive, metavar="N", help="cells of a context at most (all)"
    )
    parser.add_argument(
        "--key-added", default="X_cellplm", metavar="K", help="key of obsm to write (X_cellplm)"
    )
    parser.add_argument(
        "--values",
        choices=("counts", "normalized", "log1p"),
        default="counts",
        help="what the matrix holds; anything but raw counts has to be said (counts)",
    )
    parser.add_argument(
        "--minimum-genes", type=positive, metavar="N", help="fewest known genes accepted"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no report")


def _embed(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.embed import check_output, embed_file
    from cellplm_jax.tasks.pretrained import load

    check_output(Path(arguments.out))
    model = load(arguments.model)
    messages = embed_file(
        arguments.input,
        model,
        arguments.out,
        batch_key=arguments.batch_key,
        spatial_key=arguments.spatial_key or "spatial",
        require_coordinates=arguments.spatial_key is not None,
        layer=arguments.layer,
        gene_key=arguments.gene_key,
        cells_per_context=arguments.cells_per_context,
        key_added=arguments.key_added,
        values=arguments.values,
        minimum_genes=arguments.minimum_genes,
        quiet=arguments.quiet,
    )
    if not arguments.quiet:
        for message in messages:
            say(message, sys.stderr)
    say(f"wrote {arguments.out}: obsm['{arguments.key_added}'] by {model.id}")


def add_cluster(commands: Any) -> None:
    """Add ``cluster``."""
    parser = command(
        commands,
        "cluster",
        _cluster,
        "cluster the cells of an .h5ad file: neighbours and Leiden on an embedding, scores, a picture",
        "cellplm cluster cells.h5ad --model small --out clustered.h5ad --label-key cell_type --picture umap.png",
    )
    parser.add_argument("input", metavar="IN.h5ad", help="cells, embedded or with raw counts")
    parser.add_argument(
        "--model", metavar="M", help="what to embed with, where the embedding is not there"
    )
    parser.add_argument("--out", required=True, metavar="OUT.h5ad", help="the input plus clusters")
    parser.add_argument(
        "--use-rep", default="X_cellplm", metavar="K", help="embedding in obsm (X_cellplm)"
    )
    parser.add_argument(
        "--resolution", type=float, default=1.0, metavar="F", help="higher: more clusters (1)"
    )
    parser.add_argument(
        "--neighbors", type=positive, default=15, metavar="N", help="of the graph (15)"
    )
    parser.add_argument(
        "--key-added", default="cellplm_cluster", metavar="K", help="column of obs to write"
    )
    parser.add_argument(
        "--batch-key",
        metavar="K",
        help="column of obs: contexts of the embedding, and mixing scores",
    )
    parser.add_argument(
        "--label-key", metavar="K", help="column of obs with known types: print scores"
    )
    parser.add_argument(
        "--picture", metavar="PNG", help="draw a UMAP, and write obsm['X_umap'] as well"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no report")


def _cluster(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.cluster import cluster_file, draw_clusters, known_columns
    from cellplm_jax.tasks.embed import check_output

    check_output(Path(arguments.out))
    if arguments.picture:
        check_output(Path(arguments.picture))
    columns = [key for key in (arguments.label_key, arguments.batch_key) if key]
    known_columns(arguments.input, columns)
    cells, messages = cluster_file(
        arguments.input,
        arguments.out,
        arguments.model,
        use_rep=arguments.use_rep,
        resolution=arguments.resolution,
        neighbors=arguments.neighbors,
        key_added=arguments.key_added,
        seed=arguments.seed,
        batch_key=arguments.batch_key,
        umap=arguments.picture is not None,
        quiet=arguments.quiet,
    )
    if not arguments.quiet:
        for message in messages:
            say(message, sys.stderr)
    number = cells.obs[arguments.key_added].nunique()
    say(f"wrote {arguments.out}: obs['{arguments.key_added}'], {number} clusters")
    if arguments.label_key:
        from cellplm_jax.evaluate.embedding import clustering_scores, knn_accuracy, silhouette
        from cellplm_jax.tasks.contexts import labels_of

        labels = labels_of(cells.obs, arguments.label_key)
        known = [label is not None for label in labels]
        labels, embedding = labels[known].astype(str), cells.obsm[arguments.use_rep][known]
        scores = clustering_scores(labels, cells.obs[arguments.key_added][known])
        scores["knn_accuracy"] = knn_accuracy(embedding, labels, neighbors=arguments.neighbors)
        scores["label_silhouette"] = silhouette(embedding, labels)
        say_scores(scores)
    if arguments.batch_key and cells.obs[arguments.batch_key].nunique() > 1:
        from cellplm_jax.evaluate.embedding import batch_mixing, kbet

        batches = cells.obs[arguments.batch_key]
        embedding = cells.obsm[arguments.use_rep]
        say_scores({"ilisi": batch_mixing(embedding, batches), "kbet": kbet(embedding, batches)})
    if arguments.picture:
        draw_clusters(cells, [arguments.key_added, *columns], arguments.picture)
        say(f"wrote {arguments.picture}")


def add_integrate(commands: Any) -> None:
    """Add ``integrate``."""
    fit, predict = add_task(
        commands,
        "integrate",
        "an embedding without batch effects: tune the model on several batches, or embed with it",
        fit=_integrate_fit,
        predict=_integrate_predict,
        fit_example="cellplm integrate fit cells.h5ad --batch-key batch --model small --out integrator",
        predict_example="cellplm integrate predict cells.h5ad --model integrator --out integrated.h5ad",
    )
    fit.add_argument(
        "--strength", type=float, default=1.0, metavar="F", help="mixing against structure (1)"
    )
    predict.add_argument(
        "--label-key", metavar="K", help="column of obs with known types: print scores"
    )


def _integrate_only(arguments: argparse.Namespace, *others: str) -> None:
    """Refuse options that all tasks have and integration cannot use."""
    if arguments.values not in (None, "counts"):
        counts_only(arguments)
    arguments.values = None
    for name in others:
        if getattr(arguments, name, None) is not None:
            option = f"--{name.replace('_', '-')}"
            msg = explain(
                f"{option} was given to integrate {arguments.verb}",
                "the options it has: all cells are fitted, for all epochs, without coordinates",
                f"Leave {option} out",
            )
            raise InputError(msg)


def _integrate_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.integrate import BatchIntegrator
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    unused = ("spatial_key", "split_key", "patience", "validation_fraction")
    _integrate_only(arguments, *unused)
    if arguments.batch_key is None:
        msg = explain(
            "integrate fit was given no --batch-key",
            "the column of obs that tells batches apart",
            "Add --batch-key",
        )
        raise InputError(msg)
    integrator = BatchIntegrator(
        source(arguments),
        strength=arguments.strength,
        quiet=arguments.quiet,
        **given(arguments, RECIPE),
    )
    integrator.fit(arguments.input, **given(arguments, READING))
    integrator.save(arguments.out)
    say_fitted(arguments, f"{integrator.facts['batches']} batches", integrator.facts)


def _integrate_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.embed import check_output
    from cellplm_jax.tasks.integrate import KEY, BatchIntegrator

    check_output(Path(arguments.out))
    _integrate_only(arguments, "spatial_key")
    integrator = BatchIntegrator.load(arguments.model, quiet=arguments.quiet)
    reading = given(arguments, ("layer", "gene_key", "cells_per_context"))
    messages = integrator.predict_file(arguments.input, arguments.out, **reading)
    if not arguments.quiet:
        for message in messages:
            say(message, sys.stderr)
    say(f"wrote {arguments.out}: obsm['{KEY}']")
    if arguments.label_key:
        keys = {**reading, **given(arguments, ("batch_key", "label_key"))}
        say_scores(integrator.score(arguments.input, **keys))
