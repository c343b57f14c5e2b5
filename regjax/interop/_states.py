"""Convert the state of `torch.optim` optimizers to optax and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, SequenceKey

from regjax._decay.paths import path_name
from regjax.interop._leaves import check_class, check_paths, read_recipe
from regjax.interop._schedules import (
    ScheduledMomentumState,
    check_scheduler_options,
    move_scheduler,
    schedule_from_torch,
)
from regshared.checks import check_integer, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import PyTree

    from regjax.interop._leaves import Located, Names, Part, Recipe


def state_from_torch(
    torch_optimizer: Any,
    names: Names,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    model: Any = None,
    scheduler: Any = None,
    steps: int | None = None,
    steps_per_epoch: int = 1,
) -> PyTree:
    """Convert the state of a PyTorch optimizer, to continue its run.

    | optimizer | optax state | PyTorch state |
    |---|---|---|
    | SGD | `trace` | `momentum_buffer`; none there is the same as zeros |
    | ASGD | `ax`, `eta` | the same |
    | Rprop | `prev`, `step_size` | the same |
    | Adam, AdamW, NAdam, RAdam | `mu`, `nu` | `exp_avg`, `exp_avg_sq` |
    | Adam, AdamW with amsgrad | `nu_max` | `max_exp_avg_sq` |
    | NAdam | `mu_product` | the same, once per parameter |
    | Adamax | `mu`, `nu` | `exp_avg`, `exp_inf` |
    | Adagrad | `sum_of_squares` | `sum` |
    | Adadelta | `e_g`, `e_x` | `square_avg`, `acc_delta` |
    | RMSprop | `nu` | `square_avg` |
    | RMSprop centered; with momentum | `mu`; `trace` | `grad_avg`; `momentum_buffer` |
    | Adafactor | `v_row`, `v_col`, `v` | `row_var`, `col_var`, `variance` |
    | Muon | `ema` | `momentum_buffer` |
    | all | `count` | `step`, once per parameter; of schedules: the scheduler's `last_epoch` |

    Args:
        torch_optimizer: The optimizer, after any number of steps; it is not modified.
        names: See `optimizer_from_torch`.
        params: The JAX parameters.
        optimizer: The result of `optimizer_from_torch` with the same arguments.
        model: See `optimizer_from_torch`.
        scheduler: See `optimizer_from_torch`.
        steps: See `optimizer_from_torch`.
        steps_per_epoch: See `optimizer_from_torch`. Where PyTorch counts no steps (SGD, Muon), the
            run must be at the end of an epoch.

    Returns:
        The state for `optimizer.update`, with the structure and dtypes of `optimizer.init(params)`.
        For a group that has not taken a step it is the initial state.

    Raises:
        TypeError: As in `optimizer_from_torch`; or `optimizer` is not an optax transformation.
        ValueError: As in `optimizer_from_torch`; `optimizer` was created with other arguments; a
            parameter lacks an entry that others of its group have, or has an unknown one; a tensor
            has another shape or dtype than the parameter in JAX; the parameters of a group were not
            all trained for the same number of steps; or that number does not match the scheduler.

    Note (PyTorch):
        A run that is split between PyTorch and JAX, in either order, passes through the same
        parameters as one in PyTorch alone, up to rounding.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from regjax.interop import Leaf, optimizer_from_torch
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> recipe = torch.optim.Adam(layer.named_parameters(), lr=0.1)
        >>> layer(torch.ones(3)).sum().backward()
        >>> _ = recipe.step()
        >>> names, params = {"kernel": Leaf("weight", (1, 0))}, {"kernel": jnp.ones((3, 2))}
        >>> optimizer = optimizer_from_torch(recipe, names)
        >>> state = state_from_torch(recipe, names, params, optimizer)
        >>> int(state["moments"].count), state["moments"].mu["kernel"].shape
        (1, (3, 2))
    """
    check_class("torch_optimizer", torch_optimizer, "torch.optim", MOMENTS)
    check_scheduler_options(scheduler, steps, steps_per_epoch)
    recipe = read_recipe(torch_optimizer, names, model)
    epoch = None
    if scheduler is not None:
        schedule_from_torch(scheduler, steps=steps)
        epoch = scheduler.last_epoch
    read = {
        part.label: _Read(part, torch_optimizer.state, epoch, steps_per_epoch)
        for part in recipe.parts
    }
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(f"optimizer must be an optax transformation; got {describe(optimizer)}.")
    check_paths(recipe.labels, params)
    template = optimizer.init(params)
    _check_made_for("optimizer", template, recipe)
    _check_scheduled(template, recipe, scheduler)

    def filled(path: tuple[Any, ...], old: Any) -> Any:
        label, place = _place(path, recipe)
        return read[label].value(place, old)

    return jax.tree.map_with_path(filled, template)


def state_to_torch(
    state: PyTree,
    torch_optimizer: Any,
    names: Names,
    *,
    model: Any = None,
    scheduler: Any = None,
    steps: int | None = None,
    steps_per_epoch: int = 1,
    step: int | None = None,
) -> None:
    """Write an optax state into a PyTorch optimizer; the inverse of `state_from_torch`.

    Nothing is changed until all checks have passed.

    Args:
        state: The state of the optimizer of `optimizer_from_torch`.
        torch_optimizer: The optimizer that it was created from, or an equal one; its state is
            replaced.
        names: See `optimizer_from_torch`.
        model: See `optimizer_from_torch`.
        scheduler: See `optimizer_from_torch`; it is moved to the current step, together with the
            learning rates of the groups, and the momentum.
        steps: See `optimizer_from_torch`.
        steps_per_epoch: See `optimizer_from_torch`.
        step: The number of steps taken, for optimizers whose `step` in PyTorch only counts and has
            no counterpart in optax: Rprop, Adagrad without `lr_decay`, Adadelta and RMSprop. None
            leaves the count of the optimizer unchanged.

    Raises:
        TypeError: As in `optimizer_from_torch`; or `step` is not an integer.
        ValueError: As in `optimizer_from_torch`; or the state is not of that optimizer, has a
            tensor of another shape or dtype than the parameter, or has contradictory counts.

    Example:
        >>> import torch, jax.numpy as jnp
        >>> from regjax.interop import Leaf, optimizer_from_torch
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> recipe = torch.optim.SGD(layer.named_parameters(), lr=0.1, momentum=0.9)
        >>> names, params = {"kernel": Leaf("weight", (1, 0))}, {"kernel": jnp.ones((3, 2))}
        >>> optimizer = optimizer_from_torch(recipe, names)
        >>> _, state = optimizer.update(params, optimizer.init(params), params)
        >>> state_to_torch(state, recipe, names)
        >>> recipe.state[layer.weight]["momentum_buffer"]
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    check_class("torch_optimizer", torch_optimizer, "torch.optim", MOMENTS)
    check_scheduler_options(scheduler, steps, steps_per_epoch)
    if step is not None:
        check_integer("step", step, minimum=0)
    recipe = read_recipe(torch_optimizer, names, model)
    rates = None if scheduler is None else schedule_from_torch(scheduler, steps=steps)
    _check_made_for("state", state, recipe)
    _check_scheduled(state, recipe, scheduler)
    written = {part.label: _Written(part, torch_optimizer.state) for part in recipe.parts}
    for path, value in jax.tree.leaves_with_path(state):
        label, place = _place(path, recipe)
        written[label].take(place, np.asarray(value))
    entries = [entry for label in written for entry in written[label].entries(step)]
    counts = {count for label in written for count in written[label].scheduled}
    if scheduler is not None and len(counts) != 1:
        raise ValueError(f"the state must have one count for the scheduler, but has {counts or 0}")
    for tensor, entry in entries:
        torch_optimizer.state.pop(tensor, None)
        if entry:
            torch_optimizer.state[tensor] = entry
    if rates is not None:
        move_scheduler(scheduler, rates, counts.pop() // steps_per_epoch)


class _Place(NamedTuple):
    """A leaf of a chain's state: the link of the chain, the field, the path of the parameter."""

    link: str
    field: str
    path: str


def _place(path: tuple[Any, ...], recipe: Recipe) -> tuple[str, _Place]:
    """Return the label of the part that a leaf of the state belongs to, and its place in there."""
    label, rest = recipe.parts[0].label if recipe.parts else "", list(path)
    if not recipe.is_single:
        # .inner_states[label].inner_state
        label, rest = rest[1].key, rest[3:]
    if isinstance(rest[0], GetAttrKey):
        if rest[0].name == "count":
            return label, _Place("", "count", "")
        rest = rest[1:]
    link, at = rest[0].key, 1
    while isinstance(rest[at], SequenceKey):
        at += 1
    return label, _Place(link, rest[at].name, path_name(tuple(rest[at + 1 :])))


def _check_made_for(argument: str, state: Any, recipe: Recipe) -> None:
    """Reject a state whose outer structure differs from that of `optimizer_from_torch`."""
    if recipe.is_single:
        chains = {recipe.parts[0].label: state}
    elif isinstance(state, optax.PartitionState):
        inner_states: Any = state.inner_states
        chains = {label: inner.inner_state for label, inner in inner_states.items()}
        chains.pop("frozen", None)
    else:
        chains = {}
    inner = {
        label: chain.inner_state if isinstance(chain, ScheduledMomentumState) else chain
        for label, chain in chains.items()
    }
    fits = inner.keys() == {part.label for part in recipe.parts}
    if not fits or not all(isinstance(c, dict) and "moments" in c for c in inner.values()):
        raise ValueError(
            f"{argument} must be that of optimizer_from_torch with the same arguments; got a state "
            f"of another structure, a {type(state).__name__}. Leave out what is chained to it."
        )


def _check_scheduled(state: PyTree, recipe: Recipe, scheduler: Any) -> None:
    """Reject a scheduler that has no schedule in the state, and vice versa."""
    parts = {part.label: part for part in recipe.parts}
    scheduled = {label for label, part in parts.items() if _shares_count(part) and scheduler}
    for path, _ in jax.tree.leaves_with_path(state):
        label, place = _place(path, recipe)
        if _role(parts[label], place) == "scheduled":
            scheduled.add(label)
    if scheduled != (set() if scheduler is None else set(parts)):
        raise ValueError(
            "optimizer_from_torch was given a scheduler, or was not, where this was not, or was: "
            "pass the same arguments to both"
        )


def _role(part: Part, place: _Place) -> str:
    """Return the role of a number that is not an array of a parameter's shape."""
    if place.field != "count":
        return place.field
    if place.link == "moments":
        return "started" if part.kind == "SGD" else "step"
    counts_steps = place.link == "learning_rate" and _shares_count(part)
    return "step" if counts_steps else "scheduled"


class _Read:
    """PyTorch's state of the parameters of a part, read by the places of a chain's state."""

    def __init__(
        self, part: Part, state: Mapping[Any, Any], epoch: int | None, steps_per_epoch: int
    ) -> None:
        self.part = part
        self.states = {path: state.get(p.tensor) or {} for path, p in part.leaves.items()}
        self.has_begun = any(self.states.values())
        self._check_known()
        self.step = self._common("step") if self.has_begun and _counts(part.kind) else None
        self.scheduled = self._scheduled(epoch, steps_per_epoch)

    def value(self, place: _Place, old: Any) -> Any:
        torch_name = MOMENTS[self.part.kind].get(place.field)
        if torch_name is not None:
            return self._moment(place, torch_name, old) if self.has_begun else old
        role = _role(self.part, place)
        if role == "started":
            return jnp.asarray(int(self.has_begun), old.dtype)
        if role == "scheduled":
            return jnp.asarray(self.scheduled or 0, old.dtype)
        if not self.has_begun:
            return old
        if role == "step":
            # PyTorch's Muon does not count steps, and optax's average does not need the count.
            number = self.scheduled or 0 if self.part.kind == "Muon" else self.step
            return jnp.asarray(number, old.dtype)
        return jnp.asarray(self._common(role), old.dtype)

    def _moment(self, place: _Place, torch_name: str, old: Any) -> Any:
        located = self.part.leaves[place.path]
        torch_name = _as_held(located, torch_name)
        tensor = self.states[place.path].get(torch_name)
        if tensor is None:
            if self._absence_is_zero(torch_name):
                return old
            raise ValueError(
                f"PyTorch's optimizer has no '{torch_name}' for '{located.leaf.name}' "
                f"('{place.path}'), while it has for others of group {self.part.index}: was it "
                "never given a gradient?"
            )
        array = located.leaf.to_jax(_to_numpy(tensor))
        what = f"'{torch_name}' of '{located.leaf.name}'"
        _check_shape(what, array.shape, f"'{place.path}'", old.shape)
        _check_dtype(what, _dtype(tensor), f"'{place.path}'", str(old.dtype))
        return jnp.array(array.astype(old.dtype))

    def _absence_is_zero(self, torch_name: str) -> bool:
        # SGD's first gradient enters the buffer undamped, so with dampening it must be the first
        # for all parameters, or for none.
        if self.part.kind != "SGD" or torch_name != "momentum_buffer":
            return False
        return self.part.group["dampening"] == 0

    def _common(self, torch_name: str) -> Any:
        """Return a number that PyTorch keeps for each parameter, and optax for all."""
        found = {}
        for path, state in self.states.items():
            if torch_name not in state:
                raise ValueError(
                    f"PyTorch's optimizer has no '{torch_name}' for "
                    f"'{self.part.leaves[path].leaf.name}' ('{path}'), while it has for others of "
                    f"group {self.part.index}: was it never given a gradient?"
                )
            found[path] = float(state[torch_name])
        if len(set(found.values())) != 1:
            listed = ", ".join(f"'{path}' {value:g}" for path, value in found.items())
            raise ValueError(
                f"the parameters of group {self.part.index} differ in '{torch_name}', of which "
                f"optax keeps one for all: {listed}"
            )
        return next(iter(found.values()))

    def _check_known(self) -> None:
        known = {*MOMENTS[self.part.kind].values(), *_NUMBERS.get(self.part.kind, ()), "step"}
        for path, state in self.states.items():
            if unknown := state.keys() - known:
                raise ValueError(
                    f"PyTorch's optimizer has {', '.join(sorted(unknown))} for "
                    f"'{self.part.leaves[path].leaf.name}' ('{path}'), which torch.optim."
                    f"{self.part.kind} does not know and is not carried over"
                )

    def _scheduled(self, epoch: int | None, steps_per_epoch: int) -> int | None:
        """Return the count of the schedule."""
        if epoch is None:
            return None
        step = None if self.step is None else int(self.step)
        count = epoch * steps_per_epoch
        within = step is not None and count <= step < count + steps_per_epoch
        if within:
            return step
        if step is not None and (steps_per_epoch > 1 or _shares_count(self.part)):
            raise ValueError(
                f"the parameters of group {self.part.index} have taken {step} steps, but the "
                f"scheduler is at {epoch}, which is step {count} with "
                f"steps_per_epoch={steps_per_epoch}"
            )
        return count


class _Written:
    """The state of a chain for the parameters of a part, in PyTorch's form."""

    def __init__(self, part: Part, state: Mapping[Any, Any]) -> None:
        self.part = part
        self.old = {path: state.get(p.tensor) or {} for path, p in part.leaves.items()}
        self.arrays: dict[str, dict[str, Any]] = {path: {} for path in part.leaves}
        self.numbers: dict[str, set[float]] = {}

    @property
    def scheduled(self) -> set[int]:
        shared = self.numbers.get("step", set()) if _shares_count(self.part) else set()
        return {int(x) for x in self.numbers.get("scheduled", shared)}

    def take(self, place: _Place, array: np.ndarray) -> None:
        torch_name = MOMENTS[self.part.kind].get(place.field)
        if torch_name is None:
            self.numbers.setdefault(_role(self.part, place), set()).add(array.item())
            return
        if place.path not in self.part.leaves:
            raise ValueError(
                f"the state has '{place.field}' of '{place.path}', which is no parameter of group "
                f"{self.part.index}"
            )
        located = self.part.leaves[place.path]
        torch_name, tensor = _as_held(located, torch_name), located.tensor
        turned = located.leaf.to_torch(array)
        shape = list(tensor.shape)
        if torch_name in _FLAT:
            shape[_FLAT[torch_name]] = 1
        what, where = f"'{place.field}' of '{place.path}'", f"'{located.leaf.name}'"
        _check_shape(what, turned.shape, where, tuple(shape))
        _check_dtype(what, str(array.dtype), where, _dtype(tensor))
        self.arrays[place.path][torch_name] = turned

    def entries(self, step: int | None) -> list[tuple[Any, dict[str, Any]]]:
        """Return the tensor and the new state of each parameter."""
        for role, found in self.numbers.items():
            if len(found) != 1:
                raise ValueError(
                    f"the state of group {self.part.index} must have one '{role}', but has "
                    f"{sorted(found)}"
                )
        numbers = {role: found.copy().pop() for role, found in self.numbers.items()}
        result = []
        for path, located in self.part.leaves.items():
            wanted = _wanted(self.part, located)
            if wanted != self.arrays[path].keys():
                raise ValueError(
                    f"the state of group {self.part.index} holds "
                    f"{sorted(self.arrays[path]) or 'nothing'} of '{path}' in PyTorch's words, but "
                    f"{self.part.kind} with the options of the group keeps {sorted(wanted)}"
                )
            # As in PyTorch before the first step, whose gradient is not damped.
            arrays = self.arrays[path] if numbers.get("started", 1) else {}
            entry = {name: _to_tensor(located.tensor, a) for name, a in arrays.items()}
            for name, value in self._numbers(path, numbers, step).items():
                entry[name] = self._scalar(located.tensor, value)
            result.append((located.tensor, entry))
        return result

    def _numbers(
        self, path: str, numbers: Mapping[str, float], step: int | None
    ) -> dict[str, float]:
        kind, found = self.part.kind, {}
        if _counts(kind):
            before = float(self.old[path].get("step", 0)) if step is None else step
            found["step"] = numbers.get("step", before)
        for name in _NUMBERS.get(kind, ()):
            if name != "mu":
                found[name] = numbers[name]
        if kind == "ASGD":
            found["mu"] = 1 / max(1, found["step"] - self.part.group["t0"])
        return found

    def _scalar(self, tensor: Any, value: float) -> Any:
        """Return a number as PyTorch keeps it: in float32, on the CPU unless a kernel reads it."""
        group = self.part.group
        on_device = self.part.kind == "ASGD" or group.get("capturable") or group.get("fused")
        scalar = tensor.new_zeros(()).detach().float()
        return (scalar if on_device else scalar.cpu()).fill_(value)


def _counts(kind: str) -> bool:
    return kind not in ("SGD", "Muon")


def _shares_count(part: Part) -> bool:
    """Return whether one count in JAX is both PyTorch's `step` and the step of the schedule."""
    return part.kind in ("ASGD", "Adafactor") or (
        part.kind == "Adagrad" and part.group["lr_decay"] != 0
    )


def _wanted(part: Part, located: Located) -> set[str]:
    """Return the names of the tensors of a parameter's shape that PyTorch keeps."""
    kind, group = part.kind, part.group
    if kind == "Adafactor":
        return {"row_var", "col_var"} if located.tensor.ndim > 1 else {"variance"}
    optional = {
        "SGD": {"momentum_buffer": lambda: group["momentum"] != 0},
        "RMSprop": {
            "momentum_buffer": lambda: group["momentum"] != 0,
            "grad_avg": lambda: group["centered"],
        },
    }.get(kind, {"max_exp_avg_sq": lambda: group.get("amsgrad", False)})
    return {name for name in MOMENTS[kind].values() if optional.get(name, lambda: True)()}


def _as_held(located: Located, torch_name: str) -> str:
    """Swap rows and columns of a factor if JAX holds the matrix transposed."""
    order = located.leaf.transpose
    if torch_name not in _FLAT or order is None or order[-1] == len(order) - 1:
        return torch_name
    return "col_var" if torch_name == "row_var" else "row_var"


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; float32 represents it exactly.
    return (tensor.float() if _dtype(tensor) == "bfloat16" else tensor).numpy()


def _to_tensor(like: Any, array: np.ndarray) -> Any:
    wide = array.astype(np.float32) if str(array.dtype) == "bfloat16" else array
    return like.new_tensor(np.array(wide), requires_grad=False)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_shape(what: str, found: tuple[int, ...], where: str, wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        raise ValueError(
            f"{what} arrives with shape {tuple(found)}, but {where} asks for {tuple(wanted)}: see "
            "Leaf(name, transpose)"
        )


def _check_dtype(what: str, found: str, where: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{what} is {found}, but {where} asks for {wanted}: give the parameters the same dtype "
            "on both sides (float64 needs jax_enable_x64)"
        )


_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq"}
# For each optimizer, the fields of optax's state with a parameter's shape, and PyTorch's names.
MOMENTS: dict[str, dict[str, str]] = {
    "SGD": {"trace": "momentum_buffer"},
    "ASGD": {"ax": "ax"},
    "Rprop": {"prev": "prev", "step_size": "step_size"},
    "Adam": {**_ADAM, "nu_max": "max_exp_avg_sq"},
    "AdamW": {**_ADAM, "nu_max": "max_exp_avg_sq"},
    "NAdam": _ADAM,
    "RAdam": _ADAM,
    "Adamax": {"mu": "exp_avg", "nu": "exp_inf"},
    "Adagrad": {"sum_of_squares": "sum"},
    "Adadelta": {"e_g": "square_avg", "e_x": "acc_delta"},
    "RMSprop": {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"},
    "Adafactor": {"v_row": "row_var", "v_col": "col_var", "v": "variance"},
    "Muon": {"ema": "momentum_buffer"},
}
# The numbers that PyTorch keeps for each parameter, beside `step`.
_NUMBERS = {"ASGD": ("eta", "mu"), "NAdam": ("mu_product",)}
# The axis along which a factor has length 1.
_FLAT = {"row_var": -1, "col_var": -2}
