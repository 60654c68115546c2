"""Arrays in signatures: every public function names dtype and axes, and a wrong dtype or rank is an error.

``conftest.py`` has beartype check every call in these folders in all tests. Here each array argument of each public
function gets a wrong one in turn.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.errors import InputError
from tests.conftest import CHECKED_FOLDERS, ROOT

SIZE = 4
"""Length of every named axis, and every int, so that all axes fit together."""

TREES = {
    "params", "tree", "shapes", "state", "abstract", "values", "gradients", "given", "copies", "arrays", "sums",
}  # fmt: skip
"""Names of arguments that are trees of arrays, or of their shapes."""

ELSEWHERE = {"cells", "mesh", "arguments", "old", "new", "path", "card", "facts", "metrics"}
"""Names of arguments of any type that are no arrays."""

SHAPED = re.compile(
    r"\w+\[(Array|Any|jax\.Array|np\.ndarray|sparse\.\w+)( \| np\.ndarray)?, '[^']*'\]"
)
"""A type with axes, as text."""

CHECKED_INSIDE = ("Matrix", "Labels", "Values")
"""Types of ``evaluate/inputs.py``: the function itself checks what it gets."""


def parts(module: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the qualified names and definitions of a module's public functions and methods."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and not re.match(r"_(?!_call__$)", node.name):
                yield prefix + node.name, node

    return walk(ast.parse(module.read_text()).body, "")


FUNCTIONS = [
    (f"cellplm_jax.{folder}.{path.stem}", name, node)
    for folder in CHECKED_FOLDERS
    for path in sorted((ROOT / "cellplm_jax" / folder).glob("*.py"))
    for name, node in parts(path)
]


def annotations(node: ast.FunctionDef) -> dict[str, str | None]:
    """Return the annotations of a function as text, by argument and ``return``."""
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    listed += [one for one in (node.args.vararg, node.args.kwarg) if one]
    of = {one.arg: one.annotation for one in listed if one.arg not in ("self", "cls")}
    return {
        name: None if value is None else ast.unparse(value)
        for name, value in (of | {"return": node.returns}).items()
    }


def test_every_array_names_its_axes():
    assert len(FUNCTIONS) > 250
    wrong = []
    for module, name, node in FUNCTIONS:
        for argument, text in annotations(node).items():
            if text is None:
                wrong.append(f"{module}.{name}: {argument} has no type")
                continue
            rest = SHAPED.sub("", re.sub(r"Callable\[.*\]", "", text))
            if re.search(r"\b(Array|ndarray|ArrayLike|csr_matrix)\b", rest):
                wrong.append(f"{module}.{name}: {argument} is {text}, without axes")
            any_ = "Any" in re.split(r"\W", re.sub(r"(dict|Mapping)\[str, Any\]", "", rest))
            if any_ and argument not in TREES | ELSEWHERE | {"return"}:
                wrong.append(f"{module}.{name}: {argument} is {text}")
    assert not wrong, "\n".join(wrong)


def checked(module: str, name: str) -> Callable:
    """Return the function as jaxtyping wraps it, inside of the decorators of JAX and Flax."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    layers = [found]
    while hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    (layer,) = [one for one in layers if "jaxtyping" in str(getattr(one, "__code__", None))]
    return layer


def hints_of(module: str, node: ast.FunctionDef) -> dict[str, Any]:
    """Return the types of a function's arguments; None where type checkers alone know them."""
    namespace = vars(importlib.import_module(module))
    hints = {}
    for name, text in annotations(node).items():
        try:
            hints[name] = eval(text or "None", dict(namespace))
        except NameError:
            hints[name] = None
            assert not re.search(r"Array|ndarray", text or ""), f"{module}.{node.name}: {name}"
    return hints


def is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def arrays_in(hint: Any) -> list[Any]:
    """Return the array types within a type."""
    if is_array(hint):
        return [hint]
    if typing.get_origin(hint) in (Callable, types.FunctionType) or "Callable" in str(hint):
        return []
    return [found for inner in typing.get_args(hint) for found in arrays_in(inner)]


def array(hint: Any, *, dtype: bool = False, rank: bool = False) -> Any:
    """Return an array of a type, with the wrong ``dtype`` or ``rank`` if wanted; None: any would be right."""
    names = hint.dim_str.split()
    loose = [name for name in names if name.startswith("*") or name == "..."]
    shape = [int(name) if name.isdigit() else SIZE for name in names if name not in loose]
    if rank:
        if loose and not shape:
            return None
        shape = [] if loose else [*shape, SIZE]
    kinds = hint.dtypes if isinstance(hint.dtypes, list | tuple) else ["any"]
    kind = next(
        (
            k
            for k in ("float32", "int32", "bool", "uint8", "uint32", "float64", "int64")
            if k in kinds
        ),
        "key" if "key" in str(kinds) else "float32",
    )
    if dtype:
        if "any" in kinds:
            return None
        kind = "float32" if kind in ("bool", "key") else "bool"
    if issubclass(hint.array_type, sparse.spmatrix | sparse.sparray):
        return np.ones((*shape, SIZE)) if rank else sparse.csr_matrix(np.ones(shape, kind))
    if kind == "key":
        return jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
    values = np.ones(shape, kind)
    return jax.numpy.asarray(values) if "jax" in str(hint.array_type) else values


def value(hint: Any, **wrong: bool) -> Any:
    """Return something of a type; with ``wrong`` its first array is wrong, and None says that none can be."""
    if is_array(hint):
        return array(hint, **wrong)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return value(next((one for one in inner if arrays_in(one)), inner[0]), **wrong)
    if origin is typing.Literal:
        return inner[0]
    if "Callable" in str(hint) or hint in (None, Any, types.NoneType):
        return (lambda *_: None) if "Callable" in str(hint) else None
    if origin is tuple:
        found = [value(one, **wrong) for one in inner if one is not ...]
        return None if wrong and any(one is None for one in found) else tuple(found)
    if origin is not None and issubclass(origin, typing.Mapping):
        key, found = value(inner[0]), value(inner[1], **wrong)
        return None if wrong and found is None else {key: found}
    if origin is not None:
        found = value(inner[0], **wrong)
        return None if wrong and found is None else [found]
    simple = {int: SIZE, float: 0.5, bool: False, str: "text"}
    if hint in simple:
        return simple[hint]
    return tuple.__new__(hint) if issubclass(hint, tuple) else object.__new__(hint)


def call(module: str, name: str, node: ast.FunctionDef, given: dict[str, Any]) -> None:
    function = checked(module, name)
    hints = hints_of(module, node)
    positional, named = [], {}
    for parameter in inspect.signature(function).parameters.values():
        found = (
            given[parameter.name] if parameter.name in given else value(hints.get(parameter.name))
        )
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = found
        else:
            positional.append(found)
    function(*positional, **named)


WITH_ARRAYS = [
    pytest.param(module, name, node, id=f"{module.removeprefix('cellplm_jax.')}.{name}")
    for module, name, node in FUNCTIONS
    if any(SHAPED.search(text or "") for key, text in annotations(node).items() if key != "return")
]


@pytest.mark.parametrize(("module", "name", "node"), WITH_ARRAYS)
def test_a_wrong_array_is_an_error(module, name, node):
    hints, tried = hints_of(module, node), 0
    for argument in hints.keys() - {"return"}:
        for what in ("rank", "dtype") if arrays_in(hints[argument]) else ():
            wrong = value(hints[argument], **{what: True})
            if wrong is None:
                continue  # any rank or dtype is right
            tried += 1
            with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{argument}'"):
                call(module, name, node, {argument: wrong})
    assert tried or name in ("constrain", "save_model"), "no argument can be wrong"


def scores() -> Iterator[tuple[str, str, str, str]]:
    """Yield each function of ``evaluate`` that checks its arguments itself, and each of these."""
    for module, name, node in FUNCTIONS:
        for argument, text in annotations(node).items():
            kind = (text or "").split(" ")[0]
            if kind in CHECKED_INSIDE:
                yield module, name, argument, kind


def sound(cells: int = 60) -> dict[str, Any]:
    """Return arguments with which every score can be computed, by name."""
    random = np.random.default_rng(0)
    counts = random.poisson(3.0, (cells, 5)).astype(np.float64)
    halves = np.array(["a", "b"] * (cells // 2))
    return {
        "truth": counts,
        "prediction": counts + 1.0,
        "mask": np.ones(counts.shape, bool),
        "hidden": np.ones(counts.shape, bool),
        "counts": counts,
        "mean": counts + 1.0,
        "dispersion": np.ones(5),
        "changes": counts,
        "embedding": random.standard_normal((cells, 5)),
        "labels": halves,
        "groups": halves,
        "clusters": halves,
        "batches": np.repeat(halves[:2], cells // 2),
        "predicted": halves,
        "genes": list("vwxyz"),
        "classes": ["a", "b"],
        "name": "labels",
        "probabilities": np.full((cells, 2), 0.5),
        "coordinates": random.random((cells, 2)),
        "sample_of": np.zeros(cells, int),
    }


OWN_FORM = {
    "annotation": {"truth": np.array(["a", "b"] * 30)},
    "denoising.clear_markers": {"counts": sparse.csr_matrix(np.eye(60, 5) + 1)},
    "denoising.marker_scores": {"counts": sparse.csr_matrix(np.eye(60, 5) + 1)},
}
"""Arguments that differ from :func:`sound` in some modules or functions."""


@pytest.mark.parametrize(("module", "name", "argument", "kind"), list(scores()))
def test_scores_refuse_a_wrong_array(module, name, argument, kind):
    function = getattr(importlib.import_module(module), name)
    given = sound()
    for place, changes in OWN_FORM.items():
        if f"{module}.{name}".startswith(f"cellplm_jax.evaluate.{place}"):
            given |= changes
    names = inspect.signature(function).parameters
    given = {key: found for key, found in given.items() if key in names}
    if name == "pca_baseline":
        given["genes"] = 5
    function(**given)
    wrong = {"rank": given[argument][None, None], "dtype": np.full(given[argument].shape, "text")}
    if kind == "Labels":
        wrong.pop("dtype")
    if kind == "Values":
        wrong.pop("rank")
    for array in wrong.values():
        with pytest.raises((InputError, ValueError, TypeError)):
            function(**given | {argument: array})
