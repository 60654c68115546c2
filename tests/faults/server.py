"""Forks commands from a process that has imported everything, because each new process would import for seconds.

``python -m tests.faults.server`` reads one JSON request per line from standard input: ``argv``, ``folder``, ``limit``
(bytes of the largest file; 0: none), ``log``, the folder of its ``stdout`` and ``stderr``, and ``call``, a writer
instead of a command. It answers with the number of the forked process, and after its end with status and seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "cellplm_jax.cli.command",
    "cellplm_jax.tasks.cluster",
    "cellplm_jax.tasks.embed_corpus",
    "cellplm_jax.tasks.prepare",
    "cellplm_jax.tasks.annotate",
    "cellplm_jax.tasks.impute",
    "cellplm_jax.tasks.integrate",
    "cellplm_jax.tasks.denoise",
    "cellplm_jax.tasks.niches",
    "cellplm_jax.tasks.perturb",
    "cellplm_jax.tasks.samples",
    "cellplm_jax.tasks.export",
    "cellplm_jax.tasks.info",
    "cellplm_jax.interop.convert",
    "orbax.checkpoint",
    "scanpy",
    "igraph",
    "leidenalg",
    "torch",
    "safetensors.numpy",
)


class Server:
    """A forking server, as seen by the process that uses it."""

    def __init__(self, modules: Sequence[str] = MODULES):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def start(
        self,
        argv: list[str],
        folder: Path,
        *,
        limit: int = 0,
        log: Path | None = None,
        call: str = "",
    ) -> int:
        """Start ``cellplm ARGV``, or a writer, in a folder; return the number of the process."""
        request = {"argv": list(map(str, argv)), "folder": str(folder), "limit": limit}
        request |= {"log": str(log or folder), "call": call}
        return int(self._ask(json.dumps(request))["process"])

    def wait(self) -> tuple[int, float]:
        """Return the exit status, negative for a signal, and the seconds from start to end."""
        answer = self._ask("wait")
        return answer["status"], answer["seconds"]

    def run(self, argv: list[str], folder: Path, **options: Any) -> tuple[int, float]:
        """Run ``cellplm ARGV`` to its end; see :meth:`start`."""
        self.start(argv, folder, **options)
        return self.wait()

    def close(self) -> None:
        """End the server."""
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def handles_signals(process: int) -> bool:
    """Return whether a process has installed its handlers, or has ended."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return True


def main() -> None:
    """Serve requests until the input ends."""
    # A shell lets the jobs in its background ignore Ctrl-C; commands of the campaigns do not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    process, began = 0, 0.0
    for line in sys.stdin:
        if line.strip() == "wait":
            _, status = os.waitpid(process, 0)
            seconds = time.monotonic() - began
            answer = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds}
        else:
            request = json.loads(line)
            began = time.monotonic()
            process = os.fork()
            if process == 0:
                run(request)
            answer = {"process": process}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def run(request: dict) -> None:
    """Run a command in this process, and end the process."""
    os.chdir(request["folder"])
    for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        name = name if number == 0 else os.path.join(request["log"], name)
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.argv = ["cellplm", *request["argv"]]
    if request["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    import traceback

    from cellplm_jax.cli import main

    status = 1
    try:
        status = main() if not request["call"] else write(*request["call"].split())
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def write(name: str, times: str) -> int:
    """Run a function of ``campaign_writers`` as a command would."""
    from cellplm_jax.cli.signals import end_on_signals
    from tests.faults.campaign_writers import WRITERS

    with end_on_signals(name):
        WRITERS[name](int(times))
    return 0


if __name__ == "__main__":
    main()
