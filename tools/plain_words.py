"""Count marker idioms per 1,000 words of prose and list the places: ``python tools/plain_words.py [PATH ...]``.

A marker idiom is a phrase that a reader of the field must translate ("where there is no label" for "if there are no
labels"). The prose of a Python file is its docstrings, comments and messages (string literals of at least four words);
the prose of a Markdown file is everything outside fenced code blocks. Without paths the program measures the package
and the documentation. ``--limit 1.5`` exits with status 1 if either group has more idioms per 1,000 words.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

UNITS = "cell|gene|seed|sample|step|chunk|context|batch|class|row|device"
IDIOMS = {
    "condition with 'where'": r"\bwhere (?:it|there|they|an?|the|no|that|all|several)\b",
    "rate with 'a'": rf"\ban? (?:{UNITS})(?=[,.;)]|$)",
    "question as title": r"^\W*(?-i:What) (?:an?|is|the|it)\b",
    "'is there'": r"\b(?:is|are) there\b",
    "speaking code": r"\b(?:says|said|told|tells)\b",
    "'at most', 'so many'": r"\bat most\b|\bso many\b",
    "old adverb": r"\b(?:beside|apart|anew|likewise|of its own|by itself)\b",
    "'lies', 'whole'": r"\blies?\b|\bwhole\b",
}
PATTERN = re.compile(
    "|".join(f"(?:{pattern})" for pattern in IDIOMS.values()), re.MULTILINE | re.IGNORECASE
)
GROUPS = {
    "package": ("cellplm_jax",),
    "documentation": ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "launch/README.md", "docs"),
}
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1`*~* *$", re.MULTILINE | re.DOTALL)
SHORTEST_MESSAGE = 4

Passage = tuple[int, str]


def python_prose(source: str) -> Iterator[Passage]:
    """Yield (first line, text) of every docstring, comment and message."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if len(node.value.split()) >= SHORTEST_MESSAGE:
            yield node.lineno, node.value


def markdown_prose(source: str) -> Iterator[Passage]:
    """Yield the text outside fenced code blocks, with their line breaks kept so that lines count."""
    yield 1, FENCE.sub(lambda block: "\n" * block.group().count("\n"), source)


def prose_files(paths: list[Path]) -> list[Path]:
    """Return the Python and Markdown files at and under ``paths``; Sphinx builds are left out."""
    files = []
    for path in paths:
        inside = [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.md")])
        files += [file for file in inside if "_build" not in file.parts]
    return files


def measure(paths: list[Path]) -> tuple[list[str], int]:
    """Return the places ("file:line: idiom") and the number of words."""
    places, words = [], 0
    for file in prose_files(paths):
        source = file.read_text(encoding="utf-8")
        prose = markdown_prose if file.suffix == ".md" else python_prose
        hits = []
        for first, text in prose(source):
            words += len(re.findall(r"\w+", text))
            for match in PATTERN.finditer(text):
                idiom = " ".join(match.group().split())
                hits.append((first + text.count("\n", 0, match.end()), idiom))
        places += [f"{file}:{line}: {idiom}" for line, idiom in sorted(hits)]
    return places, words


def main(arguments: list[str] | None = None) -> int:
    """Print places and rates; return 1 if a group is above the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "paths", nargs="*", type=Path, help="Files or folders (default: package and documentation)"
    )
    parser.add_argument(
        "--limit", type=float, help="Exit with status 1 above this number of idioms per 1,000 words"
    )
    parser.add_argument("--quiet", action="store_true", help="Print the rates only")
    options = parser.parse_args(arguments)
    groups = (
        {"given": options.paths}
        if options.paths
        else {k: list(map(Path, v)) for k, v in GROUPS.items()}
    )
    absent = [str(path) for paths in groups.values() for path in paths if not path.exists()]
    if absent:
        parser.error(f"No such file or folder: {', '.join(absent)}. Run from the repository root.")
    above = False
    for name, paths in groups.items():
        places, words = measure(paths)
        rate = 1000 * len(places) / max(words, 1)
        above = above or (options.limit is not None and rate > options.limit)
        if not options.quiet:
            print(*places, sep="\n")
        print(f"{name}: {rate:.1f} idioms per 1,000 words ({len(places)} in {words:,})")
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
