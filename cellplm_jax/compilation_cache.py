"""Persistent cache of compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

VARIABLE = "CELLPLM_CACHE"
"""Environment variable with the cache directory, or ``off``."""

LARGEST = 2 * 2**30
"""Maximum size of the cache in bytes; the least recently used programs are removed first."""


def cache_directory() -> Path | None:
    """Return the cache directory: ``$CELLPLM_CACHE``, or a folder in the user's cache folder; None: disabled."""
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
    """Enable the persistent compilation cache, so that later processes start without compiling.

    A cache that is already configured (``JAX_COMPILATION_CACHE_DIR``, ``jax.config``) is kept. If the directory
    is not writable, the cache is disabled. Called when models are loaded and by the estimators.

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
        _remove_incomplete(directory)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Keep the user's settings.
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # JAX compiled something before this call and decided that there is no cache; reset this.
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    return directory


def _remove_incomplete(directory: Path) -> None:
    """Remove programs whose writer was killed, or found the disk full.

    JAX writes ``KEY-cache`` and then ``KEY-atime``. It keeps half a program for ever, warns about it in every process,
    and stores nothing more after it.
    """
    import filelock

    def incomplete() -> set[str]:
        names = set(os.listdir(directory))
        programs = {name.removesuffix("-cache") for name in names if name.endswith("-cache")}
        return {name for name in programs if f"{name}-atime" not in names}

    if not incomplete():
        return
    # The lock of JAX: another process may be between the two files.
    with (
        contextlib.suppress(filelock.Timeout),
        filelock.FileLock(directory / ".lockfile", timeout=1),
    ):
        for name in incomplete():
            (directory / f"{name}-cache").unlink(missing_ok=True)


def _machine() -> str:
    """Return a short name of the processor, because compiled programs may not run on another one with the same home."""
    facts = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts += "".join(
            sorted({line for line in lines if line.startswith(("flags", "model name"))})
        )
    except OSError:
        pass
    return hashlib.sha256(facts.encode()).hexdigest()[:8]
