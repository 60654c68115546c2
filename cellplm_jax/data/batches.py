"""Tissue samples in memory, and the padded batches of sentences made from them.

Everything random is a function of (seed, step), so a batch can be made again at any time and a run resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sparse

from cellplm_jax.config import DataConfig
from cellplm_jax.errors import InputError, explain
from cellplm_jax.structs import CellBatch


@dataclass(frozen=True)
class Sample:
    """One tissue sample: the cells that may attend to one another.

    Attributes:
        name: What the user calls it.
        counts: CSR float32 [cells, genes] in the order of the model's vocabulary, canonical.
        coordinates: float32 [cells, 2] scaled to [0, 1], NaN for cells without; None: no cell has any.
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

    One factor for both axes, so distances keep their proportions whatever the unit (micrometres, pixels, array rows).

    Args:
        coordinates: float [cells, 2]; NaN where a cell has none.

    Returns:
        float32 [cells, 2] with the smaller corner at (0, 0); NaN stays NaN. One location alone becomes (0, 0).
    """
    coordinates = np.asarray(coordinates, np.float64)
    present = np.isfinite(coordinates).all(axis=1)
    if not present.any():
        return np.full(coordinates.shape, np.nan, np.float32)
    low, high = coordinates[present].min(axis=0), coordinates[present].max(axis=0)
    extent = float((high - low).max())
    scaled = (coordinates - low) / (extent if extent > 0 else 1.0)
    scaled[~present] = np.nan
    return scaled.astype(np.float32)


def laplacian_eigenvectors(
    coordinates: np.ndarray, count: int, *, neighbors: int = 6
) -> np.ndarray:
    """Return the low-frequency eigenvectors of the spatial neighbour graph's normalised Laplacian.

    Args:
        coordinates: float [cells, 2] without NaN.
        count: How many non-trivial eigenvectors.
        neighbors: Nearest neighbours each cell is joined to.

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
    index = np.asarray(KDTree(coordinates).query(coordinates, k=neighbors + 1)[1])
    rows = np.repeat(np.arange(cells), neighbors)
    graph = sparse.csr_matrix(
        (np.ones(rows.size), (rows, index[:, 1:].ravel())), shape=(cells, cells)
    )
    graph = graph.maximum(graph.T)
    scale = sparse.diags(1.0 / np.sqrt(np.maximum(np.asarray(graph.sum(axis=1)).ravel(), 1e-12)))
    similarity = scale @ graph @ scale
    wanted = min(count + 1, cells - 1)
    if cells <= 64:
        values, vectors = np.linalg.eigh(similarity.toarray())
    else:
        # The largest of D^-1/2 A D^-1/2 are the smallest of the Laplacian; a fixed start makes them repeatable.
        start = np.random.default_rng(0).standard_normal(cells)
        values, vectors = eigsh(similarity, k=wanted, which="LA", v0=start)
    order = np.argsort(-values)[1 : count + 1]
    chosen = vectors[:, order]
    result[:, : chosen.shape[1]] = chosen * math.sqrt(cells)
    return result


def bucket(size: int, minimum: int = 32) -> int:
    """Return the smallest of ``minimum * {1, 1.5, 2, 3, 4, 6, ...}`` that holds ``size``.

    Two shapes an octave: over all sizes up to n at most 2 log2(n / minimum) + 1 of them.
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
    """Lay samples out as one padded batch of numpy arrays.

    Args:
        samples: One sentence each.
        cells: Length of the cell axis; None: the bucket of the largest sample.
        nonzeros: Length of the nonzero axis; None: the bucket of the largest sample.
        eigenvectors: Width of the eigenvector array; None leaves it out.

    Returns:
        A :class:`CellBatch`; counts as float32, genes as int32.

    Raises:
        InputError: A sample does not fit the axes given.
    """
    genes = samples[0].counts.shape[1]
    most_cells = max(sample.cells for sample in samples)
    most_nonzeros = max(sample.counts.nnz for sample in samples)
    cells = bucket(most_cells) if cells is None else cells
    nonzeros = bucket(most_nonzeros, 1024) if nonzeros is None else nonzeros
    if most_cells > cells or most_nonzeros > nonzeros:
        msg = explain(
            f"a sample of {most_cells} cells and {most_nonzeros} nonzeros",
            f"at most {cells} cells and {nonzeros} nonzeros",
            "Cut it into windows first",
        )
        raise InputError(msg)
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
        n, stored = sample.cells, sample.counts.nnz
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


def split_heldout(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into training and held-out ones.

    Args:
        samples: All samples.
        fraction: Fraction held out; 0 holds nothing out.
        seed: Seed of the choice.

    Returns:
        Training and held-out samples. With at least ``1 / fraction`` samples, whole samples are held out; with fewer,
        that fraction of every sample's cells, so that there is always something to evaluate on.
    """
    if fraction == 0:
        return list(samples), []
    generator = np.random.default_rng([seed, 1])
    if len(samples) > 1 and len(samples) * fraction > 1 - 1e-9:
        order = generator.permutation(len(samples))
        number = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
        held = set(order[:number].tolist())
        train = [sample for i, sample in enumerate(samples) if i not in held]
        return train, [samples[i] for i in sorted(held)]
    train, heldout = [], []
    for sample in samples:
        order = generator.permutation(sample.cells)
        cut = max(0, min(round(sample.cells * fraction), sample.cells - 1))
        if cut:
            heldout.append(sample.take(np.sort(order[:cut]), f"{sample.name} (held-out cells)"))
        train.append(sample.take(np.sort(order[cut:])) if cut else sample)
    return train, heldout


def window(sample: Sample, cells: int, generator: np.random.Generator) -> Sample:
    """Cut a random window of at most ``cells`` cells out of a sample.

    Random cells of a dissociated sample; the neighbourhood of a random cell where cells have coordinates, so that
    neighbours stay together.
    """
    if sample.cells <= cells:
        return sample
    if sample.coordinates is not None:
        present = np.isfinite(sample.coordinates).all(axis=1)
        if present.sum() >= cells:
            centre = sample.coordinates[generator.choice(np.flatnonzero(present))]
            distance = ((sample.coordinates - centre) ** 2).sum(axis=1)
            distance[~present] = np.inf
            return sample.take(np.sort(np.argpartition(distance, cells - 1)[:cells]))
    return sample.take(np.sort(generator.choice(sample.cells, cells, replace=False)))


@dataclass
class TrainingBatches:
    """Random access to the batches of a run: ``batches[step]`` depends on (seed, step) alone.

    Samples are drawn in proportion to the number of windows they hold, then a window is cut from each.

    Attributes:
        samples: Training samples.
        config: Batch shape.
        seed: Seed of the run.
        eigenvectors: Width of Laplacian eigenvectors; None leaves them out.
    """

    samples: Sequence[Sample]
    config: DataConfig
    seed: int
    eigenvectors: int | None = None
    _weights: np.ndarray = field(init=False, repr=False)
    _nonzeros: int = field(init=False, repr=False)

    def __post_init__(self):
        if not self.samples:
            msg = explain(
                "there is no training sample left",
                f"one with at least {self.config.minimum_cells} cells",
                "Lower data.minimum_cells or data.heldout_fraction, or give more data",
            )
            raise InputError(msg)
        windows = np.array([max(1.0, s.cells / self.config.cells) for s in self.samples])
        self._weights = windows / windows.sum()
        # One nonzero capacity for the whole run, so the step compiles once; denser draws take the next bucket.
        density = max(s.counts.nnz / max(s.cells, 1) for s in self.samples)
        largest = max(min(s.cells, self.config.cells) for s in self.samples)
        self._nonzeros = bucket(int(density * largest * 1.05), 1024)

    def __getitem__(self, step: int) -> CellBatch:
        """Return the batch of one step as numpy arrays."""
        generator = np.random.default_rng([self.seed, 2, step])
        chosen = generator.choice(len(self.samples), self.config.samples, p=self._weights)
        windows = [window(self.samples[i], self.config.cells, generator) for i in chosen]
        most = max(sample.counts.nnz for sample in windows)
        return pad_batch(
            windows,
            cells=self.config.cells,
            nonzeros=self._nonzeros if most <= self._nonzeros else bucket(most, 1024),
            eigenvectors=self.eigenvectors,
        )


def heldout_batches(
    samples: Sequence[Sample],
    config: DataConfig,
    *,
    eigenvectors: int | None = None,
    maximum: int = 16,
) -> Iterator[CellBatch]:
    """Yield fixed batches for evaluation: the same windows every time.

    Args:
        samples: Held-out samples.
        config: Batch shape.
        eigenvectors: Width of Laplacian eigenvectors; None leaves them out.
        maximum: At most this many windows, spread over the samples.
    """
    for sample in list(samples)[:maximum]:
        cut = window(sample, config.cells, np.random.default_rng(0))
        yield pad_batch([cut], cells=bucket(cut.cells), eigenvectors=eigenvectors)
