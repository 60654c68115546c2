"""Speed of this commit relative to an older one: embedding, training step, ``cellplm embed`` as a process, import.

    make .venv/.parity && .venv/bin/python benchmarks/speed/commits.py OLD_COMMIT

The older commit is checked out next to this one and runs its own benchmark programs. Runs alternate, in an order that
changes every round. The model is the published architecture with random weights, because the bundled one
differs between commits. Every process starts with an empty compilation cache,
and counts its compilations in the log of JAX. Writes ``commits.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CELLS = 2000
COMMAND = "from cellplm_jax.cli import main; main()"
CELLS_FILE = """
import json, sys
import anndata, numpy as np
from counts import make_counts
from ours import opened
cells = anndata.AnnData(make_counts("synthetic", int(sys.argv[3])))
cells.var_names = list(opened({"prefix": sys.argv[1]}).genes)
cells.write_h5ad(sys.argv[2])
"""


def environment(tree: Path, cache: Path) -> dict[str, str]:
    """Return the environment of a process of one commit, with a compilation cache of its own."""
    paths = os.pathsep.join(map(str, [tree, tree / "benchmarks", tree / "benchmarks" / "speed"]))
    return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1",
            "CELLPLM_CACHE": str(cache)}  # fmt: skip


def compilations(log: Path) -> int:
    """Return the number of compiled programs in the log of a process."""
    return log.read_text().count("Finished XLA compilation")


def timed(command: list[str], env: dict[str, str], log: Path) -> tuple[float, float]:
    """Run a command; return its seconds and its processor seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as file:
        subprocess.run(command, env=env, check=True, stdout=file, stderr=file)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def process(command: list[str], tree: Path, log: Path) -> tuple[float, float]:
    """Run Python code of one commit, with the path of a new output as its last argument."""
    with tempfile.TemporaryDirectory() as own:
        arguments = [sys.executable, "-c", *command, str(Path(own, "out.h5ad"))]
        return timed(arguments, environment(tree, Path(own, "cache")), log)


class Worker:
    """The worker process of one commit for a task of ``ours.py``."""

    def __init__(self, tree: Path, job: dict[str, Any], directory: Path):
        self.log = directory / f"{job['task']}.log"
        self.process = subprocess.Popen(
            [sys.executable, str(tree / "benchmarks" / "speed" / "ours.py"), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env=environment(tree, directory / job["task"]),
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next line of JSON."""
        for line in self.process.stdout or ():
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"the worker ended early: {self.log.read_text()[-500:]}")

    def run(self) -> tuple[float, float]:
        """Run the task once; return its seconds and the processor seconds of the process."""
        before = self.processor()
        print("run", file=self.process.stdin, flush=True)
        return self.answer()["seconds"], self.processor() - before

    def processor(self) -> float:
        """Return the processor seconds of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """End the process."""
        print("end", file=self.process.stdin, flush=True)
        self.process.wait()


def alternate(pair: dict[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run two functions in turn, the order changing every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pair}
    for number in range(rounds):
        for name in list(pair)[:: 1 if number % 2 else -1]:
            found[name].append(pair[name]())
    return found


def row(title: str, found: dict[str, list[tuple[float, float]]], counted: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [title]
    for kind in (0, 1):
        for name in ("old", "new"):
            values = [pair[kind] for pair in found[name]]
            cells.append(
                f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            )
        ratios = [
            new[kind] / max(old[kind], 1e-9)
            for new, old in zip(found["new"], found["old"], strict=True)
        ]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    cells.append(f"{counted['old']} / {counted['new']}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="the older commit")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    names = {
        name: subprocess.check_output([*git, "log", "-1", "--format=%h", commit], text=True).strip()
        for name, commit in (("old", args.old), ("new", "HEAD"))
    }
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        trees = {name: folder / name for name in names}
        for name, commit in names.items():
            subprocess.run(
                [*git, "worktree", "add", "-q", "--detach", str(trees[name]), commit], check=True
            )
        try:
            rows = compare(folder, trees, args.rounds)
        finally:
            for tree in trees.values():
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    sys.path.insert(0, str(HERE.parent))
    from machine import machine

    lines = [
        f"# Speed of {names['new']} relative to {names['old']}",
        "",
        f"`python benchmarks/speed/commits.py {names['old']} --rounds {args.rounds}` on {machine()}, "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        f"Runs alternate. Median of {args.rounds} rounds (smallest to largest); ratio: new over old, by round. "
        f"Embedding and training step: {CELLS:,} cells with about 1,500 stored counts, published architecture "
        "(82.4 M parameters), after one run that compiles. `cellplm embed`: a process with the same cells and model, "
        "from file to file. Compilations: of a process with an empty cache.",
        "",
        "| | s, old | s, new | ratio | processor s, old | processor s, new | ratio | compilations, old / new |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    (HERE / "commits.md").write_text("\n".join(lines) + "\n")


def compare(folder: Path, trees: dict[str, Path], rounds: int) -> list[str]:
    """Return the rows of the table."""
    rows = []
    prefix = str(folder / "published")
    write = [sys.executable, str(HERE / "original.py"), "write-weights", prefix]
    timed(write, environment(ROOT, folder / "cache"), folder / "weights.log")
    for task, title in (("embed", "embedding"), ("train", "training step")):
        job = {"task": task, "counts": "synthetic", "cells": CELLS, "prefix": prefix, "device": "cpu",
               "precision": "float32", "chunk_cells": 0, "rematerialize": False}  # fmt: skip
        workers = {}
        for name, tree in trees.items():
            (folder / f"of-{name}").mkdir(exist_ok=True)
            workers[name] = Worker(tree, job, folder / f"of-{name}")
        found = alternate({name: worker.run for name, worker in workers.items()}, rounds)
        for worker in workers.values():
            worker.end()
        counted = {name: compilations(worker.log) for name, worker in workers.items()}
        rows.append(row(title, found, counted))
        print(rows[-1], flush=True)
    model, cells, old = folder / "model", folder / "cells.h5ad", environment(trees["old"], folder)
    convert = [
        "convert",
        f"{prefix}.best.ckpt",
        "--config",
        f"{prefix}.config.json",
        "--out",
        str(model),
    ]
    timed([sys.executable, "-c", COMMAND, *convert], old, folder / "convert.log")
    write = [sys.executable, "-c", CELLS_FILE, prefix, str(cells), str(CELLS)]
    timed(write, old, folder / "cells.log")
    commands = {
        "`cellplm embed`": [COMMAND, "embed", str(cells), "--model", str(model), "--out"],
        "import": ["import cellplm_jax; cellplm_jax.embed"],
    }
    for title, command in commands.items():
        logs = {name: folder / f"{name}.log" for name in trees}
        runs = {name: partial(process, command, tree, logs[name]) for name, tree in trees.items()}
        for run in runs.values():
            run()  # the files of the interpreter are then in memory
        found = alternate(runs, rounds)
        rows.append(row(title, found, {name: compilations(log) for name, log in logs.items()}))
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
