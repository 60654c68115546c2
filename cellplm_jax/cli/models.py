"""Commands about models: ``convert``, ``export`` and ``info``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cellplm_jax.cli.options import add_options, add_output, command
from cellplm_jax.cli.output import check_report, print_result, write_page
from cellplm_jax.errors import InputError


def add_convert(commands: Any) -> None:
    """Add ``convert``."""
    parser = command(
        commands,
        "convert",
        _convert,
        "convert a published PyTorch checkpoint, or write one back",
        "cellplm convert 20230926_85M.best.ckpt --config 20230926_85M.config.json --out model\n"
        "  cellplm convert model --to-torch back/20230926_85M",
    )
    add_options(
        parser,
        """
        input CKPT|DIR: PREFIX.best.ckpt, or a checkpoint directory
        --config JSON: PREFIX.config.json published with the weights
        --out DIR: new checkpoint directory
        --to-torch PREFIX: write PREFIX.best.ckpt and PREFIX.config.json
        """,
    )
    add_output(parser)


def _convert(arguments: argparse.Namespace) -> None:
    from cellplm_jax.interop import convert

    if (arguments.to_torch is None) == (arguments.out is None):
        raise InputError(
            "convert was given "
            + ("both" if arguments.out else "neither")
            + " --out and --to-torch",
            "exactly one of them",
            "Use --out DIR to read a published checkpoint, or --to-torch PREFIX to write one",
        )
    if arguments.to_torch is not None:
        paths = convert.to_published(arguments.input, arguments.to_torch)
        print_result(arguments, [f"wrote {path}" for path in paths], {"wrote": list(paths)})
        return
    if arguments.config is None:
        raise InputError(
            "convert requires --config",
            "the PREFIX.config.json published with the weights",
            "Add --config PREFIX.config.json",
        )
    lines = convert.from_published(arguments.input, arguments.config, arguments.out)
    print_result(arguments, lines, {"wrote": [arguments.out], "lines": lines})


def add_export(commands: Any) -> None:
    """Add ``export``."""
    parser = command(
        commands,
        "export",
        _export,
        "write a model to one file that embeds cells with JAX only, on cpu, cuda and tpu",
        "cellplm export small --out small.cellplm",
    )
    add_options(
        parser,
        "model MODEL: checkpoint directory, or a bundled model\n--out! FILE: output file",
    )
    add_output(parser)


def _export(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.export import export_model

    card = export_model(arguments.model, arguments.out)
    size = Path(arguments.out).expanduser().stat().st_size / 1e6
    line = (
        f"{arguments.out}: {card['model']}, {card['genes']} genes, {size:.1f} MB, for "
        f"{', '.join(card['platforms'])}; written with JAX {card['jax']}."
    )
    print_result(
        arguments,
        [line],
        {"wrote": [arguments.out], "megabytes": size, "card": card},
    )


def add_info(commands: Any) -> None:
    """Add ``info``."""
    parser = command(
        commands,
        "info",
        _info,
        "show a model (configuration, parameters by module, genes, training history), a fitted estimator "
        "(labels, scores) or a corpus",
        "cellplm info demo/model\n  cellplm info corpus --verify\n  cellplm info runs/small --report run.html",
    )
    add_options(
        parser,
        """
        model MODEL|CORPUS: bundled model, checkpoint directory, fitted estimator, pretraining work directory, or corpus
        --verify: read the complete corpus and compare its checksums
        """,
    )
    add_output(parser, report="parameters, training curves, or the parts of a corpus")


def _info(arguments: argparse.Namespace) -> None:
    from cellplm_jax.data.corpus import is_corpus
    from cellplm_jax.tasks.info import (
        describe,
        describe_corpus,
        describe_corpus_text,
        describe_text,
    )

    if is_corpus(arguments.model):
        check_report(arguments)
        silent = arguments.json or arguments.quiet
        facts = describe_corpus(arguments.model, verify=arguments.verify, quiet=silent)
        write_page(arguments, "corpus", facts)
        print_result(arguments, [describe_corpus_text(facts)], facts)
        return
    if arguments.verify:
        raise InputError(
            f"'{arguments.model}' is not a corpus, as --verify requires",
            "a corpus made by cellplm prepare",
            "Omit --verify, or check the path",
        )
    check_report(arguments)
    facts = describe(arguments.model)
    write_page(arguments, "model", arguments.model, facts)
    print_result(arguments, [describe_text(facts)], facts)
