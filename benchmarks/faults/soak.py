"""Soak test of pretraining: the same small run is killed at random moments and resumed, again and again.

    python benchmarks/faults/soak.py --minutes 120 --out benchmarks/faults/soak

Each round trains the run of ``benchmarks/robustness/kill_resume.py`` from its start to its end with random SIGKILL,
SIGTERM and SIGINT. After each round the parameters, the optimizer state and the metrics must be those of a run that was
not interrupted, bit for bit, and the work directory must contain nothing else. Processes are forked from one that has
imported everything, so that the time goes into training. Writes OUT.md; the exit status is 1 if a round differs.
"""

# ruff: noqa: E402, I001
from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "robustness"))
CACHE = tempfile.mkdtemp(prefix="cellplm-soak-")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}

# Imported before the fork, but no device is used in this process.
import cellplm_jax.train.loop  # noqa: F401
import kill_resume

EXPECTED = re.compile(
    r"config\.json|genes\.txt|card\.json|manifest\.json|metrics\.jsonl|run\.png|tensorboard(/.*)?|"
    r"\d+(/.*)?|[a-z_]*tfevents[^/]*|events\.out[^/]*"
)
STRAY = re.compile(r"partial|tmp|\.deleted|\.writable")


def fork(work, *arguments: Any) -> tuple[int, int]:
    """Run a function in a forked process; return its number and the pipe of its standard output."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(write, 1)
        os.close(read)
        status = 1
        try:
            status = work(*arguments) or 0
        except KeyboardInterrupt:
            status = 130
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    return process, read


def wait(process: int, pipe: int) -> tuple[int, float]:
    """Wait for a process; return its status and its peak memory in MB."""
    with os.fdopen(pipe, "rb") as file:
        file.read()
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024


def wait_for_step(pipe: int) -> None:
    """Wait until a process has taken a step, or has ended."""
    os.read(pipe, 1)


def compare(alone: str, killed: str) -> int:
    """Return 0 if two finished runs are equal, else 3."""
    one, two = Path(alone), Path(killed)
    same = kill_resume.differing_bytes(one, two) == 0
    return 0 if same and kill_resume.lines_of(one) == kill_resume.lines_of(two) else 3


def unexpected(workdir: Path) -> list[str]:
    """Return files that do not belong to a work directory."""
    names = [path.relative_to(workdir).as_posix() for path in workdir.rglob("*")]
    return [name for name in names if STRAY.search(name) or not EXPECTED.fullmatch(name)]


def main() -> int:
    """Run rounds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    rounds, problems = [], []
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        start = time.monotonic()
        status, memory_alone = wait(*fork(kill_resume.train, str(alone), arguments.steps))
        alone_seconds = time.monotonic() - start
        if status != 0:
            sys.stderr.write(f"the uninterrupted run ended with status {status}\n")
            return 1
        sys.stderr.write(f"alone: {alone_seconds:.0f} s, {memory_alone:.0f} MB\n")
        began = time.monotonic()
        text = ""
        while time.monotonic() - began < 60 * arguments.minutes:
            workdir = Path(folder) / f"round {len(rounds) + 1}"
            kills: Counter[str] = Counter()
            memory, starting = [], 0
            while True:
                process, pipe = fork(kill_resume.train, str(workdir), arguments.steps)
                early = bool(random.random() < 0.2)
                if not early:
                    wait_for_step(pipe)
                time.sleep(float(random.exponential(2 if early else alone_seconds / 8)))
                number = random.choice(
                    [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
                )
                os.kill(process, int(number))
                status, peak = wait(process, pipe)
                memory.append(peak)
                if status == 0:
                    break
                starting += early
                kills[signal.Signals(number).name] += 1
                if status not in (-signal.SIGKILL, -signal.SIGTERM, 130, 143):
                    problems.append(f"round {len(rounds) + 1}: status {status} after {number!r}")
            status, _ = wait(*fork(compare, str(alone), str(workdir)))
            rounds.append(
                {
                    "round": len(rounds) + 1,
                    "kills": sum(kills.values()),
                    **{name: kills[name] for name in ("SIGKILL", "SIGTERM", "SIGINT")},
                    "while starting": starting,
                    "equal": status == 0,
                    "left behind": len(unexpected(workdir)),
                    "first peak MB": round(memory[0]),
                    "highest peak MB": round(max(memory)),
                }
            )
            problems += [f"round {len(rounds)}: {name}" for name in unexpected(workdir)]
            sys.stderr.write(f"{rounds[-1]}\n")
            shutil.rmtree(workdir)
            text = report(arguments, rounds, problems, time.monotonic() - began)
            if arguments.out:
                arguments.out.with_suffix(".md").write_text(text)
    shutil.rmtree(CACHE, ignore_errors=True)
    sys.stdout.write(text)
    return 0 if not problems and all(row["equal"] for row in rounds) else 1


def report(arguments, rounds: list[dict], problems: list[str], seconds: float) -> str:
    """Return the table as Markdown."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = sum(row["kills"] for row in rounds)
    lines = [
        "# Soak test of pretraining",
        "",
        f"Made by `soak.py --minutes {arguments.minutes:g} --steps {arguments.steps} --seed {arguments.seed}` on "
        f"{os.cpu_count()} shared CPU cores. It ran for {seconds / 60:.0f} minutes, "
        f"{(used.ru_utime + used.ru_stime) / 60:.0f} minutes of processor time.",
        "",
        f"{len(rounds)} complete rounds of {arguments.steps} steps, {total} kills. Parameters, optimizer state and "
        f"metrics equal those of the uninterrupted run, bit for bit, in "
        f"{sum(row['equal'] for row in rounds)} of {len(rounds)} rounds. Problems: "
        f"{'; '.join(problems[:10]) or 'none'}.",
        "",
        "| " + " | ".join(rounds[0]) + " |",
        "|---:" * len(rounds[0]) + "|",
        *("| " + " | ".join(map(str, row.values())) + " |" for row in rounds),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
