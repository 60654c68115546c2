# %% [markdown]
# # Conversion of a published checkpoint
#
# The authors of CellPLM published PyTorch checkpoints. `cellplm convert` converts them in both
# directions, without unpickling objects. We cannot distribute the files, so this notebook first creates
# a small checkpoint in the same format with random weights: use it to try the API, not for
# embedding.
#
# ## Published files
#
# Download `20230926_85M.best.ckpt` and `20230926_85M.config.json` from the location in the original's
# README, and put both in this notebook's folder (on Colab: the folder symbol on the left, then
# *Upload*), renamed to `published.best.ckpt` and `published.config.json`. The cells below then use them.

# %%
import dataclasses
from pathlib import Path

import cellplm_jax as cellplm

if not Path("published.best.ckpt").exists():
    # The published architecture, narrower, over the genes of the bundled model.
    genes = cellplm.load("small").genes
    config = cellplm.preset("85m", len(genes)).model
    config = dataclasses.replace(
        config,
        hidden=64,
        encoder=dataclasses.replace(config.encoder, layers=2, heads=4),
        positions=dataclasses.replace(config.positions, kind="none"),
        latent=dataclasses.replace(config.latent, size=32, inference="released"),
        decoder=dataclasses.replace(config.decoder, hidden=64),
    )
    made = cellplm.Pretrained.untrained(config, genes)
    made.save("made")

# %% language="bash"
# if [ -d made ]; then cellplm convert made --to-torch published; fi

# %%
print(*sorted(path.name for path in Path(".").glob("published.*")), sep="\n")

# %% [markdown]
# ## Conversion
#
# Each parameter is converted or listed as unused, with the reason.

# %% language="bash"
# cellplm convert published.best.ckpt --config published.config.json --out model

# %% [markdown]
# ## Using the model
#
# The remaining cells do not need PyTorch.

# %%
adata = cellplm.datasets.pbmc3k()[:1000].copy()
model = cellplm.load("model")
cellplm.embed(adata, model)
print(f"{model.id}: {model.parameters:,} parameters; embedding {adata.obsm['X_cellplm'].shape}")
print("positions:", model.config.positions.kind)

# %% [markdown]
# Published checkpoints were trained without positions (the released code multiplies them by 0), so a
# converted model has none, and coordinates change nothing.
#
# For the random checkpoint we know the original model:

# %%
import numpy as np

if Path("made").exists():
    other = cellplm.embed(adata.copy(), made)
    print("largest difference:", np.abs(adata.obsm["X_cellplm"] - other.obsm["X_cellplm"]).max())

# %% [markdown]
# ## Conversion to PyTorch
#
# For tools that require the original format. The weights are bitwise identical.

# %% language="bash"
# cellplm convert model --to-torch again

# %%
import torch

one = torch.load("published.best.ckpt", weights_only=True)["model_state_dict"]
two = torch.load("again.best.ckpt", weights_only=True)["model_state_dict"]
same = sum(torch.equal(one[name], two[name]) for name in one)
print(f"{same} of {len(one)} tensors are the same")
