"""What holds for every script: clean under shellcheck, helpful when misused, silent about the world in a dry run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.common import LAUNCH, STAND_INS, needs_bash

SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), LAUNCH / "slurm.sbatch"]
STAND_IN_SCRIPTS = sorted(STAND_INS.iterdir())
FLAGS = ["--config=configs/pretrain.py:85m", "--corpus=gs://b/corpus", "--workdir=gs://b/runs/1"]
POD = ["--project=p", "--zone=z", "--name=run-1", "--accelerator=v5litepod-16"]
GKE = ["--name=run-1", "--image=i", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]


def shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed (extra 'dev')")
    return found


@pytest.mark.parametrize("script", [*SCRIPTS, *STAND_IN_SCRIPTS], ids=lambda path: path.name)
def test_shellcheck_is_clean(script):
    result = subprocess.run(
        [shellcheck(), "--shell=bash", "--external-sources", str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_without_arguments_says_what_it_expects(scene, script):
    result = scene.run(script.relative_to(LAUNCH).as_posix())
    assert result.returncode == 2
    assert "expected" in result.stderr


@needs_bash
@pytest.mark.parametrize(
    ("script", "arguments", "shown"),
    [
        ("tpu_pod.sh", ["up", *POD, "--spot", "--dry-run", "--", *FLAGS], "--spot"),
        ("tpu_pod.sh", ["create", *POD, "--dry-run"], "queued-resources create run-1"),
        ("tpu_pod.sh", ["watch", *POD, "--dry-run", "--", *FLAGS], "queued-resources describe"),
        ("tpu_pod.sh", ["setup", *POD, "--dry-run"], "tpu_worker.sh"),
        ("tpu_pod.sh", ["run", *POD, "--dry-run", "--", *FLAGS], "gs://b/corpus"),
        (
            "tpu_pod.sh",
            ["run", *POD, "--program=embed", "--dry-run", "--", FLAGS[1], "--out=gs://b/e.zarr"],
            r"start\ --program=embed\ --corpus=gs://b/corpus\ --out=gs://b/e.zarr",
        ),
        ("tpu_pod.sh", ["status", *POD, "--dry-run"], "--worker=all"),
        ("tpu_pod.sh", ["logs", *POD, "--dry-run"], "--output-directory="),
        ("tpu_pod.sh", ["stop", *POD, "--dry-run"], "tpu_worker.sh"),
        ("tpu_pod.sh", ["delete", *POD, "--dry-run"], "queued-resources delete run-1"),
        ("slurm.sbatch", ["--dry-run", *FLAGS], "srun --kill-on-bad-exit=1"),
        ("local_multiprocess.sh", [3, "--dry-run", *FLAGS], "--process_id=2"),
        ("gke/jobset.sh", ["apply", *GKE, "--dry-run", "--", *FLAGS], "kubectl apply"),
        ("gke/jobset.sh", ["watch", *GKE, "--dry-run"], "kubectl get"),
        ("gke/jobset.sh", ["logs", *GKE, "--dry-run"], "kubectl logs"),
        ("gke/jobset.sh", ["delete", *GKE, "--dry-run"], "kubectl delete"),
    ],
)
def test_a_dry_run_shows_commands_and_runs_none(scene, script, arguments, shown):
    before = sorted(ROOT.glob("runs/tpu/*"))
    result = scene.run(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout
    assert sorted(scene.folder.iterdir()) == []
    assert sorted(ROOT.glob("runs/tpu/*")) == before
