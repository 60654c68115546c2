"""What the verbs have in common: how one is added, the options of every task, and what was given of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from cellplm_jax.errors import InputError, explain

RECIPE = ("genes", "epochs", "patience", "learning_rate", "freeze", "adapter_rank",
          "validation_fraction", "seed")  # fmt: skip
"""Options of the recipe of a fit."""

READING = ("batch_key", "spatial_key", "layer", "gene_key", "values", "cells_per_context",
            "split_key")  # fmt: skip
"""Options that say how a file is read."""


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a verb.

    Args:
        commands: Where to add it.
        name: Of the verb.
        run: Does the work; returns the exit status, None for 0.
        help: What it does, as an order.
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
    """Add the options of what a verb writes: ``--json``, ``--quiet`` and, where there is one, ``--report``.

    Args:
        parser: Of the verb.
        report: What its report shows; None: it has none.
    """
    if report is None:
        parser.set_defaults(report=None)
    else:
        parser.add_argument(
            "--report", metavar="FILE.html", help=f"also write a page that shows {report}"
        )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on standard output instead of text"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no remarks")


DEFAULTS = {"key_added": "X_cellplm", "values": "counts"}
"""Of options whose default is not None."""

PRECISIONS = ("float32", "bfloat16")
"""Those of ``cellplm_jax.config``, which is not imported for the help alone."""


def add_counts(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add the options that say where counts and coordinates are: ``--spatial-key``, ``--layer``, ``--gene-key``.

    Args:
        parser: Of the verb.
        default: What else to say of their defaults.
    """
    parser.add_argument(
        "--spatial-key",
        metavar="K",
        help=f"key of obsm with coordinates ('spatial' where present{default})",
    )
    parser.add_argument(
        "--layer", metavar="L", help=f"layer with the counts (found by itself{default})"
    )
    parser.add_argument(
        "--gene-key", metavar="K", help=f"column of var with gene ids (found by itself{default})"
    )


def add_precision(parser: argparse.ArgumentParser, default: str | None = "float32") -> None:
    """Add ``--precision``; ``default`` None: that of the configuration."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default,
        help="of the matrix products; bfloat16 is faster where the hardware has it "
        f"({default or 'of the config'})",
    )


def positive(text: str) -> int:
    """Return the positive whole number in a text, as a type of ``argparse``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        msg = f"{text!r} is not a positive whole number"
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
    """Add a task with the verbs ``fit`` and ``predict``, and the options that all tasks have.

    Args:
        commands: Where to add it.
        name: Of the task.
        help: What it does, as a noun and what to do with it.
        fit: Runs the first verb.
        predict: Runs the second one.
        fit_example: A command line.
        predict_example: A command line.
        fit_report: What the report of the first verb shows.
        predict_report: What that of the second one shows.
        without: Options that this task has not.
        predicts: ``"cells"``: ``predict`` reads a file and writes a copy of it with more in it; ``"table"``: it reads
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
            "input", metavar="IN.h5ad", help="raw counts: in X, raw.X or a usual layer"
        )
    first.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="what to start from: 'small', a checkpoint directory, or 'none' for from scratch",
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
            help=f"what the matrix holds (counts{default})",
        )
        add(
            verb,
            "--cells-per-context",
            type=positive,
            metavar="N",
            help=f"cells of a context at most when predicting (all{default})",
        )
        add_output(verb, report=shown)
    add(first, "--split-key", metavar="K", help="column of obs with 'train' and 'valid'")
    recipe = first.add_argument_group("recipe")
    add(recipe, "--genes", type=positive, metavar="N", help="highly variable genes only")
    add(recipe, "--epochs", type=positive, metavar="N", help="epochs at most")
    add(recipe, "--patience", type=int, metavar="N", help="epochs without a better one")
    add(recipe, "--learning-rate", type=float, metavar="F", help="peak learning rate")
    add(
        recipe,
        "--freeze",
        choices=("none", "embedder", "encoder"),
        help="parts that are not trained",
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
        help="held out" + ("" if "--split-key" in without else ", without --split-key"),
    )
    add(recipe, "--seed", type=int, metavar="N", help="seed of everything (0)")
    return first, second


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given, by name."""
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def source(arguments: argparse.Namespace) -> str | None:
    """Return the model to start from; None: from scratch."""
    return None if arguments.model == "none" else arguments.model


def counts_only(
    arguments: argparse.Namespace,
    *others: str,
    task: str | None = None,
    expected: str = "a random part of the cells for validation",
    instead: str = " and set --validation-fraction",
) -> None:
    """Refuse options that all tasks have and this one cannot use: values that are not counts, and ``others``."""
    if arguments.values not in (None, "counts"):
        msg = explain(
            f"--values {arguments.values}",
            "raw counts, which are what is predicted",
            "Name the layer with the counts with --layer",
        )
        raise InputError(msg)
    arguments.values = None
    refuse(arguments, others, task or arguments.command, expected, instead)


def refuse(
    arguments: argparse.Namespace,
    names: Sequence[str],
    given_to: str,
    expected: str,
    instead: str = "",
) -> None:
    """Refuse options that cannot be used here.

    Args:
        arguments: The command line; an option whose value is not its default was given.
        names: The options.
        given_to: What cannot use them.
        expected: What it needs instead.
        instead: What else to do than leave the option out.

    Raises:
        InputError: One of them was given.
    """
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and value != DEFAULTS.get(name):
            option = f"--{name.replace('_', '-')}"
            msg = explain(
                f"{option} was given to {given_to}", expected, f"Leave {option} out{instead}"
            )
            raise InputError(msg)


def names_in(text: str | None) -> list[str] | None:
    """Return names given as a file, one a line, or separated by commas; None: none were given."""
    from cellplm_jax.tasks.tables import read_names

    return None if text is None else read_names(text)
