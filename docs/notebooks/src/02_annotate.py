# %% [markdown]
# # Annotation with an unknown type
#
# Train a classifier on labelled blood cells that lack one cell type, and find the cells of that type among new
# cells. Real cells, bundled with the package.

# %%
import numpy as np

import cellplm_jax as cellplm

model = cellplm.load("small")
adata = cellplm.datasets.pbmc3k()
adata = adata[adata.obs["cell_type"] != "unassigned"].copy()

# %% [markdown]
# ## Labelled cells and new cells
#
# Half of the cells are labelled, without NK cells. The other half is new, with NK cells. With your own data
# these are two data sets.

# %%
NEW_TYPE = "NK cell"
half = np.random.default_rng(0).random(adata.n_obs) < 0.5
labelled = adata[half & (adata.obs["cell_type"] != NEW_TYPE).to_numpy()].copy()
cells = adata[~half].copy()
cells.obs["cell_type"].value_counts()

# %% [markdown]
# ## Fitting and prediction
#
# Detection of unknown types is on by default. `unknown_rate=0.05` is the share of known cells that may be
# flagged.

# %%
annotator = cellplm.CellTypeAnnotator(model, epochs=15, quiet=True)
annotator.fit(labelled, label_key="cell_type")
annotator.predict(cells)
cellplm.embed(cells, model, adapt="context", quiet=True)
colors = cellplm.plot.category_colors(cells.obs["cell_type"])  # the same in both panels
panels = cellplm.plot.umap(
    cells, color=["cell_type", "cellplm_cell_type", "cellplm_unknown_score"], palette=colors
)

# %% [markdown]
# ## Is the new type found?
#
# The baseline is what many pipelines do: logistic regression on log-normalised counts, and its confidence.
# AUROC: does the score rank cells of the new type above all others? 0.5 is chance.

# %%
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from cellplm_jax.evaluate.annotation import auroc
from cellplm_jax.evaluate.components import log_normalized

truth = cells.obs["cell_type"].astype(str).to_numpy()
new = truth == NEW_TYPE
linear = LogisticRegression(max_iter=300).fit(log_normalized(labelled.X), labelled.obs["cell_type"])
probability = linear.predict_proba(log_normalized(cells.X))
# As many cells as the annotator flags.
flagged = (cells.obs["cellplm_cell_type"] == "unknown").to_numpy()
doubt = 1 - probability.max(axis=1)
doubted = doubt >= np.sort(doubt)[-max(flagged.sum(), 1)]
pd.DataFrame(
    {
        "AUROC": [auroc(new, cells.obs["cellplm_unknown_score"].to_numpy()), auroc(new, doubt)],
        "new cells flagged": [flagged[new].mean(), doubted[new].mean()],
        "known cells flagged": [flagged[~new].mean(), doubted[~new].mean()],
    },
    ["CellTypeAnnotator", "logistic regression, same number flagged"],
).round(3)

# %% [markdown]
# The reasons that the annotator gives:

# %%
cells.obs.loc[flagged, "cellplm_unknown_reason"].astype(str).value_counts().head(3)

# %% [markdown]
# ## The known types
#
# Both methods have labels for the other types. Macro F1 of the known cells:

# %%
known = cells[~new].copy()
score = annotator.score(known, label_key="cell_type")
guess = linear.predict(log_normalized(known.X))
baseline = f1_score(truth[~new], guess, average="macro")
print(f"CellTypeAnnotator {score['macro_f1']:.3f}, logistic regression {baseline:.3f}")
print(f"calibration error of the annotator {score['calibration_error']:.3f}")

# %% [markdown]
# ## Confusion matrix
#
# Rows are the labels from marker genes, columns the predictions; colours are fractions of each row.

# %%
from cellplm_jax.evaluate.annotation import confusion_table

predicted = cells.obs["cellplm_cell_type"].astype(str)
axes = cellplm.plot.confusion_matrix(confusion_table(truth, predicted))

# %% [markdown]
# ## Saving and loading
#
# A fitted annotator is saved to a self-contained folder; a loaded one makes the same predictions.

# %%
annotator.save("annotator")
again = cellplm.CellTypeAnnotator.load("annotator", quiet=True)
before = cells.obsm["cellplm_probabilities"].copy()
again.predict(cells)
print("largest difference:", np.abs(before - cells.obsm["cellplm_probabilities"]).max())

# %% [markdown]
# All types of four data sets, left out one at a time: *Unknown cell types* in the documentation. On the command
# line: `cellplm annotate fit labelled.h5ad --model small --label-key cell_type --out annotator`.
