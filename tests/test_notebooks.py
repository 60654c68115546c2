"""The committed notebooks: they are what their sources say, open in Colab, and hold the outputs of a clean run.

``make notebooks`` runs them; nothing is run here.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re

import pytest

from tests.conftest import ROOT

pytest.importorskip("jupytext", reason="needs the extra 'notebooks'")
FOLDER = ROOT / "docs" / "notebooks"
SOURCES = sorted((FOLDER / "src").glob("*.py"))
LARGEST = 400_000  # bytes


def builder():
    where = ROOT / "tools" / "build_notebooks.py"
    specification = importlib.util.spec_from_file_location("build_notebooks", where)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read(source):
    import nbformat

    return nbformat.read(FOLDER / f"{source.stem}.ipynb", as_version=4)


def python_of(cell) -> str:
    """The Python of a cell: lines of IPython become ``pass``; a cell of the shell has none."""
    if cell.source.startswith(("%%bash", "# @title")):
        return ""
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.MULTILINE)


each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_every_notebook_has_a_source():
    assert [path.stem for path in SOURCES] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    assert len(SOURCES) == 8


@each
def test_it_equals_its_source(source):
    made, committed = builder().assemble(source), read(source)
    one, two = ([(c.cell_type, c.id, c.source) for c in n.cells] for n in (made, committed))
    assert one == two, "run: make notebooks-full"
    assert made.metadata.kernelspec == committed.metadata.kernelspec
    # The kernel that ran it adds its version.
    assert made.metadata.language_info.items() <= committed.metadata.language_info.items()


@each
def test_it_opens_with_one_hidden_set_up_line(source):
    first, setup = read(source).cells[:2]
    assert first.source.splitlines()[0].startswith(("# ", "[![Open in Colab]"))
    assert "remove-cell" in setup.metadata.tags
    assert setup.metadata.cellView == "form"
    assert len(setup.source.splitlines()) == 2  # a title that Colab shows, and the line
    extras = re.search(r"\[([\w,]+)\]", setup.source)
    assert extras is not None
    declared = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}":' in declared for extra in extras[1].split(","))
    later = "\n".join(cell.source for cell in read(source).cells[2:])
    assert "FAST" not in later
    assert "pip install" not in later


def test_notebooks_follow_the_address(monkeypatch):
    build = builder()
    setting = build.set_address()
    monkeypatch.setattr(build, "set_address", lambda: setting)
    monkeypatch.setattr(setting, "address", lambda: "github.com/someone/cellplm-jax")
    made = build.assemble(SOURCES[0])
    assert (
        "colab.research.google.com/github/someone/cellplm-jax/blob/main/docs"
        in made.cells[0].source
    )
    assert (
        '"cellplm-jax[eval,train] @ git+https://github.com/someone/cellplm-jax"'
        in made.cells[1].source
    )
    monkeypatch.setattr(setting, "address", lambda: "")
    made = build.assemble(SOURCES[0])
    assert "colab" not in made.cells[0].source
    assert '"../..[eval,train]"' in made.cells[1].source


@each
def test_the_reduced_setting_changes_what_is_there(source):
    full, fast = (builder().assemble(source, fast=fast) for fast in (False, True))
    assert [c.source for c in full.cells] != [c.source for c in fast.cells]


def test_the_index_shows_every_notebook():
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert index == builder().index(FOLDER), "run: make notebooks-full"
    for source in SOURCES:
        assert f"({source.stem}.ipynb)" in index


@each
def test_its_code_parses_and_names_what_there_is(source):
    import cellplm_jax

    names = set(cellplm_jax.__all__)
    for cell in read(source).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(python_of(cell))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "cellplm":
                assert node.attr in names, node.attr
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cellplm.plot":
                assert hasattr(cellplm_jax.plot, node.attr), node.attr


@each
def test_its_commands_parse(source):
    from cellplm_jax.cli import build_parser

    for cell in read(source).cells:
        commands = re.findall(r"(?:^|then )cellplm ([^;>\n]+)", cell.source, re.MULTILINE)
        for command in commands if cell.source.startswith("%%bash") else []:
            build_parser().parse_args(command.removesuffix(" 2").split())


@each
def test_its_outputs_are_those_of_a_clean_run(source):
    notebook = read(source)
    assert builder().problems(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code[1:]) >= len(code[1:]) / 2
    assert (FOLDER / f"{source.stem}.ipynb").stat().st_size < LARGEST
    for cell in code:
        drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
        assert drawn or not re.search(r"cellplm\.plot\.", cell.source), cell.source
    text = json.dumps(notebook)
    assert ROOT.as_posix() not in text
    assert "is simulated" not in text  # of the real data
    if source.stem != "08_convert_checkpoint":
        assert "image/png" in text
        assert notebook.metadata.cellplm.processor_seconds > 0


def rows_of(notebook, name):
    """Numbers of a row of every table that a notebook prints; a wide table is printed in several parts."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/plain", "")
            row = rf"^{re.escape(name)}((?: +-?[\d.]+)+) *$"
            numbers = re.findall(row, text, re.MULTILINE)
            if numbers:
                found.append([float(number) for part in numbers for number in part.split()])
    return found


BETTER = {
    # Notebook: number of the table, this package, a baseline, columns where higher is better, and where lower is.
    "01_quickstart": [
        (0, "cellplm", "components", (0, 1, 2), ()),
        (1, "cellplm", "components", (0, 1), ()),
        (-1, "cellplm", "genes", (0, 1), ()),
    ],
    "02_annotate": [
        (0, "CellTypeAnnotator", "logistic regression, same number flagged", (0, 1), (2,))
    ],
    "03_tissue": [(0, "GeneImputer", "ridge regression", (0,), (1,))],
    "04_integrate": [(0, "BatchIntegrator", "Harmony on components", (0, 1, 2, 6), ())],
    "06_denoise": [(0, "denoiser", name, (2,), (0, 1)) for name in ("nearest cells", "gene mean")],
}


@pytest.mark.parametrize("name", BETTER)
def test_it_shows_a_case_in_which_this_package_is_better_than_the_baseline_beside_it(name):
    (source,) = [path for path in SOURCES if path.stem == name]
    notebook = read(source)
    for table, ours, other, higher, lower in BETTER[name]:
        one, two = rows_of(notebook, ours)[table], rows_of(notebook, other)[table]
        assert len(one) == len(two) > max((*higher, *lower))
        assert all(one[column] > two[column] for column in higher), (one, two)
        assert all(one[column] < two[column] for column in lower), (one, two)


def test_the_drug_response_is_predicted_better_than_by_the_mean_in_every_type():
    (source,) = [path for path in SOURCES if path.stem == "05_drug_response"]
    types = ("B cells", "CD14+ Monocytes", "CD4 T cells", "CD8 T cells", "FCGR3A+ Monocytes")
    for name in (*types, "mean"):
        other_error, error, other_correlation, correlation = rows_of(read(source), name)[-1]
        assert error < other_error
        assert correlation > other_correlation


def test_what_must_not_be_in_outputs_is_found():
    import nbformat

    make = nbformat.v4
    outputs = [
        make.new_output("error", ename="ValueError", evalue="no", traceback=[]),
        make.new_output("stream", name="stderr", text="progress"),
        make.new_output("stream", name="stdout", text="x.py:1: FutureWarning: old"),
        make.new_output("stream", name="stdout", text="wrote /home/someone/model"),
        make.new_output("stream", name="stdout", text="fine: 3/4 of runs/small"),
    ]
    cells = [make.new_code_cell("x", outputs=[output]) for output in outputs]
    found = builder().problems(make.new_notebook(cells=cells))
    assert [line.split()[1].rstrip(":") for line in found] == ["0", "1", "2", "3"]


def test_links_between_notebooks_lead_somewhere():
    for source in SOURCES:
        for cell in read(source).cells:
            for target in re.findall(r"\]\((\w+\.ipynb)\)", cell.source):
                assert (FOLDER / target).exists(), target
