"""Progress of long work: a live bar on a terminal and in a notebook, plain lines on standard error elsewhere."""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from cellplm_jax.errors import visible

_compiled = {"seconds": 0.0, "listening": 0.0}


def compile_seconds() -> float:
    """Return the seconds that JAX has compiled in this process, counted from the first call."""
    # Not imported here: commands that only read files start without JAX.
    jax = sys.modules.get("jax")
    if jax is not None and not _compiled["listening"]:
        _compiled["listening"] = 1.0
        jax.monitoring.register_event_duration_secs_listener(_on_event)
    return _compiled["seconds"]


def _on_event(event: str, seconds: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/backend"):
        _compiled["seconds"] += seconds


def in_notebook() -> bool:
    """Return whether the output is that of a notebook: Jupyter, Colab, VS Code."""
    # A notebook has imported IPython already.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def write_line(text: str) -> None:
    """Write a line to standard error; in a notebook to standard output, which is not shown on red."""
    stream = sys.stdout if in_notebook() else sys.stderr
    stream.write(f"{visible(text)}\n")
    stream.flush()


@contextlib.contextmanager
def named_stage(title: str, *, quiet: bool = False, after: float = 3.0) -> Iterator[None]:
    """Write the name of the work in the block if it takes longer than ``after`` seconds.

    Args:
        title: Name of the stage, such as ``"annotation: reading cells"``.
        quiet: Disable the line.
        after: Seconds.
    """
    timer = threading.Timer(after, write_line, [f"{title} ..."])
    # A waiting timer must not keep the process alive.
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _rate(done: int, seconds: float, unit: str) -> str:
    """Return the throughput, such as ``"1,250 cells/s"``; ``""`` if it is unknown."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    if rate < 1:
        return f"{1 / rate:.1f} s per {unit.removesuffix('s')}"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


class _TerminalBar:
    """A bar of rich."""

    def __init__(self, title: str, total: int, unit: str, first: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            # The bar disappears; `close` writes the final line.
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, note=first, rate="")
        self._bar.start()

    def show(self, done: int, rate: str, note: str, line: str) -> None:
        from rich.markup import escape

        self._bar.update(
            self._task,
            completed=done,
            note=escape(visible(note)),
            rate=rate,
        )

    def say(self, text: str) -> None:
        self._bar.console.print(visible(text), highlight=False, markup=False)

    def close(self, line: str) -> None:
        self._bar.stop()
        if line:
            self.say(line)


class _NotebookBar:
    """A bar of HTML, updated in place; it needs no widgets. A line replaces it at the end."""

    def __init__(self, title: str, total: int, unit: str, first: str):
        from IPython.display import display

        self._total = max(total, 1)
        self._shown = 0.0
        self._handle: Any = display(self._bundle(0, f"{title}: {first}"), raw=True, display_id=True)

    def _bundle(self, done: int, line: str) -> Mapping[str, str]:
        bar = f'<progress value="{done}" max="{self._total}"></progress>'
        return {"text/plain": line, "text/html": f"<div>{bar} {html.escape(line)}</div>"}

    def show(self, done: int, rate: str, note: str, line: str) -> None:
        # Every update is a message to the browser.
        if time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            self._handle.update(self._bundle(done, line), raw=True)

    def say(self, text: str) -> None:
        write_line(text)

    def close(self, line: str) -> None:
        self._handle.update({"text/plain": line, "text/html": html.escape(line)}, raw=True)


class _Lines:
    """Plain lines, one per ``every`` seconds; also one if the first unit takes longer than that."""

    def __init__(self, title: str, every: float, first: str):
        self._every = every
        self._last = time.monotonic()
        self._line = ""
        self._timer = threading.Timer(every, write_line, [f"{title}: {first}, {every:.0f} s"])
        self._timer.daemon = True
        if every >= 1:
            self._timer.start()

    def show(self, done: int, rate: str, note: str, line: str) -> None:
        self._timer.cancel()
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._line = line
            write_line(line)

    def say(self, text: str) -> None:
        write_line(text)

    def __del__(self) -> None:
        # After an error nobody closes the report.
        self._timer.cancel()

    def close(self, line: str) -> None:
        self._timer.cancel()
        # The last update may have written the same line.
        if line and line != self._line:
            write_line(line)


class ProgressReport:
    """Progress of long work: a live bar on a terminal and in a notebook, plain lines elsewhere.

    Every line states the seconds that JAX spent on compiling, if it was a second or more. One line remains at the end.

    Args:
        title: Title of the work.
        total: Total number of units.
        unit: Name of the units, in the plural.
        quiet: Disable all output.
        every: Seconds between plain lines.
        first: Stage until the first unit is finished; with JAX most of it is compiling.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "steps",
        quiet: bool = False,
        every: float = 10,
        first: str = "compiling",
    ):
        self.title = title
        self.total = total
        self.unit = unit
        self.quiet = quiet
        self._start = time.monotonic()
        self._compiled = compile_seconds()
        self._settled: tuple[float, int] | None = None
        self._line = ""
        self._done = 0
        self._stage = ""
        self._out: _TerminalBar | _NotebookBar | _Lines | None = None
        if quiet:
            return
        if in_notebook():
            self._out = _NotebookBar(title, total, unit, first)
        elif sys.stderr.isatty():
            self._out = _TerminalBar(title, total, unit, first)
        else:
            self._out = _Lines(title, every, first)

    @property
    def time_taken(self) -> str:
        """Seconds since the start as text, such as ``"12 s (4 s compiling)"``."""
        seconds = time.monotonic() - self._start
        # Threads compile at the same time, so the sum can exceed the elapsed time.
        compiled = min(compile_seconds() - self._compiled, seconds)
        text = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
        return f"{text} ({compiled:.0f} s compiling)" if compiled >= 1 else text

    def update(self, done: int, note: str = "") -> None:
        """Report that ``done`` units are finished."""
        if self._out is None:
            return
        now = time.monotonic()
        if self._settled is None:
            # Rates start at the second unit, because the first one includes the compilation.
            self._settled = (now, done)
        since, before = self._settled
        rate = _rate(done - before, now - since, self.unit)
        line = f"{self.title}: {done:,}/{self.total:,} {self.unit}, {self.time_taken}"
        line += f", {rate}" if rate else ""
        if before < done < self.total:
            line += f", {(now - since) / (done - before) * (self.total - done):.0f} s left"
        note = ", ".join(filter(None, (self._stage, note)))
        self._line = f"{line}{', ' + note if note else ''}"
        self._done = done
        self._out.show(done, rate, note, self._line)

    def stage(self, name: str) -> None:
        """Name the stage that begins."""
        self._stage = name
        self.update(self._done)

    def say(self, text: str) -> None:
        """Write a separate line, unless the report is quiet."""
        if self._out is not None:
            self._out.say(text if isinstance(self._out, _TerminalBar) else f"{self.title}: {text}")

    def close(self, summary: str = "") -> None:
        """Finish: replace the bar by a line.

        Args:
            summary: The line; "": that of the last update.
        """
        if self._out is not None:
            self._out.close(summary or self._line)
            self._out = None


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
    start = time.monotonic()
    done = threading.Event()

    def report() -> None:
        while not done.wait(every):
            write_line(f"{title}: {time.monotonic() - start:.0f} s")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
