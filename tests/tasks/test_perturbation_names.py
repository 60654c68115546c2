"""Spellings of perturbations: the forms of the public screens, one canonical name each, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellplm_jax.data.genes import load_human_table, map_genes
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.perturbation_names import (
    PerturbationNames,
    labels_with_numbers,
    message_of,
    read_names,
)

SYMBOLS = ("STAT1", "IRF1", "IRF7", "CEBPB", "KLF1", "ARID1A", "CD86", "JAK2", "TNF")


@pytest.fixture(scope="module")
def vocabulary():
    """The genes of nine targets, and of two that aliases of other conditions name."""
    table = load_human_table()
    own = [table.genes[symbol][1][0] for symbol in (*SYMBOLS, "IRF6", "PPIB")]
    return tuple(sorted(own))


def read(vocabulary, values, control=None, **options):
    return read_names(values, control, vocabulary, key="perturbation", **options)


STAT1 = ("STAT1", "stat1", "Stat1", "STAT1g2", "STAT1_2", "STAT1-1", "STAT1_sg3", "sgSTAT1-1", "sgSTAT1",
         "ENSG00000115415", "ENSG00000115415.21", "ISGF-3", "STAT1+ctrl", "ctrl+STAT1", "STAT1_ctrl",
         "ctrl;STAT1", "STAT1|STAT1", " STAT1 ")  # fmt: skip


@pytest.mark.parametrize("spelling", STAT1)
def test_one_target_in_every_spelling(vocabulary, spelling):
    names = read(vocabulary, ["ctrl", spelling, "IRF1", "KLF1"])
    assert names.canonical(spelling) == "STAT1"
    assert names.parts("STAT1") == ["STAT1"]
    # In predict, of a predictor whose file never had this spelling.
    assert read(vocabulary, ["ctrl", "STAT1", "IRF1"]).canonical(spelling) == "STAT1"


@pytest.mark.parametrize(
    "spelling",
    ["STAT1+IRF1", "IRF1+STAT1", "IRF1_STAT1", "irf1;stat1", "STAT1|IRF1", "STAT1 & IRF1", "STAT1,IRF1",
     "STAT1__IRF1", "STAT1g1_IRF1g2", "ctrl+IRF1+STAT1", "IRF1+STAT1+IRF1"],
)  # fmt: skip
def test_combinations_in_every_order(vocabulary, spelling):
    names = read(vocabulary, ["ctrl", "STAT1", spelling])
    assert names.canonical(spelling) == "IRF1+STAT1"
    assert names.parts("IRF1+STAT1") == ["IRF1", "STAT1"]


PUBLIC = {
    # GEARS, Norman: obs["condition"].
    "gears": (["ctrl", "STAT1+ctrl", "ctrl+KLF1", "CEBPB+KLF1"],
              ["ctrl", "STAT1", "KLF1", "CEBPB+KLF1"]),
    # scPerturb: obs["perturbation"].
    "scperturb": (["control", "CEBPB", "KLF1_CEBPB", "ARID1A"],
                  ["control", "CEBPB", "CEBPB+KLF1", "ARID1A"]),
    # Replogle: obs["gene"]; CTRL is a target of genome-wide libraries.
    "replogle": (["non-targeting", "STAT1", "CTRL", "IRF1"], ["non-targeting", "STAT1", "CTRL", "IRF1"]),
    # Papalexi: obs["guide_ID"].
    "papalexi": (["NTg1", "NTg4", "STAT1g2", "STAT1g1", "CD86g1"], ["NT", "NT", "STAT1", "STAT1", "CD86"]),
    # Norman, the guide pairs.
    "pairs": (["NegCtrl10_NegCtrl0", "KLF1_NegCtrl0", "NegCtrl10_KLF1", "CEBPB_KLF1"],
              ["NegCtrl", "KLF1", "KLF1", "CEBPB+KLF1"]),
    # sci-Plex: drugs, with and without a dose, are conditions as a whole.
    "sciplex": (["Vehicle", "Abexinostat (PCI-24781)", "(+)-JQ1", "Trichostatin_A", "LPS"],
                ["Vehicle", "Abexinostat (PCI-24781)", "(+)-JQ1", "Trichostatin_A", "LPS"]),
    "doses": (["DMSO", "Abexinostat_10", "Abexinostat_100", "Imatinib 10 nM"],
              ["DMSO", "Abexinostat_10", "Abexinostat_100", "Imatinib 10 nM"]),
    # Cytokines: one is a current symbol, the others are aliases by coincidence.
    "cytokines": (["unstim", "LPS", "B", "TNF"], ["unstim", "LPS", "B", "TNF"]),
}  # fmt: skip


@pytest.mark.parametrize("form", PUBLIC)
def test_forms_of_public_screens(vocabulary, form):
    values, wanted = PUBLIC[form]
    names = read(vocabulary, values)
    assert [names.canonical(value) for value in values] == wanted
    again = PerturbationNames(**{**names.as_dict(), "vocabulary": vocabulary})
    assert [again.canonical(value) for value in reversed(values)] == wanted[::-1]


def test_the_file_decides_what_separates(vocabulary):
    values = ["control", "drug_a", "drug_b", "drug_c", "drug_a+drug_b"]
    names = read(vocabulary, values)
    assert names.canonical("drug_b+DRUG-A") == "drug_a+drug_b"
    assert names.canonical("drug_a") == "drug_a"
    assert names.parts("drug_a+drug_b") == ["drug_a", "drug_b"]
    split = read(vocabulary, ["control", "X", "Y", "X_Y", "X;Y"])
    assert {split.canonical(name) for name in ("X_Y", "Y_X", "Y;X", "x_y")} == {"X+Y"}
    # HLA-A is a gene as a whole, and a part of no name is.
    assert read(vocabulary, ["control", "HLA-A", "STAT1"]).canonical("HLA-A") == "HLA-A"


def test_spelling_does_not_change_the_order_of_conditions(vocabulary):
    one = read(vocabulary, ["control", "zeta", "Alpha", "mid"])
    other = read(vocabulary, ["control", "Zeta", "alpha", "MID"])
    orders = [
        [name.lower() for name in names.sort(map(names.canonical, ("zeta", "alpha", "mid")))]
        for names in (one, other)
    ]
    assert orders[0] == orders[1] == ["alpha", "mid", "zeta"]


def test_targets_decide_on_genes(vocabulary):
    values = ["ctrl", "stat1", "irf1"]
    assert read(vocabulary, values).canonical("stat1") == "STAT1"
    assert read(vocabulary, values, targets="conditions").canonical("stat1") == "stat1"
    mixed = ["ctrl", "STAT1", "IRF1", "LPS"]
    assert read(vocabulary, mixed, targets="genes").canonical("LPS") == "IRF6"


@pytest.mark.parametrize(
    ("values", "given", "wanted"),
    [
        (["ctrl", "STAT1"], None, "ctrl"),
        (["ctrl", "control", "control", "STAT1"], None, "control"),
        (["NT_1", "NT_2", "STAT1_1"], "NT", "NT"),
        (["AAVS1-1", "AAVS1-2", "STAT1-1"], "AAVS1", "AAVS1"),
        (["Control", "STAT1"], "control", "Control"),
        (["0", "1"], 0, "0"),
        (["0", "0.5"], 0.0, "0"),
        (["False", "True"], 0, "False"),
        (["False", "True"], False, "False"),
        (["WT1", "STAT1", "mock"], None, "mock"),
    ],
)
def test_controls(vocabulary, values, given, wanted):
    names = read(vocabulary, values, given)
    assert names.control == wanted
    controls = [value for value in values if names.canonical(value) == wanted]
    assert len(controls) >= 1
    assert len(controls) < len(values)


def test_another_well_known_name_is_a_perturbation(vocabulary):
    names = read(vocabulary, ["ctrl", "DMSO", "STAT1"], "ctrl")
    assert names.canonical("DMSO") == "DMSO"
    assert read(vocabulary, ["ctrl", "STAT1"], "ctrl").canonical("non-targeting") == "ctrl"


def test_refuses(vocabulary):
    with pytest.raises(InputError, match=r"2 values are well-known names \('ctrl', 'vehicle'\)"):
        read(vocabulary, ["ctrl", "vehicle", "STAT1"])
    with pytest.raises(
        InputError, match=r"no value of obs.* is a well-known name; .* Pass control"
    ):
        read(vocabulary, ["x", "STAT1"])
    with pytest.raises(InputError, match="no cell has the control 'contrl'"):
        read(vocabulary, ["control", "STAT1"], "contrl")


def test_one_line_tells_what_was_read(vocabulary):
    values = ["ctrl", "STAT1+ctrl", "STAT1", "irf1", "CD86", None]
    names = read(vocabulary, values)
    assert message_of(names, values, None, "condition") == (
        "Read 3 perturbations from 4 spellings in obs['condition']; control: 'ctrl', a well-known name. "
        "'STAT1+ctrl' is 'STAT1', 'irf1' is 'IRF1'."
    )
    one = message_of(read(vocabulary, ["c", "x"], "c"), ["c", "x"], "c", "k")
    assert one == "Read 1 perturbation from 1 spelling in obs['k']; control: 'c'."


def test_numbers_are_written_without_zeros():
    for column in (pd.Series([0.0, 10.0, np.nan]), pd.Series([0, 10, 10]).astype("category")):
        labels = np.array(["0.0", "10.0", None], object)
        assert labels_with_numbers(labels, column).tolist() == ["0", "10", None]
    text = np.array(["1.0"], object)
    assert labels_with_numbers(text, pd.Series(["1.0"])) is text


def test_one_name_matches_as_in_a_file(vocabulary):
    from cellplm_jax.data.genes import find_gene

    for name in ("STAT1", "stat1", "ISGF-3", "ENSG00000115415.2", "nothing", "Stat1", ""):
        assert find_gene(name, vocabulary)[0] == map_genes([name], vocabulary, minimum=0).column[0]
