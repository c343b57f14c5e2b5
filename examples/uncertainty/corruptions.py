"""Four ways to spoil an image of a digit, each from not at all to badly."""

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
    """One way to spoil images.

    Attributes:
        name: What is done.
        unit: What the strengths count.
        strengths: From 0, which changes nothing, upwards.
        apply: `apply(pixels, labels, strength, rng)` makes the spoilt images.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[Pixels, Labels, float, np.random.Generator], Pixels]


def rotate(pixels: Pixels, labels: Labels, angle: float, rng: np.random.Generator) -> Pixels:
    """Turns each image by an angle in degrees, one way or the other."""
    signs = rng.choice([-1, 1], len(pixels))
    images = pixels.reshape(-1, SIDE, SIDE)
    turned = [
        ndimage.rotate(image, sign * angle, reshape=False, order=1, mode="grid-constant")
        for image, sign in zip(images, signs, strict=True)
    ]
    return np.stack(turned).reshape(pixels.shape).astype(np.float32)


def add_noise(pixels: Pixels, labels: Labels, stddev: float, rng: np.random.Generator) -> Pixels:
    """Adds Gaussian noise to a brightness that lies in [0, 1] and stays there."""
    return np.clip(pixels + stddev * rng.normal(size=pixels.shape), 0, 1).astype(np.float32)


def occlude(pixels: Pixels, labels: Labels, side: float, rng: np.random.Generator) -> Pixels:
    """Erases a square somewhere in each image."""
    size = int(side)
    rows, columns = rng.integers(0, SIDE - size + 1, (2, len(pixels)))
    images = pixels.reshape(-1, SIDE, SIDE).copy()
    for image, row, column in zip(images, rows, columns, strict=True):
        image[row : row + size, column : column + size] = 0
    return images.reshape(pixels.shape)


def blend(pixels: Pixels, labels: Labels, share: float, rng: np.random.Generator) -> Pixels:
    """Mixes each image with one of another digit; at a share of one half it is neither."""
    others = [rng.choice(np.flatnonzero(labels != label)) for label in labels]
    return ((1 - share) * pixels + share * pixels[others]).astype(np.float32)


CORRUPTIONS = (
    Corruption("rotation", "degrees", (0, 10, 20, 30, 45, 90), rotate),
    Corruption("noise", "standard deviation", (0.0, 0.15, 0.3, 0.45, 0.6, 0.9), add_noise),
    Corruption("occlusion", "pixels a side", (0, 2, 3, 4, 5, 6), occlude),
    Corruption("blending", "share of the other", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), blend),
)
