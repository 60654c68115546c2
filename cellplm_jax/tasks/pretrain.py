"""Pretraining from a prepared corpus, or from AnnData."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.sparse as sparse

from cellplm_jax.config import TrainConfig
from cellplm_jax.data.anndata_io import CountSource, open_counts
from cellplm_jax.data.batches import MemoryStore, Sample, scale_coordinates
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.corpus import is_corpus, open_corpus
from cellplm_jax.data.genes import load_human_table
from cellplm_jax.errors import InputError, require
from cellplm_jax.progress import named_stage
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
    preempted: Callable[[int], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> loop.RunResult:
    """Pretrain a model on a corpus, or on AnnData objects or ``.h5ad`` files that fit in memory.

    The same ``workdir`` resumes. ``config.model.genes`` and the covariate sizes are set from the data.

    Args:
        data: The folder or ``gs://`` address of a corpus created by :func:`cellplm_jax.tasks.prepare.prepare`; or one
            AnnData or path, or a list of them: each is one dataset.
        config: The run.
        workdir: Output directory or ``gs://`` address, readable with :func:`cellplm_jax.load`.
        genes: Gene vocabulary (Ensembl ids); None: every known human gene expressed in enough cells.
        batch_key: Column of ``obs`` with the tissue sample; None: each dataset is one sample.
        spatial_key: Key of ``obsm`` with coordinates, used if present; None: none.
        minimum_gene_cells: Without ``genes``: minimum number of cells that express a gene of the vocabulary.
        card: Facts for the model card.
        quiet: Disable progress output.
        preempted: Called after every step; True saves and returns. See :func:`cellplm_jax.train.loop.pretrain`.
        devices: Devices to use; None: all.

    Returns:
        The run's result.

    Raises:
        InputError: The data cannot be used.
        MissingDependencyError: The extra ``train`` is not installed.
        CheckpointError: ``workdir`` belongs to another run.
    """
    store: CellStore
    # Before the data are read, which may take minutes.
    require("grain", "train", "Pretraining")
    corpus = _corpus_path(data)
    if corpus is not None:
        if genes is not None or batch_key is not None:
            raise InputError(
                f"'{corpus}' is a corpus, and {'genes' if genes is not None else 'batch_key'} was given",
                "the vocabulary and the samples it was prepared with",
                "Omit it, or prepare another corpus",
            )
        store = open_corpus(corpus)
    else:
        with named_stage("pretraining: reading cells", quiet=quiet):
            samples, vocabulary = read_samples(
                data,
                genes=genes,
                batch_key=batch_key,
                spatial_key=spatial_key,
                minimum_gene_cells=minimum_gene_cells,
            )
        store = MemoryStore(samples, vocabulary, seed=config.seed)
    model = dataclasses.replace(config.model, genes=len(store.genes))
    config = dataclasses.replace(config, model=model)
    return loop.pretrain(
        config,
        store,
        workdir,
        card=card,
        quiet=quiet,
        preempted=preempted,
        devices=devices,
    )


def _corpus_path(data: Any) -> str | None:
    """Return the path of the one corpus in ``data``, or None if it contains other data."""
    entries = list(data) if isinstance(data, list | tuple) else [data]
    paths = [os.fspath(entry) for entry in entries if isinstance(entry, str | os.PathLike)]
    corpora = [path for path in paths if is_corpus(path)]
    if corpora and len(entries) > 1:
        raise InputError(
            f"the corpus '{corpora[0]}' was given with {len(entries) - 1} more",
            "one corpus, or AnnData and .h5ad files",
            "Add the other files to the corpus with 'cellplm prepare', or omit them",
        )
    return corpora[0] if corpora else None


def read_samples(
    data: Any,
    *,
    genes: Sequence[str] | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    minimum_gene_cells: int = 10,
) -> tuple[list[Sample], list[str]]:
    """Read datasets as tissue samples over one vocabulary.

    Args:
        data: One AnnData or path, or a list of them; each is one dataset.
        genes: Gene vocabulary; None: every known human gene that at least ``minimum_gene_cells`` cells express.
        batch_key: Column of ``obs`` with the tissue sample; None: each dataset is one sample.
        spatial_key: Key of ``obsm`` with coordinates, used if present.
        minimum_gene_cells: See ``genes``.

    Returns:
        The samples and the vocabulary.

    Raises:
        InputError: A dataset cannot be used, or no gene is left.
    """
    datasets = list(data) if isinstance(data, list | tuple) else [data]
    if not datasets:
        raise InputError("no data", "at least one AnnData or .h5ad file", "Pass at least one")
    wide = sorted(load_human_table().symbols) if genes is None else list(genes)
    samples: list[Sample] = []
    for dataset, entry in enumerate(datasets):
        name = Path(entry).stem if isinstance(entry, str | os.PathLike) else f"dataset {dataset}"
        with open_counts(entry, wide) as source:
            samples += _samples_of(source, name, dataset, len(samples), batch_key, spatial_key)
    if genes is not None:
        return samples, wide
    # Cells with a count, over all samples together.
    expressed = sum(np.bincount(s.counts.indices, minlength=len(wide)) for s in samples)
    kept = np.flatnonzero(np.asarray(expressed) >= minimum_gene_cells)
    if kept.size == 0:
        raise InputError(
            f"no gene is expressed in {minimum_gene_cells} cells",
            "at least one",
            "Lower minimum_gene_cells or add more cells",
        )
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
        placed = None
        if coordinates is not None and np.isfinite(coordinates[cells]).all(axis=1).any():
            placed = scale_coordinates(coordinates[cells])
        samples.append(
            Sample(
                name=sample_name,
                counts=counts[cells],
                coordinates=placed,
                measured=np.asarray(source.measured),
                batch=first_batch + i,
                dataset=dataset,
            )
        )
    return samples
