"""Commands of the estimators: ``annotate``, ``impute``, ``denoise``, ``perturb``, ``samples`` and ``integrate``."""

from __future__ import annotations

import argparse
from typing import Any

from cellplm_jax.cli.options import READING, add_options, counts_only, names_in, passed_options
from cellplm_jax.cli.output import (
    check_report,
    fitted_line,
    number_of,
    print_result,
    scores_line,
    write_page,
)
from cellplm_jax.cli.tasks import Result, Task, passed_to
from cellplm_jax.errors import InputError


class Annotate(Task):
    """Commands of :class:`cellplm_jax.CellTypeAnnotator`."""

    name = "annotate"
    estimator = "cellplm_jax.tasks.annotate:CellTypeAnnotator"
    help = "cell types: fit to labelled cells, or predict them"
    examples = (
        "cellplm annotate fit labelled.h5ad --model small --out annotator --label-key cell_type",
        "cellplm annotate predict cells.h5ad --model annotator --out annotated.h5ad",
    )
    reports = (
        "the loss curve, and scores, confusion matrix and calibration on validation cells",
        "cells per type, confidences, and a UMAP of the fine-tuned embedding, stored in obsm['X_umap']",
    )
    page = "annotator"

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""
        add_options(
            fit,
            """
            --label-key! K: column of obs with the types
            --method finetune|neighbors: neighbors: labels of the nearest cells, without training (finetune)
            --unknown-rate F: share of known cells that may be labelled 'unknown'; 0: no detection (0.05)
            --unknown-threshold F: cells with a lower confidence are also labelled 'unknown' (no such limit)
            --balanced: give all labels the same total weight
            --transductive: also use unlabelled cells in the training contexts
            """,
            method={"default": "finetune"},
            balanced={"action": "store_const", "const": "balanced", "dest": "class_weights"},
        )

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return the scores on validation cells."""
        what = f"{len(estimator.labels)} cell types"
        # Absent without validation cells, such as with few labelled cells.
        if scores := estimator.validation_scores:
            first, *rest = (f"{name} {score:.3f}" for name, score in scores.items())
            what += f", validation macro F1 {first}" + (f" ({', '.join(rest)})" if rest else "")
        return [fitted_line(arguments, what, estimator.facts)], {"labels": estimator.labels}

    def check(self, arguments: argparse.Namespace) -> None:
        """Add a UMAP to the file if the report shows it."""
        # The report draws it; stored in the file as well, it is computed once.
        arguments.umap = arguments.report is not None

    def predicted(self, arguments: argparse.Namespace, estimator: Any, result: Any) -> None:
        """Print the written column."""
        from cellplm_jax.tasks.annotate import LABEL

        write_page(arguments, "annotated", arguments.out, estimator)
        print_result(
            arguments,
            [f"wrote {arguments.out}: obs['{LABEL}'], {len(estimator.labels)} cell types"],
            {"wrote": [arguments.out], "column": LABEL, "labels": estimator.labels},
            messages=result,
        )


class Impute(Task):
    """Commands of :class:`cellplm_jax.GeneImputer`."""

    name = "impute"
    estimator = "cellplm_jax.tasks.impute:GeneImputer"
    help = "genes missing from a spatial panel: fit to a reference, or predict them"
    examples = (
        "cellplm impute fit spatial.h5ad --reference cells.h5ad --model small --out imputer",
        "cellplm impute predict spatial.h5ad --model imputer --out imputed.h5ad",
    )
    reports = (
        "the loss curve, and the confidence of every gene",
        "the imputed genes, and maps of imputed and measured genes if cells have coordinates",
    )
    page = "imputer"

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""
        add_options(
            fit,
            """
            --reference REF.h5ad: cells with more measured genes (default: batches of the input with more genes)
            --reference-batch-key K: column of obs of the reference (one batch)
            --reference-layer L: layer with its counts (detected)
            --reference-gene-key K: column of var with its genes
            """,
        )
        for verb in (fit, predict):
            text = "genes: names separated by commas, or a file with one per line (all)"
            add_options(verb, f"--impute GENES: {text}")
        add_options(
            predict,
            """
            --log-normalized: log-normalised values instead of counts
            --coverage F: also write prediction intervals with this coverage, such as 0.9 (none)
            """,
        )

    def check(self, arguments: argparse.Namespace) -> None:
        """Raise an error for values other than counts."""
        counts_only(arguments, *(("split_key",) if arguments.verb == "fit" else ()))

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return the confidence, and the scores of the parts."""
        facts = estimator.facts
        what = f"{facts['imputed_genes']} genes from {facts['shared_genes']}"
        if "mean_confidence" in facts:
            what += f", mean confidence {facts['mean_confidence']:.3f} over {facts['genes_with_confidence']} of them"
        if "validation" in facts:
            scores = ", ".join(
                f"{name} {facts['validation'][name].get('pearson', float('nan')):.3f}"
                for name in ("pooled", "network", "ridge")
            )
            what += f" ({scores}; used: {facts['method']})"
        return [fitted_line(arguments, what, facts)], {"genes": estimator.imputed}

    def predicted(self, arguments: argparse.Namespace, estimator: Any, result: Any) -> None:
        """Print the number of genes."""
        from cellplm_jax.tasks.impute import IMPUTED

        number = len(names_in(arguments.impute) or estimator.imputed)
        reading = passed_options(arguments, READING)
        write_page(arguments, "imputed", arguments.out, estimator, reading)
        print_result(
            arguments,
            [f"wrote {arguments.out}: obsm['{IMPUTED}'], {number} genes"],
            {"wrote": [arguments.out], "key_added": IMPUTED, "genes": number},
            messages=result,
        )


class Denoise(Task):
    """Commands of :class:`cellplm_jax.Denoiser`."""

    name = "denoise"
    estimator = "cellplm_jax.tasks.denoise:Denoiser"
    help = "expected counts: fit to cells, or predict them"
    examples = (
        "cellplm denoise fit cells.h5ad --model small --out denoiser",
        "cellplm denoise predict cells.h5ad --model denoiser --out denoised.h5ad",
    )
    reports = (
        "the loss curve, and errors of held-out counts",
        "some genes before and after denoising on a UMAP or in the tissue, and the means of all genes",
    )

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""
        add_options(
            predict,
            """
            --log-normalized: add a second layer with log-normalised values
            --detected: counts conditional on being non-zero
            --own-counts: combine the prediction with the cell's own counts (posterior mean)
            --storage rounded|float32|float16|sparse: of the layer; rounded: to three binary digits, compressed; sparse:
                only the largest values, rounded, smaller than the counts (rounded)
            --show GENES: genes drawn in the report: names separated by commas, or a file with one per line (the two
                that vary most between cells)
            --zero-shot: --model is a pretrained model without a fit
            """,
            storage={"default": "rounded"},
        )

    def check(self, arguments: argparse.Namespace) -> None:
        """Raise an error for values other than counts, and for genes to show without a report."""
        counts_only(arguments)
        if getattr(arguments, "show", None) is None:
            return
        arguments.show = names_in(arguments.show)
        if arguments.show and arguments.report is None:
            raise InputError(
                "--show requires --report",
                "a report to show genes in",
                "Add --report FILE.html, or omit --show",
            )

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return the scores of the pool."""
        # The message that the fit added last compares the parts of the pool.
        (line,), facts = super().fitted(arguments, estimator)
        return [line, estimator.messages[-1]], facts

    def open(self, arguments: argparse.Namespace) -> Any:
        """Return the denoiser, after a check that it knows the genes to show."""
        opened = self.kind if arguments.zero_shot else self.kind.load
        denoiser = opened(arguments.model, quiet=arguments.quiet)
        if arguments.show:
            from cellplm_jax.tasks.denoise_view import check_genes

            reading = passed_options(arguments, READING)
            check_genes(denoiser, arguments.input, arguments.show, **reading)
        return denoiser

    def predicted(self, arguments: argparse.Namespace, estimator: Any, result: Any) -> None:
        """Print the scores of the pool."""
        from cellplm_jax.tasks.denoise import LAYER

        # The scores come last; they are printed with the output, and the rest as warnings.
        *messages, scores = result
        reading = passed_options(arguments, READING)
        write_page(arguments, "denoised", arguments.out, estimator, reading, arguments.show)
        facts = {"layer": LAYER, "detected": arguments.detected, "scores": scores}
        lines = [f"wrote {arguments.out}: layers['{LAYER}']", scores]
        print_result(arguments, lines, {"wrote": [arguments.out], **facts}, messages=messages)


class Perturb(Task):
    """Commands of :class:`cellplm_jax.PerturbationPredictor`."""

    name = "perturb"
    estimator = "cellplm_jax.tasks.perturb:PerturbationPredictor"
    help = "expression changes of perturbations: fit to a screen, or predict them"
    examples = (
        "cellplm perturb fit screen.h5ad --model small --out predictor --perturbation-key perturbation",
        "cellplm perturb predict --model predictor --out changes.csv --perturbation STAT1 --perturbation STAT1+IRF1",
    )
    reports = (
        "left-out perturbations, predicted and measured, with the error of three baselines",
        "the genes with the largest changes, and how specific they are",
    )
    page = "effects.predictor"
    without = ("--split-key", "--cells-per-context")
    writes = "table"

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""
        add_options(
            fit,
            """
            --perturbation-key! K: column of obs with the perturbation of every cell; A+B, A_B, A;B or A|B is a
                combination
            --control NAME: its value for the control cells (a well-known name, such as ctrl or non-targeting)
            --covariate-key K: column of obs with groups with different responses, such as cell types (one group)
            --targets auto|genes|conditions: kind of perturbations (auto: genes if in the vocabulary, else conditions)
            --method ridge|finetune: ridge: exact solution; finetune: continue by gradient descent with the recipe
                (ridge)
            --gene-features model|data|both: features of a target: gene embeddings, or its variation in the data (model;
                from scratch: data)
            """,
        )
        add_options(
            predict,
            """
            --perturbation NAME|FILE: gene, combination A+B, condition, or a file with one per line; repeatable (all
                fitted ones)
            --group NAME: control cells of one group of --covariate-key (all)
            --controls IN.h5ad: other control cells, such as those of a new cell type
            """,
            perturbation={"action": "append"},
        )

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return the numbers of perturbations and cells, and the errors on left-out perturbations."""
        facts = estimator.facts
        line = f"wrote {arguments.out}: {number_of(facts['perturbations'], 'perturbation')}"
        if facts["groups"] > 1:
            line += f" in {facts['groups']} groups"
        line += f", {number_of(facts['genes'], 'gene')}, {number_of(facts['control_cells'], 'control cell')}"
        if estimator.left_out is None:
            return [line], {}
        errors = (
            f"left-out perturbations: RMSE {facts['left_out_rmse']:.4f}, additive "
            f"{facts['left_out_rmse_additive']:.4f}, mean of the others {facts['left_out_rmse_mean_change']:.4f}, "
            f"no change {facts['left_out_rmse_no_change']:.4f}"
        )
        return [line, errors], {}

    def predict(self, arguments: argparse.Namespace) -> None:
        """Run ``predict``."""
        from cellplm_jax.tasks.tables import check_table, read_names, write_table

        check_table(arguments.out)
        check_report(arguments)
        reading = passed_options(arguments, READING)
        # Without a file of controls nothing is read, and these options would be ignored.
        if reading and arguments.controls is None:
            option = f"--{next(iter(reading)).replace('_', '-')}"
            raise InputError(
                f"{option} requires --controls",
                "the file that the option applies to",
                f"Add --controls IN.h5ad, or omit {option}",
            )
        predictor = self.open(arguments)
        names = predictor.perturbations
        if arguments.perturbation is not None:
            # No separator: a comma can be part of the name of a condition.
            names = [n for text in arguments.perturbation for n in read_names(text, separator=None)]
        prediction = predictor.predict(
            # Repeated names once, in the order they were given.
            list(dict.fromkeys(names)),
            **passed_to(self.kind.predict, arguments),
        )
        write_table(prediction.tidy(), arguments.out)
        counts = prediction.known.value_counts().items()
        kinds = ", ".join(f"{number} {kind}" for kind, number in counts)
        genes = prediction.change.shape[1]
        line = (
            f"wrote {arguments.out}: {number_of(len(prediction.known), 'perturbation')} ({kinds}), "
        )
        line += f"{number_of(genes, 'gene')} each"
        write_page(arguments, "effects.perturbed", prediction, predictor)
        facts = {"wrote": [arguments.out], "known": prediction.known.to_dict(), "genes": genes}
        print_result(arguments, [line], facts, messages=prediction.messages)


class Samples(Task):
    """Commands of :class:`cellplm_jax.SampleClassifier`."""

    name = "samples"
    estimator = "cellplm_jax.tasks.samples:SampleClassifier"
    help = "labels of tissue samples: fit to labelled samples, or predict them"
    examples = (
        "cellplm samples fit cohort.h5ad --model small --out classifier --sample-key donor --label-key disease",
        "cellplm samples predict cells.h5ad --model classifier --out labelled.h5ad --table samples.csv",
    )
    reports = (
        "the error on left-out samples, and the shift of every cell type with its p-value",
        "one row per sample, and the contributions of its cells by type",
    )
    page = "effects.classifier"
    without = (
        "--batch-key",
        "--split-key",
        "--epochs",
        "--patience",
        "--learning-rate",
        "--freeze",
        "--adapter-rank",
        "--validation-fraction",
    )

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""
        add_options(
            fit,
            """
            --sample-key! K: column of obs with the tissue sample of every cell
            --label-key! K: column of obs with the sample label
            --type-key K: column of obs with cell types, which contributions are relative to (clusters)
            """,
        )
        add_options(
            predict,
            """
            --sample-key K: column of obs with the tissue sample of every cell (as in fit)
            --table OUT.csv: also write one row per sample; .csv or .tsv
            """,
        )

    def check(self, arguments: argparse.Namespace) -> None:
        """Raise an error for a table that cannot be written."""
        if getattr(arguments, "table", None) is not None:
            from cellplm_jax.tasks.tables import check_table

            check_table(arguments.table)

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return the error on left-out samples, and p-values."""
        facts = estimator.facts
        line = (
            f"wrote {arguments.out}: {number_of(len(estimator.labels), 'label')} from "
            f"{number_of(facts['samples'], 'sample')} of {number_of(facts['cells'], 'cell')}, "
            "cross-entropy of left-out samples "
            f"{facts['left_out_samples_cross_entropy']:.3f} (of the labels' frequencies "
            f"{facts['cross_entropy_of_frequencies']:.3f})"
        )
        tests = (
            f"p of permuted labels: mean latent {facts['p_latent']:.3g}, proportions of types "
            f"{facts['p_proportions']:.3g}, pseudobulk {facts['p_pseudobulk']:.3g}"
        )
        tests += f", most shifted type {facts['p_shift']:.3g}" if "p_shift" in facts else ""
        return [line, tests], {"labels": estimator.labels}

    def predicted(self, arguments: argparse.Namespace, estimator: Any, result: Any) -> None:
        """Write the table, and print the number of samples with each label."""
        from cellplm_jax.tasks.samples import LABEL
        from cellplm_jax.tasks.tables import write_table

        table, messages = result
        counts = table["label"].value_counts()
        labels = ", ".join(f"{number} {label}" for label, number in counts.items() if number)
        samples = number_of(len(table), "sample")
        lines = [f"wrote {arguments.out}: obs['{LABEL}'], {samples} ({labels})"]
        wrote = [arguments.out]
        if arguments.table is not None:
            write_table(table, arguments.table, index=True)
            lines.append(f"wrote {arguments.table}")
            wrote.append(arguments.table)
        write_page(arguments, "effects.samples", arguments.out, table, estimator)
        facts = {"wrote": wrote, "samples": table.to_dict(orient="index")}
        print_result(arguments, lines, facts, messages=messages)


class Integrate(Task):
    """Commands of :class:`cellplm_jax.BatchIntegrator`."""

    name = "integrate"
    estimator = "cellplm_jax.tasks.integrate:BatchIntegrator"
    help = "an embedding without batch effects: align several batches, or embed cells with the fitted alignment"
    examples = (
        "cellplm integrate fit cells.h5ad --batch-key batch --model small --out integrator",
        "cellplm integrate predict cells.h5ad --model integrator --out integrated.h5ad",
    )
    reports = (
        "the facts and, for finetune, the loss curve of the fit",
        "a UMAP by batch, also of X_cellplm or X_pca if the file has them, and their scores, beside those of Harmony "
        "on principal components",
    )

    def options(self, fit: argparse.ArgumentParser, predict: argparse.ArgumentParser) -> None:
        """Add the options of the task."""
        add_options(
            fit,
            """
            --strength F: mixing relative to structure (1)
            --method align|finetune: align: latent and components, aligned by Harmony; finetune: train the model (align;
                with training options: finetune)
            """,
            strength={"default": 1.0},
        )
        add_options(predict, "--label-key K: column of obs with known types, to print scores")

    def check(self, arguments: argparse.Namespace) -> None:
        """Raise an error for common options that integration does not support."""
        fits = arguments.verb == "fit"
        unused = ("spatial_key", "split_key", "patience", "validation_fraction")
        counts_only(
            arguments,
            *(unused if fits else unused[:1]),
            task=f"integrate {arguments.verb}",
            expected="its own options: all cells are fitted, for all epochs, without coordinates",
            instead="",
        )
        if fits and arguments.batch_key is None:
            raise InputError(
                "integrate fit requires --batch-key",
                "the column of obs with the batches",
                "Add --batch-key",
            )

    def fitted(self, arguments: argparse.Namespace, estimator: Any) -> Result:
        """Return the number of batches."""
        facts = estimator.facts
        return [fitted_line(arguments, f"{facts['batches']} batches", facts)], {}

    def predicted(self, arguments: argparse.Namespace, estimator: Any, result: Any) -> None:
        """Print scores if there are labels."""
        from cellplm_jax.tasks.integrate import KEY

        lines = [f"wrote {arguments.out}: obsm['{KEY}']"]
        scores: dict[str, float] = {}
        if arguments.label_key:
            scores = estimator.score(arguments.input, **passed_to(self.kind.score, arguments))
            lines.append(scores_line(scores))
        # The batch column first: the report computes the mixing of the first one.
        columns = [arguments.batch_key or estimator.reading.batch_key, arguments.label_key]
        shown = [key for key in columns if key]
        write_page(arguments, "effects.integrated", arguments.out, KEY, shown)
        facts = {"wrote": [arguments.out], "key_added": KEY, "scores": scores}
        print_result(arguments, lines, facts, messages=result)
