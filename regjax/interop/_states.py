"""Convert the state of `torch.optim` optimizers to optax and back.

Both directions stay in one file, since they read the same layout of a state and must agree on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey

from regjax._decay.paths import path_name
from regjax.interop._leaves import FROZEN, check_paths, read_recipe, spelled_as_in
from regjax.interop._params import expand_names
from regjax.interop._registry import record_of
from regjax.interop._schedules import ScheduledMomentumState, read_schedules
from regshared.checks import check_integer, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import PyTree

    from regjax.interop._leaves import Located, Names, Part, Recipe
    from regjax.interop._schedules import Schedules
    from regjax.optim._records import StateArray

    # PyTorch's state of each parameter of a part, by path in JAX.
    States = Mapping[str, Mapping[str, Any]]


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
    metrics: Sequence[float] | None = None,
    step: int | None = None,
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
            run must be at the end of an epoch, or `step` be given.
        metrics: See `optimizer_from_torch`.
        step: The number of optimizer steps taken, where PyTorch counts them nowhere: with a
            scheduler of timm or a function of the step, and an optimizer without counts, such as
            SGD. None elsewhere takes it from the optimizer or the scheduler.

    Returns:
        The state for `optimizer.update`, with the structure and dtypes of `optimizer.init(params)`.
        For a group that has not taken a step it is the initial state.

    Raises:
        TypeError: As in `optimizer_from_torch`; or `optimizer` is not an optax transformation.
        ValueError: As in `optimizer_from_torch`; `optimizer` was created with other arguments; a
            parameter lacks an entry that others of its group have, or has an unknown one; a tensor
            has another shape or dtype than the parameter in JAX; the parameters of a group were not
            all trained for the same number of steps; that number does not match the scheduler or
            `step`; or it is counted nowhere and `step` is None.

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
    recipe = read_recipe(torch_optimizer, expand_names(names, params, model), model)
    schedules = read_schedules(torch_optimizer, scheduler, steps, steps_per_epoch, metrics)
    if step is not None:
        check_integer("step", step, minimum=0)
    states = {part.label: _states(part, torch_optimizer) for part in recipe.parts}
    numbers = {part.label: _read_numbers(part, states[part.label]) for part in recipe.parts}
    _count(recipe, numbers, schedules, steps_per_epoch, step)
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(f"optimizer must be an optax transformation; got {describe(optimizer)}.")
    title = record_of(torch_optimizer).title
    if (other := getattr(optimizer.init, "torch_class", title)) != title:
        raise ValueError(
            f"optimizer must be that of optimizer_from_torch for {title}; got one for {other}. "
            "Pass the same torch_optimizer to both."
        )
    check_paths(recipe.labels, params)
    template = optimizer.init(params)

    def read(place: _Place, old: Any) -> Any:
        label = place.part.label
        if place.array is None:
            return jnp.asarray(numbers[label].get(place.number, old), old.dtype)
        return _read_array(place, states[label], old) if any(states[label].values()) else old

    leaves = _places("optimizer", template, recipe, schedules)
    taken = {(place.part.label, place.torch_array.torch_name) for place, _ in leaves if place.array}
    for part in recipe.parts:
        arrays = {array.torch_name for array in part.record.arrays}
        kept = {n for s in states[part.label].values() for n, x in s.items() if x is not None}
        if lost := {name for name in arrays & kept if (part.label, name) not in taken}:
            raise ValueError(
                f"optimizer must be that of optimizer_from_torch for {part.record.torch_name}; got "
                f"one without a place for {', '.join(sorted(lost))}. Pass the same torch_optimizer "
                "to both."
            )
    return jax.tree.structure(template).unflatten(read(place, old) for place, old in leaves)


def state_to_torch(
    state: PyTree,
    torch_optimizer: Any,
    names: Names,
    *,
    model: Any = None,
    params: PyTree = None,
    scheduler: Any = None,
    steps: int | None = None,
    steps_per_epoch: int = 1,
    metrics: Sequence[float] | None = None,
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
        params: See `optimizer_from_torch`.
        scheduler: See `optimizer_from_torch`; it is moved to the current step, together with the
            options of the groups that it moves. One without a formula takes the missing steps, so
            it must not have passed the current one.
        steps: See `optimizer_from_torch`.
        steps_per_epoch: See `optimizer_from_torch`.
        metrics: See `optimizer_from_torch`.
        step: The number of steps taken, for optimizers whose `step` in PyTorch only counts and has
            no counterpart in optax: Rprop, Adagrad without `lr_decay`, Adadelta and RMSprop. None
            leaves the count of the optimizer unchanged. It has no effect for other optimizers.

    Raises:
        TypeError: As in `optimizer_from_torch`; or `step` is not an integer.
        ValueError: As in `optimizer_from_torch`; or the state is not of that optimizer, has a
            tensor of another shape or dtype than the parameter, has contradictory counts, or is at
            a step to which the scheduler cannot be moved.

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
    recipe = read_recipe(torch_optimizer, expand_names(names, params, model), model)
    schedules = read_schedules(torch_optimizer, scheduler, steps, steps_per_epoch, metrics)
    if step is not None:
        check_integer("step", step, minimum=0)
    leaves, entries, counts = _places("state", state, recipe, schedules), [], set()
    for part in recipe.parts:
        arrays, numbers = _split(part, [leaf for leaf in leaves if leaf[0].part is part])
        counts.add(numbers.get("step" if part.shares_count else "scheduled"))
        for path, old in _states(part, torch_optimizer).items():
            count = float(old.get("step", 0)) if step is None else step
            new = _entry(part, path, arrays[path], numbers, count)
            entries.append((part.leaves[path], part.record.write_state(new)))
    scheduled = int(counts.pop() or 0) // steps_per_epoch if len(counts) == 1 else None
    if schedules is not None:
        if scheduled is None:
            raise ValueError(
                f"state must have one count for the scheduler; got {sorted(counts)}. Pass the "
                "state of one optimizer."
            )
        schedules.check_move(scheduled)
    for located, _ in entries:
        torch_optimizer.state.pop(located.tensor, None)
    for located, entry in entries:
        if entry:
            _store(torch_optimizer.state[located.tensor], located, entry)
    if schedules is not None and scheduled is not None:
        schedules.move(torch_optimizer.param_groups, scheduled)


class _Place(NamedTuple):
    """The place of a leaf in a state: its part, link and field, and the path of the parameter."""

    part: Part
    link: str
    field: str
    path: str

    @property
    def array(self) -> StateArray | None:
        """The record of an array of the parameter; None for a number that all of them share."""
        return next((a for a in self.part.record.arrays if a.field == self.field), None)

    @property
    def torch_array(self) -> StateArray:
        """The array in PyTorch: rows and columns are swapped if JAX holds a matrix transposed."""
        array: Any = self.array
        order = self.part.leaves[self.path].leaf.transpose
        if array.axis is None or order is None:
            return array
        axis = order[array.axis] - len(order)
        return next(a for a in self.part.record.arrays if a.axis == axis)

    @property
    def number(self) -> str:
        """PyTorch's name of a number; "scheduled" for the count of a schedule."""
        if self.field != "count":
            return self.field
        if self.part.record.is_created:
            return "step"
        counts_steps = self.link == "learning_rate" and self.part.shares_count
        return "step" if self.link == "moments" or counts_steps else "scheduled"


def _locate(path: tuple[Any, ...], recipe: Recipe) -> _Place:
    keys = list(path)
    if recipe.is_single:
        [part] = recipe.parts
    else:
        # .inner_states[label].inner_state
        [part] = (part for part in recipe.parts if part.label == keys[1].key)
        keys = keys[3:]
    if isinstance(keys[0], GetAttrKey):
        if keys[0].name == "count":  # of ScheduledMomentumState
            return _Place(part, "", "count", "")
        keys = keys[1:]
    # A link that is a chain itself has a tuple as state.
    fields = [at for at, key in enumerate(keys) if isinstance(key, GetAttrKey)]
    if part.record.is_created:
        known = {*part.record.torch_names, "count"}
        fields = [at for at in fields if keys[at].name in known] or fields
    if not fields:
        raise _unknown(part, path_name(path))
    at = fields[0]
    parameter = spelled_as_in(part.leaves, path_name(tuple(keys[at + 1 :])))
    place = _Place(part, keys[0].key, keys[at].name, parameter)
    if part.record.is_created and place.array is None and place.field != "count":
        raise _unknown(part, place.field)
    return place


def _unknown(part: Part, field: str) -> ValueError:
    return ValueError(
        f"state of {part.record.title} must map the field '{field}' of its optax state; got only "
        f"{', '.join(part.record.torch_names) or 'none'}. Register it with a state= that has all."
    )


def _places(
    argument: str, state: Any, recipe: Recipe, schedules: Schedules | None
) -> list[tuple[_Place, Any]]:
    """Return the leaves of a state of `optimizer_from_torch` with the same arguments."""
    if recipe.is_single:
        chains = {recipe.parts[0].label: state}
    else:
        inner_states = getattr(state, "inner_states", {})
        chains = {label: s.inner_state for label, s in inner_states.items() if label != FROZEN}
    chains = {
        label: chain.inner_state if isinstance(chain, ScheduledMomentumState) else chain
        for label, chain in chains.items()
    }
    fits = chains.keys() == {part.label for part in recipe.parts}
    links = {"moments", "created"}
    if not fits or not all(isinstance(c, dict) and links & {*c} for c in chains.values()):
        raise ValueError(
            f"{argument} must be that of optimizer_from_torch with the same arguments; got a state "
            f"of another structure, a {type(state).__name__}. Pass it without other "
            "links around it."
        )
    leaves = [(_locate(path, recipe), leaf) for path, leaf in jax.tree.leaves_with_path(state)]
    for part in recipe.parts:
        record = part.record
        known = {*record.numbers, *record.derived, "step", "scheduled"}
        places = [place for place, _ in leaves if place.part is part]
        extra = {p.field for p in places if p.array is None and p.number not in known}
        if extra and not record.is_created:
            raise ValueError(
                f"{argument} must be that of optimizer_from_torch for {record.torch_name}; got a "
                f"state with {', '.join(sorted(extra))}. Pass the same torch_optimizer to both."
            )
    scheduled = {place.part.label for place, _ in leaves if place.number == "scheduled"}
    if schedules is not None:
        scheduled |= {part.label for part in recipe.parts if part.shares_count}
    if scheduled != (set() if schedules is None else chains.keys()):
        raise ValueError(
            f"scheduler must be the one that optimizer_from_torch was given; got "
            f"{'None' if schedules is None else schedules.name}. Pass the same arguments to both."
        )
    return leaves


def _states(part: Part, torch_optimizer: Any) -> States:
    read, state = part.record.read_state, torch_optimizer.state
    return {path: read(state.get(located.tensor) or {}) for path, located in part.leaves.items()}


def _read_numbers(part: Part, states: States) -> dict[str, float]:
    """Return the numbers of a part, without those that are still as in `init`."""
    record = part.record
    known = {*record.torch_names.values(), *record.numbers, *record.derived, "step"}
    for path, state in states.items():
        if unknown := state.keys() - known:
            raise ValueError(
                f"state of '{part.leaves[path].leaf.name}' ('{path}') must have only entries of "
                f"{record.title}; got {', '.join(sorted(unknown))}. Remove them: they are not "
                "carried over. (Of a registered class, name them in state=.)"
            )
    if not any(states.values()):
        return {}
    numbers = {name: _common(part, states, name) for name in record.numbers}
    # Without a schedule, only whether a count that PyTorch does not keep is 0 has an effect.
    return numbers | {"step": _common(part, states, "step") if record.counts_steps else 1}


def _count(
    recipe: Recipe,
    numbers: dict[str, dict[str, float]],
    schedules: Schedules | None,
    steps_per_epoch: int,
    given: int | None,
) -> None:
    """Add the counts of the schedules to the numbers of each part."""
    counted = [numbers[p.label]["step"] for p in recipe.parts if _is_counted(p, numbers[p.label])]
    if given is not None and counted and given != max(counted):
        raise ValueError(
            f"step must be that of the parameters, {max(counted):.0f}; got {given}. Leave it out."
        )
    taken = max(counted, default=given)
    for part in recipe.parts:
        own = numbers[part.label]
        step = own["step"] if _is_counted(part, own) else given
        if schedules is not None and schedules.position is None:
            own["scheduled"] = _by_optimizer(part, step if taken is None else taken, schedules)
        elif schedules is not None:
            own["scheduled"] = _by_scheduler(part, step, schedules.position or 0, steps_per_epoch)
        if "step" in own and not part.record.counts_steps:
            own["step"] = max(1, own.get("scheduled", step or 1))


def _is_counted(part: Part, numbers: Mapping[str, float]) -> bool:
    return part.record.counts_steps and "step" in numbers


def _common(part: Part, states: States, name: str) -> float:
    """Return a number that PyTorch keeps for each parameter, and optax for all."""
    for path, state in states.items():
        if name not in state:
            raise _missing(part, path, name)
        is_python, title = isinstance(state[name], int | float), part.record.title
        if part.record.home != "torch.optim" and is_python != part.record.python_numbers:
            raise ValueError(
                f"python_numbers must be {is_python} for {title}, whose '{name}' is "
                f"{describe(state[name])}; got {not is_python}. Register it with that."
            )
    found = {path: float(state[name]) for path, state in states.items()}
    if len(set(found.values())) != 1:
        listed = ", ".join(f"'{path}' {value:g}" for path, value in found.items())
        raise ValueError(
            f"parameters of group {part.index} must have one '{name}', which optax keeps for all; "
            f"got {listed}. Give each its own group."
        )
    return next(iter(found.values()))


def _by_optimizer(part: Part, step: float | None, schedules: Schedules) -> int:
    """Return the count of a schedule whose scheduler does not count."""
    if step is None and not part.record.counts_steps:
        raise ValueError(
            f"step must be given for {part.record.torch_name} with a {schedules.name}, neither of "
            "which counts the steps; got None. Pass how many the optimizer has taken."
        )
    return int(step or 0)


def _by_scheduler(part: Part, step: float | None, epoch: int, steps_per_epoch: int) -> int:
    """Return the count of a schedule whose scheduler counts."""
    count = epoch * steps_per_epoch
    if step is not None and count <= step < count + steps_per_epoch:
        return int(step)
    if step is not None and (steps_per_epoch > 1 or part.shares_count):
        raise ValueError(
            f"scheduler must be where the parameters of group {part.index} are, at step "
            f"{step:.0f}; got epoch {epoch}, which is step {count} with "
            f"steps_per_epoch={steps_per_epoch}. Pass the right steps_per_epoch."
        )
    return count


def _read_array(place: _Place, states: States, old: Any) -> Any:
    located, array = place.part.leaves[place.path], place.torch_array
    tensor = states[place.path].get(array.torch_name)
    if tensor is None:
        if array.is_optional(place.part.group):
            return old
        raise _missing(place.part, place.path, array.torch_name)
    value = located.leaf.to_jax(_to_numpy(tensor))
    name = f"'{array.torch_name}' of '{located.leaf.name}'"
    _check_form(name, (_dtype(tensor), value.shape), place.path, (str(old.dtype), old.shape))
    return jnp.array(value.astype(old.dtype))


def _missing(part: Part, path: str, name: str) -> ValueError:
    return ValueError(
        f"state of '{part.leaves[path].leaf.name}' ('{path}') must have '{name}', like others of "
        f"group {part.index}; got none. Give each parameter a gradient before the first step."
    )


def _split(
    part: Part, leaves: Iterable[tuple[_Place, Any]]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Return the arrays in PyTorch's layout by path and PyTorch's name, and the numbers by name."""
    arrays: dict[str, dict[str, np.ndarray]] = {path: {} for path in part.leaves}
    numbers: dict[str, set[float]] = {}
    for place, leaf in leaves:
        if place.array is None:
            numbers.setdefault(place.number, set()).add(leaf.item())
            continue
        if place.path not in part.leaves:
            raise ValueError(
                f"state must have only parameters of group {part.index}; got '{place.field}' of "
                f"'{place.path}'. Pass the state of the same parameters."
            )
        located, array = part.leaves[place.path], place.torch_array
        value = located.leaf.to_torch(np.asarray(leaf))
        shape = list(located.tensor[located.leaf.index].shape)
        if array.axis is not None:
            shape[array.axis] = 1
        form, expected = (str(value.dtype), value.shape), (_dtype(located.tensor), tuple(shape))
        _check_form(f"'{place.field}' of '{place.path}'", form, located.leaf.name, expected)
        arrays[place.path][array.torch_name] = value
    for name, found in numbers.items():
        if len(found) != 1:
            raise ValueError(
                f"state of group {part.index} must have one '{name}'; got {sorted(found)}. Pass "
                "the state of one optimizer."
            )
    return arrays, {name: number for name, [number] in numbers.items()}


def _entry(
    part: Part,
    path: str,
    arrays: Mapping[str, np.ndarray],
    numbers: Mapping[str, float],
    step: float,
) -> dict[str, Any]:
    """Return PyTorch's state of one parameter; `step` counts where the optax state does not."""
    record, tensor, options = part.record, part.leaves[path].tensor, part.group
    expected = {array.torch_name for array in record.arrays if array.is_kept(options, tensor.ndim)}
    if expected != arrays.keys():
        raise ValueError(
            f"state of '{path}' must have {sorted(expected)}, by PyTorch's names, with the options "
            f"of group {part.index}; got {sorted(arrays)}. Pass the same options to both."
        )
    step = numbers.get("step", step)
    if not record.counts_steps and numbers.get("step") == 0:
        return {}  # as in PyTorch before the first step
    values = {name: numbers[name] for name in record.numbers}
    values |= {name: function(step, options) for name, function in record.derived.items()}
    values |= {"step": step} if record.counts_steps else {}
    # In float32, on the CPU unless a kernel reads it.
    on_device = record.numbers_on_device or options.get("capturable") or options.get("fused")
    zero = tensor.detach().new_zeros(()).float()
    zero = zero if on_device else zero.cpu()
    entry = {name: _to_tensor(tensor, array) for name, array in arrays.items()}
    if record.python_numbers:
        return entry | {name: int(v) if name == "step" else float(v) for name, v in values.items()}
    return entry | {name: zero.new_full((), value) for name, value in values.items()}


def _store(state: dict[str, Any], located: Located, entry: Mapping[str, Any]) -> None:
    """Write the state of a parameter, which may be a section of a tensor, into the tensor's."""
    if located.leaf.section is None:
        state.update(entry)
        return
    for name, value in entry.items():
        if getattr(value, "ndim", 0):
            whole = state.setdefault(name, value.new_zeros(located.tensor.shape))
            whole[located.leaf.index] = value
        else:
            state[name] = value


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; float32 represents it exactly.
    return (tensor.float() if _dtype(tensor) == "bfloat16" else tensor).numpy()


def _to_tensor(like: Any, array: np.ndarray) -> Any:
    wide = array.astype(np.float32) if str(array.dtype) == "bfloat16" else array
    return like.new_tensor(np.array(wide), requires_grad=False)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_form(
    name: str, form: tuple[str, tuple[int, ...]], owner: str, expected: tuple[str, tuple[int, ...]]
) -> None:
    """Reject an array whose dtype or shape is not that of its parameter."""
    if form != expected:
        raise ValueError(
            f"{name} must be {expected[0]}{list(expected[1])}, like '{owner}'; got "
            f"{form[0]}{list(form[1])}. Pass the order of axes as Leaf(name, transpose), and "
            "parameters of one dtype (float64 needs jax_enable_x64)."
        )
