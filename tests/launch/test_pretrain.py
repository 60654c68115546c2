"""The pretraining program, started as users start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from cellplm_jax.data.genes import load_human_table
from cellplm_jax.tasks.pretrained import load
from tests.conftest import ROOT, VOCABULARY, make_adata

pytest.importorskip("ml_collections")


def launch(*arguments):
    # One device; the test session simulates eight.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with one file whose genes are human ones; read only."""
    ids = sorted(load_human_table().symbols)[: len(VOCABULARY)]
    adata = make_adata(30)
    translate = dict(zip(VOCABULARY, ids, strict=True))
    adata.var_names = [translate.get(name, name) for name in adata.var_names]
    folder = tmp_path_factory.mktemp("launch") / "corpus"
    folder.mkdir()
    adata.write_h5ad(folder / "cells.h5ad")
    return folder


# The runs below differ in where their cells come from and in nothing that is compiled: the second finds the programs
# of the first in the cache of the test session.
RUN = [
    "--config=configs/pretrain.py:debug",
    "--config.steps=2",
    "--config.data.cells=8",
    "--config.data.rows=1",
    "--config.model.positions.kind=grid",
    "--config.masking.beta=False",
    "--config.optimizer.learning_rate=1e-4",
]


def test_debug_variant_trains_and_opens(corpus, tmp_path):
    workdir = tmp_path / "run"
    result = launch(*RUN, f"--corpus={corpus}", f"--workdir={workdir}", "--batch_key=batch")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 steps, ")
    assert f"cellplm_jax.load({str(workdir)!r})" in result.stdout
    assert "Traceback" not in result.stderr
    model = load(workdir)
    assert model.step == 2
    assert model.config.positions.kind == "grid"
    assert model.config.decoder.batches == 2
    assert set(model.genes) <= set(load_human_table().symbols)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The command of a finished run on a prepared corpus, and its work directory; read only."""
    from cellplm_jax.tasks.prepare import prepare

    folder = tmp_path_factory.mktemp("finished")
    prepare([corpus], folder / "prepared", sample_key="batch", quiet=True)
    command = [*RUN, f"--corpus={folder / 'prepared'}", f"--workdir={folder / 'run'}"]
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    return command, folder / "run"


def test_a_prepared_corpus_is_read_from_disk(finished):
    command, workdir = finished
    assert load(workdir).step == 2
    # The same command on a finished run is done at once.
    again = launch(*command)
    assert again.returncode == 0, again.stderr


def test_another_configuration_in_the_same_directory(finished):
    command, workdir = finished
    result = launch(*command, "--config.model.hidden=64")
    assert result.returncode == 2
    assert "model.hidden" in result.stderr
    assert "Traceback" not in result.stderr
    assert load(workdir).config.hidden == 32


COMMON = ["--config=configs/pretrain.py:debug", "--workdir=run"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [*COMMON, "--corpus=C", "--config.optimizer.learning_rat=1e-4"],
            "Did you mean '--config.optimizer.learning_rate'?",
        ),
        (
            [*COMMON, "--corpus=C", "--config.learning_rate=1e-4"],
            "Did you mean '--config.optimizer.learning_rate'?",
        ),
        (
            [*COMMON, "--corpus=C", "--config.optimiser.clip_norm=1"],
            "Did you mean '--config.optimizer.clip_norm'?",
        ),
        ([*COMMON, "--corpus=C", "--config.model.encoder.kind=flwo"], "Did you mean 'flow'?"),
        ([*COMMON, "--corpus=C", "--config.steps=many"], "--config.steps=many"),
        ([*COMMON, "--corpus=C", "--config.steps=0"], "steps = 0"),
        ([*COMMON, "--corpus=C", "--workdri=x"], "Did you mean: workdir"),
        ([*COMMON, "--corpus=C", "value"], "unexpected argument 'value'"),
        ([*COMMON, "--corpus=absent"], "--corpus names 'absent'"),
        ([*COMMON, "--corpus=C,gs://bucket/corpus"], "the prepared corpus 'gs://bucket/corpus'"),
        ([*COMMON], "corpus"),
        (["--config=configs/pretrain.py:debgu", "--workdir=r", "--corpus=C"], "mean 'debug'"),
        (["--config=configs/pretrian.py", "--workdir=r", "--corpus=C"], "configs/pretrian.py"),
        ([*COMMON, "--corpus=C", "--genes=absent.txt"], "--genes=absent.txt cannot be read"),
        ([*COMMON, "--corpus=C", "--num_processes=2"], "only --num_processes=2 was given"),
    ],
)
def test_bad_input_is_one_message_and_status_2(corpus, arguments, said):
    result = launch(*[argument.replace("=C", f"={corpus}", 1) for argument in arguments])
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert result.stderr.startswith("pretrain: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (ROOT / "run").exists()
