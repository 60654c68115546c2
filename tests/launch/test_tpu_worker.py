"""What runs on every worker, with stand-ins for uv and Python."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from tests.launch.common import STAND_INS, needs_bash

pytestmark = needs_bash


@pytest.fixture
def worker(scene, tmp_path):
    """``worker(verb, ...)`` runs the script with a home of its own; set up already."""
    home = tmp_path / "home"
    (home / ".local" / "bin").mkdir(parents=True)
    uv = home / ".local" / "bin" / "uv"
    uv.write_text(f'#!/usr/bin/env bash\nexec "{STAND_INS / "uv"}" "$@"\n')
    uv.chmod(0o755)

    def run(*arguments):
        result = scene.run("tpu_worker.sh", *arguments, CELLPLM_HOME=str(home))
        assert result.returncode == 0, result.stdout + result.stderr
        return " ".join(result.stdout.split()[2:])

    run.home = home
    return run


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_life_of_a_worker(scene, worker):
    scene.answers("process", "trap 'exit 143' TERM; while :; do sleep 0.1; done")
    assert worker("status") == "absent"
    assert worker("setup", "3.12", "tpu,train").startswith("ready: Python 3.")
    venv, install = scene.calls("uv")
    assert venv[:3] == ["venv", "--quiet", "--allow-existing"]
    assert "3.12" in venv
    assert install[-1].endswith("[tpu,train]")
    assert worker("status") == "idle"
    assert worker("start", "--config=c", "--workdir=w") == "running"
    assert worker("status") == "running"
    assert worker("start", "--config=c", "--workdir=w") == "running"
    worker("stop")
    wait_for(lambda: worker("status") != "running")
    wait_for(lambda: worker("status") == "finished 143")
    assert scene.calls("python") == [["launch/pretrain.py", "--config=c", "--workdir=w"]]
    log = (worker.home / "cellplm-run" / "log").read_text()
    assert "started: --config=c --workdir=w" in log
    assert "ended: status 143" in log
    # Started again, it runs again.
    scene.answers("process", "exit 0")
    worker("start", "--config=c", "--workdir=gs://b/run")
    wait_for(lambda: worker("status") == "finished 0")
    wait_for(lambda: scene.calls("gcloud"))
    copy = scene.calls("gcloud")[0]
    assert copy[:2] == ["storage", "cp"]
    assert copy[-1].startswith("gs://b/run/logs/")


@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_a_worker_runs_another_program(scene, worker):
    scene.answers("process", "exit 0")
    worker("setup", "3.12", "tpu")
    worker("start", "--program=embed", "--corpus=c", "--out=o")
    wait_for(lambda: worker("status") == "finished 0")
    assert scene.calls("python") == [["launch/embed.py", "--corpus=c", "--out=o"]]


def test_a_worker_whose_shell_was_ended_too_is_not_running(scene, worker):
    worker("setup", "3.12", "tpu")
    (worker.home / "cellplm-run").mkdir()
    process = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(process, 0)
    (worker.home / "cellplm-run" / "pid").write_text(f"{process}\n")
    assert worker("status") == "finished 137"


def test_a_process_that_hangs_is_ended(scene, worker):
    worker("setup", "3.12", "tpu")
    scene.answers("process", "trap '' TERM; exec sleep 300")
    worker("start", "--workdir=w")
    assert worker("kill") == "ended"
    wait_for(lambda: worker("status") == "finished 137")
    # Whoever has its number by now is left alone.
    assert worker("kill") == "ended"


def test_it_notes_the_status(scene, worker):
    worker("setup", "3.12", "tpu")
    scene.answers("process", "exit 2")
    worker("start", "--workdir=w")
    wait_for(lambda: worker("status") == "finished 2")
