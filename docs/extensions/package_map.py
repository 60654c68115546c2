"""The directive ``{package-map}``: one sentence per module, the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "cellplm_jax"


def markdown() -> list[str]:
    """Return one table per folder of the package."""
    lines = []
    for folder in [PACKAGE, *sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))]:
        name = folder.relative_to(PACKAGE.parent).as_posix()
        lines += [f"### `{name}/`", "", "| module | contents |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            sentence = text.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            if path.name != "__init__.py":
                lines.append(f"| `{path.stem}` | {sentence.replace('``', '`')} |")
        lines.append("")
    return lines


def _page_read(app: Any, page: str, source: list[str]) -> None:
    source[0] = source[0].replace("```{package-map}\n```", "\n".join(markdown()))


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _page_read)
    return {"parallel_read_safe": True}
