"""What the five lines of the README draw: clusters and cell types of the bundled blood cells."""

from __future__ import annotations

from themes import save


def main() -> None:
    """Run the five lines, and save the picture for both themes."""
    import cellplm_jax as cellplm

    adata = cellplm.datasets.pbmc3k()
    cellplm.cluster(adata, "small")
    axes = cellplm.plot.umap(adata, color=["cellplm_cluster", "cell_type"])
    save("quickstart", axes[0].figure)


if __name__ == "__main__":
    main()
