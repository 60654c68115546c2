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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

from cellplm_jax.train.metrics import embedding_flops, model_flops, peak_flops

HERE = Path(__file__).resolve().parent

# Workers import what this program can.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

CHUNK = 256
# Rounding alone leaves the cosine of two embeddings of a cell above this; another mixture component does not.
SAME = 0.9995
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "original": ("original", {}),
    "ours": ("ours", {}),
    "ours, bfloat16": ("ours", {"precision": "bfloat16"}),
    "ours, chunked": ("ours", {"chunk_cells": CHUNK}),
    "ours, chunked, bfloat16": ("ours", {"chunk_cells": CHUNK, "precision": "bfloat16"}),
    "ours, chunked, recomputed": ("ours", {"chunk_cells": CHUNK, "rematerialize": True}),
    "ours, chunked, recomputed, bfloat16": (
        "ours",
        {"chunk_cells": CHUNK, "rematerialize": True, "precision": "bfloat16"},
    ),
}
EMBED_SIDES = ("original", "ours", "ours, bfloat16")
TRAIN_SIDES = ("original", "ours", "ours, chunked", "ours, chunked, bfloat16")


class Side:
    """A process that runs a job whenever it is told to.

    Args:
        name: One of :data:`SIDES`.
        job: What both sides are told.
        directory: Where results go.
    """

    def __init__(self, name: str, job: dict[str, Any], directory: Path):
        worker, changes = SIDES[name]
        self.name, self.seconds = name, []
        self.job = {**job, **changes}
        if job["task"] == "embed":
            self.job["result"] = str(directory / f"{name.replace(', ', '-')}.npy")
        platform = {"JAX_PLATFORMS": "cpu"} if job["device"] == "cpu" else {}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / f"{worker}.py"), json.dumps(self.job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, **platform},
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

    def finish(self) -> dict[str, Any]:
        """End the process; return its peak memory and versions."""
        self.tell("end")
        last = self.answer()
        self.process.wait()
        return last


def compare(job: dict[str, Any], names: tuple[str, ...], repeats: int) -> list[dict]:
    """Run a job on several sides in turn.

    Args:
        job: Task, counts, cells, weights, device.
        names: Sides, the original first.
        repeats: Rounds.

    Returns:
        A row a side.
    """
    flops = flops_of(job)
    with tempfile.TemporaryDirectory() as directory:
        # One after another, or preparing one would disturb the other's compilation time.
        sides, started = [], []
        for name in names:
            side = Side(name, job, Path(directory))
            started.append(side.answer())
            sides.append(side)
        for _ in range(repeats):
            for side in sides:
                side.run()
        rows = []
        for side, start in zip(sides, started, strict=True):
            end = side.finish()
            rows.append(
                {
                    "task": job["task"], "counts": job["counts"], "cells": job["cells"],
                    "side": side.name, "seconds": side.seconds, "flops": flops,
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
                cosine = (found * theirs).sum(1)
                cosine /= np.linalg.norm(found, axis=1) * np.linalg.norm(theirs, axis=1)
                row["least_cosine"] = float(cosine.min())
                row["cells_apart"] = int((cosine < SAME).sum())
        return rows


def flops_of(job: dict[str, Any]) -> float:
    """Return the operations that the task asks for, as ``cellplm_jax.train.metrics`` counts them."""
    from counts import make_counts

    from cellplm_jax.config import TrainConfig
    from cellplm_jax.interop.torch_checkpoint import model_config

    config = model_config(json.loads(Path(job["prefix"] + ".config.json").read_text()))
    stored = make_counts(job["counts"], job["cells"]).nnz
    if job["task"] == "embed":
        return embedding_flops(config, job["cells"], stored)
    run = TrainConfig(model=config)
    kept = 1.0 - run.masking.drop_cells
    return model_flops(run, kept * job["cells"], kept * stored)


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
    peak: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        prefix = str(Path(directory, "published"))
        write = [sys.executable, str(HERE / "original.py"), "write-weights", prefix]
        subprocess.run(write, check=True, env=ENVIRONMENT)
        for task in args.tasks:
            # Of these minutes: a virtual machine is not as fast in every hour.
            peak[task] = {kind: peak_flops(kind)[0] for kind in ("float32", "bfloat16")}
            for counts in args.counts:
                for cells in args.cells:
                    job = {"task": task, "counts": counts, "cells": cells, "prefix": prefix,
                           "device": args.device, "precision": "float32", "chunk_cells": 0,
                           "rematerialize": False}  # fmt: skip
                    names = EMBED_SIDES if task == "embed" else TRAIN_SIDES
                    names = tuple(n for n in names if args.sides is None or n in args.sides)
                    found = compare(job, names, args.repeats)
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


def ranged(middle: float, low: float, high: float) -> str:
    """Return a median with its range, which belong on one line."""
    return f"{middle:.2f} ({low:.2f} to {high:.2f})".replace(" ", "\N{NO-BREAK SPACE}")


def table_versions(rows: list[dict[str, Any]]) -> str:
    """Return the versions of what ran, in words."""
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def table(content: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    peak, rows = content["matmul_flops"], content["rows"]
    sizes = " ".join(str(cells) for cells in sorted({row["cells"] for row in rows}))
    lines = [
        "# Speed beside the original",
        "",
        f"`python benchmarks/speed/run.py --device {content['device']} --cells {sizes}` on {content['machine']}, "
        f"{content['date']}, {table_versions(rows)}.",
        "",
        "The published architecture (82.4 M parameters, 19,374 genes), the same weights and cells on both sides. Each "
        f"side is a process; runs alternate, {content['repeats']} of each after one that compiles. 'Times': the median "
        "over rounds of the original's seconds over ours, with the smallest and largest round. Memory is "
        "the most that the process ever held, loading included.",
        "",
        f"'synthetic': about 1,500 stored counts a cell. 'chunked': `chunk_cells={CHUNK}`. In training, 30 % of the "
        "cells are dropped on both sides; cells/s count those that were read. The latent mean follows the most "
        "probable of sixteen components. Where two of them tie, rounding decides: the last column counts them.",
    ]
    for task, title in (("embed", "Embedding"), ("train", "A training step")):
        found = [row for row in rows if row["task"] == task]
        if not found:
            continue
        names = ["counts", "cells", "", "cells/s", "times", "peak MiB", "of the original's"]
        names += ["first run, s", "share of peak"]
        if task == "embed":
            names += ["largest difference", "least cosine", f"cells under {SAME}"]
        reached = " and ".join(f"{peak[task][k] / 1e9:,.0f} GFLOP/s in {k}" for k in peak[task])
        lines += ["", f"## {title}", "", f"Before these runs, matrix products reached {reached}."]
        lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in found:
            low, high = row["speedup_range"]
            kind = "bfloat16" if "bfloat16" in row["side"] else "float32"
            share = row["flops"] / statistics.median(row["seconds"]) / peak[task][kind]
            cells = [
                row["counts"], f"{row['cells']:,}", row["side"], f"{row['cells_per_second']:,.0f}",
                ranged(row["speedup"], low, high), f"{row['peak_mib']:,.0f}",
                f"{row['memory_ratio']:.2f}", f"{row['first_s']:.1f}", f"{share:.0%}",
            ]  # fmt: skip
            if task == "embed":
                cells += [f"{row['largest_difference']:.1e}", f"{row['least_cosine']:.6f}"]
                cells.append(str(row["cells_apart"]))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
