"""Configurations, meshes and the report, with a compiler that answers at once."""

from __future__ import annotations

import json
import math

import pytest

from cellplm_jax import cli
from cellplm_jax.config import MeshConfig, to_dict
from cellplm_jax.errors import ConfigError, InputError
from cellplm_jax.plan import compiler, search
from cellplm_jax.plan.chips import parse_topology
from cellplm_jax.plan.hlo import Collective, Cost
from cellplm_jax.plan.roofline import estimate
from cellplm_jax.presets import preset


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The tests of this file need no compiler."""
    monkeypatch.setattr(search, "require_compiler", lambda topology: None)


def answer(config, topology, nonzeros, *, timeout=None, available=None):
    """Answer as the compiler would, with memory in proportion to the cells of a device."""
    cells = config.data.rows / config.mesh.data * config.data.cells / config.mesh.cells
    total = cells * config.model.genes / config.mesh.genes * 40
    cost = Cost(
        flops=cells * 1e6,
        passes_flops=cells * 1e6,
        memory_bytes=total,
        elements=nonzeros,
        cycles=cells * 1e4,
        collectives=[Collective("all-reduce", topology.devices, 2, 1000, 2000.0)],
    )
    times = estimate(cost, topology)
    available = topology.chip.memory if available is None else available
    fits = total <= available
    memory = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code"), total / 3)
    return {
        "parameters": 1000,
        "step_product_flops": 1e9,
        "trace_seconds": 1.0,
        "compile_seconds": 2.0,
        "compile_processor_seconds": 3.0,
        "fits": fits,
        "shortage": max(0.0, total - available),
        "memory": {**memory, "total": total, "available": available},
        "device": {**vars(cost), "collectives": [vars(part) for part in cost.collectives]},
        "compiler": {"flops": 1e9, "bytes_accessed": 1.0, "optimal_seconds": -1.0},
        "seconds": {
            **{name: getattr(times, name) for name in ("products", "memory", "interconnect")},
            "elements": times.elements,
            "schedule": times.schedule,
            "floor": times.floor,
            "serial": times.serial,
        },
        "binds": times.binds,
    }


def complete(name="85m", **sizes):
    return search.complete(preset(name), **sizes)


def test_configurations_from_files_and_presets(tmp_path):
    assert search.load_config("configs/pretrain.py:debug") == preset("debug")
    assert search.load_config("configs/pretrain.py") == preset("small")
    assert search.load_config("85m") == search.load_config(":85m") == preset("85m")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(preset("debug"))))
    assert search.load_config(str(path)) == preset("debug")
    path.write_text(json.dumps({"train": to_dict(preset("debug")), "genes": 3}))
    assert search.load_config(str(path)) == preset("debug")


def test_bad_configurations_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file 'nowhere\.py'"):
        search.load_config("nowhere.py:small")
    with pytest.raises(ConfigError, match="no configuration '85n'"):
        search.load_config("85n")
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        search.load_config(str(path))
    path.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no get_config"):
        search.load_config(str(path))
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        search.load_config(str(path))


def test_values_are_changed_by_name():
    changed = search.change(
        preset("debug"), ["data.rows=64", "precision=bfloat16", "rematerialize=True"]
    )
    assert changed.data.rows == 64
    assert (changed.precision, changed.rematerialize) == ("bfloat16", True)
    with pytest.raises(ConfigError, match=r"unknown key 'row' in data.*Did you mean 'rows'\?"):
        search.change(preset("debug"), ["data.row=64"])
    with pytest.raises(ConfigError, match=r"name=value"):
        search.change(preset("debug"), ["data.rows"])
    with pytest.raises(ConfigError, match=r"'steps' is a value"):
        search.change(preset("debug"), ["steps.more=1"])


def test_sizes_come_from_the_data_or_from_the_published_model():
    config = search.complete(preset("85m"))
    assert (config.model.genes, config.model.decoder.batches) == (19_374, 12_596)
    config = search.complete(preset("85m"), genes=100, batches=7, datasets=3)
    assert (config.model.genes, config.model.decoder.batches, config.model.decoder.datasets) == (
        100,
        7,
        3,
    )
    assert search.complete(config) == config


def test_meshes_are_read():
    assert search.parse_mesh("data=64,cells=4", 256) == MeshConfig(data=64, cells=4)
    assert search.parse_mesh("genes=2", 256) == MeshConfig(data=128, genes=2)
    assert search.mesh_text(MeshConfig(data=64, cells=4)) == "data=64,cells=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=100", r"data=100 makes 100 x 1 x 1 = 100 devices; expected the 256"),
        ("gene=2", r"axis 'gene'.*Did you mean 'genes'\?"),
        ("data=0", "each axis once"),
        ("data=2,data=128", "each axis once"),
        ("genes=3", r"3 = 255 devices"),
    ],
)
def test_impossible_meshes_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        search.parse_mesh(text, 256)


def test_rows_follow_the_mesh():
    config = complete()
    assert search.with_mesh(config, MeshConfig(data=256), None).data.rows == 256
    assert search.with_mesh(config, MeshConfig(data=3), None).data.rows == 9
    assert search.with_mesh(config, MeshConfig(data=4, cells=64), None).data.rows == 8
    with pytest.raises(ConfigError, match=r"rows = 8 with mesh\.data = 256"):
        search.with_mesh(config, MeshConfig(data=256), 8)


def test_candidates_split_everything_evenly():
    config, place = complete(), parse_topology("v5e:16x16")
    found = search.candidates(config, place, 1500)
    assert found[0].config.mesh == MeshConfig(data=256)
    meshes = {entry.config.mesh for entry in found}
    assert len(meshes) == len(found) > 5
    for entry in found:
        mesh, data = entry.config.mesh, entry.config.data
        assert mesh.data * mesh.cells * mesh.genes == 256
        assert data.rows % mesh.data == data.cells % mesh.cells == 0
        assert config.model.genes % mesh.genes == 0
        assert data.cells // mesh.cells >= search.FEWEST_CELLS
    for entry in search.candidates(config, place, 1500, rows=8):
        assert 8 % entry.config.mesh.data == 0
        assert entry.config.data.rows == 8


def test_a_row_too_large_for_a_device_is_split_first():
    config = search.change(complete(), ["data.cells=1048576", "masking.maximum_cells=0"])
    found = search.candidates(config, parse_topology("v5e:16x16"), 1500)
    assert found[0].config.mesh.cells > 1


def test_the_best_of_those_tried_is_marked():
    said: list[str] = []
    report = search.plan(complete(), "v5e-16", compile_with=answer, say=said.append)
    assert (report["topology"], report["accelerator"], report["devices"]) == (
        "v5e:4x4",
        "v5e-16",
        16,
    )
    assert len(report["tried"]) == 3
    rates = [entry["cells_per_second"]["serial"] for entry in report["tried"]]
    assert report["best"] == rates.index(max(rates))
    assert len(said) == 6
    assert "compiling" in said[0]
    json.dumps(report)
    text = search.plan_text(report)
    assert text.count("<- best") == 1
    assert "nothing was run on a TPU" in text
    assert "binds" in text
    assert "set data.rows" in text  # 16 rows where the configuration has 8


def test_nothing_that_fits_says_by_how_much():
    def refuse(*arguments, **options):
        return answer(*arguments, **options, available=1e6)

    report = search.plan(complete(), "v5e:2x2", compile_with=refuse)
    assert report["best"] is None
    # One more than usual: the mesh that should need the least.
    assert len(report["tried"]) == 4
    least = min(entry["shortage"] for entry in report["tried"])
    assert f"{least / 2**30:.2f} GiB too much" in report["reason"]
    assert report["reason"].startswith("none of 4 meshes fits: ")
    assert report["reason"] in search.plan_text(report)


def test_a_given_mesh_is_the_only_one_tried():
    report = search.plan(complete(), "v5e:4x4", mesh="data=8,cells=2", rows=16, compile_with=answer)
    [entry] = report["tried"]
    assert entry["mesh"] == {"data": 8, "cells": 2, "genes": 1}
    assert entry["rows"] == 16
    assert entry["nonzeros"] == math.ceil(2048 / 2 * 1500)
    assert entry["cells_per_step"] == 16 * 2048


def test_no_mesh_at_all():
    config = search.change(complete(), ["data.cells=127"])
    with pytest.raises(ConfigError, match="no mesh of 16 devices splits 7 rows of 127 cells"):
        search.plan(config, "v5e-16", rows=7, compile_with=answer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:5x5"], "impossible shape"),
        (["--topology", "v77:2x2"], "is not known"),
        (["--topology", "v5e:2x2", "--mesh", "data=3"], "= 3 devices; expected the 4"),
        (["--topology", "v5e:2x2", "--set", "modle.hidden=3"], "Did you mean 'model'?"),
    ],
)
def test_bad_usage_ends_with_status_2(arguments, message, capsys):
    assert cli.main(["plan", "--config", "debug", "--quiet", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_prints_a_report(monkeypatch, capsys):
    original = search.plan

    def quickly(*arguments, **options):
        return original(*arguments, **options, compile_with=answer)

    monkeypatch.setattr(search, "plan", quickly)
    assert cli.main(["plan", "--config", "debug", "--topology", "v5e:2x2", "--tries", "1"]) == 0
    captured = capsys.readouterr()
    assert "mesh data=4 <- best" in captured.out
    assert captured.err.startswith("plan: 1/1 data=4")


def test_sizes_of_the_report_are_readable():
    assert search._amount(2.349e9, "B") == "2.35 GB"
    assert search._amount(12, "B") == "12 B"
    assert compiler.in_gibibytes(2**30 * 1.5) == "1.50 GiB"
