"""Comparison of a JAX port with its PyTorch model at every step, with dropout on.

Both sides start from the same parameters and receive the same batches; their keys derive from the
same root, so that they draw the same masks. After each step the masks, the running statistics, the
loss, the gradients, the optimizer's state, the updates and the parameters are compared, in that
order: the first difference is the cause, and the later ones follow from it.

A user writes only the two losses, or the two train steps. Masks need no code: every dropout of
`regjax` and `regtorch` reports its draws to observers, under the name that `site_key` derived its
key with.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from parity_tests import causes, compare, replays, verdicts
from parity_tests.compare import FLOAT32, FLOAT64, Tier
from parity_tests.comparison import HELD, QUANTITIES, Comparison, Divergence
from parity_tests.frameworks import from_torch, to_torch
from parity_tests.pairing import Pair, gradients
from parity_tests.recording import (
    Difference,
    Drawn,
    Recorder,
    count_mask_elements,
    mask_differences,
    value_deviations,
)
from parity_tests.replays import Replay
from parity_tests.sides import JaxSide, JaxStep, TorchSide, TorchStep
from parity_tests.verdicts import Noise
from regjax.interop import Leaf
from regshared.extras import needs

with needs("parity_tests", extra="torch", package="torch"):
    import torch

# A deviation that is below this share of its bound in float64 has vanished.
VANISHES = 1e-3

__all__ = [
    "Comparison",
    "Divergence",
    "JaxSide",
    "JaxStep",
    "Leaf",
    "Tier",
    "TorchSide",
    "TorchStep",
    "compare_forward",
    "compare_step",
    "compare_training",
    "tensors",
]


def compare_forward(in_jax: Any, in_torch: torch.Tensor, tier: Tier = FLOAT32) -> float:
    """Compare one output and return its deviation.

    Args:
        in_jax: JAX array.
        in_torch: Tensor of the same shape.
        tier: How closely they must agree.

    Raises:
        AssertionError: They differ in shape or dtype, or by more than the tier allows.
    """
    left, right = np.asarray(in_jax), from_torch(in_torch)
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        raise AssertionError(
            f"outputs differ in form: JAX {left.dtype}{list(left.shape)}, "
            f"PyTorch {right.dtype}{list(right.shape)}"
        )
    apart = compare.deviations({"": left}, {"": right}, tier)[""]
    if not apart <= (tier.tolerance or 0.0):
        raise AssertionError(f"outputs differ: deviation {apart:.3e} exceeds {tier.tolerance}")
    return apart


def compare_step(
    jax_side: JaxSide | JaxStep,
    torch_side: TorchSide | TorchStep,
    batch: Any,
    names: Mapping[str, str | Leaf] = MappingProxyType({}),
    **options: Any,
) -> Comparison:
    """Apply `compare_training` to a single batch."""
    return compare_training(jax_side, torch_side, [batch], names, **options)


def compare_training(
    jax_side: JaxSide | JaxStep,
    torch_side: TorchSide | TorchStep,
    batches: Iterable[Any],
    names: Mapping[str, str | Leaf] = MappingProxyType({}),
    *,
    tier: Tier = FLOAT32,
    tolerances: Mapping[str, float] = MappingProxyType({}),
    ignore_buffers: Sequence[str] = (),
    record: bool = True,
    start: int = 0,
    stop_at_first: bool = True,
    progress: Callable[[int], None] = lambda step: None,
) -> Comparison:
    """Train both sides from the same parameters on the same batches, and compare every step.

    A side is a loss with an optimizer (`JaxSide`, `TorchSide`) or a whole train step (`JaxStep`,
    `TorchStep`); each form can be compared with either. Gradients are compared if both sides are
    losses.

    The masks of `regjax` and `regtorch` are compared on their own, site by site, bitwise. The
    values that enter a site are compared too: a difference there is no failure, but if a loss
    differs it locates the first site affected.

    Deviations are relative to the size of a quantity:

    | quantity | deviation | relative to | bound |
    |---|---|---|---|
    | loss | largest | its absolute value, at least 1 | tolerance of the tier |
    | buffer | largest | largest element, at least 1 | the same |
    | parameter, average | largest | largest element, at least 1; for FLOAT64 of all arrays | same |
    | gradient, state | largest | largest element, at least 1 % of all arrays' | 100 times that |
    | update of a parameter | root mean square | the same of the update | 100 times that |

    With products in bfloat16 the gradients are coarse, but the optimizers compute in float32. If
    both sides are losses, their updates are therefore compared from the same gradients, those of
    PyTorch, in the tier FLOAT32: a small difference of learning rates or decays is still found.

    A parameter whose true gradient is zero, such as the key's bias in attention, has a gradient of
    rounding noise, which Adam turns into steps of full size and random sign. The comparison
    recognizes it if, at every step so far, the gradient on both sides was at most 64 eps of the
    largest root mean square of a parameter's gradient, and once differed by more than 1 % between
    the sides. It then gives no verdict on these elements, notes them, and widens the bound of
    buffers by their largest difference, because a bias before a batch norm shifts its running mean.
    A gradient that is small but real agrees better between the sides, and is not excused. A whole
    train step shows no gradient: the first moments of the optimizer replace it, or else the roots
    of the second; without either, as for SGD without momentum, nothing is excused.

    Args:
        jax_side: The port.
        torch_side: The original, from whose parameters and buffers both start.
        batches: NumPy arrays, or trees of them, one batch per step; both sides receive them
            unchanged.
        names: As for `regjax.interop.params_from_torch`: from modules of the JAX side to modules of
            PyTorch, or from paths, such as `"dense/kernel"`, to names or to `Leaf`s. Identical
            names need no entry. If it has every parameter, a name without a `Leaf` has its axes in
            the same order.
        tier: How closely the sides must agree; its dtype is that of the parameters.
        tolerances: Bounds that replace the tier's for `"loss"`, `"buffer"`, `"gradient"`,
            `"state"`, `"update"`, `"parameter"` or `"average"`, such as
            `{"loss": 1e-4, "gradient": math.inf}`.
        ignore_buffers: Globs of buffers of PyTorch, such as `"*.running_var"`, that are not
            compared and need no counterpart. Buffers that only count (`num_batches_tracked`), and
            those outside `state_dict()`, never need one.
        record: Whether to record masks and the values they apply to; long runs are faster without.
        start: The number of the first step, which both sides receive and keys are derived from.
        stop_at_first: Whether to stop at the first divergence.
        progress: Called with the number of each completed step.

    Returns:
        The comparison; `raise_if_different()` raises an error if the sides diverge.

    Raises:
        ValueError: A parameter of either side, or a buffer, has no counterpart, another shape or
            another dtype; there are no batches; a tolerance is for something else, negative or NaN;
            or the parameters of a state are not recognized.

    Example:
        >>> import numpy as np, optax, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> original = TorchSide(
        ...     model,
        ...     lambda model, batch, step: (model(torch.from_numpy(batch)) ** 2).mean(),
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ... )
        >>> port = JaxSide(
        ...     {"kernel": jax.numpy.zeros((3, 2)), "bias": jax.numpy.zeros(2)},
        ...     lambda p, batch, step: ((batch @ p["kernel"] + p["bias"][None]) ** 2).mean(),
        ...     optax.sgd(0.102),
        ... )
        >>> found = compare_training(port, original, [np.ones((4, 3), "float32")])
        >>> found.first.step, found.first.quantity
        (1, 'update')
    """
    pair = Pair(jax_side, torch_side, names, ignore_buffers, tier)
    tiers = dict.fromkeys(HELD, tier) | ({"update": FLOAT32} if pair.same_gradients else {})
    bounds = _bounds(tiers, tolerances)
    held, noise = bounds, Noise(tier.eps)
    recorder, losses, first = Recorder(torch_side.model, torch_side.generator), [], None
    deviations: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    sites, elements, notes = collections.Counter(), np.zeros(2, int), {}
    with recorder.watching() if record else contextlib.nullcontext():
        for step, batch in enumerate(batches, start=start + 1):
            pairs = pair.advance(batch, step - 1)
            losses.append(tuple(float(side["loss"]) for side in pairs["loss"]))
            draws = _Draws.taken(recorder, pair)
            sites.update(draws.sites)
            elements += draws.elements
            notes.update(dict.fromkeys(draws.notes if record else []))
            held = {**bounds, "buffer": bounds["buffer"] + noise.drift}
            noise.update(*gradients(pairs))
            noise.follow(*pairs["parameter"])
            apart = {
                quantity: verdicts.deviations(
                    quantity, *sides, tiers[quantity], held[quantity], noise, pairs["parameter"][1]
                )
                for quantity, sides in pairs.items()
            }
            found = draws.compare(tier, deviations) | _exceeding(pairs, apart, held, pair, noise)
            for quantity, values in apart.items():
                deviations[quantity] += [max(values.values())] if values else []
            if first is None and (first := _first(step, found, draws)):
                repeat = functools.partial(pair.in_float64, batch, step - 1)
                details = first.detail, _in_float64(first, tier, bounds, repeat)
                first = dataclasses.replace(first, detail="; ".join(filter(None, details)))
                recorder.taken()  # the draws of the repetition
            progress(step - start)
            if first and stop_at_first:
                break
    if not losses:
        raise ValueError("batches must have at least one batch; got none. Pass one per step.")
    if recorder.without_mask:
        notes[
            f"Masks were not compared at {', '.join(recorder.without_mask)}: PyTorch draws numbers "
            "there, from which the model makes its own mask."
        ] = None
    notes.update(dict.fromkeys([*pair.notes, *filter(None, [noise.note])]))
    return Comparison(
        tier,
        deviations,
        losses,
        first,
        dict(sites),
        tuple(notes),
        start,
        held,
        *elements.tolist(),
    )


def _exceeding(
    pairs: Mapping[str, Any],
    apart: Mapping[str, Mapping[str, float]],
    bounds: Mapping[str, float],
    pair: Pair,
    noise: Noise,
) -> dict[str, Difference]:
    """Return for each quantity beyond its bound the tensor with the largest deviation."""
    found = {}
    for quantity, values in apart.items():
        bound = bounds[quantity]
        if beyond := [name for name, value in values.items() if not value <= bound]:
            name = compare.furthest(values)
            here, there = pairs[quantity]
            here = {each: array for each, array in here.items() if not noise.covers(each)}
            extent = causes.describe(quantity, name, here, there, beyond, bound)
            details = pair.place(name), extent, pair.hint(quantity, name)
            detail = "; ".join(filter(None, details))
            found[quantity] = Difference(name, values[name], detail)
    return found


def _bounds(tiers: Mapping[str, Tier], tolerances: Mapping[str, float]) -> dict[str, float]:
    for quantity, bound in tolerances.items():
        if quantity not in HELD:
            raise ValueError(
                f"tolerances must have keys among {', '.join(HELD)}; got '{quantity}'. Remove it."
            )
        if not bound >= 0:
            raise ValueError(
                f"tolerances['{quantity}'] must be at least 0; got {bound}. Pass a bound."
            )
    return {q: tolerances.get(q, verdicts.bound_of(q, tiers[q])) for q in HELD}


@dataclasses.dataclass(frozen=True)
class _Draws:
    """The draws of both sides in one step."""

    in_jax: Sequence[Drawn]
    in_torch: Sequence[Drawn]
    replay: Replay | None = None

    @classmethod
    def taken(cls, recorder: Recorder, pair: Pair) -> _Draws:
        """Return the draws since the last call, and the states of PyTorch's generator."""
        in_jax, in_torch = recorder.taken()
        end_in_jax, end = pair.generators
        if pair.start is None or end is None:
            return cls(in_jax, in_torch)
        replay = replays.replay(in_jax, in_torch, recorder.draws, pair.start, (end_in_jax, end))
        return cls(replay.in_jax, in_torch, replay)

    @property
    def on_both_sides(self) -> bool:
        """Whether masks are compared: both sides must draw some, unless from PyTorch's stream."""
        return bool(self.in_jax or self.in_torch if self.replay else self.in_jax and self.in_torch)

    @property
    def sites(self) -> list[str]:
        return [drawn.site for drawn in self.in_torch] if self.on_both_sides else []

    @property
    def elements(self) -> tuple[int, int]:
        """The number of elements of masks, and of those that differ."""
        return count_mask_elements(self.in_jax, self.in_torch) if self.on_both_sides else (0, 0)

    @property
    def notes(self) -> list[str]:
        """Return a note if only one side drew masks: dropout of another library is not observed."""
        if self.replay:
            if self.replay.ends[0] is None:
                return [
                    "PyTorch's generator was not compared: JAX has not exactly one in its state."
                ]
            return []
        sides = {"JAX": ("regjax", self.in_jax), "PyTorch": ("regtorch", self.in_torch)}
        seen = [f"{len(draws)} in {side}" for side, (_, draws) in sides.items() if draws]
        blind = [f"{library} in {side}" for side, (library, draws) in sides.items() if not draws]
        if len(blind) != 1:
            return []
        return [f"Masks were not compared: {seen[0]}, and no dropout of {blind[0]}."]

    def compare(self, tier: Tier, deviations: dict[str, list[float]]) -> dict[str, Difference]:
        """Return the differences by quantity, and append the deviations of this step."""
        found = self._compare_masks(tier, deviations) if self.on_both_sides else {}
        if self.replay and self.replay.ends[0] is not None:
            ends = self.replay.end_difference()
            deviations["generator"].append(float(ends is not None))
            found |= {"generator": ends} if ends else {}
        return found

    def _compare_masks(
        self, tier: Tier, deviations: dict[str, list[float]]
    ) -> dict[str, Difference]:
        if self.replay:
            masks = [each for each in [self.replay.difference()] if each]
        else:
            masks = mask_differences(self.in_jax, self.in_torch)
        # In norm, since activations have no fixed scale.
        values = value_deviations(
            self.in_jax, self.in_torch, dataclasses.replace(tier, in_norm=True)
        )
        deviations["mask"].append(float(bool(masks)))
        deviations["activation"].append(max(values.values(), default=0.0))
        found = {"mask": masks[0]} if masks else {}
        for site, apart in values.items():
            if not apart <= (tier.tolerance or 0.0):
                detail = "masks agree, and this is the first site that other values enter"
                found["activation"] = Difference(site, apart, detail)
                break
        return found


def _first(step: int, found: Mapping[str, Difference], draws: _Draws) -> Divergence | None:
    """Return the cause: the first of the quantities that differ.

    A difference in the values that enter a site counts only if a loss differs, which it locates.
    """
    differ = [q for q in QUANTITIES if q in found and (q != "activation" or "loss" in found)]
    if not differ:
        return None
    cause = found[differ[0]]
    detail = cause.detail
    if differ[0] == "loss" and draws.on_both_sides:
        last = draws.in_torch[-1].site
        agree = f"masks agree, and so do the values that enter them up to the last, '{last}'"
        detail = f"{detail}; {agree}"
    return Divergence(step, differ[0], cause.site, cause.deviation, detail)


def _in_float64(
    first: Divergence, tier: Tier, bounds: Mapping[str, float], repeat: Callable[[], Any]
) -> str:
    """Repeat a step that diverges in float32 in float64, and return the result, in words.

    A defect has the same size there, and rounding vanishes, also at a discontinuity such as ReLU's.
    """
    rounds = tier.dtype == "float32" and tier.tolerance and not tier.compute
    if not rounds or first.quantity not in ("activation", "loss", "gradient"):
        return ""
    try:
        pairs = repeat()
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        return f"the step was not repeated in float64: {type(error).__name__}: {reason}"
    if pairs and (narrow := {str(x["loss"].dtype) for x in pairs["loss"]} - {"float64"}):
        return f"the step was not repeated in float64: a loss casts to {', '.join(narrow)}"
    if pairs is None:
        return "compare the losses alone, to separate rounding from a defect"
    apart, noise = {}, Noise(FLOAT64.eps)
    for quantity, (here, there) in pairs.items():
        bound = bounds[quantity]
        values = verdicts.deviations(quantity, here, there, FLOAT64, bound, noise)
        apart[quantity] = values[compare.furthest(values)]
    sizes = ", ".join(f"{quantity} {value:.0e}" for quantity, value in apart.items())
    if all(value <= VANISHES * bounds[quantity] for quantity, value in apart.items()):
        return (
            f"from the same parameters the sides agree in float64 ({sizes}), so this is rounding "
            "in float32, such as of a ReLU's input near zero"
        )
    return (
        f"from the same parameters the sides differ in float64 too ({sizes}), so this is more than "
        "rounding, unless a loss casts to float32"
    )


def tensors(batch: Any) -> Any:
    """Convert the arrays of a batch to tensors, for the loss of the PyTorch side."""
    return jax.tree.map(to_torch, batch)
