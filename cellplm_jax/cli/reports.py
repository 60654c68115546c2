"""What a verb writes: whether it can be written, before any work is done, and the page of ``--report``."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellplm_jax.errors import InputError, explain, require


def check_new(arguments: argparse.Namespace) -> None:
    """Refuse the directory of ``--out``, where it holds something, and a report that cannot be written."""
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    check(arguments)


def check_file(arguments: argparse.Namespace) -> None:
    """Refuse the file of ``--out`` and a report where they cannot be written."""
    from cellplm_jax.tasks.embed import check_output

    check_output(Path(arguments.out))
    check(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Refuse a report that cannot be written or drawn, before any work is done.

    Args:
        arguments: With ``report``: a path, or None.

    Raises:
        InputError: It has another ending than .html, or nothing can be written there.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    if arguments.report is None:
        return
    from cellplm_jax.tasks.embed import check_output

    path = Path(arguments.report).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        msg = explain(
            f"the report '{path}' has another ending", "a name that ends in .html", "Rename it"
        )
        raise InputError(msg)
    check_output(path)
    require("matplotlib", "eval", "A report")
    # It takes seconds to import, and not every page has a map.
    if importlib.util.find_spec("scanpy") is None:
        require("scanpy", "eval", "A report")


def write(arguments: argparse.Namespace, page: str, *found: Any) -> None:
    """Write the page of a verb where ``--report`` asks for it.

    Args:
        arguments: With ``report``, and the rest for how to repeat the run.
        page: Name of one of the functions of :mod:`cellplm_jax.cli.pages`.
        *found: What it shows.
    """
    if arguments.report is None:
        return
    from cellplm_jax.cli import pages
    from cellplm_jax.report import write_report

    matplotlib = require("matplotlib", "eval", "A report")
    pyplot = require("matplotlib.pyplot", "eval", "A report")
    # No window: a report is drawn on machines without a display.
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
    """Yield how the run is repeated."""
    from cellplm_jax.report import Code

    yield Code(shlex.join(["cellplm", *arguments.words]), heading="How it was made")
