"""The settings of a run, its recipe and its plan. They need no JAX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 256  # a token is a byte
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
DTYPES = ("float32", "float64")


class RunError(Exception):
    """An error that ends the program with its message as the only line, and with exit code 1."""


class InputError(RunError):
    """An error in options or files that the user passed; the exit code is 2."""


@dataclass(frozen=True)
class Recipe:
    """The settings that determine every loss and parameter; a checkpoint belongs to one recipe.

    Attributes:
        width: The size of a token's vector.
        depth: The number of blocks.
        heads: The number of attention heads.
        context: The number of tokens of an example.
        dtype: The dtype of parameters and computation.
        batch: The number of examples of a step, over all devices and micro-batches.
        rate: The rate of each dropout.
        weight_decay: The weight decay of kernels; biases, norms and embeddings do not decay.
        learning_rate: The learning rate after the warm-up.
        warmup: The number of steps in which the learning rate rises from 0.
        seed: The seed of initial parameters, batches and dropout masks.
    """

    width: int = 128
    depth: int = 3
    heads: int = 4
    context: int = 64
    dtype: str = "float32"
    batch: int = 32
    rate: float = 0.1
    weight_decay: float = 0.1
    learning_rate: float = 1e-3
    warmup: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The settings that do not change the result, beyond the rounding of sums.

    Attributes:
        steps: The step at which the run ends.
        mesh: The number of devices along each axis; None for all devices along "data".
        micro_batches: The number of parts of a batch whose gradients are accumulated.
        evaluate_every: The number of steps between evaluations.
        save_every: The number of steps between checkpoints.
        keep: The number of checkpoints to keep.
        resume: Whether to continue from the last checkpoint.
        out: The folder of checkpoints, curve and results.
        masks: Whether to write digests of the dropout masks.
    """

    steps: int
    mesh: Mapping[str, int] | None
    micro_batches: int
    evaluate_every: int
    save_every: int
    keep: int
    resume: bool
    out: Path
    masks: bool = False


def parse_mesh(text: str) -> dict[str, int]:
    """Return the size of each axis.

    Args:
        text: `"2x4"` is data x fsdp and `"2x2x2"` data x fsdp x tensor; `"data=2,tensor=4"` names
            the axes. The others have size 1.

    Raises:
        ValueError: The text has another form, or an unknown axis.

    Example:
        >>> parse_mesh("2x4"), parse_mesh("tensor=4")
        ({'data': 2, 'fsdp': 4, 'tensor': 1}, {'data': 1, 'fsdp': 1, 'tensor': 4})
    """
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        pairs = list(zip(AXES, text.split("x"), strict=False))
    elif re.fullmatch(r"\w+=[1-9]\d*(,\w+=[1-9]\d*)*", text):
        pairs = [part.split("=") for part in text.split(",")]
    else:
        pairs = []
    sizes = dict(pairs)
    if unknown := sorted(sizes.keys() - set(AXES)):
        raise ValueError(f"must have axes of {', '.join(AXES)}; got {unknown[0]!r} in {text!r}")
    if not sizes or len(sizes) < len(pairs):
        raise ValueError(
            "must be sizes such as 2x4 (data x fsdp), 2x2x2 (data x fsdp x tensor) or "
            f"data=2,tensor=4; got {text!r}"
        )
    return {axis: int(sizes.get(axis, 1)) for axis in AXES}


def check_mesh(recipe: Recipe, mesh: Mapping[str, int], micro_batches: int, devices: int) -> None:
    """Check that a mesh has all devices, and that its axes divide what they shard.

    Raises:
        ValueError: It does not; the message names the sizes.
    """
    shape = "x".join(str(mesh[axis]) for axis in AXES)
    if (size := math.prod(mesh.values())) != devices:
        raise ValueError(
            f"must have {devices} devices, as many as there are; got {shape} = {size}. Pass "
            f"--devices {size} to simulate them on the CPU"
        )
    rows = mesh[DATA] * mesh[FSDP]
    if recipe.batch % (rows * micro_batches):
        raise ValueError(
            f"must divide the batch: data x fsdp x micro-batches = {mesh[DATA]} x {mesh[FSDP]} x "
            f"{micro_batches} = {rows * micro_batches}, and the batch has {recipe.batch} examples; "
            f"got {shape}"
        )
    for axis, name, whole in (
        (FSDP, "width", recipe.width),
        (TENSOR, "heads", recipe.heads),
        (TENSOR, "vocabulary", VOCABULARY),
    ):
        if whole % mesh[axis]:
            raise ValueError(
                f"must divide the {name} by its axis {axis}: {whole} by {mesh[axis]}; got {shape}"
            )
