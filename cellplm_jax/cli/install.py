"""Commands about the installation: ``doctor`` and ``completion``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from cellplm_jax.cli.options import add_output, command
from cellplm_jax.cli.output import print_result, say, styled

SHELLS = ("bash", "zsh", "tcsh")
"""Shells with completion scripts."""

_FILES = (
    "IN.h5ad",
    "REF.h5ad",
    "FILE",
    "GENES",
    "JSON",
    "CKPT|DIR",
    "MODEL|CORPUS",
    "CORPUS|IN.h5ad",
    "MODEL",
    "M",
    "OUT.h5ad",
    "OUT.csv",
    "FILE.html",
    "PNG",
    "PREFIX",
    "FILE[:VARIANT]",
    "NAME|FILE",
)
_FOLDERS = ("DIR", "CORPUS")
"""Metavars of files and folders, for which the shell completes names."""


def add_doctor(commands: Any) -> None:
    """Add ``doctor``."""
    parser = command(
        commands,
        "doctor",
        _doctor,
        "check this installation and machine: versions, devices, memory, caches, and expected bottlenecks",
        "cellplm doctor\n  cellplm doctor --json | jq .slow\n"
        "\nexit status: 0 usable; 1 a required component is broken",
    )
    add_output(parser)


def _doctor(arguments: argparse.Namespace) -> int:
    from cellplm_jax.doctor import diagnose

    facts = diagnose()
    print_result(arguments, list(_doctor_lines(facts)), facts)
    return 0 if facts["usable"] else 1


def _doctor_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the facts of :func:`cellplm_jax.doctor.diagnose` as text lines."""
    marks = {"good": ("ok", "green"), "poor": ("note", "yellow"), "bad": ("BAD", "red")}
    for section in facts["sections"]:
        yield styled(section["title"], "bold")
        for entry in section["entries"]:
            word, style = marks[entry["state"]]
            yield f"  {styled(f'{word:<5}', style)}{entry['name']:<18} {entry['text']}"
            if entry.get("remedy"):
                yield f"  {'':<5}{'':<18} {entry['remedy']}"
    if facts["slow"]:
        yield styled("What will be slow, and why", "bold")
        yield from (f"  - {line}" for line in facts["slow"])
    if facts["usable"]:
        yield "Usable."
    else:
        yield styled("Not usable: " + "; ".join(facts["broken"]) + ".", "red")


def add_completion(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Add ``completion``, for all verbs of a parser."""
    parser = command(
        commands,
        "completion",
        partial(_completion, whole),
        "print a shell script that completes commands, options and file names",
        "cellplm completion bash > ~/.local/share/bash-completion/completions/cellplm\n"
        "  cellplm completion zsh > ~/.zfunc/_cellplm      # with fpath+=~/.zfunc before compinit in ~/.zshrc",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def _completion(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    import shtab

    for subparser in _parsers(parser):
        for action in subparser._actions:
            if action.choices is None and action.metavar in (*_FILES, *_FOLDERS):
                action.complete = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    say(shtab.complete(parser, shell=arguments.shell).rstrip("\n"))


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)
