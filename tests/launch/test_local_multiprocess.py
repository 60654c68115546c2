"""Several processes on one machine, with a stand-in for Python: who is started and ended, whose status is passed on."""

from __future__ import annotations

import signal
import time

import pytest

from tests.launch.common import STAND_INS, needs_bash

pytestmark = needs_bash
SCRIPT = "local_multiprocess.sh"
PYTHON = {"PYTHON": str(STAND_INS / "python")}
FLAGS = ["--config=configs/pretrain.py:debug", "--corpus=c", "--workdir=a run"]


def value(call, name):
    return next(a.split("=", 1)[1] for a in call if a.startswith(f"--{name}="))


def test_every_process_is_told_who_it_is(scene, tmp_path):
    scene.answers("process", 'echo "process $1, $XLA_FLAGS"')
    logs = tmp_path / "logs"
    result = scene.run(SCRIPT, 3, *FLAGS, f"--logs={logs}", "--devices=2", **PYTHON)
    assert result.returncode == 0, result.stderr
    calls = scene.calls("python")
    assert sorted(value(call, "process_id") for call in calls) == ["0", "1", "2"]
    assert {value(call, "num_processes") for call in calls} == {"3"}
    (address,) = {value(call, "coordinator_address") for call in calls}
    assert address.startswith("127.0.0.1:")
    assert all(call[1:4] == FLAGS for call in calls)
    for number in range(3):
        log = (logs / f"process-{number}.log").read_text()
        assert log.startswith(f"process {number}, ")
        assert "--xla_force_host_platform_device_count=2" in log
    assert "process 0" in result.stdout
    assert "process 1" not in result.stdout


@pytest.mark.parametrize(("guilty", "code"), [(0, 2), (1, 1), (1, 137)])
def test_when_one_fails_the_others_are_ended_and_its_status_is_passed_on(scene, guilty, code):
    scene.answers(
        "process", f'if [ "$1" = {guilty} ]; then exit {code}; fi; trap "" TERM; exec sleep 300'
    )
    began = time.monotonic()
    result = scene.run(SCRIPT, 2, *FLAGS, GRACE="1", **PYTHON)
    assert result.returncode == code
    assert time.monotonic() - began < 30
    assert "ending" in result.stderr


def test_the_abort_of_a_peer_is_a_consequence(scene):
    scene.answers("process", 'if [ "$1" = 0 ]; then exit 134; fi; exit 2')
    assert scene.run(SCRIPT, 2, *FLAGS, **PYTHON).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_forwarded(scene, number):
    scene.answers(
        "process", 'trap "exit 143" TERM; touch "$STAND_IN/up-$1"; while :; do sleep 0.1; done'
    )
    process = scene.start(SCRIPT, 2, *FLAGS, **PYTHON)
    end = time.monotonic() + 30
    while len(list(scene.folder.glob("up-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output


def test_a_second_signal_kills(scene):
    scene.answers("process", 'trap "" TERM; touch "$STAND_IN/up-$1"; while :; do sleep 0.1; done')
    process = scene.start(SCRIPT, 2, *FLAGS, **PYTHON)
    end = time.monotonic() + 30
    while len(list(scene.folder.glob("up-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 137


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["two", *FLAGS], "number of processes"),
        ([0, *FLAGS], "number of processes"),
        ([2], "no flags"),
        ([2, *FLAGS, "--program=absent"], "no launch/absent.py"),
        ([2, *FLAGS, "--process_id=1"], "is set by this script"),
        ([2, *FLAGS, "--devices=x"], "expected a number"),
    ],
)
def test_bad_usage(scene, arguments, said):
    result = scene.run(SCRIPT, *arguments, **PYTHON)
    assert result.returncode == 2
    assert said in result.stderr
    assert scene.calls("python") == []


def test_gpus_are_dealt_out(scene):
    result = scene.run(SCRIPT, 2, *FLAGS, "--dry-run", **PYTHON, JAX_PLATFORMS="cuda")
    lines = result.stdout.splitlines()
    assert "JAX_LOCAL_DEVICE_IDS=0" in lines[0]
    assert "JAX_LOCAL_DEVICE_IDS=1" in lines[1]


def test_another_program_is_started(scene):
    result = scene.run(SCRIPT, 2, "--program=embed", *FLAGS, "--dry-run", **PYTHON)
    assert result.returncode == 0, result.stderr
    assert all("/launch/embed.py " in line for line in result.stdout.splitlines())
    assert "--program" not in result.stdout
