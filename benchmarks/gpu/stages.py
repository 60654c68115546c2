"""The stages of ``run.py``, each part a function that a process of its own runs: ``python stages.py JOB``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from job import ROOT, Job, environment, timed
from scipy import sparse

# Its run.py, not the one beside this file.
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

GENES = 19_374
NONZEROS = 1_500
BATCHES, DATASETS = 12_596, 484
PRECISIONS = ("float32", "TF32", "bfloat16")


# -- a: the card ----------------------------------------------------------------------------------------------


def card(job: Job) -> None:
    """Say what the card is, and measure its peaks."""
    import jax
    import jax.numpy as jnp
    from machine import machine, versions_of

    device = jax.devices()[0]
    if device.platform == "cpu" and not job.rehearse:
        sys.exit(
            "JAX has the CPU alone; expected a GPU. Run cellplm doctor, or rehearse with --rehearse"
        )
    facts = {
        "what": "device",
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "platform": device.platform,
        "host": machine(),
        "versions": versions_of(("jax", "jaxlib", "jax-cuda13-plugin", "flax", "torch", "cellplm", "numpy")),
    }  # fmt: skip
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        facts["nvidia_smi"] = subprocess.run(
            query, capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        facts["nvidia_smi"] = "not there"
    memory = device.memory_stats() or {}
    facts["memory_for_arrays"] = memory.get("bytes_limit")
    job.row(**facts)
    size = job.choose(8192, 512)
    random = np.random.default_rng(0)
    matrix = jnp.asarray(random.standard_normal((size, size)), jnp.float32)
    for precision in PRECISIONS:
        given = matrix.astype(jnp.bfloat16) if precision == "bfloat16" else matrix
        with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
            product = jax.jit(jnp.matmul)
            seconds, _ = timed(functools.partial(product, given, given), least=0.2)
        job.row(
            what="peak", precision=precision, flops=2.0 * size**3 / seconds, seconds=seconds,
            sizes=size,
        )  # fmt: skip
    values = jax.random.normal(jax.random.key(0), (job.choose(2**30, 2**22),))
    add = jax.jit(lambda x: x + 1)
    seconds, _ = timed(functools.partial(add, values), least=0.2)
    job.row(what="peak", precision="copy", bandwidth=2.0 * values.nbytes / seconds, seconds=seconds)
    host = np.zeros(job.choose(2**28, 2**22), np.float32)
    seconds, _ = timed(lambda: jax.device_put(host))
    job.row(
        what="peak", precision="from the host", bandwidth=host.nbytes / seconds, seconds=seconds
    )


# -- b: parity ------------------------------------------------------------------------------------------------


def parity(job: Job) -> None:
    """Compare with the stored arrays of the original: values and gradients, in three precisions."""
    sys.path.insert(0, str(ROOT))
    import jax

    from cellplm_jax.model.cellplm import CellPLM, in_precision
    from tests.parity import test_golden as golden
    from tests.parity.common import gradient_errors, latent_quantities, relative_error

    # The published kind first: whatever the time allows after it.
    cases = ["gmvae_flowformer", *(case for case in golden.CASES if case != "gmvae_flowformer")]
    for precision, case in itertools.product(PRECISIONS, job.choose(cases, cases[:2])):
        if not job.fits(10, f"{case}, {precision}"):
            return

        def compare(precision: str = precision, case: str = case) -> None:
            result, stored = golden.converted(case), golden.archive(case)
            matmul = "highest" if precision == "float32" else "default"
            kind = "bfloat16" if precision == "bfloat16" else "float32"
            with jax.default_matmul_precision(matmul):
                sentences = [golden.sentence(name, result.genes) for name in golden.CONTEXTS]
                batch = golden.make_batch(
                    sentences, result.config.genes, cells=golden.CELLS, nonzeros=golden.NONZEROS
                )
                params = in_precision(result.params, kind)
                apply = jax.jit(CellPLM(result.config).apply)
                ours = latent_quantities(apply({"params": params}, batch))
                worst: dict[str, float] = {}
                for row, name in enumerate(golden.CONTEXTS):
                    cells = len(golden.archive("inputs")[f"{name}/batch"])
                    for key, reference in stored.items():
                        quantity = key.removeprefix(f"eval/{name}/")
                        if quantity == key or quantity not in ours:
                            continue
                        value = ours[quantity]
                        if quantity != "nb_dispersion":
                            value = value[row][:cells] if value.ndim == 3 else value[row][None]
                        error = relative_error(value, reference)
                        worst[quantity] = max(worst.get(quantity, 0.0), error)
                gradient = None
                variant = next(iter(json.loads(str(stored["variants"]))))
                if golden.settings_of(case, variant).get("gradients", True):
                    run, _ = golden.training_setup(case, variant)
                    of_params = jax.jit(jax.grad(lambda p: run(in_precision(p, kind))[0]))
                    theirs = golden.unpack(stored, f"gradient/{variant}")
                    gradient = max(
                        gradient_errors(result, of_params(result.params), theirs).values()
                    )
            value = max(worst.values())
            # TF32 and bfloat16 are stated, not judged.
            holds = None
            if precision == "float32":
                holds = value <= 1e-4 and (gradient is None or gradient <= 1e-3)
            job.row(
                what="parity", case=case, precision=precision, value_error=value,
                worst=max(worst, key=worst.__getitem__), gradient_error=gradient, holds=holds,
            )  # fmt: skip

        job.tried(f"parity {case}, {precision}", compare)


# -- c: embedding ---------------------------------------------------------------------------------------------


def published(genes: int = GENES) -> Any:
    """Return the published architecture: 82 M parameters."""
    from cellplm_jax.interop.torch_checkpoint import model_config

    sys.path.insert(0, str(ROOT / "tools"))
    from original_cellplm import PUBLISHED_ARGUMENTS

    names = [f"ENSG{number:011d}" for number in range(genes)]
    return model_config({**PUBLISHED_ARGUMENTS, "out_dim": genes, "gene_list": names}), names


@functools.cache
def some_cells(cells: int, genes: int, nonzeros: int) -> sparse.csr_matrix:
    """Return made-up counts, drawn once."""
    from cellplm_jax.tasks.bench import made_up_counts

    return made_up_counts(cells, genes, nonzeros)


_tiled: dict[int, sparse.csr_matrix] = {}


def counts_of(job: Job, cells: int) -> sparse.csr_matrix:
    """Return counts [cells, genes] of which a few hundred cells are drawn and the others repeat them."""
    drawn = some_cells(min(cells, job.choose(512, 128)), *job.choose((GENES, NONZEROS), (512, 60)))
    if cells not in _tiled:
        _tiled[cells] = sparse.csr_matrix(drawn[np.arange(cells) % drawn.shape[0]])
    return _tiled[cells]


def embedded_model(job: Job, precision: str) -> Any:
    """Return a model of the published architecture with random weights; in a rehearsal a tiny one."""
    from cellplm_jax.config import EncoderConfig, LatentConfig, ModelConfig
    from cellplm_jax.tasks.pretrained import Pretrained

    kind = "bfloat16" if precision == "bfloat16" else "float32"
    if (precision == "float32", job.rehearse) not in _models:
        if job.rehearse:
            names = [f"ENSG{number:011d}" for number in range(512)]
            config = ModelConfig(
                genes=512, hidden=256, encoder=EncoderConfig(layers=1), latent=LatentConfig(size=32)
            )
        else:
            config, names = published()
        _models[(precision == "float32", job.rehearse)] = Pretrained.untrained(config, names)
    model = next(iter(_models.values()))
    return dataclasses.replace(model, precision=kind, stored_product=False)


_models: dict[Any, Any] = {}


def floor_of(job: Job, model: Any, cells: int, stored: int, precision: str, host: bool) -> dict:
    """Return the least time an embedding takes by the measured peaks, and which of them binds."""
    from cellplm_jax.train.metrics import embedding_flops

    peaks = job.peaks
    narrow = 2 if precision == "bfloat16" else 4
    # Counts and genes read once; hidden and latent written and read once a layer.
    layers = model.config.encoder.layers + 1
    moved = stored * 6.0 + cells * (2.0 * layers * model.config.hidden * narrow + 4.0 * 512)
    times = {
        "products": embedding_flops(model.config, cells, stored) / peaks.get(precision, np.nan),
        "memory": moved / peaks.get("copy", np.nan),
    }
    if host:
        times["from the host"] = stored * 6.0 / peaks.get("from the host", np.nan)
    if any(np.isnan(value) for value in times.values()):
        return {"floor_seconds": None, "binds": None}
    binds = max(times, key=times.__getitem__)
    return {"floor_seconds": times[binds], "binds": binds}


def embedding(job: Job) -> None:
    """Embed: device-resident and from the host, each way, each precision."""
    import jax

    sizes = job.choose((20_000, 200_000, 2_000), (300,))
    plans = [
        (cells, precision, way)
        for precision in ("bfloat16", "TF32", "float32")
        for cells in sizes
        for way in ("device CSR", "host CSR", "device dense")
    ]
    # Through DLPack, from the library that keeps counts there.
    plans.insert(3, (sizes[0], "bfloat16", "CuPy CSR"))
    for cells, precision, way in plans:
        if not job.fits(15, f"{way}, {cells} cells, {precision}"):
            continue
        matmul = "highest" if precision == "float32" else "default"
        with jax.default_matmul_precision(matmul):
            job.tried(
                f"{way}, {cells} cells, {precision}",
                functools.partial(one_embedding, job, cells, precision, way),
            )


def one_embedding(job: Job, cells: int, precision: str, way: str) -> None:
    """Time one way of embedding one context."""
    import anndata
    import jax.numpy as jnp

    import cellplm_jax as cellplm
    from cellplm_jax.data.device_arrays import DeviceRows, DeviceSparseRows
    from cellplm_jax.tasks.embed_device import embed_on_device

    counts, model = counts_of(job, cells), embedded_model(job, precision)
    repeats = job.choose(3, 1)
    if way in ("host CSR", "CuPy CSR"):
        held: Any = counts
        if way == "CuPy CSR":
            if importlib.util.find_spec("cupy") is None:
                job.row(what="embedding, CuPy CSR", skipped="CuPy is not installed")
                return
            import cupyx.scipy.sparse

            held = cupyx.scipy.sparse.csr_matrix(counts)
        adata = anndata.AnnData(held)
        adata.var_names = list(model.genes)
        seconds, first = timed(
            lambda: cellplm.embed(adata, model, quiet=True).obsm["X_cellplm"], repeats
        )
    else:
        if way == "device dense":
            if counts.shape[0] * counts.shape[1] * 4 > job.choose(20e9, 1e9):
                job.row(what=f"embedding, {way}, {cells} cells", skipped="it takes more than 20 GB")
                return
            coo = counts.tocoo()
            held = jnp.zeros(counts.shape, jnp.float32).at[coo.row, coo.col].set(coo.data)
            rows: Any = DeviceRows(held)
        else:
            rows = DeviceSparseRows(DeviceCsr(counts))
        source, index = Resident(len(model.genes)), np.arange(cells)
        seconds, first = timed(lambda: embed_on_device(source, rows, model, index, None), repeats)
    stored = counts.nnz
    floor = floor_of(job, model, cells, stored, precision, way == "host CSR")
    job.row(
        what="embedding", side="ours", way=way, cells=cells, precision=precision, seconds=seconds,
        first_seconds=first, cells_per_second=cells / seconds,
        share_of_floor=floor["floor_seconds"] and floor["floor_seconds"] / seconds, **floor,
    )  # fmt: skip


class Resident:
    """What embedding asks of a source besides its counts: every gene is the model's, values are counts."""

    def __init__(self, genes: int):
        self.vocabulary_column = np.arange(genes)
        self.report = SimpleNamespace(values="counts")

    def note_empty(self, cells: np.ndarray, empty: np.ndarray) -> None:
        """Do nothing with which cells have no counts."""

    def read(self, start: int, stop: int) -> None:
        """Refuse: asked for where a value is no count."""
        message = f"cells {start} to {stop} hold values that are no counts"
        raise ValueError(message)


class DeviceCsr:
    """A CSR matrix whose arrays are on the device, in the form of CuPy's."""

    format, has_canonical_format = "csr", True

    def __init__(self, matrix: sparse.csr_matrix):
        import jax.numpy as jnp

        self.shape, self.dtype = matrix.shape, matrix.dtype
        self.data = jnp.asarray(matrix.data)
        self.indices = jnp.asarray(matrix.indices, jnp.int32)
        self.indptr = jnp.asarray(matrix.indptr, jnp.int32)


def first_product(job: Job) -> None:
    """Time the ways of the embedder's first product alone, and a kernel that gathers and sums."""
    import embedder
    import jax
    import jax.numpy as jnp
    from gather_sum import gather_sum

    cells = job.choose(4096, 16)
    counts = some_cells(min(cells, job.choose(512, 16)), GENES, job.choose(NONZEROS, 200))
    counts = sparse.csr_matrix(counts[np.arange(cells) % counts.shape[0]])
    for kind in job.choose(("bfloat16", "float32"), ("float32",)):
        given = embedder.weights(kind)
        found: dict[str, Callable] = dict(embedder.ways(given, counts))
        found.pop("scipy", None)
        placed = tuple(
            jnp.asarray(part) for part in (counts.indptr.astype(np.int32), counts.indices, np.log1p(counts.data))
        )  # fmt: skip
        found["gather-sum kernel"] = functools.partial(
            gather_sum, *placed, given["table"], interpret=job.rehearse
        )
        dense = jax.jit(embedder.linear_product)
        expression = jnp.asarray(counts.toarray()).astype(kind)
        found["product of what is dense on the device"] = lambda e=expression, g=given, f=dense: f(
            e, g["table"]
        )
        for way, run in found.items():
            if not job.fits(5, f"first product: {way}, {kind}"):
                continue

            def measure(way: str = way, run: Callable = run, kind: str = kind) -> None:
                seconds, first = timed(run, 3, least=job.choose(0.1, 0.0))
                job.row(
                    what="first product", way=way, precision=kind, cells=cells, seconds=seconds,
                    first_seconds=first, cells_per_second=cells / seconds,
                )  # fmt: skip

            job.tried(f"first product: {way}, {kind}", measure)


def original(job: Job, task: str) -> None:
    """Run the original on the same card: tensors that are ready, float32 (its default: no TF32)."""
    for package in ("torch", "CellPLM"):
        if importlib.util.find_spec(package) is None:
            job.row(what=task, side="original", skipped=f"{package} is not installed")
            return
    from run import Side

    prefix = str(job.scratch / "published")
    if not Path(prefix + ".best.ckpt").exists():
        write = [
            sys.executable,
            str(ROOT / "benchmarks/speed/original.py"),
            "write-weights",
            prefix,
        ]
        subprocess.run(write, check=True, env=environment(), stdout=subprocess.DEVNULL)
    device = "cpu" if job.rehearse else "gpu"
    for cells in job.choose((2_000, 20_000) if task == "embed" else (2_000,), (16,)):
        if not job.fits(25, f"the original, {task}, {cells} cells"):
            return

        def run(cells: int = cells) -> None:
            described = {"task": task, "counts": "synthetic", "cells": cells, "prefix": prefix,
                         "device": device, "precision": "float32", "chunk_cells": 0,
                         "rematerialize": False}  # fmt: skip
            side = Side("original", described, job.scratch)
            side.answer()
            for _ in range(job.choose(3, 1)):
                side.run()
            side.finish()
            seconds = float(np.median(side.seconds))
            job.row(
                what="embedding" if task == "embed" else "training", side="original",
                way="tensors on the device", cells=cells, precision="float32", seconds=seconds,
                cells_per_second=cells / seconds,
            )  # fmt: skip

        job.tried(f"the original, {task}, {cells} cells", run)


def original_embedding(job: Job) -> None:
    """The original embeds."""
    original(job, "embed")


def original_training(job: Job) -> None:
    """The original takes steps of training."""
    original(job, "train")


# -- d: the training step -------------------------------------------------------------------------------------


def training_config(job: Job, name: str, rows: int, cells: int, **changes: Any) -> Any:
    """Return the configuration of a step: the named preset with the tables of the published checkpoint."""
    from cellplm_jax.config import MeshConfig
    from cellplm_jax.plan.search import complete
    from cellplm_jax.presets import preset

    config = preset("debug" if job.rehearse else name)
    genes, batches = job.choose((GENES, BATCHES), (256, 8))
    config = complete(config, genes=genes, batches=batches, datasets=job.choose(DATASETS, 4))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, rows=rows, cells=cells, segments=1),
        masking=dataclasses.replace(config.masking, maximum_cells=0),
        mesh=MeshConfig(),
        accumulate=1,
        **{"precision": "bfloat16", "rematerialize": False, **changes},
    )


def training(job: Job) -> None:
    """Time the training step of 82 M and of 1 B parameters: rows, cells, chunks, what is recomputed."""
    big, small = job.choose((2048, 8192), (48, 96))
    plans: list[tuple[str, int, int, dict[str, Any]]] = [
        ("85m", 8, big, {"chunk_cells": 0}),
        ("85m", 8, big, {"chunk_cells": 512}),
        ("85m", 32, big, {"chunk_cells": 512}),
        ("1b", 8, big, {"chunk_cells": 512, "rematerialize": True}),
        ("85m", 32, big, {"chunk_cells": 0, "rematerialize": True}),
        ("85m", 8, small, {"chunk_cells": 512}),
        ("85m", 8, big, {"chunk_cells": 0, "precision": "float32"}),
        ("85m", 8, big, {"chunk_cells": 0, "level": "UNKNOWN"}),
        ("1b", 16, big, {"chunk_cells": 512, "rematerialize": True}),
        ("1b", 4, big, {"chunk_cells": 512}),
    ]
    if job.rehearse:
        plans = [("85m", 2, 48, {"chunk_cells": 0}), ("1b", 2, 48, {"chunk_cells": 16})]
    for name, rows, cells, changes in plans:
        said = ", ".join(f"{key}={value}" for key, value in changes.items())
        what = f"training {name}, {rows} x {cells} cells, {said}"
        # Most of it is compilation.
        if job.fits(150 if name == "1b" else 60, what):
            job.tried(what, functools.partial(one_step, job, name, rows, cells, changes))


def batch_of(job: Job, config: Any) -> tuple[Any, int]:
    """Return a batch as the input pipeline gives it, and its stored counts."""
    import jax

    from cellplm_jax.data.batches import Sample, pad_batch

    data = config.data
    drawn = some_cells(job.choose(512, 48), config.model.genes, job.choose(NONZEROS, 40))
    counts = sparse.csr_matrix(drawn[np.arange(data.cells) % drawn.shape[0]])
    samples = [Sample(f"row {row}", counts) for row in range(data.rows)]
    batch = pad_batch(samples, cells=data.cells, nonzeros=counts.nnz)
    random, shape = np.random.default_rng(0), (data.rows, data.cells)
    decoder = config.model.decoder
    batch = batch.replace(
        gene=batch.gene.astype(np.uint16), count=batch.count.astype(np.uint16), platform=None,
        batch=random.integers(0, decoder.batches, shape).astype(np.int32),
        dataset=random.integers(0, decoder.datasets, shape).astype(np.int32),
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf[None], batch), counts.nnz * data.rows


def one_step(job: Job, name: str, rows: int, cells: int, changes: dict[str, Any]) -> None:
    """Time one configuration of the training step."""
    import jax

    from cellplm_jax.tasks.bench import peak_memory
    from cellplm_jax.train.metrics import model_flops
    from cellplm_jax.train.sharding import make_mesh
    from cellplm_jax.train.step import compile_training_step, create_sharded_state

    changes = dict(changes)
    jax.config.update("jax_optimization_level", changes.pop("level", job.choose("O1", "UNKNOWN")))
    config = training_config(job, name, rows, cells, **changes)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batch, stored = batch_of(job, config)
    batch = jax.device_put(batch)
    step, state = compile_training_step(config, mesh), create_sharded_state(config, mesh)
    parameters = sum(int(leaf.size) for leaf in jax.tree.leaves(state.params))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    seconds, first = timed(run, job.choose(5, 1))
    kept = 1.0 - config.masking.drop_cells
    flops = model_flops(config, kept * rows * cells, kept * stored)
    kind = "TF32" if config.precision == "float32" else config.precision
    job.row(
        what="training", side="ours", model=name, parameters=parameters, rows=rows, cells=rows * cells,
        precision=kind, chunk_cells=config.chunk_cells, recomputed=config.rematerialize, seconds=seconds,
        level=jax.config.jax_optimization_level,
        first_seconds=first, cells_per_second=rows * cells / seconds, model_flops=flops,
        utilisation=flops / seconds / job.peaks[kind] if kind in job.peaks else None,
        memory_gib=peak_memory() / 1024, finite=bool(np.isfinite(float(run()))),
    )  # fmt: skip
    del state


# -- e: end to end --------------------------------------------------------------------------------------------


def write_cells(path: Path, cells: int) -> None:
    """Write an uncompressed ``.h5ad`` of PBMC3k's cells, repeated."""
    import anndata
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    import cellplm_jax as cellplm

    real = cellplm.datasets.pbmc3k()
    counts = sparse.csr_matrix(real.X, dtype=np.float32)
    empty = anndata.AnnData(
        obs=pd.DataFrame(index=pd.RangeIndex(cells).astype(str)), var=real.var.copy()
    )
    with h5py.File(path, "w") as file:
        write_elem(file, "/", empty)
        if "X" in file:
            del file["X"]
        times = -(-cells // counts.shape[0])
        last = cells - (times - 1) * counts.shape[0]
        stored = (times - 1) * counts.nnz + int(counts.indptr[last])
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                            "shape": (cells, counts.shape[1])})  # fmt: skip
        data = group.create_dataset("data", (stored,), "float32", chunks=(1 << 20,))
        indices = group.create_dataset("indices", (stored,), "int32", chunks=(1 << 20,))
        indptr = [np.zeros(1, np.int64)]
        for turn in range(times):
            part = counts if turn < times - 1 else counts[:last]
            place = slice(turn * counts.nnz, turn * counts.nnz + part.nnz)
            data[place], indices[place] = part.data, part.indices
            indptr.append(turn * counts.nnz + part.indptr[1:].astype(np.int64))
        group.create_dataset("indptr", data=np.concatenate(indptr))


def end_to_end_model(job: Job) -> Any:
    """Return the model of the end-to-end stages: the published architecture over the genes of PBMC3k."""
    import cellplm_jax as cellplm
    from cellplm_jax.tasks.pretrained import Pretrained

    small = cellplm.load("small", precision="bfloat16")
    if job.rehearse:
        return small
    config, _ = published(len(small.genes))
    return dataclasses.replace(Pretrained.untrained(config, small.genes), precision="bfloat16")


def file_to_file(job: Job) -> None:
    """Embed a file of a million cells into a copy of it: reading, waiting, writing."""
    from cellplm_jax.data.anndata_io import open_counts
    from cellplm_jax.tasks.embed import embed_source, write_copy
    from cellplm_jax.tasks.long_context import IOWait

    cells = job.choose(1_000_000, 1_500)
    path, out = job.scratch / "cells.h5ad", job.scratch / "embedded.h5ad"
    began = time.perf_counter()
    write_cells(path, cells)
    seconds, size = time.perf_counter() - began, path.stat().st_size / 1e9
    job.row(what="made", cells=cells, seconds=seconds, gigabytes=size)
    model = end_to_end_model(job)
    limit = job.choose(20_000, 700)
    with open_counts(path, model.genes) as source:
        first = np.arange(min(limit, cells))
        embed_source(source, model, groups=[first], spatial_key=None)  # compiles
        waiting = IOWait()
        began = time.perf_counter()
        found = embed_source(source, model, cells_per_context=limit, waiting=waiting)
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    write_copy(path, out, obsm={"X_cellplm": found})
    written = time.perf_counter() - began
    out.unlink()
    job.row(
        what="end to end", task="cellplm embed, one file", cells=cells, seconds=seconds + written,
        embedding_seconds=seconds, writing_seconds=written, cells_per_second=cells / (seconds + written),
        waiting_share=waiting.share, finite=bool(np.isfinite(found).all()),
    )  # fmt: skip
    path.unlink()


class Repeated:
    """Rows of PBMC3k in the columns of a vocabulary, again and again: a source of any number of cells."""

    def __init__(self, model: Any):
        import cellplm_jax as cellplm
        from cellplm_jax.data.anndata_io import open_counts

        with open_counts(cellplm.datasets.pbmc3k(), model.genes) as source:
            self.counts = source.read(0, source.cells)

    def read_rows(self, indices: np.ndarray) -> sparse.csr_matrix:
        """Return float32 CSR [n, genes]."""
        return sparse.csr_matrix(self.counts[np.asarray(indices) % self.counts.shape[0]])


def one_context(job: Job) -> None:
    """Embed one context of a million cells, and of ten million if there is time."""
    from cellplm_jax.tasks import embed as embed_module
    from cellplm_jax.tasks import long_context
    from cellplm_jax.tasks.long_context import IOWait

    model = end_to_end_model(job)
    source, rate = Repeated(model), None
    if job.rehearse:
        long_context.STREAM_CELLS, long_context.STREAM_CHUNK = 500, 512
    for cells in job.choose((100_000, 1_000_000, 10_000_000), (1_200,)):
        if rate and not job.fits(1.3 * cells / rate, f"one context of {cells} cells"):
            return

        def run(cells: int = cells) -> None:
            nonlocal rate
            waiting = IOWait()
            began = time.perf_counter()
            found = embed_module.embed_context(
                source, model, np.arange(cells), None, waiting, lambda text: None
            )
            seconds = time.perf_counter() - began
            rate = cells / seconds
            job.row(
                what="end to end", task="one context", cells=cells, seconds=seconds, cells_per_second=rate,
                waiting_share=waiting.share, finite=bool(np.isfinite(found).all()),
            )  # fmt: skip

        job.tried(f"one context of {cells} cells", run)


def pretraining(job: Job) -> None:
    """Pretrain the published architecture for two minutes on the prepared corpus: share of time waiting for data."""
    run_pretraining(job, "debug" if job.rehearse else "85m", min(120.0, job.left() - 10))


def run_pretraining(job: Job, name: str, seconds: float, **changes: Any) -> Path:
    """Pretrain for some seconds; returns the work directory."""
    from cellplm_jax.presets import preset
    from cellplm_jax.tasks.pretrain import pretrain
    from cellplm_jax.train.metrics import read_metrics

    config = preset(name)
    config = dataclasses.replace(
        config, steps=1_000_000 if not job.rehearse else 12, evaluate_every=job.choose(10_000, 12),
        checkpoint_every=job.choose(10_000, 12), log_every=job.choose(10, 4), **changes,
    )  # fmt: skip
    workdir = job.scratch / f"run-{name}-{len(changes)}"
    began, first = time.monotonic(), []

    def enough(step: int) -> bool:
        # Asked after every step: compilation, before the first one, is not in the time.
        first.append(time.monotonic()) if not first else None
        return time.monotonic() - first[0] > seconds or job.left() < 15

    result = pretrain(
        job.corpus, config, workdir, quiet=True,
        preempted=enough,
    )  # fmt: skip
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row.get("split") == "train"]
    lately = rows[len(rows) // 3 :] or rows
    wanted = ("cells_per_second", "utilisation", "waiting", "data_wait", "waited_share", "loss")
    facts = {
        key: float(np.mean([row[key] for row in lately if row.get(key) is not None] or [np.nan]))
        for key in {name for row in lately for name in row}
        if any(word in key for word in wanted)
    }
    steps = getattr(result, "step", rows[-1]["step"] if rows else 0)
    job.row(
        what="end to end", task=f"cellplm pretrain :{name}", seconds=time.monotonic() - began,
        steps=steps, first_loss=rows[0].get("loss") if rows else None, **facts,
    )  # fmt: skip
    return workdir


# -- f: profile -----------------------------------------------------------------------------------------------

REMEDIES = (
    ("memcpyh2d", "device-resident counts, or a longer prefetch"),
    ("memcpyd2h", "results kept on the device until the end"),
    ("memset", "in-place sums (zeros that are made once)"),
    ("gemm", "bfloat16, larger batches; it is what the card is for"),
    ("cutlass", "bfloat16, larger batches; it is what the card is for"),
    ("nvjet", "bfloat16, larger batches; it is what the card is for"),
    ("dot", "bfloat16, larger batches; it is what the card is for"),
    ("scatter", "a gather-sum kernel, or dense counts made by the host"),
    ("gather", "rows in the order they are read"),
    ("sort", "cells chosen without sorting"),
    ("reduce", "sums as products (weighted_sum), or fused into what made their input"),
    ("transpose", "products in the layout of their factors"),
    ("copy", "layouts that agree between neighbouring products"),
    ("rng", "fewer random bits (kept_bits already draws eight at a time)"),
    ("fusion", "narrower types, smaller chunks that stay in the cache"),
)


def remedy(name: str) -> str:
    """Return what would remove a kernel, by its name."""
    lower = name.lower().replace("_", "").replace(" ", "")
    return next((text for word, text in REMEDIES if word in lower), "look at it in the trace")


def kernel_times(folder: Path) -> list[tuple[str, float, int]]:
    """Return name, seconds and number of the kernels in a trace, the longest first; on a CPU those of its threads."""
    from jax.profiler import ProfileData

    total: dict[str, list[float]] = {}
    for path in folder.rglob("*.xplane.pb"):
        planes = list(ProfileData.from_file(str(path)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or [plane for plane in planes if "CPU" in plane.name]:
            for line in plane.lines:
                # Other lines of a device repeat the kernels under the names of steps, modules and operations.
                if devices and not line.name.startswith("Stream"):
                    continue
                if not devices and not line.name.startswith("tf_XLA"):
                    continue
                for event in line.events:
                    # What waits for others is no kernel.
                    if event.name.startswith("ThunkExecutor"):
                        continue
                    total.setdefault(event.name, []).append(event.duration_ns * 1e-9)
    found = [(name, sum(values), len(values)) for name, values in total.items()]
    return sorted(found, key=lambda entry: -entry[1])


def profile(job: Job) -> None:
    """Trace an embedding and some steps of training, and name the ten longest kernels of each."""
    import anndata
    import jax

    import cellplm_jax as cellplm
    from cellplm_jax.train.sharding import make_mesh
    from cellplm_jax.train.step import compile_training_step, create_sharded_state

    cells = job.choose(20_000, 200)
    model = embedded_model(job, "bfloat16")
    adata = anndata.AnnData(counts_of(job, cells))
    adata.var_names = list(model.genes)

    def embed() -> None:
        cellplm.embed(adata, model, quiet=True)

    def trace(what: str, run: Callable[[], None]) -> None:
        run()  # compiles
        folder = job.scratch / f"trace-{what}"
        with jax.profiler.trace(str(folder)):
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
        times = kernel_times(folder)
        busy = sum(entry[1] for entry in times)
        job.row(what="profile", of=what, seconds=seconds, busy_seconds=busy, kernels=len(times))
        for place, (name, spent, number) in enumerate(times[:10], start=1):
            job.row(
                what="kernel", of=what, place=place, kernel=name[:90], seconds=spent, launches=number,
                share=spent / busy, removed_by=remedy(name),
            )  # fmt: skip

    job.tried("profile of embedding", lambda: trace("embedding", embed))
    if not job.fits(60, "profile of training"):
        return
    config = training_config(
        job, "85m", *job.choose((8, 2048), (2, 48)), chunk_cells=job.choose(512, 0)
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step, state = compile_training_step(config, mesh), create_sharded_state(config, mesh)
    batch = jax.device_put(batch_of(job, config)[0])

    def steps() -> None:
        nonlocal state
        for _ in range(3):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])

    job.tried("profile of training", lambda: trace("training", steps))


# -- g: a model to bring back ---------------------------------------------------------------------------------


def pretrain_small(job: Job) -> None:
    """Pretrain ``:small`` on the corpus, and bring its checkpoint back."""
    import cellplm_jax as cellplm

    share = 0.6 if job.left() > 150 else 0.9
    plans: list[tuple[str, float, dict[str, Any]]] = [
        ("debug" if job.rehearse else "small", share * job.left(), {})
    ]
    for name, seconds, changes in plans:
        workdir = run_pretraining(job, name, seconds, **changes)
        bring_back(job, cellplm.load(workdir), name)
    if job.rehearse or not job.fits(60, "the model of 15 M parameters"):
        return
    from cellplm_jax.presets import preset

    base = preset("small").model
    wide = dataclasses.replace(
        base, hidden=384, encoder=dataclasses.replace(base.encoder, layers=4),
        latent=dataclasses.replace(base.latent, size=128),
        decoder=dataclasses.replace(base.decoder, hidden=384),
    )  # fmt: skip
    workdir = run_pretraining(job, "small", job.left() - 15, model=wide)
    bring_back(job, cellplm.load(workdir), "15m")


def bring_back(job: Job, model: Any, name: str) -> None:
    """Write a model into one file of the results, weights in half precision."""
    folder = job.scratch / f"model-{name}"
    model.save(folder, half=True)
    file = job.out / f"{name}.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, arcname=name)
    job.row(
        what="checkpoint", model=name, parameters=model.parameters, step=model.step, file=file.name,
        megabytes=file.stat().st_size / 1e6,
    )  # fmt: skip


STAGES: dict[str, tuple[str, dict[str, int], float]] = {
    "a": ("The card", {"card": 1}, 0.03),
    "b": ("Parity with the original's stored arrays", {"parity": 1}, 0.06),
    "c": ("Embedding", {"original_embedding": 1, "embedding": 2, "first_product": 1}, 0.22),
    "d": ("Training step", {"original_training": 1, "training": 4}, 0.27),
    "e": ("End to end", {"pretraining": 3, "file_to_file": 2, "one_context": 1}, 0.28),
    "f": ("Profile", {"profile": 1}, 0.06),
    "g": ("A model to bring back", {"pretrain_small": 1}, 0.08),
}
"""Stage -> title, parts in order of worth with their weights, share of the time."""


def main() -> None:
    """Run one part."""
    job = Job.read(sys.argv[1])
    if job.part == os.environ.get("CELLPLM_GPU_FAIL"):
        sys.exit(f"{job.part} was made to fail")
    globals()[job.part](job)


if __name__ == "__main__":
    main()
