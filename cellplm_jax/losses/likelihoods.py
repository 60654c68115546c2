"""Negative log-likelihoods of counts, elementwise, in float32.

These are the reference implementations; faster ones are tested against them. All logarithms are natural.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Float, Real

from cellplm_jax.batch import Array

EPSILON = 1e-10


def negative_binomial_nll(
    counts: Real[Array, "*#entries"],
    mean: Float[Array, "*#entries"],
    dispersion: Float[Array, "*#entries"],
) -> Float[Array, "*entries"]:
    """Return the negative log-likelihood of negative-binomial counts.

    ``-log NB(x; mu, theta)`` with variance ``mu + mu^2 / theta`` (``CellPLM/objective/zinb.py``), epsilons included:

        lgamma(theta) + lgamma(x + 1) - lgamma(x + theta)
        + (theta + x) log(1 + mu / theta) + x (log theta - log mu)

    Args:
        counts: Non-negative.
        mean: ``mu``, positive (0 is allowed if the count is 0).
        dispersion: ``theta``, positive.

    Returns:
        float32 [...], in nats.
    """
    counts, mean, dispersion = (jnp.asarray(x, jnp.float32) for x in (counts, mean, dispersion))
    without_mean = negative_binomial_count_terms(counts, dispersion)
    return without_mean + negative_binomial_mean_terms(counts, mean, dispersion)


def negative_binomial_mean_terms(
    counts: Float[Array, "*#entries"],
    mean: Float[Array, "*#entries"],
    dispersion: Float[Array, "*#entries"],
) -> Float[Array, "*entries"]:
    """Return the terms of :func:`negative_binomial_nll` that depend on the mean: no gamma functions.

    Args:
        counts: float [...].
        mean: float [...].
        dispersion: float, broadcastable.

    Returns:
        float32 [...], in nats; the remaining terms are :func:`negative_binomial_count_terms`.
    """
    theta = dispersion + EPSILON
    # log1p keeps digits if the mean is small compared with the dispersion, as it is for most entries.
    spread = (dispersion + counts) * jnp.log1p(mean / theta)
    return spread + counts * (jnp.log(theta) - jnp.log(mean + EPSILON))


def negative_binomial_count_terms(
    counts: Float[Array, "*#entries"], dispersion: Float[Array, "*#entries"]
) -> Float[Array, "*entries"]:
    """Return the terms of :func:`negative_binomial_nll` without the mean; 0 (up to rounding) for zero counts.

    Args:
        counts: float [...].
        dispersion: float, broadcastable.

    Returns:
        float32 [...], in nats.
    """
    theta = dispersion + EPSILON
    return gammaln(theta) + gammaln(counts + 1.0) - gammaln(counts + theta)


def zero_inflated_negative_binomial_nll(
    counts: Float[Array, "*#entries"],
    mean: Float[Array, "*#entries"],
    dispersion: Float[Array, "*#entries"],
    zero_logits: Float[Array, "*#entries"],
) -> Float[Array, "*entries"]:
    """Return the negative log-likelihood of zero-inflated negative-binomial counts.

    With ``pi = sigmoid(zero_logits)``: ``-log(pi + (1 - pi) NB(0))`` at zeros and ``-log(1 - pi) - log NB(x)``
    elsewhere, computed from the logits to avoid overflow.

    Args:
        counts: float [...].
        mean: float [...].
        dispersion: float, broadcastable.
        zero_logits: float [...]; logit of a structural zero.

    Returns:
        float32 [...], in nats.
    """
    without_mean = negative_binomial_count_terms(counts, dispersion)
    return without_mean + zero_inflated_mean_terms(counts, mean, dispersion, zero_logits)


def zero_inflated_mean_terms(
    counts: Float[Array, "*#entries"],
    mean: Float[Array, "*#entries"],
    dispersion: Float[Array, "*#entries"],
    zero_logits: Float[Array, "*#entries"],
) -> Float[Array, "*entries"]:
    """Return :func:`zero_inflated_negative_binomial_nll` minus :func:`negative_binomial_count_terms`.

    The subtracted terms are 0 at zero counts, so the zero case needs no gamma function either.

    Args:
        counts: float [...].
        mean: float [...].
        dispersion: float, broadcastable.
        zero_logits: float [...].

    Returns:
        float32 [...], in nats.
    """
    nll = negative_binomial_mean_terms(counts, mean, dispersion)
    log_zero = jax.nn.log_sigmoid(zero_logits)
    # log(1 - pi), without the rounding of 1 - sigmoid.
    log_count = jax.nn.log_sigmoid(-zero_logits)
    zero_case = -jnp.logaddexp(log_zero, log_count - nll)
    # Both branches are finite for any count, so that the gradient of the unused one is no NaN.
    return jnp.where(counts < 0.5, zero_case, nll - log_count)
