"""A run that is killed, or told to stop, continues as if nothing had happened; the processes are real ones."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import time
from unittest import mock

import numpy as np
import pytest

from cellplm_jax.train.metrics import read_metrics
from tests.conftest import ROOT

# Minutes of real processes: with the other tests of processes, not with `make test`.
pytestmark = pytest.mark.multiprocess

_SPEC = importlib.util.spec_from_file_location(
    "kill_resume", ROOT / "benchmarks" / "robustness" / "kill_resume.py"
)
kill_resume = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kill_resume)
STEPS = 40


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a process that trains in a directory; its compiled programs are kept for the next one."""
    cache = tmp_path_factory.mktemp("cache")
    children = []
    flags = os.environ["XLA_FLAGS"]
    # Two devices are enough here, and sooner compiled for.
    fewer = re.sub(r"(host_platform_device_count)=\d+", r"\1=2", flags)

    def begin(workdir):
        with mock.patch.dict(os.environ, {"XLA_FLAGS": fewer}):
            children.append(kill_resume.Child(workdir, STEPS, cache))
        return children[-1]

    yield begin
    for child in children:
        child.process.kill()
        child.process.communicate()


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """A run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert start(workdir).finish() == 0
    return workdir


def assert_same_run(one, two):
    assert kill_resume.differing_bytes(one, two) == 0
    assert kill_resume.lines_of(one) == kill_resume.lines_of(two)


def test_killed_at_random_moments(start, alone, tmp_path):
    """Some moments after some steps: between two saves, in one, in the middle of a line of metrics."""
    workdir = tmp_path / "run"
    random = np.random.default_rng()
    for step in np.sort(random.integers(1, STEPS - 3, 3)):
        child = start(workdir)
        child.wait_for_step(int(step))
        time.sleep(random.uniform(0, 0.05))
        child.process.send_signal(signal.SIGKILL)
        child.process.communicate()
    assert start(workdir).finish() == 0
    assert_same_run(alone, workdir)


def test_told_to_stop(start, alone, tmp_path):
    """SIGTERM: the step is saved before the process ends, and nothing is computed twice."""
    workdir = tmp_path / "run"
    child = start(workdir)
    child.wait_for_step(7)
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 143
    saved = max(kill_resume.steps_of(workdir))
    assert saved >= 8
    assert max(row["step"] for row in read_metrics(workdir / "metrics.jsonl")) == saved
    assert start(workdir).finish() == 0
    assert_same_run(alone, workdir)
