"""Careless input: a bounded part of the campaign, and what reaches the terminal."""

from __future__ import annotations

import io

import numpy as np
import pytest

from cellplm_jax.cli.output import say
from cellplm_jax.data.anndata_io import open_counts
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
