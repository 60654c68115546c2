"""Positional encodings of cells with 2-D coordinates, and the shared vector of cells without coordinates.

Paper section 4.2; formulas of the released code: ``CellPLM/utils/pe.py`` (implemented but disabled there,
``CellPLM/embedder/omics.py:92``). Coordinates are scaled to [0, 1] per tissue sample.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from cellplm_jax.batch import Array
from cellplm_jax.config import ModelConfig
from cellplm_jax.model.layers import dense, prelu


def grid_square(coordinates: Float[Array, "*batch 2"], grid: int) -> Int32[Array, "*batch 2"]:
    """Return the grid square of coordinates in [0, 1], of ``grid`` squares along each axis.

    The margin of one percent is that of the released code.
    """
    square = jnp.floor((coordinates * 1.02 - 0.01) * grid).astype(jnp.int32)
    return jnp.clip(square, 0, grid - 1)


def sinusoidal_encoding(
    coordinates: Float[Array, "*batch 2"],
    width: int,
    grid: int,
) -> Float32[Array, "*batch {width}"]:
    """Return the fixed 2-D sinusoidal encoding.

    The first half of the dimensions encodes the second coordinate, the second half the first one; within each half,
    even dimensions are sines and odd ones cosines of ``square * 10000^(-2i / (width / 2))``.

    Args:
        coordinates: Between 0 and 1.
        width: Dimensions of the encoding, a multiple of 4.
        grid: Number of squares along each axis to which coordinates are rounded.
    """
    half = width // 2
    frequency = jnp.exp(jnp.arange(0.0, half, 2) * -(math.log(10000.0) / half))
    angle = grid_square(coordinates, grid).astype(jnp.float32)[..., None] * frequency
    wave = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    wave = wave.reshape(*angle.shape[:-1], half)
    return jnp.concatenate([wave[..., 1, :], wave[..., 0, :]], axis=-1)


class Positions(nn.Module):
    """Positional encoding added to the weighted sum of gene embeddings.

    Attributes:
        config: The model's configuration.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        cell_mask: Bool[Array, "samples cells"],
        coordinates: Float[Array, "samples cells 2"] | None,
        has_coordinates: Bool[Array, "samples cells"] | None,
        eigenvectors: Float[Array, "samples cells eigenvectors"] | None,
        *,
        train: bool,
    ) -> Float[Array, "samples cells hidden"]:
        """Encode the position of each cell.

        Args:
            cell_mask: True for cells, False for padding.
            coordinates: Between 0 and 1; None: no cell has any.
            has_coordinates: None: all cells have them if ``coordinates`` is given.
            eigenvectors: Used by kind ``"laplacian"`` instead of coordinates.
            train: Whether to flip the (arbitrary) signs of the eigenvectors at random, once per sample.
        """
        config = self.config.positions
        hidden = self.config.hidden
        missing = self.param("missing", nn.initializers.normal(1e-2), (hidden,))
        source = eigenvectors if config.kind == "laplacian" else coordinates
        absent = source is None
        if absent:
            width = config.eigenvectors if config.kind == "laplacian" else 2
            source = jnp.zeros((*cell_mask.shape, width), jnp.float32)
        if config.kind == "sinusoidal":
            encoded = sinusoidal_encoding(source, hidden, config.grid)
        elif config.kind == "grid":
            table = self.param(
                "table",
                nn.initializers.normal(1.0),
                (config.grid * config.grid, hidden),
            )
            square = grid_square(source, config.grid)
            # Row-major; the order is part of the parameters.
            encoded = table[square[..., 0] * config.grid + square[..., 1]]
        else:
            # The sign of an eigenvector is arbitrary: random signs in training, one per sample and vector.
            if config.kind == "laplacian" and train:
                signs = jax.random.rademacher(
                    self.make_rng("dropout"),
                    (source.shape[0], 1, source.shape[2]),
                    source.dtype,
                )
                source = source * signs
            encoded = prelu("prelu")(dense(hidden, "linear")(source))
        if absent:
            return jnp.broadcast_to(missing, encoded.shape)
        if has_coordinates is None:
            return encoded
        return jnp.where(has_coordinates[..., None], encoded, missing)
