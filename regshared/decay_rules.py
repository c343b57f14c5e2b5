"""Rules that select the parameters that receive weight decay, by name, shape and module.

A rule is one of

    "default"                               common recipes: kernels decay, the rest does not
    "huggingface", "timm"                   the choices of these libraries, see below
    "**/kernel"                             a glob: what it matches decays, the rest does not
    lambda path, leaf, kind: leaf.ndim > 1  a function that returns True, False or a rate
    [("head/**", 0.1), ("**", "default")]   pairs: the first whose glob matches a parameter wins

and is read from top to bottom like `if`, `elif`, `else`. A pair gives True (decays, at the call's
`weight_decay`), False, a rate, a function, "default", "huggingface" or "timm". In a glob `*`, `?`
and `[...]` stay within one component of the path, `**` spans any number of them, and a glob without
a slash is compared with the last component, so "bias" is "**/bias". A dot counts as a slash, in
globs and in PyTorch's names: "encoder/*/weight" is "encoder.*.weight". A glob that decides nothing
and a parameter that no pair covers are errors.

The default rule uses names and the class of the owning module, never the number of dimensions: a
bias of stacked layers has two. It tests, in this order,

    bias        b, bias, beta, offset, in_proj_bias, sinks, ...       does not decay
    norm        every parameter of a norm                             does not decay
    scale       scale, gamma, logit_scale, lambda_1, temperature,
                gain, alpha, A_log, ls, ...                           does not decay
    activation  the slope of a PReLU                                  does not decay
    kernel      kernel                                                decays
    embedding   embedding, embeddings, pos_embedding, cls_token,
                probe, latents, query (not of an attention), ...,
                and every parameter of an embedding module            does not decay
    kernel      weight, w, weight_ih, in_proj_weight, lora_a, ...     decays

and raises one error for all others, with a rule that covers them. Two more are errors: a weight
whose module is only called "embed", which may be linear, as in a patch embedding, and a vector
called weight in an unknown module, which may be a norm.

"huggingface" is the choice of the Trainer of transformers: all parameters decay but those of a
LayerNorm and those whose name contains bias, layernorm, rmsnorm or the word norm. "timm" is that of
timm's optimizers: all decay but scalars, vectors, names that end in ".bias" and, in PyTorch, those
that the model lists in `no_weight_decay()`. Under both, embeddings decay unless they are listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regshared.checks import check_coefficient
from regshared.globs import components, matches, words

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
        owner: The class of that module; `object` if unknown.
    """

    path: str
    name: str
    kind: str
    certain: bool
    owner: type = object


class Parameter(NamedTuple):
    """A parameter, as a rule sees it.

    Attributes:
        path: Its name in its own framework.
        places: Its places in the model; a tied parameter has several.
        leaf: The array.
        frozen: Whether it receives no gradient.
        listed: Whether the model lists it in `no_weight_decay()`, as those of timm do.
    """

    path: str
    places: tuple[Place, ...]
    leaf: Any
    frozen: bool
    listed: bool = False


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
    decisions: list[tuple[Any, str]] = []
    unknown = []
    for parameter, index in zip(parameters, deciders, strict=True):
        found = _FROZEN if parameter.frozen else _decision(parameter, *pairs[index or 0])
        decisions.append(found or _FROZEN)
        unknown += [] if found else [parameter]
    if unknown:
        raise ValueError(_describe_unknown(unknown, parameters, pairs))
    trainable = [parameter for parameter in parameters if not parameter.frozen]
    if callable(rule) and trainable and all(decision is False for decision, _ in decisions):
        raise ValueError(
            f"rule must select a parameter; got False from {_named(rule)} for all of "
            f"{listed(trainable)}. Pass [('**', False)] for no decay at all."
        )
    return decisions


_FROZEN = (False, "frozen")


def _pairs(rule: Rule) -> list[tuple[str, Decision]]:
    """Return a rule of any form as pairs, of which the first match wins."""
    if isinstance(rule, str):
        return [("**", rule)] if rule in _RECIPES else [(rule, True), ("**", False)]
    if callable(rule):
        return [("**", rule)]
    if not isinstance(rule, Sequence) or not rule:
        raise TypeError(
            "rule must be 'default', 'huggingface', 'timm', a glob such as '**/kernel', a function "
            f"(path, leaf, kind) -> bool, or a list of pairs (glob, bool or rate); got {rule!r}."
        )
    for position, pair in enumerate(rule):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"rule[{position}] must be a pair (glob, bool or rate); got {pair!r}.")
        is_recipe = isinstance(pair[1], str) and pair[1] in _RECIPES
        if not is_recipe and not callable(pair[1]):
            _check_decision(f"rule[{position}], '{pair[0]}',", pair[1])
    return [(pattern, decision) for pattern, decision in rule]


def _decision(parameter: Parameter, pattern: str, decision: Decision) -> tuple[Any, str] | None:
    """Return the decision and its reason; None if it is the default rule's and is unknown."""
    if isinstance(decision, str):
        return _RECIPES[decision](parameter)
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


def _by_default(parameter: Parameter) -> tuple[bool, str] | None:
    decisions = [_category(place, len(parameter.leaf.shape)) for place in parameter.places]
    # An output layer tied to an embedding is an embedding.
    return min((decision for decision in decisions if decision is not None), default=None)


def _by_huggingface(parameter: Parameter) -> tuple[bool, str]:
    """Decide as `Trainer.get_decay_parameter_names` of transformers, by the first name."""
    place = parameter.places[0]
    names = components(place.path)
    is_norm = any(
        base.__name__ == "LayerNorm" and base.__module__.partition(".")[0] in _LIBRARIES
        for base in place.owner.__mro__
    )
    if place.owner is object and len(names) > 1:  # a dict, as in Linen: only names are known
        called = words(names[-2])
        is_norm = "ln" in called or {"layer", "norm"} <= set(called)
    if is_norm and len(names) > 1:  # a model that is a LayerNorm itself decays
        return False, "LayerNorm"
    found = _NAMES_OF_HUGGINGFACE.search(".".join(names).lower())
    return (False, found[0].strip("._")) if found else (True, "huggingface")


_LIBRARIES = {"torch", "flax", "equinox"}
_NAMES_OF_HUGGINGFACE = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")


def _by_timm(parameter: Parameter) -> tuple[bool, str]:
    """Decide as `param_groups_weight_decay` of timm."""
    if len(parameter.leaf.shape) <= 1:
        return False, "vector"
    if components(parameter.places[0].path)[1:][-1:] == ["bias"]:
        return False, "bias"
    return (False, "no_weight_decay") if parameter.listed else (True, "timm")


_RECIPES = {"default": _by_default, "huggingface": _by_huggingface, "timm": _by_timm}


def _category(place: Place, ndim: int) -> tuple[bool, str] | None:
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
    # The query of an attention may be its projection; elsewhere it is learned, like a token.
    inputs = _INPUTS - {"query", "queries"} if place.kind == "attention" else _INPUTS
    is_input = unique & inputs and not unique & _WEIGHTS
    if unique & _EMBEDDINGS or is_input or (place.kind == "embedding" and place.certain):
        return False, "embedding"
    # A layer called embed may be linear, as in a patch embedding.
    # A vector in a module that is only called attention may scale its output.
    is_layer = place.kind != "" and (place.certain or place.kind != "attention")
    if unique & _WEIGHTS and place.kind != "embedding" and (is_layer or ndim > 1):
        return True, "kernel"
    return None


_BIASES = {"bias", "biases", "sink", "sinks"}  # sinks are added to attention's scores
_SCALES = {"scale", "scales", "gamma", "lambda", "temperature", "gain", "alpha", "log", "ls"}
_KERNELS = {"kernel", "kernels"}
_WEIGHTS = {"weight", "weights", "w", "lora", "proj", "projection"}
_TABLES = {"embedding", "embeddings", "embed", "embeds", "embedder", "emb", "embs", "wte", "wpe"}
_EMBEDDINGS = _TABLES | {"pos", "position", "positional", "token", "tokens", "cls"}
_INPUTS = {"probe", "latent", "latents", "query", "queries"}
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


def _describe_unknown(
    unknown: Sequence[Parameter],
    parameters: Sequence[Parameter],
    pairs: Sequence[tuple[str, Decision]],
) -> str:
    """Return the error for all parameters that the default rule does not know, with a rule.

    Paths that differ in numbers share a glob, unless it would match a parameter that is known.
    """
    known = [place.path for p in parameters if p not in unknown for place in p.places]
    globs: dict[str, list[Parameter]] = {}
    for parameter in unknown:
        path = parameter.places[0].path
        glob = re.sub(r"(?<![^/])\d+(?![^/])", "*", path)
        shared = not any(matches(glob, other) for other in known)
        globs.setdefault((glob if shared else path) or "**", []).append(parameter)
    found = ", ".join(
        f"'{glob}' {list(members[0].leaf.shape)}"
        + f" ({len(members)} parameters)" * (len(members) > 1)
        for glob, members in globs.items()
    )
    guesses = [(glob, any(map(_may_be_kernel, members))) for glob, members in globs.items()]
    others = [(pattern, _Verbatim(decision)) for pattern, decision in pairs]
    return (
        "rule must have a pair for each parameter whose name and module 'default' does not know; "
        f"got none for {found}. If these are kernels where it has True, pass "
        f"rule={[*guesses, *others]}."
    )


def _may_be_kernel(parameter: Parameter) -> bool:
    """Guess: a vector, an array for a batch of one, or a matrix in an embedding is no kernel."""
    shape = parameter.leaf.shape
    return len(shape) > 1 + (parameter.places[0].kind == "embedding") and shape[0] != 1


class _Verbatim:
    """A decision as it is written in a rule; a function has its name."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision

    def __repr__(self) -> str:
        return _named(self.decision) if callable(self.decision) else repr(self.decision)


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
