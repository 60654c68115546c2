"""Embed a million generated cells, and watch the memory of the process.

    python benchmarks/faults/million.py --cells 1000000 --out benchmarks/faults/million

The file has sparse counts of the genes of the model in tissue samples of 5,000 cells; it is written in chunks. The
command runs in its own process, whose resident memory is read twice per second. Writes OUT.md; the exit status is 1 if
memory grows by more than a fifth between the second and the last quarter of the time, or if a file is left behind.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from cellplm_jax.presets import preset
from cellplm_jax.tasks.pretrained import Pretrained, load

SAMPLE, CHUNK = 5000, 50_000


def write_cells(path: Path, cells: int, genes: list[str], nonzeros: int) -> None:
    """Write random counts as CSR, with constant memory."""
    random = np.random.default_rng(0)
    each = min(nonzeros, len(genes))
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        x.attrs["shape"] = np.array([cells, len(genes)])
        total = cells * each
        indices = x.create_dataset("indices", (total,), "i4")
        data = x.create_dataset("data", (total,), "f4")
        x["indptr"] = np.arange(cells + 1, dtype=np.int64) * each
        for start in range(0, cells, CHUNK):
            rows = min(CHUNK, cells - start)
            chosen = np.argpartition(
                random.random((rows, len(genes)), np.float32), each - 1, axis=1
            )
            part = slice(start * each, (start + rows) * each)
            indices[part] = np.sort(chosen[:, :each], axis=1).ravel()
            data[part] = random.geometric(0.4, rows * each)
        names = pd.Index(np.char.add("cell", np.arange(cells).astype(str)).astype(object))
        sample = pd.Categorical((np.arange(cells) // SAMPLE).astype(str))
        write_elem(file, "obs", pd.DataFrame({"sample": sample}, index=names))
        write_elem(file, "var", pd.DataFrame(index=pd.Index(genes, dtype=object)))
        for group in ("obsm", "uns"):
            write_elem(file, group, {})


def resident(process: int) -> float:
    """Return the resident memory of a process in MB; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6
    except (OSError, IndexError):
        return 0.0


def main() -> int:
    """Generate, embed, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--nonzeros", type=int, default=500, help="stored counts per cell")
    parser.add_argument("--model", help="source of a model; random weights of :debug by default")
    parser.add_argument("--genes", type=int, default=2000, help="genes of the random model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellplm-million-") as name:
        folder = Path(name)
        if arguments.model:
            model = load(arguments.model)
        else:
            genes = [f"ENSG{number:011d}" for number in range(arguments.genes)]
            model = Pretrained.untrained(preset("debug", len(genes)).model, genes)
        model.save(folder / "model")
        write_cells(folder / "cells.h5ad", arguments.cells, model.genes, arguments.nonzeros)
        size = (folder / "cells.h5ad").stat().st_size / 1e6
        command = [
            sys.executable,
            "-m",
            "cellplm_jax.cli",
            "embed",
            "cells.h5ad",
            "--model",
            "model",
        ]
        command += ["--batch-key", "sample", "--out", "out.h5ad"]
        began, memory = time.monotonic(), []
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, stderr=log)
            while process.poll() is None:
                memory.append(resident(process.pid))
                time.sleep(0.5)
        seconds, used = time.monotonic() - began, os.times()
        if process.returncode:
            sys.stderr.write((folder / "log").read_text())
            return 1
        with h5py.File(folder / "out.h5ad") as file:
            rows = file["obsm/X_cellplm"].shape[0]
        left = sorted(
            {p.name for p in folder.iterdir()} - {"model", "cells.h5ad", "out.h5ad", "log"}
        )
        quarters = [max(part) for part in np.array_split(np.array(memory), 4)]
    flat = quarters[3] <= 1.2 * quarters[1]
    lines = [
        f"# Embedding {arguments.cells:,} cells",
        "",
        f"Made by `million.py` on {os.cpu_count()} shared CPU cores with the model `{model.id}`: {size:,.0f} MB of "
        f"generated counts, {arguments.nonzeros} per cell, in samples of {SAMPLE:,} cells. {seconds / 60:.0f} "
        f"minutes, {(used.children_user + used.children_system) / 60:.1f} minutes of processor time. "
        f"{rows:,} cells were embedded; left behind: {', '.join(left) or 'nothing'}.",
        "",
        "| quarter of the time | highest resident memory, MB |",
        "|---:|---:|",
        *(f"| {number} | {value:,.0f} |" for number, value in enumerate(quarters, 1)),
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
    return 0 if flat and not left and rows == arguments.cells else 1


if __name__ == "__main__":
    sys.exit(main())
