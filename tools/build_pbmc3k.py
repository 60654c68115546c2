"""Rebuild the bundled PBMC3k counts, ``cellplm_jax/resources/pbmc3k.h5ad``, from a public wheel.

The counts of the 10x Genomics data set "3k PBMCs from a Healthy Donor" (CC BY 4.0) travel inside the PyPI wheel
``desc`` 2.1.1 (MIT) as ``desc/datasets/pbmc.h5ad``: 2,700 cells x 32,738 genes. This tool downloads that wheel, keeps
the genes seen in at least three cells (13,714, the customary subset), adds Ensembl ids and marker-gene labels and
writes one deterministic file: running it twice gives the same bytes.

Run from the repository root::

    python tools/build_pbmc3k.py                      # download, build, write
    python tools/build_pbmc3k.py --wheel desc-2.1.1-py3-none-any.whl
    python tools/build_pbmc3k.py --check              # build and compare with the file in the tree

``desc`` has legacy metadata that pip 24.1 and later refuse, so the download uses a throw-away virtual environment with
an older pip.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cellplm_jax.data.datasets import UNASSIGNED, annotate_by_markers  # noqa: E402
from cellplm_jax.data.genes import load_human_table  # noqa: E402

OUTPUT = ROOT / "cellplm_jax" / "resources" / "pbmc3k.h5ad"
REQUIREMENT = "desc==2.1.1"
MEMBER = "desc/datasets/pbmc.h5ad"
MIN_CELLS = 3

ABOUT = {
    "title": "3k PBMCs from a Healthy Donor",
    "source": (
        "10x Genomics, Single Cell Gene Expression data set processed with Cell Ranger 1.1.0 "
        "(filtered matrix, hg19); taken from desc/datasets/pbmc.h5ad in the PyPI wheel desc 2.1.1 (MIT)"
    ),
    "licence": "CC BY 4.0 (Creative Commons Attribution 4.0 International)",
    "attribution": "Data by 10x Genomics, used and modified under CC BY 4.0",
    "changes": (
        "genes seen in fewer than 3 of the 2,700 cells left out (32,738 to 13,714 genes), counts not altered; "
        "stored as unsigned 16-bit integers; ensembl_id brought up to date by gene symbol where the released id "
        "(kept in released_ensembl_id) has been retired; cell_type added"
    ),
    "cell_type_rule": (
        "marker genes only: cellplm_jax.data.datasets.annotate_by_markers with its default markers and margin; "
        "not a clustering and not the labels of any published analysis"
    ),
    "species": "human",
    "tissue": "peripheral blood mononuclear cells",
}


def download_wheel(folder: Path) -> Path:
    """Fetch the ``desc`` wheel into ``folder`` with a pip that still accepts its metadata."""
    environment = folder / "pip-before-24.1"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    quiet = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*quiet, "install", "pip<24.1"], check=True)
    subprocess.run([*quiet, "download", "--no-deps", REQUIREMENT, "-d", str(folder)], check=True)
    return next(folder.glob("desc-*.whl"))


def read_wheel(
    wheel: Path,
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Read counts, barcodes, gene symbols and released Ensembl ids (an AnnData file of 2018's layout)."""
    with zipfile.ZipFile(wheel) as archive, h5py.File(io.BytesIO(archive.read(MEMBER))) as file:
        observations, variables = file["obs"][:], file["var"][:]
        shape = (len(observations), len(variables))
        counts = scipy.sparse.csr_matrix(
            (file["X/data"][:], file["X/indices"][:], file["X/indptr"][:]), shape=shape
        )
    text = [
        column.astype(str)
        for column in (observations["barcode"], variables["index"], variables["gene_ids"])
    ]
    return counts, text[0], text[1], text[2]


def current_ids(symbols: np.ndarray, released: np.ndarray) -> np.ndarray:
    """Replace Ensembl ids that are gone by the one id their symbol means today; every id stays unique.

    An id counts as gone when the gene table of the package does not know it. Aliases are not trusted for this.
    """
    table = load_human_table()
    result = released.astype(object)
    taken = set(released)
    for index, (symbol, identifier) in enumerate(zip(symbols, released, strict=True)):
        kind, found = table.genes.get(symbol, ("", ()))
        gone = identifier not in table.symbols
        if gone and kind in ("current", "previous") and len(found) == 1 and found[0] not in taken:
            result[index] = found[0]
            taken.add(found[0])
    return result.astype(str)


def _attributes(node: Any, encoding: str, version: str, **more: Any) -> None:
    node.attrs["encoding-type"] = encoding
    node.attrs["encoding-version"] = version
    for name, value in more.items():
        node.attrs[name.replace("_", "-") if name != "_index" else name] = value


def _write_strings(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write strings of fixed length: unlike those of variable length they are compressed."""
    text = np.char.encode(np.asarray(values, dtype=str), "utf-8")
    text = text.astype(h5py.string_dtype("utf-8", text.dtype.itemsize))
    node = group.create_dataset(
        name,
        data=text,
        chunks=(len(values),),
        compression="gzip",
        compression_opts=9,
    )
    _attributes(node, "string-array", "0.2.0")


def _write_numbers(group: h5py.Group, name: str, values: np.ndarray, *, encoded: bool) -> None:
    node = group.create_dataset(
        name,
        data=values,
        chunks=(len(values),),
        shuffle=True,
        compression="gzip",
        compression_opts=9,
    )
    if encoded:
        _attributes(node, "array", "0.2.0")


def _frame(file: h5py.File, name: str, index: np.ndarray, columns: list[str]) -> h5py.Group:
    group = file.create_group(name)
    _attributes(group, "dataframe", "0.2.0", _index="_index")
    group.attrs["column-order"] = np.asarray(columns, dtype=h5py.string_dtype())
    _write_strings(group, "_index", index)
    return group


def write(
    path: Path,
    counts: scipy.sparse.csr_matrix,
    barcodes: np.ndarray,
    symbols: np.ndarray,
    identifiers: np.ndarray,
    released: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write an AnnData file (encoding 0.1.0) whose bytes depend on the content alone.

    Byte shuffling before gzip makes the two big arrays a quarter smaller than ``AnnData.write_h5ad`` would.
    """
    categories = np.unique(labels)
    with h5py.File(path, "w", track_order=False) as file:
        _attributes(file, "anndata", "0.1.0")
        matrix = file.create_group("X")
        _attributes(matrix, "csr_matrix", "0.1.0", shape=np.asarray(counts.shape))
        _write_numbers(matrix, "data", counts.data.astype("<u2"), encoded=False)
        _write_numbers(matrix, "indices", counts.indices.astype("<u2"), encoded=False)
        _write_numbers(matrix, "indptr", counts.indptr.astype("<i4"), encoded=False)

        observations = _frame(file, "obs", barcodes, ["cell_type"])
        cell_type = observations.create_group("cell_type")
        _attributes(cell_type, "categorical", "0.2.0", ordered=False)
        _write_strings(cell_type, "categories", categories)
        codes = np.searchsorted(categories, labels).astype("i1")
        _write_numbers(cell_type, "codes", codes, encoded=True)

        variables = _frame(file, "var", symbols, ["ensembl_id", "released_ensembl_id"])
        _write_strings(variables, "ensembl_id", identifiers)
        _write_strings(variables, "released_ensembl_id", released)

        notes = file.create_group("uns")
        _attributes(notes, "dict", "0.1.0")
        for name, value in ABOUT.items():
            node = notes.create_dataset(name, data=value, dtype=h5py.string_dtype())
            _attributes(node, "string", "0.2.0")
        for name in ("layers", "obsm", "varm", "obsp", "varp"):
            _attributes(file.create_group(name), "dict", "0.1.0")


def build(wheel: Path, output: Path) -> None:
    """Build ``output`` from the wheel and print what went in."""
    counts, barcodes, symbols, released = read_wheel(wheel)
    keep = np.asarray((counts > 0).sum(axis=0)).ravel() >= MIN_CELLS
    counts = counts[:, keep].tocsr()
    counts.sort_indices()
    symbols, released = symbols[keep], released[keep]
    if len(set(symbols)) != len(symbols):
        raise SystemExit("gene symbols are not unique: the wheel is not the expected one")
    if (counts.data != np.round(counts.data)).any() or counts.data.max() >= 2**16:
        raise SystemExit("the wheel holds values that are not 16-bit counts")
    identifiers = current_ids(symbols, released)
    labels = annotate_by_markers(counts, symbols.tolist()).labels
    write(output, counts, barcodes, symbols, identifiers, released, labels)
    print(f"{counts.shape[0]} cells x {counts.shape[1]} genes, {counts.nnz} non-zeros")
    print(f"{int((identifiers != released).sum())} retired Ensembl ids brought up to date")
    for name, count in zip(*np.unique(labels, return_counts=True), strict=True):
        print(f"  {count:5d} {name}")
    print(f"assigned: {np.mean(labels != UNASSIGNED):.3f}; {output.stat().st_size} bytes")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled PBMC3k counts.")
    parser.add_argument("--wheel", type=Path, help="a desc 2.1.1 wheel already on disk")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="file to write")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download_wheel(Path(folder))
        fresh = Path(folder) / "pbmc3k.h5ad"
        build(wheel, fresh)
        if arguments.check:
            same = arguments.out.is_file() and arguments.out.read_bytes() == fresh.read_bytes()
            print("same bytes" if same else "DIFFERENT from the file in the tree")
            return 0 if same else 1
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_suffix(".partial")
        partial.write_bytes(fresh.read_bytes())
        partial.replace(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
