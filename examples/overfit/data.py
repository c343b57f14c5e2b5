"""Images, initial weights and batches for both frameworks, as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.overfit.settings import CLASSES, HIDDEN_LAYERS, LARGEST_TRAIN_SIZE, PIXELS

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from examples.overfit.settings import Settings

    Weights = dict[str, dict[str, Float32[np.ndarray, "..."]]]

# Each purpose has its own stream, so that a change of one does not affect the others.
_IMAGES, _WEIGHTS, _BATCHES = range(3)


@dataclass(frozen=True)
class Images:
    """Images and their labels.

    Attributes:
        pixels: Brightness in [0, 1].
        labels: The digit, 0 to 9.
    """

    pixels: Float32[np.ndarray, "images 64"]
    labels: Int32[np.ndarray, " images"]


@dataclass(frozen=True)
class Problem:
    """The data that both frameworks share, so that their curves are comparable.

    Attributes:
        train: The small training set.
        validation: Images that are not trained on.
        weights: Kernels (inputs, outputs) and biases (outputs,) of each layer, in order.
        batches: For each step, the indices of the training images in its batch.
    """

    train: Images
    validation: Images
    weights: Weights
    batches: Int32[np.ndarray, "steps batch"]


def load_problem(settings: Settings) -> Problem:
    """Return the problem, which is a function of the settings alone."""
    train, validation = split_digits(settings.train_size, _stream(settings.seed, _IMAGES))
    return Problem(
        train,
        validation,
        initial_weights(settings.width, _stream(settings.seed, _WEIGHTS)),
        draw_batches(
            settings.steps,
            settings.batch_size,
            settings.train_size,
            _stream(settings.seed, _BATCHES),
        ),
    )


def split_digits(train_size: int, rng: np.random.Generator) -> tuple[Images, Images]:
    """Split scikit-learn's 1,797 handwritten digits (8x8 pixels) into training and validation.

    Args:
        train_size: From 10 to `LARGEST_TRAIN_SIZE`, with the proportions of the classes.
        rng: The generator that chooses the images.

    Returns:
        Training and validation images. The latter do not depend on `train_size`.
    """
    from sklearn.datasets import load_digits  # a slow import, which --help does not need

    brightness, digits = load_digits(return_X_y=True)
    pixels = (np.asarray(brightness) / 16).astype(np.float32)
    labels = np.asarray(digits).astype(np.int32)
    order = stratified_order(labels, rng)
    train, validation = order[:train_size], order[LARGEST_TRAIN_SIZE:]
    return Images(pixels[train], labels[train]), Images(pixels[validation], labels[validation])


def stratified_order(
    labels: Int32[np.ndarray, " images"], rng: np.random.Generator
) -> Int32[np.ndarray, " images"]:
    """Return a random order of which every prefix has the proportions of the classes.

    The j-th of the n images of a class has the relative position (j + 1/2) / n.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(place, kind="stable")


def initial_weights(width: int, rng: np.random.Generator) -> Weights:
    """Draw kernels from U(-b, b) with b = 1/sqrt(inputs), PyTorch's default; biases are zero."""
    sizes = [PIXELS, *[width] * HIDDEN_LAYERS, CLASSES]
    names = [*(f"hidden{i}" for i in range(1, HIDDEN_LAYERS + 1)), "output"]
    weights = {}
    for name, inputs, outputs in zip(names, sizes[:-1], sizes[1:], strict=True):
        bound = inputs**-0.5
        weights[name] = {
            "kernel": rng.uniform(-bound, bound, (inputs, outputs)).astype(np.float32),
            "bias": np.zeros(outputs, np.float32),
        }
    return weights


def draw_batches(
    steps: int, batch_size: int, train_size: int, rng: np.random.Generator
) -> Int32[np.ndarray, "steps batch"]:
    """Return batches of the training set, shuffled again in each epoch.

    All batches have the same size: a batch may continue in the next epoch.
    """
    epochs = -(-steps * batch_size // train_size)
    order = np.concatenate([rng.permutation(train_size) for _ in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _stream(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose])
