# %% [markdown]
# # Quick start
#
# Embed 2,700 blood cells with the bundled model, cluster them, and label them from five examples per cell
# type. Real cells, one minute on a laptop.

# %%
import cellplm_jax as cellplm

model = cellplm.load("small")
print(f"{model.id}: {model.parameters:,} parameters, {len(model.genes):,} genes")

# %% [markdown]
# ## Data
#
# Raw counts of PBMC3k (10x Genomics), bundled with the package and unseen by the model. For your own data,
# use `adata = anndata.read_h5ad("cells.h5ad")`: raw counts, gene symbols or Ensembl ids, human or mouse.
# The cell types come from seven marker genes each; the model does not use them.

# %%
adata = cellplm.datasets.pbmc3k()
adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
adata.obs["cell_type"].value_counts()

# %% [markdown]
# ## Embedding and clusters
#
# `adapt="context"` joins the model's latent with the components of these cells. `cluster` writes Leiden
# clusters in scanpy's format.

# %%
cellplm.embed(adata, model, adapt="context")
cellplm.cluster(adata)
panels = cellplm.plot.umap(adata, color=["cell_type", "cellplm_cluster"])

# %% [markdown]
# Each cell type maps to its own clusters. The rows are types, the columns clusters, in per cent of a type's
# cells:

# %%
import pandas as pd

table = pd.crosstab(adata.obs["cell_type"], adata.obs["cellplm_cluster"], normalize="index")
axes = cellplm.plot.heat_map(100 * table, value_label="% of the type's cells")

# %% [markdown]
# ## Compared with principal components
#
# The same cells, the same clustering: ARI and NMI compare clusters with types, `knn_accuracy` asks whether
# the 15 nearest cells are of the same type. 1 is best.

# %%
from cellplm_jax.evaluate.embedding import integration_scores, pca_baseline

components = pca_baseline(adata.X)
embeddings = {"cellplm": adata.obsm["X_cellplm"], "components": components}
scores = {
    name: integration_scores(values, None, adata.obs["cell_type"])
    for name, values in embeddings.items()
}
pd.DataFrame(scores).T[["ari", "nmi", "knn_accuracy"]].round(3)

# %% [markdown]
# ## Five labels per type
#
# Label five cells of each type by hand, and let logistic regression label the others: on the embedding, on the
# components, and on the log-normalised genes. Ten draws of the five cells:

# %%
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from cellplm_jax.evaluate.components import log_normalized

DRAWS = 10
inputs = {**embeddings, "genes": log_normalized(adata.X)}
types = adata.obs["cell_type"].astype(str).to_numpy()
few = pd.DataFrame(index=range(DRAWS), columns=list(inputs), dtype=float)
for draw in range(DRAWS):
    random = np.random.default_rng(draw)
    own = [np.flatnonzero(types == name) for name in np.unique(types)]
    labelled = np.concatenate([random.choice(cells, 5, replace=False) for cells in own])
    others = np.setdiff1d(np.arange(len(types)), labelled)
    for name, values in inputs.items():
        fit = LogisticRegression(max_iter=1000).fit(values[labelled], types[labelled])
        guess = fit.predict(values[others])
        few.loc[draw, name] = f1_score(types[others], guess, average="macro")
print("macro F1 of the other cells, mean and range of the draws")
few.agg(["mean", "min", "max"]).T.round(3)

# %% [markdown]
# Within one file, clusters of components are nearly as good. The embedding helps when labels are few, when
# they come from another study, or when there are several batches. Next: [annotation with an unknown
# type](02_annotate.ipynb), [tissue](03_tissue.ipynb), [batches](04_integrate.ipynb).
