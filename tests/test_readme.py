"""What the README shows is run: its Python blocks as they stand, and the targets and programs it names exist."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.conftest import ROOT, VOCABULARY, make_adata, make_labelled

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_as_written(tiny_run, tmp_path, monkeypatch):
    pytest.importorskip("igraph", reason="needs the extra 'eval'")
    embed, cluster, annotate, impute, perturb = blocks("python")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model").symlink_to(tiny_run)
    make_adata(30).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(embed, "README.md", "exec"), names)
    assert names["adata"].obsm["X_cellplm"].shape == (30, names["model"].config.latent_size)
    assert names["adata"].uns["cellplm"]["input"]["genes"]["genes_matched"] == 40

    several = make_labelled(40)
    several.obs["cell_type"] = several.obs["kind"]
    several.write_h5ad(tmp_path / "several.h5ad")
    integrator = names["cellplm"].BatchIntegrator
    monkeypatch.setattr(integrator, "recipe", dataclasses.replace(integrator.recipe, epochs=1))
    exec(compile(cluster, "README.md", "exec"), names)
    assert "cellplm_cluster" in names["adata"].obs
    assert "X_cellplm_integrated" in names["several"].obsm

    labelled = make_labelled(60)
    labelled.obs["cell_type"] = labelled.obs["kind"]
    labelled.write_h5ad(tmp_path / "labelled.h5ad")
    annotator = names["cellplm"].CellTypeAnnotator
    monkeypatch.setattr(annotator, "recipe", dataclasses.replace(annotator.recipe, epochs=1))
    exec(compile(annotate, "README.md", "exec"), names)
    assert annotator.load(tmp_path / "annotator").labels == ["alpha", "beta", "gamma"]
    assert "cellplm_probabilities" in names["adata"].obsm

    make_adata(30)[:, VOCABULARY[:20]].copy().write_h5ad(tmp_path / "spatial.h5ad")
    make_adata(30, spatial=False).write_h5ad(tmp_path / "reference.h5ad")
    for estimator in (names["cellplm"].GeneImputer, names["cellplm"].Denoiser):
        monkeypatch.setattr(estimator, "recipe", dataclasses.replace(estimator.recipe, epochs=1))
    exec(compile(impute, "README.md", "exec"), names)
    assert len(names["imputer"].confidence) == 20
    assert "cellplm_denoised_log1p" in names["adata"].layers

    # The names in the README are those of human genes; the tiny model's are numbered.
    screen = make_adata(48, spatial=False)
    targets = dict(zip(("STAT1", "IRF1", "TP53"), VOCABULARY[:3], strict=True))
    screen.obs["perturbation"] = [["control", *VOCABULARY[:2]][n % 3] for n in range(48)]
    screen.write_h5ad(tmp_path / "screen.h5ad")
    names["adata"].obs["donor"] = [f"d{n % 6}" for n in range(30)]
    names["adata"].obs["disease"] = [["no", "yes"][n % 2] for n in range(30)]
    for symbol, gene in targets.items():
        perturb = perturb.replace(symbol, gene)
    exec(compile(perturb, "README.md", "exec"), names)
    assert names["found"].known.tolist() == ["seen", "combination of seen", "unseen"]
    assert "cellplm_contribution" in names["adata"].obs
    assert names["weights"].shape == (3, 30)
    assert names["genes"].shape[0] == 40


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_cellplm_commands_parse():
    from cellplm_jax.cli import build_parser

    commands = re.findall(r"(?:^|`)cellplm ([a-z][^`#\n]*)", "\n".join([README]), re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = command.split()
        if len(words) > 1:
            build_parser().parse_args(words)


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
