"""Shared options of the commands, and helpers to add commands and read options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from cellplm_jax.errors import InputError

RECIPE = ("genes", "epochs", "patience", "learning_rate", "freeze", "adapter_rank",
          "validation_fraction", "seed", "precision")  # fmt: skip
"""Options of the recipe of a fit."""

READING = ("batch_key", "spatial_key", "layer", "gene_key", "feature_type", "values", "cells_per_context",
            "split_key")  # fmt: skip
"""Options for reading a file."""


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: The subparsers.
        name: Name of the command.
        run: Runs the command; returns the exit status, None for 0.
        help: Summary, in the imperative.
        example: Command lines.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser, *, report: str | None = None) -> None:
    """Add the output options: ``--json``, ``--quiet`` and, if there is a report, ``--report``.

    Args:
        parser: Parser of the command.
        report: Contents of its report; None: no report.
    """
    if report is None:
        parser.set_defaults(report=None)
    else:
        parser.add_argument(
            "--report", metavar="FILE.html", help=f"also write an HTML report with {report}"
        )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document to standard output instead of text",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no messages")


DEFAULTS = {"key_added": "X_cellplm", "values": "counts", "adapt": "none"}
"""Options with a default other than None."""

PRECISIONS = ("float32", "bfloat16")
"""Values of ``cellplm_jax.config``, which is not imported for the help."""


def add_counts(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add the options for the location of counts and coordinates.

    They are ``--spatial-key``, ``--layer``, ``--gene-key`` and ``--feature-type``.

    Args:
        parser: Parser of the command.
        default: Text appended to their defaults.
    """
    parser.add_argument(
        "--spatial-key",
        metavar="K",
        help=f"key of obsm with coordinates ('spatial' if present{default})",
    )
    parser.add_argument("--layer", metavar="L", help=f"layer with the counts (detected{default})")
    parser.add_argument(
        "--gene-key", metavar="K", help=f"column of var with gene ids (detected{default})"
    )
    parser.add_argument(
        "--feature-type",
        metavar="T",
        help=f"type of the features to read, such as 'Gene Expression'; 'all' reads every feature (genes{default})",
    )


def add_precision(parser: argparse.ArgumentParser, default: str | None = "float32") -> None:
    """Add ``--precision``; ``default`` None: the precision of the configuration."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default,
        help="precision of the matrix products; bfloat16 is faster on hardware that supports it "
        f"({default or 'of the config'})",
    )


def positive(text: str) -> int:
    """Return a positive integer from text, as an ``argparse`` type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        msg = f"{text!r} is not a positive integer"
        raise argparse.ArgumentTypeError(msg)
    return value


def add_task(
    commands: Any,
    name: str,
    help: str,
    *,
    fit: Callable[[argparse.Namespace], None],
    predict: Callable[[argparse.Namespace], None],
    fit_example: str,
    predict_example: str,
    fit_report: str,
    predict_report: str,
    without: Sequence[str] = (),
    predicts: str = "cells",
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Add a task with the commands ``fit`` and ``predict``, and the options of all tasks.

    Args:
        commands: The subparsers.
        name: Name of the task.
        help: Summary: a noun, and the two actions.
        fit: Runs the first command.
        predict: Runs the second one.
        fit_example: A command line.
        predict_example: A command line.
        fit_report: Contents of the report of the first command.
        predict_report: Contents of the report of the second command.
        without: Options that this task does not support.
        predicts: ``"cells"``: ``predict`` reads a file and writes a copy of it with the results; ``"table"``: it reads
            no file, and writes a table.
    """
    parser = command(commands, name, fit, help, f"{fit_example}\n  {predict_example}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="fit|predict")
    first = command(verbs, "fit", fit, f"{help}: fit", fit_example)
    second = command(verbs, "predict", predict, f"{help}: predict", predict_example)

    def add(group: Any, option: str, **settings: Any) -> None:
        if option not in without:
            group.add_argument(option, **settings)

    for verb in (first, second) if predicts == "cells" else (first,):
        verb.add_argument(
            "input", metavar="IN.h5ad", help="raw counts: in X, raw.X or a common layer"
        )
    first.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="start model: 'small', a checkpoint directory, or 'none' for training from scratch",
    )
    first.add_argument(
        "--out", required=True, metavar="DIR", help="new directory of the fitted estimator"
    )
    second.add_argument(
        "--model", required=True, metavar="DIR", help="directory of a fitted estimator"
    )
    if predicts == "cells":
        second.add_argument(
            "--out", required=True, metavar="OUT.h5ad", help="the input plus the predictions"
        )
    else:
        second.add_argument(
            "--out", required=True, metavar="OUT.csv", help="table of the predictions; .csv or .tsv"
        )
    for verb, default, shown in (
        (first, "", fit_report),
        (second, "; as in fit", predict_report),
    ):
        add(
            verb,
            "--batch-key",
            metavar="K",
            help=f"column of obs with the tissue sample: one context each{default}",
        )
        add_counts(verb, default)
        add(
            verb,
            "--values",
            choices=("counts", "normalized", "log1p"),
            help=f"kind of values (counts{default})",
        )
        add(
            verb,
            "--cells-per-context",
            type=positive,
            metavar="N",
            help=f"maximum number of cells per context at prediction time (all{default})",
        )
        add_output(verb, report=shown)
    add(first, "--split-key", metavar="K", help="column of obs with 'train' and 'valid'")
    recipe = first.add_argument_group("recipe")
    add(recipe, "--genes", type=positive, metavar="N", help="number of highly variable genes")
    add(recipe, "--epochs", type=positive, metavar="N", help="maximum number of epochs")
    add(
        recipe,
        "--patience",
        type=int,
        metavar="N",
        help="epochs without improvement before stopping",
    )
    add(recipe, "--learning-rate", type=float, metavar="F", help="peak learning rate")
    add(
        recipe,
        "--freeze",
        choices=("none", "embedder", "encoder"),
        help="frozen modules",
    )
    add(
        recipe,
        "--adapter-rank",
        type=int,
        metavar="N",
        help="low-rank adapters on the encoder (none)",
    )
    add(
        recipe,
        "--validation-fraction",
        type=float,
        metavar="F",
        help="held-out fraction" + ("" if "--split-key" in without else ", without --split-key"),
    )
    add(recipe, "--seed", type=int, metavar="N", help="random seed (0)")
    add(
        recipe,
        "--precision",
        choices=PRECISIONS,
        help="precision of the matrix products of fit and prediction (float32)",
    )
    return first, second


def passed_options(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that were passed, by name."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def source(arguments: argparse.Namespace) -> str | None:
    """Return the start model; None: from scratch."""
    return None if arguments.model == "none" else arguments.model


def counts_only(
    arguments: argparse.Namespace,
    *others: str,
    task: str | None = None,
    expected: str = "a random part of the cells for validation",
    instead: str = " and set --validation-fraction",
) -> None:
    """Raise an error for common options that this task does not support: values other than counts, and ``others``."""
    if arguments.values not in (None, "counts"):
        raise InputError(
            f"--values {arguments.values}",
            "raw counts, because the task predicts counts",
            "Select the layer with the counts with --layer",
        )
    # Messages about the counts do not advise it then.
    del arguments.values
    reject_options(arguments, others, task or arguments.command, expected, instead)


def reject_options(
    arguments: argparse.Namespace,
    names: Sequence[str],
    given_to: str,
    expected: str,
    instead: str = "",
) -> None:
    """Raise an error for unsupported options.

    Args:
        arguments: The command line; an option counts as passed if its value is not the default.
        names: The options.
        given_to: Command that does not support them.
        expected: Supported input.
        instead: Alternative to omitting the option.

    Raises:
        InputError: One of them was passed.
    """
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and value != DEFAULTS.get(name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{given_to} does not support {option}", expected, f"Omit {option}{instead}"
            )


def names_in(text: str | None) -> list[str] | None:
    """Return names from a file, one per line, or separated by commas; None: no names."""
    from cellplm_jax.tasks.tables import read_names

    return None if text is None else read_names(text)
