"""Rows of many random runs: shapes, data sets and densities nobody would think of, each cell followed through."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cellplm_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from cellplm_jax.data import packing, pipeline
from cellplm_jax.data.cell_store import CellRun, SampleRecord
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.data.pipeline import TrainingBatches, heldout_batches


class MarkedStore:
    """Every stored count of cell i is i + 1, and gene j of a cell is its j-th; cells may be empty.

    Args:
        nonzeros: For each sample the stored counts of its cells.
        places: For each sample its coordinates or None.
        genes: Size of the vocabulary.
    """

    def __init__(self, nonzeros, places, genes):
        self.genes, self.label_names = [str(i) for i in range(genes)], []
        self.nonzeros, self.places = nonzeros, places
        self.offsets = [np.concatenate([[0], np.cumsum(n)]) for n in nonzeros]
        self.samples = [
            SampleRecord(
                name=f"sample {i}",
                dataset_name="made up",
                platform_name="",
                cells=len(n),
                nonzeros=int(n.sum()),
                spatial=places[i] is not None,
                batch=i,
                dataset=i % 3,
                platform=i % 2,
            )
            for i, n in enumerate(nonzeros)
        ]

    def indptr(self, sample):
        return self.offsets[sample]

    def read(self, sample, start, stop):
        indptr = self.offsets[sample][start : stop + 1] - self.offsets[sample][start]
        lengths = np.diff(indptr)
        place = self.places[sample]
        return CellRun(
            indptr,
            (np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)).astype(np.uint16),
            np.repeat(np.arange(start, stop) + 1, lengths).astype(np.uint16),
            None if place is None else place[start:stop],
        )

    def measured(self, sample):
        return None if sample % 2 else np.arange(len(self.genes)) % (sample + 2) > 0

    def fingerprint(self):
        return "marked"


def densities(random, cells, genes):
    """Stored counts of cells, of a kind drawn at random."""
    kind = random.integers(9)
    few = random.integers(0, 4, cells)
    if kind == 0:
        return np.zeros(cells, int)
    if kind == 1:  # some very dense cells
        few[random.integers(0, cells, 3)] = genes
        return few
    if kind == 2:  # a dense block
        start = random.integers(cells)
        few[start : start + random.integers(1, 100)] = genes
        return few
    if kind == 3:
        return np.full(cells, genes)
    if kind == 7:  # dense at both ends
        few[: cells // 10 + 1] = few[-(cells // 10 + 1) :] = genes
        return few
    if kind == 4:
        return np.sort(random.integers(0, genes + 1, cells))
    if kind == 5:
        return np.where(random.random(cells) < 0.5, 0, genes)
    if kind == 6:
        return random.geometric(0.1, cells).clip(0, genes)
    return random.integers(0, genes + 1, cells)


def random_run(seed):
    """A store, ranges of its samples, and settings."""
    random = np.random.default_rng(seed)
    genes = int(random.choice([5, 40, 200]))
    number = int(random.choice([1, 2, 5, 12]))
    sizes = random.lognormal(np.log(random.choice([5, 60, 200])), 1.2, number).astype(int)
    sizes = sizes.clip(1, 1500)
    sizes[0] = random.choice([5, sizes[0]])
    places = []
    for cells in sizes:
        place = random.random((cells, 2)).astype(np.float32)
        place[random.random(cells) < 0.1] = np.nan
        places.append(place if random.random() < 0.5 else None)
    store = MarkedStore([densities(random, n, genes) for n in sizes], places, genes)
    ranges = []
    for sample, cells in enumerate(map(int, sizes)):
        start = 0 if random.random() < 0.7 else int(random.integers(0, cells))
        stop = cells if random.random() < 0.6 else int(random.integers(start, cells + 1))
        ranges.append(SampleRange(sample, start, max(stop, start + 1)))
    pieces = int(random.choice([1, 2, 4, 8]))
    config = TrainConfig(
        model=ModelConfig(genes=genes),
        data=DataConfig(
            rows=int(random.choice([1, 2, 4])),
            cells=int(random.choice([1, 2, 7, 16, 60, 128])) * pieces,
            segments=int(random.choice([1, 2, 4, 16])),
        ),
        mesh=MeshConfig(cells=pieces),
        accumulate=int(random.choice([1, 2, 3])),
        seed=int(random.integers(5)),
    )
    return store, ranges, config


def follow(store, batch, config, row, at):
    """Compare one row of a batch with the store, cell by cell; return its cells in order."""
    pieces = config.mesh.cells
    width = config.data.cells // pieces
    followed = []
    for piece in range(pieces):
        fold = at if pieces == 1 else (*at, piece)
        indptr, gene, count = (getattr(batch, k)[fold] for k in ("indptr", "gene", "count"))
        here = slice(piece * width, (piece + 1) * width)
        cells = [
            (segment.sample, cell)
            for segment in row.segments
            for run in segment.pieces[piece]
            for cell in range(*run)
        ]
        real = len(cells)
        np.testing.assert_array_equal(batch.cell_mask[at][here], np.arange(width) < real)
        owner = np.array([sample for sample, _ in cells], int)
        for name, wanted in (("batch", owner), ("dataset", owner % 3), ("platform", owner % 2)):
            found = getattr(batch, name)[at][here]
            np.testing.assert_array_equal(found[:real], wanted)
            assert (found[real:] == -1).all()
        if batch.segment is not None:
            segment = batch.segment[at][here][:real]
            assert (np.diff(segment) >= 0).all()
            sizes = [sum(b - a for a, b in s.pieces[piece]) for s in row.segments]
            np.testing.assert_array_equal(segment, np.repeat(np.arange(len(sizes)), sizes))
        assert indptr[0] == 0
        assert (indptr[real:] == indptr[real]).all()
        lengths = np.diff(indptr)[:real]
        np.testing.assert_array_equal(lengths, [store.nonzeros[s][c] for s, c in cells])
        stored = int(indptr[-1])
        assert stored <= gene.shape[-1]
        np.testing.assert_array_equal(
            count[:stored], np.repeat([cell + 1 for _, cell in cells], lengths)
        )
        np.testing.assert_array_equal(
            gene[:stored], np.arange(stored) - np.repeat(indptr[:real], lengths)
        )
        assert not count[stored:].any()
        places = np.full((width, 2), np.nan, np.float32)
        for i, (sample, cell) in enumerate(cells):
            if store.places[sample] is not None:
                places[i] = store.places[sample][cell]
        present = np.isfinite(places).all(axis=1)
        np.testing.assert_array_equal(batch.has_coordinates[at][here], present)
        np.testing.assert_array_equal(
            batch.coordinates[at][here], np.where(present[:, None], places, 0)
        )
        followed += cells
    for place, segment in enumerate(row.segments):
        known = store.measured(segment.sample)
        np.testing.assert_array_equal(
            batch.measured[at][place], np.ones(len(store.genes), bool) if known is None else known
        )
    return followed


@pytest.mark.parametrize("seed", range(24))
def test_every_cell_of_any_run_arrives_once_an_epoch_as_it_is_stored(seed):
    store, ranges, config = random_run(seed)
    wanted = sorted((p.sample, cell) for p in ranges for cell in range(p.start, p.stop))
    batches = TrainingBatches(store, ranges, config)
    rows, accumulate = config.data.rows, config.accumulate
    steps = min(-(-2 * batches.rows_per_epoch // (rows * accumulate)), 150)
    epochs: dict[int, list] = {}
    whole = {}
    shape = None
    for step in range(steps):
        batch = batches.batch(step)
        whole[step] = batch
        assert batch.gene.shape[-1] == batches.nonzeros
        assert shape in (None, batch.gene.shape)
        shape = batch.gene.shape
        for number, row in enumerate(batches.describe(step)):
            assert 1 <= len(row.segments) <= config.data.segments
            at = divmod(number, rows)
            epochs.setdefault(row.epoch, []).extend(follow(store, batch, config, row, at))
    if steps < 150:
        assert sorted(epochs[0]) == wanted
        assert sorted(epochs[1]) == wanted
    # Any number of processes, any step to begin with.
    for processes in (1, 2, 4):
        share = rows // processes
        if share * processes != rows:
            continue
        step = seed % steps
        parts = [batches.batch(step, i * share, share) for i in range(processes)]
        for name, value in vars(whole[step]).items():
            if value is not None:
                together = np.concatenate([getattr(part, name) for part in parts], axis=1)
                np.testing.assert_array_equal(together, value)


@pytest.mark.parametrize("seed", range(200, 230))
def test_windows_stay_within_what_they_were_packed_as_in_every_epoch(seed, monkeypatch):
    for module in (packing, pipeline):
        monkeypatch.setattr(module, "BLOCK_CELLS", 16)
        monkeypatch.setattr(module, "NONZEROS_MULTIPLE", 1)
    store, ranges, config = random_run(seed)
    batches = TrainingBatches(store, ranges, config)
    pieces = config.mesh.cells
    windows, rows = batches._packing.windows, batches._packing.rows
    assert sorted(i for row in rows for i in row) == list(range(len(windows)))
    for row in rows:
        members = [windows[i] for i in row]
        assert sum(w.share for w in members) <= config.data.cells // pieces
        assert sum(w.nonzeros for w in members) <= batches.nonzeros
        assert sum(w.segments for w in members) <= config.data.segments
    for window in windows[:: max(1, len(windows) // 20)]:
        source = batches._sources[window.source]
        stored = store.nonzeros[source.part.sample]
        for epoch in range(60):
            segments = source.runs(window.begin, window.cells, config.seed, epoch)
            assert len(segments) <= window.segments
            cells, counts = np.zeros(pieces, int), np.zeros(pieces, int)
            for runs in segments:
                for piece, dealt in enumerate(packing.deal_runs(runs, pieces)):
                    cells[piece] += sum(stop - start for start, stop in dealt)
                    counts[piece] += sum(int(stored[start:stop].sum()) for start, stop in dealt)
            assert cells.sum() == window.cells
            assert cells.max() <= window.share
            assert counts.max() <= window.nonzeros


@pytest.mark.parametrize(("stop", "pieces"), [(1000, 1), (1000, 2), (960, 1), (960, 2)])
def test_a_turned_curve_may_bring_dense_ends_together(stop, pieces):
    stored = np.ones(1000, int)
    stored[:40] = stored[stop - 40 : stop] = 64
    store = MarkedStore([stored], [np.zeros((1000, 2), np.float32)], 64)
    data = DataConfig(rows=1, cells=160, segments=4)
    config = TrainConfig(
        model=ModelConfig(genes=64), data=data, mesh=MeshConfig(cells=pieces), seed=3
    )
    batches = TrainingBatches(store, [SampleRange(0, 0, stop)], config)
    dense = 0
    for step in range(60 * batches.rows_per_epoch):  # raises where something does not fit
        dense = max(dense, int(np.asarray(batches.batch(step).indptr)[..., -1].max()))
    turns = stop == 1000 or pieces == 1
    assert dense > (64 * 41 if turns else 64 * 40)
    assert dense <= batches.nonzeros


@pytest.mark.parametrize("seed", range(100, 108))
def test_heldout_batches_of_any_run_hold_their_cells(seed):
    store, ranges, config = random_run(seed)
    found = heldout_batches(store, ranges, config, maximum=1 + seed % 9)
    assert len({batch.gene.shape for batch, _, _ in found}) == 1
    seen = []
    for batch, labels, samples in found:
        assert labels is None
        np.testing.assert_array_equal(samples, batch.batch)
        np.testing.assert_array_equal(samples >= 0, batch.cell_mask)
        pieces = config.mesh.cells
        offsets = batch.indptr.reshape(config.data.rows, pieces, -1)
        counts = batch.count.reshape(config.data.rows, pieces, -1)
        owners = samples.reshape(config.data.rows, pieces, -1)
        for row in range(config.data.rows):
            for piece in range(pieces):
                lengths = np.diff(offsets[row, piece])
                filled = lengths > 0
                cells = counts[row, piece][offsets[row, piece][:-1][filled]].astype(int) - 1
                mine = owners[row, piece][filled]
                seen += list(zip(mine.tolist(), cells.tolist(), strict=True))
                for sample, cell, length in zip(mine, cells, lengths[filled], strict=True):
                    assert ranges[sample].start <= cell < ranges[sample].stop
                    assert length == store.nonzeros[sample][cell]
    assert len(seen) == len(set(seen))


def test_twelve_thousand_samples_are_laid_out_in_seconds():
    """A tenth of the size of samples of median 900 cells in rows of 2,048: as many windows, as uneven ones."""
    random = np.random.default_rng(0)
    sizes = np.maximum(2, random.lognormal(np.log(90), 1.0, 12_000).astype(int))
    means = random.choice([5, 15, 30], len(sizes))
    nonzeros = [random.integers(1, 2 * mean, n) for n, mean in zip(sizes, means, strict=True)]
    store = MarkedStore(nonzeros, [None] * len(sizes), 64)
    data = DataConfig(rows=16, cells=205, segments=16)
    config = TrainConfig(model=ModelConfig(genes=64), data=data)
    ranges = [SampleRange(i, 0, int(n)) for i, n in enumerate(sizes)]
    began = time.process_time()
    batches = TrainingBatches(store, ranges, config)
    assert time.process_time() - began < 20
    assert batches.padding < 0.1
