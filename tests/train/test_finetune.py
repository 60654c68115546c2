"""The fine-tuning loop: what is trained, when it stops, what it keeps; on toys without cells."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cellplm_jax.config import FinetuneConfig, MaskingConfig
from cellplm_jax.errors import CellPLMError, ConfigError
from cellplm_jax.model.masking import drop_cells, follow_cells
from cellplm_jax.train.finetune import (
    LOSS,
    SCORE,
    Trainable,
    _LearningRate,
    adapted_paths,
    finetune,
    init_adapters,
    is_frozen,
    learning_rate_factor,
    merge,
)
from tests.conftest import make_samples


def toy_params():
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    return {
        "embedder": {"gene_embedding": draw(5, 4)},
        "encoder": {
            "layer_0": {"attention": {"query": {"kernel": draw(4, 4), "bias": draw(4)}}},
            "layer_1": {"feedforward_in": {"kernel": draw(4, 6)}},
        },
        "pre_latent_norm": {"scale": draw(4)},
        "head": {"linear": {"kernel": draw(4, 3)}},
    }


def distance_loss(params, example, key):
    """Pull every parameter to the example's number."""
    return sum(jnp.sum((leaf - example) ** 2) for leaf in jax.tree.leaves(params)), {}


def fit(config=None, *, params=None, loss=distance_loss, examples=(1.0, 3.0), **options):
    config = config or recipe()
    parts = [jnp.float32(number) for number in examples]
    return finetune(
        params or toy_params(), config, loss=loss, examples=lambda epoch: parts, layers=2,
        quiet=True, **options,
    )  # fmt: skip


def recipe(**changes):
    return FinetuneConfig(**{"epochs": 4, "warmup_epochs": 1, "learning_rate": 0.05, **changes})


def same(one, two):
    other = flatten_dict(two)
    return {path: np.array_equal(leaf, other[path]) for path, leaf in flatten_dict(one).items()}


def test_the_first_step_is_adamw():
    """After one step without clipping, Adam's direction is the sign of the gradient."""
    params = toy_params()
    config = recipe(epochs=1, clip_norm=0.0, weight_decay=0.1, embedder_weight_decay=0.2)
    found = fit(config, params=params, examples=(2.0,)).params
    for part, rate, decay in (("embedder", 0.005, 0.2), ("head", 0.05, 0.1)):
        for path, leaf in flatten_dict(params[part]).items():
            wanted = leaf - rate * (np.sign(leaf - 2.0) + decay * leaf)
            np.testing.assert_allclose(flatten_dict(found[part])[path], wanted, atol=1e-5)


def test_learning_rates_fall_with_the_distance_from_the_output():
    config = FinetuneConfig(layer_decay=0.5, embedder_rate=0.1)
    factors = [
        learning_rate_factor(path, config, layers=2)
        for path in (
            ("embedder", "gene_embedding"),
            ("encoder", "layer_0", "x"),
            ("encoder", "layer_1", "x"),
            ("pre_latent_norm", "scale"),
            ("latent", "linear", "kernel"),
            ("head", "x"),
        )
    ]
    np.testing.assert_allclose(factors, [0.1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 1.0])
    plain = FinetuneConfig()
    assert learning_rate_factor(("encoder", "layer_0"), plain, 2) == 1.0
    assert learning_rate_factor(("embedder", "x"), plain, 2) == 0.1
    quick = FinetuneConfig(dispersion_rate=30.0)
    assert learning_rate_factor(("decoder", "log_dispersion"), quick, 2) == 30.0


def test_what_is_frozen_stays():
    params = toy_params()
    kept = same(fit(recipe(freeze="embedder"), params=params).params, params)
    assert {path[0] for path, equal in kept.items() if equal} == {"embedder"}
    kept = same(fit(recipe(freeze="encoder"), params=params).params, params)
    assert {path[0] for path, equal in kept.items() if not equal} == {"head"}
    assert not any(same(fit(params=params).params, params).values())


def test_adapters_change_nothing_at_first_and_leave_the_base_alone():
    params = toy_params()
    copy = jax.tree.map(np.copy, params)
    assert len(adapted_paths(params)) == 2
    adapters = init_adapters(params, 2, jax.random.key(0))
    flat = {path: jnp.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    assert all(same(merge(Trainable({}, adapters), flat, 1.0), params).values())

    result = fit(recipe(adapter_rank=2, adapter_scale=0.5), params=params)
    assert all(same(params, copy).values())
    kept = same(result.params, params)
    moved = {path for path, equal in kept.items() if not equal}
    assert moved == {*adapted_paths(params), ("head", "linear", "kernel")}
    for path in adapted_paths(params):
        change = flatten_dict(result.params)[path] - flatten_dict(params)[path]
        assert np.linalg.matrix_rank(change, tol=1e-4) == 2
    sizes = [np.shape(flatten_dict(params)[path]) for path in adapted_paths(params)]
    assert result.trained == sum(2 * (rows + columns) for rows, columns in sizes) + 12


def test_adapters_merge_to_what_was_validated():
    seen = []

    def validate(params):
        seen.append(jax.tree.map(np.asarray, params))
        return {SCORE: float(len(seen))}

    result = fit(recipe(adapter_rank=1), validate=validate)
    assert all(same(result.params, seen[result.best_epoch - 1]).values())
    down, up = np.ones((3, 1), np.float32), np.full((1, 2), 2.0, np.float32)
    path = ("encoder", "w", "kernel")
    base = {path: jnp.arange(6.0).reshape(3, 2)}
    merged = merge(Trainable({}, {path: {"down": down, "up": up}}), base, 3.0)
    np.testing.assert_array_equal(merged["encoder"]["w"]["kernel"], base[path] + 6.0)
    assert is_frozen(path, recipe(adapter_rank=1))
    assert not is_frozen(path, recipe())


def test_the_best_epoch_is_kept_and_patience_ends_it():
    scores = [0.1, 0.5, 0.5, 0.4, 0.3, 0.9]
    losses = [1.0, 1.0, 0.8, 0.7, 0.6, 0.1]
    kept = []

    def validate(params):
        kept.append(jax.tree.map(np.asarray, params))
        return {SCORE: scores[len(kept) - 1], LOSS: losses[len(kept) - 1]}

    result = fit(recipe(epochs=6, patience=2), validate=validate)
    # Of two equal scores the one with the lower loss; the sixth epoch is not reached.
    assert (result.best_epoch, len(result.history), result.stopped_early) == (3, 5, True)
    assert all(same(result.params, kept[2]).values())
    assert [row[SCORE] for row in result.history] == scores[:5]
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4, 5]


def test_without_validation_all_epochs_are_run_and_the_last_is_kept():
    result = fit(recipe(epochs=3, patience=1))
    assert (result.best_epoch, len(result.history), result.stopped_early) == (3, 3, False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert set(result.history[0]) == {"epoch", "loss", "gradient_norm", "learning_rate", "seconds"}


def test_warmup_and_plateau():
    rates = _LearningRate(
        recipe(warmup_epochs=4, plateau_patience=2, plateau_factor=0.5, learning_rate=1.0)
    )
    assert [rates.at(epoch) for epoch in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for loss in (5.0, 4.0, 4.0, 4.0):
        rates.see(loss)
    assert rates.at(9) == 1.0
    rates.see(4.0)
    assert rates.at(9) == 0.5
    for loss in (3.0, 3.0, 3.0, 3.0):
        rates.see(loss)
    assert rates.at(9) == 0.25


def noisy_loss(params, example, key):
    loss, _ = distance_loss(params, example + jax.random.normal(key), key)
    return loss, {"example": example}


def test_the_seed_decides_everything():
    one = fit(recipe(seed=3), loss=noisy_loss)
    two = fit(recipe(seed=3), loss=noisy_loss)
    other = fit(recipe(seed=4), loss=noisy_loss)
    assert all(same(one.params, two.params).values())
    assert not all(same(one.params, other.params).values())
    assert one.history[0]["example"] == 2.0  # the mean over the steps of an epoch


def test_steps_that_are_not_finite_change_nothing_and_then_end_it():
    def loss(params, example, key):
        value, _ = distance_loss(params, example, key)
        return value * example / example, {}  # NaN for the example 0

    params = toy_params()
    sound = fit(recipe(epochs=1), params=params, loss=loss, examples=(1.0, 0.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sound.params))
    assert math.isfinite(sound.history[0]["loss"])
    with pytest.raises(
        CellPLMError, match=r"not finite for 10 steps in a row.*Lower learning_rate"
    ):
        fit(recipe(epochs=40), params=params, loss=loss, examples=(0.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction = 1.0"),
        ({"adapter_rank": -1}, "adapter_rank = -1"),
    ],
)
def test_impossible_recipes(changes, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**changes)


def test_targets_follow_their_cells():
    from cellplm_jax.data.batches import pad_batch

    samples = make_samples(2, 20)
    batch = pad_batch(samples, cells=32)
    number = np.full((2, 32), -1, np.int32)
    number[:, :20] = np.arange(20)
    batch = batch.replace(batch=number)
    kept = drop_cells(jax.random.key(0), batch, MaskingConfig(drop_cells=0.3))
    moved = np.asarray(follow_cells(jnp.asarray(number), kept, fill=-1))
    assert kept.cell_mask.sum() == 28
    np.testing.assert_array_equal(moved[kept.cell_mask], np.asarray(kept.batch)[kept.cell_mask])
    assert (moved[~np.asarray(kept.cell_mask)] == -1).all()
    vectors = np.asarray(follow_cells(jnp.asarray(number)[..., None] * jnp.ones(2), kept))
    np.testing.assert_array_equal(vectors[kept.cell_mask][:, 0], moved[kept.cell_mask])
    np.testing.assert_array_equal(follow_cells(jnp.asarray(number), batch), number)


def test_a_running_mean_of_the_parameters_is_kept():
    plain, seen = [], []
    fit(
        recipe(epochs=3),
        validate=lambda p: plain.append(jax.tree.map(np.asarray, p)) or {SCORE: 0.0},
    )
    result = fit(
        recipe(epochs=3, average=0.9),
        validate=lambda p: seen.append(jax.tree.map(np.asarray, p)) or {SCORE: float(len(seen))},
    )
    start = toy_params()["head"]["linear"]["kernel"]
    mean = start
    for epoch, params in enumerate(plain):
        decay = (1 + epoch) / (10 + epoch)
        mean = decay * mean + (1 - decay) * params["head"]["linear"]["kernel"]
        np.testing.assert_allclose(seen[epoch]["head"]["linear"]["kernel"], mean, atol=1e-5)
    np.testing.assert_array_equal(
        result.params["head"]["linear"]["kernel"], seen[-1]["head"]["linear"]["kernel"]
    )
