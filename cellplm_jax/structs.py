"""Arrays that travel together: batches of cells in, model outputs out.

Axis words, used in every docstring of the package: ``samples`` (sentences, one row each), ``cells`` (tokens of a
sentence, padded), ``genes`` (the model's vocabulary), ``nonzeros`` (stored counts of a sample, padded), ``hidden``,
``latent``, ``clusters`` (mixture components), ``heads``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


class CellBatch(struct.PyTreeNode):
    """A batch of padded sentences; counts travel as one flat CSR a sample and become dense on the device.

    Every field has the leading axis ``samples``, so a batch is sharded over devices by that axis alone.

    Attributes:
        indptr: int32 [samples, source_cells + 1]. Start of each cell's run in ``gene`` and ``count``; what lies behind
            the last entry is padding.
        gene: integer [samples, nonzeros]. Index into the gene vocabulary.
        count: number [samples, nonzeros]. Raw count.
        cell_mask: bool [samples, cells]. True for cells, False for padding.
        coordinates: float32 [samples, cells, 2] or None. Scaled to [0, 1] per tissue sample.
        has_coordinates: bool [samples, cells] or None. False takes the shared vector for dissociated cells.
        eigenvectors: float32 [samples, cells, eigenvectors] or None. For Laplacian positions.
        measured: bool [samples, genes] or None. Genes measured in the sample; None: all.
        batch: int32 [samples, cells] or None. Row of the batch embedding; negative: unknown (mean of the rows).
        dataset: int32 [samples, cells] or None. Likewise for datasets.
        platform: int32 [samples, cells] or None. Likewise for platforms.
        slot: int32 [samples, source_cells] or None. Where each cell of ``indptr`` sits on the ``cells`` axis after
            cells were dropped; an index past the end drops the cell. None: cell i sits at i.
    """

    indptr: jax.Array
    gene: jax.Array
    count: jax.Array
    cell_mask: jax.Array
    coordinates: jax.Array | None = None
    has_coordinates: jax.Array | None = None
    eigenvectors: jax.Array | None = None
    measured: jax.Array | None = None
    batch: jax.Array | None = None
    dataset: jax.Array | None = None
    platform: jax.Array | None = None
    slot: jax.Array | None = None

    def cell_of_nonzero(self) -> jax.Array:
        """Return int32 [samples, nonzeros]: the position on ``cells`` of each stored count; past the end if none."""
        samples, nonzeros = self.gene.shape
        source_cells = self.indptr.shape[1] - 1
        lengths = jnp.diff(self.indptr, axis=1)
        tail = nonzeros - self.indptr[:, -1:]
        lengths = jnp.concatenate([lengths, tail], axis=1)

        def repeat(lengths_of_sample):
            return jnp.repeat(
                jnp.arange(source_cells + 1, dtype=jnp.int32),
                lengths_of_sample,
                total_repeat_length=nonzeros,
            )

        cell = jax.vmap(repeat)(lengths)
        if self.slot is None:
            return cell
        past_the_end = jnp.full((samples, 1), self.cell_mask.shape[1], jnp.int32)
        slot = jnp.concatenate([self.slot, past_the_end], axis=1)
        return jnp.take_along_axis(slot, cell, axis=1)

    def dense(self, values: jax.Array, genes: int) -> jax.Array:
        """Scatter one value per stored count into an array with a column a gene.

        Args:
            values: float [samples, nonzeros].
            genes: Size of the vocabulary.

        Returns:
            [samples, cells, genes] of the values' dtype; zero where nothing is stored.
        """
        samples, cells = self.cell_mask.shape
        cell = self.cell_of_nonzero()
        row = jnp.arange(samples, dtype=jnp.int32)[:, None]
        empty = jnp.zeros((samples, cells, genes), values.dtype)
        return empty.at[row, cell, self.gene.astype(jnp.int32)].add(values, mode="drop")

    def dense_counts(self, genes: int) -> jax.Array:
        """Return the counts as float32 [samples, cells, genes]."""
        return self.dense(self.count.astype(jnp.float32), genes)


class LatentNoise(struct.PyTreeNode):
    """The random numbers of the latent layer, passed in so that a step is a pure function of them.

    Attributes:
        gaussian: float32 [samples, cells, latent], standard normal.
        gumbel: float32 [samples, cells, clusters], standard Gumbel; None where the latent has no components.
    """

    gaussian: jax.Array
    gumbel: jax.Array | None = None


class LatentOutput(struct.PyTreeNode):
    """What the latent layer infers about each cell.

    Attributes:
        z: float32 [samples, cells, latent]. The embedding: a sample while training, the mean at inference.
        mean: Mean of q(z|.), same shape.
        variance: Variance of q(z|.), same shape; None for latents without one.
        cluster_logits: float32 [samples, cells, clusters]; None without a mixture.
        cluster_weights: Weights given to the components (soft or one-hot), same shape; None without a mixture.
        prior_mean: Mean of p(z|y). "released": [samples, cells, latent]; "paper": [clusters, latent].
        prior_variance: Variance of p(z|y), same shape as ``prior_mean``.
        kl_latent: float32 [samples, cells]. KL of q(z|.) from its prior in nats ("released": a one-sample estimate).
        kl_cluster: float32 [samples, cells]. KL of q(y|.) from the uniform prior in nats.
        batch_logits: float32 [samples, cells, batches]. Discriminator output behind the gradient reversal, or None.
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
