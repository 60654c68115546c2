"""AnnData input: raw counts in vocabulary order, read in validated blocks.

This module handles all differences between files: the location of the raw counts (``X``, ``raw.X`` or a layer), their
storage (CSR, CSC, dense, on disk or in memory, any numeric type), which features are genes, gene names, and valid
values. The output is always canonical float32 CSR blocks with one column per vocabulary gene. No function builds a
dense cells x genes array of a file.

:func:`open_counts` opens a :class:`CountSource`; :func:`write_h5ad` writes a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from cellplm_jax.data.anndata_files import (
    Opened,
    Place,
    open_object,
    open_path,
    unreadable,
)
from cellplm_jax.data.device_arrays import DeviceRows, DeviceSparseRows
from cellplm_jax.data.features import Features, choose_features, choose_genes, texts_of
from cellplm_jax.data.genes import FittedGenes, GeneMapping
from cellplm_jax.data.matrices import CompressedColumns, Entries, OnDevice, Rows, join
from cellplm_jax.data.value_kinds import (
    DECLARE,
    HIGHEST,
    INTEGER_TOLERANCE,
    LARGEST_COUNT,
    LARGEST_LOG,
    VALUES,
    Values,
    choose_place,
)
from cellplm_jax.display import Displayed
from cellplm_jax.errors import InputError, explain, listing, nearest, require_column, shorten
from cellplm_jax.storage import atomic_write
from cellplm_jax.untrusted import READ_ERRORS, require_options

if TYPE_CHECKING:
    import anndata
    import pandas as pd

POSITION_COLUMNS = (
    ("x", "y"),
    ("x_centroid", "y_centroid"),
    ("center_x", "center_y"),
    ("x_coord", "y_coord"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("array_col", "array_row"),
)
"""Columns of ``obs``, or of a table of coordinates, that contain x and y (compared in lower case)."""

POSITION_MATRICES = (
    "x_spatial",
    "spatial_coords",
    "coordinates",
    "spatial_fov",
    "x_spatial_coords",
)
"""Other names of coordinates in ``obsm`` (compared in lower case)."""


@dataclass(frozen=True, eq=False, repr=False)
class InputReport(Displayed):
    """Choices made when opening an input, for messages and for ``uns``.

    Attributes:
        source: Name of the file, or "AnnData in memory".
        matrix: Location of the counts: "X", "raw.X" or "layers['NAME']".
        storage: Storage format of the matrix: "CSR", "CSC" or "dense", with its numeric type.
        values: "counts", "normalized" or "log1p".
        gene_key: Column of ``var`` with the gene names, or "var_names".
        genes: Result of the gene name mapping.
        cells: Number of cells.
        cells_without_counts: Cells with no count in any vocabulary gene; None until every cell has been read.
        notes: Messages about the choices.
        other_features: Number of features that are not read, by their type.
    """

    source: str
    matrix: str
    storage: str
    values: Values
    gene_key: str
    genes: GeneMapping
    cells: int
    cells_without_counts: int | None
    notes: tuple[str, ...]
    other_features: Mapping[str, int] = field(default_factory=dict)

    def _display(self) -> dict[str, object]:
        return {
            "source": self.source,
            "cells": self.cells,
            "matrix": f"{self.matrix} ({self.storage}, {self.values})",
            **self.genes._display(),
            "gene_key": self.gene_key,
        }

    def messages(self) -> list[str]:
        """Describe the input in a few sentences, one per message.

        Returns:
            Lines to print or log, the most important first.
        """
        key = "var_names" if self.gene_key == "var_names" else f"var['{self.gene_key}']"
        lines = [*self.notes, f"Gene names from {key}: {self.genes.summary()}"]
        if self.cells_without_counts:
            lines.append(
                f"{self.cells_without_counts} of {self.cells} cells have no counts in the "
                "vocabulary genes."
            )
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON and ``AnnData.uns``.

        Returns:
            Strings, numbers, lists and dicts; ``cells_without_counts`` is omitted if unknown.
        """
        report: dict[str, object] = {
            "source": self.source,
            "matrix": self.matrix,
            "storage": self.storage,
            "values": self.values,
            "gene_key": self.gene_key,
            "genes": self.genes.as_dict(),
            "cells": self.cells,
            "notes": list(self.notes),
        }
        if self.other_features:
            report["other_features"] = dict(self.other_features)
        if self.cells_without_counts is not None:
            report["cells_without_counts"] = self.cells_without_counts
        return report


class CountSource(Displayed):
    """Counts of one AnnData in the columns of one vocabulary, read in blocks.

    Created by :func:`open_counts`. Use it as a context manager, or call :meth:`close`, to close a file that it opened;
    AnnData objects passed in stay open and unchanged.

    Attributes:
        cells: Number of cells.
        genes: Number of vocabulary genes, the width of every block.
        obs: The cell table, as stored.
        obs_names: Cell names, str [cells].
        obsm: Cell matrices by name; matrices in a file are read on first access.
        measured: bool [genes], vocabulary genes measured in the file.
    """

    def __init__(
        self,
        opened: Opened,
        place: Place,
        rows: Rows,
        report: InputReport,
        features: Features | None,
    ):
        """Store the fields; use :func:`open_counts` to create an instance."""
        self._opened, self._rows, self._report = opened, rows, report
        self._closed = False
        self._place, self._gene_names = place, texts_of(place.var().index)
        self._kept = None if features is None else features.kept
        self._column = report.genes.column
        self._empty = np.full(report.cells, -1, dtype=np.int8)
        self.cells: int = report.cells
        self.genes: int = len(report.genes.measured)
        self.obs: pd.DataFrame = opened.obs
        self.obs_names: np.ndarray = np.asarray(opened.obs.index.astype(str), dtype=object)
        self.obsm: Mapping[str, Any] = opened.obsm
        self.measured: np.ndarray = report.genes.measured

    def _display(self) -> dict[str, object]:
        return self._report._display()

    def __enter__(self) -> CountSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file if this object opened it. No reads are possible afterwards."""
        self._opened.close()
        self._closed = True

    @property
    def gene_names(self) -> list[str]:
        """Gene names of the file, from the key in the report; '' for unnamed genes and features that are not read."""
        key, names = self._report.gene_key, self._gene_names
        if key != "var_names":
            texts = texts_of(self._place.var()[key])
            names = [text or name for text, name in zip(texts, names, strict=True)]
        if self._kept is None:
            return list(names)
        return [name if kept else "" for name, kept in zip(names, self._kept, strict=True)]

    @property
    def var_names(self) -> list[str]:
        """Index of the genes of the file."""
        return list(self._gene_names)

    @property
    def report(self) -> InputReport:
        """Choices made about the input; complete after every cell has been read."""
        if (self._empty < 0).any():
            return self._report
        return dataclasses.replace(self._report, cells_without_counts=int(self._empty.sum()))

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read consecutive cells.

        Args:
            start: First cell.
            stop: One past the last cell.

        Returns:
            float32 CSR [stop - start, genes], canonical: indices sorted, no duplicates, no zeros.

        Raises:
            InputError: A value is negative, NaN, infinite or not a count, or the file is damaged.
            IndexError: The range is outside the file.
        """
        if not 0 <= start <= stop <= self.cells:
            msg = f"cells {start} to {stop} asked for, of {self.cells}"
            raise IndexError(msg)
        block = self._convert(self._stored(start, stop), np.arange(start, stop))
        self._empty[start:stop] = np.diff(block.indptr) == 0
        return block

    def read_rows(self, indices: Sequence[int] | np.ndarray) -> sparse.csr_matrix:
        """Read any cells, in any order, with repetitions.

        Cells are read in file order, neighbours together, and returned in the requested order.

        Args:
            indices: Cell numbers [n], from 0.

        Returns:
            float32 CSR [n, genes], canonical.

        Raises:
            InputError: As in :meth:`read`.
            IndexError: A number is outside the file.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if not wanted.size:
            return self.read(0, 0)
        order, where = np.unique(wanted, return_inverse=True)
        if order[0] < 0 or order[-1] >= self.cells:
            msg = f"cell {order[0] if order[0] < 0 else order[-1]} asked for, of {self.cells}"
            raise IndexError(msg)
        breaks = np.flatnonzero(np.diff(order) > 1) + 1
        runs = np.split(order, breaks)
        stored = [self._stored(int(run[0]), int(run[-1]) + 1) for run in runs]
        block = self._convert(join(stored, self._rows.dtype), order)
        self._empty[order] = np.diff(block.indptr) == 0
        if len(where) == len(order) and (np.diff(where) > 0).all():
            return block
        return sparse.csr_matrix(block[where])

    @property
    def stored_rows(self) -> DeviceRows | DeviceSparseRows | None:
        """The matrix, if it is in the memory of an accelerator."""
        return self._rows.rows if isinstance(self._rows, OnDevice) else None

    @property
    def vocabulary_column(self) -> np.ndarray:
        """Column of the vocabulary of every gene of the matrix; int [genes of the matrix], -1 for other genes."""
        return self._column

    def note_empty(self, cells: np.ndarray, empty: np.ndarray) -> None:
        """Note which cells have no counts, of cells that are not read here.

        Args:
            cells: int [n].
            empty: bool [n].
        """
        self._empty[cells] = empty

    def blocks(self, rows_per_block: int) -> Iterator[sparse.csr_matrix]:
        """Read the file in order, in blocks.

        Args:
            rows_per_block: Cells per block; the last may have fewer.

        Yields:
            Blocks as in :meth:`read`.

        Raises:
            InputError: As in :meth:`read`, or ``rows_per_block`` is below 1.
        """
        if rows_per_block < 1:
            raise InputError(
                f"rows_per_block {rows_per_block}", "at least 1", "Pass a positive number"
            )
        for start in range(0, self.cells, rows_per_block):
            yield self.read(start, min(start + rows_per_block, self.cells))

    def column(self, key: str, *, missing: str | None = None) -> np.ndarray:
        """Return a column of ``obs`` as string labels.

        Args:
            key: Name of the column (of batches, samples, cell types).
            missing: Label for cells without one; None raises an error for them.

        Returns:
            str [cells] (object array).

        Raises:
            InputError: The column does not exist, or it has gaps and ``missing`` is None.
        """
        require_options({"batch_key": key})
        table = f"obs of {self._opened.label}"
        remedy = "Use one of these columns, or omit the key"
        require_column(self.obs.columns, key, remedy, of=table)
        values = self.obs[key]
        if values.ndim != 1:
            raise InputError(
                f"obs of {self._opened.label} has {values.shape[1]} columns '{key}'",
                "different names",
                "Rename one of them",
            )
        gaps = np.asarray(values.isna())
        if gaps.any() and missing is None:
            first = self.obs_names[int(np.argmax(gaps))]
            raise InputError(
                f"obs['{key}'] is missing for {int(gaps.sum())} of {self.cells} cells, "
                f"the first '{first}'",
                "a label for every cell",
                "Fill the gaps, or remove those cells",
            )
        labels = np.array(values.astype(object).map(str), dtype=object)
        labels[gaps] = missing
        return labels

    def coordinates(self, key: str = "spatial", *, required: bool = False) -> np.ndarray | None:
        """Return the coordinates of every cell.

        Args:
            key: Key in ``obsm``; x and y are the first two columns, or those of a table with such names.
            required: Whether a missing key is an error.

        Returns:
            float64 [cells, 2] in the units of the file; NaN in both columns for cells with missing or infinite
            coordinates. None if the key does not exist and is not required.

        Raises:
            InputError: The key is required and missing, or it is not a numeric matrix with at least two columns.
        """
        require_options({"spatial_key": key})
        if key not in self.obsm:
            if not required:
                self._suggest_coordinates(key)
                return None
            raise InputError(
                f"obsm of {self._opened.label} has no '{key}'",
                f"one of its matrices: {listing(list(self.obsm))}",
                nearest(
                    key, self.obsm, "Pass spatial_key=... (--spatial-key) with one of these names"
                ),
            )
        stored = self.obsm[key]
        if sparse.issparse(stored):
            stored = stored[:, :2].toarray() if stored.shape[1] > 1 else stored.toarray()
        if hasattr(stored, "columns"):
            names = _position_names(stored.columns)
            stored = stored[names] if names else stored
        try:
            positions = np.array(stored, dtype=np.float64)
        except (TypeError, ValueError):
            positions = np.empty((self.cells, 0))
        if positions.ndim != 2 or positions.shape[0] != self.cells or positions.shape[1] < 2:
            raise InputError(
                f"obsm['{key}'] of {self._opened.label} is {np.shape(stored)}, "
                f"of type {getattr(stored, 'dtype', type(stored).__name__)}",
                f"numbers of shape ({self.cells}, 2)",
                "Store x and y of every cell there",
            )
        positions = np.ascontiguousarray(positions[:, :2])
        positions[~np.isfinite(positions).all(axis=1)] = np.nan
        return positions

    def _suggest_coordinates(self, key: str) -> None:
        """Note coordinates that are stored in another place than ``obsm[key]``."""
        others = [name for name in self.obsm if str(name).lower() in POSITION_MATRICES]
        columns = _position_names(self.obs.columns)
        if others:
            note = (
                f"obsm['{others[0]}'] looks like coordinates and was not read; "
                f"pass spatial_key='{others[0]}' (--spatial-key) to use it."
            )
        elif columns:
            x, y = columns
            note = (
                f"obs['{x}'] and obs['{y}'] look like coordinates and were not read; to use them, store them: "
                f"adata.obsm['{key}'] = adata.obs[['{x}', '{y}']].to_numpy()."
            )
        else:
            return
        if note not in self._report.notes:
            self._report = dataclasses.replace(self._report, notes=(*self._report.notes, note))

    # -- from stored rows to vocabulary columns -------------------------------------------------

    def _stored(self, start: int, stop: int) -> Entries:
        """Read stored entries of consecutive cells; a damaged file raises one clear error."""
        if self._closed:
            msg = f"{self._opened.label} was closed; open it again to read from it"
            raise ValueError(msg)
        try:
            return self._rows.read(start, stop)
        except InputError:
            raise
        except READ_ERRORS as error:
            raise InputError(
                f"{self._place.name} of {self._opened.label} cannot be read at cells {start} to "
                f"{stop - 1} ({shorten(' '.join(str(error).split()), 160)})",
                "a complete file",
                "Check that it was copied completely, or write it again",
            ) from error

    def _convert(self, stored: Entries, cells: np.ndarray) -> sparse.csr_matrix:
        """Check every stored value and map the values of ``cells`` to vocabulary columns as float32."""
        if self._kept is not None:
            stored = stored.columns(self._kept)
        data = stored.data if stored.data.dtype != np.float16 else stored.data.astype(np.float32)
        kind, values = data.dtype.kind, self._report.values
        highest, sound = HIGHEST[values], None
        if kind in "ui" and data.size and (data.min() < 0 or data.max() > highest):
            sound = (data >= 0) & (data <= highest)
        elif kind == "f":
            lowest = -INTEGER_TOLERANCE if values == "counts" else 0.0
            with np.errstate(invalid="ignore"):
                sound = (data >= lowest) & (data <= highest)
                if values == "counts":
                    integers = np.rint(data)
                    sound &= np.abs(data - integers) <= INTEGER_TOLERANCE
                    data = integers
        if sound is not None and not sound.all():
            raise InputError(self._damage(stored, cells, sound))
        data = data.astype(np.float32)
        if values == "log1p":
            data = np.expm1(data)
        return in_vocabulary(data, stored.indices, stored.indptr, self._column, self.genes)

    def _damage(self, stored: Entries, cells: np.ndarray, sound: np.ndarray) -> str:
        """Return a message with the worst kind of invalid value, their number and the first."""
        data, counts = stored.data, self._report.values == "counts"
        with np.errstate(invalid="ignore"):
            above = data > HIGHEST[self._report.values]
            kinds = {
                "NaN": np.isnan(data),
                "infinite": np.isinf(data),
                "negative": ~sound & (data < 0),
                "non-integer": ~sound & ~above & counts,
                "too large": above,
            }
        name, hits = next((name, hits) for name, hits in kinds.items() if hits.any())
        position = int(np.argmax(hits))
        row = int(np.searchsorted(stored.indptr, position, side="right")) - 1
        cell, gene = self.obs_names[cells[row]], self._gene_names[int(stored.indices[position])]
        many = f"{int(hits.sum())} {name} value" + ("s" if hits.sum() > 1 else "")
        return explain(
            f"{many} in {self._place.name} of {self._opened.label} (of the {len(cells)} cells from "
            f"number {cells[0]} on); the first is {data[position]} in cell '{cell}', gene '{gene}'",
            {
                "counts": f"raw counts: integers from 0 to {LARGEST_COUNT:.0f}",
                "log1p": f"log1p values: finite numbers from 0 to {LARGEST_LOG:.0f}",
                "normalized": "normalised counts: finite numbers from 0",
            }[self._report.values],
            DECLARE
            if name == "non-integer"
            else "Correct or remove these values, or pass layer=... (--layer) naming another matrix",
        )


def in_vocabulary(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, column: np.ndarray, genes: int
) -> sparse.csr_matrix:
    """Map the entries of compressed rows to vocabulary columns; drop unknown genes and sum duplicates.

    Args:
        data: float32 [entries].
        indices: int [entries], gene of each entry in the source.
        indptr: int [rows + 1].
        column: int32 [genes of the source], from :func:`cellplm_jax.data.genes.map_genes`; -1 for unknown genes.
        genes: Size of the vocabulary.

    Returns:
        float32 CSR [rows, genes], canonical.
    """
    indices = column[indices]
    kept = indices >= 0
    if not kept.all():
        before = np.zeros(kept.size + 1, dtype=np.int64)
        np.cumsum(kept, out=before[1:])
        indptr, indices, data = before[indptr], indices[kept], data[kept]
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, genes))
    if not matrix.has_sorted_indices:
        # Two counting sorts: half the time of sorting row by row, and the entries of a row are in order.
        matrix = sparse.csr_matrix(matrix.tocsc())
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def open_counts(
    source: anndata.AnnData | str | os.PathLike[str],
    vocabulary: Sequence[str],
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    values: Values = "counts",
    minimum_genes: int | None = None,
    feature_type: str | None = None,
) -> CountSource:
    """Open an AnnData to read counts in the columns of a vocabulary.

    If ``layer`` is None, raw counts are searched in ``X``, then ``raw.X`` (used by CELLxGENE), then layers with common
    names. The search reads a bounded sample of each; every value is checked when it is read. If ``gene_key`` is None,
    ``var_names`` and common columns of ``var`` are tried, and the best match with the vocabulary is used.
    Only genes are read if a column of ``var`` has the types of the features (``feature_types`` of 10x, ``modality`` of
    muon, ``feature_biotype`` of CELLxGENE, assay columns). :attr:`CountSource.report` contains the choices.

    Args:
        source: An AnnData (in memory, a view, or backed), or the path of an ``.h5ad`` file or a ``.zarr`` directory,
            which is read block by block and not loaded.
        vocabulary: Genes of the model [genes], normally Ensembl ids.
        layer: Layer with the counts; "X" and "raw.X" select these matrices.
        gene_key: Column of ``var`` with the gene names; "var_names" for the index.
        values: Kind of values. "counts" requires raw counts. "normalized" accepts values normalised by library size,
            without conversion. "log1p" accepts log1p values and inverts them with expm1, so that the model's own log1p
            reproduces them.
        minimum_genes: Minimum number of vocabulary genes in the file; see :func:`cellplm_jax.data.genes.map_genes`.
        feature_type: Type of the features to read; None: genes. "all": every feature, whatever its type.

    Returns:
        An open source; close it, or use it in a ``with`` statement.

    Raises:
        InputError: The file is not an AnnData file, has no cells, genes or raw counts, a key does not exist, or too few
            genes are known.
    """
    import anndata

    require_options(
        {"layer": layer, "gene_key": gene_key, "values": values, "minimum_genes": minimum_genes,
         "feature_type": feature_type}
    )  # fmt: skip
    if values not in VALUES:
        raise InputError(f"values='{values}'", f"one of {listing(VALUES)}", "Correct the spelling")
    if isinstance(source, anndata.AnnData):
        opened = open_object(source)
    elif isinstance(source, str | os.PathLike):
        opened = open_path(Path(source).expanduser())
    else:
        raise InputError(
            f"a source of type {type(source).__name__}",
            "an AnnData or the path of an .h5ad file",
            "Wrap the matrix as anndata.AnnData(X, obs=..., var=...)",
        )
    try:
        return _resolve(opened, vocabulary, layer, gene_key, values, minimum_genes, feature_type)
    except InputError:
        opened.close()
        raise
    except READ_ERRORS as error:
        opened.close()
        if isinstance(source, anndata.AnnData):
            raise InputError(
                f"the AnnData cannot be read ({type(error).__name__}: {shorten(str(error), 160)})",
                "counts, cells and genes that fit each other",
                "Check how it was made, and copy it: adata = adata.copy()",
            ) from error
        raise InputError(unreadable(Path(source), error)) from error
    except BaseException:
        opened.close()
        raise


def _resolve(
    opened: Opened,
    vocabulary: Sequence[str],
    layer: str | None,
    gene_key: str | None,
    values: Values,
    minimum_genes: int | None,
    feature_type: str | None,
) -> CountSource:
    """Choose the matrix and the gene names, and create the source."""
    cells = len(opened.obs)
    some = next(iter(opened.places.values()), None)
    if cells == 0 or (some is not None and len(some.var()) == 0):
        genes = len(some.var()) if some is not None else 0
        raise InputError(
            f"{opened.label} is empty ({cells} cells x {genes} genes)",
            "at least one cell and one gene",
            "Check the filters that were applied to it",
        )
    fitted = vocabulary.matrix if isinstance(vocabulary, FittedGenes) else ""
    place, rows, probe, note = choose_place(opened, layer, values, fitted)
    if rows.shape[0] != cells:
        raise InputError(
            f"{place.name} of {opened.label} has {rows.shape[0]} rows for {cells} cells",
            "one row per cell",
            "The file is damaged; write it again from its source",
        )
    features = choose_features(opened, place, feature_type)
    key, mapping = choose_genes(
        opened, place, rows.shape[1], vocabulary, gene_key, minimum_genes, features
    )
    notes = [note, *(features.notes if features is not None else ())]
    if layer is None and fitted and place.name != fitted:
        notes.append(f"The fit read {fitted}; this file has no such matrix with {values} values.")
    if isinstance(rows, CompressedColumns):
        notes.append(
            f"{place.name} is stored by columns (CSC), so it is loaded into memory completely."
        )
    if values == "counts" and probe.largest == 1:
        notes.append(
            "No count is above 1; binarised counts contain little information for the model."
        )
    if values == "log1p":
        notes.append("Values were transformed with expm1, the inverse of log1p.")
    report = InputReport(
        source=opened.source,
        matrix=place.name,
        storage=f"{rows.kind} {rows.dtype}",
        values=values,
        gene_key=key,
        genes=mapping,
        cells=cells,
        cells_without_counts=None,
        notes=tuple(notes),
        other_features=features.others if features is not None else {},
    )
    counts = CountSource(opened, place, rows, report, features)
    if probe.looks == "damaged counts" and values == "counts":
        for _ in counts.blocks(1024):  # raises an error before any work is done
            pass
    return counts


@contextlib.contextmanager
def nullable_strings() -> Iterator[None]:
    """Allow anndata to write nullable strings of recent pandas versions, if it has a setting for this."""
    import anndata

    with contextlib.ExitStack() as stack:
        if hasattr(anndata.settings, "allow_write_nullable_strings"):
            stack.enter_context(anndata.settings.override(allow_write_nullable_strings=True))
        yield


def write_h5ad(adata: anndata.AnnData, path: str | os.PathLike[str], **options: Any) -> None:
    """Write an ``.h5ad`` file atomically.

    The file is written next to its destination under a temporary name and renamed when complete, so an interrupted run
    leaves no partial or damaged file. Nullable strings of recent pandas versions are written as such if anndata has a
    setting for this.

    Args:
        adata: Data to write.
        path: Destination; an existing file is replaced.
        **options: Passed to ``AnnData.write_h5ad`` (such as ``compression="gzip"``).

    Raises:
        InputError: The folder of ``path`` does not exist, or ``path`` is a folder.
    """
    target = Path(path).expanduser()
    if not target.parent.is_dir() or target.is_dir():
        found = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise InputError(f"'{target}' {found}", "the name of a file to write", "Check the path")
    with nullable_strings(), atomic_write(target) as partial:
        adata.write_h5ad(partial, **options)


def _position_names(columns: Sequence[Any]) -> list[Any]:
    """Return the names of the columns with x and y; empty if there are none."""
    by_lower = {str(name).lower(): name for name in columns}
    for x, y in POSITION_COLUMNS:
        if x in by_lower and y in by_lower:
            return [by_lower[x], by_lower[y]]
    return []
