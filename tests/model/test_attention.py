"""Attention among cells against plain numpy; padding, permutation, one cell, none at all, gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.attention import (
    CellAttention,
    flow_attention,
    orthogonal_features,
    performer_attention,
    softmax_attention,
)
from tests.model.common import (
    float64,
    linear,
    random_params,
    shapes_of,
    sigmoid,
    softmax,
    tiny,
)

HEADS, WIDTH = 3, 5
PROJECTION = orthogonal_features(64, WIDTH, seed=0)
FORMS = {
    "flow": jax.jit(flow_attention),
    "softmax": jax.jit(softmax_attention),
    "performer": jax.jit(partial(performer_attention, projection=PROJECTION)),
}


def queries_keys_values(samples, cells, *, seed=0, scale=1.0, heads=HEADS, width=WIDTH):
    generator = np.random.default_rng(seed)
    return tuple(
        (scale * generator.standard_normal((samples, cells, heads, width))).astype(np.float32)
        for _ in range(3)
    )


def flowformer(query, key, value):
    """Flow-Attention of one sample and one head, [cells, width], from the Flowformer paper's equations.

    Incoming flow of sink i: I_i = phi(Q_i) . sum_j phi(K_j); outgoing flow of source j: O_j = phi(K_j) . sum_i phi(Q_i).
    Conserved: I^_i = phi(Q_i) . sum_j phi(K_j) / O_j and O^_j = phi(K_j) . sum_i phi(Q_i) / I_i.
    Competition: V^ = softmax(O^) V (times the number of sources in the official code); aggregation
    A_i = phi(Q_i) / I_i . sum_j phi(K_j)^T V^_j; allocation: sigmoid(I^_i) A_i.
    """
    small = 1e-6
    query, key = sigmoid(query), sigmoid(key)
    cells = len(query)
    incoming = np.array(
        [sum((q + small) @ (k + small / cells) for k in key) for q in query]
    )  # sum of k plus one epsilon
    outgoing = np.array([sum((k + small) @ (q + small / cells) for q in query) for k in key])
    sink_total = sum(k / o for k, o in zip(key, outgoing, strict=True)) + small
    source_total = sum(q / i for q, i in zip(query, incoming, strict=True)) + small
    conserved_sink = np.array([(q + small) @ sink_total for q in query])
    conserved_source = np.clip([(k + small) @ source_total for k in key], -1, 1)
    weight = np.exp(conserved_source)
    competed = value * (weight / weight.sum() * cells)[:, None]
    context = sum(np.outer(k, v) for k, v in zip(key, competed, strict=True))
    rows = [
        sigmoid(c) * (q / i) @ context
        for c, q, i in zip(conserved_sink, query, incoming, strict=True)
    ]
    return np.array(rows)


def plain_softmax(query, key, value):
    return softmax(query @ key.T / np.sqrt(query.shape[1])) @ value


def each_head(reference, query, key, value, lengths):
    result = np.zeros(query.shape)
    for sample, length in enumerate(lengths):
        for head in range(query.shape[2]):
            part = (x[sample, :length, head].astype(np.float64) for x in (query, key, value))
            result[sample, :length, head] = reference(*part)
    return result


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("kind", "reference"), [("flow", flowformer), ("softmax", plain_softmax)])
def test_equals_numpy_in_float64(kind, reference, scale):
    lengths = [7, 4]
    query, key, value = queries_keys_values(2, 7, scale=scale)
    mask = np.arange(7)[None] < np.array(lengths)[:, None]
    got = np.asarray(FORMS[kind](query, key, value, mask))
    expected = each_head(reference, query, key, value, lengths)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got[mask], expected[mask], rtol=2e-5, atol=2e-6)


def test_flow_attention_conserves_flow_by_allocating_and_competing():
    # With identical cells every flow is the same: competition is 1 and each cell gets sigmoid(1) of the value.
    query, key, value = (np.repeat(x[:, :1], 6, axis=1) for x in queries_keys_values(1, 6))
    got = FORMS["flow"](query, key, value, np.ones((1, 6), bool))
    np.testing.assert_allclose(got, value * sigmoid(np.array(1.0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
def test_padding_never_changes_a_number(kind):
    query, key, value = queries_keys_values(2, 5)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    expected = np.asarray(FORMS[kind](query, key, value, mask))
    padded = []
    for index, x in enumerate((query, key, value)):
        nonsense = np.random.default_rng(index).standard_normal((2, 4, HEADS, WIDTH)) * 30
        longer = np.concatenate([x, nonsense.astype(np.float32)], axis=1)
        longer[1, 3:] = 1e3 * (-1) ** index
        padded.append(longer)
    longer_mask = np.pad(mask, ((0, 0), (0, 4)))
    got = np.asarray(FORMS[kind](*padded, longer_mask))
    np.testing.assert_allclose(got[:, :5][mask], expected[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_permuting_cells_permutes_outputs(kind):
    query, key, value = queries_keys_values(1, 9)
    mask = np.ones((1, 9), bool)
    order = np.random.default_rng(1).permutation(9)
    expected = np.asarray(FORMS[kind](query, key, value, mask))[:, order]
    got = FORMS[kind](query[:, order], key[:, order], value[:, order], mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_a_cell_alone_gets_its_own_value(kind):
    query, key, value = queries_keys_values(1, 1)
    got = np.asarray(FORMS[kind](query, key, value, np.ones((1, 1), bool)))
    if kind == "flow":
        # Alone, all incoming and outgoing flow is one: the value, allocated by sigmoid(1).
        value = value * sigmoid(np.array(1.0))
    np.testing.assert_allclose(got, value, rtol=1e-4)


@pytest.mark.parametrize("kind", FORMS)
def test_gradients_are_finite_with_padding_and_an_empty_sample(kind):
    query, key, value = queries_keys_values(3, 4, scale=3.0)
    mask = np.array([[True] * 4, [True, True, False, False], [False] * 4])

    def loss(query, key, value):
        mixed = FORMS[kind](query, key, value, mask)
        return jnp.sum(jnp.where(mask[..., None, None], mixed, 0.0) ** 2)

    got = FORMS[kind](query, key, value, mask)
    assert np.isfinite(np.asarray(got)).all()
    for gradient in jax.grad(loss, argnums=(0, 1, 2))(query, key, value):
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[mask]).max() > 0
        np.testing.assert_array_equal(gradient[~mask], 0.0)


def test_flow_gradient_equals_finite_differences():
    query, key, value = queries_keys_values(1, 4)
    mask = np.ones((1, 4), bool)
    probe = np.random.default_rng(3).standard_normal(query.shape)
    direction = queries_keys_values(1, 4, seed=5)

    def loss(*parts):
        return jnp.sum(FORMS["flow"](*parts, mask) * probe)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    got = sum(float((np.asarray(g) * d).sum()) for g, d in zip(gradients, direction, strict=True))

    def reference(step):
        moved = (x + step * d for x, d in zip((query, key, value), direction, strict=True))
        return (each_head(flowformer, *(m.astype(np.float64) for m in moved), [4]) * probe).sum()

    expected = (reference(1e-4) - reference(-1e-4)) / 2e-4
    assert got == pytest.approx(expected, rel=2e-3)


def test_performer_approaches_softmax_attention_with_more_features():
    query, key, value = queries_keys_values(1, 20, scale=0.7, heads=2, width=8)
    mask = np.ones((1, 20), bool)
    exact = np.asarray(FORMS["softmax"](query, key, value, mask))

    def error(features):
        draws = [
            performer_attention(query, key, value, mask, orthogonal_features(features, 8, seed=s))
            for s in range(3)
        ]
        return np.mean([np.sqrt(np.mean((np.asarray(d) - exact) ** 2)) for d in draws])

    errors = [error(features) for features in (8, 64, 512, 4096)]
    assert errors == sorted(errors, reverse=True)
    # Monte-Carlo: eight times the features divide the error by about sqrt(8).
    assert errors[-1] < errors[0] / 8
    assert errors[-1] < 0.02 * exact.std()


def test_performer_survives_large_queries_and_keys():
    query, key, value = queries_keys_values(1, 6, scale=40.0)
    mask = np.ones((1, 6), bool)
    got = np.asarray(FORMS["performer"](query, key, value, mask))
    assert np.isfinite(got).all()
    # Weights are positive and sum to one: an output lies within the values.
    assert (got <= value.max(1, keepdims=True) + 1e-3).all()
    assert (got >= value.min(1, keepdims=True) - 1e-3).all()


def test_random_features_are_orthogonal_in_blocks_with_gaussian_norms():
    rows = orthogonal_features(4000, 8, seed=3)
    assert rows.shape == (4000, 8)
    assert rows.dtype == np.float32
    block = rows[8:16] / np.linalg.norm(rows[8:16], axis=1, keepdims=True)
    np.testing.assert_allclose(block @ block.T, np.eye(8), atol=1e-5)
    squared = (rows.astype(np.float64) ** 2).sum(1)
    # The squared norm of a Gaussian vector is chi-squared: mean 8, variance 16.
    assert squared.mean() == pytest.approx(8, rel=0.03)
    assert squared.var() == pytest.approx(16, rel=0.12)
    np.testing.assert_array_equal(rows, orthogonal_features(4000, 8, seed=3))
    assert not np.array_equal(rows, orthogonal_features(4000, 8, seed=4))
    assert orthogonal_features(5, 8, seed=0).shape == (5, 8)


@pytest.mark.parametrize("kind", ["flow", "softmax"])
def test_module_projects_splits_heads_and_projects_back(kind):
    config = tiny(encoder={"kind": kind, "heads": 4})
    module = CellAttention(config)
    hidden = np.random.default_rng(0).standard_normal((2, 6, 32)).astype(np.float32)
    mask = np.array([[True] * 6, [True] * 4 + [False] * 2])
    params = random_params(shapes_of(module, hidden, mask, train=False))
    got = np.asarray(module.apply({"params": params}, hidden, mask, train=False))
    p = float64(params)
    split = [linear(hidden, p[name]).reshape(2, 6, 4, 8) for name in ("query", "key", "value")]
    reference = flowformer if kind == "flow" else plain_softmax
    mixed = each_head(reference, *split, [6, 4]).reshape(2, 6, 32)
    expected = linear(mixed, p["out"])
    np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_performer_module_draws_other_features_in_every_layer():
    config = tiny(encoder={"kind": "performer"})
    hidden = np.random.default_rng(0).standard_normal((1, 6, 32)).astype(np.float32)
    mask = np.ones((1, 6), bool)
    params = random_params(shapes_of(CellAttention(config), hidden, mask, train=False))
    first, again, second = (
        CellAttention(config, layer).apply({"params": params}, hidden, mask, train=False)
        for layer in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


def test_attention_dropout_acts_while_training_alone():
    config = tiny(encoder={"attention_dropout": 0.5})
    module = CellAttention(config)
    hidden = np.random.default_rng(0).standard_normal((1, 6, 32)).astype(np.float32)
    mask = np.ones((1, 6), bool)
    params = random_params(shapes_of(module, hidden, mask, train=False))
    calm = np.asarray(module.apply({"params": params}, hidden, mask, train=False))
    rngs = {"dropout": jax.random.key(0)}
    noisy = np.asarray(module.apply({"params": params}, hidden, mask, train=True, rngs=rngs))
    dropped = noisy == 0
    assert 0.3 < dropped.mean() < 0.7
    np.testing.assert_allclose(noisy[~dropped], 2 * calm[~dropped], rtol=1e-5)
