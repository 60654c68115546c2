"""Flow attention over a context that no device holds: a layer as a few passes over chunks of its cells.

Flow attention uses the other cells of a context only through sums over them. Three rounds of sums, each made of the
ones before, are all a layer needs; with them at hand, every cell's output is its own affair. So a layer over any number
of cells is four passes over chunks, in memory that depends on the chunk alone, and equal to the plain layer up to the
order of addition. The layer itself is the one in :mod:`cellplm_jax.model.encoder`: only its sums come from elsewhere.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from cellplm_jax.config import ModelConfig
from cellplm_jax.model.attention import CellGroups
from cellplm_jax.model.encoder import TransformerLayer

FLOW_ROUNDS = (2, 4, 7)
"""Sums that are known after each round: those of keys and queries; of both once they are normalised by the other's; and
those of cells, of exponentials and of the memory."""


class ContextGroups(CellGroups):
    """A chunk of one context: sums over cells are those of the whole context where they are known, in order of use.

    Attributes:
        known: The first sums of the whole context.
        found: All sums in order, those past the known ones over this chunk alone; filled while a layer is traced.
    """

    known: tuple[jax.Array, ...] = ()
    found: list[jax.Array] = struct.field(pytree_node=False, default_factory=list)

    def total(self, values: jax.Array) -> jax.Array:
        """Return a known sum over the cells of [samples, cells, ...], or the chunk's own."""
        return self._next(CellGroups.total, values)

    def weighted_total(self, values: jax.Array, weights: jax.Array) -> jax.Array:
        """Return a known weighted sum over the cells of [samples, cells, ...], or the chunk's own."""
        return self._next(CellGroups.weighted_total, values, weights)

    def outer_total(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Return a known sum of outer products of [samples, cells, ...], or the chunk's own."""
        return self._next(CellGroups.outer_total, left, right)

    def _next(self, summed, *values):
        place = len(self.found)
        self.found.append(self.known[place] if place < len(self.known) else summed(self, *values))
        return self.found[-1]


def chunk_sums(
    params: Any,
    hidden: jax.Array,
    cell_mask: jax.Array,
    known: tuple[jax.Array, ...],
    config: ModelConfig,
) -> tuple[jax.Array, ...]:
    """Return what a chunk adds to the sums of the next round of a layer.

    Args:
        params: Parameters of one ``encoder/layer_*``.
        hidden: float [1, cells, hidden], what the layer is given, for the cells of the chunk.
        cell_mask: bool [1, cells].
        known: Sums of the whole context from the rounds before: 0, 2 or 4 of them.
        config: The architecture; ``encoder.kind`` is ``"flow"``.

    Returns:
        The next 2 or 3 sums, float32 [1, 1, heads, ...]; added over chunks, they continue ``known``.
    """
    _, groups = _layer(params, hidden, cell_mask, known, config)
    stop = next(end for end in FLOW_ROUNDS if end > len(known))
    return tuple(groups.found[len(known) : stop])


def chunk_layer(
    params: Any,
    hidden: jax.Array,
    cell_mask: jax.Array,
    known: tuple[jax.Array, ...],
    config: ModelConfig,
) -> jax.Array:
    """Return a layer's output [1, cells, hidden] for a chunk; arguments as :func:`chunk_sums`, all 7 sums known."""
    return _layer(params, hidden, cell_mask, known, config)[0]


def _layer(params, hidden, cell_mask, known, config):
    groups = ContextGroups(cell_mask, known=known)
    layer = TransformerLayer(config, 0)
    return layer.apply({"params": params}, hidden, groups, False), groups
