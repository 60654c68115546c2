"""Flow attention over contexts larger than device memory: a layer as passes over chunks of cells.

Flow attention uses the other cells of a context only through sums over them. A layer needs three rounds of sums, each
computed from the previous ones; given these sums, the output of each cell is independent of the others. A layer over
any number of cells is therefore four passes over chunks, in memory that depends only on the chunk size, and equal to
the plain layer up to the order of summation. It uses the layer of :mod:`cellplm_jax.model.encoder` with precomputed
sums.
"""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Bool, Float, Float32

from cellplm_jax.batch import Array
from cellplm_jax.config import ModelConfig
from cellplm_jax.model.attention import CellGroups
from cellplm_jax.model.encoder import TransformerLayer

FLOW_ROUNDS = (2, 4, 7)
"""Number of known sums after each round: those of keys and queries; of both after normalisation by the other; and
those of cells, of exponentials and of the memory.
"""


class ContextGroups(CellGroups):
    """A chunk of one context: sums over cells are replaced by the known sums of the complete context, in order of use.

    Attributes:
        known: The first sums of the complete context.
        found: All sums in order, those without a known value over this chunk only; filled while a layer is traced.
    """

    known: tuple[Array, ...] = ()
    found: list[Array] = struct.field(pytree_node=False, default_factory=list)

    def total(
        self, values: Float[Array, "samples cells heads *rest"]
    ) -> Float[Array, "samples 1 heads *rest"]:
        """Return a known sum over the cells, or the chunk's own."""
        return self._next(CellGroups.total, values)

    def weighted_total(
        self,
        values: Float[Array, "samples cells heads width"],
        weights: Float[Array, "samples cells heads"],
    ) -> Float[Array, "samples 1 heads width"]:
        """Return a known weighted sum over the cells, or the chunk's own."""
        return self._next(CellGroups.weighted_total, values, weights)

    def outer_total(
        self,
        left: Float[Array, "samples cells heads width"],
        right: Float[Array, "samples cells heads other"],
    ) -> Float[Array, "samples 1 heads width other"]:
        """Return a known sum of outer products, or the chunk's own."""
        return self._next(CellGroups.outer_total, left, right)

    def _next(self, summed, *values):
        place = len(self.found)
        # The layer asks for its sums in one order, so their number identifies them.
        self.found.append(self.known[place] if place < len(self.known) else summed(self, *values))
        return self.found[-1]


def chunk_sums(
    params: Any,
    hidden: Float[Array, "1 cells hidden"],
    cell_mask: Bool[Array, "1 cells"],
    known: tuple[Float32[Array, "1 1 ..."], ...],
    config: ModelConfig,
) -> tuple[Float32[Array, "1 1 ..."], ...]:
    """Return the contribution of a chunk to the sums of the next round of a layer.

    Args:
        params: Parameters of one ``encoder/layer_*``.
        hidden: Input of the layer for the cells of the chunk.
        cell_mask: True for cells, False for padding.
        known: Sums of the complete context from the previous rounds: 0, 2 or 4 of them.
        config: The architecture; ``encoder.kind`` is ``"flow"``.

    Returns:
        The next 2 or 3 sums; summed over chunks, they extend ``known``.
    """
    _, groups = _layer(params, hidden, cell_mask, known, config)
    stop = next(end for end in FLOW_ROUNDS if end > len(known))
    return tuple(groups.found[len(known) : stop])


def chunk_layer(
    params: Any,
    hidden: Float[Array, "1 cells hidden"],
    cell_mask: Bool[Array, "1 cells"],
    known: tuple[Float32[Array, "1 1 ..."], ...],
    config: ModelConfig,
) -> Float[Array, "1 cells hidden"]:
    """Return a layer's output for one chunk; as :func:`chunk_sums`, with all 7 sums known."""
    return _layer(params, hidden, cell_mask, known, config)[0]


def _layer(params, hidden, cell_mask, known, config):
    # The same layer as in training: no second implementation that could differ.
    groups = ContextGroups(cell_mask, known=known)
    layer = TransformerLayer(config, 0)
    return layer.apply({"params": params}, hidden, groups, False), groups
