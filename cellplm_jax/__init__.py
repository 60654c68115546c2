"""CellPLM in JAX: a cell language model for single-cell and spatial transcriptomics.

Importing this package imports neither jax nor anndata; names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cellplm_jax._version import __version__

if TYPE_CHECKING:
    from cellplm_jax.config import FinetuneConfig, ModelConfig, TrainConfig
    from cellplm_jax.data import datasets
    from cellplm_jax.errors import (
        CellPLMError,
        CheckpointError,
        ConfigError,
        InputError,
        MissingDependencyError,
    )
    from cellplm_jax.presets import preset
    from cellplm_jax.tasks.annotate import CellTypeAnnotator
    from cellplm_jax.tasks.attention_weights import cell_attention
    from cellplm_jax.tasks.cluster import cluster, cluster_file
    from cellplm_jax.tasks.denoise import Denoiser
    from cellplm_jax.tasks.embed import embed, embed_file
    from cellplm_jax.tasks.embed_corpus import embed_corpus
    from cellplm_jax.tasks.export import export_model
    from cellplm_jax.tasks.gene_embeddings import gene_embeddings
    from cellplm_jax.tasks.impute import GeneImputer
    from cellplm_jax.tasks.integrate import BatchIntegrator
    from cellplm_jax.tasks.niches import niches, niches_file
    from cellplm_jax.tasks.perturb import PerturbationPredictor
    from cellplm_jax.tasks.pretrain import pretrain
    from cellplm_jax.tasks.pretrained import Pretrained, load
    from cellplm_jax.tasks.samples import SampleClassifier

_WHERE = {
    "BatchIntegrator": "cellplm_jax.tasks.integrate",
    "CellPLMError": "cellplm_jax.errors",
    "CellTypeAnnotator": "cellplm_jax.tasks.annotate",
    "CheckpointError": "cellplm_jax.errors",
    "ConfigError": "cellplm_jax.errors",
    "Denoiser": "cellplm_jax.tasks.denoise",
    "FinetuneConfig": "cellplm_jax.config",
    "GeneImputer": "cellplm_jax.tasks.impute",
    "InputError": "cellplm_jax.errors",
    "MissingDependencyError": "cellplm_jax.errors",
    "ModelConfig": "cellplm_jax.config",
    "PerturbationPredictor": "cellplm_jax.tasks.perturb",
    "Pretrained": "cellplm_jax.tasks.pretrained",
    "SampleClassifier": "cellplm_jax.tasks.samples",
    "TrainConfig": "cellplm_jax.config",
    "cell_attention": "cellplm_jax.tasks.attention_weights",
    "cluster": "cellplm_jax.tasks.cluster",
    "cluster_file": "cellplm_jax.tasks.cluster",
    "embed": "cellplm_jax.tasks.embed",
    "embed_corpus": "cellplm_jax.tasks.embed_corpus",
    "embed_file": "cellplm_jax.tasks.embed",
    "export_model": "cellplm_jax.tasks.export",
    "gene_embeddings": "cellplm_jax.tasks.gene_embeddings",
    "load": "cellplm_jax.tasks.pretrained",
    "niches": "cellplm_jax.tasks.niches",
    "niches_file": "cellplm_jax.tasks.niches",
    "preset": "cellplm_jax.presets",
    "pretrain": "cellplm_jax.tasks.pretrain",
}
_MODULES = {"datasets": "cellplm_jax.data.datasets", "plot": "cellplm_jax.plot"}

__all__ = [*_WHERE, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        msg = f"module 'cellplm_jax' has no attribute '{name}'"
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
