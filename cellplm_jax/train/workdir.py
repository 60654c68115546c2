"""Work directory of a run: ownership check, disk space check, and model card."""

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
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.errors import CheckpointError, InputError
from cellplm_jax.storage import explain_write_errors, is_remote
from cellplm_jax.train.checkpoint import CONFIG_FILE, ModelFiles, read_root
from cellplm_jax.train.covariates import with_covariates

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
"""Keys of a configuration that may differ when a run is resumed. Among them, ``mesh.cells`` determines the number of
pieces per row and therefore later random draws; all others change no number.
"""


def store_facts(store: CellStore, samples: int | None = None) -> dict[str, Any]:
    """Return the identification of a run's data.

    Args:
        store: The data.
        samples: Use only this number of first samples; None: all.
    """
    records = store.samples[:samples]
    # The fingerprint covers all samples; this hash of the first ones shows whether a corpus has only grown.
    table = [dataclasses.astuple(record) for record in records]
    return {
        "fingerprint": store.fingerprint(),
        "samples": len(records),
        "cells": sum(record.cells for record in records),
        "table": hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16],
    }


def open_workdir(
    workdir: str | os.PathLike,
    config: TrainConfig,
    store: CellStore,
) -> ModelFiles | None:
    """Read the root files of a resumed run, and check that they match. Writes nothing.

    Args:
        workdir: Work directory, local or a ``gs://`` address.
        config: The requested configuration.
        store: The current data.

    Returns:
        The root files; None for a new run.

    Raises:
        CheckpointError: Configuration, vocabulary or data belong to another run. Samples may have been added at the
            end of the data, and the keys of :data:`CHANGEABLE` may differ.
    """
    if not (epath.Path(workdir) / CONFIG_FILE).exists():
        return None
    found = read_root(workdir)
    if found.train is None or found.store is None:
        difference = "it was not created by pretraining"
    elif found.genes != list(store.genes):
        difference = (
            f"its gene vocabulary differs: {len(found.genes)} genes there, {len(store.genes)} now"
            if len(found.genes) != len(store.genes)
            else "its gene vocabulary differs"
        )
    else:
        # The stored covariate sizes come from the data; compare the other values in their JSON form.
        config = with_covariates(config, store, found.train)
        old = with_covariates(found.train, store, config)
        difference = first_difference(_plain(old), _plain(config))
        if difference is not None:
            difference += " differs"
        else:
            difference = _other_data(found.store, store)
    if difference is not None:
        raise CheckpointError(
            f"'{workdir}' belongs to another run ({difference})",
            "the same configuration, genes and data to resume, or a new directory",
            "Use another --workdir, or the configuration in its config.json and the original data",
        )
    return found


def added_samples(found: ModelFiles | None, store: CellStore) -> int:
    """Return the number of samples added to the data since the last start of a run."""
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
        f"{new['cells']:,} now, and the first samples differ"
    )


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as read from JSON, without the changeable keys."""
    # Tuples become lists, as they are in the file.
    plain = json.loads(json.dumps(to_dict(config)))
    for key in CHANGEABLE:
        *parents, name = key.split(".")
        part = plain
        for parent in parents:
            part = part[parent]
        del part[name]
    return plain


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Return a description of the first difference between two nested dictionaries; None: they are equal.

    Args:
        old: Existing values.
        new: Requested values.
        path: Dotted name of both, if they are nested.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            inner = first_difference(
                old.get(name),
                new.get(name),
                f"{path}.{name}" if path else name,
            )
            if inner:
                return inner
        return None
    return None if old == new else f"{path}: {old!r} there, {new!r} now"


def explain_workdir_errors(workdir: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Convert operating system errors about an unwritable directory to one message.

    Args:
        workdir: Work directory, for the message.

    Raises:
        InputError: Instead of the ``OSError``.
    """
    return explain_write_errors(f"the work directory '{workdir}'", catch=OSError)


def check_room(workdir: str | os.PathLike, state: Any, *, keep: int) -> None:
    """Check in advance that a run can save; creates the directory.

    Args:
        workdir: Work directory.
        state: The run's state, or its shapes.
        keep: Number of recent checkpoints to keep, in addition to the best.

    Raises:
        InputError: The directory is not writable, or has not enough space for the checkpoints.
    """
    folder = epath.Path(workdir)
    # A real write: permissions alone do not show quotas and read-only mounts.
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
    # The latest ones, the best one, and the one being written before an old one is removed.
    there = sum(path.name.isdigit() for path in folder.iterdir())
    missing = max(keep + 2 - there, 1) * size
    free = shutil.disk_usage(workdir).free
    if free < missing:
        raise InputError(
            f"the disk of '{workdir}' has {free / 2**20:,.1f} MiB left",
            f"{missing / 2**20:,.1f} MiB for checkpoints of {size / 2**20:,.1f} MiB, of which {keep} and the best are "
            "kept while the next is written",
            "Free some space, use another directory, or lower keep_checkpoints",
        )


def run_card(
    config: TrainConfig,
    store: CellStore,
    train: Sequence[SampleRange],
    heldout: Sequence[SampleRange],
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the model card of a new run.

    Args:
        config: The run.
        store: Its data.
        train: Ranges of training cells.
        heldout: Ranges of held-out cells.
        facts: Facts about the data from the caller; stored without change.
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
    """Return the hardware and versions of a run."""
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
