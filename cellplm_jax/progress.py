"""Progress of long work, on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


def _rate(done: int, seconds: float, unit: str) -> str:
    """Return the throughput, such as ``"1,250 cells/s"``; ``""`` if it is unknown."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    if rate < 1:
        return f"{1 / rate:.1f} s per {unit.removesuffix('s')}"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


class ProgressReport:
    """Progress of long work on standard error: a live bar on a terminal, plain lines elsewhere.

    Args:
        title: Title of the work.
        total: Total number of units.
        unit: Name of the units, in the plural.
        quiet: Disable all output.
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
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, note="", rate="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Report that ``done`` units are finished."""
        if self._settled is None:
            # The first unit includes the compilation; rates start at the second one.
            self._settled = (time.monotonic(), done)
        now = time.monotonic()
        since, before = self._settled
        rate = _rate(done - before, now - since, self.unit)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note, rate=rate)
            return
        if self._plain and (now - self._last >= self.every or done >= self.total):
            self._last = now
            line = f"{self.title}: {done}/{self.total} {self.unit}, {now - self._start:.0f} s"
            line += f", {rate}" if rate else ""
            if before < done < self.total:
                line += f", {(now - since) / (done - before) * (self.total - done):.0f} s left"
            sys.stderr.write(f"{line}{', ' + note if note else ''}\n")
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """Write a separate line, unless the report is quiet."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._plain:
            sys.stderr.write(f"{self.title}: {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def stage(title: str, *, quiet: bool = False, every: float = 10.0) -> Iterator[None]:
    """Report a stage of unknown length: a line with the elapsed time every few seconds while it runs.

    Args:
        title: Title of the stage.
        quiet: Disable all output.
        every: Seconds between lines; a shorter stage writes nothing.
    """
    if quiet:
        yield
        return
    start, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(every):
            sys.stderr.write(f"{title}: {time.monotonic() - start:.0f} s\n")
            sys.stderr.flush()

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
