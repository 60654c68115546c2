"""What a run reports: held-out scores, rates, and where they are written (JSON lines, TensorBoard, screen)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def heldout_scores(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Turn the sums of :func:`cellplm_jax.train.step.evaluation_step` into scores.

    Args:
        sums: One dictionary a held-out batch.

    Returns:
        ``masked_correlation``: Pearson correlation of log1p counts over all masked entries together;
        ``masked_correlation_per_gene``: mean over genes of the correlation over their masked cells (genes whose truth
        or prediction is constant there are left out), which a prediction by gene means cannot score in;
        ``nb_log_likelihood``: mean log-likelihood of a masked entry in nats. NaN where nothing was masked.
    """
    total: dict[str, np.ndarray] = {}
    for part in sums:
        for name, value in part.items():
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


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl`` file; a line cut off by a crash is left out.

    Args:
        path: The file.

    Returns:
        One dictionary a line.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class MetricsWriter:
    """Writes metrics as JSON lines, and to TensorBoard where ``tensorboardX`` (extra ``train``) is installed.

    Lines are appended; on resuming, lines past the restored step are removed first, so a step never stands twice.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int = 0):
        self.path = Path(workdir) / "metrics.jsonl"
        kept = []
        if self.path.exists():
            # A run that starts over writes its step 0 again.
            last = resume_step if resume_step > 0 else -1
            kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= last]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = None
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            pass
        else:
            self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"))

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one line.

        Args:
            step: Optimizer steps taken.
            split: ``"train"`` or ``"heldout"``.
            values: Scalars; non-finite ones are written as null.
        """
        row: dict[str, Any] = {"step": step, "split": split, "time": round(time.time(), 3)}
        for name, value in values.items():
            row[name] = float(f"{value:.7g}") if math.isfinite(value) else None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close every sink."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class ProgressReport:
    """Progress of long work: a live bar on a terminal, plain lines elsewhere, on standard error.

    Args:
        title: What is being done.
        total: Units of the whole work.
        unit: What is counted, in the plural.
        quiet: Say nothing.
        every: Seconds between plain lines.
    """

    def __init__(
        self, title: str, total: int, *, unit: str = "steps", quiet: bool = False, every: float = 10
    ):
        self.title, self.total, self.unit, self.every = title, total, unit, every
        self._start = self._last = time.monotonic()
        self._settled: tuple[float, int] | None = None
        self._bar = self._task = None
        self._plain = not quiet
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._plain = False
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Report that ``done`` units are finished."""
        if self._settled is None:
            # The first unit carries the compilation; rates are taken from the second one on.
            self._settled = (time.monotonic(), done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self._plain and (now - self._last >= self.every or done >= self.total):
            self._last = now
            since, before = self._settled
            line = f"{self.title}: {done}/{self.total} {self.unit}, {now - self._start:.0f} s"
            if before < done < self.total:
                line += f", {(now - since) / (done - before) * (self.total - done):.0f} s left"
            sys.stderr.write(f"{line}{', ' + note if note else ''}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.stop()
