"""Sample classification: one label per tissue sample, and the contribution of each cell."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.special import softmax

from cellplm_jax.config import FinetuneConfig, HeadConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import InputError, MissingDependencyError
from cellplm_jax.evaluate.annotation import confusion_counts, macro_f1
from cellplm_jax.evaluate.cohorts import SIGNIFICANT, samples_needed, smallest_p
from cellplm_jax.evaluate.embedding import leiden_clusters
from cellplm_jax.tasks.context_components import join_context
from cellplm_jax.tasks.contexts import CellTable, labels_of, source_groups
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.files import read_obs
from cellplm_jax.tasks.prediction import Prediction
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.tasks.reading import AS_FITTED, KEYS, Reading, ReadingKeys
from cellplm_jax.tasks.recipe import Training
from cellplm_jax.tasks.sample_shifts import CHUNK, TypeShifts, expression_of, fit_shifts

if TYPE_CHECKING:
    from anndata import AnnData

LABEL, CONTRIBUTION = "cellplm_sample_label", "cellplm_contribution"
TYPE = "cellplm_contribution_type"
"""Keys written by ``predict`` to ``obs``."""

FACTS = "cellplm_samples"
"""Key written to ``uns``."""

PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Candidate strengths of the ridge penalty, strongest first."""

CLUSTERED_CELLS = 20_000
"""Maximum number of cells that types are clustered from; the others get the nearest type."""

ONE_TYPE = "all cells"
"""Name of the type if cells are not clustered."""

MAXIMUM_FOLDS = 10
"""Number of folds for choosing the penalty, limited by the number of samples."""


class SampleClassifier(Estimator):
    """Predicts a label, such as a disease, for every tissue sample from its cells.

    The mean-pool head of the model on its latents; the encoder is frozen, because a cohort has too few samples to
    train it. The head is a logistic regression on the mean latent per sample, solved exactly, with
    a ridge penalty chosen by cross-validation over samples: the strongest within one standard error of the best.

    The contribution of a cell, ``obs["cellplm_contribution"]``, compares it with cells of the same type: it is the
    log-odds of the sample's label by the shift of that type between the labels. Cell types themselves, and their
    proportions, do not contribute. Shifts are estimated over samples, and are zero for types in which labels do not
    differ more than permuted ones; see ``shifts`` and the p-values in ``facts``.

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
        shifts: One row per cell type: cells, samples, permutation p-values of the shift between labels in mean
            expression (pseudobulk) and in the latent, and the genes that differ most.

    Raises:
        ConfigError: An option is unknown.
        InputError: An option does not apply.
    """

    recipe_fields = ("seed",)
    task: ClassVar[str] = "samples"
    keys: ClassVar[Sequence[str]] = tuple(key for key in KEYS if key != "batch_key")
    saved: ClassVar[Sequence[str]] = ("labels", "penalty")
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
        self._shifts: TypeShifts | None = None

    @property
    def shifts(self) -> pd.DataFrame:
        """Shifts of the cell types; empty for classifiers that were saved without."""
        return pd.DataFrame([] if self._shifts is None else self._shifts.table)

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        sample_key: str,
        label_key: str,
        type_key: str | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> SampleClassifier:
        """Fit to labelled samples.

        Samples without a label (NaN for all of their cells) are omitted, and counted in ``messages``.

        Args:
            adata: Raw counts; all cells of each sample have the same label, or none.
            sample_key: Column of ``obs`` with the tissue sample of each cell; cells attend within it.
            label_key: Column of ``obs`` with the labels.
            type_key: Column of ``obs`` with cell types, for the contributions; None: clusters of the cells, in an
                embedding that is aligned between samples (extra ``eval``). Use types that are finer than lineages.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts, genes or labels cannot be used: a sample has two labels, there is only one label,
                or a label has fewer than two samples; the message states the remedy.
        """
        reading = self._reading(keys, batch_key=sample_key)
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
        shift_facts = self._fit_shifts(adata, table, start, z, names[there], codes, type_key)
        share = np.bincount(codes) / len(codes)
        self.facts = {
            "sample_key": sample_key,
            "label_key": label_key,
            "samples": int(there.sum()),
            "cells": int(used.sum()),
            "penalty": self.penalty,
            "left_out_samples_cross_entropy": error,
            "cross_entropy_of_frequencies": float(-(share * np.log(share)).sum()),
            "type_key": type_key or "",
            "smallest_p": smallest_p(codes),
            **shift_facts,
        }
        self._log_tests()
        self._log_messages()
        return self

    def _fit_shifts(
        self,
        data: Any,
        table: CellTable,
        model: Pretrained,
        z: np.ndarray,
        names: np.ndarray,
        codes: np.ndarray,
        type_key: str | None,
    ) -> dict[str, float]:
        """Fit the shifts of the cell types; return facts about their tests."""
        if type_key is not None:
            given = labels_of(table.obs, type_key)
            usable = np.array([name is not None for name in given], bool)
            types = sorted({name for name in given if name is not None})
            if not types:
                raise InputError(
                    f"obs['{type_key}'] is missing for all cells",
                    "the type of the cells",
                    "Use another column, or omit type_key",
                )
            place = {name: code for code, name in enumerate(types)}
            type_codes = np.array([place.get(name, 0) for name in given])
        else:
            # A regular stride: the same cells for the same file.
            every = -(-len(z) // CLUSTERED_CELLS)
            usable = np.arange(len(z)) % every == 0
            try:
                reading = self.reading
                with open_counts(data, model.genes, **reading.counts) as source:
                    groups = source_groups(source, reading.batch_key)
                    joined = join_context(z, source, groups)
                clusters = leiden_clusters(joined[usable])
            except MissingDependencyError:
                clusters = np.zeros(int(usable.sum()), int)
                self.messages.append(
                    "Cells are compared with all cells, not with their type: types need type_key, or the extra 'eval'."
                )
            type_codes = np.zeros(len(z), int)
            type_codes[usable] = clusters
            number = int(clusters.max()) + 1
            types = [f"cluster {code}" for code in range(number)] if number > 1 else [ONE_TYPE]
        place = {name: code for code, name in enumerate(names)}
        samples = np.array([place.get(name, -1) for name in table.batch])
        # Cells outside the stride, or without a type, do not enter the estimate.
        samples[~usable] = -1
        self._shifts, facts = fit_shifts(
            z,
            table.counts,
            table.genes,
            samples,
            type_codes,
            types,
            codes,
            self.labels,
            seed=self.training.seed,
        )
        return facts

    def _log_tests(self) -> None:
        """Append the p-values, and what the number of samples allows."""
        facts = self.facts
        smallest = facts["smallest_p"]
        labels = len(self.labels)
        if smallest > SIGNIFICANT:
            self.messages.append(
                f"Warning: {facts['samples']} samples allow no p-value below {smallest:.2g}: a difference between the "
                f"labels cannot be distinguished from chance. Use at least {samples_needed(labels)} samples per label."
            )
        self.messages.append(
            f"Permuted labels: p = {facts['p_latent']:.3g} for the mean latent, {facts['p_proportions']:.3g} for the "
            f"proportions of types, {facts['p_pseudobulk']:.3g} for pseudobulk (baseline)."
        )
        if "p_shift" in facts:
            rows = [row for row in self.shifts.to_dict("records") if row.get("p", 1) <= SIGNIFICANT]
            listed = ", ".join(f"{row['type']} ({row['p']:.2g})" for row in rows[:5])
            self.messages.append(
                f"Types that shift between labels (p at most {SIGNIFICANT} after correction): {listed or 'none'}."
            )

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        sample_key: str = AS_FITTED,
        **keys: Unpack[ReadingKeys],
    ) -> pd.DataFrame:
        """Predict the label of every sample.

        Writes:
            ``obs["cellplm_sample_label"]``: categorical, the label of the cell's sample.
            ``obs["cellplm_contribution"]``: float32, contribution of the cell to that label (may be negative): the
            log-odds of the label by the shift of the cell's type, 0 for types without a shift.
            ``obs["cellplm_contribution_type"]``: categorical, the type that the cell is compared with: the column
            ``type_key`` of ``fit`` if these cells have it, else the nearest type of the fit.
            ``uns["cellplm_samples"]``: labels, model, contexts, genes matched.

        Args:
            adata: The cells. Keys default to those of ``fit``.
            sample_key: See :meth:`fit`.
            **keys: As in :meth:`fit`.

        Returns:
            One row per sample: ``label``, ``confidence`` (the label's probability), ``cells``, ``shift`` (the mean
            contribution), and the probability of every label, in columns ``probability_<label>``.

        Raises:
            InputError: The estimator is not fitted, or the counts, genes or keys cannot be used.
        """
        return super().predict(adata, sample_key=sample_key, **keys)

    def _predict(self, data: Any, reading: Reading, *, sample_key: str = AS_FITTED) -> Prediction:
        reading = reading.changed(batch_key=sample_key)
        model = self._fitted()
        z, facts, messages = self._embed(data, reading)
        obs = read_obs(data)
        samples = _column(obs, reading)
        names = np.array(list(dict.fromkeys(samples)), object)
        kernel, bias = self._head_params()
        probabilities = softmax(_pool(z, samples, names) @ kernel + bias, axis=1)
        chosen = probabilities.argmax(axis=1)
        place = {name: row for row, name in enumerate(names)}
        of_cell = chosen[[place[name] for name in samples]]
        decided = np.array(self.labels, object)
        columns: dict[str, Any] = {LABEL: pd.Categorical(decided[of_cell], categories=self.labels)}
        if self._shifts is None:
            # Saved before contributions were relative to types: terms of the logit.
            evidence = (z - self._centre) @ (kernel - kernel.mean(axis=1, keepdims=True))
            columns[CONTRIBUTION] = evidence[np.arange(len(z)), of_cell].astype(np.float32)
        else:
            types = self._types_of(z, obs, self._shifts)
            place = {gene: column for column, gene in enumerate(model.genes)}
            wanted = [place[gene] for gene in self._shifts.genes]
            with open_counts(data, model.genes, **reading.counts) as source:
                columns[CONTRIBUTION] = self._shifts.contributions(
                    lambda: expression_of(source.blocks(CHUNK), wanted),
                    types,
                    of_cell,
                )
            columns[TYPE] = pd.Categorical.from_codes(types, categories=self._shifts.types)  # type: ignore[arg-type]
        table = pd.DataFrame(
            {
                "label": pd.Categorical(decided[chosen], categories=self.labels),
                "confidence": probabilities.max(axis=1),
                "cells": [int((samples == name).sum()) for name in names],
                "shift": [float(columns[CONTRIBUTION][samples == name].mean()) for name in names],
            },
            index=pd.Index(names, name="sample"),
        )
        for column, label in enumerate(self.labels):
            table[f"probability_{label}"] = probabilities[:, column]
        facts = {
            "labels": list(self.labels),
            "penalty": float(self.penalty),
            **facts,
        }
        return Prediction(obs=columns, uns={FACTS: facts}, messages=messages, result=table)

    def _types_of(self, z: np.ndarray, obs: pd.DataFrame, shifts: TypeShifts) -> np.ndarray:
        """Return the type of each cell: that of its column, else the nearest."""
        types = shifts.assign(z)
        key = self.facts.get("type_key")
        if key and key in obs.columns:
            place = {name: code for code, name in enumerate(shifts.types)}
            named = np.array([place.get(name, -1) for name in labels_of(obs, key)])
            types = np.where(named >= 0, named, types)
        return types

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        label_key: str | None = None,
        folds: int | None = None,
        sample_key: str = AS_FITTED,
        **keys: Unpack[ReadingKeys],
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
            **keys: See :meth:`predict`.

        Returns:
            ``accuracy``, ``macro_f1``, ``cross_entropy`` in nats, ``most_frequent_accuracy`` (of always predicting the
            most frequent label), and ``samples``, the number of scored samples.

        Raises:
            InputError: As in :meth:`predict`; or a label is not among the training labels; or there are too few samples
                for the folds.
        """
        self._fitted()
        reading = self._as_fitted(keys).changed(batch_key=sample_key)
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
                    pooled[~out],
                    codes[~out],
                    penalty,
                    classes=len(self.labels),
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
        state, _ = super()._state()
        arrays = {"centre": self._centre}
        if self._shifts is not None:
            state["shifts"], own = self._shifts.state()
            arrays |= own
        return state, arrays

    def _restore(
        self,
        state: dict[str, Any],
        arrays: dict[str, np.ndarray],
    ) -> None:
        super()._restore(state, arrays)
        self._centre = arrays["centre"]
        self._shifts = None
        if "shifts" in state:
            self._shifts = TypeShifts.restore(state["shifts"], arrays, self.labels)


def logistic_regression(
    features: np.ndarray,
    codes: np.ndarray,
    penalty: float,
    *,
    classes: int | None = None,
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
    centre = features.mean(axis=0)
    spread = features.std(axis=0)
    # Dimensions that hardly vary between samples would otherwise be blown up to the scale of the others.
    spread = np.maximum(spread, 0.05 * np.sqrt(np.square(spread).mean()) + 1e-12)
    # Divided by the root of the width, so that the penalty means the same for any latent size.
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
    with _one_blas_thread():
        for number in range(folds):
            out = fold == number
            for row, penalty in enumerate(PENALTIES):
                kernel, bias = logistic_regression(
                    features[~out],
                    codes[~out],
                    penalty,
                    classes=classes,
                )
                errors[row, out] = _cross_entropies(features[out] @ kernel + bias, codes[out])
    worse = errors - errors[errors.mean(axis=1).argmin()]
    doubt = worse.std(axis=1) / np.sqrt(len(codes))
    # Penalties are ordered from strong to weak, so the first one within the error is the strongest.
    chosen = int(np.flatnonzero(worse.mean(axis=1) <= doubt)[0])
    return PENALTIES[chosen], float(errors[chosen].mean())


def _one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Limit BLAS to one thread if threadpoolctl, which scikit-learn requires, is installed.

    Hundreds of fits of a few numbers wake the other threads thousands of times, and each wait spins.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    return threadpool_limits(1, "blas")


def _folds(codes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return int [samples], the fold of each: samples in random order, class by class, assigned round-robin."""
    order = np.random.default_rng(seed).permutation(len(codes))
    # Sorted by class and then assigned round-robin: every fold has about the same classes.
    order = order[np.argsort(codes[order], kind="stable")]
    fold = np.empty(len(codes), int)
    fold[order] = np.arange(len(codes)) % folds
    return fold


def _pool(z: np.ndarray, samples: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return float64 [names, latent]: the mean latent of each sample's cells."""
    return np.stack([z[samples == name].mean(axis=0, dtype=np.float64) for name in names])


def _labels_of_samples(
    samples: np.ndarray,
    labels: np.ndarray,
    label_key: str,
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
