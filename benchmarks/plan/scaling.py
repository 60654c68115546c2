"""Write the table of ``docs/scaling.md``: the training step of two configurations compiled for four slices.

Needs the extra ``tpu`` (the compiler) and hours of nothing else; each finished row is kept in the JSON file, so that an
interrupted run goes on where it stopped::

    python benchmarks/plan/scaling.py benchmarks/plan/scaling.json docs/scaling.md
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cellplm_jax.plan.roofline import RESOURCES
from cellplm_jax.plan.search import change, complete, load_config, mesh_text, plan

CONFIGURATIONS = ("85m", "1b")
TOPOLOGIES = ("v5e-16", "v5e-256", "v5p-256", "v6e-256")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WHAT_BINDS = {
    "products": "products",
    "memory": "HBM",
    "interconnect": "links",
    "elements": "single elements",
}


def gibibytes(size: float) -> str:
    """Return bytes as GiB with one digit behind the point."""
    return f"{size / 2**30:.1f}"


def compilation(entry: dict[str, Any]) -> str:
    """Return how long a compilation took; the wall time depends on what else the machine did."""
    return f"{entry['compile_seconds']:.0f} ({entry['compile_processor_seconds']:.0f})"


def sparse(device: dict[str, Any], chip: str) -> str:
    """Return what SparseCores scatter and gather; rows of before that was counted do not know."""
    count = device.get("sparse_elements", None if chip in ("v5p", "v6e") else 0)
    if count is None:
        return " + ?"
    return f" + {count / 1e6:.0f}" if count else ""


def row(key: str, report: dict[str, Any]) -> str:
    """Return one line of the table."""
    configuration, accelerator = key.split(" ", 1)
    best = report["best"]
    tried = report["tried"]
    entry = tried[best] if best is not None else min(tried, key=lambda part: part["shortage"])
    memory = entry["memory"]
    cells = [
        f"`:{configuration}`",
        f"{accelerator} ({report['devices']} chips)",
        f"`{mesh_text(entry['mesh'])}`",
        f"{entry['rows']:,}",
        f"{gibibytes(memory['total'])} of {gibibytes(memory['available'])}",
    ]
    if best is None:
        reason = f"does not fit: {gibibytes(entry['shortage'])} GiB too much"
        return "| " + " | ".join([*cells, reason, *["-"] * 6, compilation(entry)]) + " |"
    device, seconds = entry["device"], entry["seconds"]
    sent = sum(part["sent"] for part in device["collectives"])
    kinds = sorted({part["kind"] for part in device["collectives"]})
    cells += [
        f"{device['flops'] / 1e12:.2f}",
        f"{device['memory_bytes'] / 1e9:.1f}",
        f"{sent / 1e9:.2f} ({', '.join(kinds)})",
        f"{device['elements'] / 1e6:.0f}{sparse(device, report['chip']['name'])}",
        " / ".join(f"{seconds[name] * 1e3:.1f}" for name in RESOURCES),
        WHAT_BINDS[entry["binds"]],
        f"{seconds['schedule'] * 1e3:.0f}",
        compilation(entry),
    ]
    return "| " + " | ".join(cells) + " |"


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    titles = [
        "configuration",
        "slice",
        "mesh",
        "rows a step",
        "memory a chip (GiB)",
        "TFLOP in products",
        "HBM traffic (GB)",
        "sent over links (GB)",
        "single elements (M)",
        "ms: products / HBM / links / elements",
        "binds",
        "compiler's schedule (ms)",
        "compiled in (s), and processor time (s)",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += [row(key, report) for key, report in reports.items()]
    pairs = [f"{name} {topology}" for name in CONFIGURATIONS for topology in TOPOLOGIES]
    missing = ", ".join(f"`:{key}`" for key in pairs if key not in reports)
    if missing:
        lines += ["", f"Not compiled yet: {missing}."]
    return "\n".join(lines)


def main() -> None:
    """Compile what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="file with the finished rows")
    parser.add_argument("markdown", type=Path, help="document with the table's marks in it")
    parser.add_argument("--configurations", nargs="*", default=CONFIGURATIONS)
    parser.add_argument("--topologies", nargs="*", default=TOPOLOGIES)
    parser.add_argument("--mesh", help="one mesh instead of a choice")
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--label", default="", help="added to the configuration's name")
    arguments = parser.parse_args()
    finished: dict[str, Any] = {}
    if arguments.json.exists():
        finished = json.loads(arguments.json.read_text(encoding="utf-8"))
    reports = finished.setdefault("reports", {})
    for name in arguments.configurations:
        for topology in arguments.topologies:
            key = f"{name}{arguments.label} {topology}"
            if key in reports:
                continue
            config = complete(change(load_config(name), arguments.set))
            report = plan(
                config,
                topology,
                mesh=arguments.mesh,
                tries=arguments.tries,
                say=lambda text, key=key: print(f"{key}: {text}", file=sys.stderr, flush=True),
            )
            reports[key] = report
            finished["versions"] = {
                package: importlib.metadata.version(package) for package in ("jax", "libtpu")
            }
            finished["cores"] = os.cpu_count()
            finished["date"] = datetime.date.today().isoformat()
            arguments.json.write_text(json.dumps(finished, indent=1) + "\n", encoding="utf-8")
    text = arguments.markdown.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    arguments.markdown.write_text(
        f"{before}{BEGIN}\n{table(reports)}\n{END}{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
