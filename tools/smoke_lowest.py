"""With the lowest versions of all dependencies: train, embed, align, annotate, cluster and write files.

Run by ``make lowest``; says which version of each declared dependency was used.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from importlib.metadata import requires, version
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

import cellplm_jax as cellplm
from cellplm_jax.cli import main
from cellplm_jax.presets import preset
from cellplm_jax.tasks.annotate import CellTypeAnnotator
from cellplm_jax.tasks.cluster import cluster

EXTRAS = ("", "train", "eval", "cpu")


def floors() -> list[str]:
    """Return the declared dependencies whose version is not the lowest that is allowed, and print all of them."""
    wrong = []
    for text in requires("cellplm-jax") or []:
        requirement = Requirement(text)
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": e}) for e in EXTRAS
        ):
            continue
        lowest = [s.version for s in requirement.specifier if s.operator == ">="]
        found = version(requirement.name)
        print(f"{requirement.name} {found} ({requirement.specifier})")
        same = lowest and re.fullmatch(rf"{re.escape(lowest[0])}(\.0)*(\.\d+)?", found)
        if not same:
            wrong.append(f"{requirement.name} {found}")
    return wrong


def check(condition: bool, what: str) -> None:
    """End the program with a message if something is wrong."""
    if not condition:
        raise SystemExit(f"smoke: {what}")


def run() -> None:
    """Go through the commands that people use most."""
    wrong = floors()
    check(not wrong, f"not the lowest version: {', '.join(wrong)}")
    adata = cellplm.datasets.pbmc3k()[:400].copy()
    adata.obs["half"] = np.where(np.arange(400) % 2, "a", "b")
    label = "cell_type"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        small = cellplm.load("small")
        cellplm.embed(adata, small)
        first = adata.obsm["X_cellplm"].copy()
        check(np.isfinite(first).all(), "wrong embedding")
        adata.write_h5ad(path / "in.h5ad")
        arguments = ["embed", path / "in.h5ad", "--model", "small", "--out", path / "o.h5ad"]
        arguments += ["--adapt", "context", "--batch-key", "half", "--quiet"]
        check(main(list(map(str, arguments))) == 0, "cellplm embed failed")
        train, test = adata[:300].copy(), adata[300:].copy()
        annotator = CellTypeAnnotator(small, method="neighbors", quiet=True)
        annotator.fit(train, label_key=label)
        annotator.save(path / "annotator")
        annotated = CellTypeAnnotator.load(path / "annotator", quiet=True).predict(test)
        found, known = (annotated.obs[k].astype(str) for k in ("cellplm_cell_type", label))
        right = float((found == known)[known != "unassigned"].mean())
        check(right > 0.7, f"{right:.0%} of the cells get the right label")
        clusters = cluster(adata, small, quiet=True).obs["cellplm_cluster"].nunique()
        check(clusters > 2, f"{clusters} clusters")
        result = cellplm.pretrain(adata, preset("debug"), path / "run", quiet=True)
        again = cellplm.load(path / "run")
        cellplm.embed(adata, again)
        check(adata.obsm["X_cellplm"].shape == (400, 16), "wrong shape")
        print(f"smoke: ok; {result.step} steps, {right:.0%} of the cells get the right label")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run()
