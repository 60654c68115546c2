"""The batch script, with stand-ins for srun, scancel and scontrol."""

from __future__ import annotations

import signal
import time

import pytest

from tests.launch.common import needs_bash

pytestmark = needs_bash
FLAGS = ["--config=configs/pretrain.py:85m", "--corpus=corpus", "--workdir=run with space"]
JOB = {"SLURM_JOB_ID": "77"}
GENTLE = "trap 'exit 143' TERM; while :; do sleep 0.1; done"


def signalled(scene, number, **environment):
    """Start the job, send its shell a signal when srun is up, and return status and output."""
    process = scene.start("slurm.sbatch", *FLAGS, **JOB, **environment)
    end = time.monotonic() + 30
    while not (scene.folder / "srun.pid").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.3)  # the task sets its trap
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_before_the_time_limit_it_saves_and_goes_back_into_the_queue(scene):
    scene.answers("task", GENTLE)
    status, output = signalled(scene, signal.SIGUSR1)
    assert status == 0, output
    assert scene.calls("scancel") == [["--signal=TERM", "77"]]
    assert scene.calls("scontrol") == [["requeue", "77"]]


def test_a_cancelled_or_preempted_job_saves_and_leaves_the_rest_to_slurm(scene):
    scene.answers("task", GENTLE)
    status, output = signalled(scene, signal.SIGTERM)
    assert status == 143, output
    assert scene.calls("scancel") == [["--signal=TERM", "77"]]
    assert scene.calls("scontrol") == []


def test_it_does_not_go_back_forever(scene):
    scene.answers("task", GENTLE)
    status, output = signalled(scene, signal.SIGUSR1, SLURM_RESTART_COUNT="3", MAXIMUM_REQUEUES="3")
    assert status == 143
    assert "not put back" in output
    assert scene.calls("scontrol") == []


def test_a_run_that_completes_while_it_is_told_to_stop_is_done(scene):
    scene.answers("task", "trap 'exit 0' TERM; while :; do sleep 0.1; done")
    status, _ = signalled(scene, signal.SIGUSR1)
    assert status == 0
    assert scene.calls("scontrol") == []


@pytest.mark.parametrize("code", [0, 1, 2, 134])
def test_other_statuses_are_passed_on(scene, code):
    scene.answers("task", f"exit {code}")
    result = scene.run("slurm.sbatch", *FLAGS, **JOB)
    assert result.returncode == code
    assert scene.calls("scontrol") == []
    (call,) = scene.calls("srun")
    assert call[-3:] == FLAGS
    assert call[-4].endswith("launch/pretrain.py")


def test_another_program_is_run(scene):
    scene.answers("task", "exit 0")
    assert scene.run("slurm.sbatch", *FLAGS, **JOB, PROGRAM="embed").returncode == 0
    (call,) = scene.calls("srun")
    assert call[-4].endswith("launch/embed.py")
    assert scene.run("slurm.sbatch", *FLAGS, **JOB, PROGRAM="absent").returncode == 2


def test_processes_stopped_by_something_else_go_back_too(scene):
    scene.answers("task", "exit 143")
    assert scene.run("slurm.sbatch", *FLAGS, **JOB).returncode == 0
    assert scene.calls("scontrol") == [["requeue", "77"]]


def test_one_task_a_node_gets_all_its_gpus(scene):
    scene.answers("task", "exit 0")
    scene.run("slurm.sbatch", *FLAGS, **JOB, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="1")
    scene.run("slurm.sbatch", *FLAGS, **JOB, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4")
    node, gpu = scene.calls("srun")
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3" in node
    assert not any("JAX_LOCAL_DEVICE_IDS" in argument for argument in gpu)
    result = scene.run(
        "slurm.sbatch", *FLAGS, **JOB, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="2"
    )
    assert result.returncode == 2
    assert "2 tasks and 4 GPUs" in result.stderr


def test_outside_of_a_job_or_of_the_repository_it_refuses(scene, tmp_path):
    assert "not inside a job" in scene.run("slurm.sbatch", *FLAGS).stderr
    result = scene.run("slurm.sbatch", *FLAGS, **JOB, SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert "CELLPLM_ROOT" in result.stderr
    assert scene.calls("srun") == []
