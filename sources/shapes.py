"""Eight shapes that the program draws itself: a data set for `--demo` and tests that needs no download."""

import math

import numpy as np

SHAPES = ("circle", "ring", "triangle", "square", "pentagon", "star", "cross", "crescent")


def load(image_size=32, train=2400, test=1200):
    """Eight shapes at any place, angle, size and colour, half of them with
    another shape's piece in front, in noise."""
    images, labels = [], []
    for split, count in (("train", train), ("test", test)):
        random = np.random.default_rng([len(split), count, 7])
        kinds = np.arange(count) % len(SHAPES)
        random.shuffle(kinds)
        drawn = np.empty((count, image_size, image_size, 3), np.uint8)
        part = 400 * 64**2 // max(64, image_size) ** 2  # in parts, to stay in the cache
        for start in range(0, count, part):
            drawn[start : start + part] = _draw(kinds[start : start + part], image_size, random)
        images.append(drawn)
        labels.append(kinds.astype(np.int64))
    return SHAPES, images[0], labels[0], images[1], labels[1]


def _draw(kinds, size, random):
    """uint8 images (len(kinds), size, size, 3) of the shapes whose numbers are given."""
    count = len(kinds)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1

    def uniform(low, high, *shape):
        return random.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32)

    def mask(kinds, scale, place):
        angle = uniform(0, 2 * math.pi)
        x, y = grid - uniform(-place, place), grid[:, None] - uniform(-place, place)
        x, y = (x * np.cos(angle) - y * np.sin(angle)) / scale, (x * np.sin(angle) + y * np.cos(angle)) / scale
        radius, turn = np.hypot(x, y), np.arctan2(y, x)

        def polygon(sides):  # the edge's distance from the centre, over that of a corner
            sector = 2 * math.pi / sides
            return math.cos(sector / 2) / np.cos(turn % sector - sector / 2)

        insides = (
            radius < 0.85,
            (radius < 0.95) & (radius > 0.55),
            radius < 1.1 * polygon(3),
            radius < polygon(4),
            radius < 0.95 * polygon(5),
            radius < 0.75 + 0.35 * np.cos(5 * turn),
            (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 0.9),
            (radius < 0.95) & (np.hypot(x - 0.45, y) > 0.7),
        )
        return np.select([kinds[:, None, None] == k for k in range(len(SHAPES))], insides)[:, None]

    background, colour, front = uniform(0, 1, 3), uniform(0, 1, 3), uniform(0, 1, 3)
    far = np.abs(colour - background).max(axis=1, keepdims=True) < 0.25
    colour = np.where(far, (background + 0.5) % 1, colour)
    image = np.where(mask(kinds, uniform(0.45, 0.8), 0.25), colour, background)
    other = random.integers(0, len(SHAPES), count)
    piece = mask(other, uniform(0.15, 0.35), 0.8) & (uniform(0, 1, 1) < 0.5)
    image = np.where(piece, front, image)
    image = image + random.normal(0, 0.08, image.shape).astype(np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
