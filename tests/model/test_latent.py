"""Latent layers of every kind, and the KL terms against direct formulas, quadrature and Monte-Carlo estimates."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cellplm_jax.batch import LatentNoise
from cellplm_jax.model.latent import (
    Latent,
    categorical_kl_from_uniform,
    mixture_kl,
    normal_kl,
    normal_log_density,
    reverse_gradient,
)
from tests.model.common import (
    HIDDEN,
    apply,
    float64,
    linear,
    random_params,
    softmax,
    tiny,
)

SIZE, CLUSTERS = 8, 3
STATES = np.random.default_rng(0).standard_normal((2, 5, HIDDEN)).astype(np.float32)
KINDS = {
    "paper": {"kind": "gaussian_mixture", "inference": "paper"},
    "released": {"kind": "gaussian_mixture", "inference": "released"},
    "gaussian": {"kind": "gaussian"},
    "deterministic": {"kind": "deterministic"},
    "none": {"kind": "none"},
}
RANDOM = ["paper", "released", "gaussian"]


def latent(name, **changes):
    adversarial = changes.get("adversarial_weight", 0) > 0
    module = Latent(
        tiny(latent=KINDS[name] | changes, decoder={"batches": 4 if adversarial else 0})
    )
    streams = {"params": jax.random.key(0), "latent": jax.random.key(1)}
    shapes = jax.eval_shape(lambda: module.init(streams, STATES, train=False)).get("params", {})
    return module, random_params(shapes)


def noise(seed=0):
    generator = np.random.default_rng(seed)
    return LatentNoise(
        gaussian=jnp.asarray(generator.standard_normal((2, 5, SIZE)), jnp.float32),
        gumbel=jnp.asarray(generator.gumbel(size=(2, 5, CLUSTERS)), jnp.float32),
    )


def infer(name, *, train=False, **keywords):
    module, params = latent(name)
    return apply(module, params, STATES, train=train, **keywords), float64(params)


def gaussians(seed=0, cells=6, clusters=4, size=5):
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((cells, size)),
        np.exp(generator.standard_normal((cells, size))),
        generator.standard_normal((clusters, size)),
        np.exp(generator.standard_normal((clusters, size))),
    )


def kl_formula(mean, variance, prior_mean, prior_variance):
    """KL of diagonal Gaussians in the textbook form, with standard deviations."""
    sigma, prior_sigma = np.sqrt(variance), np.sqrt(prior_variance)
    return (
        np.log(prior_sigma / sigma)
        + (sigma**2 + (mean - prior_mean) ** 2) / (2 * prior_sigma**2)
        - 0.5
    ).sum(-1)


def test_normal_log_density_equals_scipy():
    x, variance, mean, _ = gaussians(clusters=6)
    expected = stats.norm(mean, np.sqrt(variance)).logpdf(x).sum(-1)
    np.testing.assert_allclose(normal_log_density(x, mean, variance), expected, rtol=1e-5)


def test_normal_kl_equals_the_formula():
    mean, variance, prior_mean, prior_variance = gaussians(clusters=6)
    expected = kl_formula(mean, variance, prior_mean, prior_variance)
    got = normal_kl(*(jnp.asarray(x, jnp.float32) for x in gaussians(clusters=6)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(normal_kl(mean, variance, mean, variance), 0.0, atol=1e-6)


def test_mixture_kl_equals_the_formula_and_a_monte_carlo_estimate():
    mean, variance, prior_mean, prior_variance = gaussians()
    got = np.asarray(mixture_kl(*(jnp.asarray(x, jnp.float32) for x in gaussians())))
    assert got.shape == (6, 4)
    expected = kl_formula(mean[:, None], variance[:, None], prior_mean, prior_variance)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    draws = 40_000
    z = np.random.default_rng(1).standard_normal((draws, 6, 5)) * np.sqrt(variance) + mean
    log_q = stats.norm(mean, np.sqrt(variance)).logpdf(z).sum(-1)
    for cluster in range(4):
        prior = stats.norm(prior_mean[cluster], np.sqrt(prior_variance[cluster]))
        sampled = log_q - prior.logpdf(z).sum(-1)
        error = sampled.std(0) / np.sqrt(draws)
        assert (np.abs(sampled.mean(0) - got[:, cluster]) < 5 * error).all()


def test_mixture_kl_is_never_negative_and_zero_at_the_component():
    mean, variance, _, _ = gaussians(cells=6, size=64)
    got = np.asarray(mixture_kl(*(jnp.asarray(x, jnp.float32) for x in (mean, variance) * 2)))
    np.testing.assert_allclose(np.diag(got), 0.0, atol=1e-3)
    off_diagonal = got + 1e9 * np.eye(6)
    assert off_diagonal.min() > 1.0


def test_mixture_kl_far_from_the_origin_keeps_its_digits():
    # Expanding the square loses digits when means are large against their distance: still within .01 nats at 512
    # dimensions with means of 3 standard deviations and components as narrow as the layer allows near a cell.
    generator = np.random.default_rng(0)
    mean = 3 * generator.standard_normal((4, 512))
    variance = np.full((4, 512), 0.05)
    prior_mean = mean[:2] + 0.05 * generator.standard_normal((2, 512))
    prior_variance = np.full((2, 512), 0.05)
    arguments = (mean, variance, prior_mean, prior_variance)
    got = np.asarray(mixture_kl(*(jnp.asarray(x, jnp.float32) for x in arguments)))
    expected = kl_formula(mean[:, None], variance[:, None], prior_mean, prior_variance)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0.02)


def test_categorical_kl_lies_between_zero_and_log_clusters():
    logits = (
        np.random.default_rng(0).standard_normal((50, 16)) * np.geomspace(1e-3, 1e3, 50)[:, None]
    )
    got = np.asarray(categorical_kl_from_uniform(jnp.asarray(logits, jnp.float32)))
    p = softmax(logits)
    expected = np.where(p > 0, p * np.log(np.maximum(p, 1e-300) * 16), 0).sum(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6)
    assert got.min() > -1e-6
    assert got.max() <= math.log(16) + 1e-6
    assert categorical_kl_from_uniform(jnp.zeros(16)) == pytest.approx(0, abs=1e-6)
    gradient = jax.grad(lambda x: categorical_kl_from_uniform(x).sum())(jnp.asarray(logits))
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("name", KINDS)
def test_inference_needs_no_random_numbers_and_returns_the_mean(name):
    first, params = infer(name)
    np.testing.assert_array_equal(first.z, first.mean)
    np.testing.assert_array_equal(first.z, infer(name)[0].z)
    # Noise handed over by mistake changes nothing.
    np.testing.assert_array_equal(first.z, infer(name, noise=noise())[0].z)
    assert first.z.shape == (2, 5, HIDDEN if name == "none" else SIZE)
    assert first.batch_logits is None
    if name == "none":
        assert params == {}
        np.testing.assert_array_equal(first.z, STATES)
    if name == "deterministic":
        np.testing.assert_allclose(first.z, linear(STATES, params["linear"]), rtol=1e-4, atol=1e-5)
    if name in ("none", "deterministic"):
        assert first.kl_latent is None
        assert first.kl_cluster is None
        assert first.variance is None


def test_every_cluster_of_every_cell_has_its_own_noise():
    module, params = latent("paper")
    streams = {"latent": jax.random.key(0)}
    drawn = module.apply({"params": params}, (2, 5), rngs=streams, method="_draw_noise")
    for values, size in ((drawn.gaussian, SIZE), (drawn.gumbel, CLUSTERS)):
        assert values.shape == (2, 5, size)
        assert len(np.unique(values)) == values.size


@pytest.mark.parametrize("name", RANDOM)
def test_training_draws_from_the_given_noise_or_the_latent_stream(name):
    given, params = infer(name, train=True, noise=noise())
    variance = np.asarray(given.variance, np.float64)
    expected = np.asarray(given.mean) + np.sqrt(variance) * np.asarray(noise().gaussian)
    np.testing.assert_allclose(given.z, expected, rtol=1e-4, atol=1e-5)
    module, params = latent(name)
    keys = [{"latent": jax.random.key(k)} for k in (0, 0, 1)]
    first, again, other = (apply(module, params, STATES, train=True, rngs=k).z for k in keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(other)).min() > 0


def test_the_variance_starts_small():
    module, _ = latent("gaussian")
    params = module.init(jax.random.key(0), STATES, train=False)["params"]
    np.testing.assert_array_equal(params["log_variance"]["bias"], -4)


def test_gaussian_posterior_and_kl():
    got, params = infer("gaussian", train=True, noise=noise())
    np.testing.assert_allclose(got.mean, linear(STATES, params["mean"]), rtol=1e-4, atol=1e-5)
    raw = np.clip(linear(STATES, params["log_variance"]), -5, 5)
    np.testing.assert_allclose(got.variance, np.exp(raw) + 1e-4, rtol=1e-4)
    expected = kl_formula(np.asarray(got.mean), np.asarray(got.variance), 0.0, 1.0)
    np.testing.assert_allclose(got.kl_latent, expected, rtol=1e-4)
    assert (np.asarray(got.kl_latent) >= 0).all()
    assert got.kl_cluster is None


@pytest.mark.parametrize("train", [True, False])
def test_paper_mixture_is_the_elbo_of_the_paper(train):
    got, params = infer("paper", train=train, noise=noise() if train else None)
    np.testing.assert_allclose(got.mean, linear(STATES, params["mean"]), rtol=1e-4, atol=1e-5)
    raw = np.clip(linear(STATES, params["log_variance"]), -5, 5)
    np.testing.assert_allclose(got.variance, np.exp(raw) + 1e-4, rtol=1e-4)
    z = np.asarray(got.z, np.float64)
    weights = softmax(linear(z, params["cluster_logits"]))
    np.testing.assert_allclose(got.cluster_weights, weights, rtol=1e-3, atol=1e-5)
    prior_variance = np.exp(np.clip(params["prior_log_variance"], -5, 5)) + 1e-4
    assert params["prior_mean"].shape == (CLUSTERS, SIZE)
    np.testing.assert_allclose(got.prior_mean, params["prior_mean"], rtol=1e-6)
    np.testing.assert_allclose(got.prior_variance, prior_variance, rtol=1e-5)
    per_cluster = kl_formula(
        np.asarray(got.mean, np.float64)[..., None, :],
        np.asarray(got.variance, np.float64)[..., None, :],
        params["prior_mean"],
        prior_variance,
    )
    np.testing.assert_allclose(got.kl_latent, (weights * per_cluster).sum(-1), rtol=1e-3)
    entropy = -(weights * np.log(weights)).sum(-1)
    np.testing.assert_allclose(got.kl_cluster, math.log(CLUSTERS) - entropy, rtol=1e-3, atol=1e-5)
    assert (np.asarray(got.kl_latent) >= 0).all()
    assert (np.asarray(got.kl_cluster) >= -1e-6).all()
    assert (np.asarray(got.kl_cluster) <= math.log(CLUSTERS) + 1e-6).all()


def softplus(x):
    return np.logaddexp(0, x)


@pytest.mark.parametrize("train", [True, False])
def test_released_mixture_follows_the_released_network(train):
    got, p = infer("released", train=train, noise=noise() if train else None)
    logits = linear(STATES, p["cluster_logits"])
    np.testing.assert_allclose(got.cluster_logits, logits, rtol=1e-4, atol=1e-5)
    if train:
        weights = softmax(logits + np.asarray(noise().gumbel))
    else:
        weights = np.eye(CLUSTERS)[logits.argmax(-1)]
    np.testing.assert_allclose(got.cluster_weights, weights, rtol=1e-3, atol=1e-6)
    assert p["inference"]["kernel"].shape == (HIDDEN + CLUSTERS, 512)
    inner = np.maximum(linear(np.concatenate([STATES, weights], -1), p["inference"]), 0)
    mean, variance = linear(inner, p["mean"]), softplus(linear(inner, p["variance"]))
    prior_mean = linear(weights, p["prior_mean"])
    prior_variance = softplus(linear(weights, p["prior_variance"]))
    np.testing.assert_allclose(got.mean, mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got.variance, variance, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got.prior_mean, prior_mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got.prior_variance, prior_variance, rtol=1e-3, atol=1e-5)
    z = np.asarray(got.z, np.float64)
    expected = stats.norm(mean, np.sqrt(variance)).logpdf(z).sum(-1)
    expected = expected - stats.norm(prior_mean, np.sqrt(prior_variance)).logpdf(z).sum(-1)
    np.testing.assert_allclose(got.kl_latent, expected, rtol=2e-3, atol=5e-3)
    q = softmax(logits)
    np.testing.assert_allclose(
        got.kl_cluster, (q * np.log(q * CLUSTERS)).sum(-1), rtol=1e-3, atol=1e-5
    )
    assert (np.asarray(got.kl_cluster) <= math.log(CLUSTERS) + 1e-6).all()


def test_the_one_sample_estimate_of_the_released_mixture_averages_to_its_kl():
    module, params = latent("released")
    fixed_gumbel = noise().gumbel

    def draw(key):
        gaussian = jax.random.normal(key, (2, 5, SIZE))
        random = LatentNoise(gaussian=gaussian, gumbel=fixed_gumbel)
        return module.apply({"params": params}, STATES, train=True, noise=random)

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
    estimates = np.asarray(drawn.kl_latent, np.float64)
    first = jax.tree.map(lambda x: np.asarray(x[0], np.float64), drawn)
    expected = kl_formula(first.mean, first.variance, first.prior_mean, first.prior_variance)
    error = estimates.std(0) / np.sqrt(len(estimates))
    assert (np.abs(estimates.mean(0) - expected) < 5 * error + 1e-3).all()


def test_a_low_temperature_makes_the_component_hard():
    hot, cold = (latent("released", temperature=t)[0] for t in (5.0, 0.01))
    params = latent("released")[1]
    keywords = {"train": True, "noise": noise()}
    soft = np.asarray(apply(hot, params, STATES, **keywords).cluster_weights)
    hard = np.asarray(apply(cold, params, STATES, **keywords).cluster_weights)
    assert hard.max(-1).min() > 0.95
    assert soft.max(-1).max() < hard.max(-1).min()
    np.testing.assert_array_equal(hard.argmax(-1), soft.argmax(-1))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_each_cell_is_inferred_alone(name, train):
    module, params = latent(name)
    order = np.random.default_rng(0).permutation(5)
    random = noise() if train else None
    shuffled = jax.tree.map(lambda x: x[:, order], random)
    one = apply(module, params, STATES, train=train, noise=random)
    two = apply(module, params, STATES[:, order], train=train, noise=shuffled)
    for field in ("z", "kl_latent", "kl_cluster"):
        if getattr(one, field) is not None:
            np.testing.assert_allclose(
                np.asarray(getattr(one, field))[:, order], getattr(two, field), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", RANDOM)
def test_gradients_stay_finite_for_extreme_encoder_outputs(name):
    module, params = latent(name)

    def loss(params, hidden):
        out = module.apply({"params": params}, hidden, train=True, noise=noise())
        cluster = 0.0 if out.kl_cluster is None else out.kl_cluster.sum()
        return out.z.sum() + out.kl_latent.sum() + cluster

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for scale in (0.0, 1.0, 30.0):
        for leaf in jax.tree.leaves(gradient(params, STATES * scale)):
            assert np.isfinite(np.asarray(leaf)).all()


def test_every_parameter_of_the_paper_mixture_is_trained_by_its_kl():
    module, params = latent("paper")

    def loss(params):
        out = module.apply({"params": params}, STATES, train=True, noise=noise())
        return out.kl_latent.sum() + out.kl_cluster.sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.abs(np.asarray(leaf)).max() > 1e-3


def test_reverse_gradient_is_the_identity_with_a_negated_gradient():
    x = jnp.asarray([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(reverse_gradient(x), x)
    gradient = jax.grad(lambda x: jnp.sum(reverse_gradient(x) ** 2))(x)
    np.testing.assert_array_equal(gradient, -2 * x)


def test_the_discriminator_learns_while_the_latent_unlearns():
    module, params = latent("deterministic", adversarial_weight=0.5)
    assert params["discriminator"]["hidden"]["kernel"].shape == (SIZE, 64)
    p = float64(params)
    got = apply(module, params, STATES, train=True)
    hidden = linear(np.asarray(got.z, np.float64), p["discriminator"]["hidden"])
    hidden = np.where(hidden > 0, hidden, hidden * p["discriminator"]["prelu"]["negative_slope"])
    expected = linear(hidden, p["discriminator"]["logits"])
    assert got.batch_logits.shape == (2, 5, 4)
    np.testing.assert_allclose(got.batch_logits, expected, rtol=1e-3, atol=1e-4)
    assert apply(module, params, STATES, train=False).batch_logits is None

    def loss(params):
        logits = module.apply({"params": params}, STATES, train=True).batch_logits
        return jnp.mean(logits[..., 0] - jax.nn.logsumexp(logits, -1))

    def numpy_loss(p):
        z = linear(STATES.astype(np.float64), p["linear"])
        inner = linear(z, p["discriminator"]["hidden"])
        inner = np.where(inner > 0, inner, inner * p["discriminator"]["prelu"]["negative_slope"])
        logits = linear(inner, p["discriminator"]["logits"])
        return np.mean(logits[..., 0] - np.log(np.exp(logits).sum(-1)))

    gradient = jax.jit(jax.grad(loss))(params)
    for path, sign in ((("linear",), -1), (("discriminator", "hidden"), 1)):
        moved, part, slope = jax.tree.map(np.copy, p), None, gradient
        part = moved
        for key in path:
            part, slope = part[key], slope[key]
        step = 1e-6
        part["bias"][1] += step
        finite_difference = (numpy_loss(moved) - numpy_loss(p)) / step
        assert abs(finite_difference) > 1e-4
        assert float(slope["bias"][1]) == pytest.approx(sign * finite_difference, rel=1e-2)


@pytest.mark.parametrize("kind", ["deterministic", "gaussian"])
def test_beside_a_trunk_the_latent_of_every_cell_has_unit_size(kind):
    embedder = {"input_transform": "library_log1p"}
    module = Latent(tiny(latent={"kind": kind}, trunk="projection", embedder=embedder))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), STATES, train=False))["params"]
    params = random_params(shapes)
    got = np.asarray(apply(module, params, STATES, train=False).mean)
    np.testing.assert_allclose((got**2).mean(-1), 1.0, rtol=1e-5)
    plain = linear(STATES, float64(params)["linear" if kind == "deterministic" else "mean"])
    expected = plain / np.sqrt((plain**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    nothing = apply(module, jax.tree.map(jnp.zeros_like, params), STATES, train=False).mean
    np.testing.assert_array_equal(nothing, 0)
