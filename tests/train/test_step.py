"""The training step: every kind of model takes one, the loss falls, and devices do not change it."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.config import (
    DecoderConfig,
    EncoderConfig,
    LatentConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PositionsConfig,
)
from cellplm_jax.data.batches import Sample, laplacian_eigenvectors, pad_batch
from cellplm_jax.presets import PRESETS, preset
from cellplm_jax.train.state import create_state
from cellplm_jax.train.step import training_step
from tests.conftest import make_counts

GENES = 24


def shrink(config):
    """The same kinds, hardly any numbers, and equal wherever kinds do not differ: equal programs compile once."""
    old = config.model
    model = dataclasses.replace(
        old,
        genes=GENES,
        hidden=32,
        dropout=0.0,
        encoder=dataclasses.replace(
            old.encoder,
            layers=2 if old.encoder.kind == "residual_mlp" else 1,
            heads=4,
            attention_dropout=0.0,
        ),
        latent=dataclasses.replace(old.latent, size=8, clusters=4, warmup_steps=0),
        decoder=dataclasses.replace(old.decoder, hidden=32, bottleneck=16, batches=2, layers=2),
        positions=dataclasses.replace(old.positions, eigenvectors=3, grid=10),
    )
    projection = dataclasses.replace(config.projection, components=6, discriminants=2)
    return dataclasses.replace(
        config,
        model=model,
        optimizer=OptimizerConfig(warmup_steps=0),
        projection=projection,
        steps=2,
    )


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    samples = []
    for i in range(2):
        place = random.random((8, 2)).astype(np.float32)
        place[1] = np.nan
        vectors = np.zeros((8, 3), np.float32)
        present = np.isfinite(place).all(axis=1)
        vectors[present] = laplacian_eigenvectors(place[present], 3)
        counts = make_counts(8, genes=GENES, seed=i).astype(np.float32)
        counts[2] = 0  # a cell without counts must not make anything infinite
        samples.append(
            Sample("s", sparse.csr_matrix(counts), coordinates=place, eigenvectors=vectors, batch=i)
        )
    padded = pad_batch(samples, cells=12, nonzeros=512, eigenvectors=3)
    return jax.tree.map(lambda leaf: leaf[None], padded)


def random_state(config):
    """A state of the right shapes, without compiling an initialisation."""
    random = np.random.default_rng(0)
    state = jax.eval_shape(lambda: create_state(config))
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.1, leaf.shape).astype(leaf.dtype), state.params
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    return zeros.replace(params=params)


def one_step(config, batch):
    """Trace the configuration as it is, dropout and all; take a step of the shrunk one."""
    jax.eval_shape(lambda: training_step(create_state(config), batch, config))
    config = shrink(config)
    state = random_state(config)
    assert config.accumulate == 1
    after, metrics = jax.jit(lambda state, batch: training_step(state, batch, config))(state, batch)
    metrics = {name: float(value) for name, value in metrics.items()}
    assert all(map(math.isfinite, metrics.values())), metrics
    assert metrics["gradient_norm"] > 0
    assert metrics["cells"] > 0
    assert int(after.step) == 1
    for leaf in jax.tree.leaves(after.params):
        assert np.isfinite(leaf).all()
    moved = jax.tree.map(lambda one, two: bool(np.any(one != two)), state.params, after.params)
    return metrics, moved


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step(name, batch):
    config = preset(name, GENES)
    metrics, moved = one_step(config, batch)
    assert any(jax.tree.leaves(moved["embedder"]))
    assert any(jax.tree.leaves(moved["encoder"]))
    assert moved["decoder"]["log_mean"]["kernel"]
    restoration = config.objective.restoration_weight * metrics.get("restoration", 0.0)
    assert ("restoration" in metrics) == (config.objective.restoration_weight > 0)
    terms = metrics["reconstruction"] + metrics["latent"] + restoration
    assert metrics["loss"] == pytest.approx(terms, rel=1e-5)
    if name == "no_masks":
        assert config.masking.cell_fraction == 0


# Every kind of every part at least once, with as few combinations as there are encoders.
KINDS = [
    ("flow", "gaussian_mixture", "paper", "negative_binomial", "sinusoidal"),
    ("softmax", "gaussian_mixture", "released", "zero_inflated_negative_binomial", "grid"),
    ("performer", "gaussian", "paper", "gaussian", "mlp"),
    ("mlp", "deterministic", "paper", "residual", "laplacian"),
    ("residual_mlp", "none", "paper", "negative_binomial", "none"),
    ("none", "gaussian_mixture", "paper", "negative_binomial", "laplacian"),
]
OBJECTIVES = {
    "zero_inflated_negative_binomial": "zero_inflated_negative_binomial",
    "gaussian": "mean_squared_error",
    "residual": "mean_squared_error",
}


def choices(part, field="kind"):
    import typing

    return set(typing.get_args(typing.get_type_hints(part)[field]))


def test_the_combinations_hold_every_kind():
    # A new kind needs a row in KINDS, and one in OBJECTIVES if it has its own loss.
    encoders, latents, inferences, decoders, positions = map(set, zip(*KINDS, strict=True))
    assert encoders == choices(EncoderConfig)
    assert latents == choices(LatentConfig)
    assert inferences == choices(LatentConfig, "inference")
    assert decoders == choices(DecoderConfig)
    assert positions == choices(PositionsConfig)


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_every_kind_takes_a_step(kinds, batch):
    encoder, latent, inference, decoder, positions = kinds
    model = ModelConfig(
        genes=GENES,
        hidden=32,
        encoder=EncoderConfig(kind=encoder),
        latent=LatentConfig(kind=latent, inference=inference, size=8),
        decoder=DecoderConfig(kind=decoder, hidden=32, batches=2),
        positions=PositionsConfig(kind=positions, eigenvectors=3),
    )
    objective = ObjectiveConfig(kind=OBJECTIVES.get(decoder, "negative_binomial"))
    config = dataclasses.replace(preset("debug", GENES), model=model, objective=objective)
    metrics, moved = one_step(config, batch)
    assert moved["embedder"]["gene_embedding"]
    if positions != "none":
        assert any(jax.tree.leaves(moved["embedder"]["positions"]))
    if encoder != "none":
        assert any(jax.tree.leaves(moved["encoder"]))
    if latent in ("deterministic", "none"):
        assert metrics["latent"] == 0


def test_every_step_draws_anew(batch):
    """Same parameters, same batch, another step: other cells are dropped and other genes masked."""
    config = shrink(preset("small", GENES))
    step = jax.jit(lambda state, batch: training_step(state, batch, config))
    state = random_state(config)
    first, again = (float(step(state, batch)[1]["loss"]) for _ in range(2))
    later = float(step(state.replace(step=np.int32(1)), batch)[1]["loss"])
    assert first == again
    assert first != later
