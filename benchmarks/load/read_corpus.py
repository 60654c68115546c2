"""Measure how fast training batches come out of a corpus, and write the table beside this file.

Every repeat reads one epoch of the corpus: windows and small samples packed into rows of 2,048 cells, laid out as numpy
arrays, by the threads of one process. Memory is that of the whole process, looked at after every batch. A few epochs
with other numbers of threads follow.

Example::

    python benchmarks/load/make_corpus.py 1000000 /tmp/corpus
    python benchmarks/load/read_corpus.py /tmp/corpus
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cellplm_jax.config import DataConfig, ModelConfig, TrainConfig
from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.data.pipeline import TrainingBatches, split_heldout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import processor

OTHER_THREADS = (1, 2, 4)
OTHER_EPOCHS = 4
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_mib() -> float:
    """Return the memory of this process in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MIB


def read_epochs(batches: TrainingBatches, epochs: int) -> list[dict]:
    """Read whole epochs, one after another, and time each.

    Args:
        batches: What to read.
        epochs: How many.

    Returns:
        For each epoch its cells, stored counts, seconds, processor seconds, and the memory after every batch.
    """
    found = []
    for epoch in range(epochs):
        first = epoch * batches.steps_per_epoch
        cells = nonzeros = 0
        memory, load = [], os.getloadavg()[0]
        began, processor_began = time.perf_counter(), time.process_time()
        for batch in batches.iterate(first, first + batches.steps_per_epoch):
            cells += int(np.count_nonzero(batch.cell_mask))
            nonzeros += int(np.asarray(batch.indptr)[..., -1].sum())
            memory.append(resident_mib())
        seconds = time.perf_counter() - began
        found.append(
            {
                "cells": cells,
                "nonzeros": nonzeros,
                "seconds": round(seconds, 2),
                "cells_per_second": round(cells / seconds),
                "processor_seconds": round(time.process_time() - processor_began, 2),
                "load_before": round(load, 1),
                "memory_mib": [round(value) for value in memory],
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Read the corpus several times and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--repeats", type=int, default=12, help="epochs read (12)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (8)")
    parser.add_argument("--cells", type=int, default=2048, help="cells of a row (2048)")
    parser.add_argument("--threads", type=int, default=4, help="reading threads (4)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for tables")
    arguments = parser.parse_args(argv)

    store = open_corpus(arguments.corpus)
    data = DataConfig(rows=arguments.rows, cells=arguments.cells, threads=arguments.threads)
    config = TrainConfig(model=ModelConfig(genes=len(store.genes)), data=data)
    train, _ = split_heldout(store, data, config.seed)
    began = time.perf_counter()
    batches = TrainingBatches(store, train, config)
    planning = time.perf_counter() - began
    epochs = read_epochs(batches, arguments.repeats)
    compared = {}
    for threads in OTHER_THREADS:
        changed = dataclasses.replace(config, data=dataclasses.replace(data, threads=threads))
        compared[threads] = read_epochs(TrainingBatches(store, train, changed), OTHER_EPOCHS)

    memory = np.array([value for epoch in epochs for value in epoch["memory_mib"]])
    seen = np.cumsum(
        np.repeat([e["cells"] / len(e["memory_mib"]) for e in epochs], len(memory) // len(epochs))
    )
    later = slice(len(memory) // 2, None)
    slope = float(np.polyfit(seen[later], memory[later], 1)[0] * 1e6)
    rates = [epoch["cells_per_second"] for epoch in epochs]
    facts = {
        "machine": {
            "processor": f"{os.cpu_count()} CPU cores ({processor()})",
            "python": platform.python_version(),
            "nice": os.nice(0),
        },
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("tensorstore", "grain", "numpy", "jax")},
        "corpus": {
            "cells": sum(sample.cells for sample in store.samples),
            "samples": len(store.samples),
            "genes": len(store.genes),
            "nonzeros": sum(sample.nonzeros for sample in store.samples),
        },
        "settings": {
            "rows": data.rows,
            "cells": data.cells,
            "segments": data.segments,
            "threads": data.threads,
            "prefetch": data.prefetch,
        },
        "planning_seconds": round(planning, 2),
        "rows_per_epoch": batches.rows_per_epoch,
        "padding_of_cells": round(batches.padding, 4),
        "padding_of_nonzeros": round(
            1
            - sum(store.samples[part.sample].nonzeros for part in train)
            / (batches.rows_per_epoch * batches.nonzeros),
            4,
        ),
        "cells_per_second": {
            "median": round(statistics.median(rates)),
            "lowest": min(rates),
            "highest": max(rates),
        },
        "memory_mib": {
            "median": round(float(np.median(memory))),
            "highest": int(memory.max()),
            "after_tenth_half_and_all": [
                int(memory[max(0, int(share * len(memory)) - 1)]) for share in (0.1, 0.5, 1.0)
            ],
            "growth_per_million_cells": round(slope, 1),
        },
        "epochs": epochs,
        "threads": compared,
    }
    (arguments.out / "read_corpus.json").write_text(json.dumps(facts) + "\n")
    corpus = facts["corpus"]
    table = [
        "# Reading a corpus",
        "",
        f"`python benchmarks/load/read_corpus.py CORPUS --rows {data.rows} --cells {data.cells} "
        f"--threads {data.threads}`",
        f"on {facts['machine']['processor']}, {facts['date']}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + ".",
        "",
        f"Corpus of `make_corpus.py`: {corpus['cells']:,} cells, {corpus['samples']} samples (log-normal sizes, median "
        f"900, sigma 1), {corpus['nonzeros'] / corpus['cells']:,.0f} counts a cell,",
        f"{corpus['genes']:,} genes; a tenth of the samples is held out. Laying out the run took "
        f"{facts['planning_seconds']} s: {batches.rows_per_epoch} rows an epoch,",
        f"{100 * batches.padding:.1f} % of the cell places and {100 * facts['padding_of_nonzeros']:.1f} % of the count "
        "places empty. Each line is one epoch, read in another order and other windows;",
        f"the load average is that of the machine before it began, other work included; this program ran at nice "
        f"{facts['machine']['nice']}.",
        "",
        "| epoch | cells/s | cells | seconds | processor seconds | cells a processor second | load before "
        "| memory, median (MiB) | highest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    table += [
        f"| {number} | {epoch['cells_per_second']:,} | {epoch['cells']:,} | {epoch['seconds']} "
        f"| {epoch['processor_seconds']} | {epoch['cells'] / epoch['processor_seconds']:,.0f} "
        f"| {epoch['load_before']} | {statistics.median(epoch['memory_mib']):.0f} "
        f"| {max(epoch['memory_mib'])} |"
        for number, epoch in enumerate(epochs)
    ]
    table += [
        "",
        f"Median {facts['cells_per_second']['median']:,} cells/s ({min(rates):,} to {max(rates):,}), "
        f"{statistics.median(e['nonzeros'] / e['seconds'] for e in epochs) / 1e6:,.0f} million counts/s. Memory after "
        f"10, 50 and 100 % of the run:",
        ", ".join(str(value) for value in facts["memory_mib"]["after_tenth_half_and_all"])
        + f" MiB; it changes by {slope:+.1f} MiB a million cells in the second half.",
        "",
        f"{OTHER_EPOCHS} epochs each, afterwards, with other numbers of threads:",
        "",
        "| threads | cells/s, median | lowest | highest | million counts/s | cells a processor second | load before |",
        "|---|---|---|---|---|---|---|",
    ]
    for threads, runs in compared.items():
        speeds = [run["cells_per_second"] for run in runs]
        counts = statistics.median(run["nonzeros"] / run["seconds"] for run in runs) / 1e6
        cost = sum(run["cells"] for run in runs) / sum(run["processor_seconds"] for run in runs)
        table.append(
            f"| {threads} | {statistics.median(speeds):,.0f} | {min(speeds):,} | {max(speeds):,} | {counts:,.0f} "
            f"| {cost:,.0f} | {runs[0]['load_before']} |"
        )
    (arguments.out / "read_corpus.md").write_text("\n".join(table) + "\n")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
