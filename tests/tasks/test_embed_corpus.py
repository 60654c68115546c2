"""A corpus in one store: the numbers of its files, whoever embeds which sample and however often it is interrupted."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr

from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.errors import InputError
from cellplm_jax.tasks import embed_corpus as module
from cellplm_jax.tasks.embed import embed
from cellplm_jax.tasks.embed_corpus import deal, embed_corpus
from cellplm_jax.tasks.prepare import prepare
from cellplm_jax.tasks.pretrained import Pretrained
from tests.conftest import VOCABULARY, make_adata
from tests.stand_ins.gcs import cloud_storage

SIZES = {"tissue": (40, 20), "blood": (5, 12, 28)}
KEY = "X_cellplm"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two files, one with coordinates, and the corpus made of them; read only."""
    folder = tmp_path_factory.mktemp("embed corpus")
    for seed, (name, sizes) in enumerate(SIZES.items()):
        adata = make_adata(sum(sizes), seed=seed, spatial=name == "tissue")
        batches = np.repeat([f"b{n}" for n in range(len(sizes))], sizes)
        adata.obs["batch"] = np.random.default_rng(seed).permutation(batches)
        adata.obs["kind"] = [f"{name} kind {n % 2}" for n in range(adata.n_obs)]
        adata.write_h5ad(folder / f"{name}.h5ad")
    files = [folder / f"{name}.h5ad" for name in SIZES]
    prepare(
        files,
        folder / "corpus",
        sample_key="batch",
        label_key="kind",
        genes=VOCABULARY,
        workers=0,
        quiet=True,
    )
    return folder


@pytest.fixture(scope="module")
def whole(place, tiny_model) -> Path:
    """The store of one uninterrupted process; read only."""
    found = embed_corpus(place / "corpus", tiny_model, place / "whole.zarr", quiet=True)
    assert found[1:5] == (105, 5, 5, True)
    return place / "whole.zarr"


def rows(store):
    return anndata.read_zarr(store).obsm[KEY]


def state(store):
    return json.loads((store / "zarr.json").read_text())["attributes"]["cellplm_embedding"]


@pytest.fixture
def contexts(monkeypatch):
    """Numbers of cells of the contexts that are embedded; ``contexts.allowed`` of them, then an error."""

    class Contexts(list):
        allowed = 99

    seen, original = Contexts(), module.embed_context

    def noting(source, model, cells, *rest):
        if len(seen) >= seen.allowed:
            msg = "the power is gone"
            raise KeyboardInterrupt(msg)
        seen.append(len(cells))
        return original(source, model, cells, *rest)

    monkeypatch.setattr(module, "embed_context", noting)
    return seen


def test_a_corpus_gets_the_numbers_of_its_files(place, whole, tiny_model):
    with warnings.catch_warnings():
        # Members that zarr does not know, and names that repeat.
        warnings.simplefilter("error", UserWarning)
        found = anndata.read_zarr(whole)
    assert found.shape == (105, 0)
    assert found.obsm[KEY].dtype == np.float32
    corpus = open_corpus(place / "corpus")
    assert found.obs["sample"].tolist() == [s.name for s in corpus.samples for _ in range(s.cells)]
    for name in SIZES:
        adata = embed(anndata.read_h5ad(place / f"{name}.h5ad"), tiny_model, batch_key="batch")
        part = found[[f"{cell}-{name}" for cell in adata.obs_names]]
        np.testing.assert_allclose(part.obsm[KEY], adata.obsm[KEY], atol=1e-6, rtol=1e-6)
        assert set(part.obs["dataset"]) == {name}
        assert part.obs["sample"].tolist() == adata.obs["batch"].tolist()
        assert part.obs["label"].tolist() == adata.obs["kind"].tolist()
        assert part.obs["source_row"].tolist() == list(range(adata.n_obs))
        wanted = adata.uns["cellplm"]
        for key in ("model", "model_source", "precision", "version", "key_added"):
            assert found.uns["cellplm"][key] == wanted[key]
    assert found.uns["cellplm"]["context"]["coordinates"] == "spatial"
    assert found.uns["cellplm"]["input"]["genes"]["genes_matched"] == 40
    assert "samples_done" not in found.uns["cellplm"]


def test_a_finished_store_is_left_alone(place, whole, tiny_model, contexts):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    found = embed_corpus(place / "corpus", tiny_model, whole, quiet=True)
    assert (found.embedded, found.complete, contexts) == (0, True, [])
    assert "complete already" in found.messages[-1]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize("processes", [1, 3])
def test_what_is_done_is_not_done_again(place, whole, tiny_model, tmp_path, contexts, processes):
    out = tmp_path / "out.zarr"
    contexts.allowed = 2
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(place / "corpus", tiny_model, out, quiet=True)
    assert contexts == [40, 28]
    unfinished = anndata.read_zarr(out)
    cells = [sample.cells for sample in open_corpus(place / "corpus").samples]
    done = [int(number in (40, 28)) for number in cells]
    assert unfinished.uns["cellplm"]["samples_done"].tolist() == done
    there = np.isfinite(unfinished.obsm[KEY]).all(axis=1)
    np.testing.assert_array_equal(there, np.repeat(done, cells))
    assert not state(out)["complete"]
    contexts.allowed = 99
    found = [
        embed_corpus(
            place / "corpus",
            tiny_model,
            out,
            process_index=index,
            process_count=processes,
            quiet=True,
        )
        for index in range(processes)
    ]
    assert sorted(contexts[2:]) == [5, 12, 20]
    assert sum(part.embedded for part in found) == 3
    assert [part.complete for part in found] == [False] * (processes - 1) + [True]
    np.testing.assert_array_equal(rows(out), rows(whole))
    assert state(out)["complete"]
    assert not (out / "uns" / "cellplm" / "samples_done").exists()


def test_samples_are_dealt_evenly_and_always_alike():
    cells = np.random.default_rng(0).integers(1, 500, 200).tolist()
    for processes in (1, 2, 7):
        shares = deal(cells, processes)
        assert sorted(sample for share in shares for sample in share) == list(range(200))
        loads = [sum(cells[sample] for sample in share) for share in shares]
        assert max(loads) - min(loads) <= 500
        assert shares == deal(cells, processes)
        for share in shares:
            assert [cells[s] for s in share] == sorted((cells[s] for s in share), reverse=True)
    assert deal([3], 2) == [[0], []]


def test_other_work_is_refused(place, whole, tiny_model, tmp_path):
    other = Pretrained.untrained(tiny_model.config, tiny_model.genes, seed=5)
    half = dataclasses.replace(tiny_model, precision="bfloat16")
    before = rows(whole)
    for model, said in (
        (
            other,
            rf"by the model {re.escape(tiny_model.id)} \(\w{{16}}\); expected one by the model untrained",
        ),
        (half, "in the precision float32; expected one in the precision bfloat16"),
    ):
        with pytest.raises(InputError, match=said):
            embed_corpus(place / "corpus", model, whole, quiet=True)
    less = tmp_path / "less"
    files = [place / "blood.h5ad"]
    prepare(files, less, sample_key="batch", genes=VOCABULARY, workers=0, quiet=True)
    with pytest.raises(InputError, match=r"an embedding of the corpus .*Choose another output"):
        embed_corpus(less, tiny_model, whole, quiet=True)
    np.testing.assert_array_equal(rows(whole), before)
    apart = Pretrained(tiny_model.config, tiny_model.params, [f"ENSG9{n:010d}" for n in range(40)])
    with pytest.raises(InputError, match="genes"):
        embed_corpus(place / "corpus", apart, tmp_path / "new.zarr", quiet=True)
    assert not (tmp_path / "new.zarr").exists()


def test_what_is_no_such_store_is_refused(place, tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    zarr.open_group(str(tmp_path / "cells.zarr"), mode="w", zarr_format=3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("x")
    for name in ("file", "cells.zarr", "folder"):
        with pytest.raises(InputError, match="contains other data"):
            embed_corpus(place / "corpus", tiny_model, tmp_path / name, quiet=True)
    with pytest.raises(InputError, match="does not exist"):
        embed_corpus(place / "corpus", tiny_model, tmp_path / "no" / "x.zarr", quiet=True)
    for index, count in ((2, 2), (0, None), (-1, 1)):
        with pytest.raises(InputError, match="Give both"):
            embed_corpus(
                place / "corpus",
                tiny_model,
                tmp_path / "x.zarr",
                process_index=index,
                process_count=count,
            )


def test_processes_wait_for_the_first_one(place, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CREATION_SECONDS", 0.3)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.1)
    with pytest.raises(InputError, match="process 0"):
        embed_corpus(
            place / "corpus", tiny_model, tmp_path / "x.zarr", process_index=1, process_count=2
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), r"disk is full.*finished samples are kept"),
        (RuntimeError("PERMISSION_DENIED: Error writing"), r"cannot be written.*permissions"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_half_laid_out(
    place, tiny_model, tmp_path, monkeypatch, error, said
):
    def full(*_):
        raise error

    monkeypatch.setattr(module, "_create_array", full)
    with pytest.raises(InputError, match=said):
        embed_corpus(place / "corpus", tiny_model, tmp_path / "x.zarr", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_corpus_and_store_in_a_bucket(place, whole, tiny_model, tmp_path, contexts):
    with cloud_storage() as storage:
        storage.add_folder(place / "corpus", "bucket", "corpus")
        contexts.allowed = 3
        arguments = ("gs://bucket/corpus", tiny_model, "gs://bucket/runs/out.zarr")
        with pytest.raises(KeyboardInterrupt):
            embed_corpus(*arguments, quiet=True)
        contexts.allowed = 99
        assert embed_corpus(*arguments, quiet=True).embedded == 2
        prefix = "runs/out.zarr/"
        for (_, name), (data, _) in storage.objects.items():
            if name.startswith(prefix):
                path = tmp_path / name.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    np.testing.assert_array_equal(rows(tmp_path), rows(whole))
    assert anndata.read_zarr(tmp_path).obs.equals(anndata.read_zarr(whole).obs)
    assert state(tmp_path)["complete"]


def test_command(command, place, whole, tiny_run, tmp_path):
    out = tmp_path / "out.zarr"
    common = ("embed", place / "corpus", "--model", tiny_run, "--out", out)
    status, printed, err = command(*common)
    assert status == 0, err
    assert printed.startswith(f"wrote {out}: obsm['X_cellplm'] of 105 cells in 5 samples by tiny@")
    assert "embedding: 105/105 cells" in err
    assert "40 of 40 vocabulary genes" in err
    np.testing.assert_array_equal(rows(out), rows(whole))
    status, printed, err = command(*common, "--json")
    assert status == 0
    assert json.loads(printed)["embedded_samples"] == 0
    for option in (
        ("--batch-key", "batch"),
        ("--layer", "X"),
        ("--color", "label"),
        ("--values", "log1p"),
        ("--key-added", "X_other"),
        ("--cells-per-context", "3"),
        ("--report", "page.html"),
    ):
        status, _, err = command(*common, *option)
        assert status == 2
        assert f"embed with a corpus does not support {option[0]}" in err
        assert len(err.splitlines()) == 1
