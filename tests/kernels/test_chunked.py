"""Counts made dense a chunk at a time: the chunks, and products and losses over them against the plain forms."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.config import MaskingConfig, ObjectiveConfig, TrainConfig
from cellplm_jax.kernels import chunked as chunks_module
from cellplm_jax.kernels.chunked import (
    CountChunks,
    chunked_product,
    chunked_product_reference,
    summed_in_parts,
    summed_in_parts_reference,
    summed_over_chunks,
    summed_over_chunks_reference,
)
from cellplm_jax.losses import objectives as objectives_module
from cellplm_jax.losses.objectives import chunked_count_loss, reconstruction_loss
from cellplm_jax.model.cellplm import init_params
from cellplm_jax.model.decoder import Decoder
from cellplm_jax.model.masking import drop_cells, masked_width, sample_gene_mask
from cellplm_jax.train.step import loss_terms
from tests.model.common import GENES, make_batch, random_counts, random_params, shapes_of, tiny

MEASURED = np.random.default_rng(5).random((2, GENES)) < 0.7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a chunk, as in large batches."""
    monkeypatch.setattr(chunks_module, "BLOCK", 16)
    monkeypatch.setattr(objectives_module, "BLOCK", 16)


def batch_of(lengths=(13, 9), cells=13, dropped=0.0, measured=None, rows=None):
    dense = [random_counts(length, seed=seed) for seed, length in enumerate(lengths)]
    if len(dense[0]) > 4:
        dense[0][4] = 0  # a cell without counts
    batch = make_batch(dense[:rows], cells=cells, extra_nonzeros=5, measured=measured)
    if dropped:
        batch = drop_cells(jax.random.key(3), batch, MaskingConfig(drop_cells=dropped))
    return batch


def in_pieces(batch, pieces=2):
    """Lay each row out in pieces, with a CSR of its own each."""
    cells = batch.cell_mask.shape[1] // pieces
    nonzeros = batch.gene.shape[1]
    indptr = np.asarray(batch.indptr)
    ends = np.stack([indptr[:, p * cells : (p + 1) * cells + 1] for p in range(pieces)], 1)
    gene, count = (np.zeros((len(ends), pieces, nonzeros), np.asarray(x).dtype)
                   for x in (batch.gene, batch.count))  # fmt: skip
    for row in range(len(ends)):
        for piece in range(pieces):
            low, high = ends[row, piece, 0], ends[row, piece, -1]
            gene[row, piece, : high - low] = batch.gene[row, low:high]
            count[row, piece, : high - low] = batch.count[row, low:high]
    return batch.replace(
        indptr=jnp.asarray(ends - ends[..., :1]), gene=jnp.asarray(gene), count=jnp.asarray(count)
    )


BATCHES = {
    "two_rows": lambda: batch_of(measured=MEASURED),
    "one_row": lambda: batch_of(rows=1),
    "dropped": lambda: batch_of(dropped=0.3, measured=MEASURED),
    "pieces": lambda: in_pieces(batch_of((12, 9), 12)),
    "dropped_pieces": lambda: drop_cells(
        jax.random.key(0), in_pieces(batch_of((12, 9), 12)), MaskingConfig(drop_cells=0.3)
    ),
    "empty": lambda: batch_of((1, 0), 6),
}


EVERY = pytest.mark.parametrize("kind", BATCHES)
"""Kinds of batches."""


def cells_of(batch):
    return batch.cell_mask.shape[1] // batch.pieces


@EVERY
@pytest.mark.parametrize("size", [1, 4, 100])
def test_chunks_together_are_the_dense_counts(kind, size):
    batch = BATCHES[kind]()

    @jax.jit
    def collected(batch):
        chunks = CountChunks.of(batch, size, GENES)
        values = batch.count.astype(jnp.float32)
        whole = jnp.zeros((*chunks.begin.shape[:-1], chunks.cells, GENES))
        seen = jnp.zeros(chunks.cells, int)
        for index in range(chunks.number):
            whole = chunks.written(whole, chunks.dense(values, jnp.int32(index)), jnp.int32(index))
            where = chunks.start(jnp.int32(index)) + jnp.arange(chunks.size)
            seen = seen.at[where].add(chunks.fresh(jnp.int32(index)))
        return batch.unfold(whole), seen

    whole, seen = collected(batch)
    np.testing.assert_array_equal(whole, batch.dense_counts(GENES))
    np.testing.assert_array_equal(seen, 1)


def test_chunks_scatter_what_they_hold_and_no_more():
    batch = batch_of((100, 3), 100)
    chunks = CountChunks.of(batch, 10, GENES)
    held = np.diff(np.asarray(batch.indptr)[:, ::10], axis=1)
    np.testing.assert_array_equal(chunks.end - chunks.begin, held)
    assert int(chunks.blocks) == -(-held.max() // 16)


@pytest.mark.parametrize(
    ("kind", "size", "masked"),
    [(kind, 3, True) for kind in BATCHES] + [("dropped", 3, False), ("dropped", 100, True)],
)
def test_the_product_and_its_gradient_are_the_plain_ones(kind, size, masked):
    batch = BATCHES[kind]()
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((GENES, 6)), jnp.float32)
    shape = (*batch.cell_mask.shape, GENES)
    hidden = jnp.asarray(random.random(shape) < 0.3) if masked else None
    towards = jnp.asarray(random.standard_normal((*batch.cell_mask.shape, 6)), jnp.float32)
    values = jnp.log1p(batch.count.astype(jnp.float32))

    def plain(table):
        dense = batch.dense(values, GENES)
        dense = dense if hidden is None else jnp.where(hidden, 0.0, dense)
        return jnp.sum(dense @ table * towards), dense @ table

    def chunked(table):
        chunks = CountChunks.of(batch, size, GENES)
        folded = None if hidden is None else batch.fold(hidden)
        product = batch.unfold(chunked_product(table, chunks, values, folded))
        return jnp.sum(product * towards), product

    (_, expected), slope = jax.jit(jax.value_and_grad(plain, has_aux=True))(table)
    (_, found), found_slope = jax.jit(jax.value_and_grad(chunked, has_aux=True))(table)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found_slope, slope, atol=2e-5)
    folded = None if hidden is None else batch.fold(hidden)
    chunks = CountChunks.of(batch, size, GENES)
    reference = batch.unfold(chunked_product_reference(table, chunks, values, folded))
    np.testing.assert_allclose(reference, expected, atol=1e-5)


@EVERY
def test_sums_over_chunks_have_the_value_and_gradients_of_the_reference(kind):
    batch = BATCHES[kind]()
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((GENES, 6)), jnp.float32)
    cells = batch.fold(jnp.asarray(random.standard_normal((*batch.cell_mask.shape, 6)), "float32"))

    def of_chunk(chunks, index, table, rows, given):
        product = jnp.tanh(chunks.dense(given, index) @ table * rows)
        return jnp.sum(product * chunks.fresh(index)[:, None]), {"rows": jnp.sum(rows**2)}

    def run(of):
        def loss(table, cells):
            return of(of_chunk, CountChunks.of(batch, 4, GENES), table, cells, batch.count)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(table, cells)

    (wanted, slopes), (found, found_slopes) = (
        run(summed_over_chunks_reference),
        run(summed_over_chunks),
    )
    for one, two in zip(
        *map(jax.tree.leaves, ((wanted, slopes), (found, found_slopes))), strict=True
    ):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


def test_sums_in_parts_have_the_value_and_gradient_of_the_reference():
    values, given = jnp.arange(1.0, 5.0), jnp.arange(3.0)

    def of_part(index, values, given):
        part = jnp.sin(values * given[index])
        return part.sum(), part[0]

    wanted, found = (
        jax.value_and_grad(lambda values, of=of: of(of_part, 3, values, given), has_aux=True)(
            values
        )
        for of in (summed_in_parts_reference, summed_in_parts)
    )
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5)


OBJECTIVES = {
    "both_parts": (ObjectiveConfig(), "negative_binomial", True, False),
    "one_part": (ObjectiveConfig(masked_part=False), "negative_binomial", True, False),
    "no_mask": (ObjectiveConfig(), "negative_binomial", False, False),
    "denoising": (ObjectiveConfig(kind="denoising"), "negative_binomial", False, True),
    "imputation": (ObjectiveConfig(kind="imputation"), "negative_binomial", True, True),
    "zero_inflated": (
        ObjectiveConfig(kind="zero_inflated_negative_binomial"),
        "zero_inflated_negative_binomial",
        True,
        False,
    ),
}


@pytest.mark.parametrize(
    ("kind", "objective", "size"),
    [(kind, "both_parts", 4) for kind in BATCHES]
    + [("dropped", objective, 4) for objective in OBJECTIVES if objective != "both_parts"]
    + [("dropped", "both_parts", 100)],
)
def test_the_loss_and_its_gradients_are_the_plain_ones(kind, objective, size):
    batch = BATCHES[kind]()
    config, decoder, masked, targeted = OBJECTIVES[objective]
    random = np.random.default_rng(1)
    module = Decoder(tiny(decoder={"kind": decoder}))
    latent = random.standard_normal((*batch.cell_mask.shape, 8)).astype(np.float32)
    params = random_params(shapes_of(module, latent, batch, train=False))
    mask = jnp.asarray(random.random((*batch.cell_mask.shape, GENES)) < 0.3)
    mask = mask & batch.cell_mask[..., None] & (jnp.arange(mask.shape[1]) % 4 > 0)[None, :, None]
    mask = mask if masked else None
    targets = random.random((mask.shape[0] if masked else len(latent), GENES)) < 0.5
    targets = jnp.asarray(targets) if targeted else None
    hidden = module.apply({"params": params}, latent, batch, part="hidden")

    def output(params, hidden):
        return module.apply({"params": params}, hidden, None, part="output")

    def plain(params, hidden):
        terms = reconstruction_loss(
            output(params, hidden), batch, config, gene_mask=mask, target_genes=targets
        )
        return terms["reconstruction"], terms

    def chunked(params, hidden):
        terms = chunked_count_loss(
            output, params, hidden, batch, config, chunk=size, gene_mask=mask, target_genes=targets
        )
        return terms["reconstruction"], terms

    (_, expected), slopes = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(params, hidden)
    (_, found), found_slopes = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(
        params, hidden
    )
    alone = jax.jit(chunked)(params, hidden)[1]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(alone[name], value, rtol=1e-5, atol=1e-6)
    for one, two in zip(jax.tree.leaves(slopes), jax.tree.leaves(found_slopes), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4 * float(jnp.abs(one).max()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_loss_in_chunks_is_the_plain_one(precision):
    batch = batch_of(dropped=0.3, measured=MEASURED)
    config = TrainConfig(model=tiny(dropout=0.0), precision=precision)
    params = init_params(config.model, jax.random.key(0))
    mask = jax.random.uniform(jax.random.key(1), (*batch.cell_mask.shape, GENES)) < 0.25
    mask &= batch.cell_mask[..., None]
    rngs = {"dropout": jax.random.key(2), "latent": jax.random.key(3)}

    @partial(jax.jit, static_argnums=1)
    def run(params, config):
        return jax.value_and_grad(
            lambda params: loss_terms(params, batch, config, gene_mask=mask, rngs=rngs),
            has_aux=True,
        )(params)

    (_, plain), slopes = run(params, config)
    (_, chunked), found = run(params, dataclasses.replace(config, chunk_cells=4))
    tolerance = 1e-5 if precision == "float32" else 2e-3
    for name, value in plain.items():
        np.testing.assert_allclose(chunked[name], value, rtol=tolerance, err_msg=name)
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for one, two in zip(jax.tree.leaves(slopes), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(two, one, atol=tolerance * max(float(jnp.abs(one).max()), 1e-3))


@pytest.mark.parametrize("chunk", [0, 3])
@EVERY
def test_cells_without_a_masked_entry_are_not_decoded(kind, chunk):
    batch = BATCHES[kind]()
    masking = MaskingConfig(cell_fraction=0.6, gene_fraction=0.4, drop_cells=0.0)
    config = TrainConfig(model=tiny(dropout=0.0), masking=masking, chunk_cells=chunk)
    mask = sample_gene_mask(jax.random.key(1), batch, GENES, masking)
    params = random_params(init_params(config.model, jax.random.key(0)))
    rngs = {"latent": jax.random.key(2), "dropout": jax.random.key(3)}
    widths = []

    def loss(params, masked):
        return loss_terms(params, batch, config, gene_mask=mask, rngs=rngs, masked=masked)

    def count(module, z, *rest, **options):
        widths.append(z.shape[1])
        return plain(module, z, *rest, **options)

    plain = Decoder._hidden
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_hidden", count)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        (_, every), of_every = gradient(params, None)
        (_, some), of_some = gradient(params, masked_width(batch, masking))
    assert widths[-1] <= max(batch.pieces, 0.6 * widths[0] + 1)
    assert float(every["reconstruction"]) > 0 or kind == "empty"
    for name, value in every.items():
        np.testing.assert_allclose(some[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for one, two in zip(jax.tree.leaves(of_some), jax.tree.leaves(of_every), strict=True):
        largest = max(float(jnp.abs(two).max()), 1.0)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * largest)


def test_a_chunked_step_needs_no_array_of_cells_by_genes_but_the_mask():
    genes = 3000
    config = TrainConfig(model=tiny(genes=genes), chunk_cells=8)
    params = init_params(config.model, jax.random.key(0))
    rngs = {"dropout": jax.random.key(2), "latent": jax.random.key(3)}

    def memory(cells, chunk):
        batch = make_batch([random_counts(cells, genes=genes, rate=0.05)])
        mask = jnp.zeros((1, cells, genes), bool)

        def run(params, batch, mask):
            terms = dataclasses.replace(config, chunk_cells=chunk)
            return loss_terms(params, batch, terms, gene_mask=mask, rngs=rngs)[0]

        compiled = jax.jit(jax.grad(run)).lower(params, batch, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, chunked = (memory(192, chunk) - memory(64, chunk) for chunk in (0, 8))
    assert plain / 128 > 3 * genes * 4
    assert chunked < 0.6 * plain
