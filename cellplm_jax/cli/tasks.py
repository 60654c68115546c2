"""Template of the commands of an estimator: ``cellplm TASK fit`` and ``cellplm TASK predict``."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from cellplm_jax.cli.options import (
    PRECISIONS,
    add_counts,
    add_options,
    add_output,
    command,
    names_in,
    source,
)
from cellplm_jax.cli.output import (
    check_new_file,
    check_new_folder,
    fitted_line,
    number_of,
    print_result,
    write_page,
)

Result = tuple[Sequence[str], Mapping[str, Any]]
"""Text lines, and facts of the JSON document."""

RECIPE = f"""
--genes N: number of highly variable genes
--epochs N: maximum number of epochs
--patience N: epochs without improvement before stopping
--learning-rate F: peak learning rate
--freeze none|embedder|encoder: frozen modules
--adapter-rank N: low-rank adapters on the encoder (none)
--validation-fraction F: held-out fraction, without --split-key
--seed N: random seed (0)
--precision {PRECISIONS}: precision of the matrix products of fit and prediction (float32)
"""
"""Options of the recipe of a fit."""

RENAMED = {"genes": "impute"}
"""Options of arguments of ``fit`` and ``predict`` whose name an argument of the constructor has too."""


class Task:
    """Commands ``fit`` and ``predict`` of an estimator; a subclass names its options, and what it prints.

    Options with the name of an argument of the constructor, of ``fit`` or of ``predict_file`` are passed to it.

    Attributes:
        name: Name of the command.
        estimator: ``"module:Class"`` of the estimator.
        help: ``"NOUN: ACTION OF FIT, or ACTION OF PREDICT"``.
        examples: Command lines of ``fit`` and ``predict``.
        reports: Contents of their reports; None: no report.
        page: Function of the report of ``fit``; see :func:`cellplm_jax.cli.output.write_page`.
        without: Options of all tasks that this one does not support.
        writes: ``"cells"``: ``predict`` reads a file and writes a copy of it with the results; ``"table"``: it reads no
            file, and writes a table.
    """

    name: ClassVar[str]
    estimator: ClassVar[str]
    help: ClassVar[str]
    examples: ClassVar[tuple[str, str]]
    reports: ClassVar[tuple[str | None, str | None]] = (None, None)
    page: ClassVar[str] = "fit"
    without: ClassVar[Sequence[str]] = ()
    writes: ClassVar[str] = "cells"

    @property
    def kind(self) -> Any:
        """The class of the estimator; imported when it is needed."""
        module, _, name = self.estimator.partition(":")
        return getattr(importlib.import_module(module), name)

    # -- defined by a task ----------------------------------------------------------------------

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""

    def check(self, arguments: argparse.Namespace) -> None:
        """Raise an error for options that the task does not support."""

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return what is printed about a fit; the facts of the estimator are added."""
        line = fitted_line(
            arguments,
            number_of(len(estimator.model.genes), "gene"),
            estimator.facts,
        )
        return [line], {}

    def open(self, arguments: argparse.Namespace) -> Any:
        """Return the estimator that predicts."""
        return self.kind.load(arguments.model, quiet=arguments.quiet)

    def predicted(self, arguments: argparse.Namespace, estimator: Any, result: Any) -> None:
        """Write the report, and print what ``predict_file`` returned."""
        facts = {"wrote": [arguments.out]}
        print_result(arguments, [f"wrote {arguments.out}"], facts, messages=result)

    # -- the commands ---------------------------------------------------------------------------

    def fit(self, arguments: argparse.Namespace) -> None:
        """Run ``fit``."""
        check_new_folder(arguments)
        self.check(arguments)
        # Not renamed: `--genes` is the number of genes of the constructor, `--impute` the list of the fit.
        options = passed_to(self.kind, arguments, renamed={}, omitted=("model", "quiet"))
        estimator = self.kind(source(arguments), quiet=arguments.quiet, **options)
        estimator.fit(arguments.input, **passed_to(self.kind.fit, arguments))
        estimator.save(arguments.out)
        lines, facts = self.fitted(arguments, estimator)
        write_page(arguments, self.page, estimator)
        print_result(
            arguments,
            lines,
            {"wrote": [arguments.out], **facts, **estimator.facts},
        )

    def predict(self, arguments: argparse.Namespace) -> None:
        """Run ``predict``."""
        check_new_file(arguments)
        self.check(arguments)
        estimator = self.open(arguments)
        options = passed_to(self.kind.predict_file, arguments)
        result = estimator.predict_file(arguments.input, arguments.out, **options)
        self.predicted(arguments, estimator, result)

    def add(self, commands: Any) -> None:
        """Add the commands to the subparsers of ``cellplm``."""
        parser = command(
            commands,
            self.name,
            self.fit,
            self.help,
            "\n  ".join(self.examples),
        )
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="fit|predict")
        noun, _, actions = self.help.partition(": ")
        fitting, _, predicting = actions.partition(", or ")
        fit = command(verbs, "fit", self.fit, f"{noun}: {fitting}", self.examples[0])
        predict = command(verbs, "predict", self.predict, f"{noun}: {predicting}", self.examples[1])
        cells = self.writes == "cells"
        for verb in (fit, predict) if cells else (fit,):
            add_options(verb, "input IN.h5ad: raw counts: in X, raw.X or a common layer")
        add_options(
            fit,
            """
            --model! M: start model: 'small', a checkpoint directory, or 'none' for training from scratch
            --out! DIR: new directory of the fitted estimator
            """,
        )
        out = "OUT.h5ad: the input plus the predictions"
        out = out if cells else "OUT.csv: table of the predictions; .csv or .tsv"
        add_options(predict, f"--model! DIR: directory of a fitted estimator\n--out! {out}")
        for verb, default, report in (
            (fit, "", self.reports[0]),
            (predict, "; as in fit", self.reports[1]),
        ):
            text = f"--batch-key K: column of obs with the tissue sample: one context each{default}"
            add_options(verb, text, without=self.without)
            add_counts(verb, default)
            add_options(
                verb,
                f"""
                --values counts|normalized|log1p: kind of values (counts{default})
                --cells-per-context N: maximum number of cells per context at prediction time (all{default})
                """,
                without=self.without,
            )
            add_output(verb, report=report)
        text = "--split-key K: column of obs with 'train' and 'valid'"
        add_options(fit, text, without=self.without)
        recipe = RECIPE
        if "--split-key" in self.without:
            recipe = recipe.replace(", without --split-key", "")
        number = {"type": int}
        add_options(
            fit.add_argument_group("recipe"),
            recipe,
            without=self.without,
            patience=number,
            adapter_rank=number,
            seed=number,
        )
        self.options(fit, predict)


def passed_to(
    function: Callable[..., Any],
    arguments: argparse.Namespace,
    *,
    renamed: Mapping[str, str] = RENAMED,
    omitted: Sequence[str] = ("adata", "path", "out"),
) -> dict[str, Any]:
    """Return the options that were passed and are arguments of a function, by their names there.

    Args:
        function: A function or a class.
        arguments: The command line.
        renamed: Names of options that differ from those of the arguments.
        omitted: Arguments that are not options.
    """
    passed: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = getattr(arguments, renamed.get(name, name), None)
        if value is not None and name not in omitted:
            # Annotations are text here (from __future__ import annotations).
            names = isinstance(value, str) and str(parameter.annotation).startswith("Sequence[str]")
            passed[name] = names_in(value) if names else value
    return passed
