"""Errors raised by this package.

Every message states three things in this order: what was found, what was expected, and the remedy. The errors build
the text from these with :func:`explain`. The command line converts a :class:`CellPLMError` to exit status 2 and one
message without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class CellPLMError(Exception):
    """Base class of all errors that this package raises deliberately.

    Args:
        found: The invalid input, with its name or number; the complete message without ``expected``.
        expected: The valid input.
        remedy: Instruction for the user; "": none.
    """

    def __init__(self, found: str, expected: str | None = None, remedy: str = ""):
        # One argument, the message, so that an error from another process is identical.
        super().__init__(found if expected is None else explain(found, expected, remedy))


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
        ``"<found>; expected <expected>. <remedy>"`` with the sentence punctuation normalised.
    """
    text = f"{found.rstrip('.;')}; expected {expected.rstrip('.')}."
    if not remedy:
        return text
    remedy = remedy.rstrip(".")
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

    by_lower = {str(text).lower(): str(text) for text in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"Did you mean '{by_lower[near[0]]}'?" if near else otherwise


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
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{purpose} needs the Python package '{module.split('.')[0]}', which is not installed",
            f"an environment with the extra '{extra}'",
            f"Run: pip install 'cellplm-jax[{extra}]'",
        ) from error
