"""The parser of the command: ``argparse`` with one-line errors that suggest the closest valid name."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from cellplm_jax.cli.output import fail
from cellplm_jax.errors import nearest


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` with suggestions.

    Invalid usage exits with status 2 and one message: the error, the closest option or choice, and the help command.
    """

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in ``argparse``; unknown words raise an error here, because the valid options are known."""
        # `error` only receives a message; the words are needed to find the unknown one.
        self._words = list(sys.argv[1:] if args is None else args)
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(map(str, extra))}")
        return parsed, extra

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one message."""
        remedy = self._meant(message)
        fail(self.prog, f"error: {message.rstrip('.')}.{remedy} See {self.prog} --help.")
        self.exit(2)

    def _meant(self, message: str) -> str:
        """Return ``" Did you mean ...?"``, or nothing."""
        choice = re.search(r"invalid choice: '(.*?)' \(", message)
        if choice:
            choices = [
                name
                for action in self._actions
                if action.choices is not None and _names(action) & _named_in(message)
                for name in action.choices
            ]
            remedy = nearest(choice.group(1), choices, "")
            return f" {remedy}" if remedy else ""
        options = [name for action in self._actions for name in action.option_strings]
        for word in self._words:
            option = str(word).partition("=")[0]
            # argparse accepts abbreviated options.
            known = any(name.startswith(option) for name in options)
            if option.startswith("--") and option != "--" and not known:
                remedy = nearest(option, options, "").replace("'", "")
                if remedy:
                    return f" There is no {option}. {remedy}"
        return ""


def _names(action: argparse.Action) -> set[str]:
    """Return the names that ``argparse`` may use for an argument in its messages."""
    names = {*action.option_strings, action.dest}
    return names | ({action.metavar} if isinstance(action.metavar, str) else set())


def _named_in(message: str) -> set[str]:
    """Return the names of the argument in a message of ``argparse``."""
    match = re.match(r"argument ([^:]+):", message)
    if match is None:
        return set()
    return {match.group(1), *match.group(1).split("/")}
