"""Products, sums and broadcasts against the plain forms they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.kernels.matmul import (
    batched_product,
    batched_product_reference,
    broadcast,
    broadcast_reference,
    dependent_zeros,
    dependent_zeros_reference,
    embedding_lookup,
    embedding_lookup_reference,
    linear_product,
    linear_product_reference,
    squeeze_single_row,
    squeeze_single_row_reference,
    weighted_sum,
    weighted_sum_reference,
)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("widen", [False, True])
def test_narrow_products_round_once_and_so_do_their_gradients(widen):
    values, kernel = (x.astype(jnp.bfloat16) for x in (normal(2, 5, 300), normal(300, 7, seed=1)))
    exact = np.einsum("bci,io->bco", np.float64(values), np.float64(kernel))
    found = linear_product(values, kernel, widen=widen)
    assert found.dtype == (jnp.float32 if widen else jnp.bfloat16)
    # A float32 sum, rounded to 8 bits where the result is narrow: sums in bfloat16 would be off by far more.
    limit = 1e-5 if widen else 2.0**-8
    np.testing.assert_allclose(np.float64(found), exact, atol=limit * np.abs(exact).max())

    weight = normal(2, 5, 7, seed=2)
    weight = weight.astype(jnp.bfloat16).astype(jnp.float32)
    loss = lambda v, k: (linear_product(v, k, widen=widen).astype(jnp.float32) * weight).sum()  # noqa: E731
    of_values, of_kernel = jax.grad(loss, argnums=(0, 1))(values, kernel)
    assert of_values.dtype == of_kernel.dtype == jnp.bfloat16
    wanted = np.einsum("bco,io->bci", np.float64(weight), np.float64(kernel))
    np.testing.assert_allclose(np.float64(of_values), wanted, atol=2**-8 * np.abs(wanted).max())
    wanted = np.einsum("bci,bco->io", np.float64(values), np.float64(weight))
    np.testing.assert_allclose(np.float64(of_kernel), wanted, atol=2**-8 * np.abs(wanted).max())


@pytest.mark.parametrize("shape", [(1, 5, 30), (2, 5, 30), (6, 30)])
def test_gradients_of_float32_products_are_the_plain_ones(shape):
    values, kernel, weight = normal(*shape), normal(30, 7, seed=1), normal(*shape[:-1], 7, seed=2)
    found, wanted = (
        jax.grad(lambda v, k, of=of: (of(v, k) * weight).sum(), argnums=(0, 1))(values, kernel)
        for of in (linear_product, linear_product_reference)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-5)


def test_products_of_float32_are_the_plain_ones():
    values, kernel = normal(2, 5, 30), normal(30, 7, seed=1)
    np.testing.assert_array_equal(
        linear_product(values, kernel), linear_product_reference(values, kernel)
    )
    text = str(jax.make_jaxpr(lambda v, k: linear_product(v, k))(values, kernel))
    assert "platform" not in text


@pytest.mark.parametrize("of_left", ["rows", "columns"])
@pytest.mark.parametrize("of_right", ["rows", "columns"])
def test_batched_products_and_their_gradients_are_those_of_einsum(of_left, of_right):
    left = normal(2, 3, *((5, 4) if of_left == "rows" else (4, 5)))
    right = normal(2, 3, *((5, 6) if of_right == "rows" else (6, 5)), seed=1)
    weight = normal(2, 3, 4, 6, seed=2)
    plain = lambda left, right: batched_product_reference(left, right, of_left, of_right)  # noqa: E731
    fast = lambda left, right: batched_product(left, right, of_left, of_right)  # noqa: E731
    np.testing.assert_allclose(fast(left, right), plain(left, right), rtol=1e-5, atol=1e-5)
    slopes, wanted = (
        jax.grad(lambda left, right, of=of: (of(left, right) * weight).sum(), argnums=(0, 1))(
            left, right
        )
        for of in (fast, plain)
    )
    for found, right_one in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(found, right_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 4), (2, 3, 4), (6, 4)])
def test_broadcast_sums_its_gradient(shape):
    vector, weight = jnp.arange(4.0), normal(*shape)
    np.testing.assert_array_equal(broadcast(vector, shape), broadcast_reference(vector, shape))
    slope = jax.grad(lambda v: (broadcast(v, shape) * weight).sum())(vector)
    np.testing.assert_allclose(slope, weight.reshape(-1, 4).sum(0), rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 2])
def test_squeeze_single_row_gives_back_the_shape(samples):
    left, right = normal(samples, 3, 4), normal(samples, 3, 4, seed=1)
    seen = []

    def rows(a, b):
        seen.append(a.ndim)
        return (a * b).sum(-1)

    found = squeeze_single_row(rows, left, right)
    assert seen == [2 if samples == 1 else 3]
    np.testing.assert_allclose(found, squeeze_single_row_reference(rows, left, right), rtol=1e-5)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_embedding_lookup_and_its_gradient_are_those_of_indexing(kind):
    table = jax.random.normal(jax.random.key(0), (7, 5)).astype(kind)
    index = jnp.asarray([[0, 3, 3], [6, 0, 2]])
    weight = jax.random.normal(jax.random.key(1), (2, 3, 5))

    def loss(take):
        return lambda table: jnp.sum(take(table, index).astype(jnp.float32) * weight)

    np.testing.assert_array_equal(
        np.asarray(embedding_lookup(table, index), np.float32),
        np.asarray(embedding_lookup_reference(table, index), np.float32),
    )
    found = jax.grad(loss(embedding_lookup))(table)
    expected = jax.grad(loss(embedding_lookup_reference))(table)
    assert found.dtype == kind
    tolerance = 1e-6 if kind == jnp.float32 else 1e-2
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=tolerance
    )


def test_dependent_zeros_are_zeros():
    for value in (3.0, -2.0, 0.0):
        value = jnp.full((2, 2), value)
        found, wanted = (of(value, (3,)) for of in (dependent_zeros, dependent_zeros_reference))
        np.testing.assert_array_equal(found, np.zeros(3))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_weighted_sums_are_sums_of_rows(shape):
    weights, rows = normal(*shape), normal(*shape, 4, seed=1)
    np.testing.assert_allclose(
        weighted_sum(weights, rows), weighted_sum_reference(weights, rows), rtol=1e-5, atol=1e-6
    )
    narrow = weighted_sum(weights.astype(jnp.bfloat16), rows.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
