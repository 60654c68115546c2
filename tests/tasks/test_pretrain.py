"""Pretraining from what users have: a corpus, files, objects in memory."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from cellplm_jax.data.batches import MemoryStore
from cellplm_jax.data.corpus import Corpus
from cellplm_jax.data.genes import load_human_table
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.tasks.prepare import prepare
from cellplm_jax.tasks.pretrain import pretrain, read_samples
from tests.conftest import VOCABULARY, make_adata, tiny_train_config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files whose genes are human ones."""
    folder = tmp_path_factory.mktemp("files")
    ids = sorted(load_human_table().symbols)[: len(VOCABULARY)]
    translate = dict(zip(VOCABULARY, ids, strict=True))
    paths = []
    for number in range(2):
        adata = make_adata(40, seed=number, spatial=number == 0)
        adata.var_names = [translate.get(name, name) for name in adata.var_names]
        paths.append(folder / f"cells{number}.h5ad")
        adata.write_h5ad(paths[-1])
    return paths


@pytest.fixture(scope="module")
def corpus(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare(files, out, sample_key="batch", minimum_cells=1, workers=0, quiet=True)
    return out


@pytest.fixture
def started(monkeypatch):
    """What the loop was started with, instead of training."""
    calls = []

    def loop_pretrain(config, store, workdir, **options):
        calls.append((config, store, workdir, options))
        return "result"

    monkeypatch.setattr("cellplm_jax.train.loop.pretrain", loop_pretrain)
    return calls


@pytest.mark.parametrize("form", [lambda path: path, lambda path: str(path), lambda path: [path]])
def test_a_corpus_is_opened(corpus, started, tmp_path, form):
    stop = [].append
    result = pretrain(form(corpus), tiny_train_config(), tmp_path / "run", preempted=stop)
    assert result == "result"
    [(config, store, workdir, options)] = started
    assert isinstance(store, Corpus)
    assert config.model.genes == len(store.genes)
    assert workdir == tmp_path / "run"
    assert options["preempted"] is stop
    assert [(record.dataset_name, record.cells) for record in store.samples] == [
        ("cells0", 20), ("cells0", 20), ("cells1", 20), ("cells1", 20),
    ]  # fmt: skip


def test_files_are_read_into_memory(files, corpus, started, tmp_path):
    pretrain(files, tiny_train_config(seed=3), tmp_path / "run", batch_key="batch")
    [(config, store, _, options)] = started
    assert isinstance(store, MemoryStore)
    assert config.model.genes == len(store.genes)
    assert options["card"] is None
    assert [record.cells for record in store.samples] == [20, 20, 20, 20]
    assert [record.spatial for record in store.samples] == [True, True, False, False]
    assert [record.batch for record in store.samples] == [0, 1, 2, 3]
    assert [record.dataset for record in store.samples] == [0, 0, 1, 1]
    samples, genes = read_samples(files, batch_key="batch")
    assert genes == store.genes
    total = sum(sample.counts.sum() for sample in samples)
    assert total == sum(store.read(i, 0, 20).count.sum() for i in range(4))


def test_options_that_a_corpus_settles_are_refused(corpus, files, started, tmp_path):
    config = tiny_train_config()
    with pytest.raises(InputError, match="is a corpus, and genes was given"):
        pretrain(corpus, config, tmp_path, genes=["ENSG00000000003"])
    with pytest.raises(InputError, match="is a corpus, and batch_key was given"):
        pretrain(corpus, config, tmp_path, batch_key="batch")
    with pytest.raises(InputError, match="was given with 1 more"):
        pretrain([corpus, files[0]], config, tmp_path)
    with pytest.raises(InputError, match="no gene is expressed"):
        pretrain(files, config, tmp_path, minimum_gene_cells=10**6)
    assert started == []


def test_a_corpus_of_another_vocabulary_in_the_same_work_directory(corpus, files, tmp_path):
    """End to end but for the training: the run's directory says which genes it belongs to."""
    from cellplm_jax.data.corpus import open_corpus
    from cellplm_jax.errors import CheckpointError
    from cellplm_jax.train.checkpoint import ModelFiles, write_root
    from cellplm_jax.train.covariates import with_covariates
    from cellplm_jax.train.workdir import open_workdir, store_facts

    store = open_corpus(corpus)
    config = tiny_train_config()
    model = dataclasses.replace(config.model, genes=len(store.genes))
    config = with_covariates(dataclasses.replace(config, model=model), store)
    write_root(
        tmp_path / "run",
        ModelFiles(config.model, store.genes, {}, config, store=store_facts(store)),
    )
    assert open_workdir(tmp_path / "run", config, store) is not None
    genes = store.genes[: len(store.genes) // 2]
    prepare(files, tmp_path / "other", genes=genes, workers=0, quiet=True)
    other = open_corpus(tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"{len(store.genes)} genes there, {len(genes)} now"):
        open_workdir(tmp_path / "run", config, other)
    assert np.array_equal(open_workdir(tmp_path / "run", config, store).genes, store.genes)


def test_a_missing_extra_is_reported_before_the_data_are_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[train\]"):
        pretrain(tmp_path / "absent.h5ad", tiny_train_config(), tmp_path / "run")
