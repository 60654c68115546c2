"""The complete command: parser and error handling."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from cellplm_jax._version import __version__
from cellplm_jax.cli import bench, corpus, embedding, estimators, install, models, niches
from cellplm_jax.cli.output import advised, fail
from cellplm_jax.cli.parser import Parser
from cellplm_jax.errors import CellPLMError, InputError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = Parser(
        prog="cellplm",
        description="CellPLM in JAX: embed single cells and spots with a pretrained cell language model.",
        epilog="getting started:\n  cellplm doctor\n  cellplm embed cells.h5ad --model small --out embedded.h5ad "
        "--report embedded.html\n\nEvery command has an example: cellplm embed --help. Exit status: 0 success, 2 "
        "invalid usage or input, 1 any other error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cellplm-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    corpus.add_demo(commands)
    corpus.add_prepare(commands)
    embedding.add_embed(commands)
    embedding.add_cluster(commands)
    niches.add_niches(commands)
    for task in (
        estimators.Integrate,
        estimators.Annotate,
        estimators.Impute,
        estimators.Denoise,
        estimators.Perturb,
        estimators.Samples,
    ):
        task().add(commands)
    models.add_convert(commands)
    models.add_export(commands)
    models.add_info(commands)
    corpus.add_plan(commands)
    bench.add_bench(commands)
    install.add_doctor(commands)
    install.add_completion(commands, parser)
    return parser


def _silence_abandoned_reads() -> None:
    """Suppress further errors on standard error if a checkpoint is damaged.

    The first failed read raises; the other reads of the same checkpoint fail later on threads with a closed event loop.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


WITHOUT_DEVICES = ("completion", "doctor", "plan")
"""Verbs that work without the devices that were asked for: the doctor reports that they are missing."""


def _check_devices(command: str) -> None:
    """Refuse ``JAX_PLATFORMS`` that this machine has no device of, before a verb does any work."""
    if command in WITHOUT_DEVICES:
        return
    from cellplm_jax.platforms import check_platforms

    check_platforms()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _usable_outputs()
    arguments = build_parser().parse_args(words)
    # For reports, which show the command line.
    arguments.words = words
    _silence_abandoned_reads()
    try:
        return _run(arguments)
    except CellPLMError as error:
        fail(f"cellplm {arguments.command}", advised(str(error), arguments))
        return 2
    except KeyboardInterrupt:
        fail(f"cellplm {arguments.command}", "interrupted")
        return 130
    except BrokenPipeError:
        # The reader of a pipe closed it (head, less); this is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: argparse.Namespace) -> int:
    """Run a command, and write its complete output."""
    try:
        if os.environ.get("JAX_PLATFORMS", "cpu") not in ("", "cpu"):
            _check_devices(arguments.command)
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        # Python would try to write the rest again at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(
            f"the output cannot be written because the disk is full ({error.strerror})",
            "enough space for the output",
            "Free some space or choose another folder",
        ) from error
    return status


def _usable_outputs() -> None:
    """Replace closed standard streams, and let them accept all characters."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
