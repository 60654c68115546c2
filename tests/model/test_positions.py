"""Positional encodings against direct formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.model.positions import Positions, grid_square, sinusoidal_encoding
from tests.model.common import HIDDEN, apply, float64, linear, prelu, random_params, shapes_of, tiny

KINDS = ["sinusoidal", "grid", "mlp", "laplacian"]


def inputs(seed=0, samples=2, cells=5):
    generator = np.random.default_rng(seed)
    return {
        "cell_mask": np.ones((samples, cells), bool),
        "coordinates": generator.random((samples, cells, 2)).astype(np.float32),
        "has_coordinates": generator.random((samples, cells)) < 0.6,
        "eigenvectors": generator.standard_normal((samples, cells, 4)).astype(np.float32),
    }


def module_and_params(kind, **arguments):
    module = Positions(tiny(positions={"kind": kind, "grid": 6, "eigenvectors": 4}))
    return module, random_params(shapes_of(module, **arguments, train=False))


def test_grid_square_covers_the_unit_square_with_a_margin():
    ends = grid_square(jnp.array([[0.0, 1.0], [0.5, 0.25], [0.0098, 0.0099]]), 100)
    # (c * 1.02 - .01) * 100, floored, kept in 0..99.
    np.testing.assert_array_equal(ends, [[0, 99], [50, 24], [0, 0]])
    values = np.linspace(0, 1, 997, dtype=np.float32)
    squares = np.asarray(grid_square(values[:, None].repeat(2, 1), 100))[:, 0]
    assert squares.min() == 0
    assert squares.max() == 99
    assert (np.diff(squares) >= 0).all()
    assert len(np.unique(squares)) == 100


def test_sinusoidal_encoding_equals_the_formula_written_out():
    coordinates = np.array([[0.2, 0.8], [0.5, 0.0], [1.0, 0.33]], np.float32)
    width, grid = 16, 100
    got = np.asarray(sinusoidal_encoding(jnp.asarray(coordinates), width, grid))
    for row, (first, second) in enumerate(coordinates.astype(np.float64)):
        for offset, value in ((0, second), (width // 2, first)):
            square = min(max(int(np.floor((value * 1.02 - 0.01) * grid)), 0), grid - 1)
            for i in range(width // 4):
                angle = square / 10000 ** (2 * i / (width // 2))
                assert got[row, offset + 2 * i] == pytest.approx(np.sin(angle), abs=2e-5)
                assert got[row, offset + 2 * i + 1] == pytest.approx(np.cos(angle), abs=2e-5)


def test_sinusoidal_encoding_tells_squares_apart_and_axes_apart():
    # The centre of every square of a coarse grid: all 100 encodings differ.
    centre = (np.arange(10) + 0.5) / 10 / 1.02 + 0.01 / 1.02
    points = np.stack(np.meshgrid(centre, centre), -1).reshape(-1, 2).astype(np.float32)
    encoded = np.asarray(sinusoidal_encoding(jnp.asarray(points), 16, 10))
    distance = np.linalg.norm(encoded[:, None] - encoded[None], axis=-1)
    assert (distance + 9 * np.eye(100)).min() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_equal_plain_numpy(kind):
    arguments = inputs()
    module, params = module_and_params(kind, **arguments)
    got = np.asarray(apply(module, params, **arguments, train=False))
    p = float64(params)
    coordinates = arguments["coordinates"]
    if kind == "sinusoidal":
        expected = np.asarray(sinusoidal_encoding(jnp.asarray(coordinates), HIDDEN, 6))
    elif kind == "grid":
        square = np.clip(np.floor((coordinates * 1.02 - 0.01) * 6).astype(int), 0, 5)
        assert p["table"].shape == (36, HIDDEN)
        expected = p["table"][square[..., 0] * 6 + square[..., 1]]
    else:
        source = coordinates if kind == "mlp" else arguments["eigenvectors"]
        expected = prelu(linear(source, p["linear"]), p["prelu"])
    expected = np.where(arguments["has_coordinates"][..., None], expected, p["missing"])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_coordinates_every_cell_gets_the_missing_vector(kind):
    arguments = inputs()
    module, params = module_and_params(kind, **arguments)
    absent = arguments | {"coordinates": None, "eigenvectors": None}
    for has in (None, arguments["has_coordinates"]):
        got = apply(module, params, **absent | {"has_coordinates": has}, train=False)
        np.testing.assert_array_equal(got, np.broadcast_to(params["missing"], (2, 5, HIDDEN)))


@pytest.mark.parametrize("kind", KINDS)
def test_absent_flags_mean_that_all_cells_have_coordinates(kind):
    arguments = inputs()
    module, params = module_and_params(kind, **arguments)
    all_true = arguments | {"has_coordinates": np.ones((2, 5), bool)}
    np.testing.assert_array_equal(
        apply(module, params, **arguments | {"has_coordinates": None}, train=False),
        apply(module, params, **all_true, train=False),
    )


@pytest.mark.parametrize("kind", ["grid", "mlp", "laplacian"])
def test_cells_without_coordinates_train_the_missing_vector_alone(kind):
    arguments = inputs()
    arguments["has_coordinates"] = np.zeros((2, 5), bool)
    module, params = module_and_params(kind, **arguments)

    def loss(params):
        return jnp.sum(apply(module, params, **arguments, train=False) ** 2)

    gradient = jax.jit(jax.grad(loss))(params)
    assert np.abs(np.asarray(gradient.pop("missing"))).min() > 0
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0.0)


def test_laplacian_signs_flip_while_training_one_draw_a_sample():
    arguments = inputs(samples=40)
    arguments["has_coordinates"] = None
    module, params = module_and_params("laplacian", **arguments)
    # A linear map of eigenvectors alone: identity kernel, no bias, slope 1.
    kernel = np.zeros((4, HIDDEN), np.float32)
    kernel[:4, :4] = np.eye(4)
    params["linear"] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(HIDDEN)}
    params["prelu"] = {"negative_slope": jnp.ones(())}
    rngs = {"dropout": jax.random.key(2)}
    got = apply(module, params, **arguments, train=True, rngs=rngs)
    ratio = np.asarray(got)[..., :4] / arguments["eigenvectors"]
    np.testing.assert_allclose(np.abs(ratio), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-6)
    signs = ratio[:, 0]
    assert (abs(signs.mean(axis=0)) < 0.5).all()
    calm = apply(module, params, **arguments, train=False)
    np.testing.assert_allclose(np.asarray(calm)[..., :4], arguments["eigenvectors"], rtol=1e-6)
