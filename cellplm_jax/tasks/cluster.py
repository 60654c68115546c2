"""Clustering: neighbour graph and Leiden clusters of embedded cells, with scanpy's conventions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd

from cellplm_jax.data.anndata_files import check_tree, unreadable
from cellplm_jax.errors import InputError, nearest, require, require_column
from cellplm_jax.evaluate.embedding import Metric, leiden_of_graph, neighbor_graph
from cellplm_jax.plot.style import category_colors
from cellplm_jax.progress import ProgressReport
from cellplm_jax.storage import atomic_write
from cellplm_jax.tasks.embed import Adapt, EmbeddingKeys, embed, options_of, read_and_embed
from cellplm_jax.tasks.files import as_anndata, check_copy, check_key, open_store, write_copy
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained
from cellplm_jax.tasks.reading import keys_of
from cellplm_jax.untrusted import READ_ERRORS

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "cellplm_cluster"
"""Default column of ``obs`` with the clusters."""

REPRESENTATION = "X_cellplm"
"""Default embedding."""


@keys_of(embed, "cellplm_jax.embed", omitted=("key_added",))
def cluster(
    adata: AnnData | str | os.PathLike,
    model: Pretrained | str | os.PathLike | None = None,
    *,
    use_rep: str = REPRESENTATION,
    resolution: float = 1.0,
    neighbors: int = 15,
    key_added: str = KEY,
    seed: int = 0,
    metric: Metric = "euclidean",
    adapt: Adapt = "context",
    quiet: bool = False,
    **keys: Unpack[EmbeddingKeys],
) -> AnnData:
    """Cluster cells with Leiden on the neighbour graph of an embedding, in place.

    Leiden: Traag et al., Scientific Reports 2019. If ``obsm[use_rep]`` is missing and a model is given, cells are
    embedded first. Clustering does not use labels.

    Writes:
        ``obs[key_added]``: categorical, clusters named "0", "1", ..., largest first.
        ``uns[key_added]``: ``params``, in the format of ``scanpy.tl.leiden``.
        ``obsp["distances"]``, ``obsp["connectivities"]``, ``uns["neighbors"]``: the graph, in the format of
        ``scanpy.pp.neighbors``, so that ``scanpy.tl.umap(adata)`` can follow. An existing graph is replaced.
        ``obsm[use_rep]`` and ``uns["cellplm"]``: if the cells were embedded, see :func:`cellplm_jax.embed`.

    Args:
        adata: The cells; raw counts if they have to be embedded. A path is read into memory, see
            :func:`cellplm_jax.embed`.
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`; unused if the embedding
            exists.
        use_rep: Key of ``obsm`` with the embedding, such as ``"X_cellplm_integrated"``.
        resolution: Resolution of the modularity; higher values give more clusters.
        neighbors: Size of the neighbourhood, the cell itself included.
        key_added: Column of ``obs`` to write.
        seed: Seed of the neighbour search and of Leiden; clusters are reproducible.
        metric: Distance between cells.
        adapt: If cells are embedded: ``"context"``, best for the clusters of one file, or ``"none"``; see
            :func:`cellplm_jax.embed`.
        quiet: Disable progress output.
        **keys: If cells are embedded.

    Returns:
        ``adata`` itself; for a path the AnnData that was read, with the results.

    Raises:
        InputError: There is neither an embedding nor a model, or numbers or keys cannot be used.
        MissingDependencyError: The extra ``eval`` is not installed.
    """
    _check(key_added, use_rep, resolution)
    options_of(keys)
    data = as_anndata(adata)
    if use_rep not in data.obsm:
        embed(
            data,
            _model(model, use_rep, list(data.obsm)),
            key_added=use_rep,
            adapt=adapt,
            quiet=quiet,
            **keys,
        )
    results = _clustered(
        np.asarray(data.obsm[use_rep]),
        use_rep,
        resolution,
        neighbors,
        key_added,
        seed,
        metric,
        quiet=quiet,
    )
    for part in ("obs", "obsp", "uns"):
        for name, value in results[part].items():
            getattr(data, part)[name] = value
    return data


@keys_of(cluster, "cluster")
def cluster_file(
    path: str | os.PathLike,
    out: str | os.PathLike,
    model: Pretrained | str | os.PathLike | None = None,
    *,
    use_rep: str = REPRESENTATION,
    resolution: float = 1.0,
    neighbors: int = 15,
    key_added: str = KEY,
    seed: int = 0,
    metric: Metric = "euclidean",
    require_coordinates: bool = False,
    adapt: Adapt = "context",
    umap: bool = False,
    quiet: bool = False,
    **keys: Unpack[EmbeddingKeys],
) -> tuple[AnnData, list[str]]:
    """Cluster an ``.h5ad`` file or a ``.zarr`` store and write a copy with the results; counts are streamed.

    Args:
        path: Input; never changed.
        out: Output: the input plus the results of :func:`cluster`, written atomically.
        model: See :func:`cluster`.
        require_coordinates: See :func:`cellplm_jax.embed_file`.
        umap: Also compute a UMAP of the graph: ``obsm["X_umap"]``.
        **keys: As for :func:`cluster`.

    Returns:
        AnnData without counts: ``obs`` of the file with the clusters, and ``obsm`` with the embedding (and the UMAP);
        messages about the input, one per line (none if the embedding existed).

    Raises:
        InputError: As in :func:`cluster`; also if ``out`` cannot be written.
    """
    import anndata
    from anndata.io import read_elem

    path = Path(path).expanduser()
    out = Path(out).expanduser()
    check_copy(path, out)
    _check(key_added, use_rep, resolution)
    read, context = options_of(keys, adapt=adapt, require_coordinates=require_coordinates)
    with open_store(path) as file:
        embeddings = list(file.get("obsm", {}))
        for name in ("obs", *([f"obsm/{use_rep}"] if use_rep in embeddings else [])):
            check_tree(file[name], path)
        try:
            obs: Any = read_elem(file["obs"])
            there: Any = read_elem(file[f"obsm/{use_rep}"]) if use_rep in embeddings else None
        except READ_ERRORS as error:
            raise InputError(unreadable(path, error)) from error
    obsm, uns, messages = {}, {}, []
    if there is None:
        embedder = _model(model, use_rep, embeddings)
        there, facts, messages = read_and_embed(path, embedder, read, context, use_rep, quiet)
        obsm[use_rep], uns["cellplm"] = there, facts
    results = _clustered(
        np.asarray(there),
        use_rep,
        resolution,
        neighbors,
        key_added,
        seed,
        metric,
        umap=umap,
        quiet=quiet,
    )
    obsm |= results["obsm"]
    write_copy(
        path,
        out,
        obs=results["obs"],
        obsm=obsm,
        obsp=results["obsp"],
        uns={**uns, **results["uns"]},
    )
    cells = anndata.AnnData(obs=obs.assign(**results["obs"]), obsm={use_rep: there, **obsm})
    return cells, messages


def known_columns(path: str | os.PathLike, columns: Sequence[str]) -> None:
    """Raise an error for names that are not columns of ``obs`` of a file, before any work is done.

    Args:
        path: An ``.h5ad`` file or a ``.zarr`` store; a file that does not exist is reported by its reader.
        columns: Names.

    Raises:
        InputError: A column does not exist.
    """
    # A missing file is reported when it is opened, with its own message.
    if not columns or not Path(path).exists():
        return
    with open_store(path) as file:
        names = list(map(str, file["obs"].attrs.get("column-order", [])))
    for column in columns:
        require_column(names, column, "Check the name")


def draw_clusters(cells: AnnData, columns: Sequence[str], out: str | os.PathLike) -> None:
    """Draw the UMAP of clustered cells, one panel per column; the figure is written atomically.

    Args:
        cells: From :func:`cluster_file` with ``umap``.
        columns: Columns of ``obs``.
        out: Image file.
    """
    pyplot = require("matplotlib.pyplot", "eval", "A picture")
    from cellplm_jax import plot

    out = Path(out).expanduser()
    figure, axes = pyplot.subplots(
        1,
        len(columns),
        figsize=(6.4 * len(columns), 4.2),
        squeeze=False,
        layout="constrained",
    )
    for ax, column in zip(axes[0], columns, strict=True):
        plot.umap(cells, color=column, ax=ax)
    try:
        with atomic_write(out) as partial:
            figure.savefig(partial, format=out.suffix[1:] or "png", dpi=150)
    finally:
        pyplot.close(figure)


def _clustered(
    embedding: np.ndarray,
    use_rep: str,
    resolution: float,
    neighbors: int,
    key_added: str,
    seed: int,
    metric: Metric,
    *,
    umap: bool = False,
    quiet: bool = True,
) -> dict[str, dict[str, Any]]:
    """Return the new entries of ``obs``, ``obsm``, ``obsp`` and ``uns``."""
    progress = ProgressReport(
        "clustering",
        2 + umap,
        unit="stages",
        quiet=quiet,
        first="finding neighbours",
    )
    laid_out = {}
    try:
        graph = neighbor_graph(
            embedding,
            neighbors=neighbors,
            seed=seed,
            metric=metric,
            name=use_rep,
        )
        progress.update(1, "Leiden")
        clusters = leiden_of_graph(graph, resolution=resolution, seed=seed)
        names = [str(number) for number in range(clusters.max() + 1)]
        if umap:
            import scanpy

            progress.update(2, "UMAP")
            scanpy.tl.umap(graph, random_state=seed)
            laid_out["X_umap"] = np.asarray(graph.obsm["X_umap"], np.float32)
        progress.close(
            f"clustered {len(clusters):,} cells: {len(names)} clusters, {progress.time_taken}"
        )
    finally:
        progress.close()
    # The names that scanpy writes, so its functions read the entry.
    params = {"resolution": resolution, "random_state": seed, "n_iterations": 2}
    return {
        "obs": {key_added: pd.Categorical.from_codes(clusters, names)},  # type: ignore[arg-type]
        "obsm": laid_out,
        "obsp": {name: graph.obsp[name] for name in ("distances", "connectivities")},
        "uns": {
            "neighbors": dict(graph.uns["neighbors"]),
            key_added: {"params": params},
            # Scanpy and this package then draw the clusters in the same colours.
            f"{key_added}_colors": list(category_colors(pd.Categorical(names, names)).values()),
        },
    }


def _check(key_added: str, use_rep: str, resolution: float) -> None:
    check_key(key_added)
    check_key(use_rep)
    # Before any cell is embedded, which takes long.
    require("scanpy", "eval", "Clustering")
    require("igraph", "eval", "Clustering")
    if not resolution > 0:
        raise InputError(f"resolution = {resolution}", "a number above 0", "1.0 is usual")


def _model(
    model: Pretrained | str | os.PathLike | None,
    use_rep: str,
    keys: list[str],
) -> Pretrained:
    """Return the model for embedding; a missing model raises an error."""
    if model is None:
        have = ", ".join(map(repr, keys)) or "none"
        raise InputError(
            f"obsm has no '{use_rep}' (it has {have}) and no model was given",
            "an embedding of the cells, or a model to compute one",
            nearest(
                use_rep,
                keys,
                "Pass model='small' (--model), or name the embedding with use_rep (--use-rep)",
            ),
        )
    return as_pretrained(model)
