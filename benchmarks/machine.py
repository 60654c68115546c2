"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata


def processor() -> str:
    """Return the name of this machine's processor, as ``cellplm bench`` has it."""
    # Imported here: programs of other methods' environments ask for versions alone.
    from cellplm_jax.tasks.bench import processor as name

    return name()


def machine() -> str:
    """Return the processor, its cores and the memory, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GiB"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
