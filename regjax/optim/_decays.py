r"""Decays beyond L2, as links of an optax chain: L1, L2-SP, independent, cautious and by the leaf.

The place of a link in the chain decides what it does. With $u$ for the updates that reach it:

    coupled      optax.chain(add_l1_decay(c), optim.adam(lr))
    decoupled    optax.chain(optim.adam(1.0), optax.scale(-1.0), add_l1_decay(c),
                             optax.scale_by_learning_rate(lr))
    independent  optax.chain(optim.adam(lr), add_independent_weight_decay(c))

Coupled decay is part of the gradient and passes through momentum and moments: it equals a penalty
in the loss, and is clipped where a clipping follows it. Decoupled decay joins the finished step
$u$, which is an optimizer of learning rate 1, negated, before the learning rate multiplies both.
Independent decay joins after the learning rate.

Each `weight_decay` may be a schedule, from the step, counted from 0, to the coefficient, such as
the rising cosine of DINO. Half types are computed in float32 and rounded once per link. The elastic
net is two links, `optax.chain(add_l1_decay(l1), optax.add_decayed_weights(2 * l2))`, for what
`regjax.elastic_net_penalty(params, l1, l2)` is in the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax._decay.paths import named_leaves, path_name
from regjax._decay.validation import check_reference, resolve_mask, resolve_reference, resolve_scale
from regjax.optim._gradients import is_array
from regjax.optim._links import check_mask, is_zero, rounded_once
from regshared.checks import check_callable, check_coefficient, check_integer

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Inexact, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay

    Leaf = Inexact[Array, "*shape"]


def add_l1_decay(weight_decay: WeightDecay, mask: Mask = None) -> optax.GradientTransformation:
    r"""Add the sign of the parameters, times a coefficient: L1 decay.

    $$u \leftarrow u + \lambda_t \operatorname{sign}(w), \qquad \operatorname{sign}(0) = 0$$

    At the head of a chain this is coupled decay and the same at every step as
    `regjax.l1_penalty(params, weight_decay)` in the loss: no factor 2. Behind the moments it is
    decoupled, and no penalty does the same.

    Args:
        weight_decay: $\lambda$: a finite number, not negative, or a schedule from the step, counted
            from 0, to it.
        mask: Which parameters decay: `None` (all), a tree of bools with their structure or a prefix
            of it, or a function from the parameters to such a tree.

    Returns:
        An optax transformation. Its state is `optax.ScaleByScheduleState` (the step count) with a
        schedule, and empty without.

    Raises:
        TypeError: `weight_decay` is not a number, or a leaf of the mask not a bool.
        ValueError: `weight_decay` is negative, infinite or NaN; a mask that is False for all; from
            `init`, a mask of another structure than the parameters; from `update`, no `params`.

    PyTorch: `regtorch.optim.add_l1_decay(optimizer, weight_decay)`; torch itself has no L1 decay.
    Before `maximize=True`, which negates all that reaches it, the decay would grow the parameters:
    put `optax.scale(-1.0)` ahead of the decay instead. For a complex number $w / |w|$ is added.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([2.0, -2.0, 0.0])
        >>> optimizer = optax.chain(add_l1_decay(0.5), optax.sgd(0.1))
        >>> updates, _ = optimizer.update(jnp.ones(3), optimizer.init(params), params)
        >>> updates
        Array([-0.15, -0.05, -0.1 ], dtype=float32)

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 58(1), 1996.
    """
    return _decay(weight_decay, mask, lambda c, u, w, _: u + c * jnp.sign(w))


def add_l2_sp_decay(
    reference: PyTree, weight_decay: WeightDecay, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Add the way back to a starting point, times a coefficient: L2-SP.

    $$u \leftarrow u + \lambda_t (w - w^0)$$

    At the head of a chain this is coupled decay; with `weight_decay=2 * c` it is the same at every
    step as `regjax.l2_sp_penalty(params, reference, c)` in the loss, which has no one half and so
    the gradient $2 c (w - w^0)$. Behind the moments it is decoupled.

    Args:
        reference: $w^0$: a tree with the structure of the parameters, and the same shapes where
            they decay; cast to the dtype of the updates. Under `jit` it is a constant of the
            program unless the transformation is made inside, from an argument.
        weight_decay: $\lambda$, or a schedule, as in `add_l1_decay`.
        mask: Which parameters decay, as in `add_l1_decay`.

    Returns:
        An optax transformation with the state of `add_l1_decay`: the reference is not in it.

    Raises:
        TypeError: As `add_l1_decay` does; from `init`, a leaf of the reference is not a float or
            complex array, or complex beside a real parameter.
        ValueError: As `add_l1_decay` does; from `init`, the reference has another structure or
            shape: the message names the place.

    PyTorch: `regtorch.optim.add_l2_sp_decay(optimizer, reference, weight_decay)`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> pretrained, params = jnp.array([1.0, 1.0]), jnp.array([1.0, 3.0])
        >>> optimizer = optax.chain(add_l2_sp_decay(pretrained, 0.5), optax.sgd(0.1))
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> updates
        Array([-0. , -0.1], dtype=float32)

    References:
        Li, Grandvalet and Davoine, [Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks](https://arxiv.org/abs/1802.01483), ICML 2018.
    """

    def origins(params: PyTree, decays: PyTree[bool]) -> PyTree:
        def check(path: Any, decay: bool, w: Any, origin: Any) -> None:
            if decay and is_array(w):
                check_reference(path_name(path), w, origin)

        resolved = resolve_reference(reference, params)
        jax.tree.map_with_path(check, decays, params, resolved)
        return resolved

    return _decay(
        weight_decay, mask, lambda c, u, w, w0: u + c * (w - jnp.asarray(w0, w.dtype)), origins
    )


def add_independent_weight_decay(
    weight_decay: WeightDecay, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Shrink the parameters by a rate that the learning rate does not multiply.

    $$u \leftarrow u - \lambda_t w, \qquad\text{so}\qquad w \leftarrow w - \lambda_t w + u$$

    The last link of a chain, behind the learning rate: $u$ is then what `optax.apply_updates` adds,
    hence the minus. This is decoupled decay as its authors first defined it; AdamW in torch and
    optax multiplies it by the learning rate. No penalty in the loss does the same.

    Args:
        weight_decay: $\lambda$, or a schedule, as in `add_l1_decay`; for the authors' schedule
            multiplier, one of both rates, `lambda count: c * multiplier(count)`.
        mask: Which parameters decay, as in `add_l1_decay`.

    Returns:
        An optax transformation with the state of `add_l1_decay`.

    Raises:
        TypeError: As `add_l1_decay` does.
        ValueError: As `add_l1_decay` does.

    PyTorch: `regtorch.optim.add_independent_weight_decay(optimizer, weight_decay)`. In torch.optim
    each decay is multiplied by the learning rate, so none is equal under a schedule.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([2.0, -2.0])
        >>> optimizer = optax.chain(optax.sgd(0.1), add_independent_weight_decay(0.25))
        >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
        >>> updates
        Array([-0.6,  0.4], dtype=float32)

    References:
        Loshchilov and Hutter, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101),
        ICLR 2019, algorithms 1 and 2. Wortsman et al., [Small-scale proxies for large-scale
        Transformer training instabilities](https://arxiv.org/abs/2309.14322), ICLR 2024, for the
        name.
    """
    return _decay(weight_decay, mask, lambda c, u, w, _: u - c * w)


def add_cautious_weight_decay(
    weight_decay: WeightDecay, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Decay only the coordinates whose step leads towards zero anyway.

    $$u_i \leftarrow u_i + \lambda_t \, [\, u_i w_i \ge 0 \,] \, w_i$$

    Here $u$ is the step that is going to be subtracted, $w \leftarrow w - \eta u$: the link stands
    behind the moments and **before** the learning rate, whose minus turns every sign. Where $u_i$
    and $w_i$ have the same sign, or $u_i = 0$, both step and decay shrink $|w_i|$; where they
    differ, the step wins and there is no decay. No penalty in the loss does the same.

    Args:
        weight_decay: $\lambda$, or a schedule, as in `add_l1_decay`.
        mask: Which parameters decay, as in `add_l1_decay`.

    Returns:
        An optax transformation with the state of `add_l1_decay`.

    Raises:
        TypeError: As `add_l1_decay` does; from `init`, a complex parameter is to decay.
        ValueError: As `add_l1_decay` does.

    PyTorch: `regtorch.optim.add_cautious_weight_decay(optimizer, weight_decay)`, which has to read
    the sign of $u$ off the parameters before and after the step.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([2.0, -2.0])
        >>> optimizer = optax.chain(
        ...     optax.scale_by_sign(), add_cautious_weight_decay(0.25), optax.scale(-0.1)
        ... )
        >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
        >>> updates
        Array([-0.15, -0.1 ], dtype=float32)

    References:
        Chen et al., [Cautious Weight Decay](https://arxiv.org/abs/2510.12402), 2025, algorithm 1.
    """

    def refuse_complex(params: PyTree, decays: PyTree[bool]) -> None:
        for (name, leaf), decay in zip(named_leaves(params), jax.tree.leaves(decays), strict=True):
            if decay and is_array(leaf) and jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"cautious decay compares signs, but the parameter '{name}' is complex: use "
                    "optax.add_decayed_weights, or give it False in `mask`"
                )

    def term(c: Inexact[Array, ""], u: Leaf, w: Leaf, _: Any) -> Leaf:
        # The product itself could underflow to 0 and pass.
        agrees = jnp.sign(u) * jnp.sign(w) >= 0
        return u + jnp.where(agrees, c * w, jnp.zeros_like(w))

    return _decay(weight_decay, mask, term, refuse_complex)


def add_decay_by_leaf(
    scale: PyTree[ScalarLike], weight_decay: WeightDecay = 1.0, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Add the parameters, each leaf times a coefficient of its own: layer-wise decay.

    $$u^{(l)} \leftarrow u^{(l)} + \lambda_t s_l w^{(l)}$$

    `optax.add_decayed_weights` with a tree. At the head of a chain it is coupled, behind the
    moments decoupled.

    Args:
        scale: $s$: a tree of numbers that has the structure of the parameters or is a prefix of it,
            such as `layerwise_scale` makes.
        weight_decay: $\lambda$, or a schedule, as in `add_l1_decay`.
        mask: Which parameters decay, as in `add_l1_decay`.

    Returns:
        An optax transformation with the state of `add_l1_decay`.

    Raises:
        TypeError: As `add_l1_decay` does; from `init`, a leaf of the scale is not a number.
        ValueError: As `add_l1_decay` does; from `init`, the scale has another structure, or a
            number in it is negative, infinite or NaN: the message names the place.

    PyTorch: parameter groups with a `weight_decay` each, which `regtorch.optim.layerwise_groups`
    makes.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"stem": jnp.array([1.0]), "head": jnp.array([1.0])}
        >>> optimizer = optax.chain(add_decay_by_leaf({"stem": 0.5, "head": 1.0}), optax.sgd(0.1))
        >>> zeros = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        >>> updates
        {'head': Array([-0.1], dtype=float32), 'stem': Array([-0.05], dtype=float32)}

    References:
        Clark et al., [ELECTRA](https://arxiv.org/abs/2003.10555), ICLR 2020, for rates that fall
        with the distance from the top.
    """

    def scales(params: PyTree, decays: PyTree[bool]) -> PyTree:
        del decays
        return resolve_scale(scale, params)

    return _decay(
        weight_decay, mask, lambda c, u, w, s: u + c * jnp.asarray(s, u.dtype) * w, scales
    )


def scale_by_leaf(scale: PyTree[ScalarLike]) -> optax.GradientTransformation:
    r"""Multiply the updates, each leaf by a number of its own: layer-wise learning rates.

    $$u^{(l)} \leftarrow s_l u^{(l)}$$

    As the last link of a chain it scales the learning rate, with a decoupled decay in it, as the
    `lr` of torch's parameter groups does. At the head it would scale gradients, which Adam undoes.

    Args:
        scale: $s$: a tree of numbers that has the structure of the parameters or is a prefix of it,
            such as `layerwise_scale` makes.

    Returns:
        An optax transformation without state.

    Raises:
        TypeError: From `init`, a leaf of the scale is not a number.
        ValueError: From `init`, the scale has another structure than the parameters, or a number in
            it is negative, infinite or NaN: the message names the place.

    PyTorch: parameter groups with an `lr` each, which `regtorch.optim.layerwise_groups` makes.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> params = {"stem": jnp.array([1.0]), "head": jnp.array([1.0])}
        >>> optimizer = optax.chain(optax.sgd(0.1), scale_by_leaf({"stem": 0.5, "head": 1.0}))
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates
        {'head': Array([-0.1], dtype=float32), 'stem': Array([-0.05], dtype=float32)}

    References:
        Clark et al., [ELECTRA](https://arxiv.org/abs/2003.10555), ICLR 2020. Bao et al.,
        [BEiT](https://arxiv.org/abs/2106.08254), ICLR 2022.
    """

    def init(params: PyTree) -> optax.OptState:
        # Without leaves there is nothing to check: optax.tree.map_params passes a placeholder.
        if jax.tree.leaves(params):
            resolve_scale(scale, params)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        del params
        scales = resolve_scale(scale, updates)
        return jax.tree.map(lambda s, u: jnp.asarray(s, u.dtype) * u, scales, updates), state

    return rounded_once(optax.GradientTransformation(init, update))


def layerwise_scale(
    params: PyTree,
    layer_of: Callable[[str], int],
    factor: ScalarLike,
    *,
    depth: int | None = None,
) -> PyTree[ScalarLike]:
    r"""Make the tree of numbers that shrink geometrically from the top layer down.

    $$s_l = \text{factor}^{\,\text{depth} - l}$$

    For `scale_by_leaf` (learning rates, as in the fine-tuning of ELECTRA and BEiT), and for
    `add_decay_by_leaf`.

    Args:
        params: The parameters.
        layer_of: From a parameter's name, such as `'layers/0/kernel'`, to its layer: 0 for the one
            next to the input (embeddings), the largest for the head.
        factor: How much smaller each layer is than the one above: a finite number, not negative,
            such as 0.75.
        depth: The layer whose number is 1; the largest layer that `layer_of` names, where None.

    Returns:
        A tree with the structure of `params`.

    Raises:
        TypeError: `layer_of` is not a function, or gives something else than an int; `factor` is
            not a number, or `depth` not an integer.
        ValueError: A layer is negative or above `depth`, and the message names the parameter; or
            `factor` is out of range, or `depth` negative.

    PyTorch: `regtorch.optim.layerwise_groups`, whose names have dots for slashes.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"0": {"kernel": jnp.ones(2)}, "1": jnp.ones(2), "2": jnp.ones(2)}
        >>> layerwise_scale(params, lambda name: int(name.split("/")[0]), 0.5)
        {'0': {'kernel': 0.25}, '1': 0.5, '2': 1.0}

    References:
        Clark et al., [ELECTRA](https://arxiv.org/abs/2003.10555), ICLR 2020. Bao et al.,
        [BEiT](https://arxiv.org/abs/2106.08254), ICLR 2022.
    """
    check_callable("layer_of", layer_of, "from a parameter's name to its layer")
    check_coefficient("factor", factor, fix="pass 1.0 for the same in all layers")
    if depth is not None:
        check_integer("depth", depth, minimum=0)
    layers = [_layer(name, layer_of(name), depth) for name, _ in named_leaves(params)]
    top = max(layers, default=0) if depth is None else depth
    return jax.tree.structure(params).unflatten(factor ** (top - layer) for layer in layers)


def _layer(name: str, layer: Any, depth: int | None) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer_of('{name}') must be an int, but it is {layer!r}")
    if layer < 0 or (depth is not None and layer > depth):
        limit = "not negative" if depth is None else f"in [0, depth={depth}]"
        raise ValueError(f"layer_of('{name}') must be {limit}, but it is {layer}")
    return layer


def _decay(
    weight_decay: WeightDecay,
    mask: Mask,
    term: Callable[[Any, Any, Any, Any], Any],
    resolve: Callable[[PyTree, PyTree[bool]], PyTree | None] = lambda params, decays: None,
) -> optax.GradientTransformation:
    """Make a link of `term(coefficient, update, parameter, other)`, applied where the mask says.

    `resolve` checks the parameters and gives the tree of the others, or None.
    """
    if not callable(weight_decay):
        check_coefficient("weight_decay", weight_decay, fix="pass 0.0 for none")
    if not is_zero(weight_decay):
        check_mask(mask, weight_decay)

    def trees(params: PyTree) -> tuple[PyTree[bool], PyTree]:
        decays = resolve_mask(mask, params)
        others = resolve(params, decays)
        return decays, decays if others is None else others

    def init(params: PyTree) -> optax.OptState:
        # Without leaves there is nothing to check: optax.tree.map_params passes a placeholder.
        if jax.tree.leaves(params):
            trees(params)
        if callable(weight_decay):
            return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "params is None, but a decay needs the parameters: call update(updates, state, "
                "params)"
            )
        coefficient = weight_decay
        if callable(weight_decay):
            coefficient = weight_decay(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))

        def decayed(decay: bool, u: Any, w: Any, other: Any) -> Any:
            if not decay or u is None:
                return u
            return term(jnp.asarray(coefficient, u.dtype), u, jnp.asarray(w, u.dtype), other)

        decays, others = trees(params)
        return jax.tree.map(decayed, decays, updates, params, others), state

    return rounded_once(optax.GradientTransformation(init, update))
