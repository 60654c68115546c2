"""Lines and bars of long work."""

from __future__ import annotations

import time

import pytest

from cellplm_jax import progress as module
from cellplm_jax.progress import ProgressReport, named_stage


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
    progress.close()
    progress.close()
    assert capsys.readouterr().err.startswith("work: 10/10 steps")
    progress = ProgressReport("work", 10, every=1000)
    progress.say("skipped")
    assert capsys.readouterr().err == "work: skipped\n"
    progress.close()
    for quiet in (ProgressReport("work", 10, quiet=True, every=0.0),):
        quiet.update(10)
        quiet.say("skipped")
        quiet.stage("end")
        quiet.close("summary")
    assert capsys.readouterr().err == ""


def test_a_summary_replaces_the_last_line(capsys):
    progress = ProgressReport("work", 10, every=1000)
    progress.update(10)
    progress.close("worked on 10")
    assert capsys.readouterr().err == "worked on 10\n"


def test_every_stage_is_named(capsys):
    progress = ProgressReport("work", 10, every=0.0)
    progress.update(10)
    progress.stage("joining")
    progress.close()
    assert capsys.readouterr().err.splitlines()[-1].endswith("joining")


def test_a_long_first_unit_says_that_it_compiles(capsys):
    progress = ProgressReport("work", 2, every=1.0)
    time.sleep(1.2)
    progress.update(1)
    progress.close()
    assert capsys.readouterr().err.splitlines()[0] == "work: compiling, 1 s"
    # A report that was abandoned, as after an error, says nothing later.
    progress = ProgressReport("work", 2, every=1.0)
    del progress
    time.sleep(1.2)
    assert capsys.readouterr().err == ""


def test_a_long_stage_is_named(capsys):
    for quiet, seconds, expected in (
        (False, 0.3, "reading ...\n"),
        (True, 0.3, ""),
        (False, 0, ""),
    ):
        with named_stage("reading", quiet=quiet, after=0.1):
            time.sleep(seconds)
        time.sleep(0.15)
        assert capsys.readouterr().err == expected


def test_the_time_of_compiling_is_stated(capsys, monkeypatch):
    jax = pytest.importorskip("jax")
    before = module.compile_seconds()
    jax.jit(lambda x: x * 2.5 + time.time())(1.0).block_until_ready()
    assert module.compile_seconds() > before
    progress = ProgressReport("work", 1)
    progress._start -= 30
    monkeypatch.setitem(module._compiled, "seconds", module.compile_seconds() + 12)
    progress.update(1)
    progress.close()
    assert "30 s (12 s compiling)" in capsys.readouterr().err


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = ProgressReport("work", 10)
    progress.update(4, "half")
    progress.update(10, "done")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "work: 10/10 steps" in err.splitlines()[-1]


def test_a_notebook_gets_a_real_bar():
    """In a kernel of Jupyter: a bar that is updated in place, then one line; nothing on standard error."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = (
        "import time\nfrom cellplm_jax.progress import ProgressReport\n"
        "report = ProgressReport('work <1>', 4, unit='cells')\n"
        "report.update(1)\ntime.sleep(0.3)\nreport.update(3)\nreport.say('note')\nreport.update(4)\n"
    )
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(code),
            nbformat.v4.new_code_cell(f"{code}report.close('4 cells')"),
        ]
    )
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    running, closed = (cell.outputs for cell in notebook.cells)
    assert {output.output_type for output in running + closed} == {"display_data", "stream"}
    bar = running[0].data["text/html"]
    assert '<progress value="3" max="4"></progress>' in bar
    assert "work &lt;1&gt;: 3/4 cells" in bar
    assert running[1].name == "stdout"
    assert closed[0].data == {"text/plain": "4 cells", "text/html": "4 cells"}
