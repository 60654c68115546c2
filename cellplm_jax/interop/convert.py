"""Conversion between published checkpoints and checkpoint directories, used by ``cellplm convert``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from cellplm_jax.interop.torch_checkpoint import (
    as_published,
    read_published,
    write_published,
)
from cellplm_jax.train.checkpoint import ModelFiles, has_item, read_root, restore_item, save_model


def from_published(
    checkpoint: str | os.PathLike,
    config: str | os.PathLike,
    out: str | os.PathLike,
) -> list[str]:
    """Convert a published checkpoint to a directory for :func:`cellplm_jax.load`.

    Args:
        checkpoint: ``PREFIX.best.ckpt``.
        config: ``PREFIX.config.json``.
        out: A new or empty directory.

    Returns:
        A report, one item per line: converted parameters, and every unused parameter with the reason.

    Raises:
        CheckpointError: The files cannot be read or not converted exactly, or ``out`` is not empty.
    """
    converted = read_published(checkpoint, config)
    name = Path(checkpoint).name.removesuffix(".ckpt").removesuffix(".best")
    card = {
        "name": name,
        "kind": "converted",
        "data": "the published CellPLM checkpoint; see the original's repository for its training data",
        "unused_parameters": converted.unused_reasons(),
    }
    save_model(
        out,
        ModelFiles(converted.config, converted.genes, card, published=converted.published_config),
        converted.params,
        unused=converted.unused,
    )
    leaves = jax.tree.leaves(converted.params)
    lines = [
        f"converted {sum(leaf.size for leaf in leaves):,} parameters in {len(leaves)} arrays, "
        f"{len(converted.genes):,} genes"
    ]
    lines += [
        f"unused: {torch} {tuple(converted.unused[torch].shape)} - {reason}"
        for torch, reason in converted.unused_reasons().items()
    ]
    return [*lines, f"wrote {os.fspath(out)}"]


def to_published(directory: str | os.PathLike, prefix: str | os.PathLike) -> tuple[Path, Path]:
    """Write a checkpoint directory in the published format.

    Args:
        directory: A converted model, or a model trained here that the original can express.
        prefix: Path without ``.best.ckpt`` and ``.config.json``.

    Returns:
        The two files.

    Raises:
        CheckpointError: The original cannot express the model; the message gives the reason.
    """
    files = read_root(directory)
    params, _ = restore_item(directory)
    unused: dict[str, Any] = {}
    if has_item(directory, "unused"):
        unused, _ = restore_item(directory, item="unused")
    converted = as_published(
        files.model,
        files.genes,
        params,
        unused=unused,
        published=files.published,
    )
    return write_published(converted, prefix)
