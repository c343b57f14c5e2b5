"""Comparison of a JAX port with its PyTorch model at every step, with dropout on.

Both sides start from the same parameters and receive the same batches; their keys derive from the
same root, so that they draw the same masks. After each step the masks, the loss, the gradients, the
parameters and the optimizer's state are compared, in that order: the first difference is the cause,
and the later ones follow from it.

A user writes only the two losses. Masks need no code: every dropout of `regjax` and `regtorch`
reports its draws to observers, under the name that `site_key` derived its key with.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from parity_tests import compare
from parity_tests.compare import FLOAT32, Tier
from parity_tests.comparison import QUANTITIES, Comparison, Divergence
from parity_tests.frameworks import from_torch, to_torch
from parity_tests.recording import (
    Difference,
    Drawn,
    Recorder,
    mask_differences,
    value_deviations,
)
from regjax._decay.paths import named_leaves
from regjax.interop import Leaf
from regjax.interop._leaves import as_leaves, missing_sections, named_tensors, overlap, report
from regjax.optim._records import RECORDS
from regshared.extras import needs

with needs("parity_tests", extra="torch", package="torch"):
    import torch

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = [
    "Comparison",
    "Divergence",
    "JaxSide",
    "Leaf",
    "Tier",
    "TorchSide",
    "compare_forward",
    "compare_step",
    "compare_training",
    "tensors",
]


@dataclasses.dataclass(frozen=True)
class JaxSide:
    """The port.

    Attributes:
        params: A tree of parameters; replaced by those of the PyTorch model before the first step.
        loss: `loss(params, batch, step)`, a scalar. The harness jits it, with `step` traced.
        optimizer: An optax transformation.
        state: The optimizer's initial state, as from `regjax.interop.state_from_torch`; None starts
            at the optimizer's first step.
    """

    params: PyTree
    loss: Callable[[Any, Any, Any], jax.Array]
    optimizer: optax.GradientTransformation
    state: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class TorchSide:
    """The original.

    Attributes:
        model: A module; it is trained in place.
        loss: `loss(model, batch, step)`, a scalar tensor.
        optimizer: A `torch.optim` optimizer over the model's parameters.
        scheduler: A learning-rate scheduler, which steps after the optimizer.
    """

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, Any, int], torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


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
    jax_side: JaxSide,
    torch_side: TorchSide,
    batch: Any,
    names: Mapping[str, str | Leaf],
    **options: Any,
) -> Comparison:
    """Apply `compare_training` to a single batch."""
    return compare_training(jax_side, torch_side, [batch], names, **options)


def compare_training(
    jax_side: JaxSide,
    torch_side: TorchSide,
    batches: Iterable[Any],
    names: Mapping[str, str | Leaf],
    *,
    tier: Tier = FLOAT32,
    tolerances: Mapping[str, float] = MappingProxyType({}),
    record: bool = True,
    start: int = 0,
    stop_at_first: bool = True,
    progress: Callable[[int], None] = lambda step: None,
) -> Comparison:
    """Train both sides from the same parameters on the same batches, and compare every step.

    The masks of `regjax` and `regtorch` are compared on their own, site by site, bitwise. The
    values that enter a site are compared too: a difference there is no failure, but if a loss
    differs it locates the first site affected.

    Args:
        jax_side: The port.
        torch_side: The original, from whose parameters both start.
        batches: NumPy arrays, or trees of them, one batch per step; both losses receive them
            unchanged.
        names: From each JAX parameter's path, such as `"dense/kernel"`, to its name in PyTorch, or
            to a `Leaf` if its axes have another order.
        tier: How closely the sides must agree; its dtype is that of the parameters.
        tolerances: Bounds that replace the tier's for `"loss"`, `"gradient"`, `"parameter"` or
            `"state"`, such as `{"loss": 1e-4, "gradient": math.inf}`.
        record: Whether to record masks and the values they apply to; long runs are faster without.
        start: The number of the first step, which losses receive and keys are derived from.
        stop_at_first: Whether to stop at the first divergence.
        progress: Called with the number of each completed step.

    Returns:
        The comparison; `raise_if_different()` raises an error if the sides diverge.

    Raises:
        ValueError: A parameter of either side has no counterpart, another shape or another dtype;
            there are no batches; or a tolerance is for something else, negative or NaN.
    """
    bounds = _bounds(tier, tolerances)
    leaves = as_leaves(names)
    recorder, losses, first = Recorder(), [], None
    deviations: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    sites, notes = collections.Counter(), {}
    with recorder.watching() if record else contextlib.nullcontext():
        for step, pairs in enumerate(
            _steps(jax_side, torch_side, batches, leaves, start), start=start + 1
        ):
            losses.append(tuple(float(side["loss"]) for side in pairs["loss"]))
            draws = _Draws(*recorder.taken())
            sites.update(draws.sites)
            notes.update(dict.fromkeys(draws.notes))
            apart = {q: compare.deviations(*pair, tier) for q, pair in pairs.items()}
            found = draws.compare(tier, deviations) | _exceeding(apart, bounds)
            for quantity, values in apart.items():
                deviations[quantity].append(max(values.values(), default=0.0))
            first = first or _first(step, found, draws)
            progress(step - start)
            if first and stop_at_first:
                break
    if not losses:
        raise ValueError("batches must have at least one batch; got none. Pass one per step.")
    return Comparison(tier, deviations, losses, first, dict(sites), tuple(notes), start)


def _steps(
    jax_side: JaxSide,
    torch_side: TorchSide,
    batches: Iterable[Any],
    leaves: Mapping[str, Leaf],
    start: int,
) -> Iterator[dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]]:
    """Train both sides; yield for each step and quantity the arrays of JAX and PyTorch by name."""
    model, optimizer = torch_side.model, torch_side.optimizer
    params = _moved(jax_side.params, model, leaves)
    state = jax_side.optimizer.init(params) if jax_side.state is None else jax_side.state
    gradient = jax.jit(jax.value_and_grad(jax_side.loss))
    update = jax.jit(jax_side.optimizer.update)
    for step, batch in enumerate(batches, start):
        jax_loss, jax_gradient = gradient(params, batch, step)
        updates, state = update(jax_gradient, state, params)
        params = optax.apply_updates(params, updates)
        optimizer.zero_grad()
        torch_loss = torch_side.loss(model, batch, step)
        torch_loss.backward()
        torch_gradient = _torch_arrays(model, leaves, lambda p: p.grad)
        optimizer.step()
        if torch_side.scheduler is not None:
            torch_side.scheduler.step()
        yield {
            "loss": ({"loss": np.asarray(jax_loss)}, {"loss": from_torch(torch_loss)}),
            "gradient": (_jax_arrays(jax_gradient), torch_gradient),
            "parameter": (_jax_arrays(params), _torch_arrays(model, leaves)),
            "state": _states(state, torch_side, leaves),
        }


def _exceeding(
    apart: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]
) -> dict[str, Difference]:
    """Return for each quantity beyond its bound the tensor with the largest deviation."""
    found = {}
    for quantity, values in apart.items():
        if values:
            name = compare.furthest(values)
            if not values[name] <= bounds[quantity]:
                found[quantity] = Difference(name, values[name], "")
    return found


def _bounds(tier: Tier, tolerances: Mapping[str, float]) -> dict[str, float]:
    held = QUANTITIES[QUANTITIES.index("loss") :]
    for quantity, bound in tolerances.items():
        if quantity not in held:
            raise ValueError(
                f"tolerances must have keys among {', '.join(held)}; got '{quantity}'. Remove it."
            )
        if not bound >= 0:
            raise ValueError(
                f"tolerances['{quantity}'] must be at least 0; got {bound}. Pass a bound."
            )
    return {quantity: tolerances.get(quantity, tier.tolerance or 0.0) for quantity in held}


@dataclasses.dataclass(frozen=True)
class _Draws:
    """The draws of both sides in one step."""

    in_jax: Sequence[Drawn]
    in_torch: Sequence[Drawn]

    @property
    def on_both_sides(self) -> bool:
        return bool(self.in_jax and self.in_torch)

    @property
    def sites(self) -> list[str]:
        return [drawn.site for drawn in self.in_torch] if self.on_both_sides else []

    @property
    def notes(self) -> list[str]:
        """Return a note if only one side drew masks: dropout of another library is not observed."""
        sides = {"JAX": ("regjax", self.in_jax), "PyTorch": ("regtorch", self.in_torch)}
        seen = [f"{len(draws)} in {side}" for side, (_, draws) in sides.items() if draws]
        blind = [f"{library} in {side}" for side, (library, draws) in sides.items() if not draws]
        if len(blind) != 1:
            return []
        return [f"Masks were not compared: {seen[0]}, and no dropout of {blind[0]}."]

    def compare(self, tier: Tier, deviations: dict[str, list[float]]) -> dict[str, Difference]:
        """Return the differences by quantity, and append the deviations of this step."""
        if not self.on_both_sides:
            return {}
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
        detail = f"masks agree, and so do the values that enter them up to the last, '{last}'"
    return Divergence(step, differ[0], cause.site, cause.deviation, detail)


def _moved(params: PyTree, model: torch.nn.Module, leaves: Mapping[str, Leaf]) -> PyTree:
    """Return the tree of `params` with the values of the model."""
    tensors, in_jax = named_tensors(model), dict(named_leaves(params))
    _check_names(in_jax, tensors, leaves)
    moved = []
    for path, leaf in in_jax.items():
        array = leaves[path].to_jax(from_torch(tensors[leaves[path].name]))
        wanted = (np.dtype(leaf.dtype), leaf.shape)
        if (array.dtype, array.shape) != wanted:
            raise ValueError(
                f"params at '{path}' must be {array.dtype}{list(array.shape)}, as "
                f"'{leaves[path].name}' of PyTorch; got {wanted[0]}{list(wanted[1])}. Pass "
                "Leaf(name, transpose) if its axes have another order."
            )
        moved.append(jax.numpy.array(array))
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def _check_names(
    in_jax: Mapping[str, Any], in_torch: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> None:
    of_tensor: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        of_tensor.setdefault(id(in_torch.get(leaf.name)), []).append(path)
    first = {id(tensor): name for name, tensor in reversed(list(in_torch.items()))}
    missing = {
        name + section
        for tensor, name in first.items()
        for section in missing_sections(
            [leaves[path] for path in of_tensor.get(tensor, ())], in_torch[name].shape
        )
    }
    report(
        {
            "JAX parameters without a name in PyTorch": set(in_jax) - set(leaves),
            "names of JAX parameters that do not exist": set(leaves) - set(in_jax),
            "PyTorch parameters that no JAX parameter is": missing,
            "names of PyTorch parameters that do not exist": {
                leaf.name for leaf in leaves.values() if leaf.name not in in_torch
            },
            "JAX parameters that are the same PyTorch parameter": {
                path
                for tensor, paths in of_tensor.items()
                if tensor in first and overlap([leaves[path] for path in paths])
                for path in paths
            },
        }
    )


def _jax_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}


def _torch_arrays(
    model: torch.nn.Module,
    leaves: Mapping[str, Leaf],
    get: Callable[[Any], torch.Tensor | None] = lambda p: p,
) -> dict[str, np.ndarray]:
    tensors = named_tensors(model)
    found = {}
    for path, leaf in leaves.items():
        tensor = get(tensors[leaf.name])
        # An unused parameter has no gradient in PyTorch, and a gradient of zeros in JAX.
        tensor = torch.zeros_like(tensors[leaf.name]) if tensor is None else tensor
        found[path] = leaf.to_jax(from_torch(tensor).copy())
    return found


def _states(
    state: PyTree, side: TorchSide, leaves: Mapping[str, Leaf]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the moments and momenta that both sides keep, by parameter."""
    tensors = named_tensors(side.model)
    record = RECORDS.get(type(side.optimizer).__name__)
    kept_as = record.torch_names if record else {}
    kinds = "|".join(kept_as)
    in_jax, in_torch = {}, {}
    for place, array in named_leaves(state) if kinds else ():
        for path, leaf in leaves.items():
            match = re.search(rf"(?:^|/)({kinds})/{re.escape(path)}$", place)
            if not match:
                continue
            kept = side.optimizer.state.get(tensors[leaf.name], {}).get(kept_as[match[1]])
            # Skip shapes that differ: Adafactor's rows are columns if JAX transposes a matrix.
            if kept is not None and np.shape(array) == leaf.to_jax(from_torch(kept)).shape:
                name = f"{kept_as[match[1]]} of {path}"
                in_jax[name], in_torch[name] = (
                    np.asarray(array),
                    leaf.to_jax(from_torch(kept).copy()),
                )
    return in_jax, in_torch


def tensors(batch: Any) -> Any:
    """Convert the arrays of a batch to tensors, for the loss of the PyTorch side."""
    return jax.tree.map(to_torch, batch)
