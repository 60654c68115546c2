from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pandas as pd
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra 'eval'")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402

from cellplm_jax import plot  # noqa: E402
from cellplm_jax.errors import InputError  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def metrics_lines(steps=200, every=50):
    lines = []
    for step in range(steps):
        lines.append({"step": step, "split": "train", "loss": 10.0 - 0.01 * step, "kl_latent": 1.0})
        if step % every == 0:
            lines.append(
                {"step": step, "split": "heldout", "loss": 11.0, "masked_correlation": 0.5}
            )
    return lines


def curve(axes, number_of_points):
    """Return the lines of these Axes that have so many points."""
    return [line for line in axes.lines if len(line.get_xdata()) == number_of_points]


def test_training_curves_draws_the_panels_that_have_values():
    panels = plot.training_curves(metrics_lines())
    assert [panel.get_title(loc="left") for panel in panels] == [
        "Loss",
        "ELBO, latent term",
        "Masked correlation",
    ]
    held_out = curve(panels[0], 4)[0]
    np.testing.assert_array_equal(held_out.get_xdata(), [0, 50, 100, 150])
    np.testing.assert_array_equal(held_out.get_ydata(), [11.0] * 4)
    names = [text.get_text() for text in panels[0].figure.legends[0].get_texts()]
    assert names == ["training", "held out"]
    assert len({panel.get_xlim() for panel in panels}) == 1
    assert len(panels[0].figure.axes) == 3  # the unused place of the grid is gone


def test_training_curves_smooths_the_training_values_only():
    generator = np.random.default_rng(0)
    values = generator.normal(size=400)
    lines = [{"step": step, "loss": value} for step, value in enumerate(values)]  # no split: train
    raw, smooth = plot.training_curves(lines, smoothing=11)[0].lines
    np.testing.assert_allclose(raw.get_ydata(), values)
    expected = pd.Series(values).rolling(11, center=True).mean().to_numpy()
    np.testing.assert_allclose(smooth.get_ydata()[5:-5], expected[5:-5], atol=1e-12)
    np.testing.assert_allclose(smooth.get_ydata()[[0, -1]], values[[0, -1]])
    np.testing.assert_allclose(smooth.get_ydata()[2], values[:5].mean())
    assert len(plot.training_curves(lines, smoothing=1)[0].lines) == 1


def run_lines():
    lines = []
    for step in range(1, 101):
        lines.append(
            {
                "step": step,
                "split": "train",
                "loss": 1000 / step,
                "reconstruction_full": 900 / step,
                "reconstruction_masked": 100 / step,
                "gradient_norm": None if step == 40 else 1.0,
                "skipped": float(step >= 40),
                "padding": 0.08,
                "data_wait": 0.01,
            }
        )
        if step % 25 == 0:
            score = -0.5 + 0.1 * (step == 75)
            lines.append({"step": step, "split": "heldout", "nb_log_likelihood": score})
            lines.append({"step": step, "split": "probe", "knn_accuracy": 0.5, "ari": 0.1})
    return lines


def test_run_picture_draws_what_there_is():
    figure = plot.run_picture(run_lines(), title="a run")
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
    assert list(panels) == [
        "Loss",
        "Reconstruction",
        "Held-out likelihood",
        "Probe on held-out labels",
        "Gradient norm",
        "Shares",
    ]
    assert not plt.get_fignums()  # it belongs to no window
    labels = {
        name: [text.get_text() for text in panel.get_legend().get_texts()]
        for name, panel in panels.items()
        if panel.get_legend() is not None
    }
    assert labels["Held-out likelihood"][-1] == "best: step 75"
    assert labels["Gradient norm"] == ["norm", "skipped step"]
    assert labels["Shares"] == ["padding", "waiting for data"]
    assert panels["Loss"].get_yscale() == "log"
    [mark] = [line for line in panels["Gradient norm"].lines if line.get_label() == "skipped step"]
    np.testing.assert_array_equal(mark.get_xdata(), [40])
    with pytest.raises(InputError, match="without any known metric"):
        plot.run_picture([{"step": 1, "accuracy": 0.5}])


def test_training_curves_reads_a_file_that_is_still_written_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "\n".join(json.dumps(line) for line in metrics_lines()) + '\n{"step": 200, "lo'
    path.write_text(text)
    panels = plot.training_curves(path)
    assert curve(panels[0], 200)
    path.write_text("{broken\n" + text)
    with pytest.raises(InputError, match="Line 1 of"):
        plot.training_curves(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        plot.training_curves(tmp_path / "absent.jsonl")


def test_training_curves_takes_the_later_of_two_lines_and_leaves_out_what_is_not_finite():
    lines = [
        {"step": 0, "loss": 5.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": float("nan")},
        {"step": 1, "loss": 3.0},
        {"step": 3, "loss": None},
    ]
    line = plot.training_curves(lines)[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [0, 1])
    np.testing.assert_array_equal(line.get_ydata(), [5.0, 3.0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "without any known metric"),
        ([{"step": 1, "accuracy": 0.5}], "masked_correlation"),
        ([{"step": 1, "loss": float("inf")}], "without any known metric"),
        ([{"loss": 0.5}], "line 1 has no number under 'step'"),
        ([{"step": 1, "loss": 0.5}, 3], "line 2"),
    ],
)
def test_training_curves_refuses_lines_it_cannot_draw(lines, message):
    with pytest.raises(InputError, match=message):
        plot.training_curves(lines)


def example_cells(cells=300, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.array(["B", "T", "unassigned"])[generator.integers(0, 3, cells)]
    return generator.normal(size=(cells, 2)), labels


def colors_at(axes, points):
    """Return the colour each of these points was drawn with; of two the one in front."""
    found = {}
    for collection in sorted(axes.collections, key=lambda drawn: drawn.get_zorder()):
        offsets, faces = np.asarray(collection.get_offsets()), collection.get_facecolors()
        if not len(offsets):
            continue
        for offset, face in zip(offsets, itertools.cycle(faces), strict=False):
            found[tuple(offset)] = to_hex(face)
    return [found[tuple(point)] for point in points]


def test_umap_colours_every_cell_by_its_label():
    points, labels = example_cells()
    axes = plot.umap(points, labels, color_label="cell type")
    expected = {"B": plot.PALETTE[0], "T": plot.PALETTE[1], "unassigned": plot.UNKNOWN_COLOR}
    found = colors_at(axes, points)
    assert [color.upper() for color in found] == [expected[label] for label in labels]
    legend = axes.get_legend()
    assert legend.get_title().get_text() == "cell type"
    assert [text.get_text() for text in legend.get_texts()] == ["B", "T", "unassigned"]


def test_legend_lies_right_of_the_data_and_inside_the_figure():
    points, _ = example_cells()
    names = [f"a rather long cell type name {i}" for i in np.arange(len(points)) % 25]
    for axes in (
        plot.umap(points, names),
        plot.spatial(points * [1, 3], names),
        plot.comparison_bars({name: {"ARI": 0.5} for name in names[:3]}),
    ):
        figure = axes.figure
        figure.draw_without_rendering()
        box, data = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert box.x0 >= data.x1
        assert box.x1 <= figure.bbox.x1 + 1
        assert box.y0 >= figure.bbox.y0 - 1
        assert box.y1 <= figure.bbox.y1 + 1


def test_no_group_is_always_drawn_on_top():
    points, _ = example_cells(400)
    labels = np.repeat(["first", "last"], 200)
    axes = plot.umap(points, labels)
    drawn = np.asarray(axes.collections[-1].get_offsets())
    of_last = {tuple(point) for point in points[200:]}
    places = [place for place, point in enumerate(drawn) if tuple(point) in of_last]
    assert 170 < np.mean(places) < 230
    np.testing.assert_array_equal(
        drawn, np.asarray(plot.umap(points, labels).collections[-1].get_offsets())
    )


def test_umap_gives_quantities_a_colour_bar_and_whole_numbers_a_legend():
    points, _ = example_cells(100)
    values = np.linspace(0.0, 1.0, 100)
    values[5] = np.nan
    values[7] = 1e6
    axes = plot.umap(points, values, color_label="counts")
    assert axes.get_legend() is None
    bar = axes.figure.axes[1]
    assert bar.get_ylabel() == "counts"
    assert axes.collections[-1].norm.vmax < 2  # one stray cell does not take the whole scale
    assert colors_at(axes, points[[5]]) == [plot.UNKNOWN_COLOR.lower()]
    limited = plot.umap(points, values, color_limits=(0.0, 2.0), color_map="magma")
    assert limited.collections[-1].get_clim() == (0.0, 2.0)
    assert limited.collections[-1].get_cmap().name == "magma"

    groups = plot.umap(points, np.arange(100) % 12, label_groups=True)
    texts = [text.get_text() for text in groups.get_legend().get_texts()]
    assert texts == [str(number) for number in range(12)]  # as numbers, not as words
    assert {text.get_text() for text in groups.texts} == set(texts)


def test_categories_keep_their_order_and_missing_ones_are_grey():
    points, _ = example_cells(6)
    labels = pd.Categorical(["z", "a", None, "z", "a", "a"], categories=["z", "unused", "a"])
    for given in (labels, pd.Series(labels)):
        axes = plot.umap(points, given)
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["z", "a", "missing"]
        assert colors_at(axes, points[[2]]) == [plot.UNKNOWN_COLOR.lower()]


def test_more_groups_than_colours_get_another_marker():
    points, _ = example_cells(90)
    axes = plot.umap(points, np.arange(90) % 30)
    styles = {
        (handle.get_color(), handle.get_marker()) for handle in axes.get_legend().legend_handles
    }
    assert len(styles) == 30


def test_own_palette():
    points, labels = example_cells()
    axes = plot.umap(points, labels, palette={"B": "#123456", "T": "#654321"})
    assert set(colors_at(axes, points)) == {"#123456", "#654321", plot.UNKNOWN_COLOR.lower()}
    with pytest.raises(InputError, match="no colour for"):
        plot.umap(points, labels, palette={"B": "#123456"})


def test_spatial_keeps_the_aspect_and_points_y_down():
    points, labels = example_cells()
    axes = plot.spatial(points * [10, 1], labels, unit="µm")
    assert axes.get_aspect() == 1.0
    assert axes.yaxis_inverted()
    assert axes.get_xlabel() == "x (µm)"
    assert not plot.spatial(points, labels, image_origin=False).yaxis_inverted()
    same = plot.spatial(points, labels, ax=plot.spatial(points, labels))
    assert same.yaxis_inverted()  # not turned back the second time


def test_spatial_point_size_follows_the_density():
    grid = np.stack(np.meshgrid(np.arange(15.0), np.arange(15.0)), -1).reshape(-1, 2)
    axes = plot.spatial(grid, np.arange(225) * 1.0)
    axes.figure.draw_without_rendering()
    spacing = np.diff(axes.transData.transform([[0, 0], [1, 0]])[:, 0])[0]
    diameter = np.sqrt(axes.collections[-1].get_sizes()[0]) * axes.figure.dpi / 72
    assert 0.6 < diameter / spacing < 1.3


def test_one_cell_and_cells_on_a_line_can_be_drawn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.umap([[0.0, 0.0]], ["a"]).figure.draw_without_rendering()
        plot.spatial([[1.0, 5.0], [2.0, 5.0]], [0.5, 0.5]).figure.draw_without_rendering()
        plot.umap([[0.0, 0.0]], [np.nan]).figure.draw_without_rendering()


def test_cell_attention_marks_the_cell_that_looks():
    points = np.random.default_rng(0).random((40, 2))
    weights = np.linspace(0.0, 1.0, 40).astype(np.float32)
    axes = plot.cell_attention(points, weights, cell=7)
    (star,) = axes.get_lines()
    assert (star.get_xdata()[0], star.get_ydata()[0]) == tuple(points[7])
    assert np.sort(np.asarray(axes.collections[-1].get_array())) == pytest.approx(np.sort(weights))
    assert plot.cell_attention(points, weights, ax=axes) is axes
    with pytest.raises(InputError, match="there is no cell 40; expected a number from 0 to 39"):
        plot.cell_attention(points, weights, cell=40)


@pytest.mark.parametrize("draw", [plot.umap, plot.spatial])
def test_maps_refuse_what_does_not_fit(draw):
    points, labels = example_cells()
    with pytest.raises(InputError, match=r"\[cells, 2\]"):
        draw(np.zeros((5, 3)), labels[:5])
    with pytest.raises(InputError, match="for 300 cells"):
        draw(points, labels[:-1])
    points[3] = np.nan
    with pytest.raises(InputError, match="for 1 cells"):
        draw(points, labels)


def test_every_function_draws_on_given_axes():
    points, labels = example_cells()
    _, (left, middle, right) = plt.subplots(1, 3)
    before = len(plt.get_fignums())
    assert plot.umap(points, labels, ax=left) is left
    assert plot.spatial(points, labels, ax=middle) is middle
    assert plot.comparison_bars({"a": {"x": 1.0}}, ax=right) is right
    assert len(plt.get_fignums()) == before


def test_style_does_not_leak():
    before = dict(plt.rcParams)
    plot.training_curves(metrics_lines())
    plot.comparison_bars({"a": {"x": 1.0}})
    assert dict(plt.rcParams) == before


def test_a_backend_that_becomes_interactive_stays_so():
    """The first figure of a notebook loads its backend and turns the interactive mode on; the next is shown too."""
    from cellplm_jax.plot.style import styled

    assert not plt.isinteractive()
    try:
        with styled():
            plt.ion()
        assert plt.isinteractive()
        with styled():
            pass
        assert plt.isinteractive()
    finally:
        plt.ioff()


@pytest.mark.parametrize("show", [False, True])
def test_show_is_asked_for(monkeypatch, show):
    calls = []
    monkeypatch.setattr(plt, "show", lambda: calls.append(1))
    points, labels = example_cells(20)
    plot.umap(points, labels, show=show)
    plot.spatial(points, labels, show=show)
    plot.training_curves(metrics_lines(), show=show)
    plot.comparison_bars({"a": {"x": 1.0}}, show=show)
    assert len(calls) == 4 * show


def test_comparison_bars_show_the_table():
    table = {"ours": {"ARI": 0.7, "NMI": -0.25}, "PCA": {"ARI": 0.6, "NMI": float("nan")}}
    errors = {"ours": {"ARI": 0.05}}
    for given in (table, pd.DataFrame.from_dict(table, orient="index")):
        axes = plot.comparison_bars(given, errors=errors)
        heights = [[bar.get_height() for bar in bars.patches] for bars in axes.containers[:1]]
        assert heights == [[0.7, -0.25]]
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["0.70", "\N{MINUS SIGN}0.25", "0.60", "n/a"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["ARI", "NMI"]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "PCA"]
        bars = [box for box in axes.containers if hasattr(box, "patches")]
        assert len({bar.patches[0].get_hatch() for bar in bars}) == 2  # told apart in grey print
        reach = axes.collections[0].get_segments()
        np.testing.assert_allclose(reach[0][:, 1], [0.65, 0.75])


@pytest.mark.parametrize("table", [{}, {"a": {"x": "high"}}, pd.DataFrame()])
def test_comparison_bars_refuse_what_is_not_a_table_of_numbers(table):
    with pytest.raises(InputError):
        plot.comparison_bars(table)


# Full dichromacy, Machado, Oliveira and Fernandes 2009, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def oklab(colors, vision):
    rgb = np.array([to_rgb(color) for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    opponents = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(cones)) @ np.transpose(opponents)


def smallest_distance(colors, vision):
    positions = oklab(colors, vision)
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(positions, 2))


@pytest.mark.parametrize("vision", VISION)
def test_palette_can_be_told_apart(vision):
    assert len(set(plot.PALETTE)) == 20
    shown = [*plot.PALETTE, plot.UNKNOWN_COLOR]
    tab20 = [to_hex(color) for color in plt.get_cmap("tab20").colors]
    assert smallest_distance(shown[:20], vision) > 0.065
    assert smallest_distance(shown[:20], vision) > smallest_distance(tab20, vision)
    grey, white = oklab([plot.UNKNOWN_COLOR, "#FFFFFF"], vision)
    for position in oklab(plot.PALETTE, vision):
        assert np.linalg.norm(position - white) > 0.1
        assert np.linalg.norm(position - grey) > 0.05


def luminance(color):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, two):
    low, high = sorted([luminance(one), luminance(two)])
    return (high + 0.05) / (low + 0.05)


def test_palette_can_be_seen_on_the_light_and_the_dark_page():
    from cellplm_jax.plot.style import DARK_INK, DARK_PAGE

    for ground in ("#FFFFFF", DARK_PAGE):
        for color in (*plot.PALETTE, plot.UNKNOWN_COLOR):
            assert contrast(color, ground) > 1.8, (color, ground)
        assert min(contrast(color, ground) for color in plot.PALETTE[:6]) > 2.2
    assert contrast("#CCCCFF", "#FFFFFF") < 1.8  # what this is for
    assert contrast(DARK_INK, DARK_PAGE) > 7


# -- one order and one colour per category ---------------------------------------------------------


def blood(cells=60):
    import anndata

    generator = np.random.default_rng(0)
    adata = anndata.AnnData(generator.poisson(2.0, (cells, 3)).astype(np.float32))
    adata.var_names = ["CD3D", "LYZ", "MS4A1"]
    adata.obs["cluster"] = [str(n % 12) for n in range(cells)]
    adata.obs["depth"] = np.linspace(0, 1, cells)
    adata.obsm["X_umap"] = generator.random((cells, 2))
    adata.obsm["spatial"] = generator.random((cells, 2)) * [1000, 700]
    return adata


def test_labels_are_sorted_as_people_do():
    from cellplm_jax.plot.style import categories_of

    wanted = [str(n) for n in range(12)]
    for values in (
        blood().obs["cluster"],
        blood().obs["cluster"].astype("category"),  # alphabetical by default
        pd.Categorical(blood().obs["cluster"], wanted),
    ):
        assert [str(name) for name in categories_of(values).categories] == wanted
    assert list(categories_of(["CD14", "CD8", "CD4"]).categories) == ["CD4", "CD8", "CD14"]


def test_colours_are_stored_and_read_as_scanpy_does():
    adata = blood()
    axes = plot.umap(adata, color="cluster")
    assert axes.get_title(loc="left") == "cluster"
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [str(n) for n in range(12)]
    stored = dict(
        zip(adata.obs["cluster"].cat.categories, adata.uns["cluster_colors"], strict=True)
    )
    assert stored == {str(n): plot.PALETTE[n] for n in range(12)}
    drawn = colors_at(axes, adata.obsm["X_umap"])
    assert [color.upper() for color in drawn] == [stored[n] for n in adata.obs["cluster"]]
    # The tissue, and a subset of the cells, have the same colours.
    some = adata[adata.obs["cluster"].isin(["3", "7"])].copy()
    axes = plot.spatial(some, color="cluster")
    drawn = colors_at(axes, some.obsm["spatial"])
    assert [color.upper() for color in drawn] == [stored[n] for n in some.obs["cluster"]]
    adata.uns["cluster_colors"] = ["#112233"] * 11 + ["#445566"]
    axes = plot.umap(adata, color="cluster")
    assert set(colors_at(axes, adata.obsm["X_umap"])) == {"#112233", "#445566"}
    shown = {(h.get_color(), h.get_marker()) for h in axes.get_legend().legend_handles}
    assert len(shown) == 5  # four markers of the repeated colour, and the other


def test_umap_of_cells_draws_columns_and_genes():
    adata = blood()
    panels = plot.umap(adata, color=["cluster", "depth", "LYZ"], title="Blood")
    assert [panel.get_title(loc="left") for panel in panels] == ["cluster", "depth", "LYZ"]
    values = np.asarray(panels[2].collections[-1].get_array())
    total = adata.X.sum(axis=1)
    expected = np.log1p(1e4 * adata.X[:, 1] / np.maximum(total, 1))
    np.testing.assert_allclose(np.sort(values), np.sort(expected), rtol=1e-5)
    assert plot.umap(adata).get_legend() is None
    for arguments, text in (
        ({"color": "LYS"}, "Did you mean 'LYZ'"),
        ({"color": []}, "empty list"),
        ({"color": "LYZ", "basis": "X_tsne"}, "obsm has no 'X_tsne'"),
    ):
        with pytest.raises(InputError, match=text):
            plot.umap(adata, **arguments)
    with pytest.raises(InputError, match="without values"):
        plot.umap(adata.obsm["X_umap"])
    del adata.obsm["X_umap"]
    with pytest.raises(InputError, match="Embed the cells first"):
        plot.umap(adata, color="LYZ")


def test_a_gene_is_found_by_its_symbol_in_files_with_ensembl_ids():
    adata = blood()
    by_symbol = np.asarray(plot.umap(adata, color="LYZ").collections[-1].get_array())
    place = list(adata.var_names).index("LYZ")
    names = [f"ENSG9900000000{number}" for number in range(adata.n_vars)]
    names[place] = "ENSG00000090382"
    adata.var_names = names
    for spelling, column in (("LYZ", None), ("LZM", "feature_name")):
        if column:
            adata.var[column] = [spelling if n == names[place] else "" for n in names]
        for color in (spelling, names[place]):
            axes = plot.umap(adata, color=color)
            assert axes.get_title(loc="left") == spelling
            np.testing.assert_array_equal(np.asarray(axes.collections[-1].get_array()), by_symbol)


def test_a_missing_layout_is_computed_from_the_embedding(monkeypatch):
    from cellplm_jax.evaluate import embedding

    adata = blood()
    adata.obsm["X_cellplm"] = adata.obsm.pop("X_umap")
    monkeypatch.setattr(embedding, "umap_coordinates", lambda z, **_: 2 * z)
    plot.umap(adata, color="depth")
    np.testing.assert_allclose(adata.obsm["X_umap"], 2 * adata.obsm["X_cellplm"])


def test_scale_bar_is_a_round_length():
    adata = blood()
    adata.obsm["spatial"][:2] = [[0, 0], [1000, 700]]
    axes = plot.spatial(adata, color="cluster", micrometres_per_unit=0.5)
    (bar,) = [line for line in axes.lines if line.get_gid() == "scale bar"]
    assert np.ptp(bar.get_xdata()) == pytest.approx(200)  # 100 µm; the tissue is 500 µm wide
    assert [text.get_text() for text in axes.texts] == ["100 µm"]
    assert not plot.spatial(adata, color="cluster").lines
    factors = {"scalefactors": {"spot_diameter_fullres": 130.0}}
    adata.uns["spatial"] = {"one": factors}
    assert plot.scale_of(adata) == pytest.approx(0.5)
    assert plot.spatial(adata, color="cluster").texts[0].get_text() == "100 µm"


def test_dark_theme_turns_ink_and_leaves_data():
    adata = blood()
    axes = plot.umap(adata, color="cluster", label_groups=True)
    figure = axes.figure
    ink = axes.xaxis.label.get_color()
    data = colors_at(axes, adata.obsm["X_umap"])
    with plot.dark_theme(figure):
        assert contrast(axes.xaxis.label.get_color(), "#1D2125") > 6
        assert contrast(axes.get_facecolor(), "#1D2125") == pytest.approx(1, abs=0.02)
        assert colors_at(axes, adata.obsm["X_umap"]) == data
        handles = axes.get_legend().legend_handles
        assert [handle.get_color() for handle in handles] == list(plot.PALETTE[:12])
    assert axes.xaxis.label.get_color() == ink
    assert to_hex(axes.get_facecolor()) == "#ffffff"
    # Numbers on the cells of a confusion matrix stay on their colours.
    axes = plot.confusion_matrix(pd.DataFrame([[5, 1], [0, 9]], list("ab"), list("ab")))
    before = [text.get_color() for text in axes.texts]
    with plot.dark_theme(axes.figure):
        assert [text.get_color() for text in axes.texts] == before


def test_dot_plot_shows_means_and_shares():
    means = pd.DataFrame([[1.0, 0.0], [3.0, 2.0]], ["0", "1"], ["LYZ", "CD3D"])
    shares = pd.DataFrame([[0.5, 0.0], [1.0, 0.25]], ["0", "1"], ["LYZ", "CD3D"])
    axes = plot.dot_plot(means, shares)
    dots = axes.collections[0]
    np.testing.assert_allclose(dots.get_array(), [0, 0, 1, 1])
    sizes = dots.get_sizes() - 2
    np.testing.assert_allclose(sizes / sizes[2], [0.5, 0, 1, 0.25])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    with pytest.raises(InputError, match="the same shape"):
        plot.dot_plot(means, shares.iloc[:1])


def test_fitting_curves():
    history = [
        {"epoch": n, "loss": 1.0 / n, "validation_loss": 2.0 / n, "validation_score": n / 10}
        for n in range(1, 6)
    ]
    axes = plot.fitting_curves(history, best_epoch=4, title="Fit")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training", "validation", "kept: epoch 4"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    axes = plot.fitting_curves(history, key="score")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["validation"]
    with pytest.raises(
        InputError, match="5 epochs without 'nothing'; expected one of epoch, loss, score"
    ):
        plot.fitting_curves(history, key="nothing")
    with pytest.raises(InputError, match="Call fit first"):
        plot.fitting_curves([])
