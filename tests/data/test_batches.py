"""Samples in memory: their coordinates, padded for the device, and as a store that training reads."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from cellplm_jax.data.batches import (
    MemoryStore,
    Sample,
    bucket,
    laplacian_eigenvectors,
    pad_batch,
    scale_coordinates,
)
from cellplm_jax.data.cell_store import moore_curve
from cellplm_jax.errors import InputError
from tests.conftest import VOCABULARY, make_samples

# Coordinates


def test_scaled_coordinates_keep_their_proportions():
    place = np.array([[100.0, 50.0], [300.0, 150.0], [200.0, 50.0], [np.nan, np.nan]])
    scaled = scale_coordinates(place)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[:3], [[0, 0], [1, 0.5], [0.5, 0]])
    assert np.isnan(scaled[3]).all()
    np.testing.assert_allclose(scale_coordinates(place * 1e-3 - 7), scaled, atol=1e-6)
    distances, before = cdist(scaled[:3], scaled[:3]), cdist(place[:3], place[:3])
    np.testing.assert_allclose(distances, before / 200, atol=1e-6)


def test_scaled_coordinates_of_special_cases():
    np.testing.assert_array_equal(scale_coordinates(np.array([[5.0, 7.0]])), [[0, 0]])
    np.testing.assert_array_equal(scale_coordinates(np.full((3, 2), 4.0)), np.zeros((3, 2)))
    assert np.isnan(scale_coordinates(np.full((3, 2), np.nan))).all()
    assert scale_coordinates(np.empty((0, 2))).shape == (0, 2)
    half = np.array([[0.0, 1.0], [np.inf, 3.0], [2.0, np.nan], [4.0, 2.0]])
    scaled = scale_coordinates(half)
    np.testing.assert_allclose(scaled[[0, 3]], [[0, 0], [1, 0.25]])
    assert np.isnan(scaled[[1, 2]]).all()
    large = scale_coordinates(np.array([[1e9, 1e9], [1e9 + 1, 1e9]]))
    np.testing.assert_allclose(large, [[0, 0], [1, 0]])


@pytest.mark.parametrize("cells", [40, 100])
def test_laplacian_eigenvectors_are_eigenvectors(cells):
    """Both solvers, against the graph built once more by brute force."""
    place = np.random.default_rng(0).random((cells, 2))
    count, neighbors = 4, 6
    vectors = laplacian_eigenvectors(place, count, neighbors=neighbors)
    distance = cdist(place, place)
    np.fill_diagonal(distance, np.inf)
    graph = np.zeros((cells, cells))
    for row, near in enumerate(np.argsort(distance, axis=1)[:, :neighbors]):
        graph[row, near] = graph[near, row] = 1
    scale = 1 / np.sqrt(graph.sum(1))
    laplacian = np.eye(cells) - scale[:, None] * graph * scale[None, :]
    values = np.linalg.eigvalsh(laplacian)[1 : count + 1]
    assert vectors.shape == (cells, count)
    np.testing.assert_allclose((vectors**2).mean(0), 1, rtol=1e-4)
    np.testing.assert_allclose(laplacian @ vectors, vectors * values, atol=2e-4)
    np.testing.assert_array_equal(laplacian_eigenvectors(place, count), vectors)


@pytest.mark.parametrize("cells", [0, 1, 2, 3, 4])
def test_laplacian_eigenvectors_of_few_cells(cells):
    place = np.random.default_rng(0).random((cells, 2))
    vectors = laplacian_eigenvectors(place, 5)
    assert vectors.shape == (cells, 5)
    assert np.isfinite(vectors).all()
    assert (vectors[:, max(cells - 1, 0) :] == 0).all()


def test_laplacian_eigenvectors_of_one_place():
    assert np.isfinite(laplacian_eigenvectors(np.zeros((80, 2)), 3)).all()


# Padding


def test_buckets():
    sizes = range(1, 5000)
    found = [bucket(size) for size in sizes]
    assert all(value >= size for value, size in zip(found, sizes, strict=True))
    assert found == sorted(found)
    assert all(value <= max(32, 1.5 * size) for value, size in zip(found, sizes, strict=True))
    assert len(set(found)) <= 2 * math.log2(max(found) / 32) + 1
    assert [bucket(n) for n in (32, 33, 48, 49, 64, 65)] == [32, 48, 48, 64, 64, 96]
    assert bucket(1025, 1024) == 1536


def test_batch_holds_every_count():
    samples = [
        dataclasses.replace(sample, dataset=i, platform=5 - i)
        for i, sample in enumerate(make_samples(3, 20))
    ]
    samples[2] = samples[2].take(np.arange(7))
    batch = pad_batch(samples, cells=24, nonzeros=1024)
    dense = np.asarray(batch.dense_counts(40))
    for row, sample in enumerate(samples):
        n = sample.cells
        np.testing.assert_array_equal(dense[row, :n], sample.counts.toarray())
        assert (dense[row, n:] == 0).all()
        np.testing.assert_array_equal(batch.cell_mask[row], np.arange(24) < n)
        assert (np.asarray(batch.batch)[row, :n] == row).all()
        assert (np.asarray(batch.batch)[row, n:] == -1).all()
        assert (np.asarray(batch.platform)[row, :n] == 5 - row).all()
        assert (
            np.asarray(batch.has_coordinates)[row, :n] == (sample.coordinates is not None)
        ).all()
    assert not np.asarray(batch.has_coordinates)[:, 20:].any()
    np.testing.assert_array_equal(batch.coordinates[1, :20], samples[1].coordinates)
    assert batch.eigenvectors is None
    assert np.asarray(batch.measured).all()
    for leaf in (batch.indptr, batch.gene, batch.batch):
        assert leaf.dtype == np.int32
    assert batch.count.dtype == np.float32


def test_batch_details():
    sample = make_samples(2, 6)[1]
    place = sample.coordinates.copy()
    place[2, 1] = np.nan
    sample = dataclasses.replace(
        sample,
        coordinates=place,
        eigenvectors=np.arange(18, dtype=np.float32).reshape(6, 3),
        measured=np.arange(40) > 3,
    )
    batch = pad_batch([sample], eigenvectors=2)
    assert batch.cell_mask.shape == (1, 32)
    assert batch.count.shape == (1, 1024)
    np.testing.assert_array_equal(np.asarray(batch.has_coordinates)[0, :6], np.arange(6) != 2)
    assert np.isfinite(batch.coordinates).all()
    np.testing.assert_array_equal(batch.eigenvectors[0, :6], sample.eigenvectors[:, :2])
    np.testing.assert_array_equal(batch.measured[0], np.arange(40) > 3)
    empty = Sample("empty", sparse.csr_matrix((2, 40), dtype=np.float32))
    dense = np.asarray(pad_batch([empty, sample]).dense_counts(40))
    assert (dense[0] == 0).all()
    assert dense[1].sum() == sample.counts.sum()


def test_what_does_not_fit_is_refused():
    samples = make_samples(1, 20)
    with pytest.raises(InputError, match="20 cells"):
        pad_batch(samples, cells=19)
    with pytest.raises(InputError, match="expected a maximum of"):
        pad_batch(samples, nonzeros=samples[0].counts.nnz - 1)


def test_taking_cells_takes_everything_of_theirs():
    sample = dataclasses.replace(
        make_samples(2, 30)[1], eigenvectors=np.arange(60.0).reshape(30, 2)
    )
    index = np.array([7, 3, 21])
    part = sample.take(index, "part")
    assert (part.name, part.cells, part.batch) == ("part", 3, sample.batch)
    np.testing.assert_array_equal(part.counts.toarray(), sample.counts.toarray()[index])
    np.testing.assert_array_equal(part.coordinates, sample.coordinates[index])
    np.testing.assert_array_equal(part.eigenvectors, sample.eigenvectors[index])
    assert sample.take(index).name == sample.name
    assert make_samples(1)[0].take(index).coordinates is None


# A store


def read_all(store, number):
    """A whole sample of a store: dense counts and its run."""
    run = store.read(number, 0, store.samples[number].cells)
    shape = (run.cells, len(store.genes))
    return sparse.csr_matrix((run.count, run.gene, run.indptr), shape=shape).toarray(), run


def test_a_store_keeps_every_cell_with_its_place():
    samples = make_samples(4, 50)
    store = MemoryStore(samples, VOCABULARY)
    assert store.genes == VOCABULARY
    assert store.label_names == []
    assert store.clipped == 0
    for number, sample in enumerate(samples):
        counts, run = read_all(store, number)
        record = store.samples[number]
        place = np.zeros((50, 2)) if sample.coordinates is None else sample.coordinates
        stored = np.zeros((50, 2)) if run.coordinates is None else run.coordinates
        wanted = np.column_stack([sample.counts.toarray(), place])
        found = np.column_stack([counts, stored])
        assert sorted(map(tuple, wanted)) == sorted(map(tuple, found))
        assert (run.gene.dtype, run.count.dtype, run.indptr.dtype) == (
            np.uint16,
            np.uint16,
            np.int64,
        )
        assert (record.name, record.cells, record.nonzeros) == (sample.name, 50, sample.counts.nnz)
        assert (record.batch, record.dataset, record.platform) == (number, 0, -1)
        assert record.spatial == (sample.coordinates is not None)
        assert run.labels is None
        if record.spatial:
            assert (np.diff(moore_curve(run.coordinates)) >= 0).all()
        else:
            assert (counts != sample.counts.toarray()).any()  # in another order


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (13, 37), (49, 50), (50, 50)])
def test_a_run_is_a_part_of_the_whole(start, stop):
    store = MemoryStore(make_samples(2, 50), VOCABULARY)
    for number in range(2):
        whole = store.read(number, 0, 50)
        run = store.read(number, start, stop)
        assert run.cells == stop - start
        assert run.indptr[0] == 0
        np.testing.assert_array_equal(np.diff(run.indptr), np.diff(whole.indptr)[start:stop])
        low, high = whole.indptr[start], whole.indptr[stop]
        np.testing.assert_array_equal(run.gene, whole.gene[low:high])
        np.testing.assert_array_equal(run.count, whole.count[low:high])
        np.testing.assert_array_equal(store.indptr(number), whole.indptr)
        if number:
            np.testing.assert_array_equal(run.coordinates, whole.coordinates[start:stop])
        else:
            assert run.coordinates is None


def test_counts_too_large_to_store_are_clipped_and_counted():
    counts = np.array([[0, 65_535, 65_536, 3], [0, 0, 0, 0], [1e6, 1, 0, 0]], np.float32)
    store = MemoryStore([Sample("large", sparse.csr_matrix(counts))], ["a", "b", "c", "d"])
    assert store.clipped == 2
    found, _ = read_all(store, 0)
    wanted = np.minimum(counts, 65_535)
    assert sorted(map(tuple, found)) == sorted(map(tuple, wanted))


def test_many_genes_need_a_wider_index():
    genes = [str(i) for i in range(65_537)]
    wide = sparse.csr_matrix(([1.0, 2.0], ([0, 1], [65_536, 3])), shape=(2, 65_537))
    counts, run = read_all(MemoryStore([Sample("wide", wide)], genes), 0)
    assert run.gene.dtype == np.uint32
    assert sorted(counts[:, 65_536]) == [0, 1]
    narrow = MemoryStore([Sample("narrow", wide[:, :65_536].tocsr())], genes[:65_536])
    assert narrow.read(0, 0, 2).gene.dtype == np.uint16


def test_measured_genes_are_those_of_the_sample():
    panel = np.arange(40) > 3
    one, two = make_samples(2, 5)
    store = MemoryStore([one, dataclasses.replace(two, measured=panel)], VOCABULARY)
    assert store.measured(0) is None
    np.testing.assert_array_equal(store.measured(1), panel)


def test_the_fingerprint_names_the_data_and_their_order():
    samples = make_samples(3, 20)
    first = MemoryStore(samples, VOCABULARY).fingerprint()
    assert MemoryStore(make_samples(3, 20), VOCABULARY).fingerprint() == first
    renamed = [dataclasses.replace(samples[0], name="other"), *samples[1:]]
    shorter = [samples[0].take(np.arange(19)), *samples[1:]]
    for other in (
        MemoryStore(samples[::-1], VOCABULARY),
        MemoryStore(samples[:2], VOCABULARY),
        MemoryStore(renamed, VOCABULARY),
        MemoryStore(shorter, VOCABULARY),
        MemoryStore(samples, VOCABULARY[::-1]),
    ):
        assert other.fingerprint() != first


def test_the_order_of_a_sample_depends_on_the_seed_and_its_number_alone():
    samples = make_samples(3, 60)
    runs = [
        MemoryStore(samples, VOCABULARY, seed=0).read(0, 0, 60),
        MemoryStore(samples[:1], VOCABULARY, seed=0).read(0, 0, 60),
        MemoryStore(samples, VOCABULARY, seed=1).read(0, 0, 60),
    ]
    np.testing.assert_array_equal(runs[0].gene, runs[1].gene)
    assert not np.array_equal(runs[0].gene, runs[2].gene)


def test_samples_of_another_vocabulary_are_refused():
    with pytest.raises(InputError, match="sample 'sample 0' has 40 genes, the vocabulary 39"):
        MemoryStore(make_samples(1), VOCABULARY[:39])


def test_an_empty_sample_is_stored():
    store = MemoryStore(
        [Sample("nothing", sparse.csr_matrix((0, 40), dtype=np.float32)), *make_samples(1, 3)],
        VOCABULARY,
    )
    assert [record.cells for record in store.samples] == [0, 3]
    assert store.read(0, 0, 0).cells == 0
