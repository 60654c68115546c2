"""``{command-help}``: the reference of the ``cellplm`` command, generated from its parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cellplm_jax.cli import build_parser

WIDTH = 72


def commands_of(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command with its parser; subcommands follow their command.

    Args:
        parser: Parser of the complete command, or of a command with subcommands.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command.prog, command
                yield from commands_of(command)


def _usage(parser: argparse.ArgumentParser) -> str:
    """Return the usage line, with a fixed width."""
    formatter = argparse.HelpFormatter(parser.prog, max_help_position=24, width=WIDTH)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return formatter.format_help().strip()


def _names(action: argparse.Action) -> str:
    """Return how an argument is written, such as ``--out DIR``."""
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest
    )
    shown = " ".join(value) if isinstance(value, tuple) else str(value)
    if not action.option_strings:
        return shown
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {shown}"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of an argument with its values filled in."""
    text = action.help or ""
    facts = {**vars(action), "prog": parser.prog}
    return re.sub(r"%\((\w+)\)s", lambda match: str(facts.get(match[1], "")), text).replace(
        "%%", "%"
    )


class CommandHelp(SphinxDirective):
    """One section per command: summary, usage, arguments, examples."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        parser = build_parser()
        return [self._section(command, found) for command, found in commands_of(parser)]

    def _section(self, command: str, parser: argparse.ArgumentParser) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(command)], names=[command])
        section += nodes.title("", "", nodes.literal("", command))
        if parser.description:
            section += nodes.paragraph("", parser.description)
        section += self._block(_usage(parser))
        for group in parser._action_groups:
            # Subcommands have their own sections.
            actions = [
                action
                for action in group._group_actions
                if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
                and action.help != argparse.SUPPRESS
            ]
            if not actions:
                continue
            if group.title not in ("positional arguments", "options"):
                section += nodes.rubric("", str(group.title))
                if group.description:
                    section += nodes.paragraph("", group.description)
            section += nodes.definition_list("", *(self._entry(parser, one) for one in actions))
        if parser.epilog:
            section += self._block(parser.epilog.strip())
        return section

    def _entry(
        self, parser: argparse.ArgumentParser, action: argparse.Action
    ) -> nodes.definition_list_item:
        term = nodes.term("", "", nodes.literal("", _names(action)))
        return nodes.definition_list_item(
            "", term, nodes.definition("", nodes.paragraph("", _help(parser, action)))
        )

    def _block(self, text: str) -> nodes.literal_block:
        return nodes.literal_block(text, text, language="text")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
