"""Running the scripts of ``launch/`` with stand-ins for gcloud, SLURM, kubectl, uv and Python on the PATH."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
STAND_INS = Path(__file__).parent / "stand_ins"
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="bash is not installed")


class Scene:
    """The folder of a test: answers of the stand-ins go in, their calls come out."""

    def __init__(self, folder: Path):
        self.folder = folder / "scene"
        self.folder.mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))},
            "PATH": f"{STAND_INS}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            "POLL": "0",
            "BACKOFF": "0",
        }

    def answers(self, name: str, *lines: str) -> None:
        """Write what a stand-in answers, one call a line."""
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of every call of a stand-in."""
        path = self.folder / f"{name}.calls"
        return (
            [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
        )

    def arguments(self, script: str, *arguments: object) -> list[str]:
        """Return the command line of a script in ``launch/``."""
        assert BASH is not None
        return [BASH, str(LAUNCH / script), *map(str, arguments)]

    def run(
        self, script: str, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a script in ``launch/`` to its end."""
        return subprocess.run(
            self.arguments(script, *arguments),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env={**self.environment, **environment},
            check=False,
        )

    def start(self, script: str, *arguments: object, **environment: str) -> subprocess.Popen:
        """Start a script in ``launch/``, which hears SIGINT also where the tests run in the background and do not."""
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                self.arguments(script, *arguments),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env={**self.environment, **environment},
            )
        finally:
            signal.signal(signal.SIGINT, ours)
