"""Decoders of every kind against plain numpy, with covariates and clipping."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.decoder import Decoder
from tests.model.common import (
    GENES,
    apply,
    float64,
    group_norm,
    hidden_block,
    linear,
    make_batch,
    prelu,
    random_counts,
    random_params,
    shapes_of,
    tiny,
)

KINDS = ["negative_binomial", "zero_inflated_negative_binomial", "gaussian", "residual"]
LATENT = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
ROWS = {"batches": 4, "datasets": 3, "platforms": 2}
INDEX = {
    "batch": [np.array([0, 3, -1, 2, 1], np.int32), np.array([1, -5, 0], np.int32)],
    "dataset": [np.array([2, 0, 1, -1, 0], np.int32), np.array([0, 1, 2], np.int32)],
    "platform": [np.array([0, 1, 1, 0, -1], np.int32), np.array([1, 1, 0], np.int32)],
}


def batch_of(fields=None):
    return make_batch([random_counts(5), random_counts(3, seed=1)], fields=fields)


def decoder(kind, layers=3, **changes):
    module = Decoder(tiny(decoder={"kind": kind, "layers": layers} | changes))
    params = random_params(shapes_of(module, LATENT, batch_of(INDEX), train=False))
    return module, params


def covariate_embedding(p, index):
    rows = np.where((index < 0)[..., None], p["table"].mean(0), p["table"][np.maximum(index, 0)])
    return group_norm(prelu(rows, p["prelu"]), p["norm"])


def reference(kind, p, batch, layers=3):
    x, history = LATENT.astype(np.float64), []
    for layer in range(layers - 1):
        x = hidden_block(x, p[f"layer_{layer}"])
        for name in ("batch", "dataset", "platform"):
            if f"{name}_{layer}" in p:
                index = getattr(batch, name)
                index = np.full((2, 5), -1) if index is None else np.asarray(index)
                x = x + covariate_embedding(p[f"{name}_{layer}"], index)
        history.append(x)
    if kind == "gaussian":
        return {"mean": linear(x, p["mean"])}
    if kind == "residual":
        return {"mean": linear(np.concatenate(history, -1), p["mean"])}
    x = np.maximum(linear(x, p["bottleneck"]), 0)
    expected = {
        "mean": np.clip(np.exp(linear(x, p["log_mean"])), 1e-5, 1e6),
        "dispersion": np.clip(np.exp(p["log_dispersion"]), 1e-4, 1e4),
    }
    if kind == "zero_inflated_negative_binomial":
        expected["zero_logits"] = linear(x, p["zero_logits"])
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_equal_plain_numpy_with_covariates(kind):
    module, params = decoder(kind, **ROWS)
    batch = batch_of(INDEX)
    got = apply(module, params, LATENT, batch, train=False)
    expected = reference(kind, float64(params), batch)
    for name in ("mean", "dispersion", "zero_logits"):
        if name in expected:
            np.testing.assert_allclose(
                getattr(got, name), expected[name], rtol=1e-3, atol=1e-4, err_msg=name
            )
        else:
            assert getattr(got, name) is None
    assert got.mean.shape == (2, 5, GENES)


def test_absent_covariates_take_the_mean_of_the_rows():
    module, params = decoder("negative_binomial", **ROWS)
    absent = apply(module, params, LATENT, batch_of(), train=False)
    unknown = {name: [np.full_like(x, -1) for x in index] for name, index in INDEX.items()}
    negative = batch_of(unknown).replace(
        **{name: jnp.full((2, 5), -1, jnp.int32) for name in unknown}
    )
    np.testing.assert_allclose(
        absent.mean, apply(module, params, LATENT, negative, train=False).mean, rtol=1e-5
    )
    expected = reference("negative_binomial", float64(params), batch_of())
    np.testing.assert_allclose(absent.mean, expected["mean"], rtol=1e-3)


def test_without_covariate_rows_labels_change_nothing():
    module, params = decoder("negative_binomial")
    assert not {name for name in params if name.startswith(("batch", "dataset", "platform"))}
    with_labels = apply(module, params, LATENT, batch_of(INDEX), train=False)
    without = apply(module, params, LATENT, batch_of(), train=False)
    np.testing.assert_allclose(with_labels.mean, without.mean, rtol=1e-6)


def test_one_layer_decodes_from_the_latent_directly():
    module, params = decoder("negative_binomial", layers=1)
    assert set(params) == {"bottleneck", "log_mean", "log_dispersion"}
    got = apply(module, params, LATENT, batch_of(), train=False)
    expected = reference("negative_binomial", float64(params), batch_of(), layers=1)
    np.testing.assert_allclose(got.mean, expected["mean"], rtol=1e-3)


def test_mean_and_dispersion_stay_in_their_ranges():
    module, params = decoder("negative_binomial")
    extreme = np.linspace(-60, 60, GENES).astype(np.float32)
    params["log_dispersion"] = jnp.asarray(extreme)
    params["log_mean"]["bias"] = jnp.asarray(extreme)
    got = apply(module, params, LATENT, batch_of(), train=False)
    mean, dispersion = np.asarray(got.mean), np.asarray(got.dispersion)
    assert mean.min() == pytest.approx(1e-5, rel=1e-5)
    assert mean.max() == pytest.approx(1e6, rel=1e-5)
    np.testing.assert_allclose(dispersion, np.clip(np.exp(extreme), 1e-4, 1e4), rtol=1e-5)


def test_gradients_stay_finite_where_the_exponential_overflows():
    # The gradient of clip(exp(x)) is 0 * inf = NaN beyond x = 88.7, where exp overflows in float32.
    module, params = decoder("negative_binomial")
    bias = np.zeros(GENES, np.float32)
    bias[:2] = 150.0, -150.0
    params["log_mean"]["bias"] = jnp.asarray(bias)
    params["log_dispersion"] = jnp.asarray(bias)

    def loss(params):
        out = module.apply({"params": params}, LATENT, batch_of(), train=False)
        return jnp.log(out.mean).mean() + jnp.log(out.dispersion).mean()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(np.asarray(leaf)).all()


def test_dropout_acts_while_training_alone():
    module, params = decoder("negative_binomial", layers=2)
    calm = apply(module, params, LATENT, batch_of(), train=False)
    noisy, again = (
        apply(module, params, LATENT, batch_of(), train=True, rngs={"dropout": jax.random.key(0)})
        for _ in range(2)
    )
    np.testing.assert_array_equal(noisy.mean, again.mean)
    assert np.abs(np.log(np.asarray(noisy.mean)) - np.log(np.asarray(calm.mean))).max() > 0.05
