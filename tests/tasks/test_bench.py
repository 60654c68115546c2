"""Measurements: the figures are of what was asked for, and the command prints them as JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cellplm_jax.cli import main
from cellplm_jax.errors import InputError
from cellplm_jax.presets import preset
from cellplm_jax.tasks.bench import bench_embedding, bench_loading, bench_training, made_up_counts
from cellplm_jax.train.metrics import embedding_flops
from tests.conftest import make_adata


def consistent(facts, cells, repeats):
    assert facts["cells"] == cells
    assert len(facts["seconds"]) == repeats
    assert min(facts["seconds"]) <= facts["median_seconds"] <= max(facts["seconds"])
    rate = cells / facts["median_seconds"]
    assert facts["cells_per_second"] == pytest.approx(rate, rel=0.02, abs=0.2)


def test_made_up_counts_are_sparse_and_skewed():
    counts = made_up_counts(200, 500, 50)
    assert counts.shape == (200, 500)
    assert counts.nnz / 200 == pytest.approx(50, rel=0.1)
    assert counts.data.min() >= 1
    assert np.array_equal(counts.data, np.round(counts.data))
    found = np.sort(counts.getnnz(axis=0))
    assert found[-50:].mean() > 4 * found[:250].mean()
    assert (made_up_counts(200, 500, 50) != counts).nnz == 0


def test_embedding_and_loading(tiny_model, tmp_path, capsys):
    narrow = dataclasses.replace(tiny_model, precision="bfloat16")
    facts = bench_embedding(narrow, cells=20, nonzeros=10, repeats=2)
    consistent(facts, 20, 2)
    assert facts["precision"] == "bfloat16"
    stored = facts["nonzeros_per_cell"] * 20
    assert facts["model_flops"] == pytest.approx(
        embedding_flops(tiny_model.config, 20, stored), rel=0.01
    )
    adata = make_adata(30)
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    consistent(bench_embedding(tiny_model, data=path, cells=25, repeats=1), 25, 1)
    facts = bench_loading(path, tiny_model.genes, repeats=2)
    consistent(facts, 30, 2)
    assert facts["nonzeros"] == adata[:, [g in tiny_model.genes for g in adata.var_names]].X.nnz
    assert main(["bench", "load", str(path), "--repeats", "1"]) == 2  # genes no human model knows
    assert "genes" in capsys.readouterr().err


def test_training(capsys):
    command = "bench train --config debug --cells 16 --rows 1 --genes 40 --nonzeros 10 --repeats 2"
    assert main(command.split()) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    consistent(facts, 16, 2)
    assert "cells/s" in captured.err
    assert facts["model_flops"] > 0
    config = preset("debug", 40)
    mesh = dataclasses.replace(config.mesh, cells=2)
    with pytest.raises(InputError, match=r"mesh\.cells"):
        bench_training(dataclasses.replace(config, mesh=mesh), genes=40, nonzeros=10)
