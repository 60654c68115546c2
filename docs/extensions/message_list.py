"""The directive ``{message-list}``: every error that the package raises, with its remedy, from the source code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cellplm_jax"
ERRORS = ("InputError", "ConfigError", "CheckpointError", "MissingDependencyError", "explain")
PARTS = {
    "data": "Reading files, genes and corpora",
    "tasks": "Embedding and estimators",
    "evaluate": "Scores",
    "plot": "Plots",
    "report": "Reports",
    "train": "Training and checkpoints",
    "model": "Model",
    "losses": "Model",
    "kernels": "Model",
    "interop": "Converting and sharing models",
    "plan": "Planning memory and time",
    "cli": "Command line",
}
OTHER = "Configuration and installation"


class Message(NamedTuple):
    """An error that the package raises.

    Attributes:
        topic: Heading of the page.
        found: What was found; "…" stands for a value.
        expected: What was expected.
        remedy: What to do; "": nothing.
    """

    topic: str
    found: str
    expected: str
    remedy: str


def text_of(node: ast.AST | None) -> str:
    """Return the text of an expression; "…" where it depends on the data.

    Args:
        node: A string, an f-string, a sum of them, a choice, or a call that makes a remedy.
    """
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return " / ".join(dict.fromkeys(filter(None, (text_of(node.body), text_of(node.orelse)))))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "nearest":
        return f"Did you mean …? / {text_of(node.args[-1])}"
    return "…"


def messages(package: Path = PACKAGE) -> Iterator[Message]:
    """Yield the messages with at least "found" and "expected", module by module, each once.

    Args:
        package: Folder of the source code.
    """
    seen = set()
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ERRORS:
                continue
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            given = [*node.args, None, None, None]
            parts = [
                text_of(given[i] or named.get(n))
                for i, n in enumerate(("found", "expected", "remedy"))
            ]
            found, expected, remedy = (" ".join(text.split()) for text in parts)
            if expected and sum(c.isalpha() for c in found) > 6 and (found, expected) not in seen:
                seen.add((found, expected))
                yield Message(PARTS.get(part, OTHER), found, expected, remedy)


def markdown() -> list[str]:
    """Return the page: a heading per topic, and a table of its messages."""
    topics: dict[str, list[Message]] = {
        name: [] for name in dict.fromkeys([*PARTS.values(), OTHER])
    }
    for message in messages():
        topics[message.topic].append(message)

    def cell(text: str) -> str:
        # Angle brackets, stars and brackets of messages are no markup.
        return "".join("\\" + c if c in "|*_`<>[]{}$#~" else c for c in text) or "-"

    lines = []
    for topic, found in topics.items():
        if found:
            lines += [f"## {topic}", "", "| found | expected | what to do |", "|---|---|---|"]
            lines += [f"| {' | '.join(map(cell, message[1:]))} |" for message in sorted(found)]
            lines.append("")
    return lines


def _page_read(app: Any, page: str, source: list[str]) -> None:
    source[0] = source[0].replace("```{message-list}\n```", "\n".join(markdown()))


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _page_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
