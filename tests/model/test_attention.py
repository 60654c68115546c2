"""Attention among cells against plain numpy; padding, permutation, one cell, none at all, gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.attention import (
    CellAttention,
    CellGroups,
    flow_attention,
    flow_weights,
    orthogonal_features,
    performer_attention,
    softmax_attention,
    softmax_weights,
)
from cellplm_jax.model.cellplm import CellPLM, attention_rows, init_params
from tests.model.common import (
    apply,
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
    "flow": jax.jit(lambda q, k, v, mask: flow_attention(q, k, v, CellGroups(mask))),
    "softmax": jax.jit(lambda q, k, v, mask: softmax_attention(q, k, v, CellGroups(mask))),
    "performer": jax.jit(
        lambda q, k, v, mask: performer_attention(q, k, v, CellGroups(mask), PROJECTION)
    ),
}


def queries_keys_values(samples, cells, *, seed=0, scale=1.0, heads=HEADS, width=WIDTH):
    generator = np.random.default_rng(seed)
    return tuple(
        (scale * generator.standard_normal((samples, cells, heads, width))).astype(np.float32)
        for _ in range(3)
    )


def flowformer(query, key, value):
    """Flow-Attention of one sample and one head, [cells, width], from the Flowformer paper's equations.

    Incoming flow of a sink: I_i = phi(Q_i) . sum_j phi(K_j); of a source: O_j = phi(K_j) . sum_i phi(Q_i).
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
    query, key, value = (np.repeat(x[:, :1], 7, axis=1) for x in queries_keys_values(2, 7))
    got = FORMS["flow"](query, key, value, np.ones((2, 7), bool))
    np.testing.assert_allclose(got, value * sigmoid(np.array(1.0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
def test_padding_never_changes_a_number(kind):
    query, key, value = queries_keys_values(2, 7)
    mask = np.arange(7)[None] < np.array([[7], [3]])
    expected = np.asarray(FORMS[kind](query, key, value, mask))
    padded = []
    for index, x in enumerate((query, key, value)):
        nonsense = np.random.default_rng(index).standard_normal((2, 2, HEADS, WIDTH)) * 30
        longer = np.concatenate([x, nonsense.astype(np.float32)], axis=1)
        longer[1, 3:] = 1e3 * (-1) ** index
        padded.append(longer)
    got = np.asarray(FORMS[kind](*padded, np.pad(mask, ((0, 0), (0, 2)))))
    np.testing.assert_allclose(got[:, :7][mask], expected[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_permuting_cells_permutes_outputs(kind):
    query, key, value = queries_keys_values(2, 7)
    mask = np.arange(7)[None] < np.array([[7], [5]])
    order = np.random.default_rng(1).permutation(7)
    expected = np.asarray(FORMS[kind](query, key, value, mask))[:, order]
    permuted = mask[:, order]
    got = np.asarray(FORMS[kind](query[:, order], key[:, order], value[:, order], permuted))
    np.testing.assert_allclose(got[permuted], expected[permuted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_a_cell_alone_gets_its_own_value(kind):
    query, key, value = queries_keys_values(2, 7)
    mask = np.zeros((2, 7), bool)
    mask[:, 2] = True
    got = np.asarray(FORMS[kind](query, key, value, mask))[:, 2]
    expected = value[:, 2]
    if kind == "flow":
        # Alone, all incoming and outgoing flow is one: the value, allocated by sigmoid(1).
        expected = expected * sigmoid(np.array(1.0))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def probed(kind, query, key, value, mask, probe):
    mixed = FORMS[kind](query, key, value, mask)
    return jnp.sum(jnp.where(mask[..., None, None], mixed * probe, 0.0))


GRADIENTS = {kind: jax.jit(jax.grad(partial(probed, kind), argnums=(0, 1, 2))) for kind in FORMS}
PROBE = np.random.default_rng(3).standard_normal((2, 7, HEADS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("lengths", [(7, 2), (4, 0)])
@pytest.mark.parametrize("kind", FORMS)
def test_gradients_are_finite_with_padding_and_an_empty_sample(kind, lengths):
    query, key, value = queries_keys_values(2, 7, scale=3.0)
    mask = np.arange(7)[None] < np.array(lengths)[:, None]
    assert np.isfinite(np.asarray(FORMS[kind](query, key, value, mask))).all()
    for gradient in GRADIENTS[kind](query, key, value, mask, PROBE):
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[mask]).max() > 0
        np.testing.assert_array_equal(gradient[~mask], 0.0)


def test_flow_gradient_equals_finite_differences():
    query, key, value = queries_keys_values(2, 7)
    lengths = [7, 4]
    mask = np.arange(7)[None] < np.array(lengths)[:, None]
    direction = queries_keys_values(2, 7, seed=5)
    gradients = GRADIENTS["flow"](query, key, value, mask, PROBE)
    got = sum(float((np.asarray(g) * d).sum()) for g, d in zip(gradients, direction, strict=True))

    def reference(step):
        parts = zip((query, key, value), direction, strict=True)
        moved = (x.astype(np.float64) + step * d for x, d in parts)
        return (each_head(flowformer, *moved, lengths) * PROBE).sum()

    expected = (reference(1e-5) - reference(-1e-5)) / 2e-5
    assert got == pytest.approx(expected, rel=1e-3)


def test_performer_approaches_softmax_attention_with_more_features():
    # With the signs that the QR decomposition happens to choose, the rows of a block are not uniform on the sphere
    # (their diagonal is negative) and the estimate converges to something else.
    query, key, value = queries_keys_values(1, 20, scale=0.5, heads=2, width=8)
    mask = np.ones((1, 20), bool)
    exact = np.asarray(FORMS["softmax"](query, key, value, mask))
    performer = jax.jit(
        lambda q, k, v, mask, projection: performer_attention(q, k, v, CellGroups(mask), projection)
    )

    def error(features):
        draws = [
            performer(query, key, value, mask, orthogonal_features(features, 8, seed=seed))
            for seed in range(4)
        ]
        return np.sqrt(np.mean((np.asarray(draws) - exact) ** 2)) / exact.std()

    errors = [error(features) for features in (8, 128, 4096)]
    assert errors == sorted(errors, reverse=True)
    # Monte-Carlo: 32 times the features divide the error by about sqrt(32) = 5.7.
    assert errors[2] < errors[1] / 3.5
    assert errors[2] < 0.06


def test_performer_survives_large_queries_and_keys():
    query, key, value = queries_keys_values(2, 7, scale=40.0)
    mask = np.ones((2, 7), bool)
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
    # No direction is preferred; with the signs of QR the diagonal of this mean is -.8 .. -.6.
    mean = rows.astype(np.float64).reshape(-1, 8, 8).mean(axis=0)
    assert np.abs(mean).max() < 5 / np.sqrt(500)


def test_random_features_are_a_function_of_the_seed():
    rows = orthogonal_features(4000, 8, seed=3)
    np.testing.assert_array_equal(rows, orthogonal_features(4000, 8, seed=3))
    assert not np.array_equal(rows, orthogonal_features(4000, 8, seed=4))
    assert orthogonal_features(5, 8, seed=0).shape == (5, 8)


@pytest.mark.parametrize("kind", ["flow", "softmax"])
def test_module_projects_splits_heads_and_projects_back(kind):
    config = tiny(encoder={"kind": kind, "heads": 4})
    module = CellAttention(config)
    hidden = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    mask = np.array([[True] * 7, [True] * 4 + [False] * 3])
    params = random_params(shapes_of(module, hidden, CellGroups(mask), train=False))
    got = np.asarray(apply(module, params, hidden, CellGroups(mask), train=False))
    p = float64(params)
    split = [linear(hidden, p[name]).reshape(2, 7, 4, 8) for name in ("query", "key", "value")]
    reference = flowformer if kind == "flow" else plain_softmax
    mixed = each_head(reference, *split, [7, 4]).reshape(2, 7, 32)
    expected = linear(mixed, p["out"])
    np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_performer_module_draws_other_features_in_every_layer():
    config = tiny(encoder={"kind": "performer"})
    hidden = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    mask = np.ones((2, 7), bool)
    params = random_params(shapes_of(CellAttention(config), hidden, CellGroups(mask), train=False))
    first, again, second = (
        apply(CellAttention(config, layer), params, hidden, CellGroups(mask), train=False)
        for layer in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


def test_attention_dropout_acts_while_training_alone():
    config = tiny(encoder={"attention_dropout": 0.5})
    module = CellAttention(config)
    hidden = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    mask = np.ones((2, 7), bool)
    params = random_params(shapes_of(module, hidden, CellGroups(mask), train=False))
    calm = np.asarray(apply(module, params, hidden, CellGroups(mask), train=False))
    rngs = {"dropout": jax.random.key(0)}
    noisy = np.asarray(apply(module, params, hidden, CellGroups(mask), train=True, rngs=rngs))
    dropped = noisy == 0
    assert 0.3 < dropped.mean() < 0.7
    np.testing.assert_allclose(noisy[~dropped], 2 * calm[~dropped], rtol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "softmax"])
def test_explicit_weights_give_the_output(kind):
    random = np.random.default_rng(3)
    query, key, value = random.normal(size=(3, 1, 50, 4, 8)).astype(np.float32) * 2
    groups = CellGroups(jnp.asarray(np.arange(50)[None] < 41))
    rows = jnp.asarray([0, 17, 40])
    attention = {"flow": flow_attention, "softmax": softmax_attention}[kind]
    weights = {"flow": flow_weights, "softmax": softmax_weights}[kind](query, key, groups, rows)
    assert weights.shape == (1, 4, 3, 50)
    assert not np.asarray(weights[..., 41:]).any()
    wanted = attention(query, key, value, groups)[:, rows]
    np.testing.assert_allclose(jnp.einsum("bhqk,bkhd->bqhd", weights, value), wanted, atol=1e-5)


def test_attention_rows_are_those_of_every_layer():
    config = tiny(hidden=16)
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    hidden = jax.random.normal(jax.random.key(1), (1, 12, 16))
    mask = jnp.arange(12)[None] < 10
    rows = jnp.asarray([3, 9])
    weights = jax.jit(lambda p: attention_rows(p, hidden, mask, rows, config))(params)
    assert weights.shape == (2, 4, 2, 12)

    @jax.jit
    def encode(params):
        return CellPLM(config).apply(
            {"params": params}, hidden, mask, method=CellPLM.encode,
            capture_intermediates=True, mutable=["intermediates"],
        )  # fmt: skip

    _, seen = encode(params)
    for layer in range(2):
        kept = seen["intermediates"]["encoder"][f"layer_{layer}"]["attention"]
        value = kept["value"]["__call__"][0].reshape(1, 12, 4, 4)
        mixed = jnp.einsum("hqk,bkhd->bqhd", weights[layer], value).reshape(1, 2, 16)
        out = params["encoder"][f"layer_{layer}"]["attention"]["out"]
        wanted = kept["__call__"][0][:, rows]
        np.testing.assert_allclose(mixed @ out["kernel"] + out["bias"], wanted, atol=1e-5)
