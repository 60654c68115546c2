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

from cellplm_jax.cli import main
from cellplm_jax.errors import InputError
from cellplm_jax.report import blocks, effects, pages
from cellplm_jax.report.html import Figure, Table, render_report
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
    for word in ("Confusions", "Calibration", "Fitting", "By cell type", "alpha", "macro F1"):
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
    assert "the quality of the labels is unknown" in text
    assert headings(page) == ["Scores", "Facts", "Messages"]


def test_clusters():
    cells = make_adata(30)
    cells.obs["group"] = pd.Categorical([str(n % 11) for n in range(30)])
    cells.obs["kind"] = ["a" if n % 11 == 10 else "b" for n in range(30)]
    cells.obsm["X_umap"] = np.random.default_rng(0).random((30, 2))
    page = pages.clusters("made.h5ad", cells, ["group", "kind"], "X_cellplm", {"ari": 0.5})
    assert headings(page) == ["Clusters", "Composition of the clusters", "Scores"]
    assert sum(isinstance(section, Figure) for section in page.sections) == 2
    rows = table(page, "Composition of the clusters").rows
    assert [row[0] for row in rows] == list(map(str, range(11)))  # "10" after "9"
    assert rows[10] == ["10", 2, "7%", "a (100%)"]
    ((name, value, meaning),) = table(page, "Scores").rows
    assert (name, value) == ("ARI", 0.5)
    assert "agreement" in meaning
    assert "30 cells in 11 clusters, of 2 to 3 cells." in rendered(page)


def test_every_score_that_is_shown_says_what_it_means():
    from cellplm_jax.evaluate.annotation import annotation_scores
    from cellplm_jax.evaluate.embedding import integration_scores

    labels = np.arange(60) % 3
    scores = annotation_scores(labels, np.random.default_rng(0).permutation(labels))
    # Leiden takes seconds to import: its names are taken from where they are listed.
    listed = re.findall(
        r"``(\w+)``", integration_scores.__doc__.split("Returns:")[1].split("Raises:")[0]
    )
    assert {"ilisi", "kbet_per_label", "ari", "clusters"} <= set(listed)
    shown = {**scores, **dict.fromkeys(listed, 0.5)}
    known = blocks.scores_table(shown, "").rows
    assert all(meaning for *_, meaning in known)
    assert len(known) == len(shown) - len(blocks.SAME)
    # Those left out are others by another name.
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])
    assert scores["weighted_recall"] == pytest.approx(scores["accuracy"])
    assert scores["macro_recall"] == pytest.approx(scores["macro_accuracy"])


def test_integration_before_and_after(tmp_path):
    cells = make_adata(40)
    cells.obsm["X_cellplm_integrated"] = np.random.default_rng(0).random((40, 4))
    cells.write_h5ad(tmp_path / "out.h5ad")
    page = effects.integrated(tmp_path / "out.h5ad", "X_cellplm_integrated", ["batch"])
    heading = "Batch mixing and preserved types"
    assert headings(page) == ["Before", "Integrated", heading]
    assert "principal components of the counts" in rendered(page)
    cells.obsm["X_pca"] = np.random.default_rng(1).random((40, 4))
    cells.write_h5ad(tmp_path / "out.h5ad")
    page = effects.integrated(tmp_path / "out.h5ad", "X_cellplm_integrated", ["batch"])
    columns = table(page, heading).columns
    assert columns[:4] == ["score", "before: obsm['X_pca']", "integrated", "components"]
    assert {"iLISI", "kBET"} <= {row[0] for row in table(page, heading).rows}
    # Every score is of the same cells, and the baseline is there.
    if importlib.util.find_spec("harmonypy") is not None:
        assert columns[4] == "Harmony on components"
        assert all(0 <= value <= 1 for value in table(page, heading).rows[0][1:5])


def test_clusters_of_a_file_show_markers_tissue_and_one_colour(tmp_path):
    cells = make_adata(60)
    counts = np.asarray(cells.X.toarray())
    groups = np.array([str(n % 11) for n in range(60)])
    gene = cells.var_names[3]
    counts[groups == "2", 3] += 60
    cells.X = counts
    cells.obs["group"] = pd.Categorical(groups)
    cells.obs["kind"] = ["a" if n % 11 == 10 else "b" for n in range(60)]
    cells.obsm["X_umap"] = np.random.default_rng(0).random((60, 2))
    cells.obsm["spatial"] = np.random.default_rng(1).random((60, 2))
    cells.uns["kind_colors"] = ["#112233", "#445566"]
    cells.write_h5ad(tmp_path / "out.h5ad")
    drawn = []
    original = blocks.Figure

    def keep(*arguments):
        drawn.append(getattr(arguments[0], "figure", arguments[0]))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "Figure", keep)
        page = pages.clusters(
            tmp_path / "out.h5ad", cells, ["group", "kind"], "X_cellplm", {"ari": 0.5}
        )
    assert headings(page) == [
        "Clusters",
        "In the tissue",
        "Composition of the clusters",
        "Marker genes",
        "Scores",
    ]
    best = {row[0]: row[1].split(", ")[0] for row in table(page, "Marker genes").rows}
    assert best["2"] == blocks.named([gene])[0]

    def legend(figure):
        legend = figure.axes[0].get_legend()
        names = [text.get_text() for text in legend.get_texts()]
        return dict(zip(names, [h.get_color() for h in legend.legend_handles], strict=True))

    umap_group, umap_kind, tissue_group, tissue_kind = map(legend, drawn[:4])
    assert list(umap_group) == [str(n) for n in range(11)]
    assert umap_group == tissue_group
    assert umap_kind == tissue_kind == {"a": "#112233", "b": "#445566"}


def test_a_predicted_type_has_one_colour_in_every_order():
    """The order in which cells are sampled does not change a colour."""
    import anndata

    obs = pd.DataFrame({"kind": ["c", "a", "b", "a"]}, index=list("wxyz"))
    one = blocks.palettes_of(anndata.AnnData(obs=obs), ["kind"])["kind"]
    two = blocks.palettes_of(anndata.AnnData(obs=obs.iloc[::-1]), ["kind"])["kind"]
    assert one == two


@pytest.fixture
def imputer(tiny_model):
    """An imputer of the last ten genes from the others, as if it had been fitted, and cells with all of them."""
    from cellplm_jax.tasks.impute import GeneImputer

    made = GeneImputer(None)
    made.model = tiny_model
    made.panel, made.imputed = list(VOCABULARY[:30]), list(VOCABULARY[30:])
    made._columns = np.arange(30, 40)
    made.confidence = pd.Series(np.linspace(0.9, 0.0, 10), index=made.imputed)
    made.facts = {"imputed_genes": 10, "shared_genes": 30, "training_cells": 9}
    return made, make_adata(30)[:, VOCABULARY].copy()


def test_imputed_genes_beside_what_was_measured(imputer):
    estimator, cells = imputer
    counts = cells.X.toarray()
    total = counts[:, :30].sum(axis=1, keepdims=True)
    truth = np.log1p(1e4 * counts[:, 30:] / np.maximum(total, 1))
    values = pd.DataFrame(counts[:, 30:].copy(), index=cells.obs_names, columns=estimator.imputed)
    # Right but for the last gene, where it is the wrong way round.
    values.iloc[:, -1] = values.iloc[:, -1].max() - values.iloc[:, -1]
    found = estimator.beside_measured(cells, values)
    measured = found.pearson.dropna()
    assert (measured.iloc[:-1] > 0.999).all()
    assert found.pearson.iloc[-1] < 0
    assert [pair.gene for pair in found.pairs] == [estimator.imputed[n] for n in (0, 4, 9)]
    assert all(pair.gene == pair.other for pair in found.pairs)
    np.testing.assert_allclose(found.pairs[0].measured, truth[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.pairs[0].imputed, truth[:, 0], rtol=1e-5)
    # Without them: the gene of the panel that goes with an imputed one.
    panel = cells[:, :30].copy()
    values.iloc[:, 0] = counts[:, 7]
    found = estimator.beside_measured(panel, values)
    assert found.pearson.empty
    assert (found.pairs[0].gene, found.pairs[0].other) == (estimator.imputed[0], VOCABULARY[7])
    with pytest.raises(InputError, match="30 cells and a prediction for 29"):
        estimator.beside_measured(panel, values.iloc[1:])


def test_imputation(imputer, tmp_path):
    estimator, cells = imputer
    counts = cells.X.toarray()
    values = pd.DataFrame(counts[:, 30:], index=cells.obs_names, columns=estimator.imputed)
    cells.obsm["cellplm_imputed"] = values
    cells.write_h5ad(tmp_path / "out.h5ad")
    page = pages.imputed(tmp_path / "out.h5ad", estimator, {})
    assert headings(page) == [
        "Imputed genes",
        "Confidence and correlation in these cells",
        "In the tissue",
    ]
    assert table(page, "Imputed genes").columns[2] == "correlation here"
    assert sum(isinstance(section, Figure) for section in page.sections) == 4
    assert "are measured in this file" in rendered(page)
    panel = cells[:, :30].copy()
    panel.write_h5ad(tmp_path / "panel.h5ad")
    page = pages.imputed(tmp_path / "panel.h5ad", estimator, {})
    genes = [row[0] for row in table(page, "Imputed genes").rows]
    assert genes == blocks.named(estimator.imputed)
    assert "correlation here" not in table(page, "Imputed genes").columns
    assert "after all" not in rendered(page)
    page = pages.imputer(estimator)
    assert [row[1] for row in table(page, "Genes").rows] == list(estimator.confidence)


def test_a_table_in_obsm_opens_again_where_names_of_cells_are_nullable(tmp_path):
    from cellplm_jax.data.anndata_io import write_h5ad
    from cellplm_jax.tasks.files import write_copy

    cells = make_adata(5)
    cells.obs.index = pd.Index(pd.array(list(cells.obs_names), dtype="string"))
    write_h5ad(cells, tmp_path / "in.h5ad")
    names = pd.Index(list(cells.obs_names), dtype=object)
    values = pd.DataFrame({"a": np.arange(5.0)}, index=names)
    write_copy(tmp_path / "in.h5ad", tmp_path / "out.h5ad", obsm={"values": values})
    assert list(ad.read_h5ad(tmp_path / "out.h5ad").obsm["values"]["a"]) == [0, 1, 2, 3, 4]


def test_denoised(tiny_run, tmp_path, capsys):
    from cellplm_jax.tasks.denoise import Denoiser

    make_adata(30).write_h5ad(tmp_path / "in.h5ad")
    out, page = tmp_path / "out.h5ad", tmp_path / "page.html"
    run = ["denoise", "predict", tmp_path / "in.h5ad", "--model", tiny_run, "--zero-shot"]
    run = list(map(str, [*run, "--out", out, "--quiet", "--report", page]))
    assert main(run) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3  # two genes, and the means of all
    for word in ("Before and after", "Means of all genes", "Tissue coordinates."):
        assert word in text
    gene = VOCABULARY[3]
    shown = pages.denoised(out, Denoiser(tiny_run), {}, [gene])
    assert sum(isinstance(section, Figure) for section in shown.sections) == 2
    assert [row[0] for row in table(shown, "Genes").rows] == blocks.named([gene])
    capsys.readouterr()
    assert main([*run[:-2], "--show", gene]) == 2
    assert "--show requires --report" in capsys.readouterr().err
    out.unlink()
    assert main([*run, "--show", "NOSUCHGENE"]) == 2
    assert "gene 'NOSUCHGENE' was not denoised" in capsys.readouterr().err
    assert not out.exists()


def test_before_and_after(tiny_run, tmp_path):
    from cellplm_jax.tasks.denoise import Denoiser
    from cellplm_jax.tasks.denoise_view import before_and_after

    cells = make_adata(30)[:, VOCABULARY].copy()
    counts = cells.X.toarray()
    layer = np.full(cells.shape, 0.25, np.float32)
    layer[:, 5] = 2.0 * counts[:, 5]
    layer[:, 6] = 1.0
    cells.layers["cellplm_denoised"] = layer
    cells.write_h5ad(tmp_path / "out.h5ad")
    denoiser, rows = Denoiser(tiny_run), np.arange(0, 30, 2)
    found = before_and_after(denoiser, tmp_path / "out.h5ad", rows=rows, genes=[VOCABULARY[5]])
    assert found.genes == [VOCABULARY[5]]
    total = counts[rows].sum(axis=1)
    np.testing.assert_allclose(
        found.before[:, 0], np.log1p(1e4 * counts[rows, 5] / total), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.after[:, 0], np.log1p(2e4 * counts[rows, 5] / total), rtol=1e-5
    )
    row = found.table.iloc[0]
    assert row["share_counted"] == pytest.approx((counts[rows, 5] > 0).mean())
    assert row["mean_after"] == pytest.approx(2 * row["mean_before"])
    empty = counts[rows] == 0
    assert found.zeros == pytest.approx(empty.mean())
    assert found.expected_zeros == pytest.approx(empty[:, 6].sum() / empty.sum())
    np.testing.assert_allclose(found.coordinates, cells.obsm["spatial"][rows])
    with pytest.raises(InputError, match="was not denoised"):
        before_and_after(denoiser, tmp_path / "out.h5ad", rows=rows, genes=["NOSUCHGENE"])


def test_the_second_gene_lies_elsewhere():
    from cellplm_jax.tasks.denoise_view import _telling_genes

    base = np.linspace(0, 3, 20)
    values = np.stack([base, 0.9 * base, 0.8 * base[::-1], 0.01 * base], axis=1)
    assert list(_telling_genes(values, 3)) == [0, 2, 1]


def test_losses_that_lie_apart_are_drawn_apart():
    rows = [
        {"epoch": n, "loss": 800.0 - n, "validation_loss": 60.0 - n / 10, "validation_score": n / 10 - 60.0}
        for n in (1, 2, 3)
    ]  # fmt: skip
    apart = SimpleNamespace(history=rows, facts={"best_epoch": 3})
    assert len(blocks.curve(apart)) == 2
    near = [{**row, "validation_loss": row["loss"] + 0.5, "validation_score": None} for row in rows]
    assert len(blocks.curve(SimpleNamespace(history=near, facts={"best_epoch": 3}))) == 1
    scored = [{**row, "validation_score": 0.5} for row in near]
    assert len(blocks.curve(SimpleNamespace(history=scored, facts={"best_epoch": 3}))) == 2


def test_a_map_is_coloured_by_what_tells_cells_apart():
    obs = pd.DataFrame(
        {"one": ["a"] * 40, "name": [f"c{n}" for n in range(40)], "type": ["a", "b"] * 20, "n": range(40)}
    )  # fmt: skip
    obs["again"] = obs["type"].astype("category")
    assert blocks.telling(obs) == ["type"]


def test_perturbations():
    change = pd.DataFrame([[0.1, -2.0], [0.0, 0.3]], index=["A", "B"], columns=VOCABULARY[:2])
    found = SimpleNamespace(
        change=change, known=pd.Series(["seen", "unseen"], index=["A", "B"]), messages=("Careful.",)
    )
    rows = table(effects.perturbed(found), "Perturbations").rows
    assert rows[0][:2] == ("A", "seen")
    assert rows[0][3].split(", ")[0].endswith("\N{MINUS SIGN}2.00")
    page = effects.perturbed(found, SimpleNamespace(mean_change=np.array([0.0, 0.6])))
    rows = table(page, "Perturbations").rows
    # B is nothing but the mean change.
    assert rows[1][3] == pytest.approx(1.0)
    assert rows[0][3] == pytest.approx(-1.0)
    assert "Careful." in rendered(page)


def test_left_out_perturbations_beside_baselines():
    from cellplm_jax.tasks.perturbation_ridge import LeftOut
    from cellplm_jax.tasks.perturbation_screen import Changes

    random = np.random.default_rng(0)
    names = np.array(["A", "B", "A+B", "C"], object)
    values = random.normal(size=(4, 40))
    changes = Changes(names, np.full(4, "all cells", object), values, np.ones(4), np.full(4, 9))
    baselines = {"mean_change": values * 0.5, "additive": values * 0.8}
    estimator = SimpleNamespace(
        left_out=LeftOut.of(changes, values * 0.9, baselines), control="ctrl", messages=["Told."],
        facts={"perturbations": 4}, perturbations=list(names), model=SimpleNamespace(genes=VOCABULARY),
    )  # fmt: skip
    page = effects.predictor(estimator)
    assert headings(page)[:2] == ["Left-out perturbations", "Prediction and baselines"]
    found = table(page, "Prediction and baselines")
    assert found.columns[3:7] == ["RMSE", "additive", "mean of the others", "no change"]
    assert [row[0] for row in found.rows] == ["mean", "A", "B", "A+B", "C"]
    size = np.sqrt(np.square(values[0]).mean())
    assert found.rows[1][3:7] == pytest.approx((0.1 * size, 0.2 * size, 0.5 * size, size))
    assert page.summary == "4 perturbations, control 'ctrl'."
    assert "Told." in rendered(page)
    estimator.left_out = None
    assert "Left-out perturbations" not in headings(effects.predictor(estimator))


def test_samples(tmp_path):
    cells = make_adata(30)
    cells.obs["cellplm_contribution"] = np.linspace(-1, 1, 30, dtype=np.float32)
    cells.write_h5ad(tmp_path / "out.h5ad")
    rows = pd.DataFrame(
        {"label": ["no", "yes"], "confidence": [0.9, 0.8], "cells": [10, 20], "shift": [0.1, 0.3]},
        index=["d1", "d2"],
    )
    cells.obs["donor"] = ["d1"] * 10 + ["d2"] * 20
    cells.obs["disease"] = ["no"] * 10 + ["yes"] * 20
    cells.obs["kind"] = ["up" if n % 2 else "down" for n in range(30)]
    cells.write_h5ad(tmp_path / "out.h5ad")
    facts = {"sample_key": "donor", "label_key": "disease"}
    estimator = SimpleNamespace(messages=[], facts=facts, shifts=pd.DataFrame([]))
    page = effects.samples(tmp_path / "out.h5ad", rows, estimator)
    assert table(page, "Samples").rows[1] == ("d2", "yes", 0.8, 20, 0.3)
    assert "2 samples: 1 no, 1 yes." in rendered(page)
    # Kinds of cells, and not what all cells of a sample share.
    found = [s for s in page.sections if isinstance(s, Table) and "mean contribution" in s.columns]
    assert [s.columns[0] for s in found if s.columns[0] not in ("sample", "batch")] == ["kind"]
    means = {name: mean for name, _, mean in next(s for s in found if s.columns[0] == "kind").rows}
    assert means["up"] == pytest.approx(cells.obs["cellplm_contribution"][1::2].mean(), abs=1e-6)
    # With types: boxes by type, and the table of their shifts.
    cells.obs["cellplm_contribution_type"] = cells.obs["kind"].astype("category")
    cells.obs["cellplm_sample_label"] = cells.obs["disease"].astype("category")
    cells.write_h5ad(tmp_path / "out.h5ad")
    estimator.shifts = pd.DataFrame(
        [{"type": "up", "cells": 15, "samples": 4, "p": 0.3, "p_latent": 0.2, "p_pseudobulk": 0.1,
          "genes": "CD3E"}, {"type": "down", "cells": 15, "samples": 1}]
    )  # fmt: skip
    page = effects.samples(tmp_path / "out.h5ad", rows, estimator)
    shifts = table(page, "Shifts of cell types between labels").rows
    assert shifts[0][0] == "up"
    assert shifts[1][3:] == ("",) * 4
    assert "log-odds by the shift of its own type" in rendered(page)


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
    found = blocks.columns_of(obs, ["donor", "depth", None, "donor"], np.arange(50))
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
