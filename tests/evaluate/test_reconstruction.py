from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate import reconstruction


def example(cells=50, genes=17, seed=0):
    generator = np.random.default_rng(seed)
    rate = generator.gamma(1.0, 3.0, (cells, genes))
    truth = generator.poisson(rate).astype(np.float32)
    prediction = (rate * np.exp(0.3 * generator.normal(size=rate.shape))).astype(np.float32)
    mask = generator.random(rate.shape) < 0.4
    return truth, prediction, mask


def test_pearson_per_gene_against_scipy():
    truth, prediction, mask = example()
    everything = reconstruction.pearson_per_gene(truth, prediction)
    masked = reconstruction.pearson_per_gene(truth, prediction, mask)
    for gene in range(truth.shape[1]):
        own = mask[:, gene]
        assert everything[gene] == pytest.approx(
            stats.pearsonr(truth[:, gene].astype(float), prediction[:, gene].astype(float))[0]
        )
        assert masked[gene] == pytest.approx(
            stats.pearsonr(truth[own, gene].astype(float), prediction[own, gene].astype(float))[0]
        )


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix])
def test_sparse_matrices_give_the_same_numbers(make):
    truth, prediction, mask = example()
    np.testing.assert_allclose(
        reconstruction.pearson_per_gene(make(truth), prediction, make(mask)),
        reconstruction.pearson_per_gene(truth, prediction, mask),
    )
    assert reconstruction.root_mean_squared_error(
        make(truth), prediction, make(mask)
    ) == pytest.approx(reconstruction.root_mean_squared_error(truth, prediction, mask))


def test_pearson_per_gene_is_nan_where_undefined_and_exact_for_tiny_scales():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(1000, 4))
    prediction = truth + generator.normal(size=(1000, 4))
    truth[:, 0] = 0.1  # its mean is not exactly 0.1 in floating point
    prediction[:, 1] = 1e6 / 3
    truth[:, 2:] *= 1e-150
    prediction[:, 3] *= 1e-150
    found = reconstruction.pearson_per_gene(truth, prediction)
    assert np.isnan(found[:2]).all()
    assert found[2] == pytest.approx(stats.pearsonr(truth[:, 2] * 1e150, prediction[:, 2])[0])
    assert found[3] == pytest.approx(
        stats.pearsonr(truth[:, 3] * 1e150, prediction[:, 3] * 1e150)[0]
    )
    mask = np.zeros((1000, 4), bool)
    mask[0] = True
    assert np.isnan(reconstruction.pearson_per_gene(truth, prediction, mask)).all()


def test_unmasked_entries_may_be_anything():
    truth, prediction, mask = example()
    expected = reconstruction.masked_correlation(truth, prediction, mask)
    wild = np.where(mask, prediction, np.nan)
    assert reconstruction.masked_correlation(truth, wild, mask) == pytest.approx(expected)


def test_masked_correlation_against_scipy():
    truth, prediction, mask = example()
    found = reconstruction.masked_correlation(truth, prediction, mask)
    log_truth, log_prediction = np.log1p(truth.astype(float)), np.log1p(prediction.astype(float))
    assert found["pooled"] == pytest.approx(
        stats.pearsonr(log_truth[mask], log_prediction[mask])[0]
    )
    per_gene = [
        stats.pearsonr(log_truth[own, gene], log_prediction[own, gene])[0]
        for gene, own in enumerate(mask.T)
    ]
    assert found["gene_mean"] == pytest.approx(np.mean(per_gene))
    assert found["genes"] == 17
    assert found["entries"] == mask.sum()


def test_masked_correlation_does_not_depend_on_the_blocks(monkeypatch):
    truth, prediction, mask = example()
    mask[:, 4:7] = False
    whole = reconstruction.masked_correlation(truth, prediction, mask)
    monkeypatch.setattr(reconstruction, "_BLOCK_ENTRIES", 100)  # two genes a block
    assert reconstruction.masked_correlation(truth, prediction, mask) == pytest.approx(whole)


def test_masked_correlation_counts_what_it_leaves_out():
    truth, prediction, mask = example()
    mask[:, 0] = False  # never masked
    mask[:, 1] = False
    mask[:2, 1] = True  # two entries
    mask[:, 2:6] = True
    truth[:, 2] = 0  # constant truth
    prediction[:, 3] = 0.1  # constant prediction
    truth[:, 4], prediction[:, 4] = 3, 3  # both: counted once
    mask[:, 5] = False
    mask[:3, 5] = True
    truth[:3, 5] = 1  # constant over the masked entries alone
    found = reconstruction.masked_correlation(truth, prediction, mask)
    assert found["genes_too_few"] == 2
    assert found["genes_constant_truth"] == 3
    assert found["genes_constant_prediction"] == 1
    assert found["genes"] == 17 - 6
    per_gene = [
        stats.pearsonr(np.log1p(truth[own, gene]), np.log1p(prediction[own, gene]))[0]
        for gene, own in list(enumerate(mask.T))[6:]
    ]
    assert found["gene_mean"] == pytest.approx(np.mean(per_gene), rel=1e-5)


def test_masked_correlation_without_anything_defined():
    truth, prediction, mask = example()
    nothing = reconstruction.masked_correlation(truth, prediction, np.zeros_like(mask))
    assert nothing["entries"] == nothing["genes"] == 0
    assert nothing["genes_too_few"] == 17
    assert np.isnan(nothing["pooled"])
    assert np.isnan(nothing["gene_mean"])
    constant = reconstruction.masked_correlation(truth, np.full_like(truth, 0.1), mask)
    assert np.isnan(constant["pooled"])
    assert constant["genes_constant_prediction"] == 17


def test_pooled_correlation_is_not_the_mean_over_genes():
    generator = np.random.default_rng(0)
    level = generator.gamma(0.3, 30.0, 40)
    truth = generator.poisson(np.broadcast_to(level, (200, 40)))
    noise = np.exp(0.01 * generator.normal(size=truth.shape))
    found = reconstruction.masked_correlation(truth, level * noise, np.ones(truth.shape, bool))
    assert found["pooled"] > 0.9
    assert abs(found["gene_mean"]) < 0.1


def test_negative_binomial_against_scipy():
    generator = np.random.default_rng(0)
    mean = generator.gamma(0.5, 10.0, (30, 20))
    dispersion = np.exp(generator.normal(0.0, 2.0, 20))
    counts = generator.poisson(mean)
    found = reconstruction.negative_binomial_log_likelihood(counts, mean, dispersion)
    expected = stats.nbinom.logpmf(counts, dispersion, dispersion / (dispersion + mean))
    assert found.shape == counts.shape
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_negative_binomial_sums_to_one_and_has_its_mean_and_variance():
    counts = np.arange(4000)
    probability = np.exp(reconstruction.negative_binomial_log_likelihood(counts, 12.0, 0.7))
    assert probability.sum() == pytest.approx(1.0)
    assert (probability * counts).sum() == pytest.approx(12.0)
    variance = (probability * (counts - 12.0) ** 2).sum()
    assert variance == pytest.approx(12.0 + 12.0**2 / 0.7)


def test_negative_binomial_at_its_borders():
    counts = np.arange(30)
    near_poisson = reconstruction.negative_binomial_log_likelihood(counts, 7.0, 1e12)
    np.testing.assert_allclose(near_poisson, stats.poisson.logpmf(counts, 7.0), rtol=1e-9)
    assert reconstruction.negative_binomial_log_likelihood(0, 0.0, 2.0) == 0.0
    assert reconstruction.negative_binomial_log_likelihood(3, 0.0, 2.0) == -np.inf
    tiny = reconstruction.negative_binomial_log_likelihood(2, 1e-300, 1e-4)
    expected = np.log(1e-4 * (1 + 1e-4) / 2) + 2 * (np.log(1e-300) - np.log(1e-4))
    assert tiny == pytest.approx(expected)


def test_errors_against_sklearn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra 'eval'")
    truth, prediction, mask = example()
    for own, selected in ((None, np.ones_like(mask)), (mask, mask)):
        true, predicted = truth[selected].astype(float), prediction[selected].astype(float)
        assert reconstruction.root_mean_squared_error(truth, prediction, own) == pytest.approx(
            metrics.root_mean_squared_error(true, predicted)
        )
        assert reconstruction.mean_absolute_error(truth, prediction, own) == pytest.approx(
            metrics.mean_absolute_error(true, predicted)
        )


@pytest.mark.parametrize(
    "score", [reconstruction.root_mean_squared_error, reconstruction.mean_absolute_error]
)
def test_errors_do_not_depend_on_the_order(score):
    truth, prediction, mask = example()
    generator = np.random.default_rng(1)
    cells, genes = generator.permutation(50), generator.permutation(17)
    shuffled = [array[cells][:, genes] for array in (truth, prediction, mask)]
    assert score(*shuffled) == pytest.approx(score(truth, prediction, mask), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, p, m: reconstruction.pearson_per_gene(t[0], p[0]), "two axes"),
        (lambda t, p, m: reconstruction.pearson_per_gene(t, p[:, :-1]), "same cells and genes"),
        (lambda t, p, m: reconstruction.pearson_per_gene(t, p, m[:-1]), "mask has shape"),
        (lambda t, p, m: reconstruction.pearson_per_gene(t, p * np.nan), "NaN or infinity"),
        (lambda t, p, m: reconstruction.pearson_per_gene(t, p, m * 0.5), "boolean"),
        (lambda t, p, m: reconstruction.masked_correlation(t, -p, m), "prediction is negative"),
        (lambda t, p, m: reconstruction.masked_correlation(t, p, None), "pearson_per_gene"),
        (
            lambda t, p, m: reconstruction.masked_correlation(t, p, m, minimum_entries=1),
            "at least 2",
        ),
        (
            lambda t, p, m: reconstruction.negative_binomial_log_likelihood(t, p, 0.0),
            "dispersion is as small as 0",
        ),
        (
            lambda t, p, m: reconstruction.negative_binomial_log_likelihood(-t, p, 1.0),
            "counts is as small as -",
        ),
        (
            lambda t, p, m: reconstruction.negative_binomial_log_likelihood(t, p, np.ones(3)),
            r"counts \(50, 17\).*dispersion \(3,\)",
        ),
        (lambda t, p, m: reconstruction.mean_absolute_error(t, p, m & False), "No entries"),
        (lambda t, p, m: reconstruction.mean_absolute_error(t, p.T), "prediction has shape"),
    ],
)
def test_bad_input_gets_one_clear_message(call, message):
    with pytest.raises(InputError, match=message) as raised:
        call(*example())
    assert "expected" in str(raised.value)
