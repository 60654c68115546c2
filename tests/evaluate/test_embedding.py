from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_jax.errors import InputError
from cellplm_jax.evaluate import embedding

pytest.importorskip("scanpy", reason="needs the extra 'eval'")
pytest.importorskip("igraph", reason="needs the extra 'eval'")

DATA = Path(
    os.environ.get(
        "CELLPLM_SHARED_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    )
)


def blobs(groups=4, each=40, dimensions=6, spread=0.4, seed=0):
    generator = np.random.default_rng(seed)
    centres = 4.0 * np.eye(groups, dimensions)
    labels = np.repeat(np.arange(groups), each)
    noise = spread * generator.normal(size=(groups * each, dimensions))
    return (centres[labels] + noise).astype(np.float32), np.array([f"type {i}" for i in labels])


def poisson_counts(cells=60, genes=90, seed=0):
    generator = np.random.default_rng(seed)
    rate = generator.gamma(0.5, 2.0, genes) * (
        1 + 4 * generator.random((3, genes))[generator.integers(0, 3, cells)]
    )
    counts = generator.poisson(rate)
    counts[:, 0] = 0  # a gene no cell expresses
    return sparse.csr_matrix(counts.astype(np.float32))


def test_leiden_finds_separated_groups_and_numbers_them_by_size():
    array, labels = blobs(spread=0.2)
    array, labels = array[:-25], labels[:-25]
    clusters = embedding.leiden_clusters(array, resolution=0.5)
    assert clusters.dtype == np.int32
    assert embedding.clustering_scores(labels, clusters) == pytest.approx({"ari": 1.0, "nmi": 1.0})
    sizes = np.bincount(clusters)
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    assert sizes[-1] == 15


def test_leiden_depends_on_the_seed_alone():
    array, _ = blobs(spread=2.0)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = embedding.leiden_clusters(array, neighbors=6, seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.default_rng(1).normal(size=10)
    np.testing.assert_array_equal(first, embedding.leiden_clusters(array, neighbors=6, seed=3))
    others = [embedding.leiden_clusters(array, neighbors=6, seed=seed) for seed in range(4, 9)]
    assert any((first != other).any() for other in others)


def test_leiden_resolution_changes_the_number_of_clusters():
    array, _ = blobs(spread=1.5)
    coarse = embedding.leiden_clusters(array, resolution=0.2)
    fine = embedding.leiden_clusters(array, resolution=3.0)
    assert fine.max() > coarse.max()


def test_clustering_scores_against_contingency_formulas():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 200)
    clusters = np.where(generator.random(200) < 0.6, labels, generator.integers(0, 5, 200))
    table = pd.crosstab(labels, clusters).to_numpy().astype(float)

    def pairs(n):
        return (n * (n - 1) / 2).sum()

    expected = pairs(table.sum(0)) * pairs(table.sum(1)) / pairs(table.sum())
    ari = (pairs(table) - expected) / ((pairs(table.sum(0)) + pairs(table.sum(1))) / 2 - expected)
    share = table / table.sum()

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    own, other = entropy(share.sum(1)), entropy(share.sum(0))
    nmi = (own + other - entropy(share.ravel())) / ((own + other) / 2)
    scores = embedding.clustering_scores(labels, clusters)
    assert scores == pytest.approx({"ari": ari, "nmi": nmi})
    named = pd.Series(labels).map(dict(enumerate("wxyz"))).astype("category")
    assert embedding.clustering_scores(named, clusters) == pytest.approx(scores)
    assert embedding.clustering_scores(clusters, labels) == pytest.approx(scores)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_accuracy_against_brute_force(metric):
    array, labels = blobs(spread=2.0, each=20)
    distance = {
        "euclidean": np.linalg.norm(array[:, None] - array[None], axis=-1),
        "cosine": 1
        - (array @ array.T)
        / np.outer(np.linalg.norm(array, axis=1), np.linalg.norm(array, axis=1)),
    }[metric]
    right = 0
    for cell, row in enumerate(distance):
        nearest = [other for other in np.argsort(row, kind="stable") if other != cell][:7]
        near = labels[nearest].tolist()
        most = max(near.count(name) for name in near)
        right += next(name for name in near if near.count(name) == most) == labels[cell]
    found = embedding.knn_accuracy(array, labels, neighbors=7, metric=metric)
    assert found == pytest.approx(right / len(labels))
    assert 0.3 < found < 0.99


def test_knn_accuracy_against_sklearn_leave_one_out():
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    array, labels = blobs(groups=2, spread=4.0, each=30)  # two groups, odd number: no ties
    expected = cross_val_score(KNeighborsClassifier(5), array, labels, cv=LeaveOneOut()).mean()
    assert embedding.knn_accuracy(array, labels, neighbors=5) == pytest.approx(expected)


def test_knn_accuracy_does_not_let_duplicates_vote_for_themselves():
    array = np.array([[0.0, 0.0]] * 3 + [[9.0, 9.0]] * 3)
    labels = ["a", "a", "b", "c", "c", "c"]
    # Among the three equal cells each sees the other two; "a" wins a share of 1 to 1 only if it is met first.
    assert embedding.knn_accuracy(array, labels, neighbors=1) <= 5 / 6
    assert embedding.knn_accuracy(array, list("abcdef"), neighbors=2) == 0.0


def test_batch_mixing_against_cell_by_cell_computation():
    """Every cell on its own: all distances, the kernel's width by root finding, the inverse Simpson index."""
    from scipy.optimize import brentq

    array, _ = blobs(groups=2, each=50, spread=1.0)
    batches = np.random.default_rng(3).integers(0, 3, len(array))
    indices = []
    for cell in range(len(array)):
        others = np.delete(np.arange(len(array)), cell)
        distance = np.linalg.norm(array[others].astype(float) - array[cell], axis=1)
        nearest = np.argsort(distance)[:30]

        def weights(log_beta, distance=distance[nearest]):
            kernel = np.exp(-np.exp(log_beta) * (distance - distance.min()))
            return kernel / kernel.sum()

        def excess(log_beta):
            w = weights(log_beta)
            return -(w * np.log(np.maximum(w, 1e-300))).sum() - np.log(10.0)

        w = weights(brentq(excess, -12, 12))
        share = np.bincount(batches[others[nearest]], weights=w, minlength=3)
        indices.append(1 / (share**2).sum())
    found = embedding.batch_mixing(array, batches, perplexity=10)
    assert found == pytest.approx((np.mean(indices) - 1) / 2, abs=1e-4)


def test_batch_mixing_between_its_ends():
    array, _ = blobs(groups=2, each=150, spread=0.3)
    side_by_side = np.repeat(["a", "b"], 150)
    random = np.random.default_rng(0).permutation(side_by_side)
    assert embedding.batch_mixing(array, side_by_side) < 1e-6
    assert 0.85 < embedding.batch_mixing(array, random) <= 1.0
    with pytest.raises(InputError, match="at least two batches"):
        embedding.batch_mixing(array, np.zeros(300))
    same = np.zeros((40, 3))
    assert 0 < embedding.batch_mixing(same, np.arange(40) % 2) <= 1


def nested_batches():
    """60 cells of three labels, the two batches a step apart; as the values of scib-metrics below were made."""
    generator = np.random.default_rng(5)
    array = generator.normal(size=(60, 3))
    labels = np.arange(60) % 3
    batches = generator.integers(0, 2, 60)
    array[:, 0] += 3 * labels
    array[:, 1] += batches
    return array, batches, labels


def test_batch_metrics_against_scib_metrics():
    """Values of scib-metrics 0.5.10 (``kbet``, ``silhouette_batch``, mean of ``lisi_knn``), same neighbourhoods."""
    array, batches, labels = nested_batches()
    assert embedding.kbet(array, batches, neighbors=12) == pytest.approx(0.95)
    assert embedding.batch_silhouette(array, batches, labels) == pytest.approx(0.8595569, abs=1e-6)
    mixing = embedding.batch_mixing(array, batches, perplexity=10)
    assert 1 + mixing == pytest.approx(1.6306019, abs=1e-4)


def test_kbet_by_hand():
    """Two groups of four on a line, four nearest each: chi-squared 0 where two and two, 4 (p = .0455) where all one."""
    array = np.array([[0.0], [1], [2], [3], [100], [101], [102], [103]])
    half = ["a", "b", "a", "b", *"aabb"]
    assert embedding.kbet(array, half, neighbors=4) == 1.0
    assert embedding.kbet(array, [*"aaaa", *"bbbb"], neighbors=4) == 0.0
    assert embedding.kbet(array, [*"aaaa", *"bbbb"], neighbors=4, alpha=0.04) == 1.0


def test_kbet_between_its_ends():
    array, _ = blobs(groups=1, each=600)
    mixed = np.random.default_rng(0).integers(0, 3, 600)
    assert embedding.kbet(array, mixed) > 0.85
    array[:, 0] += 50 * mixed
    assert embedding.kbet(array, mixed) == 0.0


def test_kbet_per_label_ignores_composition():
    array, labels = blobs(groups=2, each=300)
    random = np.random.default_rng(1)
    batches = np.where(labels == labels[0], random.random(600) < 0.9, random.random(600) < 0.1)
    assert embedding.kbet(array, batches) < 0.1
    assert embedding.kbet(array, batches, labels=labels) > 0.85


def test_integration_scores():
    array, batches, labels = nested_batches()
    scores = embedding.integration_scores(array, batches, labels)
    conserved = {"ari", "nmi", "knn_accuracy", "label_silhouette"}
    mixed = {"ilisi", "kbet", "kbet_per_label", "batch_silhouette"}
    assert set(scores) == conserved | mixed | {"clusters"}
    assert scores["batch_silhouette"] == embedding.batch_silhouette(array, batches, labels)
    assert scores["label_silhouette"] == embedding.silhouette(array, labels)
    assert set(embedding.integration_scores(array, batches)) == {"ilisi", "kbet", "clusters"}
    # A label of one batch alone says nothing of mixing; a missing one leaves the cell out of what labels say.
    apart = embedding.integration_scores(array, batches, pd.Series(batches).map({0: "a", 1: "b"}))
    assert set(apart) == conserved | {"ilisi", "kbet", "clusters"}
    some = pd.Series(labels, dtype=object).where(np.arange(60) > 5)
    assert embedding.integration_scores(array, batches, some)["ilisi"] == scores["ilisi"]


def test_without_batches_only_what_is_conserved_is_scored():
    array, labels = blobs()
    scores = embedding.integration_scores(array, None, labels)
    assert set(scores) == {"clusters", "ari", "nmi", "knn_accuracy", "label_silhouette"}


def test_silhouette_against_the_definition():
    array, labels = blobs(groups=3, spread=1.5, each=15)
    distance = np.linalg.norm(array[:, None] - array[None], axis=-1).astype(float)
    widths = []
    for cell, own in enumerate(labels):
        mean = {
            name: distance[cell, labels == name].sum() / ((labels == name).sum() - (name == own))
            for name in set(labels)
        }
        inside = mean.pop(own)
        outside = min(mean.values())
        widths.append((outside - inside) / max(inside, outside))
    assert embedding.silhouette(array, labels) == pytest.approx(np.mean(widths), abs=1e-5)
    some = embedding.silhouette(array, labels, sample_cells=30, seed=1)
    assert some == embedding.silhouette(array, labels, sample_cells=30, seed=1)
    assert some != embedding.silhouette(array, labels)


def test_pca_baseline_against_the_recipe_in_numpy():
    counts = poisson_counts(cells=200).toarray()
    counts[:, 5] = 0
    counts[7, 5] = 60  # 14 standard deviations: clipped at 10
    counts = sparse.csr_matrix(counts)
    before = counts.copy()
    genes, components = 30, 5
    found = embedding.pca_baseline(counts, genes=genes, components=components)
    assert (counts != before).nnz == 0
    assert found.dtype == np.float32
    assert found.shape == (200, components)

    dense = counts.toarray().astype(float)
    dense = dense[:, dense.sum(0) > 0]
    log = np.log1p(dense / dense.sum(1, keepdims=True) * 1e4)
    linear = np.expm1(log)
    mean = linear.mean(0)
    dispersion = np.log(linear.var(0, ddof=1) / mean)
    frame = pd.DataFrame({"mean": np.log1p(mean), "dispersion": dispersion})
    grouped = frame.groupby(pd.cut(frame["mean"], 20), observed=True)["dispersion"]
    centre, scale = grouped.transform("mean"), grouped.transform("std")
    alone = scale.isna()  # a gene alone in its bin has the normalised dispersion 1
    centre[alone], scale[alone] = 0.0, frame["dispersion"][alone]
    chosen = np.argsort(-((frame["dispersion"] - centre) / scale).to_numpy())[:genes]
    scaled = log[:, chosen]
    scaled = (scaled - scaled.mean(0)) / scaled.std(0, ddof=1)
    assert (scaled > 10).any()
    scaled = np.minimum(scaled, 10)
    scaled -= scaled.mean(0)
    left, size, _ = np.linalg.svd(scaled, full_matrices=False)
    expected = left[:, :components] * size[:components]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=2e-3, atol=2e-3)


def test_pca_baseline_repeats_and_fits_small_panels():
    counts = poisson_counts(cells=20, genes=12)
    found = embedding.pca_baseline(counts)
    expressed = int((counts.getnnz(axis=0) > 0).sum())
    assert expressed < 12
    assert found.shape == (20, expressed - 1)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, embedding.pca_baseline(counts.toarray()))


def test_pca_baseline_keeps_a_row_for_cells_without_counts():
    counts = poisson_counts().tolil()
    counts[3] = 0
    found = embedding.pca_baseline(counts.tocsr(), genes=30, components=4)
    assert found.shape[0] == 60
    assert np.isfinite(found).all()


@pytest.mark.parametrize("wrong", [-1.0, 0.5, np.nan])
def test_pca_baseline_refuses_what_is_not_counts(wrong):
    counts = poisson_counts().toarray()
    counts[2, 3] = wrong
    with pytest.raises(InputError, match="raw counts"):
        embedding.pca_baseline(counts)


def test_umap_keeps_groups_apart_and_repeats():
    array, labels = blobs(groups=3, spread=0.3, each=30)
    first = embedding.umap_coordinates(array, seed=1)
    assert first.shape == (90, 2)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, embedding.umap_coordinates(array, seed=1))
    assert embedding.knn_accuracy(first, labels, neighbors=5) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, y: embedding.leiden_clusters(a[0]), "two axes"),
        (lambda a, y: embedding.leiden_clusters(a, neighbors=len(a)), "more cells than neighbours"),
        (lambda a, y: embedding.umap_coordinates(a * np.nan), "NaN or infinity in 160 of 160"),
        (lambda a, y: embedding.knn_accuracy(a.astype(str), y), "real numbers"),
        (lambda a, y: embedding.knn_accuracy(a, y[:-1]), "159 entries for 160 cells"),
        (lambda a, y: embedding.knn_accuracy(a, y, neighbors=0), "at least one neighbour"),
        (lambda a, y: embedding.silhouette(a, ["x"] * 160), "at least two groups"),
        (lambda a, y: embedding.clustering_scores([None, *y[1:]], y), "missing .* for 1 of 160"),
        (lambda a, y: embedding.clustering_scores([], []), "No cells"),
        (lambda a, y: embedding.kbet(a, ["x"] * 160), "at least two batches"),
        (lambda a, y: embedding.kbet(a, y, labels=y), "No label has enough cells"),
        (lambda a, y: embedding.batch_silhouette(a, y, y), "No label has enough cells"),
        (lambda a, y: embedding.integration_scores(a, y, y[:-1]), "159 entries for 160 cells"),
    ],
)
def test_bad_input_gets_one_clear_message(call, message):
    array, labels = blobs()
    with pytest.raises(InputError, match=message) as raised:
        call(array, labels)
    assert "expected" in str(raised.value)


def test_baseline_on_real_cells():
    file = DATA / "kang_muscat_labelled.h5ad"
    if not file.exists():
        pytest.skip(f"real data not present: {file.name}")
    import anndata

    cells = anndata.read_h5ad(file)
    found = embedding.pca_baseline(cells.X, genes=1000, components=20)
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    assert embedding.knn_accuracy(found, labels) > 0.85
    scores = embedding.clustering_scores(labels, embedding.leiden_clusters(found))
    assert scores["nmi"] > 0.4


def test_many_cells_are_clustered_with_an_approximate_search():
    """From 8,192 cells on scanpy uses pynndescent, whose releases change what they return."""
    pytest.importorskip("pynndescent")
    generator = np.random.default_rng(0)
    groups = np.arange(8200) % 4
    cells = generator.standard_normal((8200, 4)) + 30 * np.eye(4)[groups]
    clusters = embedding.leiden_clusters(cells, resolution=0.01)
    assert embedding.clustering_scores(groups, clusters)["ari"] == pytest.approx(1)
