"""``cellplm prepare``: convert AnnData files to one corpus, in bounded memory, with one task per file.

There are three passes over the files: every file is opened and checked, so that invalid files are reported before hours
of work; without a given vocabulary, the cells that express each known human gene are counted; then the parts are
written. Finished results are kept: the same command resumes after an interruption, and new files are added at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sparse

from cellplm_jax.data.anndata_io import CountSource, open_counts
from cellplm_jax.data.cell_store import LARGEST_STORED_COUNT, storage_order
from cellplm_jax.data.corpus import (
    PartSample,
    PartWriter,
    explain_corpus_errors,
    index_type,
    vocabulary_hash,
    write_genes,
    write_index,
)
from cellplm_jax.data.corpus_records import FORMAT, check_index
from cellplm_jax.data.genes import load_human_table
from cellplm_jax.errors import CellPLMError, InputError, explain, nearest, require
from cellplm_jax.progress import ProgressReport
from cellplm_jax.storage import atomic_write, atomic_write_text, is_remote
from cellplm_jax.untrusted import (
    LONGEST_TEXT,
    TEXT_BYTES,
    parse_json,
    read_text,
    require_options,
)

Vocabulary = Literal["union", "intersection"]
Advance = Callable[[int], None]

MINIMUM_CELLS = 10
"""Minimum number of cells that express a gene of a vocabulary chosen from the files."""

NONZEROS_IN_MEMORY = 2**28
"""Maximum number of stored counts in memory per task: 1 GiB. A larger file is spooled to disk next to its part."""

BLOCK_NONZEROS = 2**19
"""Approximate number of stored counts per read: fits into a processor cache, because sorting dominates the run time."""

SCHEDULER_SECONDS = 30
"""Timeout of the connection to a dask scheduler."""

_TOPIC = "cellplm-prepare"


@dataclass(frozen=True)
class Keys:
    """Keys for reading the files; a part made with other keys is made again.

    Attributes:
        sample: Column of ``obs`` with the tissue sample; a file without it is one sample.
        dataset: Column of ``obs`` with the data set, one value per file; without it the file name is used.
        platform: Column of ``obs`` with the platform of each sample.
        spatial: Key of ``obsm`` with coordinates, used if present.
        label: Column of ``obs`` with labels of cells, for the embedding probe during training.
        layer: Layer with the counts; None: detected automatically.
        gene: Column of ``var`` with the gene names; None: detected automatically.
        feature_type: Type of the features that are read; None: genes.
    """

    sample: str | None = None
    dataset: str | None = None
    platform: str | None = None
    spatial: str = "spatial"
    label: str | None = None
    layer: str | None = None
    gene: str | None = None
    feature_type: str | None = None

    def settings(self) -> dict[str, str | None]:
        """Return the keys that a part records; parts from before a key existed were made with its default."""
        keys = dataclasses.asdict(self)
        return (
            keys
            if self.feature_type is not None
            else {k: v for k, v in keys.items() if k != "feature_type"}
        )

    def reading(self) -> dict[str, Any]:
        """Return the arguments of :func:`cellplm_jax.data.anndata_io.open_counts`."""
        return {"layer": self.layer, "gene_key": self.gene, "feature_type": self.feature_type}

    def columns(self) -> dict[str, str]:
        """Return the option and the name of every requested column of ``obs``."""
        asked = {name: getattr(self, name) for name in ("sample", "dataset", "platform", "label")}
        return {f"{name}_key": column for name, column in asked.items() if column is not None}


@dataclass(frozen=True)
class Facts:
    """Results of the first pass over a file.

    Attributes:
        cells: Number of cells.
        columns: Columns of ``obs``.
        spatial: Whether it has coordinates under the key.
        genes_matched: Measured genes of the vocabulary (or known human genes).
        unmatched: Unknown gene names, without the ambiguous ones.
        ambiguous: Gene names that refer to several genes.
        notes: Messages about choices.
    """

    cells: int
    columns: tuple[str, ...]
    spatial: bool
    genes_matched: int
    unmatched: int
    ambiguous: int
    notes: tuple[str, ...]


def prepare(
    inputs: Sequence[str | os.PathLike] | str | os.PathLike,
    out: str | os.PathLike,
    *,
    sample_key: str | None = None,
    dataset_key: str | None = None,
    platform_key: str | None = None,
    spatial_key: str | None = None,
    label_key: str | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    feature_type: str | None = None,
    genes: Sequence[str] | str | os.PathLike | None = None,
    vocabulary: Vocabulary | None = None,
    minimum_cells: int | None = None,
    minimum_prevalence: float | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    nonzeros_in_memory: int = NONZEROS_IN_MEMORY,
    quiet: bool = False,
) -> dict[str, Any]:
    """Convert AnnData files to a corpus, or add files to one.

    After an interruption, another call resumes; new files are added at the end, with the existing vocabulary of the
    corpus. Cells without counts in the vocabulary are omitted and counts above 65,535 are clipped; both are
    counted.

    Args:
        inputs: ``.h5ad`` files, ``.zarr`` stores, or folders of them.
        out: Folder of the corpus, local or on storage shared by all workers.
        sample_key: Column of ``obs`` with the tissue sample; a file without it is one sample.
        dataset_key: Column of ``obs`` with the data set (one value per file); None: the name of the file.
        platform_key: Column of ``obs`` with the platform of a sample (one value per sample).
        spatial_key: Key of ``obsm`` with coordinates; None: "spatial" if present.
        label_key: Column of ``obs`` with labels of cells; may have gaps.
        layer: Layer with the counts; None: detected automatically.
        gene_key: Column of ``var`` with the gene names; None: detected automatically.
        feature_type: Type of the features to read; None: genes; "all": every feature.
        genes: The vocabulary: Ensembl ids, or a text file with one per line. None: chosen from the files.
        vocabulary: How it is chosen: ``"union"`` (every known human gene measured in any file; the default) or
            ``"intersection"`` (those measured in all files).
        minimum_cells: Minimum number of cells that express a chosen gene (10).
        minimum_prevalence: Minimum fraction of cells that express a chosen gene, among files that measure it (0).
        scheduler: Address of a running dask scheduler; its workers must have access to the same paths.
        workers: Local worker processes; None: one per core, limited by the number of files; 0: work in this process.
        nonzeros_in_memory: Maximum number of stored counts in memory per task, four bytes each.
        quiet: Disable progress output.

    Returns:
        A JSON-ready summary: ``corpus``, ``totals``, ``vocabulary``, ``counters``, ``parts`` (with ``notes``),
        ``seconds``.

    Raises:
        InputError: A file cannot be used (every such file is named), an option is invalid, or the disk is full.
            Finished parts are kept.
        MissingDependencyError: Several processes are requested and dask is not installed.
    """
    start = time.monotonic()
    files = find_inputs([inputs] if isinstance(inputs, str | os.PathLike) else inputs)
    folder = _local_folder(out)
    require_options(
        {"sample_key": sample_key, "dataset_key": dataset_key, "platform_key": platform_key,
         "spatial_key": spatial_key, "label_key": label_key, "layer": layer, "gene_key": gene_key,
         "feature_type": feature_type}
    )  # fmt: skip
    keys = Keys(
        sample=sample_key,
        dataset=dataset_key,
        platform=platform_key,
        spatial=spatial_key or "spatial",
        label=label_key,
        layer=layer,
        gene=gene_key,
        feature_type=feature_type,
    )
    wanted = _wanted_vocabulary(genes, vocabulary, minimum_cells, minimum_prevalence)
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(_locked(folder))
        wanted = _settle_vocabulary(wanted, state, folder)
        run = stack.enter_context(_runner(scheduler, workers, len(files)))
        sources = {name: describe_source(path) for name, path in files.items()}
        facts = _check(run, files, keys, wanted, quiet)
        _check_keys(facts, keys, required_spatial=spatial_key is not None)
        vocabulary_genes, chosen = _vocabulary(
            run, files, sources, facts, keys, wanted, state, folder, quiet
        )
        made = _write(
            run, files, sources, facts, keys, vocabulary_genes, folder, nonzeros_in_memory, quiet
        )
        before = [entry["name"] for entry in state.get("parts", [])]
        order = [*before, *(name for name in files if name not in before)]
        index = write_index(folder, order, vocabulary=chosen)
        _clean(folder)
    return _summary(folder, index, made, time.monotonic() - start)


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


def find_inputs(inputs: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Return all input files; a folder stands for the ``.h5ad`` files and ``.zarr`` stores in it.

    Args:
        inputs: Files and folders.

    Returns:
        Paths by name (the file name without its suffix), in the given order.

    Raises:
        InputError: An input does not exist or has another type, or two have the same name.
    """
    paths: list[Path] = []
    for entry in inputs:
        path = Path(entry).expanduser()
        if not path.exists():
            raise InputError(
                f"'{path}' does not exist", "an .h5ad file or a folder", "Check the path"
            )
        if path.is_file() or path.suffix == ".zarr" or (path / "zarr.json").exists():
            paths.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix in (".h5ad", ".zarr"))
        if not inside:
            raise InputError(
                f"the folder '{path}' contains no .h5ad file", "at least one", "Check the path"
            )
        paths += inside
    if not paths:
        raise InputError("no input files", "at least one .h5ad file", "Pass a file or folder")
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(
                f"'{found[path.stem]}' and '{path}' have the same name",
                "file names that differ, because they name data sets",
                "Rename one of them, or omit it",
            )
        found[path.stem] = path.resolve()
    return found


def _local_folder(out: str | os.PathLike) -> Path:
    if is_remote(out):
        raise InputError(
            f"--out is '{os.fspath(out)}'",
            "a folder of this machine's file system",
            "Prepare the corpus locally and copy it: gcloud storage cp -r CORPUS gs://BUCKET/",
        )
    folder = Path(out).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file", "a folder for the corpus", "Choose another path")
    if folder.is_dir() and not (folder / "corpus.json").exists() and any(folder.iterdir()):
        raise InputError(
            f"'{folder}' contains other files",
            "a new or empty folder, or a corpus to add to",
            "Choose another folder",
        )
    return folder


def _wanted_vocabulary(
    genes: Sequence[str] | str | os.PathLike | None,
    vocabulary: Vocabulary | None,
    minimum_cells: int | None,
    minimum_prevalence: float | None,
) -> dict[str, Any]:
    """Return the options of the vocabulary, without the default ones."""
    if genes is not None:
        if vocabulary or minimum_cells is not None or minimum_prevalence is not None:
            raise InputError(
                "a vocabulary together with options for choosing one",
                "one of them",
                "Omit --genes, or omit --vocabulary and the minimum options",
            )
        listed = read_genes(genes) if isinstance(genes, str | os.PathLike) else list(genes)
        if not listed:
            raise InputError("the vocabulary is empty", "at least one gene", "Pass its genes")
        return {"mode": "given", "genes": listed}
    if vocabulary not in (None, "union", "intersection"):
        raise InputError(
            f"vocabulary = {vocabulary!r}", "'union' or 'intersection'", "Use one of them"
        )
    if minimum_cells is not None and minimum_cells < 1:
        raise InputError(f"minimum_cells = {minimum_cells}", "at least 1", "Raise it")
    if minimum_prevalence is not None and not 0 <= minimum_prevalence <= 1:
        raise InputError(
            f"minimum_prevalence = {minimum_prevalence}", "a fraction from 0 to 1", "Correct it"
        )
    options = {
        "mode": vocabulary,
        "minimum_cells": minimum_cells,
        "minimum_prevalence": minimum_prevalence,
    }
    return {name: value for name, value in options.items() if value is not None}


def read_genes(path: str | os.PathLike) -> list[str]:
    """Read a vocabulary from a text file: one gene per line, without blank lines and lines starting with #.

    Args:
        path: The file.

    Raises:
        InputError: It is not a readable text file.
    """
    try:
        text = read_text(Path(path).expanduser(), TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the vocabulary '{path}' cannot be read ({error})",
            "a text file with one gene per line",
            "Check the path",
        ) from error
    lines = (line.strip() for line in text.splitlines())
    genes = [line for line in lines if line and not line.startswith("#")]
    longest = max(genes, key=len, default="")
    if len(longest) > LONGEST_TEXT:
        raise InputError(
            f"the vocabulary '{path}' has a name of {len(longest):,} characters",
            "a text file with one gene per line",
            "Check the path",
        )
    return genes


def _settle_vocabulary(
    wanted: dict[str, Any], state: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Combine the options with those of an existing corpus, which cannot change."""
    if not state.get("complete"):
        defaults = {"mode": "union", "minimum_cells": MINIMUM_CELLS, "minimum_prevalence": 0.0}
        return wanted if wanted.get("mode") == "given" else {**defaults, **wanted}
    held = state["vocabulary"]
    if wanted.get("mode") == "given":
        if vocabulary_hash(wanted["genes"]) != held["sha256"]:
            raise InputError(
                f"the corpus '{folder}' has a vocabulary of {held['genes']} genes and --genes lists "
                f"{len(wanted['genes'])} others",
                "the vocabulary of the corpus, which cannot change",
                "Omit --genes to add files to it, or choose a new folder",
            )
        return {**wanted, "fixed": True}
    chosen = dict(held["chosen"])
    for name, value in wanted.items():
        if chosen.get(name) != value:
            raise InputError(
                f"the corpus '{folder}' was made with {name} = {chosen.get(name)!r} and {value!r} was "
                "asked for",
                "the vocabulary of the corpus, which cannot change",
                "Omit the option to add files to it, or choose a new folder",
            )
    if chosen["mode"] == "given":
        chosen["genes"] = read_genes(folder / "genes.txt")
    return {**chosen, "fixed": True}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[dict[str, Any]]:
    """Create the corpus folder, lock it against other writers, and yield the contents of ``corpus.json``."""
    index = folder / "corpus.json"
    with explain_corpus_errors(f"the corpus '{folder}'"):
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "parts", os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another cellplm prepare is writing '{folder}'",
                "one at a time",
                "Wait for it, or stop it",
            ) from error
        if not index.exists():
            with explain_corpus_errors(f"the corpus '{folder}'"):
                atomic_write_text(index, json.dumps({"format": FORMAT, "complete": False}) + "\n")
        try:
            state = parse_json(read_text(index))
            if not isinstance(state, dict):
                msg = f"it contains a {type(state).__name__}"
                raise ValueError(msg)
        except ValueError as error:
            raise InputError(
                f"'{index}' is not JSON ({error})",
                "the file that cellplm prepare wrote",
                "Restore it, or delete it to prepare again; finished parts are kept",
            ) from error
        if state.get("format") != FORMAT:
            raise InputError(
                f"the corpus '{folder}' has format {state.get('format')}",
                f"format {FORMAT}",
                "Choose a new folder",
            )
        if state.get("complete"):
            check_index(state, str(folder))
        yield state


def describe_source(path: Path) -> dict[str, Any]:
    """Identify an input without reading it completely.

    Args:
        path: A file, or a zarr store.

    Returns:
        ``name``, ``size`` in bytes, and ``signature``: a hash of its size and of 16 evenly distributed pieces (for a
        folder: of the names and sizes of its files).
    """
    digest = hashlib.sha256()
    if path.is_dir():
        size = 0
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            size += file.stat().st_size
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    else:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for start in np.linspace(0, max(0, size - 2**16), 16).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(2**16))
    return {"name": path.name, "size": size, "signature": digest.hexdigest()[:32]}


# ---------------------------------------------------------------------------------------------
# Task execution, locally or on dask
# ---------------------------------------------------------------------------------------------


Runner = Callable[..., Iterator[tuple[str, Any]]]
"""``run(function, {name: arguments}, on_progress)`` yields (name, result or exception) as tasks end."""


@contextlib.contextmanager
def _runner(scheduler: str | None, workers: int | None, files: int) -> Iterator[Runner]:
    """Yield a function that runs tasks for all files."""
    processes = min(files, os.cpu_count() or 1) if workers is None else workers
    if scheduler is None and (processes == 0 or (workers is None and processes == 1)):
        yield _run_here
        return
    dask = require("dask.distributed", "train", "Preparing files on several processes")
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            settings = require("dask.config", "train", "Preparing files on several processes")
            stack.enter_context(settings.set({"distributed.worker.profile.enabled": False}))
            # The task bounds its memory; dask's own limits would count the file cache.
            cluster = stack.enter_context(
                dask.LocalCluster(
                    n_workers=processes,
                    threads_per_worker=1,
                    memory_limit=None,
                    dashboard_address=None,
                    silence_logs=logging.ERROR,
                )
            )
            client = stack.enter_context(dask.Client(cluster))
        else:
            try:
                client = stack.enter_context(dask.Client(scheduler, timeout=SCHEDULER_SECONDS))
            except (OSError, ValueError) as error:
                raise InputError(
                    f"no dask scheduler answers at '{scheduler}' ({error})",
                    "the address of a running scheduler, such as tcp://10.0.0.5:8786",
                    "Start it with: dask scheduler, and workers with: dask worker ADDRESS",
                ) from error
        yield functools.partial(_run_on_dask, client, dask)


def _run_here(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    on_progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Any]]:
    for name, arguments in tasks.items():
        try:
            yield name, function(*arguments, functools.partial(on_progress, name))
        except CellPLMError as error:
            yield name, error


def _run_on_dask(
    client: Any,
    dask: Any,
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    on_progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Any]]:
    client.subscribe_topic(_TOPIC, lambda event: on_progress(*event[1]))
    names = {}
    for name, arguments in tasks.items():
        future = client.submit(_remote, function, name, arguments, pure=False)
        names[future] = name
    try:
        for future in dask.as_completed(list(names)):
            error = future.exception()
            if error is None:
                yield names[future], future.result()
            elif type(error).__name__ == "KilledWorker":
                msg = explain(
                    f"the processes that worked on '{names[future]}' died, most often because of insufficient memory",
                    "enough memory for every worker",
                    "Use fewer of them (--workers), and run the same command again; finished parts are "
                    "kept",
                )
                yield names[future], InputError(msg)
            else:
                raise error
    finally:
        client.cancel(list(names))
        client.unsubscribe_topic(_TOPIC)


def _remote(function: Callable[..., Any], name: str, arguments: tuple) -> Any:
    """Run a task on a worker and send its progress once per second; errors of this package are returned, not raised."""
    from dask.distributed import get_worker

    worker, last = get_worker(), [time.monotonic()]

    def advance(done: int) -> None:
        if time.monotonic() - last[0] >= 1:
            last[0] = time.monotonic()
            worker.log_event(_TOPIC, (name, done))

    try:
        return function(*arguments, advance)
    except CellPLMError as error:
        return error


def _run_stage(
    run: Runner,
    title: str,
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    sizes: Mapping[str, int],
    unit: str,
    quiet: bool,
) -> dict[str, Any]:
    """Run a function on every file with progress; all files are tried before an error is raised.

    Returns results by name, in the order of ``tasks``. Raises InputError with every file for which the function failed.
    """
    total = sum(sizes[name] for name in tasks)
    report = ProgressReport(title, total, unit=unit, quiet=quiet or not tasks, first="starting")
    lock = threading.Lock()  # dask reports progress from another thread
    done: dict[str, int] = {}
    results: dict[str, Any] = {}
    errors: dict[str, CellPLMError] = {}

    def on_progress(name: str, value: int) -> None:
        with lock:
            if name not in results and name not in errors:
                done[name] = value
                report.update(sum(done.values()), name)

    try:
        for name, result in run(function, tasks, on_progress):
            with lock:
                if isinstance(result, CellPLMError):
                    errors[name] = result
                else:
                    results[name] = result
                done[name] = sizes[name]
                report.update(sum(done.values()), name)
    finally:
        report.close()
    if errors:
        messages = dict.fromkeys(_named(name, error) for name, error in errors.items())
        text = "\n  ".join(messages)
        if len(errors) > 1:
            text = f"{len(errors)} of {len(tasks)} files cannot be used:\n  {text}"
        if "finished parts are kept" not in text:
            text += (
                "\nRun again without these files, or with corrected ones; finished parts are kept."
            )
        raise InputError(text)
    return {name: results[name] for name in tasks}


def _named(name: str, error: Exception) -> str:
    text = str(error)
    return text if name in text else f"'{name}': {text}"


# ---------------------------------------------------------------------------------------------
# First pass: open every file
# ---------------------------------------------------------------------------------------------


def _check(
    run: Runner, files: Mapping[str, Path], keys: Keys, wanted: Mapping[str, Any], quiet: bool
) -> dict[str, Facts]:
    genes = wanted.get("genes")
    tasks = {name: (path, keys, genes) for name, path in files.items()}
    return _run_stage(
        run, "checking files", _check_file, tasks, dict.fromkeys(files, 1), "files", quiet
    )


def _check_file(path: Path, keys: Keys, genes: list[str] | None, advance: Advance) -> Facts:
    """Open a file and return its facts."""
    with open_counts(path, genes or _human_genes(), **keys.reading()) as source:
        mapping = source.report.genes
        return Facts(
            cells=source.cells,
            columns=tuple(map(str, source.obs.columns)),
            spatial=keys.spatial in source.obsm,
            genes_matched=mapping.genes_matched,
            unmatched=mapping.unmatched - mapping.ambiguous,
            ambiguous=mapping.ambiguous,
            notes=source.report.notes,
        )


def _human_genes() -> list[str]:
    return sorted(load_human_table().symbols)


def _check_keys(facts: Mapping[str, Facts], keys: Keys, *, required_spatial: bool) -> None:
    """Raise an error for keys that no file has, because they are probably misspelled."""
    for option, column in keys.columns().items():
        if not any(column in fact.columns for fact in facts.values()):
            everywhere = sorted({c for fact in facts.values() for c in fact.columns})
            raise InputError(
                f"no file has the column '{column}' in obs that {option} names",
                f"one of {', '.join(everywhere) or 'no columns at all'}",
                nearest(column, everywhere, "Correct the name, or omit the option"),
            )
    if required_spatial and not any(fact.spatial for fact in facts.values()):
        raise InputError(
            f"no file has '{keys.spatial}' in obsm",
            "coordinates under that key in at least one",
            "Correct --spatial-key, or omit it",
        )


# ---------------------------------------------------------------------------------------------
# Second pass: the vocabulary
# ---------------------------------------------------------------------------------------------


def _vocabulary(
    run: Runner,
    files: Mapping[str, Path],
    sources: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Facts],
    keys: Keys,
    wanted: dict[str, Any],
    state: Mapping[str, Any],
    folder: Path,
    quiet: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Return the vocabulary, written to the corpus, and how it was chosen."""
    if wanted.get("fixed"):
        chosen = dict(state["vocabulary"]["chosen"])
        genes = (folder / "genes.txt").read_text(encoding="utf-8").splitlines()
        if vocabulary_hash(genes) != state["vocabulary"]["sha256"]:
            raise InputError(
                f"genes.txt of the corpus '{folder}' is not its vocabulary",
                f"the {state['vocabulary']['genes']} genes the corpus was made with",
                "Put the original genes.txt back, or prepare a new corpus",
            )
        return genes, chosen
    if wanted["mode"] == "given":
        genes, chosen = wanted["genes"], {"mode": "given"}
    else:
        tasks = {
            name: (path, keys, folder / "parts", name, sources[name])
            for name, path in files.items()
        }
        sizes = {name: fact.cells for name, fact in facts.items()}
        counted = _run_stage(run, "counting genes", _count_file, tasks, sizes, "cells", quiet)
        genes = choose_genes(
            _human_genes(),
            [expressed for expressed, _ in counted.values()],
            [measured for _, measured in counted.values()],
            [facts[name].cells for name in files],
            mode=wanted["mode"],
            minimum_cells=wanted["minimum_cells"],
            minimum_prevalence=wanted["minimum_prevalence"],
        )
        chosen = dict(wanted)
    write_genes(folder, genes)
    return genes, chosen


def choose_genes(
    candidates: Sequence[str],
    expressed: Sequence[np.ndarray],
    measured: Sequence[np.ndarray],
    cells: Sequence[int],
    *,
    mode: Vocabulary,
    minimum_cells: int,
    minimum_prevalence: float,
) -> list[str]:
    """Choose a vocabulary from the measured and expressed genes of the files.

    Args:
        candidates: Genes.
        expressed: int64 [genes] per file: cells with a count.
        measured: bool [genes] per file.
        cells: Number of cells per file.
        mode: ``"union"`` or ``"intersection"`` of the measured genes.
        minimum_cells: Minimum number of cells that express the gene, over all files.
        minimum_prevalence: Minimum fraction of expressing cells, over the files that measure the gene.

    Returns:
        The chosen genes, in the order of ``candidates``.

    Raises:
        InputError: No gene is left.
    """
    table = np.asarray(measured, bool)
    total = np.sum(expressed, axis=0)
    tested = np.asarray(cells, np.int64) @ table
    kept = table.any(axis=0) if mode == "union" else table.all(axis=0)
    kept &= (total >= minimum_cells) & (total >= minimum_prevalence * tested)
    if not kept.any():
        together = "any file measures" if mode == "union" else "all files measure"
        raise InputError(
            f"no gene that {together} is expressed in {minimum_cells} cells and in "
            f"{minimum_prevalence:.3g} of those that measure it",
            "at least one",
            "Lower --minimum-cells or --minimum-prevalence, or use --vocabulary union",
        )
    return [candidates[i] for i in np.flatnonzero(kept).tolist()]


def _count_file(
    path: Path, keys: Keys, parts: Path, name: str, source: Mapping[str, Any], advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    """Count the cells of a file that express each known human gene, or read the result of an earlier run.

    Returns:
        int64 [genes] and bool [genes], whether the file measures the gene.
    """
    candidates = _human_genes()
    key = json.dumps([source, keys.settings(), vocabulary_hash(candidates)])
    kept = parts / f".{name}.genes.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError), np.load(kept) as stored:
        if str(stored["key"]) == key:
            return stored["expressed"], stored["measured"]
    expressed = np.zeros(len(candidates), np.int64)
    with open_counts(path, candidates, **keys.reading()) as counts:
        for stop, block in _blocks(counts):
            expressed += np.bincount(block.indices, minlength=len(candidates))
            advance(stop)
        measured = counts.measured
    # An open file: numpy adds a suffix to the name of a new one.
    with (
        explain_corpus_errors(f"'{kept}'"),
        atomic_write(kept) as partial,
        partial.open("wb") as file,
    ):
        np.savez_compressed(file, key=key, expressed=expressed, measured=measured)
    return expressed, measured


def _blocks(source: CountSource) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Read a file in order in blocks of about ``BLOCK_NONZEROS`` counts; yields (cells read so far, block)."""
    start, rows = 0, 256
    while start < source.cells:
        stop = min(start + rows, source.cells)
        block = source.read(start, stop)
        yield stop, block
        density = max(1.0, block.nnz / (stop - start))
        rows = int(np.clip(BLOCK_NONZEROS / density, 64, 4 * rows))
        start = stop


# ---------------------------------------------------------------------------------------------
# Third pass: write the parts
# ---------------------------------------------------------------------------------------------


def _write(
    run: Runner,
    files: Mapping[str, Path],
    sources: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Facts],
    keys: Keys,
    genes: list[str],
    folder: Path,
    nonzeros_in_memory: int,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """Write the unfinished parts; returns their records by name."""
    settings = keys.settings()
    digest = vocabulary_hash(genes)
    tasks = {
        name: (path, name, keys, folder, sources[name], facts[name], nonzeros_in_memory)
        for name, path in files.items()
        if not _is_finished(folder, name, sources[name], settings, digest)
    }
    sizes = {name: facts[name].cells for name in files}
    return _run_stage(run, "writing parts", _write_file, tasks, sizes, "cells", quiet)


def _is_finished(
    folder: Path,
    name: str,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    vocabulary: str,
) -> bool:
    """Return whether a part was made from this source, with these settings and this vocabulary."""
    try:
        record = parse_json(read_text(folder / "parts" / f"{name}.json"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and record.get("format") == FORMAT
        and record.get("source") == source
        and record.get("settings") == settings
        and record.get("vocabulary") == vocabulary
        and (folder / "parts" / f"{name}.zarr" / "zarr.json").is_file()
    )


def _write_file(
    path: Path,
    name: str,
    keys: Keys,
    folder: Path,
    described: Mapping[str, Any],
    facts: Facts,
    nonzeros_in_memory: int,
    advance: Advance,
) -> dict[str, Any]:
    """Write the part of one file."""
    genes = (folder / "genes.txt").read_text(encoding="utf-8").splitlines()
    spool = Spool(folder / "parts" / f".{name}.spool", index_type(len(genes)), nonzeros_in_memory)
    clipped = 0
    with (
        explain_corpus_errors(f"part '{name}' of the corpus '{folder}'"),
        contextlib.closing(spool),
        open_counts(path, genes, **keys.reading()) as source,
    ):
        # Reading dominates the run time; writing starts after the complete file has been read.
        for stop, block in _blocks(source):
            counts = block.data
            if counts.size and counts.max() > LARGEST_STORED_COUNT:
                clipped += int((counts > LARGEST_STORED_COUNT).sum())
                counts = np.minimum(counts, LARGEST_STORED_COUNT)
            spool.append(block.indices, counts, np.diff(block.indptr))
            advance(stop)
        per_cell = spool.cell_nonzeros()
        layout = _lay_out(source, name, keys, per_cell)
        notes = [*source.report.notes, *layout.notes]
        if clipped:
            notes.append(f"{clipped} counts above {LARGEST_STORED_COUNT:,} were clipped.")
        mapping = source.report.genes
        outside = mapping.unmatched - mapping.ambiguous - mapping.blank
        counters = {
            "clipped_counts": clipped,
            "unknown_genes": facts.unmatched,
            "ambiguous_genes": facts.ambiguous,
            "genes_outside_vocabulary": outside,
            "duplicated_genes": mapping.duplicated,
            "empty_cells": int((per_cell == 0).sum()),
            "empty_samples": layout.empty_samples,
            "cells_without_label": layout.unlabelled,
            "notes": notes,
        }
        order = layout.order
        with PartWriter(folder, name, genes, per_cell[order]) as writer:
            for rows in spool.runs(order):
                writer.append(*spool.gather(rows))
            return writer.finish(
                layout.samples,
                dataset_name=layout.dataset_name,
                cell_names=source.obs_names[order].tolist(),
                source_rows=order,
                coordinates=layout.coordinates,
                labels=layout.labels,
                measured=source.measured,
                source=described,
                settings=keys.settings(),
                counters=counters,
            )


@dataclass(frozen=True)
class _Layout:
    """Order of the cells of a file in its part.

    Attributes:
        order: int64 [cells], rows of the source in the order of the part, without cells without counts.
        samples: The samples in order.
        dataset_name: The data set.
        coordinates: float32 [cells, 2] in the order of the part, or None.
        labels: Labels in the order of the part, or None.
        empty_samples: Number of samples without cells.
        unlabelled: Number of cells without a label, if the file has labels.
        notes: Messages about choices.
    """

    order: np.ndarray
    samples: list[PartSample]
    dataset_name: str
    coordinates: np.ndarray | None
    labels: list[str | None] | None
    empty_samples: int
    unlabelled: int
    notes: list[str]


def _lay_out(source: CountSource, name: str, keys: Keys, per_cell: np.ndarray) -> _Layout:
    """Sort the cells of a file by sample, and within samples in storage order."""
    notes: list[str] = []
    columns = set(map(str, source.obs.columns))
    dataset = name
    if keys.dataset is not None and keys.dataset in columns:
        dataset = _single(source, keys.dataset, source.column(keys.dataset, missing=""), "file")
    elif keys.dataset is not None:
        notes.append(f"No column '{keys.dataset}' in obs: the data set is called '{name}'.")
    codes, names = np.zeros(source.cells, np.int64), [name]
    if keys.sample is not None and keys.sample in columns:
        codes, values = pd.factorize(source.column(keys.sample))
        names = [str(value) for value in values]
    elif keys.sample is not None:
        notes.append(f"No column '{keys.sample}' in obs: the file is one sample.")
    platforms = None
    if keys.platform is not None and keys.platform in columns:
        platforms = source.column(keys.platform, missing="")
    elif keys.platform is not None:
        notes.append(f"No column '{keys.platform}' in obs: platform unknown.")
    if keys.label is not None and keys.label not in columns:
        notes.append(f"No column '{keys.label}' in obs: cells have no labels.")

    positions = source.coordinates(keys.spatial)
    full = np.flatnonzero(per_cell > 0)
    if len(full) < source.cells:
        notes.append(f"{source.cells - len(full)} cells without counts were omitted.")
    grouped = full[np.argsort(codes[full], kind="stable")]
    sizes = np.bincount(codes[full], minlength=len(names))
    samples, order, placed, empty = [], [], [], []
    for number, cells in enumerate(np.split(grouped, np.cumsum(sizes)[:-1])):
        if not len(cells):
            empty.append(names[number])
            continue
        scaled = None
        if positions is not None and np.isfinite(positions[cells]).all(axis=1).any():
            # Batches import jax, which workers on dissociated cells do not need.
            from cellplm_jax.data.batches import scale_coordinates

            scaled = scale_coordinates(positions[cells])
        # Seeded by names, so that a part is reproducible.
        seed = zlib.crc32(f"{dataset}/{names[number]}".encode())
        chosen = storage_order(len(cells), scaled, np.random.default_rng(seed))
        order.append(cells[chosen])
        placed.append(
            np.full((len(cells), 2), np.nan, np.float32) if scaled is None else scaled[chosen]
        )
        platform = ""
        if platforms is not None:
            platform = _single(source, str(keys.platform), platforms[cells], "sample")
        samples.append(PartSample(names[number], len(cells), platform, scaled is not None))
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{len(empty)} samples without counts were omitted: {shown}.")
    rows = np.concatenate(order) if order else np.zeros(0, np.int64)
    labels, unlabelled = None, 0
    if keys.label is not None and keys.label in columns:
        texts = source.column(keys.label, missing="")[rows]
        labels = [text or None for text in texts.tolist()]
        unlabelled = sum(label is None for label in labels)
    spatial = any(sample.spatial for sample in samples)
    return _Layout(
        order=rows,
        samples=samples,
        dataset_name=dataset,
        coordinates=np.concatenate(placed) if spatial else None,
        labels=labels,
        empty_samples=len(empty),
        unlabelled=unlabelled,
        notes=notes,
    )


def _single(source: CountSource, key: str, labels: np.ndarray, of: str) -> str:
    """Return the only value among the labels of some cells; "" if all are missing."""
    values = pd.unique(labels)
    if len(values) > 1:
        shown = ", ".join(f"'{value}'" for value in values[:5])
        raise InputError(
            f"obs['{key}'] of '{source.report.source}' has {len(values)} values in one {of} ({shown})",
            f"one value per {of}",
            f"Use another column, or split the {of}",
        )
    return str(values[0])


class Spool:
    """Rows of counts, written in one order and read in another, in bounded memory.

    Rows stay in memory up to a limit; beyond it all are written to a file, which is then read once for every
    range of rows that fits the limit.

    Args:
        path: The file, if one is needed.
        dtype: Type of gene indices.
        limit: Maximum number of stored counts in memory.
    """

    def __init__(self, path: Path, dtype: np.dtype, limit: int):
        self.path, self.dtype, self.limit = path, dtype, limit
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []
        self._sizes: list[np.ndarray] = []
        self._held = 0
        self._file: IO[bytes] | None = None

    def append(self, gene: np.ndarray, count: np.ndarray, cell_nonzeros: np.ndarray) -> None:
        """Append rows.

        Args:
            gene: Gene indices [nonzeros].
            count: Counts [nonzeros].
            cell_nonzeros: int [rows], stored counts of each.
        """
        block = (gene.astype(self.dtype), count.astype(np.uint16))
        self._sizes.append(np.asarray(cell_nonzeros, np.int64))
        self._held += len(gene)
        if self._file is None and self._held > self.limit:
            self._file = self.path.open("w+b", buffering=0)
            for held in self._blocks:
                self._store(held)
            self._blocks = []
        if self._file is None:
            self._blocks.append(block)
        else:
            self._store(block)

    def cell_nonzeros(self) -> np.ndarray:
        """Return int64 [rows], the stored counts of each row."""
        return np.concatenate(self._sizes) if self._sizes else np.zeros(0, np.int64)

    def runs(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Split an order of rows into ranges that fit the limit."""
        # In memory any rows are accessible; in a file each range costs one complete read.
        most = self.limit if self._file is not None else min(self.limit, 2**24)
        ends = np.cumsum(self.cell_nonzeros()[order])
        start = 0
        while start < len(order):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
            yield order[start:stop]
            start = stop

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored counts of selected rows, in the given order.

        Args:
            rows: int64 [n], without repetitions.

        Returns:
            Gene indices and counts [nonzeros].
        """
        first = np.concatenate([[0], np.cumsum([len(sizes) for sizes in self._sizes])])
        sizes = self.cell_nonzeros()[rows]
        targets = np.cumsum(sizes) - sizes
        gene = np.empty(int(sizes.sum()), self.dtype)
        count = np.empty(len(gene), np.uint16)
        by_row = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[by_row], first)
        offset = 0
        for number, (low, high) in enumerate(itertools.pairwise(cuts)):
            if high > low:
                block_gene, block_count = self._load(number, offset)
                block_sizes = self._sizes[number]
                ends = np.cumsum(block_sizes)
                picked = by_row[low:high]
                local = rows[picked] - first[number]
                spans = zip(
                    (ends[local] - block_sizes[local]).tolist(),
                    ends[local].tolist(),
                    targets[picked].tolist(),
                    strict=True,
                )
                for begin, end, target in spans:
                    gene[target : target + end - begin] = block_gene[begin:end]
                    count[target : target + end - begin] = block_count[begin:end]
            offset += int(self._sizes[number].sum()) * (self.dtype.itemsize + 2)
        return gene, count

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _store(self, block: tuple[np.ndarray, np.ndarray]) -> None:
        for array in block:
            data = memoryview(array.tobytes())
            while data:
                data = data[self._file.write(data) :]  # type: ignore[union-attr]

    def _load(self, number: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
        if self._file is None:
            return self._blocks[number]
        length = int(self._sizes[number].sum())
        self._file.seek(offset)
        gene = np.fromfile(self._file, self.dtype, length)
        return gene, np.fromfile(self._file, np.uint16, length)


# ---------------------------------------------------------------------------------------------
# Cleanup and summary
# ---------------------------------------------------------------------------------------------


def _clean(folder: Path) -> None:
    """Remove temporary files of interrupted runs."""
    for leftover in (folder / "parts").glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _summary(
    folder: Path, index: Mapping[str, Any], made: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    parts = []
    for entry in index["parts"]:
        record = parse_json(read_text(folder / "parts" / f"{entry['name']}.json"))
        kept = {name: entry[name] for name in ("name", "samples", "cells", "nonzeros")}
        parts.append(
            {
                **kept,
                "genes_measured": entry["genes_measured"],
                "made_now": entry["name"] in made,
                "counters": {k: v for k, v in record["counters"].items() if k != "notes"},
                "notes": record["counters"].get("notes", []),
            }
        )
    return {
        "corpus": str(folder),
        "totals": index["totals"],
        "vocabulary": index["vocabulary"],
        "counters": index["counters"],
        "parts": parts,
        "seconds": round(seconds, 1),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """Format the summary of :func:`prepare` as text.

    Args:
        summary: From :func:`prepare`.
    """
    width = max([len(part["name"]) for part in summary["parts"]] + [4]) + 2
    lines = [f"{'part':<{width}}{'samples':>8}{'cells':>10}{'genes':>8}{'counts/cell':>13}"]
    for part in summary["parts"]:
        density = part["nonzeros"] / max(1, part["cells"])
        lines.append(
            f"{part['name']:<{width}}{part['samples']:>8,}{part['cells']:>10,}"
            f"{part['genes_measured']:>8,}{density:>13,.0f}{'' if part['made_now'] else '  kept'}"
        )
        if part["made_now"]:
            lines += [f"  {note}" for note in part["notes"]]
    totals, chosen = summary["totals"], summary["vocabulary"]["chosen"]
    lines.append(
        f"{totals['samples']:,} samples ({totals['spatial_samples']:,} spatial), "
        f"{totals['cells']:,} cells, {totals['nonzeros']:,} stored counts"
    )
    lines.append(f"{summary['vocabulary']['genes']:,} genes ({chosen['mode']})")
    counters = ", ".join(
        f"{name.replace('_', ' ')} {value:,}"
        for name, value in summary["counters"].items()
        if value
    )
    lines.append(f"reported: {counters or 'nothing out of the ordinary'}")
    return "\n".join(lines)
