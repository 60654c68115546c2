"""Second pass of ``cellplm prepare``: the vocabulary, given or chosen from the files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.corpus import vocabulary_hash
from cellplm_jax.data.corpus_writer import explain_corpus_errors, write_genes
from cellplm_jax.data.genes import load_human_table
from cellplm_jax.errors import InputError, require_choice
from cellplm_jax.storage import atomic_write
from cellplm_jax.tasks.prepare_parts import Facts, Keys, count_blocks
from cellplm_jax.tasks.prepare_run import Advance, Runner, run_stage
from cellplm_jax.untrusted import LONGEST_TEXT, TEXT_BYTES, read_text

Vocabulary = Literal["union", "intersection"]

MINIMUM_CELLS = 10
"""Minimum number of cells that express a gene of a vocabulary chosen from the files."""


def wanted_vocabulary(
    genes: Sequence[str] | str | os.PathLike | None,
    vocabulary: Vocabulary | None,
    minimum_cells: int | None,
    minimum_prevalence: float | None,
) -> dict[str, Any]:
    """Return the options of the vocabulary, without the default ones.

    Raises:
        InputError: An option is invalid, or two exclude each other.
    """
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
    if vocabulary is not None:
        require_choice("vocabulary", vocabulary, ("union", "intersection"))
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


def settle_vocabulary(
    wanted: dict[str, Any],
    state: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Combine the options with those of an existing corpus.

    Raises:
        InputError: They differ from those of the corpus, which cannot change.
    """
    if not state.get("complete"):
        defaults = {"mode": "union", "minimum_cells": MINIMUM_CELLS, "minimum_prevalence": 0.0}
        # Only explicit options are compared with those of an existing corpus, so defaults are filled in here.
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


def human_genes() -> list[str]:
    """Return the known human genes, sorted: the candidates of a vocabulary."""
    return sorted(load_human_table().symbols)


def make_vocabulary(
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
    """Return the vocabulary, written to the corpus, and how it was chosen.

    Raises:
        InputError: The corpus has lost its vocabulary.
    """
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
        genes = wanted["genes"]
        chosen = {"mode": "given"}
    else:
        tasks = {
            name: (path, keys, folder / "parts", name, sources[name])
            for name, path in files.items()
        }
        sizes = {name: fact.cells for name, fact in facts.items()}
        counted = run_stage(run, "counting genes", _count_file, tasks, sizes, "cells", quiet)
        genes = choose_genes(
            human_genes(),
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
    # The cells of the files that measure a gene: a panel must not lower the prevalence of genes outside it.
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
    path: Path,
    keys: Keys,
    parts: Path,
    name: str,
    source: Mapping[str, Any],
    advance: Advance,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the cells of a file that express each known human gene, or read the result of an earlier run.

    Returns:
        int64 [genes] and bool [genes], whether the file measures the gene.
    """
    candidates = human_genes()
    key = json.dumps([source, keys.settings(), vocabulary_hash(candidates)])
    kept = parts / f".{name}.genes.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError), np.load(kept) as stored:
        # Counted by an earlier run, of the same file with the same options.
        if str(stored["key"]) == key:
            return stored["expressed"], stored["measured"]
    expressed = np.zeros(len(candidates), np.int64)
    with open_counts(path, candidates, **keys.reading()) as counts:
        for stop, block in count_blocks(counts):
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
