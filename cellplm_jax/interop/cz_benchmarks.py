"""Representations of cells for the tasks of cz-benchmarks (``czbenchmarks.tasks``).

Their tasks score any matrix with one row per cell::

    from czbenchmarks.datasets import load_dataset
    from czbenchmarks.tasks import EmbeddingTask, EmbeddingTaskInput

    dataset = load_dataset("tsv2_bladder")
    cells = cell_representation(dataset, "small")
    EmbeddingTask().run(cells, EmbeddingTaskInput(input_labels=dataset.labels))
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from cellplm_jax.errors import InputError
from cellplm_jax.tasks.embed import Adapt, Context, read_and_embed
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained


def cell_representation(
    dataset: Any,
    model: Pretrained | str | os.PathLike = "small",
    *,
    batch_key: str | None = None,
    adapt: Adapt = "none",
    quiet: bool = False,
) -> np.ndarray:
    """Embed the cells of a data set of cz-benchmarks, without changing it.

    Args:
        dataset: A ``czbenchmarks.datasets.SingleCellDataset``; it is loaded if it is not yet.
        model: From :func:`cellplm_jax.load`, or a source for it.
        batch_key: Column of ``dataset.adata.obs`` with the tissue sample of each cell; None: one context.
        adapt: See :func:`cellplm_jax.embed`; ``"none"`` is the zero-shot embedding.
        quiet: No progress and no line.

    Returns:
        float32 [cells, latent], in the order of the data set.

    Raises:
        InputError: The data set has no AnnData, or its counts, genes or keys cannot be used.
    """
    if not hasattr(dataset, "adata") and hasattr(dataset, "load_data"):
        dataset.load_data()
    if not hasattr(dataset, "adata"):
        raise InputError(
            f"a data set of type {type(dataset).__name__} without adata",
            "a SingleCellDataset of czbenchmarks.datasets",
        )
    context = Context(batch_key, "spatial", None, adapt=adapt)
    embedding, _, _ = read_and_embed(
        dataset.adata,
        as_pretrained(model),
        {},
        context,
        "X_cellplm",
        quiet,
    )
    return embedding
