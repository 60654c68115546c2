"""Work on more cells than a device holds: reading ahead, spilling, contexts in passes equal to one pass."""

from __future__ import annotations

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

import cellplm_jax as cellplm
from cellplm_jax.errors import InputError
from cellplm_jax.tasks import long_context
from cellplm_jax.tasks.long_context import IOWait, Prefetcher, StreamedEncoder, host_array, overlap
from tests.model.common import HIDDEN, tiny


def hidden_of(cells, seed=0):
    return np.random.default_rng(seed).standard_normal((cells, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize("kind", ["flow", "mlp", "residual_mlp", "none"])
@pytest.mark.parametrize("chunk", [64, 7, 200])
def test_a_context_in_passes_is_the_context_at_once(kind, chunk):
    layers = 3 if kind in ("flow", "residual_mlp") else 2
    config = tiny(encoder={"kind": kind, "layers": layers})
    model = cellplm.Pretrained.untrained(config, [f"ENSG{n:011d}" for n in range(config.genes)])
    hidden = hidden_of(150)
    at_once = model.encode(model.device_params, hidden[None], np.ones((1, 150), bool))
    embedding = np.full((150, config.latent_size), np.nan, np.float32)
    said = []
    model.encode_streamed(
        model.device_params, hidden.copy(), embedding, chunk=chunk, on_progress=said.append
    )
    np.testing.assert_allclose(embedding, np.asarray(at_once)[0], atol=2e-6)
    assert len(said) == -(-150 // chunk) * ((4 * layers if kind == "flow" else 0) + 1)


def test_chunks_compile_once_whatever_the_size_of_the_context():
    config = tiny()
    model = cellplm.Pretrained.untrained(config, [f"ENSG{n:011d}" for n in range(config.genes)])
    streamed = model.encode_streamed
    for cells in (50, 61, 200):
        embedding = np.zeros((cells, config.latent_size), np.float32)
        streamed(model.device_params, hidden_of(cells), embedding, chunk=32)
    assert streamed._sums._cache_size() == 3  # type: ignore[attr-defined]
    assert streamed._layer._cache_size() == 1  # type: ignore[attr-defined]
    assert streamed._conclude._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["softmax", "performer"])
def test_attention_that_is_no_sum_over_cells_is_not_streamed(kind):
    assert not StreamedEncoder.supports(tiny(encoder={"kind": kind}))
    assert StreamedEncoder.supports(tiny())


def test_embed_streams_large_contexts_to_the_same_numbers(monkeypatch):
    adata = cellplm.datasets.pbmc3k()[:300].copy()
    at_once = cellplm.embed(adata.copy(), "small").obsm["X_cellplm"]
    asked = []
    original = StreamedEncoder.__call__

    def spy(self, *given, **named):
        asked.append(len(given[1]))
        return original(self, *given, chunk=128, **named)

    monkeypatch.setattr(long_context, "STREAM_CELLS", 250)
    monkeypatch.setattr(StreamedEncoder, "__call__", spy)
    streamed = cellplm.embed(adata, "small").obsm["X_cellplm"]
    assert asked == [300]
    np.testing.assert_allclose(streamed, at_once, atol=1e-5)


def test_items_are_made_ahead_in_order_and_waiting_is_counted():
    made = []

    def items():
        for number in range(5):
            time.sleep(0.02)
            made.append(number)
            yield number

    ahead = Prefetcher(items(), depth=2)
    taken = []
    for item in ahead:
        taken.append(item)
        time.sleep(0.1)
        assert len(made) >= min(5, item + 2)
    assert taken == list(range(5))
    assert ahead.waited < 0.1
    slow = Prefetcher(items(), depth=1)
    assert list(slow) == taken
    assert slow.waited > 0.05


def test_an_error_in_the_reader_comes_out_where_its_item_would_have():
    def items():
        yield 1
        msg = "the disk is gone"
        raise OSError(msg)

    ahead = iter(Prefetcher(items()))
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_no_reader_is_left_when_the_work_fails():
    def items():
        while True:
            yield 0

    taken = (item for item in Prefetcher(items()))
    assert next(taken) == 0
    taken.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_results_are_taken_when_the_next_one_runs():
    log = []

    def started():
        for number in range(3):
            log.append(f"start {number}")
            yield number

    for number in overlap(started()):
        log.append(f"take {number}")
    assert log == ["start 0", "start 1", "take 0", "start 2", "take 1", "take 2"]


def test_large_arrays_lie_on_disk_and_too_large_ones_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not isinstance(host_array((10, 4)), np.memmap)
    monkeypatch.setattr(long_context, "available_memory", lambda: 200)
    spilled = host_array((10, 4))
    assert isinstance(spilled, np.memmap)
    assert not spilled.any()
    spilled[3] = 1.0
    assert spilled.sum() == 4.0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="TMPDIR"):
        host_array((2**40, 4))


def test_available_memory_is_a_plausible_number():
    assert 1e7 < long_context.available_memory() < 1e14


def test_a_user_is_told_of_long_waits_alone():
    assert IOWait().messages() == []
    assert IOWait(1.0, 100.0).messages() == []
    assert IOWait(3.0, 5.0).messages() == []
    assert "40% of 100 s" in IOWait(40.0, 100.0).messages()[0]


def test_device_memory_of_a_pass_does_not_depend_on_the_context():
    config = dataclasses.replace(tiny(), dropout=0.0)
    model = cellplm.Pretrained.untrained(config, [f"ENSG{n:011d}" for n in range(config.genes)])
    params = model.device_params
    largest = []
    for cells in (100, 1600):
        live = []

        def said(text, live=live):
            live.append(sum(leaf.nbytes for leaf in jax.live_arrays()))

        embedding = np.zeros((cells, config.latent_size), np.float32)
        model.encode_streamed(params, hidden_of(cells), embedding, chunk=50, on_progress=said)
        largest.append(max(live))
    assert largest[1] <= 1.1 * largest[0]
