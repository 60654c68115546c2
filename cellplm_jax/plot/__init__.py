"""Figures for the report and for notebooks: curves of training, maps of cells, charts of scores.

scanpy's conventions: every function takes ``ax=None, show=False`` and returns the Axes it drew on, so that a caller can
change anything afterwards; the figure is ``axes.figure``. matplotlib comes with the extra ``eval`` and is imported on
first use; no display is needed.

Colours can be told apart with the common forms of colour blindness; lines and bars also differ in dashes and hatches,
so that a figure survives a grey printer. Nothing here computes a score.
"""

from cellplm_jax.plot.charts import (
    ablation_dots,
    agreement,
    benchmark_lines,
    calibration,
    change_map,
    comparison_bars,
    confusion_matrix,
    histogram,
    table_bars,
)
from cellplm_jax.plot.curves import fitting_curves, run_picture, training_curves
from cellplm_jax.plot.maps import (
    cell_attention,
    cell_panels,
    gene_map,
    spatial,
    spatial_comparison,
    umap,
)
from cellplm_jax.plot.style import PALETTE, UNKNOWN_COLOR, UNKNOWN_LABELS

__all__ = [
    "PALETTE",
    "UNKNOWN_COLOR",
    "UNKNOWN_LABELS",
    "ablation_dots",
    "agreement",
    "benchmark_lines",
    "calibration",
    "cell_attention",
    "cell_panels",
    "change_map",
    "comparison_bars",
    "confusion_matrix",
    "fitting_curves",
    "gene_map",
    "histogram",
    "run_picture",
    "spatial",
    "spatial_comparison",
    "table_bars",
    "training_curves",
    "umap",
]
