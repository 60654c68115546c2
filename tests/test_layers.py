"""The order of the package: who may import whom, and which module alone may know which library."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cellplm_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
LEVELS = {
    "errors": 0,
    "config": 1,
    "structs": 1,
    "cache": 1,
    "platforms": 1,
    # Loops over parts of a batch, for model and losses alike.
    "chunks": 1,
    "products": 1,
    # Imported where it is used: it needs Numba.
    "stored_product": 1,
    "data": 2,
    "model": 2,
    "losses": 2,
    "evaluate": 2,
    # Pictures of numbers that are there already: a run draws its own at its end.
    "plot": 2,
    "train": 3,
    # Named configurations need config alone; everything from the tasks up may use them.
    "presets": 3,
    "tasks": 4,
    "interop": 4,
    "report": 5,
    "demo": 5,
    "doctor": 5,
    "plan": 5,
    "cli": 5,
}
SIBLINGS = ("data", "model", "losses", "evaluate")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module a file imports, anywhere in it, as dotted names with what is taken from them."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            found.add(node.args[0].value)  # an optional import
    return frozenset(found)


def own(path: Path) -> set[str]:
    """Parts of this package that a file imports: ``data``, ``cli`` and so on."""
    names = {name for name in imports(path) if name.startswith("cellplm_jax.")}
    return {name.split(".")[1] for name in names} & set(LEVELS)


def uses(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(f"{library}.") for name in imports(path))


def part_of(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_a_level():
    assert {part_of(module) for module in MODULES} == set(LEVELS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    part = part_of(module)
    for other in own(MODULES[module]) - {part}:
        assert LEVELS[other] <= LEVELS[part], f"{module} imports {other}"
        if part in SIBLINGS:
            assert other not in SIBLINGS, f"{module} imports its sibling {other}"
        if LEVELS[part] < 4:
            assert other != "presets", f"{module} imports presets"


def users(library: str) -> set[str]:
    return {module for module, path in MODULES.items() if uses(path, library)}


def test_fences():
    # The table of logical axes is Linen's to apply.
    assert {part_of(m) for m in users("flax.linen") - {"train.sharding"}} == {"model"}
    assert users("orbax") == {"train.checkpoint"}
    assert users("safetensors") == {"train.tensors"}
    assert {part_of(module) for module in users("huggingface_hub")} <= {"interop", "tasks"}
    assert {part_of(module) for module in users("anndata")} <= {"data", "tasks", "demo"}
    assert users("numba") == {"stored_product", "tasks.pretrained"}
    assert users("ml_collections") == set()
    assert users("absl") == set()
    for library in (
        "torch",
        "scanpy",
        "sklearn",
        "matplotlib",
        "safetensors",
        "huggingface_hub",
    ):
        for module in users(library):
            top = {name.split(".")[0] for name in top_level_imports(MODULES[module])}
            assert library not in top, f"{module} needs {library} to be imported"
    assert {part_of(module) for module in users("torch")} == {"interop"}


def top_level_imports(path: Path) -> set[str]:
    """What importing a file imports."""
    found = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@functools.cache
def names_used(path: Path) -> set[str]:
    tree = tree_of(path)
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {name.split(".")[-1] for name in imports(path)}


def test_one_module_lays_arrays_out():
    for name, modules in (
        ("PartitionSpec", {"train.sharding"}),
        ("NamedSharding", {"train.sharding"}),
        ("AxisType", {"train.sharding"}),
        ("Mesh", {"train.sharding", "train.step"}),
    ):
        assert {module for module, path in MODULES.items() if name in names_used(path)} == modules
    # The step names the mesh as a type and makes none.
    step = tree_of(MODULES["train.step"])
    made = [
        n for n in ast.walk(step) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Mesh"
    ]
    assert made == []


def test_no_module_knows_of_other_processes():
    """Who the other processes are is settled in launch/; dask's workers prepare corpora and never train."""
    for module, path in MODULES.items():
        assert not uses(path, "jax.distributed"), module
        if module != "tasks.prepare":
            assert "distributed" not in names_used(path), module


def test_numpy_modules_do_not_import_jax():
    command = [module for module in MODULES if part_of(module) == "cli"]
    pictures = [module for module in MODULES if part_of(module) == "plot"]
    for module in ("errors", "config", "presets", "report", *pictures, *command):
        assert not any(n.split(".")[0] == "jax" for n in top_level_imports(MODULES[module])), module
    for module in MODULES:
        if part_of(module) == "evaluate" or module in ("data.genes", "data.anndata_io"):
            assert not uses(MODULES[module], "jax"), module


@pytest.mark.parametrize("module", MODULES)
def test_no_assert_and_no_print(module):
    for node in ast.walk(tree_of(MODULES[module])):
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno} asserts"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", f"{module}:{node.lineno} prints"


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented(module):
    tree = tree_of(MODULES[module])
    assert ast.get_docstring(tree), module
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


def test_the_fences_can_be_broken(tmp_path):
    """The checks above see imports inside functions, aliases and optional ones."""
    path = tmp_path / "module.py"
    path.write_text(
        "import flax.linen as nn\n\n\ndef f():\n    from jax.sharding import Mesh as M\n"
        "    from cellplm_jax import data\n    from cellplm_jax.train.loop import pretrain\n"
        "    torch = require('torch', 'torch', 'It')\n    return nn, M, data, pretrain, torch\n"
    )
    assert uses(path, "flax.linen")
    assert uses(path, "torch")
    assert own(path) == {"data", "train"}
    assert "Mesh" in names_used(path)
