"""Install check: train a few steps, save, load, embed and convert file to file, with the extra ``train`` alone."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import jax
import numpy as np

import cellplm_jax as cellplm
from cellplm_jax.cli import main
from cellplm_jax.presets import preset


def run() -> None:
    """Go through the path and check what comes out."""
    adata = cellplm.datasets.pbmc3k()[:300].copy()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        result = cellplm.pretrain(adata, preset("debug"), workdir, quiet=True)
        model = cellplm.load(workdir)
        cellplm.embed(adata, model)
        embedding = adata.obsm["X_cellplm"]
        if embedding.shape != (300, 16) or not np.isfinite(embedding).all():
            raise SystemExit(f"wrong embedding: {embedding.shape}")
        adata.write_h5ad(Path(folder) / "in.h5ad")
        arguments = [
            "embed",
            f"{folder}/in.h5ad",
            "--model",
            str(workdir),
            "--out",
            f"{folder}/o.h5ad",
        ]
        if main([*arguments, "--quiet"]) != 0:
            raise SystemExit("cellplm embed failed")
        print(
            f"smoke: ok; Python {platform.python_version()}, jax {jax.__version__}, "
            f"{result.step} steps, embedding {embedding.shape}"
        )


if __name__ == "__main__":
    run()
