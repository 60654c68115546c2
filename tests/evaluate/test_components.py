"""Components and discriminants against scikit-learn and against what they are for."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.components import (
    Discriminants,
    dispersed_genes,
    log_normalized,
    own_components,
    principal_components,
    unit_length,
    variable_expression,
    variable_genes,
)


@pytest.fixture
def matrix():
    generator = np.random.default_rng(0)
    signal = generator.standard_normal((300, 5)) * [20, 15, 10, 6, 4]
    values = signal @ np.linalg.qr(generator.standard_normal((40, 5)))[0].T
    values = values + 0.1 * generator.standard_normal((300, 40))
    return (values - values.mean(axis=0)).astype(np.float32)


def test_components_are_those_of_scikit_learn_whatever_the_blocks(matrix):
    reference = PCA(5, svd_solver="full").fit(matrix)
    for cut in (50, 300):
        loadings, strength = principal_components(
            lambda cut=cut: (matrix[start : start + cut] for start in range(0, 300, cut)), 40, 5
        )
        np.testing.assert_allclose(strength, reference.singular_values_, rtol=1e-4)
        agreement = np.abs(np.sum(loadings * reference.components_.T, axis=0))
        np.testing.assert_allclose(agreement, 1, atol=1e-3)


def test_variable_genes_are_those_with_more_variance_than_genes_of_their_mean():
    generator = np.random.default_rng(1)
    mean = generator.uniform(0.1, 3, 400)
    variance = mean * generator.uniform(0.9, 1.1, 400)
    variance[[7, 90, 230]] *= 20
    assert set(variable_genes(mean, variance, 3)) == {7, 90, 230}
    usable = np.ones(400, bool)
    usable[7] = False
    assert 7 not in variable_genes(mean, variance, 400, usable)
    assert len(variable_genes(mean, variance, 1000)) == 400


def test_dispersed_genes_are_those_of_scanpy():
    scanpy = pytest.importorskip("scanpy")
    import cellplm_jax

    adata = cellplm_jax.datasets.pbmc3k()[:600].copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    normalized = adata.X.toarray().astype(np.float64)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=1000)
    chosen = dispersed_genes(normalized.mean(axis=0), normalized.var(axis=0, ddof=1), 1000)
    wanted = set(np.flatnonzero(adata.var["highly_variable"]))
    assert len(wanted & set(chosen)) > 985


def test_discriminants_find_the_direction_that_separates_clusters_of_every_dataset():
    generator = np.random.default_rng(2)
    pooled = Discriminants(10)
    for offset in (0, 3):
        cells = generator.standard_normal((200, 10)) * np.linspace(4, 0.3, 10)
        clusters = np.repeat([0, 1], 100)
        cells[:, 9] += 2.0 * clusters
        pooled.add(cells - cells.mean(axis=0), clusters + offset)
    direction = pooled.directions(1)[:, 0]
    assert np.argmax(np.abs(direction)) == 9
    assert Discriminants(4).directions(3).shape == (4, 0)


def test_own_components_do_not_depend_on_blocks_and_remove_sample_means():
    generator = np.random.default_rng(3)
    rate = np.exp(generator.standard_normal((2, 60)))
    counts = generator.poisson(np.repeat(rate, 60, axis=0)).astype(np.float32)
    expression = log_normalized(sparse.csr_matrix(counts))
    sample_of = np.repeat([0, 1], 60)
    variable, deviation = variable_expression(lambda: [expression])
    pieces, same = variable_expression(
        lambda: (expression[start : start + 37] for start in range(0, 120, 37))
    )
    assert (variable != pieces).nnz == 0
    np.testing.assert_allclose(deviation, same, rtol=1e-5)
    for scale in (deviation, None):
        whole = own_components(variable, sample_of, scale, components=8)
        assert np.abs(whole[:60].mean(axis=0) - whole[60:].mean(axis=0)).max() < 0.5
    with pytest.raises(InputError, match="at least 2 genes"):
        variable_expression(lambda: [sparse.csr_matrix((5, 4), dtype=np.float32)])


def test_log_normalized_and_unit_length():
    counts = sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0]], np.float32))
    found = log_normalized(counts, 100.0).toarray()
    np.testing.assert_allclose(found, [np.log1p([25, 75, 0]), [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(unit_length(np.array([[3.0, 4], [0, 0]])), axis=1), [1, 0]
    )
