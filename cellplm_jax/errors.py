"""Errors a user of the library can meet.

Every message says three things in this order: what was found, what was expected, and what to do about it. The errors
build it from these three with :func:`explain`, so the form is the same everywhere. The command line turns a
:class:`CellPLMError` into exit status 2 and one message without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class CellPLMError(Exception):
    """Base class of every error this package raises on purpose.

    Args:
        found: What the library met, with the offending name or number in it; the whole message without ``expected``.
        expected: What it needs instead.
        remedy: What the user can do, as an instruction; "": nothing more is to be said.
    """

    def __init__(self, found: str, expected: str | None = None, remedy: str = ""):
        # One argument, the message, so that an error that comes from another process is the same.
        super().__init__(found if expected is None else explain(found, expected, remedy))


class InputError(CellPLMError, ValueError):
    """The data a caller passed cannot be used as it is (counts, genes, keys, files)."""


class ConfigError(CellPLMError, ValueError):
    """A configuration has an unknown key, a value of the wrong type, or an impossible combination."""


class CheckpointError(CellPLMError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the configuration beside it."""


class MissingDependencyError(CellPLMError, ImportError):
    """An optional dependency is needed for what was asked; the message names the extra to install."""


def explain(found: str, expected: str, remedy: str = "") -> str:
    """Return the one message form of this package.

    Args:
        found: What the library met, with the offending name or number in it.
        expected: What it needs instead.
        remedy: What the user can do, as an instruction; "": nothing more is to be said.

    Returns:
        ``"<found>; expected <expected>. <remedy>"`` with the sentence punctuation normalised.
    """
    text = f"{found.rstrip('.;')}; expected {expected.rstrip('.')}."
    if not remedy:
        return text
    remedy = remedy.rstrip(".")
    return f"{text} {remedy}{'' if remedy.endswith('?') else '.'}"


def nearest(name: object, known: Iterable[object], otherwise: str) -> str:
    """Return the remedy where a name is not one of those that are known.

    Args:
        name: What was given; case does not matter.
        known: The names there are.
        otherwise: The remedy where none of them is near.

    Returns:
        ``"Did you mean 'x'?"`` with the nearest known name, or ``otherwise``.
    """
    import difflib

    by_lower = {str(text).lower(): str(text) for text in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"Did you mean '{by_lower[near[0]]}'?" if near else otherwise


def require(module: str, extra: str, purpose: str):
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: Dotted module name, as given to ``import``.
        extra: Extra of this distribution that installs it (``pip install 'cellplm-jax[extra]'``).
        purpose: What it is needed for, as a noun phrase that can start a sentence.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{purpose} needs the Python package '{module.split('.')[0]}', which is not installed",
            f"an environment with the extra '{extra}'",
            f"Run: pip install 'cellplm-jax[{extra}]'",
        ) from error
