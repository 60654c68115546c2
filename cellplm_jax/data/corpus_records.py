"""Checks of ``corpus.json`` and ``parts/NAME.json``: types, sizes and sums, before an array is opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from cellplm_jax.errors import InputError, quote

FORMAT = 1
"""Version of the corpus format; a reader rejects other versions."""

LARGEST_NUMBER = 2**48
"""Maximum number of cells or stored counts of a corpus."""

Test = Callable[[Any], bool]


def _number(value: Any) -> bool:
    # JSON's true is an int in Python.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_NUMBER


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value)) and len(set(value)) == len(value)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(map(_object, value))


def _digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _file_name(value: Any) -> bool:
    return _text(value) and value not in ("", ".", "..") and "/" not in value and "\0" not in value


def _checksums(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(sums, list) and all(map(_number, sums)) for sums in value.values()
    )


_RECORD: dict[str, Test] = {
    "name": _file_name,
    "dataset": _text,
    "vocabulary": _digest,
    "cells": _number,
    "nonzeros": _number,
    "genes_measured": _number,
    "measured": _text,
    "labels": _texts,
    "samples": _rows,
    "checksums": _checksums,
    "source": _object,
}
_SAMPLE: dict[str, Test] = {
    "name": _text,
    "platform": _text,
    "cells": _number,
    "nonzeros": _number,
    "first_cell": _number,
    "first_nonzero": _number,
    "spatial": lambda value: isinstance(value, bool),
}
_INDEX: dict[str, Test] = {
    "vocabulary": _object,
    "totals": _object,
    "datasets": _texts,
    "platforms": _texts,
    "label_names": _texts,
    "parts": _rows,
}
_ENTRY: dict[str, Test] = {
    "name": _file_name,
    "dataset": _text,
    "source": _object,
    "samples": _number,
    "cells": _number,
    "nonzeros": _number,
    "sha256": _digest,
}
_ARRAYS = ("X/indices", "X/data", "X/indptr", "obsm/spatial", "obs/label/codes")


def _require(
    value: Mapping[str, Any],
    tests: Mapping[str, Test],
    where: str,
) -> None:
    """Raise an error for a missing field, or one of the wrong type or size."""
    for name, test in tests.items():
        if name not in value:
            raise _impossible(f"{where} has no '{name}'")
        # Measured genes of a vocabulary of any size are one text.
        if name == "measured" and isinstance(value[name], str):
            continue
        if not test(value[name]):
            raise _impossible(f"'{name}' of {where} is {quote(repr(value[name]))[1:-1]}")


def _impossible(found: str) -> InputError:
    return InputError(
        found,
        "the records that cellplm prepare wrote",
        "Copy the corpus again, or prepare it again",
    )


def check_index(index: Mapping[str, Any], path: str) -> None:
    """Raise an error for an impossible ``corpus.json``.

    Args:
        index: Its contents.
        path: The corpus, for messages.

    Raises:
        InputError: A field is missing, or has a wrong type or size.
    """
    where = f"corpus.json of '{path}'"
    _require(index, _INDEX, where)
    vocabulary = index["vocabulary"]
    _require(vocabulary, {"genes": _number, "sha256": _digest}, f"the vocabulary in {where}")
    for entry in index["parts"]:
        _require(entry, _ENTRY, f"a part in {where}")
    names = [entry["name"] for entry in index["parts"]]
    if len(set(names)) < len(names):
        raise _impossible(f"{where} lists a part twice")


def check_record(record: Any, name: str, genes: int) -> dict[str, Any]:
    """Return a record of a part; raise an error if it is impossible.

    Args:
        record: Contents of ``parts/NAME.json``.
        name: Name of the part.
        genes: Size of the vocabulary.

    Raises:
        InputError: A field is missing, or has a wrong type or size, or the samples are not consecutive.
    """
    where = f"parts/{name}.json"
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise _impossible(f"{where} has format {quote(found)}, not {FORMAT}")
    _require(record, _RECORD, where)
    if record["name"] != name:
        raise _impossible(f"{where} describes the part {quote(record['name'])}")
    if re.fullmatch(f"[0-9a-f]{{{2 * -(-genes // 8)}}}", record["measured"]) is None:
        raise _impossible(f"'measured' of {where} does not have one bit for each of {genes} genes")
    bits = int.from_bytes(bytes.fromhex(record["measured"]), "big")
    # Bits after the last gene fill the last byte and must be 0.
    unused = (1 << (-genes % 8)) - 1
    if bits.bit_count() != record["genes_measured"] or bits & unused:
        raise _impossible(f"'measured' of {where} does not mark {record['genes_measured']} genes")
    unknown = [array for array in record["checksums"] if array not in _ARRAYS]
    if unknown:
        raise _impossible(f"{where} has a checksum of {quote(unknown[0])}")
    cells = nonzeros = 0
    for sample in record["samples"]:
        _require(sample, _SAMPLE, f"a sample in {where}")
        # Samples follow each other without gaps: a wrong start would read cells of another sample.
        if (sample["first_cell"], sample["first_nonzero"]) != (cells, nonzeros):
            raise _impossible(
                f"sample {quote(sample['name'])} in {where} does not follow the one before"
            )
        # Bounds what a reader allocates.
        if sample["nonzeros"] > sample["cells"] * genes:
            raise _impossible(
                f"sample {quote(sample['name'])} in {where} has more counts than genes"
            )
        cells = cells + sample["cells"]
        nonzeros = nonzeros + sample["nonzeros"]
    if (cells, nonzeros) != (record["cells"], record["nonzeros"]):
        raise _impossible(f"the samples in {where} do not add up to its {record['cells']} cells")
    if any(sample["spatial"] for sample in record["samples"]) != (
        "obsm/spatial" in record["checksums"]
    ):
        raise _impossible(f"'spatial' of the samples in {where} does not fit its arrays")
    if record["labels"] and "obs/label/codes" not in record["checksums"]:
        raise _impossible(f"'labels' of {where} does not fit its arrays")
    return record


def check_entry(
    entry: Mapping[str, Any],
    record: Mapping[str, Any],
    path: str,
) -> None:
    """Raise an error if ``corpus.json`` and the record of a part disagree.

    Args:
        entry: The part in ``corpus.json``.
        record: Its record.
        path: The corpus, for messages.

    Raises:
        InputError: A number differs.
    """
    wrong = [name for name in ("dataset", "cells", "nonzeros") if entry[name] != record[name]]
    if wrong or entry["samples"] != len(record["samples"]):
        raise _impossible(
            f"corpus.json of '{path}' and parts/{entry['name']}.json disagree on {(wrong or ['samples'])[0]}"
        )


def check_names(
    index: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    path: str,
) -> None:
    """Raise an error for a data set, platform or label of a part that ``corpus.json`` does not list.

    Args:
        index: Contents of ``corpus.json``.
        records: The records by name.
        path: The corpus, for messages.

    Raises:
        InputError: A name is missing.
    """
    listed = {name: set(index[name]) for name in ("datasets", "platforms", "label_names")}
    for name, record in records.items():
        used = {
            "datasets": {record["dataset"]},
            "platforms": {row["platform"] for row in record["samples"]} - {""},
            "label_names": set(record["labels"]),
        }
        for kind, values in used.items():
            absent = values - listed[kind]
            if absent:
                raise _impossible(
                    f"'{kind}' in corpus.json of '{path}' lacks {quote(min(absent))} of parts/{name}.json"
                )
