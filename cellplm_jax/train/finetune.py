"""Fine-tuning: one loop for all tasks, given a loss, batches, and a validation function.

The loop handles parameters, not cells: a task provides a pure loss of ``(params, example, key)``, an iterable of
examples for each epoch (any pytree of arrays; each distinct shape is compiled once), and a function that scores
parameters on validation cells. This module decides what is trained: modules may be frozen, learning rates may decay
with the distance from the output, and the encoder may be tuned through low-rank adapters only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Key

from cellplm_jax.batch import Array, CellBatch, ModelOutput
from cellplm_jax.config import FinetuneConfig, MaskingConfig, MeshConfig, ModelConfig
from cellplm_jax.display import Displayed
from cellplm_jax.errors import CellPLMError, explain
from cellplm_jax.model.cellplm import CellPLM, in_precision
from cellplm_jax.model.masking import drop_cells, sample_gene_mask
from cellplm_jax.progress import ProgressReport
from cellplm_jax.train.sharding import MeshFunction, make_mesh, replicated

Path = tuple[str, ...]
Loss = Callable[[Any, Any, Array], tuple[Array, dict[str, Array]]]
"""``(params, example, key) -> (loss, metrics)``, pure; all of them float32 scalars."""

SCORE = "validation_score"
"""Key of the validation metrics that selects the best epoch; higher is better."""

LOSS = "validation_loss"
"""Key that breaks ties of the score and controls the plateau schedule; lower is better."""

MAXIMUM_SKIPPED = 10
"""Maximum number of consecutive non-finite steps."""


class Trainable(struct.PyTreeNode):
    """Trained parameters.

    Attributes:
        params: Parameters by path.
        adapters: For each adapted matrix [in, out], by its path: ``down`` [in, rank] and ``up`` [rank, out].
    """

    params: dict[Path, Array]
    adapters: dict[Path, dict[str, Float[Array, "_ _"]]]


@dataclass(frozen=True, eq=False, repr=False)
class FinetuneResult(Displayed):
    """Result of fine-tuning.

    Attributes:
        params: The ``"params"`` collection of the best epoch, adapters merged, as numpy arrays.
        history: One dictionary per epoch: ``epoch`` (from 1), ``loss`` and other metrics of the loss (means over the
            steps), ``learning_rate``, ``seconds`` since the start, and the validation metrics.
        best_epoch: Epoch of the parameters; 0: the initial parameters.
        stopped_early: Whether it stopped early.
        trained: Number of trained scalars.
        seconds: Run time, including compilation.
        start_scores: Validation metrics of epoch 0, if it was validated.
    """

    params: dict[str, Any]
    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    trained: int
    seconds: float
    start_scores: dict[str, float] = field(default_factory=dict)

    def _display(self) -> dict[str, Any]:
        return {
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "trained_parameters": self.trained,
            "seconds": self.seconds,
            "last_epoch": self.history[-1] if self.history else None,
        }


def corrupted_forward(
    params: Any,
    batch: CellBatch,
    key: Key[Array, ""],
    config: ModelConfig,
    masking: MaskingConfig,
    *,
    condition: Float[Array, "samples cells condition"] | None = None,
) -> tuple[ModelOutput, CellBatch, Bool[Array, "samples _ genes"] | None]:
    """Run the model in training mode: cells dropped, genes hidden, dropout and sampling on.

    Args:
        params: The ``"params"`` collection.
        batch: Contexts of cells.
        key: PRNG key.
        config: The architecture.
        masking: Dropped cells and hidden entries.
        condition: See :meth:`cellplm_jax.model.cellplm.CellPLM.__call__`; in the order of ``batch``, only supported
            without dropping cells.

    Returns:
        The model's output, the batch of the kept cells (reorder targets with
        :func:`cellplm_jax.model.masking.follow_cells`), and the mask of their hidden entries or None.
    """
    drop_key, mask_key, dropout_key, latent_key = jax.random.split(key, 4)
    kept = drop_cells(drop_key, batch, masking)
    gene_mask = None
    if masking.cell_fraction > 0 and masking.gene_fraction > 0:
        gene_mask = sample_gene_mask(mask_key, kept, config.genes, masking)
    output = CellPLM(config).apply(
        {"params": params},
        kept,
        gene_mask=gene_mask,
        condition=condition,
        train=True,
        rngs={"dropout": dropout_key, "latent": latent_key},
    )
    return output, kept, gene_mask  # type: ignore[return-value]


def clean_forward(
    params: Any,
    batch: CellBatch,
    config: ModelConfig,
    *,
    condition: Float[Array, "samples cells condition"] | None = None,
) -> ModelOutput:
    """Run the model in inference mode: nothing hidden, deterministic."""
    return CellPLM(config).apply({"params": params}, batch, condition=condition)  # type: ignore[return-value]


def is_frozen(path: Path, config: FinetuneConfig) -> bool:
    """Return whether a parameter is frozen (if it has an adapter, the adapter is trained instead).

    Args:
        path: Names from the top of the parameter tree.
        config: The recipe.
    """
    if config.freeze == "encoder" or config.adapter_rank > 0:
        return path[0] in ("embedder", "centre", "encoder", "pre_latent_norm")
    return config.freeze == "embedder" and path[0] == "embedder"


def adapted_paths(params: Mapping[str, Any]) -> list[Path]:
    """Return the paths of the matrices with adapters: all dense kernels of the encoder."""
    return [
        path
        for path, leaf in flatten_dict(dict(params)).items()
        if path[0] == "encoder" and path[-1] == "kernel" and np.ndim(leaf) == 2
    ]


def init_adapters(
    params: Mapping[str, Any],
    rank: int,
    key: Key[Array, ""],
) -> dict[Path, dict[str, Float[Array, "_ _"]]]:
    """Return adapters without initial effect: ``down`` random, ``up`` zero.

    Args:
        params: The ``"params"`` collection.
        rank: Inner width; 0: no adapters.
        key: PRNG key.
    """
    adapters = {}
    flat = flatten_dict(dict(params))
    for number, path in enumerate(adapted_paths(params) if rank else []):
        rows, columns = np.shape(flat[path])
        down = jax.random.normal(jax.random.fold_in(key, number), (rows, rank)) / math.sqrt(rows)
        # With `up` at 0 the model starts as it is, and `down` gives `up` a gradient.
        adapters[path] = {"down": down, "up": jnp.zeros((rank, columns))}
    return adapters


def merge(
    trainable: Trainable,
    frozen: Mapping[Path, Float[Array, "*any"]],
    scale: float,
) -> dict[str, Any]:
    """Combine trained and frozen parameters: ``params = base + scale * down @ up`` for adapted matrices.

    Args:
        trainable: Trained parameters.
        frozen: The other parameters, by path.
        scale: Factor on the adapters.

    Returns:
        The nested ``"params"`` collection; no base array is changed.
    """
    flat = {**frozen, **trainable.params}
    for path, adapter in trainable.adapters.items():
        flat[path] = flat[path] + scale * (adapter["down"] @ adapter["up"])
    return unflatten_dict(flat)


def learning_rate_factor(path: Path, config: FinetuneConfig, layers: int) -> float:
    """Return a parameter's learning rate as a fraction of the run's.

    Args:
        path: Names from the top of the parameter tree.
        config: ``embedder_rate``, ``dispersion_rate``, and ``layer_decay`` to the power of the number of layers between
            the parameter and the output: latent, decoder and head are the last layer, the embedder the first.
        layers: Number of encoder layers.
    """
    # Depth 0 is the input; rates decay from the output towards it.
    depth = layers + 2  # of latent, decoder, head
    if path[0] in ("embedder", "centre"):
        depth = 0
    elif path[0] == "pre_latent_norm":
        depth = layers + 1
    elif path[0] == "encoder":
        number = path[1].rsplit("_", 1)[-1]
        depth = 1 + (int(number) if number.isdigit() else layers - 1)
    factor = config.layer_decay ** (layers + 2 - depth)
    if path[-1] == "log_dispersion":
        return factor * config.dispersion_rate
    return factor * (config.embedder_rate if path[0] == "embedder" else 1.0)


class _LearningRate:
    """Linear warm-up over epochs, times the plateau factor of the loss."""

    def __init__(self, config: FinetuneConfig):
        self._config = config
        self._factor = 1.0
        self._lowest = math.inf
        self._waited = 0

    def at(self, epoch: int) -> float:
        """Return the rate of an epoch, counted from 0."""
        warmup = min(1.0, (epoch + 1) / max(self._config.warmup_epochs, 1))
        return self._config.learning_rate * self._factor * warmup

    def see(self, loss: float) -> None:
        """Update the plateau factor with an epoch's loss (torch's ReduceLROnPlateau: relative threshold 1e-4)."""
        if loss < self._lowest - 1e-4 * abs(self._lowest) or math.isinf(self._lowest):
            self._lowest, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited > self._config.plateau_patience:
            self._factor *= self._config.plateau_factor
            self._waited = 0


def finetune(
    params: Mapping[str, Any],
    config: FinetuneConfig,
    *,
    loss: Loss,
    examples: Callable[[int], Iterable[Any]],
    validate: Callable[[Any], Mapping[str, float]] | None = None,
    layers: int,
    start_counts: bool = False,
    title: str = "fitting",
    quiet: bool = False,
    precision: str = "float32",
    devices: Sequence[jax.Device | None] | None = None,
) -> FinetuneResult:
    """Fine-tune parameters.

    The result is a deterministic function of the arguments. The order of the steps of an epoch depends on (seed,
    epoch), the key of a step on (seed, step).

    Args:
        params: Initial parameters: the ``"params"`` collection. Not changed.
        config: The recipe.
        loss: Pure loss of one example.
        examples: The examples of an epoch (counted from 0), one optimizer step each.
        validate: Scores parameters: must return :data:`SCORE` (higher is better), and :data:`LOSS` if possible. None:
            all epochs are run and the last parameters are kept.
        layers: Number of encoder layers, for the layer-wise learning rates.
        start_counts: Validate the initial parameters as epoch 0, and keep them if no epoch is better.
        title: Title of the progress report.
        quiet: Disable progress output.
        precision: Of the matrix products, ``"float32"`` or ``"bfloat16"``; parameters and updates stay float32.
        devices: Devices that share the cells of every example; None, or a list of None: JAX's default device.

    Returns:
        The best parameters, and the history.

    Raises:
        CellPLMError: Loss or gradients were not finite for :data:`MAXIMUM_SKIPPED` consecutive steps.
    """
    start = time.monotonic()
    root = jax.random.key(config.seed)
    mesh = None
    if devices is not None and len(devices) > 1:
        mesh = make_mesh(MeshConfig(cells=len(devices)), devices)
        # Several devices share the cells of a step; weights are on all of them.
        params = jax.device_put(dict(params), replicated(mesh))
    elif devices is not None and devices[0] is not None:
        params = jax.device_put(dict(params), devices[0])
    flat = {path: jnp.asarray(leaf) for path, leaf in flatten_dict(dict(params)).items()}
    frozen = {path: leaf for path, leaf in flat.items() if is_frozen(path, config)}
    trainable = Trainable(
        params={path: leaf for path, leaf in flat.items() if path not in frozen},
        adapters=init_adapters(params, config.adapter_rank, jax.random.fold_in(root, 2)),
    )
    step, optimizer = _compile_step(config, loss, layers, precision, mesh)
    optimizer_state = optimizer.init(trainable)
    joined = jax.jit(lambda trainable, frozen: merge(trainable, frozen, config.adapter_scale))
    narrow = jax.jit(lambda params: in_precision(params, precision))

    # The average of the last epochs is what is validated and kept.
    blend = jax.jit(
        lambda old, new, decay: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new),
    )

    rates = _LearningRate(config)
    history: list[dict[str, float]] = []
    averaged = best = trainable
    best_rank = (-math.inf, -math.inf)
    best_epoch = 0
    start_scores: dict[str, float] = {}
    if start_counts and validate is not None:
        start_scores = dict(validate(joined(trainable, frozen)))
        # The start model is epoch 0: fine-tuning must be better to replace it.
        best_rank = (start_scores[SCORE], -start_scores.get(LOSS, 0.0))
    number = skipped = 0
    stopped_early = False
    progress = ProgressReport(title, config.epochs, unit="epochs", quiet=quiet)
    try:
        for epoch in range(config.epochs):
            parts = list(examples(epoch))
            # On the host, from (seed, epoch): the same order with any number of devices.
            order = np.random.default_rng([config.seed, epoch]).permutation(len(parts))
            rate = rates.at(epoch)
            steps = []
            for place in order:
                key = jax.random.fold_in(jax.random.fold_in(root, 1), number)
                trainable, optimizer_state, metrics = step(
                    trainable,
                    optimizer_state,
                    frozen,
                    parts[place],
                    key,
                    rate,
                )
                steps.append(metrics)
                number += 1
            # Read once per epoch, so that the device never waits for the host within one.
            row, skipped = _epoch_row(jax.device_get(steps), skipped)
            if skipped >= MAXIMUM_SKIPPED:
                raise CellPLMError(_diverged(epoch, rate))
            row = {"epoch": epoch + 1, **row, "learning_rate": rate}
            # Bias correction: early means use fewer epochs than the decay implies, so that the start is forgotten.
            decay = min(config.average, (1 + epoch) / (10 + epoch)) if config.average else 0.0
            averaged = blend(averaged, trainable, decay) if decay else trainable
            if validate is not None:
                row.update(validate(narrow(joined(averaged, frozen))))
            row["seconds"] = time.monotonic() - start
            history.append(row)
            # Without validation the plateau schedule follows the training loss.
            rates.see(row.get(LOSS, row["loss"]))
            rank = (row.get(SCORE, float(epoch)), -row.get(LOSS, 0.0))
            if rank > best_rank:
                best = averaged
                best_rank = rank
                best_epoch = epoch + 1
            note = f"loss {row['loss']:.4g}"
            if SCORE in row:
                note += f", validation {row[SCORE]:.4g}, best {best_rank[0]:.4g}"
            progress.update(epoch + 1, note)
            # A patience of 0 disables stopping.
            if validate and config.patience and epoch + 1 - best_epoch >= config.patience:
                stopped_early = epoch + 1 < config.epochs
                break
        if stopped_early:
            progress.say(f"stopped: no better epoch in {config.patience}; keeping {best_epoch}")
    finally:
        progress.close()
    return FinetuneResult(
        params=jax.tree.map(np.asarray, joined(best, frozen)),
        history=history,
        best_epoch=best_epoch,
        start_scores=start_scores,
        stopped_early=stopped_early,
        trained=sum(int(np.size(leaf)) for leaf in jax.tree.leaves(trainable)),
        seconds=time.monotonic() - start,
    )


def _compile_step(
    config: FinetuneConfig,
    loss: Loss,
    layers: int,
    precision: str,
    mesh: Any,
) -> tuple[Callable, optax.GradientTransformation]:
    """Return the jitted step ``(trainable, state, frozen, example, key, rate)`` and its optimizer."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    # Without a learning rate: rates and decays differ by parameter and are applied in `moved`.
    optimizer = optax.chain(clip, optax.scale_by_adam())

    def recipe(path: Path) -> tuple[float, float]:
        embedder = path[0] == "embedder"
        decay = config.embedder_weight_decay if embedder else config.weight_decay
        return learning_rate_factor(path, config, layers), decay

    def run(trainable, state, frozen, example, key, rate):
        def objective(trainable):
            params = merge(trainable, frozen, config.adapter_scale)
            return loss(in_precision(params, precision), example, key)

        (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(trainable)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        directions, new_state = optimizer.update(gradients, state)

        def moved(path, leaf, direction):
            factor, decay = recipe(path)
            return leaf - rate * factor * (direction + decay * leaf)

        moving: Trainable = directions  # type: ignore[assignment]
        new = Trainable(
            params={
                path: moved(path, leaf, moving.params[path])
                for path, leaf in trainable.params.items()
            },
            adapters={
                path: jax.tree.map(
                    lambda leaf, direction, path=path: moved(path, leaf, direction),
                    adapter,
                    moving.adapters[path],
                )
                for path, adapter in trainable.adapters.items()
            },
        )

        def chosen(new, old):
            # A non-finite step changes neither parameters nor moments.
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        metrics = {"loss": value, **metrics, "gradient_norm": norm}
        return chosen(new, trainable), chosen(new_state, state), metrics

    return jax.jit(run) if mesh is None else MeshFunction(run, mesh), optimizer


def _epoch_row(steps: list[dict[str, np.ndarray]], skipped: int) -> tuple[dict[str, float], int]:
    """Average the metrics of an epoch's finite steps, and count consecutive non-finite ones."""
    sound = []
    for metrics in steps:
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])
        skipped = 0 if finite else skipped + 1
        if finite:
            sound.append(metrics)
    names = steps[0] if steps else ()
    row = {
        name: float(np.mean([metrics[name] for metrics in sound])) if sound else math.nan
        for name in names
    }
    if not steps:
        row["loss"] = math.nan
    return row, skipped


def _diverged(epoch: int, rate: float) -> str:
    return explain(
        f"loss or gradients were not finite for {MAXIMUM_SKIPPED} steps in a row, the last in epoch {epoch + 1} at "
        f"learning rate {rate:.3g}",
        "finite numbers",
        "Lower learning_rate, raise warmup_epochs, or check the counts for extreme values",
    )
