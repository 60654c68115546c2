"""Blood cells by type in the embedding, beside a breast tumour by cluster in the tissue; the model saw neither.

Needs the Xenium file of the benchmarks: python docs/figures/hero.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from themes import save

TUMOUR = "xenium_breast_jef2023_4fov.h5ad"
MICROMETRES_PER_UNIT = 1.0


def named_clusters(adata):
    """Name every cluster by its two strongest marker genes."""
    from cellplm_jax.evaluate.markers import marker_genes

    found = marker_genes(
        adata.X, adata.obs["cellplm_cluster"], list(map(str, adata.var_names)), number=2
    )
    names = {group: f"{group}  {', '.join(own['gene'])}" for group, own in found.groupby("group")}
    adata.obs["markers"] = adata.obs["cellplm_cluster"].astype(str).map(lambda n: names.get(n, n))


def main(folder: Path) -> None:
    """Embed both, and save the picture for both themes."""
    import anndata
    import matplotlib.pyplot as plt

    import cellplm_jax as cellplm

    blood = cellplm.datasets.pbmc3k()
    cellplm.embed(blood, "small", adapt="context")
    tumour = anndata.read_h5ad(folder / TUMOUR)
    tile = tumour.obs["batch"].value_counts().index[-1]
    tumour = tumour[tumour.obs["batch"] == tile].copy()
    cellplm.cluster(tumour, "small", resolution=0.6)
    named_clusters(tumour)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 4.2), layout="constrained", width_ratios=(1, 1.15)
    )
    cellplm.plot.umap(blood, color="cell_type", title="2,700 blood cells", ax=left)
    cellplm.plot.spatial(
        tumour, color="markers", title=f"{tumour.n_obs:,} cells of a breast tumour, clusters", ax=right,
        micrometres_per_unit=MICROMETRES_PER_UNIT,
    )  # fmt: skip
    save("hero", figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
