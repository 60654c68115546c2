"""Fixtures of the launch tests."""

from __future__ import annotations

import pytest

from tests.launch.common import Scene


@pytest.fixture
def scene(tmp_path) -> Scene:
    """A folder in which stand-ins record and answer."""
    return Scene(tmp_path)
