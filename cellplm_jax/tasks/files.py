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

from cellplm_jax.data.anndata_io import nullable_strings
from cellplm_jax.errors import InputError, explain
from cellplm_jax.storage import atomic_write

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
        import zarr

        try:
            # The summary of all metadata would hide entries that are added.
            group = zarr.open_group(str(path), mode=mode, use_consolidated=False)  # type: ignore[arg-type]
        except Exception as error:
            raise InputError(
                f"'{path}' is a directory without a zarr group",
                "an .h5ad file or a .zarr store of AnnData",
            ) from error
        yield group
        if mode == "r+":
            import warnings

            with warnings.catch_warnings():
                # anndata writes this summary too; readers of other languages may ignore it.
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(group.store)
        return
    if not path.is_file() or not h5py.is_hdf5(path):
        raise InputError(
            f"'{path}' is not an .h5ad file" if path.exists() else f"'{path}' does not exist",
            "an .h5ad file or a .zarr store of AnnData",
            "Check the path",
        )
    with h5py.File(path, mode) as file:
        yield file


def as_anndata(data: AnnData | str | os.PathLike) -> AnnData:
    """Return an AnnData unchanged, or read one from an ``.h5ad`` file or a ``.zarr`` store into memory.

    Args:
        data: The AnnData, or a path.

    Raises:
        InputError: It is neither, or the file cannot be read.
    """
    import anndata

    if isinstance(data, anndata.AnnData):
        return data
    if not isinstance(data, str | os.PathLike):
        raise InputError(
            f"data of type {type(data).__name__}",
            "an AnnData, or the path of an .h5ad file or a .zarr store",
            "Wrap a matrix as anndata.AnnData(X, obs=..., var=...)",
        )
    path = Path(data).expanduser()
    with open_store(path):
        pass
    try:
        return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)
    except Exception as error:
        raise InputError(
            f"'{path}' cannot be read as an AnnData ({type(error).__name__}: {error})",
            "a complete file written by AnnData",
            "Write it again from its source",
        ) from error


def read_obs(data: AnnData | str | os.PathLike) -> pd.DataFrame:
    """Return ``obs`` of an AnnData, or of an ``.h5ad`` file or a ``.zarr`` store without its counts.

    Args:
        data: The AnnData, or a path.
    """
    if not isinstance(data, str | os.PathLike):
        return data.obs
    from anndata.io import read_elem

    with open_store(data) as file:
        obs: Any = read_elem(file["obs"])
    return obs


def check_key(key_added: str) -> None:
    """Reject a name that cannot be a key of an AnnData file.

    Args:
        key_added: The name.

    Raises:
        InputError: It is empty or contains a slash.
    """
    if not key_added or "/" in key_added:
        msg = explain(
            f"key_added = {key_added!r}",
            "a name without '/', which files would take for a folder",
            "Pass another key_added (--key-added)",
        )
        raise InputError(msg)


def check_output(out: Path) -> None:
    """Reject a path to which no file can be written, before any work is done.

    Args:
        out: Path of the output file.

    Raises:
        InputError: Its folder does not exist, or it is itself a folder.
    """
    parent = out.parent
    if not parent.is_dir():
        msg = explain(
            f"the directory '{parent}' of the output does not exist",
            "an existing directory",
            f"Create it: mkdir -p {parent}",
        )
        raise InputError(msg)
    if out.is_dir() or not os.access(parent, os.W_OK):
        msg = explain(
            f"'{out}' cannot be written",
            "a file name in a writable directory",
            "Name another output",
        )
        raise InputError(msg)


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
    if out.exists() and path.exists() and out.samefile(path):
        msg = explain(
            f"input and output are both '{path}'",
            "two different files",
            "Name another output",
        )
        raise InputError(msg)


def write_copy(
    path: Path,
    out: Path,
    *,
    obs: Mapping[str, Any] | None = None,
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
        obsm: Matrices with one row per cell, by name.
        obsp: Matrices with one entry per pair of cells, by name.
        layers: Layers by name.
        uns: Anything AnnData can write, by name.
    """
    import pandas as pd
    from anndata.io import read_elem, write_elem

    with atomic_write(out) as partial:
        if path.is_dir():
            shutil.copytree(path, partial)
        else:
            shutil.copyfile(path, partial)
            os.chmod(partial, 0o644)
        with open_store(partial, "r+") as file, nullable_strings():
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
                    if group not in file:
                        write_elem(file, group, {})
                    write_elem(file[group], name, value)
            for name, value in (obs or {}).items():
                table = file["obs"]
                write_elem(table, name, value)
                order = [str(column) for column in table.attrs["column-order"]]
                if name not in order:
                    order.append(name)
                table.attrs["column-order"] = (
                    order if path.is_dir() else np.array(order, dtype=h5py.string_dtype())
                )


def read_annotations(
    path: str | os.PathLike, *, obsm: Sequence[str] = (), uns: Sequence[str] = ()
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
        obs: Any = read_elem(file["obs"])
        found = {
            group: {
                name: read_elem(file[f"{group}/{name}"]) for name in names if name in file[group]
            }
            for group, names in (("obsm", obsm), ("uns", uns))
            if group in file
        }
    return anndata.AnnData(obs=obs, **found)
