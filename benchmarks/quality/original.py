"""The original CellPLM (``cellplm==0.1.0.post2``), trained from scratch at the size of our ``:small``.

Annotation and imputation go through its own pipelines, with its own recipes and our numbers of epochs and patience; its
weights are those its constructor draws. It has no pipeline for denoising and integration, and its trainer was never
released: there its model and objective are trained with the recipe of its imputation pipeline.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from common import Method, detected_logs, normalize

SIZE: dict[str, Any] = {
    "enc_mod": "flowformer",
    "enc_hid": 256,
    "enc_layers": 2,
    "enc_head": 8,
    "post_latent_dim": 64,
    "dec_mod": "nbmlp",
    "dec_hid": 256,
    "dec_layers": 2,
    "model_dropout": 0.1,
    "norm": "groupnorm",
    "mask_node_rate": 0.75,
    "mask_feature_rate": 0.25,
    "drop_node_rate": 0.3,
    "max_batch_size": 4000,
    "cat_pe": False,
    "lamda": 5.0,
    "w_li": 5.0,
    "w_en": 5.0,
    "num_clusters": 16,
    "dae": True,
    "mask_beta": True,
}
"""Constructor arguments: the released ones, at the widths and depth of ``:small``."""

ANNOTATION = {"epochs": 200, "es": 50}
IMPUTATION = {"epochs": 100}
DENOISING_EPOCHS, INTEGRATION_EPOCHS = 60, 60
"""Those of our recipes."""


def _prefix(directory: str, genes: list[str], seed: int, **config: Any) -> str:
    """Write an untrained model in the form that its pipelines load."""
    import torch
    from CellPLM.model import OmicsFormer

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what the package draws from
    content = {**SIZE, "gene_list": genes, "out_dim": len(genes), "latent_mod": "vae", **config}
    model = OmicsFormer(**content)
    Path(directory, "scratch.config.json").write_text(json.dumps(content))
    torch.save({"model_state_dict": model.state_dict()}, Path(directory, "scratch.best.ckpt"))
    return "scratch"


def annotate(problem: Path, seed: int) -> dict[str, Any]:
    """CellTypeAnnotationPipeline; as it works, the cells to predict are in the training contexts, without labels."""
    from CellPLM.pipeline.cell_type_annotation import (
        CellTypeAnnotationDefaultModelConfig,
        CellTypeAnnotationPipeline,
    )

    cells = anndata.read_h5ad(problem / "cells.h5ad")
    test = (cells.obs["split"] == "test").to_numpy()
    known = sorted(set(cells.obs["label"][~test].astype(str)))
    # Its encoder of labels takes no gap; what is filled in here is masked by the split.
    cells.obs["label"] = np.where(test, known[0], cells.obs["label"].astype(str))
    cells.obs = cells.obs[["label", "split"]].copy()  # no batch column: one context, as here
    with tempfile.TemporaryDirectory() as directory:
        prefix = _prefix(directory, cells.var_names.tolist(), seed)
        config = {**CellTypeAnnotationDefaultModelConfig, "out_dim": len(known)}
        pipeline = CellTypeAnnotationPipeline(prefix, config, directory)
    pipeline.fit(
        cells,
        train_config=dict(ANNOTATION),
        split_field="split",
        label_fields=["label"],
        ensembl_auto_conversion=False,
    )
    codes = pipeline.predict(cells, ensembl_auto_conversion=False).numpy()[test]
    names = pipeline.label_encoders["label"].inverse_transform(codes)
    return {"labels": np.asarray(names, str)}


def impute(problem: Path, seed: int) -> dict[str, Any]:
    """ImputationPipeline: the section and two layers of the reference train, the third validates (its tutorial)."""
    from CellPLM.pipeline.imputation import ImputationDefaultModelConfig, ImputationPipeline

    cells = anndata.read_h5ad(problem / "cells.h5ad")
    reference = anndata.read_h5ad(problem / "reference.h5ad")
    genes = np.load(problem / "asked.npy").tolist()
    cells.obs["batch"] = "target"
    # Spatial only where it says so, under these names and scaled to the unit square.
    for table in (cells, reference):
        for axis, name in enumerate(("x_FOV_px", "y_FOV_px")):
            values = table.obsm["spatial"][:, axis]
            table.obs[name] = (values - values.min()) / max(np.ptp(values), 1e-9)
        table.obs["platform"] = "cosmx"
    last = sorted(set(reference.obs["batch"].astype(str)))[-1]
    shown = cells.var_names.tolist()
    both = anndata.concat([cells, reference], join="outer", fill_value=0)
    both.obs_names_make_unique()
    both.obs["split"] = np.where(both.obs["batch"].astype(str) == last, "valid", "train")
    panels = {str(name): both.var_names.tolist() for name in set(both.obs["batch"].astype(str))}
    panels["target"] = shown
    rows = (both.obs["batch"] == "target").to_numpy()
    with tempfile.TemporaryDirectory() as directory:
        prefix = _prefix(directory, both.var_names.tolist(), seed)
        pipeline = ImputationPipeline(prefix, dict(ImputationDefaultModelConfig), directory)
    pipeline.fit(
        both,
        train_config=dict(IMPUTATION),
        split_field="split",
        batch_gene_list=panels,
        ensembl_auto_conversion=False,
    )
    config = {"target_genes": genes, "max_eval_batch_size": 100000}
    found = _predict(pipeline, both[rows].copy(), config, panels["target"])
    shown_columns = [pipeline.gene_list.index(gene) for gene in shown]
    columns = [pipeline.gene_list.index(gene) for gene in genes]
    scale = np.asarray(cells.X.sum(axis=1)).ravel() / np.maximum(
        found[:, shown_columns].sum(1), 1e-9
    )
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    return {"values": normalize(found[:, columns] * scale[:, None], total=total)}


def _predict(pipeline: Any, cells: anndata.AnnData, config: Any, panel: list[str]) -> np.ndarray:
    """Return the decoded means of cells, [cells, genes of the pipeline]; its own predict() scores on the way."""
    import torch
    from CellPLM.utils.data import TranscriptomicDataset, XDict

    data = TranscriptomicDataset(
        cells[:, pipeline.gene_list].copy(), None, batch_gene_list={"target": panel}
    )[0]
    pipeline.model.eval()
    with torch.no_grad():
        given = {k: v for k, v in data.items() if k not in ("gene_list", "split") and v is not None}
        out, _ = pipeline.model(XDict(given), data["gene_list"])
    return out["recon"].numpy().astype(np.float64)


def _train(cells: anndata.AnnData, seed: int, epochs: int, latent: str, batch: bool) -> Any:
    """Train its model on its own objective; keeps the state of the lowest training loss."""
    import torch
    from CellPLM.model import OmicsFormer
    from CellPLM.utils.data import TranscriptomicDataset, XDict

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what the package draws from
    genes = cells.var_names.tolist()
    batches = cells.obs["batch"].nunique() if batch else 0
    model = OmicsFormer(
        **{**SIZE, "gene_list": genes, "out_dim": len(genes), "latent_mod": latent,
           "batch_num": batches, "drop_node_rate": 0.0}
    )  # fmt: skip
    data = TranscriptomicDataset(cells, None, ["batch"] if batch else None, order_required=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-6)
    random = np.random.default_rng(seed)
    contexts = []
    for item in (data[i] for i in range(len(data.seq_list))):
        given = {
            k: v
            for k, v in item.items()
            if k not in ("gene_list", "split", "order_list") and v is not None
        }
        # As in our recipe, at most 512 cells a context.
        order = random.permutation(len(item["order_list"]))
        for part in np.array_split(order, max(1, -(-len(order) // 512))):
            index = torch.from_numpy(np.sort(part))
            context = {k: v.index_select(0, index) for k, v in given.items()}
            contexts.append({**context, "gene_mask": torch.ones(len(genes), dtype=torch.bool)})
    for epoch in range(epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (epoch + 1) / 3)
        for number in random.permutation(len(contexts)):
            _, loss = model(XDict(dict(contexts[number])), genes)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
    model.eval()
    return model, data


def denoise(problem: Path, seed: int) -> dict[str, Any]:
    """Its model with its negative-binomial objective, trained on the visible counts."""
    import torch
    from CellPLM.utils.data import XDict

    cells = anndata.read_h5ad(problem / "cells.h5ad")
    cells.obs = pd.DataFrame(index=cells.obs_names)
    model, data = _train(cells, seed, DENOISING_EPOCHS, "vae", False)
    item = data[0]
    with torch.no_grad():
        given = {k: v for k, v in item.items() if k in ("coord", "x_seq")}
        given["gene_mask"] = torch.ones(cells.n_vars, dtype=torch.bool)
        out, _ = model(XDict(given), item["gene_list"])
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    mean = out["recon"].numpy().astype(np.float64)
    mean *= (total / np.maximum(mean.sum(axis=1), 1e-12))[:, None]
    dispersion = out["disp"].numpy().astype(np.float64)
    return {
        "expected": normalize(mean, total=total),
        "detected": detected_logs(mean, dispersion[0], total),
    }


def embed(problem: Path, seed: int) -> dict[str, Any]:
    """Its model with its objective, the batch as covariate of its decoder; the latent of every cell."""
    import torch
    from CellPLM.utils.data import XDict

    cells = anndata.read_h5ad(problem / "cells.h5ad")
    model, data = _train(cells, seed, INTEGRATION_EPOCHS, "vae", True)
    found = None
    for item in (data[i] for i in range(len(data.seq_list))):
        with torch.no_grad():
            given = {k: v for k, v in item.items() if k in ("coord", "x_seq", "batch")}
            given["gene_mask"] = torch.ones(cells.n_vars, dtype=torch.bool)
            out, _ = model(XDict(given), item["gene_list"])
        latent = out["latent"].numpy()
        found = np.zeros((cells.n_obs, latent.shape[1]), np.float32) if found is None else found
        found[item["order_list"].numpy()] = latent
    return {"embedding": found}


ORIGINAL: dict[tuple[str, str], Method] = {
    ("annotation", "original CellPLM, scratch"): annotate,
    ("imputation", "original CellPLM, scratch"): impute,
    ("denoising", "original CellPLM, scratch"): denoise,
    ("integration", "original CellPLM, scratch"): embed,
}
