"""Application of a fitted head or decoder to latents, in chunks of cells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cellplm_jax.batch import CellBatch, Reconstruction
from cellplm_jax.data.batches import bucket
from cellplm_jax.tasks.pretrained import Pretrained

HEAD_CELLS = 4096
"""Cells per application of a head; decoders, which return one number per gene, use an eighth of that."""


def apply_head(model: Pretrained, z: np.ndarray, condition: np.ndarray | None) -> np.ndarray:
    """Apply the task head of a model to latents, each cell separately.

    Args:
        model: The fitted model.
        z: float32 [cells, latent].
        condition: float32 [cells, condition].

    Returns:
        float32 [cells, outputs].
    """
    parts = []
    for piece in _pieces(len(z), HEAD_CELLS):
        # The last piece is padded to one of few sizes, which are compiled once.
        rows = bucket(piece.stop - piece.start)
        mask = np.arange(rows)[None] < piece.stop - piece.start
        given = None if condition is None else _padded(condition[piece], rows)
        out = model.predict(model.output_params, _padded(z[piece], rows), mask, given)
        parts.append(np.asarray(out)[0, : piece.stop - piece.start])
    return np.concatenate(parts) if parts else np.zeros((0, model.config.head.outputs))


def decoded(
    model: Pretrained,
    z: np.ndarray,
    rows_of: np.ndarray,
) -> Iterator[tuple[slice, Reconstruction]]:
    """Decode latents in chunks of cells, without an array of all cells by genes.

    Args:
        model: The fitted model.
        z: float32 [cells, latent].
        rows_of: int32 [cells], rows of the batches; -1: the mean of all rows.

    Yields:
        The cells, and their reconstruction: unscaled means [cells, genes].
    """
    for piece in _pieces(len(z), HEAD_CELLS // 8):
        count = piece.stop - piece.start
        rows = bucket(count)
        # -1, also for padding: the mean of all rows.
        index = np.full((1, rows), -1, np.int32)
        index[0, :count] = rows_of[piece]
        given = CellBatch(
            indptr=np.zeros((1, rows + 1), np.int32),  # type: ignore[arg-type]
            gene=np.zeros((1, 1), np.int32),  # type: ignore[arg-type]
            count=np.zeros((1, 1), np.float32),  # type: ignore[arg-type]
            cell_mask=np.arange(rows)[None] < count,  # type: ignore[arg-type]
            batch=index,  # type: ignore[arg-type]
        )
        out = model.decode(model.output_params, _padded(z[piece], rows), given)
        yield (
            piece,
            Reconstruction(
                mean=np.asarray(out.mean)[0, :count],  # type: ignore[arg-type]
                dispersion=out.dispersion,
                zero_logits=None if out.zero_logits is None else out.zero_logits[0, :count],
            ),
        )


def _pieces(cells: int, size: int) -> Iterator[slice]:
    for start in range(0, cells, size):
        yield slice(start, min(start + size, cells))


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
    """Return [1, rows, ...], padded with zeros."""
    padded = np.zeros((1, rows, *values.shape[1:]), np.float32)
    padded[0, : len(values)] = values
    return padded
