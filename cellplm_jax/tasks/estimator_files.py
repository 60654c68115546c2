"""Files of a fitted estimator: its state next to its model, written and read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import numpy as np
from etils import epath

from cellplm_jax._version import __version__
from cellplm_jax.config import FinetuneConfig, ModelConfig, to_dict
from cellplm_jax.data.genes import FittedGenes
from cellplm_jax.display import Displayed
from cellplm_jax.errors import CheckpointError, InputError, explain, shorten
from cellplm_jax.manifest import Manifest
from cellplm_jax.storage import is_remote
from cellplm_jax.tasks.contexts import CellTable
from cellplm_jax.tasks.pretrained import Pretrained, load_located, publish, resolve_source
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

if TYPE_CHECKING:
    from cellplm_jax.interop.hub import HubCommit

EstimatorType = TypeVar("EstimatorType", bound="SavedEstimator")


class SavedEstimator(Displayed):
    """A fitted estimator as files: saving, publishing and loading.

    Attributes:
        saved: Attributes to save as JSON; ``_state`` and ``_restore`` are extended for arrays.
    """

    saved: ClassVar[Sequence[str]] = ()
    model: Pretrained | None
    training: FinetuneConfig
    genes: int | None
    precision: str
    reading: Reading
    batch_rows: dict[str, int]
    history: list[dict[str, float]]
    messages: list[str]
    facts: dict[str, Any]

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the state of the task other than the model: plain values for JSON, and arrays."""
        # Names in the file are part of the format, and do not show which attributes are private.
        return {name.lstrip("_"): getattr(self, name) for name in self.saved}, {}

    def _restore(
        self,
        state: dict[str, Any],
        arrays: dict[str, np.ndarray],
    ) -> None:
        """Restore the state returned by :meth:`_state`."""
        for name in self.saved:
            value = state[name.lstrip("_")]
            initial = getattr(self, name)
            # The file may come from a stranger: a wrong type would fail later, and far from here.
            if isinstance(initial, list | dict) and not isinstance(value, type(initial)):
                msg = f"'{name}' is a {type(value).__name__}"
                raise TypeError(msg)
            setattr(self, name, value)

    @property
    def id(self) -> str:
        """Class, and start of the SHA-256 of the fitted model and all other state; recorded with predictions."""
        digest = hashlib.sha256(self.model.digest.encode() if self.model else b"")
        # While it is being fitted, the state is incomplete, and predictions are not recorded.
        with contextlib.suppress(AttributeError, TypeError):
            state, arrays = self._state()
            digest.update(json.dumps(state, sort_keys=True, default=str).encode())
            for name, array in sorted(arrays.items()):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return f"{type(self).__name__}+{digest.hexdigest()[:8]}"

    def _fitted(self) -> Pretrained:
        """Return the fitted model."""
        if self.model is None:
            name = type(self).__name__
            raise InputError(
                f"this {name} has not been fitted", "a fitted one", f"Call fit, or {name}.load(...)"
            )
        return self.model

    def save(self, directory: str | os.PathLike, *, format: WeightFormat = "orbax") -> None:
        """Write the fitted estimator to a self-contained directory, atomically.

        It is a model directory (``cellplm_jax.load`` opens the fine-tuned model in it) with an additional
        ``estimator.json``.

        Args:
            directory: A new or empty directory.
            format: See :meth:`cellplm_jax.Pretrained.save`.

        Raises:
            InputError: The estimator is not fitted.
            CheckpointError: The directory is not empty, or the format is unknown.
        """
        model = self._fitted()
        state, arrays = self._state()
        content = {
            "format": 1,
            "class": type(self).__name__,
            "version": __version__,
            "training": to_dict(self.training),
            "genes": self.genes,
            "precision": self.precision,
            "reading": dataclasses.asdict(self.reading),
            "names": _names_json(model.genes),
            "batch_rows": self.batch_rows,
            "facts": self.facts,
            "messages": self.messages,
            "state": state,
            "history": self.history,
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> HubCommit:
        """Publish the fitted estimator on the Hugging Face Hub; see :meth:`cellplm_jax.Pretrained.push_to_hub`.

        The published files include data from the fit: labels, gene names, batch names, and for
        some tasks embeddings of the cells. Do not publish an estimator if these must stay private.

        Args:
            repo_id: ``"organisation/name"``.
            private: See :meth:`cellplm_jax.Pretrained.push_to_hub`.
            revision: See :meth:`cellplm_jax.Pretrained.push_to_hub`.
            token: See :meth:`cellplm_jax.Pretrained.push_to_hub`.
            commit_message: See :meth:`cellplm_jax.Pretrained.push_to_hub`.

        Returns:
            The commit; :meth:`load` opens its ``address``.

        Raises:
            InputError: The estimator is not fitted, or as in :meth:`cellplm_jax.Pretrained.push_to_hub`.
            CheckpointError: As in :meth:`cellplm_jax.Pretrained.push_to_hub`.
            MissingDependencyError: As in :meth:`cellplm_jax.Pretrained.push_to_hub`.
        """

        def write(folder: Path) -> None:
            self.save(folder, format="safetensors")

        return publish(
            self._fitted(),
            write,
            repo_id,
            estimator=type(self).__name__,
            private=private,
            revision=revision,
            token=token,
            message=commit_message,
        )

    @classmethod
    def load(
        cls: type[EstimatorType],
        directory: str | os.PathLike,
        *,
        quiet: bool = False,
        precision: str | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> EstimatorType:
        """Open a fitted estimator.

        Args:
            directory: From :meth:`save`, or the ``hf://`` address of a published one.
            quiet: Disable progress output of predictions.
            precision: Of the matrix products; None: as it was fitted.
            devices: Devices of this process that predict together; None: all accelerators.

        Returns:
            An estimator with the same predictions as the saved one.

        Raises:
            CheckpointError: The directory does not contain a fitted estimator, is damaged, or belongs to another class.
        """
        where, name = resolve_source(
            directory, extra_files=(ESTIMATOR_FILE, TENSOR_FILES["estimator"])
        )
        content = read_estimator(where, name)
        if content["class"] != cls.__name__:
            raise CheckpointError(
                f"'{directory}' contains a fitted {content['class']}",
                f"a {cls.__name__}",
                f"Open it with cellplm_jax.{content['class']}.load",
            )
        fitted: str = precision or content.get("precision", "float32")
        model = load_located(where, name, precision=fitted, devices=devices)
        arrays = {}
        if has_item(where, "estimator"):
            arrays = restore_item(where, item="estimator", step=model.step)[0]
        make: Any = cls
        try:
            estimator = make(
                None,
                genes=content["genes"],
                quiet=quiet,
                precision=model.precision,
                devices=devices,
                **content["training"],
            )
            estimator._restore_all(content, model, arrays)
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(damaged(directory, error)) from error
        return estimator

    def _restore_all(
        self,
        content: dict[str, Any],
        model: Pretrained,
        arrays: dict[str, np.ndarray],
    ) -> None:
        """Set the state of a new estimator from the contents of its files."""
        if "names" in content:
            named = content["names"]
            model.genes = FittedGenes(
                model.genes,
                named["others"],
                named["matrix"],
                named["gene_key"],
            )
        self.model = model
        self.reading = Reading(**content["reading"])
        self.batch_rows = dict(content["batch_rows"])
        self.history = list(content["history"])
        self.facts = dict(content["facts"])
        self.messages = list(content["messages"])
        self._restore(content["state"], arrays)
        _check_labels(getattr(self, "labels", None), model.config, arrays)


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
        # Raises an AttributeError below if the class is not a text.
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
    # These predict instead of the model's head.
    if "bias" in arrays and "kernel" in arrays:
        wanted = int(arrays["bias"].shape[-1])
    codes = arrays.get("label")
    if wanted not in (None, len(labels)) or (
        codes is not None and codes.size and codes.max() >= len(labels)
    ):
        msg = f"it has {len(labels)} labels, and its weights have others"
        raise ValueError(msg)
