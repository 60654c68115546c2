"""Docstrings say what a caller needs: every argument, every error that is raised on purpose, shapes of arrays."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import cellplm_jax
from cellplm_jax.tasks.recipe import Training
from tests.conftest import ROOT

PACKAGE = ROOT / "cellplm_jax"
# What a command refuses is its exit status; nobody calls its functions.
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if "cli" not in p.relative_to(PACKAGE).parts]
ERRORS = {"InputError", "ConfigError", "CheckpointError", "MissingDependencyError"}
# Modules whose functions take and return arrays and little else.
OF_ARRAYS = ("evaluate", "losses", "model")
VERBS = ("fit", "predict", "score", "save", "load", "predict_file", "score_genes")


def public_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yield public functions and methods of public classes, with the docstring that stands for each."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            described = ast.get_docstring(node) or ""
            for inner in node.body:
                if not isinstance(inner, ast.FunctionDef):
                    continue
                # What a constructor is given and refuses stands in the docstring of the class.
                if inner.name in ("__init__", "__post_init__"):
                    yield f"{node.name}.{inner.name}", inner, described
                elif not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner, ast.get_docstring(inner) or ""


def section(docstring: str, name: str) -> str:
    """Return the lines of one section of a Google docstring."""
    found = re.search(rf"^ *{name}:\n((?:(?: +.*)?\n?)*)", docstring, re.MULTILINE)
    return found[1] if found else ""


def raised(function: ast.FunctionDef) -> set[str]:
    """Return the errors of this package that a function's own body raises."""
    found = set()
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(getattr(node.exc.func, "id", ""))
        waiting += ast.iter_child_nodes(node)
    return found & ERRORS


def public_callables() -> Iterator[tuple[str, object]]:
    """Yield what users call: names of the package, of its two public modules, and the verbs of the estimators."""
    for name in cellplm_jax.__all__:
        value = getattr(cellplm_jax, name)
        if isinstance(value, ModuleType):
            for inner in getattr(value, "__all__", [n for n in vars(value) if n[0] != "_"]):
                found = getattr(value, inner)
                if inspect.isfunction(found) and found.__module__.startswith("cellplm_jax"):
                    yield f"{name}.{inner}", found
        elif inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            for verb in VERBS:
                if callable(found := getattr(value, verb, None)):
                    yield f"{name}.{verb}", found


CALLABLES = dict(public_callables())


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_described(name):
    value = CALLABLES[name]
    docstring = inspect.getdoc(value) or ""
    assert docstring, name
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    described = section(docstring, "Args") + section(docstring, "Attributes")
    omitted = {"self", "cls"}
    if "**training:" in described:
        # One entry refers to the recipe, whose fields are documented there.
        omitted |= set(Training.__annotations__)
    for argument in inspect.signature(value).parameters.values():  # pyright: ignore[reportArgumentType]
        if argument.name not in omitted:
            stars = {argument.VAR_POSITIONAL: "\\*", argument.VAR_KEYWORD: "\\*\\*"}
            written = stars.get(argument.kind, "") + re.escape(argument.name)
            # Fields of a dataclass may share a line: "log_every, evaluate_every: Steps between these."
            pattern = rf"^ *(?:\w+, )*{written}(?:, \w+)*:"
            assert re.search(pattern, described, re.MULTILINE), argument.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_errors_are_announced(path):
    for name, function, docstring in public_functions(path):
        for error in raised(function):
            assert error in section(docstring, "Raises"), f"{path.name}: {name} raises {error}"


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in OF_ARRAYS],
    ids=lambda path: path.name,
)
def test_arrays_have_shapes(path):
    for name, function, docstring in public_functions(path):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        annotations = [a.annotation for a in arguments if a.annotation] + [function.returns]
        written = [re.sub(r"Callable\[.*\]", "", ast.unparse(a)) for a in annotations if a]
        arrays = [text for text in written if re.search(r"\b(ndarray|Array)\b", text)]
        if arrays and function.name not in ("__init__", "__post_init__"):
            # In the signature, as tests/test_shapes.py wants it of all public functions, or in the docstring.
            shaped = all(re.search(r"\w\[.+, '.*'\]", text) for text in arrays)
            assert shaped or "[" in docstring, f"{path.name}: {name} does not give a shape"


def test_the_checks_can_fail(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'def f(x):\n    """Do it.\n\n    Raises:\n        ConfigError: Sometimes.\n    """\n'
        "    if x:\n        raise InputError(x)\n    raise ConfigError(x)\n"
    )
    ((name, function, docstring),) = public_functions(path)
    assert name == "f"
    assert raised(function) == {"InputError", "ConfigError"}
    assert "ConfigError" in section(docstring, "Raises")
    assert "InputError" not in section(docstring, "Raises")
