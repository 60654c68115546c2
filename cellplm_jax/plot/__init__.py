"""Figures for reports and notebooks: training curves, maps of cells, charts of scores.

The API follows scanpy: functions take ``ax=None, show=False`` and return the Axes for further changes; the figure is
``axes.figure``. matplotlib is installed by the extra ``eval`` and imported on first use; no display is needed.

Colours are distinguishable with the common forms of colour blindness; lines and bars also differ in dashes and hatches,
so that figures can be printed in grey. This module computes no scores.
"""

from cellplm_jax.plot.cells import scale_of, spatial, umap
from cellplm_jax.plot.charts import (
    agreement,
    calibration,
    change_map,
    comparison_bars,
    confusion_matrix,
    dot_plot,
    histogram,
    table_bars,
)
from cellplm_jax.plot.curves import fitting_curves, run_picture, training_curves
from cellplm_jax.plot.effects import effect_panels, values_by_group
from cellplm_jax.plot.experiments import ablation_dots, benchmark_lines
from cellplm_jax.plot.maps import cell_attention, gene_map
from cellplm_jax.plot.rows import cell_panels, panels, spatial_comparison
from cellplm_jax.plot.sections import heat_map, spatial_sections
from cellplm_jax.plot.style import (
    PALETTE,
    UNKNOWN_COLOR,
    UNKNOWN_LABELS,
    category_colors,
    dark_theme,
    store_colors,
)

__all__ = [
    "PALETTE",
    "UNKNOWN_COLOR",
    "UNKNOWN_LABELS",
    "ablation_dots",
    "agreement",
    "benchmark_lines",
    "calibration",
    "category_colors",
    "cell_attention",
    "cell_panels",
    "change_map",
    "comparison_bars",
    "confusion_matrix",
    "dark_theme",
    "dot_plot",
    "effect_panels",
    "fitting_curves",
    "gene_map",
    "heat_map",
    "histogram",
    "panels",
    "run_picture",
    "scale_of",
    "spatial",
    "spatial_comparison",
    "spatial_sections",
    "store_colors",
    "table_bars",
    "training_curves",
    "umap",
    "values_by_group",
]


def __dir__() -> list[str]:
    return sorted(__all__)
