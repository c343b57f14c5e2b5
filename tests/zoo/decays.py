"""The rules of weight decay beside the choices of transformers and timm, on their own models."""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

import regtorch
from tests.zoo.models import Case


class Decays(NamedTuple):
    """Numbers of parameters (tensors) of a model.

    Attributes:
        parameters: All that are trained.
        huggingface: Those that decay in the Trainer of transformers.
        timm: Those that decay in `create_optimizer_v2` of timm.
        default: Those that decay under the default rule.
        unknown: Those for which it raises an error, until the rule of the error is passed.
        unlike_huggingface: The categories of those that the default rule decides differently.
        unlike_timm: The same for timm.
    """

    parameters: int
    huggingface: int
    timm: int
    default: int
    unknown: int
    unlike_huggingface: dict[str, int]
    unlike_timm: dict[str, int]


def choice_of_huggingface(model: nn.Module) -> set[str]:
    """Return the names of the parameters that decay in the Trainer of transformers."""
    from transformers import Trainer

    names: Any = Trainer.get_decay_parameter_names
    return set(names(None, model)) & trained(model)


def choice_of_timm(model: nn.Module) -> set[str]:
    """Return the names of the parameters that decay in the optimizers of timm."""
    from timm.optim import param_groups_weight_decay

    # As in `create_optimizer_v2`.
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed)
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in decaying}


def trained(model: nn.Module) -> set[str]:
    """Return the names of the parameters that require a gradient."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def choice_of_preset(model: nn.Module, rule: Any) -> set[str]:
    """Return the names of the parameters in the groups of `decay_groups` that decay."""
    groups = regtorch.decay_groups(model, 0.1, rule)
    return {name for group in groups if group["weight_decay"] for name, _ in group["params"]}


def advised_rule(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the rule of the error for unknown parameters; without an error, the default rule."""
    try:
        regtorch.decay_mask(model)
    except ValueError as error:
        # A message without a rule is not a literal, and raises.
        return ast.literal_eval(re.sub(r"^.* pass rule=(\[.*\])\.$", r"\1", str(error)))
    return [("**", "default")]


def compare(case: Case) -> Decays:
    """Compare the presets with the libraries, and count the differences of the default rule.

    Raises:
        AssertionError: A preset decides differently from its library.
    """
    model = case.build()
    huggingface, timm = choice_of_huggingface(model), choice_of_timm(model)
    for name, theirs in (("huggingface", huggingface), ("timm", timm)):
        differing = choice_of_preset(model, name) ^ theirs
        assert not differing, f"'{name}' decides differently for {sorted(differing)}"
    rule = advised_rule(model)
    rows = {row.path: row for row in regtorch.decay_table(model, 0.1, rule)}
    default = {name for name in trained(model) if rows[name].weight_decay}
    globs = {glob for glob, _ in rule[:-1]}

    def unlike(theirs: set[str]) -> dict[str, int]:
        rules = (rows[name].rule for name in theirs ^ default)
        return dict(sorted(Counter("unknown" if r in globs else r for r in rules).items()))

    return Decays(
        len(trained(model)),
        len(huggingface),
        len(timm),
        len(default),
        sum(rows[name].rule in globs for name in trained(model)),
        unlike(huggingface),
        unlike(timm),
    )
