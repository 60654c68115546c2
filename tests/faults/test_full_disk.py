"""Full disks, strays, and outputs that are not files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from cellplm_jax import storage
from cellplm_jax.errors import InputError
from cellplm_jax.storage import atomic_write, check_free_space, remove_strays
from tests.conftest import VOCABULARY, make_adata, make_labelled
from tests.faults import campaign_damage as examples


@contextlib.contextmanager
def largest_file(size: int):
    """Let writes beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_labelled(60).write_h5ad("cells.h5ad")
    examples._checkpoint(tmp_path / "model")
    return tmp_path


# Where the disk is full: in the copy, or in what is added to it.
@pytest.mark.parametrize(("share", "more"), [(0.1, 0), (0.5, 0), (1, 1000)])
def test_embed(command, place, share, more):
    (place / "out.h5ad").write_text("old")
    size = int(share * (place / "cells.h5ad").stat().st_size) + more
    with largest_file(size):
        status, out, err = command(
            "embed", "cells.h5ad", "--model", "model", "--out", "out.h5ad", "--quiet"
        )
    assert (status, out) == (2, "")
    assert "'out.h5ad' cannot be written because the disk is full" in err
    assert err.count("\n") == 1
    assert (place / "out.h5ad").read_text() == "old"
    assert sorted(p.name for p in place.iterdir()) == ["cells.h5ad", "model", "out.h5ad"]


VERBS = {
    "convert back": ["convert", "model", "--to-torch", "out"],
    "export": ["export", "model", "--out", "out.cellplm"],
    "annotate fit": ["annotate", "fit", "cells.h5ad", "--label-key", "kind", "--model", "model", "--method",
                     "neighbors", "--quiet", "--out", "out"],
    "report": ["info", "model", "--report", "out.html"],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_output(command, place, verb, monkeypatch):
    if verb == "convert back":
        pytest.importorskip("torch")
        examples._published(place / "published")
        shutil.rmtree(place / "model")
        (place / "to-publish").rename(place / "model")
        for name in ("published", "tiny.config.json"):
            storage.remove_path(place / name)
    with largest_file(2000):
        status, _, err = command(*VERBS[verb])
    assert status == 2, err
    assert "disk is full" in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in place.iterdir()) == ["cells.h5ad", "model"]


@pytest.mark.parametrize("size", [100, 900, 4000])
def test_prepare_keeps_no_unfinished_part(command, place, size):
    (place / "genes.txt").write_text("\n".join(VOCABULARY))
    (place / "out").mkdir()
    with largest_file(size):
        status, _, err = command(
            "prepare",
            "cells.h5ad",
            "--out",
            "out",
            "--genes",
            "genes.txt",
            "--workers",
            "0",
            "--quiet",
        )
    assert status == 2, err
    assert "disk is full" in err
    assert [str(path) for path in place.rglob("*partial*")] == []


def test_safetensors(place):
    pytest.importorskip("safetensors")
    with largest_file(2000), pytest.raises(InputError, match="disk is full"):
        examples.tiny_untrained().save(place / "out", format="safetensors")
    assert not (place / "out").exists()


def test_room_is_asked_for_first(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(InputError, match=r"disk is full .*expected [\d,.]+ MB"),
        atomic_write(tmp_path / "file", room=2 * free),
    ):
        raise AssertionError("not reached")
    check_free_space(tmp_path / "file", 10)
    assert os.listdir(tmp_path) == []


class LibraryError(Exception):
    """An error that does not name its reason."""


def test_errors_of_libraries_on_a_full_disk(tmp_path, monkeypatch):
    def write():
        with atomic_write(tmp_path / "file") as partial:
            partial.write_text("x")
            raise LibraryError("unexpected position 7")

    with pytest.raises(LibraryError):
        write()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="because the disk is full"):
        write()
    assert os.listdir(tmp_path) == []


def test_reasons_further_down_count(tmp_path):
    deep = RuntimeError("failed")
    deep.__context__ = ValueError("also")
    deep.__context__.__context__ = OSError(errno.ENOSPC, "?")
    with pytest.raises(InputError, match="disk is full"), atomic_write(tmp_path / "file"):
        raise deep


def test_standard_output_on_a_full_disk(place):
    """And a closed one: nobody can read the output, but there is no traceback."""
    line = f"{sys.executable} -m cellplm_jax.cli --version"
    for redirection, status in (("> /dev/full", (0, 120)), (">&-", (0,)), (">&- 2>&-", (0,))):
        done = subprocess.run(
            ["sh", "-c", f"{line} {redirection}"], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(storage.__file__).rsplit("/", 2)[0]},
        )  # fmt: skip
        assert done.returncode in status, (redirection, done.stderr)
        assert "Traceback" not in done.stderr


def test_strays_of_dead_processes_are_removed(tmp_path):
    code = "import os; from cellplm_jax.storage import atomic_write\n"
    code += "with atomic_write('file') as partial:\n    partial.write_text('half'); os._exit(9)"
    environment = {**os.environ, "PYTHONPATH": str(storage.__file__).rsplit("/", 2)[0]}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    (stray,) = os.listdir(tmp_path)
    assert "partial" in stray
    machine, _, random = stray.split("partial-")[1].split("-")
    others = {
        f".file.partial-{machine}-{os.getpid()}-{random}",  # a living process
        ".file.partial-00000000-1-00000000",  # another machine
        "file.partial-1-2",
    }
    for name in others:
        (tmp_path / name).write_text("x")
    with atomic_write(tmp_path / "other") as partial:
        partial.write_text("whole")
    assert set(os.listdir(tmp_path)) == others | {"other"}
    remove_strays(tmp_path / "missing")


def test_outputs_that_are_not_files(command, place):
    os.mkfifo(place / "pipe")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind("bound")
    for out in ("pipe", "bound", "/dev/null"):
        status, _, err = command("embed", "cells.h5ad", "--model", "model", "--out", out)
        assert status == 2
        assert "is a device, a pipe or a socket" in err
    bound.close()
    with pytest.raises(InputError, match="a device"), atomic_write("pipe"):
        pass
    assert not os.path.isfile("/dev/null")


def test_the_longest_names(tmp_path):
    with atomic_write(tmp_path / ("ä" * 125 + ".txt")) as partial:
        partial.write_text("x")
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("group", ["obsm", "uns", "obs"])
def test_links_are_not_followed_out_of_a_file(command, place, group):
    import h5py

    shutil.copyfile("cells.h5ad", "other.h5ad")
    with h5py.File("cells.h5ad", "r+") as file:
        del file[group]
        file[group] = h5py.ExternalLink("other.h5ad", f"/{group}")
    before = (place / "other.h5ad").read_bytes()
    status, _, err = command("embed", "cells.h5ad", "--model", "model", "--out", "out.h5ad")
    assert status == 2
    assert "link" in err
    assert (place / "other.h5ad").read_bytes() == before
    assert not (place / "out.h5ad").exists()


def test_two_processes_create_one_store(place, monkeypatch):
    """The second one finds the store that the first one made in the meantime."""
    import anndata

    from cellplm_jax.tasks import embed_corpus

    examples._corpus(place / "corpus")
    build, results = embed_corpus._build, []

    def slower(*arguments):
        if not results:
            results.append(None)
            results.append(embed_corpus.embed_corpus("corpus", "model", "out.zarr", quiet=True))
        build(*arguments)

    monkeypatch.setattr(embed_corpus, "_build", slower)
    found = embed_corpus.embed_corpus("corpus", "model", "out.zarr", quiet=True)
    assert found.complete
    assert results[1].complete
    assert np.isfinite(anndata.read_zarr("out.zarr").obsm["X_cellplm"]).all()
    assert not (place / "out.zarr" / "uns" / "cellplm" / "samples_done").exists()


def test_a_plain_copy_is_not_larger_than_needed(command, place):
    """The reserved space is given back."""
    adata = make_adata(60)
    adata.write_h5ad("plain.h5ad")
    assert (
        command("embed", "plain.h5ad", "--model", "model", "--out", "out.h5ad", "--quiet")[0] == 0
    )
    added = (place / "out.h5ad").stat().st_size - (place / "plain.h5ad").stat().st_size
    assert added < 60 * 16 * 4 + 60_000
