"""What decays: one language of rules over the name, the shape and the module of a parameter.

A rule is one of

    "default"                               what good recipes do: kernels decay, the rest does not
    "**/kernel"                             a glob: what it matches decays, the rest does not
    lambda path, leaf, kind: leaf.ndim > 1  a function, which says True, False or a rate
    [("head/**", 0.1), ("**", "default")]   pairs: the first whose glob matches a parameter wins

read from top to bottom like `if`, `elif`, `else`. A pair gives True (decays, at the `weight_decay`
of the call), False, a rate, "default" or a function. In a glob `*`, `?` and `[...]` stay within one
component of the path, `**` spans any number of them, and a glob without a slash is compared with
the last component, so "bias" is "**/bias". A dot counts as a slash. A glob that decides nothing and
a parameter that no pair covers are errors.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax._decay import check_coefficient
from regjax._paths import components, matches, path_name, words

if TYPE_CHECKING:
    from jaxtyping import PyTree, ScalarLike

    Verdict = bool | float | str | Callable[[str, Any, str], Any]
    Rule = str | Callable[[str, Any, str], Any] | Sequence[tuple[str, Verdict]]


def decay_mask(
    params: PyTree, rule: Rule = "default", *, frozen: str | Sequence[str] = ()
) -> PyTree[bool]:
    """Say of each parameter whether it decays.

    For the `mask` of `regjax.optim`, of optax and of `regjax.l2_penalty`; the function itself is a
    mask too, `mask=regjax.decay_mask`, which `flax.nnx.Optimizer` needs.

    Args:
        params: Plain containers, dataclasses, Flax variables, an `nnx.State` or module, an Equinox
            module, Haiku parameters; arrays, tracers or `jax.ShapeDtypeStruct`.
        rule: `"default"`, a glob, a function `(path, leaf, kind)`, or pairs of glob and verdict:
            the head of the file `regjax/_rules.py` describes them. Paths are joined by slashes; the
            `value` inside a Flax variable is not in them. `kind` is 'linear', 'conv', 'embedding',
            'norm', 'attention', 'recurrent', 'activation' or empty: of the class of an Equinox or
            nnx module, and otherwise what its name suggests.
        frozen: Globs of parameters that get no gradient. PyTorch skips these, while optax decays
            every parameter: name them here, and a zero gradient leaves them as they are.

    Returns:
        A tree of bools with the structure of `params`. What is no parameter is False: leaves that
        are no float or complex arrays, Flax's `batch_stats`, `cache`, `intermediates` and
        `perturbations` beside `params`, variables of nnx that are no `Param`, states of Equinox.

    Raises:
        TypeError: `rule` has another form, or says something else than True or False: for rates,
            see `decay_rates`.
        ValueError: A glob decides nothing; no pair covers a parameter; the default rule does not
            know one; a function says False of everything. The message names the glob and paths.

    PyTorch: `regtorch.decay_mask(module, rule)`, by the same rules, where frozen is what does not
    require a gradient.

    Examples:
        >>> import jax.numpy as jnp
        >>> norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": norm}
        >>> decay_mask(params)
        {'dense': {'bias': False, 'kernel': True}, 'norm': {'bias': False, 'scale': False}}
        >>> decay_mask(params, [("bias", True), ("**", "default")])
        {'dense': {'bias': True, 'kernel': True}, 'norm': {'bias': True, 'scale': False}}
        >>> decay_mask(params, "encoder/**")
        Traceback (most recent call last):
        ValueError: rule has 'encoder/**', which matches none of 'dense/bias' [3],
        'dense/kernel' [2, 3], 'norm/bias' [3], 'norm/scale' [3]
    """
    parameters = _parameters(params, frozen)
    return _tree(params, parameters, _bools(_present(parameters), rule), False)


def decay_rates(
    params: PyTree,
    weight_decay: ScalarLike = 1.0,
    rule: Rule = "default",
    *,
    frozen: str | Sequence[str] = (),
) -> PyTree[ScalarLike]:
    """Say of each parameter how strongly it decays.

    For `regjax.optim.add_decay_by_leaf`. Under a schedule give the default `weight_decay` here, and
    the schedule there.

    Args:
        params: As in `decay_mask`.
        weight_decay: The rate of what the rule says True of.
        rule: As in `decay_mask`; a verdict may be a rate, which stands as it is.
        frozen: As in `decay_mask`.

    Returns:
        A tree of numbers with the structure of `params`, 0.0 where nothing decays.

    Raises:
        TypeError: As `decay_mask` does, or a rate is no number.
        ValueError: As `decay_mask` does, or a rate is negative, infinite or NaN.

    PyTorch: `regtorch.decay_rates(module, weight_decay, rule)`, or ready for an optimizer
    `regtorch.decay_groups`.

    Examples:
        >>> import jax.numpy as jnp, optax, regjax
        >>> layer = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> params = {"stem": layer, "head": layer}
        >>> rates = decay_rates(params, 0.1, [("head/kernel", 0.5), ("**", "default")])
        >>> rates
        {'head': {'bias': 0.0, 'kernel': 0.5}, 'stem': {'bias': 0.0, 'kernel': 0.1}}
        >>> adamw = optax.chain(
        ...     optax.scale_by_adam(),
        ...     regjax.optim.add_decay_by_leaf(rates),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )
    """
    parameters = _parameters(params, frozen)
    rates = [rate for rate, _ in _rates(_present(parameters), weight_decay, rule)]
    return _tree(params, parameters, rates, 0.0)


def decay_table(
    params: PyTree,
    weight_decay: float = 1.0,
    rule: Rule = "default",
    *,
    frozen: str | Sequence[str] = (),
) -> DecayTable:
    """List which parameter decays, at what rate, and why.

    Args:
        params: As in `decay_mask`.
        weight_decay: The rate of what the rule says True of.
        rule: As in `decay_rates`.
        frozen: As in `decay_mask`.

    Returns:
        A table to print, with totals, and to walk through: its rows have the fields of `DecayRow`.
        What is no parameter is not in it.

    Raises:
        TypeError: As `decay_rates` does.
        ValueError: As `decay_rates` does.

    PyTorch: `regtorch.decay_table(module, weight_decay, rule)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3))}, "LayerNorm_0": norm}
        >>> table = decay_table(params, 0.01)
        >>> print(table)
        path               shape   dtype    size  kind    rule    weight_decay
        Dense_0/kernel     (2, 3)  float32     6  linear  kernel          0.01
        LayerNorm_0/bias   (3,)    float32     3  norm    bias               -
        LayerNorm_0/scale  (3,)    float32     3  norm    norm               -
        decay: 1 of 3 leaves, 6 of 12 parameters
        >>> [row.path for row in table if row.weight_decay], table.exempt.parameters
        (['Dense_0/kernel'], 6)
    """
    parameters = _present(_parameters(params, frozen))
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


def _parameters(params: PyTree, frozen: str | Sequence[str]) -> list[Parameter | None]:
    """List the leaves in the order of `jax.tree.leaves`, and None for what is no parameter."""
    leaves = list(_leaves(params, _Node()))
    patterns = [frozen] if isinstance(frozen, str) else list(frozen)
    present = _present(leaves)
    for pattern in patterns:
        if present and not any(matches(pattern, leaf.path) for leaf in present):
            raise ValueError(f"frozen has '{pattern}', which matches none of {_listed(present)}")
    return [
        leaf and leaf._replace(frozen=any(matches(pattern, leaf.path) for pattern in patterns))
        for leaf in leaves
    ]


def _present(leaves: Sequence[Parameter | None]) -> list[Parameter]:
    return [leaf for leaf in leaves if leaf is not None]


def _tree(
    params: PyTree, parameters: Sequence[Parameter | None], answers: Iterable[Any], otherwise: Any
) -> PyTree:
    """Put the answers in the places of the parameters, and one in the places of all else."""
    rest = iter(answers)
    leaves = [otherwise if parameter is None else next(rest) for parameter in parameters]
    return jax.tree.structure(params).unflatten(leaves)


# What Flax keeps beside the parameters.
_COLLECTIONS = {"batch_stats", "cache", "intermediates", "params_axes", "perturbations"}


class _Node(NamedTuple):
    """Where a walk through a tree stands.

    Attributes:
        path: The components so far.
        owner: The class of the innermost node that has attributes, where no dict is inside it.
        is_parameter: Whether a float array here is a parameter.
    """

    path: tuple[str, ...] = ()
    owner: type | None = None
    is_parameter: bool = True


def _leaves(tree: PyTree, node: _Node) -> Iterator[Parameter | None]:
    if jax.tree_util.all_leaves([tree]):
        dtype = getattr(tree, "dtype", None)
        is_array = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
        yield _parameter(tree, node) if node.is_parameter and is_array else None
        return
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    for path, child in children:
        if path:  # not the child of a None, which has none
            yield from _leaves(child, _step(tree, node, path))


def _step(tree: PyTree, node: _Node, path: tuple[Any, ...]) -> _Node:
    name = path_name(path)
    ancestors = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(tree).__mro__}
    if "flax.Variable" in ancestors or (name == "value" and "flax.AxisMetadata" in ancestors):
        # A box around the array: its name is that of the box.
        is_variable = "flax.Variable" in ancestors
        is_parameter = node.is_parameter and (not is_variable or "flax.Param" in ancestors)
        return node._replace(is_parameter=is_parameter)
    owner = node.owner
    if isinstance(tree, Mapping):
        owner = None
    elif not name.isdigit():
        owner = type(tree)
    is_parameter = node.is_parameter and type(tree).__name__ != "StateIndex"
    if not node.path and isinstance(tree, Mapping) and "params" in tree:
        is_parameter = name not in _COLLECTIONS
    return _Node((*node.path, name), owner, is_parameter)


def _parameter(leaf: Any, node: _Node) -> Parameter:
    path = "/".join(node.path)
    # Positions in a list and Haiku's ~ are no names.
    names = [part for part in components(path) if words(part)]
    name, holder = names[-1] if names else "", names[-2] if len(names) > 1 else ""
    kind, certain = _kind(node.owner, holder)
    return Parameter(path, (Place(path, name, kind, certain),), leaf, frozen=False)


def _kind(owner: type | None, holder: str) -> tuple[str, bool]:
    """Say what owns a parameter: by its class where it has one, else by what it is called."""
    kind, certain = _kind_of_class(owner) if owner else ("", False)
    return (kind, certain) if kind else _kind_of_attribute(holder)
