"""Lines and bars of long work."""

from __future__ import annotations

import pytest

from cellplm_jax.progress import ProgressReport


def test_progress_lines_go_to_standard_error(capsys):
    progress = ProgressReport("work", 10, unit="cells", every=0.0)
    progress.update(6, "half")
    progress.update(10)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("work: 6/10 cells")
    assert lines[0].endswith("half")
    assert "left" not in lines[1]  # nothing is left
    progress = ProgressReport("work", 10, every=1000)
    progress.update(5)
    assert capsys.readouterr().err == ""
    progress.update(10)
    assert "10/10" in capsys.readouterr().err
    progress.say("skipped")
    assert capsys.readouterr().err == "work: skipped\n"
    ProgressReport("work", 10, quiet=True, every=0.0).update(10)
    ProgressReport("work", 10, quiet=True, every=0.0).say("skipped")
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = ProgressReport("work", 10)
    progress.update(10, "done")
    progress.close()
    assert capsys.readouterr().out == ""
