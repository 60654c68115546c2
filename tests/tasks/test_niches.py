"""Niches: planted domains are found, sections stay apart, squidpy's conventions, meetings, files, and refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_jax.cli import main
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.embedding import clustering_scores
from cellplm_jax.tasks.niches import join_sections, niches, niches_file
from tests.conftest import make_adata

pytest.importorskip("scanpy", reason="needs the extra 'eval'")
pytest.importorskip("igraph", reason="needs the extra 'eval'")


def tissue(seed=0, side=16):
    """Two square sections with two halves; in a half, three of four cells are of its own type, and types overlap."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(float)
    cells = 2 * len(points)
    adata = make_adata(cells, seed=seed)
    adata.obsm["spatial"] = np.concatenate([points, points])
    adata.obs["section"] = np.repeat(["s10", "s9"], len(points))
    half = (adata.obsm["spatial"][:, 0] >= side / 2).astype(int)
    kind = np.where(random.random(cells) < 0.75, half, 1 - half)
    adata.obs["half"], adata.obs["kind"] = half, np.array(["left", "right"])[kind]
    latent = random.normal(size=(cells, 12))
    latent[:, 0] += 2.0 * (2 * kind - 1)
    adata.obsm["X_own"] = latent.astype(np.float32)
    return adata


OWN = {"use_rep": "X_own", "batch_key": "section", "permutations": 50}


def test_domains_are_found_that_single_cells_do_not_show():
    adata = tissue()
    assert niches(adata, None, n_niches=2, label_key="kind", **OWN) is adata
    found = adata.obs["cellplm_niche"]
    assert list(found.cat.categories) == ["0", "1"]
    ours = clustering_scores(adata.obs["half"], found)["ari"]
    cells = clustering_scores(adata.obs["half"], adata.obs["kind"])["ari"]
    assert ours > 0.65 > 0.35 > cells
    facts = adata.uns["cellplm_niches"]
    assert facts["types"].tolist() == ["left", "right"]
    np.testing.assert_allclose(facts["composition"].sum(axis=1), 1)
    assert np.sort(facts["composition"][:, 0])[[0, -1]] == pytest.approx([0.25, 0.75], abs=0.12)
    # Cells of one type are neighbours more often than by chance, of two types less often.
    score = facts["meeting_zscore"]
    assert score[0, 0] > 5
    assert score[1, 1] > 5
    assert score[0, 1] < -5


def test_sections_are_never_connected():
    adata = niches(tissue(), None, n_niches=2, **OWN)
    graph = adata.obsp["spatial_connectivities"].tocoo()
    section = adata.obs["section"].to_numpy()
    assert (section[graph.row] == section[graph.col]).all()
    # One section alone has the same neighbourhoods, so the other does not enter a cell's mean.
    inner = np.asarray(adata.obsp["spatial_connectivities"].sum(axis=1)).ravel()
    assert inner.max() == 8
    assert adata.uns["spatial_neighbors"]["connectivities_key"] == "spatial_connectivities"
    distances = adata.obsp["spatial_distances"]
    assert distances.nnz == graph.nnz
    assert set(np.round(distances.data, 3)) == {1.0, 1.414}


def test_an_existing_graph_is_used_without_edges_between_sections():
    adata = tissue()
    cells = adata.n_obs
    ring = sparse.csr_matrix((np.ones(cells), (np.arange(cells), np.roll(np.arange(cells), 1))))
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(ring + ring.T)
    adata.obsp["spatial_distances"] = adata.obsp["spatial_connectivities"]
    del adata.obsm["spatial"]
    before = adata.obsp["spatial_connectivities"].copy()
    niches(adata, None, n_niches=2, label_key="kind", **OWN)
    assert "spatial_neighbors" not in adata.uns
    assert abs(adata.obsp["spatial_connectivities"] - before).nnz == 0
    assert adata.uns["cellplm_niches"]["meeting_count"].sum() == 2 * cells - 4


def test_the_joined_space_keeps_lengths_and_aligns_sections():
    random = np.random.default_rng(0)
    share = np.repeat([0.0, 0.5, 1.0], 60)  # of the second of two types in a spot
    depth = np.tile([1.0, 2.0], 90)  # of two sections
    profile = random.gamma(1.0, size=(2, 80))
    mean = np.outer(1 - share, profile[0]) + np.outer(share, profile[1])
    effect = np.where(np.arange(80) % 4 == 0, 3.0, 1.0)
    section = np.tile([0, 1], 90)
    counts = random.poisson(5 * depth[:, None] * mean * effect ** section[:, None])
    source = open_counts(
        ad.AnnData(
            sparse.csr_matrix(counts.astype(np.float32)),
            var=pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(80)]),
        ),
        [f"ENSG{n:011d}" for n in range(80)],
    )
    latent = np.log1p(counts)[:, :30].astype(np.float32)
    with source as opened:
        found = join_sections(latent, opened, [np.flatnonzero(section == n) for n in (0, 1)])
    length = np.linalg.norm(found - found.mean(axis=0), axis=1)
    # Spots of both types are nearer to the mean than spots of one.
    middle = share == 0.5
    assert length[middle].mean() < 0.8 * length[~middle].mean()
    gap = found[section == 0].mean(axis=0) - found[section == 1].mean(axis=0)
    between = found[share == 0].mean(axis=0) - found[share == 1].mean(axis=0)
    assert np.linalg.norm(gap) < 0.1 * np.linalg.norm(between)


def test_without_a_number_leiden_counts_the_niches():
    few, many = (
        niches(tissue(side=8), None, resolution=resolution, **OWN).obs["cellplm_niche"].nunique()
        for resolution in (0.05, 2.0)
    )
    assert few == 1 < many


def test_own_clusters_replace_types(tiny_model):
    adata = tissue(side=8)
    niches(adata, tiny_model, batch_key="section", permutations=10, n_niches=3)
    assert adata.uns["cellplm_niches"]["types"].tolist() == list(
        adata.obs["cellplm_cluster"].cat.categories
    )
    assert adata.uns["cellplm_niches"]["model"] == tiny_model.id
    before = adata.obs["cellplm_cluster"].copy()
    before = before.cat.rename_categories({"0": "zero"})
    adata.obs["cellplm_cluster"] = before
    niches(
        adata, tiny_model, batch_key="section", permutations=10
    )  # Leiden, and the column that is there
    assert "zero" in adata.uns["cellplm_niches"]["types"]
    pd.testing.assert_series_equal(adata.obs["cellplm_cluster"], before)
    assert list(adata.obs["cellplm_niche"].cat.categories) == [
        str(n) for n in range(adata.obs["cellplm_niche"].nunique())
    ]


def test_missing_places_and_types():
    adata = tissue()
    adata.obsm["spatial"][3] = np.nan
    adata.obs.loc[adata.obs_names[:5], "kind"] = None
    niches(adata, None, n_niches=2, label_key="kind", **OWN)
    assert adata.obs["cellplm_niche"].notna().all()
    assert adata.obsp["spatial_connectivities"][3].nnz == 0


def test_files_and_the_command(tmp_path, capsys):
    adata = tissue()
    path, out, page = tmp_path / "in.h5ad", tmp_path / "out.h5ad", tmp_path / "page.html"
    adata.write_h5ad(path)
    facts, messages = niches_file(
        path, tmp_path / "direct.h5ad", None, n_niches=2, quiet=True, **OWN
    )
    assert any("8" in message or "neighbours per cell" in message for message in messages)
    run = ["niches", path, "--use-rep", "X_own", "--batch-key", "section", "--permutations", "50",
           "--n-niches", "2", "--label-key", "kind", "--out", out, "--report", page, "--quiet"]  # fmt: skip
    assert main(list(map(str, run))) == 0
    printed = capsys.readouterr().out
    assert "obs['cellplm_niche'], 2 niches" in printed
    assert "left" in printed
    expected = niches(path, None, n_niches=2, label_key="kind", **OWN)
    written = ad.read_h5ad(out)
    np.testing.assert_array_equal(written.obs["cellplm_niche"], expected.obs["cellplm_niche"])
    np.testing.assert_array_equal(
        written.obs["cellplm_niche"], ad.read_h5ad(tmp_path / "direct.h5ad").obs["cellplm_niche"]
    )
    assert written.uns["cellplm_niches"]["types"].tolist() == ["left", "right"]
    assert set(facts["params"]) == set(written.uns["cellplm_niches"]["params"])
    text = page.read_text()
    for heading in ("Map", "Niches", "Composition", "Meetings of cell types"):
        assert f">{heading}<" in text
    assert main(["niches", str(path), "--out", str(out), "--quiet"]) == 2
    assert "neither a model nor use_rep" in capsys.readouterr().err


def no_coordinates(adata):
    del adata.obsm["spatial"]


def scattered(adata):
    adata.obs["section"] = [str(n) for n in range(adata.n_obs)]


def gaps(adata):
    adata.obs.loc[adata.obs_names[0], "section"] = None


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (no_coordinates, {}, "obsm has no 'spatial' and obsp no 'spatial_connectivities'"),
        (scattered, {}, "no cell has a neighbour"),
        (gaps, {}, "obs\\['section'\\] is missing for 1 of"),
        (None, {"label_key": "type"}, "obs has no column 'type'"),
        (None, {"n_niches": 1}, "n_niches = 1"),
        (None, {"shells": 0}, "shells = 0"),
        (None, {"resolution": 0}, "resolution = 0"),
        (None, {"use_rep": "X_pca"}, "obsm has no 'X_pca'"),
        (None, {"use_rep": None}, "neither a model nor use_rep"),
        (None, {"key_added": "a/b"}, "without '/'"),
    ],
)
def test_refusals(change, options, message):
    adata = tissue(side=4)
    if change is not None:
        change(adata)
    with pytest.raises(InputError, match=message):
        niches(adata, None, **{**OWN, "n_niches": 2, **options})
