"""Conversion of published CellPLM checkpoints in both directions, with every parameter accounted for.

A published checkpoint consists of two files: ``PREFIX.config.json`` (the constructor arguments of the original
``OmicsFormer`` and its ``gene_list``) and ``PREFIX.best.ckpt`` (``torch.save`` of a dictionary whose
``model_state_dict`` maps names to tensors). Reading uses PyTorch's weights-only loader, which creates only tensors, so
an untrusted file cannot run code. PyTorch is only needed for reading and writing (extra ``torch``); the
mapping itself is plain numpy.

Parameters without effect in the original (its positional encoding is disabled, ``embedder.norm0`` is never
called) are kept as *unused*, by name, and written back unchanged.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellplm_jax.config import ModelConfig
from cellplm_jax.errors import CheckpointError, quote, require, shorten
from cellplm_jax.interop.published_config import model_config, published_config
from cellplm_jax.storage import atomic_write
from cellplm_jax.untrusted import parse_json, read_text, require_regular

UNUSED = {
    r"embedder\.norm0\..*": "the original never calls this norm (embedder/omics.py:99)",
    r"embedder\.pe_enc\..*": "the original's positional encoding is switched off (embedder/omics.py:92)",
    r"embedder\.cov_enc\..*": "the original injects covariates only together with a positional encoding",
    r"latent\.layers\.\d+\.discriminator\..*": "the batch discriminator is only used in adversarial training",
    r"decoder\..*": "a task head replaces the decoder",
    r"head\.cls": "the original never uses this vector (head/downstream.py)",
}


@dataclass(frozen=True)
class Converted:
    """A published checkpoint converted to this package's format.

    Attributes:
        config: The architecture.
        genes: Ensembl ids, one per row of the gene embedding.
        params: Nested dictionary of numpy arrays: the ``"params"`` collection.
        unused: Torch name -> array, for parameters without effect.
        published_config: The constructor arguments, without the gene list.
    """

    config: ModelConfig
    genes: list[str]
    params: dict[str, Any]
    unused: dict[str, np.ndarray] = field(default_factory=dict)
    published_config: dict[str, Any] = field(default_factory=dict)

    def unused_reasons(self) -> dict[str, str]:
        """Return torch name -> reason why the parameter has no effect."""
        return {name: str(_unused_reason(name, self.config)) for name in self.unused}


@dataclass(frozen=True)
class _Entry:
    """One parameter: its published name, its path here, and the conversion of the array."""

    torch: str
    path: tuple[str, ...]
    transpose: bool = False
    scalar: bool = False

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        array = array.T if self.transpose else array
        array = array.reshape(()) if self.scalar else array
        return np.array(array, order="C", copy=True)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = array.T if self.transpose else array
        return np.array(
            array.reshape((1,)) if self.scalar else array,
            order="C",
            copy=True,
        )


def _entries(config: ModelConfig) -> list[_Entry]:
    """Return every parameter of a configuration with its published name."""
    entries: list[_Entry] = []

    def linear(torch: str, *path: str) -> None:
        entries.append(_Entry(f"{torch}.weight", (*path, "kernel"), transpose=True))
        entries.append(_Entry(f"{torch}.bias", (*path, "bias")))

    def norm(torch: str, *path: str, kind: str = "layernorm") -> None:
        if kind == "none":
            return
        entries.append(_Entry(f"{torch}.weight", (*path, "scale")))
        if kind != "rmsnorm":
            entries.append(_Entry(f"{torch}.bias", (*path, "bias")))

    def copy(torch: str, *path: str, scalar: bool = False) -> None:
        entries.append(_Entry(torch, path, scalar=scalar))

    def hidden_block(torch: str, *path: str) -> None:
        linear(f"{torch}.0", *path, "linear")
        copy(f"{torch}.1.weight", *path, "prelu", "negative_slope", scalar=True)
        norm(f"{torch}.3", *path, "norm", kind=config.norm)

    copy("embedder.feat_enc.emb", "embedder", "gene_embedding")
    linear("embedder.extra_linear.0", "embedder", "linear")
    norm("embedder.extra_linear.3", "embedder", "norm", kind=config.norm)
    if config.embedder.covariate:
        copy("embedder.cov_enc.weight", "embedder", "batch_embedding")
    for layer in range(config.encoder.layers):
        torch = f"encoder.layers.{layer}"
        path = ("encoder", f"layer_{layer}")
        if config.encoder.kind == "mlp":
            hidden_block(torch, *path)
        elif config.encoder.kind == "flow":
            for part in ("query", "key", "value", "out"):
                linear(f"{torch}.self_attn.{part}_projection", *path, "attention", part)
            linear(f"{torch}._ff_block.0", *path, "feedforward_in")
            linear(f"{torch}._ff_block.3", *path, "feedforward_out")
            norm(f"{torch}.norm1", *path, "attention_norm")
            norm(f"{torch}.norm2", *path, "feedforward_norm")
    norm("pre_latent_norm.norm", "pre_latent_norm")
    torch = "latent.layers.1"
    if config.latent.kind == "gaussian":
        linear(f"{torch}.hid_2mu", "latent", "mean")
        linear(f"{torch}.hid_2sigma", "latent", "log_variance")
    elif config.latent.kind == "deterministic":
        linear(f"{torch}.lat_2lat.0", "latent", "linear")
    elif config.latent.kind == "gaussian_mixture":
        torch = f"{torch}.inference"
        linear(f"{torch}.inference_qyx.0.logits", "latent", "cluster_logits")
        linear(f"{torch}.inference_qzyx.0", "latent", "inference")
        linear(f"{torch}.inference_qzyx.2.mu", "latent", "mean")
        linear(f"{torch}.inference_qzyx.2.var", "latent", "variance")
        linear(f"{torch}.y_mu", "latent", "prior_mean")
        linear(f"{torch}.y_var", "latent", "prior_variance")
    if config.head.kind == "sample_classification":
        linear("head.output_layer", "head", "linear")
    elif config.head.kind != "none":
        # An nn.Sequential numbers its members, and the original adds dropout only if it has a rate.
        step = 3 if config.dropout > 0 else 2
        for layer in range(config.head.layers):
            position = layer * step + (1 if config.dropout > 0 else 0)
            linear(f"head.mlp.{position}", "head", "mlp", f"linear_{layer}")
    else:
        for layer in range(config.decoder.layers - 1):
            hidden_block(f"decoder.layers.{layer}", "decoder", f"layer_{layer}")
            for covariate in ("batch", "dataset", "platform"):
                rows = {"batch": "batches", "dataset": "datasets", "platform": "platforms"}
                if getattr(config.decoder, rows[covariate]) == 0:
                    continue
                torch = f"decoder.covariate_layers.{layer}.{covariate}"
                path = ("decoder", f"{covariate}_{layer}")
                copy(f"{torch}.0.weight", *path, "table")
                copy(f"{torch}.1.weight", *path, "prelu", "negative_slope", scalar=True)
                norm(f"{torch}.2", *path, "norm", kind=config.norm)
        linear("decoder.out_layer.dec_1", "decoder", "bottleneck")
        linear("decoder.out_layer.dec_mean.0", "decoder", "log_mean")
        copy("decoder.out_layer.dec_disp", "decoder", "log_dispersion")
    return entries


def _unused_reason(name: str, config: ModelConfig) -> str | None:
    if name.startswith("decoder.") and config.head.kind == "none":
        return None
    return next((why for pattern, why in UNUSED.items() if re.fullmatch(pattern, name)), None)


def _expected_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    import jax
    from flax.traverse_util import flatten_dict

    from cellplm_jax.model.cellplm import init_params

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def convert_state_dict(
    state_dict: Mapping[str, np.ndarray], published: Mapping[str, Any]
) -> Converted:
    """Convert the original's parameters.

    Args:
        state_dict: Torch name -> array.
        published: The contents of ``PREFIX.config.json``, including the gene list.

    Returns:
        The parameters in this package's format, and the unused ones by name.

    Raises:
        CheckpointError: A parameter is missing, unknown, or does not have the shape that the config implies, or the
            config cannot be converted exactly.
    """
    from flax.traverse_util import unflatten_dict

    config = model_config(published)
    entries = _entries(config)
    # Names are removed as they are converted: what is left must be known to be unused.
    remaining = dict(state_dict)
    shapes = _expected_shapes(config)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for entry in entries:
        if entry.torch not in remaining:
            raise CheckpointError(
                f"the checkpoint has no parameter '{entry.torch}'",
                "one for every module of its config",
                "Use the config that was published with these weights",
            )
        array = np.asarray(remaining.pop(entry.torch))
        # One byte per entry: only the shape is of interest.
        expected = entry.to_torch(np.empty(shapes[entry.path], bool)).shape
        if array.shape != expected:
            raise CheckpointError(
                f"parameter '{entry.torch}' has shape {array.shape}",
                f"{expected} from the config",
                "Use the config that was published with these weights",
            )
        if array.dtype != np.float32:
            raise CheckpointError(
                f"parameter '{entry.torch}' is {array.dtype}",
                "float32",
                "Convert the checkpoint to float32 first",
            )
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"parameter '{entry.torch}' contains NaN or infinite numbers",
                "finite weights",
                "Download the checkpoint again",
            )
        flat[entry.path] = entry.to_ours(array)
    unknown = [name for name in remaining if _unused_reason(name, config) is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"the checkpoint has parameters its config does not account for: "
            f"{', '.join(unknown[:3])}{more}",
            "only parameters known to be unused",
            "Use the config that was published with these weights",
        )
    return Converted(
        config=config,
        genes=[str(gene) for gene in published["gene_list"]],
        params=unflatten_dict(flat),
        unused={name: np.array(array) for name, array in remaining.items()},
        published_config={key: value for key, value in published.items() if key != "gene_list"},
    )


def to_state_dict(converted: Converted) -> dict[str, np.ndarray]:
    """Return the parameters under their published names; the exact inverse of :func:`convert_state_dict`.

    Args:
        converted: Config and parameters.

    Raises:
        CheckpointError: A parameter of the config is missing, or there are additional ones.
    """
    from flax.traverse_util import flatten_dict

    flat = flatten_dict(converted.params)
    state_dict = {}
    for entry in _entries(converted.config):
        if entry.path not in flat:
            raise CheckpointError(
                f"the model has no parameter '{'/'.join(entry.path)}'",
                "one for every module of its config",
                "Check that config and weights belong together",
            )
        state_dict[entry.torch] = entry.to_torch(np.asarray(flat.pop(entry.path)))
    if flat:
        names = ", ".join("/".join(path) for path in list(flat)[:3])
        raise CheckpointError(
            f"the model has parameters without a published counterpart: {names}",
            "a model the original can express",
            "Keep this model in the format of this package",
        )
    return {**state_dict, **converted.unused}


def as_published(
    config: ModelConfig,
    genes: list[str],
    params: dict[str, Any],
    *,
    unused: Mapping[str, np.ndarray] | None = None,
    published: Mapping[str, Any] | None = None,
) -> Converted:
    """Prepare a model for :func:`write_published`.

    Args:
        config: The architecture.
        genes: The vocabulary.
        params: The ``"params"`` collection.
        unused: Unused parameters of an earlier conversion; written back unchanged.
        published: Constructor arguments of an earlier conversion; None: derived from the model.

    Raises:
        CheckpointError: The original cannot express the model.
    """
    if published is None:
        published = published_config(config, genes)
        width = config.hidden
        unused = {}
        if config.norm != "none":
            # The original's loader requires this parameter, although it never uses it.
            unused["embedder.norm0.weight"] = np.ones(width, np.float32)
            if config.norm != "rmsnorm":
                unused["embedder.norm0.bias"] = np.zeros(width, np.float32)
    return Converted(
        config,
        list(genes),
        params,
        dict(unused or {}),
        dict(published),
    )


def read_published(checkpoint: str | os.PathLike, config: str | os.PathLike) -> Converted:
    """Read and convert a published checkpoint.

    Args:
        checkpoint: ``PREFIX.best.ckpt``.
        config: ``PREFIX.config.json``.

    Raises:
        CheckpointError: A file is missing or damaged, contains other objects than tensors, or the two do not match.
        MissingDependencyError: PyTorch is not installed.
    """
    torch = require("torch", "torch", "Reading a PyTorch checkpoint")
    checkpoint = Path(checkpoint)
    config = Path(config)
    for path in (checkpoint, config):
        require_regular(path, raises=CheckpointError)
        if not path.is_file():
            raise CheckpointError(
                f"there is no file '{path}'",
                "PREFIX.best.ckpt and PREFIX.config.json",
                "Check the path",
            )
    try:
        published = parse_json(read_text(config))
    except ValueError as error:
        raise CheckpointError(
            f"'{config}' is not JSON ({error})", "a published config", "Download the file again"
        ) from error
    if not isinstance(published, dict):
        raise CheckpointError(
            f"'{config}' contains a {type(published).__name__}",
            "a JSON object of constructor arguments",
            "Use the published PREFIX.config.json",
        )
    model_config(published)
    _check_zip(checkpoint)
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message recommends weights_only=False, which runs code of the file.
        pickled = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it contains other Python objects" if pickled else _first_line(error)
        raise CheckpointError(
            f"'{checkpoint}' cannot be read as PyTorch weights ({reason})",
            "a complete file of tensors written by torch.save",
            "Download it again; files with other Python objects are never unpickled",
        ) from error
    state_dict = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(map(torch.is_tensor, state_dict.values())):
        raise CheckpointError(
            f"'{checkpoint}' contains no 'model_state_dict' of tensors",
            "a published CellPLM checkpoint",
            "Use the published PREFIX.best.ckpt",
        )
    if not all(isinstance(name, str) for name in state_dict):
        raise CheckpointError(
            f"'{checkpoint}' names a tensor {shorten(repr(next(iter(state_dict))))}",
            "text",
            "Use the published PREFIX.best.ckpt",
        )
    prefix = "module."
    if state_dict and all(name.startswith(prefix) for name in state_dict):
        state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    arrays = {}
    size = checkpoint.stat().st_size
    for name, value in state_dict.items():
        if value.numel() * value.element_size() > size:
            raise CheckpointError(
                f"parameter {quote(name)} has the shape {tuple(value.shape)}, and its file has {size:,} bytes",
                "tensors that the file stores completely",
                "Download it again",
            )
        try:
            arrays[name] = value.detach().numpy()
        except (TypeError, RuntimeError) as error:  # bfloat16, sparse or quantised
            raise CheckpointError(
                f"parameter '{name}' is {value.dtype}, {value.layout}",
                "dense float32",
                "Convert the checkpoint to float32 first",
            ) from error
    return convert_state_dict(arrays, published)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 160) if lines else type(error).__name__


def _check_zip(checkpoint: Path) -> None:
    """Compare the checksums of the archive, which PyTorch does not do. Files of PyTorch 1.5 and older have none."""
    if not zipfile.is_zipfile(checkpoint):
        return
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            packed = [
                entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED
            ]
            declared = sum(entry.file_size for entry in archive.infolist())
            if packed or declared > checkpoint.stat().st_size:
                raise CheckpointError(
                    f"'{checkpoint}' contains compressed records, of {declared:,} bytes in all",
                    "records as torch.save stores them, without compression",
                    "Download it again",
                )
            damaged = archive.testzip()
    except (
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        damaged = str(error)[:160] or type(error).__name__
    if damaged is not None:
        raise CheckpointError(
            f"'{checkpoint}' is damaged: a checksum of the archive differs ({damaged})",
            "the file as it was published",
            "Download it again",
        )


def write_published(converted: Converted, prefix: str | os.PathLike) -> tuple[Path, Path]:
    """Write ``PREFIX.best.ckpt`` and ``PREFIX.config.json`` atomically.

    Args:
        converted: From :func:`read_published`, :func:`convert_state_dict` or :func:`as_published`.
        prefix: Path without the two suffixes.

    Returns:
        The two paths.

    Raises:
        CheckpointError: The published format cannot express the model.
        MissingDependencyError: PyTorch is not installed.
    """
    torch = require("torch", "torch", "Writing a PyTorch checkpoint")
    state_dict = {
        name: torch.from_numpy(np.array(array)) for name, array in to_state_dict(converted).items()
    }
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = prefix.with_name(f"{prefix.name}.best.ckpt")
    config = prefix.with_name(f"{prefix.name}.config.json")
    room = sum(array.numel() * array.element_size() for array in state_dict.values())
    with atomic_write(config) as partial_config, atomic_write(checkpoint, room=room) as partial:
        # Through memory: PyTorch does not report the reason if a file cannot be written.
        buffer = io.BytesIO()
        torch.save({"model_state_dict": state_dict}, buffer)
        partial.write_bytes(buffer.getbuffer())
        text = json.dumps({**converted.published_config, "gene_list": converted.genes})
        partial_config.write_text(text, encoding="utf-8")
    return checkpoint, config
