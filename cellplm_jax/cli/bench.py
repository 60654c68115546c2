"""The command ``bench``: benchmarks of embedding, training and reading on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cellplm_jax.cli.options import add_options, add_output, add_precision, command
from cellplm_jax.cli.output import print_result, say


def add_bench(commands: Any) -> None:
    """Add ``bench embed``, ``bench train`` and ``bench load``."""
    examples = {
        "embed": "cellplm bench embed --model small --cells 2000",
        "train": "cellplm bench train --config small --cells 1024",
        "load": "cellplm bench load cells.h5ad",
    }
    parser = command(
        commands,
        "bench",
        _embed,
        "benchmark embedding, training or reading on this machine; JSON on standard output",
        "\n  ".join(examples.values()),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="embed|train|load")

    embed = command(
        verbs,
        "embed",
        _embed,
        "benchmark embedding with one context",
        examples["embed"],
    )
    add_options(
        embed,
        "input IN.h5ad: cells to embed (random counts)\n--model MODEL: model (small)",
        input={"nargs": "?"},
        model={"default": "small"},
    )

    train = command(
        verbs,
        "train",
        _train,
        "benchmark the training step on random counts",
        examples["train"],
    )
    add_options(
        train,
        """
        --config NAME: a named configuration (small)
        --rows N: rows per batch (of the config)
        --genes N: size of the vocabulary (19374)
        --chunk-cells N: cells with dense counts at a time; 0: all
        """,
        config={"default": "small"},
        genes={"default": 19_374},
        chunk_cells={"type": int},
    )

    load = command(
        verbs,
        "load",
        _load,
        "benchmark reading a corpus or an AnnData file",
        examples["load"],
    )
    add_options(load, "input CORPUS|IN.h5ad: corpus or file to read")

    for verb, cells in ((embed, 2000), (train, None), (load, 100_000)):
        add_options(
            verb,
            f"--cells N: number of cells ({cells or 'of the config'})\n--repeats N: runs after the first (5)",
            cells={"default": cells},
            repeats={"default": 5},
        )
        add_output(verb)
        # The output is JSON with and without --json.
        verb.set_defaults(json=True)
    for verb in (embed, train):
        add_precision(verb, "float32" if verb is embed else None)
        text = "--nonzeros N: stored counts per random cell (1500)"
        add_options(verb, text, nonzeros={"default": 1500})


def _conclude(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Print the result as JSON, and one summary line to standard error."""
    rate = f"{facts['cells_per_second']:,.0f} cells/s"
    if facts.get("share_of_peak"):
        rate += f", {facts['share_of_peak']:.0%} of the peak of matrix products"
    if not arguments.quiet:
        say(f"{facts['task']}: {rate} on {facts['device']}", sys.stderr)
    print_result(arguments, [], facts)


def _embed(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.bench import bench_embedding
    from cellplm_jax.tasks.pretrained import load

    model = load(arguments.model, precision=arguments.precision)
    _conclude(
        arguments,
        bench_embedding(
            model,
            data=arguments.input,
            cells=arguments.cells,
            nonzeros=arguments.nonzeros,
            repeats=arguments.repeats,
        ),
    )


def _train(arguments: argparse.Namespace) -> None:
    import dataclasses

    from cellplm_jax.presets import preset
    from cellplm_jax.tasks.bench import bench_training

    config = preset(arguments.config)
    chosen = {"rows": arguments.rows, "cells": arguments.cells}
    data = {name: value for name, value in chosen.items() if value is not None}
    changes: dict[str, Any] = {"data": dataclasses.replace(config.data, **data)}
    if arguments.precision is not None:
        changes["precision"] = arguments.precision
    if arguments.chunk_cells is not None:
        changes["chunk_cells"] = arguments.chunk_cells
    _conclude(
        arguments,
        bench_training(
            dataclasses.replace(config, **changes),
            genes=arguments.genes,
            nonzeros=arguments.nonzeros,
            repeats=arguments.repeats,
        ),
    )


def _load(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.bench import bench_loading
    from cellplm_jax.tasks.pretrained import load

    genes = load("small").genes
    _conclude(
        arguments,
        bench_loading(arguments.input, genes, cells=arguments.cells, repeats=arguments.repeats),
    )
