"""Make the notebooks of ``docs/notebooks`` from their sources, by running them.

The sources are ``docs/notebooks/src/*.py`` in jupytext's percent format: what a notebook does, and nothing of how it is
opened or installed. This program adds that, runs the notebook in an empty folder, and writes it with its outputs::

    python tools/build_notebooks.py                    # all of them, in full: what is committed
    python tools/build_notebooks.py --fast             # a reduced setting, nothing is written: what CI runs
    python tools/build_notebooks.py 01_quickstart      # one of them
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"

REPOSITORY = "OWNER/cellplm-jax"
"""Where the badge opens the notebooks from: the one place to write the public repository's name."""

FAST = "CELLPLM_NOTEBOOK_FAST"
EXTRAS = {"05_pretrain": "eval,train,hub", "06_convert_checkpoint": "eval,torch"}
COLORS = 192  # of a picture: enough for a plot, a third of the bytes

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"

INSTALL = '''\
# Installs cellplm-jax where it is missing, as on Colab. The machine's own jax is kept: it was built for its GPU or
# TPU, so the versions that are there become a constraint. If pip says that they cannot be kept, that jax is too old
# or too new for cellplm-jax (it needs 0.10 to 0.12); nothing is changed then.
import importlib.metadata
import importlib.util
from pathlib import Path

if importlib.util.find_spec("cellplm_jax") is None:
    there = [name for name in ("jax", "jaxlib") if importlib.util.find_spec(name)]
    kept = [f"{{name}}=={{importlib.metadata.version(name)}}" for name in there]
    Path("constraints.txt").write_text("\\n".join(kept))
    %pip install -q -c constraints.txt "cellplm-jax[{extras}]"'''

CHECK = """\
import os

import jax

# Continuous integration runs a reduced setting: fewer cells and epochs. Results below are of the full one.
FAST = os.environ.get("CELLPLM_NOTEBOOK_FAST") == "1"

versions = {name: importlib.metadata.version(name) for name in ("cellplm-jax", "jax")}
print(*(f"{name} {version}" for name, version in versions.items()), "on", jax.devices()[0].platform)"""


def assemble(source: Path):
    """Return the notebook of a source: badge, install cell, check cell, then the source's cells; without outputs.

    Args:
        source: A percent script; its first cell is Markdown and starts with the title.
    """
    import jupytext
    import nbformat

    read = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    first, rest = read.cells[0], read.cells[1:]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        msg = f"{source}: the first cell has to be Markdown with the title"
        raise ValueError(msg)
    path = f"blob/main/docs/notebooks/{source.stem}.ipynb"
    badge = BADGE.format(address=f"https://colab.research.google.com/github/{REPOSITORY}/{path}")
    extras = EXTRAS.get(source.stem, "eval,train")
    make = nbformat.v4
    cells = [
        make.new_markdown_cell(f"{badge}\n\n{first.source}"),
        make.new_code_cell(INSTALL.format(extras=extras)),
        make.new_code_cell(CHECK),
        *rest,
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"] = {}
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
        FAST: "1" if fast else "0",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # So that !cellplm is the one of this Python, and finds the package of this checkout.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "NO_COLOR": "1",
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
        notebook, began = assemble(source), time.monotonic()
        run(notebook, fast=arguments.fast, timeout=arguments.timeout)
        found = problems(notebook)
        print(f"{source.stem}: {time.monotonic() - began:.0f} s", *found, sep="\n  ", flush=True)
        failed |= bool(found)
        if not arguments.fast:
            shrink(notebook)
            nbformat.validate(notebook)
            partial = arguments.out / f".{source.stem}.partial"
            nbformat.write(notebook, partial)
            os.replace(partial, arguments.out / f"{source.stem}.ipynb")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
