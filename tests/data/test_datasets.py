"""The bundled counts are the published ones, and their labels come from the documented marker rule alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.metrics import adjusted_rand_score

from cellplm_jax.data import bundled, datasets
from cellplm_jax.data.datasets import PBMC_MARKERS, UNASSIGNED, annotate_by_markers, pbmc3k
from cellplm_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = resources.files("cellplm_jax") / "resources"


def shared(name):
    folder = Path(os.environ.get("CELLPLM_SHARED_DATA", ROOT / ".." / "shared" / "data"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"{name} is not in CELLPLM_SHARED_DATA")
    return anndata.read_h5ad(path)


@pytest.fixture(scope="module")
def blood():
    return pbmc3k()


def test_shape_types_and_totals(blood):
    assert blood.shape == (2700, 13714)
    assert isinstance(blood.X, scipy.sparse.csr_matrix | scipy.sparse.csr_array)
    assert blood.X.dtype == np.float32
    assert blood.X.nnz == 2282976
    assert blood.X.data.min() == 1
    assert blood.X.data.max() == 419
    assert blood.X.data.sum(dtype=np.float64) == 6386518
    assert blood.X.has_sorted_indices
    assert blood.obs_names[0] == "AAACATACAACCAC-1"
    assert blood.obs_names.is_unique
    assert blood.var_names.is_unique
    assert ((blood.X > 0).sum(axis=0) >= 3).all()


def test_ensembl_ids(blood):
    for column in ("ensembl_id", "released_ensembl_id"):
        assert blood.var[column].is_unique
        assert blood.var[column].str.fullmatch(r"ENSG\d{11}").all()
    assert blood.var.loc["CD3D", "ensembl_id"] == "ENSG00000167286"
    assert blood.var.loc["LYZ", "ensembl_id"] == "ENSG00000090382"
    changed = blood.var["ensembl_id"] != blood.var["released_ensembl_id"]
    assert 0 < changed.sum() < 200
    assert blood.var.loc["TXNIP", "released_ensembl_id"] == "ENSG00000117289"
    assert blood.var.loc["TXNIP", "ensembl_id"] == "ENSG00000265972"


def test_counts_are_those_of_another_copy(blood):
    other = shared("pbmc3k.h5ad")
    assert (blood.X != other.X).nnz == 0
    assert blood.obs_names.tolist() == other.obs_names.tolist()
    assert blood.var_names.tolist() == other.var_names.tolist()
    assert blood.var["released_ensembl_id"].tolist() == other.var["ensembl_id"].tolist()


def test_licence_and_source_travel_along(blood):
    assert "10x Genomics" in blood.uns["source"]
    assert "CC BY 4.0" in blood.uns["licence"]
    assert "3 of the 2,700" in blood.uns["changes"]
    text = (RESOURCES / "pbmc3k.LICENSE.md").read_text()
    for word in ("10x Genomics", "CC BY 4.0", "13,714 of 32,738", "Seurat"):
        assert word in text
    changed = int((blood.var["ensembl_id"] != blood.var["released_ensembl_id"]).sum())
    assert f"{changed} of the released" in text
    markers = {gene for genes in PBMC_MARKERS.values() for gene in genes}
    assert f"{len(markers)} marker genes" in text


def test_small_and_fast(blood):
    with resources.as_file(RESOURCES / "pbmc3k.h5ad") as path:
        assert path.stat().st_size <= 4_000_000
    times = []
    for _ in range(3):
        start = time.perf_counter()
        pbmc3k()
        times.append(time.perf_counter() - start)
    assert min(times) < 1


def test_every_call_returns_a_new_object(blood):
    other = pbmc3k()
    other.X.data[:] = 0
    other.obs["cell_type"] = "gone"
    assert pbmc3k().X.data.min() == 1
    assert "gone" not in pbmc3k().obs["cell_type"].tolist()


def test_can_be_written_and_read(blood, tmp_path):
    blood.write_h5ad(tmp_path / "copy.h5ad")
    again = anndata.read_h5ad(tmp_path / "copy.h5ad")
    assert (again.X != blood.X).nnz == 0
    pd.testing.assert_frame_equal(again.obs, blood.obs)
    pd.testing.assert_frame_equal(again.var, blood.var)


def test_missing_resource_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(bundled, "_RESOURCE", "absent.h5ad")
    with pytest.raises(InputError, match=r"absent\.h5ad.*expected.*tools/build_pbmc3k\.py"):
        pbmc3k()


def test_importing_the_module_imports_nothing_heavy():
    code = (
        "import sys, cellplm_jax.data.datasets; "
        "sys.exit(' '.join({'anndata', 'pandas', 'jax', 'scipy'} & set(sys.modules)) or 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_simulator_is_here_too():
    from cellplm_jax.data.simulate import simulate_tissue

    assert datasets.simulate_tissue is simulate_tissue


# --- labels of the bundled cells ---


def test_stored_labels_are_the_rule(blood):
    result = annotate_by_markers(blood.X, blood.var_names)
    assert isinstance(blood.obs["cell_type"].dtype, pd.CategoricalDtype)
    np.testing.assert_array_equal(blood.obs["cell_type"].to_numpy(str), result.labels)
    assert set(blood.obs["cell_type"]) == {*PBMC_MARKERS, UNASSIGNED}
    assert 0.9 < (result.labels != UNASSIGNED).mean() < 0.97


def test_rule_reads_markers_and_totals_only(blood):
    markers = sorted({gene for genes in PBMC_MARKERS.values() for gene in genes})
    subset = blood[:, markers].X
    rest = blood.X.sum(axis=1) - subset.sum(axis=1)
    counts = scipy.sparse.hstack([subset, scipy.sparse.csr_matrix(rest)])
    result = annotate_by_markers(counts, [*markers, "everything else"])
    np.testing.assert_array_equal(blood.obs["cell_type"].to_numpy(str), result.labels)


def test_agreement_with_the_clusters_of_the_seurat_tutorial(blood):
    name = {
        "Naive CD4 T": "CD4 T cell",
        "Memory CD4 T": "CD4 T cell",
        "CD8 T": "CD8 T cell",
        "NK": "NK cell",
        "B": "B cell",
        "CD14+ Mono": "CD14+ monocyte",
        "FCGR3A+ Mono": "FCGR3A+ monocyte",
        "DC": "dendritic cell",
        "Platelet": "megakaryocyte",
    }
    other = shared("pbmc3k.h5ad").obs["cell_type"].astype(str).map(name).fillna(UNASSIGNED)
    label = blood.obs["cell_type"].astype(str)
    both = ((other != UNASSIGNED).to_numpy()) & (label != UNASSIGNED).to_numpy()
    other, label = other.to_numpy()[both], label.to_numpy()[both]
    assert adjusted_rand_score(other, label) == pytest.approx(0.886, abs=0.005)
    assert (other == label).mean() == pytest.approx(0.939, abs=0.005)
    for cell_type in PBMC_MARKERS:
        assert (label[other == cell_type] == cell_type).mean() > 0.75


def test_agreement_with_bead_purified_cells():
    """An outside check: nothing about the rule was chosen on these cells, and their labels come from antibodies."""
    cells = shared("zheng_purified_pbmc.h5ad")
    lineage = {
        "nk": "NK cell",
        "bcells": "B cell",
        "monocytes": "myeloid",
        "cytotoxict": "CD8 T cell",
        "naivecytotoxic": "CD8 T cell",
        **dict.fromkeys(("memoryt", "regulatoryt", "thelper", "naivet"), "CD4 T cell"),
    }
    markers = {name: genes for name, genes in PBMC_MARKERS.items() if name != "megakaryocyte"}
    label = annotate_by_markers(cells.X, cells.var_names, markers=markers).labels
    merged = pd.Series(label).replace(
        ["CD14+ monocyte", "FCGR3A+ monocyte", "dendritic cell"], "myeloid"
    )
    truth = cells.obs["cell_type"].astype(str).map(lineage)
    assigned = label != UNASSIGNED
    assert adjusted_rand_score(truth[assigned], merged[assigned]) > 0.85
    assert (truth[assigned].to_numpy() == merged[assigned].to_numpy()).mean() > 0.92


# --- the rule itself ---


TOY = {"left": ("A", "B"), "right": ("C", "absent")}


def by_hand(counts, names, markers):
    """Write the rule again in pandas."""
    frame = pd.DataFrame(np.asarray(counts, float), columns=names)
    frame = np.log1p(frame.div(frame.sum(axis=1), axis=0).fillna(0) * 1e4)
    frame = (frame / frame.where(frame > 0).quantile(0.9)).clip(upper=1).fillna(0)
    return pd.DataFrame(
        {
            kind: frame[[gene for gene in genes if gene in names]].mean(axis=1)
            for kind, genes in markers.items()
        }
    )


@pytest.mark.parametrize(
    "container",
    [np.asarray, scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.coo_array],
)
def test_scores_equal_a_second_implementation(container):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, size=(200, 5))
    names = ["other", "C", "A", "D", "B"]
    result = annotate_by_markers(container(counts), names, markers=TOY, margin=0.1)
    scores = by_hand(counts, names, TOY)
    np.testing.assert_allclose(result.scores, scores, atol=1e-12)
    assert result.cell_types == ("left", "right")
    gap = (scores["left"] - scores["right"]).abs()
    np.testing.assert_allclose(result.margin, gap, atol=1e-12)
    wanted = np.where(gap < 0.1, UNASSIGNED, scores.idxmax(axis=1))
    np.testing.assert_array_equal(result.labels, wanted)
    assert set(result.labels) == {"left", "right", UNASSIGNED}


def test_cells_without_any_marker_stay_unassigned():
    counts = np.array([[0, 0, 5], [0, 0, 0], [4, 0, 1], [0, 3, 1]])
    result = annotate_by_markers(
        counts, ["A", "C", "x"], markers={"left": ["A"], "right": ["C"]}, margin=0.0
    )
    assert result.labels.tolist() == [UNASSIGNED, UNASSIGNED, "left", "right"]
    alone = annotate_by_markers(counts, ["A", "C", "x"], markers={"left": ["A"]})
    assert alone.labels.tolist() == [UNASSIGNED, UNASSIGNED, "left", UNASSIGNED]


def test_margin_turns_close_calls_into_unassigned(blood):
    part, names = blood.X[:300], blood.var_names
    share = [
        (annotate_by_markers(part, names, margin=margin).labels == UNASSIGNED).mean()
        for margin in (0.0, 0.05, 0.2, 2.0)
    ]
    assert share == sorted(share)
    assert share[0] == 0
    assert share[-1] == 1


@pytest.mark.parametrize(
    ("counts", "names", "options", "message"),
    [
        (np.ones((3, 2)), ["A"], {}, r"shape \(3, 2\) with 1 gene names"),
        (np.ones(3), ["A", "B", "C"], {}, r"shape \(3,\)"),
        (-np.ones((3, 2)), ["A", "C"], {"markers": TOY}, "negative or non-finite"),
        (np.full((3, 2), np.nan), ["A", "C"], {"markers": TOY}, "negative or non-finite"),
        (np.ones((3, 2)), ["A", "C"], {"markers": {}}, "empty `markers`"),
        (np.ones((3, 2)), ["A", "B"], {"markers": TOY}, r"markers of 'right' \(C, absent\)"),
        (np.ones((3, 2)), ["A", "C"], {"markers": TOY, "margin": -1.0}, r"margin=-1\.0"),
        (np.ones((3, 2)), ["A", "C"], {"markers": TOY, "target_sum": 0.0}, r"target_sum=0\.0"),
    ],
)
def test_bad_input_is_refused(counts, names, options, message):
    with pytest.raises(InputError, match=message) as caught:
        annotate_by_markers(counts, names, **options)
    assert "expected" in str(caught.value)


# --- the tool that wrote the file ---


def test_tool_writes_the_same_bytes_every_time(tmp_path):
    source = ROOT / "tools" / "build_pbmc3k.py"
    if not source.is_file():
        pytest.skip("tools/ is not part of this installation")
    specification = importlib.util.spec_from_file_location("build_pbmc3k", source)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    rng = np.random.default_rng(0)
    counts = scipy.sparse.csr_matrix(rng.poisson(0.5, size=(6, 4)) * 300)
    symbols = np.array(["TXNIP", "LYZ", "not a gene", "CD3D"])
    released = np.array(
        ["ENSG00000117289", "ENSG00000090382", "ENSG99999999999", "ENSG00000167286"]
    )
    current = tool.current_ids(symbols, released)
    assert current.tolist() == ["ENSG00000265972", *released[1:]]
    cells = np.array([f"cell{index}" for index in range(6)])
    labels = np.array(["b", "a", "b", UNASSIGNED, "a", "b"])
    for name in ("one.h5ad", "two.h5ad"):
        tool.write(tmp_path / name, counts, cells, symbols, current, released, labels)
    assert (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "two.h5ad").read_bytes()
    adata = anndata.read_h5ad(tmp_path / "one.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), counts.toarray())
    assert adata.obs["cell_type"].tolist() == labels.tolist()
    assert adata.obs_names.tolist() == cells.tolist()
    assert adata.var_names.tolist() == symbols.tolist()
    assert adata.var["ensembl_id"].tolist() == current.tolist()
    assert adata.uns["licence"] == tool.ABOUT["licence"]
