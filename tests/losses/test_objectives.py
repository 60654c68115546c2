"""Training objectives against loops in float64 numpy; masks of genes and cells; latent terms."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import log_loss
from sklearn.metrics.pairwise import cosine_similarity

from cellplm_jax.batch import LatentOutput, Reconstruction
from cellplm_jax.config import LatentConfig, ObjectiveConfig
from cellplm_jax.errors import ConfigError
from cellplm_jax.losses.objectives import (
    average_over,
    batch_mixing_loss,
    classification_loss,
    count_nll,
    count_nll_reference,
    elastic_cell_similarity,
    latent_loss,
    reconstruction_loss,
    regression_loss,
    restoration_loss,
    scale_to_total,
    warmup_factor,
)
from tests.model.common import GENES, make_batch, random_counts

DENSE = [random_counts(6, seed=1), random_counts(3, seed=2)]
DENSE[0][4] = 0  # a cell without counts
CELLS = 7
MEASURED = np.random.default_rng(5).random((2, GENES)) < 0.7
GENE_MASK = np.random.default_rng(6).random((2, CELLS, GENES)) < 0.3
GENE_MASK[:, 1] = False  # cells that are not masked
GENE_MASK[1, 3:] = GENE_MASK[0, 6:] = False  # padding
TARGETS = np.random.default_rng(7).random((2, GENES)) < 0.5

loss = jax.jit(reconstruction_loss, static_argnums=2)
nll_of = jax.jit(count_nll)


@partial(jax.jit, static_argnums=2)
def loss_and_gradient(output, batch, config, gene_mask, target_genes):
    def value(output):
        terms = reconstruction_loss(
            output, batch, config, gene_mask=gene_mask, target_genes=target_genes
        )
        return terms["reconstruction"]

    return jax.value_and_grad(value)(output)


def truth(measured=None, dense=None, cells=CELLS, seed=99):
    dense = DENSE if dense is None else dense
    stored = max(np.count_nonzero(matrix) for matrix in dense)
    return make_batch(dense, cells=cells, extra_nonzeros=250 - stored, measured=measured, seed=seed)


def decoded(*, inflated=True, dispersion=True):
    """A decoder's output; nothing marks the padding."""
    generator = np.random.default_rng(3)
    mean = np.exp(generator.standard_normal((2, CELLS, GENES)))
    logits = generator.standard_normal((2, CELLS, GENES))
    theta = np.exp(generator.standard_normal(GENES))
    return Reconstruction(
        mean=jnp.asarray(mean, jnp.float32),
        dispersion=jnp.asarray(theta, jnp.float32) if dispersion else None,
        zero_logits=jnp.asarray(logits, jnp.float32) if inflated else None,
    )


def cell_nll(output, sample, cell, entries):
    """NLL in nats of one cell's counts over some genes, the mean rescaled to their total; float64."""
    counts = DENSE[sample][cell][entries].astype(np.float64)
    mean = np.asarray(output.mean, np.float64)[sample, cell][entries]
    if not entries.any():
        return 0.0
    mean = mean / mean.sum() * counts.sum()
    theta = np.asarray(output.dispersion, np.float64)[entries]
    nll = -stats.nbinom(theta, theta / (theta + mean)).logpmf(counts)
    if output.zero_logits is not None:
        pi = 1 / (1 + np.exp(-np.asarray(output.zero_logits, np.float64)[sample, cell][entries]))
        nll = -np.log(pi * (counts == 0) + (1 - pi) * np.exp(-nll))
    return nll.sum()


def numpy_objective(output, kind, *, measured=None, gene_mask=None, target_genes=None, part=True):
    """Return (full, masked) by loops over cells, from the docstring."""
    full, masked, errors = [], [], []
    for sample, matrix in enumerate(DENSE):
        known = np.ones(GENES, bool) if measured is None else measured[sample]
        for cell in range(len(matrix)):
            hidden = None if gene_mask is None else gene_mask[sample, cell]
            if kind == "mean_squared_error":
                library = matrix[cell][known].sum()
                target = np.log1p(matrix[cell] / max(library, 1) * 1e4)
                entries = known if hidden is None else known & hidden
                difference = np.asarray(output.mean, np.float64)[sample, cell] - target
                errors.extend(difference[entries] ** 2)
            elif kind in ("imputation", "denoising"):
                entries = known if target_genes is None else known & target_genes[sample]
                full.append(cell_nll(output, sample, cell, entries))
            elif hidden is None or hidden.any():
                full.append(cell_nll(output, sample, cell, known))
                if hidden is not None and part:
                    masked.append(cell_nll(output, sample, cell, known & hidden))
    if kind == "mean_squared_error":
        return np.mean(errors), 0.0
    return np.mean(full), np.mean(masked) if masked else 0.0


ENTRIES = {
    "all": np.ones((2, 1, GENES), bool),
    "measured": MEASURED[:, None],
    "masked": MEASURED[:, None] & GENE_MASK,
}


def total(function, entries, valid, output, *arguments):
    per_cell = function(output, *arguments, entries)
    weight = jnp.where(valid, jnp.cos(jnp.arange(valid.size).reshape(valid.shape)) + 1.5, 0.0)
    return jnp.sum(per_cell * weight), per_cell


@pytest.mark.parametrize("inflated", [False, True])
def test_count_nll_equals_scipy_and_the_plain_form_in_value_and_gradient(inflated):
    batch = truth()
    counts = batch.dense_counts(GENES)
    valid = batch.cell_mask
    output = decoded(inflated=inflated)

    @jax.jit
    def both(output, entries):
        results = []
        for function, arguments in ((count_nll, (batch, counts)), (count_nll_reference, (batch,))):
            value = partial(total, function, entries, valid)
            results.append(jax.grad(value, has_aux=True)(output, *arguments))
        return results

    for name, entries in ENTRIES.items():
        entries = np.broadcast_to(entries, (2, CELLS, GENES))
        (gradient, fast), (expected_gradient, plain) = both(output, entries)
        plain = np.asarray(plain)
        assert np.abs(plain[np.asarray(valid)]).max() > 10
        np.testing.assert_allclose(fast, plain, rtol=2e-5, atol=1e-4, err_msg=name)
        for sample, matrix in enumerate(DENSE):
            scipy = [cell_nll(output, sample, c, entries[sample, c]) for c in range(len(matrix))]
            got = np.asarray(fast)[sample, : len(matrix)]
            np.testing.assert_allclose(got, scipy, rtol=1e-4, atol=1e-3, err_msg=name)
        for field in ("mean", "dispersion") + ("zero_logits",) * inflated:
            got, expected = (np.asarray(getattr(g, field)) for g in (gradient, expected_gradient))
            assert np.abs(expected).max() > 1e-2
            assert np.isfinite(got).all()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6 * scale, err_msg=field)


def test_count_nll_without_counts_is_zero():
    zeroed = truth().replace(count=jnp.zeros_like(truth().count))
    output = decoded(inflated=False)
    got = nll_of(output, zeroed, jnp.zeros((2, CELLS, GENES)), np.ones((2, CELLS, GENES), bool))
    # Not exactly: lgamma(1) is 5e-7 in float32, here at every explicit zero.
    np.testing.assert_allclose(got, 0.0, atol=3e-5)


def test_count_nll_follows_moved_and_dropped_cells():
    batch, output = truth(), decoded(inflated=False)
    entries = np.broadcast_to(ENTRIES["measured"], (2, CELLS, GENES))
    expected = np.asarray(nll_of(output, batch, batch.dense_counts(GENES), entries))
    slot = np.array([[3, 0, 9, 1, 2, 5, 9], [2, 9, 0, 9, 9, 9, 9]], np.int32)
    moved = batch.replace(slot=jnp.asarray(slot))
    order = np.tile(np.arange(CELLS), (2, 1))
    for sample, source in ((0, [0, 1, 3, 4, 5]), (1, [0, 2])):
        order[sample, slot[sample, source]] = source
    swapped = output.replace(mean=jnp.take_along_axis(output.mean, order[..., None], axis=1))
    got = np.asarray(nll_of(swapped, moved, moved.dense_counts(GENES), entries))
    np.testing.assert_allclose(got[0, [3, 0, 1, 2, 5]], expected[0, [0, 1, 3, 4, 5]], rtol=1e-5)
    np.testing.assert_allclose(got[1, [2, 0]], expected[1, [0, 2]], rtol=1e-5)


CASES = [
    ("negative_binomial", {}, None),
    ("negative_binomial", {"gene_mask": GENE_MASK}, MEASURED),
    ("zero_inflated_negative_binomial", {"gene_mask": GENE_MASK}, MEASURED),
    ("imputation", {"target_genes": TARGETS}, MEASURED),
    ("imputation", {}, None),
    ("denoising", {"gene_mask": GENE_MASK, "target_genes": TARGETS}, MEASURED),
    ("mean_squared_error", {}, None),
    ("mean_squared_error", {"gene_mask": GENE_MASK}, MEASURED),
]
# "denoising" is computed like "imputation".
KINDS = [
    "negative_binomial",
    "zero_inflated_negative_binomial",
    "imputation",
    "mean_squared_error",
]


@pytest.mark.parametrize(("kind", "masks", "measured"), CASES)
def test_objectives_equal_loops_in_numpy(kind, masks, measured):
    output = decoded(inflated=kind.startswith("zero"))
    got = loss(output, truth(measured), ObjectiveConfig(kind=kind), **masks)
    full, masked = numpy_objective(output, kind, measured=measured, **masks)
    assert full > 0.5
    assert float(got["reconstruction_full"]) == pytest.approx(full, rel=2e-5)
    assert float(got["reconstruction_masked"]) == pytest.approx(masked, rel=2e-5)
    assert float(got["reconstruction"]) == pytest.approx(full + masked, rel=2e-5)
    assert (masked > 0) == (kind.endswith("binomial") and "gene_mask" in masks)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in got.values())


def test_the_masked_part_can_be_left_out():
    config = ObjectiveConfig(masked_part=False)
    output = decoded(inflated=False)
    got = loss(output, truth(MEASURED), config, gene_mask=GENE_MASK)
    full, _ = numpy_objective(
        output, "negative_binomial", measured=MEASURED, gene_mask=GENE_MASK, part=False
    )
    assert float(got["reconstruction"]) == pytest.approx(full, rel=2e-5)
    assert float(got["reconstruction_masked"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_unmeasured_genes_have_no_influence_on_value_or_gradient(kind):
    config = ObjectiveConfig(kind=kind)
    output = decoded(inflated=kind.startswith("zero"))
    masks = (config, GENE_MASK, TARGETS)
    expected, slope = loss_and_gradient(output, truth(MEASURED), *masks)
    never = ~MEASURED.any(0)
    assert never.any()
    hidden = ~np.broadcast_to(MEASURED[:, None], GENE_MASK.shape)
    np.testing.assert_array_equal(np.asarray(slope.mean)[hidden], 0)
    if kind != "mean_squared_error":
        np.testing.assert_array_equal(np.asarray(slope.dispersion)[never], 0)
        assert np.abs(np.asarray(slope.dispersion)[~never]).max() > 1e-4
    if output.zero_logits is not None:
        np.testing.assert_array_equal(np.asarray(slope.zero_logits)[hidden], 0)
    # Other counts, means, dispersions and logits there leave the value as it is.
    other = output.replace(mean=jnp.where(hidden, 3e4, output.mean))
    other = other.replace(dispersion=jnp.where(never, 77.0, output.dispersion))
    if output.zero_logits is not None:
        other = other.replace(zero_logits=jnp.where(hidden, 9.0, output.zero_logits))
    counted = [np.where(MEASURED[s], d, 500 + d) for s, d in enumerate(DENSE)]
    got, same = loss_and_gradient(other, truth(MEASURED, dense=counted), *masks)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(same.mean, slope.mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence_on_value_or_gradient(kind):
    config = ObjectiveConfig(kind=kind)
    output = decoded(inflated=kind.startswith("zero"))
    masks = (config, GENE_MASK, TARGETS)
    expected, slope = loss_and_gradient(output, truth(MEASURED), *masks)
    padding = ~np.asarray(truth().cell_mask)
    assert padding.sum() == 5
    np.testing.assert_array_equal(np.asarray(slope.mean)[padding], 0)
    other = output.replace(mean=jnp.where(padding[..., None], 7e5, output.mean))
    if output.zero_logits is not None:
        np.testing.assert_array_equal(np.asarray(slope.zero_logits)[padding], 0)
        other = other.replace(zero_logits=jnp.where(padding[..., None], 40.0, other.zero_logits))
    got, same = loss_and_gradient(other, truth(MEASURED, seed=4), *masks)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    for one, two in zip(jax.tree.leaves(slope), jax.tree.leaves(same), strict=True):
        assert np.isfinite(np.asarray(two)).all()
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_a_longer_cell_axis_leaves_the_objective_as_it_is():
    config, extra = ObjectiveConfig(), ((0, 0), (0, 3), (0, 0))
    output = decoded(inflated=False)
    longer = output.replace(mean=jnp.pad(output.mean, extra, constant_values=7e5))
    expected = loss(output, truth(MEASURED), config, gene_mask=GENE_MASK)
    batch = truth(MEASURED, cells=CELLS + 3, seed=4)
    got = loss(longer, batch, config, gene_mask=np.pad(GENE_MASK, extra))
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5)


def test_nothing_masked_is_a_loss_of_zero_with_a_gradient_of_zero():
    nothing = np.zeros_like(GENE_MASK)
    got, slope = loss_and_gradient(
        decoded(inflated=False), truth(MEASURED), ObjectiveConfig(), nothing, TARGETS
    )
    assert float(got) == 0
    for leaf in jax.tree.leaves(slope):
        np.testing.assert_array_equal(leaf, 0)


def test_a_sample_that_measures_nothing_is_worth_nothing():
    measured = MEASURED.copy()
    measured[1] = False
    output = decoded(inflated=False)
    got = loss(output, truth(measured), ObjectiveConfig())
    expected = [cell_nll(output, 0, cell, measured[0]) for cell in range(6)]
    assert float(got["reconstruction"]) == pytest.approx(np.sum(expected) / 9, rel=2e-5)


def test_objectives_refuse_decoders_that_lack_what_they_need():
    with pytest.raises(ConfigError, match=r"dispersion.*negative-binomial decoder"):
        reconstruction_loss(
            decoded(inflated=False, dispersion=False), truth(), ObjectiveConfig(kind="imputation")
        )
    config = ObjectiveConfig(kind="zero_inflated_negative_binomial")
    with pytest.raises(ConfigError, match=r"zero inflation.*decoder\.kind"):
        reconstruction_loss(decoded(inflated=False), truth(), config)


def test_scale_to_total_sums_to_the_total_over_the_entries():
    mean = decoded().mean
    wanted = jnp.asarray(np.random.default_rng(0).random((2, CELLS)) * 100)
    got = np.asarray(scale_to_total(mean, wanted, GENE_MASK))
    some = GENE_MASK.any(-1)
    np.testing.assert_allclose(got.sum(-1)[some], np.asarray(wanted)[some], rtol=1e-5)
    np.testing.assert_array_equal(got[~GENE_MASK], 0)
    zero = jax.grad(lambda m: scale_to_total(m, wanted * 0, GENE_MASK).sum())(mean)
    assert np.isfinite(np.asarray(zero)).all()


def test_average_over_ignores_what_it_excludes_even_nan():
    values = jnp.asarray([[1.0, 2.0, np.nan]])
    assert float(average_over(values, jnp.asarray([[True, True, False]]))) == 1.5
    assert float(average_over(values, jnp.zeros((1, 3), bool))) == 0.0


# ---------------------------------------------------------------------------------------- latent terms

CELL_MASK = np.arange(5)[None] < np.array([[5], [3]])


def latent_output(*, batch_logits=None, cluster=True, seed=0):
    generator = np.random.default_rng(seed)
    z = generator.standard_normal((2, 5, 4))
    kl = generator.random((2, 5)) * 4
    kl[~CELL_MASK] = 1e6
    return LatentOutput(
        z=jnp.asarray(z, jnp.float32),
        mean=jnp.asarray(z, jnp.float32),
        kl_latent=jnp.asarray(kl, jnp.float32),
        kl_cluster=jnp.asarray(kl / 8, jnp.float32) if cluster else None,
        batch_logits=batch_logits,
    )


def means():
    kl = np.asarray(latent_output().kl_latent, np.float64)[CELL_MASK].mean()
    return kl, kl / 8


def test_kl_terms_are_averaged_over_cells_and_weighted():
    config = LatentConfig(latent_weight=0.5, cluster_weight=3.0)
    got = latent_loss(latent_output(), CELL_MASK, config, warmup=0.25)
    kl_latent, kl_cluster = means()
    assert float(got["kl_latent"]) == pytest.approx(kl_latent, rel=1e-5)
    assert float(got["kl_cluster"]) == pytest.approx(kl_cluster, rel=1e-5)
    expected = 0.25 * (0.5 * kl_latent + 3 * kl_cluster)
    assert float(got["latent"]) == pytest.approx(expected, rel=1e-5)
    assert float(got["floor_binds_latent"]) == float(got["floor_binds_cluster"]) == 0


def test_the_floor_of_a_mixture_replaces_the_term_stops_its_gradient_and_is_reported():
    kl_latent, kl_cluster = means()
    floor = 1.1 * kl_cluster
    assert floor < min(1, kl_latent)
    config = LatentConfig(floor=floor)

    def value(output):
        terms = latent_loss(output, CELL_MASK, config)
        return terms["latent"], terms

    slope, got = jax.grad(value, has_aux=True)(latent_output())
    assert float(got["latent"]) == pytest.approx(kl_latent + floor, rel=1e-5)
    assert float(got["kl_cluster"]) == pytest.approx(kl_cluster, rel=1e-5)
    assert (float(got["floor_binds_latent"]), float(got["floor_binds_cluster"])) == (0, 1)
    np.testing.assert_array_equal(slope.kl_cluster, 0)
    np.testing.assert_allclose(slope.kl_latent, CELL_MASK / 8, rtol=1e-5)


@pytest.mark.parametrize("above", [True, False])
def test_the_floor_of_a_gaussian_switches_a_weighted_kl_below_it_off(above):
    kl_latent, _ = means()
    floor = 0.1 * kl_latent * (0.99 if above else 1.01)
    config = LatentConfig(kind="gaussian", latent_weight=0.2, floor=floor)
    output = latent_output(cluster=False)
    got = latent_loss(output, CELL_MASK, config, warmup=0.5)
    expected = 0.1 * kl_latent if above else 0.0
    assert float(got["latent"]) == pytest.approx(expected, rel=1e-5)
    assert float(got["floor_binds_latent"]) == (not above)
    assert float(got["kl_latent"]) == pytest.approx(kl_latent, rel=1e-5)
    assert float(got["kl_cluster"]) == 0
    assert "floor_binds_cluster" not in got


def test_a_floor_of_zero_is_no_floor():
    # The one-sample estimate of the "released" mixture can be negative; max(0, estimate) would stop its gradient.
    output = latent_output().replace(kl_latent=jnp.full((2, 5), -0.7))
    got = latent_loss(output, CELL_MASK, LatentConfig(inference="released", floor=0.0))
    assert float(got["floor_binds_latent"]) == 0
    assert float(got["latent"]) == pytest.approx(-0.7 + means()[1], rel=1e-5)


def test_warmup_rises_linearly_and_stays_just_below_one():
    config = LatentConfig(warmup_steps=4)
    got = [float(warmup_factor(step, config)) for step in (0, 1, 2, 3, 4, 1000)]
    assert got == [0, 0.25, 0.5, 0.75, 0.75, 0.75]
    assert float(warmup_factor(0, LatentConfig())) == 1.0
    assert float(jax.jit(lambda step: warmup_factor(step, config))(2)) == 0.5


def test_latents_without_distribution_have_no_terms():
    output = LatentOutput(z=jnp.ones((2, 5, 4)), mean=jnp.ones((2, 5, 4)))
    got = latent_loss(output, CELL_MASK, LatentConfig(kind="deterministic"))
    assert {name: float(value) for name, value in got.items()} == {
        "kl_latent": 0,
        "kl_cluster": 0,
        "latent": 0,
    }


def test_adversarial_term_is_the_cross_entropy_of_known_batches():
    logits = np.random.default_rng(0).standard_normal((2, 5, 3))
    batch = np.array([[0, 2, -1, 1, 1], [2, 0, 1, 7, 7]])
    config = LatentConfig(latent_weight=0, cluster_weight=0, adversarial_weight=0.3)
    output = latent_output(batch_logits=jnp.asarray(logits, jnp.float32))
    got = latent_loss(output, CELL_MASK, config, batch=jnp.asarray(batch))
    known = CELL_MASK & (batch >= 0)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = log_loss(batch[known], p[known], labels=[0, 1, 2])
    assert float(got["adversarial"]) == pytest.approx(expected, rel=1e-5)
    assert float(got["latent"]) == pytest.approx(0.3 * expected, rel=1e-5)
    assert "adversarial" not in latent_loss(output, CELL_MASK, LatentConfig())


def test_elastic_similarity_equals_sklearn_cosines_over_pairs():
    z = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    expected = []
    for sample, n in enumerate((5, 3)):
        cosine = cosine_similarity(z[sample, :n].astype(np.float64))
        np.fill_diagonal(cosine, 0)
        expected.extend((1 - (np.maximum(cosine, 0) - 0.6) ** 2).ravel())
    got = elastic_cell_similarity(jnp.asarray(z), jnp.asarray(CELL_MASK), 0.6)
    assert float(got) == pytest.approx(np.mean(expected), rel=1e-5)
    nonsense = jnp.asarray(np.where(CELL_MASK[..., None], z, 1e5))
    assert float(elastic_cell_similarity(nonsense, jnp.asarray(CELL_MASK), 0.6)) == pytest.approx(
        np.mean(expected), rel=1e-5
    )
    config = LatentConfig(latent_weight=0, cluster_weight=0, similarity_weight=2.0)
    output = dataclasses.replace(latent_output(), z=jnp.asarray(z))
    terms = latent_loss(output, CELL_MASK, config)
    assert float(terms["similarity"]) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(terms["latent"]) == pytest.approx(2 * np.mean(expected), rel=1e-5)


def test_elastic_similarity_is_scale_free_and_differentiable_at_zero():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4)), jnp.float32)
    z = z.at[0, 1].set(0.0)
    slope = jax.jit(jax.grad(lambda z: elastic_cell_similarity(z, jnp.asarray(CELL_MASK), 0.6)))(z)
    assert np.isfinite(np.asarray(slope)).all()
    np.testing.assert_array_equal(np.asarray(slope)[~CELL_MASK], 0)
    one, thousand = (
        float(elastic_cell_similarity(z * scale, jnp.asarray(CELL_MASK), 0.6))
        for scale in (1, 1000)
    )
    assert one == pytest.approx(thousand, rel=1e-5)


def test_classification_loss_equals_sklearn_over_known_labels():
    logits = np.random.default_rng(0).standard_normal((2, 5, 3))
    labels = np.array([[0, 2, -1, 1, 1], [2, 0, 1, 2, 2]])
    known = CELL_MASK & (labels >= 0)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = log_loss(labels[known], p[known], labels=[0, 1, 2])
    got = classification_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(CELL_MASK))
    assert float(got) == pytest.approx(expected, rel=1e-5)
    nobody = jnp.zeros_like(jnp.asarray(CELL_MASK))
    assert float(classification_loss(jnp.asarray(logits), jnp.asarray(labels), nobody)) == 0
    extreme = classification_loss(jnp.asarray([[1e4, -1e4]]), jnp.asarray([1]), jnp.ones(1, bool))
    assert float(extreme) == pytest.approx(2e4)


def test_regression_loss_is_the_mean_over_entries():
    generator = np.random.default_rng(0)
    prediction, target = generator.standard_normal((2, 2, 5, 3)).astype(np.float32)
    expected = ((prediction - target) ** 2)[CELL_MASK].mean()
    got = regression_loss(prediction, target, jnp.asarray(CELL_MASK)[..., None])
    assert float(got) == pytest.approx(expected, rel=1e-5)
    assert float(regression_loss(prediction, target, jnp.zeros((2, 5, 1), bool))) == 0


def mixing(z, batch, mask, batches, neighbors=15):
    """The loss of batch mixing by loops over cells in float64."""
    z, batch, mask = z.reshape(-1, z.shape[-1]).astype(float), batch.ravel(), mask.ravel()
    overall = np.bincount(batch[mask], minlength=batches) / mask.sum()
    terms = []
    for cell in np.flatnonzero(mask):
        others = np.flatnonzero(mask & (np.arange(len(z)) != cell))
        square = ((z[others] - z[cell]) ** 2).sum(-1)
        weight = np.exp(-2 * square / np.sort(square)[:neighbors].mean())
        around = np.bincount(batch[others], weight / weight.sum(), minlength=batches)
        around = np.maximum(around, 1e-9)
        terms.append((around * np.log(around / np.maximum(overall, 1e-9))).sum())
    return np.mean(terms)


@pytest.mark.parametrize("neighbors", [2, 4, 15])
def test_batch_mixing_equals_loops_in_numpy(neighbors):
    random = np.random.default_rng(0)
    z = random.standard_normal((2, 5, 4)).astype(np.float32)
    batch = np.array([[0, 1, 2, 1, 0], [1, 1, 2, 0, 2]])
    mask = CELL_MASK
    expected = mixing(z, batch, mask, 4, neighbors)
    nonsense = np.where(mask[..., None], z, 1e3)
    for cells in (z, nonsense):
        got = batch_mixing_loss(
            jnp.asarray(cells), jnp.asarray(batch), jnp.asarray(mask), batches=4, neighbors=neighbors
        )  # fmt: skip
        assert float(got) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.05


def test_batch_mixing_of_mixed_and_of_separate_batches():
    random = np.random.default_rng(0)
    z = random.standard_normal((1, 300, 2)).astype(np.float32)
    batch = np.arange(300)[None] % 2
    mask = np.ones((1, 300), bool)
    mixed = float(batch_mixing_loss(z, batch, mask, batches=2))
    apart = z + 1e3 * batch[..., None].astype(np.float32)
    separate = float(batch_mixing_loss(apart, batch, mask, batches=2))
    assert mixed < 0.08
    assert separate == pytest.approx(np.log(2), rel=1e-3)


def test_batch_mixing_has_finite_gradients_for_equal_cells_and_a_cell_alone():
    for mask in (CELL_MASK, np.arange(10).reshape(2, 5) == 3):
        slope = jax.grad(
            lambda z, mask=mask: batch_mixing_loss(
                z, jnp.zeros((2, 5), int), jnp.asarray(mask), batches=2
            )
        )(jnp.ones((2, 5, 4)))
        assert np.isfinite(np.asarray(slope)).all()


def test_the_width_of_the_kernel_is_constant_for_the_gradient():
    """Scaling all cells changes nothing, but with a constant width it does: the gradient along z is not zero."""
    random = np.random.default_rng(1)
    z = jnp.asarray(random.standard_normal((1, 12, 3)), jnp.float32)
    batch = jnp.asarray(np.arange(12)[None] % 2)
    loss = partial(batch_mixing_loss, batch=batch, cell_mask=jnp.ones((1, 12), bool), batches=2)
    assert float(loss(z)) == pytest.approx(float(loss(3 * z)), rel=1e-4)
    along = float(jnp.sum(jax.grad(loss)(z) * z))
    assert abs(along) > 1e-3


def test_weights_of_classes_weigh_their_cells():
    logits = np.random.default_rng(0).standard_normal((2, 5, 3))
    labels = np.array([[0, 2, -1, 1, 1], [2, 0, 1, 2, 2]])
    weights = np.array([1.0, 0.0, 5.0])
    known = CELL_MASK & (labels >= 0)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = log_loss(
        labels[known], p[known], labels=[0, 1, 2], sample_weight=weights[labels[known]]
    )
    arguments = (jnp.asarray(x) for x in (logits, labels, CELL_MASK))
    got = classification_loss(*arguments, weights=jnp.asarray(weights))
    assert float(got) == pytest.approx(expected, rel=1e-5)
    arguments = (jnp.asarray(x) for x in (logits, labels, CELL_MASK))
    small = classification_loss(*arguments, weights=jnp.asarray(weights / 100))
    assert float(small) == pytest.approx(expected, rel=1e-5)
    nobody = jnp.zeros((2, 5), bool)
    arguments = (jnp.asarray(x) for x in (logits, labels))
    assert float(classification_loss(*arguments, nobody, weights=jnp.asarray(weights))) == 0


def test_restoration_is_one_minus_the_cosine_of_the_cells():
    random = np.random.default_rng(0)
    latent, target = random.standard_normal((2, 2, 5, 4)).astype(np.float32)
    expected = [
        1 - cosine_similarity(latent[s, c][None], target[s, c][None])[0, 0]
        for s, c in np.argwhere(CELL_MASK)
    ]
    mask = jnp.asarray(CELL_MASK)
    got = float(restoration_loss(jnp.asarray(latent), jnp.asarray(target), mask))
    assert got == pytest.approx(np.mean(expected), rel=1e-5)
    scaled = restoration_loss(jnp.asarray(7 * latent), jnp.asarray(target / 3), mask)
    assert float(scaled) == pytest.approx(got, rel=1e-5)
    assert float(restoration_loss(latent, latent, mask)) == pytest.approx(0, abs=1e-6)
    assert float(restoration_loss(latent, -latent, mask)) == pytest.approx(2, rel=1e-6)
    zero = jax.grad(lambda z: restoration_loss(z, target, mask))(jnp.zeros((2, 5, 4)))
    assert np.isfinite(np.asarray(zero)).all()


def test_the_squared_error_of_a_cell_without_counts_or_with_one():
    """The library of a cell with no counts is 1, so that its target is 0."""
    counts = [np.zeros((1, 4), int), np.array([[0, 1, 0, 0]])]
    batch = make_batch(counts, extra_nonzeros=3)
    mean = jnp.zeros((2, 1, 4))
    got = reconstruction_loss(
        Reconstruction(mean), batch, ObjectiveConfig(kind="mean_squared_error")
    )
    assert float(got["reconstruction"]) == pytest.approx(np.log1p(1e4) ** 2 / 8, rel=1e-5)
    assert float(got["reconstruction_masked"]) == 0
