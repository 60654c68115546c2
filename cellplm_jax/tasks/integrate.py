"""Batch integration: an embedding that does not depend on the batch."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import jax.numpy as jnp
import numpy as np

from cellplm_jax.config import FinetuneConfig, MaskingConfig, ModelConfig, ObjectiveConfig
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import ConfigError, InputError, require, require_choice
from cellplm_jax.evaluate.denoising import gene_means
from cellplm_jax.evaluate.embedding import integration_scores
from cellplm_jax.losses.objectives import batch_mixing_loss, latent_loss, reconstruction_loss
from cellplm_jax.progress import ProgressReport
from cellplm_jax.tasks.alignment import Alignment, fit_alignment, numbers_of
from cellplm_jax.tasks.contexts import ONE_BATCH, CellTable, Layout, labels_of, make_examples
from cellplm_jax.tasks.denoise import require_counts_decoder
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.files import check_key
from cellplm_jax.tasks.prediction import Prediction
from cellplm_jax.tasks.pretrained import Pretrained
from cellplm_jax.tasks.reading import CountKeys, Reading, ReadingKeys
from cellplm_jax.tasks.recipe import DECODER_RECIPE, Training
from cellplm_jax.train.finetune import Loss, corrupted_forward

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "X_cellplm_integrated"
"""Key of ``obsm`` that ``predict`` writes."""

FACTS = "cellplm_integration"
"""Key written to ``uns``."""

WEIGHT = 0.03
"""Weight of the mixing term at ``strength=1``, relative to the logarithm of the reconstruction loss."""

DRAWS = 4
"""Number of random assignments of cells to contexts, over which the epochs cycle."""


class BatchIntegrator(Estimator):
    """Computes an embedding that does not depend on the batch; no labels are used.

    ``method="align"``, the default with a pretrained model, trains nothing: the zero-shot latent is joined with the
    principal components of the cells, Harmony aligns the batches, and discriminants of clusters are appended, as in
    ``embed(adapt="context")``. In addition, the clusters are kept, so that other files, and new batches, are moved to
    the same embedding. It takes seconds, and needs the extra ``eval``.

    ``method="finetune"`` fine-tunes the model. As in pretraining, entries are hidden and measured counts are predicted,
    with a decoder row per batch: the decoder explains the batch, so the latent need not encode it. A second term,
    ramped up over the first half of the fit, removes remaining differences: the batches around every cell should match
    those of all cells (:func:`cellplm_jax.losses.objectives.batch_mixing_loss`). It moves neighbours only. Cells attend
    to each other, so a context of one batch reveals the batch: contexts contain cells of all batches, in proportion
    during training, and all cells of the data in ``predict``.

    The batches should contain similar cell types. A cell type of one batch only is moved towards the others as
    well: lower ``strength`` in this case, and use ``score`` with labels. Biological differences between batches
    (stimulated and not) are removed as well: differences to preserve must not be confounded with the batch.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture from scratch, over the genes of the data.
        method: ``"align"`` or ``"finetune"``; ``"default"``: ``"align"`` with a pretrained model and without training
            options, else ``"finetune"``.
        strength: Mixing relative to structure: 0 does not mix, 1 is the default, larger values mix more.
        genes: Number of highly variable genes to fine-tune on; None: all genes of the vocabulary that the cells
            express. By default 3,000 from scratch, else all.
        quiet: Disable progress output.
        **training: For ``"finetune"``, fields of :class:`cellplm_jax.config.FinetuneConfig`: ``epochs``,
            ``learning_rate``, ``seed``... No cells are held out and all epochs are run, so ``validation_fraction`` and
            ``patience`` have no effect. Also ``precision`` and ``devices``; None: as the model.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
        InputError: The method does not apply.
    """

    task: ClassVar[str] = "integration"
    keys: ClassVar[Sequence[str]] = (
        "batch_key",
        "layer",
        "gene_key",
        "feature_type",
        "cells_per_context",
    )
    saved: ClassVar[Sequence[str]] = ("strength", "method")
    recipe: ClassVar[FinetuneConfig] = dataclasses.replace(
        DECODER_RECIPE,
        epochs=40,
        patience=0,
        learning_rate=1e-3,
        warmup_epochs=3,
        plateau_factor=1.0,
        average=0.9,
        validation_fraction=0.0,
        cells_per_step=256,
        cells_per_context=256,
    )

    def __init__(
        self,
        model: Pretrained | str | os.PathLike | None = None,
        *,
        method: Literal["default", "align", "finetune"] = "default",
        strength: float = 1.0,
        genes: int | Literal["default"] | None = "default",
        quiet: bool = False,
        **training: Unpack[Training],
    ):
        super().__init__(model, genes=genes, quiet=quiet, **training)
        if not (np.isfinite(strength) and strength >= 0):
            raise ConfigError(
                f"strength = {strength}", "a number of at least 0", "The default is 1"
            )
        if self.training.masking.drop_cells > 0:
            raise ConfigError(
                f"masking.drop_cells = {self.training.masking.drop_cells}",
                "0, because all cells of a context are compared",
                "Lower it",
            )
        require_choice("method", method, ("default", "align", "finetune"))
        seeded = dataclasses.replace(self.recipe, seed=self.training.seed)
        # Training options only make sense with training, so any of them selects "finetune".
        plain = self.base is not None and self.training == seeded and self.genes is None
        if method == "align" and not plain:
            raise InputError(
                "method='align' "
                + ("without a pretrained model" if self.base is None else "with training options"),
                "a pretrained model, and no training option except seed",
                "Use method='finetune', or omit them",
            )
        self.method: str = ("align" if plain else "finetune") if method == "default" else method
        self.strength = float(strength)
        self._alignment: Alignment | None = None

    # -- fitting --------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        batch_key: str,
        **keys: Unpack[CountKeys],
    ) -> BatchIntegrator:
        """Fit to the cells of several batches.

        Args:
            adata: Raw counts. Coordinates are not used, because those of different samples are not comparable.
            batch_key: Column of ``obs`` with the batch of each cell; at least two.
            **keys: See :class:`cellplm_jax.tasks.reading.Reading`.

        Returns:
            The estimator itself.

        Raises:
            InputError: There is only one batch, or keys, counts or genes cannot be used.
        """
        reading = self._reading(keys, batch_key=batch_key, spatial_key=None)
        if self.method == "align" and self.base is not None:
            return self._align(adata, reading, self.base)
        if self.base is not None:
            require_counts_decoder(self.base)
        table = self._read(adata, reading)
        cells = np.flatnonzero(np.diff(table.counts.indptr) > 0)
        names = list(dict.fromkeys(table.batch[cells]))
        _check_batches(names, batch_key)
        table = self._choose_genes(table, cells)
        means = gene_means(table.counts[cells])
        start = self._begin(table, self._architecture(), gene_means=means)
        self.facts = {
            "cells": len(table),
            "genes": len(table.genes),
            "training_cells": len(cells),
            "batches": len(names),
            "strength": self.strength,
            "method": self.method,
        }
        # A few assignments, made once and kept on the device: the company of a cell changes between epochs.
        draws = [self._deal(table, cells, start, draw) for draw in range(DRAWS)]
        ramp_epochs = max(1.0, self.training.epochs / 2)

        def examples(epoch: int) -> list[Any]:
            # An array of constant shape and type, so that a new weight needs no new compilation.
            weight = jnp.float32(self.strength * min(1.0, (epoch + 1) / ramp_epochs))
            return [
                layout.example.replace(targets={**layout.example.targets, "weight": weight})
                for layout in draws[epoch % DRAWS]
            ]

        self._finetune(
            start,
            loss=integration_loss(
                start.config,
                self.training.masking,
                batches=len(self.batch_rows),
            ),
            examples=examples,
            validate=None,
        )
        self._log_messages()
        return self

    def _align(self, data: Any, reading: Reading, base: Pretrained) -> BatchIntegrator:
        """Fit without training: keep the clusters of the aligned batches."""
        self.reading = reading
        self.history = []
        self.facts = {}
        self.batch_rows = {}
        with open_counts(data, base.genes, **reading.counts) as source:
            batches = source.column(str(reading.batch_key))
            counted = source.cells
        _check_batches(list(dict.fromkeys(batches)), str(reading.batch_key))
        z, _, self.messages = self._embed(data, reading, model=base)
        report = ProgressReport(self.task, 1, quiet=self.quiet)
        start = time.monotonic()
        with open_counts(data, base.genes, **reading.counts) as source:
            self._alignment = fit_alignment(
                z,
                source,
                numbers_of(batches),
                strength=self.strength,
                on_progress=report.say,
            )
        report.close()
        self._keep(base, base.params)
        names = list(dict.fromkeys(batches))
        self.facts = {
            "cells": counted,
            "training_cells": counted,
            "genes": len(base.genes),
            "batches": len(names),
            "batch_names": names,
            "strength": self.strength,
            "method": self.method,
            "seconds": round(time.monotonic() - start, 1),
        }
        self._log_messages()
        return self

    def _deal(
        self,
        table: CellTable,
        cells: np.ndarray,
        start: Pretrained,
        draw: int,
    ) -> list[Layout]:
        """Assign cells randomly to contexts with all batches in proportion; a new assignment for every ``draw``."""
        rows = np.array([self.batch_rows[name] for name in table.batch], np.int32)
        shuffled = np.random.default_rng([self.training.seed, draw]).permutation(cells)
        # Sorted by batch and then assigned round-robin: every context has all batches in proportion.
        by_batch = shuffled[np.argsort(rows[shuffled], kind="stable")]
        limit = self.training.cells_per_context or len(cells)
        count = -(-len(cells) // limit)
        return make_examples(
            table,
            [by_batch[first::count] for first in range(count)],
            start.config,
            targets={"row": rows, "batch": rows - min(self.batch_rows.values())},
            cells_per_step=self.training.cells_per_step,
        )

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        key_added: str = KEY,
        **keys: Unpack[ReadingKeys],
    ) -> AnnData:
        """Embed cells, in place; cells of new batches can be embedded.

        With ``"align"`` each batch is moved to the clusters of the fit, so the column of the batches is needed; without
        it the cells are one batch. With ``"finetune"`` batch labels are not used.

        Writes:
            ``obsm[key_added]``: float32 [n_obs, latent].
            ``uns["cellplm_integration"]``: model, strength, genes, context.

        Args:
            adata: The cells; their contexts contain all of them.
            key_added: Key of ``obsm``.
            **keys: As in :meth:`fit`.

        Returns:
            ``adata`` itself.

        Raises:
            InputError: The estimator is not fitted, or the counts, genes or keys cannot be used.
        """
        return super().predict(adata, key_added=key_added, **keys)

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        label_key: str | None = None,
        resolution: float = 1.0,
        **keys: Unpack[ReadingKeys],
    ) -> dict[str, float]:
        """Embed cells and score batch mixing and, with labels, preserved biology.

        Args:
            adata: The cells; not modified.
            label_key: Column of ``obs`` with cell types, which the fit never uses; cells without one only count for
                mixing. None: no labels.
            resolution: Resolution of Leiden.
            **keys: As for :meth:`predict`.

        Returns:
            See :func:`cellplm_jax.evaluate.embedding.integration_scores`.

        Raises:
            InputError: As in :meth:`predict`, or there is only one batch.
            MissingDependencyError: The extra ``eval`` is not installed.
        """
        reading = self._as_fitted(keys)
        model = self._fitted()
        require("scanpy", "eval", "Scoring an integration")
        with open_counts(adata, model.genes, **reading.counts) as source:
            batches = source.column(str(reading.batch_key))
            labels = None if label_key is None else labels_of(source.obs, label_key)
        prediction = self._predict(adata, reading)
        return integration_scores(prediction.obsm[KEY], batches, labels, resolution=resolution)

    def _predict(self, data: Any, reading: Reading, *, key_added: str = KEY) -> Prediction:
        """Embed in contexts of all batches."""
        check_key(key_added)
        model = self._fitted()
        if self._alignment is None:
            # One context of all batches, as in training.
            z, facts, messages = self._embed(data, reading.changed(batch_key=None))
        else:
            with open_counts(data, model.genes, **reading.counts) as source:
                key = reading.batch_key
                batches = np.full(source.cells, ONE_BATCH, object)
                known = key is not None and key in source.obs.columns
                if known:
                    batches = source.column(str(key))
            z, facts, messages = self._embed(
                data, reading if known else reading.changed(batch_key=None)
            )
            if not known:
                messages = [*messages, f"obs has no column '{key}': the cells are one batch."]
            with open_counts(data, model.genes, **reading.counts) as source:
                z = self._alignment.embed(z, source, numbers_of(batches))
        facts = {
            "key_added": key_added,
            "strength": self.strength,
            "method": self.method,
            "batches_fitted": self.facts.get("batch_names", list(self.batch_rows)),
            **facts,
        }
        return Prediction(obsm={key_added: z}, uns={FACTS: facts}, messages=messages)

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state, _ = super()._state()
        return state, {} if self._alignment is None else self._alignment.arrays()

    def _restore(
        self,
        state: dict[str, Any],
        arrays: dict[str, np.ndarray],
    ) -> None:
        # Integrators saved without a method were fine-tuned.
        super()._restore({"method": "finetune", **state}, arrays)
        self._alignment = Alignment(**arrays) if self.method == "align" else None


def _check_batches(names: list[str], batch_key: str) -> None:
    """Raise an error for a single batch."""
    if len(names) < 2:
        raise InputError(
            f"obs['{batch_key}'] names {len(names)} batch with counts"
            + (f" ('{names[0]}')" if names else ""),
            "at least two batches to mix",
            "Use the column with the batches; a single batch needs no integration",
        )


def integration_loss(config: ModelConfig, masking: MaskingConfig, *, batches: int) -> Loss:
    """Return the loss ``log(reconstruction + latent) + weight * mixing``.

    With the logarithm the weight does not depend on the number of genes and the sequencing depth.

    Args:
        config: Architecture with a decoder of counts.
        masking: Hidden entries; no cells are dropped.
        batches: Number of batches.

    Returns:
        Pure ``(params, example, key) -> (loss, metrics)``. Targets of the example: ``row`` (of the decoder) and
        ``batch`` (from 0), int [samples, cells], and ``weight``, the strength of the epoch.
    """
    objective = ObjectiveConfig(kind=config.decoder.kind)  # type: ignore[arg-type]

    def loss(params, example, key):
        batch = example.batch.replace(batch=example.targets["row"])
        output, kept, gene_mask = corrupted_forward(params, batch, key, config, masking)
        reconstruction: Any = output.reconstruction
        terms = reconstruction_loss(reconstruction, kept, objective, gene_mask=gene_mask)
        latent = latent_loss(output.latent, kept.cell_mask, config.latent, batch=kept.batch)
        mixing = batch_mixing_loss(
            output.latent.mean,
            example.targets["batch"],
            kept.cell_mask,
            batches=batches,
        )
        # The gradient of a logarithm is relative, so one weight fits every panel.
        nats = jnp.log(terms["reconstruction"] + latent["latent"])
        return nats + WEIGHT * example.targets["weight"] * mixing, {
            "reconstruction": terms["reconstruction"],
            "kl_latent": latent["kl_latent"],
            "mixing": mixing,
        }

    return loss
