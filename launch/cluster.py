"""The processes of one run: how they find one another, and how all of them leave when one is told to.

Nothing here is particular to pretraining; every program in ``launch/`` starts with :func:`join` and ends with
:func:`leave`. jax itself knows TPU pods, SLURM, Open MPI and Kubernetes (``jax._src.clusters``); this module only asks
it, and notices when a launcher says that there are several processes and jax has found none.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType

from cellplm_jax.errors import InputError

EXIT_DONE = 0
"""The run is complete."""
EXIT_FAILED = 1
"""Something unforeseen; the traceback says what. The same command continues from the last checkpoint."""
EXIT_BAD_INPUT = 2
"""Configuration, data or work directory cannot be used; starting again unchanged fails again."""
EXIT_PREEMPTED = 143
"""Told to stop (SIGTERM, SIGINT, SIGUSR1), and everything is saved: the same command continues. It is also what a shell
reports of a process that SIGTERM ended before it could handle it, when there was nothing to save yet."""

# What launchers say of the number of processes; read only to notice that jax did not see them.
_PROCESS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> bool:
    """Connect the processes of this run; to be called before anything else of jax is used.

    With all three arguments they are taken as they are, without looking for a cluster. With none, jax looks for one; on
    a plain machine it finds none, and the run is a single process. Where the others cannot be reached in time, jax ends
    the process itself (status 134).

    Args:
        coordinator_address: ``host:port`` on which process 0 listens.
        num_processes: Processes of the run.
        process_id: Number of this one, from 0.
        initialization_timeout: Seconds within which all processes have to be there.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as dead, and the others end.

    Returns:
        Whether the processes were connected; False: this is a plain single process.

    Raises:
        InputError: Some arguments are missing or wrong, or there are several processes that jax cannot connect by
            itself.
    """
    import jax

    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    complete = None not in given.values()
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=max(60, heartbeat_timeout),
        )
    except (ValueError, IndexError) as error:
        # What jax raises for an argument that it was neither given nor could find.
        if "must be defined" not in str(error) and "should be defined" not in str(error):
            raise InputError(
                f"the processes cannot be connected with {_flags(given)} ({error})",
                "host:port of process 0, the number of processes, and a number below it",
                "Correct them",
            ) from error
        _refuse_unconnected(given, os.environ)
        return False
    return True


def _flags(given: Mapping[str, object]) -> str:
    named = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return " ".join(named) or "no flags"


def _refuse_unconnected(given: Mapping[str, object], environment: Mapping[str, str]) -> None:
    """Raise where there are several processes: each of them would train the whole run into the same directory."""
    remedy = (
        "Give --coordinator_address=HOST:PORT --num_processes=N --process_id=K to every process, or start them with a "
        "launcher that jax knows (TPU pod, srun, mpirun of Open MPI 4, Kubernetes with jax[k8s])"
    )
    if any(value is not None for value in given.values()):
        raise InputError(
            f"only {_flags(given)} was given, and no cluster was found to take the others from",
            "all three of --coordinator_address, --num_processes and --process_id",
            remedy,
        )
    for name in _PROCESS_COUNTS:
        if environment.get(name, "1").strip() not in ("", "1"):
            raise InputError(
                f"{name} says that there are {environment[name]} processes, and jax found no cluster to connect",
                "processes that know of one another",
                remedy,
            )


class StopRequest:
    """``preempted(step) -> bool`` for a training loop: whether to save after this step and leave.

    A single process notes SIGTERM, SIGINT and SIGUSR1 itself. Several processes use jax's preemption service, which
    catches SIGTERM in any of them, tells the others, and has all answer True after the same step; SIGINT and SIGUSR1
    are passed on to it as a SIGTERM. A second SIGINT interrupts at once.

    Args:
        processes: Processes of the run, ``jax.process_count()``.
    """

    def __init__(self, processes: int):
        self.requested = False
        self._agree: Callable[[int], bool] | None = None
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGUSR1, self._note)
        if processes == 1:
            signal.signal(signal.SIGTERM, self._note)
        else:
            from jax.experimental import multihost_utils

            self._agree = multihost_utils.reached_preemption_sync_point

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._agree is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        """Say whether to save after this step; every process has to ask after every step."""
        return self.requested if self._agree is None else self._agree(step)


def leave(status: int, *, joined: bool, together: bool = True) -> None:
    """End the process with a status that reaches whoever started it.

    Processes that are done or preempted leave together. A failed one leaves at once: waiting for others that wait for
    it would end in a time-out and an abort that hides the status. Process 0 goes last, because its end is taken by the
    others as a failure of their own.

    Args:
        status: One of the ``EXIT_`` constants.
        joined: What :func:`join` returned.
        together: Whether processes that are done or preempted wait for one another. False where others may be at work
            for long, and nothing is lost when they are ended.
    """
    if not joined:
        sys.exit(status)
    import jax

    first = jax.process_index() == 0
    sys.stdout.flush()
    sys.stderr.flush()
    if together and status in (EXIT_DONE, EXIT_PREEMPTED):
        jax.distributed.shutdown()
        sys.exit(status)
    if first:
        time.sleep(3)
    os._exit(status)
