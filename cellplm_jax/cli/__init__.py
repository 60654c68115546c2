"""The ``cellplm`` command.

Exit status: 0 success; 2 invalid usage or input, with one message on standard error and no traceback; 3 the run in
``plan`` does not fit; 130 Ctrl-C; 143 SIGTERM; 1 any other error. Parsing and help import only the standard library:
commands import their dependencies when they run.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    from cellplm_jax.cli import command

    return command.build_parser()


def _log_plainly() -> None:
    """Write remarks of the package to standard error as they are, whatever its dependencies configure."""
    logger = logging.getLogger("cellplm_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process, which signals then end at once, with
            partial outputs removed.

    Returns:
        Exit status.
    """
    with contextlib.ExitStack() as stack:
        if argv is None and threading.current_thread() is threading.main_thread():
            # Before any other import: Ctrl-C may come during the imports.
            from cellplm_jax.cli.signals import end_on_signals

            stack.enter_context(end_on_signals((sys.argv[1:2] or [""])[0]))
            _log_plainly()
        from cellplm_jax.cli import command

        return command.main(argv)
