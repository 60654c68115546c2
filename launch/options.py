"""What the programs of this folder have in common: their command line, refused in one message where it is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from cellplm_jax.config import TrainConfig
from cellplm_jax.errors import ConfigError, InputError, explain
from launch import cluster


def config_keys(kind: type = TrainConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of every part and every value of a configuration."""
    names = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        names.append(name)
        if dataclasses.is_dataclass(hints[field.name]):
            names += config_keys(hints[field.name], f"{name}.")
    return names


def check_config_keys(arguments: Sequence[str], known: Sequence[str] | None = None) -> None:
    """Refuse a misspelt ``--config.`` key by naming the nearest one.

    Args:
        arguments: The command line.
        known: The keys there are; None: those of pretraining.

    Raises:
        ConfigError: A key does not exist.
    """
    known = config_keys() if known is None else known
    for argument in arguments:
        name = argument.split("=", 1)[0].lstrip("-").removeprefix("no")
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        key = name.removeprefix("config.")
        if key in known:
            continue
        # A value that exists under another part is nearer than any other spelling.
        leaf = key.rsplit(".", 1)[-1]
        near = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        parent = key.rpartition(".")[0]
        siblings = [other for other in known if other.rpartition(".")[0] == parent]
        raise ConfigError(
            f"unknown key '--config.{key}'",
            f"one of {', '.join(siblings)}" if siblings else "a key of the configuration",
            f"Did you mean '--config.{near[0]}'?" if near else "Remove it",
        )


def process_flags() -> Callable[[], bool]:
    """Define the flags by which the processes of a run find one another.

    Returns:
        Connects them, see :func:`launch.cluster.join`; to be called once flags are parsed.
    """
    coordinator = flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port where process 0 listens; normally found by itself.",
    )
    processes = flags.DEFINE_integer(
        "num_processes", None, "Processes of the run; normally found by itself."
    )
    process = flags.DEFINE_integer(
        "process_id", None, "Number of this process, from 0; normally found by itself."
    )
    initialization = flags.DEFINE_integer(
        "initialization_timeout", 300, "Seconds within which all processes have to be there."
    )
    heartbeat = flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead."
    )

    def join() -> bool:
        return cluster.join(
            coordinator.value,
            processes.value,
            process.value,
            initialization_timeout=initialization.value,
            heartbeat_timeout=heartbeat.value,
        )

    return join


def check_no_more(argv: Sequence[str]) -> None:
    """Refuse what is no flag.

    Args:
        argv: What :func:`parse_flags` returned.

    Raises:
        InputError: There is more than the program's name.
    """
    if len(argv) > 1:
        raise InputError(
            f"unexpected argument '{argv[1]}'",
            "options of the form --name=value",
            "Put an equals sign between an option and its value",
        )


def parse_flags(
    argv: list[str],
    *,
    program: str,
    example: str = "",
    check: Callable[[list[str]], Any] = lambda argv: None,
) -> list[str]:
    """Parse the command line; whatever is wrong with it becomes one message and exit status 2.

    Args:
        argv: The command line.
        program: Name in front of the message.
        example: A value of ``--config``, where the program has that.
        check: Raises where a ``--config.`` key is wrong or the configuration cannot be loaded; called before the flags
            are parsed.

    Returns:
        What is no flag.
    """
    try:
        check(argv)
        rest = flags.FLAGS(argv)
        # A file that cannot be loaded shows at the first look.
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].value.to_dict()
        return rest
    except ConfigError as error:
        message = str(error)
    except flags.Error as error:
        # A configuration file that fails to load brings its traceback along; its last line says what is wrong.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[-1] if "Traceback" in str(error) else " ".join(lines)
        message = message.removeprefix(f"{ConfigError.__module__}.{ConfigError.__name__}: ")
    except OSError as error:
        message = explain(
            f"the file that --config names cannot be loaded ({str(error).splitlines()[-1].strip()})",
            f"a configuration file, such as {example}",
            "Check the path; it starts from the current directory",
        )
    except (AttributeError, KeyError) as error:
        message = " ".join(str(error).split())
    sys.stderr.write(f"{program}: {message}\n")
    sys.exit(cluster.EXIT_BAD_INPUT)
