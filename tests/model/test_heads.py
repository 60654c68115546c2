"""Task heads of every kind against plain numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cellplm_jax.model.heads import Head
from tests.model.common import apply, float64, linear, random_params, shapes_of, tiny

LATENT = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
MASK = np.arange(5)[None] < np.array([[5], [2], [0]])
CONDITION = np.random.default_rng(1).standard_normal((3, 5, 4)).astype(np.float32)
PER_CELL = ["annotation", "imputation", "denoising", "perturbation"]


def head(kind, layers=2, condition=0, **changes):
    sizes = {"outputs": 6, "hidden": 10, "layers": layers, "condition": condition}
    module = Head(tiny(head={"kind": kind} | sizes, **changes))
    keywords = {"condition": CONDITION} if condition else {}
    return module, random_params(shapes_of(module, LATENT, MASK, train=False, **keywords))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", PER_CELL)
def test_per_cell_heads_are_multilayer_perceptrons(kind, layers):
    module, params = head(kind, layers)
    got = apply(module, params, LATENT, MASK, train=False)
    x, p = LATENT.astype(np.float64), float64(params)["mlp"]
    assert len(p) == layers
    for layer in range(layers):
        x = linear(x if layer == 0 else np.maximum(x, 0), p[f"linear_{layer}"])
    assert got.shape == (3, 5, 6)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def test_perturbation_reads_its_condition():
    module, params = head("perturbation", 1, condition=4)
    got = apply(module, params, LATENT, MASK, condition=CONDITION, train=False)
    p = float64(params)["mlp"]["linear_0"]
    expected = linear(np.concatenate([LATENT, CONDITION], -1), p)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # No condition is the zero condition: an unperturbed cell.
    absent = apply(module, params, LATENT, MASK, train=False)
    np.testing.assert_allclose(absent, LATENT @ p["kernel"][:8] + p["bias"], rtol=1e-4, atol=1e-5)


def test_sample_classification_averages_the_cells_of_a_sample():
    module, params = head("sample_classification")
    p = float64(params)["linear"]
    got = np.asarray(apply(module, params, LATENT, MASK, train=False))
    assert got.shape == (3, 6)
    np.testing.assert_allclose(got[0], linear(LATENT[0].mean(0), p), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], linear(LATENT[1, :2].mean(0), p), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[2], p["bias"], rtol=1e-5)  # no cell at all
    nonsense = np.where(MASK[..., None], LATENT, 1e4).astype(np.float32)
    np.testing.assert_allclose(apply(module, params, nonsense, MASK, train=False), got, rtol=1e-5)


def test_dropout_acts_on_the_input_of_each_layer_while_training_alone():
    module, params = head("annotation", 1, dropout=0.5)
    kernel = np.zeros((8, 6), np.float32)
    kernel[:6] = np.eye(6)
    params["mlp"]["linear_0"] = {"kernel": kernel, "bias": np.zeros(6, np.float32)}
    rngs = {"dropout": jax.random.key(0)}
    got = np.asarray(apply(module, params, LATENT, MASK, train=True, rngs=rngs))
    kept = got != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(got[kept], 2 * LATENT[..., :6][kept], rtol=1e-5)
    np.testing.assert_allclose(
        apply(module, params, LATENT, MASK, train=False), LATENT[..., :6], rtol=1e-5
    )
