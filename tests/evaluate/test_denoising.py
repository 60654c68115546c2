"""What is hidden, the scale it is compared on, and the errors, against numpy, scipy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.denoising import (
    denoising_scores,
    gene_means,
    hide_nonzeros,
    log_normalize,
)


def counts(cells=40, genes=15, seed=0):
    random = np.random.default_rng(seed)
    return sparse.csr_matrix(random.poisson(0.8, (cells, genes)).astype(np.float32))


def test_hides_a_fraction_of_the_nonzeros_and_nothing_else():
    whole = counts()
    before = whole.toarray()
    left, hidden = hide_nonzeros(whole, 0.1, seed=3)
    np.testing.assert_array_equal(whole.toarray(), before)
    assert hidden.nnz == round(0.1 * whole.nnz)
    assert left.nnz + hidden.nnz == whole.nnz
    taken = hidden.toarray()
    assert (before[taken] > 0).all()
    np.testing.assert_array_equal(left.toarray(), np.where(taken, 0, before))
    again = hide_nonzeros(whole, 0.1, seed=3)[1]
    np.testing.assert_array_equal(again.toarray(), taken)
    assert (hide_nonzeros(whole, 0.1, seed=4)[1].toarray() != taken).any()


def test_what_cannot_be_hidden():
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match=f"fraction={fraction}; expected a number between"):
            hide_nonzeros(counts(), fraction)
    with pytest.raises(InputError, match="1 non-zero counts; expected at least two"):
        hide_nonzeros(sparse.csr_matrix([[1.0, 0.0]]), 0.5)


def test_log_normalized_values():
    whole = counts()
    dense = whole.toarray()
    dense[3] = 0
    wanted = np.log1p(dense / np.maximum(dense.sum(axis=1, keepdims=True), 1) * 1e4)
    np.testing.assert_allclose(log_normalize(dense), wanted, rtol=1e-6)
    found = log_normalize(sparse.csr_matrix(dense))
    assert sparse.issparse(found)
    np.testing.assert_allclose(found.toarray(), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        log_normalize(dense, total=np.full(40, 100.0), target_sum=10.0), np.log1p(dense / 10)
    )


def test_gene_means():
    whole = counts()
    dense = whole.toarray()
    for values in (whole, dense):
        np.testing.assert_allclose(gene_means(values), dense.mean(axis=0), rtol=1e-6)
        detected = np.array([column[column > 0].mean() for column in dense.T])
        np.testing.assert_allclose(gene_means(values, detected=True), detected, rtol=1e-6)


def test_scores_at_hidden_entries_alone():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra 'eval'")
    truth = log_normalize(counts())
    _, hidden = hide_nonzeros(truth, 0.3)
    prediction = truth.toarray() + np.random.default_rng(1).normal(size=truth.shape)
    scores = denoising_scores(truth, prediction, hidden)
    chosen = hidden.toarray()
    true, found = truth.toarray()[chosen], prediction[chosen]
    assert scores["rmse"] == pytest.approx(metrics.root_mean_squared_error(true, found))
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(true, found))
    assert scores["entries"] == chosen.sum()
    wanted = [
        stats.pearsonr(truth.toarray()[rows, gene], prediction[rows, gene])[0]
        for gene, rows in enumerate(chosen.T)
        if rows.sum() >= 3
    ]
    assert scores["gene_pearson"] == pytest.approx(np.mean(wanted))
    other = np.where(chosen, prediction, 1e9)
    assert denoising_scores(truth, other, hidden) == scores
    with pytest.raises(InputError, match="No entries to compare"):
        denoising_scores(truth, prediction, np.zeros(truth.shape, bool))
    with pytest.raises(InputError, match="has shape"):
        denoising_scores(truth, prediction[:, :3], hidden)
