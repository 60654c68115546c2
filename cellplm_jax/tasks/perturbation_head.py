"""The linear head of perturbation prediction: its loss, its parameters and its predictions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict

from cellplm_jax.config import MaskingConfig, ModelConfig
from cellplm_jax.data.genes import symbols_of
from cellplm_jax.display import Displayed
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.finetune import Loss, corrupted_forward

KERNEL, BIAS = ("head", "mlp", "linear_0", "kernel"), ("head", "mlp", "linear_0", "bias")


@dataclass(frozen=True, eq=False, repr=False)
class PerturbationPrediction(Displayed):
    """Predictions for perturbations.

    Attributes:
        change: [perturbations, genes], change of mean log-normalised expression (counts scaled to 10,000 per cell,
            log1p) relative to control cells.
        expression: [perturbations, genes], mean log-normalised expression: control plus change, clipped at 0.
        control: [genes], mean log-normalised expression of the control cells.
        known: [perturbations], ``"seen"``, ``"combination of seen"``, ``"partly seen"``, ``"unseen"`` or ``"control"``.
        messages: Messages about the basis of the predictions.
    """

    change: pd.DataFrame
    expression: pd.DataFrame
    control: pd.Series
    known: pd.Series
    messages: tuple[str, ...] = ()

    def _display(self) -> dict[str, Any]:
        return {
            "perturbations": list(map(str, self.change.index)),
            "genes": self.change.shape[1],
            "known": self.known.value_counts().to_dict(),
            "messages": len(self.messages) or None,
        }

    def tidy(self) -> pd.DataFrame:
        """Return one row per perturbation and gene: perturbation, gene, symbol, control, change, expression, known."""
        perturbations, genes = self.change.shape
        names = list(map(str, self.change.columns))
        return pd.DataFrame(
            {
                "perturbation": np.repeat(self.change.index.to_numpy(), genes),
                "gene": np.tile(np.array(names, object), perturbations),
                "symbol": np.tile(np.array(symbols_of(names), object), perturbations),
                "control": np.tile(self.control.to_numpy(), perturbations),
                "change": self.change.to_numpy().ravel(),
                "expression": self.expression.to_numpy().ravel(),
                "known": np.repeat(self.known.to_numpy(), genes),
            }
        )


def perturbation_loss(
    config: ModelConfig,
    masking: MaskingConfig,
    condition: np.ndarray,
    changes: np.ndarray,
    noise: np.ndarray,
) -> Loss:
    """Return the loss of control cells that are each paired with a measured change.

    Args:
        config: Architecture with a perturbation head.
        masking: Hidden entries; no cells are dropped.
        condition: float32 [rows, condition].
        changes: float [rows, genes].
        noise: float [rows], variance of the means; noisier rows have less weight.

    Returns:
        Pure ``(params, example, key) -> (squared error relative to the mean square of the changes, {})``; the
        example's target ``"row"`` is int32 [samples, cells], -1 for none.
    """
    signal = float(np.square(changes).mean())
    # The weight of a change is its reliability: the signal as a share of signal and noise.
    weights = jnp.asarray(signal / (signal + noise), jnp.float32)
    conditions = jnp.asarray(condition)
    truth = jnp.asarray(changes, jnp.float32)

    def loss(params, example, key):
        row = example.targets["row"]
        # Row -1, a cell without a pair, reads row 0 and has weight 0.
        at = jnp.maximum(row, 0)
        output, _, _ = corrupted_forward(
            params,
            example.batch,
            key,
            config,
            masking,
            condition=conditions[at],
        )
        error = jnp.square(output.prediction - truth[at]).mean(axis=-1)
        weight = jnp.where((row >= 0) & example.batch.cell_mask, weights[at], 0.0)
        # Relative to the signal, so that learning rates do not depend on the strength of a screen.
        return (error * weight).sum() / jnp.maximum(weight.sum(), 1e-12) / signal, {}

    return loss


def with_head(start: Pretrained, kernel: np.ndarray, bias: np.ndarray) -> Pretrained:
    """Return the model with its linear head set."""
    flat: dict[tuple[str, ...], Any] = dict(flatten_dict(start.params))
    flat[KERNEL], flat[BIAS] = kernel, bias
    return dataclasses.replace(start, params=unflatten_dict(flat))
