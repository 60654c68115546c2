"""Files from strangers: nothing is executed or written elsewhere, and each is read or refused with one message."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellplm_jax.errors import CellPLMError
from tests.conftest import VOCABULARY, make_adata
from tests.faults import campaign_damage as damage
from tests.faults.hostile_h5ad import ATTACKS, BIDI, CONTROL
from tests.faults.outcome import Outcome

SECONDS = 10
"""Processor time that a case may take."""

SLACK = 32 * 2**20
"""Memory that a case may take in addition to what its file needs: the libraries' own, and what they keep for reuse."""

SECRET = 777.0
"""Value of every count in the secret file."""

UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of file with an attack: ``make`` writes it into a folder, ``read`` does what a verb does with it."""

    kind: str
    name: str
    make: Callable[[Path, np.random.Generator], Path]
    read: Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Intact files, and the files that no case may read, change or create."""

    folder: Path
    secret: Path
    marker: Path
    cases: tuple[Case, ...]


def prepare(folder: Path) -> Inputs:
    """Write intact files of every format, and the secret file."""
    logging.getLogger("cellplm_jax").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    whole = folder / "whole.h5ad"
    with quiet():
        make_adata(30, seed=3).write_h5ad(whole)
    secret = folder / "secret.h5"
    with quiet():
        hidden = make_adata(30, seed=4)
        hidden.X[:] = hidden.X.toarray() * 0 + SECRET
        hidden.write_h5ad(secret)
    with h5py.File(secret, "r+") as file:
        file["dense"] = np.full((30, 43), SECRET)
    marker = folder / "executed"
    examples = {
        "checkpoint": (damage._safetensors, read_model),
        "estimator": (damage._estimator, read_estimator),
        "corpus": (damage._corpus, read_corpus),
    }
    if find_spec("torch"):
        examples["published"] = (damage._published, read_published)
    for name, (write, _) in examples.items():
        write(folder / f"whole-{name}")
    cases: list[Case] = []
    for name, attack in ATTACKS.items():
        cases.append(Case("h5ad", name, _h5ad(whole, secret, attack), read_h5ad))
    for name, attack in ATTACKS.items():
        if name in ("external link", "external storage", "virtual", "kind", "encoding", "names"):
            cases.append(Case("h5ad, copied", name, _h5ad(whole, secret, attack), copy_h5ad))
    for name, make in files(whole, secret).items():
        cases.append(Case("h5ad, file", name, make, read_h5ad))
    for name, make in zarr_attacks(whole, secret, marker).items():
        cases.append(Case("zarr", name, make, read_h5ad))
    for name, (_, read) in examples.items():
        for attack, make in folder_attacks(folder / f"whole-{name}", secret, name).items():
            cases.append(Case(name, attack, make, read))
    if find_spec("torch"):
        for name, make in torch_attacks(folder / "whole-published", marker).items():
            cases.append(Case("published", name, make, read_published))
    for name, make in gene_lists().items():
        cases.append(Case("gene list", name, make, read_gene_list))
    # What is imported at the first use is no need of a file.
    for name, read in {
        "whole.h5ad": read_h5ad,
        **{f"whole-{n}": r for n, (_, r) in examples.items()},
    }.items():
        if name != "whole-published":
            read(folder / name)
    return Inputs(folder, secret, marker, tuple(cases))


def try_case(inputs: Inputs, seed: int) -> Outcome:
    """Write a hostile file and read it; the seed chooses the attack and its numbers."""
    case = inputs.cases[seed % len(inputs.cases)]
    random = np.random.default_rng(seed)
    place = inputs.folder / f"case-{seed}"
    place.mkdir()
    before = hashlib.sha256(inputs.secret.read_bytes()).hexdigest()
    detail = f"{case.kind}, {case.name}"
    try:
        with quiet():
            path = case.make(place, random)
        result, ok, text, seconds, extra = _run(case, path)
        if inputs.marker.exists():
            result, ok = "executed", False
            inputs.marker.rmdir()
        elif hashlib.sha256(inputs.secret.read_bytes()).hexdigest() != before:
            result, ok = "written outside", False
        elif seconds > SECONDS:
            result, ok = "slow", False
        elif extra > SLACK + 2 * (declared(path) if result == "read" else _size(path)):
            result, ok = "too much memory", False
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Outcome(
        case.kind, result, ok, f"{detail}: {text[:600]} ({extra / 2**20:.0f} MB)", seconds
    )


def _run(case: Case, path: Path) -> tuple[str, bool, str, float, int]:
    """Return result, whether it is allowed, the message, processor seconds, and additional memory in bytes."""
    start, held = time.process_time(), _memory("VmRSS")
    _reset_peak()
    result, ok, text = "read", True, ""
    try:
        with quiet(), _limit(4 * SECONDS):
            text = " ".join(map(str, case.read(path) or []))
        if str(SECRET) in text:
            result, ok = "secret read", False
    except CellPLMError as error:
        text = str(error)
        result = "refused"
        if len(text) > 1000 or UNSAFE.search(text) or "can still be loaded" in text:
            result, ok = "unclear", False
    except TimeoutError:
        result, ok, text = "no end", False, "stopped"
    except Exception as error:
        result, ok, text = "traceback", False, f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    return result, ok, text, seconds, max(0, _memory("VmHWM") - held)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress output and warnings."""
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after a time, and MemoryError far beyond the allowed memory."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(12 * seconds)  # the machine may be busy; the processor time is measured
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 4 * 2**30, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def declared(path: Path) -> int:
    """Return the bytes of the arrays that a file declares, or the size of the file if that is more.

    Args:
        path: A file or a folder; what is no HDF5 file, zarr array or zip archive needs its own size.
    """
    paths = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(max(_size(p), _declared(p)) for p in paths)


def _declared(path: Path) -> int:
    total = 0
    with contextlib.suppress(Exception):
        if path.name in ("zarr.json", ".zarray"):
            content = json.loads(path.read_text())
            kind = content.get("data_type", content.get("dtype"))
            width = np.dtype(kind).itemsize if kind not in ("string", "|O") else 64
            return width * int(np.prod(content["shape"], dtype=float))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return sum(record.file_size for record in archive.infolist())
        with h5py.File(path) as file:

            def visit(name: str, item: Any) -> None:
                nonlocal total
                if isinstance(item, h5py.Dataset):
                    total += item.size * item.dtype.itemsize

            file.visititems(visit)
    return total


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else 0


# -- readers: what the verbs do with a file ------------------------------------------------------


def read_h5ad(path: Path) -> list[str]:
    """Read everything that ``embed`` reads, and print its messages as the command does."""
    from cellplm_jax.data.anndata_io import open_counts

    with open_counts(path, VOCABULARY) as source:
        largest = max((block.data.max(initial=0) for block in source.blocks(16)), default=0)
        if "batch" in source.obs.columns:
            source.column("batch", missing="none")
        source.coordinates("spatial")
        return [*_printed(source.report.messages()), f"largest {largest}"]


def copy_h5ad(path: Path) -> list[str]:
    """Add results to a copy, as ``embed`` and ``annotate predict`` do."""
    from cellplm_jax.tasks.cluster import known_columns
    from cellplm_jax.tasks.files import check_copy, read_annotations, write_copy

    out = path.with_name("out.h5ad")
    check_copy(path, out)
    known_columns(path, ["batch"])
    messages = read_h5ad(path)
    write_copy(
        path,
        out,
        obs={"new": np.arange(30)},
        obsm={"X_new": np.zeros((30, 4))},
        uns={"cellplm": {"a": 1}},
    )
    read_annotations(out, obsm=("X_new",), uns=("cellplm",))
    return messages


def read_model(path: Path) -> list[str]:
    """Open a model, describe it, and write its model card."""
    from cellplm_jax.interop.model_card import model_card
    from cellplm_jax.tasks.info import describe, describe_text
    from cellplm_jax.tasks.pretrained import load

    text = describe_text(describe(path))
    model = load(path)
    card = model_card(model.config, model.genes, model.card, parameters=1, step=0, repository="a/b")
    return [*_printed(text.splitlines()), card[:100]]


def read_estimator(path: Path) -> list[str]:
    """Open a fitted estimator, and predict with it."""
    from cellplm_jax.tasks.annotate import CellTypeAnnotator
    from cellplm_jax.tasks.info import describe, describe_text

    _printed(describe_text(describe(path)).splitlines())
    return [*CellTypeAnnotator.load(path, quiet=True).labels]


def read_corpus(path: Path) -> list[str]:
    """Open a corpus, describe it, read its cells and verify it."""
    from cellplm_jax.data.corpus import open_corpus
    from cellplm_jax.tasks.info import describe_corpus, describe_corpus_text

    corpus = open_corpus(path)
    _printed(describe_corpus_text(describe_corpus(path)).splitlines())
    for number, sample in enumerate(corpus.samples):
        corpus.read(number, 0, sample.cells)
        corpus.coordinates(number)
        corpus.measured(number)
    for number in range(len(corpus.parts)):
        corpus.cell_table(number)
    return corpus.verify()


def read_published(path: Path) -> list[str]:
    """Convert a published checkpoint."""
    from cellplm_jax.interop.torch_checkpoint import read_published

    folder = path if path.is_dir() else path.parent
    return [str(read_published(folder / "tiny.best.ckpt", folder / "tiny.config.json").config)]


def read_gene_list(path: Path) -> list[str]:
    """Read a vocabulary, and map names to it."""
    from cellplm_jax.data.genes import map_genes
    from cellplm_jax.tasks.prepare_vocabulary import read_genes

    genes = read_genes(path)
    return _printed([map_genes(VOCABULARY, genes, minimum=0).summary()])


def _printed(lines: list[str]) -> list[str]:
    """Return lines as the command prints them to a terminal."""
    from cellplm_jax.cli.output import say

    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    for line in lines:
        say(line, stream)
    text = stream.getvalue()
    if UNSAFE.search(re.sub("\x1b\\[[0-9;]*m", "", text)) or "\x1b]" in text:
        msg = "control characters were printed"
        raise RuntimeError(msg)
    return text.splitlines()


# -- makers of hostile files ---------------------------------------------------------------------


def _h5ad(
    whole: Path, secret: Path, attack: Callable
) -> Callable[[Path, np.random.Generator], Path]:
    def make(place: Path, random: np.random.Generator) -> Path:
        path = place / "hostile.h5ad"
        shutil.copyfile(whole, path)
        with h5py.File(path, "r+") as file:
            attack(file, random, secret)
        return path

    return make


def special(target: str) -> Callable[[Path], None]:
    """Return a function that replaces a path by a pipe, or a link to a device."""

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        if target == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(target)

    return make


def files(whole: Path, secret: Path) -> dict[str, Callable]:
    """Return attacks with files that are no ``.h5ad`` files."""
    import gzip

    content = whole.read_bytes()
    texts = {
        "empty": b"",
        "gzip": gzip.compress(content),
        "zip": b"PK\x03\x04" + content[:500],
        "text": b"cell,gene,count\n" * 100,
        "web page": b"<!doctype html><html>404</html>",
        "signature only": content[:8],
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    }
    makers: dict[str, Callable] = {}
    for name, text in texts.items():
        makers[name] = lambda place, random, text=text: _written(place / "a.h5ad", text)
    makers["cut"] = lambda place, random: _written(
        place / "a.h5ad", content[: int(random.integers(8, len(content)))]
    )
    makers["noise"] = lambda place, random: _written(
        place / "a.h5ad", content[:200] + random.bytes(len(content) - 200)
    )
    for name in ("pipe", "/dev/zero", "/dev/urandom", "/nowhere", "."):
        makers[f"link to {name}"] = lambda place, random, name=name: _special(
            place / "a.h5ad", name
        )
    return makers


def _written(path: Path, text: bytes) -> Path:
    path.write_bytes(text)
    return path


def _special(path: Path, target: str) -> Path:
    special(target)(path)
    return path


def zarr_attacks(whole: Path, secret: Path, marker: Path) -> dict[str, Callable]:
    """Return attacks with zarr stores."""
    import anndata

    def store(place: Path) -> Path:
        path = place / "a.zarr"
        anndata.read_h5ad(whole).write_zarr(path)
        return path

    def metadata(text: Callable[[dict, np.random.Generator], Any]) -> Callable:
        def make(place: Path, random: np.random.Generator) -> Path:
            path = store(place)
            for extra in path.rglob(".zmetadata"):
                extra.unlink()
            names = sorted(
                [*path.rglob(".zarray"), *path.rglob(".zattrs"), *path.rglob("zarr.json")]
            )
            file = names[int(random.integers(len(names)))]
            found = text(json.loads(file.read_text()), random)
            file.write_text(found if isinstance(found, str) else json.dumps(found))
            return path

        return make

    def chunk(target: str) -> Callable:
        def make(place: Path, random: np.random.Generator) -> Path:
            path = store(place)
            chunks = [
                p
                for p in sorted(path.rglob("*"))
                if p.is_file() and not p.name.startswith((".z", "zarr."))
            ]
            special(target)(chunks[int(random.integers(len(chunks)))])
            return path

        return make

    def pickled(place: Path, random: np.random.Generator) -> Path:
        path = store(place)
        array = next(p for p in sorted(path.rglob(".zarray")) if p.parent.name == "_index")
        content = json.loads(array.read_text())
        content |= {"dtype": "|O", "filters": [{"id": "pickle"}], "compressor": None}
        array.write_text(json.dumps(content))
        for extra in path.rglob(".zmetadata"):
            extra.unlink()
        (array.parent / "0").write_bytes(pickle.dumps([Evil(marker)]))
        return path

    def mutated(content: dict, random: np.random.Generator) -> dict:
        return mutate(content, random)

    return {
        "pipe": chunk("pipe"),
        "device": chunk("/dev/zero"),
        "secret": chunk(str(secret)),
        "pickle": pickled,
        "deep": metadata(lambda content, random: "[" * 100_000),
        "digits": metadata(lambda content, random: '{"zarr_format": ' + "2" * 5000 + "}"),
        "mutated": metadata(mutated),
        "mutated twice": metadata(
            lambda content, random: mutated(mutated(content, random), random)
        ),
        "huge": metadata(
            lambda content, random: {**content, "shape": [10 ** int(random.integers(9, 30))]}
        ),
        "wide": metadata(
            lambda content, random: {**content, "shape": [30, 10**11], "chunks": [30, 10**11]}
        ),
    }


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 5000, 99, 10**12, 10**19, 1e300, -0.5, "", "x", [], {}, [None], [[1]], {"a": {"b": 1}},
    CONTROL, BIDI, "../../etc/passwd", "/etc/passwd", "x" * 200_000, ["x"] * 3, [1, "a", None], 2**31, 2**63 - 1,
    "NaN", [10**9, 10**9], "0" * 40,
)  # fmt: skip
"""Values that replace values of JSON."""


def mutate(content: Any, random: np.random.Generator) -> Any:
    """Return JSON with one value replaced, removed or doubled, somewhere."""
    if not isinstance(content, dict | list) or not content or random.integers(12) == 0:
        return VALUES[int(random.integers(len(VALUES)))]
    if isinstance(content, dict):
        key = list(content)[int(random.integers(len(content)))]
        change = int(random.integers(10))
        if change == 0:
            return {name: value for name, value in content.items() if name != key}
        if change == 1:
            return {**content, f"{key}{CONTROL}": content[key]}
        return {**content, key: mutate(content[key], random)}
    position = int(random.integers(len(content)))
    return [*content[:position], mutate(content[position], random), *content[position + 1 :]]


def folder_attacks(whole: Path, secret: Path, name: str) -> dict[str, Callable]:
    """Return attacks with the JSON, text and other files of a folder."""

    def copied(place: Path) -> Path:
        path = place / "folder"
        shutil.copytree(whole, path)
        if name == "published":
            shutil.copyfile(whole.with_name("tiny.config.json"), path / "tiny.config.json")
        # Whoever writes the files writes the checksums, too.
        for manifest in path.rglob("manifest.json"):
            manifest.unlink()
        return path

    def resealed(path: Path) -> None:
        """Let a corpus describe its changed parts."""
        index = path / "corpus.json"
        with contextlib.suppress(
            ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError
        ):
            content = json.loads(index.read_text())
            for entry in content["parts"]:
                record = path / "parts" / f"{entry['name']}.json"
                entry["sha256"] = hashlib.sha256(record.read_bytes()).hexdigest()
            index.write_text(json.dumps(content))

    def on_json(change: Callable[[str, np.random.Generator], str | bytes]) -> Callable:
        def make(place: Path, random: np.random.Generator) -> Path:
            path = copied(place)
            documents = sorted(p for p in path.rglob("*.json") if p.stat().st_size < 2**20)
            shallow = [p for p in documents if len(p.relative_to(path).parts) < 3] or documents
            file = shallow[int(random.integers(len(shallow)))]
            text = change(file.read_text(), random)
            file.write_bytes(
                text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            )
            if file.name != "corpus.json":
                resealed(path)
            return path

        return make

    def mutated(times: int) -> Callable[[str, np.random.Generator], str]:
        def change(text: str, random: np.random.Generator) -> str:
            content = json.loads(text)
            for _ in range(times):
                content = mutate(content, random)
            return json.dumps(content)

        return change

    def on_file(change: Callable[[Path, np.random.Generator], None]) -> Callable:
        def make(place: Path, random: np.random.Generator) -> Path:
            path = copied(place)
            found = [p for p in sorted(path.rglob("*")) if p.is_file()]
            change(found[int(random.integers(len(found)))], random)
            return path

        return make

    def digits(text: str, random: np.random.Generator) -> str:
        return re.sub(r"\b\d+\b", "7" * int(random.choice([30, 5000])), text, count=1)

    def nested(text: str, random: np.random.Generator) -> str:
        return re.sub(r":\s*\d+", ": " + "[" * 300 + "]" * 300, text, count=1)

    attacks: dict[str, Callable] = {
        "mutated": on_json(mutated(1)),
        "mutated again": on_json(mutated(1)),
        "mutated once more": on_json(mutated(1)),
        "mutated twice": on_json(mutated(2)),
        "deep": on_json(lambda text, random: "[" * 100_000 + "]" * 100_000),
        "deep inside": on_json(nested),
        "digits": on_json(digits),
        "infinite": on_json(lambda text, random: re.sub(r"\b\d+\b", "1e999", text, count=1)),
        "not a number": on_json(lambda text, random: re.sub(r"\b\d+\b", "NaN", text, count=1)),
        "surrogate": on_json(lambda text, random: re.sub(r'": "', r'": "\\ud800', text, count=1)),
        "no utf-8": on_json(lambda text, random: b"\xff\xfe" + text.encode()),
        "mark": on_json(lambda text, random: "\ufeff" + text),
        "other document": on_json(lambda text, random: str(random.choice(["null", "[]", "3", '"x"', "{}", ""]))),
        "pipe": on_file(lambda file, random: special("pipe")(file)),
        "device": on_file(lambda file, random: special("/dev/zero")(file)),
        "link": on_file(lambda file, random: special(str(secret))(file)),
        "noise": on_file(lambda file, random: _written(file, random.bytes(200))),
        "empty file": on_file(lambda file, random: _written(file, b"")),
    }  # fmt: skip
    if (whole / "genes.txt").exists():

        def genes(text: Callable[[list[str]], str]) -> Callable:
            def make(place: Path, random: np.random.Generator) -> Path:
                path = copied(place)
                (path / "genes.txt").write_text(text((path / "genes.txt").read_text().split()))
                return path

            return make

        attacks |= {
            "long gene": genes(lambda names: "\n".join(["g" * 50_000_000, *names[1:]])),
            "doubled gene": genes(lambda names: "\n".join([names[1], *names[1:]])),
            "control gene": genes(lambda names: "\n".join([CONTROL, *names[1:]])),
            "empty gene": genes(lambda names: "\n".join(["", *names[1:]])),
        }
    return attacks


def torch_attacks(whole: Path, marker: Path) -> dict[str, Callable]:
    """Return attacks with published checkpoints."""
    import torch

    def case(change: Callable[[Path, dict, np.random.Generator], None]) -> Callable:
        def make(place: Path, random: np.random.Generator) -> Path:
            path = place / "folder"
            shutil.copytree(whole, path)
            shutil.copyfile(whole.with_name("tiny.config.json"), path / "tiny.config.json")
            file = path / "tiny.best.ckpt"
            state = torch.load(file, weights_only=True)["model_state_dict"]
            change(file, state, random)
            return path

        return make

    def some(state: dict, random: np.random.Generator) -> str:
        return list(state)[int(random.integers(len(state)))]

    def saved(change: Callable[[dict, np.random.Generator], Any]) -> Callable:
        return case(
            lambda file, state, random: torch.save(
                {"model_state_dict": change(state, random)}, file
            )
        )

    def deflated(file: Path, state: dict, random: np.random.Generator) -> None:
        with zipfile.ZipFile(file) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, record in records.items():
                archive.writestr(name, record)
            with archive.open("archive/data/bomb", "w") as bomb:
                for _ in range(64):
                    bomb.write(bytes(2**22))

    values = [torch.zeros(3), torch.tensor(float("nan")), 5, "text", None, [1], torch.zeros(4, dtype=torch.int64),
              torch.zeros(2, 2).to_sparse(), torch.zeros(4, dtype=torch.bfloat16), {}]  # fmt: skip
    return {
        "pickle": case(lambda file, state, random: file.write_bytes(pickle.dumps(Evil(marker)))),
        "pickled": case(lambda file, state, random: torch.save(Evil(marker), file)),
        "pickled weight": saved(lambda state, random: {**state, some(state, random): Evil(marker)}),
        "legacy pickle": case(
            lambda file, state, random: torch.save(
                {"model_state_dict": state, "e": Evil(marker)}, file, _use_new_zipfile_serialization=False
            )
        ),
        "deflated": case(deflated),
        "stride 0": saved(
            lambda state, random: {**state, some(state, random): torch.zeros(1).expand(2**int(random.integers(20, 40)))}
        ),
        "value": saved(lambda state, random: {**state, some(state, random): values[int(random.integers(len(values)))]}),
        "another value": saved(
            lambda state, random: {**state, some(state, random): values[int(random.integers(len(values)))]}
        ),
        "missing": saved(lambda state, random: {k: v for k, v in state.items() if k != some(state, random)}),
        "number as name": saved(lambda state, random: {**state, 5: torch.zeros(1)}),
        "control name": saved(lambda state, random: {**state, CONTROL: torch.zeros(1)}),
        "transposed": saved(lambda state, random: {k: v.T.contiguous() for k, v in state.items() if v.ndim < 3}),
        "doubles": saved(lambda state, random: {k: v.double() for k, v in state.items()}),
        "no dictionary": case(lambda file, state, random: torch.save([1, 2], file)),
        "empty state": saved(lambda state, random: {}),
        "noise": case(lambda file, state, random: file.write_bytes(random.bytes(5000))),
        "cut": case(lambda file, state, random: file.write_bytes(file.read_bytes()[: int(random.integers(4000))])),
    }  # fmt: skip


def gene_lists() -> dict[str, Callable]:
    """Return attacks with lists of genes."""
    texts = {
        "long name": "g" * 50_000_000,
        "doubled": "\n".join([*VOCABULARY, VOCABULARY[0]]),
        "control": f"{CONTROL}\n{BIDI}\n" + "\n".join(VOCABULARY),
        "empty": "",
        "comments": "# a\n\n#b\n",
        "null": "a\0b\nc",
        "words": " ".join(VOCABULARY * 50),
    }
    makers: dict[str, Callable] = {}
    for name, text in texts.items():
        makers[name] = lambda place, random, text=text: _written(place / "genes.txt", text.encode())
    makers["noise"] = lambda place, random: _written(place / "genes.txt", random.bytes(5000))
    for name in ("pipe", "/dev/zero", "/nowhere", "."):
        makers[f"link to {name}"] = lambda place, random, name=name: _special(
            place / "genes.txt", name
        )
    return makers
