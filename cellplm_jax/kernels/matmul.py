"""Matrix products, sums and broadcasts in forms that compile to fast code on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Integer, Num, Shaped

from cellplm_jax.batch import Array, Shape

Axes = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def _dot(left: Array, right: Array, axes: Axes) -> Array:
    """Multiply arrays of one type by ``lax.dot_general``, bfloat16 ones on the fast path of the backend.

    A CPU has a fast kernel for bfloat16 only if the result is float32 (two cores of an EPYC 9004: 320 GFLOP/s against
    130); accelerators round their output automatically.
    """

    def wide(left, right):
        product = jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
        return product.astype(left.dtype)

    def plain(left, right):
        return jax.lax.dot_general(left, right, axes)

    if left.dtype == right.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(left, right, cpu=wide, default=plain)
    return plain(left, right)


def linear_product_reference(
    values: Float[Array, "*batch width"],
    kernel: Float[Array, "width features"],
    widen: bool = False,
) -> Float[Array, "*batch features"]:
    """Return :func:`linear_product`, differentiated by JAX."""
    return jnp.matmul(values, kernel, preferred_element_type=jnp.float32 if widen else None)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_product(
    values: Float[Array, "*batch width"],
    kernel: Float[Array, "width features"],
    widen: bool = False,
) -> Float[Array, "*batch features"]:
    """Multiply factors of one type; narrow ones on the fast path of the backend.

    Why: here the kernel's gradient is the sum of outer products in memory order. JAX derives its transpose, for which a
    CPU first transposes the incoming gradient: that takes half as long as the product (jax 0.10.2).

    With ``widen`` the result is float32 for factors of any type; gradients are rounded to that type before their
    products.
    """
    axes = ((values.ndim - 1,), (0,)), ((), ())
    if widen:
        return jax.lax.dot_general(values, kernel, axes, preferred_element_type=jnp.float32)
    return _dot(values, kernel, axes)


def _linear_backward(widen, saved, gradient):
    values, kernel = saved
    # A widened result has a float32 gradient; products of mixed types would leave the fast path.
    gradient = gradient.astype(values.dtype)
    last = values.ndim - 1
    others = tuple(range(values.ndim - 1))
    of_values = _dot(
        gradient,
        kernel,
        (((last,), (1,)), ((), ())),
    )
    if values.dtype != jnp.bfloat16 and values.ndim == 3 and values.shape[0] == 1:
        # A CPU's kernel sums over the first of two axes in place; with more axes it recomputes transposed values.
        # Only an axis of length 1 is removed: axes that are sharded over devices cannot be merged.
        values = values[0]
        gradient = gradient[0]
        others = (0,)
    return of_values, _dot(values, gradient, ((others, others), ((), ())))


linear_product.defvjp(
    lambda values, kernel, widen: (linear_product(values, kernel, widen), (values, kernel)),
    _linear_backward,
)


Side = Literal["rows", "columns"]


def batched_product_reference(
    left: Float[Array, "*batch _ _"],
    right: Float[Array, "*batch _ _"],
    summed_of_left: Side = "columns",
    summed_of_right: Side = "rows",
) -> Float[Array, "*batch _ _"]:
    """Return :func:`batched_product`, differentiated by JAX."""
    of_left = "si" if summed_of_left == "rows" else "is"
    of_right = "so" if summed_of_right == "rows" else "os"
    return jnp.einsum(f"...{of_left},...{of_right}->...io", left, right)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def batched_product(
    left: Float[Array, "*batch _ _"],
    right: Float[Array, "*batch _ _"],
    summed_of_left: Side = "columns",
    summed_of_right: Side = "rows",
) -> Float[Array, "*batch _ _"]:
    """Multiply matrices of one type with leading batch axes; gradients have the memory order of their factors.

    Why: the gradients that JAX derives of a batched product are transposed, and on a CPU the transposition back takes
    as long as the product (jax 0.10.2).

    Args:
        left: [..., rows, columns].
        right: [..., rows, columns].
        summed_of_left: Which axis of ``left`` is summed over; the other is the first of the result.
        summed_of_right: The same for ``right``; the other is the last of the result.

    """
    batch = tuple(range(left.ndim - 2))
    axis = {"rows": left.ndim - 2, "columns": left.ndim - 1}
    summed = ((axis[summed_of_left],), (axis[summed_of_right],))
    return jax.lax.dot_general(left, right, (summed, (batch, batch)))


def _batched_forward(left, right, summed_of_left, summed_of_right):
    return batched_product(left, right, summed_of_left, summed_of_right), (left, right)


def _batched_backward(summed_of_left, summed_of_right, saved, gradient):
    left, right = saved
    # The gradient of a factor keeps the factor's memory order, so the case decides which operand comes first.
    other: dict[Side, Side] = {"rows": "columns", "columns": "rows"}
    if summed_of_left == "columns":
        of_left = batched_product(gradient, right, "columns", other[summed_of_right])
    else:
        of_left = batched_product(right, gradient, other[summed_of_right], "columns")
    if summed_of_right == "rows":
        of_right = batched_product(left, gradient, other[summed_of_left], "rows")
    else:
        of_right = batched_product(gradient, left, "rows", other[summed_of_left])
    return of_left, of_right


batched_product.defvjp(_batched_forward, _batched_backward)


def weighted_sum_reference(
    weights: Float[Array, "*batch"], rows: Float[Array, "*batch width"]
) -> Float[Array, " width"]:
    """Return :func:`weighted_sum` as a plain sum of rows."""
    return jnp.sum(weights[..., None] * rows, axis=tuple(range(weights.ndim)))


def weighted_sum(
    weights: Float[Array, "*batch"], rows: Float[Array, "*batch width"]
) -> Float[Array, " width"]:
    """Compute the weighted sum of rows as a matrix product with float32 sums.

    Why: XLA fuses a sum over rows with the operations before it and sums column by column. On a CPU that is fifty times
    slower than a product (2.5 M entries, jax 0.10.2: 11 ms against .24).

    """
    axes = tuple(range(weights.ndim))
    total = jax.lax.dot_general(
        # All leading axes are contracted at once; reshaping them into one would merge sharded axes.
        weights,
        rows,
        ((axes, axes), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return total.astype(rows.dtype)


def broadcast_reference(
    vector: Float[Array, " width"], shape: Shape
) -> Float[Array, "*batch width"]:
    """Return :func:`broadcast`, differentiated by JAX."""
    return jnp.broadcast_to(vector, shape)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def broadcast(vector: Float[Array, " width"], shape: Shape) -> Float[Array, "*batch width"]:
    """Broadcast a vector to ``shape``; :func:`weighted_sum` sums the gradient.

    Why: as for :func:`weighted_sum` (CPU, jax 0.10.2).
    """
    return broadcast_reference(vector, shape)


def _broadcast_backward(shape, _, gradient):
    # A sum with weights of 1, because it compiles to a matrix product.
    return (weighted_sum(jnp.ones(shape[:-1], gradient.dtype), gradient),)


broadcast.defvjp(lambda vector, shape: (broadcast(vector, shape), None), _broadcast_backward)


def dependent_zeros_reference(value: Num[Array, "*any"], shape: Shape) -> Float32[Array, "*shape"]:
    """Return :func:`dependent_zeros` without the dependence."""
    return jnp.zeros(shape, jnp.float32)


def dependent_zeros(value: Num[Array, "*any"], shape: Shape) -> Float32[jax.Array, "*shape"]:
    """Return zeros that are allocated only after a value is computed; a NaN in the value makes them NaN.

    Why: XLA allocates constant zeros for a sum at the start of a step and keeps them throughout: 76 MiB for the
    gradient of a gene table (CPU, jax 0.10.2).
    """
    # The minimum of all entries: a single entry would have to be fetched from the device that holds it.
    return jnp.full(shape, jnp.minimum(jnp.min(jnp.abs(value)).astype(jnp.float32), 0))


def embedding_lookup_reference(
    table: Float[Array, "rows width"], index: Integer[Array, "*batch"]
) -> Float[Array, "*batch width"]:
    """Return :func:`embedding_lookup`, differentiated by JAX."""
    return table[index]


@jax.custom_vjp
def embedding_lookup(
    table: Float[Array, "rows width"], index: Integer[Array, "*batch"]
) -> Float[Array, "*batch width"]:
    """Return rows of a table, of valid indices; the gradient is summed in float32.

    Why: JAX sums the gradient in the type of the table and keeps its zeros during all of the step (CPU, jax 0.10.2).
    """
    return embedding_lookup_reference(table, index)


def _embedding_lookup_backward(saved, gradient):
    index, like = saved
    total = dependent_zeros(gradient, (like.shape[0], gradient.shape[-1]))
    total = total.at[index].add(gradient.astype(jnp.float32))
    return total.astype(like.dtype), None


embedding_lookup.defvjp(
    lambda table, index: (
        embedding_lookup(table, index),
        # An array of width 0 keeps number of rows and type of the table without its memory.
        (index, jnp.zeros((*table.shape[:1], 0), table.dtype)),
    ),
    _embedding_lookup_backward,
)


def squeeze_single_row_reference(
    function: Callable, *values: Shaped[Array, "*batch _"]
) -> Shaped[Array, "*any"]:
    """Return :func:`squeeze_single_row` without removal of the axis."""
    return function(*values)


def squeeze_single_row(
    function: Callable, *values: Shaped[Array, "*batch _"]
) -> Shaped[Array, "*any"]:
    """Apply a function of [cells, ...] arrays, or of [samples, cells, ...] ones, without a leading axis of length 1.

    Why: a CPU sums the last axis of products of [1, cells, genes] arrays thirty times slower than of [cells, genes]
    ones (jax 0.10.2), and most contexts are a single row.

    Args:
        function: Acts on each cell independently, with any leading axes.
        *values: Arrays with the same leading axes.
    """
    if values[0].ndim > 2 and all(value.shape[0] == 1 for value in values):
        return function(*(value[0] for value in values))[None]
    return function(*values)
