"""What a model is: the facts behind ``cellplm info``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cellplm_jax.config import to_dict
from cellplm_jax.tasks.pretrained import load
from cellplm_jax.train.metrics import read_metrics


def describe(source: str | os.PathLike) -> dict[str, Any]:
    """Collect the facts about a model.

    Args:
        source: Anything :func:`cellplm_jax.load` opens.

    Returns:
        A JSON-ready dictionary: ``id``, ``step``, ``card``, ``genes``, ``parameters`` (total and by module),
        ``config``, ``training`` (first and last line of each split of the metrics, where there are any).
    """
    model = load(source)
    modules: dict[str, int] = {}
    for top, tree in model.params.items():
        modules[top] = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))
    training: dict[str, Any] = {}
    metrics = Path(source) / "metrics.jsonl"
    if metrics.is_file():
        for row in read_metrics(metrics):
            split = training.setdefault(row.get("split", "train"), {"first": row})
            split["last"] = row
    return {
        "id": model.id,
        "step": model.step,
        "card": model.card,
        "genes": {"count": len(model.genes), "first": model.genes[:3]},
        "parameters": {"total": model.parameters, **modules},
        "config": to_dict(model.config),
        "training": training,
    }


def describe_text(facts: dict[str, Any]) -> str:
    """Write the facts of :func:`describe` for reading.

    Args:
        facts: From :func:`describe`.
    """
    lines = [f"{'model':<18} {facts['id']}"]
    lines += [
        f"{name:<18} {value}"
        for name, value in facts["card"].items()
        if not isinstance(value, dict) and name != "name"
    ]
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
        shown = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if v is not None)
        lines.append(f"{split:<18} step {rows['last']['step']}: {shown}")
    return "\n".join(lines)
