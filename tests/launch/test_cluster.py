"""Real processes that find one another on the loopback device, stop together, and pass their statuses on."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cellplm_jax.errors import InputError
from launch import cluster
from tests.conftest import ROOT

# Joins, adds up process numbers over all devices, then "trains" until told to stop or, without steps, leaves.
PROGRAM = """
import sys, time
from cellplm_jax.errors import CellPLMError
from launch import cluster
address, number, process, steps = (None if a == "-" else a for a in sys.argv[1:5])
try:
    joined = cluster.join(
        address, number and int(number), process and int(process), heartbeat_timeout=10
    )
except CellPLMError as error:
    sys.stderr.write(str(error))
    sys.exit(2)
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jnp.asarray(jax.process_index() + 1)).sum()
stop = cluster.StopRequest(jax.process_count())
print(f"joined {joined} process {jax.process_index()} of {jax.process_count()} total {total}", flush=True)
if not steps:
    cluster.leave(0, joined=joined)
for step in range(1, 1000):
    time.sleep(0.05)
    if steps == f"fail{jax.process_index()}" and step == 10:
        cluster.leave(2, joined=joined)
    if stop(step):
        print(f"stopped after {step}", flush=True)
        cluster.leave(143, joined=joined)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """One CPU device a process, and none of a cluster this test may itself run in."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(
            ("SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "XLA_FLAGS")
        )
    }
    return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


def start(*arguments: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(**more),
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def two(steps: str = "") -> list[subprocess.Popen]:
    address = f"127.0.0.1:{free_port()}"
    return [start(address, "2", str(k), steps) for k in range(2)]


def wait_until_joined(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        while not process.stdout.readline().startswith("joined"):
            assert process.poll() is None, process.stderr.read()


def check_joined(results: list[tuple[int, str, str]]) -> None:
    for k, (status, output, errors) in enumerate(results):
        assert status == 0, errors
        assert f"joined True process {k} of 2 total 3" in output


def test_processes_find_one_another_from_flags():
    check_joined([end(process) for process in two()])


def test_processes_find_one_another_under_slurm():
    """Nothing but what srun puts into the environment."""
    common = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    processes = [
        start("-", "-", "-", "", **common, SLURM_PROCID=str(k), SLURM_LOCALID=str(k))
        for k in range(2)
    ]
    check_joined([end(process) for process in processes])


def test_processes_find_one_another_under_open_mpi():
    """Nothing but what mpirun of Open MPI 4 puts into the environment."""
    common = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    processes = [
        start(
            "-", "-", "-", "", **common,
            OMPI_COMM_WORLD_RANK=str(k), OMPI_COMM_WORLD_LOCAL_RANK=str(k),
        )
        for k in range(2)
    ]  # fmt: skip
    check_joined([end(process) for process in processes])


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'tpu')"
)
def test_processes_find_one_another_on_tpu_nodes_of_gke():
    """jax is told that this is a TPU machine; the rest is what GKE puts into the environment."""
    common = {
        "JAX_FORCE_TPU_INIT": "1",
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    processes = [start("-", "-", "-", "", **common, TPU_WORKER_ID=str(k)) for k in range(2)]
    check_joined([end(process) for process in processes])


def test_a_plain_machine_is_one_process():
    status, output, errors = end(start("-", "-", "-", ""))
    assert status == 0, errors
    assert "joined False process 0 of 1 total 1" in output


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["-", "2", "-"], {}, "only --num_processes=2 was given"),
        (["127.0.0.1:1", "-", "-"], {}, "only --coordinator_address=127.0.0.1:1 was given"),
        (["127.0.0.1:1", "2", "2"], {}, "--process_id=2"),
        (["-", "-", "-"], {"OMPI_COMM_WORLD_SIZE": "4"}, "says that there are 4 processes"),
        (["-", "-", "-"], {"SLURM_STEP_NUM_TASKS": "8"}, "says that there are 8 processes"),
    ],
)
def test_processes_that_do_not_know_of_one_another_are_refused(arguments, variables, said):
    status, _, errors = end(start(*arguments, "", **variables))
    assert status == 2
    assert said in errors
    assert "--coordinator_address=HOST:PORT" in errors or "Correct them" in errors


@pytest.mark.parametrize(
    ("told", "number"),
    [
        ([0], signal.SIGTERM),
        ([1], signal.SIGTERM),
        ([0, 1, 1], signal.SIGTERM),
        ([0], signal.SIGINT),
        ([1], signal.SIGUSR1),
    ],
)
def test_told_one_all_stop_after_the_same_step(told, number):
    processes = two("many")
    wait_until_joined(processes)
    for k in told:
        processes[k].send_signal(number)
    results = [end(process) for process in processes]
    assert [status for status, _, _ in results] == [143, 143], results
    steps = [output for _, output, _ in results]
    assert steps[0] == steps[1]
    assert steps[0].startswith("stopped after ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_single_process_stops_too(number):
    process = start("-", "-", "-", "many")
    wait_until_joined([process])
    process.send_signal(number)
    status, output, errors = end(process)
    assert status == 143, errors
    assert output.startswith("stopped after ")


def test_a_second_interrupt_is_obeyed_at_once():
    stop = cluster.StopRequest.__new__(cluster.StopRequest)
    stop.requested, stop._agree = False, None
    stop._note(signal.SIGINT, None)
    assert stop(1)
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)


@pytest.mark.parametrize("guilty", [0, 1])
def test_the_status_of_a_process_that_fails_is_its_own_and_the_other_ends(guilty):
    began = time.monotonic()
    results = [end(process) for process in two(f"fail{guilty}")]
    assert results[guilty][0] == 2, results
    assert results[1 - guilty][0] not in (0, 143)
    assert time.monotonic() - began < 60


def test_refusals_of_the_environment():
    cluster._refuse_unconnected({"num_processes": None}, {"PMI_SIZE": "1"})
    with pytest.raises(InputError, match="PMI_SIZE says that there are 2 processes"):
        cluster._refuse_unconnected({"num_processes": None}, {"PMI_SIZE": "2"})
