"""The number of steps over which two implementations of an optimizer can agree.

A step that is divided by the size of the gradient has full size, however small the gradient is. The
sign of a vanishing gradient depends on rounding: in training on that of the model; and where
coupled decay is the whole gradient, as for pixels that are always zero, on that of the parameter,
even with recorded gradients. After such a step two implementations may diverge. On synthetic
gradients every case agrees for all steps.
"""

from __future__ import annotations

# By case and setting, about half the number of steps for which the bound was measured to hold. All
# other cases hold for 1,000 steps.
HORIZONS = {
    "rprop": {"float64 trained": 100},
    "rprop-etas": {"float64 trained": 15},
    "rprop-sizes": {"float64 trained": 300},
    "rprop-maximize": {"float64 trained": 200},
    "adam": {"float64 trained": 300},
    "adam-betas": {"float64 trained": 100},
    "adam-betas-zero": {"float64 trained": 150},
    "adam-decoupled": {"float64 trained": 350},
    "adamw": {"float64 trained": 300},
    "nadam": {"float64 trained": 250},
    "nadam-betas": {"float64 trained": 80},
    "nadam-betas-zero": {"float64 trained": 150},
    "radam-betas": {"float64 trained": 75},
    "adamax-betas-zero": {"float64 trained": 150},
    "adagrad": {"float64 trained": 4},
    "adagrad-decay": {"float64 trained": 30, "float32 recorded": 2},
    "adagrad-maximize": {"float64 trained": 30, "float32 recorded": 2},
    "adadelta-eps": {"float64 trained": 100},
    "rmsprop": {"float64 trained": 5},
    "rmsprop-decay": {"float64 recorded": 250, "float64 trained": 25, "float32 recorded": 1},
    "rmsprop-alpha": {"float64 recorded": 300, "float64 trained": 25, "float32 recorded": 6},
    "rmsprop-alpha-zero": {"float64 trained": 150},
    "rmsprop-momentum": {"float64 recorded": 200, "float64 trained": 7, "float32 recorded": 200},
    "rmsprop-centered": {"float64 recorded": 300, "float64 trained": 35, "float32 recorded": 60},
    "rmsprop-centered-momentum": {
        "float64 recorded": 40,
        "float64 trained": 40,
        "float32 recorded": 15,
    },
    "rmsprop-maximize": {"float64 recorded": 250, "float64 trained": 25, "float32 recorded": 1},
    "rmsprop-schedule": {"float64 trained": 4},
    "rmsprop-mask": {"float64 recorded": 150, "float64 trained": 50, "float32 recorded": 55},
    "adafactor-capped": {"float64 trained": 5},
    "adafactor-clip": {"float64 trained": 400},
    "adafactor-schedule": {"float64 trained": 5},
    "adafactor-mask": {"float32 recorded": 15},
    "muon": {"float64 trained": 1},
    "muon-no-decay": {"float64 trained": 1},
    "muon-decay": {"float64 recorded": 300, "float64 trained": 3, "float32 recorded": 50},
    "muon-plain": {"float64 trained": 2},
    "muon-no-momentum": {"float64 trained": 1},
    "muon-original": {"float64 trained": 1},
    "muon-match-rms": {"float64 trained": 1},
    "muon-cubic": {"float64 trained": 90},
    "muon-schedule": {"float64 trained": 2},
    "muon-mask": {"float64 recorded": 300, "float64 trained": 3, "float32 recorded": 50},
}


def horizon(case: str, setting: str, steps: int) -> int:
    """Return the number of first steps of a case that must satisfy its bound.

    Args:
        case: The name of the case.
        setting: Dtype and source of the gradients, such as `"float64 trained"`.
        steps: The number of steps of the run.

    Example:
        >>> horizon("sgd", "float64 trained", 1000), horizon("rprop", "float64 trained", 1000)
        (1000, 100)
    """
    return min(steps, HORIZONS.get(case, {}).get(setting, steps))
