# %% [markdown]
# # Convert a published checkpoint
#
# The authors of CellPLM published PyTorch checkpoints. `cellplm convert` makes one of ours of it, without unpickling
# anything, and back. The file itself is not ours to ship, so this notebook makes one of the same form first; with the real
# one, begin at *Convert*.
#
# ## The real file
#
# Get `20230926_85M.best.ckpt` and `20230926_85M.config.json` from where the original's README points to, and put both in
# this notebook's folder (on Colab: the folder symbol on the left, then *Upload*). Then set
# `PREFIX = "20230926_85M"` below.

# %%
from pathlib import Path

import cellplm_jax as cellplm

PREFIX = "published"
if not Path(f"{PREFIX}.best.ckpt").exists():
    cellplm.load("small").save("small_model")
    # !cellplm convert small_model --to-torch {PREFIX}
print(*sorted(path.name for path in Path(".").glob(f"{PREFIX}.*")), sep="\n")

# %% [markdown]
# ## Convert
#
# Each parameter is converted or listed as unused, with the reason.

# %%
# !cellplm convert {PREFIX}.best.ckpt --config {PREFIX}.config.json --out model

# %% [markdown]
# ## Use it
#
# From here on PyTorch is not needed.

# %%
adata = cellplm.datasets.pbmc3k()[: 200 if FAST else 1000].copy()
model = cellplm.load("model")
cellplm.embed(adata, model)
print(f"{model.id}: {model.parameters:,} parameters; embedding {adata.obsm['X_cellplm'].shape}")
print("positions:", model.config.positions.kind)

# %% [markdown]
# Published checkpoints were trained without positions (the released code multiplies them away), and a converted model has
# none. PBMC3k has no coordinates, so here the embedding is that of the model we started from:

# %%
import numpy as np

if Path("small_model").exists():
    other = cellplm.embed(adata.copy(), "small_model")
    print("largest difference:", np.abs(adata.obsm["X_cellplm"] - other.obsm["X_cellplm"]).max())

# %% [markdown]
# ## And back
#
# For tools that need the original's form. The weights come back bit by bit.

# %%
# !cellplm convert model --to-torch again

# %%
import torch

one = torch.load(f"{PREFIX}.best.ckpt", weights_only=True)["model_state_dict"]
two = torch.load("again.best.ckpt", weights_only=True)["model_state_dict"]
same = sum(torch.equal(one[name], two[name]) for name in one)
print(f"{same} of {len(one)} tensors are the same")
