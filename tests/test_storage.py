"""Atomic writes, and errors of the operating system in one message."""

from __future__ import annotations

import errno
import os

import pytest

from cellplm_jax.errors import CheckpointError, InputError
from cellplm_jax.storage import (
    atomic_write,
    atomic_write_text,
    explain_write_errors,
    is_remote,
)


def test_addresses_of_stores_are_remote(tmp_path):
    assert is_remote("gs://bucket/folder")
    assert not is_remote(tmp_path / "gs:" / "folder")


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_write(path) as partial:
        (partial / "inside").mkdir(parents=True)
        assert list(path.iterdir()) == []
    assert os.listdir(path) == ["inside"]
    with pytest.raises(OSError, match="not empty"), atomic_write(path) as partial:
        partial.mkdir()
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(path) == ["inside"]


def fail_half_way(partial, folder, error):
    partial.mkdir() if folder else partial.write_text("half")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_after_an_error(tmp_path, error, folder):
    path = tmp_path / "name"
    with pytest.raises(error), atomic_write(path) as partial:
        fail_half_way(partial, folder, error)
    with pytest.raises(ValueError, match="before"), atomic_write(path):
        raise ValueError("before anything was written")
    assert os.listdir(tmp_path) == []


def test_two_writers_do_not_share_a_temporary_path(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        one.write_text("outer")
        other.write_text("inner")
    assert path.read_text() == "outer"


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    atomic_write_text(tmp_path / "written", "ä")
    assert (tmp_path / "written").read_bytes() == "ä".encode()
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "?"), r"it cannot be written because the disk is full .*3 GB.*Free"),
        (OSError(errno.EFBIG, "?"), "the disk is full"),
        (ValueError("Disk quota exceeded"), "the disk is full"),
        (RuntimeError("PERMISSION_DENIED: x"), r"it cannot be written .*permissions"),
        (PermissionError(errno.EACCES, "?"), r"it cannot be written .*permissions"),
    ],
)
def test_a_full_disk_and_missing_permissions_are_explained(error, message):
    with (
        pytest.raises(InputError, match=message) as found,
        explain_write_errors("it", room="3 GB", again="parts are kept"),
    ):
        raise error
    assert str(found.value).endswith("and run the same command again: parts are kept.")
    assert found.value.__cause__ is error


def test_other_errors_pass_unless_they_are_asked_for():
    with pytest.raises(OSError, match="odd"), explain_write_errors("it"):
        raise OSError(errno.EIO, "odd")
    with (
        pytest.raises(CheckpointError, match=r"it cannot be written \(.*odd"),
        explain_write_errors("it", catch=OSError, raises=CheckpointError),
    ):
        raise OSError(errno.EIO, "odd")
    with pytest.raises(KeyError), explain_write_errors("it", catch=OSError):
        raise KeyError("x")
    with (
        pytest.raises(InputError, match=r"^as it is$"),
        explain_write_errors("it", catch=Exception, raises=CheckpointError),
    ):
        raise InputError("as it is")
    deep = RuntimeError("failed")
    deep.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError, match="disk is full"), explain_write_errors("it"):
        raise deep


def test_long_reasons_are_one_short_line():
    with pytest.raises(InputError) as found, explain_write_errors("it", catch=Exception):
        raise RuntimeError(" ".join(["word"] * 100) + " last\nnext line")
    text = str(found.value)
    assert "last)" in text
    assert "next line" not in text
    assert len(text) < 400
