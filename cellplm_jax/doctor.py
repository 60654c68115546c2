"""``cellplm doctor``: a report on this installation and machine, on missing software and on slow operations.

No check may fail because something is absent: the report then lists the check as failed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cellplm_jax._version import __version__
from cellplm_jax.errors import shorten

DISTRIBUTION = "cellplm-jax"

NEEDED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "anndata",
    "numpy",
    "scipy",
    "pandas",
    "h5py",
    "zarr",
    "tensorstore",
)
"""Required distributions."""

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "train": (("grain", "tensorboardX", "dask", "distributed"), "pretraining and cellplm prepare"),
    "eval": (
        ("scanpy", "leidenalg", "igraph", "matplotlib", "sklearn"),
        "clusters, UMAP, scores, pictures, reports and cellplm demo",
    ),
    "cpu": (("numba",), "a faster embedder on a CPU"),
    "export": (("flatbuffers",), "cellplm export"),
    "torch": (("torch",), "cellplm convert, of published checkpoints"),
    "gcp": (("gcsfs",), "work directories at gs://"),
    "hub": (("huggingface_hub", "safetensors"), "models at hf://, weights as safetensors"),
    "tpu": (("libtpu",), "TPUs, and cellplm plan"),
}
"""Extra -> modules it installs, and what needs them."""

_MANY_FILES = 20_000  # maximum number of files counted for the size of a folder


def diagnose() -> dict[str, Any]:
    """Inspect this installation and machine.

    Returns:
        A JSON-ready dictionary: ``usable``; ``broken``, the reasons if it is not usable; ``slow``, sentences on slow
        operations and their causes; ``sections``, each with a ``title`` and ``entries`` of ``name``, ``state``
        (``"good"``, ``"poor"`` or ``"bad"``), ``text`` and possibly a ``remedy``.
    """
    report = _Report()
    for title, look in (
        ("Software", _software),
        ("Devices", _devices),
        ("Memory and disk", _memory),
        ("Caches", _caches),
        ("Extras", _extras),
        ("Models", _models),
        ("Trial", _trial),
    ):
        report.section(title, look)
    return report.facts()


class _Report:
    """Collected results."""

    def __init__(self):
        self._sections: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self.slow: list[str] = []

    def section(self, title: str, look: Callable[[_Report], None]) -> None:
        """Run the checks of one section; an exception becomes an entry of the section."""
        self._sections.append({"title": title, "entries": []})
        try:
            look(self)
        except Exception as error:  # any error: the other sections are still reported
            self.add("not looked at", f"{type(error).__name__}: {error}".splitlines()[0], "poor")

    def add(
        self,
        name: str,
        text: str,
        state: str = "good",
        remedy: str = "",
    ) -> None:
        """Add an entry to the section."""
        # A plain dictionary: the same entry is printed and written as JSON.
        entry = {"name": name, "state": state, "text": text}
        self._sections[-1]["entries"].append(entry | ({"remedy": remedy} if remedy else {}))
        if state == "bad":
            self.broken.append(f"{name}: {text}")

    def facts(self) -> dict[str, Any]:
        return {
            "usable": not self.broken,
            "broken": self.broken,
            "slow": self.slow,
            "sections": self._sections,
        }


def _software(report: _Report) -> None:
    report.add("cellplm-jax", f"{__version__}, {Path(__file__).parent}")
    ranges = dict(_requirements())
    version = platform.python_version()
    _versioned(report, "Python", version, ranges.get("python", ""), "Make an environment with it")
    for name in NEEDED:
        found = _version(name)
        wanted = ranges.get(name, "")
        remedy = f"Run: pip install '{name}{wanted}'"
        if found is None:
            report.add(name, "missing", "bad", remedy)
        else:
            _versioned(report, name, found, wanted, remedy)


def _versioned(report: _Report, name: str, version: str, wanted: str, remedy: str) -> None:
    """Add a version and whether it is supported."""
    from packaging.specifiers import SpecifierSet

    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        report.add(name, f"{version}, supported is {wanted}", "bad", remedy)
    else:
        report.add(name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, str]]:
    """Yield the requirements of this distribution as (name, range); nothing if it is not installed."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return
    declared = metadata.get_all("Requires-Python") or [""]
    yield "python", declared[0]
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        # Requirements with a marker belong to extras, or to other platforms.
        if requirement.marker is None:
            yield requirement.name, str(requirement.specifier)


def _devices(report: _Report) -> None:
    # What this process may use, which is less than the machine has in a container.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    report.add("CPU", f"{cores} cores, {platform.machine()}", "good" if cores > 2 else "poor")
    threads = {
        name: os.environ[name]
        for name in ("OMP_NUM_THREADS", "XLA_FLAGS", "JAX_PLATFORMS")
        if os.environ.get(name)
    }
    for name, value in threads.items():
        report.add(name, value)
    if cores <= 2:
        report.slow.append(
            f"Everything on the CPU: this process has {cores} core{'s' if cores > 1 else ''}."
        )
    from cellplm_jax import platforms

    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken driver raises various exceptions
        wanted = os.environ.get("JAX_PLATFORMS", "")
        if wanted:
            found, _, remedy = platforms.no_device(wanted, error).partition("; ")
            report.add("JAX", found, "bad", remedy.partition(". ")[2].rstrip("."))
        else:
            reason = " ".join(str(error).split()) or "no message"
            report.add(
                "JAX",
                f"finds no device ({type(error).__name__}: {reason})",
                "bad",
                "Set JAX_PLATFORMS=cpu, or reinstall JAX for the device of this machine",
            )
        return
    kinds = sorted({device.device_kind for device in devices})
    kind = devices[0].platform
    report.add("JAX", f"{len(devices)} x {', '.join(kinds)} ({kind})")
    if kind == "gpu":
        for name, text, state in platforms.gpu_facts(jax.local_devices()):
            report.add(name, text, state)
    # GPUs are listed above; a CPU has no memory of its own.
    for device in devices if kind not in ("cpu", "gpu") else ():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        if memory:
            report.add(f"{kind} {device.id}", f"{memory / 1e9:.1f} GB for arrays")
    if kind != "cpu":
        return
    report.slow.append(
        "Fitting and pretraining: JAX has the CPU alone. Embedding a few thousand cells is fine there."
    )
    # A hidden accelerator needs another remedy than a missing plugin.
    hidden = os.environ.get("JAX_PLATFORMS", "").lower() == "cpu"
    for there, name, extra in (
        (platforms.has_nvidia(), "NVIDIA GPU", "cuda12"),
        (_has_tpu(), "TPU", "tpu"),
    ):
        if there and hidden:
            report.add(
                name, "there, and hidden by JAX_PLATFORMS=cpu", "poor", "Unset JAX_PLATFORMS"
            )
        elif there:
            report.add(
                name,
                "there, and this JAX cannot use it",
                "poor",
                f"Run: pip install 'cellplm-jax[{extra}]'",
            )
            report.slow.append(f"The {name} of this machine is idle: JAX was installed without it.")


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel[0-9]*"))


def _memory(report: _Report) -> None:
    from cellplm_jax.presets import preset
    from cellplm_jax.tasks.long_context import STREAM_CELLS, available_memory

    free = available_memory()
    report.add("memory", f"{free / 1e9:.1f} GB free for new work", "good" if free > 4e9 else "poor")
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder).free
    report.add("temporary files", f"{disk / 1e9:.1f} GB free in {folder}")
    for name in ("small", "85m"):
        hidden = preset(name).model.hidden
        # host_array: float32 [cells, hidden] stays in memory if it takes no more than half of the free memory.
        cells = free // (2 * hidden * 4)
        report.add(
            f":{name}",
            f"activations of {cells:,} cells in one context fit into memory ({hidden * 4 / 1000:.1f} kB a cell); more "
            f"go to a temporary file, up to {disk // (hidden * 4):,}",
        )
    report.add(
        "on the device",
        f"contexts above {STREAM_CELLS:,} cells go over it in parts, so it need not hold them",
    )
    if free < 4e9:
        report.slow.append(f"Large files: {free / 1e9:.1f} GB of memory are free.")


def _caches(report: _Report) -> None:
    from cellplm_jax.compilation_cache import VARIABLE, cache_directory, keep_compiled

    if cache_directory() is None:
        report.add("compiled programs", f"not kept: {VARIABLE}=off", "poor", f"Unset {VARIABLE}")
        report.slow.append(
            "The start of every process: its programs are compiled anew, the cache is off."
        )
    else:
        kept = keep_compiled()
        if kept is None:
            report.add(
                "compiled programs",
                f"not kept: '{cache_directory()}' cannot be written",
                "poor",
                f"Point {VARIABLE} at a folder that can",
            )
            report.slow.append("The start of every process: its programs are compiled anew.")
        else:
            report.add("compiled programs", f"{_size(kept)} in {kept}")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if hub.is_dir():
        report.add("models of a hub", f"{_size(hub)} in {hub}")
    report.slow.append(
        "Reading a compressed .h5ad: one core unpacks it. adata.write_h5ad(path) writes it without compression, and "
        "cellplm prepare makes a corpus that is read many times faster."
    )


def _size(folder: Path) -> str:
    """Return the size of the files in a folder, as text."""
    total = 0
    for number, path in enumerate(folder.rglob("*")):
        if number >= _MANY_FILES:
            return f"more than {total / 1e6:,.0f} MB"
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:  # deleted in the meantime
            continue
    return f"{total / 1e6:,.0f} MB"


def _extras(report: _Report) -> None:
    try:
        offered = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        offered = list(EXTRAS)
    for extra, (modules, purpose) in EXTRAS.items():
        if extra not in offered:
            continue
        missing = [module for module in modules if not _there(module)]
        if missing:
            report.add(
                extra,
                f"not there ({', '.join(missing)}): {purpose}",
                "poor",
                f"Run: pip install 'cellplm-jax[{extra}]'",
            )
        else:
            report.add(extra, f"there: {purpose}")


def _there(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        # find_spec raises for some modules that are loaded already.
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


_IMPORTED = (
    "numpy",
    "scipy.sparse",
    "pandas",
    "h5py",
    "zarr",
    "tensorstore",
    "anndata",
    "flax.linen",
    "optax",
    "orbax.checkpoint",
)
"""Modules that every verb imports; an installed one can still be broken."""


def _trial(report: _Report) -> None:
    """Do what every verb does: import, write and read a file, open the bundled model."""
    broken = []
    for module in _IMPORTED:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken library raises various exceptions
            broken.append(module)
            reason = shorten(" ".join(str(error).split()) or type(error).__name__, 160)
            report.add(
                module,
                f"cannot be imported ({reason})",
                "bad",
                "Make a new environment: versions do not fit",
            )
    if broken:
        return
    report.add("imports", f"{len(_IMPORTED)} libraries")
    try:
        with tempfile.TemporaryDirectory() as folder:
            import h5py

            with h5py.File(Path(folder) / "trial.h5", "w") as file:
                file["x"] = range(1000)
            with h5py.File(Path(folder) / "trial.h5") as file:
                file["x"][:]
        report.add("a file", f"written and read in {tempfile.gettempdir()}")
    except Exception as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 160)
        report.add(
            "a file",
            f"cannot be written in {tempfile.gettempdir()} ({reason})",
            "bad",
            "Point TMPDIR at a writable folder with room",
        )
    from cellplm_jax.tasks.pretrained import BUNDLED, bundled_path
    from cellplm_jax.train.checkpoint import read_root, restore_item

    for name in BUNDLED:
        try:
            genes = len(read_root(bundled_path(name)).genes)
            arrays, _ = restore_item(bundled_path(name))
            report.add(f":{name}", f"opened: {genes:,} genes, {len(arrays)} groups of weights")
        except Exception as error:
            report.add(
                f":{name}",
                f"cannot be opened ({shorten(str(error), 200)})",
                "bad",
                "Reinstall cellplm-jax",
            )


def _models(report: _Report) -> None:
    from importlib import resources

    folder = Path(str(resources.files("cellplm_jax") / "resources" / "models"))
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not names:
        report.add(
            "bundled", "none", "bad", "Reinstall cellplm-jax: files of the package are missing"
        )
    for name in names:
        whole = all((folder / name / file).is_file() for file in ("config.json", "genes.txt"))
        if whole:
            report.add(name, f"bundled, {_size(folder / name)}   (cellplm info {name})")
        else:
            report.add(name, "bundled, incomplete", "bad", "Reinstall cellplm-jax")
