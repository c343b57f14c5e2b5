"""The parameters of a module as a decay rule sees them; see `regshared.decay_rules`."""

from __future__ import annotations

from collections.abc import Sequence
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
        rule: `"default"`, a glob, a function `(path, tensor, kind)`, or pairs of glob and decision;
            see `regshared.decay_rules`. A path is a name of `named_parameters()` with slashes for
            dots. `kind` is 'linear', 'conv', 'embedding', 'norm', 'attention', 'recurrent',
            'activation' or empty: it follows from the class of the module that owns the parameter
            or, outside `torch.nn`, from names.

    Returns:
        A dict from each name of `named_parameters()` to a bool. Frozen parameters
        (`requires_grad=False`) are False, since torch.optim skips them; call again after
        unfreezing. A tied parameter appears once, under its first name, but a glob may match any of
        its places, and the default rule treats a weight shared by an embedding and an output layer
        as an embedding.

    Raises:
        TypeError: `module` is not a module, `rule` has another form, or a decision is not a bool;
            for rates see `decay_rates`.
        ValueError: A glob decides nothing, no pair covers a parameter, the default rule does not
            know one, or a function returns False for all. The message names the glob and the paths.

    Note (JAX):
        In `regjax.decay_mask(params, rule)`, `frozen` names the parameters without a gradient,
        since a JAX array does not know whether it gets one.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> decay_mask(model)
        {'0.weight': True, '0.bias': False, '1.weight': False, '1.bias': False}
        >>> decay_mask(model, [("bias", True), ("**", "default")])
        {'0.weight': True, '0.bias': True, '1.weight': False, '1.bias': True}
    """
    parameters = _parameters(module)
    return _by_name(parameters, bools(parameters, rule))


def decay_rates(
    module: nn.Module, weight_decay: float = 1.0, rule: Rule = "default"
) -> dict[str, float]:
    """Return a dict from each name of `named_parameters()` to its rate, 0.0 where nothing decays.

    The other errors are those of `decay_mask`.

    Args:
        module: The model.
        weight_decay: The rate where the decision is True.
        rule: See `decay_mask`; a decision may also be a rate, which is used as it is.

    Raises:
        TypeError: A rate is not a number.
        ValueError: A rate is negative, infinite or NaN.

    Note (JAX):
        `regjax.decay_rates(params, weight_decay, rule)`, for `regjax.optim.add_decay_by_leaf`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> decay_rates(model, 0.1, [("1/weight", 0.5), ("**", "default")])
        {'0.weight': 0.1, '0.bias': 0.0, '1.weight': 0.5, '1.bias': 0.0}
    """
    parameters = _parameters(module)
    return _by_name(parameters, [rate for rate, _ in rates(parameters, weight_decay, rule)])


def decay_groups(
    module: nn.Module, weight_decay: float, rule: Rule = "default"
) -> list[dict[str, Any]]:
    """Return parameter groups for `torch.optim`, one for each rate of weight decay.

    The groups are in order of appearance, with the names of their parameters as
    `named_parameters()` gives them to an optimizer. Frozen parameters are in no group: call again
    after unfreezing. A parameter that requires a gradient but is unused is in a group, yet
    torch.optim, unlike optax, skips it as long as its gradient is None. The other errors are those
    of `decay_rates`.

    Args:
        module: The model.
        weight_decay: The rate where the decision is True.
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
        Loshchilov and Hutter, [Decoupled Weight Decay
        Regularization](https://arxiv.org/abs/1711.05101), ICLR 2019.
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
    """Return a table of which parameters decay, at what rate, and why, with totals.

    It can be printed and iterated over; its rows have the fields of `DecayRow`. For the arguments
    and errors see `decay_rates`; in JAX, `regjax.decay_table(params, weight_decay, rule)`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> table = decay_table(model, 0.01)
        >>> print(table)
        path      shape   dtype    size  kind    rule    weight_decay
        0.weight  (3, 2)  float32     6  linear  kernel          0.01
        0.bias    (3,)    float32     3  linear  bias               -
        1.weight  (3,)    float32     3  norm    norm               -
        1.bias    (3,)    float32     3  norm    bias               -
        decay: 1 of 4 leaves, 6 of 15 parameters
        >>> [row.path for row in table if row.weight_decay], table.exempt.parameters
        (['0.weight'], 9)
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
    return [
        Parameter(
            known[0], tuple(_place(module, name) for name in known), leaf, not leaf.requires_grad
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
    return Place("/".join(components(path)), name, kind, certain)


def _at(module: nn.Module, parents: Sequence[str]) -> Any:
    return module.get_submodule(".".join(parents))


def _kind(owner: nn.Module, holder: str) -> tuple[str, bool]:
    """Return the kind of an owner, from its class if that decides, else from its attribute name."""
    for kind, classes in _CLASSES.items():
        if isinstance(owner, classes):
            return kind, True
    kind, certain = kind_of_class(type(owner))
    return (kind, certain) if kind else kind_of_attribute(holder)
