"""Adapters for cz-benchmarks and Open Problems.

The interfaces are recorded here: cz-benchmarks 0.15.1 (run against the package itself where it is installed), and the
file formats that ``task_batch_integration`` and ``task_label_projection`` document.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from cellplm_jax.errors import InputError
from cellplm_jax.interop.cz_benchmarks import cell_representation
from cellplm_jax.interop.open_problems import batch_integration, label_projection
from cellplm_jax.tasks.embed import embed
from tests.conftest import make_labelled

META = {"name": "cellplm_jax"}


class Dataset:
    """What a ``SingleCellLabeledDataset`` has: ``adata`` after ``load_data``."""

    def load_data(self):
        self.adata = make_labelled(60)
        self.labels = self.adata.obs["kind"]


def test_the_representation_of_a_dataset(tiny_model):
    dataset = Dataset()
    cells = cell_representation(dataset, tiny_model, quiet=True)
    assert (type(cells), cells.dtype) == (np.ndarray, np.float32)
    expected = embed(make_labelled(60), tiny_model, quiet=True).obsm["X_cellplm"]
    np.testing.assert_array_equal(cells, expected)
    assert not dataset.adata.obsm.keys() - {"spatial"}
    assert "cellplm" not in dataset.adata.uns
    with pytest.raises(InputError, match="SingleCellDataset"):
        cell_representation(object(), tiny_model)


def test_the_tasks_of_cz_benchmarks_score_it(tiny_model):
    tasks = pytest.importorskip("czbenchmarks.tasks", reason="needs cz-benchmarks")
    dataset = Dataset()
    cells = cell_representation(dataset, tiny_model, quiet=True)
    labels, obs = dataset.labels, dataset.adata.obs
    silhouette = tasks.EmbeddingTask().run(cells, tasks.EmbeddingTaskInput(input_labels=labels))
    assert -1 <= silhouette[0].value <= 1
    clusters = tasks.ClusteringTask().run(
        cells, tasks.ClusteringTaskInput(obs=obs, input_labels=labels)
    )
    assert {result.metric_type.value for result in clusters} == {
        "adjusted_rand_index",
        "normalized_mutual_info",
    }


def open_problems_file(path, cells: int, *, seed: int = 0, label: bool = True):
    """A file of the documented form: counts in a layer, normalised values, symbols and ids in ``var``."""
    adata = make_labelled(cells, seed=seed)
    counts = adata.X
    result = ad.AnnData(
        obs=adata.obs[[]].assign(batch=np.where(np.arange(cells) % 2, "b1", "b2")),
        var=adata.var[[]].assign(hvg=True, hvg_score=1.0, feature_id=list(adata.var_names)),
        layers={"counts": counts, "normalized": np.log1p(counts)},
        obsm={"X_pca": np.zeros((cells, 5))},
        uns={
            "dataset_id": "d",
            "normalization_id": "log_cp10k",
            "dataset_organism": "homo_sapiens",
        },
    )
    result.var["feature_name"] = [f"gene{number}" for number in range(result.n_vars)]
    result.var_names = result.var["feature_name"].to_numpy()
    if label:
        result.obs["label"] = adata.obs["kind"].to_numpy()
    result.write_h5ad(path)
    return result


def test_batch_integration_of_open_problems(tiny_run, tmp_path):
    data = open_problems_file(tmp_path / "in.h5ad", 40)
    par = {"input": str(tmp_path / "in.h5ad"), "output": str(tmp_path / "out.h5ad")}
    batch_integration({**par, "model": str(tiny_run), "adapt": "none"}, META)
    out = ad.read_h5ad(par["output"])
    assert out.obsm["X_emb"].shape == (40, 16)
    assert np.isfinite(out.obsm["X_emb"]).all()
    assert list(out.obs_names) == list(data.obs_names)
    assert out.shape == data.shape
    assert out.uns == {"method_id": "cellplm_jax", **data.uns}


def test_label_projection_of_open_problems(tiny_run, tmp_path):
    train = open_problems_file(tmp_path / "train.h5ad", 60)
    test = open_problems_file(tmp_path / "test.h5ad", 30, seed=1, label=False)
    par = {f"input_{part}": str(tmp_path / f"{part}.h5ad") for part in ("train", "test")}
    par |= {"output": str(tmp_path / "out.h5ad"), "model": str(tiny_run), "epochs": 1}
    label_projection(par, META)
    out = ad.read_h5ad(par["output"])
    assert list(out.obs_names) == list(test.obs_names)
    assert set(out.obs["label_pred"]) <= set(train.obs["label"])
    assert out.uns["method_id"] == "cellplm_jax"
    assert {"dataset_id", "normalization_id"} <= set(out.uns)
