"""Samples into padded batches: nothing is lost, nothing depends on anything but (seed, step)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from cellplm_jax.config import DataConfig
from cellplm_jax.data.batches import (
    Sample,
    TrainingBatches,
    bucket,
    heldout_batches,
    laplacian_eigenvectors,
    pad_batch,
    scale_coordinates,
    split_heldout,
    window,
)
from cellplm_jax.errors import InputError
from tests.conftest import make_counts, make_samples


def names(samples):
    return [sample.name for sample in samples]


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
    with pytest.raises(InputError, match="expected at most"):
        pad_batch(samples, nonzeros=samples[0].counts.nnz - 1)


# Holding out


def cells_of(samples):
    """Cells as rows of bytes, to be counted."""
    return sorted(row.tobytes() for sample in samples for row in sample.counts.toarray())


@pytest.mark.parametrize(
    ("number", "cells", "fraction"),
    [(3, 40, 0.1), (20, 5, 0.1), (10, 5, 0.1), (2, 10, 0.9), (1, 10, 0.7), (1, 1, 0.9), (4, 1, 0.2),
     (3, 5, 1 / 3), (2, 2, 0.99), (1, 2, 0.99)],
)  # fmt: skip
def test_split_loses_nothing_and_leaves_something_to_train_on(number, cells, fraction):
    samples = make_samples(number, cells)
    train, heldout = split_heldout(samples, fraction, seed=0)
    assert cells_of(train + heldout) == cells_of(samples)
    assert all(sample.cells > 0 for sample in train + heldout)
    assert train
    if number * fraction >= 1 and number > 1:
        assert not set(names(train)) & set(names(heldout))
        assert len(heldout) == min(max(1, round(number * fraction)), number - 1)
    elif cells > 1:
        assert len(heldout) == number
        assert all("held-out" in name for name in names(heldout))
        wanted = min(round(cells * fraction), cells - 1)
        assert {sample.cells for sample in heldout} == {wanted}


def test_split_takes_places_along():
    sample = make_samples(2, 40)[1]
    [train], [heldout] = split_heldout([sample], 0.25, seed=3)
    table = {row.tobytes(): place for row, place in
             zip(sample.counts.toarray(), sample.coordinates, strict=True)}  # fmt: skip
    for part in (train, heldout):
        for row, place in zip(part.counts.toarray(), part.coordinates, strict=True):
            np.testing.assert_array_equal(table[row.tobytes()], place)


def test_split_depends_on_the_seed_alone():
    samples = make_samples(20, 3)
    once, again, other = (names(split_heldout(samples, 0.2, seed=s)[1]) for s in (0, 0, 1))
    assert once == again
    assert once != other
    assert len(once) == 4
    assert split_heldout(samples, 0.0, seed=0) == (samples, [])


# Windows and training batches


def test_windows_of_dissociated_cells_are_random():
    sample = make_samples(1, 50)[0]
    generator = np.random.default_rng(0)
    cut = window(sample, 10, generator)
    assert cut.cells == 10
    assert set(cells_of([cut])) <= set(cells_of([sample]))
    assert cells_of([window(sample, 10, generator)]) != cells_of([cut])
    assert window(sample, 50, generator) is sample


def test_windows_of_tissue_are_neighbourhoods():
    sample = make_samples(2, 200)[1]
    place = sample.coordinates.copy()
    place[:20] = np.nan
    sample = dataclasses.replace(sample, coordinates=place)
    cut = window(sample, 25, np.random.default_rng(0))
    assert cut.cells == 25
    assert np.isfinite(cut.coordinates).all()
    distance = cdist(cut.coordinates, place[20:])
    # Some cell of the window has the window as its nearest neighbours.
    inside = {tuple(row) for row in cut.coordinates.tolist()}
    nearest = [
        {tuple(row) for row in place[20:][np.argsort(row_of_distances)[:25]].tolist()}
        for row_of_distances in distance
    ]
    assert inside in nearest
    few = dataclasses.replace(
        sample, coordinates=np.where(np.arange(200)[:, None] < 9, place, np.nan)
    )
    assert window(few, 25, np.random.default_rng(0)).cells == 25


def test_training_batches_are_a_function_of_seed_and_step():
    samples = make_samples(3, 40)
    config = DataConfig(samples=4, cells=16)
    batches = TrainingBatches(samples, config, seed=0)
    again = TrainingBatches(samples, config, seed=0)
    assert batches[0].cell_mask.shape == (4, 16)
    np.testing.assert_array_equal(batches[7].count, again[7].count)
    np.testing.assert_array_equal(batches[7].gene, batches[7].gene)
    assert np.any(batches[7].count != batches[8].count)
    assert np.any(batches[7].count != TrainingBatches(samples, config, seed=1)[7].count)


def test_samples_are_drawn_by_their_number_of_windows():
    large, small = make_samples(2, 96)[0], make_samples(2, 8)[1]
    config = DataConfig(samples=8, cells=16)
    batches = TrainingBatches([large, small], config, seed=0)
    drawn = np.concatenate([np.asarray(batches[i].batch)[:, 0] for i in range(100)])
    assert (drawn == 0).mean() == pytest.approx(6 / 7, abs=0.04)
    assert {batches[i].count.shape for i in range(50)} == {(8, 1024)}


def test_denser_draws_take_the_next_bucket():
    counts = np.zeros((200, 400), np.float32)
    counts[:8] = make_counts(8, genes=400) + 1  # a few cells hold nearly everything
    sample = Sample("uneven", sparse.csr_matrix(counts))
    batches = TrainingBatches([sample], DataConfig(samples=1, cells=100), seed=0)
    for step in range(10):
        batch = batches[step]
        dense = np.asarray(batch.dense_counts(400))[0]
        assert {row.tobytes() for row in dense} <= {row.tobytes() for row in counts}
        assert np.asarray(batch.indptr)[0, -1] == np.count_nonzero(dense)


def test_no_sample_left():
    with pytest.raises(InputError, match="no training sample left"):
        TrainingBatches([], DataConfig(), seed=0)


def test_heldout_batches_are_the_same_every_time():
    config = DataConfig(samples=4, cells=16)
    samples = make_samples(5, 40)
    one, two = (list(heldout_batches(samples, config)) for _ in range(2))
    assert len(one) == 5
    for a, b in zip(one, two, strict=True):
        assert a.cell_mask.sum() == 16
        np.testing.assert_array_equal(a.count, b.count)
    assert len(list(heldout_batches(samples, config, maximum=2))) == 2
