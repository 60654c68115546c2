"""Mutation testing: change the code of the losses, attention, masking and latent a little; the tests must notice.

    python tools/mutation.py --sample 120 --out benchmarks/faults/mutation.md
    python tools/mutation.py --only masking --all
    python tools/mutation.py --show masking:17

The mutants are those of mutmut (extra ``mutation``). mutmut's own runner adds a trampoline to every function and forks
after a first run of the tests, which neither decorated functions (``nn.compact``, ``custom_vjp``) nor JAX's threads
survive. Here a process imports the libraries, and each mutant gets a fork of it, which starts JAX and runs the tests of
that module that call the changed function, fastest first, until one fails. Programs that a mutant does not change
come from a compilation cache. An interrupted run continues where ``--record`` ends.

Not mutated: type annotations, docstrings, the text of errors, and decorators.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib.abc
import importlib.util
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGETS = {
    "cellplm_jax/losses/likelihoods.py": ["tests/losses/test_likelihoods.py"],
    "cellplm_jax/losses/objectives.py": [
        "tests/losses/test_objectives.py",
        "tests/losses/test_chunked_loss.py",
    ],
    "cellplm_jax/model/attention.py": [
        "tests/model/test_attention.py",
        "tests/model/test_attention_packed.py",
    ],
    "cellplm_jax/model/latent.py": ["tests/model/test_latent.py"],
    "cellplm_jax/model/masking.py": [
        "tests/model/test_masking.py",
        "tests/model/test_masking_packed.py",
    ],
}
"""The files that are mutated, each with the tests that have to notice."""

EQUIVALENT = ROOT / "benchmarks" / "faults" / "mutation_equivalent.toml"
"""Mutants that no test can notice, each with the reason."""

LIBRARIES = (
    "pytest",
    "jax",
    "jax.numpy",
    "flax.linen",
    "optax",
    "scipy.stats",
    "sklearn.metrics",
    "anndata",
)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: The file, relative to the repository.
        number: Its position among the mutants of the file.
        line: Number of the first changed line.
        function: Name of the function or method that contains it; "" if none does.
        before: The changed lines, without indentation.
        after: What stands there instead.
        code: The whole file with the change.
    """

    path: str
    number: int
    line: int
    function: str
    before: str
    after: str
    code: str

    @property
    def name(self) -> str:
        """Short name: module and number."""
        return f"{Path(self.path).stem}:{self.number}"


def mutants(path: str) -> list[Mutant]:
    """Return all mutants of a file."""
    import libcst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        def _create_mutations(self, node: libcst.CSTNode) -> None:
            before = len(self.mutations)
            super()._create_mutations(node)
            place = self.get_metadata(PositionProvider, node, None)
            places.extend([place] * (len(self.mutations) - before))

        def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
            if isinstance(node, libcst.FunctionDef):
                return False  # also decorated ones
            if isinstance(node, libcst.Raise | libcst.Import | libcst.ImportFrom):
                return True
            # A docstring of one line in simple quotes, or of several.
            if isinstance(node, libcst.Expr) and isinstance(node.value, libcst.SimpleString):
                return True
            return super()._skip_node_and_children(node)

    source = (ROOT / path).read_text()
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    places: list = []
    wrapper = MetadataWrapper(libcst.parse_module(source))
    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    found, seen, bodies = [], {source}, functions(source)
    for mutation, place in zip(visitor.mutations, places, strict=True):
        begin, end = (starts[at.line - 1] + at.column for at in (place.start, place.end))
        old, new = map(
            wrapper.module.code_for_node, (mutation.original_node, mutation.mutated_node)
        )
        if source[begin:end] == old:
            code = source[:begin] + new + source[end:]
        else:  # parentheses around it; a hundred times slower
            code = wrapper.module.deep_replace(mutation.original_node, mutation.mutated_node).code
        if code in seen:
            continue
        seen.add(code)
        try:
            compile(code, path, "exec")
        except SyntaxError:
            continue
        line, before, after = _change(source.splitlines(), code.splitlines())
        function = next((name for name, lines in bodies.items() if line in lines), "")
        found.append(Mutant(path, len(found), line, function, before, after, code))
    return found


def functions(source: str) -> dict[str, range]:
    """Return the lines of every function and method that is not inside another function."""
    found = {}
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for item in inside:
            if isinstance(item, ast.FunctionDef):
                prefix = "" if item is node else f"{node.name}."
                found[prefix + item.name] = range(item.lineno, item.end_lineno + 1)
    return found


def _change(old: list[str], new: list[str]) -> tuple[int, str, str]:
    """Return the number of the first line that differs, and the lines that do."""
    begin = next(n for n, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    same = 0
    while same < min(len(old), len(new)) - begin and old[-1 - same] == new[-1 - same]:
        same += 1
    before, after = (
        " ".join(map(str.strip, lines[begin : len(lines) - same])) for lines in (old, new)
    )
    return begin + 1, before, after


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from the text of a mutant."""

    def __init__(self, name: str, path: str, code: str):
        self.name, self.path, self.code = name, str(ROOT / path), code

    def find_spec(self, fullname, path=None, target=None):
        """Return where to load the module from; None for all others."""
        if fullname == self.name:
            return importlib.util.spec_from_loader(fullname, self, origin=self.path)
        return None

    def exec_module(self, module):
        """Run the text of the mutant."""
        module.__file__ = self.path
        exec(compile(self.code, self.path, "exec"), module.__dict__)


class Order:
    """A pytest plugin: runs tests in the order of their durations, and reports durations, calls and failures.

    Args:
        durations: Seconds by test; empty: trace which functions of ``path`` each test calls.
        path: The file that is mutated.
        answer: The file of the report.
    """

    def __init__(self, durations: dict[str, float], path: str, answer: str):
        self.durations, self.path, self.answer = durations, str(ROOT / path), Path(answer)
        self.seen, self.failed = dict[str, float](), list[str]()
        self.calls: dict[str, set[str]] = defaultdict(set)
        self.test = ""  # none yet: imports
        if not durations:
            sys.settrace(self._trace)

    def _trace(self, frame, event, argument):
        if frame.f_code.co_filename == self.path:
            self.calls[self.test].add(frame.f_code.co_qualname)

    def pytest_collection_modifyitems(self, items):
        """Sort the tests."""
        items.sort(key=lambda item: self.durations.get(item.nodeid, 0.0))

    def pytest_runtest_setup(self, item):
        """Let a compiled function call its Python function once in every test."""
        self.test = item.nodeid
        if not self.durations:
            import jax

            jax.clear_caches()
            sys.settrace(self._trace)

    def pytest_runtest_logreport(self, report):
        """Add up the phases of a test."""
        self.seen[report.nodeid] = self.seen.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self, exitstatus):
        """Report, and end the process without cleaning up, which takes longer than a short test."""
        calls = {test: sorted(names) for test, names in self.calls.items()}
        report = {
            "status": int(exitstatus),
            "failed": self.failed,
            "seen": self.seen,
            "calls": calls,
        }
        self.answer.write_text(json.dumps(report))
        os._exit(int(exitstatus))


def callers(function: str, whole: dict) -> list[str]:
    """Return the tests that call a function; all if it is called by an import, or is none."""
    prefix = f"{function}."

    def calls(test: str) -> bool:
        return any(
            name == function or name.startswith(prefix) for name in whole["calls"].get(test, [])
        )

    if not function or calls(""):
        return list(whole["seen"])
    return [test for test in whole["seen"] if calls(test)]


def run(mutant: Mutant, tests: list[str], durations: dict[str, float], seconds: int) -> dict:
    """Run the tests of a mutant in a fork of this process.

    Returns:
        ``status`` (of pytest; -1: stopped after ``seconds`` of processor time), ``failed`` (names of tests), ``seen``
        (seconds by test), ``calls`` (functions by test, without ``durations``) and ``seconds`` (of the processor).
    """
    with tempfile.NamedTemporaryFile() as answer:
        process = os.fork()
        if process == 0:
            _child(mutant, tests, durations, seconds, answer.name)
        _, status, usage = os.wait4(process, 0)
        text = Path(answer.name).read_text()
    used = usage.ru_utime + usage.ru_stime
    # A child that crashes or is stopped writes nothing.
    end = f"no end: {os.waitstatus_to_exitcode(status)}"
    result = json.loads(text) if text else {"status": -1, "failed": [end], "seen": {}, "calls": {}}
    return result | {"seconds": used}


def _child(
    mutant: Mutant, tests: list[str], durations: dict[str, float], seconds: int, answer: str
) -> None:
    """Run the tests; :class:`Order` ends the process."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        signal.alarm(
            200 * seconds
        )  # a deadlock uses no processor; a busy machine gives little of it
        sink = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(sink, number)
        import pytest

        name = mutant.path[:-3].replace("/", ".")
        sys.meta_path.insert(0, Loader(name, mutant.path, mutant.code))
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=no"]
        pytest.main([*options, *tests], plugins=[Order(durations, mutant.path, answer)])
    finally:
        os._exit(3)


def main() -> int:
    """Run the tests on a sample of the mutants, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=120, help="mutants per file")
    parser.add_argument("--all", action="store_true", help="no sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODULE", help="such as masking")
    parser.add_argument(
        "--show", nargs="*", default=[], metavar="MODULE:NUMBER", help="print, do not run"
    )
    parser.add_argument(
        "--record", type=Path, help="JSON file of the outcomes; those in it are not tried again"
    )
    parser.add_argument(
        "--again", action="store_true", help="but try the survivors in the record again"
    )
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument(
        "--factor", type=int, default=3, help="processor time, in those of the intact code"
    )
    arguments = parser.parse_args()
    everything = [mutant for path in TARGETS for mutant in mutants(path)]
    counts = Counter(mutant.path for mutant in everything)
    print(dict(counts), file=sys.stderr)
    if arguments.show:
        for mutant in everything:
            if mutant.name in arguments.show:
                print(f"{mutant.name} line {mutant.line}\n- {mutant.before}\n+ {mutant.after}")
        return 0
    chosen = []
    for path in TARGETS:
        own = [mutant for mutant in everything if mutant.path == path]
        random.Random(arguments.seed).shuffle(own)  # a longer sample begins with a shorter one
        if not arguments.only or Path(path).stem in arguments.only:
            chosen += own if arguments.all else own[: arguments.sample]
    record = arguments.record or Path(os.devnull)
    known = json.loads(record.read_text()) if record.is_file() else []
    if arguments.again:
        known = [outcome for outcome in known if outcome["killed"]]
    done = {(o["path"], o["before"], o["after"], o["name"]) for o in known}
    wanted = [m for m in chosen if (m.path, m.before, m.after, m.name) not in done]
    outcomes = known
    for outcome in try_all(wanted, arguments.factor):
        outcomes.append(outcome)
        record.write_text(json.dumps(outcomes, indent=1))
    text = report(outcomes, counts, arguments.seed)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    return 0


def try_all(chosen: list[Mutant], factor: int) -> Iterator[dict]:
    """Run every mutant, after the intact code of its file; yield the outcomes."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    reasons = equivalents()
    with tempfile.TemporaryDirectory(prefix="cellplm-mutation-") as cache:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        gc.freeze()  # so that the forks share the memory of what is imported
        for path, names in TARGETS.items():
            own = [mutant for mutant in chosen if mutant.path == path]
            if not own:
                continue
            tests = [name for name in names if (ROOT / name).exists()]
            intact = Mutant(path, -1, 0, "", "", "", (ROOT / path).read_text())
            whole = run(intact, tests, {}, 3600)
            if whole["status"] != 0:
                raise SystemExit(f"the tests of {path} fail without a change: {whole['failed']}")
            limit = max(30, int(factor * whole["seconds"]))
            print(f"{path}: {len(own)} mutants, {whole['seconds']:.0f} s", file=sys.stderr)
            for count, mutant in enumerate(own):
                began = time.monotonic()
                chosen_tests = callers(mutant.function, whole)
                result = {"status": 0, "seconds": 0.0}
                if chosen_tests:
                    result = run(mutant, chosen_tests, whole["seen"], limit)
                killed = result["status"] != 0
                reason = reasons.get((path, mutant.before, mutant.after), "")
                yield {
                    "name": mutant.name, "path": path, "line": mutant.line, "before": mutant.before,
                    "after": mutant.after, "killed": killed, "equivalent": "" if killed else reason,
                    "by": (result.get("failed") or ["collection"])[0] if killed else "", "seconds": result["seconds"],
                }  # fmt: skip
                word = "killed" if killed else "equivalent" if reason else "SURVIVED"
                print(
                    f"{count + 1}/{len(own)} {mutant.name} {word} {result['seconds']:.1f} s "
                    f"({time.monotonic() - began:.1f})" + ("" if killed else f" line {mutant.line}: {mutant.after}"),
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def equivalents() -> dict[tuple[str, str, str], str]:
    """Return the reason by file, line and change."""
    if not EQUIVALENT.exists():
        return {}
    entries = tomllib.loads(EQUIVALENT.read_text())["mutant"]
    return {(entry["file"], entry["before"], entry["after"]): entry["reason"] for entry in entries}


def report(outcomes: list[dict], counts: Counter, seed: int) -> str:
    """Return the table, and the mutants that were not killed, as Markdown."""
    seconds = sum(outcome["seconds"] for outcome in outcomes)
    lines = [
        "# Mutation testing",
        "",
        f"Made by `make mutation` (`tools/mutation.py`), seed {seed}: {len(outcomes)} of {sum(counts.values())} "
        f"mutants, {seconds / 60:.0f} minutes of processor time. A mutant is killed if a test of its module fails. "
        "Equivalent mutants change nothing that a test could see; the rate counts all others.",
        "",
        "| module | possible | tried | killed | equivalent | survived | killed, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    totals = Counter()
    for path in [*TARGETS, ""]:
        own = [o for o in outcomes if not path or o["path"] == path]
        if not own:
            continue
        killed = sum(o["killed"] for o in own)
        equal = sum(bool(o["equivalent"]) for o in own)
        rate = 100 * killed / max(1, len(own) - equal)
        possible = counts[path] if path else sum(counts.values())
        name = f"`{path}`" if path else "all"
        lines.append(
            f"| {name} | {possible} | {len(own)} | {killed} | {equal} | {len(own) - killed - equal} | {rate:.1f} |"
        )
        totals[path] = len(own)
    equal = sorted(
        {(o["path"], o["before"], o["after"], o["equivalent"]) for o in outcomes if o["equivalent"]}
    )
    if equal:
        lines += ["", "## Equivalent", ""]
        lines += [f"- `{Path(p).stem}`: `{b}` -> `{a}`: {reason}" for p, b, a, reason in equal]
    survived = [o for o in outcomes if not o["killed"] and not o["equivalent"]]
    if survived:
        lines += ["", "## Survived", ""]
        lines += [
            f"- `{Path(o['path']).stem}`, line {o['line']}: `{o['before']}` -> `{o['after']}`"
            for o in survived
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
