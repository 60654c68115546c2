"""Commands for pretraining: ``demo``, ``prepare`` and ``plan``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cellplm_jax.cli.options import add_counts, add_output, command, positive, reject_options
from cellplm_jax.cli.output import check_report, fail, print_result, say, table_lines, write_page


def add_demo(commands: Any) -> None:
    """Add ``demo``."""
    parser = command(
        commands,
        "demo",
        _demo,
        "embed bundled cells with the bundled model, compare with principal components, and plot",
        "cellplm demo --out demo\n  cellplm demo --from-scratch --out demo",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="output directory (demo)")
    parser.add_argument(
        "--from-scratch", action="store_true", help="pretrain a model on the cells first"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="training steps, with --from-scratch"
    )
    parser.add_argument(
        "--max-cells", type=positive, metavar="N", help="use only N of the 2,700 cells"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
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
    parser.add_argument(
        "inputs", nargs="+", metavar="IN.h5ad", help=".h5ad files, .zarr stores, or folders of them"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="CORPUS",
        help="folder of the corpus; an existing corpus is resumed",
    )
    parser.add_argument(
        "--sample-key",
        metavar="K",
        help="column of obs with the tissue sample; a file without it is one sample",
    )
    parser.add_argument(
        "--dataset-key", metavar="K", help="column of obs with the data set (the file's name)"
    )
    parser.add_argument(
        "--platform-key", metavar="K", help="column of obs with the platform of each sample"
    )
    add_counts(parser)
    parser.add_argument(
        "--label-key", metavar="K", help="column of obs with labels of cells, for the probe"
    )
    parser.add_argument(
        "--genes", metavar="FILE", help="vocabulary, one gene per line (chosen from the files)"
    )
    parser.add_argument(
        "--vocabulary",
        choices=("union", "intersection"),
        help="genes to choose: measured in any file or in all files (union)",
    )
    parser.add_argument(
        "--minimum-cells",
        type=positive,
        metavar="N",
        help="minimum number of cells that express a chosen gene (10)",
    )
    parser.add_argument(
        "--minimum-prevalence",
        type=float,
        metavar="F",
        help="minimum fraction of the cells measuring a chosen gene that express it (0)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="running dask scheduler; its workers must have access to the same paths",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="local worker processes; 0: this process only (one per core, limited by the files)",
    )
    add_output(parser, report="the parts, samples and genes of the corpus")


def _prepare(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.prepare import prepare, summary_text

    check_report(arguments)
    summary = prepare(
        arguments.inputs,
        arguments.out,
        sample_key=arguments.sample_key,
        dataset_key=arguments.dataset_key,
        platform_key=arguments.platform_key,
        spatial_key=arguments.spatial_key,
        label_key=arguments.label_key,
        layer=arguments.layer,
        gene_key=arguments.gene_key,
        feature_type=arguments.feature_type,
        genes=arguments.genes,
        vocabulary=arguments.vocabulary,
        minimum_cells=arguments.minimum_cells,
        minimum_prevalence=arguments.minimum_prevalence,
        scheduler=arguments.scheduler,
        workers=arguments.workers,
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
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="configuration, Python or JSON, or the name of a preset",
    )
    parser.add_argument(
        "--topology", required=True, metavar="T", help="slice, such as v5e:16x16 or v5p-256"
    )
    parser.add_argument(
        "--mesh", metavar="M", help="mesh, such as data=64,cells=4 (the best of several)"
    )
    parser.add_argument(
        "--rows",
        type=positive,
        metavar="N",
        help="rows per batch (of the configuration, raised to a multiple of data)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a value of the configuration, such as rematerialize=true; repeatable",
    )
    parser.add_argument(
        "--genes", type=positive, metavar="N", help="size of the vocabulary (19374)"
    )
    parser.add_argument(
        "--nonzeros-per-cell", type=positive, metavar="N", help="stored counts per cell (1500)"
    )
    parser.add_argument(
        "--batches",
        type=positive,
        metavar="N",
        help="number of tissue samples in the corpus (12596)",
    )
    parser.add_argument(
        "--datasets", type=positive, metavar="N", help="number of datasets in the corpus (484)"
    )
    parser.add_argument(
        "--tries",
        type=positive,
        default=3,
        metavar="N",
        help="maximum number of meshes to compile (3)",
    )
    parser.add_argument(
        "--timeout", type=positive, metavar="S", help="timeout of each compilation in seconds"
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
        return 3
    return 0
