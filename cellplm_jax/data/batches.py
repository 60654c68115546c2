"""Tissue samples in memory: as arrays, as a store for training, and as padded batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sparse

from cellplm_jax.batch import CellBatch
from cellplm_jax.data.cell_store import LARGEST_STORED_COUNT, CellRun, SampleRecord, storage_order
from cellplm_jax.display import Displayed
from cellplm_jax.errors import InputError


@dataclass(frozen=True)
class Sample:
    """One tissue sample: cells that attend to each other.

    Attributes:
        name: Name of the sample.
        counts: CSR float32 [cells, genes] in vocabulary order, canonical.
        coordinates: float32 [cells, 2] scaled to [0, 1], NaN for cells without coordinates; None: not a spatial sample.
        eigenvectors: float32 [cells, eigenvectors] of the spatial neighbour graph, or None.
        measured: bool [genes]; None: all.
        batch: Row of the batch embedding; -1: unknown.
        dataset: Row of the dataset embedding; -1: unknown.
        platform: Row of the platform embedding; -1: unknown.
    """

    name: str
    counts: sparse.csr_matrix
    coordinates: np.ndarray | None = None
    eigenvectors: np.ndarray | None = None
    measured: np.ndarray | None = None
    batch: int = -1
    dataset: int = -1
    platform: int = -1

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]

    def take(self, index: np.ndarray, name: str | None = None) -> Sample:
        """Return the sample restricted to the cells ``index``, in that order."""
        return replace(
            self,
            name=name or self.name,
            counts=self.counts[index],
            coordinates=None if self.coordinates is None else self.coordinates[index],
            eigenvectors=None if self.eigenvectors is None else self.eigenvectors[index],
        )


def scale_coordinates(coordinates: np.ndarray) -> np.ndarray:
    """Scale the coordinates of one tissue sample to [0, 1].

    Both axes use one factor, which preserves the aspect ratio in any unit (micrometres, pixels, array rows).

    Args:
        coordinates: float [cells, 2]; NaN for cells without coordinates.

    Returns:
        float32 [cells, 2] with the smaller corner at (0, 0); NaN stays NaN. A single location becomes (0, 0).
    """
    coordinates = np.asarray(coordinates, np.float64)
    present = np.isfinite(coordinates).all(axis=1)
    if not present.any():
        return np.full(coordinates.shape, np.nan, np.float32)
    low = coordinates[present].min(axis=0)
    high = coordinates[present].max(axis=0)
    # A single point has no extent to divide by.
    extent = float((high - low).max())
    scaled = (coordinates - low) / (extent if extent > 0 else 1.0)
    scaled[~present] = np.nan
    return scaled.astype(np.float32)


def laplacian_eigenvectors(
    coordinates: np.ndarray,
    count: int,
    *,
    neighbors: int = 6,
) -> np.ndarray:
    """Return the low-frequency eigenvectors of the spatial neighbour graph's normalised Laplacian.

    Args:
        coordinates: float [cells, 2] without NaN.
        count: Number of non-trivial eigenvectors.
        neighbors: Number of nearest neighbours in the graph.

    Returns:
        float32 [cells, count], each column scaled to unit root mean square; columns past ``cells - 1`` are zero.
        Signs are arbitrary (training flips them at random).
    """
    from scipy.sparse.linalg import eigsh
    from scipy.spatial import KDTree

    cells = len(coordinates)
    result = np.zeros((cells, count), np.float32)
    if cells < 3:
        return result
    neighbors = min(neighbors, cells - 1)
    # The nearest one is the cell itself, which is dropped below.
    index = np.asarray(KDTree(coordinates).query(coordinates, k=neighbors + 1)[1])
    rows = np.repeat(np.arange(cells), neighbors)
    graph = sparse.csr_matrix(
        (np.ones(rows.size), (rows, index[:, 1:].ravel())), shape=(cells, cells)
    )
    # Nearest neighbours are not mutual, and the Laplacian must be symmetric.
    graph = graph.maximum(graph.T)
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = sparse.diags(1.0 / np.sqrt(np.maximum(degree, 1e-12)))
    similarity = scale @ graph @ scale
    wanted = min(count + 1, cells - 1)
    # ARPACK needs more cells than requested vectors.
    if cells <= 64:
        values, vectors = np.linalg.eigh(similarity.toarray())
    else:
        # The largest of D^-1/2 A D^-1/2 are the smallest of the Laplacian; a fixed start makes them reproducible.
        start = np.random.default_rng(0).standard_normal(cells)
        values, vectors = eigsh(similarity, k=wanted, which="LA", v0=start)
    # The first eigenvector is constant up to the degree, and distinguishes no positions.
    order = np.argsort(-values)[1 : count + 1]
    chosen = vectors[:, order]
    # Unit vectors have entries of 1 / sqrt(cells); scaled, entries do not depend on the size of the sample.
    result[:, : chosen.shape[1]] = chosen * math.sqrt(cells)
    return result


def bucket(size: int, minimum: int = 32) -> int:
    """Return the smallest of ``minimum * {1, 1.5, 2, 3, 4, 6, ...}`` that is at least ``size``.

    There are two sizes per octave: up to 2 log2(n / minimum) + 1 for all sizes up to n.
    """
    value = minimum
    while value < size:
        value *= 2
    three_quarters = value * 3 // 4
    return three_quarters if value > minimum and three_quarters >= size else value


def pad_batch(
    samples: Sequence[Sample],
    *,
    cells: int | None = None,
    nonzeros: int | None = None,
    eigenvectors: int | None = None,
) -> CellBatch:
    """Pack samples into one padded batch of numpy arrays.

    Args:
        samples: Samples, one per row.
        cells: Length of the cell axis; None: the bucket of the largest sample.
        nonzeros: Length of the nonzero axis; None: the bucket of the largest sample.
        eigenvectors: Width of the eigenvector array; None omits it.

    Returns:
        A :class:`CellBatch`; counts as float32, genes as int32.

    Raises:
        InputError: A sample is larger than the given axes.
    """
    genes = samples[0].counts.shape[1]
    most_cells = max(sample.cells for sample in samples)
    most_nonzeros = max(sample.counts.nnz for sample in samples)
    cells = bucket(most_cells) if cells is None else cells
    nonzeros = bucket(most_nonzeros, 1024) if nonzeros is None else nonzeros
    if most_cells > cells or most_nonzeros > nonzeros:
        raise InputError(
            f"a sample of {most_cells} cells and {most_nonzeros} nonzeros",
            f"a maximum of {cells} cells and {nonzeros} nonzeros",
            "Split it into windows first",
        )
    rows = len(samples)
    indptr = np.zeros((rows, cells + 1), np.int32)
    gene = np.zeros((rows, nonzeros), np.int32)
    count = np.zeros((rows, nonzeros), np.float32)
    cell_mask = np.zeros((rows, cells), bool)
    coordinates = np.zeros((rows, cells, 2), np.float32)
    has_coordinates = np.zeros((rows, cells), bool)
    vectors = None if eigenvectors is None else np.zeros((rows, cells, eigenvectors), np.float32)
    measured = np.ones((rows, genes), bool)
    covariates = {
        name: np.full((rows, cells), -1, np.int32) for name in ("batch", "dataset", "platform")
    }
    for row, sample in enumerate(samples):
        n = sample.cells
        stored = sample.counts.nnz
        indptr[row, : n + 1] = sample.counts.indptr
        indptr[row, n + 1 :] = stored
        gene[row, :stored] = sample.counts.indices
        count[row, :stored] = sample.counts.data
        cell_mask[row, :n] = True
        if sample.coordinates is not None:
            present = np.isfinite(sample.coordinates).all(axis=1)
            has_coordinates[row, :n] = present
            coordinates[row, :n][present] = sample.coordinates[present]
        if vectors is not None and sample.eigenvectors is not None:
            vectors[row, :n] = sample.eigenvectors[:, :eigenvectors]
        if sample.measured is not None:
            measured[row] = sample.measured
        for name, values in covariates.items():
            values[row, :n] = getattr(sample, name)
    return CellBatch(
        indptr=indptr,  # type: ignore[arg-type]
        gene=gene,  # type: ignore[arg-type]
        count=count,  # type: ignore[arg-type]
        cell_mask=cell_mask,  # type: ignore[arg-type]
        coordinates=coordinates,  # type: ignore[arg-type]
        has_coordinates=has_coordinates,  # type: ignore[arg-type]
        eigenvectors=vectors,  # type: ignore[arg-type]
        measured=measured,  # type: ignore[arg-type]
        **covariates,
    )


class MemoryStore(Displayed):
    """Samples in memory as a :class:`cellplm_jax.data.cell_store.CellStore`.

    Args:
        samples: Tissue samples, counts in the order of ``genes``.
        genes: Vocabulary, Ensembl ids.
        seed: Seed of the storage order of dissociated cells.

    Attributes:
        genes: Vocabulary.
        samples: The sample table.
        label_names: Empty: samples in memory have no labels.
        clipped: Number of counts above 65,535, which are clipped to this value.

    Raises:
        InputError: The number of genes of a sample differs from the vocabulary.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        genes: Sequence[str],
        *,
        seed: int = 0,
    ):
        self.genes = list(genes)
        self.label_names = []
        self.samples: list[SampleRecord] = []
        self.clipped = 0
        self._runs: list[CellRun] = []
        self._measured = [sample.measured for sample in samples]
        index = np.uint16 if len(self.genes) <= 65_536 else np.uint32
        for number, sample in enumerate(samples):
            if sample.counts.shape[1] != len(self.genes):
                raise InputError(
                    f"sample '{sample.name}' has {sample.counts.shape[1]} genes, the vocabulary {len(self.genes)}",
                    "the same number in both",
                    "Map the counts to the vocabulary first",
                )
            generator = np.random.default_rng([seed, number])
            # The same order as in a corpus, so that training from memory and from disk see the same windows.
            order = storage_order(sample.cells, sample.coordinates, generator)
            placed = sample.take(order)
            counts = placed.counts
            largest = LARGEST_STORED_COUNT
            self.clipped += int((counts.data > largest).sum())
            self._runs.append(
                CellRun(
                    indptr=counts.indptr.astype(np.int64),
                    gene=counts.indices.astype(index),
                    # uint16 would wrap around.
                    count=np.minimum(counts.data, largest).astype(np.uint16),
                    coordinates=placed.coordinates,
                )
            )
            self.samples.append(
                SampleRecord(
                    name=sample.name,
                    dataset_name=f"dataset {sample.dataset}",
                    platform_name="",
                    cells=sample.cells,
                    nonzeros=int(counts.nnz),
                    spatial=sample.coordinates is not None,
                    batch=number,
                    dataset=sample.dataset,
                    platform=sample.platform,
                )
            )

    def _display(self) -> dict[str, int]:
        cells = sum(sample.cells for sample in self.samples)
        return {"samples": len(self.samples), "cells": cells, "genes": len(self.genes)}

    def indptr(self, sample: int) -> np.ndarray:
        """Return int64 [cells + 1]: offsets of each cell's stored counts."""
        return self._runs[sample].indptr

    def read(self, sample: int, start: int, stop: int) -> CellRun:
        """Read cells ``start`` to ``stop`` (exclusive) of one sample."""
        whole = self._runs[sample]
        low = int(whole.indptr[start])
        high = int(whole.indptr[stop])
        return CellRun(
            indptr=whole.indptr[start : stop + 1] - low,
            gene=whole.gene[low:high],
            count=whole.count[low:high],
            coordinates=None if whole.coordinates is None else whole.coordinates[start:stop],
        )

    def measured(self, sample: int) -> np.ndarray | None:
        """Return bool [genes], the genes measured in the sample; None: all."""
        return self._measured[sample]

    def fingerprint(self) -> str:
        """Return a short hash of the vocabulary and of the sample table."""
        table = [(s.name, s.dataset_name, s.cells, s.nonzeros) for s in self.samples]
        return hashlib.sha256(repr((self.genes, table)).encode()).hexdigest()[:16]
