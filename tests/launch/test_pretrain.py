"""The pretraining program, started as users start it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cellplm_jax.data.genes import load_human_table
from cellplm_jax.tasks.pretrained import load
from tests.conftest import ROOT, VOCABULARY, make_adata

pytest.importorskip("ml_collections")


def launch(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture
def corpus(tmp_path):
    """A folder with one file whose genes are human ones."""
    ids = sorted(load_human_table().symbols)[: len(VOCABULARY)]
    adata = make_adata(30)
    translate = dict(zip(VOCABULARY, ids, strict=True))
    adata.var_names = [translate.get(name, name) for name in adata.var_names]
    (tmp_path / "corpus").mkdir()
    adata.write_h5ad(tmp_path / "corpus" / "cells.h5ad")
    return tmp_path / "corpus"


def test_debug_variant_trains_and_opens(corpus, tmp_path):
    workdir = tmp_path / "run"
    result = launch(
        "--config=configs/pretrain.py:debug",
        f"--corpus={corpus}",
        f"--workdir={workdir}",
        "--batch_key=batch",
        "--config.steps=2",
        "--config.data.cells=8",
        "--config.data.samples=1",
        "--config.model.positions.kind=none",
        "--config.masking.beta=False",
        "--config.optimizer.learning_rate=1e-4",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 steps, ")
    assert f"cellplm_jax.load({str(workdir)!r})" in result.stdout
    assert "Traceback" not in result.stderr
    model = load(workdir)
    assert model.step == 2
    assert model.config.positions.kind == "none"
    assert model.config.decoder.batches == 2
    assert set(model.genes) <= set(load_human_table().symbols)


def test_misspelt_key_value_and_corpus(corpus, tmp_path):
    common = ["--config=configs/pretrain.py:debug", f"--workdir={tmp_path / 'run'}"]
    here = f"--corpus={corpus}"
    result = launch(*common, here, "--config.optimizer.learning_rat=1e-4")
    assert result.returncode != 0
    assert "learning_rat" in result.stderr
    result = launch(*common, here, "--config.model.encoder.kind=flwo")
    assert result.returncode == 2
    assert "'flow'" in result.stderr
    assert "Traceback" not in result.stderr
    result = launch(*common, f"--corpus={tmp_path / 'absent'}")
    assert result.returncode == 2
    assert "absent" in result.stderr
    assert "Traceback" not in result.stderr
    result = launch("--config=configs/pretrain.py:debgu", f"--workdir={tmp_path}", here)
    assert result.returncode != 0
    assert "Did you mean 'debug'" in result.stderr
    assert not (tmp_path / "run").exists()
