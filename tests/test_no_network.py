"""Nothing looks up or connects to another machine unless an address is given."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

# An audit hook cannot be removed: hence another process. It sees all sockets of Python; and where the system allows it,
# the process has no network at all, so that libraries in C++ cannot reach one either.
PROGRAM = """
import ctypes, sys
tried = []
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
def watch(event, arguments):
    if event in EVENTS:
        tried.append((event, str(arguments)))
        raise PermissionError(f"{event}: {arguments}")
sys.addaudithook(watch)
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)

import cellplm_jax as cellplm
from cellplm_jax.cli import main

cells = cellplm.datasets.pbmc3k()[:60].copy()
cells.obs["kind"] = ["a", "b"] * 30
cells.write_h5ad("cells.h5ad")
for line in (
    "doctor",
    "info small",
    "embed cells.h5ad --model small --out out.h5ad --adapt none --quiet",
    "annotate fit cells.h5ad --label-key kind --model small --method neighbors --out fitted --quiet",
    "annotate predict cells.h5ad --model fitted --out predicted.h5ad --quiet",
):
    status = main(line.split())
    assert status == 0, (line, status)
assert not tried, tried
print("asked", end=" ")
try:
    cellplm.load("hf://nobody/nothing")
except Exception:
    pass
print(sorted({event for event, _ in tried}))
"""


def test_nothing_connects_unless_asked(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The watch works: a model of a hub is looked up.
    last = done.stdout.splitlines()[-1]
    assert last.startswith("asked ['socket."), last
