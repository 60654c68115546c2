"""Features of a file: which of them are genes, and which gene of the model each one is."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cellplm_jax.data.anndata_files import Opened, Place
from cellplm_jax.data.genes import (
    ORTHOLOGUE,
    FittedGenes,
    GeneMapping,
    is_ensembl,
    map_genes,
    require_matches,
    symbols_of,
)
from cellplm_jax.data.species import other_species
from cellplm_jax.errors import InputError, listing, nearest, quote

if TYPE_CHECKING:
    import pandas as pd

GENE_COLUMNS = (
    "ensembl_id",
    "ensembl_ids",
    "ensembl",
    "ensembl_gene_id",
    "ensembl_gene_ids",
    "gene_ids",
    "gene_id",
    "geneid",
    "feature_id",
    "feature_name",
    "gene_symbols",
    "gene_symbol",
    "gene_names",
    "gene_name",
    "genes",
    "symbol",
    "symbols",
    "hgnc_symbol",
)
"""Columns of ``var`` that may contain gene names (compared in lower case), in addition to ``var_names``."""

SYMBOL_COLUMNS = GENE_COLUMNS[GENE_COLUMNS.index("feature_name") :]
"""Those of them that may contain symbols."""

TYPE_COLUMNS = (
    "feature_types",
    "feature_type",
    "modality",
    "feature_biotype",
    "assay",
    "assay_type",
    "type",
)
"""Columns of ``var`` with the type of a feature (compared in lower case): of 10x, muon, CELLxGENE and Seurat."""

GENE_TYPES = frozenset(
    (
        "gene expression",
        "gene",
        "genes",
        "gex",
        "rna",
        "rna expression",
        "mrna",
        "sct",
        "expression",
    )
)
"""Types of genes, in lower case and with spaces."""

OTHER_TYPES = frozenset(
    (
        "adt", "antibody", "antibody capture", "antigen capture", "prot", "protein", "protein expression",
        "protein scaffold", "hto", "hashtag", "hashing", "multiplexing capture", "cmo", "lmo",
        "crispr", "crispr guide capture", "guide", "gdo", "sgrna", "grna",
        "atac", "peaks", "chromatin accessibility", "motif", "activity", "geneactivity", "gene activity",
        "custom", "spike in", "ercc", "vdj", "tcr", "bcr", "methylation",
        "negative control probe", "negative control codeword", "unassigned codeword", "deprecated codeword",
        "blank codeword", "genomic control", "blank",
    )
)  # fmt: skip
"""Types of other features."""

ALL_FEATURES = "all"
"""Value of ``feature_type`` that reads every feature."""

FILTERED_COLUMN = "feature_is_filtered"
"""Column of CELLxGENE: True for genes that ``X`` does not contain, although ``raw.X`` does."""


class Features(NamedTuple):
    """Features of a matrix that are read.

    Attributes:
        kept: bool [features].
        others: Number of features of every type that is left out.
        notes: Messages.
    """

    kept: np.ndarray
    others: dict[str, int]
    notes: tuple[str, ...]


def choose_features(
    opened: Opened,
    place: Place,
    feature_type: str | None = None,
) -> Features | None:
    """Choose the features that are genes; antibodies and guides can have the names of genes.

    Args:
        opened: The AnnData.
        place: The matrix.
        feature_type: Type to read instead, as the file names it; "all": every feature.

    Returns:
        The features; None: all of them.

    Raises:
        InputError: None is left, or there is no such type.
    """
    var = place.var()
    if feature_type == ALL_FEATURES:
        return None
    kept = np.ones(len(var), bool)
    others = Counter()
    notes = []
    present: dict[str, list[str]] = {}
    found = feature_type is None
    for column, values in _typed_columns(var):
        plain = [_plain(value) for value in values]
        known = set(plain) & (GENE_TYPES | OTHER_TYPES)
        listed = column.lower() in TYPE_COLUMNS[:2]
        present[column] = list(dict.fromkeys(values))
        if feature_type is not None:
            here = np.array([value == _plain(feature_type) for value in plain])
            if found or not here.any():
                continue
            found = True
        else:
            # Columns such as 'type' have other uses; they count only if every value is a type of feature.
            if not known or (not listed and set(plain) - known - {""}):
                continue
            # A feature without a type counts as a gene.
            here = np.array([value in GENE_TYPES or not value for value in plain])
        left_out = Counter(
            value for value, keep in zip(values, here & kept, strict=True) if not keep
        )
        if not here.any():
            raise InputError(
                f"var['{column}'] of {opened.label} lists no genes, only {listing(list(left_out))}",
                "features of the type 'Gene Expression'",
                "Use the file of the genes, or pass feature_type=... (--feature-type) with one of these types",
            )
        if left_out:
            read = next(value for value, keep in zip(values, here, strict=True) if keep)
            shown = ", ".join(f"{n} of {quote(name)}" for name, n in left_out.most_common(5))
            notes.append(
                f"Read {int(here.sum())} features of type {quote(read)} in var['{column}']; left out: {shown}."
            )
            others += Counter({quote(name)[1:-1]: n for name, n in left_out.most_common(20)})
        # Several columns can exclude features; a gene must be one in all of them.
        kept &= here
    if not found:
        types = [value for values in present.values() for value in values]
        raise InputError(
            f"{opened.label} has no features of type {quote(feature_type)}",
            f"one of the types in {listing(list(present))}: {listing(types)}"
            if present
            else f"a column of var with types of features, such as {listing(TYPE_COLUMNS[:3])}",
            nearest(feature_type, types, "Omit feature_type (--feature-type)"),
        )
    # CELLxGENE pads X with zero columns for genes that were filtered: not measured, rather than 0.
    if FILTERED_COLUMN in var.columns and place.name == "X":
        filtered = np.asarray(var[FILTERED_COLUMN])
        filtered = (
            filtered if filtered.dtype == bool else np.array([str(v) == "True" for v in filtered])
        )
        if (filtered & kept).any():
            notes.append(
                f"{int((filtered & kept).sum())} genes that var['{FILTERED_COLUMN}'] marks are not measured in X."
            )
            kept = kept & ~filtered
    if not kept.any():
        raise InputError(
            f"every feature of {opened.label} is left out by its type",
            "at least one gene",
            "Pass feature_type='all' (--feature-type all) to read all of them",
        )
    return None if kept.all() else Features(kept, dict(others), tuple(notes))


def _plain(value: str) -> str:
    return re.sub(r"[\s_.\-]+", " ", value.lower()).strip()


def _typed_columns(var: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Return the columns that may contain types of features, with their values as strings."""
    found = []
    for name in TYPE_COLUMNS:
        for position, column in enumerate(var.columns):
            if str(column).lower() == name and var.iloc[:, position].dtype.kind not in "biufcmM":
                found.append((str(column), texts_of(var.iloc[:, position])))
    return found


def texts_of(column: pd.Series | pd.Index) -> list[str]:
    """Return a column as strings, with missing values as ''.

    Args:
        column: A column of a table, or its index.
    """
    missing = np.asarray(column.isna())
    values = column.astype(object).to_numpy()
    return ["" if absent else str(v).strip() for v, absent in zip(values, missing, strict=True)]


def choose_genes(
    opened: Opened,
    place: Place,
    columns: int,
    vocabulary: Sequence[str],
    gene_key: str | None,
    minimum: int | None,
    features: Features | None = None,
) -> tuple[str, GeneMapping]:
    """Map the requested gene name column, or the column that matches the vocabulary best.

    Args:
        opened: The AnnData.
        place: The matrix.
        columns: Number of its columns.
        vocabulary: Genes of the model.
        gene_key: The requested column; None: search for it.
        minimum: See :func:`cellplm_jax.data.genes.map_genes`.
        features: Features that are read; None: all.

    Raises:
        InputError: There is no such column, or too few genes are known.
    """
    var = place.var()
    if len(var) != columns:
        raise InputError(
            f"{place.name} of {opened.label} has {columns} columns for {len(var)} genes",
            "one column per row of var",
            "The file is damaged; write it again from its source",
        )
    if features is not None:
        var = var[features.kept]
    names = texts_of(var.index)
    if gene_key is not None and gene_key not in var.columns:
        if gene_key not in (var.index.name, "var_names", "index"):
            raise InputError(
                f"var of {opened.label} has no column '{gene_key}'",
                f"one of its columns: {listing(list(var.columns))} (or 'var_names')",
                nearest(
                    gene_key,
                    [*var.columns, "var_names"],
                    "Pass gene_key=... (--gene-key) with one of these names, or leave it out",
                ),
            )
        candidates = {"var_names": names}
    elif gene_key is not None:
        candidates = {str(gene_key): texts_of(_single(var, gene_key, opened))}
    else:
        candidates = {"var_names": names}
        # Ids before symbols: of equally good columns the first is used.
        for known in GENE_COLUMNS:
            for position, column in enumerate(var.columns):
                if str(column).lower() == known and var.iloc[:, position].dtype.kind not in "biufc":
                    candidates[str(column)] = texts_of(var.iloc[:, position])

    fitted = vocabulary.gene_key if isinstance(vocabulary, FittedGenes) else ""
    best: tuple[str, GeneMapping, list[str]] | None = None
    most = -1.0
    for key, texts in candidates.items():
        # A gene without a symbol often has an id in the index.
        filled = [text or name for text, name in zip(texts, names, strict=True)]
        mapping = map_genes(filled, vocabulary, minimum=0)
        # The column that a fit has read is used again, unless its names are of another kind in this file.
        found = mapping.genes_matched * (2.0 if key == fitted else 1.0)
        if found > most:
            best = (key, mapping, filled)
            most = found
    if best is None:  # pragma: no cover - candidates are never empty
        raise InputError("no gene names", "var_names", "Name the genes")
    key, mapping, filled = best
    if mapping.by_rule.get(ORTHOLOGUE):
        # Symbols of rats and mice are written alike; Ensembl ids of the same file distinguish them.
        for name, texts in candidates.items():
            if other_species(texts):
                key, filled = name, texts
                mapping = map_genes(texts, vocabulary, minimum=0)
    where = f"var_names of {opened.label}" if key == "var_names" else f"var['{key}']"
    require_matches(mapping, filled, minimum=minimum, where=where)
    if features is not None:
        column = np.full(columns, -1, np.int32)
        # Back to all columns of the matrix; features that are not read stay -1.
        column[features.kept] = mapping.column
        mapping = dataclasses.replace(mapping, column=column)
    return key, mapping


def _single(table: pd.DataFrame, key: str, opened: Opened) -> pd.Series:
    """Return a column; raise an error if several have its name."""
    values = table[key]
    if values.ndim != 1:
        raise InputError(
            f"{opened.label} has {values.shape[1]} columns '{key}' in one table",
            "different names",
            "Rename one of them",
        )
    return values


def own_symbols(var: pd.DataFrame) -> list[str]:
    """Return the name of each gene for display: its symbol as the file spells it.

    Args:
        var: Table of the genes. If its index has Ensembl ids, symbols are read from the first column of
            :data:`SYMBOL_COLUMNS`, and from the bundled table for genes without an entry.

    Returns:
        One name per gene.
    """
    names = list(map(str, var.index))
    ids = [is_ensembl(name) for name in names]
    if not any(ids):
        return names
    # Reversed, so that the first of several columns wins.
    lower = {str(name).lower(): name for name in reversed(var.columns)}
    column = next((lower[name] for name in SYMBOL_COLUMNS if name in lower), None)
    own = [""] * len(names) if column is None else list(var[column].astype(object))
    found = [
        str(symbol) if given and isinstance(symbol, str) and symbol.strip() else name
        for name, symbol, given in zip(names, own, ids, strict=True)
    ]
    return symbols_of(found)
