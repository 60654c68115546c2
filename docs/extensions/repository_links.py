"""Links that work both in the repository and on the site.

Pages such as ``launch/README.md`` and ``benchmarks/quality/quality.md`` are included from other folders, not
copied. Their links refer to files of the repository. This extension converts links to files with a page on the site to
links to that page, and links to other existing files to the file name as code; a link to a missing file is a warning,
so that the build fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LOGGER = logging.getLogger(__name__)

PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "launch/README.md": "launching",
    "benchmarks/quality/quality.md": "benchmarks/quality",
    "benchmarks/zero_shot/zero_shot.md": "benchmarks/zero_shot",
    "benchmarks/ablations/ablations.md": "benchmarks/ablations",
    "benchmarks/load/read_corpus.md": "benchmarks/load",
    "benchmarks/load/write_corpus.md": "benchmarks/load",
    "benchmarks/robustness/kill_resume.md": "benchmarks/robustness",
    "benchmarks/faults/damage.md": "benchmarks/faults",
    "benchmarks/faults/soak.md": "benchmarks/faults",
}
"""Files outside ``docs/`` and the page of the site that includes each."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")


def rewrite(text: str, file: Path, page: str) -> str:
    """Return Markdown with links to repository files converted to links of the site.

    Args:
        text: Markdown.
        file: Its path; links are relative to it.
        page: Its page of the site, such as ``"benchmarks/quality"``.
    """

    def replaced(match: re.Match[str]) -> str:
        target = (file.parent / match["target"]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        name = target.relative_to(ROOT).as_posix()
        anchor = match["anchor"] or ""
        if name in PAGES:
            found = PAGES[name]
        elif target.suffix == ".md" and target.is_relative_to(DOCS):
            found = target.relative_to(DOCS).with_suffix("").as_posix()
        elif target.suffix == ".ipynb" and target.is_relative_to(DOCS) and target.exists():
            return match[0]
        elif target.exists():
            shown = match["text"].strip("`")
            return f"`{shown}`" if shown == name else f"{match['text']} (`{name}`)"
        else:
            LOGGER.warning("%s links to %s, which does not exist", file.name, name)
            return match[0]
        if found == page and anchor:
            return f"[{match['text']}]({anchor})"
        relative = os.path.relpath(DOCS / f"{found}.md", (DOCS / page).parent)
        return f"[{match['text']}]({Path(relative).as_posix()}{anchor})"

    return _LINK.sub(replaced, text)


def _page_read(app: Sphinx, page: str, source: list[str]) -> None:
    file = Path(app.env.doc2path(page))
    if file.suffix == ".md":
        source[0] = rewrite(source[0], file, page)


def _file_included(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    # A page included from elsewhere is known by the last part of its name.
    source[0] = rewrite(source[0], (DOCS / path).resolve(), app.env.docname)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _page_read)
    app.connect("include-read", _file_included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
