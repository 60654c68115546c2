"""Pretrain CellPLM: ``python launch/pretrain.py --config=configs/pretrain.py:small --corpus=... --workdir=...``.

One process, all of its devices. ``--corpus`` takes ``.h5ad`` files or folders of them, separated by commas; the data is
read into memory. Running the same command again resumes from the last checkpoint.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellplm_jax.config import TrainConfig, from_config_dict
from cellplm_jax.errors import CellPLMError, InputError, explain

_CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain.py:small", "Configuration.")
_CORPUS = flags.DEFINE_list("corpus", None, ".h5ad files or folders of them.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_GENES = flags.DEFINE_string("genes", None, "File with the vocabulary, one Ensembl id a line.")
_BATCH_KEY = flags.DEFINE_string("batch_key", None, "Column of obs naming the tissue sample.")
_SPATIAL_KEY = flags.DEFINE_string("spatial_key", "spatial", "Key of obsm with coordinates.")


def find_files(entries: list[str]) -> list[Path]:
    """Return the ``.h5ad`` files named by files and folders, in a stable order."""
    files: list[Path] = []
    for entry in entries:
        path = Path(entry)
        found = sorted(path.glob("*.h5ad")) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            msg = explain(
                f"--corpus names '{entry}', where there is no .h5ad file",
                ".h5ad files or folders of them",
                "Check the path",
            )
            raise InputError(msg)
        files += found
    return files


def main(argv: list[str]) -> None:
    """Run the program."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument '{argv[1]}'; every option has the form --name=value"
        )
    # jax reports at INFO which accelerators it did not find.
    logging.set_verbosity(logging.WARNING)
    from cellplm_jax.tasks.pretrain import pretrain

    try:
        config = from_config_dict(TrainConfig, _CONFIG.value)
        genes = Path(_GENES.value).read_text(encoding="utf-8").split() if _GENES.value else None
        files = find_files(_CORPUS.value)
        result = pretrain(
            [str(file) for file in files],
            config,
            _WORKDIR.value,
            genes=genes,
            batch_key=_BATCH_KEY.value,
            spatial_key=_SPATIAL_KEY.value,
            card={"name": Path(_WORKDIR.value).name, "data": [file.name for file in files]},
        )
    except CellPLMError as error:
        sys.stderr.write(f"pretrain: {error}\n")
        sys.exit(2)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.heldout.items())
    sys.stdout.write(
        f"{result.step} steps, {result.cells_per_second:.0f} cells/s; held-out: {scores or 'none'}\n"
        f"model: cellplm_jax.load({str(result.workdir)!r})\n"
    )


if __name__ == "__main__":
    app.run(main)
