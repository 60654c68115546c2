"""The version of the package, for modules below it."""

__version__ = "0.1.0"
