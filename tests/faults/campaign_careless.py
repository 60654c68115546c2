"""Careless input: every AnnData gives the right counts, or one message; never a traceback or wrong numbers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.genes import load_human_table, load_mouse_table
from cellplm_jax.errors import CellPLMError
from tests.faults.campaign_hostile import UNSAFE, quiet
from tests.faults.outcome import Outcome

CELLS, GENES = 24, 60


@dataclasses.dataclass
class Data:
    """A data set, and what reading it must give.

    Attributes:
        adata: The data.
        truth: float64 [cells, genes of the vocabulary], the counts that are right.
        keys: Arguments of the reader.
        coordinates: float64 [cells, 2]; None: none.
        refused: Words that a refusal may contain; a data set with words must be refused.
        refusable: Whether a refusal is as right as the counts.
    """

    adata: anndata.AnnData
    truth: np.ndarray
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    coordinates: np.ndarray | None = None
    refused: str = ""
    refusable: bool = False


@functools.cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Return Ensembl ids and current symbols of genes that are written in one way only."""
    table, mouse = load_human_table(), load_mouse_table()
    known = {
        human: name
        for name, human in mouse.items()
        if name[1:2].islower() and not name.startswith("ENS")
    }
    ids = [
        gene
        for gene, symbol in table.symbols.items()
        if table.genes.get(symbol, ("", ()))[1] == (gene,)
        and table.genes[symbol][0] == "current"
        and symbol.isupper()
        and gene in known
        and known[gene].upper() == symbol
    ]
    wanted = ["CD4", "CD8A", "CAT", "APP", "PTPRC"]
    first = [gene for gene in ids if table.symbols[gene] in wanted]
    chosen = sorted([*first, *[gene for gene in ids if gene not in first][: GENES - len(first)]])
    return chosen, [table.symbols[gene] for gene in chosen]


def clean(random: np.random.Generator) -> Data:
    """Return a data set without mistakes."""
    ids, _ = vocabulary()
    counts = random.poisson(random.gamma(0.7, 3.0, (1, len(ids))), (CELLS, len(ids))).astype(float)
    counts[:, 0] += 2
    obs = pd.DataFrame(
        {"sample": [f"s{n % 3}" for n in range(CELLS)]}, index=[f"c{n}" for n in range(CELLS)]
    )
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(ids)))
    return Data(adata, counts)


# -- names of genes -------------------------------------------------------------------------------


def _named(data: Data, names: list[str]) -> Data:
    data.adata.var_names = names
    return data


def _with_features(
    data: Data, names: list[str], values: np.ndarray, var: dict[str, list] | None = None
) -> Data:
    """Append features whose counts must not be added to any gene."""
    old, count = data.adata, data.adata.n_vars
    table = pd.DataFrame(index=[*old.var_names, *names])
    for column, (genes, others) in (var or {}).items():
        table[column] = [genes] * count + (
            others if isinstance(others, list) else [others] * len(names)
        )
    matrix = sparse.hstack([old.X, sparse.csr_matrix(values)]).tocsr()
    data.adata = anndata.AnnData(matrix, obs=old.obs, var=table)
    return data


def symbols(data, random):
    return _named(data, vocabulary()[1])


def versions(data, random):
    return _named(data, [f"{gene}.{random.integers(1, 30)}" for gene in vocabulary()[0]])


def lower_case(data, random):
    return _named(data, [name.lower() for name in vocabulary()[1]])


def r_dots(data, random):
    return _named(data, [name.replace("-", ".") for name in vocabulary()[1]])


def spaces(data, random):
    return _named(data, [f" {name}\t" for name in vocabulary()[1]])


def mixed_ids(data, random):
    ids, names = vocabulary()
    return _named(data, [names[n] if random.integers(2) else ids[n] for n in range(len(ids))])


def ids_in_column(data, random):
    column = str(random.choice(["gene_ids", "ensembl_id", "feature_id", "ENSEMBL"]))
    data.adata.var[column] = vocabulary()[0]
    return _named(data, [f"gene{n}" for n in range(len(vocabulary()[0]))])


def shuffled(data, random):
    order = random.permutation(data.adata.n_vars)
    data.adata = data.adata[:, order].copy()
    return data


def view(data, random):
    data.adata = data.adata[np.arange(CELLS)]
    return data


def unknown_genes(data, random):
    count = int(random.integers(1, 40))
    return _with_features(
        data, [f"novel{n}" for n in range(count)], random.poisson(2, (CELLS, count))
    )


def copies(data, random):
    """``make_unique`` of anndata or R."""
    symbols(data, random)
    mark = "-" if random.integers(2) else "."
    names = [f"{name}{mark}1" for name in ("CAT", "APP", "CD4")]
    return _with_features(data, names, random.poisson(50, (CELLS, 3)))


def mouse_beside(data, random):
    """A few genes of mice in a file of human genes."""
    symbols(data, random)
    return _with_features(data, ["Cd4", "Cd8a", "Ptprc"], random.poisson(50, (CELLS, 3)))


def half_mouse(data, random):
    symbols(data, random)
    names = [name.capitalize() for name in vocabulary()[1]]
    data = _with_features(data, names, random.poisson(5, (CELLS, len(names))))
    data.refused = "two species"
    return data


def genome_prefix(data, random):
    prefix = str(random.choice(["GRCh38_", "hg19_", "GRCh38______", "hg38_"]))
    data.refused = prefix
    return _named(data, [prefix + name for name in vocabulary()[1]])


def zebrafish(data, random):
    _named(data, [name.lower() for name in vocabulary()[1]])
    data = _with_features(
        data, [f"si:dkey-{n}c1" for n in range(10)], random.poisson(1, (CELLS, 10))
    )
    data.refused = "zebrafish"
    return data


def numbers_as_names(data, random):
    data.refused = "gene names"
    return _named(data, [str(n) for n in range(data.adata.n_vars)])


# -- features that are no genes --------------------------------------------------------------------

PROTEINS = ["CD4", "CD8A", "PTPRC", "CAT", "APP"]
CONVENTIONS = (
    ("feature_types", "Gene Expression", "Antibody Capture"),
    ("feature_types", "Gene Expression", "CRISPR Guide Capture"),
    ("feature_types", "Gene Expression", "Multiplexing Capture"),
    ("feature_types", "Gene Expression", "Custom"),
    ("feature_types", "Gene Expression", "Peaks"),
    ("feature_types", "Gene Expression", "Negative Control Probe"),
    ("feature_type", "gene_expression", "protein"),
    ("Feature_Types", "Gene Expression", "antibody_capture"),
    ("modality", "rna", "prot"),
    ("modality", "RNA", "ATAC"),
    ("assay", "RNA", "ADT"),
    ("assay", "SCT", "HTO"),
    ("type", "gene", "hashtag"),
    ("feature_biotype", "gene", "spike-in"),
)


def features(data, random):
    """Antibodies, guides and other features with the names of genes."""
    symbols(data, random)
    column, gene, other = CONVENTIONS[int(random.integers(len(CONVENTIONS)))]
    return _with_features(data, PROTEINS, random.poisson(5000, (CELLS, 5)), {column: (gene, other)})


def features_all(data, random):
    """Everything is read if it is asked for."""
    symbols(data, random)
    values = random.poisson(50, (CELLS, 5))
    data = _with_features(
        data, PROTEINS, values, {"feature_types": ("Gene Expression", "Antibody Capture")}
    )
    for number, name in enumerate(PROTEINS):
        data.truth[:, vocabulary()[1].index(name)] += values[:, number]
    data.keys["feature_type"] = "all"
    return data


def features_missing(data, random):
    data.keys["feature_type"] = str(random.choice(["prot", "Antibody Capture", "Gene"]))
    data.refused = "no features of type"
    return data


def only_proteins(data, random):
    symbols(data, random)
    data.adata.var["feature_types"] = "Antibody Capture"
    data.refused = "lists no genes"
    return data


def other_column(data, random):
    """A column of the same name with another meaning."""
    data.adata.var["type"] = ["protein_coding", "lncRNA"] * (GENES // 2)
    data.adata.var["assay"] = "10x 3' v3"
    return data


def filtered(data, random):
    """CELLxGENE's mark of genes that X does not contain."""
    marks = np.zeros(GENES, bool)
    marks[5:9] = True
    matrix = data.adata.X.toarray()
    matrix[:, marks] = 0
    data.adata.X = sparse.csr_matrix(matrix)
    data.adata.var["feature_is_filtered"] = marks
    data.truth = matrix
    return data


# -- values ----------------------------------------------------------------------------------------


def _scaled(data: Data) -> np.ndarray:
    return data.truth / data.truth.sum(1, keepdims=True) * 1e4


def log_values(data, random):
    data.adata.X = sparse.csr_matrix(np.log1p(_scaled(data)))
    data.refused = "no raw counts"
    return data


def log_with_raw(data, random):
    data.adata.raw = data.adata.copy()
    data.adata.X = sparse.csr_matrix(np.log1p(_scaled(data)))
    return data


def log_with_layer(data, random):
    data.adata.layers[str(random.choice(["counts", "raw_counts", "umi_counts"]))] = (
        data.adata.X.copy()
    )
    data.adata.X = np.log1p(_scaled(data))
    return data


def declared_log(data, random):
    data.adata.X = sparse.csr_matrix(np.log1p(data.truth))
    data.keys["values"] = "log1p"
    data.refusable = True
    return data


def declared_wrongly(data, random):
    data.keys["values"] = str(random.choice(["log1p", "raw", "Counts", ""]))
    data.refused = "values"
    return data


def centred(data, random):
    data.adata.X = data.truth - data.truth.mean(0)
    data.refused = "no raw counts"
    return data


def spoilt(data, random):
    """One value that is no count."""
    matrix = data.truth.copy()
    matrix[int(random.integers(CELLS)), int(random.integers(1, GENES))] = random.choice(
        [np.nan, np.inf, -3, 0.5, 2.0**30, -np.inf]
    )
    data.adata.X = sparse.csr_matrix(matrix)
    data.refused = "expected"
    return data


def zeros(data, random):
    data.adata.X = sparse.csr_matrix(data.truth * 0)
    data.truth = data.truth * 0
    data.refusable = True
    return data


def explicit_zeros(data, random):
    matrix = data.adata.X.tocsr().copy()
    matrix.data[::3] = 0
    data.adata.X = matrix
    data.truth = matrix.toarray()
    return data


def doubled_entries(data, random):
    """Entries that are stored in two halves."""
    coo = sparse.csr_matrix(data.truth).tocoo()
    first = np.floor(coo.data / 2)
    matrix = sparse.csr_matrix((CELLS, GENES))
    order = np.argsort(np.concatenate([coo.row, coo.row]), kind="stable")
    rows = np.concatenate([coo.row, coo.row])[order]
    matrix.data = np.concatenate([first, coo.data - first])[order]
    matrix.indices = np.concatenate([coo.col, coo.col])[order].astype(np.int32)
    matrix.indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=CELLS))]).astype(
        np.int32
    )
    data.adata.X = matrix
    return data


def strings(data, random):
    data.adata.X = data.truth.astype(str).astype(object)
    data.refused = "expected"
    return data


def booleans(data, random):
    data.truth = (data.truth > 0).astype(float)
    data.adata.X = sparse.csr_matrix(data.truth.astype(bool))
    return data


# -- keys and coordinates --------------------------------------------------------------------------


def coordinates(data, random):
    data.coordinates = random.random((CELLS, 2)) * 1000
    form = int(random.integers(6))
    table = {"x": data.coordinates[:, 0], "y": data.coordinates[:, 1]}
    values = [
        data.coordinates,
        np.column_stack([data.coordinates, random.random(CELLS)]),
        pd.DataFrame(table, index=data.adata.obs_names)[["y", "x"]],
        pd.DataFrame({"name": 1.0, **table}, index=data.adata.obs_names)[["name", "y", "x"]],
        sparse.csr_matrix(data.coordinates),
        data.coordinates.astype(np.float32),
    ]
    data.adata.obsm["spatial"] = values[form]
    return data


def coordinates_elsewhere(data, random):
    data.adata.obsm["X_spatial"] = random.random((CELLS, 2))
    data.adata.obs["x"], data.adata.obs["y"] = random.random(CELLS), random.random(CELLS)
    return data


def bad_coordinates(data, random):
    values = [np.zeros((CELLS, 1)), np.full((CELLS, 2), "a", object), np.zeros((CELLS, 2, 2)),
              pd.DataFrame({"x": ["a"] * CELLS, "y": ["b"] * CELLS}, index=data.adata.obs_names)]  # fmt: skip
    data.adata.obsm["spatial"] = values[int(random.integers(len(values)))]
    data.refused = "spatial"
    return data


def bad_key(data, random):
    keys: list[tuple[str, Any, str]] = [
        ("layer", "conts", "no layer"), ("layer", 5, "layer"), ("layer", ["counts"], "layer"),
        ("gene_key", "gene", "no column"), ("gene_key", 3, "gene_key"), ("gene_key", ["a"], "gene_key"),
        ("values", None, ""), ("values", 3, "values"), ("minimum_genes", "ten", "minimum_genes"),
        ("minimum_genes", 2.5, "minimum_genes"), ("minimum_genes", 1000, "genes"), ("feature_type", 4, "feature_type"),
        ("batch_key", ["sample"], "batch_key"), ("batch_key", 5, "batch_key"), ("batch_key", "smaple", "'sample'"),
        ("batch_key", b"sample", "batch_key"), ("spatial_key", 7, "spatial_key"), ("spatial_key", "umap", "obsm"),
        ("spatial_key", ("a",), "spatial_key"), ("cells_per_context", 2.5, "cells_per_context"),
        ("cells_per_context", "10", "cells_per_context"), ("cells_per_context", True, "cells_per_context"),
        ("key_added", 5, "key_added"), ("key_added", "", "key_added"), ("key_added", "a/b", "key_added"),
        ("key_added", ["a"], "key_added"),
    ]  # fmt: skip
    name, value, words = keys[int(random.integers(len(keys)))]
    data.keys[name] = value
    data.refused = words or "values"
    return data


def gaps(data, random):
    values = data.adata.obs["sample"].astype(object)
    values.iloc[3] = [None, np.nan, pd.NA][int(random.integers(3))]
    data.adata.obs["sample"] = values
    data.keys["batch_key"] = "sample"
    data.refused = "is missing for 1 of"
    return data


def odd_obs(data, random):
    """Tables of cells as they come: numbers, booleans, dates, categories that are not used, repeated names."""
    obs = data.adata.obs
    change = int(random.integers(6))
    if change == 0:
        obs["sample"] = np.arange(CELLS) % 2
    elif change == 1:
        obs["sample"] = np.arange(CELLS) % 2 == 0
    elif change == 2:
        obs["sample"] = pd.Categorical(["a"] * CELLS, categories=["b", "a", "c"])
    elif change == 3:
        data.adata.obs_names = ["same"] * CELLS
    elif change == 4:
        obs["sample"] = pd.date_range("2026-01-01", periods=2).repeat(CELLS // 2)
    else:
        obs["sample"] = obs["sample"].astype("string")
    data.keys["batch_key"] = "sample"
    return data


def two_columns(data, random):
    obs = pd.concat([data.adata.obs, data.adata.obs], axis=1)
    data.adata = anndata.AnnData(data.adata.X, obs=obs, var=data.adata.var)
    data.keys["batch_key"] = "sample"
    data.refused = "columns"
    return data


def transposed(data, random):
    data.adata = data.adata.T.copy()
    data.refused = "gene names"
    return data


def empty(data, random):
    data.adata = data.adata[:0].copy() if random.integers(2) else data.adata[:, :0].copy()
    data.refused = "is empty"
    return data


def no_matrix(data, random):
    data.adata = anndata.AnnData(obs=data.adata.obs, var=data.adata.var)
    data.refused = "no matrix"
    return data


MISTAKES: tuple[Callable, ...] = (
    lambda data, random: data, symbols, versions, lower_case, r_dots, spaces, mixed_ids, ids_in_column, shuffled, view,
    unknown_genes, copies, mouse_beside, half_mouse, genome_prefix, zebrafish, numbers_as_names,
    features, features, features, features_all, features_missing, only_proteins, other_column, filtered,
    log_values, log_with_raw, log_with_layer, declared_log, declared_wrongly, centred, spoilt, zeros, explicit_zeros,
    doubled_entries, strings, booleans,
    coordinates, coordinates, coordinates_elsewhere, bad_coordinates, bad_key, bad_key, bad_key, gaps, odd_obs, odd_obs,
    two_columns, transposed, empty, no_matrix,
)  # fmt: skip


# -- storage ---------------------------------------------------------------------------------------


def _as(form: Callable[[Any], Any]) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        matrix = data.adata.X
        if matrix is None or matrix.dtype.kind == "O" or data.adata.is_view:
            return
        with quiet():
            data.adata.X = form(sparse.csr_matrix(matrix))

    return change


STORAGE: dict[str, Callable[[Data], None]] = {
    "csr": _as(lambda m: m),
    "csc": _as(lambda m: m.tocsc()),
    "dense": _as(lambda m: m.toarray()),
    "fortran": _as(lambda m: np.asfortranarray(m.toarray())),
    "float32": _as(lambda m: m.astype(np.float32)),
    "csr array": _as(sparse.csr_array),
    "unsorted": _as(lambda m: m[:, ::-1][:, ::-1]),
}
PLACES = ("memory", "h5ad", "zarr", "backed", "compressed")


def prepare(folder: Path) -> tuple[Path, list[tuple[Callable, str, str]]]:
    """Return the folder and every combination of a mistake, a storage and a place."""
    logging.getLogger("cellplm_jax").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    combinations = list(itertools.product(MISTAKES, STORAGE, PLACES))
    order = np.random.default_rng(0).permutation(len(combinations))
    return folder, [combinations[number] for number in order]


def try_case(inputs: tuple[Path, list], seed: int) -> Outcome:
    """Make a data set with one mistake, and compare what is read with what is right."""
    folder, combinations = inputs
    mistake, storage, place = combinations[seed % len(combinations)]
    random = np.random.default_rng(seed)
    name = mistake.__name__.replace("_", " ").replace("<lambda>", "no mistake")
    with quiet():
        data = mistake(clean(random), random)
        STORAGE[storage](data)
    path = folder / f"case-{seed}.{'zarr' if place == 'zarr' else 'h5ad'}"
    detail = f"{name}, {storage}, {place}, {data.keys}"
    try:
        with quiet():
            source = _placed(data.adata, path, place)
    except Exception as error:  # anndata itself refuses to write it
        return Outcome(place, "not writable", True, f"{detail}: {error}")
    try:
        with quiet():
            result, ok, text = _compare(data, source)
    except CellPLMError as error:
        text = str(error)
        expected = bool(data.refused) and data.refused in text
        ok = (expected or data.refusable) and len(text) <= 1000 and not UNSAFE.search(text)
        result = "refused" if ok else "refused wrongly"
    except Exception as error:
        result, ok, text = "traceback", False, f"{type(error).__name__}: {error}"
    return Outcome(place, result, ok, f"{detail}: {text[:500]}")


def _placed(adata: anndata.AnnData, path: Path, place: str) -> Any:
    if place == "memory":
        return adata
    if place == "zarr":
        adata.copy().write_zarr(path)
        return path
    adata.copy().write_h5ad(path, **({"compression": "gzip"} if place == "compressed" else {}))
    return anndata.read_h5ad(path, backed="r") if place == "backed" else path


def _compare(data: Data, source: Any) -> tuple[str, bool, str]:
    """Read the data as the verbs do, and compare counts and coordinates."""
    from cellplm_jax.data.anndata_io import open_counts
    from cellplm_jax.tasks.embed import check_key, options_of

    keys = dict(data.keys)
    batch_key, spatial_key = keys.pop("batch_key", None), keys.pop("spatial_key", "spatial")
    if "key_added" in keys:
        check_key(keys.pop("key_added"))
    limit = keys.pop("cells_per_context", None)
    options_of({"batch_key": batch_key, "spatial_key": spatial_key, "cells_per_context": limit})
    ids, _ = vocabulary()
    with open_counts(source, ids, **keys) as counts:
        if batch_key is not None:
            counts.column(batch_key)
        placed = counts.coordinates(spatial_key, required=spatial_key != "spatial")
        found = np.asarray(counts.read(0, counts.cells).todense())
    if data.refused:
        return "accepted", False, f"expected a refusal with {data.refused!r}"
    if found.shape != data.truth.shape or not np.allclose(found, data.truth, rtol=1e-5):
        wrong = (
            np.flatnonzero(~np.isclose(found, data.truth).all(0))
            if found.shape == data.truth.shape
            else []
        )
        return (
            "wrong counts",
            False,
            f"{found.shape}, genes {[vocabulary()[1][n] for n in wrong[:5]]}",
        )
    if data.coordinates is not None and (
        placed is None or not np.allclose(placed, data.coordinates, rtol=1e-5)
    ):
        return "wrong coordinates", False, ""
    return "right", True, ""
