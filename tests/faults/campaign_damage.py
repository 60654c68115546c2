"""Damage at a random place of a random file of each format: it must be refused with one message, or change nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cellplm_jax.errors import CellPLMError
from tests.conftest import VOCABULARY, make_labelled, tiny_train_config
from tests.faults.outcome import Outcome

DAMAGES = ("flip", "flip", "flip", "overwrite", "zeros", "cut", "append", "swap", "delete")


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: an intact folder or file, and a function that reads all of a copy and returns its contents."""

    path: Path
    read: Callable[[Path], str]
    intact: str
    files: tuple[str, ...]


def prepare(folder: Path) -> dict[str, Format]:
    """Write one example of every format."""
    logging.getLogger("cellplm_jax").setLevel(logging.ERROR)  # the remark about missing checksums
    examples = {
        "checkpoint": (_checkpoint, _read_model),
        "work directory": (_run, _read_model),
        "estimator": (_estimator, _read_estimator),
        "corpus": (_corpus, _read_corpus),
        "exported model": (_exported, _read_exported),
    }
    if find_spec("safetensors"):
        examples["checkpoint, safetensors"] = (_safetensors, _read_model)
    if find_spec("torch"):
        examples["published checkpoint"] = (_published, _read_published)
    formats = {}
    for name, (write, read) in examples.items():
        path = folder / name.replace(" ", "-").replace(",", "")
        write(path)
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
        names = [p.relative_to(path).as_posix() for p in files if p.stat().st_size]
        formats[name] = Format(path, read, read(path), tuple(names))
    return formats


def try_case(formats: dict[str, Format], seed: int) -> Outcome:
    """Damage a copy of one format, and read it."""
    random = np.random.default_rng(seed)
    kind = list(formats)[seed % len(formats)]
    example = formats[kind]
    copy = example.path.with_name(f"damaged-{example.path.name}")
    _remove(copy)
    if example.path.is_file():
        shutil.copyfile(example.path, copy)
    else:
        shutil.copytree(example.path, copy)
    file = copy / str(random.choice(example.files)) if copy.is_dir() else copy
    what = damage(file, random)
    detail = f"{what} in {file.relative_to(copy).as_posix()} of {kind}"
    try:
        found = example.read(copy)
    except CellPLMError as error:
        text = str(error)
        clear = "\n" not in text and len(text) <= 1000
        return Outcome(kind, "refused" if clear else "unclear", clear, f"{detail}: {text}")
    except Exception as error:
        return Outcome(kind, "traceback", False, f"{detail}: {type(error).__name__}: {error}")
    finally:
        _remove(copy)
    same = found == example.intact
    return Outcome(kind, "no effect" if same else "silent", same, detail)


def damage(path: Path, random: np.random.Generator) -> str:
    """Damage a file and return what was done."""
    data = bytearray(path.read_bytes())
    how = str(random.choice(DAMAGES))
    place, length = int(random.integers(len(data))), int(random.integers(1, 65))
    if how == "flip":
        data[place] ^= 1 << int(random.integers(8))
    elif how == "overwrite":
        data[place : place + length] = random.bytes(len(data[place : place + length]))
    elif how == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif how == "cut":
        del data[place:]
    elif how == "append":
        data += random.bytes(length)
    elif how == "swap":
        other = int(random.integers(len(data)))
        data[place], data[other] = data[other], data[place]
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{how} at {place}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(*parts: Any) -> str:
    """Return a digest of arrays and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def tiny_untrained() -> Any:
    """Return a model with random weights."""
    from cellplm_jax.tasks.pretrained import Pretrained

    config = tiny_train_config().model
    decoder = dataclasses.replace(config.decoder, batches=3, datasets=1)
    model = Pretrained.untrained(dataclasses.replace(config, decoder=decoder), VOCABULARY)
    model.card |= {"name": "tiny", "licence": "none"}
    return model


def _checkpoint(path: Path) -> None:
    tiny_untrained().save(path)


def _safetensors(path: Path) -> None:
    tiny_untrained().save(path, format="safetensors")


def _run(path: Path) -> None:
    import jax
    import jax.numpy as jnp

    from cellplm_jax.train.checkpoint import ModelFiles, RunCheckpoints, write_root
    from cellplm_jax.train.state import TrainState

    model = tiny_untrained()
    config = dataclasses.replace(tiny_train_config(), model=model.config)
    write_root(path, ModelFiles(model.config, VOCABULARY, model.card, config, store={"samples": 3}))
    checkpoints = RunCheckpoints(path, keep=2)
    for step in (1, 2):
        params = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf) * step, model.params)
        state = TrainState(
            step=jnp.array(step),
            params=params,
            optimizer={"moment": jnp.ones(3)},
            skipped=jnp.array(0),
            skipped_in_a_row=jnp.array(0),
        )
        checkpoints.save(state, metrics={"nb_log_likelihood": -float(step)})
    checkpoints.close()


def _read_model(path: Path) -> str:
    from cellplm_jax.tasks.pretrained import load

    model = load(path)
    return _digest(model.digest, model.card, model.step)


def _estimator(path: Path) -> None:
    from cellplm_jax.tasks.annotate import CellTypeAnnotator

    annotator = CellTypeAnnotator(tiny_untrained(), method="neighbors", quiet=True)
    annotator.fit(make_labelled(60), label_key="kind")
    annotator.save(path)


def _read_estimator(path: Path) -> str:
    from cellplm_jax.tasks.annotate import CellTypeAnnotator

    annotator = CellTypeAnnotator.load(path, quiet=True)
    return _digest(annotator.id, annotator.labels, annotator.facts, annotator.messages)


def _corpus(path: Path) -> None:
    from cellplm_jax.tasks.prepare import prepare as prepare_corpus

    files = []
    for number in range(2):
        files.append(path.with_name(f"cells{number}.h5ad"))
        adata = make_labelled(50 + 10 * number, seed=number, spatial=True)
        adata.write_h5ad(files[-1])
    genes = path.with_name("vocabulary.txt")
    genes.write_text("\n".join(VOCABULARY))
    prepare_corpus(
        files, path, sample_key="batch", label_key="kind", genes=genes, workers=0, quiet=True
    )


def _read_corpus(path: Path) -> str:
    from cellplm_jax.data.corpus import open_corpus

    corpus = open_corpus(path)
    parts: list[Any] = [list(corpus.genes), corpus.label_names]
    for number, sample in enumerate(corpus.samples):
        run = corpus.read(number, 0, sample.cells)
        parts += [dataclasses.astuple(sample), run.indptr, run.gene, run.count]
        parts += [
            x for x in (run.coordinates, run.labels, corpus.measured(number)) if x is not None
        ]
    return _digest(*parts)


def _exported(path: Path) -> None:
    from cellplm_jax.tasks.export import export_model

    export_model(tiny_untrained(), path)


def _read_exported(path: Path) -> str:
    """Read as ``docs/embed_exported.py`` does: the zip archive has checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _digest(
                *[archive.read(n).hex() for n in ("program.bin", "genes.txt", "card.json")]
            )
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, NotImplementedError, RuntimeError,
            EOFError) as error:  # fmt: skip
        raise CellPLMError(f"not a complete archive ({error!r})"[:500]) from error


def _published(path: Path) -> None:
    from cellplm_jax.interop.convert import to_published

    model = tiny_untrained()
    config = model.config
    encodings = dataclasses.replace(config.positions, kind="none")
    latent = dataclasses.replace(config.latent, inference="released")
    decoder = dataclasses.replace(config.decoder, bottleneck=128)
    config = dataclasses.replace(config, positions=encodings, latent=latent, decoder=decoder)
    source = path.with_name("to-publish")
    type(model).untrained(config, VOCABULARY).save(source)
    path.mkdir()
    to_published(source, path / "tiny")
    # The config is plain JSON without a checksum, and no format of this package.
    (path / "tiny.config.json").rename(path.with_name("tiny.config.json"))


def _read_published(path: Path) -> str:
    from flax.traverse_util import flatten_dict

    from cellplm_jax.interop.torch_checkpoint import read_published

    converted = read_published(path / "tiny.best.ckpt", path.with_name("tiny.config.json"))
    flat = sorted(flatten_dict(converted.params).items())
    return _digest(*[part for name, leaf in flat for part in ("/".join(name), np.asarray(leaf))])
