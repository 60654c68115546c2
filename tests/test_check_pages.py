"""The check of pages in a browser finds what it is for, and reports of this package pass it."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import ROOT


def tool(name):
    where = ROOT / "tools" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, where)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


check, samples = tool("check_pages"), tool("sample_reports")
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


def test_every_command_with_a_report_is_among_the_samples():
    """Their lines parse, and every command that has ``--report`` is there."""
    import argparse
    import shlex

    from cellplm_jax.cli import build_parser

    def reporting(parser, name=()):
        if any("--report" in action.option_strings for action in parser._actions):
            yield name
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for verb, below in action.choices.items():
                    yield from reporting(below, (*name, verb))

    lines = [shlex.split(line) for line in samples.COMMANDS.values()]
    for line in lines:
        build_parser().parse_args([*line, "--report", "page.html", "--quiet"])
    for words in reporting(build_parser()):
        assert any(tuple(line[: len(words)]) == words for line in lines), words
