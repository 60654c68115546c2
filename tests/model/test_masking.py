"""Masking and dropping of cells: exact numbers, distributions, alignment of what travels with a cell."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import MaskingConfig
from cellplm_jax.model.masking import drop_cells, masking_rates, sample_gene_mask
from tests.model.common import GENES, make_batch, random_counts

LENGTHS = [20, 13, 1, 7]
MANY = (40, 500)
dense_counts = jax.jit(lambda batch: batch.dense_counts(GENES))


def cell_mask(lengths=LENGTHS, cells=20):
    return jnp.asarray(np.arange(cells)[None] < np.array(lengths)[:, None])


def gene_mask(key, mask, genes, config):
    """The mask of a batch of which nothing but its cells matters."""
    nothing = jnp.zeros((mask.shape[0], 1), jnp.int32)
    ends = jnp.zeros((mask.shape[0], mask.shape[1] + 1), jnp.int32)
    return sample_gene_mask(key, CellBatch(ends, nothing, nothing, mask), genes, config)


def numbered_batch(lengths=LENGTHS, cells=20):
    """Make a batch in which cell i of sample s has the number 100 s + i in every field, and in its counts."""
    dense, fields = [], {}
    for sample, length in enumerate(lengths):
        counts = random_counts(length, seed=sample)
        counts[:, 0] = 100 * sample + np.arange(length) + 1
        dense.append(counts)
    number = [matrix[:, 0] for matrix in dense]
    fields["coordinates"] = [np.stack([n, -n], -1).astype(np.float32) for n in number]
    fields["has_coordinates"] = [n % 3 == 0 for n in number]
    fields["eigenvectors"] = [n[:, None] * np.ones((1, 4), np.float32) for n in number]
    for scale, name in enumerate(("batch", "dataset", "platform"), start=1):
        fields[name] = [(scale * n).astype(np.int32) for n in number]
    return make_batch(dense, cells=cells, extra_nonzeros=9, fields=fields), dense


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 0.75, 1.0])
def test_exactly_the_floor_of_the_fraction_of_the_cells_is_masked(fraction):
    # A rate of 1 hides every gene of a chosen cell, so chosen cells can be counted.
    config = MaskingConfig(cell_fraction=fraction, gene_fraction=1.0, beta=False)
    mask = np.asarray(gene_mask(jax.random.key(0), cell_mask(), GENES, config))
    assert mask.shape == (4, 20, GENES)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask.all(-1), mask.any(-1))
    expected = [int(np.floor(round(fraction * length, 6))) for length in LENGTHS]
    np.testing.assert_array_equal(mask.any(-1).sum(1), expected)


@pytest.mark.parametrize("beta", [True, False])
def test_padding_is_never_masked(beta):
    config = MaskingConfig(cell_fraction=1.0, gene_fraction=0.5, beta=beta)
    valid = jnp.asarray(np.random.default_rng(0).random((4, 20)) < 0.5)
    mask = np.asarray(gene_mask(jax.random.key(3), valid, GENES, config))
    assert not mask[~np.asarray(valid)].any()
    assert mask[np.asarray(valid)].any(-1).mean() > 0.9


def test_the_mask_is_a_function_of_the_key():
    config = MaskingConfig()
    first, again, other = (
        np.asarray(gene_mask(jax.random.key(seed), cell_mask(), GENES, config))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.1


def test_every_cell_is_equally_likely_to_be_masked():
    config = MaskingConfig(cell_fraction=0.25, gene_fraction=1.0, beta=False)
    valid = jnp.ones((4000, 8), bool)
    chosen = np.asarray(gene_mask(jax.random.key(0), valid, 1, config))[..., 0]
    assert (chosen.sum(1) == 2).all()
    assert stats.chisquare(chosen.sum(0)).pvalue > 1e-4
    # Pairs of neighbours are masked together as often as any other pair: 1/28 of the samples.
    together = (chosen[:, :-1] & chosen[:, 1:]).sum(0)
    np.testing.assert_allclose(together / 4000, 1 / 28, atol=0.013)


@pytest.mark.parametrize(("rate", "a", "b"), [(0.25, 5, 13), (0.75, 5, 7 / 3), (0.25, 2, 16)])
def test_rates_follow_the_beta_distribution(rate, a, b):
    config = MaskingConfig(gene_fraction=rate, beta_concentration=a, maximum_rate=1.0)
    drawn = np.asarray(masking_rates(jax.random.key(0), MANY, config)).ravel().astype(np.float64)
    expected = stats.beta(a, b)
    standard_error = expected.std() / np.sqrt(drawn.size)
    assert drawn.mean() == pytest.approx(expected.mean(), abs=4 * standard_error)
    assert drawn.var() == pytest.approx(expected.var(), rel=0.05)
    assert stats.kstest(drawn, expected.cdf).pvalue > 1e-3


def test_rates_of_the_released_configuration():
    # Beta(5, 13): mean 5/18 = .278, variance 5 * 13 / (18^2 * 19).
    drawn = np.asarray(masking_rates(jax.random.key(1), MANY, MaskingConfig()))
    assert drawn.mean() == pytest.approx(5 / 18, abs=0.003)
    assert drawn.var() == pytest.approx(65 / (324 * 19), rel=0.05)


def test_rates_are_capped_and_can_be_constant():
    config = MaskingConfig(gene_fraction=0.75)
    drawn = np.asarray(masking_rates(jax.random.key(0), MANY, config))
    assert drawn.max() == np.float32(0.9)
    above = stats.beta(5, 7 / 3).sf(0.9)
    assert (drawn == np.float32(0.9)).mean() == pytest.approx(above, abs=0.01)
    constant = MaskingConfig(gene_fraction=0.75, beta=False)
    np.testing.assert_array_equal(
        masking_rates(jax.random.key(0), (2, 3), constant), np.full((2, 3), np.float32(0.75))
    )
    nothing = MaskingConfig(gene_fraction=0.0)
    np.testing.assert_array_equal(masking_rates(jax.random.key(0), (2, 3), nothing), 0.0)


@pytest.mark.parametrize(("cell_fraction", "gene_fraction"), [(0.75, 0.25), (0.25, 0.75)])
def test_both_readings_of_bi_level_masking(cell_fraction, gene_fraction):
    config = MaskingConfig(cell_fraction=cell_fraction, gene_fraction=gene_fraction, beta=False)
    mask = np.asarray(gene_mask(jax.random.key(0), jnp.ones((4, 100), bool), 500, config))
    masked = mask.any(-1)
    np.testing.assert_array_equal(masked.sum(1), 100 * cell_fraction)
    assert mask[masked].mean() == pytest.approx(gene_fraction, abs=0.005)
    # Every gene alike, and independently from cell to cell.
    assert mask[masked].mean(0).std() == pytest.approx(
        np.sqrt(gene_fraction * (1 - gene_fraction) / masked.sum()), rel=0.25
    )


def test_each_cell_has_a_rate_of_its_own():
    config = MaskingConfig(cell_fraction=1.0)
    mask = np.asarray(gene_mask(jax.random.key(0), jnp.ones(MANY, bool), 100, config))
    per_cell = mask.mean(-1).ravel()
    rate = stats.beta(5, 13)
    # Variance of the rate plus the binomial variance of 100 draws.
    expected = rate.var() + (rate.mean() - rate.mean() ** 2 - rate.var()) / 100
    assert per_cell.mean() == pytest.approx(rate.mean(), abs=0.004)
    assert per_cell.var() == pytest.approx(expected, rel=0.05)


def test_masking_everything_and_nothing():
    valid = cell_mask()
    everything = MaskingConfig(cell_fraction=1.0, gene_fraction=1.0, beta=False)
    mask = np.asarray(gene_mask(jax.random.key(0), valid, GENES, everything))
    np.testing.assert_array_equal(mask, np.broadcast_to(np.asarray(valid)[..., None], mask.shape))
    for nothing in (
        MaskingConfig(cell_fraction=0.0),
        MaskingConfig(gene_fraction=0.0),
        MaskingConfig(gene_fraction=0.0, beta=False),
    ):
        assert not np.asarray(gene_mask(jax.random.key(0), valid, GENES, nothing)).any()


@pytest.mark.parametrize(
    ("fraction", "maximum", "kept"),
    [
        (0.3, 4000, [14, 9, 1, 4]),
        (0.5, 0, [10, 6, 1, 3]),
        (0.3, 6, [6, 6, 1, 4]),
        (0.0, 6, [6, 6, 1, 6]),
    ],
)
def test_dropping_keeps_exactly_the_promised_number_aligned(fraction, maximum, kept):
    batch, dense = numbered_batch()
    config = MaskingConfig(drop_cells=fraction, maximum_cells=maximum)
    got = drop_cells(jax.random.key(0), batch, config)
    mask = np.asarray(got.cell_mask)
    assert mask.shape == (4, max(kept))
    np.testing.assert_array_equal(mask.sum(1), kept)
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    counts = np.asarray(dense_counts(got))
    assert not counts[~mask].any()
    for sample, matrix in enumerate(dense):
        valid = mask[sample]
        number = counts[sample, valid, 0].astype(int)
        assert len(np.unique(number)) == kept[sample]
        np.testing.assert_array_equal(counts[sample, valid], matrix[number - 100 * sample - 1])
        for name, expected in (
            ("coordinates", np.stack([number, -number], -1)),
            ("has_coordinates", number % 3 == 0),
            ("eigenvectors", np.repeat(number[:, None], 4, 1)),
            ("batch", number),
            ("dataset", 2 * number),
            ("platform", 3 * number),
        ):
            np.testing.assert_array_equal(np.asarray(getattr(got, name))[sample, valid], expected)


def test_who_has_to_go_for_lack_of_room_is_drawn_from_the_whole_row():
    ends, nothing = jnp.zeros((1, 41), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    segment = jnp.asarray(np.arange(40)[None] // 20, jnp.int32)
    measured = jnp.ones((1, 2, GENES), bool)
    batch = CellBatch(ends, nothing, nothing, jnp.ones((1, 40), bool), segment, measured=measured)
    config = MaskingConfig(drop_cells=0.1, maximum_cells=10)
    many = jax.jit(jax.vmap(lambda key: drop_cells(key, batch, config).slot[0]))
    kept = np.asarray(many(jax.random.split(jax.random.key(0), 2000))) < 10
    assert (kept.sum(1) == 10).all()
    np.testing.assert_allclose(kept.mean(0), 0.25, atol=0.05)


def test_dropping_keeps_optional_fields_absent_and_measured_genes():
    measured = np.random.default_rng(0).random((2, GENES)) < 0.5
    batch = make_batch([random_counts(8), random_counts(5, seed=1)], measured=measured)
    got = drop_cells(jax.random.key(0), batch, MaskingConfig(drop_cells=0.5))
    assert got.coordinates is None
    assert got.batch is None
    np.testing.assert_array_equal(got.measured, measured)


def test_dropping_nothing_changes_nothing():
    batch, _ = numbered_batch()
    got = drop_cells(jax.random.key(0), batch, MaskingConfig(drop_cells=0.0))
    assert got is batch


def test_dropping_is_a_function_of_the_key_and_fair():
    batch, _ = numbered_batch([10], cells=10)
    config = MaskingConfig(drop_cells=0.3)
    many = jax.jit(jax.vmap(lambda key: drop_cells(key, batch, config).slot[0]))
    slot = np.asarray(many(jax.random.split(jax.random.key(0), 3000)))
    assert ((slot < 7).sum(1) == 7).all()
    assert (slot <= 7).all()
    # Every cell is kept in .7 of the draws, and so are pairs of neighbours alike; the order stays.
    assert stats.chisquare((slot < 7).sum(0)).pvalue > 1e-4
    kept = slot < 7
    np.testing.assert_allclose((kept[:, :-1] & kept[:, 1:]).mean(0), 7 * 6 / 90, atol=0.04)
    for row in slot[:100]:
        np.testing.assert_array_equal(row[row < 7], np.arange(7))
    np.testing.assert_array_equal(
        drop_cells(jax.random.key(1), batch, config).slot,
        drop_cells(jax.random.key(1), batch, config).slot,
    )
    assert (
        np.asarray(drop_cells(jax.random.key(1), batch, config).slot)
        != np.asarray(drop_cells(jax.random.key(2), batch, config).slot)
    ).any()


def test_an_empty_sample_stays_empty():
    batch, _ = numbered_batch([6])
    empty = batch.replace(
        indptr=jnp.zeros_like(batch.indptr), cell_mask=jnp.zeros_like(batch.cell_mask)
    )
    got = drop_cells(jax.random.key(0), empty, MaskingConfig())
    assert not np.asarray(got.cell_mask).any()
    assert not np.asarray(dense_counts(got)).any()


def test_dropping_twice_keeps_counts_with_their_cells():
    # Fails: drop_cells overwrites an earlier `slot` as if cell i still sat at i.
    batch, _ = numbered_batch([20, 13])
    config = MaskingConfig(drop_cells=0.3)
    once = jax.jit(partial(drop_cells, config=config))
    got = once(jax.random.key(1), once(jax.random.key(0), batch))
    mask = np.asarray(got.cell_mask)
    np.testing.assert_array_equal(mask.sum(1), [9, 6])  # 20 -> 14 -> 9, 13 -> 9 -> 6
    number = np.asarray(dense_counts(got))[..., 0]
    np.testing.assert_array_equal(number[mask], np.asarray(got.batch)[mask])


def without_counts(cells):
    return CellBatch(
        indptr=jnp.zeros((1, cells + 1), jnp.int32),
        gene=jnp.zeros((1, 1), jnp.int32),
        count=jnp.zeros((1, 1)),
        cell_mask=jnp.ones((1, cells), bool),
    )


@pytest.mark.parametrize("fraction", [0.3, 0.35])
def test_dropping_is_exact_in_long_sentences(fraction):
    # Fails for .35 outside jit: the product in float32 falls just short of a whole number, and the
    # correction of 1e-4 is less than half a unit in its last place there.
    got = drop_cells(
        jax.random.key(0), without_counts(5140), MaskingConfig(drop_cells=fraction, maximum_cells=0)
    )
    assert int(got.cell_mask.sum()) == round(5140 * (1 - fraction))


def test_masking_is_exact_in_long_sentences():
    # Fails, as above: 3,340 of 5,140 cells at .65.
    config = MaskingConfig(cell_fraction=0.65, gene_fraction=1.0, beta=False)
    mask = gene_mask(jax.random.key(0), jnp.ones((1, 5140), bool), 1, config)
    assert int(mask.sum()) == 3341


def test_padding_of_the_sentence_does_not_change_how_many_cells_are_kept():
    for cells in (20, 31):
        batch, _ = numbered_batch(cells=cells)
        got = drop_cells(jax.random.key(0), batch, MaskingConfig(maximum_cells=0))
        np.testing.assert_array_equal(got.cell_mask.sum(1), [14, 9, 1, 4])


def test_the_compiled_mask_sharded_over_samples_is_the_same():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if jax.device_count() >= 4:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    run = jax.jit(partial(gene_mask, genes=GENES, config=MaskingConfig()))
    np.testing.assert_array_equal(
        run(jax.random.key(0), jax.device_put(cell_mask(), sharding)),
        gene_mask(jax.random.key(0), cell_mask(), GENES, MaskingConfig()),
    )


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("chunk", [3, 64])
def test_the_mask_drawn_in_chunks_is_the_same(chunk, pieces):
    nothing = jnp.zeros((4, 1), jnp.int32)
    ends = jnp.zeros((4, 21), jnp.int32)
    if pieces == 2:
        nothing, ends = jnp.zeros((4, 2, 1), jnp.int32), jnp.zeros((4, 2, 11), jnp.int32)
    batch = CellBatch(ends, nothing, nothing, cell_mask())
    drawn = partial(sample_gene_mask, jax.random.key(1), batch, 50, MaskingConfig())
    np.testing.assert_array_equal(drawn(chunk=chunk), drawn())


def test_compiled_dropping_is_the_same():
    batch, _ = numbered_batch()
    compiled = jax.jit(partial(drop_cells, config=MaskingConfig()))(jax.random.key(0), batch)
    plain = drop_cells(jax.random.key(0), batch, MaskingConfig())
    jax.tree.map(np.testing.assert_array_equal, compiled, plain)
