"""Rules that select the parameters that receive weight decay, by name, shape and module.

A rule is one of

    "default"                               common recipes: kernels decay, the rest does not
    "**/kernel"                             a glob: what it matches decays, the rest does not
    lambda path, leaf, kind: leaf.ndim > 1  a function that returns True, False or a rate
    [("head/**", 0.1), ("**", "default")]   pairs: the first whose glob matches a parameter wins

and is read from top to bottom like `if`, `elif`, `else`. A pair gives True (decays, at the call's
`weight_decay`), False, a rate, "default" or a function. In a glob `*`, `?` and `[...]` stay within
one component of the path, `**` spans any number of them, and a glob without a slash is compared
with the last component, so "bias" is "**/bias". A dot counts as a slash, in globs and in PyTorch's
names: "encoder/*/weight" is "encoder.*.weight". A glob that decides nothing and a parameter that no
pair covers are errors.

The default rule uses names and the class of the owning module, never the number of dimensions: a
bias of stacked layers has two. It tests, in this order,

    bias        b, bias, beta, offset, in_proj_bias, ...              does not decay
    norm        every parameter of a norm                             does not decay
    scale       scale, gamma, logit_scale, ...                        does not decay
    activation  the slope of a PReLU                                  does not decay
    kernel      kernel                                                decays
    embedding   embedding, embeddings, pos_embedding, cls_token, ...,
                and every parameter of an embedding module            does not decay
    kernel      weight, w, weight_ih, in_proj_weight, lora_a, ...     decays

and raises an error that names any other parameter. Two more are errors: a weight whose module is
only called "embed", which may be linear, as in a patch embedding, and a vector called weight in an
unknown module, which may be a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regshared.checks import check_coefficient
from regshared.globs import matches, words

if TYPE_CHECKING:
    Decision = bool | float | str | Callable[[str, Any, str], Any]
    Rule = str | Callable[[str, Any, str], Any] | Sequence[tuple[str, Decision] | list[Any]]


class Place(NamedTuple):
    """The place of a parameter; a tied one has several.

    Attributes:
        path: Components between slashes, for globs.
        name: The name within its module.
        kind: The kind of the module that owns it; empty if unknown.
        certain: Whether the kind comes from a class instead of a guess from a name.
    """

    path: str
    name: str
    kind: str
    certain: bool


class Parameter(NamedTuple):
    """A parameter, as a rule sees it.

    Attributes:
        path: Its name in its own framework.
        places: Its places in the model; a tied parameter has several.
        leaf: The array.
        frozen: Whether it receives no gradient.
    """

    path: str
    places: tuple[Place, ...]
    leaf: Any
    frozen: bool


def _apply_rule(parameters: Sequence[Parameter], rule: Rule) -> list[tuple[Any, str]]:
    """Return the decision for each parameter, a bool or a rate, and the reason."""
    pairs = _pairs(rule)
    # The first pair that matches one of a parameter's places decides.
    deciders: list[int | None] = [None] * len(parameters)
    for index, (pattern, _) in enumerate(pairs):
        fits = [any(matches(pattern, p.path) for p in parameter.places) for parameter in parameters]
        decided = [i for i, fit in enumerate(fits) if fit and deciders[i] is None]
        if parameters and pattern != "**" and not decided:
            raise ValueError(_describe_unused(pattern, fits, deciders, pairs, parameters))
        for i in decided:
            deciders[i] = index
    uncovered = [parameters[i] for i, index in enumerate(deciders) if index is None]
    if uncovered:
        raise ValueError(
            f"rule must cover all parameters; got no pair for {listed(uncovered)}. End it with "
            "('**', False), ('**', True) or ('**', 'default')."
        )
    decisions = [
        (False, "frozen") if parameter.frozen else _decision(parameter, *pairs[index or 0])
        for parameter, index in zip(parameters, deciders, strict=True)
    ]
    trainable = [parameter for parameter in parameters if not parameter.frozen]
    if callable(rule) and trainable and all(decision is False for decision, _ in decisions):
        raise ValueError(
            f"rule must select a parameter; got False from {_named(rule)} for all of "
            f"{listed(trainable)}. Pass [('**', False)] for no decay at all."
        )
    return decisions


def _pairs(rule: Rule) -> list[tuple[str, Decision]]:
    """Return a rule of any form as pairs, of which the first match wins."""
    if isinstance(rule, str):
        return [("**", "default")] if rule == "default" else [(rule, True), ("**", False)]
    if callable(rule):
        return [("**", rule)]
    if not isinstance(rule, Sequence) or not rule:
        raise TypeError(
            "rule must be 'default', a glob such as '**/kernel', a function (path, leaf, kind) -> "
            f"bool, or a list of pairs (glob, bool or rate); got {rule!r}."
        )
    for position, pair in enumerate(rule):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"rule[{position}] must be a pair (glob, bool or rate); got {pair!r}.")
        if pair[1] != "default" and not callable(pair[1]):
            _check_decision(f"rule[{position}], '{pair[0]}',", pair[1])
    return [(pattern, decision) for pattern, decision in rule]


def _decision(parameter: Parameter, pattern: str, decision: Decision) -> tuple[Any, str]:
    if isinstance(decision, str):
        return _by_default(parameter)
    if not callable(decision):
        return decision, pattern
    answers = [decision(place.path, parameter.leaf, place.kind) for place in parameter.places]
    name = _named(decision)
    for answer in answers:
        _check_decision(f"rule {name} at '{parameter.path}'", answer)
    first, *others = answers
    if any(answer != first for answer in others):
        paths = " and ".join(f"'{place.path}'" for place in parameter.places)
        raise ValueError(
            f"rule must decide once for each parameter; got {answers} from {name} for {paths}, "
            "which are tied. Return the same for all of its names."
        )
    return first, name


def _named(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_decision(what: str, decision: Any) -> None:
    if not isinstance(decision, bool):
        check_coefficient(what, decision, fix="Pass True, False or a rate.")


def _by_default(parameter: Parameter) -> tuple[bool, str]:
    decisions = [_recipe(place, len(parameter.leaf.shape)) for place in parameter.places]
    # An output layer tied to an embedding is an embedding.
    known = sorted(decision for decision in decisions if decision is not None)
    if not known:
        raise ValueError(
            f"rule must have a pair for {listed([parameter])}; got 'default', which knows neither "
            f"its name nor its module. Pass [('{parameter.places[0].path}', False), ('**', "
            "'default')], for example."
        )
    return known[0]


def _recipe(place: Place, ndim: int) -> tuple[bool, str] | None:
    """Return whether a parameter decays and its category; None if name and module do not decide.

    The number of dimensions would not suffice: a bias of stacked layers has two. It only keeps a
    vector called weight, which may be the scale of an unknown norm, from being taken for a kernel.
    """
    parts = words(place.name)
    unique = set(parts)
    # `b1` is a bias; the `B` of a matrix product is not.
    is_b = parts[:1] == ["b"] and place.name.startswith("b")
    if unique & _BIASES or parts[:1] in (["beta"], ["offset"]) or is_b:
        return False, "bias"
    if place.kind == "norm" and (place.certain or not unique & _KERNELS):
        return False, "norm"
    if unique & _SCALES or parts[-1:] == ["g"]:
        return False, "scale"
    if place.kind == "activation":
        return False, "activation"
    if unique & _KERNELS:
        return True, "kernel"
    if unique & _EMBEDDINGS or (place.kind == "embedding" and place.certain):
        return False, "embedding"
    # A layer called embed may be linear, as in a patch embedding.
    if unique & _WEIGHTS and place.kind != "embedding" and (place.kind or ndim > 1):
        return True, "kernel"
    return None


_BIASES = {"bias", "biases"}
_SCALES = {"scale", "scales", "gamma"}
_KERNELS = {"kernel", "kernels"}
_WEIGHTS = {"weight", "weights", "w", "lora", "proj", "projection"}
_TABLES = {"embedding", "embeddings", "embed", "embeds", "embedder", "emb", "embs", "wte", "wpe"}
_EMBEDDINGS = _TABLES | {"pos", "position", "positional", "token", "tokens", "cls"}
_NORMS = {"ln", "bn", "gn", "norms", "normalization"}
_KINDS = {
    "embedding": _TABLES,
    "conv": {"conv", "convolution"},
    "linear": {"linear", "dense", "bilinear", "fc", "einsum"},
    "attention": {"attention", "attn"},
    "recurrent": {"lstm", "gru", "rnn"},
}


def _kinds_of(name: str) -> list[str]:
    """Return the kinds of module that a name, of a class or an attribute, suggests."""
    if "prelu" in name.lower():
        return ["activation"]
    parts = words(name)
    # Weight and spectral norms wrap other layers.
    norms = _NORMS if not {"weight", "spectral"} & set(parts) else set()
    kinds = {"norm": norms | {w for w in parts if norms and w.endswith("norm")}, **_KINDS}
    return [kind for word in parts for kind, known in kinds.items() if word in known]


def kind_of_class(cls: type) -> tuple[str, bool]:
    """Return the kind of a class from its last word: a LayerNormLSTMCell is recurrent."""
    names = [base.__name__ for base in cls.__mro__]
    kind = next((kinds[-1] for name in names if (kinds := _kinds_of(name))), "")
    # The class of a patch embedding may own the kernel of a convolution.
    return kind, kind != "embedding" or not {"Embed", "Embedding"}.isdisjoint(names)


def kind_of_attribute(name: str) -> tuple[str, bool]:
    """Guess the kind of a module from its attribute name: a norm if the name contains one."""
    kinds = _kinds_of(name)
    return "norm" if "norm" in kinds else "".join(kinds[-1:]), False


def _describe_unused(
    pattern: str,
    fits: Sequence[bool],
    deciders: Sequence[int | None],
    pairs: Sequence[tuple[str, Decision]],
    parameters: Sequence[Parameter],
) -> str:
    """Return the error for a pattern that decides nothing."""
    others = [index for fit, index in zip(fits, deciders, strict=True) if fit]
    earlier = [pairs[index][0] for index in others if index is not None]
    if earlier:
        return (
            f"rule must use each of its globs; got '{pattern}' after '{earlier[0]}', which decides "
            f"all that it matches. Put '{pattern}' first: the first matching pair wins."
        )
    return (
        f"rule must match a parameter with each glob; got '{pattern}', which matches none of "
        f"{listed(parameters)}."
    )


def listed(parameters: Sequence[Parameter]) -> str:
    """List the first few parameters, for a message."""
    shown = ", ".join(f"'{p.places[0].path}' {list(p.leaf.shape)}" for p in parameters[:5])
    return shown + f", ... ({len(parameters)} in all)" * (len(parameters) > 5)


def bools(parameters: Sequence[Parameter], rule: Rule) -> list[bool]:
    """Return whether each parameter decays; a rate in the rule is a TypeError."""
    decisions = _apply_rule(parameters, rule)
    for parameter, (decision, why) in zip(parameters, decisions, strict=True):
        if not isinstance(decision, bool):
            raise TypeError(
                f"rule must return True or False for a mask; got the rate {decision!r} from {why} "
                f"for '{parameter.path}'. Use decay_rates for rates."
            )
    return [decision for decision, _ in decisions]


def rates(parameters: Sequence[Parameter], weight_decay: Any, rule: Rule) -> list[tuple[Any, str]]:
    """Return each parameter's rate of decay, and the part of the rule that decided it."""
    check_coefficient("weight_decay", weight_decay, fix="Pass 0.0 for none.")

    def rate(decision: Any) -> Any:
        return (weight_decay if decision else 0.0) if isinstance(decision, bool) else decision

    return [(rate(decision), why) for decision, why in _apply_rule(parameters, rule)]
