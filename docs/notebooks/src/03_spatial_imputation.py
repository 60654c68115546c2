# %% [markdown]
# # Impute genes in tissue
#
# A spatial panel measures some genes at every place of a tissue; a dissociated reference measures all
# of them and no places. An imputer learns from the reference what the panel lacks. Here the tissue is
# simulated, so that the truth is known and each map can be checked.

# %%
import numpy as np

import cellplm_jax as cellplm

tissue = cellplm.datasets.simulate_tissue(
    cells=600 if FAST else 2400, genes=120, batches=2, markers_per_type=8, seed=1
)
tissue.var_names = tissue.var["ensembl_id"]
first = tissue.obs["batch"] == tissue.obs["batch"].cat.categories[0]

# %% [markdown]
# ## Panel and reference
#
# The first section is the spatial data: 80 of 120 genes were measured, 40 were not. The second
# section, taken apart, is the reference: all genes, no coordinates, and a batch effect of its own.

# %%
hidden = np.random.default_rng(0).permutation(tissue.n_vars)[:40]
panel = np.setdiff1d(np.arange(tissue.n_vars), hidden)
truth = tissue[first].copy()
spatial = truth[:, panel].copy()
reference = tissue[~first].copy()
del reference.obsm["spatial"]
print(f"panel: {spatial.n_obs} cells, {spatial.n_vars} genes")
print(f"reference: {reference.n_obs} cells, {reference.n_vars} genes")

# %% [markdown]
# ## Fit and predict
#
# These genes carry real names and invented behaviour, so a pretrained model would know nothing of
# them: the imputer starts from scratch (`None`). For real tissue, give `"small"` or a model of your
# own.

# %%
imputer = cellplm.GeneImputer(None, epochs=3 if FAST else 40, quiet=True)
imputer.fit(spatial, reference=reference)
imputed = imputer.predict(spatial, log_normalized=True)
imputed.iloc[:3, :5].round(2)

# %% [markdown]
# ## Which genes to trust
#
# `confidence` is how well a gene followed from the panel in reference cells that were held back. It
# needs no truth, so you have it for your own data too. Here we may look at the truth as well.

# %%
import matplotlib.pyplot as plt

# Log-normalised as the imputer does it: by the total of the panel's genes.
counts = truth.X.toarray()
scale = 1e4 / np.maximum(counts[:, panel].sum(axis=1, keepdims=True), 1)
true = np.log1p(counts * scale)
expected = np.log1p(truth.layers["expected"] * scale)
column = {gene: number for number, gene in enumerate(tissue.var_names)}
agreement = [
    np.corrcoef(imputed[gene], expected[:, column[gene]])[0, 1] for gene in imputed.columns
]

figure, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
ax.scatter(imputer.confidence[imputed.columns], agreement, s=18, color="#0072B2")
ax.set(
    xlabel="confidence, from the reference",
    ylabel="correlation with the true expectation",
    title="40 genes",
)
plt.show()
print(f"median correlation with the true expectation: {np.nanmedian(agreement):.2f}")
scores = imputer.score(spatial, truth=truth)
print({name: round(float(value), 3) for name, value in scores.items()})

# %% [markdown]
# ## Maps
#
# Left what was counted at each place (hidden from the imputer), in the middle what it says, right the
# difference. The counts are noisy; the imputed values are an expectation, and smoother.

# %%
best = list(imputer.confidence[imputed.columns].sort_values(ascending=False).index[:2])
places = truth.obsm["spatial"]
for gene in best:
    cellplm.plot.spatial_comparison(
        places,
        true[:, column[gene]],
        imputed[gene],
        title=gene,
        names=("counted", "imputed"),
        unit="µm",
    )
plt.show()

# %% [markdown]
# Which of these genes mark a cell type?

# %%
tissue.var.loc[best, ["marker_of", "target_of"]]

# %% [markdown]
# On real data look at confident genes only, and check one or two of them in a second section or by
# in-situ hybridisation.
