"""Commands that compute and use embeddings: ``embed`` and ``cluster``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cellplm_jax.cli.options import (
    DEFAULTS,
    add_counts,
    add_options,
    add_output,
    add_precision,
    command,
    reject_options,
)
from cellplm_jax.cli.output import (
    check_new_file,
    print_result,
    scores_line,
    write_page,
)


def add_embed(commands: Any) -> None:
    """Add ``embed``."""
    parser = command(
        commands,
        "embed",
        _embed,
        "embed the cells of an .h5ad file, a .zarr store or a corpus",
        "cellplm embed cells.h5ad --model small --out embedded.h5ad --batch-key sample --report embedded.html\n"
        "  cellplm embed corpus --model small --out embedded.zarr",
    )
    add_options(
        parser,
        """
        input IN.h5ad: raw counts: in X, raw.X or a common layer; or a corpus of cellplm prepare, a folder or gs://
            address
        --model!: checkpoint directory or pretraining work directory
        --out! OUT.h5ad: the input plus the embedding; for a corpus: a zarr store, which the same command resumes
        --batch-key K: column of obs with the tissue sample: one context each
        """,
        model={"action": "store"},
    )
    add_counts(parser)
    key = DEFAULTS["key_added"]
    add_options(parser, f"--key-added K: key of obsm to write ({key})", key_added={"default": key})
    _add_values(parser)
    add_adapt(parser, "none")
    add_precision(parser)
    add_options(
        parser,
        "--color K: column of obs that colours the UMAP of the report; repeatable (--batch-key)",
        color={"action": "append"},
    )
    add_output(parser, report="a summary of the input and a UMAP")


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Add the options of an embedding for its contexts and the values of its cells."""
    add_options(
        parser,
        """
        --cells-per-context N: maximum number of cells per context (all)
        --values counts|normalized|log1p: kind of values, if they are not raw counts (counts)
        --minimum-genes N: minimum number of known genes
        """,
        values={"default": DEFAULTS["values"]},
    )


def _embedding_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of an embedding that ``embed`` and ``cluster`` share."""
    return {
        "batch_key": arguments.batch_key,
        "spatial_key": arguments.spatial_key or "spatial",
        "require_coordinates": arguments.spatial_key is not None,
        "layer": arguments.layer,
        "gene_key": arguments.gene_key,
        "cells_per_context": arguments.cells_per_context,
        "values": arguments.values,
        "minimum_genes": arguments.minimum_genes,
        "adapt": arguments.adapt,
        "feature_type": arguments.feature_type,
        "quiet": arguments.quiet,
    }


def add_adapt(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--adapt``."""
    add_options(
        parser,
        f"""
        --adapt none|context: context: join the embedding with components and clusters of these cells; better for one
            file, and not comparable between files ({default})
        """,
        adapt={"default": default},
    )


def _embed(arguments: argparse.Namespace) -> None:
    if _is_corpus(arguments.input):
        return _embed_corpus(arguments)
    from cellplm_jax.tasks.cluster import known_columns
    from cellplm_jax.tasks.embed import embed_file
    from cellplm_jax.tasks.pretrained import load

    check_new_file(arguments)
    colors = arguments.color or ([arguments.batch_key] if arguments.batch_key else [])
    known_columns(arguments.input, arguments.color or [])
    model = load(arguments.model, precision=arguments.precision)
    messages = embed_file(
        arguments.input,
        model,
        arguments.out,
        key_added=arguments.key_added,
        **_embedding_keys(arguments),
    )
    write_page(arguments, "embedding", arguments.out, arguments.key_added, colors)
    print_result(
        arguments,
        [f"wrote {arguments.out}: obsm['{arguments.key_added}'] by {model.id}"],
        {"wrote": [arguments.out], "key_added": arguments.key_added, "model": model.id},
        messages=messages,
    )


def _is_corpus(path: str) -> bool:
    """Return whether the input is a corpus, without importing the reader of corpora for files."""
    # An .h5ad file cannot be streamed from there, so it must be a corpus.
    if path.startswith("gs://"):
        return True
    if not Path(path).expanduser().is_dir():
        return False
    from cellplm_jax.data.corpus import is_corpus

    return is_corpus(path)


def _embed_corpus(arguments: argparse.Namespace) -> None:
    unused = (
        "adapt",
        "batch_key",
        "spatial_key",
        "layer",
        "gene_key",
        "cells_per_context",
        "key_added",
        "values",
        "minimum_genes",
        "feature_type",
        "color",
        "report",
    )
    reject_options(
        arguments,
        unused,
        "embed with a corpus",
        "the samples, genes, counts and coordinates of the prepared corpus, and --model, --out, --precision",
    )
    from cellplm_jax.data.corpus import open_corpus
    from cellplm_jax.tasks.embed_corpus import KEY, embed_corpus
    from cellplm_jax.tasks.pretrained import load

    corpus = open_corpus(arguments.input)
    model = load(arguments.model, precision=arguments.precision)
    result = embed_corpus(corpus, model, arguments.out, quiet=arguments.quiet)
    line = f"{arguments.out}: obsm['{KEY}'] of {result.cells} cells in {result.samples} samples by {model.id}"
    if not result.embedded:
        line = f"nothing to do, {line}"
    elif result.embedded < result.samples:
        line = f"wrote {line}, {result.embedded} of the samples now"
    else:
        line = f"wrote {line}"
    facts = {
        "wrote": [arguments.out],
        "key_added": KEY,
        "model": model.id,
        "cells": result.cells,
        "samples": result.samples,
        "embedded_samples": result.embedded,
        "complete": result.complete,
    }
    print_result(arguments, [line], facts, messages=result.messages)


def add_cluster(commands: Any) -> None:
    """Add ``cluster``."""
    parser = command(
        commands,
        "cluster",
        _cluster,
        "cluster the cells of an .h5ad file or a .zarr store: neighbours and Leiden on an embedding, scores, a figure",
        "cellplm cluster cells.h5ad --model small --out clustered.h5ad --label-key cell_type --picture umap.png",
    )
    add_options(
        parser,
        """
        input IN.h5ad: cells, embedded or with raw counts
        --model M: model for embedding, if the embedding is missing
        --out! OUT.h5ad: the input plus clusters
        --use-rep K: embedding in obsm (X_cellplm)
        --resolution F: higher values give more clusters (1)
        --neighbors N: neighbours in the graph (15)
        --key-added K: column of obs to write
        --batch-key K: column of obs: contexts of the embedding, and mixing scores
        """,
        use_rep={"default": "X_cellplm"},
        resolution={"default": 1.0},
        neighbors={"default": 15},
        key_added={"default": "cellplm_cluster"},
    )
    add_counts(parser)
    _add_values(parser)
    add_options(parser, "--label-key K: column of obs with known types, to print scores")
    add_adapt(parser, "context")
    add_options(
        parser,
        """
        --picture PNG: plot a UMAP, and also write obsm['X_umap']
        --seed N: random seed (0)
        """,
        seed={"type": int, "default": 0},
    )
    add_output(parser, report="the clusters, their UMAP and scores")


def _cluster(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.cluster import cluster_file, draw_clusters, known_columns
    from cellplm_jax.tasks.files import check_output, read_annotations

    check_new_file(arguments)
    if arguments.picture:
        # Before the cells are embedded, which takes long.
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
        umap=arguments.picture is not None or arguments.report is not None,
        **_embedding_keys(arguments),
    )
    number = cells.obs[arguments.key_added].nunique()
    lines = [f"wrote {arguments.out}: obs['{arguments.key_added}'], {number} clusters"]
    facts: dict[str, Any] = {"wrote": [arguments.out], "clusters": number, "scores": {}}
    if arguments.label_key:
        from cellplm_jax.evaluate.embedding import clustering_scores, knn_accuracy, silhouette
        from cellplm_jax.tasks.contexts import labels_of

        labels = labels_of(cells.obs, arguments.label_key)
        # Scores are those of the labelled cells.
        known = [label is not None for label in labels]
        labels = labels[known].astype(str)
        embedding = cells.obsm[arguments.use_rep][known]
        scores = clustering_scores(labels, cells.obs[arguments.key_added][known])
        scores["knn_accuracy"] = knn_accuracy(embedding, labels, neighbors=arguments.neighbors)
        scores["label_silhouette"] = silhouette(embedding, labels)
        lines.append(scores_line(scores))
        facts["scores"] |= scores
    if arguments.batch_key and cells.obs[arguments.batch_key].nunique() > 1:
        from cellplm_jax.evaluate.embedding import batch_mixing, kbet

        batches = cells.obs[arguments.batch_key]
        embedding = cells.obsm[arguments.use_rep]
        scores = {"ilisi": batch_mixing(embedding, batches), "kbet": kbet(embedding, batches)}
        lines.append(scores_line(scores))
        facts["scores"] |= scores
    shown = [arguments.key_added, *columns]
    stored = [arguments.key_added, *(f"{name}_colors" for name in shown)]
    # The colours stored in the file, so that the figures have those of later plots.
    cells.uns.update(read_annotations(arguments.out, uns=stored).uns)
    if arguments.picture:
        draw_clusters(cells, shown, arguments.picture)
        lines.append(f"wrote {arguments.picture}")
        facts["wrote"].append(arguments.picture)
    write_page(
        arguments,
        "clusters",
        arguments.out,
        cells,
        shown,
        arguments.use_rep,
        facts["scores"],
    )
    print_result(arguments, lines, facts, messages=messages)
