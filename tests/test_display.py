"""Representations of the public objects: one line in a console, valid HTML in a notebook."""

from __future__ import annotations

import dataclasses
import inspect
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from etils import epath
from scipy import sparse

import cellplm_jax as cellplm
from cellplm_jax.config import to_dict
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.batches import MemoryStore, Sample
from cellplm_jax.display import LONGEST, shown
from cellplm_jax.interop.hub import HubCommit
from cellplm_jax.tasks.denoise_view import BeforeAndAfter
from cellplm_jax.tasks.embed_corpus import CorpusEmbedding
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.impute_measured import Beside, BesideMeasured
from cellplm_jax.tasks.perturb import PerturbationPrediction
from cellplm_jax.train.finetune import FinetuneResult
from cellplm_jax.train.loop import RunResult

GENES = [f"ENSG{number:011d}" for number in range(2000)]
LONG = "<b>a & b</b> " * 60


class Strict(HTMLParser):
    """Raises for tags that are not closed in order, and keeps the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in {"table", "caption", "tbody", "tr", "th", "td"}, tag
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data}\n"


@pytest.fixture(scope="module")
def small():
    return cellplm.load("small")


def frame(rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        np.zeros((rows, len(GENES)), np.float32), [f"P{i}" for i in range(rows)], GENES
    )


def results():
    """One of each result, with many genes and long texts."""
    values = np.zeros((3, 2))
    counts = sparse.csr_matrix((3, len(GENES)), dtype=np.float32)
    beside = Beside("CD3E", np.zeros(5000), "CD3D", np.zeros(5000))
    known = pd.Series(["seen"] * 49 + ["unseen"], frame(50).index)
    yield PerturbationPrediction(frame(50), frame(50), pd.Series(dtype=float), known, (LONG,))
    yield beside
    yield BesideMeasured(pd.Series(np.zeros(100)), [beside] * 5)
    yield BeforeAndAfter(GENES, values, values, frame(3), values, values, 0.9, 0.1, counts, None)
    yield RunResult(epath.Path("runs/x"), 100, {f"score_{i}": 0.1 for i in range(40)}, 123.4)
    yield FinetuneResult({"a": np.zeros(9999)}, [{"loss": 1.0}] * 200, 3, True, 10**7, 12.0)
    yield CorpusEmbedding("out.zarr", 10**6, 12, 12, True, [LONG] * 9)
    yield HubCommit("https://example.org/" + "x" * 400, "abc", "hf://org/name@abc")
    yield MemoryStore([Sample("s", counts)], GENES)
    yield cellplm.datasets.MarkerAnnotation(np.array(["T"] * 999), values, values, tuple("abcde"))


def estimators(small):
    kinds = [
        kind
        for kind in (getattr(cellplm, name) for name in cellplm.__all__)
        if inspect.isclass(kind) and issubclass(kind, Estimator)
    ]
    assert len(kinds) == 6
    for kind in kinds:
        estimator = kind(small)
        yield estimator
        fitted = kind(small)
        fitted.model = dataclasses.replace(small, card={"fine_tuned_from": "small@2000"})
        fitted.labels = [f"type {number}" for number in range(80)]
        fitted.facts = {"validation_f1": 0.91234, "label_key": LONG, "training_cells": 12345}
        yield fitted


def test_every_public_object_shows_itself(small):
    pbmc = cellplm.datasets.pbmc3k()[:5]
    with open_counts(pbmc, small.genes) as source:
        shown_objects = [
            small,
            *estimators(small),
            *results(),
            source,
            source.report,
            source.report.genes,
            small.config,
            cellplm.preset("small"),
            cellplm.TrainConfig(model=small.config),
            cellplm.FinetuneConfig(epochs=3),
        ]
        for thing in shown_objects:
            text = repr(thing)
            assert len(text) <= LONGEST, text
            assert "\n" not in text
            assert text.startswith(type(thing).__name__)
            assert " object at 0x" not in text
            if hasattr(thing, "_repr_html_"):
                page = Strict(thing._repr_html_())
                assert type(thing).__name__ in page.text
    classes = {
        value
        for value in (getattr(cellplm, name) for name in cellplm.__all__)
        if inspect.isclass(value) and not issubclass(value, Exception)
    }
    assert classes <= {type(thing) for thing in shown_objects}


def test_what_a_model_and_an_estimator_say(small):
    text = repr(small)
    assert f"model: {small.id}" in text
    assert f"parameters: {small.parameters:,}" in text
    assert f"genes: {len(small.genes):,}" in text
    assert f"trained on: {small.card['training_cells']:,} cells" in text
    page = Strict(small._repr_html_())
    assert f"{small.card['training_cells']:,} cells" in page.text
    unfitted, fitted, *_ = estimators(small)
    assert "call fit" in repr(unfitted)
    assert "validation f1: 0.9123" in repr(fitted)
    assert "type 0, type 1, type 2, ... (80)" in repr(fitted)


def test_text_of_users_is_escaped(small):
    model = dataclasses.replace(small, card={"name": "<script>x</script>", "data": "a & b"})
    assert "<script>" not in model._repr_html_()
    assert "<script>x</script>" in Strict(model._repr_html_()).text


def test_a_configuration_shows_what_was_changed(small):
    assert repr(cellplm.FinetuneConfig()) == "FinetuneConfig()"
    assert repr(cellplm.FinetuneConfig(epochs=3, freeze="encoder")) == (
        "FinetuneConfig(epochs=3, freeze='encoder')"
    )
    assert "genes=" in repr(small.config)
    assert to_dict(small.config)["genes"] == len(small.genes)


def test_values_are_short():
    assert shown(1234567) == "1,234,567"
    assert shown(True) == "yes"
    assert shown(0.123456) == "0.1235"
    assert shown([1, 2, 3, 4]) == "1, 2, 3, ... (4)"
    assert shown({"a_b": 1}) == "a b 1"
    assert shown(np.zeros((2, 3))) == "2 x 3"


def test_completion_lists_public_names_only():
    for module in (cellplm, cellplm.plot, cellplm.datasets):
        assert set(dir(module)) == set(module.__all__)
