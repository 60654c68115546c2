"""Cells as tokens: from counts to one token per cell, and attention among the cells."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from themes import ORANGE, draw

CELLS, GENES, HIDDEN = 6, 8, 4


def figure(plt, theme):
    """Draw small example counts, the gene embeddings, their product, and attention among the cells."""
    random = np.random.default_rng(3)
    counts = random.poisson(random.gamma(0.35, 2.0, (CELLS, GENES)))
    genes = random.random((GENES, HIDDEN))
    tokens = np.log1p(counts) @ genes
    mixed = 0.5 * tokens + 0.5 * tokens.mean(axis=0)

    heat = LinearSegmentedColormap.from_list("heat", theme.heat)
    drawn = plt.figure(figsize=(6.4, 4.9))

    def matrix(values, left, bottom, unit, title, below):
        height, width = values.shape[0] * unit / 4.9, values.shape[1] * unit / 6.4
        ax = drawn.add_axes((left, bottom, width, height))
        ax.imshow(values, cmap=heat, aspect="auto", vmin=0)
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ("top", "right", "bottom", "left"):
            ax.spines[side].set_visible(True)
        ax.set_xticks(np.arange(values.shape[1] - 1) + 0.5, minor=True)
        ax.set_yticks(np.arange(values.shape[0] - 1) + 0.5, minor=True)
        ax.grid(which="minor", color=theme.faint, linewidth=0.4)
        ax.tick_params(which="minor", length=0)
        ax.set_title(title, pad=6)
        drawn.text(left + width / 2, bottom - 0.02, below, ha="center", va="top", fontsize=10)
        return ax

    matrix(np.log1p(counts), 0.06, 0.62, 0.235, "counts", "cells x genes")
    drawn.text(0.41, 0.76, "x", ha="center", va="center", fontsize=16)
    matrix(genes, 0.48, 0.535, 0.235, "gene embeddings", "genes x hidden")
    drawn.text(0.705, 0.76, "=", ha="center", va="center", fontsize=16)
    matrix(tokens, 0.78, 0.62, 0.235, "tokens", "one a cell")

    ax = drawn.add_axes((0.02, 0.02, 0.6, 0.4))
    angles = np.linspace(0, 2 * np.pi, CELLS, endpoint=False) + np.pi / 2
    x, y = 1.9 * np.cos(angles), np.sin(angles)
    for i in range(CELLS):
        for j in range(i):
            ax.plot([x[i], x[j]], [y[i], y[j]], color=theme.faint, linewidth=0.8, zorder=1)
    for j in range(1, CELLS):
        ax.plot([x[0], x[j]], [y[0], y[j]], color=ORANGE, linewidth=2, zorder=2)
    ax.scatter(x, y, s=330, color=theme.blue, zorder=3)
    for i in range(CELLS):
        ax.text(x[i], y[i], i + 1, ha="center", va="center", color="white", zorder=4, weight="bold")
    ax.set_xlim(-2.5, 2.5)
    ax.set_ylim(-1.35, 1.35)
    ax.axis("off")
    drawn.text(0.32, 0.445, "encoder: every cell sees every other", ha="center")
    drawn.text(0.69, 0.22, "→", ha="center", va="center", fontsize=22)
    matrix(mixed, 0.78, 0.09, 0.235, "embeddings", "one a cell")
    return drawn


if __name__ == "__main__":
    draw("tokens", figure)
