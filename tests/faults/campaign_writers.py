"""SIGKILL, Ctrl-C and SIGTERM in the middle of each kind of write: a process that does nothing but write.

The commands spend most of their time elsewhere, so that few random moments of ``campaign_kills`` hit a write; here all
of them do, and no case compiles anything.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults.campaign_kills import SECONDS, strays
from tests.faults.outcome import Outcome
from tests.faults.server import Server, handles_signals

MODULES = (
    "cellplm_jax.cli.signals",
    "cellplm_jax.manifest",
    "cellplm_jax.tasks.embed",
    "cellplm_jax.tasks.tables",
    "cellplm_jax.report.html",
    "safetensors.numpy",
    "tests.faults.campaign_writers",
)


def copy_of_cells(times: int) -> None:
    """A copy of an .h5ad file with an embedding."""
    from cellplm_jax.tasks.embed import write_copy

    for _ in range(times):
        embedding = np.ones((60, 16), np.float32)
        write_copy(Path("cells.h5ad"), Path("out.h5ad"), obsm={"X": embedding}, uns={"a": {"b": 1}})


def root_files(times: int) -> None:
    """The root files of a work directory, with their manifest."""
    from cellplm_jax.manifest import replace_files

    Path("run").mkdir(exist_ok=True)
    for number in range(times):
        replace_files("run", {name: f"{number} " * 2000 for name in ("one", "two", "three")})


def weights(times: int) -> None:
    """A folder with weights as safetensors and its manifest."""
    from cellplm_jax.manifest import write_manifest
    from cellplm_jax.storage import atomic_write
    from cellplm_jax.train.tensors import write_tensors

    for number in range(times):
        for path in Path(f"model {number % 3}").glob("*"):
            path.unlink()
        with atomic_write(f"model {number % 3}") as partial:
            partial.mkdir()
            arrays = {name: np.ones((50, 50), np.float32) for name in "abc"}
            write_tensors(partial / "model.safetensors", arrays, step=0)
            write_manifest(partial)


def table(times: int) -> None:
    """A compressed table."""
    import pandas as pd

    from cellplm_jax.tasks.tables import write_table

    for _ in range(times):
        write_table(pd.DataFrame({"a": np.arange(3000)}), "out.csv.gz")


def page(times: int) -> None:
    """A report."""
    from cellplm_jax.report.html import Text, write_report

    for _ in range(times):
        write_report("out.html", title="t", summary="s", sections=[Text("x" * 100_000)])


WRITERS = {f.__name__: f for f in (copy_of_cells, root_files, weights, table, page)}


def is_whole(folder: Path) -> bool:
    """Return whether every output in a folder opens."""
    import gzip

    import h5py

    from cellplm_jax.errors import CellPLMError
    from cellplm_jax.manifest import MANIFEST_FILE, Manifest

    try:
        if (folder / "out.h5ad").exists():
            with h5py.File(folder / "out.h5ad") as file:
                assert file["obsm/X"].shape == (60, 16)
        if (folder / "out.csv.gz").exists():
            lines = gzip.decompress((folder / "out.csv.gz").read_bytes()).splitlines()
            assert len(lines) == 3001
        if (folder / "out.html").exists():
            assert (folder / "out.html").read_text().endswith("</html>\n")
        for manifest in folder.glob(f"*/{MANIFEST_FILE}"):
            opened = Manifest(manifest.parent)
            for name in opened.entries or ():
                if (manifest.parent / name).exists():
                    opened.read(name)
    except (AssertionError, OSError, EOFError, KeyError, CellPLMError):
        return False
    return True


@dataclass
class Inputs:
    """The server and its folder."""

    server: Server
    folder: Path


def prepare(folder: Path) -> Inputs:
    """Write the cells."""
    from tests.conftest import make_labelled

    make_labelled(60).write_h5ad(folder / "cells.h5ad")
    return Inputs(Server(MODULES), folder)


def try_case(inputs: Inputs, seed: int) -> Outcome:
    """Send one signal at a random moment."""
    random = np.random.default_rng(seed)
    name = list(WRITERS)[seed % len(WRITERS)]
    number = [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM][
        int(random.integers(4))
    ]
    folder, kind = inputs.folder, f"{name}, {'SIGKILL' if number == signal.SIGKILL else 'signals'}"
    process = inputs.server.start([], folder, call=f"{name} 100000")
    while not handles_signals(process):
        time.sleep(0.001)
    time.sleep(float(random.exponential(0.05)))
    began = time.monotonic()
    os.kill(process, number)
    status, _ = inputs.server.wait()
    seconds = time.monotonic() - began
    said = (folder / "stderr").read_text()
    detail = f"{name}: {number.name}: status {status}, {seconds:.2f} s: {said[-400:]}"

    def outcome(result: str, ok: bool) -> Outcome:
        return Outcome(kind, result, ok, detail, seconds if number != signal.SIGKILL else 0.0)

    if not is_whole(folder):
        return outcome("damaged output", False)
    if number == signal.SIGKILL:
        status, _ = inputs.server.run([], folder, call=f"{name} 1")
        if status:
            detail += f" again: {(folder / 'stderr').read_text()[-400:]}"
            return outcome("not repeated", False)
        found = strays(folder)
        return outcome(f"stray: {found}" if found else "repeated", not found)
    if status != {signal.SIGINT: 130, signal.SIGTERM: 143}[number]:
        return outcome("other status", False)
    if said.count("\n") != 1:
        return outcome("no single line", False)
    if left := strays(folder):
        return outcome(f"stray: {left}", False)
    return outcome("obeyed" if seconds <= SECONDS else "late", seconds <= SECONDS)
