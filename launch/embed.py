"""Embed a whole corpus: ``python launch/embed.py --corpus=CORPUS --model=M --out=STORE``.

All processes of a job share the samples of a corpus made by ``cellplm prepare`` and write one zarr store, which
``anndata.read_zarr`` opens; see :func:`cellplm_jax.embed_corpus`. Each process uses all of its accelerators. They
find one another as those of ``launch/pretrain.py`` do. ``--corpus``, ``--model`` and ``--out`` are folders that all
processes see, or ``gs://`` addresses.

Running the same command again goes on where it was interrupted, on any number of processes: finished samples are kept.
SIGTERM, SIGINT or SIGUSR1 ends a process at once, because all that is finished is saved already. Exit status: 0 done;
2 bad corpus, model or output; 143 stopped, run it again; 1 anything else.
"""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cellplm_jax.config import PRECISIONS
from cellplm_jax.errors import CellPLMError
from cellplm_jax.platforms import check_platforms
from launch import cluster, options

_CORPUS = flags.DEFINE_string("corpus", None, "A prepared corpus.", required=True)
_MODEL = flags.DEFINE_string(
    "model", None, "What to embed with: 'small', a checkpoint or work directory.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The zarr store to write.", required=True)
_PRECISION = flags.DEFINE_enum(
    "precision",
    "float32",
    PRECISIONS,
    "Of the matrix products; bfloat16 is faster on accelerators.",
)
_JOIN = options.process_flags()
flags.adopt_module_key_flags(options)


class Stopped(BaseException):
    """This process was told to stop."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; whatever is wrong with it becomes one message and exit status 2."""
    return options.parse_flags(argv, program="embed")


def run(joined: bool) -> None:
    """Embed this process's samples, and wait for the others where they are connected.

    Args:
        joined: Whether this process is connected with others.

    Raises:
        CellPLMError: Corpus, model or output cannot be used.
    """
    import jax

    from cellplm_jax.tasks.embed_corpus import embed_corpus, wait_until_complete
    from cellplm_jax.tasks.pretrained import load

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _stop)
    model = load(_MODEL.value, precision=_PRECISION.value)
    found = embed_corpus(_CORPUS.value, model, _OUT.value)
    first = jax.process_index() == 0
    for message in found.messages if first else ():
        sys.stderr.write(f"{message}\n")
    if joined and not found.complete:
        # Connected processes have to leave together; one that is gone would count as dead.
        wait_until_complete(_OUT.value)
    if first:
        sys.stdout.write(
            f"{_OUT.value}: obsm['X_cellplm'] of {found.cells} cells in {found.samples} samples by {model.id}\n"
        )


def main(argv: list[str]) -> None:
    """Run the program."""
    # jax reports at INFO which accelerators it did not find.
    logging.set_verbosity(logging.WARNING)
    joined = False
    status = cluster.EXIT_DONE
    try:
        options.check_no_more(argv)
        joined = _JOIN()
        check_platforms()
        run(joined)
    except CellPLMError as error:
        sys.stderr.write(f"embed: {error}\n")
        status = cluster.EXIT_BAD_INPUT
    except Stopped:
        sys.stderr.write("embed: stopped; finished samples are kept, the same command goes on\n")
        status = cluster.EXIT_PREEMPTED
    except Exception:
        traceback.print_exc()
        status = cluster.EXIT_FAILED
    cluster.leave(status, joined=joined, together=status == cluster.EXIT_DONE)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
