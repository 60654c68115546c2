"""Shared options of the commands, and helpers to add commands and read options."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from cellplm_jax.errors import InputError

READING = (
    "batch_key",
    "spatial_key",
    "layer",
    "gene_key",
    "feature_type",
    "values",
    "cells_per_context",
    "split_key",
)
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


def add_options(
    parser: Any,
    text: str,
    *,
    without: Sequence[str] = (),
    **settings: dict[str, Any],
) -> None:
    """Add arguments from lines such as ``--label-key! K: column of obs with the types``, as users see them.

    The metavar implies the type: ``N`` is a positive integer, ``F`` a number, ``a|b`` a choice, any other is text, and
    an option without one is a flag. ``!`` marks required options, and names without dashes are positional. An indented
    line continues the one before.

    Args:
        parser: Parser of the command, or a group of it.
        text: The lines.
        without: Options to leave out.
        **settings: Other settings of ``add_argument``, by name of the argument.
    """
    for line in re.sub(r"\n +", " ", inspect.cleandoc(text)).splitlines():
        name, _, help = line.partition(": ")
        option, _, value = name.partition(" ")
        option, required = option.rstrip("!"), option.endswith("!")
        if option in without:
            continue
        entry: dict[str, Any] = {"help": help, **({"required": True} if required else {})}
        # Choices are in lower case, metavars in upper case.
        if "|" in value and value.islower():
            entry["choices"] = tuple(value.split("|"))
        elif value:
            entry |= {"metavar": value, **TYPES.get(value, {})}
        elif option.startswith("-"):
            entry["action"] = "store_true"
        parser.add_argument(option, **{**entry, **settings.get(_dest(option), {})})


def _dest(option: str) -> str:
    """Return the attribute of an option in the parsed arguments."""
    return option.lstrip("-").replace("-", "_")


def add_output(parser: argparse.ArgumentParser, *, report: str | None = None) -> None:
    """Add the output options: ``--json``, ``--quiet`` and, if there is a report, ``--report``.

    Args:
        parser: Parser of the command.
        report: Contents of its report; None: no report.
    """
    if report is None:
        parser.set_defaults(report=None)
    else:
        add_options(parser, f"--report FILE.html: also write an HTML report with {report}")
    add_options(
        parser,
        """
        --json: print one JSON document to standard output instead of text
        --quiet: no progress and no messages
        """,
    )


DEFAULTS = {"key_added": "X_cellplm", "values": "counts", "adapt": "none"}
"""Options with a default other than None."""

PRECISIONS = "float32|bfloat16"
"""Values of ``cellplm_jax.config``, which is not imported for the help."""


def add_counts(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add the options for the location of counts and coordinates.

    They are ``--spatial-key``, ``--layer``, ``--gene-key`` and ``--feature-type``.

    Args:
        parser: Parser of the command.
        default: Text appended to their defaults.
    """
    add_options(
        parser,
        f"""
        --spatial-key K: key of obsm with coordinates ('spatial' if present{default})
        --layer L: layer with the counts (detected{default})
        --gene-key K: column of var with gene ids (detected{default})
        --feature-type T: type of the features to read, such as 'Gene Expression'; 'all' reads every feature
            (genes{default})
        """,
    )


def add_precision(parser: argparse.ArgumentParser, default: str | None = "float32") -> None:
    """Add ``--precision``; ``default`` None: the precision of the configuration."""
    add_options(
        parser,
        f"""
        --precision {PRECISIONS}: precision of the matrix products; bfloat16 is faster on hardware that supports it
            ({default or "of the config"})
        """,
        precision={"default": default},
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


TYPES: dict[str, dict[str, Any]] = {"N": {"type": positive}, "F": {"type": float}}
"""Settings of the arguments of a metavar."""


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
    vars(arguments).pop("values", None)
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
        # A flag that was not passed is False.
        if value is not None and value is not False and value != DEFAULTS.get(name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{given_to} does not support {option}", expected, f"Omit {option}{instead}"
            )


def names_in(text: str | None) -> list[str] | None:
    """Return names from a file, one per line, or separated by commas; None: no names."""
    from cellplm_jax.tasks.tables import read_names

    return None if text is None else read_names(text)
