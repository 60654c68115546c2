"""Files of a fitted estimator: its state next to its model, written and read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cellplm_jax._version import __version__
from cellplm_jax.config import ModelConfig, to_dict
from cellplm_jax.data.genes import FittedGenes
from cellplm_jax.errors import CheckpointError, explain, shorten
from cellplm_jax.manifest import Manifest
from cellplm_jax.storage import is_remote
from cellplm_jax.tasks.contexts import CellTable
from cellplm_jax.tasks.pretrained import Pretrained, load_located, resolve_source
from cellplm_jax.tasks.reading import Reading
from cellplm_jax.train.checkpoint import (
    ESTIMATOR_FILE,
    TENSOR_FILES,
    ModelFiles,
    WeightFormat,
    has_item,
    restore_item,
    save_model,
)
from cellplm_jax.untrusted import parse_json, require_regular


def write_estimator(
    estimator: Any, model: Pretrained, directory: str | os.PathLike, format: WeightFormat
) -> None:
    """Write a fitted estimator; see :meth:`cellplm_jax.tasks.estimator.Estimator.save`.

    Args:
        estimator: The estimator.
        model: Its fitted model.
        directory: A new or empty directory.
        format: See :meth:`cellplm_jax.Pretrained.save`.
    """
    state, arrays = estimator._state()
    content = {
        "format": 1,
        "class": type(estimator).__name__,
        "version": __version__,
        "training": to_dict(estimator.training),
        "genes": estimator.genes,
        "precision": estimator.precision,
        "reading": dataclasses.asdict(estimator.reading),
        "names": _names_json(model.genes),
        "batch_rows": estimator.batch_rows,
        "facts": estimator.facts,
        "messages": estimator.messages,
        "state": state,
        "history": estimator.history,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    save_model(
        directory,
        ModelFiles(model.config, model.genes, model.card),
        model.params,
        estimator=arrays,
        texts={ESTIMATOR_FILE: text},
        step=model.step,
        format=format,
    )


def open_files(
    kind: type,
    directory: str | os.PathLike,
    *,
    precision: str | None,
    devices: Sequence[jax.Device] | None,
) -> tuple[dict[str, Any], Pretrained, dict[str, np.ndarray]]:
    """Open the files of a fitted estimator; see :meth:`cellplm_jax.tasks.estimator.Estimator.load`.

    Args:
        kind: The class of the estimator.
        directory: From :func:`write_estimator`, or the ``hf://`` address of a published one.
        precision: Of the matrix products; None: as it was fitted.
        devices: Devices of this process that predict together; None: all accelerators.

    Returns:
        The contents of its file, the fitted model, and its arrays.

    Raises:
        CheckpointError: The directory does not contain a fitted estimator, is damaged, or belongs to another class.
    """
    where, name = resolve_source(directory, extra_files=(ESTIMATOR_FILE, TENSOR_FILES["estimator"]))
    content = read_estimator(where, name)
    if content["class"] != kind.__name__:
        raise CheckpointError(
            f"'{directory}' contains a fitted {content['class']}",
            f"a {kind.__name__}",
            f"Open it with cellplm_jax.{content['class']}.load",
        )
    fitted: str = precision or content.get("precision", "float32")
    model = load_located(where, name, precision=fitted, devices=devices)
    arrays = {}
    if has_item(where, "estimator"):
        arrays = restore_item(where, item="estimator", step=model.step)[0]
    return content, model, arrays


def restore(
    estimator: Any, content: dict[str, Any], model: Pretrained, arrays: dict[str, np.ndarray]
) -> None:
    """Set the state of an estimator from its files.

    Args:
        estimator: A new estimator.
        content: From :func:`open_files`, like the other arguments.
        model: The fitted model.
        arrays: Arrays by name.
    """
    if "names" in content:
        named = content["names"]
        model.genes = FittedGenes(model.genes, named["others"], named["matrix"], named["gene_key"])
    estimator.model = model
    estimator.reading = Reading(**content["reading"])
    estimator.batch_rows = dict(content["batch_rows"])
    estimator.history, estimator.facts = list(content["history"]), dict(content["facts"])
    estimator.messages = list(content["messages"])
    estimator._restore(content["state"], arrays)
    _check_labels(getattr(estimator, "labels", None), model.config, arrays)


def fitted_names(table: CellTable) -> FittedGenes:
    """Return the vocabulary of a fit with the decisions made about its file.

    Args:
        table: The cells of the fit, over its complete vocabulary.
    """
    return FittedGenes(table.genes, [], table.report.matrix, table.report.gene_key)


def _names_json(genes: list[str]) -> dict[str, Any]:
    """Return the decisions about gene names as plain values."""
    if not isinstance(genes, FittedGenes):
        return {"others": [], "matrix": "", "gene_key": ""}
    return {"others": genes.others, "matrix": genes.matrix, "gene_key": genes.gene_key}


def read_estimator(directory: str | os.PathLike, name: str | None = None) -> dict[str, Any]:
    """Return the contents of ``estimator.json`` in a directory.

    Args:
        directory: Directory of a saved estimator.
        name: Name for messages; None: the directory.

    Raises:
        CheckpointError: The file does not exist or cannot be read.
    """
    path = epath.Path(directory) / ESTIMATOR_FILE
    name = name or os.fspath(directory)
    if not path.is_file():
        what = "does not exist" if not path.parent.is_dir() else f"has no {ESTIMATOR_FILE}"
        raise CheckpointError(
            f"'{name}' {what}",
            "the directory of a fitted estimator",
            "Fit one and save it first; a plain model is opened with cellplm_jax.load",
        )
    try:
        if not is_remote(path):
            require_regular(path.parent, raises=CheckpointError)
        content = parse_json(Manifest(path.parent, f"'{name}'").read(ESTIMATOR_FILE))
        content["class"].strip()
        if content["format"] != 1:
            msg = f"format {shorten(str(content['format']))}, this version reads format 1"
            raise ValueError(msg)
        for field in ("training", "reading", "batch_rows", "facts", "state"):
            if not isinstance(content[field], dict):
                msg = f"'{field}' is a {type(content[field]).__name__}"
                raise TypeError(msg)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(damaged(name, error)) from error
    return content


def damaged(directory: str | os.PathLike, error: Exception) -> str:
    """Return the message about a file that cannot be read."""
    return explain(
        f"{ESTIMATOR_FILE} of '{directory}' cannot be read ({type(error).__name__}: {error})",
        "the file as this package wrote it",
        "Copy the directory again, or use the version of cellplm-jax that wrote it",
    )


def _check_labels(labels: Any, config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a ValueError if restored labels are not one per output."""
    if labels is None or not len(labels):
        return
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        msg = "its labels are not different texts"
        raise ValueError(msg)
    wanted = (
        config.head.outputs if config.head.kind in ("annotation", "sample_classification") else None
    )
    if "bias" in arrays and "kernel" in arrays:
        wanted = int(arrays["bias"].shape[-1])
    codes = arrays.get("label")
    if wanted not in (None, len(labels)) or (
        codes is not None and codes.size and codes.max() >= len(labels)
    ):
        msg = f"it has {len(labels)} labels, and its weights have others"
        raise ValueError(msg)
