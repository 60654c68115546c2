# %% [markdown]
# # Quick start
#
# Open a pretrained model, embed 2,700 blood cells, look at them, and carry cell types over from cells
# that have them to cells that do not. It takes a minute on a CPU.

# %%
import cellplm_jax as cellplm

model = cellplm.load("small")
print(f"{model.id}: {model.parameters:,} parameters, {len(model.genes):,} genes")

# %% [markdown]
# `"small"` comes with the package: a first, small model, good for learning the way. A folder,
# `gs://...` or `hf://organisation/name` opens in the same way.
#
# ## The cells
#
# Raw counts of the well-known PBMC3k data, which also come with the package. For your own data, write
# `adata = anndata.read_h5ad("cells.h5ad")`: raw counts, gene symbols or Ensembl ids, human or mouse.

# %%
adata = cellplm.datasets.pbmc3k()
adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
if FAST:
    adata = adata[:400].copy()
adata

# %% [markdown]
# ## Embed
#
# One call. Every cell gets a vector that depends on its own counts and on the cells it is embedded
# with. With several samples in the data, give `batch_key="sample"`, so that cells see those of their
# own sample.

# %%
cellplm.embed(adata, model)
genes = adata.uns["cellplm"]["input"]["genes"]
print("embedding:", adata.obsm["X_cellplm"].shape)
print("genes that the model knows:", genes["genes_matched"])

# %% [markdown]
# ## Look
#
# `cluster` finds neighbours and clusters in the embedding in scanpy's way, so that scanpy's functions
# go on from there.

# %%
import matplotlib.pyplot as plt
import scanpy as sc

cellplm.cluster(adata, resolution=0.5)
sc.tl.umap(adata)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
cellplm.plot.umap(adata.obsm["X_umap"], adata.obs["cell_type"], title="Cell types", ax=axes[0])
cellplm.plot.umap(adata.obsm["X_umap"], adata.obs["cellplm_cluster"], title="Clusters", ax=axes[1])
plt.show()

# %% [markdown]
# The cell types were named by seven marker genes each; the model has not seen them.
#
# ## Carry labels over
#
# Half of the cells keep their labels, the other half are named after their nearest neighbours in the
# embedding. This trains nothing. [The next notebook](02_annotate.ipynb) trains a classifier, which is
# better.

# %%
known, unknown = adata[::2].copy(), adata[1::2].copy()
annotator = cellplm.CellTypeAnnotator(model, method="neighbors", quiet=True)
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
# Before you rely on an embedding, compare: 50 principal components of your own data often do as well
# as a small model. *Choosing a method* in the documentation says when.
