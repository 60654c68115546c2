"""Every program lowers for CUDA and TPU on a machine that has neither, and no branch of the CPU is left in it.

The package chooses between forms of a computation with ``jax.lax.platform_dependent``. Here every such choice is
marked: each branch becomes a function of the lowered program whose name says for which platform and where it is
written.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import sparse

import cellplm_jax
from cellplm_jax.data.batches import Sample, pad_batch
from cellplm_jax.plan.search import change, complete, load_config
from cellplm_jax.tasks import export
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train import step as step_module
from cellplm_jax.train.sharding import make_mesh
from tests.conftest import VOCABULARY, make_counts
from tests.model.common import tiny

ACCELERATORS = ("cuda", "tpu")
# What a program may call outside of XLA: annotations of shardings, and sorts and random bits that XLA itself expands.
SYMBOLIC_CALLS = {"shape_assertion", "stablehlo.dynamic_reduce_window"}
CUSTOM_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "mhlo.topk", "mhlo.erf"}


def functions_with_branches() -> set[str]:
    """Return the functions of the package that choose by platform."""
    found = set()
    for path in Path(cellplm_jax.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and any(
                isinstance(call, ast.Call) and ast.unparse(call.func).endswith("platform_dependent")
                for call in ast.walk(function)
            ):
                found.add(function.name)
    return found


@pytest.fixture(scope="module", autouse=True)
def marked():
    """Mark every branch, and trace everything again."""
    original = jax.lax.platform_dependent
    patch = pytest.MonkeyPatch()

    def marking(*arguments, default=None, **branches):
        site = sys._getframe(1).f_code.co_name

        def named(branch, platform):
            def run(*values):
                return branch(*values)

            run.__name__ = f"for_{platform}_in_{site}"
            return jax.jit(run, inline=False)

        chosen = {name: named(branch, name) for name, branch in branches.items()}
        return original(*arguments, default=named(default, "default"), **chosen)

    patch.setattr(jax.lax, "platform_dependent", marking)
    step_module.compile_training_step.cache_clear()
    step_module.compile_evaluation_step.cache_clear()
    jax.clear_caches()
    yield
    patch.undo()
    step_module.compile_training_step.cache_clear()
    step_module.compile_evaluation_step.cache_clear()
    jax.clear_caches()


def branches_in(text: str) -> set[tuple[str, str]]:
    """Return (platform, function) of the marked branches of a lowered program."""
    return set(re.findall(r"func\.func private @for_([a-z]+)_in_(\w+?)(?:_\d+)?\(", text))


def custom_calls(text: str) -> set[str]:
    return set(re.findall(r"stablehlo\.custom_call @([\w.$]+)", text))


def check(traced, platform: str) -> set[str]:
    """Lower a traced program; return the functions whose branches are in it."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = branches_in(text)
    assert {written for written, _ in found} <= {"default"}
    assert custom_calls(text) <= CUSTOM_CALLS
    assert "callback" not in text
    return {where for _, where in found}


def trained(*settings: str):
    """Return the traced training step of a small run."""
    config = complete(
        change(load_config("debug"), ["model.dropout=0.1", *settings]), genes=83, batches=6
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = step_module.abstract_state(config, mesh)
    batch = step_module.abstract_batch(config, mesh, 900)
    return step_module.compile_training_step(config, mesh).trace(state, batch)


# The first one has every choice by platform that the package makes.
STEPS = {
    "everything": ("precision=bfloat16", "chunk_cells=32", "rematerialize=true"),
    "plain": (),
    "others": (
        "model.encoder.kind=softmax",
        "objective.kind=zero_inflated_negative_binomial",
        "model.decoder.kind=zero_inflated_negative_binomial",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_training_step_lowers_without_a_branch_of_the_cpu(name):
    traced = trained(*STEPS[name])
    found = {platform: check(traced, platform) for platform in ACCELERATORS}
    assert found["cuda"] == found["tpu"]
    if name == "everything":
        assert found["cuda"] == functions_with_branches()
    # The same program for a CPU has them: the marks are seen.
    here = branches_in(traced.lower(lowering_platforms=("cpu",)).as_text())
    assert {where for platform, where in here if platform == "cpu"} == found["cuda"] != set()
    assert not {where for platform, where in here if platform == "default"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_embedding_lowers_without_a_branch_of_the_cpu(precision):
    model = dataclasses.replace(
        Pretrained.untrained(tiny(dropout=0.0), VOCABULARY), precision=precision
    )
    params, batch = model.device_params, embedding_batch()
    hidden = jax.ShapeDtypeStruct((1, 24, model.config.hidden), np.float32)
    mask = jax.ShapeDtypeStruct((1, 24), np.bool_)
    streamed = model.encode_streamed
    layer = params["encoder"]["layer_0"]
    known: tuple = ()
    programs = [
        model.express.trace(params, batch),
        model.encode.trace(params, hidden, mask),
        streamed._sums.trace(layer, hidden, mask, known),
        streamed._conclude.trace(params, hidden),
    ]
    for traced in programs:
        for platform in ACCELERATORS:
            check(traced, platform)


def embedding_batch():

    counts = sparse.csr_matrix(make_counts(24).astype(np.float32))
    batch = pad_batch([Sample("cells", counts)], cells=24, nonzeros=counts.nnz)
    return batch.replace(measured=None, dataset=None, platform=None)


@pytest.mark.parametrize("platform", ACCELERATORS)
def test_the_artifact_for_one_accelerator_has_no_branch_of_the_cpu(platform, monkeypatch):
    model = Pretrained.untrained(tiny(), VOCABULARY)
    monkeypatch.setattr(export, "PLATFORMS", (platform,))
    text = export._export(model).mlir_module()
    found = branches_in(text)
    assert {written for written, _ in found} <= {"default"}
    assert custom_calls(text) <= CUSTOM_CALLS | SYMBOLIC_CALLS
