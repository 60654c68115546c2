"""State of a training run: everything required to resume it exactly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Float, Int32

from cellplm_jax.batch import Array
from cellplm_jax.config import TrainConfig
from cellplm_jax.model.cellplm import init_params
from cellplm_jax.train.optim import make_optimizer
from cellplm_jax.train.projection import Projection, start_from


class TrainState(struct.PyTreeNode):
    """State of a run.

    The KL warm-up is a function of ``step`` and the random streams of (seed, step), so neither needs a field.

    Attributes:
        step: Number of steps, including skipped ones.
        params: The ``"params"`` collection, float32.
        optimizer: Optimizer state.
        skipped: Steps without an update because the loss or a gradient was not finite.
        skipped_in_a_row: Number of consecutive skipped steps up to now.
    """

    step: Int32[Array, ""]
    params: Any
    optimizer: optax.OptState
    skipped: Int32[Array, ""]
    skipped_in_a_row: Int32[Array, ""]


def create_state(
    config: TrainConfig,
    gene_means: Float[Array, " genes"] | None = None,
    projection: Projection | None = None,
) -> TrainState:
    """Initialise a run; a pure function, so it can be traced for shapes.

    Args:
        config: The run.
        gene_means: Mean count of each gene. The decoder's output bias is initialised to their logarithm,
            so that training does not spend its first hundreds of steps on learning which genes are common.
        projection: Initialisation of a model with a trunk; None: random.
    """
    params = init_params(config.model, jax.random.key(config.seed))
    if gene_means is not None and "log_mean" in params.get("decoder", {}):
        means = jnp.asarray(gene_means, jnp.float32)
        # The decoder starts at the mean count of each gene instead of at 1 for all.
        params["decoder"]["log_mean"]["bias"] = jnp.log(means + 1e-4)
    if projection is not None:
        params = start_from(params, projection, config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        optimizer=optimizer.init(params),
        skipped=zero,
        skipped_in_a_row=zero,
    )
