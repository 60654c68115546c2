"""Attention between the cells of a sample; padding never changes a number.

Flow attention follows Flowformer (Wu et al. 2022) as used in ``CellPLM/layer/flowformer.py``; its every use of the cell
axis is a sum, so it is linear in the number of cells and shards over cells with all-reduces alone. Performer is FAVOR+
(Choromanski et al. 2021). Sums over cells run in float32.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax.config import ModelConfig
from cellplm_jax.model.layers import dense

FLOW_EPSILON = 1e-6


def nonzero(total: jax.Array) -> jax.Array:
    """Replace 0 by 1, so that a sample without cells divides to 0 and has gradients without NaN."""
    return jnp.where(total > 0, total, 1.0)


def flow_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, cell_mask: jax.Array
) -> jax.Array:
    """Flow attention with conservation of incoming and outgoing flow.

    Args:
        query: float [samples, cells, heads, width]. Projections before the sigmoid.
        key: Likewise.
        value: Likewise.
        cell_mask: bool [samples, cells].

    Returns:
        float32 [samples, cells, heads, width]; rows of padding cells are meaningless.
    """
    mask = cell_mask[:, :, None].astype(jnp.float32)
    query = nn.sigmoid(query.astype(jnp.float32))
    key = nn.sigmoid(key.astype(jnp.float32))
    value = value.astype(jnp.float32)
    query_flow, key_flow = query + FLOW_EPSILON, key + FLOW_EPSILON

    def total(x):
        return jnp.einsum("bch,bchd->bhd", mask, x)

    # Incoming flow of each sink (query) and outgoing flow of each source (key).
    sink_incoming = 1.0 / jnp.einsum("bchd,bhd->bch", query_flow, total(key) + FLOW_EPSILON)
    source_outgoing = 1.0 / jnp.einsum("bchd,bhd->bch", key_flow, total(query) + FLOW_EPSILON)
    # The same flows after each side has been normalised by the other.
    conserved_sink = jnp.einsum(
        "bchd,bhd->bch", query_flow, total(key * source_outgoing[..., None]) + FLOW_EPSILON
    )
    conserved_source = jnp.einsum(
        "bchd,bhd->bch", key_flow, total(query * sink_incoming[..., None]) + FLOW_EPSILON
    )
    conserved_source = jnp.clip(conserved_source, -1.0, 1.0)
    # Allocation among sinks, competition among sources.
    allocation = nn.sigmoid(conserved_sink)
    exponential = jnp.exp(conserved_source) * mask
    cells = mask.sum(axis=1, keepdims=True)
    competition = exponential / nonzero(exponential.sum(axis=1, keepdims=True)) * cells
    memory = jnp.einsum("bchd,bchm->bhdm", key * mask[..., None], value * competition[..., None])
    mixed = jnp.einsum("bchd,bhdm->bchm", query * sink_incoming[..., None], memory)
    return mixed * allocation[..., None]


def softmax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, cell_mask: jax.Array
) -> jax.Array:
    """Scaled dot-product attention, quadratic in the number of cells; shapes as :func:`flow_attention`."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    scores = jnp.where(cell_mask[:, None, None, :], scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores, axis=-1), value.astype(jnp.float32))


def orthogonal_features(features: int, width: int, seed: int) -> np.ndarray:
    """Return float32 [features, width]: random rows, orthogonal within blocks, with the norms of Gaussian vectors.

    The draw depends on the seed alone, so the features are a constant of the architecture and not a parameter.
    """
    generator = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-features // width)):
        orthogonal, triangular = np.linalg.qr(generator.standard_normal((width, width)))
        # QR fixes the signs of its columns; undoing that makes the directions uniform.
        blocks.append((orthogonal * np.sign(np.diag(triangular))).T)
    rows = np.concatenate(blocks)[:features]
    norms = np.linalg.norm(generator.standard_normal((features, width)), axis=1, keepdims=True)
    return (rows * norms).astype(np.float32)


def performer_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cell_mask: jax.Array,
    projection: np.ndarray,
) -> jax.Array:
    """FAVOR+ estimate of softmax attention with positive random features, linear in the number of cells.

    Args:
        query: float [samples, cells, heads, width].
        key: Likewise.
        value: Likewise.
        cell_mask: bool [samples, cells].
        projection: float32 [features, width], from :func:`orthogonal_features`.

    Returns:
        float32 [samples, cells, heads, width].
    """
    scale = query.shape[-1] ** -0.25
    mask = cell_mask[:, :, None, None]

    def exponent(x):
        x = x.astype(jnp.float32) * scale
        return jnp.einsum("bchd,md->bchm", x, projection) - 0.5 * jnp.sum(x**2, -1, keepdims=True)

    query_exponent, key_exponent = exponent(query), exponent(key)
    query_features = jnp.exp(query_exponent - query_exponent.max(axis=-1, keepdims=True))
    # One constant a head cancels between numerator and denominator, so the largest valid exponent may be removed.
    largest = jnp.where(mask, key_exponent, -jnp.inf).max(axis=(1, 3), keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    key_features = jnp.where(mask, jnp.exp(jnp.minimum(key_exponent - largest, 0.0)), 0.0)
    # Keeps a query that no feature reaches at the plain average of the values instead of 0 / 0.
    query_features = query_features + 1e-6
    key_features = jnp.where(mask, key_features + 1e-6, 0.0)
    memory = jnp.einsum("bchm,bchd->bhmd", key_features, value.astype(jnp.float32))
    numerator = jnp.einsum("bchm,bhmd->bchd", query_features, memory)
    denominator = jnp.einsum("bchm,bhm->bch", query_features, key_features.sum(axis=1))
    return numerator / nonzero(denominator)[..., None]


class CellAttention(nn.Module):
    """Multi-head attention among the cells of each sample.

    Attributes:
        config: The model's configuration; ``encoder.kind`` chooses the form.
        layer: Index of the layer; seeds the random features of ``"performer"``.
    """

    config: ModelConfig
    layer: int = 0

    @nn.compact
    def __call__(self, hidden: jax.Array, cell_mask: jax.Array, *, train: bool) -> jax.Array:
        """Map [samples, cells, hidden] to the same shape."""
        encoder, width = self.config.encoder, self.config.hidden
        heads = (*hidden.shape[:2], encoder.heads, width // encoder.heads)
        query = dense(width, "query")(hidden).reshape(heads)
        key = dense(width, "key")(hidden).reshape(heads)
        value = dense(width, "value")(hidden).reshape(heads)
        if encoder.kind == "flow":
            mixed = flow_attention(query, key, value, cell_mask)
        elif encoder.kind == "softmax":
            mixed = softmax_attention(query, key, value, cell_mask)
        else:
            features = encoder.random_features or int(heads[-1] * math.log(max(heads[-1], 2)))
            projection = orthogonal_features(features, heads[-1], seed=self.layer)
            mixed = performer_attention(query, key, value, cell_mask, projection)
        mixed = dense(width, "out")(mixed.reshape(hidden.shape))
        return nn.Dropout(encoder.attention_dropout, name="dropout")(mixed, deterministic=not train)
