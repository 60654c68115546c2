"""Make a synthetic corpus for measuring the loader.

Sample sizes are log-normal (median 900 cells, sigma 1) as in public collections; a cell has about 1,500 stored counts
over 19,374 genes. The numbers mean nothing: only their sizes do.

Example::

    python benchmarks/load/make_corpus.py 1000000 /tmp/corpus
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellplm_jax.data.corpus_writer import PartSample, PartWriter, write_genes, write_index

GENES = 19_374
CELLS_PER_PART = 100_000
BLOCK = 4096
BLOCKS = 8


def sample_sizes(cells: int, generator: np.random.Generator) -> np.ndarray:
    """Return log-normal sample sizes (median 900, sigma 1) that add up to ``cells``, int64 [samples]."""
    sizes = np.maximum(2, generator.lognormal(np.log(900), 1.0, cells // 200 + 10).astype(int))
    ends = np.cumsum(sizes)
    number = int(np.searchsorted(ends, cells)) + 1
    sizes = sizes[:number]
    sizes[-1] -= int(ends[number - 1] - cells)
    if number > 1 and sizes[-1] < 2:
        sizes[-2] += sizes[-1]
        sizes = sizes[:-1]
    return sizes


def sorted_genes(nonzeros: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return rising gene indices for cells of these many stored counts, uint16 [total].

    Steps of a random walk scaled to the vocabulary: as irregular as real gene sets, and no sorting.
    """
    total = int(nonzeros.sum())
    steps = generator.exponential(size=total).astype(np.float32)
    walk = np.cumsum(steps, dtype=np.float64)
    ends = np.cumsum(nonzeros)
    starts = ends - nonzeros
    before = np.where(starts > 0, walk[np.maximum(starts - 1, 0)], 0.0)
    # The room between neighbours is spread by the walk; position j of n itself keeps them distinct.
    length = (walk[ends - 1] - before) * 1.001 + 1e-6
    room = GENES - nonzeros
    position = np.arange(total) - np.repeat(starts, nonzeros)
    share = (walk - np.repeat(before, nonzeros)) * np.repeat(room / length, nonzeros)
    return (share.astype(np.int64) + position).astype(np.uint16)


def make(cells: int, out: Path, *, nonzeros: int = 1500, seed: int = 0) -> dict[str, float]:
    """Write the corpus.

    Args:
        cells: Number of cells.
        out: New folder.
        nonzeros: Stored counts of a cell, on average.
        seed: Seed.

    Returns:
        Cells, samples, stored counts and seconds.
    """
    start = time.perf_counter()
    generator = np.random.default_rng(seed)
    genes = [f"ENSG{number:011d}" for number in range(GENES)]
    write_genes(out, genes)
    sizes = sample_sizes(cells, generator)
    part_of = np.minimum(np.cumsum(sizes) - sizes, cells - 1) // CELLS_PER_PART
    names = []
    # Cells are drawn once and reused, block by block, with other counts: drawing costs more than writing.
    counts = np.minimum(generator.geometric(0.4, 1 << 24), 65_535).astype(np.uint16)
    lengths = generator.normal(nonzeros, nonzeros / 5, (BLOCKS, BLOCK)).astype(np.int64)
    lengths = np.clip(lengths, max(1, nonzeros // 5), 2 * nonzeros)
    drawn = [sorted_genes(block, generator) for block in lengths]
    for part in np.unique(part_of):
        members = sizes[part_of == part]
        total = int(members.sum())
        chosen = generator.integers(0, BLOCKS, -(-total // BLOCK))
        per_cell = lengths[chosen].reshape(-1)[:total]
        name = f"synthetic_{int(part):03d}"
        names.append(name)
        with PartWriter(out, name, genes, per_cell) as writer:
            for number, block in enumerate(chosen):
                length = int(per_cell[number * BLOCK : (number + 1) * BLOCK].sum())
                shift = int(generator.integers(0, len(counts) - length))
                writer.append(drawn[block][:length], counts[shift : shift + length])
            writer.finish(
                [PartSample(f"sample {i}", int(n)) for i, n in enumerate(members)],
                dataset_name=name,
                cell_names=[f"cell {i}" for i in range(total)],
            )
    totals = write_index(out, names)["totals"]
    return {**totals, "seconds": round(time.perf_counter() - start, 2)}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and make the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=int, help="number of cells")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--nonzeros", type=int, default=1500, help="stored counts of a cell (1500)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    facts = make(arguments.cells, arguments.out, nonzeros=arguments.nonzeros, seed=arguments.seed)
    json.dump(facts, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
