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
from cellplm_jax.errors import InputError, nearest
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


def imputed_places(
    genes: Sequence[str] | None,
    vocabulary: Sequence[str],
    imputed: Sequence[str],
    columns: np.ndarray,
) -> np.ndarray:
    """Return int: positions of the requested genes among the imputed ones; None: all.

    Args:
        genes: The request.
        vocabulary: Genes of the model.
        imputed: Names of the imputed genes.
        columns: int, their positions in the vocabulary.

    Raises:
        InputError: A requested gene is not imputed.
    """
    if genes is None:
        return np.arange(len(imputed))
    by_name = {name: place for place, name in enumerate(imputed)}
    by_column = {int(column): place for place, column in enumerate(columns)}
    found = find_genes(genes, vocabulary)
    # The name of the reference comes first: two names can map to one gene of the vocabulary.
    places = [
        by_name.get(str(g), by_column.get(int(c), -1)) for g, c in zip(genes, found, strict=True)
    ]
    missing = [str(g) for g, place in zip(genes, places, strict=True) if place < 0]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (" and more" if missing[5:] else "")
        raise InputError(
            f"{len(missing)} of {len(genes)} requested genes are not imputed: {shown}",
            f"some of the {len(imputed)} genes in .imputed, such as {imputed[0]!r}",
            nearest(missing[0], by_name, "Remove them, or fit again with genes=[...]"),
        )
    return np.array(places, int)


def layer_columns(
    adata: Any,
    layer_added: str,
    vocabulary: Sequence[str],
    columns: np.ndarray,
    read: dict[str, Any],
) -> np.ndarray:
    """Return int [n_vars]: position of each gene of ``var`` among ``columns``; -1: none.

    Args:
        adata: The cells.
        layer_added: Name of the layer to write.
        vocabulary: Genes of the model.
        columns: int, positions of predicted genes in the vocabulary.
        read: ``layer`` and ``gene_key``.

    Raises:
        InputError: The name is invalid, or no gene of ``var`` is predicted.
    """
    # "/" would create a group inside the .h5ad file.
    if not layer_added or "/" in layer_added:
        raise InputError(f"layer_added={layer_added!r}", "a name without '/'", "Choose another")
    with open_counts(adata, list(vocabulary), minimum_genes=0, **read) as source:
        column = source.report.genes.column
        key = source.report.gene_key
    where = {int(column): number for number, column in enumerate(columns)}
    positions = np.array([where.get(int(gene), -1) for gene in column], int)
    if len(positions) != getattr(adata, "n_vars", -1) or (positions < 0).all():
        raise InputError(
            f"layer_added='{layer_added}', and no gene of var ({key}) is imputed",
            "an AnnData with (empty) columns for imputed genes",
            "Omit layer_added and use the table that predict returns",
        )
    return positions


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
    genes: Sequence[str],
    target: CellTable,
    source: CellTable,
    lacking: np.ndarray,
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
    data: AnnData | str | os.PathLike,
    vocabulary: Sequence[str],
    read: dict[str, Any],
) -> list[str]:
    """Return the name of every gene of a vocabulary: as in ``var_names`` of a file, else as in the vocabulary.

    Args:
        data: The file.
        vocabulary: The genes.
        read: ``layer`` and ``gene_key``.
    """
    with open_counts(data, list(vocabulary), minimum_genes=0, **read) as source:
        unused = set(source.var_names)
        found = {}
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
