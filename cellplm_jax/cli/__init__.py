"""The ``cellplm`` command.

Exit status: 0 success; 2 invalid usage or input, with one message on standard error and no traceback; 3 the run in
``plan`` does not fit; 1 any other error. Parsing and help import only the standard library: commands import their
dependencies when they run.
"""

from cellplm_jax.cli.command import build_parser, main

__all__ = ["build_parser", "main"]
