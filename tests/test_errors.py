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
    listing,
    require,
    require_choice,
    require_column,
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


def test_an_unknown_column_is_answered_with_the_columns():
    require_column(["kind", "batch"], "kind", "Check the name")
    with pytest.raises(InputError) as caught:
        require_column(["kind", "batch"], "lane", "Check the name", of="obs of 'x'")
    found = "obs of 'x' has no column 'lane'; expected one of its columns: 'kind', 'batch'"
    assert str(caught.value) == f"{found}. Check the name."
    with pytest.raises(InputError, match="Did you mean 'batch'"):
        require_column(["kind", "batch"], "btach", "Check the name")
    assert listing(range(3), 2) == "'0', '1' and 1 more"
    assert listing([]) == "none"


def test_an_unknown_choice_is_answered_with_the_choices():
    require_choice("method", "ridge", ("ridge", "finetune"))
    with pytest.raises(
        InputError, match=r"^method='rigde'; expected one of 'ridge', 'finetune'. Did"
    ):
        require_choice("method", "rigde", ("ridge", "finetune"))
    with pytest.raises(InputError, match=r"^method=3; .* Use one of them\.$"):
        require_choice("method", 3, ("ridge", "finetune"))
