"""Denoised values next to the counts, for reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import map_genes, symbols_of
from cellplm_jax.display import Displayed
from cellplm_jax.errors import InputError, nearest
from cellplm_jax.evaluate.denoising import log_normalize
from cellplm_jax.evaluate.inputs import column_means, row_sums
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
from cellplm_jax.tasks.contexts import read_cells
from cellplm_jax.tasks.denoise import LAYER, Denoiser
from cellplm_jax.tasks.files import open_store


@dataclass(frozen=True, eq=False, repr=False)
class BeforeAndAfter(Displayed):
    """Counts and their predictions for the same cells.

    Attributes:
        genes: Names of the selected genes, as in the model.
        before: float [cells, genes], log-normalised counts.
        after: float [cells, genes], log-normalised predictions, by the same totals.
        table: One row per gene of ``genes``: ``share_counted``, fraction of cells with a count, ``mean_before`` and
            ``mean_after`` in counts per cell, ``pearson`` over the cells of before and after.
        means_before: float [all genes], mean count per cell.
        means_after: float [all genes], mean predicted count per cell.
        zeros: Fraction of zero entries in the counts.
        expected_zeros: Fraction of these with a prediction of at least half a count.
        counts: CSR [cells, all genes], the counts.
        coordinates: float [cells, 2] if the cells have tissue coordinates.
    """

    genes: list[str]
    before: np.ndarray
    after: np.ndarray
    table: pd.DataFrame
    means_before: np.ndarray
    means_after: np.ndarray
    zeros: float
    expected_zeros: float
    counts: sparse.csr_matrix
    coordinates: np.ndarray | None


def before_and_after(
    denoiser: Denoiser,
    path: str | os.PathLike,
    layer_written: str = LAYER,
    *,
    rows: np.ndarray,
    genes: Sequence[str] | None = None,
    number: int = 10,
    **keys: Any,
) -> BeforeAndAfter:
    """Compare a denoised layer with its counts, for visualisation.

    Args:
        denoiser: The denoiser that wrote the layer.
        path: ``.h5ad`` file with both.
        layer_written: Name of the layer.
        rows: int [cells], increasing: the cells to compare.
        genes: Genes to show; None: those whose predictions vary most between cells; the second one is high in
            other cells than the first.
        number: Number of genes, without ``genes``.
        **keys: As for :meth:`Denoiser.predict`.

    Returns:
        Values of these genes, and means of all.

    Raises:
        InputError: A gene was not denoised, or the file cannot be read.
    """
    from anndata.io import sparse_dataset

    model = denoiser._fitted()
    reading = denoiser.reading.changed(**keys)
    cells = read_cells(
        path,
        model.genes,
        layer=reading.layer,
        gene_key=reading.gene_key,
        feature_type=reading.feature_type,
        spatial_key=reading.spatial_key,
        minimum_genes=0,
    )
    column = np.asarray(cells.report.genes.column, int)
    known = _known_columns(column)
    total = row_sums(cells.counts, "float64")[rows]
    with open_store(path) as file:
        values: Any = file[f"layers/{layer_written}"]
        if not hasattr(values, "shape"):
            values = sparse_dataset(values)
        # In blocks: a layer on disk is read by chunks of cells.
        blocks = [values[part][:, known] for part in np.array_split(rows, len(rows) // 1024 + 1)]
        after = np.concatenate(
            [block.toarray() if sparse.issparse(block) else block for block in blocks]
        ).astype(np.float32)
    counts = sparse.csr_matrix(cells.counts[rows][:, column[known]])
    names = [model.genes[gene] for gene in column[known]]
    logs = log_normalize(after, total=total).astype(np.float32)
    if genes is None:
        places = _telling_genes(logs, number)
    else:
        places = _places_of(genes, names)
    before = log_normalize(counts[:, places], total=total).toarray()
    correlation = np.nan_to_num(pearson_per_gene(before, logs[:, places]), nan=0.0)
    nonzero = counts[:, places] > 0
    stored = sparse.csr_matrix(
        (np.ones(counts.nnz, bool), counts.indices, counts.indptr), counts.shape
    )
    # An expected count of half rounds to one: the zeros that are predicted to be none.
    half = after >= 0.5
    both = stored.multiply(half).sum()
    empty = half.size - counts.nnz
    return BeforeAndAfter(
        genes=[names[place] for place in places],
        before=before,
        after=logs[:, places].astype(np.float64),
        table=pd.DataFrame(
            {
                "share_counted": column_means(nonzero),
                "mean_before": column_means(counts[:, places]),
                "mean_after": after[:, places].mean(axis=0),
                "pearson": correlation,
            },
            index=pd.Index([names[place] for place in places], dtype=object),
        ),
        means_before=column_means(counts),
        means_after=after.mean(axis=0),
        zeros=empty / max(half.size, 1),
        expected_zeros=float((half.sum() - both) / max(empty, 1)),
        counts=counts,
        coordinates=None if cells.coordinates is None else cells.coordinates[rows],
    )


def _known_columns(column: np.ndarray) -> np.ndarray:
    """Return int: the columns of a file in the vocabulary; of several names of one gene the first."""
    known = np.flatnonzero(column >= 0)
    # Their sum is the count of that gene.
    _, first = np.unique(column[known], return_index=True)
    return known[np.sort(first)]


def check_genes(
    denoiser: Denoiser,
    path: str | os.PathLike,
    genes: Sequence[str],
    **keys: Any,
) -> None:
    """Check the genes of :func:`before_and_after` before any work is done.

    Args:
        denoiser: The denoiser.
        path: Its ``.h5ad`` input file.
        genes: Genes to show.
        **keys: As for :meth:`Denoiser.predict`.

    Raises:
        InputError: A gene will not be denoised, or the file cannot be read.
    """
    model = denoiser._fitted()
    reading = denoiser.reading.changed(**keys)
    read = {
        "layer": reading.layer,
        "gene_key": reading.gene_key,
        "feature_type": reading.feature_type,
        "minimum_genes": 0,
    }
    with open_counts(Path(path).expanduser(), model.genes, **read) as source:
        column = np.asarray(source.report.genes.column, int)
    _places_of(genes, [model.genes[gene] for gene in column[_known_columns(column)]])


def _telling_genes(logs: np.ndarray, number: int) -> np.ndarray:
    """Return int: columns that vary most over the cells; the second one correlates least with the first."""
    order = np.argsort(-logs.var(axis=0), kind="stable")[:100]
    if len(order) < 3:
        return order[:number]
    first = np.broadcast_to(logs[:, order[:1]], (len(logs), len(order) - 1))
    # Two genes that vary together would show the same picture twice.
    like = np.nan_to_num(pearson_per_gene(logs[:, order[1:]], first), nan=1.0)
    second = order[1 + int(like.argmin())]
    others = [place for place in order[1:] if place != second]
    return np.array([order[0], second, *others][:number], int)


def _places_of(genes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return int: positions of genes among the denoised ones."""
    positions = np.asarray(map_genes([str(gene) for gene in genes], names, minimum=0).column, int)
    missing = [str(gene) for gene, place in zip(genes, positions, strict=True) if place < 0]
    if missing:
        raise InputError(
            f"gene '{missing[0]}' was not denoised",
            f"one of the {len(names)} shared genes of data and model",
            nearest(missing[0], symbols_of(names), "Check the name"),
        )
    return positions
