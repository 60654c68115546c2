"""What checksums and the test for finite weights cost: load the bundled model and embed, with and without them.

    python benchmarks/faults/cost.py --out benchmarks/faults/cost

Pairs of runs in one process, in alternating order. Writes OUT.md: medians of the
processor time, and the median ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cellplm_jax as cellplm
from benchmarks.machine import machine
from cellplm_jax.manifest import Manifest
from cellplm_jax.train import checkpoint


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Read checkpoints without checksums, and without looking for NaN."""
    with (
        mock.patch.object(Manifest, "_compare", return_value=None),
        mock.patch.object(checkpoint, "_check_finite", return_value=None),
    ):
        yield


def pairs(action: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Return the median processor seconds with and without the checks, and the median ratio."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for checked in (True, False) if number % 2 else (False, True):
            with contextlib.nullcontext() if checked else unchecked():
                began = time.process_time()
                action()
                if number:  # the first round compiles
                    seconds[checked].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    medians = [statistics.median(seconds[checked]) for checked in (True, False)]
    return medians[0], medians[1], statistics.median(ratios)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, cells = cellplm.load("small"), cellplm.datasets.pbmc3k()
    rows = {
        'load("small")': pairs(lambda: cellplm.load("small"), arguments.rounds),
        f"embed {cells.n_obs:,} cells": pairs(
            lambda: cellplm.embed(cells, model, quiet=True), arguments.rounds // 4
        ),
    }
    lines = ["# Cost of the checks", "", f"`python benchmarks/faults/cost.py`; {machine()}", ""]
    lines += ["| processor time | with, s | without, s | ratio of pairs |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {a:.3f} | {b:.3f} | {r:.3f} |" for name, (a, b, r) in rows.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
