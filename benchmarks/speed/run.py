"""The speed benchmark: this project and the original CellPLM side by side, the same weights and the same cells.

    make .venv/.parity && .venv/bin/python benchmarks/speed/run.py --device cpu

Each side is a process of its own that waits for its turn; runs alternate, so that what disturbs the machine disturbs
both. Embedding: the original is handed tensors that are ready, this project an AnnData, and both return host arrays.
Training: one step of AdamW on the published objective, masks and dropped cells included. Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from machine import machine

SIDES = {
    "original": ("original", {}),
    "ours": ("ours", {}),
    "ours, bfloat16": ("ours", {"precision": "bfloat16"}),
    "ours, chunked": ("ours", {"chunk_cells": 128}),
}
EMBED_SIDES = ("original", "ours", "ours, bfloat16")
TRAIN_SIDES = ("original", "ours", "ours, chunked", "ours, bfloat16")


class Side:
    """A process that runs a job whenever it is told to.

    Args:
        name: One of :data:`SIDES`.
        job: What both sides are told.
        python: The interpreter.
        directory: Where results go.
    """

    def __init__(self, name: str, job: dict[str, Any], python: str, directory: Path):
        worker, changes = SIDES[name]
        self.name, self.seconds = name, []
        self.job = {**job, **changes}
        if job["task"] == "embed":
            self.job["result"] = str(directory / f"{name.replace(', ', '-')}.npy")
        # Torch does not set its own number of threads from affinity alone; jax takes what it finds.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        if job["device"] == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self.process = subprocess.Popen(
            [python, str(HERE / f"{worker}.py"), json.dumps(self.job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """Wait for the process's next line of JSON; other output is passed over."""
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name}: the process ended early; its message is above")

    def tell(self, word: str) -> None:
        """Send a line."""
        print(word, file=self.process.stdin, flush=True)

    def run(self) -> None:
        """Run the job once."""
        self.tell("run")
        self.seconds.append(self.answer()["seconds"])


def compare(job: dict[str, Any], names: tuple[str, ...], python: str, repeats: int) -> list[dict]:
    """Run a job on several sides in turn.

    Args:
        job: Task, counts, cells, weights, device.
        names: Sides, the original first.
        python: The interpreter of both.
        repeats: Rounds.

    Returns:
        A row a side.
    """
    with tempfile.TemporaryDirectory() as directory:
        # One after another, or preparing one would disturb the other's compilation time.
        sides, started = [], []
        for name in names:
            side = Side(name, job, python, Path(directory))
            started.append(side.answer())
            sides.append(side)
        for _ in range(repeats):
            for side in sides:
                side.run()
        rows = []
        for side, start in zip(sides, started, strict=True):
            side.tell("end")
            end = side.answer()
            side.process.wait()
            rows.append(
                {
                    "task": job["task"], "counts": job["counts"], "cells": job["cells"],
                    "side": side.name, "seconds": side.seconds,
                    "cells_per_second": job["cells"] / statistics.median(side.seconds),
                    **start, **end,
                }
            )  # fmt: skip
        for row, side in zip(rows, sides, strict=True):
            # In the same round both met the same weather: ratios are taken round by round.
            ratios = [a / b for a, b in zip(sides[0].seconds, side.seconds, strict=True)]
            row["speedup"] = statistics.median(ratios)
            row["speedup_range"] = [min(ratios), max(ratios)]
            row["memory_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
            if "result" in side.job:
                theirs, found = (np.load(s.job["result"]) for s in (sides[0], side))
                row["largest_difference"] = float(
                    np.abs(found - theirs).max() / np.abs(theirs).max()
                )
                row["least_cosine"] = float(
                    (
                        (found * theirs).sum(1)
                        / np.linalg.norm(found, axis=1)
                        / np.linalg.norm(theirs, axis=1)
                    ).min()
                )
        return rows


def matmul_peak() -> dict[str, float]:
    """Return this machine's measured float32 and bfloat16 matrix products, FLOP/s."""
    code = (
        "import json, time, jax, jax.numpy as jnp\n"
        "found = {}\n"
        "for kind in ('float32', 'bfloat16'):\n"
        "    a = jnp.ones((2048, 2048), kind); f = jax.jit(jnp.matmul); f(a, a).block_until_ready()\n"
        "    times = []\n"
        "    for _ in range(7):\n"
        "        t = time.perf_counter(); f(a, a).block_until_ready(); times.append(time.perf_counter() - t)\n"
        "    found[kind] = 2 * 2048**3 / min(times)\n"
        "print(json.dumps(found))"
    )
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def main() -> None:
    """Run what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tasks", nargs="*", default=["embed", "train"])
    parser.add_argument("--counts", nargs="*", default=["synthetic", "pbmc3k"])
    parser.add_argument("--cells", nargs="*", type=int, default=[500, 2000])
    parser.add_argument("--sides", nargs="*", help="some of: " + ", ".join(SIDES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "speed", help="without suffix")
    args = parser.parse_args()
    peak = matmul_peak()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        prefix = str(Path(directory, "published"))
        write = [sys.executable, str(HERE / "original.py"), "write-weights", prefix]
        subprocess.run(
            write, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        for task in args.tasks:
            for counts in args.counts:
                for cells in args.cells:
                    job = {"task": task, "counts": counts, "cells": cells, "prefix": prefix,
                           "device": args.device, "precision": "float32", "chunk_cells": 0}  # fmt: skip
                    names = EMBED_SIDES if task == "embed" else TRAIN_SIDES
                    names = tuple(n for n in names if args.sides is None or n in args.sides)
                    found = compare(job, names, sys.executable, args.repeats)
                    rows += found
                    for row in found:
                        print(
                            f"{task} {counts} {cells} cells  {row['side']}: "
                            f"{row['cells_per_second']:.0f} cells/s, {row['speedup']:.2f} times "
                            f"({row['speedup_range'][0]:.2f} to {row['speedup_range'][1]:.2f}), "
                            f"{row['peak_mib']:.0f} MiB, difference {row.get('largest_difference', 0):.1e}",
                            flush=True,
                        )
    content = {
        "machine": machine(), "device": args.device, "date": time.strftime("%Y-%m-%d"),
        "repeats": args.repeats, "matmul_flops": peak, "rows": rows,
    }  # fmt: skip
    args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(content))


def table(content: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    return json.dumps(content)


if __name__ == "__main__":
    main()
