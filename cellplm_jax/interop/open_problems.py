"""Methods for the tasks of Open Problems in Single-Cell Analysis, as Viash components call them.

The ``script.py`` of a component has ``par`` (paths and options) and ``meta`` (its name)::

    from cellplm_jax.interop.open_problems import batch_integration

    batch_integration(par, meta)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellplm_jax.data.anndata_io import write_h5ad
from cellplm_jax.tasks.annotate import CellTypeAnnotator
from cellplm_jax.tasks.embed import embed
from cellplm_jax.tasks.files import as_anndata


def batch_integration(par: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write the embedding of a data set of ``task_batch_integration``.

    Args:
        par: ``input``: file with ``layers["counts"]``, ``obs["batch"]`` and the ids of the data set in ``uns``;
            ``output``: file to write, with ``obsm["X_emb"]``; optionally ``model`` (``"small"``) and ``adapt``
            (``"context"``, which aligns the batches; see :func:`cellplm_jax.embed`).
        meta: ``name`` of the component.

    Raises:
        InputError: The counts, genes or batches cannot be used.
    """
    adata = as_anndata(par["input"])
    cells = embed(
        adata,
        par.get("model") or "small",
        batch_key="batch",
        layer="counts",
        adapt=par.get("adapt") or "context",
    )
    integrated = type(cells)(
        obs=cells.obs[[]],
        var=cells.var[[]],
        obsm={"X_emb": cells.obsm["X_cellplm"]},
    )
    _write(integrated, cells, par, meta)


def label_projection(par: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write the predicted labels of the test cells of ``task_label_projection``.

    Args:
        par: ``input_train``: file with ``layers["counts"]``, ``obs["label"]`` and ``obs["batch"]``; ``input_test``: the
            same without labels; ``output``: file to write, with ``obs["label_pred"]``; optionally ``model``
            (``"small"``) and ``epochs``.
        meta: ``name`` of the component.

    Raises:
        InputError: The counts, genes or labels cannot be used.
    """
    recipe = {"epochs": par["epochs"]} if par.get("epochs") else {}
    # The task counts every label that is not the true one as wrong, "unknown" as well.
    annotator = CellTypeAnnotator(par.get("model") or "small", unknown_rate=None, **recipe)
    annotator.fit(par["input_train"], label_key="label", batch_key="batch", layer="counts")
    test = annotator.predict(par["input_test"])
    labels = test.obs["cellplm_cell_type"].astype(str)
    _write(
        type(test)(obs=test.obs[[]].assign(label_pred=labels)),
        test,
        par,
        meta,
    )


def _write(
    result: Any,
    cells: Any,
    par: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Write a result with the ids of its data set and its method."""
    result.uns["method_id"] = meta["name"]
    for key in ("dataset_id", "normalization_id", "dataset_organism"):
        if key in cells.uns:
            result.uns[key] = cells.uns[key]
    write_h5ad(result, par["output"], compression="gzip")
