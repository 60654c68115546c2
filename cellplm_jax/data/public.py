"""Public data sets that the notebooks use. They are not part of the package: files on this machine are opened."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellplm_jax.data.bundled import pbmc3k
from cellplm_jax.data.simulate import simulate_tissue
from cellplm_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from anndata import AnnData

FOLDER = "CELLPLM_DATA"
"""Environment variable: folder with the files."""


@dataclass(frozen=True)
class Public:
    """A public data set.

    Attributes:
        file: Name of the file in the folder.
        title: Description, one line.
        source: Where to get it.
        licence: Terms of the data.
        cells: Number of cells.
        genes: Number of genes.
        counts: Sum of all counts.
        columns: Columns of ``obs`` that are used.
    """

    file: str
    title: str
    source: str
    licence: str
    cells: int
    genes: int
    counts: int
    columns: tuple[str, ...]


PUBLIC = {
    "kang": Public(
        "kang_muscat_labelled.h5ad",
        "blood cells of two donors, with and without interferon beta",
        "example_sce of the Bioconductor package muscat; Kang et al. 2018, GEO GSE96583",
        "GPL-3 (package)",
        1556,
        1267,
        2_338_396,
        ("cluster_id", "sample_id", "group_id"),
    ),
    "xenium_breast": Public(
        "xenium_breast_jef2023_4fov.h5ad",
        "four tiles of a Xenium section of breast cancer",
        "genomic-data-visualization-2023 of JEFworks-Lab on GitHub, data/*.csv.gz; 10x Genomics",
        "CC BY 4.0 (10x Genomics)",
        34451,
        313,
        6_544_178,
        ("batch",),
    ),
}
"""Data sets of :func:`public`, by name."""


def public(
    name: str,
    folder: str | os.PathLike | None = None,
    *,
    stand_in: bool = False,
) -> AnnData:
    """Open a public data set from a folder on this machine.

    "Running the notebooks" in the documentation describes how to get the files. Nothing is downloaded.

    Args:
        name: ``"kang"`` or ``"xenium_breast"``.
        folder: Folder with the file; None: the one in the environment variable ``CELLPLM_DATA``.
        stand_in: If there is no such file, simulate cells of the same form instead, and print that. Their scores are
            meaningless.

    Returns:
        AnnData [cells, genes] with raw counts in ``X`` and symbols in ``var_names``.

    Raises:
        InputError: The name is unknown, the file does not exist, or its content is not the expected one.
    """
    if name not in PUBLIC:
        raise InputError(
            f"no public data set is called '{name}'",
            f"one of {', '.join(PUBLIC)}",
            nearest(name, PUBLIC, "Check the name"),
        )
    known = PUBLIC[name]
    where = folder or os.environ.get(FOLDER)
    path = Path(where).expanduser() / known.file if where else None
    if path is not None and path.is_file():
        import anndata

        return _checked(anndata.read_h5ad(path), path, known)
    if stand_in:
        sys.stdout.write(
            f"'{name}' is simulated: {known.file} is not on this machine. Scores are meaningless.\n"
        )
        return _STAND_INS[name]()
    raise InputError(
        f"'{name}' needs {known.file}, which is not in "
        + (f"'{where}'" if where else f"a folder ({FOLDER} is not set)"),
        f"the file made from {known.source}",
        f"Set {FOLDER} to its folder; 'Running the notebooks' in the documentation describes how to make it. "
        "stand_in=True simulates such cells, to try the code",
    )


def _checked(adata: Any, path: Path, known: Public) -> Any:
    """Return the data; content that differs from the expected one raises an error."""
    found = (*adata.shape, round(float(adata.X.sum())))
    lacking = [column for column in known.columns if column not in adata.obs]
    if found != (known.cells, known.genes, known.counts) or lacking:
        raise InputError(
            f"'{path}' has {found[0]:,} cells, {found[1]:,} genes and {found[2]:,} counts"
            + (f", and no column {', '.join(lacking)}" if lacking else ""),
            f"{known.cells:,} cells, {known.genes:,} genes, {known.counts:,} counts, and "
            f"{', '.join(known.columns)}",
            "Make the file again as 'Running the notebooks' describes",
        )
    return adata


INTERFERON = (
    "ISG15",
    "IFI6",
    "IFIT1",
    "IFIT2",
    "IFIT3",
    "MX1",
    "LY6E",
    "ISG20",
    "TNFSF10",
    "IRF7",
    "CXCL10",
    "OAS1",
    "APOBEC3A",
    "IFITM3",
    "SAMD9L",
)
"""Genes that the simulated treatment raises."""


def _kang() -> AnnData:
    """Return bundled blood cells in the form of ``kang``: four samples, two of them with raised interferon genes."""
    random = np.random.default_rng(0)
    adata = pbmc3k()
    kinds = {
        "B cell": "B cells",
        "CD4 T cell": "CD4 T cells",
        "CD8 T cell": "CD8 T cells",
        "CD14+ monocyte": "CD14+ Monocytes",
        "FCGR3A+ monocyte": "FCGR3A+ Monocytes",
    }
    adata = adata[adata.obs["cell_type"].isin(list(kinds))].copy()
    often = np.asarray((adata.X > 0).mean(axis=0)).ravel()
    raised = [gene for gene in INTERFERON if gene in adata.var_names]
    often[[adata.var_names.get_loc(gene) for gene in raised]] = 1.0
    most = np.argsort(-often, kind="stable")[: PUBLIC["kang"].genes]
    # In the order of the file.
    adata = adata[:, np.sort(most)].copy()
    sample = random.permutation(np.arange(adata.n_obs) % 4)
    counts: Any = adata.X.toarray()
    # A batch effect per sample: genes are thinned by different rates.
    rates = np.clip(
        np.exp(random.normal(-0.3, 0.25, (4, adata.n_vars))),
        0.0,
        1.0,
    )
    counts = random.binomial(counts.astype(np.int64), rates[sample])
    columns = [adata.var_names.get_loc(gene) for gene in raised]
    treated = np.flatnonzero(sample >= 2)
    counts[np.ix_(treated, columns)] += random.poisson(3.0, (len(treated), len(columns)))
    adata.X = counts.astype(np.float32)
    names = np.array(["ctrl101", "ctrl107", "stim101", "stim107"], object)
    adata.obs = adata.obs[[]]
    adata.obs["cluster_id"] = pbmc3k().obs["cell_type"][adata.obs_names].map(kinds).astype(str)
    adata.obs["sample_id"] = names[sample]
    adata.obs["group_id"] = np.where(sample >= 2, "stim", "ctrl")
    for column in adata.obs:
        adata.obs[column] = adata.obs[column].astype("category")
    adata.uns = {"source": "simulated stand-in"}
    return adata


def _xenium_breast() -> AnnData:
    """Return simulated sections in the form of ``xenium_breast``."""
    from cellplm_jax.data.genes import symbols_of

    adata = simulate_tissue(
        cells=4 * 700,
        genes=PUBLIC["xenium_breast"].genes,
        batches=4,
        library_size=190.0,
        markers_per_type=12,
        keep_expected=False,
        seed=1,
    )
    adata.var_names = symbols_of(adata.var["ensembl_id"])
    adata.var_names_make_unique()
    tiles = dict(
        zip(
            adata.obs["batch"].cat.categories,
            ("pikachu", "bulbasaur", "squirtle", "charmander"),
            strict=True,
        )
    )
    adata.obs = adata.obs[["batch"]].assign(batch=adata.obs["batch"].cat.rename_categories(tiles))
    adata.layers.clear()
    adata.uns = {"source": "simulated stand-in"}
    return adata


_STAND_INS = {"kang": _kang, "xenium_breast": _xenium_breast}
