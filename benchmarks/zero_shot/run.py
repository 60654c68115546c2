"""Zero-shot embeddings of labelled data sets that the model did not see, next to simple rivals.

    python benchmarks/zero_shot/run.py [--model small] [--data FOLDER] [--sets FILE.h5ad ...] [--seeds 3]

Every method embeds the same cells of the same genes; clusters are Leiden's at resolution 1 with 15 neighbours, chosen
beforehand. Writes ``zero_shot.json``, ``zero_shot.md`` and ``zero_shot.png`` next to this file. Methods that need a
package that is not installed (Harmony: harmonypy; scVI: scvi-tools) are left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from scipy import sparse

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from machine import machine, versions_of  # noqa: E402

import cellplm_jax  # noqa: E402
from cellplm_jax.data.anndata_io import open_counts  # noqa: E402
from cellplm_jax.evaluate.components import unit_length  # noqa: E402
from cellplm_jax.evaluate.embedding import (  # noqa: E402
    batch_mixing,
    clustering_scores,
    kbet,
    knn_accuracy,
    leiden_clusters,
)
from cellplm_jax.tasks.pretrained import Pretrained  # noqa: E402

NO_LABEL = ("", "?", "nan", "unassigned", "unknown", "unlabelled", "Doublet", "Negative")
SETS = (
    "pbmc3k",
    "zheng_purified_pbmc",
    "kang_muscat_labelled",
    "hashtag_cell_lines_2000genes",
    "pdac_st_card",
    "wu2020_tcells_200",
    "starmap_mouse_v1_1020genes",
)
"""Labelled files that no model of this project is trained on; ``--sets`` takes others."""

BATCHES = ("kang_muscat_labelled",)
"""Those with batches that hold the same types; mixing is scored there."""

STUDIES = {
    "pbmc3k": {
        "Naive CD4 T": "CD4 T", "Memory CD4 T": "CD4 T", "CD8 T": "CD8 T", "B": "B", "NK": "NK",
        "CD14+ Mono": "monocyte", "FCGR3A+ Mono": "monocyte",
    },
    "zheng_purified_pbmc": {
        "memoryt": "CD4 T", "regulatoryt": "CD4 T", "thelper": "CD4 T", "naivet": "CD4 T",
        "cytotoxict": "CD8 T", "naivecytotoxic": "CD8 T", "bcells": "B", "nk": "NK",
        "monocytes": "monocyte",
    },
    "kang_muscat_labelled": {
        "CD4 T cells": "CD4 T", "CD8 T cells": "CD8 T", "B cells": "B",
        "CD14+ Monocytes": "monocyte", "FCGR3A+ Monocytes": "monocyte",
    },
}  # fmt: skip
"""Blood studies between which labels are carried, and the types that their labels stand for."""

ZERO_SHOT, CONTEXT = "small, zero-shot", "small, adapt='context'"
PROJECTION, JOINED = "corpus projection", "projection and components, joined"
FEW_LABELS = (5, 10, 50)
Method = Callable[["Cells", int], np.ndarray]


@dataclasses.dataclass
class Cells:
    """A data set over the genes of the model, in a file for the model and in memory for its rivals."""

    name: str
    adata: anndata.AnnData
    labels: np.ndarray
    batches: np.ndarray | None

    def subset(self, keep: np.ndarray) -> Cells:
        """Return the same of some cells."""
        batches = None if self.batches is None else self.batches[keep]
        return Cells(self.name, self.adata[keep].copy(), self.labels[keep], batches)


def read(path: Path, model: Pretrained, label_key: str) -> Cells:
    """Read a file over the genes of the model; cells without a label are left out."""
    with open_counts(path, model.genes, minimum_genes=1) as source:
        counts = source.read(0, source.cells)
        genes = np.flatnonzero(source.measured)
        obs = source.obs
    labels = obs[label_key].astype(str).to_numpy()
    keep = ~np.isin(labels, NO_LABEL)
    table = anndata.AnnData(sparse.csr_matrix(counts[:, genes], dtype=np.float32))
    table.var_names = [model.genes[gene] for gene in genes]
    batches = None
    if "batch" in obs and obs["batch"].nunique() > 1:
        batches = obs["batch"].astype(str).to_numpy()[keep]
    return Cells(path.stem, table[keep].copy(), labels[keep], batches)


def ours(model: Pretrained, **options: Any) -> Method:
    """Return a method that embeds with a model."""

    def run(cells: Cells, seed: int) -> np.ndarray:
        adata = cells.adata.copy()
        cellplm_jax.embed(adata, model, minimum_genes=1, **options)
        return np.asarray(adata.obsm["X_cellplm"])

    return run


def projection_of(model: Pretrained) -> Pretrained:
    """Return the principal components of the corpus that a model started from: no encoder, no discriminants."""
    params = {part: dict(values) for part, values in model.params.items()}
    params["encoder"] = {
        layer: {
            **parts,
            "attention": {**parts["attention"], "out": zeroed(parts["attention"]["out"])},
            "feedforward_out": zeroed(parts["feedforward_out"]),
        }
        for layer, parts in params["encoder"].items()
    }
    kernel = np.array(params["latent"]["mean"]["kernel"])
    components = int(np.sum(np.any(model.params["embedder"]["gene_embedding"] != 0, axis=0)))
    kernel[:, components:] = 0
    params["latent"]["mean"] = {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}
    return dataclasses.replace(model, params=params)


def zeroed(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a layer of zeros."""
    return {name: np.zeros_like(leaf) for name, leaf in layer.items()}


def components(*, scale: bool, unit: bool) -> Method:
    """Return 50 components of the set's own 2,000 variable genes, as scanpy computes them."""

    def run(cells: Cells, seed: int) -> np.ndarray:
        import scanpy

        adata = cells.adata.copy()
        scanpy.pp.normalize_total(adata, target_sum=1e4)
        scanpy.pp.log1p(adata)
        scanpy.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars))
        adata = adata[:, adata.var["highly_variable"]].copy()
        if scale:
            scanpy.pp.scale(adata, max_value=10)
        scanpy.pp.pca(adata, n_comps=min(50, min(adata.shape) - 1), random_state=seed)
        found = np.asarray(adata.obsm["X_pca"])
        return centred_unit(found) if unit else found

    return run


def centred_unit(values: np.ndarray) -> np.ndarray:
    """Return cells centred and scaled to length 1."""
    return unit_length(values - values.mean(axis=0))


def side_by_side(*methods: Method) -> Method:
    """Return embeddings of length 1 side by side."""
    return lambda cells, seed: np.hstack([centred_unit(run(cells, seed)) for run in methods])


def harmony(cells: Cells, seed: int) -> np.ndarray:
    """Correct the components of the set by batch."""
    import harmonypy
    import pandas as pd

    found = components(scale=True, unit=False)(cells, seed)
    table = pd.DataFrame({"batch": cells.batches})
    corrected = np.asarray(
        harmonypy.run_harmony(found, table, "batch", random_state=seed, verbose=False).Z_corr
    )
    return corrected if len(corrected) == len(found) else corrected.T


def scvi(cells: Cells, seed: int) -> np.ndarray:
    """Train scVI on the cells of the set."""
    import scvi as package

    package.settings.seed = seed
    adata = cells.adata.copy()
    if cells.batches is not None:
        adata.obs["batch"] = cells.batches
    key = "batch" if cells.batches is not None else None
    package.model.SCVI.setup_anndata(adata, batch_key=key)
    model = package.model.SCVI(adata)
    model.train(early_stopping=True, enable_progress_bar=False, accelerator="cpu")
    return np.asarray(model.get_latent_representation())


def methods_for(model: Pretrained) -> dict[str, Method]:
    """Return every method by its name."""
    untrained = Pretrained.untrained(model.config, model.genes)
    projection = ours(projection_of(model))
    own = components(scale=True, unit=True)
    return {
        "untrained network": ours(untrained),
        PROJECTION: projection,
        ZERO_SHOT: ours(model),
        "components": components(scale=False, unit=False),
        "components, scaled": components(scale=True, unit=False),
        "components, scaled, length 1": own,
        JOINED: side_by_side(projection, own),
        CONTEXT: ours(model, adapt="context"),
        "scVI, trained on the set": scvi,
    }


def scores(embedding: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Score one embedding of one set."""
    clusters = leiden_clusters(embedding, seed=seed)
    found = clustering_scores(labels, clusters)
    return {
        "ari": found["ari"],
        "nmi": found["nmi"],
        "knn_accuracy": knn_accuracy(embedding, labels, neighbors=15),
    }


def depth_correlation(embedding: np.ndarray, cells: Cells) -> float:
    """Return the largest absolute correlation of the first five components with the log library size."""
    from sklearn.decomposition import PCA

    library = np.log(np.asarray(cells.adata.X.sum(axis=1)).ravel() + 1)
    found = PCA(5, random_state=0).fit_transform(embedding)
    return float(max(abs(np.corrcoef(column, library)[0, 1]) for column in found.T))


def few_labels(embedding: np.ndarray, labels: np.ndarray, number: int, seed: int) -> float:
    """Return the macro F1 of logistic regression with so many labels per type, on all other cells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(seed)
    kinds, sizes = np.unique(labels, return_counts=True)
    kinds = kinds[sizes >= 2 * number]
    train = np.concatenate(
        [generator.choice(np.flatnonzero(labels == kind), number, replace=False) for kind in kinds]
    )
    test = np.setdiff1d(np.flatnonzero(np.isin(labels, kinds)), train)
    scaler = StandardScaler().fit(embedding)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(embedding[train]), labels[train])
    predicted = model.predict(scaler.transform(embedding[test]))
    return float(f1_score(labels[test], predicted, average="macro"))


def variable_expression(cells: Cells, seed: int) -> np.ndarray:
    """Return log-normalized expression of 3,000 variable genes."""
    import scanpy

    adata = cells.adata.copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=min(3000, adata.n_vars))
    return adata[:, adata.var["highly_variable"]].X.toarray()


def carried_labels(studies: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the mean macro F1 of labels carried between studies by 15 nearest neighbours, over ordered pairs."""
    from sklearn.metrics import f1_score
    from sklearn.neighbors import KNeighborsClassifier

    found = []
    for source, (known, labels) in studies.items():
        for target, (asked, truth) in studies.items():
            if source == target:
                continue
            shared = np.intersect1d(labels, truth)
            use, ask = np.isin(labels, shared), np.isin(truth, shared)
            voter = KNeighborsClassifier(15).fit(known[use], labels[use])
            found.append(f1_score(truth[ask], voter.predict(asked[ask]), average="macro"))
    return float(np.mean(found))


def between_studies(sets: dict[str, Cells], methods: dict[str, Method]) -> dict[str, float]:
    """Carry labels between blood studies: our embeddings, components and Harmony of all together, regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    chosen: dict[str, Cells] = {}
    for name, names in STUDIES.items():
        if name not in sets:
            return {}
        cells = sets[name].subset(np.isin(sets[name].labels, list(names)))
        cells.labels = np.array([names[label] for label in cells.labels])
        chosen[name] = cells
    table = {}
    for method in (PROJECTION, ZERO_SHOT):
        embedded = {
            name: (methods[method](cells, 0), cells.labels) for name, cells in chosen.items()
        }
        table[method] = carried_labels(embedded)
    together = anndata.concat({n: c.adata for n, c in chosen.items()}, label="batch", join="inner")
    studies = together.obs["batch"].astype(str).to_numpy()
    labels = np.concatenate([cells.labels for cells in chosen.values()])
    joint = Cells("joint", together, labels, studies)
    rivals = {"joint components": components(scale=True, unit=False)}
    if installed("harmonypy"):
        rivals["joint components, Harmony"] = harmony
    for method, run in rivals.items():
        found = run(joint, 0)
        parts = {name: (found[studies == name], labels[studies == name]) for name in chosen}
        table[method] = carried_labels(parts)
    expression = variable_expression(joint, 0)
    found = []
    for source in chosen:
        for target in chosen:
            if source != target:
                a, b = studies == source, studies == target
                shared = np.intersect1d(labels[a], labels[b])
                a, b = a & np.isin(labels, shared), b & np.isin(labels, shared)
                model = LogisticRegression(max_iter=500, C=0.1).fit(expression[a], labels[a])
                found.append(f1_score(labels[b], model.predict(expression[b]), average="macro"))
    table["logistic regression on 3,000 genes"] = float(np.mean(found))
    return table


def robustness(cells: Cells, model: Pretrained, method: Method) -> dict[str, float]:
    """Return the accuracy of neighbours with thinned counts, with half of the genes, and with other contexts."""
    generator = np.random.default_rng(0)
    counts = cells.adata.X
    thinned = cells.adata.copy()
    thinned.X = sparse.csr_matrix(
        (generator.binomial(counts.data.astype(int), 0.25).astype(np.float32),
         counts.indices, counts.indptr), shape=counts.shape,
    )  # fmt: skip
    genes = np.sort(generator.choice(counts.shape[1], counts.shape[1] // 2, replace=False))
    found = {
        "counts thinned to 25 %": method(dataclasses.replace(cells, adata=thinned), 0),
        "half of the genes": method(
            dataclasses.replace(cells, adata=cells.adata[:, genes].copy()), 0
        ),
    }
    if model is not None:
        found["contexts of one cell"] = ours(model, cells_per_context=1)(cells, 0)
        found["contexts of 64 cells"] = ours(model, cells_per_context=64)(cells, 0)
    return {name: knn_accuracy(value, cells.labels, neighbors=15) for name, value in found.items()}


def installed(module: str) -> bool:
    """Return whether a package can be imported."""
    from importlib.util import find_spec

    return find_spec(module) is not None


def mean(values: list[float]) -> float:
    """Return the mean."""
    return float(np.mean(values))


def table_of(rows: dict[str, dict[str, float]], columns: dict[str, str]) -> list[str]:
    """Return a Markdown table, the best of each column in bold."""
    best = {key: max(row.get(key, -np.inf) for row in rows.values()) for key in columns}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for key in columns:
            value = row.get(key)
            text = "" if value is None else f"{value:.3f}"
            cells.append(f"**{text}**" if value is not None and value == best[key] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write(found: dict[str, Any], out: Path) -> None:
    """Write the table and the figure."""
    sets = list(found["sets"])
    methods = list(found["sets"][sets[0]])
    main: dict[str, dict[str, float]] = {}
    for method in methods:
        rows = [run for name in sets for run in found["sets"][name].get(method, [])]
        complete = all(method in found["sets"][name] for name in sets)
        if rows and complete:
            main[method] = {key: mean([row[key] for row in rows]) for key in rows[0]}
    columns = {"ari": "ARI", "nmi": "NMI", "knn_accuracy": "neighbours' accuracy"}
    lines = [
        "# Zero-shot embedding",
        "",
        "![Zero-shot embedding](zero_shot.png)",
        "",
        f"Means over {len(sets)} labelled data sets that the model did not see and {found['seeds']} seeds of Leiden "
        f"(resolution 1, 15 neighbours). Model: `{found['model']}`. Labels are used for scoring only.",
        "",
        *table_of(main, columns),
        "",
        "## Differences from components",
        "",
        "Mean difference from `components` over the data sets, with a 95 % bootstrap interval over them.",
        "",
        *differences(found["sets"], main, columns),
        "",
        "## Data set by data set",
        "",
        "ARI / NMI / neighbours' accuracy.",
        "",
        "| | " + " | ".join(sets) + " |",
        "|---" * (len(sets) + 1) + "|",
    ]
    for method in methods:
        cells = []
        for name in sets:
            rows = found["sets"][name].get(method, [])
            cells.append(
                " / ".join(f"{mean([row[key] for row in rows]):.3f}" for key in columns)
                if rows
                else ""
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if found["studies"]:
        lines += [
            "",
            "## Labels carried between blood studies",
            "",
            f"Macro F1 of five common types, 15 nearest neighbours, mean over ordered pairs of {len(STUDIES)} studies.",
            "",
            *table_of({k: {"f1": v} for k, v in found["studies"].items()}, {"f1": "macro F1"}),
        ]
    for name, rows in found["batches"].items():
        lines += [
            "",
            f"## Batches: {name}",
            "",
            *table_of(
                rows,
                {
                    "ilisi": "iLISI",
                    "kbet": "kBET",
                    "bras": "BRAS",
                    "knn_accuracy": "neighbours' acc.",
                },
            ),
        ]
    lines += [
        "",
        "## Few labels",
        "",
        "Macro F1 of logistic regression on each representation, mean over the sets; labels per type.",
        "",
        *table_of(found["few_labels"], {str(n): f"{n} labels" for n in FEW_LABELS}),
        "",
        "## Robustness",
        "",
        "Neighbours' accuracy, mean over the sets.",
        "",
    ]
    names = list(dict.fromkeys(key for row in found["robustness"].values() for key in row))
    lines += table_of(found["robustness"], {name: name for name in names})
    lines += [
        "",
        "Largest correlation of one of the first five components of an embedding with the log library size, mean over "
        "the sets: "
        + ", ".join(f"{name} {value:.2f}" for name, value in found["depth"].items())
        + ".",
        "",
        f"{found['machine']}; " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()) + ".",
        *(
            [f"Left out, not installed: {', '.join(found['left_out'])}."]
            if found["left_out"]
            else []
        ),
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines))
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(main, columns, out.with_suffix(".png"))


def differences(
    sets: dict[str, Any], main: dict[str, dict[str, float]], columns: dict[str, str]
) -> list[str]:
    """Return a Markdown table of paired differences from the components, data set by data set."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(sets), (10_000, len(sets)))
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in main:
        if method == "components":
            continue
        texts = []
        for key in columns:
            gaps = np.array(
                [
                    mean([run[key] for run in rows[method]])
                    - mean([run[key] for run in rows["components"]])
                    for rows in sets.values()
                ]
            )
            low, high = np.quantile(gaps[draws].mean(axis=1), [0.025, 0.975])
            texts.append(f"{gaps.mean():+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return lines


def draw(main: dict[str, dict[str, float]], columns: dict[str, str], path: Path) -> None:
    """Draw the means as bars, the strongest simple rival as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    names = list(main)[::-1]
    for ax, (key, title) in zip(axes, columns.items(), strict=True):
        values = [main[name][key] for name in names]
        colors = ["#0072B2" if name in (ZERO_SHOT, CONTEXT) else "#9a9a9a" for name in names]
        ax.barh(names, values, color=colors)
        rival = max(main[name][key] for name in names if name.startswith("components"))
        ax.axvline(rival, color="#D55E00", linewidth=1.5, label="best components")
        for place, value in enumerate(values):
            ax.text(value, place, f" {value:.3f}", va="center", fontsize=8)
        ax.set_title(title)
        ax.set_xlim(0, 1.12 * max(values))
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the study."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--data", type=Path, default=os.environ.get("CELLPLM_SHARED_DATA"))
    parser.add_argument("--sets", type=Path, nargs="*", help="labelled .h5ad files")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--maximum-cells", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=HERE / "zero_shot")
    args = parser.parse_args()
    paths = args.sets or [Path(args.data) / f"{name}.h5ad" for name in SETS]
    model = cellplm_jax.load(args.model)
    methods = methods_for(model)
    left_out = []
    if not installed("scvi"):
        del methods["scVI, trained on the set"]
        left_out.append("scVI (scvi-tools)")
    if not installed("harmonypy"):
        left_out.append("Harmony (harmonypy)")
    sets = {}
    for path in paths:
        cells = read(path, model, args.label_key)
        if len(cells.labels) > args.maximum_cells:
            keep = np.random.default_rng(0).choice(
                len(cells.labels), args.maximum_cells, replace=False
            )
            cells = cells.subset(np.sort(keep))
        sets[path.stem] = cells
    found: dict[str, Any] = {
        "model": model.id, "seeds": args.seeds, "machine": machine(), "left_out": left_out,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions_of(("cellplm-jax", "jax", "scanpy", "scikit-learn", "harmonypy")),
        "sets": {}, "batches": {},
    }  # fmt: skip
    depth: dict[str, list[float]] = {}
    few: dict[str, dict[int, list[float]]] = {}
    robust: dict[str, dict[str, list[float]]] = {}
    for name, cells in sets.items():
        rows: dict[str, list[dict[str, float]]] = {}
        for method, run in methods.items():
            embedding = run(cells, 0)
            rows[method] = [scores(embedding, cells.labels, seed) for seed in range(args.seeds)]
            values = rows[method]
            print(
                f"{name[:20]:20} {method:36}",
                *(f"{mean([v[key] for v in values]):.3f}" for key in values[0]),
                flush=True,
            )
            if method in (PROJECTION, ZERO_SHOT, CONTEXT):
                depth.setdefault(method, []).append(depth_correlation(embedding, cells))
            if method == "untrained network":
                continue
            for number in FEW_LABELS:
                sizes = np.unique(cells.labels, return_counts=True)[1]
                if (sizes >= 2 * number).sum() >= 2:
                    for seed in range(args.seeds):
                        few.setdefault(method, {}).setdefault(number, []).append(
                            few_labels(embedding, cells.labels, number, seed)
                        )
        genes = variable_expression(cells, 0)
        for number in FEW_LABELS:
            if (np.unique(cells.labels, return_counts=True)[1] >= 2 * number).sum() >= 2:
                for seed in range(args.seeds):
                    few.setdefault("3,000 variable genes", {}).setdefault(number, []).append(
                        few_labels(genes, cells.labels, number, seed)
                    )
        found["sets"][name] = rows
        for method in (PROJECTION, ZERO_SHOT):
            opened = model if method == ZERO_SHOT else None
            row = {"as it is": rows[method][0]["knn_accuracy"]}
            row |= robustness(cells, opened, methods[method])
            for key, value in row.items():
                robust.setdefault(method, {}).setdefault(key, []).append(value)
        if name in BATCHES and cells.batches is not None:
            found["batches"][name] = mixing(cells, model, methods)
    found["depth"] = {name: mean(values) for name, values in depth.items()}
    found["few_labels"] = {
        method: {str(number): mean(values) for number, values in row.items()}
        for method, row in few.items()
    }
    found["robustness"] = {
        method: {key: mean(values) for key, values in row.items()} for method, row in robust.items()
    }
    found["studies"] = between_studies(sets, methods)
    write(found, args.out)
    print(args.out.with_suffix(".md").read_text())


def mixing(cells: Cells, model: Pretrained, methods: dict[str, Method]) -> dict[str, Any]:
    """Score the mixing of batches: every batch is a context of ours."""
    import scib_metrics

    def batched(**options: Any) -> np.ndarray:
        adata = cells.adata.copy()
        adata.obs["batch"] = cells.batches
        cellplm_jax.embed(adata, model, minimum_genes=1, batch_key="batch", **options)
        return np.asarray(adata.obsm["X_cellplm"])

    embeddings = {
        "components, scaled": methods["components, scaled"](cells, 0),
        ZERO_SHOT: batched(),
        CONTEXT: batched(adapt="context"),
    }
    if installed("harmonypy"):
        embeddings["Harmony"] = harmony(cells, 0)
    return {
        name: {
            "ilisi": batch_mixing(value, cells.batches),
            "kbet": kbet(value, cells.batches),
            "bras": float(scib_metrics.bras(value, cells.labels, cells.batches)),
            "knn_accuracy": knn_accuracy(value, cells.labels, neighbors=15),
        }
        for name, value in embeddings.items()
    }


if __name__ == "__main__":
    main()
