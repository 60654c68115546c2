"""A platform without a device is one clear message everywhere; what the doctor says on a machine with GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from cellplm_jax import cli, doctor, platforms
from cellplm_jax.cli import command
from cellplm_jax.errors import InputError
from tests.conftest import ROOT

VERBS = {
    "demo": [],
    "prepare": ["in.h5ad", "--out", "corpus"],
    "embed": ["in.h5ad", "--model", "small", "--out", "out.h5ad"],
    "cluster": ["in.h5ad", "--model", "small", "--out", "out.h5ad"],
    "niches": ["in.h5ad", "--model", "small", "--out", "out.h5ad"],
    "integrate": ["fit", "in.h5ad", "--model", "small", "--out", "o", "--batch-key", "b"],
    "annotate": ["fit", "in.h5ad", "--model", "small", "--out", "o", "--label-key", "k"],
    "impute": ["fit", "in.h5ad", "--model", "small", "--out", "o"],
    "denoise": ["predict", "in.h5ad", "--model", "o", "--out", "out.h5ad"],
    "perturb": ["predict", "--model", "o", "--out", "o.csv", "--perturbations", "a"],
    "samples": ["predict", "in.h5ad", "--model", "o", "--out", "o.csv"],
    "convert": ["p.best.ckpt", "--config", "c.json", "--out", "o"],
    "export": ["small", "--out", "o"],
    "info": ["small"],
    "bench": ["embed"],
}


def without_cuda(*words, env=()):
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT), **dict(env)}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, cwd=ROOT
    )


def has_gpu():
    return platforms.has_nvidia() or platforms.has_cuda_plugin()


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU, or JAX has CUDA")
@pytest.mark.parametrize("verb", ["info", "doctor", "load"])
def test_a_machine_without_cuda_says_so_in_one_message(verb):
    if verb == "load":
        done = without_cuda(
            "-c", "import cellplm_jax as c\ntry: c.load('small')\nexcept ValueError as e: print(e)"
        )
        assert done.returncode == 0, done.stderr
        text = done.stdout
    else:
        done = without_cuda("-m", "cellplm_jax.cli", verb, *VERBS.get(verb, []))
        text = done.stdout + done.stderr
        assert done.returncode == {"info": 2, "doctor": 1}[verb]
    assert "JAX_PLATFORMS=cuda and no such device (this machine has no NVIDIA GPU" in text
    assert "JAX_PLATFORMS=cpu" in text
    assert "Traceback" not in text
    assert "Usable." not in text
    if verb == "info":
        assert len(text.strip().splitlines()) == 1


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU, or JAX has CUDA")
@pytest.mark.parametrize("program", ["pretrain", "finetune", "embed"])
def test_the_programs_of_launch_say_so_too(program, tmp_path):
    options = {
        "pretrain": [
            "--config=configs/pretrain.py:debug",
            "--corpus=cellplm_jax/resources/pbmc3k.h5ad",
            f"--workdir={tmp_path / 'run'}",
        ],
        "finetune": [
            "--config=configs/finetune_annotate.py",
            "--data=cellplm_jax/resources/pbmc3k.h5ad",
            f"--workdir={tmp_path / 'run'}",
        ],
        "embed": [f"--corpus={tmp_path}", "--model=small", f"--out={tmp_path / 'o.zarr'}"],
    }
    done = without_cuda(f"launch/{program}.py", *options[program])
    assert done.returncode == 2
    assert done.stderr.count("JAX_PLATFORMS=cuda and no such device") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_checks_before_it_works(verb, monkeypatch, capsys):
    def refuse():
        raise InputError("no such device")

    monkeypatch.setattr(platforms, "check_platforms", refuse)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    words = [verb, *VERBS[verb]]
    monkeypatch.setattr(command, "build_parser", lambda: parsing(verb))
    assert cli.main(words) == 2
    assert capsys.readouterr().err.strip() == f"cellplm {verb}: no such device"


def parsing(verb):
    """A parser that takes any words of a verb, whose work may not begin."""

    def run(arguments):
        pytest.fail(f"{verb} began")

    return SimpleNamespace(parse_args=lambda words: SimpleNamespace(command=verb, run=run))


def test_the_verbs_of_the_test_are_those_of_the_command():
    (verbs,) = (
        action.choices for action in cli.build_parser()._actions if action.choices is not None
    )
    assert set(VERBS) | set(command.WITHOUT_DEVICES) == set(verbs)


def test_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(platforms, "has_nvidia", lambda: True)
    monkeypatch.setattr(platforms, "has_cuda_plugin", lambda: False)
    text = platforms.no_device("cuda", AssertionError())
    assert "JAX is installed without CUDA" in text
    assert "pip install 'cellplm-jax[cuda13]'" in text
    # A driver that is broken says so itself.
    monkeypatch.setattr(platforms, "has_cuda_plugin", lambda: True)
    text = platforms.no_device("cuda", RuntimeError("CUDA_ERROR_SYSTEM_NOT_READY"))
    assert "CUDA_ERROR_SYSTEM_NOT_READY" in text
    assert "no such device (AssertionError)" in platforms.no_device("rocm", AssertionError())


class Gpu:
    """What of a GPU the doctor looks at."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13020")

    def __init__(self, number):
        self.id = number

    def memory_stats(self):
        return {"bytes_limit": 110_000_000_000, "bytes_in_use": 10_000_000_000}


def test_the_doctor_on_a_host_of_gpus(monkeypatch):
    gpus = [Gpu(0), Gpu(1)]
    monkeypatch.setattr(jax, "devices", lambda *_: gpus)
    monkeypatch.setattr(jax, "local_devices", lambda *_: gpus)
    monkeypatch.setattr(platforms, "driver_version", lambda: "580.159.04")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    [devices] = [s for s in doctor.diagnose()["sections"] if s["title"] == "Devices"]
    found = {entry["name"]: entry["text"] for entry in devices["entries"]}
    assert found["JAX"] == "2 x NVIDIA H200 (gpu)"
    assert (
        found["GPU 1"] == "NVIDIA H200, compute capability 9.0, 100.0 of 110.0 GB for arrays free"
    )
    assert "TF32" in found["precision"]
    assert found["allocator"].startswith("takes 0.9 of the memory")
    assert "JAX_OPTIMIZATION_LEVEL=O1" in found["compiler"]
    assert found["driver"] == "580.159.04, cuda 13.2"
    with jax.default_matmul_precision("highest"):
        assert platforms.product_precision().startswith("float32")
    json.dumps(devices)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", "grows as needed"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform", "slow"),
    ],
)
def test_the_allocator_that_is_in_force(monkeypatch, variable, value, says):
    assert "0.75" in platforms.allocator()
    monkeypatch.setenv(variable, value)
    assert says in platforms.allocator()
