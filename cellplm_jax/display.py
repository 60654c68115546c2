"""One-line and HTML representations of the public objects, for consoles and notebooks."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

LONGEST = 300
"""Maximum number of characters of a representation."""


def shortened(text: str, limit: int = LONGEST) -> str:
    """Return text of at most ``limit`` characters on one line; ``"..."`` replaces the rest."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3].rstrip()}..."


def shown(value: Any) -> str:
    """Return a value as short text: thousands separated, four digits, lists abbreviated, arrays as their shape."""
    # Before int, of which bool is a subclass.
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{str(key).replace('_', ' ')} {shown(item)}" for key, item in value.items()
        )
    if isinstance(value, list | tuple):
        rest = f", ... ({len(value):,})" if len(value) > 3 else ""
        return ", ".join(map(shown, value[:3])) + rest if value else "none"
    if hasattr(value, "shape"):
        return " x ".join(f"{size:,}" for size in value.shape)
    return str(value)


def one_line(thing: object, facts: Mapping[str, Any]) -> str:
    """Return the class of an object and its facts on one line of at most :data:`LONGEST` characters."""
    listed = ", ".join(f"{name}: {value}" for name, value in _texts(facts).items())
    return shortened(f"{type(thing).__name__}({listed})")


def html_table(thing: object, facts: Mapping[str, Any]) -> str:
    """Return the same as an HTML table, for notebooks."""
    left = 'style="text-align:left"'
    rows = "".join(
        f'<tr><th scope="row" {left}>{html.escape(name)}</th>'
        f"<td {left}>{html.escape(shortened(value))}</td></tr>"
        for name, value in _texts(facts).items()
    )
    return f"<table><caption>{type(thing).__name__}</caption><tbody>{rows}</tbody></table>"


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): shown(v) for name, v in facts.items() if v is not None}


class Displayed:
    """Base of classes that show themselves: one line in a console, a small table in a notebook.

    A dataclass is declared with ``repr=False``.
    """

    def _display(self) -> Mapping[str, Any]:
        """Return facts by name, the most important first; facts that are None are omitted."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return one_line(self, self._display())

    def _repr_html_(self) -> str:
        return html_table(self, self._display())


class DisplayedConfig:
    """Base of configurations: a representation with the fields that differ from their defaults."""

    def __repr__(self) -> str:
        changed = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if value != default:
                changed.append(f"{field.name}={value!r}")
        return shortened(f"{type(self).__name__}({', '.join(changed)})")
