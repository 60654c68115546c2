"""Commands that compute and use embeddings: ``embed``, ``cluster`` and ``integrate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cellplm_jax.cli.options import (
    DEFAULTS,
    READING,
    RECIPE,
    add_counts,
    add_output,
    add_precision,
    add_task,
    command,
    counts_only,
    passed_options,
    positive,
    reject_options,
    source,
)
from cellplm_jax.cli.output import (
    check_new_file,
    check_new_folder,
    fitted_line,
    print_result,
    scores_line,
    write_page,
)
from cellplm_jax.errors import InputError


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
    parser.add_argument(
        "input",
        metavar="IN.h5ad",
        help="raw counts: in X, raw.X or a common layer; or a corpus of cellplm prepare, a folder or gs:// address",
    )
    parser.add_argument(
        "--model", required=True, help="checkpoint directory or pretraining work directory"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="OUT.h5ad",
        help="the input plus the embedding; for a corpus: a zarr store, which the same command resumes",
    )
    parser.add_argument(
        "--batch-key", metavar="K", help="column of obs with the tissue sample: one context each"
    )
    add_counts(parser)
    parser.add_argument(
        "--key-added",
        default=DEFAULTS["key_added"],
        metavar="K",
        help="key of obsm to write (X_cellplm)",
    )
    _add_values(parser)
    add_adapt(parser, "none")
    add_precision(parser)
    parser.add_argument(
        "--color",
        action="append",
        metavar="K",
        help="column of obs that colours the UMAP of the report; repeatable (--batch-key)",
    )
    add_output(parser, report="a summary of the input and a UMAP")


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Add the options of an embedding for its contexts and the values of its cells."""
    parser.add_argument(
        "--cells-per-context",
        type=positive,
        metavar="N",
        help="maximum number of cells per context (all)",
    )
    parser.add_argument(
        "--values",
        choices=("counts", "normalized", "log1p"),
        default=DEFAULTS["values"],
        help="kind of values, if they are not raw counts (counts)",
    )
    parser.add_argument(
        "--minimum-genes", type=positive, metavar="N", help="minimum number of known genes"
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
    parser.add_argument(
        "--adapt",
        choices=("none", "context"),
        default=default,
        help="context: join the embedding with components and clusters of these cells; better for one file, "
        f"and not comparable between files ({default})",
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
    if path.startswith("gs://"):
        return True
    if not Path(path).expanduser().is_dir():
        return False
    from cellplm_jax.data.corpus import is_corpus

    return is_corpus(path)


def _embed_corpus(arguments: argparse.Namespace) -> None:
    unused = ("adapt", "batch_key", "spatial_key", "layer", "gene_key", "cells_per_context", "key_added",
              "values", "minimum_genes", "feature_type", "color", "report")  # fmt: skip
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
    parser.add_argument("input", metavar="IN.h5ad", help="cells, embedded or with raw counts")
    parser.add_argument(
        "--model", metavar="M", help="model for embedding, if the embedding is missing"
    )
    parser.add_argument("--out", required=True, metavar="OUT.h5ad", help="the input plus clusters")
    parser.add_argument(
        "--use-rep", default="X_cellplm", metavar="K", help="embedding in obsm (X_cellplm)"
    )
    parser.add_argument(
        "--resolution",
        type=float,
        default=1.0,
        metavar="F",
        help="higher values give more clusters (1)",
    )
    parser.add_argument(
        "--neighbors", type=positive, default=15, metavar="N", help="neighbours in the graph (15)"
    )
    parser.add_argument(
        "--key-added", default="cellplm_cluster", metavar="K", help="column of obs to write"
    )
    parser.add_argument(
        "--batch-key",
        metavar="K",
        help="column of obs: contexts of the embedding, and mixing scores",
    )
    add_counts(parser)
    _add_values(parser)
    parser.add_argument(
        "--label-key", metavar="K", help="column of obs with known types, to print scores"
    )
    add_adapt(parser, "context")
    parser.add_argument(
        "--picture", metavar="PNG", help="plot a UMAP, and also write obsm['X_umap']"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add_output(parser, report="the clusters, their UMAP and scores")


def _cluster(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.cluster import cluster_file, draw_clusters, known_columns
    from cellplm_jax.tasks.files import check_output, read_annotations

    check_new_file(arguments)
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
        known = [label is not None for label in labels]
        labels, embedding = labels[known].astype(str), cells.obsm[arguments.use_rep][known]
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
    cells.uns.update(read_annotations(arguments.out, uns=stored).uns)
    if arguments.picture:
        draw_clusters(cells, shown, arguments.picture)
        lines.append(f"wrote {arguments.picture}")
        facts["wrote"].append(arguments.picture)
    write_page(
        arguments, "clusters", arguments.out, cells, shown, arguments.use_rep, facts["scores"]
    )
    print_result(arguments, lines, facts, messages=messages)


def add_integrate(commands: Any) -> None:
    """Add ``integrate``."""
    fit, predict = add_task(
        commands,
        "integrate",
        "an embedding without batch effects: align several batches, or embed cells with the fitted alignment",
        fit=_integrate_fit,
        predict=_integrate_predict,
        fit_example="cellplm integrate fit cells.h5ad --batch-key batch --model small --out integrator",
        predict_example="cellplm integrate predict cells.h5ad --model integrator --out integrated.h5ad",
        fit_report="the facts and, for finetune, the loss curve of the fit",
        predict_report="a UMAP by batch, also of X_cellplm or X_pca if the file has them, and their scores, beside "
        "those of Harmony on principal components",
    )
    fit.add_argument(
        "--strength", type=float, default=1.0, metavar="F", help="mixing relative to structure (1)"
    )
    fit.add_argument(
        "--method",
        choices=("align", "finetune"),
        help="align: latent and components, aligned by Harmony; finetune: train the model (align; with training "
        "options: finetune)",
    )
    predict.add_argument(
        "--label-key", metavar="K", help="column of obs with known types, to print scores"
    )


def _integrate_only(arguments: argparse.Namespace, *others: str) -> None:
    """Raise an error for common options that integration does not support."""
    expected = "its own options: all cells are fitted, for all epochs, without coordinates"
    task = f"integrate {arguments.verb}"
    counts_only(arguments, *others, task=task, expected=expected, instead="")


def _integrate_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.integrate import BatchIntegrator

    check_new_folder(arguments)
    unused = ("spatial_key", "split_key", "patience", "validation_fraction")
    _integrate_only(arguments, *unused)
    if arguments.batch_key is None:
        raise InputError(
            "integrate fit requires --batch-key",
            "the column of obs with the batches",
            "Add --batch-key",
        )
    integrator = BatchIntegrator(
        source(arguments),
        strength=arguments.strength,
        quiet=arguments.quiet,
        **passed_options(arguments, ("method", *RECIPE)),
    )
    integrator.fit(arguments.input, **passed_options(arguments, READING))
    integrator.save(arguments.out)
    write_page(arguments, "fit", integrator)
    line = fitted_line(arguments, f"{integrator.facts['batches']} batches", integrator.facts)
    print_result(arguments, [line], {"wrote": [arguments.out], **integrator.facts})


def _integrate_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.integrate import KEY, BatchIntegrator

    check_new_file(arguments)
    _integrate_only(arguments, "spatial_key")
    integrator = BatchIntegrator.load(arguments.model, quiet=arguments.quiet)
    reading = passed_options(arguments, ("layer", "gene_key", "feature_type", "cells_per_context"))
    if integrator.method == "align":
        reading |= passed_options(arguments, ("batch_key",))
    messages = integrator.predict_file(arguments.input, arguments.out, **reading)
    lines = [f"wrote {arguments.out}: obsm['{KEY}']"]
    scores: dict[str, float] = {}
    if arguments.label_key:
        keys = {**reading, **passed_options(arguments, ("batch_key", "label_key"))}
        scores = integrator.score(arguments.input, **keys)
        lines.append(scores_line(scores))
    columns = [arguments.batch_key or integrator.reading.batch_key, arguments.label_key]
    write_page(arguments, "effects.integrated", arguments.out, KEY, [key for key in columns if key])
    facts = {"wrote": [arguments.out], "key_added": KEY, "scores": scores}
    print_result(arguments, lines, facts, messages=messages)
