# %% [markdown]
# # Quick start
#
# Load a pretrained model, embed 2,700 blood cells, plot them, and transfer cell types from labelled to
# unlabelled cells. It takes a minute on a CPU.

# %%
import cellplm_jax as cellplm

model = cellplm.load("small")
print(f"{model.id}: {model.parameters:,} parameters, {len(model.genes):,} genes")

# %% [markdown]
# `"small"` is bundled with the package. Use it to try the API, not for analysis. `load` also accepts a
# folder, `gs://...` or `hf://organisation/name`.
#
# ## Data
#
# Raw counts of PBMC3k, also bundled with the package. For your own data, use
# `adata = anndata.read_h5ad("cells.h5ad")`: raw counts, gene symbols or Ensembl ids, human or mouse.

# %%
adata = cellplm.datasets.pbmc3k()
adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
adata

# %% [markdown]
# ## Embedding
#
# One call. The embedding of each cell depends on its counts and on the other cells of its context. If
# the data has several samples, pass `batch_key="sample"`, so that cells attend to cells of their own
# sample.

# %%
cellplm.embed(adata, model)
genes = adata.uns["cellplm"]["input"]["genes"]
print("embedding:", adata.obsm["X_cellplm"].shape)
print("genes that the model knows:", genes["genes_matched"])

# %% [markdown]
# ## Clustering and UMAP
#
# `cluster` computes the neighbour graph and Leiden clusters with scanpy's conventions, so you can
# continue with scanpy functions.

# %%
cellplm.cluster(adata, resolution=0.5)
panels = cellplm.plot.umap(adata, color=["cell_type", "cellplm_cluster"])

# %% [markdown]
# The cell types were assigned by seven marker genes each; the model does not use them.
#
# ## Label transfer
#
# Half of the cells keep their labels, the other half get the labels of their nearest neighbours in the
# embedding, without training. Both halves have the same types: detection of unknown types
# is off. [The next notebook](02_annotate.ipynb) trains a classifier, which is more
# accurate.

# %%
known, unknown = adata[::2].copy(), adata[1::2].copy()
annotator = cellplm.CellTypeAnnotator(model, method="neighbors", unknown_rate=None, quiet=True)
annotator.fit(known, label_key="cell_type")
annotator.predict(unknown)
right = unknown.obs["cellplm_cell_type"] == unknown.obs["cell_type"].astype(str)
print(f"{right.mean():.1%} of {unknown.n_obs} cells get the name that the marker genes gave them")

# %%
confidence = unknown.obs["cellplm_confidence"]
for low, high in ((0, 0.6), (0.6, 0.9), (0.9, 1.01)):
    chosen = (confidence >= low) & (confidence < high)
    if chosen.any():
        print(
            f"confidence {low:.1f} to {min(high, 1):.1f}: {chosen.sum():4d} cells, {right[chosen].mean():.0%} right"
        )

# %% [markdown]
# ## Baseline
#
# The same neighbours on 50 principal components of these cells. Compare before you rely on an embedding:
# within one file components are often as good as a small model; between studies they are not. See
# *Choosing a method* in the documentation.

# %%
from sklearn.neighbors import KNeighborsClassifier

from cellplm_jax.evaluate.embedding import pca_baseline

components = pca_baseline(adata.X)
rule = KNeighborsClassifier(15).fit(components[::2], known.obs["cell_type"].astype(str))
baseline = rule.predict(components[1::2]) == unknown.obs["cell_type"].astype(str).to_numpy()
print(f"embedding {right.mean():.1%}, components {baseline.mean():.1%}")
