"""Fields of a configuration: strict reading from plain dictionaries, and checks of their values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from cellplm_jax.errors import ConfigError, nearest, quote, shorten

ConfigType = TypeVar("ConfigType")


def check(condition: bool, found: str, expected: str, remedy: str) -> None:
    """Require a condition.

    Raises:
        ConfigError: It does not hold.
    """
    if not condition:
        raise ConfigError(found, expected, remedy)


def at_least(config: Any, part: str, minimum: int, *names: str) -> None:
    """Check that fields are numbers of at least ``minimum``; NaN never is."""
    for name in names:
        value = getattr(config, name)
        path = f"{part}.{name}" if part else name
        check(value >= minimum, f"{path} = {value}", f"at least {minimum}", f"Raise {path}")


def at_most(config: Any, part: str, maximum: int, *names: str) -> None:
    """Check that fields are no larger than ``maximum``."""
    for name in names:
        value = getattr(config, name)
        path = f"{part}.{name}" if part else name
        check(value <= maximum, f"{path} = {value}", f"{maximum} or less", f"Lower {path}")


def positive(config: Any, part: str, *names: str) -> None:
    """Check that fields are numbers above 0; NaN never is."""
    for name in names:
        value = getattr(config, name)
        path = f"{part}.{name}" if part else name
        check(value > 0, f"{path} = {value}", "a number above 0", f"Raise {path}")


def fraction(value: float, name: str, *, below_one: bool = True) -> None:
    """Check that a number is between 0 and 1; NaN never is."""
    valid = 0.0 <= value < 1.0 if below_one else 0.0 <= value <= 1.0
    interval = "[0, 1)" if below_one else "[0, 1]"
    check(valid, f"{name} = {value}", f"a number in {interval}", f"Set {name} inside it")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(
    kind: type[ConfigType],
    values: Mapping[str, Any],
    *,
    path: str = "",
) -> ConfigType:
    """Build a configuration strictly from nested dictionaries.

    Args:
        kind: The dataclass to build.
        values: Its fields; missing ones take their defaults, unknown ones are an error.
        path: Position within the complete configuration, for messages.

    Returns:
        An instance of ``kind``.

    Raises:
        ConfigError: A key is unknown (the nearest known key is named), a required one is missing, a value has the
            wrong type, or the combination is impossible.
    """
    where = path or kind.__name__
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where} is {type(values).__name__} {shorten(repr(values))}",
            "a mapping of its fields",
            f"Give a dictionary for {where}",
        )
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            remedy = nearest(key, fields, "Remove it")
            raise ConfigError(
                f"unknown key {quote(key)} in {where}",
                f"one of {', '.join(sorted(fields))}",
                remedy,
            )
    prepared = {}
    for name, entry in fields.items():
        if name in values:
            dotted = f"{path}.{name}" if path else name
            prepared[name] = _convert(hints[name], values[name], dotted)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{where} has no '{name}'", "a value for every required field", f"Set {name}"
            )
    return kind(**prepared)


def from_config_dict(kind: type[ConfigType], config: Any) -> ConfigType:
    """Build a configuration from an ``ml_collections.ConfigDict`` (``config.to_dict()``), strictly.

    Args:
        kind: The dataclass to build.
        config: An ``ml_collections.ConfigDict`` or ``FrozenConfigDict``.

    Raises:
        ConfigError: As :func:`from_dict`.
    """
    return from_dict(kind, config.to_dict())


COUNT_DECODERS = ("negative_binomial", "zero_inflated_negative_binomial")
"""Kinds of decoder that predict means of counts; the others predict log-normalised expression."""


def check_objective(objective: str, decoder: str) -> None:
    """Raise ConfigError if a kind of objective needs an output that a kind of decoder lacks."""
    inflated = "zero_inflated_negative_binomial"
    possible = (inflated,) if objective == inflated else COUNT_DECODERS
    check(
        decoder in possible or objective == "mean_squared_error",
        f"objective.kind = '{objective}' with decoder.kind = '{decoder}'",
        f"decoder.kind = {' or '.join(map(repr, possible))}",
        "Change one of them; objective.kind = 'mean_squared_error' fits every decoder",
    )


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return from_dict(typing.cast(type, hint), value, path=path)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        remedy = nearest(value, choices, "Choose one of them")
        raise ConfigError(
            f"{path} = {shorten(repr(value))}",
            "one of " + ", ".join(map(repr, choices)),
            remedy,
        )
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**100:
            raise ConfigError(
                f"{path} is an integer of {value.bit_length()} bits", "a number", "Correct it"
            )
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is hint:
            return value
        raise ConfigError(
            f"{path} = {shorten(repr(value))} ({type(value).__name__})",
            hint.__name__,
            "Correct its type",
        )
    return value
