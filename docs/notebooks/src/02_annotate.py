# %% [markdown]
# # Cell type annotation
#
# Train a classifier on labelled cells, evaluate its errors and its calibration, save it, and load it
# again.

# %%
import cellplm_jax as cellplm

model = cellplm.load("small")
adata = cellplm.datasets.pbmc3k()
adata = adata[adata.obs["cell_type"] != "unassigned"].copy()

# %% [markdown]
# ## Training cells and new cells
#
# Two thirds of the cells are for training, one third is new to the model. With your own data these are
# two data sets.

# %%
import numpy as np

new = np.random.default_rng(0).random(adata.n_obs) < 1 / 3
labelled, cells = adata[~new].copy(), adata[new].copy()
labelled.obs["cell_type"].value_counts()

# %% [markdown]
# ## Fitting
#
# A tenth of the labelled cells is held out for early stopping and to calibrate the probabilities. With
# several samples, pass `batch_key="sample"`. The default maximum is 200 epochs; 15 are enough for this
# example.

# %%
annotator = cellplm.CellTypeAnnotator(model, unknown_rate=None, epochs=15, quiet=True)
annotator.fit(labelled, label_key="cell_type")
print(*annotator.messages, sep="\n")

# %%
import matplotlib.pyplot as plt

annotator.plot_history()
plt.show()

# %% [markdown]
# ## Prediction

# %%
annotator.predict(cells)
cells.obs[["cell_type", "cellplm_cell_type", "cellplm_confidence"]].head()

# %%
{name: round(value, 3) for name, value in annotator.score(cells, label_key="cell_type").items()}

# %% [markdown]
# The baseline: logistic regression on log-normalised counts, fitted to the same cells. The annotator
# averages it with the network; the calibrated confidence is what it adds.

# %%
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from cellplm_jax.evaluate.components import log_normalized

linear = LogisticRegression(max_iter=300).fit(log_normalized(labelled.X), labelled.obs["cell_type"])
guess = linear.predict(log_normalized(cells.X))
truth = cells.obs["cell_type"]
baseline = {
    "accuracy": accuracy_score(truth, guess),
    "macro_f1": f1_score(truth, guess, average="macro"),
}
{name: round(float(value), 3) for name, value in baseline.items()}

# %% [markdown]
# ## Confusion matrix
#
# Rows are the labels from marker genes, columns the predictions; colours are fractions of each row.

# %%
from cellplm_jax.evaluate.annotation import confusion_table

true = cells.obs["cell_type"].astype(str)
predicted = cells.obs["cellplm_cell_type"].astype(str)
cellplm.plot.confusion_matrix(confusion_table(true, predicted))
plt.show()

# %% [markdown]
# ## Calibration
#
# Of the cells labelled with a confidence of 80 %, about 80 % should be correct: points near the
# diagonal. Numbers are cells.

# %%
cellplm.plot.calibration(predicted == true, cells.obs["cellplm_confidence"])
plt.show()

# %% [markdown]
# Every type of these cells has labels, so `unknown_rate=None` leaves detection of unknown types off. With
# `unknown_threshold`, cells with a low
# confidence are labelled "unknown".

# %%
annotator.unknown_threshold = 0.7
annotator.predict(cells)
print(
    (cells.obs["cellplm_cell_type"] == "unknown").sum(), "of", cells.n_obs, "cells are left unnamed"
)

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
# `annotator.push_to_hub("organisation/name")` publishes it on the Hugging Face Hub with a model card.
# On the command line: `cellplm annotate fit labelled.h5ad --model small --label-key
# cell_type --out annotator`.
