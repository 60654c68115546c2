"""Batches of cells and model outputs.

Axis words, used in every signature and docstring of the package: ``samples`` (rows of a batch: one context each,
normally one tissue sample), ``cells`` (tokens per row, padded), ``genes`` (the model's vocabulary), ``nonzeros``
(stored counts, padded), ``segments`` (samples packed into one row), ``hidden``, ``latent``, ``clusters`` (mixture
components), ``heads``.

A row is stored in ``pieces``, one unless rows are sharded: piece ``p`` of a row contains the cells
``[p * cells / pieces, (p + 1) * cells / pieces)`` and has its own CSR arrays. Folded arrays have a separate axis of
pieces, [samples, pieces, cells / pieces, ...], or, with one piece, just [samples, cells, ...]. Folding is free and lets
each device process only its own cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
"""What functions of arrays take. Signatures add the type and the axes, ``Float[Array, "samples cells latent"]``; the
tests compare them with the arrays of every call (jaxtyping and beartype)."""

Shape = tuple[Any, ...]
"""Sizes of axes: ints, and symbols of JAX in models that are exported for any number of cells."""


class CellBatch(struct.PyTreeNode):
    """A batch of padded rows of cells; counts are flat CSR arrays per piece and become dense on the device.

    Attributes:
        indptr: int32 [samples, (pieces,) source_cells + 1]; the axis in brackets exists with several pieces. Offset
            of each cell in ``gene`` and ``count``; entries after the last offset are padding.
        gene: integer [samples, (pieces,) nonzeros]. Index into the gene vocabulary.
        count: number [samples, (pieces,) nonzeros]. Raw count.
        cell_mask: bool [samples, cells]. True for cells, False for padding, which is last in each piece.
        segment: int32 [samples, cells] or None. Index of the cell's sample among those packed into the row; increasing
            within each piece, undefined on padding. Cells attend only within their segment. None: one sample per row.
        coordinates: float32 [samples, cells, 2] or None. Scaled to [0, 1] per tissue sample.
        has_coordinates: bool [samples, cells] or None. False uses the shared vector for dissociated cells.
        eigenvectors: float32 [samples, cells, eigenvectors] or None. For Laplacian positions.
        measured: bool [samples, genes], or [samples, segments, genes] with ``segment``, or None. Genes measured in the
            sample; None: all.
        batch: int32 [samples, cells] or None. Row of the batch embedding; negative: unknown (mean of the rows).
        dataset: int32 [samples, cells] or None. Row of the dataset embedding; negative: unknown.
        platform: int32 [samples, cells] or None. Row of the platform embedding; negative: unknown.
        slot: int32 [samples, (pieces,) source_cells] or None. Position of each cell of ``indptr`` in its piece after
            cells were dropped; an index past the end drops the cell. None: cell i has position i. Chunked processing
            of batches requires that kept cells stay in order.
    """

    indptr: jax.Array
    gene: jax.Array
    count: jax.Array
    cell_mask: jax.Array
    segment: jax.Array | None = None
    coordinates: jax.Array | None = None
    has_coordinates: jax.Array | None = None
    eigenvectors: jax.Array | None = None
    measured: jax.Array | None = None
    batch: jax.Array | None = None
    dataset: jax.Array | None = None
    platform: jax.Array | None = None
    slot: jax.Array | None = None

    @property
    def pieces(self) -> int:
        """Number of pieces per row."""
        return self.indptr.shape[1] if self.indptr.ndim == 3 else 1

    @property
    def segments(self) -> int:
        """Maximum number of samples per row."""
        # The number of segments is a shape, not data: it must be known when a function is compiled.
        if self.segment is None or self.measured is None:
            return 1
        return self.measured.shape[1]

    def fold(self, values: jax.Array) -> jax.Array:
        """Add the axis of pieces to [samples, cells, ...]: [samples, (pieces,) cells / pieces, ...]."""
        if self.indptr.ndim == 2:
            return values
        return values.reshape(
            values.shape[0],
            self.pieces,
            -1,
            *values.shape[2:],
        )

    def unfold(self, values: jax.Array) -> jax.Array:
        """Remove the axis of pieces of a folded array: [samples, cells, ...]."""
        if self.indptr.ndim == 2:
            return values
        return values.reshape(values.shape[0], -1, *values.shape[3:])

    def over_pieces(self, function: Callable) -> Callable:
        """Map a function of one piece over all pieces of all rows."""
        mapped = jax.vmap(function)
        return mapped if self.indptr.ndim == 2 else jax.vmap(mapped)

    def measured_entries(self) -> jax.Array | None:
        """Return bool [samples, cells or 1, genes]: the genes measured in each cell's sample; None: all."""
        if self.measured is None or self.measured.ndim == 2:
            return None if self.measured is None else self.measured[:, None, :]
        if self.segment is None:
            return self.measured
        return jax.vmap(lambda table, index: table[index])(self.measured, self.segment)

    def cell_of_nonzero(self) -> jax.Array:
        """Return int32 [samples, (pieces,) nonzeros]: each stored count's cell in its piece; past the end if none."""
        nonzeros = self.gene.shape[-1]
        source_cells = self.indptr.shape[-1] - 1
        lengths = jnp.diff(self.indptr, axis=-1)
        # Padding is one more cell, past the end, so that scatters drop it and gathers fill it.
        tail = nonzeros - self.indptr[..., -1:]
        lengths = jnp.concatenate([lengths, tail], axis=-1)

        def repeat(lengths_of_piece):
            return jnp.repeat(
                jnp.arange(source_cells + 1, dtype=jnp.int32),
                lengths_of_piece,
                total_repeat_length=nonzeros,
            )

        cell = self.over_pieces(repeat)(lengths)
        if self.slot is None:
            return cell
        past_the_end = self.cell_mask.shape[1] // self.pieces
        past_the_end = jnp.full(
            (*self.slot.shape[:-1], 1),
            past_the_end,
            jnp.int32,
        )
        slot = jnp.concatenate([self.slot, past_the_end], axis=-1)
        return self.over_pieces(lambda table, index: table[index])(slot, cell)

    def dense(self, values: jax.Array, genes: int) -> jax.Array:
        """Scatter one value per stored count into an array with one column per gene.

        Args:
            values: float [samples, (pieces,) nonzeros].
            genes: Size of the vocabulary.

        Returns:
            [samples, cells, genes] of the values' dtype; zero for entries that are not stored.
        """
        cells = self.cell_mask.shape[1] // self.pieces

        def scatter(cell, gene, value):
            empty = jnp.zeros((cells, genes), value.dtype)
            return empty.at[cell, gene].add(value, mode="drop")

        # One scatter per piece: a batched scatter is sharded by its batch axis without communication.
        gene = self.gene.astype(jnp.int32)
        return self.unfold(self.over_pieces(scatter)(self.cell_of_nonzero(), gene, values))

    def at_nonzeros(self, entries: jax.Array) -> jax.Array:
        """Gather the entries of an array at the stored counts.

        Args:
            entries: [samples, cells, genes].

        Returns:
            [samples, (pieces,) nonzeros]; 0 or False for padding and dropped cells.
        """

        def gather(table, cell, gene):
            return table.at[cell, gene].get(mode="fill", fill_value=0)

        gene = self.gene.astype(jnp.int32)
        return self.over_pieces(gather)(self.fold(entries), self.cell_of_nonzero(), gene)

    def sum_over_nonzeros(self, values: jax.Array) -> jax.Array:
        """Sum one value per stored count over each cell.

        Args:
            values: float [samples, (pieces,) nonzeros].

        Returns:
            float [samples, cells].
        """
        cells = self.cell_mask.shape[1] // self.pieces

        def scatter(cell, value):
            return jnp.zeros((cells,), value.dtype).at[cell].add(value, mode="drop")

        return self.unfold(self.over_pieces(scatter)(self.cell_of_nonzero(), values))

    def dense_counts(self, genes: int) -> jax.Array:
        """Return the counts as float32 [samples, cells, genes]."""
        return self.dense(self.count.astype(jnp.float32), genes)


class LatentNoise(struct.PyTreeNode):
    """Random numbers of the latent layer, passed in so that a step is a pure function of them.

    Attributes:
        gaussian: float32 [samples, cells, latent], standard normal.
        gumbel: float32 [samples, cells, clusters], standard Gumbel; None if the latent has no components.
    """

    gaussian: jax.Array
    gumbel: jax.Array | None = None


class LatentOutput(struct.PyTreeNode):
    """Output of the latent layer per cell.

    Attributes:
        z: float32 [samples, cells, latent]. The embedding: a sample during training, the mean at inference.
        mean: Mean of q(z|.), same shape.
        variance: Variance of q(z|.), same shape; None for latents without one.
        cluster_logits: float32 [samples, cells, clusters]; None without a mixture.
        cluster_weights: Weights of the components (soft or one-hot), same shape; None without a mixture.
        prior_mean: Mean of p(z|y). "released": [samples, cells, latent]; "paper": [clusters, latent].
        prior_variance: Variance of p(z|y), same shape as ``prior_mean``.
        kl_latent: float32 [samples, cells]. KL of q(z|.) from its prior in nats ("released": a one-sample estimate).
        kl_cluster: float32 [samples, cells]. KL of q(y|.) from the uniform prior in nats.
        batch_logits: float32 [samples, cells, batches]. Discriminator output after the gradient reversal, or None.
    """

    z: jax.Array
    mean: jax.Array
    variance: jax.Array | None = None
    cluster_logits: jax.Array | None = None
    cluster_weights: jax.Array | None = None
    prior_mean: jax.Array | None = None
    prior_variance: jax.Array | None = None
    kl_latent: jax.Array | None = None
    kl_cluster: jax.Array | None = None
    batch_logits: jax.Array | None = None


class Reconstruction(struct.PyTreeNode):
    """Decoder output.

    Attributes:
        mean: float32 [samples, cells, genes]. Unscaled mean; objectives rescale it to each cell's total count.
        dispersion: float32 [genes]. Inverse dispersion theta of the negative binomial, or None.
        zero_logits: float32 [samples, cells, genes]. Logit of a structural zero, or None.
    """

    mean: jax.Array
    dispersion: jax.Array | None = None
    zero_logits: jax.Array | None = None


class ModelOutput(struct.PyTreeNode):
    """One forward pass.

    Attributes:
        hidden: float32 [samples, cells, hidden]. Encoder output after the pre-latent norm.
        latent: The latent layer's output.
        reconstruction: The decoder's output, or None with a task head.
        prediction: The head's output ([samples, cells, outputs] or [samples, outputs]), or None.
    """

    hidden: jax.Array
    latent: LatentOutput
    reconstruction: Reconstruction | None = None
    prediction: jax.Array | None = None
