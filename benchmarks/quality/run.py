"""The quality benchmark: this project, the original CellPLM and established methods on the same splits of real data.

    python benchmarks/quality/run.py annotation --data DIR --rivals ENV/bin/python

Tasks: annotation, imputation, denoising, integration, perturbation. Rivals have an environment of their own:

    python3.11 -m venv ENV && ENV/bin/pip install -r benchmarks/quality/rivals.txt
    ENV/bin/pip install --no-deps cellplm==0.1.0.post2

Every method runs as a process of its own, one after another, with the same two files in front of it. What is done is
kept in ``results/TASK.json``, so a run that was stopped goes on; ``--again METHOD`` repeats one. ``quality.md`` and
``quality.json`` are made from all tasks' results at the end of every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine
from problems import DATASETS, ONE_BATCH, make_problem
from scoring import score
from tables import write_tables

from cellplm_jax.errors import CellPLMError

INTEGRATORS = {("integration", name) for name in ("scratch", "small", "Harmony")}
"""Methods that need several batches."""

HERE = Path(__file__).resolve().parent


def methods_of(task: str, python: str, worker: str) -> list[str]:
    """Return the names of a worker's methods for a task, asked of the worker itself."""
    code = f"import {worker}; print('\\n'.join(m for t, m in {worker}.METHODS if t == {task!r}))"
    done = subprocess.run([python, "-c", code], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python} cannot import {worker}.py:\n{done.stderr.strip().splitlines()[-1]}")
    return done.stdout.split("\n")[:-1]


def run_method(
    python: str, worker: str, task: str, method: str, problem: Path, seed: int, limit: int
) -> dict[str, Any]:
    """Run a method on a problem; return its scores, seconds and versions, or the error."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "prediction.npz")
        command = [python, f"{HERE}/{worker}.py", task, method, str(problem), str(seed), str(out)]
        environment = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {limit} s"}
        report = out.with_suffix(".json")
        if not report.is_file():
            return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        row = json.loads(report.read_text())
        if "error" not in row:
            try:
                row["scores"] = score(task, problem, out)
            except CellPLMError as error:  # the table says so, and the other methods go on
                row["error"] = str(error)
        return row


def main() -> None:
    """Run what is asked for and missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=[*DATASETS, "tables"], help="'tables': only write them")
    parser.add_argument("--data", type=Path, help="directory with the .h5ad files")
    parser.add_argument("--rivals", help="Python with rivals.txt installed; without: ours alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--datasets", nargs="*", help="some of the task's")
    parser.add_argument("--methods", nargs="*", help="some of the task's")
    parser.add_argument("--again", nargs="*", default=[], help="methods to repeat")
    parser.add_argument("--limit", type=int, default=1800, help="seconds a fit may take")
    parser.add_argument("--out", type=Path, default=HERE, help="where results and tables go")
    parser.add_argument("--problems", type=Path, help="where problems are kept; default: nowhere")
    args = parser.parse_args()
    results = args.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    if args.task != "tables":
        if args.data is None:
            parser.error("--data is needed to run a task")
        workers = {
            name: ("ours", sys.executable) for name in methods_of(args.task, sys.executable, "ours")
        }
        if args.rivals:
            found = methods_of(args.task, args.rivals, "rivals")
            workers |= {name: ("rivals", args.rivals) for name in found}
        chosen = args.methods or list(workers)
        unknown = [name for name in [*chosen, *args.again] if name not in workers]
        if unknown:
            parser.error(f"no method {unknown[0]!r}; there are: {', '.join(map(repr, workers))}")
        scratch = tempfile.TemporaryDirectory(prefix="cellplm-quality-")
        keep = args.problems or Path(scratch.name)
        path = results / f"{args.task}.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        rows = [row for row in rows if row["method"] not in args.again]
        done = {(row["dataset"], row["seed"], row["method"]) for row in rows if "scores" in row}
        for seed in range(args.seeds):
            for dataset in args.datasets or DATASETS[args.task]:
                problem = keep / args.task / Path(dataset).name / str(seed)
                for method in chosen:
                    key = (Path(dataset).name, seed, method)
                    if key in done or (dataset in ONE_BATCH and (args.task, method) in INTEGRATORS):
                        continue
                    make_problem(args.task, args.data, dataset, seed, problem)
                    worker, python = workers[method]
                    row = run_method(python, worker, args.task, method, problem, seed, args.limit)
                    row = {"dataset": key[0], "seed": seed, "method": method,
                           "machine": machine(), "date": time.strftime("%Y-%m-%d"), **row}  # fmt: skip
                    rows = [r for r in rows if (r["dataset"], r["seed"], r["method"]) != key]
                    rows.append(row)
                    path.write_text(json.dumps(rows, indent=1) + "\n")
                    said = row.get("error") or "  ".join(
                        f"{name} {value:.3f}" for name, value in row["scores"].items()
                    )
                    print(
                        f"{key[0]} seed {seed}  {method}: {said}  ({row.get('seconds', '-')} s)",
                        flush=True,
                    )
    write_tables(results, args.out)


if __name__ == "__main__":
    main()
