"""DropConnect: dropout of the weights of a layer, not of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from regshared.checks import describe
from regshared.decay_rules import Parameter, Place, bools, kind_of_attribute
from regshared.globs import components, words
from regtorch._dropout.core import (
    SampledMask,
    apply_dropout,
    check_flag,
    check_inexact,
    is_number,
    require_key,
)
from regtorch._random.bernoulli import Sampler, bernoulli, check_probability
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
def drop_connect(
    weights: Tensor | Mapping[str, Tensor],
    rate: float | Tensor,
    *,
    key: Tensor | torch.Generator | None = None,
    deterministic: bool | Tensor = False,
    rule: Rule = "default",
    sampler: Sampler = bernoulli,
) -> Tensor | Mapping[str, Tensor]:
    """Zeroes each weight with probability `rate` and divides the others by `1 - rate`.

    Of a dict, the kernels: what `rule` says True of, as `decay_mask` reads it. Biases, scales of
    norms and embeddings stay as they are unless the rule says otherwise; the paper drops biases
    too, `rule="**"`. Each tensor draws from a key of its own, `site_key(key, 0, name)`, where the
    name has slashes for dots. The gradient of a dropped weight is 0.

    There is one mask a call: every row of a batch meets the same weights, as everywhere but in the
    paper, which draws a mask for each example. That is `torch.func.vmap` over keys, at the cost of
    as many kernels as rows. Where the paper approximates the mean over masks in evaluation by
    samples of a normal distribution, weights are here scaled in training, and evaluation takes them
    as they are.

    Args:
        weights: one floating or complex tensor, or a dict from names to tensors;
            integers stay as they are.
        rate: the probability that a weight is zeroed, in [0, 1]; a number or a 0-d tensor.
        key: the random key, or a `torch.Generator` from which one is drawn; see `dropout`.
        deterministic: True in evaluation: `weights` itself.
        rule: which tensors of a dict are dropped: "default" (kernels), a glob such as
            "weight_hh_l0", a function `(path, tensor, kind)`, or pairs of glob and bool: see
            `regshared.decay_rules`. One tensor is dropped without being asked for its name, unless
            you give a rule.
        sampler: what draws the masks.

    Returns:
        What `weights` is: a tensor, or a dict of the same names in the same order.

    Raises:
        TypeError: as `dropout` and `decay_mask`.
        ValueError: as `dropout`; as `decay_mask`, such as for a glob that matches nothing or a name
            that the default rule does not know; or the rule leaves nothing to drop.

    PyTorch:
        `regtorch.nn.DropConnect` wraps a module; the function serves `torch.func.functional_call`.

    JAX:
        `regjax.drop_connect` of a tree: the same masks where names and shapes are the same.

    Example:
        >>> import torch, regtorch
        >>> layer = {"weight": torch.ones(2, 3), "bias": torch.ones(3)}
        >>> regtorch.drop_connect(layer, 0.5, key=regtorch.key(0))
        {'weight': tensor([[2., 2., 0.],
                [0., 0., 0.]]), 'bias': tensor([1., 1., 1.])}
        >>> regtorch.drop_connect(torch.ones(4), 0.5, key=regtorch.key(0))
        tensor([0., 0., 2., 2.])

    Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using
    DropConnect", ICML 2013. Of recurrent weights: Merity, Keskar, Socher, "Regularizing and
    optimizing LSTM language models", ICLR 2018.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    chosen = _chosen(weights, rule)
    spec = SampledMask("drop_connect", mask_sampler(sampler))
    if deterministic is True or is_number(rate, 0):
        return weights
    root = None if key is None else require_key(key)  # a generator is asked once for all

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
    """The names of the tensors that are dropped."""
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
                f"dict(module.named_parameters()); at {name!r} it has {weight!r}."
            )
    known = {n: w for n, w in weights.items() if w.is_floating_point() or w.is_complex()}
    decisions = bools([_parameter(name, weight) for name, weight in known.items()], rule)
    chosen = {name for name, decision in zip(known, decisions, strict=True) if decision}
    if not chosen:
        raise ValueError(
            f"weights have no tensor that rule {rule!r} says True of, so there is nothing to drop"
        )
    return chosen


def _parameter(name: str, weight: Tensor) -> Parameter:
    """What a rule may look at, where there is no module but only a name."""
    path = components(name)
    names = [part for part in path if words(part)]
    own, holder = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    place = Place("/".join(path), own, *kind_of_attribute(holder))
    return Parameter(name, (place,), weight, frozen=False)
