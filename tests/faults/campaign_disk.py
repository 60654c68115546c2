"""A disk that is full at a random point of a command: status 2 and one message, and the old output remains."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import campaign_kills as kills
from tests.faults.outcome import Outcome

prepare = kills.prepare


def try_case(inputs: Any, seed: int) -> Outcome:
    """Limit the size of files, or of a small file system if this is allowed, and run one command."""
    random = np.random.default_rng(seed)
    verb = list(inputs.seconds)[seed % len(inputs.seconds)]
    argv, name = kills.VERBS[verb]
    size = int(np.exp(random.uniform(np.log(4e3), np.log(4e6))))
    work = kills._folder(inputs, verb)
    with contextlib.ExitStack() as stack:
        mounted = bool(random.random() < 0.5) and small_disk(work, max(size, 2**16), stack)
        if mounted:
            kills.link_inputs(inputs, work)
        old = name.count(".") > 0 and name != "out.zarr"
        if old:
            (work / name).write_text("old")
        log = inputs.folder.parent / "log"
        log.mkdir(exist_ok=True)
        status, _ = inputs.server.run(argv, work, limit=0 if mounted else size, log=log)
        said = (log / "stderr").read_text()
        what = f"{'file system' if mounted else 'file size'} of {size:,} bytes"
        detail = f"{verb}, {what}: status {status}: {said[-600:]}"
        kind = f"{verb}, {'file system' if mounted else 'file size'}"
        if status == 0:
            return Outcome(kind, "fits", kills.opens(work / name), detail)
        lines = [line for line in said.splitlines() if line.startswith("cellplm ")]
        if status != 2 or "Traceback" in said or len(lines) != 1:
            return Outcome(kind, "no single message", False, detail)
        if "disk is full" not in lines[0]:
            return Outcome(kind, "another reason", False, detail)
        if old and (work / name).read_text(errors="replace") != "old":
            return Outcome(kind, "old output lost", False, detail)
        left = kills.strays(work)
        return Outcome(kind, f"stray: {left}" if left else "refused", not left, detail)


def small_disk(folder: Path, size: int, stack: contextlib.ExitStack) -> bool:
    """Mount an empty file system of a size on a folder; return whether this is allowed."""
    if os.geteuid() != 0:
        return False
    for path in folder.iterdir():
        path.unlink()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
            return True
    return False
