"""All metadata of the distribution; pyproject.toml holds the build system and tool settings alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "cellplm_jax" / "__init__.py").read_text(), re.MULTILINE
).group(1)

TRAIN = ["tensorboardX>=2.6"]
EVAL = ["scanpy>=1.11", "leidenalg>=0.10", "igraph>=0.11", "matplotlib>=3.8", "scikit-learn>=1.5"]
DEV = ["pytest>=8", "ruff==0.17.6", "pyright==1.1.414", "pre-commit>=4", "build>=1.2"]

setup(
    name="cellplm-jax",
    version=VERSION,
    description="CellPLM in JAX: a language model of cells for single-cell and spatial transcriptomics",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["cellplm_jax", "cellplm_jax.*"]),
    package_data={"cellplm_jax": ["py.typed", "resources/*"]},
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
        "h5py>=3.10",
        "pandas>=2.2",
        "rich>=13",
        "scipy>=1.13",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "cuda12": ["jax[cuda12]>=0.10,<0.13"],
        "cuda13": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        # Reading and writing PyTorch checkpoints needs torch alone; comparing with the original needs the original.
        "torch": ["torch>=2.4"],
        "parity": ["torch>=2.4", "cellplm==0.1.0.post2"],
        "dev": [*DEV, *TRAIN, *EVAL],
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
