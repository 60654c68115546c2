"""Early checks of output files, and writing of ``--report``."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellplm_jax.errors import InputError, explain, require


def check_new(arguments: argparse.Namespace) -> None:
    """Check in advance that the directory of ``--out`` is new or empty and that the report is writable."""
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    check(arguments)


def check_file(arguments: argparse.Namespace) -> None:
    """Check in advance that the file of ``--out`` and the report are writable."""
    from cellplm_jax.tasks.embed import check_output

    check_output(Path(arguments.out))
    check(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Check in advance that a report can be written and drawn.

    Args:
        arguments: With ``report``: a path, or None.

    Raises:
        InputError: Its suffix is not .html, or it is not writable.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    if arguments.report is None:
        return
    from cellplm_jax.tasks.embed import check_output

    path = Path(arguments.report).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        msg = explain(
            f"the report '{path}' has another suffix", "a name that ends in .html", "Rename it"
        )
        raise InputError(msg)
    check_output(path)
    require("matplotlib", "eval", "A report")
    # umap takes seconds to import, and only some reports need it.
    if importlib.util.find_spec("scanpy") is None:
        require("scanpy", "eval", "A report")


def write(arguments: argparse.Namespace, page: str, *found: Any) -> None:
    """Write the report of a command if ``--report`` is set.

    Args:
        arguments: With ``report``, and the other arguments for the command line.
        page: Name of one of the functions of :mod:`cellplm_jax.cli.pages`.
        *found: Its arguments.
    """
    if arguments.report is None:
        return
    from cellplm_jax.cli import pages
    from cellplm_jax.report import write_report

    matplotlib = require("matplotlib", "eval", "A report")
    pyplot = require("matplotlib.pyplot", "eval", "A report")
    # No window: reports are drawn on machines without a display.
    backend = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    try:
        shown = getattr(pages, page)(*found)
        write_report(
            Path(arguments.report).expanduser(),
            title=shown.title,
            summary=shown.summary,
            sections=[*shown.sections, *_how(arguments)],
        )
    finally:
        pyplot.close("all")
        pyplot.switch_backend(backend)


def _how(arguments: argparse.Namespace) -> Iterator[Any]:
    """Yield the command line of the run."""
    from cellplm_jax.report import Code

    yield Code(shlex.join(["cellplm", *arguments.words]), heading="How it was made")
