"""Rows of a run: nothing lost, nothing twice, nothing too large, and nothing that depends on who asks for it."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from cellplm_jax.config import DataConfig, MeshConfig, ModelConfig, PositionsConfig, TrainConfig
from cellplm_jax.data.batches import MemoryStore, laplacian_eigenvectors
from cellplm_jax.data.cell_store import CellRun, SampleRecord, moore_curve
from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.data.corpus_writer import PartSample, PartWriter, write_genes, write_index
from cellplm_jax.data.packing import SampleRange, Source, deal_runs, window_sizes
from cellplm_jax.data.pipeline import (
    TrainingBatches,
    gene_means,
    heldout_batches,
    split_heldout,
)
from cellplm_jax.errors import ConfigError, InputError
from tests.conftest import VOCABULARY, make_samples, make_store

GENES = 64


class NumberedStore:
    """Cells that can be told apart: cell i of sample s stores i + 1 of gene 0 and has batch s.

    Args:
        nonzeros: For each sample the stored counts of its cells, at least 1 each.
        places: For each sample its coordinates; None: it has none.
    """

    def __init__(self, nonzeros, places=None, genes=GENES, names=None):
        self.genes = [f"gene {i}" for i in range(genes)]
        self.label_names = ["even", "odd"]
        self.nonzeros = [np.asarray(n) for n in nonzeros]
        self.places = places or [None] * len(nonzeros)
        self.offsets = [np.concatenate([[0], np.cumsum(n)]) for n in self.nonzeros]
        self.samples = [
            SampleRecord(
                name=names[i] if names else f"sample {i}",
                dataset_name="made up",
                platform_name="",
                cells=len(n),
                nonzeros=int(n.sum()),
                spatial=self.places[i] is not None,
                batch=i,
                dataset=i % 2,
                platform=2,
            )
            for i, n in enumerate(self.nonzeros)
        ]

    def indptr(self, sample):
        return self.offsets[sample]

    def read(self, sample, start, stop):
        assert 0 <= start < stop <= self.samples[sample].cells
        indptr = self.offsets[sample][start : stop + 1] - self.offsets[sample][start]
        gene = np.arange(indptr[-1]) - np.repeat(indptr[:-1], np.diff(indptr))
        count = np.full(indptr[-1], 7, np.uint16)
        count[indptr[:-1]] = np.arange(start, stop) + 1
        place = self.places[sample]
        return CellRun(
            indptr,
            gene.astype(np.uint16),
            count,
            None if place is None else place[start:stop],
            (np.arange(start, stop) % 2).astype(np.int32),
        )

    def measured(self, sample):
        return None if sample % 3 == 0 else np.arange(len(self.genes)) % 3 != sample % 3

    def fingerprint(self):
        return "numbered"


def settings(*, rows=2, cells=64, segments=4, pieces=1, accumulate=1, seed=0, genes=GENES, **data):
    positions = data.pop("positions", "none")
    return TrainConfig(
        model=ModelConfig(genes=genes, positions=PositionsConfig(kind=positions, eigenvectors=3)),
        data=DataConfig(rows=rows, cells=cells, segments=segments, **data),
        mesh=MeshConfig(cells=pieces),
        accumulate=accumulate,
        seed=seed,
    )


def everything(store):
    return [SampleRange(i, 0, s.cells) for i, s in enumerate(store.samples)]


def mixed_store(seed=0):
    """Small and large samples, with coordinates or without, of wildly different density."""
    random = np.random.default_rng(seed)
    sizes = [3, 300, 17, 150, 64, 65, 1, 40, 220, 33]
    nonzeros = [random.integers(1, random.integers(3, GENES + 1), n) for n in sizes]
    nonzeros[3][70:80] = GENES
    places = [
        random.random((n, 2)).astype(np.float32) if i % 2 else None for i, n in enumerate(sizes)
    ]
    for place in places:
        if place is not None:
            place[:] = place[np.argsort(moore_curve(place))]
    places[1][-20:] = np.nan
    return NumberedStore(nonzeros, places)


def cells_in(batch):
    """(sample, number of the cell) of every cell of a numpy batch of any leading axes, int [cells, 2]."""
    indptr, count = np.asarray(batch.indptr), np.asarray(batch.count)
    pieces = batch.cell_mask.size // (indptr.size // indptr.shape[-1]) // (indptr.shape[-1] - 1)
    assert pieces == 1
    flat_indptr = indptr.reshape(-1, indptr.shape[-1])
    flat_count = count.reshape(-1, count.shape[-1])
    mask = np.asarray(batch.cell_mask).reshape(len(flat_indptr), -1)
    owner = np.asarray(batch.batch).reshape(len(flat_indptr), -1)
    found = []
    for pointers, counts, real, samples in zip(flat_indptr, flat_count, mask, owner, strict=True):
        n = int(real.sum())
        assert real[:n].all()  # padding comes last in each piece
        assert (samples[n:] == -1).all()
        assert (np.diff(pointers)[:n] > 0).all()
        assert (pointers[n:] == pointers[n]).all()
        assert pointers[n] <= len(counts)
        assert (counts[pointers[n] :] == 0).all()
        found += list(zip(samples[:n], counts[pointers[:n]].astype(int) - 1, strict=True))
    return np.array(found)


def assert_same(one, two):
    for name, value in vars(one).items():
        other = getattr(two, name)
        if value is None:
            assert other is None, name
        else:
            assert value.dtype == other.dtype, name
            np.testing.assert_array_equal(value, other, err_msg=name)


def rows_of(batch, first, rows):
    return batch.replace(
        **{k: None if v is None else v[:, first : first + rows] for k, v in vars(batch).items()}
    )


# What is held out


def many_samples(number, cells=10):
    return NumberedStore([np.ones(cells, int)] * number)


def test_whole_samples_are_held_out_and_keep_their_part_when_others_are_added():
    data = DataConfig(heldout_fraction=0.1)
    small, large = many_samples(100), many_samples(300)
    train, heldout = split_heldout(small, data, seed=3)
    assert sorted(p.sample for p in train + heldout) == list(range(100))
    assert all((p.start, p.stop) == (0, 10) for p in train + heldout)
    assert 3 <= len(heldout) <= 20
    grown = split_heldout(large, data, seed=3)
    assert [p for p in grown[1] if p.sample < 100] == heldout
    assert [p for p in grown[0] if p.sample < 100] == train
    assert split_heldout(small, data, seed=3) == (train, heldout)
    assert split_heldout(small, data, seed=4)[1] != heldout


def test_no_training_sample_is_ever_held_out_later():
    """Where the hash holds out none, the one with the lowest is; adding samples may only bring that one back."""
    data = DataConfig(heldout_fraction=0.1)
    for seed in range(30):
        train = {p.sample for p in split_heldout(many_samples(10), data, seed)[0]}
        later = {p.sample for p in split_heldout(many_samples(25), data, seed)[1]}
        assert not train & later


def test_there_is_always_a_sample_on_each_side():
    for seed in range(20):
        for number, fraction in ((10, 0.1), (2, 0.5), (2, 0.99), (3, 0.9), (12, 0.1)):
            data = DataConfig(heldout_fraction=fraction)
            train, heldout = split_heldout(many_samples(number), data, seed)
            assert train
            assert heldout
            assert not {p.sample for p in train} & {p.sample for p in heldout}


def test_samples_of_one_name_are_decided_one_by_one():
    store = NumberedStore([np.ones(5, int)] * 60, names=["the same"] * 60)
    train, heldout = split_heldout(store, DataConfig(heldout_fraction=0.3), 0)
    assert 8 <= len(heldout) <= 30
    assert len(train) + len(heldout) == 60


def test_few_samples_give_their_last_cells():
    store = NumberedStore([np.ones(n, int) for n in (40, 1, 15, 3, 2)])
    data = DataConfig(heldout_fraction=0.1, minimum_cells=2)
    train, heldout = split_heldout(store, data, 0)
    assert train == [SampleRange(0, 0, 36), SampleRange(2, 0, 13), SampleRange(3, 0, 3),
                     SampleRange(4, 0, 2)]  # fmt: skip
    assert heldout == [SampleRange(0, 36, 40), SampleRange(2, 13, 15)]
    # What is trained on keeps the cells a sample must have.
    train, heldout = split_heldout(store, DataConfig(heldout_fraction=0.19, minimum_cells=15), 0)
    assert (train, heldout) == (
        [SampleRange(0, 0, 32), SampleRange(2, 0, 15)],
        [SampleRange(0, 32, 40)],
    )
    single = NumberedStore([np.ones(10, int)])
    assert split_heldout(single, DataConfig(heldout_fraction=0.7), 0)[1] == [SampleRange(0, 3, 10)]


def test_nothing_held_out_and_nothing_usable():
    store = many_samples(30)
    assert split_heldout(store, DataConfig(heldout_fraction=0.0), 0) == (everything(store), [])
    with pytest.raises(InputError, match=r"none of 30 samples has 11 cells; expected"):
        split_heldout(store, DataConfig(minimum_cells=11), 0)
    with pytest.raises(InputError, match="no training sample is left"):
        TrainingBatches(store, [], settings())


# Every cell once an epoch


@pytest.mark.parametrize(("cells", "segments"), [(64, 4), (64, 1), (16, 4), (512, 16), (10, 2)])
def test_every_cell_once_an_epoch(cells, segments):
    store = mixed_store()
    ranges = everything(store)
    ranges[8] = SampleRange(8, 30, 200)
    ranges[1] = SampleRange(1, 0, 250)  # a part of a curve
    wanted = {(p.sample, i) for p in ranges for i in range(p.start, p.stop)}
    batches = TrainingBatches(store, ranges, settings(rows=1, cells=cells, segments=segments))
    epochs = []
    for epoch in range(4):
        steps = range(epoch * batches.rows_per_epoch, (epoch + 1) * batches.rows_per_epoch)
        rows = [cells_in(batches.batch(step)) for step in steps]
        found = [tuple(cell) for row in rows for cell in row.tolist()]
        assert len(found) == len(wanted)
        assert set(found) == wanted
        epochs.append({frozenset(map(tuple, row.tolist())) for row in rows})
        described = {
            (segment.sample, cell)
            for step in steps
            for row in batches.describe(step)
            for segment in row.segments
            for runs in segment.pieces
            for run in runs
            for cell in range(*run)
        }
        assert described == wanted
    if cells < 300:
        assert epochs[0] != epochs[1]  # other windows
    assert batches.padding == pytest.approx(1 - len(wanted) / (batches.rows_per_epoch * cells))


def test_rows_are_shuffled_and_epochs_follow_one_another():
    store = many_samples(12, cells=8)
    batches = TrainingBatches(store, everything(store), settings(rows=5, cells=8, accumulate=2))
    assert batches.rows_per_epoch == 12
    assert batches.steps_per_epoch == 2
    rows = [row for step in range(6) for row in batches.describe(step)]
    numbers = [row.segments[0].sample for row in rows]
    for epoch in range(5):
        assert sorted(numbers[epoch * 12 : (epoch + 1) * 12]) == list(range(12))
    assert numbers[:12] != numbers[12:24]
    assert numbers[:12] != list(range(12))
    assert [row.epoch for row in rows] == [i // 12 for i in range(60)]
    assert str(rows[0]) == f"[made up/sample {numbers[0]} cells 0-8]"
    assert rows[0].cells == 8
    # Row r of the a-th accumulated batch sits at [a, r].
    owners = np.asarray(batches.batch(3).batch)[:, :, 0]
    np.testing.assert_array_equal(owners.ravel(), numbers[30:40])


# What a row looks like


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_rows_hold_what_they_say(pieces):
    store, width = mixed_store(1), 64 // pieces
    config = settings(pieces=pieces, rows=3, accumulate=2)
    batches = TrainingBatches(store, everything(store), config)
    for step in range(3):
        batch = batches.batch(step)
        assert batch.cell_mask.shape == (2, 3, 64)
        lead = (2, 3) if pieces == 1 else (2, 3, pieces)
        assert batch.indptr.shape == (*lead, width + 1)
        assert batch.gene.shape == batch.count.shape == (*lead, batches.nonzeros)
        assert batch.measured.shape == (2, 3, 4, GENES)
        assert (batch.gene.dtype, batch.count.dtype, batch.indptr.dtype) == (
            np.uint16,
            np.uint16,
            np.int32,
        )
        for number, row in enumerate(batches.describe(step)):
            at = divmod(number, 3)
            assert 1 <= len(row.segments) <= 4
            for place, segment in enumerate(row.segments):
                sizes = [sum(b - a for a, b in runs) for runs in segment.pieces]
                assert max(sizes) <= -(-segment.cells // pieces)
                measured = store.measured(segment.sample)
                np.testing.assert_array_equal(
                    batch.measured[at][place], True if measured is None else measured
                )
            for piece in range(pieces):
                cell = stored = 0
                fold = at if pieces == 1 else (*at, piece)
                for place, segment in enumerate(row.segments):
                    for start, stop in segment.pieces[piece]:
                        run = store.read(segment.sample, start, stop)
                        here = slice(piece * width + cell, piece * width + cell + run.cells)
                        end = stored + len(run.gene)
                        np.testing.assert_array_equal(batch.gene[fold][stored:end], run.gene)
                        np.testing.assert_array_equal(batch.count[fold][stored:end], run.count)
                        np.testing.assert_array_equal(
                            batch.indptr[fold][cell : cell + run.cells + 1], run.indptr + stored
                        )
                        assert (batch.segment[at][here] == place).all()
                        assert (batch.batch[at][here] == segment.sample).all()
                        assert (batch.dataset[at][here] == segment.sample % 2).all()
                        assert (batch.platform[at][here] == 2).all()
                        present = np.zeros(run.cells, bool)
                        if run.coordinates is not None:
                            present = np.isfinite(run.coordinates).all(axis=1)
                            np.testing.assert_array_equal(
                                batch.coordinates[at][here][present], run.coordinates[present]
                            )
                        np.testing.assert_array_equal(batch.has_coordinates[at][here], present)
                        assert not batch.coordinates[at][here][~present].any()
                        cell, stored = cell + run.cells, end
                rest = slice(piece * width + cell, (piece + 1) * width)
                assert batch.cell_mask[at][piece * width : piece * width + cell].all()
                assert not batch.cell_mask[at][rest].any()
                assert (batch.batch[at][rest] == -1).all()
                assert not batch.has_coordinates[at][rest].any()
                assert (batch.indptr[fold][cell:] == stored).all()
                assert not batch.count[fold][stored:].any()


def test_one_sample_a_row():
    store = mixed_store()
    batches = TrainingBatches(store, everything(store), settings(segments=1))
    batch = batches.batch(0)
    assert batch.segment is None
    assert batch.measured.shape == (1, 2, 1, GENES)
    assert all(len(row.segments) == 1 for step in range(20) for row in batches.describe(step))


def test_more_than_65536_genes():
    store = NumberedStore([np.full(4, 2)], genes=65_537)
    batches = TrainingBatches(store, everything(store), settings(rows=1, cells=4, genes=65_537))
    assert batches.batch(0).gene.dtype == np.uint32


def test_cells_are_dealt_evenly_and_runs_joined():
    assert deal_runs([(0, 10)], 1) == [[(0, 10)]]
    assert deal_runs([(8, 12), (4, 8), (20, 22)], 1) == [[(4, 12), (20, 22)]]
    assert deal_runs([(8, 12), (4, 8), (20, 22)], 3) == [[(8, 12)], [(4, 8)], [(20, 22)]]
    assert deal_runs([(0, 5)], 4) == [[(0, 2)], [(2, 4)], [(4, 5)], []]


@pytest.mark.parametrize("cells", [1, 15, 16, 17, 20, 31, 32, 33, 100])
def test_window_sizes(cells):
    sizes = window_sizes(cells, 16)
    assert sum(sizes) == cells
    assert max(sizes) <= 16
    assert len(sizes) == -(-cells // 16)
    assert min(sizes) >= min(cells, 4)


# The same rows for everybody


@pytest.mark.parametrize("pieces", [1, 2])
def test_batches_do_not_depend_on_who_asks(pieces):
    store, config = mixed_store(), settings(rows=4, accumulate=2, pieces=pieces)
    whole = TrainingBatches(store, everything(store), config)
    wanted = [whole.batch(step) for step in range(6)]
    for processes in (1, 2, 4):
        share = 4 // processes
        for process in range(processes):
            threads = dataclasses.replace(config.data, threads=1 + process, prefetch=1 + process)
            mine = TrainingBatches(
                store, everything(store), dataclasses.replace(config, data=threads)
            )
            start = 2 * (process % 2)  # resumed at another step
            found = list(mine.iterate(start, 6, process * share, share))
            assert len(found) == 6 - start
            for step, batch in enumerate(found, start):
                assert_same(batch, rows_of(wanted[step], process * share, share))
    other = TrainingBatches(store, everything(store), dataclasses.replace(config, seed=1))
    assert (other.batch(0).count != wanted[0].count).any()
    assert list(whole.iterate(3, 3)) == []


def test_other_shapes_of_mesh_and_batch_keep_the_order_of_rows():
    """Rows of the run are numbered through: how many go into a batch changes none of them."""
    store = mixed_store()
    rows = {}
    for number, accumulate in ((2, 1), (4, 1), (1, 4)):
        batches = TrainingBatches(
            store, everything(store), settings(rows=number, accumulate=accumulate)
        )
        steps = 16 // (number * accumulate)
        rows[number, accumulate] = [row for s in range(steps) for row in batches.describe(s)]
    assert rows[2, 1] == rows[4, 1] == rows[1, 4]


def test_stopping_early_leaves_no_threads_and_errors_come_through():
    store = mixed_store()
    batches = TrainingBatches(store, everything(store), settings())
    before = set(threading.enumerate())
    running = batches.iterate(0, 1000)
    next(running)
    started = set(threading.enumerate()) - before
    assert any(thread.name.startswith("rows") for thread in started)
    running.close()
    for thread in started:  # Grain's own are told to stop and not waited for
        thread.join(timeout=30)
    assert not [thread.name for thread in started if thread.is_alive()]

    def broken(sample, start, stop):
        msg = "part 'x' is damaged"
        raise InputError(msg)

    store.read = broken
    with pytest.raises(InputError, match="part 'x' is damaged"):
        list(batches.iterate(0, 5))


def test_data_that_change_during_a_run_are_noticed():
    store = many_samples(4)
    batches = TrainingBatches(store, everything(store), settings(rows=1, cells=10, segments=1))
    grown = NumberedStore([np.full(10, 60)] * 4)
    store.read = grown.read
    with pytest.raises(InputError, match="more stored counts in its cells 0 to 10"):
        batches.batch(0)


# Shapes that hold in every epoch


def nasty_densities(kind, cells, random):
    if kind == "sorted":
        return np.sort(random.geometric(0.03, cells)).clip(1, GENES)
    if kind == "bursts":
        values = np.ones(cells, int)
        values[(np.arange(cells) // 37) % 5 == 0] = GENES
        return values
    if kind == "one dense cell":
        values = np.ones(cells, int)
        values[cells // 3] = GENES
        return values
    if kind == "half empty":
        values = random.integers(0, 2, cells) * GENES
        values[0] = 1
        return np.maximum(values, 1)
    return random.integers(1, GENES + 1, cells)


KINDS = ("sorted", "bursts", "one dense cell", "half empty", "uniform")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("stop", "pieces"), [(1000, 1), (930, 1), (1000, 4)])
def test_bounds_hold_in_every_epoch_and_are_close(kind, spatial, stop, pieces):
    random = np.random.default_rng(5)
    place = random.random((1000, 2)).astype(np.float32) if spatial else None
    nonzeros = nasty_densities(kind, 1000, random)
    store = NumberedStore([nonzeros], [place])
    source = Source(store, SampleRange(0, 0, stop), 128, pieces, 4)
    assert list(source.sizes) == list(range(4, 129, 4)) if pieces == 1 else source.sizes[-1] == 32
    most = np.zeros(len(source.sizes), int)
    for epoch in range(60):
        sequence = np.concatenate(
            [np.arange(*run) for segment in source.runs(0, stop - 1, 0, epoch) for run in segment]
        )
        offsets = np.concatenate([[0], np.cumsum(nonzeros[sequence])])
        for i, size in enumerate(source.sizes):
            most[i] = max(most[i], (offsets[size:] - offsets[:-size]).max())
    assert (most <= source.bounds).all()
    assert (np.diff(source.bounds) >= 0).all()
    assert source.largest(0) == 0
    for size in (1, 7, 32):
        assert source.bound(size) >= most[np.searchsorted(source.sizes, size, side="right") - 1] * (
            size in source.sizes
        )
    # In a random order, which is how dissociated cells are stored, little is given away.
    if kind == "uniform":
        assert source.bounds[-1] <= 1.15 * most[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_shapes_are_never_exceeded(kind, pieces):
    random = np.random.default_rng(1)
    sizes = np.maximum(1, random.lognormal(np.log(60), 1.0, 25).astype(int))
    places = [random.random((n, 2)) if i % 3 == 0 else None for i, n in enumerate(sizes)]
    store = NumberedStore([nasty_densities(kind, n, random) for n in sizes], places)
    ranges = [SampleRange(i, 0, max(1, int(n) - i % 4)) for i, n in enumerate(sizes)]
    batches = TrainingBatches(store, ranges, settings(rows=1, cells=128, segments=6, pieces=pieces))
    shape = batches.batch(0).count.shape
    assert shape[-1] == batches.nonzeros
    for step in range(6 * batches.rows_per_epoch):
        batch = batches.batch(step)  # raises where something does not fit
        assert batch.count.shape == shape
    cells = sum(p.cells for p in ranges)
    assert batches.padding < 0.25
    assert cells == round((1 - batches.padding) * batches.rows_per_epoch * 128)


def lognormal_store(cells, densities, seed=0, spatial=0.0):
    """Samples of median 900 cells, sigma 1, of these mean numbers of stored counts; only their offsets exist."""
    random = np.random.default_rng(seed)
    sizes = []
    while sum(sizes) < cells:
        sizes.append(max(2, int(random.lognormal(np.log(900), 1.0))))
    nonzeros = [
        random.normal(mean, mean / 4, n).clip(1, 2 * mean).astype(int)
        for n, mean in zip(sizes, random.choice(densities, len(sizes)), strict=True)
    ]
    places = [np.zeros((n, 2)) if random.random() < spatial else None for n in sizes]
    return NumberedStore(nonzeros, places)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cells", [100_000, 1_000_000])
@pytest.mark.parametrize(
    ("densities", "spare"),
    [([1500], 1.06), ([500, 1500, 3000], 1.7), ([1500] * 19 + [9000], 1.5)],
)
def test_padding_of_log_normal_samples(cells, densities, spare, seed):
    """At most a tenth of the places stay empty, whatever the densities, and the nonzero axis is not much longer than
    what it holds on average."""
    store = lognormal_store(cells, densities, seed, spatial=0.3)
    ranges = split_heldout(store, DataConfig(), 0)[0]
    config = settings(rows=16, cells=2048, segments=16)
    batches = TrainingBatches(store, ranges, config)
    assert batches.padding <= (0.06 if cells == 100_000 else 0.03)
    stored = sum(store.samples[p.sample].nonzeros for p in ranges)
    assert batches.nonzeros * batches.rows_per_epoch <= spare * stored


def test_dense_samples_get_smaller_windows():
    random = np.random.default_rng(0)
    sparse_cells = [random.integers(5, 8, 200 + 17 * i) for i in range(40)]
    store = NumberedStore([*sparse_cells, np.full(500, GENES)])
    batches = TrainingBatches(store, everything(store), settings(rows=1, cells=100))
    rows = [row for step in range(batches.rows_per_epoch) for row in batches.describe(step)]
    dense = [segment.cells for row in rows for segment in row.segments if segment.sample == 40]
    assert sum(dense) == 500
    assert max(dense) < 50
    assert batches.nonzeros < 100 * GENES / 2
    assert batches.padding < 0.03


# Windows of tissue


@pytest.mark.parametrize("stop", [4096, 3700])
def test_windows_of_tissue_are_neighbourhoods(stop):
    random = np.random.default_rng(0)
    place = random.random((4096, 2)).astype(np.float32)
    place = place[np.argsort(moore_curve(place))]
    store = NumberedStore([np.ones(4096, int)], [place])
    batches = TrainingBatches(store, [SampleRange(0, 0, stop)], settings(rows=1, cells=256))
    first_cells, spreads = set(), []
    for step in range(5 * batches.rows_per_epoch):
        for row in batches.describe(step):
            for segment in row.segments:
                inside = np.concatenate([np.arange(*run) for run in segment.pieces[0]])
                first_cells.add(int(inside[0]))
                here = place[inside]
                radius = np.sqrt(((here - here.mean(axis=0)) ** 2).sum(axis=1).mean())
                spreads.append(radius / np.sqrt(len(inside) / 4096))
    assert len(first_cells) > 2 * batches.rows_per_epoch
    # Root mean square radius over the side of a square of as many cells: .41 for a square, .46 for two beside each
    # other, 4 * .41 for random cells of this sample.
    assert max(spreads) < 0.75
    assert np.mean(spreads) < 0.5


def test_tissue_of_which_a_part_is_trained_on_without_packing_keeps_its_windows():
    place = np.linspace(0, 1, 60, dtype=np.float32)[:, None].repeat(2, axis=1)
    store = NumberedStore([np.ones(60, int)], [place])
    for changes in ({"segments": 1}, {"pieces": 2}):
        batches = TrainingBatches(
            store, [SampleRange(0, 0, 50)], settings(rows=1, cells=16, **changes)
        )
        for step in range(12):
            for row in batches.describe(step):
                runs = sorted(run for s in row.segments for runs in s.pieces for run in runs)
                assert runs[-1][1] - runs[0][0] == row.cells


# Held-out batches


def test_heldout_batches_are_fixed_and_labelled():
    store, config = mixed_store(), settings(rows=4)
    ranges = [SampleRange(i, 0, store.samples[i].cells) for i in (1, 3, 4, 6)]
    one, two = (heldout_batches(store, ranges, config) for _ in range(2))
    assert len({batch.count.shape for batch, _, _ in one}) == 1
    seen = []
    for (batch, labels, samples), (again, _, _) in zip(one, two, strict=True):
        assert_same(batch, again)
        assert batch.cell_mask.shape == labels.shape == samples.shape == (4, 64)
        np.testing.assert_array_equal(samples, batch.batch)
        cells = cells_in(batch)
        seen += map(tuple, cells.tolist())
        np.testing.assert_array_equal(labels[batch.cell_mask], cells[:, 1] % 2)
        assert (labels[~batch.cell_mask] == -1).all()
    # There is room for all of them: each once.
    assert len(seen) == len(set(seen)) == sum(p.cells for p in ranges)
    assert not np.asarray(one[-1][0].cell_mask)[-1].any()  # filled up with empty rows
    store.label_names = []
    assert heldout_batches(store, ranges, config)[0][1] is None
    assert heldout_batches(store, [], config) == []


def test_heldout_windows_are_spread():
    store = many_samples(50, cells=16)
    config = settings(cells=8)
    few = heldout_batches(store, everything(store), config, maximum=10)
    cells = np.concatenate([cells_in(batch) for batch, _, _ in few])
    assert len(cells) == 80
    assert len(np.unique(cells[:, 0])) == 10
    assert np.diff(np.unique(cells[:, 0])).max() <= 6
    large = NumberedStore([np.ones(800, int), np.ones(8, int), np.ones(80, int)])
    found = heldout_batches(
        large, [SampleRange(0, 400, 800), *everything(large)[1:]], config, maximum=9
    )
    cells = np.concatenate([cells_in(batch) for batch, _, _ in found])
    assert [int((cells[:, 0] == i).sum()) // 8 for i in range(3)] == [4, 1, 4]
    first = np.unique(cells[cells[:, 0] == 0, 1] // 8)
    assert first.min() >= 50
    assert np.ptp(first) > 30


def test_heldout_rows_in_pieces():
    store = mixed_store()
    found = heldout_batches(store, everything(store), settings(pieces=4), maximum=5)
    for batch, _, samples in found:
        assert batch.count.shape[:2] == (2, 4)
        assert ((samples >= 0) == batch.cell_mask).all()
    assert sum(batch.cell_mask.sum() for batch, _, _ in found) > 0


# Means and eigenvectors


def test_gene_means_count_cells_that_measure_the_gene():
    samples = make_samples(4, 300)
    panel = np.arange(len(VOCABULARY)) % 2 == 0
    samples[1] = dataclasses.replace(
        samples[1], counts=samples[1].counts.multiply(panel).tocsr(), measured=panel
    )
    store = MemoryStore(samples, VOCABULARY)
    dense = [sample.counts.toarray() for sample in samples]
    wanted = np.where(
        panel,
        np.concatenate(dense).mean(axis=0),
        np.concatenate([dense[i] for i in (0, 2, 3)]).mean(axis=0),
    )
    found = gene_means(store, everything(store))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    part = gene_means(store, [SampleRange(2, 10, 20)])
    np.testing.assert_allclose(
        part,
        np.diff(store.read(2, 10, 20).indptr).sum() * 0 + dense_mean(store, 2, 10, 20),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(gene_means(store, [SampleRange(1, 0, 300)])[~panel], 0)


def dense_mean(store, sample, start, stop):
    run = store.read(sample, start, stop)
    return np.bincount(run.gene, run.count, len(store.genes)) / run.cells


def test_gene_means_of_many_cells_are_estimated_from_all_ranges():
    store = MemoryStore(make_samples(6, 2000), VOCABULARY)
    read, original = [], store.read

    def counted(sample, start, stop):
        read.append((sample, stop - start))
        return original(sample, start, stop)

    exact = gene_means(store, everything(store))
    store.read = counted
    found = gene_means(store, everything(store), maximum_cells=3000)
    assert sum(n for _, n in read) <= 3000
    assert {sample for sample, _ in read} == set(range(6))
    np.testing.assert_allclose(found, exact, rtol=0.3, atol=0.05)


def test_laplacian_eigenvectors_are_those_of_the_sample():
    random = np.random.default_rng(0)
    places = [random.random((n, 2)).astype(np.float32) for n in (90, 30)]
    places[0][5] = np.nan
    store = NumberedStore([np.ones(90, int), np.ones(30, int), np.ones(20, int)], [*places, None])
    config = settings(rows=1, cells=64, positions="laplacian")
    batches = TrainingBatches(store, everything(store), config)
    for step in range(batches.rows_per_epoch):
        batch = batches.batch(step)
        assert batch.eigenvectors.shape == (1, 1, 64, 3)
        cells, found = cells_in(batch), batch.eigenvectors[batch.cell_mask]
        for sample, place in enumerate(places):
            present = np.isfinite(place).all(axis=1)
            wanted = np.zeros((len(place), 3), np.float32)
            wanted[present] = laplacian_eigenvectors(place[present], 3)
            mine = cells[:, 0] == sample
            np.testing.assert_array_equal(found[mine], wanted[cells[mine, 1]])
        assert not found[cells[:, 0] == 2].any()
    store = make_store()
    assert (
        TrainingBatches(store, everything(store), settings(genes=40)).batch(0).eigenvectors is None
    )


def test_pieces_must_divide_a_row():
    with pytest.raises(ConfigError, match=r"mesh\.cells = 3"):
        settings(pieces=3)


# A corpus on disk is read like samples in memory


def test_a_corpus_gives_the_same_rows_as_memory(tmp_path):
    memory = MemoryStore(make_samples(5, 70), VOCABULARY)
    write_genes(tmp_path, VOCABULARY)
    runs = [memory.read(i, 0, 70) for i in range(5)]
    with PartWriter(
        tmp_path, "part", VOCABULARY, np.concatenate([np.diff(r.indptr) for r in runs])
    ) as writer:
        for run in runs:
            writer.append(run.gene, run.count)
        nowhere = np.full((70, 2), np.nan, np.float32)
        writer.finish(
            [PartSample(f"sample {i}", 70, spatial=i % 2 == 1) for i in range(5)],
            dataset_name="dataset 0",
            cell_names=[str(i) for i in range(350)],
            coordinates=np.concatenate(
                [nowhere if r.coordinates is None else r.coordinates for r in runs]
            ),
        )
    write_index(tmp_path, ["part"])
    corpus = open_corpus(tmp_path)
    config = settings(rows=2, cells=32, genes=len(VOCABULARY))
    for one, two in zip(*(split_heldout(s, config.data, 0) for s in (memory, corpus)), strict=True):
        assert one == two
    ours = TrainingBatches(memory, everything(memory), config)
    theirs = TrainingBatches(corpus, everything(corpus), config)
    assert ours.nonzeros == theirs.nonzeros
    for step, batch in enumerate(theirs.iterate(0, 8)):
        assert_same(batch, ours.batch(step))
