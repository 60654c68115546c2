"""Activations that the backward pass computes again instead of keeping them, on every backend.

``flax.linen.remat`` sets an optimization barrier between the two computations. XLA's CPU compiler drops barriers before
it looks for what is computed twice, so nothing is saved there (jax 0.10); it does not look through a loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import lift


def barrier_reference(values: Any, gradients: Any) -> tuple[Any, Any]:
    """Return :func:`barrier` for compilers that keep optimization barriers."""
    return jax.lax.optimization_barrier((values, gradients))


def barrier(values: Any, gradients: Any) -> tuple[Any, Any]:
    """Return both as they are, such that what follows from the values is not taken for what followed before.

    Nothing that needs the result can begin before all gradients are there.

    Why: a loop of one turn, because XLA's CPU compiler drops optimization barriers (jax 0.10.2).

    Args:
        values: Tree of float or integer arrays.
        gradients: Tree of float arrays.
    """

    def loop(leaves):
        def turn(state):
            first, leaves = state
            # A product with what is 1 in the only turn: what a loop only hands on is taken out of it.
            same = jax.tree.map(lambda leaf: leaf * first.astype(leaf.dtype), leaves)
            return jnp.zeros((), bool), same

        return jax.lax.while_loop(
            lambda state: state[0],
            turn,
            (jnp.ones((), bool), leaves),
        )[1]

    return jax.lax.platform_dependent(
        (values, gradients),
        cpu=loop,
        default=lambda leaves: barrier_reference(*leaves),
    )


def recomputed_reference(module: type[nn.Module]) -> type[nn.Module]:
    """Return :func:`recomputed` for compilers that keep optimization barriers."""
    return nn.remat(module, static_argnums=(3,))


def recomputed(module: type[nn.Module]) -> type[nn.Module]:
    """Return a module class that keeps its first argument alone for the backward pass.

    Why: ``flax.linen.remat`` saves no memory on a CPU (jax 0.10.2).

    Args:
        module: A class whose ``__call__`` takes ``(hidden, groups, train)``: float activations, a tree that is not
            differentiated, a bool.

    Returns:
        A class of the same parameters and numbers, random ones included.
    """
    return nn.transforms.lift_transform(_lifted, module)


def _lifted(function: Callable) -> Callable:
    def inner(scope_of, repack, variables, keys, hidden, groups, train):
        def run(variables, hidden, given):
            keys, groups = given
            scope = scope_of(variables, keys)
            for inside in jax.tree.leaves(scope):
                # Counters of draws are shared with the scope outside: the second time would draw other numbers.
                inside.rng_counters = copy.deepcopy(inside.rng_counters)
            return function(scope, hidden, groups, train), repack(scope)

        def backward(saved, gradients):
            variables, hidden, given = saved
            hidden, gradients = barrier(hidden, gradients)
            pull = jax.vjp(
                lambda variables, hidden: run(variables, hidden, given),
                variables,
                hidden,
            )[1]
            return (*pull(gradients), None)

        keeping = jax.custom_vjp(run)
        keeping.defvjp(lambda *saved: (run(*saved), saved), backward)
        return keeping(variables, hidden, (keys, groups))

    return lift.pack(inner, (True,), (True,), (True,), name="recomputed")
