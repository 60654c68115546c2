"""Checksums of the files of a checkpoint.

``manifest.json`` contains the SHA-256 of every file next to it, and of itself. A folder written in one step has one for
all its files; a work directory has one for its root files, and each of its steps has its own. Readers verify
what they read. Folders of older versions have no manifest: they open with one logged remark.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping

from etils import epath

from cellplm_jax.errors import CheckpointError
from cellplm_jax.storage import atomic_write_text

MANIFEST_FILE = "manifest.json"

_told: set[str] = set()


def write_manifest(folder: str | os.PathLike, *, without: Iterable[str] = ()) -> None:
    """Write the checksums of all files in a complete folder.

    Args:
        folder: A local folder.
        without: Files that are not complete yet.
    """
    root = epath.Path(folder)
    skipped = {MANIFEST_FILE, *without}
    names = sorted(
        os.path.relpath(os.path.join(where, name), root).replace(os.sep, "/")
        for where, _, files in os.walk(root)
        for name in files
    )
    _write(root, {name: [_digest(root / name)] for name in names if name not in skipped})


def add_to_manifest(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Add the checksums of some files; a folder without a manifest gets one of all its files.

    Args:
        folder: A local folder.
        names: Files that exist or not.
    """
    root = epath.Path(folder)
    entries = Manifest(root).entries
    if entries is None:
        write_manifest(root)
        return
    lacking = [name for name in names if name not in entries and (root / name).is_file()]
    new = {name: [_digest(root / name)] for name in lacking}
    if new:
        _write(root, entries | new)


def replace_files(folder: str | os.PathLike, texts: Mapping[str, str]) -> None:
    """Write small files, each atomically, and their checksums.

    The manifest accepts the old and the new contents while the files are written, so the folder can be read at
    any time, also after an interruption.

    Args:
        folder: An existing folder, local or a ``gs://`` address.
        texts: Contents by name, in the order of writing.
    """
    root = epath.Path(folder)
    entries = Manifest(root).entries or {}
    new = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    known = {
        name: entries.get(name) or ([_digest(root / name)] if (root / name).exists() else [])
        for name in texts
    }
    # Both digests are valid from here until all files are written.
    _write(root, entries | {name: [*known[name], new[name]] for name in texts})
    for name, text in texts.items():
        atomic_write_text(root / name, text)
    _write(root, entries | {name: [digest] for name, digest in new.items()})


class Manifest:
    """The manifest of a folder.

    Args:
        folder: The folder, local or a ``gs://`` address.
        name: Name for messages; None: the folder.

    Attributes:
        entries: Accepted SHA-256 by file; None: the folder has no manifest.

    Raises:
        CheckpointError: The manifest is damaged.
    """

    def __init__(self, folder: str | os.PathLike, name: str | None = None):
        self.folder = epath.Path(folder)
        self.name = name or f"'{os.fspath(folder)}'"
        self.entries: dict[str, list[str]] | None = self._read()

    def read(self, name: str) -> bytes:
        """Return the contents of a file, verified if there is a manifest.

        Args:
            name: File in the folder.

        Raises:
            CheckpointError: The file differs from its checksum, or has none.
        """
        # Read once: what was verified is what is returned.
        data = (self.folder / name).read_bytes()
        self._compare(name, lambda: hashlib.sha256(data).hexdigest())
        return data

    def covers(self, part: str) -> bool:
        """Return whether there are checksums of a file, or of files in a subfolder."""
        return bool(self._inside(part))

    def verify(self, parts: Iterable[str]) -> None:
        """Verify files, and all files in subfolders, if there are checksums of them.

        Args:
            parts: Names of files and subfolders; "": everything.

        Raises:
            CheckpointError: A file is missing or differs from its checksum.
        """
        for part in parts:
            for name in self._inside(part):
                path = self.folder / name
                if not path.is_file():
                    raise self._damaged(f"'{name}' is missing")
                self._compare(name, functools.partial(_digest, path))

    def _inside(self, part: str) -> list[str]:
        return [
            name
            for name in self.entries or ()
            if not part or name == part or name.startswith(f"{part}/")
        ]

    def remark(self) -> None:
        """Log once that damage cannot be detected."""
        if self.name not in _told:
            _told.add(self.name)
            logging.getLogger("cellplm_jax").warning(
                "%s has no checksums, so damage cannot be detected; saving the model again adds them.",
                self.name,
            )

    def _compare(self, name: str, digest: Callable[[], str]) -> None:
        if self.entries is None:
            return
        found = digest()
        if found in self.entries.get(name, ()):
            return
        # A running training may have replaced file and manifest in between.
        self.entries = self._read() or {}
        if digest() not in self.entries.get(name, ()):
            raise self._damaged(f"'{name}' differs from its checksum")

    def _read(self) -> dict[str, list[str]] | None:
        path = self.folder / MANIFEST_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            entries = {str(name): list(digests) for name, digests in content["files"].items()}
            if content["sha256"] != _own_digest(entries):
                msg = "its own checksum differs"
                raise ValueError(msg)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(
                f"{MANIFEST_FILE} is damaged: {str(error)[:120] or type(error).__name__}"
            ) from error
        return entries

    def _damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} cannot be read ({problem})",
            f"the files whose checksums are in {MANIFEST_FILE}",
            f"Copy it again; if you changed the file yourself, delete {MANIFEST_FILE}",
        )


def _digest(path: epath.Path) -> str:
    """Return the SHA-256 of a file, with constant memory."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _own_digest(entries: Mapping[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _write(folder: epath.Path, entries: dict[str, list[str]]) -> None:
    content = {"format": 1, "files": entries, "sha256": _own_digest(entries)}
    atomic_write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")
