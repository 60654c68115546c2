"""Pretrain CellPLM: ``python launch/pretrain.py --config=configs/pretrain.py:small --corpus=... --workdir=...``.

``--corpus`` takes a folder (or ``gs://`` address) made by ``cellplm prepare``, or ``.h5ad`` files and folders of them,
separated by commas, which are read into memory. All devices of all processes train one model. Processes find one
another by themselves on TPU pods, under SLURM and Open MPI and in Kubernetes; elsewhere each is told with
``--coordinator_address``, ``--num_processes`` and ``--process_id``, as ``launch/local_multiprocess.sh`` does.

Running the same command again resumes from the last checkpoint, on any number of processes. SIGTERM, SIGINT or SIGUSR1
to any process saves after the current step and ends all of them. Exit status: 0 done; 2 bad configuration, data or
work directory; 143 stopped and saved, run it again; 1 anything else.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellplm_jax.config import TrainConfig, from_config_dict
from cellplm_jax.errors import CellPLMError, InputError
from cellplm_jax.platforms import check_platforms
from cellplm_jax.storage import is_remote
from launch import cluster, options

_CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain.py:small", "Configuration.")
_CORPUS = flags.DEFINE_list(
    "corpus", None, "A prepared corpus, or .h5ad files and folders of them.", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_GENES = flags.DEFINE_string(
    "genes", None, "File with the vocabulary of .h5ad files, one Ensembl id a line."
)
_BATCH_KEY = flags.DEFINE_string(
    "batch_key", None, "Column of obs naming the tissue sample, for .h5ad files."
)
_SPATIAL_KEY = flags.DEFINE_string(
    "spatial_key", "spatial", "Key of obsm with coordinates, for .h5ad files."
)
_JOIN = options.process_flags()
flags.adopt_module_key_flags(options)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; whatever is wrong with it becomes one message and exit status 2."""
    return options.parse_flags(
        argv,
        program="pretrain",
        example="configs/pretrain.py:small",
        check=options.check_config_keys,
    )


def find_data(entries: Sequence[str]) -> list[str]:
    """Return what ``--corpus`` names: one prepared corpus, or ``.h5ad`` files in a stable order.

    Args:
        entries: Files and folders, or one folder or address of a prepared corpus.

    Raises:
        InputError: There is nothing to read, or a corpus among other entries.
    """
    found: list[str] = []
    for entry in entries:
        path = Path(entry)
        corpus = is_remote(entry) or (path / "corpus.json").is_file()
        if corpus and len(entries) > 1:
            raise InputError(
                f"--corpus names the prepared corpus '{entry}' and {len(entries) - 1} more",
                "one prepared corpus, or .h5ad files",
                "Add the other files to the corpus with 'cellplm prepare', or leave them out",
            )
        if corpus:
            return [entry]
        files = sorted(path.glob("*.h5ad")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InputError(
                f"--corpus names '{entry}', where there is no corpus.json and no .h5ad file",
                "a folder made by 'cellplm prepare', or .h5ad files or folders of them",
                "Check the path",
            )
        found += [str(file) for file in files]
    return found


def read_genes(path: str | None) -> list[str] | None:
    """Read a vocabulary file, one Ensembl id a line; None stays None."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--genes={path} cannot be read ({error})", "a text file of Ensembl ids", "Check it"
        ) from error


def run(joined: bool) -> int:
    """Train, and return the exit status.

    Args:
        joined: Whether this process is connected with others.

    Raises:
        CellPLMError: Configuration, data or work directory cannot be used.
    """
    import jax

    from cellplm_jax.tasks.pretrain import pretrain

    config = from_config_dict(TrainConfig, _CONFIG.value)
    data = find_data(_CORPUS.value)
    first = jax.process_index() == 0
    result = pretrain(
        data,
        config,
        _WORKDIR.value,
        genes=read_genes(_GENES.value),
        batch_key=_BATCH_KEY.value,
        spatial_key=_SPATIAL_KEY.value,
        card={
            "name": _WORKDIR.value.rstrip("/").rsplit("/", 1)[-1],
            "data": [entry.rstrip("/").rsplit("/", 1)[-1] for entry in data],
        },
        quiet=not first,
        preempted=cluster.StopRequest(jax.process_count()),
    )
    if first and result.preempted:
        sys.stdout.write(
            f"stopped and saved at step {result.step}; the same command continues from there\n"
        )
    elif first:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in result.heldout.items())
        sys.stdout.write(
            f"{result.step} steps, {result.cells_per_second:.0f} cells/s; held-out: "
            f"{scores or 'none'}\nmodel: cellplm_jax.load({str(result.workdir)!r})\n"
        )
    return cluster.EXIT_PREEMPTED if result.preempted else cluster.EXIT_DONE


def main(argv: list[str]) -> None:
    """Run the program."""
    # jax reports at INFO which accelerators it did not find.
    logging.set_verbosity(logging.WARNING)
    joined = False
    try:
        options.check_no_more(argv)
        # What can be refused before the processes are connected is refused by each on its own.
        from_config_dict(TrainConfig, _CONFIG.value)
        find_data(_CORPUS.value)
        joined = _JOIN()
        check_platforms()
        status = run(joined)
    except CellPLMError as error:
        sys.stderr.write(f"pretrain: {error}\n")
        status = cluster.EXIT_BAD_INPUT
    except Exception:
        traceback.print_exc()
        status = cluster.EXIT_FAILED
    cluster.leave(status, joined=joined)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
