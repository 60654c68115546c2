"""``cellplm prepare``: convert AnnData files to one corpus, in bounded memory, with one task per file.

There are three passes over the files: every file is opened and checked, so that invalid files are reported before hours
of work; without a given vocabulary, the cells that express each known human gene are counted; then the parts are
written. Finished results are kept: the same command resumes after an interruption, and new files are added at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.corpus_records import FORMAT, check_index
from cellplm_jax.data.corpus_writer import explain_corpus_errors, write_index
from cellplm_jax.errors import InputError, nearest
from cellplm_jax.storage import atomic_write_text, is_remote, remove_path
from cellplm_jax.tasks.prepare_parts import NONZEROS_IN_MEMORY, Facts, Keys, write_parts
from cellplm_jax.tasks.prepare_run import Advance, Runner, open_runner, run_stage
from cellplm_jax.tasks.prepare_vocabulary import (
    Vocabulary,
    human_genes,
    make_vocabulary,
    settle_vocabulary,
    wanted_vocabulary,
)
from cellplm_jax.untrusted import parse_json, read_text, require_options


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
        {
            "sample_key": sample_key,
            "dataset_key": dataset_key,
            "platform_key": platform_key,
            "spatial_key": spatial_key,
            "label_key": label_key,
            "layer": layer,
            "gene_key": gene_key,
            "feature_type": feature_type,
        }
    )
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
    wanted = wanted_vocabulary(genes, vocabulary, minimum_cells, minimum_prevalence)
    with contextlib.ExitStack() as stack:
        # Locked before anything is read: two commands would choose two vocabularies.
        state = stack.enter_context(_locked(folder))
        wanted = settle_vocabulary(wanted, state, folder)
        run = stack.enter_context(open_runner(scheduler, workers, len(files)))
        sources = {name: describe_source(path) for name, path in files.items()}
        # All files are opened before the hours of work begin.
        facts = _check(run, files, keys, wanted, quiet)
        _check_keys(facts, keys, required_spatial=spatial_key is not None)
        vocabulary_genes, chosen = make_vocabulary(
            run,
            files,
            sources,
            facts,
            keys,
            wanted,
            state,
            folder,
            quiet,
        )
        made = write_parts(
            run,
            files,
            sources,
            facts,
            keys,
            vocabulary_genes,
            folder,
            nonzeros_in_memory,
            quiet,
        )
        before = [entry["name"] for entry in state.get("parts", [])]
        # Existing parts keep their place: the number of a sample is that of its batch embedding.
        order = [*before, *(name for name in files if name not in before)]
        index = write_index(folder, order, vocabulary=chosen)
        _clean(folder)
    return _summary(folder, index, made, time.monotonic() - start)


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
            # The lock ends with the process, also if it is killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another cellplm prepare is writing '{folder}'",
                "one at a time",
                "Wait for it, or stop it",
            ) from error
        # Marks the folder as a corpus, so that an interrupted first run can resume.
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
            # A megabyte of a file that may have a terabyte: enough to notice another file of the same size.
            last = max(0, size - 2**16)
            for start in np.linspace(0, last, 16).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(2**16))
    return {"name": path.name, "size": size, "signature": digest.hexdigest()[:32]}


def _check(
    run: Runner,
    files: Mapping[str, Path],
    keys: Keys,
    wanted: Mapping[str, Any],
    quiet: bool,
) -> dict[str, Facts]:
    genes = wanted.get("genes")
    tasks = {name: (path, keys, genes) for name, path in files.items()}
    return run_stage(
        run,
        "checking files",
        _check_file,
        tasks,
        dict.fromkeys(files, 1),
        "files",
        quiet,
    )


def _check_file(path: Path, keys: Keys, genes: list[str] | None, advance: Advance) -> Facts:
    """Open a file and return its facts."""
    with open_counts(path, genes or human_genes(), **keys.reading()) as source:
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


def _clean(folder: Path) -> None:
    """Remove temporary files of interrupted runs."""
    for leftover in (folder / "parts").glob(".*"):
        remove_path(leftover)


def _summary(
    folder: Path,
    index: Mapping[str, Any],
    made: Mapping[str, Any],
    seconds: float,
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
    totals = summary["totals"]
    chosen = summary["vocabulary"]["chosen"]
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
