"""Drive the original PyTorch CellPLM (``cellplm==0.1.0.post2``) with every source of chance under control.

The parity goldens (``make_parity_golden.py``) and the live parity tests run the published code through this file, so
both see the same thing. The published modules do all the arithmetic; what happens here is only

* dropping the optional imports that the model does not need,
* handing in the input mask and the Gumbel and Gaussian noise that the original would draw itself,
* copying intermediate values out through forward hooks, before later in-place operations change them.

Nothing here imports jax or this package: the reference stays independent of what it judges.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

OPTIONAL_IMPORTS = {
    "einops": ("rearrange", "repeat", "pack", "unpack"),  # performer layers only
    "scanpy": (),  # file readers only
    "tqdm": ("tqdm",),  # progress bars only
}
"""Modules the published package imports at the top but the model never calls, with the names it takes from them."""

PUBLISHED_ARGUMENTS: dict[str, Any] = {
    "name": "20230926_75M_50M",
    "enc_mod": "flowformer",
    "enc_hid": 1024,
    "enc_layers": 4,
    "latent_mod": "gmvae",
    "lamda": 5.0,
    "post_latent_dim": 512,
    "dec_mod": "nbmlp",
    "dec_hid": 1024,
    "dec_layers": 2,
    "model_dropout": 0.2,
    "mask_node_rate": 0.75,
    "mask_feature_rate": 0.25,
    "drop_node_rate": 0.3,
    "norm": "groupnorm",
    "dataset": "HLCA",
    "architecture": "OmicsFormer",
    "epochs": 200,
    "lr": 0.0002,
    "wd": 1e-08,
    "w_li": 5.0,
    "w_en": 5.0,
    "num_clusters": 16,
    "out_dim": 19374,
    "ddp": True,
    "cat_pe": False,
    "val_num": 10,
    "max_batch_size": 4000,
    "dar": False,
    "input_covariate": False,
    "beta": [2.0, 1.5],
    "batch_mixing": False,
    "ecs": False,
    "dsbn": False,
    "dae": True,
    "batch_flip": True,
    "mask_beta": True,
    "batch_num": 12596,
    "dataset_num": 484,
}
"""Constructor arguments of the released 82.4 M parameter checkpoint, without its gene list."""


def load_original() -> types.ModuleType:
    """Import the published package's model code and return its ``CellPLM.model.cellformer`` module.

    Missing packages that the model never calls are replaced by empty modules while the import runs, and only then.

    Raises:
        ImportError: torch or cellplm is not installed (extra ``parity``).
    """
    importlib.import_module("torch")
    standins: list[str] = []
    for name, attributes in OPTIONAL_IMPORTS.items():
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            continue
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module
        standins.append(name)
    try:
        return importlib.import_module("CellPLM.model.cellformer")
    finally:
        for name in standins:
            del sys.modules[name]


def build(config: dict[str, Any], *, double: bool = False):
    """Return ``OmicsFormer(**config)`` with all dropout probabilities zero and the node dropping off.

    Args:
        config: Constructor arguments including ``gene_list``, as in ``PREFIX.config.json``.
        double: Compute in float64, so that the reference carries no rounding of its own.
    """
    import torch

    model = load_original().OmicsFormer(**config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.mask_model._drop_node_rate = 0.0
    return model.double() if double else model


def to_fixed_point(array: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Write an array as whole numbers of at most ``bits`` bits (sign included) times a power of two.

    Returns:
        int64 numbers and the exponent: ``array ~ numbers * 2**exponent``, off by at most half a unit.
    """
    array = np.asarray(array, np.float64)
    largest = np.abs(array).max(initial=0.0)
    exponent = 0 if largest == 0 else int(np.floor(np.log2(largest))) + 2 - bits
    limit = 2 ** (bits - 1) - 1
    return np.clip(np.round(np.ldexp(array, -exponent)), -limit, limit).astype(np.int64), exponent


def randomise(model, seed: int, *, bits: int | None = None) -> None:
    """Move every trainable parameter away from its initial value, in place.

    Norm scales, PReLU slopes, biases and dispersions all become distinct random numbers, because a parameter left at
    0 or 1 can be read from the wrong place without anyone noticing. The frozen table of sinusoids stays as it is.

    Args:
        model: An ``OmicsFormer``.
        seed: Seed of a ``numpy.random.RandomState`` (its stream never changes).
        bits: Make every parameter a fixed-point number of that many bits, so that stored weights are small.
    """
    import torch

    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = random.standard_normal(tuple(parameter.shape))
            if name.endswith("feat_enc.emb"):
                value = 0.2 * noise
            elif name.endswith("dec_disp"):
                value = 0.7 * noise
            elif parameter.dim() >= 2:
                is_embedding = "covariate_layers" in name
                value = noise * (1.0 if is_embedding else 0.9 / np.sqrt(parameter.shape[1]))
            elif parameter.numel() == 1:  # PReLU slope
                value = 0.25 + 0.08 * noise
            elif name.endswith("weight"):  # scale of a norm
                value = 1.0 + 0.2 * noise
            else:
                value = 0.2 * noise
            value = np.asarray(value, np.float32)
            if bits is not None:
                numbers, exponent = to_fixed_point(value, bits)
                # No exact zeros: frameworks differ in which side of a PReLU's kink 0 belongs to.
                numbers = np.where(numbers == 0, 1, numbers)
                value = np.ldexp(numbers, exponent).astype(np.float32)
            parameter.copy_(torch.from_numpy(value))


def state_arrays(model) -> dict[str, np.ndarray]:
    """The state dict as float32 numpy copies, in torch's own order."""
    return {
        name: value.detach().float().numpy().copy() for name, value in model.state_dict().items()
    }


def load_state(model, state: dict[str, np.ndarray]) -> None:
    """Load arrays made by :func:`state_arrays`; every name must fit."""
    import torch

    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})


@dataclass(frozen=True)
class Cells:
    """Input cells of one context.

    Attributes:
        counts: Raw counts [cells, input genes].
        batch: Sample labels [cells].
        dataset: Dataset labels [cells].
        genes: Names of the columns of ``counts``; None when they are the model's vocabulary in its order.
        platform: Platform labels [cells]; needed by models built with ``platform_num``.
    """

    counts: sparse.csr_matrix
    batch: np.ndarray
    dataset: np.ndarray
    genes: Sequence[str] | None = None
    platform: np.ndarray | None = None

    @property
    def number(self) -> int:
        """Number of cells."""
        return len(self.batch)

    @property
    def columns(self) -> int:
        """Number of input genes."""
        return self.counts.shape[1]  # type: ignore[index]


def _inputs(model, cells: Cells) -> dict[str, Any]:
    """A fresh input dict: the original changes the one it is given."""
    import torch

    dtype = next(model.parameters()).dtype
    counts = cells.counts.tocoo()
    expression = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([counts.row, counts.col]).astype(np.int64)),
        torch.from_numpy(counts.data.astype(np.float64)).to(dtype),
        counts.shape,
        check_invariants=True,
    ).coalesce()
    number = cells.number
    x_dict = {
        "x_seq": expression,
        "coord": torch.full((number, 2), -1.0, dtype=dtype),
        "batch": torch.from_numpy(np.asarray(cells.batch, np.int64)),
        "dataset": torch.from_numpy(np.asarray(cells.dataset, np.int64)),
    }
    if cells.platform is not None:
        x_dict["platform"] = torch.from_numpy(np.asarray(cells.platform, np.int64))
    return x_dict


@contextlib.contextmanager
def given_noise(gumbel: np.ndarray | None, gaussian: np.ndarray | None) -> Iterator[None]:
    """Replace the original's draws by the given ones while the block runs.

    Args:
        gumbel: Gumbel noise added to the cluster logits [cells, clusters]; zeros when None.
        gaussian: Standard normal noise of the latent [cells, latent]; zeros when None.
    """
    import torch

    original = importlib.import_module("CellPLM.latent.autoencoders")

    def as_noise(values: np.ndarray | None, like):
        if values is None:
            return torch.zeros_like(like)
        noise = torch.from_numpy(np.asarray(values)).to(like.dtype)
        if noise.shape != like.shape:
            message = f"noise has shape {tuple(noise.shape)}, the model needs {tuple(like.shape)}"
            raise ValueError(message)
        return noise

    previous_gumbel = original.GumbelSoftmax.sample_gumbel
    previous_normal = torch.randn_like
    original.GumbelSoftmax.sample_gumbel = lambda self, logits, eps=1e-20: as_noise(gumbel, logits)
    torch.randn_like = lambda tensor, **_: as_noise(gaussian, tensor)  # type: ignore[assignment]
    try:
        yield
    finally:
        original.GumbelSoftmax.sample_gumbel = previous_gumbel
        torch.randn_like = previous_normal


@contextlib.contextmanager
def given_mask(model, mask: np.ndarray | None) -> Iterator[None]:
    """Replace the mask builder's random choice by ``mask`` [cells, input genes], 1 = hidden and predicted."""
    import torch

    masking = importlib.import_module("CellPLM.utils.mask")

    def apply_mask(x_dict):
        chosen = torch.from_numpy(np.asarray(mask)).bool()
        with warnings.catch_warnings():  # the original calls a deprecated constructor
            warnings.simplefilter("ignore")
            masked = masking.simple_mask(x_dict["x_seq"].coalesce(), chosen)
        x_dict["masked_x_seq"] = masked
        x_dict["input_mask"] = chosen.int()
        return x_dict

    if mask is None:
        yield
        return
    model.mask_model.apply_mask = apply_mask
    try:
        yield
    finally:
        del model.mask_model.apply_mask


@contextlib.contextmanager
def _captured(model) -> Iterator[dict[str, Any]]:
    """Collect intermediate values, as copies, while the block runs."""
    seen: dict[str, Any] = {}

    def keep(name: str):
        def hook(_module, _inputs, output):
            if isinstance(output, tuple):
                output = output[0]
            if isinstance(output, dict):
                seen.update({f"{name}.{key}": value.clone() for key, value in output.items()})
            else:
                seen[name] = output.clone()

        return hook

    watched = {
        "embedded": model.embedder,
        "encoder": model.encoder,
        "hidden": model.pre_latent_norm,
        "z": model.latent,
    }
    layer = model.latent.layers[-1]
    if hasattr(layer, "inference"):
        watched["gmvae"] = layer.inference
    if hasattr(layer, "hid_2mu"):
        watched["vae_mean"] = layer.hid_2mu
        watched["vae_log_variance"] = layer.hid_2sigma
    if hasattr(model, "decoder"):
        watched["decoder"] = model.decoder
    elif hasattr(model.head, "mlp"):
        watched["prediction"] = model.head.mlp
    elif hasattr(model.head, "output_layer"):
        watched["prediction"] = model.head.output_layer
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _named(seen: dict[str, Any]) -> dict[str, np.ndarray]:
    """Captured tensors under the names the goldens use."""
    import torch

    renamed = {
        "embedded": "embedded",
        "encoder.hidden": "encoded",
        "hidden": "hidden",
        "z": "z",
        "gmvae.mean": "latent_mean",
        "gmvae.var": "latent_variance",
        "gmvae.logits": "logits",
        "gmvae.categorical": "cluster",
        "gmvae.y_mean": "prior_mean",
        "gmvae.y_var": "prior_variance",
        "vae_mean": "latent_mean",
        "decoder.mean": "nb_mean",
        "decoder.disp": "nb_dispersion",
        "prediction": "prediction",
    }
    values = {new: seen[old] for old, new in renamed.items() if old in seen}
    if "vae_log_variance" in seen:
        values["latent_variance"] = torch.exp(torch.clamp(seen["vae_log_variance"], -5, 5)) + 1e-4
    return {name: value.detach().numpy() for name, value in values.items()}


def run_eval(model, cells: Cells) -> dict[str, np.ndarray]:
    """Run the published forward pass in eval mode, without Gumbel noise, and return what it computed.

    The objective is left out: with a subset of the genes it fails (``objective/zinb.py``).

    Returns:
        Arrays by name: ``embedded``, ``encoded``, ``hidden`` (after ``pre_latent_norm``), ``z``, the latent
        parameters the latent kind has (``latent_mean``, ``latent_variance``, ``logits``, ``cluster``, ``prior_mean``,
        ``prior_variance``), ``nb_mean`` [cells, vocabulary] and ``nb_dispersion`` [vocabulary], or ``prediction``
        (logits) with a head.
    """
    import torch

    model.eval()
    x_dict = _inputs(model, cells)
    x_dict["loss_mask"] = torch.ones(cells.number, dtype=torch.bool)
    if model.head_type == "patient_classification":
        x_dict["label"] = torch.zeros(1, dtype=torch.int64)
    objective = model.objective if hasattr(model, "decoder") else None
    if objective is not None:
        model.objective = _no_objective()
    try:
        with torch.no_grad(), given_noise(None, None), _captured(model) as seen:
            model(x_dict, None if cells.genes is None else list(cells.genes))
    finally:
        if objective is not None:
            model.objective = objective
    values = _named(seen)
    if "nb_dispersion" in values:
        values["nb_dispersion"] = values["nb_dispersion"][0]  # the same for every cell
    return values


def _no_objective():
    """A module in the objective's place that contributes nothing."""
    import torch

    class NoObjective(torch.nn.Module):
        def forward(self, out_dict, x_dict):
            return torch.zeros(())

    return NoObjective()


def eval_loss(model, cells: Cells, gaussian: np.ndarray | None = None) -> float:
    """Total loss of the published forward pass in eval mode (all cells, no mask), full vocabulary only."""
    import torch

    model.eval()
    x_dict = _inputs(model, cells)
    x_dict["gene_mask"] = torch.arange(cells.columns)
    with torch.no_grad(), given_noise(None, gaussian):
        _, loss = model(x_dict, None)
    return float(loss)


def run_train(
    model,
    cells: Cells,
    *,
    mask: np.ndarray,
    gumbel: np.ndarray | None,
    gaussian: np.ndarray | None,
    objective: str = "nb",
    gene_mask: np.ndarray | None = None,
    label: np.ndarray | None = None,
    loss_mask: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Run one training forward and backward pass of the published code with the given mask and noise.

    Args:
        model: From :func:`build`; ``lamda``, weights and ``kl_weight`` are taken from its latent layer as they are.
        cells: Input cells.
        mask: 0/1 [cells, input genes]; 1 = hidden from the model and predicted.
        gumbel: [cells, clusters], used by the mixture latent.
        gaussian: [cells, latent], used by the mixture and the plain variational latent.
        objective: ``"nb"``, ``"imputation"``, ``"denoise"``, or ``"head"`` for a model with a classifying head, whose
            loss is then the total (the original leaves the latent term out there).
        gene_mask: What the original takes as ``x_dict['gene_mask']``; all vocabulary columns when None.
        label: Clean counts [cells, len(gene_mask)] for the denoising objective; classes for a head.
        loss_mask: bool [cells], cells an annotation head is scored on.

    Returns:
        Values by name (losses as 0-d arrays, intermediate arrays as in :func:`run_eval`), the gradient of the total
        loss for every parameter that has one, and the names of the parameters that have none.
    """
    import torch

    objectives = importlib.import_module("CellPLM.objective")
    model.train()
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    layer = model.latent.layers[-1]
    x_dict = _inputs(model, cells)
    chosen = np.arange(cells.columns) if gene_mask is None else np.asarray(gene_mask)
    x_dict["gene_mask"] = torch.from_numpy(chosen.astype(np.int64))
    if label is not None and objective != "head":
        x_dict["label"] = torch.from_numpy(np.asarray(label)).to(dtype)

    if loss_mask is not None:
        x_dict["loss_mask"] = torch.from_numpy(np.asarray(loss_mask, bool))
    previous = getattr(model, "objective", None)
    if objective == "head":
        x_dict["label"] = torch.from_numpy(np.asarray(label, np.int64))
    else:
        model.objective = objectives.Objectives([{"type": objective, "dae": True}]).train()
    try:
        with given_mask(model, mask), given_noise(gumbel, gaussian), _captured(model) as seen:
            genes = None if cells.genes is None else list(cells.genes)
            out_dict, loss = model(x_dict, genes)
        loss.backward()
    finally:
        if previous is not None:
            model.objective = previous

    values = _named(seen)
    if objective == "head":
        values["total_loss"] = np.asarray(loss.item())
        return values, *_gradients(model)
    values["nb_dispersion"] = values["nb_dispersion"][0]
    latent_loss = float(out_dict["latent_loss"])
    values["total_loss"] = np.asarray(loss.item())
    values["latent_loss"] = np.asarray(latent_loss)
    values["reconstruction_loss"] = np.asarray(loss.item() - latent_loss)
    if objective == "nb":
        full = objectives.NBReconstructionLoss(dae=False).train()
        outputs = {"mean": seen["decoder.mean"].detach(), "disp": seen["decoder.disp"].detach()}
        full_value = full(outputs, x_dict).item()
        values["reconstruction_full"] = np.asarray(full_value)
        values["reconstruction_masked"] = np.asarray(loss.item() - latent_loss - full_value)
    if "logits" in values:
        gaussian_term = layer.gaussian_loss(
            *(seen[f"gmvae.{name}"] for name in ("gaussian", "mean", "var", "y_mean", "y_var"))
        )
        categorical_term = -layer.entropy(seen["gmvae.logits"], seen["gmvae.prob_cat"]) - np.log(
            1 / layer.num_clusters
        )
        values["gaussian_term"] = np.asarray(gaussian_term.item())
        values["categorical_term"] = np.asarray(categorical_term.item())
    elif "latent_variance" in values:
        mean, variance = values["latent_mean"], values["latent_variance"]
        divergence = -0.5 * (1 + np.log(variance) - mean**2 - variance).sum(1).mean()
        values["gaussian_term"] = np.asarray(divergence)  # before weight and floor

    return values, *_gradients(model)


def _gradients(model) -> tuple[dict[str, np.ndarray], list[str]]:
    """Take the gradients off a model: arrays by name, and the names of the parameters without one."""
    gradients: dict[str, np.ndarray] = {}
    without: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            without.append(name)
        else:
            gradients[name] = parameter.grad.numpy().copy()
    model.zero_grad(set_to_none=True)
    return gradients, without


def positional_encoding(kind: str, width: int, coordinates: np.ndarray, *, seed: int = 0):
    """Run one of the published position tables, which the published model builds but never calls.

    Args:
        kind: ``"sin"`` or ``"learnable"``.
        width: Length of a position vector.
        coordinates: [cells, 2] in [0, 1], or -1 in the first row for "no positions at all".
        seed: Seeds the ``missing_pe`` vector and the learnable table.

    Returns:
        The vectors [cells, width], the table [10000, width], the vector for missing positions [width].
    """
    import torch

    load_original()
    positions = importlib.import_module("CellPLM.utils.pe")
    torch.manual_seed(seed)
    encoder = positions.select_pe_encoder(kind)(width)
    if not hasattr(
        encoder, "width"
    ):  # the learnable table forgets to store its own size and cannot run
        encoder.width = encoder.height = 100
    with torch.no_grad():
        vectors = encoder(torch.from_numpy(np.asarray(coordinates, np.float32)))
    table = encoder.pe_enc.weight.detach().numpy().copy()
    return vectors.detach().numpy().copy(), table, encoder.missing_pe.detach().numpy().copy()


def published_config(latent: str = "gmvae") -> dict[str, Any]:
    """Configuration of the released checkpoint, with its real gene list where that file is at hand.

    The file is looked for at ``$CELLPLM_PUBLISHED_CONFIG`` and in ``../shared/reference`` beside the checkout;
    otherwise 19,374 made-up Ensembl identifiers stand in, which changes no number.

    Args:
        latent: ``"gmvae"``, ``"vae"`` or ``"ae"``.
    """
    root = Path(__file__).resolve().parents[1]
    candidates = [root.parent / "shared" / "reference" / "20230926_85M.config.json"]
    if named := os.environ.get("CELLPLM_PUBLISHED_CONFIG"):
        candidates.insert(0, Path(named))
    config = dict(PUBLISHED_ARGUMENTS)
    found = next((path for path in candidates if path.is_file()), None)
    if found is not None:
        config = json.loads(found.read_text())
    else:
        config["gene_list"] = [f"ENSG{number:011d}" for number in range(config["out_dim"])]
    config["latent_mod"] = latent
    return config


def build_published(seed: int, latent: str = "gmvae"):
    """The released architecture (82.4 M parameters) with random weights.

    Initial values are torch's own, then every vector parameter (biases, norm scales, PReLU slopes, dispersion) is
    moved off its initial value too. The gene embedding is drawn five times wider than the original's initial value,
    so that the cells of a random model differ from one another as those of a trained one do.

    Returns:
        ``(model, config)``, the model in eval mode.
    """
    import torch

    torch.manual_seed(seed)
    config = published_config(latent)
    model = build(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith("feat_enc.emb"):
                parameter.mul_(5.0)
            elif parameter.dim() == 1:
                scale = 0.05 if parameter.numel() > 1 else 0.08
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval(), config


def save_published(
    model, config: dict[str, Any], prefix: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Write ``PREFIX.config.json`` and ``PREFIX.best.ckpt`` in the form of the published checkpoints.

    Returns:
        Paths of the configuration and of the weights.
    """
    import torch

    config_path, weights_path = Path(f"{prefix}.config.json"), Path(f"{prefix}.best.ckpt")
    config_path.write_text(json.dumps(config))
    torch.save({"model_state_dict": model.state_dict()}, weights_path)
    return config_path, weights_path


def random_counts(
    random: np.random.RandomState, cells: int, genes: int, nonzeros: int
) -> sparse.csr_matrix:
    """Counts that look like a tissue: skewed gene abundances, about ``nonzeros`` of them detected in a cell."""
    abundance = random.lognormal(0.0, 1.5, genes)
    rows = []
    for _ in range(cells):
        weights = abundance * random.lognormal(0.0, 0.5, genes)
        number = min(genes, max(1, random.poisson(nonzeros)))
        # The first arrivals of exponential clocks: a weighted draw without replacement.
        arrival = random.exponential(size=genes) / weights
        detected = np.argpartition(arrival, number - 1)[:number]
        detected.sort()
        values = 1 + random.poisson(weights[detected] * 0.3)
        rows.append((detected, np.minimum(values, 2000)))
    indptr = np.concatenate([[0], np.cumsum([len(columns) for columns, _ in rows])])
    return sparse.csr_matrix(
        (
            np.concatenate([values for _, values in rows]).astype(np.float32),
            np.concatenate([columns for columns, _ in rows]),
            indptr,
        ),
        shape=(cells, genes),
    )
