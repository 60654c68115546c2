"""Windows of training cells, and their assignment to rows of a constant shape; see ``data/pipeline.py``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cellplm_jax.config import TrainConfig
from cellplm_jax.data.cell_store import CellStore

BLOCK_CELLS = 256
"""Maximum number of cells per block: the unit of reading and of the permutation of an epoch."""

NONZEROS_MULTIPLE = 128
"""The length of the nonzero axis is a multiple of this."""

_TRIED_ROWS = 256
"""Approximate number of open rows with enough cells left that packing examines per window."""

Run = tuple[int, int]


@dataclass(frozen=True)
class SampleRange:
    """Consecutive stored cells of a sample with one role in a run.

    Attributes:
        sample: Number of the sample in the store.
        start: First cell.
        stop: One past the last cell.
    """

    sample: int
    start: int
    stop: int

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.stop - self.start


class Source:
    """A range of cells to split into windows.

    Positions refer to the sequence of an epoch: permuted blocks, or the rotated curve. If only part of a spatial sample
    is used for training, its curve is open; a window across its ends then has two segments.

    Args:
        store: The data.
        part: The range.
        capacity: Cells per row.
        pieces: Pieces per row.
        segments: Maximum number of samples per row.
    """

    def __init__(
        self,
        store: CellStore,
        part: SampleRange,
        capacity: int,
        pieces: int,
        segments: int,
    ):
        record = store.samples[part.sample]
        self.part = part
        self.cells = part.cells
        self._store = store
        self.density = record.nonzeros / record.cells
        self._pieces = pieces
        self._piece_cells = capacity // pieces
        self.spatial = record.spatial
        # Held-out cells cut the curve open: then its ends are not neighbours.
        self.closed = part.cells == record.cells
        self.turns = self.spatial and (self.closed or (pieces == 1 and segments > 1))
        self.window_segments = 2 if self.turns and not self.closed else 1
        # At least four blocks per window, so that the permutation changes what a window contains.
        target = max(1, min(BLOCK_CELLS, capacity // 4))
        blocks = max(1, -(-self.cells // target))
        self.edges = np.arange(blocks + 1, dtype=np.int64) * self.cells // blocks

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Numbers of cells of a piece with known :attr:`bounds`, int64 [sizes], increasing."""
        # Bounds at 32 sizes instead of all: each costs a pass over the offsets.
        steps = min(32, self._piece_cells)
        return -(-np.arange(1, steps + 1) * self._piece_cells // steps)

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """Upper bounds of the stored counts of that many consecutive cells in any epoch, int64 [sizes]."""
        offsets = self._offsets()
        if self.spatial:
            return np.array([self._longest_run(offsets, int(size)) for size in self.sizes])
        return self._permuted_bounds(offsets)

    def bound(self, cells: int) -> int:
        """Return an upper bound of the stored counts of ``cells`` consecutive cells of a sequence in one piece."""
        return int(self.bounds[np.searchsorted(self.sizes, cells)])

    @functools.cached_property
    def whole(self) -> int:
        """Maximum number of stored counts per piece if all cells are distributed in stored order."""
        if self._pieces == 1 and self.closed:
            return self._store.samples[self.part.sample].nonzeros
        # With pieces, the fullest piece decides, because all have one nonzero axis of the same length.
        offsets = self._offsets()
        share = -(-self.cells // self._pieces)
        cuts = np.minimum(np.arange(self._pieces + 1) * share, self.cells)
        return int(np.diff(offsets[cuts]).max())

    def largest(self, nonzeros: int, spare: float = 0.0) -> int:
        """Return the maximum number of cells of this range per piece; 0 if even a few cells do not fit.

        Args:
            nonzeros: Stored counts of a piece.
            spare: Stored counts per cell to leave for other cells of the piece, if possible.
        """
        rest = (self._piece_cells - self.sizes) * spare
        # First with room for sparse cells in the rest of the row; without it if no window fits.
        for room in (nonzeros - rest, np.full(len(rest), nonzeros)):
            fitting = np.flatnonzero(self.bounds <= room)
            if fitting.size:
                return int(self.sizes[fitting[-1]])
        return 0

    def runs(self, begin: int, cells: int, seed: int, epoch: int) -> list[list[Run]]:
        """Return the cells at positions ``begin`` to ``begin + cells`` of an epoch's sequence.

        Returns:
            For each segment the ranges of stored cells, in sequence order.
        """
        start = self.part.start
        stop = self.part.stop
        # Everything in one window: the order of the cells has no effect on a set, and stored order is one read.
        if begin == 0 and cells == self.cells:
            return [[(start, stop)]]
        # A function of (seed, epoch, sample), so that any process can compute any window of any epoch.
        generator = np.random.default_rng([seed, 4, epoch, self.part.sample])
        if self.spatial:
            # An open curve with room for one segment cannot be rotated: a window across its ends would mix distant
            # cells.
            turn = int(generator.integers(self.cells)) if self.turns else 0
            first = start + (begin + turn) % self.cells
            if first + cells <= stop:
                return [[(first, first + cells)]]
            head = (first, stop)
            tail = (start, start + first + cells - stop)
            # Across the ends of an open curve the cells are no neighbours and must not attend to each other.
            return [[head, tail]] if self.closed else [[head], [tail]]
        order = generator.permutation(len(self.edges) - 1)
        lengths = np.diff(self.edges)[order]
        ends = np.cumsum(lengths)
        ranges, position = [], begin
        while position < begin + cells:
            index = int(np.searchsorted(ends, position, side="right"))
            inside = position - int(ends[index] - lengths[index])
            take = min(int(lengths[index]) - inside, begin + cells - position)
            first = start + int(self.edges[order[index]]) + inside
            ranges.append((first, first + take))
            position += take
        return [ranges]

    def _offsets(self) -> np.ndarray:
        stored = self._store.indptr(self.part.sample)[self.part.start : self.part.stop + 1]
        return stored - stored[0]

    def _longest_run(self, offsets: np.ndarray, size: int) -> int:
        """Return the maximum number of stored counts of ``size`` consecutive cells; a closed curve wraps around."""
        if size >= self.cells:
            return int(offsets[-1])
        most = int((offsets[size:] - offsets[:-size]).max())
        if self.turns:
            # Runs across the start of the curve: the first i cells, and the last size - i.
            around = offsets[1:size] + (offsets[-1] - offsets[-size:-1])
            most = max(most, int(around.max(initial=0)))
        return most

    def _permuted_bounds(self, offsets: np.ndarray) -> np.ndarray:
        """Bound the stored counts of consecutive cells of permuted blocks.

        They are the end of one block, complete blocks, and the beginning of another, or a range inside one block. Each
        part is bounded by the maximum over all blocks.
        """
        edges = self.edges
        lengths = np.diff(edges)
        shortest = int(lengths.min())
        longest = int(lengths.max())
        # The n fullest blocks together: no n blocks of a permutation have more.
        per_block = np.sort(np.diff(offsets[edges]))[::-1]
        fullest = np.concatenate([[0], np.cumsum(per_block)])
        reach = np.arange(longest + 1)
        from_start = offsets[np.minimum(edges[:-1, None] + reach, edges[1:, None])]
        from_start = (from_start - offsets[edges[:-1], None]).max(axis=0)
        to_end = offsets[np.maximum(edges[1:, None] - reach, edges[:-1, None])]
        to_end = (offsets[edges[1:], None] - to_end).max(axis=0)
        # Both ends combined, by number of cells: to_end[i] + from_start[j] for i + j cells.
        ends = np.zeros(2 * longest + 1, np.int64)
        for i in reach:
            np.maximum(
                ends[i : i + longest + 1],
                to_end[i] + from_start,
                out=ends[i : i + longest + 1],
            )
        bounds = []
        for size in map(int, self.sizes):
            if size >= self.cells:
                bounds.append(int(offsets[-1]))
                continue
            # Each possible number of complete blocks, with the fullest ends for the remaining cells.
            number = np.arange(
                max(0, -(-size // longest) - 2), min(size // shortest, len(edges) - 1) + 1
            )
            rest = np.minimum(size - number * shortest, 2 * longest)
            most = int((fullest[number] + ends[rest]).max())
            if size <= longest:
                most = max(most, self._longest_run(offsets, size))
            bounds.append(min(most, int(offsets[-1])))
        # A bound that falls with more cells would break the search in `bound`.
        return np.maximum.accumulate(bounds)


def window_sizes(cells: int, largest: int) -> list[int]:
    """Return the sizes of the windows of a sample with ``cells`` cells and windows of up to ``largest`` cells.

    All windows except the last are full. If the last has less than a quarter of a window, the one before gives some of
    its cells. Full windows waste no space, and the remainder is small enough to share one row.
    """
    if cells <= largest:
        return [cells]
    full, rest = divmod(cells, largest)
    sizes = [largest] * full
    if rest:
        # Tiny windows give poor contexts; the second term keeps the last but one at least as large as the last.
        least = min(-(-largest // 4), (rest + largest) // 2)
        given = max(0, least - rest)
        sizes[-1] -= given
        sizes.append(rest + given)
    return sizes


def deal_runs(runs: Sequence[Run], pieces: int) -> list[list[Run]]:
    """Distribute the cells of a segment evenly over pieces, consecutively; adjacent ranges are joined."""
    share = -(-sum(stop - start for start, stop in runs) // pieces)
    dealt: list[list[Run]] = [[] for _ in range(pieces)]
    piece = filled = 0
    for start, stop in runs:
        while start < stop:
            if filled == share:
                piece, filled = piece + 1, 0
            take = min(stop - start, share - filled)
            dealt[piece].append((start, start + take))
            start = start + take
            filled = filled + take
    for part in dealt:
        # Stored order within a piece, so that adjacent ranges join into one read.
        part.sort()
        joined: list[Run] = []
        for start, stop in part:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        part[:] = joined
    return dealt


@dataclass(frozen=True)
class Window:
    """A window with a fixed position in every epoch.

    Attributes:
        source: Number of its source.
        begin: First position in the sequence of its source.
        cells: Number of cells.
        share: Maximum number of cells per piece.
        nonzeros: Maximum number of stored counts per piece.
        segments: Maximum number of segments.
    """

    source: int
    begin: int
    cells: int
    share: int
    nonzeros: int
    segments: int


def _precompute(sources: Sequence[Source], name: str, threads: int) -> None:
    """Compute a cached property of all sources; the required cell offsets are read by several threads."""
    # cached_property stores its value in the instance, so `vars` lists what is known.
    unknown = [source for source in sources if name not in vars(source)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(operator.attrgetter(name), unknown):
            pass


def _windows(
    sources: Sequence[Source],
    config: TrainConfig,
    nonzeros: int,
    spare: float,
) -> list[Window] | None:
    """Split all sources into windows.

    Returns None if a few cells alone have more than ``nonzeros`` stored counts, the limit per piece; ``spare`` as in
    :meth:`Source.largest`.
    """
    cells = config.data.cells
    pieces = config.mesh.cells
    # Samples that fit into a row need no bounds, which are the expensive part.
    small = [source for source in sources if source.cells <= cells]
    _precompute(small, "whole", config.data.threads)
    whole = {id(source) for source in small if source.whole <= nonzeros}
    _precompute(
        [source for source in sources if id(source) not in whole],
        "bounds",
        config.data.threads,
    )
    windows = []
    for number, source in enumerate(sources):
        if id(source) in whole:
            share = -(-source.cells // pieces)
            windows.append(Window(number, 0, source.cells, share, source.whole, 1))
            continue
        largest = source.largest(nonzeros, spare) * pieces
        if not largest:
            return None
        begin = 0
        for size in window_sizes(source.cells, largest):
            share = -(-size // pieces)
            most = source.bound(share)
            segments = source.window_segments
            windows.append(Window(number, begin, size, share, most, segments))
            begin += size
    return windows


def pack_windows(
    windows: Sequence[Window],
    cells: int,
    nonzeros: int,
    segments: int,
) -> list[list[int]]:
    """Pack windows into rows, largest first, each into the row that it fills best.

    Returns the window numbers of each row. ``cells`` and ``nonzeros`` are limits per piece, ``segments`` per row.
    """
    # Windows are large in one of two dimensions; the scarcer one decides the order (best-fit decreasing).
    size = [max(w.share / cells, w.nonzeros / max(nonzeros, 1)) for w in windows]
    order = sorted(range(len(windows)), key=lambda i: (-size[i], i))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # nonzeros and segments left in each row
    by_cells: list[list[int]] = [[] for _ in range(cells + 1)]  # open rows by cells left
    occupied = 0  # bit c: by_cells[c] is not empty
    for index in order:
        window = windows[index]
        chosen, left, tried = -1, cells, 0
        # Rows with at least that many cells left, as bits; the lowest bit is the tightest fit.
        candidates = occupied >> window.share << window.share
        while candidates and chosen < 0 and tried < _TRIED_ROWS:
            lowest = candidates & -candidates
            at = lowest.bit_length() - 1
            for row in by_cells[at][-_TRIED_ROWS:]:
                tried += 1
                if room[row][0] >= window.nonzeros and room[row][1] >= window.segments:
                    chosen, left = row, at
                    by_cells[at].remove(row)
                    if not by_cells[at]:
                        occupied ^= lowest
                    break
            candidates ^= lowest
        if chosen < 0:
            chosen = len(rows)
            rows.append([])
            room.append((nonzeros, segments))
        rows[chosen].append(index)
        room[chosen] = (room[chosen][0] - window.nonzeros, room[chosen][1] - window.segments)
        left -= window.share
        if left and room[chosen][1]:
            by_cells[left].append(chosen)
            occupied |= 1 << left
    return rows


@dataclass(frozen=True)
class Packing:
    """Windows in rows, with a nonzero axis that is long enough in every epoch."""

    windows: list[Window]
    rows: list[list[int]]
    nonzeros: int


def _sparse_density(sources: Sequence[Source]) -> float:
    """Return the number of stored counts per cell at the lower quartile over samples, weighted by cells."""
    density = np.array([source.density for source in sources])
    order = np.argsort(density)
    share = np.cumsum([sources[i].cells for i in order])
    return float(density[order[np.searchsorted(share, share[-1] / 4)]])


def plan_packing(sources: Sequence[Source], config: TrainConfig) -> Packing:
    """Choose the length of the nonzero axis, then split and pack.

    All rows have the same length. It is the shortest with which an epoch has a maximum of 2 % more rows than without a
    limit: dense samples get smaller windows and share rows with sparse ones, so that other rows need less padding.
    """
    cells = config.data.cells // config.mesh.cells
    segments = config.data.segments
    sparse = _sparse_density(sources)

    def attempt(nonzeros: int) -> Packing | None:
        windows = _windows(sources, config, nonzeros, sparse)
        if windows is None:
            return None
        rows = pack_windows(windows, cells, nonzeros, segments)
        return Packing(windows, rows, nonzeros)

    free = attempt(np.iinfo(np.int64).max)
    if free is None:  # everything fits without a limit
        msg = "an unlimited row did not hold a window"
        raise RuntimeError(msg)

    def rounded(nonzeros: int) -> int:
        return max(1, -(-nonzeros // NONZEROS_MULTIPLE)) * NONZEROS_MULTIPLE

    number = len(free.rows)
    # 2 % more rows, rounded up; with fewer than ten rows a further one would cost more than 10 %.
    allowed = -(-number * 51 // 50) if number >= 10 else number
    # Bisection between the mean row and the fullest one.
    highest = rounded(max(sum(free.windows[i].nonzeros for i in row) for row in free.rows))
    lowest = rounded(sum(window.nonzeros for window in free.windows) // number)
    best = Packing(free.windows, free.rows, highest)
    # Each attempt packs everything; 1 % of padding is not worth another.
    while highest - lowest > max(NONZEROS_MULTIPLE, highest // 100):
        middle = rounded((lowest + highest) // 2)
        packing = attempt(middle)
        if packing is not None and len(packing.rows) <= allowed:
            best, highest = packing, middle
        else:
            lowest = middle
    return best
