"""Packed rows made by hand, independent of the input pipeline."""

from __future__ import annotations

import numpy as np

from cellplm_jax.batch import CellBatch
from tests.conftest import make_counts


def packed_batch(
    sizes: list[list[int]],
    *,
    cells: int,
    genes: int,
    segments: int = 4,
    pieces: int = 1,
    seed: int = 0,
    accumulate: int | None = None,
    nonzeros: int = 2048,
) -> CellBatch:
    """Pack samples of the given sizes into rows; each sample measures its own genes.

    Args:
        sizes: Cells of each sample, a list a row (of all accumulated batches, one after another).
        cells: Places of a row.
        genes: Size of the vocabulary.
        segments: Samples a row may hold.
        pieces: Pieces of a row; every sample is dealt evenly to them.
        seed: Seed of counts and panels.
        accumulate: Give the fields a leading axis of so many batches.
        nonzeros: Stored counts a piece can hold.
    """
    random = np.random.default_rng(seed)
    rows, per_piece = len(sizes), cells // pieces
    indptr = np.zeros((rows * pieces, per_piece + 1), np.int32)
    gene = np.zeros((rows * pieces, nonzeros), np.uint16)
    count = np.zeros((rows * pieces, nonzeros), np.uint16)
    cell_mask = np.zeros((rows, cells), bool)
    segment = np.zeros((rows, cells), np.int32)
    measured = np.ones((rows, segments, genes), bool)
    coordinates = np.zeros((rows, cells, 2), np.float32)
    has_coordinates = np.zeros((rows, cells), bool)
    batch = np.full((rows, cells), -1, np.int32)
    number = 0
    for row, samples in enumerate(sizes):
        filled = [0] * pieces
        stored = [0] * pieces
        for place, size in enumerate(samples):
            panel = random.random(genes) < 0.8
            measured[row, place] = panel
            counts = make_counts(size, genes=genes, seed=seed + number) * panel
            share = -(-size // pieces)
            for piece in range(pieces):
                part = counts[piece * share : (piece + 1) * share]
                folded, begin = row * pieces + piece, filled[piece]
                at = slice(piece * per_piece + begin, piece * per_piece + begin + len(part))
                cell_mask[row, at] = True
                segment[row, at] = place
                batch[row, at] = number % 3
                if place % 2:
                    has_coordinates[row, at] = True
                    coordinates[row, at] = random.random((len(part), 2))
                for values in part:
                    column = np.flatnonzero(values)
                    start = stored[piece]
                    gene[folded, start : start + len(column)] = column
                    count[folded, start : start + len(column)] = values[column]
                    stored[piece] += len(column)
                    filled[piece] += 1
                    indptr[folded, filled[piece]] = stored[piece]
            number += 1
        for piece in range(pieces):
            indptr[row * pieces + piece, filled[piece] + 1 :] = stored[piece]
    fields = {
        "indptr": indptr,
        "gene": gene,
        "count": count,
        "cell_mask": cell_mask,
        "segment": segment,
        "measured": measured,
        "coordinates": coordinates,
        "has_coordinates": has_coordinates,
        "batch": batch,
        "dataset": np.where(batch < 0, -1, 0).astype(np.int32),
        "platform": np.full((rows, cells), -1, np.int32),
    }
    if pieces > 1:
        for name in ("indptr", "gene", "count"):
            fields[name] = fields[name].reshape(rows, pieces, -1)
    if accumulate is not None:
        fields = {
            name: values.reshape(accumulate, -1, *values.shape[1:])
            for name, values in fields.items()
        }
    return CellBatch(**fields)  # type: ignore[arg-type]
