"""Cells in memory, their contexts, and padded examples for fitting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas as pd
from flax import struct
from scipy import sparse

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import ModelConfig
from cellplm_jax.data.anndata_io import CountSource, Values, open_counts
from cellplm_jax.data.batches import (
    Sample,
    bucket,
    laplacian_eigenvectors,
    pad_batch,
    scale_coordinates,
)
from cellplm_jax.data.genes import ORTHOLOGUE, load_human_table
from cellplm_jax.errors import InputError, require_column
from cellplm_jax.evaluate.inputs import column_means, row_sums

if TYPE_CHECKING:
    from anndata import AnnData

    from cellplm_jax.data.anndata_io import InputReport

ONE_BATCH = "all cells"
"""Name of the batch if no ``batch_key`` is given."""


@dataclass(frozen=True, eq=False)
class CellTable:
    """Cells in memory, in the columns of one vocabulary.

    Attributes:
        counts: CSR float32 [cells, genes], canonical.
        genes: Vocabulary [genes].
        measured: bool [genes], genes measured in the data.
        batch: str [cells], the batch (tissue sample) of each cell.
        coordinates: float64 [cells, 2] in the units of the data, NaN for cells without coordinates; None: no cell has
            any.
        obs: The original table of cells.
        report: Choices made about the input.
    """

    counts: sparse.csr_matrix
    genes: list[str]
    measured: np.ndarray
    batch: np.ndarray
    coordinates: np.ndarray | None
    obs: pd.DataFrame
    report: InputReport

    def __len__(self) -> int:
        return self.counts.shape[0]

    def restrict(self, columns: np.ndarray) -> CellTable:
        """Return the same cells with a subset of the genes.

        Args:
            columns: int indices or bool mask of the genes.
        """
        columns = np.arange(len(self.genes))[columns]
        return replace(
            self,
            counts=sparse.csr_matrix(self.counts[:, columns]),
            genes=[self.genes[i] for i in columns],
            measured=self.measured[columns],
        )

    def sample(self, index: np.ndarray, config: ModelConfig, *, batch_row: int = -1) -> Sample:
        """Return selected cells as one context.

        Args:
            index: int [n], cells of one batch.
            config: Determines the kind of positions.
            batch_row: Row of the batch embedding.
        """
        placed = vectors = None
        if self.coordinates is not None and config.positions.kind != "none":
            # Scaled per context: coordinates of different sections have no common origin.
            placed = scale_coordinates(self.coordinates[index])
            present = np.isfinite(placed).all(axis=1)
            if config.positions.kind == "laplacian":
                vectors = np.zeros((len(index), config.positions.eigenvectors), np.float32)
                vectors[present] = laplacian_eigenvectors(
                    placed[present], config.positions.eigenvectors
                )
        return Sample(
            name=str(self.batch[index[0]]) if len(index) else "",
            counts=sparse.csr_matrix(self.counts[index]),
            coordinates=placed,
            eigenvectors=vectors,
            measured=self.measured,
            batch=batch_row,
        )


def read_cells(
    data: AnnData | str | os.PathLike,
    vocabulary: Sequence[str] | None,
    *,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    layer: str | None = None,
    gene_key: str | None = None,
    values: Values = "counts",
    minimum_genes: int | None = None,
    one_batch: bool = False,
    feature_type: str | None = None,
) -> CellTable:
    """Read cells into memory.

    Args:
        data: Raw counts, as for :func:`cellplm_jax.embed`.
        vocabulary: Genes of the model; None: those of the data, as Ensembl ids if most are known human genes, else as
            named in the data (which allows training on other species from scratch).
        batch_key: Column of ``obs`` with the batch (tissue sample) of each cell; None: one batch.
        spatial_key: Key of ``obsm`` with coordinates; the default is used if present.
        layer: See :func:`cellplm_jax.embed`.
        gene_key: See :func:`cellplm_jax.embed`.
        values: See :func:`cellplm_jax.embed`.
        minimum_genes: See :func:`cellplm_jax.embed`.
        one_batch: All cells are one batch if the column ``batch_key`` does not exist, with a note in the report.
        feature_type: See :func:`cellplm_jax.embed`.

    Returns:
        All cells over all genes of the vocabulary.

    Raises:
        InputError: The counts, genes or keys cannot be used.
    """
    genes = vocabulary
    if genes is None:
        genes = own_vocabulary(data, layer, gene_key, values, feature_type)
    with open_counts(
        data,
        genes,
        layer=layer,
        gene_key=gene_key,
        values=values,
        minimum_genes=minimum_genes,
        feature_type=feature_type,
    ) as source:
        batch = np.full(source.cells, ONE_BATCH, object)
        notes: tuple[str, ...] = ()
        if batch_key is not None and one_batch and batch_key not in source.obs.columns:
            notes = (missing_batch(batch_key),)
        elif batch_key is not None:
            batch = source.column(batch_key)
        coordinates = None
        if spatial_key is not None:
            # The default key is used if it exists; a key that the user named must exist.
            coordinates = source.coordinates(spatial_key, required=spatial_key != "spatial")
        counts = source.read(0, source.cells)
        return CellTable(
            counts=counts,
            genes=list(genes),
            measured=np.asarray(source.measured),
            batch=batch,
            coordinates=coordinates,
            obs=source.obs,
            report=replace(source.report, notes=(*source.report.notes, *notes)),
        )


def missing_batch(key: str) -> str:
    """Return the remark about a file without the batch column of the fit."""
    return f"obs has no column '{key}', the batch_key of the fit: all cells are one batch."


def own_vocabulary(
    data: AnnData | str | os.PathLike,
    layer: str | None,
    gene_key: str | None,
    values: Values,
    feature_type: str | None = None,
) -> list[str]:
    """Return the genes of the data: the vocabulary of a model trained from scratch.

    Args:
        data: AnnData or path.
        layer: See :func:`read_cells`.
        gene_key: See :func:`read_cells`.
        values: See :func:`read_cells`.
        feature_type: See :func:`read_cells`.
    """
    # Sorted, so that the vocabulary does not depend on the order of genes in the file.
    human = sorted(load_human_table().symbols)
    read: dict[str, Any] = {
        "layer": layer,
        "gene_key": gene_key,
        "values": values,
        "feature_type": feature_type,
    }
    with open_counts(data, human, minimum_genes=0, **read) as source:
        mapping = source.report.genes
        # Mouse genes keep their own names when training from scratch: no orthologues needed, no genes lost.
        human_names = mapping.matched - mapping.by_rule.get(ORTHOLOGUE, 0)
        # Files contain transgenes and spike-ins; half of the names decides.
        if 2 * human_names >= mapping.matched + mapping.unmatched:
            return [gene for gene, there in zip(human, source.measured, strict=True) if there]
        names = source.gene_names
    return list(dict.fromkeys(name for name in names if name))


def variable_genes(counts: sparse.csr_matrix, number: int) -> np.ndarray:
    """Select highly variable genes by the dispersion of normalised counts among genes of similar mean.

    scanpy's flavour "seurat" (Satija et al. 2015): counts scaled to 10,000 per cell, log1p; the log of variance over
    mean (of the values before the logarithm), standardised within 20 bins of log1p mean.

    Args:
        counts: CSR [cells, genes], raw counts of the training cells.
        number: Number of genes.

    Returns:
        int, increasing: the selected columns; fewer if fewer genes are expressed.
    """
    library = row_sums(counts)
    factor = 1e4 / np.maximum(library, 1)[:, None]
    scaled = counts.astype(np.float64).multiply(factor).tocsr()
    cells = counts.shape[0]
    mean = column_means(scaled)
    # Float64: the variance is a difference of squares.
    square = column_means(scaled.multiply(scaled))
    variance = (square - mean**2) * cells / max(cells - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(variance / mean)
    ratio[~np.isfinite(ratio)] = np.nan
    frame = pd.DataFrame({"ratio": ratio, "bin": pd.cut(np.log1p(mean), bins=20)})
    groups = frame.groupby("bin", observed=True)["ratio"]
    centre = groups.transform("mean")
    spread = groups.transform("std")
    # A single gene in its bin has no standard deviation; it counts as variable.
    alone = spread.isna()
    spread[alone], centre[alone] = centre[alone], 0.0
    standardised = ((frame["ratio"] - centre) / spread.replace(0.0, 1.0)).to_numpy()
    dispersion = np.where(mean > 0, np.nan_to_num(standardised, nan=-1e30), -np.inf)
    # Stable: genes of equal dispersion are chosen by position, the same on every machine.
    expressed = int((mean > 0).sum())
    order = np.argsort(-dispersion, kind="stable")[: min(number, expressed)]
    return np.sort(order)


def deal(cells: np.ndarray, limit: int | None) -> list[np.ndarray]:
    """Assign the cells of one batch to contexts round-robin, so that each is a cross-section of the batch.

    Args:
        cells: int [n].
        limit: Maximum number of cells per context; None or 0: one context.
    """
    count = -(-len(cells) // limit) if limit else 1
    # Round-robin: cells of a file are often sorted by type or position.
    return [cells[start::count] for start in range(count)] if len(cells) else []


def contexts_of(
    batch: np.ndarray,
    cells: np.ndarray,
    *,
    limit: int | None = None,
    part: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Assign cells to contexts: those of one batch (and part) together.

    Args:
        batch: [all cells], names of batches.
        cells: int [n], the cells to assign.
        limit: Maximum number of cells per context; see :func:`deal`.
        part: [all cells], values that separate the cells of one batch (such as the values of a split).

    Returns:
        int arrays, batches in order of first appearance.
    """
    keys = pd.Series(
        list(batch[cells]) if part is None else list(zip(batch[cells], part[cells], strict=True))
    )
    codes, names = pd.factorize(keys)
    groups = [cells[codes == number] for number in range(len(names))]
    return [context for group in groups for context in deal(group, limit)]


class Example(struct.PyTreeNode):
    """Input of one optimizer step.

    Attributes:
        batch: Contexts of cells, one per row.
        targets: Arrays [samples, cells, ...] (or [samples, ...] for context targets) by name.
    """

    batch: CellBatch
    targets: dict[str, jax.Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Layout:
    """An example, with the cell numbers of its slots.

    Attributes:
        example: On the device.
        cells: int64 [samples, cells], numbers in the table; -1: padding.
        contexts: int64 [samples], numbers of the contexts; -1: an empty row.
    """

    example: Example
    cells: np.ndarray
    contexts: np.ndarray


def make_examples(
    table: CellTable,
    contexts: Sequence[np.ndarray],
    config: ModelConfig,
    *,
    targets: Mapping[str, np.ndarray] | None = None,
    context_targets: Mapping[str, np.ndarray] | None = None,
    batch_rows: Mapping[str, int] | None = None,
    cells_per_step: int = 2048,
    shortest: int = 32,
) -> list[Layout]:
    """Pad contexts to examples of few distinct shapes, to limit compilation.

    Contexts of similar size become the rows of one example, limited by ``cells_per_step``. Lengths are the bucket
    of the largest context, or a quarter of it, a sixteenth and so on; examples of one length have one shape.

    Args:
        table: The cells.
        contexts: int arrays of cells of the table; empty ones are omitted.
        config: The architecture.
        targets: Arrays [all cells of the table, ...]; padding gets -1 (integers), 0 or False.
        context_targets: Arrays [contexts, ...]; empty rows get the same padding.
        batch_rows: Row of the batch embedding by batch; None, or a batch without a row: unknown.
        cells_per_step: Maximum number of cells per example, unless a single context is longer.
        shortest: Minimum length of a row of an example.

    Returns:
        The examples, longest first.
    """
    targets = targets or {}
    context_targets = context_targets or {}
    numbers = [number for number, context in enumerate(contexts) if len(context)]
    if not numbers:
        return []
    longest = bucket(max(len(contexts[number]) for number in numbers), shortest)
    groups: dict[int, list[int]] = {}
    for number in numbers:
        length = longest
        # Few lengths mean few compilations; padding to four times the length is cheap for small contexts.
        while length % 4 == 0 and length // 4 >= max(len(contexts[number]), shortest):
            length //= 4
        groups.setdefault(length, []).append(number)
    layouts = []
    for length in sorted(groups, reverse=True):
        members = groups[length]
        steps = -(-len(members) // max(1, cells_per_step // length))
        # Contexts are spread evenly over the steps; rows that some lack are padded below.
        parts = [members[start::steps] for start in range(steps)]
        rows = max(map(len, parts))
        stored = np.diff(table.counts.indptr)
        nonzeros = bucket(max(int(stored[contexts[n]].sum()) for n in members), 1024)
        for part in parts:
            samples = []
            cells = np.full((rows, length), -1)
            for row, number in enumerate(part):
                context = contexts[number]
                cells[row, : len(context)] = context
                name = str(table.batch[context[0]])
                batch_row = -1 if batch_rows is None else batch_rows.get(name, -1)
                samples.append(table.sample(context, config, batch_row=batch_row))
            empty = table.sample(np.zeros(0, int), config)
            # Empty rows, up to the shape that all steps of a length share.
            samples += [replace(empty, coordinates=None, eigenvectors=None)] * (rows - len(part))
            laplacian = config.positions.kind == "laplacian"
            batch = pad_batch(
                samples,
                cells=length,
                nonzeros=nonzeros,
                eigenvectors=config.positions.eigenvectors if laplacian else None,
            )
            whole = np.array([*part, *[-1] * (rows - len(part))])
            example = Example(
                batch=batch,
                targets={
                    **{name: _take(values, cells) for name, values in targets.items()},
                    **{name: _take(values, whole) for name, values in context_targets.items()},
                },  # type: ignore[arg-type]
            )
            layouts.append(Layout(jax.device_put(example), cells, whole))
    return layouts


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return ``values[index]``, with -1 (integers), 0 or False for index -1."""
    taken = np.asarray(values)[np.maximum(index, 0)]
    taken[index < 0] = -1 if np.issubdtype(taken.dtype, np.signedinteger) else 0
    return taken


def gather(layouts: Sequence[Layout], outputs: Sequence[np.ndarray], cells: int) -> np.ndarray:
    """Reorder outputs of padded examples to the order of the table.

    Args:
        layouts: The examples.
        outputs: Arrays [samples, cells, ...], one per example.
        cells: Cells of the table.

    Returns:
        float32 [cells, ...]; NaN for cells of no example.
    """
    result = np.full(
        (cells, *np.shape(outputs[0])[2:]),
        np.nan,
        np.float32,
    )
    for layout, values in zip(layouts, outputs, strict=True):
        here = layout.cells >= 0
        result[layout.cells[here]] = np.asarray(values)[here]
    return result


def source_groups(
    source: CountSource,
    batch_key: str | None,
    part: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return the cells of each batch (and part) of an opened source, in order of first appearance.

    Args:
        source: The cells.
        batch_key: Column of ``obs`` with the batch; None: one batch.
        part: See :func:`contexts_of`.
    """
    batch = np.full(source.cells, ONE_BATCH, object)
    if batch_key is not None:
        batch = source.column(batch_key)
    return contexts_of(batch, np.arange(source.cells), part=part)


def require_same_cells(truth: CellTable, names: Sequence[str]) -> None:
    """Raise an error for a truth of other cells.

    Args:
        truth: Cells with the true values.
        names: Names of the predicted cells.

    Raises:
        InputError: The cells, or their order, differ.
    """
    if list(truth.obs.index.astype(str)) != list(names):
        raise InputError(
            f"truth has {len(truth)} cells and adata {len(names)}, or other names",
            "the same cells in the same order",
            "Select them the same way first",
        )


def labels_of(obs: pd.DataFrame, key: str) -> np.ndarray:
    """Return a column of labels as strings, None for missing ones.

    Args:
        obs: The table of cells.
        key: Column.

    Returns:
        [cells], object array of str and None.

    Raises:
        InputError: The column does not exist.
    """
    require_column(list(map(str, obs.columns)), key, "Use the column with the labels")
    values = obs[key].astype(object)
    missing = np.asarray(values.isna())
    texts = zip(values, missing, strict=True)
    result = np.empty(len(obs), object)
    result[:] = [None if gone else str(value) for value, gone in texts]
    return result
