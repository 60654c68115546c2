"""cellplm prepare: what goes into a corpus, what is reported, what is kept and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_jax import cli
from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.data.genes import load_human_table
from cellplm_jax.errors import InputError
from cellplm_jax.tasks import prepare as module
from cellplm_jax.tasks import prepare_parts, prepare_run, prepare_vocabulary
from cellplm_jax.tasks.prepare import find_inputs, prepare, summary_text
from cellplm_jax.tasks.prepare_parts import Spool
from cellplm_jax.tasks.prepare_vocabulary import choose_genes
from tests.conftest import make_counts

GENES = sorted(load_human_table().symbols)[:40]


def make_file(path, cells=30, *, seed=0, genes=GENES, matrix=None, obs=None, spatial=False):
    counts = make_counts(cells, genes=len(genes), seed=seed) if matrix is None else matrix
    adata = anndata.AnnData(
        X=sparse.csr_matrix(np.asarray(counts, np.float32)),
        obs=pd.DataFrame(obs or {}, index=[f"{path.stem}-{i}" for i in range(len(counts))]),
        var=pd.DataFrame(index=list(genes)),
    )
    if spatial:
        adata.obsm["spatial"] = np.random.default_rng(seed).random((len(counts), 2)) * 3000
    if path.suffix == ".zarr":
        with anndata.settings.override(zarr_write_format=3):
            adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return adata


@pytest.fixture
def files(tmp_path):
    """Two files: one with samples, labels and coordinates, one without any of them and genes the other lacks."""
    folder = tmp_path / "files"
    folder.mkdir()
    kinds = [None, *(f"type {i % 3}" for i in range(29))]
    first = make_file(
        folder / "tissue.h5ad",
        seed=1,
        genes=GENES[::-1],
        obs={"donor": [f"d{i % 3}" for i in range(30)], "kind": kinds, "chip": ["visium"] * 30},
        spatial=True,
    )
    second = make_file(folder / "blood.h5ad", 20, seed=2, genes=[*GENES[:30], "not-a-gene"])
    return folder, first, second


def make(folder, out, **options):
    options = {"workers": 0, "quiet": True, "minimum_cells": 1} | options
    return prepare([folder / "tissue.h5ad", folder / "blood.h5ad"], out, **options)


def contents(path):
    """Every count of a corpus by cell and gene, whatever their order."""
    corpus, found = open_corpus(path), {}
    for part in corpus.parts:
        adata = anndata.read_zarr(f"{path}/parts/{part.name}.zarr")
        frame = pd.DataFrame(adata.X.toarray(), adata.obs_names, adata.var_names)
        found[part.name] = frame.sort_index()
    return found


def test_a_corpus_holds_every_count(files, tmp_path):
    folder, first, second = files
    out = tmp_path / "corpus"
    summary = make(folder, out, sample_key="donor", label_key="kind", platform_key="chip")
    corpus = open_corpus(out)
    assert set(corpus.genes) == set(GENES)
    assert [(s.dataset_name, s.name, s.cells, s.spatial, s.platform) for s in corpus.samples] == [
        ("tissue", "d0", 10, True, 0),
        ("tissue", "d1", 10, True, 0),
        ("tissue", "d2", 10, True, 0),
        ("blood", "blood", 20, False, -1),
    ]
    assert corpus.label_names == ["type 0", "type 1", "type 2"]
    assert corpus.measured(0) is None
    assert [corpus.genes[i] for i in np.flatnonzero(corpus.measured(3))] == GENES[:30]
    held = contents(out)
    expected = first.to_df()[corpus.genes].sort_index()
    assert (held["tissue"].to_numpy() == expected.to_numpy()).all()
    assert (held["blood"][GENES[:30]] == second.to_df()[GENES[:30]].sort_index()).to_numpy().all()
    assert (held["blood"][GENES[30:]] == 0).to_numpy().all()

    part = anndata.read_zarr(out / "parts" / "tissue.zarr")
    source = first[part.obs["source_row"].to_numpy()]
    assert list(part.obs_names) == list(source.obs_names)
    assert list(part.obs["sample"]) == list(source.obs["donor"])
    labels = part.obs["label"].astype(object).fillna("-")
    assert list(labels) == list(source.obs["kind"].astype(object).fillna("-"))
    # One factor for both axes and all of a sample, so distances keep their proportions.
    rows = part.obs["sample"] == "d1"
    for axis in range(2):
        ratio = np.polyfit(source.obsm["spatial"][rows, axis], part.obsm["spatial"][rows, axis], 1)
        slope = ratio[0] if axis == 0 else slope  # noqa: F821
        assert ratio[0] == pytest.approx(slope, rel=1e-3)

    notes = {part["name"]: " ".join(part["notes"]) for part in summary["parts"]}
    assert "No column 'donor' in obs: the file is one sample." in notes["blood"]
    assert "No column 'kind' in obs" in notes["blood"]
    assert "platform unknown" in notes["blood"]
    assert summary["counters"]["unknown_genes"] == 1
    assert summary["counters"]["cells_without_label"] == 1
    assert summary["totals"] == {
        "samples": 4,
        "cells": 50,
        "nonzeros": sum(int((frame > 0).to_numpy().sum()) for frame in held.values()),
        "spatial_samples": 3,
    }
    assert json.loads(json.dumps(summary)) == summary
    text = summary_text(summary)
    assert "4 samples (3 spatial), 50 cells" in text
    assert "unknown genes 1" in text
    assert not list((out / "parts").glob(".*"))


def test_neighbours_are_stored_together(files, tmp_path):
    folder, *_ = files
    make_file(folder / "grid.h5ad", 400, spatial=True)
    prepare([folder / "grid.h5ad"], tmp_path / "c", minimum_cells=1, workers=0, quiet=True)
    placed = open_corpus(tmp_path / "c").read(0, 0, 400).coordinates
    steps = np.linalg.norm(np.diff(placed, axis=0), axis=1)
    assert steps.mean() < 0.1


def test_what_is_left_out_is_counted(tmp_path):
    counts = make_counts(12)
    counts[3] = 0
    counts[[5, 6]] = 0
    counts[7, 2] = 70_000
    counts[8, 2] = 65_535
    samples = ["a"] * 5 + ["empty"] * 2 + ["b"] * 5
    make_file(tmp_path / "x.h5ad", matrix=counts, obs={"sample": samples})
    summary = prepare(
        [tmp_path / "x.h5ad"],
        tmp_path / "c",
        sample_key="sample",
        genes=GENES,
        workers=0,
        quiet=True,
    )
    assert summary["counters"] == {
        "clipped_counts": 1,
        "unknown_genes": 0,
        "ambiguous_genes": 0,
        "genes_outside_vocabulary": 0,
        "duplicated_genes": 0,
        "empty_cells": 3,
        "empty_samples": 1,
        "cells_without_label": 0,
    }
    notes = " ".join(summary["parts"][0]["notes"])
    assert "1 counts above 65,535" in notes
    assert "3 cells without counts were omitted" in notes
    assert "1 samples without counts were omitted: empty" in notes
    corpus = open_corpus(tmp_path / "c")
    assert [(s.name, s.cells) for s in corpus.samples] == [("a", 4), ("b", 5)]
    assert corpus.read(1, 0, 5).count.max() == 65_535


def test_a_file_without_counts_is_an_empty_part(tmp_path):
    make_file(tmp_path / "full.h5ad")
    make_file(tmp_path / "none.h5ad", matrix=np.zeros((4, 40)))
    summary = prepare(
        [tmp_path / "full.h5ad", tmp_path / "none.h5ad"],
        tmp_path / "c",
        genes=GENES,
        workers=0,
        quiet=True,
    )
    assert [part["samples"] for part in summary["parts"]] == [1, 0]
    assert summary["counters"]["empty_samples"] == 1
    assert len(open_corpus(tmp_path / "c").samples) == 1


def test_a_file_larger_than_memory_gives_the_same_part(files, tmp_path, monkeypatch):
    folder, *_ = files
    make(folder, tmp_path / "a", sample_key="donor")
    monkeypatch.setattr(prepare_parts, "BLOCK_NONZEROS", 100)
    spooled = []
    monkeypatch.setattr(
        Spool, "_store", lambda self, b, f=Spool._store: (spooled.append(1), f(self, b))
    )
    make(folder, tmp_path / "b", sample_key="donor", nonzeros_in_memory=60)
    assert spooled
    first, second = open_corpus(tmp_path / "a"), open_corpus(tmp_path / "b")
    assert first.index == second.index
    for sample in range(4):
        one, other = (c.read(sample, 0, c.samples[sample].cells) for c in (first, second))
        np.testing.assert_array_equal(one.gene, other.gene)
        np.testing.assert_array_equal(one.count, other.count)


@pytest.mark.parametrize("limit", [10**6, 50])
def test_the_spool_gives_rows_back_in_any_order(tmp_path, limit):
    random = np.random.default_rng(0)
    sizes = random.integers(0, 12, 40)
    gene, count = random.integers(0, 999, (2, sizes.sum()))
    ends = np.cumsum(sizes)
    spool = Spool(tmp_path / "spool", np.dtype(np.uint16), limit)
    for low, high in ((0, 7), (7, 7), (7, 30), (30, 40)):
        piece = slice(
            ends[low] - sizes[low], ends[high - 1] if high > low else ends[low] - sizes[low]
        )
        spool.append(gene[piece], count[piece], sizes[low:high])
    np.testing.assert_array_equal(spool.cell_nonzeros(), sizes)
    order = random.permutation(40)[:33]
    runs = list(spool.runs(order))
    np.testing.assert_array_equal(np.concatenate(runs), order)
    assert len(runs) == 1 if limit > 50 else all(sizes[run].sum() <= 50 for run in runs)
    taken = [spool.gather(run) for run in runs]
    where = np.concatenate([np.arange(ends[row] - sizes[row], ends[row]) for row in order])
    np.testing.assert_array_equal(np.concatenate([g for g, _ in taken]), gene[where])
    np.testing.assert_array_equal(np.concatenate([c for _, c in taken]), count[where])
    assert (tmp_path / "spool").exists() == (limit == 50)
    spool.close()
    assert not (tmp_path / "spool").exists()


# -- vocabulary ----------------------------------------------------------------------------------


def test_choosing_genes():
    expressed = [np.array([5, 1, 0, 9]), np.array([5, 0, 0, 0])]
    measured = [np.array([1, 1, 1, 1], bool), np.array([1, 1, 1, 0], bool)]

    def choose(**options):
        options = {"mode": "union", "minimum_cells": 1, "minimum_prevalence": 0.0} | options
        return choose_genes(list("abcd"), expressed, measured, [10, 90], **options)

    assert choose() == ["a", "b", "d"]
    assert choose(mode="intersection") == ["a", "b"]
    assert choose(minimum_cells=10) == ["a"]
    assert choose(minimum_prevalence=0.5) == ["d"]  # 9 of the 10 cells that measure it
    assert choose(minimum_prevalence=0.1) == ["a", "d"]
    with pytest.raises(InputError, match="no gene that all files measure"):
        choose(mode="intersection", minimum_cells=100)


def test_vocabularies(files, tmp_path):
    folder, *_ = files
    make(folder, tmp_path / "shared", vocabulary="intersection")
    assert open_corpus(tmp_path / "shared").genes == GENES[:30]
    listing = tmp_path / "genes.txt"
    listing.write_text("# a vocabulary\n" + "\n".join(GENES[4:20][::-1]) + "\n\n")
    make(folder, tmp_path / "given", genes=listing, minimum_cells=None)
    corpus = open_corpus(tmp_path / "given")
    assert corpus.genes == GENES[4:20][::-1]
    assert corpus.index["vocabulary"]["chosen"] == {"mode": "given"}
    for options, match in (
        ({"genes": GENES}, "together with options for choosing"),
        ({"genes": [], "minimum_cells": None}, "vocabulary is empty"),
        ({"genes": tmp_path / "none.txt", "minimum_cells": None}, "cannot be read"),
        ({"vocabulary": "both"}, "'both'"),
        ({"minimum_cells": 0}, "minimum_cells = 0"),
        ({"minimum_prevalence": 2.0}, "minimum_prevalence = 2.0"),
    ):
        with pytest.raises(InputError, match=match):
            make(folder, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


# -- running again -------------------------------------------------------------------------------


def test_an_interrupted_run_continues(files, tmp_path, monkeypatch):
    folder, *_ = files
    make(folder, tmp_path / "whole", sample_key="donor")
    out = tmp_path / "corpus"

    def interrupt(module, stage, file):
        real = getattr(module, stage)

        def stop(path, *arguments):
            if path.stem == file:
                raise KeyboardInterrupt
            return real(path, *arguments)

        monkeypatch.setattr(module, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            make(folder, out, sample_key="donor")
        monkeypatch.undo()
        with pytest.raises(InputError, match="unfinished"):
            open_corpus(out)

    interrupt(prepare_vocabulary, "_count_file", "blood")
    interrupt(prepare_parts, "_write_file", "blood")
    opened = []
    real = module.open_counts

    def open_counts(path, *arguments, **options):
        opened.append(path.stem)
        return real(path, *arguments, **options)

    for part in (module, prepare_vocabulary, prepare_parts):
        monkeypatch.setattr(part, "open_counts", open_counts)
    summary = make(folder, out, sample_key="donor")
    assert sorted(opened) == ["blood", "blood", "tissue"]  # checked both, wrote one
    assert [part["made_now"] for part in summary["parts"]] == [False, True]
    assert open_corpus(out).index == open_corpus(tmp_path / "whole").index


def test_kill_and_continue(files, tmp_path):
    """Killed for good between two parts, with half a part on disk."""
    folder, *_ = files
    out = tmp_path / "corpus"
    script = (
        "import os, signal, sys\n"
        "from cellplm_jax.data import corpus_writer as corpus\n"
        "from cellplm_jax.tasks.prepare import prepare\n"
        "real = corpus.PartWriter.append\n"
        "def append(self, *arguments):\n"
        "    real(self, *arguments)\n"
        "    if self.name == 'blood':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "corpus.PartWriter.append = append\n"
        "prepare(sys.argv[2:], sys.argv[1], minimum_cells=1, workers=0, quiet=True)\n"
    )
    paths = [folder / "tissue.h5ad", folder / "blood.h5ad"]
    ran = subprocess.run([sys.executable, "-c", script, out, *paths], check=False)
    assert ran.returncode == -9
    assert (out / "parts/.blood.partial").is_dir()
    assert not (out / "parts/blood.json").exists()
    summary = make(folder, out)
    assert [part["made_now"] for part in summary["parts"]] == [False, True]
    assert open_corpus(out).verify() == []
    assert not list((out / "parts").glob(".*"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # anndata, on what it will write by default
def test_files_are_added_at_the_end(files, tmp_path):
    folder, *_ = files
    out = tmp_path / "corpus"
    make(folder, out, sample_key="donor")
    before = open_corpus(out)
    make_file(folder / "added.zarr", 15, seed=5)
    summary = prepare([folder / "added.zarr"], out, workers=0, quiet=True)
    after = open_corpus(out)
    assert after.samples[:4] == before.samples
    assert [(s.name, s.cells) for s in after.samples[4:]] == [("added", 15)]
    assert after.genes == before.genes
    assert [part["made_now"] for part in summary["parts"]] == [False, False, True]
    assert after.index["vocabulary"] == before.index["vocabulary"]
    # All files named again, in another order: nothing to do.
    prepare(
        [folder / "added.zarr", folder / "blood.h5ad"], out, minimum_cells=1, workers=0, quiet=True
    )
    assert [s.name for s in open_corpus(out).samples[4:]] == ["added"]
    with pytest.raises(InputError, match="minimum_cells = 1 and 7 was asked for"):
        make(folder, out, minimum_cells=7)
    with pytest.raises(InputError, match=r"--genes lists 40 others"):
        make(folder, out, genes=GENES[::-1], minimum_cells=None)
    (out / "genes.txt").write_text("\n".join(GENES[:9]))
    with pytest.raises(InputError, match=r"genes\.txt .* is not its vocabulary"):
        make(folder, out)


def test_adding_to_a_given_vocabulary(files, tmp_path):
    folder, *_ = files
    prepare([folder / "blood.h5ad"], tmp_path / "c", genes=GENES, workers=0, quiet=True)
    prepare([folder / "tissue.h5ad"], tmp_path / "c", workers=0, quiet=True)
    assert open_corpus(tmp_path / "c").genes == GENES
    prepare([folder / "tissue.h5ad"], tmp_path / "c", genes=GENES, workers=0, quiet=True)


def test_a_changed_file_is_made_again(files, tmp_path):
    folder, *_ = files
    out = tmp_path / "corpus"
    make(folder, out)
    before = open_corpus(out).fingerprint()
    make_file(folder / "blood.h5ad", 22, seed=9, genes=GENES[:30])
    summary = make(folder, out)
    assert [part["made_now"] for part in summary["parts"]] == [False, True]
    assert open_corpus(out).fingerprint() != before
    summary = make(folder, out, sample_key="donor")  # made with another key
    assert [part["made_now"] for part in summary["parts"]] == [True, True]


# -- bad input -----------------------------------------------------------------------------------


def test_bad_files_are_named_together_before_work_begins(files, tmp_path):
    folder, *_ = files
    out = tmp_path / "corpus"
    mouse = [f"Xyz{letter}{i}" for i in range(10) for letter in "defg"]
    make_file(folder / "mouse.h5ad", genes=mouse)
    make_file(folder / "scaled.h5ad", matrix=np.random.default_rng(0).normal(size=(9, 40)))
    with pytest.raises(InputError) as caught:
        prepare(folder, out, minimum_cells=1, workers=0, quiet=True)
    message = str(caught.value)
    assert "2 of 4 files cannot be used" in message
    assert "mouse.h5ad' (such as 'Xyzd0'" in message
    assert "look like mouse genes" in message
    assert "no raw counts in" in message
    assert "scaled.h5ad" in message
    assert "'tissue'" not in message
    assert make(folder, out)["totals"]["cells"] == 50


def test_damage_deep_in_a_file_keeps_the_other_parts(files, tmp_path, monkeypatch):
    folder, *_ = files
    monkeypatch.setattr("cellplm_jax.data.matrices.PROBE_VALUES", 320)
    counts = make_counts(3000).astype(float)
    counts[2900, 0] = 1.5
    make_file(folder / "bad.h5ad", matrix=counts)
    paths = [folder / "bad.h5ad", folder / "blood.h5ad"]
    with pytest.raises(InputError, match=r"1 non-integer value in X of .*bad\.h5ad"):
        prepare(paths, tmp_path / "c", genes=GENES, workers=0, quiet=True)
    assert (tmp_path / "c/parts/blood.json").exists()
    assert not list((tmp_path / "c/parts").glob("*bad*"))
    summary = prepare(paths[1:], tmp_path / "c", genes=GENES, workers=0, quiet=True)
    assert [part["made_now"] for part in summary["parts"]] == [False]


@pytest.mark.parametrize("option", ["sample_key", "dataset_key", "platform_key", "label_key"])
def test_a_key_that_no_file_has(files, tmp_path, option):
    with pytest.raises(InputError, match=rf"'donr' in obs that {option} names.*chip, donor, kind"):
        make(files[0], tmp_path / "c", **{option: "donr"})
    with pytest.raises(InputError, match="no file has 'xy' in obsm"):
        make(files[0], tmp_path / "c", spatial_key="xy")


def test_dataset_and_platform_columns(files, tmp_path):
    folder, *_ = files
    make(folder, tmp_path / "c", dataset_key="chip", sample_key="donor")
    corpus = open_corpus(tmp_path / "c")
    assert [s.dataset_name for s in corpus.samples] == ["visium"] * 3 + ["blood"]
    assert [s.dataset for s in corpus.samples] == [0, 0, 0, 1]
    with pytest.raises(
        InputError, match=r"obs\['donor'\] of 'tissue.h5ad' has 3 values in one file"
    ):
        make(folder, tmp_path / "d", dataset_key="donor")
    with pytest.raises(InputError, match=r"has 3 values in one sample \('d0', 'd1', 'd2'\)"):
        make(folder, tmp_path / "e", platform_key="donor")


def test_samples_that_cannot_be_told_apart(tmp_path):
    for name in ("one", "two"):
        obs = {"study": ["s"] * 30, "donor": ["d"] * 30}
        make_file(tmp_path / f"{name}.h5ad", obs=obs)
    paths = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    keys = {"sample_key": "donor", "genes": GENES, "workers": 0, "quiet": True}
    with pytest.raises(InputError, match="sample 'd' of data set 's' is both in part 'one' and"):
        prepare(paths, tmp_path / "c", dataset_key="study", **keys)
    assert prepare(paths, tmp_path / "c", **keys)["totals"]["samples"] == 2


def test_inputs(files, tmp_path):
    folder, *_ = files
    (folder / "notes.txt").write_text("x")
    assert list(find_inputs([folder])) == ["blood", "tissue"]
    assert list(find_inputs([folder / "tissue.h5ad", folder / "blood.h5ad"])) == ["tissue", "blood"]
    (tmp_path / "empty").mkdir()
    for given, match in (
        ([folder / "none.h5ad"], "does not exist"),
        ([tmp_path / "empty"], r"contains no \.h5ad file"),
        ([], "no input files"),
        ([folder, folder / "blood.h5ad"], "have the same name"),
    ):
        with pytest.raises(InputError, match=match):
            find_inputs(given)


def test_places_a_corpus_cannot_go(files, tmp_path):
    folder, *_ = files
    for out, match in (
        (folder, "contains other files"),
        (folder / "blood.h5ad", "is a file"),
        ("gs://bucket/corpus", "gcloud storage cp -r"),
    ):
        with pytest.raises(InputError, match=match):
            make(folder, out)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "corpus.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        make(folder, tmp_path / "c")
    (tmp_path / "c" / "corpus.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match="format 9"):
        make(folder, tmp_path / "c")


def test_one_writer_at_a_time(files, tmp_path):
    with (
        module._locked(tmp_path / "c"),
        pytest.raises(InputError, match="another cellplm prepare is writing"),
    ):
        make(files[0], tmp_path / "c")


def test_a_full_disk(files, tmp_path):
    """A limit of the operating system stands for the full disk; with room again, the same command finishes."""
    folder, *_ = files
    out = tmp_path / "corpus"
    make_file(
        folder / "large.h5ad", 3000, matrix=np.random.default_rng(0).integers(0, 60_000, (3000, 40))
    )
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from cellplm_jax.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ["--out", out, "--minimum-cells", "1", "--workers", "0", "--quiet"]
    paths = [folder / "blood.h5ad", folder / "large.h5ad"]
    command = [sys.executable, "-c", script, "prepare", *paths, *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "part 'large' of the corpus" in ran.stderr
    assert "the disk is full" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert sorted(path.name for path in (out / "parts").glob("[!.]*")) == [
        "blood.json",
        "blood.zarr",
    ]
    summary = prepare(paths, out, minimum_cells=1, workers=0, quiet=True)
    assert [part["made_now"] for part in summary["parts"]] == [False, True]
    assert open_corpus(out).verify() == []


# -- several processes, and the command ----------------------------------------------------------


def test_on_dask(files, tmp_path, capsys, monkeypatch):
    pytest.importorskip("distributed")
    from dask.distributed import LocalCluster

    folder, *_ = files
    make(folder, tmp_path / "here", sample_key="donor")
    mouse = [f"Xyz{letter}{i}" for i in range(10) for letter in "defg"]
    make_file(folder / "mouse.h5ad", genes=mouse)
    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, processes=True
    ) as cluster:
        with pytest.raises(InputError, match="look like mouse genes"):
            prepare(folder, tmp_path / "there", scheduler=cluster.scheduler_address, quiet=True)
        make(folder, tmp_path / "there", sample_key="donor", scheduler=cluster.scheduler_address)
    assert open_corpus(tmp_path / "there").index == open_corpus(tmp_path / "here").index
    monkeypatch.setattr(prepare_run, "SCHEDULER_SECONDS", 1)
    with pytest.raises(InputError, match=r"no dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        make(folder, tmp_path / "nobody", scheduler="tcp://127.0.0.1:9")


def test_local_processes(files, tmp_path, capfd):
    pytest.importorskip("distributed")
    folder, *_ = files
    summary = make(folder, tmp_path / "c", workers=2, quiet=False)
    assert summary["totals"]["cells"] == 50
    error = capfd.readouterr().err
    assert "checking files: 2/2 files" in error
    assert "writing parts: 50/50 cells" in error


def test_the_command(files, tmp_path, capsys):
    folder, *_ = files
    out = tmp_path / "corpus"
    options = ["--out", str(out), "--sample-key", "donor", "--label-key", "kind", "--workers", "0"]
    arguments = ["prepare", str(folder), *options, "--minimum-cells", "1", "--platform-key", "chip"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "4 samples (3 spatial), 50 cells" in shown.out
    assert "writing parts: 50/50 cells" in shown.err
    assert cli.main([*arguments, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["totals"]["samples"] == 4
    assert shown.err == ""
    assert cli.main(["info", str(out), "--verify"]) == 0
    shown = capsys.readouterr().out
    for text in ("cells        50", "every checksum agrees", "tissue", "visium", "mode union"):
        assert text in shown
    assert cli.main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["datasets"][1]["spatial_samples"] == 3
    assert facts["datasets"][1]["labels"] == 3
    assert facts["bytes"] > 1000
    shard = next(path for path in (out / "parts/tissue.zarr/X/data/c").iterdir())
    shard.write_bytes(shard.read_bytes()[:-9])
    assert cli.main(["info", str(out), "--verify", "--json"]) == 2
    shown = capsys.readouterr()
    assert "part 'tissue'" in shown.err
    assert shown.out == ""
    assert cli.main(["info", str(folder), "--verify"]) == 2
    assert "not a corpus" in capsys.readouterr().err
    assert cli.main(["prepare", str(folder / "none.h5ad"), *options]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_paths_of_the_interface(files, tmp_path, monkeypatch, capsys):
    """Relative paths, as one types them."""
    folder, *_ = files
    monkeypatch.chdir(folder)
    Path("genes.txt").write_text("\n".join(GENES))
    arguments = ["prepare", "blood.h5ad", "--out", "corpus", "--genes", "genes.txt", "--quiet"]
    assert cli.main(arguments) == 0
    assert len(open_corpus("corpus").samples) == 1
    assert "wrote corpus" in capsys.readouterr().out
