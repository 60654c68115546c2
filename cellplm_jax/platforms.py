"""Checks of the devices requested with ``JAX_PLATFORMS``, and the settings of a GPU."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax

from cellplm_jax.errors import InputError, explain

GPU_NAMES = ("cuda", "gpu")
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


def check_platforms() -> None:
    """Check that JAX finds a device of the platforms in ``JAX_PLATFORMS``; starts JAX's backends if it is set.

    Raises:
        InputError: JAX finds none; the message gives the reason and a remedy.
    """
    wanted = jax.config.jax_platforms
    if not wanted or wanted == "cpu":
        return
    try:
        jax.devices()
    # JAX 0.10 fails with an assertion, later calls with an index, other backends with a RuntimeError.
    except (RuntimeError, AssertionError, IndexError) as error:
        raise InputError(no_device(wanted, error)) from error


def no_device(wanted: str | None, error: Exception) -> str:
    """Return the error message if JAX finds no device of a platform.

    Args:
        wanted: Value of ``JAX_PLATFORMS``.
        error: The exception that JAX raised.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    remedy = "Unset JAX_PLATFORMS, or set JAX_PLATFORMS=cpu"
    if wanted and set(wanted.split(",")) & set(GPU_NAMES):
        if not has_nvidia():
            reason = "this machine has no NVIDIA GPU, or its driver is not loaded"
        elif not has_cuda_plugin():
            reason = "JAX is installed without CUDA"
            remedy = "Run: pip install 'cellplm-jax[cuda13]', or set JAX_PLATFORMS=cpu"
    return explain(
        f"JAX_PLATFORMS={wanted or ''} and no such device ({reason})",
        "a platform of which this machine has a device",
        remedy,
    )


def has_nvidia() -> bool:
    """Return whether this machine has an NVIDIA GPU with a driver."""
    # Starting CUDA to find out would take seconds, or fail.
    gpus = Path("/proc/driver/nvidia/gpus")
    return (gpus.is_dir() and any(gpus.iterdir())) or shutil.which("nvidia-smi") is not None


def has_cuda_plugin() -> bool:
    """Return whether JAX's CUDA plugin is installed in the version of jaxlib."""
    # A plugin of another version is installed but not loaded.
    wanted = importlib.metadata.version("jaxlib")
    for name in CUDA_PLUGINS:
        try:
            if importlib.metadata.version(name) == wanted:
                return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def product_precision() -> str:
    """Return how a GPU multiplies float32 matrices under the current settings, in words."""
    chosen = jax.config.jax_default_matmul_precision
    if chosen in ("highest", "float32", "F32_F32_F32"):
        return f"float32 (jax_default_matmul_precision={chosen})"
    text = "TF32 on an Ampere GPU or later, 10 bits of mantissa"
    return f"{text} (jax_default_matmul_precision={chosen or 'default'})"


def allocator() -> str:
    """Return how JAX allocates GPU memory under the current environment, in words."""
    kind = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default")
    if kind == "platform":
        return (
            "allocates and frees every array by itself, slow (XLA_PYTHON_CLIENT_ALLOCATOR=platform)"
        )
    fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0"):
        return (
            f"grows as needed, up to {fraction} of the memory (XLA_PYTHON_CLIENT_PREALLOCATE=false)"
        )
    return f"takes {fraction} of the memory at the start (XLA_PYTHON_CLIENT_MEM_FRACTION)"


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None without a driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match.group(1) if match else None


def gpu_facts(devices: list[Any]) -> list[tuple[str, str, str]]:
    """Describe the GPUs of this process: (name, text, state), state ``"good"`` or ``"poor"``.

    Args:
        devices: From ``jax.local_devices()``.
    """
    facts = []
    for device in devices:
        memory = device.memory_stats() or {}
        limit = memory.get("bytes_limit")
        used = memory.get("bytes_in_use", 0)
        capability = getattr(device, "compute_capability", None)
        text = device.device_kind + (f", compute capability {capability}" if capability else "")
        if limit:
            text += f", {(limit - used) / 1e9:.1f} of {limit / 1e9:.1f} GB for arrays free"
        facts.append((f"GPU {device.id}", text, "good"))
    facts.append(("precision", f"float32 products: {product_precision()}", "good"))
    facts.append(("allocator", allocator(), "good"))
    level = jax.config.jax_optimization_level
    text = f"jax_optimization_level={level}"
    if level == "UNKNOWN":
        text += "; JAX_OPTIMIZATION_LEVEL=O1 overlaps communication between GPUs with arithmetic"
    facts.append(("compiler", text, "good"))
    version = driver_version()
    cuda = re.search(r"cuda (\d+)", getattr(devices[0].client, "platform_version", ""), re.I)
    found = f"cuda {int(cuda.group(1)) // 1000}.{int(cuda.group(1)) % 1000 // 10}" if cuda else ""
    facts.append(
        (
            "driver",
            ", ".join(filter(None, (version, found))) or "version not found",
            "good" if version else "poor",
        )
    )
    return facts
