"""Estimators as configurations: what one is made and fitted with, as keys with defaults, and back."""

from __future__ import annotations

import inspect
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import cellplm_jax
from cellplm_jax.cli.tasks import RENAMED
from cellplm_jax.config import FinetuneConfig, from_dict, to_dict
from cellplm_jax.errors import ConfigError
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.tables import read_names

TASKS = {
    "annotate": "CellTypeAnnotator",
    "denoise": "Denoiser",
    "impute": "GeneImputer",
    "perturb": "PerturbationPredictor",
    "samples": "SampleClassifier",
}
"""The class of every task."""


def class_of(task: str) -> type[Estimator]:
    """Return the estimator of a task.

    Raises:
        ConfigError: There is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"task = {task!r}", f"one of {', '.join(map(repr, TASKS))}", "Name one")
    return getattr(cellplm_jax, TASKS[task])


def config_of(task: str, **values: Any) -> ConfigDict:
    """Return the configuration of a task.

    Its keys: ``task``; ``model``, what to start from (``"none"``: from scratch); the other arguments of the
    estimator's constructor and of its ``fit``, by their names; and ``training``, the recipe.

    Args:
        task: One of :data:`TASKS`.
        **values: Values that differ from the estimator's own defaults.

    Raises:
        ConfigError: There is no such task.
        KeyError: There is no such key.
    """
    kind = class_of(task)
    config = ConfigDict({"task": task, "model": "small"})
    for key, argument in {**_of_constructor(kind), **_of_fit(kind)}.items():
        default = argument.default
        if default is None or default is inspect.Parameter.empty:
            default = placeholder(_type_of(argument))
        config[key] = default
    config.training = ConfigDict(to_dict(kind.recipe))
    with config.ignore_type():
        for key, value in values.items():
            if key not in config:
                raise KeyError(key)
            config[key] = value
    return config


def arguments_of(config: ConfigDict) -> tuple[type[Estimator], dict[str, Any], dict[str, Any]]:
    """Return the estimator of a configuration, and the arguments of its constructor and of ``fit``.

    Args:
        config: From :func:`config_of`.

    Raises:
        ConfigError: A value is impossible, or one that is needed is not set.
    """
    values = config.to_dict()
    kind = class_of(values["task"])
    made = {"model": None if values["model"] == "none" else values["model"]}
    made |= {
        key: _value(key, values[key], argument) for key, argument in _of_constructor(kind).items()
    }
    recipe = to_dict(kind.recipe)
    training = from_dict(FinetuneConfig, values["training"], path="training")
    made |= {
        name: getattr(training, name)
        for name, value in to_dict(training).items()
        if value != recipe[name]
    }
    fitted = {
        argument.name: _value(key, values[key], argument) for key, argument in _of_fit(kind).items()
    }
    return kind, made, fitted


def config_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Return the dotted names of every part and every value of a configuration."""
    names = []
    for key in config:
        names.append(f"{prefix}{key}")
        # A value that is not set has no type to ask for.
        if isinstance(value := config.get(key), ConfigDict):
            names += config_keys(value, f"{prefix}{key}.")
    return names


def _of_constructor(kind: type[Estimator]) -> dict[str, inspect.Parameter]:
    found = {**_keywords(Estimator.__init__), **_keywords(kind.__init__)}
    found.pop("quiet")
    return found


def _of_fit(kind: type[Estimator]) -> dict[str, inspect.Parameter]:
    return {RENAMED.get(name, name): argument for name, argument in _keywords(kind.fit).items()}


def _keywords(function: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {
        name: argument
        for name, argument in parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _type_of(argument: inspect.Parameter) -> type:
    """Return the type of the text, or number, that stands for an argument without a default."""
    first = str(argument.annotation).split("|")[0].strip()
    return {"int": int, "float": float}.get(first, str)


def _value(key: str, value: Any, argument: inspect.Parameter) -> Any:
    annotation = str(argument.annotation)
    if value is None and argument.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{key} is not set",
            "a value: this task cannot do without",
            f"Add --config.{key}=VALUE",
        )
    if value == "none" and "None" in annotation:
        return None
    if key == "genes" and isinstance(value, str) and value != "default":
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"genes = {value!r}", "'default', 'none' or a number", "Correct it")
        return int(value)
    if isinstance(value, str) and annotation.startswith("Sequence[str]"):
        return read_names(value)
    return value
