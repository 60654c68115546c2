"""Scores of imputed genes against scipy and scikit-learn, and where they are not defined."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, spatial, stats

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.imputation import cosine_per_gene, imputation_scores, imputation_table

GENES = ["a", "b", "c", "d"]


def example():
    random = np.random.default_rng(0)
    truth = random.poisson(1.0, (30, 4)).astype(np.float32)
    return truth, truth + random.normal(size=(30, 4)).astype(np.float32)


def test_every_gene_by_itself():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra 'eval'")
    truth, prediction = example()
    table = imputation_table(sparse.csr_matrix(truth), prediction, GENES)
    assert list(table.index) == GENES
    for number, gene in enumerate(GENES):
        true, found = truth[:, number].astype(float), prediction[:, number].astype(float)
        row = table.loc[gene]
        assert row["pearson"] == pytest.approx(stats.pearsonr(true, found)[0])
        assert row["cosine"] == pytest.approx(1 - spatial.distance.cosine(true, found))
        assert row["rmse"] == pytest.approx(metrics.root_mean_squared_error(true, found))
        assert row["mae"] == pytest.approx(metrics.mean_absolute_error(true, found))


def test_all_genes_together_in_any_order():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra 'eval'")
    truth, prediction = example()
    scores = imputation_scores(truth, prediction, GENES)
    table = imputation_table(truth, prediction, GENES)
    assert scores["pearson"] == pytest.approx(table["pearson"].mean())
    assert scores["cosine"] == pytest.approx(table["cosine"].mean())
    assert scores["rmse"] == pytest.approx(
        metrics.root_mean_squared_error(truth.ravel(), prediction.ravel())
    )
    assert scores["mae"] == pytest.approx(np.abs(truth - prediction).mean())
    assert (scores["genes"], scores["genes_without_correlation"]) == (4, 0)
    order = [2, 0, 3, 1]
    turned = imputation_scores(truth[:, order], prediction[:, order], [GENES[i] for i in order])
    assert turned == pytest.approx(scores)


def test_where_a_score_is_not_defined():
    truth, prediction = example()
    truth[:, 0], prediction[:, 1] = 0, 2.0
    table = imputation_table(truth, prediction, GENES)
    assert table["pearson"].isna().tolist() == [True, True, False, False]
    assert table["cosine"].isna().tolist() == [True, False, False, False]
    assert np.isnan(cosine_per_gene(truth, prediction)[0])
    scores = imputation_scores(truth, prediction, GENES)
    assert scores["genes_without_correlation"] == 2
    assert scores["pearson"] == pytest.approx(table["pearson"][2:].mean())
    with pytest.raises(InputError, match="4 genes and 2 names"):
        imputation_table(truth, prediction, GENES[:2])
    with pytest.raises(InputError, match="has shape"):
        imputation_table(truth, prediction[:5], GENES)
