"""The zero-shot study: its rivals, its scores and its table on small data."""

import importlib.util
import sys

import numpy as np
import pytest
from scipy import sparse

import cellplm_jax
from tests.conftest import ROOT

pytest.importorskip("igraph", reason="needs the extra 'eval'")


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location(
        "zero_shot_study", ROOT / "benchmarks" / "zero_shot" / "run.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cells(study):
    adata = cellplm_jax.datasets.pbmc3k()[::10].copy()
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    adata = adata[labels != "unassigned"].copy()
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    return study.Cells("pbmc3k", adata, labels[labels != "unassigned"], None)


def test_the_corpus_projection_is_the_model_without_what_training_added(study):
    model = cellplm_jax.load("small")
    projection = study.projection_of(model)
    components = np.any(model.params["embedder"]["gene_embedding"] != 0, axis=0).sum()
    kernel = projection.params["latent"]["mean"]["kernel"]
    np.testing.assert_array_equal(kernel[:components, :components], np.eye(components))
    assert not kernel[:, components:].any()
    assert not projection.params["encoder"]["layer_0"]["attention"]["out"]["kernel"].any()
    assert model.params["encoder"]["layer_0"]["attention"]["out"]["kernel"].any()


def test_every_method_embeds_every_cell(study, cells):
    model = cellplm_jax.load("small")
    for name, run in study.methods_for(model).items():
        if name.startswith("scVI"):
            continue
        embedding = run(cells, 0)
        assert embedding.shape[0] == len(cells.labels), name
        assert np.isfinite(embedding).all(), name
        found = study.scores(embedding, cells.labels, 0)
        assert 0 <= found["knn_accuracy"] <= 1
        if name != "untrained network":
            assert found["knn_accuracy"] > 0.7, name


def test_labels_are_carried_between_equal_studies(study, cells):
    embedding = study.components(scale=True, unit=True)(cells, 0)
    half = np.arange(len(embedding)) % 2 == 0
    studies = {
        "a": (embedding[half], cells.labels[half]),
        "b": (embedding[~half], cells.labels[~half]),
    }
    assert study.carried_labels(studies) > 0.5
    shuffled = np.random.default_rng(0).permutation(cells.labels[~half])
    assert study.carried_labels({**studies, "b": (embedding[~half], shuffled)}) < 0.3


def test_the_best_of_a_column_is_bold(study):
    lines = study.table_of({"x": {"a": 0.5}, "y": {"a": 0.25}, "z": {}}, {"a": "score"})
    assert lines == ["| | score |", "|---|---|", "| x | **0.500** |", "| y | 0.250 |", "| z |  |"]
