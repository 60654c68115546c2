"""Measure how fast ``cellplm prepare`` writes a corpus, and write the table beside this file.

The input is synthetic: 100,000 cells with 1,500 counts each on average, 19,374 human genes in an order that is not the
vocabulary's, float32 in an uncompressed ``.h5ad``, as AnnData writes it. Cases: the vocabulary given or chosen (which
reads every file twice), one process or two, and a memory limit far below the file, so that it is spooled.

Example::

    python benchmarks/load/write_corpus.py --work /tmp/benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from make_corpus import BLOCK, GENES, sorted_genes

from cellplm_jax.data.genes import load_human_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import processor

NONZEROS = 1500


def write_input(path: Path, cells: int, seed: int) -> int:
    """Write the synthetic ``.h5ad`` in blocks.

    Args:
        path: The file.
        cells: Its cells.
        seed: Seed.

    Returns:
        Stored counts.
    """
    import anndata
    import h5py
    import pandas as pd

    generator = np.random.default_rng(seed)
    genes = np.array(sorted(load_human_table().symbols)[:GENES], dtype=object)
    per_cell = generator.normal(NONZEROS, NONZEROS / 5, cells).astype(np.int64)
    per_cell = np.clip(per_cell, NONZEROS // 5, 2 * NONZEROS)
    indptr = np.concatenate([[0], np.cumsum(per_cell)])
    obs = pd.DataFrame(
        {"batch": np.sort(generator.integers(0, cells // 900 + 1, cells)).astype(str)}
    )
    obs.index = obs.index.astype(str)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        anndata.io.write_elem(file, "obs", obs)
        anndata.io.write_elem(file, "var", pd.DataFrame(index=generator.permutation(genes)))
        group = file.create_group("X")
        group.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": [cells, GENES],
            }
        )
        group["indptr"] = indptr
        data = group.create_dataset("data", (indptr[-1],), np.float32)
        indices = group.create_dataset("indices", (indptr[-1],), np.int32)
        for start in range(0, cells, BLOCK):
            block = per_cell[start : start + BLOCK]
            low, high = indptr[start], indptr[start + len(block)]
            indices[low:high] = sorted_genes(block, generator)
            data[low:high] = np.minimum(generator.geometric(0.4, high - low), 65_535)
    return int(indptr[-1])


def measure(title: str, files: Sequence[Path], out: Path, cells: int, **options: object) -> dict:
    """Prepare the files in a process of its own.

    Args:
        title: What the case is called.
        files: Inputs.
        out: New corpus; removed afterwards.
        cells: Cells of all of them.
        **options: Of :func:`cellplm_jax.tasks.prepare.prepare`.

    Returns:
        Seconds, cells a second, processor time, the largest memory of a process, and bytes on disk.
    """
    script = (
        "import json, resource, sys\n"
        "from cellplm_jax.tasks.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    files, out, options = json.loads(sys.argv[1])\n"
        "    seconds = prepare(files, out, sample_key='batch', quiet=True, **options)['seconds']\n"
        "    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    memory = max(usage.ru_maxrss for usage in used) / 2**20\n"
        "    print(json.dumps([seconds, sum(u.ru_utime + u.ru_stime for u in used), memory]))\n"
    )
    program = out.parent / "program.py"
    program.write_text(script)
    argument = json.dumps([list(map(str, files)), str(out), options])
    ran = subprocess.run(
        [sys.executable, program, argument], check=True, capture_output=True, text=True
    )
    seconds, processor_seconds, memory = json.loads(ran.stdout)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {
        "case": title,
        "cells": cells,
        "seconds": seconds,
        "cells_per_second": round(cells / seconds),
        "processor_seconds": round(processor_seconds, 1),
        "largest_process_gib": round(memory, 2),
        "bytes_per_count": round(size / (cells * NONZEROS), 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="folder for temporary files (3 GB)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for tables")
    arguments = parser.parse_args(argv)
    cells, load = arguments.cells, os.getloadavg()[0]
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        genes = work / "genes.txt"
        genes.write_text("\n".join(sorted(load_human_table().symbols)[:GENES]))
        whole = work / "whole.h5ad"
        write_input(whole, cells, 0)
        halves = [work / f"half{i}.h5ad" for i in range(2)]
        for number, half in enumerate(halves):
            write_input(half, cells // 2, number + 1)
        given = {"genes": str(genes)}
        limited = {**given, "nonzeros_in_memory": 2**25}
        rows = [
            measure(
                "one file of half the cells, one process, given vocabulary, at most 2^25 counts in memory",
                halves[:1],
                work / "corpus",
                cells // 2,
                **limited,
            ),
            measure(
                "one file, one process, given vocabulary, at most 2^25 counts in memory",
                [whole],
                work / "corpus",
                cells,
                **limited,
            ),
            measure(
                "two files, two processes, given vocabulary",
                halves,
                work / "corpus",
                cells,
                **given,
            ),
            measure("two files, two processes, vocabulary chosen", halves, work / "corpus", cells),
            measure(
                "one file, one process, given vocabulary", [whole], work / "corpus", cells, **given
            ),
        ]
    finally:
        shutil.rmtree(work)
    facts = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_before": load,
        },
        "versions": {
            name: version(name) for name in ("anndata", "tensorstore", "zarr", "scipy", "dask")
        },
        "nonzeros_per_cell": NONZEROS,
        "cases": rows,
    }
    (arguments.out / "write_corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    table = [
        "# Writing a corpus",
        "",
        f"`python benchmarks/load/write_corpus.py --cells {cells}`: {cells:,} synthetic cells, {NONZEROS:,} counts a "
        "cell,",
        f"uncompressed `.h5ad`, {facts['machine']['processor']}, {os.cpu_count()} cores, load average {load:.1f} from "
        "other work before it began.",
        "",
        "| case | seconds | cells/s | processor seconds | largest process (GiB) | bytes a count on disk |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {row['case']} | {row['seconds']} | {row['cells_per_second']:,} | {row['processor_seconds']} "
        f"| {row['largest_process_gib']} | {row['bytes_per_count']} |"
        for row in rows
    ]
    (arguments.out / "write_corpus.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
