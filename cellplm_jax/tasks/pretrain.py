"""Pretraining from AnnData: files to tissue samples to a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse

from cellplm_jax.config import TrainConfig
from cellplm_jax.data.anndata_io import CountSource, open_counts
from cellplm_jax.data.batches import Sample, laplacian_eigenvectors, scale_coordinates
from cellplm_jax.data.genes import load_human_table
from cellplm_jax.errors import InputError, explain
from cellplm_jax.train import loop


def pretrain(
    data: Any,
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    genes: Sequence[str] | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    minimum_gene_cells: int = 10,
    card: dict[str, Any] | None = None,
    quiet: bool = False,
) -> loop.RunResult:
    """Pretrain a model on AnnData objects or ``.h5ad`` files that fit in memory.

    The same ``workdir`` resumes. ``config.model.genes`` and the covariate sizes are set from the data.

    Args:
        data: One AnnData or path, or a list of them; each is one dataset.
        config: The run.
        workdir: Receives everything; opens with :func:`cellplm_jax.load`.
        genes: Gene vocabulary (Ensembl ids); None: every known human gene that enough cells express.
        batch_key: Column of ``obs`` naming the tissue sample; None: a dataset is one sample.
        spatial_key: Key of ``obsm`` with coordinates, used where present; None: none.
        minimum_gene_cells: Without ``genes``: cells that must express a gene for it to enter the vocabulary.
        card: Facts for the model card.
        quiet: No progress.

    Returns:
        The run's result.

    Raises:
        InputError: The data cannot be used.
        CheckpointError: ``workdir`` belongs to another run.
    """
    samples, vocabulary = read_samples(
        data,
        genes=genes,
        batch_key=batch_key,
        spatial_key=spatial_key,
        minimum_gene_cells=minimum_gene_cells,
        eigenvectors=(
            config.model.positions.eigenvectors
            if config.model.positions.kind == "laplacian"
            else None
        ),
    )
    model = dataclasses.replace(config.model, genes=len(vocabulary))
    config = dataclasses.replace(config, model=model)
    return loop.pretrain(config, samples, vocabulary, Path(workdir), card=card, quiet=quiet)


def read_samples(
    data: Any,
    *,
    genes: Sequence[str] | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    minimum_gene_cells: int = 10,
    eigenvectors: int | None = None,
) -> tuple[list[Sample], list[str]]:
    """Read datasets into tissue samples over one vocabulary.

    Args:
        data: One AnnData or path, or a list of them; each is one dataset.
        genes: Gene vocabulary; None: every known human gene that at least ``minimum_gene_cells`` cells express.
        batch_key: Column of ``obs`` naming the tissue sample; None: a dataset is one sample.
        spatial_key: Key of ``obsm`` with coordinates, used where present.
        minimum_gene_cells: See ``genes``.
        eigenvectors: Compute this many Laplacian eigenvectors a spatial sample; None: none.

    Returns:
        The samples and the vocabulary.

    Raises:
        InputError: A dataset cannot be used, or no gene is left.
    """
    datasets = list(data) if isinstance(data, list | tuple) else [data]
    if not datasets:
        msg = explain("no data was given", "at least one AnnData or .h5ad file", "Name one")
        raise InputError(msg)
    wide = sorted(load_human_table().symbols) if genes is None else list(genes)
    samples: list[Sample] = []
    for dataset, entry in enumerate(datasets):
        name = Path(entry).stem if isinstance(entry, str | os.PathLike) else f"dataset {dataset}"
        with open_counts(entry, wide) as source:
            samples += _samples_of(
                source, name, dataset, len(samples), batch_key, spatial_key, eigenvectors
            )
    if genes is not None:
        return samples, wide
    expressed = sum(np.bincount(s.counts.indices, minlength=len(wide)) for s in samples)
    kept = np.flatnonzero(np.asarray(expressed) >= minimum_gene_cells)
    if kept.size == 0:
        msg = explain(
            f"no gene is expressed in {minimum_gene_cells} cells",
            "at least one",
            "Lower minimum_gene_cells or give more cells",
        )
        raise InputError(msg)
    samples = [
        dataclasses.replace(
            sample,
            counts=sparse.csr_matrix(sample.counts[:, kept]),
            measured=None if sample.measured is None else sample.measured[kept],
        )
        for sample in samples
    ]
    return samples, [wide[i] for i in kept]


def _samples_of(
    source: CountSource,
    name: str,
    dataset: int,
    first_batch: int,
    batch_key: str | None,
    spatial_key: str | None,
    eigenvectors: int | None,
) -> list[Sample]:
    counts = source.read(0, source.cells)
    labels = np.zeros(source.cells, int)
    names = [name]
    if batch_key is not None:
        unique, labels = np.unique(np.asarray(source.column(batch_key)), return_inverse=True)
        names = [f"{name}: {label}" for label in unique]
    coordinates = None if spatial_key is None else source.coordinates(spatial_key)
    samples = []
    for i, sample_name in enumerate(names):
        cells = np.flatnonzero(labels == i)
        placed = vectors = None
        if coordinates is not None and np.isfinite(coordinates[cells]).all(axis=1).any():
            placed = scale_coordinates(coordinates[cells])
            if eigenvectors is not None:
                present = np.isfinite(placed).all(axis=1)
                vectors = np.zeros((len(cells), eigenvectors), np.float32)
                vectors[present] = laplacian_eigenvectors(placed[present], eigenvectors)
        samples.append(
            Sample(
                name=sample_name,
                counts=counts[cells],
                coordinates=placed,
                eigenvectors=vectors,
                measured=np.asarray(source.measured),
                batch=first_batch + i,
                dataset=dataset,
            )
        )
    return samples
