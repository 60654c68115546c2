"""This project, through the calls a user makes: the embedding of an AnnData, and the compiled training step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from counts import BATCHES, DATASETS, make_counts
from worker import serve


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    """Open the published model and the cells, and return what is timed."""
    counts = make_counts(job["counts"], job["cells"])
    return (prepare_embedding if job["task"] == "embed" else prepare_step)(job, counts)


def opened(job: dict[str, Any]) -> Any:
    """Return the model that both sides have, converted."""
    from cellplm_jax.interop.torch_checkpoint import read_published

    return read_published(job["prefix"] + ".best.ckpt", job["prefix"] + ".config.json")


def prepare_embedding(job: dict[str, Any], counts: Any) -> Callable[[], np.ndarray]:
    """Return a function that embeds an AnnData in memory: reading its counts and the way to the device included."""
    import anndata

    import cellplm_jax as cellplm
    from cellplm_jax.tasks.pretrained import Pretrained

    converted = opened(job)
    model = Pretrained(
        converted.config, converted.params, converted.genes, precision=job["precision"]
    )
    adata = anndata.AnnData(counts)
    adata.var_names = list(model.genes)

    def embed() -> np.ndarray:
        cellplm.embed(adata, model, quiet=True)
        return adata.obsm["X_cellplm"]

    return embed


def prepare_step(job: dict[str, Any], counts: Any) -> Callable[[], float]:
    """Return a function that takes one optimizer step on a batch in host memory."""
    import jax

    from cellplm_jax.config import DataConfig, MaskingConfig, OptimizerConfig, TrainConfig
    from cellplm_jax.data.batches import Sample, pad_batch
    from cellplm_jax.interop.torch_checkpoint import model_config
    from cellplm_jax.train.sharding import make_mesh
    from cellplm_jax.train.step import compile_training_step, create_sharded_state

    # The architecture alone: the time of a step does not depend on the weights.
    published = json.loads(Path(job["prefix"] + ".config.json").read_text())
    cells = counts.shape[0]
    config = TrainConfig(
        model=model_config(published),
        optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=1e-8, warmup_steps=0),
        data=DataConfig(rows=1, cells=cells, segments=1),
        # No more are dropped from a large batch than from a small one.
        masking=MaskingConfig(maximum_cells=0),
        precision=job["precision"],
        chunk_cells=job["chunk_cells"],
        rematerialize=job["rematerialize"],
    )
    random = np.random.RandomState(1)
    batch = pad_batch([Sample(name="cells", counts=counts)], cells=cells, nonzeros=counts.nnz)
    batch = batch.replace(
        # As the input pipeline of a run gives them.
        gene=batch.gene.astype(np.uint16),
        count=batch.count.astype(np.uint16),
        batch=random.randint(0, BATCHES, (1, cells)).astype(np.int32),
        dataset=random.randint(0, DATASETS, (1, cells)).astype(np.int32),
        platform=None,
    )
    batch = jax.tree.map(lambda leaf: leaf[None], batch)
    mesh = make_mesh(config.mesh)
    step = compile_training_step(config, mesh)
    state = create_sharded_state(config, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


if __name__ == "__main__":
    serve(prepare)
