"""Measure the memory of a training step as the cells of its batch grow.

    python benchmarks/speed/memory.py --out benchmarks/speed/memory

The published architecture with made-up counts, about 1,500 stored a cell. Every size is a process of its own that takes
two steps; its memory is the most it ever held, compiling included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from machine import machine  # noqa: E402
from run import CHUNK, ENVIRONMENT, Side, table_versions  # noqa: E402

SIDES = (
    "ours, chunked",
    "ours, chunked, bfloat16",
    "ours, chunked, recomputed",
    "ours, chunked, recomputed, bfloat16",
)


def measure(cells: int, side: str, prefix: str) -> dict[str, Any]:
    """Return the peak memory of a process that takes two steps."""
    job = {"task": "train", "counts": "synthetic", "cells": cells, "prefix": prefix,
           "device": "cpu", "precision": "float32", "chunk_cells": 0, "rematerialize": False}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        process = Side(side, job, Path(directory))
        process.answer()
        process.run()
        last = process.finish()
    return {"side": side, "cells": cells, **last}


def slope(rows: list[dict[str, Any]]) -> float:
    """Return the KiB that a cell more takes, by least squares."""
    cells, peak = (np.array([row[name] for row in rows], float) for name in ("cells", "peak_mib"))
    return float(np.polyfit(cells, peak, 1)[0] * 1024)


def table(content: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    rows = content["rows"]
    sizes = " ".join(str(cells) for cells in sorted({row["cells"] for row in rows}))
    lines = [
        "# Memory of a training step",
        "",
        f"`python benchmarks/speed/memory.py --sizes {sizes}` on {content['machine']}, {content['date']}, "
        f"{table_versions(rows)}.",
        "",
        "The published architecture (82.4 M parameters, 19,374 genes), about 1,500 stored counts a cell, 30 % of the "
        f"cells dropped, `chunk_cells={CHUNK}`. A process a row; its memory is the most it ever held: Python, the "
        "compiler, parameters, gradients and both moments included. 'recomputed': `rematerialize=true`, the encoder's "
        "layers computed again in the backward pass.",
        "",
        "| | cells read | peak MiB |",
        "|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['side']} | {row['cells']:,} | {row['peak_mib']:,.0f} |")
    lines.append("")
    for side in SIDES:
        found = slope([row for row in rows if row["side"] == side])
        lines.append(f"A cell more takes {found:.0f} KiB: {side}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000], help="cells read"
    )
    parser.add_argument("--out", type=Path, help="written with .json and .md; default: only shown")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        prefix = str(Path(directory, "published"))
        write = [sys.executable, str(HERE / "original.py"), "write-weights", prefix]
        subprocess.run(write, check=True, env=ENVIRONMENT)
        for side in SIDES:
            for cells in args.sizes:
                rows.append(measure(cells, side, prefix))
                print(json.dumps(rows[-1]), flush=True)
    content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    text = table(content)
    print(text)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
