"""Public data of the notebooks: files of this machine, checked, or simulated cells of the same form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import sparse

import cellplm_jax
from cellplm_jax.data import public as module
from cellplm_jax.errors import InputError

each = pytest.mark.parametrize("name", module.PUBLIC)


@each
def test_a_stand_in_has_the_form_of_the_file_and_says_so(name, capsys, monkeypatch):
    monkeypatch.delenv(module.FOLDER, raising=False)
    known = module.PUBLIC[name]
    adata = cellplm_jax.datasets.public(name, stand_in=True)
    assert "is simulated" in capsys.readouterr().out
    assert adata.n_vars == known.genes
    assert adata.var_names.is_unique
    assert set(known.columns) <= set(adata.obs)
    assert adata.obs[list(known.columns)].notna().all(axis=None)
    counts = sparse.csr_matrix(adata.X).data
    assert np.array_equal(counts, np.rint(counts))
    assert adata.uns["source"] == "simulated stand-in"


def test_treated_stand_ins_express_interferon_genes(monkeypatch):
    monkeypatch.delenv(module.FOLDER, raising=False)
    adata = cellplm_jax.datasets.public("kang", stand_in=True)
    treated = (adata.obs["group_id"] == "stim").to_numpy()
    isg = adata[:, "ISG15"].X
    assert isg[treated].mean() > isg[~treated].mean() + 2
    assert set(adata.obs["sample_id"]) == {"ctrl101", "ctrl107", "stim101", "stim107"}


@each
def test_without_the_file_the_message_names_source_and_remedy(name, monkeypatch, tmp_path):
    monkeypatch.delenv(module.FOLDER, raising=False)
    with pytest.raises(InputError, match=r"CELLPLM_DATA is not set.*stand_in=True"):
        cellplm_jax.datasets.public(name)
    with pytest.raises(InputError, match="which is not in"):
        cellplm_jax.datasets.public(name, tmp_path)


def test_an_unknown_name_suggests_one():
    with pytest.raises(InputError, match="Did you mean 'kang'"):
        cellplm_jax.datasets.public("kangs")


def test_a_file_is_opened_from_the_folder_and_checked(monkeypatch, tmp_path):
    adata = cellplm_jax.datasets.public("kang", stand_in=True)[:50].copy()
    known = module.PUBLIC["kang"]
    adata.write_h5ad(tmp_path / known.file)
    monkeypatch.setenv(module.FOLDER, str(tmp_path))
    with pytest.raises(InputError, match="has 50 cells"):
        cellplm_jax.datasets.public("kang")
    same = dataclasses.replace(known, cells=50, counts=round(float(adata.X.sum())))
    monkeypatch.setitem(module.PUBLIC, "kang", same)
    found = cellplm_jax.datasets.public("kang", stand_in=True)  # a file is preferred
    assert found.n_obs == 50
    monkeypatch.setitem(module.PUBLIC, "kang", dataclasses.replace(same, columns=("patient",)))
    with pytest.raises(InputError, match="no column patient"):
        cellplm_jax.datasets.public("kang")
