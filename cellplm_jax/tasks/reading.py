"""The reading keys of the estimators: documented once, named in the signature of every method that accepts them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypedDict, TypeVar

from cellplm_jax.data.anndata_io import Values
from cellplm_jax.untrusted import require_options

Function = TypeVar("Function", bound=Callable[..., Any])


class _AsFitted(Enum):
    AS_FITTED = "as in fit"


AS_FITTED: Any = _AsFitted.AS_FITTED
"""Default of the arguments of ``predict``: the value from ``fit``."""


class CountKeys(TypedDict, total=False):
    """Where the counts are, and the size of contexts."""

    layer: str | None
    gene_key: str | None
    cells_per_context: int | None
    feature_type: str | None


class ReadingKeys(CountKeys, total=False):
    """Named arguments of ``fit``, ``predict`` and ``score``: fields of :class:`Reading`.

    Editors complete from this class; ``help`` shows the arguments of each method with their text from :class:`Reading`.
    """

    batch_key: str | None
    spatial_key: str | None
    values: Values


@dataclass(frozen=True)
class Reading:
    """Options for reading an AnnData, stored by ``fit`` for ``predict``.

    Attributes:
        batch_key: Column of ``obs`` with the batch (tissue sample) of each cell; cells attend within it. None: one
            batch.
        spatial_key: Key of ``obsm`` with coordinates; the default one is used if present. None: no coordinates.
        layer: Layer with the counts; None: search for them.
        gene_key: Column of ``var`` with gene ids; None: the best match.
        values: Kind of values; see :func:`cellplm_jax.embed`.
        cells_per_context: Maximum number of cells per context at prediction time; training uses the recipe's limit.
            None: no limit.
        split_key: Column of ``obs`` with ``"train"``, ``"valid"`` and any other value for unused cells, which do not
            share contexts; None: a random part of the cells is used for validation.
        feature_type: Type of the features to read; None: genes; "all": every feature.
    """

    batch_key: str | None = None
    spatial_key: str | None = "spatial"
    layer: str | None = None
    gene_key: str | None = None
    values: Values = "counts"
    cells_per_context: int | None = None
    split_key: str | None = None
    feature_type: str | None = None

    def __post_init__(self):
        """Check the types of the options."""
        require_options(dataclasses.asdict(self))

    def changed(self, **changes: Any) -> Reading:
        """Return a copy with the changes that are not :data:`AS_FITTED`."""
        return dataclasses.replace(
            self, **{name: value for name, value in changes.items() if value is not AS_FITTED}
        )

    @property
    def counts(self) -> dict[str, Any]:
        """Arguments of :func:`cellplm_jax.data.anndata_io.open_counts`."""
        names = ("layer", "gene_key", "values", "feature_type")
        return {name: getattr(self, name) for name in names}

    @property
    def cells(self) -> dict[str, Any]:
        """Arguments of :func:`cellplm_jax.tasks.contexts.read_cells`."""
        return {**self.counts, "batch_key": self.batch_key, "spatial_key": self.spatial_key}


KEYS = (
    "batch_key",
    "spatial_key",
    "layer",
    "gene_key",
    "values",
    "cells_per_context",
    "feature_type",
)
"""Reading keys of an estimator unless it names others."""

COUNT_KEYS = tuple(key for key in KEYS if key != "values")
"""Those of tasks that predict counts, and read no other values."""

_FIELDS = {field.name: field for field in dataclasses.fields(Reading)}
_ENTRY = r"^    {}: .*\n?(?:     +.*\n?)*"
# The text of each key is written once, in the docstring of Reading, and copied from there.
_DOCSTRING = inspect.cleandoc(Reading.__doc__ or "")
_TEXTS = {name: "".join(re.findall(_ENTRY.format(name), _DOCSTRING, re.M)) for name in _FIELDS}


def name_keys(
    function: Callable[..., Any],
    keys: Sequence[str],
    options: Mapping[str, inspect.Parameter] | None = None,
    *,
    source: str = ":meth:`predict`",
) -> None:
    """Name the arguments that ``**keys`` stands for in the signature and the docstring of a function.

    Args:
        function: The function; one without ``**keys`` is left as it is.
        keys: Names of the reading keys of its task.
        options: Other arguments that ``**keys`` stands for.
        source: Where these are documented.
    """
    signature = inspect.signature(function)
    named = dict(signature.parameters)
    if named.pop("keys", None) is None:
        return
    fits = function.__name__ == "fit"
    text = ""
    described = inspect.cleandoc(function.__doc__ or "")
    for name, parameter in (options or {}).items():
        named.setdefault(name, parameter)
        if not re.search(_ENTRY.format(name), described, re.M):
            text += f"    {name}: See {source}.\n"
    for name in keys:
        if name not in named:
            # A sentinel, because None is a value of its own.
            default = _FIELDS[name].default if fits else AS_FITTED
            named[name] = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=_FIELDS[name].type,
            )
            text += _TEXTS[name].rstrip() + "\n" if fits else f"    {name}: As in :meth:`fit`.\n"
    # Only what `help` and editors show; calls still pass through `**keys`.
    function.__signature__ = signature.replace(parameters=list(named.values()))  # type: ignore[attr-defined]
    function.__doc__ = re.sub(_ENTRY.format(r"\*\*keys"), lambda _: text, described, flags=re.M)


def keyword_options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only arguments of a function."""
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def keys_of(
    other: Callable[..., Any],
    address: str,
    omitted: Sequence[str] = (),
) -> Callable[[Function], Function]:
    """Return a decorator that names the options of another function, which ``**keys`` stands for.

    Args:
        other: The function that documents the options.
        address: Its name in references, such as ``"cellplm_jax.embed"``.
        omitted: Options that the decorated function lacks.
    """
    options = {n: p for n, p in keyword_options(other).items() if n not in omitted}

    def decorate(function: Function) -> Function:
        name_keys(function, (), options, source=f":func:`{address}`")
        return function

    return decorate
