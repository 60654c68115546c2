"""The run on a GPU: its tables, what is left of it when a part fails, and the kernel it brings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from tests.conftest import ROOT

GPU = ROOT / "benchmarks" / "gpu"


def module(name: str):
    """A program of the benchmark, which finds the others beside it."""
    sys.path.insert(0, str(GPU))
    try:
        specification = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
        found = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(GPU))


def test_the_kernel_gathers_and_sums():
    gather = module("gather_sum")
    random = np.random.default_rng(0)
    counts = sparse.random(5, 40, 0.3, "csr", random_state=1, dtype=np.float32)
    counts[2] = 0
    counts.eliminate_zeros()
    table = random.standard_normal((40, 2 * gather.WIDTH)).astype(np.float32)
    found = gather.gather_sum(
        jnp.asarray(counts.indptr), counts.indices, counts.data, table, interpret=True
    )
    np.testing.assert_allclose(found, counts @ table, atol=1e-5)


def content(**stages):
    """Results with rows of some stages."""
    titles = dict(
        zip("abcdefg", ("Card", "Parity", "Embed", "Step", "End", "Profile", "Model"), strict=True)
    )
    return {
        "date": "2026-01-01", "rehearsal": False, "minutes": 10, "seconds": 3.0,
        "stages": {
            name: {"title": title, "rows": stages.get(name, []), "parts": {}}
            for name, title in titles.items()
        },
    }  # fmt: skip


def test_a_table_of_what_is_there_and_a_line_for_what_is_not():
    report = module("report")
    rows = [
        {"part": "e", "what": "embedding", "side": "original", "way": "tensors", "cells": 2000,
         "precision": "float32", "seconds": 1.0, "cells_per_second": 2000.0},
        {"part": "e", "what": "embedding", "side": "ours", "way": "device CSR", "cells": 200_000,
         "precision": "bfloat16", "seconds": 0.1, "cells_per_second": 2e6, "share_of_floor": 0.31,
         "binds": "products", "first_seconds": 9.0},
        {"part": "e", "what": "embedding, dense", "failed": "XlaRuntimeError: out of memory"},
        {"part": "e", "what": "embedding", "side": "original", "skipped": "3 s left"},
    ]  # fmt: skip
    results = content(
        a=[{"part": "card", "what": "peak", "precision": "TF32", "flops": 4e14}], c=rows
    )
    results["stages"]["d"]["parts"]["training"] = "stopped after 40 s"
    text = report.markdown(results)
    assert "| TF32 | 400.00 TFLOP/s |" in text
    # Against the most the original did, as it did not run that many cells.
    assert (
        "| ours | device CSR | 200,000 | bfloat16 | 2,000,000 | 1,000 | 31 % | products | 9.000 |"
        in text
    )
    assert "- embedding, dense: failed: XlaRuntimeError: out of memory" in text
    assert "- embedding (original): left out: 3 s left" in text
    assert "- part training: stopped after 40 s" in text
    assert "rehearsal" not in text
    assert "## Parity" not in text


def test_a_run_is_complete_with_a_finished_row_of_every_stage():
    run = module("run")
    results = content(a=[{"what": "peak"}], b=[{"what": "parity", "failed": "x"}])
    assert run.complete(results, "a")
    assert not run.complete(results, "ab")
    results["stages"]["b"]["rows"].append({"what": "parity"})
    assert run.complete(results, "ab")
    # In a rehearsal nothing may fail.
    assert not run.complete({**results, "rehearsal": True}, "ab")
    assert run.complete({**results, "rehearsal": True}, "a")


def test_shares_of_the_time_add_up():
    stages = module("stages")
    assert sum(share for _, _, share in stages.STAGES.values()) == pytest.approx(1.0)
    for _, parts, _ in stages.STAGES.values():
        assert all(callable(getattr(stages, part)) for part in parts)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("nvjet_hsh_192x192_64x4_2x1_v_bz_coopA_NNT", "bfloat16"),
        ("input_scatter_fusion_3", "gather-sum"),
        ("MemcpyH2D", "device-resident"),
        ("nobody_knows", "trace"),
    ],
)
def test_what_would_remove_a_kernel(kernel, says):
    assert says in module("stages").remedy(kernel)


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> Path:
    """A rehearsal of two stages of which one is made to fail."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    done = subprocess.run(
        [sys.executable, str(GPU / "run.py"), "--rehearse", "--stages", "ab", "--fail", "parity",
         "--minutes", "4", "--corpus", str(out), "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return out


def test_a_part_that_fails_leaves_the_rows_of_the_others(failed):
    results = json.loads((failed / "gpu.json").read_text())
    assert results["rehearsal"]
    peaks = {
        row["precision"]: row for row in results["stages"]["a"]["rows"] if row["what"] == "peak"
    }
    assert set(peaks) == {"float32", "TF32", "bfloat16", "copy", "from the host"}
    assert all(row.get("flops", row.get("bandwidth")) > 0 for row in peaks.values())
    assert results["stages"]["a"]["parts"] == {"card": "done"}
    assert results["stages"]["b"]["rows"] == []
    assert "parity was made to fail" in results["stages"]["b"]["parts"]["parity"]
    text = (failed / "gpu.md").read_text()
    assert "A rehearsal on a CPU" in text
    assert "- part parity: ended with status 1: parity was made to fail" in text
    assert "TFLOP/s" in text
    assert "parity was made to fail" in (failed / "run.log").read_text()


def test_the_bundle_names_what_it_cannot_use(tmp_path):
    script = str(ROOT / "tools" / "gpu_bundle.sh")
    for words, says in (
        (["--colour"], "there is no option --colour"),
        ([str(tmp_path / "none.h5ad")], "there is no file"),
        (["--out"], "--out needs a value"),
    ):
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert says in done.stderr
