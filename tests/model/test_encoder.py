"""Encoders of every kind: numpy reference, padding, permutation, one cell, an empty sample, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from cellplm_jax.model.attention import CellGroups
from cellplm_jax.model.encoder import Encoder
from tests.model.common import (
    HIDDEN,
    apply,
    float64,
    hidden_block,
    layer_norm,
    linear,
    random_params,
    shapes_of,
    sigmoid,
    softmax,
    tiny,
)

KINDS = ["flow", "softmax", "performer", "mlp", "residual_mlp", "none"]
MIXING = ["flow", "softmax", "performer"]
CELLS = 8
MASK = np.arange(CELLS)[None] < np.array([[8], [5], [1], [0]])


def states(seed=0, cells=CELLS, samples=4):
    return np.random.default_rng(seed).standard_normal((samples, cells, HIDDEN)).astype(np.float32)


def encoder(kind, **changes):
    layers = 3 if kind == "residual_mlp" else 2
    module = Encoder(tiny(encoder={"kind": kind, "layers": layers}, **changes))
    params = random_params(shapes_of(module, states(), CellGroups(MASK), train=False))
    return module, params


def run(kind, hidden, mask=MASK, train=False, **keywords):
    module, params = encoder(kind)
    return np.asarray(apply(module, params, hidden, CellGroups(mask), train=train, **keywords))


def flow_of_a_head(query, key, value):
    """Flow attention of one head in matrix form; test_attention.py has it equation by equation."""
    query, key = sigmoid(query), sigmoid(key)
    incoming = query @ key.sum(0)
    outgoing = key @ query.sum(0)
    allocation = sigmoid(query @ (key / outgoing[:, None]).sum(0))
    competition = softmax(np.clip(key @ (query / incoming[:, None]).sum(0), -1, 1)) * len(key)
    context = key.T @ (value * competition[:, None])
    return (query / incoming[:, None]) @ context * allocation[:, None]


def softmax_of_a_head(query, key, value):
    return softmax(query @ key.T / np.sqrt(query.shape[1])) @ value


def transformer(x, params, heads, attention):
    """A pre-norm transformer over one unpadded sample [cells, hidden]."""
    for name in sorted(params):
        p = params[name]
        normed = layer_norm(x, p["attention_norm"])
        query, key, value = (
            linear(normed, p["attention"][n]).reshape(len(x), heads, -1)
            for n in ("query", "key", "value")
        )
        mixed = [attention(query[:, h], key[:, h], value[:, h]) for h in range(heads)]
        x = x + linear(np.concatenate(mixed, -1), p["attention"]["out"])
        inner = linear(layer_norm(x, p["feedforward_norm"]), p["feedforward_in"])
        inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
        x = x + linear(inner, p["feedforward_out"])
    return x


# "performer" is an estimate; its formula is tested in test_attention.py.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "performer"])
def test_equals_plain_numpy_on_unpadded_samples(kind):
    got = run(kind, states())
    p = float64(encoder(kind)[1])
    for sample, length in enumerate(MASK.sum(1)[:3]):
        x = states()[sample, :length].astype(np.float64)
        if kind in MIXING:
            attention = flow_of_a_head if kind == "flow" else softmax_of_a_head
            x = transformer(x, p, 4, attention)
        elif kind == "mlp":
            for layer in range(2):
                x = x + hidden_block(x, p[f"layer_{layer}"])
        elif kind == "residual_mlp":
            first = hidden_block(x, p["layer_0"])
            second = hidden_block(first, p["layer_1"])
            x = hidden_block(np.concatenate([first, second], -1), p["out"])
        np.testing.assert_allclose(got[sample, :length], x, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_changes_a_number(kind):
    expected = run(kind, states())
    changed = np.where(MASK[..., None], states(), 50 * states(seed=1))
    got = run(kind, changed)
    np.testing.assert_allclose(got[MASK], expected[MASK], rtol=1e-5, atol=1e-5)


def test_a_longer_axis_never_changes_a_number():
    kind = "flow"  # the other kinds: test_attention.py
    expected = run(kind, states())
    longer = np.concatenate([states(), 20 * states(seed=1, cells=3)], axis=1)
    got = run(kind, longer, np.pad(MASK, ((0, 0), (0, 3))))
    np.testing.assert_allclose(got[:, :CELLS][MASK], expected[MASK], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_cells_permutes_outputs(kind):
    order = np.random.default_rng(4).permutation(CELLS)
    expected = run(kind, states())[:, order]
    got = run(kind, states()[:, order], MASK[:, order])
    valid = MASK[:, order]
    np.testing.assert_allclose(got[valid], expected[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_sample_leaves_the_others_alone(kind):
    got = run(kind, states())
    assert np.isfinite(got).all()
    everyone = np.ones_like(MASK)
    everyone[:2] = MASK[:2]
    with_cells = run(kind, states(), everyone)
    np.testing.assert_allclose(got[:2][MASK[:2]], with_cells[:2][MASK[:2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_inform_one_another_only_where_the_encoder_mixes_and_only_in_their_sample(kind):
    before = run(kind, states())
    hidden = states()
    # Not a constant shift: the layer norm would remove it.
    hidden[0, 3] += 3 * np.random.default_rng(8).standard_normal(HIDDEN)
    after = run(kind, hidden)
    moved = np.abs(after - before).max(-1)
    assert moved[0, 3] > 0.1
    others = np.delete(moved[0], 3)
    if kind in MIXING:
        assert (others > 1e-4).all()
    else:
        np.testing.assert_array_equal(others, 0.0)
    np.testing.assert_array_equal(moved[1:3], 0.0)


@pytest.mark.parametrize("kind", [*MIXING, "residual_mlp"])
def test_gradients_are_finite_with_padding_and_an_empty_sample(kind):
    module, params = encoder(kind)

    def loss(params, hidden):
        out = module.apply({"params": params}, hidden, CellGroups(MASK), train=False)
        return jnp.sum(jnp.where(MASK[..., None], out, 0.0) ** 2)

    gradient, of_hidden = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, states())
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(np.asarray(leaf)).all()
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)]
    assert np.median(sizes) > 1e-3
    of_hidden = np.asarray(of_hidden)
    assert np.isfinite(of_hidden).all()
    np.testing.assert_array_equal(of_hidden[~MASK], 0.0)


def test_none_is_the_identity_without_parameters():
    assert encoder("none")[1] == {}
    np.testing.assert_array_equal(run("none", states()), states())


@pytest.mark.parametrize("kind", ["flow", "residual_mlp"])
def test_dropout_needs_its_stream_only_while_training(kind):
    noisy, again, other = (
        run(kind, states(), train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(noisy, again)
    assert np.abs(noisy - other)[MASK].max() > 0.1
    assert np.abs(noisy - run(kind, states()))[MASK].max() > 0.1


def value_and_gradients(recompute, mask=MASK, width=HIDDEN, layers=2):
    """Return a function of (params, hidden) and arguments for it; dropout is on."""
    config = tiny(hidden=width, encoder={"kind": "flow", "layers": layers})
    module = Encoder(config, rematerialize=recompute)
    groups, hidden = CellGroups(jnp.asarray(mask)), jnp.ones((*mask.shape, width))
    params = random_params(shapes_of(module, hidden, groups, train=False))

    def loss(params, hidden):
        rngs = {"dropout": jax.random.key(3)}
        out = module.apply({"params": params}, hidden, groups, train=True, rngs=rngs)
        return (jnp.sin(out) * groups.cell_mask[..., None]).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), params


def test_what_is_computed_again_changes_no_number():
    hidden = jnp.asarray(states())
    (kept, params), (again, _) = (value_and_gradients(recompute) for recompute in (False, True))
    wanted, found = kept(params, hidden), again(params, hidden)
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)


def test_computing_again_keeps_one_array_a_layer():
    mask, layers = np.ones((1, 256), bool), 4

    def size(recompute):
        function, params = value_and_gradients(recompute, mask=mask, width=128, layers=layers)
        hidden = jnp.zeros((1, 256, 128))
        compiled = function.lower(params, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes / hidden.nbytes

    kept, again = size(False), size(True)
    # What a layer keeps is a dozen times its input; computing again, one layer at a time has that.
    assert again < kept - 8 * (layers - 1)
