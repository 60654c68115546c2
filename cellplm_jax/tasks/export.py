"""Export of a model to one file that only requires JAX."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cellplm_jax._version import __version__
from cellplm_jax.batch import CellBatch
from cellplm_jax.errors import InputError, require
from cellplm_jax.model.cellplm import CellPLM
from cellplm_jax.storage import atomic_write
from cellplm_jax.tasks.files import check_output
from cellplm_jax.tasks.pretrained import EMBEDDING_PARTS, Pretrained, as_pretrained

PLATFORMS = ("cpu", "cuda", "tpu")
"""Platforms of an artifact."""

PROGRAM, GENES, CARD = "program.bin", "genes.txt", "card.json"
"""Members of an artifact: the serialised :class:`jax.export.Exported`; one gene per line; facts."""


def export_model(model: Pretrained | str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
    """Write a model to one artifact that embeds any number of cells on CPU, CUDA and TPU.

    The file is an uncompressed zip archive. ``program.bin`` is a serialised ``jax.export`` program including the
    weights, ``genes.txt`` the vocabulary, ``card.json`` the facts. The program takes the counts of one context in
    CSR form and returns the embedding, float32 [cells, latent]::

        indptr       int32 [cells + 1]     start of each cell in the next two
        gene         int32 [nonzeros]      line of genes.txt, from 0
        count        float32 [nonzeros]    raw counts
        coordinates  float32 [cells, 2]    scaled to [0, 1]; NaN for cells without coordinates

    ``docs/embed_exported.py`` is an example. JAX supports such programs for at least six months after the version that
    wrote them. A call requires at least one cell and one count. All its cells attend to each other, and their counts
    are dense at the same time: if they do not fit into the device's memory, split them into contexts, or use
    :func:`cellplm_jax.embed`.

    Args:
        model: From :func:`cellplm_jax.load`, or a source for it.
        out: Output file, written atomically.

    Returns:
        The contents of ``card.json``.

    Raises:
        InputError: The model requires inputs other than counts and coordinates, or ``out`` cannot be written.
        MissingDependencyError: flatbuffers is not installed.
    """
    out = Path(out).expanduser()
    check_output(out)
    require("flatbuffers", "export", "cellplm export")
    model = as_pretrained(model)
    if model.config.positions.kind == "laplacian":
        raise InputError(
            "a model with positions of the kind 'laplacian', which requires eigenvectors of the tissue's graph",
            "a model that embeds from counts and coordinates only",
            "Embed with cellplm_jax.embed, or export a model with another kind of positions",
        )
    program = _export(model)
    card = {
        **model.card,
        "model": model.id,
        "latent": model.config.latent_size,
        "genes": len(model.genes),
        "input_transform": model.config.embedder.input_transform,
        "positions": model.config.positions.kind,
        "platforms": list(PLATFORMS),
        "calling_convention": int(program.calling_convention_version),
        "jax": jax.__version__,
        "cellplm_jax": __version__,
    }
    # Uncompressed: weights hardly compress, and readers can map them.
    with atomic_write(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr(PROGRAM, program.serialize())
        archive.writestr(GENES, "".join(f"{gene}\n" for gene in model.genes))
        archive.writestr(CARD, json.dumps(card, indent=2, default=str) + "\n")
    return card


def _export(model: Pretrained) -> jax.export.Exported:
    config = model.config
    params = {name: model.params[name] for name in EMBEDDING_PARTS if name in model.params}

    def embed(
        indptr: jax.Array,
        gene: jax.Array,
        count: jax.Array,
        coordinates: jax.Array,
    ) -> jax.Array:
        # NaN marks cells without coordinates: an artifact has no optional arguments.
        located = jnp.isfinite(coordinates).all(axis=-1)
        batch = CellBatch(
            indptr=indptr[None],
            gene=gene[None],
            count=count[None],
            cell_mask=jnp.ones((1, coordinates.shape[0]), bool),
            coordinates=jnp.where(located[:, None], coordinates, 0.0)[None],
            has_coordinates=located[None],
        )
        hidden = CellPLM(config).apply({"params": params}, batch, method=CellPLM.represent)
        latent: Any = CellPLM(config).apply({"params": params}, hidden, method=CellPLM.infer)
        return latent.mean[0]

    # Symbolic sizes: one program for any number of cells.
    cells, nonzeros = jax.export.symbolic_shape("cells, nonzeros")

    def array(shape: tuple, kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    return jax.export.export(jax.jit(embed), platforms=PLATFORMS)(
        array((cells + 1,), np.int32),
        array((nonzeros,), np.int32),
        array((nonzeros,), np.float32),
        array((cells, 2), np.float32),
    )
