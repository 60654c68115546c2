"""The template of the estimators: a task of a few lines has all methods, files and commands."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import numpy as np
import pytest

from cellplm_jax.cli.options import add_options
from cellplm_jax.cli.tasks import Task, passed_to
from cellplm_jax.errors import CheckpointError, InputError
from cellplm_jax.tasks.contexts import read_cells
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.files import read_obs
from cellplm_jax.tasks.prediction import Prediction
from cellplm_jax.tasks.reading import AS_FITTED
from cellplm_jax.train.checkpoint import ESTIMATOR_FILE
from tests.conftest import make_adata


class Totals(Estimator):
    """Predicts the log of the total count of every cell from its embedding."""

    task = "totals"
    saved = ("_weights",)

    def __init__(self, model=None, *, penalty: float = 1.0, **training):
        super().__init__(model, **training)
        self.penalty = penalty
        self._weights: list[float] = []

    def fit(self, adata, *, floor: int = 0, **keys):
        """Fit to cells.

        Args:
            adata: Raw counts.
            floor: Smallest total.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`.
        """
        table = self._read(adata, self._reading(keys))
        start = self._begin(table, self._architecture())
        self._keep(start, start.params)
        x, _, _ = self._features(adata, self.reading)
        wanted = np.log1p(np.maximum(np.ravel(table.counts.sum(axis=1)), floor))
        gram = x.T @ x + self.penalty * np.eye(x.shape[1])
        self._weights = np.linalg.solve(gram, x.T @ wanted).tolist()
        self.facts = {"training_cells": len(table)}
        return self

    def _features(self, data, reading):
        z, facts, messages = self._embed(data, reading)
        return np.hstack([z, np.ones((len(z), 1))]), facts, messages

    def _predict(self, data, reading, *, key_added: str = "total"):
        x, facts, messages = self._features(data, reading)
        return Prediction(
            obs={key_added: x @ self._weights}, uns={"totals": facts}, messages=messages
        )

    def score(self, adata, **keys):
        """Return the correlation with the truth."""
        predicted = self._predict(adata, self._as_fitted(keys)).obs["total"]
        counts = read_cells(adata, self._fitted().genes, spatial_key=None).counts
        return {
            "pearson": float(np.corrcoef(predicted, np.log1p(np.ravel(counts.sum(axis=1))))[0, 1])
        }


class Command(Task):
    """Commands of ``Totals``."""

    name, estimator = "totals", "tests.tasks.test_template:Totals"
    help, examples = (
        "totals: fit, or predict them",
        ("cellplm totals fit", "cellplm totals predict"),
    )

    def options(self, fit, predict):
        add_options(fit, "--penalty F: L2 penalty (1)\n--floor N: smallest total (0)")


def lines_of(kind: type) -> int:
    return len(inspect.getsource(kind).splitlines())


def test_an_estimator_takes_few_lines():
    assert lines_of(Totals) + lines_of(Command) <= 60


@pytest.fixture(scope="module")
def fitted(tiny_model):
    return Totals(tiny_model, quiet=True).fit(make_adata(80), batch_key="batch")


def test_fit_predict_score_save_and_load(fitted, tmp_path):
    cells = make_adata(30, seed=1)
    assert fitted.score(make_adata(80))["pearson"] > 0.2
    assert fitted.predict(cells, key_added="size") is cells
    assert cells.uns["totals"]["model"] == fitted.model.id
    assert cells.uns["totals"]["context"]["batch_key"] == "batch"
    fitted.save(tmp_path / "saved")
    opened = Totals.load(tmp_path / "saved", quiet=True)
    again = opened.predict(make_adata(30, seed=1))
    np.testing.assert_array_equal(again.obs["total"], cells.obs["size"])
    assert opened.id == fitted.id


def test_files_are_predicted_like_anndata(fitted, tmp_path):
    cells = make_adata(30, seed=1)
    cells.write_h5ad(tmp_path / "in.h5ad")
    messages = fitted.predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", batch_key=None)
    assert any("genes" in message for message in messages)
    wanted = fitted.predict(cells, batch_key=None).obs["total"]
    np.testing.assert_allclose(read_obs(tmp_path / "out.h5ad")["total"], wanted, rtol=1e-6)


def test_commands(tiny_run, tmp_path):
    parser = argparse.ArgumentParser()
    Command().add(parser.add_subparsers())
    make_adata(80).write_h5ad(tmp_path / "in.h5ad")

    def run(*words):
        arguments = parser.parse_args(["totals", *map(str, words), "--quiet"])
        arguments.run(arguments)

    run("fit", tmp_path / "in.h5ad", "--model", tiny_run, "--out", tmp_path / "saved", "--penalty",
        "3", "--floor", "5", "--batch-key", "batch")  # fmt: skip
    run(
        "predict", tmp_path / "in.h5ad", "--model", tmp_path / "saved", "--out", tmp_path / "o.h5ad"
    )
    opened = Totals.load(tmp_path / "saved", quiet=True)
    assert opened.reading.batch_key == "batch"
    wanted = Totals(tiny_run, penalty=3.0, quiet=True).fit(
        make_adata(80), floor=5, batch_key="batch"
    )
    assert opened._weights == wanted._weights
    predicted = wanted.predict(make_adata(80)).obs["total"]
    np.testing.assert_allclose(read_obs(tmp_path / "o.h5ad")["total"], predicted, rtol=1e-6)


def test_reading_keys_are_named_and_documented():
    keys = inspect.signature(Totals.fit).parameters
    assert keys["spatial_key"].default == "spatial"
    assert "    gene_key: Column of ``var``" in (Totals.fit.__doc__ or "")
    assert "keys" not in keys
    of_file = inspect.signature(Totals.predict_file).parameters
    assert of_file["key_added"].default == "total"
    assert of_file["layer"].default is AS_FITTED
    assert "key_added" not in inspect.signature(Estimator.predict_file).parameters
    assert "batch_key: As in :meth:`fit`." in (Totals.predict_file.__doc__ or "")


def test_unknown_keys_are_refused(fitted):
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample_key'"):
        fitted.fit(make_adata(20), sample_key="batch")
    with pytest.raises(TypeError, match="unexpected keyword argument 'layr'"):
        fitted.score(make_adata(20), layr="X")
    with pytest.raises(TypeError, match="unexpected keyword argument 'key_add'"):
        fitted.predict(make_adata(20), key_add="x")


def test_damaged_state_is_refused(fitted, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"'_weights' is a float"):
        Totals(None)._restore({"weights": 1.5}, {})
    with pytest.raises(KeyError):
        Totals(None)._restore({}, {})
    monkeypatch.setattr(fitted, "_weights", 1.5)
    fitted.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"{ESTIMATOR_FILE} .* cannot be read"):
        Totals.load(tmp_path / "saved")


def test_a_task_without_predictions_for_cells(tiny_model, tmp_path):
    class Nothing(Estimator):
        task = "nothing"
        fit = score = Totals.fit  # type: ignore[assignment]

    make_adata(5).write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(InputError, match="Nothing does not predict for cells"):
        Nothing(tiny_model).predict_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad")


def test_options_are_written_as_users_see_them():
    parser = argparse.ArgumentParser()
    add_options(
        parser,
        """
        cells IN.h5ad: a file
        --label-key! K: a column
        --method a|b: one of
            two
        --number N: a count
        --share F: a number
        --quick: a flag
        --hidden K: left out
        """,
        without=("--hidden",),
        share={"default": 0.5},
    )
    found = parser.parse_args(
        ["f", "--label-key", "kind", "--method", "b", "--number", "3", "--quick"]
    )
    assert vars(found) == {
        "cells": "f", "label_key": "kind", "method": "b", "number": 3, "share": 0.5, "quick": True,
    }  # fmt: skip
    assert "one of two" in parser.format_help()
    for words in (["f"], ["f", "--label-key", "k", "--number", "0"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)


def test_options_are_passed_by_the_names_of_arguments():
    def predict(path, *, genes: Sequence[str] | None = None, size: int = 1, other=None):
        """Predict."""

    arguments = argparse.Namespace(path="p", impute="A,B", genes=5, size=2, other=None, more=1)
    assert passed_to(predict, arguments) == {"genes": ["A", "B"], "size": 2}
    assert passed_to(predict, arguments, renamed={}) == {"genes": 5, "size": 2}
