# %% [markdown]
# # Pretraining
#
# Prepare a corpus, train, monitor, stop and resume. This example uses the bundled blood cells and a
# tiny model for a free machine; the steps are the same for many files and larger configurations.

# %%
import cellplm_jax as cellplm

adata = cellplm.datasets.pbmc3k()
adata.obs["sample"] = [f"part {number % 6}" for number in range(adata.n_obs)]
adata.write_h5ad("cells.h5ad")

# %% [markdown]
# ## Corpus preparation
#
# Any number of `.h5ad` files are converted to one corpus with one gene vocabulary, in blocks.
# `--sample-key` names the column with the tissue sample of each cell; a sample corresponds to a
# sentence of a language model.

# %% language="bash"
# cellplm prepare cells.h5ad --out corpus --sample-key sample --workers 0 2> prepare.log
# cellplm info corpus

# %% [markdown]
# ## Training
#
# `"debug"` is tiny; the other presets are `"small"`, `"85m"` (the published architecture) and `"1b"`.
# Every field of the configuration can be overridden.

# %%
import dataclasses

config = cellplm.preset("debug")
config = dataclasses.replace(
    config,
    steps=240,
    evaluate_every=40,
    checkpoint_every=40,
    log_every=5,
)

# %% [markdown]
# The machine of a free notebook may be preempted. This run is therefore stopped half-way: `preempted`
# is called after each step; if it returns True, the run saves and stops.

# %%
result = cellplm.pretrain(
    "corpus", config, "run", quiet=True, preempted=lambda step: step >= config.steps // 2
)
print(f"stopped at step {result.step} of {config.steps}")

# %% [markdown]
# ## Resuming
#
# The same call with the same folder resumes from the last checkpoint, with the same batches as an
# uninterrupted run.

# %%
result = cellplm.pretrain("corpus", config, "run", quiet=True)
print(f"now at step {result.step}")
print({name: round(float(value), 3) for name, value in result.heldout.items()})

# %% [markdown]
# ## Monitoring
#
# `metrics.jsonl` is written during training, and can be plotted at any time, also from another
# notebook. Held-out scores hide some genes of cells that are not used for training.

# %%
import matplotlib.pyplot as plt

cellplm.plot.training_curves("run/metrics.jsonl")
plt.show()

# %% [markdown]
# ## Using the model
#
# `load` accepts the folder of a run and selects its best step.

# %%
model = cellplm.load("run")
cellplm.embed(adata, model)
model.card["name"] = "my-blood-cells"
model.card["data"] = "10x Genomics PBMC3k, raw counts (CC BY 4.0)"
model.save("model", format="safetensors")
print(f"{model.id}: {model.parameters:,} parameters; embedding {adata.obsm['X_cellplm'].shape}")

# %% [markdown]
# `model.push_to_hub("organisation/name")` publishes it, with a model card generated from
# `model.card`: describe its training data there. On Colab, keep `run` on a mounted drive or at a
# `gs://` address. A model this small, trained for seconds, has no practical use: `"small"` took 40
# minutes on 49,166 cells.
