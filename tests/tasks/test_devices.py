"""Several devices of a process embed and fit together: the same numbers, and each of them has worked."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import cellplm_jax as cellplm
from cellplm_jax.errors import InputError
from cellplm_jax.tasks import embed as embed_module
from cellplm_jax.tasks import long_context
from cellplm_jax.tasks.long_context import overlap
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train import finetune as finetune_module
from cellplm_jax.train.sharding import MeshFunction, joined_copies, over_cells
from tests.conftest import VOCABULARY, make_adata, make_labelled
from tests.model.common import tiny

# In another order than JAX's, and without its first device.
DEVICES = [jax.devices()[number] for number in (3, 1, 2, 4)]


def embedding(model, **options):
    return cellplm.embed(make_adata(45), model, **options).obsm["X_cellplm"]


def noted(model, name, found):
    """Have a jitted function of the model note where its results lie."""
    original = getattr(model, name)

    def noting(*arguments):
        result = original(*arguments)
        found.append(result.sharding.device_set)
        return result

    model.__dict__[name] = noting


@pytest.fixture
def several(tiny_model):
    """The tiny model on four devices."""
    return dataclasses.replace(tiny_model, devices=DEVICES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spatial_key": None},
        {"batch_key": "batch", "cells_per_context": 9},
    ],
)
def test_devices_together_embed_as_one_does(tiny_model, several, monkeypatch, options):
    monkeypatch.setattr(embed_module, "CHUNK_CELLS", 8)
    chunks, contexts = [], []
    noted(several, "embed_expression", chunks)
    noted(several, "_encode_together", contexts)
    found = embedding(several, **options)
    np.testing.assert_allclose(found, embedding(tiny_model, **options), atol=1e-5, rtol=1e-5)
    # The chunks of a context go round, beginning with the first device; small contexts are one chunk.
    number = 1 if "cells_per_context" in options else 6
    assert len(chunks) % number == 0
    assert chunks[:number] == [{DEVICES[turn % 4]} for turn in range(number)]
    assert contexts
    assert all(devices == set(DEVICES) for devices in contexts)


def test_every_device_holds_its_share_of_the_cells_and_only_sums_are_sent(several):
    hidden = np.random.default_rng(0).standard_normal((1, 48, several.config.hidden))
    hidden, mask = hidden.astype(np.float32), np.ones((1, 48), bool)
    found = several.encode_context(hidden, mask)
    assert {shard.data.shape for shard in found.addressable_shards} == {(1, 12, found.shape[2])}
    mesh = found.sharding.mesh
    params = joined_copies(mesh, several.weight_copies)
    for copy, device in zip(several.weight_copies, DEVICES, strict=True):
        whole, own = jax.tree.leaves(params)[0], jax.tree.leaves(copy)[0]
        (shard,) = [s for s in whole.addressable_shards if s.device == device]
        assert shard.data.unsafe_buffer_pointer() == own.unsafe_buffer_pointer()
    placed = jax.device_put((hidden, mask), over_cells(mesh))
    text = MeshFunction(several._encode, mesh).lower(params, *placed).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


def test_cells_that_devices_do_not_divide_are_encoded_by_the_first(tiny_model):
    five = dataclasses.replace(tiny_model, devices=jax.devices()[3:8])
    contexts = []
    noted(five, "encode", contexts)
    np.testing.assert_allclose(embedding(five), embedding(tiny_model), atol=1e-5, rtol=1e-5)
    assert contexts == [{jax.devices()[3]}]


def test_contexts_in_passes_go_over_all_devices(tiny_model, several, monkeypatch):
    wanted = embedding(tiny_model)
    monkeypatch.setattr(long_context, "STREAM_CELLS", 40)
    found: dict[str, list] = {"_sums": [], "_layer": [], "_conclude": []}
    for name, places in found.items():
        original = getattr(several.encode_streamed, name)

        def noting(*arguments, original=original, places=places):
            result = original(*arguments)
            places.append(jax.tree.leaves(result)[0].sharding.device_set)
            return result

        monkeypatch.setattr(several.encode_streamed, name, noting)
    call = long_context.StreamedEncoder.__call__
    monkeypatch.setattr(
        long_context.StreamedEncoder,
        "__call__",
        lambda self, *given, **named: call(self, *given, chunk=8, **named),
    )
    np.testing.assert_allclose(embedding(several), wanted, atol=1e-5, rtol=1e-5)
    layers = several.config.encoder.layers
    turns = [{DEVICES[turn % 4]} for turn in range(6)]
    assert found["_sums"] == turns * 3 * layers
    assert found["_layer"] == turns * layers
    assert found["_conclude"] == turns


@pytest.mark.parametrize("kind", ["softmax", "performer", "residual_mlp"])
def test_other_encoders_work_as_well(kind):
    config = tiny(encoder={"kind": kind, "layers": 3 if kind == "residual_mlp" else 1})
    one = Pretrained.untrained(config, VOCABULARY)
    several = dataclasses.replace(one, devices=DEVICES)
    np.testing.assert_allclose(embedding(several), embedding(one), atol=1e-5, rtol=1e-5)


def test_the_cpu_is_one_device_unless_others_are_named(tiny_model, several):
    assert tiny_model.embeds_on == (None,)
    (leaf, *_) = jax.tree.leaves(tiny_model.device_params)
    assert leaf.devices() == {jax.devices()[0]}
    assert not leaf.committed
    assert several.embeds_on == tuple(DEVICES)
    assert [jax.tree.leaves(c)[0].devices() for c in several.weight_copies] == [
        {device} for device in DEVICES
    ]


def test_a_model_is_opened_on_one_named_device(tiny_run, tiny_model):
    model = cellplm.load(tiny_run, devices=jax.devices()[5:6])
    contexts = []
    noted(model, "encode", contexts)
    np.testing.assert_allclose(embedding(model), embedding(tiny_model), atol=1e-6)
    assert contexts == [{jax.devices()[5]}]


@pytest.mark.parametrize("devices", [[], [jax.devices()[0]] * 2])
def test_devices_that_cannot_be_are_refused(tiny_model, devices):
    with pytest.raises(InputError, match="different devices of this process"):
        dataclasses.replace(tiny_model, devices=devices)


def test_as_many_results_are_behind_as_there_are_devices():
    log = []

    def started():
        for number in range(4):
            log.append(f"start {number}")
            yield number

    for number in overlap(started(), 2):
        log.append(f"take {number}")
    assert log == [
        "start 0", "start 1", "start 2", "take 0", "start 3", "take 1", "take 2", "take 3",
    ]  # fmt: skip


ESTIMATORS = ("CellTypeAnnotator", "GeneImputer", "Denoiser", "BatchIntegrator", "PerturbationPredictor",
              "SampleClassifier")  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_takes_devices_and_a_precision(tiny_model, name):
    kind = getattr(cellplm, name)
    made = kind(tiny_model, devices=DEVICES, precision="bfloat16", quiet=True)
    assert made.devices == tuple(DEVICES)
    assert (made.base.devices, made.base.precision) == (tuple(DEVICES), "bfloat16")
    # The model that was handed in stays as it is; without a word, its settings are those of the estimator.
    assert (tiny_model.devices, tiny_model.precision) == (None, "float32")
    assert kind(tiny_model, quiet=True).base is tiny_model
    assert kind(made.base, quiet=True).devices == tuple(DEVICES)
    with pytest.raises(InputError, match="precision = 'float16'"):
        kind(tiny_model, precision="float16")
    with pytest.raises(InputError, match="different devices of this process"):
        kind(tiny_model, devices=[])


@pytest.fixture
def steps(monkeypatch):
    """The devices that held what each step of a fit returned."""
    found = []
    original = finetune_module._compile_step

    def noting(*arguments):
        step, optimizer = original(*arguments)

        def run(*given):
            result = step(*given)
            found.append(jax.tree.leaves(result[0])[0].sharding.device_set)
            return result

        return run, optimizer

    monkeypatch.setattr(finetune_module, "_compile_step", noting)
    return found


@pytest.mark.parametrize("name", ["CellTypeAnnotator", "Denoiser"])
def test_an_estimator_fits_and_predicts_on_all_its_devices(tiny_model, steps, name, tmp_path):
    adata = make_labelled(90)
    keys = {"batch_key": "batch"} | ({"label_key": "kind"} if name == "CellTypeAnnotator" else {})
    kind, recipe = getattr(cellplm, name), {"epochs": 2, "warmup_epochs": 1, "quiet": True}
    one = kind(tiny_model, **recipe).fit(adata, **keys)
    assert steps
    assert all(devices == {jax.devices()[0]} for devices in steps)
    steps.clear()
    several = kind(tiny_model, devices=DEVICES, **recipe).fit(adata, **keys)
    assert steps
    assert all(devices == set(DEVICES) for devices in steps)
    for key in ("loss", "validation_loss"):
        np.testing.assert_allclose(
            [row[key] for row in several.history], [row[key] for row in one.history], rtol=1e-4
        )
    for found, wanted in zip(
        jax.tree.leaves(several.model.params), jax.tree.leaves(one.model.params), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert several.model.devices == tuple(DEVICES)
    several.save(tmp_path / "fitted")
    loaded = kind.load(tmp_path / "fitted", devices=DEVICES[:2], quiet=True)
    assert loaded.model.embeds_on == tuple(DEVICES[:2])

    def predicted(fitted):
        cells = fitted.predict(adata.copy(), batch_key="batch")
        return (
            cells.layers["cellplm_denoised"]
            if name == "Denoiser"
            else cells.obsm["cellplm_probabilities"]
        )

    np.testing.assert_allclose(predicted(loaded), predicted(several), atol=1e-4, rtol=1e-3)


def test_a_step_of_a_fit_splits_the_cells_over_the_devices(tiny_model):
    """No device computes all cells: the largest array of an activation in the compiled step is a device's share."""
    texts = []

    class Noting(MeshFunction):
        def __call__(self, *arguments):
            texts.append(self.lower(*arguments).compile().as_text())
            return super().__call__(*arguments)

    patch = pytest.MonkeyPatch()
    patch.setattr(finetune_module, "MeshFunction", Noting)
    try:
        cellplm.CellTypeAnnotator(
            tiny_model, devices=DEVICES, epochs=1, quiet=True, validation_fraction=0.0
        ).fit(make_labelled(128), label_key="kind")
    finally:
        patch.undo()
    assert "all-reduce" in texts[0]
    hidden = tiny_model.config.hidden
    # 90 of 128 cells are kept: 23 on each of four devices.
    assert f"f32[1,23,{hidden}]" in texts[0] or f"f32[23,{hidden}]" in texts[0]


def test_an_estimator_in_bfloat16_fits_close_to_float32_and_remembers(tiny_model, tmp_path):
    adata = make_labelled(90)
    recipe = {"epochs": 2, "warmup_epochs": 1, "quiet": True}
    exact = cellplm.CellTypeAnnotator(tiny_model, **recipe).fit(adata, label_key="kind")
    narrow = cellplm.CellTypeAnnotator(tiny_model, precision="bfloat16", **recipe)
    narrow.fit(adata, label_key="kind")
    losses = [[row["loss"] for row in found.history] for found in (exact, narrow)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(narrow.model.params))
    narrow.save(tmp_path / "fitted")
    assert cellplm.CellTypeAnnotator.load(tmp_path / "fitted").model.precision == "bfloat16"
