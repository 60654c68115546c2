"""One side of the comparison: a process that prepares a task, then runs it once for every line it is sent.

Started by ``run.py``, which sends a line to one side and then to the other, so that both meet the same weather. Answers
are JSON lines: first what preparing took, then the seconds of each run, and at the end the process's peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(content: dict[str, Any]) -> None:
    """Write one line to the runner."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def serve(prepare: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Prepare the job named on the command line, then run it as often as asked.

    Args:
        prepare: Given the job, returns a function without arguments; where the job names a ``result``, what it returned
            last is written there.
    """
    job = json.loads(sys.argv[1])
    began = time.perf_counter()
    run = prepare(job)
    prepared = time.perf_counter() - began
    began = time.perf_counter()
    result = run()
    first = time.perf_counter() - began
    answer({"prepare_s": prepared, "first_s": first})
    for line in sys.stdin:
        if line.strip() != "run":
            break
        began = time.perf_counter()
        result = run()
        answer({"seconds": time.perf_counter() - began})
    if job.get("result"):
        import numpy as np

        np.save(Path(job["result"]), np.asarray(result))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer({"peak_mib": peak, "versions": versions()})


def versions() -> dict[str, str]:
    """Return the versions of what does the arithmetic."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from machine import versions_of

    return versions_of(("torch", "cellplm", "jax", "jaxlib", "flax", "optax", "numpy", "numba"))
