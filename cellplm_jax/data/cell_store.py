"""The interface through which training reads cells, from memory or from a corpus.

A store lists its tissue samples and reads ranges of consecutive cells. The order of the cells of a sample is chosen
when the store is created (:func:`storage_order`), so that consecutive cells form a useful training window: random cells
of a dissociated sample, a neighbourhood of a spatial one. Reads are therefore always contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

LARGEST_STORED_COUNT = 65_535
"""Maximum of a stored count (uint16); writers clip larger ones, and count and report them."""


@dataclass(frozen=True)
class SampleRecord:
    """One row of the sample table.

    Attributes:
        name: Name of the sample; unique within its dataset.
        dataset_name: Name of its dataset, normally the stem of a file.
        platform_name: Name of the platform; "" if unknown.
        cells: Number of cells.
        nonzeros: Number of stored counts.
        spatial: Whether its cells have coordinates.
        batch: Row of the batch embedding: the position of the sample in the store.
        dataset: Row of the dataset embedding; -1: unknown.
        platform: Row of the platform embedding; -1: unknown.
    """

    name: str
    dataset_name: str
    platform_name: str
    cells: int
    nonzeros: int
    spatial: bool
    batch: int
    dataset: int = -1
    platform: int = -1


@dataclass(frozen=True)
class CellRun:
    """Consecutive cells of one sample.

    Attributes:
        indptr: int64 [cells + 1], from 0.
        gene: uint16 (uint32 with more than 65,536 genes) [nonzeros]. Index into the vocabulary, increasing per cell.
        count: uint16 [nonzeros].
        coordinates: float32 [cells, 2] scaled to [0, 1] over the COMPLETE sample; NaN for cells without coordinates;
            None: not a spatial sample.
        labels: int32 [cells], index into the store's ``label_names``, -1 for none; None: the store has no labels.
    """

    indptr: np.ndarray
    gene: np.ndarray
    count: np.ndarray
    coordinates: np.ndarray | None = None
    labels: np.ndarray | None = None

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1


@runtime_checkable
class CellStore(Protocol):
    """Tissue samples for training; reads are thread-safe.

    Attributes:
        genes: Vocabulary, Ensembl ids.
        samples: The sample table; the position in it is the sample's number everywhere.
        label_names: Names of the labels in ``CellRun.labels``; empty if cells have none.
    """

    genes: list[str]
    label_names: list[str]

    @property
    def samples(self) -> Sequence[SampleRecord]:
        """The sample table."""
        ...

    def indptr(self, sample: int) -> np.ndarray:
        """Return int64 [cells + 1]: offsets of each cell's stored counts, from 0 at the sample's first cell."""
        ...

    def read(self, sample: int, start: int, stop: int) -> CellRun:
        """Read cells ``start`` to ``stop`` (exclusive) of one sample."""
        ...

    def measured(self, sample: int) -> np.ndarray | None:
        """Return bool [genes], the genes measured in the sample; None: all."""
        ...

    def fingerprint(self) -> str:
        """Return a short hash of vocabulary and sample table: equal hashes mean the same data in the same order."""
        ...


def moore_curve(coordinates: np.ndarray, order: int = 10) -> np.ndarray:
    """Return each point's position along a Moore curve (a closed Hilbert curve) over the unit square.

    Points close to each other on the curve are close in the plane, and the curve is closed, so a range that wraps
    around is a neighbourhood too.

    Args:
        coordinates: float [cells, 2] in [0, 1].
        order: The square is divided into ``2^order`` by ``2^order`` positions.

    Returns:
        int64 [cells].
    """
    side = 1 << order
    half = side // 2
    x, y = np.clip(
        (np.asarray(coordinates, np.float64) * side).astype(np.int64),
        0,
        side - 1,
    ).T
    # Four Hilbert curves, rotated so that each begins at the end of the last one: up the left half, down the right one.
    left = x < half
    upper = y >= half
    quadrant = np.where(
        left,
        np.where(upper, 1, 0),
        np.where(upper, 2, 3),
    )
    u, v = x % half, y % half
    # A Hilbert curve runs from (0, 0) to (half - 1, 0); on the left it must run upwards along the inner edge, on the
    # right downwards along it.
    along = np.where(left, v, half - 1 - v)
    across = np.where(left, half - 1 - u, u)
    return quadrant.astype(np.int64) * half * half + _hilbert(along, across, half)


def _hilbert(x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Return the distance along the Hilbert curve from (0, 0) to (side - 1, 0)."""
    x, y = x.copy(), y.copy()
    distance = np.zeros(x.shape, np.int64)
    step = side // 2
    while step > 0:
        right = (x & step) > 0
        top = (y & step) > 0
        distance += step * step * ((3 * right) ^ top)
        # Rotate the quarter so that its own curve starts at its origin.
        flip = ~top & right
        x = np.where(flip, side - 1 - x, x)
        y = np.where(flip, side - 1 - y, y)
        x, y = np.where(~top, y, x), np.where(~top, x, y)
        step //= 2
    return distance


def storage_order(
    cells: int,
    coordinates: np.ndarray | None,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return the order in which the cells of a sample are stored.

    Args:
        cells: Number of cells.
        coordinates: float [cells, 2] scaled to [0, 1], NaN for cells without coordinates; None: dissociated cells.
        generator: Random generator for the order of dissociated cells.

    Returns:
        int64 [cells], a permutation: random without coordinates; along a Moore curve with them, cells without
        coordinates last, in random order.
    """
    order = generator.permutation(cells)
    if coordinates is None:
        return order
    present = np.isfinite(coordinates).all(axis=1)
    place = np.full(cells, np.iinfo(np.int64).max)
    place[present] = moore_curve(coordinates[present])
    # Cells without coordinates have the largest place: they come last, in random order.
    return order[np.argsort(place[order], kind="stable")]
