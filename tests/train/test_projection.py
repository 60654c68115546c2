"""A model with a trunk starts as the projection of its corpus, and stays usable in every way a model is used."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import sparse

import cellplm_jax
from cellplm_jax.config import TrainConfig, from_dict, to_dict
from cellplm_jax.data.batches import MemoryStore, Sample
from cellplm_jax.data.pipeline import split_heldout
from cellplm_jax.errors import ConfigError
from cellplm_jax.model.cellplm import TRUNK, init_params
from cellplm_jax.presets import preset
from cellplm_jax.tasks import long_context
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.loop import pretrain
from cellplm_jax.train.projection import fit_projection, start_from

GENES, CELLS = 120, 240


def recipe(**changes) -> TrainConfig:
    config = preset("small", GENES)
    values = to_dict(config)
    values["model"] |= {"hidden": 32}
    values["model"]["encoder"] |= {"heads": 4}
    values["model"]["latent"] |= {"size": 24, "clusters": 4}
    values["model"]["decoder"] |= {"hidden": 32, "bottleneck": 16}
    values["projection"] |= {"components": 16, "discriminants": 4, "genes": 100}
    values["data"] |= {"cells": 128, "heldout_fraction": 0.0}
    values |= {"steps": 3, "evaluate_every": 3, "checkpoint_every": 3, "probe_every": 0}
    for path, value in changes.items():
        part, _, name = path.rpartition("__")
        (values[part] if part else values)[name] = value
    return from_dict(TrainConfig, values)


@pytest.fixture(scope="module")
def samples():
    generator = np.random.default_rng(0)
    programs = np.exp(1.5 * generator.standard_normal((4, GENES)))
    found = []
    for number in range(2):
        kind = generator.integers(0, 4, CELLS)
        rate = programs[kind] * np.exp(0.3 * generator.standard_normal(GENES))
        counts = generator.poisson(2 * rate).astype(np.float32)
        found.append(Sample(name=f"s{number}", counts=sparse.csr_matrix(counts)))
    return found


@pytest.fixture(scope="module")
def store(samples):
    return MemoryStore(samples, [f"ENSG{n:011d}" for n in range(GENES)], seed=0)


@pytest.fixture(scope="module")
def start(store):
    config = recipe()
    train, _ = split_heldout(store, config.data, config.seed)
    projection = fit_projection(store, train, config)
    params = start_from(init_params(config.model, jax.random.key(0)), projection, config.model)
    model = Pretrained(config.model, jax.tree.map(np.asarray, params), list(store.genes))
    return config, projection, model


def cells_of(samples, genes):
    from anndata import AnnData

    adata = AnnData(samples[0].counts.copy())
    adata.var_names = genes
    return adata


def test_at_step_0_the_embedding_is_the_projection(start, samples):
    config, projection, model = start
    adata = cellplm_jax.embed(cells_of(samples, model.genes), model, minimum_genes=1)
    counts = samples[0].counts.toarray().astype(np.float64)
    expression = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    projected = expression @ projection.table
    weight = config.model.centre_cells
    total = projected.sum(axis=0) + weight * projection.context_mean
    projected = projected - total / (len(counts) + weight)
    projected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    both = np.hstack([projected, projected @ projection.discriminants])
    expected = both / np.linalg.norm(both, axis=1, keepdims=True)
    found = adata.obsm["X_cellplm"][:, : both.shape[1]]
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_single_cell_is_centred_at_the_corpus(start, samples):
    _, projection, model = start
    adata = cells_of(samples, model.genes)
    alone = cellplm_jax.embed(adata.copy(), model, minimum_genes=1, cells_per_context=1)
    assert np.isfinite(alone.obsm["X_cellplm"]).all()
    assert np.abs(alone.obsm["X_cellplm"]).max() > 0
    counts = adata.X.toarray()[:1].astype(np.float64)
    projected = np.log1p(counts / counts.sum() * 1e4) @ projection.table - projection.context_mean
    found = alone.obsm["X_cellplm"][0, : projected.shape[1]]
    cosine = projected[0] @ found / np.linalg.norm(projected) / np.linalg.norm(found)
    assert cosine == pytest.approx(1, abs=1e-5)


def test_long_contexts_are_centred_as_whole_ones(start, samples, monkeypatch):
    _, _, model = start
    generator = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * generator.standard_normal(leaf.shape).astype(np.float32),
        model.params,
    )
    model = dataclasses.replace(model, params=params)
    adata = cells_of(samples, model.genes)
    whole = cellplm_jax.embed(adata.copy(), model, minimum_genes=1).obsm["X_cellplm"]
    monkeypatch.setattr(long_context, "STREAM_CELLS", 64)
    streamed = cellplm_jax.embed(adata.copy(), model, minimum_genes=1).obsm["X_cellplm"]
    np.testing.assert_allclose(streamed, whole, atol=2e-4)


def test_training_keeps_the_trunk_and_restores_it_from_panels(store, tmp_path):
    config = recipe(steps=6)
    pretrain(config, store, tmp_path / "run", quiet=True)
    model = cellplm_jax.load(tmp_path / "run")
    train, _ = split_heldout(store, config.data, config.seed)
    projection = fit_projection(store, train, config)
    table = model.params["embedder"]["gene_embedding"]
    np.testing.assert_array_equal(table[:, : projection.table.shape[1]], projection.table)
    out = model.params["encoder"]["layer_0"]["attention"]["out"]["kernel"]
    assert np.abs(out).max() > 0
    assert "restoration" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(path[0] in model.params for path in TRUNK[:3])


def test_eight_devices_take_the_steps_of_one(store, tmp_path):
    results = []
    for name, devices in (("one", jax.devices()[:1]), ("eight", jax.devices())):
        config = recipe(data__rows=8, steps=2, mesh__cells=1)
        pretrain(config, store, tmp_path / name, quiet=True, devices=devices)
        results.append(cellplm_jax.load(tmp_path / name).params)
    for one, eight in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, eight, atol=2e-4)


def test_what_does_not_fit_a_trunk_is_refused():
    with pytest.raises(ConfigError, match="at most as many components"):
        recipe(projection__components=40)
    with pytest.raises(ConfigError, match="at most as many as latent"):
        recipe(projection__discriminants=9)
    values = to_dict(recipe())
    values["model"]["trunk"] = "none"
    with pytest.raises(ConfigError, match="restoration_weight"):
        from_dict(TrainConfig, values)
