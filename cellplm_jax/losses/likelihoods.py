"""Negative log-likelihoods of counts, entry by entry, in float32.

Every function here is the plain form; faster ones are tested against it. Natural logarithms throughout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

EPSILON = 1e-10


def negative_binomial_nll(counts: jax.Array, mean: jax.Array, dispersion: jax.Array) -> jax.Array:
    """Return the negative log-likelihood of negative-binomial counts.

    ``-log NB(x; mu, theta)`` with variance ``mu + mu^2 / theta`` (``CellPLM/objective/zinb.py``), epsilons included:

        lgamma(theta) + lgamma(x + 1) - lgamma(x + theta)
        + (theta + x) log(1 + mu / theta) + x (log theta - log mu)

    Args:
        counts: float [...]; non-negative.
        mean: float [...]; ``mu``, positive (0 is allowed where the count is 0).
        dispersion: float, broadcastable to the others; ``theta``, positive.

    Returns:
        float32 [...], in nats.
    """
    counts, mean, dispersion = (jnp.asarray(x, jnp.float32) for x in (counts, mean, dispersion))
    theta = dispersion + EPSILON
    constant = gammaln(theta) + gammaln(counts + 1.0) - gammaln(counts + theta)
    spread = (dispersion + counts) * jnp.log(1.0 + mean / theta)
    return constant + spread + counts * (jnp.log(theta) - jnp.log(mean + EPSILON))


def zero_inflated_negative_binomial_nll(
    counts: jax.Array, mean: jax.Array, dispersion: jax.Array, zero_logits: jax.Array
) -> jax.Array:
    """Return the negative log-likelihood of zero-inflated negative-binomial counts.

    With ``pi = sigmoid(zero_logits)``: ``-log(pi + (1 - pi) NB(0))`` at zeros and ``-log(1 - pi) - log NB(x)``
    elsewhere, computed from the logits so that neither overflows.

    Args:
        counts: float [...].
        mean: float [...].
        dispersion: float, broadcastable.
        zero_logits: float [...]; logit of a structural zero.

    Returns:
        float32 [...], in nats.
    """
    nll = negative_binomial_nll(counts, mean, dispersion)
    log_zero = jax.nn.log_sigmoid(zero_logits)
    log_count = jax.nn.log_sigmoid(-zero_logits)
    zero_case = -jnp.logaddexp(log_zero, log_count - nll)
    return jnp.where(counts < 0.5, zero_case, nll - log_count)
