"""The command: what it prints, and that everything wrong ends in one message, status 2 and no output."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import cellplm_jax
from cellplm_jax import cli
from cellplm_jax.cli import build_parser, main
from tests.conftest import VOCABULARY, make_adata, make_counts, make_labelled

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path):
    """An input file of eight cells; ``place(change)`` changes it first."""

    def write(change=None):
        adata = make_adata(8)
        replaced = change(adata) if change else None
        path = tmp_path / "in.h5ad"
        (adata if replaced is None else replaced).write_h5ad(path)
        return path

    return write


# What works


def test_embed(command, place, tiny_run, tiny_model, tmp_path):
    path, out = place(), tmp_path / "out.h5ad"
    status, printed, err = command("embed", path, "--model", tiny_run, "--out", out)
    assert status == 0
    assert printed == f"wrote {out}: obsm['X_cellplm'] by {tiny_model.id}\n"
    assert "embedded 8 cells: 40 of 43 genes (93 %) matched" in err
    assert "Read raw counts from X" in err
    assert "Gene names from var_names" in err
    wanted = cellplm_jax.embed(make_adata(8), tiny_model).obsm["X_cellplm"]
    np.testing.assert_allclose(ad.read_h5ad(out).obsm["X_cellplm"], wanted, atol=1e-6)


def test_embed_options(command, place, tiny_run, tiny_model, tmp_path):
    def change(adata):
        adata.layers["umi"] = adata.X.copy()
        adata.X = np.log1p(adata.X.toarray() / 3.3)
        adata.var["ids"] = adata.var_names
        adata.var_names = [f"row-{i}" for i in range(adata.n_vars)]
        adata.obsm["where"] = adata.obsm.pop("spatial")

    path, out = place(change), tmp_path / "out.h5ad"
    arguments = ["--batch-key", "batch", "--spatial-key", "where", "--layer", "umi", "--gene-key"]
    arguments += ["ids", "--cells-per-context", "3", "--key-added", "Z", "--minimum-genes", "40"]
    status, _, err = command(
        "embed", path, "--model", tiny_run, "--out", out, *arguments, "--quiet"
    )
    assert (status, err) == (0, "")
    written = ad.read_h5ad(out)
    wanted = make_adata(8)
    cellplm_jax.embed(wanted, tiny_model, batch_key="batch", cells_per_context=3)
    np.testing.assert_allclose(written.obsm["Z"], wanted.obsm["X_cellplm"], atol=1e-6)
    context = written.uns["cellplm"]["context"]
    assert (context["batch_key"], int(context["cells_per_context"])) == ("batch", 3)
    assert context["coordinates"] == "where"


def test_embed_declared_values(command, place, tiny_run, tiny_model, tmp_path):
    def change(adata):
        adata.X = np.log1p(adata.X.toarray())

    common = ["embed", place(change), "--model", tiny_run, "--out", tmp_path / "out.h5ad"]
    assert command(*common)[0] == 2
    assert command(*common, "--values", "log1p", "--quiet")[0] == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    wanted = cellplm_jax.embed(make_adata(8), tiny_model).obsm["X_cellplm"]
    np.testing.assert_allclose(written.obsm["X_cellplm"], wanted, atol=1e-4)
    assert written.uns["cellplm"]["input"]["values"] == "log1p"


def test_annotate(command, tiny_run, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra 'eval'")
    make_labelled(60).write_h5ad(tmp_path / "labelled.h5ad")
    make_labelled(20, seed=3).write_h5ad(tmp_path / "cells.h5ad")
    saved, out = tmp_path / "annotator", tmp_path / "out.h5ad"
    fit = ["annotate", "fit", tmp_path / "labelled.h5ad", "--model", tiny_run, "--out", saved]
    fit += ["--label-key", "kind", "--method", "neighbors", "--unknown-threshold", "0.4"]
    status, printed, err = command(*fit)
    assert (status, printed) == (0, f"wrote {saved}: 3 cell types, 60 training cells\n")
    assert "annotation: Gene names from var_names" in err
    predict = ["annotate", "predict", tmp_path / "cells.h5ad", "--model", saved, "--out", out]
    status, printed, err = command(*predict, "--cells-per-context", "7")
    assert (status, printed) == (0, f"wrote {out}: obs['cellplm_cell_type'], 3 cell types\n")
    assert "annotation: predicting: 20/20 cells" in err
    written = ad.read_h5ad(out)
    found = written.obs["cellplm_cell_type"].astype(str)
    assert (found == written.obs["kind"].astype(str)).mean() > 0.7
    facts = written.uns["cellplm_annotation"]
    assert (facts["unknown_threshold"], int(facts["context"]["cells_per_context"])) == (0.4, 7)
    assert command(*predict, "--quiet")[2] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "annotator", "cells.h5ad", "labelled.h5ad", "out.h5ad",
    ]  # fmt: skip


def test_annotate_refuses(command, place, tiny_run, tmp_path):
    path = place()
    fit = ["fit", path, "--model", tiny_run, "--out", tmp_path / "new", "--label-key", "type"]
    assert "obs has no column 'type'" in refused(
        command, tmp_path, *fit, "--quiet", name="annotate"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    fit[5] = tmp_path / "full"
    assert "not empty" in refused(command, tmp_path, *fit, name="annotate")
    predict = ["predict", path, "--model", tiny_run, "--out", tmp_path / "o.h5ad", "--quiet"]
    assert "has no estimator.json" in refused(command, tmp_path, *predict, name="annotate")
    assert command("annotate")[0] == 2
    assert command("annotate", "fit", path, "--model", tiny_run, "--out", "o")[0] == 2


def test_the_recipe_is_passed_on(command, monkeypatch, tmp_path):
    from cellplm_jax.tasks import annotate

    made = []
    kind = annotate.CellTypeAnnotator

    class Recorder:
        labels, facts = ("a", "b"), {"training_cells": 3, "best_epoch": 2, "epochs": 4,
                                     "seconds": 5.0}  # fmt: skip
        validation_scores = {"pooled": 0.5, "network": 0.25}  # noqa: RUF012
        __signature__ = inspect.signature(kind)

        def __init__(self, model, **options):
            made.append((model, options))

        def fit(self, path, **keys):
            made.append((path, keys))

        fit.__signature__ = inspect.signature(kind.fit)  # type: ignore[attr-defined]

        def save(self, out):
            made.append(out)

    monkeypatch.setattr(annotate, "CellTypeAnnotator", Recorder)
    arguments = ["--label-key", "k", "--split-key", "s", "--batch-key", "b", "--epochs", "9",
                 "--genes", "50", "--freeze", "encoder", "--adapter-rank", "2", "--balanced",
                 "--learning-rate", "0.1", "--seed", "3", "--precision", "bfloat16", "--quiet"]  # fmt: skip
    out = tmp_path / "new"
    status, printed, _ = command(
        "annotate", "fit", "x", "--model", "none", "--out", out, *arguments
    )
    assert status == 0
    wanted = (
        f"wrote {out}: 2 cell types, validation macro F1 pooled 0.500 (network 0.250), 3 training cells, "
        "epoch 2 of 4 kept, 5 s\n"
    )
    assert printed == wanted
    assert made[0] == (None, {
        "method": "finetune", "class_weights": "balanced", "quiet": True,
        "genes": 50, "epochs": 9, "learning_rate": 0.1, "freeze": "encoder", "adapter_rank": 2, "seed": 3,
        "precision": "bfloat16",
    })  # fmt: skip
    assert made[1] == (
        "x",
        {"label_key": "k", "transductive": False, "batch_key": "b", "split_key": "s"},
    )


def test_impute(command, tiny_run, tmp_path):
    whole = make_adata(24, seed=1)
    panel = whole[:, VOCABULARY[:20]].copy()
    panel.write_h5ad(tmp_path / "panel.h5ad")
    whole.write_h5ad(tmp_path / "reference.h5ad")
    (tmp_path / "genes").write_text("\n".join(VOCABULARY[20:24]) + "\n")
    saved, out = tmp_path / "imputer", tmp_path / "out.h5ad"
    fit = ["impute", "fit", tmp_path / "panel.h5ad", "--model", tiny_run, "--out", saved, "--quiet"]
    fit += ["--reference", tmp_path / "reference.h5ad", "--impute", tmp_path / "genes"]
    status, _, err = command(*fit, "--split-key", "part")
    assert (status, saved.exists()) == (2, False)
    assert "impute does not support --split-key; expected a random part" in err
    status, printed, err = command(*fit, "--epochs", "1")
    assert (status, err) == (0, "")
    assert printed.startswith(f"wrote {saved}: 4 genes from 20, mean confidence ")
    predict = ["impute", "predict", tmp_path / "panel.h5ad", "--model", saved, "--out", out]
    names = ",".join(VOCABULARY[21:23])
    status, printed, _ = command(*predict, "--impute", names, "--quiet")
    assert (status, printed) == (0, f"wrote {out}: obsm['cellplm_imputed'], 2 genes\n")
    assert list(ad.read_h5ad(out).obsm["cellplm_imputed"].columns) == VOCABULARY[21:23]
    out.unlink()
    status, _, err = command(*predict, "--impute", "nothing", "--quiet")
    assert (status, out.exists()) == (2, False)
    assert "1 of 1 requested genes are not imputed: 'nothing'" in err


def test_denoise(command, tiny_run, tmp_path):
    make_adata(24).write_h5ad(tmp_path / "cells.h5ad")
    saved, out = tmp_path / "denoiser", tmp_path / "out.h5ad"
    fit = [
        "denoise",
        "fit",
        tmp_path / "cells.h5ad",
        "--model",
        tiny_run,
        "--out",
        saved,
        "--quiet",
    ]
    status, _, err = command(*fit, "--values", "log1p")
    assert (status, saved.exists()) == (2, False)
    assert "--values log1p; expected raw counts" in err
    status, printed, err = command(*fit, "--epochs", "1")
    assert (status, err) == (0, "")
    assert printed.startswith(f"wrote {saved}: 40 genes, 22 training cells, epoch 1 of 1 kept")
    assert printed.splitlines()[-1].startswith("Log-likelihood of held-out counts")
    predict = ["denoise", "predict", tmp_path / "cells.h5ad", "--model", saved, "--out", out]
    status, printed, _ = command(*predict, "--log-normalized", "--quiet")
    wrote, scores = printed.splitlines()
    assert (status, wrote) == (0, f"wrote {out}: layers['cellplm_denoised']")
    assert scores.startswith("Log-likelihood of held-out counts")
    assert set(ad.read_h5ad(out).layers) == {"cellplm_denoised", "cellplm_denoised_log1p"}
    predict[4] = tiny_run
    assert "has no estimator.json" in command(*predict, "--quiet")[2]
    options = ["--zero-shot", "--own-counts", "--storage", "float16", "--quiet"]
    assert command(*predict, *options)[0] == 0
    written = ad.read_h5ad(out)
    assert written.uns["cellplm_denoising"]["zero_shot"]
    assert written.layers["cellplm_denoised"].dtype == "float16"


def test_perturb(command, tiny_run, tmp_path):
    adata = make_adata(48)
    adata.obs["target"] = [["none", *VOCABULARY[:3]][n % 4] for n in range(48)]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    saved, out = tmp_path / "predictor", tmp_path / "out.tsv"
    fit = ["perturb", "fit", tmp_path / "screen.h5ad", "--model", tiny_run, "--out", saved]
    fit += ["--perturbation-key", "target", "--quiet", "--control"]
    status, _, err = command(*fit, "nome")
    assert (status, saved.exists(), err.count("\n")) == (2, False, 1)
    assert err.endswith("Did you mean 'none'?\n")
    status, printed, err = command(*fit, "none", "--batch-key", "batch")
    assert (status, err) == (0, "")
    assert printed == f"wrote {saved}: 3 perturbations, 40 genes, 12 control cells\n"
    predict = ["perturb", "predict", "--model", saved, "--out", out]
    (tmp_path / "names").write_text(f"{VOCABULARY[0]}\n\n{VOCABULARY[7]}\n")
    combination = f"{VOCABULARY[0]}+{VOCABULARY[1]}"
    names = ["--perturbation", combination, "--perturbation", tmp_path / "names"]
    status, printed, err = command(*predict, *names)
    assert status == 0
    assert printed.startswith(f"wrote {out}: 3 perturbations (")
    assert {"1 seen", "1 unseen", "1 combination of seen"} <= set(
        printed.split("(")[1].split(")")[0].split(", ")
    )
    assert (
        "1 perturbation has a target not in the training data; the prediction is the mean change"
        in err
    )
    table = pd.read_csv(out, sep="\t")
    assert table["perturbation"].unique().tolist() == [combination, VOCABULARY[0], VOCABULARY[7]]
    wanted = cellplm_jax.PerturbationPredictor.load(saved).predict([VOCABULARY[7]])
    np.testing.assert_allclose(table["change"][80:], wanted.change.iloc[0], rtol=1e-4, atol=1e-6)
    controls = ["--controls", tmp_path / "screen.h5ad", "--batch-key", "batch", "--quiet"]
    status, printed, err = command(*predict, *controls)
    assert (status, err) == (0, "")
    assert printed == f"wrote {out}: 3 perturbations (3 seen), 40 genes each\n"


def test_perturb_refuses(command, tiny_run, tmp_path):
    predict = ["predict", "--model", tiny_run, "--quiet", "--out"]
    err = refused(command, tmp_path, *predict, tmp_path / "out.xlsx", name="perturb")
    assert "ends in .csv, .tsv" in err
    err = refused(command, tmp_path, *predict, tmp_path / "o.csv", "--layer", "L", name="perturb")
    assert "--layer requires --controls" in err
    err = refused(command, tmp_path, *predict, tmp_path / "o.csv", name="perturb")
    assert "has no estimator.json" in err
    assert command("perturb", "fit", "in.h5ad", "--model", "m", "--out", "o")[0] == 2
    assert command("perturb", "predict", "--out", "o.csv")[0] == 2


def test_samples(command, tiny_run, tmp_path):
    adata = make_labelled(48)
    order = np.argsort(adata.obs["kind"], kind="stable")[:40]
    adata = adata[order].copy()  # samples of like cells
    adata.obs["donor"] = [f"d{n // 10}" for n in range(40)]
    adata.obs["disease"] = ["no"] * 20 + ["yes"] * 20
    adata.write_h5ad(tmp_path / "cohort.h5ad")
    saved, out, rows = tmp_path / "classifier", tmp_path / "out.h5ad", tmp_path / "samples.csv"
    fit = ["samples", "fit", tmp_path / "cohort.h5ad", "--model", tiny_run, "--out", saved]
    fit += ["--label-key", "disease", "--quiet", "--sample-key"]
    status, _, err = command(*fit, "donr")
    assert (status, saved.exists(), err.count("\n")) == (2, False, 1)
    status, printed, err = command(*fit, "donor")
    assert (status, err) == (0, "")
    assert printed.startswith(f"wrote {saved}: 2 labels from 4 samples of 40 cells, cross-entropy")
    predict = ["samples", "predict", tmp_path / "cohort.h5ad", "--model", saved, "--out", out]
    status, printed, err = command(*predict, "--table", tmp_path / "samples.xls")
    assert (status, out.exists()) == (2, False)
    status, printed, err = command(*predict, "--table", rows)
    assert (status, printed) == (
        0,
        f"wrote {out}: obs['cellplm_sample_label'], 4 samples (2 no, 2 yes)\nwrote {rows}\n",
    )
    assert "samples: predicting: 40/40 cells" in err
    written, table = ad.read_h5ad(out), pd.read_csv(rows, index_col="sample")
    assert table["label"].tolist() == ["no", "no", "yes", "yes"]
    cells = table["label"][written.obs["donor"].astype(str)].tolist()
    assert written.obs["cellplm_sample_label"].tolist() == cells
    wanted = cellplm_jax.SampleClassifier.load(saved, quiet=True).predict(adata)
    np.testing.assert_allclose(table["confidence"], wanted["confidence"], rtol=1e-4)
    np.testing.assert_array_equal(
        written.obs["cellplm_contribution"], adata.obs["cellplm_contribution"]
    )
    assert adata.uns["cellplm_samples"]["labels"] == ["no", "yes"]


def test_cluster(command, tiny_run, tmp_path):
    pytest.importorskip("igraph", reason="needs the extra 'eval'")
    make_labelled(40).write_h5ad(tmp_path / "cells.h5ad")
    out, picture = tmp_path / "out.h5ad", tmp_path / "umap.png"
    run = ["cluster", tmp_path / "cells.h5ad", "--model", tiny_run, "--out", out, "--quiet"]
    status, _, err = command(*run, "--label-key", "absent")
    assert (status, out.exists()) == (2, False)
    assert "obs has no column 'absent'" in err
    run += ["--batch-key", "batch", "--label-key", "kind", "--picture", picture]
    status, printed, _ = command(*run)
    assert status == 0
    assert printed.startswith(f"wrote {out}: obs['cellplm_cluster'], ")
    assert all(name in printed for name in ("ari ", "knn_accuracy ", "ilisi ", "kbet "))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {"cellplm_cluster"} <= set(ad.read_h5ad(out).obs)
    status, _, err = command("cluster", tmp_path / "cells.h5ad", "--out", tmp_path / "no.h5ad")
    assert (status, (tmp_path / "no.h5ad").exists()) == (2, False)
    assert "no model was given" in err


def test_no_command_advises_an_option_that_it_lacks(command, tiny_run, tmp_path):
    adata = make_labelled(30)
    adata.X = np.log1p(adata.X.toarray()) + 0.25
    path = tmp_path / "logs.h5ad"
    adata.write_h5ad(path)
    fit = ["fit", path, "--model", tiny_run]
    for run in (
        ["prepare", path],
        ["denoise", *fit],
        ["integrate", *fit, "--batch-key", "batch"],
    ):
        status, _, err = command(*run, "--out", tmp_path / run[0], "--quiet")
        assert status == 2
        assert "(--layer) naming the matrix that holds raw counts." in err, err
        assert "--values" not in err


def test_cluster_has_the_options_that_its_messages_advise(command, tiny_run, tmp_path):
    pytest.importorskip("igraph", reason="needs the extra 'eval'")
    adata = make_labelled(40)
    adata.layers["mine"], adata.X = adata.X.copy(), np.log1p(adata.X.toarray()) + 0.25
    adata.write_h5ad(tmp_path / "logs.h5ad")
    out = tmp_path / "out.h5ad"
    run = ["cluster", tmp_path / "logs.h5ad", "--model", tiny_run, "--out", out, "--quiet"]
    run += ["--adapt", "none"]
    status, _, err = command(*run)
    assert status == 2
    advised = set(re.findall(r"\((--[a-z-]+)\)", err))
    assert advised == {"--layer", "--values"}
    help_text = command("cluster", "--help")[1]
    assert all(option in help_text for option in advised)
    assert command(*run, "--layer", "mine")[0] == 0
    embedded = tmp_path / "embedded.h5ad"
    command(
        "embed", tmp_path / "logs.h5ad", "--model", tiny_run, "--out", embedded, "--layer", "mine"
    )
    expected = ad.read_h5ad(embedded).obsm["X_cellplm"]
    np.testing.assert_array_equal(ad.read_h5ad(out).obsm["X_cellplm"], expected)


def test_integrate(command, tiny_run, tmp_path):
    make_adata(40).write_h5ad(tmp_path / "cells.h5ad")
    saved, out = tmp_path / "integrator", tmp_path / "out.h5ad"
    fit = ["integrate", "fit", tmp_path / "cells.h5ad", "--model", tiny_run, "--out", saved]
    fit.append("--quiet")
    assert "integrate fit requires --batch-key" in command(*fit)[2]
    fit += ["--batch-key", "batch", "--epochs", "1"]
    assert "integrate fit does not support --patience" in command(*fit, "--patience", "3")[2]
    assert not saved.exists()
    status, printed, err = command(*fit)
    assert (status, err) == (0, "")
    assert printed.startswith(f"wrote {saved}: 2 batches, 40 training cells")
    predict = ["integrate", "predict", tmp_path / "cells.h5ad", "--model", saved, "--out", out]
    status, printed, _ = command(*predict, "--quiet")
    assert (status, printed) == (0, f"wrote {out}: obsm['X_cellplm_integrated']\n")
    assert "X_cellplm_integrated" in ad.read_h5ad(out).obsm


def test_info(command, tiny_run, tiny_model):
    status, out, err = command("info", tiny_run)
    assert (status, err) == (0, "")
    assert tiny_model.id in out
    status, out, err = command("info", tiny_run, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["parameters"]["total"] == tiny_model.parameters


def test_version_and_help(command):
    status, out, _ = command("--version")
    assert (status, out) == (0, f"cellplm-jax {cellplm_jax.__version__}\n")
    assert set(cli_commands()) == {
        "demo", "plan", "prepare", "embed", "cluster", "niches", "integrate", "annotate", "impute",
        "denoise", "perturb", "samples", "convert", "export", "info", "doctor", "completion", "bench",
    }  # fmt: skip
    for name in cli_commands():
        status, out, _ = command(name, "--help")
        assert status == 0
        assert "example:" in out
    status, out, _ = command("embed", "--help")
    for option in ("--model", "--out", "--batch-key", "--spatial-key", "--layer", "--gene-key",
                   "--cells-per-context", "--key-added"):  # fmt: skip
        assert option in out


def cli_commands():
    actions = [action for action in build_parser()._actions if action.choices]
    return actions[0].choices


def test_the_demo_is_called_with_its_options(command, monkeypatch, tmp_path):
    from cellplm_jax import demo_from_scratch as demo

    row = {
        "ari": 0.5,
        "ari_coarse": 0.4,
        "nmi": 0.5,
        "knn_accuracy": 0.9,
        "nb_log_likelihood": -0.25,
    }
    table = {name: row for name in (demo.TRAINED, demo.UNTRAINED, demo.COMPONENTS)}
    called = []
    monkeypatch.setattr(demo, "run_from_scratch", lambda out, **o: called.append((out, o)) or table)
    out = tmp_path / "here"
    options = ("--steps", 3, "--max-cells", 9, "--seed", 4)
    status, printed, _ = command("demo", "--from-scratch", "--out", out, *options)
    assert status == 0
    (where, options) = called[0]
    assert str(where) == str(out)
    assert options == {"steps": 3, "max_cells": 9, "seed": 4, "quiet": False}
    for text in (demo.TRAINED, "ari", "-0.2500", f"{out / 'report.html'}", f"{out / 'model'}"):
        assert text in printed


# What does not


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["embed"],
        ["embed", "in.h5ad", "--model", "m"],
        ["embed", "in.h5ad", "--model", "m", "--out", "o", "--cells-per-context", "0"],
        ["embed", "in.h5ad", "--model", "m", "--out", "o", "--cells-per-context", "many"],
        ["embed", "in.h5ad", "--model", "m", "--out", "o", "--values", "guess"],
        ["demo", "--steps", "-1"],
        ["info"],
    ],
)
def test_bad_usage(command, arguments):
    status, out, err = command(*arguments)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    assert "error:" in err


def refused(command, tmp_path, *arguments, name="embed"):
    """Run; check that it is one clear message, and that the folder is as it was."""
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    status, out, err = command(name, *arguments, "--quiet") if name == "embed" else command(
        name, *arguments
    )  # fmt: skip
    assert status == 2, err
    assert out == ""
    assert err.startswith(f"cellplm {name}: ")
    assert err.count("\n") == 1
    assert err.endswith(".\n")
    assert "; expected " in err
    assert "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    return err


def spoil(value, where=(3, 5)):
    def change(adata):
        adata.X = adata.X.toarray()
        adata.X[where] = value

    return change


def log_normalise(adata):
    counts = adata.X.toarray()
    adata.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def halve(adata):
    adata.X = adata.X * np.float32(0.3)


def scale(adata):
    counts = adata.X.toarray()
    adata.X = (counts - counts.mean(axis=0)) / 3


def rename(adata):
    adata.var_names = [f"unknown-{i}" for i in range(adata.n_vars)]


def keep_few(adata):
    adata.var_names = [
        name if i < 12 else f"unknown-{i}" for i, name in enumerate(adata.var_names)
    ][: adata.n_vars]
    known = [name for name in adata.var_names if name.startswith("ENSG")][5:]
    adata.var_names = [f"x-{name}" if name in known else name for name in adata.var_names]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil(-4), ["negative", "cell3"]),
        (spoil(np.nan), ["NaN", "cell3"]),
        (spoil(np.inf), ["infinite", "cell3"]),
        (spoil(2.5), ["non-integer", "2.5", "cell3"]),
        (log_normalise, ["log1p-normalised", "--values", "--layer"]),
        (halve, ["no raw counts", "--values"]),
        (scale, ["no raw counts", "scaled"]),
        (rename, ["0 of the model's 40 genes", "unknown-", "--gene-key"]),
        (keep_few, ["of the model's 40 genes", "at least 10"]),
        (lambda adata: adata[:0].copy(), ["empty", "0 cells"]),
        (lambda adata: adata[:, :0].copy(), ["empty", "0 genes"]),
    ],
    ids=["negative", "nan", "infinite", "non-integer", "log-normalised", "fractions", "scaled",
         "no-known-genes", "few-known-genes", "no-cells", "no-genes"],
)  # fmt: skip
def test_bad_data(command, place, tiny_run, tmp_path, change, words):
    path = place(change)
    err = refused(command, tmp_path, path, "--model", tiny_run, "--out", tmp_path / "out.h5ad")
    for word in words:
        assert word in err


@pytest.mark.parametrize("where", [(0, 0), (699, 30)])
def test_damage_far_from_the_start(command, tiny_run, tmp_path, where):
    counts = make_counts(700).astype(float)
    counts[where] = -1
    path = tmp_path / "in.h5ad"
    make_adata(700, matrix=counts).write_h5ad(path)
    err = refused(command, tmp_path, path, "--model", tiny_run, "--out", tmp_path / "out.h5ad")
    assert f"'cell{where[0]}'" in err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--batch-key", ["donor", "'batch'"]),
        ("--layer", ["donor", "layer"]),
        ("--spatial-key", ["donor", "'spatial'"]),
        ("--gene-key", ["donor", "var"]),
    ],
)
def test_missing_keys(command, place, tiny_run, tmp_path, option, words):
    common = [place(), "--model", tiny_run, "--out", tmp_path / "out.h5ad"]
    err = refused(command, tmp_path, *common, option, "donor")
    for word in words:
        assert word in err


def test_coordinates_that_were_asked_for_by_the_default_name(command, place, tiny_run, tmp_path):
    def change(adata):
        del adata.obsm["spatial"]

    common = [place(change), "--model", tiny_run, "--out", tmp_path / "out.h5ad"]
    assert "'spatial'" in refused(command, tmp_path, *common, "--spatial-key", "spatial")
    assert command("embed", *common)[0] == 0


def test_batch_with_gaps(command, place, tiny_run, tmp_path):
    def change(adata):
        adata.obs["batch"] = ["a", None, *("b" * 6)]

    common = [place(change), "--model", tiny_run, "--out", tmp_path / "out.h5ad"]
    assert "cell1" in refused(command, tmp_path, *common, "--batch-key", "batch")


def test_other_files(command, tiny_run, tmp_path, place):
    common = ["--model", tiny_run, "--out", tmp_path / "out.h5ad"]
    text = tmp_path / "text.h5ad"
    text.write_text("cells,genes\n")
    assert "text.h5ad" in refused(command, tmp_path, text, *common)
    assert "absent.h5ad" in refused(command, tmp_path, tmp_path / "absent.h5ad", *common)
    assert "of another kind than the input" in refused(command, tmp_path, tmp_path, *common)
    import h5py

    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.zeros(3)
    assert "obs" in refused(command, tmp_path, tmp_path / "other.h5ad", *common)
    whole = place().read_bytes()
    for share in (0.3, 0.7, 0.95):
        (tmp_path / "cut.h5ad").write_bytes(whole[: int(len(whole) * share)])
        assert "cut.h5ad" in refused(command, tmp_path, tmp_path / "cut.h5ad", *common)


def test_output_places(command, place, tiny_run, tmp_path):
    path = place()
    common = [path, "--model", tiny_run, "--out"]
    assert "mkdir" in refused(command, tmp_path, *common, tmp_path / "no" / "out.h5ad")
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(command, tmp_path, *common, tmp_path / "folder")
    assert "input and output" in refused(command, tmp_path, *common, path)
    out = tmp_path / "out.h5ad"
    assert "key_added" in refused(command, tmp_path, *common, out, "--key-added", "a/b")
    assert "key_added" in refused(command, tmp_path, *common, out, "--key-added", "")


def test_output_is_checked_before_the_model_is_read(command, tmp_path):
    err = refused(
        command, tmp_path, "in.h5ad", "--model", "absent", "--out", tmp_path / "no" / "out.h5ad"
    )
    assert "mkdir" in err


def damage_config(run):
    content = json.loads((run / "config.json").read_text())
    content["model"]["latent"]["size"] = 12
    (run / "config.json").write_text(json.dumps(content))


def damage_steps(run):
    for path in run.glob("[0-9]*/params/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_files(run):
    for path in run.glob("[0-9]*/params/manifest.ocdbt"):
        path.unlink()


def damage_scores(run):
    for path in run.glob("[0-9]*/metrics/metrics"):
        path.write_text("{")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_config, "config.json"),
        (damage_steps, "cannot be read"),
        (lose_files, "cannot be read"),
        (damage_scores, "cannot be read"),
        (lambda run: (run / "genes.txt").unlink(), "genes.txt"),
        (lambda run: shutil.rmtree(run), "no directory"),
        (lambda run: [shutil.rmtree(path) for path in run.glob("[0-9]*")], "no complete"),
    ],
    ids=["config", "cut", "lost", "scores", "genes", "gone", "no-steps"],
)
@pytest.mark.parametrize("name", ["embed", "info"])
def test_damaged_models(command, place, run_copy, tmp_path, damage, word, name):
    damage(run_copy)
    if name == "info":
        assert word in refused(command, tmp_path, run_copy, name="info")
        return
    common = [place(), "--model", run_copy, "--out", tmp_path / "out.h5ad"]
    assert word in refused(command, tmp_path, *common)


@pytest.mark.parametrize("damage", [lose_files, damage_steps])
def test_a_damaged_model_is_one_line_in_a_process_of_its_own(run_copy, damage):
    """Also after the message: threads of abandoned reads and the interpreter's end must stay silent."""
    damage(run_copy)
    result = subprocess.run(
        [sys.executable, "-m", "cellplm_jax.cli", "info", str(run_copy)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("cellplm info: ")
    assert result.stderr.count("\n") == 1, result.stderr


def test_interruption_and_defects(command, monkeypatch, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("cellplm_jax.tasks.info.describe", interrupt)
    status, out, err = command("info", tmp_path)
    assert (status, out, err) == (130, "", "cellplm info: interrupted\n")

    def fail(*arguments):
        raise RuntimeError("a defect")

    # A defect is not dressed up as bad input.
    monkeypatch.setattr("cellplm_jax.tasks.info.describe", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info", str(tmp_path)])


def test_interrupted_embedding_leaves_nothing(command, place, tiny_run, tmp_path, monkeypatch):
    path = place()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("anndata.io.write_elem", interrupt)
    status, _, err = command(
        "embed", path, "--model", tiny_run, "--out", tmp_path / "out.h5ad", "--quiet"
    )
    assert (status, err) == (130, "cellplm embed: interrupted\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.h5ad"]


def test_module_runs_as_a_program():
    assert cli.__name__ == "cellplm_jax.cli"
    text = (ROOT / "setup.py").read_text()
    assert "cellplm=cellplm_jax.cli:main" in text
