"""Files of cells, ``.h5ad`` and ``.zarr``: opening, checks before any work, copies with additional entries."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from cellplm_jax.data.anndata_files import (
    check_copy_source,
    check_tree,
    open_hdf5,
    open_zarr,
    unreadable,
)
from cellplm_jax.data.anndata_io import nullable_strings
from cellplm_jax.errors import InputError
from cellplm_jax.storage import atomic_write, check_replaceable, reserve
from cellplm_jax.untrusted import READ_ERRORS, require_options

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@contextlib.contextmanager
def open_store(path: str | os.PathLike, mode: str = "r") -> Iterator[Any]:
    """Open an ``.h5ad`` file or a ``.zarr`` store as a group; both have the same interface.

    Args:
        path: The file or the directory.
        mode: ``"r"`` or ``"r+"``.

    Yields:
        The root group of h5py or zarr.

    Raises:
        InputError: It is neither.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        # The summary of all metadata would hide entries that are added.
        group = open_zarr(path, mode, use_consolidated=False)
        yield group
        if mode == "r+":
            import warnings

            import zarr

            with warnings.catch_warnings():
                # anndata writes this summary too; readers of other languages may ignore it.
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(group.store)
        return
    if not path.exists():
        raise InputError(
            f"'{path}' does not exist",
            "an .h5ad file or a .zarr store of AnnData",
            "Check the path",
        )
    file, close = open_hdf5(path, mode)
    try:
        yield file
    finally:
        close()


def as_anndata(data: AnnData | str | os.PathLike) -> AnnData:
    """Return an AnnData unchanged, or read one from an ``.h5ad`` file or a ``.zarr`` store into memory.

    Args:
        data: The AnnData, or a path.

    Raises:
        InputError: It is neither, the file cannot be read, or nothing can be added to the AnnData.
    """
    import anndata

    if isinstance(data, anndata.AnnData):
        if getattr(data, "isbacked", False) and getattr(data, "is_view", False):
            raise InputError(
                "the AnnData is a view of a file opened with backed='r'",
                "an AnnData to which results can be added",
                "Load the cells into memory first: adata = adata.to_memory()",
            )
        return data
    if not isinstance(data, str | os.PathLike):
        raise InputError(
            f"data of type {type(data).__name__}",
            "an AnnData, or the path of an .h5ad file or a .zarr store",
            "Wrap a matrix as anndata.AnnData(X, obs=..., var=...)",
        )
    path = Path(data).expanduser()
    with open_store(path) as file:
        check_tree(file, path)
    try:
        return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)
    except READ_ERRORS as error:
        raise InputError(unreadable(path, error)) from error


def read_obs(data: AnnData | str | os.PathLike) -> pd.DataFrame:
    """Return ``obs`` of an AnnData, or of an ``.h5ad`` file or a ``.zarr`` store without its counts.

    Args:
        data: The AnnData, or a path.
    """
    if not isinstance(data, str | os.PathLike):
        return data.obs
    from anndata.io import read_elem

    with open_store(data) as file:
        check_tree(file["obs"], Path(data))
        obs: Any = read_elem(file["obs"])
    return obs


def check_key(key_added: str) -> None:
    """Reject a name that cannot be a key of an AnnData file.

    Args:
        key_added: The name.

    Raises:
        InputError: It is no text, is empty or contains a slash.
    """
    require_options({"key_added": key_added})
    if not key_added or "/" in key_added or "\0" in key_added:
        raise InputError(
            f"key_added = {key_added!r}",
            "a name without '/', which files would take for a folder",
            "Pass another key_added (--key-added)",
        )


def check_output(out: Path) -> None:
    """Reject a path to which no file can be written, before any work is done.

    Args:
        out: Path of the output file.

    Raises:
        InputError: Its folder does not exist, or it is a folder, a device, a pipe or a socket.
    """
    if len(os.fsencode(out.name)) > 255:
        raise InputError(
            f"the name of the output has {len(os.fsencode(out.name))} bytes",
            "255 or fewer, which file systems allow",
            "Choose a shorter name",
        )
    parent = out.parent
    if not parent.is_dir():
        raise InputError(
            f"the directory '{parent}' of the output does not exist",
            "an existing directory",
            f"Create it: mkdir -p {parent}",
        )
    check_replaceable(out)
    if out.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"'{out}' cannot be written",
            "a file name in a writable directory",
            "Name another output",
        )


def check_copy(path: Path, out: Path) -> None:
    """Reject a copy that cannot be written, before any work is done.

    Args:
        path: Input, an ``.h5ad`` file or a ``.zarr`` store.
        out: Path of the copy.

    Raises:
        InputError: Input and output are the same, are of different kinds, or see :func:`check_output`.
    """
    check_output(out)
    if path.is_dir() != (out.suffix == ".zarr"):
        kind = ".zarr" if path.is_dir() else ".h5ad"
        raise InputError(
            f"the output '{out.name}' is of another kind than the input '{path.name}'",
            f"a name that ends in {kind}, because the output is a copy of the input",
            f"Name it '{out.with_suffix(kind).name}'",
        )
    if path.is_dir():
        with open_store(path):
            pass
    elif path.exists():
        check_copy_source(path)
    if out.exists() and path.exists() and out.samefile(path):
        raise InputError(
            f"input and output are both '{path}'",
            "two different files",
            "Name another output",
        )


def write_copy(
    path: Path,
    out: Path,
    *,
    obs: Mapping[str, Any] | None = None,
    var: Mapping[str, Any] | None = None,
    obsm: Mapping[str, Any] | None = None,
    obsp: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    uns: Mapping[str, Any] | None = None,
) -> None:
    """Write a copy of an ``.h5ad`` file or a ``.zarr`` store with additional entries; an atomic write.

    Args:
        path: Input; never changed.
        out: Output.
        obs: Columns (arrays or categoricals) by name; an existing column is replaced.
        var: Likewise.
        obsm: Matrices with one row per cell, by name.
        obsp: Matrices with one entry per pair of cells, by name.
        layers: Layers by name.
        uns: Anything AnnData can write, by name.
    """
    import pandas as pd
    from anndata.io import read_elem, write_elem

    # HDF5 can end the process with SIGSEGV if the disk is full while a file is closed.
    room = sum(
        _bytes_of(value)
        for group in (obs, var, obsm, obsp, layers, uns)
        for value in (group or {}).values()
    )
    parts = path.rglob("*") if path.is_dir() else [path]
    room += sum(part.stat().st_size for part in parts if part.is_file())
    with atomic_write(out, room=room) as partial:
        if path.is_dir():
            shutil.copytree(path, partial)
        else:
            shutil.copyfile(path, partial)
            # Readable by others, whatever the mask of the process.
            os.chmod(partial, 0o644)
            reserve(partial, room)
        with open_store(partial, "r+") as file, nullable_strings():
            _reject_links(file, path, ("obs", "var", "obsm", "obsp", "layers", "uns"))
            if any(isinstance(value, pd.DataFrame) for value in (obsm or {}).values()):
                # AnnData opens a file only if the index of a table is stored in the same way as the names of its cells.
                cells: Any = read_elem(file["obs"])
                obsm = {
                    name: value.set_axis(cells.index) if isinstance(value, pd.DataFrame) else value
                    for name, value in (obsm or {}).items()
                }
            added = (("obsm", obsm), ("obsp", obsp), ("layers", layers), ("uns", uns))
            for group, values in added:
                for name, value in (values or {}).items():
                    # Files of other tools may lack a group.
                    if group not in file:
                        write_elem(file, group, {})
                    options: Any = {}
                    if not path.is_dir() and _compresses(value):
                        options = {"compression": "gzip", "shuffle": True}
                        if isinstance(value, np.ndarray):
                            # Few columns per chunk: readers of a layer take single genes.
                            options["chunks"] = tuple(
                                map(min, zip((1024, 16), value.shape, strict=True))
                            )
                    write_elem(file[group], name, value, dataset_kwargs=options)
            for table, columns in ((file["obs"], obs), (file["var"], var)):
                for name, value in (columns or {}).items():
                    write_elem(table, name, value)
                    order = [str(column) for column in table.attrs["column-order"]]
                    if name not in order:
                        order.append(name)
                    table.attrs["column-order"] = (
                        order if path.is_dir() else np.array(order, dtype=h5py.string_dtype())
                    )


def _compresses(value: Any) -> bool:
    """Return whether an entry is sparse, or a large matrix of numbers whose lower bytes are 0, such as rounded ones."""
    if hasattr(value, "indptr"):
        return True
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim != 2:
        return False
    # A sample of the rows decides: rounding applies to all or to none.
    some = np.ascontiguousarray(value[:: -(-len(value) // 512) or 1])
    return value.nbytes > 2**16 and not (some.view(np.uint32) & 0xFFFF).any()


def _bytes_of(value: Any) -> int:
    """Return the size of an entry in a file, at least."""
    if hasattr(value, "data") and hasattr(value, "indptr"):  # sparse
        return value.data.nbytes + value.indices.nbytes + value.indptr.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values())) + 2**10
    usage: Any = getattr(value, "memory_usage", None)
    size = np.sum(usage()) if usage is not None else getattr(value, "nbytes", 2**10)
    return int(size) + 2**12


def _reject_links(file: Any, path: Path, names: Sequence[str]) -> None:
    """Reject groups that are links: the entries would be written into another file."""
    # A zarr store has no links, and open_zarr rejects those of the file system.
    for name in names if isinstance(file, h5py.Group) else ():
        link = file.get(name, getlink=True) if name in file else None
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            raise InputError(
                f"'{name}' of '{path}' is a link to other data",
                "a group in the file itself, because the output is added to it",
                "Read the file with anndata and write it again",
            )


def read_annotations(
    path: str | os.PathLike,
    *,
    obsm: Sequence[str] = (),
    uns: Sequence[str] = (),
) -> AnnData:
    """Read the annotations of the cells of an ``.h5ad`` file or a ``.zarr`` store, without their counts.

    Args:
        path: The file.
        obsm: Names of matrices to read, if present.
        uns: Names of entries of ``uns`` to read, if present.

    Returns:
        AnnData with ``obs`` and these entries, without ``X``.
    """
    import anndata
    from anndata.io import read_elem

    with open_store(path) as file:
        for name in (
            "obs",
            *(
                f"{group}/{name}"
                for group, names in (("obsm", obsm), ("uns", uns))
                for name in names
            ),
        ):
            if name in file:
                check_tree(file[name], Path(path))
        obs: Any = read_elem(file["obs"])
        found = {
            group: {
                name: read_elem(file[f"{group}/{name}"]) for name in names if name in file[group]
            }
            for group, names in (("obsm", obsm), ("uns", uns))
            if group in file
        }
    return anndata.AnnData(obs=obs, **found)
