"""The whole model: contract of its parameter tree, stages, invariances, and every configuration end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cellplm_jax.config import ModelConfig
from cellplm_jax.model.cellplm import CellPLM, example_batch, init_params
from cellplm_jax.presets import PRESETS, preset
from tests.model.common import (
    GENES,
    apply,
    make_batch,
    random_counts,
    random_params,
    shapes_of,
    tiny,
)

TREE = Path(__file__).with_name("parameter_tree.txt")
DENSE = [random_counts(7, seed=1), random_counts(4, seed=2), random_counts(1, seed=3)]


def published() -> ModelConfig:
    """The 85M architecture with the vocabulary and the covariates of the published checkpoint."""
    model = preset("85m", genes=19_374).model
    return dataclasses.replace(
        model, decoder=dataclasses.replace(model.decoder, batches=12_596, datasets=484)
    )


def tree_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return {"/".join(path): leaf.shape for path, leaf in sorted(flatten_dict(shapes).items())}


def coordinates(seed=0):
    generator = np.random.default_rng(seed)
    return [generator.random((len(d), 2)).astype(np.float32) for d in DENSE]


def batch_of(dense=None, **keywords):
    dense = DENSE if dense is None else dense
    fields = {
        "coordinates": coordinates(),
        "has_coordinates": [np.arange(len(d)) != 2 for d in dense],
        "batch": [np.arange(len(d), dtype=np.int32) % 3 - 1 for d in dense],
    }
    return make_batch(dense, fields=fields, **keywords)


def model(**changes):
    config = tiny(**({"decoder": {"batches": 2}, "encoder": {"layers": 1}} | changes))
    module = CellPLM(config)
    return module, random_params(shapes_of(module, example_batch(config)))


# ----------------------------------------------------------------------------------------- parameters


def test_the_parameter_tree_of_the_published_architecture_is_frozen():
    # A path or shape that changes here breaks checkpoints: change the file only with a way to read the old ones.
    lines = [f"{path} {'x'.join(map(str, shape))}" for path, shape in tree_of(published()).items()]
    assert lines == TREE.read_text(encoding="utf-8").splitlines()


def test_the_number_of_parameters_is_exact():
    d, z, k, genes, batches, datasets = 1024, 512, 16, 19_374, 12_596, 484

    def linear(n, m):
        return n * m + m

    embedder = genes * d + d + linear(d, d) + 2 * d  # table, missing position, linear, norm
    layer = 4 * linear(d, d) + 4 * d + linear(d, 2 * d) + linear(2 * d, d)
    latent = 2 * linear(d, z) + 2 * k * z + linear(z, k)
    covariates = (batches + datasets) * d + 2 * (1 + 2 * d)  # tables; PReLU and norm of each
    decoder = linear(z, d) + 1 + 2 * d + covariates + linear(d, 128) + linear(128, genes) + genes
    expected = embedder + 4 * layer + 2 * d + latent + decoder
    shapes = tree_of(published()).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == expected == 72_142_575


def test_initial_parameters_follow_pytorch():
    config = tiny(decoder={"batches": 2})
    init = jax.jit(lambda key: init_params(config, key))
    params, again = (flatten_dict(init(jax.random.key(0))) for _ in range(2))
    for path, leaf in params.items():
        values = np.asarray(leaf)
        if path[-1] == "kernel":
            bound = 1 / np.sqrt(values.shape[0])
            assert np.abs(values).max() <= bound * 1.0001
            assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.25)
        elif path == ("latent", "log_variance", "bias"):
            np.testing.assert_array_equal(values, -4)  # a posterior that starts narrow
        elif path[-1] == "bias":
            np.testing.assert_array_equal(values, 0)
        elif path[-1] == "negative_slope":
            np.testing.assert_array_equal(values, 0.25)
        elif path[-1] == "scale":
            np.testing.assert_array_equal(values, 1)
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, again[path])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_parameters(name):
    config = preset(name, genes=50).model
    tree = tree_of(config)
    assert tree["embedder/gene_embedding"] == (50, config.hidden)
    assert ("embedder/positions/missing" in tree) == (config.positions.kind != "none")
    assert tree["decoder/log_mean/kernel"] == (config.decoder.bottleneck, 50)


def test_initialisation_touches_every_parameter_a_forward_pass_needs():
    # Parameters from the example batch serve batches with fewer fields and other lengths.
    module, params = model(latent={"adversarial_weight": 1.0}, embedder={"covariate": True})
    bare = make_batch(DENSE)
    assert bare.batch is None
    out = jax.eval_shape(lambda: module.apply({"params": params}, bare))
    assert out.latent.z.shape == (3, 7, 8)


# ------------------------------------------------------------------------------------------- behaviour


def test_the_stages_compose_to_the_whole():
    module, params = model()

    def both(self, batch):
        hidden = self.encode(self.embed_expression(batch), batch.cell_mask)
        latent = self.infer(hidden)
        return self(batch), hidden, latent, self.decode(latent.z, batch)

    whole, hidden, latent, decoded = apply(module, params, batch_of(), method=both)
    np.testing.assert_allclose(whole.hidden, hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.latent.z, latent.z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.reconstruction.mean, decoded.mean, rtol=1e-4)
    assert whole.prediction is None
    alone = jax.eval_shape(
        lambda: module.apply({"params": params}, batch_of(), method=CellPLM.embed_expression)
    )
    assert alone.shape == (3, 7, 32)


def test_padding_never_changes_a_number():
    module, params = model()
    tight = apply(module, params, batch_of())
    loose = apply(module, params, batch_of(cells=12, extra_nonzeros=40, seed=5))
    for sample, matrix in enumerate(DENSE):
        n = len(matrix)
        for name, one, two in (
            ("hidden", tight.hidden, loose.hidden),
            ("z", tight.latent.z, loose.latent.z),
            ("kl", tight.latent.kl_latent, loose.latent.kl_latent),
            ("mean", tight.reconstruction.mean, loose.reconstruction.mean),
        ):
            np.testing.assert_allclose(
                two[sample, :n], one[sample, :n], rtol=2e-5, atol=1e-5, err_msg=name
            )


def test_permuting_cells_permutes_embeddings_and_samples_are_independent():
    module, params = model()
    expected = apply(module, params, batch_of()).latent.z
    order = np.random.default_rng(0).permutation(7)
    batch = make_batch(
        [DENSE[0][order], *DENSE[1:]],
        fields={
            "coordinates": [coordinates()[0][order], *coordinates()[1:]],
            "has_coordinates": [(np.arange(7) != 2)[order], *(np.arange(n) != 2 for n in (4, 1))],
        },
    ).replace(batch=batch_of().batch)
    got = apply(module, params, batch).latent.z
    np.testing.assert_allclose(got[0], np.asarray(expected)[0, order], rtol=1e-4, atol=1e-5)
    for sample, n in ((1, 4), (2, 1)):
        np.testing.assert_allclose(got[sample, :n], expected[sample, :n], rtol=1e-5, atol=1e-5)


def test_gene_order_is_irrelevant():
    module, params = model()
    order = np.random.default_rng(0).permutation(GENES)
    expected = apply(module, params, batch_of())
    shuffled = jax.tree.map(lambda x: x, params)
    shuffled["embedder"]["gene_embedding"] = params["embedder"]["gene_embedding"][order]
    got = apply(module, shuffled, batch_of([d[:, order] for d in DENSE]))
    valid = np.asarray(batch_of().cell_mask)
    np.testing.assert_allclose(
        np.asarray(got.latent.z)[valid], np.asarray(expected.latent.z)[valid], rtol=1e-4, atol=1e-4
    )


def test_an_all_padding_sample_makes_no_nan_and_gradients_stay_finite():
    module, params = model()
    batch = batch_of(cells=9, extra_nonzeros=5)
    empty = batch.replace(
        cell_mask=batch.cell_mask.at[1].set(False), indptr=batch.indptr.at[1].set(0)
    )

    def loss(params):
        out = module.apply({"params": params}, empty)
        terms = out.latent.kl_latent + jnp.log(out.reconstruction.mean).mean(-1)
        return jnp.sum(jnp.where(empty.cell_mask, terms, 0.0)), out.latent.z

    gradient, z = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert np.isfinite(np.asarray(z)).all()
    expected = apply(module, params, batch_of()).latent.z
    np.testing.assert_allclose(z[0, :7], expected[0, :7], rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(np.asarray(leaf)).all()


def test_training_is_a_pure_function_of_its_streams():
    module, params = model()
    batch = batch_of()
    mask = jnp.asarray(np.random.default_rng(0).random((3, 7, GENES)) < 0.3)

    def run(dropout, latent):
        rngs = {"dropout": jax.random.key(dropout), "latent": jax.random.key(latent)}
        out = apply(module, params, batch, gene_mask=mask, train=True, rngs=rngs)
        return np.asarray(out.latent.z)

    np.testing.assert_array_equal(run(0, 0), run(0, 0))
    assert np.abs(run(0, 0) - run(0, 1)).max() > 1e-2
    assert np.abs(run(0, 0) - run(1, 0)).max() > 1e-2


HEADS = ["annotation", "imputation", "denoising", "perturbation", "sample_classification"]


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_takes_the_place_of_the_decoder(kind):
    module, params = model(head={"kind": kind, "outputs": 5, "condition": 3})
    assert "decoder" not in params
    out = jax.eval_shape(lambda: module.apply({"params": params}, batch_of()))
    assert out.reconstruction is None
    assert out.prediction.shape == ((3, 5) if kind == "sample_classification" else (3, 7, 5))


def test_a_condition_reaches_the_perturbation_head():
    module, params = model(head={"kind": "perturbation", "outputs": 5, "condition": 3})
    condition = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7, 3)), jnp.float32)
    with_condition = apply(module, params, batch_of(), condition=condition).prediction
    zero = apply(module, params, batch_of(), condition=condition * 0).prediction
    kernel = params["head"]["mlp"]["linear_0"]["kernel"][-3:]
    np.testing.assert_allclose(with_condition - zero, condition @ kernel, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm", "embedder": {"input_transform": "library_log1p"}},
        {"norm": "rmsnorm", "encoder": {"kind": "softmax"}, "positions": {"kind": "mlp"}},
        {"norm": "none", "encoder": {"kind": "mlp"}, "latent": {"kind": "gaussian"}},
        {"latent": {"inference": "released"}, "decoder": {"kind": "gaussian", "layers": 1}},
        {
            "latent": {"kind": "none"},
            "encoder": {"kind": "none"},
            "decoder": {"kind": "residual", "layers": 3},
        },
        {
            "encoder": {"kind": "residual_mlp"},
            "positions": {"kind": "grid", "grid": 5},
            "decoder": {"kind": "zero_inflated_negative_binomial"},
        },
    ],
    ids=lambda changes: "-".join(str(value) for value in changes)[:40],
)
def test_other_configurations_run_and_respect_padding(changes):
    module, params = model(**changes)
    # The nonsense at the padding differs; the length of the axis is varied above.
    tight, loose = (apply(module, params, batch_of(seed=seed)) for seed in (1, 2))
    for sample, matrix in enumerate(DENSE):
        n = len(matrix)
        mean = np.asarray(tight.reconstruction.mean)[sample, :n]
        assert np.isfinite(mean).all()
        np.testing.assert_allclose(
            loose.reconstruction.mean[sample, :n], mean, rtol=1e-4, atol=1e-5
        )
    assert tight.latent.z.shape[-1] == module.config.latent_size


def test_rank_and_shape_of_every_output():
    module, params = model()
    out = jax.eval_shape(lambda: module.apply({"params": params}, batch_of()))
    assert out.hidden.shape == (3, 7, 32)
    assert out.latent.z.shape == (3, 7, 8)
    assert out.latent.cluster_logits.shape == (3, 7, 3)
    assert out.latent.kl_latent.shape == out.latent.kl_cluster.shape == (3, 7)
    assert out.reconstruction.mean.shape == (3, 7, GENES)
    assert out.reconstruction.dispersion.shape == (GENES,)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
