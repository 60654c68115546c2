"""Kill a pretraining run with SIGKILL at random moments, resume it each time, and compare with one left alone.

    python benchmarks/robustness/kill_resume.py --kills 20 --out benchmarks/robustness/kill_resume

A small model on made-up cells saves every few steps, so that many kills fall into a save. Moments are drawn from the
whole life of a process: start, compilation, training, saving. At the end parameters, optimizer state and metrics must
be those of the uninterrupted run, bit for bit. Writes OUT.md and OUT.json; exit status 1 where they are not.
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
import time
from pathlib import Path
from typing import Any

import numpy as np

CLOCK = (
    "time",
    "cells_per_second",
    "nonzeros_per_second",
    "data_wait",
    "eta_seconds",
    "model_flop_utilisation",
)


def train(workdir: str, steps: int) -> int:
    """Run or resume the small run; SIGTERM saves the step and leaves with status 143.

    Args:
        workdir: Its work directory.
        steps: Its length.
    """
    import dataclasses

    from scipy import sparse

    from cellplm_jax.data.batches import MemoryStore, Sample
    from cellplm_jax.presets import preset
    from cellplm_jax.train.loop import pretrain

    random = np.random.default_rng(0)
    programmes = random.gamma(0.6, 2.0, (3, 60))
    samples = []
    for number, cells in enumerate((90, 40, 150, 60)):
        counts = random.poisson(programmes[random.integers(0, 3, cells)])
        samples.append(
            Sample(
                name=f"sample {number}",
                counts=sparse.csr_matrix(counts.astype(np.float32)),
                coordinates=random.random((cells, 2)).astype(np.float32) if number % 2 else None,
                batch=number,
                dataset=0,
            )
        )
    config = preset("debug", 60)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, rows=8, cells=16),
        steps=steps,
        log_every=1,
        evaluate_every=10,
        checkpoint_every=5,
    )
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

    def on_step(step: int) -> None:
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()

    result = pretrain(
        config,
        MemoryStore(samples, [f"gene{n}" for n in range(60)]),
        workdir,
        quiet=True,
        on_step=on_step,
        preempted=lambda step: bool(asked),
    )
    return 143 if result.preempted else 0


class Child:
    """A process that trains.

    Args:
        workdir: Work directory of the run.
        steps: Length of the run.
        cache: Folder of compiled programs, shared by all processes.
    """

    def __init__(self, workdir: Path, steps: int, cache: Path):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
            ),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(workdir), "--steps", str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_for_step(self, step: int) -> None:
        """Wait until the process has taken a step, or has ended."""
        for line in self.process.stdout or ():
            if int(line) >= step:
                return

    def finish(self) -> int:
        """Wait for the process to end by itself; return its status, and raise what it said where it failed."""
        _, said = self.process.communicate()
        if self.process.returncode not in (0, 143):
            raise RuntimeError(said)
        return self.process.returncode


def final_state(workdir: Path) -> list[np.ndarray]:
    """Return every array of the last checkpoint."""
    import jax

    from cellplm_jax.train.checkpoint import restore_item

    step = max(steps_of(workdir))
    items = [restore_item(workdir, item=item, step=step)[0] for item in ("params", "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(items)]


def steps_of(workdir: Path) -> list[int]:
    """Return the complete checkpoint steps."""
    if not workdir.is_dir():
        return []
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    """Return the metrics without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off
        rows.append({name: value for name, value in row.items() if name not in CLOCK})
    return rows


def differing_bytes(one: Path, two: Path) -> int:
    """Return how many bytes differ between the last checkpoints of two runs."""
    first, second = (
        np.frombuffer(b"".join(leaf.tobytes() for leaf in final_state(run)), np.uint8)
        for run in (one, two)
    )
    return (
        int((first != second).sum()) if first.size == second.size else max(first.size, second.size)
    )


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="prefix of the tables; without it they are shown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return train(arguments.child, arguments.steps)

    random = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed, cache = (Path(folder) / name for name in ("alone", "killed", "cache"))
        Child(alone, 5, cache).finish()  # fills the cache of compiled programs
        shutil.rmtree(alone)
        began = time.monotonic()
        child = Child(alone, arguments.steps, cache)
        child.wait_for_step(1)
        starting = time.monotonic() - began
        child.finish()
        training = time.monotonic() - began - starting
        rows = []
        for number in range(1, arguments.kills + 1):
            # A quarter of the kills while a process starts; the others soon enough that the run outlives them all.
            child = Child(killed, arguments.steps, cache)
            while_starting = bool(random.random() < 0.25)
            if while_starting:
                delay = float(random.uniform(0, starting))
            else:
                child.wait_for_step(1)
                delay = float(random.uniform(0, 1.5 * training / arguments.kills))
            time.sleep(delay)
            running = child.process.poll() is None
            child.process.send_signal(signal.SIGKILL)
            child.process.communicate()
            steps, lines = steps_of(killed), lines_of(killed)
            rows.append(
                {
                    "kill": number,
                    "while": "starting" if while_starting else "training",
                    "seconds": round(delay, 2),
                    "running": running,
                    "last_logged_step": max((row["step"] for row in lines), default=None),
                    "last_saved_step": steps[-1] if steps else None,
                    "in_a_save": any(killed.glob("*.orbax-checkpoint-tmp*")),
                }
            )
            sys.stderr.write(f"{rows[-1]}\n")
        Child(killed, arguments.steps, cache).finish()
        result = {
            "steps": arguments.steps,
            "seed": arguments.seed,
            "seconds_uninterrupted": round(starting + training, 1),
            "values": sum(leaf.size for leaf in final_state(alone)),
            "differing_bytes": differing_bytes(alone, killed),
            "metrics_lines": len(lines_of(alone)),
            "metrics_equal": lines_of(alone) == lines_of(killed),
            "kills": rows,
        }
    table = ["| " + " | ".join(rows[0]).replace("_", " ") + " |", "|---:" * len(rows[0]) + "|"]
    table += [
        "| " + " | ".join("-" if v is None else str(v) for v in row.values()) + " |" for row in rows
    ]
    text = (
        f"# A run killed {len(rows)} times\n\n"
        f"Made by `kill_resume.py --kills {len(rows)} --steps {arguments.steps} --seed {arguments.seed}` on "
        f"{os.cpu_count()} CPU cores. Uninterrupted, the run takes {starting + training:.0f} s, of which "
        f"{starting:.0f} s to its first step; seconds below count from the start of the process or from its first "
        f"step. It saves every 5 steps.\n\n"
        f"After the last resume: {result['differing_bytes']} bytes differ among {result['values']:,} numbers of "
        f"parameters and optimizer state; the {result['metrics_lines']} lines of metrics are "
        f"{'equal' if result['metrics_equal'] else 'NOT equal'} but for the clock.\n\n"
        + "\n".join(table)
        + "\n"
    )
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(text)
    return 0 if result["differing_bytes"] == 0 and result["metrics_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
