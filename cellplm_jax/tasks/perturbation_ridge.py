"""Linear model of the changes of a screen, and the features of targets that it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.evaluate.perturbation import TOP_GENES, additive_change, change_scores
from cellplm_jax.tasks.perturbation_screen import Changes, shrinkage

CONDITION_SIZE = 64
"""Number of principal components of gene embeddings in the condition of the head."""

STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Prior variances of a term of the head, relative to that of the changes; 0 disables the term."""

MAXIMUM_FOLDS = 100
"""Maximum number of fits without some perturbations; with more perturbations, several are left out together."""


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Predictions of training perturbations, each without its own cells, and those of the baselines.

    Attributes:
        perturbations: [rows], canonical names.
        groups: [rows].
        cells: [rows].
        scores: float [rows] by score: ``rmse`` and ``pearson`` of the changes of all genes, and the same with the
            suffixes ``_mean_change`` (of the other perturbations), ``_additive`` (sum of the measured targets of a
            combination) and ``_no_change``.
        genes: int [rows, top], the genes with the largest measured change.
        measured: float [rows, top], their change.
        predicted: float [rows, top].
        mean_change: float [rows, top], of the other perturbations.
    """

    perturbations: list[str]
    groups: list[str]
    cells: list[int]
    scores: dict[str, list[float]]
    genes: list[list[int]]
    measured: list[list[float]]
    predicted: list[list[float]]
    mean_change: list[list[float]]

    @classmethod
    def of(
        cls,
        changes: Changes,
        predicted: np.ndarray,
        baselines: Mapping[str, np.ndarray],
    ) -> LeftOut:
        """Score predictions and baselines, float [rows, genes] each."""
        truth, scores = changes.values, {}
        # The suffix of a score names the method; that of the prediction itself is empty.
        given = {"": predicted, **{f"_{name}": b for name, b in baselines.items()}}
        for suffix, values in {**given, "_no_change": np.zeros_like(truth)}.items():
            all_scores = change_scores(truth, values)
            scores |= {f"{name}{suffix}": all_scores[name].tolist() for name in ("rmse", "pearson")}
        # A constant prediction has no correlation.
        scores.pop("pearson_no_change")
        top = np.argsort(-np.abs(truth), axis=1, kind="stable")[:, :TOP_GENES]
        taken = [
            np.take_along_axis(values, top, axis=1).round(5).tolist()
            for values in (truth, predicted, baselines["mean_change"])
        ]
        return cls(
            [str(name) for name in changes.names],
            [str(group) for group in changes.groups],
            [int(number) for number in changes.cells],
            scores,
            top.tolist(),
            *taken,
        )

    def table(self) -> pd.DataFrame:
        """Return one row per perturbation and group: perturbation, group, cells and the scores."""
        named = {"perturbation": self.perturbations, "group": self.groups, "cells": self.cells}
        return pd.DataFrame({**named, **self.scores})

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON; missing correlations are None."""
        scores = {
            name: [value if np.isfinite(value) else None for value in values]
            for name, values in self.scores.items()
        }
        return {**asdict(self), "scores": scores}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LeftOut:
        """Return the object of :meth:`as_dict`."""
        scores = {
            name: [np.nan if value is None else value for value in values]
            for name, values in content["scores"].items()
        }
        return cls(**{**content, "scores": scores})


class Ridge:
    """Changes as mean plus linear functions of condition and latent, with known noise per row (kernel ridge)."""

    def __init__(
        self,
        changes: Changes,
        condition: np.ndarray,
        latent: np.ndarray,
        number: np.ndarray,
    ):
        self.changes = changes
        self.number = number
        self.condition = condition
        self.latent = latent
        # The mean noise bounds the ratio of weights, because the noise of a few cells is itself uncertain.
        self.weight = 1.0 / (changes.noise + changes.noise.mean())
        mean = self.mean(np.arange(len(changes)))
        # Method of moments: the variance between perturbations is what the noise does not explain, at least 5 % of
        # all.
        left = np.square(changes.values - number[:, None] * mean).mean(axis=1)
        self.signal = max(
            float((left - changes.noise).mean()),
            0.05 * float(left.mean()),
            1e-12,
        )

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Return float64 [genes], the mean change per target, by least squares."""
        number = self.number[rows]
        weight = self.weight[rows]
        return (number * weight) @ self.changes.values[rows] / (np.square(number) @ weight)

    def solve(
        self,
        rows: np.ndarray,
        by_condition: float,
        by_latent: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean [genes], and the maps of condition and latent to changes, fitted to a subset of the rows."""
        condition = self.condition[rows]
        latent = self.latent[rows]
        mean = self.mean(rows)
        left = self.changes.values[rows] - self.number[rows][:, None] * mean
        # Kernel form, because perturbations are fewer than features.
        kernel = by_condition * condition @ condition.T + by_latent * latent @ latent.T
        dual = np.linalg.solve(
            # A tenth of the signal as additional noise: effects that no linear function explains.
            self.signal * kernel + np.diag(self.changes.noise[rows] + 0.1 * self.signal),
            left,
        )
        scale = self.signal
        return mean, scale * by_condition * condition.T @ dual, scale * by_latent * latent.T @ dual

    def left_out(
        self,
        units: np.ndarray,
        by_condition: float,
        by_latent: float,
        parts: Mapping[str, Sequence[str]] | None = None,
    ) -> np.ndarray:
        """Predict the changes of every unit without its rows.

        Args:
            units: [rows], the unit of each row. Above :data:`MAXIMUM_FOLDS` units, several are left out together.
            by_condition: Strength of the condition.
            by_latent: Strength of the latent.
            parts: Targets by name; residuals of the measured targets of combinations are then added, as in
                ``predict``. None: the linear terms only.

        Returns:
            float64 [rows, genes].
        """
        changes = self.changes
        predicted = np.zeros_like(self.changes.values)
        names = list(dict.fromkeys(units))
        fold_of = {unit: number % MAXIMUM_FOLDS for number, unit in enumerate(names)}
        folds = np.array([fold_of[unit] for unit in units])
        for number in dict.fromkeys(folds):
            out = folds == number
            mean, conditions, latents = self.solve(np.flatnonzero(~out), by_condition, by_latent)
            # The same sum as in a prediction: mean per target, condition, latent.
            own = self.number[:, None] * mean + self.condition @ conditions + self.latent @ latents
            predicted[out] = own[out]
            for row in np.flatnonzero(out) if parts else ():
                targets = parts[changes.names[row]]  # type: ignore[index]
                # Residuals of the targets that stay in the fit, in the same group.
                same = ~out & (changes.groups == changes.groups[row])
                for one in np.flatnonzero(same & np.isin(changes.names, targets)):
                    residual = changes.values[one] - own[one]
                    predicted[row] += residual * shrinkage(residual, float(changes.noise[one]))
        return predicted

    def errors(self, units: np.ndarray, by_condition: float, by_latent: float) -> np.ndarray:
        """Return float64 [units]: the mean squared error of each unit's changes, predicted without its rows."""
        predicted = self.left_out(units, by_condition, by_latent)
        squared = np.square(predicted - self.changes.values).mean(axis=1)
        return np.array([squared[units == unit].mean() for unit in dict.fromkeys(units)])

    def left_out_table(
        self,
        parts: Mapping[str, Sequence[str]],
        by_condition: float,
        by_latent: float,
    ) -> LeftOut | None:
        """Compare left-out predictions and baselines; perturbations are left out, or groups if there are too few.

        Args:
            parts: Targets by name.
            by_condition: Strength of the condition.
            by_latent: Strength of the latent.
        """
        changes = self.changes
        units, minimum = changes.names, 4
        if len(set(units)) < minimum:
            units, minimum = changes.groups, 3
        if len(set(units)) < minimum:
            return None
        mean = self.left_out(units, 0.0, 0.0)
        added = mean.copy()
        for row, name in enumerate(changes.names):
            same = changes.groups == changes.groups[row]
            if len(parts[name]) > 1:
                usual = mean[row] / len(parts[name])
                measured = [changes.values[same & (changes.names == p)] for p in parts[name]]
                added[row] = additive_change([m[0] if len(m) else usual for m in measured])
        predicted = self.left_out(units, by_condition, by_latent, parts)
        return LeftOut.of(changes, predicted, {"mean_change": mean, "additive": added})

    def choose(self) -> tuple[tuple[float, float], dict[str, float]]:
        """Return the strengths of condition and latent, and the errors with and without them.

        For the condition, the weakest strength within one standard error of the best one.
        """
        names = self.changes.names
        groups = self.changes.groups
        condition = latent = 0.0
        facts: dict[str, float] = {}
        if len(set(names)) >= 4:
            errors = np.stack([self.errors(names, strength, 0.0) for strength in STRENGTHS])
            worse = errors - errors[errors.mean(axis=1).argmin()]
            # Standard errors of paired differences: units differ far more than strengths do.
            doubt = worse.std(axis=1, ddof=1) / np.sqrt(worse.shape[1])
            chosen = int(np.flatnonzero(worse.mean(axis=1) <= doubt)[0])
            condition = STRENGTHS[chosen]
            facts |= {
                "left_out_perturbations_rmse": float(np.sqrt(errors[chosen].mean())),
                "left_out_perturbations_rmse_of_mean_change": float(np.sqrt(errors[0].mean())),
                "left_out_perturbations_rmse_of_no_change": float(
                    np.sqrt(np.square(self.changes.values).mean())
                ),
            }
        if len(set(groups)) >= 3:
            # No standard error here: groups are too few to estimate one.
            errors = np.stack([self.errors(groups, condition, strength) for strength in STRENGTHS])
            chosen = int(errors.mean(axis=1).argmin())
            latent = STRENGTHS[chosen]
            facts |= {
                "left_out_groups_rmse": float(np.sqrt(errors[chosen].mean())),
                "left_out_groups_rmse_without_latent": float(np.sqrt(errors[0].mean())),
            }
        return (condition, latent), facts


def left_out_messages(facts: Mapping[str, Any], strengths: Mapping[str, float]) -> list[str]:
    """Return messages about the benefit of condition and latent for left-out perturbations and groups."""
    messages = []
    for what, term, source, without in (
        ("perturbations", "condition", "the condition", "rmse_of_mean_change"),
        ("groups", "latent", "the latent of control cells", "rmse_without_latent"),
    ):
        if f"left_out_{what}_{without}" not in facts:
            continue
        error = facts[f"left_out_{what}_rmse"]
        other = facts[f"left_out_{what}_{without}"]
        if strengths[term] > 0:
            messages.append(
                f"Left-out {what}: RMSE {error:.4f} with {source}, {other:.4f} without."
            )
        else:
            messages.append(
                f"Left-out {what}: RMSE {other:.4f}; {source} does not improve it and is not used."
            )
    return messages


def target_features(
    embedding: np.ndarray | None,
    expression: sparse.csr_matrix | None,
    columns: np.ndarray,
    genes: int,
) -> np.ndarray:
    """Return features of each gene as a target.

    Args:
        embedding: float [genes, width], gene embeddings of the model; None: not used.
        expression: CSR [cells, measured genes], log-normalised, for the covariation of genes; None: not used.
        columns: int [measured genes], their rows in the vocabulary.
        genes: Size of the vocabulary.

    Returns:
        float32 [genes, features], with mean squared norm 1.
    """
    blocks = []
    if embedding is not None:
        # Dimensions of the embedding have different scales, which say nothing about their relevance.
        spread = np.maximum(embedding.std(axis=0), 1e-12)
        blocks.append(_unit(_reduce((embedding - embedding.mean(axis=0)) / spread)))
    if expression is not None:
        measured = _unit(_loadings(expression))
        block = np.zeros((genes, measured.shape[1]))
        block[columns] = measured
        blocks.append(block)
    return (np.concatenate(blocks, axis=1) / np.sqrt(len(blocks))).astype(np.float32)


def _reduce(values: np.ndarray, size: int = CONDITION_SIZE) -> np.ndarray:
    """Return the leading principal components [rows, up to size] of centred rows."""
    if values.shape[1] <= size:
        return values
    _, vectors = np.linalg.eigh(values.T @ values)
    vectors = vectors[:, ::-1][:, :size]
    # The sign of an eigenvector is arbitrary, and depends on the machine.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(size)])
    return values @ vectors


def _loadings(expression: sparse.csr_matrix, size: int = CONDITION_SIZE // 2) -> np.ndarray:
    """Return the loadings of genes [genes, up to size] on the leading components of standardised expression."""
    dense = np.asarray(expression.todense(), np.float64)
    dense -= dense.mean(axis=0)
    dense /= np.maximum(dense.std(axis=0), 1e-3)
    # The smaller of the two Gram matrices has the same eigenvalues.
    gram = dense.T @ dense / len(dense) if dense.shape[1] <= dense.shape[0] else None
    if gram is not None:
        value, vector = np.linalg.eigh(gram)
        order = np.argsort(value)[::-1][:size]
        found = vector[:, order] * np.sqrt(np.maximum(value[order], 0.0))
    else:
        value, vector = np.linalg.eigh(dense @ dense.T / len(dense))
        order = np.argsort(value)[::-1][:size]
        found = dense.T @ vector[:, order] / np.sqrt(len(dense))
    largest = found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])]
    return found * np.sign(largest)


def _unit(values: np.ndarray) -> np.ndarray:
    """Scale all rows by one factor to a mean squared norm of 1."""
    # One factor, not one per gene: the relative lengths of the rows are kept.
    mean_square = float(np.square(values).sum(axis=1).mean())
    return values / np.sqrt(max(mean_square, 1e-30))
