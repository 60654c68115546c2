"""The same run as 1, 2 and 4 processes on the loopback device: same batches, same parameters, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cellplm_jax.data.genes import load_human_table
from cellplm_jax.train.checkpoint import restore_item
from tests.conftest import ROOT, VOCABULARY, make_adata
from tests.launch.common import BASH, needs_bash

pytest.importorskip("ml_collections")
pytest.importorskip("grain")
pytestmark = [needs_bash, pytest.mark.multiprocess]

STEPS = 6
FLAGS = [
    "--config=configs/pretrain.py:debug",
    "--batch_key=batch",
    "--config.data.rows=4",
    "--config.data.cells=16",
    "--config.data.heldout_fraction=0.0",
    "--config.log_every=1",
    f"--config.evaluate_every={STEPS}",
    "--config.checkpoint_every=2",
    "--config.keep_checkpoints=99",
]
# Summing gradients over processes in another order changes the last bits; six steps of AdamW make 2e-6 of them.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with two files: 120 cells in four samples, half of them with coordinates."""
    folder = tmp_path_factory.mktemp("multiprocess") / "corpus"
    folder.mkdir()
    ids = sorted(load_human_table().symbols)[: len(VOCABULARY)]
    translate = dict(zip(VOCABULARY, ids, strict=True))
    for number in range(2):
        adata = make_adata(60, seed=number, spatial=number == 0)
        adata.var_names = [translate.get(name, name) for name in adata.var_names]
        adata.write_h5ad(folder / f"cells{number}.h5ad")
    return folder


def command(number: int, corpus: Path, workdir: Path, *flags: str) -> list[str]:
    assert BASH is not None
    script = str(ROOT / "launch" / "local_multiprocess.sh")
    logs = workdir.parent / f"{workdir.name}-logs-{number}"
    return [
        BASH, script, str(number), *FLAGS, f"--corpus={corpus}", f"--workdir={workdir}",
        f"--logs={logs}", "--heartbeat_timeout=20", *flags,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    # One device a process.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def train(number: int, corpus: Path, workdir: Path, *flags: str) -> None:
    """Run to the end."""
    result = subprocess.run(
        command(number, corpus, workdir, *(flags or [f"--config.steps={STEPS}"])),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def logged(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == "train"]


def checksums(workdir: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["batch_checksum"]) for entry in logged(workdir)]


def parameters(workdir: Path, step: int) -> dict[str, np.ndarray]:
    from flax.traverse_util import flatten_dict

    return flatten_dict(restore_item(workdir, step=step)[0], sep="/")


def largest_difference(one: Path, other: Path, step: int) -> float:
    """The largest relative difference of a parameter array, in units of its largest value."""
    first, second = parameters(one, step), parameters(other, step)
    assert first.keys() == second.keys()
    return max(
        float(np.abs(first[name] - second[name]).max() / max(np.abs(first[name]).max(), 1e-6))
        for name in first
    )


def step_directories(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


def back_to(workdir: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when it was killed after saving a step."""
    shutil.copytree(workdir, copy)
    for later in step_directories(copy):
        if later > step:
            shutil.rmtree(copy / str(later))
    return copy


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for number in (1, 2, 4):
        train(number, corpus, folder / str(number))
    return {number: folder / str(number) for number in (1, 2, 4)}


def test_any_number_of_processes_trains_on_the_same_batches_to_the_same_parameters(
    runs, record_property
):
    assert [step for step, _ in checksums(runs[1])] == list(range(1, STEPS + 1))
    assert len({checksum for _, checksum in checksums(runs[1])}) > 1
    for number in (2, 4):
        assert checksums(runs[number]) == checksums(runs[1])
        for ours, single in zip(logged(runs[number]), logged(runs[1]), strict=True):
            assert ours["loss"] == pytest.approx(single["loss"], rel=TOLERANCE)
        difference = largest_difference(runs[1], runs[number], STEPS)
        record_property(f"largest relative difference with {number} processes", difference)
        assert difference < TOLERANCE


def test_a_run_moves_from_one_process_to_two_to_four(runs, corpus, tmp_path):
    two = back_to(runs[1], 2, tmp_path / "two")
    train(2, corpus, two)
    assert checksums(two) == checksums(runs[1])
    four = back_to(two, 4, tmp_path / "four")
    train(4, corpus, four)
    assert checksums(four) == checksums(runs[1])
    assert largest_difference(runs[1], four, STEPS) < TOLERANCE


def test_sigterm_to_one_of_two_processes_loses_nothing(corpus, tmp_path):
    """Both save after the same step, and the resumed run ends where an uninterrupted one does, to the bit."""
    steps = 240
    flags = [
        f"--config.steps={steps}",
        "--config.checkpoint_every=1000",
        "--config.evaluate_every=1000",
    ]
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(2, corpus, workdir, *flags),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    pids = re.search(r"pids (\d+) (\d+)", process.stderr.readline())
    assert pids is not None
    end = time.monotonic() + 300
    while not ((workdir / "metrics.jsonl").exists() and len(logged(workdir)) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(int(pids[2]), signal.SIGTERM)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 143, errors
    (stopped,) = step_directories(workdir)
    assert 2 <= stopped < steps
    assert logged(workdir)[-1]["step"] == stopped
    train(2, corpus, workdir, *flags)
    whole = tmp_path / "whole"
    train(2, corpus, whole, *flags)
    assert checksums(workdir) == checksums(whole)
    assert largest_difference(whole, workdir, steps) == 0.0
