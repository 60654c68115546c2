"""Figures for reports and notebooks: training curves, maps of cells, charts of scores.

The API follows scanpy: functions take ``ax=None, show=False`` and return the Axes for further changes; the figure is
``axes.figure``. matplotlib is installed by the extra ``eval`` and imported on first use; no display is needed.

Colours are distinguishable with the common forms of colour blindness; lines and bars also differ in dashes and hatches,
so that figures can be printed in grey. This module computes no scores.
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
from cellplm_jax.plot.sections import heat_map, spatial_sections
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
    "heat_map",
    "histogram",
    "run_picture",
    "spatial",
    "spatial_comparison",
    "spatial_sections",
    "table_bars",
    "training_curves",
    "umap",
]
