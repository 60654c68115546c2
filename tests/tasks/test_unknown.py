"""Cells of unknown type: found if they are, left alone if they are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.evaluate.annotation import auroc
from cellplm_jax.tasks.annotation_pool import choose_pool, neighbor_votes
from cellplm_jax.tasks.unknown import (
    FAR,
    REFERENCE_CELLS,
    UnknownDetector,
    _stratified,
    latent_map,
)

NAMES = ["a", "b", "c", "d"]


def counts_of(types, *, seed, shift=0.0, genes=300):
    """Poisson counts of cells: each type has a programme of its own; ``shift``: strength of a batch effect."""
    programme = np.random.default_rng(3).gamma(0.5, 2.0, (5, genes))
    # The last type is a neighbour of the first one: a fifth of its genes differ.
    programme[4] = np.where(np.arange(genes) % 5 == 0, programme[4], programme[0])
    random = np.random.default_rng(seed)
    rate = programme[types] * np.exp(shift * np.random.default_rng(9).normal(size=genes))
    return sparse.csr_matrix(random.poisson(rate).astype(np.float32))


def types_of(*sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.fixture(scope="module")
def detector():
    codes = types_of(80, 80, 80, 80)
    found = UnknownDetector.fit(counts_of(codes, seed=0), codes, 4)
    assert found is not None
    return found


def compared(detector, types, *, seed=1, rate=0.05, **options):
    cells = detector.project(counts_of(types, seed=seed, **options))
    return detector.compare(cells, NAMES, rate=rate)


def test_a_type_without_labelled_cells_is_found(detector):
    types = types_of(60, 60, 60, 60, 60)
    found = compared(detector, types)
    new = types == 4
    assert auroc(new, found.score) > 0.97
    assert found.flagged[new].mean() > 0.7
    assert found.flagged[~new].mean() <= 0.07
    np.testing.assert_array_equal(found.flagged, found.score > 0)
    np.testing.assert_array_equal(found.reason != "", found.flagged)
    # Its cells resemble type a: the reasons name it.
    named = found.reason[new & found.flagged].astype(str)
    assert np.mean([text == FAR or "a" in text.split() for text in named]) > 0.9


def test_known_cells_stay_whatever_the_composition_and_batch(detector):
    for sizes in ((60, 60, 60, 60), (150, 0, 20, 3), (0, 0, 0, 40)):
        assert compared(detector, types_of(*sizes)).flagged.mean() <= 0.08
    # The share of the file's cells says nothing if all cells of the file differ a little.
    assert compared(detector, types_of(60, 60, 60, 60), shift=0.1).flagged.mean() < 0.3


def test_the_rate_is_the_share_of_flagged_known_cells(detector):
    types = types_of(100, 100, 100, 100)
    shares = [compared(detector, types, rate=rate).flagged.mean() for rate in (0.01, 0.1, 0.4)]
    assert shares == sorted(shares)
    assert shares[0] <= 0.01
    assert 0.0 < shares[2] < 0.4


def test_single_cells_far_from_all(detector):
    """Without other cells of the file, distance and energy decide."""
    random = np.random.default_rng(5)
    strange = sparse.csr_matrix(random.poisson(random.gamma(0.1, 20.0, (1, 300)), (1, 300)))
    found = detector.compare(detector.project(strange.astype(np.float32)), NAMES, rate=0.05)
    assert found.flagged.tolist() == [True]
    assert found.reason.tolist() == [FAR]
    alone = [compared(detector, np.array([kind]), seed=kind).flagged[0] for kind in range(4)]
    assert sum(alone) <= 1
    assert len(compared(detector, np.zeros(0, int)).score) == 0


def test_many_cells_are_compared_in_groups(detector):
    types = np.tile(types_of(10, 10, 10, 10, 10), REFERENCE_CELLS // 50 + 1)
    found = compared(detector, types)
    new = types == 4
    assert len(found.score) > REFERENCE_CELLS
    assert auroc(new, found.score) > 0.9
    assert found.flagged[~new].mean() <= 0.07


def test_the_state_is_complete(detector):
    again = UnknownDetector({name: np.array(values) for name, values in detector.arrays.items()})
    types = types_of(10, 10, 10, 10, 10)
    np.testing.assert_array_equal(
        compared(again, types).score, compared(detector, types).score
    )  # fmt: skip


def test_too_few_cells_and_large_references():
    codes = types_of(10, 10)
    assert UnknownDetector.fit(counts_of(codes, seed=0), codes, 2) is None
    codes = types_of(5000, 30, 900)
    chosen = _stratified(codes, 1000, np.random.default_rng(0))
    assert len(chosen) <= 1000
    assert np.bincount(codes[chosen])[1] == 30
    assert abs(np.diff(np.bincount(codes[chosen])[[0, 2]])[0]) == 0


def test_the_latent_of_a_model_without_a_projection_is_not_linear(tiny_model):
    expected = None if tiny_model.config.trunk != "projection" else (40, 32)
    found = latent_map(tiny_model.config, tiny_model.params)
    assert (None if found is None else found.shape) == expected


# The pool


def log_probabilities(truth, sharpness, noise, random):
    logits = random.normal(size=(len(truth), 4)) * noise
    logits[np.arange(len(truth)), truth] += sharpness
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("network", "linear"), [((0, 3), (4, 1)), ((4, 1), (2, 1)), ((2, 1), (2, 1))]
)
def test_the_pool_is_not_below_its_better_part(network, linear):
    """A network without information gets no weight; two parts that complement each other are pooled."""
    for seed in range(5):
        random = np.random.default_rng(seed)
        truth, new = random.integers(0, 4, 200), random.integers(0, 4, 4000)
        random_of = [np.random.default_rng(100 * seed + n) for n in range(4)]
        weights, chosen = choose_pool(
            log_probabilities(truth, *network, random_of[0]),
            log_probabilities(truth, *linear, random_of[1]),
            truth,
        )
        parts = [
            log_probabilities(new, *network, random_of[2]),
            log_probabilities(new, *linear, random_of[3]),
        ]
        accuracy = [np.mean(part.argmax(axis=1) == new) for part in parts]
        pooled = np.mean((weights[0] * parts[0] + weights[1] * parts[1]).argmax(axis=1) == new)
        assert pooled >= max(accuracy) - 0.002
        if network == linear:
            assert chosen == "pooled"
            assert pooled > max(accuracy)


def test_without_validation_cells_the_prior_decides():
    assert choose_pool(None, None, np.zeros(0, int)) == ([0.25, 0.75], "pooled")


def test_label_transfer():
    reference = np.array([[0.0], [0.1], [5.0], [5.1]])
    votes = neighbor_votes(
        np.repeat(reference, 8, axis=0), types_of(16, 16), np.array([[0.0], [5.2]]), 2
    )
    np.testing.assert_allclose(votes, [[1, 0], [0, 1]])


def test_auroc():
    positive = np.array([True, True, False, False])
    assert auroc(positive, np.array([4.0, 3.0, 2.0, 1.0])) == 1.0
    assert auroc(positive, np.array([1.0, 1.0, 1.0, 1.0])) == 0.5
    assert auroc(positive, np.array([4.0, 1.0, 2.0, 3.0])) == 0.5
    assert np.isnan(auroc(np.ones(3, bool), np.arange(3.0)))
