"""Perturbation prediction: expression changes for seen, unseen and combined targets, and for drugs or cytokines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd

from cellplm_jax.errors import InputError, nearest
from cellplm_jax.evaluate.inputs import column_means
from cellplm_jax.evaluate.perturbation import additive_change, change_scores, mean_scores, no_change
from cellplm_jax.tasks.perturb_fit import PredictorFit
from cellplm_jax.tasks.perturbation_head import PerturbationPrediction
from cellplm_jax.tasks.perturbation_names import PerturbationNames
from cellplm_jax.tasks.perturbation_ridge import LeftOut
from cellplm_jax.tasks.perturbation_screen import (
    MINIMUM_CELLS,
    log_normalize,
    screen_labels,
    values_of,
)
from cellplm_jax.tasks.reading import AS_FITTED, Reading, ReadingKeys

if TYPE_CHECKING:
    from anndata import AnnData


class PerturbationPredictor(PredictorFit):
    """Predicts the mean change of expression that a perturbation causes in control cells.

    A prediction is the sum of: the mean change of all training perturbations (per target); the output of the
    perturbation head for the condition (for genes the sum of the targets' gene embeddings, otherwise a learned vector)
    and the latent of the control cells; and, for seen perturbations, the residual of their measured change, shrunk
    by its noise (positive-part James-Stein). Targets of a combination are additive.

    Each control cell is embedded as a context of its own, so that a group has the same latent whichever other cells are
    in its file.

    Names are read in the spellings of the field (:mod:`cellplm_jax.tasks.perturbation_names`): ``A+ctrl`` is ``A``, and
    an alias, an Ensembl id or the guide ``STAT1g2`` is the gene. ``messages`` contains what was read.

    The head is linear. ``method="ridge"`` solves it exactly on the latents of the unchanged model. Its deviation from
    the mean change, for the condition and for the latent, is regularised by leaving out complete perturbations
    (for the latent: complete groups of control cells); no deviation is one of the choices, and is selected if gene
    embeddings do not predict the effects. ``method="finetune"`` continues from there by gradient descent, with some
    perturbations held out for early stopping.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture from scratch.
        method: ``"ridge"`` or ``"finetune"``.
        gene_features: Features of a target: ``"model"``, its gene embedding; ``"data"``, its covariation with other
            genes among the training cells (zero for unmeasured genes); ``"both"``; ``"default"``:
            ``"model"`` with a pretrained model, ``"data"`` from scratch.
        genes: Number of highly variable genes to predict; None: all; default: 3,000 from scratch, else all.
        quiet: Disable progress output.
        **training: Fields of :class:`cellplm_jax.config.FinetuneConfig`; ``"ridge"`` only uses ``seed``
            and ``cells_per_step``. Also ``precision`` and ``devices``; None: as the model.

    Attributes:
        perturbations: Canonical names of the training perturbations, sorted.
        conditions: Parts of these names that are not genes of the model, sorted.
        control: Name of the control.
        strengths: Selected strengths of the condition and of the latent; 0: the term is disabled.
        left_out: Predictions of the training perturbations, each without its own cells, with those of the baselines;
            None with fewer than four perturbations.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
        InputError: A value is invalid.
    """

    @property
    def mean_change(self) -> np.ndarray:
        """Mean change of the training perturbations per target, float32 [genes]: the baseline for unseen targets."""
        self._fitted()
        return self._arrays["mean_change"]

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        perturbations: str | float | Sequence[str] | Sequence[float],
        *,
        group: str | None = None,
        controls: AnnData | str | os.PathLike | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> PerturbationPrediction:
        """Predict the mean effect of perturbations on control cells.

        Args:
            perturbations: Names, in any spelling: of seen perturbations, of other genes of the model, of combinations
                (``"A+B"``, in any order), or of seen conditions.
            group: A seen group of control cells (value of the ``covariate_key``); None: all control cells.
            controls: Other control cells, such as those of a new cell type. If their ``obs`` has the
                ``perturbation_key``, only its control cells are used.
            **keys: For ``controls``.

        Returns:
            Change and expression, [perturbations, genes] each; genes are named as in the model.

        Raises:
            InputError: The estimator is not fitted, a name is neither a gene nor a seen condition (similar names are
                listed), the group does not exist, or the counts, genes or keys of ``controls`` cannot be used.
        """
        model = self._fitted()
        single = isinstance(perturbations, str | int | float)
        names = [str(name) for name in ([perturbations] if single else perturbations)]
        if not names:
            raise InputError("no perturbations were given", "at least one", "Pass their names")
        if controls is not None:
            if group is not None:
                raise InputError("both group and controls", "one of them", "Omit one")
            # New control cells give both the latent and the expression that the change is added to.
            z, control = self._of_controls(controls, self._as_fitted(keys))
        else:
            z, control = self._of_group(group)
        canonical = [self._names.canonical(name) for name in names]
        change = self._change(
            canonical,
            np.tile(z, (len(names), 1)),
            [group or ""] * len(names),
        )
        known = [self._known(name) for name in canonical]
        index = pd.Index(names, name="perturbation")
        columns = pd.Index(model.genes, name="gene")
        # Log-normalised expression has no negative values.
        expression = np.maximum(control + change, 0.0).astype(np.float32)
        return PerturbationPrediction(
            change=pd.DataFrame(change, index=index, columns=columns),
            expression=pd.DataFrame(expression, index=index, columns=columns),
            control=pd.Series(control, index=columns, name="control"),
            known=pd.Series(known, index=index, name="known"),
            messages=self._doubts(known),
        )

    def _of_group(self, group: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Return mean latent and mean expression of the control cells of a group, or of all."""
        row = -1
        if group is not None:
            if group not in self._groups:
                raise InputError(
                    f"there is no group '{group}' of control cells",
                    f"one of {', '.join(map(repr, self._groups))}",
                    nearest(group, self._groups, "Pass its control cells as controls"),
                )
            row = self._groups.index(group)
        return self._arrays["z"][row], self._arrays["control"][row]

    def _of_controls(self, data: Any, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
        """Return mean latent and mean expression of other control cells."""
        model = self._fitted()
        table = self._read_more(data, reading)
        # Without the column of the fit, all cells are taken for control cells.
        cells = np.arange(len(table))
        key = self.facts["perturbation_key"]
        if key in table.obs.columns:
            named = [self._names.canonical(name) for name in values_of(table, key)]
            cells = np.flatnonzero(np.array(named, object) == self.control)
        if not len(cells):
            raise InputError(
                f"controls has no cell with '{self.control}' in obs['{key}']",
                "control cells",
                f"Select them, or remove the column '{key}'",
            )
        z = self._latents(model, self._lay_out(table, cells, model), len(table))[cells]
        expression = log_normalize(table.counts[cells])
        return z.mean(axis=0), column_means(expression, "float32")

    def _doubts(self, known: Sequence[str]) -> tuple[str, ...]:
        """Return warnings about predictions of these kinds."""
        new = sum(kind in ("unseen", "partly seen") for kind in known)
        if not new or self.strengths.get("condition", 0.0) > 0:
            return ()
        what = "perturbation has a target" if new == 1 else "perturbations have targets"
        why = "gene features did not improve the prediction of left-out perturbations"
        if "left_out_perturbations_rmse" not in self.facts:
            why = f"{len(self.perturbations)} fitted perturbations are too few to learn more"
        return (
            f"{new} {what} not in the training data; the prediction is the mean change of the fitted "
            f"perturbations, because {why}.",
        )

    def _known(self, name: str) -> str:
        if name == self.control:
            return "control"
        if name in self.perturbations:
            return "seen"
        parts = self._names.parts(name)
        seen = sum(part in self.perturbations for part in parts)
        if seen == 0:
            return "unseen"
        return "combination of seen" if seen == len(parts) else "partly seen"

    def _change(
        self,
        names: Sequence[str],
        z: np.ndarray,
        groups: Sequence[str],
    ) -> np.ndarray:
        """Return float32 [names, genes] for canonical names, latents [names, latent] and groups ("": a new group)."""
        size = self._arrays["features"].shape[1] + len(self.conditions) + 1
        blank = np.zeros(size, np.float32)
        conditions = [blank if name == self.control else self._condition(name) for name in names]
        change = self._head(np.asarray(z, np.float32), condition=np.stack(conditions))
        row_of = {name: row for row, name in enumerate(self._residual_names)}
        pair_of = {tuple(pair): row for row, pair in enumerate(self._pair_names)}
        for place, (name, group) in enumerate(zip(names, groups, strict=True)):
            if name == self.control:
                # The head has a bias, so its output for no condition is not exactly 0.
                change[place] = 0.0
                continue
            # A measured combination has a residual of its own; otherwise those of its targets are added.
            for part in [name] if name in row_of else self._names.parts(name):
                if part in row_of:
                    change[place] += self._arrays["residual"][row_of[part]]
                if (part, group) in pair_of:
                    change[place] += self._arrays["pair_residual"][pair_of[part, group]]
        return change

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        perturbations: Sequence[str] | None = None,
        perturbation_key: str | None = None,
        covariate_key: str | None = AS_FITTED,
        **keys: Unpack[ReadingKeys],
    ) -> dict[str, float]:
        """Predict the perturbations of other cells from their control cells, and score the predictions.

        Args:
            adata: Perturbed and control cells, of perturbations or groups that were not used in the fit.
            perturbations: Score only these; None: all in ``adata``.
            perturbation_key: Column of ``obs``; None: the one of ``fit``.
            covariate_key: See :meth:`fit`.
            **keys: As in :meth:`fit`.

        Returns:
            Means over perturbations (and groups) of the scores of
            :func:`cellplm_jax.evaluate.perturbation.change_scores`, and their number. The same for the baselines, with
            a prefix: ``mean_change_`` predicts the mean change of the training perturbations (of a seen
            perturbation: its own), ``additive_`` the sum of the measured changes of the targets (of an unseen
            target: the mean change), ``no_change_`` control expression.

        Raises:
            InputError: As in :meth:`fit`, or there is nothing to score.
        """
        model = self._fitted()
        reading = self._as_fitted(keys)
        key = perturbation_key or self.facts["perturbation_key"]
        covariate = self.facts["covariate_key"] or None
        if covariate_key is not AS_FITTED:
            covariate = covariate_key
        table = self._read_more(adata, reading)
        named, groups, usable = screen_labels(table, self._names, key, covariate)
        expression = log_normalize(table.counts)
        changes = self._measure(expression, table, named, groups, usable)
        if perturbations is not None:
            wanted = [self._names.canonical(str(name)) for name in perturbations]
            changes = changes.at(np.isin(changes.names, wanted))
        if not len(changes):
            raise InputError(
                "no perturbation to score",
                f"perturbations with at least {MINIMUM_CELLS} cells (in one group)",
                "Check the names and the column",
            )
        controls = np.flatnonzero(usable & (named == self.control))
        z = self._latents(model, self._lay_out(table, controls, model), len(table))
        mean_of = {
            group: z[controls[groups[controls] == group]].mean(axis=0)
            for group in dict.fromkeys(changes.groups)
        }
        latent = np.stack([mean_of[group] for group in changes.groups])
        predicted = self._change(list(changes.names), latent, list(changes.groups))
        seen = dict(zip(self._residual_names, self._arrays["seen_change"], strict=True))
        usual = self._arrays["mean_change"]
        parts = list(map(self._names.parts, changes.names))
        # The change was measured per target, so a combination has a multiple of it.
        mean = [seen.get(n, usual * len(p)) for n, p in zip(changes.names, parts, strict=True)]
        added = [additive_change([seen.get(part, usual) for part in own]) for own in parts]
        truth = changes.values
        scores = mean_scores(change_scores(truth, predicted))
        for name, other in (
            ("mean_change", np.stack(mean)),
            ("additive", np.stack(added)),
            ("no_change", no_change(*truth.shape)),
        ):
            for metric, value in mean_scores(change_scores(truth, other)).items():
                scores[f"{name}_{metric}"] = value
        return {**scores, "perturbations": len(changes)}

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state, _ = super()._state()
        state["names"] = {**self._names.as_dict(), "vocabulary": None}
        # Usually both are the genes of the model, which are saved once.
        if list(self._names.vocabulary) != self._vocabulary:
            state["names"]["vocabulary"] = list(self._names.vocabulary)
        if self.left_out is not None:
            state["left_out"] = self.left_out.as_dict()
        return state, {name: array for name, array in self._arrays.items() if array.size}

    def _restore(
        self,
        state: dict[str, Any],
        arrays: dict[str, np.ndarray],
    ) -> None:
        super()._restore(state, arrays)
        # Predictors saved without rules of names keep the simple ones.
        rules = state.get("names", {"control": self.control, "plain": True})
        rules["vocabulary"] = tuple(rules.get("vocabulary") or self._vocabulary)
        self._names = PerturbationNames(**{**rules, "rejected": tuple(rules.get("rejected", ()))})
        self.left_out = LeftOut.from_dict(state["left_out"]) if "left_out" in state else None
        genes = arrays["control"].shape[1]
        self._arrays = {"pair_residual": np.zeros((0, genes), np.float32), **arrays}
