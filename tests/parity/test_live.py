"""Our model against the original PyTorch CellPLM, run side by side at the size of the published checkpoint.

Needs torch and ``cellplm==0.1.0.post2`` (extra ``parity``). The 82.4 M weights are random. Tolerances as in
``test_golden.py``: 1e-4 for values, 1e-3 for gradients.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.batch import LatentNoise
from cellplm_jax.config import ObjectiveConfig
from cellplm_jax.interop.torch_checkpoint import (
    as_published,
    convert_state_dict,
    read_published,
    write_published,
)
from cellplm_jax.losses.objectives import latent_loss, reconstruction_loss
from cellplm_jax.model.cellplm import CellPLM, init_params

from .common import (
    Sentence,
    gradient_errors,
    latent_quantities,
    make_batch,
    relative_error,
    without_dropout,
)

# Nothing heavy is imported while tests are collected: most runs deselect these.
MISSING = [name for name in ("torch", "CellPLM") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (extra 'parity')"),
]

DRIVER = Path(__file__).resolve().parents[2] / "tools" / "original_cellplm.py"
VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
NONZEROS = 1500


def load_driver():
    name = "original_cellplm"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, DRIVER)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        specification.loader.exec_module(module)
    return sys.modules[name]


original = load_driver()


@pytest.fixture(autouse=True, scope="module")
def _importable():
    try:
        original.load_original()
    except ImportError as error:
        pytest.skip(f"the original package cannot be imported: {error}")


@pytest.fixture(scope="module", params=["gmvae", "vae", "ae"])
def published(request, tmp_path_factory):
    """One random model of the published size, as the original and as read from its files by us."""
    import torch

    torch.set_num_threads(2)
    model, config = original.build_published(seed=11, latent=request.param)
    folder = tmp_path_factory.mktemp(request.param)
    config_path, weights_path = original.save_published(model, config, folder / "original")
    converted = read_published(weights_path, config_path)
    yield SimpleNamespace(
        latent=request.param,
        model=model,
        config=config,
        config_path=config_path,
        weights_path=weights_path,
        converted=converted,
    )
    for path in folder.iterdir():
        path.unlink()
    del model, converted
    gc.collect()


def cells_of(config: dict, number: int, seed: int, *, genes: int | None = None):
    """The same random cells for both sides; ``genes`` takes that many columns of the vocabulary in random order."""
    random = np.random.RandomState(seed)
    vocabulary = config["gene_list"]
    index = np.arange(len(vocabulary))
    if genes is not None:
        index = random.permutation(len(vocabulary))[:genes]
    counts = original.random_counts(random, number, len(index), NONZEROS)
    batch = random.randint(0, config["batch_num"], number)
    dataset = random.randint(0, config["dataset_num"], number)
    names = None if genes is None else [vocabulary[column] for column in index]
    theirs = original.Cells(counts, batch, dataset, names)
    return theirs, Sentence(counts, index, batch, dataset)


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    keep = slice(None)
    if "logits" in theirs:
        assert relative_error(ours["logits"][0], theirs["logits"]) <= VALUE_TOLERANCE
        # Where two components tie to rounding, either may win; such cells are left out, and must be rare.
        second, first = np.sort(theirs["logits"], axis=1)[:, -2:].T
        keep = first - second > 1e-4 * np.abs(theirs["logits"]).max()
        assert keep.mean() > 0.99
        np.testing.assert_array_equal(ours["cluster"][0][keep], theirs["cluster"][keep])
        assert len(np.unique(theirs["logits"].argmax(1))) > 1 or len(keep) == 1
    checked = 0
    for name, reference in theirs.items():
        if name not in ours:
            continue
        if name == "nb_dispersion":
            value = ours[name]
        else:
            value = ours[name][0][keep] if name != "hidden" else ours[name][0]
            reference = reference[keep] if name != "hidden" else reference
        assert relative_error(value, reference) <= VALUE_TOLERANCE, name
        checked += 1
    assert checked >= 4


def test_checkpoint_round_trip(published, tmp_path):
    import torch

    again = write_published(published.converted, tmp_path / "again")
    assert json.loads(again[1].read_text()) == json.loads(published.config_path.read_text())
    before = torch.load(published.weights_path, weights_only=True)["model_state_dict"]
    after = torch.load(again[0], weights_only=True)["model_state_dict"]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    for path in again:
        path.unlink()


@pytest.mark.parametrize(
    ("cells", "genes"),
    [(1, None), (300, 7000), (3000, None)],
    ids=["one_cell", "300_cells_subset_of_genes", "3000_cells"],
)
def test_inference(published, cells, genes):
    if published.latent != "gmvae" and cells != 300:
        pytest.skip("the encoder is the same for every latent; one size is enough")
    theirs, sentence = cells_of(published.config, cells, seed=cells, genes=genes)
    reference = original.run_eval(published.model, theirs)
    config = published.converted.config
    padded = cells + (37 if cells == 300 else 0)
    batch = make_batch([sentence], config.genes, cells=padded)
    run = jax.jit(CellPLM(config).apply)
    output = run({"params": published.converted.params}, batch)
    ours = latent_quantities(output)
    ours = {k: v if k == "nb_dispersion" else v[:, :cells] for k, v in ours.items()}
    del output
    compare(ours, reference)
    # Cells must differ, or agreement would mean little.
    if cells > 1:
        assert ours["z"][0].std(axis=0).mean() > 1e-3


def test_training_gradients(published):
    if published.latent == "ae":
        pytest.skip("the two latents with a prior cover its decoder and encoder")
    cells, config = 24, without_dropout(published.converted.config)
    theirs, sentence = cells_of(published.config, cells, seed=5)
    random = np.random.RandomState(6)
    mask = random.uniform(size=(cells, config.genes)) < 0.25
    mask[[2, 9]] = False
    gaussian = random.standard_normal((cells, config.latent.size)).astype(np.float32)
    gumbel = random.gumbel(size=(cells, config.latent.clusters)).astype(np.float32)
    layer = published.model.latent.layers[-1]
    kl_weight = 1.0
    if published.latent == "vae":
        kl_weight = layer.kl_weight = 0.5
    values, gradients, without = original.run_train(
        published.model, theirs, mask=mask, gumbel=gumbel, gaussian=gaussian
    )
    published.model.eval()
    batch = jax.tree.map(jnp.asarray, make_batch([sentence], config.genes))
    noise = LatentNoise(gaussian=jnp.asarray(gaussian[None]), gumbel=jnp.asarray(gumbel[None]))
    gene_mask = jnp.asarray(mask[None])

    def loss(params):
        output = CellPLM(config).apply(
            {"params": params}, batch, gene_mask=gene_mask, noise=noise, train=True
        )
        terms = reconstruction_loss(
            output.reconstruction, batch, ObjectiveConfig(), gene_mask=gene_mask
        )
        latent = latent_loss(output.latent, batch.cell_mask, config.latent, warmup=kl_weight)
        return terms["reconstruction"] + latent["latent"], {**terms, **latent}

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, terms), ours = run(published.converted.params)
    assert relative_error(total, values["total_loss"]) <= VALUE_TOLERANCE
    for name, reference in (
        ("reconstruction_full", values["reconstruction_full"]),
        ("reconstruction_masked", values["reconstruction_masked"]),
        ("latent", values["latent_loss"]),
        ("kl_latent", values["gaussian_term"]),
    ):
        assert relative_error(terms[name], reference) <= VALUE_TOLERANCE, name

    assert set(without) == set(published.converted.unused)
    errors = gradient_errors(published.converted, ours, gradients)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT_TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize("latent", ["gmvae", "vae", "ae"])
@pytest.mark.parametrize("encoder", ["flowformer", "mlp"])
def test_original_runs_a_model_made_here(latent, encoder, tmp_path):
    # The other direction: initialised by us, written in the published form, loaded strictly by the original.
    import torch

    genes = [f"ENSG{number:011d}" for number in range(60)]
    template = {
        **original.PUBLISHED_ARGUMENTS,
        "latent_mod": latent,
        "enc_mod": encoder,
        "enc_hid": 32,
        "enc_layers": 2,
        "post_latent_dim": 12,
        "dec_hid": 20,
        "batch_num": 3,
        "dataset_num": 2,
        "out_dim": 60,
        "gene_list": genes,
    }
    small = original.build(template)
    config = convert_state_dict(original.state_arrays(small), template).config
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(3)))
    weights, arguments = write_published(as_published(config, genes, params), tmp_path / "ours")
    model = original.build(json.loads(arguments.read_text()))
    model.load_state_dict(torch.load(weights, weights_only=True)["model_state_dict"], strict=True)
    random = np.random.RandomState(1)
    counts = original.random_counts(random, 9, 60, 20)
    batch, dataset = random.randint(0, 3, 9), random.randint(0, 2, 9)
    theirs = original.run_eval(model, original.Cells(counts, batch, dataset))
    ours = CellPLM(config).apply(
        {"params": params}, make_batch([Sentence(counts, np.arange(60), batch, dataset)], 60)
    )
    for name, value in latent_quantities(ours).items():
        value = value if name == "nb_dispersion" else value[0]
        if name in theirs:
            assert relative_error(value, theirs[name]) <= VALUE_TOLERANCE, name
