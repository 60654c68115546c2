"""The order of the package: who may import whom, and which module alone may know which library."""

from __future__ import annotations

import ast
import functools
import re
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
    "_version": 0,
    "config": 1,
    "config_fields": 1,
    "batch": 1,
    "compilation_cache": 1,
    "platforms": 1,
    "storage": 1,
    "untrusted": 1,
    "manifest": 1,
    "progress": 1,
    "display": 0,
    # Fast forms of array operations, for model, losses and tasks alike.
    "kernels": 1,
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
    "demo_from_scratch": 5,
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


def test_no_module_imports_the_package_itself():
    """Everything at the top of the package is loaded from the modules below it."""
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                assert "cellplm_jax" not in {alias.name for alias in node.names}, module
            if isinstance(node, ast.ImportFrom) and node.module == "cellplm_jax":
                assert {alias.name for alias in node.names} <= set(LEVELS), module


def test_no_import_circle():
    """Imports inside functions count too."""
    graph = {
        module: {name.removeprefix("cellplm_jax.") for name in imports(path)} & set(MODULES)
        for module, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 200
    while graph:
        leaves = {module for module, needed in graph.items() if not needed & set(graph)}
        assert leaves, f"these import one another in a circle: {sorted(graph)}"
        graph = {module: needed for module, needed in graph.items() if module not in leaves}


def users(library: str) -> set[str]:
    return {module for module, path in MODULES.items() if uses(path, library)}


def test_fences():
    # The table of logical axes is Linen's to apply, and so is what a layer computes again.
    assert {part_of(m) for m in users("flax.linen") - {"train.sharding", "kernels.remat"}} == {
        "model"
    }
    assert users("orbax") == {"train.checkpoint"}
    assert users("safetensors") == {"train.tensors"}
    assert {part_of(module) for module in users("huggingface_hub")} <= {"interop", "tasks"}
    assert {part_of(module) for module in users("anndata")} <= {
        "data",
        "plot",
        "report",
        "tasks",
        "demo",
        "demo_from_scratch",
    }
    assert users("numba") == {"kernels.sparse_numba", "tasks.pretrained"}
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


# Changes of layout: one expression each, with nothing to compare.
LAYOUTS = {"by_head", "join_heads", "one_hot_heads"}


def test_every_kernel_has_a_reference_a_test_and_a_reason():
    kernels = {}
    for module, path in MODULES.items():
        if part_of(module) == "kernels":
            assert {part for part in own(path)} <= {"kernels", "batch"}, module
            tests = ROOT / "tests" / "kernels" / f"test_{path.stem}.py"
            functions = {n.name: n for n in tree_of(path).body if isinstance(n, ast.FunctionDef)}
            for name, node in functions.items():
                if name.startswith("_") or name.endswith("_reference") or name in LAYOUTS:
                    continue
                kernels[name] = module
                assert f"{name}_reference" in functions, f"{module}.{name} has no reference"
                assert {name, f"{name}_reference"} <= names_used(tests), f"{module}.{name}: no test"
                reason = ast.get_docstring(node).partition("Why: ")[2].partition("\n\n")[0]
                assert re.search(r"jax 0\.\d+", reason), f"{module}.{name}: why, for which jax?"
    assert len(kernels) > 10


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
        if module != "tasks.prepare_run":
            assert "distributed" not in names_used(path), module


def test_numpy_modules_do_not_import_jax():
    command = [module for module in MODULES if part_of(module) == "cli"]
    pages = [module for module in MODULES if part_of(module) == "report"]
    pictures = [module for module in MODULES if part_of(module) == "plot"]
    for module in ("errors", "config", "presets", *pages, *pictures, *command):
        assert not any(n.split(".")[0] == "jax" for n in top_level_imports(MODULES[module])), module
    for module in MODULES:
        if part_of(module) == "evaluate" or module in (
            "data.genes",
            "data.anndata_io",
            "data.anndata_files",
        ):
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
