"""Self-contained HTML reports with text, tables and figures.

Styles and figures are embedded, and a content security policy forbids every request. Reports follow the light or dark
theme of the reader, print on white, and fit small screens: wide content scrolls in its own box. Text from data (labels,
file names) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import math
import numbers
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplm_jax._version import __version__
from cellplm_jax.errors import InputError
from cellplm_jax.plot.style import DARK_PAGE, dark_theme
from cellplm_jax.storage import atomic_write_text, explain_write_errors

_FIGURE_DPI = 192  # two image pixels per page pixel: sharp on dense screens
_WIDE = 560  # page pixels; narrower images shrink to the screen
_DASH, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Text:
    """Paragraphs. A blank line starts a new one; markup is not interpreted.

    Attributes:
        text: The text.
        heading: Heading above it, or None.
    """

    text: str
    heading: str | None = None


@dataclass(frozen=True)
class Code:
    """A command or part of a file, in a fixed-width font with its line breaks, such as the command line of a run.

    Attributes:
        text: The lines.
        heading: Heading above it, or None.
    """

    text: str
    heading: str | None = None


@dataclass(frozen=True)
class Table:
    """A table. Numeric columns are aligned right and have the same number of decimals.

    Attributes:
        columns: Names of the columns.
        rows: One sequence per row, as long as ``columns``. None and NaN are shown as a dash.
        caption: One sentence under the table.
        heading: Heading above it, or None.
        digits: Significant digits after the leading one in columns of floating-point numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    heading: str | None = None
    digits: int = 3


@dataclass(frozen=True)
class Figure:
    """An image. A matplotlib figure is drawn for the light and for the dark theme; image files are on a white card.

    Attributes:
        image: A matplotlib figure, Axes (their complete figure is shown), or bytes of a PNG or SVG file.
        alt: Alternative text of the image. Required.
        caption: One or two sentences under the image.
        heading: Heading above it, or None.
    """

    image: Any
    alt: str
    caption: str = ""
    heading: str | None = None


Section = Text | Code | Table | Figure


_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2127;--soft:#57606a;--line:#d9dee4;--head:#0b1f330f;
--mark:#0b5c93;--shade:#0b1f3338}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--ink:#e4e7ea;--soft:#a3acb5;--line:#353b42;
--head:#d0e4ff12;--mark:#6fb7ea;--shade:#000000b0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.5rem 3rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 1rem;text-wrap:balance}
h2{font-size:1.25rem;line-height:1.3;margin:2.6rem 0 .7rem;padding-top:1.1rem;border-top:1px solid var(--line)}
p{margin:0 0 .8rem;max-width:46rem}
header p{font-size:1.06rem}
figure{margin:1.1rem 0 1.6rem}
figcaption{color:var(--soft);font-size:.9rem;max-width:46rem;margin-top:.5rem}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
.box.shaded{background:linear-gradient(90deg,var(--card) 40%,transparent) left/2.5rem 100% no-repeat local,
linear-gradient(270deg,var(--card) 40%,transparent) right/2.5rem 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) left/.8rem 100% no-repeat scroll,
linear-gradient(270deg,var(--shade),transparent) right/.8rem 100% no-repeat scroll,var(--card)}
.hint{display:none;color:var(--soft);font-size:.8rem;margin-top:.35rem}
.box:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
.image{padding:.75rem;text-align:center}
.image.file{background:#fff}
.image img{display:block;margin:0 auto;max-width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{padding:.42rem .9rem;text-align:left;vertical-align:top;overflow-wrap:normal}
td{max-width:26rem;border-top:1px solid var(--line)}
thead th{background:var(--head);font-weight:600;vertical-align:bottom}
thead th.number{white-space:normal}
tbody th{font-weight:500;border-top:1px solid var(--line)}
.long{min-width:14rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{margin:0;padding:.8rem 1rem;white-space:pre-wrap;font:.88rem/1.5 ui-monospace,SFMono-Regular,Consolas,
"Liberation Mono",monospace}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media (max-width:40rem){main{padding:1.5rem 1rem 2rem}h1{font-size:1.5rem}th,td{padding:.38rem .6rem}
.image{padding:.4rem}}
@media (max-width:33rem){.wide img{min-width:max(min(var(--width),30rem),calc(var(--width)*.62))}
.wide .hint{display:block}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--head:#eee}
body{font-size:11pt}main{max-width:none;padding:0}figure{break-inside:avoid}h2{break-after:avoid}.box{overflow:visible}}
"""


def _escape(text: Any) -> str:
    """Return HTML-escaped text."""
    return html.escape(str(text), quote=True)


def _paragraphs(text: str) -> str:
    """Return paragraphs; a blank line separates them."""
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))
    return "".join(f"<p>{_escape(part)}</p>\n" for part in parts if part)


def _is_number(value: Any) -> bool:
    """Return whether a table cell is a number; True and False are text."""
    return isinstance(value, numbers.Real) and type(value).__name__ not in ("bool", "bool_")


def _is_missing(value: Any) -> bool:
    """Return whether a table cell is empty: None, NaN or pandas' NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return _is_number(value) and math.isnan(value)


def _format_numbers(values: Sequence[Any], digits: int) -> list[str]:
    """Return one column of numbers as text with the same number of decimals, or in short form if they differ widely."""
    present = [value for value in values if not _is_missing(value)]
    # Only columns of integers are shown without decimals.
    whole = all(isinstance(value, numbers.Integral) for value in present)
    finite = [abs(float(value)) for value in present if math.isfinite(value)]
    largest = max(finite, default=0.0)
    smallest = min((value for value in finite if value > 0), default=largest)
    decimals = digits
    if largest >= 1:
        # Significant digits, by the largest number of the column.
        decimals = max(0, digits - math.floor(math.log10(largest)))
    # With fixed decimals the smallest number must not become 0.
    fixed = largest < 1e9 and (smallest == 0 or smallest >= 10.0**-decimals)

    def one(value: Any) -> str:
        if _is_missing(value):
            return _DASH
        if math.isinf(value):
            return "∞" if value > 0 else _MINUS + "∞"
        if whole:
            text = f"{int(value):,}"
        elif fixed:
            text = f"{float(value):,.{decimals}f}"
        else:
            text = f"{float(value):.{digits + 1}g}"
        return text.replace("-", _MINUS) if text.startswith("-") else text

    return [one(value) for value in values]


def _table(table: Table) -> str:
    """Return the markup of a table."""
    columns = [str(name) for name in table.columns]
    rows = [list(row) for row in table.rows]
    for place, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise InputError(
                f"Row {place} of a table has {len(row)} cells",
                f"{len(columns)}, one per column ({', '.join(columns)})",
                "Fill missing cells with None",
            )
    texts, numeric = [], []
    for place in range(len(columns)):
        values = [row[place] for row in rows]
        present = [value for value in values if not _is_missing(value)]
        right = bool(present) and all(_is_number(value) for value in present)
        numeric.append(right)
        if right:
            texts.append(_format_numbers(values, table.digits))
        else:
            texts.append([_DASH if _is_missing(value) else str(value) for value in values])
    kind = [
        ' class="number"'
        if right
        else ' class="long"'
        if max(map(len, text), default=0) > 28
        else ""
        for right, text in zip(numeric, texts, strict=True)
    ]
    head = "".join(
        f'<th scope="col"{mark}>{_escape(name)}</th>'
        for mark, name in zip(kind, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{mark}>{_escape(text)}</td>" for mark, text in zip(kind, line, strict=True))
        + "</tr>\n"
        for line in zip(*texts, strict=True)
    )
    caption = f"<figcaption>{_escape(table.caption)}</figcaption>" if table.caption else ""
    name = _escape(table.caption or table.heading or "Table")
    return (
        f'<figure><div class="box shaded" role="region" tabindex="0" aria-label="{name}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>{caption}</figure>\n"
    )


def _png_size(image: bytes) -> tuple[int, int]:
    """Return width and height of a PNG in page pixels: by its stated resolution, or one to one."""
    width, height = struct.unpack(">II", image[16:24])
    scale = 1.0
    position = 8
    while position + 12 <= len(image):
        (length,) = struct.unpack(">I", image[position : position + 4])
        kind = image[position + 4 : position + 8]
        if kind == b"pHYs":
            # Pixels per metre, if the unit is 1.
            per_unit, _, unit = struct.unpack(">IIB", image[position + 8 : position + 17])
            if unit == 1 and per_unit:
                scale = 96 / (per_unit * 0.0254)
        # pHYs precedes the image data, by the PNG standard.
        if kind == b"IDAT":
            break
        # Length, kind and checksum have four bytes each.
        position += 12 + length
    return max(1, round(width * scale)), max(1, round(height * scale))


def _image_bytes(image: Any) -> tuple[bytes, bytes | None]:
    """Return the bytes of a PNG or SVG file for the light theme, and for the dark one if the image can be redrawn."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), None
    if not hasattr(image, "savefig"):
        image = getattr(image, "figure", image)  # of Axes
    if hasattr(image, "savefig"):
        light = _drawn(image, "white")
        with dark_theme(image):
            return light, _drawn(image, DARK_PAGE)
    raise InputError(
        f"A figure's image is a {type(image).__name__}",
        "PNG or SVG bytes, a matplotlib figure or Axes",
        "Read the file with Path(...).read_bytes(), or pass axes.figure",
    )


def _drawn(figure: Any, ground: str) -> bytes:
    """Return a matplotlib figure as a PNG file on this ground."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=_FIGURE_DPI,
        bbox_inches="tight",
        pad_inches=0.06,
        facecolor=ground,
    )
    return buffer.getvalue()


def _figure(figure: Figure) -> str:
    """Return the markup of an image."""
    if not figure.alt.strip():
        raise InputError(
            "A figure without alternative text",
            "a short description of the image",
            "Fill Figure(alt=...)",
        )
    image, dark = _image_bytes(figure.image)
    size, width = "", 0
    if image.startswith(_PNG) and len(image) >= 33:
        kind = "image/png"
        width, height = _png_size(image)
        size = f' width="{width}" height="{height}" style="--width:{width}px"'
    elif re.match(
        rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<svg[\s>]",
        image,
        re.S,
    ):
        kind = "image/svg+xml"  # as an image: its scripts do not run and its links are not followed
    else:
        raise InputError(
            f"A figure's image starts with {image[:8]!r}",
            "the bytes of a PNG or SVG file",
            "Save the image as PNG",
        )
    data = base64.b64encode(image).decode("ascii")
    caption = f"<figcaption>{_escape(figure.caption)}</figcaption>" if figure.caption else ""
    # On small screens a wide image keeps a legible size and scrolls; the style above defines the width limit.
    wide = ' class="wide"'
    hint = '<div class="hint" aria-hidden="true">Scroll sideways to see all of it.</div>'
    if width < _WIDE:
        wide = hint = ""
    shown = f'<img src="data:{kind};base64,{data}" alt="{_escape(figure.alt)}"{size}>'
    card = "box image file"
    if dark is not None:
        other = base64.b64encode(dark).decode("ascii")
        shown = (
            f'<picture><source media="screen and (prefers-color-scheme:dark)" '
            f'srcset="data:image/png;theme=dark;base64,{other}">{shown}</picture>'
        )
        card = "box image"
    return (
        f'<figure{wide}><div class="{card}" role="group" tabindex="0" aria-label="{_escape(figure.alt)}">'
        f"{shown}</div>{hint}{caption}</figure>\n"
    )


def _section(section: Any) -> str:
    """Return the markup of one section."""
    if isinstance(section, Text):
        body = _paragraphs(section.text)
    elif isinstance(section, Code):
        body = (
            '<figure><div class="box shaded" role="group" tabindex="0" aria-label="Code">'
            f"<pre>{_escape(section.text.strip(chr(10)))}</pre></div></figure>\n"
        )
    elif isinstance(section, Table):
        body = _table(section)
    elif isinstance(section, Figure):
        body = _figure(section)
    else:
        raise InputError(
            f"A section of type {type(section).__name__}",
            "Text, Code, Table or Figure",
            "Wrap it in one of the classes of cellplm_jax.report",
        )
    return (f"<h2>{_escape(section.heading)}</h2>\n" if section.heading else "") + body


def render_report(*, title: str, summary: str, sections: Sequence[Section]) -> str:
    """Return the report as HTML text; see :func:`write_report`.

    The text depends only on the arguments and the version of the package: no date, no random identifiers.

    Args:
        title: Title of the page.
        summary: One or two paragraphs about the result; blank lines separate paragraphs.
        sections: In reading order.

    Returns:
        An HTML document.

    Raises:
        InputError: A section has another type, a table row has a wrong length, or an image cannot be shown.
    """
    body = "".join(_section(section) for section in sections)
    # A report is opened from a mail or a disk: it must request nothing and run nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{_escape(title)}</h1>\n{_paragraphs(summary)}</header>\n{body}"
        f"<footer>Written by cellplm-jax {_escape(__version__)}.</footer>\n</main>\n</body>\n</html>\n"
    )


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    sections: Sequence[Section],
) -> Path:
    """Write a report as one self-contained HTML file, atomically.

    The report is rendered first, written under a temporary name next to the target,
    and then renamed. An existing report is replaced.

    Args:
        path: The file, for example ``report.html``. Missing folders are created.
        title: Title of the page.
        summary: One or two paragraphs about the result; blank lines separate paragraphs.
        sections: In reading order: :class:`Text`, :class:`Code`, :class:`Table`, :class:`Figure`.

    Returns:
        The path of the file.

    Raises:
        InputError: A section cannot be shown (see :func:`render_report`), or the file cannot be written.
    """
    target = Path(path)
    text = render_report(title=title, summary=summary, sections=sections)
    with explain_write_errors(f"The report '{target}'", catch=OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(target, text)
    return target
