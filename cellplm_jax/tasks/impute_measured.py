"""Imputed genes next to measured ones, for reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from cellplm_jax.display import Displayed
from cellplm_jax.errors import InputError
from cellplm_jax.evaluate.denoising import log_normalize
from cellplm_jax.evaluate.reconstruction import pearson_per_gene
from cellplm_jax.tasks.contexts import CellTable
from cellplm_jax.tasks.impute_ridge import panel_totals


@dataclass(frozen=True, eq=False, repr=False)
class Beside(Displayed):
    """An imputed gene and a measured one in the same cells.

    Attributes:
        gene: The imputed gene.
        imputed: float [cells], log-normalised by the panel counts of each cell.
        other: The measured gene; the same one if it was measured.
        measured: float [cells], on the same scale.
    """

    gene: str
    imputed: np.ndarray
    other: str
    measured: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class BesideMeasured(Displayed):
    """Comparison of a prediction with measured values, from :meth:`GeneImputer.beside_measured`.

    Attributes:
        pearson: Correlation over the cells of imputed and measured log-normalised values, by measured imputed gene,
            the most confident first; empty if the cells measure none.
        pairs: Some pairs of genes to show.
    """

    pearson: pd.Series
    pairs: list[Beside]


def beside_measured(
    table: CellTable,
    imputed: pd.DataFrame,
    columns: np.ndarray,
    shown: np.ndarray,
    confidence: pd.Series,
    *,
    log_normalized: bool,
    pairs: int,
) -> BesideMeasured:
    """Compare a prediction with measured genes; see :meth:`GeneImputer.beside_measured`.

    Args:
        table: The cells, over the genes of the model.
        imputed: The prediction.
        columns: int, columns of its genes in the table.
        shown: bool [genes], panel genes.
        confidence: Of the imputed genes, by name.
        log_normalized: Whether the prediction has log-normalised values.
        pairs: Number of pairs.

    Raises:
        InputError: Table and prediction have different cells.
    """
    if len(table) != len(imputed):
        raise InputError(
            f"{len(table)} cells and a prediction for {len(imputed)}",
            "the prediction for these cells",
            "Pass the result of predict for them",
        )
    total = panel_totals(table, shown, np.arange(len(table)))
    # Unknown confidence goes last: correlations are at least -1.
    order = np.argsort(-confidence.reindex(imputed.columns).fillna(-2.0), kind="stable")
    counted = np.bincount(table.counts.indices, minlength=len(table.genes)) > 0

    def logs(genes: np.ndarray) -> np.ndarray:
        return log_normalize(sparse.csr_matrix(table.counts[:, genes]), total=total).toarray()

    def predicted(places: np.ndarray) -> np.ndarray:
        values = imputed.iloc[:, places].to_numpy(np.float64)
        return values if log_normalized else log_normalize(values, total=total)

    there = np.array([place for place in order if counted[columns[place]]], int)
    if len(there):
        truth = logs(columns[there])
        values = predicted(there)
        pearson = pearson_per_gene(truth, values)
        # From the most to the least confident gene, evenly.
        number = min(pairs, len(there))
        chosen = np.unique(np.linspace(0, len(there) - 1, number).round())
        found = [
            Beside(
                name := str(imputed.columns[there[n]]),
                values[:, n],
                name,
                truth[:, n],
            )
            for n in chosen.astype(int)
        ]
        return BesideMeasured(pd.Series(pearson, index=imputed.columns[there]), found)
    # None of the imputed genes is measured.
    places = np.asarray(order[:pairs], int)
    panel = np.flatnonzero(shown & counted)
    found = []
    if len(panel):
        values = predicted(places)
        measured = logs(panel)
        for number, place in enumerate(places):
            own = np.broadcast_to(values[:, [number]], measured.shape)
            # Constant genes have no correlation and are never chosen.
            close = np.nan_to_num(pearson_per_gene(measured, own), nan=-2.0).argmax()
            name = str(table.genes[panel[close]])
            found.append(
                Beside(
                    str(imputed.columns[place]),
                    own[:, 0],
                    name,
                    measured[:, close],
                )
            )
    return BesideMeasured(pd.Series(dtype=float), found)
