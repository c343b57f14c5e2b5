"""Decays beyond L2, as links of an optax chain: L1, L2-SP, independent, cautious and per leaf.

The position of a link in the chain determines its effect:

    coupled      optax.chain(add_l1_decay(c), optim.adam(lr))
    decoupled    optax.chain(optim.adam(1.0), optax.scale(-1.0), add_l1_decay(c),
                             optax.scale_by_learning_rate(lr))
    independent  optax.chain(optim.adam(lr), add_independent_weight_decay(c))

Coupled decay is part of the gradient and passes through momentum and moments: it equals a penalty
in the loss, and is clipped if a clipping follows it. Decoupled decay joins the finished step, here
that of an optimizer with learning rate 1, negated, before the learning rate multiplies both.
Independent decay joins after the learning rate. In the formulas, $u$ is the update that reaches the
link.

Each `weight_decay` may be a schedule from the step count, starting at 0, such as the rising cosine
of DINO. Half types are computed in float32 and rounded once per link. The equivalent of the penalty
`regjax.elastic_net_penalty(params, l1, l2)` is two links,
`optax.chain(add_l1_decay(l1), optax.add_decayed_weights(2 * l2))`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from regjax._decay.paths import named_leaves, path_name
from regjax._decay.validation import check_reference, resolve_mask, resolve_reference, resolve_scale
from regjax.optim._gradients import check_given, is_array
from regjax.optim._links import check_mask, is_zero, rounded_once
from regshared.checks import check_coefficient
from regshared.layerwise import distances_from_top

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Inexact, PyTree, ScalarLike

    from regjax.optim._links import Mask, WeightDecay

    Leaf = Inexact[Array, "*shape"]


def add_l1_decay(weight_decay: WeightDecay, mask: Mask = None) -> optax.GradientTransformation:
    r"""Add the sign of the parameters, times a coefficient: L1 decay.

    $$u \leftarrow u + \lambda_t \operatorname{sign}(w), \qquad \operatorname{sign}(0) = 0$$

    At the head of a chain this is coupled decay and equals
    `regjax.l1_penalty(params, weight_decay)` in the loss at every step, with no factor 2. After the
    moments it is decoupled, and no penalty is equivalent. Complex numbers add $w / |w|$.

    Args:
        weight_decay: $\lambda$: a finite, nonnegative number, or a schedule from the step count.
        mask: The parameters that decay: `None` (all), a pytree of bools with their structure or a
            prefix of it, or a function from the parameters to such a pytree.

    Returns:
        An optax transformation. Its state is `optax.ScaleByScheduleState` (the step count) with a
        schedule, and empty without.

    Raises:
        TypeError: `weight_decay` is not a number, or a leaf of the mask not a bool.
        ValueError: `weight_decay` is negative, infinite or NaN; the mask is False everywhere; from
            `init`, the mask has another structure than the parameters; from `update`, `params` is
            missing.

    Note (PyTorch):
        `regtorch.optim.add_l1_decay(optimizer, weight_decay)`; PyTorch itself has no L1 decay.
        `maximize=True` negates its input, so a decay before it would grow the parameters: put
        `optax.scale(-1.0)` ahead of the decay instead.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([2.0, -2.0, 0.0])
        >>> optimizer = optax.chain(add_l1_decay(0.5), optax.sgd(0.1))
        >>> optimizer.update(jnp.ones(3), optimizer.init(params), params)[0]
        Array([-0.15, -0.05, -0.1 ], dtype=float32)

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 58(1), 1996.
    """
    return _decay(weight_decay, mask, lambda c, u, w, _: u + c * jnp.sign(w))


def add_l2_sp_decay(
    reference: PyTree, weight_decay: WeightDecay, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Add the difference from a starting point, times a coefficient: L2-SP decay.

    $$u \leftarrow u + \lambda_t (w - w^0)$$

    At the head of a chain this is coupled decay; `weight_decay=2 * c` equals
    `regjax.l2_sp_penalty(params, reference, c)` in the loss at every step, whose gradient is
    $2 c (w - w^0)$. After the moments it is decoupled.

    `reference` is $w^0$, a pytree with the structure of the parameters, and their shapes where they
    decay; it is cast to the dtype of the updates. It is not in the state. Under `jit` it is a
    constant of the program unless the transformation is created inside, from an argument. The other
    arguments, the state and the errors are those of `add_l1_decay`; `init` also checks the
    reference, and raises the errors of `regjax.l2_sp_penalty`.

    Note (PyTorch):
        `regtorch.optim.add_l2_sp_decay(optimizer, reference, weight_decay)`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> pretrained, params = jnp.array([1.0, 1.0]), jnp.array([1.0, 3.0])
        >>> optimizer = optax.chain(add_l2_sp_decay(pretrained, 0.5), optax.sgd(0.1))
        >>> optimizer.update(jnp.zeros(2), optimizer.init(params), params)[0]
        Array([-0. , -0.1], dtype=float32)

    References:
        See `regjax.l2_sp_penalty`.
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

    Use it as the last link of a chain, after the learning rate, where $u$ is what
    `optax.apply_updates` adds; hence the minus. This is decoupled decay as its authors first
    defined it; AdamW in PyTorch and optax multiplies it by the learning rate. No penalty in the
    loss is equivalent. For the authors' schedule multiplier, common to both rates, pass
    `lambda count: c * multiplier(count)`.

    The arguments, the state and the errors are those of `add_l1_decay`.

    Note (PyTorch):
        `regtorch.optim.add_independent_weight_decay(optimizer, weight_decay)`. In torch.optim the
        learning rate multiplies every decay, so none is equal under a schedule.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([2.0, -2.0])
        >>> optimizer = optax.chain(optax.sgd(0.1), add_independent_weight_decay(0.25))
        >>> optimizer.update(jnp.ones(2), optimizer.init(params), params)[0]
        Array([-0.6,  0.4], dtype=float32)

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, ICLR 2019,
        algorithms 1 and 2. Wortsman et al., "Small-scale proxies for large-scale Transformer
        training instabilities", arXiv:2309.14322, ICLR 2024, for the name.
    """
    return _decay(weight_decay, mask, lambda c, u, w, _: u - c * w)


def add_cautious_weight_decay(
    weight_decay: WeightDecay, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Decay only the coordinates that the step moves toward zero.

    $$u_i \leftarrow u_i + \lambda_t \, [\, u_i w_i \ge 0 \,] \, w_i$$

    Here $u$ is the step to be subtracted, $w \leftarrow w - \eta u$: put the link after the moments
    and **before** the learning rate, which negates every sign. Where $u_i$ and $w_i$ have the same
    sign, or $u_i = 0$, both step and decay shrink $|w_i|$; where the signs differ, there is no
    decay. No penalty in the loss is equivalent.

    The arguments, the state and the errors are those of `add_l1_decay`; `init` also raises a
    `TypeError` if a complex parameter decays.

    Note (PyTorch):
        `regtorch.optim.add_cautious_weight_decay(optimizer, weight_decay)`, which has to infer the
        sign of $u$ from the parameters before and after the step.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = jnp.array([2.0, -2.0])
        >>> optimizer = optax.chain(
        ...     optax.scale_by_sign(), add_cautious_weight_decay(0.25), optax.scale(-0.1)
        ... )
        >>> optimizer.update(jnp.ones(2), optimizer.init(params), params)[0]
        Array([-0.15, -0.1 ], dtype=float32)

    References:
        Chen et al., "Cautious Weight Decay", arXiv:2510.12402, 2025, algorithm 1.
    """

    def refuse_complex(params: PyTree, decays: PyTree[bool]) -> None:
        for (name, leaf), decay in zip(named_leaves(params), jax.tree.leaves(decays), strict=True):
            if decay and is_array(leaf) and jnp.iscomplexobj(leaf):
                raise TypeError(
                    f"params must be real for cautious decay, which compares signs; got "
                    f"{leaf.dtype} at '{name}'. Use optax.add_decayed_weights, or pass False for "
                    "it in mask."
                )

    def term(c: Inexact[Array, ""], u: Leaf, w: Leaf, _: Any) -> Leaf:
        # Signs, because the product u * w could underflow to 0 and pass.
        agrees = jnp.sign(u) * jnp.sign(w) >= 0
        return u + jnp.where(agrees, c * w, jnp.zeros_like(w))

    return _decay(weight_decay, mask, term, refuse_complex)


def add_decay_by_leaf(
    scale: PyTree[ScalarLike], weight_decay: WeightDecay = 1.0, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Add the parameters, each leaf times its own coefficient: layer-wise decay.

    $$u^{(l)} \leftarrow u^{(l)} + \lambda_t s_l w^{(l)}$$

    This is `optax.add_decayed_weights` with a pytree: coupled at the head of a chain, decoupled
    after the moments. `scale` is $s$, a pytree of numbers with the structure of the parameters or a
    prefix of it, such as `layerwise_scale` returns. The other arguments and the state are those of
    `add_l1_decay`, and so are the errors; `init` also raises a TypeError if a leaf of the scale is
    not a number, and a ValueError that names the path if the scale has another structure, or a
    number in it is negative, infinite or NaN.

    Note (PyTorch):
        Parameter groups with their own `weight_decay`; see `regtorch.optim.layerwise_groups`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"stem": jnp.array([1.0]), "head": jnp.array([1.0])}
        >>> optimizer = optax.chain(add_decay_by_leaf({"stem": 0.5, "head": 1.0}), optax.sgd(0.1))
        >>> zeros = jax.tree.map(jnp.zeros_like, params)
        >>> optimizer.update(zeros, optimizer.init(params), params)[0]
        {'head': Array([-0.1], dtype=float32), 'stem': Array([-0.05], dtype=float32)}

    References:
        Clark et al., "ELECTRA", arXiv:2003.10555, ICLR 2020, for rates that decrease with the
        distance from the top.
    """

    def scales(params: PyTree, decays: PyTree[bool]) -> PyTree:
        del decays
        return resolve_scale(scale, params)

    return _decay(
        weight_decay, mask, lambda c, u, w, s: u + c * jnp.asarray(s, u.dtype) * w, scales
    )


def scale_by_leaf(scale: PyTree[ScalarLike]) -> optax.GradientTransformation:
    r"""Multiply the updates, each leaf by its own number: layer-wise learning rates.

    $$u^{(l)} \leftarrow s_l u^{(l)}$$

    As the last link of a chain it scales the learning rate, including a decoupled decay, like the
    `lr` of PyTorch's parameter groups. At the head it would scale gradients, which Adam undoes.
    `scale` and its errors are those of `add_decay_by_leaf`; there is no state.

    Note (PyTorch):
        Parameter groups with their own `lr`; see `regtorch.optim.layerwise_groups`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"stem": jnp.array([1.0]), "head": jnp.array([1.0])}
        >>> optimizer = optax.chain(optax.sgd(0.1), scale_by_leaf({"stem": 0.5, "head": 1.0}))
        >>> optimizer.update(params, optimizer.init(params), params)[0]
        {'head': Array([-0.1], dtype=float32), 'stem': Array([-0.05], dtype=float32)}

    References:
        Clark et al., "ELECTRA", arXiv:2003.10555, ICLR 2020. Bao et al., "BEiT", arXiv:2106.08254,
        ICLR 2022.
    """

    def init(params: PyTree) -> optax.OptState:
        # Nothing to check without leaves: optax.tree.map_params passes a placeholder.
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
    r"""Return a pytree like `params` of numbers that decrease geometrically from the top down.

    $$s_l = \text{factor}^{\,\text{depth} - l}$$

    Pass it to `scale_by_leaf` (learning rates, as in the fine-tuning of ELECTRA and BEiT) or to
    `add_decay_by_leaf`.

    Args:
        params: The parameters.
        layer_of: A function from a parameter's name, such as `'layers/0/kernel'`, to its layer: 0
            next to the input (embeddings), the largest for the head.
        factor: The ratio of each layer to the one above, such as 0.75: finite and nonnegative.
        depth: The layer whose number is 1; by default the largest that `layer_of` returns.

    Raises:
        TypeError: `layer_of` is not a function, or does not return an int; `factor` is not a
            number, or `depth` not an integer.
        ValueError: A layer is negative or above `depth` (the message names the parameter), `factor`
            is out of range, or `depth` is negative.

    Note (PyTorch):
        `regtorch.optim.layerwise_groups`, whose names have dots for slashes.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"0": {"kernel": jnp.ones(2)}, "1": jnp.ones(2), "2": jnp.ones(2)}
        >>> layerwise_scale(params, lambda name: int(name.split("/")[0]), 0.5)
        {'0': {'kernel': 0.25}, '1': 0.5, '2': 1.0}

    References:
        See `scale_by_leaf`.
    """
    check_coefficient("factor", factor, fix="Pass 1.0 for the same in all layers.")
    names = [name for name, _ in named_leaves(params)]
    distances = distances_from_top(names, layer_of, depth)
    return jax.tree.structure(params).unflatten(factor**distance for distance in distances)


def _decay(
    weight_decay: WeightDecay,
    mask: Mask,
    term: Callable[[Any, Any, Any, Any], Any],
    resolve: Callable[[PyTree, PyTree[bool]], PyTree | None] = lambda params, decays: None,
) -> optax.GradientTransformation:
    """Create a link of `term(coefficient, update, parameter, other)`, subject to the mask.

    `resolve` checks the parameters and returns the pytree of the others, or None.
    """
    if not callable(weight_decay):
        check_coefficient("weight_decay", weight_decay, fix="Pass 0.0 for none.")
    if not is_zero(weight_decay):
        check_mask(mask, weight_decay)

    def trees(params: PyTree) -> tuple[PyTree[bool], PyTree]:
        decays = resolve_mask(mask, params)
        others = resolve(params, decays)
        return decays, decays if others is None else others

    def init(params: PyTree) -> optax.OptState:
        # Nothing to check without leaves: optax.tree.map_params passes a placeholder.
        if jax.tree.leaves(params):
            trees(params)
        if callable(weight_decay):
            return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        check_given(params, "a decay needs them")
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
