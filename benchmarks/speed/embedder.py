"""Time the ways of computing the embedder's first product, that of sparse counts with the gene embeddings.

    python benchmarks/speed/embedder.py --out benchmarks/speed/embedder

Each way starts from a chunk of cells as scipy CSR in host memory and ends with what the embedder's first linear layer
gives, on the device: its own conversion and the way to the device are in its time. The published sizes: 19,374 genes,
1,024 wide. Ways are run in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from counts import GENES, make_counts  # noqa: E402
from machine import machine, versions_of  # noqa: E402
from run import ranged  # noqa: E402

from cellplm_jax.kernels.matmul import linear_product  # noqa: E402

HIDDEN = 1024
WAYS = {
    "scattered": "counts go to the device as they are stored and become a dense matrix there: what the embedder "
    "does on an accelerator, and without Numba",
    "stored": "`cellplm_jax.kernels.sparse_numba`, compiled by Numba, on all cores: what it does on a CPU with Numba",
    "scattered, composed": "the same, the gene embeddings multiplied by the linear layer beforehand (inference)",
    "dense on the host": "the dense matrix is made by the host",
    "BCSR": "`jax.experimental.sparse`",
    "scipy": "the host's sparse product, one core",
}


def weights(kind: str) -> dict[str, jax.Array]:
    """Return made-up weights on the device.

    Args:
        kind: Their type.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    table = 0.005 * jax.random.normal(keys[0], (GENES, HIDDEN))
    kernel = jax.random.normal(keys[1], (HIDDEN, HIDDEN)) / np.sqrt(3 * HIDDEN)
    found = {"table": table, "kernel": kernel, "composed": table @ kernel,
             "bias": 0.01 * jax.random.normal(keys[2], (HIDDEN,))}  # fmt: skip
    return {name: value.astype(kind) for name, value in found.items()}


@jax.jit
def finish(hidden: jax.Array, given: dict[str, jax.Array]) -> jax.Array:
    """Apply the linear layer to [cells, hidden]."""
    return jax.nn.relu(linear_product(hidden, given["kernel"]) + given["bias"])


def ways(given: dict[str, jax.Array], counts: Any) -> dict[str, Callable[[], jax.Array]]:
    """Return what is timed for one chunk, by name.

    Args:
        given: From :func:`weights`.
        counts: CSR [cells, genes], float32.
    """
    kind, cells = given["table"].dtype, counts.shape[0]
    gene = counts.indices.astype(np.uint16)
    lengths = np.diff(counts.indptr)

    def dense(count, gene, lengths):
        cell = jnp.repeat(jnp.arange(cells), lengths, total_repeat_length=count.shape[0])
        values = jnp.log1p(count).astype(kind)
        return jnp.zeros((cells, GENES), kind).at[cell, gene.astype(jnp.int32)].set(values)

    @jax.jit
    def scattered(given, *stored):
        return finish(linear_product(dense(*stored), given["table"]), given)

    @jax.jit
    def composed(given, *stored):
        return jax.nn.relu(linear_product(dense(*stored), given["composed"]) + given["bias"])

    @jax.jit
    def from_dense(given, expression):
        return finish(linear_product(jnp.log1p(expression).astype(kind), given["table"]), given)

    @jax.jit
    def bcsr(given, data, indices, indptr):
        matrix = jax_sparse.BCSR((jnp.log1p(data), indices, indptr), shape=(cells, GENES))
        return finish(matrix @ given["table"], given)

    stored = counts.data, gene, lengths
    found: dict[str, Callable[[], jax.Array]] = {
        "scattered": lambda: scattered(given, *stored),
        "scattered, composed": lambda: composed(given, *stored),
        "dense on the host": lambda: from_dense(given, counts.toarray()),
    }
    table = np.asarray(given["table"])
    if given["table"].devices().pop().platform == "cpu":
        # Imported where it is used: an accelerator's machine needs no Numba.
        from cellplm_jax.kernels.sparse_numba import stored_product

        found["stored"] = lambda: finish(
            jnp.asarray(
                stored_product(counts.indptr, counts.indices, np.log1p(counts.data), table)
            ).astype(kind),
            given,
        )
    if kind == jnp.float32:
        found["BCSR"] = lambda: bcsr(given, counts.data, counts.indices, counts.indptr)
        found["scipy"] = lambda: finish(counts.log1p() @ table, given)
    return found


def measure(name: str, kind: str, cells: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row a way: seconds, and the largest difference from the first one.

    Args:
        name: Of the counts.
        kind: Type of weights and products.
        cells: Of the chunk.
        repeats: Rounds.
    """
    counts = make_counts(name, cells)
    found = ways(weights(kind), counts)
    first = {way: np.asarray(run(), np.float32) for way, run in found.items()}
    seconds: dict[str, list[float]] = {way: [] for way in found}
    for _ in range(repeats):
        for way, run in found.items():
            started = time.perf_counter()
            run().block_until_ready()
            seconds[way].append(time.perf_counter() - started)
    wanted = first["scattered"]
    return [
        {
            "counts": name, "type": kind, "cells": cells, "way": way,
            "stored": int(counts.nnz), "seconds": seconds[way],
            "difference": float(np.abs(first[way] - wanted).max() / np.abs(wanted).max()),
            "times": [a / b for a, b in zip(seconds["scattered"], seconds[way], strict=True)],
        }
        for way in found
    ]  # fmt: skip


def table(content: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# The embedder's first product",
        "",
        f"`python benchmarks/speed/embedder.py` on {content['device']}, {content['machine']}, {content['date']}, "
        f"{versions}.",
        "",
        f"Chunks of {content['cells']} cells, {GENES:,} genes, {HIDDEN:,} wide, from CSR in host memory to what the "
        f"first linear layer gives. Medians of {content['repeats']} rounds; 'times': the seconds of the first way over "
        "those of this one, in the same round, with the smallest and largest round.",
        "",
        *(f"- {way}: {what}." for way, what in WAYS.items()),
        "",
        "| counts | type | way | cells/s | times | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        rate = row["cells"] / statistics.median(row["seconds"])
        low, middle, high = min(row["times"]), statistics.median(row["times"]), max(row["times"])
        lines.append(
            f"| {row['counts']} | {row['type']} | {row['way']} | {rate:,.0f} | {ranged(middle, low, high)} "
            f"| {row['difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=512, help="of a chunk")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "embedder", help="without suffix")
    arguments = parser.parse_args()
    rows = [
        row
        for name in ("synthetic", "pbmc3k")
        for kind in ("float32", "bfloat16")
        for row in measure(name, kind, arguments.cells, arguments.repeats)
    ]
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "device": jax.devices()[0].device_kind,
        "versions": versions_of(("jax", "jaxlib", "numpy", "numba", "scipy")),
        "cells": arguments.cells,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(content))
    sys.stdout.write(table(content))


if __name__ == "__main__":
    main()
