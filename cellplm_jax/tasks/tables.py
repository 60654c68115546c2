"""Result tables and name lists as text files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cellplm_jax.errors import InputError
from cellplm_jax.storage import atomic_write
from cellplm_jax.tasks.files import check_output

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Column separators by file suffix; ``.gz`` may follow."""


def check_table(path: str | os.PathLike) -> Path:
    """Return the path of a table after checking that it can be written.

    Args:
        path: Ends in one of :data:`SEPARATORS`, compressed if ``.gz`` follows.

    Raises:
        InputError: It has another suffix, or is not writable.
    """
    path = Path(path).expanduser()
    if Path(path.name.removesuffix(".gz")).suffix not in SEPARATORS:
        raise InputError(
            f"the table '{path}' has an unknown suffix",
            "a name that ends in .csv, .tsv, .csv.gz or .tsv.gz",
            "Rename it",
        )
    check_output(path)
    return path


def write_table(
    table: pd.DataFrame,
    path: str | os.PathLike,
    *,
    index: bool = False,
) -> None:
    """Write a table atomically. Numbers have six digits.

    Args:
        table: The table.
        path: See :func:`check_table`.
        index: Write the index as the first column.

    Raises:
        InputError: See :func:`check_table`.
    """
    path = check_table(path)
    with atomic_write(path) as partial:
        table.to_csv(
            partial,
            sep=SEPARATORS[Path(path.name.removesuffix(".gz")).suffix],
            index=index,
            float_format="%.6g",
            compression="gzip" if path.suffix == ".gz" else None,
        )


def read_names(text: str, *, separator: str | None = ",") -> list[str]:
    """Return names from a file, one per line, or from text.

    Args:
        text: Path of an existing file, or the names themselves.
        separator: Separator of names in text; None: the text is one name.

    Raises:
        InputError: The file is not a text file.
    """
    # A file of this name wins over a gene of this name.
    path = Path(text)
    if path.is_file():
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"'{text}' cannot be read ({error})", "a text file", "Check the file"
            ) from error
    else:
        names = [text] if separator is None else text.split(separator)
    return [name.strip() for name in names if name.strip()]
