"""The results of ``run.py`` as Markdown: a table a stage, with what failed, was stopped or left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def number(value: Any, unit: str = "") -> str:
    """Return a number for a cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}{unit}"
    if value != value:
        return "-"
    digits = 0 if abs(value) >= 100 else 3 if abs(value) < 10 else 1
    return (f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.{digits}f}") + unit


def share(value: Any) -> str:
    """Return a share as percent."""
    return "-" if value is None or value != value else f"{100 * value:.0f} %"


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; none without rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]


def of(rows: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Return the finished rows of one kind."""
    return [
        row
        for row in rows
        if row.get("what") == what and "skipped" not in row and "failed" not in row
    ]


def markdown(content: dict[str, Any]) -> str:
    """Return all results so far.

    Args:
        content: What ``gpu.json`` holds.
    """
    stages = content["stages"]
    device = next(iter(of(stages["a"]["rows"], "device")), {})
    versions = ", ".join(f"{k} {v}" for k, v in device.get("versions", {}).items())
    lines = ["# On a GPU", ""]
    if content["rehearsal"]:
        lines += ["**A rehearsal on a CPU with everything small: no number here is of a GPU.**", ""]
    lines += [
        f"`python benchmarks/gpu/run.py --minutes {content['minutes']:g}`, {content['date']}: "
        f"{device.get('device', 'unknown device')} ({device.get('nvidia_smi', '-')}), host {device.get('host', '-')}, "
        f"{versions or 'versions unknown'}. Took {content.get('seconds', 0):.0f} s.",
    ]
    writers = {
        "a": _card, "b": _parity, "c": _embedding, "d": _training, "e": _end, "f": _profile,
        "g": _model,
    }  # fmt: skip
    for name, stage in stages.items():
        rows = stage["rows"]
        if not rows and not stage["parts"]:
            continue
        lines += ["", f"## {stage['title']}", *writers[name](rows)]
        for row in rows:
            if "failed" in row or "skipped" in row:
                why = (
                    f"failed: {row['failed']}" if "failed" in row else f"left out: {row['skipped']}"
                )
                side = f" ({row['side']})" if "side" in row else ""
                lines += ["", f"- {row.get('what', row['part'])}{side}: {why}"]
        for part, outcome in stage["parts"].items():
            if outcome != "done":
                lines += ["", f"- part {part}: {outcome}"]
    return "\n".join(lines) + "\n"


def _card(rows):
    found = []
    for row in of(rows, "peak"):
        rate = (
            f"{row['flops'] / 1e12:,.2f} TFLOP/s"
            if "flops" in row
            else f"{row['bandwidth'] / 1e9:,.1f} GB/s"
        )
        found.append([row["precision"], rate])
    return table(["measured peak", ""], found)


def _parity(rows):
    found = [
        [row["case"], row["precision"], number(row["value_error"]), row["worst"],
         number(row["gradient_error"]), {True: "holds", False: "**does not hold**", None: "stated"}[row["holds"]]]
        for row in of(rows, "parity")
    ]  # fmt: skip
    names = ["case", "precision", "largest error of a value", "of", "of a gradient", "1e-4, 1e-3"]
    return table(names, found)


def _embedding(rows):
    whole, first = of(rows, "embedding"), of(rows, "first product")
    theirs = {row["cells"]: row["cells_per_second"] for row in whole if row["side"] == "original"}
    found = []
    for row in whole:
        # Where the original did not run that many cells: its best.
        base = theirs.get(row["cells"]) or max(theirs.values(), default=None)
        found.append(
            [row["side"], row["way"], number(row["cells"]), row["precision"],
             number(row["cells_per_second"]), number(base and row["cells_per_second"] / base),
             share(row.get("share_of_floor")), row.get("binds") or "-", number(row.get("first_seconds"))]
        )  # fmt: skip
    names = ["side", "counts", "cells", "precision", "cells/s", "times the original", "of the roofline", "binds",
             "first run, s"]  # fmt: skip
    lines = table(names, found)
    found = [
        [row["way"], row["precision"], number(row["cells"]), number(row["cells_per_second"])] for row in first
    ]  # fmt: skip
    return lines + table(["first product", "precision", "cells", "cells/s"], found)


def _training(rows):
    whole = of(rows, "training")
    theirs = max((r["cells_per_second"] for r in whole if r["side"] == "original"), default=None)
    found = []
    for row in whole:
        ours = row["side"] == "ours"
        found.append(
            [f"{row['model']}, {row['parameters'] / 1e6:,.0f} M" if ours else "original, 82 M",
             f"{row['rows']} x {row['cells'] // row['rows']:,}" if ours else number(row["cells"]),
             row["precision"], number(row.get("chunk_cells")), number(row.get("recomputed")), row.get("level", "-"),
             number(row["cells_per_second"]), number(theirs and row["cells_per_second"] / theirs),
             share(row.get("utilisation")), number(row.get("memory_gib")), number(row.get("first_seconds"))]
        )  # fmt: skip
    names = ["model", "rows x cells", "precision", "chunk", "recomputed", "level", "cells/s", "times the original",
             "model-FLOP utilisation", "peak GiB", "first step, s"]  # fmt: skip
    return table(names, found)


def _end(rows):
    found = [
        [row["task"], number(row.get("cells", row.get("steps"))), number(row["seconds"]),
         number(row.get("cells_per_second")), share(row.get("waiting_share", row.get("data_wait"))),
         share(row.get("model_flop_utilisation"))]
        for row in of(rows, "end to end")
    ]  # fmt: skip
    names = ["task", "cells or steps", "s", "cells/s", "time waiting for data", "utilisation"]
    return table(names, found)


def _profile(rows):
    lines = []
    for row in of(rows, "profile"):
        lines += [
            "",
            f"{row['of']}: {number(row['seconds'])} s, kernels {number(row['busy_seconds'])} s.",
        ]
        found = [
            [str(k["place"]), f"`{k['kernel']}`", number(1e3 * k["seconds"]), number(k["launches"]),
             share(k["share"]), k["removed_by"]]
            for k in of(rows, "kernel")
            if k["of"] == row["of"]
        ]  # fmt: skip
        lines += table(["", "kernel", "ms", "launches", "share", "what would remove it"], found)
    return lines


def _model(rows):
    found = [
        [row["model"], f"{row['parameters'] / 1e6:,.1f} M", number(row["step"]), f"`{row['file']}`",
         number(row["megabytes"])]
        for row in of(rows, "checkpoint")
    ]  # fmt: skip
    return _end(rows) + table(["model", "parameters", "step", "file", "MB"], found)
