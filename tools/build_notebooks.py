"""Make the notebooks of ``docs/notebooks`` from their sources, by running them.

The sources are ``docs/notebooks/src/*.py`` in jupytext's percent format: what a notebook does, and nothing of how it is
opened or installed. This program adds that, runs the notebook in an empty folder, and writes it with its outputs.
In full it needs the files of ``cellplm_jax.datasets.public``, in the folder of the variable ``CELLPLM_DATA``::

    python tools/build_notebooks.py                    # all of them, in full: what is committed
    python tools/build_notebooks.py --fast             # a reduced setting, nothing is written: what CI runs
    python tools/build_notebooks.py 01_quickstart      # one of them
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"

FAST = {
    "01_quickstart": [
        ('"unassigned"].copy()', '"unassigned"][:600].copy()'), ("DRAWS = 10", "DRAWS = 2"),
        ("choice(cells, 5,", "choice(cells, 1,"),
    ],
    "02_annotate": [
        ('"unassigned"].copy()', '"unassigned"][:600].copy()'), ("epochs=15", "epochs=2"),
        ('score(known, label_key="cell_type")', 'score(known, label_key="cell_type", unseen_labels="ignore")'),
    ],
    "03_tissue": [
        ('public("xenium_breast")', 'public("xenium_breast", stand_in=True)'),
        ("CELLS = 800", "CELLS = 100"), ("epochs=8", "epochs=1"),
    ],
    "04_integrate": [('public("kang")', 'public("kang", stand_in=True)[::4].copy()')],
    "05_drug_response": [
        ('public("kang")', 'public("kang", stand_in=True)[::2].copy()'),
        ('sorted(adata.obs["cluster_id"].unique())', 'sorted(adata.obs["cluster_id"].unique())[:1]'),
    ],
    "06_denoise": [('"unassigned"].copy()', '"unassigned"][:300].copy()'), ("> 0.05", "> 0.3")],
    "07_pretrain": [
        ('adata.write_h5ad("cells.h5ad")', 'adata[:600].copy().write_h5ad("cells.h5ad")'),
        ("steps=240", "steps=30"), ("evaluate_every=40", "evaluate_every=10"),
        ("checkpoint_every=40", "checkpoint_every=10"),
    ],
    "08_convert_checkpoint": [("[:1000]", "[:200]")],
}  # fmt: skip
"""What ``--fast`` replaces in each source: fewer cells and epochs, and simulated cells for files of other people."""

EXTRAS = {"07_pretrain": "eval,train,hub", "08_convert_checkpoint": "eval,torch"}
COLORS = 192  # of a picture: enough for a plot, a third of the bytes

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"

SETUP = """\
# @title Set-up: installs cellplm-jax if it is missing; the jax of Colab is kept if it is 0.10 to 0.12
!python -c "import cellplm_jax" 2> /dev/null || pip install -q {requirement}"""
HIDDEN = {"tags": ["remove-cell"], "jupyter": {"source_hidden": True}, "cellView": "form"}
THUMBNAIL = (360, 200)  # pixels, at most


def set_address():
    """Return the module that knows the public address."""
    specification = importlib.util.spec_from_file_location(
        "set_address", ROOT / "tools" / "set_address.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def assemble(source: Path, *, fast: bool = False):
    """Return the notebook of a source: badge, a hidden set-up cell, then the source's cells; without outputs.

    Args:
        source: A percent script; its first cell is Markdown and starts with the title.
        fast: In the reduced setting.

    Raises:
        ValueError: The first cell is no title, or the reduced setting names what the source lacks.
    """
    import jupytext
    import nbformat

    text = source.read_text(encoding="utf-8")
    for old, new in FAST[source.stem] if fast else ():
        if old not in text:
            msg = f"{source}: the reduced setting replaces {old!r}, which is not there"
            raise ValueError(msg)
        text = text.replace(old, new)
    read = jupytext.reads(text, fmt="py:percent")
    first, rest = read.cells[0], read.cells[1:]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        msg = f"{source}: the first cell has to be Markdown with the title"
        raise ValueError(msg)
    setting = set_address()
    where, title = setting.address(), first.source
    if where.startswith("github.com/"):
        name = where.removeprefix("github.com/")
        path = f"github/{name}/blob/main/docs/notebooks/{source.stem}.ipynb"
        title = f"{BADGE.format(address=f'https://colab.research.google.com/{path}')}\n\n{title}"
    # Without an address the notebook is in a checkout, two folders below its root.
    extras = EXTRAS.get(source.stem, "eval,train")
    wanted = setting.requirement(extras, where).replace('".[', '"../..[')
    make = nbformat.v4
    setup = make.new_code_cell(SETUP.format(requirement=wanted))
    cells = [make.new_markdown_cell(title), setup, *rest]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"] = HIDDEN if cell is setup else {}
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return make.new_notebook(cells=cells, metadata=metadata)


def run(notebook, *, fast: bool, timeout: int) -> None:
    """Run a notebook in a new folder, which is removed afterwards.

    Args:
        notebook: From :func:`assemble`; receives its outputs.
        fast: In the reduced setting.
        timeout: Seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
    """
    import nbclient

    environment = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # So that !cellplm is the one of this Python, and finds the package of this checkout.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "NO_COLOR": "1",
        # XLA reports slow compilation on a busy machine as an error.
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # tqdm asks for widgets, which a notebook that nobody looks at while it runs does not need.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    if fast:
        # Most of a reduced run is compiling, which need not be done well (flags as in tests/conftest.py).
        quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    folder = tempfile.mkdtemp(prefix="cellplm-notebook-")
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        client = nbclient.NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def problems(notebook) -> list[str]:
    """Return what must not be in the outputs of a notebook, a line each: errors, warnings, paths of a machine.

    Args:
        notebook: After :func:`run`.
    """
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            text = output.get("text", "") or str(output.get("data", {}).get("text/plain", ""))
            if output["output_type"] == "error":
                found.append(f"cell {number}: {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number} writes to stderr: {text[:300]}")
            elif re.search(r"[Ww]arning:", text):
                found.append(f"cell {number} shows a warning: {text[:300]}")
            path = re.search(r"(?:/home|/root|/tmp|/Users|/usr|/content|/work)/\S*", text)
            if path:
                found.append(f"cell {number} shows a path of a machine: {path[0]}")
    return found


def shrink(notebook) -> None:
    """Make pictures small: a palette instead of 24 bits, and no text of the object beside it.

    Args:
        notebook: After :func:`run`; changed in place.
    """
    from PIL import Image

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" not in data:
                continue
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            small = io.BytesIO()
            picture.quantize(COLORS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
            data["image/png"] = base64.b64encode(small.getvalue()).decode()
            data.pop("text/plain", None)
            output.get("metadata", {}).clear()


def children_seconds() -> float:
    """Return the processor time of all programs that ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def thumbnail(notebook, path: Path) -> None:
    """Write the largest picture of a notebook, small, for the index.

    Args:
        notebook: With outputs.
        path: PNG file; not written if the notebook has no picture.
    """
    from PIL import Image

    found = [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    if found:
        picture = Image.open(io.BytesIO(base64.b64decode(max(found, key=len)))).convert("RGB")
        picture.thumbnail(THUMBNAIL)
        path.parent.mkdir(exist_ok=True)
        picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def index(folder: Path) -> str:
    """Return the index of the notebooks: a card each, with title, first sentence, picture and run time.

    Args:
        folder: With the notebooks and their pictures.
    """
    import nbformat

    lines = [
        "# Notebooks", "",
        "For Google Colab or a laptop, shown with their committed outputs.",
        "", "```{toctree}", ":glob:", ":hidden:", "", "*", "```", "", ":::::{container} cards notebooks", "",
    ]  # fmt: skip
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        _, _, text = notebook.cells[0].source.partition("# ")
        title, _, body = text.partition("\n")
        sentence = re.split(r"(?<=\.)\s", " ".join(body.split()), maxsplit=1)[0]
        seconds = notebook.metadata.get("cellplm", {}).get("processor_seconds")
        lines += ["::::{container} card", f"**[{title}]({path.name})**", ""]
        if (folder / "thumbnails" / f"{path.stem}.png").exists():
            lines += [f"![](thumbnails/{path.stem}.png)", ""]
        lines += [sentence + (f" {seconds:.0f} processor seconds." if seconds else ""), "::::", ""]
    return "\n".join([*lines, ":::::", "", "[Running the notebooks](running.md)", ""])


def main() -> int:
    """Run what the command line says; 1 where a notebook shows what it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, such as 01_quickstart; default: all")
    parser.add_argument("--fast", action="store_true", help="reduced setting; nothing is written")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    parser.add_argument("--out", type=Path, default=NOTEBOOKS, help="folder to write to")
    arguments = parser.parse_args()

    import nbformat

    sources = sorted((NOTEBOOKS / "src").glob("*.py"))
    chosen = [path for path in sources if not arguments.names or path.stem in arguments.names]
    unknown = set(arguments.names) - {path.stem for path in chosen}
    if unknown or not chosen:
        parser.error(f"no such notebook: {', '.join(sorted(unknown)) or 'none is there'}")
    failed = False
    for source in chosen:
        notebook, began = assemble(source, fast=arguments.fast), time.monotonic()
        used = children_seconds()
        run(notebook, fast=arguments.fast, timeout=arguments.timeout)
        found = problems(notebook)
        print(f"{source.stem}: {time.monotonic() - began:.0f} s", *found, sep="\n  ", flush=True)
        failed |= bool(found)
        if not arguments.fast:
            shrink(notebook)
            notebook.metadata["cellplm"] = {"processor_seconds": round(children_seconds() - used)}
            thumbnail(notebook, arguments.out / "thumbnails" / f"{source.stem}.png")
            nbformat.validate(notebook)
            partial = arguments.out / f".{source.stem}.partial"
            nbformat.write(notebook, partial)
            os.replace(partial, arguments.out / f"{source.stem}.ipynb")
    if not arguments.fast and arguments.out == NOTEBOOKS:
        (NOTEBOOKS / "index.md").write_text(index(NOTEBOOKS), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
