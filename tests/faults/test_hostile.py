"""Files from strangers: a bounded part of the campaign, and what makes it able to fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import h5py
import numpy as np
import pytest

from cellplm_jax.data import anndata_files
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import CheckpointError, InputError
from cellplm_jax.tasks.embed import embed
from cellplm_jax.tasks.files import check_copy, read_annotations
from cellplm_jax.untrusted import require_regular
from tests.conftest import VOCABULARY, make_adata
from tests.faults import campaign_hostile

PARTS = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return campaign_hostile.prepare(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_attack_is_read_or_refused(inputs, part):
    """One case per attack; ``tools/faults.py --campaign hostile`` tries more numbers of each."""
    failures = []
    for seed in range(part, len(inputs.cases), PARTS):
        outcome = campaign_hostile.try_case(inputs, seed)
        if not outcome.ok:
            failures.append(f"seed {seed}: {outcome.result}: {outcome.detail}")
    assert not failures, "\n".join(failures)


def test_intact_files_are_read(inputs, tmp_path):
    """Refusals of the cases above have a reason."""
    folder = inputs.folder
    assert campaign_hostile.read_h5ad(folder / "whole.h5ad")
    assert campaign_hostile.read_corpus(folder / "whole-corpus") == []
    assert campaign_hostile.read_estimator(folder / "whole-estimator") == ["alpha", "beta", "gamma"]
    assert campaign_hostile.read_model(folder / "whole-checkpoint")
    published = folder / "whole-published"
    if published.exists():
        shutil.copyfile(folder / "tiny.config.json", tmp_path / "tiny.config.json")
        shutil.copyfile(published / "tiny.best.ckpt", tmp_path / "tiny.best.ckpt")
        assert campaign_hostile.read_published(tmp_path)


def test_the_campaign_sees_a_secret_that_is_read(inputs, monkeypatch):
    monkeypatch.setattr(anndata_files, "_check_links", lambda file, path: None)
    monkeypatch.setattr(anndata_files, "_excess", lambda array: "")
    names = [(case.kind, case.name) for case in inputs.cases]
    for attack in ("external link", "virtual"):
        first = names.index(("h5ad", attack))
        seeds = (first + more * len(names) for more in range(60))
        results = (campaign_hostile.try_case(inputs, seed).result for seed in seeds)
        assert "secret read" in results, attack


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.h5ad"
    make_adata(30).write_h5ad(path)
    return path


@pytest.mark.parametrize("name", ["obs", "obsm", "uns", "X", "obsm/spatial", "layers/counts"])
def test_links_to_other_files_are_neither_read_nor_written_through(whole, tmp_path, name):
    other = tmp_path / "other.h5ad"
    make_adata(30, seed=5).write_h5ad(other)
    before = other.read_bytes()
    with h5py.File(whole, "r+") as file:
        if name in file:
            del file[name]
        file[name] = h5py.ExternalLink(str(other), "/X")
    for action in (
        lambda: open_counts(whole, VOCABULARY),
        lambda: check_copy(whole, tmp_path / "out.h5ad"),
        lambda: read_annotations(whole),
    ):
        with pytest.raises(InputError, match="is a link to another file"):
            action()
    assert other.read_bytes() == before


def test_messages_tell_locked_compressed_and_cut_files_apart(tmp_path):
    def message(text):
        return anndata_files.unreadable(tmp_path / "a.h5ad", OSError(text))

    locked = message("Unable to synchronously open file (unable to lock file, errno = 11)")
    cut = message("Unable to open file (truncated file: eof = 100, sblock->base_addr = 0)")
    plugin = message(
        "Can't synchronously read data (can't open directory: /usr/local/hdf5/lib/plugin)"
    )
    assert "locked" in locked
    assert "HDF5_USE_FILE_LOCKING" in locked
    assert "cut off" in cut
    assert "hdf5plugin" in plugin
    assert len({locked, cut, plugin}) == 3


def test_old_files_and_views_are_refused_before_the_work(whole, tmp_path, tiny_model):
    import anndata

    with h5py.File(whole, "r+") as file:
        del file["uns"]
        file["uns"] = np.arange(3)
    with pytest.raises(InputError, match=r"'uns' of .* is not stored as a group"):
        check_copy(whole, tmp_path / "out.h5ad")
    make_adata(30).write_h5ad(whole)
    backed = anndata.read_h5ad(whole, backed="r")
    with pytest.raises(InputError, match="to_memory"):
        embed(backed[:10], tiny_model)
    with pytest.raises(InputError, match="255 or fewer"):
        check_copy(whole, tmp_path / f"{'o' * 260}.h5ad")


def test_pipes_devices_and_links_are_refused_unopened(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.mkfifo(folder / "weights")
    with pytest.raises(CheckpointError, match="weights' is a named pipe"):
        require_regular(folder, raises=CheckpointError)
    (folder / "weights").unlink()
    (folder / "weights").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"is a device|is a link"):
        require_regular(folder, inside=True)
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x")
    require_regular(folder)
    with pytest.raises(InputError, match="is a link to"):
        require_regular(folder, inside=True)


def test_a_model_of_another_format_or_with_thousands_of_layers(run_copy):
    from cellplm_jax.train.checkpoint import read_root

    for path in run_copy.rglob("manifest.json"):
        path.unlink()
    config = run_copy / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        read_root(run_copy)
    content["model"]["encoder"]["layers"] = 5000
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"encoder\.layers = 5000; expected 256 or less"):
        read_root(run_copy)


def test_an_estimator_with_one_label_too_few(inputs, tmp_path):
    path = tmp_path / "estimator"
    shutil.copytree(inputs.folder / "whole-estimator", path)
    for manifest in path.rglob("manifest.json"):
        manifest.unlink()
    text = (path / "estimator.json").read_text()
    content = json.loads(text)
    content["state"]["labels"] = content["state"]["labels"][:-1]
    (path / "estimator.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="it has 2 labels"):
        campaign_hostile.read_estimator(path)


def test_a_corpus_whose_fill_value_hides_a_missing_shard(inputs, tmp_path):
    path = tmp_path / "corpus"
    shutil.copytree(inputs.folder / "whole-corpus", path)
    array = next(iter(sorted(path.glob("parts/*.zarr/X/data"))))
    metadata = json.loads((array / "zarr.json").read_text())
    metadata["fill_value"] = 3
    (array / "zarr.json").write_text(json.dumps(metadata))
    shutil.rmtree(array / "c")
    with pytest.raises(InputError, match="fill_value of X/data is not what was written"):
        campaign_hostile.read_corpus(path)


def test_what_a_file_declares(inputs, tmp_path):
    """Reading may take twice the arrays that a file declares, a refusal twice the size of the file."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("group/unwritten", (10**6,), "f8", chunks=(1000,))
    assert campaign_hostile.declared(path) == 8_000_000
    folder = inputs.folder / "whole-corpus"
    arrays = [json.loads(p.read_text()) for p in folder.rglob("zarr.json")]
    shapes = [a["shape"] for a in arrays if "shape" in a]
    assert campaign_hostile.declared(folder) > 4 * sum(int(np.prod(shape)) for shape in shapes)
    case = next(c for c in inputs.cases if (c.kind, c.name) == ("checkpoint", "long gene"))
    hostile = case.make(tmp_path, np.random.default_rng(0))
    result, *_, extra = campaign_hostile._run(case, hostile)
    assert result == "refused"
    assert 40_000_000 < extra < 2 * 50_000_000 + campaign_hostile.SLACK


def test_the_campaign_sees_memory_that_a_file_does_not_need(inputs, monkeypatch):
    def greedy(text):
        np.ones(2**24).sum()
        raise CheckpointError("a", "b", "c")

    monkeypatch.setattr("cellplm_jax.train.checkpoint.name_lines", greedy)
    names = [(case.kind, case.name) for case in inputs.cases]
    outcome = campaign_hostile.try_case(inputs, names.index(("checkpoint", "empty gene")))
    assert (outcome.result, outcome.ok) == ("too much memory", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(measured=r["measured"][:-2]), "one bit for each of 40 genes"),
        (lambda r: r.update(genes_measured=r["genes_measured"] - 1), "does not mark 39 genes"),
        (lambda r: r["samples"][0].update(cells=-1), "'cells' of a sample"),
        (lambda r: r["samples"][1].update(first_cell=0), "does not follow the one before"),
        (lambda r: r["samples"][0].update(nonzeros=10**9), "more counts than genes"),
        (lambda r: r.update(format=99), "has format '99'"),
    ],
)
def test_impossible_records_are_refused_although_their_checksums_agree(
    inputs, tmp_path, change, message
):
    """Whoever changes a record can correct the checksums, but not make the corpus verify."""
    path = tmp_path / "corpus"
    shutil.copytree(inputs.folder / "whole-corpus", path)
    part = next(iter(sorted((path / "parts").glob("*.json"))))
    record = json.loads(part.read_text())
    change(record)
    part.write_text(json.dumps(record))
    index = json.loads((path / "corpus.json").read_text())
    for entry in index["parts"]:
        if entry["name"] == part.stem:
            entry["sha256"] = hashlib.sha256(part.read_bytes()).hexdigest()
    rest = {name: value for name, value in index.items() if name != "sha256"}
    index["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (path / "corpus.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        campaign_hostile.read_corpus(path)
