"""The package as it is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import cellplm_jax

ROOT = Path(__file__).resolve().parents[1]


def fresh(code: str):
    """What a new interpreter prints, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(result.stdout)


HEAVY = ["jax", "jaxlib", "flax", "orbax", "anndata", "pandas", "scipy", "numpy", "torch", "scanpy"]


def test_import_is_light():
    loaded = fresh(
        f"import cellplm_jax\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    assert loaded == []


def test_the_command_line_parses_without_jax():
    loaded = fresh(
        "from cellplm_jax.cli import build_parser\n"
        "build_parser().parse_args(['embed', 'a', '--model', 'b', '--out', 'c'])\n"
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    assert loaded == []


def test_configurations_need_no_jax():
    loaded = fresh(
        "from cellplm_jax.presets import preset\npreset('small')\n"
        "print(json.dumps([m for m in ('jax', 'anndata') if m in sys.modules]))"
    )
    assert loaded == []


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", cellplm_jax.__version__)
    assert "VERSION" in (ROOT / "setup.py").read_text()


def test_every_public_name_is_there():
    assert set(dir(cellplm_jax)) == set(cellplm_jax.__all__)
    for name in cellplm_jax.__all__:
        assert getattr(cellplm_jax, name) is not None
    for name in ("load", "embed", "embed_file", "pretrain", "datasets", "Pretrained", "InputError"):
        assert name in cellplm_jax.__all__
    with pytest.raises(AttributeError, match="has no attribute 'embedd'"):
        _ = cellplm_jax.embedd
    from cellplm_jax.data import datasets
    from cellplm_jax.tasks.embed import embed

    assert cellplm_jax.embed is embed
    assert cellplm_jax.datasets is datasets


def test_errors_are_what_callers_expect():
    for name in ("InputError", "ConfigError", "CheckpointError"):
        kind = getattr(cellplm_jax, name)
        assert issubclass(kind, cellplm_jax.CellPLMError)
        assert issubclass(kind, ValueError)
    assert issubclass(cellplm_jax.MissingDependencyError, ImportError)


def test_optional_import():
    from cellplm_jax.errors import MissingDependencyError, require

    assert require("json", "eval", "Testing") is json
    with pytest.raises(MissingDependencyError, match=r"cellplm-jax\[eval\]") as error:
        require("surely_not_installed.part", "eval", "Testing")
    assert str(error.value).startswith("Testing needs the Python package 'surely_not_installed'")


def test_resources_are_shipped():
    folder = resources.files("cellplm_jax") / "resources"
    names = {entry.name for entry in folder.iterdir()}
    for data in ("human_genes.csv.gz", "pbmc3k.h5ad"):
        assert data in names
        assert f"{data.split('.')[0]}.LICENSE.md" in names
    assert "resources/*" in (ROOT / "setup.py").read_text()
    assert (ROOT / "cellplm_jax" / "py.typed").exists()


def test_the_page_of_licences_names_all_data_and_every_requirement():
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    resources = ROOT / "cellplm_jax" / "resources"
    for path in resources.iterdir():
        if path.suffix in (".h5ad", ".gz"):
            assert f"| `{path.name}` |" in page
    for folder in (resources / "models").iterdir():
        assert f"| `models/{folder.name}` |" in page
    names = set(re.findall(r"[a-z0-9][a-z0-9-]+", page.split("## Packages")[1]))
    for text in metadata.requires("cellplm-jax"):
        requirement = Requirement(text)
        extra = "".join(re.findall(r'extra == "([a-z0-9]+)"', str(requirement.marker)))
        if extra in ("", "train", "eval", "cpu", "gcp", "export", "hub", "torch"):
            assert re.sub(r"[-_.]+", "-", requirement.name).lower() in names, requirement.name
    always = page.split("### Always installed")[1].split("###")[0]
    assert "GPL" not in always
