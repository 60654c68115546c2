"""Execution of the tasks of ``cellplm prepare``: in this process, in local processes, or on dask."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cellplm_jax.errors import CellPLMError, InputError, explain, require
from cellplm_jax.progress import ProgressReport

Advance = Callable[[int], None]

SCHEDULER_SECONDS = 30
"""Timeout of the connection to a dask scheduler."""

_TOPIC = "cellplm-prepare"

Runner = Callable[..., Iterator[tuple[str, Any]]]
"""``run(function, {name: arguments}, on_progress)`` yields (name, result or exception) as tasks end."""


@contextlib.contextmanager
def open_runner(scheduler: str | None, workers: int | None, files: int) -> Iterator[Runner]:
    """Yield a function that runs tasks for all files.

    Raises:
        InputError: No dask scheduler answers.
    """
    processes = min(files, os.cpu_count() or 1) if workers is None else workers
    # A cluster takes seconds to start, which one file does not repay.
    if scheduler is None and (processes == 0 or (workers is None and processes == 1)):
        yield _run_here
        return
    dask = require("dask.distributed", "train", "Preparing files on several processes")
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            settings = require("dask.config", "train", "Preparing files on several processes")
            # The profiler interrupts the worker a hundred times per second.
            stack.enter_context(settings.set({"distributed.worker.profile.enabled": False}))
            # The task bounds its memory; dask's own limits would count the file cache.
            cluster = stack.enter_context(
                dask.LocalCluster(
                    n_workers=processes,
                    threads_per_worker=1,
                    memory_limit=None,
                    dashboard_address=None,
                    silence_logs=logging.ERROR,
                )
            )
            client = stack.enter_context(dask.Client(cluster))
        else:
            try:
                client = stack.enter_context(dask.Client(scheduler, timeout=SCHEDULER_SECONDS))
            except (OSError, ValueError) as error:
                raise InputError(
                    f"no dask scheduler answers at '{scheduler}' ({error})",
                    "the address of a running scheduler, such as tcp://10.0.0.5:8786",
                    "Start it with: dask scheduler, and workers with: dask worker ADDRESS",
                ) from error
        yield functools.partial(_run_on_dask, client, dask)


def _run_here(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    on_progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Any]]:
    for name, arguments in tasks.items():
        try:
            yield name, function(*arguments, functools.partial(on_progress, name))
        except CellPLMError as error:
            yield name, error


def _run_on_dask(
    client: Any,
    dask: Any,
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    on_progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Any]]:
    client.subscribe_topic(_TOPIC, lambda event: on_progress(*event[1]))
    names = {}
    for name, arguments in tasks.items():
        # Not pure: dask must run a task again that it has seen in an earlier call.
        future = client.submit(_remote, function, name, arguments, pure=False)
        names[future] = name
    try:
        for future in dask.as_completed(list(names)):
            error = future.exception()
            if error is None:
                yield names[future], future.result()
            # By name, because dask is an optional dependency.
            elif type(error).__name__ == "KilledWorker":
                msg = explain(
                    f"the processes that worked on '{names[future]}' died, most often because of insufficient memory",
                    "enough memory for every worker",
                    "Use fewer of them (--workers), and run the same command again; finished parts are "
                    "kept",
                )
                yield names[future], InputError(msg)
            else:
                raise error
    finally:
        client.cancel(list(names))
        client.unsubscribe_topic(_TOPIC)


def _remote(function: Callable[..., Any], name: str, arguments: tuple) -> Any:
    """Run a task on a worker and send its progress once per second; errors of this package are returned, not raised."""
    from dask.distributed import get_worker

    worker = get_worker()
    last = [time.monotonic()]

    def advance(done: int) -> None:
        # Each report is a message through the scheduler.
        if time.monotonic() - last[0] >= 1:
            last[0] = time.monotonic()
            worker.log_event(_TOPIC, (name, done))

    try:
        return function(*arguments, advance)
    except CellPLMError as error:
        return error


def run_stage(
    run: Runner,
    title: str,
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    sizes: Mapping[str, int],
    unit: str,
    quiet: bool,
) -> dict[str, Any]:
    """Run a function on every file with progress; all files are tried before an error is raised.

    Returns:
        Results by name, in the order of ``tasks``.

    Raises:
        InputError: The function failed for some files; all are listed.
    """
    total = sum(sizes[name] for name in tasks)
    report = ProgressReport(title, total, unit=unit, quiet=quiet or not tasks, first="starting")
    lock = threading.Lock()  # dask reports progress from another thread
    done: dict[str, int] = {}
    results: dict[str, Any] = {}
    errors: dict[str, CellPLMError] = {}

    def on_progress(name: str, value: int) -> None:
        with lock:
            # A late report must not lower the progress of a finished file.
            if name not in results and name not in errors:
                done[name] = value
                report.update(sum(done.values()), name)

    try:
        for name, result in run(function, tasks, on_progress):
            with lock:
                if isinstance(result, CellPLMError):
                    errors[name] = result
                else:
                    results[name] = result
                done[name] = sizes[name]
                report.update(sum(done.values()), name)
    finally:
        report.close()
    if errors:
        # The same error of all files is shown once.
        messages = dict.fromkeys(_named(name, error) for name, error in errors.items())
        text = "\n  ".join(messages)
        if len(errors) > 1:
            text = f"{len(errors)} of {len(tasks)} files cannot be used:\n  {text}"
        if "finished parts are kept" not in text:
            text += (
                "\nRun again without these files, or with corrected ones; finished parts are kept."
            )
        raise InputError(text)
    return {name: results[name] for name in tasks}


def _named(name: str, error: Exception) -> str:
    text = str(error)
    return text if name in text else f"'{name}': {text}"
