"""The optimizer: AdamW, linear warm-up, cosine decay, clipping by global norm."""

from __future__ import annotations

import optax

from cellplm_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Args:
        config: Peak, warm-up and final fraction.
        steps: Length of the run.
    """
    # A test run can have fewer steps than the configured warm-up.
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a run of ``steps`` steps."""
    parts = []
    if config.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(
        optax.adamw(learning_rate_schedule(config, steps), weight_decay=config.weight_decay)
    )
    return optax.chain(*parts)
