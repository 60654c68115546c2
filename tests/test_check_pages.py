"""The check of pages in a browser finds what it is for, and reports of this package pass it."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import ROOT

specification = importlib.util.spec_from_file_location(
    "check_pages", ROOT / "tools" / "check_pages.py"
)
assert specification is not None
assert specification.loader is not None
check = importlib.util.module_from_spec(specification)
specification.loader.exec_module(check)
BAD = """<!doctype html><meta charset="utf-8"><body style="background:#fff;color:#222">
<div style="width:800px">wide</div><p style="color:#aaa">pale words</p>
<div style="overflow-x:auto"><div style="width:2000px">scrolls on its own</div></div></body>"""


def test_without_a_browser_it_gives_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "browser", lambda: None)
    assert check.main([str(tmp_path)]) == 0
    assert "Chromium is not installed" in capsys.readouterr().out


def test_what_is_too_wide_or_too_pale_is_found(tmp_path):
    program = check.browser()
    if program is None:
        pytest.skip("Chromium is not installed")
    from cellplm_jax.report.html import Code, Table, Text, write_report

    (tmp_path / "bad.html").write_text(BAD)
    write_report(
        tmp_path / "good.html",
        title="A title",
        summary="A summary.",
        sections=[
            Text("Words.", "Heading"),
            Code("cellplm embed " + "a" * 300, "Code"),
            Table([f"column {n}" for n in range(20)], [["long text"] * 20], "A caption", "Wide"),
        ],
    )
    for theme in check.THEMES:
        found = {
            (result["page"].split("/")[1], result["width"]): result["problems"]
            for result in check.measure([tmp_path], theme, program, 60)
        }
        assert found["good.html", 390] == found["good.html", 1280] == []
        (pale,) = found["bad.html", 1280]
        assert "contrast 2.32" in pale
        wide, _ = found["bad.html", 390]
        assert wide.startswith("wider than the window: 8")
        assert "(div)" in wide
