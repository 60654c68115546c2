"""Held-out evaluation: masked-count prediction and embedding probe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Key

from cellplm_jax.batch import Array, CellBatch
from cellplm_jax.config import TrainConfig
from cellplm_jax.data.cell_store import CellStore
from cellplm_jax.data.packing import SampleRange
from cellplm_jax.data.pipeline import heldout_batches
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.evaluate.embedding import (
    batch_mixing,
    clustering_scores,
    knn_accuracy,
    leiden_clusters,
)
from cellplm_jax.train.metrics import heldout_scores
from cellplm_jax.train.sharding import local_rows, make_mesh, to_global
from cellplm_jax.train.step import (
    compile_embedding_step,
    compile_evaluation_step,
    heldout_gene_mask,
)

PROBE_CELLS = 5000
"""Maximum number of labelled held-out cells for the probe, evenly distributed."""

PROBE_NEIGHBORS = 15


def heldout_key(config: TrainConfig, number: int) -> Key[Array, ""]:
    """Return the PRNG key of the mask of a held-out batch."""
    return jax.random.fold_in(jax.random.key(config.seed + 2), number)


def heldout_masks(
    config: TrainConfig,
    store: CellStore,
    ranges: Sequence[SampleRange],
) -> Iterator[tuple[CellBatch, Bool[Array, "samples cells genes"]]]:
    """Yield the fixed held-out batches and their masks, which are the same for every model and baseline.

    Args:
        config: The run; its seed determines the masks.
        store: The data.
        ranges: Held-out cells.

    Yields:
        A batch, and its mask: True for hidden entries.
    """
    hide = jax.jit(lambda key, batch: heldout_gene_mask(key, batch, config))
    for number, (batch, _, _) in enumerate(heldout_batches(store, ranges, config)):
        yield batch, hide(heldout_key(config, number), batch)


class HeldoutEvaluation:
    """Scores of a state of the run on held-out cells, compiled once.

    With several processes all of them must call it, in the same order; they get the same scores.

    Args:
        config: The run.
        store: The data.
        ranges: Held-out cells; without any, the scores are empty.
        mesh: From :func:`cellplm_jax.train.sharding.make_mesh`; None: one over all devices.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: CellStore,
        ranges: Sequence[SampleRange],
        mesh: Any = None,
    ):
        self._config = config
        self._mesh = make_mesh(config.mesh, rows=config.data.rows) if mesh is None else mesh
        self._batches = heldout_batches(store, ranges, config) if ranges else []
        self._score = compile_evaluation_step(config, self._mesh)
        self._embed = compile_embedding_step(config, self._mesh)
        known = [np.flatnonzero(labels >= 0) for _, labels, _ in self._labelled()]
        self.labelled_cells = sum(map(len, known))
        self._missing: str | None = None
        self._said = False

    def __call__(self, params: Any) -> dict[str, float]:
        """Return the scores of :func:`cellplm_jax.train.metrics.heldout_scores`.

        Args:
            params: The ``"params"`` collection, on any device.
        """
        if not self._batches:
            return {}
        sums = []
        for number, (batch, _, _) in enumerate(self._batches):
            key = heldout_key(self._config, number)
            sums.append(jax.device_get(self._score(params, self._place(batch), key)))
        return heldout_scores(sums)

    def probe(self, params: Any) -> dict[str, float]:
        """Return scores of the embedding of labelled held-out cells.

        Args:
            params: The ``"params"`` collection.

        Returns:
            ``knn_accuracy``; ``ari`` of Leiden clusters; ``batch_mixing`` of the samples, if there are several.
            Empty if too few cells have labels, on all processes except the first, and without the extra ``eval`` (see
            :meth:`missing`).
        """
        parts = [
            (np.asarray(self._embed(params, self._place(batch))), labels, sample)
            for batch, labels, sample in self._labelled()
        ]
        # The embedding is a collective operation, so all processes run it; the scores need one.
        if jax.process_index() != 0 or self.labelled_cells <= PROBE_NEIGHBORS + 1:
            return {}
        known = [labels >= 0 for _, labels, _ in parts]
        embedding = np.concatenate([part[0][k] for part, k in zip(parts, known, strict=True)])
        labels = np.concatenate([part[1][k] for part, k in zip(parts, known, strict=True)])
        samples = np.concatenate([part[2][k] for part, k in zip(parts, known, strict=True)])
        number = min(len(labels), PROBE_CELLS)
        # Evenly over all batches, and the same cells for every state of the run.
        chosen = np.linspace(0, len(labels) - 1, number).round().astype(int)
        embedding = embedding[chosen]
        labels = labels[chosen]
        samples = samples[chosen]
        scores: dict[str, float] = {}
        try:
            scores["knn_accuracy"] = knn_accuracy(embedding, labels, neighbors=PROBE_NEIGHBORS)
            if len(np.unique(samples)) > 1:
                scores["batch_mixing"] = batch_mixing(embedding, samples)
            scores["ari"] = clustering_scores(labels, leiden_clusters(embedding))["ari"]
        except MissingDependencyError as error:
            self._missing = str(error)
        except InputError:
            # A non-finite embedding has no neighbours.
            scores["knn_accuracy"] = math.nan
        return scores

    def missing(self) -> str | None:
        """Return once why the last probe was incomplete; None if it was complete or this was reported before."""
        if self._said:
            return None
        self._said = self._missing is not None
        return self._missing

    def _labelled(self) -> list[tuple[CellBatch, np.ndarray, np.ndarray]]:
        return [part for part in self._batches if part[1] is not None]  # type: ignore[misc]

    def _place(self, batch: CellBatch) -> CellBatch:
        """Put this process's rows of a held-out batch on its devices."""
        rows = self._config.data.rows
        first, count = local_rows(self._mesh, rows)

        def mine(leaf: np.ndarray) -> np.ndarray:
            # Leading axes can be several entries per row.
            fold = leaf.shape[0] // rows
            return leaf[first * fold : (first + count) * fold]

        local = batch if count == rows else jax.tree.map(mine, batch)
        return to_global(self._mesh, local, rows, accumulated=False)
