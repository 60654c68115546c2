"""Expression embedder: a cell is the expression-weighted sum of its genes' embeddings (paper equation 1)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Integer, Real

from cellplm_jax.batch import Array, CellBatch
from cellplm_jax.config import ModelConfig
from cellplm_jax.kernels.chunked import CountChunks, chunked_product
from cellplm_jax.kernels.matmul import embedding_lookup, linear_product
from cellplm_jax.model.layers import CELLS, ENTRIES, Dropout, constrain, dense, make_norm
from cellplm_jax.model.positions import Positions


def mean_row_lookup(
    table: Float[Array, "rows width"],
    index: Int[Array, "*batch"] | None,
    shape: tuple[int, ...],
) -> Float[Array, "*batch width"]:
    """Look rows up; an unknown (negative or absent) index uses the mean of all rows.

    The released code uses the SUM of all rows for an absent batch (``CellPLM/decoder/zinb.py:163``), which is far
    outside the training range; the paper describes the mean for new batches.

    Args:
        table: The rows.
        index: Row of each cell; None: all unknown.
        shape: The shape of ``index``; used if it is None.
    """
    # Two reads: for one row of bfloat16 weights a CPU would first create a float32 table, in seven times the time.
    weights = jnp.full(
        (2, table.shape[0]),
        1 / table.shape[0],
        table.dtype,
    )
    average = linear_product(weights, table)[0]
    if index is None:
        return jnp.broadcast_to(average, (*shape, table.shape[1]))
    rows = embedding_lookup(table, jnp.clip(index, 0, table.shape[0] - 1))
    return jnp.where((index < 0)[..., None], average, rows)


def transform_counts(
    batch: CellBatch, config: ModelConfig
) -> Float32[Array, "samples *pieces nonzeros"]:
    """Apply the configured input transform to the stored counts."""
    count = batch.count.astype(jnp.float32)
    if config.embedder.input_transform == "log1p":
        return jnp.log1p(count)
    library = batch.fold(batch.sum_over_nonzeros(count))
    # Padding has a cell past the end; its value is dropped by the scatter.
    cell = jnp.minimum(batch.cell_of_nonzero(), library.shape[-1] - 1)
    size = batch.over_pieces(lambda table, index: table[index])(library, cell)
    return jnp.log1p(count / jnp.maximum(size, 1.0) * config.embedder.target_sum)


def transform_stored(
    indptr: Integer[np.ndarray, " cells_plus_1"],
    count: Real[np.ndarray, " nonzeros"],
    config: ModelConfig,
) -> Float32[np.ndarray, " stored"]:
    """Apply the configured input transform on the host: :func:`transform_counts` of one row in numpy.

    Counts after the last entry of ``indptr`` are padding and left out.
    """
    count = count[: indptr[-1]].astype(np.float32)
    if config.embedder.input_transform == "log1p":
        return np.log1p(count)
    # Differences of cumulative sums at the cell boundaries; float64 keeps integers exact.
    running = np.concatenate([[0.0], np.cumsum(count, dtype=np.float64)])
    library = np.diff(running[indptr])
    # A cell without visible counts.
    size = np.maximum(library, 1.0).astype(np.float32)
    per_count = np.repeat(size, np.diff(indptr))
    return np.log1p(count / per_count * np.float32(config.embedder.target_sum))


class ExpressionEmbedder(nn.Module):
    """Maps counts of any subset of the vocabulary, plus position and covariate, to one vector per cell.

    ``E_i = sum_j x_ij h_j`` (+ position, + covariate), then Linear - ReLU - Dropout - Norm
    (``CellPLM/embedder/omics.py``); with ``trunk = "projection"`` only the sum. Unmeasured genes contribute nothing and
    cost nothing.

    Attributes:
        config: The model's configuration.
        chunk: Cells of each piece whose counts are dense at a time, forward and backward; 0: all.
    """

    config: ModelConfig
    chunk: int = 0

    @nn.compact
    def __call__(
        self,
        batch: CellBatch,
        *,
        gene_mask: Bool[Array, "samples cells genes"] | None = None,
        gene_sum: Float[Array, "samples cells hidden"] | None = None,
        train: bool = False,
    ) -> Float[Array, "samples cells hidden"]:
        """Embed each cell.

        Args:
            batch: The cells.
            gene_mask: True hides an entry from the input. None: nothing is hidden.
            gene_sum: Precomputed sums of gene embeddings weighted by :func:`transform_counts`, from the host. None:
                they are computed here.
            train: Whether dropout is on.
        """
        config = self.config
        table = self.param(
            "gene_embedding",
            nn.initializers.normal(0.005),
            (config.genes, config.hidden),
        )
        if gene_sum is None:
            gene_sum = self._gene_sum(batch, table, gene_mask)
        hidden = constrain(jnp.asarray(gene_sum, table.dtype), CELLS)
        if config.positions.kind != "none":
            places = Positions(config, name="positions")(
                batch.cell_mask,
                batch.coordinates,
                batch.has_coordinates,
                batch.eigenvectors,
                train=train,
            ).astype(hidden.dtype)
            if config.trunk == "projection":
                # Positions start on the dimensions that hold no component.
                places = places * self.param(
                    "position_scale",
                    nn.initializers.ones,
                    (config.hidden,),
                )
            hidden = hidden + places
        if config.embedder.covariate:
            covariate = self.param(
                "batch_embedding",
                nn.initializers.normal(1.0),
                (config.decoder.batches, config.hidden),
            )
            hidden = hidden + mean_row_lookup(covariate, batch.batch, batch.cell_mask.shape)
        if config.trunk == "projection":
            return hidden
        hidden = nn.relu(dense(config.hidden, "linear")(hidden))
        hidden = Dropout(config.dropout, name="dropout")(hidden, deterministic=not train)
        return make_norm(config.norm, config.norm_groups, "norm")(hidden)

    def _gene_sum(self, batch, table, gene_mask):
        config = self.config
        # Products use the parameters' type (bfloat16 if configured), logarithms do not.
        values = transform_counts(batch, config).astype(table.dtype)
        # In training: dense counts of a chunk of cells at a time.
        if self.chunk:
            chunks = CountChunks.of(batch, self.chunk, config.genes)
            masked = None if gene_mask is None else batch.fold(gene_mask)
            return batch.unfold(chunked_product(table, chunks, values, masked))
        expression = constrain(batch.dense(values, config.genes), ENTRIES)
        if gene_mask is not None:
            expression = jnp.where(gene_mask, jnp.zeros((), table.dtype), expression)
        return linear_product(expression, table)
