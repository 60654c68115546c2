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
# Rows are the names that marker genes gave, columns the predictions; every row adds up to 1.

# %%
from sklearn.metrics import ConfusionMatrixDisplay

figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
ConfusionMatrixDisplay.from_predictions(
    cells.obs["cell_type"].astype(str),
    cells.obs["cellplm_cell_type"].astype(str),
    normalize="true",
    values_format=".2f",
    cmap="Blues",
    xticks_rotation=40,
    colorbar=False,
    ax=ax,
)
plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
plt.show()

# %% [markdown]
# ## When it knows
#
# Of the cells named with a confidence of 80 %, about 80 % should be right: points near the diagonal.
# Numbers are cells.

# %%
confidence = cells.obs["cellplm_confidence"].to_numpy()
right = (
    cells.obs["cellplm_cell_type"].astype(str) == cells.obs["cell_type"].astype(str)
).to_numpy()
part = np.digitize(confidence, [0.5, 0.7, 0.8, 0.9, 0.97])
figure, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
ax.plot([0.3, 1], [0.3, 1], color="0.7", lw=1)
for number in np.unique(part):
    chosen = part == number
    x, y = confidence[chosen].mean(), right[chosen].mean()
    ax.plot(x, y, "o", color="#0072B2")
    ax.annotate(f"{chosen.sum()}", (x, y), xytext=(-6, 6), textcoords="offset points", ha="right")
ax.set(xlabel="mean confidence", ylabel="share that is right", title="Calibration")
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
