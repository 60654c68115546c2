"""Training and held-out batches: held-out split, packing of rows, and reading by several processes.

A row is one context of the model. Samples larger than a row are split into windows; smaller ones are packed several
per row, where each attends only within itself. The assignment of windows to rows depends only on sizes and is computed
once, before the first step; the cells of a window change with every epoch:

- the cells of a large dissociated sample are stored in blocks of about 256; an epoch permutes the blocks and splits the
  sequence into new windows,
- those of a large spatial sample are stored along a closed curve; an epoch rotates it and splits it, so that a window
  is a spatial neighbourhood.

A window therefore has the same number of cells in every epoch, an upper bound on its stored counts
(``data/packing.py``), and requires a few contiguous reads. Shapes are constant during a run, and every training cell
appears exactly once per epoch. All random choices are functions of (seed, step): a run resumes at any step, on any
number of processes, and each process reads its own rows only.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import DataConfig, TrainConfig
from cellplm_jax.data.batches import laplacian_eigenvectors
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.packing import (
    BLOCK_CELLS,
    NONZEROS_MULTIPLE,
    Run,
    SampleRange,
    Source,
    Window,
    deal_runs,
    pack_windows,
    plan_packing,
    window_sizes,
)
from cellplm_jax.errors import InputError, require

HELDOUT_WINDOWS = 32
"""Maximum number of held-out windows."""


def split_heldout(
    store: CellStore,
    config: DataConfig,
    seed: int,
) -> tuple[list[SampleRange], list[SampleRange]]:
    """Split the cells of a store into training and held-out cells.

    With at least ``1 / heldout_fraction`` samples, complete samples are held out. A hash of the seed and the sample
    name decides for each sample, so adding samples never moves a training sample to the held-out set. With fewer
    samples, the last stored cells of every sample are held out: random cells, or a spatial neighbourhood if it has
    coordinates.

    Args:
        store: The data.
        config: ``heldout_fraction``, and ``minimum_cells``: samples with fewer cells are excluded from both.
        seed: Seed of the choice.

    Returns:
        Training and held-out ranges, in the order of the store. Every usable sample has a training range, and
        a held-out range if the fraction allows.

    Raises:
        InputError: No sample has ``minimum_cells`` cells.
    """
    usable = [
        number
        for number, record in enumerate(store.samples)
        if record.cells >= config.minimum_cells
    ]
    if not usable:
        raise InputError(
            f"none of {len(store.samples)} samples has {config.minimum_cells} cells",
            "at least one",
            "Lower data.minimum_cells or give more data",
        )
    whole = {number: SampleRange(number, 0, store.samples[number].cells) for number in usable}
    fraction = config.heldout_fraction
    if fraction == 0:
        return list(whole.values()), []
    # Enough samples for at least one complete one; the tolerance is for the rounding of the product.
    if len(usable) > 1 and len(usable) * fraction > 1 - 1e-9:
        chances = _chances(store, seed)
        held = {number for number in usable if chances[number] < fraction}
        if not held:
            # By chance none or all can be below the fraction; then the extreme one decides, so the rule stays
            # deterministic.
            held = {min(usable, key=chances.__getitem__)}
        if len(held) == len(usable):
            held.remove(max(usable, key=chances.__getitem__))
        train = [part for number, part in whole.items() if number not in held]
        return train, [whole[number] for number in sorted(held)]
    train, heldout = [], []
    for number in usable:
        cells = store.samples[number].cells
        # The training part must stay usable by itself.
        cut = min(round(cells * fraction), cells - max(1, config.minimum_cells))
        train.append(SampleRange(number, 0, cells - cut))
        if cut:
            heldout.append(SampleRange(number, cells - cut, cells))
    return train, heldout


def _chances(store: CellStore, seed: int) -> list[float]:
    """Return a number in [0, 1) per sample, from the seed and its name; repeated names get different numbers."""
    seen: dict[tuple[str, str], int] = {}
    chances = []
    for record in store.samples:
        name = (record.dataset_name, record.name)
        seen[name] = seen.get(name, -1) + 1
        # NUL cannot occur in a name, so different names never give the same text.
        text = "\0".join((str(seed), *name, str(seen[name])))
        digest = hashlib.sha256(text.encode()).digest()
        chances.append(int.from_bytes(digest[:6], "big") / 2**48)
    # A digest instead of a generator: a sample's number does not depend on how many other samples there are.
    return chances


def gene_means(
    store: CellStore,
    ranges: Sequence[SampleRange],
    maximum_cells: int = 100_000,
) -> np.ndarray:
    """Return the mean count of each gene over the cells of samples that measure it.

    Args:
        store: The data.
        ranges: Cells to use.
        maximum_cells: Approximate maximum number of cells to read, in evenly distributed ranges.

    Returns:
        float32 [genes]; 0 for a gene that no sample measures.
    """
    ends = np.cumsum([part.cells for part in ranges])
    total = int(ends[-1]) if len(ends) else 0
    number = max(1, maximum_cells // BLOCK_CELLS)
    if total <= maximum_cells:
        # All cells, in reads of 16 blocks: the store holds contiguous cells, and few large reads are faster.
        starts = np.arange(0, total, 16 * BLOCK_CELLS)
        length = 16 * BLOCK_CELLS
    else:
        starts = (np.arange(number) * (total / number)).astype(np.int64)
        length = BLOCK_CELLS
    genes = len(store.genes)
    sums = np.zeros(genes)
    cells = np.zeros(genes)
    for start in starts:
        position = int(start)
        stop = min(int(start) + length, total)
        while position < stop:
            index = int(np.searchsorted(ends, position, side="right"))
            part = ranges[index]
            first = part.start + position - (int(ends[index]) - part.cells)
            last = min(part.stop, first + stop - position)
            run = store.read(part.sample, first, last)
            sums += np.bincount(run.gene, weights=run.count, minlength=genes)
            # A gene that a sample does not measure has no count there, so its cells must not dilute the mean.
            measured = store.measured(part.sample)
            cells += run.cells if measured is None else run.cells * measured
            position += last - first
    return (sums / np.maximum(cells, 1)).astype(np.float32)


@dataclass(frozen=True)
class Segment:
    """Cells of one sample in a packed row, which attend to each other.

    Attributes:
        sample: Number of the sample in the store.
        name: Data set and sample, for messages.
        pieces: Ranges (first cell, one past the last) of each piece of the row, in order.
    """

    sample: int
    name: str
    pieces: tuple[tuple[Run, ...], ...]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(stop - start for runs in self.pieces for start, stop in runs)

    def __str__(self) -> str:
        runs = [f"{start}-{stop}" for runs in self.pieces for start, stop in runs]
        more = f" and {len(runs) - 4} more runs" if len(runs) > 4 else ""
        return f"{self.name} cells {', '.join(runs[:4])}{more}"


@dataclass(frozen=True)
class RowContents:
    """Contents of one batch row.

    Attributes:
        epoch: Epoch of the row, from 0.
        row: Number of the row among the packed rows of an epoch.
        segments: Samples of the row.
    """

    epoch: int
    row: int
    segments: tuple[Segment, ...]

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(segment.cells for segment in self.segments)

    def __str__(self) -> str:
        return "[" + "; ".join(map(str, self.segments)) + "]"


def _segment(store: CellStore, sample: int, runs: Sequence[Run], pieces: int) -> Segment:
    record = store.samples[sample]
    name = "/".join(part for part in (record.dataset_name, record.name) if part)
    return Segment(sample, name, tuple(tuple(part) for part in deal_runs(runs, pieces)))


@dataclass
class _Eigenvectors:
    """Laplacian eigenvectors of spatial samples, computed on first access and cached.

    Attributes:
        store: The data.
        count: Number of eigenvectors.
    """

    store: CellStore
    count: int
    _known: dict[int, np.ndarray] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, sample: int) -> np.ndarray:
        """Return float32 [cells, count] of a spatial sample; 0 for cells without coordinates."""
        # Several reader threads ask for the same sample; its eigenvectors take seconds and are computed once.
        with self._lock:
            if sample not in self._known:
                cells = self.store.samples[sample].cells
                step = 16 * BLOCK_CELLS
                runs = [
                    self.store.read(sample, first, min(first + step, cells)).coordinates
                    for first in range(0, cells, step)
                ]
                places = np.concatenate([run for run in runs if run is not None])
                present = np.isfinite(places).all(axis=1)
                vectors = np.zeros((cells, self.count), np.float32)
                vectors[present] = laplacian_eigenvectors(places[present], self.count)
                self._known[sample] = vectors
            return self._known[sample]


class _Rows:
    """Writes rows into batch arrays.

    Args:
        store: The data.
        config: Shapes.
        nonzeros: Length of the nonzero axis.
    """

    def __init__(self, store: CellStore, config: TrainConfig, nonzeros: int):
        self.store = store
        self.nonzeros = nonzeros
        self.cells = config.data.cells
        self.pieces = config.mesh.cells
        self.segments = config.data.segments
        positions = config.model.positions
        self._eigenvectors = (
            _Eigenvectors(store, positions.eigenvectors) if positions.kind == "laplacian" else None
        )

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        """Return padding arrays by field of :class:`CellBatch`; ``gene`` and ``count`` are uninitialised."""
        cells = (rows, self.cells)
        genes = len(self.store.genes)
        folded = (rows, self.pieces, self.nonzeros)
        arrays = {
            "indptr": np.zeros((rows, self.pieces, self.cells // self.pieces + 1), np.int32),
            # Narrow integers: these two arrays are most of the bytes that go to the device.
            "gene": np.empty(folded, np.uint16 if genes <= 65_536 else np.uint32),
            "count": np.empty(folded, np.uint16),
            "cell_mask": np.zeros(cells, bool),
            "segment": np.zeros(cells, np.int32),
            "coordinates": np.zeros((*cells, 2), np.float32),
            "has_coordinates": np.zeros(cells, bool),
            # All genes, unless a sample records what it measures.
            "measured": np.ones((rows, self.segments, genes), bool),
            "batch": np.full(cells, -1, np.int32),
            "dataset": np.full(cells, -1, np.int32),
            "platform": np.full(cells, -1, np.int32),
        }
        if self._eigenvectors is not None:
            arrays["eigenvectors"] = np.zeros((*cells, self._eigenvectors.count), np.float32)
        return arrays

    def fill(
        self,
        arrays: dict[str, np.ndarray],
        row: int,
        segments: Sequence[Segment],
        labels: np.ndarray | None = None,
        samples: np.ndarray | None = None,
    ) -> None:
        """Read the cells of one row into the arrays.

        Args:
            arrays: From :meth:`empty`.
            row: Index of the row.
            segments: Contents of the row.
            labels: int32 [rows, cells], filled with the labels of the cells; None: omitted.
            samples: int32 [rows, cells], filled with the sample number of each cell; None: omitted.

        Raises:
            InputError: The data contradicts the cell offsets from which the shapes were computed.
        """
        store = self.store
        width = self.cells // self.pieces
        for place, segment in enumerate(segments):
            known = store.measured(segment.sample)
            if known is not None:
                arrays["measured"][row, place] = known
        for piece in range(self.pieces):
            indptr = arrays["indptr"][row, piece]
            gene = arrays["gene"][row, piece]
            count = arrays["count"][row, piece]
            cell = stored = 0
            for place, segment in enumerate(segments):
                record = store.samples[segment.sample]
                first = cell
                for start, stop in segment.pieces[piece]:
                    run = store.read(segment.sample, start, stop)
                    end = stored + len(run.gene)
                    if end > self.nonzeros:
                        raise InputError(
                            f"sample '{segment.name}' has more stored counts in its cells {start} to {stop} than "
                            "its table of offsets specifies",
                            "data that does not change during a run",
                            "Check it with 'cellplm info CORPUS --verify', and start again",
                        )
                    gene[stored:end], count[stored:end] = run.gene, run.count
                    # Offsets are stored per read; they are shifted to the position in the row.
                    np.add(
                        run.indptr[1:],
                        stored,
                        out=indptr[cell + 1 : cell + 1 + run.cells],
                        casting="unsafe",
                    )
                    at = slice(piece * width + cell, piece * width + cell + run.cells)
                    if run.coordinates is not None:
                        present = np.all(np.isfinite(run.coordinates), axis=1)
                        arrays["has_coordinates"][row, at] = present
                        arrays["coordinates"][row, at] = np.where(
                            present[:, None],
                            run.coordinates,
                            0,
                        )
                        if self._eigenvectors is not None:
                            vectors = self._eigenvectors(segment.sample)[start:stop]
                            arrays["eigenvectors"][row, at] = vectors
                    if labels is not None and run.labels is not None:
                        labels[row, at] = run.labels
                    cell, stored = cell + run.cells, end
                at = slice(piece * width + first, piece * width + cell)
                arrays["segment"][row, at] = place
                for name in ("batch", "dataset", "platform"):
                    arrays[name][row, at] = getattr(record, name)
                if samples is not None:
                    samples[row, at] = segment.sample
            arrays["cell_mask"][row, piece * width : piece * width + cell] = True
            indptr[cell + 1 :] = stored
            # The arrays are uninitialised: old memory could contain an index past the vocabulary.
            gene[stored:], count[stored:] = 0, 0

    def batch(
        self,
        arrays: dict[str, np.ndarray],
        lead: tuple[int, ...],
    ) -> CellBatch:
        """Return the arrays as a batch with the leading axes ``lead`` instead of rows."""
        fields = dict(arrays)
        # Without pieces and segments the model has fewer axes, which compiles to simpler programs.
        if self.pieces == 1:
            fields |= {name: arrays[name][:, 0] for name in ("indptr", "gene", "count")}
        if self.segments == 1:
            del fields["segment"]
        return CellBatch(**{name: a.reshape(*lead, *a.shape[1:]) for name, a in fields.items()})  # type: ignore[arg-type]


class TrainingBatches:
    """Training batches; each is a function of the data, the configuration, the seed and its step.

    Rows are shuffled per epoch, epochs are concatenated, and batch ``s``, counted from 0, contains the rows from
    ``s * accumulate * rows`` on.

    Args:
        store: The data.
        ranges: The cells to train on.
        config: Shapes, seed, threads.

    Attributes:
        rows_per_epoch: Number of packed rows that contain every cell of the ranges once.
        nonzeros: Length of the nonzero axis: maximum number of stored counts per piece.
        padding: Fraction of the cell axis that is padding, over an epoch.
        steps_per_epoch: Steps per epoch, rounded up.

    Raises:
        InputError: No training cells are left.
    """

    def __init__(self, store: CellStore, ranges: Sequence[SampleRange], config: TrainConfig):
        ranges = [part for part in ranges if part.cells]
        if not ranges:
            raise InputError(
                "no training sample is left",
                f"one with at least {config.data.minimum_cells} cells",
                "Lower data.minimum_cells or data.heldout_fraction, or give more data",
            )
        self.store, self.config = store, config
        data = config.data
        pieces = config.mesh.cells
        self._sources = [Source(store, part, data.cells, pieces, data.segments) for part in ranges]
        self._packing = plan_packing(self._sources, config)
        self.rows_per_epoch = len(self._packing.rows)
        self.nonzeros = self._packing.nonzeros
        self.padding = 1.0 - sum(part.cells for part in ranges) / (self.rows_per_epoch * data.cells)
        self.steps_per_epoch = -(-self.rows_per_epoch // (config.accumulate * data.rows))
        self._rows = _Rows(store, config, self.nonzeros)
        # Prefetching threads are in two epochs at once at a boundary; an lru_cache on the class would keep the store
        # alive.
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def describe(self, step: int) -> list[RowContents]:
        """Return the contents of the rows of one batch; rows of accumulated batches are concatenated.

        Args:
            step: Number of the batch, from 0.
        """
        count = self.config.accumulate * self.config.data.rows
        return [self._contents(step * count + i) for i in range(count)]

    def batch(self, step: int, first: int = 0, rows: int | None = None) -> CellBatch:
        """Return rows of a batch as numpy arrays.

        Args:
            step: Number of the batch, from 0.
            first: First row.
            rows: Number of rows; None: all from ``first``.

        Returns:
            [accumulate, rows, ...].
        """
        return self._batch(step, first, rows, map)

    def iterate(
        self,
        start_step: int,
        stop_step: int,
        first: int = 0,
        rows: int | None = None,
    ) -> Iterator[CellBatch]:
        """Yield the batches of ``start_step`` to ``stop_step`` (exclusive), prefetched by threads.

        Args:
            start_step: Number of the first batch, from 0.
            stop_step: One past the last batch.
            first: First row of each batch.
            rows: Number of rows; None: all from ``first``.
        """
        grain = require("grain", "train", "Reading training batches")
        if start_step >= stop_step:
            return
        data = self.config.data
        with ThreadPoolExecutor(data.threads, thread_name_prefix="rows") as pool:
            steps = grain.MapDataset.range(start_step, stop_step)
            batches = steps.map(lambda step: self._batch(int(step), first, rows, pool.map))
            options = grain.ReadOptions(
                # A batch per thread; the rows of each are filled by the pool above, so that one large batch is not
                # read serially.
                num_threads=data.prefetch,
                prefetch_buffer_size=data.prefetch,
            )
            iterator = iter(batches.to_iter_dataset(options))
            try:
                yield from iterator
            finally:
                # A consumer that stops early must not leave threads that read on.
                iterator.close()

    def _batch(self, step: int, first: int, rows: int | None, over: Callable) -> CellBatch:
        accumulate = self.config.accumulate
        all_rows = self.config.data.rows
        rows = all_rows - first if rows is None else rows
        arrays = self._rows.empty(accumulate * rows)

        def fill(place: int) -> None:
            group, row = divmod(place, rows)
            # Rows are numbered over all processes, so the same rows are read whatever the number of processes.
            number = (step * accumulate + group) * all_rows + first + row
            self._rows.fill(arrays, place, self._contents(number).segments)

        for _ in over(fill, range(accumulate * rows)):
            pass
        return self._rows.batch(arrays, (accumulate, rows))

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, 3, epoch]).permutation(self.rows_per_epoch)

    def _contents(self, number: int) -> RowContents:
        """Return the contents of a row by its number since the beginning of the run."""
        epoch, place = divmod(number, self.rows_per_epoch)
        row = int(self._order(epoch)[place])
        segments = []
        for index in self._packing.rows[row]:
            window = self._packing.windows[index]
            source = self._sources[window.source]
            for runs in source.runs(window.begin, window.cells, self.config.seed, epoch):
                sample = source.part.sample
                segments.append(_segment(self.store, sample, runs, self.config.mesh.cells))
        return RowContents(epoch, row, tuple(segments))


def heldout_batches(
    store: CellStore,
    ranges: Sequence[SampleRange],
    config: TrainConfig,
    maximum: int = HELDOUT_WINDOWS,
) -> list[tuple[CellBatch, np.ndarray | None, np.ndarray]]:
    """Return fixed held-out batches: always the same windows, packed like training windows.

    Args:
        store: The data.
        ranges: Held-out cells.
        config: Shapes.
        maximum: Maximum number of windows, evenly distributed over the ranges and within each range.

    Returns:
        Batches [rows, ...] of one shape, the last one padded with empty rows; with each the labels of its cells
        (int32 [rows, cells], -1 for none; None: the store has no labels) and their sample numbers (int32 [rows,
        cells], -1 for padding).
    """
    data = config.data
    pieces = config.mesh.cells
    windows, chosen = [], []
    for number, part, begin, cells in _spread(ranges, data.cells, maximum):
        share = -(-cells // pieces)
        cuts = np.minimum(np.arange(pieces + 1) * share, cells) + part.start + begin
        most = int(np.diff(store.indptr(part.sample)[cuts]).max())
        windows.append(Window(number, begin, cells, share, most, 1))
        run = (part.start + begin, part.start + begin + cells)
        chosen.append(_segment(store, part.sample, [run], pieces))
    unlimited = np.iinfo(np.int64).max
    packed = pack_windows(windows, data.cells // pieces, unlimited, data.segments)
    most = max((sum(windows[i].nonzeros for i in row) for row in packed), default=1)
    nonzeros = max(1, -(-most // NONZEROS_MULTIPLE)) * NONZEROS_MULTIPLE
    layout = _Rows(store, config, nonzeros)
    batches = []
    for start in range(0, len(packed), data.rows):
        arrays = layout.empty(data.rows)
        labels = np.full((data.rows, data.cells), -1, np.int32)
        samples = labels.copy()
        for row in range(data.rows):
            members = packed[start + row] if start + row < len(packed) else []
            layout.fill(arrays, row, [chosen[i] for i in members], labels, samples)
        batch = layout.batch(arrays, (data.rows,))
        batches.append((batch, labels if store.label_names else None, samples))
    return batches


def _spread(
    ranges: Sequence[SampleRange],
    largest: int,
    maximum: int,
) -> Iterator[tuple[int, SampleRange, int, int]]:
    """Yield the number, the range, its first cell and the cells of up to ``maximum`` windows."""
    ranges = [part for part in ranges if part.cells]
    number = min(len(ranges), maximum)
    # Evenly over samples, then over the windows of each: a function of the data alone, with no random draw.
    chosen = [ranges[(2 * i + 1) * len(ranges) // (2 * number)] for i in range(number)]
    sizes = [window_sizes(part.cells, largest) for part in chosen]
    taken = [1] * number
    while sum(taken) < min(maximum, sum(map(len, sizes))):
        for i in range(number):
            if taken[i] < len(sizes[i]) and sum(taken) < maximum:
                taken[i] += 1
    for i, part in enumerate(chosen):
        starts = np.cumsum([0, *sizes[i]])
        for k in range(taken[i]):
            window = (2 * k + 1) * len(sizes[i]) // (2 * taken[i])
            yield i, part, int(starts[window]), sizes[i][window]
