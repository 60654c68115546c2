"""From a store of samples to padded batches: windows, packing, order, and the threads that read ahead.

Everything is a function of (seed, step). The layout - which windows there are, how large, and which share a row - is
fixed when a run starts, from bounds that hold in every epoch, so a run has one shape and compiles once. What varies
from epoch to epoch is which cells a window of a large sample holds, and the order of the rows.

A large sample is divided into blocks of about 256 cells that lie together in the store; a window is a set of blocks. In
each epoch the blocks of a dissociated sample are dealt to its windows at random, and those of a spatial one are taken
along its curve from a random start, so a window is a neighbourhood. Reading stays contiguous either way.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cellplm_jax.config import DataConfig, TrainConfig
from cellplm_jax.data.batches import laplacian_eigenvectors
from cellplm_jax.data.store import CellStore
from cellplm_jax.errors import InputError, explain, require
from cellplm_jax.structs import CellBatch

BLOCK_CELLS = 256
"""Cells of a block at most: long enough to be read at full speed, short enough to be shuffled."""

DENSE_SHARE = 0.95
"""A piece holds what this share of the cells needs, filled to the brim; denser samples get smaller windows."""

SPARE_NONZEROS = 1.1
"""How much more than the mean of that sample's density a piece holds: blocks differ."""

CANDIDATES = 64
"""How many part-filled rows are tried for a window before a new row is opened."""

HELDOUT_WINDOWS = 32
"""Windows that a run is scored on at most."""


@dataclass(frozen=True)
class SampleRange:
    """Consecutive stored cells of one sample that play one part in a run.

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


def split_heldout(
    store: CellStore, config: DataConfig, seed: int
) -> tuple[list[SampleRange], list[SampleRange]]:
    """Split samples into training and held-out ones.

    A sample's part is decided by a hash of the seed and of its names, so it keeps it when samples are added.

    Args:
        store: The data.
        config: ``heldout_fraction`` and ``minimum_cells``; smaller samples are left out of both.
        seed: Seed of the run.

    Returns:
        Training and held-out cells. With at least ``1 / heldout_fraction`` samples, whole samples are held out (at
        least one); with fewer, the last stored cells of each, so that there is always something to be judged by: random
        ones of a dissociated sample, a region of a spatial one.

    Raises:
        InputError: No sample has ``minimum_cells`` cells.
    """
    usable = [i for i, sample in enumerate(store.samples) if sample.cells >= config.minimum_cells]
    if not usable:
        msg = explain(
            f"none of {len(store.samples)} samples has {config.minimum_cells} cells",
            "at least one",
            "Lower data.minimum_cells or give more data",
        )
        raise InputError(msg)
    whole = {i: SampleRange(i, 0, store.samples[i].cells) for i in usable}
    fraction = config.heldout_fraction
    if fraction == 0:
        return list(whole.values()), []
    if len(usable) > 1 and len(usable) * fraction > 1 - 1e-9:
        draws = {
            i: _draw(seed, store.samples[i].dataset_name, store.samples[i].name) for i in usable
        }
        order = sorted(usable, key=draws.__getitem__)
        number = sum(draw < fraction for draw in draws.values())
        held = set(order[: min(max(number, 1), len(usable) - 1)])
        return (
            [whole[i] for i in usable if i not in held],
            [whole[i] for i in usable if i in held],
        )
    train, heldout = [], []
    for i in usable:
        cells = store.samples[i].cells
        cut = min(round(cells * fraction), cells - 1)
        train.append(SampleRange(i, 0, cells - cut))
        if cut:
            heldout.append(SampleRange(i, cells - cut, cells))
    return train, heldout


def _draw(seed: int, *names: str) -> float:
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


@dataclass(frozen=True)
class _Window:
    """A set of blocks of one range that go into a row together.

    Attributes:
        part: Number of the range.
        first: Its first place among the blocks of the range, in the order of the epoch.
        blocks: How many blocks it has.
        cells: Cells in each piece of a row, at most.
        nonzeros: Stored counts in each piece, at most.
    """

    part: int
    first: int
    blocks: int
    cells: int
    nonzeros: int


class _Layout:
    """The windows of some ranges and the rows they are packed into: sizes that hold in every epoch.

    Args:
        store: The data.
        ranges: Cells to lay out.
        config: The run.
    """

    def __init__(self, store: CellStore, ranges: Sequence[SampleRange], config: TrainConfig):
        self.store, self.ranges, self.config = store, list(ranges), config
        self.pieces = config.mesh.cells
        self.piece_cells = config.data.cells // self.pieces
        self.edges: list[np.ndarray] = []
        stored = [np.diff(store.indptr(r.sample)[r.start : r.stop + 1]) for r in self.ranges]
        capacity = self._capacity(stored)
        self.windows = [
            window
            for number, counts in enumerate(stored)
            for window in self._windows(number, counts, capacity)
        ]
        self.rows = self._pack(self.windows, capacity)
        most = max(sum(self.windows[w].nonzeros for w in row) for row in self.rows)
        # Rounded up, so that nearly equal runs share a compiled program.
        self.nonzeros = -(-max(most, 1) // 1024) * 1024

    def _capacity(self, stored: Sequence[np.ndarray]) -> int:
        """Choose how many stored counts a piece may hold: enough for most cells, and for any one."""
        cells = np.array([len(counts) for counts in stored])
        density = np.array([counts.mean() for counts in stored])
        order = np.argsort(density)
        share = np.cumsum(cells[order]) / cells.sum()
        usual = density[order][np.searchsorted(share, DENSE_SHARE).clip(0, len(order) - 1)]
        largest = max(int(counts.max()) for counts in stored)
        return max(int(self.piece_cells * usual * SPARE_NONZEROS), largest, 1)

    def _windows(self, number: int, counts: np.ndarray, capacity: int) -> Iterator[_Window]:
        """Cut one range into windows, and note the edges of its blocks."""
        cells = len(counts)
        total = np.concatenate([[0], np.cumsum(counts)])
        share = -(-cells // self.pieces)
        if share <= self.piece_cells:
            cuts = np.minimum(np.arange(self.pieces + 1) * share, cells)
            exact = int(np.diff(total[cuts]).max())
            if exact <= capacity:
                self.edges.append(np.array([0, cells]))
                yield _Window(number, 0, 1, share, exact)
                return
        densest = np.concatenate([[0], np.cumsum(np.sort(counts)[::-1])])
        limit = min(BLOCK_CELLS, self.config.data.cells)
        while True:
            blocks = -(-cells // limit)
            edges = np.linspace(0, cells, blocks + 1).round().astype(np.int64)
            size = int(np.diff(edges).max())
            block_counts = np.diff(total[edges])
            heaviest = np.concatenate([[0], np.cumsum(np.sort(block_counts)[::-1])])
            smallest = max(int(np.diff(edges).min()), 1)

            def bound(number_of_blocks, size=size, heaviest=heaviest, smallest=smallest):
                """Return the cells and counts of a piece of so many blocks, at most."""
                share = -(-number_of_blocks * size // self.pieces)
                if self.pieces == 1:
                    touched = number_of_blocks
                else:
                    # A piece of the window may begin and end inside a block.
                    touched = min(number_of_blocks, share // smallest + 2)
                by_cells = densest[min(share, len(densest) - 1)]
                return share, int(min(heaviest[min(touched, len(heaviest) - 1)], by_cells))

            fits = 0
            while fits < blocks:
                share, most = bound(fits + 1)
                if share > self.piece_cells or most > capacity:
                    break
                fits += 1
            if fits or limit == 1:
                break
            limit = max(1, limit // 2)
        self.edges.append(edges)
        for first in range(0, blocks, max(fits, 1)):
            here = min(max(fits, 1), blocks - first)
            yield _Window(number, first, here, *bound(here))

    def _pack(self, windows: Sequence[_Window], capacity: int) -> list[list[int]]:
        """Pack windows into rows: the largest first, each into the fullest row that has room for it."""
        rows: list[list[int]] = []
        spare: list[int] = []
        # Rows that may still take something, by free cells.
        open_rows: list[tuple[int, int]] = []
        order = sorted(range(len(windows)), key=lambda i: (-windows[i].cells, i))
        for i in order:
            window = windows[i]
            at = bisect.bisect_left(open_rows, (window.cells, -1))
            for place in range(at, min(at + CANDIDATES, len(open_rows))):
                free, row = open_rows[place]
                if spare[row] >= window.nonzeros:
                    del open_rows[place]
                    break
            else:
                free, row = self.piece_cells, len(rows)
                rows.append([])
                spare.append(capacity)
            rows[row].append(i)
            spare[row] -= window.nonzeros
            free -= window.cells
            if free > 0 and len(rows[row]) < self.config.data.segments:
                bisect.insort(open_rows, (free, row))
        return rows

    @lru_cache(maxsize=4096)  # noqa: B019 - a layout lives as long as its run
    def order(self, part: int, epoch: int) -> np.ndarray:
        """Return the order of a range's blocks in an epoch."""
        blocks = len(self.edges[part]) - 1
        where = self.ranges[part]
        generator = np.random.default_rng([self.config.seed, 3, epoch, where.sample, where.start])
        if self.store.samples[where.sample].spatial:
            return np.roll(np.arange(blocks), -int(generator.integers(blocks)))
        return generator.permutation(blocks)

    def runs(self, window: _Window, epoch: int) -> list[tuple[int, int]]:
        """Return the stored cells of a window in an epoch, as (start, stop) in the sample, neighbours joined."""
        chosen = self.order(window.part, epoch)[window.first : window.first + window.blocks]
        edges, begin = self.edges[window.part], self.ranges[window.part].start
        runs: list[tuple[int, int]] = []
        for block in np.sort(chosen):
            start, stop = begin + int(edges[block]), begin + int(edges[block + 1])
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        return runs

    @lru_cache(maxsize=256)  # noqa: B019
    def eigenvectors(self, sample: int) -> np.ndarray:
        """Return float32 [cells, eigenvectors] of a sample, computed when first needed."""
        number = self.config.model.positions.eigenvectors
        cells = self.store.samples[sample].cells
        vectors = np.zeros((cells, number), np.float32)
        coordinates = self.store.read(sample, 0, cells).coordinates
        if coordinates is not None:
            present = np.isfinite(coordinates).all(axis=1)
            vectors[present] = laplacian_eigenvectors(coordinates[present], number)
        return vectors

    def empty(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the fields of a batch of ``shape`` rows with nothing in them."""
        data, genes = self.config.data, len(self.store.genes)
        cells, piece = (*shape, data.cells), (*shape, self.pieces)
        index = np.uint16 if genes <= 65_536 else np.uint32
        fields = {
            "indptr": np.zeros((*piece, self.piece_cells + 1), np.int32),
            "gene": np.zeros((*piece, self.nonzeros), index),
            "count": np.zeros((*piece, self.nonzeros), np.uint16),
            "cell_mask": np.zeros(cells, bool),
            "segment": np.zeros(cells, np.int32),
            "coordinates": np.zeros((*cells, 2), np.float32),
            "has_coordinates": np.zeros(cells, bool),
            "measured": np.ones((*shape, data.segments, genes), bool),
            "batch": np.full(cells, -1, np.int32),
            "dataset": np.full(cells, -1, np.int32),
            "platform": np.full(cells, -1, np.int32),
            "labels": np.full(cells, -1, np.int32),
            "sample": np.full(cells, -1, np.int32),
        }
        positions = self.config.model.positions
        if positions.kind == "laplacian":
            fields["eigenvectors"] = np.zeros((*cells, positions.eigenvectors), np.float32)
        return fields

    def fill(
        self, row: int, epoch: int, fields: dict[str, np.ndarray], at: tuple[int, ...]
    ) -> None:
        """Read the cells of a row into place ``at`` of a batch's fields."""
        filled, stored = [0] * self.pieces, [0] * self.pieces
        indptr, gene, count = fields["indptr"][at], fields["gene"][at], fields["count"][at]
        for segment, number in enumerate(self.rows[row]):
            window = self.windows[number]
            sample = self.ranges[window.part].sample
            record = self.store.samples[sample]
            measured = self.store.measured(sample)
            if measured is not None:
                fields["measured"][at][segment] = measured
            runs = self.runs(window, epoch)
            share = -(-sum(stop - start for start, stop in runs) // self.pieces)
            done = 0
            for start, stop in runs:
                run = self.store.read(sample, start, stop)
                begin = 0
                while begin < run.cells:
                    piece, inside = divmod(done, share)
                    end = min(run.cells, begin + share - inside)
                    cells, low, high = end - begin, int(run.indptr[begin]), int(run.indptr[end])
                    first, offset = filled[piece], stored[piece]
                    indptr[piece, first + 1 : first + cells + 1] = (
                        run.indptr[begin + 1 : end + 1] - low + offset
                    )
                    gene[piece, offset : offset + high - low] = run.gene[low:high]
                    count[piece, offset : offset + high - low] = run.count[low:high]
                    place = piece * self.piece_cells + first
                    here = (*at, slice(place, place + cells))
                    fields["cell_mask"][here] = True
                    fields["segment"][here] = segment
                    fields["batch"][here] = record.batch
                    fields["dataset"][here] = record.dataset
                    fields["platform"][here] = record.platform
                    fields["sample"][here] = sample
                    if run.labels is not None:
                        fields["labels"][here] = run.labels[begin:end]
                    if run.coordinates is not None:
                        present = np.isfinite(run.coordinates[begin:end]).all(axis=1)
                        fields["has_coordinates"][here] = present
                        fields["coordinates"][here] = np.where(
                            present[:, None], run.coordinates[begin:end], 0.0
                        )
                        if "eigenvectors" in fields:
                            fields["eigenvectors"][here] = self.eigenvectors(sample)[
                                start + begin : start + end
                            ]
                    filled[piece] += cells
                    stored[piece] += high - low
                    done += cells
                    begin = end
        for piece in range(self.pieces):
            indptr[piece, filled[piece] + 1 :] = stored[piece]

    def batch(self, fields: dict[str, np.ndarray]) -> CellBatch:
        """Return the fields as a batch: without an axis of pieces where there is one, of segments likewise."""
        fields = {k: v for k, v in fields.items() if k not in ("labels", "sample")}
        if self.pieces == 1:
            for name in ("indptr", "gene", "count"):
                fields[name] = fields[name].reshape(*fields[name].shape[:-2], -1)
        if self.config.data.segments == 1:
            del fields["segment"]
        return CellBatch(**fields)  # type: ignore[arg-type]


class TrainingBatches:
    """Random access to the batches of a run, and an iterator that reads them ahead.

    Args:
        store: The data.
        ranges: Training cells, from :func:`split_heldout`.
        config: The run.

    Attributes:
        rows_per_epoch: Rows that hold every training cell once.
        steps_per_epoch: Steps an epoch takes, rounded up.
        nonzeros: Stored counts a piece of a row can hold; exceeded by none in any epoch.
        padding: Share of the places for cells that stay empty.
    """

    def __init__(self, store: CellStore, ranges: Sequence[SampleRange], config: TrainConfig):
        if not ranges:
            msg = explain(
                "there is no training sample left",
                f"one with at least {config.data.minimum_cells} cells",
                "Lower data.minimum_cells or data.heldout_fraction, or give more data",
            )
            raise InputError(msg)
        self._grain: Any = require("grain", "train", "Pretraining")
        self._layout = _Layout(store, ranges, config)
        self._config = config
        self.rows_per_epoch = len(self._layout.rows)
        self.steps_per_epoch = -(-self.rows_per_epoch // (config.accumulate * config.data.rows))
        self.nonzeros = self._layout.nonzeros
        cells = sum(r.cells for r in ranges)
        self.padding = 1.0 - cells / (self.rows_per_epoch * config.data.cells)
        # Position n of the run: some row, every row once an epoch, in an order of the epoch's own.
        rows = self._grain.MapDataset.range(self.rows_per_epoch)
        self._order = rows.seed(config.seed).shuffle().repeat()

    def _row(self, position: int) -> tuple[int, int]:
        """Return the row at a position of the run, and its epoch."""
        return int(self._order[position]), position // self.rows_per_epoch

    def describe(self, step: int) -> list[list[tuple[int, int, int]]]:
        """Return what each row of a step holds: (sample, start, stop) of every run of stored cells in it.

        Args:
            step: Steps taken before it.

        Returns:
            One list a row, all accumulated batches one after another.
        """
        layout, described = self._layout, []
        number = self._config.accumulate * self._config.data.rows
        for position in range(step * number, (step + 1) * number):
            row, epoch = self._row(position)
            described.append(
                [
                    (layout.ranges[layout.windows[w].part].sample, *run)
                    for w in layout.rows[row]
                    for run in layout.runs(layout.windows[w], epoch)
                ]
            )
        return described

    def batch(self, step: int, first: int = 0, rows: int | None = None) -> CellBatch:
        """Return a step's batch, or some rows of it, as numpy arrays.

        Args:
            step: Steps taken before it.
            first: First row of each accumulated batch.
            rows: How many rows; None: all from ``first`` on.

        Returns:
            A batch whose fields are [accumulated, rows, ...].
        """
        accumulate, whole = self._config.accumulate, self._config.data.rows
        rows = whole - first if rows is None else rows
        fields = self._layout.empty((accumulate, rows))
        for number in range(accumulate):
            for row in range(rows):
                position = (step * accumulate + number) * whole + first + row
                self._layout.fill(*self._row(position), fields, (number, row))
        return self._layout.batch(fields)

    def iterate(
        self, start_step: int, stop_step: int, first: int = 0, rows: int | None = None
    ) -> Iterator[CellBatch]:
        """Yield the batches of steps ``start_step`` to ``stop_step``, read ahead by threads.

        Args:
            start_step: Steps taken before the first batch.
            stop_step: Steps taken after the last one.
            first: First row of each accumulated batch that this process needs.
            rows: How many rows it needs; None: all from ``first`` on.
        """
        if start_step >= stop_step:
            return
        data = self._config.data
        steps = self._grain.MapDataset.range(start_step, stop_step)
        options = self._grain.ReadOptions(
            num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads)
        )
        made = steps.map(lambda step: self.batch(int(step), first, rows))
        yield from made.to_iter_dataset(options)


def heldout_batches(
    store: CellStore,
    ranges: Sequence[SampleRange],
    config: TrainConfig,
    maximum: int = HELDOUT_WINDOWS,
) -> list[tuple[CellBatch, np.ndarray | None, np.ndarray]]:
    """Return fixed batches for evaluation: the same windows every time, packed like training rows.

    Args:
        store: The data.
        ranges: Held-out cells.
        config: The run.
        maximum: Windows at most, spread over the ranges: the first of each before the second of any.

    Returns:
        For each batch its cells [samples, ...] (rows past the last are empty), int32 [samples, cells] labels (-1: none)
        or None where the store has none, and int32 [samples, cells] sample numbers (-1: padding).
    """
    if not ranges:
        return []
    layout = _Layout(store, ranges, config)
    by_part: dict[int, list[_Window]] = {}
    for window in layout.windows:
        by_part.setdefault(window.part, []).append(window)
    rounds = max(map(len, by_part.values()))
    turns = [w[turn] for turn in range(rounds) for w in by_part.values() if turn < len(w)]
    if len(by_part) > maximum:
        picked = np.linspace(0, len(by_part) - 1, maximum).round().astype(int)
        turns = [turns[i] for i in picked]
    layout.windows = turns[:maximum]
    layout.rows = layout._pack(layout.windows, layout.nonzeros)
    number, batches = config.data.rows, []
    for begin in range(0, len(layout.rows), number):
        fields = layout.empty((number,))
        for place, row in enumerate(range(begin, min(begin + number, len(layout.rows)))):
            layout.fill(row, 0, fields, (place,))
        labels = fields["labels"] if store.label_names else None
        batches.append((layout.batch(fields), labels, fields["sample"]))
    return batches


def gene_means(
    store: CellStore, ranges: Sequence[SampleRange], maximum_cells: int = 100_000
) -> np.ndarray:
    """Return float32 [genes]: the mean count of each gene over training cells that measure it.

    Args:
        store: The data.
        ranges: Training cells.
        maximum_cells: About so many cells are read, a share of each range.
    """
    genes, cells = len(store.genes), sum(r.cells for r in ranges)
    share = min(1.0, maximum_cells / max(cells, 1))
    total, seen = np.zeros(genes), np.zeros(genes)
    for where in ranges:
        number = max(1, int(where.cells * share))
        for start in range(where.start, where.start + number, 4096):
            run = store.read(where.sample, start, min(start + 4096, where.start + number))
            total += np.bincount(run.gene, weights=run.count, minlength=genes)
            measured = store.measured(where.sample)
            seen += run.cells * (1.0 if measured is None else measured)
    return (total / np.maximum(seen, 1.0)).astype(np.float32)
