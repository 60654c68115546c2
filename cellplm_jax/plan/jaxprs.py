"""Operations of traced functions, counted in their jaxprs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def product_flops(jaxpr: Any) -> float:
    """Count the operations of the matrix products of a traced function, all devices together.

    A multiplication and an addition each; the body of a scan as often as it runs, that of a data-dependent loop once,
    of a conditional the costliest branch. Recomputation in the backward pass is in the trace, so it is counted.

    Args:
        jaxpr: A jaxpr, open or closed.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = 1
            for axis in contracted:
                inner *= left[axis]
            total += 2.0 * equation.outvars[0].aval.size * inner
            continue
        parts = [product_flops(part) for part in inner_jaxprs(equation.params.values())]
        if name == "scan":
            total += equation.params["length"] * sum(parts)
        elif name == "cond":
            total += max(parts, default=0.0)
        else:
            total += sum(parts)
    return total


def inner_jaxprs(values: Any) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation, such as the body of a loop."""
    for value in values:
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from inner_jaxprs(value)
