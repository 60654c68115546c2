"""Kinds of values: raw counts, normalised values and log1p values, recognised by a bounded sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cellplm_jax.data.anndata_files import Opened, Place
from cellplm_jax.data.matrices import Rows
from cellplm_jax.errors import InputError, listing, nearest

Values = Literal["counts", "normalized", "log1p"]

VALUES: tuple[Values, ...] = ("counts", "normalized", "log1p")
"""Valid declarations of the values of a matrix."""

INTEGER_TOLERANCE = 1e-3
"""Maximum distance from an integer at which a value is rounded to a count."""

LARGEST_COUNT = 2.0**24
"""Largest count that float32 represents exactly; larger values are treated as damaged."""

LARGEST_LOG = 30.0
"""Upper bound of log1p values of counts and normalised values (e**30 is 1e13)."""

HIGHEST: dict[Values, float] = {
    "counts": LARGEST_COUNT,
    "normalized": float(np.finfo(np.float32).max),
    "log1p": LARGEST_LOG,
}
"""Largest value of each kind."""

DECLARE = (
    "Pass layer=... (--layer) naming the matrix that holds raw counts, or declare what the values "
    "are with values='log1p' or values='normalized' (--values)"
)
"""Remedy for a matrix without raw counts."""

COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi_counts", "umis", "spliced_counts")
"""Layers searched for raw counts, in this order, after ``X`` and ``raw.X``."""


@dataclass(frozen=True)
class Probe:
    """Statistics of a sample of the values of one matrix.

    Attributes:
        looks: What the values are.
        description: The same in words.
        largest: The largest value; NaN: unknown.
    """

    looks: Literal["counts", "zeros", "damaged counts", "other"]
    description: str
    largest: float


def probe_values(rows: Rows) -> Probe:
    """Classify a matrix by a bounded sample of its values.

    Args:
        rows: The matrix.
    """
    if rows.dtype.kind not in "buif":
        return Probe("other", f"values of type {rows.dtype}", math.nan)
    values = rows.sample().astype(np.float64)
    if not values.size:
        return Probe("zeros", "zeros only", 0.0)
    finite = values[np.isfinite(values)]
    share = (
        float((np.abs(finite - np.rint(finite)) > INTEGER_TOLERANCE).mean()) if finite.size else 0
    )
    largest = float(finite.max()) if finite.size else math.nan
    negative = float((finite < -INTEGER_TOLERANCE).mean()) if finite.size else 0.0
    wrong = []
    if finite.size < values.size:
        wrong.append("NaN or infinite values")
    if negative:
        wrong.append("negative values")
    if share:
        wrong.append("non-integer values")
    if finite.size and not wrong and largest <= LARGEST_COUNT:
        return Probe("counts", f"integers up to {largest:.0f}", largest)
    # If most values are counts, the others are damaged and are reported one by one; centred, scaled
    # and normalised matrices have hardly any integers, or as many negative values as positive.
    if max(share, negative) < 0.5 and (wrong or not finite.size):
        return Probe("damaged counts", f"integers with {' and '.join(wrong)}", largest)
    text = f"{', '.join(wrong) or 'values'}, max {largest:.3g}"
    if negative:
        guess = "looks centred or scaled"
    elif not share:
        guess = "too large for counts"
    elif largest < 20:
        guess = "looks log1p-normalised"
    else:
        guess = "looks normalised by library size"
    return Probe("other", f"{text}, {guess}", largest)


def choose_place(
    opened: Opened,
    layer: str | None,
    values: Values,
    fitted: str = "",
) -> tuple[Place, Rows, Probe, str]:
    """Return the requested matrix, or the first with raw counts, with its rows, its probe and a message.

    Args:
        opened: The AnnData.
        layer: The requested matrix; None: search for raw counts.
        values: Declared kind of its values.
        fitted: The matrix that a fit has read; it is tried before the others.

    Raises:
        InputError: There is no such matrix, or none with such values.
    """
    places = opened.places
    if layer is not None:
        # `layer="X"` and `layer="raw"` name the other two places.
        named = (f"layers['{layer}']", layer, f"{layer}.X")
        place = next((places[name] for name in named if name in places), None)
        if place is None:
            present = f"layers {listing(opened.layers)}" if opened.layers else "no layers"
            raise InputError(
                f"{opened.label} has no layer '{layer}'",
                f"one of its matrices: {present}; also {listing([p for p in places if '[' not in p])}",
                nearest(
                    layer,
                    [*opened.layers, *places],
                    "Pass layer=... (--layer) with one of these names",
                ),
            )
        candidates = [place]
    elif values == "counts":
        order = [fitted, "X", "raw.X", *(f"layers['{key}']" for key in COUNT_LAYERS)]
        candidates = [places[name] for name in dict.fromkeys(order) if name in places]
    else:
        candidates = [places[name] for name in (fitted, "X", "raw.X") if name in places][:1]
    if not candidates:
        raise InputError(
            f"{opened.label} has no matrix X and no raw.X, and its layers are "
            f"{listing(opened.layers)}",
            "raw counts in X, raw.X or a layer",
            "Pass layer=... (--layer) naming the matrix that holds raw counts",
        )

    seen: list[tuple[Place, Rows, Probe]] = []
    for place in candidates:
        rows = place.rows()
        probe = probe_values(rows)
        if values != "counts":
            _check_declared(opened, place, rows, probe, values)
            note = f"Read {place.name} as {values} values ({probe.description})."
            return place, rows, probe, note
        if probe.looks == "counts":
            passed = [f"{other.name}: {held.description}" for other, _, held in seen]
            why = f"; skipped {'; '.join(passed)}" if passed else ""
            note = f"Read raw counts from {place.name} ({probe.description}{why})."
            return place, rows, probe, note
        seen.append((place, rows, probe))
    # Select damaged counts, so that reading them reports the damage.
    damaged = [found for found in seen if found[2].looks == "damaged counts"]
    # An empty matrix is valid; its cells are reported as cells without counts.
    if all(probe.looks == "zeros" for _, _, probe in seen):
        damaged = seen
    for place, rows, probe in damaged:
        return place, rows, probe, f"Read raw counts from {place.name} ({probe.description})."
    found = "; ".join(f"{place.name}: {probe.description}" for place, _, probe in seen)
    raise InputError(
        f"no raw counts in {opened.label} ({found})",
        "non-negative integers in X, raw.X or a layer",
        DECLARE,
    )


def _check_declared(opened: Opened, place: Place, rows: Rows, probe: Probe, values: Values) -> None:
    """Raise an error if the probe contradicts the declared values."""
    if rows.dtype.kind not in "buif":
        raise InputError(
            f"{place.name} of {opened.label} holds {probe.description}",
            "numbers",
            "Pass layer=... (--layer) naming another matrix",
        )
    if probe.looks == "zeros":
        return
    wrong = None
    if values == "log1p" and probe.largest > LARGEST_LOG:
        wrong = f"{place.name} of {opened.label} has values up to {probe.largest:.4g}"
        remedy = "Declare values='normalized' if they are not logarithms, or drop values"
    elif values == "log1p" and probe.looks == "counts" and probe.largest > 1:
        wrong = f"{place.name} of {opened.label} holds {probe.description}, which are raw counts"
        remedy = "Omit values (--values); raw counts need no declaration"
    if wrong:
        raise InputError(wrong, f"log1p values, none above {LARGEST_LOG:.0f}", remedy)
