"""The study: every corruption at every strength, seen with dropout off and with dropout on."""

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
    """What one way of predicting says about one set of images, and how right it is.

    Attributes:
        chances: The probability of each digit.
        labels: What is right.
    """

    chances: Float[np.ndarray, "images 10"]
    labels: Int[np.ndarray, " images"]

    @property
    def predicted(self) -> Int[np.ndarray, " images"]:
        """The likeliest digit of each image."""
        return self.chances.argmax(-1)

    @property
    def confidence(self) -> Float[np.ndarray, " images"]:
        """The probability of the likeliest digit."""
        return self.chances.max(-1)

    @property
    def entropy(self) -> Float[np.ndarray, " images"]:
        """The entropy of each image's probabilities, in nats."""
        return entr(self.chances).sum(-1)

    @property
    def right(self) -> Bool[np.ndarray, " images"]:
        """Whether the likeliest digit is the label."""
        return self.predicted == self.labels

    @property
    def log_loss(self) -> float:
        """The mean negative log-likelihood of the labels, in nats."""
        chances = self.chances[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(chances, np.finfo(np.float32).tiny)).mean())

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: how far confidence is from accuracy, bin by bin."""
        bins = np.minimum((self.confidence * _BINS).astype(int), _BINS - 1)
        surplus = np.bincount(bins, self.confidence - self.right, minlength=_BINS)
        return float(np.abs(surplus).sum() / len(bins))


@dataclass(frozen=True)
class Scene:
    """One corruption at one strength.

    Attributes:
        corruption: What was done.
        strength: How much.
        pixels: The images.
        one: The usual evaluation: one pass, dropout off.
        many: The mean of many passes, dropout on.
        disagreement: The passes' mutual information about each image, in nats.
    """

    corruption: Corruption
    strength: float
    pixels: Float[np.ndarray, "images 64"]
    one: View
    many: View
    disagreement: Float[np.ndarray, " images"]


@dataclass
class Study:
    """All scenes of a call, in the order of `CORRUPTIONS`, and the network they were shown to."""

    settings: Settings
    params: network.Params
    scenes: list[Scene] = field(default_factory=list)

    def of(self, corruption: Corruption) -> list[Scene]:
        """The scenes of one corruption, from the weakest to the strongest."""
        return [scene for scene in self.scenes if scene.corruption is corruption]


def run(
    settings: Settings,
    on_step: Callable[[int], None] = lambda step: None,
    on_scene: Callable[[Scene], None] = lambda scene: None,
) -> Study:
    """Trains, then looks at every corruption of the images that training did not see.

    Args:
        settings: The choices.
        on_step: Told the number of training steps done, now and then.
        on_scene: Given each scene as soon as it is there.
    """
    train_set, test_set = split_digits(
        settings.train_size, np.random.default_rng([settings.seed, 2])
    )
    study = Study(settings, network.train(train_set, settings, on_step))
    predict = network.stochastic_pass(settings.rate)
    for place, corruption in enumerate(CORRUPTIONS):
        for strength in corruption.strengths:
            # The same place and the same noise at each strength, only more of it.
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
    """How well each score tells the errors of the usual evaluation from what it gets right.

    Args:
        scenes: The images of all of them are thrown together.

    Returns:
        For each score its AUROC: the probability that an error has a higher score than a hit. NaN
        where there are no errors, or nothing else.
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
    """How far PyTorch is away, with the same weights and masks, on the images of the first scene.

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
        (passes.mean, scene.many.chances),
        (passes.mutual_information, scene.disagreement),
    )
    return max(float(np.abs(theirs.numpy() - ours).max()) for theirs, ours in pairs)
