"""Ctrl-C and SIGTERM: obeyed at once, whatever the process does, with one line and no partial output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_adata
from tests.faults import campaign_compile as compile_campaign
from tests.faults import campaign_kills as campaign
from tests.faults import campaign_writers as writers
from tests.faults.server import handles_signals

BEGIN = """
import os, sys, time
from cellplm_jax.cli.signals import end_on_signals
from cellplm_jax.storage import atomic_write, scratch_folder
with end_on_signals("test"):
"""


def accept_interrupts() -> None:
    """Undo what a shell does to the jobs in its background, for a new process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end(code: str, number: int, folder: Path, *, ready: str = "ready") -> tuple[int, str, float]:
    """Run Python code until it prints a word, send a signal, and return status, standard error and seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=accept_interrupts,
    )
    assert ready in process.stdout.readline()
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said, time.monotonic() - began


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_partial_outputs_are_removed(tmp_path, number, status, word):
    (tmp_path / "old").write_text("old")
    code = """
    with atomic_write("old") as one, atomic_write("folder") as two, scratch_folder("test-") as three:
        one.write_text("half")
        (two / "deep").mkdir(parents=True)
        (two / "deep" / "file").write_text("x")
        print("ready", three, flush=True)
        time.sleep(60)
"""
    found = end(code, number, tmp_path)
    assert found[:2] == (status, f"cellplm test: {word}\n")
    assert found[2] < 5
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


# A callback that raises into nowhere, as that of JAX's garbage collection; an endless call outside of Python; imports.
BUSY = {
    "swallowed": """
    print("ready", flush=True)
    while True:
        try:
            time.sleep(1e-3)
        except BaseException:
            pass
""",
    "not in Python": """
    import ctypes
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
""",
    "importing": """
    open("slow.py", "w").write("import time\\nprint('ready', flush=True)\\ntime.sleep(60)")
    sys.path.insert(0, ".")
    import slow
""",
    "exiting": """
    import atexit
    atexit.register(time.sleep, 60)
    print("ready", flush=True)
    sys.exit(0) if False else time.sleep(60)
""",
}


@pytest.mark.parametrize("name", BUSY)
def test_whatever_the_process_does(tmp_path, name):
    status, said, seconds = end(BUSY[name], signal.SIGINT, tmp_path)
    assert (status, said) == (130, "cellplm test: interrupted\n")
    assert seconds < 5


def test_workers_end_too_and_do_not_end_the_command(tmp_path):
    """A worker that is terminated does not end the command; the end of the command ends its workers."""
    code = """
    import signal
    first, second = os.fork(), None
    if first == 0:
        time.sleep(60)
    os.kill(first, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == -signal.SIGTERM
    second = os.fork()
    if second == 0:
        time.sleep(60)
    open("worker", "w").write(str(second))
    print("ready", flush=True)
    time.sleep(60)
"""
    assert end(code, signal.SIGTERM, tmp_path)[0] == 143
    worker = int((tmp_path / "worker").read_text())
    for _ in range(100):
        state = Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the worker still runs")


def test_a_job_in_the_background_ignores_ctrl_c(tmp_path):
    code = "    pass\nimport signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwith end_on_signals('test'):\n"
    code += "    print('ready', flush=True)\n    time.sleep(0.3)\n"
    assert end(code, signal.SIGINT, tmp_path)[0] == 0


def test_a_real_command(tmp_path):
    make_adata(20).write_h5ad(tmp_path / "cells.h5ad")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cellplm_jax.cli",
            "embed",
            "cells.h5ad",
            "--model",
            "small",
            "--out",
            "x.h5ad",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=accept_interrupts,
    )
    while not handles_signals(process.pid):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "cellplm embed: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.multiprocess
def test_every_writer_at_random_moments(tmp_path, monkeypatch):
    """A few cases of the campaign; `tools/faults.py --campaign writers` runs more."""
    monkeypatch.setattr(writers, "SECONDS", 10.0)
    inputs = writers.prepare(tmp_path)
    try:
        outcomes = [writers.try_case(inputs, seed) for seed in range(15)]
    finally:
        inputs.server.close()
    assert [f"{o.result}: {o.detail}" for o in outcomes if not o.ok] == []
    assert {o.result for o in outcomes} == {"obeyed", "repeated"}


@pytest.mark.multiprocess
def test_random_moments(tmp_path, monkeypatch):
    """A few cases of the campaign; `tools/faults.py --campaign kills` runs more."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(campaign, "SECONDS", 10.0)
    inputs = campaign.prepare(tmp_path, ["embed", "export"], modules=campaign.FEW)
    try:
        outcomes = [campaign.try_case(inputs, seed) for seed in range(8)]
    finally:
        inputs.server.close()
    assert [f"{o.result}: {o.detail}" for o in outcomes if not o.ok] == []
    assert {o.result for o in outcomes} & {"obeyed", "resumed"}


@pytest.mark.multiprocess
def test_while_xla_compiles(tmp_path):
    """A few cases of the campaign; `tools/faults.py --campaign compile` runs more."""
    verbs = ["impute fit", "integrate fit"]
    tasks = [f"cellplm_jax.tasks.{name}" for name in ("impute", "integrate")]
    modules = ("cellplm_jax.cli.command", "orbax.checkpoint", *tasks)
    inputs = compile_campaign.prepare(tmp_path, verbs, modules=modules)
    try:
        outcomes = [compile_campaign.try_case(inputs, seed) for seed in range(4)]
    finally:
        inputs.server.close()
    allowed = {"obeyed", "finished before", "late"}  # late: the machine of the tests may be busy
    assert [f"{o.result}: {o.detail}" for o in outcomes if o.result not in allowed] == []
    assert any(o.kind.endswith("compiling") and o.result == "obeyed" for o in outcomes)
