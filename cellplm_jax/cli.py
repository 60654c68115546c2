"""The ``cellplm`` command.

Exit status: 0 done; 2 bad usage or bad input, one message on standard error and no traceback; 3 ``plan`` found that the
run does not fit; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cellplm_jax.errors import CellPLMError, InputError, explain


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    import cellplm_jax

    parser = argparse.ArgumentParser(
        prog="cellplm",
        description="CellPLM in JAX: embed single cells and spots with a pretrained cell language model.",
    )
    parser.add_argument(
        "--version", action="version", version=f"cellplm-jax {cellplm_jax.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_prepare(commands)
    _add_embed(commands)
    _add_cluster(commands)
    _add_integrate(commands)
    _add_annotate(commands)
    _add_impute(commands)
    _add_denoise(commands)
    _add_perturb(commands)
    _add_samples(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_info(commands)
    _add_plan(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        msg = f"{text!r} is not a positive whole number"
        raise argparse.ArgumentTypeError(msg)
    return value


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "pretrain a small model on bundled cells, embed, evaluate and draw",
        "cellplm demo --out demo",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="output directory (demo)")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="training steps, for a quick check"
    )
    parser.add_argument(
        "--max-cells", type=_positive, metavar="N", help="use only N of the 2,700 cells"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _demo(arguments: argparse.Namespace) -> None:
    from cellplm_jax.demo import run_demo, verdict

    table = run_demo(
        arguments.out,
        steps=arguments.steps,
        max_cells=arguments.max_cells,
        seed=arguments.seed,
        quiet=arguments.quiet,
    )
    _print_scores(table)
    out = Path(arguments.out)
    _print(verdict(table))
    _print(f"report: {out / 'report.html'}")
    _print(
        f"model:  {out / 'model'}   (cellplm embed FILE.h5ad --model {out / 'model'} --out OUT.h5ad)"
    )


def _print_scores(table: dict[str, dict[str, float]]) -> None:
    columns = (
        "ari",
        "ari_coarse",
        "nmi",
        "knn_accuracy",
        "masked_correlation",
        "nb_log_likelihood",
    )
    width = max(map(len, table)) + 2
    _print(" " * width + "".join(f"{name:>20}" for name in columns))
    for method, scores in table.items():
        values = (f"{scores[name]:20.4f}" if name in scores else f"{'-':>20}" for name in columns)
        _print(f"{method:<{width}}" + "".join(values))


def _add_prepare(commands: Any) -> None:
    parser = _command(
        commands,
        "prepare",
        _prepare,
        "turn AnnData files into a corpus for pretraining, or add files to one",
        "cellplm prepare data/*.h5ad --out corpus --sample-key batch --label-key cell_type",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IN.h5ad", help=".h5ad files, .zarr stores, or folders of them"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="CORPUS",
        help="folder of the corpus; the same one continues",
    )
    parser.add_argument(
        "--sample-key",
        metavar="K",
        help="column of obs naming the tissue sample; a file without it is one sample",
    )
    parser.add_argument(
        "--dataset-key", metavar="K", help="column of obs naming the data set (the file's name)"
    )
    parser.add_argument(
        "--platform-key", metavar="K", help="column of obs naming how a sample was measured"
    )
    parser.add_argument(
        "--spatial-key", metavar="K", help="key of obsm with coordinates ('spatial' where present)"
    )
    parser.add_argument(
        "--label-key", metavar="K", help="column of obs with labels of cells, for the probe"
    )
    parser.add_argument("--layer", metavar="L", help="layer with the counts (found by itself)")
    parser.add_argument(
        "--gene-key", metavar="K", help="column of var with gene ids (found by itself)"
    )
    parser.add_argument(
        "--genes", metavar="FILE", help="vocabulary, one gene a line (chosen from the files)"
    )
    parser.add_argument(
        "--vocabulary",
        choices=("union", "intersection"),
        help="which of the genes that files measure are chosen (union)",
    )
    parser.add_argument(
        "--minimum-cells",
        type=_positive,
        metavar="N",
        help="cells that must express a gene for it to be chosen (10)",
    )
    parser.add_argument(
        "--minimum-prevalence",
        type=float,
        metavar="F",
        help="share of the cells measuring a gene that must express it (0)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="running dask scheduler; its workers see the same paths",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="local worker processes; 0: none but this one (a core each, at most one a file)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _prepare(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.prepare import prepare, summary_text

    summary = prepare(
        arguments.inputs,
        arguments.out,
        sample_key=arguments.sample_key,
        dataset_key=arguments.dataset_key,
        platform_key=arguments.platform_key,
        spatial_key=arguments.spatial_key,
        label_key=arguments.label_key,
        layer=arguments.layer,
        gene_key=arguments.gene_key,
        genes=arguments.genes,
        vocabulary=arguments.vocabulary,
        minimum_cells=arguments.minimum_cells,
        minimum_prevalence=arguments.minimum_prevalence,
        scheduler=arguments.scheduler,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    if arguments.json:
        _print(json.dumps(summary, indent=2))
        return
    _print(summary_text(summary))
    _print(f"wrote {arguments.out} in {summary['seconds']:.0f} s   (cellplm info {arguments.out})")


def _add_embed(commands: Any) -> None:
    parser = _command(
        commands,
        "embed",
        _embed,
        "embed the cells of an .h5ad file",
        "cellplm embed cells.h5ad --model demo/model --out embedded.h5ad --batch-key sample",
    )
    parser.add_argument("input", metavar="IN.h5ad", help="raw counts: in X, raw.X or a usual layer")
    parser.add_argument(
        "--model", required=True, help="checkpoint directory or pretraining work directory"
    )
    parser.add_argument(
        "--out", required=True, metavar="OUT.h5ad", help="the input plus the embedding"
    )
    parser.add_argument(
        "--batch-key", metavar="K", help="column of obs naming the tissue sample: one context each"
    )
    parser.add_argument(
        "--spatial-key", metavar="K", help="key of obsm with coordinates ('spatial' where present)"
    )
    parser.add_argument("--layer", metavar="L", help="layer with the counts (found by itself)")
    parser.add_argument(
        "--gene-key", metavar="K", help="column of var with gene ids (found by itself)"
    )
    parser.add_argument(
        "--cells-per-context", type=_positive, metavar="N", help="cells of a context at most (all)"
    )
    parser.add_argument(
        "--key-added", default="X_cellplm", metavar="K", help="key of obsm to write (X_cellplm)"
    )
    parser.add_argument(
        "--values",
        choices=("counts", "normalized", "log1p"),
        default="counts",
        help="what the matrix holds; anything but raw counts has to be said (counts)",
    )
    parser.add_argument(
        "--minimum-genes", type=_positive, metavar="N", help="fewest known genes accepted"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no report")


def _embed(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.embed import check_output, embed_file
    from cellplm_jax.tasks.pretrained import load

    check_output(Path(arguments.out))
    model = load(arguments.model)
    messages = embed_file(
        arguments.input,
        model,
        arguments.out,
        batch_key=arguments.batch_key,
        spatial_key=arguments.spatial_key or "spatial",
        require_coordinates=arguments.spatial_key is not None,
        layer=arguments.layer,
        gene_key=arguments.gene_key,
        cells_per_context=arguments.cells_per_context,
        key_added=arguments.key_added,
        values=arguments.values,
        minimum_genes=arguments.minimum_genes,
        quiet=arguments.quiet,
    )
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    _print(f"wrote {arguments.out}: obsm['{arguments.key_added}'] by {model.id}")


def _add_task(
    commands: Any,
    name: str,
    help: str,
    *,
    fit: Callable[[argparse.Namespace], None],
    predict: Callable[[argparse.Namespace], None],
    fit_example: str,
    predict_example: str,
    without: Sequence[str] = (),
    predicts: str = "cells",
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Add a task with the verbs ``fit`` and ``predict``, and the options that all tasks have.

    Args:
        commands: Where to add it.
        name: Of the task.
        help: What it does, as a noun and what to do with it.
        fit: Runs the first verb.
        predict: Runs the second one.
        fit_example: A command line.
        predict_example: A command line.
        without: Options that this task has not.
        predicts: ``"cells"``: ``predict`` reads a file and writes a copy of it with more in it; ``"table"``: it reads
            no file, and writes a table.
    """
    parser = _command(commands, name, fit, help, f"{fit_example}\n  {predict_example}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="fit|predict")
    first = _command(verbs, "fit", fit, f"{help}: fit", fit_example)
    second = _command(verbs, "predict", predict, f"{help}: predict", predict_example)

    def add(group: Any, option: str, **settings: Any) -> None:
        if option not in without:
            group.add_argument(option, **settings)

    for verb in (first, second) if predicts == "cells" else (first,):
        verb.add_argument(
            "input", metavar="IN.h5ad", help="raw counts: in X, raw.X or a usual layer"
        )
    first.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="what to start from: 'small', a checkpoint directory, or 'none' for from scratch",
    )
    first.add_argument(
        "--out", required=True, metavar="DIR", help="new directory of the fitted estimator"
    )
    second.add_argument(
        "--model", required=True, metavar="DIR", help="directory of a fitted estimator"
    )
    if predicts == "cells":
        second.add_argument(
            "--out", required=True, metavar="OUT.h5ad", help="the input plus the predictions"
        )
    else:
        second.add_argument(
            "--out", required=True, metavar="OUT.csv", help="table of the predictions; .csv or .tsv"
        )
    for verb, default in ((first, ""), (second, "; as in fit")):
        add(
            verb,
            "--batch-key",
            metavar="K",
            help=f"column of obs naming the tissue sample: one context each{default}",
        )
        add(
            verb,
            "--spatial-key",
            metavar="K",
            help=f"key of obsm with coordinates ('spatial' where present{default})",
        )
        add(verb, "--layer", metavar="L", help=f"layer with the counts (found by itself{default})")
        add(
            verb,
            "--gene-key",
            metavar="K",
            help=f"column of var with gene ids (found by itself{default})",
        )
        add(
            verb,
            "--values",
            choices=("counts", "normalized", "log1p"),
            help=f"what the matrix holds (counts{default})",
        )
        add(
            verb,
            "--cells-per-context",
            type=_positive,
            metavar="N",
            help=f"cells of a context at most when predicting (all{default})",
        )
        verb.add_argument("--quiet", action="store_true", help="no progress and no report")
    add(first, "--split-key", metavar="K", help="column of obs with 'train' and 'valid'")
    recipe = first.add_argument_group("recipe")
    add(recipe, "--genes", type=_positive, metavar="N", help="highly variable genes only")
    add(recipe, "--epochs", type=_positive, metavar="N", help="epochs at most")
    add(recipe, "--patience", type=int, metavar="N", help="epochs without a better one")
    add(recipe, "--learning-rate", type=float, metavar="F", help="peak learning rate")
    add(
        recipe,
        "--freeze",
        choices=("none", "embedder", "encoder"),
        help="parts that are not trained",
    )
    add(
        recipe,
        "--adapter-rank",
        type=int,
        metavar="N",
        help="low-rank adapters on the encoder (none)",
    )
    add(
        recipe,
        "--validation-fraction",
        type=float,
        metavar="F",
        help="held out" + ("" if "--split-key" in without else ", without --split-key"),
    )
    add(recipe, "--seed", type=int, metavar="N", help="seed of everything (0)")
    return first, second


_RECIPE = ("genes", "epochs", "patience", "learning_rate", "freeze", "adapter_rank",
           "validation_fraction", "seed")  # fmt: skip
_READING = ("batch_key", "spatial_key", "layer", "gene_key", "values", "cells_per_context",
            "split_key")  # fmt: skip


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given, by name."""
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _source(arguments: argparse.Namespace) -> str | None:
    """Return the model to start from; None: from scratch."""
    return None if arguments.model == "none" else arguments.model


def _say_fitted(arguments: argparse.Namespace, what: str, facts: dict[str, Any]) -> None:
    """Say in one line what was fitted."""
    line = f"wrote {arguments.out}: {what}, {facts['training_cells']} training cells"
    if "best_epoch" in facts:
        line += f", epoch {facts['best_epoch']} of {facts['epochs']} kept, {facts['seconds']:.0f} s"
    _print(line)


def _add_annotate(commands: Any) -> None:
    fit, _ = _add_task(
        commands,
        "annotate",
        "cell types: learn them from labelled cells, or predict them",
        fit=_annotate_fit,
        predict=_annotate_predict,
        fit_example="cellplm annotate fit labelled.h5ad --model small --out annotator --label-key cell_type",
        predict_example="cellplm annotate predict cells.h5ad --model annotator --out annotated.h5ad",
    )
    fit.add_argument("--label-key", required=True, metavar="K", help="column of obs with the types")
    fit.add_argument(
        "--method",
        choices=("finetune", "neighbors"),
        default="finetune",
        help="neighbors: no training, labels of the nearest cells (finetune)",
    )
    fit.add_argument(
        "--unknown-threshold",
        type=float,
        metavar="F",
        help="confidence below which a cell is 'unknown' (every cell gets a label)",
    )
    fit.add_argument(
        "--balanced", action="store_true", help="cells of every label weigh the same in sum"
    )
    fit.add_argument(
        "--transductive", action="store_true", help="unlabelled cells in the training contexts too"
    )


def _annotate_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.annotate import CellTypeAnnotator
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    annotator = CellTypeAnnotator(
        _source(arguments),
        method=arguments.method,
        unknown_threshold=arguments.unknown_threshold,
        class_weights="balanced" if arguments.balanced else None,
        quiet=arguments.quiet,
        **_given(arguments, _RECIPE),
    )
    annotator.fit(
        arguments.input,
        label_key=arguments.label_key,
        transductive=arguments.transductive,
        **_given(arguments, _READING),
    )
    annotator.save(arguments.out)
    facts = annotator.facts
    what = f"{len(annotator.labels)} cell types"
    if "validation_f1" in facts:
        what += f", validation macro F1 {facts['validation_f1']:.3f}"
    _say_fitted(arguments, what, facts)


def _annotate_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.annotate import LABEL, CellTypeAnnotator
    from cellplm_jax.tasks.embed import check_output

    check_output(Path(arguments.out))
    annotator = CellTypeAnnotator.load(arguments.model, quiet=arguments.quiet)
    messages = annotator.predict_file(arguments.input, arguments.out, **_given(arguments, _READING))
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    _print(f"wrote {arguments.out}: obs['{LABEL}'], {len(annotator.labels)} cell types")


def _counts_only(arguments: argparse.Namespace, *others: str) -> None:
    """Refuse options that all tasks have and this one cannot use."""
    if arguments.values not in (None, "counts"):
        msg = explain(
            f"--values {arguments.values}",
            "raw counts, which are what is predicted",
            "Name the layer with the counts with --layer",
        )
        raise InputError(msg)
    arguments.values = None
    for name in others:
        if getattr(arguments, name, None) is not None:
            option = f"--{name.replace('_', '-')}"
            msg = explain(
                f"{option} was given to {arguments.command}",
                "a random part of the cells for validation",
                f"Leave {option} out and set --validation-fraction",
            )
            raise InputError(msg)


def _names_in(text: str | None) -> list[str] | None:
    """Return names given as a file, one a line, or separated by commas; None: none were given."""
    from cellplm_jax.tasks.tables import read_names

    return None if text is None else read_names(text)


def _add_impute(commands: Any) -> None:
    fit, predict = _add_task(
        commands,
        "impute",
        "genes that a spatial panel lacks: learn them from a reference, or predict them",
        fit=_impute_fit,
        predict=_impute_predict,
        fit_example="cellplm impute fit spatial.h5ad --reference cells.h5ad --model small --out imputer",
        predict_example="cellplm impute predict spatial.h5ad --model imputer --out imputed.h5ad",
    )
    fit.add_argument(
        "--reference",
        metavar="REF.h5ad",
        help="cells measured for more genes (without: batches of the input that have more)",
    )
    fit.add_argument(
        "--reference-batch-key", metavar="K", help="column of obs of the reference (one batch)"
    )
    fit.add_argument("--reference-layer", metavar="L", help="layer with its counts (found)")
    fit.add_argument("--reference-gene-key", metavar="K", help="column of var with its genes")
    for verb in (fit, predict):
        verb.add_argument(
            "--impute",
            metavar="GENES",
            help="which genes: names separated by commas, or a file with one a line (all)",
        )
    predict.add_argument(
        "--log-normalized", action="store_true", help="log-normalised values instead of counts"
    )


def _impute_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.impute import GeneImputer
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    _counts_only(arguments, "split_key")
    imputer = GeneImputer(_source(arguments), quiet=arguments.quiet, **_given(arguments, _RECIPE))
    reference = ("reference", "reference_batch_key", "reference_layer", "reference_gene_key")
    imputer.fit(
        arguments.input,
        genes=_names_in(arguments.impute),
        **_given(arguments, (*_READING, *reference)),
    )
    imputer.save(arguments.out)
    facts = imputer.facts
    what = f"{facts['imputed_genes']} genes from {facts['shared_genes']}"
    if "mean_confidence" in facts:
        what += f", mean confidence {facts['mean_confidence']:.3f}"
    _say_fitted(arguments, what, facts)


def _impute_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.embed import check_output
    from cellplm_jax.tasks.impute import IMPUTED, GeneImputer

    check_output(Path(arguments.out))
    _counts_only(arguments)
    imputer = GeneImputer.load(arguments.model, quiet=arguments.quiet)
    genes = _names_in(arguments.impute)
    messages = imputer.predict_file(
        arguments.input,
        arguments.out,
        genes=genes,
        log_normalized=arguments.log_normalized,
        **_given(arguments, _READING),
    )
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    number = len(imputer.imputed if genes is None else genes)
    _print(f"wrote {arguments.out}: obsm['{IMPUTED}'], {number} genes")


def _add_denoise(commands: Any) -> None:
    _, predict = _add_task(
        commands,
        "denoise",
        "expected counts: tune the model on cells, or predict them",
        fit=_denoise_fit,
        predict=_denoise_predict,
        fit_example="cellplm denoise fit cells.h5ad --model small --out denoiser",
        predict_example="cellplm denoise predict cells.h5ad --model denoiser --out denoised.h5ad",
    )
    predict.add_argument(
        "--log-normalized", action="store_true", help="a second layer of log-normalised values"
    )
    predict.add_argument(
        "--detected", action="store_true", help="counts given that they are not zero"
    )
    predict.add_argument(
        "--zero-shot", action="store_true", help="--model is a pretrained model that was not fitted"
    )


def _denoise_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.denoise import Denoiser
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    _counts_only(arguments)
    denoiser = Denoiser(_source(arguments), quiet=arguments.quiet, **_given(arguments, _RECIPE))
    denoiser.fit(arguments.input, **_given(arguments, _READING))
    denoiser.save(arguments.out)
    _say_fitted(arguments, f"{denoiser.facts['genes']} genes", denoiser.facts)


def _denoise_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.denoise import LAYER, Denoiser
    from cellplm_jax.tasks.embed import check_output

    check_output(Path(arguments.out))
    _counts_only(arguments)
    open_model = Denoiser if arguments.zero_shot else Denoiser.load
    denoiser = open_model(arguments.model, quiet=arguments.quiet)
    messages = denoiser.predict_file(
        arguments.input,
        arguments.out,
        log_normalized=arguments.log_normalized,
        detected=arguments.detected,
        **_given(arguments, _READING),
    )
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    _print(f"wrote {arguments.out}: layers['{LAYER}']")


def _add_perturb(commands: Any) -> None:
    fit, predict = _add_task(
        commands,
        "perturb",
        "what perturbations do to expression: learn it from a screen, or predict it",
        fit=_perturb_fit,
        predict=_perturb_predict,
        fit_example="cellplm perturb fit screen.h5ad --model small --out predictor "
        "--perturbation-key perturbation --control control",
        predict_example="cellplm perturb predict --model predictor --out changes.csv "
        "--perturbation STAT1 --perturbation STAT1+IRF1",
        without=("--split-key", "--cells-per-context"),
        predicts="table",
    )
    fit.add_argument(
        "--perturbation-key",
        required=True,
        metavar="K",
        help="column of obs with the perturbation of every cell; A+B is a combination",
    )
    fit.add_argument(
        "--control", required=True, metavar="NAME", help="its value for the control cells"
    )
    fit.add_argument(
        "--covariate-key",
        metavar="K",
        help="column of obs with groups that respond differently, such as cell types (one group)",
    )
    fit.add_argument(
        "--targets",
        choices=("auto", "genes", "conditions"),
        help="what perturbations are (auto: genes where the model knows them, else conditions)",
    )
    fit.add_argument(
        "--method",
        choices=("ridge", "finetune"),
        help="ridge: solved exactly; finetune: goes on by gradients, as the recipe says (ridge)",
    )
    fit.add_argument(
        "--gene-features",
        choices=("model", "data", "both"),
        help="what describes a target: gene embeddings, or its variation in the data (model; from scratch: data)",
    )
    predict.add_argument(
        "--perturbation",
        action="append",
        metavar="NAME|FILE",
        help="a gene, a combination A+B, a condition, or a file with one a line; may be repeated (all fitted ones)",
    )
    predict.add_argument(
        "--group", metavar="NAME", help="control cells of one group of --covariate-key (all)"
    )
    predict.add_argument(
        "--controls",
        metavar="IN.h5ad",
        help="other control cells, such as those of a new cell type",
    )


def _perturb_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.perturb import PerturbationPredictor
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    predictor = PerturbationPredictor(
        _source(arguments),
        quiet=arguments.quiet,
        **_given(arguments, ("method", "gene_features", *_RECIPE)),
    )
    predictor.fit(
        arguments.input,
        perturbation_key=arguments.perturbation_key,
        control=arguments.control,
        **_given(arguments, ("covariate_key", "targets", *_READING)),
    )
    predictor.save(arguments.out)
    facts = predictor.facts
    line = f"wrote {arguments.out}: {_number(facts['perturbations'], 'perturbation')}"
    if facts["groups"] > 1:
        line += f" in {facts['groups']} groups"
    line += (
        f", {_number(facts['genes'], 'gene')}, {_number(facts['control_cells'], 'control cell')}"
    )
    _print(line)


def _perturb_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.perturb import PerturbationPredictor
    from cellplm_jax.tasks.tables import check_table, read_names, write_table

    check_table(arguments.out)
    reading = _given(arguments, _READING)
    if reading and arguments.controls is None:
        option = f"--{next(iter(reading)).replace('_', '-')}"
        msg = explain(
            f"{option} was given without --controls",
            "a file that it is about",
            f"Add --controls IN.h5ad, or leave out {option}",
        )
        raise InputError(msg)
    predictor = PerturbationPredictor.load(arguments.model, quiet=arguments.quiet)
    names = predictor.perturbations
    if arguments.perturbation is not None:
        names = [
            name for text in arguments.perturbation for name in read_names(text, separator=None)
        ]
    found = predictor.predict(
        list(dict.fromkeys(names)), group=arguments.group, controls=arguments.controls, **reading
    )
    if not arguments.quiet:
        for message in found.messages:
            _print(message, sys.stderr)
    write_table(found.tidy(), arguments.out)
    kinds = ", ".join(f"{number} {kind}" for kind, number in found.known.value_counts().items())
    _print(
        f"wrote {arguments.out}: {_number(len(found.known), 'perturbation')} ({kinds}), "
        f"{_number(found.change.shape[1], 'gene')} each"
    )


def _number(count: int, what: str) -> str:
    """Return a count and what is counted, such as ``"2 genes"``."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def _add_samples(commands: Any) -> None:
    fit, predict = _add_task(
        commands,
        "samples",
        "labels of tissue samples: learn them from labelled samples, or predict them",
        fit=_samples_fit,
        predict=_samples_predict,
        fit_example="cellplm samples fit cohort.h5ad --model small --out classifier "
        "--sample-key donor --label-key disease",
        predict_example="cellplm samples predict cells.h5ad --model classifier --out labelled.h5ad --table samples.csv",
        without=("--batch-key", "--split-key", "--epochs", "--patience", "--learning-rate",
                 "--freeze", "--adapter-rank", "--validation-fraction"),
    )  # fmt: skip
    fit.add_argument(
        "--sample-key",
        required=True,
        metavar="K",
        help="column of obs naming the tissue sample of every cell",
    )
    fit.add_argument(
        "--label-key", required=True, metavar="K", help="column of obs with the label of its sample"
    )
    predict.add_argument(
        "--sample-key",
        metavar="K",
        help="column of obs naming the tissue sample of every cell (as in fit)",
    )
    predict.add_argument(
        "--table", metavar="OUT.csv", help="also write a row a sample; .csv or .tsv"
    )


def _samples_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.samples import SampleClassifier
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    classifier = SampleClassifier(
        _source(arguments), quiet=arguments.quiet, **_given(arguments, _RECIPE)
    )
    classifier.fit(
        arguments.input,
        sample_key=arguments.sample_key,
        label_key=arguments.label_key,
        **_given(arguments, _READING),
    )
    classifier.save(arguments.out)
    facts = classifier.facts
    _print(
        f"wrote {arguments.out}: {_number(len(classifier.labels), 'label')} from {_number(facts['samples'], 'sample')} "
        f"of {_number(facts['cells'], 'cell')}, cross-entropy of left-out samples "
        f"{facts['left_out_samples_cross_entropy']:.3f} (of the labels' frequencies "
        f"{facts['cross_entropy_of_frequencies']:.3f})"
    )


def _samples_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.embed import check_output
    from cellplm_jax.tasks.samples import LABEL, SampleClassifier
    from cellplm_jax.tasks.tables import check_table, write_table

    check_output(Path(arguments.out))
    if arguments.table is not None:
        check_table(arguments.table)
    classifier = SampleClassifier.load(arguments.model, quiet=arguments.quiet)
    table, messages = classifier.predict_file(
        arguments.input, arguments.out, **_given(arguments, ("sample_key", *_READING))
    )
    if arguments.table is not None:
        write_table(table, arguments.table, index=True)
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    counts = table["label"].value_counts()
    found = ", ".join(f"{number} {label}" for label, number in counts.items() if number)
    _print(f"wrote {arguments.out}: obs['{LABEL}'], {_number(len(table), 'sample')} ({found})")
    if arguments.table is not None:
        _print(f"wrote {arguments.table}")


def _add_cluster(commands: Any) -> None:
    parser = _command(
        commands,
        "cluster",
        _cluster,
        "cluster the cells of an .h5ad file: neighbours and Leiden on an embedding, scores, a picture",
        "cellplm cluster cells.h5ad --model small --out clustered.h5ad --label-key cell_type --picture umap.png",
    )
    parser.add_argument("input", metavar="IN.h5ad", help="cells, embedded or with raw counts")
    parser.add_argument(
        "--model", metavar="M", help="what to embed with, where the embedding is not there"
    )
    parser.add_argument("--out", required=True, metavar="OUT.h5ad", help="the input plus clusters")
    parser.add_argument(
        "--use-rep", default="X_cellplm", metavar="K", help="embedding in obsm (X_cellplm)"
    )
    parser.add_argument(
        "--resolution", type=float, default=1.0, metavar="F", help="higher: more clusters (1)"
    )
    parser.add_argument(
        "--neighbors", type=_positive, default=15, metavar="N", help="of the graph (15)"
    )
    parser.add_argument(
        "--key-added", default="cellplm_cluster", metavar="K", help="column of obs to write"
    )
    parser.add_argument(
        "--batch-key",
        metavar="K",
        help="column of obs: contexts of the embedding, and mixing scores",
    )
    parser.add_argument(
        "--label-key", metavar="K", help="column of obs with known types: print scores"
    )
    parser.add_argument(
        "--picture", metavar="PNG", help="draw a UMAP, and write obsm['X_umap'] as well"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no report")


def _cluster(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.cluster import cluster_file, draw_clusters, known_columns
    from cellplm_jax.tasks.embed import check_output

    check_output(Path(arguments.out))
    if arguments.picture:
        check_output(Path(arguments.picture))
    columns = [key for key in (arguments.label_key, arguments.batch_key) if key]
    known_columns(arguments.input, columns)
    cells, messages = cluster_file(
        arguments.input,
        arguments.out,
        arguments.model,
        use_rep=arguments.use_rep,
        resolution=arguments.resolution,
        neighbors=arguments.neighbors,
        key_added=arguments.key_added,
        seed=arguments.seed,
        batch_key=arguments.batch_key,
        umap=arguments.picture is not None,
        quiet=arguments.quiet,
    )
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    number = cells.obs[arguments.key_added].nunique()
    _print(f"wrote {arguments.out}: obs['{arguments.key_added}'], {number} clusters")
    if arguments.label_key:
        from cellplm_jax.evaluate.embedding import clustering_scores, knn_accuracy, silhouette
        from cellplm_jax.tasks.contexts import labels_of

        labels = labels_of(cells.obs, arguments.label_key)
        known = [label is not None for label in labels]
        labels, embedding = labels[known].astype(str), cells.obsm[arguments.use_rep][known]
        scores = clustering_scores(labels, cells.obs[arguments.key_added][known])
        scores["knn_accuracy"] = knn_accuracy(embedding, labels, neighbors=arguments.neighbors)
        scores["label_silhouette"] = silhouette(embedding, labels)
        _print_numbers(scores)
    if arguments.batch_key and cells.obs[arguments.batch_key].nunique() > 1:
        from cellplm_jax.evaluate.embedding import batch_mixing, kbet

        batches = cells.obs[arguments.batch_key]
        embedding = cells.obsm[arguments.use_rep]
        _print_numbers(
            {"ilisi": batch_mixing(embedding, batches), "kbet": kbet(embedding, batches)}
        )
    if arguments.picture:
        draw_clusters(cells, [arguments.key_added, *columns], arguments.picture)
        _print(f"wrote {arguments.picture}")


def _print_numbers(scores: dict[str, float]) -> None:
    _print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def _add_integrate(commands: Any) -> None:
    fit, predict = _add_task(
        commands,
        "integrate",
        "an embedding without batch effects: tune the model on several batches, or embed with it",
        fit=_integrate_fit,
        predict=_integrate_predict,
        fit_example="cellplm integrate fit cells.h5ad --batch-key batch --model small --out integrator",
        predict_example="cellplm integrate predict cells.h5ad --model integrator --out integrated.h5ad",
    )
    fit.add_argument(
        "--strength", type=float, default=1.0, metavar="F", help="mixing against structure (1)"
    )
    predict.add_argument(
        "--label-key", metavar="K", help="column of obs with known types: print scores"
    )


def _integrate_only(arguments: argparse.Namespace, *others: str) -> None:
    """Refuse options that all tasks have and integration cannot use."""
    if arguments.values not in (None, "counts"):
        _counts_only(arguments)
    arguments.values = None
    for name in others:
        if getattr(arguments, name, None) is not None:
            option = f"--{name.replace('_', '-')}"
            msg = explain(
                f"{option} was given to integrate {arguments.verb}",
                "the options it has: all cells are fitted, for all epochs, without coordinates",
                f"Leave {option} out",
            )
            raise InputError(msg)


def _integrate_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.integrate import BatchIntegrator
    from cellplm_jax.train.checkpoint import check_new_directory

    check_new_directory(arguments.out)
    unused = ("spatial_key", "split_key", "patience", "validation_fraction")
    _integrate_only(arguments, *unused)
    if arguments.batch_key is None:
        msg = explain(
            "integrate fit was given no --batch-key",
            "the column of obs that tells batches apart",
            "Add --batch-key",
        )
        raise InputError(msg)
    integrator = BatchIntegrator(
        _source(arguments),
        strength=arguments.strength,
        quiet=arguments.quiet,
        **_given(arguments, _RECIPE),
    )
    integrator.fit(arguments.input, **_given(arguments, _READING))
    integrator.save(arguments.out)
    _say_fitted(arguments, f"{integrator.facts['batches']} batches", integrator.facts)


def _integrate_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.embed import check_output
    from cellplm_jax.tasks.integrate import KEY, BatchIntegrator

    check_output(Path(arguments.out))
    _integrate_only(arguments, "spatial_key")
    integrator = BatchIntegrator.load(arguments.model, quiet=arguments.quiet)
    reading = _given(arguments, ("layer", "gene_key", "cells_per_context"))
    messages = integrator.predict_file(arguments.input, arguments.out, **reading)
    if not arguments.quiet:
        for message in messages:
            _print(message, sys.stderr)
    _print(f"wrote {arguments.out}: obsm['{KEY}']")
    if arguments.label_key:
        keys = {**reading, **_given(arguments, ("batch_key", "label_key"))}
        _print_numbers(integrator.score(arguments.input, **keys))


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "convert a published PyTorch checkpoint, or write one back",
        "cellplm convert 20230926_85M.best.ckpt --config 20230926_85M.config.json --out model\n"
        "  cellplm convert model --to-torch back/20230926_85M",
    )
    parser.add_argument(
        "input", metavar="CKPT|DIR", help="PREFIX.best.ckpt, or a checkpoint directory"
    )
    parser.add_argument(
        "--config", metavar="JSON", help="PREFIX.config.json published with the weights"
    )
    parser.add_argument("--out", metavar="DIR", help="new checkpoint directory")
    parser.add_argument(
        "--to-torch", metavar="PREFIX", help="write PREFIX.best.ckpt and PREFIX.config.json"
    )


def _convert(arguments: argparse.Namespace) -> None:
    from cellplm_jax.interop import convert

    if (arguments.to_torch is None) == (arguments.out is None):
        msg = explain(
            "convert was given "
            + ("both" if arguments.out else "neither")
            + " --out and --to-torch",
            "exactly one of them",
            "Give --out DIR to read a published checkpoint, or --to-torch PREFIX to write one",
        )
        raise InputError(msg)
    if arguments.to_torch is not None:
        for path in convert.to_published(arguments.input, arguments.to_torch):
            _print(f"wrote {path}")
        return
    if arguments.config is None:
        msg = explain(
            "convert was given no --config",
            "the PREFIX.config.json published with the weights",
            "Add --config PREFIX.config.json",
        )
        raise InputError(msg)
    for line in convert.from_published(arguments.input, arguments.config, arguments.out):
        _print(line)


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write a model as one file that embeds cells through JAX alone, on cpu, cuda and tpu",
        "cellplm export small --out small.cellplm",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a bundled model")
    parser.add_argument("--out", required=True, metavar="FILE", help="the artifact to write")


def _export(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.export import export_model

    card = export_model(arguments.model, arguments.out)
    size = Path(arguments.out).expanduser().stat().st_size / 1e6
    _print(
        f"{arguments.out}: {card['model']}, {card['genes']} genes, {size:.1f} MB, for "
        f"{', '.join(card['platforms'])}; JAX {card['jax']} wrote it."
    )


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        _info,
        "show a model (configuration, parameters by module, genes, training history) or a corpus",
        "cellplm info demo/model\n  cellplm info corpus --verify",
    )
    parser.add_argument(
        "model",
        metavar="MODEL|CORPUS",
        help="checkpoint directory, pretraining work directory, or corpus",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read a whole corpus and compare its checksums"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _info(arguments: argparse.Namespace) -> None:
    from cellplm_jax.data.corpus import is_corpus
    from cellplm_jax.tasks.info import (
        describe,
        describe_corpus,
        describe_corpus_text,
        describe_text,
    )

    if is_corpus(arguments.model):
        facts = describe_corpus(arguments.model, verify=arguments.verify, quiet=arguments.json)
        _print(json.dumps(facts, indent=2) if arguments.json else describe_corpus_text(facts))
        return
    if arguments.verify:
        msg = explain(
            f"--verify was given for '{arguments.model}', which is not a corpus",
            "a corpus made by cellplm prepare",
            "Leave out --verify, or check the path",
        )
        raise InputError(msg)
    facts = describe(arguments.model)
    _print(json.dumps(facts, indent=2) if arguments.json else describe_text(facts))


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "compile the training step for a TPU slice without one: memory, arithmetic, communication, time",
        "cellplm plan --config configs/pretrain.py:85m --topology v5e:16x16\n"
        "  cellplm plan --config 85m --topology v5p-256 --mesh data=128 --set precision=bfloat16 --json\n"
        "\nexit status: 0 it fits; 3 nothing that was tried does",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="configuration, Python or JSON, or a preset's name",
    )
    parser.add_argument(
        "--topology", required=True, metavar="T", help="slice, such as v5e:16x16 or v5p-256"
    )
    parser.add_argument(
        "--mesh", metavar="M", help="the mesh, such as data=64,cells=4 (the best of some)"
    )
    parser.add_argument(
        "--rows",
        type=_positive,
        metavar="N",
        help="rows of a batch (the configuration's, raised to a multiple of data)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a value of the configuration, such as rematerialize=true; may be repeated",
    )
    parser.add_argument(
        "--genes", type=_positive, metavar="N", help="size of the vocabulary (19374)"
    )
    parser.add_argument(
        "--nonzeros-per-cell", type=_positive, metavar="N", help="stored counts of a cell (1500)"
    )
    parser.add_argument(
        "--batches", type=_positive, metavar="N", help="tissue samples in the corpus (12596)"
    )
    parser.add_argument(
        "--datasets", type=_positive, metavar="N", help="datasets in the corpus (484)"
    )
    parser.add_argument(
        "--tries", type=_positive, default=3, metavar="N", help="meshes compiled at most (3)"
    )
    parser.add_argument(
        "--timeout", type=_positive, metavar="S", help="seconds a compilation may take"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _plan(arguments: argparse.Namespace) -> int:
    from cellplm_jax.plan import search

    config = search.complete(
        search.change(search.load_config(arguments.config), arguments.set),
        genes=arguments.genes,
        batches=arguments.batches,
        datasets=arguments.datasets,
    )
    report = search.plan(
        config,
        arguments.topology,
        mesh=arguments.mesh,
        rows=arguments.rows,
        nonzeros_per_cell=arguments.nonzeros_per_cell or search.NONZEROS_PER_CELL,
        tries=arguments.tries,
        timeout=arguments.timeout,
        say=None if arguments.quiet else lambda text: _print(f"plan: {text}", sys.stderr),
    )
    _print(json.dumps(report, indent=2) if arguments.json else search.plan_text(report))
    if report["best"] is None:
        _print(f"cellplm plan: {report['reason']}", sys.stderr)
        return 3
    return 0


def _print(text: str, stream: Any = None) -> None:
    stream = sys.stdout if stream is None else stream
    stream.write(f"{text}\n")


def _silence_abandoned_reads() -> None:
    """Keep standard error to one message where a checkpoint is damaged.

    The first failed read raises; the others of the same checkpoint end on threads whose event loop is gone by then.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit status.
    """
    arguments = build_parser().parse_args(argv)
    _silence_abandoned_reads()
    try:
        return arguments.run(arguments) or 0
    except CellPLMError as error:
        _print(f"cellplm {arguments.command}: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        _print(f"cellplm {arguments.command}: interrupted", sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of a pipe went away (head, less); nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
