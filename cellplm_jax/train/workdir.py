"""The work directory of a run: whether it belongs to this run, whether there is room in it, and its model card."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cellplm_jax._version import __version__
from cellplm_jax.config import TrainConfig, to_dict
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.errors import CheckpointError, InputError, explain
from cellplm_jax.storage import explain_write_errors, is_remote
from cellplm_jax.train.checkpoint import CONFIG_FILE, ModelFiles, read_root

CHANGEABLE = (
    "mesh",
    "rematerialize",
    "chunk_cells",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "probe_every",
    "keep_checkpoints",
    "maximum_skipped",
    "data.threads",
    "data.prefetch",
)
"""Keys of a configuration that may differ when a run is resumed. ``mesh.cells`` among them decides in how many pieces a
row is laid out, and with that the random draws from there on; all others change no number."""

_ROWS = (("batch", "batches"), ("dataset", "datasets"), ("platform", "platforms"))


def with_covariates(
    config: TrainConfig, store: CellStore, old: TrainConfig | None = None
) -> TrainConfig:
    """Give the decoder as many covariate rows as the data has values; larger sizes set before are kept.

    Args:
        config: The run.
        store: Its data.
        old: The same run as it was, if it was there before.

    Raises:
        InputError: The data and the configuration have different numbers of genes.
    """
    if len(store.genes) != config.model.genes:
        msg = explain(
            f"the vocabulary of the data has {len(store.genes)} genes, model.genes is {config.model.genes}",
            "the same number",
            "Set model.genes to the size of the vocabulary",
        )
        raise InputError(msg)
    sizes = {}
    for name, rows in _ROWS:
        highest = max((getattr(sample, name) for sample in store.samples), default=-1)
        before = 0 if old is None else getattr(old.model.decoder, rows)
        sizes[rows] = max(getattr(config.model.decoder, rows), highest + 1, before)
    return with_rows(config, sizes)


def with_rows(config: TrainConfig, sizes: Mapping[str, int]) -> TrainConfig:
    """Return the configuration with other numbers of covariate rows.

    Args:
        config: The run.
        sizes: ``batches``, ``datasets`` and ``platforms``.
    """
    decoder = dataclasses.replace(config.model.decoder, **sizes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))


def rows_of(config: TrainConfig) -> dict[str, int]:
    """Return the numbers of covariate rows: ``batches``, ``datasets``, ``platforms``."""
    return {rows: getattr(config.model.decoder, rows) for _, rows in _ROWS}


def store_facts(store: CellStore, samples: int | None = None) -> dict[str, Any]:
    """Return what identifies the data of a run.

    Args:
        store: The data.
        samples: Look at so many samples only, from the first; None: at all.
    """
    records = store.samples[:samples]
    table = [dataclasses.astuple(record) for record in records]
    return {
        "fingerprint": store.fingerprint(),
        "samples": len(records),
        "cells": sum(record.cells for record in records),
        "table": hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16],
    }


def open_workdir(
    workdir: str | os.PathLike, config: TrainConfig, store: CellStore
) -> ModelFiles | None:
    """Read the root files of a run that is resumed, and check that it is this one. Writes nothing.

    Args:
        workdir: Work directory, here or at a ``gs://`` address.
        config: The run as asked for now.
        store: Its data as it is now.

    Returns:
        What lies there; None: nothing yet, this is a new run.

    Raises:
        CheckpointError: Configuration, vocabulary or data are those of another run. Samples may have been added at the
            end of the data, and the keys of :data:`CHANGEABLE` may differ.
    """
    if not (epath.Path(workdir) / CONFIG_FILE).exists():
        return None
    found = read_root(workdir)
    if found.train is None or found.store is None:
        difference = "it was not made by pretraining"
    elif found.genes != list(store.genes):
        difference = (
            f"its gene vocabulary differs: {len(found.genes)} genes there, {len(store.genes)} now"
            if len(found.genes) != len(store.genes)
            else "its gene vocabulary differs"
        )
    else:
        # What lies there has covariate sizes that only the data decided; compare the rest as JSON would show it.
        config = with_covariates(config, store, found.train)
        old = with_covariates(found.train, store, config)
        difference = first_difference(_plain(old), _plain(config))
        if difference is not None:
            difference += " differs"
        else:
            difference = _other_data(found.store, store)
    if difference is not None:
        msg = explain(
            f"'{workdir}' belongs to another run ({difference})",
            "the same configuration, genes and data to resume, or a new directory",
            "Give another --workdir, or the configuration in its config.json and the data it was started with",
        )
        raise CheckpointError(msg)
    return found


def added_samples(found: ModelFiles | None, store: CellStore) -> int:
    """Return how many samples the data has gained since a run was last started."""
    if found is None or found.store is None:
        return 0
    return len(store.samples) - int(found.store["samples"])


def _other_data(old: Mapping[str, Any], store: CellStore) -> str | None:
    new = store_facts(store)
    if old["fingerprint"] == new["fingerprint"]:
        return None
    grown = old["samples"] < new["samples"]
    if grown and store_facts(store, old["samples"])["table"] == old["table"]:
        return None
    return (
        f"its data differ: {old['samples']} samples with {old['cells']:,} cells there, {new['samples']} with "
        f"{new['cells']:,} now, and not the same ones first"
    )


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as read back from JSON, without the keys that may change."""
    plain = json.loads(json.dumps(to_dict(config)))
    for key in CHANGEABLE:
        *parents, name = key.split(".")
        part = plain
        for parent in parents:
            part = part[parent]
        del part[name]
    return plain


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Return where two nested dictionaries of plain values differ first, in words; None: nowhere.

    Args:
        old: What is there.
        new: What is wanted now.
        path: Dotted name of both, where they are part of something larger.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            inner = first_difference(
                old.get(name), new.get(name), f"{path}.{name}" if path else name
            )
            if inner:
                return inner
        return None
    return None if old == new else f"{path}: {old!r} there, {new!r} now"


def explain_workdir_errors(workdir: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Turn what the operating system says of a directory that cannot be written into one message.

    Args:
        workdir: Work directory, for the message.

    Raises:
        InputError: Instead of the ``OSError``.
    """
    return explain_write_errors(f"the work directory '{workdir}'", catch=OSError)


def check_room(workdir: str | os.PathLike, state: Any, *, keep: int) -> None:
    """Check, before anything is computed, that a run can save; creates the directory.

    Args:
        workdir: Work directory.
        state: The run's state, or its shapes.
        keep: Most recent checkpoints kept besides the best.

    Raises:
        InputError: The directory cannot be written, or has no room for the checkpoints that are kept at once.
    """
    folder = epath.Path(workdir)
    probe = folder / f".writable-{jax.process_index()}"
    with explain_workdir_errors(workdir):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    if is_remote(workdir):
        return
    size = sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state)
    )
    # The latest ones, the best one, and the one being written before an old one goes.
    there = sum(path.name.isdigit() for path in folder.iterdir())
    missing = max(keep + 2 - there, 1) * size
    free = shutil.disk_usage(workdir).free
    if free < missing:
        msg = explain(
            f"the disk of '{workdir}' has {free / 2**20:,.1f} MiB left",
            f"{missing / 2**20:,.1f} MiB for checkpoints of {size / 2**20:,.1f} MiB, of which {keep} and the best are "
            "kept while the next is written",
            "Free some space, name another directory, or lower keep_checkpoints",
        )
        raise InputError(msg)


def run_card(
    config: TrainConfig,
    store: CellStore,
    train: Sequence[Any],
    heldout: Sequence[Any],
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the model card of a run that starts.

    Args:
        config: The run.
        store: Its data.
        train: Ranges of cells trained on.
        heldout: Ranges of cells held out.
        facts: What the caller knows of the data; kept as it is.
    """
    return {
        **(facts or {}),
        "made_by": f"cellplm-jax {__version__}",
        "kind": "pretrained",
        "datasets": len({sample.dataset_name for sample in store.samples}),
        "training_samples": len({part.sample for part in train}),
        "training_cells": sum(part.stop - part.start for part in train),
        "heldout_samples": len({part.sample for part in heldout}),
        "heldout_cells": sum(part.stop - part.start for part in heldout),
        "data_fingerprint": store.fingerprint(),
        "seed": config.seed,
    }


def machine_facts() -> dict[str, Any]:
    """Return what a run was computed on and with."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": {
            "platform": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "cpu_cores": os.cpu_count(),
        },
        "versions": versions,
    }
