# %% [markdown]
# # Tissue: niches and imputed genes
#
# Four tiles of a breast tumour, measured with Xenium: 313 genes, single cells with coordinates. Find spatial
# niches over all tiles, and predict genes that a panel lacks. Real cells, which the model has not seen.

# %%
import numpy as np

import cellplm_jax as cellplm

tissue = cellplm.datasets.public("xenium_breast")  # see "Running the notebooks" for the file
tissue.obs["batch"].value_counts()

# %% [markdown]
# A square of each tile is enough for this example:

# %%
CELLS = 800
chosen = []
for tile in tissue.obs["batch"].unique():
    own = np.flatnonzero(tissue.obs["batch"] == tile)
    points = tissue.obsm["spatial"][own]
    reach = np.abs(points - np.median(points, axis=0)).max(axis=1)
    chosen.append(own[np.argsort(reach)[:CELLS]])
tissue = tissue[np.sort(np.concatenate(chosen))].copy()

# %% [markdown]
# ## Niches
#
# A niche is a group of cells with similar neighbourhoods. All tiles are used together: a niche has the same name
# and colour everywhere.

# %%
model = cellplm.load("small")
cellplm.niches(tissue, model, batch_key="batch", n_niches=8)
panels = cellplm.plot.spatial_sections(
    tissue.obsm["spatial"], tissue.obs["cellplm_niche"], tissue.obs["batch"], color_label="niche"
)

# %% [markdown]
# Their marker genes, and the share of cells with a count:

# %%
from cellplm_jax.evaluate.markers import group_means, marker_genes

niche = tissue.obs["cellplm_niche"].array
markers = marker_genes(tissue.X, niche, tissue.var_names, number=3)
genes = list(dict.fromkeys(markers["gene"]))
means, shares = group_means(tissue.X, niche, tissue.var_names)
axes = cellplm.plot.dot_plot(means[genes], shares[genes])

# %% [markdown]
# ## Genes that the panel lacks
#
# 30 % of the genes of one tile are hidden and predicted. The other tiles, without coordinates, are the
# reference.

# %%
random = np.random.default_rng(0)
target = (tissue.obs["batch"] == "pikachu").to_numpy()
truth = tissue[target].copy()
often = np.flatnonzero(np.asarray((truth.X > 0).sum(axis=0)).ravel() >= 10)
hidden = random.permutation(often)[: round(0.3 * len(often))]
panel = truth[:, np.setdiff1d(np.arange(truth.n_vars), hidden)].copy()
reference = tissue[~target].copy()
del reference.obsm["spatial"]
imputer = cellplm.GeneImputer(model, epochs=8, quiet=True).fit(panel, reference=reference)
print(*imputer.messages, sep="\n")

# %% [markdown]
# ## Compared with ridge regression
#
# The fit pools the network and ridge regression, with weights from cross-validation in the reference. Mean over
# the hidden genes, on log-normalised values of this tile, which nothing was fitted to:

# %%
import pandas as pd

scores = imputer.score(panel, truth=truth)
parts = {
    "GeneImputer": "",
    "network": "_network",
    "ridge regression": "_ridge",
    "gene mean": "_gene_mean",
}
pd.DataFrame(
    {
        name: [scores.get(name + part, np.nan) for part in parts.values()]
        for name in ("pearson", "rmse")
    },
    list(parts),
).round(3)

# %% [markdown]
# `confidence` is known without the truth: the correlation on held-out reference cells. It says which genes to
# use.

# %%
table = imputer.score_genes(panel, truth=truth)
axes = cellplm.plot.agreement(
    table["confidence"],
    table["pearson"],
    value_label="correlation of a gene",
    names=("in held-out reference cells", "in this tile"),
)

# %% [markdown]
# The most confident gene, measured (hidden from the imputer) and imputed:

# %%
best = table["confidence"].idxmax()
imputed = imputer.predict(panel, log_normalized=True)
total = np.asarray(panel.X.sum(axis=1)).ravel()
counts = np.asarray(truth[:, best].X.toarray()).ravel()
panels = cellplm.plot.spatial_comparison(
    truth.obsm["spatial"], np.log1p(1e4 * counts / np.maximum(total, 1)), imputed[best], title=best
)

# %% [markdown]
# Use confident genes only, and validate some of them in a second section. Niches compared with smoothed components
# on tissues with known regions: *Niches* in the documentation.
