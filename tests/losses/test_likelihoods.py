"""Count likelihoods in float32 against scipy in float64, values and gradients, over all magnitudes met in practice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import digamma, gammaln

from cellplm_jax.losses.likelihoods import (
    negative_binomial_count_terms,
    negative_binomial_mean_terms,
    negative_binomial_nll,
    zero_inflated_mean_terms,
    zero_inflated_negative_binomial_nll,
)

COUNTS = np.array([0, 1, 2, 7, 60, 900, 20_000], np.float64)
MEANS = np.array([1e-5, 1e-3, 0.05, 0.7, 4.0, 90.0, 5e3])
DISPERSIONS = np.array([1e-4, 0.01, 0.3, 1.0, 8.0, 100.0])
GRID = [x.ravel() for x in np.meshgrid(COUNTS, MEANS, DISPERSIONS)]
LOGITS = np.array([-30.0, -3.0, -0.1, 0.0, 2.0, 30.0])

nb = jax.jit(negative_binomial_nll)
zinb = jax.jit(zero_inflated_negative_binomial_nll)
nb_gradient = jax.jit(jax.grad(lambda *a: negative_binomial_nll(*a).sum(), argnums=(1, 2)))
zinb_gradient = jax.jit(
    jax.grad(lambda *a: zero_inflated_negative_binomial_nll(*a).sum(), argnums=(1, 2, 3))
)


def single(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def scipy_nll(counts, mean, dispersion):
    return -stats.nbinom(dispersion, dispersion / (dispersion + mean)).logpmf(counts)


def rounding(counts, mean, dispersion):
    """What float32 can lose: a few units in the last place of the largest terms that are added."""
    terms = np.abs(gammaln(counts + dispersion)) + np.abs(gammaln(dispersion)) + gammaln(counts + 1)
    terms += (dispersion + counts) * np.log1p(mean / dispersion)
    terms += counts * (np.abs(np.log(dispersion)) + np.abs(np.log(mean)))
    return 1e-6 + 6e-7 * terms


def test_negative_binomial_equals_scipy():
    expected = scipy_nll(*GRID)
    got = np.asarray(nb(*single(*GRID)), np.float64)
    assert np.isfinite(expected).all()
    excess = np.abs(got - expected) - rounding(*GRID) - 2e-5 * np.abs(expected)
    assert excess.max() < 0, [x[excess.argmax()] for x in (*GRID, got, expected)]


def test_negative_binomial_approaches_poisson_as_the_dispersion_grows():
    counts, mean = (x.ravel() for x in np.meshgrid([0.0, 1, 3, 12], [0.02, 1.0, 9.0]))
    expected = -stats.poisson(mean).logpmf(counts)
    got = np.asarray(nb(*single(counts, mean, np.full(12, 1e4))))
    # lgamma(10,000) is 82,100 and float32 resolves it to 1/128.
    np.testing.assert_allclose(got, expected, atol=0.05)


def test_probabilities_sum_to_one():
    counts = np.arange(3000.0)
    for mean, dispersion in ((0.3, 0.2), (5.0, 2.0), (40.0, 0.7)):
        total = np.exp(-np.asarray(nb(*single(counts, mean, dispersion)), np.float64)).sum()
        assert total == pytest.approx(1.0, abs=2e-4)
        inflated = zinb(*single(counts, mean, dispersion, -0.4))
        assert np.exp(-np.asarray(inflated, np.float64)).sum() == pytest.approx(1.0, abs=2e-4)


def test_negative_binomial_gradients_equal_the_derivatives():
    counts, mean, dispersion = GRID
    of_mean, of_dispersion = nb_gradient(*single(*GRID))
    # The guard of 1e-10 inside log(mean) is part of the formula.
    expected = (dispersion + counts) / (dispersion + mean) - counts / (mean + 1e-10)
    scale = (dispersion + counts) / (dispersion + mean) + counts / mean
    np.testing.assert_array_less(np.abs(of_mean - expected), 1e-5 * scale)
    u = mean / dispersion
    terms = [
        digamma(dispersion),
        -digamma(counts + dispersion),
        np.log1p(u),
        -(dispersion + counts) * u / (dispersion + mean),
        counts / dispersion,
    ]
    scale = sum(np.abs(term) for term in terms)
    np.testing.assert_array_less(
        np.abs(of_dispersion - sum(terms)), 1e-5 * scale + 1e-6, verbose=True
    )


def test_dispersion_gradient_of_weakly_expressed_genes_has_its_digits():
    # log(1 + u) rounds u = mean / theta to a multiple of 6e-8, while the gradient at a zero count is
    # log1p(u) - u / (1 + u), about u^2 / 2. Most entries of a matrix are such zeros. jnp.log1p(u) keeps the digits
    # (until the subtraction itself cancels, at u of about 1e-4).
    u = np.array([1e-3, 3e-3, 1e-2])
    gradient = jax.grad(lambda *a: negative_binomial_mean_terms(*a).sum(), argnums=2)
    got = jax.jit(gradient)(*single(np.zeros(3), u, np.ones(3)))
    expected = np.log1p(u) - u / (1 + u)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_value_of_weakly_expressed_genes_has_its_digits():
    # As above: 10,000 log(1 + 1e-7) comes out as .00119 instead of .001, 19 % off.
    got = nb(*single(np.zeros(3), [1e-3, 1e-2, 0.05], np.full(3, 1e4)))
    np.testing.assert_allclose(got, [1e-3, 1e-2, 0.05], rtol=1e-3)


@pytest.mark.parametrize("dispersion", [1e-4, 1.0, 1e4])
def test_everything_stays_finite_at_the_ends_of_the_ranges(dispersion):
    counts = np.array([0.0, 0.0, 0.0, 1.0, 60_000.0, 60_000.0, 0.0])
    mean = np.array([0.0, 1e-5, 1e6, 1e-5, 1e6, 1e-5, 1e-30])
    arguments = single(counts, mean, np.full(7, dispersion))
    assert np.isfinite(np.asarray(nb(*arguments))).all()
    for gradient in nb_gradient(*arguments):
        assert np.isfinite(np.asarray(gradient)).all()
    for logit in (-100.0, 0.0, 100.0):
        inflated = (*arguments, jnp.full(7, logit))
        assert np.isfinite(np.asarray(zinb(*inflated))).all()
        for gradient in zinb_gradient(*inflated):
            assert np.isfinite(np.asarray(gradient)).all()


def test_a_mean_of_zero_explains_a_count_of_zero():
    # Cells without counts have their mean rescaled to 0.
    got = nb(*single([0.0, 0.0], [0.0, 0.0], [0.5, 20.0]))
    # Not exactly: lgamma(1) is 5e-7 in float32.
    np.testing.assert_allclose(got, 0.0, atol=1e-6)


def direct_zinb(counts, mean, dispersion, logits):
    """-log of the zero-inflated probability, from the definition."""
    log_pi, log_rest = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    log_nb = -scipy_nll(counts, mean, dispersion)
    zero = np.logaddexp(log_pi, log_rest + log_nb)
    return -np.where(counts == 0, zero, log_rest + log_nb)


def zinb_grid():
    counts, mean, dispersion, logits = np.meshgrid(
        [0.0, 1.0, 8.0, 200.0], [1e-3, 0.4, 30.0], [0.1, 1.0, 20.0], LOGITS
    )
    return [x.ravel() for x in (counts, mean, dispersion, logits)]


def test_zero_inflated_equals_the_definition():
    grid = zinb_grid()
    got = np.asarray(zinb(*single(*grid)), np.float64)
    expected = direct_zinb(*grid)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-4)
    naive = 1 / (1 + np.exp(-grid[3]))
    p = naive * (grid[0] == 0) + (1 - naive) * np.exp(-scipy_nll(*grid[:3]))
    moderate = (np.abs(grid[3]) < 5) & (p > 0)
    assert moderate.sum() > 100
    np.testing.assert_allclose(expected[moderate], -np.log(p[moderate]), rtol=1e-9)


def test_zero_inflated_gradients_equal_finite_differences():
    grid = zinb_grid()
    gradients = zinb_gradient(*single(*grid))
    for argument, got in enumerate(gradients, start=1):
        step = np.zeros((4, 1))
        size = 1e-6 * np.maximum(np.abs(grid[argument]), 1e-3)
        step[argument] = 1
        low, high = (direct_zinb(*(np.array(grid) + sign * step * size)) for sign in (-1, 1))
        expected = (high - low) / (2 * size)
        scale = np.abs(expected) + 1e-2
        assert (np.abs(np.asarray(got) - expected) / scale).max() < 5e-3


def test_without_structural_zeros_the_two_agree():
    counts, mean, dispersion, _ = zinb_grid()
    logits = np.full_like(counts, -60.0)
    np.testing.assert_allclose(
        zinb(*single(counts, mean, dispersion, logits)),
        nb(*single(counts, mean, dispersion)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_two_parts_add_up_and_the_count_part_vanishes_at_zero():
    counts, mean, dispersion, logits = single(*zinb_grid())
    count_terms = negative_binomial_count_terms(counts, dispersion)
    zeros = np.asarray(counts) == 0
    np.testing.assert_allclose(np.asarray(count_terms)[zeros], 0.0, atol=1e-6)
    np.testing.assert_allclose(
        count_terms + negative_binomial_mean_terms(counts, mean, dispersion),
        nb(counts, mean, dispersion),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        count_terms + zero_inflated_mean_terms(counts, mean, dispersion, logits),
        zinb(counts, mean, dispersion, logits),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_dispersion_per_gene_broadcasts_and_integers_are_welcome():
    counts = np.random.default_rng(0).integers(0, 9, (2, 3, 4))
    mean = np.full((2, 3, 4), 2.0, np.float32)
    dispersion = np.array([0.5, 1, 2, 4], np.float32)
    got = nb(counts.astype(np.uint16), mean, dispersion)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, scipy_nll(counts, mean, dispersion), rtol=1e-4, atol=1e-5)


def test_the_result_is_float32_whatever_comes_in():
    narrow = [jnp.asarray([1.0, 2.0], jnp.bfloat16)] * 3
    got = negative_binomial_nll(*narrow)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, scipy_nll(*(np.array([1.0, 2.0]),) * 3), rtol=1e-5)
