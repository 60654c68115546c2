"""Commands of the estimators: ``annotate``, ``impute``, ``denoise``, ``perturb`` and ``samples``."""

from __future__ import annotations

import argparse
from typing import Any

from cellplm_jax.cli.options import (
    READING,
    RECIPE,
    add_task,
    counts_only,
    names_in,
    passed_options,
    source,
)
from cellplm_jax.cli.output import (
    check_new_file,
    check_new_folder,
    check_report,
    fitted_line,
    number_of,
    print_result,
    write_page,
)
from cellplm_jax.errors import InputError


def add_annotate(commands: Any) -> None:
    """Add ``annotate``."""
    fit, _ = add_task(
        commands,
        "annotate",
        "cell types: fit to labelled cells, or predict them",
        fit=_annotate_fit,
        predict=_annotate_predict,
        fit_example="cellplm annotate fit labelled.h5ad --model small --out annotator --label-key cell_type",
        predict_example="cellplm annotate predict cells.h5ad --model annotator --out annotated.h5ad",
        fit_report="the loss curve, and scores, confusion matrix and calibration on validation cells",
        predict_report="cells per type, confidences, and a UMAP of the fine-tuned embedding, stored in obsm['X_umap']",
    )
    fit.add_argument("--label-key", required=True, metavar="K", help="column of obs with the types")
    fit.add_argument(
        "--method",
        choices=("finetune", "neighbors"),
        default="finetune",
        help="neighbors: labels of the nearest cells, without training (finetune)",
    )
    fit.add_argument(
        "--unknown-rate",
        type=float,
        metavar="F",
        help="share of known cells that may be labelled 'unknown'; 0: no detection (0.05)",
    )
    fit.add_argument(
        "--unknown-threshold",
        type=float,
        metavar="F",
        help="cells with a lower confidence are also labelled 'unknown' (no such limit)",
    )
    fit.add_argument(
        "--balanced", action="store_true", help="give all labels the same total weight"
    )
    fit.add_argument(
        "--transductive",
        action="store_true",
        help="also use unlabelled cells in the training contexts",
    )


def _annotate_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.annotate import CellTypeAnnotator

    check_new_folder(arguments)
    annotator = CellTypeAnnotator(
        source(arguments),
        method=arguments.method,
        unknown_threshold=arguments.unknown_threshold,
        class_weights="balanced" if arguments.balanced else None,
        quiet=arguments.quiet,
        **passed_options(arguments, ("unknown_rate", *RECIPE)),
    )
    annotator.fit(
        arguments.input,
        label_key=arguments.label_key,
        transductive=arguments.transductive,
        **passed_options(arguments, READING),
    )
    annotator.save(arguments.out)
    facts = annotator.facts
    what = f"{len(annotator.labels)} cell types"
    if scores := annotator.validation_scores:
        first, *rest = (f"{name} {score:.3f}" for name, score in scores.items())
        what += f", validation macro F1 {first}" + (f" ({', '.join(rest)})" if rest else "")
    write_page(arguments, "annotator", annotator)
    line = fitted_line(arguments, what, facts)
    print_result(arguments, [line], {"wrote": [arguments.out], "labels": annotator.labels, **facts})


def _annotate_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.annotate import LABEL, CellTypeAnnotator

    check_new_file(arguments)
    annotator = CellTypeAnnotator.load(arguments.model, quiet=arguments.quiet)
    messages = annotator.predict_file(
        arguments.input,
        arguments.out,
        umap=arguments.report is not None,
        **passed_options(arguments, READING),
    )
    write_page(arguments, "annotated", arguments.out, annotator)
    print_result(
        arguments,
        [f"wrote {arguments.out}: obs['{LABEL}'], {len(annotator.labels)} cell types"],
        {"wrote": [arguments.out], "column": LABEL, "labels": annotator.labels},
        messages=messages,
    )


def add_impute(commands: Any) -> None:
    """Add ``impute``."""
    fit, predict = add_task(
        commands,
        "impute",
        "genes missing from a spatial panel: fit to a reference, or predict them",
        fit=_impute_fit,
        predict=_impute_predict,
        fit_example="cellplm impute fit spatial.h5ad --reference cells.h5ad --model small --out imputer",
        predict_example="cellplm impute predict spatial.h5ad --model imputer --out imputed.h5ad",
        fit_report="the loss curve, and the confidence of every gene",
        predict_report="the imputed genes, and maps of imputed and measured genes if cells have coordinates",
    )
    fit.add_argument(
        "--reference",
        metavar="REF.h5ad",
        help="cells with more measured genes (default: batches of the input with more genes)",
    )
    fit.add_argument(
        "--reference-batch-key", metavar="K", help="column of obs of the reference (one batch)"
    )
    fit.add_argument("--reference-layer", metavar="L", help="layer with its counts (detected)")
    fit.add_argument("--reference-gene-key", metavar="K", help="column of var with its genes")
    for verb in (fit, predict):
        verb.add_argument(
            "--impute",
            metavar="GENES",
            help="genes: names separated by commas, or a file with one per line (all)",
        )
    predict.add_argument(
        "--log-normalized", action="store_true", help="log-normalised values instead of counts"
    )
    predict.add_argument(
        "--coverage",
        type=float,
        metavar="F",
        help="also write prediction intervals with this coverage, such as 0.9 (none)",
    )


def _impute_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.impute import GeneImputer

    check_new_folder(arguments)
    counts_only(arguments, "split_key")
    imputer = GeneImputer(
        source(arguments), quiet=arguments.quiet, **passed_options(arguments, RECIPE)
    )
    reference = ("reference", "reference_batch_key", "reference_layer", "reference_gene_key")
    imputer.fit(
        arguments.input,
        genes=names_in(arguments.impute),
        **passed_options(arguments, (*READING, *reference)),
    )
    imputer.save(arguments.out)
    facts = imputer.facts
    what = f"{facts['imputed_genes']} genes from {facts['shared_genes']}"
    if "mean_confidence" in facts:
        what += f", mean confidence {facts['mean_confidence']:.3f} over {facts['genes_with_confidence']} of them"
    if "validation" in facts:
        scores = ", ".join(
            f"{name} {facts['validation'][name].get('pearson', float('nan')):.3f}"
            for name in ("pooled", "network", "ridge")
        )
        what += f" ({scores}; used: {facts['method']})"
    write_page(arguments, "imputer", imputer)
    line = fitted_line(arguments, what, facts)
    print_result(arguments, [line], {"wrote": [arguments.out], "genes": imputer.imputed, **facts})


def _impute_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.impute import IMPUTED, GeneImputer

    check_new_file(arguments)
    counts_only(arguments)
    imputer = GeneImputer.load(arguments.model, quiet=arguments.quiet)
    genes = names_in(arguments.impute)
    messages = imputer.predict_file(
        arguments.input,
        arguments.out,
        genes=genes,
        log_normalized=arguments.log_normalized,
        coverage=arguments.coverage,
        **passed_options(arguments, READING),
    )
    number = len(imputer.imputed if genes is None else genes)
    write_page(arguments, "imputed", arguments.out, imputer, passed_options(arguments, READING))
    print_result(
        arguments,
        [f"wrote {arguments.out}: obsm['{IMPUTED}'], {number} genes"],
        {"wrote": [arguments.out], "key_added": IMPUTED, "genes": number},
        messages=messages,
    )


def add_denoise(commands: Any) -> None:
    """Add ``denoise``."""
    _, predict = add_task(
        commands,
        "denoise",
        "expected counts: fit to cells, or predict them",
        fit=_denoise_fit,
        predict=_denoise_predict,
        fit_example="cellplm denoise fit cells.h5ad --model small --out denoiser",
        predict_example="cellplm denoise predict cells.h5ad --model denoiser --out denoised.h5ad",
        fit_report="the loss curve, and errors of held-out counts",
        predict_report="some genes before and after denoising on a UMAP or in the tissue, and the means of all genes",
    )
    predict.add_argument(
        "--log-normalized",
        action="store_true",
        help="add a second layer with log-normalised values",
    )
    predict.add_argument(
        "--detected", action="store_true", help="counts conditional on being non-zero"
    )
    predict.add_argument(
        "--own-counts",
        action="store_true",
        help="combine the prediction with the cell's own counts (posterior mean)",
    )
    predict.add_argument(
        "--storage",
        choices=("float32", "float16", "sparse"),
        default="float32",
        help="of the layer; sparse: only the largest values, rounded, about the size of the counts (float32)",
    )
    predict.add_argument(
        "--show",
        metavar="GENES",
        help="genes drawn in the report: names separated by commas, or a file with one per line "
        "(the two that vary most between cells)",
    )
    predict.add_argument(
        "--zero-shot", action="store_true", help="--model is a pretrained model without a fit"
    )


def _denoise_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.denoise import Denoiser

    check_new_folder(arguments)
    counts_only(arguments)
    denoiser = Denoiser(
        source(arguments), quiet=arguments.quiet, **passed_options(arguments, RECIPE)
    )
    denoiser.fit(arguments.input, **passed_options(arguments, READING))
    denoiser.save(arguments.out)
    write_page(arguments, "fit", denoiser)
    line = fitted_line(arguments, f"{denoiser.facts['genes']} genes", denoiser.facts)
    scores = denoiser.messages[-1]
    print_result(arguments, [line, scores], {"wrote": [arguments.out], **denoiser.facts})


def _denoise_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.denoise import LAYER, Denoiser
    from cellplm_jax.tasks.denoise_view import check_genes

    check_new_file(arguments)
    counts_only(arguments)
    shown = names_in(arguments.show)
    if shown and arguments.report is None:
        raise InputError(
            "--show requires --report",
            "a report to show genes in",
            "Add --report FILE.html, or omit --show",
        )
    open_model = Denoiser if arguments.zero_shot else Denoiser.load
    denoiser = open_model(arguments.model, quiet=arguments.quiet)
    if shown:
        check_genes(denoiser, arguments.input, shown, **passed_options(arguments, READING))
    *messages, scores = denoiser.predict_file(
        arguments.input,
        arguments.out,
        log_normalized=arguments.log_normalized,
        detected=arguments.detected,
        own_counts=arguments.own_counts,
        storage=arguments.storage,
        **passed_options(arguments, READING),
    )
    write_page(
        arguments, "denoised", arguments.out, denoiser, passed_options(arguments, READING), shown
    )
    print_result(
        arguments,
        [f"wrote {arguments.out}: layers['{LAYER}']", scores],
        {
            "wrote": [arguments.out],
            "layer": LAYER,
            "detected": arguments.detected,
            "scores": scores,
        },
        messages=messages,
    )


def add_perturb(commands: Any) -> None:
    """Add ``perturb``."""
    fit, predict = add_task(
        commands,
        "perturb",
        "expression changes of perturbations: fit to a screen, or predict them",
        fit=_perturb_fit,
        predict=_perturb_predict,
        fit_example="cellplm perturb fit screen.h5ad --model small --out predictor "
        "--perturbation-key perturbation",
        predict_example="cellplm perturb predict --model predictor --out changes.csv "
        "--perturbation STAT1 --perturbation STAT1+IRF1",
        fit_report="left-out perturbations, predicted and measured, with the error of three baselines",
        predict_report="the genes with the largest changes, and how specific they are",
        without=("--split-key", "--cells-per-context"),
        predicts="table",
    )
    fit.add_argument(
        "--perturbation-key",
        required=True,
        metavar="K",
        help="column of obs with the perturbation of every cell; A+B, A_B, A;B or A|B is a combination",
    )
    fit.add_argument(
        "--control",
        metavar="NAME",
        help="its value for the control cells (a well-known name, such as ctrl or non-targeting)",
    )
    fit.add_argument(
        "--covariate-key",
        metavar="K",
        help="column of obs with groups with different responses, such as cell types (one group)",
    )
    fit.add_argument(
        "--targets",
        choices=("auto", "genes", "conditions"),
        help="kind of perturbations (auto: genes if in the vocabulary, else conditions)",
    )
    fit.add_argument(
        "--method",
        choices=("ridge", "finetune"),
        help="ridge: exact solution; finetune: continue by gradient descent with the recipe (ridge)",
    )
    fit.add_argument(
        "--gene-features",
        choices=("model", "data", "both"),
        help="features of a target: gene embeddings, or its variation in the data (model; from scratch: data)",
    )
    predict.add_argument(
        "--perturbation",
        action="append",
        metavar="NAME|FILE",
        help="gene, combination A+B, condition, or a file with one per line; repeatable (all fitted ones)",
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

    check_new_folder(arguments)
    predictor = PerturbationPredictor(
        source(arguments),
        quiet=arguments.quiet,
        **passed_options(arguments, ("method", "gene_features", *RECIPE)),
    )
    predictor.fit(
        arguments.input,
        perturbation_key=arguments.perturbation_key,
        control=arguments.control,
        **passed_options(arguments, ("covariate_key", "targets", *READING)),
    )
    predictor.save(arguments.out)
    facts = predictor.facts
    line = f"wrote {arguments.out}: {number_of(facts['perturbations'], 'perturbation')}"
    if facts["groups"] > 1:
        line += f" in {facts['groups']} groups"
    line += f", {number_of(facts['genes'], 'gene')}, {number_of(facts['control_cells'], 'control cell')}"
    lines = [line]
    if predictor.left_out is not None:
        lines.append(
            f"left-out perturbations: RMSE {facts['left_out_rmse']:.4f}, additive "
            f"{facts['left_out_rmse_additive']:.4f}, mean of the others {facts['left_out_rmse_mean_change']:.4f}, "
            f"no change {facts['left_out_rmse_no_change']:.4f}"
        )
    write_page(arguments, "effects.predictor", predictor)
    print_result(arguments, lines, {"wrote": [arguments.out], **facts})


def _perturb_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.perturb import PerturbationPredictor
    from cellplm_jax.tasks.tables import check_table, read_names, write_table

    check_table(arguments.out)
    check_report(arguments)
    reading = passed_options(arguments, READING)
    if reading and arguments.controls is None:
        option = f"--{next(iter(reading)).replace('_', '-')}"
        raise InputError(
            f"{option} requires --controls",
            "the file that the option applies to",
            f"Add --controls IN.h5ad, or omit {option}",
        )
    predictor = PerturbationPredictor.load(arguments.model, quiet=arguments.quiet)
    names = predictor.perturbations
    if arguments.perturbation is not None:
        names = [
            name for text in arguments.perturbation for name in read_names(text, separator=None)
        ]
    prediction = predictor.predict(
        list(dict.fromkeys(names)), group=arguments.group, controls=arguments.controls, **reading
    )
    write_table(prediction.tidy(), arguments.out)
    kinds = ", ".join(
        f"{number} {kind}" for kind, number in prediction.known.value_counts().items()
    )
    line = (
        f"wrote {arguments.out}: {number_of(len(prediction.known), 'perturbation')} ({kinds}), "
        f"{number_of(prediction.change.shape[1], 'gene')} each"
    )
    write_page(arguments, "effects.perturbed", prediction, predictor)
    facts = {
        "wrote": [arguments.out],
        "known": prediction.known.to_dict(),
        "genes": prediction.change.shape[1],
    }
    print_result(arguments, [line], facts, messages=prediction.messages)


def add_samples(commands: Any) -> None:
    """Add ``samples``."""
    fit, predict = add_task(
        commands,
        "samples",
        "labels of tissue samples: fit to labelled samples, or predict them",
        fit=_samples_fit,
        predict=_samples_predict,
        fit_example="cellplm samples fit cohort.h5ad --model small --out classifier "
        "--sample-key donor --label-key disease",
        predict_example="cellplm samples predict cells.h5ad --model classifier --out labelled.h5ad --table samples.csv",
        fit_report="the error on left-out samples, and the shift of every cell type with its p-value",
        predict_report="one row per sample, and the contributions of its cells by type",
        without=("--batch-key", "--split-key", "--epochs", "--patience", "--learning-rate",
                 "--freeze", "--adapter-rank", "--validation-fraction"),
    )  # fmt: skip
    fit.add_argument(
        "--sample-key",
        required=True,
        metavar="K",
        help="column of obs with the tissue sample of every cell",
    )
    fit.add_argument(
        "--label-key", required=True, metavar="K", help="column of obs with the sample label"
    )
    fit.add_argument(
        "--type-key",
        metavar="K",
        help="column of obs with cell types, which contributions are relative to (clusters)",
    )
    predict.add_argument(
        "--sample-key",
        metavar="K",
        help="column of obs with the tissue sample of every cell (as in fit)",
    )
    predict.add_argument(
        "--table", metavar="OUT.csv", help="also write one row per sample; .csv or .tsv"
    )


def _samples_fit(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.samples import SampleClassifier

    check_new_folder(arguments)
    classifier = SampleClassifier(
        source(arguments), quiet=arguments.quiet, **passed_options(arguments, RECIPE)
    )
    classifier.fit(
        arguments.input,
        sample_key=arguments.sample_key,
        label_key=arguments.label_key,
        **passed_options(arguments, ("type_key", *READING)),
    )
    classifier.save(arguments.out)
    facts = classifier.facts
    line = (
        f"wrote {arguments.out}: {number_of(len(classifier.labels), 'label')} from "
        f"{number_of(facts['samples'], 'sample')} of {number_of(facts['cells'], 'cell')}, "
        "cross-entropy of left-out samples "
        f"{facts['left_out_samples_cross_entropy']:.3f} (of the labels' frequencies "
        f"{facts['cross_entropy_of_frequencies']:.3f})"
    )
    lines = [
        line,
        f"p of permuted labels: mean latent {facts['p_latent']:.3g}, proportions of types "
        f"{facts['p_proportions']:.3g}, pseudobulk {facts['p_pseudobulk']:.3g}"
        + (f", most shifted type {facts['p_shift']:.3g}" if "p_shift" in facts else ""),
    ]
    write_page(arguments, "effects.classifier", classifier)
    print_result(arguments, lines, {"wrote": [arguments.out], "labels": classifier.labels, **facts})


def _samples_predict(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.samples import LABEL, SampleClassifier
    from cellplm_jax.tasks.tables import check_table, write_table

    check_new_file(arguments)
    if arguments.table is not None:
        check_table(arguments.table)
    classifier = SampleClassifier.load(arguments.model, quiet=arguments.quiet)
    table, messages = classifier.predict_file(
        arguments.input, arguments.out, **passed_options(arguments, ("sample_key", *READING))
    )
    if arguments.table is not None:
        write_table(table, arguments.table, index=True)
    counts = table["label"].value_counts()
    labels = ", ".join(f"{number} {label}" for label, number in counts.items() if number)
    lines = [f"wrote {arguments.out}: obs['{LABEL}'], {number_of(len(table), 'sample')} ({labels})"]
    wrote = [arguments.out]
    if arguments.table is not None:
        lines.append(f"wrote {arguments.table}")
        wrote.append(arguments.table)
    write_page(arguments, "effects.samples", arguments.out, table, classifier)
    facts = {"wrote": wrote, "samples": table.to_dict(orient="index")}
    print_result(arguments, lines, facts, messages=messages)
