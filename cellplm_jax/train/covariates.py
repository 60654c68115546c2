"""Rows of covariate embeddings: their numbers follow the data, and new samples of a corpus get new rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax.config import TrainConfig
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.errors import InputError

_ROWS = (("batch", "batches"), ("dataset", "datasets"), ("platform", "platforms"))


def with_covariates(
    config: TrainConfig,
    store: CellStore,
    old: TrainConfig | None = None,
) -> TrainConfig:
    """Set the numbers of covariate rows of the decoder from the data; larger configured sizes are kept.

    Args:
        config: The run.
        store: Its data.
        old: The existing configuration of the run, if any.

    Raises:
        InputError: The data and the configuration have different numbers of genes.
    """
    if len(store.genes) != config.model.genes:
        raise InputError(
            f"the vocabulary of the data has {len(store.genes)} genes, model.genes is {config.model.genes}",
            "the same number",
            "Set model.genes to the size of the vocabulary",
        )
    sizes = {}
    for name, rows in _ROWS:
        highest = max((getattr(sample, name) for sample in store.samples), default=-1)
        # Rows never become fewer: a checkpoint with more of them could not be restored.
        before = 0 if old is None else getattr(old.model.decoder, rows)
        sizes[rows] = max(getattr(config.model.decoder, rows), highest + 1, before)
    return with_rows(config, sizes)


def with_rows(config: TrainConfig, sizes: Mapping[str, int]) -> TrainConfig:
    """Return the configuration with given numbers of covariate rows.

    Args:
        config: The run.
        sizes: ``batches``, ``datasets`` and ``platforms``.
    """
    decoder = dataclasses.replace(config.model.decoder, **sizes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))


def rows_of(config: TrainConfig) -> dict[str, int]:
    """Return the numbers of covariate rows: ``batches``, ``datasets``, ``platforms``."""
    return {rows: getattr(config.model.decoder, rows) for _, rows in _ROWS}


_COVARIATE = re.compile(r"(batch|dataset|platform)_(\d+|embedding)|discriminator")


def grow_rows(tree: Any, shapes: Any, *, new: str = "mean") -> Any:
    """Add rows to covariate embeddings for samples that were added later.

    Args:
        tree: Parameters, or optimizer moments of the same paths, stored with fewer batches, datasets or platforms.
        shapes: The same tree with the target shapes.
        new: Initial value of new rows: ``"mean"`` of the old ones, which the model uses for an unknown batch,
            or ``"zero"``.

    Returns:
        The tree, with more covariate rows if ``shapes`` has more, otherwise unchanged.
    """

    def grown(path: tuple, leaf: Any, wanted: Any) -> Any:
        names = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        old = np.shape(leaf)
        shape = np.shape(wanted)
        if old == shape or len(old) != len(shape) or not _COVARIATE.search(names):
            return leaf
        axes = [axis for axis in range(len(old)) if old[axis] != shape[axis]]
        if len(axes) != 1 or shape[axes[0]] < old[axes[0]]:
            return leaf
        (axis,) = axes
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        # Times 0 instead of zeros: the result keeps type, device and sharding.
        row = leaf.mean(axis=axis, keepdims=True) * (1 if new == "mean" else 0)
        return numpy.concatenate([leaf, row.repeat(shape[axis] - old[axis], axis=axis)], axis=axis)

    return jax.tree_util.tree_map_with_path(grown, tree, shapes)
