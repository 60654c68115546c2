"""Weights as one safetensors file; the only module that uses safetensors.

The exchange format of models: a header with names and shapes, followed by the numbers; no executable content. The
header also contains the training step and a checksum.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped

from cellplm_jax.errors import CheckpointError, require
from cellplm_jax.storage import is_remote

EXTRA = "hub"


def write_tensors(path: Path, arrays: Mapping[str, Any], *, step: int) -> None:
    """Write named arrays to one file.

    Args:
        path: The file, in a new folder.
        arrays: The arrays by name.
        step: Training step of the arrays.

    Raises:
        MissingDependencyError: safetensors is not installed.
    """
    library = require("safetensors.numpy", EXTRA, "Writing weights as safetensors")
    # safetensors writes memory without strides, so views and transposed arrays are copied first.
    # np.ascontiguousarray would make a scalar an array of one dimension.
    plain = {name: np.array(array, order="C") for name, array in arrays.items()}
    about = {"format": "cellplm-jax", "step": str(step), "sha256": _checksum(plain)}
    library.save_file(plain, path, metadata=about)


def read_tensors(path: epath.Path) -> tuple[dict[str, Shaped[np.ndarray, "*any"]], int]:
    """Read a file of :func:`write_tensors`, or another file in this format.

    Args:
        path: The file, local or at a ``gs://`` address.

    Returns:
        The arrays by name, and the step; 0 if the file has none.

    Raises:
        CheckpointError: The file is damaged.
        MissingDependencyError: safetensors is not installed.
    """
    library = require("safetensors", EXTRA, "Reading weights from safetensors")
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = path
            if is_remote(path):
                # safetensors maps a local file.
                local = path.copy(Path(folder) / path.name)
            with library.safe_open(os.fspath(local), framework="numpy") as opened:
                about = opened.metadata() or {}
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if "sha256" in about and about["sha256"] != _checksum(arrays):
            msg = "its checksum does not match its header"
            raise ValueError(msg)
        return arrays, int(about.get("step", 0))
    except (library.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        said = str(error).splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"'{path}' cannot be read ({said[0][:200]})",
            "a complete safetensors file",
            "Copy or download it again",
        ) from error


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the numbers, in the order of their names."""
    digest = hashlib.sha256()
    # The order of a file is not that of the dictionary that was written.
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
