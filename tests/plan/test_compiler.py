"""Counting products, reading the compiler's refusals, and the real step compiled for a slice that is not there."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import jax
import jax.numpy as jnp
import pytest

from cellplm_jax import cli
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.plan import compiler, search
from cellplm_jax.plan.chips import parse_topology

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'cellplm-jax[tpu]'",
)
# The parts of the step that take the compiler longest, switched off.
PLAIN = [
    "model.dropout=0.0",
    "model.encoder.kind=none",
    "model.latent.kind=deterministic",
    "model.positions.kind=none",
    "masking.cell_fraction=0.0",
    "masking.drop_cells=0.0",
    "data.segments=1",
]


def plain(*settings: str) -> list[str]:
    return [part for setting in (*PLAIN, *settings) for part in ("--set", setting)]


def test_products_are_counted_through_loops_and_derivatives():
    def loss(weights, x):
        def layer(hidden, weight):
            return jnp.tanh(hidden @ weight), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    weights, x = jnp.ones((5, 8, 8)), jnp.ones((4, 8))
    once = 2 * 4 * 8 * 8
    assert compiler.product_flops(jax.make_jaxpr(loss)(weights, x)) == 5 * once
    # Backwards: the gradients of input and weight, a product each.
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert compiler.product_flops(jax.make_jaxpr(gradient)(weights, x)) == 3 * 5 * once
    again = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
    assert compiler.product_flops(jax.make_jaxpr(again)(weights, x)) == 4 * 5 * once


def test_the_costliest_branch_counts():
    def choose(flag, x):
        return jax.lax.cond(flag, lambda v: v @ v @ v, lambda v: v @ v, x)

    jaxpr = jax.make_jaxpr(choose)(True, jnp.ones((4, 4)))
    assert compiler.product_flops(jaxpr) == 2 * 2 * 4**3


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
            "HLO temporaries (57.10G) exceeds available HBM (15.75G). HLO module: jit_with_axes.",
            57.10,
            15.75,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.45G of 15.48G hbm. "
            "Exceeded hbm capacity by 7.97G.",
            23.45,
            15.48,
        ),
    ],
)
def test_refusals_for_want_of_memory_are_read(message, needed, available):
    found = compiler.parse_shortage(message)
    assert found == pytest.approx((needed * 2**30, available * 2**30))


def test_other_refusals_are_not_about_memory():
    assert compiler.parse_shortage("INVALID_ARGUMENT: something else") is None


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    find = importlib.import_module

    def without(name, *rest):
        if name == "libtpu":
            raise ModuleNotFoundError(name, name=name)
        return find(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cellplm-jax\[tpu\]'"):
        compiler.require_compiler()


@needs_compiler
def test_a_compiler_that_dies_is_reported(monkeypatch):
    def died(command, **_):
        return subprocess.CompletedProcess(command, -9, "", "noise\nkilled\n")

    monkeypatch.setattr(subprocess, "run", died)
    config = search.complete(search.load_config("debug"))
    with pytest.raises(InputError, match=r"ended with status -9 \(noise \| killed\)"):
        compiler.compile_apart(config, parse_topology("v5e:2x2"), 100)


@needs_compiler
def test_a_compiler_that_takes_too_long_is_stopped(monkeypatch):
    def slow(command, *, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    config = search.complete(search.load_config("debug"))
    with pytest.raises(InputError, match=r"not finished after 7 s.*--timeout"):
        compiler.compile_apart(config, parse_topology("v5e:2x2"), 100, timeout=7)


@needs_compiler
def test_the_real_step_compiles_for_a_slice_that_is_not_there(capsys):
    arguments = ["plan", "--config", "configs/pretrain.py:debug", "--topology", "v5e:2x2"]
    sizes = ["--mesh", "data=4", "--genes", "512", "--nonzeros-per-cell", "100"]
    sizes += ["--batches", "20", "--datasets", "5", "--json", "--quiet"]
    assert cli.main([*arguments, *plain(), *sizes]) == 0
    report = json.loads(capsys.readouterr().out)
    [entry] = report["tried"]
    assert (report["devices"], report["best"], entry["rows"]) == (4, 0, 4)
    assert entry["mesh"] == {"data": 4, "cells": 1, "genes": 1}
    memory = entry["memory"]
    parts = ("arguments", "outputs", "temporaries", "code")
    assert memory["total"] == sum(memory[part] for part in parts) - memory["aliased"]
    # Parameters and both moments, in float32, are the bulk of the arguments, and are updated in place.
    assert memory["arguments"] >= memory["aliased"] >= 3 * 4 * entry["parameters"]
    # Data-parallel: each device does its quarter of the products. The compiler makes products of some sums, and sums
    # of the smallest products.
    quarter = entry["step_product_flops"] / 4
    assert 0.95 * quarter <= entry["device"]["flops"] <= 1.5 * quarter
    kinds = {part["kind"] for part in entry["device"]["collectives"]}
    assert kinds == {"all-reduce"}
    # Every gradient is summed over the devices once.
    payload = sum(part["payload"] for part in entry["device"]["collectives"])
    assert payload == pytest.approx(4 * entry["parameters"], rel=0.05)
    # Stored counts are scattered to dense rows, and their positions looked up.
    assert entry["device"]["elements"] >= 128 * 100
    assert 0 < entry["seconds"]["floor"] <= entry["seconds"]["serial"]


@needs_compiler
def test_what_does_not_fit_ends_with_status_3_and_says_by_how_much(capsys):
    arguments = ["plan", "--config", "debug", "--topology", "v5e:1x1", "--quiet"]
    settings = plain("data.cells=262144", "data.rows=1", "masking.maximum_cells=0")
    assert cli.main([*arguments, *settings, "--nonzeros-per-cell", "1", "--batches", "20"]) == 3
    captured = capsys.readouterr()
    assert "too much" in captured.out
    assert "it does not fit: data=1 needs" in captured.err
    assert "of 15.75 GiB" in captured.err


def test_a_program_that_jax_cannot_read_comes_from_the_compilers_files(tmp_path):
    class Unreadable:
        def as_text(self):
            raise RuntimeError("async-update instruction should have 1 operands")

    with pytest.raises(InputError, match=r"async-update.*pip install 'cellplm-jax\[tpu\]'"):
        compiler._text(Unreadable(), tmp_path)
    (tmp_path / "module_0001.jit_step.after_codegen.txt").write_text("HloModule jit_step")
    (tmp_path / "module_0000.jit_f.after_codegen.txt").write_text("HloModule f")
    (tmp_path / "module_0001.jit_step.before_optimizations.txt").write_text(
        "HloModule longer, longer"
    )
    assert compiler._text(Unreadable(), tmp_path) == "HloModule jit_step"
