"""Bundled counts of real cells."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from cellplm_jax.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

_RESOURCE = "pbmc3k.h5ad"


def pbmc3k() -> AnnData:
    """Load the bundled PBMC3k data: 2,700 blood cells of a healthy donor, raw counts of 13,714 genes.

    The 10x Genomics data set "3k PBMCs from a Healthy Donor" (CC BY 4.0; attribution and the list of changes in ``uns``
    and in the licence file of the resource). Every call returns a new object, read from the installed package in a
    fraction of a second.

    Sets the following fields of the result:

    - ``X``: raw counts, CSR float32, shape ``[2700, 13714]``.
    - ``obs_names``: cell barcodes; ``var_names``: gene symbols as released (unique).
    - ``obs["cell_type"]``: categorical, from :func:`~cellplm_jax.data.datasets.annotate_by_markers` with its defaults.
      These labels use marker genes only, so they can evaluate embeddings; ambiguous cells are ``"unassigned"`` and
      should be excluded from scores.
    - ``var["ensembl_id"]``: Ensembl gene ids, updated if the released id is retired;
      ``var["released_ensembl_id"]``: the ids as released.
    - ``uns``: title, source, licence, attribution, changes, and the method of the labels.

    Returns:
        The data, ready for :func:`cellplm_jax.embed`.

    Raises:
        InputError: The resource file is missing from the installation.
    """
    resource = resources.files("cellplm_jax") / "resources" / _RESOURCE
    if not resource.is_file():
        raise InputError(
            f"the bundled file resources/{_RESOURCE} is not part of this installation",
            "the counts included in every cellplm-jax wheel",
            "Reinstall cellplm-jax, or in a source checkout run: python tools/build_pbmc3k.py",
        )
    import anndata

    with resources.as_file(resource) as path:
        adata = anndata.read_h5ad(path)
    adata.X = adata.X.astype(np.float32)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return adata
