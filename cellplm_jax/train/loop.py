"""The pretraining loop, to be read from top to bottom: data, state, step, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cellplm_jax.config import TrainConfig, to_dict
from cellplm_jax.data.batches import Sample, TrainingBatches, heldout_batches, split_heldout
from cellplm_jax.errors import CellPLMError, CheckpointError, InputError, explain
from cellplm_jax.structs import CellBatch
from cellplm_jax.train.checkpoint import ModelFiles, RunCheckpoints, read_root, write_root
from cellplm_jax.train.metrics import MetricsWriter, ProgressReport, heldout_scores
from cellplm_jax.train.sharding import batch_sharding, make_mesh, replicated
from cellplm_jax.train.state import TrainState, create_state
from cellplm_jax.train.step import compile_training_step, evaluation_step, heldout_gene_mask


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        workdir: Opens with ``cellplm_jax.load``.
        step: Steps taken.
        heldout: Held-out scores after the last step; empty where nothing was held out.
        cells_per_second: Cells the loss saw a second, compilation and evaluation left out.
    """

    workdir: Path
    step: int
    heldout: dict[str, float]
    cells_per_second: float


def pretrain(
    config: TrainConfig,
    samples: Sequence[Sample],
    genes: Sequence[str],
    workdir: str | Path,
    *,
    card: dict[str, Any] | None = None,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> RunResult:
    """Pretrain on samples in memory; the same ``workdir`` continues where it stopped.

    Args:
        config: The run. ``model.genes`` must equal ``len(genes)``.
        samples: Tissue samples, counts in the order of ``genes``.
        genes: Gene vocabulary, Ensembl ids.
        workdir: Receives ``config.json``, ``genes.txt``, ``card.json``, ``metrics.jsonl``, TensorBoard files and the
            checkpoints.
        card: Facts for the model card (data, licence); completed with the run's own.
        quiet: No progress.
        on_step: Called with the step number after every step (tests interrupt a run here).

    Returns:
        A :class:`RunResult`.

    Raises:
        InputError: No usable sample, or genes and config disagree.
        CheckpointError: ``workdir`` belongs to a run with another configuration or vocabulary.
        CellPLMError: The loss is not finite.
    """
    workdir = Path(workdir)
    samples = _usable(config, samples, genes)
    config = _with_covariates(config, samples)
    train, heldout = split_heldout(samples, config.data.heldout_fraction, config.seed)
    batches = TrainingBatches(train, config.data, config.seed, _eigenvectors(config))

    _prepare_workdir(workdir, config, genes, _card(config, card, train, heldout))
    checkpoints = RunCheckpoints(workdir, keep=config.keep_checkpoints)
    mesh = make_mesh(config.data.samples)
    state, start = _initial_state(config, checkpoints, replicated(mesh), gene_means(train))
    step_function = compile_training_step(config, mesh)
    evaluate = heldout_evaluation(config, heldout)

    writer = MetricsWriter(workdir, resume_step=start)
    progress = ProgressReport("pretraining", config.steps, quiet=quiet)
    scores: dict[str, float] = {}
    timed_cells = timed_seconds = 0.0
    try:
        if start == 0 and heldout:
            writer.write(0, "heldout", evaluate(state.params))
        for step in range(start + 1, config.steps + 1):
            began = time.monotonic()
            batch = jax.device_put(batches[step - 1], batch_sharding(mesh))
            state, metrics = step_function(state, batch)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds = time.monotonic() - began
            if step > start + 1:
                timed_cells, timed_seconds = timed_cells + metrics["cells"], timed_seconds + seconds
            if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["gradient_norm"]):
                raise _diverged(step, metrics)
            last = step == config.steps
            if step % config.log_every == 0 or step == 1 or last:
                metrics["cells_per_second"] = metrics["cells"] / seconds
                writer.write(step, "train", metrics)
            evaluated = heldout and (step % config.evaluate_every == 0 or last)
            if evaluated:
                scores = evaluate(state.params)
                writer.write(step, "heldout", scores)
            if step % config.checkpoint_every == 0 or last:
                usable = evaluated and all(map(math.isfinite, scores.values()))
                checkpoints.save(state, metrics=scores if usable else None)
            progress.update(step, _note(metrics, scores))
            if on_step is not None:
                on_step(step)
    finally:
        progress.close()
        writer.close()
        checkpoints.close()
    if start >= config.steps:
        scores = evaluate(state.params)
    rate = timed_cells / timed_seconds if timed_seconds else math.nan
    return RunResult(workdir, max(start, config.steps), scores, rate)


def _eigenvectors(config: TrainConfig) -> int | None:
    positions = config.model.positions
    return positions.eigenvectors if positions.kind == "laplacian" else None


def heldout_masks(
    config: TrainConfig, heldout: Sequence[Sample]
) -> Iterator[tuple[CellBatch, jax.Array]]:
    """Yield the fixed held-out batches and what is hidden in each: the same for every model and baseline.

    Args:
        config: The run; its seed decides the masks.
        heldout: Held-out samples.

    Yields:
        A batch of one sample, and bool [1, cells, genes], True where an entry is hidden.
    """
    key = jax.random.key(config.seed + 2)
    batches = heldout_batches(heldout, config.data, eigenvectors=_eigenvectors(config))
    for i, batch in enumerate(batches):
        yield batch, heldout_gene_mask(jax.random.fold_in(key, i), batch.cell_mask, config)


def heldout_evaluation(
    config: TrainConfig, heldout: Sequence[Sample]
) -> Callable[[Any], dict[str, float]]:
    """Return ``params -> scores`` on held-out samples, compiled once.

    Args:
        config: The run.
        heldout: Held-out samples; with none, the scores are empty.

    Returns:
        A function giving the scores of :func:`cellplm_jax.train.metrics.heldout_scores`.
    """
    step = jax.jit(lambda params, batch, mask: evaluation_step(params, batch, mask, config))
    pairs = list(heldout_masks(config, heldout))

    def evaluate(params: Any) -> dict[str, float]:
        return heldout_scores(step(params, *pair) for pair in pairs) if pairs else {}

    return evaluate


def gene_means(samples: Sequence[Sample]) -> np.ndarray:
    """Return float32 [genes]: the mean count of each gene over the cells that measure it."""
    genes = samples[0].counts.shape[1]
    total, cells = np.zeros(genes), np.zeros(genes)
    for sample in samples:
        total += np.asarray(sample.counts.sum(axis=0), np.float64).ravel()
        cells += sample.cells * (1.0 if sample.measured is None else sample.measured)
    return (total / np.maximum(cells, 1.0)).astype(np.float32)


def _usable(config: TrainConfig, samples: Sequence[Sample], genes: Sequence[str]) -> list[Sample]:
    usable = [sample for sample in samples if sample.cells >= config.data.minimum_cells]
    if not usable:
        msg = explain(
            f"none of {len(samples)} samples has {config.data.minimum_cells} cells",
            "at least one",
            "Lower data.minimum_cells or give more data",
        )
        raise InputError(msg)
    for sample in usable:
        if not sample.counts.shape[1] == len(genes) == config.model.genes:
            msg = explain(
                f"sample '{sample.name}' has {sample.counts.shape[1]} genes, the vocabulary {len(genes)}, "
                f"the config {config.model.genes}",
                "the same number everywhere",
                "Map the counts to the vocabulary first and set model.genes to its size",
            )
            raise InputError(msg)
    return usable


def _with_covariates(config: TrainConfig, samples: Sequence[Sample]) -> TrainConfig:
    """Give the decoder as many covariate rows as the data has values; sizes set by hand are kept."""
    decoder = config.model.decoder
    sizes = {}
    for name, rows in (("batch", "batches"), ("dataset", "datasets"), ("platform", "platforms")):
        highest = max(getattr(sample, name) for sample in samples)
        sizes[rows] = max(getattr(decoder, rows), highest + 1)
    decoder = dataclasses.replace(decoder, **sizes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))


def _prepare_workdir(
    workdir: Path, config: TrainConfig, genes: Sequence[str], card: dict[str, Any]
) -> None:
    """Write the root files of a new run, or check that an old one is the same run."""
    if (workdir / "config.json").exists():
        found = read_root(workdir)
        # JSON turns tuples into lists; compare what a reader of the file would see.
        old = None if found.train is None else json.loads(json.dumps(to_dict(found.train)))
        new = json.loads(json.dumps(to_dict(config)))
        if old is None or old != new or found.genes != list(genes):
            difference = _first_difference(old or {}, new) or "the gene vocabulary"
            msg = explain(
                f"'{workdir}' belongs to another run ({difference} differs)",
                "the same configuration and genes to resume, or a new directory",
                "Give another --workdir, or the configuration in its config.json",
            )
            raise CheckpointError(msg)
        return
    write_root(workdir, ModelFiles(config.model, list(genes), card, config))


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            inner = _first_difference(
                old.get(name), new.get(name), f"{path}.{name}" if path else name
            )
            if inner:
                return inner
        return None
    return None if old == new else f"{path}: {old!r} there, {new!r} now"


def _card(
    config: TrainConfig,
    card: dict[str, Any] | None,
    train: Sequence[Sample],
    heldout: Sequence[Sample],
) -> dict[str, Any]:
    import cellplm_jax

    return {
        **(card or {}),
        "made_by": f"cellplm-jax {cellplm_jax.__version__}",
        "kind": "pretrained",
        "training_samples": len(train),
        "training_cells": sum(sample.cells for sample in train),
        "heldout_samples": len(heldout),
        "heldout_cells": sum(sample.cells for sample in heldout),
        "seed": config.seed,
    }


def _initial_state(
    config: TrainConfig, checkpoints: RunCheckpoints, sharding: Any, means: np.ndarray
) -> tuple[TrainState, int]:
    """Create the state where it will live, or restore the latest one there."""
    create = jax.jit(lambda means: create_state(config, means), out_shardings=sharding)
    latest = checkpoints.latest_step()
    if latest is None:
        return create(means), 0
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(create, means),
    )
    return checkpoints.restore(abstract, latest), latest


def _diverged(step: int, metrics: dict[str, float]) -> CellPLMError:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    msg = explain(
        f"step {step}: {', '.join(bad)} not finite",
        "finite loss and gradients",
        "Start anew in another directory with a lower optimizer.learning_rate or optimizer.clip_norm; the last "
        "checkpoint of this one is intact",
    )
    return CellPLMError(msg)


def _note(metrics: dict[str, float], scores: dict[str, float]) -> str:
    note = f"loss {metrics['loss']:.1f}"
    if scores:
        note += f", held-out correlation {scores['masked_correlation']:.3f}"
    return note
