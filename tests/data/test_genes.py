"""Gene names: every way a file may call its genes, and what must not be matched."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cellplm_jax.data.genes import (
    KINDS,
    MINIMUM_GENES,
    is_ensembl,
    load_human_table,
    load_mouse_table,
    map_genes,
    require_matches,
    strip_version,
    symbols_of,
)
from cellplm_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("CELLPLM_SHARED_DATA", ROOT.parent / "shared" / "data"))

# Stable facts of human genetics, independent of the table.
TP53, EGFR, CD3E, SELENOF = (
    "ENSG00000141510",
    "ENSG00000146648",
    "ENSG00000198851",
    "ENSG00000183291",
)
MARCHF1, SEPTIN2, PTGS1, MT_CO1 = (
    "ENSG00000145416",
    "ENSG00000168385",
    "ENSG00000095303",
    "ENSG00000198804",
)
HLA_A, C12ORF73, GAPDH, ACTB = (
    "ENSG00000206503",
    "ENSG00000204954",
    "ENSG00000111640",
    "ENSG00000075624",
)
VOCABULARY = [
    TP53, EGFR, CD3E, SELENOF, MARCHF1, SEPTIN2, PTGS1, HLA_A, C12ORF73, GAPDH, ACTB,
]  # fmt: skip


def columns(names, vocabulary=VOCABULARY):
    return map_genes(names, vocabulary, minimum=0).column.tolist()


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("ENSG00000000003.15", "ENSG00000000003"),
        ("ENSG00000000003", "ENSG00000000003"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
        ("ENSG00000182378_PAR_Y", "ENSG00000182378"),
        ("ENSMUSG00000064370.1", "ENSMUSG00000064370"),
        ("AC012345.1", "AC012345.1"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("ENSA", "ENSA"),
        ("ENSG0000.1", "ENSG0000.1"),
        ("", ""),
    ],
)
def test_strip_version(name, bare):
    assert strip_version(name) == bare


def test_is_ensembl():
    assert is_ensembl(TP53)
    assert is_ensembl(TP53 + ".18")
    assert is_ensembl("ENSMUSG00000064370")
    for other in ("ENSA", "TP53", "ENST00000269305", "ENSP00000269305", TP53[:-1], TP53 + "x", ""):
        assert not is_ensembl(other)


def test_names_of_every_kind_in_one_list():
    names = [
        "TP53",  # current symbol
        EGFR,  # id
        CD3E + ".17",  # id with version
        "SEP15",  # alias
        "MARCH1",  # previous symbol, the kind spreadsheets eat
        "SEPT2",
        "gapdh",  # case changed
        "C12ORF73",  # case changed of a symbol with lower-case letters
        "HLA.A",  # R made a dot of the dash
        "",
        "NOT-A-GENE",
        " ACTB ",
    ]
    found = map_genes(names, VOCABULARY, minimum=0)
    wanted = [TP53, EGFR, CD3E, SELENOF, MARCHF1, SEPTIN2, GAPDH, C12ORF73, HLA_A, None, None, ACTB]
    assert found.column.dtype == np.int32
    assert found.column.tolist() == [VOCABULARY.index(w) if w else -1 for w in wanted]
    assert (found.matched, found.unmatched, found.blank, found.ambiguous) == (10, 2, 1, 0)
    assert dict(found.by_rule) == {
        "exact": 1, "version": 1, "current": 2, "previous": 2, "alias": 1, "case": 2, "punctuation": 1,
    }  # fmt: skip
    assert found.missing == 1
    assert found.examples["missing"] == (PTGS1,)
    assert found.examples["unmatched"] == ("NOT-A-GENE",)
    assert found.measured.tolist() == [gene != PTGS1 for gene in VOCABULARY]
    assert found.genes_matched == 10


def test_several_names_of_one_gene_are_all_mapped_and_reported():
    found = map_genes([TP53, TP53 + ".1", "TP53", "EGFR"], VOCABULARY, minimum=0)
    assert found.column.tolist() == [0, 0, 0, 1]
    assert found.duplicated == 1
    assert found.matched == 4
    assert found.genes_matched == 2
    assert found.examples["duplicated"] == (f"{TP53} + {TP53}.1 + TP53 -> {TP53}",)


def test_current_symbol_beats_older_meanings():
    table = load_human_table()
    seen = {kind: {} for kind in KINDS}
    text = gzip.decompress(
        (importlib.resources.files("cellplm_jax") / "resources/human_genes.csv.gz").read_bytes()
    ).decode()
    for row in csv.DictReader(text.splitlines()):
        seen[row["kind"]].setdefault(row["symbol"], set()).add(row["ensembl_id"])
    for better, worse in ((0, 1), (0, 2), (1, 2)):
        both = set(seen[KINDS[better]]) & set(seen[KINDS[worse]])
        for kind in KINDS[:better]:
            both -= set(seen[kind])
        both = sorted(s for s in both if not seen[KINDS[better]][s] & seen[KINDS[worse]][s])
        assert both, "the table has no such case: choose another"
        for symbol in both[:20]:
            assert set(table.genes[symbol][1]) == seen[KINDS[better]][symbol]
            (old, *_), (new, *_) = (
                sorted(seen[KINDS[worse]][symbol]),
                sorted(seen[KINDS[better]][symbol]),
            )
            assert columns([symbol], [old, new]) == [1]
            assert columns([symbol], [old]) == [-1]


def test_several_genes_of_one_symbol():
    # Two ids carry the current symbol PAXX: the one in use, and the one it replaced.
    _, ids = load_human_table().genes["PAXX"]
    assert len(ids) == 2
    for gene in ids:  # the vocabulary decides
        assert columns(["PAXX"], [TP53, gene]) == [1]
    both = map_genes(["PAXX"], list(ids), minimum=0)  # a current symbol: the older id
    assert both.column.tolist() == [list(ids).index(min(ids))]
    assert both.ambiguous == 0
    neither = map_genes(["PAXX"], [TP53], minimum=0)
    assert (neither.ambiguous, neither.unmatched) == (0, 1)


def test_alias_of_several_genes_is_not_guessed_from_the_vocabulary():
    assert set(load_human_table().genes["COX1"][1]) == {PTGS1, MT_CO1}
    found = map_genes(["COX1"], VOCABULARY, minimum=0)  # holds PTGS1 and not MT-CO1
    assert found.column.tolist() == [-1]
    assert found.ambiguous == 1
    assert columns(["PTGS1", "MT-CO1"], [PTGS1, MT_CO1]) == [0, 1]


def test_vocabulary_of_symbols():
    vocabulary = ["TP53", "SELENOF", "MARCH1", "MyGene", "GAPDH"]
    names = ["SELENOF", "SEP15", TP53 + ".2", "MARCHF1", "MyGene", "MYGENE", "gapdh", "EGFR"]
    # MYGENE beside MyGene is another feature, not a copy to be added.
    assert columns(names, vocabulary) == [1, 1, 0, 2, 3, -1, 4, -1]
    assert columns(names[:4] + names[5:], vocabulary) == [1, 1, 0, 2, 3, 4, -1]
    # An exact name wins over what the table says the name means today.
    assert columns(["SEP15", "SELENOF"], ["SELENOF", "SEP15"]) == [1, 0]


def test_vocabulary_with_versions_and_repeats():
    assert columns([TP53, TP53 + ".9", "TP53"], [EGFR + ".3", TP53 + ".18"]) == [1, 1, 1]
    with pytest.raises(InputError, match=f"twice, such as '{TP53}'"):
        map_genes(["TP53"], [TP53, EGFR, TP53])


def test_minimum_names_examples_and_remedy():
    names = ["AAA", "BBB", "TP53"]
    with pytest.raises(InputError, match=r"1 of the model's 11 genes .*'AAA', 'BBB'.* at least 10"):
        map_genes(names, VOCABULARY)
    assert map_genes(names, VOCABULARY, minimum=1).genes_matched == 1
    assert map_genes(["AAA"], VOCABULARY, minimum=0).genes_matched == 0
    assert map_genes(["TP53", "EGFR"], [TP53, EGFR]).genes_matched == 2  # a vocabulary below it
    with pytest.raises(InputError, match="only empty names"):
        map_genes(["", ""], VOCABULARY)
    with pytest.raises(InputError, match="0 gene names"):
        map_genes([], VOCABULARY)
    assert MINIMUM_GENES == 10


def test_row_numbers_are_not_genes():
    table = load_human_table()
    numbers = [str(n) for n in range(60_000)]
    assert not [n for n in numbers if n in table.genes]


MOUSE = ["Gad2", "Slc32a1", "Cnr1", "1110008F13Rik", "mt-Nd1", "Actb", "Gapdh", "Trp53"]


def test_mouse_genes_are_mapped_to_one_to_one_orthologues():
    found = map_genes(MOUSE, [ACTB, GAPDH, TP53], minimum=2)
    # Gapdh has several orthologues among mouse pseudogenes: it is left out, not matched by upper-casing.
    assert found.column.tolist() == [-1] * 5 + [0, -1, 2]
    assert found.by_rule == {"orthologue": 2}
    assert "2 were mapped to their human one-to-one orthologues" in found.summary()
    by_id = map_genes(["ENSMUSG00000029580.15", "ENSMUSG00000059552"], [ACTB, TP53], minimum=2)
    assert by_id.column.tolist() == [0, 1]
    # Names that are written as human ones are are not those of a mouse's genes.
    hits = ["TP53", "EGFR", "GAPDH"]
    assert map_genes([*MOUSE, *hits], [TP53, EGFR, GAPDH], minimum=0).genes_matched == 1
    # A vocabulary of mouse symbols is the caller's business.
    assert map_genes(MOUSE, MOUSE).by_rule == {"exact": len(MOUSE)}


def test_the_table_of_orthologues_is_one_to_one_and_known():
    table = load_mouse_table()
    symbols = {name: gene for name, gene in table.items() if not name.startswith("ENSMUSG")}
    assert len(symbols) == len(set(symbols.values())) > 16_000
    ids = [gene for name, gene in table.items() if name.startswith("ENSMUSG")]
    assert len(ids) == len(set(ids)) > 15_000
    assert set(ids) <= set(symbols.values()) <= set(load_human_table().symbols)
    # Of namesakes and of genes that are called otherwise.
    for mouse, human in (
        ("Cd4", "CD4"),
        ("Trp53", "TP53"),
        ("mt-Nd1", "MT-ND1"),
        ("Ptprc", "PTPRC"),
    ):
        assert load_human_table().symbols[table[mouse]] == human


def test_mouse_vocabularies_are_matched_as_human_ones_are():
    vocabulary = ["ENSMUSG00000029580", "H2-K1"]
    found = map_genes(["ENSMUSG00000029580.15", "H2.K1", "mt.Nd1"], vocabulary, minimum=2)
    assert found.column.tolist() == [0, 1, -1]
    assert map_genes(["mt.Nd1", "Trp53", "Cd4"], ["ENSG00000198888"], minimum=1).matched == 1


def test_mouse_genes_without_an_orthologue_in_the_model_are_said_to_be_that():
    with pytest.raises(InputError, match=r"look like mouse genes, after mapping"):
        map_genes(MOUSE, [GAPDH, EGFR])


@pytest.mark.parametrize(
    ("names", "species"),
    [
        (["ENSRNOG00000010756", "ENSRNOG00000021910.3"], "rat"),
        (["ENSDARG00000035559"], "zebrafish"),
        (["ENSXETG00000000001"], "another species"),
    ],
)
def test_other_species_are_refused_with_an_explanation(names, species):
    with pytest.raises(InputError, match=rf"genes of {species}.*orthologues first"):
        map_genes(names, [ACTB, GAPDH, TP53])
    # But a model of that species knows them.
    assert map_genes(names, names).matched == len(names)


def test_summary_and_dict_are_plain():
    found = map_genes(["TP53", "TP53", "", "XYZ1"], VOCABULARY, minimum=0)
    text = found.summary()
    assert "1 of 11 vocabulary genes are measured, from 2 of 4 gene names" in text
    assert "XYZ1" in text
    assert "1 empty" in text
    assert "summed" in text
    again = json.loads(json.dumps(found.as_dict()))
    assert again["matched"] == 2
    assert again["genes_matched"] == 1
    assert again["names"] == 4
    assert again["vocabulary"] == 11
    assert again["examples"]["unmatched"] == ["XYZ1"]
    clean = map_genes(["TP53", "EGFR"], [TP53, EGFR])
    assert clean.summary() == "2 of 2 vocabulary genes are measured, from 2 of 2 gene names."


def test_require_matches_names_the_place():
    found = map_genes(["AAA"], VOCABULARY, minimum=0)
    with pytest.raises(InputError, match=r"var\['x'\]"):
        require_matches(found, ["AAA"], where="var['x']")


def test_symbols_of():
    assert symbols_of([TP53, MARCHF1 + ".5", "ENSG99999999999", "ABC"]) == [
        "TP53",
        "MARCHF1",
        "ENSG99999999999",
        "ABC",
    ]


def test_table_is_sound():
    path = importlib.resources.files("cellplm_jax") / "resources" / "human_genes.csv.gz"
    data = path.read_bytes()
    assert len(data) < 1_500_000
    assert data[4:8] == b"\0\0\0\0", "the time stamp makes the file differ from build to build"
    rows = list(csv.reader(gzip.decompress(data).decode().splitlines()))
    assert rows[0] == ["symbol", "ensembl_id", "kind"]
    body = [tuple(row) for row in rows[1:]]
    assert body == sorted(set(body))
    assert all(len(row) == 3 and row[0] and row[2] in KINDS for row in body)
    assert all(is_ensembl(row[1]) and row[1].startswith("ENSG") for row in body)
    assert len({gene for _, gene, _ in body}) > 40_000
    licence = (path.parent / "human_genes.LICENSE.md").read_text(encoding="utf-8")
    for word in ("GENCODE", "HGNC", "CC0", "MIT", f"{len(body):,} rows"):
        assert word in licence


def test_import_is_light():
    code = (
        "import sys, cellplm_jax.data.genes as g; g.load_human_table();"
        "bad = {'pandas', 'anndata', 'jax', 'scipy'} & set(sys.modules); sys.exit(bool(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def load_tool():
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "build_gene_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_tool_joins_sources_deterministically():
    tool = load_tool()
    gencode = [(TP53, "TP53"), (MT_CO1, "MT-CO1"), (EGFR, EGFR), (GAPDH, "GAPDH")]

    def row(approved, previous, alias, gene):
        return {
            "Approved symbol": approved,
            "Previous symbol": previous,
            "Alias symbol": alias,
            "Ensembl gene ID": gene,
        }

    hgnc = [
        row("TP53", "", "p53", TP53),
        row("TP53", "LFS1", "LFS1", TP53),
        row("GAPDH", "G3PD", "44076", ""),  # id through GENCODE; a name a spreadsheet ate
        row("NOWHERE", "OLD", "", ""),
        row("PTGS1", "", "COX1", PTGS1),
    ]
    rows = tool.build(gencode, hgnc)
    assert rows == sorted(
        [
            ("TP53", TP53, "current"),
            ("p53", TP53, "alias"),
            ("LFS1", TP53, "previous"),
            ("MT-CO1", MT_CO1, "current"),
            ("CO1", MT_CO1, "alias"),
            ("GAPDH", GAPDH, "current"),
            ("G3PD", GAPDH, "previous"),
            ("PTGS1", PTGS1, "current"),
            ("COX1", PTGS1, "alias"),
        ]
    )
    first, second = tool.compress(rows), tool.compress(tool.build(gencode, reversed(hgnc)))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()


@pytest.fixture(scope="module")
def published():
    path = SHARED.parent / "reference" / "20230926_85M.config.json"
    if not path.exists():
        pytest.skip(f"the published vocabulary is not at {path}")
    return json.loads(path.read_text())["gene_list"]


def test_covers_the_published_vocabulary(published):
    table = load_human_table()
    named = {gene for _, genes in table.genes.values() for gene in genes}
    assert len(named & set(published)) >= 19_328
    # Every gene is found by its own current symbol, but for genes that share one.
    symbols = symbols_of(published)
    found = map_genes(symbols, published)
    assert (found.column == np.arange(len(published))).mean() > 0.999


def test_agrees_with_an_independent_table(published):
    path = SHARED / "genes" / "human_symbol_to_ensembl.csv.gz"
    if not path.exists():
        pytest.skip(f"no independent table at {path}")
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    known = set(published)
    meaning: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "gencode_symbol" and row["symbol"] != row["ensembl_id"]:
            meaning.setdefault(row["symbol"], set()).add(row["ensembl_id"])
    single = {symbol: genes for symbol, genes in meaning.items() if len(genes & known) == 1}
    assert len(single) > 19_000
    names = sorted(single)
    found = map_genes(names, published)
    agree = [
        position >= 0 and published[position] in single[name]
        for name, position in zip(names, found.column, strict=True)
    ]
    assert np.mean(agree) > 0.999


@pytest.mark.parametrize(
    ("file", "least"),
    [("pbmc3k", 11_850), ("breast_st_stahl_4layers", 13_150), ("xenium_breast_jef2023_4fov", 309)],
)
def test_real_files(published, file, least):
    anndata = pytest.importorskip("anndata")
    path = SHARED / f"{file}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    names = list(anndata.read_h5ad(path, backed="r").var_names)
    assert map_genes(names, published).genes_matched >= least


@pytest.mark.parametrize(
    ("file", "least"), [("starmap_mouse_v1_1020genes", 850), ("osmfish_mouse_cortex", 25)]
)
def test_real_mouse_files_are_mapped_through_orthologues(published, file, least):
    anndata = pytest.importorskip("anndata")
    path = SHARED / f"{file}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    names = list(anndata.read_h5ad(path, backed="r").var_names)
    found = map_genes(names, published)
    assert found.by_rule["orthologue"] == found.matched >= least


def table_names(number=400):
    """Return Ensembl ids with their current symbols and the symbols of their mouse orthologues."""
    mouse = {
        human: name for name, human in load_mouse_table().items() if not name.startswith("ENS")
    }
    table = load_human_table()
    chosen = [
        (gene, symbol, mouse[gene])
        for gene, symbol in table.symbols.items()
        if gene in mouse and table.genes[symbol] == ("current", (gene,)) and mouse[gene][1:2].islower()
        and mouse[gene].upper() == symbol
    ]  # fmt: skip
    return [list(column) for column in zip(*sorted(chosen)[:number], strict=True)]


def test_two_species_in_one_file_are_refused():
    ids, human, mouse = table_names()
    for names in (human + mouse, human[:100] + mouse, ids + mouse):
        with pytest.raises(InputError, match=r"two species, [\d,]+ of human and [\d,]+ of mice"):
            map_genes(names, ids)
    # Own vocabularies of such files are read without a minimum.
    assert map_genes(human + mouse, ids, minimum=0).genes_matched == len(ids)


def test_a_mouse_gene_beside_its_human_namesake_is_not_added():
    ids, human, mouse = table_names()
    mapping = map_genes(human + mouse[:5], ids)
    assert mapping.duplicated == 0
    assert (mapping.column[-5:] == -1).all()
    assert mapping.twins == 5
    assert "5 too similar to another name" in mapping.summary()
    assert map_genes(human[5:] + mouse[:5], ids).genes_matched == len(ids)


@pytest.mark.parametrize("mark", ["-1", ".1"])
def test_copies_of_names_are_not_other_genes(mark):
    """CAT-1 is an alias of SLC7A1, and the second CAT of a file after make_unique."""
    ids, _, _ = table_names()
    wanted = symbols_of(ids)
    extra = [gene for symbol in ("CAT", "SLC7A1") for gene in load_human_table().genes[symbol][1]]
    vocabulary = list(dict.fromkeys([*ids, *extra]))
    mapping = map_genes([*wanted, "CAT", f"CAT{mark}"], vocabulary)
    assert mapping.column[-2] == vocabulary.index(extra[0])
    assert mapping.column[-1] == -1
    alone = map_genes([*wanted, f"CAT{mark}"], vocabulary)
    assert alone.column[-1] == vocabulary.index(extra[1])


def test_names_in_lower_case_are_the_current_symbols():
    """elk1 in lower case is ELK1, although 'elk1' is also listed as an alias."""
    table = load_human_table()
    ids = sorted(table.symbols)
    mapping = map_genes([table.symbols[gene].lower() for gene in ids], ids)
    wrong = [
        ids[row]
        for row, column in enumerate(mapping.column)
        if column >= 0 and table.symbols[ids[column]] != table.symbols[ids[row]]
    ]
    assert wrong == []
    assert "in lower case" in mapping.summary()
    assert not map_genes([table.symbols[gene] for gene in ids[:100]], ids).lower_case


def test_prefixes_of_genomes_are_named():
    ids, human, mouse = table_names()
    for names in (
        [f"GRCh38_{n}" for n in human],
        [f"GRCh38_{n}" for n in human] + [f"mm10___{n}" for n in mouse],
    ):
        with pytest.raises(
            InputError, match=r"name of a genome \('GRCh38_'.*removeprefix\('GRCh38_'\)"
        ):
            map_genes(names, ids)


def test_fish_are_not_read_as_people():
    ids, human, _ = table_names()
    names = [name.lower() for name in human] + [f"si:dkey-{n}p7.{n}" for n in range(20)]
    with pytest.raises(InputError, match="genes of zebrafish"):
        map_genes(names, ids)
