"""What a stage knows of its run: sizes, time left, and where its rows go."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(path) for path in (HERE, HERE.parent / "speed", HERE.parent, ROOT)]
"""Where the programs of this benchmark find one another, and the package in a checkout."""
MARK = "row "
"""What the lines of standard output begin with that hold a row."""


@dataclass
class Job:
    """One part of a stage, in a process of its own.

    Attributes:
        part: Name of the function in ``stages.py``.
        seconds: How long it may take.
        out: Folder of the results.
        scratch: Folder for what is not brought back.
        rehearse: Everything small, for a CPU.
        corpus: Folder of the prepared corpus.
        peaks: Measured by the first stage: FLOP/s by precision, bytes/s of a copy.
    """

    part: str
    seconds: float
    out: Path
    scratch: Path
    rehearse: bool
    corpus: str = ""
    peaks: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, text: str) -> Job:
        """Read what the runner hands over."""
        values = json.loads(text)
        return cls(**{**values, "out": Path(values["out"]), "scratch": Path(values["scratch"])})

    def text(self) -> str:
        """Return what :meth:`read` reads."""
        names = ("part", "seconds", "rehearse", "corpus", "peaks")
        values = {name: getattr(self, name) for name in names}
        return json.dumps({**values, "out": str(self.out), "scratch": str(self.scratch)})

    def left(self) -> float:
        """Return the seconds left to this part."""
        return self.seconds - (time.monotonic() - self.started)

    def fits(self, seconds: float, what: str) -> bool:
        """Return whether there is time for something; a row says so if there is not."""
        if self.rehearse or self.left() > seconds:
            return True
        self.row(what=what, skipped=f"{self.left():.0f} s left, {seconds:.0f} s needed")
        return False

    def choose(self, card: Any, rehearsal: Any) -> Any:
        """Return a size for the card, or the one for a rehearsal."""
        return rehearsal if self.rehearse else card

    def row(self, **facts: Any) -> None:
        """Hand a row to the runner."""
        sys.stdout.write(MARK + json.dumps(facts, default=str) + "\n")
        sys.stdout.flush()

    def tried(self, what: str, work: Callable[[], None]) -> None:
        """Do something; if it fails, a row says why."""
        try:
            work()
        except Exception as error:  # the rest of the stage is worth as much
            reason = " ".join(str(error).split())[:300] or "no message"
            self.row(what=what, failed=f"{type(error).__name__}: {reason}")


def timed(run: Callable[[], Any], repeats: int = 5, least: float = 0.0) -> tuple[float, float]:
    """Time a function whose results are JAX arrays.

    Args:
        run: Starts the work.
        repeats: Runs after the first.
        least: Seconds that one measurement takes at least; a short function is run many times in it.

    Returns:
        Median seconds of a run, and seconds of the first one, compilation included.
    """
    import jax

    began = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - began
    began = time.perf_counter()
    jax.block_until_ready(run())
    number = max(1, int(least / max(time.perf_counter() - began, 1e-6)))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(number):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - began) / number)
    return statistics.median(seconds), first


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process of this benchmark."""
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([*PATHS, *([inherited] if inherited else [])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **changes}
