"""What decays: one language of rules over the name, the shape and the module of a parameter.

A rule is one of

    "default"                               what good recipes do: kernels decay, the rest does not
    "**/kernel"                             a glob: what it matches decays, the rest does not
    lambda path, leaf, kind: leaf.ndim > 1  a function, which says True, False or a rate
    [("head/**", 0.1), ("**", "default")]   pairs: the first whose glob matches a parameter wins

read from top to bottom like `if`, `elif`, `else`. A pair gives True (decays, at the `weight_decay`
of the call), False, a rate, "default" or a function. In a glob `*`, `?` and `[...]` stay within one
component of the path, `**` spans any number of them, and a glob without a slash is compared with
the last component, so "bias" is "**/bias". A dot counts as a slash, in globs and in the names that
PyTorch gives: "encoder/*/weight" is "encoder.*.weight". A glob that decides nothing and a parameter
that no pair covers are errors.

The default rule goes by names and by the class of the owning module, never by the number of
dimensions: a bias of stacked layers has two. In this order,

    bias        b, bias, beta, offset, in_proj_bias, ...              does not decay
    norm        whatever a norm owns                                  does not decay
    scale       scale, gamma, logit_scale, ...                        does not decay
    activation  the slope of a PReLU                                  does not decay
    kernel      kernel                                                decays
    embedding   embedding, embeddings, pos_embedding, cls_token, ...,
                and whatever an embedding module owns                 does not decay
    kernel      weight, w, weight_ih, in_proj_weight, lora_a, ...     decays

and anything else is an error that names the parameter. So are a weight whose module is only called
"embed", which may be linear, as in a patch embedding, and a vector called weight in a module of
which nothing is known: that may be a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regshared.checks import check_coefficient
from regshared.globs import matches, words

if TYPE_CHECKING:
    Decision = bool | float | str | Callable[[str, Any, str], Any]
    Rule = str | Callable[[str, Any, str], Any] | Sequence[tuple[str, Decision]]


class Place(NamedTuple):
    """Where a parameter sits: a tied one sits in several places.

    Attributes:
        path: Components between slashes, for globs.
        name: What its module calls it.
        kind: Of the module that owns it; empty where nothing tells.
        certain: Whether the kind is that of a class, and no guess from a name.
    """

    path: str
    name: str
    kind: str
    certain: bool


class Parameter(NamedTuple):
    """What a rule may look at.

    Attributes:
        path: As its own framework names it.
        places: Where it sits.
        leaf: The array.
        frozen: Whether it gets no gradient.
    """

    path: str
    places: tuple[Place, ...]
    leaf: Any
    frozen: bool


def _apply_rule(parameters: Sequence[Parameter], rule: Rule) -> list[tuple[Any, str]]:
    """Say of each parameter what the rule does with it, a bool or a number, and in which words."""
    pairs = _pairs(rule)
    # Which pair takes a parameter: the first that matches one of its places.
    taken: list[int | None] = [None] * len(parameters)
    for index, (pattern, _) in enumerate(pairs):
        fits = [any(matches(pattern, p.path) for p in parameter.places) for parameter in parameters]
        mine = [i for i, fit in enumerate(fits) if fit and taken[i] is None]
        if parameters and pattern != "**" and not mine:
            raise ValueError(_idle(pattern, fits, taken, pairs, parameters))
        for i in mine:
            taken[i] = index
    missed = [parameters[i] for i, index in enumerate(taken) if index is None]
    if missed:
        raise ValueError(
            f"rule has no pair for {listed(missed)}: end it with ('**', False), ('**', True) or "
            "('**', 'default')"
        )
    decisions = [
        (False, "frozen") if parameter.frozen else _decision(parameter, *pairs[index or 0])
        for parameter, index in zip(parameters, taken, strict=True)
    ]
    asked = [parameter for parameter in parameters if not parameter.frozen]
    if callable(rule) and asked and all(decision is False for decision, _ in decisions):
        raise ValueError(
            f"rule {_named(rule)} says False of all of {listed(asked)}: for no decay at all, pass "
            "[('**', False)]"
        )
    return decisions


def _pairs(rule: Rule) -> list[tuple[str, Decision]]:
    """Bring each form of a rule into one: pairs, the first of which wins that matches."""
    if isinstance(rule, str):
        return [("**", "default")] if rule == "default" else [(rule, True), ("**", False)]
    if callable(rule):
        return [("**", rule)]
    if not isinstance(rule, Sequence) or not rule:
        raise TypeError(
            "rule must be 'default', a glob such as '**/kernel', a function (path, leaf, kind) -> "
            f"bool, or a list of pairs (glob, bool or rate), but it is {rule!r}"
        )
    for position, pair in enumerate(rule):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(
                f"rule[{position}] must be a pair (glob, bool or rate), but it is {pair!r}"
            )
        if pair[1] != "default" and not callable(pair[1]):
            _check_decision(f"rule[{position}], '{pair[0]}',", pair[1])
    return [(pattern, decision) for pattern, decision in rule]


def _decision(parameter: Parameter, pattern: str, decision: Decision) -> tuple[Any, str]:
    if isinstance(decision, str):
        return _by_default(parameter)
    if not callable(decision):
        return decision, pattern
    said = [decision(place.path, parameter.leaf, place.kind) for place in parameter.places]
    name = _named(decision)
    for each in said:
        _check_decision(f"rule {name} at '{parameter.path}'", each)
    first, *others = said
    if any(each != first for each in others):
        paths = " and ".join(f"'{place.path}'" for place in parameter.places)
        raise ValueError(f"rule {name} says {said} of {paths}, which are one parameter")
    return first, name


def _named(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_decision(what: str, decision: Any) -> None:
    if not isinstance(decision, bool):
        check_coefficient(what, decision, fix="give True, False, or the rate of its decay")


def _by_default(parameter: Parameter) -> tuple[bool, str]:
    decisions = [_recipe(place, len(parameter.leaf.shape)) for place in parameter.places]
    # Tied to an embedding, an output layer is an embedding.
    sure = sorted(decision for decision in decisions if decision is not None)
    if not sure:
        raise ValueError(
            f"the default rule cannot tell what {listed([parameter])} is, by its name and its "
            f"module: say it ahead of the default, rule=[('{parameter.places[0].path}', False), "
            "('**', 'default')]"
        )
    return sure[0]


def _recipe(place: Place, ndim: int) -> tuple[bool, str] | None:
    """Say whether a parameter decays and as what; None where name and module do not tell.

    The number of dimensions would not do: a bias of stacked layers has two. It only keeps a vector
    called weight, which the scale of an unknown norm may be, from passing for a kernel.
    """
    said = words(place.name)
    named = set(said)
    # `b1` is a bias, the `B` of a product of matrices is none.
    is_b = said[:1] == ["b"] and place.name.startswith("b")
    if named & _BIASES or said[:1] in (["beta"], ["offset"]) or is_b:
        return False, "bias"
    if place.kind == "norm" and (place.certain or not named & _KERNELS):
        return False, "norm"
    if named & _SCALES or said[-1:] == ["g"]:
        return False, "scale"
    if place.kind == "activation":
        return False, "activation"
    if named & _KERNELS:
        return True, "kernel"
    if named & _EMBEDDINGS or (place.kind == "embedding" and place.certain):
        return False, "embedding"
    # A layer called embed may be linear, as that of image patches is.
    if named & _WEIGHTS and place.kind != "embedding" and (place.kind or ndim > 1):
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
    """Read off a name, of a class or of an attribute, what kind of module it may be."""
    if "prelu" in name.lower():
        return ["activation"]
    said = words(name)
    # Norms of weights wrap other layers.
    norms = _NORMS if not {"weight", "spectral"} & set(said) else set()
    kinds = {"norm": norms | {w for w in said if norms and w.endswith("norm")}, **_KINDS}
    return [kind for word in said for kind, known in kinds.items() if word in known]


def kind_of_class(cls: type) -> tuple[str, bool]:
    """Say of what kind a class is: its last word does, so a LayerNormLSTMCell is recurrent."""
    names = [base.__name__ for base in cls.__mro__]
    kind = next((kinds[-1] for name in names if (kinds := _kinds_of(name))), "")
    # The class of a patch embedding may own the kernel of a convolution.
    return kind, kind != "embedding" or not {"Embed", "Embedding"}.isdisjoint(names)


def kind_of_attribute(name: str) -> tuple[str, bool]:
    """Guess of what kind a module is by what it is called: a norm if it says so anywhere."""
    kinds = _kinds_of(name)
    return "norm" if "norm" in kinds else "".join(kinds[-1:]), False


def _idle(
    pattern: str,
    fits: Sequence[bool],
    taken: Sequence[int | None],
    pairs: Sequence[tuple[str, Decision]],
    parameters: Sequence[Parameter],
) -> str:
    """Describe a pattern that decides nothing."""
    takers = [index for fit, index in zip(fits, taken, strict=True) if fit]
    earlier = [pairs[index][0] for index in takers if index is not None]
    if earlier:
        return (
            f"rule has '{pattern}' behind '{earlier[0]}', which takes all that it matches: the "
            "first pair that matches wins, so put the special ones first"
        )
    return f"rule has '{pattern}', which matches none of {listed(parameters)}"


def listed(parameters: Sequence[Parameter]) -> str:
    """List the first few parameters, for a message."""
    shown = ", ".join(f"'{p.places[0].path}' {list(p.leaf.shape)}" for p in parameters[:5])
    return shown + f", ... ({len(parameters)} in all)" * (len(parameters) > 5)


def bools(parameters: Sequence[Parameter], rule: Rule) -> list[bool]:
    """Say of each parameter whether it decays.

    Raises:
        TypeError: The rule gives a rate.
        ValueError: The rule does not cover a parameter, or has a pair that decides nothing.
    """
    decisions = _apply_rule(parameters, rule)
    for parameter, (decision, why) in zip(parameters, decisions, strict=True):
        if not isinstance(decision, bool):
            raise TypeError(
                f"rule {why} gives '{parameter.path}' the rate {decision!r}, but a mask says only "
                "whether a parameter decays: for rates take decay_rates"
            )
    return [decision for decision, _ in decisions]


def rates(parameters: Sequence[Parameter], weight_decay: Any, rule: Rule) -> list[tuple[Any, str]]:
    """Return of each parameter its rate of decay, and what in the rule decided it.

    Raises:
        TypeError: `weight_decay`, or a rate of the rule, is not a number.
        ValueError: One is negative or not finite, or the rule does not fit the parameters.
    """
    check_coefficient("weight_decay", weight_decay, fix="pass 0.0 for none")

    def rate(decision: Any) -> Any:
        return (weight_decay if decision else 0.0) if isinstance(decision, bool) else decision

    return [(rate(decision), why) for decision, why in _apply_rule(parameters, rule)]
