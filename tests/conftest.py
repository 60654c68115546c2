"""What several test modules share: a vocabulary, small data sets, and one tiny pretrained run.

Most of the time of these tests goes into compiling. So compiled programs are kept in a cache of the test session (a
run and its resumed twin are the same program), and on the CPU they are compiled without expensive optimisations.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Read when NumPy is imported. Threads of OpenBLAS wait by spinning, which on two cores with two workers is most of the
# processor time of small problems: 40 s of cross-validation in test_samples become 2.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from jaxtyping import install_import_hook
from scipy import sparse

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="cellplm-test-cache-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without a level of the caller's own, as `make parity` has, also XLA's older emitter of fused kernels, which is there
# for such cases: the training step of test_sharding compiles in 4.8 s instead of 10.6.
_QUICK = ["--xla_backend_optimization_level=0"]
# Newer versions do not know it, and end where a flag is unknown.
if version("jaxlib") < "0.11":
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
_flags = os.environ.get("XLA_FLAGS", "")
if os.environ["JAX_PLATFORMS"] == "cpu":
    if "--xla_force_host_platform_device_count" not in _flags:
        _flags += " --xla_force_host_platform_device_count=8"
    if _QUICK[0].split("=")[0] not in _flags:
        _flags = " ".join([_flags, *_QUICK])
    os.environ["XLA_FLAGS"] = _flags.strip()

# beartype compares the arrays of every call in these folders with the signature: dtype, rank, and equal sizes of axes
# of the same name. An int is a float to it, as it is to pyright.
CHECKED_FOLDERS = ("model", "losses", "train", "kernels", "evaluate")
install_import_hook(
    [f"cellplm_jax.{folder}" for folder in CHECKED_FOLDERS],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
# Fields of trees are not compared: they also hold shapes, shardings and gradients that are None. JAX reads the
# environment when it is imported, so this import waits for the lines above.
for _tree in (
    importlib.import_module("flax.struct").PyTreeNode,
    importlib.import_module("flax.linen").Module,
):
    _tree.__no_type_check__ = True

# Tracing makes millions of small objects, few of them garbage. With Python's threshold of 700 objects the search for
# garbage takes a sixth of the processor time of a small run.
gc.set_threshold(200_000, 20, 100)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CELLPLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
VOCABULARY = [f"ENSG{n:011d}" for n in range(40)]


def make_counts(cells: int, *, genes: int = len(VOCABULARY), seed: int = 0) -> np.ndarray:
    """Counts of three kinds of cell whose genes differ in a fixed way, int64 [cells, genes]."""
    programmes = np.random.default_rng(1234).gamma(0.6, 2.0, (3, genes))
    random = np.random.default_rng(seed)
    counts = random.poisson(programmes[random.integers(0, 3, cells)])
    counts[:, 0] += 2  # every cell has a count, and the matrix is never binary
    return counts


def make_adata(cells: int = 60, *, seed: int = 0, spatial: bool = True, matrix=None):
    """AnnData with the vocabulary's genes in another order and three foreign ones among them."""
    import anndata
    import pandas as pd

    random = np.random.default_rng(seed + 1)
    counts = make_counts(cells, seed=seed) if matrix is None else np.asarray(matrix)
    names = [*VOCABULARY, "foreign-1", "foreign-2", "foreign-3"]
    counts = np.column_stack([counts, random.poisson(1.0, (cells, 3))])
    order = random.permutation(len(names))
    obs = pd.DataFrame(
        {"batch": pd.Categorical([f"b{n % 2}" for n in range(cells)])},
        index=[f"cell{n}" for n in range(cells)],
    )
    adata = anndata.AnnData(
        X=sparse.csr_matrix(counts[:, order].astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[names[i] for i in order]),
    )
    if spatial:
        adata.obsm["spatial"] = random.random((cells, 2)) * 5000
    return adata


def make_samples(number: int = 3, cells: int = 40, *, seed: int = 0):
    """Tissue samples over the vocabulary; every second one has coordinates."""
    from cellplm_jax.data.batches import Sample

    random = np.random.default_rng(seed + 7)
    return [
        Sample(
            name=f"sample {i}",
            counts=sparse.csr_matrix(make_counts(cells, seed=seed + i).astype(np.float32)),
            coordinates=random.random((cells, 2)).astype(np.float32) if i % 2 else None,
            batch=i,
            dataset=0,
        )
        for i in range(number)
    ]


def make_store(samples=None, genes=None):
    """Those samples, or :func:`make_samples`, as training reads them."""
    from cellplm_jax.data.batches import MemoryStore

    return MemoryStore(samples or make_samples(), genes or VOCABULARY)


def tiny_train_config(**changes):
    """A run of seconds; eight sentences a batch, so that eight devices take one each."""
    from cellplm_jax.presets import preset

    config = preset("debug", len(VOCABULARY))
    # At full weight the KL term empties the latent of so short a run before the decoder can use it.
    latent = dataclasses.replace(config.model.latent, latent_weight=0.01, cluster_weight=0.01)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, latent=latent),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2),
        data=dataclasses.replace(config.data, rows=8, cells=16),
        steps=30,
        log_every=1,
        evaluate_every=10,
        checkpoint_every=10,
    )
    return dataclasses.replace(config, **changes)


def pytest_collection_finish():
    """Modules stay to the end, so they are not searched for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The work directory of a finished run. Read only: copy it before damaging it."""
    from cellplm_jax.train.loop import pretrain

    workdir = tmp_path_factory.mktemp("tiny") / "run"
    pretrain(tiny_train_config(), make_store(), workdir, card={"name": "tiny"}, quiet=True)
    return workdir


@pytest.fixture(scope="session")
def tiny_model(tiny_run):
    """The model of :func:`tiny_run`; positions are on."""
    from cellplm_jax.tasks.pretrained import load

    return load(tiny_run)


@pytest.fixture
def run_copy(tiny_run, tmp_path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "copied run"))


def make_labelled(cells: int = 90, *, seed: int = 0, spatial: bool = False):
    """The AnnData of :func:`make_adata` with the kind of every cell in ``obs["kind"]``: alpha, beta or gamma."""
    adata = make_adata(cells, seed=seed, spatial=spatial)
    kind = np.random.default_rng(seed).integers(0, 3, cells)  # as make_counts draws it
    adata.obs["kind"] = np.array(["alpha", "beta", "gamma"], object)[kind]
    return adata


@pytest.fixture
def command(capsys):
    """Run the command; return status, standard output and standard error."""

    from cellplm_jax.cli import main

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
