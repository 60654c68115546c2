from __future__ import annotations

import base64
import math
import os
import re
import stat
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from cellplm_jax.errors import InputError
from cellplm_jax.report import html as report

VOID = {"meta", "link", "img", "br", "source"}


class Page(HTMLParser):
    """Elements in order, as (tag, attributes, text directly in it); complains about unbalanced markup."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        entry = [tag, dict(attrs), ""]
        self.elements.append(entry)
        if tag not in VOID:
            self._open.append(entry)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


def png(width=6, height=4, dots_per_metre=None):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + b"\x7f" * width for _ in range(height))
    resolution = struct.pack(">IIB", dots_per_metre, dots_per_metre, 1) if dots_per_metre else None
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + (chunk(b"pHYs", resolution) if resolution else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def render(*sections, title="Title", summary="Summary."):
    return report.render_report(title=title, summary=summary, sections=sections)


def table_texts(table):
    """Return the rows of a rendered table as text, and which columns are aligned right."""
    page = Page(render(table))
    width = len(table.columns)
    cells = page.all("td")
    rows = [[text for _, text in cells[i : i + width]] for i in range(0, len(cells), width)]
    right = ["number" in attributes.get("class", "") for attributes, _ in page.all("th")]
    assert right * len(rows) == ["number" in a.get("class", "") for a, _ in cells]
    return rows, right


def test_everything_is_on_the_page():
    page = Page(
        render(
            report.Text("First\nline.\n\n  Second paragraph.", heading="Words"),
            report.Table(["name", "score"], [["a", 0.5]], caption="Scores."),
            report.Figure(png(), alt="dots", caption="A picture.", heading="Pictures"),
            report.Code("cellplm demo\n  --out DIR\n"),
            summary="One.\n\nTwo.",
        )
    )
    assert [text for _, text in page.all("h1")] == ["Title"]
    assert [text for _, text in page.all("title")] == ["Title"]
    assert [text for _, text in page.all("h2")] == ["Words", "Pictures"]
    paragraphs = [text for _, text in page.all("p")]
    assert paragraphs == ["One.", "Two.", "First line.", "Second paragraph."]
    assert [text for _, text in page.all("figcaption")] == ["Scores.", "A picture."]
    assert [text for _, text in page.all("pre")] == ["cellplm demo\n  --out DIR"]


def test_text_cannot_become_markup():
    evil = "<script>alert(1)</script> \"'&amp;"
    text = render(
        report.Text(evil, heading=evil),
        report.Code(evil, heading=evil),
        report.Table([evil], [[evil]], caption=evil, heading=evil),
        report.Figure(png(), alt=evil, caption=evil, heading=evil),
        title=evil,
        summary=evil,
    )
    assert "<script" not in text
    page = Page(text)
    assert not page.all("script")
    for tag in ("title", "h1", "p", "h2", "pre", "th", "td", "figcaption"):
        assert page.all(tag)
        assert all(shown == evil for _, shown in page.all(tag))
    assert page.all("img")[0][0]["alt"] == evil


def test_the_page_asks_for_nothing_from_outside():
    text = render(report.Figure(png(), alt="dots"))
    page = Page(text)
    policy = [a["content"] for a, _ in page.all("meta") if "Policy" in a.get("http-equiv", "")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for _, attributes, _ in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text


def test_two_renderings_are_the_same():
    sections = [report.Table(["a"], [[1]]), report.Figure(png(), alt="dots")]
    assert render(*sections) == render(*sections)


def test_tables_align_numbers_and_share_decimals():
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    rows, right = table_texts(
        report.Table(
            ["method", "score", "cells", "seconds", "p", "flag", "mixed", "nothing"],
            [
                ["ours", 0.70251, 2638, 1234.56, 3.2e-12, True, 1, None],
                ["PCA", np.float32(-0.5), np.int64(1_000_000), 7.0, 0.04, False, "x", None],
                [None, math.nan, -3, math.inf, 1.0, True, None, math.nan],
            ],
        )
    )
    assert right == [False, True, True, True, True, False, False, False]
    assert rows == [
        ["ours", "0.703", "2,638", "1,235", "3.2e-12", "True", "1", dash],
        ["PCA", f"{minus}0.500", "1,000,000", "7", "0.04", "False", "x", dash],
        [dash, dash, f"{minus}3", "∞", "1", "True", dash, dash],
    ]


@pytest.mark.parametrize(
    ("values", "digits", "expected"),
    [
        ([12.3, 212.34], 3, ["12.3", "212.3"]),
        ([0.0, 0.25], 2, ["0.00", "0.25"]),
        ([5.0], 3, ["5.000"]),
        ([0.00004, 12.0], 3, ["4e-05", "12"]),
        ([2.5e12], 3, ["2.5e+12"]),
        ([0], 3, ["0"]),
    ],
)
def test_number_of_decimals(values, digits, expected):
    rows, _ = table_texts(report.Table(["v"], [[value] for value in values], digits=digits))
    assert [row[0] for row in rows] == expected


def test_an_empty_table_has_its_head():
    rows, right = table_texts(report.Table(["a", "b"], []))
    assert rows == []
    assert right == [False, False]


@pytest.mark.parametrize(
    ("dots_per_metre", "size"),
    [(None, ("600", "400")), (round(192 / 0.0254), ("300", "200"))],
)
def test_png_keeps_its_bytes_and_its_size_on_the_page(dots_per_metre, size):
    image = png(600, 400, dots_per_metre)
    attributes, _ = Page(render(report.Figure(image, alt="dots"))).all("img")[0]
    kind, data = attributes["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == image
    assert (attributes["width"], attributes["height"]) == size


def test_svg_is_shown_as_an_image():
    svg = b'<?xml version="1.0"?>\n<!-- c -->\n<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>'
    page = Page(render(report.Figure(svg, alt="drawing")))
    kind, data = page.all("img")[0][0]["src"].split(",")
    assert kind == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert not page.all("script")


def test_matplotlib_figures_and_axes():
    matplotlib = pytest.importorskip("matplotlib", reason="needs the extra 'eval'")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    images = Page(
        render(report.Figure(figure, alt="a figure"), report.Figure(axes, alt="its axes"))
    ).all("img")
    assert images[0][0]["src"] == images[1][0]["src"]
    assert 230 < int(images[0][0]["width"]) < 330  # about three inches of 96
    data = base64.b64decode(images[0][0]["src"].split(",")[1])
    width, height = struct.unpack(">II", data[16:24])
    assert width == pytest.approx(2 * int(images[0][0]["width"]), abs=2)
    assert height == pytest.approx(2 * int(images[0][0]["height"]), abs=2)


def test_only_wide_pictures_say_that_they_scroll():
    assert "Scroll sideways" in render(report.Figure(png(800, 20), alt="wide"))
    assert "Scroll sideways" not in render(report.Figure(png(300, 20), alt="narrow"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("just words", "type str"),
        (report.Table(["a", "b"], [[1, 2], [3]]), "Row 2 of a table has 1 cells"),
        (report.Figure(png(), alt=" "), "alternative text"),
        (report.Figure(b"GIF89a", alt="x"), "GIF89a"),
        (report.Figure("picture.png", alt="x"), "is a str"),
        (report.Figure(b"<html><svg></svg></html>", alt="x"), "PNG or SVG"),
    ],
)
def test_sections_that_cannot_be_shown_are_refused(section, message):
    with pytest.raises(InputError, match=message) as raised:
        render(section)
    assert "expected" in str(raised.value)


def write(path, *sections):
    return report.write_report(path, title="Title", summary="Summary µ.", sections=sections)


def test_writes_one_readable_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "report.html"
    assert write(path, report.Text("µm and ° and é")) == path
    assert os.listdir(path.parent) == ["report.html"]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "µm and ° and é" in text
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failure_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(path, report.Text("old"))
    old = path.read_text(encoding="utf-8")
    with pytest.raises(InputError):
        write(path, report.Text("new"), "not a section")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        write(path, report.Text("new"))
    assert path.read_text(encoding="utf-8") == old
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file.report\.html"):
        write(tmp_path / "file" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "folder")


def test_a_drawn_figure_has_a_dark_form():
    plt = pytest.importorskip("matplotlib.pyplot", reason="needs the extra 'eval'")
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    page = Page(render(report.Figure(figure, alt="a line")))
    ((source, _),) = page.all("source")
    assert source["media"] == "screen and (prefers-color-scheme:dark)"
    ((image, _),) = page.all("img")
    light, dark = (
        base64.b64decode(text.split(",")[1]) for text in (image["src"], source["srcset"])
    )
    assert light != dark
    corners = [plt.imread(__import__("io").BytesIO(data))[0, 0, :3] for data in (light, dark)]
    assert corners[0].mean() > 0.95
    assert corners[1].mean() < 0.2
    assert not Page(render(report.Figure(png(), alt="a file"))).all("source")
    plt.close(figure)
