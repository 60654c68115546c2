"""Where this program keeps what it need not make twice: compiled programs."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

VARIABLE = "CELLPLM_CACHE"
"""Environment variable that names another directory, or is ``off``."""

LARGEST = 2 * 2**30
"""Bytes of compiled programs that are kept; the least recently used go first."""


def cache_directory() -> Path | None:
    """Return where things are kept: ``$CELLPLM_CACHE``, or a folder of the user's cache folder; None: nowhere."""
    named = os.environ.get(VARIABLE, "")
    if named.lower() == "off":
        return None
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cellplm_jax"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "cellplm_jax" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cellplm_jax"


def keep_compiled() -> Path | None:
    """Keep compiled programs on disk, so that the next process starts without compiling them.

    A cache that was chosen before (``JAX_COMPILATION_CACHE_DIR``, ``jax.config``) stays as it is. Where the directory
    cannot be written nothing is kept. Called by what opens models and by the estimators.

    Returns:
        The directory in use, or None.
    """
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    try:
        directory = cache_directory()
        if directory is None:
            return None
        directory = directory / f"compiled-{_machine()}"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Only what the user has not set.
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Something compiled before this call, and with it JAX decided that there is no cache.
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    return directory


def _machine() -> str:
    """Return a short name of the processor: programs compiled for one may not run on another with the same home."""
    facts = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts += "".join(
            sorted({line for line in lines if line.startswith(("flags", "model name"))})
        )
    except OSError:
        pass
    return hashlib.sha256(facts.encode()).hexdigest()[:8]
