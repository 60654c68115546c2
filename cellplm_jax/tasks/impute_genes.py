"""Which genes an imputer predicts, from which cells: panels, references, and names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import map_genes
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.contexts import CellTable

if TYPE_CHECKING:
    from anndata import AnnData

FEWER_GENES = 0.9
"""Without a reference: batches that measure less than this fraction of all genes are imputed."""


def find_genes(genes: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """Return int [genes]: the position of each name in a vocabulary, by the rules for gene names; -1: none.

    Args:
        genes: Ensembl ids or symbols, or names as they are in the vocabulary.
        vocabulary: Names.

    Raises:
        InputError: ``genes`` is a single name instead of a list.
    """
    if isinstance(genes, str) or not len(genes):
        raise InputError(f"genes={genes!r}", "a list of gene names", "Pass genes=['NAME', ...]")
    return np.asarray(map_genes([str(gene) for gene in genes], vocabulary, minimum=0).column, int)


def split_by_panel(table: CellTable) -> tuple[CellTable, CellTable, str]:
    """Split one table into the cells of batches with fewer genes and those of batches with (almost) all; a message.

    Raises:
        InputError: No batch measures fewer genes than others.
    """
    measured = {}
    for name in dict.fromkeys(table.batch):
        counts = table.counts[table.batch == name]
        measured[name] = np.bincount(counts.indices, minlength=len(table.genes)) > 0
    everything = np.any(list(measured.values()), axis=0)
    few = [n for n, own in measured.items() if own.sum() < FEWER_GENES * everything.sum()]
    full = [name for name in measured if name not in few]
    if not few or not full:
        raise InputError(
            f"no reference was given, and none of the {len(measured)} batches measures fewer genes than others",
            f"a reference, or batches of which some measure less than {FEWER_GENES:.0%} of the genes",
            "Pass reference=..., or pass the batches with batch_key",
        )
    message = f"No reference: {len(full)} batches with all genes are the reference for {len(few)} with fewer."
    parts = []
    for names, combine in ((few, np.any), (full, np.any)):
        rows = np.flatnonzero(np.isin(table.batch, names))
        there = combine([measured[name] for name in names], axis=0)
        parts.append(seen_cells(table, rows, there))
    return parts[0], parts[1], message


def requested_genes(
    genes: Sequence[str], target: CellTable, source: CellTable, lacking: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Return the names of requested genes and their columns, int, increasing.

    Args:
        genes: The request.
        target: The panel.
        source: The reference.
        lacking: int, columns that can be imputed.

    Raises:
        InputError: A gene is unknown, measured by the panel, or has no counts in the reference.
    """
    column = find_genes(genes, source.genes)
    for problem, wrong, expected, remedy in (
        ("are known to neither data nor model", column < 0,
         "names or Ensembl ids of genes of the reference (and of the pretrained model)",
         "Correct or remove them"),
        ("are measured by the panel already", target.measured[column],
         "genes outside the panel",
         "Remove them (Denoiser is for measured genes), or remove them from the panel to test on them"),
        ("have no counts in the reference's training cells", ~np.isin(column, lacking),
         "genes that the reference measures",
         "Remove them, or pass a reference that has them"),
    ):  # fmt: skip
        if wrong.any():
            names = [str(g) for g, bad in zip(genes, wrong, strict=True) if bad]
            shown = ", ".join(map(repr, names[:5])) + (" and more" if names[5:] else "")
            raise InputError(
                f"{len(names)} of {len(genes)} requested genes {problem}: {shown}",
                expected,
                remedy,
            )
    column, first = np.unique(column, return_index=True)
    return [str(genes[i]) for i in first], column


def own_names(
    data: AnnData | str | os.PathLike, vocabulary: Sequence[str], read: dict[str, Any]
) -> list[str]:
    """Return the name of every gene of a vocabulary: as in ``var_names`` of a file, else as in the vocabulary.

    Args:
        data: The file.
        vocabulary: The genes.
        read: ``layer`` and ``gene_key``.
    """
    with open_counts(data, list(vocabulary), minimum_genes=0, **read) as source:
        unused, found = set(source.var_names), {}
        for name, column in zip(source.var_names, source.report.genes.column, strict=True):
            # Each name belongs to one gene, the first one.
            if column >= 0 and int(column) not in found and name in unused:
                found[int(column)] = name
                unused.remove(name)
    return [found.get(column, gene) for column, gene in enumerate(vocabulary)]


def seen_cells(table: CellTable, rows: np.ndarray, measured: np.ndarray) -> CellTable:
    """Return selected cells of a table, with their measured genes."""
    return dataclasses.replace(
        table,
        counts=sparse.csr_matrix(table.counts[rows]),
        batch=table.batch[rows],
        coordinates=None if table.coordinates is None else table.coordinates[rows],
        obs=table.obs.iloc[rows],
        measured=measured,
    )
