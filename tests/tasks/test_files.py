"""Paths instead of AnnData: ``.h5ad`` files and ``.zarr`` stores for every function, estimator and command."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import zarr

import cellplm_jax as cellplm
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.cluster import cluster, cluster_file
from cellplm_jax.tasks.embed import embed, embed_file
from cellplm_jax.tasks.files import as_anndata, read_annotations, read_obs
from tests.conftest import make_adata, make_labelled

SUFFIXES = (".h5ad", ".zarr")
ZARR = "ignore:Writing zarr v2 data:UserWarning"
pytestmark = pytest.mark.filterwarnings(ZARR)


def write(adata: ad.AnnData, path):
    adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


def read(path) -> ad.AnnData:
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


@pytest.fixture(params=SUFFIXES)
def file(request, tmp_path):
    """A labelled file, and the AnnData in it."""
    adata = make_labelled(60)
    adata.obs["sample"] = np.where(np.arange(60) % 2, "a", "b")
    return write(adata, tmp_path / f"cells{request.param}"), adata


def test_an_embedding_of_a_path(file, tiny_model, tmp_path):
    path, adata = file
    expected = embed(adata.copy(), tiny_model, quiet=True).obsm["X_cellplm"]
    for source in (path, str(path)):
        np.testing.assert_array_equal(
            embed(source, tiny_model, quiet=True).obsm["X_cellplm"], expected
        )
    out = tmp_path / f"out{path.suffix}"
    before = sorted(p.relative_to(path) for p in path.rglob("*")) if path.is_dir() else None
    embed_file(path, tiny_model, out, quiet=True)
    written = read(out)
    np.testing.assert_array_equal(written.obsm["X_cellplm"], expected)
    assert written.uns["cellplm"]["model"] == tiny_model.id
    assert written.obs.equals(read(path).obs)
    if path.is_dir():
        assert sorted(p.relative_to(path) for p in path.rglob("*")) == before
        # Readers that use the summary of the metadata see the embedding too.
        assert "X_cellplm" in zarr.open_consolidated(str(out))["obsm"]
    annotations = read_annotations(out, obsm=["X_cellplm"], uns=["cellplm"])
    np.testing.assert_array_equal(annotations.obsm["X_cellplm"], expected)
    assert read_obs(str(out)).equals(read_obs(written))


def test_clusters_of_a_path(file, tiny_model, tmp_path):
    pytest.importorskip("igraph")
    path, _ = file
    expected = cluster(path, tiny_model, neighbors=10, adapt="none", quiet=True)
    out = tmp_path / f"out{path.suffix}"
    cluster_file(path, out, tiny_model, neighbors=10, adapt="none", quiet=True)
    assert read(out).obs["cellplm_cluster"].equals(expected.obs["cellplm_cluster"])


def test_estimators_take_paths(file, tiny_model, tmp_path):
    path, adata = file
    out = tmp_path / f"out{path.suffix}"
    recipe = {"epochs": 1, "quiet": True, "linear": False}
    annotator = cellplm.CellTypeAnnotator(tiny_model, **recipe).fit(path, label_key="kind")
    expected = annotator.predict(adata.copy()).obs["cellplm_cell_type"]
    assert list(annotator.predict(path).obs["cellplm_cell_type"]) == list(expected)
    annotator.predict_file(path, out)
    assert list(read(out).obs["cellplm_cell_type"]) == list(expected)
    assert annotator.score(path) == annotator.score(adata)

    denoiser = cellplm.Denoiser(tiny_model, epochs=1, quiet=True).fit(path)
    layer = denoiser.predict(path).layers["cellplm_denoised"]
    denoiser.predict_file(path, tmp_path / f"denoised{path.suffix}", storage="float32")
    np.testing.assert_array_equal(
        read(tmp_path / f"denoised{path.suffix}").layers["cellplm_denoised"], layer
    )

    integrator = cellplm.BatchIntegrator(tiny_model, epochs=1, quiet=True)
    z = integrator.fit(path, batch_key="sample").predict(path).obsm["X_cellplm_integrated"]
    assert z.shape == (60, tiny_model.config.latent_size)
    attention = cellplm.cell_attention(path, tiny_model, cells=[0])
    assert attention.shape == (1, 60)


def test_sample_labels_of_a_path(file, tiny_model):
    path, adata = file
    adata = adata.copy()
    adata.obs["donor"] = [f"d{number % 6}" for number in range(60)]
    adata.obs["state"] = [("well", "ill")[number % 2] for number in range(60)]
    path = write(adata, path.with_name(f"cohort{path.suffix}"))
    classifier = cellplm.SampleClassifier(tiny_model, quiet=True)
    classifier.fit(path, sample_key="donor", label_key="state")
    assert classifier.predict(path).equals(classifier.predict(adata))
    assert classifier.score(path) == classifier.score(adata)


def test_refusals(tiny_model, tmp_path):
    store = write(make_adata(8), tmp_path / "in.zarr")
    with pytest.raises(InputError, match=r"another kind.*Name it 'out\.zarr'"):
        embed_file(store, tiny_model, tmp_path / "out.h5ad", quiet=True)
    (tmp_path / "out.zarr").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        embed_file(store, tiny_model, tmp_path / "out.zarr", quiet=True)
    with pytest.raises(InputError, match=r"Name it 'new\.h5ad'"):
        embed_file(write(make_adata(8), tmp_path / "in.h5ad"), tiny_model, tmp_path / "new.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="without a zarr group"):
        embed(tmp_path / "folder", tiny_model)
    with pytest.raises(InputError, match="does not exist"):
        embed(tmp_path / "absent.h5ad", tiny_model)
    with pytest.raises(InputError, match="type ndarray"):
        embed(np.zeros((3, 3)), tiny_model)
    (tmp_path / "text.h5ad").write_text("no")
    with pytest.raises(InputError, match=r"complete \.h5ad file"):
        embed(tmp_path / "text.h5ad", tiny_model)
    damaged = write(make_adata(8), tmp_path / "damaged.h5ad")
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    with pytest.raises(InputError, match="damaged"):
        as_anndata(damaged)


def test_the_commands_take_zarr(command, tiny_run, tmp_path):
    store = write(make_adata(12), tmp_path / "in.zarr")
    status, out, err = command("embed", store, "--model", tiny_run, "--out", tmp_path / "out.zarr")
    assert status == 0, err
    assert "wrote" in out
    assert read(tmp_path / "out.zarr").obsm["X_cellplm"].shape[0] == 12


def test_one_line_about_an_embedding(tiny_model, capsys):
    """Cells, genes matched and their share, seconds; nothing else, nothing when quiet, a warning if few match."""
    embed(make_adata(20), tiny_model)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("embedded 20 cells: 40 of 43 genes (93 %) matched, ")
    assert line.rstrip(")").endswith((" s", "compiling"))
    embed(make_adata(20), tiny_model, quiet=True)
    assert capsys.readouterr() == ("", "")
    adata = make_adata(20)
    foreign = ad.AnnData(np.ones((20, 200), np.float32), adata.obs)
    foreign.var_names = [f"other{number}" for number in range(200)]
    mixed = ad.concat([adata, foreign], axis=1)
    with pytest.warns(UserWarning, match=r"only 40 of 243 genes \(16 %\).*gene_key"):
        embed(mixed, tiny_model, minimum_genes=1, quiet=True)


def test_quiet_has_one_default():
    import inspect

    for name in cellplm.__all__:
        value = getattr(cellplm, name)
        if callable(value) and not (inspect.isclass(value) and issubclass(value, Exception)):
            quiet = inspect.signature(value).parameters.get("quiet")
            assert quiet is None or quiet.default is False, name
