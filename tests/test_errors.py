"""Errors build their own message: found, expected, remedy."""

from __future__ import annotations

import pickle

import pytest

from cellplm_jax.errors import (
    CellPLMError,
    CheckpointError,
    ConfigError,
    InputError,
    MissingDependencyError,
    explain,
    require,
)

KINDS = (CellPLMError, InputError, ConfigError, CheckpointError, MissingDependencyError)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_found_expected_and_remedy(kind):
    error = kind("2 genes", "at least 3", "Add one")
    assert str(error) == explain("2 genes", "at least 3", "Add one")
    assert str(error) == "2 genes; expected at least 3. Add one."
    assert str(kind("2 genes", "at least 3")) == "2 genes; expected at least 3."
    assert str(kind("the whole message")) == "the whole message"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_from_another_process_is_the_same(kind):
    error = pickle.loads(pickle.dumps(kind("2 genes", "at least 3", "Add one")))
    assert type(error) is kind
    assert str(error) == "2 genes; expected at least 3. Add one."


def test_punctuation_is_not_doubled():
    assert explain("a.", "b.", "Do c.") == "a; expected b. Do c."
    assert explain("a", "b", "Did you mean 'c'?") == "a; expected b. Did you mean 'c'?"


def test_errors_are_what_callers_already_catch():
    assert issubclass(InputError, ValueError)
    with pytest.raises(ImportError, match=r"needs the Python package 'nowhere_to_be'.*\[extra\]"):
        require("nowhere_to_be", "extra", "A test")
