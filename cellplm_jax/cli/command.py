"""The command as a whole: its parser, and what becomes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import cellplm_jax
from cellplm_jax.cli import corpus, embedding, estimators, models
from cellplm_jax.cli.output import say
from cellplm_jax.errors import CellPLMError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="cellplm",
        description="CellPLM in JAX: embed single cells and spots with a pretrained cell language model.",
    )
    parser.add_argument(
        "--version", action="version", version=f"cellplm-jax {cellplm_jax.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    corpus.add_demo(commands)
    corpus.add_prepare(commands)
    embedding.add_embed(commands)
    embedding.add_cluster(commands)
    embedding.add_integrate(commands)
    estimators.add_annotate(commands)
    estimators.add_impute(commands)
    estimators.add_denoise(commands)
    estimators.add_perturb(commands)
    estimators.add_samples(commands)
    models.add_convert(commands)
    models.add_export(commands)
    models.add_info(commands)
    corpus.add_plan(commands)
    return parser


def _silence_abandoned_reads() -> None:
    """Keep standard error to one message where a checkpoint is damaged.

    The first failed read raises; the others of the same checkpoint end on threads whose event loop is gone by then.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit status.
    """
    arguments = build_parser().parse_args(argv)
    _silence_abandoned_reads()
    try:
        return arguments.run(arguments) or 0
    except CellPLMError as error:
        say(f"cellplm {arguments.command}: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"cellplm {arguments.command}: interrupted", sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of a pipe went away (head, less); nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
