"""Sample classification: one label per tissue sample, and the contribution of each cell."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.special import softmax

from cellplm_jax._version import __version__
from cellplm_jax.config import FinetuneConfig, HeadConfig
from cellplm_jax.data.anndata_io import Values
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.annotation import confusion_counts, macro_f1
from cellplm_jax.tasks.contexts import labels_of
from cellplm_jax.tasks.estimator import AS_FITTED, Estimator, Reading, Training
from cellplm_jax.tasks.files import as_anndata, check_copy, read_obs, write_copy
from cellplm_jax.tasks.pretrained import Pretrained

if TYPE_CHECKING:
    from anndata import AnnData

LABEL, CONTRIBUTION = "cellplm_sample_label", "cellplm_contribution"
"""Keys written by ``predict`` to ``obs``."""

FACTS = "cellplm_samples"
"""Key written to ``uns``."""

PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Candidate strengths of the ridge penalty, strongest first."""

MAXIMUM_FOLDS = 10
"""Number of folds for choosing the penalty, limited by the number of samples."""


class SampleClassifier(Estimator):
    """Predicts a label, such as a disease, for every tissue sample from its cells.

    The mean-pool head of the model on its latents; the encoder is frozen, because a cohort has too few samples to
    train it. The head is a logistic regression on the mean latent per sample, solved exactly, with
    a ridge penalty chosen by cross-validation over samples: the strongest within one standard error of the best.

    Because the logits are means over cells, the contribution of each cell is exact: ``obs["cellplm_contribution"]``.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture with random weights.
        genes: See :class:`cellplm_jax.CellTypeAnnotator`.
        quiet: Disable progress output.
        **training: ``seed``; the other fields of :class:`cellplm_jax.config.FinetuneConfig` do not apply. Also
            ``precision`` and ``devices``; None: as the model.

    Attributes:
        labels: The labels, sorted; the columns of the probabilities.
        penalty: The chosen ridge penalty.

    Raises:
        ConfigError: An option is unknown.
        InputError: An option does not apply.
    """

    recipe_fields = ("seed",)
    task: ClassVar[str] = "samples"
    recipe: ClassVar[FinetuneConfig] = FinetuneConfig(freeze="encoder")

    def __init__(
        self,
        model: Pretrained | str | os.PathLike | None = None,
        *,
        genes: int | Literal["default"] | None = "default",
        quiet: bool = False,
        **training: Unpack[Training],
    ):
        super().__init__(model, genes=genes, quiet=quiet, **training)
        if dataclasses.replace(self.training, seed=self.recipe.seed) != self.recipe:
            given = ", ".join(sorted(set(training) - {"seed"}))
            raise InputError(
                f"SampleClassifier does not support {given}",
                "no training option except seed, because its head is solved exactly and its encoder is frozen",
                "Omit it",
            )
        self.labels: list[str] = []
        self.penalty = 0.0
        self._centre = np.zeros(0, np.float32)

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        sample_key: str,
        label_key: str,
        spatial_key: str | None = "spatial",
        layer: str | None = None,
        gene_key: str | None = None,
        feature_type: str | None = None,
        values: Values = "counts",
        cells_per_context: int | None = None,
    ) -> SampleClassifier:
        """Fit to labelled samples.

        Samples without a label (NaN for all of their cells) are omitted, and counted in ``messages``.

        Args:
            adata: Raw counts; all cells of each sample have the same label, or none.
            sample_key: Column of ``obs`` with the tissue sample of each cell; cells attend within it.
            label_key: Column of ``obs`` with the labels.
            spatial_key: Key of ``obsm`` with coordinates; the default one is used if present.
            layer: Layer with the counts; None: search for them.
            gene_key: Column of ``var`` with gene ids; None: the best match.
            feature_type: Type of the features to read; None: genes; "all": every feature.
            values: Kind of values; see :func:`cellplm_jax.embed`.
            cells_per_context: Maximum number of cells per context; None: one context per sample.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts, genes or labels cannot be used: a sample has two labels, there is only one label,
                or a label has fewer than two samples; the message states the remedy.
        """
        reading = Reading(
            sample_key,
            spatial_key,
            layer,
            gene_key,
            values,
            cells_per_context,
            feature_type=feature_type,
        )
        table = self._read(adata, reading)
        names, truth = _labels_of_samples(table.batch, labels_of(table.obs, label_key), label_key)
        there = np.array([label is not None for label in truth], bool)
        self.labels = sorted({label for label in truth if label is not None})
        _check_labels(truth[there], len(truth), label_key)
        if not there.all():
            self.messages.append(
                f"{int((~there).sum())} of {len(truth)} samples have no label in '{label_key}' and were omitted."
            )
        used = np.isin(table.batch, names[there])
        table = self._choose_genes(table, np.flatnonzero(used))
        head = HeadConfig(kind="sample_classification", outputs=len(self.labels))
        start = self._begin(table, dataclasses.replace(self._architecture(), head=head))
        z, _, _ = self._embed(adata, reading, model=start)
        pooled = _pool(z, table.batch, names[there])
        codes = np.array([self.labels.index(label) for label in truth[there]])
        self.penalty, error = choose_penalty(pooled, codes, seed=self.training.seed)
        kernel, bias = logistic_regression(pooled, codes, self.penalty)
        self._centre = pooled.mean(axis=0).astype(np.float32)
        flat: dict[tuple[str, ...], Any] = dict(flatten_dict(start.params))
        flat["head", "linear", "kernel"] = kernel.astype(np.float32)
        flat["head", "linear", "bias"] = bias.astype(np.float32)
        self._keep(start, unflatten_dict(flat))
        share = np.bincount(codes) / len(codes)
        self.facts = {
            "sample_key": sample_key,
            "label_key": label_key,
            "samples": int(there.sum()),
            "cells": int(used.sum()),
            "penalty": self.penalty,
            "left_out_samples_cross_entropy": error,
            "cross_entropy_of_frequencies": float(-(share * np.log(share)).sum()),
        }
        self._log_messages()
        return self

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        sample_key: str = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        feature_type: str | None = AS_FITTED,
        values: Values = AS_FITTED,
        cells_per_context: int | None = AS_FITTED,
    ) -> pd.DataFrame:
        """Predict the label of every sample.

        Writes:
            ``obs["cellplm_sample_label"]``: categorical, the label of the cell's sample.
            ``obs["cellplm_contribution"]``: float32, contribution of the cell to that label (may be negative):
            its term of the label's logit, relative to the average training sample and to the other labels. The
            prediction uses the mean over a sample's cells.
            ``uns["cellplm_samples"]``: labels, model, contexts, genes matched.

        Args:
            adata: The cells. Keys default to those of ``fit``.
            sample_key: See :meth:`fit`.
            spatial_key: See :meth:`fit`.
            layer: See :meth:`fit`.
            gene_key: See :meth:`fit`.
            feature_type: See :meth:`fit`.
            values: See :meth:`fit`.
            cells_per_context: See :meth:`fit`.

        Returns:
            One row per sample: ``label``, ``confidence`` (the label's probability), ``cells``, and the probability of
            every label, in columns ``probability_<label>``.

        Raises:
            InputError: The estimator is not fitted, or the counts, genes or keys cannot be used.
        """
        reading = self.reading.changed(
            batch_key=sample_key, spatial_key=spatial_key, layer=layer, gene_key=gene_key, feature_type=feature_type,
            values=values, cells_per_context=cells_per_context,
        )  # fmt: skip
        data = as_anndata(adata)
        table, columns, facts, _ = self._predict(data, reading)
        for name, values_of_cells in columns.items():
            data.obs[name] = values_of_cells
        data.uns[FACTS] = facts
        return table

    def predict_file(
        self, path: str | os.PathLike, out: str | os.PathLike, **keys: Any
    ) -> tuple[pd.DataFrame, list[str]]:
        """Predict the samples of an ``.h5ad`` file and write a copy with the results; counts are streamed.

        Args:
            path: Input; never changed.
            out: Output: the input plus the results of :meth:`predict`, written atomically.
            **keys: As for :meth:`predict`.

        Returns:
            The table of :meth:`predict`, and messages about the input, one per line.

        Raises:
            InputError: As in :meth:`predict`; also if ``out`` cannot be written.
        """
        path, out = Path(path).expanduser(), Path(out).expanduser()
        check_copy(path, out)
        if "sample_key" in keys:
            keys["batch_key"] = keys.pop("sample_key")
        table, columns, facts, messages = self._predict(path, self.reading.changed(**keys))
        write_copy(path, out, obs=columns, uns={FACTS: facts})
        return table, messages

    def _predict(
        self, data: AnnData | Path, reading: Reading
    ) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any], list[str]]:
        """Return the table of samples, columns of ``obs``, facts for ``uns``, and messages about the input."""
        model = self._fitted()
        z, facts, messages = self._embed(data, reading)
        samples = _column(read_obs(data), reading)
        names = np.array(list(dict.fromkeys(samples)), object)
        kernel, bias = self._head_params()
        probabilities = softmax(_pool(z, samples, names) @ kernel + bias, axis=1)
        chosen = probabilities.argmax(axis=1)
        place = {name: row for row, name in enumerate(names)}
        of_cell = chosen[[place[name] for name in samples]]
        evidence = (z - self._centre) @ (kernel - kernel.mean(axis=1, keepdims=True))
        decided = np.array(self.labels, object)
        columns = {
            LABEL: pd.Categorical(decided[of_cell], categories=self.labels),
            CONTRIBUTION: evidence[np.arange(len(z)), of_cell].astype(np.float32),
        }
        table = pd.DataFrame(
            {
                "label": pd.Categorical(decided[chosen], categories=self.labels),
                "confidence": probabilities.max(axis=1),
                "cells": [int((samples == name).sum()) for name in names],
            },
            index=pd.Index(names, name="sample"),
        )
        for column, label in enumerate(self.labels):
            table[f"probability_{label}"] = probabilities[:, column]
        facts = {
            "labels": list(self.labels),
            "model": model.id,
            "version": __version__,
            "penalty": float(self.penalty),
            **facts,
        }
        return table, columns, facts, messages

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        label_key: str | None = None,
        folds: int | None = None,
        sample_key: str = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        feature_type: str | None = AS_FITTED,
        values: Values = AS_FITTED,
        cells_per_context: int | None = AS_FITTED,
    ) -> dict[str, float]:
        """Predict labelled samples and score the predictions, or cross-validate; ``adata`` is not modified.

        Args:
            adata: The cells; samples without a label are omitted.
            label_key: Column of ``obs``; None: the one of ``fit``.
            folds: None: score the fitted head. A number: the samples are assigned to this number of folds, stratified
                by label, and each is predicted by a head fitted to the others, including the penalty, on the same
                latents (which do not depend on labels). For files with all available samples; with as many folds as
                samples it is leave-one-out.
            sample_key: See :meth:`predict`.
            spatial_key: See :meth:`predict`.
            layer: See :meth:`predict`.
            gene_key: See :meth:`predict`.
            feature_type: See :meth:`predict`.
            values: See :meth:`predict`.
            cells_per_context: See :meth:`predict`.

        Returns:
            ``accuracy``, ``macro_f1``, ``cross_entropy`` in nats, ``most_frequent_accuracy`` (of always predicting the
            most frequent label), and ``samples``, the number of scored samples.

        Raises:
            InputError: As in :meth:`predict`; or a label is not among the training labels; or there are too few samples
                for the folds.
        """
        self._fitted()
        reading = self.reading.changed(
            batch_key=sample_key, spatial_key=spatial_key, layer=layer, gene_key=gene_key, feature_type=feature_type,
            values=values, cells_per_context=cells_per_context,
        )  # fmt: skip
        key = str(label_key or self.facts["label_key"])
        obs = read_obs(adata)
        samples = _column(obs, reading)
        names, truth = _labels_of_samples(samples, labels_of(obs, key), key)
        there = np.array([label is not None for label in truth], bool)
        truth = truth[there]
        if not len(truth):
            raise InputError(
                f"no sample has a label in obs['{key}']", "labelled samples", "Check the column"
            )
        unseen = sorted(set(truth) - set(self.labels))
        if unseen:
            raise InputError(
                f"samples are labelled {unseen[0]!r}, which is not a training label",
                f"labels among {', '.join(map(repr, self.labels))}",
                "Fit on samples of that label too, or set theirs to NaN",
            )
        codes = np.array([self.labels.index(label) for label in truth])
        if folds is not None:
            _check_labels(truth, len(truth), key)
            if not 2 <= folds <= len(codes):
                raise InputError(
                    f"folds={folds} for {len(codes)} samples",
                    f"between 2 and {len(codes)}",
                    "Choose a number in between",
                )
        z, _, _ = self._embed(adata, reading)
        pooled = _pool(z, samples, names[there])
        if folds is None:
            kernel, bias = self._head_params()
            logits = pooled @ kernel + bias
        else:
            logits = np.zeros((len(codes), len(self.labels)))
            fold = _folds(codes, folds, self.training.seed)
            for number in range(folds):
                out = fold == number
                penalty, _ = choose_penalty(pooled[~out], codes[~out], seed=self.training.seed)
                kernel, bias = logistic_regression(
                    pooled[~out], codes[~out], penalty, classes=len(self.labels)
                )
                logits[out] = pooled[out] @ kernel + bias
        predicted = logits.argmax(axis=1)
        return {
            "accuracy": float((predicted == codes).mean()),
            "macro_f1": macro_f1(confusion_counts(codes, predicted, len(self.labels))),
            "cross_entropy": float(_cross_entropies(logits, codes).mean()),
            "most_frequent_accuracy": float(np.bincount(codes).max() / len(codes)),
            "samples": len(codes),
        }

    def _head_params(self) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel float64 [latent, labels] and bias [labels]."""
        head = self._fitted().params["head"]["linear"]
        return np.asarray(head["kernel"], np.float64), np.asarray(head["bias"], np.float64)

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"labels": self.labels, "penalty": self.penalty}, {"centre": self._centre}

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.labels, self.penalty = list(state["labels"]), state["penalty"]
        self._centre = arrays["centre"]


def logistic_regression(
    features: np.ndarray, codes: np.ndarray, penalty: float, *, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit multinomial logistic regression to standardised features.

    Minimises the mean cross-entropy plus ``penalty / 2`` times the mean over features of the squared weights;
    intercepts are not penalised.

    Args:
        features: float [samples, width].
        codes: int [samples], classes from 0.
        penalty: Above 0.
        classes: Number of classes; None: as many as occur. Missing classes get a low intercept.

    Returns:
        kernel float64 [width, classes] and bias [classes], for the original features.
    """
    from scipy.optimize import minimize

    classes = int(codes.max()) + 1 if classes is None else classes
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.maximum(spread, 0.05 * np.sqrt(np.square(spread).mean()) + 1e-12)
    scaled = (features - centre) / spread / np.sqrt(features.shape[1])
    wanted = np.eye(classes)[codes]
    shape = (features.shape[1] + 1, classes)
    # A small count for every class, so that the intercept of a missing one stays finite.
    wanted = wanted * (1 - 1e-3) + 1e-3 / classes

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = scaled @ weights[:-1] + weights[-1]
        top = logits.max(axis=1, keepdims=True)
        log_probability = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        error = (np.exp(log_probability) - wanted) / len(codes)
        value = -(wanted * log_probability).sum() / len(codes)
        value += 0.5 * penalty * np.square(weights[:-1]).sum() / shape[0]
        gradient = np.concatenate([scaled.T @ error, error.sum(axis=0)[None]])
        gradient[:-1] += penalty * weights[:-1] / shape[0]
        return float(value), gradient.ravel()

    optimum: Any = minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B")
    weights = optimum.x.reshape(shape)
    kernel = weights[:-1] / spread[:, None] / np.sqrt(features.shape[1])
    return kernel, weights[-1] - centre @ kernel


def choose_penalty(features: np.ndarray, codes: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Choose a ridge penalty by cross-validation over samples.

    Args:
        features: float [samples, width].
        codes: int [samples], classes from 0.
        seed: Seed of the folds.

    Returns:
        The strongest of :data:`PENALTIES` within one standard error of the best, and its cross-entropy in nats on
        left-out samples.
    """
    classes = int(codes.max()) + 1
    folds = min(MAXIMUM_FOLDS, len(codes))
    fold = _folds(codes, folds, seed)
    errors = np.zeros((len(PENALTIES), len(codes)))
    for number in range(folds):
        out = fold == number
        for row, penalty in enumerate(PENALTIES):
            kernel, bias = logistic_regression(
                features[~out], codes[~out], penalty, classes=classes
            )
            errors[row, out] = _cross_entropies(features[out] @ kernel + bias, codes[out])
    worse = errors - errors[errors.mean(axis=1).argmin()]
    doubt = worse.std(axis=1) / np.sqrt(len(codes))
    chosen = int(np.flatnonzero(worse.mean(axis=1) <= doubt)[0])
    return PENALTIES[chosen], float(errors[chosen].mean())


def _folds(codes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return int [samples], the fold of each: samples in random order, class by class, assigned round-robin."""
    order = np.random.default_rng(seed).permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    fold = np.empty(len(codes), int)
    fold[order] = np.arange(len(codes)) % folds
    return fold


def _pool(z: np.ndarray, samples: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return float64 [names, latent]: the mean latent of each sample's cells."""
    return np.stack([z[samples == name].mean(axis=0, dtype=np.float64) for name in names])


def _labels_of_samples(
    samples: np.ndarray, labels: np.ndarray, label_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return names of samples in order of first appearance, and their labels (None: none)."""
    names = list(dict.fromkeys(samples))
    own_labels = []
    for name in names:
        own = sorted({label for label in labels[samples == name] if label is not None})
        if len(own) > 1:
            raise InputError(
                f"sample '{name}' has the labels {', '.join(map(repr, own[:4]))} in obs['{label_key}']",
                "one label per sample",
                "Correct the column, or name another sample_key",
            )
        own_labels.append(own[0] if own else None)
    result = np.empty(len(names), object)
    result[:] = own_labels
    return np.array(names, object), result


def _check_labels(truth: np.ndarray, samples: int, label_key: str) -> None:
    """Raise an error for labels that cannot be learned."""
    counts = pd.Series(list(truth), dtype=object).value_counts()
    if not len(counts):
        raise InputError(
            f"obs['{label_key}'] is missing for all {samples} samples",
            "labels for the samples to fit on",
            "Use another column, or fill it",
        )
    if len(counts) < 2:
        raise InputError(
            f"the {len(truth)} labelled samples all have the label '{counts.index[0]}'",
            "at least two labels",
            f"Check obs['{label_key}'], or add more samples",
        )
    if counts.iloc[-1] < 2:
        raise InputError(
            f"label '{counts.index[-1]}' has one sample",
            "at least two samples per label",
            "Add more samples, set its label to NaN, or check that sample_key names samples",
        )


def _column(obs: pd.DataFrame, reading: Reading) -> np.ndarray:
    """Return the sample of every cell as strings; the reader checks that the column is complete."""
    values = labels_of(obs, str(reading.batch_key))
    if any(value is None for value in values):
        raise InputError(
            f"obs['{reading.batch_key}'] is missing for some cells",
            "the sample of every cell",
            "Fill it, or select the cells with a value",
        )
    return values


def _cross_entropies(logits: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the cross-entropies in nats, float64 [samples]."""
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return total - logits[np.arange(len(codes)), codes]
