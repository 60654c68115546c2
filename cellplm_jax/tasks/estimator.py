"""Base class of the estimators: start model, fitting, saving and loading.

An estimator of a task is a subclass of :class:`Estimator` that

1. sets its ``task`` and ``recipe``,
2. in ``fit`` reads the cells (:meth:`Estimator._read`), selects training and validation cells (:func:`split_cells`),
   defines its architecture (:meth:`Estimator._begin`), creates examples (:meth:`Estimator._examples`) and passes a pure
   loss and a validation function to :meth:`Estimator._finetune`,
3. in ``_predict`` embeds (:meth:`Estimator._embed`), applies the head or decoder (:meth:`Estimator._head`,
   :meth:`Estimator._decode`) and returns a :class:`Prediction`, which ``predict`` and ``predict_file`` write,
4. lists in ``saved`` the attributes to save as JSON; ``_state`` and ``_restore`` are extended for arrays.

``keys`` names the reading keys that it supports; its methods accept them as ``**keys`` (see ``tasks/reading.py``).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import jax
import numpy as np

from cellplm_jax._version import __version__
from cellplm_jax.batch import Reconstruction
from cellplm_jax.compilation_cache import keep_compiled
from cellplm_jax.config import FinetuneConfig, ModelConfig, from_dict
from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.genes import FittedGenes
from cellplm_jax.errors import InputError
from cellplm_jax.platforms import check_platforms
from cellplm_jax.presets import preset
from cellplm_jax.progress import named_stage, write_line
from cellplm_jax.tasks.adapt import start_model
from cellplm_jax.tasks.contexts import (
    CellTable,
    Layout,
    contexts_of,
    make_examples,
    missing_batch,
    read_cells,
    source_groups,
    variable_genes,
)
from cellplm_jax.tasks.embed import embed_source
from cellplm_jax.tasks.estimator_files import SavedEstimator, fitted_names
from cellplm_jax.tasks.files import as_anndata, check_copy, write_copy
from cellplm_jax.tasks.heads import apply_head, decoded
from cellplm_jax.tasks.prediction import Prediction
from cellplm_jax.tasks.pretrained import Pretrained, as_pretrained, working_devices
from cellplm_jax.tasks.reading import KEYS, Reading, keyword_options, name_keys
from cellplm_jax.tasks.recipe import Recipe
from cellplm_jax.tasks.splits import parts_of
from cellplm_jax.train.finetune import FinetuneResult, Loss, finetune

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


class Estimator(SavedEstimator, abc.ABC):
    """A model for one task, fitted to cells. The module docstring explains how to implement one.

    Args:
        model: A :class:`Pretrained`, or a source for :func:`cellplm_jax.load` (such as ``"small"``); None: the
            ``:small`` architecture from scratch, over the genes of the data.
        genes: Number of highly variable genes of the training cells to fit on; None: all measured genes of the
            vocabulary; ``"default"``: 3,000 from scratch (published), all with a pretrained model, whose library
            sizes refer to all genes.
        quiet: Disable progress output.
        precision: ``"float32"`` or ``"bfloat16"``, of the matrix products of fit and prediction; None: that of the
            pretrained model, else float32.
        devices: Devices of this process that fit and predict together; None: those of the pretrained model, else all
            accelerators. See :class:`Pretrained`.
        **training: Fields of :class:`cellplm_jax.config.FinetuneConfig` that differ from the task's recipe.

    Attributes:
        base: The pretrained model; None: from scratch.
        training: The recipe.
        model: The fitted model; None before ``fit``.
        history: One dictionary per epoch; see :class:`cellplm_jax.train.finetune.FinetuneResult`.
        messages: Messages about the data and the fit: matched genes, omitted cells, initialised parameters.
        facts: Summary of the fit as JSON: cells, genes, seconds, best epoch.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
    """

    task: ClassVar[str]
    keys: ClassVar[Sequence[str]] = KEYS
    recipe: ClassVar[FinetuneConfig] = FinetuneConfig()
    recipe_fields: ClassVar[Sequence[str]] = tuple(Recipe.__annotations__)
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any):
        """Name all arguments of the constructor, so that ``help`` and the completion of notebooks show them."""
        super().__init_subclass__(**options)
        _name_arguments(cls)

    def __init__(
        self,
        model: Pretrained | str | os.PathLike | None = None,
        *,
        genes: int | Literal["default"] | None = "default",
        quiet: bool = False,
        precision: str | None = None,
        devices: Sequence[jax.Device] | None = None,
        **training: Unpack[Recipe],
    ):
        keep_compiled()
        check_platforms()
        self.base = None if model is None else as_pretrained(model)
        self.precision, self.devices = _where(self.base, precision, devices)
        base = self.base
        if base is not None and (base.precision, base.devices) != (self.precision, self.devices):
            self.base = dataclasses.replace(base, precision=self.precision, devices=self.devices)
        # "default" instead of None, because None means all genes.
        if isinstance(genes, str):
            genes = 3000 if self.base is None else None
        self.genes: int | None = genes
        self.quiet = quiet
        self.training = from_dict(
            FinetuneConfig, {**_fields(self.recipe), **training}, path="training"
        )
        self.model: Pretrained | None = None
        self.reading = Reading()
        self.history: list[dict[str, float]] = []
        self.messages: list[str] = []
        self.facts: dict[str, Any] = {}
        self.batch_rows: dict[str, int] = {}
        self._fit_genes: FittedGenes | None = None

    def _display(self) -> dict[str, Any]:
        start = "from scratch" if self.base is None else self.base.id
        if self.model is None:
            return {"start_model": start, "fitted": "no, call fit"}
        facts = {k: v for k, v in self.facts.items() if isinstance(v, int | float | str)}
        # Scores come first in the display.
        scores = {k: v for k, v in facts.items() if isinstance(v, float) and k != "seconds"}
        return {
            "start_model": self.model.card.get("fine_tuned_from", start),
            "labels": getattr(self, "labels", None) or None,
            "parameters": self.model.parameters,
            "genes": len(self.model.genes),
            **scores,
            **{k: v for k, v in facts.items() if k not in scores},
            "precision": self.precision,
        }

    # -- defined by a task -----------------------------------------------------------------------

    @abc.abstractmethod
    def fit(self, adata: Any, **keys: Any) -> Estimator:
        """Fit to the cells of an AnnData, and return the estimator itself."""

    @abc.abstractmethod
    def score(self, adata: Any, **keys: Any) -> dict[str, float]:
        """Predict and compare with the ground truth."""

    def _predict(self, data: Any, reading: Reading) -> Prediction:
        """Predict for the cells of an AnnData or a file; keyword arguments are options of ``predict``."""
        raise InputError(f"{type(self).__name__} does not predict for cells", "a task that does")

    # -- reading keys ---------------------------------------------------------------------------

    def _reading(self, keys: Mapping[str, Any], **fixed: Any) -> Reading:
        """Return the options of ``fit``: its reading keys, and those that the task sets."""
        self._check_keys(keys)
        return Reading(**{**keys, **fixed})

    def _as_fitted(self, keys: Mapping[str, Any]) -> Reading:
        """Return the options of a method other than ``fit``."""
        self._check_keys(keys)
        return self.reading.changed(**keys)

    def _check_keys(self, keys: Collection[str]) -> None:
        for name in keys:
            if name not in self.keys:
                kind = type(self).__name__
                msg = f"a method of {kind} got an unexpected keyword argument {name!r}"
                raise TypeError(msg)

    # -- fitting --------------------------------------------------------------------------------

    def _read(self, data: AnnData | str | os.PathLike, reading: Reading) -> CellTable:
        """Read the cells to fit on, over the shared genes of data and model; starts a new fit."""
        self.reading, self.model, self.history, self.facts = reading, None, [], {}
        with named_stage(f"{self.task}: reading cells", quiet=self.quiet):
            table = read_cells(
                data, None if self.base is None else self.base.genes, **reading.cells
            )
        self.messages = table.report.messages()
        self._fit_genes = fitted_names(table)
        return table.restrict(table.measured)

    def _read_more(self, data: Any, reading: Reading) -> CellTable:
        """Return other cells over the genes of the fitted model."""
        # A file without the batch column of the fit is one batch; a batch_key that is passed here must exist.
        one_batch = reading.batch_key == self.reading.batch_key
        return read_cells(data, self._fitted().genes, **reading.cells, one_batch=one_batch)

    def _choose_genes(self, table: CellTable, train: np.ndarray) -> CellTable:
        """Restrict the table to the genes of the fit, selected using the cells ``train`` only."""
        if self.genes is None:
            if self.base is not None:
                return table
            # From scratch, an embedding of a gene without counts would never be trained.
            kept = np.flatnonzero(np.diff(table.counts[train].tocsc().indptr) > 0)
            return table.restrict(kept)
        chosen = variable_genes(table.counts[train], self.genes)
        if len(chosen) < len(table.genes):
            self.messages.append(
                f"Fitted on {len(chosen)} highly variable genes of {len(table.genes)}."
            )
        return table.restrict(chosen)

    def _architecture(self) -> ModelConfig:
        """Return the architecture of the start model: the pretrained one, or the preset ``scratch``."""
        return preset("scratch").model if self.base is None else self.base.config

    def _begin(
        self, table: CellTable, config: ModelConfig, *, gene_means: np.ndarray | None = None
    ) -> Pretrained:
        """Return the model to fine-tune.

        With a decoder, every batch of the table gets its own row, initialised with the mean of the pretrained rows.
        ``self.batch_rows`` maps batches to rows.

        Args:
            table: The cells, over the genes of the fit.
            config: Architecture of the task, from :meth:`_architecture`.
            gene_means: See :func:`cellplm_jax.tasks.adapt.start_model`.
        """
        self.batch_rows = {}
        if config.head.kind == "none":
            # Pretrained rows stay in place, so that zero-shot decoding still has them.
            first = config.decoder.batches if self.base is not None else 0
            names = list(dict.fromkeys(table.batch))
            self.batch_rows = {name: first + row for row, name in enumerate(names)}
            decoder = dataclasses.replace(config.decoder, batches=first + len(names))
            config = dataclasses.replace(config, decoder=decoder)
        start, fresh = start_model(
            self.base, config, table.genes, seed=self.training.seed, gene_means=gene_means
        )
        if self._fit_genes is not None:
            # Readers of the fitted model's genes resolve names as this fit does.
            start.genes = self._fit_genes.subset(start.genes)
        self.messages.append(f"Initialised parameters: {', '.join(fresh) if fresh else 'none'}.")
        return start

    def _examples(
        self,
        table: CellTable,
        cells: np.ndarray,
        model: Pretrained,
        *,
        part: np.ndarray | None = None,
        targets: Mapping[str, np.ndarray] | None = None,
    ) -> list[Layout]:
        """Pad cells in the contexts of their batches; see :func:`cellplm_jax.tasks.contexts.make_examples`."""
        limit = self.training.cells_per_context or None
        return make_examples(
            table,
            contexts_of(table.batch, cells, limit=limit, part=part),
            model.config,
            targets=targets,
            batch_rows=self.batch_rows,
            cells_per_step=self.training.cells_per_step,
        )

    def _finetune(
        self,
        start: Pretrained,
        *,
        loss: Loss,
        examples: Sequence[Layout] | Callable[[int], Sequence[Any]],
        validate: Callable[[Any], Mapping[str, float]] | None,
        start_counts: bool = False,
    ) -> FinetuneResult:
        """Fine-tune, and keep the best model and the history.

        Args:
            start: From :meth:`_begin`.
            loss: Pure ``(params, example, key) -> (loss, metrics)``.
            examples: The padded examples of every epoch, or a function from the epoch to its examples.
            validate: See :func:`cellplm_jax.train.finetune.finetune`.
            start_counts: Likewise.
        """
        if callable(examples):
            of_epoch = examples
        else:
            fixed = [layout.example for layout in examples]
            # The same arrays in every epoch: they are on the device already.
            of_epoch = lambda epoch: fixed  # noqa: E731
        result = finetune(
            start.params,
            self.training,
            loss=loss,
            examples=of_epoch,
            validate=validate,
            layers=start.config.encoder.layers,
            start_counts=start_counts,
            title=f"{self.task}: fitting",
            quiet=self.quiet,
            precision=self.precision,
            devices=working_devices(self.devices),
        )
        model = self._keep(start, result.params)
        self.history = result.history
        self.facts |= {
            "epochs": len(result.history),
            "best_epoch": result.best_epoch,
            "stopped_early": result.stopped_early,
            "trained_parameters": result.trained,
            "parameters": model.parameters,
            "seconds": round(result.seconds, 1),
        }
        return result

    def _keep(self, start: Pretrained, params: dict[str, Any]) -> Pretrained:
        """Set the fitted model, ``start`` of :meth:`_begin` with other parameters, and return it."""
        card = {
            # The card of the start model stays, with its data and licence.
            **start.card,
            "kind": "fine-tuned",
            "task": self.task,
            "fine_tuned_from": "nothing" if self.base is None else self.base.id,
            "made_by": f"cellplm-jax {__version__}",
        }
        self.model = Pretrained(
            start.config,
            params,
            start.genes,
            card,
            start.source,
            start.step,
            precision=self.precision,
            devices=self.devices,
        )
        return self.model

    def _log_messages(self) -> None:
        """Log the messages of the fit, unless quiet."""
        for message in [] if self.quiet else self.messages:
            write_line(f"{self.task}: {message}")

    # -- predicting -----------------------------------------------------------------------------

    def predict(self, adata: AnnData | str | os.PathLike, **keys: Any) -> Any:
        """Predict for cells, in place.

        Args:
            adata: The cells. Keys default to those of ``fit``.
            **keys: Options of the task and for reading.

        Returns:
            ``adata`` itself; if it is a path, what was read from it.

        Raises:
            InputError: The estimator is not fitted, or the counts, genes, keys or options cannot be used.
        """
        data = as_anndata(adata)
        prediction = self._predicted(data, keys)
        for part, entries in prediction.entries.items():
            for name, values in entries.items():
                getattr(data, part)[name] = values
        return data if prediction.result is None else prediction.result

    def predict_file(self, path: str | os.PathLike, out: str | os.PathLike, **keys: Any) -> Any:
        """Predict the cells of an ``.h5ad`` file and write a copy with the results; counts are streamed.

        Args:
            path: Input; never changed.
            out: Output: the input plus the results of :meth:`predict`, written atomically.
            **keys: As for :meth:`predict`.

        Returns:
            Messages about the input, one per line; for a task whose ``predict`` returns a table, the table and these.

        Raises:
            InputError: As in :meth:`predict`; also if ``out`` cannot be written.
        """
        path, out = Path(path).expanduser(), Path(out).expanduser()
        check_copy(path, out)
        prediction = self._predicted(path, keys)
        write_copy(path, out, **prediction.entries)
        messages = prediction.messages
        return messages if prediction.result is None else (prediction.result, messages)

    def _predicted(self, data: Any, keys: Mapping[str, Any]) -> Prediction:
        """Predict with reading keys and options of the task."""
        read = {name: value for name, value in keys.items() if name in self.keys}
        # Whatever is no reading key is an option; an unknown one raises in `_predict`.
        options = {name: value for name, value in keys.items() if name not in self.keys}
        return self._predict(data, self._as_fitted(read), **options)

    def _embed(
        self,
        data: AnnData | str | os.PathLike,
        reading: Reading,
        *,
        model: Pretrained | None = None,
        part: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, Any], list[str]]:
        """Embed the cells of an AnnData, streamed, with the fitted model.

        Args:
            data: The cells.
            reading: Options for reading.
            model: A model to use instead of the fitted one.
            part: [cells], cells with different values never share contexts; None: those of ``reading.split_key``.

        Returns:
            z float32 [cells, latent]; facts about the input and its contexts; messages about the input.
        """
        model = self._fitted() if model is None else model
        with open_counts(data, model.genes, **reading.counts) as source:
            reading, remarks = self.with_batches(reading, source.obs.columns)
            key = reading.split_key
            # Training and test cells of a fit were in separate contexts, and stay separate.
            if part is None and key is not None and key in source.obs.columns:
                part = parts_of(source.column(key, missing=""))
            z = embed_source(
                source,
                model,
                spatial_key=reading.spatial_key,
                cells_per_context=reading.cells_per_context,
                groups=source_groups(source, reading.batch_key, part),
                title=f"{self.task}: predicting",
                quiet=self.quiet,
            )
            facts: dict[str, Any] = {
                "context": {
                    "batch_key": reading.batch_key or "",
                    "cells_per_context": reading.cells_per_context or 0,
                    "parts_apart": part is not None,
                },
                "input": source.report.as_dict(),
                "estimator": self.id,
            }
            if self.model is not None:
                facts |= {"model": self.model.id, "version": __version__}
            return z, facts, [*source.report.messages(), *remarks]

    def with_batches(self, reading: Reading, columns: Collection[str]) -> tuple[Reading, list[str]]:
        """Return the options for a file, and remarks: without the batch column of the fit, its cells are one batch.

        Args:
            reading: Options for reading.
            columns: Columns of ``obs`` of the file.
        """
        key = reading.batch_key
        if key is None or key in columns or key != self.reading.batch_key:
            return reading, []
        return dataclasses.replace(reading, batch_key=None), [missing_batch(key)]

    def _head(self, z: np.ndarray, *, condition: np.ndarray | None = None) -> np.ndarray:
        """Apply the task head to latents: [cells, latent] and [cells, condition] to [cells, outputs]."""
        return apply_head(self._fitted(), z, condition)

    def _decode(
        self, z: np.ndarray, *, batch: np.ndarray | None = None
    ) -> Iterator[tuple[slice, Reconstruction]]:
        """Decode latents in chunks of cells: yield the cells and their unscaled means [cells, genes].

        ``batch`` names the batch of each cell; new ones and None use the mean of all rows.
        """
        # -1: the mean of all rows.
        rows_of = np.full(len(z), -1, np.int32)
        if batch is not None:
            rows_of = np.array([self.batch_rows.get(name, -1) for name in batch], np.int32)
        return decoded(self._fitted(), z, rows_of)

    def plot_history(
        self, *, key: str = "loss", ax: Axes | None = None, show: bool = False
    ) -> Axes:
        """Draw a quantity of the fit over epochs, with the selected epoch marked.

        Args:
            key: ``"loss"``, ``"score"`` or another one of the history; training and validation are drawn if available.
            ax: Axes to draw on; None: a new figure.
            show: Call ``matplotlib.pyplot.show()`` before returning.

        Returns:
            The Axes.

        Raises:
            InputError: The estimator is not fitted, or the history lacks the quantity.
        """
        from cellplm_jax.plot import fitting_curves

        best = self.facts.get("best_epoch")
        return fitting_curves(self.history, key=key, best_epoch=best, ax=ax, show=show)


def _name_arguments(cls: type[Estimator]) -> None:
    """Give the constructor and the methods of a task signatures that name every option and reading key."""
    keyword, named = inspect.Parameter.KEYWORD_ONLY, {}
    for function in (cls.__init__, Estimator.__init__):
        for name, argument in inspect.signature(function).parameters.items():
            if name != "self" and argument.kind is not inspect.Parameter.VAR_KEYWORD:
                # The task's own arguments come first; those of the base class fill in.
                named.setdefault(name, argument)
    for name in cls.recipe_fields:
        named[name] = inspect.Parameter(
            name,
            keyword,
            default=getattr(cls.recipe, name),
            annotation=FinetuneConfig.__annotations__[name],
        )
    cls.__signature__ = inspect.Signature(list(named.values()))
    # Those that are not defined by the task get its options and keys in their signatures.
    written = set(vars(cls))
    predict = cls.predict if "predict" in written else cls._predict
    options = keyword_options(predict)
    for name in ("predict", "predict_file") if "_predict" in written else ():
        # A copy per class: the signature of the inherited function would be that of all tasks.
        if name not in written:
            setattr(cls, name, _copy(getattr(cls, name)))
    for name, function in vars(cls).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            name_keys(function, cls.keys, {} if name in written else options)


def _where(
    base: Pretrained | None, precision: str | None, devices: Sequence[jax.Device] | None
) -> tuple[str, Sequence[jax.Device] | None]:
    """Return precision and devices of an estimator, checked: its own, those of its model, or the defaults."""
    if precision is None:
        precision = "float32" if base is None else base.precision
    if devices is None and base is not None:
        devices = base.devices
    # Checked as a model checks them.
    checked = Pretrained(ModelConfig(genes=1), {}, [], precision=precision, devices=devices)
    return checked.precision, checked.devices


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the same behaviour, with its own signature and docstring."""

    @functools.wraps(function)
    def copy(*args: Any, **named: Any) -> Any:
        return function(*args, **named)

    return copy


def _fields(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
