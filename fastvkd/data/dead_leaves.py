"""Synthetic images that show nothing: overlapping shapes in random colours, the "dead leaves" model.

Vision features keep their general ability when they are held in place on such images too. The images have statistics of
natural ones (Baradad et al., "Learning to See by Looking at Noise", arXiv 2106.05963).
"""

import numpy as np
from PIL import Image, ImageDraw


def dead_leaves(size: tuple[int, int], seed: tuple[int, ...]) -> Image.Image:
    """RGB image of `size` (width, height); leaf sizes follow a power law (exponent -3): no scale is preferred."""
    rng = np.random.default_rng(list(seed))
    width, height = size
    side = max(size)
    image = Image.new("RGB", size, _colour(rng))
    draw = ImageDraw.Draw(image)
    low, high = 0.06, 0.7
    for _ in range(int(rng.integers(6, 60))):
        # Inverse of the cumulative distribution of p(r) ~ r^-3 between low and high.
        u = rng.random()
        radius = side * (low**-2 - u * (low**-2 - high**-2)) ** -0.5
        stretch = rng.uniform(0.25, 1.0)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        angle = rng.uniform(0, np.pi)
        if rng.random() < 0.5:
            corners = np.array([(-1, -stretch), (1, -stretch), (1, stretch), (-1, stretch)])
        else:
            turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            corners = np.stack([np.cos(turn), stretch * np.sin(turn)], axis=1)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = corners @ rotation.T * radius + (x, y)
        draw.polygon([(float(px), float(py)) for px, py in points], fill=_colour(rng))
    return image


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = rng.integers(0, 256, 3)
    return int(r), int(g), int(b)
