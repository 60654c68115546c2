"""Draw the badges of the README from the metadata of the package: docs/figures/badges/*.svg, nothing is fetched."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures" / "badges"


def facts() -> dict[str, str]:
    """Return the name and the text of every badge."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    settings = (ROOT / "cellplm_jax" / "_version.py").read_text(encoding="utf-8")

    def found(pattern: str, where: str = text) -> str:
        match = re.search(pattern, where, re.MULTILINE)
        assert match is not None, pattern
        return match[1]

    pythons = re.findall(r"Python :: (3\.\d+)", text)
    jax = re.search(r'"jax>=([\d.]+),<0\.(\d+)"', text)
    assert jax is not None
    return {
        "version": found(r'^__version__ = "(.+)"$', settings),
        "python": f"{pythons[0]} to {pythons[-1]}",
        "jax": f"{jax[1]} to 0.{int(jax[2]) - 1}",
        "licence": found(r'license="(.+)"'),
    }


def badge(name: str, text: str) -> str:
    """Return a badge as SVG.

    Args:
        name: Left side.
        text: Right side.
    """
    left, right = (round(6.6 * len(side) + 12) for side in (name, text))
    font = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{name}: {text}"><title>{name}: {text}</title>'
        f'<rect width="{left + right}" height="20" rx="3" fill="#4a5560"/>'
        f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right - 3}z" fill="#0b5c93"/>'
        f'<g {font}><text x="{left / 2}" y="14">{name}</text>'
        f'<text x="{left + right / 2}" y="14">{text}</text></g></svg>\n'
    )


def main() -> int:
    """Write them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in facts().items():
        (FOLDER / f"{name}.svg").write_text(badge(name, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
