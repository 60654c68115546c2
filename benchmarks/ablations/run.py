"""The ablations: what each part of the recipe adds, asked at a size that two CPU cores can answer.

    python benchmarks/ablations/run.py --data DIR --corpus CORPUS --runs RUNS

Four parts, any of which can be named alone with ``--parts``:

- ``pretraining``: ``:small`` and presets that leave out one part, with the same steps, batches and seeds.
- ``scaling``: the start of ``:small`` with fewer components and from fewer datasets.
- ``contexts``: the bundled model with contexts of 1 to 32,768 cells at inference.
- ``positions``: genes that follow a spatial gradient of simulated tissue, imputed with and without positions.

DIR holds ``.h5ad`` files of raw counts, those trained on also in DIR/corpus; ``pretraining.py`` names the files that
stay out of the corpus. If CORPUS is not a corpus, it is prepared there first, as by::

    cellplm prepare FILES --out CORPUS --sample-key batch --minimum-prevalence 0.1

Results are kept in OUT.json, part by part and seed by seed, so a run that was stopped continues; ``--again PART``
repeats one. OUT.md and OUT.png are written at the end of every part, and by ``--parts`` without any.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine, versions_of

HERE = Path(__file__).resolve().parent
PARTS = ("pretraining", "scaling", "contexts", "positions")
PACKAGES = ("cellplm-jax", "jax", "flax", "optax", "anndata", "scanpy", "numpy")


class Results:
    """Rows of results in a JSON file, one for each part, name and seed.

    Args:
        path: The file; read where it is there.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, as the file has them now: parts may be run side by side."""
        return json.loads(self.path.read_text()) if self.path.is_file() else []

    def forget(self, part: str) -> None:
        """Drop the rows of a part."""
        self._write([row for row in self.rows if row["part"] != part])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(partial, self.path)

    def add(self, part: str, name: str, seed: int, settings: dict[str, Any], make: Any) -> None:
        """Make a row and write it down, unless it is there.

        Args:
            part: Of :data:`PARTS`.
            name: Variant.
            seed: Seed.
            settings: What the rows of a part have to agree on.
            make: Function without arguments that returns ``{"scores": ..., "facts": ...}``.
        """
        for row in self.rows:
            if row["part"] == part and row["settings"] != settings:
                raise SystemExit(
                    f"{self.path} has {part} with {row['settings']}, and {settings} was asked for: "
                    f"give another --out, or --again {part}"
                )
            if (row["part"], row["name"], row["seed"]) == (part, name, seed):
                return
        began = time.monotonic()
        found = make()
        row = {
            "part": part,
            "name": name,
            "seed": seed,
            "settings": settings,
            **found,
            "seconds": round(time.monotonic() - began, 1),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": {"python": platform.python_version(), **versions_of(PACKAGES)},
        }
        self._write([*self.rows, row])
        said = "  ".join(f"{key} {value:.3f}" for key, value in row["scores"].items())
        print(f"{part} {name} seed {seed}: {said}  ({row['seconds']} s)", flush=True)


def main() -> None:
    """Run what is asked for and missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the .h5ad files")
    parser.add_argument("--corpus", type=Path, help="default: RUNS/corpus")
    parser.add_argument("--runs", type=Path, default=Path("ablation_runs"), help="where runs go")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", nargs="*", choices=PARTS, default=[], help="parts to repeat")
    parser.add_argument("--variants", nargs="*", help="some of the pretraining variants")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of pretraining")
    parser.add_argument("--cells", type=int, default=512, help="cells of a pretraining batch")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "ablations", help="path without suffix")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What is compiled for one seed serves the next.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.runs.resolve() / "compiled"))

    results = Results(args.out.with_suffix(".json"))
    for part in args.again:
        results.forget(part)
    if set(args.parts) - {"positions"} and args.data is None:
        parser.error("--data is needed")
    for part in args.parts:
        if part == "pretraining":
            run_pretraining(args, results)
        elif part == "scaling":
            run_scaling(args, results)
        elif part == "contexts":
            from contexts import run_contexts

            run_contexts(args.data, results)
        else:
            from tissue import run_positions

            run_positions(results)
        write(results, args.out)
    write(results, args.out)


def run_pretraining(args: argparse.Namespace, results: Results) -> None:
    """Pretrain every variant, seed by seed."""
    from pretraining import VARIANTS, components, corpus_of, train_and_score

    corpus = corpus_of(args.data, args.corpus or args.runs / "corpus")
    settings = {"steps": args.steps, "cells": args.cells}
    for seed in range(args.seeds):
        for variant in args.variants or VARIANTS:

            def make(variant=variant, seed=seed):
                return train_and_score(
                    variant, seed, corpus=corpus, data=args.data, runs=args.runs, **settings
                )

            results.add("pretraining", variant, seed, settings, make)
    results.add("pretraining", "components", 0, settings, lambda: components(args.data))


def run_scaling(args: argparse.Namespace, results: Results) -> None:
    """Score smaller projections, seed by seed."""
    from pretraining import COMPONENTS, SHARES, corpus_of, scaled

    corpus = corpus_of(args.data, args.corpus or args.runs / "corpus")
    for seed in range(args.seeds):
        for share in SHARES:
            for components in COMPONENTS:

                def make(components=components, share=share, seed=seed):
                    return scaled(components, share, seed, corpus=corpus, data=args.data)

                results.add("scaling", f"{components} {share}", seed, {}, make)


def write(results: Results, out: Path) -> None:
    """Write tables and chart."""
    from tables import write_tables

    write_tables(results.rows, out)


if __name__ == "__main__":
    main()
