"""The logistic regression against scikit-learn's, and the pool of classifiers."""

import numpy as np
import pytest
from scipy import sparse
from scipy.special import log_softmax

from cellplm_jax.train.linear import (
    PENALTIES,
    RidgeProblem,
    fit_linear_classifier,
    pool_log_probabilities,
)


@pytest.fixture(scope="module")
def cells():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 200)
    counts = random.poisson(random.gamma(0.6, 2.0, (3, 40))[labels])
    features = sparse.csr_matrix(np.log1p(counts))
    return features, labels


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_that_of_scikit_learn(cells, weighted):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = cells
    weights = np.array([0.5, 1.0, 3.0]) if weighted else None
    found = fit_linear_classifier(
        features, labels, 3, penalty=2.0, weights=weights, iterations=2000
    )
    given = dict(enumerate(weights)) if weighted else None
    wanted = linear_model.LogisticRegression(C=0.5, max_iter=5000, tol=1e-8, class_weight=given)
    wanted.fit(features, labels)
    np.testing.assert_allclose(
        found.log_probabilities(features), wanted.predict_log_proba(features), atol=5e-3
    )


def test_a_pool_takes_the_better_classifier_and_calibrates_it():
    random = np.random.default_rng(1)
    logits = random.normal(size=(3000, 4)) * 2
    chances = np.exp(log_softmax(logits, axis=1))
    labels = (chances.cumsum(axis=1) > random.random((3000, 1))).argmax(axis=1)
    noise = log_softmax(random.normal(size=(3000, 4)), axis=1)
    sharp = log_softmax(2 * logits, axis=1)
    pool = pool_log_probabilities(np.stack([sharp, noise]), labels)
    np.testing.assert_allclose(pool, [0.5, 0.0], atol=0.05)


def test_a_pool_of_few_cells_stays_near_the_average():
    sure = log_softmax(np.array([[9.0, 0.0], [0.0, 9.0]]), axis=1)
    pool = pool_log_probabilities(np.stack([sure, sure]), np.array([0, 1]))
    np.testing.assert_allclose(pool, 0.5, atol=0.01)
    sure = np.stack([sure, sure])
    for cells in (10.0, 1000.0):
        pool = pool_log_probabilities(sure, np.array([0, 1]), prior=(0.25, 0.75), prior_cells=cells)
        np.testing.assert_allclose(pool, [0.25, 0.75], atol=0.1 / cells)


@pytest.mark.parametrize("cells", [30, 90])
def test_ridge_is_that_of_scikit_learn(cells):
    linear_model = pytest.importorskip("sklearn.linear_model")
    random = np.random.default_rng(2)
    features = random.normal(size=(cells, 50)) * 3 + 1
    targets = features[:, :4] @ random.normal(size=(4, 6)) + random.normal(size=(cells, 6))
    problem = RidgeProblem(features)
    found = problem.fit(targets, 20.0)
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    wanted = linear_model.Ridge(alpha=20.0).fit(standard, targets).predict(standard)
    np.testing.assert_allclose(found.predict(features), wanted, atol=1e-4)
    # The penalty by leaving each cell out in turn, which has a closed form.
    alphas = np.array(PENALTIES)
    weighted = targets / targets.std(axis=0)
    chosen = linear_model.RidgeCV(alphas=alphas).fit(standard, weighted).alpha_
    again = problem.fit(targets, chosen).predict(features)
    np.testing.assert_allclose(problem.fit(targets).predict(features), again, atol=1e-4)
