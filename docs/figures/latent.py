"""The latent: a mixture of Gaussians, and the posterior of one cell. A two-dimensional sketch."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import Ellipse
from themes import GREEN, ORANGE, PINK, draw

COMPONENTS = (
    ((-2.6, 0.7), 2.6, 1.5, 25),
    ((0.6, -1.0), 2.2, 1.6, -15),
    ((2.9, 1.1), 1.8, 2.2, 10),
)
CELL = ((-2.0, 1.25), 0.75, 0.5, 10)


def figure(plt, theme):
    """Draw three components, cells, and the posterior of one cell."""
    random = np.random.default_rng(5)
    drawn, ax = plt.subplots(figsize=(6.4, 3.7), layout="constrained")
    for (centre, width, height, angle), color in zip(
        COMPONENTS, (theme.blue, GREEN, PINK), strict=True
    ):
        turn = np.deg2rad(angle)
        axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        cells = random.normal(size=(45, 2)) * (width / 4, height / 4) @ axes.T + centre
        ax.scatter(*cells.T, s=14, color=color, alpha=0.75, linewidths=0)
        for size in (1, 1.7):
            ax.add_patch(
                Ellipse(
                    centre, width * size / 1.2, height * size / 1.2, angle=angle, fill=False,
                    color=color, linewidth=1.6,
                )
            )  # fmt: skip
    centre, width, height, angle = CELL
    ax.add_patch(Ellipse(centre, width, height, angle=angle, color=ORANGE, alpha=0.55, zorder=3))
    ax.plot(*centre, "o", color=ORANGE, markeredgecolor=theme.text, markersize=8, zorder=4)

    def note(text, point, at, ha):
        arrow = {"arrowstyle": "-", "color": theme.text, "linewidth": 0.9}
        ax.annotate(text, point, at, ha=ha, va="center", arrowprops=arrow, zorder=5)

    note("the embedding:\nmean of q(z|x)", centre, (-3.4, 3.0), "center")
    note("q(z|x): where this\ncell may lie", (-1.68, 1.3), (-0.2, 3.0), "center")
    note("p(z|y): a component\nof the prior", (3.0, 2.35), (3.0, 3.35), "center")
    ax.set_xlim(-5.2, 5.2)
    ax.set_ylim(-3.0, 3.9)
    ax.set_xlabel("latent dimension 1")
    ax.set_ylabel("latent dimension 2")
    ax.set_xticks([])
    ax.set_yticks([])
    return drawn


if __name__ == "__main__":
    draw("latent", figure)
