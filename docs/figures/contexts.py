"""Contexts: the cells that attend to each other, for three ways to define them."""

from __future__ import annotations

from themes import BLUE, GREEN, ORANGE, PINK, draw

CELLS = 8
ROWS = (
    ("no batch_key: one context", lambda sample, cell: 0),
    ('batch_key="sample": one context a sample', lambda sample, cell: sample),
    (
        'batch_key="sample", cells_per_context=4: dealt in turn',
        # As in embed: cell i of each sample goes to context i modulo their number.
        lambda sample, cell: 2 * sample + cell % 2,
    ),
)


def figure(plt, theme):
    """Draw two samples of eight cells; cells with the same number and colour attend to each other."""
    colors = (BLUE, ORANGE, GREEN, PINK)
    drawn, axes = plt.subplots(len(ROWS), figsize=(6.4, 4.0), layout="constrained")
    for ax, (title, context) in zip(axes, ROWS, strict=True):
        for sample in (0, 1):
            left = sample * (CELLS + 1.2)
            ax.plot(
                [left - 0.5, left + CELLS - 0.5],
                [-0.75, -0.75],
                color=theme.faint,
                linewidth=2,
                solid_capstyle="butt",
            )
            if ax is axes[-1]:
                name = f"sample {'ab'[sample]}"
                ax.text(left + CELLS / 2 - 0.5, -0.95, name, ha="center", va="top")
            for cell in range(CELLS):
                number = context(sample, cell)
                ax.scatter(left + cell, 0, s=330, color=colors[number])
                ax.text(
                    left + cell,
                    -0.02,
                    number + 1,
                    ha="center",
                    va="center",
                    color="white" if number != 1 else "black",
                    weight="bold",
                )
        ax.set_title(title, loc="left")
        ax.set_xlim(-0.8, 2 * CELLS + 1)
        ax.set_ylim(-1.7 if ax is axes[-1] else -1.0, 0.8)
        ax.axis("off")
    return drawn


if __name__ == "__main__":
    draw("contexts", figure)
