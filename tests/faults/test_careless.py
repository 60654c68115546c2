"""Careless input: a bounded part of the campaign, and properties of what reads text from files."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_jax.cli.output import say
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.corpus_records import check_index, check_record
from cellplm_jax.errors import LONGEST, InputError, explain, nearest, quote, shorten, visible
from cellplm_jax.untrusted import parse_json
from tests.conftest import VOCABULARY, make_adata
from tests.faults import campaign_careless
from tests.faults.campaign_hostile import CONTROL, UNSAFE, quiet

PARTS, CASES = 8, 240


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return campaign_careless.prepare(tmp_path_factory.mktemp("careless"))


@pytest.mark.parametrize("part", range(PARTS))
def test_mistakes_give_right_counts_or_one_message(inputs, part):
    failures = []
    for seed in range(part, CASES, PARTS):
        outcome = campaign_careless.try_case(inputs, seed)
        if not outcome.ok:
            failures.append(f"seed {seed}: {outcome.result}: {outcome.detail}")
    assert not failures, "\n".join(failures)


def test_the_campaign_sees_wrong_counts(tmp_path):
    random = np.random.default_rng(0)
    with quiet():
        data = campaign_careless.clean(random)
    data.truth[0, 0] += 1
    assert campaign_careless._compare(data, data.adata)[0] == "wrong counts"
    data.refused = "anything"
    assert campaign_careless._compare(data, data.adata)[0] == "accepted"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(JSON)
def test_json_is_parsed_as_usual_or_refused(value):
    text = json.dumps(value)
    try:
        found = parse_json(text)
    except ValueError:
        assert any(
            len(digits) > 20 for digits in json.dumps(value).replace("-", "").split()
        ) or any(abs(number) >= 10**20 for number in _integers(value))
    else:
        assert json.dumps(found) == text


def _integers(value):
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _integers(inner)


@settings(max_examples=80, deadline=None)
@given(JSON)
def test_records_of_any_content_are_refused_with_one_message(value):
    for check in (lambda: check_record(value, "a", 8), lambda: check_index(value, "a")):
        if not isinstance(value, dict):
            continue
        with pytest.raises(InputError):
            check()


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=300), st.text(max_size=3000), st.text(max_size=600))
def test_messages_are_short_and_harmless(name, found, remedy):
    text = str(
        InputError(f"{quote(name)} {found}", "something", nearest(name, [found, name], remedy))
    )
    assert len(text) <= LONGEST
    assert not UNSAFE.search(text)
    assert len(explain(found * 50, remedy, remedy)) <= LONGEST
    assert len(shorten(found)) <= 120
    assert "\n" not in quote(name)
    assert visible(visible(found)) == visible(found)


def test_control_characters_do_not_reach_the_terminal(command, tmp_path):
    adata = make_adata(30)
    adata.var_names = [*adata.var_names[:-1], CONTROL]
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with open_counts(path, VOCABULARY) as source:
        stream = io.StringIO()
        for line in source.report.messages():
            say(line, stream)
    assert "owned" not in stream.getvalue() or "\\x1b" in stream.getvalue()
    assert not UNSAFE.search(stream.getvalue())
    status, _, err = command(
        "embed", f"{tmp_path}/{CONTROL[:20]}.h5ad", "--model", "small", "--out", tmp_path / "o.h5ad"
    )
    assert status == 2
    assert not UNSAFE.search(err)


def test_an_output_that_is_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    say("μ and 10³", stream)
    stream.flush()
    assert raw.getvalue() == b"\\u03bc and 10\\xb3\n"
