"""DropConnect: dropout of the weights of a layer instead of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from regshared.checks import describe
from regshared.decay_rules import Parameter, Place, bools, kind_of_attribute
from regshared.globs import components, words
from regshared.spellings import explain_names
from regtorch._dropout.core import (
    SampledMask,
    apply_dropout,
    check_flag,
    check_inexact,
    is_number,
    require_key,
)
from regtorch._random.bernoulli import Sampler, bernoulli, check_probability
from regtorch._random.by_example import check_one_mask
from regtorch._random.keys import site_key
from regtorch._random.packed import mask_sampler

if TYPE_CHECKING:
    from regshared.decay_rules import Rule


@overload
def drop_connect(
    weights: Tensor,
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    rule: Rule = "default",
    sampler: Sampler = bernoulli,
) -> Tensor: ...
@overload
def drop_connect(
    weights: Mapping[str, Tensor],
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    rule: Rule = "default",
    sampler: Sampler = bernoulli,
) -> Mapping[str, Tensor]: ...
@explain_names
def drop_connect(
    weights: Tensor | Mapping[str, Tensor],
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    rule: Rule = "default",
    sampler: Sampler = bernoulli,
) -> Tensor | Mapping[str, Tensor]:
    """Zero each weight with probability `rate` and divide the others by `1 - rate`.

    In a dict, the kernels are dropped: the tensors that `rule` selects, as in `decay_mask`. Each
    tensor draws from its own key, `site_key(key, 0, name)`, where the name has slashes for dots.
    The gradient of a dropped weight is 0.

    A call draws one mask, and every row of a batch meets the same weights. The paper draws a mask
    for each example; that is `torch.func.vmap` over keys, at the cost of as many kernels as rows.
    In evaluation the paper approximates the mean over masks by samples of a normal distribution;
    here weights are scaled in training, and evaluation uses them unchanged. The other errors are
    those of `dropout` and `decay_mask`.

    Args:
        weights: One floating or complex tensor, or a dict from names to tensors, in which integers
            stay unchanged.
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        rule: The tensors to drop: "default" (kernels), a glob such as "weight_hh_l0" or "**" (also
            biases, as in the paper), a function `(path, tensor, kind)`, or pairs of glob and bool;
            see `regshared.decay_rules`. The default rule always drops a single tensor.
        sampler: See `dropout`. `by_example(i)` draws the mask of example i.

    Returns:
        A tensor, or a dict with the same names in the same order.

    Raises:
        ValueError: The rule selects nothing.

    Note (PyTorch):
        `regtorch.nn.DropConnect` wraps a module; this function is for `torch.func.functional_call`.

    Note (JAX):
        `regjax.drop_connect` of a pytree draws the same masks where names and shapes are the same.

    Example:
        >>> import torch, regtorch
        >>> layer = {"weight": torch.ones(2, 3), "bias": torch.ones(3)}
        >>> regtorch.drop_connect(layer, 0.5, key=regtorch.key(0))
        {'weight': tensor([[2., 2., 0.],
                [0., 0., 0.]]), 'bias': tensor([1., 1., 1.])}

    References:
        Wan et al., "Regularization of neural networks using DropConnect", ICML 2013. Recurrent
        weights: Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", ICLR
        2018.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    chosen = _chosen(weights, rule)
    spec = SampledMask("drop_connect", check_one_mask(mask_sampler(sampler)))
    if deterministic is True or is_number(rate, 0):
        return weights
    root = None if key is None else require_key(key)  # one draw from a generator for all tensors

    def leaf(name: str, weight: Tensor) -> Tensor:
        site = "/".join(components(name))
        leaf_key = site_key(root, 0, site) if name and root is not None else root
        return apply_dropout(spec, check_inexact(weight), rate, leaf_key, deterministic)

    if isinstance(weights, Tensor):
        return leaf("", weights)
    return {
        name: leaf(name, weight) if name in chosen else weight for name, weight in weights.items()
    }


def _chosen(weights: Tensor | Mapping[str, Tensor], rule: Rule) -> set[str]:
    """Return the names of the tensors that are dropped."""
    if isinstance(weights, Tensor):
        if not (weights.is_floating_point() or weights.is_complex()):
            raise TypeError(f"weights must be floating or complex; got {describe(weights)}.")
        if isinstance(rule, str) and rule == "default":
            return {""}
        weights = {"": weights}
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights must be one tensor, or a dict from names to tensors such as "
            f"dict(module.named_parameters()); got {describe(weights)}."
        )
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise TypeError(
                "weights must be one tensor, or a dict from names to tensors such as "
                f"dict(module.named_parameters()); got {describe(weight)} at {name!r}."
            )
    known = {n: w for n, w in weights.items() if w.is_floating_point() or w.is_complex()}
    decisions = bools([_parameter(name, weight) for name, weight in known.items()], rule)
    chosen = {name for name, decision in zip(known, decisions, strict=True) if decision}
    if not chosen:
        raise ValueError(
            f"weights must have a tensor that rule {rule!r} selects; got none. Pass rule='**' for "
            "all."
        )
    return chosen


def _parameter(name: str, weight: Tensor) -> Parameter:
    """Describe a tensor to a rule, from its name alone."""
    path = components(name)
    names = [part for part in path if words(part)]
    own, holder = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    place = Place("/".join(path), own, *kind_of_attribute(holder))
    return Parameter(name, (place,), weight, frozen=False)
