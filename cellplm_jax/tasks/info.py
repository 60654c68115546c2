"""Facts about models and corpora, used by ``cellplm info``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from cellplm_jax.config import to_dict
from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.display import shown
from cellplm_jax.errors import InputError
from cellplm_jax.progress import ProgressReport
from cellplm_jax.storage import is_remote
from cellplm_jax.tasks.estimator_files import read_estimator
from cellplm_jax.tasks.pretrained import load_located, resolve_source
from cellplm_jax.train.checkpoint import ESTIMATOR_FILE
from cellplm_jax.train.metrics import read_metrics


def describe(source: str | os.PathLike) -> dict[str, Any]:
    """Collect the facts about a model.

    Args:
        source: Any source for :func:`cellplm_jax.load`.

    Returns:
        A JSON-ready dictionary: ``id``, ``step``, ``card``, ``genes``, ``parameters`` (total and by module),
        ``config``, ``training`` (first and last line of each split of the metrics, if there are any); for a fitted
        estimator also ``estimator``: class, ``start_model``, labels and other names, ``facts`` of the fit with its
        scores, and the options for reading.
    """
    where, name = resolve_source(source, extra_files=(ESTIMATOR_FILE,))
    model = load_located(where, name)
    modules: dict[str, int] = {}
    for top, tree in model.params.items():
        modules[top] = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))
    training: dict[str, Any] = {}
    metrics = epath.Path(where) / "metrics.jsonl"
    if metrics.is_file():
        for row in read_metrics(metrics):
            # First and last line per split, in one pass over a long file.
            split = training.setdefault(str(row.get("split", "train")), {"first": row})
            split["last"] = row
    facts: dict[str, Any] = {}
    if (epath.Path(where) / ESTIMATOR_FILE).is_file():
        facts["estimator"] = _estimator_facts(read_estimator(where, name), model.card)
    return {
        "id": model.id,
        "step": model.step,
        "card": model.card,
        "genes": {"count": len(model.genes), "first": model.genes[:3]},
        "parameters": {"total": model.parameters, **modules},
        "config": to_dict(model.config),
        "training": training,
        **facts,
    }


def _estimator_facts(content: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about a fitted estimator from its ``estimator.json``."""
    names = {
        key: value
        for key, value in content["state"].items()
        if isinstance(value, list) and all(isinstance(item, str) for item in value) and value
    }
    return {
        "class": content["class"],
        "start_model": card.get("fine_tuned_from"),
        **names,
        "facts": content["facts"],
        "reading": {key: value for key, value in content["reading"].items() if value is not None},
    }


def describe_text(facts: dict[str, Any]) -> str:
    """Format the facts of :func:`describe` as text.

    Args:
        facts: From :func:`describe`.
    """
    lines = [f"{'model':<18} {facts['id']}"]
    if "estimator" in facts:
        lines += _estimator_lines(facts["estimator"])
    for name, value in facts["card"].items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            lines += _table_lines(name, value)
        elif not isinstance(value, dict) and name != "name":
            lines.append(f"{name:<18} {shown(value) if isinstance(value, int | float) else value}")
    first = ", ".join(facts["genes"]["first"])
    lines.append(f"{'genes':<18} {facts['genes']['count']:,} ({first}, ...)")
    lines.append(f"{'parameters':<18} {facts['parameters']['total']:,}")
    lines += [
        f"  {name:<16} {count:>12,}"
        for name, count in facts["parameters"].items()
        if name != "total"
    ]
    unused = facts["card"].get("unused_parameters") or {}
    lines += [f"  unused in the original: {name} - {why}" for name, why in unused.items()]
    lines.append("config")
    for name, value in facts["config"].items():
        if isinstance(value, dict):
            inner = ", ".join(f"{key}={item}" for key, item in value.items())
            lines.append(f"  {name:<16} {inner}")
        else:
            lines.append(f"  {name:<16} {value}")
    for split, rows in facts["training"].items():
        last = {k: v for k, v in rows["last"].items() if k not in ("split", "time", "step")}
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if isinstance(v, int | float))
        lines.append(f"{split:<18} step {rows['last'].get('step')}: {numbers}")
    return "\n".join(lines)


def _estimator_lines(estimator: dict[str, Any]) -> list[str]:
    """Return the lines about a fitted estimator: all labels, the first names of other lists, and its scores."""
    facts = estimator["facts"]
    lines = [f"{'estimator':<18} {estimator['class']}, fitted from {estimator['start_model']}"]
    for name, value in estimator.items():
        if isinstance(value, list):
            text = ", ".join(value) if name == "labels" else shown(value)
            lines.append(f"{name:<18} {text}" + (f" ({len(value)})" if len(value) > 3 else ""))
    scores = {k: v for k, v in facts.items() if isinstance(v, float) and k != "seconds"}
    lines.append(f"{'scores':<18} {shown(scores) if scores else 'none'}")
    rest = {k: v for k, v in facts.items() if k not in scores and isinstance(v, int | float | str)}
    lines += [f"{'fit':<18} {shown(rest)}", f"{'reading':<18} {shown(estimator['reading'])}"]
    return lines


def _table_lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return rows with the same keys as aligned lines: text on the left, numbers on the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(values: list[str]) -> str:
        return "  " + "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(values, widths, strict=True))
        )

    return [f"{name:<18} {len(rows)}", *map(line, [columns, *cells])]


def describe_corpus(
    path: str | os.PathLike,
    *,
    verify: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Collect the facts about a corpus.

    Args:
        path: Folder or gs:// prefix created by ``cellplm prepare``.
        verify: Read all data and compare it with its checksums.
        quiet: Disable progress output while verifying.

    Returns:
        A JSON-ready dictionary: ``path``, ``fingerprint``, ``totals``, ``vocabulary``, ``platforms``, ``label_names``,
        ``counters``, ``bytes`` (None for gs://), ``datasets`` (one row per part), ``verified``.

    Raises:
        InputError: It is not a complete corpus, or verification found damage.
    """
    corpus = open_corpus(path)
    if verify:
        total = corpus.index["totals"]["nonzeros"]
        report = ProgressReport("verifying", total, unit="counts", quiet=quiet, first="reading")
        try:
            problems = corpus.verify(report.update)
        finally:
            report.close()
        if problems:
            raise InputError("\n".join(problems))
    rows = []
    for part in corpus.parts:
        samples = part.record["samples"]
        rows.append(
            {
                "part": part.name,
                "dataset": part.record["dataset"],
                "samples": len(samples),
                "cells": part.record["cells"],
                "genes_measured": part.record["genes_measured"],
                "nonzeros": part.record["nonzeros"],
                "platforms": sorted({row["platform"] for row in samples} - {""}),
                "spatial_samples": sum(row["spatial"] for row in samples),
                "labels": len(part.record["labels"]),
                "source": part.record["source"].get("name"),
                "notes": part.record["counters"].get("notes", []),
            }
        )
    size = None
    if not is_remote(path):
        folder = Path(path).expanduser()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "path": corpus.path,
        "fingerprint": corpus.fingerprint(),
        "totals": corpus.index["totals"],
        "vocabulary": corpus.index["vocabulary"],
        "platforms": corpus.index["platforms"],
        "label_names": corpus.label_names,
        "counters": corpus.index["counters"],
        "bytes": size,
        "datasets": rows,
        "verified": verify,
    }


def describe_corpus_text(facts: dict[str, Any]) -> str:
    """Format the facts of :func:`describe_corpus` as text.

    Args:
        facts: From :func:`describe_corpus`.
    """
    totals = facts["totals"]
    chosen = facts["vocabulary"].get("chosen") or {"mode": "given"}
    how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())
    lines = [
        f"{'corpus':<12} {facts['path']}",
        f"{'fingerprint':<12} {facts['fingerprint']}",
        f"{'samples':<12} {totals['samples']:,} ({totals['spatial_samples']:,} spatial)",
        f"{'cells':<12} {totals['cells']:,}",
        f"{'counts':<12} {totals['nonzeros']:,}",
        f"{'genes':<12} {facts['vocabulary']['genes']:,} ({how})",
        f"{'labels':<12} {len(facts['label_names']):,}",
        f"{'platforms':<12} {', '.join(facts['platforms']) or 'not stated'}",
    ]
    if facts["bytes"] is not None:
        lines.append(f"{'size':<12} {facts['bytes'] / 1e6:,.1f} MB")
    reported = [f"{name.replace('_', ' ')} {n:,}" for name, n in facts["counters"].items() if n]
    lines.append(f"{'reported':<12} {', '.join(reported) or 'nothing out of the ordinary'}")
    if facts["verified"]:
        lines.append(f"{'verified':<12} every checksum agrees")
    width = max([len(row["dataset"]) for row in facts["datasets"]] + [7]) + 2
    lines += [
        "",
        f"{'dataset':<{width}}{'samples':>8}{'cells':>11}{'genes':>8}{'counts/cell':>13}"
        f"{'spatial':>9}{'labels':>8}  platform",
    ]
    for row in facts["datasets"]:
        density = row["nonzeros"] / max(1, row["cells"])
        lines.append(
            f"{row['dataset']:<{width}}{row['samples']:>8,}{row['cells']:>11,}"
            f"{row['genes_measured']:>8,}{density:>13,.0f}{row['spatial_samples']:>9,}"
            f"{row['labels']:>8,}  {', '.join(row['platforms']) or '-'}"
        )
    return "\n".join(lines)
