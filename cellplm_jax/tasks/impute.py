"""Gene imputation: prediction of genes missing from a spatial panel, from a reference that measures them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.denoising import log_normalize
from cellplm_jax.evaluate.imputation import imputation_scores, imputation_table
from cellplm_jax.evaluate.inputs import row_sums
from cellplm_jax.tasks.contexts import CellTable, read_cells, require_same_cells
from cellplm_jax.tasks.denoise import expected_counts
from cellplm_jax.tasks.files import check_copy, write_copy
from cellplm_jax.tasks.impute_fit import DECODED_AS, ImputerFit
from cellplm_jax.tasks.impute_genes import imputed_places, layer_columns
from cellplm_jax.tasks.impute_intervals import Intervals, require_intervals
from cellplm_jax.tasks.impute_measured import BesideMeasured, beside_measured
from cellplm_jax.tasks.impute_network import panel_model
from cellplm_jax.tasks.impute_ridge import (
    COUNTS,
    LOG,
    MEAN,
    NETWORK,
    RIDGE,
    Ridge,
    around,
    deviations,
    method_scores,
)
from cellplm_jax.tasks.reading import Reading, ReadingKeys

if TYPE_CHECKING:
    from anndata import AnnData

IMPUTED = "cellplm_imputed"
"""Key of ``obsm`` (in files) with the imputed genes."""

FACTS = "cellplm_imputation"
"""Key of ``uns`` with the provenance."""


class GeneImputer(ImputerFit):
    """Predicts genes that are missing from a spatial panel.

    Training: for cells of the reference the input is the genes shared with the panel, and all their
    genes are predicted (negative binomial, the means scaled to the cell's total); cells of the panel are trained on
    their own genes, so that the encoder learns their platform and positions. In both, some input genes are also hidden
    (published: .25 of them in .95 of the cells). Each batch has its own decoder row, but the rows of the
    panel's batches are never trained on missing genes: these are decoded with the mean of the reference's rows, and
    scaled so that the shared genes of each cell sum to its measured count.

    The best epoch has the lowest negative log-likelihood of all genes of validation cells of the reference,
    predicted from the panel genes.

    On a few hundred reference cells ridge regression is hard to beat. One is therefore fitted in addition to the
    network, from the log-normalised panel to the missing genes (one to log-normalised values, one to counts), with a
    penalty chosen by leave-one-out and the panel's mean from the target; both predictions are averaged with weights
    fitted to the validation cells (non-negative least squares). If cross-validation prefers one of the two, it is used
    alone. ``linear=False`` uses the network only; the log-normalised values are then computed from the counts.

    Args:
        model: A :class:`cellplm_jax.Pretrained`, or a source for :func:`cellplm_jax.load`, such as ``"small"``; None:
            the ``:small`` architecture from scratch, over the genes of the data.
        genes: Maximum number of highly variable genes of the reference to impute; None: all measured genes of the
            vocabulary. By default 3,000 from scratch, else all. Genes requested by name in ``fit`` are not counted.
        linear: Average the network with ridge regression.
        quiet: Disable progress output.
        **training: Fields of :class:`cellplm_jax.config.FinetuneConfig`: ``epochs``, ``learning_rate``, ``seed``...
            Also ``precision`` and ``devices``; None: as the model.

    Attributes:
        panel: Input genes: those shared by panel and reference. Empty before ``fit``.
        imputed: Predicted genes, as named in ``var_names`` of the reference; the columns of a prediction.
        gene_ids: Series over ``imputed``: their ids in the model's vocabulary.
        confidence: Series over ``imputed``: Pearson's correlation, over the validation cells of the reference, of
            measured and predicted log-normalised values, predicted from the panel genes only. It measures how well the
            panel predicts the gene in the reference; it does not account for differences of the target. NaN if
            undefined (a gene that is 0 in all of them, or no validation cells).
        pool: Weights of network and ridge regression, for log-normalised values and for counts; empty without the
            latter. A weight of 0: the other is used alone.

    Raises:
        ConfigError: An option is unknown or its value is invalid.
    """

    @property
    def gene_ids(self) -> pd.Series:
        """Ids of the imputed genes in the model's vocabulary, by name."""
        ids = [self._fitted().genes[column] for column in self._columns]
        return pd.Series(ids, index=pd.Index(self.imputed, dtype=object), dtype=object)

    # -- predicting -----------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        genes: Sequence[str] | None = None,
        log_normalized: bool = False,
        layer_added: str | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> pd.DataFrame:
        """Predict the genes missing from the panel.

        Writes:
            ``layers[layer_added]``, if requested: dense float32 [n_obs, n_vars], the prediction in the columns of
            ``var`` that are imputed genes, NaN in the others; ``uns["cellplm_imputation"]``.

        Args:
            adata: The cells. Keys default to those of ``fit``. Only the panel genes are used: measured
                values of imputed genes do not affect the prediction.
            genes: Subset of ``imputed``; None: all.
            log_normalized: Return values on the scale of log1p of the counts, scaled so that the panel genes of each
                cell sum to 10,000, instead of counts.
            layer_added: Name of an additional layer to write.
            **keys: As in :meth:`fit`.

        Returns:
            float32 [cells, genes], rows named as the cells: expected counts, on the scale of the cell's own counts.

        Raises:
            InputError: The estimator is not fitted, requested genes are not imputed, or the counts, genes
                or keys cannot be used.
        """
        reading = self._as_fitted(keys)
        places = self._places(genes)
        column = None
        if layer_added is not None:
            column = layer_columns(
                adata, layer_added, self._fitted().genes, self._columns[places], reading.counts
            )
        frame, _, facts, _ = self._imputed(adata, reading, places, log_normalized)
        if column is not None:
            data: Any = adata
            values = np.full(data.shape, np.nan, np.float32)
            values[:, column >= 0] = frame.to_numpy()[:, column[column >= 0]]
            data.layers[layer_added] = values
            data.uns[FACTS] = facts
        return frame

    def intervals(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        coverage: float = 0.9,
        genes: Sequence[str] | None = None,
        log_normalized: bool = False,
        **keys: Unpack[ReadingKeys],
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Predict intervals that contain the measured value of a gene in a cell with a given probability.

        Their widths come from the errors in held-out reference cells, widened until the intervals of panel genes, each
        predicted without itself, hold their coverage in the cells of ``fit``. The coverage holds on average over genes
        like those of the panel, not for each gene.

        Args:
            adata: The cells, as for :meth:`predict`.
            coverage: .5, .6, .7, .8, .9 or .95.
            genes: See :meth:`predict`.
            log_normalized: See :meth:`predict`.
            **keys: As for :meth:`predict`.

        Returns:
            Lower and upper ends, float32 [cells, genes] each, as :meth:`predict` returns predictions.

        Raises:
            InputError: As in :meth:`predict`; also if the coverage is not one of these, or the fit had fewer than 20
                validation cells.
        """
        places = self._places(genes)
        require_intervals(self._intervals, coverage)
        # Intervals are calibrated on log-normalised values, so these are predicted whatever is returned.
        frame, total, _, _ = self._imputed(adata, self._as_fitted(keys), places, True)
        return self._ends(frame, total, coverage, places, log_normalized)

    def _ends(
        self,
        frame: pd.DataFrame,
        total: np.ndarray,
        coverage: float,
        places: np.ndarray,
        log_normalized: bool,
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return both ends around log-normalised predictions, as tables like ``frame``."""
        intervals = require_intervals(self._intervals, coverage)
        ends = intervals.around(frame.to_numpy(np.float64), coverage, places)
        if not log_normalized:
            ends = tuple(np.expm1(end) * (total[:, None] / 1e4) for end in ends)
        low, high = (
            pd.DataFrame(end.astype(np.float32), index=frame.index, columns=frame.columns)
            for end in ends
        )
        return low, high

    def predict_file(
        self,
        path: str | os.PathLike,
        out: str | os.PathLike,
        *,
        genes: Sequence[str] | None = None,
        log_normalized: bool = False,
        key_added: str = IMPUTED,
        coverage: float | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> list[str]:
        """Predict the cells of an ``.h5ad`` file and write a copy with the results.

        Writes:
            ``obsm[key_added]``: the table of :meth:`predict`; ``uns["cellplm_imputation"]``: its genes and their
            confidence, model, contexts.

        Args:
            path: Input; never changed.
            out: Output, written atomically.
            genes: See :meth:`predict`.
            log_normalized: See :meth:`predict`.
            key_added: Key of ``obsm``.
            coverage: Also write :meth:`intervals`: ``obsm[key_added + "_low"]`` and ``"_high"``. None: no intervals.
            **keys: As for :meth:`predict`.

        Returns:
            Messages about the input, one per line.

        Raises:
            InputError: As in :meth:`predict`; also if ``out`` cannot be written.
        """
        path, out = Path(path).expanduser(), Path(out).expanduser()
        check_copy(path, out)
        reading, places = self._as_fitted(keys), self._places(genes)
        if coverage is not None:
            require_intervals(self._intervals, coverage)
        frame, total, facts, messages = self._imputed(path, reading, places, log_normalized)
        tables = {key_added: frame}
        if coverage is not None:
            logs = frame
            if not log_normalized:
                # Logarithms and counts are averaged with different weights, so neither follows from the other.
                logs = self._imputed(path, reading, places, True)[0]
            low, high = self._ends(logs, total, coverage, places, log_normalized)
            tables |= {f"{key_added}_low": low, f"{key_added}_high": high}
            facts["coverage"] = coverage
        write_copy(path, out, obsm=tables, uns={FACTS: facts})
        return messages

    def score(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        truth: AnnData | str | os.PathLike | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> dict[str, float]:
        """Predict, and compare with measured values of imputed genes; ``adata`` is not modified.

        Args:
            adata: The cells; only their panel genes are used for the prediction.
            truth: The same cells with counts of imputed genes; None: ``adata`` itself has them.
            **keys: As for :meth:`predict`.

        Returns:
            The scores of :func:`cellplm_jax.evaluate.imputation.imputation_scores` of log-normalised values (both
            scaled by the cell's total over the panel). ``pearson_network``, ``rmse_network``, ``pearson_ridge``,
            ``rmse_ridge`` and ``rmse_gene_mean``: the same for both parts and for the gene's mean in the reference.
            ``interval_coverage``: fraction of values inside their 90 % interval.

        Raises:
            InputError: As in :meth:`predict`, the cells differ, or truth measures no imputed gene.
        """
        true, predicted, parts = self._compared(adata, truth, keys)
        scores = imputation_scores(true, predicted.to_numpy(), list(predicted.columns))
        for method, each in method_scores(true, parts).items():
            scores |= {f"{name}_{method}": n for name, n in each.items()}
        if self._intervals is not None:
            scores["interval_coverage"] = float(self._covered(true, predicted).mean())
        return scores

    def _covered(self, true: np.ndarray, predicted: pd.DataFrame) -> np.ndarray:
        """Return whether log-normalised values [cells, genes] are inside their 90 % intervals."""
        places = self._places(list(predicted.columns))
        low, high = self._ends(predicted, np.zeros(len(true)), 0.9, places, True)
        # The ends are float32: a value at an end must count as inside.
        return (true >= low.to_numpy() - 1e-5) & (true <= high.to_numpy() + 1e-5)

    def score_genes(
        self,
        adata: AnnData | str | os.PathLike,
        *,
        truth: AnnData | str | os.PathLike | None = None,
        **keys: Unpack[ReadingKeys],
    ) -> pd.DataFrame:
        """Score each gene separately; see :meth:`score`.

        Args:
            adata: See :meth:`score`.
            truth: See :meth:`score`.
            **keys: See :meth:`score`.

        Returns:
            Rows are genes, columns ``gene_id``, ``pearson``, ``cosine``, ``rmse``, ``mae``, ``coverage`` of the 90 %
            intervals (if there are any), and the ``confidence`` of the fit.

        Raises:
            InputError: As in :meth:`score`.
        """
        true, predicted, _ = self._compared(adata, truth, keys)
        table = imputation_table(true, predicted.to_numpy(), list(predicted.columns))
        table.insert(0, "gene_id", self.gene_ids.reindex(table.index))
        if self._intervals is not None:
            table["coverage"] = self._covered(true, predicted).mean(axis=0)
        return table.assign(confidence=self.confidence.reindex(table.index))

    def beside_measured(
        self,
        adata: AnnData | str | os.PathLike,
        imputed: pd.DataFrame,
        *,
        log_normalized: bool = False,
        pairs: int = 3,
        **keys: Unpack[ReadingKeys],
    ) -> BesideMeasured:
        """Compare a prediction with measured genes of the same cells, for visualisation; runs no new prediction.

        If the cells measure imputed genes (the prediction never uses those), each of these is compared
        with itself. Otherwise an imputed gene is paired with the most correlated panel gene, so that its spatial
        pattern can be judged by the known one.

        Args:
            adata: The cells, as for :meth:`predict`.
            imputed: Result of :meth:`predict` for them.
            log_normalized: Whether it has log-normalised values.
            pairs: Number of pairs: of measured genes the most and the least confident and those
                between, of others the most confident.
            **keys: As for :meth:`predict`.

        Returns:
            Correlations of measured genes, and the pairs.

        Raises:
            InputError: The cells cannot be read, or do not match the prediction.
        """
        return beside_measured(
            self._measured(adata, self._as_fitted(keys)),
            imputed,
            self._columns[self._places(list(imputed.columns))],
            np.isin(self._fitted().genes, self.panel),
            self.confidence,
            log_normalized=log_normalized,
            pairs=pairs,
        )

    def _measured(self, data: Any, reading: Reading) -> CellTable:
        """Return the counts of all genes of the model that the cells measure."""
        genes = self._fitted().genes
        return read_cells(data, genes, **reading.counts, spatial_key=None, minimum_genes=0)

    def _compared(
        self, adata: Any, truth: Any, keys: ReadingKeys
    ) -> tuple[np.ndarray, pd.DataFrame, dict[str, np.ndarray]]:
        """Return log-normalised truth [cells, genes], prediction and its parts, over the measured genes of truth."""
        reading = self._as_fitted(keys)
        known = self._measured(adata if truth is None else truth, reading)
        places = np.flatnonzero(known.measured[self._columns])
        if not len(places):
            raise InputError(
                f"truth measures none of the {len(self.imputed)} imputed genes",
                "counts of some of them to compare with",
                "Pass the AnnData with these counts as truth",
            )
        parts: dict[str, np.ndarray] = {}
        frame, total, _, _ = self._imputed(adata, reading, places, True, parts)
        require_same_cells(known, list(frame.index))
        counts = known.counts[:, self._columns[places]]
        return log_normalize(sparse.csr_matrix(counts), total=total).toarray(), frame, parts

    def _places(self, genes: Sequence[str] | None) -> np.ndarray:
        """Return int: positions of the requested genes in ``imputed``."""
        return imputed_places(genes, self._fitted().genes, self.imputed, self._columns)

    def _imputed(
        self,
        data: Any,
        reading: Reading,
        places: np.ndarray,
        log_normalized: bool,
        parts: dict[str, np.ndarray] | None = None,
    ) -> tuple[pd.DataFrame, np.ndarray, dict[str, Any], list[str]]:
        """Return the prediction, totals over the panel float [cells], facts, and messages about the input.

        ``parts`` receives the predictions of network, ridge regression and gene mean, if both are averaged.
        """
        model = self._fitted()
        if self._seen is None:
            # Kept, because it is compiled on first use.
            self._seen = panel_model(model, self.panel)
        z, facts, messages = self._embed(data, reading, model=self._seen)
        scale = LOG if log_normalized else COUNTS
        ridge = self._ridges.get(scale)
        values, total = np.zeros((len(z), len(places)), np.float32), np.zeros(len(z))
        with open_counts(data, self._seen.genes, **reading.counts) as source:
            measured = np.asarray(source.measured)
            names = list(source.obs_names)
            start = 0
            for block in source.blocks(4096):
                piece = slice(start, start + block.shape[0])
                total[piece] = row_sums(block)
                if ridge is not None:
                    linear = self._linear_prediction(ridge, block, total[piece], measured)
                    values[piece] = linear[:, places]
                start = piece.stop
        if parts is not None and ridge is not None:
            parts[RIDGE], parts[NETWORK] = values.copy(), np.zeros_like(values)
            parts[MEAN] = ridge.regression.bias[places]
        # A file may lack panel genes: the scale comes from those that it measures.
        over = np.isin(model.genes, np.array(self.panel, object)[measured].astype(str))
        row = np.full(len(z), DECODED_AS, object)
        for piece, output in self._decode(z, batch=row):
            own = expected_counts(output, total[piece], over)[:, self._columns[places]]
            if log_normalized:
                own = log_normalize(own, total=total[piece])
            if parts:
                parts[NETWORK][piece] = own
            if ridge is not None:
                # Weights of counts were fitted to counts per 10,000, the scale on which cells are comparable.
                size = 1.0 if log_normalized else total[piece, None] / 1e4
                mean = ridge.regression.bias[places]
                deviation = deviations(
                    own / np.maximum(size, 1e-12),
                    values[piece],
                    ridge.network_mean[places],
                    mean,
                    self.pool[scale],
                )
                own = size * around(mean, deviation)
            values[piece] = own
        columns = [self.imputed[place] for place in places]
        frame = pd.DataFrame(
            values, index=pd.Index(names, dtype=object), columns=pd.Index(columns, dtype=object)
        )
        facts = {
            "log_normalized": log_normalized,
            "genes": columns,
            "gene_ids": [model.genes[self._columns[place]] for place in places],
            "confidence": self.confidence.to_numpy(float)[places],
            "panel_genes": int(measured.sum()),
            **facts,
        }
        return frame, total, facts, messages

    def _linear_prediction(
        self, ridge: Ridge, panel: sparse.csr_matrix, total: np.ndarray, measured: np.ndarray
    ) -> np.ndarray:
        """Return float32 [cells, imputed genes] from counts over the panel [cells, panel] with sums ``total``."""
        place = {gene: column for column, gene in enumerate(self.panel)}
        columns = np.array([place[self._fitted().genes[i]] for i in ridge.genes])
        features = log_normalize(sparse.csr_matrix(panel[:, columns]), total=total).toarray()
        # An unmeasured gene is set to its mean, which has no effect.
        unknown = ~measured[columns]
        features[:, unknown] = ridge.regression.centre[unknown]
        return ridge.regression.predict(features)

    # -- saving ---------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state, _ = super()._state()
        arrays = {
            "columns": self._columns,
            # JSON has no NaN, so this is saved as an array.
            "confidence": self.confidence.to_numpy(np.float64),
        }
        if self._intervals is not None:
            arrays |= {f"intervals/{name}": v for name, v in self._intervals.arrays().items()}
        for scale, ridge in self._ridges.items():
            arrays |= {f"{scale}/{name}": value for name, value in ridge.arrays().items()}
        return state, arrays

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        super()._restore(state, arrays)
        self._columns = np.asarray(arrays["columns"], int)
        index = pd.Index(self.imputed, dtype=object)
        self.confidence = pd.Series(np.asarray(arrays["confidence"], float), index=index)
        self._ridges = {
            scale: Ridge.of(
                {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{scale}/")}
            )
            for scale in self.pool
        }
        # Imputers of older versions have none.
        if "intervals/factor" in arrays:
            names = ("lower", "upper", "factor")
            self._intervals = Intervals(*(np.asarray(arrays[f"intervals/{n}"]) for n in names))
