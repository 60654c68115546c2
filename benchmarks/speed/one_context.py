"""Embed files of growing size as ONE context each: time, memory, waiting, and the error against a single pass.

    python benchmarks/speed/one_context.py --out benchmarks/speed/one_context

Cells are those of the bundled PBMC3k, drawn again and thinned, in an uncompressed ``.h5ad``. Every size is a process of
its own that embeds with the bundled ``small`` model; the smallest is also embedded in passes over chunks, which it need
not, and compared with its single pass. Files are made in ``--folder`` and removed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine, versions_of

BLOCK = 20_000


def make_file(path: Path, cells: int, seed: int = 0) -> int:
    """Write an uncompressed AnnData file of made-up cells block by block; return its stored counts.

    Args:
        path: The ``.h5ad`` file.
        cells: Its rows.
        seed: Of the draw.
    """
    import anndata
    import h5py
    import pandas as pd
    from anndata.io import write_elem
    from scipy import sparse

    import cellplm_jax as cellplm

    real = cellplm.datasets.pbmc3k()
    counts = sparse.csr_matrix(real.X, dtype=np.int64)
    random = np.random.default_rng(seed)
    empty = anndata.AnnData(
        obs=pd.DataFrame(index=pd.RangeIndex(cells).astype(str)), var=real.var[[]]
    )
    with h5py.File(path, "w") as file:
        write_elem(file, "/", empty)
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": (cells, real.n_vars),
            }
        )
        data = group.create_dataset("data", (0,), "float32", maxshape=(None,), chunks=(1 << 20,))
        indices = group.create_dataset(
            "indices", (0,), "int32", maxshape=(None,), chunks=(1 << 20,)
        )
        indptr = np.zeros(cells + 1, np.int64)
        stored = 0
        for start in range(0, cells, BLOCK):
            block = counts[random.integers(0, counts.shape[0], min(BLOCK, cells - start))]
            block.data = random.binomial(block.data, 0.8)
            block.eliminate_zeros()
            for dataset, values in ((data, block.data), (indices, block.indices)):
                dataset.resize((stored + len(values),))
                dataset[stored:] = values
            indptr[start + 1 : start + 1 + block.shape[0]] = stored + block.indptr[1:]
            stored += block.nnz
        group.create_dataset("indptr", data=indptr)
    return stored


def measure(path: Path, streamed: bool, out: Path | None) -> dict[str, Any]:
    """Embed a file in this process.

    Args:
        path: The file.
        streamed: Whether small contexts go in passes too.
        out: Where the embedding goes as ``.npy``.
    """
    import jax

    import cellplm_jax as cellplm
    from cellplm_jax.data.anndata_io import open_counts
    from cellplm_jax.tasks import long_context
    from cellplm_jax.tasks.bench import peak_memory
    from cellplm_jax.tasks.embed import embed_source
    from cellplm_jax.tasks.long_context import IOWait

    if streamed:
        long_context.STREAM_CELLS, long_context.STREAM_CHUNK = 1, 1024
    model = cellplm.load("small")
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], sum(array.nbytes for array in jax.live_arrays()))

    with open_counts(path, model.genes) as source:
        # Compiles every program on cells of the same shapes, so that the clock sees none of it.
        if source.cells > long_context.STREAM_CELLS:
            first = np.arange(long_context.STREAM_CELLS + 1)
        else:
            first = np.arange(source.cells)
        embed_source(source, model, groups=[first], spatial_key=None)
        waiting = IOWait()
        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        embedding = embed_source(source, model, spatial_key=None, waiting=waiting)
        seconds = time.perf_counter() - began
        stop.set()
        watcher.join()
    if out is not None:
        np.save(out, embedding)
    return {
        "seconds": seconds,
        "waiting_share": waiting.seconds / max(waiting.total, 1e-9),
        "embedder_seconds": waiting.total,
        "device_mib": most[0] / 2**20,
        "process_mib": peak_memory(),
        "finite": bool(np.isfinite(embedding).all()),
    }


def main() -> None:
    """Measure every size and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="*", type=int, default=[10_000, 50_000, 200_000, 1_000_000]
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each size; the fastest counts"
    )
    parser.add_argument("--folder", type=Path, help="where the files are made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "one_context")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        path, streamed, out = args.one
        print(json.dumps(measure(Path(path), streamed == "streamed", Path(out) if out else None)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as directory:

        def run(path: Path, streamed: bool, out: str = "") -> dict[str, Any]:
            command = [
                sys.executable,
                __file__,
                "--one",
                str(path),
                "streamed" if streamed else "plain",
                out,
            ]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if done.returncode:
                sys.exit(done.stderr)
            return json.loads(done.stdout.splitlines()[-1])

        difference = None
        for cells in args.sizes:
            path = Path(directory, f"{cells}.h5ad")
            stored = make_file(path, cells)
            plain = f"{directory}/plain.npy" if cells == min(args.sizes) else ""
            runs = [run(path, False, plain) for _ in range(args.repeats)]
            if plain:
                run(path, True, f"{directory}/streamed.npy")
                one, other = np.load(plain), np.load(f"{directory}/streamed.npy")
                difference = float(np.abs(one - other).max() / np.abs(one).max())
            best = min(runs, key=lambda row: row["seconds"])
            rows.append(
                {
                    "cells": cells,
                    "nonzeros": stored,
                    **best,
                    "all_seconds": [r["seconds"] for r in runs],
                }
            )
            print(
                f"{cells} cells: {best['seconds']:.1f} s, {cells / best['seconds']:.0f} cells/s, "
                f"waiting {best['waiting_share']:.1%}, device {best['device_mib']:.0f} MiB, "
                f"process {best['process_mib']:.0f} MiB",
                flush=True,
            )
            path.unlink()
    content = {
        "machine": machine(), "date": time.strftime("%Y-%m-%d"),
        "versions": versions_of(("jax", "jaxlib", "flax", "numpy", "numba")),
        "difference": difference, "rows": rows,
    }  # fmt: skip
    args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(content))


def exponent(rows: list[dict[str, Any]]) -> float:
    """Return the slope of log seconds over log cells."""
    logs = [(math.log(row["cells"]), math.log(row["seconds"])) for row in rows]
    x, y = np.array(logs).T
    return float(np.polyfit(x, y, 1)[0])


def table(content: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    rows = content["rows"]
    streamed = [row for row in rows if row["cells"] > 32_768]
    lines = [
        "# A whole file as one context",
        "",
        f"`python benchmarks/speed/one_context.py --sizes {' '.join(str(row['cells']) for row in rows)}`, "
        "bundled `small` model, float32, "
        f"{content['machine']}, {content['date']}, "
        + ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        + ".",
        "",
        "Every row is one context: all its cells attend to one another. The time is that of embedding alone, compiled "
        'before; "waiting" is the share of the embedder\'s time in which no counts were ready.',
        "",
        "| cells | stored counts | seconds | cells/s | waiting | arrays on the device, MiB | process, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['cells']:,} | {row['nonzeros']:,} | {row['seconds']:.1f} | {row['cells'] / row['seconds']:,.0f} "
        f"| {row['waiting_share']:.1%} | {row['device_mib']:.0f} | {row['process_mib']:.0f} |"
        for row in rows
    ]
    lines += [
        "",
        f"Exponent of time over cells, all sizes: {exponent(rows):.3f}"
        + (f"; of those that go in passes: {exponent(streamed):.3f}" if len(streamed) > 1 else "")
        + ". "
        + (
            f"Device memory of the largest against the smallest that goes in passes: "
            f"{streamed[-1]['device_mib'] / streamed[0]['device_mib']:.2f}. "
            if len(streamed) > 1
            else ""
        )
        + f"In passes against a single pass at {rows[0]['cells']:,} cells: largest difference "
        f"{content['difference']:.1e} of the largest value.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
