"""Opened AnnData: the fields of a file or an object, with limits on what a file from a stranger may contain.

An HDF5 file can refer to other files: by external links, external storage and virtual data sets. All three are refused,
so that a file can neither show the contents of another one nor be a way to write into it. Declared sizes are compared
with the stored bytes before anything is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellplm_jax.data.matrices import Rows, as_rows, stored_rows
from cellplm_jax.errors import InputError, explain, listing, quote, shorten
from cellplm_jax.untrusted import LONGEST_TEXT, READ_ERRORS, require_regular

if TYPE_CHECKING:
    import anndata
    import h5py
    import pandas as pd

CHUNK_CACHE = 32 * 2**20
"""Size in bytes of h5py's cache of decompressed chunks per array, for reads of scattered rows."""

LARGEST_TREE = 100_000
"""Maximum number of groups and arrays in a file."""

DEEPEST_TREE = 40
"""Maximum depth of groups in a file."""

FREE_BYTES = 64 * 2**20
"""Declared size below which an array is not compared with its stored size."""

LARGEST_RATIO = 1100
"""Maximum ratio of declared to stored bytes: deflate reaches 1,032."""

TEXT_RATIO = 200
"""The same for strings, which take more memory than their references in the file."""

_GROUPS = ("obs", "var", "obsm", "obsp", "varm", "varp", "layers", "uns")


@dataclass(frozen=True, eq=False)
class Place:
    """A matrix that may contain the counts, with the ``var`` of its columns."""

    name: str
    rows: Callable[[], Rows]
    var: Callable[[], pd.DataFrame]


class _Lazy(Mapping):
    """A mapping that reads its values from a store on first access."""

    def __init__(self, keys: Sequence[str], read: Callable[[str], Any]):
        self._keys = list(keys)
        self._read = read
        self._values = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        if key not in self._values:
            self._values[key] = self._read(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, eq=False)
class Opened:
    """The fields of an AnnData that are used, from memory or disk.

    Attributes:
        label: Name for messages.
        source: Name for reports.
        obs: The cell table.
        obsm: Cell matrices by name; those of a file are read on first access.
        places: Matrices that may contain the counts.
        layers: Names of the layers.
        close: Closes the file.
    """

    label: str
    source: str
    obs: pd.DataFrame
    obsm: Mapping[str, Any]
    places: Mapping[str, Place]
    layers: tuple[str, ...]
    close: Callable[[], None]


def open_object(adata: anndata.AnnData) -> Opened:
    """Open an AnnData object: in memory, a view, or backed.

    Args:
        adata: The object; it stays open and unchanged.
    """
    places: dict[str, Place] = {}
    try:
        # A backed file reads X here, but not its values.
        has_matrix = adata.X is not None
    except KeyError:  # a backed file without X
        has_matrix = False
    if has_matrix:
        places["X"] = Place("X", lambda: as_rows(adata.X), lambda: adata.var)
    raw = adata.raw
    if raw is not None:
        places["raw.X"] = Place("raw.X", lambda: as_rows(raw.X), lambda: raw.var)
    layers = tuple(key for key in adata.layers if key is not None)  # None is X in anndata 0.13
    for key in layers:
        # `key=key` binds the current name.
        rows = lambda key=key: as_rows(adata.layers[key])  # noqa: E731
        places[f"layers['{key}']"] = Place(f"layers['{key}']", rows, lambda: adata.var)
    return Opened(
        label="the AnnData",
        source="AnnData in memory",
        obs=adata.obs,
        obsm=adata.obsm,
        places=places,
        layers=layers,
        close=lambda: None,
    )


def open_path(path: Path) -> Opened:
    """Open an ``.h5ad`` file or a ``.zarr`` directory; matrices stay on disk.

    Args:
        path: The file or directory.

    Raises:
        InputError: It cannot be read, or contains what a file must not contain.
    """
    import anndata

    if not path.exists():
        raise InputError(
            f"'{path}' does not exist", "an .h5ad file or a .zarr directory", "Check the path"
        )
    store, close = (open_zarr(path), lambda: None) if path.is_dir() else open_hdf5(path)
    try:
        keys = set(store.keys())
        if not {"obs", "var"} <= keys:
            raise InputError(
                f"'{path}' contains {listing(sorted(keys))} but no 'obs' and 'var'",
                "a file written by AnnData",
                "Read it with scanpy (for example scanpy.read_10x_h5) and save it with write_h5ad",
            )
        # Files of anndata before 0.7 store tables in another way; anndata converts them.
        if "encoding-type" not in store["obs"].attrs:
            for name in keys:
                check_tree(store[name], path)
            close()
            return dataclasses.replace(
                open_object(anndata.read_h5ad(path)),
                label=f"'{path}'",
                source=path.name,
            )
        return _open_store(store, path, close)
    except InputError:
        close()
        raise
    except READ_ERRORS as error:
        close()
        raise InputError(unreadable(path, error)) from error


def open_hdf5(path: Path, mode: str = "r") -> tuple[h5py.File, Callable[[], None]]:
    """Open an HDF5 file that refers to no other file.

    Args:
        path: A regular file.
        mode: As for ``h5py.File``.

    Returns:
        The file, and the function that closes it.

    Raises:
        InputError: It is no HDF5 file, damaged, locked, too large a tree, or has an external link.
    """
    import h5py

    require_regular(path)
    try:
        file = h5py.File(path, mode, rdcc_nbytes=CHUNK_CACHE)
    except OSError as error:
        raise InputError(unreadable(path, error)) from error
    try:
        _check_links(file, path)
    # Also for an interrupt: an open handle keeps HDF5's lock, and no other program could write the file.
    except BaseException:
        file.close()
        raise
    return file, file.close


def _check_links(file: h5py.File, path: Path) -> None:
    """Raise an error for external links and for a tree that is too large; data sets are not opened."""
    import h5py

    # Filled by the callback, whose return value only ends the visit.
    seen, bad = [0], []

    def visit(name: bytes, info: Any) -> bool | None:
        seen[0] += 1
        if info.type not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
            bad.append(f"{quote(name.decode(errors='replace'))} is a link to another file")
        elif seen[0] > LARGEST_TREE:
            bad.append(f"it has more than {LARGEST_TREE:,} groups and arrays")
        elif name.count(b"/") > DEEPEST_TREE:
            bad.append(f"its groups are nested more than {DEEPEST_TREE} levels deep")
        return True if bad else None

    try:
        # Links, not objects: visiting an object follows an external link and opens the other file.
        file.id.links.visit(visit, info=True)
    except READ_ERRORS as error:
        raise InputError(unreadable(path, error)) from error
    if bad:
        raise InputError(
            f"'{path}' is refused: {bad[0]}",
            "a file that contains its own data",
            "If you trust it, read it with anndata and write it again with write_h5ad",
        )


def check_tree(element: Any, path: Path) -> None:
    """Raise an error for arrays that are stored in other files, or declare more data than the file has.

    Args:
        element: A group or array of an open h5ad or zarr store, before it is read.
        path: The store, for messages.

    Raises:
        InputError: See above.
    """
    # A stack instead of recursion: a file can be nested deeper than Python allows.
    pending = [(element.name, element, 0)]
    seen = 0
    while pending:
        name, item, depth = pending.pop()
        seen += 1
        if seen > LARGEST_TREE or depth > DEEPEST_TREE:
            raise InputError(
                f"'{path}' is refused: {quote(name)} contains too many groups",
                f"fewer than {LARGEST_TREE:,}, nested less than {DEEPEST_TREE} levels deep",
                "Remove what is not needed, and write the file again",
            )
        if hasattr(item, "shape"):
            found = _excess(item)
            if found:
                raise InputError(
                    f"{quote(name)} of '{path}' is refused: {found}",
                    "an array that the file itself stores completely",
                    "If you trust it, read it with anndata and write it again with write_h5ad",
                )
        else:
            pending += [(f"{name}/{key}", value, depth + 1) for key, value in _children(item)]


def _children(group: Any) -> Iterator[tuple[str, Any]]:
    for key in group.keys():  # noqa: SIM118 - a zarr group does not iterate over its keys
        yield key, group[key]


def _excess(array: Any) -> str:
    """Return why an array must not be read, from its metadata alone; "" if it may."""
    import h5py

    dtype = np.dtype(array.dtype)
    # Python integers: a declared shape can overflow 64 bits.
    bytes_declared = int(np.prod(array.shape, dtype=object)) * dtype.itemsize
    chunks = getattr(array, "chunks", None)
    if isinstance(array, h5py.Dataset):
        if array.is_virtual or array.external:
            return "its data are in another file"
        missing = _missing_filter(array)
        if missing:
            return missing
    # numpy uses 4 bytes per character of a text of fixed length.
    if dtype.kind in "SUV" and dtype.itemsize > 4 * LONGEST_TEXT and dtype.names is None:
        return f"its entries have {dtype.itemsize:,} bytes each"
    if chunks:
        chunk = int(np.prod(chunks, dtype=object)) * dtype.itemsize
        # HDF5 allocates complete chunks, however little of one is read.
        if chunk > max(FREE_BYTES, 2 * bytes_declared):
            return f"a chunk has {chunk:,} bytes, the whole array {bytes_declared:,}"
    if bytes_declared <= FREE_BYTES:
        return ""
    if isinstance(array, h5py.Dataset):
        stored = array.id.get_storage_size()
    else:
        stored = array.nbytes_stored() if hasattr(array, "nbytes_stored") else bytes_declared
    # References to strings are small in the file and objects in memory.
    text = dtype.kind in "OT"
    if bytes_declared > (TEXT_RATIO if text else LARGEST_RATIO) * stored:
        return f"it declares {bytes_declared:,} bytes and {stored:,} are stored"
    return ""


def _missing_filter(array: h5py.Dataset) -> str:
    """Return which compression of an array this installation cannot read; "" if it can."""
    import h5py

    plist = array.id.get_create_plist()
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            text = name.decode(errors="replace") or f"number {code}"
            return (
                f"it is compressed with the HDF5 filter {quote(text)}, which is not installed "
                "(install hdf5plugin and set HDF5_PLUGIN_PATH to its plugins, or compress with gzip)"
            )
    return ""


def open_zarr(path: Path, mode: str = "r", **options: Any) -> Any:
    """Open a zarr directory without links.

    Args:
        path: The directory.
        mode: As for ``zarr.open_group``.
        **options: Likewise.

    Raises:
        InputError: It has no zarr group, or contains something else than regular files.
    """
    import zarr

    require_regular(path, inside=True)
    try:
        return zarr.open_group(str(path), mode=mode, **options)  # type: ignore[arg-type]
    except (*READ_ERRORS, RecursionError) as error:
        raise InputError(
            f"'{path}' is a directory without a zarr group",
            "an .h5ad file or a .zarr directory written by AnnData",
            "Check the path",
        ) from error


def unreadable(path: Path, error: BaseException) -> str:
    """Return the message for a file that cannot be read.

    Args:
        path: The file.
        error: What the library raised.
    """
    reason = shorten(" ".join(str(error).split()) or type(error).__name__, 160)
    lower = reason.lower()
    if "unable to lock file" in lower or "resource temporarily unavailable" in lower:
        return explain(
            f"'{path}' is locked: another program has it open for writing",
            "a file that no program writes",
            "Close it there first. If the file system has no locks, set HDF5_USE_FILE_LOCKING=FALSE",
        )
    if "truncated file" in lower:
        return explain(
            f"'{path}' is cut off: it is shorter than it declares",
            "a complete .h5ad file",
            "Copy or download it again",
        )
    if "can't open directory" in lower or "required filter" in lower or "plugin" in lower:
        return explain(
            f"'{path}' is compressed with an HDF5 filter that is not installed ({reason})",
            "no compression, gzip or lzf",
            "Install hdf5plugin and set HDF5_PLUGIN_PATH to its plugins, or write the file again with "
            "compression='gzip'",
        )
    if isinstance(error, PermissionError):
        return explain(f"'{path}' cannot be read ({reason})", "a readable file", "Ask its owner")
    other = _other_format(path) if "signature not found" in lower else ""
    if other:
        return explain(
            f"'{path}' is {other}, not HDF5", "an .h5ad file", "Convert it with scanpy or anndata"
        )
    return explain(
        f"'{path}' cannot be read as an AnnData file ({reason})",
        "a complete .h5ad file",
        "Check that the file is an .h5ad file and was copied completely, or write it again",
    )


def _other_format(path: Path) -> str:
    """Return the format of a file that is not HDF5, by its first bytes; "": unknown."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    if not start:
        return "empty"
    formats = {
        b"\x1f\x8b": "compressed with gzip",
        b"PK\x03\x04": "a zip archive",
        b"BZh": "compressed with bzip2",
        b"\xfd7zXZ": "compressed with xz",
        b"RDX": "an R data file",
        b"X\n": "an R data file",
        b"%%MatrixMarket": "a Matrix Market file",
        b"<": "a web page",
        b"version https://git-lfs": "a pointer of Git LFS",
    }
    return next((name for magic, name in formats.items() if start.startswith(magic)), "")


def _open_store(store: Any, path: Path, close: Callable[[], None]) -> Opened:
    """Open the fields of an h5ad file or zarr group."""
    from anndata.io import read_elem

    frames: dict[str, pd.DataFrame] = {}

    def frame(key: str) -> pd.DataFrame:
        if key not in frames:
            check_tree(store[key], path)
            _check_columns(store[key], key, path)
            frames[key] = _checked_frame(read_elem(store[key]), key, path)
        return frames[key]

    def rows(key: str) -> Rows:
        check_tree(store[key], path)
        return stored_rows(store[key])

    def stored(name: str, key: str, var: str) -> Place:
        return Place(name, lambda: rows(key), lambda: frame(var))

    def matrix(key: str) -> Any:
        element = store[f"obsm/{key}"]
        check_tree(element, path)
        shape = getattr(element, "shape", (len(frame("obs")),))
        if len(shape) > 2 or not shape or shape[0] != len(frame("obs")):
            raise InputError(
                f"obsm[{quote(key)}] of '{path}' has the shape {quote(tuple(shape))}",
                f"one row for each of the {len(frame('obs'))} cells",
                "Correct or remove it, and write the file again",
            )
        try:
            return read_elem(element)
        except READ_ERRORS as error:
            raise InputError(
                f"obsm[{quote(key)}] of '{path}' cannot be read ({shorten(str(error), 160)})",
                "a matrix with one row per cell",
                "Correct or remove it, and write the file again",
            ) from error

    places: dict[str, Place] = {}
    if "X" in store and str(store["X"].attrs.get("encoding-type", "")) != "null":
        places["X"] = stored("X", "X", "var")
    # anndata writes an empty dataset for a missing raw.
    if "raw" in store and hasattr(store["raw"], "keys") and "X" in store["raw"]:
        places["raw.X"] = stored("raw.X", "raw/X", "raw/var")
    layers = tuple(store["layers"].keys()) if hasattr(store.get("layers"), "keys") else ()
    for key in layers:
        places[f"layers['{key}']"] = stored(f"layers['{key}']", f"layers/{key}", "var")
    # Read now: a damaged table is then reported when the file is opened, not in the middle of the work.
    frame("var")
    return Opened(
        label=f"'{path}'",
        source=path.name,
        obs=frame("obs"),
        obsm=_Lazy(
            tuple(store["obsm"].keys()) if hasattr(store.get("obsm"), "keys") else (), matrix
        ),
        places=places,
        layers=layers,
        close=close,
    )


def _check_columns(table: Any, key: str, path: Path) -> None:
    """Raise an error for a column that is longer or shorter than the index, before any of them is read."""
    lengths: dict[str, int] = {}
    for name, column in _children(table) if hasattr(table, "keys") else ():
        parts = (column,)
        if not hasattr(column, "shape"):
            # Categories have a length of their own.
            parts = tuple(column[part] for part in ("codes", "values", "mask") if part in column)
        for part in parts:
            if len(getattr(part, "shape", ())) == 1:
                lengths[name] = int(part.shape[0])
    index = str(table.attrs.get("_index", ""))
    for name, length in lengths.items():
        if length != lengths.get(index, length):
            raise InputError(
                f"column {quote(name)} of {key} in '{path}' has {length:,} values",
                f"one for each of the {lengths[index]:,} rows",
                "The file is damaged; write it again from its source",
            )


def _checked_frame(frame: Any, key: str, path: Path) -> pd.DataFrame:
    """Return a table that was read, if it is one, with names of bounded length."""
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise InputError(
            f"{key} of '{path}' is a {type(frame).__name__}",
            "a table",
            "Read the file with anndata and write it again with write_h5ad",
        )
    if frame.index.dtype.kind in "OST" or str(frame.index.dtype).startswith("str"):
        longest = max((len(str(name)) for name in frame.index), default=0)
        if longest > LONGEST_TEXT:
            raise InputError(
                f"a name in {key} of '{path}' has {longest:,} characters",
                f"names of up to {LONGEST_TEXT:,} characters",
                "Correct the names, and write the file again",
            )
    return frame


def check_copy_source(path: Path) -> None:
    """Raise an error if results cannot be added to a copy of an ``.h5ad`` file, before any work is done.

    Args:
        path: The file.

    Raises:
        InputError: It refers to another file, or its tables and groups are stored as by anndata before version 0.7.
    """
    file, close = open_hdf5(path)
    try:
        for name in _GROUPS:
            element = file.get(name)
            known = element is None or hasattr(element, "keys")
            if known and (name != "obs" or element is None or "column-order" in element.attrs):
                continue
            raise InputError(
                f"'{name}' of '{path}' is not stored as a group with an encoding; anndata before 0.7 wrote such files",
                "a file written by a current anndata, to which results can be added",
                "Read it with anndata.read_h5ad and write it again with write_h5ad",
            )
    except (OSError, KeyError, RuntimeError) as error:
        raise InputError(unreadable(path, error)) from error
    finally:
        close()
