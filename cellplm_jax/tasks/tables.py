"""Tables of results and lists of names as text files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cellplm_jax.errors import InputError, explain
from cellplm_jax.storage import atomic_write
from cellplm_jax.tasks.embed import check_output

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What separates the columns of a table, by the ending of its name; ``.gz`` may follow."""


def check_table(path: str | os.PathLike) -> Path:
    """Return the path of a table that can be written, before any work is done.

    Args:
        path: Ends in one of :data:`SEPARATORS`, compressed where ``.gz`` follows.

    Raises:
        InputError: It has another ending, or nothing can be written there.
    """
    path = Path(path).expanduser()
    if Path(path.name.removesuffix(".gz")).suffix not in SEPARATORS:
        msg = explain(
            f"the table '{path}' has no ending that is known",
            "a name that ends in .csv, .tsv, .csv.gz or .tsv.gz",
            "Rename it",
        )
        raise InputError(msg)
    check_output(path)
    return path


def write_table(table: pd.DataFrame, path: str | os.PathLike, *, index: bool = False) -> None:
    """Write a table; it appears whole or not at all. Numbers have six digits.

    Args:
        table: What to write.
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
    """Return names that were given as a file, one a line, or as text.

    Args:
        text: Path of an existing file, or the names themselves.
        separator: Between names that are not a file; None: the text is one name.

    Raises:
        InputError: The file holds no text.
    """
    path = Path(text)
    if path.is_file():
        try:
            found = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            msg = explain(f"'{text}' cannot be read ({error})", "a text file", "Check it")
            raise InputError(msg) from error
    else:
        found = [text] if separator is None else text.split(separator)
    return [name.strip() for name in found if name.strip()]
