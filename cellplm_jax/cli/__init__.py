"""The ``cellplm`` command.

Exit status: 0 done; 2 bad usage or bad input, one message on standard error and no traceback; 3 ``plan`` found that the
run does not fit; 1 anything else. Parsing and help import nothing but the standard library: a verb loads what it needs
when it runs.
"""

from cellplm_jax.cli.command import build_parser, main

__all__ = ["build_parser", "main"]
