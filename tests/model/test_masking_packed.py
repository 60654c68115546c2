"""Masking in packed rows and rows of several pieces, gene panels, and what follows the cells that are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import MaskingConfig
from cellplm_jax.model.masking import (
    drop_cells,
    floor_of_fraction,
    follow_cells,
    keep_cells,
    masked_width,
    masking_rates,
    sample_gene_mask,
    sample_visible,
)

SEGMENT = np.array([[0, 0, 0, 0, 0, 1, 1, 2, 9, 9], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
MASK = SEGMENT < 9
GENES = 6


def batch_of(segment=SEGMENT, pieces=1, genes=GENES, **fields):
    """Cells with one stored count each: gene i of cell i, modulo the genes."""
    rows, cells = segment.shape
    mask = segment < 9
    indptr = np.concatenate([np.zeros((rows, 1), int), np.cumsum(mask, axis=1)], axis=1)
    gene = np.tile(np.arange(cells) % genes, (rows, 1))
    count = np.tile(np.arange(cells) + 1, (rows, 1))
    if pieces > 1:
        folded = mask.reshape(rows, pieces, -1)
        lengths = np.cumsum(folded, axis=-1)
        indptr = np.concatenate([np.zeros((rows, pieces, 1), int), lengths], axis=-1)
        gene, count = (x.reshape(rows, pieces, -1) for x in (gene, count))
    arrays = {"indptr": indptr, "gene": gene, "count": count}
    return CellBatch(
        **{name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()},
        cell_mask=jnp.asarray(mask),
        segment=jnp.asarray(np.where(mask, segment, 0), jnp.int32),
        measured=jnp.ones((rows, 3, genes), bool),
        **fields,
    )


def in_samples(values, segment=SEGMENT, pieces=1):
    """Count the cells of each sample in each piece for which ``values`` is True."""
    split = np.asarray(values).reshape(len(segment), pieces, -1)
    names = segment.reshape(len(segment), pieces, -1)
    return [[[int(v[n == s].sum()) for s in range(3)] for v, n in zip(*row, strict=True)]
            for row in zip(split, names, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (1, [[[3, 1, 0]], [[0, 5, 0]]]),
        (2, [[[3, 0, 0], [0, 1, 0]], [[0, 2, 0], [0, 3, 0]]]),
    ],
)
def test_the_fraction_of_masked_cells_holds_in_every_sample_and_piece(pieces, expected):
    config = MaskingConfig(cell_fraction=0.6, gene_fraction=1.0, beta=False)
    for seed in range(5):
        mask = sample_gene_mask(jax.random.key(seed), batch_of(pieces=pieces), GENES, config)
        chosen = np.asarray(mask.any(-1))
        assert in_samples(chosen, pieces=pieces) == expected
        assert not chosen[~MASK].any()


def test_every_cell_of_a_sample_is_masked_as_often():
    config = MaskingConfig(cell_fraction=0.6, gene_fraction=1.0, beta=False)
    batch = batch_of()
    draw = jax.jit(jax.vmap(lambda key: sample_gene_mask(key, batch, 1, config)[..., 0]))
    often = np.asarray(draw(jax.random.split(jax.random.key(0), 800))).mean(0)
    np.testing.assert_allclose(often[0], [0.6] * 5 + [0.5] * 2 + [0] * 3, atol=0.07)
    np.testing.assert_allclose(often[1], [0] + [5 / 9] * 9, atol=0.07)


def test_the_two_halves_of_a_random_word_decide_alike_and_apart():
    """Entries g and g + half a vocabulary come from one word; odd numbers of genes leave one half over."""
    config = MaskingConfig(cell_fraction=1.0, gene_fraction=0.3, beta=False)
    cells = batch_of(np.zeros((1, 3000), np.int32), genes=5)
    mask = np.asarray(sample_gene_mask(jax.random.key(0), cells, 5, config))[0]
    np.testing.assert_allclose(mask.mean(0), 0.3, atol=0.035)
    correlation = np.corrcoef(mask.T) - np.eye(5)
    assert np.abs(correlation).max() < 0.08
    assert mask.shape == (3000, 5)


def test_rates_below_the_resolution_and_a_rate_of_one():
    for rate, expected in ((1e-6, 0.0), (1.0, 1.0)):
        config = MaskingConfig(cell_fraction=1.0, gene_fraction=rate, beta=False)
        mask = sample_gene_mask(jax.random.key(0), batch_of(), 50, config)
        assert float(mask[MASK].mean()) == expected


def test_rates_between_two_quantiles_are_interpolated(monkeypatch):
    place = jnp.asarray([0.0, 0.25, 0.5, 0.999999])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: place)
    monkeypatch.setattr(
        "cellplm_jax.model.masking._beta_quantiles",
        lambda a, b: np.array([0.0, a, a + b], np.float32) / 100,
    )
    config = MaskingConfig(gene_fraction=0.25, beta_concentration=4.0, maximum_rate=0.17)
    got = masking_rates(jax.random.key(0), (4,), config)
    np.testing.assert_allclose(got, [0.0, 0.02, 0.04, 0.17], rtol=1e-4)
    assert got.dtype == jnp.float32


def test_the_number_of_masked_cells_of_a_piece_has_a_bound():
    widths = {
        (fraction, pieces): masked_width(batch_of(pieces=pieces), MaskingConfig(cell_fraction=fraction))
        for fraction in (0.0, 0.3, 0.75, 1.0)
        for pieces in (1, 2)
    }  # fmt: skip
    assert list(widths.values()) == [1, 1, 3, 1, 7, 3, 10, 5]
    wide = batch_of(np.zeros((1, 5140), np.int32))
    assert masked_width(wide, MaskingConfig(cell_fraction=0.65)) == 3341
    assert floor_of_fraction(jnp.asarray([5140, 10, 0]), 0.65).tolist() == [3341, 6, 0]


@pytest.mark.parametrize(
    ("pieces", "maximum", "expected"),
    [
        (1, 0, [[[3, 1, 0]], [[0, 6, 0]]]),
        (2, 0, [[[3, 0, 0], [0, 1, 0]], [[0, 2, 0], [0, 3, 0]]]),
        (1, 4, [[[3, 1, 0]], [[0, 4, 0]]]),
        (2, 5, [[[3, 0, 0], [0, 1, 0]], [[0, 2, 0], [0, 3, 0]]]),
    ],
)
def test_the_fraction_of_dropped_cells_holds_in_every_sample_and_piece(pieces, maximum, expected):
    config = MaskingConfig(drop_cells=0.3, maximum_cells=maximum)
    batch = batch_of(pieces=pieces)
    for seed in range(4):
        got = drop_cells(jax.random.key(seed), batch, config)
        width = got.cell_mask.shape[1] // pieces
        assert width == min(10 // pieces * 7 // 10, -(-maximum // pieces) or 10)
        kept = np.asarray(got.slot).reshape(2, -1) < width
        assert in_samples(kept, pieces=pieces) == expected
        assert np.asarray(got.cell_mask).sum() == kept.sum()
        counts, before = np.asarray(got.dense_counts(GENES)), np.asarray(batch.dense_counts(GENES))
        for row in range(2):
            np.testing.assert_array_equal(
                counts[row][np.asarray(got.cell_mask[row])], before[row][kept[row]]
            )
            np.testing.assert_array_equal(
                np.asarray(got.segment[row])[np.asarray(got.cell_mask[row])],
                np.asarray(batch.segment[row])[kept[row]],
            )


def test_dropping_twice_in_pieces_keeps_counts_with_their_cells():
    number = jnp.asarray(np.tile(np.arange(10) + 1, (2, 1)), jnp.int32)
    batch = batch_of(np.zeros((2, 10), np.int32), pieces=2, batch=number)
    # Every cell has one count; it is 1 to 5 in the first piece, and 6 to 10 in the second.
    config = MaskingConfig(drop_cells=0.3)
    got = drop_cells(jax.random.key(1), drop_cells(jax.random.key(0), batch, config), config)
    mask = np.asarray(got.cell_mask)
    assert mask.sum() == 2 * 2 * 2  # of 5 cells of a piece 3 and then 2 are kept
    counts = np.asarray(got.dense_counts(GENES)).sum(-1)
    np.testing.assert_array_equal(counts[mask], np.asarray(got.batch)[mask])


def test_a_limit_alone_shortens_the_row():
    batch = batch_of()
    got = drop_cells(jax.random.key(0), batch, MaskingConfig(drop_cells=0.0, maximum_cells=4))
    assert got.cell_mask.shape == (2, 4)
    assert got.cell_mask.all()
    assert (
        drop_cells(jax.random.key(0), batch, MaskingConfig(drop_cells=0, maximum_cells=10)) is batch
    )


def test_keep_cells_moves_arrays_of_the_caller_in_the_same_way():
    for pieces in (1, 2):
        batch = batch_of(pieces=pieces)
        keep = np.zeros((2, 10), bool)
        keep[0, [1, 3, 6]] = keep[1, [0, 9]] = True
        kept, gather = keep_cells(batch, jnp.asarray(keep), 2)
        number = np.asarray(gather(jnp.arange(20).reshape(2, 10)))
        mask = np.asarray(kept.cell_mask)
        expected = [[1, 3], [10, 19]] if pieces == 1 else [[1, 3, 6], [10, 19]]
        assert [list(row[m]) for row, m in zip(number, mask, strict=True)] == expected
        assert mask.shape == (2, 2 * pieces)
        assert kept.segment.shape == (2, 2 * pieces)
        assert gather(None) is None


def test_values_follow_their_cells_and_padding_is_filled():
    batch = batch_of().replace(segment=None, measured=None)
    values = jnp.arange(20.0).reshape(2, 10) + 0.5
    assert follow_cells(values, batch) is values
    keep = np.zeros((2, 10), bool)
    keep[0, [2, 5]] = keep[1, 7] = True
    kept, _ = keep_cells(batch, jnp.asarray(keep), 3)
    np.testing.assert_array_equal(
        follow_cells(values, kept, fill=-1), [[2.5, 5.5, -1], [17.5, -1, -1]]
    )
    np.testing.assert_array_equal(follow_cells(values, kept), [[2.5, 5.5, 0], [17.5, 0, 0]])
    vectors = follow_cells(values[..., None] * jnp.asarray([1.0, -1.0]), kept, fill=7)
    np.testing.assert_array_equal(vectors[1], [[17.5, -17.5], [7, 7], [7, 7]])


def test_hidden_entries_are_not_visible():
    batch = batch_of()
    mask = np.zeros((2, 10, GENES), bool)
    mask[0, 1, 1] = mask[1, 8, 2] = mask[0, 2, 3] = True  # cell 2 has a count of gene 2 alone
    config = MaskingConfig()
    seen = np.asarray(sample_visible(jax.random.key(0), batch, jnp.asarray(mask), config, GENES))
    hidden = np.argwhere(~seen)
    np.testing.assert_array_equal(hidden, [[0, 1], [1, 8]])
    assert seen.dtype == bool
    assert np.asarray(sample_visible(jax.random.key(0), batch, None, config, GENES)).all()


def panels(fraction, minimum=0.02, genes=400, draws=200, mask=None):
    """Draw which of all genes two samples of a row see: bool [draws, samples, genes]."""
    segment = np.array([[0, 1, 2, 2]], np.int32)
    batch = batch_of(segment, genes=genes).replace(
        indptr=jnp.arange(5, dtype=jnp.int32)[None] * genes,
        gene=jnp.tile(jnp.arange(genes, dtype=jnp.int32), 4)[None],
        count=jnp.ones((1, 4 * genes), jnp.int32),
    )
    config = MaskingConfig(panel_fraction=fraction, panel_minimum=minimum)
    draw = jax.jit(jax.vmap(lambda key: sample_visible(key, batch, mask, config, genes)))
    seen = np.asarray(draw(jax.random.split(jax.random.key(0), draws))).reshape(draws, 4, genes)
    # Cells of one sample have one panel.
    np.testing.assert_array_equal(seen[:, 2], seen[:, 3])
    return seen[:, :3]


def test_panels_have_a_log_uniform_share_of_the_genes():
    seen = panels(1.0)
    share = seen.mean(-1).ravel()
    assert share.min() < 0.04
    assert share.min() > 0.0
    assert share.max() > 0.9
    assert np.median(share) == pytest.approx(np.sqrt(0.02), rel=0.25)
    assert np.log(share).mean() == pytest.approx(np.log(0.02) / 2, rel=0.08)
    # Samples and draws have panels and shares of their own; no gene is preferred.
    first, second = seen[:, 0], seen[:, 1]
    assert np.corrcoef(first.mean(-1), second.mean(-1))[0, 1] < 0.3
    assert seen.mean((0, 1)).std() < 3 * np.sqrt(share.mean() / 600)


def test_the_other_samples_keep_all_genes():
    whole = panels(0.3).all(-1)
    assert whole.mean() == pytest.approx(0.7, abs=0.07)
    assert (whole[:, 0] != whole[:, 1]).mean() > 0.3
    largest = panels(1.0, minimum=0.999, draws=20)
    assert largest.mean() > 0.99


def test_a_panel_and_a_mask_hide_both():
    mask = np.zeros((1, 4, 400), bool)
    mask[0, :, :100] = True
    seen = panels(1.0, minimum=0.5, mask=jnp.asarray(mask))
    assert not seen[..., :100].any()
    assert 0.5 < seen[..., 100:].mean() < 0.9
