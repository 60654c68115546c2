"""What the workers of both environments share; imports neither this project nor any rival."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import versions_of

Method = Callable[[Path, int], dict[str, Any]]
"""Takes the directory of a problem and a seed, and returns the arrays of a prediction."""


def normalize(counts: Any, *, total: Any = None, log: bool = True) -> np.ndarray:
    """Return dense float32 counts scaled to 10,000 a cell, and their log1p.

    Args:
        counts: [cells, genes], dense or sparse.
        total: [cells], library sizes; None: the sums of the rows.
        log: Take log1p.
    """
    dense = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, np.float64)
    total = dense.sum(axis=1) if total is None else np.asarray(total, np.float64)
    scaled = dense * (1e4 / np.maximum(total, 1e-12))[:, None]
    return (np.log1p(scaled) if log else scaled).astype(np.float32)


def detected_logs(mean: np.ndarray, dispersion: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the mean of log-normalised negative-binomial counts that are not zero, float32 [cells, genes].

    What a method predicts best where the error is measured on logarithms: the same for every method that has both
    parameters. Summed over counts up to 200.

    Args:
        mean: float [cells, genes].
        dispersion: float [genes], inverse.
        total: float [cells], library sizes.
    """
    found = np.zeros(mean.shape, np.float32)
    for rows in np.array_split(np.arange(len(mean)), max(1, len(mean) // 256)):
        scale = (1e4 / np.maximum(total[rows], 1e-12))[:, None]
        ratio = mean[rows] / (mean[rows] + dispersion)
        weight, chance = np.ones_like(ratio), np.ones_like(ratio)
        logs = np.broadcast_to(np.log1p(scale), ratio.shape).copy()
        for count in range(2, 201):
            weight = weight * ((count - 1 + dispersion) / count * ratio)
            chance += weight
            logs += weight * np.log1p(count * scale)
        found[rows] = logs / chance
    return found


def work(methods: dict[tuple[str, str], Method], packages: tuple[str, ...]) -> None:
    """Run one method on one problem: ``python worker.py TASK METHOD PROBLEM SEED OUT``.

    Writes OUT (``.npz``) and beside it OUT with ``.json``: seconds of fitting and predicting (imports are not counted),
    versions, or the error.

    Args:
        methods: By task and name.
        packages: Whose versions are recorded.
    """
    task, name, problem, seed, out = sys.argv[1:]
    path = Path(out)
    report: dict[str, Any] = {"versions": versions_of(packages)}
    started = time.perf_counter()
    try:
        found = methods[task, name](Path(problem), int(seed))
        report["seconds"] = round(found.pop("seconds", time.perf_counter() - started), 2)
        report["notes"] = found.pop("notes", {})
        np.savez_compressed(path, **found)
    except Exception as error:  # the table says that a method failed, and why
        traceback.print_exc()
        report["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if "error" in report else 0)
