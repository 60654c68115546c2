"""Attention between the cells of each sample, unaffected by padding and by other samples of the row.

Flow attention follows Flowformer (Wu et al. 2022) as used in ``CellPLM/layer/flowformer.py``; it uses the cell
axis only in sums, so it is linear in the number of cells and shards over cells with all-reduces only. Performer is
FAVOR+ (Choromanski et al. 2021). Sums over cells are float32.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Float32, Int, Int32

from cellplm_jax.batch import Array
from cellplm_jax.config import ModelConfig
from cellplm_jax.kernels.heads import by_head, join_heads, one_hot_heads, scaled
from cellplm_jax.kernels.matmul import batched_product
from cellplm_jax.kernels.tiles import tiled_apply, tiled_outer_total
from cellplm_jax.model.layers import Dropout, dense

FLOW_EPSILON = 1e-6


def nonzero(total: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Replace 0 by 1, to avoid division by zero and NaN gradients in samples without cells."""
    return jnp.where(total > 0, total, 1.0)


class CellGroups(struct.PyTreeNode):
    """Attention groups of each row, and the sums over them used by linear attention.

    With one sample per row every sum is a plain sum over the cells. With several, sums of vectors are products with a
    one-hot matrix, and sums of outer products are computed tile by tile, see ``kernels/tiles.py``.

    Attributes:
        cell_mask: True for cells, False for padding.
        segment: Index of each cell's sample in the row; None: one sample per row.
        segments: Maximum number of samples per row.
        pieces: Number of pieces per row.
    """

    cell_mask: Bool[Array, "samples cells"]
    segment: Int32[Array, "samples cells"] | None = None
    segments: int = struct.field(pytree_node=False, default=1)
    pieces: int = struct.field(pytree_node=False, default=1)

    def one_hot(self) -> Float32[Array, "samples cells segments"]:
        """Return the segment of each cell; all zero for padding."""
        mask = self.cell_mask[..., None].astype(jnp.float32)
        if self.segment is None:
            return mask
        return jax.nn.one_hot(self.segment, self.segments) * mask

    def total(
        self, values: Float[Array, "samples cells heads *rest"]
    ) -> Float[Array, "samples segments heads *rest"]:
        """Sum over the cells of each segment."""
        return jnp.einsum("bcs,bch...->bsh...", self.one_hot(), values)

    def weighted_total(
        self,
        values: Float[Array, "samples cells heads width"],
        weights: Float[Array, "samples cells heads"],
    ) -> Float[Array, "samples segments heads width"]:
        """Compute weighted sums of vectors over each segment."""
        # Packed rows need a sum per segment, single ones a plain product.
        if self.segment is not None:
            return self.total(scaled(values, weights))
        # One product of all heads' weights with all heads' vectors, of which the diagonal blocks are kept.
        weights = weights * self.one_hot()
        mixed = batched_product(weights, join_heads(values), "rows", "rows")
        kept = (mixed * one_hot_heads(*values.shape[-2:]).T).sum(axis=1)
        return kept.reshape(-1, 1, *values.shape[-2:])

    def of_cell(
        self, totals: Float[Array, "samples segments heads *rest"]
    ) -> Float[Array, "samples cells heads *rest"]:
        """Gather each cell's segment entry."""
        return jnp.einsum("bcs,bsh...->bch...", self.one_hot(), totals)

    def dot(
        self,
        values: Float[Array, "samples cells heads width"],
        totals: Float[Array, "samples segments heads width"],
    ) -> Float[Array, "samples cells heads"]:
        """Compute the dot product of each cell's vector with its segment's vector."""
        heads = one_hot_heads(*values.shape[-2:])
        if self.segment is None:
            return batched_product(join_heads(values), join_heads(totals).swapaxes(1, 2) * heads)
        return join_heads(values * self.of_cell(totals)) @ heads

    def outer_total(
        self,
        left: Float[Array, "samples cells heads width"],
        right: Float[Array, "samples cells heads other"],
    ) -> Float[Array, "samples segments heads width other"]:
        """Sum the outer products of two vectors per cell over each segment."""
        if self.segment is None:
            # Padding contributes nothing to a sum if one factor is 0 there.
            left = by_head(left * self.cell_mask[:, :, None, None])
            return batched_product(left, by_head(right), "rows", "rows")[:, None]

        return tiled_outer_total(left, right, *self._layout())

    def apply(
        self,
        values: Float[Array, "samples cells heads width"],
        memory: Float[Array, "samples segments heads width other"],
    ) -> Float[Array, "samples cells heads other"]:
        """Multiply each cell's vector by its segment's matrix."""
        if self.segment is None:
            return by_head(batched_product(by_head(values), memory[:, 0]))

        return tiled_apply(values, memory, *self._layout())

    def _layout(self):
        return self.cell_mask, self.segment, self.segments, self.pieces


class Flow(struct.PyTreeNode):
    """Terms of flow attention that depend on queries and keys.

    The weight of cell k for cell q is ``allocation[q] * sink_incoming[q] * (query[q] . key[k]) * competition[k]``, with
    competition among sources ``exponential[k] * share``, on average 1.

    Attributes:
        query: After the sigmoid.
        key: After the sigmoid.
        sink_incoming: Inverse incoming flow of each query.
        allocation: Allocation among sinks.
        exponential: Exponential of the conserved flow of each source; 0 for padding.
        share: Number of cells over the sum of their exponentials.
    """

    query: Float32[Array, "samples cells heads width"]
    key: Float32[Array, "samples cells heads width"]
    sink_incoming: Float32[Array, "samples cells heads"]
    allocation: Float32[Array, "samples cells heads"]
    exponential: Float32[Array, "samples cells heads"]
    share: Float32[Array, "samples segments heads"]


def conserved_flow(
    query: Float[Array, "samples cells heads width"],
    key: Float[Array, "samples cells heads width"],
    groups: CellGroups,
) -> Flow:
    """Return the terms of flow attention that depend on queries and keys."""
    mask = groups.cell_mask[:, :, None].astype(jnp.float32)
    # Flows are sums over thousands of cells, in which bfloat16 loses the small terms.
    query = nn.sigmoid(query.astype(jnp.float32))
    key = nn.sigmoid(key.astype(jnp.float32))

    def flow_of(values, totals):
        # (values + epsilon) . (totals + epsilon), without materializing the first sum.
        totals = totals + FLOW_EPSILON
        rest = FLOW_EPSILON * totals.sum(axis=-1)
        return groups.dot(values, totals) + groups.of_cell(rest)

    def inverse(flow):
        # With several segments a padding cell belongs to none, and its flow is 0.
        return 1.0 / jnp.where(mask > 0, flow, 1.0)

    # Incoming flow of each sink (query) and outgoing flow of each source (key).
    sink_incoming = inverse(flow_of(query, groups.total(key)))
    source_outgoing = inverse(flow_of(key, groups.total(query)))
    # The same flows after normalising each side by the other.
    conserved_sink = flow_of(query, groups.weighted_total(key, source_outgoing))
    conserved_source = flow_of(key, groups.weighted_total(query, sink_incoming))
    # For stability, as in Flowformer's code: the exponential below stays between 1 / e and e.
    conserved_source = jnp.clip(conserved_source, -1.0, 1.0)
    # Allocation among sinks, competition among sources.
    allocation = nn.sigmoid(conserved_sink)
    # The softmax over sources, split into this and `share`, because its sum runs over cells that may be on other
    # devices.
    exponential = jnp.exp(conserved_source) * mask
    share = groups.total(mask) / nonzero(groups.total(exponential))
    return Flow(query, key, sink_incoming, allocation, exponential, share)


def flow_attention(
    query: Float[Array, "samples cells heads width"],
    key: Float[Array, "samples cells heads width"],
    value: Float[Array, "samples cells heads width"],
    groups: CellGroups,
) -> Float32[Array, "samples cells heads width"]:
    """Flow attention with conservation of incoming and outgoing flow; rows of padding cells are undefined."""
    flow = conserved_flow(query, key, groups)
    value = value.astype(jnp.float32)
    memory = groups.outer_total(flow.key, scaled(value, flow.exponential))
    # The share is one number per segment and head: applied to the memory, not to every cell.
    memory = memory * flow.share[..., None, None]
    mixed = groups.apply(scaled(flow.query, flow.sink_incoming), memory)
    return scaled(mixed, flow.allocation)


def flow_weights(
    query: Float[Array, "samples cells heads width"],
    key: Float[Array, "samples cells heads width"],
    groups: CellGroups,
    rows: Int[Array, " chosen"],
) -> Float32[Array, "samples heads chosen cells"]:
    """Return the explicit weights of :func:`flow_attention` for selected cells.

    Exact: ``flow_attention(...)[:, rows]`` is the product of these weights and the values. They are positive; because
    of allocation and competition, rows do not sum to 1.

    Args:
        query: See :func:`flow_attention`.
        key: See :func:`flow_attention`.
        groups: Attention groups; one sample per row.
        rows: Positions of the selected cells in the row.

    Returns:
        The weight of each cell for each selected one; 0 for padding.
    """
    flow = conserved_flow(query, key, groups)
    left = flow.query * (flow.sink_incoming * flow.allocation)[..., None]
    competition = flow.exponential * groups.of_cell(flow.share)
    return jnp.einsum("bqhd,bkhd->bhqk", left[:, rows], flow.key * competition[..., None])


def softmax_weights(
    query: Float[Array, "samples cells heads width"],
    key: Float[Array, "samples cells heads width"],
    groups: CellGroups,
    rows: Int[Array, " chosen"],
) -> Float32[Array, "samples heads chosen cells"]:
    """Return the weights of :func:`softmax_attention`; see :func:`flow_weights`."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query[:, rows], key).astype(jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    # A large negative number instead of -inf: a row without valid cells would become NaN.
    return nn.softmax(jnp.where(groups.cell_mask[:, None, None, :], scores, -1e30), axis=-1)


def softmax_attention(
    query: Float[Array, "samples cells heads width"],
    key: Float[Array, "samples cells heads width"],
    value: Float[Array, "samples cells heads width"],
    groups: CellGroups,
) -> Float32[Array, "samples cells heads width"]:
    """Scaled dot-product attention, quadratic in cells."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    seen = groups.cell_mask[:, None, :]
    if groups.segment is not None:
        seen = seen & (groups.segment[:, :, None] == groups.segment[:, None, :])
    scores = jnp.where(seen[:, None], scores, -1e30)
    return jnp.einsum(
        "bhqk,bkhd->bqhd",
        nn.softmax(scores, axis=-1),
        value.astype(jnp.float32),
    )


def orthogonal_features(
    features: int,
    width: int,
    seed: int,
) -> Float32[np.ndarray, "{features} {width}"]:
    """Return random rows, orthogonal within blocks, with the norms of Gaussian vectors.

    The draw depends only on the seed, so the features are a constant of the architecture and not a parameter.
    """
    generator = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-features // width)):
        orthogonal, triangular = np.linalg.qr(generator.standard_normal((width, width)))
        # QR fixes the signs of its columns; undo this to obtain uniform directions.
        blocks.append((orthogonal * np.sign(np.diag(triangular))).T)
    rows = np.concatenate(blocks)[:features]
    norms = np.linalg.norm(generator.standard_normal((features, width)), axis=1, keepdims=True)
    return (rows * norms).astype(np.float32)


def performer_attention(
    query: Float[Array, "samples cells heads width"],
    key: Float[Array, "samples cells heads width"],
    value: Float[Array, "samples cells heads width"],
    groups: CellGroups,
    projection: Float32[Array, "features width"],
) -> Float32[Array, "samples cells heads width"]:
    """FAVOR+ estimate of softmax attention with positive random features, linear in the number of cells.


    ``projection`` is from :func:`orthogonal_features`.
    """
    # A quarter power on each side gives the root of the width for their product.
    scale = query.shape[-1] ** -0.25
    mask = groups.cell_mask[:, :, None, None]

    def exponent(x):
        x = x.astype(jnp.float32) * scale
        return jnp.einsum("bchd,md->bchm", x, projection) - 0.5 * jnp.sum(x**2, -1, keepdims=True)

    query_exponent = exponent(query)
    key_exponent = exponent(key)
    query_features = jnp.exp(query_exponent - query_exponent.max(axis=-1, keepdims=True))
    # One constant per head cancels between numerator and denominator, so the largest valid exponent can be subtracted.
    largest = jnp.where(mask, key_exponent, -jnp.inf).max(axis=(1, 3), keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    key_features = jnp.where(mask, jnp.exp(jnp.minimum(key_exponent - largest, 0.0)), 0.0)
    # A query that no feature reaches gets the plain average of the values instead of 0 / 0.
    query_features = query_features + 1e-6
    key_features = jnp.where(mask, key_features + 1e-6, 0.0)
    memory = groups.outer_total(key_features, value.astype(jnp.float32))
    numerator = groups.apply(query_features, memory)
    denominator = groups.dot(query_features, groups.total(key_features))
    return numerator / nonzero(denominator)[..., None]


class CellAttention(nn.Module):
    """Multi-head attention among the cells of each sample.

    Attributes:
        config: The model's configuration; ``encoder.kind`` selects the form.
        layer: Index of the layer; seeds the random features of ``"performer"``.
    """

    config: ModelConfig
    layer: int = 0

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "samples cells hidden"],
        groups: CellGroups,
        *,
        train: bool,
    ) -> Float[Array, "samples cells hidden"]:
        """Mix the values of each cell's group."""
        encoder = self.config.encoder
        width = self.config.hidden
        heads = (*hidden.shape[:2], encoder.heads, width // encoder.heads)
        query = dense(width, "query")(hidden).reshape(heads)
        key = dense(width, "key")(hidden).reshape(heads)
        value = dense(width, "value")(hidden).reshape(heads)
        if encoder.kind == "flow":
            mixed = flow_attention(query, key, value, groups)
        elif encoder.kind == "softmax":
            mixed = softmax_attention(query, key, value, groups)
        else:
            # d log d random features, the usual number of Performer implementations.
            default = max(1, int(heads[-1] * math.log(max(heads[-1], 2))))
            features = encoder.random_features or default
            projection = orthogonal_features(features, heads[-1], seed=self.layer)
            mixed = performer_attention(query, key, value, groups, projection)
        mixed = dense(width, "out")(mixed.reshape(hidden.shape).astype(hidden.dtype))
        return Dropout(encoder.attention_dropout, name="dropout")(mixed, deterministic=not train)
