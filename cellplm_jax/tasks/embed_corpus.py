"""Embedding of a corpus: one context per tissue sample, by all processes of a job, into one store.

The store is AnnData-encoded zarr v3 from the beginning; rows of unfinished samples are NaN. Processes
never wait for each other: each embeds the samples assigned by :func:`deal`, writes their rows, then marks them. Two
samples may share one chunk; TensorStore writes partial chunks with a conditional read-modify-write (a file system lock,
or a generation at gs://) and retries on conflicts.

The marks are an array in ``uns``, because AnnData rejects stores with unknown members next to ``obs``, ``uns`` and the
like; there, readers of an unfinished store can see which samples are finished. Chunks of one byte make every mark a
separate file with a single writer. The last process writes ``complete`` to the root and then removes the marks.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import heapq
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict
from scipy import sparse

from cellplm_jax._version import __version__
from cellplm_jax.data.anndata_io import in_vocabulary
from cellplm_jax.data.corpus import LABEL_COLUMN, Corpus, open_corpus
from cellplm_jax.data.corpus_writer import anndata_settings
from cellplm_jax.data.genes import GeneMapping, map_genes
from cellplm_jax.display import html_table, one_line
from cellplm_jax.errors import InputError, explain
from cellplm_jax.progress import ProgressReport
from cellplm_jax.storage import Folder, atomic_write, explain_write_errors
from cellplm_jax.tasks.embed import embed_context
from cellplm_jax.tasks.files import check_output
from cellplm_jax.tasks.long_context import IOWait
from cellplm_jax.tasks.pretrained import EMBEDDING_PARTS, Pretrained, as_pretrained
from cellplm_jax.untrusted import parse_json

if TYPE_CHECKING:
    import pandas as pd

KEY = "X_cellplm"
"""Key of ``obsm`` with the embedding."""

CHUNK_VALUES = 2**20
"""Values per chunk of the embedding, one file of 4 MiB: what a small sample reads and rewrites at its ends."""

CREATION_SECONDS = 900
"""Time that processes wait for process 0 to create the store."""

POLL_SECONDS = 1.0
"""Polling interval for a store that another process writes."""

FORMAT = 1
"""Version of the state in the root."""

_ROOT = "zarr.json"
_STATE = "cellplm_embedding"
_ROWS = f"obsm/{KEY}"
_DONE = "uns/cellplm/samples_done"


class CorpusEmbedding(NamedTuple):
    """Result of embedding a corpus.

    Attributes:
        out: The store.
        cells: Number of cells of the corpus.
        samples: Number of samples of the corpus.
        embedded: Number of samples that this call embedded.
        complete: Whether all samples are finished; False: other processes are still running.
        messages: Messages about the corpus.
    """

    out: str
    cells: int
    samples: int
    embedded: int
    complete: bool
    messages: list[str]

    def __repr__(self) -> str:
        return one_line(self, self._asdict())

    def _repr_html_(self) -> str:
        return html_table(self, self._asdict())


def embed_corpus(
    corpus: Corpus | str | os.PathLike,
    model: Pretrained | str | os.PathLike,
    out: str | os.PathLike,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
    quiet: bool = False,
) -> CorpusEmbedding:
    """Embed all cells of a corpus, every tissue sample as one context, into one store.

    The store opens with ``anndata.read_zarr``: ``obsm["X_cellplm"]`` is float32 [cells, latent] in corpus order;
    ``obs`` has the ``sample`` and ``dataset`` of every cell, its ``source_row`` in the source file, and its ``label``
    if the corpus has labels, indexed by the original cell name (with the suffix ``-DATASET`` if the corpus has several
    data sets); ``uns["cellplm"]`` is the same as from :func:`cellplm_jax.embed`.

    If several processes call it, each embeds a subset of the samples; they communicate only through the store. After an
    interruption, another call in any number of processes resumes with the unfinished samples.

    Args:
        corpus: Created by ``cellplm prepare``: a folder, a ``gs://`` address, or an opened one
            (``cellplm_jax.data.corpus.open_corpus``).
        model: From :func:`cellplm_jax.load`, or a source for it, such as ``"small"``.
        out: The store: a folder shared by all processes, or a ``gs://`` address. New, or created by the same model for
            the same corpus.
        process_index: Number of this process, from 0; None: that of JAX, which is 0 without a job.
        process_count: Processes of the job; None: that of JAX, which is 1 without a job.
        quiet: No progress on standard error.

    Returns:
        Summary of the call.

    Raises:
        InputError: The corpus cannot be read or shares too few genes with the model; ``out`` cannot be written, or
            belongs to another model, corpus or precision; or process 0 did not create the store in time.
    """
    index, count = _place(process_index, process_count)
    model = as_pretrained(model)
    corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    mapping = map_genes(corpus.genes, model.genes)
    folder = Folder(out)
    state = {
        "format": FORMAT,
        "corpus": corpus.fingerprint(),
        "weights": weights_fingerprint(model),
        "model": model.id,
        "precision": model.precision,
        "complete": False,
    }
    cells = [sample.cells for sample in corpus.samples]
    messages = [f"Genes of the corpus: {mapping.summary()}"]
    if model.config.positions.kind == "none" and any(s.spatial for s in corpus.samples):
        messages.append("Coordinates were not used: this model was trained without positions")
    with explain_write_errors(
        f"the embedding '{folder.path}'",
        room=f"{sum(cells) * model.config.latent_size * 4 / 1e9:.2g} GB for the embedding",
        again="finished samples are kept",
    ):
        if folder.local is not None and folder.local.is_file():
            raise InputError(_something_else(folder))
        if folder.read(_ROOT) is None:
            if index == 0:
                _create(folder, corpus, model, mapping, state)
            else:
                _wait_for_store(folder)
        _check_same(_read_state(folder), state, folder.path)
        done = _done_samples(folder)
        if done is None:
            messages.append(f"'{folder.path}' was complete already; nothing was embedded")
            return CorpusEmbedding(folder.path, sum(cells), len(cells), 0, True, messages)
        waiting = IOWait()
        mine = deal(cells, count)[index]
        left = [sample for sample in mine if not done[sample]]
        title = "embedding" if count == 1 else f"embedding ({index + 1} of {count})"
        # Counts this process's cells only; the others report their own.
        progress = ProgressReport(
            title,
            sum(cells[s] for s in left),
            unit="cells",
            quiet=quiet,
        )
        if len(left) < len(mine):
            progress.say(f"{len(mine) - len(left)} of {len(mine)} samples were done already")
        try:
            _embed_samples(corpus, model, mapping, folder, left, waiting, progress)
        finally:
            progress.close()
        complete = _complete(folder)
    messages += waiting.messages()
    return CorpusEmbedding(
        folder.path,
        sum(cells),
        len(cells),
        len(left),
        complete,
        messages,
    )


def deal(cells: Sequence[int], processes: int) -> list[list[int]]:
    """Assign samples to processes: the largest first, each to the process with the fewest cells so far.

    All samples are assigned, finished or not, so that processes that start at different times agree without
    communication. Each process follows this order, so the remaining work of an interrupted job is balanced as well.

    Args:
        cells: Cells of each sample.
        processes: Number of processes.

    Returns:
        The samples of each process, largest first.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0, process) for process in range(processes)]
    for sample in sorted(range(len(cells)), key=lambda number: (-cells[number], number)):
        load, process = heapq.heappop(loads)
        shares[process].append(sample)
        heapq.heappush(loads, (load + cells[sample], process))
    return shares


def wait_until_complete(out: str | os.PathLike) -> None:
    """Wait until all processes have embedded their samples, without a timeout.

    Args:
        out: The store.
    """
    folder = Folder(out)
    pause = POLL_SECONDS
    while not _complete(folder):
        time.sleep(pause)
        # Each poll of a store at gs:// is a request.
        pause = min(2 * pause, 30 * POLL_SECONDS)


def weights_fingerprint(model: Pretrained) -> str:
    """Return a short hash of everything an embedding depends on: architecture, genes and weights.

    Args:
        model: The model.
    """
    facts = json.dumps(
        [dataclasses.asdict(model.config), model.genes],
        sort_keys=True,
        default=str,
    )
    digest = hashlib.sha256(facts.encode())
    for path, leaf in sorted(flatten_dict(model.params).items()):
        if path[0] in EMBEDDING_PARTS:
            digest.update("/".join(path).encode())
            # Decoder and head are not hashed: they do not change an embedding.
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


class SampleRows:
    """The cells of one corpus sample in the columns of a model's vocabulary, for embedding.

    Args:
        corpus: The corpus.
        sample: Number of the sample.
        mapping: From the genes of the corpus to those of the model.
    """

    def __init__(self, corpus: Corpus, sample: int, mapping: GeneMapping):
        self._corpus = corpus
        self._sample = sample
        self._mapping = mapping
        self.cells = corpus.samples[sample].cells

    def read_rows(self, indices: np.ndarray) -> sparse.csr_matrix:
        """Read cells by their numbers in the sample, in one contiguous read.

        Args:
            indices: int [n], normally consecutive.

        Returns:
            float32 CSR [n, genes of the model], canonical.
        """
        indices = np.asarray(indices, np.int64)
        low = high = 0
        if len(indices):
            low = int(indices.min())
            high = int(indices.max()) + 1
        run = self._corpus.read(self._sample, low, high)
        rows = in_vocabulary(
            run.count.astype(np.float32),
            run.gene,
            run.indptr,
            self._mapping.column,
            len(self._mapping.measured),
        )
        consecutive = len(indices) == high - low and (np.diff(indices) == 1).all()
        return rows if consecutive else sparse.csr_matrix(rows[indices - low])


# -- parts of the above --------------------------------------------------------------------------


def _place(index: int | None, count: int | None) -> tuple[int, int]:
    """Return the number of this process and of all processes."""
    if index is None and count is None:
        return jax.process_index(), jax.process_count()
    if index is None or count is None or not 0 <= index < count:
        raise InputError(
            f"process_index = {index} and process_count = {count}",
            "a number of processes and a number from 0 below it, or neither",
            "Give both",
        )
    return index, count


def _embed_samples(
    corpus: Corpus,
    model: Pretrained,
    mapping: GeneMapping,
    folder: Folder,
    left: Sequence[int],
    waiting: IOWait,
    progress: ProgressReport,
) -> None:
    """Embed samples, write their rows and mark them."""
    if not left:
        return
    rows = _open(folder, _ROWS)
    done = _open(folder, _DONE)
    cells = [sample.cells for sample in corpus.samples]
    first = np.concatenate([[0], np.cumsum(cells)])
    embedded = 0
    for sample in left:
        if cells[sample]:
            embedding = embed_context(
                SampleRows(corpus, sample, mapping),
                model,
                np.arange(cells[sample]),
                corpus.coordinates(sample),
                waiting,
                lambda text, n=embedded: progress.update(n, text),
            )
            rows[int(first[sample]) : int(first[sample + 1])].write(embedding).result()
        # Mark samples only after writing: a process that ends in between embeds the sample again.
        done[sample].write(1).result()
        embedded += cells[sample]
        progress.update(embedded)


def _open(folder: Folder, array: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": folder.spec(array)}
    return tensorstore.open(spec, read=True, write=True, context=folder.context).result()


def _read_state(folder: Folder) -> dict[str, Any]:
    """Return the state in the root of the store."""
    text = folder.read(_ROOT) or b""
    try:
        state = parse_json(text)["attributes"][_STATE]
        state.get("format")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(_something_else(folder)) from error
    if state.get("format") != FORMAT:
        raise InputError(
            f"'{folder.path}' was begun in format {state.get('format')}",
            f"format {FORMAT}",
            "Resume with the version of cellplm-jax that created it, or choose another output",
        )
    return state


def _check_same(
    found: dict[str, Any],
    wanted: dict[str, Any],
    path: str,
) -> None:
    """Raise an error if the store belongs to other work."""
    for name, what in (
        ("corpus", "of the corpus"),
        ("weights", "by the model"),
        ("precision", "in the precision"),
    ):
        if found[name] != wanted[name]:
            names = [
                f"{state['model']} ({state[name]})" if name == "weights" else state[name]
                for state in (found, wanted)
            ]
            raise InputError(
                f"'{path}' holds an embedding {what} {names[0]}",
                f"one {what} {names[1]}, or a new folder",
                "Choose another output, or delete this one to start again",
            )


def _something_else(folder: Folder) -> str:
    return explain(
        f"'{folder.path}' contains other data",
        "a new folder, or an unfinished embedding of a corpus",
        "Choose another output",
    )


def _done_samples(folder: Folder) -> np.ndarray | None:
    """Return uint8 [samples], 1 for finished ones; None: all are, according to the root."""
    try:
        done = _open(folder, _DONE).read().result()
    except ValueError:
        done = None
    # Read the root last: marks are removed after it is complete, so the marks read so far may lack some.
    if _read_state(folder)["complete"]:
        return None
    if done is None:
        raise InputError(
            f"'{folder.path}' does not record which samples are finished",
            f"the array {_DONE}",
            "Copy the store again, or delete it to start again",
        )
    return done


def _complete(folder: Folder) -> bool:
    """Return whether all samples are finished; the first process to see this records it and removes the marks."""
    done = _done_samples(folder)
    if done is None:
        # Another process may have finished, and this one marked a sample after that.
        folder.remove(_DONE)
        return True
    if not done.all():
        return False
    root = parse_json(folder.read(_ROOT) or b"")
    root["attributes"][_STATE]["complete"] = True
    # Completed before the marks are removed: in between, a reader sees both.
    folder.write(_ROOT, json.dumps(root, indent=2).encode())
    folder.remove(_DONE)
    return True


def _wait_for_store(folder: Folder) -> None:
    """Wait for process 0 to create the store; its root is written last."""
    end = time.monotonic() + CREATION_SECONDS
    while folder.read(_ROOT) is None:
        if time.monotonic() > end:
            raise InputError(
                f"the store '{folder.path}' does not exist after {CREATION_SECONDS:.0f} s",
                "the store that process 0 of the job creates first, in a location shared by all processes",
                "Check the log of process 0, and start all processes again",
            )
        time.sleep(POLL_SECONDS)


def _create(
    folder: Folder,
    corpus: Corpus,
    model: Pretrained,
    mapping: GeneMapping,
    state: dict[str, Any],
) -> None:
    """Create the store with everything except the embedding, atomically."""
    if folder.local is None:
        with tempfile.TemporaryDirectory() as temporary:
            built = Path(temporary) / "store"
            _build(built, corpus, model, mapping, state)
            folder.copy_in(built, last=_ROOT)
        return
    target = folder.local
    if target.is_dir() and any(target.iterdir()):
        raise InputError(_something_else(folder))
    if not target.exists():
        check_output(target)
    try:
        with atomic_write(target) as partial:
            _build(partial, corpus, model, mapping, state)
    except OSError as error:
        # Another process created the store in the meantime; its state is checked next.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or folder.read(_ROOT) is None:
            raise


def _build(
    target: Path,
    corpus: Corpus,
    model: Pretrained,
    mapping: GeneMapping,
    state: dict[str, Any],
) -> None:
    import pandas as pd
    import zarr
    from anndata.io import write_elem

    table = _cell_table(corpus)
    root = zarr.open_group(str(target), mode="w", zarr_format=3)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0", _STATE: state})
    with anndata_settings():
        write_elem(root, "obs", table)
        write_elem(
            root,
            "var",
            pd.DataFrame(index=pd.Index([], dtype=object)),
        )
        for name in ("obsm", "varm", "obsp", "varp", "layers"):
            write_elem(root, name, {})
        write_elem(root, "uns", {"cellplm": _provenance(corpus, model, mapping)})
    latent = model.config.latent_size
    rows = max(1, CHUNK_VALUES // latent)
    _create_array(
        target / _ROWS,
        "float32",
        [len(table), latent],
        [rows, latent],
        "NaN",
    )
    _create_array(target / _DONE, "uint8", [len(corpus.samples)], [1], 0)


def _create_array(
    path: Path,
    dtype: str,
    shape: list[int],
    chunks: list[int],
    missing: int | str,
) -> None:
    """Write the metadata of an array; missing chunks read as ``missing``."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            # Embeddings hardly compress; the checksum detects damage.
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "fill_value": missing,
            "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
        },
    }
    tensorstore.open(spec, create=True).result()


def _cell_table(corpus: Corpus) -> pd.DataFrame:
    """Return ``obs`` in corpus order, from the cell tables of the parts."""
    import pandas as pd

    samples = corpus.samples
    cells = [sample.cells for sample in samples]

    def of_sample(names: list[str]) -> pd.Categorical:
        categories = list(dict.fromkeys(names))
        number = {name: code for code, name in enumerate(categories)}
        return pd.Categorical.from_codes(
            np.repeat([number[name] for name in names], cells), categories=categories
        )

    tables = [corpus.cell_table(part) for part in range(len(corpus.parts))]
    names = [np.asarray(table.index.astype(str), object) for table in tables]
    datasets = list(dict.fromkeys(part.record["dataset"] for part in corpus.parts))
    if len(datasets) > 1:
        # As in anndata.concat(..., index_unique="-").
        names = [
            own + f"-{part.record['dataset']}"
            for own, part in zip(names, corpus.parts, strict=True)
        ]
    columns: dict[str, Any] = {
        "sample": of_sample([sample.name for sample in samples]),
        "dataset": of_sample([sample.dataset_name for sample in samples]),
        "source_row": np.concatenate([np.asarray(table["source_row"]) for table in tables]),
    }
    if corpus.label_names:
        codes = [
            table[LABEL_COLUMN].cat.set_categories(corpus.label_names).cat.codes
            if LABEL_COLUMN in table
            else np.full(len(table), -1)
            for table in tables
        ]
        columns[LABEL_COLUMN] = pd.Categorical.from_codes(
            np.concatenate(codes), categories=corpus.label_names
        )
    return pd.DataFrame(columns, index=pd.Index(np.concatenate(names)))


def _provenance(corpus: Corpus, model: Pretrained, mapping: GeneMapping) -> dict[str, Any]:
    """Return ``uns["cellplm"]`` with the keys of an embedded file."""
    spatial = any(sample.spatial for sample in corpus.samples)
    used = spatial and model.config.positions.kind != "none"
    return {
        "model": model.id,
        "model_source": model.source,
        "precision": model.precision,
        "version": __version__,
        "key_added": KEY,
        "context": {
            "batch_key": "sample",
            "cells_per_context": 0,
            "coordinates": "spatial" if used else "",
        },
        "input": {
            "source": corpus.path.rstrip("/").rsplit("/", 1)[-1],
            "corpus": corpus.fingerprint(),
            "matrix": "X",
            "values": "counts",
            "gene_key": "genes.txt",
            "genes": mapping.as_dict(),
            "cells": sum(sample.cells for sample in corpus.samples),
            "samples": len(corpus.samples),
        },
    }
