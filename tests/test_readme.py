"""What the README shows is run: its Python block as it stands, and the targets and programs it names exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT, make_adata

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_block_runs_as_written(tiny_run, tmp_path, monkeypatch):
    (block,) = blocks("python")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model").symlink_to(tiny_run)
    make_adata(30).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["adata"].obsm["X_cellplm"].shape == (30, names["model"].config.latent_size)
    assert names["adata"].uns["cellplm"]["input"]["genes"]["genes_matched"] == 40


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
