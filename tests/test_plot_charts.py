"""Charts of scores and maps of genes and tissue: what is drawn, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra 'eval'")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from cellplm_jax import plot  # noqa: E402
from cellplm_jax.errors import InputError  # noqa: E402
from cellplm_jax.plot.style import gene_labels  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_confusion_matrix_colours_are_shares_of_the_row():
    counts = pd.DataFrame([[8, 2], [1, 3]], index=["a", "b"], columns=["a", "b"])
    _, ax = plt.subplots()
    axes = plot.confusion_matrix(counts, title="t", ax=ax)
    assert axes is ax
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0.25, 0.75]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a (10)", "b (4)"]
    assert sorted(text.get_text() for text in axes.texts) == ["20", "25", "75", "80"]
    with pytest.raises(InputError, match="empty"):
        plot.confusion_matrix(pd.DataFrame())


def test_calibration_bins():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([1, 1, 1, 0, 1, 0], bool)
    axes = plot.calibration(right, confidence)
    x, y = axes.lines[1].get_data()
    np.testing.assert_allclose(x, [0.55, 0.95])
    np.testing.assert_allclose(y, [0.5, 0.75])
    assert [text.get_text() for text in axes.texts] == ["2", "4"]
    with pytest.raises(InputError, match="outside of 0 to 1"):
        plot.calibration(right, confidence + 1)
    with pytest.raises(InputError, match="one of each per cell"):
        plot.calibration(right[:2], confidence)


def test_histogram_leaves_out_what_is_not_finite():
    axes = plot.histogram([1.0, 2.0, 3.0, np.nan], value_label="x", counted="genes", bins=3)
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert axes.get_legend().get_texts()[0].get_text() == "median 2"
    with pytest.raises(InputError, match="no finite value"):
        plot.histogram([np.nan], value_label="x")


def test_table_bars_start_at_the_top():
    axes = plot.table_bars({"first": 12_000, "second": 5}, value_label="cells")
    assert [text.get_text() for text in axes.texts] == ["12,000", "5"]
    assert axes.yaxis_inverted()
    with pytest.raises(InputError, match="no rows"):
        plot.table_bars({}, value_label="cells")


def test_change_map_is_white_at_nothing():
    change = pd.DataFrame([[1.0, -0.5]], index=["A"], columns=["X", "Y"])
    axes = plot.change_map(change)
    image = axes.images[0]
    assert image.get_clim() == (-1.0, 1.0)
    assert [text.get_text() for text in axes.get_xticklabels()][:2] == ["X", "Y"]
    # Nothing changes: the scale is still one.
    assert plot.change_map(change * 0).images[0].get_clim() == (-1.0, 1.0)


def test_ablation_dots_show_the_loss():
    axes = plot.ablation_dots({"whole": [0.8, 0.9], "without": [0.5, 0.6]}, reference="whole")
    assert [text.get_text() for text in axes.texts] == ["0.850", "0.550 (\N{MINUS SIGN}0.300)"]
    with pytest.raises(InputError, match="Did you mean 'whole'"):
        plot.ablation_dots({"whole": [0.8]}, reference="hole")
    with pytest.raises(InputError, match="no finite score"):
        plot.ablation_dots({"whole": [0.8], "x": [np.nan]}, reference="whole")


def test_benchmark_lines_are_logarithmic_and_in_order():
    axes = plot.benchmark_lines({"ours": {100: 2.0, 10: 1.0}}, size_label="n", value_label="s")
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [10, 100])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    with pytest.raises(InputError, match="not all above 0"):
        plot.benchmark_lines({"ours": {0: 2.0}}, size_label="n", value_label="s")


def test_spatial_comparison_shares_colours_and_centres_the_difference():
    points = np.random.default_rng(0).random((50, 2))
    truth = np.linspace(0, 2, 50)
    axes = plot.spatial_comparison(points, truth, truth + 0.5, title="GENE")
    first, second, difference = (ax.collections[-1] for ax in axes)
    assert first.get_clim() == second.get_clim()
    np.testing.assert_allclose(difference.get_clim(), (-0.5, 0.5))
    np.testing.assert_allclose(difference.get_array(), 0.5)
    assert [ax.get_title(loc="left") for ax in axes] == ["measured", "imputed", "difference"]
    with pytest.raises(InputError, match="one value per cell"):
        plot.spatial_comparison(points, truth[:3], truth)


def test_panels_of_the_same_cells_share_colours_where_asked():
    points = np.random.default_rng(0).random((50, 2))
    panels = {"counted": np.linspace(0, 2, 50), "expected": np.linspace(1, 5, 50)}
    for tissue in (False, True):
        axes = plot.cell_panels(points, panels, shared_colors=True, tissue=tissue)
        first, second = (ax.collections[-1].get_clim() for ax in axes)
        assert first == second
        assert [ax.get_title(loc="left") for ax in axes] == list(panels)
        assert bool(axes[0].yaxis_inverted()) is tissue
    first, second = (ax.collections[-1].get_clim() for ax in plot.cell_panels(points, panels))
    assert first != second
    with pytest.raises(InputError, match="no panel"):
        plot.cell_panels(points, {})
    with pytest.raises(InputError, match="one value per cell"):
        plot.cell_panels(points, {"a": [1.0]})


def test_agreement_leaves_out_what_has_no_logarithm():
    measured, predicted = [0.0, 1.0, 10.0, np.nan], [1.0, 2.0, 0.0, 3.0]
    axes = plot.agreement(measured, predicted, value_label="mean", logarithmic=True)
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[1, 2]])
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("mean, measured", "mean, predicted")
    axes = plot.agreement(measured, predicted, value_label="mean")
    assert len(axes.collections[0].get_offsets()) == 3
    with pytest.raises(InputError, match="2 measured and 1 predicted"):
        plot.agreement([1.0, 2.0], [1.0], value_label="mean")
    with pytest.raises(InputError, match="no pair"):
        plot.agreement([0.0], [1.0], value_label="mean", logarithmic=True)


def test_gene_map_names_the_genes_that_are_asked_for():
    points = np.random.default_rng(0).random((5, 2))
    genes = ["CD3D", "CD3E", "MS4A1", "LYZ", "NKG7"]
    axes = plot.gene_map(points, genes, highlight={"T": ["CD3D", "CD3E"], "B": ["MS4A1"]})
    assert [text.get_text() for text in axes.texts] == ["CD3D", "CD3E", "MS4A1"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["T", "B"]
    np.testing.assert_allclose(axes.collections[1].get_offsets(), points[:2])
    assert plot.gene_map(points, genes, highlight=["LYZ"]).get_legend() is None
    with pytest.raises(InputError, match="Did you mean 'CD3D'"):
        plot.gene_map(points, genes, highlight=["CD3d"])


IDS, SYMBOLS = ["ENSG00000115415", "ENSG00000125347.14", "ENSG00000999999"], ["STAT1", "IRF1"]


@pytest.mark.parametrize(
    "labels",
    [
        lambda t: plot.change_map(t).get_xticklabels(),
        lambda t: plot.change_map(t.T).get_yticklabels(),
        lambda t: plot.dot_plot(t, t).get_xticklabels(),
        lambda t: plot.heat_map(t).get_xticklabels(),
        lambda t: plot.effect_panels({"A": t.T})[0].get_yticklabels(),
        lambda t: plot.gene_map(np.eye(3)[:, :2], IDS, highlight=["STAT1", IDS[1], IDS[2]]).texts,
        lambda t: plot.table_bars(t.iloc[0].to_dict(), value_label="x").get_yticklabels(),
    ],
)
def test_pictures_show_symbols_for_ensembl_ids(labels):
    table = pd.DataFrame([[1.0, 0.5, 0.2], [0.3, 0.1, 0.9]], ["one", "two"], IDS)
    assert [text.get_text() for text in labels(table)] == [*SYMBOLS, IDS[2]]


def test_ids_that_share_a_symbol_keep_their_ids():
    assert gene_labels([IDS[0], f"{IDS[0]}.2", "LYZ"]) == [IDS[0], f"{IDS[0]}.2", "LYZ"]
