"""One file, one reading: an estimator reads in predict what it read in fit, gene by gene."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cellplm_jax
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import FittedGenes, load_human_table, map_genes
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.contexts import read_cells
from cellplm_jax.tasks.estimator import Estimator
from tests.conftest import make_labelled

# Each previous symbol belongs to both genes of its row; the first one is measured, the second one is not.
PAIRS = {"QARS": ("EPRS1", "QARS1"), "MUM1": ("IRF4", "PWWP3A"), "STRA13": ("BHLHE40", "CENPX")}


def id_of(symbol: str) -> str:
    return min(load_human_table().genes[symbol][1])


@pytest.fixture(scope="module")
def human_model(tiny_model):
    """The tiny model over forty human genes, among them both genes of every ambiguous symbol."""
    ids = [id_of(symbol) for pair in PAIRS.values() for symbol in pair]
    others = [
        gene
        for gene, symbol in sorted(load_human_table().symbols.items())
        if gene not in ids and load_human_table().genes[symbol] == ("current", (gene,))
    ]
    return dataclasses.replace(tiny_model, genes=[*ids, *others[: 40 - len(ids)]])


@pytest.fixture(scope="module")
def cells(human_model):
    """Labelled cells named by symbol; without the second gene of a pair, with the symbol that may be either."""
    adata = make_labelled(80)
    symbols = load_human_table().symbols
    missing = [id_of(pair[1]) for pair in PAIRS.values()]
    measured = [symbols[gene] for gene in human_model.genes if gene not in missing]
    names = [*PAIRS, *measured]
    adata = adata[:, : len(names)].copy()
    adata.var_names = names
    adata.obs["kind"] = adata.obs["kind"].astype(str)
    adata.obs["sample"] = [f"s{n % 8}" for n in range(80)]
    adata.obs["disease"] = ["sick" if n % 2 else "healthy" for n in range(80)]
    adata.obs["perturbation"] = [["control", *measured[:3]][n % 4] for n in range(80)]
    return adata


FAST = {"quiet": True, "epochs": 1, "warmup_epochs": 1}
ESTIMATORS = {
    "CellTypeAnnotator": (FAST, {"label_key": "kind", "batch_key": "batch"}),
    "Denoiser": (FAST, {"batch_key": "batch"}),
    "GeneImputer": (FAST, {"batch_key": "batch"}),
    "BatchIntegrator": (FAST, {"batch_key": "batch"}),
    "PerturbationPredictor": (
        {"quiet": True},
        {"perturbation_key": "perturbation", "control": "control", "batch_key": "batch"},
    ),
    "SampleClassifier": ({"quiet": True}, {"sample_key": "sample", "label_key": "disease"}),
}


def by_gene(counts, genes) -> dict[str, float]:
    return dict(zip(genes, np.asarray(counts.sum(axis=0)).ravel().tolist(), strict=True))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_same_counts_per_gene_in_fit_and_predict(name, human_model, cells, monkeypatch, tmp_path):
    read = {}
    begin = Estimator._begin

    def recording(self, table, *args, **options):
        read.update(by_gene(table.counts, table.genes))
        return begin(self, table, *args, **options)

    monkeypatch.setattr(Estimator, "_begin", recording)
    options, keys = ESTIMATORS[name]
    fitted = getattr(cellplm_jax, name)(human_model, **options)
    data = cells
    if name == "GeneImputer":
        keys = {**keys, "reference": cells, "reference_batch_key": "batch"}
        data = cells[:, :30].copy()
    fitted.fit(data, **keys)
    genes = fitted.model.genes
    assert isinstance(genes, FittedGenes)
    if name in ("GeneImputer", "Denoiser"):
        # Fitted to two files or to thinned counts: compared with reading over the complete vocabulary.
        read = by_gene(read_cells(cells, human_model.genes).counts, human_model.genes)
    again = by_gene(read_cells(cells, genes).counts, genes)
    assert again == {gene: read[gene] for gene in genes}
    for first, second in PAIRS.values():
        assert id_of(first) in genes
        assert id_of(second) not in genes
        assert again[id_of(first)] == cells[:, first].X.sum()
    fitted.save(tmp_path / "saved")
    loaded = type(fitted).load(tmp_path / "saved", quiet=True)
    assert by_gene(read_cells(cells, loaded.model.genes).counts, genes) == again
    # Without the batch column of the fit all cells are one batch, with a remark.
    if name in ("CellTypeAnnotator", "Denoiser"):
        bare = data.copy()
        del bare.obs["batch"]
        bare.write_h5ad(tmp_path / "bare.h5ad")
        messages = loaded.predict_file(tmp_path / "bare.h5ad", tmp_path / "out.h5ad")
        assert any("no column 'batch', the batch_key of the fit" in text for text in messages)
        with pytest.raises(InputError, match="no column 'lane'"):
            loaded.predict_file(tmp_path / "bare.h5ad", tmp_path / "out.h5ad", batch_key="lane")


def test_a_name_has_the_meaning_it_had_in_the_fit():
    vocabulary = [id_of("EPRS1"), id_of("QARS1")]
    names = ["EPRS1", "QARS"]
    assert map_genes(names, vocabulary, minimum=0).column.tolist() == [0, -1]
    # Without the memory of the fit, the previous symbol has one meaning left.
    assert map_genes(names, vocabulary[:1], minimum=0).column.tolist() == [0, 0]
    found = map_genes(names, FittedGenes(vocabulary[:1], vocabulary), minimum=0)
    assert found.column.tolist() == [0, -1]
    assert (found.ambiguous, found.matched, found.unmatched) == (1, 1, 1)
    outside = map_genes(["EPRS1", "QARS1"], FittedGenes(vocabulary[:1], vocabulary), minimum=0)
    assert (outside.column.tolist(), outside.unmatched) == ([0, -1], 1)
    assert outside.examples["unmatched"] == ("QARS1",)


def test_the_matrix_and_the_column_of_the_fit_are_read_again(cells):
    adata = cells.copy()
    adata.layers["umis"] = adata.X.copy()
    adata.layers["counts"] = adata.X * 2
    adata.var["symbol"] = adata.var_names
    vocabulary = [id_of("EPRS1"), id_of("IRF4")]
    fitted = FittedGenes(vocabulary, vocabulary, "layers['umis']", "symbol")
    with open_counts(adata, fitted, minimum_genes=1) as source:
        report = source.report
    assert (report.matrix, report.gene_key) == ("layers['umis']", "symbol")
    with open_counts(cells, fitted, minimum_genes=1) as source:
        report = source.report
    assert (report.matrix, report.gene_key) == ("X", "var_names")
    assert any("The fit read layers['umis']" in note for note in report.notes)


@pytest.mark.parametrize("symbol", ["SOD2", "MATR3", "PAXX"])
def test_current_symbols_are_never_ambiguous(symbol):
    kind, ids = load_human_table().genes[symbol]
    assert kind == "current"
    found = map_genes([symbol], sorted(ids, reverse=True), minimum=0)
    assert found.ambiguous == 0
    assert found.column.tolist() == [sorted(ids, reverse=True).index(min(ids))]


def test_no_current_symbol_of_the_table_is_ambiguous():
    table = load_human_table()
    several = [name for name, (kind, ids) in table.genes.items() if kind == "current" and ids[1:]]
    assert len(several) > 10
    vocabulary = sorted({gene for name in several for gene in table.genes[name][1]})
    found = map_genes(several, vocabulary, minimum=0)
    assert (found.ambiguous, found.unmatched) == (0, 0)
