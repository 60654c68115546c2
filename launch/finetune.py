"""Fit an estimator: ``python launch/finetune.py --config=configs/finetune_annotate.py --data=IN.h5ad --workdir=DIR``.

The configuration names the task, what to start from, the estimator's arguments and its recipe; any of them can be
changed on the command line, such as ``--config.training.learning_rate=1e-3``. When it is done, the work directory
appears, whole or not at all, with

- ``estimator/``: the fitted estimator, opened with its class's ``load`` or given to ``cellplm TASK predict --model``;
- ``metrics.json``: what the fit was, and with ``--test`` its scores on other cells;
- ``history.json``, ``history.png``: every epoch, and the picture of it (where there were epochs);
- ``config.json``: what it was fitted with.

Exit status: 0 done, also where it was done before; 2 bad configuration, data or work directory; 1 anything else.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellplm_jax.errors import CellPLMError, InputError
from cellplm_jax.platforms import check_platforms
from cellplm_jax.storage import atomic_write, is_remote
from cellplm_jax.train.workdir import first_difference
from launch import cluster, estimators, options

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration.")
_DATA = flags.DEFINE_string("data", None, "Cells to fit on, .h5ad.", required=True)
_TEST = flags.DEFINE_string("test", None, "Other cells, to score the fitted estimator on.")
_WORKDIR = flags.DEFINE_string("workdir", None, "New directory of the results.", required=True)
flags.mark_flag_as_required("config")

CONFIG, METRICS, HISTORY = "config.json", "metrics.json", "history.json"
PICTURE, ESTIMATOR = "history.png", "estimator"


def check_config_keys(argv: list[str]) -> None:
    """Refuse a misspelt ``--config.`` key by naming the nearest one of the configuration's file.

    Args:
        argv: The command line.

    Raises:
        ConfigError: A key does not exist.
        OSError: The file cannot be loaded.
    """
    path = [a.partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
    if not path:
        return
    apart = flags.FlagValues()
    alone = [argv[0], f"--config={path[-1]}"]
    holder = config_flags.DEFINE_config_file("config", flag_values=apart, sys_argv=alone)
    apart(alone)
    # What is not a configuration of this program shows here.
    options.check_config_keys(argv, estimators.config_keys(holder.value))


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; whatever is wrong with it becomes one message and exit status 2."""
    return options.parse_flags(
        argv,
        program="finetune",
        example="configs/finetune_annotate.py",
        check=check_config_keys,
    )


def check_workdir(workdir: Path, wanted: dict[str, Any]) -> bool:
    """Say whether a work directory holds the results already.

    Args:
        workdir: New, empty, or left by this program.
        wanted: What is to be fitted, as in :data:`CONFIG`.

    Raises:
        InputError: It holds the results of something else, or other files.
    """
    if is_remote(str(_WORKDIR.value)):
        raise InputError(
            f"--workdir={_WORKDIR.value}", "a local directory", "Fit locally, then copy the results"
        )
    if not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())):
        if not os.access(_first_existing(workdir), os.W_OK):
            raise InputError(f"'{workdir}' cannot be made", "a writable place", "Name another one")
        return False
    try:
        there = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        json.loads((workdir / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{workdir}' is not empty and holds no results of this program",
            "a new or empty directory, or that of a finished fit",
            "Name another --workdir, or remove this one",
        ) from error
    difference = first_difference(there, wanted)
    if difference is not None:
        raise InputError(
            f"'{workdir}' holds a fit that differs in {difference}",
            "a new directory for another fit",
            "Name another --workdir",
        )
    return True


def run() -> None:
    """Fit, score and write.

    Raises:
        CellPLMError: Configuration, data or work directory cannot be used.
    """
    started = time.monotonic()
    kind, made, fitted = estimators.arguments_of(_CONFIG.value)
    workdir = Path(_WORKDIR.value).expanduser()
    wanted = {
        "config": _CONFIG.value.to_dict(),
        "data": _name_and_size(_DATA.value),
        "test": None if _TEST.value is None else _name_and_size(_TEST.value),
    }
    wanted = json.loads(json.dumps(wanted))
    task, load = _CONFIG.value.task, f"cellplm_jax.{kind.__name__}.load('{workdir / ESTIMATOR}')"
    if check_workdir(workdir, wanted):
        sys.stdout.write(
            f"{task}: '{workdir}' is finished, nothing was fitted again\nopen: {load}\n"
        )
        return
    test = None if _TEST.value is None else _read(_TEST.value)
    estimator: Any = kind(**made)
    estimator.fit(_DATA.value, **fitted)
    metrics = {"task": task, "class": kind.__name__, "fit": estimator.facts}
    if test is not None:
        metrics["test"] = estimator.score(test)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(workdir) as partial:
        partial.mkdir()
        estimator.save(partial / ESTIMATOR)
        _write_json(partial / CONFIG, wanted)
        _write_json(partial / METRICS, metrics)
        if estimator.history:
            _write_json(partial / HISTORY, estimator.history)
            _draw(estimator, partial / PICTURE)
    facts = estimator.facts
    line = f"{task}: fitted in {time.monotonic() - started:.0f} s"
    if "best_epoch" in facts:
        line += f", epoch {facts['best_epoch']} of {facts['epochs']} kept"
    sys.stdout.write(f"{line}\n")
    for name, value in metrics.get("test", {}).items():
        sys.stdout.write(f"test {name}: {value:.4g}\n")
    sys.stdout.write(f"results: {workdir}\nopen: {load}\n")


def _first_existing(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _name_and_size(path: str) -> dict[str, Any]:
    """Return what tells a file of data from another one, and refuse one that is not there."""
    file = Path(path).expanduser()
    if not file.exists():
        raise InputError(f"there is no file '{path}'", "an .h5ad file", "Check the path")
    return {"name": file.name, "bytes": file.stat().st_size if file.is_file() else 0}


def _read(path: str) -> Any:
    """Return the AnnData of a file."""
    import anndata

    try:
        return anndata.read_h5ad(Path(path).expanduser())
    except (OSError, ValueError, KeyError, TypeError, anndata.io.IORegistryError) as error:
        raise InputError(
            f"--test={path} cannot be read ({str(error).splitlines()[0]})",
            "an .h5ad file",
            "Check it",
        ) from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _draw(estimator: Any, path: Path) -> None:
    """Draw loss and score over the epochs, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    keys = [key for key in ("loss", "score") if _has(estimator.history, key)]
    figure = Figure(figsize=(5.2 * len(keys), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        estimator.plot_history(key=key, ax=axes)
    figure.savefig(path, dpi=110)


def _has(history: list[dict[str, float]], key: str) -> bool:
    return any(key in row or f"validation_{key}" in row for row in history)


def main(argv: list[str]) -> None:
    """Run the program."""
    # jax reports at INFO which accelerators it did not find.
    logging.set_verbosity(logging.WARNING)
    status = cluster.EXIT_DONE
    try:
        options.check_no_more(argv)
        check_platforms()
        run()
    except CellPLMError as error:
        sys.stderr.write(f"finetune: {error}\n")
        status = cluster.EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("finetune: interrupted, nothing was written\n")
        status = cluster.EXIT_FAILED
    except Exception:
        traceback.print_exc()
        status = cluster.EXIT_FAILED
    sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
