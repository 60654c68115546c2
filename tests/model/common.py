"""What the model and loss tests share: tiny configurations, parameters without biases at zero, padded batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import DecoderConfig, EncoderConfig, LatentConfig, ModelConfig

GENES, HIDDEN = 40, 32


def tiny(**changes: Any) -> ModelConfig:
    """Return a tiny model; keyword arguments replace fields, dictionaries replace fields of the parts."""
    config = ModelConfig(
        genes=GENES,
        hidden=HIDDEN,
        dropout=0.2,
        encoder=EncoderConfig(layers=2, heads=4),
        latent=LatentConfig(size=8, clusters=3),
        decoder=DecoderConfig(hidden=16, bottleneck=12),
    )
    parts = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, Mapping)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **parts)


def shapes_of(module: nn.Module, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """Return the parameter tree of a module as shapes, without computing anything."""
    streams = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def init():
        return module.init(streams, *arguments, **keywords)

    return jax.eval_shape(init).get("params", {})


def random_params(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Fill a parameter tree with numbers far from the initial ones: no zero bias, no unit scale."""
    generator = np.random.default_rng(seed)
    filled = {}
    for path, leaf in flatten_dict(shapes).items():
        values = generator.standard_normal(leaf.shape)
        if path[-1] == "kernel":
            values *= 1.5 / np.sqrt(leaf.shape[0])
        elif path[-1] == "scale":
            values = 1.0 + 0.3 * values
        else:
            values *= 0.4
        filled[path] = jnp.asarray(values, jnp.float32)
    return unflatten_dict(filled)


@partial(jax.jit, static_argnames=("module", "train", "method"))
def _apply(module, params, arguments, keywords, rngs, train, method):
    if train is not None:
        keywords = keywords | {"train": train}
    return module.apply({"params": params}, *arguments, method=method, rngs=rngs, **keywords)


def apply(
    module: nn.Module,
    params: Mapping[str, Any],
    *arguments: Any,
    train: bool | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    method: Any = None,
    **keywords: Any,
) -> Any:
    """Run a module compiled, which is faster here than operation by operation; equal calls share the program."""
    return _apply(module, params, arguments, keywords, rngs, train, method)


def float64(tree: Any) -> Any:
    """Return a tree of arrays as float64 numpy arrays."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def random_counts(
    cells: int, *, seed: int = 0, genes: int = GENES, rate: float = 1.0
) -> np.ndarray:
    """Return int [cells, genes]: overdispersed counts, about half of them zero."""
    generator = np.random.default_rng(seed)
    return generator.negative_binomial(1, 1 / (1 + 2 * rate), (cells, genes))


def make_batch(
    dense: Sequence[np.ndarray],
    *,
    cells: int | None = None,
    extra_nonzeros: int = 0,
    seed: int = 99,
    fields: Mapping[str, Sequence[np.ndarray]] | None = None,
    measured: np.ndarray | None = None,
) -> CellBatch:
    """Stack dense count matrices into a padded batch of flat CSR; all padding is nonsense that must not matter.

    Args:
        dense: int [cells of the sample, genes], one a sample.
        cells: Length of the ``cells`` axis; the longest sample when None.
        extra_nonzeros: Padding behind the longest run of stored counts.
        seed: Of the nonsense.
        fields: Further fields with one value a cell, such as ``coordinates``; one array a sample.
        measured: bool [samples, genes].
    """
    generator = np.random.default_rng(seed)
    samples, genes = len(dense), dense[0].shape[1]
    cells = cells or max(len(matrix) for matrix in dense)
    stored = [matrix.nonzero() for matrix in dense]
    nonzeros = max(1, *(len(row) for row, _ in stored)) + extra_nonzeros
    indptr = np.zeros((samples, cells + 1), np.int32)
    gene = generator.integers(0, genes, (samples, nonzeros)).astype(np.uint16)
    count = generator.integers(1, 60, (samples, nonzeros)).astype(np.uint16)
    mask = np.zeros((samples, cells), bool)
    for index, (matrix, (row, column)) in enumerate(zip(dense, stored, strict=True)):
        per_cell = np.bincount(row, minlength=cells)
        indptr[index, 1:] = np.cumsum(per_cell)
        gene[index, : len(row)] = column
        count[index, : len(row)] = matrix[row, column]
        mask[index, : len(matrix)] = True
    padded = {}
    for name, values in (fields or {}).items():
        example = np.asarray(values[0])
        shape = (samples, cells, *example.shape[1:])
        if example.dtype == bool:
            nonsense = generator.random(shape) < 0.5
        elif np.issubdtype(example.dtype, np.integer):
            nonsense = generator.integers(0, 2, shape)
        else:
            nonsense = generator.random(shape)
        nonsense = nonsense.astype(example.dtype)
        for index, value in enumerate(values):
            nonsense[index, : len(value)] = value
        padded[name] = jnp.asarray(nonsense)
    return CellBatch(
        indptr=jnp.asarray(indptr),
        gene=jnp.asarray(gene),
        count=jnp.asarray(count),
        cell_mask=jnp.asarray(mask),
        measured=None if measured is None else jnp.asarray(measured),
        **padded,
    )


# Plain numpy forms of the small layers, written from the PyTorch documentation.


def linear(x: np.ndarray, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    return x @ parameters["kernel"] + parameters["bias"]


def layer_norm(x: np.ndarray, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * parameters["scale"]
        + parameters["bias"]
    )


def group_norm(x: np.ndarray, parameters: Mapping[str, np.ndarray], groups: int = 4) -> np.ndarray:
    split = x.reshape(*x.shape[:-1], groups, -1)
    centred = split - split.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normed.reshape(x.shape) * parameters["scale"] + parameters["bias"]


def prelu(x: np.ndarray, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.where(x > 0, x, parameters["negative_slope"] * x)


def hidden_block(x: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    return group_norm(
        prelu(linear(x, parameters["linear"]), parameters["prelu"]), parameters["norm"]
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    exponential = np.exp(x - x.max(axis, keepdims=True))
    return exponential / exponential.sum(axis, keepdims=True)
