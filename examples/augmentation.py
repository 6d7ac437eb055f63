"""Small changes of images that leave their class as it is."""

import numpy as np

PADDING = 4


def crop_and_flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves every image by up to four pixels and mirrors half of them.

    Args:
        images: `(N, height, width, channels)`.
        rng: A `numpy.random.Generator`.
    """
    edge = (PADDING, PADDING)
    padded = np.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
    count, height, width = images.shape[:3]
    places = rng.integers(2 * PADDING + 1, size=(count, 2))
    mirrored = rng.random(count) < 0.5
    rows = places[:, :1] + np.arange(height)
    columns = places[:, 1:] + np.arange(width)
    columns[mirrored] = columns[mirrored, ::-1]
    example = np.arange(count)[:, None, None]
    return padded[example, rows[:, :, None], columns[:, None, :]]
