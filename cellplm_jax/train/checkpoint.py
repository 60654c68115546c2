"""Checkpoints: the only module that knows Orbax.

A checkpoint is a directory, or a ``gs://`` address, that opens alone: ``config.json``, ``genes.txt`` and ``card.json``
at its root, and Orbax step directories with ``params``, ``optimizer`` and ``run`` (step, skipped steps, seed, number of
covariate rows) as separate items; a converted model has ``params`` and ``unused``. Restoring reads the stored metadata:
neither the device count, nor the number of processes, nor the code that wrote it has to match.

The root is the same where a finished model travels: only that its items are then files (``model.safetensors``) instead
of step directories. :func:`weight_format` is the one place that says which of the two a directory holds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from cellplm_jax.config import ConfigError, ModelConfig, TrainConfig, from_dict, to_dict
from cellplm_jax.errors import CheckpointError, explain
from cellplm_jax.storage import atomic_write, atomic_write_text, explain_write_errors, is_remote
from cellplm_jax.train.state import TrainState
from cellplm_jax.train.tensors import read_tensors, write_tensors

WeightFormat = Literal["orbax", "safetensors"]
"""How the arrays of a checkpoint are stored: step directories, or a file an item."""

TENSOR_FILES = {
    "params": "model.safetensors",
    "unused": "unused.safetensors",
    "estimator": "estimator.safetensors",
}
"""Files of the items of a model, by item, in the format ``"safetensors"``."""

CONFIG_FILE, GENES_FILE, CARD_FILE = "config.json", "genes.txt", "card.json"
ESTIMATOR_FILE = "estimator.json"
# The held-out score by which a step is the best.
BEST_METRIC = "nb_log_likelihood"


@dataclass(frozen=True)
class ModelFiles:
    """What lies at the root of a checkpoint directory.

    Attributes:
        model: The architecture.
        genes: Gene vocabulary, Ensembl ids.
        card: Where the model comes from and what it was trained on.
        train: The whole training configuration, or None for a converted model.
        published: The original's constructor arguments, for a converted model.
        store: What identifies the data of a run (:func:`cellplm_jax.train.workdir.store_facts`).
    """

    model: ModelConfig
    genes: list[str]
    card: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig | None = None
    published: dict[str, Any] | None = None
    store: dict[str, Any] | None = None


def write_root(directory: str | os.PathLike, files: ModelFiles) -> None:
    """Write the root files of a checkpoint, each whole or not at all.

    Args:
        directory: Created where it does not exist.
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
    atomic_write_text(folder / GENES_FILE, "".join(f"{gene}\n" for gene in files.genes))
    write_card(folder, files.card)
    atomic_write_text(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def write_card(directory: str | os.PathLike, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` alone.

    Args:
        directory: A checkpoint directory.
        card: Its contents.
    """
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(epath.Path(directory) / CARD_FILE, text)


def read_root(directory: str | os.PathLike) -> ModelFiles:
    """Read the root files of a checkpoint.

    Args:
        directory: A checkpoint directory or a pretraining work directory.

    Raises:
        CheckpointError: It is not a checkpoint, a file is damaged, or genes and config disagree.
    """
    folder = epath.Path(directory)
    if not folder.is_dir():
        msg = explain(
            f"there is no directory '{directory}'",
            "a checkpoint directory",
            "Check the path, or convert a published checkpoint first with 'cellplm convert'",
        )
        raise CheckpointError(msg)
    missing = [n for n in (CONFIG_FILE, GENES_FILE, CARD_FILE) if not (folder / n).is_file()]
    if missing:
        msg = explain(
            f"'{directory}' has no {' and no '.join(missing)}",
            f"a checkpoint directory with {CONFIG_FILE}, {GENES_FILE} and {CARD_FILE}",
            "Copy the whole directory, or name another one",
        )
        raise CheckpointError(msg)
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        model = from_dict(ModelConfig, content["model"], path="model")
        train = content.get("train")
        if train is not None:
            train = from_dict(TrainConfig, {**train, "model": content["model"]})
        genes = (folder / GENES_FILE).read_text(encoding="utf-8").splitlines()
        if not isinstance(card, dict):
            msg = f"{CARD_FILE} holds a {type(card).__name__}"
            raise TypeError(msg)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as error:
        msg = explain(
            f"'{directory}' has a config, gene list or card that cannot be read ({error})",
            "the files as this package wrote them",
            "Copy the checkpoint again, or use the version of cellplm-jax that wrote it",
        )
        raise CheckpointError(msg) from error
    if len(genes) != model.genes:
        msg = explain(
            f"'{directory}' lists {len(genes)} genes in {GENES_FILE} but its config says {model.genes}",
            "one line per row of the gene embedding",
            "Copy the checkpoint again",
        )
        raise CheckpointError(msg)
    return ModelFiles(model, genes, card, train, content.get("published"), content.get("store"))


def _is_not_a_read_error(record: logging.LogRecord) -> bool:
    """Drop what asyncio says of Orbax's other reads of a damaged file: the first became a CheckpointError already."""
    return "OCDBT" not in record.getMessage()


_TRASH = ".deleted"
"""Checkpoints that are no longer kept are renamed into this folder before they are removed, so that a process killed
meanwhile leaves no step with half of its files."""

_ITEMS = ("params", "optimizer", "unused", "estimator")


def _absolute(directory: epath.Path) -> epath.Path:
    return directory if is_remote(directory) else directory.resolve()


def _manager(directory: epath.Path, *, keep: int | None = None, read_only: bool = False):
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy

    # Orbax reports every save and every failure at length; what matters reaches the caller as an exception.
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
    )
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
    handlers["run"] = ocp.JsonCheckpointHandler()
    try:
        return ocp.CheckpointManager(_absolute(directory), item_handlers=handlers, options=options)
    except ValueError as error:
        # Opening reads the scores of every step.
        msg = explain(
            f"the scores of a step of '{directory}' cannot be read ({error})",
            "complete step directories with 'metrics/metrics' in them",
            "Copy the directory again, or delete the damaged step to fall back on an earlier one",
        )
        raise CheckpointError(msg) from error


class RunCheckpoints:
    """The checkpoints of a training run: saved asynchronously, the latest few and the best kept.

    With several processes all of them call every method, in the same order.

    Args:
        directory: The run's work directory, here or at a ``gs://`` address.
        keep: Most recent checkpoints kept besides the best.

    Raises:
        CheckpointError: A step that is there is damaged (opening), cannot be read or cannot be written (methods).
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        self.directory = epath.Path(directory)
        with self._explained("the folder"):
            self._manager = _manager(self.directory, keep=keep)
        self._last = self._manager.latest_step()
        self._remove_unfinished()

    def latest_step(self) -> int | None:
        """Return the last completely saved step, or None."""
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
            metrics: Held-out scores; they decide which step is the best.
            facts: What else a later run has to know of this one, as JSON: the ``run`` item holds it beside the step,
                ``skipped`` and ``skipped_in_a_row``.
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
        """Return the ``run`` item of a step.

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
        """Restore a state for continuing, on any mesh and any number of processes.

        Args:
            abstract: A state of ``jax.ShapeDtypeStruct`` with the shardings wanted.
            step: A saved step.

        Raises:
            CheckpointError: The stored state does not have the shapes of ``abstract``, or is damaged.
        """
        import orbax.checkpoint as ocp

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

        def number(name: str) -> jax.Array:
            return jax.device_put(jnp.asarray(run[name], jnp.int32), abstract.step.sharding)

        return TrainState(
            step=number("step"),
            params=restored["params"],
            optimizer=restored["optimizer"],
            skipped=number("skipped"),
            skipped_in_a_row=number("skipped_in_a_row"),
        )

    def wait(self) -> None:
        """Wait until everything saved so far is on disk."""
        with self._explained(f"step {self._last}"):
            self._manager.wait_until_finished()
        if not is_remote(self.directory):
            self._remove(self.directory.glob(_TRASH))

    def close(self) -> None:
        """Wait until everything is on disk, and let go of it."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _remove_unfinished(self) -> None:
        """Remove what saves and removals that were cut off left behind. Orbax would also remove foreign folders."""
        if is_remote(self.directory):
            # An object store has no rename: there an unfinished step is known by its missing commit file.
            steps = [path for path in self.directory.iterdir() if path.name.isdigit()]
            self._remove([step for step in steps if not (step / "commit_success.txt").exists()])
            return
        self._remove(self.directory.glob("*.orbax-checkpoint-tmp*"))
        self._remove(self.directory.glob(_TRASH))

    def _remove(self, folders: Iterable[epath.Path]) -> None:
        if jax.process_index() == 0:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.rmtree()

    def _explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        return explain_write_errors(
            f"{what} of '{self.directory}'",
            room="room for another checkpoint",
            again="checkpoints saved before are intact, and it continues from the latest of them",
            catch=Exception,
            raises=CheckpointError,
        )


def _first_line(error: BaseException) -> str:
    """Return what an exception says in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


_COVARIATE = re.compile(r"(batch|dataset|platform)_(\d+|embedding)|discriminator")


def grow_rows(tree: Any, shapes: Any, *, new: str = "mean") -> Any:
    """Give covariates the rows that samples added later need.

    Args:
        tree: Parameters, or optimizer moments of the same paths, stored with fewer batches, datasets or platforms.
        shapes: The same tree with the shapes wanted.
        new: What new rows start as: ``"mean"`` of the old ones, which is what the model took for an unknown batch all
            along, or ``"zero"``.

    Returns:
        The tree, larger where ``shapes`` asks for more rows of a covariate and untouched elsewhere.
    """

    def grown(path: tuple, leaf: Any, wanted: Any) -> Any:
        names = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        old, shape = np.shape(leaf), np.shape(wanted)
        if old == shape or len(old) != len(shape) or not _COVARIATE.search(names):
            return leaf
        axes = [axis for axis in range(len(old)) if old[axis] != shape[axis]]
        if len(axes) != 1 or shape[axes[0]] < old[axes[0]]:
            return leaf
        (axis,) = axes
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        row = leaf.mean(axis=axis, keepdims=True) * (1 if new == "mean" else 0)
        return numpy.concatenate([leaf, row.repeat(shape[axis] - old[axis], axis=axis)], axis=axis)

    return jax.tree_util.tree_map_with_path(grown, tree, shapes)


def _damaged(directory: object, step: int, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    msg = explain(
        f"step {step} of '{directory}' cannot be read ({_first_line(error)})",
        "a complete checkpoint that fits its config",
        "Copy it again, or delete the damaged step directory to fall back on an earlier one",
    )
    return CheckpointError(msg)


def check_new_directory(directory: str | os.PathLike) -> Path:
    """Return the path of a directory that a model can be written to, before any work is done.

    Args:
        directory: A new or empty directory.

    Raises:
        CheckpointError: It already holds something.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        msg = explain(
            f"'{directory}' already exists and is not empty",
            "a new or empty directory",
            "Choose another directory or remove this one",
        )
        raise CheckpointError(msg)
    return directory


def save_model(
    directory: str | os.PathLike,
    files: ModelFiles,
    params: Mapping[str, Any],
    *,
    unused: Mapping[str, np.ndarray] | None = None,
    estimator: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, str] | None = None,
    step: int = 0,
    format: WeightFormat = "orbax",
) -> None:
    """Write a model as a checkpoint directory of its own.

    Args:
        directory: Must not hold a checkpoint yet.
        files: Contents of the root files.
        params: The ``"params"`` collection.
        unused: Arrays that only an exact write-back to the published form needs.
        estimator: Arrays that a fitted estimator needs besides the weights.
        texts: Further files at the root, by name.
        step: Training step of the weights.
        format: ``"orbax"``: a step directory; ``"safetensors"``: a file an item.

    Raises:
        CheckpointError: The directory already holds something, or there is no such format.
        MissingDependencyError: The format is ``"safetensors"``, which is not installed.
    """
    if format not in get_args(WeightFormat):
        msg = explain(
            f"the format of the weights is {format!r}",
            " or ".join(map(repr, get_args(WeightFormat))),
            "Choose one of them",
        )
        raise CheckpointError(msg)
    directory = check_new_directory(directory)
    items = {"params": _as_arrays(params)}
    if unused:
        items["unused"] = _as_arrays(unused)
    if estimator:
        items["estimator"] = _as_arrays(estimator)
    with atomic_write(directory) as partial:
        write_root(partial, files)
        for name, text in (texts or {}).items():
            atomic_write_text(partial / name, text)
        if format == "orbax":
            _write_step(partial, items, step)
        else:
            for item, tree in items.items():
                flat = {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
                write_tensors(partial / TENSOR_FILES[item], flat, step=step)


def _write_step(directory: Path, items: Mapping[str, Any], step: int) -> None:
    """Write items as one Orbax step."""
    import orbax.checkpoint as ocp

    manager = _manager(epath.Path(directory))
    arguments = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
    manager.save(step, args=ocp.args.Composite(**arguments))
    manager.wait_until_finished()
    manager.close()


def _as_arrays(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def weight_format(directory: str | os.PathLike) -> WeightFormat:
    """Say how the arrays of a checkpoint are stored.

    Args:
        directory: A checkpoint directory or a pretraining work directory.

    Raises:
        CheckpointError: It holds both, and nothing says which is meant.
    """
    folder = epath.Path(directory)
    if not (folder / TENSOR_FILES["params"]).is_file():
        return "orbax"
    steps = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
    if steps:
        msg = explain(
            f"'{directory}' holds {TENSOR_FILES['params']} and also the steps {', '.join(steps)}",
            "one of the two",
            "Move the one that is not meant elsewhere",
        )
        raise CheckpointError(msg)
    return "safetensors"


def has_item(directory: str | os.PathLike, item: str) -> bool:
    """Say whether a checkpoint holds an item, in any of its steps."""
    if weight_format(directory) == "safetensors":
        return item in TENSOR_FILES and (epath.Path(directory) / TENSOR_FILES[item]).is_file()
    return any(True for _ in epath.Path(directory).glob(f"[0-9]*/{item}"))


def restore_item(
    directory: str | os.PathLike, *, item: str = "params", step: int | None = None
) -> tuple[dict[str, Any], int]:
    """Restore one item of a checkpoint as numpy arrays, without being told its tree.

    Args:
        directory: A checkpoint directory or a pretraining work directory.
        item: ``"params"``, ``"unused"`` or ``"estimator"``.
        step: Step to read; None: the best by held-out likelihood, else the latest.

    Returns:
        The item and the step it was read from.

    Raises:
        CheckpointError: There is no such step or item, or it is damaged.
        MissingDependencyError: It is stored as safetensors, which is not installed.
    """
    folder = epath.Path(directory)
    if weight_format(folder) == "safetensors":
        arrays, found = read_tensors(folder / TENSOR_FILES[item])
        if step not in (None, found):
            raise _no_step(directory, step, [found])
        if item != "params":  # the others are no trees, and a name of theirs may hold a slash
            return arrays, found
        return _as_tree(arrays, directory), found
    return _restore_step_item(folder, item, step)


def _as_tree(arrays: Mapping[str, Any], directory: object) -> dict[str, Any]:
    """Return arrays named by paths (``embedder/gene_embedding``) as the tree of those paths."""
    try:
        return unflatten_dict({tuple(name.split("/")): array for name, array in arrays.items()})
    except (IndexError, TypeError, ValueError) as error:
        msg = explain(
            f"'{directory}' names a parameter that is also a group of others",
            "the weights of one model",
            "Copy or download it again",
        )
        raise CheckpointError(msg) from error


def _no_step(directory: object, step: int | None, steps: list[int]) -> CheckpointError:
    msg = explain(
        f"'{directory}' has no step {step}",
        f"one of {', '.join(map(str, sorted(steps)))}",
        "Name one of them",
    )
    return CheckpointError(msg)


def _restore_step_item(
    directory: epath.Path, item: str, step: int | None
) -> tuple[dict[str, Any], int]:
    """Restore one item of an Orbax step; see :func:`restore_item`."""
    import orbax.checkpoint as ocp

    manager = _manager(directory, read_only=True)
    try:
        steps = list(manager.all_steps())
        if not steps:
            msg = explain(
                f"'{directory}' holds no complete checkpoint step",
                "at least one",
                "Let the run save once, or copy the whole directory",
            )
            raise CheckpointError(msg)
        if step is None:
            step = manager.best_step()
            step = max(steps) if step is None else step
        elif step not in steps:
            raise _no_step(directory, step, steps)
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
