"""Benchmarks of embedding, training and reading on this machine, used by ``cellplm bench``.

Each measurement runs once to compile, which is reported separately, and then several times; rates use the median. The
benchmark against the original, ``benchmarks/speed``, alternates the same calls with it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import jax
import numpy as np
from scipy import sparse

from cellplm_jax._version import __version__
from cellplm_jax.config import TrainConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.batches import Sample, pad_batch
from cellplm_jax.data.corpus import is_corpus, open_corpus
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.embed import CHUNK_CELLS, embed
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.metrics import embedding_flops, model_flops, peak_flops
from cellplm_jax.train.sharding import make_mesh
from cellplm_jax.train.step import compile_training_step, create_sharded_state


def made_up_counts(cells: int, genes: int, nonzeros: int, *, seed: int = 0) -> sparse.csr_matrix:
    """Return random counts with the sparsity of a tissue: skewed gene abundances, Poisson numbers of genes per cell.

    Args:
        cells: Rows.
        genes: Columns.
        nonzeros: Average number of stored counts per cell; not above ``genes``.
        seed: Random seed.

    Returns:
        float32 CSR [cells, genes].
    """
    random = np.random.default_rng(seed)
    log_abundance = 1.5 * random.standard_normal(genes)
    columns, values = [], []
    for _ in range(cells):
        number = int(np.clip(random.poisson(nonzeros), 1, genes))
        # Gumbel top-k: a draw without replacement, proportional to abundance.
        score = log_abundance + random.gumbel(size=genes)
        chosen = np.sort(np.argpartition(score, genes - number)[genes - number :])
        columns.append(chosen)
        values.append(1.0 + random.poisson(0.3 * np.exp(log_abundance[chosen])))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in columns])])
    data = np.concatenate(values).astype(np.float32)
    return sparse.csr_matrix((data, np.concatenate(columns), indptr), shape=(cells, genes))


def machine_facts() -> dict[str, Any]:
    """Return the processor or accelerator, cores and versions of this machine."""
    device = jax.local_devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cellplm_jax": __version__,
    }


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> float:
    """Return the peak memory of this process in MiB: of the device if available, else of the host."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 2**20
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _timed(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    # The median: single runs are disturbed by other processes.
    median = statistics.median(seconds)
    return {
        "seconds": [round(value, 4) for value in seconds],
        "median_seconds": round(median, 4),
        # The first run compiles, or loads compiled programs from the cache.
        "compile_seconds": round(max(first - median, 0.0), 2),
    }


def _rates(
    cells: int,
    timed: dict[str, Any],
    flops: float,
    precision: str,
    devices: int = 1,
) -> dict[str, Any]:
    peak, source = peak_flops(precision)
    share = flops / timed["median_seconds"] / (devices * peak)
    return {
        "cells_per_second": round(cells / timed["median_seconds"], 1),
        "model_flops": flops,
        "peak_flops": peak if np.isfinite(peak) else None,
        "peak_is": source,
        "share_of_peak": round(share, 4) if np.isfinite(share) else None,
        "peak_memory_mib": round(peak_memory(), 1),
    }


def bench_embedding(
    model: Pretrained,
    *,
    data: str | os.PathLike | None = None,
    cells: int = 2000,
    nonzeros: int = 1500,
    repeats: int = 5,
) -> dict[str, Any]:
    """Benchmark :func:`cellplm_jax.embed` on an AnnData in memory with one context.

    Args:
        model: The model, with its ``precision``.
        data: An ``.h5ad`` file whose first ``cells`` cells are embedded; None: random counts.
        cells: Cells of the context.
        nonzeros: Stored counts per random cell.
        repeats: Runs after the first.

    Returns:
        Facts of machine and model, seconds of the runs, cells/s, fraction of the matrix-product peak, memory in MiB.
    """
    if data is None:
        genes = len(model.genes)
        adata = anndata.AnnData(made_up_counts(cells, genes, min(nonzeros, genes)))
        adata.var_names = list(model.genes)
    else:
        adata = anndata.read_h5ad(data)[:cells].to_memory()
    with open_counts(adata, model.genes) as source:
        stored = source.read(0, source.cells).nnz
    timed = _timed(lambda: embed(adata, model, quiet=True), repeats)
    flops = embedding_flops(model.config, adata.n_obs, stored, adata.n_obs)
    return {
        "task": "embed",
        **machine_facts(),
        "model": model.id,
        "parameters": model.parameters,
        "precision": model.precision,
        "cells": adata.n_obs,
        "nonzeros_per_cell": round(stored / adata.n_obs, 1),
        **timed,
        **_rates(adata.n_obs, timed, flops, model.precision, len(model.embeds_on)),
    }


def bench_training(
    config: TrainConfig,
    *,
    genes: int = 19_374,
    nonzeros: int = 1500,
    repeats: int = 5,
) -> dict[str, Any]:
    """Benchmark the compiled training step on random cells: masks, forward, backward, AdamW.

    Args:
        config: The run; determines rows and cells of the batch, precision and mesh.
        genes: Size of the vocabulary.
        nonzeros: Stored counts per cell.
        repeats: Steps after the first.

    Returns:
        As in :func:`bench_embedding`; the number of cells includes those that are dropped.

    Raises:
        InputError: The configuration shards the cells of each row (``mesh.cells`` above 1).
    """
    model = dataclasses.replace(config.model, genes=genes)
    config = dataclasses.replace(config, model=model, accumulate=1)
    rows = config.data.rows
    cells = config.data.cells
    samples = [
        Sample(f"row {row}", made_up_counts(cells, genes, min(nonzeros, genes), seed=row))
        for row in range(rows)
    ]
    mesh = make_mesh(config.mesh, rows=rows)
    if config.mesh.cells > 1:
        raise InputError(
            f"mesh.cells = {config.mesh.cells}",
            "unsharded rows, mesh.cells = 1",
            "Split rows over mesh.data",
        )
    batch = pad_batch(samples, cells=cells, nonzeros=max(s.counts.nnz for s in samples))
    batch = jax.tree.map(lambda leaf: leaf[None], batch)
    stored = sum(sample.counts.nnz for sample in samples)
    step = compile_training_step(config, mesh)
    state = create_sharded_state(config, mesh)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])

    timed = _timed(run, repeats)
    kept = 1.0 - config.masking.drop_cells
    flops = model_flops(config, kept * rows * cells, kept * stored)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    return {
        "task": "train",
        **machine_facts(),
        "parameters": parameters,
        "precision": config.precision,
        "chunk_cells": config.chunk_cells,
        "rows": rows,
        "cells": rows * cells,
        "nonzeros_per_cell": round(stored / rows / cells, 1),
        **timed,
        **_rates(rows * cells, timed, flops, config.precision),
    }


def bench_loading(
    data: str | os.PathLike,
    vocabulary: Sequence[str],
    *,
    cells: int = 100_000,
    repeats: int = 3,
) -> dict[str, Any]:
    """Benchmark reading of counts: a corpus by samples, a file by the chunks that embedding reads.

    Args:
        data: A corpus, or an ``.h5ad`` or ``.zarr`` file.
        vocabulary: Genes to read from a file, such as ``model.genes``; a corpus has its own.
        cells: Maximum number of cells to read.
        repeats: Passes after the first. Later ones use the system's file cache, if the file fits.

    Returns:
        Facts of the machine, seconds of the passes, cells/s and stored counts/s.
    """
    path = Path(data).expanduser()
    in_corpus = is_corpus(data)
    seen = {"cells": 0, "nonzeros": 0}

    def read_corpus() -> None:
        seen.update(cells=0, nonzeros=0)
        store = open_corpus(path)
        for number, sample in enumerate(store.samples):
            stop = min(sample.cells, cells - seen["cells"])
            run = store.read(number, 0, stop)
            seen["cells"] += stop
            seen["nonzeros"] += len(run.gene)
            if seen["cells"] >= cells:
                break

    def read_file() -> None:
        seen.update(cells=0, nonzeros=0)
        with open_counts(path, vocabulary) as source:
            for start in range(0, min(source.cells, cells), CHUNK_CELLS):
                block = source.read(start, min(start + CHUNK_CELLS, source.cells, cells))
                seen["cells"] += block.shape[0]
                seen["nonzeros"] += block.nnz

    timed = _timed(read_corpus if in_corpus else read_file, repeats)
    timed["first_seconds"] = round(timed.pop("compile_seconds") + timed["median_seconds"], 4)
    return {
        "task": "load",
        **machine_facts(),
        "data": path.name,
        "kind": "corpus" if in_corpus else "file",
        **seen,
        **timed,
        "cells_per_second": round(seen["cells"] / timed["median_seconds"], 1),
        "nonzeros_per_second": round(seen["nonzeros"] / timed["median_seconds"], 1),
        "peak_memory_mib": round(peak_memory(), 1),
    }
