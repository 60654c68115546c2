"""Ctrl-C and SIGTERM: the command cleans up and ends within two seconds, whatever it does.

A ``KeyboardInterrupt`` is not enough. Callbacks of JAX's garbage collection swallow it, XLA does not notice it
while it compiles, and an exception inside a compilation can end the process with SIGSEGV. So a thread waits for the
signals, which the C handler of Python writes to a pipe at once; it removes partial outputs and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit status by signal, as shells report it."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SECONDS = 1.2


@contextlib.contextmanager
def end_on_signals(command: str) -> Iterator[None]:
    """End this process on Ctrl-C and SIGTERM: no partial outputs, one line, status 130 or 143.

    Args:
        command: Name of the command, for the line.
    """
    read, write = os.pipe()
    # A C signal handler must never wait for a full pipe.
    os.set_blocking(write, False)
    # Shells ignore Ctrl-C for background jobs, nohup as well.
    handled = [number for number in STATUS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _wait) for number in handled}
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # Blocked in between: a forked process shares the pipe until its handlers are restored.
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_restore)
    watcher = threading.Thread(target=_watch, args=(read, command), daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        watcher.join(1)


def _wait(number: int, frame: object) -> None:
    """Do nothing: the thread of :func:`end_on_signals` ends the process."""


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUS)


def _restore() -> None:
    """Let signals end a forked process, such as a worker, without ending this one."""
    for number in STATUS:
        if signal.getsignal(number) is _wait:
            signal.set_wakeup_fd(-1)
            signal.signal(number, signal.SIG_DFL)
    _unblock()


def _watch(read: int, command: str) -> None:
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in STATUS:
                _end(number[0], command)


def _end(number: int, command: str) -> None:
    """Clean up, write one line, and end the process without running anything else."""
    # At the latest after this time, also if a disk does not answer.
    timer = threading.Timer(_SECONDS, os._exit, (STATUS[signal.Signals(number)],))
    timer.daemon = True
    timer.start()
    _end_children()
    # Nothing was written before this module is loaded; importing it here could wait for the main thread.
    stop_writing = getattr(sys.modules.get("cellplm_jax.storage"), "stop_writing", None)
    if stop_writing is not None:
        stop_writing(_SECONDS / 2)
    # A progress bar hides the cursor.
    start = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}cellplm {command}: {_WORDS[signal.Signals(number)]}\n".encode())
    os._exit(STATUS[signal.Signals(number)])


def _end_children() -> None:
    """End the workers of this process; they could not report to it any more."""
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as file:
                children = [int(child) for child in file.read().split()]
            for child in children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGTERM)
