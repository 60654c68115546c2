"""Start models of fine-tuning: a pretrained or new model adapted to a task's genes, latent, head and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cellplm_jax.config import ModelConfig
from cellplm_jax.errors import CheckpointError, explain
from cellplm_jax.model.cellplm import init_params
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.covariates import grow_rows

Path = tuple[str, ...]

# Modules that may be initialised: a head always is, a latent of another kind or a decoder may be.
_MAY_BE_NEW = ("head", "latent", "decoder")


def start_model(
    base: Pretrained | None,
    config: ModelConfig,
    genes: Sequence[str],
    *,
    seed: int = 0,
    gene_means: np.ndarray | None = None,
) -> tuple[Pretrained, list[str]]:
    """Return the model from which fine-tuning starts.

    Parameters are taken from the pretrained model if it has them: rows of genes by name, a deterministic latent
    from the map to the mean of q(z|x), new rows of covariates at the mean of the existing ones. All others are
    initialised and listed.

    Args:
        base: Pretrained model; None: everything is initialised.
        config: Architecture of the task; ``genes`` is set to the number of genes.
        genes: Vocabulary of the task, all of them genes of ``base``.
        seed: Seed of the initialisation.
        gene_means: float [genes]; without ``base``, the decoder's output bias is initialised to their logarithm.

    Returns:
        The model, and the paths of the initialised parameters.

    Raises:
        CheckpointError: A parameter of the pretrained model has a different shape than the task requires.
    """
    genes = list(genes)
    config = dataclasses.replace(config, genes=len(genes))
    initial = jax.jit(lambda: init_params(config, jax.random.key(seed)))()
    fresh = {path: np.asarray(leaf) for path, leaf in flatten_dict(initial).items()}
    if base is None:
        bias = ("decoder", "log_mean", "bias")
        if gene_means is not None and bias in fresh:
            fresh[bias] = np.log(np.asarray(gene_means, np.float32) + 1e-4)
        card = {"kind": "from scratch", "seed": seed}
        return Pretrained(config, unflatten_dict(fresh), genes, card, "scratch"), [
            "everything (no pretrained model)"
        ]
    # Rows by name: the genes of a fit are a subset, in another order.
    position = {gene: row for row, gene in enumerate(base.genes)}
    rows = np.array([position[gene] for gene in genes], int)
    old = flatten_dict(base.params)
    loaded: dict[Path, Any] = {}
    new = []
    for path, leaf in fresh.items():
        source = _source(path, old, np.shape(leaf))
        if source is None:
            if path[0] not in _MAY_BE_NEW:
                raise CheckpointError(_misfit(base, path, "does not have", np.shape(leaf)))
            new.append("/".join(path))
            loaded[path] = leaf
            continue
        axis = _gene_axis(path)
        value = old[source]
        loaded[path] = value if axis is None else np.take(value, rows, axis=axis)
    # New batches start at the mean of the known ones, which is how an unknown batch was decoded before.
    grown = flatten_dict(grow_rows(unflatten_dict(loaded), initial))
    for path, leaf in fresh.items():
        shape = np.shape(grown[path])
        if shape != np.shape(leaf):
            problem = f"has as {shape}"
            raise CheckpointError(_misfit(base, path, problem, np.shape(leaf)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.float32), unflatten_dict(grown))
    return Pretrained(config, params, genes, dict(base.card), base.source, base.step), new


def _source(
    path: Path,
    old: dict[Path, Any],
    shape: tuple[int, ...],
) -> Path | None:
    """Return the path of the pretrained parameter for a parameter, or None."""
    if path in old:
        return path
    # A deterministic latent continues the mean of q(z|x); its variance has no counterpart.
    if path[:2] == ("latent", "linear"):
        mean = ("latent", "mean", *path[2:])
        if mean in old and np.shape(old[mean]) == shape:
            return mean
    return None


def _gene_axis(path: Path) -> int | None:
    """Return the gene axis of a parameter."""
    if path == ("embedder", "gene_embedding"):
        return 0
    by_gene = ("log_mean", "zero_logits", "mean", "log_dispersion")
    return -1 if path[0] == "decoder" and path[1] in by_gene else None


def _misfit(base: Pretrained, path: Path, problem: str, shape: tuple[int, ...]) -> str:
    return explain(
        f"the task needs the parameter '{'/'.join(path)}' of shape {shape}, which '{base.id}' {problem}",
        "a pretrained model with the same widths",
        "Keep the configuration of the pretrained model, or start from scratch with model=None",
    )
