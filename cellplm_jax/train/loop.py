"""The pretraining loop, in the order of execution: data, work directory, state, then step, evaluate, probe, save.

All processes of a run execute it in lockstep and see the same numbers; only the first one writes metrics, card and
summary figure. Processes differ only in their rows of each batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import TrainConfig
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.data.pipeline import TrainingBatches, gene_means, split_heldout
from cellplm_jax.display import Displayed
from cellplm_jax.errors import CellPLMError, MissingDependencyError, explain, require
from cellplm_jax.progress import ProgressReport
from cellplm_jax.train.checkpoint import (
    BEST_METRIC,
    ModelFiles,
    RunCheckpoints,
    read_root,
    write_card,
    write_root,
)
from cellplm_jax.train.covariates import grow_rows, rows_of, with_covariates, with_rows
from cellplm_jax.train.heldout import HeldoutEvaluation
from cellplm_jax.train.metrics import (
    MetricsWriter,
    StepRates,
    peak_flops,
    read_metrics,
)
from cellplm_jax.train.projection import Projection, fit_projection
from cellplm_jax.train.sharding import MeshFunction, local_rows, make_mesh, to_global
from cellplm_jax.train.state import TrainState
from cellplm_jax.train.step import abstract_state, compile_training_step, create_sharded_state
from cellplm_jax.train.workdir import (
    added_samples,
    check_room,
    explain_workdir_errors,
    machine_facts,
    open_workdir,
    run_card,
    store_facts,
)

METRICS_FILE, PICTURE_FILE = "metrics.jsonl", "run.png"


@dataclasses.dataclass(frozen=True, repr=False)
class RunResult(Displayed):
    """Result of a run.

    Attributes:
        workdir: Readable with ``cellplm_jax.load``; an etils path, compatible with pathlib.
        step: Number of steps.
        heldout: Held-out scores after the last step; empty without held-out cells or if the run was stopped.
        cells_per_second: Cells in the loss per second; compilation, evaluation and saving excluded. NaN below two
            steps.
        preempted: Whether the run was stopped before its end; all steps up to ``step`` are saved.
    """

    workdir: epath.Path
    step: int
    heldout: dict[str, float]
    cells_per_second: float
    preempted: bool = False


def pretrain(
    config: TrainConfig,
    store: CellStore,
    workdir: str | os.PathLike,
    *,
    card: dict[str, Any] | None = None,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
    preempted: Callable[[int], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> RunResult:
    """Pretrain on the devices of all processes; the same ``workdir`` resumes a run.

    Args:
        config: The run. ``model.genes`` must equal the size of the vocabulary.
        store: A corpus, or samples in memory.
        workdir: Directory or ``gs://`` address. Receives ``config.json``, ``genes.txt``, ``card.json``,
            ``metrics.jsonl``, TensorBoard files, checkpoints, and at the end ``run.png``.
        card: Facts for the model card (data, licence); completed with the run's own.
        quiet: Disable progress output.
        on_step: Called with the step number after every step (tests interrupt a run with it).
        preempted: Called after every step; True saves this step, waits until it is on disk and returns. All processes
            must get the same answer.
        devices: Devices to use; None: those of all processes.

    Returns:
        A :class:`RunResult`.

    Raises:
        InputError: No usable sample, genes and config disagree, or the work directory cannot be written.
        CheckpointError: ``workdir`` belongs to a run with another configuration, vocabulary or data.
        CellPLMError: Loss or gradients were not finite for ``config.maximum_skipped`` steps in a row.
    """
    began = time.monotonic()
    require("grain", "train", "Pretraining")
    folder = epath.Path(workdir)
    first_process = jax.process_index() == 0
    progress = ProgressReport("pretraining", config.steps, quiet=quiet or not first_process)

    # Data, held-out split, mesh and compiled step.
    # Before any work: a directory of another run must fail in the first second.
    found = open_workdir(folder, config, store)
    config = with_covariates(config, store, found.train if found else None)
    train, heldout = split_heldout(store, config.data, config.seed)
    batches = TrainingBatches(store, train, config)
    mesh = make_mesh(config.mesh, devices, rows=config.data.rows)
    take_step = compile_training_step(config, mesh)
    evaluate = HeldoutEvaluation(config, store, heldout, mesh)

    # Work directory: check that it is writable, has enough space, and belongs to this run.
    check_room(folder, abstract_state(config, mesh), keep=config.keep_checkpoints)
    _describe_run(folder, found, config, store, run_card(config, store, train, heldout, card))
    # A resumed run may have a larger corpus.
    if added := added_samples(found, store):
        progress.say(f"the data has {added} new samples; their batch embeddings start at the mean")
    checkpoints = RunCheckpoints(folder, keep=config.keep_checkpoints)

    # State: restored from the latest checkpoint, or initialised with its sharding.
    start = checkpoints.latest_step() or 0
    if start:
        state, facts = _restored_state(checkpoints, start, config, mesh)
    else:
        start_of_trunk = None
        if config.model.trunk == "projection":
            start_of_trunk = _shared_projection(config, store, train, progress.say)
        # Created by a compiled function in its final sharding: no device ever holds all of a large model.
        state = create_sharded_state(config, mesh, gene_means(store, train), start_of_trunk)
        facts = {"evaluated": False, "probed": False}
    facts |= {"seed": config.seed, "rows": rows_of(config), "samples": len(store.samples)}

    log = _StepLog(config, batches, folder if first_process else None, start, progress)
    # From `start`: batches are functions of the step, so nothing is skipped over.
    rows = batches.iterate(start, config.steps, *local_rows(mesh, config.data.rows))
    feed = _placed_ahead(rows, mesh, config.data.rows)
    scores: dict[str, float] = {}
    step, stopped = start, False
    try:
        # Before the first step; and if the run was stopped at a step without waiting for its scores.
        if heldout and start % config.evaluate_every == 0 and not facts["evaluated"]:
            log.write(start, "heldout", evaluate(state.params))
        if config.probe_every and start % config.probe_every == 0 and not facts["probed"]:
            log.write(start, "probe", evaluate.probe(state.params))
        while step < config.steps and not stopped:
            step += 1
            batch, late = log.timed(feed)
            state, metrics = take_step(state, batch)
            # Reads the metrics of the previous step while this one runs.
            log.push(step, metrics, late)

            last = step == config.steps
            stopped = not last and preempted is not None and preempted(step)
            evaluating = bool(heldout) and _due(step, config.evaluate_every, last, stopped)
            probing = bool(config.probe_every) and _due(step, config.probe_every, last, stopped)
            saving = _due(step, config.checkpoint_every, last, False) or stopped
            if evaluating or probing or saving:
                # The decision below needs the metrics of this step, not of the one before.
                log.settle()
            if log.skipped_in_a_row >= config.maximum_skipped:
                raise _diverged(log, batches, state)

            if evaluating:
                scores = evaluate(state.params)
                log.write(step, "heldout", scores)
                log.note = f"held-out correlation {scores['masked_correlation']:.3f}"
            if probing:
                log.write(step, "probe", evaluate.probe(state.params))
                if message := evaluate.missing():
                    progress.say(message)
            if saving:
                log.flush()
                # A step without scores, or with NaN, must not be kept as the best one.
                usable = evaluating and all(map(math.isfinite, scores.values()))
                facts |= {"evaluated": evaluating, "probed": probing}
                checkpoints.save(state, metrics=scores if usable else None, facts=facts)
            if evaluating or probing or saving:
                # Rates exclude evaluation and saving.
                log.resume()
            if on_step is not None:
                on_step(step)
    finally:
        # All are closed even if one raises; callbacks run in reverse order, the feed first.
        with contextlib.ExitStack() as closing:
            closing.callback(checkpoints.close)
            closing.callback(log.close)
            closing.callback(progress.close)
            closing.callback(feed.close)

    # A finished run that is called again trains nothing, but returns its scores.
    if start >= config.steps:
        scores = evaluate(state.params)
    if first_process:
        with explain_workdir_errors(folder):
            _complete_card(folder, config, step, start, state, log, time.monotonic() - began)
            _draw(folder)
    rate = log.rates.cells_per_second
    return RunResult(folder, step, {} if stopped else scores, rate, stopped)


def _shared_projection(
    config: TrainConfig,
    store: CellStore,
    train: Sequence[SampleRange],
    on_progress: Callable[[str], None],
) -> Projection:
    """Compute the projection on the first process and give it to all, so that they start from the same bits."""
    if jax.process_count() == 1:
        return fit_projection(store, train, config, on_progress=on_progress)
    from jax.experimental import multihost_utils

    recipe = config.projection
    genes = config.model.genes
    if jax.process_index() == 0:
        projection = fit_projection(store, train, config, on_progress=on_progress)
        sizes = np.array([projection.table.shape[1], projection.discriminants.shape[1]])
    else:
        projection = None
        sizes = np.array([recipe.components, recipe.discriminants])
    # Shapes first: all processes must call the second broadcast with equal ones.
    components, discriminants = map(int, multihost_utils.broadcast_one_to_all(sizes))
    if projection is None:
        empty = (genes, components), (components,), (components, discriminants)
        projection = Projection(*(np.zeros(shape, np.float32) for shape in empty))
    return Projection(*map(np.asarray, multihost_utils.broadcast_one_to_all(projection)))


def _due(step: int, every: int, last: bool, stopped: bool) -> bool:
    """Return whether a periodic action is due; a stopped run does not wait for it."""
    return (step % every == 0 or last) and not stopped


def _describe_run(
    workdir: epath.Path,
    found: ModelFiles | None,
    config: TrainConfig,
    store: CellStore,
    facts: dict[str, Any],
) -> None:
    """Write the root files of a new run, or update those of a resumed run."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # Wait until all processes have read the existing files before writing.
        multihost_utils.sync_global_devices("cellplm_jax: work directory read")
    if jax.process_index() != 0:
        return
    old_card = {} if found is None else found.card
    if found is not None and found.store == store_facts(store):
        facts = old_card
    files = ModelFiles(
        config.model,
        list(store.genes),
        {**old_card, **facts},
        config,
        store=store_facts(store),
    )
    if files != found:
        with explain_workdir_errors(workdir):
            write_root(workdir, files)


def _restored_state(
    checkpoints: RunCheckpoints,
    step: int,
    config: TrainConfig,
    mesh: Any,
) -> tuple[TrainState, dict[str, Any]]:
    """Restore a checkpoint onto this run's mesh, with additional covariate rows if samples were added.

    Returns:
        The state, and its saved facts.
    """
    facts = checkpoints.run_facts(step)
    # Restored in the shapes that it was saved with, then grown.
    state = checkpoints.restore(abstract_state(with_rows(config, facts["rows"]), mesh), step)
    if facts["rows"] == rows_of(config):
        return state, facts
    wanted = abstract_state(config, mesh)

    def grow(state: TrainState) -> TrainState:
        return state.replace(
            params=grow_rows(state.params, wanted.params),
            optimizer=grow_rows(state.optimizer, wanted.optimizer, new="zero"),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return MeshFunction(grow, mesh, out_shardings=shardings)(state), facts


def _placed_ahead(local_batches: Any, mesh: Any, rows: int) -> Generator[CellBatch, None, None]:
    """Yield batches on the devices; the next one is transferred during the computation."""
    ahead = None
    with contextlib.closing(local_batches):
        for local in local_batches:
            # Starts the transfer; it runs while the caller computes with the batch before.
            placed = to_global(mesh, local, rows)
            if ahead is not None:
                yield ahead
            ahead = placed
        if ahead is not None:
            yield ahead


class _StepLog:
    """Reads and logs the metrics of each step one step late, so that the devices never wait for it.

    Attributes:
        step: The last step whose metrics were read.
        metrics: Those metrics.
        skipped_in_a_row: Number of consecutive skipped steps.
        note: Additional text for the progress report.
        rates: The clock.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: TrainingBatches,
        workdir: epath.Path | None,
        start: int,
        progress: ProgressReport,
    ):
        self._config = config
        self._batches = batches
        self._progress = progress
        self._first = start + 1
        self._pending: tuple[int, Any, float] | None = None
        self._writer = None if workdir is None else MetricsWriter(workdir, resume_step=start)
        self.peak, self.peak_source = (math.nan, "unknown") if workdir is None else peak_flops()
        self.rates = StepRates(config, self.peak)
        self.step = start
        self.skipped_in_a_row = 0
        self.note = ""
        self.metrics: dict[str, float] = {}

    def timed(self, feed: Iterator[CellBatch]) -> tuple[CellBatch, float]:
        """Return the next batch, and an upper bound of the seconds during which the devices were idle.

        They were idle if the previous step was finished when the batch arrived; it may have finished in the meantime.
        """
        began = time.monotonic()
        batch = next(feed)
        # Asked after the batch arrived: only then was waiting for data the reason.
        idle = self._pending is None or self._pending[1]["loss"].is_ready()
        return batch, time.monotonic() - began if idle else 0.0

    def push(self, step: int, metrics: dict[str, jax.Array], late: float) -> None:
        """Record that a step was started, and read the previous one."""
        before = self._pending
        self._pending = (step, metrics, late)
        if before is not None:
            self._read(*before)

    def settle(self) -> None:
        """Read the last started step."""
        if self._pending is not None:
            pending = self._pending
            self._pending = None
            self._read(*pending)

    def _read(self, step: int, metrics: dict[str, jax.Array], late: float) -> None:
        config = self._config
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.rates.step(values, late)
        self.step, self.metrics = step, values
        skipped = self.skipped_in_a_row
        self.skipped_in_a_row = int(values["skipped_in_a_row"])
        if self.skipped_in_a_row > 0:
            self._progress.say(
                f"step {step} skipped: {_not_finite(values)} not finite ({self.skipped_in_a_row} in a row)"
            )
        # The first step shows at once whether a run is sane.
        due = step % config.log_every == 0 or step in (1, config.steps)
        if due or self.skipped_in_a_row > skipped:
            values["padding"] = 1.0 - values["read_cells"] / max(values["slots"], 1.0)
            rows = config.data.rows * config.accumulate
            values["epoch"] = step * rows / self._batches.rows_per_epoch
            self.write(
                step,
                "train",
                {**values, **self.rates.lap(config.steps - step)},
            )
        note = f"loss {values['loss']:.1f}"
        self._progress.update(step, f"{note}, {self.note}" if self.note else note)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Write a line of metrics, on the first process."""
        if self._writer is not None and values:
            self._writer.write(step, split, values)

    def flush(self) -> None:
        """Flush all lines to disk."""
        if self._writer is not None:
            self._writer.flush()

    def resume(self) -> None:
        """Restart the clock after evaluation, probe or save."""
        self.rates.resume()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def _not_finite(metrics: Mapping[str, float]) -> str:
    return ", ".join(name for name, value in metrics.items() if not math.isfinite(value))


def _diverged(log: _StepLog, batches: TrainingBatches, state: TrainState) -> CellPLMError:
    """Return an error with diagnostics after consecutive steps with non-finite loss or gradients."""
    named = {"/".join(path): leaf for path, leaf in flatten_dict(state.params).items()}
    norms = {
        name: float(norm)
        for name, norm in zip(
            named,
            jax.device_get(
                jax.jit(lambda leaves: [jnp.linalg.norm(x) for x in leaves])(list(named.values()))
            ),
            strict=True,
        )
    }
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    largest = max(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else -1.0)
    parameters = (
        f"parameter {broken[0]} is not finite"
        if broken
        else f"all parameters are finite (largest: {largest}, norm {norms[largest]:.3g})"
    )
    held = "; ".join(str(row) for row in batches.describe(log.step - 1)[:4])
    msg = explain(
        f"{log.skipped_in_a_row} steps in a row were skipped, the last of them step {log.step}: "
        f"{_not_finite(log.metrics) or 'gradients'} not finite; {parameters}; its batch held {held}",
        "finite loss and gradients",
        "Check those samples, or start again in another directory with a lower optimizer.learning_rate or "
        "optimizer.clip_norm or with precision float32; the last checkpoint of this one is intact",
    )
    return CellPLMError(msg)


def _complete_card(
    workdir: epath.Path,
    config: TrainConfig,
    step: int,
    start: int,
    state: TrainState,
    log: _StepLog,
    seconds: float,
) -> None:
    """Add a summary of the run to the model card."""
    card = read_root(workdir).card
    before = card.get("training", {})
    # Nothing was trained, so the card stays that of the finished run.
    if before.get("steps") == step and start == step:
        return
    heldout = [row for row in read_metrics(workdir / METRICS_FILE) if row["split"] == "heldout"]
    scored = [row for row in heldout if row["step"] > 0 and row.get(BEST_METRIC) is not None]

    def scores(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in ("split", "time")}

    training = {
        "steps": step,
        "finished": step == config.steps,
        "skipped_steps": int(state.skipped),
        "seconds": round(before.get("seconds", 0.0) + seconds, 1),
        "cells_per_second": _rounded(log.rates.cells_per_second),
        "model_flop_utilisation": _rounded(log.rates.utilisation),
        "peak_flops": {"all_devices": _rounded(log.peak), "source": log.peak_source},
        "heldout_final": scores(heldout[-1]) if heldout else None,
        "heldout_best": scores(max(scored, key=lambda row: row[BEST_METRIC])) if scored else None,
    }
    write_card(workdir, {**card, "training": training, **machine_facts()})


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _draw(workdir: epath.Path) -> None:
    """Draw the summary figure of the run, if matplotlib is installed."""
    from cellplm_jax.plot import run_picture

    try:
        figure = run_picture(read_metrics(workdir / METRICS_FILE), title=workdir.name)
    except MissingDependencyError:
        return
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    (workdir / PICTURE_FILE).write_bytes(picture.getvalue())
