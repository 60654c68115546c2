"""Configurations are strict: unknown keys, wrong types and impossible values are errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import math

import ml_collections
import pytest

from cellplm_jax import presets
from cellplm_jax.config import (
    DataConfig,
    DecoderConfig,
    EmbedderConfig,
    EncoderConfig,
    HeadConfig,
    LatentConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PositionsConfig,
    TrainConfig,
    from_config_dict,
    from_dict,
    to_dict,
)
from cellplm_jax.errors import CellPLMError, ConfigError
from configs.pretrain import get_config


def train_values(**changes):
    return to_dict(presets.preset("debug", genes=7)) | changes


# ------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_builds_and_survives_json(name):
    config = presets.preset(name, genes=123)
    assert config.model.genes == 123
    text = json.dumps(to_dict(config))
    again = from_dict(TrainConfig, json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert json.dumps(to_dict(again)) == text


def test_presets_differ_from_small_in_what_they_are_named_after():
    small = to_dict(presets.preset("small"))

    def changed(values, other, path=""):
        paths = set()
        for key, value in values.items():
            if isinstance(value, dict):
                paths |= changed(value, other[key], f"{path}{key}.")
            elif value != other[key]:
                paths.add(path + key)
        return paths

    expected = {
        "gaussian": {"model.latent.kind"},
        "no_latent": {"model.latent.kind"},
        "mlp_encoder": {"model.encoder.kind"},
        "no_positions": {"model.positions.kind"},
        # Without masking there are no panels either: the network sees every count.
        "no_masks": {
            "masking.cell_fraction",
            "masking.gene_fraction",
            "masking.panel_fraction",
            "masking.library_of_visible",
        },
        "no_discriminants": {"projection.discriminants"},
        "no_restoration": {"objective.restoration_weight"},
        "no_projection": {
            "model.trunk",
            "masking.panel_fraction",
            "masking.library_of_visible",
            "objective.restoration_weight",
            "optimizer.freeze_trunk",
        },
    }
    for name, paths in expected.items():
        assert changed(to_dict(presets.preset(name)), small) == paths, name


def test_the_published_architecture_has_its_published_sizes():
    config = presets.preset("85m").model
    assert (config.hidden, config.encoder.layers, config.encoder.heads) == (1024, 4, 8)
    assert (config.latent.size, config.latent.clusters) == (512, 16)
    assert (config.decoder.hidden, config.decoder.bottleneck, config.decoder.layers) == (
        1024,
        128,
        2,
    )
    assert config.positions.kind == "sinusoidal"
    assert config.latent_size == 512


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'smal'.*85m, 1b, small.*Did you mean 'small'"):
        presets.preset("smal")
    with pytest.raises(ConfigError, match="Choose one of them"):
        presets.preset("xyzzy")


def test_configurations_are_frozen():
    config = presets.preset("debug")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]


def test_missing_keys_take_defaults_and_only_required_ones_are_missed():
    assert from_dict(ModelConfig, {"genes": 5}) == ModelConfig(genes=5)
    with pytest.raises(ConfigError, match=r"ModelConfig has no 'genes'.*Set genes"):
        from_dict(ModelConfig, {})
    with pytest.raises(ConfigError, match="model has no 'genes'"):
        from_dict(TrainConfig, {"model": {"hidden": 32}})
    with pytest.raises(ConfigError, match="TrainConfig has no 'model'"):
        from_dict(TrainConfig, {})


def test_parts_may_be_given_as_dataclasses():
    encoder = EncoderConfig(layers=1)
    assert from_dict(ModelConfig, {"genes": 5, "encoder": encoder}).encoder is encoder


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("values", "where", "nearest"),
    [
        ({"stepz": 3}, "unknown key 'stepz' in TrainConfig", "steps"),
        ({"optimizer": {"lerning_rate": 0.1}}, "'lerning_rate' in optimizer", "learning_rate"),
        ({"model": {"genes": 5, "hiden": 3}}, "'hiden' in model", "hidden"),
        (
            {"model": {"genes": 5, "latent": {"cluster": 3}}},
            "'cluster' in model.latent",
            "clusters",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_one(values, where, nearest):
    with pytest.raises(ConfigError) as error:
        from_dict(TrainConfig, train_values(**values))
    message = str(error.value)
    assert where in message
    assert message.endswith(f"Did you mean '{nearest}'?")
    assert "expected one of " in message
    assert "\n" not in message


def test_unknown_keys_without_a_neighbour_say_so():
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'.*Remove it\.$"):
        from_dict(EncoderConfig, {"zzz": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "100"}, r"steps = '100' \(str\); expected int"),
        ({"steps": 1.0}, r"steps = 1\.0 \(float\); expected int"),
        ({"steps": True}, r"steps = True \(bool\); expected int"),
        ({"steps": None}, r"steps = None \(NoneType\); expected int"),
        ({"objective": {"masked_part": 1}}, r"objective\.masked_part = 1 \(int\); expected bool"),
        ({"optimizer": {"learning_rate": "1e-4"}}, r"optimizer\.learning_rate = '1e-4' \(str\)"),
        ({"optimizer": {"learning_rate": True}}, r"optimizer\.learning_rate = True \(bool\)"),
        ({"optimizer": 3}, "optimizer is int 3; expected a mapping"),
        ({"model": None}, "model is NoneType None; expected a mapping"),
        ({"model": {"genes": [5]}}, r"model\.genes = \[5\] \(list\); expected int"),
        (
            {"model": {"genes": 5, "norm": "groupnrm"}},
            r"model\.norm = 'groupnrm'.*Did you mean 'groupnorm'\?$",
        ),
        (
            {"model": {"genes": 5, "encoder": {"kind": 3}}},
            r"model\.encoder\.kind = 3; expected one of 'flow', .*Choose one of them",
        ),
    ],
)
def test_wrong_types_are_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, train_values(**values))


def test_a_whole_number_is_a_fraction_number():
    config = from_dict(OptimizerConfig, {"learning_rate": 1})
    assert config.learning_rate == 1.0
    assert type(config.learning_rate) is float


def test_errors_are_value_errors_of_this_package():
    assert issubclass(ConfigError, CellPLMError)
    assert issubclass(ConfigError, ValueError)


# --------------------------------------------------------------------------------- impossible values


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"genes": 0}, "genes = 0; expected at least one gene"),
        (
            ModelConfig,
            {"genes": 5, "dropout": 1.0},
            r"dropout = 1.0; expected a number in \[0, 1\)",
        ),
        (ModelConfig, {"genes": 5, "dropout": -0.1}, "dropout = -0.1"),
        (ModelConfig, {"genes": 5, "dropout": math.nan}, "dropout = nan"),
        (ModelConfig, {"genes": 5, "hidden": 1028}, r"hidden = 1028 with encoder\.heads = 8"),
        (
            ModelConfig,
            {"genes": 5, "hidden": 30, "encoder": {"heads": 2}},
            "hidden = 30 with norm_groups = 4",
        ),
        (
            ModelConfig,
            {"genes": 5, "decoder": {"hidden": 1022}},
            r"decoder\.hidden = 1022 with norm_groups = 4",
        ),
        (
            ModelConfig,
            {"genes": 5, "hidden": 30, "encoder": {"heads": 2}, "norm": "layernorm"},
            "hidden = 30 with sinusoidal positions",
        ),
        (
            ModelConfig,
            {"genes": 5, "latent": {"adversarial_weight": 0.1}},
            r"latent\.adversarial_weight is on with decoder\.batches = 0",
        ),
        (
            ModelConfig,
            {"genes": 5, "embedder": {"covariate": True}},
            r"embedder\.covariate is on with decoder\.batches = 0",
        ),
        (EncoderConfig, {"layers": 0}, r"encoder\.layers = 0; expected at least one layer"),
        (EncoderConfig, {"kind": "residual_mlp", "layers": 1}, "at least two layers"),
        (EncoderConfig, {"attention_dropout": 1.5}, r"encoder\.attention_dropout = 1\.5"),
        (DecoderConfig, {"layers": 0}, r"decoder\.layers = 0"),
        (DecoderConfig, {"kind": "residual", "layers": 1}, "at least 2"),
        (HeadConfig, {"kind": "annotation"}, r"head\.outputs = 0 with head\.kind = 'annotation'"),
        (MaskingConfig, {"cell_fraction": 1.01}, r"masking\.cell_fraction = 1\.01"),
        (MaskingConfig, {"gene_fraction": -0.01}, r"masking\.gene_fraction = -0\.01"),
        (MaskingConfig, {"drop_cells": 1.0}, r"masking\.drop_cells = 1\.0"),
        (
            MaskingConfig,
            {"beta_concentration": 19.0},
            r"beta_concentration = 19\.0 with gene_fraction = 0\.25 gives Beta\(a, -1\)",
        ),
        (DataConfig, {"rows": 0}, r"data\.rows = 0"),
        (DataConfig, {"cells": 0}, r"data\.cells = 0"),
        (DataConfig, {"heldout_fraction": 1.0}, r"data\.heldout_fraction = 1\.0"),
        (TrainConfig, {"model": {"genes": 1}, "steps": 0}, "steps = 0; expected at least 1"),
        (TrainConfig, {"model": {"genes": 1}, "keep_checkpoints": 0}, "keep_checkpoints = 0"),
    ],
)
def test_impossible_values_are_errors(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(kind, values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # Unchecked, heads = 0 and norm_groups = 0 would reach a modulo, and every other value here would fail later,
        # inside Flax or with NaN, or train something meaningless.
        (ModelConfig, {"genes": 5, "encoder": {"heads": 0}}),
        (ModelConfig, {"genes": 5, "norm_groups": 0}),
        (ModelConfig, {"genes": 5, "hidden": 0}),
        (ModelConfig, {"genes": 5, "hidden": -1024}),
        (EmbedderConfig, {"target_sum": 0.0}),
        (PositionsConfig, {"grid": 0}),
        (PositionsConfig, {"kind": "laplacian", "eigenvectors": 0}),
        (EncoderConfig, {"feedforward": 0}),
        (EncoderConfig, {"random_features": -1}),
        (LatentConfig, {"size": 0}),
        (LatentConfig, {"clusters": 0}),
        (LatentConfig, {"temperature": 0.0}),
        (LatentConfig, {"latent_weight": -1.0}),
        (LatentConfig, {"latent_weight": math.nan}),
        (LatentConfig, {"floor": -1.0}),
        (LatentConfig, {"warmup_steps": -1}),
        (LatentConfig, {"adversarial_weight": -0.5}),
        (DecoderConfig, {"hidden": 0}),
        (DecoderConfig, {"bottleneck": 0}),
        (DecoderConfig, {"batches": -1}),
        (HeadConfig, {"kind": "annotation", "outputs": 3, "layers": 0}),
        (HeadConfig, {"kind": "perturbation", "outputs": 3, "condition": -1}),
        (MaskingConfig, {"beta_concentration": 0.0}),
        (MaskingConfig, {"maximum_rate": 1.5}),
        (MaskingConfig, {"maximum_cells": -1}),
        (OptimizerConfig, {"learning_rate": -1e-3}),
        (OptimizerConfig, {"learning_rate": math.nan}),
        (OptimizerConfig, {"weight_decay": -1.0}),
        (OptimizerConfig, {"warmup_steps": -1}),
        (OptimizerConfig, {"clip_norm": -1.0}),
        (DataConfig, {"minimum_cells": 0}),
        # The objective needs an output that the decoder lacks.
        (TrainConfig, {"model": {"genes": 5, "decoder": {"kind": "residual"}}}),
        (
            TrainConfig,
            {"model": {"genes": 5}, "objective": {"kind": "zero_inflated_negative_binomial"}},
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:60],
)
def test_values_that_cannot_work_are_refused_when_the_configuration_is_built(kind, values):
    with pytest.raises(ConfigError):
        from_dict(kind, values)


def test_possible_corner_values_are_accepted():
    EncoderConfig(kind="none", layers=0)
    DecoderConfig(layers=1)
    MaskingConfig(cell_fraction=1.0, gene_fraction=0.0, drop_cells=0.0, maximum_cells=0)
    MaskingConfig(beta_concentration=19.0, beta=False)
    ModelConfig(
        genes=1,
        hidden=30,
        norm="none",
        encoder=EncoderConfig(kind="mlp"),
        positions=PositionsConfig(kind="grid"),
    )
    ObjectiveConfig(masked_part=False)
    OptimizerConfig(warmup_steps=0, clip_norm=0.0, weight_decay=0.0)
    assert ModelConfig(genes=1, latent=LatentConfig(kind="none")).latent_size == 1024


# ------------------------------------------------------------------------------------ ml_collections


@pytest.mark.parametrize("name", presets.PRESETS)
def test_config_dicts_become_the_same_configuration(name):
    values = get_config(name)
    assert isinstance(values, ml_collections.ConfigDict)
    assert from_config_dict(TrainConfig, values) == presets.preset(name)
    frozen = ml_collections.FrozenConfigDict(values)
    assert from_config_dict(TrainConfig, frozen) == presets.preset(name)


def test_overridden_config_dicts_are_strict():
    values = get_config("debug")
    values.optimizer.learning_rate = 1e-4
    values.model.encoder.kind = "mlp"
    config = from_config_dict(TrainConfig, values)
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.encoder.kind == "mlp"

    values.model.encoder.unlock()
    values.model.encoder.layerz = 3
    with pytest.raises(ConfigError, match=r"'layerz' in model\.encoder.*Did you mean 'layers'\?"):
        from_config_dict(TrainConfig, values)

    values = get_config("debug")
    values.model.encoder.kind = "flwo"
    with pytest.raises(ConfigError, match=r"model\.encoder\.kind = 'flwo'.*Did you mean 'flow'\?"):
        from_config_dict(TrainConfig, values)

    values = get_config("debug")
    values.stepz = 3
    with pytest.raises(ConfigError, match=r"unknown key 'stepz'.*Did you mean 'steps'\?"):
        from_config_dict(TrainConfig, values)

    values = get_config("debug")
    with pytest.raises(TypeError):
        values.steps = "many"
    del values.steps
    values.steps = "many"
    with pytest.raises(ConfigError, match=r"steps = 'many' \(str\); expected int"):
        from_config_dict(TrainConfig, values)


def test_references_inside_config_dicts_are_resolved():
    values = get_config("debug")
    values.model.latent.size = values.model.get_ref("hidden")
    values.model.hidden = 64
    assert from_config_dict(TrainConfig, values).model.latent.size == 64


def test_every_field_is_documented():
    parts = [
        EmbedderConfig,
        PositionsConfig,
        EncoderConfig,
        LatentConfig,
        DecoderConfig,
        HeadConfig,
        ModelConfig,
        MaskingConfig,
        ObjectiveConfig,
        OptimizerConfig,
        DataConfig,
        TrainConfig,
    ]
    for part in parts:
        attributes = (part.__doc__ or "").split("Attributes:")[1]
        for entry in dataclasses.fields(part):
            assert entry.name in attributes, f"{part.__name__}.{entry.name}"
