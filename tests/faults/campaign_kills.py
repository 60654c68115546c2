"""SIGKILL, Ctrl-C and SIGTERM at random moments of all commands that write.

After Ctrl-C and SIGTERM: status 130 or 143 within two seconds, one line, and no partial output. After SIGKILL: the old
output or the complete new one, and the same command run again succeeds and removes what is left.
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

from tests.faults.outcome import Outcome
from tests.faults.server import MODULES, Server, handles_signals

SECONDS = 2.0
"""Within which Ctrl-C and SIGTERM must be obeyed."""

FIT = ["--epochs", "2", "--quiet"]

# By name: the arguments and the output.
VERBS: dict[str, tuple[list[str], str]] = {
    "prepare": (["prepare", "cells.h5ad", "--out", "out", "--genes", "genes.txt", "--workers", "0"], "out"),
    "embed": (["embed", "cells.h5ad", "--model", "model", "--out", "out.h5ad"], "out.h5ad"),
    "embed corpus": (["embed", "corpus", "--model", "model", "--out", "out.zarr"], "out.zarr"),
    "cluster": (["cluster", "cells.h5ad", "--model", "model", "--adapt", "none", "--out", "out.h5ad"], "out.h5ad"),
    "annotate fit": (["annotate", "fit", "cells.h5ad", "--label-key", "kind", "--model", "model", "--out", "out", *FIT],
                     "out"),
    "annotate predict": (["annotate", "predict", "cells.h5ad", "--model", "annotator", "--out", "out.h5ad"],
                         "out.h5ad"),
    "integrate fit": (["integrate", "fit", "cells.h5ad", "--batch-key", "batch", "--model", "model", "--out", "out",
                       *FIT], "out"),
    "integrate predict": (["integrate", "predict", "cells.h5ad", "--model", "integrator", "--out", "out.h5ad"],
                          "out.h5ad"),
    "impute fit": (["impute", "fit", "panel.h5ad", "--reference", "cells.h5ad", "--model", "model", "--out", "out",
                    *FIT], "out"),
    "impute predict": (["impute", "predict", "panel.h5ad", "--model", "imputer", "--out", "out.h5ad"], "out.h5ad"),
    "denoise fit": (["denoise", "fit", "cells.h5ad", "--model", "model", "--out", "out", *FIT], "out"),
    "denoise predict": (["denoise", "predict", "cells.h5ad", "--model", "denoiser", "--out", "out.h5ad"], "out.h5ad"),
    "perturb fit": (["perturb", "fit", "cells.h5ad", "--perturbation-key", "condition", "--model", "model",
                     "--targets", "conditions", "--out", "out", *FIT], "out"),
    "perturb predict": (["perturb", "predict", "--model", "predictor", "--perturbation", "beta",
                         "--out", "out.csv"], "out.csv"),
    "samples fit": (["samples", "fit", "cells.h5ad", "--sample-key", "sample", "--label-key", "disease", "--model",
                     "model", "--out", "out", "--quiet"], "out"),
    "samples predict": (["samples", "predict", "cells.h5ad", "--model", "classifier", "--out", "out.h5ad"], "out.h5ad"),
    "niches": (["niches", "cells.h5ad", "--model", "model", "--adapt", "none", "--out", "out.h5ad"], "out.h5ad"),
    "convert": (["convert", "published/tiny.best.ckpt", "--config", "tiny.config.json", "--out", "out"], "out"),
    "convert back": (["convert", "to-publish", "--to-torch", "out"], "out.best.ckpt"),
    "export": (["export", "model", "--out", "out.cellplm"], "out.cellplm"),
    "info": (["info", "model", "--report", "out.html"], "out.html"),
}  # fmt: skip


@dataclass
class Inputs:
    """The server, a folder of inputs, and the seconds that each command takes."""

    server: Server
    folder: Path
    seconds: dict[str, float]


FEW = ("cellplm_jax.cli.command", "cellplm_jax.tasks.embed", "cellplm_jax.tasks.export")
"""Modules of the commands that the tests run; none needs PyTorch."""


def prepare(
    folder: Path, verbs: Sequence[str] = tuple(VERBS), modules: Sequence[str] = MODULES
) -> Inputs:
    """Write the inputs of all commands, and measure each command."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    server = Server(modules)
    inputs = folder / "inputs"
    inputs.mkdir()
    write_inputs(inputs, server, verbs)
    state = Inputs(server, inputs, {})
    for verb in (
        *verbs,
        *verbs,
    ):  # the second time with compiled functions in the cache, as in the cases
        work = _folder(state, verb)
        status, state.seconds[verb] = server.run(VERBS[verb][0], work)
        if status:
            raise RuntimeError(f"{verb}: {(work / 'stderr').read_text()}")
    return state


def write_inputs(inputs: Path, server: Server, verbs: Sequence[str]) -> None:
    """Write cells, models, and what the verbs need: fitted estimators and a corpus."""
    from tests.conftest import VOCABULARY, make_labelled
    from tests.faults import campaign_damage as examples

    cells = make_labelled(200, spatial=True)
    cells.obs["condition"] = cells.obs["kind"].replace("alpha", "control")
    sample = np.arange(cells.n_obs) % 10
    cells.obs["sample"] = [f"s{number}" for number in sample]
    cells.obs["disease"] = np.where(sample % 2, "yes", "no")
    cells.write_h5ad(inputs / "cells.h5ad")
    cells[:, : cells.n_vars // 2].write_h5ad(inputs / "panel.h5ad")
    (inputs / "genes.txt").write_text("\n".join(VOCABULARY))
    examples._checkpoint(inputs / "model")
    if {"convert", "convert back"} & set(verbs):
        examples._published(inputs / "published")
    for user, verb, out in (
        ("annotate predict", "annotate fit", "annotator"),
        ("integrate predict", "integrate fit", "integrator"),
        ("impute predict", "impute fit", "imputer"),
        ("denoise predict", "denoise fit", "denoiser"),
        ("perturb predict", "perturb fit", "predictor"),
        ("samples predict", "samples fit", "classifier"),
        ("embed corpus", "prepare", "corpus"),
    ):
        if user not in verbs:
            continue
        argv = [out if word == "out" else word for word in VERBS[verb][0]]
        status, _ = server.run(argv, inputs)
        if status:
            raise RuntimeError(f"{verb}: {(inputs / 'stderr').read_text()}")


def try_case(inputs: Inputs, seed: int) -> Outcome:
    """Send one signal at a random moment of one command."""
    random = np.random.default_rng(seed)
    verb = list(inputs.seconds)[seed % len(inputs.seconds)]
    number = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM][int(random.integers(3))]
    argv, name = VERBS[verb]
    work = _folder(inputs, verb)
    old = bool(random.random() < 0.5) and name.count(".") > 0 and name != "out.zarr"
    if old:
        (work / name).write_text("old")
    process = inputs.server.start(argv, work)
    while not handles_signals(process):
        time.sleep(0.001)
    delay = float(random.uniform(0, inputs.seconds[verb]))
    time.sleep(delay)
    began = time.monotonic()
    os.kill(process, number)
    status, _ = inputs.server.wait()
    seconds = time.monotonic() - began
    said = (work / "stderr").read_text() if (work / "stderr").exists() else ""
    kind = f"{verb}, {'SIGKILL' if number == signal.SIGKILL else 'signals'}"
    detail = f"{verb}: {number.name} after {delay:.2f} s: status {status}, {seconds:.2f} s: {said[-600:]}"

    def outcome(result: str, ok: bool) -> Outcome:
        return Outcome(kind, result, ok, detail, seconds)

    if status == 0:
        return outcome("finished before", True)
    if (
        old
        and (work / name).read_text(errors="replace")[:3] not in ("old", "")
        and not opens(work / name)
    ):
        return outcome("damaged output", False)
    if number == signal.SIGKILL:
        if status != -signal.SIGKILL:
            return outcome("other status", False)
        status, _ = inputs.server.run(argv, work)
        detail += f" again: {(work / 'stderr').read_text()[-600:]}"
        if status:
            return outcome("not resumed", False)
        if left := strays(work):
            return outcome(f"stray: {left}", False)
        return outcome("resumed", opens(work / name))
    if status != {signal.SIGINT: 130, signal.SIGTERM: 143}[number]:
        return outcome("other status", False)
    lines = [line for line in said.splitlines() if line.startswith("cellplm ")]
    if "Traceback" in said or len(lines) != 1:
        return outcome("no single line", False)
    if left := strays(work):
        return outcome(f"stray: {left}", False)
    return outcome("obeyed" if seconds <= SECONDS else "late", seconds <= SECONDS)


def opens(path: Path) -> bool:
    """Return whether an output is complete."""
    import zipfile

    import anndata

    from cellplm_jax.train.checkpoint import read_root

    if path.suffix == ".h5ad":
        return any(key.startswith("cellplm") for key in anndata.read_h5ad(path).uns)
    if path.suffix in (".cellplm", ".ckpt"):
        return zipfile.ZipFile(path).testzip() is None
    if path.suffix == ".csv":
        return path.read_text().endswith("\n")
    if path.suffix == ".html":
        return path.read_text().rstrip().endswith("</html>")
    if (path / "config.json").exists():
        return bool(read_root(path).genes)
    return (path / "corpus.json").exists() or (path / "zarr.json").exists()


def strays(folder: Path) -> list[str]:
    """Return the temporary files in a folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [name for name in names if re.search(r"partial|\.tmp|-tmp", name)][:3]


def _folder(inputs: Inputs, verb: str) -> Path:
    """Return a new folder with links to the inputs."""
    work = inputs.folder.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    link_inputs(inputs, work)
    return work


def link_inputs(inputs: Inputs, work: Path) -> None:
    """Make links to the inputs in a folder."""
    for path in inputs.folder.iterdir():
        if path.name not in ("stdout", "stderr") and not (work / path.name).is_symlink():
            (work / path.name).symlink_to(path)
