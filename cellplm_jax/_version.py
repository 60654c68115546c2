"""The version of the package and its public address, for modules below it."""

__version__ = "0.1.0"

ADDRESS = ""
"""Public repository, such as "github.com/NAME/cellplm-jax"; "" until there is one. Written by tools/set_address.py."""
