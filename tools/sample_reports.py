"""Write a report of every command that writes one, on a few bundled cells: pages for ``check_pages.py`` to open.

python tools/sample_reports.py OUT
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import tempfile
from pathlib import Path

CELLS, GENES = 240, 260

COMMANDS = {
    "embed": "embed cells.h5ad --model small --batch-key section --out embedded.h5ad --color cell_type --color section",
    "cluster": "cluster embedded.h5ad --out clustered.h5ad --label-key cell_type --batch-key section",
    "niches": "niches cells.h5ad --model small --batch-key section --n-niches 3 --out niches.h5ad",
    "annotate-fit": "annotate fit labelled.h5ad --model small --label-key cell_type --epochs 2 --out annotator",
    "annotate-predict": "annotate predict cells.h5ad --model annotator --out annotated.h5ad",
    "impute-fit": "impute fit panel.h5ad --reference labelled.h5ad --model small --epochs 2 --out imputer",
    "impute-predict": "impute predict panel.h5ad --model imputer --out imputed.h5ad",
    "impute-predict-measured": "impute predict cells.h5ad --model imputer --out measured.h5ad",
    "denoise-fit": "denoise fit cells.h5ad --model small --epochs 2 --out denoiser",
    "denoise-predict": "denoise predict cells.h5ad --model denoiser --out denoised.h5ad --show LYZ,CD79A",
    "integrate-fit": "integrate fit cells.h5ad --model small --batch-key section --out integrator",
    "integrate-predict": "integrate predict cells.h5ad --model integrator --label-key cell_type --out integrated.h5ad",
    "perturb-fit": "perturb fit screen.h5ad --model small --perturbation-key perturbation --out predictor",
    "perturb-predict": "perturb predict --model predictor --out changes.csv --perturbation STAT1 --perturbation "
    "STAT1+IRF1 --perturbation TP53",
    "samples-fit": "samples fit cells.h5ad --model small --sample-key section --label-key disease --type-key cell_type "
    "--out classifier",
    "samples-predict": "samples predict cells.h5ad --model classifier --out labelled-samples.h5ad",
    "prepare": "prepare cells.h5ad labelled.h5ad --out corpus --sample-key section --workers 0",
    "info-corpus": "info corpus",
    "info-model": "info small",
    "info-run": "info run",
}
"""Arguments of the command line per report; ``--report NAME.html --quiet`` is added. Later ones use earlier outputs."""


def write_cells(folder: Path) -> None:
    """Write the input files: blood cells of two halves, one of them arranged as six sections of a tissue.

    Genes have Ensembl ids as names and their symbols in a column, as CELLxGENE writes them.
    """
    import numpy as np

    import cellplm_jax as cellplm

    random = np.random.default_rng(0)
    adata = cellplm.datasets.pbmc3k()
    adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
    markers = {gene for genes in cellplm.datasets.PBMC_MARKERS.values() for gene in genes}
    wanted = np.isin(adata.var_names, [*markers, "STAT1", "IRF1", "TP53", "JAK1", "STAT2", "MYC"])
    often = np.asarray((adata.X > 0).mean(axis=0)).ravel()
    wanted[np.argsort(-often)[: GENES - wanted.sum()]] = True
    adata = adata[random.permutation(adata.n_obs)[: 2 * CELLS], wanted].copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.var["feature_name"] = adata.var_names.astype(str)
    adata.var_names = adata.var["ensembl_id"].astype(str)
    adata.var_names_make_unique()
    number = np.arange(adata.n_obs)
    adata.obs["section"] = [f"section {n % 6 + 1} of the tissue" for n in number]
    adata.obs["disease"] = np.where(number % 6 < 3, "healthy", "systemic lupus erythematosus")
    names = ["control", "STAT1", "IRF1", "JAK1", "STAT2", "MYC"]
    adata.obs["perturbation"] = np.array(names, object)[number % 6]
    # Types are at different places of a section.
    kinds = np.unique(adata.obs["cell_type"], return_inverse=True)[1]
    places = 300 * np.stack([np.cos(kinds), np.sin(kinds)], axis=1)
    adata.obsm["spatial"] = places + random.normal(0, 70, (adata.n_obs, 2))
    cells, labelled = adata[:CELLS].copy(), adata[CELLS:].copy()
    cells.write_h5ad(folder / "cells.h5ad")
    panel = cells[:, : GENES * 2 // 3].copy()
    panel.write_h5ad(folder / "panel.h5ad")
    labelled.write_h5ad(folder / "labelled.h5ad")
    adata.write_h5ad(folder / "screen.h5ad")


def write_reports(out: Path) -> list[Path]:
    """Write all reports to a folder.

    Args:
        out: The folder; created.

    Returns:
        The pages.

    Raises:
        RuntimeError: A command fails.
    """
    import cellplm_jax as cellplm
    from cellplm_jax.cli import main as command
    from cellplm_jax.presets import preset

    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    pages, here = [], Path.cwd()
    with tempfile.TemporaryDirectory(prefix="cellplm-reports-") as folder:
        os.chdir(folder)
        try:
            write_cells(Path(folder))
            for name, line in COMMANDS.items():
                if name == "info-run":
                    config = dataclasses.replace(
                        preset("debug"), steps=8, evaluate_every=4, checkpoint_every=4, log_every=1
                    )
                    cellplm.pretrain("corpus", config, "run", quiet=True)
                page = out / f"{name}.html"
                with contextlib.redirect_stdout(sys.stderr):
                    status = command([*shlex.split(line), "--report", str(page), "--quiet"])
                if status:
                    msg = f"cellplm {line}: status {status}"
                    raise RuntimeError(msg)
                pages.append(page)
        finally:
            os.chdir(here)
    return pages


def main() -> int:
    """Write the reports to the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write a report of every command.")
    parser.add_argument("out", type=Path, help="folder for the pages")
    pages = write_reports(parser.parse_args().out)
    sys.stdout.write(f"{len(pages)} reports\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
