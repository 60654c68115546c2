"""The pages of ``--report``: what they show of each verb, and that they need nothing beside them."""

from __future__ import annotations

import importlib.util
import json
import re
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

if (
    importlib.util.find_spec("scanpy") is None
):  # importing it takes seconds, and most of this needs no more
    pytest.skip("needs the extra 'eval'", allow_module_level=True)

import matplotlib

matplotlib.use("Agg")

from cellplm_jax.cli import main, pages
from cellplm_jax.report import Figure, Table, render_report
from tests.conftest import VOCABULARY, make_adata, make_labelled


@pytest.fixture(autouse=True)
def quick_maps(monkeypatch):
    """Maps are the first two dimensions: UMAP is tested elsewhere, and slow to import."""

    def first_two(embedding, **_):
        return np.asarray(embedding, np.float32)[:, :2]

    monkeypatch.setattr("cellplm_jax.evaluate.embedding.umap_coordinates", first_two)
    monkeypatch.setattr("cellplm_jax.tasks.annotate.umap_coordinates", first_two)


def headings(page):
    return [section.heading for section in page.sections if section.heading]


def rendered(page):
    """The page as it is written; nothing in it is asked for elsewhere."""
    text = render_report(title=page.title, summary=page.summary, sections=page.sections)
    assert "://" not in text
    return text


def table(page, heading):
    return next(s for s in page.sections if isinstance(s, Table) and s.heading == heading)


def test_embed(tiny_run, tmp_path, capsys):
    make_adata(24).write_h5ad(tmp_path / "in.h5ad")
    out, page = tmp_path / "out.h5ad", tmp_path / "page.html"
    run = ["embed", tmp_path / "in.h5ad", "--model", tiny_run, "--out", out, "--quiet", "--json"]
    run = list(map(str, [*run, "--report", page, "--color", "batch"]))
    assert main(run) == 0
    printed, err = capsys.readouterr()
    facts = json.loads(printed)
    assert err == ""
    assert facts["report"] == str(page)
    assert "X_cellplm" in ad.read_h5ad(out).obsm
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "24 cells in" in text
    assert "40 of 40" in text  # genes of the model that the file has
    assert "--color batch" in text  # how it was made
    assert "prefers-color-scheme:dark" in text
    # Refused before any work.
    for wrong, word in (("page.txt", "ends in .html"), ("no/page.html", "mkdir")):
        out.unlink(missing_ok=True)
        assert main([*run[:-4], "--report", str(tmp_path / wrong)]) == 2
        assert word in capsys.readouterr().err
        assert not out.exists()
    assert main([*run[:-1], "bathc"]) == 2
    assert "Did you mean 'batch'" in capsys.readouterr().err


def test_annotation(tiny_run, tmp_path, capsys):
    make_labelled(60).write_h5ad(tmp_path / "in.h5ad")
    saved, out = tmp_path / "annotator", tmp_path / "out.h5ad"
    fit = ["annotate", "fit", tmp_path / "in.h5ad", "--model", tiny_run, "--out", saved, "--quiet"]
    fit += ["--label-key", "kind", "--epochs", "2", "--validation-fraction", "0.3", "--json"]
    assert main(list(map(str, [*fit, "--report", tmp_path / "fit.html"]))) == 0
    facts = json.loads(capsys.readouterr().out)
    text = (tmp_path / "fit.html").read_text()
    for word in ("Confusions", "Calibration", "Fitting", "By cell type", "alpha", "macro_f1"):
        assert word in text
    assert f"{facts['validation_cells']} validation cells" in text
    predict = ["annotate", "predict", tmp_path / "in.h5ad", "--model", saved, "--out", out]
    predict += ["--quiet", "--report", tmp_path / "predict.html"]
    assert main(list(map(str, predict))) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'predict.html'}\n")
    written = ad.read_h5ad(out)
    assert written.obsm["X_umap"].shape == (60, 2)
    text = (tmp_path / "predict.html").read_text()
    assert (
        text.count("data:image/png;base64,") == 3
    )  # confidence; the map by label and by confidence
    for label, count in written.obs["cellplm_cell_type"].value_counts().items():
        assert re.search(rf"<td>{label}</td><td[^>]*>{count}</td>", text)


def test_a_fit_without_validation_says_so():
    estimator = SimpleNamespace(
        validation=None, labels=["a", "b"], method="neighbors", task="annotation", history=[],
        messages=["One thing."], facts={"training_cells": 7, "label_key": "kind"},
    )  # fmt: skip
    page = pages.annotator(estimator)
    text = rendered(page)
    assert "nothing is known of how good" in text
    assert headings(page) == ["Scores", "Facts", "Remarks"]


def test_clusters():
    cells = make_adata(30)
    cells.obs["group"] = pd.Categorical([str(n % 3) for n in range(30)])
    cells.obsm["X_umap"] = np.random.default_rng(0).random((30, 2))
    page = pages.clusters(cells, ["group", "batch"], "X_cellplm", {"ari": 0.5})
    assert headings(page) == ["Clusters", "Sizes", "Scores"]
    assert sum(isinstance(section, Figure) for section in page.sections) == 3
    assert "30 cells in 3 clusters" in rendered(page)


def test_integration_before_and_after(tmp_path):
    cells = make_adata(30)
    cells.obsm["X_cellplm_integrated"] = np.random.default_rng(0).random((30, 4))
    cells.write_h5ad(tmp_path / "out.h5ad")
    page = pages.integrated(tmp_path / "out.h5ad", "X_cellplm_integrated", ["batch"], {})
    assert "there is nothing to compare with" in rendered(page)
    cells.obsm["X_pca"] = np.random.default_rng(1).random((30, 4))
    cells.write_h5ad(tmp_path / "out.h5ad")
    page = pages.integrated(
        tmp_path / "out.h5ad", "X_cellplm_integrated", ["batch"], {"ilisi": 0.4}
    )
    assert headings(page) == ["Before", "Integrated", "Scores"]


def test_imputation(tmp_path):
    cells = make_adata(30)
    values = pd.DataFrame(
        np.random.default_rng(0).random((30, 4)), index=cells.obs_names, columns=VOCABULARY[:4]
    )
    cells.obsm["cellplm_imputed"] = values
    cells.write_h5ad(tmp_path / "out.h5ad")
    confidence = pd.Series([0.1, 0.9, np.nan, 0.5], index=VOCABULARY[:4])
    estimator = SimpleNamespace(
        confidence=confidence, reading=SimpleNamespace(spatial_key="spatial"), history=[],
        messages=[], task="imputation",
        facts={"imputed_genes": 4, "shared_genes": 20, "training_cells": 9, "mean_confidence": 0.5},
    )  # fmt: skip
    page = pages.imputed(tmp_path / "out.h5ad", estimator)
    genes = [row[0] for row in table(page, "Imputed genes").rows]
    assert genes == [VOCABULARY[1], VOCABULARY[3], VOCABULARY[0], VOCABULARY[2]]
    assert sum(isinstance(section, Figure) for section in page.sections) == 3
    assert rendered(page)
    page = pages.imputer(estimator)
    assert [row[1] for row in table(page, "Genes").rows] == [0.9, 0.5, 0.1]


def test_denoised(tmp_path):
    cells = make_adata(30)
    layer = np.full(cells.shape, 2.0, np.float32)
    layer[:, -1] = np.nan
    cells.layers["cellplm_denoised"] = layer
    cells.write_h5ad(tmp_path / "out.h5ad")
    page = pages.denoised(tmp_path / "out.h5ad", SimpleNamespace(messages=[]))
    rows = dict(table(page, "Expected counts").rows)
    assert rows["genes"] == str(cells.n_vars - 1)
    assert rows["mean total"] == f"{2 * (cells.n_vars - 1):.4g}"
    assert rendered(page)


def test_perturbations():
    change = pd.DataFrame([[0.1, -2.0], [0.0, 0.3]], index=["A", "B"], columns=VOCABULARY[:2])
    found = SimpleNamespace(
        change=change, known=pd.Series(["seen", "unseen"], index=["A", "B"]), messages=("Careful.",)
    )
    page = pages.perturbed(found)
    rows = table(page, "Perturbations").rows
    assert rows[0][:2] == ("A", "seen")
    assert rows[0][3].split(", ")[0].endswith("-2.00")
    assert "Careful." in rendered(page)


def test_samples(tmp_path):
    cells = make_adata(30)
    cells.obs["cellplm_contribution"] = np.linspace(-1, 1, 30, dtype=np.float32)
    cells.write_h5ad(tmp_path / "out.h5ad")
    rows = pd.DataFrame(
        {"label": ["no", "yes"], "confidence": [0.9, 0.8], "cells": [10, 20]}, index=["d1", "d2"]
    )
    page = pages.samples(tmp_path / "out.h5ad", rows, SimpleNamespace(messages=[]))
    assert table(page, "Samples").rows[1] == ("d2", "yes", 0.8, 20)
    assert "2 samples: 1 no, 1 yes." in rendered(page)


def test_a_model_and_its_run(tiny_run, tmp_path, capsys):
    page = tmp_path / "info.html"
    assert main(["info", str(tiny_run), "--json", "--report", str(page)]) == 0
    facts = json.loads(capsys.readouterr().out)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2  # parameters, and the run
    assert f"{facts['parameters']['total']:,} parameters" in text
    assert "encoder.kind" in text


def test_many_groups_are_not_all_drawn():
    obs = pd.DataFrame({"donor": [f"d{n}" for n in range(50)], "depth": np.linspace(0, 1, 50)})
    found = pages._columns(obs, ["donor", "depth", None, "donor"], np.arange(50))
    assert list(found) == ["donor", "depth"]
    assert len(found["donor"].categories) == 31
    assert (found["donor"] == "others").sum() == 20
    assert found["depth"].dtype == float


def test_a_corpus(tmp_path, capsys):
    make_adata(24).write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "genes").write_text("\n".join(VOCABULARY) + "\n")
    page = tmp_path / "corpus.html"
    run = ["prepare", tmp_path / "in.h5ad", "--out", tmp_path / "corpus", "--workers", "0"]
    run += ["--genes", tmp_path / "genes", "--sample-key", "batch", "--quiet", "--json"]
    assert main(list(map(str, [*run, "--report", page]))) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["totals"]["cells"], facts["report"]) == (24, str(page))
    text = page.read_text()
    assert "24 cells in 2 samples (2 spatial), 40 genes." in text
    assert text.count("data:image/png;base64,") == 1
