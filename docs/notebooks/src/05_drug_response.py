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
# The treated cells of one type are removed, here monocytes. The untreated ones stay: in practice they are what you
# have. `covariate_key` names the groups that respond differently.

# %%
model = cellplm.load("small")


def fit_without(left_out):
    treated = adata.obs["treatment"] != "control"
    seen = adata[~(treated & (adata.obs["cluster_id"] == left_out)).to_numpy()].copy()
    predictor = cellplm.PerturbationPredictor(model, quiet=True)
    return predictor.fit(
        seen, perturbation_key="treatment", control="control", covariate_key="cluster_id"
    )


LEFT_OUT = "CD14+ Monocytes"
predictor = fit_without(LEFT_OUT)
predictor.predict("IFN-beta", group=LEFT_OUT)

# %% [markdown]
# ## Measured and predicted
#
# The change of the mean log-normalised expression of every gene. The baseline is the mean change of the other
# cell types, which is what an unspecific answer would be.

# %%
from cellplm_jax.evaluate.denoising import log_normalize


def changes(predictor, group):
    cells = adata[adata.obs["cluster_id"] == group]
    treated, logs = (cells.obs["treatment"] != "control").to_numpy(), log_normalize(cells.X)
    measured = np.asarray(logs[treated].mean(axis=0) - logs[~treated].mean(axis=0)).ravel()
    found = predictor.predict("IFN-beta", group=group).tidy().set_index("symbol")
    baseline = pd.Series(predictor.mean_change, found.index)
    columns = {"predicted": found["change"], "mean of the others": baseline}
    return pd.DataFrame({"measured": pd.Series(measured, cells.var_names), **columns}).dropna()


table = changes(predictor, LEFT_OUT)
largest = table.loc[table["measured"].abs().nlargest(20).index]
axes = cellplm.plot.effect_panels({f"{LEFT_OUT}, IFN-beta": largest})

# %% [markdown]
# ## Every cell type, left out in turn
#
# Error (RMSE) and correlation of the changes of all genes, next to the mean change of the other types.

# %%
rows = {}
for name in sorted(adata.obs["cluster_id"].unique()):
    table = changes(fit_without(name), name)
    for method in ("predicted", "mean of the others"):
        error = np.sqrt(((table[method] - table["measured"]) ** 2).mean())
        rows[name, f"RMSE, {method}"] = error
        rows[name, f"correlation, {method}"] = table[method].corr(table["measured"])
scores = pd.Series(rows).unstack()
scores.loc["mean"] = scores.mean()
scores.round(3)

# %% [markdown]
# The untreated cells of a type say which of the measured responses it shares. Genes that were never perturbed
# are another matter: there the mean change is rarely beaten, see *Choosing a method* in the documentation. On the
# command line: `cellplm perturb fit screen.h5ad --model small --perturbation-key treatment --covariate-key
# cluster_id --out predictor`.
