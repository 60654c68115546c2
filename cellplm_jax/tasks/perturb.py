"""Perturbation prediction: expression changes for seen, unseen and combined targets, and for drugs or cytokines."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import sparse

from cellplm_jax.config import FinetuneConfig, HeadConfig, MaskingConfig, ModelConfig
from cellplm_jax.data.anndata_io import Values
from cellplm_jax.data.genes import load_human_table, map_genes, symbols_of
from cellplm_jax.errors import InputError, explain, nearest
from cellplm_jax.evaluate.perturbation import change_scores, mean_change, mean_scores, no_change
from cellplm_jax.tasks.contexts import (
    CellTable,
    Example,
    Layout,
    contexts_of,
    gather,
    labels_of,
    make_examples,
    read_cells,
)
from cellplm_jax.tasks.estimator import AS_FITTED, Estimator, Reading
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.train.finetune import LOSS, SCORE, Loss, clean_forward, corrupted_forward

if TYPE_CHECKING:
    from anndata import AnnData

SEPARATOR = "+"
"""Separator of the targets of a combination."""

TARGET_SUM = 1e4
"""Counts per cell before the logarithm."""

CONTROL_CELLS = 4096
"""Maximum number of control cells for computing latents; larger sets are sampled evenly."""

CONDITION_SIZE = 64
"""Number of principal components of gene embeddings in the condition of the head."""

MINIMUM_CELLS = 5
"""Minimum number of cells per perturbation and group; the mean of smaller ones is mostly noise."""

MINIMUM_CONTROLS = 10
"""Minimum number of control cells per batch (and group); otherwise the control cells of all batches are used."""

EVERYTHING = "all cells"
"""Group of all cells if no ``covariate_key`` is given."""

_STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Prior variances of a term of the head, relative to that of the changes; 0 disables the term."""

KERNEL, BIAS = ("head", "mlp", "linear_0", "kernel"), ("head", "mlp", "linear_0", "bias")


@dataclass(frozen=True, eq=False)
class PerturbationPrediction:
    """Predictions for perturbations.

    Attributes:
        change: [perturbations, genes], change of mean log-normalised expression (counts scaled to 10,000 per cell,
            log1p) relative to control cells.
        expression: [perturbations, genes], mean log-normalised expression: control plus change, clipped at 0.
        control: [genes], mean log-normalised expression of the control cells.
        known: [perturbations], ``"seen"``, ``"combination of seen"``, ``"partly seen"``, ``"unseen"`` or ``"control"``.
        messages: Messages about the basis of the predictions.
    """

    change: pd.DataFrame
    expression: pd.DataFrame
    control: pd.Series
    known: pd.Series
    messages: tuple[str, ...] = ()

    def tidy(self) -> pd.DataFrame:
        """Return one row per perturbation and gene: perturbation, gene, symbol, control, change, expression, known."""
        perturbations, genes = self.change.shape
        names = list(map(str, self.change.columns))
        return pd.DataFrame(
            {
                "perturbation": np.repeat(self.change.index.to_numpy(), genes),
                "gene": np.tile(np.array(names, object), perturbations),
                "symbol": np.tile(np.array(symbols_of(names), object), perturbations),
                "control": np.tile(self.control.to_numpy(), perturbations),
                "change": self.change.to_numpy().ravel(),
                "expression": self.expression.to_numpy().ravel(),
                "known": np.repeat(self.known.to_numpy(), genes),
            }
        )


@dataclass(frozen=True, eq=False)
class _Changes:
    """Measured changes, one row per perturbation and group.

    Attributes:
        names: str [rows], canonical names.
        groups: str [rows].
        values: float64 [rows, genes].
        noise: float64 [rows], variance of the mean, averaged over genes.
        cells: int [rows].
    """

    names: np.ndarray
    groups: np.ndarray
    values: np.ndarray
    noise: np.ndarray
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def at(self, rows: np.ndarray) -> _Changes:
        return _Changes(
            self.names[rows], self.groups[rows], self.values[rows], self.noise[rows], self.cells[rows]
        )  # fmt: skip


class PerturbationPredictor(Estimator):
    """Predicts the mean change of expression that a perturbation causes in control cells.

    A prediction is the sum of: the mean change of all training perturbations (per target); the output of the
    perturbation head for the condition (for genes the sum of the targets' gene embeddings, otherwise a learned vector)
    and the latent of the control cells; and, for seen perturbations, the residual of their measured change, shrunk
    by its noise (positive-part James-Stein). Targets of a combination are additive.

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
        **training: Fields of :class:`cellplm_jax.config.FinetuneConfig`; ``"ridge"`` only uses ``seed``,
            ``cells_per_context`` and ``cells_per_step``. Also ``precision`` and ``devices``; None: as the model.

    Attributes:
        perturbations: Names of the training perturbations, sorted.
        conditions: Parts of these names that are not genes, sorted.
        control: Name of the control.
        strengths: Selected strengths of the condition and of the latent; 0: the term is disabled.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
        InputError: A value is invalid.
    """

    task: ClassVar[str] = "perturbation"
    recipe: ClassVar[FinetuneConfig] = FinetuneConfig(
        epochs=60,
        patience=15,
        learning_rate=5e-4,
        warmup_epochs=5,
        freeze="encoder",
        validation_fraction=0.2,
        masking=MaskingConfig(cell_fraction=0.75, gene_fraction=0.25, drop_cells=0.0),
    )

    def __init__(
        self,
        model: Pretrained | str | os.PathLike | None = None,
        *,
        method: Literal["ridge", "finetune"] = "ridge",
        gene_features: Literal["default", "model", "data", "both"] = "default",
        genes: int | Literal["default"] | None = "default",
        quiet: bool = False,
        **training: Any,
    ):
        super().__init__(model, genes=genes, quiet=quiet, **training)
        for name, value, known in (
            ("method", method, ("ridge", "finetune")),
            ("gene_features", gene_features, ("default", "model", "data", "both")),
        ):
            if value not in known:
                raise InputError(
                    f"{name}={value!r}", f"one of {', '.join(map(repr, known))}", "Use one of them"
                )
        if self.training.masking.drop_cells:
            raise InputError(
                f"masking.drop_cells = {self.training.masking.drop_cells}",
                "0, because every control cell is paired with a perturbation",
                "Pass a masking with drop_cells=0.0",
            )
        self.method: str = method
        self.gene_features: str = gene_features
        self.perturbations: list[str] = []
        self.conditions: list[str] = []
        self.control = ""
        self.strengths: dict[str, float] = {}
        self._vocabulary: list[str] = []
        self._arrays: dict[str, np.ndarray] = {}
        self._groups: list[str] = []
        self._residual_names: list[str] = []
        self._pair_names: list[list[str]] = []

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        perturbation_key: str,
        control: str,
        targets: Literal["auto", "genes", "conditions"] = "auto",
        covariate_key: str | None = None,
        batch_key: str | None = None,
        spatial_key: str | None = "spatial",
        layer: str | None = None,
        gene_key: str | None = None,
        values: Values = "counts",
    ) -> PerturbationPredictor:
        """Fit to perturbed and control cells.

        Cells are compared with the control cells of their own batch if there are enough of them. Cells without a
        perturbation (NaN) are omitted, and counted in ``messages``.

        Args:
            adata: Raw counts and perturbations.
            perturbation_key: Column of ``obs`` with the perturbation of every cell; ``"A+B"`` is a combination.
            control: Its value for control cells.
            targets: Whether perturbations are genes (Ensembl ids or symbols) or other conditions; ``"auto"``: genes
                if they are in the vocabulary, else conditions.
            covariate_key: Column of ``obs`` with groups of cells, such as cell types, with different responses; the
                latent of a group's control cells represents it, and :meth:`predict` accepts control cells of new
                groups. None: one group.
            batch_key: Column of ``obs`` with the batch (tissue sample) of each cell.
            spatial_key: Key of ``obsm`` with coordinates; the default one is used if present.
            layer: Layer with the counts; None: search for them.
            gene_key: Column of ``var`` with gene ids; None: the best match.
            values: Kind of values; see :func:`cellplm_jax.embed`.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts, genes or perturbations cannot be used; the message states the remedy.
        """
        table = self._read(adata, Reading(batch_key, spatial_key, layer, gene_key, values))
        named, groups, usable = self._labels(
            table, perturbation_key, control, covariate_key, tell=True
        )
        controls = np.flatnonzero(usable & (named == control))
        table = self._choose_genes(table, np.flatnonzero(usable))
        self.control = str(control)
        self.facts = {
            "perturbation_key": perturbation_key,
            "covariate_key": covariate_key or "",
            "cells": len(table),
            "control_cells": len(controls),
            "method": self.method,
        }
        expression = log_normalize(table.counts)
        changes = _measure(expression, table, named, groups, usable, self.control)
        self._tell_left_out(named, groups, usable, changes)
        self.perturbations = sorted(set(changes.names))
        self._vocabulary = list(table.genes if self.base is None else self.base.genes)
        self._describe(changes, targets)
        self._arrays = {"features": self._features(expression, table)}
        condition = np.stack([self._condition(name) for name in changes.names])

        start = self._begin(table, self._configuration(len(table.genes), condition.shape[1]))
        if len(controls) > CONTROL_CELLS:
            generator = np.random.default_rng(self.training.seed)
            controls = np.sort(generator.choice(controls, CONTROL_CELLS, replace=False))
        self._groups = sorted(set(groups[controls]))
        layouts = self._lay_out(table, controls, start)
        z = self._latents(start, layouts, len(table))
        held = (
            self._hold_out(changes) if self.method == "finetune" else np.zeros(len(changes), bool)
        )
        head = self._solve(changes.at(~held), condition[~held], self._group_means(z, groups))
        start = _with_head(start, *head)
        if self.method == "finetune":
            self._train(start, layouts, changes, condition, held, groups)
            z = self._latents(self._fitted(), layouts, len(table))
        else:
            self._keep(start, start.params)
        self._arrays["z"] = self._group_means(z, groups).astype(np.float32)
        control_rows = [
            expression[usable & (named == control) & (groups == g)] for g in self._groups
        ]
        means = [np.asarray(part.mean(axis=0)).ravel() for part in control_rows]
        means.append(np.asarray(expression[usable & (named == control)].mean(axis=0)).ravel())
        self._arrays["control"] = np.stack(means).astype(np.float32)
        single = np.array([len(_parts(name)) for name in changes.names])
        self._arrays["mean_change"] = mean_change(changes.values, targets=single).astype(np.float32)
        self._remember(changes, condition)
        self.facts |= {
            "perturbations": len(self.perturbations),
            "groups": len(self._groups),
            "genes": len(table.genes),
        }
        self._tell_left_out_errors()
        self._log_messages()
        return self

    def _tell_left_out_errors(self) -> None:
        """Log the benefit of the head on left-out perturbations or groups."""
        for what, plain in (
            ("perturbations", "left_out_perturbations_rmse_of_mean_change"),
            ("groups", "left_out_groups_rmse_without_latent"),
        ):
            if plain not in self.facts:
                continue
            error, other = self.facts[f"left_out_{what}_rmse"], self.facts[plain]
            used = self.strengths["condition" if what == "perturbations" else "latent"] > 0
            source = "the condition" if what == "perturbations" else "the latent of control cells"
            self.messages.append(
                f"Left-out {what}: RMSE {error:.4f} with {source}, {other:.4f} without."
                if used
                else f"Left-out {what}: RMSE {other:.4f}; {source} does not improve it and is not used."
            )

    def _labels(
        self, table: CellTable, key: str, control: str, covariate_key: str | None, *, tell: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return canonical perturbation [cells], group [cells], and the mask of usable cells."""
        raw = labels_of(table.obs, key)
        there = np.array([name is not None for name in raw], bool)
        known = sorted(set(raw[there]))
        control = str(control)
        if control not in known:
            shown = ", ".join(map(repr, known[:8])) + (" and more" if len(known) > 8 else "")
            raise InputError(
                f"no cell has the control '{control}' in obs['{key}']",
                f"one of its values: {shown or 'none, all are missing'}",
                nearest(control, known, "Pass the value of the control cells"),
            )
        if len(known) < 2:
            raise InputError(
                f"all cells with a value in obs['{key}'] are control cells",
                "perturbed cells too",
                "Check the column, or add more cells",
            )
        groups = np.full(len(table), EVERYTHING, object)
        usable = there.copy()
        if covariate_key is not None:
            covariates = labels_of(table.obs, covariate_key)
            usable &= np.array([name is not None for name in covariates], bool)
            groups = np.where(usable, covariates, "")
        named = np.array([control if n == control else _canonical(n) for n in raw], object)
        named[~there] = ""
        for group in dict.fromkeys(groups[usable]):
            if not (usable & (groups == group) & (named == control)).any():
                raise InputError(
                    f"group '{group}' of obs['{covariate_key}'] has no control cells",
                    f"cells with '{control}' in obs['{key}'] in every group",
                    "Remove the cells of that group, or use another covariate_key",
                )
        if tell and not usable.all():
            self.messages.append(
                f"{int((~usable).sum())} of {len(table)} cells have no perturbation or group and were omitted."
            )
        return named, groups, usable

    def _tell_left_out(
        self, named: np.ndarray, groups: np.ndarray, usable: np.ndarray, changes: _Changes
    ) -> None:
        kept = set(zip(changes.names, changes.groups, strict=True))
        there = set(zip(named[usable], groups[usable], strict=True))
        lost = sorted(pair for pair in there - kept if pair[0] != self.control)
        if not len(changes):
            raise InputError(
                f"no perturbation has {MINIMUM_CELLS} cells",
                f"at least {MINIMUM_CELLS} cells of one perturbation (in one group)",
                "Add more cells, or use coarser groups",
            )
        if lost:
            self.messages.append(
                f"Omitted for fewer than {MINIMUM_CELLS} cells: {len(lost)} (such as {lost[0][0]!r})."
            )

    def _describe(self, changes: _Changes, targets: str) -> None:
        """Classify the parts of perturbations as genes or as conditions with learned vectors."""
        parts = sorted({part for name in changes.names for part in _parts(name)})
        if targets not in ("auto", "genes", "conditions"):
            raise InputError(
                f"targets={targets!r}", "'auto', 'genes' or 'conditions'", "Use one of them"
            )
        self.conditions = []
        if targets == "conditions":
            self.conditions = parts
            return
        columns = map_genes(parts, self._vocabulary, minimum=0).column
        unknown = [part for part, column in zip(parts, columns, strict=True) if column < 0]
        if unknown and targets == "genes":
            raise InputError(self._no_gene(unknown[0]))
        self.conditions = unknown
        if unknown and len(unknown) < len(parts):
            self.messages.append(
                f"Not in the vocabulary, treated as conditions: {', '.join(unknown[:5])}"
                + (" and others." if len(unknown) > 5 else ".")
            )

    def _no_gene(self, name: str) -> str:
        """Return the message for an unknown target, with the closest names."""
        candidates = {symbol: symbol for symbol in symbols_of(self._vocabulary)}
        candidates |= {gene: gene for gene in [*self._vocabulary, *self.conditions]}
        upper = {text.upper(): text for text in candidates}
        near = [upper[n] for n in difflib.get_close_matches(name.upper(), list(upper), n=3)]
        return explain(
            f"'{name}' is neither a gene of the model's vocabulary nor a training condition",
            "a gene symbol or id" + (f", one of {', '.join(self.conditions)}" if self.conditions else ""),
            f"The closest names are {', '.join(map(repr, near))}" if near else "Check the name",
        )  # fmt: skip

    def _features(self, expression: sparse.csr_matrix, table: CellTable) -> np.ndarray:
        """Return float32 [vocabulary, size]: features of each gene as a target, with mean squared norm 1."""
        kind = self.gene_features
        if kind == "default":
            kind = "data" if self.base is None else "model"
        if kind != "data" and self.base is None:
            self.messages.append(
                "Training from scratch has no gene embeddings; using gene features 'data'."
            )
            kind = "data"
        blocks = []
        if kind in ("model", "both") and self.base is not None:
            embedding = np.asarray(self.base.params["embedder"]["gene_embedding"], np.float64)
            spread = np.maximum(embedding.std(axis=0), 1e-12)
            blocks.append(_unit(_reduce((embedding - embedding.mean(axis=0)) / spread)))
        if kind in ("data", "both"):
            cells = np.random.default_rng(self.training.seed).permutation(len(table))[:5000]
            loadings = _unit(_loadings(expression[np.sort(cells)]))
            block = np.zeros((len(self._vocabulary), loadings.shape[1]))
            place = {gene: row for row, gene in enumerate(self._vocabulary)}
            block[[place[gene] for gene in table.genes]] = loadings
            blocks.append(block)
        return (np.concatenate(blocks, axis=1) / np.sqrt(len(blocks))).astype(np.float32)

    def _condition(self, name: str) -> np.ndarray:
        """Return float32 [condition] of a perturbation: features of its genes, its conditions, number of targets."""
        features = self._arrays["features"]
        size = features.shape[1]
        encoded = np.zeros(size + len(self.conditions) + 1, np.float32)
        for part in _parts(name):
            if part in self.conditions:
                encoded[size + self.conditions.index(part)] += 1.0
            else:
                column = map_genes([part], self._vocabulary, minimum=0).column[0]
                if column >= 0:
                    encoded[:size] += features[column]
                elif not is_human_gene(part):
                    raise InputError(self._no_gene(part))
                # Otherwise a gene without features: its prediction is the mean change.
            encoded[-1] += 1.0
        return encoded

    def _configuration(self, genes: int, condition: int) -> ModelConfig:
        """Return the architecture with a linear perturbation head."""
        config = self._architecture()
        head = HeadConfig(kind="perturbation", outputs=genes, layers=1, condition=condition)
        return dataclasses.replace(config, head=head)

    def _lay_out(self, table: CellTable, cells: np.ndarray, model: Pretrained) -> list[Layout]:
        return make_examples(
            table,
            contexts_of(table.batch, cells, limit=self.training.cells_per_context or None),
            model.config,
            cells_per_step=self.training.cells_per_step,
        )

    def _latents(self, model: Pretrained, layouts: Sequence[Layout], cells: int) -> np.ndarray:
        """Return float32 [cells, latent]; NaN for cells of no layout."""
        run = jax.jit(
            lambda params, batch: clean_forward(params, batch, model.config).latent.mean
        )  # fmt: skip
        params = jax.device_put(model.params)
        return gather(layouts, [run(params, layout.example.batch) for layout in layouts], cells)  # type: ignore[misc]

    def _group_means(self, z: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Return float64 [groups + 1, latent]: the mean latent of each group's control cells, and of all."""
        there = np.isfinite(z).all(axis=1)
        means = [
            z[there & (groups == group)].mean(axis=0, dtype=np.float64) for group in self._groups
        ]
        return np.stack([*means, z[there].mean(axis=0, dtype=np.float64)])

    def _solve(
        self, changes: _Changes, condition: np.ndarray, z: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel [latent + condition, genes] and bias [genes] of the head, solved exactly."""
        place = {group: row for row, group in enumerate(self._groups)}
        latent = z[[place[group] for group in changes.groups]]
        centre = latent.mean(axis=0)
        # Scale the latent with one factor: scaling each dimension would amplify small differences between groups.
        scale = max(float(np.sqrt(np.square(latent - centre).sum(axis=1).mean())), 1e-6)
        latent = (latent - centre) / scale
        number = condition[:, -1].astype(np.float64)
        features = condition[:, :-1].astype(np.float64)
        usual = number @ features / np.square(number).sum()
        problem = _Ridge(changes, features - number[:, None] * usual, latent, number)
        chosen, errors = problem.choose()
        self.strengths = {"condition": chosen[0], "latent": chosen[1]}
        self.facts |= errors
        mean, by_condition, by_latent = problem.solve(np.arange(len(changes)), *chosen)
        kernel = np.concatenate(
            [by_latent / scale, by_condition, (mean - usual @ by_condition)[None]], axis=0
        )
        return kernel.astype(np.float32), (-(centre / scale) @ by_latent).astype(np.float32)

    def _hold_out(self, changes: _Changes) -> np.ndarray:
        """Return bool [rows], those of perturbations (with fewer than five: of groups) held out for validation."""
        units = changes.names if len(set(changes.names)) >= 5 else changes.groups
        names = sorted(set(units))
        number = round(self.training.validation_fraction * len(names))
        if len(names) < 3 or number < 1:
            return np.zeros(len(changes), bool)
        generator = np.random.default_rng([self.training.seed, 1])
        return np.isin(units, generator.permutation(names)[:number])

    def _train(
        self,
        start: Pretrained,
        layouts: Sequence[Layout],
        changes: _Changes,
        condition: np.ndarray,
        held: np.ndarray,
        groups: np.ndarray,
    ) -> None:
        """Continue by gradient descent, with every control cell paired with a random perturbation per epoch."""
        rows_of = {g: np.flatnonzero(~held & (changes.groups == g)) for g in self._groups}

        def examples(epoch: int) -> list[Example]:
            generator = np.random.default_rng([self.training.seed, 2, epoch])
            found = []
            for layout in layouts:
                row = np.full(layout.cells.shape, -1, np.int32)
                for group, rows in rows_of.items():
                    here = (layout.cells >= 0) & (groups[np.maximum(layout.cells, 0)] == group)
                    if len(rows):
                        row[here] = generator.choice(rows, int(here.sum()))
                found.append(Example(layout.example.batch, {"row": jnp.asarray(row)}))
            return found

        truth, place = changes.values[held], {g: row for row, g in enumerate(self._groups)}
        group_of = [place[group] for group in changes.groups[held]]

        def validate(params: Any) -> dict[str, float]:
            model = dataclasses.replace(start, params=params)
            z = self._group_means(self._latents(model, layouts, len(groups)), groups)[group_of]
            kernel = np.asarray(params["head"]["mlp"]["linear_0"]["kernel"], np.float64)
            bias = np.asarray(params["head"]["mlp"]["linear_0"]["bias"], np.float64)
            found = np.concatenate([z, condition[held]], axis=1) @ kernel + bias
            scores = mean_scores(change_scores(truth, found))
            return {SCORE: -scores["rmse"], LOSS: scores["rmse"], "pearson": scores["pearson"]}

        self._finetune(
            start,
            loss=perturbation_loss(
                start.config, self.training.masking, condition, changes.values, changes.noise
            ),
            examples=examples,
            validate=validate if held.any() else None,
        )

    def _remember(self, changes: _Changes, condition: np.ndarray) -> None:
        """Store the residuals of seen perturbations, shrunk by their noise."""
        place = {group: row for row, group in enumerate(self._groups)}
        z = self._arrays["z"][[place[group] for group in changes.groups]]
        left = changes.values - self._head(z, condition=condition)
        names, kept, measured = [], [], []
        for name in self.perturbations:
            rows = np.flatnonzero(changes.names == name)
            share = 1.0 / (changes.noise[rows] + changes.noise[rows].mean())
            share /= share.sum()
            whole = share @ left[rows]
            whole *= shrinkage(whole, float(np.square(share) @ changes.noise[rows]))
            names.append(name)
            kept.append(whole)
            measured.append(share @ changes.values[rows])
            left[rows] -= whole
        self._residual_names = names
        self._arrays["residual"] = np.stack(kept).astype(np.float32)
        self._arrays["seen_change"] = np.stack(measured).astype(np.float32)
        self._pair_names, pairs = [], []
        if len(self._groups) > 1:
            for row in range(len(changes)):
                self._pair_names.append([str(changes.names[row]), str(changes.groups[row])])
                pairs.append(left[row] * shrinkage(left[row], float(changes.noise[row])))
        genes = changes.values.shape[1]
        self._arrays["pair_residual"] = (np.stack(pairs) if pairs else np.zeros((0, genes))).astype(
            np.float32
        )

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        perturbations: str | Sequence[str],
        *,
        group: str | None = None,
        controls: AnnData | str | os.PathLike | None = None,
        batch_key: str | None = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        values: Values = AS_FITTED,
    ) -> PerturbationPrediction:
        """Predict the mean effect of perturbations on control cells.

        Args:
            perturbations: Names: of seen perturbations, of other genes of the model, of combinations
                (``"A+B"``), or of seen conditions.
            group: A seen group of control cells (value of the ``covariate_key``); None: all control cells.
            controls: Other control cells, such as those of a new cell type. If their ``obs`` has the
                ``perturbation_key``, only its control cells are used.
            batch_key: For ``controls``; defaults to the value of ``fit``.
            spatial_key: See :meth:`fit`.
            layer: See :meth:`fit`.
            gene_key: See :meth:`fit`.
            values: See :meth:`fit`.

        Returns:
            Change and expression, [perturbations, genes] each; genes are named as in the model.

        Raises:
            InputError: The estimator is not fitted, a name is neither a gene nor a seen condition (similar names are
                listed), the group does not exist, or the counts, genes or keys of ``controls`` cannot be used.
        """
        model = self._fitted()
        names = [perturbations] if isinstance(perturbations, str) else list(map(str, perturbations))
        if not names:
            raise InputError("no perturbations were given", "at least one", "Pass their names")
        if controls is not None:
            if group is not None:
                raise InputError("both group and controls", "one of them", "Omit one")
            reading = self.reading.changed(
                batch_key=batch_key, spatial_key=spatial_key, layer=layer, gene_key=gene_key,
                values=values,
            )  # fmt: skip
            z, control = self._of_controls(controls, reading)
        else:
            z, control = self._of_group(group)
        canonical = [name if name == self.control else _canonical(name) for name in names]
        change = self._change(canonical, np.tile(z, (len(names), 1)), [group or ""] * len(names))
        known = [self._known(name) for name in canonical]
        index = pd.Index(names, name="perturbation")
        columns = pd.Index(model.genes, name="gene")
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
        cells = np.arange(len(table))
        key = self.facts["perturbation_key"]
        if key in table.obs.columns:
            cells = np.flatnonzero(labels_of(table.obs, key) == self.control)
        if not len(cells):
            raise InputError(
                f"controls has no cell with '{self.control}' in obs['{key}']",
                "control cells",
                f"Select them, or remove the column '{key}'",
            )
        z = self._latents(model, self._lay_out(table, cells, model), len(table))[cells]
        expression = log_normalize(table.counts[cells])
        return z.mean(axis=0), np.asarray(expression.mean(axis=0), np.float32).ravel()

    def _read_more(self, data: Any, reading: Reading) -> CellTable:
        return read_cells(
            data,
            self._fitted().genes,
            batch_key=reading.batch_key,
            spatial_key=reading.spatial_key,
            layer=reading.layer,
            gene_key=reading.gene_key,
            values=reading.values,
            one_batch=reading.batch_key == self.reading.batch_key,
        )

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
        parts = _parts(name)
        seen = sum(part in self.perturbations for part in parts)
        if seen == 0:
            return "unseen"
        return "combination of seen" if seen == len(parts) else "partly seen"

    def _change(self, names: Sequence[str], z: np.ndarray, groups: Sequence[str]) -> np.ndarray:
        """Return float32 [names, genes] for canonical names, latents [names, latent] and groups ("": a new group)."""
        size = self._arrays["features"].shape[1] + len(self.conditions) + 1
        blank = np.zeros(size, np.float32)
        conditions = [blank if name == self.control else self._condition(name) for name in names]
        change = self._head(np.asarray(z, np.float32), condition=np.stack(conditions))
        row_of = {name: row for row, name in enumerate(self._residual_names)}
        pair_of = {tuple(pair): row for row, pair in enumerate(self._pair_names)}
        for place, (name, group) in enumerate(zip(names, groups, strict=True)):
            if name == self.control:
                change[place] = 0.0
                continue
            for part in [name] if name in row_of else _parts(name):
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
        batch_key: str | None = AS_FITTED,
        spatial_key: str | None = AS_FITTED,
        layer: str | None = AS_FITTED,
        gene_key: str | None = AS_FITTED,
        values: Values = AS_FITTED,
    ) -> dict[str, float]:
        """Predict the perturbations of other cells from their control cells, and score the predictions.

        Args:
            adata: Perturbed and control cells, of perturbations or groups that were not used in the fit.
            perturbations: Score only these; None: all in ``adata``.
            perturbation_key: Column of ``obs``; None: the one of ``fit``.
            covariate_key: See :meth:`fit`.
            batch_key: See :meth:`fit`.
            spatial_key: See :meth:`fit`.
            layer: See :meth:`fit`.
            gene_key: See :meth:`fit`.
            values: See :meth:`fit`.

        Returns:
            Means over perturbations (and groups) of the scores of
            :func:`cellplm_jax.evaluate.perturbation.change_scores`, and their number. The same with
            the prefix ``mean_change_``: for predicting the mean change of the training perturbations (of a seen
            perturbation: its own); with ``no_change_``: for predicting control expression.

        Raises:
            InputError: As in :meth:`fit`, or there is nothing to score.
        """
        model = self._fitted()
        reading = self.reading.changed(
            batch_key=batch_key, spatial_key=spatial_key, layer=layer, gene_key=gene_key,
            values=values,
        )  # fmt: skip
        key = perturbation_key or self.facts["perturbation_key"]
        covariate = self.facts["covariate_key"] or None
        if covariate_key is not AS_FITTED:
            covariate = covariate_key
        table = self._read_more(adata, reading)
        named, groups, usable = self._labels(table, key, self.control, covariate, tell=False)
        expression = log_normalize(table.counts)
        changes = _measure(expression, table, named, groups, usable, self.control)
        if perturbations is not None:
            wanted = [_canonical(str(name)) for name in perturbations]
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
        usual = [
            seen.get(name, self._arrays["mean_change"] * len(_parts(name)))
            for name in changes.names
        ]
        truth = changes.values
        scores = mean_scores(change_scores(truth, predicted))
        for name, other in (
            ("mean_change", np.stack(usual)),
            ("no_change", no_change(*truth.shape)),
        ):
            for metric, value in mean_scores(change_scores(truth, other)).items():
                scores[f"{name}_{metric}"] = value
        return {**scores, "perturbations": len(changes)}

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state = {
            "method": self.method,
            "gene_features": self.gene_features,
            "perturbations": self.perturbations,
            "conditions": self.conditions,
            "control": self.control,
            "strengths": self.strengths,
            "groups": self._groups,
            "residual_names": self._residual_names,
            "pair_names": self._pair_names,
            "vocabulary": self._vocabulary,
        }
        return state, {name: array for name, array in self._arrays.items() if array.size}

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.method, self.gene_features = state["method"], state["gene_features"]
        self.perturbations, self.conditions = (
            list(state["perturbations"]),
            list(state["conditions"]),
        )
        self.control, self.strengths = state["control"], dict(state["strengths"])
        self._groups = list(state["groups"])
        self._residual_names = list(state["residual_names"])
        self._pair_names = [list(pair) for pair in state["pair_names"]]
        self._vocabulary = list(state["vocabulary"])
        genes = arrays["control"].shape[1]
        self._arrays = {"pair_residual": np.zeros((0, genes), np.float32), **arrays}


def perturbation_loss(
    config: ModelConfig,
    masking: MaskingConfig,
    condition: np.ndarray,
    changes: np.ndarray,
    noise: np.ndarray,
) -> Loss:
    """Return the loss of control cells that are each paired with a measured change.

    Args:
        config: Architecture with a perturbation head.
        masking: Hidden entries; no cells are dropped.
        condition: float32 [rows, condition].
        changes: float [rows, genes].
        noise: float [rows], variance of the means; noisier rows have less weight.

    Returns:
        Pure ``(params, example, key) -> (squared error relative to the mean square of the changes, {})``; the
        example's target ``"row"`` is int32 [samples, cells], -1 for none.
    """
    signal = float(np.square(changes).mean())
    weights = jnp.asarray(signal / (signal + noise), jnp.float32)
    conditions, truth = jnp.asarray(condition), jnp.asarray(changes, jnp.float32)

    def loss(params, example, key):
        row = example.targets["row"]
        at = jnp.maximum(row, 0)
        output, _, _ = corrupted_forward(
            params, example.batch, key, config, masking, condition=conditions[at]
        )
        error = jnp.square(output.prediction - truth[at]).mean(axis=-1)
        weight = jnp.where((row >= 0) & example.batch.cell_mask, weights[at], 0.0)
        return (error * weight).sum() / jnp.maximum(weight.sum(), 1e-12) / signal, {}

    return loss


class _Ridge:
    """Changes as mean plus linear functions of condition and latent, with known noise per row (kernel ridge)."""

    def __init__(
        self, changes: _Changes, condition: np.ndarray, latent: np.ndarray, number: np.ndarray
    ):
        self.changes, self.number = changes, number
        self.condition, self.latent = condition, latent
        self.weight = 1.0 / (changes.noise + changes.noise.mean())
        mean = self.mean(np.arange(len(changes)))
        left = np.square(changes.values - number[:, None] * mean).mean(axis=1)
        self.signal = max(float((left - changes.noise).mean()), 0.05 * float(left.mean()), 1e-12)

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Return float64 [genes], the mean change per target, by least squares."""
        number, weight = self.number[rows], self.weight[rows]
        return (number * weight) @ self.changes.values[rows] / (np.square(number) @ weight)

    def solve(
        self, rows: np.ndarray, by_condition: float, by_latent: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean [genes], and the maps of condition and latent to changes, fitted to a subset of the rows."""
        condition, latent = self.condition[rows], self.latent[rows]
        mean = self.mean(rows)
        left = self.changes.values[rows] - self.number[rows][:, None] * mean
        kernel = by_condition * condition @ condition.T + by_latent * latent @ latent.T
        dual = np.linalg.solve(
            self.signal * kernel + np.diag(self.changes.noise[rows] + 0.1 * self.signal), left
        )
        scale = self.signal
        return mean, scale * by_condition * condition.T @ dual, scale * by_latent * latent.T @ dual

    def errors(self, units: np.ndarray, by_condition: float, by_latent: float) -> np.ndarray:
        """Return float64 [units]: the mean squared error of each unit's changes, predicted without its rows."""
        squared = []
        for unit in dict.fromkeys(units):
            out = units == unit
            mean, conditions, latents = self.solve(np.flatnonzero(~out), by_condition, by_latent)
            change = self.number[out][:, None] * mean
            change = change + self.condition[out] @ conditions + self.latent[out] @ latents
            squared.append(np.square(change - self.changes.values[out]).mean())
        return np.array(squared)

    def choose(self) -> tuple[tuple[float, float], dict[str, float]]:
        """Return the strengths of condition and latent, and the errors with and without them.

        For the condition, the weakest strength within one standard error of the best one.
        """
        names, groups = self.changes.names, self.changes.groups
        condition = latent = 0.0
        facts: dict[str, float] = {}
        if len(set(names)) >= 4:
            errors = np.stack([self.errors(names, strength, 0.0) for strength in _STRENGTHS])
            worse = errors - errors[errors.mean(axis=1).argmin()]
            doubt = worse.std(axis=1, ddof=1) / np.sqrt(worse.shape[1])
            chosen = int(np.flatnonzero(worse.mean(axis=1) <= doubt)[0])
            condition = _STRENGTHS[chosen]
            facts |= {
                "left_out_perturbations_rmse": float(np.sqrt(errors[chosen].mean())),
                "left_out_perturbations_rmse_of_mean_change": float(np.sqrt(errors[0].mean())),
            }
        if len(set(groups)) >= 3:
            errors = np.stack([self.errors(groups, condition, strength) for strength in _STRENGTHS])
            chosen = int(errors.mean(axis=1).argmin())
            latent = _STRENGTHS[chosen]
            facts |= {
                "left_out_groups_rmse": float(np.sqrt(errors[chosen].mean())),
                "left_out_groups_rmse_without_latent": float(np.sqrt(errors[0].mean())),
            }
        return (condition, latent), facts


def log_normalize(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Scale every cell to :data:`TARGET_SUM` counts over its genes, then log1p; float32 CSR [cells, genes]."""
    counts = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    total = np.asarray(counts.sum(axis=1)).ravel()
    counts.data *= np.repeat(TARGET_SUM / np.maximum(total, 1.0), np.diff(counts.indptr))
    np.log1p(counts.data, out=counts.data)
    return counts


def shrinkage(values: np.ndarray, noise: float) -> float:
    """Return the shrinkage factor between 0 and 1 for noisy values (positive-part James-Stein).

    Args:
        values: float [genes].
        noise: Variance of the noise per entry.
    """
    return max(0.0, 1.0 - noise / max(float(np.square(values).mean()), 1e-30))


def _parts(name: str) -> list[str]:
    return [part for part in (text.strip() for text in name.split(SEPARATOR)) if part]


def is_human_gene(name: str) -> bool:
    """Return whether a name is a symbol or an Ensembl id of the bundled table of human genes."""
    return bool(map_genes([name], list(load_human_table().symbols), minimum=0).column[0] >= 0)


def _canonical(name: str | None) -> str:
    """Return the name of a combination with sorted targets."""
    return SEPARATOR.join(sorted(_parts(name))) if name else ""


def _measure(
    expression: sparse.csr_matrix,
    table: CellTable,
    named: np.ndarray,
    groups: np.ndarray,
    usable: np.ndarray,
    control: str,
) -> _Changes:
    """Measure the mean change of every perturbation in every group against the control cells of the same batches."""
    is_control = usable & (named == control)
    rows: dict[str, list[Any]] = {"names": [], "groups": [], "values": [], "noise": [], "cells": []}
    for group in dict.fromkeys(groups[usable]):
        inside = usable & (groups == group)
        own = expression[inside & is_control]
        mean = np.asarray(own.mean(axis=0), np.float64).ravel()
        square = np.asarray(own.multiply(own).mean(axis=0), np.float64).ravel()
        variance = float((square - mean**2).mean()) * own.shape[0] / max(own.shape[0] - 1, 1)
        controls: dict[str, tuple[np.ndarray, int]] = {}
        for batch in dict.fromkeys(table.batch[inside]):
            cells = np.flatnonzero(inside & is_control & (table.batch == batch))
            enough = len(cells) >= MINIMUM_CONTROLS
            controls[batch] = (
                (np.asarray(expression[cells].mean(axis=0), np.float64).ravel(), len(cells))
                if enough
                else (mean, own.shape[0])
            )
        for name in sorted(set(named[inside & ~is_control])):
            cells = np.flatnonzero(inside & (named == name))
            if len(cells) < MINIMUM_CELLS or not name:
                continue
            change = np.asarray(expression[cells].mean(axis=0), np.float64).ravel()
            noise = variance / len(cells)
            for batch, size in zip(
                *np.unique(table.batch[cells].astype(str), return_counts=True), strict=True
            ):
                share = size / len(cells)
                change -= share * controls[batch][0]
                noise += share**2 * variance / controls[batch][1]
            for key, value in zip(rows, (name, group, change, noise, len(cells)), strict=True):
                rows[key].append(value)
    genes = expression.shape[1]
    return _Changes(
        np.array(rows["names"], object),
        np.array(rows["groups"], object),
        np.stack(rows["values"]) if rows["values"] else np.zeros((0, genes)),
        np.array(rows["noise"], float),
        np.array(rows["cells"], int),
    )


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
    gram = dense.T @ dense / len(dense) if dense.shape[1] <= dense.shape[0] else None
    if gram is not None:
        value, vector = np.linalg.eigh(gram)
        order = np.argsort(value)[::-1][:size]
        found = vector[:, order] * np.sqrt(np.maximum(value[order], 0.0))
    else:
        value, vector = np.linalg.eigh(dense @ dense.T / len(dense))
        order = np.argsort(value)[::-1][:size]
        found = dense.T @ vector[:, order] / np.sqrt(len(dense))
    return found * np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])


def _unit(values: np.ndarray) -> np.ndarray:
    """Scale all rows by one factor to a mean squared norm of 1."""
    return values / np.sqrt(max(float(np.square(values).sum(axis=1).mean()), 1e-30))


def _with_head(start: Pretrained, kernel: np.ndarray, bias: np.ndarray) -> Pretrained:
    """Return the model with its linear head set."""
    flat: dict[tuple[str, ...], Any] = dict(flatten_dict(start.params))
    flat[KERNEL], flat[BIAS] = kernel, bias
    return dataclasses.replace(start, params=unflatten_dict(flat))
