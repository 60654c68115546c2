"""Latent distributions and the mixture-of-Gaussians ELBO terms.

Two readings of the mixture are kept side by side. ``"paper"`` (section 4.1): q(z|x) is Gaussian, q(y|z) categorical,
and

    KL = sum_y q(y|z) KL(q(z|x) || p(z|y)) + KL(q(y|z) || p(y)),

the first in closed form. ``"released"`` (``CellPLM/latent/autoencoders.py``): q(y|x) is a Gumbel-softmax of the encoder
output, q(z|x,y) a small network of both, and the Gaussian term is the one-sample estimate log q(z|x,y) - log p(z|y).
Both are deterministic at inference (the released code keeps drawing Gumbel noise): the component is the most probable
one and z is the mean.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from cellplm_jax.batch import Array, LatentNoise, LatentOutput, Shape
from cellplm_jax.config import ModelConfig
from cellplm_jax.model.layers import Dense, dense, prelu


def normal_log_density(
    x: Float[Array, "*batch latent"],
    mean: Float[Array, "*#batch latent"],
    variance: Float[Array, "*#batch latent"],
) -> Float[Array, "*batch"]:
    """Return log N(x; mean, diag(variance + 1e-8)) (``autoencoders.py``, ``log_normal``)."""
    variance = variance + 1e-8
    return -0.5 * jnp.sum(
        math.log(2.0 * math.pi) + jnp.log(variance) + (x - mean) ** 2 / variance, axis=-1
    )


def normal_kl(
    mean: Float[Array, "*#batch latent"],
    variance: Float[Array, "*#batch latent"],
    prior_mean: Float[Array, "*#batch latent"],
    prior_variance: Float[Array, "*#batch latent"],
) -> Float[Array, "*batch"]:
    """Return KL(N(mean, variance) || N(prior_mean, prior_variance)) in nats."""
    ratio = variance / prior_variance
    distance = (mean - prior_mean) ** 2 / prior_variance
    return 0.5 * jnp.sum(ratio + distance - 1.0 - jnp.log(ratio), axis=-1)


def mixture_kl(
    mean: Float[Array, "*batch latent"],
    variance: Float[Array, "*batch latent"],
    prior_mean: Float[Array, "clusters latent"],
    prior_variance: Float[Array, "clusters latent"],
) -> Float[Array, "*batch clusters"]:
    """Return the KL of one Gaussian from each component, in nats."""
    # Expanded into matrix products, so that no [cells, clusters, latent] array is made.
    precision = 1.0 / prior_variance
    quadratic = (variance + mean**2) @ precision.T
    linear = mean @ (prior_mean * precision).T
    constant = jnp.sum(prior_mean**2 * precision + jnp.log(prior_variance) - 1.0, axis=-1)
    return 0.5 * (quadratic - 2.0 * linear + constant - jnp.log(variance).sum(-1, keepdims=True))


def categorical_kl_from_uniform(logits: Float[Array, "*batch clusters"]) -> Float[Array, "*batch"]:
    """Return KL(softmax(logits) || uniform) in nats; its maximum is log(clusters)."""
    log_probability = nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)
    return math.log(logits.shape[-1]) - entropy


@jax.custom_vjp
def reverse_gradient(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x; its gradient is negated (Ganin & Lempitsky 2015)."""
    return x


reverse_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (-gradient,))


class BatchDiscriminator(nn.Module):
    """Predicts the batch of a cell from its latent; the encoder sees the reversed gradient.

    Attributes:
        config: The model's configuration.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, z: Float[Array, "samples cells latent"]
    ) -> Float[Array, "samples cells batches"]:
        """Return the logits of the batches."""
        x = prelu("prelu")(dense(self.config.latent.adversarial_hidden, "hidden")(z))
        return dense(self.config.decoder.batches, "logits")(x)


class Latent(nn.Module):
    """The configured latent layer.

    Attributes:
        config: The model's configuration.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "samples cells hidden"],
        *,
        train: bool,
        noise: LatentNoise | None = None,
    ) -> LatentOutput:
        """Infer the latent of each cell.

        Args:
            hidden: Output of the encoder.
            train: Draw a sample; otherwise the mean is returned and nothing is random.
            noise: The random numbers to use while training; None draws them from the ``"latent"`` stream.
        """
        config = self.config.latent
        # The latent decides on small differences between cells: float32 whatever the precision of the trunk.
        hidden = hidden.astype(jnp.float32)
        if train and noise is None and config.kind in ("gaussian", "gaussian_mixture"):
            noise = self._draw_noise(hidden.shape[:2])
        if config.kind == "none":
            output = LatentOutput(z=hidden, mean=hidden)
        elif config.kind == "deterministic":
            z = self._scaled(dense(config.size, "linear")(hidden))
            output = LatentOutput(z=z, mean=z)
        elif config.kind == "gaussian":
            output = self._gaussian(hidden, noise if train else None)
        elif config.inference == "released":
            output = self._released_mixture(hidden, noise if train else None)
        else:
            output = self._paper_mixture(hidden, noise if train else None)
        # Its parameters must exist at initialisation, and are of no use at inference.
        if config.adversarial_weight > 0 and (train or self.is_initializing()):
            discriminator = BatchDiscriminator(self.config, name="discriminator")
            output = output.replace(batch_logits=discriminator(reverse_gradient(output.z)))
        return output

    def _draw_noise(self, shape: Shape) -> LatentNoise:
        config = self.config.latent
        gaussian_key, gumbel_key = jax.random.split(self.make_rng("latent"))
        return LatentNoise(
            gaussian=jax.random.normal(gaussian_key, (*shape, config.size)),
            gumbel=jax.random.gumbel(gumbel_key, (*shape, config.clusters)),
        )

    def _scaled(self, z: Array) -> Array:
        """Scale each cell's latent to unit root mean square where the model has a trunk."""
        if self.config.trunk == "none":
            return z
        return z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-12)

    def _posterior(self, hidden: Array) -> tuple[Array, Array]:
        """Return mean and variance of q(z|x): variance exp(clip(log_variance, -5, 5)) + 1e-4."""
        size = self.config.latent.size
        mean = self._scaled(dense(size, "mean")(hidden))
        # Starts at variance exp(-4): at variance 1 the first hundreds of steps would decode noise.
        start = nn.initializers.constant(-4.0)
        layer = Dense(size, bias_init=start, name="log_variance")
        log_variance = jnp.clip(layer(hidden), -5.0, 5.0)
        return mean, jnp.exp(log_variance) + 1e-4

    def _gaussian(self, hidden: Array, noise: LatentNoise | None) -> LatentOutput:
        mean, variance = self._posterior(hidden)
        z = mean if noise is None else mean + jnp.sqrt(variance) * noise.gaussian
        kl = -0.5 * jnp.sum(1 + jnp.log(variance) - mean**2 - variance, axis=-1)
        return LatentOutput(z=z, mean=mean, variance=variance, kl_latent=kl)

    def _released_mixture(self, hidden: Array, noise: LatentNoise | None) -> LatentOutput:
        config = self.config.latent
        logits = dense(config.clusters, "cluster_logits")(hidden)
        if noise is None:
            weights = jax.nn.one_hot(jnp.argmax(logits, axis=-1), config.clusters)
        else:
            # Gumbel-softmax: a differentiable draw of a component.
            weights = nn.softmax((logits + noise.gumbel) / config.temperature, axis=-1)
        joint = jnp.concatenate([hidden, weights], axis=-1)
        # The released inference network is 512 wide whatever the latent size (autoencoders.py:200).
        inner = nn.relu(dense(512, "inference")(joint))
        mean = dense(config.size, "mean")(inner)
        variance = nn.softplus(dense(config.size, "variance")(inner))
        prior_mean = dense(config.size, "prior_mean")(weights)
        prior_variance = nn.softplus(dense(config.size, "prior_variance")(weights))
        z = mean if noise is None else mean + noise.gaussian * jnp.sqrt(variance + 1e-10)
        # One sample of the Gaussian term, not its closed form, as the released code has it: it can be negative.
        kl_latent = normal_log_density(z, mean, variance)
        kl_latent = kl_latent - normal_log_density(z, prior_mean, prior_variance)
        posterior = LatentOutput(z=z, mean=mean, variance=variance, kl_latent=kl_latent)
        return _with_clusters(posterior, logits, weights, prior_mean, prior_variance)

    def _paper_mixture(self, hidden: Array, noise: LatentNoise | None) -> LatentOutput:
        config = self.config.latent
        mean, variance = self._posterior(hidden)
        z = mean if noise is None else mean + jnp.sqrt(variance) * noise.gaussian
        shape = (config.clusters, config.size)
        prior_mean = self.param("prior_mean", nn.initializers.normal(1.0), shape)
        raw = self.param("prior_log_variance", nn.initializers.zeros, shape)
        prior_variance = jnp.exp(jnp.clip(raw, -5.0, 5.0)) + 1e-4
        # q(y|z) of the paper: from the sample z, not from the mean.
        logits = dense(config.clusters, "cluster_logits")(z)
        weights = nn.softmax(logits, axis=-1)
        kl_latent = jnp.sum(weights * mixture_kl(mean, variance, prior_mean, prior_variance), -1)
        posterior = LatentOutput(z=z, mean=mean, variance=variance, kl_latent=kl_latent)
        return _with_clusters(posterior, logits, weights, prior_mean, prior_variance)


def _with_clusters(
    posterior: LatentOutput,
    logits: Array,
    weights: Array,
    prior_mean: Array,
    prior_variance: Array,
) -> LatentOutput:
    """Add what a mixture knows beyond the posterior of z."""
    return posterior.replace(
        cluster_logits=logits,
        cluster_weights=weights,
        prior_mean=prior_mean,
        prior_variance=prior_variance,
        kl_cluster=categorical_kl_from_uniform(logits),
    )
