"""One device equals eight, whichever way the arrays are split; packed samples never meet; cells never travel."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.config import MeshConfig
from cellplm_jax.errors import ConfigError
from cellplm_jax.model.cellplm import CellPLM, init_params
from cellplm_jax.train.sharding import (
    LOGICAL_AXES,
    batch_shardings,
    local_rows,
    make_mesh,
    state_shardings,
    to_global,
)
from cellplm_jax.train.step import (
    abstract_batch,
    abstract_state,
    compile_training_step,
    create_sharded_state,
)
from tests.conftest import VOCABULARY, tiny_train_config
from tests.train.packed import packed_batch

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (XLA_FLAGS)")
GENES = len(VOCABULARY)
ROWS, CELLS, SEGMENTS = 8, 64, 4
SIZES = [[40, 17], [64], [20, 20, 16], [9, 2, 30], [33], [5, 5, 5, 5], [50, 3], [16, 48]]


def sharded_config(pieces=1, **changes):
    config = tiny_train_config(**changes)
    decoder = dataclasses.replace(config.model.decoder, batches=3, datasets=1)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, decoder=decoder),
        data=dataclasses.replace(config.data, rows=ROWS, cells=CELLS, segments=SEGMENTS),
        mesh=MeshConfig(cells=pieces),
    )


def five_steps(config, mesh, *, sizes=SIZES, number=5):
    """Losses and checksums of a few steps, and the parameters after the first and the last one."""
    pieces = config.mesh.cells
    state = create_sharded_state(config, mesh)
    step = compile_training_step(config, mesh)
    programs = step.jitted._cache_size()  # another test may have had this step before
    rows, first = [], None
    for i in range(number):
        batch = packed_batch(
            sizes,
            cells=CELLS,
            genes=GENES,
            segments=SEGMENTS,
            pieces=pieces,
            seed=10 * i,
            accumulate=config.accumulate,
        )
        state, metrics = step(state, to_global(mesh, batch, config.data.rows))
        rows.append({name: np.asarray(value) for name, value in metrics.items()})
        first = first or jax.device_get((state.params, state.optimizer))
    assert step.jitted._cache_size() <= programs + 1
    return rows, first, jax.device_get(state.params)


MESHES = {
    "data": MeshConfig(),
    "cells": MeshConfig(cells=8),
    "genes": MeshConfig(genes=8),
    "2x2x2": MeshConfig(cells=2, genes=2),
}


@functools.cache
def on_one_device(pieces=1):
    return five_steps(sharded_config(pieces), make_mesh(MeshConfig(), jax.devices()[:1]))


@eight_devices
@pytest.mark.parametrize("name", MESHES)
def test_one_device_equals_eight(name):
    """Losses of five steps agree to 1e-5, the first gradients (the optimizer's first moment) to 2e-5.

    On the mesh with all axes counts are made dense in chunks of cells besides, which adds in yet another order. A
    gradient that is one number, such as that of a PReLU's slope, is a sum in which much cancels: measured 1.2e-5.
    """
    mesh_config = MESHES[name]
    alone = on_one_device(mesh_config.cells)
    mesh = make_mesh(mesh_config)
    assert mesh.size == 8
    changes = {"chunk_cells": 5} if name == "2x2x2" else {}
    together = five_steps(sharded_config(mesh_config.cells, **changes), mesh)
    for one, eight in zip(alone[0], together[0], strict=True):
        assert one.keys() == eight.keys()
        for key, value in one.items():
            np.testing.assert_allclose(eight[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
        assert one["batch_checksum"] == eight["batch_checksum"]
    for a, b in zip(jax.tree.leaves(alone[1][1]), jax.tree.leaves(together[1][1]), strict=True):
        scale = np.abs(a).max() + 1e-12
        np.testing.assert_allclose(b / scale, a / scale, atol=2e-5)


@eight_devices
@pytest.mark.parametrize("name", ["cells", "2x2x2"])
def test_no_cells_travel(name):
    """The compiled step has sums between devices, and gathers or exchanges no array of cells."""
    config = sharded_config(MESHES[name].cells)
    mesh = make_mesh(MESHES[name])
    step = compile_training_step(config, mesh)
    text = step.lower(abstract_state(config, mesh), abstract_batch(config, mesh, 512)).compile()
    text = text.as_text()
    assert "all-reduce" in text
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        for line in re.findall(rf"= ([^=\n]*?) {kind}(?:-start)?\(", text):
            for shape in re.findall(r"\[([\d,]*)\]", line):
                size = int(np.prod([int(n) for n in shape.split(",") if n]))
                # The smallest array with a column a cell and a row a hidden unit would have so many numbers.
                assert size < ROWS * CELLS * 8, f"{kind} of {line}"


@eight_devices
def test_constraints_reach_the_program():
    """The table of logical axes is applied: the traced step holds sharding constraints, and parameters are split."""
    config = sharded_config(2)
    mesh = make_mesh(MESHES["2x2x2"])
    step = compile_training_step(config, mesh)
    trace = step.trace(abstract_state(config, mesh), abstract_batch(config, mesh, 512))
    assert str(trace.jaxpr).count("sharding_constraint") >= 5
    state = create_sharded_state(config, mesh)
    table = state.params["embedder"]["gene_embedding"]
    assert table.sharding.shard_shape(table.shape) == (GENES // 2, config.model.hidden)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if "gene_embedding" in str(path)
    ]
    assert len(moments) == 2
    for leaf in moments:
        assert leaf.sharding == table.sharding


def test_meshes():
    devices = jax.devices()
    assert dict(make_mesh().shape) == {"data": len(devices), "cells": 1, "genes": 1}
    with pytest.raises(ConfigError, match="devices"):
        make_mesh(MeshConfig(data=3, genes=5))
    assert local_rows(make_mesh(), 8) == (0, 8)
    assert {axis for _, axis in LOGICAL_AXES} == {"data", "cells", "genes"}
    # A batch of one row runs on a machine with many devices, on one of them.
    for rows in (1, 2, 3, 8):
        size = make_mesh(rows=rows).size
        assert rows % size == 0
        assert all(rows % n for n in range(size + 1, len(devices) + 1))


@eight_devices
def test_shapes_that_cannot_be_split_are_named():
    config = sharded_config()
    with pytest.raises(ConfigError, match=r"mesh.genes that divides it: 1, 2, 4, 5, 8"):
        compile_training_step(config, make_mesh(MeshConfig(genes=3), jax.devices()[:3]))
    with pytest.raises(ConfigError, match=r"data.rows is 8"):
        compile_training_step(config, make_mesh(MeshConfig(), jax.devices()[:3]))


def test_only_gene_axes_of_parameters_are_split():
    config = sharded_config()
    mesh = make_mesh()
    shardings = state_shardings(mesh, abstract_state(config, mesh))
    split = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
        if any(sharding.spec)
    }
    names = {name.split("params/")[-1] for name in split if name.startswith("params/")}
    assert names == {
        "embedder/gene_embedding",
        "decoder/log_mean/kernel",
        "decoder/log_mean/bias",
        "decoder/log_dispersion",
    }
    batch = abstract_batch(config, mesh, 64)
    assert jax.tree.structure(batch_shardings(mesh, batch)) == jax.tree.structure(batch)


@pytest.mark.parametrize(
    ("kind", "pieces"), [("flow", 1), ("flow", 2), ("softmax", 1), ("performer", 2)]
)
def test_packed_samples_have_no_influence_on_each_other(kind, pieces):
    """A sample packed with others is embedded as if it were alone, to the rounding of another order of sums."""
    cells, genes, sizes = 180 * pieces, 24, [[130, 3, 41], [179]]
    config = sharded_config().model
    config = dataclasses.replace(
        config, genes=genes, encoder=dataclasses.replace(config.encoder, kind=kind, layers=2)
    )
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()

    def embed(batch):
        hidden = CellPLM(config).apply({"params": params}, batch, method=CellPLM.represent)
        return np.asarray(hidden)

    options = {"cells": cells, "genes": genes, "nonzeros": 6000, "pieces": pieces}
    packed = packed_batch(sizes, **options)
    together = embed(packed)
    number = 0
    for row, samples in enumerate(sizes):
        for place, size in enumerate(samples):
            here = np.asarray(packed.cell_mask[row] & (packed.segment[row] == place))
            # The same sample at the same cells of a row with nobody else in it.
            keep = packed.replace(
                cell_mask=packed.cell_mask & here[None] & (np.arange(len(sizes)) == row)[:, None]
            )
            single = jax.tree.map(lambda leaf: leaf, keep)
            lonely = compact(single, row)
            alone = embed(lonely)[0]
            assert here.sum() == size
            np.testing.assert_allclose(
                alone[np.asarray(lonely.cell_mask[0])], together[row][here], atol=3e-5
            )
            number += 1
    assert number == 4


def compact(batch, row):
    """One row as a batch of its own, a single piece without segments, cells of its mask first."""
    pieces = batch.pieces
    per_piece = batch.cell_mask.shape[1] // pieces
    csr = {n: getattr(batch, n)[row].reshape(pieces, -1) for n in ("indptr", "gene", "count")}
    keep = np.flatnonzero(batch.cell_mask[row])
    gene, count, lengths = [], [], []
    for cell in keep:
        piece, place = divmod(int(cell), per_piece)
        start, stop = csr["indptr"][piece, place : place + 2]
        gene.append(csr["gene"][piece, start:stop])
        count.append(csr["count"][piece, start:stop])
        lengths.append(stop - start)
    take = lambda values: values[row : row + 1, keep]  # noqa: E731
    return batch.replace(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)[None],
        gene=np.concatenate(gene)[None],
        count=np.concatenate(count)[None],
        cell_mask=take(batch.cell_mask),
        segment=None,
        measured=None,
        coordinates=take(batch.coordinates),
        has_coordinates=take(batch.has_coordinates),
        batch=take(batch.batch),
        dataset=take(batch.dataset),
        platform=take(batch.platform),
    )


def test_changing_one_packed_sample_changes_no_other():
    """The same through the whole loss: gradients of the others' cells do not see it."""
    config = sharded_config().model
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    batch = packed_batch([[30, 30]], cells=CELLS, genes=GENES)

    @jax.jit
    def first_sample(count):
        changed = batch.replace(count=count)
        hidden = CellPLM(config).apply({"params": params}, changed, method=CellPLM.represent)
        return hidden[0, :30]

    first = int(batch.indptr[0, 30])
    counts = jnp.asarray(batch.count, jnp.float32)
    changed = counts.at[0, first:].multiply(3.0)
    np.testing.assert_allclose(first_sample(changed), first_sample(counts), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda count: first_sample(count).sum()))(counts)
    assert np.abs(gradient[0, :first]).max() > 0
    np.testing.assert_array_equal(gradient[0, first:], 0)


def test_accumulated_batches_average_their_gradients():
    config = sharded_config(accumulate=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=4))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    metrics, _, params = five_steps(config, mesh, number=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    whole = on_one_device()[0][:2]
    for one, two in zip(metrics, whole, strict=True):
        # The same cells are read; the draws differ, so losses agree roughly and no more.
        assert one["read_cells"] == two["read_cells"]
        assert one["slots"] == two["slots"]
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=0.1)
    assert metrics[0]["batch_checksum"] == whole[0]["batch_checksum"]


@pytest.mark.parametrize("changes", [{"rematerialize": True}, {"precision": "bfloat16"}])
def test_memory_and_precision_options_change_little(changes):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plain = on_one_device()[0][:3]
    other = five_steps(sharded_config(**changes), mesh, number=3)
    tolerance = 1e-5 if "rematerialize" in changes else 0.02
    for one, two in zip(plain, other[0], strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=tolerance)
    for leaf in jax.tree.leaves(other[2]):
        assert leaf.dtype == np.float32


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    config = sharded_config()
    batch = packed_batch(SIZES, cells=CELLS, genes=GENES, accumulate=1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_sharded_state(config, mesh)
    compiled, batch = compile_training_step(config, mesh), to_global(mesh, batch, ROWS)

    def step(state, batch):
        return compiled(jax.tree.map(jnp.copy, state), batch)  # what it is given is used up

    broken = jax.tree.map(lambda leaf: leaf, state.params)
    broken["latent"]["mean"]["bias"] = jnp.full_like(broken["latent"]["mean"]["bias"], jnp.nan)
    bad = state.replace(params=broken)
    after, metrics = step(bad, batch)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)
    for old, new in zip(
        jax.tree.leaves((bad.params, bad.optimizer)),
        jax.tree.leaves((after.params, after.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    again, _ = step(after, batch)
    assert int(again.skipped_in_a_row) == 2
    healthy, _ = step(again.replace(params=state.params), batch)
    assert (int(healthy.skipped), int(healthy.skipped_in_a_row)) == (2, 0)


def test_checksum_sees_every_change():
    from cellplm_jax.train.step import batch_checksum

    batch = packed_batch(SIZES, cells=CELLS, genes=GENES, accumulate=1)
    number = int(batch_checksum(batch))
    count = batch.count.copy()
    count[0, 3, 5] += 1
    swapped = jax.tree.map(lambda leaf: leaf[:, [1, 0, *range(2, ROWS)]], batch)
    ends = batch.indptr.copy()
    ends[0, 2, 7] -= 1
    others = [batch.replace(count=count), swapped, batch.replace(indptr=ends)]
    assert len({number, *(int(batch_checksum(other)) for other in others)}) == 4


@eight_devices
def test_a_sample_of_a_million_cells_fits_eight_devices_in_an_eighth():
    """One step over a single row of 2^20 cells compiles; each of eight devices needs at most 1.3/8 of the memory."""
    cells = 1 << 20
    config = sharded_config(8)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, rows=1, cells=cells, segments=1),
        masking=dataclasses.replace(config.masking, maximum_cells=0),
    )

    def memory(mesh):
        step = compile_training_step(config, mesh)
        lowered = step.lower(
            abstract_state(config, mesh), abstract_batch(config, mesh, cells // 8 * 20)
        )
        found = lowered.compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes

    alone = memory(make_mesh(MeshConfig(), jax.devices()[:1]))
    each = memory(make_mesh(MeshConfig(cells=8)))
    assert each <= 1.3 / 8 * alone, (each, alone, each / alone * 8)
