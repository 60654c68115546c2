"""Output of the commands: text lines, one JSON document, colours on terminals, and the report of ``--report``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellplm_jax.errors import InputError, require, visible

_STYLES = {"bold": "1", "red": "1;31", "green": "32", "yellow": "33", "faint": "2"}


_STYLE = re.compile("(\x1b\\[[0-9;]*m)")


def say(text: str, stream: Any = None) -> None:
    """Write a line, to standard output by default.

    Control characters, which names from files may contain, are escaped, and characters that the encoding of the output
    lacks are, too. Styles of :func:`styled` are kept.
    """
    stream = sys.stdout if stream is None else stream
    parts = _STYLE.split(text) if stream.isatty() else [text]
    # Splitting at a group keeps the separators: the odd parts are our own styles.
    text = "".join(part if number % 2 else visible(part) for number, part in enumerate(parts))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A terminal of another encoding must not end a command with UnicodeEncodeError.
    stream.write(f"{text.encode(encoding, 'backslashreplace').decode(encoding)}\n")


def styled(text: str, style: str, stream: Any = None) -> str:
    """Return coloured text for terminals, and plain text for other outputs.

    Respects ``NO_COLOR`` (https://no-color.org) and ``TERM=dumb``.

    Args:
        text: The text.
        style: ``"bold"``, ``"red"``, ``"green"``, ``"yellow"`` or ``"faint"``.
        stream: Output stream; None: standard output.
    """
    stream = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def advised(text: str, arguments: argparse.Namespace) -> str:
    """Return a message without the alternatives of its remedy whose option the command does not have.

    Args:
        text: The message, such as ``"... Pass layer=... (--layer), or declare them with values=... (--values)."``
        arguments: Those of the command; an option that a task rejects is removed from them.
    """

    def keep(match: re.Match[str]) -> str:
        return match[0] if hasattr(arguments, match[1].replace("-", "_")) else ""

    return re.sub(r", or [^;.]*?\(--([a-z-]+)\)", keep, text)


def fail(command: str, text: str) -> None:
    """Write an error to standard error: the name of the command, then the message."""
    say(f"{styled(f'{command}:', 'red', sys.stderr)} {text}", sys.stderr)


def plain(value: Any) -> Any:
    """Return a JSON-compatible value: arrays as lists, paths as text, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    # NumPy arrays and scalars.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def print_result(
    arguments: argparse.Namespace,
    lines: Sequence[str],
    facts: Mapping[str, Any],
    *,
    messages: Sequence[str] = (),
) -> None:
    """Print the result of a command and its messages about the input.

    Args:
        arguments: With ``json``, ``quiet`` and ``report``.
        lines: Text lines for standard output.
        facts: Data of the JSON document, printed with ``--json`` instead of the lines.
        messages: Messages about the input, for standard error; omitted with ``--quiet``. The document always has them.
    """
    if not arguments.quiet:
        for message in messages:
            say(message, sys.stderr)
    if arguments.report is not None:
        lines = [*lines, f"wrote {arguments.report}"]
        facts = {**facts, "report": arguments.report}
    if arguments.json:
        import json

        document = {**facts, "messages": list(messages)} if messages else facts
        say(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False))
        return
    for line in lines:
        say(line)


def table_lines(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table of scores of several methods as text lines."""
    columns = (
        "ari",
        "ari_coarse",
        "nmi",
        "knn_accuracy",
        "masked_correlation",
        "nb_log_likelihood",
    )
    columns = [name for name in columns if any(name in scores for scores in table.values())]
    width = max(map(len, table)) + 2
    lines = [" " * width + "".join(f"{name:>20}" for name in columns)]
    for method, scores in table.items():
        values = (f"{scores[name]:20.4f}" if name in scores else f"{'-':>20}" for name in columns)
        lines.append(f"{method:<{width}}" + "".join(values))
    return lines


def scores_line(scores: Mapping[str, float]) -> str:
    """Return scores as one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def number_of(count: int, what: str) -> str:
    """Return a number with its unit, such as ``"2 genes"``."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def fitted_line(arguments: argparse.Namespace, what: str, facts: Mapping[str, Any]) -> str:
    """Return a one-line summary of a fit."""
    line = f"wrote {arguments.out}: {what}, {facts['training_cells']} training cells"
    if "best_epoch" in facts:
        line += f", epoch {facts['best_epoch']} of {facts['epochs']} kept, {facts['seconds']:.0f} s"
    return line


def check_new_folder(arguments: argparse.Namespace) -> None:
    """Check in advance that the directory of ``--out`` is new or empty and that the report is writable."""
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    check_report(arguments)


def check_new_file(arguments: argparse.Namespace) -> None:
    """Check in advance that the file of ``--out`` and the report are writable."""
    from cellplm_jax.tasks.files import check_output

    check_output(Path(arguments.out))
    check_report(arguments)


def check_report(arguments: argparse.Namespace) -> None:
    """Check in advance that a report can be written and drawn.

    Args:
        arguments: With ``report``: a path, or None.

    Raises:
        InputError: Its suffix is not .html, or it is not writable.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    if arguments.report is None:
        return
    from cellplm_jax.tasks.files import check_output

    path = Path(arguments.report).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(
            f"the report '{path}' has another suffix", "a name that ends in .html", "Rename it"
        )
    check_output(path)
    require("matplotlib", "eval", "A report")
    # umap takes seconds to import, and only some reports need it.
    if importlib.util.find_spec("scanpy") is None:
        require("scanpy", "eval", "A report")


def write_page(arguments: argparse.Namespace, page: str, *results: Any) -> None:
    """Write the report of a command if ``--report`` is set.

    Args:
        arguments: With ``report``, and the other arguments for the command line.
        page: Name of one of the functions of :mod:`cellplm_jax.report.pages`, or ``"module.function"`` of another one.
        *results: Its arguments.
    """
    if arguments.report is None:
        return
    from cellplm_jax.report.html import write_report

    matplotlib = require("matplotlib", "eval", "A report")
    pyplot = require("matplotlib.pyplot", "eval", "A report")
    # No window: reports are drawn on machines without a display.
    backend = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    try:
        module, _, name = page.rpartition(".")
        pages = importlib.import_module(f"cellplm_jax.report.{module or 'pages'}")
        shown = getattr(pages, name)(*results)
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
    from cellplm_jax.report.html import Code

    yield Code(shlex.join(["cellplm", *arguments.words]), heading="How it was made")
