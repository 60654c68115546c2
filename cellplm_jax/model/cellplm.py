"""CellPLM: embedder, encoder, latent, decoder or head, as one pure Linen module."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Key

from cellplm_jax.batch import (
    Array,
    CellBatch,
    LatentNoise,
    LatentOutput,
    ModelOutput,
    Reconstruction,
)
from cellplm_jax.config import ModelConfig
from cellplm_jax.model.attention import CellGroups, flow_weights, softmax_weights
from cellplm_jax.model.decoder import Decoder
from cellplm_jax.model.embedder import ExpressionEmbedder
from cellplm_jax.model.encoder import Centre, Encoder
from cellplm_jax.model.heads import Head
from cellplm_jax.model.latent import Latent
from cellplm_jax.model.layers import Norm


class CellPLM(nn.Module):
    """The cell language model (paper section 4; ``CellPLM/model/cellformer.py``).

    The methods are the stages, so that inference can run the embedder over a stream of cells, the encoder over a whole
    context, and never decode: ``model.apply(variables, batch, method=CellPLM.embed_expression)``.

    Attributes:
        config: The architecture.
        rematerialize: Compute the activations of encoder layers again in the backward pass: less memory, more time.
        chunk: Cells of a piece whose counts the embedder makes dense at once; 0: all.
    """

    config: ModelConfig
    rematerialize: bool = False
    chunk: int = 0

    def setup(self) -> None:
        """Declare the stages; their names are the top level of the parameter tree."""
        self.embedder = ExpressionEmbedder(self.config, self.chunk)
        self.encoder = Encoder(self.config, self.rematerialize)
        if self.config.trunk == "projection":
            self.centre = Centre(self.config)
        # RMSNorm subtracts no mean: the components of a projection keep their proportions.
        kind = "layernorm" if self.config.trunk == "none" else "rmsnorm"
        self.pre_latent_norm = Norm(kind, name="pre_latent_norm")
        self.latent = Latent(self.config)
        if self.config.head.kind == "none":
            self.decoder = Decoder(self.config)
        else:
            self.head = Head(self.config)

    def __call__(
        self,
        batch: CellBatch,
        *,
        gene_mask: Bool[Array, "samples cells genes"] | None = None,
        noise: LatentNoise | None = None,
        condition: Float[Array, "samples cells condition"] | None = None,
        train: bool = False,
    ) -> ModelOutput:
        """Run every stage.

        Args:
            batch: Padded sentences of cells.
            gene_mask: True hides an entry from the input.
            noise: Random numbers of the latent while training; None draws them from the ``"latent"`` stream.
            condition: Input of the perturbation head.
            train: Dropout and sampling on (needs the ``"dropout"`` and ``"latent"`` streams).
        """
        hidden = self.represent(batch, gene_mask=gene_mask, train=train)
        latent = self.infer(hidden, noise=noise, train=train)
        if self.config.head.kind == "none":
            return ModelOutput(
                hidden=hidden,
                latent=latent,
                reconstruction=self.decode(latent.z, batch, train=train),
            )
        prediction = self.head(latent.z, batch.cell_mask, condition=condition, train=train)
        return ModelOutput(hidden=hidden, latent=latent, prediction=prediction)

    def embed_expression(
        self,
        batch: CellBatch,
        *,
        gene_mask: Bool[Array, "samples cells genes"] | None = None,
        gene_sum: Float[Array, "samples cells hidden"] | None = None,
        train: bool = False,
    ) -> Float[Array, "samples cells hidden"]:
        """Embed each cell separately, before any attention."""
        return self.embedder(batch, gene_mask=gene_mask, gene_sum=gene_sum, train=train)

    def represent(
        self,
        batch: CellBatch,
        *,
        gene_mask: Bool[Array, "samples cells genes"] | None = None,
        train: bool = False,
    ) -> Float[Array, "samples cells hidden"]:
        """Embed cells and apply the encoder, in which they attend to the others of their sample."""
        hidden = self.embed_expression(batch, gene_mask=gene_mask, train=train)
        groups = CellGroups(batch.cell_mask, batch.segment, batch.segments, batch.pieces)
        return self._encoded(hidden, groups, train)

    def encode(
        self,
        hidden: Float[Array, "samples cells hidden"],
        cell_mask: Bool[Array, "samples cells"],
        *,
        train: bool = False,
    ) -> Float[Array, "samples cells hidden"]:
        """Apply the encoder to rows of one sample each."""
        return self._encoded(hidden, CellGroups(cell_mask), train)

    def trunk(self, batch: CellBatch) -> Float32[Array, "samples cells latent"]:
        """Return the latent of complete counts by the projection alone, without the encoder."""
        hidden = self.embed_expression(batch)
        groups = CellGroups(batch.cell_mask, batch.segment, batch.segments, batch.pieces)
        return self.infer(self.pre_latent_norm(self.centre(hidden, groups))).mean

    def _encoded(self, hidden: Array, groups: CellGroups, train: bool) -> Array:
        if self.config.trunk == "projection":
            hidden = self.centre(hidden, groups)
        return self.pre_latent_norm(self.encoder(hidden, groups, train=train))

    def infer(
        self,
        hidden: Float[Array, "samples cells hidden"],
        *,
        noise: LatentNoise | None = None,
        train: bool = False,
    ) -> LatentOutput:
        """Infer the latent of encoded cells."""
        return self.latent(hidden, noise=noise, train=train)

    def embed_encoded(
        self, hidden: Float[Array, "samples cells hidden"]
    ) -> Float32[Array, "samples cells latent"]:
        """Return the embedding for the output of the encoder's last layer."""
        return self.infer(self.pre_latent_norm(hidden)).mean

    def predict(
        self,
        z: Float[Array, "samples cells latent"],
        cell_mask: Bool[Array, "samples cells"],
        *,
        condition: Float[Array, "samples cells condition"] | None = None,
        train: bool = False,
    ) -> Float[Array, "samples cells outputs"] | Float[Array, "samples outputs"]:
        """Apply the task head to latents; see :class:`cellplm_jax.model.heads.Head`."""
        return self.head(z, cell_mask, condition=condition, train=train)

    def decode(
        self,
        z: Float[Array, "samples cells latent"],
        batch: CellBatch,
        *,
        train: bool = False,
    ) -> Reconstruction:
        """Decode latents; the batch gives the covariates."""
        return self.decoder(z, batch, train=train)

    def decode_hidden(
        self,
        z: Float[Array, "samples cells latent"],
        batch: CellBatch,
        *,
        train: bool = False,
    ) -> Float[Array, "samples cells width"]:
        """Decode up to the output layer; see :meth:`decode_output`."""
        return self.decoder(z, batch, train=train, part="hidden")

    def decode_output(self, hidden: Float[Array, "samples cells width"]) -> Reconstruction:
        """Apply the decoder's output layer, which has an axis of genes, to :meth:`decode_hidden`."""
        return self.decoder(hidden, None, part="output")


TRUNK = (
    ("embedder", "gene_embedding"),
    ("centre", "context_mean"),
    ("latent", "mean"),
    ("latent", "linear"),
)
"""Leading path entries of the parameters that make up the projection of a model with a trunk."""


NARROW_PARTS = ("embedder", "encoder", "pre_latent_norm", "decoder")
"""Parts of the parameter tree whose matrix products may be computed in bfloat16; the latent and the likelihood's own
parameters stay float32."""


def in_precision(params: Any, precision: str) -> Any:
    """Cast the parameters of large matrix products; sums, norms and logarithms stay float32 whatever they are.

    Args:
        params: The ``"params"`` collection or parts of it, float32.
        precision: ``"float32"`` or ``"bfloat16"``.
    """
    if precision == "float32":
        return params

    def cast(path, leaf):
        names = [entry.key for entry in path]
        # The exponential of the dispersion magnifies rounding.
        if names[0] not in NARROW_PARTS or names[-1] == "log_dispersion":
            return leaf
        # The output layer's bias is the log of each gene's mean: added in float32, after the product.
        if names[:2] == ["decoder", "log_mean"] and names[-1] == "bias":
            return leaf
        return leaf.astype(jnp.dtype(precision))

    return jax.tree_util.tree_map_with_path(cast, params)


def attention_rows(
    params: Any,
    hidden: Float[Array, "1 cells hidden"],
    cell_mask: Bool[Array, "1 cells"],
    rows: Int[Array, " chosen"],
    config: ModelConfig,
) -> Float32[Array, "layers heads chosen cells"]:
    """Return the attention weights of chosen cells in every layer and head, without the weights of the others.

    Args:
        params: The ``"params"`` collection, or the part of it that an embedding needs.
        hidden: One context from :meth:`CellPLM.embed_expression`.
        cell_mask: True for cells, False for padding.
        rows: Positions of the chosen cells in the context.
        config: The architecture; ``encoder.kind`` is ``"flow"`` or ``"softmax"``.

    Returns:
        The weight of each cell for each chosen one; 0 for padding.
    """

    def projection(module: nn.Module, _: str) -> bool:
        return module.name in ("query", "key")

    _, seen = CellPLM(config).apply(
        {"params": params},
        hidden,
        cell_mask,
        method=CellPLM.encode,
        capture_intermediates=projection,
        mutable=["intermediates"],
    )
    weights = flow_weights if config.encoder.kind == "flow" else softmax_weights
    heads = config.encoder.heads
    found = []
    for layer in range(config.encoder.layers):
        kept = seen["intermediates"]["encoder"][f"layer_{layer}"]["attention"]
        query, key = (
            kept[name]["__call__"][0].reshape(*hidden.shape[:2], heads, -1)
            for name in ("query", "key")
        )
        found.append(weights(query, key, CellGroups(cell_mask), rows)[0])
    return jnp.stack(found)


def example_batch(config: ModelConfig, *, samples: int = 1, cells: int = 2) -> CellBatch:
    """Return the smallest batch that touches every parameter; for initialisation and shape inference."""
    index = jnp.zeros((samples, cells), jnp.int32)
    return CellBatch(
        indptr=jnp.tile(jnp.arange(cells + 1, dtype=jnp.int32), (samples, 1)),
        gene=index,
        count=jnp.ones((samples, cells), jnp.float32),
        cell_mask=jnp.ones((samples, cells), bool),
        coordinates=jnp.zeros((samples, cells, 2), jnp.float32),
        has_coordinates=jnp.ones((samples, cells), bool),
        eigenvectors=jnp.zeros((samples, cells, config.positions.eigenvectors), jnp.float32),
        batch=index,
        dataset=index,
        platform=index,
    )


def init_params(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Initialise the parameters of a configuration: the ``"params"`` collection."""
    return CellPLM(config).init(key, example_batch(config))["params"]
