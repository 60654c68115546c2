"""Errors raised by this package.

Every message states three things in this order: what was found, what was expected, and the remedy. The errors build
the text from these with :func:`explain`. A message has at most 1,000 characters, and control characters of names are
escaped. The command line converts a :class:`CellPLMError` to exit status 2 and one message without a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LONGEST = 1000
"""Maximum length of a message in characters."""

LONGEST_NAME = 120
"""Maximum length at which a message quotes a name from a file."""

# Control characters except the line feed, marks that change the direction of text, separators of lines, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return text with escaped control characters, so that names from files cannot control a terminal.

    Args:
        text: Any text; line feeds are kept.
    """
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def shorten(text: str, limit: int = LONGEST_NAME) -> str:
    """Return text of a maximum length; the middle of a longer text is left out.

    Args:
        text: Any text.
        limit: Maximum number of characters.
    """
    if len(text) <= limit:
        return text
    end = max(0, limit // 3 - 5)
    return f"{text[: limit - end - 5]} ... {text[len(text) - end :]}"


def quote(name: object) -> str:
    """Return a name from a file or a user in quotes, in one line, escaped and shortened.

    Args:
        name: The name.
    """
    return f"'{visible(shorten(str(name))).replace(chr(10), ' ')}'"


class CellPLMError(Exception):
    """Base class of all errors that this package raises deliberately.

    Args:
        found: The invalid input, with its name or number; the complete message without ``expected``.
        expected: The valid input.
        remedy: Instruction for the user; "": none.
    """

    def __init__(self, found: str, expected: str | None = None, remedy: str = ""):
        # One argument, the message, so that an error from another process is identical.
        text = found if expected is None else explain(found, expected, remedy)
        # Cut first: a file can make a message of any length, and escaping takes time.
        super().__init__(shorten(visible(text[: 100 * LONGEST]), LONGEST))


class InputError(CellPLMError, ValueError):
    """The input data (counts, genes, keys, files) cannot be used."""


class ConfigError(CellPLMError, ValueError):
    """A configuration has an unknown key, a value of the wrong type, or an impossible combination."""


class CheckpointError(CellPLMError, ValueError):
    """A checkpoint is missing, damaged, or does not match its configuration."""


class MissingDependencyError(CellPLMError, ImportError):
    """A required optional dependency is not installed; the message names the extra to install."""


def explain(found: str, expected: str, remedy: str = "") -> str:
    """Return an error message in the common form of this package.

    Args:
        found: The invalid input, with its name or number.
        expected: The valid input.
        remedy: Instruction for the user; "": none.

    Returns:
        ``"<found>; expected <expected>. <remedy>"`` with the sentence punctuation normalised. At most ``LONGEST``
        characters: a longer description of what was found is shortened.
    """
    expected, remedy = (shorten(text.rstrip("."), LONGEST // 4) for text in (expected, remedy))
    # Escapes make a text longer, so they come before it is shortened.
    found = visible(shorten(found.rstrip(".;"), LONGEST))
    found = shorten(found, LONGEST - len(expected) - len(remedy) - len("; expected . ."))
    text = f"{found}; expected {expected}."
    if not remedy:
        return text
    return f"{text} {remedy}{'' if remedy.endswith('?') else '.'}"


def nearest(name: object, known: Iterable[object], otherwise: str) -> str:
    """Return the remedy for an unknown name.

    Args:
        name: The unknown name; case is ignored.
        known: The valid names.
        otherwise: The remedy if no valid name is similar.

    Returns:
        ``"Did you mean 'x'?"`` with the closest valid name, or ``otherwise``.
    """
    import difflib
    import itertools

    # difflib is quadratic; a vocabulary would take seconds.
    texts = (str(text) for text in itertools.islice(known, 2000))
    by_lower = {text.lower(): text for text in texts if len(text) <= LONGEST_NAME}
    near = difflib.get_close_matches(shorten(str(name)).lower(), by_lower, n=1)
    return f"Did you mean {quote(by_lower[near[0]])}?" if near else otherwise


def listing(names: Sequence[object], limit: int = 12) -> str:
    """Quote names for a message; long lists are shortened.

    Args:
        names: The names.
        limit: Maximum number of names.
    """
    shown = ", ".join(quote(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (shown + more) if names else "none"


def require_column(
    columns: Sequence[object],
    key: object,
    remedy: str,
    *,
    of: str = "obs",
) -> None:
    """Raise an error for a name that is no column of a table.

    Args:
        columns: Names of the columns.
        key: The name.
        remedy: Remedy if no column has a similar name.
        of: The table.

    Raises:
        InputError: The column does not exist.
    """
    if key not in columns:
        expected = f"one of its columns: {listing(list(columns))}"
        raise InputError(f"{of} has no column '{key}'", expected, nearest(key, columns, remedy))


def require_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise an error for an option that is none of the known values.

    Args:
        name: Name of the option.
        value: Its value.
        known: The valid values.

    Raises:
        InputError: The value is none of them.
    """
    if value not in known:
        expected = f"one of {', '.join(map(repr, known))}"
        raise InputError(f"{name}={value!r}", expected, nearest(value, known, "Use one of them"))


def require(module: str, extra: str, purpose: str):
    """Import an optional dependency, or raise an error that names its extra.

    Args:
        module: Dotted module name, as in ``import``.
        extra: Extra of this distribution that installs it (``pip install 'cellplm-jax[extra]'``).
        purpose: Its purpose, as a noun phrase that can start a sentence.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The package is there, but something that it needs is not: another message would mislead.
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{purpose} needs the Python package '{module.split('.')[0]}', which is not installed",
            f"an environment with the extra '{extra}'",
            f"Run: pip install 'cellplm-jax[{extra}]'",
        ) from error
