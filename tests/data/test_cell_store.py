"""The order in which cells are stored: random, or along a closed curve that keeps neighbours together."""

from __future__ import annotations

import numpy as np
import pytest

from cellplm_jax.data.cell_store import CellRun, moore_curve, storage_order


def spread(place):
    """Root mean square distance from the centre."""
    return np.sqrt(((place - place.mean(axis=0)) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_the_curve_visits_every_place_by_single_steps_and_closes(order):
    side = 1 << order
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    along = moore_curve((places + 0.5) / side, order)
    assert along.dtype == np.int64
    np.testing.assert_array_equal(np.sort(along), np.arange(side * side))
    walk = places[np.argsort(along)]
    steps = np.abs(walk - np.roll(walk, 1, axis=0)).sum(axis=1)
    np.testing.assert_array_equal(steps, 1)  # the first one too: the end meets the start


def test_the_curve_takes_the_border_and_no_points_at_all():
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [1 + 1e-6, -1e-9]], np.float32)
    along = moore_curve(corners)
    assert (along >= 0).all()
    assert (along < 4**10).all()
    assert along[4] == along[2]
    assert moore_curve(np.empty((0, 2))).shape == (0,)


@pytest.mark.parametrize("shape", ["square", "strip", "clusters"])
def test_runs_along_the_curve_are_neighbourhoods(shape):
    random = np.random.default_rng(0)
    place = random.random((4000, 2))
    if shape == "strip":
        place[:, 1] *= 0.1
    if shape == "clusters":
        place = (random.integers(0, 3, (4000, 2)) / 3 + 0.05 * random.random((4000, 2))).clip(0, 1)
    stored = place[storage_order(4000, place, random)]
    around = np.concatenate([stored, stored[:200]])
    runs = [spread(around[i : i + 200]) for i in range(0, 4000, 50)]
    by_chance = np.mean([spread(place[random.choice(4000, 200, replace=False)]) for _ in range(20)])
    assert np.mean(runs) < 0.4 * by_chance
    # Runs across the end as well. Islands and a strip, which a closed curve passes once only, make it jump somewhere.
    far = [run for run in runs if run > 0.7 * by_chance]
    assert len(far) <= (0 if shape == "square" else 0.1 * len(runs))


def test_dissociated_cells_are_stored_in_random_order():
    one, again = (storage_order(5000, None, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(np.sort(one), np.arange(5000))
    assert (one != storage_order(5000, None, np.random.default_rng(4))).any()
    # Any run is a fair draw of the whole: its mean is near that of all.
    means = one.reshape(20, 250).mean(axis=1)
    assert np.abs(means - 2499.5).max() < 4 * 5000 / np.sqrt(12 * 250)


def test_cells_without_coordinates_come_last_in_random_order():
    random = np.random.default_rng(0)
    place = random.random((300, 2)).astype(np.float32)
    missing = np.sort(random.choice(300, 90, replace=False))
    place[missing[:40]] = np.nan
    place[missing[40:60], 0] = np.nan
    place[missing[60:], 1] = np.inf
    order = storage_order(300, place, random)
    np.testing.assert_array_equal(np.sort(order), np.arange(300))
    np.testing.assert_array_equal(np.sort(order[-90:]), missing)
    assert (order[-90:] != missing).any()
    along = moore_curve(place[order[:-90]])
    assert (np.diff(along) >= 0).all()


def test_cells_of_one_place_are_in_random_order():
    place = np.full((100, 2), 0.25)
    order = storage_order(100, place, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert (order != np.arange(100)).any()


@pytest.mark.parametrize("cells", [0, 1, 2])
def test_few_cells(cells):
    for place in (None, np.zeros((cells, 2)), np.full((cells, 2), np.nan)):
        order = storage_order(cells, place, np.random.default_rng(0))
        np.testing.assert_array_equal(np.sort(order), np.arange(cells))


def test_a_run_knows_its_cells():
    nothing = np.zeros(0, np.uint16)
    assert CellRun(np.zeros(1, np.int64), nothing, nothing).cells == 0
    assert CellRun(np.zeros(4, np.int64), nothing, nothing).cells == 3
