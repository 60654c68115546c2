"""Write docs/licences.md: the licences of the data that the wheel contains, and of the packages that it installs.

    python tools/licences.py          the page
    python tools/licences.py --list   only print the names and versions of the packages

Takes the packages from the metadata of this environment, so run it where all extras are installed (``make licences``).
Ends with status 1 if a package states no licence, or if the package without extras needs one under the GPL.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = ROOT / "cellplm_jax" / "resources"
PAGE = ROOT / "docs" / "licences.md"
EXTRAS = ("train", "eval", "cpu", "gcp", "export", "hub", "torch")
"""The extras for use; those for development install nothing on the machine of a user."""

PATTERNS = {
    r"GPL|General Public": "GPL-3.0-or-later",
    r"MPL|Mozilla": "MPL-2.0",
    r"Apache": "Apache-2.0",
    r"\bBSD": "BSD",
    r"\bMIT\b": "MIT",
    r"Python Software|PSF": "PSF-2.0",
    r"\bISC\b": "ISC",
}
"""Names for texts in metadata that are no licence expression."""

GPL = "igraph", "GPL-2.0-or-later"
"""igraph's metadata name no version."""

DATA = {
    "pbmc3k.h5ad": ("PBMC3k, 10x Genomics", "CC BY 4.0"),
    "human_genes.csv.gz": ("names of human genes: GENCODE, HGNC", "open data; CC0 1.0"),
    "mouse_genes.csv.gz": ("mouse genes and orthologues: Ensembl, GENCODE", "open data"),
}


def licence(package: Distribution) -> str:
    """Return the licence that the metadata of a package state, or "" if they state none."""
    metadata = package.metadata
    if metadata["Name"].lower() == GPL[0]:
        return GPL[1]
    if expression := metadata.get("License-Expression"):
        return expression
    names = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if "License ::" in c]
    stated = (metadata.get("License") or "").strip()
    texts = [stated] if stated and "\n" not in stated and len(stated) < 40 else []
    for text in [*texts, *names, stated[:300]]:
        if re.fullmatch(r"[A-Za-z0-9.-]+-[0-9.]+(-Clause|-or-later)?|MIT|BSD-\d-Clause", text):
            return text
        for pattern, name in PATTERNS.items():
            if re.search(pattern, text):
                return name
    return ""


def installed(extras: tuple[str, ...]) -> set[str]:
    """Return the names of all packages that this package brings with some extras, without itself."""
    found: set[tuple[str, str]] = set()

    def walk(name: str, wanted: tuple[str, ...]) -> None:
        for extra in ("", *wanted):
            if (normal(name), extra) in found:
                continue
            try:
                package = distribution(name)
            except PackageNotFoundError:
                print(f"{name} is not installed", file=sys.stderr)
                return
            found.add((normal(name), extra))
            for text in package.requires or []:
                requirement = Requirement(text)
                if not requirement.marker or requirement.marker.evaluate({"extra": extra}):
                    walk(requirement.name, tuple(requirement.extras))

    walk("cellplm-jax", extras)
    return {name for name, _ in found} - {"cellplm-jax"}


def normal(name: str) -> str:
    """Return the normal form of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def page(always: set[str], optional: set[str]) -> str:
    """Return the page."""
    card = json.loads((RESOURCES / "models" / "small" / "card.json").read_text(encoding="utf-8"))
    lines = [
        "# Licences",
        "",
        "Written by `tools/licences.py` (`make licences`); do not edit by hand. This package is under the BSD "
        "2-Clause licence (`LICENSE`). It contains no code of other projects.",
        "",
        "## Data in the wheel",
        "",
        "| file | what | licence | terms and sources |",
        "|---|---|---|---|",
    ]
    for name, (what, terms) in DATA.items():
        text = RESOURCES / f"{name.split('.')[0]}.LICENSE.md"
        if not text.is_file():
            raise SystemExit(f"{text.name} is missing")
        lines.append(f"| `{name}` | {what} | {terms} | `resources/{text.name}` |")
    lines += [
        f"| `models/small` | {card['name']} | {card['licence']} | `card.json` lists the data sets |",
        "",
        "## Packages",
        "",
        "They are installed beside this package and not distributed with it. The licences are those that their "
        "metadata state; `BSD` stands for one of the BSD licences without a number of clauses.",
    ]
    for title, names in (
        ("Always installed", always),
        ("With the extras " + ", ".join(f"`{extra}`" for extra in EXTRAS), optional),
    ):
        groups = defaultdict(list)
        for name in sorted(names):
            groups[licence(distribution(name)) or "not stated"].append(name)
        lines += ["", f"### {title}", "", "| licence | packages |", "|---|---|"]
        lines += [f"| {text} | {', '.join(groups[text])} |" for text in sorted(groups)]
    lines += [
        "",
        "`harmonypy`, `igraph` and `leidenalg`, of the extra `eval`, are under the GNU General Public License. "
        'This package imports them where a user asks for `adapt="context"`, alignment or clustering, and works '
        "without them otherwise.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, and check it."""
    always = installed(())
    optional = installed(EXTRAS) - always
    if sys.argv[1:] == ["--list"]:
        for name in sorted(always | optional):
            print(f"{name}=={distribution(name).version.split('+')[0]}")
        return 0
    PAGE.write_text(page(always, optional), encoding="utf-8")
    silent = [name for name in always | optional if not licence(distribution(name))]
    strict = [name for name in always if "GPL" in licence(distribution(name))]
    for name in silent:
        print(f"{name} states no licence", file=sys.stderr)
    for name in strict:
        print(f"{name}, which is always installed, is under the GPL", file=sys.stderr)
    return 1 if silent or strict else 0


if __name__ == "__main__":
    sys.exit(main())
