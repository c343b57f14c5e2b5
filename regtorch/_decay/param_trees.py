"""Apply the decay rules of `regshared.decay_rules` to the parameters of a module."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from regshared.decay_rules import (
    Parameter,
    Place,
    bools,
    kind_of_attribute,
    kind_of_class,
    rates,
)
from regshared.decay_table import DecayTable, table_of
from regshared.globs import components, words

if TYPE_CHECKING:
    from torch import Tensor

    from regshared.decay_rules import Rule


def decay_mask(module: nn.Module, rule: Rule = "default") -> dict[str, bool]:
    """Return a mask of the parameters that receive weight decay.

    The mask is for `regtorch.l2_penalty` and `regtorch.optim`; for `torch.optim` see
    `decay_groups`.

    Args:
        module: The model.
        rule: `"default"`, `"huggingface"`, `"timm"`, a glob, a function `(path, tensor, kind)`,
            or pairs of glob and decision; see `regshared.decay_rules`. A path is a name of
            `named_parameters()` with slashes for dots. `kind` is 'linear', 'conv', 'embedding',
            'norm', 'attention', 'recurrent', 'activation' or empty; it comes from the class of the
            owning module or, outside `torch.nn`, from names. "timm" exempts what
            `module.no_weight_decay()` lists, if there is such a method.

    Returns:
        A dict from each name of `named_parameters()` to a bool. Frozen parameters
        (`requires_grad=False`) are False: call again after unfreezing. A tied parameter appears
        once, under its first name; a glob may match any of its names, and the default rule treats a
        weight shared with an embedding as an embedding.

    Raises:
        TypeError: `module` is not a module, `rule` has another form, or a decision is not a bool;
            for rates see `decay_rates`.
        ValueError: A glob decides nothing; no pair covers a parameter; the default rule does not
            know parameters; or a function returns False for all. The message names the glob, the
            paths, and a rule for unknown parameters.

    Note (JAX):
        In `regjax.decay_mask(params, rule)`, `frozen` names the parameters without a gradient.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> decay_mask(model, [("bias", True), ("**", "default")])
        {'0.weight': True, '0.bias': True, '1.weight': False, '1.bias': True}
    """
    parameters = _parameters(module)
    return _by_name(parameters, bools(parameters, rule))


def decay_rates(
    module: nn.Module, weight_decay: float = 1.0, rule: Rule = "default"
) -> dict[str, float]:
    """Return the weight decay rate of each parameter by name, 0.0 where nothing decays.

    The other errors are those of `decay_mask`.

    Args:
        module: The model.
        weight_decay: The rate of the parameters for which the rule is True.
        rule: See `decay_mask`; a decision may also be a rate, which is used as given.

    Raises:
        TypeError: A rate is not a number.
        ValueError: A rate is negative, infinite or NaN.

    Note (JAX):
        `regjax.decay_rates(params, weight_decay, rule)`, for `regjax.optim.add_decay_by_leaf`.

    Example:
        >>> import torch
        >>> decay_rates(torch.nn.Linear(2, 3), 0.1, [("bias", 0.5), ("**", "default")])
        {'weight': 0.1, 'bias': 0.5}
    """
    parameters = _parameters(module)
    return _by_name(parameters, [rate for rate, _ in rates(parameters, weight_decay, rule)])


def decay_groups(
    module: nn.Module, weight_decay: float, rule: Rule = "default"
) -> list[dict[str, Any]]:
    """Return parameter groups for `torch.optim`, one for each rate of weight decay.

    The groups are in order of appearance, with the names of their parameters. Frozen parameters are
    in no group: call again after unfreezing. torch.optim, unlike optax, skips a parameter whose
    gradient is None. The other errors are those of `decay_rates`.

    Args:
        module: The model.
        weight_decay: The rate of the parameters for which the rule is True.
        rule: See `decay_rates`.

    Raises:
        ValueError: No parameter requires a gradient.

    Note (JAX):
        `regjax.optim.adamw(..., mask=regjax.decay_mask)`, or, with more than one rate,
        `regjax.optim.add_decay_by_leaf(regjax.decay_rates(params, ...))`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> groups = decay_groups(model, 0.1)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)

    References:
        Loshchilov and Hutter, [ICLR 2019](https://arxiv.org/abs/1711.05101).
    """
    parameters = _parameters(module)
    groups: dict[float, list[tuple[str, Tensor]]] = {}
    decisions = rates(parameters, weight_decay, rule)
    for parameter, (rate, _) in zip(parameters, decisions, strict=True):
        if not parameter.frozen:
            groups.setdefault(float(rate), []).append((parameter.path, parameter.leaf))
    if not groups:
        raise ValueError(
            "module must have a parameter that requires a gradient; got none. Call "
            "module.requires_grad_() first."
        )
    return [{"params": members, "weight_decay": rate} for rate, members in groups.items()]


def decay_table(module: nn.Module, weight_decay: float = 1.0, rule: Rule = "default") -> DecayTable:
    """Return a table of the parameters with their decay rates and the rules that decided them.

    It can be printed and iterated over; its rows have the fields of `DecayRow`. The arguments and
    errors are those of `decay_rates`; in JAX, `regjax.decay_table(params, weight_decay, rule)`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> print(decay_table(model, 0.01))
        path      shape   dtype    size  kind    rule    weight_decay
        0.weight  (3, 2)  float32     6  linear  kernel          0.01
        0.bias    (3,)    float32     3  linear  bias               -
        1.weight  (3,)    float32     3  norm    norm               -
        1.bias    (3,)    float32     3  norm    bias               -
        decay: 1 of 4 leaves, 6 of 15 parameters
    """
    parameters = _parameters(module)
    return table_of(parameters, rates(parameters, weight_decay, rule))


_CLASSES: dict[str, tuple[type, ...]] = {
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "conv": (nn.modules.conv._ConvNd,),
    "linear": (nn.Linear, nn.Bilinear),
    "attention": (nn.MultiheadAttention,),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "activation": (nn.PReLU,),
}


def _parameters(module: nn.Module) -> list[Parameter]:
    """List the parameters in the order of `named_parameters`, tied ones once."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, whose layers decide what decays; got {module!r}."
        )
    names: dict[Tensor, list[str]] = {}
    for name, leaf in module.named_parameters(remove_duplicate=False):
        if isinstance(leaf, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"module must have parameters with a shape; got '{name}' of a lazy module. Call "
                "the module once."
            )
        names.setdefault(leaf, []).append(name)
    # In timm, the names and globs that a model exempts.
    listed = getattr(module, "no_weight_decay", tuple)()
    return [
        Parameter(
            known[0],
            tuple(_place(module, name) for name in known),
            leaf,
            frozen=not leaf.requires_grad,
            listed=any(fnmatchcase(known[0], pattern) for pattern in listed),
        )
        for leaf, known in names.items()
    ]


def _by_name(parameters: Sequence[Parameter], answers: list[Any]) -> dict[str, Any]:
    paths = [parameter.path for parameter in parameters]
    return dict(zip(paths, answers, strict=True))


def _place(module: nn.Module, path: str) -> Place:
    """Return the path of a parameter, its name, and the kind of its owner."""
    *parents, own = path.split(".")
    if parents[-2:-1] == ["parametrizations"]:
        # A tensor that torch.nn.utils.parametrize stores is treated as the weight it makes.
        parametrization = type(_at(module, parents)[0]).__name__
        is_magnitude = (parametrization, own) == ("_WeightNorm", "original0")
        *parents, _, own = parents
        own = "scale" if is_magnitude else own
    owner = _at(module, parents)
    names = [part for part in (*parents, own) if words(part)]
    # A position in a list is not a name, and a list of parameters is not an owner.
    while isinstance(owner, nn.ParameterList) and parents:
        parents = parents[:-1]
        owner = _at(module, parents)
    name, holder = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    kind, certain = _kind(owner, holder)
    return Place("/".join(components(path)), name, kind, certain, type(owner))


def _at(module: nn.Module, parents: Sequence[str]) -> Any:
    return module.get_submodule(".".join(parents))


def _kind(owner: nn.Module, holder: str) -> tuple[str, bool]:
    """Return the kind of an owner, from its class if that decides, else from its attribute name."""
    for kind, classes in _CLASSES.items():
        if isinstance(owner, classes):
            return kind, True
    kind, certain = kind_of_class(type(owner))
    return (kind, certain) if kind else kind_of_attribute(holder)
