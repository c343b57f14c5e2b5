"""The study: predictions for every corruption at every strength, with dropout off and on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np
from scipy.special import entr

import regjax
from examples.overfit.data import split_digits
from examples.uncertainty import network
from examples.uncertainty.corruptions import CORRUPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int

    from examples.uncertainty.corruptions import Corruption
    from examples.uncertainty.settings import Settings

_BINS = 15


@dataclass(frozen=True)
class View:
    """The predictions for a set of images, and their quality.

    Attributes:
        probs: The probability of each digit.
        labels: The correct digits.
    """

    probs: Float[np.ndarray, "images 10"]
    labels: Int[np.ndarray, " images"]

    @property
    def predicted(self) -> Int[np.ndarray, " images"]:
        """Return the most probable digit of each image."""
        return self.probs.argmax(-1)

    @property
    def confidence(self) -> Float[np.ndarray, " images"]:
        """Return the probability of the most probable digit."""
        return self.probs.max(-1)

    @property
    def entropy(self) -> Float[np.ndarray, " images"]:
        """Return the entropy of the probabilities of each image, in nats."""
        return entr(self.probs).sum(-1)

    @property
    def right(self) -> Bool[np.ndarray, " images"]:
        """Return for each image whether the most probable digit is the label."""
        return self.predicted == self.labels

    @property
    def log_loss(self) -> float:
        """Return the mean negative log-likelihood of the labels, in nats."""
        probs = self.probs[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(probs, np.finfo(np.float32).tiny)).mean())

    @property
    def calibration_error(self) -> float:
        """Return the expected calibration error: |confidence - accuracy|, averaged over bins."""
        bins = np.minimum((self.confidence * _BINS).astype(int), _BINS - 1)
        surplus = np.bincount(bins, self.confidence - self.right, minlength=_BINS)
        return float(np.abs(surplus).sum() / len(bins))


@dataclass(frozen=True)
class Scene:
    """One corruption at one strength.

    Attributes:
        corruption: The corruption.
        strength: Its strength.
        pixels: The corrupted images.
        one: The predictions of one pass with dropout off.
        many: The means of many passes with dropout on.
        disagreement: The mutual information of the passes for each image, in nats.
    """

    corruption: Corruption
    strength: float
    pixels: Float[np.ndarray, "images 64"]
    one: View
    many: View
    disagreement: Float[np.ndarray, " images"]


@dataclass
class Study:
    """All scenes of a call, in the order of `CORRUPTIONS`, and the parameters of the network."""

    settings: Settings
    params: network.Params
    scenes: list[Scene] = field(default_factory=list)

    def of(self, corruption: Corruption) -> list[Scene]:
        """Return the scenes of a corruption, from the weakest to the strongest."""
        return [scene for scene in self.scenes if scene.corruption is corruption]


def run(
    settings: Settings,
    on_step: Callable[[int], None] = lambda step: None,
    on_scene: Callable[[Scene], None] = lambda scene: None,
) -> Study:
    """Train, and predict every corruption of the test images.

    Args:
        settings: The settings.
        on_step: Called with the number of completed training steps, at intervals.
        on_scene: Called with each scene.
    """
    train_set, test_set = split_digits(
        settings.train_size, np.random.default_rng([settings.seed, 2])
    )
    study = Study(settings, network.train(train_set, settings, on_step))
    predict = network.stochastic_pass(settings.rate)
    for place, corruption in enumerate(CORRUPTIONS):
        for strength in corruption.strengths:
            # The same random numbers at each strength.
            rng = np.random.default_rng([settings.seed, 3, place])
            pixels = corruption.apply(test_set.pixels, test_set.labels, strength, rng)
            passes = regjax.mc_dropout(
                predict,
                study.params,
                pixels,
                key=jax.random.key(settings.seed),
                outputs="logits",
                samples=settings.samples,
            )
            scene = Scene(
                corruption,
                strength,
                pixels,
                View(np.asarray(network.without_dropout(study.params, pixels)), test_set.labels),
                View(np.asarray(passes.mean), test_set.labels),
                np.asarray(passes.mutual_information),
            )
            study.scenes.append(scene)
            on_scene(scene)
    return study


def detection(scenes: list[Scene]) -> dict[str, float]:
    """Return how well each score detects the errors of one pass with dropout off.

    Args:
        scenes: The scenes, whose images are pooled.

    Returns:
        The AUROC of each score: the probability that an incorrectly classified image has a higher
        score than a correctly classified one. NaN if there are no images of either kind.
    """
    from sklearn.metrics import roc_auc_score

    wrong = np.concatenate([~scene.one.right for scene in scenes])
    scores = {
        "entropy off": [scene.one.entropy for scene in scenes],
        "entropy MC": [scene.many.entropy for scene in scenes],
        "MI": [scene.disagreement for scene in scenes],
    }
    if wrong.all() or not wrong.any():
        return dict.fromkeys(scores, float("nan"))
    return {name: float(roc_auc_score(wrong, np.concatenate(s))) for name, s in scores.items()}


def distance_to_torch(study: Study) -> float:
    """Compare with PyTorch, with the same weights and masks, on the images of the first scene.

    Returns:
        The largest difference of any mean probability, or of any mutual information in nats.
    """
    from examples.uncertainty import network_torch

    settings, scene = study.settings, study.scenes[0]
    passes = network_torch.predict(
        network_torch.from_jax(study.params, settings.rate),
        scene.pixels,
        seed=settings.seed,
        samples=settings.samples,
    )
    assert passes.mutual_information is not None
    pairs = (
        (passes.mean, scene.many.probs),
        (passes.mutual_information, scene.disagreement),
    )
    return max(float(np.abs(in_torch.numpy() - in_jax).max()) for in_torch, in_jax in pairs)
