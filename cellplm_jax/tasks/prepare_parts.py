"""Third pass of ``cellplm prepare``: the part of each file, written in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from cellplm_jax.data.anndata_io import CountSource, open_counts
from cellplm_jax.data.cell_store import LARGEST_STORED_COUNT, storage_order
from cellplm_jax.data.corpus import index_type, vocabulary_hash
from cellplm_jax.data.corpus_records import FORMAT
from cellplm_jax.data.corpus_writer import PartSample, PartWriter, explain_corpus_errors
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.prepare_run import Advance, Runner, run_stage
from cellplm_jax.untrusted import parse_json, read_text

NONZEROS_IN_MEMORY = 2**28
"""Maximum number of stored counts in memory per task: 1 GiB. A larger file is spooled to disk next to its part."""

BLOCK_NONZEROS = 2**19
"""Approximate number of stored counts per read: fits into a processor cache, because sorting dominates the run time."""


@dataclass(frozen=True)
class Keys:
    """Keys for reading the files; a part made with other keys is made again.

    Attributes:
        sample: Column of ``obs`` with the tissue sample; a file without it is one sample.
        dataset: Column of ``obs`` with the data set, one value per file; without it the file name is used.
        platform: Column of ``obs`` with the platform of each sample.
        spatial: Key of ``obsm`` with coordinates, used if present.
        label: Column of ``obs`` with labels of cells, for the embedding probe during training.
        layer: Layer with the counts; None: detected automatically.
        gene: Column of ``var`` with the gene names; None: detected automatically.
        feature_type: Type of the features that are read; None: genes.
    """

    sample: str | None = None
    dataset: str | None = None
    platform: str | None = None
    spatial: str = "spatial"
    label: str | None = None
    layer: str | None = None
    gene: str | None = None
    feature_type: str | None = None

    def settings(self) -> dict[str, str | None]:
        """Return the keys that a part records; parts from before a key existed were made with its default."""
        keys = dataclasses.asdict(self)
        return (
            keys
            if self.feature_type is not None
            else {k: v for k, v in keys.items() if k != "feature_type"}
        )

    def reading(self) -> dict[str, Any]:
        """Return the arguments of :func:`cellplm_jax.data.anndata_io.open_counts`."""
        return {"layer": self.layer, "gene_key": self.gene, "feature_type": self.feature_type}

    def columns(self) -> dict[str, str]:
        """Return the option and the name of every requested column of ``obs``."""
        asked = {name: getattr(self, name) for name in ("sample", "dataset", "platform", "label")}
        return {f"{name}_key": column for name, column in asked.items() if column is not None}


@dataclass(frozen=True)
class Facts:
    """Results of the first pass over a file.

    Attributes:
        cells: Number of cells.
        columns: Columns of ``obs``.
        spatial: Whether it has coordinates under the key.
        genes_matched: Measured genes of the vocabulary (or known human genes).
        unmatched: Unknown gene names, without the ambiguous ones.
        ambiguous: Gene names that refer to several genes.
        notes: Messages about choices.
    """

    cells: int
    columns: tuple[str, ...]
    spatial: bool
    genes_matched: int
    unmatched: int
    ambiguous: int
    notes: tuple[str, ...]


def count_blocks(source: CountSource) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Read a file in order in blocks of about ``BLOCK_NONZEROS`` counts; yields (cells read so far, block)."""
    start, rows = 0, 256
    while start < source.cells:
        stop = min(start + rows, source.cells)
        block = source.read(start, stop)
        yield stop, block
        density = max(1.0, block.nnz / (stop - start))
        # Follows the density of the last block, with growth limited, because files are sorted by sample.
        rows = int(np.clip(BLOCK_NONZEROS / density, 64, 4 * rows))
        start = stop


def write_parts(
    run: Runner,
    files: Mapping[str, Path],
    sources: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Facts],
    keys: Keys,
    genes: list[str],
    folder: Path,
    nonzeros_in_memory: int,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """Write the unfinished parts; returns their records by name."""
    settings = keys.settings()
    digest = vocabulary_hash(genes)
    tasks = {
        name: (path, name, keys, folder, sources[name], facts[name], nonzeros_in_memory)
        for name, path in files.items()
        if not _is_finished(folder, name, sources[name], settings, digest)
    }
    sizes = {name: facts[name].cells for name in files}
    return run_stage(run, "writing parts", _write_file, tasks, sizes, "cells", quiet)


def _is_finished(
    folder: Path,
    name: str,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    vocabulary: str,
) -> bool:
    """Return whether a part was made from this source, with these settings and this vocabulary."""
    try:
        record = parse_json(read_text(folder / "parts" / f"{name}.json"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and record.get("format") == FORMAT
        and record.get("source") == source
        and record.get("settings") == settings
        and record.get("vocabulary") == vocabulary
        and (folder / "parts" / f"{name}.zarr" / "zarr.json").is_file()
    )


def _write_file(
    path: Path,
    name: str,
    keys: Keys,
    folder: Path,
    described: Mapping[str, Any],
    facts: Facts,
    nonzeros_in_memory: int,
    advance: Advance,
) -> dict[str, Any]:
    """Write the part of one file."""
    genes = (folder / "genes.txt").read_text(encoding="utf-8").splitlines()
    spool = Spool(folder / "parts" / f".{name}.spool", index_type(len(genes)), nonzeros_in_memory)
    clipped = 0
    with (
        explain_corpus_errors(f"part '{name}' of the corpus '{folder}'"),
        contextlib.closing(spool),
        open_counts(path, genes, **keys.reading()) as source,
    ):
        # Reading dominates the run time; writing starts after the complete file has been read.
        for stop, block in count_blocks(source):
            counts = block.data
            if counts.size and counts.max() > LARGEST_STORED_COUNT:
                clipped += int((counts > LARGEST_STORED_COUNT).sum())
                counts = np.minimum(counts, LARGEST_STORED_COUNT)
            spool.append(block.indices, counts, np.diff(block.indptr))
            advance(stop)
        per_cell = spool.cell_nonzeros()
        # Needs the counts per cell: cells without counts are omitted.
        layout = _lay_out(source, name, keys, per_cell)
        notes = [*source.report.notes, *layout.notes]
        if clipped:
            notes.append(f"{clipped} counts above {LARGEST_STORED_COUNT:,} were clipped.")
        mapping = source.report.genes
        outside = mapping.unmatched - mapping.ambiguous - mapping.blank
        counters = {
            "clipped_counts": clipped,
            "unknown_genes": facts.unmatched,
            "ambiguous_genes": facts.ambiguous,
            "genes_outside_vocabulary": outside,
            "duplicated_genes": mapping.duplicated,
            "empty_cells": int((per_cell == 0).sum()),
            "empty_samples": layout.empty_samples,
            "cells_without_label": layout.unlabelled,
            "notes": notes,
        }
        order = layout.order
        with PartWriter(folder, name, genes, per_cell[order]) as writer:
            for rows in spool.runs(order):
                writer.append(*spool.gather(rows))
            return writer.finish(
                layout.samples,
                dataset_name=layout.dataset_name,
                cell_names=source.obs_names[order].tolist(),
                source_rows=order,
                coordinates=layout.coordinates,
                labels=layout.labels,
                measured=source.measured,
                source=described,
                settings=keys.settings(),
                counters=counters,
            )


@dataclass(frozen=True)
class _Layout:
    """Order of the cells of a file in its part.

    Attributes:
        order: int64 [cells], rows of the source in the order of the part, without cells without counts.
        samples: The samples in order.
        dataset_name: The data set.
        coordinates: float32 [cells, 2] in the order of the part, or None.
        labels: Labels in the order of the part, or None.
        empty_samples: Number of samples without cells.
        unlabelled: Number of cells without a label, if the file has labels.
        notes: Messages about choices.
    """

    order: np.ndarray
    samples: list[PartSample]
    dataset_name: str
    coordinates: np.ndarray | None
    labels: list[str | None] | None
    empty_samples: int
    unlabelled: int
    notes: list[str]


def _lay_out(source: CountSource, name: str, keys: Keys, per_cell: np.ndarray) -> _Layout:
    """Sort the cells of a file by sample, and within samples in storage order."""
    notes: list[str] = []
    columns = set(map(str, source.obs.columns))
    dataset = name
    if keys.dataset is not None and keys.dataset in columns:
        dataset = _single(source, keys.dataset, source.column(keys.dataset, missing=""), "file")
    elif keys.dataset is not None:
        notes.append(f"No column '{keys.dataset}' in obs: the data set is called '{name}'.")
    codes = np.zeros(source.cells, np.int64)
    names = [name]
    if keys.sample is not None and keys.sample in columns:
        codes, values = pd.factorize(source.column(keys.sample))
        names = [str(value) for value in values]
    elif keys.sample is not None:
        notes.append(f"No column '{keys.sample}' in obs: the file is one sample.")
    platforms = None
    if keys.platform is not None and keys.platform in columns:
        platforms = source.column(keys.platform, missing="")
    elif keys.platform is not None:
        notes.append(f"No column '{keys.platform}' in obs: platform unknown.")
    if keys.label is not None and keys.label not in columns:
        notes.append(f"No column '{keys.label}' in obs: cells have no labels.")

    positions = source.coordinates(keys.spatial)
    full = np.flatnonzero(per_cell > 0)
    if len(full) < source.cells:
        notes.append(f"{source.cells - len(full)} cells without counts were omitted.")
    # Cells of a sample become contiguous.
    grouped = full[np.argsort(codes[full], kind="stable")]
    sizes = np.bincount(codes[full], minlength=len(names))
    samples = []
    order = []
    placed = []
    empty = []
    for number, cells in enumerate(np.split(grouped, np.cumsum(sizes)[:-1])):
        if not len(cells):
            empty.append(names[number])
            continue
        scaled = None
        if positions is not None and np.isfinite(positions[cells]).all(axis=1).any():
            # Batches import jax, which workers on dissociated cells do not need.
            from cellplm_jax.data.batches import scale_coordinates

            scaled = scale_coordinates(positions[cells])
        # Seeded by names, so that a part is reproducible.
        seed = zlib.crc32(f"{dataset}/{names[number]}".encode())
        chosen = storage_order(len(cells), scaled, np.random.default_rng(seed))
        order.append(cells[chosen])
        placed.append(
            np.full((len(cells), 2), np.nan, np.float32) if scaled is None else scaled[chosen]
        )
        platform = ""
        if platforms is not None:
            platform = _single(source, str(keys.platform), platforms[cells], "sample")
        samples.append(PartSample(names[number], len(cells), platform, scaled is not None))
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{len(empty)} samples without counts were omitted: {shown}.")
    rows = np.concatenate(order) if order else np.zeros(0, np.int64)
    labels, unlabelled = None, 0
    if keys.label is not None and keys.label in columns:
        texts = source.column(keys.label, missing="")[rows]
        # An empty label is none: it was read with missing="".
        labels = [text or None for text in texts.tolist()]
        unlabelled = sum(label is None for label in labels)
    spatial = any(sample.spatial for sample in samples)
    return _Layout(
        order=rows,
        samples=samples,
        dataset_name=dataset,
        coordinates=np.concatenate(placed) if spatial else None,
        labels=labels,
        empty_samples=len(empty),
        unlabelled=unlabelled,
        notes=notes,
    )


def _single(source: CountSource, key: str, labels: np.ndarray, of: str) -> str:
    """Return the only value among the labels of some cells; "" if all are missing."""
    values = pd.unique(labels)
    if len(values) > 1:
        shown = ", ".join(f"'{value}'" for value in values[:5])
        raise InputError(
            f"obs['{key}'] of '{source.report.source}' has {len(values)} values in one {of} ({shown})",
            f"one value per {of}",
            f"Use another column, or split the {of}",
        )
    return str(values[0])


class Spool:
    """Rows of counts, written in one order and read in another, in bounded memory.

    Rows stay in memory up to a limit; beyond it all are written to a file, which is then read once for every
    range of rows that fits the limit.

    Args:
        path: The file, if one is needed.
        dtype: Type of gene indices.
        limit: Maximum number of stored counts in memory.
    """

    def __init__(self, path: Path, dtype: np.dtype, limit: int):
        self.path = path
        self.dtype = dtype
        self.limit = limit
        self.count_blocks: list[tuple[np.ndarray, np.ndarray]] = []
        self._sizes: list[np.ndarray] = []
        self._held = 0
        self._file: IO[bytes] | None = None

    def append(self, gene: np.ndarray, count: np.ndarray, cell_nonzeros: np.ndarray) -> None:
        """Append rows.

        Args:
            gene: Gene indices [nonzeros].
            count: Counts [nonzeros].
            cell_nonzeros: int [rows], stored counts of each.
        """
        block = (gene.astype(self.dtype), count.astype(np.uint16))
        self._sizes.append(np.asarray(cell_nonzeros, np.int64))
        self._held += len(gene)
        if self._file is None and self._held > self.limit:
            # Unbuffered: np.fromfile reads at the position of the descriptor, and a failed write raises here.
            self._file = self.path.open("w+b", buffering=0)
            for held in self.count_blocks:
                self._store(held)
            self.count_blocks = []
        if self._file is None:
            self.count_blocks.append(block)
        else:
            self._store(block)

    def cell_nonzeros(self) -> np.ndarray:
        """Return int64 [rows], the stored counts of each row."""
        return np.concatenate(self._sizes) if self._sizes else np.zeros(0, np.int64)

    def runs(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Split an order of rows into ranges that fit the limit."""
        # In memory any rows are accessible; in a file each range costs one complete read.
        most = self.limit if self._file is not None else min(self.limit, 2**24)
        ends = np.cumsum(self.cell_nonzeros()[order])
        start = 0
        while start < len(order):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
            yield order[start:stop]
            start = stop

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored counts of selected rows, in the given order.

        Args:
            rows: int64 [n], without repetitions.

        Returns:
            Gene indices and counts [nonzeros].
        """
        # Blocks are read in their order, and each row is copied to its place in the result.
        first = np.concatenate([[0], np.cumsum([len(sizes) for sizes in self._sizes])])
        sizes = self.cell_nonzeros()[rows]
        targets = np.cumsum(sizes) - sizes
        gene = np.empty(int(sizes.sum()), self.dtype)
        count = np.empty(len(gene), np.uint16)
        by_row = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[by_row], first)
        offset = 0
        for number, (low, high) in enumerate(itertools.pairwise(cuts)):
            if high > low:
                block_gene, block_count = self._load(number, offset)
                block_sizes = self._sizes[number]
                ends = np.cumsum(block_sizes)
                picked = by_row[low:high]
                local = rows[picked] - first[number]
                spans = zip(
                    (ends[local] - block_sizes[local]).tolist(),
                    ends[local].tolist(),
                    targets[picked].tolist(),
                    strict=True,
                )
                for begin, end, target in spans:
                    gene[target : target + end - begin] = block_gene[begin:end]
                    count[target : target + end - begin] = block_count[begin:end]
            offset += int(self._sizes[number].sum()) * (self.dtype.itemsize + 2)
        return gene, count

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _store(self, block: tuple[np.ndarray, np.ndarray]) -> None:
        for array in block:
            data = memoryview(array.tobytes())
            while data:
                # A raw write may write less than requested.
                data = data[self._file.write(data) :]  # type: ignore[union-attr]

    def _load(self, number: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
        if self._file is None:
            return self.count_blocks[number]
        length = int(self._sizes[number].sum())
        self._file.seek(offset)
        gene = np.fromfile(self._file, self.dtype, length)
        return gene, np.fromfile(self._file, np.uint16, length)
