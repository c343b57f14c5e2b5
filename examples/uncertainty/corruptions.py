"""Four corruptions of images of digits, each at several strengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float32, Int32

    Pixels = Float32[np.ndarray, "images 64"]
    Labels = Int32[np.ndarray, " images"]

SIDE = 8


@dataclass(frozen=True)
class Corruption:
    """A corruption of images.

    Attributes:
        name: Its name.
        unit: The unit of the strengths.
        strengths: Increasing strengths; 0 changes nothing.
        apply: `apply(pixels, labels, strength, rng)` returns the corrupted images.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[Pixels, Labels, float, np.random.Generator], Pixels]


def rotate(pixels: Pixels, labels: Labels, angle: float, rng: np.random.Generator) -> Pixels:
    """Rotate each image by an angle in degrees, in a random direction."""
    signs = rng.choice([-1, 1], len(pixels))
    images = pixels.reshape(-1, SIDE, SIDE)
    turned = [
        ndimage.rotate(image, sign * angle, reshape=False, order=1, mode="grid-constant")
        for image, sign in zip(images, signs, strict=True)
    ]
    return np.stack(turned).reshape(pixels.shape).astype(np.float32)


def add_noise(pixels: Pixels, labels: Labels, stddev: float, rng: np.random.Generator) -> Pixels:
    """Add Gaussian noise to each pixel, and clip the result to [0, 1]."""
    return np.clip(pixels + stddev * rng.normal(size=pixels.shape), 0, 1).astype(np.float32)


def occlude(pixels: Pixels, labels: Labels, side: float, rng: np.random.Generator) -> Pixels:
    """Erase a square at a random position of each image."""
    size = int(side)
    rows, columns = rng.integers(0, SIDE - size + 1, (2, len(pixels)))
    images = pixels.reshape(-1, SIDE, SIDE).copy()
    for image, row, column in zip(images, rows, columns, strict=True):
        image[row : row + size, column : column + size] = 0
    return images.reshape(pixels.shape)


def blend(pixels: Pixels, labels: Labels, share: float, rng: np.random.Generator) -> Pixels:
    """Mix each image with an image of another digit; 0.5 weighs both equally."""
    others = [rng.choice(np.flatnonzero(labels != label)) for label in labels]
    return ((1 - share) * pixels + share * pixels[others]).astype(np.float32)


CORRUPTIONS = (
    Corruption("rotation", "degrees", (0, 10, 20, 30, 45, 90), rotate),
    Corruption("noise", "standard deviation", (0.0, 0.15, 0.3, 0.45, 0.6, 0.9), add_noise),
    Corruption("occlusion", "pixels a side", (0, 2, 3, 4, 5, 6), occlude),
    Corruption("blending", "share of the other", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), blend),
)
