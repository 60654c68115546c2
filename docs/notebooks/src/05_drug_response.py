# %% [markdown]
# # Drug response in an unseen cell type
#
# Interferon beta was measured in some cell types; predict its effect in another one from its untreated cells
# alone. Real cells (Kang et al. 2018), which the model has not seen.

# %%
import numpy as np
import pandas as pd

import cellplm_jax as cellplm

adata = cellplm.datasets.public("kang")  # see "Running the notebooks" for the file
adata.obs["treatment"] = np.where(adata.obs["group_id"] == "stim", "IFN-beta", "control")
adata.obs.groupby(["cluster_id", "treatment"], observed=True).size().unstack()

# %% [markdown]
# ## Leave one cell type out
#
# The treated B cells are removed from the training cells. The untreated ones stay: in practice they are what
# you have.

# %%
model = cellplm.load("small")


def fit_without(left_out):
    seen = adata[~((adata.obs["cluster_id"] == left_out) & (adata.obs["treatment"] != "control"))]
    predictor = cellplm.PerturbationPredictor(model, quiet=True)
    return predictor.fit(
        seen.copy(),
        perturbation_key="treatment",
        control="control",
        covariate_key="cluster_id",
    )


LEFT_OUT = "B cells"
predictor = fit_without(LEFT_OUT)
found = predictor.predict(["IFN-beta"], group=LEFT_OUT)
found

# %% [markdown]
# ## Measured and predicted
#
# The change of the mean log-normalised expression. The baseline is the mean change of the other cell types.

# %%
from cellplm_jax.evaluate.denoising import log_normalize

cells = adata[adata.obs["cluster_id"] == LEFT_OUT].copy()
treated = (cells.obs["treatment"] != "control").to_numpy()
logs = log_normalize(cells.X)
table = pd.DataFrame(
    {"measured": np.asarray(logs[treated].mean(axis=0) - logs[~treated].mean(axis=0)).ravel()},
    cells.var_names,
)
predicted = found.tidy().set_index("symbol")
table["predicted"] = predicted["change"]
table["mean of the others"] = pd.Series(predictor.mean_change, predicted.index)
table = table.dropna()
largest = table.reindex(table["measured"].abs().sort_values(ascending=False).index[:20])
axes = cellplm.plot.effect_panels({f"{LEFT_OUT}, IFN-beta": largest})

# %% [markdown]
# ## Every cell type, left out in turn
#
# Error (RMSE) and correlation of the changes of all genes, next to the mean change of the other types.

# %%
rows = {}
for name in sorted(adata.obs["cluster_id"].unique()):
    fitted = fit_without(name)
    score = fitted.score(adata[adata.obs["cluster_id"] == name].copy())
    rows[name] = {
        "RMSE": score["rmse"],
        "RMSE, mean change": score["mean_change_rmse"],
        "correlation": score["pearson"],
        "correlation, mean change": score["mean_change_pearson"],
    }
scores = pd.DataFrame(rows).T
scores.loc["mean"] = scores.mean()
scores.round(3)

# %% [markdown]
# The untreated cells of a type say which of the measured responses it shares. Genes that were never perturbed
# are another matter: there the mean change is rarely beaten, see *Choosing a method*. The same on the command
# line: `cellplm perturb fit screen.h5ad --model small --perturbation-key treatment --covariate-key cluster_id`.
