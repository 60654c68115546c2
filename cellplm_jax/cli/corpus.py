"""Commands for pretraining: ``demo``, ``prepare`` and ``plan``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cellplm_jax.cli.options import add_counts, add_options, add_output, command, reject_options
from cellplm_jax.cli.output import check_report, fail, print_result, say, table_lines, write_page

PREPARE = (
    "sample_key",
    "dataset_key",
    "platform_key",
    "spatial_key",
    "label_key",
    "layer",
    "gene_key",
    "feature_type",
    "genes",
    "vocabulary",
    "minimum_cells",
    "minimum_prevalence",
    "scheduler",
    "workers",
)
"""Options of ``prepare`` that are options of the function."""


def add_demo(commands: Any) -> None:
    """Add ``demo``."""
    parser = command(
        commands,
        "demo",
        _demo,
        "embed bundled cells with the bundled model, compare with principal components, and plot",
        "cellplm demo --out demo\n  cellplm demo --from-scratch --out demo",
    )
    add_options(
        parser,
        """
        --out DIR: output directory (demo)
        --from-scratch: pretrain a model on the cells first
        --steps N: training steps, with --from-scratch
        --max-cells N: use only N of the 2,700 cells
        --seed N: random seed (0)
        """,
        out={"default": "demo"},
        seed={"type": int, "default": 0},
    )
    add_output(parser)


def _demo(arguments: argparse.Namespace) -> None:
    report = Path(arguments.out) / "report.html"
    options = {"max_cells": arguments.max_cells, "seed": arguments.seed, "quiet": arguments.quiet}
    if arguments.from_scratch:
        from cellplm_jax.demo_from_scratch import run_from_scratch, verdict

        model = str(Path(arguments.out) / "model")
        table = run_from_scratch(arguments.out, steps=arguments.steps, **options)
    else:
        from cellplm_jax.demo import run_demo, verdict

        # Without training --steps would be ignored, and its user would expect an effect.
        reject_options(arguments, ("steps",), "a demo without training", "--from-scratch")
        model = "small"
        table = run_demo(arguments.out, **options)
    lines = [
        *table_lines(table),
        verdict(table),
        f"report: {report}",
        f"model:  {model}   (cellplm embed FILE.h5ad --model {model} --out OUT.h5ad)",
    ]
    facts = {"scores": table, "verdict": verdict(table), "wrote": [str(report)], "model": model}
    print_result(arguments, lines, facts)


def add_prepare(commands: Any) -> None:
    """Add ``prepare``."""
    parser = command(
        commands,
        "prepare",
        _prepare,
        "convert AnnData files to a corpus for pretraining, or add files to one",
        "cellplm prepare data/*.h5ad --out corpus --sample-key batch --label-key cell_type",
    )
    add_options(
        parser,
        """
        inputs IN.h5ad: .h5ad files, .zarr stores, or folders of them
        --out! CORPUS: folder of the corpus; an existing corpus is resumed
        --sample-key K: column of obs with the tissue sample; a file without it is one sample
        --dataset-key K: column of obs with the data set (the file's name)
        --platform-key K: column of obs with the platform of each sample
        """,
        inputs={"nargs": "+"},
    )
    add_counts(parser)
    add_options(
        parser,
        """
        --label-key K: column of obs with labels of cells, for the probe
        --genes FILE: vocabulary, one gene per line (chosen from the files)
        --vocabulary union|intersection: genes to choose: measured in any file or in all files (union)
        --minimum-cells N: minimum number of cells that express a chosen gene (10)
        --minimum-prevalence F: minimum fraction of the cells measuring a chosen gene that express it (0)
        --scheduler ADDRESS: running dask scheduler; its workers must have access to the same paths
        --workers N: local worker processes; 0: this process only (one per core, limited by the files)
        """,
        workers={"type": int},
    )
    add_output(parser, report="the parts, samples and genes of the corpus")


def _prepare(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.prepare import prepare, summary_text

    # Before the conversion: an invalid name of the report would otherwise be found after hours.
    check_report(arguments)
    summary = prepare(
        arguments.inputs,
        arguments.out,
        **{name: getattr(arguments, name) for name in PREPARE},
        quiet=arguments.quiet,
    )
    if arguments.report is not None:
        from cellplm_jax.tasks.info import describe_corpus

        write_page(arguments, "corpus", describe_corpus(arguments.out, quiet=True))
    print_result(
        arguments,
        [
            summary_text(summary),
            f"wrote {arguments.out} in {summary['seconds']:.0f} s   (cellplm info {arguments.out})",
        ],
        summary,
    )


def add_plan(commands: Any) -> None:
    """Add ``plan``."""
    parser = command(
        commands,
        "plan",
        _plan,
        "compile the training step for a TPU slice without TPUs: memory, FLOPs, communication, time",
        "cellplm plan --config configs/pretrain.py:85m --topology v5e:16x16\n"
        "  cellplm plan --config 85m --topology v5p-256 --mesh data=128 --set precision=bfloat16 --json\n"
        "\nexit status: 0 it fits; 3 no mesh fits",
    )
    add_options(
        parser,
        """
        --config! FILE[:VARIANT]: configuration, Python or JSON, or the name of a preset
        --topology! T: slice, such as v5e:16x16 or v5p-256
        --mesh M: mesh, such as data=64,cells=4 (the best of several)
        --rows N: rows per batch (of the configuration, raised to a multiple of data)
        --set NAME=VALUE: override a value of the configuration, such as rematerialize=true; repeatable
        --genes N: size of the vocabulary (19374)
        --nonzeros-per-cell N: stored counts per cell (1500)
        --batches N: number of tissue samples in the corpus (12596)
        --datasets N: number of datasets in the corpus (484)
        --tries N: maximum number of meshes to compile (3)
        --timeout N: timeout of each compilation in seconds
        """,
        set={"action": "append", "default": []},
        tries={"default": 3},
        timeout={"metavar": "S"},
    )
    add_output(parser)


def _plan(arguments: argparse.Namespace) -> int:
    from cellplm_jax.plan import search

    config = search.complete(
        search.change(search.load_config(arguments.config), arguments.set),
        genes=arguments.genes,
        batches=arguments.batches,
        datasets=arguments.datasets,
    )
    report = search.plan(
        config,
        arguments.topology,
        mesh=arguments.mesh,
        rows=arguments.rows,
        nonzeros_per_cell=arguments.nonzeros_per_cell or search.NONZEROS_PER_CELL,
        tries=arguments.tries,
        timeout=arguments.timeout,
        say=None if arguments.quiet else lambda text: say(f"plan: {text}", sys.stderr),
    )
    print_result(arguments, [search.plan_text(report)], report)
    if report["best"] is None:
        fail("cellplm plan", report["reason"])
        # Not 2, the status of an error: a script can then tell "does not fit" from "could not be planned".
        return 3
    return 0
