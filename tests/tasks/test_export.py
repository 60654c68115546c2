"""An exported model is one file, embeds any number of cells, and needs neither Flax nor this package."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile

import anndata
import jax
import numpy as np
import pytest

import cellplm_jax as cellplm
from cellplm_jax.cli import main
from cellplm_jax.data.batches import scale_coordinates
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.tasks.export import export_model
from tests.conftest import ROOT

WITHOUT_US = """
import sys
for name in ("cellplm_jax", "flax", "optax", "orbax"):
    sys.modules[name] = None  # an import of it fails
sys.argv = ["embed_exported.py", *sys.argv[1:]]
exec(compile(open({example!r}).read(), "embed_exported.py", "exec"))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "small.cellplm"
    assert main(["export", "small", "--out", str(out)]) == 0
    return out


def cells(number):
    return cellplm.datasets.pbmc3k()[:number].copy()


def program_of(artifact):
    with zipfile.ZipFile(artifact) as archive:
        genes = archive.read("genes.txt").decode().split()
        return jax.export.deserialize(bytearray(archive.read("program.bin"))), genes


def test_the_example_embeds_a_file_without_flax_and_this_package(artifact, tmp_path):
    adata = cells(120)
    adata = adata[:, adata.var["ensembl_id"].notna() & ~adata.var["ensembl_id"].duplicated()].copy()
    adata.var_names = adata.var["ensembl_id"].astype(str)
    expected = cellplm.embed(adata.copy(), "small", gene_key="var_names").obsm["X_cellplm"]
    adata.write_h5ad(tmp_path / "in.h5ad")
    example = str(ROOT / "docs" / "embed_exported.py")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US.format(example=example), str(artifact),
         str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_cellplm"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    code = (ROOT / "docs" / "embed_exported.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("number", [1, 7])
def test_any_number_of_cells_with_places(artifact, number):
    program, genes = program_of(artifact)
    assert program.platforms == ("cpu", "cuda", "tpu")
    random = np.random.default_rng(number)
    counts = random.poisson(0.05, (number, len(genes))).astype(np.float32)
    counts[:, 0] += 1
    place = random.random((number, 2)).astype(np.float32)
    place[0] = np.nan
    where, gene = counts.nonzero()
    indptr = np.searchsorted(where, np.arange(number + 1)).astype(np.int32)
    adata = anndata.AnnData(counts, var={"gene_ids": genes}, obsm={"spatial": place * 300.0 + 10})
    adata.var_names = genes
    # The package scales places itself; these are scaled as it does.
    scaled = scale_coordinates(place)
    found = program.call(indptr, gene.astype(np.int32), counts[where, gene], scaled)
    expected = cellplm.embed(adata, "small", values="counts").obsm["X_cellplm"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_card_says_what_it_is(artifact):
    with zipfile.ZipFile(artifact) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        card = json.loads(archive.read("card.json"))
    model = cellplm.load("small")
    assert card["model"] == model.id
    assert card["genes"] == len(model.genes)
    assert card["jax"] == jax.__version__
    assert card["platforms"] == ["cpu", "cuda", "tpu"]


def test_what_cannot_be_exported_is_said_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    model = cellplm.load("small")
    positions = dataclasses.replace(model.config.positions, kind="laplacian")
    other = dataclasses.replace(
        model, config=dataclasses.replace(model.config, positions=positions)
    )
    with pytest.raises(InputError, match="eigenvectors"):
        export_model(other, tmp_path / "x")
    assert main(["export", "small", "--out", str(tmp_path / "nowhere" / "x")]) == 2
    assert "mkdir -p" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[export\]"):
        export_model("small", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
