"""Compiled programs are kept between processes, in a directory of the user's choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellplm_jax import compilation_cache as cache

PROGRAM = """
import jax
import cellplm_jax as cellplm
{before}
model = cellplm.load("small")
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((9, 9))).block_until_ready()
"""


def run(tmp_path, before="", **environment):
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**base, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    where = tmp_path / "kept"
    # Also where something was compiled before the model was loaded.
    before = "jax.jit(lambda x: x + 1)(1.0)"
    used = run(tmp_path, before, CELLPLM_CACHE=str(where))
    assert Path(used).parent == where

    def kept():
        return {path.name: path.read_bytes() for path in Path(used).glob("jit__lambda*")}

    first = kept()
    assert run(tmp_path, before, CELLPLM_CACHE=str(where)) == used
    # Nothing new, and the entry has been read: it says when that was.
    assert kept().keys() == first.keys()
    assert [name for name, value in kept().items() if value != first[name]]
    assert [name for name, value in kept().items() if value == first[name]]


def test_half_written_programs_are_removed(tmp_path):
    """After ``kill -9`` or on a full disk, JAX leaves a program without its second file."""
    environment = {"CELLPLM_CACHE": str(tmp_path / "kept"), "PYTHONWARNINGS": "error"}
    used = Path(run(tmp_path, **environment))
    program = next(used.glob("jit__lambda*-cache"))
    program.with_name(program.name.replace("-cache", "-atime")).unlink()
    program.write_bytes(program.read_bytes()[:-20])
    run(tmp_path, **environment)
    names = {path.name for path in used.iterdir()}
    assert program.name in names
    assert all(name.replace("-cache", "-atime") in names for name in names)


def test_what_the_user_chose_stays(tmp_path):
    assert run(tmp_path, CELLPLM_CACHE="off") == "None"
    mine = str(tmp_path / "mine")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=mine) == mine
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert run(tmp_path, CELLPLM_CACHE=str(occupied)) == "None"


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/somewhere"}, "/somewhere/cellplm_jax"),
        ("linux", {}, "/home/me/.cache/cellplm_jax"),
        ("darwin", {}, "/home/me/Library/Caches/cellplm_jax"),
        ("linux", {"CELLPLM_CACHE": "/here"}, "/here"),
        ("linux", {"CELLPLM_CACHE": "OFF"}, None),
    ],
)
def test_the_directory_is_the_users_cache(monkeypatch, system, variables, expected):
    for name in ("XDG_CACHE_HOME", "CELLPLM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", system)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = cache.cache_directory()
    assert (found and str(found)) == expected


def test_every_processor_has_a_directory_of_its_own():
    assert cache._machine() == cache._machine()
    assert len(cache._machine()) == 8
