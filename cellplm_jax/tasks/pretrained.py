"""A trained model in the hands of a user: what ``cellplm_jax.load`` returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cellplm_jax.cache import keep_compiled
from cellplm_jax.config import ModelConfig
from cellplm_jax.errors import CheckpointError, InputError, explain
from cellplm_jax.model.cellplm import CellPLM, attention_rows, init_params
from cellplm_jax.structs import CellBatch, Reconstruction
from cellplm_jax.tasks.stream import StreamedEncoder
from cellplm_jax.train.checkpoint import (
    ModelFiles,
    grow_rows,
    read_root,
    restore_item,
    save_model,
)

# Parts of the parameter tree that an embedding needs.
EMBEDDING_PARTS = ("embedder", "encoder", "pre_latent_norm", "latent")


@dataclass(eq=False)
class Pretrained:
    """A model with its weights, gene vocabulary and card.

    Attributes:
        config: The architecture.
        params: Nested dictionary of numpy arrays.
        genes: Gene vocabulary, Ensembl ids, in the order of the gene embedding's rows.
        card: Where the model comes from and what it was trained on.
        source: What it was loaded from.
        step: Training step of the weights; 0 for a converted or untrained model.
    """

    config: ModelConfig
    params: dict[str, Any]
    genes: list[str]
    card: dict[str, Any] = field(default_factory=dict)
    source: str = "memory"
    step: int = 0

    @property
    def id(self) -> str:
        """Name, step and number of parameters: what an embedding is stamped with."""
        name = self.card.get("name") or Path(self.source).name
        return f"{name}@{self.step}"

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.params))

    @classmethod
    def untrained(cls, config: ModelConfig, genes: list[str], *, seed: int = 0) -> Pretrained:
        """Return a model with freshly initialised weights, as a baseline or a start.

        Args:
            config: The architecture.
            genes: Gene vocabulary.
            seed: Seed of the initialisation.
        """
        params = jax.jit(lambda: init_params(config, jax.random.key(seed)))()
        card = {"kind": "untrained", "seed": seed}
        return cls(config, jax.tree.map(np.asarray, params), list(genes), card, "untrained")

    def save(self, directory: str | os.PathLike, *, half: bool = False) -> None:
        """Write the model as a checkpoint directory that opens alone.

        Args:
            directory: A new or empty directory.
            half: Store the weights as float16: half the size, three decimal digits. Loading makes them float32 again.

        Raises:
            CheckpointError: It is not empty.
        """
        files = ModelFiles(self.config, self.genes, self.card)
        params = self.params
        if half:
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
        save_model(directory, files, params, step=self.step)

    @cached_property
    def device_params(self) -> dict[str, Any]:
        """The weights an embedding needs, on the default device."""
        return jax.device_put(
            {name: self.params[name] for name in EMBEDDING_PARTS if name in self.params}
        )

    @cached_property
    def embed_expression(self) -> Callable[[Any, CellBatch], jax.Array]:
        """Jitted ``(params, batch) -> hidden [samples, cells, hidden]``, each cell on its own."""
        model = CellPLM(self.config)
        return jax.jit(
            lambda params, batch: model.apply(
                {"params": params}, batch, method=CellPLM.embed_expression
            )
        )

    @cached_property
    def encode(self) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
        """Jitted ``(params, hidden, cell_mask) -> embedding [samples, cells, latent]`` of whole contexts."""
        model = CellPLM(self.config)

        def run(params, hidden, cell_mask):
            variables = {"params": params}
            hidden = model.apply(variables, hidden, cell_mask, method=CellPLM.encode)
            return model.apply(variables, hidden, method=CellPLM.infer).mean

        return jax.jit(run)

    @cached_property
    def encode_streamed(self) -> StreamedEncoder:
        """The same as :meth:`encode` for contexts of any size, in passes over chunks."""
        return StreamedEncoder(self.config, self.encode)

    @cached_property
    def attend(self) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
        """Jitted ``(params, hidden, cell_mask, rows) -> attention weights [layers, heads, rows, cells]``."""
        return jax.jit(
            lambda params, hidden, cell_mask, rows: attention_rows(
                params, hidden, cell_mask, rows, self.config
            )
        )

    @cached_property
    def output_params(self) -> dict[str, Any]:
        """The weights of the decoder or task head, on the default device."""
        return jax.device_put({k: v for k, v in self.params.items() if k in ("decoder", "head")})

    @cached_property
    def predict(self) -> Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]:
        """Jitted ``(params, z, cell_mask, condition) -> prediction`` of the task head."""
        model = CellPLM(self.config)
        return jax.jit(
            lambda params, z, cell_mask, condition: model.apply(
                {"params": params}, z, cell_mask, condition=condition, method=CellPLM.predict
            )
        )

    @cached_property
    def decode(self) -> Callable[[Any, jax.Array, CellBatch], Reconstruction]:
        """Jitted ``(params, z, batch) -> reconstruction``; of the batch only the covariates are used."""
        model = CellPLM(self.config)
        return jax.jit(
            lambda params, z, batch: model.apply(
                {"params": params}, z, batch, method=CellPLM.decode
            )
        )


BUNDLED = ("small",)
"""Models that come with the package, by name."""


def bundled_path(name: str) -> Path:
    """Return where a model that comes with the package lies."""
    return Path(str(resources.files("cellplm_jax") / "resources" / "models" / name))


def load(source: str | os.PathLike, *, step: int | None = None) -> Pretrained:
    """Open a trained model.

    Args:
        source: ``"small"``, the model that comes with the package (a folder of that name goes first); a checkpoint
            directory (from ``cellplm convert`` or ``Pretrained.save``) or a work directory, on this machine or at a
            ``gs://`` address.
        step: Step to open; None: the best by held-out likelihood, else the latest.

    Returns:
        A :class:`Pretrained`; its arrays are numpy, on no device yet.

    Raises:
        CheckpointError: It is not a checkpoint, is damaged, or config and weights do not fit.
        InputError: The kind of source is not supported.
    """
    text = os.fspath(source)
    if "://" in text and not text.startswith("gs://"):
        msg = explain(
            f"'{text}' is a remote source",
            "a directory on this machine or a gs:// address",
            "Download it first",
        )
        raise InputError(msg)
    if text in BUNDLED and not Path(text).exists():
        text = str(bundled_path(text))
    keep_compiled()
    files = read_root(text)
    params, found_step = restore_item(text, step=step)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    # A step that was saved before the data grew has fewer covariate rows than the run has now.
    shapes = jax.eval_shape(lambda: init_params(files.model, jax.random.key(0)))
    if jax.tree.structure(shapes) == jax.tree.structure(params):
        params = grow_rows(params, shapes)
    check_params(files.model, params, text)
    return Pretrained(
        config=files.model,
        params=params,
        genes=files.genes,
        card=files.card,
        source=text,
        step=found_step,
    )


def opened(model: Pretrained | str | os.PathLike) -> Pretrained:
    """Return a model as it is, or open what :func:`load` takes."""
    return model if isinstance(model, Pretrained) else load(model)


def check_params(config: ModelConfig, params: dict[str, Any], where: str) -> None:
    """Check that weights have exactly the parameters and shapes a configuration implies.

    Args:
        config: The architecture.
        params: The ``"params"`` collection.
        where: Name of the checkpoint, for the message.

    Raises:
        CheckpointError: Names the first parameter that is missing, extra or of another shape.
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    expected = {"/".join(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    found = {"/".join(path): np.shape(leaf) for path, leaf in flatten_dict(params).items()}
    problem = None
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problem = f"has no parameter '{name}' {expected[name]}"
        elif name not in expected:
            problem = f"has a parameter '{name}' {found[name]} that its config does not know"
        elif found[name] != expected[name]:
            problem = f"has '{name}' of shape {found[name]} where its config says {expected[name]}"
        if problem:
            break
    if problem:
        msg = explain(
            f"'{where}' {problem}",
            "config.json and weights of the same model",
            "Copy the checkpoint directory whole, without mixing files of two models",
        )
        raise CheckpointError(msg)
