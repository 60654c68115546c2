"""Scores per task, from ``benchmarks/quality/quality.json``."""

from __future__ import annotations

import json

from themes import HERE, ORANGE, draw

SCORES = HERE.parents[1] / "benchmarks" / "quality" / "quality.json"
OURS, ORIGINAL = "small", "original CellPLM, scratch"
PANELS = (
    # task, score, its label, simple method, another tool, data sets and their labels
    (
        "annotation",
        "macro_f1",
        "annotation, macro F1",
        "logistic regression, log1p of counts",
        "CellTypist",
        {
            "hashtag_cell_lines_2000genes": "cell lines",
            "kang_muscat_labelled": "Kang",
            "zheng_purified_pbmc": "Zheng",
        },
    ),
    (
        "imputation",
        "pearson",
        "imputation, correlation",
        "ridge regression",
        "Tangram",
        {"breast_st_stahl_4layers": "breast, ST", "xenium_breast_jef2023_4fov": "breast, Xenium"},
    ),
    (
        "denoising",
        "expected_rmse",
        "denoising, error (less is better)",
        "gene mean",
        "scVI",
        {"pbmc3k": "PBMC3k"},
    ),
    (
        "integration",
        "kbet",
        "integration, mixing (kBET)",
        "PCA",
        "Harmony",
        {"kang_muscat_labelled": "Kang"},
    ),
    (
        "integration",
        "knn_accuracy",
        "integration, kNN accuracy",
        "PCA",
        "Harmony",
        {"kang_muscat_labelled": "Kang"},
    ),
    (
        "perturbation",
        "pearson",
        "perturbation, correlation",
        "mean change",
        None,
        {"kang_muscat_labelled": "Kang", "papalexi_eccite_thp1_299genes": "Papalexi"},
    ),
)


def figure(plt, theme):
    """Draw one panel per score, one line per data set, one marker per method; error bars are over seeds.

    The dashed line is the simple method: a marker to its right (to its left for an error) is better.
    """
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    heights = [len(panel[-1]) + 0.9 for panel in PANELS]
    drawn, axes = plt.subplots(
        len(PANELS), figsize=(6.8, 7.8), layout="constrained", height_ratios=heights
    )
    for ax, (task, score, title, simple, other, names) in zip(axes, PANELS, strict=True):
        methods = (
            (OURS, "o", theme.blue, 0.0, 9),
            (ORIGINAL, "s", ORANGE, 0.2, 7),
            (other, "D", theme.faint, 0.36, 6),
        )
        for row, data in enumerate(names):
            baseline = scores[task][data][simple]["scores"][score][0]
            ax.plot(
                [baseline] * 2,
                [row - 0.5, row + 0.5],
                color=theme.text,
                linestyle=(0, (3, 2)),
                linewidth=1.4,
            )
            for method, mark, color, shift, size in methods:
                if method not in scores[task][data]:
                    continue
                mean, deviation = scores[task][data][method]["scores"][score]
                ax.errorbar(
                    mean, row + shift, xerr=deviation, fmt=mark, color=color, markersize=size,
                    elinewidth=1.4,
                )  # fmt: skip
        ax.set_yticks(range(len(names)), list(names.values()))
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color=theme.faint, linewidth=0.4, alpha=0.6)
        ax.set_axisbelow(True)
        tools = f"line: {simple.partition(',')[0]}" + (f"   ◆ {other}" if other else "")
        ax.set_title(title, loc="left", weight="bold", fontsize=10.5)
        ax.set_title(tools, loc="right", fontsize=9.5)
    marks = [
        plt.Line2D([], [], marker=mark, color=color, linestyle=line, markersize=8, label=label)
        for mark, color, line, label in (
            ("o", theme.blue, "", 'this package, from "small"'),
            ("s", ORANGE, "", "the original, from scratch"),
            ("D", theme.faint, "", "another tool"),
            ("", theme.text, (0, (3, 2)), "simple baseline"),
        )
    ]
    drawn.legend(handles=marks, loc="outside upper center", ncols=2, fontsize=9.5)
    return drawn


if __name__ == "__main__":
    draw("quality", figure)
