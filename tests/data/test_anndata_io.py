"""The AnnData edge: the same right numbers from every legal file, one clear message for the others."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_jax.data import matrices
from cellplm_jax.data.anndata_io import open_counts, write_h5ad
from cellplm_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("CELLPLM_SHARED_DATA", ROOT.parent / "shared" / "data"))

CELLS = 23
VOCABULARY = [f"ENSG{n:011d}" for n in range(40)]


def dense_counts(cells=CELLS, genes=30, seed=0, highest=9):
    random = np.random.default_rng(seed)
    counts = random.integers(1, highest, (cells, genes)) * (random.random((cells, genes)) < 0.4)
    counts[0, 0] = highest  # so that a matrix is never binary
    return counts


def make(matrix, names=None, **parts):
    """AnnData whose genes are a shuffled part of the vocabulary, unless named otherwise."""
    cells, genes = matrix.shape
    if names is None:
        names = [VOCABULARY[i] for i in np.random.default_rng(1).permutation(40)[:genes]]
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical([f"b{n % 3}" for n in range(cells)]),
            "number": np.arange(cells),
            "gaps": [None if n == 1 else "x" for n in range(cells)],
        },
        index=[f"cell{n}" for n in range(cells)],
    )
    if isinstance(matrix, np.ndarray | sparse.spmatrix | sparse.sparray):
        parts["X"] = matrix
    return ad.AnnData(obs=obs, var=pd.DataFrame(index=list(names)), **parts)


def expected(counts, names, vocabulary=VOCABULARY):
    """Reference: a pandas group-by over genes, reindexed to the vocabulary."""
    frame = pd.DataFrame(np.asarray(counts, dtype=np.float64).T)
    frame = frame.groupby(np.asarray(names)).sum().reindex(vocabulary).fillna(0)
    return frame.to_numpy().T


def check(source, wanted):
    """Read everything in several ways; every block must be canonical."""
    with source:
        for step in (2, 1000):
            blocks = list(source.blocks(step))
            for block in blocks:
                assert isinstance(block, sparse.csr_matrix)
                assert block.dtype == np.float32
                assert block.shape[1] == len(wanted[0]) == source.genes
                fresh = sparse.csr_matrix((block.data, block.indices, block.indptr), block.shape)
                assert fresh.has_canonical_format
                assert (block.data != 0).all()
            np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), wanted)
        random = np.random.default_rng(5)
        for rows in (random.permutation(len(wanted)), random.integers(0, len(wanted), 50), [0]):
            np.testing.assert_array_equal(source.read_rows(rows).toarray(), wanted[rows])
        assert source.read_rows([]).shape == (0, source.genes)
        assert source.read(2, 2).shape == (0, source.genes) if source.cells > 2 else True
        assert source.cells == len(wanted)


def unsorted_with_duplicates(counts):
    """The same matrix with entries split in two and shuffled within rows, zeros stored, int64."""
    random = np.random.default_rng(3)
    data, indices, indptr = [], [], [0]
    for row in np.asarray(counts):
        columns = np.flatnonzero(row)
        parts = [(c, row[c] - 1) for c in columns] + [(c, 1) for c in columns] + [(0, 0)]
        parts = [parts[i] for i in random.permutation(len(parts))]
        indices += [c for c, _ in parts]
        data += [v for _, v in parts]
        indptr.append(len(data))
    matrix = sparse.csr_matrix(counts.shape, dtype=np.float32)
    matrix.data = np.asarray(data, dtype=np.float32)
    matrix.indices = np.asarray(indices, dtype=np.int64)
    matrix.indptr = np.asarray(indptr, dtype=np.int64)
    return matrix


FORMS = {
    "csr": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "unsorted": unsorted_with_duplicates,
    "unsorted_csc": lambda counts: unsorted_with_duplicates(np.ascontiguousarray(counts.T)).T,
}


@pytest.mark.parametrize("held", ["memory", "view", "file", "backed", "backed_view", "zarr"])
@pytest.mark.parametrize("form", FORMS)
def test_every_storage_gives_the_same_counts(form, held, tmp_path):
    counts = dense_counts()
    matrix = FORMS[form](counts)
    adata = make(matrix if matrix.dtype == np.float32 else matrix.astype(np.float32))
    assert form.startswith("unsorted") == (not getattr(adata.X, "has_canonical_format", True))
    wanted = expected(counts, adata.var_names)
    if held == "memory":
        check(open_counts(adata, VOCABULARY), wanted)
        return
    if held == "view":
        check(open_counts(adata[3:17], VOCABULARY), wanted[3:17])
        check(open_counts(adata[::-1, ::-1], VOCABULARY), wanted[::-1])
        return
    path = tmp_path / ("a.zarr" if held == "zarr" else "a.h5ad")
    adata.write_zarr(path) if held == "zarr" else adata.write_h5ad(path)
    if held in ("file", "zarr"):
        check(open_counts(path, VOCABULARY), wanted)
        check(open_counts(str(path), VOCABULARY), wanted)
        return
    backed = ad.read_h5ad(path, backed="r")
    if held == "backed":
        check(open_counts(backed, VOCABULARY), wanted)
        assert backed.file.is_open, "a file that was passed in open must stay so"
    else:
        check(open_counts(backed[2:20], VOCABULARY), wanted[2:20])
    backed.file.close()


@pytest.mark.parametrize("stored", ["memory", "file"])
@pytest.mark.parametrize("form", ["csr", "dense"])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "uint16", "int32", "int64", "uint64", "float16", "float64"]
)
def test_number_types(dtype, form, stored, tmp_path):
    counts = dense_counts().astype(bool if dtype == "bool" else int)
    if dtype == "float16" and form == "csr":
        pytest.skip("scipy has no float16")
    adata = make(FORMS[form](counts.astype(dtype)))
    source = adata
    if stored == "file":
        source = tmp_path / "a.h5ad"
        adata.write_h5ad(source)
    check(open_counts(source, VOCABULARY), expected(counts, adata.var_names))


def test_big_endian_file(tmp_path):
    counts = dense_counts()
    path = tmp_path / "a.h5ad"
    adata = make(sparse.csr_matrix(counts.astype(np.float32)))
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for key, dtype in (("data", ">f4"), ("indices", ">i8")):
            values = file[f"X/{key}"][:]
            del file[f"X/{key}"]
            file.create_dataset(f"X/{key}", data=values.astype(dtype))
    check(open_counts(path, VOCABULARY), expected(counts, adata.var_names))


@pytest.mark.filterwarnings("ignore")
def test_file_of_the_first_anndata_versions(tmp_path):
    counts = sparse.csr_matrix(dense_counts().astype(np.float32))
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        cells = [(f"cell{n}".encode(), n) for n in range(CELLS)]
        file["obs"] = np.array(cells, dtype=[("index", "S10"), ("number", "i4")])
        genes = [(name.encode(),) for name in VOCABULARY[:30]]
        file["var"] = np.array(genes, dtype=[("index", "S20")])
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", counts.shape
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(counts, key)
    source = open_counts(path, VOCABULARY)
    assert source.obs_names[1] == "cell1"
    check(source, expected(counts.toarray(), VOCABULARY[:30]))


def test_source_is_never_changed():
    counts = dense_counts()
    matrix = unsorted_with_duplicates(counts)
    before = [matrix.data.copy(), matrix.indices.copy(), matrix.indptr.copy()]
    adata = make(matrix)
    adata.X = matrix
    list(open_counts(adata, VOCABULARY).blocks(5))
    for was, now in zip(before, (adata.X.data, adata.X.indices, adata.X.indptr), strict=True):
        np.testing.assert_array_equal(was, now)
    dense = counts.astype(np.float32)
    kept = dense.copy()
    adata = make(dense)
    list(open_counts(adata, VOCABULARY, values="normalized").blocks(5))
    np.testing.assert_array_equal(adata.X, kept)


def test_repeated_genes_are_summed_and_versions_ignored():
    counts = dense_counts(genes=14)
    names = [*VOCABULARY[:12], VOCABULARY[3] + ".7", VOCABULARY[3] + ".8_PAR_Y"]
    adata = make(sparse.csr_matrix(counts.astype(float)), names)
    source = open_counts(adata, VOCABULARY)
    check(source, expected(counts, [*VOCABULARY[:12], VOCABULARY[3], VOCABULARY[3]]))
    assert source.report.genes.duplicated == 1
    assert any("summed" in line for line in source.report.messages())
    assert source.measured.tolist() == [n < 12 for n in range(40)]


def test_genes_outside_the_vocabulary_are_dropped():
    counts = dense_counts(genes=30)
    names = [VOCABULARY[n] if n % 2 else f"OTHER{n}" for n in range(30)]
    source = open_counts(make(counts.astype(float), names), VOCABULARY)
    check(source, expected(counts, names))
    assert source.report.genes.unmatched == 15


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_one_cell_and_cells_without_counts(form, tmp_path):
    one = dense_counts(cells=1)
    adata = make(FORMS[form](one.astype(np.float32)))
    check(open_counts(adata, VOCABULARY), expected(one, adata.var_names))

    counts = dense_counts()
    counts[[0, 4, 22]] = 0
    counts[1, 0] = 5
    adata = make(FORMS[form](counts.astype(np.float32)))
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    source = open_counts(path, VOCABULARY)
    assert source.report.cells_without_counts is None
    source.read(0, 10)
    assert source.report.cells_without_counts is None
    assert "cells_without_counts" not in source.report.as_dict()
    source.read_rows(np.arange(22, 9, -1))
    assert source.report.cells_without_counts == 3
    assert "3 of 23 cells have no counts" in source.report.messages()[-1]
    check(source, expected(counts, adata.var_names))


def test_nothing_but_zeros_is_legal():
    adata = make(sparse.csr_matrix((5, 30), dtype=np.float32))
    source = open_counts(adata, VOCABULARY)
    assert source.read(0, 5).nnz == 0
    assert source.report.cells_without_counts == 5


def test_ranges_outside_the_file():
    source = open_counts(make(dense_counts()), VOCABULARY)
    for start, stop in ((-1, 3), (0, CELLS + 1), (5, 4)):
        with pytest.raises(IndexError):
            source.read(start, stop)
    for rows in ([CELLS], [-1]):
        with pytest.raises(IndexError):
            source.read_rows(rows)
    with pytest.raises(InputError, match="at least 1"):
        list(source.blocks(0))
    source.close()
    with pytest.raises(ValueError, match="was closed"):
        source.read(0, 1)


# -- where the counts are ------------------------------------------------------------------------


def logged(counts):
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.log1p(counts / totals * 1e4).astype(np.float32)


@pytest.mark.parametrize("stored", ["memory", "file", "backed"])
def test_raw_is_used_when_x_is_normalised(stored, tmp_path):
    counts = dense_counts(genes=30)
    full = make(sparse.csr_matrix(counts.astype(np.float32)))
    adata = full[:, 5:].copy()  # as CELLxGENE: raw has more genes than X
    adata.X = sparse.csr_matrix(logged(counts[:, 5:]))
    adata.raw = full
    source = adata
    if stored != "memory":
        source = tmp_path / "a.h5ad"
        adata.write_h5ad(source)
    if stored == "backed":
        source = ad.read_h5ad(source, backed="r")
    found = open_counts(source, VOCABULARY)
    assert found.report.matrix == "raw.X"
    assert "skipped X: non-integer values" in found.report.messages()[0]
    assert "log1p" in found.report.messages()[0]
    check(found, expected(counts, full.var_names))
    check(open_counts(source, VOCABULARY, layer="raw.X"), expected(counts, full.var_names))


@pytest.mark.parametrize("layer", ["counts", "raw_counts", "count", "raw"])
@pytest.mark.parametrize("stored", [False, True])
def test_usual_layers_are_searched(layer, stored, tmp_path):
    counts = dense_counts()
    adata = make(logged(counts), layers={"a": logged(counts), layer: counts.astype(np.int32)})
    source = adata
    if stored:
        source = tmp_path / "a.h5ad"
        adata.write_h5ad(source)
    found = open_counts(source, VOCABULARY)
    assert found.report.matrix == f"layers['{layer}']"
    check(found, expected(counts, adata.var_names))


def test_layer_asked_for():
    counts, other = dense_counts(), dense_counts(seed=9)
    adata = make(counts.astype(float), layers={"mine": sparse.csc_matrix(other)})
    assert open_counts(adata, VOCABULARY).report.matrix == "X"
    found = open_counts(adata, VOCABULARY, layer="mine")
    assert found.report.matrix == "layers['mine']"
    assert any("CSC" in line for line in found.report.messages())
    check(found, expected(other, adata.var_names))
    check(open_counts(adata, VOCABULARY, layer="X"), expected(counts, adata.var_names))
    with pytest.raises(InputError, match=r"no layer 'yours'; expected .*'mine'.*'X'.*--layer"):
        open_counts(adata, VOCABULARY, layer="yours")
    with pytest.raises(InputError, match="no layers"):
        open_counts(make(counts), VOCABULARY, layer="yours")


def test_x_may_be_absent(tmp_path):
    counts = dense_counts()
    adata = make(np.zeros((CELLS, 30)), layers={"counts": counts})
    adata.X = None
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    for source in (adata, path):
        check(open_counts(source, VOCABULARY), expected(counts, adata.var_names))
    del adata.layers["counts"]
    with pytest.raises(InputError, match="no matrix X"):
        open_counts(adata, VOCABULARY)


def test_zeros_in_x_do_not_hide_the_counts():
    counts = dense_counts()
    adata = make(np.zeros((CELLS, 30), np.float32), layers={"counts": counts})
    assert open_counts(adata, VOCABULARY).report.matrix == "layers['counts']"


# -- what is refused -----------------------------------------------------------------------------


def test_normalised_values_are_refused_with_the_remedy():
    counts = dense_counts()
    adata = make(logged(counts), layers={"scaled": logged(counts) - 1})
    with pytest.raises(InputError) as caught:
        open_counts(adata, VOCABULARY)
    message = str(caught.value)
    for part in (
        "X: non-integer values, max",
        "looks log1p-normalised",
        "layer=",
        "values='log1p'",
    ):
        assert part in message
    with pytest.raises(InputError, match=r"layers\['scaled'\].*negative.*scaled"):
        open_counts(adata, VOCABULARY, layer="scaled")
    with pytest.raises(InputError, match="looks normalised by library size"):
        open_counts(make(np.expm1(logged(counts))), VOCABULARY)
    with pytest.raises(InputError, match=r"expected one of 'counts', 'normalized', 'log1p'"):
        open_counts(adata, VOCABULARY, values="logged")


def test_declared_values_are_accepted():
    counts = dense_counts()
    log, norm = logged(counts), np.expm1(logged(counts))
    names = make(log).var_names
    for matrix in (log, sparse.csr_matrix(log), sparse.csc_matrix(log)):
        with open_counts(make(matrix), VOCABULARY, values="log1p") as source:
            got = source.read(0, CELLS).toarray()
            assert source.report.values == "log1p"
            assert any("expm1" in line for line in source.report.messages())
        np.testing.assert_allclose(np.log1p(got), expected(log, names), rtol=2e-6)
    with open_counts(make(norm), VOCABULARY, values="normalized") as source:
        np.testing.assert_allclose(
            source.read(0, CELLS).toarray(), expected(norm, names), rtol=1e-6
        )
    # Sums of repeated genes are sums of counts, not of logarithms.
    twice = [*VOCABULARY[:29], VOCABULARY[0]]
    with open_counts(make(log, twice), VOCABULARY, values="log1p") as source:
        got = source.read(0, CELLS).toarray()
    np.testing.assert_allclose(got, expected(np.expm1(log.astype(float)), twice), rtol=1e-5)


def test_declared_values_that_cannot_be_true():
    counts = dense_counts()
    with pytest.raises(InputError, match="which are raw counts"):
        open_counts(make(counts.astype(float)), VOCABULARY, values="log1p")
    with pytest.raises(InputError, match="none above 30"):
        open_counts(make(np.expm1(logged(counts))), VOCABULARY, values="log1p")
    bad = logged(counts)
    bad[5, 6] = -0.5
    for values in ("log1p", "normalized"):
        source = open_counts(make(bad), VOCABULARY, values=values)
        with pytest.raises(InputError, match=r"1 negative value .*-0\.5 in cell 'cell5'"):
            source.read(0, CELLS)


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "file"])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (-2.0, "negative"),
        (np.nan, "NaN"),
        (np.inf, "infinite"),
        (-np.inf, "infinite"),
        (2.5, "non-integer"),
        (1e9, "too large"),
    ],
)
def test_bad_values_are_named(value, name, form, tmp_path):
    counts = dense_counts().astype(np.float64)
    counts[[7, 9], 4] = value
    adata = make(FORMS["csr" if form == "file" else form](counts))
    source = adata
    if form == "file":
        source = tmp_path / "a.h5ad"
        adata.write_h5ad(source)
    with pytest.raises(InputError) as caught:  # at once: not halfway through the work
        open_counts(source, VOCABULARY)
    message = str(caught.value)
    assert "expected" in message
    if name == "too large":  # such a matrix is no candidate at all
        assert "too large for counts" in message
        return
    assert f"2 {name} values in X" in message
    assert "cell 'cell7'" in message
    assert f"gene '{adata.var_names[4]}'" in message
    assert f"first is {value}" in message


def test_bad_values_outside_the_probe_are_found_when_read(monkeypatch):
    monkeypatch.setattr(matrices, "PROBE_VALUES", 64)
    counts = dense_counts(cells=400).astype(np.int32)
    matrix = sparse.csr_matrix(counts)
    position = len(matrix.data) // 3 + 7  # between two sampled places
    matrix.data[position] = -4
    row = int(np.searchsorted(matrix.indptr, position, side="right")) - 1
    source = open_counts(make(matrix), VOCABULARY)
    source.read(0, row)
    with pytest.raises(InputError, match=rf"1 negative value .*first is -4 in cell 'cell{row}'"):
        source.read_rows([row + 3, row, 0])
    # also where the gene is not one of the vocabulary's
    source = open_counts(make(matrix, [f"X{n}" for n in range(30)]), ["X1", "X2"])
    if matrix.indices[position] not in (1, 2):
        with pytest.raises(InputError, match="negative"):
            source.read(row, row + 1)


def test_almost_integers_are_rounded():
    counts = dense_counts()
    noise = np.random.default_rng(2).uniform(-9e-4, 9e-4, counts.shape)
    adata = make((counts + noise).astype(np.float64))
    check(open_counts(adata, VOCABULARY), expected(counts, adata.var_names))


def test_text_is_not_counts():
    adata = make(dense_counts())
    adata.layers["text"] = np.full(adata.shape, "a", dtype=object)
    with pytest.raises(InputError, match="values of type object"):
        open_counts(adata, VOCABULARY, layer="text")
    with pytest.raises(InputError, match="values of type object"):
        open_counts(adata, VOCABULARY, layer="text", values="normalized")


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("shape", [(0, 30), (5, 0), (0, 0)])
def test_empty(shape, stored, tmp_path):
    adata = ad.AnnData(np.zeros(shape, np.float32))
    source = adata
    if stored:
        source = tmp_path / "a.h5ad"
        adata.write_h5ad(source)
    with pytest.raises(InputError, match=rf"empty \({shape[0]} cells x {shape[1]} genes\)"):
        open_counts(source, VOCABULARY)


def test_files_that_are_no_anndata(tmp_path):
    whole = tmp_path / "whole.h5ad"
    make(sparse.csr_matrix(dense_counts().astype(float))).write_h5ad(whole)
    text = tmp_path / "text.h5ad"
    text.write_text("cell,gene\n1,2\n")
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    nothing = tmp_path / "nothing.h5ad"
    nothing.write_bytes(b"")
    tenx = tmp_path / "tenx.h5"
    with h5py.File(tenx, "w") as file:
        file.create_group("matrix")
    folder = tmp_path / "folder.zarr"
    folder.mkdir()
    for path, words in (
        (text, "cannot be read"),
        (cut, "cut off"),
        (nothing, "is empty, not HDF5"),
        (tenx, "'matrix' but no 'obs'"),
        (folder, "without a zarr group"),
        (tmp_path / "absent.h5ad", "does not exist"),
    ):
        with pytest.raises(InputError) as caught:
            open_counts(path, VOCABULARY)
        message = str(caught.value)
        assert words in message
        assert str(path) in message
        assert "\n" not in message
    with pytest.raises(InputError, match="source of type ndarray"):
        open_counts(np.zeros((2, 2)), VOCABULARY)


@pytest.mark.parametrize("damage", ["indices", "indptr", "data", "shape"])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_damaged_matrices(form, damage, tmp_path):
    path = tmp_path / "a.h5ad"
    make(FORMS[form](dense_counts().astype(float))).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if damage == "data":
            del file["X/data"]
        elif damage == "shape":
            file["X"].attrs["shape"] = [CELLS + 1, 30]
        else:
            values = file[f"X/{damage}"][:]
            values[3] = 10_000
            file[f"X/{damage}"][...] = values
    with pytest.raises(InputError), open_counts(path, VOCABULARY) as source:
        list(source.blocks(5))


def test_file_is_closed_after_an_error(tmp_path):
    path = tmp_path / "a.h5ad"
    make(logged(dense_counts())).write_h5ad(path)
    with pytest.raises(InputError) as kept:  # and with it every frame that knows the file
        open_counts(path, VOCABULARY)
    with h5py.File(path, "r+"):  # fails while it is open for reading
        pass
    assert "log1p" in str(kept.value)
    with open_counts(path, VOCABULARY, values="log1p"):
        pass
    with h5py.File(path, "r+"):
        pass


# -- gene names ----------------------------------------------------------------------------------


def test_best_column_of_gene_names_is_found():
    counts = dense_counts(genes=20)
    ids = VOCABULARY[:20]
    adata = make(counts, [f"name{n}" for n in range(20)])
    adata.var["Gene_IDs"] = [*ids[:10], *["?"] * 10]
    adata.var["feature_id"] = pd.Categorical([gene + ".3" for gene in ids])
    adata.var["n_cells"] = 3
    adata.var["my_ids"] = [*ids[:11], *["?"] * 9]
    source = open_counts(adata, VOCABULARY)
    assert source.report.gene_key == "feature_id"
    check(source, expected(counts, ids))
    source = open_counts(adata, VOCABULARY, gene_key="my_ids")
    assert source.report.gene_key == "my_ids"
    assert source.report.genes.genes_matched == 11
    with pytest.raises(InputError, match=r"no column 'other'.*'Gene_IDs'.*'my_ids'.*--gene-key"):
        open_counts(adata, VOCABULARY, gene_key="other")
    with pytest.raises(InputError, match=r"0 of the model's 40 genes.*'name0'"):
        open_counts(adata, VOCABULARY, gene_key="var_names")
    with pytest.raises(InputError, match=r"var\['n_cells'\]"):
        open_counts(adata, VOCABULARY, gene_key="n_cells")
    # ties go to var_names
    tied = make(counts, ids)
    tied.var["ensembl_id"] = ids
    assert open_counts(tied, VOCABULARY).report.gene_key == "var_names"


def test_empty_id_falls_back_to_the_name():
    counts = dense_counts(genes=20)
    ids = np.array(VOCABULARY[:20], dtype=object)
    names = [f"n{n}" for n in range(18)] + [VOCABULARY[18], "n19"]
    adata = make(counts, names)
    for blanks in (["", ""], [None, None], [np.nan, np.nan]):
        adata.var["ensembl_id"] = [*ids[:18], *blanks]
        source = open_counts(adata, VOCABULARY)
        assert source.report.gene_key == "ensembl_id"
        assert source.report.genes.genes_matched == 19
        check(source, expected(counts, [*ids[:19], "n19"]))


def test_too_few_known_genes():
    adata = make(dense_counts(genes=30), [*VOCABULARY[:5], *(f"x{n}" for n in range(25))])
    with pytest.raises(InputError, match=r"5 of the model's 40 genes .*at least 10"):
        open_counts(adata, VOCABULARY)
    assert open_counts(adata, VOCABULARY, minimum_genes=5).measured.sum() == 5
    with pytest.raises(InputError, match="at least 6"):
        open_counts(adata, VOCABULARY, minimum_genes=6)
    mouse = make(dense_counts(genes=4), ["Gad2", "Gapdh", "Cnr1", "Vip"])
    with pytest.raises(InputError, match="look like mouse genes"):
        open_counts(mouse, VOCABULARY)
    # Symbols of rats look like those of mice; the ids beside them tell.
    rat = make(dense_counts(genes=3), ["Actb", "Trp53", "Cd4"])
    human = ["ENSG00000075624", "ENSG00000141510", "ENSG00000010610"]
    assert open_counts(rat, human).measured.all()
    rat.var["gene_ids"] = [f"ENSRNOG{n:011d}" for n in range(3)]
    with pytest.raises(InputError, match="genes of rat"):
        open_counts(rat, human)


# -- obs, obsm, report ---------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_columns_and_coordinates(stored, tmp_path):
    adata = make(dense_counts())
    places = np.random.default_rng(0).normal(size=(CELLS, 3)).astype(np.float32)
    places[2, 1], places[3, 0], places[4, 2] = np.nan, np.inf, np.nan
    adata.obsm["spatial"] = places
    adata.obsm["frame"] = pd.DataFrame(places[:, :2], index=adata.obs_names, columns=["x", "y"])
    adata.obsm["double"] = places[:, :2].astype(np.float64)
    adata.obsm["line"] = places[:, :1]
    source = adata
    if stored:
        source = tmp_path / "a.h5ad"
        adata.write_h5ad(source)
    with open_counts(source, VOCABULARY) as opened:
        assert opened.obs_names.tolist() == adata.obs_names.tolist()
        assert opened.column("batch").tolist() == [f"b{n % 3}" for n in range(CELLS)]
        assert opened.column("number").tolist() == [str(n) for n in range(CELLS)]
        with pytest.raises(InputError, match=r"no column 'lane'.*'batch', 'number', 'gaps'"):
            opened.column("lane")
        with pytest.raises(InputError, match=r"missing for 1 of 23 cells, the first 'cell1'"):
            opened.column("gaps")
        assert opened.column("gaps", missing="?").tolist() == ["x", "?", *["x"] * (CELLS - 2)]

        wanted = places[:, :2].astype(np.float64)
        wanted[[2, 3]] = np.nan
        for key in ("spatial", "frame", "double"):
            got = opened.coordinates(key)
            assert got.dtype == np.float64
            assert got.shape == (CELLS, 2)
            np.testing.assert_array_equal(got, wanted)
        assert opened.coordinates("umap") is None
        with pytest.raises(InputError, match=r"no 'umap'.*'frame'.*--spatial-key"):
            opened.coordinates("umap", required=True)
        with pytest.raises(InputError, match=r"obsm\['line'\].*\(23, 1\).*\(23, 2\)"):
            opened.coordinates("line")
    assert np.isinf(adata.obsm["double"][3, 0]), "the source was changed"


def test_report_fits_json_and_uns(tmp_path):
    adata = make(sparse.csc_matrix(dense_counts()))
    path = tmp_path / "in.h5ad"
    adata.write_h5ad(path)
    with open_counts(path, VOCABULARY) as source:
        list(source.blocks(9))
        report = source.report
    assert report.source == "in.h5ad"
    assert report.matrix == "X"
    assert report.storage.startswith("CSC int")
    assert report.values == "counts"
    assert report.cells == CELLS
    again = json.loads(json.dumps(report.as_dict()))
    assert again["genes"]["genes_matched"] == 30
    assert again["cells_without_counts"] == 0
    adata.uns["cellplm"] = again
    write_h5ad(adata, tmp_path / "out.h5ad")
    back = ad.read_h5ad(tmp_path / "out.h5ad")
    assert back.uns["cellplm"]["genes"]["genes_matched"] == 30
    assert all(isinstance(line, str) and line for line in report.messages())


# -- reading costs what it should ----------------------------------------------------------------


class Watched:
    """A stored vector that counts how much of it is read."""

    def __init__(self, array):
        self.array, self.read, self.calls, self.largest = array, 0, 0, 0
        self.dtype = array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, key):
        part = self.array[key]
        self.read += len(part)
        self.calls += 1
        self.largest = max(self.largest, len(part))
        return part


def test_rows_are_read_in_runs_and_only_once():
    matrix = sparse.csr_matrix(dense_counts(cells=100).astype(np.float32))
    source = open_counts(make(matrix), VOCABULARY)
    watched = Watched(matrix.data)
    source._rows.data = watched
    wanted = [50, 10, 11, 12, 50, 49, 9]
    source.read_rows(wanted)
    assert watched.calls == 2
    assert watched.read == sum(np.diff(matrix.indptr)[sorted(set(wanted))])


def test_probe_is_bounded(monkeypatch):
    monkeypatch.setattr(matrices, "PROBE_VALUES", 320)
    values = Watched(np.ones(100_000, dtype=np.float32))
    assert len(matrices.sample_values(values, 100_000)) == 320
    assert values.calls == matrices.PROBE_BLOCKS


def test_dense_blocks_are_bounded(monkeypatch):
    monkeypatch.setattr(matrices, "DENSE_ENTRIES", 90)
    counts = dense_counts()
    adata = make(counts.astype(np.float32))
    source = open_counts(adata, VOCABULARY)
    source._rows.array = watched = Watched(np.asarray(adata.X))
    check(source, expected(counts, adata.var_names))
    assert watched.largest == 3, "90 entries of 30 genes are 3 rows"


# -- writing -------------------------------------------------------------------------------------


def test_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.h5ad"
    adata = make(sparse.csr_matrix(dense_counts()))
    write_h5ad(adata, path, compression="gzip")
    assert os.listdir(tmp_path) == ["out.h5ad"]
    if os.name == "posix":
        plain = tmp_path / "plain"
        plain.touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
        plain.unlink()
    check(open_counts(path, VOCABULARY), expected(adata.X.toarray(), adata.var_names))

    before = path.read_bytes()
    adata.uns["cannot"] = object()
    with pytest.raises(Exception, match=r"cannot|No method registered|IORegistryError"):
        write_h5ad(adata, path)
    assert os.listdir(tmp_path) == ["out.h5ad"]
    assert path.read_bytes() == before

    del adata.uns["cannot"]
    adata.obs["new"] = 1
    write_h5ad(adata, str(path))
    assert "new" in ad.read_h5ad(path).obs
    assert os.listdir(tmp_path) == ["out.h5ad"]

    with pytest.raises(InputError, match="does not exist"):
        write_h5ad(adata, tmp_path / "absent" / "out.h5ad")
    with pytest.raises(InputError, match="is a folder"):
        write_h5ad(adata, tmp_path)


def test_nullable_strings_go_round(tmp_path):
    adata = make(dense_counts())
    adata.obs["text"] = pd.array(["a"] * (CELLS - 1) + [None], dtype="string")
    first, second = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    write_h5ad(adata, first)
    with open_counts(first, VOCABULARY) as source:
        assert source.column("text", missing="none")[-1] == "none"
    write_h5ad(ad.read_h5ad(first), second)
    assert ad.read_h5ad(second).obs["text"].isna().sum() == 1


def test_backed_object_can_be_written(tmp_path):
    adata = make(sparse.csr_matrix(dense_counts()))
    write_h5ad(adata, tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    backed.obs["new"] = 1
    write_h5ad(backed, tmp_path / "b.h5ad")
    backed.file.close()
    back = ad.read_h5ad(tmp_path / "b.h5ad")
    assert "new" in back.obs
    np.testing.assert_array_equal(back.X.toarray(), adata.X.toarray())


# -- real files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    path = SHARED.parent / "reference" / "20230926_85M.config.json"
    if not path.exists():
        pytest.skip(f"the published vocabulary is not at {path}")
    return json.loads(path.read_text())["gene_list"]


@pytest.mark.parametrize("name", ["pbmc3k", "gbm_panobinostat_lemur", "xenium_breast_jef2023_4fov"])
def test_real_files(name, published):
    path = SHARED / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    whole = ad.read_h5ad(path)
    rows = np.random.default_rng(0).integers(0, whole.n_obs, 60)
    with open_counts(path, published) as source:
        assert source.cells == whole.n_obs
        assert source.report.matrix == "X"
        assert source.column("batch").tolist() == whole.obs["batch"].astype(str).tolist()
        assert (source.coordinates() is None) == ("spatial" not in whole.obsm)
        total = sum(block.sum(dtype=np.float64) for block in source.blocks(4096))
        column = source.report.genes.column
        assert total == whole.X[:, column >= 0].sum(dtype=np.float64)
        names = [published[c] if c >= 0 else "" for c in column]
        wanted = expected(whole.X[rows].toarray(), names, published)
        np.testing.assert_array_equal(source.read_rows(rows).toarray(), wanted)


def test_real_log_normalised_file_is_refused(published):
    datasets = pytest.importorskip("scanpy").datasets
    adata = datasets.pbmc68k_reduced()
    with pytest.raises(InputError) as caught:
        open_counts(adata, published)
    for place in ("X: negative values", "raw.X: non-integer values", "log1p"):
        assert place in str(caught.value)
    with open_counts(adata, published, layer="raw.X", values="log1p") as source:
        block = source.read(0, 10)
    assert block.data.min() > 0
    assert np.isfinite(block.data).all()
    with pytest.raises(InputError, match="negative"):
        open_counts(adata, published, values="log1p").read(0, 10)


def test_import_is_light():
    import subprocess

    code = "import sys, cellplm_jax.data.anndata_io; sys.exit(bool({'anndata', 'jax', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_file_written_element_by_element_has_an_empty_raw(tmp_path):
    counts = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    adata = ad.AnnData(counts, var=pd.DataFrame(index=["G1", "G2", "G3"]))
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        ad.io.write_elem(file, "/", adata)
        assert file["raw"].shape is None
    with open_counts(tmp_path / "cells.h5ad", ["G1", "G2", "G3"], minimum_genes=1) as source:
        np.testing.assert_array_equal(source.read(0, 3).toarray(), counts.toarray())
