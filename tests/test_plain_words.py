"""The count of marker idioms: what is prose, where the places are, and the exit status."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def plain_words():
    spec = importlib.util.spec_from_file_location("plain_words", ROOT / "tools" / "plain_words.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_comments_and_messages_count_and_names_do_not(plain_words, tmp_path):
    (tmp_path / "module.py").write_text(
        '"""One vector a cell.\n\nThe file lies elsewhere."""\n'
        "whole = 1  # the whole file\n"
        'message = f"the run {whole} says nothing of it"\n'
        'key = "beside"\n'
    )
    places, words = plain_words.measure([tmp_path])
    found = [place.partition("module.py:")[2] for place in places]
    assert found == ["1: a cell", "3: lies", "4: whole", "5: says"]
    assert words == 4 + 4 + 3 + 4


def test_code_blocks_of_pages_do_not_count(plain_words, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What the page is\n\n```bash\ncp whole beside\n```\n\nAt most one row per cell.\n"
    )
    places, words = plain_words.measure([page])
    assert [place.partition("page.md:")[2] for place in places] == ["1: # What the", "7: At most"]
    assert words == 10


@pytest.mark.parametrize(
    "text", ["if there are no labels", "one row per cell", "the own response", "a whistle"]
)
def test_plain_sentences_have_none(plain_words, text, tmp_path):
    (tmp_path / "page.md").write_text(text)
    assert plain_words.measure([tmp_path])[0] == []


def test_the_limit_sets_the_exit_status(plain_words, tmp_path, capsys):
    (tmp_path / "page.md").write_text("The whole file, " + "word " * 97)
    assert plain_words.main([str(tmp_path), "--limit", "10"]) == 0
    assert plain_words.main([str(tmp_path), "--limit", "9.9"]) == 1
    assert plain_words.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "page.md:1: whole" in out
    assert "given: 10.0 idioms per 1,000 words (1 in 100)" in out


def test_a_missing_file_is_an_error(plain_words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plain_words.main([str(tmp_path / "absent")])
    assert "No such file or folder" in capsys.readouterr().err
