"""The simulator keeps its promises: the statistics of the counts recover the truth stored beside them."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from cellplm_jax.data.simulate import simulate_tissue
from cellplm_jax.errors import InputError


@pytest.fixture(scope="module")
def tissue():
    return simulate_tissue(cells=4000, genes=300, dropout=0.25, seed=1)


@pytest.fixture(scope="module")
def before(tissue):
    return tissue.layers["counts_before_dropout"].toarray().astype(np.float64)


@pytest.fixture(scope="module")
def expected(tissue):
    return tissue.layers["expected"].astype(np.float64)


def codes(tissue, name):
    return tissue.obs[name].cat.codes.to_numpy()


def test_fields_and_types(tissue):
    assert tissue.shape == (4000, 300)
    for matrix in (tissue.X, tissue.layers["counts_before_dropout"]):
        assert isinstance(matrix, scipy.sparse.csr_matrix | scipy.sparse.csr_array)
        assert matrix.dtype == np.float32
        assert (matrix.data > 0).all()
        assert (matrix.data == np.round(matrix.data)).all()
    assert tissue.layers["expected"].dtype == np.float32
    assert tissue.obsm["spatial"].dtype == np.float32
    identifiers = tissue.var["ensembl_id"]
    assert identifiers.is_unique
    assert identifiers.str.fullmatch(r"ENSG\d{11}").all()
    np.testing.assert_allclose(
        tissue.layers["expected"].sum(axis=1), tissue.obs["library_size"], rtol=1e-4
    )
    assert abs(np.median(tissue.obs["library_size"]) / 2000 - 1) < 0.1
    assert abs(np.median(tissue.var["dispersion"]) / 3 - 1) < 0.15
    assert np.bincount(codes(tissue, "batch")).tolist() == [2000, 2000]


def test_counts_have_the_expected_mean(before, expected, tissue):
    # The standardised deviation of each gene's total is a standard normal variable.
    theta = tissue.var["dispersion"].to_numpy()
    variance = expected + expected**2 / theta
    z = (before - expected).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert abs(z.mean()) < 5 / np.sqrt(300)
    assert 0.85 < z.std() < 1.15
    z_cell = (before - expected).sum(axis=1) / np.sqrt(variance.sum(axis=1))
    assert abs(z_cell.mean()) < 5 / np.sqrt(4000)
    assert 0.9 < z_cell.std() < 1.1


def test_counts_are_negative_binomial(before, expected, tissue):
    # Every entry has its own mean; if the distribution is right, its randomised probability is uniform.
    theta = tissue.var["dispersion"].to_numpy()
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 4000, 40000), rng.integers(0, 300, 40000)
    count, mean, size = before[rows, columns], expected[rows, columns], theta[columns]
    distribution = scipy.stats.nbinom(size, size / (size + mean))
    uniform = distribution.cdf(count - 1) + rng.uniform(size=40000) * distribution.pmf(count)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    poisson = scipy.stats.poisson(mean)
    wrong = poisson.cdf(count - 1) + rng.uniform(size=40000) * poisson.pmf(count)
    assert scipy.stats.kstest(wrong, "uniform").pvalue < 1e-6


def test_over_dispersion_follows_the_parameter():
    loose, tight = (
        simulate_tissue(cells=1500, genes=60, ligand_receptor_pairs=2, dispersion=value, dropout=0)
        for value in (1.0, 1e6)
    )
    for tissue, low, high in ((loose, 0.6, 1.6), (tight, -0.05, 0.05)):
        mean = tissue.layers["expected"].astype(np.float64)
        excess = ((tissue.X.toarray() - mean) ** 2 - mean).sum() / (mean**2).sum()
        assert low < excess < high


def test_markers_mark_their_type(tissue, before):
    fraction = before / before.sum(axis=1, keepdims=True)
    cell_type = codes(tissue, "cell_type")
    level = np.stack([fraction[cell_type == index].mean(axis=0) for index in range(6)])
    marker = tissue.var["marker_of"].to_numpy()
    names = tissue.obs["cell_type"].cat.categories
    own = np.array([names.get_loc(name) for name in marker if name])
    chosen = level[:, marker != ""]
    assert set(own) == set(range(6))
    assert (chosen.argmax(axis=0) == own).all()
    others = (chosen.sum(axis=0) - chosen[own, np.arange(len(own))]) / 5
    assert 5 < np.median(chosen[own, np.arange(len(own))] / others) < 10


def test_batch_effect_is_the_stored_one(tissue, before):
    truth = tissue.uns["truth"]
    gene = np.log(truth["batch_gene_factor"])
    np.testing.assert_allclose(gene.mean(axis=0), 0, atol=1e-6)
    # sd of the difference of two independent factors is sqrt(2) * batch_strength
    assert abs((gene[0] - gene[1]).std() / (np.sqrt(2) * 0.25) - 1) < 0.2
    batch, cell_type = codes(tissue, "batch"), codes(tissue, "cell_type")
    fraction = before / before.sum(axis=1, keepdims=True)
    observed = np.mean(
        [
            np.log(fraction[(batch == 0) & (cell_type == index)].mean(axis=0) + 1e-9)
            - np.log(fraction[(batch == 1) & (cell_type == index)].mean(axis=0) + 1e-9)
            for index in range(6)
        ],
        axis=0,
    )
    plain = ~(tissue.var["is_target"] | tissue.var["is_ligand"]).to_numpy()
    strong = plain & (before.mean(axis=0) > 1)
    assert np.corrcoef(observed[strong], (gene[0] - gene[1])[strong])[0, 1] > 0.95
    factor = truth["batch_library_factor"]
    ratio = before[batch == 0].sum() / before[batch == 1].sum()
    assert abs(ratio / (factor[0] / factor[1]) - 1) < 0.05


def test_without_batches_or_strength_there_is_no_batch_effect():
    for arguments in ({"batches": 1}, {"batch_strength": 0.0}):
        truth = simulate_tissue(cells=20, genes=60, **arguments).uns["truth"]
        assert (truth["batch_gene_factor"] == 1).all()
        assert (truth["batch_library_factor"] == 1).all()


def test_domains_have_their_own_mixtures(tissue):
    domain, cell_type = codes(tissue, "domain"), codes(tissue, "cell_type")
    table = np.array([np.bincount(cell_type[domain == index], minlength=6) for index in range(4)])
    truth = tissue.uns["truth"]["domain_proportions"]
    np.testing.assert_allclose(truth.sum(axis=1), 1)
    for observed, share in zip(table, truth, strict=True):
        assert observed.sum() > 200
        assert scipy.stats.chisquare(observed, share * observed.sum()).pvalue > 1e-4
    assert scipy.stats.chi2_contingency(table).pvalue < 1e-50


def test_domains_are_regions_and_cells_keep_their_distance(tissue):
    for batch in range(2):
        rows = codes(tissue, "batch") == batch
        position, domain = tissue.obsm["spatial"][rows], codes(tissue, "domain")[rows]
        distance = cdist(position, position)
        np.fill_diagonal(distance, np.inf)
        nearest = distance.argmin(axis=1)
        assert (domain[nearest] == domain).mean() > 0.93
        assert 9 < np.median(distance.min(axis=1)) < 15
        assert position.min() == 0
        area_per_cell = np.prod(np.ptp(position, axis=0)) / rows.sum()
        assert 150 < area_per_cell < 450


def test_activation_is_a_count_of_active_neighbours(tissue):
    table = tissue.uns["truth"]["ligand_receptor"]
    position = tissue.obsm["spatial"].astype(np.float64)
    same_batch = codes(tissue, "batch")[:, None] == codes(tissue, "batch")
    near = (cdist(position, position) <= 30.0) & same_batch
    np.fill_diagonal(near, False)
    active = tissue.obsm["active_sender"]
    cell_type = tissue.obs["cell_type"].astype(str).to_numpy()
    for pair, row in enumerate(table.itertuples()):
        assert row.sender != row.receiver
        assert (cell_type[active[:, pair]] == row.sender).all()
        share = active[cell_type == row.sender, pair].mean()
        assert abs(share - 0.3) < 0.08
        number = near[:, active[:, pair]].sum(axis=1)
        wanted = np.where(cell_type == row.receiver, 1 - np.exp(-number), 0)
        np.testing.assert_allclose(tissue.obsm["activation"][:, pair], wanted, atol=1e-6)
    np.testing.assert_array_equal(
        tissue.obs["n_signals"], (tissue.obsm["activation"] > 0).sum(axis=1)
    )


def test_receptor_effect_is_there_near_senders_only(tissue, before):
    """Target genes of receivers follow active senders nearby, within one type and domain; control genes do not."""
    table = tissue.uns["truth"]["ligand_receptor"]
    size = tissue.obs["library_size"].to_numpy()[:, None]
    batch_factor = tissue.uns["truth"]["batch_gene_factor"][codes(tissue, "batch")]
    level = before / size / batch_factor
    domain = codes(tissue, "domain")
    tested = 0
    for pair, row in enumerate(table.itertuples()):
        targets = [tissue.var_names.get_loc(name) for name in row.targets.split(",")]
        control = np.flatnonzero(tissue.var["marker_of"] == row.receiver)[:5]
        receiver = (tissue.obs["cell_type"] == row.receiver).to_numpy()
        activation = tissue.obsm["activation"][:, pair]
        for index in range(4):
            rows = receiver & (domain == index)
            touched, alone = rows & (activation > 0), rows & (activation == 0)
            if min(touched.sum(), alone.sum()) < 40:
                continue
            tested += 1
            gene = level[:, targets].sum(axis=1)
            assert scipy.stats.mannwhitneyu(gene[touched], gene[alone]).pvalue < 1e-5
            ratio = gene[touched].mean() / gene[alone].mean()
            assert ratio == pytest.approx((4 ** activation[touched]).mean(), rel=0.25)
            other = level[:, control].sum(axis=1)
            assert 0.7 < other[touched].mean() / other[alone].mean() < 1.1
        # A cell that is neither receiver nor active shows nothing, whoever is near it.
        assert (activation[~receiver] == 0).all()
    assert tested >= 3


def test_neighbours_tell_what_the_cell_cannot(tissue):
    """Which receivers were signalled to is better predicted from the neighbours' ligand than from the domain."""
    row = next(tissue.uns["truth"]["ligand_receptor"].itertuples())
    receiver = (tissue.obs["cell_type"] == row.receiver).to_numpy()
    position = tissue.obsm["spatial"].astype(np.float64)
    batch = codes(tissue, "batch")
    near = (cdist(position[receiver], position) <= 30) & (batch[receiver][:, None] == batch)
    ligand = tissue.layers["counts_before_dropout"][:, [tissue.var_names.get_loc(row.ligand)]]
    neighbour_ligand = near @ ligand.toarray().astype(np.float64)
    domain = np.eye(4)[codes(tissue, "domain")][receiver]
    affected = tissue.obsm["activation"][receiver, 0] > 0
    alone, with_neighbours = (
        cross_val_score(
            LogisticRegression(max_iter=1000), features, affected, scoring="roc_auc", cv=3
        ).mean()
        for features in (domain, np.hstack([domain, np.log1p(neighbour_ligand)]))
    )
    assert with_neighbours > alone + 0.05
    assert with_neighbours > 0.8


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6, 0.99])
def test_dropout_rate(dropout):
    tissue = simulate_tissue(cells=500, genes=100, dropout=dropout)
    full, kept = tissue.layers["counts_before_dropout"], tissue.X
    lost = 1 - kept.nnz / full.nnz
    assert lost == pytest.approx(dropout, abs=4 * np.sqrt(0.25 / full.nnz))
    survived = kept.toarray() > 0
    np.testing.assert_array_equal(kept.toarray()[survived], full.toarray()[survived])
    assert (full.toarray()[survived] > 0).all()


def test_dropout_takes_weak_genes_first(tissue, before, expected):
    nonzero = before > 0
    lost = (tissue.X.toarray() == 0) & nonzero
    weak = expected < np.median(expected[nonzero])
    assert lost[nonzero & weak].mean() > 2 * lost[nonzero & ~weak].mean()
    intercept = tissue.uns["truth"]["dropout_intercept"]
    predicted = 1 / (1 + np.exp(-(intercept - np.log(expected))))
    edges = np.quantile(predicted[nonzero], [0, 0.25, 0.5, 0.75, 1])
    for low, high in itertools.pairwise(edges):
        chosen = nonzero & (predicted >= low) & (predicted < high)
        assert lost[chosen].mean() == pytest.approx(predicted[chosen].mean(), abs=0.01)


def digest(tissue):
    return [
        tissue.X.toarray(),
        tissue.layers["counts_before_dropout"].toarray(),
        tissue.obsm["spatial"],
        *(tissue.obs[name].to_numpy().astype(str) for name in tissue.obs),
        *(tissue.var[name].to_numpy().astype(str) for name in tissue.var),
    ]


def test_same_seed_same_tissue_other_seed_other_tissue():
    first, second, other = (
        simulate_tissue(cells=1100, genes=60, seed=seed)
        for seed in (7, np.int64(7), 8)  # more than one block of cells
    )
    for left, right in zip(digest(first), digest(second), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (first.X != other.X).nnz > 0
    assert not np.array_equal(first.obsm["spatial"], other.obsm["spatial"])
    assert first.var["ensembl_id"].tolist() == other.var["ensembl_id"].tolist()


def test_global_random_state_plays_no_part():
    np.random.seed(0)  # noqa: NPY002
    first = simulate_tissue(cells=50, genes=60)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert (first.X != simulate_tissue(cells=50, genes=60).X).nnz == 0


def test_dropout_leaves_everything_before_it_alone():
    none, much = (simulate_tissue(cells=60, genes=60, dropout=value) for value in (0.0, 0.5))
    for left, right in zip(digest(none)[1:], digest(much)[1:], strict=True):
        np.testing.assert_array_equal(left, right)
    assert (none.layers["counts_before_dropout"] != none.X).nnz == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"cells": 1},
        {"cells": 1, "cell_types": 1, "domains": 1, "batches": 1, "genes": 8},
        {"cells": 3, "batches": 5, "domains": 7},
        {"cells": 40, "cell_types": 1, "genes": 40},
        {"cells": 30, "cell_types": 3, "ligand_receptor_pairs": 0, "genes": 3},
        {"cells": 30, "cell_types": 2, "ligand_receptor_pairs": 9, "genes": 70},
        {"cells": 30, "domains": 30, "cell_types": 2, "markers_per_type": 0},
        {"cells": 30, "library_size": 0.01},
        {"cells": 30, "sender_activity": 1.0, "interaction_radius": 1e6},
        {"cells": 30, "sender_activity": 0.0},
    ],
)
def test_odd_sizes_work_and_can_be_written(arguments, tmp_path):
    arguments = {"genes": 60, "ligand_receptor_pairs": 1, **arguments}
    tissue = simulate_tissue(**arguments)
    assert tissue.n_obs == arguments["cells"]
    assert np.isfinite(tissue.layers["expected"]).all()
    assert np.isfinite(tissue.obsm["spatial"]).all()
    if "activation" in tissue.obsm:
        assert (tissue.obsm["activation"] <= 1).all()
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    again = anndata.read_h5ad(tmp_path / "tissue.h5ad")
    np.testing.assert_array_equal(again.X.toarray(), tissue.X.toarray())
    table = again.uns["truth"]["ligand_receptor"]
    assert len(table) == arguments["ligand_receptor_pairs"]


def test_lone_type_signals_to_others_of_its_kind_not_to_itself():
    tissue = simulate_tissue(
        cells=2,
        genes=40,
        cell_types=1,
        batches=2,
        domains=1,
        ligand_receptor_pairs=1,
        sender_activity=1.0,
    )
    assert tissue.obsm["active_sender"].all()
    assert (tissue.obsm["activation"] == 0).all()  # each is alone in its section


def test_dissociated_cells_have_no_coordinates():
    spatial, dissociated = (
        simulate_tissue(cells=40, genes=60, samples_spatial=value) for value in (True, False)
    )
    assert "spatial" not in dissociated.obsm
    np.testing.assert_array_equal(spatial.obsm["spatial"], dissociated.obsm["true_position"])
    assert (spatial.X != dissociated.X).nnz == 0


def test_expected_layer_can_be_left_out():
    kept, left = (
        simulate_tissue(cells=40, genes=60, keep_expected=value) for value in (True, False)
    )
    assert "expected" not in left.layers
    assert (kept.X != left.X).nnz == 0


def test_fewer_genes_are_the_first_of_more():
    few, many = (simulate_tissue(cells=2, genes=number) for number in (60, 90))
    assert few.var["ensembl_id"].tolist() == many.var["ensembl_id"].tolist()[:60]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"cells": 0}, "cells=0"),
        ({"cells": -5}, "cells=-5"),
        ({"cells": 10.0}, "cells=10.0"),
        ({"cells": True}, "cells=True"),
        ({"genes": 20}, "genes=20; expected at least 34: 6 marker genes"),
        ({"genes": 100, "markers_per_type": 20}, "at least 148"),
        ({"genes": 10_000_000, "cells": 1}, "genes=10000000; expected up to"),
        ({"cell_types": 0}, "cell_types=0"),
        ({"batches": 0}, "batches=0"),
        ({"domains": 0}, "domains=0"),
        ({"ligand_receptor_pairs": -1}, "ligand_receptor_pairs=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"library_size": 0}, "library_size=0"),
        ({"library_size": float("nan")}, "library_size=nan"),
        ({"library_size": float("inf")}, "library_size=inf"),
        ({"dropout": 1.0}, "dropout=1.0; expected a finite number of at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": "much"}, "dropout='much'"),
        ({"sender_activity": 1.5}, "and not above 1"),
        ({"interaction_fold": 0.0}, "interaction_fold=0.0"),
        ({"batch_strength": -1.0}, "batch_strength=-1.0"),
        ({"samples_spatial": "yes"}, "samples_spatial='yes'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, named):
    with pytest.raises(InputError) as caught:
        simulate_tissue(**arguments)
    assert named in str(caught.value)
    assert "expected" in str(caught.value)


def test_arguments_are_kept_for_the_record():
    record = simulate_tissue(cells=3, genes=60, seed=4).uns["simulation"]
    assert record["cells"] == 3
    assert record["seed"] == 4
    assert record["dropout"] == 0.2
    repeated = simulate_tissue(**record)
    assert (repeated.X != simulate_tissue(cells=3, genes=60, seed=4).X).nnz == 0


def test_gradient_genes_follow_the_place_of_a_cell_and_nothing_else():
    tissue = simulate_tissue(
        cells=800, genes=60, batches=2, domains=1, ligand_receptor_pairs=0, batch_strength=0.0,
        dropout=0.0, gradient_genes=8, gradient_fold=16.0, seed=2,
    )  # fmt: skip
    gradient = tissue.var["gradient"]
    assert gradient[gradient != ""].tolist() == ["+x", "-x", "+y", "-y"] * 2
    assert not tissue.var.loc[gradient != "", "marker_of"].any()
    # Within a cell type, ratios of genes are what the gradient made of them.
    kind, rate = codes(tissue, "cell_type"), tissue.layers["expected"].astype(np.float64)
    share = np.log(rate / rate[:, (gradient == "").to_numpy()].sum(axis=1, keepdims=True))
    for section in range(2):
        here = (codes(tissue, "batch") == section) & (kind == 0)
        place = tissue.obsm["spatial"][here]
        extent = np.ptp(tissue.obsm["spatial"][codes(tissue, "batch") == section], axis=0).max()
        for gene, name in enumerate(gradient):
            if name:
                axis = "xy".index(name[1])
                slope = np.polyfit(place[:, axis], share[here, gene], 1)[0] * extent
                sign = 1.0 if name[0] == "+" else -1.0
                assert slope == pytest.approx(sign * np.log(16.0), rel=1e-3)
            else:
                assert np.ptp(share[here, gene]) < 1e-4


def test_tissues_without_gradients_are_as_before():
    tissue = simulate_tissue(cells=30, genes=200, seed=1)
    assert not (tissue.var["gradient"] != "").any()
    with pytest.raises(InputError, match="and 9 that follow a gradient"):
        simulate_tissue(cells=3, genes=40, ligand_receptor_pairs=4, gradient_genes=9)
