"""Configs of published checkpoints: constructor arguments of the original ``OmicsFormer``, read and written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cellplm_jax import config as configuration
from cellplm_jax.config import ModelConfig
from cellplm_jax.errors import CheckpointError, ConfigError, shorten

# Constructor defaults of the original (CellPLM/model/cellformer.py); a published config may omit them.
DEFAULTS: dict[str, Any] = {
    "batch_num": 0,
    "dataset_num": 0,
    "platform_num": 0,
    "mask_type": "input",
    "model_dropout": 0.1,
    "norm": "layernorm",
    "enc_head": 8,
    "pe_type": "sin",
    "cat_pe": True,
    "latent_mod": "vae",
    "w_li": 1.0,
    "w_en": 1.0,
    "head_type": None,
    "dsbn": False,
    "ecs": False,
    "dar": False,
    "input_covariate": False,
    "num_clusters": 16,
    "lamda": 0.5,
}
REQUIRED = (
    "gene_list",
    "enc_mod",
    "enc_hid",
    "enc_layers",
    "post_latent_dim",
    "dec_mod",
    "dec_hid",
    "dec_layers",
    "out_dim",
)
_SIZES = (
    "enc_hid",
    "enc_layers",
    "enc_head",
    "post_latent_dim",
    "num_clusters",
    "dec_hid",
    "dec_layers",
    "out_dim",
    "batch_num",
    "dataset_num",
    "platform_num",
)
_RATES = ("model_dropout", "w_li", "w_en", "lamda")
_NAMES = ("enc_mod", "latent_mod", "dec_mod", "norm", "pe_type", "mask_type")
HEADS = {
    "annotation": "annotation",
    "imputation": "imputation",
    "denoising": "denoising",
    "perturbation_prediction": "perturbation",
    "patient_classification": "sample_classification",
}


def model_config(published: Mapping[str, Any]) -> ModelConfig:
    """Convert the original's constructor arguments.

    Args:
        published: The contents of ``PREFIX.config.json``.

    Returns:
        The equivalent architecture.

    Raises:
        CheckpointError: An argument is missing, or names a module without an exact equivalent; the message gives the
            reason.
    """
    missing = [name for name in REQUIRED if name not in published]
    if missing:
        raise CheckpointError(
            f"the published config lacks {', '.join(missing)}",
            "the constructor arguments of the original OmicsFormer and its gene_list",
            "Use the PREFIX.config.json that was published with the weights",
        )
    values = {**DEFAULTS, **published}
    try:
        _check_types(values)
        _refuse_inexact(values)
        return _translate(values)
    # Already explained; it is a ValueError, so the next clause would wrap it.
    except CheckpointError:
        raise
    except (ConfigError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"the published config is invalid ({shorten(str(error), 300)})",
            "a config the original itself could run",
            "Use the PREFIX.config.json that was published with the weights",
        ) from error


def _check_types(values: Mapping[str, Any]) -> None:
    """Raise a TypeError or ValueError for sizes, rates, names and genes of the wrong type."""
    for name in _SIZES:
        value = values[name]
        # A bool is an int in Python; `true` as a width would pass as 1.
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            msg = f"{name} = {shorten(repr(value))} is not a size"
            raise TypeError(msg)
    for name in _RATES:
        value = values[name]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            msg = f"{name} = {shorten(repr(value))} is not a finite number"
            raise TypeError(msg)
    for name in _NAMES:
        if values[name] is not None and not isinstance(values[name], str):
            msg = f"{name} = {shorten(repr(values[name]))} is not a name"
            raise TypeError(msg)
    genes = values["gene_list"]
    if not isinstance(genes, list):
        msg = f"gene_list is a {type(genes).__name__}"
        raise TypeError(msg)
    # An overlong name would be repeated in every message and table.
    wrong = [g for g in genes if not isinstance(g, str) or not 0 < len(g) <= 1000]
    if wrong:
        msg = f"gene_list contains {shorten(repr(wrong[0]))}, which is not the name of a gene"
        raise TypeError(msg)
    if len(set(genes)) < len(genes):
        repeated = Counter(genes).most_common(1)[0][0]
        msg = f"gene_list contains '{shorten(repeated)}' more than once"
        raise ValueError(msg)


def _translate(values: Mapping[str, Any]) -> ModelConfig:
    """Build the architecture from constructor arguments with an exact equivalent."""
    genes = values["gene_list"]
    kind = {
        "gmvae": "gaussian_mixture",
        "vae": "gaussian",
        "ae": "deterministic",
        "none": "none",
    }[values["latent_mod"]]
    # VAELatentLayer is constructed without lamda, w_li or a warm-up argument, so its own defaults apply.
    vae = kind == "gaussian"
    latent = configuration.LatentConfig(
        kind=kind,  # type: ignore[arg-type]
        inference="released",
        size=int(values["post_latent_dim"]),
        clusters=int(values["num_clusters"]),
        latent_weight=1.0 if vae else float(values["w_li"]),
        cluster_weight=float(values["w_en"]),
        # The original's max(lamda, .) also applies a floor at 0; a floor of 0 here means no floor.
        floor=1.0 if vae else (float(values["lamda"]) or 1e-9),
        warmup_steps=10000 if vae else 0,
    )
    head_type = values["head_type"]
    head = configuration.HeadConfig()
    if head_type in HEADS:
        head = configuration.HeadConfig(
            kind=HEADS[head_type],  # type: ignore[arg-type]
            outputs=int(values["out_dim"]),
            hidden=int(values["dec_hid"]),
            layers=int(values["dec_layers"]),
        )
    norm = values["norm"]
    return ModelConfig(
        genes=len(genes),
        hidden=int(values["enc_hid"]),
        norm=norm if norm in ("groupnorm", "layernorm", "rmsnorm") else "none",
        dropout=float(values["model_dropout"]),
        embedder=configuration.EmbedderConfig(
            covariate=bool(values["input_covariate"]) and values["pe_type"] is not None
        ),
        positions=configuration.PositionsConfig(kind="none"),
        encoder=configuration.EncoderConfig(
            kind={"flowformer": "flow", "mlp": "mlp", "none": "none"}[values["enc_mod"]],  # type: ignore[arg-type]
            layers=int(values["enc_layers"]),
            heads=int(values["enc_head"]),
        ),
        latent=latent,
        decoder=configuration.DecoderConfig(
            hidden=int(values["dec_hid"]),
            layers=int(values["dec_layers"]),
            batches=int(values["batch_num"]),
            datasets=int(values["dataset_num"]),
            platforms=int(values["platform_num"]),
        ),
        head=head,
    )


def _refuse_inexact(values: Mapping[str, Any]) -> None:
    reason = None
    encoder = values["enc_mod"]
    latent = values["latent_mod"]
    norm = values["norm"]
    if encoder == "transformer":
        reason = (
            "enc_mod 'transformer' divides its weights by a spectral norm estimated at every forward "
            "pass and attends over a single token, which has no exact equivalent here"
        )
    elif encoder in ("performer", "cosformer", "resmlp"):
        reason = {
            "performer": "enc_mod 'performer' draws its random features at construction",
            "cosformer": "enc_mod 'cosformer' reweights by position in a sequence; a set of cells has none",
            "resmlp": "enc_mod 'resmlp' returns a bare tensor and cannot run in the original",
        }[encoder]
    elif encoder not in ("flowformer", "mlp", "none"):
        reason = f"enc_mod {encoder!r} is not an encoder of the original"
    elif latent not in ("gmvae", "vae", "ae", "none"):
        reason = f"latent_mod {latent!r} is outside gmvae, vae, ae and none"
    elif values["dec_mod"] != "nbmlp":
        reason = (
            f"dec_mod {values['dec_mod']!r} is not the published negative-binomial decoder 'nbmlp'"
        )
    elif values["dsbn"]:
        reason = "dsbn = true normalises with running batch statistics of each dataset"
    elif norm == "batchnorm":
        reason = "norm 'batchnorm' depends on the other cells of the batch"
    elif values["pe_type"] is not None and values["cat_pe"]:
        reason = "cat_pe = true concatenates a positional encoding that is the number 0., which the original cannot run"
    elif values["head_type"] not in (None, "embedder", *HEADS):
        reason = f"head_type {values['head_type']!r} is not a head of the original"
    elif values["head_type"] is None and values["out_dim"] != len(values["gene_list"]):
        reason = (
            f"out_dim = {values['out_dim']} but the gene list has {len(values['gene_list'])} genes"
        )
    elif values["mask_type"] != "input":
        reason = f"mask_type {values['mask_type']!r} masks hidden vectors instead of counts"
    if reason:
        raise CheckpointError(
            f"this checkpoint cannot be converted exactly: {reason}",
            "flow-attention or MLP encoder, latent gmvae, vae or ae, decoder nbmlp",
            "Run it with the original package, or retrain here",
        )


def published_config(config: ModelConfig, genes: list[str]) -> dict[str, Any]:
    """Return the original's constructor arguments for a model trained with this package.

    Args:
        config: The architecture.
        genes: The vocabulary.

    Returns:
        Constructor arguments without the gene list.

    Raises:
        CheckpointError: The original cannot express the model; the message gives the first reason.
    """
    reason = None
    if config.positions.kind != "none":
        reason = "it uses positional encodings, which the original ignores"
    elif config.encoder.kind not in ("flow", "mlp"):
        reason = f"its encoder is '{config.encoder.kind}'"
    elif config.encoder.feedforward != 2:
        reason = "its feed-forward block is not twice the hidden width"
    elif config.latent.kind == "none":
        reason = "it has no latent"
    elif config.latent.kind == "gaussian_mixture" and config.latent.inference != "released":
        reason = "its latent uses the paper's inference, which differs from the original's"
    elif config.decoder.kind != "negative_binomial" or config.decoder.bottleneck != 128:
        reason = "its decoder is not the published negative-binomial one"
    elif config.embedder.input_transform != "log1p" or config.embedder.covariate:
        reason = "its input is not log1p of counts only"
    elif config.head.kind != "none":
        reason = "it has a task head"
    elif config.norm == "groupnorm" and config.norm_groups != 4:
        reason = "its GroupNorm does not have the original's 4 groups"
    if reason:
        raise CheckpointError(
            f"this model cannot be written in the published format: {reason}",
            "a model the original computes identically",
            "Keep it in the format of this package, which every version opens",
        )
    latent = {"gaussian_mixture": "gmvae", "gaussian": "vae", "deterministic": "ae"}
    return {
        "enc_mod": {"flow": "flowformer", "mlp": "mlp"}[config.encoder.kind],
        "enc_hid": config.hidden,
        "enc_layers": config.encoder.layers,
        "enc_head": config.encoder.heads,
        "latent_mod": latent[config.latent.kind],
        "post_latent_dim": config.latent.size,
        "num_clusters": config.latent.clusters,
        "w_li": config.latent.latent_weight,
        "w_en": config.latent.cluster_weight,
        "lamda": config.latent.floor,
        "dec_mod": "nbmlp",
        "dec_hid": config.decoder.hidden,
        "dec_layers": config.decoder.layers,
        "out_dim": len(genes),
        "batch_num": config.decoder.batches,
        "dataset_num": config.decoder.datasets,
        "platform_num": config.decoder.platforms,
        "model_dropout": config.dropout,
        "norm": config.norm,
        "pe_type": None,
        "cat_pe": False,
    }
