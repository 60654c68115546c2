"""Ctrl-C and SIGTERM while XLA compiles: status 130 or 143 within two seconds, one line, and no partial output.

Nothing comes from a compilation cache, and JAX writes what it compiles to standard error; so a case knows whether its
signal came within a compilation. An exception there ended such a process with SIGSEGV.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults.campaign_kills import SECONDS, strays
from tests.faults.outcome import Outcome
from tests.faults.server import MODULES, Server

FIT = ["--epochs", "1", "--quiet"]
VERBS: dict[str, list[str]] = {
    "impute fit": ["impute", "fit", "panel.h5ad", "--reference", "cells.h5ad", "--model", "model", "--out", "out",
                   *FIT],
    "integrate fit": ["integrate", "fit", "cells.h5ad", "--batch-key", "batch", "--model", "model", "--out", "out",
                      *FIT],
    "annotate fit": ["annotate", "fit", "cells.h5ad", "--label-key", "kind", "--model", "model", "--out", "out", *FIT],
    "denoise fit": ["denoise", "fit", "cells.h5ad", "--model", "model", "--out", "out", *FIT],
    "embed": ["embed", "cells.h5ad", "--model", "model", "--out", "out.h5ad", "--quiet"],
}  # fmt: skip

BEGIN = re.compile(r"^.*Compiling .*$", re.MULTILINE)
END = re.compile(r"^.*Finished XLA compilation.*$", re.MULTILINE)

LONGEST = 600.0
"""Seconds after which a command that has not begun to compile has failed."""


@dataclass
class Inputs:
    """The server, the folder of inputs, and the commands."""

    server: Server
    folder: Path
    verbs: Sequence[str]


def prepare(
    folder: Path, verbs: Sequence[str] = tuple(VERBS), modules: Sequence[str] = MODULES
) -> Inputs:
    """Write cells and a model, and start a server whose commands compile everything anew."""
    from tests.conftest import VOCABULARY, make_labelled
    from tests.faults import campaign_damage as examples

    inputs = folder / "inputs"
    inputs.mkdir()
    cells = make_labelled(200, spatial=True)
    cells.write_h5ad(inputs / "cells.h5ad")
    cells[:, VOCABULARY[:20]].write_h5ad(inputs / "panel.h5ad")
    examples._checkpoint(inputs / "model")
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("JAX_COMP")}
    changed = {"JAX_PLATFORMS": "cpu", "CELLPLM_CACHE": "off", "JAX_LOG_COMPILES": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    try:
        server = Server(modules)
    finally:
        os.environ |= kept
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return Inputs(server, inputs, verbs)


def try_case(inputs: Inputs, seed: int) -> Outcome:
    """Interrupt one command while it compiles one of its programs."""
    random = np.random.default_rng(seed)
    verb = inputs.verbs[seed % len(inputs.verbs)]
    number = [signal.SIGINT, signal.SIGTERM][int(random.random() < 0.25)]
    work = inputs.folder.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for path in inputs.folder.iterdir():
        (work / path.name).symlink_to(path)
    process = inputs.server.start(VERBS[verb], work)
    log = work / "stderr"
    # Most programs are compiled in milliseconds: the signal comes when one has taken a while.
    fewest, age = int(random.integers(1, 40)), float(random.choice([0, 0.05, 0.2, 0.5]))
    began = since = time.monotonic()
    number_before = 0
    while _running(process) and time.monotonic() - began < LONGEST:
        begun, ended = (len(mark.findall(_text(log))) for mark in (BEGIN, END))
        if begun != number_before or begun == ended:
            number_before, since = begun, time.monotonic()
        if begun >= fewest and begun > ended and time.monotonic() - since >= age:
            break
        time.sleep(0.002)
    text = _text(log)
    inside = len(BEGIN.findall(text)) > len(END.findall(text))
    last = BEGIN.findall(text)[-1:]
    began = time.monotonic()
    os.kill(process, number)
    status, _ = inputs.server.wait()
    seconds = time.monotonic() - began
    said = _text(log)
    detail = f"{verb}: {number.name} after {len(BEGIN.findall(text))} programs, {last}: status {status}, {said[-400:]}"

    def outcome(result: str, ok: bool) -> Outcome:
        kind = f"{verb}, {'compiling' if inside else 'between'}"
        return Outcome(kind, result, ok, detail, seconds)

    if status == 0:
        return outcome("finished before", True)
    if status != {signal.SIGINT: 130, signal.SIGTERM: 143}[number]:
        return outcome("other status", False)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    if "Traceback" in said or said.count(f": {word}\n") != 1:
        return outcome("no single line", False)
    if left := strays(work):
        return outcome(f"stray: {left}", False)
    return outcome("obeyed" if seconds <= SECONDS else "late", seconds <= SECONDS)


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def _running(process: int) -> bool:
    """Return whether a process, a child of the server, has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
