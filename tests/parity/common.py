"""What the golden and the live parity tests share: batches, error measures, trees. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import sparse

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import ModelConfig
from cellplm_jax.interop.torch_checkpoint import Converted, to_state_dict


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One sample of cells with its labels; ``gene`` maps columns of ``counts`` to rows of the vocabulary."""

    counts: sparse.csr_matrix
    gene: np.ndarray
    batch: np.ndarray
    dataset: np.ndarray
    platform: np.ndarray | None = None


def make_batch(
    sentences: Sequence[Sentence],
    genes: int,
    *,
    cells: int | None = None,
    nonzeros: int | None = None,
) -> CellBatch:
    """Stack sentences into a batch, padded with nonsense that must not matter.

    Args:
        sentences: One a sample.
        genes: Size of the vocabulary.
        cells: Cells a sample is padded to; the longest sentence when None.
        nonzeros: Stored counts a sample is padded to; the most of any sentence when None.
    """
    random = np.random.RandomState(7)
    cells = cells or max(len(s.batch) for s in sentences)
    nonzeros = nonzeros or max(max(s.counts.nnz for s in sentences), 1)
    shape = (len(sentences), cells)
    indptr = np.zeros((len(sentences), cells + 1), np.int32)
    gene = random.randint(0, genes, (len(sentences), nonzeros)).astype(np.int32)
    count = random.randint(1, 60, (len(sentences), nonzeros)).astype(np.float32)
    mask = np.zeros(shape, bool)
    measured = np.zeros((len(sentences), genes), bool)
    batch, dataset, platform = (random.randint(0, 2, shape).astype(np.int32) for _ in range(3))
    for row, sentence in enumerate(sentences):
        number, stored = len(sentence.batch), sentence.counts.nnz
        indptr[row, : number + 1] = sentence.counts.indptr
        indptr[row, number + 1 :] = stored
        gene[row, :stored] = sentence.gene[sentence.counts.indices]
        count[row, :stored] = sentence.counts.data
        mask[row, :number] = True
        measured[row, sentence.gene] = True
        batch[row, :number] = sentence.batch
        dataset[row, :number] = sentence.dataset
        if sentence.platform is not None:
            platform[row, :number] = sentence.platform
    return CellBatch(
        indptr=indptr,  # type: ignore[arg-type]
        gene=gene,  # type: ignore[arg-type]
        count=count,  # type: ignore[arg-type]
        cell_mask=mask,  # type: ignore[arg-type]
        measured=measured,  # type: ignore[arg-type]
        batch=batch,  # type: ignore[arg-type]
        dataset=dataset,  # type: ignore[arg-type]
        platform=platform,  # type: ignore[arg-type]
    )


def without_dropout(config: ModelConfig) -> ModelConfig:
    """The same architecture with every dropout rate zero."""
    encoder = dataclasses.replace(config.encoder, attention_dropout=0.0)
    return dataclasses.replace(config, dropout=0.0, encoder=encoder)


def relative_error(value: Any, reference: Any) -> float:
    """Largest difference over the largest magnitude of the reference; infinite where a value is not finite."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape:
        message = f"shape {value.shape} against {reference.shape}"
        raise AssertionError(message)
    if not np.isfinite(value).all():
        return float("inf")
    difference = np.abs(value - reference).max(initial=0.0)
    scale = np.abs(reference).max(initial=0.0)
    return float(difference / scale) if scale > 0 else float(difference)


def latent_quantities(output: Any) -> dict[str, Any]:
    """Our model's output under the names of the goldens; absent ones are left out."""
    latent, reconstruction = output.latent, output.reconstruction
    values = {
        "hidden": output.hidden,
        "z": latent.z,
        "latent_mean": latent.mean,
        "latent_variance": latent.variance,
        "logits": latent.cluster_logits,
        "cluster": latent.cluster_weights,
        "prior_mean": latent.prior_mean,
        "prior_variance": latent.prior_variance,
        "prediction": output.prediction,
    }
    if reconstruction is not None:
        values["nb_mean"] = reconstruction.mean
        values["nb_dispersion"] = reconstruction.dispersion
    return {name: np.asarray(value) for name, value in values.items() if value is not None}


def gradient_errors(
    converted: Converted, ours: Any, theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Relative error of every gradient, by torch name.

    Args:
        converted: The model both sides computed with.
        ours: Our gradients, a tree like its ``params``.
        theirs: Gradients of the original; where it has none, ours must be exactly zero.
    """
    arrays = jax.tree.map(np.asarray, ours)
    named = to_state_dict(dataclasses.replace(converted, params=arrays, unused={}))
    unknown = theirs.keys() - named.keys()
    if unknown:
        message = f"the original trains parameters that have no counterpart here: {sorted(unknown)}"
        raise AssertionError(message)
    return {
        name: relative_error(array, theirs.get(name, np.zeros_like(array)))
        for name, array in named.items()
    }
