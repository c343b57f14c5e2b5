"""What decays: one language of rules over the name, the shape and the module of a parameter.

A rule is one of

    "default"                               what good recipes do: kernels decay, the rest does not
    "**/weight"                             a glob: what it matches decays, the rest does not
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

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from regtorch._decay import check_coefficient
from regtorch._paths import components, matches, words

if TYPE_CHECKING:
    from torch import Tensor

    Verdict = bool | float | str | Callable[[str, Any, str], Any]
    Rule = str | Callable[[str, Any, str], Any] | Sequence[tuple[str, Verdict]]


def decay_mask(module: nn.Module, rule: Rule = "default") -> dict[str, bool]:
    """Say of each parameter whether it decays.

    For the `mask` of `regtorch.l2_penalty` and of `regtorch.optim`; for `torch.optim` itself see
    `decay_groups`.

    Args:
        module: The model.
        rule: `"default"`, a glob, a function `(path, tensor, kind)`, or pairs of glob and verdict:
            the head of the file `regtorch/_rules.py` describes them. Paths are the names of
            `named_parameters()` with slashes for dots. `kind` is 'linear', 'conv', 'embedding',
            'norm', 'attention', 'recurrent', 'activation' or empty: of the class of the module that
            owns the parameter, and where that is no class of `torch.nn`, what its name suggests.

    Returns:
        From each name of `named_parameters()` to a bool. Frozen parameters, `requires_grad=False`,
        are False: torch.optim skips what has no gradient. Call again after unfreezing.

        A tied parameter has one name here, the first, but counts with all its places: a glob
        matches it if it matches one of them, and to the default rule the weight that an output
        layer shares with an embedding is an embedding.

    Raises:
        TypeError: `module` is none, `rule` has another form, or says something else than True or
            False: for rates, see `decay_rates`.
        ValueError: A glob decides nothing; no pair covers a parameter; the default rule does not
            know one; a function says False of everything. The message names the glob and paths.

    JAX: `regjax.decay_mask(params, rule)`, by the same rules. A JAX array does not know whether it
    gets a gradient, so there `frozen` names those that get none.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> decay_mask(model)
        {'0.weight': True, '0.bias': False, '1.weight': False, '1.bias': False}
        >>> decay_mask(model, [("bias", True), ("**", "default")])
        {'0.weight': True, '0.bias': True, '1.weight': False, '1.bias': True}
        >>> decay_mask(model, "encoder/**")
        Traceback (most recent call last):
        ValueError: rule has 'encoder/**', which matches none of '0/weight' [3, 2], '0/bias' [3],
        '1/weight' [3], '1/bias' [3]
    """
    parameters = _parameters(module)
    return dict(zip(_names(parameters), _bools(parameters, rule), strict=True))


def decay_rates(
    module: nn.Module, weight_decay: float = 1.0, rule: Rule = "default"
) -> dict[str, float]:
    """Say of each parameter how strongly it decays.

    Args:
        module: As in `decay_mask`.
        weight_decay: The rate of what the rule says True of.
        rule: As in `decay_mask`; a verdict may be a rate, which stands as it is.

    Returns:
        From each name of `named_parameters()` to a number, 0.0 where nothing decays.

    Raises:
        TypeError: As `decay_mask` does, or a rate is no number.
        ValueError: As `decay_mask` does, or a rate is negative, infinite or NaN.

    JAX: `regjax.decay_rates(params, weight_decay, rule)`, for `regjax.optim.add_decay_by_leaf`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> decay_rates(model, 0.1, [("1/weight", 0.5), ("**", "default")])
        {'0.weight': 0.1, '0.bias': 0.0, '1.weight': 0.5, '1.bias': 0.0}
    """
    parameters = _parameters(module)
    rates = (rate for rate, _ in _rates(parameters, weight_decay, rule))
    return dict(zip(_names(parameters), rates, strict=True))


def decay_groups(
    module: nn.Module, weight_decay: float, rule: Rule = "default"
) -> list[dict[str, Any]]:
    """Make parameter groups for `torch.optim`, of which only the right ones decay.

    Args:
        module: As in `decay_mask`.
        weight_decay: The rate of what the rule says True of.
        rule: As in `decay_rates`.

    Returns:
        One group for each rate, in the order in which they come, with the names of the parameters
        in it, as `named_parameters()` gives them to an optimizer. Frozen parameters are in none:
        after unfreezing, make the groups anew. A parameter that requires a gradient and is not used
        is in one, yet torch.optim skips it as long as its gradient is None, and optax would not.

    Raises:
        TypeError: As `decay_rates` does.
        ValueError: As `decay_rates` does, or nothing requires a gradient.

    JAX: `regjax.optim.adamw(..., mask=regjax.decay_mask)`, or, with more than one rate,
    `regjax.optim.add_decay_by_leaf(regjax.decay_rates(params, ...))`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> groups = decay_groups(model, 0.1)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)

    References:
        Loshchilov and Hutter, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101),
        ICLR 2019.
    """
    parameters = _parameters(module)
    groups: dict[float, list[tuple[str, Tensor]]] = {}
    for parameter, (rate, _) in zip(
        parameters, _rates(parameters, weight_decay, rule), strict=True
    ):
        if not parameter.frozen:
            groups.setdefault(float(rate), []).append((parameter.path, parameter.leaf))
    if not groups:
        raise ValueError(
            "module has no parameter that requires a gradient, so there is nothing to optimize: "
            "call module.requires_grad_() first"
        )
    return [{"params": members, "weight_decay": rate} for rate, members in groups.items()]


def decay_table(module: nn.Module, weight_decay: float = 1.0, rule: Rule = "default") -> DecayTable:
    """List which parameter decays, at what rate, and why.

    Args:
        module: As in `decay_mask`.
        weight_decay: The rate of what the rule says True of.
        rule: As in `decay_rates`.

    Returns:
        A table to print, with totals, and to walk through: its rows have the fields of `DecayRow`.

    Raises:
        TypeError: As `decay_rates` does.
        ValueError: As `decay_rates` does.

    JAX: `regjax.decay_table(params, weight_decay, rule)`.

    Examples:
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
    return _table(parameters, _rates(parameters, weight_decay, rule))


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


class Total(NamedTuple):
    """How many leaves, and how many numbers there are in them."""

    leaves: int
    parameters: int


class DecayRow(NamedTuple):
    """One parameter of a `DecayTable`.

    Attributes:
        path: Its name.
        shape: Its shape.
        dtype: The name of its dtype.
        size: How many numbers it has.
        kind: Of its module: linear, conv, embedding, norm, attention, recurrent, activation, or
            empty where nothing tells.
        rule: What decided: the glob of a pair, the name of a function, 'frozen', or the reason that
            the default rule has (bias, embedding, kernel, norm, ...).
        weight_decay: Its coefficient.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kind: str
    rule: str
    weight_decay: float


@dataclass(frozen=True)
class DecayTable:
    """Which parameter decays, and why: rows to compute with, and a text to read.

    Attributes:
        rows: One for each parameter, in the order of the model.

    Examples:
        >>> row = DecayRow("kernel", (2, 3), "float32", 6, "linear", "kernel", 0.1)
        >>> table = DecayTable((row, row._replace(path="bias", weight_decay=0.0)))
        >>> len(table), table.decaying, table.exempt.leaves
        (2, Total(leaves=1, parameters=6), 1)
    """

    rows: tuple[DecayRow, ...]

    def __iter__(self) -> Iterator[DecayRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def decaying(self) -> Total:
        """How much decays."""
        return _total(row for row in self.rows if row.weight_decay)

    @property
    def exempt(self) -> Total:
        """How much does not."""
        return _total(row for row in self.rows if not row.weight_decay)

    def __str__(self) -> str:
        cells = _cells(self.rows)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
                for title, cell, width in zip(DecayRow._fields, row, widths, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self._summary()])

    def to_markdown(self) -> str:
        """Write the table for a notebook or a report."""
        head, *body = [f"| {' | '.join(row)} |" for row in _cells(self.rows, escape=True)]
        ruler = "|".join("---:" if title in _NUMBERS else "---" for title in DecayRow._fields)
        return "\n".join([head, f"|{ruler}|", *body, "", self._summary()])

    def _summary(self) -> str:
        some, everything = self.decaying, _total(self.rows)
        return (
            f"decay: {some.leaves} of {everything.leaves} leaves, "
            f"{some.parameters:,} of {everything.parameters:,} parameters"
        )


_NUMBERS = ("size", "weight_decay")


def _total(rows: Iterable[DecayRow]) -> Total:
    sizes = [row.size for row in rows]
    return Total(len(sizes), sum(sizes))


def _cells(rows: Iterable[DecayRow], *, escape: bool = False) -> list[tuple[str, ...]]:
    def text(title: str, value: Any) -> str:
        if title == "size":
            return f"{value:,}"
        if title == "weight_decay":
            return f"{value:g}" if value else "-"
        plain = str(value) or "-"
        return plain.replace("*", r"\*").replace("|", r"\|") if escape else plain

    return [
        DecayRow._fields,
        *(tuple(map(text, DecayRow._fields, row)) for row in rows),
    ]


def _judge(parameters: Sequence[Parameter], rule: Rule) -> list[tuple[Any, str]]:
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
            f"rule has no pair for {_listed(missed)}: end it with ('**', False), ('**', True) or "
            "('**', 'default')"
        )
    verdicts = [
        (False, "frozen") if parameter.frozen else _verdict(parameter, *pairs[index or 0])
        for parameter, index in zip(parameters, taken, strict=True)
    ]
    asked = [parameter for parameter in parameters if not parameter.frozen]
    if callable(rule) and asked and all(verdict is False for verdict, _ in verdicts):
        raise ValueError(
            f"rule {_named(rule)} says False of all of {_listed(asked)}: for no decay at all, pass "
            "[('**', False)]"
        )
    return verdicts


def _pairs(rule: Rule) -> list[tuple[str, Verdict]]:
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
            _check_verdict(f"rule[{position}], '{pair[0]}',", pair[1])
    return [(pattern, verdict) for pattern, verdict in rule]


def _verdict(parameter: Parameter, pattern: str, verdict: Verdict) -> tuple[Any, str]:
    if isinstance(verdict, str):
        return _by_default(parameter)
    if not callable(verdict):
        return verdict, pattern
    said = [verdict(place.path, parameter.leaf, place.kind) for place in parameter.places]
    name = _named(verdict)
    for each in said:
        _check_verdict(f"rule {name} at '{parameter.path}'", each)
    if any(each != said[0] for each in said):
        paths = " and ".join(f"'{place.path}'" for place in parameter.places)
        raise ValueError(f"rule {name} says {said} of {paths}, which are one parameter")
    return said[0], name


def _named(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _check_verdict(what: str, verdict: Any) -> None:
    if not isinstance(verdict, bool):
        check_coefficient(what, verdict, fix="give True, False, or the rate of its decay")


def _by_default(parameter: Parameter) -> tuple[bool, str]:
    verdicts = [_recipe(place, len(parameter.leaf.shape)) for place in parameter.places]
    # Tied to an embedding, an output layer is an embedding.
    sure = sorted(verdict for verdict in verdicts if verdict is not None)
    if not sure:
        raise ValueError(
            f"the default rule cannot tell what {_listed([parameter])} is, by its name and its "
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


def _kind_of_class(cls: type) -> tuple[str, bool]:
    """Say of what kind a class is: its last word does, so a LayerNormLSTMCell is recurrent."""
    names = [base.__name__ for base in cls.__mro__]
    kind = next((kinds[-1] for name in names if (kinds := _kinds_of(name))), "")
    # The class of a patch embedding may own the kernel of a convolution.
    return kind, kind != "embedding" or not {"Embed", "Embedding"}.isdisjoint(names)


def _kind_of_attribute(name: str) -> tuple[str, bool]:
    """Guess of what kind a module is by what it is called: a norm if it says so anywhere."""
    kinds = _kinds_of(name)
    return "norm" if "norm" in kinds else "".join(kinds[-1:]), False


def _idle(
    pattern: str,
    fits: Sequence[bool],
    taken: Sequence[int | None],
    pairs: Sequence[tuple[str, Verdict]],
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
    return f"rule has '{pattern}', which matches none of {_listed(parameters)}"


def _listed(parameters: Sequence[Parameter]) -> str:
    shown = ", ".join(f"'{p.places[0].path}' {list(p.leaf.shape)}" for p in parameters[:5])
    return shown + f", ... ({len(parameters)} in all)" * (len(parameters) > 5)


def _bools(parameters: Sequence[Parameter], rule: Rule) -> list[bool]:
    verdicts = _judge(parameters, rule)
    for parameter, (verdict, why) in zip(parameters, verdicts, strict=True):
        if not isinstance(verdict, bool):
            raise TypeError(
                f"rule {why} gives '{parameter.path}' the rate {verdict!r}, but a mask says only "
                "whether a parameter decays: for rates take decay_rates"
            )
    return [verdict for verdict, _ in verdicts]


def _rates(parameters: Sequence[Parameter], weight_decay: Any, rule: Rule) -> list[tuple[Any, str]]:
    check_coefficient("weight_decay", weight_decay, fix="pass 0.0 for none")

    def rate(verdict: Any) -> Any:
        return (weight_decay if verdict else 0.0) if isinstance(verdict, bool) else verdict

    return [(rate(verdict), why) for verdict, why in _judge(parameters, rule)]


def _table(parameters: Sequence[Parameter], rates: Sequence[tuple[Any, str]]) -> DecayTable:
    rows = []
    for parameter, (rate, why) in zip(parameters, rates, strict=True):
        shape = tuple(parameter.leaf.shape)
        dtype = str(parameter.leaf.dtype).removeprefix("torch.")
        kind = parameter.places[0].kind
        rows.append(
            DecayRow(parameter.path, shape, dtype, math.prod(shape), kind, why, float(rate))
        )
    return DecayTable(tuple(rows))


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
            f"module must be a torch.nn.Module, whose layers say what decays, but it is {module!r}"
        )
    names: dict[Tensor, list[str]] = {}
    for name, leaf in module.named_parameters(remove_duplicate=False):
        if isinstance(leaf, nn.parameter.UninitializedParameter):
            raise ValueError(f"'{name}' of a lazy module has no shape yet: call the module once")
        names.setdefault(leaf, []).append(name)
    return [
        Parameter(
            known[0], tuple(_place(module, name) for name in known), leaf, not leaf.requires_grad
        )
        for leaf, known in names.items()
    ]


def _names(parameters: Sequence[Parameter]) -> Iterator[str]:
    return (parameter.path for parameter in parameters)


def _place(module: nn.Module, path: str) -> Place:
    """Say what a parameter is called, and what owns it."""
    *parents, own = path.split(".")
    if parents[-2:-1] == ["parametrizations"]:
        # What torch.nn.utils.parametrize keeps of a weight stands for the weight.
        how = type(_at(module, parents)[0]).__name__
        is_magnitude = (how, own) == ("_WeightNorm", "original0")
        *parents, _, own = parents
        own = "scale" if is_magnitude else own
    owner = _at(module, parents)
    names = [part for part in (*parents, own) if words(part)]
    # A position in a list is no name, and a list of parameters is no owner.
    while isinstance(owner, nn.ParameterList) and parents:
        parents = parents[:-1]
        owner = _at(module, parents)
    name, holder = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    kind, certain = _kind(owner, holder)
    return Place("/".join(components(path)), name, kind, certain)


def _at(module: nn.Module, parents: Sequence[str]) -> Any:
    return module.get_submodule(".".join(parents))


def _kind(owner: nn.Module, holder: str) -> tuple[str, bool]:
    """Say what owns a parameter: by its class where that tells, else by what it is called."""
    for kind, classes in _CLASSES.items():
        if isinstance(owner, classes):
            return kind, True
    kind, certain = _kind_of_class(type(owner))
    return (kind, certain) if kind else _kind_of_attribute(holder)
