"""Fitting of the perturbation predictor: the perturbations of a screen, the head, and what is remembered."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from cellplm_jax.config import FinetuneConfig, HeadConfig, MaskingConfig, ModelConfig
from cellplm_jax.data.genes import find_gene, symbols_of
from cellplm_jax.errors import InputError, explain, require_choice
from cellplm_jax.evaluate.inputs import column_means
from cellplm_jax.evaluate.perturbation import change_scores, mean_change, mean_scores
from cellplm_jax.tasks.contexts import (
    CellTable,
    Example,
    Layout,
    contexts_of,
    gather,
    make_examples,
)
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.perturbation_head import perturbation_loss, with_head
from cellplm_jax.tasks.perturbation_names import (
    PerturbationNames,
    fold,
    message_of,
    read_names,
)
from cellplm_jax.tasks.perturbation_ridge import (
    LeftOut,
    Ridge,
    left_out_messages,
    target_features,
)
from cellplm_jax.tasks.perturbation_screen import (
    MINIMUM_CELLS,
    Changes,
    log_normalize,
    measure,
    screen_labels,
    shrinkage,
    values_of,
)
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.tasks.reading import KEYS, ReadingKeys
from cellplm_jax.tasks.recipe import Training
from cellplm_jax.train.finetune import LOSS, SCORE, clean_forward

if TYPE_CHECKING:
    from anndata import AnnData

FEATURE_CELLS = 5000
"""Maximum number of cells that the features of genes in the data are computed from."""

CONTROL_CELLS = 4096
"""Maximum number of control cells for computing latents; larger sets are sampled evenly."""


class PredictorFit(Estimator):
    """The fitting part of :class:`cellplm_jax.PerturbationPredictor`.

    Raises:
        InputError: An option is invalid.
    """

    task: ClassVar[str] = "perturbation"
    keys: ClassVar[Sequence[str]] = tuple(key for key in KEYS if key != "cells_per_context")
    saved: ClassVar[Sequence[str]] = (
        "method",
        "gene_features",
        "perturbations",
        "conditions",
        "control",
        "strengths",
        "_groups",
        "_residual_names",
        "_pair_names",
        "_vocabulary",
    )
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
        **training: Unpack[Training],
    ):
        super().__init__(model, genes=genes, quiet=quiet, **training)
        require_choice("method", method, ("ridge", "finetune"))
        require_choice("gene_features", gene_features, ("default", "model", "data", "both"))
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
        self.left_out: LeftOut | None = None
        self._names = PerturbationNames("", [], plain=True)
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
        control: str | float | None = None,
        targets: Literal["auto", "genes", "conditions"] = "auto",
        covariate_key: str | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> Self:
        """Fit to perturbed and control cells.

        Cells are compared with the control cells of their own batch if there are enough of them. Cells without a
        perturbation (NaN) are omitted, and counted in ``messages``.

        Args:
            adata: Raw counts and perturbations.
            perturbation_key: Column of ``obs`` with the perturbation of every cell: text or numbers. Combinations are
                ``"A+B"``, or with another separator between names that also occur alone or are genes.
            control: Its value for control cells; None: the value with a well-known name (``"ctrl"``, ``"control"``,
                ``"non-targeting"``, ``"NT"``, ``"DMSO"`` and others).
            targets: Whether perturbations are genes (Ensembl ids or symbols) or other conditions; ``"auto"``: genes
                if they are in the vocabulary, else conditions.
            covariate_key: Column of ``obs`` with groups of cells, such as cell types, with different responses; the
                latent of a group's control cells represents it, and :meth:`predict` accepts control cells of new
                groups. None: one group.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`.

        Returns:
            The estimator itself.

        Raises:
            InputError: Keys, counts, genes or perturbations cannot be used; the message states the remedy.
        """
        require_choice("targets", targets, ("auto", "genes", "conditions"))
        table = self._read(adata, self._reading(keys))
        raw = values_of(table, perturbation_key)
        genes = table.genes if self.base is None else self.base.genes
        names = read_names(raw, control, tuple(genes), key=perturbation_key, targets=targets)
        self._names = names
        self.control = names.control
        named, groups, usable = screen_labels(table, names, perturbation_key, covariate_key)
        self.messages.append(message_of(names, raw, control, perturbation_key))
        if not usable.all():
            self.messages.append(
                f"{int((~usable).sum())} of {len(table)} cells have no perturbation or group and were omitted."
            )
        controls = np.flatnonzero(usable & (named == self.control))
        # After the labels: which genes vary is decided by the cells that are used.
        table = self._choose_genes(table, np.flatnonzero(usable))
        self.facts = {
            "perturbation_key": perturbation_key,
            "covariate_key": covariate_key or "",
            "control": self.control,
            "cells": len(table),
            "control_cells": len(controls),
            "method": self.method,
            "contexts": "single cells",
        }
        expression = log_normalize(table.counts)
        changes = self._measure(expression, table, named, groups, usable)
        self._log_omitted(named, groups, usable, changes)
        self.perturbations = names.sort(set(changes.names))
        self._vocabulary = list(table.genes if self.base is None else self.base.genes)
        self._describe(changes, targets)
        kind = self.gene_features
        if kind == "default":
            kind = "data" if self.base is None else "model"
        if kind != "data" and self.base is None:
            self.messages.append(
                "Training from scratch has no gene embeddings; using gene features 'data'."
            )
            kind = "data"
        embedding = None
        if kind != "data" and self.base is not None:
            embedding = np.asarray(self.base.params["embedder"]["gene_embedding"], np.float64)
        # Covariation needs a dense [cells, genes] array, hence a sample of the cells.
        cells = np.random.default_rng(self.training.seed).permutation(len(table))[:FEATURE_CELLS]
        place = {gene: row for row, gene in enumerate(self._vocabulary)}
        self._arrays = {
            "features": target_features(
                embedding,
                expression[np.sort(cells)] if kind != "model" else None,
                np.array([place[gene] for gene in table.genes]),
                len(self._vocabulary),
            )
        }
        condition = np.stack([self._condition(name) for name in changes.names])

        start = self._begin(table, self._configuration(len(table.genes), condition.shape[1]))
        if len(controls) > CONTROL_CELLS:
            generator = np.random.default_rng(self.training.seed)
            controls = np.sort(generator.choice(controls, CONTROL_CELLS, replace=False))
        # Sorted after sampling: a group without sampled controls has no latent.
        self._groups = sorted(set(groups[controls]))
        layouts = self._lay_out(table, controls, start)
        z = self._latents(start, layouts, len(table))
        held = (
            self._hold_out(changes) if self.method == "finetune" else np.zeros(len(changes), bool)
        )
        # Fine-tuning starts from the ridge solution, of the perturbations that are not held out.
        head = self._solve(
            changes.at(~held),
            condition[~held],
            self._group_means(z, groups),
        )
        start = with_head(start, *head)
        if self.method == "finetune":
            self._train(start, layouts, changes, condition, held, groups)
            z = self._latents(self._fitted(), layouts, len(table))
        else:
            self._keep(start, start.params)
        self._arrays["z"] = self._group_means(z, groups).astype(np.float32)
        control_rows = [
            expression[usable & (named == self.control) & (groups == g)] for g in self._groups
        ]
        means = [column_means(part) for part in control_rows]
        # The last row is for predictions without a group: all control cells.
        means.append(column_means(expression[usable & (named == self.control)]))
        self._arrays["control"] = np.stack(means).astype(np.float32)
        single = np.array([len(names.parts(name)) for name in changes.names])
        self._arrays["mean_change"] = mean_change(changes.values, targets=single).astype(np.float32)
        self._remember(changes, condition)
        self.facts |= {
            "perturbations": len(self.perturbations),
            "groups": len(self._groups),
            "genes": len(table.genes),
        }
        self.messages.extend(left_out_messages(self.facts, self.strengths))
        self._log_messages()
        return self

    def _measure(
        self,
        expression: sparse.csr_matrix,
        table: CellTable,
        named: np.ndarray,
        groups: np.ndarray,
        usable: np.ndarray,
    ) -> Changes:
        order = self._names.sort(set(named[usable]) - {self.control, ""})
        return measure(expression, table.batch, named, groups, usable, self.control, order)

    def _log_omitted(
        self,
        named: np.ndarray,
        groups: np.ndarray,
        usable: np.ndarray,
        changes: Changes,
    ) -> None:
        # A perturbation can be measured in one group and be too rare in another.
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

    def _describe(self, changes: Changes, targets: str) -> None:
        """Classify the parts of perturbations as genes or as conditions with learned vectors."""
        parts = {part for name in changes.names for part in self._names.parts(name)}
        self.conditions = [p for p in self._names.sort(parts) if self._column(p) < 0]
        named = [part for part in self.conditions if fold(part) not in self._names.conditions]
        if self.conditions and targets == "genes":
            raise InputError(self._no_gene(self.conditions[0]))
        if named:
            self.messages.append(
                f"Not in the vocabulary, treated as conditions: {', '.join(named[:5])}"
                + (" and others." if len(named) > 5 else ".")
            )

    def _column(self, part: str) -> int:
        """Return the column of a target in the vocabulary, -1 if it is no gene of it."""
        if fold(part) in self._names.conditions:
            return -1
        gene = self._names.gene(part)
        return find_gene(gene, self._vocabulary)[0] if gene else -1

    def _no_gene(self, name: str) -> str:
        """Return the message for an unknown target, with the closest names."""
        candidates = {symbol: symbol for symbol in symbols_of(self._vocabulary)}
        candidates |= {gene: gene for gene in [*self._vocabulary, *self.conditions]}
        # Screens mix upper and lower case; the closest names are searched without it.
        upper = {text.upper(): text for text in candidates}
        near = [upper[n] for n in difflib.get_close_matches(name.upper(), list(upper), n=3)]
        return explain(
            f"'{name}' is neither a gene of the model's vocabulary nor a training condition",
            "a gene symbol or id"
            + (f", one of {', '.join(self.conditions)}" if self.conditions else ""),
            f"The closest names are {', '.join(map(repr, near))}" if near else "Check the name",
        )

    def _condition(self, name: str) -> np.ndarray:
        """Return float32 [condition] of a perturbation: features of its genes, its conditions, number of targets."""
        features = self._arrays["features"]
        size = features.shape[1]
        encoded = np.zeros(size + len(self.conditions) + 1, np.float32)
        for part in self._names.parts(name):
            if part in self.conditions:
                encoded[size + self.conditions.index(part)] += 1.0
            else:
                column = self._column(part)
                if column >= 0:
                    encoded[:size] += features[column]
                elif not self._names.gene(part):
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
        """Give every cell a context of its own, so that its latent does not depend on the other cells of a file."""
        contexts = list(cells[:, None])
        shortest = 1
        # Predictors fitted with shared contexts must go on with them, or their latents would shift.
        if "contexts" not in self.facts:  # saved before 0.2
            limit = self.training.cells_per_context or None
            contexts = contexts_of(table.batch, cells, limit=limit)
            shortest = 32
        return make_examples(
            table,
            contexts,
            model.config,
            cells_per_step=self.training.cells_per_step,
            shortest=shortest,
        )

    def _latents(self, model: Pretrained, layouts: Sequence[Layout], cells: int) -> np.ndarray:
        """Return float32 [cells, latent]; NaN for cells of no layout."""
        run = jax.jit(lambda params, batch: clean_forward(params, batch, model.config).latent.mean)
        params = jax.device_put(model.params)
        return gather(layouts, [run(params, layout.example.batch) for layout in layouts], cells)  # type: ignore[misc]

    def _group_means(self, z: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Return float64 [groups + 1, latent]: the mean latent of each group's control cells, and of all."""
        # Cells without a layout, all but the control cells, have NaN.
        there = np.isfinite(z).all(axis=1)
        means = [
            z[there & (groups == group)].mean(axis=0, dtype=np.float64) for group in self._groups
        ]
        return np.stack([*means, z[there].mean(axis=0, dtype=np.float64)])

    def _solve(
        self,
        changes: Changes,
        condition: np.ndarray,
        z: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel [latent + condition, genes] and bias [genes] of the head, solved exactly."""
        place = {group: row for row, group in enumerate(self._groups)}
        latent = z[[place[group] for group in changes.groups]]
        centre = latent.mean(axis=0)
        # Scale the latent with one factor: scaling each dimension would amplify small differences between groups.
        mean_square = np.square(latent - centre).sum(axis=1).mean()
        scale = max(float(np.sqrt(mean_square)), 1e-6)
        latent = (latent - centre) / scale
        number = condition[:, -1].astype(np.float64)
        features = condition[:, :-1].astype(np.float64)
        # The mean feature per target, by least squares through the origin: two targets have twice the features.
        usual = number @ features / np.square(number).sum()
        problem = Ridge(changes, features - number[:, None] * usual, latent, number)
        chosen, errors = problem.choose()
        self.strengths = {"condition": chosen[0], "latent": chosen[1]}
        self.facts |= errors
        parts = {name: self._names.parts(name) for name in self.perturbations}
        self.left_out = problem.left_out_table(parts, *chosen)
        if self.left_out is not None:
            means = self.left_out.table().filter(like="rmse").mean()
            self.facts |= {f"left_out_{name}": float(value) for name, value in means.items()}
        mean, by_condition, by_latent = problem.solve(np.arange(len(changes)), *chosen)
        kernel = np.concatenate(
            # The last row multiplies the number of targets; centring and scaling are folded into the kernel.
            [by_latent / scale, by_condition, (mean - usual @ by_condition)[None]],
            axis=0,
        )
        return kernel.astype(np.float32), (-(centre / scale) @ by_latent).astype(np.float32)

    def _hold_out(self, changes: Changes) -> np.ndarray:
        """Return bool [rows], those of perturbations (with fewer than five: of groups) held out for validation."""
        units = changes.names if len(set(changes.names)) >= 5 else changes.groups
        names = sorted(set(units))
        number = round(self.training.validation_fraction * len(names))
        if len(names) < 3 or number < 1:
            return np.zeros(len(changes), bool)
        # Streams of one seed: 1 for the held-out set, 2 for the pairs of each epoch.
        generator = np.random.default_rng([self.training.seed, 1])
        return np.isin(units, generator.permutation(names)[:number])

    def _train(
        self,
        start: Pretrained,
        layouts: Sequence[Layout],
        changes: Changes,
        condition: np.ndarray,
        held: np.ndarray,
        groups: np.ndarray,
    ) -> None:
        """Continue by gradient descent, with every control cell paired with a random perturbation per epoch."""
        # Within its group: a control cell must not be paired with the change of another cell type.
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

        truth = changes.values[held]
        place = {g: row for row, g in enumerate(self._groups)}
        group_of = [place[group] for group in changes.groups[held]]

        def validate(params: Any) -> dict[str, float]:
            model = dataclasses.replace(start, params=params)
            z = self._group_means(self._latents(model, layouts, len(groups)), groups)[group_of]
            kernel = np.asarray(params["head"]["mlp"]["linear_0"]["kernel"], np.float64)
            bias = np.asarray(params["head"]["mlp"]["linear_0"]["bias"], np.float64)
            found = np.concatenate([z, condition[held]], axis=1) @ kernel + bias
            scores = mean_scores(change_scores(truth, found))
            # The score is maximised.
            return {SCORE: -scores["rmse"], LOSS: scores["rmse"], "pearson": scores["pearson"]}

        self._finetune(
            start,
            loss=perturbation_loss(
                start.config,
                self.training.masking,
                condition,
                changes.values,
                changes.noise,
            ),
            examples=examples,
            validate=validate if held.any() else None,
        )

    def _remember(self, changes: Changes, condition: np.ndarray) -> None:
        """Store the residuals of seen perturbations, shrunk by their noise."""
        place = {group: row for row, group in enumerate(self._groups)}
        z = self._arrays["z"][[place[group] for group in changes.groups]]
        left = changes.values - self._head(z, condition=condition)
        names, kept, measured = [], [], []
        for name in self.perturbations:
            rows = np.flatnonzero(changes.names == name)
            # Groups with more cells weigh more, but none dominates: the mean noise is added.
            share = 1.0 / (changes.noise[rows] + changes.noise[rows].mean())
            share /= share.sum()
            whole = share @ left[rows]
            whole *= shrinkage(whole, float(np.square(share) @ changes.noise[rows]))
            names.append(name)
            kept.append(whole)
            measured.append(share @ changes.values[rows])
            # What remains is specific to the group.
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
