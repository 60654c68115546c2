"""``tools/faults.py`` runs every campaign, and a failure tells how to repeat it."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.outcome import Outcome


@pytest.fixture
def driver(monkeypatch):
    spec = importlib.util.spec_from_file_location("faults_driver", ROOT / "tools" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failure_prints_its_seed_and_command(driver, monkeypatch, capsys, tmp_path):
    class Campaign:
        @staticmethod
        def prepare(folder):
            return folder

        @staticmethod
        def try_case(folder, seed):
            assert folder.is_dir()
            return Outcome("kind", "silent" if seed == 8 else "refused", seed != 8, "why", 0.5)

    monkeypatch.setattr(driver.importlib, "import_module", lambda name: Campaign)
    arguments = [
        "--campaign",
        "damage",
        "--seed",
        "7",
        "--cases",
        "3",
        "--out",
        str(tmp_path / "t"),
    ]
    monkeypatch.setattr(sys, "argv", ["faults.py", *arguments])
    assert driver.main() == 1
    out = capsys.readouterr().out
    assert "FAILED damage seed 8: silent: why" in out
    assert "python tools/faults.py --campaign damage --seed 8 --cases 1\n" in out
    assert "| kind | 3 | 2 | 1 | 0.5 |" in (tmp_path / "t.md").read_text()


def test_every_campaign_has_its_functions(driver):
    names = driver.campaigns()
    assert {"damage", "disk", "kills", "writers"} <= set(names)
    for name in names:
        module = importlib.import_module(f"tests.faults.campaign_{name}")
        assert callable(module.prepare)
        assert callable(module.try_case)
