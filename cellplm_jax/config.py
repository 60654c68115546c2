"""Configuration as frozen dataclasses, built strictly from plain dictionaries.

A configuration is data: it is written into every checkpoint as JSON and read back by
:func:`~cellplm_jax.config_fields.from_dict`, which refuses unknown keys (naming the nearest known one), wrong types and
impossible values. Programs that use ``ml_collections.ConfigDict`` (``configs/``, ``launch/``) hand theirs to
:func:`~cellplm_jax.config_fields.from_config_dict` once and use the dataclass from there on, so a misspelt
key can never fall back to a default unnoticed.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from cellplm_jax.config_fields import (
    at_least,
    at_most,
    check,
    check_objective,
    fraction,
    positive,
)
from cellplm_jax.config_fields import from_config_dict as from_config_dict
from cellplm_jax.config_fields import from_dict as from_dict
from cellplm_jax.config_fields import to_dict as to_dict
from cellplm_jax.display import DisplayedConfig

Precision = Literal["float32", "bfloat16"]
"""Type of the factors of large matrix products."""

PRECISIONS: tuple[str, ...] = typing.get_args(Precision)

LARGEST_WIDTH, LARGEST_TABLE, MOST_LAYERS = 2**16, 2**24, 256
"""Maximum width of a layer, rows of a table (genes, batches, outputs), and number of layers of an architecture.

Layers are unrolled by the compiler, so a file that declares thousands would never be opened.
"""


@dataclass(frozen=True, repr=False)
class EmbedderConfig(DisplayedConfig):
    """Expression embedder: how counts become the input of the gene-weighted sum.

    Attributes:
        input_transform: ``"log1p"`` of the raw counts (released code, ``CellPLM/embedder/omics.py``) or
            ``"library_log1p"``: counts scaled to ``target_sum`` per cell, then log1p (paper, section 4).
        target_sum: Library size after scaling, in counts; used only by ``"library_log1p"``.
        covariate: Add a learnt vector per batch to the input (the released ``input_covariate``).
    """

    input_transform: Literal["log1p", "library_log1p"] = "log1p"
    target_sum: float = 1e4
    covariate: bool = False

    def __post_init__(self):
        positive(self, "embedder", "target_sum")


@dataclass(frozen=True, repr=False)
class PositionsConfig(DisplayedConfig):
    """Positional encoding of cells with 2-D coordinates.

    Attributes:
        kind: ``"sinusoidal"`` (fixed, half of the dimensions for each axis), ``"grid"`` (a learnt vector per
            grid square), ``"mlp"`` (linear + PReLU of the coordinates), ``"laplacian"`` (linear + PReLU of
            graph-Laplacian eigenvectors of the spatial neighbour graph) or ``"none"``. Every kind but ``"none"``
            has one shared learnt vector for cells without coordinates.
        grid: Squares along each axis of the grid that coordinates are scaled to.
        eigenvectors: Number of Laplacian eigenvectors.
    """

    kind: Literal["sinusoidal", "grid", "mlp", "laplacian", "none"] = "sinusoidal"
    grid: int = 100
    eigenvectors: int = 10

    def __post_init__(self):
        at_least(self, "positions", 1, "grid", "eigenvectors")
        at_most(self, "positions", LARGEST_WIDTH, "grid", "eigenvectors")


@dataclass(frozen=True, repr=False)
class EncoderConfig(DisplayedConfig):
    """Encoder over the cells of a sample.

    Attributes:
        kind: ``"flow"`` (linear flow attention), ``"softmax"``, ``"performer"`` (FAVOR+), ``"mlp"``,
            ``"residual_mlp"`` or ``"none"``.
        layers: Number of layers.
        heads: Attention heads; must divide ``ModelConfig.hidden``.
        feedforward: Width of the feed-forward block as a multiple of ``hidden``.
        attention_dropout: Dropout after the output projection of the attention (released: 0.01).
        random_features: FAVOR+ features per head; 0: ``d log d`` for head width ``d``.
    """

    kind: Literal["flow", "softmax", "performer", "mlp", "residual_mlp", "none"] = "flow"
    layers: int = 4
    heads: int = 8
    feedforward: int = 2
    attention_dropout: float = 0.01
    random_features: int = 0

    def __post_init__(self):
        at_least(self, "encoder", 1, "heads", "feedforward")
        at_least(self, "encoder", 0, "random_features")
        at_most(self, "encoder", MOST_LAYERS, "layers", "feedforward")
        at_most(self, "encoder", LARGEST_WIDTH, "heads", "random_features")
        if self.kind != "none":
            check(
                self.layers >= 1,
                f"encoder.layers = {self.layers}",
                "at least one layer",
                "Raise it, or set encoder.kind = 'none'",
            )
        if self.kind == "residual_mlp":
            check(
                self.layers >= 2,
                f"encoder.layers = {self.layers} with kind 'residual_mlp'",
                "at least two layers",
                "Raise it, or use kind 'mlp'",
            )
        fraction(self.attention_dropout, "encoder.attention_dropout")


@dataclass(frozen=True, repr=False)
class LatentConfig(DisplayedConfig):
    """Latent distribution and its regularisers.

    Attributes:
        kind: ``"gaussian_mixture"``, ``"gaussian"`` (VAE), ``"deterministic"`` (one linear map, the released "ae")
            or ``"none"`` (the encoder's output is the embedding).
        inference: For the mixture: ``"paper"`` infers z from the cell and the component from z (q(z|x), q(y|z));
            ``"released"`` infers the component first, then z from both (q(y|x), q(z|x,y)).
        size: Latent dimensions.
        clusters: Mixture components.
        temperature: Gumbel-softmax temperature while training ("released").
        latent_weight: Weight of the Gaussian KL term (released ``w_li``; VAE ``kl_weight``).
        cluster_weight: Weight of the categorical KL term (released ``w_en``).
        floor: Floor under each KL term, in nats per cell ("free bits", released ``lamda``); 0: no floor.
            Mixture: ``max(floor, KL)``; Gaussian: a weighted KL below it counts as 0. Metrics report when it binds.
        warmup_steps: Steps over which the KL weights rise linearly from 0 (released VAE: 10,000); 0: no warm-up.
        adversarial_weight: Weight of a batch discriminator behind a gradient reversal; 0 leaves it out.
        adversarial_hidden: Width of its hidden layer.
        similarity_weight: Weight of elastic cell similarity; 0 leaves it out.
        similarity_threshold: Cosine similarity it pushes away from.
    """

    kind: Literal["gaussian_mixture", "gaussian", "deterministic", "none"] = "gaussian_mixture"
    inference: Literal["paper", "released"] = "paper"
    size: int = 512
    clusters: int = 16
    temperature: float = 1.0
    latent_weight: float = 1.0
    cluster_weight: float = 1.0
    floor: float = 0.0
    warmup_steps: int = 0
    adversarial_weight: float = 0.0
    adversarial_hidden: int = 64
    similarity_weight: float = 0.0
    similarity_threshold: float = 0.6

    def __post_init__(self):
        at_least(self, "latent", 1, "size", "clusters", "adversarial_hidden")
        at_most(self, "latent", LARGEST_WIDTH, "size", "clusters", "adversarial_hidden")
        positive(self, "latent", "temperature")
        at_least(self, "latent", 0, "latent_weight", "cluster_weight", "floor", "warmup_steps")
        at_least(self, "latent", 0, "adversarial_weight", "similarity_weight")


@dataclass(frozen=True, repr=False)
class DecoderConfig(DisplayedConfig):
    """Decoder from the latent to expression.

    Attributes:
        kind: ``"negative_binomial"``, ``"zero_inflated_negative_binomial"``, ``"gaussian"`` (linear mean of
            log-normalised expression) or ``"residual"`` (the same with all hidden layers concatenated).
        hidden: Width of the hidden layers.
        layers: Layers as the released code counts them: ``layers - 1`` hidden layers with covariates, then the output.
        bottleneck: Width before the gene-wise output of the negative-binomial kinds (released: 128).
        batches: Rows of the batch (tissue sample) embedding; 0 leaves the covariate out.
        datasets: Rows of the dataset embedding.
        platforms: Rows of the platform embedding.
    """

    kind: Literal[
        "negative_binomial", "zero_inflated_negative_binomial", "gaussian", "residual"
    ] = "negative_binomial"
    hidden: int = 1024
    layers: int = 2
    bottleneck: int = 128
    batches: int = 0
    datasets: int = 0
    platforms: int = 0

    def __post_init__(self):
        at_least(self, "decoder", 1, "hidden", "bottleneck")
        at_least(self, "decoder", 0, "batches", "datasets", "platforms")
        at_most(self, "decoder", LARGEST_WIDTH, "hidden", "bottleneck")
        at_most(self, "decoder", LARGEST_TABLE, "batches", "datasets", "platforms")
        at_most(self, "decoder", MOST_LAYERS, "layers")
        minimum = 2 if self.kind == "residual" else 1
        check(
            self.layers >= minimum,
            f"decoder.layers = {self.layers} with kind '{self.kind}'",
            f"at least {minimum}",
            "Raise it",
        )


@dataclass(frozen=True, repr=False)
class HeadConfig(DisplayedConfig):
    """Task head on the latent, used instead of the decoder when fine-tuning.

    Attributes:
        kind: ``"none"``, ``"annotation"`` (cell types), ``"imputation"``, ``"denoising"``, ``"perturbation"``
            (expression, with an optional condition vector), ``"sample_classification"`` (one label per sample).
        outputs: Classes or genes predicted.
        hidden: Width of hidden layers.
        layers: Linear layers.
        condition: Width of the condition vector of ``"perturbation"``; 0: none.
    """

    kind: Literal[
        "none", "annotation", "imputation", "denoising", "perturbation", "sample_classification"
    ] = "none"
    outputs: int = 0
    hidden: int = 1024
    layers: int = 1
    condition: int = 0

    def __post_init__(self):
        at_least(self, "head", 1, "hidden", "layers")
        at_least(self, "head", 0, "condition")
        at_most(self, "head", LARGEST_TABLE, "outputs", "condition")
        at_most(self, "head", LARGEST_WIDTH, "hidden")
        at_most(self, "head", MOST_LAYERS, "layers")
        if self.kind != "none":
            check(
                self.outputs >= 1,
                f"head.outputs = {self.outputs} with head.kind = '{self.kind}'",
                "at least one output",
                "Set it to the number of classes or genes",
            )


@dataclass(frozen=True, repr=False)
class ModelConfig(DisplayedConfig):
    """Complete architecture; with a gene list it determines the shape of every parameter.

    Attributes:
        genes: Size of the gene vocabulary.
        hidden: Width of gene embeddings and encoder.
        norm: Normalisation of embedder, MLP encoders and decoder (released: GroupNorm over the channels of a cell).
        norm_groups: Groups of ``"groupnorm"``.
        dropout: Dropout rate outside the attention.
        trunk: ``"none"`` (published: an embedder network, a layer norm before the latent) or ``"projection"``: the gene
            sum itself is the residual stream, centred over the cells of the context and scaled to unit root mean square
            before the latent, so that a model can start as a linear projection of its corpus
            (``cellplm_jax/train/projection.py``).
        centre_cells: Weight of the corpus mean in that centring, in cells: the mean of a small context is unreliable.
        embedder, positions, encoder, latent, decoder, head: The parts.
    """

    genes: int
    hidden: int = 1024
    norm: Literal["groupnorm", "layernorm", "rmsnorm", "none"] = "groupnorm"
    norm_groups: int = 4
    dropout: float = 0.2
    trunk: Literal["none", "projection"] = "none"
    centre_cells: float = 10.0
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self):
        check(
            self.genes >= 1, f"genes = {self.genes}", "at least one gene", "Give a gene vocabulary"
        )
        at_least(self, "", 1, "hidden", "norm_groups")
        at_most(self, "", LARGEST_TABLE, "genes")
        at_most(self, "", LARGEST_WIDTH, "hidden", "norm_groups")
        positive(self, "", "centre_cells")
        fraction(self.dropout, "dropout")
        if self.encoder.kind in ("flow", "softmax", "performer"):
            check(
                self.hidden % self.encoder.heads == 0,
                f"hidden = {self.hidden} with encoder.heads = {self.encoder.heads}",
                "a hidden width that the heads divide",
                "Change one of them",
            )
        if self.norm == "groupnorm":
            for name, width in (("hidden", self.hidden), ("decoder.hidden", self.decoder.hidden)):
                check(
                    width % self.norm_groups == 0,
                    f"{name} = {width} with norm_groups = {self.norm_groups}",
                    "a width that the groups divide",
                    "Change one of them",
                )
        if self.positions.kind == "sinusoidal":
            check(
                self.hidden % 4 == 0,
                f"hidden = {self.hidden} with sinusoidal positions",
                "a multiple of 4 (sine and cosine of two axes)",
                "Change hidden or positions.kind",
            )
        if self.trunk == "projection":
            check(
                self.latent.kind in ("gaussian_mixture", "gaussian", "deterministic")
                and not (
                    self.latent.kind == "gaussian_mixture" and self.latent.inference == "released"
                ),
                f"trunk = 'projection' with latent.kind = '{self.latent.kind}'",
                "a latent whose mean is linear in the hidden state",
                "Use latent.kind = 'gaussian_mixture' with inference = 'paper'",
            )
            check(
                self.encoder.kind != "residual_mlp",
                f"trunk = 'projection' with encoder.kind = '{self.encoder.kind}'",
                "an encoder with a residual stream",
                "Use encoder.kind = 'flow'",
            )
            check(
                self.embedder.input_transform == "library_log1p",
                f"trunk = 'projection' with embedder.input_transform = '{self.embedder.input_transform}'",
                "'library_log1p', which the components are computed from",
                "Set it",
            )
        for name, weight in (
            ("latent.adversarial_weight", self.latent.adversarial_weight),
            ("embedder.covariate", float(self.embedder.covariate)),
        ):
            if weight:
                check(
                    self.decoder.batches > 0,
                    f"{name} is on with decoder.batches = 0",
                    "the number of batches",
                    "Set decoder.batches, or switch it off",
                )

    @property
    def latent_size(self) -> int:
        """Width of an embedding: ``latent.size``, or ``hidden`` if there is no latent."""
        return self.hidden if self.latent.kind == "none" else self.latent.size


@dataclass(frozen=True, repr=False)
class MaskingConfig(DisplayedConfig):
    """Bi-level masking of the input while training (paper section 4.3, ``CellPLM/utils/mask.py``).

    The released configuration masks .25 of the genes in .75 of the cells; the authors' rebuttal states the reverse
    (.75 of the genes in .25 of the cells). The two fractions can express both.

    Attributes:
        cell_fraction: Fraction of the cells that are masked.
        gene_fraction: Mean-like masking rate of the genes in a masked cell.
        beta: Draw each cell's rate from Beta(a, 4/gene_fraction + 2 - a) instead of using ``gene_fraction`` itself.
        beta_concentration: ``a`` above (released: 5).
        maximum_rate: Cap of a drawn rate (released: .9).
        drop_cells: Fraction of the cells dropped from the sentence first.
        maximum_cells: Maximum number of cells kept after dropping; 0: no limit.
        panel_fraction: Fraction of the tissue samples of a batch that are reduced to a random gene panel, as if the
            other genes had not been measured.
        panel_minimum: Smallest panel as a fraction of the genes; the fraction is drawn log-uniformly from there to 1.
        library_of_visible: Scale counts to the library size of the visible genes, as inference does with a panel,
            instead of that of all genes.
    """

    cell_fraction: float = 0.75
    gene_fraction: float = 0.25
    beta: bool = True
    beta_concentration: float = 5.0
    maximum_rate: float = 0.9
    drop_cells: float = 0.3
    maximum_cells: int = 4000
    panel_fraction: float = 0.0
    panel_minimum: float = 0.02
    library_of_visible: bool = False

    def __post_init__(self):
        fraction(self.cell_fraction, "masking.cell_fraction", below_one=False)
        fraction(self.panel_fraction, "masking.panel_fraction", below_one=False)
        positive(self, "masking", "panel_minimum")
        fraction(self.panel_minimum, "masking.panel_minimum", below_one=False)
        fraction(self.gene_fraction, "masking.gene_fraction", below_one=False)
        fraction(self.drop_cells, "masking.drop_cells")
        fraction(self.maximum_rate, "masking.maximum_rate", below_one=False)
        positive(self, "masking", "beta_concentration")
        at_least(self, "masking", 0, "maximum_cells")
        if self.beta and self.gene_fraction > 0:
            b = 4 / self.gene_fraction + 2 - self.beta_concentration
            check(
                b > 0,
                f"masking.beta_concentration = {self.beta_concentration} with gene_fraction = "
                f"{self.gene_fraction} gives Beta(a, {b:.3g})",
                "a positive second parameter",
                "Lower beta_concentration or set masking.beta = False",
            )


@dataclass(frozen=True, repr=False)
class ObjectiveConfig(DisplayedConfig):
    """Training objective, in addition to the latent terms.

    Attributes:
        kind: ``"negative_binomial"`` (pretraining: all measured genes of masked cells, and the masked entries once
            more), ``"imputation"``, ``"denoising"``, ``"zero_inflated_negative_binomial"`` or
            ``"mean_squared_error"`` (on library-size-normalised log1p values).
        masked_part: Add the masked entries once more (the released ``dae``).
        restoration_weight: Weight of latent restoration: 1 - the cosine of each cell's latent, inferred from its masked
            counts, to the latent that the trunk alone gives its complete counts. Needs ``model.trunk = "projection"``;
            0 leaves it out.
    """

    kind: Literal[
        "negative_binomial",
        "imputation",
        "denoising",
        "zero_inflated_negative_binomial",
        "mean_squared_error",
    ] = "negative_binomial"
    masked_part: bool = True
    restoration_weight: float = 0.0

    def __post_init__(self):
        at_least(self, "objective", 0, "restoration_weight")


@dataclass(frozen=True, repr=False)
class OptimizerConfig(DisplayedConfig):
    """AdamW with linear warm-up, cosine decay and clipping by global norm.

    Attributes:
        learning_rate: Peak learning rate (released: 2e-4).
        weight_decay: Decoupled weight decay (released: 1e-8).
        warmup_steps: Steps of linear warm-up.
        final_fraction: Learning rate at the end as a fraction of the peak (cosine decay over ``TrainConfig.steps``).
        clip_norm: Global gradient norm above which gradients are scaled down; 0: no clipping.
        freeze_trunk: Keep the parameters of the projection (:data:`cellplm_jax.model.cellplm.TRUNK`) as they start.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 1e-8
    warmup_steps: int = 100
    final_fraction: float = 0.1
    clip_norm: float = 1.0
    freeze_trunk: bool = False

    def __post_init__(self):
        positive(self, "optimizer", "learning_rate")
        at_least(
            self, "optimizer", 0, "weight_decay", "warmup_steps", "final_fraction", "clip_norm"
        )


@dataclass(frozen=True, repr=False)
class DataConfig(DisplayedConfig):
    """Assembly of batches from samples.

    A sample larger than a row is cut into windows (random cells, or a spatial neighbourhood if there are
    coordinates). Several smaller samples share a row; their cells attend only within their own sample.

    Attributes:
        rows: Rows per batch, over all devices; one row is one context of the model.
        cells: Cells per row.
        segments: Maximum number of samples packed into one row; 1 disables packing.
        heldout_fraction: Fraction of the samples held out for evaluation. With fewer than ``1 / heldout_fraction``
            samples, that fraction of the cells of every sample is held out instead, as samples of their own.
        minimum_cells: Samples with fewer cells are left out (reported).
        threads: Threads of this process that read and assemble rows.
        prefetch: Number of batches to prefetch.
    """

    rows: int = 1
    cells: int = 1024
    segments: int = 16
    heldout_fraction: float = 0.1
    minimum_cells: int = 2
    threads: int = 4
    prefetch: int = 2

    def __post_init__(self):
        fraction(self.heldout_fraction, "data.heldout_fraction")
        at_least(self, "data", 1, "rows", "cells", "segments", "minimum_cells", "threads")
        at_least(self, "data", 1, "prefetch")


@dataclass(frozen=True, repr=False)
class ProjectionConfig(DisplayedConfig):
    """Start of a run with a trunk: principal components of the corpus, and discriminants of its clusters.

    Attributes:
        genes: Number of highly variable genes that have loadings; the others start at zero.
        components: Principal components of standardized log expression, centred by tissue sample.
        discriminants: Linear discriminants of the clusters of each dataset, appended to the latent; 0: none.
        discriminant_weight: Norm of the discriminants relative to the components.
        maximum_cells: Maximum number of cells read, spread evenly over the samples.
        passes: Passes over the data of the randomized decomposition.
    """

    genes: int = 8000
    components: int = 200
    discriminants: int = 40
    discriminant_weight: float = 1.0
    maximum_cells: int = 200_000
    passes: int = 4

    def __post_init__(self):
        at_least(self, "projection", 1, "genes", "components", "passes", "maximum_cells")
        at_least(self, "projection", 0, "discriminants", "discriminant_weight")


@dataclass(frozen=True, repr=False)
class MeshConfig(DisplayedConfig):
    """Device mesh over all processes; ``train/sharding.py`` assigns arrays to its axes.

    Attributes:
        data: Devices along the rows of a batch; 0: all devices that the other axes leave.
        cells: Devices along the cells of a row, for contexts too large for one device. It is also the number of
            pieces per row; cells are dropped and masked within each piece. So changing it changes the random draws of a
            run; no other mesh option does.
        genes: Devices along the vocabulary: gene embeddings, masks, decoder output, likelihood.
    """

    data: int = 0
    cells: int = 1
    genes: int = 1

    def __post_init__(self):
        at_least(self, "mesh", 0, "data")
        at_least(self, "mesh", 1, "cells", "genes")


@dataclass(frozen=True, repr=False)
class TrainConfig(DisplayedConfig):
    """Pretraining run: model, data, objective, optimizer and schedule of the loop.

    Attributes:
        model: Architecture; ``genes`` and the covariate sizes are filled in from the data when they are 0 or 1 there.
        masking, objective, optimizer, data, mesh: The parts.
        steps: Total number of optimizer steps.
        seed: Seed of everything random: initialisation, batches, masks, noise.
        accumulate: Number of batches whose gradients are averaged before one optimizer step.
        precision: Type of the factors of matrix products. Parameters, sums over cells, latent and likelihood are always
            float32.
        rematerialize: Gradient checkpointing: recompute the activations of encoder layers and decoder in the backward
            pass instead of storing them. Less memory, about a third more arithmetic.
        chunk_cells: Cells per row (per piece of a row) whose counts are dense at the same time, in embedder, decoder
            output, likelihood and the gradients of all three; 0: the complete batch. Changes results only by rounding.
            The mask, one byte per entry, is then the only array of cells by genes in a step. The objective
            "mean_squared_error" and evaluation do not use chunks.
        maximum_skipped: Number of consecutive skipped steps after which the run stops with a diagnosis. A step
            whose loss or gradients are not finite is skipped: it changes nothing.
        log_every, evaluate_every, checkpoint_every: Steps between logs, evaluations and checkpoints.
        probe_every: Steps between probes of the embedding on held-out cells with labels; 0: none.
        projection: How a new run with ``model.trunk = "projection"`` computes its start from the corpus.
        keep_checkpoints: Number of most recent checkpoints kept in addition to the best one.
    """

    model: ModelConfig
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    projection: ProjectionConfig = field(default_factory=lambda: ProjectionConfig())
    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    precision: Precision = "float32"
    rematerialize: bool = False
    chunk_cells: int = 0
    maximum_skipped: int = 10
    log_every: int = 10
    evaluate_every: int = 100
    checkpoint_every: int = 100
    probe_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self):
        at_least(self, "", 1, "steps", "log_every", "evaluate_every", "checkpoint_every")
        at_least(self, "", 1, "keep_checkpoints", "accumulate", "maximum_skipped")
        at_least(self, "", 0, "chunk_cells")
        at_least(self, "", 0, "probe_every")
        check_objective(self.objective.kind, self.model.decoder.kind)
        trunk = self.model.trunk == "projection"
        for name, used in (
            ("objective.restoration_weight", self.objective.restoration_weight > 0),
            ("optimizer.freeze_trunk", self.optimizer.freeze_trunk),
        ):
            check(
                trunk or not used,
                f"{name} is on with model.trunk = 'none'",
                "model.trunk = 'projection'",
                f"Set model.trunk, or switch {name} off",
            )
        if trunk:
            wanted = self.projection.components
            check(
                wanted <= self.model.hidden,
                f"projection.components = {wanted} with model.hidden = {self.model.hidden}",
                "at most as many components as hidden dimensions",
                "Change one of them",
            )
            wanted += self.projection.discriminants
            check(
                wanted <= self.model.latent_size,
                f"projection.components + projection.discriminants = {wanted} with latent.size = "
                f"{self.model.latent_size}",
                "at most as many as latent dimensions",
                "Change one of them",
            )
        check(
            self.data.cells % self.mesh.cells == 0,
            f"data.cells = {self.data.cells} with mesh.cells = {self.mesh.cells}",
            "a context that the devices along the cells divide",
            "Change one of them",
        )
        if self.mesh.data:
            check(
                self.data.rows % self.mesh.data == 0,
                f"data.rows = {self.data.rows} with mesh.data = {self.mesh.data}",
                "rows that the devices along the data axis divide",
                "Change one of them",
            )


@dataclass(frozen=True, repr=False)
class FinetuneConfig(DisplayedConfig):
    """Fine-tuning recipe; the defaults are the published annotation recipe on a smaller budget.

    AdamW with a linear warm-up. The learning rate falls when the validation loss stops falling, gradients are clipped
    by global norm, and training stops once the validation score stops rising. The parameters of the best epoch are
    kept.

    Attributes:
        epochs: Maximum number of passes over the training cells (published: 2000).
        patience: Number of epochs without a better validation score before training stops (published: 200); 0: never.
        learning_rate: Peak learning rate.
        embedder_rate: The embedder's learning rate as a fraction of ``learning_rate``.
        dispersion_rate: The learning rate of the genes' dispersions as a multiple of ``learning_rate``: one number
            per gene on a logarithmic scale, which a few hundred steps would hardly change.
        layer_decay: Factor on the learning rate for every layer further from the output; 1: none.
        weight_decay: Decoupled weight decay.
        embedder_weight_decay: The same for the embedder.
        warmup_epochs: Epochs over which the learning rate rises linearly.
        plateau_factor: Factor on the learning rate when the validation loss (without validation cells: the training
            loss) has not fallen for ``plateau_patience`` epochs; 1: never.
        plateau_patience: See ``plateau_factor``.
        clip_norm: Global gradient norm above which gradients are scaled down; 0: no clipping.
        average: Decay per epoch of a running mean of the parameters; the mean is validated and kept. 0: no mean, the
            parameters themselves (published).
        freeze: Parts that are not trained: ``"none"``, ``"embedder"``, or ``"encoder"`` (the embedder, the encoder
            and its last norm: only the latent and what follows it are trained).
        adapter_rank: Rank of low-rank adapters on the encoder's matrices (Hu et al. 2022, LoRA); these matrices and the
            embedder are then not trained. 0: no adapters.
        adapter_scale: Factor on the adapters' product.
        validation_fraction: Fraction of the cells held out for validation if no split is given; 0: no validation, and
            all epochs run.
        cells_per_step: Maximum number of cells per optimizer step, unless a single context is larger.
        cells_per_context: Maximum number of cells per training context; 0: no limit, each batch is one context.
        masking: Cells dropped and genes hidden from the input during training.
        seed: Seed of everything random: new parameters, the validation cells, masks, dropout, the order of steps.
    """

    epochs: int = 200
    patience: int = 50
    learning_rate: float = 5e-3
    embedder_rate: float = 0.1
    dispersion_rate: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 1e-7
    embedder_weight_decay: float = 1e-10
    warmup_epochs: int = 30
    plateau_factor: float = 0.95
    plateau_patience: int = 25
    clip_norm: float = 2.0
    average: float = 0.0
    freeze: Literal["none", "embedder", "encoder"] = "none"
    adapter_rank: int = 0
    adapter_scale: float = 1.0
    validation_fraction: float = 0.1
    cells_per_step: int = 2048
    cells_per_context: int = 2048
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    seed: int = 0

    def __post_init__(self):
        at_least(self, "", 1, "epochs", "plateau_patience", "cells_per_step")
        at_least(self, "", 0, "patience", "warmup_epochs", "clip_norm", "adapter_rank")
        at_least(self, "", 0, "weight_decay", "embedder_weight_decay", "embedder_rate")
        at_least(self, "", 0, "dispersion_rate")
        at_least(self, "", 0, "cells_per_context", "seed")
        positive(self, "", "learning_rate", "layer_decay", "plateau_factor", "adapter_scale")
        fraction(self.validation_fraction, "validation_fraction")
        fraction(self.average, "average")
