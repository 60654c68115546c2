"""The pictures of ``docs/stories.md``: its blocks run as they stand, on bundled and simulated cells.

python docs/figures/stories.py            # all
python docs/figures/stories.py embed      # one
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from themes import HERE, save

PAGE = HERE.parent / "stories.md"
CELLS = 300  # per file: the pictures take minutes, not hours
EPOCHS = 4


def stories() -> dict[str, str]:
    """Return the code of every story, by the name of its picture."""
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
        name = re.search(r"figures/stories/(\w+)-light\.png", section)
        assert code is not None, section
        assert name is not None, section
        found[name[1]] = code[1]
    return found


def write_files(folder: Path) -> None:
    """Write the files that the stories read."""
    import numpy as np

    import cellplm_jax as cellplm

    random = np.random.default_rng(0)
    blood = cellplm.datasets.pbmc3k()
    often = np.asarray((blood.X > 0).mean(axis=0)).ravel() > 0.04
    blood = blood[blood.obs["cell_type"] != "unassigned", often].copy()
    order = random.permutation(blood.n_obs)
    cells, labelled = blood[order[:CELLS]].copy(), blood[order[CELLS : 2 * CELLS]].copy()
    # A type that the labelled cells do not have.
    labelled = labelled[labelled.obs["cell_type"] != "NK cell"].copy()
    labelled.obs["batch"] = np.where(np.arange(labelled.n_obs) % 2, "b1", "b2")
    cells.obs["batch"] = "new"
    cells.write_h5ad(folder / "cells.h5ad")
    labelled.write_h5ad(folder / "labelled.h5ad")
    tissue = cellplm.datasets.simulate_tissue(
        cells=2 * CELLS, genes=150, batches=2, markers_per_type=8, seed=1
    )
    tissue.var_names = tissue.var["ensembl_id"]
    tissue.obs["cell_type"] = tissue.obs["cell_type"].astype(str)
    tissue.write_h5ad(folder / "several.h5ad")
    first = tissue.obs["batch"] == tissue.obs["batch"].cat.categories[0]
    tissue[first, : tissue.n_vars * 2 // 3].copy().write_h5ad(folder / "spatial.h5ad")
    reference = tissue[~first].copy()
    del reference.obsm["spatial"]
    reference.write_h5ad(folder / "reference.h5ad")
    screen = blood[blood.obs["cell_type"].isin(["CD14+ monocyte"])][:400].copy()
    counts = screen.X.toarray().astype(int)
    common = np.flatnonzero((counts > 0).mean(axis=0) > 0.15)
    likeness = np.corrcoef(np.log1p(counts[:, common]).T)
    names = np.array(["control", "STAT1", "IRF1"], object)[np.arange(screen.n_obs) % 3]
    for target in ("STAT1", "IRF1"):  # each loses most counts of a module of genes
        seed = random.integers(len(common))
        module = common[np.argsort(-likeness[seed])[:15]]
        chosen = np.ix_(names == target, module)
        counts[chosen] = random.binomial(counts[chosen], 0.3)
    screen.X = counts.astype(np.float32)
    screen.obs["perturbation"] = names
    screen.write_h5ad(folder / "screen.h5ad")


def main(names: list[str]) -> None:
    """Run the stories and save what each draws last."""
    import matplotlib

    matplotlib.use("Agg")
    import anndata
    import matplotlib.pyplot as plt

    import cellplm_jax as cellplm

    for name in ("CellTypeAnnotator", "GeneImputer", "Denoiser", "PerturbationPredictor"):
        estimator = getattr(cellplm, name)
        estimator.recipe = dataclasses.replace(estimator.recipe, epochs=EPOCHS)
    (HERE / "stories").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_files(Path(folder))
        for name, code in stories().items():
            if names and name not in names:
                continue
            space: dict[str, Any] = {"anndata": anndata, "cellplm": cellplm}
            exec(compile(code, f"{PAGE.name}: {name}", "exec"), space)
            save(name, plt.gcf(), HERE / "stories")
            plt.close("all")
            sys.stdout.write(f"{name}\n")
        os.chdir(HERE)


if __name__ == "__main__":
    main(sys.argv[1:])
