"""The product of stored counts on the host's cores against the dense one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from scipy import sparse

pytest.importorskip("numba")

from cellplm_jax.kernels import sparse_numba as module
from cellplm_jax.kernels.sparse_numba import stored_product, stored_product_reference


def stored(cells: int, genes: int, density: float = 0.2, seed: int = 0) -> sparse.csr_matrix:
    generator = np.random.default_rng(seed)
    dense = generator.random((cells, genes)) * (generator.random((cells, genes)) < density)
    return sparse.csr_matrix(dense.astype(np.float32))


def product(counts: sparse.csr_matrix, table: np.ndarray) -> np.ndarray:
    return stored_product(
        counts.indptr.astype(np.int32), counts.indices.astype(np.int32), counts.data, table
    )


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("cells", [1, 2, 33])
def test_equals_the_dense_product(kind, cells, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 24 * 10)  # several blocks, the last one short
    counts = stored(cells, 97)
    table = np.random.default_rng(1).standard_normal((97, 24)).astype(kind)
    wanted = counts.toarray().astype(np.float64) @ table.astype(np.float64)
    found = product(counts, table)
    assert found.dtype == np.float32
    assert found.shape == (cells, 24)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    plain = stored_product_reference(counts.indptr, counts.indices, counts.data, table)
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_cells_without_counts_and_what_lies_behind_the_last_entry():
    counts = stored(6, 30)
    counts = sparse.csr_matrix(counts.toarray() * (np.arange(6) != 2)[:, None])
    table = np.random.default_rng(1).standard_normal((30, 8)).astype(np.float32)
    # As batches are padded: two cells past the last one, and numbers that belong to none.
    indptr = np.append(counts.indptr, [counts.nnz] * 2).astype(np.int32)
    column = np.append(counts.indices, [7] * 5).astype(np.int32)
    value = np.append(counts.data, [np.nan] * 5).astype(np.float32)
    found = stored_product(indptr, column, value, table)
    np.testing.assert_allclose(found[:6], counts.toarray() @ table, atol=1e-5)
    assert not found[[2, 6, 7]].any()


def test_neither_cores_nor_other_cells_change_a_number(monkeypatch):
    counts = stored(40, 300)
    table = np.random.default_rng(1).standard_normal((300, 16)).astype(np.float32)
    together = product(counts, table)
    alone = np.concatenate([product(counts[row], table) for row in range(40)])
    np.testing.assert_array_equal(together, alone)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    np.testing.assert_array_equal(product(counts, table), together)


def test_nowhere_to_keep_what_was_compiled(monkeypatch):
    compiling = module.numba.njit

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiling(**options)

    monkeypatch.setattr(module.numba, "njit", njit)
    assert module._compiled(lambda number: number + 1)(2) == 3
