"""Named configurations: the architectures and runs that ``configs/``, the demo and estimators start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cellplm_jax.config import (
    DataConfig,
    DecoderConfig,
    EmbedderConfig,
    EncoderConfig,
    LatentConfig,
    MaskingConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PositionsConfig,
    TrainConfig,
)
from cellplm_jax.errors import ConfigError, nearest


def published_85m(genes: int = 1) -> TrainConfig:
    """Return the published architecture, with positions on: 72.1 M parameters at 19,374 genes and 12,596 batches.

    Args:
        genes: Size of the vocabulary; filled in from the data when a run starts.
    """
    return TrainConfig(
        model=ModelConfig(genes=genes),
        optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=1e-8, warmup_steps=2000),
        data=DataConfig(rows=8, cells=2048),
        steps=200_000,
        precision="bfloat16",
        log_every=50,
        evaluate_every=2000,
        checkpoint_every=2000,
    )


def published_1b(genes: int = 1) -> TrainConfig:
    """Return the published architecture grown to 1,018.5 M parameters at 19,374 genes and 12,596 batches.

    Twice as wide and seven times as deep; the latent stays as it was, so that embeddings of both have one size. 92 % of
    the parameters are in the encoder, the rest along the genes, which four devices share.

    Args:
        genes: Size of the vocabulary; filled in from the data when a run starts.
    """
    return TrainConfig(
        model=ModelConfig(
            genes=genes,
            hidden=2048,
            encoder=EncoderConfig(layers=28, heads=16),
            decoder=DecoderConfig(hidden=2048, bottleneck=256),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=1e-8, warmup_steps=5000),
        data=DataConfig(rows=64, cells=2048),
        mesh=MeshConfig(genes=4),
        steps=300_000,
        precision="bfloat16",
        rematerialize=True,
        log_every=50,
        evaluate_every=2000,
        checkpoint_every=2000,
    )


def scratch(genes: int = 1) -> TrainConfig:
    """Return what ``Estimator(None)`` trains on a few thousand cells: 2 layers, 256 hidden, 64 latent dimensions.

    The KL terms weigh half a percent: a cell's counts are thousands of nats, mostly noise, and the posterior gives up
    its structure long before a short run has found any (measured on PBMC3k: at weight 1 clusters at ARI .2 instead of
    .6 after 150 steps, at .05 with half the cells a batch a complete collapse). Counts are scaled to a library size
    first, as in the paper, so that depth is not embedded. The decoder's bottleneck is half the published one:
    the bundled weights stay under 15 MB.

    Args:
        genes: Size of the vocabulary; filled in from the data when a run starts.
    """
    return TrainConfig(
        model=ModelConfig(
            genes=genes,
            hidden=256,
            dropout=0.1,
            embedder=EmbedderConfig(input_transform="library_log1p"),
            encoder=EncoderConfig(layers=2),
            latent=LatentConfig(size=64, latent_weight=0.005, cluster_weight=0.005),
            decoder=DecoderConfig(hidden=256, bottleneck=64),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4, warmup_steps=50),
        data=DataConfig(rows=1, cells=1024),
        steps=600,
        probe_every=200,
    )


def small(genes: int = 1) -> TrainConfig:
    """Return a model that trains on a laptop in under an hour: 2 layers, 256 hidden, 240 latent dimensions.

    It starts as a projection of its corpus (200 components and 40 discriminants, see
    ``train/projection.py``), which stays as it is. The encoder learns to restore the projection of a cell
    from masked counts and random gene panels, the decoder to predict the counts. The KL terms weigh half a percent: the
    counts of a cell are thousands of nats, mostly noise. The decoder's bottleneck is half the published one, so that
    the bundled weights stay under 15 MB.

    Args:
        genes: Size of the vocabulary; filled in from the data when a run starts.
    """
    base = scratch(genes)
    latent = dataclasses.replace(base.model.latent, size=240)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, trunk="projection", latent=latent),
        masking=MaskingConfig(panel_fraction=0.3, library_of_visible=True),
        objective=ObjectiveConfig(restoration_weight=100.0),
        optimizer=dataclasses.replace(base.optimizer, freeze_trunk=True),
        steps=2000,
        evaluate_every=500,
        checkpoint_every=500,
        probe_every=500,
    )


def debug(genes: int = 1) -> TrainConfig:
    """Return a run of seconds that goes through every stage.

    Args:
        genes: Size of the vocabulary; filled in from the data when a run starts.
    """
    return TrainConfig(
        model=ModelConfig(
            genes=genes,
            hidden=32,
            dropout=0.1,
            encoder=EncoderConfig(layers=1, heads=4),
            latent=LatentConfig(size=16, clusters=4),
            decoder=DecoderConfig(hidden=32, bottleneck=16),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        data=DataConfig(rows=2, cells=128),
        steps=30,
        log_every=5,
        evaluate_every=15,
        checkpoint_every=15,
    )


def demo(genes: int = 1) -> TrainConfig:
    """Return the run of ``cellplm demo``: ``small``, shortened to a few minutes on two CPU cores.

    One checkpoint, at the end: on so few cells the held-out likelihood is flat from the middle of the run on, while
    the embedding goes on settling (kNN accuracy rises to the last step), so its best step would be a matter of chance.

    Args:
        genes: Size of the vocabulary; filled in from the data when a run starts.
    """
    base = small(genes)
    steps = 250
    return dataclasses.replace(base, steps=steps, evaluate_every=50, checkpoint_every=steps)


def _with_model(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def gaussian(genes: int = 1) -> TrainConfig:
    """Return ``small`` with a plain Gaussian prior (ablation of the mixture)."""
    base = small(genes)
    return _with_model(base, latent=dataclasses.replace(base.model.latent, kind="gaussian"))


def no_latent(genes: int = 1) -> TrainConfig:
    """Return ``small`` with a deterministic latent (ablation of the latent distribution)."""
    base = small(genes)
    return _with_model(base, latent=dataclasses.replace(base.model.latent, kind="deterministic"))


def mlp_encoder(genes: int = 1) -> TrainConfig:
    """Return ``small`` with an MLP encoder: cells do not see one another."""
    base = small(genes)
    return _with_model(base, encoder=dataclasses.replace(base.model.encoder, kind="mlp"))


def no_positions(genes: int = 1) -> TrainConfig:
    """Return ``small`` without positional encodings."""
    return _with_model(small(genes), positions=PositionsConfig(kind="none"))


def no_projection(genes: int = 1) -> TrainConfig:
    """Return ``small`` with random weights to start from, and nothing to restore."""
    base = small(genes)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, trunk="none"),
        masking=dataclasses.replace(base.masking, panel_fraction=0.0, library_of_visible=False),
        objective=ObjectiveConfig(),
        optimizer=dataclasses.replace(base.optimizer, freeze_trunk=False),
    )


def no_discriminants(genes: int = 1) -> TrainConfig:
    """Return ``small`` that starts from the principal components of the corpus alone."""
    base = small(genes)
    return dataclasses.replace(
        base, projection=dataclasses.replace(base.projection, discriminants=0)
    )


def no_restoration(genes: int = 1) -> TrainConfig:
    """Return ``small`` without latent restoration: reconstruction alone moves the embedding."""
    return dataclasses.replace(small(genes), objective=ObjectiveConfig())


def no_masks(genes: int = 1) -> TrainConfig:
    """Return ``small`` without masking: a plain autoencoder."""
    return dataclasses.replace(
        small(genes), masking=MaskingConfig(cell_fraction=0.0, gene_fraction=0.0)
    )


PRESETS: dict[str, Callable[[int], TrainConfig]] = {
    "85m": published_85m,
    "1b": published_1b,
    "small": small,
    "scratch": scratch,
    "debug": debug,
    "demo": demo,
    "gaussian": gaussian,
    "no_latent": no_latent,
    "mlp_encoder": mlp_encoder,
    "no_positions": no_positions,
    "no_masks": no_masks,
    "no_projection": no_projection,
    "no_discriminants": no_discriminants,
    "no_restoration": no_restoration,
}


def preset(name: str, genes: int = 1) -> TrainConfig:
    """Return a named configuration.

    Args:
        name: One of :data:`PRESETS`.
        genes: Size of the vocabulary; filled in from the data when a run starts.

    Raises:
        ConfigError: There is no such preset; the nearest name is given.
    """
    if name not in PRESETS:
        remedy = nearest(name, PRESETS, "Choose one of them")
        raise ConfigError(
            f"there is no configuration '{name}'", f"one of {', '.join(PRESETS)}", remedy
        )
    return PRESETS[name](genes)
