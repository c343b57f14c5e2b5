"""The correspondence of the arrays of both sides, and their values after each step."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parity_tests import referee
from parity_tests.seeded import check_generator
from parity_tests.sides import (
    JaxLossRun,
    JaxSide,
    JaxStep,
    JaxStepRun,
    TorchRun,
    TorchSide,
    TorchStep,
    copied,
    named_buffers,
)
from regjax.interop import Leaf, leaves_from_torch
from regjax.interop._leaves import (
    as_leaves,
    check_names,
    named_tensors,
    path_problems,
    report,
    tensor_problems,
    unwrapped,
)
from regjax.interop._registry import find_record
from regshared.checks import check_items
from regtorch.keyed.calls import site_of

if TYPE_CHECKING:
    import torch

    from parity_tests.compare import Tier

    Arrays = Mapping[str, np.ndarray]
    Both = tuple[Arrays, Arrays]

# The states used in place of gradients in a whole train step, the best ones last.
_MOMENTS = ("sum", "square_avg", "exp_avg_sq", "grad_avg", "momentum_buffer", "exp_avg")
_SQUARES = ("sum", "square_avg", "exp_avg_sq")


class Pair:
    """Both sides, at the same parameters, and the correspondence of their arrays.

    Attributes:
        notes: The quantities that are not compared, with reasons.
        same_gradients: Whether the updates that are compared come from the same gradients, those of
            PyTorch: both optimizers compute in float32, while products are rounded to bfloat16.
        generators: The bytes of the states of PyTorch's generator after the last step, in JAX and
            in PyTorch; None if a side has none.
    """

    def __init__(
        self,
        jax_side: JaxSide | JaxStep,
        torch_side: TorchSide | TorchStep,
        names: Mapping[str, str | Leaf],
        ignore_buffers: Sequence[str],
        tier: Tier,
    ) -> None:
        is_step = isinstance(jax_side, JaxStep)
        has_losses = not is_step and isinstance(torch_side, TorchSide)
        self.same_gradients = has_losses and tier.compute is not None
        self._jax = JaxStepRun(jax_side) if is_step else JaxLossRun(jax_side)
        self._torch = TorchRun(torch_side)
        _check_generators(jax_side, torch_side)
        model, averages = torch_side.model, self._torch.averages
        tensors, buffers = named_tensors(model), named_buffers(model)
        leaves = _expand(names, self._jax.params, self._jax.buffers, model)
        self._leaves = {p: leaf for p, leaf in leaves.items() if p not in self._jax.buffers}
        self._buffers = {p: leaf for p, leaf in leaves.items() if p in self._jax.buffers}
        _check_names(self._jax.params, tensors, self._leaves)
        left_out = _left_out_buffers(model, self._buffers, ignore_buffers)
        _check_averages(self._jax.averages, averages, self._leaves)
        moved = _moved(self._jax.params, tensors, self._leaves)
        self._previous = (moved, moved)
        self.generators: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        self._sides, self._statistics = (jax_side, torch_side), dict(self._buffers)
        self._before = self._after = {n: copied(x) for n, x in {**tensors, **buffers}.items()}
        if averages is not None:
            averages = _moved(self._jax.averages or {}, named_tensors(averages), self._leaves)
        self._jax.start(moved, _moved(self._jax.buffers, buffers, self._buffers), averages)
        self._buffers = {p: leaf for p, leaf in self._buffers.items() if leaf.name not in left_out}
        self.notes = [f"Buffers were not compared: {', '.join(left_out)}."] if left_out else []
        if not has_losses:
            self.notes.append("Gradients were not compared: a whole train step does not show them.")

    def advance(self, batch: Any, step: int) -> dict[str, Both]:
        """Train a step; return for each quantity the arrays of JAX and PyTorch by path in JAX."""
        here, there = self._jax.advance(batch, step), self._torch.advance(batch, step)
        self.generators = here.generator, there.generator
        self._before, self._after = self._after, {**there.params, **there.buffers}
        params = here.params, _laid_out(there.params, self._leaves)
        found = {
            "loss": ({"loss": here.loss}, {"loss": there.loss}),
            "buffer": (
                {path: here.buffers[path] for path in self._buffers},
                _laid_out(there.buffers, self._buffers),
            ),
            "state": self._states(here.state),
            "update": tuple(map(_differences, params, self._previous)),
            "parameter": params,
        }
        if here.gradient is not None and there.gradient is not None:
            found["gradient"] = (here.gradient, _laid_out(there.gradient, self._leaves))
            if self.same_gradients and isinstance(self._jax, JaxLossRun):
                old = self._previous[1]
                new = self._jax.optimize(found["gradient"][1], old)
                found["update"] = _differences(new, old), found["update"][1]
        if here.averages is not None and there.averages is not None:
            found["average"] = (here.averages, _laid_out(there.averages, self._leaves))
        self._previous = params
        self._note_missing_state(found["state"][0])
        return found

    def in_float64(self, batch: Any, step: int) -> dict[str, Both] | None:
        """Return loss and gradients of the last step in float64, on both sides from PyTorch's.

        None for a whole train step. Raises whatever a loss raises that does not take float64.
        """
        jax_side, torch_side = self._sides
        if isinstance(jax_side, JaxStep) or isinstance(torch_side, TorchStep):
            return None
        params = _laid_out(self._before, self._leaves)
        statistics = _laid_out(self._before, self._statistics)
        g, start = getattr(self._jax, "last_generator", None), self._torch.start
        loss, gradient = referee.jax_gradient(jax_side, params, statistics, g, batch, step)
        loss_there, there = referee.torch_gradient(torch_side, self._before, start, batch, step)
        return {
            "loss": (loss, loss_there),
            "gradient": (gradient, _laid_out(there, self._leaves)),
        }

    @property
    def start(self) -> np.ndarray | None:
        """The bytes of the state of PyTorch's generator before the last step."""
        return self._torch.start

    def place(self, name: str) -> str:
        """Return the name and the module in PyTorch of an array; an empty string for a loss."""
        path = name.rpartition(" of ")[2]
        leaf = {**self._leaves, **self._buffers}.get(path)
        if leaf is None:
            return ""
        modules, owner = dict(unwrapped(self._torch.model).named_modules()), leaf.name
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        return f"in PyTorch '{leaf.name}' of {type(modules[owner]).__name__}"

    def hint(self, quantity: str, path: str) -> str:
        """Return a frequent cause of a difference; an empty string if none is known."""
        if quantity == "buffer" and self._buffers[path].name.endswith("running_var"):
            return (
                "the running variance of PyTorch is unbiased, that of Flax and Equinox is not: "
                "correct it by n / (n - 1), or pass ignore_buffers=['*.running_var']"
            )
        return ""

    def _states(self, state: Mapping[str, Any]) -> Both:
        """Return the moments and momenta that both sides keep, by parameter."""
        optimizer, tensors = self._torch.optimizer, named_tensors(self._torch.model)
        record = find_record(optimizer)
        kept_as = record.entries if record else {}
        in_jax, in_torch = {}, {}
        for place, array in state.items():
            keys = place.removesuffix("/value").split("/")  # of a variable of NNX
            for end, kind in enumerate(keys, 1):
                leaf = self._leaves.get(path := "/".join(keys[end:]))
                if optimizer is None or kind not in kept_as or leaf is None:
                    continue
                kept = optimizer.state.get(tensors[leaf.name], {}).get(kept_as[kind])
                if kept is None:
                    continue
                moved = leaf.to_jax(copied(kept))
                # Skip shapes that differ: Adafactor's rows are columns if JAX transposes a matrix.
                if np.shape(array) == moved.shape:
                    name = f"{kept_as[kind]} of {path}"
                    in_jax[name], in_torch[name] = np.array(array), moved
        return in_jax, in_torch

    def _note_missing_state(self, found: Arrays) -> None:
        optimizer = self._torch.optimizer
        why = ""
        if optimizer is None:
            why = "TorchStep has no optimizer"
        elif not found and any(
            getattr(kept, "ndim", 0)
            for state in optimizer.state.values()
            for kept in state.values()
        ):
            why = f"the state in JAX has no arrays like those of {type(optimizer).__name__}"
        note = f"The optimizer's state was not compared: {why}."
        if why and note not in self.notes:
            self.notes.append(note)


def _check_generators(jax_side: JaxSide | JaxStep, torch_side: TorchSide | TorchStep) -> None:
    """Raise if one side draws from PyTorch's generator and the other from keys."""
    if torch_side.generator is None:
        if isinstance(jax_side, JaxSide) and jax_side.generator is not None:
            raise ValueError(
                "generator must be given on both sides; got it in JAX only. Pass "
                "generator=torch.default_generator to the PyTorch side."
            )
        return
    check_generator(torch_side.generator)
    if any(site_of(module) is not None for module in torch_side.model.modules()):
        raise ValueError(
            "generator must be None for a model that draws from keys; got one with a model of "
            "regtorch.keyed.convert. Call regtorch.keyed.revert(model), or remove generator=."
        )


def gradients(pairs: Mapping[str, Both]) -> Both:
    """Return the gradients of both sides, or the moments of the optimizer in their place."""
    if "gradient" in pairs:
        return pairs["gradient"]
    found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    for kind in _MOMENTS:
        for arrays, states in zip(found, pairs["state"], strict=True):
            for name, array in states.items():
                of, _, path = name.partition(" of ")
                if of == kind:
                    arrays[path] = np.sqrt(np.abs(array)) if kind in _SQUARES else array
    return found


def _laid_out(arrays: Arrays, leaves: Mapping[str, Leaf]) -> Arrays:
    return {path: leaf.to_jax(arrays[leaf.name]) for path, leaf in leaves.items()}


def _differences(after: Arrays, before: Arrays) -> Arrays:
    return {p: array.astype(np.float64) - before[p] for p, array in after.items()}


def _expand(
    names: Mapping[str, str | Leaf],
    params: Mapping[str, Any],
    statistics: Mapping[str, Any],
    model: torch.nn.Module,
) -> dict[str, Leaf]:
    """Return the `Leaf` of each parameter and statistic."""
    check_names(names)
    if params.keys() <= names.keys():
        names = as_leaves(names)
        if statistics.keys() <= names.keys():
            return dict(names)
    return leaves_from_torch(model, {**params, **statistics}, names)


def _left_out_buffers(
    model: torch.nn.Module, leaves: Mapping[str, Leaf], ignored: Sequence[str]
) -> list[str]:
    """Return the buffers of PyTorch that are not compared; one without a reason is an error."""
    buffers, modules = named_buffers(model), dict(unwrapped(model).named_modules())
    check_items("ignore_buffers", ignored, Collection, 'a list of globs, as in ["*.running_var"]')
    for glob in ignored:
        if not fnmatch.filter(buffers, glob):
            raise ValueError(
                f"ignore_buffers must match buffers of the model; got '{glob}', which matches none "
                f"of {', '.join(buffers) or 'no buffers'}. Remove it."
            )
    taken = {id(buffers[leaf.name]) for leaf in leaves.values()}
    stored = named_buffers(model, stored=True)
    left_out, missing = [], []
    for name, buffer in buffers.items():
        is_ignored = any(fnmatch.fnmatchcase(name, glob) for glob in ignored)
        counts = name.endswith("num_batches_tracked")
        if is_ignored or (id(buffer) not in taken and not counts and name not in stored):
            left_out.append(name)
        elif id(buffer) not in taken and not counts:
            owner = name.rpartition(".")[0]
            kind = type(modules[owner]).__name__ if owner in modules else "a module"
            missing.append(f"'{name}' of {kind} '{owner}'")
    if missing:
        raise ValueError(
            f"buffers of PyTorch must have counterparts in JAX; got none for {', '.join(missing)}. "
            "Pass statistics= to the JAX side, or leave them out with ignore_buffers=."
        )
    return left_out


def _check_averages(
    in_jax: Mapping[str, Any] | None,
    in_torch: torch.nn.Module | None,
    leaves: Mapping[str, Leaf],
) -> None:
    if (in_jax is None) != (in_torch is None):
        side = "PyTorch" if in_jax is None else "JAX"
        raise ValueError(
            f"averages must be given on both sides; got them in {side} only. Pass averages= to "
            "JaxStep and TorchStep."
        )
    if in_jax is not None and in_torch is not None:
        _check_names(in_jax, named_tensors(in_torch), leaves)


def _moved(
    in_jax: Mapping[str, Any], tensors: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Return the tensors by path in JAX, after a check of their form."""
    moved = {}
    for path, leaf in in_jax.items():
        array = leaves[path].to_jax(copied(tensors[leaves[path].name]))
        wanted = (np.dtype(leaf.dtype), leaf.shape)
        if (array.dtype, array.shape) != wanted:
            raise ValueError(
                f"params at '{path}' must be {array.dtype}{list(array.shape)}, as "
                f"'{leaves[path].name}' of PyTorch; got {wanted[0]}{list(wanted[1])}. Pass "
                "Leaf(name, transpose) if its axes have another order."
            )
        moved[path] = array
    return moved


def _check_names(
    in_jax: Mapping[str, Any], in_torch: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> None:
    # Tied tensors need one leaf: they are reported under the first of their names.
    first = {id(tensor): name for name, tensor in reversed([*in_torch.items()])}
    required = {name: in_torch[name] for name in first.values()}
    found = tensor_problems(leaves, in_torch, required, "that do not exist")
    report({**path_problems(leaves, in_jax), **found})
