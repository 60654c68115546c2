"""Run the campaigns of ``tests/faults``: damage, kills, signals, full disks, hostile and careless input.

    python tools/faults.py --hours 2
    python tools/faults.py --campaign damage --cases 2000 --out benchmarks/faults/damage
    python tools/faults.py --campaign damage --seed 1234 --cases 1

Every case depends on its seed only. A failure prints its seed and the command that repeats it. The exit status is 1 if
a case failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.outcome import Outcome  # noqa: E402


def campaigns() -> list[str]:
    """Return the names of all campaigns."""
    return sorted(p.stem.removeprefix("campaign_") for p in ROOT.glob("tests/faults/campaign_*.py"))


def main() -> int:
    """Run the campaigns round-robin until the time or the number of cases is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--campaign", action="append", choices=campaigns(), help="all by default")
    parser.add_argument("--hours", type=float, default=1.0, metavar="N")
    parser.add_argument("--cases", type=int, metavar="N", help="maximum number per campaign")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--out", type=Path, help="write the tables to OUT.md")
    arguments = parser.parse_args()
    names = arguments.campaign or campaigns()
    until = time.monotonic() + 3600 * arguments.hours
    began, processor = time.monotonic(), os.times()
    table: dict[str, list[Outcome]] = defaultdict(list)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="cellplm-faults-") as folder:
        inputs, modules = {}, {}
        for name in names:
            modules[name] = importlib.import_module(f"tests.faults.campaign_{name}")
            (Path(folder) / name).mkdir()
            inputs[name] = modules[name].prepare(Path(folder) / name)
        seed, last = arguments.seed, arguments.seed + (arguments.cases or sys.maxsize)
        while seed < last and time.monotonic() < until:
            for name in names:
                outcome = modules[name].try_case(inputs[name], seed)
                table[name].append(outcome)
                if not outcome.ok:
                    failures += 1
                    again = ["python", "tools/faults.py", "--campaign", name]
                    again += ["--seed", str(seed), "--cases", "1"]
                    print(f"FAILED {name} seed {seed}: {outcome.result}: {outcome.detail}")
                    print(f"  {shlex.join(again)}", flush=True)
            seed += 1
            if sum(map(len, table.values())) % 100 < len(names):
                done = {name: len(outcomes) for name, outcomes in table.items()}
                print(f"{time.monotonic() - began:.0f} s: {done}", file=sys.stderr, flush=True)
    now = os.times()
    used = sum(now[:4]) - sum(processor[:4])
    text = report(table, arguments.seed, failures, time.monotonic() - began, used)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
    return 1 if failures else 0


def report(
    table: dict[str, list[Outcome]], seed: int, failures: int, seconds: float, used: float
) -> str:
    """Return the tables as Markdown."""
    lines = [
        "# Faults",
        "",
        f"Made by `tools/faults.py`, seeds from {seed}, on {os.cpu_count()} shared CPU cores: {seconds / 60:.0f} "
        f"minutes, {used / 60:.1f} minutes of processor time. {failures} failures.",
    ]
    for name, outcomes in table.items():
        results = sorted({outcome.result for outcome in outcomes})
        timed = any(outcome.seconds for outcome in outcomes)
        head = ["", "cases", *results, *(["longest, s"] if timed else [])]
        lines += ["", f"## {name}, {len(outcomes)} cases", ""]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for kind in sorted({outcome.kind for outcome in outcomes}):
            own = [outcome for outcome in outcomes if outcome.kind == kind]
            counts = Counter(outcome.result for outcome in own)
            row = [kind, str(len(own)), *(str(counts[result] or "") for result in results)]
            if timed:
                row.append(f"{max(outcome.seconds for outcome in own):.1f}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
