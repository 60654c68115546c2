"""The embedding program for jobs: refused input, and two processes that write one store."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import anndata
import numpy as np
import pytest

from tests.conftest import ROOT, VOCABULARY, make_adata
from tests.launch.common import BASH, needs_bash

SAMPLES = 24


def environment():
    # One device a process.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    changes = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **changes, "PYTHON": sys.executable}


def run(*command):
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment(),
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corpus=absent", "--model=small", "--out=x"], "contains no corpus.json"),
        (["--corpus=c", "--out=x"], "--model"),
        (["--corpus=c", "--model=small", "--out=x", "--num_processes=2"], "only --num_processes=2"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments, said):
    result = run(sys.executable, ROOT / "launch" / "embed.py", *arguments)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert result.stderr.startswith("embed: ")
    assert len(result.stderr.strip().splitlines()) == 1


@needs_bash
@pytest.mark.multiprocess
def test_two_processes_share_chunks_and_lose_nothing(tiny_run, tiny_model, tmp_path):
    """All rows lie in one chunk, which both processes change again and again."""
    from cellplm_jax.tasks.embed_corpus import embed_corpus
    from cellplm_jax.tasks.prepare import prepare

    adata = make_adata(10 * SAMPLES)
    adata.obs["batch"] = [f"b{n % SAMPLES}" for n in range(adata.n_obs)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    corpus = tmp_path / "corpus"
    prepare([tmp_path], corpus, sample_key="batch", genes=VOCABULARY, workers=0, quiet=True)
    embed_corpus(corpus, tiny_model, tmp_path / "one.zarr", quiet=True)
    command = [
        BASH, ROOT / "launch" / "local_multiprocess.sh", 2, "--program=embed", f"--corpus={corpus}",
        f"--model={tiny_run}", f"--out={tmp_path / 'two.zarr'}", f"--logs={tmp_path / 'logs'}",
    ]  # fmt: skip
    result = run(*command)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert f"of {10 * SAMPLES} cells in {SAMPLES} samples" in result.stdout
    half = 5 * SAMPLES
    for number in range(2):
        log = (tmp_path / "logs" / f"process-{number}.log").read_text()
        assert f"embedding ({number + 1} of 2): {half}/{half} cells" in log
    one, two = (anndata.read_zarr(tmp_path / f"{name}.zarr") for name in ("one", "two"))
    assert np.isfinite(two.obsm["X_cellplm"]).all()
    # The parent's eight simulated devices divide threads otherwise than one does.
    np.testing.assert_allclose(two.obsm["X_cellplm"], one.obsm["X_cellplm"], atol=1e-6, rtol=1e-6)
    assert two.obs.equals(one.obs)
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert "complete already" in again.stdout + again.stderr
