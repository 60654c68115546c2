"""Positions: similarity of the encoding of one position to all others, with the model's own function."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from themes import ORANGE, draw

from cellplm_jax.model.positions import sinusoidal_encoding

GRID, WIDTH = 100, 256
PLACE = (30, 60)


def figure(plt, theme):
    """Draw the cosine of the encoding at one square of the grid and at all squares."""
    centres = (np.arange(GRID) + 0.5) / GRID
    x, y = np.meshgrid(centres, centres)
    encoding = np.asarray(sinusoidal_encoding(jnp.asarray(np.stack([x, y], axis=-1)), WIDTH, GRID))
    encoding = encoding / np.linalg.norm(encoding, axis=-1, keepdims=True)
    here = encoding[PLACE[1], PLACE[0]]
    likeness = encoding @ here

    drawn, (left, right) = plt.subplots(
        1, 2, figsize=(6.4, 3.5), layout="constrained", width_ratios=(1.25, 1)
    )
    image = left.imshow(likeness, cmap="viridis", origin="lower", extent=(0, 1, 0, 1), vmax=1)
    left.plot(centres[PLACE[0]], centres[PLACE[1]], "+", color=ORANGE, markersize=14, mew=3)
    left.set_title("likeness to the place +")
    left.set_xlabel("x, scaled to the sample")
    left.set_ylabel("y")
    left.set_xticks([0, 0.5, 1])
    left.set_yticks([0, 0.5, 1])
    bar = drawn.colorbar(image, ax=left, shrink=0.75)
    bar.outline.set_visible(False)

    distance = (np.arange(GRID) - PLACE[0]) / GRID
    right.plot(distance, likeness[PLACE[1]], color=theme.blue, linewidth=2)
    right.axvline(0, color=theme.faint, linewidth=1, linestyle=":")
    right.set_title("along x")
    right.set_xlabel("distance from +")
    right.set_ylabel("cosine of the encodings")
    return drawn


if __name__ == "__main__":
    draw("positions", figure)
