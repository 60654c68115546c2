"""Recipes of the estimators: their named arguments, and common settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import jax

from cellplm_jax.config import FinetuneConfig, MaskingConfig

DECODER_RECIPE = FinetuneConfig(
    embedder_rate=1.0,
    dispersion_rate=30.0,
    weight_decay=1e-6,
    embedder_weight_decay=1e-6,
    masking=MaskingConfig(cell_fraction=0.75, gene_fraction=0.25, drop_cells=0.0),
)
"""Common settings of tasks with a count decoder: as published for imputation, except for the dispersions."""


class Recipe(TypedDict, total=False):
    """Named arguments of every estimator: the fields of :class:`cellplm_jax.config.FinetuneConfig`.

    Editors complete from this class; ``help`` and notebooks from :attr:`Estimator.__signature__`, with the defaults of
    the task.
    """

    epochs: int
    patience: int
    learning_rate: float
    embedder_rate: float
    dispersion_rate: float
    layer_decay: float
    weight_decay: float
    embedder_weight_decay: float
    warmup_epochs: int
    plateau_factor: float
    plateau_patience: int
    clip_norm: float
    average: float
    freeze: Literal["none", "embedder", "encoder"]
    adapter_rank: int
    adapter_scale: float
    validation_fraction: float
    cells_per_step: int
    cells_per_context: int
    masking: MaskingConfig | dict[str, Any]
    seed: int


class Training(Recipe, total=False):
    """The same, with the precision and the devices of a fit."""

    precision: str | None
    devices: Sequence[jax.Device] | None
