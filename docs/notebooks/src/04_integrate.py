# %% [markdown]
# # Integration of batches
#
# Blood cells of two patients, each with and without interferon: four samples that separate by sample instead
# of cell type. Real cells (Kang et al. 2018), which the model has not seen.

# %%
import cellplm_jax as cellplm

adata = cellplm.datasets.public("kang")  # see "Running the notebooks" for the file
adata.obs.groupby(["cluster_id", "sample_id"], observed=True).size().unstack()

# %% [markdown]
# ## Before
#
# The zero-shot embedding: samples are next to each other, not mixed.

# %%
model = cellplm.load("small")
cellplm.embed(adata, model, batch_key="sample_id", key_added="X_before")
panels = cellplm.plot.umap(adata, color=["sample_id", "cluster_id"], use_rep="X_before")

# %% [markdown]
# ## After
#
# `BatchIntegrator` aligns the batches without training and without labels. It also moves batches that come later
# to the same embedding.

# %%
integrator = cellplm.BatchIntegrator(model, quiet=True).fit(adata, batch_key="sample_id")
integrator.predict(adata)
del adata.obsm["X_umap"]
panels = cellplm.plot.umap(adata, color=["sample_id", "cluster_id"], use_rep="X_cellplm_integrated")

# %% [markdown]
# ## Compared with components and Harmony
#
# Mixing of samples: `ilisi` and `kbet` (also within types). Preserved types: `ari` and `nmi` of Leiden
# clusters, `knn_accuracy`, `label_silhouette`. Higher is better.

# %%
import pandas as pd

from cellplm_jax.evaluate.embedding import integration_scores, pca_baseline
from cellplm_jax.tasks.alignment import harmony, numbers_of

samples, types = adata.obs["sample_id"], adata.obs["cluster_id"]
components = pca_baseline(adata.X)
embeddings = {
    "components": components,
    "Harmony on components": harmony(components, numbers_of(samples)),
    "small, zero-shot": adata.obsm["X_before"],
    "BatchIntegrator": adata.obsm["X_cellplm_integrated"],
}
scores = pd.DataFrame(
    {name: integration_scores(values, samples, types) for name, values in embeddings.items()}
).T
scores[["ilisi", "kbet", "kbet_per_label", "ari", "nmi", "knn_accuracy", "label_silhouette"]].round(
    3
)

# %%
axes = cellplm.plot.comparison_bars(scores[["ilisi", "kbet_per_label", "ari", "knn_accuracy"]])

# %% [markdown]
# The samples are mixed better than by Harmony on components, within types too, and types are further apart
# (`label_silhouette`); clusters of both agree equally well with the types.
#
# Integration removes what distinguishes the samples, here also the response to interferon: it is for finding the
# same types in all samples. The response is the subject of [the next notebook](05_drug_response.ipynb).
