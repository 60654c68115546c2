"""Properties of what reads text from files, with generated input."""

from __future__ import annotations

import json

import pytest

from cellplm_jax.data.corpus_records import check_index, check_record
from cellplm_jax.errors import LONGEST, InputError, explain, nearest, quote, shorten, visible
from cellplm_jax.untrusted import parse_json
from tests.faults.campaign_hostile import UNSAFE

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

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
