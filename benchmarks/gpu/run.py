"""Ten minutes on one card: everything that only a GPU can show, in one command.

    python benchmarks/gpu/run.py --minutes 10 --out gpu-results
    python benchmarks/gpu/run.py --rehearse --out rehearsal          # every stage small, on a CPU

Stages run in order of worth, each part in a process of its own with its share of the time. ``OUT/gpu.json`` and
``OUT/gpu.md`` are written again after every row, so that a run cut off still leaves a table. A part that fails, runs
out of memory or takes too long says so in the table, and the next one runs. ``tools/gpu_bundle.sh`` gathers what a
bare machine needs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from job import HERE, MARK, ROOT, Job, environment
from report import markdown
from stages import STAGES

GRACE = 20.0
"""Seconds that a part may take longer than it was given."""

REHEARSED = 600.0
"""Seconds that a part of a rehearsal may take: it shows that everything runs, however busy the machine is."""

QUICK = "--xla_backend_optimization_level=0"
"""Flags of a rehearsal, most of which is compilation."""

CARD = {
    # Other processes of a stage (the original) need memory as well.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    "JAX_OPTIMIZATION_LEVEL": "O1",
}
"""Settings on a card, where the caller has none."""


class Run:
    """A run: its results so far, and how much time is left.

    Args:
        arguments: The command line.
        scratch: Folder for what is not brought back.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.arguments, self.scratch = arguments, scratch
        self.out: Path = arguments.out
        self.started = time.monotonic()
        self.total = 60.0 * arguments.minutes
        self.content: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "rehearsal": arguments.rehearse,
            "minutes": arguments.minutes,
            "stages": {name: {"title": title, "rows": [], "parts": {}} for name, (title, _, _) in STAGES.items()},
        }  # fmt: skip
        self.corpus, self.peaks = "", {}

    def left(self) -> float:
        """Return the seconds left."""
        if self.arguments.rehearse:
            return REHEARSED
        return self.total - (time.monotonic() - self.started)

    def write(self) -> None:
        """Write the results so far."""
        self.content["seconds"] = round(time.monotonic() - self.started, 1)
        for name, text in (
            ("gpu.json", json.dumps(self.content, indent=1) + "\n"),
            ("gpu.md", markdown(self.content)),
        ):
            part = self.out / f".{name}.partial"
            part.write_text(text, encoding="utf-8")
            part.replace(self.out / name)

    def stage(self, name: str) -> None:
        """Run the parts of a stage."""
        _, parts, share = STAGES[name]
        later = sum(entry[2] for key, entry in STAGES.items() if key >= name and self.wanted(key))
        # What earlier stages left over is shared out among those that are still to come.
        budget = self.left() * share / later
        weights = list(parts.values())
        for number, part in enumerate(parts):
            if self.left() < 5:
                self.content["stages"][name]["parts"][part] = "no time was left"
                continue
            began = time.monotonic()
            seconds = budget * weights[number] / sum(weights[number:])
            self.part(name, part, REHEARSED if self.arguments.rehearse else seconds)
            budget -= time.monotonic() - began
        self.write()

    def wanted(self, stage: str) -> bool:
        """Return whether a stage was asked for."""
        return stage in self.arguments.stages

    def part(self, stage: str, part: str, seconds: float) -> None:
        """Run one part in a process of its own, and take its rows as they come."""
        rows = self.content["stages"][stage]["rows"]
        job = Job(
            part, seconds, self.out, self.scratch, self.arguments.rehearse, self.corpus, self.peaks
        )
        began = time.monotonic()
        last: list[str] = []
        process = subprocess.Popen(
            [sys.executable, str(HERE / "stages.py"), job.text()], env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        limit = min(seconds + GRACE, max(self.left(), 5.0))
        late = threading.Timer(limit, end, [process])
        late.start()
        with (self.out / "run.log").open("a", encoding="utf-8") as log:
            log.write(f"== {stage} {part}: {seconds:.0f} s\n")
            for line in process.stdout or ():
                log.write(line)
                if line.startswith(MARK):
                    row = json.loads(line[len(MARK) :])
                    rows.append({"part": part, **row})
                    self.note(row)
                    self.write()
                    print(f"{stage} {short(row)}", flush=True)
                elif line.strip():
                    last = [*last[-2:], line.strip()[:200]]
        status = process.wait()
        fired = not late.is_alive()
        late.cancel()
        outcome = "done"
        if fired and status:
            outcome = f"stopped after {limit:.0f} s"
        elif status:
            outcome = f"ended with status {status}: {' | '.join(last) or 'no message'}"
        self.content["stages"][stage]["parts"][part] = outcome
        print(f"{stage} {part}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
        self.write()

    def note(self, row: dict[str, Any]) -> None:
        """Keep what later stages need: the peaks."""
        if row.get("what") == "peak":
            self.peaks[row["precision"]] = row.get("flops") or row["bandwidth"]

    def environment(self) -> dict[str, str]:
        """Return the environment of the parts."""
        changes = {"JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled")}
        if self.arguments.rehearse:
            changes |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
            changes["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        else:
            changes |= {name: value for name, value in CARD.items() if name not in os.environ}
        if self.arguments.fail:
            changes["CELLPLM_GPU_FAIL"] = self.arguments.fail
        return environment(**changes)

    def prepare_corpus(self) -> None:
        """Take the corpus that was given, or prepare one from the bundled cells."""
        if self.arguments.corpus is not None:
            self.corpus = str(self.arguments.corpus)
            return
        self.corpus = str(self.scratch / "corpus")
        command = [sys.executable, "-m", "cellplm_jax.cli", "prepare",
                   str(ROOT / "cellplm_jax/resources/pbmc3k.h5ad"), "--out", self.corpus,
                   "--workers", "0", "--quiet"]  # fmt: skip
        done = subprocess.run(
            command, env={**self.environment(), "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
        )  # fmt: skip
        if done.returncode:
            print(f"no corpus could be prepared: {done.stderr.strip()[-300:]}", flush=True)
            self.corpus = ""


def end(process: subprocess.Popen) -> None:
    """End a part and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def short(row: dict[str, Any]) -> str:
    """Return a row for the terminal."""
    shown = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row.items()
        if value is not None and not isinstance(value, dict | list)
    )
    return " ".join(shown)[:220]


def main() -> int:
    """Run the command line; returns the exit status: 0 if the table is complete, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="time (10)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    parser.add_argument("--rehearse", action="store_true", help="every stage small, on a CPU")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="prepared corpus (bundled cells)"
    )
    parser.add_argument("--stages", default="abcdefg", metavar="LETTERS", help="some of abcdefg")
    parser.add_argument("--fail", metavar="PART", help="make a part fail, to test the others")
    arguments = parser.parse_args()
    if set(arguments.stages) - set(STAGES):
        parser.error(f"--stages {arguments.stages}; expected some of {''.join(STAGES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out = arguments.out.resolve()
    (arguments.out / "run.log").unlink(missing_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="cellplm-gpu-"))
    run = Run(arguments, scratch)
    try:
        run.prepare_corpus()
        for name in STAGES:
            if run.wanted(name):
                run.stage(name)
    finally:
        run.write()
        shutil.rmtree(scratch, ignore_errors=True)
    print((arguments.out / "gpu.md").read_text(encoding="utf-8"))
    return 0 if complete(run.content, arguments.stages) else 1


def complete(content: dict[str, Any], stages: str) -> bool:
    """Return whether every stage has a finished row; of a rehearsal also whether nothing failed or was stopped."""
    for name in stages:
        stage = content["stages"][name]
        finished = [row for row in stage["rows"] if "failed" not in row and "skipped" not in row]
        broken = [row for row in stage["rows"] if "failed" in row]
        stopped = [outcome for outcome in stage["parts"].values() if outcome != "done"]
        if not finished or (content["rehearsal"] and (broken or stopped)):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
