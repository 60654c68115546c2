"""The tables of the ablations say what the rows of results say."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "benchmarks" / "ablations"
_spec = importlib.util.spec_from_file_location("ablation_tables", FOLDER / "tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


def row(part, name, seed, scores, **settings):
    facts = {"training_cells": 900, "heldout_cells": 90}
    return {
        "part": part, "name": name, "seed": seed, "settings": settings, "scores": scores, "facts": facts,
        "seconds": 10.0, "date": "2026-11-25", "machine": "2 cores", "versions": {"jax": "1"},
    }  # fmt: skip


def made_up():
    run = {"steps": 5, "cells": 8}
    rows = [
        row("pretraining", "small", seed, {"knn_accuracy": 0.5 + 0.1 * seed}, **run)
        for seed in range(2)
    ]
    rows += [
        row("pretraining", "no_masks", seed, {"knn_accuracy": 0.4 + 0.2 * seed}, **run)
        for seed in range(2)
    ]
    rows.append(
        row(
            "scaling",
            "25 0.5",
            0,
            {"ari": 0.25, "nmi": 0.5, "knn_accuracy": 0.75, "carried_labels": 1.0},
        )
    )
    rows.append(
        row("contexts", "pbmc3k 1", 0, {"knn_accuracy": 0.125}, model="small", scored_cells=4)
    )
    return rows


def test_means_deviations_and_differences_seed_by_seed(tmp_path):
    pytest.importorskip("matplotlib")
    tables.write_tables(made_up(), tmp_path / "found")
    text = (tmp_path / "found.md").read_text()
    assert "| full recipe (`:small`) | 0.550 ± 0.071 | 0, 1 |" in text
    assert "| without masks | 0.500 ± 0.141 | 0, 1 |" in text
    assert "| without masks | -0.050 ± 0.071 |" in text
    assert "| 50% | 900 | 25 | 0.250 | 0.500 | 0.750 | 1.000 |" in text
    assert "| 1 | 0.125 |" in text
    # A seed that one variant lacks is left out of the comparison.
    tables.write_tables(
        [r for r in made_up() if (r["name"], r["seed"]) != ("small", 1)], tmp_path / "found"
    )
    text = (tmp_path / "found.md").read_text()
    assert "| full recipe (`:small`) | 0.500 | 0 |" in text
    assert "| without masks | 0.400 | 0, 1 |" in text
    assert (tmp_path / "found.png").stat().st_size > 1000


def test_the_committed_table_is_made_from_the_committed_rows(tmp_path, monkeypatch):
    rows = json.loads((FOLDER / "ablations.json").read_text())
    monkeypatch.setattr(tables, "draw", lambda rows, path: True)
    tables.write_tables(rows, tmp_path / "ablations")
    assert (tmp_path / "ablations.md").read_text() == (FOLDER / "ablations.md").read_text()
