"""Published checkpoints: every parameter has its place, back and forth bit for bit, and nothing is taken on trust."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import zipfile

import numpy as np
import pytest

from cellplm_jax.cli import main
from cellplm_jax.config import LatentConfig, ModelConfig, PositionsConfig
from cellplm_jax.errors import CheckpointError
from cellplm_jax.interop import torch_checkpoint
from cellplm_jax.interop.published_config import REQUIRED
from cellplm_jax.interop.torch_checkpoint import (
    as_published,
    convert_state_dict,
    model_config,
    to_state_dict,
)
from cellplm_jax.tasks.pretrained import Pretrained, load
from tests.conftest import VOCABULARY

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch (extra 'torch')"
)
GENES = VOCABULARY[:12]


def published(latent="gmvae", encoder="flowformer", **changes):
    """A config in the form of the published 85M one, small."""
    return {
        "gene_list": GENES,
        "out_dim": len(GENES),
        "enc_mod": encoder,
        "enc_hid": 16,
        "enc_layers": 2,
        "enc_head": 4,
        "latent_mod": latent,
        "post_latent_dim": 6,
        "num_clusters": 3,
        "dec_mod": "nbmlp",
        "dec_hid": 16,
        "dec_layers": 2,
        "batch_num": 3,
        "dataset_num": 2,
        "platform_num": 2,
        "norm": "groupnorm",
        "model_dropout": 0.2,
        "pe_type": None,
        "cat_pe": False,
        **changes,
    }


def state_dict_of(config, *, seed=0):
    """Parameters under the published names, in the shapes PyTorch gives them, written down from the original's code.

    Independent of the conversion: ``Linear`` weights are [out, in], ``PReLU`` has one number, the gene embedding is
    [genes, width], the mixture's inference network is 512 wide.
    """
    hidden, dec, size, clusters = 16, 16, 6, 3
    genes = len(config["gene_list"])
    shapes = {"embedder.feat_enc.emb": (genes, hidden)}

    def linear(name, inputs, outputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    linear("embedder.extra_linear.0", hidden, hidden)
    norm("embedder.extra_linear.3", hidden)
    norm("embedder.norm0", hidden)
    for layer in range(config["enc_layers"]):
        name = f"encoder.layers.{layer}"
        if config["enc_mod"] == "mlp":
            linear(f"{name}.0", hidden, hidden)
            shapes[f"{name}.1.weight"] = (1,)
            norm(f"{name}.3", hidden)
        else:
            for part in ("query", "key", "value", "out"):
                linear(f"{name}.self_attn.{part}_projection", hidden, hidden)
            linear(f"{name}._ff_block.0", hidden, 2 * hidden)
            linear(f"{name}._ff_block.3", 2 * hidden, hidden)
            norm(f"{name}.norm1", hidden)
            norm(f"{name}.norm2", hidden)
    norm("pre_latent_norm.norm", hidden)
    if config["latent_mod"] == "vae":
        linear("latent.layers.1.hid_2mu", hidden, size)
        linear("latent.layers.1.hid_2sigma", hidden, size)
    elif config["latent_mod"] == "ae":
        linear("latent.layers.1.lat_2lat.0", hidden, size)
    else:
        name = "latent.layers.1.inference"
        linear(f"{name}.inference_qyx.0.logits", hidden, clusters)
        linear(f"{name}.inference_qzyx.0", hidden + clusters, 512)
        linear(f"{name}.inference_qzyx.2.mu", 512, size)
        linear(f"{name}.inference_qzyx.2.var", 512, size)
        linear(f"{name}.y_mu", clusters, size)
        linear(f"{name}.y_var", clusters, size)
    linear("decoder.layers.0.0", size, dec)
    shapes["decoder.layers.0.1.weight"] = (1,)
    norm("decoder.layers.0.3", dec)
    for covariate, rows in (("batch", 3), ("dataset", 2), ("platform", 2)):
        name = f"decoder.covariate_layers.0.{covariate}"
        shapes[f"{name}.0.weight"] = (rows, dec)
        shapes[f"{name}.1.weight"] = (1,)
        norm(f"{name}.2", dec)
    linear("decoder.out_layer.dec_1", dec, 128)
    linear("decoder.out_layer.dec_mean.0", 128, genes)
    shapes["decoder.out_layer.dec_disp"] = (genes,)
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


ARCHITECTURES = [(x, y) for x in ("gmvae", "vae", "ae") for y in ("flowformer", "mlp")]


@pytest.mark.parametrize(("latent", "encoder"), ARCHITECTURES)
def test_round_trip_is_bit_identical(latent, encoder):
    config = published(latent, encoder)
    state = state_dict_of(config)
    converted = convert_state_dict(state, config)
    assert converted.genes == GENES
    assert converted.config.genes == len(GENES)
    assert set(converted.unused) == {"embedder.norm0.weight", "embedder.norm0.bias"}
    assert all("never calls" in reason for reason in converted.unused_reasons().values())
    back = to_state_dict(converted)
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert back[name].dtype == np.float32
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes(), name
    # A kernel is [inputs, outputs] here.
    kernel = converted.params["decoder"]["log_mean"]["kernel"]
    np.testing.assert_array_equal(kernel, state["decoder.out_layer.dec_mean.0.weight"].T)
    np.testing.assert_array_equal(
        converted.params["embedder"]["gene_embedding"], state["embedder.feat_enc.emb"]
    )


def test_conversion_copies():
    config = published("ae", "mlp")
    state = state_dict_of(config)
    converted = convert_state_dict(state, config)
    state["decoder.out_layer.dec_disp"][:] = 7
    state["embedder.norm0.bias"][:] = 7
    assert not (converted.params["decoder"]["log_dispersion"] == 7).any()
    assert not (converted.unused["embedder.norm0.bias"] == 7).any()


def refusal(call):
    with pytest.raises(CheckpointError) as error:
        call()
    text = str(error.value)
    assert "expected" in text
    assert "\n" not in text
    return text


NAMES = sorted(state_dict_of(published()))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("embedder.norm0")][::4])
def test_missing_parameter(name):
    state = state_dict_of(published())
    del state[name]
    assert name in refusal(lambda: convert_state_dict(state, published()))


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layers.2.norm1.weight",
        "decoder.layers.1.0.weight",
        "decoder.covariate_layers.1.batch.0.weight",
        "something.else",
        "head.mlp.1.weight",
    ],
)
def test_extra_parameter(name):
    state = {**state_dict_of(published()), name: np.zeros(3, np.float32)}
    assert name in refusal(lambda: convert_state_dict(state, published()))


def test_many_extra_parameters_are_counted():
    extra = {f"strange.{i}": np.zeros(1, np.float32) for i in range(9)}
    text = refusal(lambda: convert_state_dict({**state_dict_of(published()), **extra}, published()))
    assert "and 6 more" in text


def test_known_unused_parameters_are_kept():
    extra = {
        "embedder.pe_enc.pe_enc.weight": np.ones((4, 2), np.float32),
        "latent.layers.0.discriminator.0.weight": np.ones(3, np.float32),
    }
    converted = convert_state_dict({**state_dict_of(published()), **extra}, published())
    assert set(extra) < set(converted.unused)
    assert set(extra) < set(to_state_dict(converted))


@pytest.mark.parametrize("name", [*NAMES[::5], "decoder.layers.0.1.weight"])
def test_wrong_shape(name):
    if name.startswith("embedder.norm0"):
        pytest.skip("influences nothing")
    state = state_dict_of(published())
    state[name] = np.zeros((*state[name].shape[:-1], state[name].shape[-1] + 1), np.float32)
    text = refusal(lambda: convert_state_dict(state, published()))
    assert name in text
    assert str(state[name].shape) in text


def test_transposed_weight_is_refused():
    state = state_dict_of(published())
    name = "encoder.layers.1._ff_block.0.weight"
    state[name] = state[name].T.copy()
    assert "(16, 32)" in refusal(lambda: convert_state_dict(state, published()))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64])
def test_wrong_number_type(dtype):
    state = state_dict_of(published())
    state["decoder.out_layer.dec_disp"] = state["decoder.out_layer.dec_disp"].astype(dtype)
    text = refusal(lambda: convert_state_dict(state, published()))
    assert "dec_disp" in text
    assert np.dtype(dtype).name in text


@pytest.mark.parametrize("key", REQUIRED)
def test_config_that_lacks_a_key(key):
    config = published()
    del config[key]
    assert key in refusal(lambda: model_config(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enc_mod": "transformer"}, "spectral"),
        ({"enc_mod": "performer"}, "random features"),
        ({"enc_mod": "cosformer"}, "position"),
        ({"enc_mod": "resmlp"}, "resmlp"),
        ({"enc_mod": "rnn"}, "rnn"),
        ({"latent_mod": "adversarial"}, "adversarial"),
        ({"dec_mod": "zinb"}, "zinb"),
        ({"dsbn": True}, "dsbn"),
        ({"norm": "batchnorm"}, "batchnorm"),
        ({"pe_type": "sin", "cat_pe": True}, "cat_pe"),
        ({"head_type": "poet"}, "poet"),
        ({"out_dim": 13}, "13"),
        ({"mask_type": "hidden"}, "hidden"),
        ({"enc_hid": 18}, "18"),
        ({"enc_hid": "wide"}, "wide"),
        ({"enc_layers": None}, "is invalid"),
        ({"gene_list": None, "out_dim": 0}, "is invalid"),
        ({"gene_list": "ABCDEFGHIJKL"}, "gene_list"),
        ({"gene_list": ["ABC", *"DEFGHIJKL", "ABC"]}, "'ABC' more than once"),
        ({"gene_list": list(range(12))}, "contains 0, which is not the name of a gene"),
        ({"gene_list": [None, *"ABCDEFGHIJK"]}, "contains None"),
        ({"head_type": []}, "not a head"),
    ],
)
def test_config_that_cannot_be_converted(changes, words):
    assert words in refusal(lambda: model_config(published(**changes)))


def test_defaults_of_the_original():
    config = model_config(published())
    assert config.latent.floor == 0.5
    assert config.latent.inference == "released"
    assert config.positions.kind == "none"
    bare = {key: value for key, value in published("vae").items() if key in REQUIRED}
    config = model_config({**bare, "cat_pe": False})
    assert (config.norm, config.dropout, config.encoder.heads) == ("layernorm", 0.1, 8)
    assert (config.latent.kind, config.latent.warmup_steps) == ("gaussian", 10000)
    assert (config.decoder.batches, config.decoder.datasets, config.decoder.platforms) == (0, 0, 0)


# Models trained here


def own_model(**changes):
    """A model made here that the original can express, unless changed."""
    base = ModelConfig(
        genes=len(GENES),
        hidden=16,
        encoder=model_config(published()).encoder,
        latent=LatentConfig(kind="deterministic", size=6),
        decoder=dataclasses.replace(model_config(published()).decoder),
        positions=PositionsConfig(kind="none"),
    )
    return dataclasses.replace(base, **changes)


def test_own_model_is_written(tmp_path):
    config = own_model()
    params = convert_state_dict(state_dict_of(published("ae")), published("ae")).params
    converted = as_published(config, GENES, params)
    state = to_state_dict(converted)
    assert state.keys() == state_dict_of(published("ae")).keys()
    again = convert_state_dict(state, {**converted.published_config, "gene_list": GENES})
    assert again.config.hidden == 16
    assert again.config.encoder == config.encoder
    assert again.config.decoder == config.decoder
    assert again.config.latent.kind == "deterministic"
    for name, array in to_state_dict(again).items():
        np.testing.assert_array_equal(array, state[name])


def part(config, name, **changes):
    return {name: dataclasses.replace(getattr(config, name), **changes)}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("positions", {"kind": "sinusoidal"}, "positional"),
        ("encoder", {"kind": "softmax"}, "softmax"),
        ("encoder", {"feedforward": 4}, "feed-forward"),
        ("latent", {"kind": "none"}, "no latent"),
        ("latent", {"kind": "gaussian_mixture", "inference": "paper"}, "inference"),
        ("decoder", {"kind": "gaussian"}, "decoder"),
        ("decoder", {"bottleneck": 64}, "decoder"),
        ("embedder", {"input_transform": "library_log1p"}, "log1p"),
        ("head", {"kind": "annotation", "outputs": 3}, "head"),
        (None, {"norm_groups": 8}, "GroupNorm"),
    ],
)
def test_own_model_that_the_original_cannot_express(name, changes, words):
    config = own_model()
    changes = changes if name is None else part(config, name, **changes)
    assert words in refusal(lambda: as_published(own_model(**changes), GENES, {}))


def test_parameters_without_a_counterpart():
    params = convert_state_dict(state_dict_of(published("ae")), published("ae")).params
    extra = {**params, "latent": {**params["latent"], "discriminator": {"bias": np.zeros(2)}}}
    text = refusal(lambda: to_state_dict(as_published(own_model(), GENES, extra)))
    assert "latent/discriminator/bias" in text
    short = {key: value for key, value in params.items() if key != "embedder"}
    assert "embedder" in refusal(lambda: to_state_dict(as_published(own_model(), GENES, short)))


# Files


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def files(tmp_path):
    """A published checkpoint on disk."""
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra 'torch')")
    config = published()
    state = {name: torch.from_numpy(array) for name, array in state_dict_of(config).items()}
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "small.best.ckpt")
    (tmp_path / "small.config.json").write_text(json.dumps(config))
    return tmp_path / "small.best.ckpt", tmp_path / "small.config.json"


def read(files):
    return torch_checkpoint.read_published(*files)


@needs_torch
def test_read_published(files):
    converted = read(files)
    for name, array in to_state_dict(converted).items():
        np.testing.assert_array_equal(array, state_dict_of(published())[name])


@needs_torch
def test_read_bare_and_data_parallel_state_dicts(files):
    import torch

    state = {
        f"module.{n}": torch.nn.Parameter(torch.from_numpy(a))
        for n, a in state_dict_of(published()).items()
    }
    torch.save(state, files[0])
    assert set(to_state_dict(read(files))) == set(state_dict_of(published()))


@needs_torch
@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoint(files, length):
    content = files[0].read_bytes()
    keep = length if isinstance(length, int) else int(len(content) * length)
    files[0].write_bytes(content[:keep])
    assert "small.best.ckpt" in refusal(lambda: read(files))


@needs_torch
@pytest.mark.parametrize("content", [b"not a checkpoint\n" * 50, b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_other_files(files, content):
    files[0].write_bytes(content)
    refusal(lambda: read(files))


@needs_torch
def test_a_zip_of_something_else(files):
    with zipfile.ZipFile(files[0], "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(lambda: read(files))


@needs_torch
@pytest.mark.parametrize(
    "content", [[1, 2], {"model_state_dict": {"a": 1}}, {"model_state_dict": 3}, {}]
)
def test_other_content(files, content):
    import torch

    torch.save(content, files[0])
    refusal(lambda: read(files))


@needs_torch
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_does_not(files, tmp_path, legacy):
    import torch

    target = tmp_path / "made by the bomb"
    content = {"model_state_dict": {}, "x": Bomb(target)}
    torch.save(content, files[0], _use_new_zipfile_serialization=not legacy)
    text = refusal(lambda: read(files))
    assert not target.exists()
    assert "never unpickled" in text
    # The bomb is live: a trusting reader sets it off.
    torch.load(files[0], weights_only=False)
    assert target.exists()


@needs_torch
def test_numbers_numpy_does_not_know(files):
    import torch

    state = {name: torch.from_numpy(a) for name, a in state_dict_of(published()).items()}
    state["decoder.out_layer.dec_disp"] = state["decoder.out_layer.dec_disp"].bfloat16()
    torch.save({"model_state_dict": state}, files[0])
    text = refusal(lambda: read(files))
    assert "bfloat16" in text
    assert "dec_disp" in text


@needs_torch
@pytest.mark.parametrize("content", ["{", "[1]", "3", b"\xff\xfe"])
def test_other_configs(files, content):
    files[1].write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "small.config.json" in refusal(lambda: read(files))


@needs_torch
def test_absent_files(files, tmp_path):
    assert "absent" in refusal(lambda: read((tmp_path / "absent", files[1])))
    assert "absent" in refusal(lambda: read((files[0], tmp_path / "absent")))


# Command line


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@needs_torch
def test_convert_both_ways(files, tmp_path, capsys):
    import torch

    model = tmp_path / "model"
    status, out, err = run(capsys, "convert", files[0], "--config", files[1], "--out", model)
    assert (status, err) == (0, "")
    assert "unused: embedder.norm0.weight (16,)" in out
    opened = load(model)
    assert opened.id.startswith("small@0+")
    assert opened.genes == GENES
    np.testing.assert_array_equal(
        opened.params["embedder"]["gene_embedding"],
        state_dict_of(published())["embedder.feat_enc.emb"],
    )
    assert "norm0" in opened.card["unused_parameters"].popitem()[0]
    status, out, err = run(capsys, "convert", model, "--to-torch", tmp_path / "back" / "again")
    assert (status, err) == (0, "")
    back = torch.load(tmp_path / "back" / "again.best.ckpt", weights_only=True)["model_state_dict"]
    before = torch.load(files[0], weights_only=True)["model_state_dict"]
    assert back.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(back[name], tensor), name
    written = json.loads((tmp_path / "back" / "again.config.json").read_text())
    assert written == published()
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "again.best.ckpt",
        "again.config.json",
    ]
    status, _, err = run(capsys, "convert", files[0], "--config", files[1], "--out", model)
    assert status == 2
    assert "not empty" in err
    assert run(capsys, "info", model)[0] == 0


@needs_torch
def test_convert_own_model(tiny_model, tmp_path, capsys):
    tiny_model.save(tmp_path / "model")
    status, out, err = run(capsys, "convert", tmp_path / "model", "--to-torch", tmp_path / "back")
    assert (status, out) == (2, "")
    assert "positional" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    params = convert_state_dict(state_dict_of(published("ae")), published("ae")).params
    Pretrained(own_model(), params, GENES).save(tmp_path / "own")
    status, _, err = run(capsys, "convert", tmp_path / "own", "--to-torch", tmp_path / "back")
    assert (status, err) == (0, "")
    converted = torch_checkpoint.read_published(
        tmp_path / "back.best.ckpt", tmp_path / "back.config.json"
    )
    np.testing.assert_array_equal(
        converted.params["embedder"]["gene_embedding"], params["embedder"]["gene_embedding"]
    )


def test_convert_usage(tmp_path, capsys):
    for arguments in (
        ["convert", tmp_path],
        ["convert", tmp_path, "--out", "a", "--to-torch", "b"],
        ["convert", tmp_path, "--out", tmp_path / "a"],
        ["convert", tmp_path / "absent", "--to-torch", tmp_path / "b"],
        ["convert", tmp_path, "--to-torch", tmp_path / "b"],
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, ""), arguments
        assert err.startswith("cellplm convert: ")
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@needs_torch
def test_convert_refusals_leave_nothing(files, tmp_path, capsys):
    files[0].write_bytes(files[0].read_bytes()[:500])
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(
        capsys, "convert", files[0], "--config", files[1], "--out", tmp_path / "m"
    )
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
