"""Embedding: the numbers depend on the cells and their context, never on how they were stored or streamed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys

import anndata as ad
import h5py
import jax
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.config import PositionsConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.batches import bucket
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.tasks import embed as embed_module
from cellplm_jax.tasks import long_context
from cellplm_jax.tasks.embed import embed, embed_file
from cellplm_jax.tasks.pretrained import Pretrained, numba_works
from tests.conftest import SHARED, VOCABULARY, make_adata, make_counts

KEY = "X_cellplm"


def embedding(adata, model, **options):
    """Embed a copy and return the numbers."""
    return embed(adata.copy(), model, **options).obsm[KEY]


def close(one, two):
    np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


def test_writes_obsm_and_uns(tiny_model):
    adata = make_adata(30)
    assert embed(adata, tiny_model, batch_key="batch", cells_per_context=9) is adata
    found = adata.obsm[KEY]
    assert found.shape == (30, 16)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.ptp(found, axis=0).min() > 0  # cells differ
    facts = adata.uns["cellplm"]
    assert facts["model"] == tiny_model.id
    assert facts["model"].startswith("tiny@")
    assert facts["context"] == {
        "batch_key": "batch",
        "cells_per_context": 9,
        "coordinates": "spatial",
    }
    assert facts["input"]["matrix"] == "X"
    assert facts["input"]["cells"] == 30
    assert facts["input"]["cells_without_counts"] == 0
    assert facts["input"]["genes"]["matched"] == 40
    assert facts["input"]["genes"]["missing"] == 0
    assert facts["input"]["genes"]["unmatched"] == 3


def test_key_added_and_other_slots_are_left_alone(tiny_model):
    adata = make_adata(12)
    before = adata.copy()
    embed(adata, tiny_model, key_added="X_other")
    assert set(adata.obsm) == {"spatial", "X_other"}
    assert (adata.X != before.X).nnz == 0
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])
    assert adata.obs.equals(before.obs)


def test_permuting_cells_permutes_embeddings(tiny_model):
    adata = make_adata(45)
    order = np.random.default_rng(0).permutation(45)
    close(embedding(adata[order], tiny_model), embedding(adata, tiny_model)[order])


def test_gene_order_and_foreign_genes_do_not_matter(tiny_model):
    adata = make_adata(20)
    wanted = embedding(adata, tiny_model)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    np.testing.assert_array_equal(embedding(adata[:, order], tiny_model), wanted)
    known = [name for name in adata.var_names if name.startswith("ENSG")]
    np.testing.assert_array_equal(embedding(adata[:, known], tiny_model), wanted)


def test_a_gene_that_is_absent_is_a_gene_without_counts(tiny_model):
    adata = make_adata(20)
    gone = VOCABULARY[5:9]
    zeroed = adata.copy()
    zeroed.X = zeroed.X.toarray()
    zeroed.X[:, zeroed.var_names.isin(gone)] = 0
    wanted = embedding(zeroed, tiny_model)
    np.testing.assert_array_equal(
        embedding(adata[:, ~adata.var_names.isin(gone)], tiny_model), wanted
    )
    assert np.abs(wanted - embedding(adata, tiny_model)).max() > 1e-4


@pytest.mark.parametrize(("cells", "nonzeros"), [(7, 2048), (32, 2), (512, 1), (1, 2048)])
def test_chunks_do_not_matter(tiny_model, monkeypatch, cells, nonzeros):
    adata = make_adata(45)
    wanted = embedding(adata, tiny_model, batch_key="batch")
    monkeypatch.setattr(embed_module, "CHUNK_CELLS", cells)
    monkeypatch.setattr(embed_module, "CHUNK_NONZEROS", nonzeros)
    close(embedding(adata, tiny_model, batch_key="batch"), wanted)


def test_padding_does_not_matter(tiny_model, monkeypatch):
    adata = make_adata(45)
    wanted = embedding(adata, tiny_model)
    assert bucket(45) != 96
    monkeypatch.setattr(embed_module, "bucket", lambda size, minimum=32: 96)
    close(embedding(adata, tiny_model), wanted)


def test_coordinates_matter_in_any_unit(tiny_model):
    adata = make_adata(20)
    wanted = embedding(adata, tiny_model)
    without = embedding(adata, tiny_model, spatial_key=None)
    assert np.abs(wanted - without).max() > 1e-3
    plain = adata.copy()
    del plain.obsm["spatial"]
    np.testing.assert_array_equal(embedding(plain, tiny_model), without)
    moved = adata.copy()
    moved.obsm["elsewhere"] = moved.obsm.pop("spatial") * 2.0 + 1024.0
    close(embedding(moved, tiny_model, spatial_key="elsewhere"), wanted)
    flipped = adata.copy()
    flipped.obsm["spatial"] = flipped.obsm["spatial"][::-1].copy()
    assert np.abs(embedding(flipped, tiny_model) - wanted).max() > 1e-3


def test_cells_without_coordinates_among_others(tiny_model):
    adata = make_adata(20)
    adata.obsm["spatial"][3] = np.nan
    adata.obsm["spatial"][4, 1] = np.inf
    found = embedding(adata, tiny_model)
    assert np.isfinite(found).all()
    adata.obsm["spatial"][:] = np.nan
    np.testing.assert_array_equal(
        embedding(adata, tiny_model), embedding(adata, tiny_model, spatial_key=None)
    )


def test_a_model_without_positions_ignores_coordinates(tiny_model):
    config = dataclasses.replace(tiny_model.config, positions=PositionsConfig(kind="none"))
    model = Pretrained(config, tiny_model.params, VOCABULARY)
    adata = make_adata(8)
    np.testing.assert_array_equal(
        embedding(adata, model), embedding(adata, model, spatial_key=None)
    )
    assert embed(adata, model).uns["cellplm"]["context"]["coordinates"] == ""


def test_each_batch_is_a_context_of_its_own(tiny_model):
    adata = make_adata(50)
    adata.obs["batch"] = np.random.default_rng(0).choice(["x", "y", "z"], 50)
    found = embedding(adata, tiny_model, batch_key="batch")
    for label in "xyz":
        here = (adata.obs["batch"] == label).to_numpy()
        close(found[here], embedding(adata[here], tiny_model))
    assert np.abs(found - embedding(adata, tiny_model)).max() > 1e-4


def test_cells_per_context_deals_the_cells_of_a_sample(tiny_model):
    adata = make_adata(20, spatial=False)
    found = embedding(adata, tiny_model, cells_per_context=7)  # three contexts
    for start in range(3):
        part = np.arange(start, 20, 3)
        assert len(part) <= 7
        close(found[part], embedding(adata[part], tiny_model))
    close(embedding(adata, tiny_model, cells_per_context=20), embedding(adata, tiny_model))
    alone = embedding(adata, tiny_model, cells_per_context=1)
    close(alone[4:5], embedding(adata[4:5], tiny_model))


def test_coordinates_of_contexts_are_scaled_by_sample(tiny_model, monkeypatch):
    adata = make_adata(12)
    seen = []
    monkeypatch.setattr(
        embed_module,
        "embed_context",
        lambda source, model, cells, coordinates, *_: (
            seen.append((cells, coordinates)) or np.zeros((len(cells), 16), np.float32)
        ),
    )
    embed(adata, tiny_model, cells_per_context=4)
    place = adata.obsm["spatial"]
    wanted = (place - place.min(0)) / (place.max(0) - place.min(0)).max()
    assert sorted(np.concatenate([cells for cells, _ in seen])) == list(range(12))
    for cells, coordinates in seen:
        np.testing.assert_allclose(coordinates, wanted[cells], atol=1e-6)


def test_one_cell_and_cells_without_counts(tiny_model):
    adata = make_adata(10)
    one = embedding(adata[2:3], tiny_model)
    assert one.shape == (1, 16)
    assert np.isfinite(one).all()
    counts = make_counts(10)
    counts[[0, 4, 9]] = 0
    adata = make_adata(10, matrix=counts)
    assert embed(adata, tiny_model).uns["cellplm"]["input"]["cells_without_counts"] == 3
    assert np.isfinite(adata.obsm[KEY]).all()
    nothing = make_adata(3, matrix=np.zeros((3, 40)), spatial=False)
    found = embedding(nothing, tiny_model)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize(
    "convert",
    [
        sparse.csc_matrix,
        sparse.csr_array,
        lambda x: x.toarray(),
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.uint16),
        lambda x: x.astype(np.int64).tocsc(),
        lambda x: x.toarray().astype(np.int16),
        lambda x: x.astype(np.float64),
    ],
    ids=["csc", "csr_array", "dense", "int32", "uint16", "csc-int64", "dense-int16", "float64"],
)
def test_storage_does_not_matter(tiny_model, convert):
    adata = make_adata(20)
    wanted = embedding(adata, tiny_model)
    adata.X = convert(adata.X)
    np.testing.assert_array_equal(embedding(adata, tiny_model), wanted)


def test_backed_views_and_other_places(tiny_model, tmp_path):
    adata = make_adata(20)
    wanted = embedding(adata, tiny_model, batch_key="batch")
    adata.write_h5ad(tmp_path / "in.h5ad")
    backed = ad.read_h5ad(tmp_path / "in.h5ad", backed="r")
    embed(backed, tiny_model, batch_key="batch")
    np.testing.assert_array_equal(backed.obsm[KEY], wanted)
    backed.file.close()
    moved = adata.copy()
    moved.layers["counts"] = moved.X.copy()
    moved.X = np.log1p(moved.X.toarray() / 3.7)
    np.testing.assert_array_equal(embedding(moved, tiny_model, batch_key="batch"), wanted)
    doubled = ad.concat([adata, make_adata(5, seed=3)[:, adata.var_names]])
    np.testing.assert_array_equal(embedding(doubled[:20], tiny_model, batch_key="batch"), wanted)


def test_number_of_compilations_is_logarithmic(tiny_model, monkeypatch):
    monkeypatch.setattr(embed_module, "CHUNK_CELLS", 128)
    model = Pretrained(
        tiny_model.config, tiny_model.params, tiny_model.genes, tiny_model.card, "fresh"
    )
    sizes = np.random.default_rng(0).integers(1, 400, 25)
    for seed, cells in enumerate(sizes):
        embed(make_adata(int(cells), seed=seed, spatial=bool(seed % 2)), model)
    largest = bucket(int(sizes.max()))
    assert model.encode._cache_size() <= 2 * math.log2(largest / 32) + 1
    assert 1 <= model.express._cache_size() <= 2 * math.log2(128 / 32) + 1


def test_a_thousand_sizes_need_few_shapes(tiny_model):
    # A shape is a compilation, as the test above sees; here the programs only say what they were given.
    model = dataclasses.replace(tiny_model)
    shapes: dict[str, set] = {"express": set(), "encode": set()}

    def express(_, batch):
        shapes["express"].add(tuple(leaf.shape for leaf in jax.tree.leaves(batch)))
        return np.zeros((*batch.cell_mask.shape, model.config.hidden), np.float32)

    def encode(_, hidden, mask):
        shapes["encode"].add((hidden.shape, mask.shape))
        return np.zeros((*mask.shape, model.config.latent_size), np.float32)

    vars(model).update(embed_expression=express, encode=encode)
    largest = 8192
    counts = make_adata(largest, spatial=False)
    sizes = np.exp(np.random.default_rng(0).uniform(0, math.log(largest), 1000)).astype(int)
    with open_counts(counts, model.genes) as source:
        for cells in sizes:
            embed_module.embed_source(source, model, groups=[np.arange(cells)], spatial_key=None)
    assert len(set(sizes.tolist())) > 500
    assert len(shapes["express"]) + len(shapes["encode"]) <= 2 * math.log2(bucket(largest))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stored_counts_and_dense_ones_embed_alike(tiny_model, precision, monkeypatch):
    pytest.importorskip("numba")
    from cellplm_jax.kernels.sparse_numba import stored_product

    adata = make_adata(50)
    made, given = {}, []
    monkeypatch.setattr(
        "cellplm_jax.kernels.sparse_numba.stored_product",
        lambda *arguments: given.append(arguments) or stored_product(*arguments),
    )
    for stored in (False, True):
        model = dataclasses.replace(tiny_model, precision=precision, stored_product=stored)
        assert model.multiplies_stored is stored
        made[stored] = embedding(adata, model)
        assert bool(given) is stored
    assert given[0][3].dtype == precision
    limit = 1e-5 if precision == "float32" else 0.02
    np.testing.assert_allclose(made[True], made[False], atol=limit * np.abs(made[False]).max())


def test_without_numba_counts_are_made_dense(tiny_model, monkeypatch):
    numba_works.cache_clear()
    for name in ("numba", "cellplm_jax.kernels.sparse_numba"):
        monkeypatch.setitem(sys.modules, name, None)
    try:
        model = dataclasses.replace(tiny_model)
        assert not model.multiplies_stored
        embed(make_adata(8), model)
        with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[cpu\]"):
            embed(make_adata(8), dataclasses.replace(tiny_model, stored_product=True))
    finally:
        numba_works.cache_clear()


def test_bfloat16_is_close_and_says_so(tiny_model, monkeypatch):
    adata = make_adata(300)
    exact = embedding(adata, tiny_model)
    narrow = dataclasses.replace(tiny_model, precision="bfloat16")
    found = embed(adata, narrow).obsm[KEY]
    assert found.dtype == np.float32
    assert adata.uns["cellplm"]["precision"] == "bfloat16"
    cosine = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999
    assert np.abs(found - exact).max() > 1e-6  # it was really narrow
    # The same in passes over chunks.
    monkeypatch.setattr(long_context, "STREAM_CELLS", 100)
    monkeypatch.setattr(long_context, "STREAM_CHUNK", 64)
    streamed = embedding(adata, dataclasses.replace(narrow))
    np.testing.assert_allclose(streamed, found, atol=0.02 * np.abs(found).max())


def test_a_precision_that_does_not_exist(tiny_model):
    with pytest.raises(InputError, match=r"precision = 'float8'.*bfloat16"):
        dataclasses.replace(tiny_model, precision="float8")


def test_every_part_of_the_weights_is_used(tiny_model):
    adata = make_adata(15)
    wanted = embedding(adata, tiny_model)
    for part in ("embedder", "encoder", "pre_latent_norm", "latent"):
        changed = dict(tiny_model.params)
        changed[part] = jax.tree.map(lambda leaf: leaf * 1.5 + 0.1, changed[part])
        other = Pretrained(tiny_model.config, changed, tiny_model.genes)
        # The same compiled programs serve other weights of the same architecture.
        other.__dict__.update(
            embed_expression=tiny_model.embed_expression, encode=tiny_model.encode
        )
        assert np.abs(embedding(adata, other) - wanted).max() > 1e-3, part


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_key": "donor"}, ["donor", "batch"]),
        ({"layer": "counts"}, ["counts", "layer"]),
        ({"gene_key": "ids"}, ["ids", "gene_key"]),
        ({"spatial_key": "places"}, ["places", "spatial"]),
        ({"cells_per_context": 0}, ["cells_per_context"]),
        ({"values": "raw"}, ["raw", "counts"]),
        ({"minimum_genes": 41}, ["41"]),
        ({"key_added": ""}, ["key_added"]),
        ({"key_added": "a/b"}, ["key_added"]),
    ],
)
def test_refusals_leave_the_object_as_it_was(tiny_model, options, words):
    adata = make_adata(6)
    with pytest.raises(InputError) as error:
        embed(adata, tiny_model, **options)
    for word in words:
        assert word in str(error.value)
    assert "expected" in str(error.value)
    assert set(adata.obsm) == {"spatial"}
    assert "cellplm" not in adata.uns


# Files


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rich_file(path, cells=25):
    """A file with something in every slot."""
    adata = make_adata(cells)
    adata.layers["log"] = np.log1p(adata.X)
    adata.raw = adata.copy()
    adata.varm["loadings"] = np.arange(adata.n_vars * 2.0).reshape(-1, 2)
    adata.obsp["near"] = sparse.identity(cells, format="csr")
    adata.uns["kept"] = {"deep": {"text": "ü", "numbers": np.arange(3)}}
    adata.obs["score"] = np.linspace(0, 1, cells)
    adata.write_h5ad(path)
    return ad.read_h5ad(path)


def test_embed_file_equals_embed_and_keeps_everything(tiny_model, tmp_path):
    path, out = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    adata = rich_file(path)
    before = digest(path)
    messages = embed_file(path, tiny_model, out, batch_key="batch", quiet=True)
    assert digest(path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]
    assert any("40" in line for line in messages)
    written = ad.read_h5ad(out)
    in_memory = embed(adata.copy(), tiny_model, batch_key="batch")
    np.testing.assert_array_equal(written.obsm[KEY], in_memory.obsm[KEY])
    assert written.obsm[KEY].dtype == np.float32
    assert written.uns["cellplm"]["model"] == in_memory.uns["cellplm"]["model"]
    assert written.uns["cellplm"]["context"] == in_memory.uns["cellplm"]["context"]
    assert written.uns["cellplm"]["input"]["source"] == "in.h5ad"
    del written.obsm[KEY], written.uns["cellplm"]
    assert written.obs.equals(adata.obs)
    assert written.var.equals(adata.var)
    for one, two in ((written.X, adata.X), (written.raw.X, adata.raw.X)):
        assert (one != two).nnz == 0
    assert (written.layers["log"] != adata.layers["log"]).nnz == 0
    assert (written.obsp["near"] != adata.obsp["near"]).nnz == 0
    np.testing.assert_array_equal(written.varm["loadings"], adata.varm["loadings"])
    np.testing.assert_array_equal(written.obsm["spatial"], adata.obsm["spatial"])
    assert written.uns["kept"]["deep"]["text"] == "ü"
    np.testing.assert_array_equal(written.uns["kept"]["deep"]["numbers"], np.arange(3))


def test_embed_file_replaces_an_older_result(tiny_model, tmp_path):
    path, out, again = (tmp_path / name for name in ("in.h5ad", "out.h5ad", "again.h5ad"))
    rich_file(path)
    out.write_text("an older file")
    embed_file(path, tiny_model, out, quiet=True)
    embed_file(out, tiny_model, again, spatial_key=None, quiet=True)  # has the key already
    first, second = ad.read_h5ad(out), ad.read_h5ad(again)
    assert np.abs(first.obsm[KEY] - second.obsm[KEY]).max() > 1e-3
    assert second.uns["cellplm"]["context"]["coordinates"] == ""


def test_embed_file_without_obsm_and_uns(tiny_model, tmp_path):
    path, out = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    make_adata(8, spatial=False).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for group in ("obsm", "uns"):
            if group in file:
                del file[group]
    embed_file(path, tiny_model, out, quiet=True)
    assert ad.read_h5ad(out).obsm[KEY].shape == (8, 16)


def test_nothing_is_left_behind_on_failure(tiny_model, tmp_path, monkeypatch):
    path, out = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    rich_file(path)
    out.write_text("older")
    before = digest(path)

    def fail(*arguments, **options):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("anndata.io.write_elem", fail)
    with pytest.raises(RuntimeError, match="disk is full"):
        embed_file(path, tiny_model, out, quiet=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]
    assert out.read_text() == "older"
    assert digest(path) == before


def test_input_is_output_is_refused(tiny_model, tmp_path):
    path = tmp_path / "in.h5ad"
    rich_file(path)
    before = digest(path)
    link = tmp_path / "link.h5ad"
    link.symlink_to(path)
    for out in (path, tmp_path / "." / "in.h5ad", link):
        with pytest.raises(InputError, match="input and output"):
            embed_file(path, tiny_model, out, quiet=True)
    assert digest(path) == before


def test_a_file_of_newer_anndata(tiny_model, tmp_path):
    """Nullable strings, as anndata 0.13 writes them: streamed in, copied out, nothing converted."""
    path = SHARED / "wu2020_tcells_200.h5ad"
    if not path.exists():
        pytest.skip("shared data are not here (CELLPLM_SHARED_DATA)")
    adata = ad.read_h5ad(path)
    ids = sorted({name for name in adata.var["ensembl_id"] if name})[:500]
    params = dict(tiny_model.params)
    table = params["embedder"]["gene_embedding"]
    params["embedder"] = {**params["embedder"], "gene_embedding": np.resize(table, (500, 32))}
    model = Pretrained(dataclasses.replace(tiny_model.config, genes=500), params, ids)
    out = tmp_path / "out.h5ad"
    embed_file(path, model, out, batch_key="batch", quiet=True)
    written = ad.read_h5ad(out)
    assert written.obs.equals(adata.obs)
    np.testing.assert_array_equal(written.obsm[KEY], embedding(adata, model, batch_key="batch"))
    assert written.uns["cellplm"]["input"]["genes"]["missing"] == 0


def test_a_model_is_opened_by_its_name(tiny_run, tiny_model):
    adata = make_adata(12)
    by_path = embed(adata.copy(), str(tiny_run)).obsm["X_cellplm"]
    np.testing.assert_array_equal(by_path, embed(adata, tiny_model).obsm["X_cellplm"])
