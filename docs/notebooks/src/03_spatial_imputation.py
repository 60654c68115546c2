# %% [markdown]
# # Spatial gene imputation
#
# A spatial panel measures some genes with coordinates; a dissociated reference measures all genes
# without coordinates. An imputer learns from the reference to predict the genes missing from the panel.
# Here the tissue is simulated, so that each map can be compared with the ground truth.

# %%
import numpy as np

import cellplm_jax as cellplm

tissue = cellplm.datasets.simulate_tissue(
    cells=2400, genes=120, batches=2, markers_per_type=8, seed=1
)
tissue.var_names = tissue.var["ensembl_id"]
first = tissue.obs["batch"] == tissue.obs["batch"].cat.categories[0]

# %% [markdown]
# ## Panel and reference
#
# The first section is the spatial data: 80 of 120 genes were measured, 40 were not. The second
# section, dissociated, is the reference: all genes, no coordinates, and another batch effect.

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
# ## Fitting and prediction
#
# These genes have real names but simulated expression, so a pretrained model has no useful knowledge
# of them: the imputer is trained from scratch (`None`). For real tissue, pass `"small"` or your own
# model.

# %%
imputer = cellplm.GeneImputer(None, epochs=40, quiet=True)
imputer.fit(spatial, reference=reference)
imputed = imputer.predict(spatial, log_normalized=True)
imputed.iloc[:3, :5].round(2)

# %% [markdown]
# ## Confidence per gene
#
# `confidence` measures how well the panel predicts a gene in held-out reference cells. It requires no
# ground truth, so it is available for your own data too. Here we can compare it with the ground truth.

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
# Left: measured counts (hidden from the imputer); middle: imputed values; right: the difference. The
# counts are noisy; the imputed values are expectations, and smoother.

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
# On real data use confident genes only, and validate some of them in a second section or by in-situ
# hybridisation.
