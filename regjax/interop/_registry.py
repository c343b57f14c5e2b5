"""The counterparts of optimizer classes: those of `torch.optim`, and registered ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from regjax.optim._records import RECORDS, Record, StateArray
from regshared.checks import check_bool, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optax

_HOME = "torch.optim"
# Options that a class of torch.optim has by definition, and classes like it may lack.
_IMPLIED = {"AdamW": {"decoupled_weight_decay": True}}
# By qualified name.
_registered: dict[str, Record] = {}


def register_optimizer(
    torch_class: type | str,
    *,
    like: type | str | None = None,
    create: Callable[..., optax.GradientTransformation] | None = None,
    options: Mapping[str, str] | Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    ignored: Sequence[str] = (),
    state: Mapping[str, str] | None = None,
    step: str | None = None,
    python_numbers: bool = False,
) -> None:
    """Register the counterpart of an optimizer class that is not one of `torch.optim`.

    Afterwards `optimizer_from_torch`, `state_from_torch`, `state_to_torch` and the harness of
    `parity_tests` accept the class, but not its subclasses. The counterpart is either a class of
    `torch.optim` with the same steps (`like`), or a function that creates an optax transformation
    (`create`). Whether the steps are the same is not checked: compare a run.

    Args:
        torch_class: The class, or its qualified name, such as `"timm.optim.lion.Lion"`. Another
            registration of the same class replaces the first.
        like: The class of `torch.optim` with the same steps, or its name, such as `"AdamW"`.
        create: `create(learning_rate, **options)` returns an optax transformation; the learning
            rate may be a schedule.
        options: With `like`, the options with other names: from the name in the parameter groups to
            the name in `like`. With `create`, all options but `lr`: their names in the groups, or a
            mapping from them to the arguments of `create`.
        defaults: The options of `like` that the class lacks, with the values that it uses.
        fixed: The options without a counterpart, each with the only value that is accepted.
        ignored: The options that have no effect on the result.
        state: With `like`, the state entries with other names: from the name in the state of a
            parameter to the name in `like`. With `create`, all arrays, each with the shape of its
            parameter: from the entry to the field of the optax state.
        step: With `create`, the state entry that counts the steps of a parameter; None if there is
            none. Every field `count` of the optax state takes its value.
        python_numbers: True if the class keeps the numbers of its state, such as the step count, as
            Python numbers. They are 0-d float32 tensors in `torch.optim`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Both or none of `like` and `create` are given; `like` is not one of the
            optimizers that `optimizer_from_torch` supports; `torch_class` is a class of
            `torch.optim`; an argument belongs to the other of the two; or `like` has no option or
            state entry of a name.

    Example:
        >>> import optax, torch
        >>> class Decayed(torch.optim.AdamW):
        ...     pass
        >>> register_optimizer(Decayed, like=torch.optim.AdamW)
        >>> def lion(learning_rate, betas, weight_decay):
        ...     return optax.lion(learning_rate, *betas, weight_decay=weight_decay)
        >>> register_optimizer(
        ...     "timm.optim.lion.Lion",
        ...     create=lion,
        ...     options=("betas", "weight_decay"),
        ...     fixed={"caution": False, "corrected_weight_decay": False, "maximize": False},
        ...     ignored=("max_lr_snapshot",),
        ...     state={"exp_avg": "mu"},
        ... )
    """
    if not isinstance(torch_class, type | str):
        raise TypeError(
            f"torch_class must be a class or its qualified name; got {describe(torch_class)}."
        )
    name = torch_class if isinstance(torch_class, str) else _qualified(torch_class)
    home, _, short = name.rpartition(".")
    is_name = not isinstance(torch_class, str) or all(map(str.isidentifier, name.split(".")))
    if not home or not is_name:
        raise ValueError(
            f"torch_class must be a class or its qualified name; got '{name}'. Pass "
            "'package.module.Class'."
        )
    if f"{home}.".startswith(f"{_HOME}.") and short in RECORDS:
        raise ValueError(
            f"torch_class must not be one of torch.optim, which are known; got {name}."
        )
    if like is None and create is None:
        raise ValueError(
            "like must be given without create; got None. Pass like=torch.optim.AdamW, for example."
        )
    if like is not None and create is not None:
        raise ValueError(
            f"create must be None with like; got {describe(create)}. Pass only one of the two."
        )
    if create is None:
        record = _like(like, _mapping("options", options), _mapping("state", state), step)
    else:
        record = _created(create, options, _mapping("state", state), defaults, step)
    _registered[name] = dataclasses.replace(
        record,
        torch_name=short,
        home=home,
        defaults={**record.defaults, **_mapping("defaults", defaults)},
        fixed=_mapping("fixed", fixed),
        ignored=_names("ignored", ignored),
        python_numbers=check_bool("python_numbers", python_numbers),
    )


def find_record(torch_optimizer: Any) -> Record | None:
    """Return the record of an optimizer by its exact class; None for an unknown class."""
    name = _qualified(type(torch_optimizer))
    if name in _registered:
        return _registered[name]
    is_of_torch = name.startswith(f"{_HOME}.")
    return RECORDS.get(type(torch_optimizer).__name__) if is_of_torch else None


def record_of(torch_optimizer: Any) -> Record:
    """Return the record of an optimizer; an unknown class is an error that names a way out."""
    record = find_record(torch_optimizer)
    if record is not None:
        return record
    cls = type(torch_optimizer)
    known = [base.__name__ for base in cls.__mro__ if _is_known(base)]
    is_optimizer = any(f"{base.__module__}.".startswith(f"{_HOME}.") for base in cls.__mro__)
    got, fix = _qualified(cls), ""
    if known:
        got += f", a subclass of torch.optim.{known[0]}"
        fix = (
            " If its steps are the same, declare it: regjax.interop.register_optimizer("
            f"{cls.__name__}, like=torch.optim.{known[0]})."
        )
    elif is_optimizer:
        fix = " Declare another class by regjax.interop.register_optimizer."
    raise (ValueError if is_optimizer else TypeError)(
        f"torch_optimizer must be one of torch.optim: {', '.join(sorted(RECORDS))}; got {got}.{fix}"
    )


def _is_known(cls: type) -> bool:
    return cls.__module__.startswith(f"{_HOME}.") and cls.__name__ in RECORDS


def _like(
    like: Any, options: Mapping[str, str], state: Mapping[str, str], step: str | None
) -> Record:
    name = str(like).removeprefix(f"{_HOME}.") if not isinstance(like, type) else like.__name__
    if name not in RECORDS or not (isinstance(like, str) or _is_known(like)):
        raise ValueError(
            f"like must be one of torch.optim: {', '.join(sorted(RECORDS))}; got {like}."
        )
    if step is not None:
        raise ValueError(
            f"step must be None with like; got '{step}'. Rename it: state={{'{step}': 'step'}}."
        )
    record = RECORDS[name]
    entries = {*record.torch_names.values(), *record.numbers, *record.derived, "step"}
    _check_known("options", options.values(), {*record.options, "lr"}, name)
    _check_known("state", state.values(), entries, name)
    return dataclasses.replace(
        record,
        renamed_options=options,
        renamed_state=state,
        defaults=_IMPLIED.get(name, {}),
    )


def _created(
    create: Any, options: Any, state: Mapping[str, str], defaults: Any, step: str | None
) -> Record:
    if not callable(create):
        raise TypeError(f"create must be a function; got {describe(create)}.")
    if defaults:
        raise ValueError(
            f"defaults must be None with create; got {defaults}. Give create the values itself."
        )
    if options is not None and not isinstance(options, Mapping):
        options = {option: option for option in _names("options", options)}
    names = _mapping("options", options)
    return Record(
        "",
        create,
        tuple(names.values()),
        tuple(StateArray(field, entry) for entry, field in state.items()),
        counts_steps=step is not None,
        shares_count=lambda options: True,
        renamed_options={theirs: ours for theirs, ours in names.items() if theirs != ours},
        renamed_state={} if step in (None, "step") else {step: "step"},
    )


def _check_known(argument: str, given: Any, known: set[str], name: str) -> None:
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"{argument} must be names of torch.optim.{name}: {', '.join(sorted(known))}; got "
            f"{', '.join(unknown)}."
        )


def _names(argument: str, value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{argument} must be a list of names; got {describe(value)}.")
    return tuple(value)


def _mapping(argument: str, value: Any) -> dict[str, Any]:
    if value is None or (isinstance(value, tuple) and not value):
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument} must be a mapping; got {describe(value)}.")
    return dict(value)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
