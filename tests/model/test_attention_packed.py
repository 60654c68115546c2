"""Attention in packed rows: each sample as if it were alone in its row; and exact values of the sums over samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.attention import (
    CellAttention,
    CellGroups,
    flow_attention,
    nonzero,
    orthogonal_features,
    performer_attention,
    softmax_attention,
    softmax_weights,
)
from tests.model.common import random_params, shapes_of, tiny

LENGTHS = (4, 1, 3)
CELLS, HEADS, WIDTH = 10, 2, 3
MASK = np.arange(CELLS)[None] < sum(LENGTHS)
SEGMENT = np.concatenate([np.repeat(np.arange(3), LENGTHS), [1, 0]])[None].astype(np.int32)
PROJECTION = orthogonal_features(16, WIDTH, seed=0)
FORMS = {
    "flow": flow_attention,
    "softmax": softmax_attention,
    "performer": lambda *a: performer_attention(*a, PROJECTION),
}


def packed(segments=4):
    return CellGroups(jnp.asarray(MASK), jnp.asarray(SEGMENT), segments, 1)


def arrays(number=3, width=WIDTH, seed=0):
    shape = (number, 1, CELLS, HEADS, width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", FORMS)
def test_samples_of_a_row_do_not_see_each_other(kind):
    query, key, value = arrays()
    got = np.asarray(jax.jit(FORMS[kind])(query, key, value, packed()))
    start = 0
    alone = jax.jit(FORMS[kind])
    for length in LENGTHS:
        part = slice(start, start + length)
        rest = ((0, 0), (0, CELLS - length), (0, 0), (0, 0))
        own = [np.pad(x[:, part], rest, constant_values=9.0) for x in (query, key, value)]
        expected = alone(*own, CellGroups(jnp.asarray(np.arange(CELLS)[None] < length)))
        np.testing.assert_allclose(got[:, part], expected[:, :length], rtol=2e-5, atol=2e-6)
        start += length
    assert np.isfinite(got).all()


def test_sums_over_samples_equal_loops():
    values, other = arrays(2)
    weights = np.random.default_rng(1).random((1, CELLS, HEADS)).astype(np.float32)
    groups = packed()
    members = [np.flatnonzero(MASK[0] & (SEGMENT[0] == s)) for s in range(4)]
    total = np.stack([values[0, m].sum(0) for m in members])
    np.testing.assert_allclose(groups.total(values)[0], total, atol=1e-5)
    weighted = np.stack([(values[0, m] * weights[0, m, :, None]).sum(0) for m in members])
    np.testing.assert_allclose(groups.weighted_total(values, weights)[0], weighted, atol=1e-5)
    outer = np.stack([np.einsum("chi,cho->hio", values[0, m], other[0, m]) for m in members])
    np.testing.assert_allclose(groups.outer_total(values, other)[0], outer, atol=1e-5)
    assert groups.outer_total(values, other).shape == (1, 4, HEADS, WIDTH, WIDTH)
    for cell in range(sum(LENGTHS)):
        segment = SEGMENT[0, cell]
        np.testing.assert_allclose(groups.of_cell(total[None])[0, cell], total[segment], atol=1e-5)
        dot = (values[0, cell] * total[segment]).sum(-1)
        np.testing.assert_allclose(groups.dot(values, total[None])[0, cell], dot, atol=1e-5)
        applied = np.einsum("hi,hio->ho", other[0, cell], outer[segment])
        np.testing.assert_allclose(groups.apply(other, outer[None])[0, cell], applied, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(groups.one_hot())[0, ~MASK[0]], 0)


def test_sums_over_one_sample_equal_loops():
    values, other = arrays(2)
    weights = np.random.default_rng(1).random((1, CELLS, HEADS)).astype(np.float32)
    groups = CellGroups(jnp.asarray(MASK))
    assert (groups.segments, groups.pieces) == (1, 1)
    kept, seen = values[0, MASK[0]], other[0, MASK[0]]
    weighted = (kept * weights[0, MASK[0], :, None]).sum(0)
    assert groups.weighted_total(values, weights).shape == (1, 1, HEADS, WIDTH)
    np.testing.assert_allclose(groups.weighted_total(values, weights)[0, 0], weighted, atol=1e-5)
    np.testing.assert_allclose(groups.total(values)[0, 0], kept.sum(0), atol=1e-5)
    outer = np.einsum("chi,cho->hio", kept, seen)
    np.testing.assert_allclose(groups.outer_total(values, other)[0, 0], outer, atol=1e-5)
    applied = np.einsum("chi,hio->cho", other[0], outer)
    np.testing.assert_allclose(groups.apply(other, outer[None, None])[0], applied, atol=1e-4)
    dot = (values[0] * kept.sum(0)).sum(-1)
    np.testing.assert_allclose(groups.dot(values, kept.sum(0)[None, None])[0], dot, atol=1e-5)


def test_nonzero_replaces_zeros_alone():
    np.testing.assert_array_equal(nonzero(jnp.asarray([0.0, 0.25, 3.0])), [1.0, 0.25, 3.0])


def test_attention_weights_ignore_padding_that_would_win():
    query, key = arrays(2)
    key[0, ~MASK[0]] = 50 * query[0, :1]
    weights = softmax_weights(query, key, CellGroups(jnp.asarray(MASK)), jnp.asarray([0, 5]))
    scores = np.einsum("qhd,khd->hqk", query[0, [0, 5]], key[0, MASK[0]]) / np.sqrt(WIDTH)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[0, ..., : sum(LENGTHS)], expected, rtol=1e-4)
    np.testing.assert_array_equal(weights[0, ..., sum(LENGTHS) :], 0)


def test_results_are_float32_whatever_comes_in():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    for form in FORMS.values():
        assert form(query, key, value, CellGroups(jnp.asarray(MASK))).dtype == jnp.float32


def test_the_number_of_random_features_of_a_layer(monkeypatch):
    """Without a number, width times its logarithm; a head of one channel has one feature."""
    seen = []

    def features(number, width, seed):
        seen.append((number, width, seed))
        return orthogonal_features(number, width, seed)

    monkeypatch.setattr("cellplm_jax.model.attention.orthogonal_features", features)
    groups = CellGroups(jnp.ones((1, 3), bool))
    for encoder, layer in (
        ({"heads": 4}, 0),
        ({"heads": 32}, 1),
        ({"heads": 4, "random_features": 5}, 2),
        ({"heads": 16}, 3),
    ):
        module = CellAttention(tiny(encoder={"kind": "performer", **encoder}), layer)
        shapes_of(module, np.ones((1, 3, 32), np.float32), groups, train=False)
    assert seen == [(16, 8, 0), (1, 1, 1), (5, 8, 2), (1, 2, 3)]


def test_the_output_keeps_the_precision_of_the_input():
    module = CellAttention(tiny())
    hidden = jnp.ones((1, 3, 32), jnp.bfloat16)
    groups = CellGroups(jnp.ones((1, 3), bool))
    params = random_params(shapes_of(module, hidden, groups, train=False))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert module.apply({"params": narrow}, hidden, groups, train=False).dtype == jnp.bfloat16
