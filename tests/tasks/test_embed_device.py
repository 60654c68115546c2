"""Counts that are on a device already are embedded there: the same numbers, and nothing of them goes to the host.

CuPy is stood in for by classes that hand JAX arrays over by DLPack and refuse, as CuPy does, to become NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anndata.compat import CupyArray, CupySparseMatrix
from scipy import sparse

import cellplm_jax as cellplm
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.device_arrays import DeviceRows, is_device_array, to_jax
from cellplm_jax.errors import InputError
from cellplm_jax.tasks import embed_device
from tests.conftest import make_adata


class FakeCupy(CupyArray):
    """A dense array of CuPy's manners."""

    def __init__(self, array):
        self.array = jnp.asarray(array)
        self.shape, self.dtype, self.ndim = self.array.shape, self.array.dtype, self.array.ndim

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, index):
        return FakeCupy(self.array[index])

    def astype(self, kind):
        return FakeCupy(self.array.astype(kind))


class FakeCupySparse(CupySparseMatrix):
    """A CSR matrix of CuPy's manners."""

    format, has_canonical_format = "csr", True

    def __init__(self, matrix):
        self.shape, self.dtype = matrix.shape, matrix.dtype
        self.data, self.indices = FakeCupy(matrix.data), FakeCupy(matrix.indices)
        self.indptr = FakeCupy(matrix.indptr)


def on_device(adata, kind, change=lambda matrix: matrix):
    """The same cells with X on the device."""
    matrix = sparse.csr_matrix(adata.X)
    held = change(matrix.toarray()) if kind == "dense" else change(matrix)
    moved = anndata.AnnData(obs=adata.obs, var=adata.var, obsm=dict(adata.obsm))
    hold(moved, FakeCupy(held) if kind == "dense" else FakeCupySparse(held))
    return moved


def hold(adata, matrix):
    """Make a matrix the X of an AnnData as it is; AnnData 0.12 would make a NumPy array of one it does not know."""
    if hasattr(adata, "_X"):
        adata._X = matrix
    else:
        adata.layers[None] = matrix


@pytest.fixture
def to_host(monkeypatch):
    """The shapes of what goes to the host, but for the rows that are looked at to see what they hold."""
    seen = []
    original = DeviceRows.on_host
    monkeypatch.setattr(
        DeviceRows, "on_host", lambda self, a, b: seen.append((a, b)) or original(self, a, b)
    )
    return seen


KINDS = ("dense", "sparse")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"spatial_key": None}, {"batch_key": "batch", "cells_per_context": 9}],
)
def test_the_numbers_are_those_of_the_host(tiny_model, kind, options, monkeypatch):
    monkeypatch.setattr(embed_device, "CHUNK_CELLS", 16)
    adata = make_adata(45)
    wanted = cellplm.embed(adata.copy(), tiny_model, **options)
    found = cellplm.embed(on_device(adata, kind), tiny_model, **options)
    np.testing.assert_allclose(
        found.obsm["X_cellplm"], wanted.obsm["X_cellplm"], atol=1e-5, rtol=1e-5
    )
    report = found.uns["cellplm"]["input"]
    assert report["storage"].startswith(
        "dense on a device" if kind == "dense" else "CSR on a device"
    )
    assert report["cells_without_counts"] == 0
    assert report["genes"] == wanted.uns["cellplm"]["input"]["genes"]


def test_only_the_probe_goes_to_the_host(tiny_model, to_host, monkeypatch):
    monkeypatch.setattr("cellplm_jax.data.matrices.PROBE_VALUES", 16)
    cells = on_device(make_adata(600), "dense")
    cellplm.embed(cells, tiny_model)
    # Sixteen places of a row each.
    assert sum(stop - start for start, stop in to_host) <= 16


def test_jax_shares_the_memory():
    array = jnp.arange(64.0).reshape(8, 8)
    shared = to_jax(FakeCupy(array))
    assert shared.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    assert to_jax(array) is array
    assert is_device_array(array)
    assert is_device_array(FakeCupy(array))
    assert not is_device_array(np.asarray(array))
    # 64-bit types are narrowed on the device.
    assert to_jax(FakeCupy(jnp.arange(4, dtype=jnp.int8))).dtype == jnp.int8


def test_the_matrix_decides_the_device(tiny_model, monkeypatch):
    other = jax.devices()[5]
    adata = make_adata(40)
    wanted = cellplm.embed(adata.copy(), tiny_model).obsm["X_cellplm"]
    moved = on_device(adata, "dense")
    # A CPU's DLPack knows one device alone.
    hold(moved, jax.device_put(moved.X.array, other))
    places = []
    original = tiny_model.encode

    def noting(*arguments):
        found = original(*arguments)
        places.append(found.devices())
        return found

    monkeypatch.setitem(tiny_model.__dict__, "encode", noting)
    found = cellplm.embed(moved, tiny_model).obsm["X_cellplm"]
    assert places == [{other}]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_with_many_counts_is_cut_shorter(tiny_model, kind, monkeypatch):
    monkeypatch.setattr(embed_device, "CHUNK_NONZEROS", 10)
    adata = make_adata(45)
    wanted = cellplm.embed(adata.copy(), tiny_model).obsm["X_cellplm"]
    found = cellplm.embed(on_device(adata, kind), tiny_model).obsm["X_cellplm"]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1.0, 0.5, np.nan, 2.0**25])
def test_a_value_that_is_no_count_is_named(tiny_model, kind, bad, monkeypatch):
    monkeypatch.setattr("cellplm_jax.data.matrices.PROBE_VALUES", 160)
    adata = make_adata(300)
    column = int(np.flatnonzero(sparse.csr_matrix(adata.X)[7].toarray()[0])[0])

    def spoil(matrix):
        matrix = matrix.copy()
        matrix[7, column] = bad
        return matrix

    with pytest.raises(InputError, match=r"in cell 'cell7', gene"):
        cellplm.embed(on_device(adata, kind, spoil), tiny_model)


@pytest.mark.parametrize("kind", KINDS)
def test_log_values_and_cells_without_counts(tiny_model, kind):
    adata = make_adata(40)
    empty = adata.X.toarray()
    empty[3] = 0
    adata.X = sparse.csr_matrix(np.log1p(empty))
    wanted = cellplm.embed(adata.copy(), tiny_model, values="log1p")
    found = cellplm.embed(on_device(adata, kind), tiny_model, values="log1p")
    np.testing.assert_allclose(
        found.obsm["X_cellplm"], wanted.obsm["X_cellplm"], atol=1e-5, rtol=1e-4
    )
    assert found.uns["cellplm"]["input"]["cells_without_counts"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_context_is_encoded_in_passes(tiny_model, kind, monkeypatch):
    adata = make_adata(100)
    wanted = cellplm.embed(adata.copy(), tiny_model).obsm["X_cellplm"]
    monkeypatch.setattr(embed_device, "STREAM_CELLS", 64)
    found = cellplm.embed(on_device(adata, kind), tiny_model).obsm["X_cellplm"]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_gene_that_is_there_twice_goes_over_the_host(tiny_model):
    adata = make_adata(40)
    names = list(adata.var_names)
    known = [n for n in range(len(names)) if names[n].startswith("ENSG")]
    names[known[0]] = names[known[1]]
    adata.var_names = names
    wanted = cellplm.embed(adata.copy(), tiny_model).obsm["X_cellplm"]
    found = cellplm.embed(on_device(adata, "dense"), tiny_model).obsm["X_cellplm"]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_other_readers_still_get_rows(tiny_model):
    adata = make_adata(30)
    with open_counts(on_device(adata, "sparse"), tiny_model.genes) as source:
        found = source.read_rows(np.array([5, 2]))
    with open_counts(adata, tiny_model.genes) as source:
        wanted = source.read_rows(np.array([5, 2]))
    np.testing.assert_array_equal(found.toarray(), wanted.toarray())


@pytest.mark.parametrize("kind", KINDS)
def test_another_input_transform(tiny_model, kind):
    adata, config = make_adata(40), tiny_model.config
    embedder = dataclasses.replace(config.embedder, input_transform="library_log1p")
    other = dataclasses.replace(tiny_model, config=dataclasses.replace(config, embedder=embedder))
    wanted = cellplm.embed(adata.copy(), other).obsm["X_cellplm"]
    found = cellplm.embed(on_device(adata, kind), other).obsm["X_cellplm"]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)


def test_bfloat16(tiny_model):
    adata = make_adata(40)
    narrow = dataclasses.replace(tiny_model, precision="bfloat16")
    wanted = cellplm.embed(adata.copy(), narrow).obsm["X_cellplm"]
    found = cellplm.embed(on_device(adata, "dense"), narrow).obsm["X_cellplm"]
    np.testing.assert_allclose(found, wanted, atol=0.05, rtol=0.05)


@pytest.mark.skipif(
    tuple(map(int, version("anndata").split(".")[:2])) < (0, 13),
    reason="AnnData holds JAX arrays from version 0.13 on",
)
def test_an_anndata_of_a_jax_array(tiny_model):
    adata = make_adata(40)
    wanted = cellplm.embed(adata.copy(), tiny_model).obsm["X_cellplm"]
    moved = anndata.AnnData(jnp.asarray(adata.X.toarray()), obs=adata.obs, var=adata.var)
    moved.obsm["spatial"] = adata.obsm["spatial"]
    found = cellplm.embed(moved, tiny_model).obsm["X_cellplm"]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


class Accelerator:
    """A device with so much memory."""

    def __init__(self, free):
        self.free = free

    def memory_stats(self):
        return {"bytes_limit": self.free + 1000, "bytes_in_use": 1000}


def test_a_context_is_encoded_at_once_where_the_memory_has_room(tiny_model):
    config = tiny_model.config
    needed = embed_device.ACTIVATIONS * 100_000 * config.hidden * 4
    assert embed_device.fits_at_once(100_000, config, Accelerator(needed))
    assert not embed_device.fits_at_once(100_000, config, Accelerator(needed - 1))
    # A CPU does not say how much it has: contexts go over it in passes.
    assert not embed_device.fits_at_once(100_000, config, None)
    assert embed_device._too_large(100_000, config, Accelerator(needed - 1))
    assert not embed_device._too_large(100_000, config, Accelerator(needed))
    assert not embed_device._too_large(1000, config, Accelerator(0))
