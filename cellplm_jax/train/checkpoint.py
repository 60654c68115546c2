"""Checkpoints; the only module that uses Orbax.

A checkpoint is a self-contained directory or ``gs://`` address: ``config.json``, ``genes.txt`` and ``card.json``
in its root, and Orbax step directories with ``params``, ``optimizer`` and ``run`` (step, skipped steps, seed, number of
covariate rows) as separate items; a converted model has ``params`` and ``unused``. Restoring reads the stored metadata
and does not depend on the device count, the number of processes, or the code that wrote it.

In the exchange format items are files (``model.safetensors``) instead of step directories; only :func:`weight_format`
decides which of the two a directory contains.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Shaped

from cellplm_jax.config import ModelConfig, TrainConfig, from_dict, to_dict
from cellplm_jax.errors import CheckpointError, shorten
from cellplm_jax.manifest import Manifest, add_to_manifest, replace_files, write_manifest
from cellplm_jax.storage import (
    atomic_write,
    atomic_write_text,
    explain_write_errors,
    is_remote,
    remove_strays,
)
from cellplm_jax.train.state import TrainState
from cellplm_jax.train.tensors import read_tensors, write_tensors
from cellplm_jax.untrusted import name_lines, parse_json, require_regular

WeightFormat = Literal["orbax", "safetensors"]
"""Storage formats of the arrays: step directories, or one file per item."""

TENSOR_FILES = {
    "params": "model.safetensors",
    "unused": "unused.safetensors",
    "estimator": "estimator.safetensors",
}
"""Files of the items of a model, by item, in the format ``"safetensors"``."""

CONFIG_FILE, GENES_FILE, CARD_FILE = "config.json", "genes.txt", "card.json"
ESTIMATOR_FILE = "estimator.json"
# Fields of the card that are read; others are only shown.
_CARD_TYPES = {"name": str, "kind": str, "task": str, "unused_parameters": dict}
# Held-out score that selects the best step.
BEST_METRIC = "nb_log_likelihood"


@dataclass(frozen=True)
class ModelFiles:
    """Contents of the root of a checkpoint directory.

    Attributes:
        model: The architecture.
        genes: Gene vocabulary, Ensembl ids.
        card: Origin and training data of the model.
        train: The complete training configuration, or None for a converted model.
        published: The original's constructor arguments, for a converted model.
        store: Identification of a run's data (:func:`cellplm_jax.train.workdir.store_facts`).
    """

    model: ModelConfig
    genes: list[str]
    card: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig | None = None
    published: dict[str, Any] | None = None
    store: dict[str, Any] | None = None


def write_root(directory: str | os.PathLike, files: ModelFiles) -> None:
    """Write the root files of a checkpoint, each atomically.

    Args:
        directory: Created if it does not exist.
        files: Their contents.
    """
    folder = epath.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"format": 1, "model": to_dict(files.model)}
    if files.train is not None:
        content["train"] = {k: v for k, v in to_dict(files.train).items() if k != "model"}
    if files.published is not None:
        content["published"] = files.published
    if files.store is not None:
        content["store"] = files.store
    # A folder with a config is a run, so it is written last.
    replace_files(
        folder,
        {
            GENES_FILE: "".join(f"{gene}\n" for gene in files.genes),
            CARD_FILE: _card_text(files.card),
            CONFIG_FILE: json.dumps(content, indent=2) + "\n",
        },
    )


def write_card(directory: str | os.PathLike, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` only.

    Args:
        directory: A checkpoint directory.
        card: Its contents.
    """
    replace_files(directory, {CARD_FILE: _card_text(card)})


def _card_text(card: Mapping[str, Any]) -> str:
    return json.dumps(card, indent=2, ensure_ascii=False) + "\n"


def read_root(directory: str | os.PathLike) -> ModelFiles:
    """Read the root files of a checkpoint and verify their checksums.

    Args:
        directory: A checkpoint directory or a pretraining work directory.

    Raises:
        CheckpointError: It is not a checkpoint, a file is damaged, or genes and config disagree.
    """
    folder = epath.Path(directory)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no directory '{directory}'",
            "a checkpoint directory",
            "Check the path, or convert a published checkpoint first with 'cellplm convert'",
        )
    if not is_remote(directory):
        require_regular(directory, raises=CheckpointError)
    missing = [n for n in (CONFIG_FILE, GENES_FILE, CARD_FILE) if not (folder / n).is_file()]
    if missing:
        raise CheckpointError(
            f"'{directory}' has no {' and no '.join(missing)}",
            f"a checkpoint directory with {CONFIG_FILE}, {GENES_FILE} and {CARD_FILE}",
            "Copy the complete directory, or use another one",
        )
    manifest = Manifest(folder)
    if manifest.entries is None:
        manifest.remark()
    try:
        content = parse_json(manifest.read(CONFIG_FILE))
        card = parse_json(manifest.read(CARD_FILE))
        if not isinstance(content, dict) or content.get("format") != 1:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            msg = f"{CONFIG_FILE} has format {shorten(str(found))}, this version reads format 1"
            raise TypeError(msg)
        model = from_dict(ModelConfig, content["model"], path="model")
        train = content.get("train")
        if train is not None:
            train = from_dict(TrainConfig, {**train, "model": content["model"]})
        genes = name_lines(manifest.read(GENES_FILE))
        if not isinstance(card, dict):
            msg = f"{CARD_FILE} contains a {type(card).__name__}"
            raise TypeError(msg)
        for name, wanted in _CARD_TYPES.items():
            if not isinstance(card.get(name), wanted | None):
                msg = f"'{name}' in {CARD_FILE} is a {type(card[name]).__name__}"
                raise TypeError(msg)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"'{directory}' has a config, gene list or card that cannot be read ({shorten(str(error), 400)})",
            "valid files of this package",
            "Copy the checkpoint again, or use the version of cellplm-jax that wrote it",
        ) from error
    if len(genes) != model.genes:
        raise CheckpointError(
            f"'{directory}' lists {len(genes)} genes in {GENES_FILE} but its config has {model.genes}",
            "one line per row of the gene embedding",
            "Copy the checkpoint again",
        )
    return ModelFiles(model, genes, card, train, content.get("published"), content.get("store"))


def _is_not_a_read_error(record: logging.LogRecord) -> bool:
    """Filter asyncio's messages about further failed reads; the first one raised a CheckpointError."""
    return "OCDBT" not in record.getMessage()


_TRASH = ".deleted"
"""Outdated checkpoints are renamed into this folder before they are removed, so that a killed process leaves no partial
step.
"""

# Files of a step outside its items.
_STEP_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")

_ITEMS = ("params", "optimizer", "unused", "estimator")


def _absolute(directory: epath.Path) -> epath.Path:
    return directory if is_remote(directory) else directory.resolve()


def _manager(
    directory: epath.Path,
    *,
    keep: int | None = None,
    read_only: bool = False,
    on_saved: Callable[[], None] | None = None,
):
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy

    # Orbax logs every save and every failure in detail; relevant errors reach the caller as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    policy = None
    if keep is not None:
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=lambda metrics: metrics[BEST_METRIC],
        best_mode="max",
        read_only=read_only,
        create=not read_only,
        todelete_subdir=None if read_only else _TRASH,
        async_options=ocp.AsyncOptions(post_finalization_callback=on_saved),
    )
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
    handlers["run"] = ocp.JsonCheckpointHandler()
    try:
        return ocp.CheckpointManager(_absolute(directory), item_handlers=handlers, options=options)
    except (ValueError, KeyError, TypeError) as error:
        # Opening reads the scores of every step.
        raise CheckpointError(
            f"the scores of a step of '{directory}' cannot be read ({error})",
            "complete step directories with 'metrics/metrics' in them",
            "Copy the directory again, or delete the damaged step to use an earlier one",
        ) from error


class RunCheckpoints:
    """The checkpoints of a training run: saved asynchronously; the latest few and the best are kept.

    With several processes all of them must call every method, in the same order.

    Args:
        directory: The run's work directory, local or a ``gs://`` address.
        keep: Number of recent checkpoints to keep, in addition to the best.

    Raises:
        CheckpointError: An existing step is damaged (when opening), or a step cannot be read or written (methods).
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        self.directory = epath.Path(directory)
        with self._explained("the folder"):
            self._manager = _manager(self.directory, keep=keep, on_saved=self._add_checksums)
        self._last = self._manager.latest_step()
        self._described = (self.directory / CONFIG_FILE).exists()
        # Scores decide which step is kept, so damage must not go unnoticed until one is deleted.
        for step in self._manager.all_steps():
            _verify_step(self.directory, step, ["metrics"])
        # Only now: a damaged folder must be reported before anything in it is removed.
        self._remove_unfinished()

    def latest_step(self) -> int | None:
        """Return the last complete step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        *,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the state under its step; returns before the files are written. A step is saved once.

        Args:
            state: The run's state.
            metrics: Held-out scores, which determine the best step.
            facts: Additional JSON data for the ``run`` item, which also has the step, ``skipped`` and
                ``skipped_in_a_row``.

        Raises:
            CheckpointError: The folder was deleted, or the step cannot be written.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step == self._last:
            return
        run = {
            **(facts or {}),
            "step": step,
            "skipped": int(state.skipped),
            "skipped_in_a_row": int(state.skipped_in_a_row),
        }
        self.wait()
        if self._described and not (self.directory / CONFIG_FILE).exists():
            raise CheckpointError(
                f"'{self.directory}' has no {CONFIG_FILE} any more, so step {step} was not saved",
                "the work directory as this run created it",
                "Do not remove a work directory during a run; start the run again",
            )
        self._last = step
        with self._explained(f"step {step}"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.optimizer),
                    run=ocp.args.JsonSave(run),
                ),
                metrics=None if metrics is None else {k: float(v) for k, v in metrics.items()},
            )

    def run_facts(self, step: int) -> dict[str, Any]:
        """Return the ``run`` item of a saved step.

        Args:
            step: A saved step.
        """
        import orbax.checkpoint as ocp

        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
            )
            return dict(restored["run"])
        except Exception as error:
            raise _damaged(self.directory, step, error) from error

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Restore a state to continue on any mesh and any number of processes.

        Args:
            abstract: A state of ``jax.ShapeDtypeStruct`` with the target shardings.
            step: A saved step.

        Raises:
            CheckpointError: The stored state does not have the shapes of ``abstract``, or is damaged.
        """
        import orbax.checkpoint as ocp

        verified = _verify_step(self.directory, step, [""])
        run = self.run_facts(step)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    optimizer=ocp.args.StandardRestore(abstract.optimizer),
                ),
            )
        except Exception as error:
            raise _damaged(self.directory, step, error) from error

        if not verified:
            # The process was killed before it wrote them, or an older version saved the step.
            self._complete_checksums(step)

        def number(name: str) -> Any:
            return jax.device_put(jnp.asarray(run[name], jnp.int32), abstract.step.sharding)  # type: ignore[union-attr]

        return TrainState(
            step=number("step"),
            params=restored["params"],
            optimizer=restored["optimizer"],
            skipped=number("skipped"),
            skipped_in_a_row=number("skipped_in_a_row"),
        )

    def wait(self) -> None:
        """Wait until all saves are complete."""
        with self._explained(f"step {self._last}"):
            self._manager.wait_until_finished()
            self._complete_checksums(self._last)
        if not is_remote(self.directory):
            self._remove(self.directory.glob(_TRASH))

    def close(self) -> None:
        """Wait until all saves are complete, and close the manager."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _add_checksums(self) -> None:
        """Write the manifest of the step that is being saved; Orbax calls it before it renames the step's folder."""
        if not is_remote(self.directory) and jax.process_index() == 0:
            for folder in self.directory.glob(f"{self._last}.orbax-checkpoint-tmp*"):
                write_manifest(folder, without=_STEP_FILES)

    def _complete_checksums(self, step: int | None) -> None:
        """Add to a manifest what Orbax wrote last. Object stores verify their objects themselves."""
        if step is None or is_remote(self.directory) or jax.process_index() != 0:
            return
        # An outdated step may be gone already.
        with contextlib.suppress(FileNotFoundError):
            add_to_manifest(self.directory / str(step), _STEP_FILES)

    def _remove_unfinished(self) -> None:
        """Remove files of interrupted saves and removals. Orbax would also remove unrelated folders."""
        if is_remote(self.directory):
            # Object stores have no rename: an unfinished step lacks its commit file.
            steps = [path for path in self.directory.iterdir() if path.name.isdigit()]
            self._remove([step for step in steps if not (step / "commit_success.txt").exists()])
            return
        self._remove(self.directory.glob("*.orbax-checkpoint-tmp*"))
        for folder in (self.directory, *self.directory.glob("[0-9]*")):
            remove_strays(Path(folder))
        self._remove(self.directory.glob(_TRASH))

    def _remove(self, folders: Iterable[epath.Path]) -> None:
        if jax.process_index() == 0:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.rmtree()

    def _explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        return explain_write_errors(
            f"{what} of '{self.directory}'",
            room="space for another checkpoint",
            again="checkpoints saved before are intact, and it continues from the latest of them",
            catch=Exception,
            raises=CheckpointError,
        )


def _first_line(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _damaged(directory: object, step: int, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(
        f"step {step} of '{directory}' cannot be read ({_first_line(error)})",
        "a complete checkpoint that matches its config",
        "Copy it again, or delete the damaged step directory to use an earlier one",
    )


def check_new_directory(directory: str | os.PathLike) -> Path:
    """Return the path of a writable model directory, before any work is done.

    Args:
        directory: A new or empty directory.

    Raises:
        CheckpointError: It is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(
            f"'{directory}' already exists and is not empty",
            "a new or empty directory",
            "Choose another directory or remove this one",
        )
    return directory


def save_model(
    directory: str | os.PathLike,
    files: ModelFiles,
    params: Mapping[str, Any],
    *,
    unused: Mapping[str, Shaped[np.ndarray, "*any"]] | None = None,
    estimator: Mapping[str, Shaped[np.ndarray, "*any"]] | None = None,
    texts: Mapping[str, str] | None = None,
    step: int = 0,
    format: str = "orbax",
) -> None:
    """Write a model to a new checkpoint directory.

    Args:
        directory: Must not contain a checkpoint yet.
        files: Contents of the root files.
        params: The ``"params"`` collection.
        unused: Arrays that are only needed to restore the published form exactly.
        estimator: Arrays of a fitted estimator other than the weights.
        texts: Further files in the root, by name.
        step: Training step of the weights.
        format: ``"orbax"``: a step directory; ``"safetensors"``: one file per item.

    Raises:
        CheckpointError: The directory is not empty, or the format is unknown.
        MissingDependencyError: The format is ``"safetensors"``, which is not installed.
    """
    if format not in get_args(WeightFormat):
        raise CheckpointError(
            f"the format of the weights is {format!r}",
            " or ".join(map(repr, get_args(WeightFormat))),
            "Use one of them",
        )
    directory = check_new_directory(directory)
    items = {"params": _as_arrays(params)}
    if unused:
        items["unused"] = _as_arrays(unused)
    if estimator:
        items["estimator"] = _as_arrays(estimator)
    room = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    with atomic_write(directory, room=room) as partial:
        write_root(partial, files)
        for name, text in (texts or {}).items():
            atomic_write_text(partial / name, text)
        if format == "orbax":
            _write_step(partial, items, step)
        else:
            for item, tree in items.items():
                flat = {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
                write_tensors(partial / TENSOR_FILES[item], flat, step=step)
        write_manifest(partial)


def _write_step(directory: Path, items: Mapping[str, Any], step: int) -> None:
    """Write items as one Orbax step."""
    import orbax.checkpoint as ocp

    manager = _manager(epath.Path(directory))
    arguments = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
    try:
        manager.save(step, args=ocp.args.Composite(**arguments))
        manager.wait_until_finished()
    except Exception:
        # Its threads still write; after an error it raises the same one again.
        with contextlib.suppress(Exception):
            manager.close()
        raise
    manager.close()


def _as_arrays(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def weight_format(directory: str | os.PathLike) -> WeightFormat:
    """Return the storage format of a checkpoint.

    Args:
        directory: A checkpoint directory or a pretraining work directory.

    Raises:
        CheckpointError: It contains both formats.
    """
    folder = epath.Path(directory)
    if not (folder / TENSOR_FILES["params"]).is_file():
        return "orbax"
    steps = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
    if steps:
        raise CheckpointError(
            f"'{directory}' contains {TENSOR_FILES['params']} and also the steps {', '.join(steps)}",
            "one of the two",
            "Move one of them elsewhere",
        )
    return "safetensors"


def has_item(directory: str | os.PathLike, item: str) -> bool:
    """Return whether any step of a checkpoint contains an item."""
    if weight_format(directory) == "safetensors":
        return item in TENSOR_FILES and (epath.Path(directory) / TENSOR_FILES[item]).is_file()
    return any(True for _ in epath.Path(directory).glob(f"[0-9]*/{item}"))


def restore_item(
    directory: str | os.PathLike, *, item: str = "params", step: int | None = None
) -> tuple[Any, int]:
    """Restore one item of a checkpoint as numpy arrays, without a target tree.

    Args:
        directory: A checkpoint directory or a pretraining work directory.
        item: ``"params"``, ``"unused"`` or ``"estimator"``.
        step: Step to read; None: the best by held-out likelihood, else the latest.

    Returns:
        The item and its step.

    Raises:
        CheckpointError: The step or item does not exist, or it is damaged.
        MissingDependencyError: It is stored as safetensors, which is not installed.
    """
    folder = epath.Path(directory)
    if weight_format(folder) == "safetensors":
        arrays, found = read_tensors(folder / TENSOR_FILES[item])
        Manifest(folder).verify([TENSOR_FILES[item]])
        if step not in (None, found):
            raise _no_step(directory, step, [found])
        if item != "params":  # the others are not trees, and their names may contain a slash
            return arrays, found
        arrays = _as_tree(arrays, directory)
    else:
        arrays, found = _restore_step_item(folder, item, step)
    if item == "params":
        _check_finite(arrays, directory)
    return arrays, found


def _check_finite(params: Mapping[str, Any], directory: object) -> None:
    """Reject weights that contain NaN or infinity: every prediction would be NaN."""
    for path, leaf in flatten_dict(params).items():
        wrong = int(np.size(leaf) - np.isfinite(leaf).sum())
        if wrong:
            raise CheckpointError(
                f"'{directory}' contains {wrong:,} weights that are NaN or infinite, some in '{'/'.join(path)}'",
                "finite weights",
                "Use an earlier step, or copy the checkpoint again",
            )


def _verify_step(directory: epath.Path, step: int, parts: Iterable[str]) -> bool:
    """Verify the checksums of ``parts`` of a complete step (``""``: everything); return whether it has any."""
    manifest = Manifest(directory / str(step), f"step {step} of '{directory}'")
    if manifest.entries is None:
        root = Manifest(directory)
        if root.covers(str(step)):
            manifest, parts = root, [f"{step}/{part}".rstrip("/") for part in parts]
    manifest.verify(parts)
    return manifest.entries is not None or is_remote(directory)


def _as_tree(arrays: Mapping[str, Any], directory: object) -> dict[str, Any]:
    """Convert arrays named by paths (``embedder/gene_embedding``) to a nested tree."""
    try:
        return unflatten_dict({tuple(name.split("/")): array for name, array in arrays.items()})
    except (IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"'{directory}' names a parameter that is also a group of others",
            "the weights of one model",
            "Copy or download it again",
        ) from error


def _no_step(directory: object, step: int | None, steps: list[int]) -> CheckpointError:
    return CheckpointError(
        f"'{directory}' has no step {step}",
        f"one of {', '.join(map(str, sorted(steps)))}",
        "Use one of them",
    )


def _restore_step_item(directory: epath.Path, item: str, step: int | None) -> tuple[Any, int]:
    """Restore one item of an Orbax step; see :func:`restore_item`."""
    import orbax.checkpoint as ocp

    manager = _manager(directory, read_only=True)
    try:
        steps = list(manager.all_steps())
        if not steps:
            raise CheckpointError(
                f"'{directory}' contains no complete checkpoint step",
                "at least one",
                "Let the run save once, or copy the complete directory",
            )
        if step is None:
            for scored in steps:
                _verify_step(directory, scored, ["metrics"])
            step = manager.best_step()
            step = max(steps) if step is None else step
        elif step not in steps:
            raise _no_step(directory, step, steps)
        if not _verify_step(directory, step, [item, *_STEP_FILES]):
            Manifest(directory).remark()
        try:
            metadata = manager.item_metadata(step)[item]
            target = jax.tree.map(
                lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray),
                metadata.tree if hasattr(metadata, "tree") else metadata,
            )
            handler = ocp.PyTreeCheckpointHandler()
            restored = ocp.Checkpointer(handler).restore(
                _absolute(directory) / str(step) / item,
                args=ocp.args.PyTreeRestore(restore_args=target),
            )
        except Exception as error:
            raise _damaged(directory, step, error) from error
    finally:
        manager.close()
    return restored, step
