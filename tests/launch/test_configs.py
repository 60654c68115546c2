"""Every variant: its table entry, its command, and that it builds."""

from __future__ import annotations

import dataclasses
import math

import pytest

pytest.importorskip("ml_collections")

from cellplm_jax.config import TrainConfig, from_config_dict
from cellplm_jax.presets import PRESETS, preset
from configs import pretrain
from launch.options import check_config_keys, config_keys

# The demonstration's run belongs to 'cellplm demo'.
VARIANTS = [name for name in PRESETS if name != "demo"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_documented_and_becomes_its_preset(variant):
    rows = [line for line in pretrain.__doc__.splitlines() if line.startswith(f"``:{variant}``")]
    assert len(rows) == 1
    assert from_config_dict(TrainConfig, pretrain.get_config(variant)) == preset(variant)


def test_the_large_one_has_about_a_billion_parameters():
    import jax

    from cellplm_jax.model.cellplm import init_params

    config = preset("1b", 19_374)
    decoder = dataclasses.replace(config.model.decoder, batches=12_596)
    model = dataclasses.replace(config.model, decoder=decoder)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(1_018.5e6, rel=0.001)
    assert (config.precision, config.rematerialize) == ("bfloat16", True)
    assert preset("85m").precision == "bfloat16"
    # The devices that share the genes hold equal parts, padded by the compiler where they must be.
    assert config.data.rows % config.mesh.genes == 0


def test_every_key_of_the_configuration_is_known():
    keys = config_keys()
    assert {"steps", "model", "model.latent.size", "data.rows", "mesh.genes"} <= set(keys)
    check_config_keys([f"--config.{key}=x" for key in keys])
    check_config_keys(
        ["--config=configs/pretrain.py:small", "--noconfig.masking.beta", "positional"]
    )
