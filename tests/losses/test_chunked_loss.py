"""The loss in chunks of cells against the plain loss, for a small output layer, in packed rows of several pieces."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.batch import Reconstruction
from cellplm_jax.config import MaskingConfig, ObjectiveConfig
from cellplm_jax.errors import ConfigError
from cellplm_jax.kernels import chunked as chunks_module
from cellplm_jax.losses import objectives
from cellplm_jax.losses.objectives import chunked_count_loss, reconstruction_loss
from cellplm_jax.model.masking import drop_cells
from tests.train.packed import packed_batch

GENES, WIDTH = 20, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few stored counts, so that the last one overlaps the one before."""
    monkeypatch.setattr(chunks_module, "BLOCK", 16)
    monkeypatch.setattr(objectives, "BLOCK", 16)


def batch_of(sizes, *, cells=24, pieces=1):
    batch = packed_batch(sizes, cells=cells, pieces=pieces, genes=GENES, nonzeros=300)
    return jax.tree.map(jnp.asarray, batch)


def weights(inflated):
    random = np.random.default_rng(0)
    shapes = {"mean": (WIDTH, GENES), "dispersion": (GENES,)}
    if inflated:
        shapes["zero_logits"] = (WIDTH, GENES)
    return {
        name: jnp.asarray(random.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }


def output(params, hidden):
    """A linear output layer."""
    return Reconstruction(
        mean=jax.nn.softplus(hidden @ params["mean"]) + 0.01,
        dispersion=jnp.exp(params["dispersion"]),
        zero_logits=hidden @ params["zero_logits"] if "zero_logits" in params else None,
    )


CASES = {
    "masked twice": (ObjectiveConfig(), True, False, True),
    "masked once": (ObjectiveConfig(masked_part=False), True, False, False),
    "no mask": (ObjectiveConfig(), False, False, True),
    "no panel": (ObjectiveConfig(masked_part=False), True, False, False),
    "inflated": (ObjectiveConfig(kind="zero_inflated_negative_binomial"), True, False, False),
    "targets": (ObjectiveConfig(kind="imputation"), True, True, True),
    "all targets": (ObjectiveConfig(kind="denoising"), True, False, False),
}
"""Objective; whether entries are masked; whether genes are asked for; whether cells were dropped."""


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_plain_loss(name, pieces):
    config, masked, targeted, dropped = CASES[name]
    batch = batch_of([[9, 4], [6, 1, 5]], pieces=pieces)
    if name == "no panel":
        batch = batch.replace(measured=None)
    if dropped:
        batch = drop_cells(jax.random.key(0), batch, MaskingConfig(drop_cells=0.3))
    random = np.random.default_rng(1)
    shape = batch.cell_mask.shape
    hidden = jnp.asarray(random.standard_normal((*shape, WIDTH)), jnp.float32)
    mask = random.random((*shape, GENES)) < 0.3
    mask[:, ::3] = False
    mask = jnp.asarray(mask) & batch.cell_mask[..., None] if masked else None
    targets = jnp.asarray(random.random((2, GENES)) < 0.5) if targeted else None
    params = weights(config.kind.startswith("zero"))

    def plain(params, hidden):
        terms = reconstruction_loss(
            output(params, hidden), batch, config, gene_mask=mask, target_genes=targets
        )
        return terms["reconstruction"], terms

    def chunked(params, hidden):
        terms = chunked_count_loss(
            output, params, hidden, batch, config, chunk=40, gene_mask=mask, target_genes=targets
        )
        return terms["reconstruction"], terms

    both = jax.jit(
        lambda *a: [jax.value_and_grad(f, (0, 1), has_aux=True)(*a) for f in (plain, chunked)]
    )
    ((_, expected), slopes), ((_, found), found_slopes) = both(params, hidden)
    assert float(expected["reconstruction"]) > 1
    assert (float(expected["reconstruction_masked"]) > 1) == (name in ("masked twice", "inflated"))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-5, atol=1e-6, err_msg=key)
    for one, two in zip(jax.tree.leaves(slopes), jax.tree.leaves(found_slopes), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4 * float(jnp.abs(one).max()))


def test_a_chunk_is_an_eighth_of_the_cells_of_an_embedder():
    """The backward pass of a likelihood holds more arrays than that of an embedder."""
    batch = batch_of([[20, 8]], cells=32)
    sizes = []

    def seen(params, hidden):
        sizes.append(hidden.shape[1])
        return output(params, hidden)

    hidden = jnp.ones((1, 32, WIDTH))
    loss = partial(chunked_count_loss, seen, weights(False), hidden, batch, ObjectiveConfig())
    jax.eval_shape(lambda: loss(chunk=40))
    assert set(sizes) == {32, 5, 1}  # shapes, chunks, and the dispersion


def test_decoders_that_lack_something_are_refused():
    batch = batch_of([[8]], cells=8)
    config = ObjectiveConfig(kind="zero_inflated_negative_binomial")
    with pytest.raises(ConfigError, match="zero inflation"):
        chunked_count_loss(output, weights(False), jnp.ones((1, 8, WIDTH)), batch, config, chunk=8)
