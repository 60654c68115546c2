"""Limits on files from strangers: regular files only, and JSON of bounded size, depth and numbers."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cellplm_jax.errors import CellPLMError, InputError, quote, shorten

JSON_BYTES = 2**27
"""Maximum size of a JSON file: 128 MiB."""

JSON_DEPTH = 40
"""Maximum depth of nested objects and lists in JSON."""

JSON_DIGITS = 20
"""Maximum number of digits of an integer in JSON; int64 has 19."""

TEXT_BYTES = 2**26
"""Maximum size of a text file with one name per line: 64 MiB."""

LONGEST_TEXT = 10_000
"""Maximum number of characters of a name."""

FOLDER_ENTRIES = 1_000_000
"""Maximum number of files in a folder that is a model or a store."""

WHOLE_NUMBERS = ("cells_per_context", "minimum_genes")
"""Options that are integers; the others are text."""

READ_ERRORS: tuple[type[Exception], ...] = (Exception,)
"""What libraries raise when they read a malformed file: also classes of their own, and nearly every built-in one."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of bounded size, depth and numbers.

    Args:
        text: The document.

    Returns:
        Its contents.

    Raises:
        ValueError: It is not JSON, or exceeds a limit; the message is one short phrase.
    """
    if len(text) > JSON_BYTES:
        msg = f"it has {len(text):,} bytes, the limit is {JSON_BYTES:,}"
        raise ValueError(msg)
    try:
        # Not json's own detection of encodings, which accepts UTF-16 and UTF-32.
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        content = json.loads(text, parse_int=_integer)
    # json parses recursively, so a deep document fails before its depth can be counted.
    except RecursionError:
        msg = f"it is nested more than {JSON_DEPTH} levels deep"
        raise ValueError(msg) from None
    except ValueError as error:
        raise ValueError(shorten(str(error), 200)) from None
    level, depth = [content], 0
    # Level by level, without recursion.
    while level := [
        item for value in level if isinstance(value, dict | list) for item in _items(value)
    ]:
        depth += 1
        if depth > JSON_DEPTH:
            msg = f"it is nested more than {JSON_DEPTH} levels deep"
            raise ValueError(msg)
    return content


def _items(value: dict | list) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _integer(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        msg = f"it has a number of {len(digits):,} digits"
        raise ValueError(msg)
    return int(digits)


def read_text(path: Any, limit: int = JSON_BYTES) -> str:
    """Read a UTF-8 file of bounded size.

    Args:
        path: A local path, or an ``epath.Path``.
        limit: Maximum number of bytes.

    Raises:
        ValueError: It is no regular file, is larger, or is not UTF-8.
        OSError: It cannot be read.
    """
    kind = irregular(path)
    if kind:
        msg = f"'{path}' is {kind}"
        raise ValueError(msg)
    with path.open("rb") as file:
        # The size of a file can change, and special files have none: the read itself is bounded.
        text = file.read(limit + 1)
    if len(text) > limit:
        msg = f"'{path}' has more than {limit:,} bytes"
        raise ValueError(msg)
    return text.decode("utf-8")


def name_lines(text: bytes) -> list[str]:
    """Return the lines of a text with one name per line.

    Args:
        text: The text; nothing is copied if it is refused.

    Raises:
        ValueError: A line is longer than :data:`LONGEST_TEXT`, or the text is not UTF-8.
    """
    begin = 0
    while begin < len(text):
        end = text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        if end - begin > LONGEST_TEXT:
            msg = f"a line has {end - begin:,} characters, the limit is {LONGEST_TEXT:,}"
            raise ValueError(msg)
        begin = end + 1
    return text.decode("utf-8").splitlines()


def irregular(path: str | os.PathLike) -> str:
    """Return what a local path is, if it is neither a regular file nor a folder; "" otherwise or if it is missing.

    Args:
        path: The path; links are followed.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""
    kinds = (
        (stat.S_ISREG(mode) or stat.S_ISDIR(mode), ""),
        (stat.S_ISFIFO(mode), "a named pipe"),
        (stat.S_ISSOCK(mode), "a socket"),
        (stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
    )
    return next((kind for found, kind in kinds if found), "a special file")


def require_regular(
    path: str | os.PathLike,
    *,
    inside: bool = False,
    raises: type[CellPLMError] = InputError,
) -> None:
    """Raise an error for pipes, devices and sockets, also in a folder; nothing is opened.

    Args:
        path: A local file or folder; a missing one is no error.
        inside: Links in the folder must not lead out of it. A cache of models links to files beside its folders.
        raises: Class of the error.

    Raises:
        CellPLMError: A path is not a regular file or folder, or a link leads out of the folder.
    """
    kind = irregular(path)
    if kind:
        raise raises(f"{quote(path)} is {kind}", "a regular file", "Copy the contents to a file")
    if not os.path.isdir(path):
        return
    # Links are compared with the real folder, which may be reached through a link itself.
    root = os.path.realpath(path)
    pending, seen = [root], 0
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > FOLDER_ENTRIES:
                    raise raises(
                        f"{quote(path)} contains more than {FOLDER_ENTRIES:,} files",
                        "the folder of one model or store",
                        "Check the path",
                    )
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if inside and not Path(target).is_relative_to(root):
                        raise raises(
                            f"{quote(entry.path)} is a link to {quote(target)}",
                            "files inside the folder",
                            "Replace the link by a copy of the file if you trust it",
                        )
                elif entry.is_dir(follow_symlinks=False):
                    # Linked folders are not entered, so a cycle of links ends.
                    pending.append(entry.path)
                    continue
                elif entry.is_file(follow_symlinks=False):
                    continue
                kind = irregular(entry.path)
                if kind:
                    raise raises(
                        f"{quote(entry.path)} is {kind}",
                        "a regular file",
                        "Copy the folder again from its source",
                    )


def require_options(options: Mapping[str, Any]) -> None:
    """Raise an error for options of the wrong type.

    Args:
        options: Values by name. Names that end in ``_key``, ``layer``, ``values``, ``feature_type`` and ``key_added``
            are text or None; ``cells_per_context`` and ``minimum_genes`` are integers or None.

    Raises:
        InputError: A value has another type.
    """
    for name, value in options.items():
        if value is None:
            continue
        if name in WHOLE_NUMBERS:
            # numpy's integers have an index, too; True does not count cells.
            valid = hasattr(value, "__index__") and not isinstance(value, bool)
            wanted = "a whole number"
        else:
            valid = isinstance(value, str)
            wanted = "one name, as text"
        if not valid:
            raise InputError(
                f"{name} = {shorten(repr(value))} is of type {type(value).__name__}",
                wanted,
                f"Correct {name}, or omit it",
            )
