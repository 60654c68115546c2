# %% [markdown]
# # Pretrain your own
#
# Prepare a corpus, train, watch, stop, go on. Here on the bundled blood cells and with a tiny model,
# so that it fits a free machine; on many files and a larger configuration the steps are the same.

# %%
import cellplm_jax as cellplm

adata = cellplm.datasets.pbmc3k()
adata.obs["sample"] = [f"part {number % 6}" for number in range(adata.n_obs)]
if FAST:
    adata = adata[:600].copy()
adata.write_h5ad("cells.h5ad")

# %% [markdown]
# ## Prepare
#
# Any number of `.h5ad` files become one corpus: checked, with one gene vocabulary, read in pieces.
# `--sample-key` names the tissue sample of each cell; a sample is to the model what a sentence is to
# a language model.

# %% language="bash"
# cellplm prepare cells.h5ad --out corpus --sample-key sample --workers 0 2> prepare.log
# cellplm info corpus

# %% [markdown]
# ## Train
#
# `"debug"` is tiny; `"small"`, `"85m"` (the published architecture) and `"1b"` are the others. Every
# field of the configuration can be replaced.

# %%
import dataclasses

config = cellplm.preset("debug")
config = dataclasses.replace(
    config,
    steps=30 if FAST else 240,
    evaluate_every=10 if FAST else 40,
    checkpoint_every=10 if FAST else 40,
    log_every=5,
)

# %% [markdown]
# The machine of a free notebook may go away. So this run is stopped on purpose half-way: `preempted`
# is asked after each step, and saves and ends the run when it says so.

# %%
result = cellplm.pretrain(
    "corpus", config, "run", quiet=True, preempted=lambda step: step >= config.steps // 2
)
print(f"stopped at step {result.step} of {config.steps}")

# %% [markdown]
# ## Resume
#
# The same call with the same folder goes on from the last checkpoint, with the batches that would
# have come next.

# %%
result = cellplm.pretrain("corpus", config, "run", quiet=True)
print(f"now at step {result.step}")
print({name: round(float(value), 3) for name, value in result.heldout.items()})

# %% [markdown]
# ## Watch
#
# `metrics.jsonl` is written while it trains, and can be drawn at any time, from another notebook too.
# Held-out scores hide a part of the genes of cells that are never trained on.

# %%
import matplotlib.pyplot as plt

cellplm.plot.training_curves("run/metrics.jsonl")
plt.show()

# %% [markdown]
# ## Use it
#
# A run's folder opens like any model, at its best step.

# %%
model = cellplm.load("run")
cellplm.embed(adata, model)
model.card["name"] = "my-blood-cells"
model.card["data"] = "10x Genomics PBMC3k, raw counts (CC BY 4.0)"
model.save("model", format="safetensors")
print(f"{model.id}: {model.parameters:,} parameters; embedding {adata.obsm['X_cellplm'].shape}")

# %% [markdown]
# `model.push_to_hub("organisation/name")` publishes it, with a model card made from what is in
# `model.card`: write there what it was trained on. On Colab, keep `run` in a mounted drive or at a
# `gs://` address. A model this small, trained for seconds, is good for nothing: `"small"` took 12
# minutes on 84,047 cells, and is a first step only.
