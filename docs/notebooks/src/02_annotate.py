# %% [markdown]
# # Annotate cell types
#
# Train a classifier on labelled cells, see where it errs and when it knows that it may, save it, and
# open it elsewhere.

# %%
import cellplm_jax as cellplm

model = cellplm.load("small")
adata = cellplm.datasets.pbmc3k()
adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
if FAST:
    adata = adata[:500].copy()

# %% [markdown]
# ## Training cells and new cells
#
# Two of three cells are for training; the third is new to the model. In your own work these are two
# data sets.

# %%
import numpy as np

new = np.random.default_rng(0).random(adata.n_obs) < 1 / 3
labelled, cells = adata[~new].copy(), adata[new].copy()
labelled.obs["cell_type"].value_counts()

# %% [markdown]
# ## Fit
#
# A tenth of the labelled cells is held back to stop in time and to calibrate the probabilities. With
# several samples, give `batch_key="sample"`. The default is at most 200 epochs; 15 are enough for a
# first look.

# %%
annotator = cellplm.CellTypeAnnotator(model, epochs=2 if FAST else 15, quiet=True)
annotator.fit(labelled, label_key="cell_type")
print(*annotator.messages, sep="\n")

# %%
import matplotlib.pyplot as plt

annotator.plot_history()
plt.show()

# %% [markdown]
# ## Predict

# %%
annotator.predict(cells)
cells.obs[["cell_type", "cellplm_cell_type", "cellplm_confidence"]].head()

# %%
{name: round(value, 3) for name, value in annotator.score(cells, label_key="cell_type").items()}

# %% [markdown]
# ## Where it errs
#
# Rows are the names that marker genes gave, columns the predictions; colours are shares of a row.

# %%
from cellplm_jax.evaluate.annotation import confusion_table

true = cells.obs["cell_type"].astype(str)
predicted = cells.obs["cellplm_cell_type"].astype(str)
cellplm.plot.confusion_matrix(confusion_table(true, predicted))
plt.show()

# %% [markdown]
# ## When it knows
#
# Of the cells named with a confidence of 80 %, about 80 % should be right: points near the diagonal.
# Numbers are cells.

# %%
cellplm.plot.calibration(predicted == true, cells.obs["cellplm_confidence"])
plt.show()

# %% [markdown]
# A cell of a kind that was not in the training data still gets one of the known names. `unknown_threshold`
# calls it "unknown" where the confidence is low.

# %%
annotator.unknown_threshold = 0.7
annotator.predict(cells)
print(
    (cells.obs["cellplm_cell_type"] == "unknown").sum(), "of", cells.n_obs, "cells are left unnamed"
)

# %% [markdown]
# ## Save, and open elsewhere
#
# A fitted annotator is a folder that opens alone, with the same predictions.

# %%
annotator.save("annotator")
again = cellplm.CellTypeAnnotator.load("annotator", quiet=True)
before = cells.obsm["cellplm_probabilities"].copy()
again.predict(cells)
print("largest difference:", np.abs(before - cells.obsm["cellplm_probabilities"]).max())

# %% [markdown]
# `annotator.push_to_hub("organisation/name")` publishes it on the Hugging Face Hub with a model card.
# The same from the command line: `cellplm annotate fit labelled.h5ad --model small --label-key
# cell_type --out annotator`.
