"""Set the public address of the repository: install lines, badges and notebooks follow.

The address is one constant, ``ADDRESS`` of ``cellplm_jax/_version.py``. This program writes it there and into every
block between ``<!-- install -->`` and ``<!-- /install -->`` of the README and the documentation, which a test compares
with :func:`install_block`. Without an address, these lines install from a checkout. Rebuild the notebooks afterwards
(``make notebooks-full``)::

    python tools/set_address.py github.com/NAME/cellplm-jax
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTING = ROOT / "cellplm_jax" / "_version.py"
FORM = re.compile(r"[a-z0-9.-]+\.[a-z]+/[\w.-]+/[\w.-]+")
BLOCK = re.compile(r"(?<=<!-- install -->\n).*?(?=<!-- /install -->)", re.DOTALL)


def address() -> str:
    """Return the address that is set; "": none."""
    found = re.search(r'^ADDRESS = "(.*)"$', SETTING.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def requirement(extras: str, where: str) -> str:
    """Return what pip installs, in quotes.

    Args:
        extras: Names of extras, with commas.
        where: The address; "": a checkout, in its folder.
    """
    return f'"cellplm-jax[{extras}] @ git+https://{where}"' if where else f'".[{extras}]"'


def install_block(where: str) -> str:
    """Return the lines between the marks.

    Args:
        where: The address; "": none.
    """
    lines = [f"pip install {requirement('eval', where)}"]
    if not where:
        lines[0] += "                             # in a checkout of this repository"
    lines.append(
        'make dist && pip install "$(ls dist/*.whl)[eval]"   # or: a wheel, to install elsewhere'
    )
    return "```bash\n" + "\n".join(lines) + "\n```\n"


def render(text: str, where: str) -> str:
    """Return a page with its install lines for an address.

    Args:
        text: The page.
        where: The address; "": none.
    """
    return BLOCK.sub(lambda _: install_block(where), text)


def pages() -> list[Path]:
    """Return the pages that may hold install lines."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: Sequence[str]) -> int:
    """Write the address of the command line."""
    if len(arguments) != 1 or (arguments[0] and not FORM.fullmatch(arguments[0])):
        print(
            "usage: python tools/set_address.py HOST/OWNER/NAME   (without https://)",
            file=sys.stderr,
        )
        return 2
    text = SETTING.read_text(encoding="utf-8")
    SETTING.write_text(
        re.sub(r'^ADDRESS = ".*"$', f'ADDRESS = "{arguments[0]}"', text, flags=re.MULTILINE),
        encoding="utf-8",
    )
    for page in pages():
        old = page.read_text(encoding="utf-8")
        if (new := render(old, arguments[0])) != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
