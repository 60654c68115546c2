"""Metrics of a run: held-out scores, rates, and their output (JSON lines, TensorBoard)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from cellplm_jax.config import ModelConfig, TrainConfig
from cellplm_jax.model.cellplm import init_params
from cellplm_jax.storage import atomic_write_text, explain_write_errors, is_remote
from cellplm_jax.untrusted import parse_json

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("tpu v2", 22.5e12),
    ("tpu v3", 61.5e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
    ("tpu7", 2307e12),
    ("tpu v7", 2307e12),
    ("b200", 2250e12),
    ("gh200", 989e12),
    ("h200", 989e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("v100", 125e12),
    ("t4", 65e12),
)
"""Vendors' dense bfloat16 peak of one jax device in FLOP/s (float16 for V100 and T4; v2 and v3: one core), by a
substring of the device kind; the first match is used.
"""


def model_flops(config: TrainConfig, cells: float, nonzeros: float) -> float:
    """Return the model FLOPs of a forward and backward pass over some cells.

    Counts the mathematical operations, independently of the hardware: padding, densified zeros and recomputed
    activations are excluded, so that wasted arithmetic does not raise the model-FLOP utilisation. Forward, in
    multiplications and additions::

        each stored count         2 hidden                 (its row of the gene embedding, scaled and added)
        each cell                 2 in out                 summed over every linear layer [in, out]
          flow attention          4 hidden hidden/heads    per layer (the two products around the flow)
          performer               8 hidden features        per layer
          softmax                 4 hidden data.cells      per layer

    The backward pass takes twice the forward of the cells (gradients of the inputs and of the weights) and once that of
    the stored counts, whose inputs need no gradient. Excluded: element-wise operations, sums over cells, the
    likelihood, AdamW.

    Args:
        config: The run.
        cells: Cells that pass through the network.
        nonzeros: Their stored counts.
    """
    forward = cells * _forward_flops(config.model, config.data.cells)
    return 3.0 * forward + 2.0 * nonzeros * 2.0 * config.model.hidden


def embedding_flops(config: ModelConfig, cells: float, nonzeros: float, context: int = 0) -> float:
    """Return the model FLOPs of embedding: the forward part of :func:`model_flops`, without the decoder.

    Args:
        config: The architecture.
        cells: Number of embedded cells.
        nonzeros: Their stored counts.
        context: Cells per context; only relevant for softmax attention.
    """
    parts = ("embedder", "encoder", "latent")
    return cells * _forward_flops(config, context, parts) + 2.0 * nonzeros * config.hidden


def _forward_flops(config: ModelConfig, context: int, parts: tuple[str, ...] = ()) -> float:
    """Return the FLOPs per cell: linear layers of some modules (none: of all), and attention."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    linear = sum(
        2.0 * math.prod(leaf.shape)
        for path, leaf in flatten_dict(shapes).items()
        if path[-1] == "kernel" and (not parts or path[0] in parts)
    )
    encoder = config.encoder
    hidden = config.hidden
    width = hidden // encoder.heads
    # The same default as in model/attention.py.
    features = encoder.random_features or int(width * math.log(max(width, 2)))
    attention = {
        "flow": 4.0 * hidden * width,
        "performer": 8.0 * hidden * features,
        "softmax": 4.0 * hidden * context,
    }.get(encoder.kind, 0.0)
    return linear + encoder.layers * attention


def peak_flops(precision: str = "float32") -> tuple[float, str]:
    """Return the peak FLOP/s of all devices together, and its source.

    Args:
        precision: Precision of the factors of the matrix product that is timed on a CPU; its sums are float32.

    Returns:
        FLOP/s (NaN for an accelerator that is not in :data:`PEAK_FLOPS`), and ``"table"``, ``"measured"`` or
        ``"unknown"``. For CPUs, which are not in the table, a matrix product is timed on this machine; all
        CPU devices share its result.
    """
    device = jax.local_devices()[0]
    kind = device.device_kind.lower()
    for name, peak in PEAK_FLOPS:
        # More specific names come first in the table: "h100 pcie" before "h100".
        if name in kind:
            return peak * jax.device_count(), "table"
    if device.platform != "cpu":
        return math.nan, "unknown"
    size = 1024
    matrix = jax.device_put(jnp.ones((size, size), precision), device)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds), "measured"


_COUNTED = ("cells", "read_cells", "slots", "nonzeros")


class StepRates:
    """Rates of training between two log lines, without evaluation, saving and compilation.

    Args:
        config: The run.
        peak: FLOP/s of all devices, from :func:`peak_flops`; NaN omits the utilisation.
    """

    def __init__(self, config: TrainConfig, peak: float):
        self._flops_per_cell = model_flops(config, 1.0, 0.0)
        self._flops_per_nonzero = model_flops(config, 0.0, 1.0)
        self._peak = peak
        self._mark: float | None = None
        self._began, self._steps = 0.0, 0
        self._lap: dict[str, float] = dict.fromkeys((*_COUNTED, "seconds", "waited"), 0.0)
        self.total = dict(self._lap)

    def resume(self) -> None:
        """Restart the clock after an interruption; the first step starts it automatically."""
        if self._mark is not None:
            self._mark = time.monotonic()

    def step(self, metrics: Mapping[str, float], waited: float) -> None:
        """Count a finished step.

        Args:
            metrics: Metrics of the step; its ``cells``, ``read_cells``, ``slots`` and ``nonzeros`` are counted.
            waited: Seconds of waiting for its batch.
        """
        now = time.monotonic()
        if self._mark is not None:
            passed = {"seconds": now - self._mark, "waited": min(waited, now - self._mark)}
            for name in _COUNTED:
                passed[name] = metrics[name]
            for name, value in passed.items():
                self._lap[name] += value
                self.total[name] += value
            self._steps += 1
        else:
            self._began = now
        self._mark = now

    @property
    def cells_per_second(self) -> float:
        """Cells in the loss per second, over all counted steps; NaN before the second one."""
        seconds = self.total["seconds"]
        return self.total["cells"] / seconds if seconds > 0 else math.nan

    @property
    def utilisation(self) -> float:
        """Model-FLOP utilisation over all counted steps; NaN before the second one or without a known peak."""
        seconds = self.total["seconds"]
        return self._flops(self.total) / seconds / self._peak if seconds > 0 else math.nan

    def _flops(self, counted: Mapping[str, float]) -> float:
        return self._flops_per_cell * counted["cells"] + self._flops_per_nonzero * _seen(counted)

    def lap(self, remaining_steps: int) -> dict[str, float]:
        """Return the rates since the last call and restart the counters.

        Args:
            remaining_steps: Number of remaining steps.

        Returns:
            ``cells_per_second`` and ``nonzeros_per_second`` (without dropped cells),
            ``data_wait`` (fraction of the time during which devices were idle because the next batch was late),
            ``model_flop_utilisation``, and ``eta_seconds``, including evaluation and saving in the usual proportion.
            Empty before the second step.
        """
        lap = self._lap
        seconds = self._lap["seconds"]
        if seconds <= 0:
            return {}
        # Per lap, so that a change during the run is visible; the remaining time is from the mean over the run.
        rates = {
            "cells_per_second": lap["cells"] / seconds,
            "nonzeros_per_second": _seen(lap) / seconds,
            "data_wait": lap["waited"] / seconds,
            "eta_seconds": (time.monotonic() - self._began) / self._steps * remaining_steps,
        }
        if math.isfinite(self._peak):
            rates["model_flop_utilisation"] = self._flops(lap) / seconds / self._peak
        self._lap = dict.fromkeys(lap, 0.0)
        return rates


def _seen(counted: Mapping[str, float]) -> float:
    """Return the approximate stored counts of the cells that were not dropped."""
    return counted["nonzeros"] * counted["cells"] / max(counted["read_cells"], 1.0)


def heldout_scores(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Compute scores from the sums of :func:`cellplm_jax.train.step.evaluation_step`.

    Args:
        sums: One dictionary per held-out batch.

    Returns:
        ``masked_correlation``: Pearson correlation of log1p counts over all masked entries together;
        ``masked_correlation_per_gene``: mean over genes of the correlation over their masked cells (without genes whose
        truth or prediction is constant), for which a prediction by gene means has no score;
        ``nb_log_likelihood``: mean log-likelihood per masked entry in nats. NaN without masked entries.
    """
    total: dict[str, np.ndarray] = {}
    for part in sums:
        for name, value in part.items():
            # Sums of squares in float64: the covariance below is a difference of large numbers.
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    if not total or float(total["entries"]) == 0:
        return dict.fromkeys(
            ("masked_correlation", "masked_correlation_per_gene", "nb_log_likelihood"), math.nan
        )

    def correlation(n, x, y, xx, yy, xy):
        with np.errstate(invalid="ignore", divide="ignore"):
            covariance = xy / n - (x / n) * (y / n)
            spread = (xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)
            return covariance / np.sqrt(np.where(spread > 1e-12, spread, np.nan))

    columns = [total[name] for name in ("n", "x", "y", "xx", "yy", "xy")]
    per_gene = correlation(*columns)
    per_gene = per_gene[np.isfinite(per_gene)]
    return {
        "masked_correlation": float(correlation(*(column.sum() for column in columns))),
        "masked_correlation_per_gene": float(per_gene.mean()) if per_gene.size else math.nan,
        "nb_log_likelihood": float(-total["nll"] / total["entries"]),
    }


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl`` file; an incomplete last line is ignored.

    Args:
        path: The file, local or at a ``gs://`` address.

    Returns:
        One dictionary per line.
    """
    rows = []
    for line in epath.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class MetricsWriter:
    """Writes metrics as JSON lines, and to TensorBoard if ``tensorboardX`` (extra ``train``) is installed.

    Lines are appended; on resuming, lines past the restored step are removed first, so that no step is repeated. Object
    stores cannot append: for a ``gs://`` address the files are written locally and copied completely by
    :meth:`flush`, which the loop calls before every checkpoint, and at least once per minute.

    Args:
        workdir: Work directory of the run.
        resume_step: The step from which the run resumes.

    Raises:
        InputError: The file cannot be written (also from :meth:`write` and :meth:`flush`).
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int = 0):
        self._remote = epath.Path(workdir) if is_remote(workdir) else None
        self._scratch = tempfile.TemporaryDirectory() if self._remote is not None else None
        self._folder = Path(workdir if self._scratch is None else self._scratch.name)
        self._copied = time.monotonic()
        self.path = self._folder / "metrics.jsonl"
        kept = []
        source = (self._remote or epath.Path(self._folder)) / "metrics.jsonl"
        if source.exists():
            # A restarted run writes its step 0 again.
            last = resume_step if resume_step > 0 else -1
            kept = [row for row in read_metrics(source) if row.get("step", 0) <= last]
        with self._explained():
            atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = self.path.open("a", encoding="utf-8")
            self._tensorboard = _EventFile.open(self._folder / "tensorboard")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one line.

        Args:
            step: Optimizer steps taken.
            split: ``"train"``, ``"heldout"`` or ``"probe"``.
            values: Scalars; non-finite ones are written as null.
        """
        row: dict[str, Any] = {"step": step, "split": split, "time": round(time.time(), 3)}
        for name, value in values.items():
            whole = isinstance(value, int) or float(value).is_integer()
            number = int(value) if whole else float(f"{value:.7g}")
            # NaN is not JSON; null keeps the key.
            row[name] = number if math.isfinite(value) else None
        with self._explained():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                self._tensorboard.write(step, split, values)
        # Each flush uploads the complete file.
        if self._remote is not None and time.monotonic() - self._copied > 60:
            self.flush()

    def flush(self) -> None:
        """Flush all lines to disk."""
        with self._explained():
            self._file.flush()
            if self._tensorboard is not None:
                self._tensorboard.flush()
        if self._remote is None:
            return
        for path in (self.path, *(self._folder / "tensorboard").glob("events.*")):
            target = self._remote / path.relative_to(self._folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        self._copied = time.monotonic()

    def close(self) -> None:
        """Flush and close every sink."""
        with contextlib.ExitStack() as closing:
            if self._scratch is not None:
                # Callbacks run in reverse order: flush, close, then remove the local copy.
                closing.callback(self._scratch.cleanup)
            closing.enter_context(self._explained())
            if self._tensorboard is not None:
                closing.callback(self._tensorboard.close)
            closing.callback(self._file.close)
            self.flush()

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explain_write_errors(
            f"'{self.path.parent}'",
            again="it continues from the last checkpoint",
            catch=OSError,
        )


class _EventFile:
    """Scalars for TensorBoard, written in the calling thread.

    ``SummaryWriter`` uses a background thread that ends when the disk is full; its queue then blocks the run forever.
    """

    def __init__(self, folder: Path, writer: Any, event: Any, summary: Any):
        self._writer = writer(str(folder / "events"))
        self._event = event
        self._summary = summary

    @classmethod
    def open(cls, folder: Path) -> _EventFile | None:
        """Create a file; None: ``tensorboardX`` is not installed."""
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.proto.summary_pb2 import Summary
        except ModuleNotFoundError:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, EventsWriter, Event, Summary)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Write the finite scalars."""
        scalars = [
            self._summary.Value(tag=f"{split}/{name}", simple_value=float(value))
            for name, value in values.items()
            if math.isfinite(value)
        ]
        summary = self._summary(value=scalars)
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Flush to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
