"""Expression embedder: flat CSR against dense arithmetic, input transforms, positions, covariates."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.batch import CellBatch
from cellplm_jax.model.embedder import (
    ExpressionEmbedder,
    mean_row_lookup,
    transform_counts,
    transform_stored,
)
from tests.model.common import (
    GENES,
    HIDDEN,
    apply,
    float64,
    group_norm,
    linear,
    make_batch,
    random_counts,
    random_params,
    shapes_of,
    tiny,
)

DENSE = [random_counts(6, seed=1), random_counts(4, seed=2), np.zeros((3, GENES), int)]
DENSE[0][2] = 0  # a cell without any count


def batch_of(dense=None, **keywords):
    return make_batch(DENSE if dense is None else dense, extra_nonzeros=7, **keywords)


dense_counts = jax.jit(lambda batch: batch.dense_counts(GENES))


@partial(jax.jit, static_argnums=1)
def transformed(batch, config):
    return batch.dense(transform_counts(batch, config), GENES)


def embed(config, batch, params=None, **keywords):
    module = ExpressionEmbedder(config)
    if params is None:
        params = random_params(shapes_of(module, batch))
    return np.asarray(apply(module, params, batch, **keywords)), params


def reference(config, params, expression, added=0.0):
    p = float64(params)
    hidden = linear(expression @ p["gene_embedding"] + added, p["linear"])
    return group_norm(np.maximum(hidden, 0), p["norm"], config.norm_groups)


def test_flat_csr_becomes_the_dense_matrix():
    batch = batch_of(cells=8)
    got = np.asarray(dense_counts(batch))
    assert got.shape == (3, 8, GENES)
    assert got.dtype == np.float32
    for sample, matrix in enumerate(DENSE):
        np.testing.assert_array_equal(got[sample, : len(matrix)], matrix)
        np.testing.assert_array_equal(got[sample, len(matrix) :], 0)
    # Behind the last entry there is padding, past the end of the cells.
    cell = np.asarray(batch.cell_of_nonzero())
    for sample, matrix in enumerate(DENSE):
        stored = np.count_nonzero(matrix)
        np.testing.assert_array_equal(cell[sample, :stored], matrix.nonzero()[0])
        assert (cell[sample, stored:] == 8).all()


def test_slots_move_cells_and_drop_those_past_the_end():
    batch = batch_of()
    slot = jnp.asarray([[3, 0, 9, 1, 2, 4], [4, 3, 2, 1, 0, 0], [0, 1, 2, 3, 4, 5]], jnp.int32)
    mask = jnp.ones((3, 5), bool)
    got = np.asarray(dense_counts(batch.replace(slot=slot, cell_mask=mask)))
    for source, target in ((0, 3), (1, 0), (3, 1), (4, 2), (5, 4)):
        np.testing.assert_array_equal(got[0, target], DENSE[0][source])
    np.testing.assert_array_equal(got[1, [4, 3, 2, 1]], DENSE[1])


@pytest.mark.parametrize("transform", ["log1p", "library_log1p"])
def test_input_transforms_equal_numpy(transform):
    config = tiny(embedder={"input_transform": transform, "target_sum": 300.0})
    batch = batch_of()
    got = np.asarray(transformed(batch, config))
    for sample, matrix in enumerate(DENSE):
        x = matrix.astype(np.float64)
        if transform == "library_log1p":
            total = x.sum(1, keepdims=True)
            x = np.divide(x * 300.0, total, out=np.zeros_like(x), where=total > 0)
        np.testing.assert_allclose(got[sample, : len(matrix)], np.log1p(x), rtol=1e-5)
        np.testing.assert_array_equal(got[sample, len(matrix) :], 0)


def test_library_transform_after_dropping_cells_uses_each_cells_own_library():
    config = tiny(embedder={"input_transform": "library_log1p"})
    batch = batch_of([DENSE[1]])
    moved = batch.replace(
        slot=jnp.asarray([[2, 7, 0, 1]], jnp.int32), cell_mask=jnp.ones((1, 3), bool)
    )
    got = np.asarray(transformed(moved, config))[0]
    x = DENSE[1] / DENSE[1].sum(1, keepdims=True) * 1e4
    np.testing.assert_allclose(got, np.log1p(x)[[2, 3, 0]], rtol=1e-5)


@pytest.mark.parametrize("transform", ["log1p", "library_log1p"])
def test_embedding_equals_dense_matrix_product(transform):
    config = tiny(embedder={"input_transform": transform}, positions={"kind": "none"})
    got, params = embed(config, batch_of())
    assert got.shape == (3, 6, HIDDEN)
    assert "positions" not in params
    for sample, matrix in enumerate(DENSE):
        x = matrix.astype(np.float64)
        if transform == "library_log1p":
            x = x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4
        expected = reference(config, params, np.log1p(x))
        np.testing.assert_allclose(got[sample, : len(matrix)], expected, rtol=1e-3, atol=1e-4)


def test_a_gene_subset_equals_zero_counts_elsewhere_and_storage_order_is_irrelevant():
    config = tiny(positions={"kind": "none"})
    subset = np.array([3, 17, 5, 30])
    counts = random_counts(5, seed=4)[:, subset]
    full = np.zeros((5, GENES), int)
    full[:, subset] = counts
    expected, params = embed(config, batch_of([full]))
    # The same counts, stored with vocabulary indices in the subset's own (unsorted) order.
    row, column = counts.nonzero()
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=5))])
    batch = CellBatch(
        indptr=jnp.asarray(indptr[None], jnp.int32),
        gene=jnp.asarray(subset[column][None]),
        count=jnp.asarray(counts[row, column][None], jnp.float32),
        cell_mask=jnp.ones((1, 5), bool),
    )
    got, _ = embed(config, batch, params)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(got - got[:, :1]).max() > 0.1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_counts_of_every_storage_type_give_the_same_numbers(dtype):
    batch = batch_of()
    stored = batch.replace(count=batch.count.astype(dtype), gene=batch.gene.astype(jnp.int32))
    np.testing.assert_array_equal(dense_counts(stored), dense_counts(batch))
    large = batch_of([np.array([[60000] + [0] * (GENES - 1)])])
    np.testing.assert_array_equal(dense_counts(large)[0, 0, 0], 60000.0)


def test_masked_entries_are_hidden_from_the_input_alone():
    config = tiny(positions={"kind": "none"})
    batch = batch_of([DENSE[1]])
    mask = np.random.default_rng(0).random((1, 4, GENES)) < 0.4
    got, params = embed(config, batch, gene_mask=jnp.asarray(mask))
    expected = reference(config, params, np.log1p(np.where(mask[0], 0, DENSE[1])))
    np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-4)
    # A hidden count cannot leak: changing it changes nothing.
    changed = np.where(mask[0] & (DENSE[1] > 0), DENSE[1] + 13, DENSE[1])
    assert (changed != DENSE[1]).any()
    leaked, _ = embed(config, batch_of([changed]), params, gene_mask=jnp.asarray(mask))
    np.testing.assert_array_equal(leaked, got)


@pytest.mark.parametrize("kind", ["sinusoidal", "grid", "mlp", "laplacian", "none"])
def test_coordinates_change_the_embedding_only_with_positions_on(kind):
    config = tiny(positions={"kind": kind, "grid": 10, "eigenvectors": 3})
    generator = np.random.default_rng(0)
    coordinates = [generator.random((4, 2)).astype(np.float32)]
    eigenvectors = [generator.standard_normal((4, 3)).astype(np.float32)]
    here = batch_of([DENSE[1]], fields={"coordinates": coordinates, "eigenvectors": eigenvectors})
    there = here.replace(coordinates=1 - here.coordinates, eigenvectors=-here.eigenvectors)
    nowhere = here.replace(coordinates=None, eigenvectors=None)
    first, params = embed(config, here)
    second, _ = embed(config, there, params)
    third, _ = embed(config, nowhere, params)
    if kind == "none":
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)
    else:
        for other in (second, third):
            assert (np.abs(first - other).max(axis=-1) > 1e-2).all()


def test_positions_are_added_before_the_linear_layer():
    config = tiny(positions={"kind": "mlp"})
    coordinates = [np.random.default_rng(0).random((4, 2)).astype(np.float32)]
    has = [np.array([True, True, False, True])]
    batch = batch_of([DENSE[1]], fields={"coordinates": coordinates, "has_coordinates": has})
    got, params = embed(config, batch)
    p = float64(params)["positions"]
    encoded = linear(coordinates[0], p["linear"])
    encoded = np.where(encoded > 0, encoded, encoded * p["prelu"]["negative_slope"])
    added = np.where(has[0][:, None], encoded, p["missing"])
    expected = reference(config, params, np.log1p(DENSE[1]), added)
    np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-4)


def test_batch_covariate_is_added_and_an_unknown_batch_takes_the_mean():
    config = tiny(positions={"kind": "none"}, embedder={"covariate": True}, decoder={"batches": 3})
    batch = batch_of([DENSE[1]], fields={"batch": [np.array([2, 0, -1, 1], np.int32)]})
    got, params = embed(config, batch)
    table = float64(params)["batch_embedding"]
    assert table.shape == (3, HIDDEN)
    added = np.stack([table[2], table[0], table.mean(0), table[1]])
    expected = reference(config, params, np.log1p(DENSE[1]), added)
    np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-4)
    unknown, _ = embed(config, batch.replace(batch=None), params)
    expected = reference(config, params, np.log1p(DENSE[1]), table.mean(0))
    np.testing.assert_allclose(unknown[0], expected, rtol=1e-3, atol=1e-4)


def test_mean_row_lookup_trains_every_row_from_unknown_cells():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    index = jnp.asarray([1, -1, -7])
    got = np.asarray(mean_row_lookup(table, index, (3,)))
    np.testing.assert_allclose(got[0], table[1])
    np.testing.assert_allclose(got[1:], np.asarray(table).mean(0)[None].repeat(2, 0), rtol=1e-6)
    gradient = jax.grad(lambda t: mean_row_lookup(t, index, (3,)).sum())(table)
    np.testing.assert_allclose(gradient[:, 0], [0.5, 1.5, 0.5, 0.5])


def test_padding_of_cells_and_of_stored_counts_never_changes_a_number():
    config = tiny(embedder={"input_transform": "library_log1p"})
    coordinates = [np.random.default_rng(s).random((len(d), 2)) for s, d in enumerate(DENSE)]
    fields = {"coordinates": [c.astype(np.float32) for c in coordinates]}
    tight, params = embed(config, make_batch(DENSE, fields=fields))
    loose, _ = embed(
        config, make_batch(DENSE, fields=fields, cells=11, extra_nonzeros=50, seed=5), params
    )
    for sample, matrix in enumerate(DENSE):
        n = len(matrix)
        np.testing.assert_allclose(loose[sample, :n], tight[sample, :n], rtol=1e-5, atol=1e-5)


def test_unstored_genes_get_no_gradient():
    config = tiny(positions={"kind": "none"})
    counts = np.zeros((4, GENES), int)
    counts[:, [2, 9, 33]] = random_counts(4)[:, :3] + 1
    batch = batch_of([counts])
    module = ExpressionEmbedder(config)
    params = random_params(shapes_of(module, batch))

    def loss(params):
        out = module.apply({"params": params}, batch)
        return jnp.sum(out * jnp.arange(HIDDEN))

    gradient = jax.jit(jax.grad(loss))(params)
    touched = np.abs(np.asarray(gradient["gene_embedding"])).sum(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), [2, 9, 33])


def test_dropout_acts_while_training_alone_and_follows_its_key():
    config = tiny(dropout=0.5, norm="none")
    batch = batch_of()
    calm, params = embed(config, batch)
    noisy, again, other = (
        embed(config, batch, params, train=True, rngs={"dropout": jax.random.key(k)})[0]
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(noisy, again)
    assert (noisy != other).any()
    active = calm > 0
    dropped = noisy[active] == 0
    assert 0.35 < dropped.mean() < 0.65
    np.testing.assert_allclose(noisy[active][~dropped], 2 * calm[active][~dropped], rtol=1e-5)


@pytest.mark.parametrize("transform", ["log1p", "library_log1p"])
def test_the_host_transforms_as_the_device_does(transform):
    config, batch = tiny(embedder={"input_transform": transform}), batch_of(cells=8)
    wanted = np.asarray(transform_counts(batch, config))
    for row, indptr in enumerate(np.asarray(batch.indptr)):
        found = transform_stored(indptr, np.asarray(batch.count[row]), config)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted[row, : indptr[-1]], rtol=1e-6)


def test_sums_that_were_computed_elsewhere_are_taken():
    config, batch = tiny(), batch_of(cells=8)
    dense, params = embed(config, batch)
    expression = np.asarray(batch.dense(transform_counts(batch, config), config.genes))
    sums = expression @ np.asarray(params["gene_embedding"])
    found = apply(ExpressionEmbedder(config), params, batch, gene_sum=sums)
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-6)
    other = apply(ExpressionEmbedder(config), params, batch, gene_sum=sums + 1)
    assert np.abs(np.asarray(other) - dense).max() > 1e-3
